"""The operations on trials: repeated after a lost answer, with a stale token, and on the trials of dead runs."""

from __future__ import annotations

import itertools
import math
import sqlite3
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from storage import claims, optuna_tables, ownership, reporting, tables
from storage import errors as errors_module
from storage.claims import Configuration, Refusal, Scan
from storage.database import Database
from storage.errors import StorageError
from storage.lease import Lease
from storage.ownership import ClaimedTrial, LostTrialError, RunKey
from storage.pruners import Decision, SuccessiveHalving
from storage.reporting import TrialUpdate, Written
from storage.retry import retry_trials
from storage.study import Study
from tests.factories import trial_states, wait_until
from tests.storage.builders import GRID, POINTS, claim_one, claim_point, grid_run, open_s, sampled_run, sql

ASHA = SuccessiveHalving(maximize=True, study_name="s", min_epochs=1, reduction_factor=2)
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
# Every claim renews the lease in hpo_runs. Optuna's key of an epoch is new if the epoch is stored again.
UNSTABLE_COLUMNS = {"last_heard", "lease_until", "trial_intermediate_value_id"}


def dump(database: Database) -> dict[str, list[tuple[str, ...]]]:
    """Return the content of all tables, without `UNSTABLE_COLUMNS`."""
    found = {}
    with database.engine.connect() as connection:
        for name in sa.inspect(connection).get_table_names():
            rows = connection.execute(sa.text(f"SELECT * FROM {name}")).mappings()
            kept = [{column: value for column, value in row.items() if column not in UNSTABLE_COLUMNS} for row in rows]
            found[name] = sorted(tuple(map(repr, row.items())) for row in kept)
    return found


def start_run(study: Study, max_failures: int = 2) -> RunKey:
    """Start a run whose lease no thread renews."""
    lease = Lease(study.database, study.key, provenance={}, max_failures=max_failures)
    lease.start()
    lease.stop()
    return lease.key


def point(number: int) -> Configuration:
    return Configuration(f"x={number}", {"x": number}, {"x": CategoricalDistribution(list(range(10)))})


def create(study: Study, run: RunKey, number: int = 0) -> ClaimedTrial:
    """Create a trial that a run owns."""
    claim = claims.register(study.database, run, ownership.new_token(), point(number), None)
    assert isinstance(claim, ClaimedTrial)
    return claim


def scan(
    study: Study, run: RunKey, token: int | None = None, *, dead: Collection[RunKey] = (), own: Collection[int] = ()
) -> Scan:
    """Claim a trial that exists. The runs in `dead` have ended without a word, the others live."""
    token = ownership.new_token() if token is None else token
    ids = {each.run_id for each in dead}
    return claims.claim_existing(
        study.database, run, token, own_tokens={token, *own}, is_run_dead=lambda row: row.run in ids
    )


def resume(study: Study, run: RunKey, *, dead: Collection[RunKey] = ()) -> ClaimedTrial:
    """Claim a trial that exists; fail if there is none."""
    claim = scan(study, run, dead=dead).claim
    assert claim is not None
    return claim


def write(
    study: Study, *updates: TrialUpdate, pruner: SuccessiveHalving | None = None, is_ending: bool = False
) -> Written:
    ending = {(update.claim.token, state) for update in updates for state in ENDED} if is_ending else set()
    return reporting.write(study.database, study.key, updates, pruner=pruner, ending=ending, device_seconds={})


def epoch_of(claim: ClaimedTrial, epoch: int, value: float, **options: Any) -> TrialUpdate:
    return TrialUpdate(
        claim,
        epoch,
        {"m": value, "loss": 1 - value},
        value,
        follows={epoch - 1: math.nan} if epoch > 1 else {},
        **options,
    )


# --- a lost answer


def test_a_claim_that_is_repeated_returns_the_same_trial(study: Study, database: Database) -> None:
    run = start_run(study)
    for number in range(2):
        claim = create(study, run, number)
        write(study, epoch_of(claim, 1, 0.5))
        reporting.release(database, claim)
    token = ownership.new_token()
    first = scan(study, run, token)
    before = dump(database)
    assert first.claim is not None
    assert scan(study, run, token).claim == first.claim
    assert dump(database) == before
    assert trial_states(study) == ["RUNNING", "WAITING"]


