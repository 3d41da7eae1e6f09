"""A scheduler that runs the threads of several simulated drivers one at a time, in an order that a seed decides.

Each thread runs until its next point of control: a statement, a commit, a lock, a wait. There it hands control back, and the
scheduler draws the next thread. Time is virtual: it moves only when every thread waits. So a seed decides everything that
happens, and a failing seed happens again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

REAL_SECONDS = 60.0  # a thread that does not come back within them is stuck outside of the simulation


class Killed(BaseException):
    """Raised in the threads of a driver that was killed."""


class Task:
    """A thread of a driver.

    Attributes:
        host: what the thread belongs to: it is killed and suspended with it.
        name: for the schedule.
        wakes: when the thread may run again, in virtual seconds.
        is_ready: whether it may run, apart from the time.
        is_done: whether it has ended.
    """

    def __init__(self, host: Any, name: str, target: Callable[[], None]) -> None:
        self.host = host
        self.name = name
        self.wakes = 0.0
        self.is_ready: Callable[[], bool] = lambda: True
        self.is_done = False
        self.waiting: list[Task] = []  # for its end
        self.is_blocked = False  # in a statement, which waits for a lock of the database
        self.go = threading.Semaphore(0)
        self.came_back = threading.Semaphore(0)
        self.thread = threading.Thread(target=target, daemon=True)
        self.error: BaseException | None = None


class Scheduler:
    """Runs tasks one at a time.

    Args:
        seed: decides the order.
        find_blocked: returns whether a task waits for a lock of the database; asked if a task does not come back.
        after_step: called after each step.

    Attributes:
        draw: the random numbers of the simulation.
        now: virtual seconds.
        steps: how many steps were run.
        log: a line for each step.
    """

    def __init__(self, seed: str, find_blocked: Callable[[Task], bool], after_step: Callable[[], None]) -> None:
        self.draw = random.Random(seed)
        self.now = 1_000_000.0
        self.steps = 0
        self.log: list[str] = []
        self.tasks: list[Task] = []
        self._find_blocked = find_blocked
        self._after_step = after_step
        self._by_thread: dict[int, Task] = {}

    def spawn(self, host: Any, name: str, target: Callable[[], None]) -> Task:
        """Add a task. It starts when it is drawn."""

        def run() -> None:
            self._by_thread[threading.get_ident()] = task
            task.go.acquire()
            try:
                self._raise_if_killed(task)
                target()
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001 # the simulation raises it
                task.error = error
            task.is_done = True
            self.wake(task.waiting)
            task.came_back.release()

        task = Task(host, name, run)
        task.wakes = self.now
        self.tasks.append(task)
        task.thread.start()
        return task

    @property
    def current(self) -> Task | None:
        """The task that runs this code; None outside of the simulation."""
        return self._by_thread.get(threading.get_ident())

    def hand_over(
        self,
        what: str,
        *,
        seconds: float = 0.0,
        is_ready: Callable[[], bool] = lambda: True,
        wakers: list[Task] | None = None,
    ) -> None:
        """Called by a task: let others run.

        Args:
            what: the task does next, for the schedule.
            seconds: until it may run again.
            is_ready: must be true, too, before it runs again.
            wakers: where the task is listed while it waits: `wake` ends the wait early.

        Raises:
            Killed: the task's driver was killed meanwhile.
        """
        task = self.current
        if task is None:
            return
        self._raise_if_killed(task)
        task.wakes, task.is_ready = self.now + seconds, is_ready
        task.next = what  # type: ignore[attr-defined]
        if wakers is not None:
            wakers.append(task)
        task.came_back.release()
        task.go.acquire()
        if wakers is not None:
            wakers.remove(task)
        self._raise_if_killed(task)

    def wake(self, waiting: list[Task]) -> None:
        """Let these tasks run again now."""
        for task in waiting:
            task.wakes = self.now

    @staticmethod
    def _raise_if_killed(task: Task) -> None:
        if task.host.is_killed:
            raise Killed

    def step(self) -> bool:
        """Run one task until it hands control over; return False if none is left."""
        living = [task for task in self.tasks if not task.is_done]
        self.tasks = living
        if not living:
            return False
        for task in living:
            if task.is_blocked and task.came_back.acquire(blocking=False):
                task.is_blocked = False
        free = [task for task in living if not task.is_blocked]
        ready = [task for task in free if self._may_run(task)]
        if not ready:
            times = [max(task.wakes, task.host.suspended_until) for task in free if task.is_ready()]
            future = [each for each in times if each > self.now]
            if future:
                self.now = min(future)
                return True
            assert any(task.is_blocked for task in living), "every task waits forever"
            time.sleep(0.001)
            return True
        task = self.draw.choice(ready)
        self.steps += 1
        self.log.append(f"{self.steps:4} {self.now - 1_000_000:8.2f} s  {task.name}: {getattr(task, 'next', 'starts')}")
        self.resume(task)
        self.settle()
        self._after_step()
        return True

    def _may_run(self, task: Task) -> bool:
        if task.host.is_killed:
            return True
        return self.now >= max(task.wakes, task.host.suspended_until) and task.is_ready()

    def resume(self, task: Task) -> None:
        """Let a task run until it hands control over."""
        task.go.release()
        deadline = time.monotonic() + REAL_SECONDS
        while not task.came_back.acquire(timeout=0.02):
            if self._find_blocked(task):
                task.is_blocked = True
                return
            assert time.monotonic() < deadline, f"{task.name} hangs in {getattr(task, 'next', 'its start')}"
        if task.error is not None:
            raise task.error

    def settle(self) -> None:
        """Wait for the tasks whose lock the last step released."""
        deadline = time.monotonic() + REAL_SECONDS
        for task in self.tasks:
            while task.is_blocked and not self._find_blocked(task):  # it may wait for the next lock a moment later
                if task.came_back.acquire(timeout=0.02):
                    task.is_blocked = False
                    if task.error is not None:
                        raise task.error
                assert time.monotonic() < deadline, f"{task.name} hangs in {getattr(task, 'next', 'its start')}"

    def drain(self) -> None:
        """Let the tasks of killed drivers end."""
        for task in self.tasks:
            while task.host.is_killed and not task.is_done and not task.is_blocked:
                task.go.release()
                assert task.came_back.acquire(timeout=REAL_SECONDS)


# --- what replaces `threading` and `time` in the modules under test -----------------------------------------------------


class SimulatedThreading:
    """Stands in for the module `threading`."""

    def __init__(self, scheduler: Callable[[], Scheduler]) -> None:
        class Thread:
            def __init__(self, target: Callable[[], None], name: str, daemon: bool) -> None:
                self._target, self._name = target, name

            def start(self) -> None:
                current = scheduler().current
                assert current is not None
                host = current.host
                self._task = scheduler().spawn(host, f"{host.name}/{self._name}", self._target)

            def join(self, timeout: float | None = None) -> None:
                if timeout is None:
                    scheduler().hand_over(f"join {self._name}", is_ready=lambda: self._task.is_done)
                elif not self._task.is_done:
                    scheduler().hand_over(f"join {self._name}", seconds=timeout, wakers=self._task.waiting)

            def is_alive(self) -> bool:
                return not self._task.is_done

        class Event:
            def __init__(self) -> None:
                self._is_set = False
                self._waiting: list[Task] = []

            def set(self) -> None:
                self._is_set = True
                scheduler().wake(self._waiting)

            def wait(self, timeout: float) -> bool:
                scheduler().hand_over("wait", seconds=0.0 if self._is_set else timeout, wakers=self._waiting)
                return self._is_set

        class Lock:
            def __init__(self) -> None:
                self._is_held = False

            def __enter__(self) -> None:
                if self._is_held:
                    scheduler().hand_over("lock", is_ready=lambda: not self._is_held)
                self._is_held = True

            def __exit__(self, *_: object) -> None:
                self._is_held = False

        self.Thread, self.Event, self.Lock = Thread, Event, Lock


class SimulatedTime:
    """Stands in for the module `time`."""

    def __init__(self, scheduler: Callable[[], Scheduler]) -> None:
        self._scheduler = scheduler

    def monotonic(self) -> float:
        """Virtual seconds."""
        return self._scheduler().now

    def sleep(self, seconds: float) -> None:
        """Let others run for so long."""
        self._scheduler().hand_over(f"sleep {seconds:g} s", seconds=seconds)
