"""docker-compose.yml without Docker: each service's own command runs on this machine, against a real PostgreSQL."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ruamel.yaml import YAML

from benchmarks.postgres import Postgres
from tests.factories import ROOT, TOY

PASSWORD = "a-password-of-the-env-file"
DASHBOARD_PASSWORD = "another-one"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services, with the passwords of a .env file filled in."""
    text = (ROOT / "docker-compose.yml").read_text()
    text = re.sub(r"\$\{POSTGRES_PASSWORD:\?[^}]*\}", PASSWORD, text)
    text = re.sub(r"\$\{DASHBOARD_PASSWORD:\?[^}]*\}", DASHBOARD_PASSWORD, text)
    assert "${" not in text
    services: dict[str, Any] = YAML(typ="safe").load(text)["services"]
    return services


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, services: dict[str, Any]) -> Iterator[Postgres]:
    """A PostgreSQL server with the user, the database and the password of the service `database`."""
    server = Postgres(tmp_path_factory.mktemp("compose"), password=PASSWORD)
    environment = services["database"]["environment"]
    assert environment["POSTGRES_PASSWORD"] == PASSWORD
    server.create_database(environment["POSTGRES_DB"])
    yield server
    server.stop()


def environment_of(services: dict[str, Any], name: str, server: Postgres) -> dict[str, str]:
    """A service's environment, with the address of `server` instead of the database's name in compose's network."""
    environment = {key: str(value) for key, value in services[name]["environment"].items()}
    environment["HPO_STORAGE"] = environment["HPO_STORAGE"].replace("@database:5432/", f"@127.0.0.1:{server.port}/")
    assert str(server.port) in environment["HPO_STORAGE"]
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}


def command_of(services: dict[str, Any], name: str) -> list[str]:
    """A service's command line, with `hpo` from this checkout."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    image_entrypoint = json.loads(re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)[-1])
    command = services[name].get("entrypoint", image_entrypoint) + services[name]["command"]
    assert command[0] == "hpo"
    return [sys.executable, "-m", *command]


@pytest.mark.slow
def test_the_file_conforms_to_the_compose_schema() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_there_is_no_default_password_and_no_port_is_published_beyond_this_machine(services: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    passwords = re.findall(r"(?:POSTGRES_PASSWORD|PGPASSWORD|HPO_DASHBOARD_PASSWORD): (.*)", text)
    assert len(passwords) == 3
    assert all(value.startswith(("${POSTGRES_PASSWORD:?", "${DASHBOARD_PASSWORD:?")) for value in passwords)
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    assert "ports" not in services["database"]
    visible = str([service.get(key) for service in services.values() for key in ("command", "ports")])
    assert PASSWORD not in visible
    assert DASHBOARD_PASSWORD not in visible


def test_data_survives_in_volumes_and_the_dashboard_reads_the_artifacts_of_the_searches(
    services: dict[str, Any],
) -> None:
    assert services["database"]["volumes"] == ["database:/var/lib/postgresql"]
    assert "runs:/app/runs" in services["hpo"]["volumes"]
    assert "runs:/app/runs" in services["dashboard"]["volumes"]


@pytest.mark.slow
@pytest.mark.postgres
def test_the_health_check_succeeds_only_while_the_database_runs(services: dict[str, Any], server: Postgres) -> None:
    kind, program, *options = services["database"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "pg_isready")
    command = [str(server.programs / program), *options]
    environment = {**os.environ, "PGHOST": "127.0.0.1", "PGPORT": str(server.port)}
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    server.stop()
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode != 0
    server.start()


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.ray
def test_a_search_stores_its_trials_in_postgresql_and_the_dashboard_serves_them(
    services: dict[str, Any], server: Postgres, tmp_path: Path
) -> None:
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces" / "toy.yaml").write_text(json.dumps(TOY))  # JSON is YAML

    command = command_of(services, "dashboard")
    assert command[-4:] == ["--host", "0.0.0.0", "--port", "8080"]
    command[-3:] = ["127.0.0.1", "--port", "0"]
    environment = environment_of(services, "dashboard", server)
    # The dashboard runs before the first search, as with `docker compose up`; its start takes as long as that of the search.
    dashboard = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        # `docker compose run --rm hpo toy` replaces the service's command, not its entrypoint.
        command = command_of(services, "hpo")
        assert command[-2:] == ["run", "grid"]
        environment = environment_of(services, "hpo", server)
        done = subprocess.run(
            [*command[:-1], "toy"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        with psycopg.connect(server.url("hpo")) as connection:
            states = connection.execute("SELECT state, count(*) FROM trials GROUP BY state").fetchall()
        assert states == [("COMPLETE", 2)]

        assert dashboard.stdout is not None
        match = re.match(r"(http://127\.0\.0\.1:\d+)/ shows ", dashboard.stdout.readline())
        assert match is not None
        url = match[1]
        studies = _get_json(f"{url}/api/studies")["study_summaries"]
        assert [study["study_name"] for study in studies] == ["toy"]
        trials = _get_json(f"{url}/api/studies/{studies[0]['study_id']}?after=0")["trials"]
        assert [trial["state"] for trial in trials] == ["Complete"] * 2
        assert all(trial["intermediate_values"] for trial in trials)
        assert all("hpo replay toy" in trial["note"]["body"] for trial in trials)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            _get_json(f"{url}/api/studies", password=PASSWORD)
    finally:
        dashboard.terminate()
        dashboard.communicate()


def _get_json(url: str, password: str = DASHBOARD_PASSWORD) -> Any:
    authorization = "Basic " + base64.b64encode(f"hpo:{password}".encode()).decode()
    request = urllib.request.Request(url, headers={"Authorization": authorization})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
