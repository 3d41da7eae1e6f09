"""A YAML mapping as plain data that remembers where each value was written, and errors that say it.

The reader is YAML 1.2's core schema: 1e-4 is a number, on/off/yes/no are the words that the user wrote, a key that appears
twice is an error. A file cannot make it slow: its size, its depth and the number of its values are limited.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError

from hpo.errors import SettingError, SpaceError, nearest

MAX_FILE_BYTES = 100_000  # a search space is ten lines; anything near this is the wrong file
MAX_YAML_NODES = 5_000  # after aliases are expanded: stops YAML bombs, and files that take long
MAX_YAML_DEPTH = 20  # of collections inside each other; the parser itself recurses
MAX_PROBLEMS = 50  # told of one file
MAX_GOT = 60  # characters of a wrong value that are shown

KeyPath = tuple[str | int, ...]
Problem = tuple[KeyPath, str]


class InvalidValuesError(ValueError):
    """What a validator of a model found wrong with values that are well by themselves.

    Attributes:
        problems: (key path below the model, text) of each.
    """

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(text for _, text in problems))
        self.problems = problems


class Document:
    """A YAML mapping and its overrides.

    Attributes:
        data: the mapping as plain values.

    Raises:
        SettingError: there is no such file, or it cannot be read.
        SpaceError: it is not a YAML mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where: dict[KeyPath, _Place] = {}
        self._nodes = 0
        data = self._parse(_read(path), _Source(f"{path}:", has_lines=True))
        if data is None:
            raise SpaceError(f"{path}: the file is empty; it needs at least sampler, max_epochs and parameters")
        if not isinstance(data, dict):
            raise SpaceError(f"{path}:1:1: a search space is a mapping of keys to values")
        self.data: dict[str, Any] = data

    def override(self, assignment: str) -> None:
        """Apply one `KEY=VALUE`: the key a dotted path, the value read as YAML."""
        where = f"--set {assignment}"
        key, equals, text = assignment.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise SettingError(f"{where}: write KEY=VALUE, for example --set max_epochs=2")
        value = self._parse(text, _Source(f"{where}:", has_lines=False), prefix=tuple(names))
        section = self.data
        for name in names[:-1]:
            if isinstance(section.get(name), str):  # `sampler: tpe` grows into `sampler: {name: tpe}`
                section[name] = {"name": section[name]}
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise SettingError(f"{where}: {name} is a single value, it has no part {names[-1]!r}")
        section[names[-1]] = value
        self._where[tuple(names)] = _Place(f"{where}: ")

    # --- errors

    def position(self, path: KeyPath) -> str:
        """Return `file:line:column: ` of the nearest written key on a path, or the override that set it."""
        return self._place(path).text

    def line(self, problem: Problem) -> str:
        """Return a problem as one line: where, which key, what is wrong."""
        path, text = problem
        key_path = ".".join(map(str, path))
        return f"{self.position(path)}{key_path + ': ' if key_path else ''}{text}"

    def error(self, problems: Iterable[Problem]) -> SpaceError:
        """Return all problems as one error, in the order of the file."""
        found = sorted(dict.fromkeys(problems), key=lambda problem: self._place(problem[0]).order)
        lines = [self.line(problem) for problem in found[:MAX_PROBLEMS]]
        if len(found) > MAX_PROBLEMS:
            lines.append(f"{self.path}: and {len(found) - MAX_PROBLEMS} more mistakes")
        return SpaceError("\n".join(lines))

    def problems(self, error: ValidationError, model: type[BaseModel]) -> list[Problem]:
        """Return what pydantic found, in the words of the user: which key, what is allowed, what was got."""
        groups: dict[KeyPath, list[dict[str, Any]]] = {}
        for detail in error.errors(include_url=False):
            groups.setdefault(self._written(detail), []).append(dict(detail))
        paths = sorted(groups, key=lambda path: self._place(path).order)
        found: list[Problem] = []
        for path in paths[: MAX_PROBLEMS + 1]:  # more are not told, and nearest names cost time
            found += _explain(path, groups[path], model)
        return found + [(path, "is wrong too") for path in paths[MAX_PROBLEMS + 1 :]]

    def _written(self, detail: Any) -> KeyPath:
        """Keep of a pydantic location what the user wrote: it also names the tags of unions and the wrapped fields."""
        path: list[str | int] = []
        value: Any = self.data
        for part in detail["loc"]:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                continue
            path.append(part)
        if detail["type"] == "missing":
            path.append(detail["loc"][-1])
        return tuple(path)

    def _place(self, path: KeyPath) -> _Place:
        while path and path not in self._where:
            path = path[:-1]
        return self._where.get(path) or _Place(f"{self.path}: ")

    # --- reading

    def _parse(self, text: str, source: _Source, prefix: KeyPath = ()) -> Any:
        try:
            depth = 0
            for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
                if count > 3 * MAX_YAML_NODES:  # a key, a value, and what opens and closes
                    raise SpaceError(f"{source.place(event.start_mark).text}more than {MAX_YAML_NODES} values")
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > MAX_YAML_DEPTH:
                    place = source.place(event.start_mark)
                    raise SpaceError(f"{place.text}more than {MAX_YAML_DEPTH} lists or mappings inside each other")
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            place = source.place(error.problem_mark)
            hint = "; YAML is indented by spaces, not by tabs" if _is_tab(text, error.problem_mark) else ""
            raise SpaceError(f"{place.text}not YAML: {error.problem}{hint}") from None
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            mark = yaml.Mark("", 0, before.count("\n"), len(before.rpartition("\n")[2]), None, 0)
            raise SpaceError(f"{source.place(mark).text}not YAML: the character {error.character!r}") from None
        except yaml.YAMLError as error:
            raise SpaceError(f"{source.name} not YAML: {error}") from None
        return None if node is None else self._plain(node, prefix, source, ())

    def _plain(self, node: yaml.Node, path: KeyPath, source: _Source, parents: tuple[int, ...]) -> Any:
        self._nodes += 1
        place = source.place(node.start_mark)
        if self._nodes > MAX_YAML_NODES or id(node) in parents or len(parents) > MAX_YAML_DEPTH:
            raise SpaceError(
                f"{place.text}the file expands to more than {MAX_YAML_NODES} values, or more than {MAX_YAML_DEPTH} inside "
                "each other"
            )
        kind = {"map": yaml.MappingNode, "seq": yaml.SequenceNode}.get(node.tag.rpartition(":")[2], yaml.ScalarNode)
        if not node.tag.startswith("tag:yaml.org,2002:") or not isinstance(node, kind):
            raise SpaceError(f"{place.text}the tag {node.tag} is not allowed")
        parents = (*parents, id(node))
        self._where.setdefault(path, place)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key_place = source.place(key_node.start_mark)
                if not isinstance(key_node, yaml.ScalarNode):
                    raise SpaceError(f"{key_place.text}a key is a single word")
                key = str(key_node.value)
                if key in mapping:
                    raise SpaceError(f"{key_place.text}the key {key!r} appears twice")
                self._where[(*path, key)] = key_place
                mapping[key] = self._plain(value_node, (*path, key), source, parents)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*path, i), source, parents) for i, item in enumerate(node.value)]
        return _scalar(node, place)


