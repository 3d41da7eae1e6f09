from __future__ import annotations

import base64
import gzip
import http.client
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpo import run as command_line
from hpo.dashboard import server
from hpo.dashboard.access import Access
from hpo.dashboard.publishing import PUBLISHED, publish
from hpo.dashboard.server import Certificate, build_app, build_server, listen, publish_repeatedly, serve
from hpo.errors import SettingError
from hpo.paths import RunsDir
from storage.database import Database
from storage.studies import find_study
from storage.study import Study
from tests.dashboard.builders import CHECKPOINT, PASSWORD, basic_auth, listed_artifacts, make_study, request, serving


@pytest.mark.slow
def test_studies_are_listed_and_deleted_with_the_password_only(study: Study, runs_dir: RunsDir) -> None:
    auth = {"Authorization": basic_auth(PASSWORD)}
    with serving(build_app(study.database, access=Access(PASSWORD), runs_dir=runs_dir)) as port:
        assert request(port, "GET", "/api/studies")[0] == 401
        assert request(port, "DELETE", "/api/studies/1")[0] == 401
        assert request(port, "GET", "/api/studies", Host="gpu.example:80", **auth)[0] == 200
        status, _, content = request(port, "GET", "/api/studies", **auth)
        assert status == 200
        assert json.loads(content)["study_summaries"][0]["study_name"] == "search"
        assert request(port, "DELETE", "/api/studies/1", Origin="http://other.example", **auth)[0] == 403
        assert find_study(study.database, "search") is not None
        assert request(port, "DELETE", "/api/studies/1", **auth)[0] == 204
        assert find_study(study.database, "search") is None


@pytest.mark.slow
def test_without_a_password_only_this_machine_and_the_dashboards_own_pages_are_served(
    study: Study, runs_dir: RunsDir
) -> None:
    new_study = {"study_name": "x", "directions": ["maximize"]}
    with serving(build_app(study.database, runs_dir=runs_dir)) as port:
        assert request(port, "POST", "/api/studies", new_study, Origin="http://other.example")[0] == 403
        assert request(port, "DELETE", "/api/studies/1", Origin="http://other.example")[0] == 403
        assert request(port, "GET", "/api/studies", Host="other.example")[0] == 400
        assert find_study(study.database, "search") is not None
        own = {"Origin": f"http://127.0.0.1:{port}"}
        assert request(port, "POST", "/api/studies", new_study, **own)[0] == 201
        assert request(port, "DELETE", "/api/studies/1", **own)[0] == 204


@pytest.mark.slow
def test_the_dashboard_is_compressed_once_and_its_artifacts_are_served_unchanged(
    study: Study, runs_dir: RunsDir
) -> None:
    publish(study, runs_dir)
    with serving(build_app(study.database, runs_dir=runs_dir)) as port:
        _, headers, content = request(port, "GET", "/api/studies/1?after=0", Accept_Encoding="gzip")
        assert headers["Content-Encoding"] == "gzip"
        assert len(json.loads(gzip.decompress(content))["trials"]) == 5
        # optuna-dashboard ships its JavaScript compressed.
        _, headers, bundle = request(port, "GET", "/static/bundle.js", Accept_Encoding="gzip")
        assert headers.get_all("Content-Encoding") == ["gzip"]
        assert b"plotly" in gzip.decompress(bundle)
        _, artifact_id = listed_artifacts(study)["epoch-000005.pt"]
        assert request(port, "GET", f"/artifacts/1/3/{artifact_id}", Accept_Encoding="gzip")[2] == CHECKPOINT
        _, artifact_id = listed_artifacts(study)["curves.png"]
        assert request(port, "GET", f"/artifacts/1/{artifact_id}", Origin="http://other.example")[0] == 403


@pytest.mark.slow
def test_a_large_artifact_is_uploaded_and_downloaded_unchanged(study: Study, runs_dir: RunsDir) -> None:
    content = bytes(range(256)) * 2**15  # 8 MiB
    data = "data:application/octet-stream;base64," + base64.b64encode(content).decode()
    with serving(build_app(study.database, runs_dir=runs_dir)) as port:
        status, _, response = request(port, "POST", "/api/artifacts/1", {"file": data, "filename": "a.bin"})
        assert status == 201
        artifact_id = json.loads(response)["artifact_id"]
        assert request(port, "GET", f"/artifacts/1/{artifact_id}")[2] == content


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "gpu.example"])
def test_an_address_that_other_machines_reach_requires_a_password(
    database: Database, runs_dir: RunsDir, host: str
) -> None:
    with pytest.raises(SettingError, match=r"anyone who can reach .* set HPO_DASHBOARD_PASSWORD"):
        serve(database, host, 0, access=Access(), runs_dir=runs_dir)


def test_an_address_that_cannot_be_listened_on_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        message = rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use; choose another --host or --port"
        with pytest.raises(SettingError, match=message):
            listen("127.0.0.1", port)
    with pytest.raises(SettingError, match=r"cannot listen on no\.such\.invalid:80: "):
        listen("no.such.invalid", 80)
    with pytest.raises(SettingError, match="cannot listen on port 70000: --port is a number from 0 to 65535"):
        listen("127.0.0.1", 70000)


