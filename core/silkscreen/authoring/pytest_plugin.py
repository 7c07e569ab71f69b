"""`pytest --silkscreen-check`: what `silkscreen check` asks, as tests of an author's own suite, one a finding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from silkscreen.authoring.check import Finding


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option, and the setting for projects of several templates."""
    parser.getgroup("silkscreen").addoption(
        "--silkscreen-check", action="store_true", help="Ask of the project's template what a reviewer would."
    )
    parser.addini("silkscreen_check", "What --silkscreen-check checks: templates or folders.", "linelist", ["."])


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Check, and add a test for each finding."""
    if not session.config.getoption("--silkscreen-check"):
        return
    from silkscreen.authoring.check import check

    for target in session.config.getini("silkscreen_check"):
        folder = session.config.rootpath / target
        for finding in check(folder if folder.is_dir() else target, trust_code=True):
            items.append(_Item.from_parent(session, name=f"silkscreen check {target}: {finding.name}", finding=finding))


class _Item(pytest.Item):
    """A finding, as a test."""

    def __init__(self, *, finding: Finding, **rest: object) -> None:
        super().__init__(**rest)  # type: ignore[arg-type]
        self.finding = finding

    def runtest(self) -> None:
        """Fail where the finding does."""
        if not self.finding.passed:
            pytest.fail(f"{self.finding.detail}\ncure: {self.finding.cure}", pytrace=False)

    def reportinfo(self) -> tuple[str, None, str]:
        """Tell where it belongs."""
        return str(self.path), None, self.name
