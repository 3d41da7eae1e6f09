"""One behaviour suite, run against SQLite and against PostgreSQL."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import optuna
import psutil
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution

from storage import runs, studies, writer
from storage.database import Database, StorageError, open_database
from storage.run import Draw, Run
from storage.studies import Study, find_study, open_study
from storage.writer import LostTrialError

GRID = {"a": CategoricalDistribution([1, 2]), "b": CategoricalDistribution(["x", "y"])}
POINTS = [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y")]


def config_key(params: Any) -> str:
    return repr(sorted(params.items()))


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with open_database(url) as opened:
        yield opened


def open_s(database: Database) -> Study:
    return open_study(database, "s", direction="maximize", fingerprint="f", settings={"metric": "m"})


@pytest.fixture
def study(database: Database) -> Study:
    return open_s(database)


def grid_run(study: Study, **options: Any) -> Run:
    return Run(study, config_key=config_key, provenance={"code": "test"}, **options)


def draw_both(trial: optuna.Trial) -> str:
    trial.suggest_float("x", 0, 1)
    trial.suggest_int("n", 1, 3)
    return ""


def sampled_run(study: Study, draw: Draw = draw_both, **options: Any) -> Run:
    return grid_run(study, draw=draw, **options)


def die(run: Run) -> None:
    """Leave a run as kill -9 leaves it: nothing is said, and its process is another one from now on."""
    run._ended.set()
    run._writer.close()
    table = runs.tables.runs
    with run.database.engine.begin() as connection:
        connection.execute(table.update().where(table.c.run == run.run_id).values(process_started=0.0))


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.trials()]


def sql(database: Database, query: str) -> list[tuple[Any, ...]]:
    with database.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(query))]


# --- studies and revisions


def test_the_same_fingerprint_opens_the_same_study_and_another_one_a_new_revision(database: Database) -> None:
    def open_with(fingerprint: str) -> Study:
        return open_study(database, "s", direction="maximize", fingerprint=fingerprint, settings={"metric": "m"})

    first, again, changed = open_with("f"), open_with("f"), open_with("g")
    assert (first.study, first.name) == (again.study, "s")
    assert changed.name == "s@2"
    assert open_with("f").name == "s"
    assert open_with("h").name == "s@3"
    assert first.unique_name != changed.unique_name
    latest = find_study(database, "s")
    assert latest is not None
    assert latest.name == "s@3"
    older = find_study(database, "s@2")
    assert older is not None
    assert older.study == changed.study
    assert find_study(database, "t") is None


def test_a_study_of_another_program_is_left_alone(database: Database) -> None:
    foreign = optuna.create_study(storage=database.optuna_storage, study_name="s")
    foreign.add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(StorageError, match="was made by another program; rename"):
        open_study(database, "s", direction="maximize", fingerprint="f", settings={})


def test_a_study_whose_creator_died_half_way_is_completed(database: Database) -> None:
    optuna.create_study(storage=database.optuna_storage, study_name="s", direction="maximize")
    study = open_study(database, "s", direction="maximize", fingerprint="f", settings={"metric": "m"})
    assert study.name == "s"
    assert study.optuna_study.user_attrs["hpo:fingerprint"] == "f"


# --- grids


def test_a_grid_is_given_out_point_by_point_and_ends(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        given = []
        while (claim := run.claim()) is not None:
            given.append(claim.params)
            run.report(claim, 1, {"m": 0.5}, 0.5)
            run.complete(claim, 0.5)
        assert run.finished
    assert given == POINTS
    assert states(study) == ["COMPLETE"] * 4


def test_a_grid_enqueued_again_and_extended_gets_only_what_it_lacks(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:3], GRID)
        first = [run.claim(), run.claim()]
        run.enqueue(POINTS, GRID)
        rest = [run.claim(), run.claim(), run.claim()]
    assert [claim and claim.params for claim in [*first, *rest]] == [*POINTS, None]
    assert study.attrs["hpo:points"] == 4
    assert [trial.params for trial in study.trials()] == POINTS


def test_a_point_whose_maker_died_before_it_had_said_whose_it_is_is_run_once(study: Study, database: Database) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        run.claim()
    with database.engine.begin() as connection:  # its maker died between Optuna's table and ours
        connection.execute(sa.text("DELETE FROM hpo_trials"))
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        given = [run.claim() for _ in range(5)]
    assert [claim and claim.params for claim in given] == [*POINTS, None]
    assert len(study.trials()) == len(sql(database, "SELECT * FROM hpo_trials")) == 4


def test_a_grid_of_thousands_is_no_heavier_than_a_small_one(study: Study, database: Database) -> None:
    values = list(range(20_000))
    with grid_run(study) as run:
        run.enqueue([{"a": a} for a in values], {"a": CategoricalDistribution(values)})
        assert study.trials() == [], "nothing is written of what nobody works on"
        claim = run.claim()
    assert claim is not None
    assert claim.params == {"a": 0}


# --- reports and states


def test_every_metric_of_every_epoch_is_stored_and_may_be_stored_again(study: Study, database: Database) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        claim = run.claim()
        assert claim is not None
        for epoch in (1, 2, 2):
            run.report(claim, epoch, {"m": epoch / 10, "loss": math.nan, "huge": math.inf}, epoch / 10)
        run.complete(claim, 0.2, {"test_accuracy": 0.3})
    trial = study.trials()[0]
    assert trial.intermediate_values == {1: 0.1, 2: 0.2}
    assert trial.value == 0.2
    assert trial.user_attrs["test_accuracy"] == 0.3
    rows = sql(database, "SELECT epoch, name, value FROM hpo_metrics ORDER BY epoch, name")
    assert rows == [
        (epoch, name, value)
        for epoch in (1, 2)
        for name, value in (("huge", math.inf), ("loss", None), ("m", epoch / 10))
    ]
    assert math.isnan(study.metrics()[0][1]["loss"])


def test_nothing_told_is_lost_between_the_one_who_tells_and_the_one_who_writes(
    study: Study, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "GATHER_SECONDS", 0.0)
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        claim = run.claim()
        assert claim is not None
        for epoch in range(1, 1001):
            run.report(claim, epoch, {"m": 0.5}, 0.5)
            if epoch % 100 == 0:
                run.flush()
    assert sql(database, "SELECT count(*) FROM hpo_metrics") == [(1000,)]
    assert len(study.trials()[0].intermediate_values) == 1000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.25])
def test_intermediate_values_are_what_optuna_reads(study: Study, value: float) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        claim = run.claim()
        assert claim is not None
        run.report(claim, 1, {"m": value}, value)
    assert repr(study.trials()[0].intermediate_values) == repr({1: value})


def test_what_could_not_be_written_is_kept_for_the_next_try(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        claim = run.claim()
        assert claim is not None
        with monkeypatch.context() as patch:

            def full(*_: Any) -> None:
                raise StorageError("the disk is full")

            patch.setattr(writer, "retry_while_down", full)
            run.report(claim, 1, {"m": 0.5}, 0.5)
            with pytest.raises(StorageError, match="disk is full"):
                run.flush()
        run.complete(claim, 0.5)
    assert states(study) == ["COMPLETE"]
    assert study.trials()[0].intermediate_values == {1: 0.5}


def test_states_are_exact(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claims = [claim for _ in range(4) if (claim := run.claim()) is not None]
        for claim in claims:
            run.report(claim, 1, {"m": 0.1}, 0.1)
            run.report(claim, 2, {"m": 0.2}, 0.2)
        run.complete(claims[0], 0.2)
        run.prune(claims[1])
        run.fail(claims[2], "m is nan after epoch 2", "Traceback ...")
        run.release(claims[3])
    trials = study.trials()
    assert states(study) == ["COMPLETE", "PRUNED", "FAIL", "WAITING"]
    assert trials[1].value == 0.2
    assert all(trial.intermediate_values == {1: 0.1, 2: 0.2} for trial in trials)
    assert trials[2].user_attrs == {"fail_reason": "m is nan after epoch 2", "traceback": "Traceback ..."}


def test_an_ending_told_twice_is_told_once(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        claim = run.claim()
        assert claim is not None
        run.complete(claim, 0.5)
        run.complete(claim, 0.5)  # the answer to the first was lost with the connection
    assert states(study) == ["COMPLETE"]


# --- death, leases and takeover


def test_a_dead_runs_trials_go_on_from_what_they_reported(study: Study) -> None:
    dead = grid_run(study).__enter__()
    dead.enqueue(POINTS[:2], GRID)
    done, cut = dead.claim(), dead.claim()
    assert done is not None
    assert cut is not None
    dead.report(done, 1, {"m": 0.9}, 0.9)
    dead.complete(done, 0.9)
    dead.report(cut, 1, {"m": 0.1}, 0.1)
    dead.flush()
    die(dead)
    assert states(study) == ["COMPLETE", "RUNNING"]
    with grid_run(study) as run:
        claim = run.claim()
        assert claim is not None
        assert (claim.number, claim.params, claim.epoch, claim.values) == (1, POINTS[1], 1, {1: 0.1})
        run.complete(claim, 0.1)
        assert run.claim() is None
        assert run.finished
    assert states(study) == ["COMPLETE", "COMPLETE"]


def test_interrupted_trials_are_taken_before_fresh_ones(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        claims = [run.claim(), run.claim()]
        assert claims[1] is not None
        run.report(claims[1], 1, {"m": 0.1}, 0.1)
        for claim in claims:
            assert claim is not None
            run.release(claim)
        first = run.claim()
    assert first is not None
    assert first.number == 1


def test_a_living_runs_trials_are_not_taken_and_its_end_is_waited_for(study: Study) -> None:
    with grid_run(study) as one, grid_run(study) as two:
        one.enqueue(POINTS[:1], GRID)
        claim = one.claim()
        assert claim is not None
        assert two.claim() is None
        assert not two.finished
        one.complete(claim, 0.5)
        one.flush()
        assert two.claim() is None
        assert two.finished


def test_a_run_on_another_machine_is_believed_until_its_lease_is_over(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runs, "host", lambda: "another machine")
        far = grid_run(study, lease_seconds=2.0).__enter__()
    far.enqueue(POINTS[:1], GRID)
    claim = far.claim()
    assert claim is not None
    with grid_run(study) as run:
        time.sleep(3.0)
        assert run.claim() is None, "its lease is renewed while it lives"
        far._ended.set()  # it dies
        deadline = time.monotonic() + 10
        while (taken := run.claim()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert taken.number == claim.number
        far.report(claim, 1, {"m": 0.1}, 0.1)  # it has not heard yet
        far.flush()
        with pytest.raises(LostTrialError):
            far.report(claim, 2, {"m": 0.1}, 0.1)
        with pytest.raises(LostTrialError):
            far.should_prune(claim)
        with pytest.raises(LostTrialError):
            far.complete(claim, 0.1)
        far.release(claim)  # says nothing, changes nothing
        run.report(taken, 1, {"m": 0.2}, 0.2)
        run.complete(taken, 0.2)
    trial = study.trials()[0]
    assert (trial.state.name, trial.value) == ("COMPLETE", 0.2)


def test_after_an_outage_the_others_may_renew_their_lease_first(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runs, "host", lambda: "another machine")
        far = grid_run(study).__enter__()
    far.enqueue(POINTS[:1], GRID)
    assert far.claim() is not None
    with grid_run(study, lease_seconds=3.0) as run:
        with run.database.engine.begin() as connection:  # what a long outage leaves: every lease has run out
            connection.execute(sa.text("UPDATE hpo_runs SET lease_until = 0"))
        time.sleep(1.0)  # this run's own renewal, the first after the outage
        assert run.claim() is None
        time.sleep(4.0)  # and still no word from the other
        assert run.claim() is not None
    far._ended.set()


@pytest.mark.parametrize("learns", [True, False])
def test_a_trial_made_by_a_run_that_died_asking_is_not_lost(study: Study, learns: bool) -> None:
    with sampled_run(study, max_trials=2, learns=learns) as run:
        study.optuna_study.ask()  # an empty RUNNING trial that belongs to nobody
        claims = [run.claim(), run.claim()]
        assert run.claim() is None
    assert [claim.number for claim in claims if claim is not None] == [0, 1]
    assert all(claim is not None and set(claim.params) == {"x", "n"} for claim in claims)


def test_a_trial_whose_maker_died_while_drawing_is_drawn_to_the_end(study: Study) -> None:
    half = study.optuna_study.ask()
    half.suggest_float("x", 0, 1)  # and kill -9 before "n"
    with sampled_run(study, max_trials=1) as run:
        claim = run.claim()
    assert claim is not None
    assert claim.number == half.number
    assert claim.params["x"] == half.params["x"]
    assert claim.params["n"] in {1, 2, 3}


def test_a_driver_that_died_but_was_not_reaped_is_dead(study: Study) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    started = psutil.Process(dead.pid).create_time()
    while psutil.Process(dead.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with grid_run(study) as zombie, grid_run(study) as run:
        zombie.enqueue(POINTS[:1], GRID)
        assert zombie.claim() is not None
        table = runs.tables.runs
        with run.database.engine.begin() as connection:
            connection.execute(
                table.update().where(table.c.run == zombie.run).values(pid=dead.pid, process_started=started)
            )
        assert run.claim() is not None
    dead.wait()


def test_a_claim_whose_answer_was_lost_is_claimed_again(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        first = run.claim()
        run._held.clear()  # the run never heard of it
        assert run.claim() == first


def test_crashes_are_counted_over_runs(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        claim = run.claim()
        assert claim is not None
        run.record_crash(claim)
        run.release(claim)
    with grid_run(study) as run:
        claim = run.claim()
        assert claim is not None
        assert claim.crashes == 1


# --- several runs, budgets, sampling


def test_four_runs_share_a_grid_without_a_duplicate(url: str, study: Study) -> None:
    points = [{"a": a} for a in range(40)]
    distributions = {"a": CategoricalDistribution(list(range(40)))}
    given: list[int] = []
    errors: list[BaseException] = []

    def drive() -> None:
        try:
            with open_database(url) as database, grid_run(open_s(database)) as run:
                run.enqueue(points, distributions)
                while (claim := run.claim()) is not None or not run.finished:
                    if claim is not None:
                        given.append(claim.params["a"])
                        run.report(claim, 1, {"m": 0.5}, 0.5)
                        run.complete(claim, 0.5)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(given) == list(range(40))
    assert Counter(states(study)) == {"COMPLETE": 40}


@pytest.mark.parametrize("learns", [True, False])
def test_runs_share_the_budget_of_trials(study: Study, learns: bool) -> None:
    options = {"max_trials": 5, "learns": learns}
    with sampled_run(study, **options) as one, sampled_run(study, **options) as two:
        claims = [run.claim() for _ in range(4) for run in (one, two)]
    assert sum(claim is not None for claim in claims) == 5
    assert len({config_key(claim.params) for claim in claims if claim is not None}) == 5


def test_no_configuration_is_given_out_twice_and_an_exhausted_space_ends(study: Study) -> None:
    study.optuna_study.sampler = optuna.samplers.RandomSampler(seed=0)

    def draw(trial: optuna.Trial) -> str:
        trial.suggest_int("n", 1, 3)
        return ""

    with sampled_run(study, draw, max_trials=50) as run:
        given = []
        while (claim := run.claim()) is not None:
            given.append(claim.params["n"])
            run.complete(claim, 0.5)
        assert run.finished
        assert "tried before" in run.exhausted
    assert sorted(given) == [1, 2, 3]
    duplicates = [trial for trial in study.trials() if trial.state.name == "FAIL"]
    assert all("duplicate" in trial.user_attrs["fail_reason"] for trial in duplicates)
    assert duplicates, "three values drawn at random until none is new"
    assert study.count_ended() == 3


def draw_conditionally(trial: optuna.Trial) -> str:
    """`m` is there only with `a`; below one half it is refused."""
    if trial.suggest_categorical("kind", ["a", "b"]) == "a":
        return "" if trial.suggest_float("m", 0, 1) >= 0.5 else "m >= 0.5"
    return ""


def test_a_draw_that_breaks_a_constraint_is_never_given_out_and_counts_for_nothing(study: Study) -> None:
    study.optuna_study.sampler = optuna.samplers.RandomSampler(seed=1)
    with sampled_run(study, draw_conditionally, max_trials=8) as run:
        given = []
        while (claim := run.claim()) is not None:
            given.append(claim.params)
            run.complete(claim, 0.5)
    assert all(params["kind"] == "b" or params["m"] >= 0.5 for params in given)
    assert {"kind": "b"} in given, "what is inactive is absent"
    refused = [trial for trial in study.trials() if trial.user_attrs.get("fail_reason") == "breaks a constraint"]
    assert refused, "half of the draws of m"
    assert all(trial.state.name == "FAIL" and trial.params["m"] < 0.5 for trial in refused)
    assert {trial.user_attrs["constraint"] for trial in refused} == {"m >= 0.5"}
    assert study.count_ended() == len(study.run_trials()) == len(given)


def test_conditional_trials_whose_maker_died_are_drawn_to_the_end_and_checked(study: Study) -> None:
    """Whole or half-made: what a dead run left of a draw is taken up where it stood."""
    kind, m = CategoricalDistribution(["a", "b"]), FloatDistribution(0, 1)
    study.optuna_study.enqueue_trial({"kind": "a", "m": 0.25})
    study.optuna_study.ask({"kind": kind, "m": m})  # whole, but not to be run
    study.optuna_study.enqueue_trial({"kind": "a", "m": 0.75})
    study.optuna_study.ask({"kind": kind, "m": m})  # whole
    study.optuna_study.enqueue_trial({"kind": "b"})
    study.optuna_study.ask({"kind": kind})  # whole: `m` is inactive
    study.optuna_study.enqueue_trial({"kind": "a", "m": 0.5})
    study.optuna_study.ask({"kind": kind})  # and kill -9 before `m`
    with sampled_run(study, draw_conditionally, max_trials=3) as run:
        claims = [run.claim() for _ in range(4)]
    assert [claim and (claim.number, claim.params) for claim in claims] == [
        (1, {"kind": "a", "m": 0.75}),
        (2, {"kind": "b"}),
        (3, {"kind": "a", "m": 0.5}),
        None,
    ]
    assert study.trials()[0].user_attrs["fail_reason"] == "breaks a constraint"


def test_a_sampler_that_is_sure_of_a_refused_point_does_not_end_the_search(study: Study) -> None:
    class Stubborn(optuna.samplers.RandomSampler):
        def sample_independent(self, *_: Any) -> float:
            return 0.25

    study.optuna_study.sampler = Stubborn()

    def draw(trial: optuna.Trial) -> str:
        return "" if trial.suggest_float("m", 0, 1) > 0.5 else "m > 0.5"

    with sampled_run(study, draw, max_trials=3) as run:
        claims = [run.claim() for _ in range(3)]
    assert all(claim is not None and claim.params["m"] > 0.5 for claim in claims)
    assert len({claim.params["m"] for claim in claims if claim is not None}) == 3
    assert isinstance(study.optuna_study.sampler, Stubborn)
    assert sum(trial.params["m"] == 0.25 for trial in study.trials()) == 3 * runs.MAX_STUBBORN


def test_a_space_that_refuses_every_draw_ends_and_says_so(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_REJECTED", 7)
    with sampled_run(study, lambda _: "never") as run, sampled_run(study, lambda _: "never") as other:
        assert run.claim() is None
        assert run.finished
        assert run.exhausted == "7 draws in a row broke a constraint"
        assert run.claim() is None
        assert len(study.trials()) == 7, "it is not tried again"
        assert other.claim() is None
    assert study.run_trials() == []


def test_a_trial_enqueued_through_optuna_is_run(study: Study) -> None:
    study.optuna_study.enqueue_trial({"x": 0.25, "n": 2})
    with sampled_run(study, max_trials=1) as run:
        claim = run.claim()
    assert claim is not None
    assert claim.params == {"x": 0.25, "n": 2}


def test_time_is_counted_over_runs_and_once_for_runs_side_by_side(study: Study, database: Database) -> None:
    with grid_run(study) as run:
        for started, last_heard in ((0.0, 10.0), (5.0, 12.0), (100.0, 103.0)):
            with database.engine.begin() as connection:
                connection.execute(
                    sa.text(
                        "INSERT INTO hpo_runs (study, host, pid, process_started, started, last_heard, lease_until,"
                        " provenance) VALUES (:study, 'h', 1, 0, :started, :last_heard, 0, '{}')"
                    ),
                    {"study": study.study_id, "started": started, "last_heard": last_heard},
                )
        assert run.elapsed_seconds() == pytest.approx(15.0, abs=1.0)


def test_provenance_of_run_and_trial_are_read_together(study: Study) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        claim = run.claim()
        assert claim is not None
        run.record(claim, {}, {"device": "cpu", "threads": 2})
        run.complete(claim, 0.5)
    assert study.provenance(0) == {"code": "test", "device": "cpu", "threads": 2}


# --- a line on each study


def test_a_study_is_running_then_resumable_then_finished(study: Study, database: Database) -> None:
    def line() -> studies.Summary:
        (summary,) = studies.summarize(database)
        return summary

    assert (line().state, line().counts, line().best, line().last_activity) == ("resumable", {}, None, None)
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        assert line().state == "running"
        claim = run.claim()
        assert claim is not None
        run.complete(claim, 0.25)
        run.flush()
        assert (line().counts, line().best) == ({"COMPLETE": 1}, 0.25)
    assert line().state == "resumable"
    with grid_run(study) as run:
        run.enqueue(POINTS, GRID)
        while claim := run.claim():
            run.complete(claim, 0.5)
    assert (line().state, line().counts, line().best, line().metric) == ("finished", {"COMPLETE": 4}, 0.5, "m")
    last = line().last_activity
    assert last is not None
    assert abs(last - time.time()) < 60


def test_a_study_whose_run_was_killed_is_resumable_at_once(study: Study, database: Database) -> None:
    run = grid_run(study)
    run.__enter__()
    run.enqueue(POINTS, GRID)
    assert run.claim() is not None
    assert studies.summarize(database)[0].state == "running"
    die(run)
    assert studies.summarize(database)[0].state == "resumable"


def test_a_sampled_study_is_finished_when_its_budget_of_trials_is(database: Database) -> None:
    settings = {"metric": "m", "sampler": {"name": "random"}, "budget": {"trials": 2}}
    study = open_study(database, "s", direction="minimize", fingerprint="f", settings=settings)
    states = []
    with sampled_run(study) as run:
        for value in (0.5, 0.25):
            claim = run.claim()
            assert claim is not None
            run.complete(claim, value)
            run.flush()
            states.append(studies.state_of(study.attrs, studies.summarize(database)[0].counts, []))
    assert states == ["resumable", "finished"]
    assert studies.summarize(database)[0].best == 0.25


def test_a_duplicate_is_not_counted_as_a_failure(study: Study, database: Database) -> None:
    with grid_run(study) as run:
        run.enqueue(POINTS[:1], GRID)
        while claim := run.claim():
            run.complete(claim, 0.5)
    add_duplicate = optuna.trial.create_trial(
        state=optuna.trial.TrialState.FAIL, user_attrs={"fail_reason": studies.DUPLICATE}
    )
    study.optuna_study.add_trial(add_duplicate)
    assert studies.summarize(database)[0].counts == {"COMPLETE": 1}


def test_a_study_of_another_program_has_no_state(database: Database) -> None:
    foreign = optuna.create_study(
        study_name="theirs", storage=database.optuna_storage, directions=["minimize", "maximize"]
    )
    foreign.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    endless = optuna.create_study(study_name="endless", storage=database.optuna_storage, direction="maximize")
    endless.add_trial(optuna.trial.create_trial(value=math.inf))
    line, infinite = studies.summarize(database)
    assert (line.name, line.state, line.counts, line.best) == ("theirs", "", {"COMPLETE": 1}, None)
    assert line.last_activity is not None
    assert infinite.best is None
