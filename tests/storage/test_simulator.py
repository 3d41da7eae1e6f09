"""The simulator finds nothing in the storage code, and finds what is broken on purpose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from storage import (
    claims,
    lease,
    optuna_tables,
    ownership,
    population,
    promotion,
    queue,
    records,
    reporting,
    retry,
    tables,
    usage,
)
from storage.population import PopulationBased
from storage.promotion import PromotingHalving, StoppingHalving
from storage.pruners import Decision, SuccessiveHalving
from storage.writer import Writer
from tests.storage.simulator import Backend, open_backend, run_seed

pytestmark = pytest.mark.slow

SEEDS = {  # {pruner, None for the one that the seed draws: {storage: number of seeds}}
    None: {"sqlite": 40, "postgresql": 4},
    "pbt": {"sqlite": 15, "postgresql": 2},
    "promote": {"sqlite": 15, "postgresql": 2},
    "stop": {"sqlite": 15, "postgresql": 2},
}
SHARE = 3  # a third of them, without --exhaustive
SEEDS_OF_MUTANTS = 50  # each must be found within them


@pytest.fixture(scope="module")
def sqlite() -> Iterator[Backend]:
    with open_backend("sqlite") as backend:
        yield backend


@pytest.mark.parametrize("pruner", SEEDS)
@pytest.mark.parametrize("storage", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def test_no_seed_violates_an_invariant(pytestconfig: pytest.Config, storage: str, pruner: str | None) -> None:
    share = 1 if pytestconfig.getoption("exhaustive") else SHARE
    with open_backend(storage) as backend:
        for seed in range(math.ceil(SEEDS[pruner][storage] / share)):
            violation, log = run_seed(backend, seed, pruner=pruner)
            assert not violation, "\n".join([f"seed {seed}", *log[-40:], violation])


def test_a_seed_decides_everything(sqlite: Backend) -> None:
    first, second = (run_seed(sqlite, 7)[1] for _ in range(2))
    assert first == second
    assert len(first) > 100


# --- what the simulator must find


def no_token_check(patch: pytest.MonkeyPatch) -> None:
    """A run writes to every trial, whoever owns it."""
    owners = ownership.owners

    def all_are_mine(connection: Any, trial_ids: Any) -> Any:
        return {each: Mine(row) for each, row in owners(connection, trial_ids).items()}

    class AnyToken(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = int.__hash__

    class Mine:
        def __init__(self, row: Any) -> None:
            self._row = row
            self.token = AnyToken()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._row, name)

    patch.setattr(ownership, "owners", all_are_mine)


def living_runs_are_dead(patch: pytest.MonkeyPatch) -> None:
    """The lease of a run on another machine does not protect it."""
    patch.setattr(queue, "is_run_dead", lambda run: True)


def processes_keep_their_trials(patch: pytest.MonkeyPatch) -> None:
    """A run counts as alive as long as its process lives."""

    def is_process_dead(row: Any) -> bool | None:
        if row.host != lease.host_id():
            return None
        try:
            lease.__dict__["psutil"].Process(row.pid)  # the simulation's
        except psutil.NoSuchProcess:
            return True
        return False

    patch.setattr(queue, "is_run_dead", is_process_dead)


def studies_are_known_by_their_ids(patch: pytest.MonkeyPatch) -> None:
    """A study that has the id of a deleted one is taken for it."""

    def lock_id(connection: Any, study: Any) -> bool:
        studies = optuna_tables.studies
        return connection.scalar(studies.select().where(studies.c.study_id == study.study_id)) is not None

    patch.setattr(optuna_tables, "lock_study", lock_id)


def every_failure_is_retried(patch: pytest.MonkeyPatch) -> None:
    """A retry whose answer was lost retries a later failure, too."""

    def still_failed(connection: Any, study: Any, failures: Any) -> Any:
        chosen = {failure.trial_id for failure in failures}
        return [each for each in retry._read_failures(connection, study) if each.trial_id in chosen]

    patch.setattr(retry, "_still_failed", still_failed)


def points_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    """A run forgets the points that it has claimed."""
    patch.setattr(queue.TrialQueue, "_compare_points", lambda self: setattr(self, "_compared_keys", self._keys))


def outages_are_not_noticed(patch: pytest.MonkeyPatch) -> None:
    """After an outage, whoever comes first takes the trials of the others."""
    renew = ownership.renew_lease

    def renew_only(connection: Any, database: Any, run: Any) -> Any:
        row = renew(connection, database, run)
        return None if row is None else SimpleNamespace(now=row.now, takeover_after=0.0)

    patch.setattr(ownership, "renew_lease", renew_only)
    patch.setattr(queue, "SILENT_SHARE", 0.0)


def budget_is_checked_before_the_draw_only(patch: pytest.MonkeyPatch) -> None:
    """Two runs that draw at the same time both store their trial."""
    register = claims.register

    def without_budget(database: Any, run: Any, token: int, configuration: Any, max_trials: Any, **options: Any) -> Any:
        return register(database, run, token, configuration, None, **options)

    patch.setattr(claims, "register", without_budget)


def repeated_claims_are_new(patch: pytest.MonkeyPatch) -> None:
    """A claim whose answer was lost is made a second time."""
    find = claims._claimed_with
    known: set[int] = set()

    def forget_the_first(connection: Any, token: int, clock: Any) -> Any:
        found = find(connection, token, clock)
        first = token not in known and found is not None
        known.add(token)
        return found if first else None

    patch.setattr(claims, "_claimed_with", forget_the_first)


def abandoned_epochs_stay(patch: pytest.MonkeyPatch) -> None:
    """Epochs of an earlier attempt are not deleted."""
    drop = reporting._drop_abandoned

    def keep(connection: Any, batch: Any) -> Any:
        return drop(connection, [replace(update, is_restart=False) for update in batch])

    patch.setattr(reporting, "_drop_abandoned", keep)


def rungs_of_abandoned_epochs_stay(patch: pytest.MonkeyPatch) -> None:
    """What a pruner noted of an epoch outlives the value of this epoch."""
    delete = records.delete_epochs

    def keep_one(connection: Any, trial_id: int, from_epoch: int) -> None:
        delete(connection, trial_id, from_epoch + 1)

    patch.setattr(records, "delete_epochs", keep_one)


def bugs_end_the_writer(patch: pytest.MonkeyPatch) -> None:
    """The writer loses its batch on an error that it does not know."""
    write = Writer._write_once

    def lose(self: Any, updates: Any) -> None:
        try:
            write(self, updates)
        except RuntimeError:
            return

    patch.setattr(Writer, "_write_once", lose)


def decisions_are_stored_alone(patch: pytest.MonkeyPatch) -> None:
    """The rung of a pruned trial is stored, its state is not."""
    end = optuna_tables.end

    def forget_pruned(connection: Any, trial_id: int, state: Any, value: Any) -> None:
        if state.name != "PRUNED":
            end(connection, trial_id, state, value)

    patch.setattr(optuna_tables, "end", forget_pruned)


def crashes_are_added(patch: pytest.MonkeyPatch) -> None:
    """A crash whose answer was lost is counted twice."""
    table = tables.trials

    def add(database: Any, claim: Any, crashes: int) -> None:
        with database.transaction() as connection:
            update = table.update().where(table.c.trial == claim.trial_id)
            connection.execute(update.values(crashes=table.c.crashes + 1))

    patch.setattr(reporting, "count_crashes", add)


def keys_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    """A duplicate is stored, and its error ends the run."""
    patch.setattr(records, "has_key", lambda *_: False)


def device_time_is_added(patch: pytest.MonkeyPatch) -> None:
    """Device time whose answer was lost is counted twice."""
    stored, note_stored = Counter[usage.Account](), usage.Meter.note_stored

    def add(connection: Any, readings: Any) -> None:
        for (trial, token), seconds in readings.items():
            new = seconds - stored[trial, token]
            is_it = sa.and_(tables.usage.c.trial == trial, tables.usage.c.token == token)
            connection.execute(tables.usage.update().where(is_it).values(seconds=tables.usage.c.seconds + new))

    def note(self: Any, readings: Any) -> None:
        stored.update({account: seconds - stored[account] for account, seconds in readings.items()})
        note_stored(self, readings)

    patch.setattr(usage, "store", add)
    patch.setattr(usage.Meter, "note_stored", note)


def the_last_reading_is_lost(patch: pytest.MonkeyPatch) -> None:
    """A claim that stops while an earlier reading is being stored counts as stored."""
    note_stored = usage.Meter.note_stored

    def forget(self: Any, readings: Any) -> None:
        note_stored(self, readings)
        self._unstored -= readings.keys()

    patch.setattr(usage.Meter, "note_stored", forget)


def device_time_is_stored_with_reports_only(patch: pytest.MonkeyPatch) -> None:
    """A driver that is killed in a long epoch loses its device time."""
    patch.setattr(usage.Meter, "is_due", property(lambda self: bool(self._unstored)))


def replaced_members_count(patch: pytest.MonkeyPatch) -> None:
    """The budget counts trials, not members: it is spent before each line has reached its end."""
    patch.setattr(records, "count_budgeted", records.count_keys)


def lines_are_decided_twice(patch: pytest.MonkeyPatch) -> None:
    """A successor that has no checkpoint to start from is compared at the epoch after which its line was decided."""
    patch.setattr(population, "_born", lambda connection, trial_id: 0)


def successors_follow_later(patch: pytest.MonkeyPatch) -> None:
    """A trial ends in one transaction, and its successor would be created in another one."""
    decide = PopulationBased.decide

    def decide_and_undo(self: PopulationBased, connection: Any, question: Any) -> Decision:
        savepoint = connection.begin_nested()
        decision = decide(self, connection, question)
        (savepoint.rollback if decision is Decision.END else savepoint.commit)()
        return decision

    patch.setattr(PopulationBased, "decide", decide_and_undo)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutant", [replaced_members_count, lines_are_decided_twice, successors_follow_later])
def test_a_broken_population_is_found(
    sqlite: Backend, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutant(monkeypatch)
    assert any(run_seed(sqlite, seed, ("kill",), pruner="pbt")[0] for seed in range(SEEDS_OF_MUTANTS))


def all_that_wait_train_on(patch: pytest.MonkeyPatch) -> None:
    """A trial that waits at a rung is claimed as one that was interrupted."""
    patch.setattr(PromotingHalving, "waits", lambda self, study_id: sa.false())
    patch.setattr(PromotingHalving, "read_waiting", lambda self, connection, study_id: {})


def those_that_wait_end_too_early(patch: pytest.MonkeyPatch) -> None:
    """A run that has no new trial ends those that wait, while others train."""
    claim = claims.claim_existing
    end = PromotingHalving.end_waiting

    def claim_and_end(database: Any, run: Any, token: int, **options: Any) -> claims.Scan:
        scan = claim(database, run, token, **options)
        pruner = options["promotion"]
        if scan.claim is None and options["is_last"] and scan.some_wait:
            with database.transaction() as connection:
                end(pruner, connection, run, list(pruner.read_waiting(connection, run.study_id)))
        return scan

    patch.setattr(claims, "claim_existing", claim_and_end)


def the_best_do_not_train_on_at_the_end(patch: pytest.MonkeyPatch) -> None:
    """A rung that too few trials reach would let none of them train to the end."""
    find = PromotingHalving.find_promoted
    patch.setattr(
        PromotingHalving,
        "find_promoted",
        lambda self, connection, study_id, barred, running: find(self, connection, study_id, barred=barred),
    )


def the_first_always_waits(patch: pytest.MonkeyPatch) -> None:
    """Also next to others that train."""
    patch.setattr(promotion, "_trains_alone", lambda *_: True)


def the_first_never_waits(patch: pytest.MonkeyPatch) -> None:
    """Successive halving as it is published."""
    patch.setattr(StoppingHalving, "decide", SuccessiveHalving.decide)


def who_waits_is_known_to_the_driver_only(patch: pytest.MonkeyPatch) -> None:
    """The decision that a trial waits is not stored with its epoch: a driver that dies takes it along."""
    upsert = optuna_tables.upsert

    def upsert_others(connection: Any, table: Any, key: Any, rows: Any) -> None:
        if table is not tables.rungs:
            upsert(connection, table, key, rows)

    patch.setattr(optuna_tables, "upsert", upsert_others)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("mutant", "pruner"),
    [
        (all_that_wait_train_on, "promote"),
        (those_that_wait_end_too_early, "promote"),
        (the_best_do_not_train_on_at_the_end, "promote"),
        (who_waits_is_known_to_the_driver_only, "promote"),
        (the_first_always_waits, "stop"),
        (the_first_never_waits, "stop"),
        (who_waits_is_known_to_the_driver_only, "stop"),
    ],
)
def test_a_broken_rule_of_who_waits_is_found(
    sqlite: Backend, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None], pruner: str
) -> None:
    mutant(monkeypatch)
    assert any(run_seed(sqlite, seed, ("kill",), pruner=pruner)[0] for seed in range(SEEDS_OF_MUTANTS))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("mutant", "faults", "first"),
    [
        (no_token_check, ("suspend", "outage"), 200),
        (living_runs_are_dead, ("suspend",), 0),
        (processes_keep_their_trials, ("exit",), 50),
        (studies_are_known_by_their_ids, ("delete",), 0),
        (every_failure_is_retried, ("retry", "lost answer"), 780),
        (points_are_not_compared, ("restore",), 0),
        (outages_are_not_noticed, ("outage",), 50),
        (budget_is_checked_before_the_draw_only, ("error",), 0),
        (repeated_claims_are_new, ("lost answer",), 0),
        (abandoned_epochs_stay, ("kill",), 100),
        (rungs_of_abandoned_epochs_stay, ("kill",), 100),
        (bugs_end_the_writer, ("bug",), 0),
        (decisions_are_stored_alone, ("kill",), 0),
        (crashes_are_added, ("lost answer",), 0),
        (keys_are_not_compared, ("kill",), 0),
        (device_time_is_added, ("lost answer",), 0),
        (the_last_reading_is_lost, ("suspend",), 0),
        (device_time_is_stored_with_reports_only, ("kill",), 0),
    ],
    ids=lambda value: getattr(value, "__name__", "+".join(value) if isinstance(value, tuple) else ""),
)
def test_a_broken_protocol_is_found(
    sqlite: Backend,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Callable[[pytest.MonkeyPatch], None],
    faults: tuple[str, ...],
    first: int,
) -> None:
    """Rare cases have a first seed, to save time: it is not far from one that finds them."""
    mutant(monkeypatch)
    assert any(run_seed(sqlite, seed, faults)[0] for seed in range(first, first + SEEDS_OF_MUTANTS))
