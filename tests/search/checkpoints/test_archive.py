"""States without tensors are written and read without torch, in torch's format."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.search.checkpoints.archive import read_archive, write_archive
from hpo.search.checkpoints.files import Checkpoint, load_checkpoint, save_checkpoint
from hpo.search.checkpoints.states import check_plain, has_tensors
from tests.factories import Attack, trial_spec

PLAIN: dict[Any, Any] = {
    "numbers": [0, -1, 2**100, 0.1 + 0.2, float("inf"), 1 + 2j, True, None],
    "texts": ("", "ä", "\udc80", "x" * 300),
    "bytes": b"\x00\xff",
    "sets": {1, "two", (3, 4)},
    7: {"nested": {"deeper": []}},
    (1, 2): "a tuple as a key",
}


def write(path: Path, content: dict[str, Any]) -> Path:
    with path.open("wb") as file:
        write_archive(file, content)
    return path


def save_by_torch(folder: Path, content: dict[str, Any]) -> Path:
    """Save a checkpoint as earlier versions did."""
    path = folder / "by_torch.pt"
    with path.open("wb") as file:
        torch.save(content, file)
    return path


@pytest.mark.parametrize("content", [{}, PLAIN, {"ordered": OrderedDict(b=1, a=2), "counts": Counter("aab")}])
def test_torch_reads_what_was_written_without_it_and_the_other_way_round(tmp_path: Path, content: Any) -> None:
    written = write(tmp_path / "written.pt", content)
    assert read_archive(written) == content
    assert torch.load(written, weights_only=True) == content
    assert read_archive(save_by_torch(tmp_path, content)) == content


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2),
        {torch.ones(2)},
        {torch.ones(2): 1},
        [({"a": torch.ones(2)},)],
        pytest.param("an attribute", id="attribute"),
    ],
)
def test_tensors_are_found_wherever_they_are_and_written_by_torch(tmp_path: Path, content: Any) -> None:
    if content == "an attribute":
        content = marked(OrderedDict(a=1), torch.ones(2))
    assert has_tensors(content)
    written = write(tmp_path / "written.pt", {"content": content})
    with zipfile.ZipFile(written) as archive:
        assert any("/data/" in name for name in archive.namelist()), "the tensor's own file"
    assert has_tensors(read_archive(written))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    attack = pickle.dumps({"state": Attack(tmp_path / "ran")}, 2)
    written = write(tmp_path / "written.pt", {})
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("archive/data.pkl", attack)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(pickle.UnpicklingError):
        read_archive(written)
    assert not (tmp_path / "ran").exists()
    pickle.loads(attack)  # only to show that it was a working attack
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("more", "start"),
    [
        pytest.param({"b": b"x"}, 0, id="plain"),
        # The headers alone: it is a larger file.
        pytest.param({"w": torch.arange(5.0)}, b"PK\1\2", id="tensors", marks=pytest.mark.slow),
    ],
)
def test_any_flipped_bit_is_noticed_or_harmless(tmp_path: Path, more: dict[str, Any], start: int | bytes) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, {}, {"a": 1}, "k"))
    save_checkpoint(tmp_path, Checkpoint(2, {1: {"v": 0.5}}, {"a": 2, **more}, "k"))
    path = max(tmp_path.glob("*.pt"))
    content = path.read_bytes()
    found = []
    for position in range(start if isinstance(start, int) else content.index(start), len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            found.append(str(load_checkpoint(tmp_path, "k")))
    fallback, newest = str(Checkpoint(1, {}, {"a": 1}, "k")), str(Checkpoint(2, {1: {"v": 0.5}}, {"a": 2, **more}, "k"))
    assert set(found) == {fallback, newest}
    assert found.count(fallback) > len(found) / 4


Point = namedtuple("Point", "x y")  # as a user may write it


class Defaults(dict[str, Any]):
    """A dict of a user."""


class OwnTensor(torch.Tensor):
    """A tensor of a user."""


def marked(value: Any, mark: Any) -> Any:
    value.mark = mark
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Defaults(), "tensors and plain values, but state is a .*Defaults"),
        ({"p": [Point(1, 2)]}, r"but state\['p'\]\[0\] is a .*Point"),
        ({frozenset(): 1}, "but a key of state is a builtins.frozenset"),
        ({"t": marked(torch.ones(2), Defaults())}, r"but state\['t'\].mark is a .*Defaults"),
        ({"o": marked(OrderedDict(a=1), Defaults())}, r"but state\['o'\].mark is a .*Defaults"),
        ({"t": torch.ones(2).as_subclass(OwnTensor)}, r"but state\['t'\] is a .*OwnTensor"),
        ({"i": 2**3000}, r"torch loads integers of 2,000 bits, but state\['i'\] has 3,001"),
        ({"b": b""}, r"torch cannot load empty bytes, but state\['b'\] is b''"),
    ],
)
def test_what_torch_cannot_load_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        check_plain(value)
    torch.save(value, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):  # so the message is right
        torch.load(tmp_path / "state.pt", weights_only=True)


def test_what_torch_can_load_is_not_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    state = {
        "model": model.state_dict(),
        "parameters": list(model.parameters()),
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "shape": torch.Size([2, 3]),
        "integers": [2**1999, -(2**1999)],
        "kind": [torch.float32, torch.device("cpu")],
        "marked": [marked(OrderedDict(a=1), [2]), marked(torch.ones(1), {"b": 3})],
    }
    check_plain(state)
    torch.save(state, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)
    for name, value in state.items():  # alone, it may have no tensors
        assert str(read_archive(write(tmp_path / f"{name}.pt", {name: value}))) == str({name: value})


# --- a worker without torch -----------------------------------------------------------------------------------------------

WORKER = """
import sys
import hpo.search.ray_worker  # all that a worker of Ray imports
from hpo.search.messages import TrialSpec
from hpo.search.worker import run_trial

