"""Other programs, run to their end."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from silkscreen.errors import PackError

_LINES_SHOWN = 20


def run(
    words: Sequence[str | Path], problem: str, *, folder: Path | None = None, variables: Mapping[str, str] | None = None
) -> str:
    """Run a program and return what it printed.

    Args:
        words: the program and its arguments.
        problem: what it means when it fails, for the message.
        folder: where it runs.
        variables: its environment variables; by default those of this process.

    Raises:
        PackError: it failed; the message has the end of what it printed.
    """
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=variables)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_LINES_SHOWN:])
        raise PackError(f"{problem}: {' '.join(command)} failed:\n{tail}")
    return done.stdout
