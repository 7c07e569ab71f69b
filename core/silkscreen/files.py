"""Files: written whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file: it takes the place of `path` when the context ends, and is removed when it fails."""
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; a file is read once for as long as it does not change."""
    return _sha256(*state(path))


def state(path: Path) -> tuple[Path, int, int]:
    """Return what changes when a file does: where it is, when it was written, in nanoseconds, and its size in bytes."""
    status = path.stat()
    return path.resolve(), status.st_mtime_ns, status.st_size


@cache
def _sha256(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
