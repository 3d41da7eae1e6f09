"""The import contracts of pyproject.toml: that they cover every module. `lint-imports` checks the imports."""

from __future__ import annotations

import tomllib
from typing import Any

from tests.factories import ROOT

CONTRACTS: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
RAY = (
    *(f"cluster.{name}" for name in ("connection", "membership", "node_checks", "nodes", "private_ray")),
    *("ray_worker", "tune", "tune_adapters"),
)
MODULES_OF_RAY = {f"hpo.search.{name}" for name in RAY}


def modules() -> set[str]:
    """Return every module and package of hpo and storage."""
    files = [file.relative_to(ROOT) for package in ("hpo", "storage") for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files}


def is_within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def test_all_other_modules_may_not_import_ray() -> None:
    (contract,) = (each for each in CONTRACTS if each["name"].endswith("alone import ray"))
    assert contract["forbidden_modules"] == ["ray"]
    assert contract.get("as_packages", True), "a package stands for all of its modules"
    sources = set(contract["source_modules"])
    found = modules()
    assert found > MODULES_OF_RAY
    assert sources <= found, "each one exists"
    covered = {module for module in found for source in sources if is_within(module, source)}
    # A package around a module that imports ray cannot be listed: it would stand for that module too.
    around = {package for package in found for module in MODULES_OF_RAY if is_within(module, package)}
    assert found - covered == around
    for package in around - MODULES_OF_RAY:
        assert "import ray" not in (ROOT / package.replace(".", "/") / "__init__.py").read_text()


def test_the_layers_of_each_package_are_exhaustive() -> None:
    """Import-linter then reports a new module that no layer names."""
    packages = {module for module in modules() if (ROOT / module.replace(".", "/") / "__init__.py").exists()}
    layers = [contract for contract in CONTRACTS if contract["type"] == "layers"]
    assert {package for contract in layers for package in contract["containers"]} == packages
    assert all(contract["exhaustive"] for contract in layers)
