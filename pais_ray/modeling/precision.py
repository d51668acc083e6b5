"""Mixed precision."""

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast for ``precision`` (fp32 | bf16 | fp16) on ``device``; it has no effect for fp32."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision, torch.bfloat16), enabled=precision != "fp32")
