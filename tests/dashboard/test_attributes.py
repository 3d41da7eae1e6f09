"""optuna-dashboard's own functions read what `hpo.dashboard.attributes` writes."""

from __future__ import annotations

import json
from typing import Any

import optuna
import plotly.graph_objects as go
import pytest

from hpo.dashboard.attributes import MAX_ATTR_CHARS, Artifact, DashboardAttributes
from storage.optuna_internals import trial_id


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "a note", "x" * MAX_ATTR_CHARS, "ä" * (3 * MAX_ATTR_CHARS + 1)])
def test_optuna_dashboard_reads_a_note(text: str) -> None:
    from optuna_dashboard._note import get_note_from_system_attrs

    attributes = DashboardAttributes({})
    assert not attributes.has_note(3)
    attributes.add_note(3, text)
    assert get_note_from_system_attrs(attributes.attrs, 3) == {"version": 1, "body": text}
    assert attributes.has_note(3)
    assert not attributes.has_note(33)


@pytest.mark.slow
def test_optuna_dashboard_reads_a_plot_and_the_shorter_one_that_replaces_it() -> None:
    from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

    attributes = DashboardAttributes({})
    for points in (2000, 2):
        figure = go.Figure().add_scatter(y=list(range(points)))
        attributes.save_plot("loss", figure)
        assert get_plotly_graph_objects(attributes.attrs) == {"loss": figure.to_json()}


@pytest.mark.slow
def test_optuna_dashboard_lists_an_artifact_until_it_is_deleted() -> None:
    from optuna_dashboard.artifact._backend import list_study_artifacts, list_trial_artifacts

    trial = optuna.trial.create_trial(value=1.0)

    def listed() -> list[Any]:
        return [*list_study_artifacts(attributes.attrs), *list_trial_artifacts(attributes.attrs, {}, trial)]

    attributes = DashboardAttributes({})
    for artifact in (Artifact("id-1", "curves.png"), Artifact("id-2", "log.txt", trial_id(trial))):
        assert not attributes.lists(artifact)
        assert not attributes.is_deleted(artifact)
        attributes.add(artifact)
        assert attributes.lists(artifact)
        assert listed() == [json.loads(artifact.metadata)]
        attributes.delete(artifact)
        assert attributes.is_deleted(artifact)
        assert not attributes.lists(artifact)
        assert listed() == []


def test_only_attributes_that_differ_are_changes() -> None:
    artifact = Artifact("id", "curves.png")
    stored = {artifact.key: artifact.metadata, "dashboard:plot_data:loss:0": '{"data":[]}'}
    attributes = DashboardAttributes(stored)
    attributes.add(artifact)
    assert attributes.changes == {}
    attributes.add_note(1, "note")
    assert attributes.changes == {"dashboard:1:note_ver": 1, "dashboard:1:note_str:0": "note"}


def test_the_metadata_has_the_mime_type_of_the_file() -> None:
    types = {
        name: json.loads(Artifact("id", name).metadata)["mimetype"] for name in ("a.png", "a.txt", "a.pt", "a.html")
    }
    assert types == {
        "a.png": "image/png",
        "a.txt": "text/plain",
        "a.pt": "application/octet-stream",
        "a.html": "application/octet-stream",
    }
