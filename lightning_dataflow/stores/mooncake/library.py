"""Mooncake's Python package: its installation and settings, and what an older release lacks."""

import logging
import os
from typing import Any

from lightning_dataflow.contracts import UserError

RAW_CALLS = ("batch_put_from", "batch_get_into", "register_buffer")

# The Mooncake library reads these from the environment when a client is made; a variable that is already set wins.
# Kept connections and slices of 1 MB move 64 MB tensors 1.1 to 1.4 times as fast as the defaults.
TRANSFER_SETTINGS = {"MC_TCP_ENABLE_CONNECTION_POOL": "1", "MC_TCP_SLICE_SIZE": str(1 << 20)}
# Its messages would mix with our output.
LOG_SETTINGS = {"MC_LOG_LEVEL": "ERROR"}

INSTALL = (
    "pip install 'lightning-dataflow[mooncake]' (with an NVIDIA GPU: [mooncake-cuda]); "
    "Debian packages: libibverbs1 librdmacm1 libnuma1"
)

logger = logging.getLogger(__name__)


def import_mooncake() -> Any:
    """Mooncake's store module. Raises UserError with the remedy when it is missing."""
    for name, value in (TRANSFER_SETTINGS | LOG_SETTINGS).items():
        os.environ.setdefault(name, value)
    try:
        import mooncake.store
    except ImportError as error:  # the package, or one of the shared libraries that it needs
        raise UserError(f"cannot load Mooncake ({error}): {INSTALL}") from error
    return mooncake.store


def has_raw_calls(backend: type) -> bool:
    """Whether this release of Mooncake moves raw memory."""
    missing = [name for name in RAW_CALLS if not hasattr(backend, name)]
    if missing:
        logger.warning("this release of Mooncake has no %s: tensors are copied once more (zero_copy=false)", missing[0])
    return not missing
