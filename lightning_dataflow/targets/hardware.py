"""What the hardware is good at."""

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run natively; elsewhere they are emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
