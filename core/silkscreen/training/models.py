"""Which models a training run drives: a base by its id, or the field's flags that name each model."""

from __future__ import annotations

import json
from pathlib import Path

from silkscreen import hub
from silkscreen.bases import Base
from silkscreen.errors import TrainingError
from silkscreen.flux2.loading import describe_base, describe_transformer
from silkscreen.training.config import TrainingConfig

_COMPONENTS = {
    "Flux2Transformer2DModel": "transformer",
    "AutoencoderKLFlux2": "vae",
    "Qwen3ForCausalLM": "text_encoder",
    "Mistral3ForConditionalGeneration": "text_encoder",
}
"""Classes in the `config.json` of a model's folder, and what they are in a pipeline."""


def training_base(config: TrainingConfig) -> Base:
    """Return the base that a run trains on.

    Raises:
        TrainingError: the flags name no whole base; what is missing is named.
        UnknownNameError, BaseError, WeightsError: a base, a folder or a file of a hub cannot be found.
    """
    if config.model_paths is None and config.model_id_with_origin_paths is None:
        return describe_base(config.base or "flux2-tiny")
    if config.base is not None:
        raise TrainingError("--base names all models: leave out --model_paths and --model_id_with_origin_paths")
    folders = {}
    for folder in _folders(config):
        folders[_component(folder)] = folder
    needed = ["transformer"] if config.task == "sft:train" else ["transformer", "vae", "text_encoder"]
    missing = [name for name in needed if name not in folders]
    if missing:
        raise TrainingError(
            f"the {' and the '.join(missing)} of the base is not named: add it to --model_id_with_origin_paths"
        )
    beside = [folder.parent for folder in folders.values()]
    if config.tokenizer_path is not None:
        folders["tokenizer"] = _locate(config.tokenizer_path)
    for name in ("tokenizer", "scheduler"):
        found = [parent / name for parent in beside if (parent / name).is_dir()]
        if found:
            folders.setdefault(name, found[0])
    if "text_encoder" in folders and "tokenizer" not in folders:
        raise TrainingError("the tokenizer is not named: add --tokenizer_path")
    base = describe_transformer(folders["transformer"])
    return Base(**{**vars(base), "components": folders})


def read_components(text: str | None) -> dict[str, str]:
    """Return where each component that `--components` names comes from.

    Raises:
        TrainingError: it is no list of `NAME=REF`.
    """
    pairs = [part.strip().partition("=") for part in text.split(",")] if text else []
    if any(not (name and reference) for name, _, reference in pairs):
        raise TrainingError(f"--components {text!r}: write NAME=FOLDER, NAME=SOURCE or transformer=FILE, by commas")
    return {name: reference for name, _, reference in pairs}


def _folders(config: TrainingConfig) -> list[Path]:
    """Return the folders of the models that the flags name."""
    folders: list[Path] = []
    if config.model_paths is not None:
        try:
            listed = json.loads(config.model_paths)
        except ValueError as error:
            raise TrainingError(f"--model_paths is no JSON list of paths: {error}") from error
        for paths in listed:
            path = Path(paths[0] if isinstance(paths, list) else paths)  # shards lie together
            folders.append(path if path.is_dir() else path.parent)
    if config.model_id_with_origin_paths is not None:
        folders += [_locate(part.strip()) for part in config.model_id_with_origin_paths.split(",")]
    return folders


def _locate(reference: str) -> Path:
    """Return the folder of `ID:PATTERN`, where a local folder wins over a hub's id, or of a plain path."""
    if Path(reference).is_dir():
        return Path(reference)
    owner, separator, pattern = reference.rpartition(":")
    if not separator:
        raise TrainingError(f"{reference!r} is no folder, and names nothing on a hub: write ID:PATTERN")
    inside = pattern.rstrip("/") if pattern.endswith("/") else str(Path(pattern).parent)
    if not Path(owner).is_dir():
        return hub.from_modelscope(f"{owner}:{inside}/")
    folder = Path(owner) / inside
    if not folder.is_dir():
        raise TrainingError(f"{reference!r}: there is no folder {folder}")
    return folder


def _component(folder: Path) -> str:
    """Tell what a model's folder holds by its `config.json`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}): a model is a folder in diffusers' layout, weights and config.json"
        ) from error
    names = [config.get("_class_name"), *config.get("architectures", [])]
    for name in names:
        if name in _COMPONENTS:
            return _COMPONENTS[name]
    raise TrainingError(f"{path}: no part of FLUX.2 is a {names[0] or names[-1]}: it needs {', '.join(_COMPONENTS)}")
