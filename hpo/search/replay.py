"""Run a finished trial again from its first epoch, and compare its metrics with the stored ones."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import HpoError, SettingError
from hpo.search.messages import TrialReport, TrialSpec
from hpo.search.worker import run_trial
from hpo.space.model import Space, known_spaces, load_space
from hpo.trainable import is_timing

if TYPE_CHECKING:
    from storage.study import Study


MAX_THREADS = 1024  # of a machine; torch would start any number


@dataclass(frozen=True)
class RecordedTrial:
    """A trial as the database has it, read once: what is checked is what runs.

    Attributes:
        study: the study's name.
        number: the trial's number.
        space: the search.
        params: {name: value}.
        epochs: {epoch: {metric: value}}, at least one.
        provenance: versions, device and threads.
    """

    study: str
    number: int
    space: Space
    params: dict[str, Any]
    epochs: Mapping[int, Mapping[str, float]]
    provenance: Mapping[str, Any]


def read_trial(study: Study, number: int) -> RecordedTrial:
    """Read a trial.

    Raises:
        SettingError: the study has no such trial with epochs.
        SpaceError: this version of hpo cannot read the settings of the study.
        StorageError: the database cannot be used.
    """
    from storage.records import REPLACES

    trials, metrics = {trial.number: trial for trial in study.trials()}, study.metrics()
    stored = metrics.get(number)
    if not stored:
        with_epochs = ", ".join(str(each) for each, epochs in metrics.items() if epochs) or "none"
        raise SettingError(f"study {study.name} has no trial {number} with epochs; trials with epochs: {with_epochs}")
    if REPLACES in trials[number].user_attrs:
        raise SettingError(
            f"trial {number} of study {study.name} took the place of another one in a population, and started from a third "
            "one's checkpoint: it cannot be replayed from its first epoch. Trials without a parent can"
        )
    space, provenance = Space.from_settings(study.settings), study.provenance(number)
    device, threads = provenance.get("device", "cpu"), provenance.get("threads", 1)
    if device not in ("cpu", "cuda") or type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise SettingError(
            f"study {study.name} says that trial {number} ran on device {device!r:.40} with {threads!r:.40} threads, "
            "which hpo does not write: it cannot be replayed"
        )
    return RecordedTrial(study.name, number, space, dict(trials[number].params), stored, provenance)


def check_stored_code(trial: RecordedTrial) -> None:
    """Refuse to run code that only the database names: access to a database must not be enough to run programs.

    The training of the package is run in any case. So is what the file of the study in search_spaces/ says, with values that
    the file allows.

    Raises:
        SettingError: the user must confirm it.
    """
    space = trial.space
    if space.is_default_trainable:
        return
    base = trial.study.partition("@")[0]
    if base in known_spaces():
        with suppress(HpoError):  # the file is not valid
            of_file = load_space(base)
            if of_file.fingerprint == space.fingerprint and not of_file.find_misfit(trial.params):
                return
    code = f"the command `{space.command}`" if space.command else f"the trainable {space.trainable}"
    raise SettingError(
        f"study {trial.study} was trained by {code}. Only the database says so, and whoever can write to it chooses what "
        f"runs: pass --yes to run it, or put the file that it was started with at search_spaces/{base}.yaml"
    )


def replay(
    trial: RecordedTrial, show: Callable[[str], None], *, data_dir: Path, environment: Mapping[str, Any]
) -> bool:
    """Run a trial again as it was recorded.

    Args:
        trial: the trial.
        show: receives one line per version that differs from the recorded one, and one line per epoch.
        data_dir: where the data sets are stored.
        environment: the versions of this environment, as `describe_environment` returns them.

    Returns:
        Whether every stored metric, except for timings, is equal to the last digit.

    Raises:
        SettingError: the trial fails this time.
    """
    recorded, space, stored = trial.provenance, trial.space, trial.epochs
    for name in ("code", "packages", "python"):
        if recorded.get(name) != environment[name]:
            show(f"{name}: {recorded.get(name)} then, {environment[name]} now")
    params = trial.params | space.derive(trial.params)
    may_differ = recorded.get("device") == "cuda" and not params.get("deterministic")
    if may_differ:
        show("the trial ran on a GPU without `deterministic: true`: differences in the last digits are expected")
    largest = 0.0
    is_equal = True
    with tempfile.TemporaryDirectory(prefix="hpo-replay-") as folder:
        spec = TrialSpec(
            trainable=space.trainable,
            command=space.command,
            patterns=space.report,
            key=space.config_key(trial.params),
            token=0,
            params=params,
            data=space.trainable_data(data_dir),
            seed=space.seed,
            max_epochs=space.max_epochs,
            stored_epoch=0,
            folder=folder,
            checkpoint_every=space.max_epochs + 1,  # never
            device=recorded.get("device", "cpu"),
            threads=recorded.get("threads", 1),
            timeout=None,
            code_folder=str(Path.cwd()),
            replicates=space.replicates,
        )
        for report in run_trial(spec):
            if report.failure:
                raise SettingError(f"the trial failed this time: {report.failure}\n{report.traceback}")
            now, then = ((each or {}).get("device_name") for each in (report.provenance, recorded))
            if now and then and now != then:
                show(f"device_name: {then} then, {now} now")
            then_metrics = stored.get(report.epoch, {})
            count, differences = _compare(report, then_metrics)
            largest = max(largest, _largest_difference(report, then_metrics))
            is_equal = is_equal and not differences
            show(f"epoch {report.epoch}: " + ("; ".join(differences) or f"{count} metrics equal"))
            if report.epoch == max(stored):
                break
    if may_differ and not is_equal:
        show(_explain(largest, space))
    return is_equal


def _explain(largest: float, space: Space) -> str:
    """Return why a trial of a GPU differs, and what to do about it."""
    remedy = (
        "For a search that can be replayed more exactly, set `parameters.deterministic: true`"
        if space.is_default_trainable
        else "Its trainable decides which kernels it uses"
    )
    return (
        f"the metrics differ by up to {largest:.1e} of their size. Some kernels of a GPU add in an order that changes from "
        f"run to run, and training amplifies the rounding. {remedy}"
    )


def _largest_difference(report: TrialReport, stored: Mapping[str, float]) -> float:
    """Return the largest difference of a metric, relative to the larger of its two values."""
    pairs = [(value, stored[name]) for name, value in report.metrics.items() if name in stored and not is_timing(name)]
    return max((abs(a - b) / max(abs(a), abs(b)) for a, b in pairs if a != b and math.isfinite(a - b)), default=0.0)


def _compare(report: TrialReport, stored: Mapping[str, float]) -> tuple[int, list[str]]:
    """Return how many metrics were compared, and a text for each that differs."""
    names = [name for name in report.metrics if name in stored and not is_timing(name)]
    differences = [
        f"{name} {stored[name]!r} then, {report.metrics[name]!r} now"
        for name in names
        if repr(stored[name]) != repr(report.metrics[name])  # by text: NaN equals NaN here
    ]
    return len(names), differences if stored else ["storage does not have it"]
