"""Several trainings of one configuration as one trial: means, errors, turns, resuming, scripts."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.toy import Report, expected_value
from hpo.search.checkpoints import writer as checkpoint_writer
from hpo.search.messages import TrialReport
from hpo.search.replicates import EpochPart, MeanReport, summarize, train_replicates
from hpo.search.worker import TrialPaused, run_trial, watchdog
from hpo.trainable import EpochReport
from storage.database import Database
from tests.factories import search_without_ray, take_reports, toy_space, trial_spec

SEEDS = (5, 6, 7)


def values_of(x: int, epoch: int, seeds: tuple[int, ...] = (0, 1, 2)) -> list[float]:
    return [expected_value({"x": x}, seed, epoch) for seed in seeds]


# --- means and errors -------------------------------------------------------------------------------------------------


def test_metrics_are_means_with_their_standard_errors() -> None:
    found = summarize(
        [{"loss": 1.0, "train_seconds": 1.0}, {"loss": 2.0, "train_seconds": 3.0}, {"loss": 6.0, "train_seconds": 2.0}]
    )
    assert found == {"loss": 3.0, "loss_stderr": pytest.approx(math.sqrt(7 / 3)), "train_seconds": 2.0}


def test_a_metric_that_a_training_lacks_has_no_mean() -> None:
    assert summarize([{"a": 1.0, "b": 1.0}, {"a": 3.0}]) == {"a": 2.0, "a_stderr": 1.0}


@pytest.mark.parametrize(
    ("values", "mean"), [((1.0, math.nan), math.nan), ((math.inf, 1.0), math.inf), ((math.inf, -math.inf), math.nan)]
)
def test_one_training_that_diverges_makes_the_mean_infinite_or_undefined(
    values: tuple[float, ...], mean: float
) -> None:
    found = summarize([{"loss": value} for value in values])
    assert repr(found["loss"]) == repr(mean)
    assert math.isnan(found["loss_stderr"])


def test_a_metric_that_has_the_name_of_an_error_is_refused() -> None:
    with pytest.raises(ValueError, match="the name of a metric must not end in _stderr, as 'loss_stderr' does"):
        summarize([{"loss_stderr": 1.0}, {"loss_stderr": 2.0}])


# --- turns ------------------------------------------------------------------------------------------------------------


class Recorder:
    """A trainable that says when it trains, and draws from every global generator."""

    def __init__(self, epochs: Mapping[int, tuple[int, ...]] | None = None) -> None:
        self.events: list[tuple[int, int]] = []
        self.closed: list[int] = []
        self.drawn: dict[int, list[float]] = {}
        self._epochs = epochs or {}

    def __call__(self, seed: int, state: Mapping[str, Any] | None) -> Generator[EpochReport, None, None]:
        done = state["epoch"] if state else 0
        random.seed(seed)
        np.random.seed(seed)  # the global generator, as many trainables do
        torch.manual_seed(seed)
        try:
            for epoch in self._epochs.get(seed, (1, 2, 3)):
                if epoch > done:
                    self.events.append((seed, epoch))
                    numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]
                    self.drawn.setdefault(seed, []).extend(numbers)
                    yield EpochReport(epoch, {"value": float(seed * epoch)}, partial(dict, epoch=epoch))
        finally:
            self.closed.append(seed)


def reports_of(trainings: Iterator[EpochReport | EpochPart]) -> list[EpochReport]:
    return [each for each in trainings if isinstance(each, EpochReport)]


def test_trainings_take_turns_and_an_epoch_is_reported_when_all_have_finished_it() -> None:
    recorder = Recorder()
    trainings = train_replicates(recorder, SEEDS, max_epochs=3)
    kinds = [type(next(trainings)) for _ in range(3)]
    assert kinds == [EpochPart, EpochPart, MeanReport]
    assert recorder.events == [(5, 1), (6, 1), (7, 1)]
    rest = reports_of(trainings)
    assert [(each.epoch, each.metrics["value"]) for each in rest] == [(2, 12.0), (3, 18.0)]
    assert recorder.events[3:] == [(5, 2), (6, 2), (7, 2), (5, 3), (6, 3), (7, 3)]


def test_the_last_report_has_the_metrics_of_each_training() -> None:
    *earlier, last = reports_of(train_replicates(Recorder(), SEEDS, max_epochs=3))
    assert all(not each.provenance for each in earlier)
    assert last.provenance == {"seeds": [{"seed": seed, "metrics": {"value": 3.0 * seed}} for seed in SEEDS]}


def test_each_training_draws_the_random_numbers_that_it_draws_alone() -> None:
    together, alone = Recorder(), Recorder()
    list(train_replicates(together, SEEDS, max_epochs=3))
    for seed in SEEDS:
        list(alone(seed, None))
    assert together.drawn == alone.drawn
    assert len({tuple(numbers) for numbers in together.drawn.values()}) == len(SEEDS)


def test_closing_ends_all_trainings() -> None:
    recorder = Recorder()
    trainings = train_replicates(recorder, SEEDS, max_epochs=3)
    next(trainings)
    next(trainings)
    trainings.close()
    assert sorted(recorder.closed) == [5, 6], "the third has not started"


def test_an_epoch_that_one_training_leaves_out_is_not_reported() -> None:
    recorder = Recorder({5: (1, 2, 3, 4), 6: (2, 4), 7: (1, 2, 4)})
    reports = reports_of(train_replicates(recorder, SEEDS, max_epochs=4))
    assert [each.epoch for each in reports] == [2, 4]
    assert reports[-1].metrics["value"] == 24.0


def test_an_error_says_in_which_training_it_happened(tmp_path: Path) -> None:
    def start(seed: int, state: Mapping[str, Any] | None) -> Generator[EpochReport, None, None]:
        if seed == 6:
            raise RuntimeError("no such file")
        yield from Recorder()(seed, state)

    with pytest.raises(RuntimeError) as caught:
        list(train_replicates(start, SEEDS, max_epochs=3))
    assert caught.value.__notes__ == ["in the training with seed 6"]


def test_what_one_training_lacks_or_breaks_is_said() -> None:
    def start(seed: int, _: object) -> Generator[EpochReport, None, None]:
        metrics = {5: {"a": 1.0, "b": 1.0}, 6: {"a": 1.0}, 7: {"a": 1.0, "b": math.nan}}[seed]
        yield EpochReport(1, metrics, dict)

    (report,) = reports_of(train_replicates(start, SEEDS, max_epochs=1))
    assert report.warning == "seed 6 reported no b, so it has no mean; seed 7: b is nan"


def test_a_script_that_prints_more_epochs_has_ended_all_the_same() -> None:
    recorder = Recorder({5: (1, 2), 6: (1, 4), 7: (1, 2)})
    assert [each.epoch for each in reports_of(train_replicates(recorder, SEEDS, max_epochs=2))] == [1, 2]


def test_images_per_second_are_those_of_all_trainings() -> None:
    fast, slow = ({"images_per_second": speed, "train_seconds": 100 / speed} for speed in (100.0, 10.0))
    found = summarize([fast, slow])
    assert found["images_per_second"] * found["train_seconds"] == pytest.approx(100.0)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(1, 9))
def test_a_trial_resumes_from_each_part_with_the_same_numbers(steps: int) -> None:
    whole = reports_of(train_replicates(Recorder(), SEEDS, max_epochs=3))
    first = Recorder()
    trainings = train_replicates(first, SEEDS, max_epochs=3)
    before = [next(trainings) for _ in range(steps)]
    state = before[-1].state()
    second = Recorder()
    after = reports_of(train_replicates(second, SEEDS, max_epochs=3, state=state))
    found = [*reports_of(iter(before)), *after]
    assert [(each.epoch, each.metrics) for each in found] == [(each.epoch, each.metrics) for each in whole]
    assert found[-1].provenance == whole[-1].provenance
    assert set(first.events) & set(second.events) == set(), "no training repeats an epoch"


def test_random_numbers_in_a_state_are_those_of_its_training() -> None:
    """As a trainable that uses the global generator saves it, to resume with the same numbers."""

    def start(seed: int, state: Mapping[str, Any] | None) -> Generator[EpochReport, None, None]:
        torch.manual_seed(seed)
        if state is not None:
            torch.set_rng_state(state["rng"])
        for epoch in range(1 + (state["epoch"] if state else 0), 4):
            value = float(torch.rand(()))

            def save(epoch: int = epoch) -> dict[str, Any]:
                return {"epoch": epoch, "rng": torch.get_rng_state()}

            yield EpochReport(epoch, {"value": value}, save)

    whole = [each.metrics for each in reports_of(train_replicates(start, SEEDS, max_epochs=3))]
    for steps in range(1, 9):
        trainings = train_replicates(start, SEEDS, max_epochs=3)
        before = [next(trainings) for _ in range(steps)]
        state = before[-1].state()
        after = reports_of(train_replicates(start, SEEDS, max_epochs=3, state=state))
        assert [each.metrics for each in (*reports_of(iter(before)), *after)] == whole
        rest = reports_of(trainings)
        assert [each.metrics for each in (*reports_of(iter(before)), *rest)] == whole, "saving changes nothing"


def test_a_checkpoint_of_other_seeds_is_refused() -> None:
    (*_, last) = train_replicates(Recorder(), SEEDS, max_epochs=3)
    with pytest.raises(ValueError, match="the checkpoint is not of 2 replicates with the seeds 5 to 6"):
        list(train_replicates(Recorder(), SEEDS[:2], max_epochs=3, state=last.state()))
    with pytest.raises(ValueError, match="not of 3 replicates"):
        list(train_replicates(Recorder(), SEEDS, max_epochs=3, state={"epoch": 3}))


# --- in a worker ------------------------------------------------------------------------------------------------------


def test_a_worker_reports_means_and_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, replicates=3)
    first = take_reports(spec, 2)
    rest = take_reports(trial_spec(tmp_path, replicates=3, stored_epoch=2), 3)
    assert [(each.epoch, each.is_recalled) for each in (*first, *rest)] == [
        (1, False), (2, False), (2, True), (3, False), (4, False),
    ]  # fmt: skip
    for report in (*first, *rest):
        values = values_of(1, report.epoch)
        assert report.metrics["value"] == pytest.approx(statistics.fmean(values), rel=1e-15)
        assert report.metrics["value_stderr"] == statistics.stdev(values) / math.sqrt(3)


def test_epochs_are_timed_over_all_trainings(tmp_path: Path) -> None:
    (report,) = take_reports(trial_spec(tmp_path, replicates=3, params={"x": 1, "epoch_seconds": 0.05}), 1)
    assert 0.15 <= report.metrics["epoch_seconds"] < 5


class InlineExecutor:
    """Writes a checkpoint before training continues, so that a test knows what is on the disk."""

    def __init__(self, **_: Any) -> None: ...

    def submit(self, write: Callable[[], float]) -> Future[float]:
        future: Future[float] = Future()
        future.set_result(write())
        return future

    def shutdown(self) -> None: ...


def test_a_kill_in_the_middle_of_an_epoch_costs_the_training_that_was_under_way_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "MAX_WORK_SECONDS", 0.0)  # each automatic checkpoint is due
    monkeypatch.setattr(checkpoint_writer, "ThreadPoolExecutor", InlineExecutor)
    log = tmp_path / "epochs.log"
    spec = trial_spec(
        tmp_path, replicates=3, trainable=f"{__name__}:dying", checkpoint_every=None, params={"log": str(log)}
    )
    with pytest.raises(KeyboardInterrupt):
        list(run_trial(spec))  # seed 2 dies in epoch 2
    reports = take_reports(spec, 4)
    trained = log.read_text().split()
    assert trained == ["0:1", "1:1", "2:1", "0:2", "1:2", "2:2", "2:2", "0:3", "1:3", "2:3", "0:4", "1:4", "2:4"]
    assert [each.metrics["value"] for each in reports] == [1.0, 2.0, 3.0, 4.0]
    assert reports[1].metrics["epoch_seconds"] >= 0.15, "with those of the trainings that had finished before"


def dying(
    params: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    seed: int,
    max_epochs: int,
    device: str,
    checkpoint: Mapping[str, Any] | None = None,
) -> Iterator[Report]:
    """Note each epoch that starts; seed 2 dies in epoch 2, the first time."""
    log = Path(params["log"])
    done = checkpoint["epoch"] if checkpoint else 0
    for epoch in range(done + 1, max_epochs + 1):
        event = f"{seed}:{epoch}"
        is_first = not log.exists() or event not in log.read_text().split()
        with log.open("a") as file:
            file.write(f"{event}\n")
        time.sleep(0.05)
        if event == "2:2" and is_first:
            raise KeyboardInterrupt
        yield Report(epoch, {"value": float(epoch)}, {"epoch": epoch})


def test_a_paused_trial_has_saved_its_last_epoch(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, replicates=2, checkpoint_every=10)
    reports = run_trial(spec)
    assert next(reports).epoch == 1
    assert next(reports).epoch == 2
    with pytest.raises(StopIteration):
        reports.throw(TrialPaused())
    (resumed, following) = take_reports(trial_spec(tmp_path, replicates=2, stored_epoch=2), 2)
    assert (resumed.epoch, resumed.is_recalled, following.epoch, following.is_recalled) == (2, True, 3, False)


def test_a_training_that_ends_early_fails_the_trial(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, replicates=2, trainable="benchmarks.toy:failing", params={"how": "end_early"})
    *_, last = run_trial(spec)
    assert last.failure == "seed 0: the trainable ended after epoch 1 of 4"


def test_a_failure_names_the_seed_in_its_traceback(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, replicates=2, trainable="benchmarks.toy:failing", params={"how": "raise"})
    *_, last = run_trial(spec)
    assert last.failure == "seed 0: ValueError: the trainable's own words"


def test_the_last_epoch_is_recalled_with_the_metrics_of_each_training(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, replicates=2)
    *_, end = take_reports(spec, 4)
    (recalled,) = take_reports(trial_spec(tmp_path, replicates=2, stored_epoch=4), 1)
    assert end.provenance is not None
    assert recalled.provenance is not None
    assert recalled.provenance["seeds"] == end.provenance["seeds"]
    assert [each["seed"] for each in recalled.provenance["seeds"]] == [0, 1]


def test_the_time_of_a_trial_is_limited_for_each_training(tmp_path: Path) -> None:
    spec = trial_spec(tmp_path, replicates=3, timeout=1.0, params={"x": 1, "epoch_seconds": 0.5})
    reports = run_trial(spec)
    with watchdog(spec):
        assert next(reports).epoch == 1
    reports.close()


# --- in a search ------------------------------------------------------------------------------------------------------


def test_a_scheduler_judges_the_mean_and_a_pruned_trial_ends_all_of_its_trainings(
    tmp_path: Path, database: Database
) -> None:
    space = toy_space(
        tmp_path,
        parameters={"x": list(range(6))},
        max_epochs=4,
        replicates=3,
        scheduler={"name": "asha", "grace_period": 1, "reduction_factor": 2},
    )
    study, _ = search_without_ray(space, database, tmp_path)
    trials = study.trials()
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    assert pruned, "otherwise this test shows nothing"
    metrics = study.metrics(trials)
    for trial in trials:
        for epoch, found in metrics[trial.number].items():
            assert found["value"] == pytest.approx(statistics.fmean(values_of(trial.params["x"], epoch)), rel=1e-15)
    best = study.optuna_study.best_trial
    assert best.value == metrics[best.number][4]["value"]


def test_a_study_with_other_replicates_is_another_one(tmp_path: Path) -> None:
    one, three = toy_space(tmp_path), toy_space(tmp_path, replicates=3)
    assert one.fingerprint != three.fingerprint
    assert one.config_key({"x": 1}) != three.config_key({"x": 1})


# --- scripts ----------------------------------------------------------------------------------------------------------

SCRIPT = """
    import json, os, sys, time
    from pathlib import Path
    seed, folder = int(sys.argv[1]), Path(sys.argv[2])
    saved = folder / "epoch"
    done = int(saved.read_text()) if saved.exists() else 0
    for epoch in range(done + 1, 5):
        with open("order.log", "a") as log:
            log.write(f"{seed}:{epoch} ")
        time.sleep(0.1)
        saved.write_text(str(epoch))
        print(json.dumps({"epoch": epoch, "value": seed + epoch}))
        time.sleep(0.1)
