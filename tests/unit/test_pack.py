from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from silkscreen.authoring.pack import merge, pack
from silkscreen.errors import PackError, UnknownNameError, UntrustedCodeError, WeightsError
from silkscreen.template import Template, find_template

Install = Callable[..., Path]

MODEL = """
    import torch

    class TEMPLATE_MODEL(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trained = torch.nn.Linear(2, 2)
            self.alias = self.trained
            self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
            self.frozen.weight.fill_(3.0)
            self.frozen.bias.fill_(4.0)
            self.register_buffer("count", torch.tensor(7))

        def process_inputs(self, pipe, scale=0.5, **kwargs):
            return {"scale": scale}

        def forward(self, pipe, scale, **kwargs):
            return {"kv_cache": {}}

    TEMPLATE_MODEL_PATH = "model.safetensors"
"""
TRAINED = {"trained.weight": torch.full((2, 2), 1.0), "trained.bias": torch.full((2,), 2.0)}
EARLIER = {
    "frozen.weight": torch.full((2, 2), 8.0),
    "frozen.bias": torch.full((2,), 9.0),
    "count": torch.tensor(11),
    "trained.weight": torch.zeros(2, 2),
    "trained.bias": torch.zeros(2),
    "alias.weight": torch.zeros(2, 2),
    "alias.bias": torch.zeros(2),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A template folder without weights."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.py").write_text(textwrap.dedent(MODEL))
    return folder


@pytest.fixture
def template(folder: Path) -> Template:
    return find_template(folder, trust_code=True)


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor] = TRAINED) -> Path:
    path = folder.parent / "checkpoint.safetensors"
    save_file(tensors, path)
    return path


def test_trained_tensors_win_and_frozen_ones_are_as_constructed(template: Template, folder: Path) -> None:
    merged = merge(template, "flux2-tiny", checkpoint(folder), dtype=torch.float16)
    assert merged.tensors.keys() == EARLIER.keys()
    for name in ("trained", "alias"):
        assert torch.equal(merged.tensors[f"{name}.weight"], torch.full((2, 2), 1.0, dtype=torch.float16))
        assert torch.equal(merged.tensors[f"{name}.bias"], torch.full((2,), 2.0, dtype=torch.float16))
    assert torch.equal(merged.tensors["frozen.weight"], torch.full((2, 2), 3.0, dtype=torch.float16))
    assert torch.equal(merged.tensors["count"], torch.tensor(7))
    assert (merged.trained, merged.kept, merged.constructed) == (2, 0, 5)


def test_frozen_tensors_keep_the_weights_that_the_template_has(template: Template, folder: Path) -> None:
    save_file(EARLIER, folder / "model.safetensors")
    merged = merge(template, "flux2-tiny", checkpoint(folder))
    assert torch.equal(merged.tensors["frozen.bias"], torch.full((2,), 9.0, dtype=torch.bfloat16))
    assert torch.equal(merged.tensors["count"], torch.tensor(11))
    for name in ("trained", "alias"):
        assert torch.equal(merged.tensors[f"{name}.bias"], torch.full((2,), 2.0, dtype=torch.bfloat16))
    assert (merged.trained, merged.kept, merged.constructed) == (2, 5, 0)


def test_a_template_loads_what_was_merged(template: Template, folder: Path) -> None:
    save_file(merge(template, "flux2-tiny", checkpoint(folder)).tensors, folder / "model.safetensors")
    model = template.load("flux2-tiny", dtype=torch.float32)
    assert torch.equal(model.trained.bias, torch.full((2,), 2.0))
    assert torch.equal(model.frozen.bias, torch.full((2,), 4.0))


def test_the_prefix_of_the_fields_checkpoints_is_accepted(template: Template, folder: Path) -> None:
    path = checkpoint(folder, {f"pipe.template_model.{name}": value for name, value in TRAINED.items()})
    assert torch.equal(merge(template, "flux2-tiny", path).tensors["trained.bias"].float(), torch.full((2,), 2.0))


def test_every_tensor_that_does_not_fit_is_named(template: Template, folder: Path) -> None:
    path = checkpoint(folder, {"traind.weight": torch.zeros(2, 2), "trained.bias": torch.zeros(3)})
    with pytest.raises(PackError) as caught:
        merge(template, "flux2-tiny", path)
    message = str(caught.value)
    assert f"{path} does not fit the model" in message
    assert "unknown tensor 'traind.weight': did you mean 'trained.weight'" in message
    assert "trained.bias has shape [3], the model wants [2]" in message


def test_weights_that_lack_a_frozen_tensor_are_not_filled_up_silently(template: Template, folder: Path) -> None:
    save_file({name: value for name, value in EARLIER.items() if name != "frozen.bias"}, folder / "model.safetensors")
    with pytest.raises(PackError, match=r"model\.safetensors does not fit.*\n.*'frozen\.bias' was not trained"):
        merge(template, "flux2-tiny", checkpoint(folder))


