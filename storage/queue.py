"""Which trial a run claims next: an interrupted one, a grid point, or a configuration that a sampler draws."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from storage import claims, optuna_internals, optuna_tables, ownership, records, reporting
from storage.claims import Configuration, Refusal
from storage.errors import RETRY_SECONDS, name_strange_content, retry_while_down
from storage.history import History
from storage.lease import RENEWAL_SHARE, Lease, is_run_dead
from storage.ownership import ClaimedTrial
from storage.promotion import PromotingHalving
from storage.records import Params
from storage.study import Study
from storage.usage import CPU, Device

SILENT_SHARE = 1 / 3  # of a lease: how long a run on another machine must be silent before its trials are taken
SCAN_SECONDS = 1.0  # between scans for trials that other runs left
POINTS_AT_A_TIME = 128  # of a grid, from which a claim takes the first one that no other run has taken meanwhile
MAX_DUPLICATE_DRAWS = 20  # in one claim; then the space counts as exhausted
MAX_REJECTED_DRAWS = 20_000  # in one claim; then the space counts as exhausted
RANDOM_AFTER_DRAWS = 10  # duplicate or rejected draws in one claim, after which the sampler is left out
DRAWS_PER_LOOK = 100  # random ones, between two looks at what other runs have used of the budget

ConfigKey = Callable[[Mapping[str, Any]], str]
# Draws the params that a trial lacks. Returns the constraint that they break; empty if they break none.
Draw = Callable[[optuna.Trial], str]
ListPoints = Callable[[], list[Params] | None]  # all configurations that may be drawn; None if there are too many

T = TypeVar("T")
logger = logging.getLogger("hpo.storage")


class TrialQueue:
    """The trials that one run may claim. Not thread-safe.

    Args:
        study: the study.
        lease: the run's lease, started.
        config_key: returns the identity of a configuration.
        draw: see `storage.run.Run`.
        list_points: see `storage.run.Run`.
        max_trials: see `storage.run.Run`.
        history_limit: see `storage.run.Run`.
        takes_turns: see `storage.run.Run`.
        promotion: decides which of the trials that wait at a rung train on; None if no trial waits at one.
        is_settled: returns whether a claim of this run is over, see `storage.writer.Writer.is_settled`.

    Attributes:
        finished: set by `claim`: no run has or will get another trial.
        exhausted: set by `claim`: why no more trials are drawn although the budget allows it; empty while they are.
        others_are_running: set by a `claim` that finds no trial: whether other living runs work on trials.
    """

    def __init__(
        self,
        study: Study,
        lease: Lease,
        *,
        config_key: ConfigKey,
        draw: Draw | None,
        list_points: ListPoints,
        max_trials: int | None,
        history_limit: int | None,
        is_settled: Callable[[int], bool],
        takes_turns: bool = False,
        promotion: PromotingHalving | None = None,
    ) -> None:
        self.finished = False
        self.exhausted = ""
        self.others_are_running = False
        self._study = study
        self._database = study.database
        self._run = lease.key
        self._config_key = config_key
        self._draw = draw
        self._list_points = list_points
        self._listed: list[tuple[str, Params]] | None = None  # what that returned, each with its key
        self._max_trials = max_trials
        self._takes_turns = takes_turns
        self._promotion = promotion
        self._stopped: dict[int, int] = {}
        self._history = None if history_limit is None else History(study, history_limit, promotion)
        if self._history is not None:
            optuna_internals.show_trials(study.optuna_study, self._history.trials)
        self._all_points: list[tuple[str, Params]] = []  # each with its key
        self._points: list[tuple[str, Params]] = []  # those that no run is known to have claimed; the next one is last
        self._distributions: Mapping[str, BaseDistribution] = {}
        self._attrs: Mapping[str, Mapping[str, Any]] = {}  # {key of a point: user attributes of its trial}
        self._planned: set[str] | None = None  # keys of all points of a grid
        self._known_keys: set[str] = set()
        self._is_settled = is_settled
        self._tokens: set[int] = set()  # of the claims that this run works on
        self._some_wait = False
        self._keys = 0  # how many the study had at the last scan
        self._compared_keys: int | None = None  # how many it had when the points were compared with them
        # {run: (its last renewal, for how many seconds no later one was seen, when this run looked last)}
        self._heard: dict[int, tuple[float, float, float]] = {}
        self._next_scan = 0.0  # by the monotonic clock

    def enqueue(
        self,
        points: Iterable[Params],
        distributions: Mapping[str, BaseDistribution],
        attrs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Set the points that `claim` returns, in this order; see `storage.run.Run.enqueue`."""
        self._all_points = [(self._config_key(point), point) for point in points]
        self._points = self._all_points[::-1]
        self._compared_keys = None
        self._distributions = distributions
        self._attrs = attrs or {}
        if self._draw is None:
            self._planned = {key for key, _ in self._all_points}
        self._known_keys = self._retry(lambda: records.read_keys(self._database, self._run.study_id))

    def claim(self, *, new: bool = True, device: Device = CPU) -> ClaimedTrial | None:
        """Claim a trial; return None if there is none now.

        Args:
            new: whether a trial may be created. Otherwise only those that wait are claimed; those that wait at a rung as at
                the end of a search.
            device: what the trial holds while a worker runs it.

        Raises:
            StorageError: the study was deleted, or the database cannot be used (after retries).
        """
        self._run = replace(self._run, device=device)
        token = ownership.new_token()
        self._tokens = {each for each in self._tokens if not self._is_settled(each)}
        claim = None
        if self._takes_turns and new:
            claim = self._claim_new(token)
        # Where trials wait at rungs, each one that has got there may let another one train on.
        looks_first = self._promotion is not None or time.monotonic() >= self._next_scan or not new
        if claim is None and looks_first:
            claim = self._claim_existing(token)
        claim = claim or (self._claim_new(token) if new else None)
        if claim is None and not new and self._some_wait:
            claim = self._claim_existing(token, is_last=True)
        while claim is None and new:
            # Last, so that `finished` is true: another run may have claimed the last trial meanwhile.
            claim = self._claim_existing(token)
            if claim is None and self._draw is None and self._keys != self._compared_keys:
                self._compare_points()
                claim = self._claim_point(token)
                continue
            if claim is None and self._some_wait:
                claim = self._claim_existing(token, is_last=True)
            self.finished = claim is None and not self.others_are_running and not self._some_wait
            break
        if claim is not None:
            self._tokens.add(token)
        return claim

    def release(self, claim: ClaimedTrial, timeout_seconds: float = RETRY_SECONDS) -> None:
        """Set an unfinished trial to WAITING, if this run still owns it."""
        retry_while_down(self._database, lambda: reporting.release(self._database, claim), timeout_seconds)
        self._tokens.discard(claim.token)
        self._next_scan = 0.0

    def take_stopped(self) -> dict[int, int]:
        """See `storage.run.Run.take_stopped`."""
        stopped, self._stopped = self._stopped, {}
        return stopped

    # --- existing trials

    def _claim_existing(self, token: int, *, is_last: bool = False) -> ClaimedTrial | None:
        """Claim a trial that a run released, a dead run left, or another program enqueued.

        Args:
            token: of the claim.
            is_last: whether this run creates no trial now.
        """
        scan = self._retry(
            lambda: claims.claim_existing(
                self._database,
                self._run,
                token,
                own_tokens=self._tokens,
                is_run_dead=self._is_dead,
                max_trials=None if self._draw is None else self._max_trials,
                planned=self._planned,
                fewest_epochs_first=self._takes_turns,
                promotion=self._promotion,
                is_last=is_last,
            )
        )
        for number, reason in scan.failed.items():
            logger.warning("trial %d failed: %s", number, reason)
        self.others_are_running = scan.others_are_running
        self._some_wait = scan.some_wait
        self._stopped |= scan.stopped
        self._keys = scan.keys
        claim = scan.claim
        if claim is not None:
            self._study.drafts.forget_finished(self._run.study_id, claim.trial_id)
        for trial_id in scan.partial_ids if claim is None else ():
            claim = claim or self._claim_partial(token, trial_id)
        if claim is None:
            self._next_scan = time.monotonic() + SCAN_SECONDS
        return claim

    def _is_dead(self, row: Any) -> bool | None:
        """Return whether a run is dead; None if its lease decides.

        A lease is measured by the database's clock, which may be set. So this run must also have seen no renewal for some
        time by its own clock. Between two looks, it counts the time of one renewal at most: while this run did not see the
        database, no other may have reached it.
        """
        is_dead = is_run_dead(row)
        if is_dead is not None:
            return is_dead
        now = time.monotonic()
        heard, silent_seconds, looked = self._heard.get(row.owner, (None, 0.0, now))
        if heard == row.last_heard:
            silent_seconds += min(now - looked, self._run.lease_seconds * RENEWAL_SHARE)
        else:
            silent_seconds = 0.0
        self._heard[row.owner] = (row.last_heard, silent_seconds, now)
        return None if silent_seconds >= self._run.lease_seconds * SILENT_SHARE else False

    def _claim_partial(self, token: int, trial_id: int) -> ClaimedTrial | None:
        """Complete and claim a trial that another program enqueued; set it to FAIL if it is a duplicate or not allowed."""
        partial = self._read(lambda: self._database.optuna_storage.get_trial(trial_id))
        if self._draw is None and not (
            partial.params or (self._distributions and optuna_internals.is_enqueued(partial))
        ):
            return None
        try:
            if self._draw is None:
                broken, draft = "", optuna_internals.as_point(partial, self._distributions)
            else:
                broken, draft = self._read(lambda: self._draw_once(partial.number, partial), runs_other_code=True)
        except (ValueError, TypeError, OverflowError) as error:  # OverflowError: an infinite value of an int
            broken, draft = f"not in the search space: {error}", partial
        if broken:
            self._retry(lambda: claims.refuse(self._database, self._run, trial_id, broken))
            return None
        claim = self._register(token, draft, trial_id)
        return claim if isinstance(claim, ClaimedTrial) else None

    # --- new trials

    def _claim_new(self, token: int) -> ClaimedTrial | None:
        claim = self._claim_point(token)
        if claim is not None or self._draw is None:
            return claim
        if self.exhausted:
            return None
        sampler = self._study.optuna_study.sampler
        try:
            return self._claim_drawn(token)
        finally:
            self._study.optuna_study.sampler = sampler

    def _claim_point(self, token: int) -> ClaimedTrial | None:
        """Create a trial for the next point that no run has claimed."""
        max_trials = None if self._draw is None else self._max_trials
        while self._points:
            if self._points[-1][0] in self._known_keys:
                self._points.pop()
                continue
            tried = self._points[: -1 - POINTS_AT_A_TIME : -1]
            claim = self._retry(
                lambda tried=tried: claims.register(  # type: ignore[misc]
                    self._database,
                    self._run,
                    token,
                    self._configuration(*tried[0]),
                    max_trials,
                    instead=(self._configuration(*each) for each in tried[1:]),
                )
            )
            # Only now: after an error, the next claim starts with the same point.
            if isinstance(claim, ClaimedTrial):
                keys, claimed = [key for key, _ in tried], self._config_key(claim.params)
                del self._points[-1 - (keys.index(claimed) if claimed in keys else 0) :]
                return claim
            del self._points[-(len(tried) if claim is Refusal.DUPLICATE else 1) :]
        return None

    def _configuration(self, key: str, point: Params) -> Configuration:
        distributions = {name: self._distributions[name] for name in point}
        return Configuration(key, point, distributions, attrs=self._attrs.get(key, {}))

    def _compare_points(self) -> None:
        """Queue the points again that the database lacks: an older copy may have been restored since they were claimed."""
        self._known_keys = self._retry(lambda: records.read_keys(self._database, self._run.study_id))
        self._points = [each for each in self._all_points[::-1] if each[0] not in self._known_keys]
        self._compared_keys = len(self._known_keys)

    def _claim_drawn(self, token: int) -> ClaimedTrial | None:
        duplicates, broken = 0, Counter[str]()
        while duplicates < MAX_DUPLICATE_DRAWS and (rejected := broken.total()) < MAX_REJECTED_DRAWS:
            draws = duplicates + rejected
            if draws <= RANDOM_AFTER_DRAWS or draws % DRAWS_PER_LOOK == 0:
                number = self._retry(self._next_number)
            if number is None:
                return None
            if draws == RANDOM_AFTER_DRAWS:
                # A sampler does not learn from trials that never ran: it may draw the same point forever.
                if self._has_list():
                    return self._claim_untried(token, number)
                self._study.optuna_study.sampler = optuna.samplers.RandomSampler(seed=number)
            constraint, draft = self._read(
                lambda number=number: self._draw_once(number),  # type: ignore[misc]
                runs_other_code=True,
            )
            if constraint:
                broken[constraint] += 1
                if self._history is not None:
                    self._history.refuse(draft)
                continue
            claim = self._register(token, draft)
            if isinstance(claim, ClaimedTrial):
                return claim
            if claim == Refusal.SPENT:
                return None
            duplicates += 1
        if duplicates == MAX_DUPLICATE_DRAWS:
            self.exhausted = f"{duplicates} draws in a row were duplicates of earlier trials"
        else:
            (constraint, _), *_ = broken.most_common(1)
            self.exhausted = f"{rejected:,} draws in a row broke a constraint, most often {constraint}"
        return None

    def _has_list(self) -> bool:
        """Return whether all configurations of the space are known, and their distributions."""
        if self._listed is None:
            points = self._list_points() if self._distributions else None
            self._listed = [(self._config_key(point), point) for point in points or ()]
        return bool(self._listed)

    def _claim_untried(self, token: int, seed: int) -> ClaimedTrial | None:
        """Create a trial for a random one of all configurations, unless the study has them all."""
        assert self._listed is not None
        self._known_keys = self._retry(lambda: records.read_keys(self._database, self._run.study_id))
        untried = [each for each in self._listed if each[0] not in self._known_keys]
        if not untried:
            self.exhausted = f"all {len(self._listed):,} configurations of the space have a trial"
            return None
        self._points = random.Random(seed).sample(untried, min(len(untried), POINTS_AT_A_TIME))
        try:
            return self._claim_point(token)
        finally:
            self._points = []  # the sampler draws the next one

    def _next_number(self) -> int | None:
        """Return the number that the next trial gets, unless another run is faster; None if the budget is spent."""
        with self._database.engine.connect() as connection:
            study_id = self._run.study_id
            if self._max_trials is not None and records.count_budgeted(connection, study_id) >= self._max_trials:
                return None
            return optuna_tables.next_number(connection, study_id)

    def _draw_once(self, number: int, partial: FrozenTrial | None = None) -> tuple[str, FrozenTrial]:
        """Draw a configuration in memory; return the constraint that it breaks, and a trial with its params."""
        assert self._draw is not None
        # One that draws at random, instead of a sampler that learns, needs no history.
        if self._history is not None and not isinstance(
            self._study.optuna_study.sampler, optuna.samplers.RandomSampler
        ):
            with name_strange_content(self._database.url):
                self._history.refresh()
        trial, draft = optuna_internals.draft_trial(self._study.optuna_study, number, partial)
        broken = self._draw(trial)
        if partial is not None:
            optuna_internals.check_params(draft)
        return broken, draft

    def _register(self, token: int, draft: FrozenTrial, trial_id: int | None = None) -> ClaimedTrial | Refusal:
        key = self._config_key(draft.params)
        attrs = self._attrs.get(key, {})
        configuration = Configuration(key, draft.params, draft.distributions, draft.system_attrs, trial_id, attrs)
        max_trials = None if self._draw is None else self._max_trials
        return self._retry(lambda: claims.register(self._database, self._run, token, configuration, max_trials))

    def _retry(self, operation: Callable[[], T]) -> T:
        return retry_while_down(self._database, operation)

    def _read(self, operation: Callable[[], T], *, runs_other_code: bool = False) -> T:
        """Run an operation that reads through Optuna, which raises KeyError for a study that was deleted."""
        try:
            return retry_while_down(self._database, operation, runs_other_code=runs_other_code)
        except KeyError:
            raise ownership.study_deleted(self._database, self._run.study.name) from None
