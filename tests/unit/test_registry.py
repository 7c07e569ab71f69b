from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from silkscreen import registry
from silkscreen.errors import UnavailableError, UnknownNameError

Install = Callable[..., Path]

MANIFEST = 'title = "Fake"\ncarriers = ["kv_cache"]\n'


def template(name: str, package: str) -> str:
    return f"[silkscreen.templates]\n{name} = {package}.model\n"


def status(name: str) -> list[str]:
    return [entry.status for entry in registry.entries(registry.TEMPLATES) if entry.name == name]


def test_an_entry_is_read_without_importing_its_package(distribution: Install) -> None:
    distribution(
        "fake-one", entry_points=template("one", "fake_one"), files={"template.toml": MANIFEST, "model.py": "1/0"}
    )
    entry = registry.find(registry.TEMPLATES, "one")
    assert entry.status == "ok"
    assert entry.version == "1.0"
    assert entry.manifest is not None
    assert entry.manifest.title == "Fake"
    assert "fake_one" not in sys.modules


def test_an_editable_install_is_read_too(
    distribution: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution("fake-one", entry_points=template("one", "elsewhere_one"))
    source = tmp_path / "source" / "elsewhere_one"
    source.mkdir(parents=True)
    (source / "__init__.py").touch()
    (source / "template.toml").write_text(MANIFEST)
    monkeypatch.syspath_prepend(str(source.parent))
    registry.rescan()
    assert registry.find(registry.TEMPLATES, "one").folder == source
    assert "elsewhere_one" not in sys.modules


def test_two_claims_to_a_name_are_a_conflict_and_both_can_be_reached(distribution: Install) -> None:
    distribution("fake-one", entry_points=template("same", "fake_one"))
    distribution("fake-two", entry_points=template("same", "fake_two"))
    assert status("same") == ["conflict", "conflict"]
    with pytest.raises(UnavailableError, match="conflict"):
        registry.find(registry.TEMPLATES, "same")
    assert registry.find(registry.TEMPLATES, "fake-two:same").module == "fake_two.model"


def test_an_unmet_requirement_on_silkscreen_is_incompatible(distribution: Install) -> None:
    distribution("fake-new", entry_points=template("new", "fake_new"), requires=("silkscreen>=7",))
    with pytest.raises(UnavailableError, match=r"fake-new 1\.0.*incompatible.*needs silkscreen>=7"):
        registry.find(registry.TEMPLATES, "new")


def test_an_incompatible_rival_is_no_conflict(distribution: Install) -> None:
    distribution("fake-new", entry_points=template("same", "fake_new"), requires=("silkscreen>=7",))
    distribution("fake-one", entry_points=template("same", "fake_one"))
    assert sorted(status("same")) == ["incompatible", "ok"]
    assert registry.find(registry.TEMPLATES, "same").distribution == "fake-one"


def test_the_environment_blocks_one_or_all(distribution: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution("fake-one", entry_points=template("one", "fake_one"))
    distribution("fake-two", entry_points=template("two", "fake_two"))
    monkeypatch.setenv("SILKSCREEN_BLOCK", "other, one")
    registry.rescan()
    assert (status("one"), status("two")) == (["blocked"], ["ok"])
    monkeypatch.setenv("SILKSCREEN_NO_PLUGINS", "1")
    registry.rescan()
    assert (status("one"), status("two")) == (["blocked"], ["blocked"])


def test_a_manifest_that_does_not_parse_is_invalid_and_harms_no_other(distribution: Install) -> None:
    distribution("fake-bad", entry_points=template("bad", "fake_bad"), files={"template.toml": "title ="})
    distribution("fake-one", entry_points=template("one", "fake_one"))
    assert (status("bad"), status("one")) == (["invalid"], ["ok"])


def test_entry_points_that_do_not_parse_harm_no_other(distribution: Install) -> None:
    distribution("fake-bad", entry_points="[silkscreen.templates\nbad")
    distribution("fake-one", entry_points=template("one", "fake_one"))
    assert status("one") == ["ok"]


def test_a_plugin_that_fails_to_import_is_left_out_with_a_warning(distribution: Install) -> None:
    distribution("fake-bad", entry_points="[silkscreen]\nbad = fake_bad.hooks\n", files={"hooks.py": "1/0"})
    with pytest.warns(UserWarning, match="fake-bad:bad is left out: .*ZeroDivisionError"):
        manager = registry.plugin_manager()
    assert manager.hook.register_carriers()


def test_an_unknown_name_gets_the_nearest(distribution: Install) -> None:
    distribution("fake-one", entry_points=template("brightness9", "fake_one"))
    with pytest.raises(UnknownNameError, match="'brigthness9': did you mean 'brightness9'"):
        registry.find(registry.TEMPLATES, "brigthness9")
