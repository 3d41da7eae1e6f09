"""How fast `hpo.train` trains, compared with the loop of a tutorial. Needs torch and torchvision only.

    python -m benchmarks.train_speed                       images/s of both loops, and the share of the matmul peak
    python -m benchmarks.train_speed losses                the loss of one epoch, three seeds, fp32 and the fast path
    python -m benchmarks.train_speed grid --data-dir D     the documented grid, 3 x 50 epochs, without Ray
    python -m benchmarks.train_speed packing --data-dir D  1, 2, 3, 4 trials on one device at the same time
    python -m benchmarks.train_speed checkpoints           the share of a trial's time that its checkpoints take

The tutorial's loop: torchvision's data set with ToTensor, a DataLoader, fp32, Adam, `.item()` in each step. Each loop has
its own process, and the two take turns. Without --data-dir, both train on the small sample. Each command prints a table
and, in its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from hpo.search.mps import start_mps
from hpo.train.fashion_mnist import SAMPLE_DIR
from hpo.train.loop import train
from hpo.train.network import build_model
from hpo.train.params import STEMS
from hpo.train.precision import choose_precision

BATCH_SIZES = (64, 256, 512)
LR = 0.01
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLE = 1900  # training images of the sample, without 100 validation images
Loop = Callable[..., Iterator[float]]


# --- the two loops ------------------------------------------------------------------------------------------------


def naive(stem: str, batch_size: int, images: int, data_dir: str) -> Iterator[float]:
    """Yield the images per second of the tutorial's loop after each epoch."""
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import ToTensor

    dataset = FashionMNIST(data_dir, train=True, transform=ToTensor())
    loader = DataLoader(Subset(dataset, range(images)), batch_size=batch_size, shuffle=True)
    model = build_model(stem=stem).to(DEVICE).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    while True:
        started = time.perf_counter()
        losses, correct = [], 0
        for pixels, labels in loader:
            pixels, labels = pixels.to(DEVICE), labels.to(DEVICE)
            optimizer.zero_grad()
            logits = model(pixels)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            correct += (logits.argmax(1) == labels).sum().item()
        yield images / (time.perf_counter() - started)


def ours(stem: str, batch_size: int, images: int, data_dir: str) -> Iterator[float]:
    """Yield the images per second that `hpo.train` reports after each epoch."""
    params = {"stem": stem, "batch_size": batch_size, "lr": LR}
    for report in train(params, data=_data(data_dir, images), seed=0, max_epochs=10**6, device=DEVICE):
        yield report.metrics["images_per_second"]


def _data(data_dir: str, images: int | None) -> dict[str, Any]:
    return {"dataset": "fashion_mnist", "data_dir": data_dir, "val_samples": 100, "train_samples": images}