"""


@pytest.fixture
def script_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    command = f"{sys.executable} train.py {{seed}} {{checkpoint_dir}}"
    return lambda **changes: trial_spec(
        tmp_path, command=command, replicates=2, data={"data_dir": "data"}, params={}, **changes
    )


@pytest.mark.slow
def test_scripts_take_turns_each_with_its_own_files(script_spec: Callable[..., Any], tmp_path: Path) -> None:
    reports = take_reports(script_spec(), 4)
    assert [(each.epoch, each.metrics["value"]) for each in reports] == [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.5)]
    # Each is stopped before its next epoch ends, while the other one trains.
    order = (tmp_path / "order.log").read_text().split()
    ahead = max(abs(order[: i + 1].count("0") - order[: i + 1].count("1")) for i in range(len(order)))
    assert ahead <= 1
    assert {path.name for path in (tmp_path / "trial/script").iterdir()} == {"seed-0", "seed-1"}
    lines = (tmp_path / "trial/log-seed-1.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.slow
def test_scripts_resume_each_from_its_own_files_and_no_epoch_is_lost(
    script_spec: Callable[..., Any], tmp_path: Path
) -> None:
    reports = run_trial(script_spec())
    assert next(reports).epoch == 1
    reports.close()  # the scripts are stopped in their second epoch
    found: list[TrialReport] = take_reports(script_spec(stored_epoch=1), 4)
    assert [(each.epoch, each.metrics["value"]) for each in found] == [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.5)]


ENDS_IN_ORDER = """
    import signal
    is_asked = []
    signal.signal(signal.SIGTERM, lambda *_: is_asked.append(True))
"""


@pytest.mark.slow
def test_scripts_that_finish_an_epoch_when_they_are_asked_to_end_do_not_run_ahead(
    script_spec: Callable[..., Any], tmp_path: Path
) -> None:
    script = textwrap.dedent(ENDS_IN_ORDER) + textwrap.dedent(SCRIPT) + "    if is_asked: raise SystemExit\n"
    (tmp_path / "train.py").write_text(script)
    reports = run_trial(script_spec())
    assert next(reports).epoch == 1
    reports.close()
    assert [(tmp_path / f"trial/script/seed-{seed}/epoch").read_text() for seed in (0, 1)] == ["1", "1"]
