"""Methods of a pipeline or a transformer that are replaced for the time of a call, and where that is harmless."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def method_replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Let an object have another method of a name, and what it had before back in the end."""
    own = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def is_plain(model: torch.nn.Module) -> bool:
    """Whether nothing is compiled in a model, which would be made anew, and no hook of diffusers keeps anything."""
    return not any(is_compiled(module) or _has_hooks(module) for module in model.modules())


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module itself is compiled."""
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def _has_hooks(module: torch.nn.Module) -> bool:
    registry = vars(module).get("_diffusers_hook")  # may be empty
    return registry is not None and bool(registry.hooks)
