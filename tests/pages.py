"""The pages of the documentation as a reader follows them: their files written out, their commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path


def commands(page: str) -> list[str]:
    """Return the lines of a page's bash blocks, those that go on in the next as one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def write_files(page: str, folder: Path) -> list[str]:
    """Write out the files that a page shows, each after its path in a line of its own; returns their paths."""
    files = re.findall(r"^`([\w-]+/\S+)`\n\n```\w+\n(.*?)^```", page, re.M | re.S)
    for name, text in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [name for name, _ in files]


def run_each(lines: Iterable[str], folder: Path, **variables: str) -> str:
    """Run commands in a folder, in a new environment that sees what this one has; returns what they print."""
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "seen.pth").write_text("\n".join(path for path in sys.path if path) + "\n")
    (programs / "silkscreen").write_text(f"#!{programs}/python\nfrom silkscreen.cli import main\nmain()\n")
    (programs / "silkscreen").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**kept, **variables, "PATH": f"{programs}:{kept['PATH']}"}
    printed = ""
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        printed += done.stdout
    return printed