class Contestant:
    """A loop in its own process. It trains an epoch at each turn."""

    def __init__(self, loop: Loop, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_take_turns, args=(theirs, loop, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def start_turn(self) -> None:
        """Start one epoch."""
        self._pipe.send(None)

    def end_turn(self) -> float:
        """Wait for the epoch to end; return its images per second."""
        return float(self._pipe.recv())

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _take_turns(pipe: Connection, loop: Loop, arguments: tuple[Any, ...]) -> None:
    speeds = loop(*arguments)
    while True:
        pipe.recv()
        pipe.send(next(speeds))


# --- the commands --------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Print images/s of both loops by stem and batch size; return {"stem/batch size": ratio}."""
    peaks = {precision: matmul_peak(precision) for precision in ("fp32", "bf16")}
    print(f"matmul peak: {', '.join(f'{name} {peak / 1e12:.2f} TFLOP/s' for name, peak in peaks.items())}")
    precision = choose_precision("auto", DEVICE)
    print(f"{'stem':9} {'batch':>5} {'tutorial':>9} {'ours':>9} {'ratio':>6}   share of the {precision} peak")
    ratios = {}
    for stem in options.stems:
        flop = training_flop(stem)
        for batch_size in options.batch_sizes:
            images = options.images or (SAMPLE if stem == "imagenet" else SAMPLE // 3)
            pair = [Contestant(loop, stem, batch_size, images, options.data_dir) for loop in (naive, ours)]
            rounds: list[list[float]] = [[] for _ in pair]
            for _ in range(options.runs + 1):
                for contestant, speeds in zip(pair, rounds, strict=True):
                    contestant.start_turn()
                    speeds.append(contestant.end_turn())
            for contestant in pair:
                contestant.stop()
            theirs, fast = (statistics.median(speeds[1:]) for speeds in rounds)  # the first round is a warm-up
            ratios[f"{stem}/{batch_size}"] = round(fast / theirs, 2)
            share = flop * fast / peaks[precision]
            print(
                f"{stem:9} {batch_size:5} {theirs:9,.0f} {fast:9,.0f} {fast / theirs:5.2f}x   {share:.1%}", flush=True
            )
    return ratios


def losses(options: argparse.Namespace) -> dict[str, Any]:
    """Print one epoch's training loss by seed and precision; return {"stem/batch size": {precision: losses}}."""
    fast = choose_precision("auto", DEVICE)
    print(f"{'stem':9} {'batch':>5} {'precision':9} loss of seeds 0, 1, 2")
    found: dict[str, Any] = {}
    for stem in options.stems:
        for batch_size in options.batch_sizes:
            by_precision = {}
            for precision in ("fp32", fast):
                params = {"stem": stem, "batch_size": batch_size, "lr": LR, "precision": precision}
                data = _data(options.data_dir, options.images)
                by_precision[precision] = [
                    next(train(params, data=data, seed=seed, max_epochs=2, device=DEVICE)).metrics["train_loss"]
                    for seed in range(3)
                ]
                listed = "  ".join(f"{loss:.4f}" for loss in by_precision[precision])
                print(f"{stem:9} {batch_size:5} {precision:9} {listed}", flush=True)
            found[f"{stem}/{batch_size}"] = {name: [round(x, 4) for x in xs] for name, xs in by_precision.items()}
    return found


def grid(options: argparse.Namespace) -> dict[str, Any]:
    """Train the documented grid, with evaluation; return {stem: {batch size: seconds}}."""
    seconds: dict[str, Any] = {}
    for stem in options.stems:
        seconds[stem] = {}
        for batch_size in options.batch_sizes:
            started = time.perf_counter()
            params = {"stem": stem, "batch_size": batch_size, "lr": LR}
            data = {"dataset": "fashion_mnist", "data_dir": options.data_dir, "train_samples": options.images}
            *_, last = train(params, data=data, seed=0, max_epochs=options.epochs, device=DEVICE)
            took = time.perf_counter() - started
            seconds[stem][str(batch_size)] = round(took, 1)
            print(
                f"{stem:9} batch {batch_size:3}: {options.epochs} epochs in {took:.1f} s, "
                f"{last.metrics['images_per_second']:,.0f} images/s, test accuracy {last.metrics['test_accuracy']:.4f}",
                flush=True,
            )
        seconds[stem]["total"] = round(sum(seconds[stem].values()), 1)
    return seconds


def packing(options: argparse.Namespace) -> dict[str, Any]:
    """Print the total images/s of 1 to 4 concurrent trials; return {"stem/batch size": {trials: images/s}}."""
    found: dict[str, Any] = {}
    with start_mps(is_wanted=DEVICE == "cuda") as mps:
        print(
            f"{DEVICE}{', CUDA MPS' if mps.is_active else ''}{f', no CUDA MPS: {mps.failure}' if mps.failure else ''}"
        )
        for stem in options.stems:
            for batch_size in options.batch_sizes:
                speeds: dict[str, int] = {}
                for count in options.trials:
                    images = options.images or SAMPLE
                    trials = [Contestant(ours, stem, batch_size, images, options.data_dir) for _ in range(count)]
                    rates = []
                    for _ in range(options.runs + 1):
                        for trial in trials:
                            trial.start_turn()
                        rates.append(sum(trial.end_turn() for trial in trials))
                    for trial in trials:
                        trial.stop()
                    speeds[str(count)] = round(statistics.median(rates[1:]))
                found[f"{stem}/{batch_size}"] = speeds
                listed = ", ".join(f"{count}: {speed:,}" for count, speed in speeds.items())
                print(
                    f"{stem:9} batch {batch_size:3}, total images/s by number of trials: {listed}",
                    flush=True,
                )
    return found


def checkpoints(options: argparse.Namespace) -> dict[str, Any]:
    """Print what saving checkpoints adds to the time of a trial; return {"batch size": {policy: share}}.

    Each policy trains whole trials of `--trial-epochs`, in turns with the others, and saves to the same disk.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="hpo-checkpoints-", dir=options.folder) as folder:
        for batch_size in options.batch_sizes:
            images, epochs = options.images or SAMPLE, options.trial_epochs
            trials = {
                policy: Contestant(
                    train_with_checkpoints,
                    policy,
                    {"batch_size": batch_size, "lr": LR},
                    _data(options.data_dir, images),
                    DEVICE,
                    epochs,
                    folder,
                )
                for policy in CHECKPOINT_POLICIES
            }
            seconds: dict[str, list[float]] = {policy: [] for policy in trials}
            for _ in range(options.runs + 1):
                for policy, trial in trials.items():
                    trial.start_turn()
                    seconds[policy].append(trial.end_turn())
            for trial in trials.values():
                trial.stop()
            alone, *_ = medians = [statistics.median(each[1:]) for each in seconds.values()]
            shares = {policy: took / alone - 1 for policy, took in zip(trials, medians, strict=True)}
            found[str(batch_size)] = {policy: round(share, 4) for policy, share in shares.items()}
            listed = ", ".join(f"{policy} {share:+.1%}" for policy, share in list(shares.items())[1:])
            print(f"batch {batch_size:3}: {epochs} epochs of {alone / epochs:.1f} s; {listed}", flush=True)
    return found


CHECKPOINT_POLICIES = ("none", "written before each report", "each epoch", "auto")


def train_with_checkpoints(
    policy: str, params: dict[str, Any], data: dict[str, Any], device: str, epochs: int, folder: str
) -> Iterator[float]:
    """Yield the seconds of one trial after another, with its evaluation and its checkpoints, as in the service.

    Args:
        policy: one of CHECKPOINT_POLICIES.
        params: hyperparameters.
        data: the arguments of `hpo.train.data.load`, without the device.
        device: `cpu` or `cuda`.
        epochs: of a trial.
        folder: where the checkpoints are saved.
    """
    from hpo.search.checkpoint_writer import CheckpointWriter

    every = None if policy == "auto" else 1
    while True:
        with tempfile.TemporaryDirectory(dir=folder) as trial_folder:
            started = time.perf_counter()
            writer = CheckpointWriter(Path(trial_folder), "key", 0, every=every, last_epoch=epochs)
            with contextlib.closing(writer):
                for report in train(params, data=data, seed=0, max_epochs=epochs, device=device):
                    if policy != "none":
                        writer.epoch_ended(report.epoch, {}, report.state, report.metrics["train_seconds"])
                    if policy == "written before each report":
                        writer.save_now()
            seconds = time.perf_counter() - started
        yield seconds


# --- what the device can do ---------------------------------------------------------------------------------------


def matmul_peak(precision: str) -> float:
    """Return the FLOP/s of the fastest of several square matrix products."""
    size, dtype = (8192 if DEVICE == "cuda" else 2048), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # wait for the GPU
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def training_flop(stem: str) -> float:
    """Return the floating-point operations of a training step per image, as torch counts them."""
    model, images = build_model(stem=stem), 4
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(images, 1, 28, 28)).sum().backward()
    return float(counter.get_total_flops()) / images


# --- the command line ---------------------------------------------------------------------------------------------


def _unpack_sample(folder: Path) -> None:
    """Write the sample where torchvision expects the official files."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in SAMPLE_DIR.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "compare": compare, "losses": losses, "grid": grid, "packing": packing,
        "checkpoints": checkpoints,
    }  # fmt: skip
    parser.add_argument("command", nargs="?", default="compare", choices=commands)
    parser.add_argument("--data-dir", help="the folder with the official Fashion-MNIST; by default, the small sample")
    parser.add_argument("--stems", nargs="+", default=list(STEMS), choices=STEMS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--images", type=int, help="training images in an epoch")
    parser.add_argument("--runs", type=int, default=5, help="number of measurements; the median counts")
    parser.add_argument("--epochs", type=int, default=50, help="epochs of the grid")
    parser.add_argument("--trials", nargs="+", type=int, default=[1, 2, 3, 4], help="concurrent trials, for packing")
    parser.add_argument("--trial-epochs", type=int, default=10, help="epochs of a trial, for checkpoints")
    parser.add_argument("--folder", help="where checkpoints are saved; by default, the folder for temporary files")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, torch {torch.__version__}, precision auto is {choose_precision('auto', DEVICE)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hpo-sample-") as folder:
        if options.data_dir is None:
            _unpack_sample(Path(folder))
            options.data_dir = folder
        print(json.dumps(commands[options.command](options)))


if __name__ == "__main__":
    main()
