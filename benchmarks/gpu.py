"""Check the training on a real GPU. Needs torch only: no pytest, no ray. At most 10 minutes.

    python -m benchmarks.gpu                  every check, one table
    python -m benchmarks.gpu --checks graph   some of them
    python -m benchmarks.gpu --checks grid_imagenet grid_cifar --data-dir D    the documented grid, on the official images

Each check has its own process, because some leave the process unusable on purpose. The data is the sample that is part of
the package. The exit code is 0 if every check passed, 1 if one failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_speed import (
    Rows,
    check_checkpoints,
    check_grid,
    check_packing,
    check_techniques,
    eager_steps,
    patched,
)
from hpo.train.cuda_graph import GraphedStep
from hpo.train.data import load
from hpo.train.gpu import free_memory, is_device_lost, is_out_of_memory
from hpo.train.learner import Learner
from hpo.train.loop import train
from hpo.train.params import STEMS, TrainParams
from hpo.train.precision import choose_precision
from hpo.trainable import EpochReport, is_timing

DATA = {"dataset": "fashion_mnist_sample", "train_samples": 1000, "val_samples": 100}  # tails of 40 images
PARAMS: list[dict[str, Any]] = [
    {"batch_size": 64, "optimizer": optimizer, "lr": 1e-3, "precision": precision}
    for optimizer in ("adam", "sgd")
    for precision in ("fp32", "bf16")
]
TRIALS = 10
REPLAYS = 50
CHECK_SECONDS = 80.0  # of each check
TOTAL_SECONDS = 600.0


def run_trial(
    params: dict[str, Any], device: str, epochs: int = 3, data: Any = None, **options: Any
) -> list[EpochReport]:
    """Train, and return the reports."""
    given = DATA if data is None else data
    return list(train(params, data=given, seed=0, max_epochs=epochs, device=device, **options))


def numbers(reports: list[EpochReport]) -> list[dict[str, float]]:
    """Return the metrics that must be equal in two runs."""
    return [{name: value for name, value in r.metrics.items() if not is_timing(name)} for r in reports]


def describe_difference(one: list[dict[str, float]], other: list[dict[str, float]]) -> str:
    """Return `equal`, or the largest relative difference of the losses and where the first difference is."""
    pairs = [(i, name, a[name], b[name]) for i, (a, b) in enumerate(zip(one, other, strict=True)) for name in a]
    different = [(i, name, abs(x - y) / max(abs(x), abs(y), 1e-12)) for i, name, x, y in pairs if x != y]
    if not different:
        return "equal"
    return f"{max(d for *_, d in different):.1e} at most, first in {different[0][1]} of report {different[0][0] + 1}"


def check_graph(device: str, params: list[dict[str, Any]] = PARAMS, data: Any = None) -> Rows:
    """Replayed steps give the numbers of eager steps, as shipped and with deterministic kernels of cuDNN."""
    for deterministic in (False, True):
        for shape in params:
            each = {**shape, "deterministic": deterministic}
            with eager_steps():
                eager = numbers(run_trial(each, device, data=data))
                again = numbers(run_trial(each, device, data=data))
            replayed = run_trial(each, device, data=data)
            name = f"{each['optimizer']} {each['precision']}{' deterministic' if deterministic else ''}"
            text = f"{describe_difference(eager, numbers(replayed))}; eager twice: {describe_difference(eager, again)}"
            is_graphed = device == "cpu" or replayed[-1].provenance["cuda_graph"] is True
            yield f"graph = eager, {name}", text.startswith("equal;") and is_graphed, text


def check_resume(device: str, params: list[dict[str, Any]] = PARAMS, data: Any = None) -> Rows:
    """A training that resumes from a checkpoint gives the numbers of one without an interruption."""
    for shape in params:
        each = {**shape, "deterministic": True}
        straight = numbers(run_trial(each, device, data=data))
        (first,) = run_trial(each, device, epochs=1, data=data)
        rest = numbers(run_trial(each, device, data=data, checkpoint=first.state()))
        text = describe_difference(straight[1:], rest)
        yield f"resume = straight, {each['optimizer']} {each['precision']} deterministic", text == "equal", text


def check_operations(device: str, params: list[dict[str, Any]] = PARAMS, data: Any = None) -> Rows:
    """The operations of a training that torch knows to be not deterministic."""
    for each in params:
        with eager_steps(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                run_trial(each, device, epochs=1, data=data)
            finally:
                torch.use_deterministic_algorithms(False)
        found = dict.fromkeys(str(each.message).splitlines()[0][:100] for each in caught)
        text = "; ".join(each for each in found if "determinis" in each) or "none"
        yield f"not deterministic to torch, {each['optimizer']} {each['precision']}", True, text


def check_memory(device: str, trials: int = TRIALS, data: Any = None) -> Rows:
    """Trials of one process, one after another, leave nothing behind."""
    reserved = []
    for number in range(trials):
        params = PARAMS[number % len(PARAMS)]
        reports = train(params, data=DATA if data is None else data, seed=0, max_epochs=9, device=device)
        next(reports)
        del reports  # as a trial that is stopped early
        free_memory()
        reserved.append(torch.cuda.memory_reserved() / 2**20)
    text = f"MiB reserved after each trial: {' '.join(f'{each:.0f}' for each in reserved)}"
    yield f"memory is flat over {trials} trials", reserved[-1] <= reserved[len(PARAMS) - 1], text


def check_capture_failure(device: str, shape: dict[str, Any] = PARAMS[0], data: Any = None) -> Rows:
    """A capture that fails is reported, and the training continues eagerly with the same numbers."""
    params = {**shape, "deterministic": True}
    with eager_steps():
        eager = numbers(run_trial(params, device, data=data))
    free_memory()
    before = torch.cuda.memory_reserved()
    train_batch = Learner._train_batch  # noqa: SLF001 # made to fail

    def waiting(learner: Learner, indices: Tensor) -> None:
        train_batch(learner, indices)
        if torch.cuda.is_current_stream_capturing():
            indices.sum().item()

    with patched((Learner, "_train_batch", waiting)):
        reports = run_trial(params, device, data=data)
    last = reports[-1]
    is_told = last.provenance["cuda_graph"] is False and bool(last.warning) and last.needs_new_process
    yield "a failed capture is reported", is_told, last.warning
    text = describe_difference(eager, numbers(reports))
    yield "a failed capture changes no number", text == "equal", text
    del reports, last
    free_memory()
    kept = (torch.cuda.memory_reserved() - before) / 2**20
    yield "what it keeps until the process ends", True, f"{kept:.0f} MiB"


def check_out_of_memory(device: str, data: Any = None) -> Rows:
    """Without memory a trial fails in a way that is recognized, and the process can train afterwards."""
    filler = [torch.empty(torch.cuda.mem_get_info()[0] - 2**28, dtype=torch.uint8, device=device)]
    found: Exception | None = None
    try:
        run_trial({**PARAMS[0], "batch_size": 1000, "stem": "cifar"}, device, epochs=1, data=data)
    except Exception as error:  # noqa: BLE001 # any error: whether it is the right one is what is checked
        found = error.with_traceback(None)
    text = f"{type(found).__name__}: {str(found).splitlines()[0][:80]}" if found else "no error"
    yield "out of memory is recognized", found is not None and is_out_of_memory(found), text
    yield "out of memory does not lose the device", not is_device_lost(), ""
    filler.clear()
    free_memory()
    (report,) = run_trial(PARAMS[0], device, epochs=1, data=data)
    yield "a trial after it is captured", report.provenance["cuda_graph"] is True, str(report.provenance)


def check_lost_device(device: str) -> Rows:
    """After a failed assert on the device, the process knows that it cannot be used any more."""
    found: Exception | None = None
    try:
        torch.zeros(2, device=device)[torch.tensor([10**6], device=device)].sum().item()
    except Exception as error:  # noqa: BLE001 # its type is part of what is reported
        found = error
    is_lost = is_device_lost() and found is not None and not is_out_of_memory(found)
    yield "a lost device is recognized", is_lost, f"{type(found).__name__}: {str(found).splitlines()[0][:80]}"


def check_profile(
    device: str, stems: Sequence[str] = STEMS, batch_sizes: Sequence[int] = (64, 512), data: Any = None
) -> Rows:
    """The kernels and the milliseconds of a replayed step."""
    from torch.profiler import ProfilerActivity, profile

    for stem in stems:
        for batch_size in batch_sizes:
            images = load(**(DATA if data is None else data), device=device).train
            params = TrainParams(batch_size=batch_size, stem=stem)
            with closing(Learner(params, choose_precision("auto", device), images)) as learner:
                indices = torch.arange(batch_size, device=device)
                learner.model.train()
                for _ in range(GraphedStep.WARM_UP + 5):
                    learner.take_step(indices)
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(REPLAYS):
                    learner.take_step(indices)
                torch.cuda.synchronize()
                milliseconds = 1000 * (time.perf_counter() - started) / REPLAYS
                with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                    for _ in range(REPLAYS):
                        learner.take_step(indices)
                    torch.cuda.synchronize()
                events = [each for each in profiled.events() or [] if str(each.device_type).endswith("CUDA")]
                busy = sum(each.device_time for each in events) / 1000 / REPLAYS
                text = f"{milliseconds:.2f} ms, {len(events) / REPLAYS:.0f} kernels and copies, busy {busy:.2f} ms"
                yield f"a step, {stem} stem, batch {batch_size}", learner.is_graphed is True, text


CHECKS: dict[str, Callable[[str], Rows]] = {
    "graph": check_graph,
    "operations": check_operations,
    "resume": check_resume,
    "memory": check_memory,
    "capture_failure": check_capture_failure,
    "out_of_memory": check_out_of_memory,
    "lost_device": check_lost_device,
    "profile": check_profile,
    **{f"techniques_{stem}": partial(check_techniques, stem=stem) for stem in STEMS},
    "packing": check_packing,
    "checkpoints": check_checkpoints,
}
# Not part of the ten minutes.
GRIDS = {f"grid_{stem}": partial(check_grid, stem=stem) for stem in STEMS}
GRID_SECONDS = 280.0


def run_check(name: str, seconds: float = CHECK_SECONDS, data_dir: str | None = None) -> list[list[Any]]:
    """Run a check in a new process, and return its rows. A process that ends early adds a row that failed.

    Args:
        name: of the check.
        seconds: until the process is killed. The rows that it has found by then are kept.
        data_dir: the folder of the official images; None if it is not given.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--in-process", name]
    command += [] if data_dir is None else ["--data-dir", data_dir]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, cwd=Path(__file__).parent.parent, start_new_session=True
        )
        try:
            ending = "" if process.wait(seconds) == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            ending = f"not finished after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            process.wait()
        output.seek(0)
        errors.seek(0)
        rows = [json.loads(line) for line in output.read().splitlines() if line.startswith("[")]
        if ending:
            rows.append([name, False, (errors.read().strip() or ending).splitlines()[-1]])
    return rows