spec = TrialSpec(**eval(sys.argv[1]))
values = [report.metrics["value"] for report, _ in zip(run_trial(spec), range(int(sys.argv[2])))]
print("torch" in sys.modules, values)
"""
READER = """
import sys
from pathlib import Path
from hpo.search.checkpoints.archive import read_archive

content = read_archive(Path(sys.argv[1]))
print("torch" in sys.modules, content)
"""


def run_worker(spec: Any, epochs: int) -> str:
    command = [sys.executable, "-c", WORKER, repr(vars(spec)), str(epochs)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("replicates", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_trainable_without_torch_is_checkpointed_and_resumed_without_it(tmp_path: Path, replicates: int) -> None:
    spec = trial_spec(tmp_path, replicates=replicates)
    straight = run_worker(trial_spec(tmp_path / "straight", replicates=replicates), 4)
    assert straight.startswith("False [")
    assert run_worker(spec, 2).startswith("False [")
    rest = run_worker(trial_spec(tmp_path, replicates=replicates, stored_epoch=2), 3)
    assert rest == "False [" + straight.split(", ", 1)[1]  # epochs 2, from the checkpoint, to 4
    assert list(tmp_path.glob("trial/epoch-*.pt"))


@pytest.mark.slow
def test_every_plain_value_is_read_without_torch(tmp_path: Path) -> None:
    content = PLAIN | {"ordered": OrderedDict(b=1, a=2), "counts": Counter("aab"), "texts": ["ä"], "sets": {1, 2, 3}}
    command = [sys.executable, "-c", READER, str(save_by_torch(tmp_path, content))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == f"False {content}"


@pytest.mark.slow
def test_a_checkpoint_is_written_while_the_trainable_imports_torch(tmp_path: Path) -> None:
    """The thread that writes it waits for the import, or needs no torch."""
    (tmp_path / "busy.py").write_text(BUSY)
    spec = trial_spec(tmp_path, trainable="busy:train", code_folder=str(tmp_path))
    assert run_worker(spec, 4) == "True [1.0, 2.0, 3.0, 4.0]"
    assert len(list(tmp_path.glob("trial/epoch-*.pt"))) == 2


BUSY = """
from hpo.trainable import EpochReport

def train(params, *, data, seed, max_epochs, device, checkpoint=None):
    for epoch in range(1, max_epochs + 1):
        if epoch > 1:
            import torch  # while the checkpoint of the epoch before is written
        yield EpochReport(epoch, {"value": float(epoch)}, lambda: {"list": list(range(200_000))})
"""
LATE = """
from hpo.trainable import EpochReport

def train(params, *, data, seed, max_epochs, device, checkpoint=None):
    import torch
    for epoch in range(1, max_epochs + 1):
        yield EpochReport(epoch, {"value": float(torch.get_num_threads())}, dict)
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_torch_has_the_threads_of_the_trial_although_the_trainable_imports_it_late(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, str(3 - threads))
    (tmp_path / "late.py").write_text(LATE)
    spec = trial_spec(tmp_path, trainable="late:train", code_folder=str(tmp_path), threads=threads)
    assert run_worker(spec, 1) == f"True [{float(threads)}]"
