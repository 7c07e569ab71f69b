"""The template passes what a reviewer would ask of it; `pytest --silkscreen-check` asks the same, a test a question."""

from __future__ import annotations

from pathlib import Path

from silkscreen.authoring.check import check


def test_the_template_passes_what_a_reviewer_would_ask() -> None:
    """Nothing that `silkscreen check` asks is left to cure."""
    findings = check(Path(__file__).parents[1], trust_code=True)
    assert [finding for finding in findings if not finding.passed] == []