def test_a_registration_that_is_repeated_returns_the_same_trial(study: Study, database: Database) -> None:
    run, token = start_run(study), ownership.new_token()
    distributions = {
        "kind": CategoricalDistribution(["a", None, 3]),
        "n": IntDistribution(1, 9),
        "x": FloatDistribution(1e-6, 1, log=True),
    }
    configuration = Configuration("key", {"kind": None, "n": 3, "x": 0.1}, distributions, {"note": 1})
    first = claims.register(database, run, token, configuration, 1)
    before = dump(database)
    assert isinstance(first, ClaimedTrial)
    again = claims.register(database, run, token, configuration, 1)
    assert again == first, "neither a duplicate nor over the budget"
    assert dump(database) == before


def test_a_registration_of_an_enqueued_trial_can_be_repeated(study: Study, database: Database) -> None:
    run, token = start_run(study), ownership.new_token()
    study.optuna_study.enqueue_trial({"x": 2})
    (trial_id,) = scan(study, run).partial_ids
    configuration = replace(point(2), trial_id=trial_id)
    first = claims.register(database, run, token, configuration, 1)
    before = dump(database)
    assert isinstance(first, ClaimedTrial)
    assert claims.register(database, run, token, configuration, 1) == first
    assert dump(database) == before
    assert claims.register(database, run, ownership.new_token(), configuration, None) == Refusal.TAKEN
    assert dump(database) == before


def updates_of(claim: ClaimedTrial, kind: str) -> list[TrialUpdate]:
    """Return a batch of updates of a trial without epochs."""
    first = epoch_of(claim, 1, 0.5)
    return {
        "epochs": [first, epoch_of(claim, 2, 0.25), TrialUpdate(claim, attrs={"note": "n"}, provenance={"threads": 1})],
        "restart": [first, epoch_of(claim, 2, 0.25), epoch_of(claim, 1, 0.75, is_restart=True)],
        "complete": [first, TrialUpdate(claim, value=0.5, follows={1: 0.5}, final_state=TrialState.COMPLETE)],
        "fail": [first, TrialUpdate(claim, follows={1: 0.5}, attrs={"fail_reason": "r"}, final_state=TrialState.FAIL)],
        "decide: no": [epoch_of(claim, 1, 0.5, decides=True)],
        "decide: yes": [epoch_of(claim, 1, 0.125, decides=True)],
    }[kind]


@pytest.mark.parametrize("kind", ["epochs", "restart", "complete", "fail", "decide: no", "decide: yes"])
def test_a_batch_that_is_written_again_changes_nothing(study: Study, database: Database, kind: str) -> None:
    run = start_run(study)
    other, claim = create(study, run, 0), create(study, run, 1)
    write(study, epoch_of(other, 1, 0.25, decides=True), pruner=ASHA)
    updates = updates_of(claim, kind)
    is_ending = kind not in {"epochs", "restart"}
    written = write(study, *updates, pruner=ASHA, is_ending=is_ending)
    before = dump(database)
    assert written == Written(lost=set(), pruned={claim.token} if kind == "decide: yes" else set())
    assert write(study, *updates, pruner=ASHA, is_ending=is_ending) == written
    assert dump(database) == before
    states = {"complete": "COMPLETE", "fail": "FAIL", "decide: yes": "PRUNED"}
    assert trial_states(study)[1] == states.get(kind, "RUNNING")


def test_releases_and_crashes_can_be_repeated(study: Study, database: Database) -> None:
    claim = create(study, start_run(study))
    reporting.count_crashes(database, claim, 2)
    before = dump(database)
    reporting.count_crashes(database, claim, 2)
    reporting.count_crashes(database, claim, 1)
    assert dump(database) == before
    reporting.release(database, claim)
    before = dump(database)
    reporting.release(database, claim)
    assert dump(database) == before
    assert sql(database, "SELECT run, token, crashes FROM hpo_trials") == [(None, None, 2)]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_retry_and_an_opening_can_be_repeated(study: Study, database: Database, *, resumed: bool) -> None:
    claim = create(study, start_run(study))
    write(study, *updates_of(claim, "fail"))
    retry_trials(study, [0], resume=resumed)
    before = dump(database)
    retry_trials(study, [0], resume=resumed)
    assert open_s(database).study_id == study.study_id
    assert dump(database) == before
    assert trial_states(study) == ["WAITING"]


