"""Checks of the user's names and paths, before any file is opened."""

import os
import re
import stat
import unicodedata
from pathlib import Path

from fishermask.errors import InputError

MAX_PATH = 4095
"""Maximum length of a path in bytes, on Linux."""
MAX_NAME = 200
"""Maximum number of characters of a name."""
LINE_CHARACTERS = {ord(character): " " for character in "\n\r\t"}
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def invalid_character(text: str) -> str | None:
    """Return a description of the first character that is not allowed in a name or a path; None if all are.

    Control characters (such as NUL and line breaks), line separators and lone surrogates are not allowed.
    """
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            return f"the character U+{ord(character):04X}"
    return None


def check_text(text: str) -> str:
    """Return ``text`` if it is valid text of one or more lines.

    Raises:
        ValueError: it contains a control character or a lone surrogate.
    """
    if character := invalid_character(text.translate(LINE_CHARACTERS)):
        raise ValueError(f"holds {character}, which is not allowed in text")
    return text


def check_word(text: str) -> str:
    """Return ``text`` if it is a valid name.

    Raises:
        ValueError: it is empty or too long, or contains a line break or another control character.
    """
    if not text.strip():
        raise ValueError("is empty; give a name")
    if character := invalid_character(text):
        raise ValueError(f"holds {character}, which is not allowed in a name")
    if len(text) > MAX_NAME:
        raise ValueError(f"has {len(text):,} characters; a name has at most {MAX_NAME}")
    return text


def check_path(text: str) -> str:
    """Return ``text`` if it is a valid path.

    Raises:
        ValueError: it is empty, too long or a URL, contains a control character, or starts with the home folder of an
            unknown user.
    """
    if not text.strip():
        raise ValueError("is empty; give a path (. is the working folder)")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(f"is a URL, {text.split('/')[0]}//...; only local paths are supported")
    if character := invalid_character(text):
        raise ValueError(f"holds {character}, which is not allowed in a path")
    if len(os.fsencode(text)) > MAX_PATH or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError(f"has {len(text):,} characters, too many for a path")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text.split('/')[0]} is not the home folder of a user; give another path") from None
    return text


def require_file(path: Path, setting: str = "") -> os.stat_result:
    """Return the status of the regular file ``path``; messages begin with ``setting``.

    Raises:
        InputError: the path does not exist, is a broken link, or is not a regular file. (Opening a FIFO would block.)
    """
    name = f"{setting}: {path}" if setting else f"{path}:"
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        problem = "is a broken link" if path.is_symlink() else "cannot be read"
        raise InputError(f"{name} {problem} ({getattr(error, 'strerror', error)})") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{name} is {KINDS.get(stat.S_IFMT(status.st_mode), 'not a regular file')}; give a file")
    return status
