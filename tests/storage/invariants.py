"""What must hold after every step of a simulation, read with plain SQL."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.storage.simulator import Driver, Simulation, Training

ENDED = {"COMPLETE", "PRUNED", "FAIL"}
NEVER_RUN = {"duplicate of an earlier trial", "breaks a constraint"}
UNAWARE_SECONDS = 20.0  # how long a trial may be RUNNING under a run that does not work on it
LEASE_SECONDS = 6.0
OTHER_SETTINGS = {"metric": "other"}  # of a study that takes the id of a deleted one
# The ids of the study that the drivers search: its name may be `s` or `s@2`.
OURS = "SELECT study_id FROM study_user_attributes WHERE key = 'hpo:fingerprint' AND value_json = '\"f\"'"
ROUNDING = 1e-6  # of sums of virtual seconds
MAX_POLLS = 40  # of a second each: longer than any lease, one after another


class Invariants:
    """Compares the database with what the drivers did.

    Args:
        simulation: the drivers.
        sql: runs a query outside of the simulation.

    Attributes:
        trained: {value: the training that reported it}.
        crashes: {trial_id: how many workers and drivers died while they trained it}.
        retried: (trial_id, token) of the failures that an `hpo retry` has read.
        replacements: how often the database was replaced.
        held: {token: for how long its claim has held a device, periods that have ended}.
        held_since: {token: when the present period began}, in virtual seconds.
    """

    def __init__(self, simulation: Simulation, sql: Callable[[str], list[tuple[Any, ...]]]) -> None:
        self._simulation = simulation
        self._sql = sql
        self.trained: dict[float, Training] = {}
        self.crashes: Counter[int] = Counter()
        self.retried: set[tuple[int, int | None]] = set()
        self.replacements = 0
        self.held: Counter[int] = Counter()
        self.held_since: dict[int, float] = {}
        self._device_seconds: dict[int, float] = {}  # {token: what was stored at the last look}
        self._endings: dict[int, tuple[str, float | None]] = {}
        self._failures: dict[int, int | None] = {}  # {trial_id: token} of those in `_endings` that failed
        self._owners: dict[int, int | None] = {}
        self._unaware_since: dict[tuple[int, int], float] = {}
        self._orphaned: set[tuple[int, int]] = set()  # (trial, run) of RUNNING trials whose run has ended
        self._rungs: set[tuple[int, int]] = set()
        self._pruned: set[int] | None = set()  # at the last look; None if the database was replaced since
        self._running: set[int] = set()  # trials that were RUNNING at the last check
        self._at_rungs: dict[int, int] = {}  # {trial_id: epoch} of those that waited at a rung at the last look
        self._knows_crashes = True

    def forget(self) -> None:
        """The database was replaced."""
        self.replacements += 1
        self._endings.clear()
        self._owners.clear()
        self._unaware_since.clear()
        self._orphaned.clear()
        self._rungs.clear()
        self._pruned = None
        self._at_rungs.clear()
        self._device_seconds.clear()
        self._knows_crashes = False
        for driver in self._simulation.drivers:
            driver.excused_until = float("inf")

    def note_death(self, driver: Driver) -> None:
        """A driver was killed."""
        for (trial_id,) in self._sql(f"SELECT trial FROM hpo_trials WHERE run = {driver.run_id}"):
            self.crashes[trial_id] += 1

    def note_held(self, claim: Any) -> None:
        """A worker runs the trial of a claim from now on."""
        self.held_since.setdefault(claim.token, self._simulation.scheduler.now)

    def note_freed(self, claim: Any) -> None:
        """No worker runs it from now on."""
        self.held[claim.token] = self._held_seconds(claim.token)  # type: ignore[assignment]
        self.held_since.pop(claim.token, None)

    def _held_seconds(self, token: int) -> float:
        now = self._simulation.scheduler.now
        return self.held[token] + now - self.held_since.get(token, now)

    def owner_of(self, claim: Any) -> int | None:
        """Return the token that owns a trial."""
        rows = self._sql(f"SELECT token FROM hpo_trials WHERE trial = {claim.trial_id}")
        return rows[0][0] if rows and rows[0][0] != claim.token else claim.token if rows else None

    # --- after every step that committed something

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        trials = {
            row[0]: row
            for row in self._sql(
                "SELECT t.trial_id, t.number, CAST(t.state AS TEXT), h.run, h.token, v.value, p.param_value, h.crashes "
                "FROM trials t LEFT JOIN hpo_trials h ON h.trial = t.trial_id "
                "LEFT JOIN trial_values v ON v.trial_id = t.trial_id "
                f"LEFT JOIN trial_params p ON p.trial_id = t.trial_id WHERE t.study_id IN ({OURS}) ORDER BY t.trial_id"
            )
        }
        reasons = {
            trial_id: json.loads(value)
            for trial_id, value in self._sql(
                "SELECT trial_id, value_json FROM trial_user_attributes WHERE key = 'fail_reason'"
            )
        }
        trained = [row for row in trials.values() if reasons.get(row[0]) not in NEVER_RUN]
        self._check_configurations(trained)
        self._check_owners(trials)
        self._check_endings(trials, reasons)
        self._check_rungs(trials)
        self._check_device_time(trials)
        self._check_other_studies()

    def _check_other_studies(self) -> None:
        """No driver has written to a study that it does not search."""
        for table, column in (("trials", "study_id"), ("hpo_trials", "study"), ("hpo_runs", "study")):
            (count,) = self._sql(f"SELECT count(*) FROM {table} WHERE {column} NOT IN ({OURS})")[0]
            assert not count, f"{count} rows of {table} belong to another study, or to none"
        query = f"SELECT value_json FROM study_user_attributes WHERE key = 'hpo:settings' AND study_id NOT IN ({OURS})"
        changed = [value for (value,) in self._sql(query) if json.loads(value) != OTHER_SETTINGS]
        assert not changed, f"the settings of another study are {changed}"

    def _check_configurations(self, trained: list[tuple[Any, ...]]) -> None:
        total = self._simulation.plan.trials
        if self._simulation.plan.is_population:
            replaced = self._check_population({row[0]: row for row in trained})
            assert len(trained) - replaced <= total, f"{len(trained) - replaced} members, but the population is {total}"
            return
        counts = Counter(row[6] for row in trained if row[6] is not None)
        twice = [x for x, count in counts.items() if count > 1]
        assert not twice, f"configurations {twice} have several trials"
        assert len(trained) <= total, f"{len(trained)} trials, but the budget is {total}"

    def _check_population(self, trained: dict[int, tuple[Any, ...]]) -> int:
        """Each trial that was replaced has one successor, which knows its parent; return how many there are."""
        attrs: dict[str, dict[int, Any]] = defaultdict(dict)
        for trial_id, key, value in self._sql("SELECT trial_id, key, value_json FROM trial_user_attributes"):
            attrs[key][trial_id] = json.loads(value)
        numbers = {row[1]: trial_id for trial_id, row in trained.items()}
        pruned = {trial_id for trial_id, row in trained.items() if row[2] == "PRUNED"}
        marked = {row[0] for row in self._sql("SELECT trial FROM hpo_rungs WHERE pool = 'pbt/replaced'")}
        replaced_by = {trial_id: each["trial"] for trial_id, each in attrs["replaced_by"].items()}
        assert pruned == marked == set(replaced_by), f"pruned {pruned}, marked {marked}, replaced by {replaced_by}"
        successors = {numbers[each["trial"]]: trained[trial_id][1] for trial_id, each in attrs["replaces"].items()}
        assert successors == replaced_by, f"successors {successors}, replaced by {replaced_by}"
        assert set(attrs["replaces"]) == set(attrs["continued_from"]), "a successor has a parent"
        with_key = {row[0] for row in self._sql("SELECT trial FROM hpo_trials")}
        assert set(attrs["replaces"]) <= with_key, "a successor can be claimed"
        decided = Counter(
            (self._line_of(trial_id, attrs["replaces"], numbers), epoch)
            for trial_id, epoch in self._sql("SELECT trial, epoch FROM hpo_rungs WHERE pool = 'pbt'")
        )
        twice = [line for line, count in decided.items() if count > 1]
        assert not twice, f"(first trial of the line, epoch) {twice} were decided twice"
        return len(marked)

    @staticmethod
    def _line_of(trial_id: int, replaces: dict[int, Any], numbers: dict[int, int]) -> int:
        while trial_id in replaces:
            trial_id = numbers[replaces[trial_id]["trial"]]
        return trial_id

    def _count_replaced(self) -> int:
        if not self._simulation.plan.is_population:
            return 0
        return int(self._sql("SELECT count(*) FROM hpo_rungs WHERE pool = 'pbt/replaced'")[0][0])

    def _check_endings(self, trials: dict[int, tuple[Any, ...]], reasons: dict[int, str]) -> None:
        for trial_id, (state, value) in list(self._endings.items()):
            assert trial_id in trials, f"trial {trial_id} has disappeared"
            now = trials[trial_id]
            if state == "FAIL" and now[4] != self._failures[trial_id]:
                # Each failure is retried once, by an `hpo retry` that has read this failure.
                failure = trial_id, self._failures[trial_id]
                assert failure in self.retried, (
                    f"trial {trial_id} failed and is {now[2]}, but nobody has retried this failure"
                )
                del self._endings[trial_id]
                continue
            assert (now[2], now[5]) == (state, value), f"trial {trial_id} was {state} {value}, and is {now[2]} {now[5]}"
        for trial_id, row in trials.items():
            state, value, token = row[2], row[5], row[4]
            assert row[7] is None or row[7] <= self.crashes[trial_id] or not self._knows_crashes, (
                f"trial {trial_id} counts {row[7]} crashes, but {self.crashes[trial_id]} happened"
            )
            if state not in ENDED or trial_id in self._endings:
                continue
            self._endings[trial_id] = (state, value)
            self._failures[trial_id] = token
            reason = reasons.get(trial_id, "")
            if state == "FAIL":
                assert "[" not in reason or f"[{token}]" in reason, (
                    f"trial {trial_id} failed by another owner: {reason}"
                )
                assert reason, f"trial {trial_id} failed without a reason"
                continue
            self._check_curve(trial_id, state, value, token)

    def _check_curve(self, trial_id: int, state: str, value: float | None, token: int | None) -> None:
        curve = dict(
            self._sql(f"SELECT step, intermediate_value FROM trial_intermediate_values WHERE trial_id = {trial_id}")
        )
        metrics = dict(self._sql(f"SELECT epoch, value FROM hpo_metrics WHERE trial = {trial_id}"))
        assert curve == metrics, f"trial {trial_id}: values {curve}, metrics {metrics}"
        last = max(curve, default=0)
        assert value == curve.get(last), (
            f"trial {trial_id} is {state} with {value}, its last epoch has {curve.get(last)}"
        )
        training = self.trained[value]  # type: ignore[index]
        # A trial that waited at a rung is ended by a run that need not have trained it.
        if not self._simulation.plan.is_deterministic and not (self._lets_wait and state == "PRUNED"):
            assert training.claim.token == token, f"trial {trial_id} has the value of an attempt that does not own it"
        expected = {epoch: each for epoch, each in training.history.items() if epoch <= last}
        assert curve == expected, f"trial {trial_id} has the epochs {curve}, its last attempt trained {expected}"

    def _check_owners(self, trials: dict[int, tuple[Any, ...]]) -> None:
        now = self._simulation.scheduler.now
        by_run = {driver.run_id: driver for driver in self._simulation.living() if driver.run_id >= 0}
        self._orphaned = {(row[0], row[3]) for row in trials.values() if row[2] == "RUNNING" and row[3] not in by_run}
        for trial_id, row in trials.items():
            state, run = row[2], row[3]
            before = self._owners.get(trial_id)
            robbed = by_run.get(before) if before is not None and before != run else None
            if robbed is not None and robbed.excused_until >= now:
                self.crashes[trial_id] += 1  # nobody can know that the driver was only suspended
            elif robbed is not None and trial_id in robbed.known and not robbed.is_closing:
                working = any(each.claim.trial_id == trial_id for each in robbed.trainings)
                assert not working, f"trial {trial_id} was taken from {robbed.name}, which lives"
            self._owners[trial_id] = run if state == "RUNNING" else None
            owner = by_run.get(run)
            is_unaware = (
                state == "RUNNING"
                and owner is not None
                and owner.suspended_until < now
                and not owner.is_closing
                and not any(each.claim.trial_id == trial_id for each in owner.trainings)
            )
            if not is_unaware:
                self._unaware_since.pop((trial_id, run), None)
            else:
                since = self._unaware_since.setdefault((trial_id, run), now)
                assert now - since < UNAWARE_SECONDS or self._simulation.down_until > since, (
                    f"trial {trial_id} has been RUNNING for {now - since:.0f} s under {owner and owner.name}, which does "
                    "not work on it"
                )

    def _check_device_time(self, trials: dict[int, tuple[Any, ...]]) -> None:
        """Each claim has its row. What is stored was used, and never falls."""
        stored = {token: seconds for token, seconds in self._sql("SELECT token, seconds FROM hpo_usage")}  # noqa: C416
        for row in trials.values():
            assert row[2] != "RUNNING" or row[4] in stored, f"the claim of trial {row[0]} has no row in hpo_usage"
        for token, seconds in stored.items():
            before, used = self._device_seconds.get(token, 0.0), self._held_seconds(token)
            assert before <= seconds <= used + ROUNDING, f"claim {token}: stored {before}, now {seconds}; used {used}"
        gone = self._device_seconds.keys() - stored.keys()
        assert not gone, f"the device time of the claims {gone} has disappeared"
        self._device_seconds = stored

    def _check_rungs(self, trials: dict[int, tuple[Any, ...]]) -> None:
        """Decisions compare values that are stored, and a decision to prune is stored together with the state PRUNED."""
        differing = self._sql(
            "SELECT r.trial, r.epoch, r.value, v.intermediate_value FROM hpo_rungs r LEFT JOIN trial_intermediate_values v "
            "ON v.trial_id = r.trial AND v.step = r.epoch "
            "WHERE v.intermediate_value IS NULL OR v.intermediate_value <> r.value"
        )
        assert not differing, f"(trial, epoch, value at the rung, stored value) differ: {differing}"
        rows = self._sql("SELECT trial, epoch, value FROM hpo_rungs WHERE pool = 'asha'")
        new = [row for row in rows if (row[0], row[2]) not in self._rungs]
        self._rungs |= {(row[0], row[2]) for row in rows}
        # A restored copy may lack decisions of living runs: the epochs are stored again, the rungs when a run starts.
        decided = new[0] if len(new) == 1 and not self.replacements else None
        if self._lets_wait:
            self._check_those_that_wait(trials, rows, decided)
        if decided is not None and self._simulation.plan.pruner in {"asha", "stop"}:
            trial_id, epoch, value = decided
            at_epoch = [row[2] for row in rows if row[1] == epoch]
            if sum(other > value for other in at_epoch) >= max(1, len(at_epoch) // 2):
                state = trials[trial_id][2]
                assert state == "PRUNED", f"trial {trial_id} lost at epoch {epoch} and is {state}"

    @property
    def _promotes(self) -> bool:
        return self._simulation.plan.pruner == "promote"

    @property
    def _lets_wait(self) -> bool:
        return self._promotes or self._simulation.plan.pruner == "stop"

    def _check_those_that_wait(
        self, trials: dict[int, tuple[Any, ...]], rows: list[tuple[Any, ...]], decided: tuple[Any, ...] | None
    ) -> None:
        """Those wait that have to. Of them, only the best train on; the others end when nothing else is left."""
        at_rungs = dict(self._sql("SELECT trial, epoch FROM hpo_rungs WHERE pool = 'asha/waiting'"))
        trained_on = self._sql(
            "SELECT r.trial, r.epoch FROM hpo_rungs r JOIN trial_intermediate_values v ON v.trial_id = r.trial "
            "WHERE r.pool = 'asha/waiting' AND v.step > r.epoch"
        )
        assert not trained_on or self.replacements, f"(trial, epoch) {trained_on} wait, and have trained on"
        states = {trial_id: row[2] for trial_id, row in trials.items()}
        ranked: dict[int, list[int]] = defaultdict(list)  # {rung: trials that have not failed, the best first}
        for trial_id, epoch, _ in sorted(rows, key=lambda row: (-row[2], row[0])):
            if states.get(trial_id) != "FAIL":
                ranked[epoch].append(trial_id)
        running = {trial_id for trial_id, state in states.items() if state == "RUNNING"}
        is_complete = len(states) >= self._simulation.plan.trials

        def is_among_best(trial_id: int, epoch: int) -> bool:
            others = ranked[epoch]
            is_last = is_complete and not running - {trial_id}
            return trial_id in others[: max(len(others) // 2, int(is_last))]

        if decided is not None and states[decided[0]] == "RUNNING":
            trial_id, epoch, _ = decided
            others = ranked[epoch]
            (claimed,) = self._sql(f"SELECT claimed_epoch FROM hpo_trials WHERE trial = {trial_id}")[0]
            if self._promotes:
                must_wait = may_wait = trial_id not in others[: len(others) // 2]
            else:
                may_wait = epoch == 1 and len(others) < 2 and not running - {trial_id}
                # One that trained next to it may have ended in the same transaction.
                must_wait = may_wait and not self._running - {trial_id}
            waits = at_rungs.get(trial_id) == epoch
            assert waits or not must_wait or epoch <= claimed, (
                f"trial {trial_id} trains on after epoch {epoch}: {others}"
            )
            assert not waits or (may_wait and epoch > claimed), (
                f"trial {trial_id} waits after epoch {epoch}: {others}; {running} train"
            )
        for trial_id, epoch in self._at_rungs.items():
            state = states.get(trial_id)
            if trial_id in at_rungs or trial_id not in ranked[epoch]:  # it still waits, or its epochs were deleted
                continue
            if state == "RUNNING":
                assert is_among_best(trial_id, epoch), (
                    f"trial {trial_id} trains on after epoch {epoch}: {ranked[epoch]}"
                )
            elif state == "PRUNED":
                assert is_complete, f"trial {trial_id} ended before all have started: {states}"
                assert not running, f"trial {trial_id} ended while others train: {states}"
                waiting = [(each, rung) for each, rung in self._at_rungs.items() if states.get(each) == "PRUNED"]
                better = [each for each in waiting if is_among_best(*each)]
                assert not better, f"(trial, epoch) {better} ended instead of training on"
        pruned = {each for each, state in states.items() if state == "PRUNED"}
        ended = pruned - (pruned if self._pruned is None else self._pruned)
        self._pruned = pruned
        if self._promotes:
            assert ended <= self._at_rungs.keys(), f"trials {ended - self._at_rungs.keys()} ended, and did not wait"
        self._at_rungs, self._running = at_rungs, running

    # --- at certain moments

    def check_stored_device_time(self, driver: Driver, missing_seconds: float) -> None:
        """At most so much of the device time of each claim of a driver's run is not stored."""
        for token in driver.tokens:
            (row,) = self._sql(f"SELECT seconds FROM hpo_usage WHERE token = {token}")
            missing = self._held_seconds(token) - row[0]
            assert missing <= missing_seconds + ROUNDING, f"{missing:.3f} s of claim {token} are not stored"

    def check_finished(self, driver: Driver) -> None:
        """A driver says that no run has or will get another trial."""
        rows = self._sql(
            "SELECT t.trial_id, CAST(t.state AS TEXT), h.run FROM trials t LEFT JOIN hpo_trials h ON h.trial = t.trial_id "
            f"WHERE t.study_id IN ({OURS})"
        )
        if not self._sql(OURS):
            return
        others = [row for row in rows if row[1] not in ENDED and row[2] != driver.run_id]
        is_excused = driver.excused_until == float("inf")
        assert is_excused or not others, f"{driver.name} says that the study is finished, but {others} are not"
        total = self._simulation.plan.trials + self._count_replaced()
        assert len(rows) == total, f"{driver.name} says finished after {len(rows)} trials"

    def check_poll(self, driver: Driver) -> None:
        """A driver that has nothing else to do finds no trial."""
        driver.polls = {orphan: driver.polls.get(orphan, 0) + 1 for orphan in self._orphaned}
        left = [orphan for orphan, polls in driver.polls.items() if polls >= MAX_POLLS]
        assert not left, f"{driver.name} waits, and (trial, run) {left} stay RUNNING although their runs have ended"

    def is_finished(self) -> bool:
        """Return whether every trial of the study has ended."""
        states = self._states()
        return len(states) >= self._simulation.plan.trials + self._count_replaced() and set(states) <= ENDED

    def check_end(self) -> None:
        """All drivers have ended."""
        self.check()
        states = Counter(self._states())
        assert set(states) <= ENDED, f"at the end, the trials are {dict(states)}"
        assert states.total() == self._simulation.plan.trials + self._count_replaced(), (
            f"{states.total()} trials at the end"
        )
        if self._promotes:
            assert states["COMPLETE"] or set(states) == {"FAIL"}, f"the best trial must train to its end: {states}"

    def _states(self) -> list[str]:
        return [row[0] for row in self._sql(f"SELECT CAST(state AS TEXT) FROM trials WHERE study_id IN ({OURS})")]

    def study_name(self) -> str:
        """Return the name of the study that the drivers search."""
        rows = self._sql(f"SELECT study_name FROM studies WHERE study_id IN ({OURS})")
        return str(rows[0][0]) if rows else "s"
