"""A record beside a client's copy of a repository: what of it is whole and has been checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from silkscreen.hub.source import Source


def files_in(path: Path) -> list[Path]:
    """Return the files in a folder, or the file itself."""
    return [path] if path.is_file() else [each for each in sorted(path.rglob("*")) if each.is_file()]


def write_record(snapshot: Path, source: Source) -> None:
    """Keep that what a source names is whole in a snapshot: the names and sizes of its files."""
    found = snapshot / source.path
    sizes = {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in files_in(found)}
    with contextlib.suppress(OSError):  # a cache that others look after
        _path(snapshot, source).write_text(json.dumps(sizes), encoding="utf-8")


def is_recorded(snapshot: Path, source: Source) -> bool:
    """Whether what a source names was whole in a snapshot, and still is."""
    try:
        sizes = json.loads(_path(snapshot, source).read_text(encoding="utf-8"))
        return all((snapshot / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _path(snapshot: Path, source: Source) -> Path:
    """Return a place outside of the snapshots, where neither client takes it for a file of the repository."""
    key = hashlib.sha256(f"{source} {snapshot.name}".encode()).hexdigest()[:16]
    return snapshot.parent.parent / f".silkscreen-{key}.json"
