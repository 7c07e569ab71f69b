"""The hooks by which the core and its plugins provide templates, bases, carriers, weight sources and commands.

A plugin is a module with functions marked `@hookimpl`, named by an entry point of the group `silkscreen`. It is
imported by every command, so it should be light: import what is heavy inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from silkscreen.carriers import Carrier

PROJECT = "silkscreen"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HookSpecifications:
    """What a plugin may implement; every hook is optional."""

    @hookspec
    def register_bases(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Return base ids and, for each, the package that holds its `base.toml`."""

    @hookspec
    def register_carriers(self) -> Sequence[Carrier]:  # type: ignore[empty-body]
        """Return carriers: kinds of content that a template cache may hold."""

    @hookspec
    def register_weight_sources(self) -> Mapping[str, Callable[[str], Path]]:  # type: ignore[empty-body]
        """Return prefixes of sources and, for each, what turns the rest of a source into a local file or folder.

        `{"hf": download}` makes the weight path `hf:owner/repo:file.safetensors` call
        `download("owner/repo:file.safetensors")`, and the template or base `hf:owner/repo` `download("owner/repo")`.
        """

    @hookspec
    def register_commands(self, group: click.Group) -> None:
        """Add commands to the command line's group."""

    @hookspec
    def before_generate(self, pipe: Any, arguments: dict[str, Any]) -> None:
        """Look at, or change in place, the arguments of a pipeline's call that is about to be made."""

    @hookspec
    def after_generate(self, pipe: Any, arguments: Mapping[str, Any], result: Any) -> None:
        """Look at the result of a pipeline's call."""


def new_manager() -> pluggy.PluginManager:
    """Return a plugin manager that knows the hooks and has no plugins yet."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecifications)
    return manager
