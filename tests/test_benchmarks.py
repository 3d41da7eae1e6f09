"""The parts of benchmarks/ that tests rely on: the toy trainable, the check of a study of it, the faults of chaos."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from benchmarks.chaos import FAULTS, draw_plan, fallbacks
from benchmarks.guarantees import DUPLICATE, Expected, unfinished, violations
from benchmarks.proxy import Proxy
from benchmarks.toy import chain, expected_value, held_processes, hold_epochs
from hpo.space.model import load_space
from storage.database import open_database
from tests.factories import ROOT, search_without_ray, toy_space, wait_until


def values(max_epochs: int, checkpoint: dict[str, object] | None = None, **params: object) -> list[float]:
    reports = chain({"x": 1, **params}, data={}, seed=0, max_epochs=max_epochs, device="cpu", checkpoint=checkpoint)
    return [report.metrics["value"] for report in reports]


def test_a_chain_depends_on_every_epoch_before_it() -> None:
    whole = values(4)
    assert whole == [expected_value({"x": 1}, 0, epoch) for epoch in (1, 2, 3, 4)]
    *_, second = chain({"x": 1}, data={}, seed=0, max_epochs=2, device="cpu")
    assert values(4, second.state()) == whole[2:]
    assert values(4, second.state() | {"link": "another"}) != whole[2:]


def test_a_held_chain_waits_until_the_file_is_removed(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold_epochs(hold, 2)
    thread = threading.Thread(target=values, args=(3,), kwargs={"hold": str(hold)})
    thread.start()
    wait_until(lambda: bool(held_processes(hold)))
    assert thread.is_alive()
    hold.unlink()
    thread.join(timeout=10)
    assert not thread.is_alive()


EXPECTED = Expected([1, 2], 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a finished grid of two toy trials."""
    folder = tmp_path_factory.mktemp("finished")
    with open_database(f"sqlite:///{folder}/hpo.db") as database:
        search_without_ray(toy_space(folder), database, folder)
    return folder / "hpo.db"


@pytest.fixture
def url(finished: Path, tmp_path: Path) -> str:
    """A copy of `finished`."""
    shutil.copy(finished, tmp_path)
    return f"sqlite:///{tmp_path}/{finished.name}"


def change(url: str, *statements: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    engine.dispose()


def test_the_check_of_a_study_finds_nothing_in_a_whole_one(url: str) -> None:
    assert violations(url, EXPECTED) == []


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM hpo_metrics WHERE trial = 1 AND epoch = 2 AND name = 'value'",
        "UPDATE hpo_metrics SET value = value + 1e-9 WHERE trial = 2 AND epoch = 1 AND name = 'value'",
        "INSERT INTO hpo_metrics (trial, epoch, name, value) VALUES (1, 4, 'value', 0.5)",
        "UPDATE trials SET state = 'RUNNING' WHERE trial_id = 2",
        "UPDATE trials SET state = 'FAIL' WHERE trial_id = 2",
        "UPDATE trials SET state = 'PRUNED' WHERE trial_id = 2",
        "DELETE FROM trial_intermediate_values WHERE trial_id = 1 AND step = 3",
        "UPDATE trial_values SET value = 0.5 WHERE trial_id = 1",
        "DELETE FROM trial_values WHERE trial_id = 1",
        "DELETE FROM hpo_trials WHERE trial = 1",
    ],
)
def test_the_check_of_a_study_finds_each_kind_of_damage(url: str, damage: str) -> None:
    change(url, damage)
    assert len(violations(url, EXPECTED)) == 1


def test_the_check_of_a_study_finds_a_configuration_that_was_trained_twice(url: str) -> None:
    change(url, "UPDATE trial_params SET param_value = 0 WHERE param_name = 'x'")
    assert "2 trained trials have the x 1" in violations(url, EXPECTED)


def test_the_check_of_a_study_finds_a_configuration_of_another_space(url: str) -> None:
    assert violations(url, Expected([1, 3], 3)) == ["trial 1 (COMPLETE, x = 2) is not a configuration of the study"]


def test_the_check_of_a_study_counts_the_budget(url: str) -> None:
    assert violations(url, Expected(range(1, 10), 3, (2, 2))) == []
    assert violations(url, Expected(range(1, 10), 3, (3, 4))) == ["2 trials were trained, not 3 to 4"]
    assert violations(url, Expected(range(1, 10), 3, (1, 1))) == ["2 trials were trained, not 1 to 1"]


def test_a_pruned_trial_ends_after_an_epoch_at_which_the_scheduler_decides(url: str) -> None:
    change(
        url,
        "UPDATE trials SET state = 'PRUNED' WHERE trial_id = 1",
        "DELETE FROM hpo_metrics WHERE trial = 1 AND epoch = 3",
        "DELETE FROM trial_intermediate_values WHERE trial_id = 1 AND step = 3",
        f"UPDATE trial_values SET value = {expected_value({'x': 1}, 0, 2)!r} WHERE trial_id = 1",
    )
    assert violations(url, Expected([1, 2], 3, prunes_after={2})) == []
    assert violations(url, Expected([1, 2], 3, prunes_after={1})) == [
        "trial 0 (PRUNED, x = 1) was pruned after epoch 2"
    ]


