"""deploy/kubernetes without a cluster: the published definitions, and what the resources say of each other."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import ray
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
from ruamel.yaml import YAML

from tests.deploy.definitions import FILE, FOLDER, kind_of, read_resources
from tests.factories import ROOT

RESOURCES = read_resources()
DEFINITIONS: dict[str, Any] = json.loads(FILE.read_text())
SECRETS_DIR = "/run/hpo/"


def find(kind: str, name: str) -> dict[str, Any]:
    """Return the resource of a kind with a name."""
    (found,) = [each for each in RESOURCES if each["kind"] == kind and each["metadata"].get("name") == name]
    return found


def ray_job() -> dict[str, Any]:
    (job,) = [each for each in RESOURCES if each["kind"] == "RayJob"]
    return job


def templates() -> dict[str, dict[str, Any]]:
    """Return {name: template} of all pods."""
    found = {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in RESOURCES
        if each["kind"] in {"Deployment", "StatefulSet"}
    }
    cluster = ray_job()["spec"]["rayClusterSpec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return found | {"head": cluster["headGroupSpec"]["template"]} | workers


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = template["spec"].get("initContainers", []) + template["spec"]["containers"]
    return found


def labels(template: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = template.get("metadata", {}).get("labels", {})
    return found


def problems(resource: dict[str, Any]) -> list[str]:
    """Return how a resource differs from its published definition."""
    validator = jsonschema.Draft202012Validator(DEFINITIONS[kind_of(resource)])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(resource)]


# --- the published definitions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda each: f"{each['kind']}-{each['metadata'].get('name')}")
def test_a_resource_conforms_to_its_published_definition(resource: dict[str, Any]) -> None:
    assert problems(resource) == []


def test_mistakes_are_found() -> None:
    job = copy.deepcopy(ray_job())
    cluster = job["spec"]["rayClusterSpec"]
    cluster["authOptions"]["mode"] = "tokens"
    cluster["workerGroupSpecs"][0]["maxReplica"] = 8
    cluster["workerGroupSpecs"][1]["minReplicas"] = "0"
    del cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["name"]
    found = "\n".join(problems(job))
    for text in ("'tokens' is not one of", "'maxReplica' was unexpected", "'0' is not of type", "'name' is a required"):
        assert text in found


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_yaml_1_1_which_kubectl_reads_means_the_same(path: Path) -> None:
    older = YAML(typ="safe", pure=True)
    older.version = (1, 1)
    assert list(older.load_all(path)) == list(YAML(typ="safe", pure=True).load_all(path))


def test_the_version_of_ray_is_that_of_the_image() -> None:
    assert ray_job()["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


# --- what resources say of each other ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The keys of the secret `hpo`: {file: content} that deploy/make-secrets.sh creates."""
    folder = tmp_path_factory.mktemp("kubernetes")
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    subprocess.run(["sh", "deploy/make-secrets.sh"], cwd=folder, capture_output=True, check=True)
    return {path.name: path.read_text() for path in (folder / "secrets").iterdir()}


@pytest.mark.parametrize("name", templates())
def test_each_volume_is_mounted_and_each_mount_is_a_volume(name: str) -> None:
    template = templates()[name]
    claims = find("StatefulSet", name)["spec"]["volumeClaimTemplates"] if name == "database" else []
    volumes = {each["name"] for each in template["spec"]["volumes"]} | {each["metadata"]["name"] for each in claims}
    assert {mount["name"] for each in containers(template) for mount in each["volumeMounts"]} == volumes


def test_what_volumes_name_exists(secrets: dict[str, str]) -> None:
    used: set[str] = set()
    for template in templates().values():
        for volume in template["spec"]["volumes"]:
            if "secret" in volume:
                assert volume["secret"]["secretName"] == "hpo"
                used |= {item["key"] for item in volume["secret"]["items"]}
            elif "persistentVolumeClaim" in volume:
                claim = find("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
                assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
            else:
                assert volume.get("configMap", {"name": "hpo-roles"}) == {"name": "hpo-roles"}
    assert used == secrets.keys() - {"ray_token"}  # KubeRay creates one for each cluster


@pytest.mark.parametrize("name", templates())
def test_each_file_that_a_variable_names_is_in_the_container(name: str) -> None:
    volumes = {each["name"]: each for each in templates()[name]["spec"]["volumes"]}
    for container in containers(templates()[name]):
        mounted = [
            volumes[each["name"]] for each in container["volumeMounts"] if each["mountPath"] + "/" == SECRETS_DIR
        ]
        items = {SECRETS_DIR + item["path"] for volume in mounted for item in volume["secret"]["items"]}
        named = {each["value"] for each in container.get("env", []) if each["name"].endswith("_FILE")}
        assert named <= items
        if name != "database":  # where roles.sh reads all URLs
            assert named == items


def test_services_find_their_pods(secrets: dict[str, str]) -> None:
    for name in ("database", "dashboard"):
        service, template = find("Service", name), templates()[name]
        assert service["spec"]["selector"].items() <= labels(template).items()
        (port,) = service["spec"]["ports"]
        ports = {each["name"]: each["containerPort"] for each in template["spec"]["containers"][0]["ports"]}
        target = port.get("targetPort", port["port"])
        assert ports.get(target, target) in ports.values()
    assert find("StatefulSet", "database")["spec"]["serviceName"] == "database"
    hosts = {re.findall(r"@([\w.]+):(\d+)/", url)[0] for name, url in secrets.items() if name.endswith("_url")}
    assert hosts == {("database", "5432")}


def test_pods_reach_the_database_if_and_only_if_they_know_a_url(secrets: dict[str, str]) -> None:
    policy = find("NetworkPolicy", "database")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels(templates()["database"])
    ((peer,),) = (rule["from"] for rule in policy["ingress"])
    allowed = peer["podSelector"]["matchLabels"].items()
    reaching = {name for name, template in templates().items() if allowed <= labels(template).items()}
    knowing = {
        name
        for name, template in templates().items()
        if any("secret" in volume for volume in template["spec"]["volumes"])
    }
    assert reaching == knowing - {"database"} == {"dashboard", "head"}


# --- what runs --------------------------------------------------------------------------------------------------------


def test_containers_cannot_become_more_than_they_are() -> None:
    for template in templates().values():
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in containers(template):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


def test_commands_and_variables_are_those_of_docker_compose() -> None:
    """tests/end_to_end/test_compose.py runs them."""
    services = YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text())["services"]
    by_name = {each["name"]: each for template in templates().values() for each in containers(template)}
    for name in ("migrate", "dashboard"):
        assert by_name[name]["args"] == services[name]["command"]
    for name in ("database", "migrate", "dashboard"):
        variables = {each["name"]: each["value"] for each in by_name[name]["env"] if each["name"] != "SECRETS"}
        wanted = {
            key: value.replace("/run/secrets/", SECRETS_DIR) for key, value in services[name]["environment"].items()
        }
        assert variables == wanted
    assert ray_job()["spec"]["entrypoint"].endswith("hpo run grid")


def test_a_worker_is_killed_only_after_ray_has_drained_it() -> None:
    """By default, the kubelet kills after 30 s, when Ray has waited for the trials and not yet ended."""
    for group in ray_job()["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace >= RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S + 20


def test_ray_asks_for_a_token_and_runs_no_trial_next_to_the_driver() -> None:
    cluster = ray_job()["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    limits = {name: containers(group["template"])[0]["resources"]["limits"] for name, group in groups.items()}
    assert [name for name, each in limits.items() if "nvidia.com/gpu" in each] == ["gpu"]
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
