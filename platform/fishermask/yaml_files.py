"""YAML as users write it: plain values only, each key once, and nothing that grows without bound."""

import re
from pathlib import Path
from typing import Any

import yaml

from fishermask.errors import InputError
from fishermask.guard import guarded, one_line, short
from fishermask.paths import LINES, improper_character, require_file

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 100_000
"""Values of a file once its anchors are expanded."""
MAX_BITS = 1024
"""Of an integer: no setting takes a larger one, and Python refuses to print it."""


class StrictLoader(yaml.SafeLoader):
    """Read plain values: text, numbers, true, false, null, lists and mappings.

    A key that stands twice is refused (YAML would keep the last in silence), 1e-3 is a number, and a date is text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self.paths: dict[int, str] = {}
        """Dotted path of each node, by the node's ``id``."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _Expansion(self.paths).measure(node, [], set())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys: set[Any] = set()
            for key_node, _ in node.value:
                if key_node.tag != "tag:yaml.org,2002:merge":
                    key = self.construct_object(key_node, deep=True)
                    if not isinstance(key, str | int):
                        raise yaml.YAMLError(f"the key {short(key)}, {_line(key_node)}, is neither text nor a number")
                    if isinstance(key, str) and (improper := improper_character(key)):
                        raise yaml.YAMLError(f"a key, {_line(key_node)}, holds {improper}")
                    if key in keys:
                        raise yaml.YAMLError(f"the key {one_line(str(key), 60)} stands twice, {_line(node)} and after")
                    keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        place = f"{self.paths.get(id(node)) or 'the value'}, {_line(node)}"
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise yaml.YAMLError(f"{place}: {short(node.value)} is no {node.tag.split(':')[-1]} ({error})") from error
        if isinstance(value, str) and node.value and (improper := _improper(value)):
            raise yaml.YAMLError(f"{place}: the text holds {improper}")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise yaml.YAMLError(f"{place}: the number has more than {MAX_BITS} bits")
        if isinstance(node, yaml.ScalarNode) and not isinstance(value, str | bool | int | float | None):
            raise yaml.YAMLError(f"{place}: {type(value).__name__} is no plain text or number")
        if isinstance(node, yaml.CollectionNode) and node.tag not in (
            "tag:yaml.org,2002:map",
            "tag:yaml.org,2002:seq",
        ):
            raise yaml.YAMLError(f"{place}: {node.tag.split(':')[-1]} is no plain list or mapping")
        return value


# YAML 1.1 wants a point in a number with an exponent; nobody else does.
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Expansion:
    """Measures a tree of nodes, in which anchors let one node stand in many places."""

    def __init__(self, paths: dict[int, str]) -> None:
        self.paths = paths
        self.sizes: dict[int, int] = {}

    def measure(self, node: yaml.Node, path: list[str], above: set[int]) -> int:
        """Return how many values ``node`` stands for once anchors are expanded.

        Raises:
            yaml.YAMLError: too many, too deep, or a node that contains itself.
        """
        name = one_line(".".join(path), 100)
        self.paths.setdefault(id(node), name)
        if id(node) in above:
            raise yaml.YAMLError(f"{name or 'the file'}, {_line(node)}: contains itself")
        if len(path) > MAX_DEPTH:
            raise yaml.YAMLError(f"{path[0]}, {_line(node)}: keys and lists are nested deeper than {MAX_DEPTH} levels")
        if id(node) in self.sizes:
            return self.sizes[id(node)]
        size = 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                size += self.measure(key, [*path, "?"], above | {id(node)})
                part = key.value if isinstance(key.value, str) else "?"
                size += self.measure(value, [*path, part], above | {id(node)})
                self._check(size, name)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                size += self.measure(value, [*path, str(index)], above | {id(node)})
                self._check(size, name)
        self.sizes[id(node)] = size
        return size

    @staticmethod
    def _check(size: int, name: str) -> None:
        if size > MAX_VALUES:
            raise yaml.YAMLError(f"{name or 'the file'}: stands for more than {MAX_VALUES:,} values")


def read_yaml(path: Path) -> Any:
    """Return the contents of a YAML file.

    Raises:
        InputError: it is not there, is no regular file, is too large, or is not YAML of plain values.
    """
    size = require_file(path).st_size
    if size > MAX_BYTES:
        raise InputError(f"{path}: is too large, {size:,} bytes; the limit is {MAX_BYTES:,}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_yaml(content, str(path))


def parse_yaml(content: str | bytes, where: str, problem: str = "is not YAML") -> Any:
    """Return the value that ``content`` stands for; ``where`` and ``problem`` begin the messages.

    Raises:
        InputError: it is not YAML of plain values.
    """
    with guarded(where, problem):
        try:
            return yaml.load(content, StrictLoader)
        except (yaml.YAMLError, UnicodeError) as error:
            raise InputError(f"{where}: {problem} ({_reason(error)})") from None
        except RecursionError:
            raise InputError(f"{where}: {problem} (keys and lists are nested too deep)") from None


def _reason(error: Exception) -> str:
    """What PyYAML says, without its names for text that comes from no file."""
    return one_line(re.sub(r'in "<(byte|unicode) string>", ', "in ", str(error)))


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _improper(text: str) -> str | None:
    """As ``improper_character``, but text may have lines and tabs."""
    return improper_character(text.translate(LINES))
