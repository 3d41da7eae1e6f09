"""A trial in a worker: reports, checkpoints, resuming."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.toy import Report, expected_value
from hpo.search import worker
from hpo.search.checkpoints.files import load_checkpoint
from hpo.search.messages import Ending
from hpo.search.worker import end_trial, run_trial
from hpo.train import gpu
from hpo.trainable import EpochReport
from tests.factories import take_reports, trial_spec


def test_trial_reports_each_epoch_once_with_provenance_first(tmp_path: Path) -> None:
    reports = take_reports(trial_spec(tmp_path), 4)
    assert [report.epoch for report in reports] == [1, 2, 3, 4]
    assert [report.metrics["value"] for report in reports] == [expected_value({"x": 1}, 0, e) for e in (1, 2, 3, 4)]
    assert all(report.metrics["epoch_seconds"] >= 0 for report in reports)
    assert [report.provenance is not None for report in reports] == [True, False, False, False]


def test_trial_resumes_from_its_checkpoint_with_the_same_numbers(tmp_path: Path) -> None:
    take_reports(trial_spec(tmp_path), 2)
    rest = take_reports(trial_spec(tmp_path, stored_epoch=2), 3)
    assert [(report.epoch, report.is_recalled) for report in rest] == [(2, True), (3, False), (4, False)]
    assert [report.metrics["value"] for report in rest] == [expected_value({"x": 1}, 0, e) for e in (2, 3, 4)]


def test_epochs_missing_in_storage_are_recalled_from_the_checkpoint(tmp_path: Path) -> None:
    take_reports(trial_spec(tmp_path), 3)  # the driver died before it stored epochs 2 and 3
    rest = take_reports(trial_spec(tmp_path, stored_epoch=1), 4)
    assert [(report.epoch, report.is_recalled) for report in rest] == [(1, True), (2, True), (3, True), (4, False)]


def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path: Path) -> None:
    take_reports(trial_spec(tmp_path), 3)
    newest = max((tmp_path / "trial").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:50])
    rest = take_reports(trial_spec(tmp_path, stored_epoch=3), 2)
    assert [(report.epoch, report.is_recalled) for report in rest] == [(3, False), (4, False)]
    assert rest[-1].metrics["value"] == expected_value({"x": 1}, 0, 4)


def test_checkpoint_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "trial").touch()  # a file where the folder should be
    reports = take_reports(trial_spec(tmp_path), 4)
    assert [report.epoch for report in reports] == [1, 2, 3, 4]
    # A warning comes with the epoch that ends after the attempt; that of the last epoch does not wait.
    assert [report.warning.count("no checkpoint after epoch") for report in reports] == [0, 1, 1, 2]


def numbers_of_numpy(params: Mapping[str, Any], *, max_epochs: int, **_: Any) -> Iterator[Any]:
    for epoch in np.arange(1, max_epochs + 1):
        yield SimpleNamespace(
            epoch=epoch, metrics={"value": np.float32(0.5)}, state=dict, seconds=np.float64(0.25), provenance={}
        )


def test_the_numbers_of_a_report_may_be_those_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "load_trainable", lambda *_: numbers_of_numpy)
    take_reports(trial_spec(tmp_path), 4)
    checkpoint = load_checkpoint(tmp_path / "trial", "k")
    assert checkpoint is not None, "it can be read"
    assert checkpoint.history == {epoch: {"value": 0.5, "epoch_seconds": 0.25} for epoch in (1, 2, 3, 4)}


def saved_epochs(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("epoch-")) for path in (folder / "trial").glob("*.pt"))


def test_checkpoints_are_written_every_n_epochs_and_at_the_end(tmp_path: Path) -> None:
    *reports, end = run_trial(trial_spec(tmp_path, checkpoint_every=3, max_epochs=4))
    assert [report.epoch for report in reports] == [1, 2, 3, 4]
    assert end.failure
    assert saved_epochs(tmp_path) == [3, 4]


@pytest.mark.parametrize(
    ("ending", "left"), [(Ending.KEEP, [2]), (Ending.SAVE, [2, 3]), (Ending.SAVE_ONLY, [3]), (Ending.DISCARD, [])]
)
def test_an_ended_trial_leaves_the_checkpoints_that_its_driver_wants(
    tmp_path: Path, ending: Ending, left: list[int]
) -> None:
    spec = trial_spec(tmp_path, checkpoint_every=2)
    reports = run_trial(spec)
    assert [next(reports).epoch for _ in range(3)] == [1, 2, 3]
    assert end_trial(reports, ending, spec) == ""
    assert saved_epochs(tmp_path) == left
    assert list(reports) == []


def test_a_paused_trial_resumes_after_its_last_epoch_with_the_same_numbers(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, checkpoint_every=None)
    reports = run_trial(spec)
    assert [next(reports).epoch for _ in range(2)] == [1, 2]
    assert end_trial(reports, Ending.SAVE, spec) == ""
    rest = take_reports(replace(spec, stored_epoch=2), 3)
    assert [(report.epoch, report.is_recalled) for report in rest] == [(2, True), (3, False), (4, False)]
    assert rest[-1].metrics["value"] == expected_value({"x": 1}, 0, 4)


def test_a_trial_can_be_paused_at_any_report(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path)
    not_started = run_trial(spec)
    assert end_trial(not_started, Ending.SAVE, spec) == ""
    assert not (tmp_path / "trial").exists()
    take_reports(spec, 2)
    recalling = run_trial(replace(spec, stored_epoch=1))
    assert next(recalling).is_recalled
    assert end_trial(recalling, Ending.SAVE, spec) == ""
    assert saved_epochs(tmp_path) == [1, 2]


def test_a_paused_trial_says_that_its_last_epoch_could_not_be_saved(tmp_path: Path) -> None:
    (tmp_path / "trial").touch()  # a file where the folder should be
    spec = trial_spec(tmp_path, checkpoint_every=100)
    reports = run_trial(spec)
    next(reports)
    assert end_trial(reports, Ending.SAVE, spec).startswith("no checkpoint after epoch 1: ")


def test_a_paused_trial_whose_state_cannot_be_saved_says_so(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "from types import SimpleNamespace\n"
        "def train(params, *, data, seed, max_epochs, device, checkpoint=None):\n"
        "    yield SimpleNamespace(epoch=1, metrics={'value': 1.0}, state=lambda: {'odd': object()})\n"
    )
    spec = trial_spec(tmp_path, trainable="odd:train", checkpoint_every=100)
    reports = run_trial(spec)
    assert next(reports).epoch == 1
    assert "state['odd'] is a builtins.object" in end_trial(reports, Ending.SAVE, spec)


def test_checkpoints_of_another_worker_are_not_discarded(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path)
    reports = run_trial(spec)
    next(reports)
    next(reports)
    take_reports(trial_spec(tmp_path, token=2), 1)
    assert end_trial(reports, Ending.DISCARD, spec) == ""
    assert saved_epochs(tmp_path)


def test_epochs_after_an_older_checkpoint_are_trained_again(tmp_path: Path) -> None:
    """kill -9: storage holds epochs 1 to 3, and the last checkpoint is of epoch 2."""
    reports = run_trial(trial_spec(tmp_path, checkpoint_every=2))
    first = [next(reports) for _ in range(3)]
    reports.close()
    rest = take_reports(trial_spec(tmp_path, checkpoint_every=2, stored_epoch=3), 2)
    assert [(report.epoch, report.is_recalled) for report in rest] == [(3, False), (4, False)]
    assert rest[0].metrics["value"] == first[2].metrics["value"]
    assert list(rest[0].history) == [1, 2]


def test_a_checkpoint_of_another_configuration_is_not_used(tmp_path: Path) -> None:
    """A database that was restored from a copy gives the number to another configuration."""
    take_reports(trial_spec(tmp_path, key="a"), 3)
    reports = take_reports(trial_spec(tmp_path, key="b", params={"x": 2}), 4)
    assert [(report.epoch, report.is_recalled) for report in reports] == [(epoch, False) for epoch in range(1, 5)]
    assert reports[-1].metrics["value"] == expected_value({"x": 2}, 0, 4)
    assert [bool(report.warning) for report in reports] == [True, False, False, False]
    assert "files in" in reports[0].warning
    assert "were of another configuration; they are now in trial.other-1" in reports[0].warning


@pytest.mark.parametrize("name", ["x" * 501, "nul\0", "half of a pair \ud800"])
def test_a_metric_that_no_database_can_store_fails_the_trial(tmp_path: Path, name: str) -> None:
    """Stored, it would stop the search, and each resume at the same epoch."""
    (report,) = take_reports(
        trial_spec(tmp_path, trainable="tests.search.test_worker:report_badly", params={"name": name}), 1
    )
    assert report.failure.startswith("ValueError: the name of a metric is Unicode text of at most 500 characters")
    assert not list((tmp_path / "trial").glob("*.pt"))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Path("/data"), "Object of type PosixPath is not JSON serializable"),
        ({1}, "Object of type set is not JSON serializable"),
        (float("nan"), "Out of range float values are not JSON compliant"),
        ([{"a": {2: "b"}}], "the key 2 is no text"),
        (torch.ones(1), "Object of type Tensor is not JSON serializable"),
    ],
)
def test_provenance_that_no_database_can_store_fails_the_trial(tmp_path: Path, value: Any, reason: str) -> None:
    params = {"provenance": {"fact": value}}
    (report,) = take_reports(trial_spec(tmp_path, trainable="tests.search.test_worker:record", params=params), 1)
    assert report.failure.startswith(f"ValueError: the provenance of an epoch cannot be stored as JSON: {reason}")
    assert not list((tmp_path / "trial").glob("*.pt")), "resumed from one, the trial would lack it"


def test_provenance_is_reported_as_plain_values(tmp_path: Path) -> None:
    facts = {"path": "/data", "sizes": (1, 2.5), "nested": {"a": None}}
    spec = trial_spec(tmp_path, trainable="tests.search.test_worker:record", params={"provenance": facts})
    (report,) = take_reports(spec, 1)
    assert report.provenance is not None
    assert {name: report.provenance[name] for name in facts} == facts | {"sizes": [1, 2.5]}
    assert report.provenance["device"] == "cpu"


def record(
    params: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    seed: int,
    max_epochs: int,
    device: str,
    checkpoint: Mapping[str, Any] | None = None,
) -> Iterator[EpochReport]:
    """Report one epoch with this provenance."""
    yield EpochReport(1, {"value": 0.5}, dict, provenance=params["provenance"])


def test_the_error_of_a_trainable_becomes_unicode_text(tmp_path: Path) -> None:
    (report,) = take_reports(trial_spec(tmp_path, trainable="tests.search.test_worker:report_badly", params={}), 1)
    assert report.failure == r"FileNotFoundError: \udcff\x00"
    assert r"\udcff\x00" in report.traceback
    report.traceback.encode()


def report_badly(
    params: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    seed: int,
    max_epochs: int,
    device: str,
    checkpoint: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Report a metric with the name in `params`, or raise an error about a file whose name is not Unicode."""
    if "name" not in params:
        raise FileNotFoundError("\udcff\0")
    yield Report(1, {"value": 0.5, params["name"]: 1.0}, {})