def lose_answers(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let every other COMMIT succeed and its answer get lost. The list tells how often: it grows with each COMMIT."""
    commits: list[bool] = []
    dialect = database.engine.dialect
    commit = dialect.do_commit
    is_sqlite = dialect.name == "sqlite"

    def do_commit(connection: Any) -> None:
        commit(connection)
        commits.append(len(commits) % 2 == 0)
        if commits[-1]:
            lost = "server closed the connection unexpectedly"
            raise sqlite3.OperationalError("database is locked") if is_sqlite else psycopg.OperationalError(lost)

    monkeypatch.setattr(dialect, "do_commit", do_commit)
    ticks = itertools.count()
    monkeypatch.setattr(
        errors_module, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 1000, sleep=lambda _: None)
    )
    return commits


def test_a_run_whose_every_answer_is_lost_stores_the_same(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = lose_answers(database, monkeypatch)
    opened = open_s(database, "g", total_trials=3)  # a second revision
    with grid_run(opened, pruner=SuccessiveHalving(True, opened.name, 1, 2)) as run:
        run.enqueue(POINTS[:3], GRID)
        claims = [claim_one(run) for _ in range(3)]
        assert run.decide(claims[0], 1, {"m": 0.5}, 0.5) is Decision.CONTINUE
        assert run.decide(claims[1], 1, {"m": 0.25}, 0.25) is Decision.END
        run.report(claims[0], 2, {"m": 0.75}, 0.75)
        run.complete(claims[0], 0.75)
        assert run.record_crash(claims[2]) == 1
        run.release(claims[2])
        run._queue._next_scan = 0.0
        again = claim_one(run)
        assert (again.number, again.crashes) == (2, 1)
        run.fail(again, "no")
        assert run.claim() is None
        assert run.finished
    assert sum(commits) >= 10
    assert [study.name for study in (study, opened)] == ["s", "s@2"]
    assert [(trial.params, trial.state.name, trial.value) for trial in opened.trials()] == [
        (POINTS[0], "COMPLETE", 0.75),
        (POINTS[1], "PRUNED", 0.25),
        (POINTS[2], "FAIL", None),
    ]
    assert sql(database, "SELECT crashes FROM hpo_trials ORDER BY trial") == [(0,), (0,), (1,)]


# --- a stale token


def taken(study: Study, claim: ClaimedTrial, owner: RunKey, heir: RunKey) -> None:
    resume(study, heir, dead=[owner])


def waiting(study: Study, claim: ClaimedTrial, owner: RunKey, heir: RunKey) -> None:
    reporting.release(study.database, resume(study, heir, dead=[owner]))


def completed(study: Study, claim: ClaimedTrial, owner: RunKey, heir: RunKey) -> None:
    write(study, TrialUpdate(resume(study, heir, dead=[owner]), value=0.5, final_state=TrialState.COMPLETE))


def retried(study: Study, claim: ClaimedTrial, owner: RunKey, heir: RunKey) -> None:
    write(study, TrialUpdate(claim, attrs={"fail_reason": "r"}, final_state=TrialState.FAIL))
    retry_trials(study, [claim.number])
    resume(study, heir)


@pytest.mark.parametrize("loss", [taken, waiting, completed, retried])
def test_a_stale_token_changes_nothing(
    study: Study, database: Database, loss: Callable[[Study, ClaimedTrial, RunKey, RunKey], None]
) -> None:
    owner, heir = start_run(study), start_run(study)
    stale = create(study, owner)
    loss(study, stale, owner, heir)
    before = dump(database)
    for kind in ("epochs", "restart", "complete", "fail", "decide: no", "decide: yes"):
        for is_ending in (False, True):
            written = write(study, *updates_of(stale, kind), pruner=ASHA, is_ending=is_ending)
            assert written == Written(lost={stale.token}, pruned=set())
            assert dump(database) == before, kind
    reporting.release(database, stale)
    reporting.count_crashes(database, stale, 9)
    assert dump(database) == before


def test_a_batch_with_a_stale_claim_stores_the_updates_of_the_others(study: Study) -> None:
    owner, heir = start_run(study), start_run(study)
    stale = create(study, owner, 0)
    resume(study, heir, dead=[owner])
    claim = create(study, owner, 1)
    assert write(study, epoch_of(stale, 1, 0.5), epoch_of(claim, 1, 0.25)).lost == {stale.token}
    assert [trial.intermediate_values for trial in study.trials()] == [{}, {1: 0.25}]


def test_the_failure_of_a_stale_owner_does_not_land(study: Study, database: Database) -> None:
    with grid_run(study) as late:
        claim = claim_point(late)
        key = start_run(study)
        successor = resume(study, key, dead=[late._lease.key])
        late.fail(claim, "the worker was killed")
        late.flush()
        with pytest.raises(LostTrialError):
            late.fail(claim, "the worker was killed")
    assert trial_states(study) == ["RUNNING"]
    assert study.trials()[0].user_attrs == {}
    write(study, TrialUpdate(successor, value=0.5, final_state=TrialState.COMPLETE))
    assert study.trials()[0].value == 0.5


# --- other programs


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED])
def test_a_trial_that_another_program_ended_is_lost(study: Study, database: Database, state: TrialState) -> None:
    with grid_run(study) as run:
        claim = claim_point(run)
        run.report(claim, 1, {"m": 0.25}, 0.25)
        run.flush()
        values = [0.5] if state == TrialState.COMPLETE else None
        database.optuna_storage.set_trial_state_values(claim.trial_id, state, values)
        before = dump(database)
        run.report(claim, 2, {"m": 0.5}, 0.5)
        run.flush()
        with pytest.raises(LostTrialError, match="ended by another program"):
            run.report(claim, 3, {"m": 0.5}, 0.5)
        run.release(claim)
        assert dump(database) == before


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.FAIL])
def test_a_decision_on_a_trial_that_another_program_ended_says_so(
    study: Study, database: Database, state: TrialState
) -> None:
    with grid_run(study, pruner=ASHA) as run:
        claim = claim_point(run)
        assert run.decide(claim, 1, {"m": 0.25}, 0.25) is Decision.CONTINUE
        values = [0.5] if state == TrialState.COMPLETE else None
        database.optuna_storage.set_trial_state_values(claim.trial_id, state, values)
        before = dump(database)
        with pytest.raises(LostTrialError, match="ended by another program"):
            run.decide(claim, 2, {"m": 0.5}, 0.5)
        assert dump(database) == before


def test_a_study_that_was_deleted_raises_in_every_claim(study: Study, database: Database) -> None:
    run = start_run(study)
    claim = create(study, run)
    optuna.delete_study(study_name="s", storage=database.optuna_storage)
    before = dump(database)
    with pytest.raises(StorageError, match="'s' was deleted"):
        scan(study, run)
    with pytest.raises(StorageError, match="'s' was deleted"):
        create(study, run, 1)
    assert write(study, epoch_of(claim, 1, 0.5)).lost == {claim.token}
    reporting.release(database, claim)
    assert dump(database) == before


# --- the budget and duplicates


def test_the_budget_is_exact_with_two_runs_that_register_in_turns(study: Study, database: Database) -> None:
    runs = [start_run(study), start_run(study)]
    answers = [
        claims.register(database, runs[number % 2], ownership.new_token(), point(number), 5) for number in range(8)
    ]
    assert [isinstance(answer, ClaimedTrial) for answer in answers] == [True] * 5 + [False] * 3
    assert answers[5:] == [Refusal.SPENT] * 3
    first = answers[0]
    assert isinstance(first, ClaimedTrial)
    write(study, TrialUpdate(first, attrs={"fail_reason": "r"}, final_state=TrialState.FAIL))
    assert claims.register(database, runs[1], ownership.new_token(), point(9), 5) == Refusal.SPENT, "FAIL counts"
    assert [trial.number for trial in study.trials()] == list(range(5))


def test_a_configuration_that_is_refused_leaves_no_row(study: Study, database: Database) -> None:
    one, two = start_run(study), start_run(study)
    create(study, one, 3)
    before = dump(database)
    assert claims.register(database, two, ownership.new_token(), point(3), 9) == Refusal.DUPLICATE
    assert claims.register(database, one, ownership.new_token(), point(3), 9) == Refusal.DUPLICATE
    assert claims.register(database, two, ownership.new_token(), point(4), 1) == Refusal.SPENT
    assert dump(database) == before


def test_draws_that_are_duplicates_or_break_a_constraint_leave_no_row(study: Study, database: Database) -> None:
    def draw(trial: optuna.Trial) -> str:
        return "n != 2" if trial.suggest_int("n", 1, 2) == 2 else ""

    study.optuna_study.sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=1)  # it notes system attributes
    with sampled_run(study, draw, max_trials=9) as run:
        assert claim_one(run).params == {"n": 1}
        before = dump(database)
        assert run.claim() is None
        assert run.exhausted
        assert dump(database) == before


# --- drivers that die


def test_a_trial_whose_drivers_die_without_progress_fails(study: Study, database: Database) -> None:
    runs = [start_run(study, max_failures=2) for _ in range(4)]
    claim = create(study, runs[0])
    write(study, epoch_of(claim, 1, 0.5))
    for crashes in (0, 1, 2):  # the first one finished an epoch
        claim = resume(study, runs[crashes + 1], dead=[runs[crashes]])
        assert (claim.number, claim.crashes, claim.epoch) == (0, crashes, 1)
    found = scan(study, runs[0], dead=runs[1:])
    assert found.claim is None
    assert found.failed == {0: "the driver died 3 times while it trained this trial"}
    assert not found.others_are_running
    trial = study.trials()[0]
    assert trial.state == TrialState.FAIL
    reason = "the driver died 3 times while it trained this trial (max_failures 2)"
    assert trial.user_attrs == {"fail_reason": reason}
    assert sql(database, "SELECT run, crashes FROM hpo_trials") == [(runs[3].run_id, 3)]
    assert sql(database, f"SELECT token FROM hpo_trials WHERE token <> {claim.token}"), "a retry must know this failure"
    before = dump(database)
    assert scan(study, runs[0], dead=runs[1:]) == Scan(None, keys=1)
    assert dump(database) == before


def test_a_trial_that_makes_progress_survives_any_number_of_deaths(study: Study) -> None:
    last = start_run(study, max_failures=0)
    claim = create(study, last)
    for epoch in range(1, 6):
        write(study, epoch_of(claim, epoch, epoch / 8))
        run = start_run(study, max_failures=0)
        claim = resume(study, run, dead=[last])
        assert (claim.crashes, claim.epoch) == (0, epoch)
        last = run
    assert scan(study, start_run(study, max_failures=0), dead=[last]).failed == {
        0: "the driver died 1 times while it trained this trial"
    }


def test_a_trial_that_is_given_back_counts_no_crash(study: Study, database: Database) -> None:
    run, other = start_run(study, max_failures=0), start_run(study, max_failures=0)
    claim = create(study, run)
    for _ in range(3):
        reporting.release(database, claim)
        claim = resume(study, run)
    with database.engine.begin() as connection:  # as a driver does that ends without the trial's release
        connection.execute(tables.runs.update().where(tables.runs.c.run == run.run_id).values(ended=1.0))
    assert resume(study, other, dead=[run]).crashes == 0


def test_trials_that_killed_nobody_are_claimed_first(study: Study) -> None:
    """Then those with results, then the older ones. A death that this claim discovers counts at once."""
    dead, run = start_run(study), start_run(study)
    claims = [create(study, run, number) for number in range(6)]
    write(study, epoch_of(claims[1], 1, 0.5), epoch_of(claims[4], 1, 0.5))
    reporting.count_crashes(study.database, claims[0], 1)
    reporting.count_crashes(study.database, claims[1], 2)
    reporting.release(study.database, claims[5])
    assert resume(study, dead).number == 5
    for claim in claims[:5]:
        reporting.release(study.database, claim)
    own: list[int] = []
    order = []
    while (found := scan(study, run, dead=[dead], own=own).claim) is not None:
        own.append(found.token)
        order.append((found.number, found.crashes, found.epoch))
    assert order == [(4, 0, 1), (2, 0, 0), (3, 0, 0), (0, 1, 0), (5, 1, 0), (1, 2, 1)]


def test_a_trial_of_a_claim_that_failed_is_claimed_again_by_its_run(study: Study) -> None:
    """The answer to a claim was lost, and the retries ended: its token is not among those of the run's claims."""
    run = start_run(study)
    claim = create(study, run)
    assert scan(study, run, own=[claim.token]).claim is None
    again = resume(study, run)
    assert (again.trial_id, again.crashes) == (claim.trial_id, 0)


@pytest.mark.parametrize("ending", ["complete", "release", "report"])
def test_what_a_run_writes_while_it_is_taken_over_stands(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """On SQLite no run can write then. On PostgreSQL it can, before the take-over locks its trial."""
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    dead, run = start_run(study), start_run(study)
    claim = create(study, dead)
    unfinished = claims._unfinished

    def written_meanwhile(*args: Any) -> list[Any]:
        rows = unfinished(*args)
        if ending == "release":
            reporting.release(database, claim)
        else:
            state = TrialState.COMPLETE if ending == "complete" else None
            update = TrialUpdate(claim, 1, {"m": 0.5}, 0.5, final_state=state)
            reporting.write(database, study.key, [update], pruner=None, ending=(), device_seconds={})
        return rows

    monkeypatch.setattr(claims, "_unfinished", written_meanwhile)
    found = scan(study, run, dead=[dead]).claim
    if ending == "report":
        assert found is not None
        assert (found.epoch, found.crashes) == (1, 0), "it has just finished an epoch"
        assert sql(database, "SELECT claimed_epoch FROM hpo_trials") == [(1,)]
    else:
        assert found is None
        assert trial_states(study) == ["COMPLETE" if ending == "complete" else "WAITING"]


def test_a_trial_that_another_program_ends_while_it_is_claimed_stays_ended(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SQLite no program can write then. On PostgreSQL optuna-dashboard can, between the scan and the claim."""
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    run = start_run(study)
    first, second = create(study, run, 0), create(study, run, 1)
    for claim in (first, second):
        write(study, epoch_of(claim, 1, 0.5))
        reporting.release(database, claim)
    unfinished = claims._unfinished

    def ended_meanwhile(*args: Any) -> list[Any]:
        rows = unfinished(*args)
        database.optuna_storage.set_trial_state_values(first.trial_id, TrialState.COMPLETE, [5.0])
        return rows

    monkeypatch.setattr(claims, "_unfinished", ended_meanwhile)
    assert resume(study, run).trial_id == second.trial_id
    assert trial_states(study) == ["COMPLETE", "RUNNING"]
    assert [trial.value for trial in study.trials()] == [5.0, None]


def test_after_it_has_waited_for_a_trial_a_transaction_sees_what_was_stored_meanwhile(
    study: Study, database: Database
) -> None:
    """As when the server still stores the last epoch of a driver that has died."""
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    claim = create(study, start_run(study))
    write(study, epoch_of(claim, 1, 0.5))
    seen: list[ownership.Owner] = []

    def look() -> None:
        with database.transaction() as connection:
            seen.append(ownership.owners(connection, [claim.trial_id])[claim.trial_id])

    def waits() -> bool:
        return sql(database, "SELECT count(*) FROM pg_locks WHERE NOT granted") == [(1,)]

    with database.transaction() as connection:
        ownership.owners(connection, [claim.trial_id])
        optuna_tables.write_values(connection, [(claim.trial_id, 2, 0.75)])
        thread = threading.Thread(target=look)
        thread.start()
        wait_until(waits)
    thread.join()
    assert [(each.epoch, each.last_value) for each in seen] == [(2, 0.75)]


def test_an_attribute_that_another_program_adds_while_changes_are_found_is_not_overwritten(
    study: Study, database: Database
) -> None:
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    study.set_system_attrs({"old": 1})

    def find(found: dict[str, Any]) -> dict[str, Any]:
        if "note" in found:
            return {"old": 2}
        database.optuna_storage.set_study_system_attr(study.study_id, "note", "theirs")
        return {"old": 3, "note": "ours"}

    study.change_system_attrs(find)
    found = study.system_attrs()
    assert (found["note"], found["old"]) == ("theirs", 2)


# --- epochs that are trained again


def curves(database: Database) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the values, the metrics and the rungs of all trials."""
    return (
        sql(database, "SELECT step, intermediate_value FROM trial_intermediate_values ORDER BY 1"),
        sql(database, "SELECT epoch, value FROM hpo_metrics WHERE name = 'm' ORDER BY 1"),
        sql(database, "SELECT epoch, value FROM hpo_rungs ORDER BY 1"),
    )


@pytest.mark.parametrize("is_flushed", [False, True])
def test_an_epoch_with_another_value_deletes_the_later_ones(
    study: Study, database: Database, *, is_flushed: bool
) -> None:
    with grid_run(study, pruner=ASHA) as run:
        claim = claim_point(run)
        for epoch in (1, 2, 3, 4):
            run.decide(claim, epoch, {"m": epoch / 8}, epoch / 8)
        run.release(claim)
        claim = claim_one(run)
        run.decide(claim, 1, {"m": 1 / 8}, 1 / 8)
        assert curves(database)[0] == [(epoch, epoch / 8) for epoch in (1, 2, 3, 4)], "the same value keeps them"
        run.report(claim, 2, {"m": 7 / 8}, 7 / 8)
        if is_flushed:
            run.flush()
            assert curves(database) == ([(1, 1 / 8), (2, 7 / 8)], [(1, 1 / 8), (2, 7 / 8)], [(1, 1 / 8)])
        run.decide(claim, 3, {"m": 6 / 8}, 6 / 8)
        run.decide(claim, 4, {"m": 5 / 8}, 5 / 8)
        run.complete(claim, 5 / 8)
    stored = [(1, 1 / 8), (2, 7 / 8), (3, 6 / 8), (4, 5 / 8)]
    values, metrics, rungs = curves(database)
    assert (values, metrics) == (stored, stored)
    assert rungs[-1] == (4, 5 / 8)
    assert (2, 2 / 8) not in rungs, "the abandoned attempt does not compete"


def test_the_last_epoch_competes_with_the_value_of_its_new_attempt(study: Study, database: Database) -> None:
    with grid_run(study, pruner=ASHA) as run:
        run.enqueue(POINTS, GRID)
        first = claim_one(run)
        assert run.decide(first, 1, {"m": 7 / 8, "extra": 1.0}, 7 / 8) is Decision.CONTINUE
        run.release(first)  # its checkpoint is not written yet
        first, second = claim_one(run), claim_one(run)
        assert run.decide(second, 1, {"m": 4 / 8}, 4 / 8) is Decision.END, "until then, the stored value counts"
        assert run.decide(first, 1, {"m": 1 / 8}, 1 / 8) is Decision.END, "the other trial is better"
        third = claim_one(run)
        assert run.decide(third, 1, {"m": 6 / 8}, 6 / 8) is Decision.CONTINUE, "the best of all"
        run.release(third)
    assert sorted(curves(database)[2]) == [(1, 1 / 8), (1, 4 / 8), (1, 6 / 8)]
    assert sql(database, "SELECT count(*) FROM hpo_metrics WHERE name = 'extra'") == [(0,)]


def test_an_epoch_that_another_run_stored_without_a_pruner_is_judged_by_its_own_value(
    study: Study, database: Database
) -> None:
    with grid_run(study, pruner=ASHA) as run, grid_run(study) as other:
        run.enqueue(POINTS, GRID)
        other.enqueue(POINTS, GRID)
        assert run.decide(claim_one(run), 1, {"m": 0.5}, 0.5) is Decision.CONTINUE
        claim = claim_one(other)
        for epoch, value in ((1, 0.25), (2, 0.75)):
            other.report(claim, epoch, {"m": value}, value)
        other.release(claim)
        run._queue._next_scan = 0.0
        claim = claim_one(run)
        assert claim.epoch == 2
        assert run.decide(claim, 3, {"m": 0.875}, 0.875) is Decision.END, "it was worse at epoch 1"
    assert curves(database)[2] == [(1, 0.5), (1, 0.25)]


def test_epochs_with_the_same_values_are_kept(study: Study, database: Database) -> None:
    with grid_run(study, pruner=ASHA) as run:
        claim = claim_point(run)
        for epoch in (1, 2, 3):
            run.decide(claim, epoch, {"m": 0.1 * epoch}, 0.1 * epoch)
        before = curves(database)
        run.release(claim)
        claim = claim_one(run)
        for epoch in (1, 2):
            assert run.decide(claim, epoch, {"m": 0.1 * epoch}, 0.1 * epoch) is Decision.CONTINUE
            run.flush()
            assert curves(database) == before
        assert claim.epoch == 3


def test_a_batch_that_restarts_twice_stores_the_last_attempt(study: Study, database: Database) -> None:
    with grid_run(study) as run:
        claim = claim_point(run)
        with run._writer.paused():
            for values in ([0.5, 0.25, 0.75], [0.5, 0.125, 0.25, 0.5], [0.25, 0.5]):
                for epoch, value in enumerate(values, start=1):
                    run.report(claim, epoch, {"m": value}, value)
        run.flush()
        assert claim.values == {1: 0.25, 2: 0.5}
    assert curves(database)[:2] == ([(1, 0.25), (2, 0.5)], [(1, 0.25), (2, 0.5)])


# --- a database that was replaced by an older copy


def forget_after(database: Database, epoch: int) -> None:
    """Leave the epochs of all trials as an older copy has them."""
    with database.engine.begin() as connection:
        connection.execute(sa.text(f"DELETE FROM trial_intermediate_values WHERE step > {epoch}"))
        connection.execute(sa.text(f"DELETE FROM hpo_metrics WHERE epoch > {epoch}"))


def report_after_the_copy(run: Any, claim: ClaimedTrial) -> None:
    run.report(claim, 4, {"m": 0.5}, 0.5)


def complete_after_the_copy(run: Any, claim: ClaimedTrial) -> None:
    run.complete(claim, 0.375)


def fail_after_the_copy(run: Any, claim: ClaimedTrial) -> None:
    run.fail(claim, "no")


@pytest.mark.parametrize("act", [report_after_the_copy, complete_after_the_copy, fail_after_the_copy])
def test_a_trial_whose_epochs_an_older_copy_lacks_is_given_back(
    study: Study, database: Database, act: Callable[[Any, ClaimedTrial], None]
) -> None:
    with grid_run(study) as run:
        claim = claim_point(run)
        for epoch in (1, 2, 3):
            run.report(claim, epoch, {"m": epoch / 8}, epoch / 8)
        run.flush()
        forget_after(database, 1)
        act(run, claim)
        run.flush()
        with pytest.raises(LostTrialError):
            run.report(claim, 5, {"m": 0.5}, 0.5)
        assert trial_states(study) == ["WAITING"]
        assert sql(database, "SELECT run, token FROM hpo_trials") == [(None, None)]
        run._queue._next_scan = 0.0
        again = claim_one(run)
        assert (again.number, again.values) == (0, {1: 1 / 8})
        for epoch in (2, 3):
            run.report(again, epoch, {"m": epoch / 8}, epoch / 8)
        run.complete(again, 3 / 8)
    assert study.trials()[0].intermediate_values == {1: 1 / 8, 2: 2 / 8, 3: 3 / 8}
    assert trial_states(study) == ["COMPLETE"]


@pytest.mark.parametrize("ending", ["complete", "fail"])
def test_a_trial_that_an_older_copy_shows_as_unfinished_is_claimed_again_by_its_run(
    study: Study, database: Database, ending: str
) -> None:
    with grid_run(study) as run:
        claim = claim_point(run)
        if ending == "complete":
            run.complete(claim, 0.5)
        else:
            run.fail(claim, "no")
        assert run.claim() is None  # writes the end
        with database.engine.begin() as connection:
            connection.execute(sa.text("UPDATE trials SET state = 'RUNNING', datetime_complete = NULL"))
            connection.execute(sa.text("DELETE FROM trial_values"))
        run._queue._next_scan = 0.0
        again = claim_one(run)
        assert (again.number, again.crashes) == (claim.number, 0)
        assert again.token != claim.token
        run.complete(again, 0.25)
    assert trial_states(study) == ["COMPLETE"]
    assert study.trials()[0].value == 0.25


def test_a_claim_that_could_not_be_answered_is_taken_by_the_next(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim was stored, but no retry got the answer."""
    claim_existing = claims.claim_existing
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        run.release(claim_one(run))

        def fails(*args: Any, **options: Any) -> Scan:
            claim_existing(*args, **options)
            raise StorageError("the database is away")

        with monkeypatch.context() as patch:
            patch.setattr(claims, "claim_existing", fails)
            with pytest.raises(StorageError):
                run.claim()
        assert trial_states(study) == ["RUNNING"]
        run._queue._next_scan = 0.0
        assert claim_one(run).number == 0


# --- clocks


class Clock:
    """The database's clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000_000.0
        monkeypatch.setattr(Database, "now_seconds", lambda _: sa.literal(self.now, sa.Float))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def far_scan(study: Study, run: RunKey) -> Scan:
    """Claim a trial that exists. All other runs are on other machines."""
    token = ownership.new_token()
    return claims.claim_existing(study.database, run, token, own_tokens={token}, is_run_dead=lambda _: None)


def renew(database: Database, *runs: RunKey) -> None:
    for run in runs:
        with database.transaction() as connection:
            ownership.renew_lease(connection, database, run)


@pytest.mark.parametrize("is_alive", [False, True])
def test_after_the_clock_was_set_back_a_lease_in_the_far_future_expires_after_the_grace_period(
    study: Study, database: Database, clock: Clock, *, is_alive: bool
) -> None:
    own, far = start_run(study), start_run(study)
    create(study, far)
    clock.now += 50
    renew(database, own, far)
    clock.now -= 3600
    for _ in range(6):  # a lease period of 60 s
        assert far_scan(study, own).claim is None
        clock.now += 10
        if is_alive:
            renew(database, far)
    found = far_scan(study, own)
    assert (found.claim is None) == is_alive
    assert found.others_are_running == is_alive


def test_a_run_that_was_suspended_past_its_lease_takes_nothing_for_one_period(
    study: Study, database: Database, clock: Clock
) -> None:
    own, far = start_run(study), start_run(study)
    create(study, far)
    clock.now += 3600
    taken_after = 0.0
    while far_scan(study, own).claim is None:
        clock.now += 10
        taken_after += 10
    assert taken_after == own.lease_seconds
