"""What of a template is trained: all that its constructor leaves trainable, or the parts that are named."""

from __future__ import annotations

from torch import nn

from silkscreen.errors import TrainingError

ROOT = "template_model"


def choose_trainable(model: nn.Module, parts: str) -> None:
    """Freeze a model but for the parts named, and put what is frozen into eval mode.

    Args:
        model: the template's model.
        parts: `template_model` for all that the constructor leaves trainable, or parts of it such as
            `template_model.proj_k,template_model.proj_v`, which are trained also where the constructor froze them.

    Raises:
        TrainingError: there is no such part, with the parts there are; or nothing is left to train.
    """
    names = [name.strip() for name in parts.split(",") if name.strip()]
    chosen = {name for name, value in model.named_parameters() if value.requires_grad} if ROOT in names else set()
    for name in names:
        if name == ROOT:
            continue
        path = _existing(model, name)
        chosen |= {other for other, _ in model.named_parameters() if other == path or other.startswith(f"{path}.")}
    if not chosen:
        raise TrainingError(f"--trainable_models {parts!r} leaves nothing to train")
    for name, value in model.named_parameters():
        value.requires_grad_(name in chosen)
    for module in model.modules():
        module.training = any(value.requires_grad for value in module.parameters())


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of what training changes: trainable parameters, and buffers of the modules that hold them."""
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    state = model.state_dict()
    for prefix, module in model.named_modules():
        if any(value.requires_grad for value in module.parameters(recurse=False)):
            names += [full for name in module._buffers if (full := f"{prefix}.{name}".lstrip(".")) in state]
    return names


def _existing(model: nn.Module, name: str) -> str:
    """Return a part's name in the model."""
    root, _, path = name.partition(".")
    if root != ROOT or not path:
        raise TrainingError(f"--trainable_models {name!r}: parts begin with {ROOT}, as {ROOT}.{_parts(model)[0]}")
    where, module = ROOT, model
    for step in path.split("."):
        parts = _parts(module)
        if step not in parts:
            raise TrainingError(f"--trainable_models {name!r}: {where} has no {step!r}; it has {', '.join(parts)}")
        where = f"{where}.{step}"
        inner = getattr(module, step)
        module = inner if isinstance(inner, nn.Module) else nn.Module()
    return path


def _parts(module: nn.Module) -> list[str]:
    return [
        *(name for name, _ in module.named_children()),
        *(name for name, _ in module.named_parameters(recurse=False)),
    ]
