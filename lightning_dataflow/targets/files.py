"""The weight files of a target: which there are, and whether they are whole."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.foreign import first_line, parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor, by its name.

    Raises:
        UserError: there are no files, the index names one that is missing, or one is damaged or cut short.
    """
    return {name: (file, shape) for file in _weight_files(folder) for name, shape in tensor_shapes(file).items()}


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a safetensors file, by name. Raises UserError if the file cannot be read, or is cut short."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or cut short ({first_line(error)}): fetch the file again") from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: one file before an index, an index before others.

    Raises UserError if there are none, or if the index names one that is missing.
    """
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        files = _indexed(folder / INDEX)
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(_no_weights(folder))
    return files


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(parse_json(index.read_bytes(), str(index))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {index}: fetch it again, or remove it if there is one {SINGLE}") from error
    if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"{index} names {str(bad[0])[:80]!r}, which is no file of its folder: fetch the index again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{index} names {missing[0]}{more}, which the folder does not have: fetch what is missing, or remove the index "
            "if it is of an older copy"
        )
    return [index.parent / name for name in names]


def _no_weights(folder: Path) -> str:
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if not pickled:
        return f"no safetensors in {folder}: fetch the target's weights into it"
    return (
        f"{folder} has {pickled[0].name} but no safetensors, the only format that is read here: fetch the target's "
        "safetensors, or ask its author for them"
    )
