"""From Hydra's configuration to checked dataclasses: no other module sees containers of OmegaConf."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from lightning_dataflow.config.conditions import register_conditions
from lightning_dataflow.config.fields import check_fields
from lightning_dataflow.config.schema import TrainConfig, register_schemas
from lightning_dataflow.contracts import UnknownNameError, UserError

DIRECTORY_FLAGS = ("-cd", "--config-dir")


def register_settings(arguments: Sequence[str]) -> None:
    """Tell Hydra what it cannot read from files; the shipped strategies come last, as Hydra also prefers their files."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, folder = argument.partition("=")
        if flag in DIRECTORY_FLAGS:
            register_conditions(Path(folder if equals else following))
    register_schemas()


def parse_config(config: DictConfig) -> TrainConfig:
    """The configuration as dataclasses.

    Raises:
        UserError: a value is missing, or a setting alone is wrong; what settings must keep to together is in `rules`.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"no value for {', '.join(missing)}: set it on the command line, for example {missing[0]}=…")
    parsed: TrainConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    check_fields(parsed)
    return parsed


def check_choices(arguments: Sequence[str]) -> None:
    """Raise UnknownNameError for a choice that a group does not have: one line, where Hydra's message takes several.

    Where the user adds folders of configuration, only Hydra knows the choices.
    """
    if any("hydra.searchpath" in argument or argument.startswith(DIRECTORY_FLAGS) for argument in arguments):
        return
    root = files("lightning_dataflow.conf")
    for group, _, choice in (argument.lstrip("+~").partition("=") for argument in arguments):
        folder = root / group
        if group.isidentifier() and choice and folder.is_dir():
            names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())
            if unknown := set(choice.split(",")) - {*names, "null"}:
                raise UnknownNameError(f"{group}={min(unknown)} is unknown: available are {', '.join(names)}")


def quoted(value: object) -> str:
    """`value` as a string of Hydra's grammar, which otherwise takes some characters of paths for its own."""
    return QuotedString(text=str(value), quote=Quote.single).with_quotes()
