"""Empty packages in place of those that SGLang imports and that have no CPU builds. For tests; never part of the wheel.

None of them is called on the options that the tests start SGLang with. `scripts/sglang_cpu.sh` copies this file into the
environment of SGLang, where a .pth line imports it at the start of every process.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = frozenset({"torchvision", "torchaudio", "sgl_kernel", "triton"})


class EmptyType(type):
    """A class on which any attribute can be looked up, as of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class EmptyPackage(ModuleType):
    """Has a class of every capitalised name and a subpackage of every other, and serves as any decorator."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = EmptyType(
                name, (), {"__module__": self.__name__, "__init__": _ignore, "__init_subclass__": _ignore}
            )
        else:
            value = _package(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if len(arguments) == 1 and callable(arguments[0]) and not options:
            return arguments[0]
        return _decorator


class StandIns(MetaPathFinder, Loader):
    """Finds and makes the packages."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = EmptyPackage(spec.name)
        module.__file__ = __file__
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _package(name: str) -> ModuleType:
    if name not in sys.modules:
        __import__(name)
    return sys.modules[name]


def _decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _ignore(*arguments: Any, **options: Any) -> None:
    pass


sys.meta_path.insert(0, StandIns())
