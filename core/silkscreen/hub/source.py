"""What a hub's client has to be able to do, and what it is asked for."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from silkscreen.errors import HubError


@dataclasses.dataclass(frozen=True)
class Source:
    """A repository on a hub, or a part of it.

    Attributes:
        scheme: `modelscope` or `hf`.
        repo: `owner/name`.
        revision: a branch, tag or commit; None for the main branch.
        path: of a file; of a folder, when it ends in a slash; empty for all of the repository.
    """

    scheme: str
    repo: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        """Return it as it is written."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}:{self.repo}{revision}{':' if self.path else ''}{self.path}"

    @property
    def is_file(self) -> bool:
        """Whether it is one file."""
        return bool(self.path) and not self.path.endswith("/")

    @property
    def patterns(self) -> list[str] | None:
        """The patterns of the files in it, for a client; None for all.

        The first letter is a set of one: a client that goes by the folder before the first wildcard would list that
        folder alone, and could not tell a revision that is missing from a folder that is.
        """
        if not self.path:
            return None
        escaped = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in self.path[1:])
        return [f"[{self.path[0]}]{escaped}{'*' if self.path.endswith('/') else ''}"]

    def within(self, snapshot: Path) -> Path | None:
        """Return where it is in a repository's folder; None when it is not there."""
        path = snapshot / self.path
        there = path.is_file() if self.is_file else path.is_dir() and any(path.iterdir())
        return path if there else None


class Client(ABC):
    """A hub's client.

    Attributes:
        scheme: what sources of it begin with.
        title: the hub's name.
        names: for messages, the client's environment variables for `token`, `endpoint`, `cache` and `timeout`, and its
            `login` command.
        offline_variables: environment variables of the client that forbid the network.
        loggers: names of the loggers that it writes to.
    """

    scheme: str
    title: str
    names: Mapping[str, str]
    offline_variables: Sequence[str]
    loggers: Sequence[str]

    @abstractmethod
    def token(self) -> str | None:
        """Return the token of the environment or of a login."""

    @abstractmethod
    def find(self, source: Source, offline: bool) -> Path | None:
        """Return the whole copy on this disk, if there is one; offline, also one that cannot be told to be whole."""

    @abstractmethod
    def download(self, source: Source) -> Path:
        """Fetch what is missing, check it, and return where it is."""

    @abstractmethod
    def send(self, repo: str, folder: Path, licence: str, private: bool, message: str) -> str:
        """Upload a folder, and return the address of the repository's page."""

    @abstractmethod
    def kind(self, error: BaseException, source: Source) -> type[HubError] | None:
        """Tell what an error of the client means."""
