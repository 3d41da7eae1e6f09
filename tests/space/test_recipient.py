"""Who is notified of how a search has ended, and what messages show of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpo.errors import SpaceError
from hpo.space.recipient import arguments_of, check_recipient, is_url, show_recipient
from tests.space.conftest import Load
from tests.space.examples import VALID


@pytest.mark.parametrize(
    ("recipient", "shown"),
    [
        ("https://user:secret@hooks.example:8443/secret?key=secret#secret", "https://hooks.example:8443/..."),
        ("http://[::1]:80/", "http://[::1]:80"),
        ("HTTP://hooks.example?secret", "http://hooks.example/..."),
        ("curl -d secret https://hooks.example/secret", "curl"),
        (["my program", "secret"], "my program"),
    ],
)
def test_messages_show_a_server_or_a_program(recipient: Any, shown: str) -> None:
    assert check_recipient(recipient) == recipient
    assert show_recipient(recipient) == shown
    assert is_url(recipient) == shown.startswith("http")


def test_a_text_is_split_into_arguments_as_a_shell_does() -> None:
    assert arguments_of("sh -c 'echo \"$HPO_TEXT\"'") == ["sh", "-c", 'echo "$HPO_TEXT"']


@pytest.mark.parametrize(
    ("recipient", "problem"),
    [
        ("", "is empty: write a command, a list of its arguments, or a URL"),
        ([], "a list of texts, the program first"),
        (["secret", 5], "a list of texts, the program first"),
        (["https://secret"], "a URL is written without brackets"),
        ({"url": "secret"}, "write a command, a list of its arguments, or a URL that begins with https:// or http://"),
        ("mail 'secret", "cannot be split into arguments: No closing quotation"),
        ("file:///secret", "a URL of file:// gets no POST"),
        ("ftp://secret/secret", "a URL of ftp:// gets no POST"),
        ("https:///secret", "the URL has no server"),
        ("https://host:secret/", "this is no URL"),
        ("https://[secret/", "this is no URL"),
        ("https://hooks.example/secret path", "a URL has no spaces"),
    ],
)
def test_a_mistake_is_named_and_not_repeated(load: Load, recipient: Any, problem: str) -> None:
    with pytest.raises(SpaceError) as caught:
        load(VALID + f"on_finish: {json.dumps(recipient)}\n")
    assert "space.yaml:6:1: on_finish: " in str(caught.value)
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)
