"""A finished trial, run again from its first epoch on and compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import SettingError
from hpo.search.worker import TrialSpec, run_trial
from hpo.trainable import is_timing

if TYPE_CHECKING:
    from storage.studies import Study


def replay(study: Study, number: int, show: Callable[[str], None], *, data_dir: Path, now: Mapping[str, Any]) -> bool:
    """Return whether every stored metric of a trial comes out again to the last digit; print each epoch.

    Args:
        now: the versions at hand; what differs from those of the trial is printed.

    Raises:
        SettingError: the study has no such trial, or the trial fails this time.
    """
    trials, metrics = {trial.number: trial for trial in study.trials()}, study.metrics()
    stored = metrics.get(number)
    if not stored:
        with_epochs = ", ".join(str(each) for each, epochs in metrics.items() if epochs) or "none"
        raise SettingError(f"study {study.name} has no trial {number} with epochs; it has: {with_epochs}")
    recorded, settings = study.provenance(number), study.settings
    for name in ("code", "packages", "python"):
        if recorded.get(name) != now[name]:
            show(f"{name}: {recorded.get(name)} then, {now[name]} now")
    equal = True
    with tempfile.TemporaryDirectory(prefix="hpo-replay-") as folder:
        spec = TrialSpec(
            trainable=settings["trainable"],
            command=settings.get("command"),
            params={**trials[number].params, **trials[number].user_attrs.get("derived", {})},
            data={**settings["data"], "data_dir": str(data_dir)},
            seed=settings["seed"],
            max_epochs=settings["max_epochs"],
            stored_epoch=0,
            folder=folder,
            checkpoint_every=settings["max_epochs"] + 1,
            device=recorded.get("device", "cpu"),
            threads=recorded.get("threads", 1),
            timeout=None,
        )
        for report in run_trial(spec):
            if report.failure:
                raise SettingError(f"the trial failed this time: {report.failure}\n{report.traceback}")
            then = stored[report.epoch]
            names = [name for name in report.metrics if name in then and not is_timing(name)]
            unlike = [
                f"{name} {then[name]!r} then, {report.metrics[name]!r} now"
                for name in names
                if repr(then[name]) != repr(report.metrics[name])  # NaN is like NaN here
            ]
            equal = equal and not unlike
            show(f"epoch {report.epoch}: " + ("; ".join(unlike) or f"{len(names)} metrics equal"))
            if report.epoch == max(stored):
                break
    return equal
