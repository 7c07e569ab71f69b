"""Packing: a checkpoint, merged over the model's full state, becomes the weights of a plugin whose wheel is built."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import importlib_metadata
import torch
from safetensors import safe_open

from silkscreen import weights
from silkscreen.authoring import proof
from silkscreen.authoring.process import run
from silkscreen.authoring.project import (
    Project,
    create_project,
    import_project,
    normalised,
    plan_project,
    project_of,
    read_project,
)
from silkscreen.bases import find_base
from silkscreen.errors import PackError, WeightsError
from silkscreen.files import sha256
from silkscreen.manifest import unknown_name
from silkscreen.template import Template, find_template
from silkscreen.training import checkpoints


@dataclasses.dataclass(frozen=True)
class Packed:
    """What `pack` made.

    Attributes:
        project: the project folder.
        weights: the weight file in its package.
        wheel: the wheel.
        picture: the picture that the installed wheel drew, where it was asked to be kept.
    """

    project: Path
    weights: Path
    wheel: Path
    picture: Path | None = None


@dataclasses.dataclass(frozen=True)
class Merged:
    """A model's full state after a training.

    Attributes:
        tensors: every tensor of the state, by name.
        trained, kept, constructed: how many are the checkpoint's, the earlier weights' and the constructor's.
    """

    tensors: dict[str, torch.Tensor]
    trained: int
    kept: int
    constructed: int


def pack(
    template: str | Path,
    checkpoint: Path,
    *,
    base: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    name: str | None = None,
    project: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    isolation: bool = True,
    verify: bool = True,
    inputs: Sequence[str] = (),
    picture: Path | None = None,
    trust_code: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Packed:
    """Pack a trained template into a wheel, and prove the wheel in a fresh environment.

    When anything fails, the weights are as they were before, and no wheel is left in `out`.

    Args:
        template: an installed template whose project folder is at hand, a project folder, or a folder with a
            `model.py`, which a project is made of.
        checkpoint: the trained tensors, as `silkscreen train` writes them.
        base: the base they are for; by default the only one that the template is for, or flux2-tiny.
        dtype: of the weights written.
        name: the template's name, when a project is made (by default the folder's) or declares several.
        project: the folder of a project that is made; by default `silkscreen-NAME` beside the template's.
        out: the folder for the wheel; by default `dist` in the project folder.
        overwrite: replace weights, files of a project and a picture that exist.
        isolation: build in an environment of its own, which the build backend is downloaded into.
        verify: install the wheel into a fresh environment and draw with it; see `silkscreen.authoring.proof`.
        inputs: template inputs to draw with, `scale=0.8` as on the command line; by default the template's defaults.
        picture: where to keep the picture drawn.
        trust_code: let the code of a template named by a folder run.
        progress: is told each step.

    Raises:
        PackError: the template, the checkpoint or the wheel is not as it has to be.
        UnknownNameError, InputError: the template takes no such input.
        ProjectError: there is no project folder, or files of it would be overwritten.
        UntrustedCodeError: the template is a folder, and `trust_code` is not given.
    """
    _require_build()
    if picture is not None and picture.exists() and not overwrite:
        raise FileExistsError(f"{picture} exists: choose another name, or pass --overwrite")
    found, home = _find(template, name, project, trust_code)
    proof.check_inputs(found, inputs)
    base_id = base or (found.bases[0] if len(found.bases) == 1 else "flux2-tiny")
    if base_id not in found.bases:
        find_base(base_id)
    reference = _weight_path(found, base_id)
    target = weights.inside(reference, home.package)
    if target.exists() and not overwrite:
        raise PackError(f"{target} exists: pass --overwrite to replace these weights by the packed ones")

    merged = merge(found, base_id, checkpoint, dtype=dtype)
    progress(
        f"merged: {merged.trained} tensors of {checkpoint}, {merged.kept} of the earlier weights, "
        f"{merged.constructed} as the model's constructor makes them"
    )
    if home.package.resolve() != found.folder.resolve():
        summary = found.manifest.summary if found.manifest else ""
        files = _package_files(found.folder, found.folder / reference, checkpoint)
        create_project(home, files, summary=summary, overwrite=overwrite)
        progress(f"made the project {home.folder}")
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=home.folder) as folder:
        work = Path(folder)
        checkpoints.save(work / "packed.safetensors", merged.tensors)
        del merged
        with _replaced(target, work / "packed.safetensors", work / "earlier.safetensors"):
            progress(f"wrote {target}: {str(dtype).removeprefix('torch.')}, {target.stat().st_size:,} bytes")
            progress("building the wheel")
            wheel = _build(home, work / "dist", isolation)
            inner = target.resolve().relative_to(home.root.resolve()).as_posix()
            digest = _check_wheel(wheel, inner, target)
            drawn = (
                proof.prove(wheel, home, found, base_id, (inner, digest), inputs, picture, progress) if verify else None
            )
            out = out or home.folder / "dist"
            out.mkdir(parents=True, exist_ok=True)
            wheel = Path(shutil.move(wheel, out / wheel.name))
    return Packed(home.folder, target, wheel, drawn)


def merge(template: Template, base_id: str, checkpoint: Path, *, dtype: torch.dtype = torch.bfloat16) -> Merged:
    """Merge trained tensors over a model's full state.

    What was not trained comes from the template's weight file for the base where that exists, and else from the model's
    constructor.

    Args:
        template: the template.
        base_id: the base the model is for.
        checkpoint: a safetensors file of trained tensors, with or without `checkpoints.PREFIX`.
        dtype: of floating-point tensors in the result; others keep theirs.

    Raises:
        WeightsError: a file is no safetensors.
        PackError: with every tensor of the checkpoint that the model has not, or has in another shape, or every one
            that the weight file lacks although it was not trained.
    """
    model = template.construct(base_id)
    state = model.state_dict()
    names = {name.removeprefix(checkpoints.PREFIX): name for name in weights.inspect(checkpoint).shapes}
    if not names:
        raise PackError(f"{checkpoint} holds no tensors: name a checkpoint that `silkscreen train` wrote")
    trained = _tensors(checkpoint, names, state)
    frozen = {name: name for name in state if name not in names}
    earlier = weights.inside(_weight_path(template, base_id), template.folder)
    kept = _tensors(earlier, frozen, state) if frozen and earlier.is_file() else {}
    model.load_state_dict(kept, strict=False)
    model.load_state_dict(trained, strict=False)
    tensors = {
        name: value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
        for name, value in model.state_dict().items()
    }
    return Merged(tensors, len(trained), len(kept), len(state) - len(trained) - len(kept))


def _tensors(path: Path, names: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read tensors, given the name in the file for each of the model's, and check that they fit the model's state."""
    shapes = weights.inspect(path).shapes
    problems = []
    for name, stored in names.items():
        if name not in state:
            problems.append(unknown_name("tensor", stored, state))
        elif stored not in shapes:
            problems.append(f"tensor {stored!r} was not trained and is missing: remove the file to have it constructed")
        elif shapes[stored] != tuple(state[name].shape):
            problems.append(f"{stored} has shape {list(shapes[stored])}, the model wants {list(state[name].shape)}")
    if problems:
        raise PackError(f"{path} does not fit the model:\n" + "\n".join(f"  - {problem}" for problem in problems))
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(stored) for name, stored in names.items()}


