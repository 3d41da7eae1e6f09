"""The pruners decide as Optuna's do, trial by trial, and keep what they compare when a study changes its pruner."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import optuna
import pytest
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import TrialState, create_trial

from storage import claims, ownership, reporting, tables
from storage.claims import Configuration
from storage.copying import copy_study
from storage.database import Database
from storage.lease import Lease
from storage.management import rename_study
from storage.ownership import ClaimedTrial, RunKey
from storage.pruners import Decision, Median, Pruner, SuccessiveHalving
from storage.reporting import TrialUpdate
from storage.studies import find_study, open_study
from storage.study import Study
from tests.storage.builders import GRID, POINTS, claim_one, claim_point, grid_run, sql

TRIALS, EPOCHS = 30, 9
Direction = Literal["maximize", "minimize"]
DIRECTIONS: tuple[Direction, Direction] = ("maximize", "minimize")
KINDS = (
    "asha/1/2",
    "asha/1/3",
    "asha/2/2",
    "hyperband/1/3",
    "hyperband/1/2",
    "hyperband/2/2",
    "median/1/1",
    "median/3/5",
)
# On PostgreSQL, one of each kind: the SQL is the same.
CASES = [("sqlite", kind) for kind in KINDS] + [
    pytest.param("postgresql", kind, marks=[pytest.mark.postgres, pytest.mark.slow])
    for kind in ("asha/1/2", "hyperband/1/3", "median/3/5")
]


def pair(kind: str, direction: Direction, study_name: str = "s") -> tuple[Pruner, BasePruner]:
    """Return a pruner of ours, and the one of Optuna's that decides the same."""
    name, first, second = kind.split("/")
    maximize, min_epochs, number = direction == "maximize", int(first), int(second)
    if name == "median":
        theirs: BasePruner = MedianPruner(n_startup_trials=number, n_warmup_steps=min_epochs)
        return Median(maximize, min_epochs, startup_trials=number), theirs
    if name == "asha":
        theirs = SuccessiveHalvingPruner(min_resource=min_epochs, reduction_factor=number)
        return SuccessiveHalving(maximize, study_name, min_epochs, number), theirs
    ours = SuccessiveHalving.hyperband(
        maximize=maximize, study_name=study_name, min_epochs=min_epochs, max_epochs=EPOCHS, reduction_factor=number
    )
    return ours, HyperbandPruner(min_resource=min_epochs, max_resource=EPOCHS, reduction_factor=number)


@dataclass
class Both:
    """The same trials in our storage and in a study of Optuna's in memory, reported at the same moments.

    Args:
        database: of our study.
        direction: of both.
        seed: decides the curves, and the order in which trials report.
    """

    database: Database
    direction: Direction
    seed: str

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        options: Any = {"direction": self.direction, "fingerprint": "f", "settings": {}}
        self.study: Study = open_study(self.database, "s", **options)
        lease = Lease(self.database, self.study.key, provenance={})
        lease.start()
        lease.stop()
        self.run: RunKey = lease.key
        self.optuna_study = optuna.create_study(study_name="s", direction=self.direction)
        self.decisions: list[tuple[int, int, bool, bool]] = []  # trial, epoch, ours, Optuna's
        self.trials = 0

    def prepare(self, pruner: Pruner) -> None:
        with self.database.transaction() as connection:
            pruner.prepare(connection, self.study.study_id)

    def train(self, count: int, ours: Pruner | None, theirs: BasePruner) -> None:
        """Train so many more trials, up to four at a time."""
        self.optuna_study.pruner = theirs
        left, active = count, list[Iterator[None]]()
        while left or active:
            if left and len(active) < 4 and self.draw.random() < 0.5:
                active.append(self._train_one(ours))
                left -= 1
            elif active:
                trial = self.draw.choice(active)
                if next(trial, "ended") == "ended":
                    active.remove(trial)

    def _train_one(self, pruner: Pruner | None) -> Iterator[None]:
        theirs = self.optuna_study.ask()
        configuration = Configuration(f"{self.trials}", {}, {})
        self.trials += 1
        claim = claims.register(self.database, self.run, ownership.new_token(), configuration, None)
        assert isinstance(claim, ClaimedTrial)
        assert claim.number == theirs.number
        level, last = self.draw.random(), 0.0
        follows: dict[int, float] = {}
        for epoch in range(1, EPOCHS + 1):
            last = round(level + self.draw.gauss(0, 0.1) * epoch, self.draw.choice([1, 12]))  # some are equal
            update = TrialUpdate(claim, epoch, {}, last, follows=follows, decides=pruner is not None)
            follows = {epoch: last}
            is_pruned = claim.token in self._write(pruner, update).pruned
            theirs.report(last, epoch)
            wanted = theirs.should_prune()
            self.decisions.append((claim.number, epoch, is_pruned, wanted))
            if is_pruned or wanted:
                self.optuna_study.tell(theirs, state=TrialState.PRUNED)
                return
            yield
        self._write(pruner, TrialUpdate(claim, value=last, follows=follows, final_state=TrialState.COMPLETE))
        self.optuna_study.tell(theirs, last)

    def _write(self, pruner: Pruner | None, update: TrialUpdate) -> reporting.Written:
        return reporting.write(self.database, self.study.key, [update], pruner=pruner, ending=(), device_seconds={})

    def compare(self) -> None:
        """Assert that all decisions are equal, and that there are some of each kind."""
        differing = [each for each in self.decisions if each[2] != each[3]]
        assert differing == [], "trial, epoch, ours, Optuna's"
        states = [trial.state for trial in self.study.trials()]
        assert states == [trial.state for trial in self.optuna_study.trials]
        assert {TrialState.PRUNED, TrialState.COMPLETE} == set(states)


