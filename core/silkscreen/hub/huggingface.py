"""Hugging Face, through its client."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub import errors as client_errors
from huggingface_hub.utils import tqdm

from silkscreen import errors
from silkscreen.errors import ChecksumError, HubError, NoSuchFileError
from silkscreen.hub.record import files_in, is_recorded, write_record
from silkscreen.hub.source import Client, Source

_BLOCK, _SHOWN = 2**22, 2**28
"""Bytes that are checked at once, and of a file whose check takes long enough to be shown."""
_NAMES = {
    "token": "HF_TOKEN",
    "endpoint": "HF_ENDPOINT",
    "cache": "HF_HOME",
    "timeout": "HF_HUB_DOWNLOAD_TIMEOUT",
    "login": "hf auth login",
}
_KINDS: Mapping[str, type[HubError]] = {
    "GatedRepoError": errors.PermissionDeniedError,
    "RepositoryNotFoundError": errors.NoSuchRepositoryError,
    "RevisionNotFoundError": errors.NoSuchRevisionError,
    "RemoteEntryNotFoundError": NoSuchFileError,
    "TimeoutError": errors.HubTimeoutError,
    "TimeoutException": errors.HubTimeoutError,
    "ConnectionError": errors.NetworkError,
    "TransportError": errors.NetworkError,
}
"""By the names of the classes, because the client has changed the library that it speaks HTTP with."""


class HuggingFace(Client):
    """The client of Hugging Face.

    It locks each file and resumes within a download, but checks no more than sizes; it names each file in its cache by
    the checksum that the hub gives for it, SHA-256 for large files and git's SHA-1 for small ones: these are checked
    here.
    """

    scheme = "hf"
    title = "Hugging Face"
    names = _NAMES
    offline_variables = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    loggers = ("huggingface_hub",)

    def token(self) -> str | None:
        """Return the token of the environment or of a login."""
        token: str | None = get_token()
        return token

    def find(self, source: Source, offline: bool) -> Path | None:
        """Return the whole copy on this disk, if there is one; offline, also one that cannot be told to be whole."""
        try:
            snapshot = self._snapshot(source, local_files_only=True)
        except client_errors.LocalEntryNotFoundError:
            return None
        found = source.within(snapshot)
        if found is None or is_recorded(snapshot, source):
            return found
        wrong = [path for path in files_in(found) if not _is_as_listed(path)]
        for path in wrong:
            path.resolve().unlink(missing_ok=True)  # files of one content share it
            path.unlink()
        if wrong:
            return None
        write_record(snapshot, source)
        return found

    def download(self, source: Source) -> Path:
        """Fetch what is missing, check it, and return where it is."""
        if source.within(self._snapshot(source)) is None:
            raise NoSuchFileError(source.path)
        found = self.find(source, offline=False)
        if found is None:
            raise ChecksumError(source.path)
        return found

    def send(self, repo: str, folder: Path, licence: str, private: bool, message: str) -> str:
        """Upload a folder, and return the address of the repository's page."""
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        return str(address)

    def kind(self, error: BaseException, source: Source) -> type[HubError] | None:
        """Tell what an error of the client means."""
        if isinstance(error, client_errors.HfHubHTTPError) and error.response.status_code == 403:
            return errors.PermissionDeniedError
        if isinstance(error, OSError) and "Consistency check failed" in str(error):  # of the size
            return ChecksumError
        names = [theirs.__name__ for theirs in type(error).__mro__]
        return next((kind for name, kind in _KINDS.items() if name in names), None)

    def _snapshot(self, source: Source, local_files_only: bool = False) -> Path:
        return Path(
            snapshot_download(
                source.repo,
                revision=source.revision,
                allow_patterns=source.patterns,
                local_files_only=local_files_only,
            )
        )


def _is_as_listed(path: Path) -> bool:
    """Compare a file with the checksum that its name in the cache is; a name that is none tells nothing."""
    blob = path.resolve()
    size = blob.stat().st_size
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", blob.name):
        digest = hashlib.sha1(b"blob %d\0" % size)
    else:
        return True
    shown = {"desc": f"Checking {path.name}", "unit": "B", "unit_scale": True, "disable": size < _SHOWN or None}
    with blob.open("rb") as file, tqdm(total=size, **shown) as bar:
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest() == blob.name
