"""The precision of the multiplications: fp32, or bf16 under autocast."""

from __future__ import annotations

from typing import Any

import torch


def choose_precision(precision: str, device: str) -> str:
    """Return the precision that `auto` means on a device: bf16 if the hardware supports it, else fp32.

    Such hardware is a GPU of compute capability 8.0 (Ampere) or later, or a CPU with AVX512-BF16 or AMX.

    Args:
        precision: `auto`, `fp32` or `bf16`; the last two are returned unchanged.
        device: `cpu` or `cuda`.
    """
    if precision != "auto":
        return precision
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_tile"))
    else:
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    return "bf16" if has_bf16 else "fp32"


def describe_precision(precision: str, device: torch.device) -> str:
    """Return in which precision a training multiplies, for the record: of a GPU, also where fp32 is not fp32."""
    if precision == "fp32" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        # Not `allow_tf32`: reading it is an error if a program has used these newer settings.
        cudnn: Any = torch.backends.cudnn
        settings = {"convolutions": cudnn.conv, "matrix products": torch.backends.cuda.matmul}
        where = [name for name, setting in settings.items() if setting.fp32_precision == "tf32"]
        return f"fp32, {' and '.join(where)} in TF32" if where else "fp32"
    return precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which the multiplications run in a precision. Weights and sums stay in fp32."""
    # Without the cache of casts: a step casts each weight once anyway, and a CUDA graph must not reuse the casts of an
    # earlier step.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
