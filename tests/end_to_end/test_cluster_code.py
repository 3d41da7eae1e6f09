"""The code of a search on the nodes of a Ray cluster: each node has its own home, working folder and temporary folder."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.processes import Driver, hpo, write_space
from tests.end_to_end.ray_nodes import HEAD, RayNodes
from tests.factories import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.ray(starts=4)]

# Says where it runs, and which files came with it.
TRAINABLE = """
import os, time
from pathlib import Path
from lib.part import scale
from hpo.trainable import EpochReport

def train(params, *, data, seed, max_epochs, device, checkpoint=None):
    here = Path(__file__).parent
    if "meet" in params:
        Path(params["meet"], str(os.getpid())).touch()
        while len(list(Path(params["meet"]).iterdir())) < 2:
            time.sleep(0.1)
    words = Path("words.txt").read_text()  # in the working folder
    files = sorted(str(path.relative_to(here)) for path in here.rglob("*") if "__pycache__" not in path.parts)
    seen = {"here": str(here), "home": os.environ["HOME"], "files": files, "words": words}
    for epoch in range(1, max_epochs + 1):
        time.sleep(params["seconds"])
        while epoch > 1 and not Path(params.get("until", "/")).exists():
            time.sleep(0.1)
        yield EpochReport(epoch, {"value": scale(params["x"])}, dict, provenance=seen)
"""
SCRIPT = """
import json, os, sys
from lib.part import scale
for epoch in (1, 2):
    print(json.dumps({"value": scale(float(sys.argv[1])), "is_code": os.path.exists("words.txt")}))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    with RayNodes(cores=1) as nodes:
        nodes.add("b")
        yield nodes