class _StoppedServer:
    """Stands in for uvicorn's server: it stops as soon as it runs."""

    def run(self, **_: object) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_the_url_is_printed_with_the_port_that_is_used(
    database: Database,
    runs_dir: RunsDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str,
    shown: str,
) -> None:
    monkeypatch.setattr(server, "build_app", lambda *_, **__: None)
    monkeypatch.setattr(server, "build_server", lambda *_: _StoppedServer())
    monkeypatch.setattr(server, "publish_repeatedly", lambda *_: None)
    with listen(host, 0) as free:
        port = free.getsockname()[1]
    serve(database, host, port, access=Access(), runs_dir=runs_dir)
    printed = capsys.readouterr().out
    assert re.fullmatch(
        rf"http://{re.escape(shown)}:{port}/\?token=[\w-]{{32}} shows {re.escape(database.url)}; Ctrl-C stops it\n",
        printed,
    )
    serve(database, host, port, access=Access(), runs_dir=runs_dir)
    assert capsys.readouterr().out != printed, "each start has another token"
    serve(database, host, port, access=Access(PASSWORD), runs_dir=runs_dir)
    assert capsys.readouterr().out == f"http://{shown}:{port}/ shows {database.url}; Ctrl-C stops it\n"


def test_port_0_takes_a_free_port(
    database: Database, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "build_app", lambda *_, **__: None)
    monkeypatch.setattr(server, "build_server", lambda *_: _StoppedServer())
    monkeypatch.setattr(server, "publish_repeatedly", lambda *_: None)
    serve(database, "127.0.0.1", 0, access=Access(), runs_dir=runs_dir)
    assert "http://127.0.0.1:0/" not in capsys.readouterr().out


@pytest.mark.parametrize("password", ["", None])
def test_an_unset_or_empty_password_variable_is_no_password(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path_as_current: None,
    password: str | None,
) -> None:
    if password is not None:
        monkeypatch.setenv("HPO_DASHBOARD_PASSWORD", password)
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["dashboard"])
    assert "set HPO_DASHBOARD_PASSWORD to the password" in capsys.readouterr().err


def test_the_password_is_removed_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_as_current: None
) -> None:
    monkeypatch.setenv("HPO_DASHBOARD_PASSWORD", PASSWORD)
    monkeypatch.setenv("HPO_DASHBOARD_READER_PASSWORD", "looks")
    given: list[Access] = []
    monkeypatch.setattr(server, "serve", lambda *_, access, **__: given.append(access))
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["dashboard"])
    assert given == [Access(PASSWORD, "looks")]
    assert not [name for name in os.environ if name.startswith("HPO_DASHBOARD")]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A certificate for 127.0.0.1 that it has signed itself."""
    folder = tmp_path_factory.mktemp("certificate")
    found = Certificate(folder / "cert.pem", folder / "key.pem")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run(
        [*command.split(), "-keyout", str(found.keyfile), "-out", str(found.certfile)], check=True, capture_output=True
    )
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_the_dashboard_is_served_by_https(study: Study, runs_dir: RunsDir, certificate: Certificate) -> None:
    app = build_app(study.database, access=Access(token="t" * 20), runs_dir=runs_dir)
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        https = build_server(app, certificate)
        thread = threading.Thread(target=https.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            context = ssl.create_default_context(cafile=str(certificate.certfile))
            connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=60)
            connection.request("GET", f"/?token={'t' * 20}")
            answer = connection.getresponse()
            assert answer.status == 303
            assert "Secure" in answer.headers["Set-Cookie"]
            answer.close()
            connection.close()
        finally:
            https.should_exit = True
            thread.join()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_certificate_that_cannot_be_used_is_one_message(
    database: Database, runs_dir: RunsDir, certificate: Certificate, tmp_path: Path
) -> None:
    certificate.check()
    for wrong in (Certificate(tmp_path / "no.pem"), Certificate(certificate.certfile), Certificate(Path(__file__))):
        with pytest.raises(
            SettingError, match=r"the certificate in .* cannot be used .*: give a PEM file with its key"
        ):
            serve(database, "127.0.0.1", 0, access=Access(), runs_dir=runs_dir, certificate=wrong)


def test_what_is_logged_is_one_printable_line(
    database: Database, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Logs(_StoppedServer):
        def run(self, **_: object) -> None:
            server.logger.info("DELETE %s", "/\x1b[31m\nfaked")
            super().run()

    monkeypatch.setattr(server, "build_app", lambda *_, **__: None)
    monkeypatch.setattr(server, "build_server", lambda *_: Logs())
    monkeypatch.setattr(server, "publish_repeatedly", lambda *_: None)
    serve(database, "127.0.0.1", 0, access=Access(), runs_dir=runs_dir)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d DELETE /\[31m faked\n", capsys.readouterr().err)


@pytest.fixture
def tmp_path_as_current(runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `hpo dashboard --host 0.0.0.0` in an empty folder, without a password in the environment."""
    monkeypatch.chdir(runs_dir.root)
    monkeypatch.delenv("HPO_DASHBOARD_PASSWORD", raising=False)
    monkeypatch.setattr(sys, "argv", ["hpo", "--host", "0.0.0.0", "--storage", "sqlite:///hpo.db"])


@pytest.mark.slow
def test_the_server_publishes_every_study(study: Study, runs_dir: RunsDir, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()
    monkeypatch.setattr(stopped, "wait", lambda _seconds: stopped.set())
    other = make_study(study.database, runs_dir, "other")
    publish_repeatedly(study.database, runs_dir, stopped)
    assert study.system_attrs()[PUBLISHED] == other.system_attrs()[PUBLISHED] == 5
