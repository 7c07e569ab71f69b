"""Checksums of files."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; a file is read once for as long as it does not change."""
    state = path.stat()
    return _sha256(path.resolve(), state.st_mtime_ns, state.st_size)


@cache
def _sha256(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
