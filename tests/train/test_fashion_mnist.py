"""The files of Fashion-MNIST: reading them, downloading them, and what the user reads if they are missing."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hpo.errors import DataError
from hpo.train import fashion_mnist
from hpo.train.fashion_mnist import CLASS_NAMES, FILES, SAMPLE_DIR, decode_idx, read_fashion_mnist, read_sample

PACKED = [f"{name}.gz" for name in FILES]


def raw_folder(data_dir: Path) -> Path:
    folder = data_dir / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def unpack_sample(data_dir: Path) -> Path:
    """Write the sample where the full data set is expected, as idx files."""
    folder = raw_folder(data_dir)
    for name in FILES:
        (folder / name).write_bytes(gzip.decompress((SAMPLE_DIR / f"{name}.gz").read_bytes()))
    return folder


def pack_sample(data_dir: Path) -> Path:
    """Write the sample where the full data set is expected, as the compressed files that are downloaded."""
    folder = raw_folder(data_dir)
    for name in PACKED:
        shutil.copy(SAMPLE_DIR / name, folder)
    return folder


def assert_is_sample(data_dir: Path) -> None:
    for found, expected in zip(read_fashion_mnist(data_dir), read_sample(), strict=True):
        assert all(torch.equal(tensor, other) for tensor, other in zip(found, expected, strict=True))


def idx(*header: int, elements: int) -> bytearray:
    return bytearray(bytes(header) + bytes(range(elements)))


# --- idx files ----------------------------------------------------------------------------------------------------


def test_an_idx_file_becomes_a_tensor_of_its_shape() -> None:
    content = idx(0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, elements=6)
    assert torch.equal(decode_idx(content, dimensions=3), torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3))


@pytest.mark.parametrize(
    "content",
    [
        bytearray(b""),
        bytearray(b"<html>please log in</html>"),
        idx(0, 0, 8, 1, 0, 0, 0, elements=0),  # a truncated header
        idx(0, 0, 8, 1, 0, 0, 0, 5, elements=4),
        idx(0, 0, 8, 1, 0, 0, 0, 5, elements=6),
        idx(0, 0, 9, 1, 0, 0, 0, 5, elements=5),  # int8
        idx(0, 0, 8, 2, 0, 0, 0, 5, 0, 0, 0, 1, elements=5),
    ],
)
def test_content_that_is_not_an_idx_file_of_the_right_shape_is_an_error(content: bytearray) -> None:
    with pytest.raises(ValueError, match=r"idx file|bytes for an array"):
        decode_idx(content, dimensions=1)


# --- files that are there -----------------------------------------------------------------------------------------


def fail(*arguments: object) -> None:
    raise AssertionError("nothing needs to be downloaded")


def test_unpacked_files_are_read_without_torchvision_and_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "_download", fail)
    unpack_sample(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert_is_sample(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"<html>please log in</html>", idx(0, 0, 8, 1, 0, 0, 0, 5, elements=5)])
def test_a_damaged_file_is_an_error_that_says_what_to_delete(tmp_path: Path, content: bytes) -> None:
    folder = unpack_sample(tmp_path)
    (folder / FILES[3]).write_bytes(content)
    with pytest.raises(DataError, match=r"in .*raw is damaged \(.+\)\. Delete the unpacked files there"):
        read_fashion_mnist(tmp_path)


def test_a_file_that_another_process_is_unpacking_is_read_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpack_sample(tmp_path)
    whole = (folder / FILES[3]).read_bytes()
    (folder / FILES[3]).write_bytes(whole[:100])
    # The lock is free when the other process has finished.
    monkeypatch.setattr(fashion_mnist, "_download", lambda *arguments: (folder / FILES[3]).write_bytes(whole))
    assert_is_sample(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_images_are_mapped_from_their_files_and_changing_them_changes_no_file(tmp_path: Path) -> None:
    folder = unpack_sample(tmp_path)
    for name in FILES:
        (folder / name).chmod(0o400)
    before = {name: (folder / name).read_bytes() for name in FILES}
    (images, _), _ = read_fashion_mnist(tmp_path)
    assert f"{folder / FILES[0]}\n" in Path("/proc/self/maps").read_text()
    images += 1
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert_is_sample(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
@pytest.mark.slow
def test_processes_share_the_memory_of_the_images(tmp_path: Path) -> None:
    folder = unpack_sample(tmp_path)
    code = (
        "import re, sys; from pathlib import Path; from hpo.train.data import load\n"
        f"data = load(data_dir={str(tmp_path)!r}, val_samples=400)\n"
        "[part.images.sum() for part in (data.train, data.validation, data.test)]\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"found = re.search(re.escape({str(folder / FILES[0])!r}) + '.*?(?=VmFlags)', "
        "Path('/proc/self/smaps').read_text(), re.DOTALL).group()\n"
        "print(*re.findall(r'(?:Rss|Private_Clean|Private_Dirty): +(.+) kB', found))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes[:1]:
        resident, *private = map(int, process.communicate("\n", timeout=60)[0].split())
        assert resident > 1500, "2,000 images of 784 bytes"
        assert private == [0, 0]
    processes[1].communicate("\n", timeout=60)


def test_files_that_cannot_be_mapped_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("this file system maps no files")

    unpack_sample(tmp_path)
    monkeypatch.setattr("hpo.train.fashion_mnist.mmap.mmap", refuse)
    assert_is_sample(tmp_path)


# --- files that are missing ---------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on the discard port: a download fails at once, with or without a network."""
    from torchvision.datasets import FashionMNIST

    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def sample_is_official(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the files of the sample the checksums that are expected of the official ones."""
    from torchvision.datasets import FashionMNIST

    sums = [(name, hashlib.md5((SAMPLE_DIR / name).read_bytes()).hexdigest()) for name in PACKED]
    monkeypatch.setattr(FashionMNIST, "resources", sums)
    for name in FILES:
        content = gzip.decompress((SAMPLE_DIR / f"{name}.gz").read_bytes())
        monkeypatch.setitem(fashion_mnist.SHA256, name, hashlib.sha256(content).hexdigest())


@pytest.mark.slow  # imports torchvision
def test_missing_files_without_a_network_are_an_error_with_folder_files_and_the_sample(
    tmp_path: Path, no_network: None
) -> None:
    with pytest.raises(DataError) as caught:
        read_fashion_mnist(tmp_path / "data")
    text = str(caught.value)
    for fragment in (str(tmp_path / "data" / "FashionMNIST" / "raw"), *PACKED, "--data-dir", "hpo.run quick"):
        assert fragment in text
    # `from None`: the user does not see the tracebacks of torchvision and urllib.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_data_folder_that_cannot_be_created_is_the_same_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(DataError, match="--data-dir"):
        read_fashion_mnist(blocked)


@pytest.mark.slow
def test_compressed_files_in_the_folder_are_unpacked_without_a_network(
    tmp_path: Path, sample_is_official: None
) -> None:
    with pytest.raises(DataError, match="could not be downloaded"):
        read_fashion_mnist(tmp_path)
    pack_sample(tmp_path)  # a failed attempt is not remembered
    assert_is_sample(tmp_path)


@pytest.mark.slow
def test_a_compressed_file_with_another_checksum_is_not_used(tmp_path: Path, sample_is_official: None) -> None:
    folder = pack_sample(tmp_path)
    (folder / PACKED[2]).write_bytes(gzip.compress(b"<html>please log in</html>"))
    with pytest.raises(DataError, match="could not be downloaded"):
        read_fashion_mnist(tmp_path)


@pytest.mark.slow
def test_a_file_with_the_right_md5_sum_only_is_not_used(
    tmp_path: Path, sample_is_official: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pack_sample(tmp_path)
    monkeypatch.setitem(fashion_mnist.SHA256, FILES[2], "0" * 64)
    with pytest.raises(DataError, match=f"could not be downloaded .{FILES[2]}.gz is not the official file"):
        read_fashion_mnist(tmp_path)
    assert [name for name in FILES if (folder / name).exists()] == [], "nothing was put where it would be read"
    assert {path.name for path in tmp_path.iterdir()} <= {"FashionMNIST", ".fashion_mnist.lock"}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log on the terminal."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def mirror(sample_is_official: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that has the sample as the official files."""
    from torchvision.datasets import FashionMNIST

    handler = functools.partial(QuietHandler, directory=str(SAMPLE_DIR))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
        yield
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_missing_files_are_downloaded_without_output(
    tmp_path: Path, mirror: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_is_sample(tmp_path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_class_names_are_torchvisions() -> None:
    from torchvision.datasets import FashionMNIST

    assert list(CLASS_NAMES) == FashionMNIST.classes
