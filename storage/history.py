"""The part of a study that Optuna's TPE sampler reads: bounded, so that a draw costs the same in a study of any size.

TPE divides the finished trials into a few of the best and the rest, and weighs every one of them for each draw. A history
shows it, of a study with more finished trials than its limit:

- the best ones: exactly those that TPE would choose from the whole study. With several objectives, TPE chooses from
  fronts: all of the fronts that it needs are shown, but of one that is larger than half of the limit only an even sample;
- the first trial with each set of parameters: TPE joins parameters into groups by those sets;
- an even sample of the rest. It depends on the numbers of the study's finished trials only, so every run of a study, also
  one that resumes, sees the same trials;
- all unfinished trials. Those that wait at a rung of successive halving are shown as pruned there, and count as finished.

It also shows the last configurations that this run drew and refused, because they break a constraint, as infeasible trials:
TPE moves away from them. They are in no database.

Below the limit it shows all trials, and TPE draws exactly as without a history. `benchmarks.tpe_history` measures what the
limit does to the results of searches. Failed trials are left out: TPE ignores them.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from storage.optuna_internals import BEST_TRIALS, DRAFT_ID, RELATIVE_PARAMS
from storage.optuna_tables import (
    UNFINISHED,
    decode_intermediate_value,
    decode_value,
    intermediate_values,
    trial_params,
    trial_system_attributes,
    trial_values,
)
from storage.optuna_tables import trials as trial_table
from storage.pareto import direction_of, fronts_of
from storage.promotion import PromotingHalving, WaitingTrial
from storage.study import Study

MIN_LIMIT = 10 * BEST_TRIALS  # a tenth of the finished trials count as the best, until these are BEST_TRIALS

_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)  # final: nothing changes the state or values of such a trial
# Draws that are shown as infeasible; at most half as many as finished trials, so that TPE does not learn from them alone.
_REFUSED = 50
_IDS_AT_ONCE = 1000  # in one statement
_FIRSTS_SHARE = 4  # at most a quarter of the limit shows sets of parameters

# Multiples of the golden ratio, modulo 1, are spread evenly, and so are the numbers whose multiple is below a bound. No
# regular pattern in the order of the trials, such as that of two machines in turns, biases the sample.
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # times 2**64


@dataclass(frozen=True)
class _Ended:
    """A finished trial without its params, which are read if it is shown.

    Attributes:
        values: of a completed trial, one for each objective.
        rank: its place in TPE's order, the best first; of no meaning with several objectives.
        priority: its place in the order in which trials enter the sample.
        last_value: {epoch: value} of the last epoch of a pruned trial.
        names: the names of its params.
    """

    trial_id: int
    number: int
    state: TrialState
    values: tuple[float, ...] | None
    last_value: dict[int, float]
    names: str
    rank: tuple[float, ...]
    priority: int


class History:
    """The trials of a study that TPE reads. `refresh` reads them from the database. Not thread-safe.

    Only what TPE uses is read: for finished trials the state, params and value, for pruned ones also the last intermediate
    value; for unfinished ones the params, and the system attributes in which TPE notes params that are not stored yet.

    Args:
        study: the study.
        limit: how many finished trials are shown at most; at least MIN_LIMIT. It should not be less than the
            `n_startup_trials` of the sampler, which would draw at random forever.
        promotion: lets trials wait at rungs; None if none does.

    Raises:
        ValueError: the limit is too low to show the trials that TPE counts as the best ones.
    """

    def __init__(self, study: Study, limit: int, promotion: PromotingHalving | None = None) -> None:
        if limit < MIN_LIMIT:
            raise ValueError(f"a history shows at least {MIN_LIMIT} finished trials, not {limit}")
        self._study = study
        self._limit = limit
        self._promotion = promotion
        self._shown: list[FrozenTrial] = []
        self._refused: deque[FrozenTrial] = deque(maxlen=_REFUSED)
        self._frozen: dict[int, tuple[_Ended, FrozenTrial]] = {}  # the finished ones of them
        self._at_rungs: list[_Ended] = []  # trials that wait at a rung, as pruned ones
        self._names: dict[int, str] = {}  # {trial_id: names of the params} of all that have waited
        self._forget()

    def _forget(self) -> None:
        self._last_id = -1  # of the trials seen so far
        self._unfinished: set[int] = set()  # ids of those seen unfinished
        self._ended = 0  # number of those seen finished
        self._best: list[_Ended] = []
        self._completed: list[_Ended] = []  # with several objectives: a new trial can make any of them one of the best
        self._firsts: dict[str, _Ended] = {}  # the first one with these params
        self._sample: list[_Ended] = []

    def trials(self, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """Return the trials as of the last `refresh`, ordered by number. They must not be changed.

        Args:
            states: only trials in these states; None for all.
        """
        return [trial for trial in self._shown if states is None or trial.state in states]

    def refuse(self, draft: FrozenTrial) -> None:
        """Show a configuration that was drawn, and breaks a constraint, from the next `refresh` on."""
        # TPE leaves out a trial with the number of the one that it draws.
        refused = _freeze(DRAFT_ID, draft.number - 1, TrialState.COMPLETE, {})
        refused.params, refused.distributions = draft.params, draft.distributions
        refused.set_constraint("refused", 1.0)
        self._refused.append(refused)

    def refresh(self) -> None:
        """Read what changed since the last call. Idempotent: use it with `retry_while_down`.

        After the first call, this reads the unfinished trials and those that ended since.
        """
        with self._study.database.snapshot() as connection:  # else, a trial that begins to wait meanwhile is missed
            at_rungs = {} if self._promotion is None else self._promotion.read_waiting(connection, self._study.study_id)
            unfinished = self._read_changes(connection)
            self._read_at_rungs(connection, at_rungs)
            chosen = self._choose()
            missing = [trial for trial_id, trial in chosen.items() if self._frozen.get(trial_id, (None,))[0] != trial]
            params = _read_params(connection, trial_table.c.trial_id.in_([each.trial_id for each in missing]))
        for each in missing:
            frozen = _freeze(
                each.trial_id, each.number, each.state, params.get(each.trial_id, {}), each.values, each.last_value
            )
            self._frozen[each.trial_id] = each, frozen
        self._frozen = {trial_id: self._frozen[trial_id] for trial_id in chosen}
        shown = [frozen for _, frozen in self._frozen.values()]
        refused = list(self._refused)[-(len(chosen) // 2) :] if len(chosen) > 1 else []
        self._shown = sorted([*shown, *refused, *unfinished], key=lambda trial: trial.number)

    def _read_changes(self, connection: sa.Connection) -> list[FrozenTrial]:
        """Note the trials that ended since the last call; return the unfinished ones."""
        table, study_id = trial_table, self._study.study_id
        of_study = table.c.study_id == study_id
        directions = self._study.optuna_study.directions
        total = connection.scalar(sa.select(sa.func.count()).where(of_study, table.c.state.in_(_ENDED))) or 0
        is_open = of_study if self._promotion is None else sa.and_(of_study, ~self._promotion.waits(study_id))
        unfinished = _read_unfinished(connection, is_open)
        condition = of_study
        if self._ended:
            since = sa.or_(table.c.trial_id > self._last_id, table.c.trial_id.in_(self._unfinished - unfinished.keys()))
            # The sum keeps SQLite from its index of study_id, with which it would scan the whole study.
            condition = sa.and_(since, table.c.study_id + 0 == study_id)
        ended = _read_ended(connection, condition, directions)
        if self._ended + len(ended) < total:
            # A trial ended that had failed before, or one became visible late. Finished trials stay finished, so equal
            # numbers mean that none was missed.
            self._forget()
            ended = _read_ended(connection, of_study, directions)
        self._add(ended, directions)
        self._unfinished = set(unfinished)
        self._last_id = max([self._last_id, *unfinished, *(trial.trial_id for trial in ended)])
        return list(unfinished.values())

    def _add(self, ended: list[_Ended], directions: Sequence[StudyDirection]) -> None:
        self._ended += len(ended)
        if len(directions) == 1:
            self._best = sorted([*self._best, *ended], key=lambda trial: trial.rank)[:BEST_TRIALS]
        elif ended:
            self._completed += [trial for trial in ended if trial.values is not None]
            self._best = _best_fronts(self._completed, directions, self._limit // 2)
        self._sample = sorted([*self._sample, *ended], key=lambda trial: trial.priority)[: self._limit]
        self._firsts = _first_of_each([*self._firsts.values(), *ended])

    def _read_at_rungs(self, connection: sa.Connection, waiting: Mapping[int, WaitingTrial]) -> None:
        """Note the trials that wait at a rung as pruned ones."""
        new = [trial_id for trial_id in waiting if trial_id not in self._names]
        for start in range(0, len(new), _IDS_AT_ONCE):
            self._names |= _read_names(connection, new[start : start + _IDS_AT_ONCE])
        direction = self._study.optuna_study.directions[0]
        self._at_rungs = []
        for trial_id, (number, _, epoch, value) in waiting.items():
            state, last_value, names = TrialState.PRUNED, {epoch: value}, self._names.get(trial_id, "")
            rank = _rank(state, number, None, last_value, direction)
            self._at_rungs.append(_Ended(trial_id, number, state, None, last_value, names, rank, _priority(number)))

    def _choose(self) -> dict[int, _Ended]:
        """Return {trial_id: trial to show as finished}."""
        best, sample, firsts = self._best, self._sample, self._firsts
        if self._at_rungs:  # there is one objective
            best = sorted([*best, *self._at_rungs], key=lambda trial: trial.rank)[:BEST_TRIALS]
            sample = sorted([*sample, *self._at_rungs], key=lambda trial: trial.priority)[: self._limit]
            firsts = _first_of_each([*firsts.values(), *self._at_rungs])
        by_number = sorted(firsts.values(), key=lambda trial: trial.number)[: self._limit // _FIRSTS_SHARE]
        chosen: dict[int, _Ended] = {}
        for trial in [*best, *by_number, *sample]:
            if len(chosen) == self._limit:
                break
            chosen[trial.trial_id] = trial
        return chosen


def _first_of_each(trials: list[_Ended]) -> dict[str, _Ended]:
    """Return {names of params: the first trial with these}."""
    found: dict[str, _Ended] = {}
    for trial in trials:
        first = found.setdefault(trial.names, trial)
        if trial.number < first.number:
            found[trial.names] = trial
    return found


def _best_fronts(completed: list[_Ended], directions: Sequence[StudyDirection], most: int) -> list[_Ended]:
    """Return the trials among which TPE chooses the best ones of several objectives.

    It takes fronts as long as all of their trials are wanted, and then those of the next one that together have the largest
    hypervolume.

    Args:
        completed: with values.
        directions: of each objective.
        most: how many are returned at most. Of a larger front, those at even places of the first objective.
    """
    values = [trial.values or () for trial in completed]
    chosen: list[_Ended] = []
    for front in fronts_of(values, [direction_of(each) for each in directions], BEST_TRIALS):
        room = most - len(chosen)
        if len(front) > room:
            step = (len(front) - 1) / max(1, room - 1)
            front = [front[round(i * step)] for i in range(room)]
        chosen += [completed[place] for place in front]
    return chosen


def _rank(
    state: TrialState, number: int, value: float | None, last_value: dict[int, float], direction: StudyDirection
) -> tuple[float, ...]:
    """Return the key of TPE's order: completed trials by value; then pruned ones, by last epoch and its value."""
    sign = 1 if direction == StudyDirection.MINIMIZE else -1
    if state == TrialState.COMPLETE:
        assert value is not None
        return 0, sign * value, 0.0, number
    for epoch, last in last_value.items():
        return 1, -epoch, math.inf if math.isnan(last) else sign * last, number
    return 1, 1, 0.0, number


