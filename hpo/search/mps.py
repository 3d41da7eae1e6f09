"""CUDA's Multi-Process Service (MPS): trials that share a GPU run their kernels at the same time, not in turn.

    this process -> watcher -> nvidia-cuda-mps-control -> nvidia-cuda-mps-server, in a folder that only this user can read

The watcher is a process that starts MPS and stops it when its standard input ends. That happens when the search ends, and
also when this process is killed. Processes that find no MPS in the folder of the environment run without it, so nothing must
be undone in those that have started. This file runs as a script in the watcher, and imports the standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CONTROL = "nvidia-cuda-mps-control"
PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
LOG_VARIABLE = "CUDA_MPS_LOG_DIRECTORY"
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
DEFAULT_PIPES = Path("/tmp/nvidia-mps")  # of an MPS that was started without the variable
DEVICES = Path("/dev")
FOLDER_PREFIX = "hpo-mps-"
LOCK_FILE = "lock"  # held by the watcher of the folder
MAX_FOLDER_LENGTH = 80  # characters; MPS has sockets in it, and the path of a socket has at most 107

ASK_SECONDS = 5.0  # for an answer of the control process
START_SECONDS = 20.0
ANSWER_SECONDS = 20.0  # for the watcher, which tries to start MPS for START_SECONDS
CLIENT_SECONDS = 60.0  # for a first CUDA context, which also starts the server of MPS
QUIT_SECONDS = 5  # for clients that have not ended
STOP_SECONDS = 20.0  # until what is left of MPS is killed

WATCHER = (sys.executable, "-P", "-S", __file__, "watch")
CLIENT = (sys.executable, "-P", "-S", __file__, "client")


class Mps:
    """Whether processes that start now run under MPS.

    Attributes:
        is_active: whether they do.
        failure: why MPS could not be used, in one line; empty if it was not tried, or worked.
    """

    def __init__(self) -> None:
        self.is_active = False
        self.failure = ""
        self._watcher: subprocess.Popen[str] | None = None  # of the MPS that was started here

    def start(self) -> None:
        """Use the MPS that runs, or start one where it is installed."""
        control = shutil.which(CONTROL)
        named = os.environ.get(PIPE_VARIABLE)
        if named:
            # In a container, MPS may run outside, and the program that controls it may be absent: then it cannot be asked.
            self.is_active = control is None or _ask(control, "get_server_list", Path(named)) is not None
            self.failure = "" if self.is_active else f"no MPS answers at {PIPE_VARIABLE}={named}"
        elif control is not None:
            if DEFAULT_PIPES.exists() and _ask(control, "get_server_list", DEFAULT_PIPES) is not None:
                self.is_active = True
            else:
                try:
                    self.failure = self._start_own(control)
                except OSError as error:  # such as a full disk: the search does without
                    self.failure = str(error)
                self.is_active = not self.failure
                if self.failure:
                    self.stop()

    def stop(self) -> None:
        """Stop the MPS that was started here; one that ran before is left alone."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            self.is_active = False
            os.environ.pop(PIPE_VARIABLE, None)
            _end_watcher(watcher)

    def _start_own(self, control: str) -> str:
        """Start MPS and make a CUDA context in it. Return why this failed, or nothing."""
        _remove_stale(control)
        self._watcher = subprocess.Popen(
            [*WATCHER, control, str(START_SECONDS), str(STOP_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends the watcher
        )
        answer = _first_line(self._watcher, START_SECONDS + ANSWER_SECONDS)
        if "folder" not in answer:
            return answer.get("failure", "it did not start")
        folder = Path(answer["folder"])
        os.environ[PIPE_VARIABLE] = str(folder)
        status, output = _run(CLIENT, CLIENT_SECONDS)
        if status is None:
            return f"no CUDA context could be made in it within {CLIENT_SECONDS:g} s"
        if status != 0:
            return _last_line(output) or f"the process that makes a CUDA context in it ended with {status}"
        # Its server starts with the first client: without one, the context was made outside of it.
        return "" if _ask(control, "get_server_list", folder) else "a new process does not use it"


@contextmanager
def start_mps(*, is_wanted: bool) -> Iterator[Mps]:
    """Start MPS where it is installed, for the processes that are started inside the block. It is stopped at the end.

    An MPS that runs already is used and left alone: the one that CUDA_MPS_PIPE_DIRECTORY names, or the one in
    /tmp/nvidia-mps. One that is started here is used if a CUDA context can be made in it.

    Args:
        is_wanted: whether processes may share a GPU. If not, or if there is no GPU, nothing is done.
    """
    mps = Mps()
    try:
        if is_wanted and has_gpu():
            mps.start()
        yield mps
    finally:
        mps.stop()


def has_gpu() -> bool:
    """Return whether the driver of NVIDIA has found a GPU, and CUDA_VISIBLE_DEVICES does not hide all of them."""
    return os.environ.get(VISIBLE_VARIABLE) not in ("", "-1") and any(DEVICES.glob("nvidia[0-9]*"))


def _first_line(watcher: subprocess.Popen[str], seconds: float) -> dict[str, str]:
    """Return what a watcher says when MPS runs or could not be started; {} if it says nothing."""
    assert watcher.stdout is not None
    if not select.select([watcher.stdout], [], [], seconds)[0]:
        return {}
    line = watcher.stdout.readline()
    answer: dict[str, str] = json.loads(line) if line else {}
    return answer


def _end_watcher(watcher: subprocess.Popen[str]) -> None:
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    watcher.stdin.close()
    try:
        watcher.wait(QUIT_SECONDS + 2 * STOP_SECONDS)
    except subprocess.TimeoutExpired:
        watcher.kill()
        watcher.wait()
    watcher.stdout.close()
    if watcher.returncode != 0 and (control := shutil.which(CONTROL)) is not None:
        _remove_stale(control)  # it was killed


def _remove_stale(control: str) -> None:
    """Stop what an MPS has left whose watcher was killed, and remove its folder."""
    for folder in _parent().glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):  # such as one that has no lock yet, or none any more
            if folder.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            with (folder / LOCK_FILE).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its watcher lives
                _ask(control, f"quit -t {QUIT_SECONDS}", folder, 2 * QUIT_SECONDS)
                shutil.rmtree(folder, ignore_errors=True)


def _parent() -> Path:
    """Return the folder of temporary folders, unless its name is too long for the sockets of MPS."""
    folder = tempfile.gettempdir()
    return Path(folder if len(folder) + len(FOLDER_PREFIX) + 8 <= MAX_FOLDER_LENGTH else "/tmp")


def _ask(control: str, command: str, folder: Path, seconds: float = ASK_SECONDS) -> str | None:
    """Return what the control process of a folder answers; None if there is none, or it does not answer."""
    status, output = _run([control], seconds, text=f"{command}\n", env=os.environ | {PIPE_VARIABLE: str(folder)})
    return None if status != 0 or output.startswith("Cannot find") else output


def _run(
    command: Sequence[str], seconds: float, *, text: str = "", env: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a process, and return its exit code and its output; None as the exit code if it was killed after a time.

    The output goes to a file: a daemon that the process leaves behind would keep a pipe open.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            process.communicate(text.encode(), timeout=seconds)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None, ""
        output.seek(0)
        return process.returncode, output.read().decode(errors="replace").strip()


def _last_line(text: str) -> str:
    return text.splitlines()[-1] if text else ""


# --- in the watcher ---------------------------------------------------------------------------------------------------


def watch(control: str, start_seconds: float, stop_seconds: float) -> None:
    """Start MPS, print {"folder": ...} or {"failure": ...}, and stop it when standard input ends.

    Args:
        control: the program that controls MPS.
        start_seconds: for the start.
        stop_seconds: until what is left is killed.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which MPS would inherit
    _adopt_orphans()
    try:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=_parent()))  # with mode 0700
    except OSError as error:
        print(json.dumps({"failure": str(error)}), flush=True)
        return
    try:
        # Under its name only when it is locked: a lock that can be taken belongs to a watcher that was killed.
        with (folder / f"new-{LOCK_FILE}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"new-{LOCK_FILE}").rename(folder / LOCK_FILE)
            try:
                failure = _start_control(control, folder, start_seconds)
                print(json.dumps({"failure": failure} if failure else {"folder": str(folder)}), flush=True)
                if not failure:
                    sys.stdin.read()
            finally:
                _ask(control, f"quit -t {QUIT_SECONDS}", folder, stop_seconds)
                _wait_for_children(stop_seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_control(control: str, folder: Path, seconds: float) -> str:
    """Start the daemon that controls MPS; return why it does not answer, or nothing."""
    env = os.environ | {PIPE_VARIABLE: str(folder), LOG_VARIABLE: str(folder)}
    if all(each.strip().isdigit() for each in env.get(VISIBLE_VARIABLE, "0").split(",")):
        # Its clients would number the GPUs that it sees from 0, and select among these by the same variable once more.
        env.pop(VISIBLE_VARIABLE, None)
    deadline = time.monotonic() + seconds
    status, output = _run([control, "-d"], seconds, env=env)
    if status != 0:
        what = f"did not end within {seconds:g} s" if status is None else f"ended with {status}"
        return _last_line(output) or f"{CONTROL} -d {what}"
    while _ask(control, "get_server_list", folder) is None:
        if time.monotonic() > deadline:
            return f"{CONTROL} does not answer"
        time.sleep(0.05)
    return ""


def _adopt_orphans() -> None:
    """Become the parent of the daemons that descend from this process, to see when they end."""
    pr_set_child_subreaper = 36  # sys/prctl.h
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def _wait_for_children(seconds: float) -> None:
    """Wait until no descendant is left; after some time, kill them."""
    deadline = time.monotonic() + seconds
    with suppress(ChildProcessError):  # none is left
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                for child in _children() if time.monotonic() > deadline else []:
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.02)


def _children() -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = file.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(file.parent.name))
    return found


# --- in the client ----------------------------------------------------------------------------------------------------


def make_contexts(library: str = "libcuda.so.1") -> None:
    """Make a CUDA context on every GPU that this process may use, with the driver alone: it takes less time than torch.

    Raises:
        OSError: the driver is not here.
        RuntimeError: there is no GPU, or a context cannot be made.
    """
    cuda = ctypes.CDLL(library)

    def call(name: str, *arguments: Any) -> None:
        status = getattr(cuda, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            cuda.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")

    count = ctypes.c_int()
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(count))
    if count.value == 0:
        raise RuntimeError("there is no GPU")
    for number in range(count.value):
        device, context = ctypes.c_int(), ctypes.c_void_p()
        call("cuDeviceGet", ctypes.byref(device), number)
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch(sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
    else:
        make_contexts()
