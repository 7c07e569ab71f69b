"""The command line: `silkscreen COMMAND`. Each command is a file of its own and imports what is heavy when it runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import click

from silkscreen import __version__, registry
from silkscreen.errors import SilkscreenError


class _Echo(logging.Handler):
    """Shows what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


class _CommandLine(click.Group):
    """Takes its commands from plugins, and shows our own errors as a message rather than a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        logger = logging.getLogger("silkscreen")
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, _Echo) for handler in logger.handlers):
            logger.addHandler(_Echo())
        try:
            return super().invoke(ctx)
        except (SilkscreenError, FileExistsError) as error:
            raise click.ClickException(str(error)) from error


def command_line() -> click.Group:
    """Return the group of all commands, the core's and the plugins'."""

    @click.group(cls=_CommandLine)
    @click.version_option(__version__, prog_name="silkscreen")
    def group() -> None:
        """Controls for FLUX.2 as installable templates.

        \b
        See what is installed:   silkscreen list
        What a template takes:   silkscreen info brightness
        Draw a picture:          silkscreen generate "a large red circle on a blue background" \\
                                     -t brightness scale=0.8 -o circle.png
        """

    registry.plugin_manager().hook.register_commands(group=group)
    return group


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default on the program's own arguments."""
    warnings.showwarning = _show_warning
    command_line()(arguments, prog_name="silkscreen")


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        click.secho(f"warning: {message}", fg="yellow", err=True)
