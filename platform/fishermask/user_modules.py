"""Python files of the user: strategies and models that a sweep file names by path."""

import ast
import functools
import hashlib
import re
import sys
from pathlib import Path
from types import ModuleType

from fishermask.errors import InputError
from fishermask.guard import guarded
from fishermask.paths import require_file

FILE_NAME = re.compile(r"(?P<file>(?:\.{1,2}|~)?/.*\.py)(?::(?P<attribute>[^/:]+))?")
"""``./FILE.py`` or ``./FILE.py:NAME``; the path starts with ``./``, ``../``, ``/`` or ``~/``."""


def split_file_name(text: str) -> tuple[Path, str | None] | None:
    """Return the file and the attribute that ``./FILE.py:NAME`` names; None if ``text`` has another form."""
    match = FILE_NAME.fullmatch(text)
    return (Path(match["file"]).expanduser(), match["attribute"]) if match else None


def absolute_file_name(text: str, folder: Path) -> str:
    """Return ``text`` with its file as an absolute path, starting from ``folder``; return other text unchanged."""
    if (parts := split_file_name(text)) is None:
        return text
    file, attribute = parts
    return f"{(folder / file).absolute()}" + (f":{attribute}" if attribute else "")


def import_file(file: Path, setting: str) -> ModuleType:
    """Return the module in ``file``. A second call imports the file again only if it or a local module has changed.

    The file can import modules in its folder, see ``find_local_modules``. No bytecode is written.

    Args:
        setting: name of the setting that holds the path; messages begin with it.

    Raises:
        InputError: the file does not exist, or raises when it is imported.
    """
    require_file(file, setting)
    with guarded(setting, f"{file} cannot be imported"):
        content = file.read_bytes()
        versions = {name: f"{path} {hash_file(path)}" for name, path in find_local_modules(file).items()}
        digest = hashlib.sha256(str(file).encode() + b"\0" + content)
        digest.update("\n".join(versions.values()).encode())
        name = f"fishermask_user_{digest.hexdigest()[:16]}"
        if (module := _modules.get(name)) is not None:
            return module
        for local, version in versions.items():
            if _local_versions.get(local, version) != version:  # changed, or of another folder
                sys.modules.pop(local, None)
        module = ModuleType(name)
        module.__file__ = str(file)
        sys.modules[name] = module  # dataclasses and pydantic look it up while the file is executed
        folder = str(file.absolute().parent)
        sys.path.insert(0, folder)
        try:
            exec(compile(content, str(file), "exec"), module.__dict__)
        finally:
            _local_versions.update({local: version for local, version in versions.items() if local in sys.modules})
            sys.path.remove(folder)
            # Pickle imports the classes of a listed module by name, which fails in the processes of Ray's shards.
            # Ray's pickle sends the classes of other modules with their code.
            del sys.modules[name]
        return _modules.setdefault(name, module)


_modules: dict[str, ModuleType] = {}
"""Imported files, by a name that changes with the path and the content."""
_local_versions: dict[str, str] = {}
"""Path and hash of each local module of ``sys.modules``, by its name."""


def find_local_modules(file: Path) -> dict[str, Path]:
    """Return the files of the modules below the folder of ``file`` that it imports, by dotted name.

    Only the import statements of ``file``, and those of the modules that they name, are read; nothing is executed.
    """
    folder, modules, queue = file.absolute().parent, dict[str, Path](), [("", file)]
    while queue:
        importer, path = queue.pop()
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for name in _imported_names(path.read_bytes(), package):
            files = (folder / f"{name.replace('.', '/')}{suffix}" for suffix in ("/__init__.py", ".py"))
            if name not in modules and (found := next(filter(Path.is_file, files), None)) is not None:
                modules[name] = found
                queue.append((name, found))
    return dict(sorted(modules.items()))


def hash_file(file: Path) -> str:
    """Return a hash, 12 hexadecimal digits, of the content of ``file``."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


@functools.lru_cache(maxsize=4096)
def _imported_names(content: bytes, package: str) -> list[str]:
    """Return the names that the import statements of a module in ``package`` may import, with their parents."""
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError, RecursionError):  # Python reports it when it imports the module
        return []
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join(filter(None, [*parents, node.module]))
            names += [source, *(f"{source}.{alias.name}".lstrip(".") for alias in node.names)]
    parts = [name.split(".") for name in names]
    every = dict.fromkeys(".".join(words[:end]) for words in parts for end in range(1, len(words) + 1))
    return [name for name in every if name and name.split(".")[0] != "fishermask"]


def attribute_of(module: ModuleType, name: str, setting: str) -> object:
    """Return the attribute ``name`` of a module of the user.

    Raises:
        InputError: the module has no such attribute.
    """
    if not hasattr(module, name):
        raise InputError(f"{setting}: {module.__file__} has no {name!r}; define it in the file, or correct the name")
    return getattr(module, name)