def _priority(number: int) -> int:
    return number * _GOLDEN_RATIO % 2**64


def _freeze(
    trial_id: int,
    number: int,
    state: TrialState,
    params: dict[str, tuple[float, BaseDistribution]],
    values: tuple[float, ...] | None = None,
    intermediate_values: dict[int, float] | None = None,
) -> FrozenTrial:
    return FrozenTrial(
        number=number,
        trial_id=trial_id,
        state=state,
        value=None,
        values=values,
        datetime_start=None,
        datetime_complete=None,
        params={name: distribution.to_external_repr(stored) for name, (stored, distribution) in params.items()},
        distributions={name: distribution for name, (_, distribution) in params.items()},
        user_attrs={},
        system_attrs={},
        intermediate_values=intermediate_values or {},
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_unfinished(connection: sa.Connection, of_study: sa.ColumnElement[bool]) -> dict[int, FrozenTrial]:
    table, attribute = trial_table, trial_system_attributes
    condition = sa.and_(of_study, table.c.state.in_(UNFINISHED))
    rows = connection.execute(sa.select(table.c.trial_id, table.c.number, table.c.state).where(condition)).all()
    if not rows:
        return {}
    params = _read_params(connection, condition)
    found = {row.trial_id: _freeze(row.trial_id, row.number, row.state, params.get(row.trial_id, {})) for row in rows}
    attributes = (
        sa.select(attribute.c.trial_id, attribute.c.key, attribute.c.value_json)
        .join(table, table.c.trial_id == attribute.c.trial_id)
        .where(condition, attribute.c.key.startswith(RELATIVE_PARAMS, autoescape=True))
    )
    for trial_id, key, text in connection.execute(attributes):
        if trial_id in found:
            found[trial_id].system_attrs[key] = json.loads(text)
    return found


def _read_ended(
    connection: sa.Connection, condition: sa.ColumnElement[bool], directions: Sequence[StudyDirection]
) -> list[_Ended]:
    trial, value, stored = trial_table, trial_values, intermediate_values
    other, param = intermediate_values.alias(), trial_params
    last_epoch = sa.select(sa.func.max(other.c.step)).where(other.c.trial_id == trial.c.trial_id).scalar_subquery()
    names = sa.select(sa.func.aggregate_strings(param.c.param_name, ",")).where(param.c.trial_id == trial.c.trial_id)
    is_last = sa.and_(
        trial.c.state == TrialState.PRUNED, stored.c.trial_id == trial.c.trial_id, stored.c.step == last_epoch
    )
    query = (
        sa.select(
            *(trial.c.trial_id, trial.c.number, trial.c.state, value.c.value, value.c.value_type),
            *(stored.c.step, stored.c.intermediate_value, stored.c.intermediate_value_type),
            names.scalar_subquery().label("names"),
        )
        .outerjoin(value, sa.and_(value.c.trial_id == trial.c.trial_id, value.c.objective == 0))
        .outerjoin(stored, is_last)
        .where(condition, trial.c.state.in_(_ENDED))
    )
    others = _read_other_values(connection, condition) if len(directions) > 1 else {}
    found = []
    for trial_id, number, state, number_, kind, epoch, last, last_kind, names_ in connection.execute(query):
        final = None if kind is None else decode_value(number_, kind)
        last_value = {} if epoch is None else {epoch: decode_intermediate_value(last, last_kind)}
        rank = _rank(state, number, final, last_value, directions[0])
        values = None if final is None else (final, *others.get(trial_id, ()))
        found.append(_Ended(trial_id, number, state, values, last_value, names_ or "", rank, _priority(number)))
    return found


def _read_other_values(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> dict[int, tuple[float, ...]]:
    """Return {trial_id: values of its objectives but for the first one} of the completed trials."""
    trial, value = trial_table, trial_values
    query = (
        sa.select(trial.c.trial_id, value.c.value, value.c.value_type)
        .join(value, value.c.trial_id == trial.c.trial_id)
        .where(condition, trial.c.state == TrialState.COMPLETE, value.c.objective > 0)
        .order_by(value.c.objective)
    )
    found: dict[int, tuple[float, ...]] = {}
    for trial_id, stored, kind in connection.execute(query):
        found[trial_id] = (*found.get(trial_id, ()), decode_value(stored, kind))
    return found


def _read_names(connection: sa.Connection, trial_ids: Sequence[int]) -> dict[int, str]:
    """Return {trial_id: the names of its params}."""
    param = trial_params
    query = sa.select(param.c.trial_id, sa.func.aggregate_strings(param.c.param_name, ","))
    query = query.where(param.c.trial_id.in_(trial_ids)).group_by(param.c.trial_id)
    return {trial_id: names for trial_id, names in connection.execute(query)}  # noqa: C416 # rows are no pairs to mypy


def _read_params(
    connection: sa.Connection, condition: sa.ColumnElement[bool]
) -> dict[int, dict[str, tuple[float, BaseDistribution]]]:
    """Return {trial_id: {name: (stored value, distribution)}}, the params in the order in which they were drawn."""
    param = trial_params
    query = (
        sa.select(param.c.trial_id, param.c.param_name, param.c.param_value, param.c.distribution_json)
        .join(trial_table, trial_table.c.trial_id == param.c.trial_id)
        .where(condition)
        .order_by(param.c.param_id)
    )
    found: dict[int, dict[str, tuple[float, BaseDistribution]]] = {}
    distributions: dict[str, BaseDistribution] = {}
    for trial_id, name, value, text in connection.execute(query):
        if text not in distributions:
            distributions[text] = json_to_distribution(text)
        found.setdefault(trial_id, {})[name] = (value, distributions[text])
    return found
