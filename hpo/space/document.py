"""A YAML mapping as plain values, with the file, line and column of each key for error messages.

ruamel.yaml reads the file and keeps the positions (`.lc`). This module adds the project's rules: YAML 1.2's core
schema and no other tags, no merge keys, no duplicate keys, and limits on size, depth and number of values.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.scanner import RoundTripScanner
from ruamel.yaml.tag import Tag

from hpo.errors import SettingError, SpaceError
from hpo.space.messages import KeyPath, Problem, explain, group_by_key

MAX_FILE_BYTES = 100_000  # a search space has about ten lines; a file of this size is the wrong file
MAX_YAML_NODES = 5_000  # values after aliases are expanded; stops YAML bombs
MAX_YAML_DEPTH = 20  # nested collections; the parser is recursive
MAX_PROBLEMS = 50  # reported for one file

Locate = Callable[[int, int], str]  # (line, column), both from 0 -> the prefix of an error message


class Document:
    """A YAML mapping and its overrides.

    Attributes:
        path: the file.
        data: the mapping as plain dicts, lists, numbers, strings, booleans and None.

    Raises:
        SettingError: the file does not exist or cannot be read.
        SpaceError: it is not a YAML mapping, or it exceeds a limit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._overrides: dict[KeyPath, str] = {}
        self._tree = _load_yaml(_read(path), self._locate)
        if self._tree is None:
            raise SpaceError(f"{path}: the file is empty; it needs at least sampler, max_epochs and parameters")
        if not isinstance(self._tree, CommentedMap):
            raise SpaceError(f"{self._locate(0, 0)}a search space is a mapping of keys to values")
        self.data: dict[str, Any] = _to_plain(self._tree, self._locate)

    def override(self, assignment: str) -> None:
        """Apply one `KEY=VALUE`, where the key is a dotted path and the value is YAML.

        Raises:
            SettingError: the assignment has no `=`, or its key is below a single value or a list.
            SpaceError: the value is not YAML.
        """
        prefix = f"--set {assignment}: "
        key, equals, text = assignment.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise SettingError(f"{prefix}write KEY=VALUE, for example --set max_epochs=2")
        value = _to_plain(_load_yaml(text, lambda line, column: prefix), lambda line, column: prefix)
        section = self.data
        for name, key_below in itertools.pairwise(names):
            if isinstance(section.get(name), str):  # `sampler: tpe` means `sampler: {name: tpe}`
                section[name] = {"name": section[name]}
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                kind = "a list" if isinstance(section, list) else "a single value"
                raise SettingError(f"{prefix}{name} is {kind}: it has no key {key_below!r}")
        section[names[-1]] = value
        self._overrides[tuple(names)] = prefix

    # --- error messages

    def position(self, path: KeyPath) -> str:
        """Return `file:line:column: ` of the innermost key on a path that exists, or the override that set it."""
        return self._find(path)[1]

    def error(self, problems: Iterable[Problem]) -> SpaceError:
        """Return all problems as one error, one line each, in the order of the file."""
        found = sorted(dict.fromkeys(problems), key=lambda problem: self._find(problem[0])[0])
        lines = []
        for path, text in found[:MAX_PROBLEMS]:
            key = ".".join(map(str, path))
            lines.append(f"{self.position(path)}{key + ': ' if key else ''}{text}")
        if len(found) > MAX_PROBLEMS:
            lines.append(f"{self.path}: and {len(found) - MAX_PROBLEMS} more mistakes")
        return SpaceError("\n".join(lines))

    def problems(self, error: ValidationError, model: type[BaseModel]) -> list[Problem]:
        """Return the problems that pydantic found, in the user's words."""
        groups = group_by_key(error, self.data)
        paths = sorted(groups, key=lambda path: self._find(path)[0])
        found: list[Problem] = []
        for path in paths[: MAX_PROBLEMS + 1]:  # finding the nearest names is slow
            found += explain(path, groups[path], model)
        return found + [(path, "is invalid") for path in paths[MAX_PROBLEMS + 1 :]]

    def _find(self, path: KeyPath) -> tuple[tuple[bool, int, int], str]:
        """Return (sort key, prefix of the message) of the innermost key on a path that exists. Overrides come last."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._overrides:
                return (True, 0, 0), self._overrides[path[:length]]
        node, (line, column) = self._tree, (self._tree.lc.line, self._tree.lc.col)
        for key in path:
            if isinstance(node, CommentedMap) and key in node:
                line, column = node.lc.key(key)
            elif isinstance(node, CommentedSeq) and isinstance(key, int) and key < len(node):
                line, column = node.lc.item(key)
            else:
                break
            node = node[key]
        return (False, line, column), self._locate(line, column)

    def _locate(self, line: int, column: int) -> str:
        return f"{self.path}:{line + 1}:{column + 1}: "


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            why = "not a file" if path.exists() else "no such file"
            raise SettingError(f"cannot read the search space {path}: {why}")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise SpaceError(f"{path}: {size} bytes; a search space has at most {MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingError(f"cannot read the search space {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SpaceError(f"{path}: not a text file in UTF-8") from None


# --- YAML -----------------------------------------------------------------------------------------------------------

_YAML_TAG = "tag:yaml.org,2002:"
_TOO_MANY = f"more than {MAX_YAML_NODES} values, aliases expanded"
_TOO_DEEP = f"more than {MAX_YAML_DEPTH} lists or mappings inside each other"


def _load_yaml(text: str, locate: Locate) -> Any:
    """Return ruamel's tree: CommentedMap and CommentedSeq with plain scalars in them."""
    yaml = YAML(typ="rt", pure=True)
    yaml.Scanner, yaml.Composer, yaml.Constructor, yaml.Resolver = _Scanner, _Composer, _Constructor, _Resolver
    try:
        return yaml.load(text)
    except _RefusedError as error:
        raise SpaceError(f"{locate(error.problem_mark.line, error.problem_mark.column)}{error.problem}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        has_tab = re.match(r" *\t", "".join(text.splitlines()[mark.line : mark.line + 1])) is not None
        hint = "; indent YAML with spaces, not with tabs" if has_tab else ""
        problem = str(error.problem or error.context).removeprefix("but ")
        raise SpaceError(f"{locate(mark.line, mark.column)}not YAML: {problem}{hint}") from None
    except ReaderError as error:
        before = text[: error.position]
        place = locate(before.count("\n"), len(before.rpartition("\n")[2]))
        raise SpaceError(f"{place}not YAML: the character {chr(error.character)!r}") from None
    except YAMLError as error:
        raise SpaceError(f"{locate(0, 0)}not YAML: {error}") from None


def _to_plain(tree: Any, locate: Locate) -> Any:
    """Return a copy in dicts and lists, with aliases expanded."""
    count = 0

    def expand(node: Any, position: tuple[int, int], depth: int) -> Any:
        nonlocal count
        count += 1
        if count > MAX_YAML_NODES:
            raise SpaceError(f"{locate(*position)}{_TOO_MANY}")
        if depth > MAX_YAML_DEPTH:
            raise SpaceError(f"{locate(*position)}{_TOO_DEEP}")
        if isinstance(node, CommentedMap):
            return {key: expand(value, node.lc.value(key), depth + 1) for key, value in node.items()}
        if isinstance(node, CommentedSeq):
            return [expand(item, node.lc.item(i), depth + 1) for i, item in enumerate(node)]
        return node

    return expand(tree, (0, 0), 0)


class _RefusedError(MarkedYAMLError):
    """YAML that this project does not accept."""


def _refuse(text: str, mark: Any) -> NoReturn:
    raise _RefusedError(problem=text, problem_mark=mark)


class _Scanner(RoundTripScanner):
    """Allows tabs wherever YAML does. ruamel refuses them outside of quotes and flow collections."""

    def scan_to_next_token(self) -> Any:
        # Where a key may start, a tab would be indentation, which YAML forbids.
        if not self.allow_simple_key:
            while self.reader.peek() in " \t":
                self.reader.forward()
        return super().scan_to_next_token()

    def scan_plain_spaces(self, indent: int, start_mark: Any) -> list[str]:
        """Return what separates two words of a plain scalar: blanks, or the line breaks between them, folded."""
        peek, forward = self.reader.peek, self.reader.forward
        blanks, breaks = "", 0
        while True:
            # On a later line, a tab left of `indent` would be indentation.
            is_inner_tab = peek() == "\t" and (not breaks or self.reader.column >= indent)
            if is_inner_tab or peek() in " \x85\u2028\u2029":  # in YAML 1.2, the last three do not end a line
                blanks += peek()
                forward()
            elif peek() in "\r\n":
                self.scan_line_break()
                self.allow_simple_key = True
                breaks += 1
                if self.check_document_start() or self.check_document_end():
                    return []
            else:
                break
        if breaks:
            return ["\n" * (breaks - 1) or " "]
        return [blanks] if blanks else []


class _Composer(Composer):
    """Enforces the limits while the file is parsed, and the rules for keys."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False  # YAML 1.2 allows them
        self._count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.parser.peek_event().start_mark
        self._count += 1
        if self._count > 2 * MAX_YAML_NODES:  # a mapping has a key and a value
            _refuse(_TOO_MANY, mark)
        if self.depth > MAX_YAML_DEPTH:
            _refuse(_TOO_DEEP, mark)
        node = super().compose_node(parent, index)
        if node.end_mark is None:  # an alias of a collection that is still open
            _refuse("an alias cannot contain itself", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                _refuse("a key is a single word", key.start_mark)
            if key.value in keys:
                _refuse(f"the key {key.value!r} appears twice", key.start_mark)
            keys.add(key.value)
            key.ctag = Tag(suffix=f"{_YAML_TAG}str")  # a number as a key is a string, and `<<` does not merge
        return node


class _Resolver(VersionedResolver):
    """YAML 1.2's core schema: `1e-4` is a number; on, off, yes, no and dates are strings."""

    # By first character; None matches every one.
    _patterns: ClassVar[dict[str | None, list[tuple[str, re.Pattern[str]]]]] = {
        None: [
            (f"{_YAML_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$")),
            (f"{_YAML_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")),
            (f"{_YAML_TAG}int", re.compile(r"^[-+]?[0-9]+$")),
            (f"{_YAML_TAG}float", re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")),
            (f"{_YAML_TAG}float", re.compile(r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")),
        ]
    }

    @property
    def versioned_resolver(self) -> Any:
        return self._patterns


class _Constructor(RoundTripConstructor):
    """Builds plain Python scalars, and refuses unknown tags."""

    yaml_constructors: dict[Any, Any] = {}  # noqa: RUF012 (ruamel declares it so); without the constructors of ruamel

    def construct_plain_scalar(self, node: Any) -> int | float | str | bool | None:
        text = str(self.construct_scalar(node))
        try:
            # JSON escapes a character beyond U+FFFF as two surrogates. A single surrogate is not text.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")
            match node.tag.removeprefix(_YAML_TAG):
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text)
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):
            _refuse(f"{text[:40]!r} does not match its tag {node.tag}", node.start_mark)
        return text

    def refuse_tag(self, node: Any) -> NoReturn:
        _refuse(f"the tag {node.tag} is not allowed", node.start_mark)


for _name in ("null", "bool", "int", "float", "str"):
    _Constructor.add_constructor(_YAML_TAG + _name, _Constructor.construct_plain_scalar)
_Constructor.add_constructor(f"{_YAML_TAG}map", RoundTripConstructor.construct_yaml_map)
_Constructor.add_constructor(f"{_YAML_TAG}seq", RoundTripConstructor.construct_yaml_seq)
_Constructor.add_constructor(None, _Constructor.refuse_tag)
