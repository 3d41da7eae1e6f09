"""docker-compose.yml without Docker: each service's own command runs on this machine, against a real PostgreSQL."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from ruamel.yaml import YAML

from benchmarks.postgres import Postgres
from storage.database import open_database
from tests.factories import ROOT, TOY, wait_until

RAY_SERVICES = ("head", "worker", "gpu-worker", "search")


@dataclass(frozen=True)
class Compose:
    """docker-compose.yml, and the secrets that deploy/make-secrets.sh has created for it."""

    file: dict[str, Any]
    secrets: Path

    @property
    def services(self) -> dict[str, Any]:
        services: dict[str, Any] = self.file["services"]
        return services

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text().strip()


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Compose:
    folder = tmp_path_factory.mktemp("compose")
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    for _ in range(2):
        done = subprocess.run(["sh", "deploy/make-secrets.sh"], cwd=folder, capture_output=True, text=True, check=True)
    compose = Compose(YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text()), folder / "secrets")
    assert done.stdout.strip().endswith(compose.secret("dashboard_password")), "the second run keeps the first one's"
    return compose


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, compose: Compose) -> Iterator[Postgres]:
    """A PostgreSQL server with the database of the service `database`, in which deploy/roles.sh has created the roles."""
    server = Postgres(tmp_path_factory.mktemp("server"), password=compose.secret("superuser_password"))
    database = compose.services["database"]["environment"]["POSTGRES_DB"]
    server.create_database(database)
    environment = {
        "PATH": f"{server.programs}:{os.environ['PATH']}",
        "SECRETS": str(compose.secrets),
        "POSTGRES_USER": "hpo",
        "POSTGRES_DB": database,
        "PGHOST": "127.0.0.1",
        "PGPORT": str(server.port),
        "PGPASSWORD": server.password,
    }
    done = subprocess.run(
        ["sh", str(ROOT / "deploy/roles.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    yield server
    server.stop()


def url_of(compose: Compose, role: str, server: Postgres) -> str:
    """The URL of a role, with the address of `server` instead of the database's name in compose's network."""
    url = compose.secret(f"{role}_url")
    assert "@database:5432/hpo" in url
    return url.replace("@database:5432/", f"@127.0.0.1:{server.port}/")


def environment_of(compose: Compose, name: str, server: Postgres, folder: Path) -> dict[str, str]:
    """A service's environment. Its secrets are files in a folder, as compose mounts them: only those that it lists."""
    folder.mkdir()
    for secret in compose.services[name]["secrets"]:
        content = compose.secret(secret)
        is_url = secret.endswith("_url")
        (folder / secret).write_text(url_of(compose, secret.removesuffix("_url"), server) if is_url else content)
    variables = compose.services[name]["environment"]
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **{key: str(value).replace("/run/secrets", str(folder)) for key, value in variables.items()},
    }


