"""What is on the hubs, by `owner/repo[@revision][:path]`: fetched once, checked, and sent.

Each client is driven in a module of its own. Here is what they have in common: a copy on this disk wins, the network is
left alone offline, what goes wrong is told apart, and no token gets into a message or a log.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from silkscreen import errors
from silkscreen.errors import HubError, OfflineError, WeightsError
from silkscreen.hub.source import Client, Source

OFFLINE = "SILKSCREEN_OFFLINE"
"""The environment variable that keeps both clients off the network."""

_REFERENCE = re.compile(r"(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^:]+))?(:(?P<path>.+))?")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MESSAGES: dict[type[HubError], str] = {
    errors.NoSuchRepositoryError: "{title} shows no repository {repo}: check the name; "
    "for a private one set {token} or log in with `{login}`",
    errors.NoSuchRevisionError: "{repo} has no revision {revision}, or nothing in it: name a branch, a tag or a commit",
    errors.NoSuchFileError: "there is no {path} in {repo} at {revision}: check the path",
    errors.PermissionDeniedError: "{title} denies access to {repo}: ask for it on the repository's page, and set "
    "{token} or log in with `{login}`",
    errors.HubTimeoutError: "{title} stopped answering: try again, whole files are kept; {timeout} is how many seconds "
    "it is waited for",
    errors.NetworkError: "{title} cannot be reached, or the connection broke: check the network and {endpoint}; "
    "--offline uses what is on this disk",
    errors.DiskFullError: "the disk is full: make room, or name a folder on another disk in {cache}",
    errors.ChecksumError: "what came is not what {title} lists, and was not kept: try again; "
    "if it stays so, tell the repository's owner",
    HubError: "{title} failed: {reason}: try again later",
}

_Result = TypeVar("_Result")
_tokens: set[str] = set()


def from_modelscope(reference: str) -> Path:
    """Return the local copy of a repository, file or folder on ModelScope, downloaded when there is none.

    Args:
        reference: `owner/repo[@revision][:path]`, where a folder's path ends in a slash.

    Raises:
        WeightsError: the reference is none.
        HubError: it cannot be had; the class tells why.
    """
    from silkscreen.hub.modelscope import ModelScope

    return _fetch(ModelScope(), reference)


def from_huggingface(reference: str) -> Path:
    """Return the local copy of a repository, file or folder on Hugging Face, downloaded when there is none.

    Args:
        reference: `owner/repo[@revision][:path]`, where a folder's path ends in a slash.

    Raises:
        WeightsError: the reference is none.
        HubError: it cannot be had; the class tells why.
    """
    from silkscreen.hub.huggingface import HuggingFace

    return _fetch(HuggingFace(), reference)


def send(target: str, folder: Path, *, licence: str, private: bool, message: str) -> str:
    """Upload a folder to a repository, which is made when there is none.

    Args:
        target: `modelscope:owner/repo` or `hf:owner/repo`.
        folder: all of it is sent.
        licence: its SPDX identifier, for a repository that is made.
        private: whether a repository that is made is private.
        message: of the commit.

    Returns:
        The address of the repository's page.

    Raises:
        WeightsError: the target is none.
        HubError: it cannot be sent; the class tells why.
    """
    client, source = destination(target)
    if _offline(client):
        raise OfflineError(f"{source} cannot be sent offline: leave {OFFLINE} and --offline out")
    if not client.token():
        raise errors.PermissionDeniedError(
            f"{source}: nobody is logged in: set {client.names['token']} or log in with `{client.names['login']}`"
        )
    _hide_token(client)
    return _guarded(client, source, lambda: client.send(source.repo, folder, licence, private, message))


def destination(target: str) -> tuple[Client, Source]:
    """Return the client and the repository that `modelscope:owner/repo` or `hf:owner/repo` names.

    Raises:
        WeightsError: it names no repository, or more than one.
    """
    from silkscreen.hub.huggingface import HuggingFace
    from silkscreen.hub.modelscope import ModelScope

    clients: dict[str, Client] = {client.scheme: client for client in (ModelScope(), HuggingFace())}
    scheme, _, rest = target.partition(":")
    if scheme not in clients or not re.fullmatch(r"[^/@:]+/[^/@:]+", rest):
        raise WeightsError(f"{target!r} is no place to publish: write modelscope:owner/repo or hf:owner/repo")
    return clients[scheme], _parse(scheme, rest)


def _fetch(client: Client, reference: str) -> Path:
    source = _parse(client.scheme, reference)
    offline = _offline(client)
    found = _guarded(client, source, lambda: client.find(source, offline))
    if found is not None:
        return found
    if offline:
        raise OfflineError(
            f"{source} is not on this disk, and the network is not asked: fetch it once without --offline, "
            f"{OFFLINE} and HF_HUB_OFFLINE, or name the right folder in {client.names['cache']}"
        )
    _hide_token(client)
    return _guarded(client, source, lambda: client.download(source))


def _parse(scheme: str, reference: str) -> Source:
    match = _REFERENCE.fullmatch(reference)
    if match is None or ".." in re.split("[/@:]", reference):
        raise WeightsError(
            f"{scheme}:{reference} names nothing on a hub: write {scheme}:owner/repo[@revision][:path], "
            "where the path of a folder ends in a slash"
        )
    return Source(scheme, match["repo"], match["revision"], match["path"] or "")


def _offline(client: Client) -> bool:
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in (OFFLINE, *client.offline_variables)
    )


def _guarded(client: Client, source: Source, action: Callable[[], _Result]) -> _Result:
    """Do something with a client; what it raises is told apart, and leaves without the client's own traceback.

    A server may send back in its answer what it was sent, the token included, and clients put answers into their
    messages: so only a text that was searched for tokens is kept, as a note.
    """
    try:
        return action()
    except Exception as error:  # whatever a client raises
        problem = _explained(client, source, error)
    raise problem


def _explained(client: Client, source: Source, error: Exception) -> HubError:
    kind = next((kind for each in _chain(error) if (kind := _kind(client, source, each))), HubError)
    told = [_redacted(f"{type(each).__name__}: {each}") for each in _chain(error)]
    given = {
        "title": client.title,
        "repo": source.repo,
        "path": source.path,
        "revision": source.revision or "its main branch",
        "reason": told[-1].splitlines()[0],
    }
    problem = kind(f"{source}: {_MESSAGES[kind].format(**given, **client.names)}")
    problem.add_note("\n".join(told))
    return problem


def _kind(client: Client, source: Source, error: BaseException) -> type[HubError] | None:
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return errors.DiskFullError
    if isinstance(error, HubError):
        return type(error)
    return client.kind(error, source)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it, from the first cause on, which knows best what was wrong."""
    if error is not None:
        yield from _chain(error.__cause__ or error.__context__)
        for failure in getattr(error, "failed_files", {}).values():
            yield from _chain(failure)
        yield error


def _hide_token(client: Client) -> None:
    """Keep the client's token out of messages, and out of what the client logs."""
    _tokens.update(token for token in (client.token(),) if token)
    for name in client.loggers:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_without_tokens)


def _redacted(text: str) -> str:
    for token in _tokens:
        text = text.replace(token, "***")
    return text


def _without_tokens(record: logging.LogRecord) -> bool:
    record.msg, record.args = _redacted(record.getMessage()), None
    if record.exc_info:
        record.exc_text = _redacted(logging.Formatter().formatException(record.exc_info))
    return True
