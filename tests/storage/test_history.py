"""The history that TPE reads: all of a small study; of a large one the best trials, and the same sample in every process."""

from __future__ import annotations

import math
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.search_space.group_decomposed import _GroupDecomposedSearchSpace
from optuna.trial import FrozenTrial, TrialState, create_trial

from storage import history as history_module
from storage import optuna_internals, optuna_tables
from storage.database import Database, open_database
from storage.history import MIN_LIMIT, History
from storage.promotion import PromotingHalving
from storage.pruners import Decision
from storage.studies import find_study, open_study
from storage.study import Study
from tests.factories import after_statement
from tests.storage.builders import claim_one, open_s, sampled_run

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING
SPACE: dict[str, BaseDistribution] = {
    "x": FloatDistribution(0.0, 1.0),
    "kind": CategoricalDistribution(["a", "b"]),
    "n": IntDistribution(1, 64, log=True),
}
FINISHED = (COMPLETE, PRUNED)


def fraction(number: int) -> float:
    return number * 0.7548776662 % 1


def draw(trial: optuna.Trial) -> None:
    """A conditional space."""
    trial.suggest_float("x", 0.0, 1.0)
    if trial.suggest_categorical("kind", ["a", "b"]) == "a":
        trial.suggest_int("n", 1, 64, log=True)