def command_of(compose: Compose, name: str) -> list[str]:
    """A service's command line, with `hpo` from this checkout."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    image_entrypoint = json.loads(re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)[-1])
    service = compose.services[name]
    command = service.get("entrypoint", image_entrypoint) + service["command"]
    if command[0] != "hpo":
        return [each.replace("$$", "$") for each in command]
    return [sys.executable, "-m", *command]


@pytest.mark.slow
def test_the_file_conforms_to_the_compose_schema() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_password_is_in_the_file_and_no_port_is_published_beyond_this_machine(compose: Compose) -> None:
    for name, service in compose.services.items():
        variables = service["environment"]
        if name in RAY_SERVICES:
            assert variables["RAY_AUTH_MODE"] == "token"
            assert "ports" not in service
        assert [name for name in variables if "PASSWORD" in name and not name.endswith("_FILE")] == []
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "ports" not in compose.services["database"]
    used = {secret for service in compose.services.values() for secret in service["secrets"]}
    assert used == set(compose.file["secrets"]) == {path.name for path in compose.secrets.iterdir()}
    assert [name for name, service in compose.services.items() if "superuser_password" in service["secrets"]] == [
        "database"
    ]
    assert compose.secrets.stat().st_mode & 0o777 == 0o700
    assert "/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_services_are_hardened_and_only_the_front_is_reached(compose: Compose) -> None:
    for name, service in compose.services.items():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        assert service["mem_limit"]
        assert ("cap_add" in service) == (name == "database")
    networks = {name: set(service["networks"]) for name, service in compose.services.items()}
    assert networks == {
        "database": {"database"},
        "migrate": {"database"},
        "dashboard": {"database", "front"},
        "hpo": {"database", "front"},
        "head": {"ray"},
        "worker": {"ray"},
        "gpu-worker": {"ray"},
        "search": {"database", "ray"},
    }
    assert compose.file["networks"]["database"] == {"internal": True}


def test_services_that_train_have_time_to_end_their_epochs(compose: Compose) -> None:
    """Docker would kill them after 10 s. A node of Ray is drained for 30 s at most."""
    grace = {name: service.get("stop_grace_period") for name, service in compose.services.items()}
    assert {name: period for name, period in grace.items() if period} == {
        "hpo": "10m",
        "search": "10m",
        "worker": "1m",
        "gpu-worker": "1m",
    }


def test_data_survives_in_volumes_and_the_dashboard_reads_the_artifacts_of_the_searches(compose: Compose) -> None:
    assert "database:/var/lib/postgresql" in compose.services["database"]["volumes"]
    for name in ("hpo", "search", "worker", "gpu-worker"):
        assert {"runs:/app/runs", "data:/app/data"} <= set(compose.services[name]["volumes"]), name
    assert "runs:/app/runs" in compose.services["dashboard"]["volumes"]


@pytest.mark.slow
@pytest.mark.postgres
def test_the_health_check_succeeds_only_while_the_database_runs(compose: Compose, server: Postgres) -> None:
    kind, program, *options = compose.services["database"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "pg_isready")
    command = [str(server.programs / program), *options]
    environment = {**os.environ, "PGPORT": str(server.port)}
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    server.stop()
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode != 0
    server.start()


FORBIDDEN_TO_ALL = [
    "CREATE ROLE intruder",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY (SELECT 1) TO '/tmp/intruder'",
    "SELECT rolpassword FROM pg_authid",
    "ALTER ROLE hpo_owner SUPERUSER",
    "CREATE SCHEMA intruder",
    "CREATE TEMP TABLE intruder (x INT)",
    "SELECT lo_from_bytea(0, 'intruder')",
    "SELECT lo_create(0)",
    "SELECT lo_creat(-1)",
    "SELECT lo_import('/etc/passwd')",
    "SELECT lo_export(0, '/tmp/intruder')",
]
VERSIONS = ("hpo_schema", "alembic_version", "version_info")
FORBIDDEN_TO_USERS = [
    "CREATE TABLE intruder (x INT)",
    "ALTER TABLE trials ADD COLUMN intruder INT",
    "DROP TABLE hpo_metrics",
    "TRUNCATE trials CASCADE",
    "DROP TRIGGER hpo_study_deleted ON studies",
    "CREATE FUNCTION intruder() RETURNS INT LANGUAGE sql AS 'SELECT 1'",
    *(f"DELETE FROM {table}" for table in VERSIONS),
    "UPDATE hpo_schema SET version = 99",
    "INSERT INTO hpo_schema VALUES (99)",
    "UPDATE alembic_version SET version_num = 'x'",
    "UPDATE version_info SET library_version = 'x'",
    "SELECT * FROM hpo_schema FOR UPDATE",
    "DROP EVENT TRIGGER keep_versions",
]


@pytest.mark.slow
@pytest.mark.postgres
def test_each_role_is_refused_what_it_does_not_need(compose: Compose, server: Postgres) -> None:
    open_database(url_of(compose, "owner", server)).close()  # what the service `migrate` does
    forbidden = {
        "owner": FORBIDDEN_TO_ALL,
        "runner": FORBIDDEN_TO_ALL + FORBIDDEN_TO_USERS,
        "dashboard": FORBIDDEN_TO_ALL + FORBIDDEN_TO_USERS,
    }
    for role, statements in forbidden.items():
        with psycopg.connect(url_of(compose, role, server), autocommit=True) as connection:
            for statement in statements:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement.encode())
            if role != "owner":
                for table in VERSIONS:
                    connection.execute(f"SELECT * FROM {table}".encode())
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(url_of(compose, role, server), dbname="postgres")


@pytest.mark.slow
@pytest.mark.postgres
def test_roles_write_to_tables_of_later_versions_and_never_to_those_of_the_versions(
    compose: Compose, server: Postgres
) -> None:
    open_database(url_of(compose, "owner", server)).close()
    with psycopg.connect(url_of(compose, "owner", server)) as owner:
        owner.execute("CREATE TABLE hpo_later (x INT)")
        owner.execute("DROP TABLE version_info")
        owner.execute("CREATE TABLE version_info AS SELECT 1 AS version_info_id")
        for role in ("hpo_runner", "hpo_dashboard"):
            for table, allowed in (("hpo_later", True), *((table, False) for table in VERSIONS)):
                for right in ("INSERT", "UPDATE", "DELETE"):
                    has_right = owner.execute("SELECT has_table_privilege(%s, %s, %s)", (role, table, right)).fetchone()
                    assert has_right == (allowed,), (role, table, right)
        owner.rollback()


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.ray
def test_a_search_stores_its_trials_in_postgresql_and_the_dashboard_serves_them(
    compose: Compose, server: Postgres, tmp_path: Path
) -> None:
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces" / "toy.yaml").write_text(json.dumps(TOY))  # JSON is YAML

    command, environment = (
        command_of(compose, "migrate"),
        environment_of(compose, "migrate", server, tmp_path / "owner"),
    )
    migrated = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert migrated.returncode == 0, migrated.stderr
    command = command_of(compose, "dashboard")
    assert command[-4:] == ["--host", "0.0.0.0", "--port", "8080"]
    command[-3:] = ["127.0.0.1", "--port", "0"]
    environment = environment_of(compose, "dashboard", server, tmp_path / "of_dashboard")
    # The dashboard runs before the first search, as with `docker compose up`; its start takes as long as that of the search.
    dashboard = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        # `docker compose run --rm hpo toy` replaces the service's command, not its entrypoint.
        command = command_of(compose, "hpo")
        assert command[-2:] == ["run", "grid"]
        environment = environment_of(compose, "hpo", server, tmp_path / "of_hpo")
        done = subprocess.run(
            [*command[:-1], "toy"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert compose.secret("runner_url").split(":")[2].split("@")[0] not in done.stdout + done.stderr
        with psycopg.connect(server.url("hpo")) as connection:
            states = connection.execute("SELECT state, count(*) FROM trials GROUP BY state").fetchall()
        assert states == [("COMPLETE", 2)]

        assert dashboard.stdout is not None
        match = re.match(r"(http://127\.0\.0\.1:\d+)/ shows ", dashboard.stdout.readline())
        assert match is not None
        url = match[1]
        password = compose.secret("dashboard_password")
        studies = _get_json(f"{url}/api/studies", password)["study_summaries"]
        assert [study["study_name"] for study in studies] == ["toy"]
        trials = _get_json(f"{url}/api/studies/{studies[0]['study_id']}?after=0", password)["trials"]
        assert [trial["state"] for trial in trials] == ["Complete"] * 2
        assert all(trial["intermediate_values"] for trial in trials)
        assert all("hpo replay toy" in trial["note"]["body"] for trial in trials)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            _get_json(f"{url}/api/studies", server.password)
    finally:
        dashboard.terminate()
        dashboard.communicate()


class Nodes:
    """Containers of Ray, as processes on this machine: one temporary folder, in which all of them are found at the end."""

    def __init__(self, compose: Compose, server: Postgres, folder: Path) -> None:
        self.compose, self.server, self.folder = compose, server, folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.session = tempfile.mkdtemp(prefix="hpo-ray-")  # short: Ray's sockets are there
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]

    def start(self, name: str, number: int = 0, arguments: list[str] | None = None) -> subprocess.Popen[bytes]:
        service = self.compose.services[name]
        environment = environment_of(self.compose, name, self.server, self.folder / f"{name}-{number}")
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        command = command_of(self.compose, name)
        if arguments is not None:
            command = command[: -len(service["command"])] + arguments
        command = [self._on_loopback(each) for each in command]
        if command[0] == "ray":
            command += [f"--temp-dir={self.session}"] if "--head" in command else ["--num-cpus=1", "--num-gpus=0"]
        with self.log(name, number).open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={key: self._on_loopback(value) for key, value in environment.items()},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def log(self, name: str, number: int = 0) -> Path:
        return self.folder / f"{name}-{number}.log"

    def _on_loopback(self, text: str) -> str:
        return text.replace("head:6379", f"127.0.0.1:{self.port}").replace("--port=6379", f"--port={self.port}")

    def count(self) -> int:
        """How many nodes there are, asked with the token of the head; 0 if it does not answer."""
        environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "head-0" / "ray_token"),
        }
        status = subprocess.run(
            [str(Path(sys.executable).with_name("ray")), "status", f"--address=127.0.0.1:{self.port}"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return len(re.findall(r"^ *1 node_", status.stdout, re.MULTILINE))

    def stop(self) -> None:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if self.session in " ".join(process.cmdline()) or str(self.port) in " ".join(process.cmdline()):
                    process.kill()
        for started in self.processes:
            started.wait()
        shutil.rmtree(self.session, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.postgres
@pytest.mark.ray
def test_a_search_trains_on_the_workers_of_a_ray_cluster(compose: Compose, server: Postgres, tmp_path: Path) -> None:
    open_database(url_of(compose, "owner", server)).close()
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces" / "clustered.yaml").write_text(json.dumps(TOY))
    nodes = Nodes(compose, server, tmp_path)
    try:
        nodes.start("head")
        wait_until(lambda: nodes.count() == 1)
        for number in range(2):  # one by one: nodes with one address may choose the same ports
            nodes.start("worker", number)
            wait_until(lambda number=number: nodes.count() == number + 2, 120)  # type: ignore[misc]
        search = nodes.start("search", arguments=["clustered"])
        assert search.wait(timeout=240) == 0, nodes.log("search").read_text()
        with psycopg.connect(server.url("hpo")) as connection:
            found = connection.execute(
                "SELECT state, count(*) FROM trials JOIN studies USING (study_id) "
                "WHERE study_name = 'clustered' GROUP BY state"
            ).fetchall()
        assert found == [("COMPLETE", 2)]
        assert "2 trials at a time" in nodes.log("search").read_text()
    finally:
        nodes.stop()


def _get_json(url: str, password: str) -> Any:
    authorization = "Basic " + base64.b64encode(f"hpo:{password}".encode()).decode()
    request = urllib.request.Request(url, headers={"Authorization": authorization})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
