"""Objects that the configuration names by `_target_`."""

from collections.abc import Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException

from lightning_dataflow.contracts import UserError


def instantiate(setting: str, entry: Mapping[str, Any], *arguments: Any) -> Any:
    """Make the object that `entry` names, from `arguments` and the entry's other keys.

    Raises:
        UserError: there is no such class, or it does not take these arguments. Other errors pass through.
    """
    name = entry["_target_"].rsplit(".", 1)[-1]
    try:
        return hydra.utils.instantiate(entry, *arguments, _convert_="all")
    except InstantiationException as error:
        if str(error).startswith("Error locating target"):
            raise UserError(f"{setting}._target_={entry['_target_']} cannot be imported: correct its name") from error
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        cause = str(error.__cause__)
        if not (cause.startswith(f"{name}.__init__()") and "argument" in cause):
            raise
        raise UserError(f"{setting}: {cause}; correct the keys of {setting}") from error
