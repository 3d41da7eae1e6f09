"""How fast `hpo.train` trains, compared with the loop of a tutorial. Needs torch and torchvision only.

    python -m benchmarks.train_speed                       images/s of both loops, and the share of the matmul peak
    python -m benchmarks.train_speed convolutions          torch's time over that of hpo/train/fast_conv.py, by shape
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
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from hpo.search.mps import start_mps
from hpo.train.fashion_mnist import SAMPLE_DIR
from hpo.train.fast_conv import Choice, Geometry, choose, convolve, matmul
from hpo.train.learner import keep_freed_memory
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


def naive(stem: str, batch_size: int, images: int, data_dir: str, precision: str) -> Iterator[float]:
    """Yield the images per second of the tutorial's loop after each epoch. It is always in fp32."""
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


def ours(stem: str, batch_size: int, images: int, data_dir: str, precision: str) -> Iterator[float]:
    """Yield the images per second that `hpo.train` reports after each epoch."""
    params = {"stem": stem, "batch_size": batch_size, "lr": LR, "precision": precision}
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


def take_turns(trials: Sequence[Contestant], turns: int) -> float:
    """Let trials take turns at the same time; return the median of what they yield, added up. The first does not count."""
    sums = []
    for _ in range(turns + 1):
        for trial in trials:
            trial.start_turn()
        sums.append(sum(trial.end_turn() for trial in trials))
    return statistics.median(sums[1:])


