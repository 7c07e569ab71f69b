"""Both hubs' own clients against a server on this machine: what is fetched, what goes wrong, and how it is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, Hubs, hubs, variables
from silkscreen import hub
from silkscreen.errors import WeightsError

BOTH = pytest.mark.parametrize("scheme", ["modelscope", "hf"])
WEIGHTS = bytes(range(251)) * 4000
FILES = {"model.py": b"TEMPLATE_MODEL = None\n", "sub/weights.safetensors": WEIGHTS, "README.md": b"# A template\n"}
TOKEN = "sk-0123456789abcdef"

FETCH = """
import json, os, resource, sys, traceback
from silkscreen import registry
if "FILE_SIZE" in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_SIZE"]),) * 2)
for source in sys.argv[1:]:
    try:
        print(json.dumps({"path": str(registry.fetch(source))}))
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@pytest.fixture
def server() -> Iterator[Hubs]:
    with hubs() as state:
        state.add("owner/repo", FILES)
        yield state


@pytest.fixture
def start(server: Hubs, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Fetch sources in a process of its own: clients read their environment variables when they are imported."""

    def run(*sources: str, **given: str) -> subprocess.Popen[str]:
        environment = {**os.environ, **variables(server.url, tmp_path), **given}
        command = [sys.executable, "-c", FETCH, *sources]
        return subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)

    return run


@pytest.fixture
def fetch(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Any]:
    return lambda *sources, **given: results(start(*sources, **given))[0]


def results(process: subprocess.Popen[str]) -> tuple[Any, str]:
    """Return what became of the source, or of each of several, and all that was printed."""
    printed, shown = process.communicate()
    found = [json.loads(line) for line in printed.splitlines()]
    assert found, shown
    return found[0] if len(found) == 1 else found, printed + shown


def whole(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@BOTH
def test_a_repository_a_folder_and_a_file_are_fetched_once(scheme: str, fetch: Any, server: Hubs) -> None:
    sources = (f"{scheme}:owner/repo:sub/weights.safetensors", f"{scheme}:owner/repo:sub/", f"{scheme}:owner/repo")
    file, folder, everything = (Path(each["path"]) for each in fetch(*sources))
    assert file.read_bytes() == WEIGHTS
    assert whole(folder) == {"weights.safetensors": WEIGHTS}
    assert whole(everything) == FILES
    assert len(server.fetched("sub/weights.safetensors")) == 1
    asked = len(server.requests)
    again = fetch(*sources)
    assert [Path(each["path"]) for each in again] == [file, folder, everything]
    assert [each.path for each in server.requests[asked:] if "owner" in each.path] == []


@BOTH
def test_offline_nothing_is_asked_and_what_is_there_is_found(scheme: str, fetch: Any, server: Hubs) -> None:
    fetch(f"{scheme}:owner/repo:sub/")
    asked = len(server.requests)
    found, missing, other = fetch(
        f"{scheme}:owner/repo:sub/",
        f"{scheme}:owner/repo:model.py",
        f"{scheme}:owner/repo@v1:sub/",
        SILKSCREEN_OFFLINE="1",
    )
    assert whole(Path(found["path"])) == {"weights.safetensors": WEIGHTS}
    assert (missing["error"], other["error"]) == ("OfflineError", "OfflineError")
    assert "--offline" in missing["message"]
    assert len(server.requests) == asked


def test_the_variable_of_one_client_does_not_bind_the_other(fetch: Any, server: Hubs) -> None:
    refused, fetched = fetch("hf:owner/repo:model.py", "modelscope:owner/repo:model.py", HF_HUB_OFFLINE="1")
    assert refused["error"] == "OfflineError"
    assert Path(fetched["path"]).read_bytes() == FILES["model.py"]


@BOTH
def test_a_revision_is_fetched_beside_the_main_branch(scheme: str, fetch: Any, server: Hubs) -> None:
    server.add("owner/repo", {"model.py": b"old"}, "v1")
    main, old = fetch(f"{scheme}:owner/repo:model.py", f"{scheme}:owner/repo@v1:model.py")
    assert Path(main["path"]).read_bytes() == FILES["model.py"]
    assert Path(old["path"]).read_bytes() == b"old"


@BOTH
def test_what_a_hub_does_not_have_is_told_apart(scheme: str, fetch: Any) -> None:
    repository, revision, file, folder, both = fetch(
        f"{scheme}:owner/none:model.py",
        f"{scheme}:owner/repo@v9",
        f"{scheme}:owner/repo:none.py",
        f"{scheme}:owner/repo:none/",
        f"{scheme}:owner/repo@v9:none/",
    )
    assert repository["error"] == "NoSuchRepositoryError"
    assert "no repository owner/none: check the name; for a private one set" in repository["message"]
    assert revision["error"] == both["error"] == "NoSuchRevisionError"
    assert "owner/repo has no revision v9, or nothing in it: name a branch" in revision["message"]
    assert file["error"] == folder["error"] == "NoSuchFileError"
    assert "there is no none.py in owner/repo" in file["message"]


def test_a_revision_that_is_listed_without_files_is_none(fetch: Any, server: Hubs) -> None:
    server.lists_anything = True
    everything, file = fetch("modelscope:owner/repo@v9", "modelscope:owner/repo@v9:model.py")
    assert everything["error"] == file["error"] == "NoSuchRevisionError"


@BOTH
def test_a_private_repository_needs_its_token(scheme: str, fetch: Any, server: Hubs) -> None:
    server.tokens["owner/repo"] = TOKEN
    name = {"modelscope": "MODELSCOPE_API_TOKEN", "hf": "HF_TOKEN"}[scheme]
    refused = fetch(f"{scheme}:owner/repo:model.py", **{name: "another"})
    assert refused["error"] == "PermissionDeniedError"
    assert f"set {name} or log in" in refused["message"]
    assert "path" in fetch(f"{scheme}:owner/repo:model.py", **{name: TOKEN})


@BOTH
def test_a_token_that_a_server_sends_back_is_shown_nowhere(scheme: str, start: Any, server: Hubs) -> None:
    server.faults = [Fault("owner/repo", 403, times=2), Fault("weights", 403, times=9)]
    verbose = {"MODELSCOPE_LOG_LEVEL": "DEBUG", "HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1"}
    tokens = {"MODELSCOPE_API_TOKEN": TOKEN, "HF_TOKEN": TOKEN}
    found, shown = results(
        start(f"{scheme}:owner/repo", f"{scheme}:owner/repo", f"{scheme}:owner/repo", **tokens, **verbose)
    )
    assert "PermissionDeniedError" in [each.get("error") for each in found]
    assert "refused, you said Bearer ***" in shown
    assert TOKEN not in shown


@BOTH
def test_a_server_that_fails_is_told(scheme: str, fetch: Any, server: Hubs) -> None:
    server.faults = [Fault("owner/repo", 500, times=99)]
    found = fetch(f"{scheme}:owner/repo:model.py")
    assert found["error"] == "HubError"
    assert re.search(r" failed: .*: try again later", found["message"])


@BOTH
def test_a_hub_that_cannot_be_reached_is_told(scheme: str, fetch: Any) -> None:
    nowhere = "http://127.0.0.1:9"
    found = fetch(f"{scheme}:owner/repo:model.py", MODELSCOPE_ENDPOINT=nowhere, HF_ENDPOINT=nowhere)
    assert found["error"] == "NetworkError"
    assert "cannot be reached" in found["message"]
    assert f"{'MODELSCOPE' if scheme == 'modelscope' else 'HF'}_ENDPOINT" in found["message"]


@pytest.mark.parametrize(("scheme", "kept"), [("modelscope", 12_000_000), ("hf", 10 * 2**20)])
def test_a_broken_connection_is_taken_up_where_it_broke(scheme: str, kept: int, start: Any, server: Hubs) -> None:
    large = bytes(range(240)) * 100_000
    server.add("owner/large", {"large.safetensors": large})
    server.faults = [Fault("large.safetensors", "cut")]
    found, shown = results(start(f"{scheme}:owner/large"))
    assert "100%" in shown  # of the progress
    assert (Path(found["path"]) / "large.safetensors").read_bytes() == large
    ranges = [request.headers.get("Range") for request in server.fetched("large.safetensors")]
    assert ranges == [None, f"bytes={kept}-"]  # one of the clients keeps whole blocks of 10 MiB


def test_another_call_goes_on_where_the_last_one_broke(fetch: Any, server: Hubs, tmp_path: Path) -> None:
    server.faults = [Fault("weights", "cut")]
    broken = fetch("modelscope:owner/repo", MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    assert broken["error"] == "NetworkError"
    assert list(tmp_path.rglob("*.safetensors")) == []
    found = fetch("modelscope:owner/repo")
    assert whole(Path(found["path"])) == FILES
    assert server.fetched("sub/weights.safetensors")[1].headers["Range"] == f"bytes={len(WEIGHTS) // 2}-"
    assert len(server.fetched("model.py")) == 1


def test_an_answer_that_stalls_is_given_up(fetch: Any, server: Hubs) -> None:
    server.faults = [Fault("weights", "stall", times=9)]
    seconds = {"MODELSCOPE_DOWNLOAD_TIMEOUT": "1", "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0"}
    found = fetch("modelscope:owner/repo:sub/weights.safetensors", **seconds)
    assert found["error"] == "HubTimeoutError"
    assert "MODELSCOPE_DOWNLOAD_TIMEOUT" in found["message"]


@BOTH
def test_a_wrong_checksum_leaves_no_file(scheme: str, fetch: Any, server: Hubs, tmp_path: Path) -> None:
    server.faults = [Fault("weights", "wrong", times=9), Fault("model.py", "wrong", times=9)]
    assert fetch(f"{scheme}:owner/repo")["error"] == "ChecksumError"
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".py")] == []
    server.faults = []
    assert whole(Path(fetch(f"{scheme}:owner/repo")["path"])) == FILES


@BOTH
def test_two_processes_at_once_download_once(scheme: str, start: Any, server: Hubs) -> None:
    server.faults = [Fault("weights", "slow")]
    processes = [start(f"{scheme}:owner/repo") for _ in range(2)]
    found = [results(process)[0] for process in processes]
    assert [whole(Path(each["path"])) for each in found] == [FILES, FILES]
    assert len(server.fetched("sub/weights.safetensors")) == 1
    listed = ("/api/v1/models/owner/repo/repo/files", "/api/models/owner/repo/revision")
    assert len([each for each in server.requests if each.path.startswith(listed)]) == 2  # neither found it there


@BOTH
def test_a_full_disk_is_told_and_leaves_no_file(scheme: str, fetch: Any, tmp_path: Path) -> None:
    found = fetch(f"{scheme}:owner/repo", FILE_SIZE="100000", MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    assert found["error"] == "DiskFullError"
    assert "the disk is full: make room" in found["message"]
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_pinned_revision_is_not_taken_from_a_cache_that_knows_none(fetch: Any, server: Hubs, tmp_path: Path) -> None:
    server.add("owner/repo", {"model.py": b"pinned"}, "v1")
    older = tmp_path / "modelscope" / "models" / "owner" / "repo"
    older.mkdir(parents=True)
    (older / "model.py").write_bytes(b"of some revision")
    assert Path(fetch("modelscope:owner/repo@v1:model.py")["path"]).read_bytes() == b"pinned"


@pytest.mark.parametrize(
    "reference", ["owner", "owner/repo:../secret", "../owner/repo", "owner/repo@../../x:y", "a/b/c"]
)
def test_what_names_nothing_on_a_hub_is_refused(reference: str) -> None:
    for fetch_from in (hub.from_modelscope, hub.from_huggingface):
        with pytest.raises(WeightsError, match=r"names nothing on a hub: write .*:owner/repo"):
            fetch_from(reference)
