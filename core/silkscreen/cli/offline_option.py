"""The option `--offline`, shared by the commands that can download."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import click

from silkscreen.hub import OFFLINE


@contextmanager
def _offline() -> Iterator[None]:
    before = os.environ.get(OFFLINE)
    os.environ[OFFLINE] = "1"  # programs that are started see it too
    try:
        yield
    finally:
        if before is None:
            del os.environ[OFFLINE]
        else:
            os.environ[OFFLINE] = before


def _stay_offline(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        context.with_resource(_offline())


offline_option = click.option(
    "--offline",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_stay_offline,
    help=f"Use what is on this disk, and ask no hub; as {OFFLINE}=1.",
)
