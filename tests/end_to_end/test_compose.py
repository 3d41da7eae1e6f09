"""docker-compose.yml without Docker: the file against the compose schema, and each service's own command run by hand."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from benchmarks.postgres import Postgres

ROOT = Path(__file__).parent.parent
PASSWORD = "a-password-of-the-env-file"
DASHBOARD_PASSWORD = "another-one"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    text = (ROOT / "docker-compose.yml").read_text()
    filled = re.sub(r"\$\{POSTGRES_PASSWORD:\?[^}]*\}", PASSWORD, text)
    filled = re.sub(r"\$\{DASHBOARD_PASSWORD:\?[^}]*\}", DASHBOARD_PASSWORD, filled)
    assert "${" not in filled
    found: dict[str, Any] = yaml.safe_load(filled)["services"]
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, services: dict[str, Any]) -> Postgres:
    """What the service `database` is: its user, its database, the password of .env, over TCP."""
    server = Postgres(tmp_path_factory.mktemp("compose", numbered=True), password=PASSWORD)
    wanted = services["database"]["environment"]
    assert wanted["POSTGRES_PASSWORD"] == PASSWORD
    server.create_database(wanted["POSTGRES_DB"])
    yield server
    server.stop()


def environment(services: dict[str, Any], name: str, server: Postgres) -> dict[str, str]:
    """The service's environment, with the compose network's name of the database replaced by this machine's."""
    there = {key: str(value) for key, value in services[name]["environment"].items()}
    there["HPO_STORAGE"] = there["HPO_STORAGE"].replace("@database:5432/", f"@127.0.0.1:{server.port}/")
    assert str(server.port) in there["HPO_STORAGE"]
    return {**os.environ, "PYTHONPATH": str(ROOT), **there}


def words(services: dict[str, Any], name: str, default_entrypoint: list[str]) -> list[str]:
    """The service's command line, with `hpo` run from this checkout."""
    whole = services[name].get("entrypoint", default_entrypoint) + services[name]["command"]
    assert whole[0] == "hpo"
    return [sys.executable, "-c", "from hpo.run import main; main()", *whole[1:]]


def entrypoint_of_image() -> list[str]:
    line = next(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("ENTRYPOINT"))
    found: list[str] = json.loads(line.removeprefix("ENTRYPOINT "))
    return found


def test_the_file_fits_the_compose_schema() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_there_is_no_default_password_and_nothing_is_published_beyond_this_machine(services: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    passwords = re.findall(r"(?:POSTGRES_PASSWORD|PGPASSWORD|HPO_DASHBOARD_PASSWORD): (.*)", text)
    assert len(passwords) == 3
    assert all(value.startswith(("${POSTGRES_PASSWORD:?", "${DASHBOARD_PASSWORD:?")) for value in passwords)
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    assert "ports" not in services["database"]
    assert services["database"]["volumes"] == ["database:/var/lib/postgresql"]
    shown = str([service.get(key) for service in services.values() for key in ("command", "ports")])
    assert PASSWORD not in shown
    assert DASHBOARD_PASSWORD not in shown
    assert "runs:/app/runs" in services["dashboard"]["volumes"], "the artifacts of the runs"


def test_the_health_check_succeeds_on_the_running_database(services: dict[str, Any], server: Postgres) -> None:
    kind, program, *options = services["database"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "pg_isready")
    command = [str(server.programs / program), *options]
    there = {**os.environ, "PGHOST": "127.0.0.1", "PGPORT": str(server.port)}
    assert subprocess.run(command, env=there, capture_output=True, check=False).returncode == 0
    server.stop()
    assert subprocess.run(command, env=there, capture_output=True, check=False).returncode != 0
    server.start()


def test_the_runner_stores_its_trials_in_postgresql_and_the_dashboard_serves_them(
    services: dict[str, Any], server: Postgres, tmp_path: Path
) -> None:
    (tmp_path / "search_spaces").symlink_to(ROOT / "search_spaces")
    runner = words(services, "hpo", entrypoint_of_image())
    assert runner[-2:] == ["run", "grid"]
    # `docker compose run --rm hpo quick ...` puts its own words in the place of the service's command.
    short = [*runner[:-1], "quick", "--set", "max_epochs=1", "--set", "data.train_samples=256"]
    done = subprocess.run(
        short, cwd=tmp_path, env=environment(services, "hpo", server), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    with psycopg.connect(server.url("hpo")) as connection:
        assert connection.execute("SELECT state, count(*) FROM trials GROUP BY state").fetchall() == [("COMPLETE", 3)]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = words(services, "dashboard", entrypoint_of_image())
    assert command[-4:] == ["--host", "0.0.0.0", "--port", "8080"]
    command[-3:] = ["127.0.0.1", "--port", str(port)]
    dashboard = subprocess.Popen(
        command, cwd=tmp_path, env=environment(services, "dashboard", server), stdout=subprocess.DEVNULL
    )
    try:
        studies = _get(f"http://127.0.0.1:{port}/api/studies")
        assert [study["study_name"] for study in studies["study_summaries"]] == ["quick"]
        detail = _get(f"http://127.0.0.1:{port}/api/studies/{studies['study_summaries'][0]['study_id']}?after=0")
        assert [trial["state"] for trial in detail["trials"]] == ["Complete"] * 3
        assert all(trial["intermediate_values"] for trial in detail["trials"])
        assert all("hpo replay quick" in trial["note"]["body"] for trial in detail["trials"])
        with pytest.raises(urllib.error.HTTPError, match="401"):
            _get(f"http://127.0.0.1:{port}/api/studies", password=PASSWORD)
    finally:
        dashboard.terminate()
        dashboard.wait()


def _get(url: str, password: str = DASHBOARD_PASSWORD) -> Any:
    deadline = time.monotonic() + 60
    login = "Basic " + base64.b64encode(f"hpo:{password}".encode()).decode()
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": login})) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
