"""How long a search takes before its first trial and after its last one.

    python -m benchmarks.startup --runs 3

Times whole processes, in turns:

    minimum    Ray with two workers that import torch, and nothing else: the lower bound for any search with Ray
    search     `hpo run` on two no-op trials of one epoch whose workers import torch, from an empty folder to the report
    no torch   the same with a trainable that does not import torch

For searches it also prints when each line appeared that marks a stage. With `--code DIR`, the search of another checkout is
timed in the same turns. Prints medians and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAGES = {
    "first line": "noop",
    "slots decided": " at a time, ",
    "first trial starts": "trial 0 starts",
    "first trial ended": " COMPLETE: ",
    "table": "noop: 2 trials",
    "report": "Report: ",
}
SPACE = {
    "metric": "value",
    "sampler": "grid",
    "max_epochs": 1,
    "resources": {"cpu": 1, "gpu": 0},
    "parameters": {"x": [1, 2]},
}
TRAINABLES = {"search": "torch_noop:noop", "no torch": "benchmarks.toy:noop"}
MINIMUM = """
import os
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=50)

@ray.remote(num_cpus=1)
class Worker:
    def __init__(self):
        import torch
    def pid(self):
        return os.getpid()

workers = [Worker.remote() for _ in range(2)]
assert len(set(ray.get([worker.pid.remote() for worker in workers]))) == 2
ray.shutdown()
"""


def time_minimum(python: str, folder: Path) -> dict[str, float]:
    """Return the seconds of the whole process."""
    started = time.perf_counter()
    subprocess.run([python, "-c", MINIMUM], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return {"whole": time.perf_counter() - started}


def time_search(python: str, code: Path, trainable: str, folder: Path) -> dict[str, float]:
    """Return the seconds until each stage's line, and of the whole process."""
    (folder / "noop.yaml").write_text(json.dumps(SPACE | {"trainable": trainable}))
    shutil.copy(ROOT / "benchmarks/torch_noop.py", folder)  # an earlier checkout does not have it
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HPO_", "RAY_"))}
    started = time.perf_counter()
    process = subprocess.Popen(
        [python, "-m", "hpo.run", "noop.yaml"],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(code), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds: dict[str, float] = {}
    assert process.stdout is not None
    for line in process.stdout:
        for stage, text in STAGES.items():
            if text in line and stage not in seconds:
                seconds[stage] = time.perf_counter() - started
    if process.wait() != 0:
        raise SystemExit(f"the search of {code} ended with exit code {process.returncode}")
    return seconds | {"whole": time.perf_counter() - started}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--code", type=Path, help="another checkout, with its own .venv, to compare with")
    arguments = parser.parse_args()
    searches = {name: (sys.executable, ROOT, trainable) for name, trainable in TRAINABLES.items()}
    if arguments.code is not None:
        code = arguments.code.resolve()
        for name, trainable in TRAINABLES.items():
            searches[f"{name}, {code.name}"] = (str(code / ".venv/bin/python"), code, trainable)
    samples: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.runs):
        for name, (python, code, trainable) in searches.items():
            with tempfile.TemporaryDirectory(prefix="hpo-startup-") as folder:
                samples.setdefault(name, []).append(time_search(python, code, trainable, Path(folder)))
        with tempfile.TemporaryDirectory(prefix="hpo-startup-") as folder:
            samples.setdefault("minimum", []).append(time_minimum(sys.executable, Path(folder)))
        print({name: round(found[-1]["whole"], 1) for name, found in samples.items()}, file=sys.stderr)
    medians = {
        name: {stage: statistics.median(each[stage] for each in found if stage in each) for stage in found[0]}
        for name, found in samples.items()
    }
    for name, stages in medians.items():
        shown = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items())
        print(f"{name}: {shown}; {stages['whole'] / medians['minimum']['whole']:.2f} times the minimum")
    print(json.dumps({"runs": arguments.runs, "medians": medians}))


if __name__ == "__main__":
    main()
