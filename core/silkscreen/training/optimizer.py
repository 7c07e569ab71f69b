"""The optimizer that a run's settings name."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn

from silkscreen.errors import TrainingError
from silkscreen.training.config import TrainingConfig


def make_optimizer(config: TrainingConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer of parameters, fused where its class can be.

    Raises:
        TrainingError: there is no such optimizer, or it does not take the settings.
    """
    name = config.customized_optimizer
    module, _, attribute = name.rpartition(".")
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.adam_beta2 is not None:
        options["betas"] = (0.9, config.adam_beta2)
    try:
        chosen = getattr(importlib.import_module(module), attribute)
        if "fused" in inspect.signature(chosen).parameters:
            options["fused"] = True
        made: torch.optim.Optimizer = chosen(parameters, **options)
    except (ImportError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(f"--customized_optimizer {name!r} cannot be had with {options}: {error}") from error
    return made