def test_a_draw_that_was_a_duplicate_is_no_trial(url: str) -> None:
    expected = Expected([1, 2], 3, (1, 1))
    change(
        url,
        "UPDATE trials SET state = 'FAIL' WHERE trial_id = 2",
        f"INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (2, 'fail_reason', '\"{DUPLICATE}\"')",
    )
    assert violations(url, expected) == ["trial 1 (FAIL, x = 2) was drawn twice, and yet has a row or epochs"]
    change(
        url,
        "DELETE FROM hpo_metrics WHERE trial = 2",
        "DELETE FROM trial_intermediate_values WHERE trial_id = 2",
        "DELETE FROM hpo_trials WHERE trial = 2",
    )
    assert violations(url, expected) == []


def test_a_study_with_a_trial_that_waits_is_unfinished(url: str) -> None:
    assert unfinished(url, 2) == ""
    assert "with {'COMPLETE': 2} of 3 trials" in unfinished(url, 3)
    change(url, "UPDATE trials SET state = 'WAITING' WHERE trial_id = 2")
    assert "'WAITING': 1" in unfinished(url, 2)


# --- chaos ------------------------------------------------------------------------------------------------------------


def test_a_round_is_drawn_from_its_seed(tmp_path: Path) -> None:
    kinds = FAULTS["postgresql"]
    plans = [draw_plan(random.Random(f"0/{number}"), kinds) for number in range(100)]
    assert plans == [draw_plan(random.Random(f"0/{number}"), kinds) for number in range(100)]
    assert {fault.kind for plan in plans for fault in plan.faults} == set(kinds)
    combinations = {(plan.sampler, plan.scheduler) for plan in plans}
    assert len(combinations) == 16
    for number, plan in enumerate(plans):
        path = tmp_path / f"chaos-{number}.yaml"
        path.write_text(json.dumps(plan.space(tmp_path / "log")))
        assert load_space(str(path)).total_trials == (plan.budget or plan.trials)


def test_a_stopped_driver_outlasts_its_lease() -> None:
    for number in range(100):
        plan = draw_plan(random.Random(number), ["stop"])
        assert all(fault.seconds > plan.lease_seconds for fault in plan.faults)


@pytest.mark.parametrize(
    ("every", "lowest"),  # the first epoch that may be trained again after epoch 5
    [(1, 3), (2, 1), ("auto", 1)],
)
def test_epochs_before_the_last_complete_checkpoint_are_not_trained_again(every: int | str, lowest: int) -> None:
    for epoch in range(1, 6):
        found = fallbacks(f"5 1\n7 1\n5 2\n5 3\n5 4\n5 5\n5 {epoch}\n", every)
        assert bool(found) == (epoch < lowest), epoch
    assert fallbacks("5 1\n5 4\n5 1\n", 1) == ["the trial with x = 5 trained epoch 1 again after epoch 4"]


def test_a_driver_has_the_identity_and_the_lease_that_chaos_gives_it() -> None:
    code = """
import inspect, sys
sys.argv = ["driver", "far", "2.5", "--help"]
from benchmarks import driver
try:
    driver.main()
except SystemExit:
    from storage import lease
    from storage.run import Run
    print(lease.host_id(), inspect.signature(Run).parameters["lease_seconds"].default)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[0].startswith("Usage: hpo run")
    assert ended.stdout.splitlines()[-1] == "far 2.5"


@contextlib.contextmanager
def echoing() -> Iterator[tuple[Proxy, list[bytes]]]:
    """Yield a proxy in front of a server that answers each message with itself, and what the server received."""
    received: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(100):
                received.append(data)
                connection.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    proxy = Proxy(server.getsockname()[1])
    try:
        yield proxy, received
    finally:
        proxy.close()
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def is_silent(client: socket.socket) -> bool:
    client.settimeout(0.3)
    try:
        return client.recv(100) is None
    except TimeoutError:
        return True
    finally:
        client.settimeout(10)


def test_a_proxy_delivers_what_it_swallowed_when_it_recovers() -> None:
    with echoing() as (proxy, received), connect(proxy) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        proxy.swallow()
        client.sendall(b"late")
        with connect(proxy) as other:
            other.sendall(b"new")
            assert is_silent(client)
            assert is_silent(other)
            assert received == [b"before"]
            proxy.recover()
            assert client.recv(100) == b"late"
            assert other.recv(100) == b"new"


def test_a_proxy_forgets_what_it_swallowed_when_it_resets() -> None:
    with echoing() as (proxy, received), connect(proxy) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        proxy.swallow()
        client.sendall(b"lost")
        assert is_silent(client)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(100)
        with connect(proxy) as other:
            other.sendall(b"after")
            assert other.recv(100) == b"after"
        assert received == [b"before", b"after"]


def test_a_proxy_can_swallow_the_answers_only() -> None:
    with echoing() as (proxy, received), connect(proxy) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        proxy.swallow(only_answers=True)
        client.sendall(b"COMMIT")
        wait_until(lambda: received == [b"before", b"COMMIT"])
        assert is_silent(client)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(100)


def test_a_proxy_without_a_server_closes_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    proxy = Proxy(port)
    with connect(proxy) as client:
        assert client.recv(100) == b""
    proxy.close()