# --- on a GPU, which is replaced ----------------------------------------------------------------------------------------


class Memory:
    """What a trainable holds on the device."""

    held: weakref.ref[Memory]


def holding(params: dict[str, Any], **_: Any) -> Iterator[EpochReport]:
    """Hold memory, and fail in the second epoch with `params["error"]`."""
    memory = Memory()
    Memory.held = weakref.ref(memory)
    yield EpochReport(1, {"value": 1.0}, dict)
    if "error" in params:
        raise params["error"]
    yield EpochReport(2, {"value": 2.0}, dict)


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the memory was gone each time that the worker freed what is left on the GPU."""
    states: list[bool] = []
    monkeypatch.setattr(worker, "load_trainable", lambda *_: holding)
    monkeypatch.setattr(worker, "_describe_device", lambda spec: {"device": spec.device})
    monkeypatch.setattr(gpu, "free_memory", lambda: states.append(Memory.held() is None))
    return states


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_trial_that_is_stopped_leaves_nothing_on_the_gpu(
    tmp_path: Path, freed: list[bool], no_garbage_collector: None
) -> None:
    reports = run_trial(trial_spec(tmp_path, device="cuda"))
    next(reports)
    assert freed == []
    reports.close()
    assert freed == [True]


@pytest.mark.parametrize(
    ("error", "is_out_of_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), True),
        (RuntimeError("CUDA error: the hardware resources required to create MPS client have been exhausted"), True),
        (MemoryError("no room"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory is not what this is"), False),
    ],
    ids=lambda value: f"{value}".splitlines()[0][:50],
)
def test_a_failure_says_whether_memory_was_short_and_frees_it_before_the_report(
    error: Exception, is_out_of_memory: bool, tmp_path: Path, freed: list[bool], no_garbage_collector: None
) -> None:
    spec = trial_spec(tmp_path, device="cuda", params={"error": error})
    reports = run_trial(spec)
    assert not next(reports).failure
    error.__traceback__ = None
    last = next(reports)
    error.__traceback__ = None  # this test holds the error
    assert last.failure.startswith("out of memory: ") == is_out_of_memory
    assert str(error) in last.failure
    assert (last.is_out_of_memory, last.is_device_lost) == (is_out_of_memory, False)
    assert last.needs_new_process, "a step that failed in the middle may have left memory behind"
    assert len(freed) == 1
    assert list(reports) == []


@pytest.mark.parametrize(
    ("is_initialized", "answer", "is_lost"),
    [
        (True, RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (True, torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (True, RuntimeError("CUDA error: out of memory"), False),
        (True, None, False),
        (False, RuntimeError("no GPU was used, so none is asked"), False),
    ],
)
def test_a_device_is_lost_if_it_answers_every_call_with_an_error(
    is_initialized: bool, answer: Exception | None, is_lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        if answer is not None:
            raise answer

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", synchronize)
    monkeypatch.setattr(worker, "load_trainable", lambda *_: holding)
    error = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")
    *_, last = run_trial(trial_spec(tmp_path, params={"error": error}))
    assert last.failure == f"RuntimeError: {error}"
    assert last.is_device_lost == is_lost


def test_a_device_that_mps_does_not_serve_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is not initialized then, so it cannot be asked: the server recovers from an error of a neighbour."""
    monkeypatch.setattr(worker, "load_trainable", lambda *_: holding)
    error = RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 807: MPS server is not ready")
    *_, last = run_trial(trial_spec(tmp_path, params={"error": error}))
    assert (last.is_device_lost, last.is_out_of_memory) == (True, False)


def test_what_a_trainable_says_about_its_run_is_passed_on_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def telling(*_: Any, **__: Any) -> Iterator[EpochReport]:
        yield EpochReport(1, {"value": 1.0}, dict, {"cuda_graph": True})
        for epoch in (2, 3):
            yield EpochReport(epoch, {"value": 1.0}, dict, {"cuda_graph": False}, "no graph", needs_new_process=True)

    monkeypatch.setattr(worker, "load_trainable", lambda *_: telling)
    monkeypatch.setattr(worker, "_describe_device", lambda _: {"device": "cuda"})
    reports = take_reports(trial_spec(tmp_path), 3)
    assert [report.provenance for report in reports] == [
        {"device": "cuda", "cuda_graph": True},
        {"device": "cuda", "cuda_graph": False},
        None,
    ]
    assert [report.warning for report in reports] == ["", "no graph", ""]
    assert [report.needs_new_process for report in reports] == [False, True, True]