def write_project(folder: Path, *, factor: int = 1) -> Path:
    """A folder with a trainable, a script, what they import and read, and what is not to be sent."""
    folder.mkdir()
    files = {
        "mine.py": TRAINABLE,
        "script.py": SCRIPT,
        "lib/part.py": f"def scale(x): return {factor} * x",
        "words.txt": "words",
        # Files that would replace a package, or run before any other, if the folder came first on the path.
        **{f"{name}.py": "raise RuntimeError('replaced')" for name in ("pandas", "yaml", "typing", "sitecustomize")},
        ".env": "PASSWORD=secret",
        "old.db": "",
        "weights.pt": "",
        "data/images": "",
        "notes.md": "",
        ".gitignore": "notes.md\n",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


SENT = {"mine.py", "script.py", "lib", "lib/part.py", "words.txt"} | {
    f"{name}.py" for name in ("pandas", "yaml", "typing", "sitecustomize")
}


def write_search(folder: Path, name: str, **changes: Any) -> Path:
    space = {"metric": "value", "sampler": "grid", "max_epochs": 2, "max_failures": 0, "resources": {"cpu": 1}}
    parameters = {"x": [1, 2], "seconds": 0.2}
    return write_space(folder, name, space | {"trainable": "mine:train", "parameters": parameters} | changes)


def provenance(folder: Path) -> list[dict[str, Any]]:
    """What each trial has said of where it runs."""
    with closing(sqlite3.connect(folder / "runs" / "hpo.db")) as database:
        return [json.loads(text) for (text,) in database.execute("SELECT provenance FROM hpo_trials")]


def values(folder: Path) -> list[float]:
    with closing(sqlite3.connect(folder / "runs" / "hpo.db")) as database:
        rows = database.execute(
            "SELECT value FROM trial_values JOIN trials USING (trial_id) WHERE state = 'COMPLETE' ORDER BY trial_id"
        )
        return [value for (value,) in rows]


def test_two_drivers_with_different_code_train_on_nodes_that_have_neither(cluster: RayNodes, tmp_path: Path) -> None:
    folders = [write_project(tmp_path / name, factor=factor) for name, factor in (("one", 1), ("ten", 10))]
    (tmp_path / "workers").mkdir()  # none trains before there are two, so both nodes have one
    parameters = {"x": [1, 2], "seconds": 0.2, "meet": str(tmp_path / "workers")}
    drivers = [
        Driver(folder, 0, write_search(folder, "search", parameters=parameters), **cluster.variables)
        for folder in folders
    ]
    for driver in drivers:
        assert driver.wait() == 0, driver.output
    assert [values(folder) for folder in folders] == [[1, 2], [10, 20]]
    one, ten = (provenance(folder) for folder in folders)
    assert {each["here"] for each in one}.isdisjoint(each["here"] for each in ten)
    seen = one + ten
    assert {each["home"] for each in seen} == {str(cluster.home(name)) for name in (HEAD, "b")}
    for each in seen:
        assert any(each["here"].startswith(f"{cluster.folder / name}/") for name in (HEAD, "b"))
        assert each["words"] == "words"
        assert set(each["files"]) - {"search.yaml", "driver-0.txt"} == SENT


def test_a_script_finds_its_neighbours(cluster: RayNodes, tmp_path: Path) -> None:
    project = write_project(tmp_path / "scripts", factor=2)
    path = write_search(
        project, "script", trainable=None, command=f"{sys.executable} script.py {{x}}", parameters={"x": [3]}
    )
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if value is not None})
    )
    done = hpo(project, "run", path, **cluster.variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert values(project) == [6]


def test_a_folder_that_is_too_large_is_one_message_and_nothing_is_stored(cluster: RayNodes, tmp_path: Path) -> None:
    project = write_project(tmp_path / "large")
    with (project / "images.npy").open("wb") as file:
        file.truncate(101 * 2**20)
    done = hpo(project, "run", write_search(project, "search"), **cluster.variables)
    assert done.returncode == 2
    assert "images.npy (101.0 MiB)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "runs" / "hpo.db").exists()


@pytest.fixture(scope="module")
def other_hpo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{kind: a path of Python}: where hpo is not, and where its source differs."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "missing" / "hpo").mkdir(parents=True)
    (folder / "missing" / "hpo" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'hpo'\", name='hpo')"
    )
    for package in ("hpo", "storage"):
        shutil.copytree(ROOT / package, folder / "changed" / package)
    with (folder / "changed" / "hpo" / "errors.py").open("a") as file:
        file.write("# changed\n")
    return {"missing": folder / "missing", "changed": folder / "changed"}


def test_nodes_with_another_hpo_are_one_message_and_get_no_trials_if_they_join_later(
    cluster: RayNodes, tmp_path: Path, other_hpo: dict[str, Path]
) -> None:
    project = write_project(tmp_path / "project")
    until = tmp_path / "until"  # trials end when it is there
    parameters = {"x": [1, 2, 3, 4, 5, 6], "seconds": 0.5, "until": str(until)}
    path = write_search(project, "search", parameters=parameters, max_failures=1)  # for the trial whose node dies
    running = Driver(project, 0, path, **cluster.variables)
    running.wait_until(lambda: "epoch 1/2" in running.output)
    cluster.kill("b")  # its trial needs another node
    for kind, path in other_hpo.items():
        cluster.add(kind, path=path)

    second = write_project(tmp_path / "second")
    done = hpo(second, "run", write_search(second, "search"), **cluster.variables)
    assert done.returncode == 2
    assert done.stderr.startswith("hpo: 2 of ")  # 3 or 4: Ray may not know yet that the node is dead
    assert " nodes of the Ray cluster cannot run trials of this search:\n" in done.stderr
    assert "hpo is not installed" in done.stderr
    assert "hpo is 0.1.0, source " in done.stderr
    assert "Install there what this machine has" in done.stderr
    assert "Traceback" not in done.stderr
    with closing(sqlite3.connect(second / "runs" / "hpo.db")) as database:
        assert database.execute("SELECT count(*) FROM studies").fetchone() == (0,)

    running.wait_until(lambda: running.output.count("runs no trials of this search") == 2)
    until.touch()
    assert running.wait() == 0, running.output
    assert values(project) == [1, 2, 3, 4, 5, 6]
    assert running.output.count("runs no trials of this search") == 2, running.output
    assert {each["home"] for each in provenance(project)} <= {str(cluster.home(name)) for name in (HEAD, "b")}