def rungs(database: Database) -> list[tuple[Any, ...]]:
    return sql(database, "SELECT pool, epoch, trial, value FROM hpo_rungs ORDER BY 1, 2, 3")


@pytest.mark.exhaustive(on="postgresql")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("url", "kind"), CASES, indirect=["url"])
def test_decisions_are_those_of_optuna(database: Database, kind: str, direction: Direction) -> None:
    ours, theirs = pair(kind, direction)
    both = Both(database, direction, f"{kind}/{direction}")
    both.train(TRIALS, ours, theirs)
    both.compare()


@pytest.mark.parametrize("kind", ["hyperband/1/3", "hyperband/1/2", "hyperband/2/2"])
@pytest.mark.parametrize("name", ["s", "fashion@2"])
def test_brackets_are_those_of_optuna(kind: str, name: str) -> None:
    ours, theirs = pair(kind, "maximize", name)
    study = optuna.create_study(study_name=name)
    assert isinstance(ours, SuccessiveHalving)
    assert isinstance(theirs, HyperbandPruner)
    theirs.prune(study, create_trial(state=TrialState.RUNNING))  # creates the brackets
    wanted = []
    for number in range(300):
        trial = create_trial(state=TrialState.RUNNING)
        trial.number = number
        wanted.append(theirs._get_bracket_id(study, trial))
    assert [ours.bracket(number) for number in range(300)] == wanted
    assert set(wanted) == set(range(ours.brackets))
    assert ours.brackets > 1


# --- a study that changes its pruner


@pytest.mark.exhaustive(on="postgresql")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("url", "kind"), CASES, indirect=["url"])
def test_prepare_restores_what_decisions_have_stored(database: Database, kind: str, direction: Direction) -> None:
    """As if all epochs had been stored without a pruner, or by an older version."""
    ours, theirs = pair(kind, direction)
    both = Both(database, direction, f"{kind}/{direction}/prepare")
    both.train(20, ours, theirs)
    stored = rungs(database)
    assert stored
    both.prepare(ours)
    assert rungs(database) == stored, "nothing is missing"
    with database.engine.begin() as connection:
        connection.execute(tables.rungs.delete())
    for _ in range(2):
        both.prepare(ours)
        assert rungs(database) == stored


@pytest.mark.exhaustive(on="postgresql")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("before", ["none", "asha/1/2", "hyperband/1/3"])
def test_median_decides_like_optuna_after_another_pruner(database: Database, before: str, direction: Direction) -> None:
    both = Both(database, direction, f"{before}/{direction}")
    first: tuple[Pruner | None, BasePruner] = (None, NopPruner()) if before == "none" else pair(before, direction)
    both.train(20, *first)
    ours, theirs = pair("median/1/1", direction)
    both.prepare(ours)
    switched = both.trials
    both.train(20, ours, theirs)
    both.compare()
    assert any(number >= switched and wanted for number, _, _, wanted in both.decisions)


