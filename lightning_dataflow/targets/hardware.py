"""What the hardware is good at."""

import os

import torch


def default_device() -> torch.device:
    """This rank's GPU (by `LOCAL_RANK`, as launchers set it), or the CPU. A rank builds its target before Lightning selects
    the device."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run natively; elsewhere they are emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
