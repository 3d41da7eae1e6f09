"""The dashboard: what it shows of our own, in a real browser, and who is let in."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from playwright.sync_api import Browser, Page, expect

from hpo import dashboard, figures, front
from hpo import run as command_line
from hpo.dashboard import publish
from hpo.errors import SettingError
from hpo.report.results import Results, read_results
from storage.database import Database, open_database
from storage.run import Run
from storage.studies import DUPLICATE, Study, find_study, open_study

EPOCHS = 5
PASSWORD = "päss word"
CHECKPOINT = b"all that trial 2 has learned"
REASON = "ValueError: <b>no</b> `such` path " + "/a/path or " * 30
POINTS = [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}, {"lr": 0.4}, {"lr": 0.5}]


def metrics_of(trial: int, epoch: int) -> dict[str, float]:
    accuracy = (1 - math.exp(-epoch)) * (0.5 + 0.1 * trial)
    both = {
        "val_accuracy": accuracy,
        "train_accuracy": accuracy + 0.01,
        "val_loss": 1 - accuracy,
        "train_loss": 0.9 - accuracy,
    }
    return both | {"epoch_seconds": 2.0, "images_per_second": 100.0}


def make_study(database: Database, runs_dir: Path, name: str = "search") -> Study:
    """A study as a run leaves it: trials 0 to 2 COMPLETE, 2 the best and a child of 0, 3 PRUNED, 4 FAIL with a log."""
    settings = {"metric": "val_accuracy", "trainable": "hpo.train:train", "seed": 7, "max_epochs": EPOCHS}
    study = open_study(database, name, direction="maximize", fingerprint="f", settings=settings)
    run = Run(
        study,
        config_key=lambda params: str(params["lr"]),
        provenance={"machine": "node-7", "code": "1.2", "python": "3"},
    )
    with run:
        run.enqueue(POINTS, {"lr": optuna.distributions.FloatDistribution(0.0, 1.0)})
        for number in range(len(POINTS)):
            claim = run.claim()
            assert claim is not None
            assert claim.number == number
            run.record(claim, {}, {"device": "cuda", "device_name": "NVIDIA H200"})
            folder = runs_dir / "checkpoints" / study.unique_name / str(number)
            folder.mkdir(parents=True)
            for epoch in range(1, (3 if number == 3 else 1 if number == 4 else EPOCHS) + 1):
                metrics = metrics_of(number, epoch)
                run.report(claim, epoch, metrics, metrics["val_accuracy"])
            if number == 3:
                run.prune(claim)
            elif number == 4:
                (folder / "log.txt").write_text("what it printed")
                run.fail(claim, REASON, "Traceback (most recent call last): ...")
            else:
                (folder / "epoch-000005.pt").write_bytes(CHECKPOINT if number == 2 else b"less")
                attrs = {"parent": 0} if number == 2 else {}
                run.complete(claim, metrics["val_accuracy"], attrs)
    return study


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        yield make_study(database, tmp_path)


def artifacts(study: Study) -> dict[str, tuple[str, str]]:
    """{file name: (the system attribute that names it, its identifier)} of what the dashboard lists."""
    found = {}
    for key, value in study.system_attrs().items():
        if "artifacts:" in key and json.loads(value) is not None:
            meta = json.loads(value)
            found[meta["filename"]] = (key, meta["artifact_id"])
    return found


# --- what is published ------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_the_failed_trials_log_and_the_curves_are_artifacts(study: Study, tmp_path: Path) -> None:
    publish(study, tmp_path)
    found = artifacts(study)
    assert set(found) == {"curves.png", "epoch-000005.pt", "log.txt"}
    folder = tmp_path / "artifacts"
    assert {path.name for path in folder.iterdir()} == {identifier for _, identifier in found.values()}
    key, identifier = found["epoch-000005.pt"]
    assert key.startswith("dashboard:artifacts:3:"), "trial 2 has trial_id 3"
    assert (folder / identifier).read_bytes() == CHECKPOINT
    original = tmp_path / "checkpoints" / study.unique_name / "2" / "epoch-000005.pt"
    assert (folder / identifier).samefile(original), "a second name, not a second copy"
    key, identifier = found["log.txt"]
    assert key.startswith("dashboard:artifacts:5:")
    log = (folder / identifier).read_text()
    for part in (REASON, "Traceback (most recent call last)", "what it printed"):
        assert part in log
    assert (folder / found["curves.png"][1]).read_bytes().startswith(b"\x89PNG")


def plots(study: Study) -> dict[str, Any]:
    """{identifier of a plot: plotly's JSON of it}."""
    parts: dict[str, dict[int, str]] = {}
    for key, value in study.system_attrs().items():
        if key.startswith("dashboard:plot_data:"):
            _, _, name, part = key.split(":")
            parts.setdefault(name, {})[int(part)] = value
    return {name: json.loads("".join(found[i] for i in sorted(found))) for name, found in parts.items()}


def lines_of_the_report(results: Results, metrics: list[str]) -> Any:
    figure = figures.plot_curves(results, metrics, figures.select_trials(results), {})
    return json.loads(figure.to_json())["data"]


def test_the_plots_have_the_curves_of_the_report(study: Study, tmp_path: Path) -> None:
    publish(study, tmp_path)
    found, results = plots(study), read_results(study)
    assert set(found) == {"accuracy", "loss"}
    for name, plot in found.items():
        assert plot["data"] == lines_of_the_report(results, [f"val_{name}", f"train_{name}"])
        assert plot["layout"]["title"]["text"].endswith("<sub>Solid: validation. Dashed: training.</sub>")


def test_whatever_a_trainable_reports_is_plotted(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        settings = {"metric": "f1 <b>", "trainable": "mine:train", "seed": 7, "max_epochs": 2}
        study = open_study(database, "theirs", direction="maximize", fingerprint="f", settings=settings)
        with Run(study, config_key=str, provenance={}) as run:
            run.enqueue([{"x": 0.5}], {"x": optuna.distributions.FloatDistribution(0.0, 1.0)})
            claim = run.claim()
            assert claim is not None
            for epoch in (1, 2):
                run.report(claim, epoch, {"f1 <b>": epoch / 4, "f1 [b]": 1.0, "rmse": 2.0 / epoch}, epoch / 4)
            run.complete(claim, 0.5)
        publish(study, tmp_path)
        found = plots(study)
        assert [plot["data"][0]["y"] for plot in found.values()] == [[0.25, 0.5], [1.0, 1.0], [2.0, 1.0]]
        assert list(found) == ["curves_f1__b_", "curves_f1__b__", "curves_rmse"]
        assert found["curves_f1__b_"]["layout"]["title"]["text"].startswith("F1 &lt;b&gt; over epochs")
        assert set(artifacts(study)) == {"curves.png"}


def test_of_a_large_study_the_best_trials_are_drawn_and_the_epochs_of_no_others_read(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "MAX_CURVES", 2)
    monkeypatch.setattr(Study, "metrics", lambda *_: pytest.fail("all epochs were read"))
    publish(study, tmp_path)
    assert {line["name"] for line in plots(study)["accuracy"]["data"]} == {"#1 lr 0.2", "#2 lr 0.3"}


def test_publishing_twice_adds_and_changes_nothing(study: Study, tmp_path: Path) -> None:
    publish(study, tmp_path)
    attrs, files = study.system_attrs(), sorted(path.name for path in (tmp_path / "artifacts").iterdir())
    publish(study, tmp_path, always=True)
    assert study.system_attrs() == attrs
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == files


def test_nothing_is_read_or_written_while_no_trial_has_ended_since(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(study, tmp_path)
    monkeypatch.setattr(dashboard, "_publish", lambda *_: pytest.fail("published again"))
    publish(study, tmp_path)
    with pytest.raises(pytest.fail.Exception):
        publish(study, tmp_path, always=True)


def test_what_the_user_has_edited_or_deleted_stays_so(study: Study, tmp_path: Path) -> None:
    publish(study, tmp_path)
    removed = {key: json.dumps(None) for key, _ in artifacts(study).values()}
    edited = {"dashboard:1:note_str:0": "my own words", "dashboard:1:note_ver": 2}
    study.set_system_attrs(removed | edited)
    publish(study, tmp_path, always=True)
    attrs = study.system_attrs()
    assert {key: attrs[key] for key in removed | edited} == removed | edited


def test_a_better_trial_takes_the_checkpoints_place(study: Study, tmp_path: Path) -> None:
    publish(study, tmp_path)
    _, before = artifacts(study)["epoch-000005.pt"]
    best = optuna.trial.create_trial(value=0.99, user_attrs={"fail_reason": ""})
    study.optuna_study.add_trial(best)
    folder = tmp_path / "checkpoints" / study.unique_name / "5"
    folder.mkdir()
    (folder / "epoch-000007.pt").write_bytes(b"better")
    publish(study, tmp_path)
    found = artifacts(study)
    assert "epoch-000005.pt" not in found
    assert not (tmp_path / "artifacts" / before).exists()
    assert (tmp_path / "artifacts" / found["epoch-000007.pt"][1]).read_bytes() == b"better"
    original = tmp_path / "checkpoints" / study.unique_name / "2" / "epoch-000005.pt"
    assert original.read_bytes() == CHECKPOINT, "only its second name is gone"


def test_a_note_says_what_where_and_how_long(study: Study) -> None:
    results = read_results(study)
    text = dashboard.note(results, results.trials[2])
    score = metrics_of(2, EPOCHS)["val_accuracy"]
    for part in (
        f"**COMPLETE** after 5 of 5 epochs: val_accuracy {score:.4f}",
        "`lr 0.3`",
        "`hpo.train:train`, seed 7, code `1.2`",
        "`node-7`, `NVIDIA H200 (cuda)`, Python 3",
        "10.0 s, 2.00 s an epoch",
        f"[trial 0](/dashboard/studies/{study.study_id}/trials?numbers=0)",
        "`hpo replay search 2`",
    ):
        assert part in text
    assert "Parent" not in dashboard.note(results, results.trials[1])
    assert "Failed" not in text
    failed = dashboard.note(results, results.trials[4])
    assert "".join(REASON.split()) in "".join(failed.split())
    assert max(map(len, failed.splitlines())) < 100


@pytest.mark.parametrize("text", ["plain", "a `b` c", "``", "```\n<script>", "`", ""])
def test_code_is_shown_as_it_is(text: str) -> None:
    quoted = dashboard._code(text, block=True)
    fence = quoted.split("\n", 1)[0]
    assert re.fullmatch("`{3,}", fence)
    assert quoted == f"{fence}\n{text}\n{fence}"
    assert fence not in text


def test_a_large_study_has_notes_on_the_best_and_the_failed_trials_only(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "MAX_NOTES", 12)
    for i in range(20):
        study.optuna_study.add_trial(optuna.trial.create_trial(value=i / 1000))
    publish(study, tmp_path)
    noted = {key.split(":")[1] for key in study.system_attrs() if key.endswith(":note_ver")}
    best = sorted((t for t in study.trials() if t.state.name == "COMPLETE"), key=lambda t: -(t.value or 0))
    assert noted == {"5"} | {str(trial._trial_id) for trial in best[:11]}
    study.optuna_study.add_trial(optuna.trial.create_trial(value=0.9999))
    study.optuna_study.add_trial(optuna.trial.create_trial(value=0.0001))
    publish(study, tmp_path)
    more = {key.split(":")[1] for key in study.system_attrs() if key.endswith(":note_ver")} - noted
    assert more == {str(study.trials()[25]._trial_id)}, "a new best one has its note however many there are"


def test_a_study_of_nothing_but_failures_has_notes_and_logs_but_no_curves(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        study = open_study(database, "failed", direction="minimize", fingerprint="f", settings={})
        for reason in ("it broke", DUPLICATE):
            failed = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"fail_reason": reason})
            study.optuna_study.add_trial(failed)
        publish(study, tmp_path)
        assert set(artifacts(study)) == {"log.txt"}
        assert [key for key in study.system_attrs() if key.endswith(":note_ver")] == ["dashboard:1:note_ver"]
        assert not any("plot_data" in key for key in study.system_attrs())


def test_an_error_is_a_warning_and_not_raised(study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "artifacts").write_text("a file in the place of the folder")
    with caplog.at_level(logging.WARNING, "hpo"):
        publish(study, tmp_path)
    assert "of search in the dashboard are not up to date: FileExistsError" in caplog.text
    (tmp_path / "artifacts").unlink()
    publish(study, tmp_path)
    assert len(artifacts(study)) == 3, "it is tried again"


def test_a_study_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as database:
        theirs = optuna.create_study(storage=database.optuna_storage, study_name="theirs")
        theirs.add_trial(optuna.trial.create_trial(value=1.0))
        study = find_study(database, "theirs")
        assert study is not None
        before = study.system_attrs()
        publish(study, tmp_path, always=True)
        assert study.system_attrs() == before


def test_postgresql_takes_it_too(url: str, tmp_path: Path) -> None:
    with open_database(url) as database:
        study = make_study(database, tmp_path)
        publish(study, tmp_path)
        publish(study, tmp_path, always=True)
        assert set(artifacts(study)) == {"curves.png", "epoch-000005.pt", "log.txt"}
        assert study.system_attrs()[dashboard.PUBLISHED] == 5


# --- who is let in ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(database: Database, runs_dir: Path, password: str | None = None) -> Iterator[int]:
    """Serve the dashboard in this process; the port."""
    listening = front.listen("127.0.0.1", 0)
    server = front.build_server(dashboard.build_app(database, password=password, runs_dir=runs_dir))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def request(
    port: int, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Mapping[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    content = None if body is None else json.dumps(body)
    try:
        connection.request(method, path, content, {"Content-Type": "application/json"} | named)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def basic(password: str, user: str = "anyone") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_with_a_password_nothing_is_answered_without_it(study: Study, tmp_path: Path) -> None:
    with served(study.database, tmp_path, PASSWORD) as port:
        paths = ("/", "/dashboard", "/api/studies", "/api/studies/1", "/static/bundle.js", "/artifacts/1/1", "/csv/1")
        for path in paths:
            status, headers, content = request(port, "GET", path)
            assert status == 401
            assert headers["WWW-Authenticate"].startswith("Basic ")
            assert b"search" not in content
        wrong = (basic("wrong"), basic(""), basic(PASSWORD + "x"), basic(PASSWORD[:-1]), "Basic", "Basic %%%", "Bearer x",
                 PASSWORD, basic(PASSWORD).replace("Basic", "Bearer"))  # fmt: skip
        for value in wrong:
            assert request(port, "DELETE", "/api/studies/1", Authorization=value.encode().decode("latin-1"))[0] == 401
        assert request(port, "DELETE", "/api/studies/1")[0] == 401
        assert find_study(study.database, "search") is not None
        status, _, content = request(port, "GET", "/api/studies", Authorization=basic(PASSWORD))
        assert status == 200
        assert json.loads(content)["study_summaries"][0]["study_name"] == "search"
        assert request(port, "GET", "/api/studies", Authorization=basic(PASSWORD), Host="gpu.example:80")[0] == 200
        foreign = {"Authorization": basic(PASSWORD), "Origin": "http://other.example"}
        assert request(port, "DELETE", "/api/studies/1", **foreign)[0] == 403
        assert find_study(study.database, "search") is not None
        assert request(port, "DELETE", "/api/studies/1", Authorization=basic(PASSWORD))[0] == 204
        assert find_study(study.database, "search") is None


def test_the_pages_of_other_sites_can_do_nothing(study: Study, tmp_path: Path) -> None:
    publish(study, tmp_path)
    with served(study.database, tmp_path) as port:
        own = f"127.0.0.1:{port}"
        for origin in ("http://other.example", "null", f"http://other.example:{port}", "http://127.0.0.1:1"):
            assert request(port, "DELETE", "/api/studies/1", Origin=origin)[0] == 403
            assert (
                request(port, "POST", "/api/studies", {"study_name": "x", "directions": ["maximize"]}, Origin=origin)[0]
                == 403
            )
            _, identifier = artifacts(study)["curves.png"]
            assert request(port, "GET", f"/artifacts/1/{identifier}", Origin=origin)[0] == 403
        for host in ("other.example", f"other.example:{port}", "127.0.0.1.other.example"):
            assert request(port, "GET", "/api/studies", Host=host)[0] == 400
            assert request(port, "DELETE", "/api/studies/1", Host=host, Origin=f"http://{host}")[0] == 400
        for host in (own, f"localhost:{port}", f"[::1]:{port}"):
            assert request(port, "GET", "/api/studies", Host=host)[0] == 200
        assert find_study(study.database, "search") is not None
        new = {"study_name": "x", "directions": ["maximize"]}
        assert request(port, "POST", "/api/studies", new, Origin=f"http://{own}")[0] == 201
        assert request(port, "DELETE", "/api/studies/1", Origin=f"http://{own}")[0] == 204


def test_answers_are_compressed_for_those_who_can_read_it(study: Study, tmp_path: Path) -> None:
    publish(study, tmp_path)
    with served(study.database, tmp_path) as port:
        _, headers, plain = request(port, "GET", "/api/studies/1?after=0", Accept_Encoding="identity")
        assert "Content-Encoding" not in headers
        _, headers, packed = request(port, "GET", "/api/studies/1?after=0", Accept_Encoding="gzip")
        assert headers["Content-Encoding"] == "gzip"
        assert len(packed) < len(plain) / 3
        assert json.loads(gzip.decompress(packed)) == json.loads(plain)
        # The dashboard brings its program compressed: not a second time.
        _, headers, bundle = request(port, "GET", "/static/bundle.js", Accept_Encoding="gzip")
        assert headers.get_all("Content-Encoding") == ["gzip"]  # type: ignore[attr-defined]
        assert b"plotly" in gzip.decompress(bundle)
        _, identifier = artifacts(study)["epoch-000005.pt"]
        _, headers, content = request(port, "GET", f"/artifacts/1/3/{identifier}", Accept_Encoding="gzip")
        assert "Content-Encoding" not in headers
        assert content == CHECKPOINT


def test_a_large_artifact_comes_and_goes_whole(study: Study, tmp_path: Path) -> None:
    content = bytes(range(256)) * 2**15  # 8 MiB
    with served(study.database, tmp_path) as port:
        file = {
            "file": "data:application/octet-stream;base64," + base64.b64encode(content).decode(),
            "filename": "a.bin",
        }
        status, _, answer = request(port, "POST", "/api/artifacts/1", file)
        assert status == 201
        identifier = json.loads(answer)["artifact_id"]
        assert request(port, "GET", f"/artifacts/1/{identifier}")[2] == content


def test_another_address_than_loopback_needs_a_password(study: Study, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "gpu.example"):
        with pytest.raises(SettingError, match="HPO_DASHBOARD_PASSWORD"):
            dashboard.serve(study.database, host, 0, password=None, runs_dir=tmp_path)
    assert all(front.is_loopback(host) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"))


def test_the_password_is_taken_out_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hpo", "--host", "0.0.0.0", "--storage", f"sqlite:///{tmp_path}/hpo.db"])
    for unset in ("", None):
        if unset is not None:
            monkeypatch.setenv("HPO_DASHBOARD_PASSWORD", unset)
        with pytest.raises(SystemExit, match="2"):
            command_line.main(["dashboard"])
        assert "set HPO_DASHBOARD_PASSWORD to the password" in capsys.readouterr().err
    monkeypatch.setenv("HPO_DASHBOARD_PASSWORD", PASSWORD)
    asked: list[str | None] = []
    monkeypatch.setattr(dashboard, "serve", lambda *_, password, **__: asked.append(password))
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["dashboard"])
    assert asked == [PASSWORD]
    assert "HPO_DASHBOARD_PASSWORD" not in os.environ


def test_an_address_that_cannot_be_listened_on_is_named(study: Study, tmp_path: Path) -> None:
    with front.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            SettingError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use; name another"
        ):
            dashboard.serve(study.database, "127.0.0.1", port, password=None, runs_dir=tmp_path)
    with pytest.raises(SettingError, match=r"cannot listen on no\.such\.invalid:80: "):
        dashboard.serve(study.database, "no.such.invalid", 80, password="p", runs_dir=tmp_path)
    with pytest.raises(SettingError, match="cannot listen on port 70000: --port is a number from 0 to 65535"):
        dashboard.serve(study.database, "127.0.0.1", 70000, password=None, runs_dir=tmp_path)


def test_the_served_dashboard_brings_studies_up_to_date(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()
    monkeypatch.setattr(stopped, "wait", lambda _seconds: stopped.set())
    other = make_study(study.database, tmp_path, "other")
    dashboard._keep_published(study.database, tmp_path, stopped)
    assert study.system_attrs()[dashboard.PUBLISHED] == other.system_attrs()[dashboard.PUBLISHED] == 5


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a dashboard with a published study (1) and the same one with nothing of ours (2)."""
    folder = tmp_path_factory.mktemp("dashboard")
    with open_database(f"sqlite:///{folder}/hpo.db") as database:
        publish(make_study(database, folder), folder)
        make_study(database, folder, "bare")
        with served(database, folder) as port:
            yield f"http://127.0.0.1:{port}", folder


@pytest.fixture(params=[1280, 390])
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    """A page of a browser's window, wide or narrow, in which nothing may go wrong."""
    context = browser.new_context(viewport={"width": request.param, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("response", lambda answer: errors.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    yield page
    context.close()
    assert errors == []


# How wide the page is: beyond the window's width, it would have to be scrolled sideways.
WIDTH = "document.documentElement.scrollWidth"


def assert_fits(page: Page, address: str, *, alone: bool = True) -> None:
    """The page is as wide as the window; where the dashboard itself is wider, as wide as without us.

    It is so in a narrow window, and (not `alone`) where a long attribute of a trial makes its own line.
    """
    ours = page.evaluate(WIDTH)
    window = page.viewport_size
    assert window is not None
    if window["width"] == 1280 and alone:
        assert ours <= 1280
    elif ours > window["width"]:
        page.goto(address.replace("/studies/1", "/studies/2"))
        page.wait_for_function(f"{WIDTH} >= {ours}")


def test_the_curves_are_plots_of_the_study(site: tuple[str, Path], page: Page) -> None:
    address = f"{site[0]}/dashboard/studies/1"
    page.goto(address)
    for title in ("Accuracy over epochs", "Loss over epochs"):
        plot = page.locator(".js-plotly-plot", has=page.locator(".gtitle", has_text=title))
        expect(plot).to_have_count(1)
        # Trial 4 failed after its first epoch: a point is no line.
        expect(plot.locator(".scatterlayer .trace path.js-line")).to_have_count(2 * (len(POINTS) - 1))
        expect(plot.locator(".scatterlayer .trace path.point")).to_have_count(2)
        for i in range(len(POINTS)):
            expect(plot.locator(".legendtext", has_text=f"#{i} lr 0.{i + 1}").first).to_be_attached()
        box, card = plot.locator(".nsewdrag").bounding_box(), plot.bounding_box()
        assert box is not None
        assert card is not None
        assert box["width"] > 0.4 * card["width"], "the legend leaves room for the curves"
    picture = page.locator('img[src^="/artifacts/1/"]')
    expect(picture).to_have_count(1)
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 500
    assert_fits(page, address)


def test_a_trial_has_its_note_and_its_artifacts(site: tuple[str, Path], page: Page) -> None:
    address = f"{site[0]}/dashboard/studies/1/trials?numbers="
    page.goto(address + "2")
    for words in (
        "COMPLETE after 5 of 5 epochs",
        "NVIDIA H200 (cuda)",
        "10.0 s, 2.00 s an epoch",
        "hpo replay search 2",
    ):
        expect(page.get_by_text(words)).to_be_visible()
    expect(page.get_by_text("epoch-000005.pt")).to_have_count(1)
    link = page.locator('a[href^="/artifacts/1/3/"]')
    assert link.first.evaluate("link => fetch(link.href).then(answer => answer.text())") == CHECKPOINT.decode()
    page.get_by_role("link", name="trial 0").click()
    expect(page.get_by_text("hpo replay search 0")).to_be_visible()
    expect(page.get_by_text("epoch-000005.pt")).to_have_count(0)
    assert_fits(page, address + "0")
    page.goto(address + "4")
    expect(page.get_by_text("FAIL after 1 of 5 epochs")).to_be_visible()
    expect(page.get_by_text("ValueError: <b>no</b> `such` path").first).to_be_visible()
    expect(page.get_by_text("log.txt")).to_have_count(1)
    link = page.locator('a[href^="/artifacts/1/5/"]')
    assert "what it printed" in link.first.evaluate("link => fetch(link.href).then(answer => answer.text())")
    assert_fits(page, address + "4", alone=False)
