"""A training's whole state in one safetensors file, so that a run can be stopped at any moment and go on to the bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class Average:
    """Exponential moving average of a model's parameters; what is exported in the end."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards the model; slower as training goes on, so that the random start is soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in model.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: torch.nn.Module) -> None:
        """Give the model the averaged values."""
        for name, value in model.named_parameters():
            value.copy_(self.values[name])


def save(path: Path, step: int, model: torch.nn.Module, average: Average, *optimizers: torch.optim.Optimizer) -> None:
    """Write the state after `step` steps; the file appears whole or not at all."""
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # tied parameters once
    tensors = {f"model.{name}": value for name, value in kept.items()}
    tensors |= {f"average.{name}": value for name, value in average.values.items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{number}.{index}.{name}": value for name, value in state.items()}
    partial = path.with_suffix(".partial")
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, partial, {"step": str(step)})
    partial.replace(path)


def load(path: Path, model: torch.nn.Module, average: Average, *optimizers: torch.optim.Optimizer) -> int:
    """Take up the state in `path` and return its step; 0 if there is none. Optimizers may be left out."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(_under("model.", tensors), strict=False)
    averaged = _under("average.", tensors)  # a file does not keep the order of the model
    average.values = {name: averaged[name] for name in average.values}
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _under(f"optimizer{number}.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
