"""The choice of the precision."""

from __future__ import annotations

import pytest
import torch

from hpo.train.precision import choose_precision


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx2": True}, "fp32"),
        ({"avx512_bf16": False, "amx_tile": False}, "fp32"),
        ({"avx512_bf16": True, "amx_tile": False}, "bf16"),
        ({"avx512_bf16": False, "amx_tile": True}, "bf16"),
    ],
)
def test_auto_is_bf16_on_a_cpu_that_multiplies_in_bf16(
    capabilities: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto", "cpu") == precision


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_on_a_gpu_from_ampere_on(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_precision("auto", "cuda") == precision


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_that_is_named_is_used(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": precision == "fp32"})
    assert choose_precision(precision, "cpu") == precision
