"""ModelScope, through its client."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import requests
from modelscope.hub.api import HubApi
from modelscope.hub.snapshot_download import snapshot_download
from modelscope_hub import CacheNotFound, get_default_config
from modelscope_hub import errors as client_errors

from silkscreen import errors
from silkscreen.errors import HubError, NoSuchFileError
from silkscreen.hub.source import Client, Source

_MAIN = "master"
_NAMES = {
    "token": "MODELSCOPE_API_TOKEN",
    "endpoint": "MODELSCOPE_ENDPOINT",
    "cache": "MODELSCOPE_CACHE",
    "timeout": "MODELSCOPE_DOWNLOAD_TIMEOUT",
    "login": "modelscope login",
}
_KINDS: Mapping[type[BaseException], type[HubError]] = {
    client_errors.AuthenticationError: errors.PermissionDeniedError,
    client_errors.PermissionDeniedError: errors.PermissionDeniedError,
    client_errors.FileIntegrityError: errors.ChecksumError,
    TimeoutError: errors.HubTimeoutError,
    requests.Timeout: errors.HubTimeoutError,
    ConnectionError: errors.NetworkError,
    requests.ConnectionError: errors.NetworkError,
}


class ModelScope(Client):
    """The client of ModelScope.

    It locks each file, resumes what is broken off, and checks sizes and SHA-256 against the repository's list of files.
    What it does not do is tell whether a folder that is there is all of it: a record is kept beside it for that.
    """

    scheme = "modelscope"
    title = "ModelScope"
    names = _NAMES
    offline_variables = ()
    loggers = ("modelscope", "modelscope_hub")

    def token(self) -> str | None:
        """Return the token of the environment or of a login."""
        token: str | None = get_default_config().token
        return token

    def find(self, source: Source, offline: bool) -> Path | None:
        """Return the whole copy on this disk, if there is one; offline, also one that cannot be told to be whole."""
        revision = source.revision or _MAIN
        try:
            snapshot = Path(snapshot_download(source.repo, revision=revision, local_files_only=True))
        except CacheNotFound:
            return None
        if source.revision and not snapshot.as_posix().endswith(f"/snapshots/{revision}"):
            return None  # the client's older caches do not tell revisions apart
        found = source.within(snapshot)
        everything = dataclasses.replace(source, path="")
        whole = source.is_file or offline or _is_whole(snapshot, source) or _is_whole(snapshot, everything)
        return found if whole else None

    def download(self, source: Source) -> Path:
        """Fetch what is missing, check it, and return where it is."""
        snapshot = Path(
            snapshot_download(source.repo, revision=source.revision or _MAIN, allow_patterns=source.patterns)
        )
        found = source.within(snapshot)
        if found is None:
            raise NoSuchFileError(source.path)
        if not source.is_file:
            files = [path for path in found.rglob("*") if path.is_file()]
            sizes = {path.relative_to(found).as_posix(): path.stat().st_size for path in files}
            _record(snapshot, source).write_text(json.dumps(sizes), encoding="utf-8")
        return found

    def send(self, repo: str, folder: Path, licence: str, private: bool, message: str) -> str:
        """Upload a folder, and return the address of the repository's page."""
        api = HubApi()
        visibility = "private" if private else "public"
        api.create_repo(repo, visibility=visibility, license=licence.lower(), exist_ok=True)
        api.upload_folder(repo, folder_path=folder, commit_message=message, use_cache=False)
        return f"{api.endpoint}/models/{repo}"

    def kind(self, error: BaseException, source: Source) -> type[HubError] | None:
        """Tell what an error of the client means."""
        if isinstance(error, client_errors.NotExistError):
            if "FilePath=" in (error.url or ""):
                return NoSuchFileError
            exists = HubApi().repo_exists(source.repo)
            return errors.NoSuchRevisionError if exists else errors.NoSuchRepositoryError
        return next((kind for theirs, kind in _KINDS.items() if isinstance(error, theirs)), None)


def _record(snapshot: Path, source: Source) -> Path:
    """Return where it is kept which files a whole copy has, and their sizes: outside, where the client keeps none."""
    key = hashlib.sha256(f"{source}".encode()).hexdigest()[:16]
    return snapshot.parent.parent / f".silkscreen-{key}.json"


def _is_whole(snapshot: Path, source: Source) -> bool:
    try:
        sizes = json.loads(_record(snapshot, source).read_text(encoding="utf-8"))
        return all((snapshot / source.path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