def _find(template: str | Path, name: str | None, folder: Path | None, trust_code: bool) -> tuple[Template, Project]:
    """Return a template, and its project, which is yet to be made where its package is not the template's folder."""
    path = Path(template)
    has_project, has_model = (path / "pyproject.toml").is_file(), (path / "model.py").is_file()
    if not (has_project or has_model or isinstance(template, Path) or "/" in template):
        found = find_template(template)
        project = project_of(found.folder, name or template.rpartition(":")[2])
        if project is None:
            raise PackError(
                f"template {template!r} ({found.origin}) is installed in {found.folder}, with no project folder around "
                "it: name its project folder, the one with its pyproject.toml, in place of its name"
            )
    else:
        project = read_project(path, name) if has_project else project_of(path, name)
        found = import_project(project, trust_code) if project else find_template(path, trust_code=trust_code)
    if project is None:
        name = normalised(name or found.name)
        return found, plan_project(folder or path.resolve().parent / f"silkscreen-{name}", name)
    if folder is not None:
        raise PackError(f"--project {folder}: the template has a project already, {project.folder}")
    return found, project


def _weight_path(template: Template, base_id: str) -> str:
    """Return the one weight path for a base, relative to the template's folder."""
    where = f"{template.origin}: TEMPLATE_MODEL_PATH"
    try:
        references = template.weight_paths(base_id)
    except WeightsError as error:
        raise PackError(f"{template.origin}: {error}: choose with --base, or add it to TEMPLATE_MODEL_PATH") from None
    if not references:
        example = f'{{"{base_id}": "{base_id.rpartition("/")[2]}.safetensors"}}'
        raise PackError(f"{where} names no weights for the base {base_id!r}: set it, to {example} for example")
    if len(references) > 1:
        raise PackError(f"{where} names {len(references)} files for the base {base_id!r}: name one, which pack writes")
    if weights.is_source(references[0]):
        raise PackError(f"{where} names {references[0]!r} for the base {base_id!r}: name a file of the package instead")
    return references[0]


def _package_files(folder: Path, target: Path, checkpoint: Path) -> dict[str, str | Path]:
    """Return a template folder's files: no hidden ones, no weights to be written, nothing that training left there."""
    folder, checkpoint = folder.resolve(), checkpoint.resolve()
    skipped = {target.resolve(), checkpoint.parent if folder in checkpoint.parent.parents else checkpoint}
    files: dict[str, str | Path] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inner.parts)
        if path.is_file() and not hidden and skipped.isdisjoint([path, *path.parents]):
            files[inner.as_posix()] = path
    return files


@contextmanager
def _replaced(target: Path, packed: Path, earlier: Path) -> Iterator[None]:
    """Move the packed weights to their place for good, or only for so long as nothing fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(earlier)
    try:
        packed.rename(target)
        yield
    except BaseException:
        target.unlink(missing_ok=True)
        if earlier.exists():
            earlier.rename(target)
        raise


def _require_build() -> None:
    try:
        importlib_metadata.distribution("build")
    except importlib_metadata.PackageNotFoundError:
        raise PackError("building a wheel needs the package build: pip install build") from None


def _build(project: Project, out: Path, isolation: bool) -> Path:
    options = [] if isolation else ["--no-isolation"]
    words: list[str | Path] = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        *options,
        "--outdir",
        out,
        project.folder.resolve(),
    ]
    run(words, "the wheel cannot be built", folder=out.parent)
    return next(out.glob("*.whl"))


def _check_wheel(wheel: Path, inner: str, target: Path) -> str:
    """Check that a wheel holds the weights, and return their sha256."""
    digest = sha256(target)
    package = inner.partition("/")[0]
    with zipfile.ZipFile(wheel) as archive:
        if inner not in archive.namelist():
            raise PackError(
                f'the wheel has no {inner}: with hatchling, add artifacts = ["*.safetensors"] under '
                "[tool.hatch.build.targets.wheel]; with setuptools, "
                f'{package} = ["*.safetensors"] under [tool.setuptools.package-data]'
            )
        with archive.open(inner) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:  # type: ignore[arg-type]
                raise PackError(f"the wheel has another {inner}: remove the build backend's leftovers, and pack again")
    return digest
