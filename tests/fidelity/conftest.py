from __future__ import annotations

from typing import Any

import pytest
from silkscreen import load_base


@pytest.fixture(scope="session")
def tiny() -> Any:
    """flux2-tiny, loaded once."""
    pipe = load_base("flux2-tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe
