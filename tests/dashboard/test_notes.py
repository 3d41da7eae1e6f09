from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hpo.dashboard.notes import code, describe_trial
from hpo.report.reading import read_results
from hpo.space.model import Space
from storage.parents import Parent
from storage.study import Study
from tests.dashboard.builders import EPOCHS, REASON, metrics_of, space_settings


def test_a_note_has_params_training_machine_duration_and_parent(study: Study) -> None:
    results, space = read_results(study), Space.from_settings(study.settings)
    note = describe_trial(results, results.trials[2], space)
    assert note.splitlines() == [
        f"- **COMPLETE** after 5 of 5 epochs: val_accuracy {metrics_of(2, EPOCHS)['val_accuracy']:.4f}",
        "- **Params**: `lr 0.3`",
        "- **Training**: `hpo.train:train`, seed 7, version `1.2`",
        "- **Machine**: `node-7`, `NVIDIA H200 (cuda)`, Python 3",
        "- **Duration**: 10.0 s, 2.00 s per epoch",
        f"- **Parent**: [trial 0](/dashboard/studies/{study.study_id}/trials?numbers=0)",
        "- **Replay**: `hpo replay search 2`",
    ]
    assert "Parent" not in describe_trial(results, results.trials[1], space)


def test_the_note_of_a_result_of_an_earlier_study_names_it(study: Study) -> None:
    results, space = read_results(study), Space.from_settings(study.settings)
    attrs = {"reused_from": {"study": "grid", "trial": 3, "id": "0123456789ab"}}
    note = describe_trial(results, replace(results.trials[0], attrs=attrs), space)
    assert "- **Reused from**: `grid #3`, which trained it" in note.splitlines()


def test_the_note_of_a_trial_that_continues_another_one_names_it(study: Study) -> None:
    results, space = read_results(study), Space.from_settings(study.settings)
    parent = Parent("grid@1", 3, "0123456789ab", 2, "grid-0123456789ab", "key")
    trial = replace(results.trials[2], attrs={"continued_from": parent.attribute})
    note = describe_trial(results, trial, space)
    assert "- **Continued from**: `grid@1 #3`, after epoch 2" in note.splitlines()
    assert "- **Duration**: 6.0 s, 2.00 s per epoch" in note.splitlines(), "of its own epochs"


def test_the_note_of_a_failed_trial_has_the_wrapped_reason(study: Study) -> None:
    results = read_results(study)
    note = describe_trial(results, results.trials[4], Space.from_settings(study.settings))
    assert "".join(REASON.split()) in "".join(note.split())
    assert max(map(len, note.splitlines())) < 100


def test_a_note_names_the_command_if_the_study_has_one(study: Study) -> None:
    results = read_results(study)
    space = Space.from_settings(space_settings(command="python train.py --lr {lr}"))
    assert "**Training**: `python train.py --lr {lr}`, seed 7" in describe_trial(results, results.trials[0], space)


def test_a_note_of_a_study_with_unreadable_settings_leaves_them_out(study: Study) -> None:
    results = read_results(study)
    note = describe_trial(results, results.trials[0], None)
    assert "after 5 of ? epochs" in note
    assert "**Training**: `?`, seed ?, version `1.2`" in note


@pytest.mark.parametrize("text", ["plain", "a `b` c", "``", "```\n<script>", "`", ""])
def test_markup_in_code_is_not_interpreted(text: str) -> None:
    quoted = code(text, block=True)
    fence = quoted.split("\n", 1)[0]
    assert re.fullmatch("`{3,}", fence)
    assert quoted == f"{fence}\n{text}\n{fence}"
    assert fence not in text
    inline = re.fullmatch(r"(`+)( ?)(.*)\2\1", code(text), re.DOTALL)
    assert inline is not None
    assert inline[1] not in text
    assert inline[3] == text
