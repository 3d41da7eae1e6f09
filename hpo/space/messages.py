"""Problems of a search space in the user's words: which key, what is wrong, what is allowed, what was found.

Pydantic reports a problem by the location in the model and by its own error type. This module translates both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from hpo.errors import nearest

MAX_VALUE_LENGTH = 60  # characters of a wrong value that a message shows

KeyPath = tuple[str | int, ...]
Problem = tuple[KeyPath, str]


class InvalidValuesError(ValueError):
    """Raised by a model's validator for values that are valid alone but not together.

    Attributes:
        problems: (key path below the model, text) of each problem.
    """

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(text for _, text in problems))
        self.problems = problems


def fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return {key in the file: field}. They are called the same, except where the key is a keyword of Python."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def group_by_key(error: ValidationError, data: Mapping[str, Any]) -> dict[KeyPath, list[dict[str, Any]]]:
    """Return pydantic's error details by the key that they are about: each member of a union adds one."""
    groups: dict[KeyPath, list[dict[str, Any]]] = {}
    for detail in error.errors(include_url=False):
        groups.setdefault(_key_path(detail, data), []).append(dict(detail))
    return groups


def _key_path(detail: Any, data: Mapping[str, Any]) -> KeyPath:
    """Return the location in the file: pydantic's location without union tags and wrapped fields."""
    path: list[str | int] = []
    value: Any = data
    for part in detail["loc"]:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            continue
        path.append(part)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return tuple(path)


def explain(path: KeyPath, details: Sequence[dict[str, Any]], model: type[BaseModel]) -> Iterator[Problem]:
    """Yield the problems of one key.

    Args:
        path: the key.
        details: pydantic's error details about it.
        model: the model of the whole file, which defines the allowed keys.
    """
    detail = details[0]
    kind, value = detail["type"], detail["input"]
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, InvalidValuesError):
        yield from (((*path, *below), text) for below, text in cause.problems)
    elif kind == "extra_forbidden":
        section = _model_at(model, detail["loc"][:-1])
        yield path, f"unknown key, {nearest(str(path[-1]), fields_by_key(section) if section else ())}"
    elif kind == "missing":
        yield path[:-1], f"the key {path[-1]!r} is missing"
    elif kind == "union_tag_invalid" and detail["ctx"]["discriminator"] == "'name'":
        allowed = [tag.strip(" '") for tag in detail["ctx"]["expected_tags"].split(",")]
        name = str(detail["ctx"]["tag"])
        key = (*path, "name") if isinstance(value, dict) and len(value) > 1 else path
        yield key, f"there is no {path[-1]} {name!r}, {nearest(name, allowed)}"
    elif kind == "union_tag_invalid":
        yield path, f"a range needs `type:` int, float or categorical, got {_shorten(value.get('type'))}"
    elif kind == "union_tag_not_found":
        yield path, "write a name, or a mapping with the key 'name'"
    elif kind == "string_pattern_mismatch" and path == ("trainable",):
        yield path, f"write module:function, got {_shorten(value)}"
    elif kind == "model_type":
        yield path, f"{_describe_mapping(_model_at(model, detail['loc']))}, got {_shorten(value)}"
    elif kind == "list_type" and isinstance(value, str | int | float):
        yield path, f"write a list: [{json.dumps(value) if _needs_quotes(value) else value}]"
    elif kind == "literal_error" and len(details) == 1 and isinstance(value, str):
        hint = nearest(value, re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
        yield path, _translate(details) + (f", {hint}" if hint.startswith("did you mean") else "")
    else:
        yield path, _translate(details)


def _describe_mapping(section: type[BaseModel] | None) -> str:
    """Return what to write for a section instead of a single value."""
    example = getattr(section, "example", "")
    if example or section is None:
        return f"write {example or 'a mapping'}"
    return f"write a mapping, whose keys are among {', '.join(fields_by_key(section))}"


def _needs_quotes(value: object) -> bool:
    """Return whether a value in a list in brackets is a text that YAML may read as something else without quotes."""
    return isinstance(value, str) and re.fullmatch(r"[\w.@-]+", value) is None


def _translate(details: Sequence[dict[str, Any]]) -> str:
    """Return pydantic's own text with the value that was found; alternatives of a union are joined by "or"."""
    value = details[0]["input"]
    if len(details) == 1:
        message = str(details[0]["msg"])
    else:
        allowed = dict.fromkeys(each["msg"].removeprefix("Input should be ").partition(",")[0] for each in details)
        message = "Input should be " + " or ".join(allowed)
    message = message.removeprefix("Value error, ")
    if details[0]["type"] == "value_error" or isinstance(value, dict | BaseModel):
        return message
    return f"{message[:1].lower()}{message[1:]}, got {_shorten(value)}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:MAX_VALUE_LENGTH]}..."


def _model_at(annotation: Any, location: Sequence[str | int]) -> type[BaseModel] | None:
    """Return the model at a pydantic location, which consists of keys and of union tags."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        tags = tuple(mark.tag for mark in members[1:] if isinstance(mark, Tag))
        if location[: len(tags)] != tags:
            return None
        return _model_at(members[0], location[len(tags) :])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        name = annotation.model_fields.get("name")
        if location and name is not None and get_args(name.annotation) == (location[0],):
            location = location[1:]
        if not location:
            return annotation
        field = fields_by_key(annotation).get(str(location[0]))
        return None if field is None else _model_at(field.annotation, location[1:])
    if origin is list:
        return _model_at(members[0], location[1:])
    if origin is dict:
        return _model_at(members[1], location[1:])
    return next((model for member in members if (model := _model_at(member, location)) is not None), None)
