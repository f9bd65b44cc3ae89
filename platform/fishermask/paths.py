"""Checks of text and paths that users give, before anything is opened."""

import os
import re
import stat
import unicodedata
from pathlib import Path

from fishermask.errors import InputError

MAX_PATH = 4095
"""Bytes of a path that Linux accepts."""
MAX_NAME = 200
LINES = {ord(character): " " for character in "\n\r\t"}
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def improper_character(text: str) -> str | None:
    """Return a description of the first character that no text setting may hold; None if there is none.

    These are control characters (NUL, line breaks), line separators and halves of surrogate pairs.
    """
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            return f"the character U+{ord(character):04X}"
    return None


def check_text(text: str) -> str:
    """Return ``text``, which may have several lines, if it can be written to a file.

    Raises:
        ValueError: it holds NUL, another control character or half of a surrogate pair.
    """
    if improper := improper_character(text.translate(LINES)):
        raise ValueError(f"holds {improper}, which no text may")
    return text


def check_word(text: str) -> str:
    """Return ``text`` if it can be a name: some characters of one line.

    Raises:
        ValueError: it is empty, too long, or holds a line break or another control character.
    """
    if not text.strip():
        raise ValueError("is empty; give a name")
    if improper := improper_character(text):
        raise ValueError(f"holds {improper}, which no name may")
    if len(text) > MAX_NAME:
        raise ValueError(f"has {len(text):,} characters; a name has at most {MAX_NAME}")
    return text


def check_path(text: str) -> str:
    """Return ``text`` if it can be the path of a file.

    Raises:
        ValueError: it is empty or too long, is a URL, holds a control character, or names the home of an unknown user.
    """
    if not text.strip():
        raise ValueError("is empty; give a path, and . for the working folder")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(f"is a URL, {text.split('/')[0]}//...; only local paths are supported")
    if improper := improper_character(text):
        raise ValueError(f"holds {improper}, which no path may")
    if len(os.fsencode(text)) > MAX_PATH or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError(f"is too long for a path, {len(text):,} characters")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text.split('/')[0]} is no user's home folder; give another path") from None
    return text


def require_file(path: Path, setting: str = "") -> os.stat_result:
    """Return the size and times of the regular file ``path``; ``setting`` names what brought it here.

    Raises:
        InputError: there is none: nothing, a link that leads nowhere, or something that would block when it is read.
    """
    name = f"{setting}: {path}" if setting else f"{path}:"
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        link = "is a link that leads nowhere" if path.is_symlink() else "cannot be read"
        raise InputError(f"{name} {link} ({getattr(error, 'strerror', error)})") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{name} is {KINDS.get(stat.S_IFMT(status.st_mode), 'no file')}; give a file")
    return status
