"""ModelScope, through its client: the package that `modelscope` hands all of this to, and that imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import requests
from modelscope_hub import CacheNotFound, HubApi, get_default_config
from modelscope_hub import errors as client_errors
from modelscope_hub.compat import snapshot_download

from silkscreen import errors
from silkscreen.errors import HubError, NoSuchFileError
from silkscreen.hub.record import is_recorded, write_record
from silkscreen.hub.source import Client, Source

_MAIN = "master"
_NAMES = {
    "token": "MODELSCOPE_API_TOKEN",
    "endpoint": "MODELSCOPE_ENDPOINT",
    "cache": "MODELSCOPE_CACHE",
    "timeout": "MODELSCOPE_DOWNLOAD_TIMEOUT",
    "login": "modelscope login",
}
_REFUSED = tuple(
    f"[{error.error_code}]" for error in (client_errors.AuthenticationError, client_errors.PermissionDeniedError)
)
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
    loggers = ("modelscope_hub",)

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
        whole = source.is_file or offline or is_recorded(snapshot, source) or is_recorded(snapshot, everything)
        return found if whole else None

    def download(self, source: Source) -> Path:
        """Fetch what is missing, check it, and return where it is."""
        revision = source.revision or _MAIN
        snapshot = Path(snapshot_download(source.repo, revision=revision, allow_patterns=source.patterns))
        found = source.within(snapshot)
        if found is None:  # the hub may list a revision that is not there as one without files
            listed = HubApi().list_repo_files(source.repo, "model", revision=revision)
            raise NoSuchFileError(source.path) if listed else errors.NoSuchRevisionError(revision)
        write_record(snapshot, source)
        return found

    def send(self, repo: str, folder: Path, licence: str, private: bool, message: str) -> str:
        """Upload a folder, and return the address of the repository's page."""
        api = HubApi()
        with contextlib.suppress(client_errors.AlreadyExistsError):
            visibility = "private" if private else "public"
            api.create_repo(repo, "model", visibility=visibility, license=licence.lower())
        failures: list[str] = []  # the client raises no more than that there are some
        try:
            api.upload_folder(
                repo,
                "model",
                folder,
                commit_message=message,
                use_cache=False,
                progress_callback=lambda event: failures.append(event.get("error") or ""),
            )
        except client_errors.StorageError as error:
            if any(failure.startswith(_REFUSED) for failure in failures):
                raise errors.PermissionDeniedError(repo) from error
            raise
        return f"{get_default_config().endpoint}/models/{repo}"

    def kind(self, error: BaseException, source: Source) -> type[HubError] | None:
        """Tell what an error of the client means."""
        if isinstance(error, client_errors.NotExistError):
            if "FilePath=" in (error.url or ""):
                return NoSuchFileError
            with contextlib.suppress(client_errors.HubError):
                if HubApi().repo_exists(source.repo, "model"):
                    return errors.NoSuchRevisionError
            return errors.NoSuchRepositoryError
        return next((kind for theirs, kind in _KINDS.items() if isinstance(error, theirs)), None)