def mixed(count: int, names: Iterable[str] = ("x", "kind", "n"), start: int = 0) -> list[FrozenTrial]:
    """Build trials of all states; few are COMPLETE. Values repeat, and some are not finite."""
    trials = []
    for number in range(start, start + count):
        part = fraction(number)
        params = {"x": part, "kind": "ab"[number % 2], "n": 1 + number % 64}
        state = [COMPLETE, PRUNED, PRUNED, FAIL, PRUNED, RUNNING, PRUNED, WAITING][number % 8]
        if state in {RUNNING, WAITING} and number % 64 > 8:
            state = PRUNED
        if state == COMPLETE and number % 32:
            state = PRUNED
        values = {epoch: round(part, 1) + epoch for epoch in range(1, 2 + number % 5)} if number % 7 else {}
        if number % 31 == 1:
            values[max(values, default=1)] = [math.nan, math.inf, -math.inf][number % 3]
        final = {COMPLETE: [round(part, 1), math.inf, -math.inf, 0.5][number // 32 % 4]}.get(state)
        if state == PRUNED and values and not math.isnan(list(values.values())[-1]):
            final = list(values.values())[-1]
        shown = {name: params[name] for name in names if name != "n" or params["kind"] == "a"}
        trials.append(
            create_trial(
                state=state,
                value=final,
                params=shown,
                distributions={name: SPACE[name] for name in shown},
                intermediate_values=values,
            )
        )
    return trials


def completed(count: int) -> list[FrozenTrial]:
    numbers = range(count)
    return [
        create_trial(value=fraction(number), params={"x": fraction(number)}, distributions={"x": SPACE["x"]})
        for number in numbers
    ]


def insert(study: Study, trials: list[FrozenTrial], start: int = 0) -> None:
    """Store trials in bulk. Their numbers count from `start`."""
    table, connect = optuna_tables.trials, study.database.engine.begin
    of_study = table.c.study_id == study.study_id
    with connect() as connection:
        connection.execute(
            table.insert(),
            [
                {"number": number, "study_id": study.study_id, "state": trial.state}
                for number, trial in enumerate(trials, start)
            ],
        )
        ids = {row.number: row.trial_id for row in connection.execute(sa.select(table).where(of_study))}
        rows: dict[sa.Table, list[dict[str, Any]]] = {}
        for number, trial in enumerate(trials, start):
            of_trial = {"trial_id": ids[number]}
            if trial.value is not None:
                kind = {math.inf: "INF_POS", -math.inf: "INF_NEG"}.get(trial.value, "FINITE")
                stored = trial.value if kind == "FINITE" else None
                rows.setdefault(optuna_tables.trial_values, []).append(
                    of_trial | {"objective": 0, "value": stored, "value_type": kind}
                )
            for name, value in trial.params.items():
                distribution = trial.distributions[name]
                rows.setdefault(optuna_tables.trial_params, []).append(
                    of_trial
                    | {"param_name": name, "param_value": distribution.to_internal_repr(value)}
                    | {"distribution_json": distribution_to_json(distribution)}
                )
            for epoch, value in trial.intermediate_values.items():
                stored, kind = optuna_tables.encode_intermediate_value(value)
                rows.setdefault(optuna_tables.intermediate_values, []).append(
                    of_trial | {"step": epoch, "intermediate_value": stored, "intermediate_value_type": kind}
                )
        for target, values in rows.items():
            connection.execute(target.insert(), values)


def refreshed(study: Study, limit: int = MIN_LIMIT) -> History:
    history = History(study, limit)
    history.refresh()
    return history


def numbers(history: History) -> list[int]:
    return [trial.number for trial in history.trials()]


def best_numbers(study: Study, trials: list[FrozenTrial]) -> list[int]:
    finished = sum(trial.state in FINISHED for trial in trials)
    return [each.number for each in _split_trials(study.optuna_study, trials, default_gamma(finished))[0]]


def all_trials(study: Study, *states: TrialState) -> list[FrozenTrial]:
    return study.database.optuna_storage.get_all_trials(study.study_id, states=states or None)


@pytest.mark.exhaustive(on="postgresql")
@pytest.mark.parametrize(
    ("options", "draw_trial"),
    [
        ({}, lambda trial: [trial._suggest(name, each) for name, each in SPACE.items()]),
        ({"constant_liar": False, "n_startup_trials": 0}, draw),
        ({"group": True}, draw),
        ({"multivariate": False}, draw),
    ],
    ids=["all", "no liar", "group", "one by one"],
)
def test_below_the_limit_tpe_draws_as_without_a_history(
    study: Study, options: dict[str, Any], draw_trial: Callable[[optuna.Trial], None]
) -> None:
    other = open_study(study.database, "other", direction="maximize", fingerprint="f", settings={"metric": "m"})
    before = mixed(60, names=SPACE)
    for each in (study, other):
        insert(each, before)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            each.optuna_study.sampler = TPESampler(seed=5, **options)
    history = History(other, MIN_LIMIT)
    optuna_internals.show_trials(other.optuna_study, history.trials)
    held: list[tuple[optuna.Trial, optuna.Trial]] = []
    for i in range(12):
        history.refresh()
        pair = new_trial(study.optuna_study), new_trial(other.optuna_study)
        history.refresh()  # Optuna's own storage shows the new trial, too
        for trial in pair:
            draw_trial(trial)
        assert pair[0].params == pair[1].params
        held.append(pair)
        if i % 2:  # two run at a time, the later one ends first
            for each, trial in zip((study, other), held.pop(), strict=True):
                each.optuna_study.tell(trial, float(i))
    sample = [trial for trial in history.trials() if trial.state == RUNNING]
    assert len(sample) > len(held), "other trials were running"


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("only_pruned", [False, True])
def test_above_the_limit_the_best_trials_are_those_of_the_whole_study(
    database: Database, direction: Any, only_pruned: bool
) -> None:
    study = open_study(database, "s", direction=direction, fingerprint="f", settings={"metric": "m"})
    trials = mixed(900)
    if only_pruned:
        trials = [trial for trial in trials if trial.state != COMPLETE]
    insert(study, trials)
    history = refreshed(study)
    whole = all_trials(study, *FINISHED)
    assert len(whole) > 2 * MIN_LIMIT
    assert len(history.trials(FINISHED)) == MIN_LIMIT
    best = best_numbers(study, whole)
    assert best_numbers(study, history.trials(FINISHED)) == best
    assert len(best) == default_gamma(len(whole)) == optuna_internals.BEST_TRIALS
    assert history.trials((FAIL,)) == []
    by_number = {trial.number: trial for trial in all_trials(study)}
    for trial in history.trials():
        expected = by_number[trial.number]
        assert trial.state == expected.state
        assert list(trial.params.items()) == list(expected.params.items())
        assert trial.distributions == expected.distributions
        assert optuna_internals.trial_id(trial) == optuna_internals.trial_id(expected)
        assert trial.value == expected.value
        last = dict([max(expected.intermediate_values.items())]) if expected.intermediate_values else {}
        assert repr(trial.intermediate_values) == repr(last if trial.state == PRUNED else {})


def test_the_limit_is_one_above_which_tpe_counts_no_more_best_trials() -> None:
    assert default_gamma(MIN_LIMIT) == default_gamma(10**6) == optuna_internals.BEST_TRIALS


def test_a_lower_limit_is_refused(study: Study) -> None:
    with pytest.raises(ValueError, match=f"at least {MIN_LIMIT}"):
        History(study, MIN_LIMIT - 1)


def test_unfinished_trials_are_current(study: Study) -> None:
    insert(study, completed(MIN_LIMIT + 50))
    history = refreshed(study)
    assert history.trials((RUNNING, WAITING)) == []
    trial = new_trial(study.optuna_study)
    study.optuna_study.enqueue_trial({"x": 0.5})
    key = f"{optuna_internals.RELATIVE_PARAMS}:0"
    storage = study.database.optuna_storage
    storage.set_trial_system_attr(optuna_internals.trial_id(trial), key, '{"x": 0.25}')
    storage.set_trial_system_attr(optuna_internals.trial_id(trial), "another", 1)
    history.refresh()
    (running,), (waiting,) = history.trials((RUNNING,)), history.trials((WAITING,))
    assert (running.number, running.params, running.system_attrs) == (trial.number, {}, {key: '{"x": 0.25}'})
    assert waiting.number == trial.number + 1
    x = trial.suggest_float("x", 0.0, 1.0)
    history.refresh()
    assert history.trials((RUNNING,))[0].params == {"x": x}
    study.optuna_study.tell(trial, 2.0)
    assert history.trials((RUNNING,)), "nothing changes between two calls of refresh"
    history.refresh()
    assert history.trials((RUNNING,)) == []
    assert [(each.params, each.value) for each in history.trials() if each.number == trial.number] == [({"x": x}, 2.0)]
    storage.set_trial_state_values(optuna_internals.trial_id(waiting), RUNNING)
    history.refresh()
    assert [each.number for each in history.trials((RUNNING,))] == [waiting.number]


def test_a_later_call_reads_only_what_ended_since(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(study, mixed(400))
    insert(study, [create_trial(state=RUNNING)], start=400)
    read: list[int] = []
    original = history_module._read_ended

    def read_ended(*arguments: Any) -> Any:
        found = original(*arguments)
        read.append(len(found))
        return found

    monkeypatch.setattr(history_module, "_read_ended", read_ended)
    history = refreshed(study)
    unfinished = len(history.trials((RUNNING, WAITING)))
    assert unfinished > 1
    insert(study, mixed(1), start=401)  # COMPLETE, like its first one
    (running,) = (trial for trial in history.trials((RUNNING,)) if trial.number == 400)
    study.database.optuna_storage.set_trial_state_values(optuna_internals.trial_id(running), COMPLETE, [0.25])
    history.refresh()
    history.refresh()
    assert read == [len(all_trials(study, *FINISHED)) - 2, 2, 0]
    assert len(history.trials((RUNNING, WAITING))) == unfinished - 1
    assert numbers(history) == numbers(refreshed(study))


def test_a_failed_trial_that_ends_after_a_retry_is_found(study: Study) -> None:
    """It was seen as ended, so neither its number nor its state says that it is new."""
    insert(study, [*completed(3), create_trial(state=FAIL), *completed(2)])
    history = refreshed(study)
    assert numbers(history) == [0, 1, 2, 4, 5]
    table = optuna_tables.trials
    with study.database.engine.begin() as connection:
        connection.execute(table.update().where(table.c.number == 3).values(state=WAITING))
    insert(study, completed(1), start=6)
    (trial,) = all_trials(study, WAITING)
    study.database.optuna_storage.set_trial_state_values(optuna_internals.trial_id(trial), COMPLETE, [0.25])
    history.refresh()
    assert numbers(history) == [0, 1, 2, 3, 4, 5, 6]


def test_a_trial_that_ends_while_it_is_read_is_shown_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(study, [*completed(3), create_trial(state=RUNNING)])
    original = history_module._read_unfinished

    def read_unfinished(*arguments: Any) -> Any:
        found = original(*arguments)
        with study.database.engine.connect():  # another connection than the reader's
            for trial_id in found:
                study.database.optuna_storage.set_trial_state_values(trial_id, COMPLETE, [0.5])
        return found

    history = History(study, MIN_LIMIT)
    with monkeypatch.context() as patch:
        patch.setattr(history_module, "_read_unfinished", read_unfinished)
        history.refresh()
    for last in (RUNNING, COMPLETE, COMPLETE):
        states = [(trial.number, trial.state) for trial in history.trials()]
        assert states == [*((number, COMPLETE) for number in range(3)), (3, last)]
        history.refresh()


def test_a_trial_that_begins_to_wait_while_it_is_read_is_shown(url: str, database: Database, study: Study) -> None:
    pruner = PromotingHalving(maximize=True, study_name="s", min_epochs=1, reduction_factor=3)
    with open_database(url) as other, sampled_run(open_s(other), pruner=pruner) as run:
        claim = claim_one(run)

        def wait() -> None:
            assert run.decide(claim, 1, {"m": 0.5}, 0.5) is Decision.WAIT
            run.release(claim)

        history = History(study, MIN_LIMIT, pruner)
        with after_statement(database, "SELECT", wait):
            history.refresh()
        assert numbers(history) == [0]


@pytest.mark.exhaustive(on="postgresql")
def test_the_sample_is_spread_evenly_and_mostly_stays_when_the_study_grows(study: Study) -> None:
    trials = completed(2000)
    insert(study, trials[:1900])
    history = refreshed(study)
    before = set(numbers(history))
    insert(study, trials[1900:], start=1900)
    history.refresh()
    after = set(numbers(history))
    assert len(before) == len(after) == MIN_LIMIT
    sampled = after - set(best_numbers(study, all_trials(study)))
    for pattern in (2, 3, 4, 8):
        parts = Counter(number % pattern for number in sampled)
        assert max(parts.values()) - min(parts.values()) < 0.35 * len(sampled) / pattern
    eighths = [sum(number // 250 == part for number in sampled) for part in range(8)]
    assert max(eighths) - min(eighths) <= 8
    assert len(after - before) < 0.15 * MIN_LIMIT


@pytest.mark.exhaustive(on="postgresql")
def test_all_groups_of_parameters_are_known(study: Study) -> None:
    trials = mixed(700)
    insert(study, trials)
    shown = numbers(refreshed(study))
    left_out = [each.number for each in all_trials(study, *FINISHED) if each.number not in shown and "n" in each.params]
    first, *others = left_out[50:60]
    stored = {"param_name": "rare", "param_value": 0.5, "distribution_json": distribution_to_json(SPACE["x"])}
    trial_ids = [optuna_internals.trial_id(trial) for trial in all_trials(study)]
    with study.database.engine.begin() as connection:
        for number in (*others, first):  # the first one by number is stored last
            connection.execute(optuna_tables.trial_params.insert(), stored | {"trial_id": trial_ids[number]})
    whole = _GroupDecomposedSearchSpace(include_pruned=True).calculate(study.optuna_study).search_spaces
    history = refreshed(study)
    assert set(numbers(history)) & set(left_out) == {first}
    optuna_internals.show_trials(study.optuna_study, history.trials)
    assert _GroupDecomposedSearchSpace(include_pruned=True).calculate(study.optuna_study).search_spaces == whole


def new_trial(study: optuna.Study) -> optuna.Trial:
    """Return a new RUNNING trial without params. `Study.ask` would read the whole study."""
    return optuna.Trial(study, study._storage.create_new_trial(study._study_id))


def _draw_in_process(url: str, count: int) -> tuple[list[int], list[float]]:
    """Return the trials that a history shows and what TPE draws from them, without writing."""
    with open_database(url) as database:
        study = find_study(database, "s")
        assert study is not None
        history = refreshed(study)
        in_memory = optuna.create_study(direction="maximize", sampler=TPESampler(seed=1))
        optuna_internals.show_trials(in_memory, history.trials)
        return numbers(history), [in_memory.ask({"x": SPACE["x"]}).params["x"] for _ in range(count)]


@pytest.mark.slow
@pytest.mark.exhaustive(on="postgresql")
def test_a_resumed_run_sees_and_draws_what_an_uninterrupted_one_does(url: str) -> None:
    with open_database(url) as database:
        study = open_s(database)
        history = History(study, MIN_LIMIT)
        trials = completed(900)
        for start in range(0, 900, 60):
            insert(study, trials[start : start + 60], start=start)
            history.refresh()
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        first, second = pool.starmap(_draw_in_process, [(url, 3)] * 2, chunksize=1)
    assert first == second == (numbers(history), second[1])
    assert len(set(first[1])) == 3


def test_other_methods_of_the_storage_are_those_of_the_study(study: Study) -> None:
    optuna_internals.show_trials(study.optuna_study, lambda states: [])
    trial = new_trial(study.optuna_study)
    trial.suggest_float("x", 0.0, 1.0)
    study.optuna_study.tell(trial, 0.5)
    assert study.optuna_study.get_trials() == []
    assert [each.params for each in all_trials(study, COMPLETE)] == [trial.params]


# --- refused draws


def draw_with_constraint(trial: optuna.Trial) -> str:
    x, y = trial.suggest_float("x", 0.0, 1.0), trial.suggest_float("y", 0.0, 1.0)
    return "" if x + y <= 0.4 else "x + y <= 0.4"


def test_refused_draws_are_shown_as_infeasible(study: Study) -> None:
    history = History(study, MIN_LIMIT)
    drafts = []
    for x in (0.25, 0.5, 0.75):
        drafts.append(create_trial(params={"x": x}, distributions={"x": SPACE["x"]}, state=RUNNING))
        history.refuse(drafts[-1])
    history.refresh()
    assert history.trials() == [], "TPE must not learn from them alone"
    with sampled_run(study) as run:
        for _ in range(4):
            run.complete(claim_one(run), 1.0)
        run.flush()
    history.refresh()
    infeasible = [trial for trial in history.trials() if trial.constraints]
    assert [trial.params for trial in infeasible] == [draft.params for draft in drafts[1:]], (
        "half as many as finished ones"
    )
    assert all(value > 0 for trial in infeasible for value in trial.constraints.values())
    assert len(history.trials()) == 6


@pytest.mark.slow
@pytest.mark.exhaustive(on="postgresql")
def test_tpe_learns_from_what_was_refused(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for learns in (True, False):
        refused: list[str] = []

        def draw_and_count(trial: optuna.Trial, refused: list[str] = refused) -> str:
            broken = draw_with_constraint(trial)
            refused += [broken] if broken else []
            return broken

        if not learns:
            monkeypatch.setattr(History, "refuse", lambda self, draft: None)
        study = open_s(database, f"learns {learns}")
        study.optuna_study.sampler = TPESampler(seed=0)
        with sampled_run(study, draw_and_count, history_limit=MIN_LIMIT) as run:
            for _ in range(40):
                claim = claim_one(run)
                run.complete(claim, -claim.params["x"] - claim.params["y"])
        counts.append(len(refused))
    assert counts[0] < counts[1] / 2
