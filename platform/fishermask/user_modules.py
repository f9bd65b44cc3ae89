"""Python files of the user: strategies and models that a sweep file names by path."""

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
    """Return the module in ``file``. A second call imports the file again only if its content has changed.

    The file can import modules in its folder. No bytecode is written.

    Args:
        setting: name of the setting that holds the path; messages begin with it.

    Raises:
        InputError: the file does not exist, or raises when it is imported.
    """
    require_file(file, setting)
    with guarded(setting, f"{file} cannot be imported"):
        content = file.read_bytes()
        digest = hashlib.sha256(str(file).encode() + b"\0" + content).hexdigest()
        name = f"fishermask_user_{digest[:16]}"
        if (module := _modules.get(name)) is not None:
            return module
        module = ModuleType(name)
        module.__file__ = str(file)
        sys.modules[name] = module  # dataclasses and pydantic look it up while the file is executed
        folder = str(file.absolute().parent)
        sys.path.insert(0, folder)
        try:
            exec(compile(content, str(file), "exec"), module.__dict__)
        finally:
            sys.path.remove(folder)
            # Pickle imports the classes of a listed module by name, which fails in the processes of Ray's shards.
            # Ray's pickle sends the classes of other modules with their code.
            del sys.modules[name]
        return _modules.setdefault(name, module)


_modules: dict[str, ModuleType] = {}
"""Imported files, by a name that changes with the path and the content."""


def attribute_of(module: ModuleType, name: str, setting: str) -> object:
    """Return the attribute ``name`` of a module of the user.

    Raises:
        InputError: the module has no such attribute.
    """
    if not hasattr(module, name):
        raise InputError(f"{setting}: {module.__file__} has no {name!r}; define it in the file, or correct the name")
    return getattr(module, name)