# --- the commands -------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Print images/s of both loops by stem and batch size; return {"stem/batch size": ratio}."""
    precision = choose_precision(options.precision, DEVICE)
    peak = matmul_peak(precision)  # of the other one not: without AVX512-BF16, a bf16 product takes minutes
    print(f"matmul peak: {precision} {peak / 1e12:.3f} TFLOP/s")
    print(f"{'stem':9} {'batch':>5} {'tutorial':>9} {'ours':>9} {'ratio':>6}   share of the {precision} peak")
    ratios = {}
    for stem in options.stems:
        flop = training_flop(stem)
        for batch_size in options.batch_sizes:
            images = options.images or (SAMPLE if stem == "imagenet" else SAMPLE // 3)
            arguments = stem, batch_size, images, options.data_dir, options.precision
            pair = [Contestant(loop, *arguments) for loop in (naive, ours)]
            rounds: list[list[float]] = [[] for _ in pair]
            for _ in range(options.runs + 1):
                for contestant, speeds in zip(pair, rounds, strict=True):
                    contestant.start_turn()
                    speeds.append(contestant.end_turn())
            for contestant in pair:
                contestant.stop()
            theirs, fast = (statistics.median(speeds[1:]) for speeds in rounds)  # the first round is a warm-up
            ratios[f"{stem}/{batch_size}"] = round(fast / theirs, 2)
            share = flop * fast / peak
            print(
                f"{stem:9} {batch_size:5} {theirs:9,.0f} {fast:9,.0f} {fast / theirs:5.2f}x   {share:.1%}", flush=True
            )
    return ratios


def convolutions(options: argparse.Namespace) -> dict[str, Any]:
    """Print torch's time over ours for each product of each convolution; return {"stem/batch size": {shape: ratios}}.

    A star marks what a training computes with `fast_conv`. The least times count. On a CPU only.
    """
    keep_freed_memory()
    precision = choose_precision(options.precision, "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{capability}, {precision}; a star: chosen. GFLOP/s are torch's")
    products = Choice._fields[:3]
    found: dict[str, Any] = {}
    for stem in options.stems:
        for batch_size in options.batch_sizes:
            print(f"{stem}, batch {batch_size}")
            ratios: dict[str, list[float]] = {}
            before = after = 0.0
            for (c, d, geometry), count in Counter(_shapes(stem)).items():
                kernel, stride, _, size = geometry
                chosen = choose(geometry, dtype, capability)
                name = f"{c} -> {d}, {kernel}x{kernel}/{stride}, {size} -> {geometry.out}"
                line, ratios[name] = f"{count} x {name:28}", []
                for i, what in enumerate(products):
                    if what == "images_gradient" and c == 1:
                        continue
                    ours = (
                        Choice(False, False, False, True) if geometry.is_linear else Choice(*(j == i for j in range(4)))
                    )
                    theirs_s, ours_s = _time_product(i, batch_size, (c, d, geometry), dtype, ours, options.runs)
                    is_ours = chosen[i] or chosen.linear
                    before += count * theirs_s
                    after += count * (ours_s if is_ours else theirs_s)
                    ratios[name].append(round(theirs_s / ours_s, 2))
                    gflop = 2e-9 * batch_size * c * d * (geometry.out * kernel) ** 2
                    line += (
                        f"  {what} {theirs_s / ours_s:5.2f}{'*' if is_ours else ' '} ({gflop / theirs_s:3.0f} GFLOP/s)"
                    )
                print(line, flush=True)
            print(
                f"all convolutions of a step: {before * 1e3:.0f} ms in torch, {after * 1e3:.0f} ms as chosen",
                flush=True,
            )
            found[f"{stem}/{batch_size}"] = ratios
    return found


def _shapes(stem: str) -> list[tuple[int, int, Geometry]]:
    """Return channels in, channels out and geometry of each convolution of a network."""
    found: list[tuple[int, int, Geometry]] = []

    def record(conv: Any, inputs: tuple[torch.Tensor]) -> None:
        geometry = Geometry(conv.kernel_size[0], conv.stride[0], conv.padding[0], inputs[0].shape[2])
        found.append((conv.in_channels, conv.out_channels, geometry))

    model = build_model(stem=stem)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(record)
    model(torch.rand(2, 1, 28, 28))
    return found


def _time_product(
    which: int, n: int, shape: tuple[int, int, Geometry], dtype: torch.dtype, choice: Choice, runs: int
) -> tuple[float, float]:
    """Return the seconds of a product (0: forward, 1: gradient of the images, 2: of the weight) in torch and by a choice."""
    c, d, geometry = shape
    kernel, stride, padding, size = geometry
    images = torch.randn(n, c, size, size).to(memory_format=torch.channels_last).requires_grad_(which == 1)
    weight = torch.randn(d, c, kernel, kernel).to(memory_format=torch.channels_last).requires_grad_(which == 2)
    gradient = torch.randn(n, d, geometry.out, geometry.out).to(dtype, memory_format=torch.channels_last)
    seconds: list[list[float]] = [[], []]
    for _ in range(runs + 1):
        for is_ours, found in enumerate(seconds):
            images.grad = weight.grad = None
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                if is_ours:
                    output = convolve(images, weight, geometry, dtype, choice)
                else:
                    output = F.conv2d(images, weight, None, stride, padding)
            if which:
                started = time.perf_counter()
                output.backward(gradient)
            found.append(time.perf_counter() - started)
    theirs, ours = (min(found[1:]) for found in seconds)  # the first is a warm-up
    return theirs, ours


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
            params = {"stem": stem, "batch_size": batch_size, "lr": LR, "precision": options.precision}
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
                    arguments = stem, batch_size, images, options.data_dir, options.precision
                    trials = [Contestant(ours, *arguments) for _ in range(count)]
                    speeds[str(count)] = round(take_turns(trials, options.runs))
                    for trial in trials:
                        trial.stop()
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
    from hpo.search.checkpoints.writer import CheckpointWriter

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
        c = matmul(a, b)
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
        "compare": compare, "convolutions": convolutions, "losses": losses, "grid": grid, "packing": packing,
        "checkpoints": checkpoints,
    }  # fmt: skip
    parser.add_argument("command", nargs="?", default="compare", choices=commands)
    parser.add_argument("--data-dir", help="the folder with the official Fashion-MNIST; by default, the small sample")
    parser.add_argument("--stems", nargs="+", default=list(STEMS), choices=STEMS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of our loop")
    parser.add_argument("--threads", type=int, help="CPU threads; by default, one per core")
    parser.add_argument("--images", type=int, help="training images in an epoch")
    parser.add_argument("--runs", type=int, default=5, help="number of measurements; the median counts")
    parser.add_argument("--epochs", type=int, default=50, help="epochs of the grid")
    parser.add_argument("--trials", nargs="+", type=int, default=[1, 2, 3, 4], help="concurrent trials, for packing")
    parser.add_argument("--trial-epochs", type=int, default=10, help="epochs of a trial, for checkpoints")
    parser.add_argument("--folder", help="where checkpoints are saved; by default, the folder for temporary files")
    options = parser.parse_args()
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes of the loops
        torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, torch {torch.__version__}, precision auto is {choose_precision('auto', DEVICE)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hpo-sample-") as folder:
        if options.data_dir is None:
            _unpack_sample(Path(folder))
            options.data_dir = folder
        print(json.dumps(commands[options.command](options)))


if __name__ == "__main__":
    main()
