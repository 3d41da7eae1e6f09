"""Delivers the end of a search to the recipient of `on_finish`. What goes wrong is a remark: the search itself is over."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from hpo.space.recipient import Recipient, arguments_of, is_url

DELIVERY_SECONDS = 30.0  # how long a search that has ended waits for its recipient


def deliver(recipient: Recipient, ending: Mapping[str, Any]) -> str:
    """Run the command of `on_finish`, or send a POST to its URL.

    Args:
        recipient: a valid one.
        ending: plain values, see `hpo.announcement`.

    Returns:
        What went wrong; empty if the recipient got it. It does not contain the URL.
    """
    return _post(str(recipient), ending) if is_url(recipient) else _run(recipient, ending)


def _run(recipient: Recipient, ending: Mapping[str, Any]) -> str:
    arguments = arguments_of(recipient)
    try:
        process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, env=os.environ | _variables(ending), start_new_session=True
        )
    except (OSError, ValueError) as error:  # ValueError: a null character
        return f"cannot be run: {error.strerror if isinstance(error, OSError) else error}"
    with process:
        try:
            process.communicate(json.dumps(ending).encode(), timeout=DELIVERY_SECONDS)
        except subprocess.TimeoutExpired:
            return f"killed, because it took longer than {DELIVERY_SECONDS:g} s"
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
    code = process.returncode
    return "" if code == 0 else f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"


def _variables(ending: Mapping[str, Any]) -> dict[str, str]:
    """Return the main facts as environment variables; one that is not known is empty."""
    best = ending["best"] or {}
    facts = {name: ending[name] for name in ("study", "revision", "storage", "state", "cause", "exit_code", "report")}
    facts |= {"best_value": best.get("value"), "best_trial": best.get("trial"), "text": ending["text"]}
    return {
        f"HPO_{name.upper()}": "" if value is None else str(value).replace("\0", "") for name, value in facts.items()
    }


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: urllib would continue with a GET, without the JSON, and to other servers."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


def _post(url: str, ending: Mapping[str, Any]) -> str:
    problems: list[str] = []
    # On a thread, because no timeout of urllib is one for the whole request.
    thread = threading.Thread(target=lambda: problems.append(_send(url, ending)), name="hpo-on-finish", daemon=True)
    thread.start()
    thread.join(DELIVERY_SECONDS)
    return problems[0] if problems else f"no answer within {DELIVERY_SECONDS:g} s"


def _send(url: str, ending: Mapping[str, Any]) -> str:
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json", "User-Agent": f"hpo/{metadata.version('hpo')}"}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
    request = urllib.request.Request(address, json.dumps(ending).encode(), headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=DELIVERY_SECONDS):
            return ""
    except HTTPError as error:
        error.close()
        moved = ", a redirect, which is not followed: write the URL that it leads to" if 300 <= error.code < 400 else ""
        return f"status {error.code}{moved}"
    except URLError as error:
        reason = error.reason
        return (reason.strerror or str(reason)) if isinstance(reason, OSError) else str(reason)
    except Exception as error:  # noqa: BLE001 # a server may answer anything; the text may repeat the URL
        return type(error).__name__
