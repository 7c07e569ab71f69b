"""Silkscreen: controls for FLUX.2 as installable templates."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "silkscreen.recipe",
    "Template": "silkscreen.template",
    "TemplateCache": "silkscreen.cache",
    "TemplatePipeline": "silkscreen.pipeline",
    "find_template": "silkscreen.template",
    "hookimpl": "silkscreen.hooks",
    "load_base": "silkscreen.flux2.loading",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from silkscreen.cache import TemplateCache as TemplateCache
    from silkscreen.flux2.loading import load_base as load_base
    from silkscreen.hooks import hookimpl as hookimpl
    from silkscreen.pipeline import TemplatePipeline as TemplatePipeline
    from silkscreen.recipe import Recipe as Recipe
    from silkscreen.template import Template as Template
    from silkscreen.template import find_template as find_template


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that importing the package costs next to nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