# --- places -------------------------------------------------------------------------------------------------------


class _Place:
    """Where something was written: `text` says it, `order` sorts by it."""

    def __init__(self, text: str, line: int | None = None, column: int = 0) -> None:
        self.text = text
        self.order = (line is None, line or 0, column)


class _Source:
    """What is being read: a file, or an override, which has no lines."""

    def __init__(self, name: str, *, has_lines: bool) -> None:
        self.name = name
        self._has_lines = has_lines

    def place(self, mark: Any) -> _Place:
        if mark is None or not self._has_lines:
            return _Place(f"{self.name} ")
        return _Place(f"{self.name}{mark.line + 1}:{mark.column + 1}: ", mark.line, mark.column)


# --- reading YAML -------------------------------------------------------------------------------------------------


class _Loader(yaml.CSafeLoader):
    """YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first)


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise SettingError(
                f"cannot read the search space {path}: {'not a file' if path.exists() else 'no such file'}"
            )
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise SpaceError(f"{path}: {size} bytes; a search space has at most {MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingError(f"cannot read the search space {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpaceError(f"{path}: not a text file in UTF-8") from None


def _is_tab(text: str, mark: yaml.Mark | None) -> bool:
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return False
    line = lines[mark.line]
    return "\t" in line[: len(line) - len(line.lstrip())]


def _scalar(node: yaml.Node, place: _Place) -> int | float | str | bool | None:
    text = str(node.value)
    try:
        match node.tag.rpartition(":")[2]:
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text)
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str":
                return text
    except (ValueError, KeyError):
        raise SpaceError(f"{place.text}{text[:40]!r} is not what the tag {node.tag} says") from None
    raise SpaceError(f"{place.text}the tag {node.tag} is not allowed")


# --- in the words of the user -------------------------------------------------------------------------------------


def _explain(path: KeyPath, details: Sequence[dict[str, Any]], model: type[BaseModel]) -> Iterator[Problem]:
    """Yield what is wrong with one value; the members of a union complain of it each."""
    detail = details[0]
    kind, got = detail["type"], detail["input"]
    broken = detail.get("ctx", {}).get("error")
    if isinstance(broken, InvalidValuesError):
        yield from (((*path, *below), text) for below, text in broken.problems)
    elif kind == "extra_forbidden":
        beside = _model_at(model, detail["loc"][:-1])
        yield path, f"unknown key, {nearest(str(path[-1]), beside.model_fields if beside else ())}"
    elif kind == "missing":
        yield path[:-1], f"the key {path[-1]!r} is missing"
    elif kind == "union_tag_invalid" and detail["ctx"]["discriminator"] == "'name'":
        allowed = [tag.strip(" '") for tag in detail["ctx"]["expected_tags"].split(",")]
        name = str(detail["ctx"]["tag"])
        at = (*path, "name") if isinstance(got, dict) and len(got) > 1 else path
        yield at, f"there is no {path[-1]} {name!r}, {nearest(name, allowed)}"
    elif kind == "union_tag_invalid":
        yield path, f"a range needs `type:` int, float or categorical, got {_show(got.get('type'))}"
    elif kind == "union_tag_not_found":
        yield path, "write a name, or a mapping with the key 'name'"
    elif kind == "string_pattern_mismatch" and path == ("trainable",):
        yield path, f"write module:function, got {_show(got)}"
    else:
        messages = dict.fromkeys(each["msg"].removeprefix("Input should be ").partition(",")[0] for each in details)
        message = detail["msg"] if len(details) == 1 else "Input should be " + " or ".join(messages)
        message = message.removeprefix("Value error, ")
        if kind != "value_error" and not isinstance(got, dict | BaseModel):
            message = f"{message[:1].lower()}{message[1:]}, got {_show(got)}"
        yield path, message


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_GOT else f"{text[:MAX_GOT]}..."


def _model_at(annotation: Any, loc: Sequence[str | int]) -> type[BaseModel] | None:
    """Follow a location of pydantic, which names keys and the tags of unions, to the model whose key it is."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        tags = tuple(mark.tag for mark in members[1:] if isinstance(mark, Tag))
        if loc[: len(tags)] != tags:
            return None
        return _model_at(members[0], loc[len(tags) :])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        name = annotation.model_fields.get("name")
        if loc and name is not None and get_args(name.annotation) == (loc[0],):
            loc = loc[1:]
        if not loc:
            return annotation
        field = annotation.model_fields.get(str(loc[0]))
        return None if field is None else _model_at(field.annotation, loc[1:])
    if origin is dict:
        return _model_at(members[1], loc[1:])
    return next((found for member in members if (found := _model_at(member, loc)) is not None), None)
