from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from silkscreen.authoring.project import create_project, normalised, plan_project, project_of, read_project
from silkscreen.errors import ProjectError


@pytest.mark.parametrize(
    ("name", "result"),
    [("My Template", "my-template"), ("Template_KleinBase4B", "template-kleinbase4b"), ("silkscreen-glow", "glow")],
)
def test_a_name_is_made_of_letters_digits_and_hyphens(name: str, result: str) -> None:
    assert normalised(name) == result


def test_a_name_that_nothing_is_left_of_is_refused() -> None:
    with pytest.raises(ProjectError, match="makes no name for a template"):
        normalised("..")


def test_a_project_that_is_made_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("copied")
    project = plan_project(tmp_path / "silkscreen-two-words", "two-words")
    create_project(project, {"model.py": "x = 1\n", "a/b.txt": tmp_path / "text.txt"}, summary='Says "what" it does.')
    assert (project.package / "a" / "b.txt").read_text() == "copied"
    declared = tomllib.loads((project.folder / "pyproject.toml").read_text())["project"]
    assert declared["description"] == 'Says "what" it does.'
    assert declared["entry-points"] == {"silkscreen.templates": {"two-words": "silkscreen_two_words.model"}}
    assert read_project(project.folder) == project
    assert project_of(project.package) == project
    assert project.module_file == project.package / "model.py"


def test_files_are_not_overwritten_unasked(tmp_path: Path) -> None:
    project = plan_project(tmp_path, "one")
    project.package.mkdir(parents=True)
    (project.package / "model.py").write_text("precious")
    with pytest.raises(ProjectError, match=r"model\.py would be overwritten"):
        create_project(project, {"model.py": "new"})
    assert (project.package / "model.py").read_text() == "precious"
    assert not (tmp_path / "pyproject.toml").exists()
    create_project(project, {"model.py": "new"}, overwrite=True)
    assert (project.package / "model.py").read_text() == "new"


def declare(folder: Path, **modules: str) -> None:
    points = "\n".join(f'{name} = "{module}"' for name, module in modules.items())
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "silkscreen-some"\n[project.entry-points."silkscreen.templates"]\n{points}\n'
    )


def test_a_project_of_several_templates_wants_a_name(tmp_path: Path) -> None:
    declare(tmp_path, one="some.one", two="some.two")
    package = tmp_path / "some"
    package.mkdir()
    for name in ("one", "two"):
        (package / f"{name}.py").write_text("")
    with pytest.raises(ProjectError, match=r"declares several templates.*one or two"):
        read_project(tmp_path)
    with pytest.raises(ProjectError, match="unknown template 'too': did you mean 'two'"):
        read_project(tmp_path, "too")
    project = read_project(tmp_path, "two")
    assert (project.module, project.root, project.package) == ("some.two", tmp_path, package)
    assert project_of(package, "two") == project


def test_a_project_without_a_template_or_its_module_is_explained(tmp_path: Path) -> None:
    declare(tmp_path)
    with pytest.raises(ProjectError, match="declares no template"):
        read_project(tmp_path)
    declare(tmp_path, one="nowhere.model")
    with pytest.raises(ProjectError, match=r"there is no .*model\.py"):
        read_project(tmp_path)
    assert project_of(tmp_path / "nowhere") is None