def run_checks(names: Sequence[str], seconds: float = TOTAL_SECONDS, data_dir: str | None = None) -> list[list[Any]]:
    """Run checks one after another. One that no time is left for adds a row that failed."""
    rows: list[list[Any]] = []
    deadline = time.perf_counter() + seconds
    for name in names:
        left = deadline - time.perf_counter()
        limit = GRID_SECONDS if name in GRIDS else CHECK_SECONDS
        found = (
            run_check(name, min(limit, left), data_dir) if left > 0 else [[name, False, "not run: no time was left"]]
        )
        rows += found
    return rows


def format_table(rows: list[list[Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [f"| {name} | {'ok' if is_right else '**FAILED**'} | {text} |" for name, is_right, text in rows]
    return "\n".join(["| check | | found |", "|---|---|---|", *lines])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="+", choices=[*CHECKS, *GRIDS], default=list(CHECKS))
    parser.add_argument("--data-dir", help="the folder with the official Fashion-MNIST, for the documented grid")
    parser.add_argument("--in-process", choices=[*CHECKS, *GRIDS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU: torch.cuda.is_available() is false. Nothing was checked", file=sys.stderr)
        return 2
    if arguments.in_process:
        name, data_dir = arguments.in_process, arguments.data_dir
        for row in GRIDS[name]("cuda", data_dir=data_dir) if name in GRIDS else CHECKS[name]("cuda"):
            print(json.dumps(row), flush=True)
        return 0
    started = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n", flush=True)
    rows = run_checks(arguments.checks, data_dir=arguments.data_dir)
    print(format_table(rows))
    print(f"\n{time.perf_counter() - started:.0f} s")
    return 0 if all(is_right for _, is_right, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
