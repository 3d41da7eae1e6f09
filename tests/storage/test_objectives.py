"""A study with several objectives, on both databases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.trial import FrozenTrial, TrialState

from storage import reporting
from storage.copying import copy_study
from storage.database import Database
from storage.errors import StorageError
from storage.history import MIN_LIMIT, History
from storage.imports import ImportedTrial, Origin, import_trials
from storage.pareto import Direction
from storage.ranking import SinceBest, count_since_best, superfluous_trials
from storage.studies import find_study, open_study
from storage.study import Study, metric_names
from storage.summaries import summarize
from tests.storage.builders import GRID, POINTS, claim_one, config_key, sampled_run, sql

BOTH: tuple[Direction, ...] = ("maximize", "minimize")
X = FloatDistribution(0.0, 1.0)
SETTINGS = {
    "metric": "gain",
    "objectives": [{"metric": "gain", "direction": "maximize"}, {"metric": "cost", "direction": "minimize"}],
}
PAIRS = [(1.0, 1.0), (3.0, 3.0), (2.0, 4.0), (2.0, 2.0), (1.0, 4.0)]  # front: 1, 3, 0; then 2; then 4


@pytest.fixture
def both(database: Database) -> Study:
    return open_study(database, "both", direction=BOTH, fingerprint="f", settings=SETTINGS)


def end_trials(study: Study, pairs: Sequence[tuple[float, float]]) -> None:
    with sampled_run(study) as run:
        for gain, cost in pairs:
            claim = claim_one(run)
            run.report(claim, 1, {"gain": gain, "cost": cost}, gain)
            run.complete(claim, gain, other_values=(cost,))
        run.flush()


def learned(number: int, pair: tuple[float, float]) -> ImportedTrial:
    return ImportedTrial(
        Origin("old", "abc", number), POINTS[0], GRID, TrialState.COMPLETE, pair[0], other_values=pair[1:]
    )


def test_the_values_of_all_objectives_are_stored_with_the_end_of_the_trial(
    database: Database, both: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    transactions = []
    write = reporting.write

    def count(*arguments: Any, **options: Any) -> Any:
        transactions.append(arguments)
        return write(*arguments, **options)

    monkeypatch.setattr(reporting, "write", count)
    with sampled_run(both) as run:
        claim = claim_one(run)
        run.report(claim, 1, {"gain": 0.5, "cost": 7.0}, 0.5)
        run.flush()
        before = len(transactions)
        assert sql(database, "SELECT count(*) FROM trial_values") == [(0,)]
        run.complete(claim, 0.5, other_values=(7.0,))
        run.flush()
        assert len(transactions) == before + 1
    assert sql(database, "SELECT objective, value FROM trial_values ORDER BY objective") == [(0, 0.5), (1, 7.0)]
    (trial,) = both.trials()
    assert (trial.values, trial.intermediate_values) == ([0.5, 7.0], {1: 0.5})
    assert [each.name for each in both.optuna_study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert both.optuna_study.metric_names == ["gain", "cost"]


def test_a_study_of_another_program_with_other_directions_is_refused(database: Database) -> None:
    optuna.create_study(storage=database.optuna_storage, study_name="both", direction="maximize")
    with pytest.raises(StorageError, match="to maximize, but the search space says maximize and minimize"):
        open_study(database, "both", direction=BOTH, fingerprint="f", settings=SETTINGS)


def test_names_of_objectives_are_those_of_the_settings() -> None:
    assert metric_names(SETTINGS) == ["gain", "cost"]
    assert metric_names({"metric": "gain", "objectives": None}) == ["gain"]
    assert metric_names({"objectives": "what another program wrote"}) == ["value"]


@pytest.mark.parametrize(
    ("count", "superfluous"),
    [(1, [0, 2, 3, 4]), (2, [0, 2, 4]), (3, [2, 4]), (4, [4]), (9, []), (0, [0, 1, 2, 3, 4])],
)
def test_all_but_the_best_by_fronts_are_superfluous(both: Study, count: int, superfluous: list[int]) -> None:
    end_trials(both, PAIRS)
    assert [trial.number for trial in superfluous_trials(both, count, BOTH)] == superfluous
    assert [trial.number for trial in superfluous_trials(both, count, BOTH, among=[2, 3])] == [
        number for number in superfluous if number in {2, 3}
    ]


def test_trials_of_earlier_studies_dominate_nothing(database: Database, both: Study) -> None:
    end_trials(both, PAIRS)
    import_trials(both, [learned(0, (9.0, 0.0))])
    assert both.trials()[-1].values == [9.0, 0.0]
    assert [trial.number for trial in superfluous_trials(both, 3, BOTH)] == [2, 4]
    assert count_since_best(both, BOTH) == SinceBest(3, 1)
    (summary,) = summarize(database)
    assert (summary.front, summary.best, summary.metric) == (3, None, "gain, cost")


def test_trials_since_the_front_changed_are_counted(both: Study) -> None:
    """A trial that an earlier one dominates or equals does not change it."""
    found = [count_since_best(both, BOTH)]
    for pair in ((1.0, 1.0), (1.0, 1.0), (0.5, 1.0), (2.0, 5.0), (1.0, 0.5), (2.0, 5.0)):
        end_trials(both, [pair])
        found.append(count_since_best(both, BOTH))
    assert [(each.best, each.ended) for each in found] == [
        (None, 0),
        (0, 0),
        (0, 1),
        (0, 2),
        (3, 0),
        (4, 0),
        (4, 1),
    ]


def test_a_copy_has_all_values(database: Database, both: Study) -> None:
    end_trials(both, PAIRS)
    copy_study(both, database, "copy", "0123456789ab")
    copy = find_study(database, "copy")
    assert copy is not None
    assert [trial.values for trial in copy.trials()] == [list(pair) for pair in PAIRS]
    assert copy.optuna_study.directions == both.optuna_study.directions
    assert copy.optuna_study.metric_names == ["gain", "cost"]


def test_a_result_that_stands_has_all_values(both: Study) -> None:
    reused = ImportedTrial(
        Origin("old", "abc", 1),
        POINTS[0],
        GRID,
        TrialState.COMPLETE,
        1.0,
        config_key(POINTS[0]),
        {1: 1.0},
        {1: {"gain": 1.0, "cost": 2.0}},
        other_values=(2.0,),
    )
    import_trials(both, [reused])
    (trial,) = both.trials()
    assert trial.values == [1.0, 2.0]
    assert superfluous_trials(both, 0, BOTH) == [], "an earlier study has its files"


# --- what TPE sees of a large study


def imported(numbers: Iterable[int], pair_of: Callable[[int], tuple[float, float]]) -> list[ImportedTrial]:
    """Build trials of an earlier study to learn from: the fastest way to many trials."""
    trials = []
    for number in numbers:
        gain, cost = pair_of(number)
        params = {"x": fraction(number)}
        trials.append(
            ImportedTrial(
                Origin("old", "abc", number), params, {"x": X}, TrialState.COMPLETE, gain, other_values=(cost,)
            )
        )
    return trials


def fraction(number: int, irrational: float = 0.7548776662) -> float:
    return number * irrational % 1


def scattered(number: int) -> tuple[float, float]:
    return round(fraction(number), 2), round(fraction(number, 0.5698402910), 2)


def best_of(study: Study, trials: list[FrozenTrial]) -> set[tuple[float, ...]]:
    """Return the values of the trials that TPE counts as the best."""
    below, _ = _split_trials(study.optuna_study, trials, default_gamma(len(trials)))
    assert len(below) == default_gamma(len(trials))
    return {tuple(trial.values) for trial in below}


def test_the_best_trials_of_a_history_are_those_of_the_whole_study(both: Study) -> None:
    history = History(both, MIN_LIMIT)
    for start in range(0, 600, 150):
        import_trials(both, imported(range(start, start + 150), scattered))
        history.refresh()
        again = History(both, MIN_LIMIT)
        again.refresh()
        assert [trial.number for trial in history.trials()] == [trial.number for trial in again.trials()]
    shown, whole = history.trials(), both.trials()
    assert len(shown) == MIN_LIMIT < len(whole)
    assert best_of(both, shown) == best_of(both, whole)
    assert {trial.number: trial.values for trial in shown}.items() <= {
        each.number: each.values for each in whole
    }.items()


def test_of_a_front_larger_than_half_of_the_limit_an_even_sample_is_shown(both: Study) -> None:
    """All trials are on the Pareto front."""
    import_trials(both, imported(range(400), lambda number: (float(number), float(number))))
    history = History(both, MIN_LIMIT)
    history.refresh()
    gains = sorted(trial.values[0] for trial in history.trials())
    assert len(gains) == MIN_LIMIT
    assert gains[0] == 0.0
    assert gains[-1] == 399.0, "both ends of the front"
    assert max(after - before for before, after in itertools.pairwise(gains)) <= 4


def test_tpe_draws_from_a_history(both: Study) -> None:
    import_trials(both, imported(range(300), scattered))
    both.optuna_study.sampler = optuna.samplers.TPESampler(seed=0)
    with sampled_run(both, lambda trial: str(trial.suggest_float("x", 0, 1))[:0], history_limit=MIN_LIMIT) as run:
        claim = claim_one(run)
        run.complete(claim, 1.0, other_values=(0.5,))
        run.flush()
    assert both.trials()[-1].values == [1.0, 0.5]
