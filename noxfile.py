"""What is done with the repository: `nox -s demo`, `nox -s lint tests`, `nox -s bench`, `nox -s build`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.needs_version = ">=2025.2"

CONSTRAINTS = "tests/constraints.txt"
PLUGINS = sorted(str(path.parent) for path in Path("plugins").glob("*/pyproject.toml"))
TOOLS = ["build", "hatchling", "mypy", "nox", "pytest", "pytest-benchmark", "ruff", "torchao"]

DEMO = [
    "a large yellow star on a blue background",
    *("-t", "brightness", "scale=0.7"),
    *("-t", "softrgb", "R=0.75", "G=0.65", "B=0.5"),
    *("-t", "structure", "image=core/docs/outline.png"),
]


def install(session: nox.Session, *extra: str) -> None:
    """Install the core and every plugin as a user would, with the versions that are tested."""
    session.install("-c", CONSTRAINTS, ".", *PLUGINS, *extra)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    install(session, *TOOLS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "core/silkscreen", *(f"{plugin}/src" for plugin in PLUGINS))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests."""
    install(session, *TOOLS)
    session.run("pytest", "--ignore=tests/benchmarks", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Draw a picture under three controls at once, to `demo.png`."""
    install(session)
    session.run("silkscreen", "list")
    session.run("silkscreen", "generate", *DEMO, "-o", "demo.png", "--overwrite")


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks."""
    install(session, *TOOLS)
    session.run("pytest", "tests/benchmarks", "-s", *session.posargs)


@nox.session
def full_size(session: nox.Session) -> None:
    """Draw with a base and two templates of full size, in random weights: 26 GB of disk, and 10 to 35 minutes."""
    install(session, *TOOLS)
    with TemporaryDirectory(dir=session.create_tmp()) as folder:  # not /tmp, which may be memory
        session.run("pytest", "tests/full_size", "-s", env={"SILKSCREEN_FULL_SIZE": folder})


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheels of the core and of every plugin into `dist`."""
    session.install("-c", CONSTRAINTS, "build")
    for project in [".", *PLUGINS]:
        session.run("python", "-m", "build", "--wheel", "--outdir", "dist", project)
