"""Publishing a template in the field's format: a repository with `model.py`, weights, manifest and model card."""

from __future__ import annotations

import ast
import dataclasses
import re
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard

from silkscreen import hub
from silkscreen.authoring.project import read_project
from silkscreen.errors import PublishError
from silkscreen.files import sha256
from silkscreen.manifest import read_manifest

_MESSAGE = "Publish the template with Silkscreen"
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s:]+)\)")


@dataclasses.dataclass(frozen=True)
class Publication:
    """What is published of a template.

    Attributes:
        files: by their path in the repository, where each is on this disk.
        card: the text of `README.md`, with its front matter.
        licence: SPDX identifier.
    """

    files: Mapping[str, Path]
    card: str
    licence: str

    def write(self, folder: Path) -> None:
        """Put it all into a folder, which is made, files by links where the disk has them."""
        folder.mkdir(exist_ok=True)
        for name, path in self.files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                place.symlink_to(path.resolve())
            except OSError:  # a system without links
                shutil.copyfile(path, place)
        (folder / "README.md").write_text(self.card, encoding="utf-8")

    def listing(self) -> list[tuple[str, int, str]]:
        """Return the path, size in bytes and SHA-256 of each file of the repository."""
        with tempfile.TemporaryDirectory() as folder:
            self.write(Path(folder))
            paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
            return [(path.relative_to(folder).as_posix(), path.stat().st_size, sha256(path)) for path in paths]


def plan_publication(folder: Path, name: str | None = None) -> Publication:
    """Return what is published of a template, without running its code.

    Args:
        folder: a folder with a `model.py`, or a plugin's project folder.
        name: which of the project's templates; may be left out when there is one only.

    Raises:
        PublishError: something is missing, or may not be published.
        ProjectError, ManifestError: the project or the manifest cannot be read.
    """
    licence = None
    package, module = folder, folder / "model.py"
    if (folder / "pyproject.toml").is_file():
        project = read_project(folder, name)
        package, module = project.package, project.module_file
        licence = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("license")
    if not module.is_file():
        raise PublishError(f"there is no {module}: name a folder with a model.py, or a plugin's project folder")
    _refuse_imports_of_its_own(module, package)
    readme = folder / "README.md"
    if not readme.is_file():
        raise PublishError(f"there is no {readme}: write what the template does and takes, it becomes the model card")
    text = readme.read_text(encoding="utf-8")
    beside = [*folder.glob("LICEN[SC]E*"), *folder.glob("NOTICE*")]
    shown = [folder / link for link in _PICTURE.findall(text)]
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*") if _goes(path, package)}
    files |= {
        path.relative_to(folder).as_posix(): path
        for path in beside + shown
        if path.is_file() and path.resolve().is_relative_to(folder.resolve())
    }
    files.pop(module.relative_to(package).as_posix())
    files |= {"model.py": module}
    files.pop("README.md", None)
    card, licence = _card(readme, text, package, licence if isinstance(licence, str) else None)
    return Publication(files, card, licence)


def publish(
    folder: Path,
    target: str,
    *,
    name: str | None = None,
    base: str | None = None,
    private: bool = False,
    trust_code: bool = False,
) -> str:
    """Check a template, and upload it in the field's format.

    Args:
        folder: a folder with a `model.py`, or a plugin's project folder.
        target: `modelscope:owner/repo` or `hf:owner/repo`; the repository is made when there is none.
        name: which of the project's templates; may be left out when there is one only.
        base: what it is checked on.
        private: whether a repository that is made is private.
        trust_code: let its code run, to check it.

    Returns:
        The address of the repository's page.

    Raises:
        PublishError: it does not pass the check, or lacks something.
        UntrustedCodeError: `trust_code` is not given.
        WeightsError: the target is none.
        HubError: it cannot be sent; the class tells why.
    """
    publication = plan_publication(folder, name)
    hub.destination(target)
    from silkscreen.authoring.check import check

    with tempfile.TemporaryDirectory() as parent:
        staging = Path(parent) / target.rpartition("/")[2]  # what goes is checked, not what it was made of
        publication.write(staging)
        failed = [finding for finding in check(staging, base=base, trust_code=trust_code) if not finding.passed]
        if failed:
            listed = "\n".join(f"  - {finding.name}: {finding.detail}: {finding.cure}" for finding in failed)
            raise PublishError(f"{folder} does not pass `silkscreen check`, and is not published:\n{listed}")
        return hub.send(target, staging, licence=publication.licence, private=private, message=_MESSAGE)


def _goes(path: Path, package: Path) -> bool:
    parts = path.relative_to(package).parts
    hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
    return path.is_file() and not hidden and path.name != "__init__.py"


def _refuse_imports_of_its_own(module: Path, package: Path) -> None:
    """A `model.py` in the field is run alone: nothing beside it can be imported."""
    siblings = {path.stem for path in package.glob("*.py")} | {package.name}
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"), str(module))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else ["." * node.level + (node.module or "")]
        for name in names:
            if name.startswith(".") or name.partition(".")[0] in siblings:
                raise PublishError(
                    f"{module}, line {node.lineno}, imports {name}, which is not there where model.py is run alone: "  # type: ignore[attr-defined]
                    "put that code into it, or import it from a package that others can install"
                )


def _card(readme: Path, text: str, package: Path, licence: str | None) -> tuple[str, str]:
    """Return the model card, a README with what hubs read in its front matter, and the licence."""
    card = ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")
    data = card.data
    data.license = data.license or (licence.lower() if licence else None)
    if not data.license:
        raise PublishError(
            f"{readme} does not say the licence: begin it with the lines ---, license: apache-2.0 (or yours) and ---"
        )
    manifest = read_manifest(package / "template.toml") if (package / "template.toml").is_file() else None
    published = [base for base in (manifest.bases if manifest else ()) if "/" in base]
    data.base_model = data.base_model or published or None
    data.pipeline_tag = data.pipeline_tag or "text-to-image"
    data.tags = list(dict.fromkeys([*(data.tags or []), "silkscreen", "flux2", "template"]))
    return str(card), str(data.license)
