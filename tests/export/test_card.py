"""The model card and the script."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest
import torch

from hpo.export.card import classify_script, render_card
from hpo.train.network import build_model
from hpo.train.params import STEMS, TrainParams


def make_facts(**changes: Any) -> dict[str, Any]:
    facts = {
        "study": "mine",
        "trial": 7,
        "params": asdict(TrainParams()),
        "seed": 3,
        "epochs": 2,
        "data": {"dataset": "fashion_mnist"},
        "data_sha256": "abc",
        "images": {"train": 55000, "val": 5000, "test": 10000},
        "accuracy": {"val_accuracy": 0.9, "test_accuracy": 0.91239},
        "as_trained": {"how": "in fp32 on the CPU", "val_accuracy": 0.9, "test_accuracy": 0.91239},
        "classes": ["shirt", "bag"],
        "confusion": [[3, 1], [0, 0]],
        "trained": {"device": "cuda", "device_name": "H200", "packages": {"torch": "2.15", "numpy": "2.3"}},
        "exported": {"code": "1.0", "packages": {"torch": "2.16"}},
        "remarks": [],
    }
    return facts | changes


@pytest.mark.parametrize(
    "line",
    [
        "# ResNet-18 on fashion_mnist: trial 7 of the search mine",
        "| test accuracy | 0.9124 of 10,000 images, scored once |",
        "| validation accuracy | 0.9000 of 5,000 images, by which it was chosen |",
        "Both were measured again for this card, in fp32 on the CPU.",
        "| | accuracy | shirt | bag |",
        "|---|---|---|---|",
        "| shirt | 0.7500 | 3 | 1 |",
        "| bag | 0.0000 | 0 | 0 |",
        "| lr | 0.01 |",
        "2 epochs on 55,000 images, without augmentation; cross-entropy; seed 3.",
        "| device | H200 (cuda) |",
        "| packages | torch 2.15, numpy 2.3 |",
        "| Python | ? on ? |",
        "| repeat | `hpo replay mine 7` |",
        "| exported by | hpo 1.0, torch 2.16 |",
    ],
)
def test_the_card_has_the_line(line: str) -> None:
    assert line in render_card(make_facts()).splitlines()


def test_the_card_says_what_is_unknown() -> None:
    card = render_card(make_facts(trained={}))
    for line in ("| device | ? (?) |", "| code | hpo ? |", "| packages | ? |"):
        assert line in card.splitlines()


def test_the_card_has_each_remark_in_its_own_paragraph() -> None:
    assert "\n\n**Note**: one.\n\n**Note**: two.\n\n" in render_card(make_facts(remarks=["one", "two"]))


def test_the_card_has_the_scores_as_in_training_if_they_were_computed() -> None:
    as_trained = {"how": "in bf16 on H200", "val_accuracy": 0.8, "test_accuracy": 0.85}
    card = render_card(make_facts(as_trained=as_trained))
    assert " in fp32 on the CPU. Scored in bf16 on H200, as in training, they are 0.8500 and 0.8000.\n\n" in card


def test_the_card_has_no_stray_blank_lines_in_tables() -> None:
    card = render_card(make_facts(remarks=["one"]))
    assert "\n\n\n" not in card
    assert card.endswith(" |\n")
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        rows = table.splitlines()
        assert re.fullmatch(r"\|(---\|)+", rows[1])
        assert len({row.count("|") for row in rows}) == 1


@pytest.mark.slow  # imports torchvision
@pytest.mark.parametrize("stem", STEMS)
def test_the_card_builds_the_network_of_each_stem(stem: str) -> None:
    card = render_card(
        make_facts(
            params=asdict(TrainParams(stem=stem)), classes=[f"class {i}" for i in range(10)], confusion=[[1] * 10] * 10
        )
    )
    (code,) = re.findall(r"```python\n(import torch\nfrom safetensors.*?)model\.load_state_dict", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    network = build_model(stem=stem).eval()
    names["model"].load_state_dict(network.state_dict())
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(images), network(images))


def test_the_script_is_python_and_needs_torch_and_pillow_only() -> None:
    script = classify_script()
    compile(script, "classify.py", "exec")
    assert re.findall(r"^(?:import|from) (\w+)", script, re.MULTILINE) == ["json", "sys", "pathlib", "torch", "PIL"]


def params_of(**changes: Any) -> dict[str, Any]:
    return asdict(TrainParams(**changes))


def test_the_card_of_a_recipe_says_what_it_did() -> None:
    card = render_card(make_facts(params=params_of(flip=True, ema=0.9, tta=True)))
    assert ", with augmentation; cross-entropy; seed 3. The weights are an average over the steps.\n\n" in card
    assert "the program gives the mean of its logits for an image and its mirror image:\n\n" in card
    assert "The weights are an average" not in render_card(make_facts())


def test_the_card_of_another_width_loads_the_network_of_hpo() -> None:
    card = render_card(make_facts(params=params_of(width=0.25), classes=["a"] * 10, confusion=[[1] * 10] * 10))
    assert "import resnet18" not in card
    (code,) = re.findall(r"```python\n(from safetensors.*?)model\.load_state_dict", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    names["model"].load_state_dict(build_model(width=0.25).state_dict())


def test_a_card_without_validation_images_says_nothing_of_them() -> None:
    card = render_card(
        make_facts(
            images={"train": 60000, "test": 10000},
            accuracy={"test_accuracy": 0.9},
            as_trained={"how": "in bf16 on H200", "test_accuracy": 0.85},
        )
    )
    assert "validation accuracy" not in card
    assert "\n\nIt was measured again for this card, in fp32 on the CPU. " in card
    assert " Scored in bf16 on H200, as in training, it is 0.8500.\n" in card
    assert "split into 60,000 training, 0 validation, 10,000 test images" in card
