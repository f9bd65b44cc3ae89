"""YAML files of the user: plain values only, no repeated keys, limited size."""

import re
from pathlib import Path
from typing import Any

import yaml

from fishermask.errors import InputError
from fishermask.guard import guarded, one_line, short
from fishermask.paths import LINE_CHARACTERS, invalid_character, require_file

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 100_000
"""Maximum number of values, after anchors are expanded."""
MAX_BITS = 1024
"""Maximum size of an integer. All settings are smaller, and Python refuses to print much larger integers."""


class StrictLoader(yaml.SafeLoader):
    """Loader for plain values: text, numbers, true, false, null, lists and mappings.

    Unlike PyYAML's safe loader, it refuses repeated keys, reads 1e-3 as a number, and reads dates as text.
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
            _NodeCounter(self.paths).count(node, [], set())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys: set[Any] = set()
            for key_node, _ in node.value:
                if key_node.tag != "tag:yaml.org,2002:merge":
                    key = self.construct_object(key_node, deep=True)
                    if not isinstance(key, str | int):
                        raise yaml.YAMLError(f"the key {short(key)}, {_line(key_node)}, is neither text nor an integer")
                    if isinstance(key, str) and (character := invalid_character(key)):
                        raise yaml.YAMLError(f"a key, {_line(key_node)}, contains {character}")
                    if key in keys:
                        raise yaml.YAMLError(f"the key {one_line(str(key), 60)} appears twice, {_line(node)} and later")
                    keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        where = f"{self.paths.get(id(node)) or 'the value'}, {_line(node)}"
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise yaml.YAMLError(
                f"{where}: {short(node.value)} is not a valid {node.tag.split(':')[-1]} ({error})"
            ) from error
        if isinstance(value, str) and node.value and (character := _invalid_character(value)):
            raise yaml.YAMLError(f"{where}: the text contains {character}")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise yaml.YAMLError(f"{where}: the number has more than {MAX_BITS} bits")
        if isinstance(node, yaml.ScalarNode) and not isinstance(value, str | bool | int | float | None):
            raise yaml.YAMLError(f"{where}: {type(value).__name__} is not plain text or a number")
        if isinstance(node, yaml.CollectionNode) and node.tag not in (
            "tag:yaml.org,2002:map",
            "tag:yaml.org,2002:seq",
        ):
            raise yaml.YAMLError(f"{where}: {node.tag.split(':')[-1]} is not a plain list or mapping")
        return value


# YAML 1.1, unlike other formats, requires a decimal point in a number with an exponent.
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _NodeCounter:
    """Counts the values of a tree of nodes, in which anchors repeat nodes."""

    def __init__(self, paths: dict[int, str]) -> None:
        self.paths = paths
        self.sizes: dict[int, int] = {}

    def count(self, node: yaml.Node, path: list[str], ancestors: set[int]) -> int:
        """Return the number of values of ``node``, after anchors are expanded.

        Raises:
            yaml.YAMLError: there are too many values, they are nested too deeply, or a node contains itself.
        """
        name = one_line(".".join(path), 100)
        self.paths.setdefault(id(node), name)
        if id(node) in ancestors:
            raise yaml.YAMLError(f"{name or 'the file'}, {_line(node)}: contains itself")
        if len(path) > MAX_DEPTH:
            raise yaml.YAMLError(
                f"{path[0]}, {_line(node)}: keys and lists are nested more than {MAX_DEPTH} levels deep"
            )
        if id(node) in self.sizes:
            return self.sizes[id(node)]
        size = 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                size += self.count(key, [*path, "?"], ancestors | {id(node)})
                part = key.value if isinstance(key.value, str) else "?"
                size += self.count(value, [*path, part], ancestors | {id(node)})
                self._check(size, name)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                size += self.count(value, [*path, str(index)], ancestors | {id(node)})
                self._check(size, name)
        self.sizes[id(node)] = size
        return size

    @staticmethod
    def _check(size: int, name: str) -> None:
        if size > MAX_VALUES:
            raise yaml.YAMLError(f"{name or 'the file'}: has more than {MAX_VALUES:,} values")


def read_yaml(path: Path) -> Any:
    """Return the contents of a YAML file.

    Raises:
        InputError: the file cannot be read, is too large, or is not YAML with plain values.
    """
    size = require_file(path).st_size
    if size > MAX_BYTES:
        raise InputError(f"{path}: the file has {size:,} bytes; the limit is {MAX_BYTES:,}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_yaml(content, str(path))


def parse_yaml(content: str | bytes, where: str, problem: str = "is not YAML") -> Any:
    """Return the value of ``content``; messages begin with ``where`` and ``problem``.

    Raises:
        InputError: it is not YAML with plain values.
    """
    with guarded(where, problem):
        try:
            return yaml.load(content, StrictLoader)
        except (yaml.YAMLError, UnicodeError) as error:
            raise InputError(f"{where}: {problem} ({_reason(error)})") from None
        except RecursionError:
            raise InputError(f"{where}: {problem} (keys and lists are nested too deeply)") from None


def _reason(error: Exception) -> str:
    """Return PyYAML's message without ``"<unicode string>"``, its name for text that does not come from a file."""
    return one_line(re.sub(r'in "<(byte|unicode) string>", ', "in ", str(error)))


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _invalid_character(text: str) -> str | None:
    """Return a description of the first character that is not allowed in text, which may have line breaks and tabs."""
    return invalid_character(text.translate(LINE_CHARACTERS))
