"""Studies, a served dashboard and requests to it, for the tests of this package."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import threading
from collections.abc import Iterator
from email.message import Message
from typing import TYPE_CHECKING, Any

from hpo.dashboard.server import build_server, listen
from hpo.paths import RunsDir
from hpo.space.model import Space
from storage.database import Database
from storage.ownership import ClaimedTrial
from storage.run import Run
from storage.study import Study
from tests.factories import finish_study
from tests.storage.builders import prune

if TYPE_CHECKING:
    from starlette.applications import Starlette

EPOCHS = 5
PASSWORD = "päss word"
CHECKPOINT = b"the checkpoint of trial 2"
REASON = "ValueError: <b>no</b> `such` path " + "/a/path or " * 30
POINTS = [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}, {"lr": 0.4}, {"lr": 0.5}]


def space_settings(**changes: Any) -> dict[str, Any]:
    """The settings of a search space, as a study stores them."""
    settings = {
        "name": "search",
        "sampler": {"name": "random"},
        "trainable": "hpo.train:train",
        "seed": 7,
        "max_epochs": EPOCHS,
        "parameters": {"lr": {"type": "float", "low": 0.0, "high": 1.0}},
    }
    return Space.model_validate(settings | changes).model_dump(mode="json")


def metrics_of(number: int, epoch: int) -> dict[str, float]:
    """The metrics that a trial of `make_study` reports for an epoch."""
    accuracy = (1 - math.exp(-epoch)) * (0.5 + 0.1 * number)
    return {
        "val_accuracy": accuracy,
        "train_accuracy": accuracy + 0.01,
        "val_loss": 1 - accuracy,
        "train_loss": 0.9 - accuracy,
        "epoch_seconds": 2.0,
        "images_per_second": 100.0,
    }


def make_study(database: Database, runs_dir: RunsDir, name: str = "search") -> Study:
    """A study as a run leaves it.

    Trials 0 to 2 are COMPLETE: 2 is the best and a child of 0. Trial 3 is PRUNED, trial 4 is FAIL and has a log.
    """
    lengths = {3: 3, 4: 1}

    def epochs_of(claim: ClaimedTrial) -> list[dict[str, float]]:
        return [metrics_of(claim.number, epoch) for epoch in range(1, lengths.get(claim.number, EPOCHS) + 1)]

    def end(run: Run, claim: ClaimedTrial, value: float) -> None:
        folder = runs_dir.trial(run.study.unique_name, claim.number)
        folder.mkdir(parents=True)
        if claim.number == 3:
            prune(run, claim)
        elif claim.number == 4:
            (folder / "log.txt").write_text("printed by the script")
            run.fail(claim, REASON, "Traceback (most recent call last): ...")
        else:
            (folder / "epoch-000005.pt").write_bytes(CHECKPOINT if claim.number == 2 else b"less")
            run.complete(claim, value, {"parent": 0} if claim.number == 2 else {})

    return finish_study(
        database,
        Space.model_validate(space_settings(name=name)),
        POINTS,
        provenance={"machine": "node-7", "code": "1.2", "python": "3"},
        device={"device": "cuda", "device_name": "NVIDIA H200"},
        epochs_of=epochs_of,
        end=end,
    )


def listed_artifacts(study: Study) -> dict[str, tuple[str, str]]:
    """{file name: (key of the system attribute, artifact id)} of the artifacts that the dashboard lists."""
    found = {}
    for key, value in study.system_attrs().items():
        if "artifacts:" in key and json.loads(value) is not None:
            metadata = json.loads(value)
            found[metadata["filename"]] = (key, metadata["artifact_id"])
    return found


@contextlib.contextmanager
def serving(app: Starlette) -> Iterator[int]:
    """Serve an application in this process; yield its port."""
    listener = listen("127.0.0.1", 0)
    server = build_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def request(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Message, bytes]:
    """Send a request with a JSON body; return status, headers and content."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    content = None if body is None else json.dumps(body)
    try:
        connection.request(method, path, content, {"Content-Type": "application/json"} | named)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def basic_auth(password: str, user: str = "anyone") -> str:
    """The value of the Authorization header."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
