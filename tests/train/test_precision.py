"""The choice of the precision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hpo.train.precision import choose_precision, describe_precision


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


@pytest.mark.parametrize(
    ("precision", "device", "capability", "is_tf32", "expected"),
    [
        ("fp32", "cuda", (9, 0), (True, False), "fp32, convolutions in TF32"),
        ("fp32", "cuda", (9, 0), (True, True), "fp32, convolutions and matrix products in TF32"),
        ("fp32", "cuda", (9, 0), (False, False), "fp32"),
        ("fp32", "cuda", (7, 5), (True, False), "fp32"),  # TF32 came with Ampere
        ("bf16", "cuda", (9, 0), (True, False), "bf16"),
        ("fp32", "cpu", (9, 0), (True, False), "fp32"),
    ],
)
def test_the_record_says_where_fp32_is_tf32(
    precision: str,
    device: str,
    capability: tuple[int, int],
    is_tf32: tuple[bool, bool],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", is_tf32[0])
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32" if is_tf32[1] else "none"))
    assert describe_precision(precision, torch.device(device)) == expected


def test_by_default_only_convolutions_are_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hpo/train/README.md says about torch."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert describe_precision("fp32", torch.device("cuda")) == "fp32, convolutions in TF32"