def test_a_checkpoint_without_tensors_is_refused(template: Template, folder: Path) -> None:
    with pytest.raises(PackError, match="holds no tensors"):
        merge(template, "flux2-tiny", checkpoint(folder, {}))
    (folder / "pickle").write_bytes(b"\x80\x04pickle")
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        merge(template, "flux2-tiny", folder / "pickle")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("None", r"names no weights for the base 'flux2-tiny': set it, to \{\"flux2-tiny\": "),
        ("['a.safetensors', 'b.safetensors']", "names 2 files"),
        ("'hf:owner/repo:file'", "names 'hf:owner/repo:file'.*name a file of the package"),
        ("{'one': 'a', 'two': 'b'}", "it has some for one, two: choose with --base"),
    ],
)
def test_a_weight_path_that_cannot_be_written_is_explained(folder: Path, path: str, problem: str) -> None:
    with (folder / "model.py").open("a") as file:
        file.write(f"TEMPLATE_MODEL_PATH = {path}\n")
    with pytest.raises(PackError, match=problem):
        pack(folder, checkpoint(folder), trust_code=True)
    assert not (folder.parent / "silkscreen-mine").exists()


def test_a_base_that_nobody_knows_is_refused(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown base 'flux2-tny': did you mean 'flux2-tiny'"):
        pack(folder, checkpoint(folder), base="flux2-tny", trust_code=True)


def test_an_input_to_draw_with_is_checked_before_anything_is_made(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown input 'scael': did you mean 'scale'"):
        pack(folder, checkpoint(folder), inputs=["scael=1"], trust_code=True)
    assert not (folder.parent / "silkscreen-mine").exists()


def test_a_folder_is_refused_until_its_code_is_trusted(folder: Path, project: Path) -> None:
    for path in (folder, project):
        with pytest.raises(UntrustedCodeError):
            pack(path, checkpoint(folder))


def test_an_installed_template_without_a_project_folder_is_explained(distribution: Install, folder: Path) -> None:
    distribution(
        "fake-one",
        entry_points="[silkscreen.templates]\none = fake_one.model\n",
        files={"model.py": textwrap.dedent(MODEL)},
    )
    with pytest.raises(PackError, match=r"fake-one 1\.0.*name its project folder"):
        pack("one", checkpoint(folder))


BACKEND = """
import zipfile
from pathlib import Path

def build_wheel(directory, settings=None, metadata=None):
    name = "silkscreen_fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(Path(directory) / name, "w") as wheel:
        for path in Path("silkscreen_fake").glob("*.py"):
            wheel.write(path)
    return name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "silkscreen-fake"
version = "1.0"
[project.entry-points."silkscreen.templates"]
fake = "silkscreen_fake.model"
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A project whose package imports its own modules and has weights, which its build backend leaves out."""
    project = tmp_path / "project"
    package = project / "silkscreen_fake"
    package.mkdir(parents=True)
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "backend.py").write_text(BACKEND)
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(textwrap.dedent(MODEL))
    (package / "model.py").write_text("from .parts import *\nfrom silkscreen_fake.parts import TEMPLATE_MODEL_PATH\n")
    save_file(EARLIER, package / "model.safetensors")
    yield project
    for module in [name for name in sys.modules if name.partition(".")[0] == package.name]:
        del sys.modules[module]


def test_weights_are_not_overwritten_unasked(project: Path, folder: Path) -> None:
    with pytest.raises(PackError, match=r"model\.safetensors exists: pass --overwrite"):
        pack(project, checkpoint(folder), trust_code=True)


def test_a_wheel_without_the_weights_is_refused_and_the_earlier_weights_are_put_back(
    project: Path, folder: Path
) -> None:
    def files() -> set[Path]:
        return {path for path in project.rglob("*") if "__pycache__" not in path.parts}

    before = files()
    with pytest.raises(PackError, match=r"the wheel has no silkscreen_fake/model\.safetensors.*artifacts"):
        pack(project, checkpoint(folder), overwrite=True, isolation=False, trust_code=True)
    assert files() == before
    assert torch.equal(load_file(project / "silkscreen_fake" / "model.safetensors")["count"], torch.tensor(11))


def test_a_build_that_fails_shows_its_end_and_leaves_no_weights(project: Path, folder: Path) -> None:
    (project / "backend.py").write_text("raise RuntimeError('no such day')")
    target = project / "silkscreen_fake" / "model.safetensors"
    target.unlink()
    with pytest.raises(PackError, match=r"the wheel cannot be built: [\s\S]*no such day"):
        pack(project, checkpoint(folder), isolation=False, trust_code=True)
    assert not target.exists()


def test_a_wheel_holds_the_merged_weights(project: Path, folder: Path, tmp_path: Path) -> None:
    (project / "backend.py").write_text(BACKEND.replace("*.py", "*.*"))
    packed = pack(
        project,
        checkpoint(folder),
        overwrite=True,
        isolation=False,
        verify=False,
        out=tmp_path / "out",
        trust_code=True,
    )
    assert packed.wheel == tmp_path / "out" / "silkscreen_fake-1.0-py3-none-any.whl"
    assert packed.wheel.is_file()
    tensors = load_file(packed.weights)
    assert torch.equal(tensors["trained.bias"].float(), torch.full((2,), 2.0))
    assert torch.equal(tensors["frozen.bias"].float(), torch.full((2,), 9.0))
    assert tensors["frozen.bias"].dtype == torch.bfloat16


def test_an_installed_template_is_packed_in_the_project_around_it(
    project: Path, folder: Path, distribution: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "backend.py").write_text(BACKEND.replace("*.py", "*.*"))
    distribution("fake-editable", entry_points="[silkscreen.templates]\nfake = silkscreen_fake.model\n")
    monkeypatch.syspath_prepend(str(project))
    packed = pack("fake", checkpoint(folder), overwrite=True, isolation=False, verify=False)
    assert packed.project == project
    assert packed.wheel.parent == project / "dist"
