"""How much memory trials on one machine need for the data set, and how much of it they share. Linux only.

    python -m benchmarks.data_memory --data-dir D              8 processes
    python -m benchmarks.data_memory --data-dir D --copies     the same, each with its own copy of the images

Each process loads the data set as a trial does, takes three training steps on the CPU and reads every image. Then its
memory is read from /proc/PID/smaps_rollup: PSS counts a page that n processes share as 1/n in each, so that the sum is what
all of them need. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BATCH_SIZE = 64
STEPS = 3


def load_and_train(pipe: Connection, data: dict[str, Any], copies: bool) -> None:
    """Load the data set, train a little, and say what that took. It ends when it receives the second message."""
    import torch

    from hpo.train.data import Images, load
    from hpo.train.learner import Learner
    from hpo.train.params import TrainParams

    torch.set_num_threads(1)
    before = read_memory()
    started = time.perf_counter()
    dataset = load(**data)
    seconds = time.perf_counter() - started
    parts = [dataset.train, dataset.validation, dataset.test]
    if copies:
        parts = [Images(part.images.clone(), part.labels) for part in parts]
    for part in parts:
        for batch in part.split(1000):
            batch.images.sum()
    loaded = read_memory()
    learner = Learner(TrainParams(batch_size=BATCH_SIZE), "fp32", parts[0])
    for indices in torch.arange(BATCH_SIZE * STEPS).split(BATCH_SIZE):
        learner.take_step(indices)
    pipe.send((seconds, before, loaded))
    pipe.recv()
    pipe.send(read_memory())
    pipe.recv()


def read_memory(pid: str = "self") -> dict[str, float]:
    """Return {kind: MiB} of a process: its resident memory, its share of it, and what it has alone."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {name: int(kib) / 1024 for name, kib in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    return {"rss": found["Rss"], "pss": found["Pss"], "private": found["Private_Clean"] + found["Private_Dirty"]}


def measure(count: int, data: dict[str, Any], *, copies: bool) -> dict[str, float]:
    """Return the memory of so many trials, in MiB, and the seconds that loading takes: medians, and the sum of the PSS."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(count):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=load_and_train, args=(theirs, data, copies), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    ready = [pipe.recv() for pipe in pipes]
    for pipe in pipes:  # only now: a page counts less when others have it, too
        pipe.send(None)
    memory = [pipe.recv() for pipe in pipes]
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    of_data = [loaded["private"] - before["private"] for _, before, loaded in ready]
    return {
        "load_seconds": round(statistics.median(seconds for seconds, _, _ in ready), 2),
        "private_after_loading": round(statistics.median(of_data), 1),
        "rss": round(statistics.median(each["rss"] for each in memory), 1),
        "pss": round(statistics.median(each["pss"] for each in memory), 1),
        "private": round(statistics.median(each["private"] for each in memory), 1),
        "pss_of_all": round(sum(each["pss"] for each in memory), 1),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with Fashion-MNIST")
    parser.add_argument("--trials", type=int, default=8, help="processes")
    parser.add_argument("--copies", action="store_true", help="each process has its own copy of the images")
    options = parser.parse_args()
    data = {"dataset": "fashion_mnist", "data_dir": options.data_dir}
    found = measure(options.trials, data, copies=options.copies)
    for name, value in found.items():
        print(f"{name:22} {value:10,.2f} {'s' if 'seconds' in name else 'MiB'}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
