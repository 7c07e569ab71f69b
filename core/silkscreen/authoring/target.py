"""What a command is pointed at: an installed template, a project folder that need not be installed, or a folder."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from silkscreen import registry
from silkscreen.authoring.project import Project, import_project, project_of, read_project
from silkscreen.errors import UnavailableError, UnknownNameError
from silkscreen.template import Template, find_template, require_trust


@dataclasses.dataclass(frozen=True)
class Target:
    """A template that was named, and not imported yet.

    Attributes:
        name: what `-t` calls it by.
        module: its module's name; empty for a bare folder.
        folder: the folder of its module.
        project: its project, when that was named.
    """

    name: str
    module: str
    folder: Path
    project: Project | None = None

    def load(self) -> Template:
        """Import it; its code is trusted.

        Raises:
            ContractError: the module cannot be imported or breaks the contract.
            ManifestError: its project's `template.toml` does not parse.
        """
        if self.project is not None:
            return import_project(self.project, trust_code=True)
        return find_template(self.name, trust_code=True)

    def variables(self, folder: Path) -> dict[str, str]:
        """Return environment variables by which another interpreter sees what this one does, and the target.

        Args:
            folder: where metadata is written by which a project counts as installed.
        """
        paths = [path or str(Path.cwd()) for path in sys.path]
        if self.project is not None:
            distribution = self.project.distribution.replace("-", "_")
            info = folder / f"{distribution}-0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {self.project.distribution}\nVersion: 0\n")
            points = f"[{registry.TEMPLATES}]\n{self.project.name} = {self.project.module}\n"
            (info / "entry_points.txt").write_text(points)
            paths = [str(folder), str(self.project.root.resolve()), *paths]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def find_target(target: str | Path, trust_code: bool) -> Target:
    """Return what a name, a folder or a source means.

    Args:
        target: an installed template, a project folder, a folder with a `model.py`, in a project or not, or a source.
        trust_code: let the code in a folder run.

    Raises:
        UnknownNameError, UnavailableError: no such template can be used.
        UntrustedCodeError: it is a folder, and `trust_code` is not given.
        ProjectError: a project declares no template, or several.
    """
    path = Path(target)
    has_project, has_model = (path / "pyproject.toml").is_file(), (path / "model.py").is_file()
    if not (has_project or has_model):
        try:
            entry = registry.find(registry.TEMPLATES, str(target))
        except UnknownNameError:
            if ":" not in str(target) and not path.is_dir():
                raise
        else:
            if entry.folder is None:
                raise UnavailableError(f"{target}: the folder of {entry.module} is not found: install it again")
            return Target(str(target), entry.module, entry.folder)
        return _bare(find_template(target, trust_code=trust_code).folder)
    project = read_project(path) if has_project else project_of(path)
    if project is None:
        require_trust(path, path / "model.py", trust_code)
        return _bare(path)
    require_trust(project.package, project.module_file, trust_code)
    return Target(project.name, project.module, project.package, project)


def _bare(folder: Path) -> Target:
    return Target(str(folder.resolve()), "", folder)