@pytest.mark.parametrize("kind", ["asha/1/2", "hyperband/1/3"])
def test_halving_counts_the_trials_of_another_pruner(database: Database, kind: str) -> None:
    """Optuna's would forget them: it stores a trial's rungs when it decides."""
    both = Both(database, "maximize", kind)
    both.train(20, None, NopPruner())
    ours, _ = pair(kind, "maximize")
    assert isinstance(ours, SuccessiveHalving)
    both.prepare(ours)
    found = {(trial - 1, epoch): value for _, epoch, trial, value in rungs(database)}
    wanted = {
        (trial.number, epoch): value
        for trial in both.study.trials()
        for epoch, value in trial.intermediate_values.items()
        if epoch in ours.rungs_until(ours.bracket(trial.number), EPOCHS)
    }
    assert found == wanted
    median, optuna_median = pair("median/1/1", "maximize")
    both.prepare(median)
    both.train(10, median, optuna_median)
    both.prepare(ours)
    kept = [row for row in rungs(database) if row[0] != "median"]
    assert {(row[2] - 1, row[1]) for row in kept} > set(wanted)


def test_halving_does_not_judge_what_a_parent_has_trained(study: Study, database: Database) -> None:
    """Its rungs count for others."""
    with grid_run(study, pruner=SuccessiveHalving(True, "s", 1, 2)) as run:
        run.enqueue(POINTS, GRID)
        good, bad, worse = (claim_one(run) for _ in range(3))
        for epoch in (1, 2, 3, 4):
            assert run.decide(good, epoch, {"m": 0.5}, 0.5) is Decision.CONTINUE
        for epoch in (1, 2):
            run.report(bad, epoch, {"m": 0.25}, 0.25)
        assert run.decide(bad, 3, {"m": 0.25}, 0.25, first_epoch=3) is Decision.CONTINUE
        assert [row[1:] for row in rungs(database) if row[2] == 2] == [(1, 2, 0.25), (2, 2, 0.25)]
        assert run.decide(bad, 4, {"m": 0.25}, 0.25, first_epoch=3) is Decision.END, "its own first rung"
        assert run.decide(worse, 1, {"m": 0.125}, 0.125) is Decision.END


def test_brackets_stay_when_a_study_is_renamed_or_copied(study: Study, database: Database) -> None:
    assert study.bracket_name == "s"
    rename_study(study, "renamed")
    renamed = find_study(database, "renamed")
    assert renamed is not None
    assert renamed.bracket_name == "s"
    copy_study(renamed, database, "copied", "0" * 12)
    copied = find_study(database, "copied")
    assert copied is not None
    assert copied.bracket_name == "s"
    rename_study(copied, "another")
    another = find_study(database, "another")
    assert another is not None
    copy_study(another, database, "copied-again", "1" * 12)
    again = find_study(database, "copied-again")
    assert again is not None
    assert again.bracket_name == "s"


def test_a_run_prepares_its_pruner(study: Study, database: Database) -> None:
    with grid_run(study) as run:
        claim = claim_point(run)
        for epoch in (1, 2, 3, 4):
            run.report(claim, epoch, {"m": epoch / 8}, epoch / 8)
        run.complete(claim, 0.5)
    assert rungs(database) == []
    asha = [("asha", epoch, 1, epoch / 8) for epoch in (1, 2, 4)]
    with grid_run(study, pruner=SuccessiveHalving(True, "s", 1, 2)):
        assert rungs(database) == asha
    with grid_run(study, pruner=Median(True, 1)):
        assert rungs(database) == [*asha, *(("median", epoch, 1, epoch / 8) for epoch in (1, 2, 3, 4))]


@pytest.mark.parametrize("kind", ["asha/1/2", "median/1/1"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_never_compete(study: Study, database: Database, kind: str, value: float) -> None:
    """A run without a pruner reports them; `decide` gets finite ones only."""
    pruner, _ = pair(kind, "maximize")
    with grid_run(study) as run:
        claim = claim_point(run)
        for epoch, each in ((1, value), (2, 0.5), (4, value)):
            run.report(claim, epoch, {"m": each}, each)
        run.complete(claim, 0.5)
    with grid_run(study, pruner=pruner):
        pass
    assert [row[1:] for row in rungs(database)] == [(2, 1, 0.5)]
