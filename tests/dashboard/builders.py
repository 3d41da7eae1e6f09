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

import optuna

from hpo.dashboard.server import build_server, listen
from hpo.paths import RunsDir
from hpo.space.model import Space
from storage.database import Database
from storage.run import Run
from storage.studies import Study, open_study

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
    settings = space_settings(name=name)
    study = open_study(database, name, direction="maximize", fingerprint="f", settings=settings)
    provenance = {"machine": "node-7", "code": "1.2", "python": "3"}
    with Run(study, config_key=lambda params: str(params["lr"]), provenance=provenance) as run:
        run.enqueue(POINTS, {"lr": optuna.distributions.FloatDistribution(0.0, 1.0)})
        for number in range(len(POINTS)):
            claim = run.claim()
            assert claim is not None
            assert claim.number == number
            run.record(claim, {}, {"device": "cuda", "device_name": "NVIDIA H200"})
            folder = runs_dir.trial(study.unique_name, number)
            folder.mkdir(parents=True)
            for epoch in range(1, {3: 3, 4: 1}.get(number, EPOCHS) + 1):
                metrics = metrics_of(number, epoch)
                run.report(claim, epoch, metrics, metrics["val_accuracy"])
            if number == 3:
                run.prune(claim)
            elif number == 4:
                (folder / "log.txt").write_text("printed by the script")
                run.fail(claim, REASON, "Traceback (most recent call last): ...")
            else:
                (folder / "epoch-000005.pt").write_bytes(CHECKPOINT if number == 2 else b"less")
                run.complete(claim, metrics["val_accuracy"], {"parent": 0} if number == 2 else {})
    return study


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
