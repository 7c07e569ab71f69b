"""A template: a module that keeps the field's contract, found by name or folder, checked, built and given its weights.

The contract is that of `model.py` files in DiffSynth-Studio: `TEMPLATE_MODEL`, `TEMPLATE_MODEL_PATH`,
`TEMPLATE_MODEL_CONFIG`, `TEMPLATE_DATA_PROCESSOR`, and `process_inputs` and `forward` on the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from silkscreen import registry, weights
from silkscreen.bases import known_bases
from silkscreen.errors import ContractError, SilkscreenError, UntrustedCodeError, WeightsError
from silkscreen.files import sha256
from silkscreen.manifest import CONTROLS, Input, Manifest, read_manifest
from silkscreen.weights import TensorFile

_logger = logging.getLogger(__name__)
_NOT_INPUTS = ("self", "pipe")
_DISTRIBUTIONS = {"cv2": "opencv-python", "skimage": "scikit-image", "sklearn": "scikit-learn"}
"""Packages that are installed by another name than they are imported by."""


@dataclasses.dataclass(frozen=True)
class Template:
    """A template that can be loaded for a base.

    Attributes:
        name: what template inputs call it by, as `model_id`.
        module: its module, imported.
        folder: the folder its weight paths are relative to.
        origin: the distribution and version, or the folder, for messages.
        manifest: its `template.toml`; None when it has none.
    """

    name: str
    module: ModuleType
    folder: Path
    origin: str
    manifest: Manifest | None

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Its inputs by name: the manifest's, or else what `process_inputs` takes."""
        if self.manifest is not None and self.manifest.inputs is not None:
            return self.manifest.inputs
        return inputs_from_signature(self.module.TEMPLATE_MODEL)

    @property
    def data_processor(self) -> type | None:
        """The class whose instances turn a dataset row's `template_inputs` into arguments of `process_inputs`."""
        return getattr(self.module, "TEMPLATE_DATA_PROCESSOR", None)

    @property
    def bases(self) -> tuple[str, ...]:
        """The bases it is for: those its weights are keyed by, or else the manifest's; empty when it does not say."""
        if _is_by_base(self._paths, self._paths):
            return tuple(self._paths)
        return self.manifest.bases if self.manifest else ()

    def config(self, base_id: str) -> dict[str, Any]:
        """Return the constructor arguments for a base."""
        config = getattr(self.module, "TEMPLATE_MODEL_CONFIG", None) or {}
        return dict((config.get(base_id) or {}) if _is_by_base(config, self._paths) else config)

    def has_weights(self, base_id: str) -> bool:
        """Whether there are weights for a base: the paths for it are sources, or files that exist."""
        try:
            paths = self.weight_paths(base_id)
        except WeightsError:
            return False
        return bool(paths) and all(weights.is_source(path) or (self.folder / path).is_file() for path in paths)

    def weight_paths(self, base_id: str) -> list[str]:
        """Return the weight paths for a base, each relative to `folder` or a source; none for a model without weights.

        Raises:
            WeightsError: it has weights, but for other bases.
        """
        paths = self._paths
        if _is_by_base(paths, paths):
            if base_id not in paths:
                raise WeightsError(f"it has no weights for the base {base_id!r}: it has some for {', '.join(paths)}")
            paths = paths[base_id]
        return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths or ())]

    def construct(self, base_id: str) -> nn.Module:
        """Return a new model for a base, without weights."""
        with missing_packages_named(self.name, self.origin):
            model: nn.Module = self.module.TEMPLATE_MODEL(**self.config(base_id))
        return model

    def load(
        self, base_id: str, *, dtype: torch.dtype, device: torch.device | str = "cpu", streamed: bool = False
    ) -> nn.Module:
        """Return a new model for a base with its weights, in eval mode and frozen.

        Args:
            base_id: the base.
            dtype: that it computes in.
            device: where it computes.
            streamed: leave the weights in their files, each module's being read when it runs: see `weights.stream`.

        Raises:
            ContractError: with everything about the module and its weights that breaks the contract.
        """
        files, problems = self._files(base_id)
        device = torch.device(device)
        if files and not problems:
            model = weights.build_empty(lambda: self.construct(base_id))
            problems = weights.differences(model, files)
        if problems:
            raise ContractError(self.name, [f"{self.origin}: {problem}" for problem in problems])
        if files and streamed:
            model = weights.stream(model, files, dtype=dtype, device=device)
        elif files:
            model = weights.load(model, lambda: self.construct(base_id), files, dtype=dtype, device=device)
        else:
            model = self.construct(base_id).to(device, dtype)
        return model.eval().requires_grad_(False)

    def weight_files(self, base_id: str) -> list[Path]:
        """Return the local files of its weights for a base.

        Raises:
            ContractError: it has none for the base, or they cannot be had.
        """
        files, problems = self._files(base_id)
        if problems:
            raise ContractError(self.name, [f"{self.origin}: {problem}" for problem in problems])
        return [file.path for file in files]

    @property
    def _paths(self) -> Any:
        return getattr(self.module, "TEMPLATE_MODEL_PATH", None)

    def _files(self, base_id: str) -> tuple[list[TensorFile], list[str]]:
        """Return the weight files for a base, and what is wrong with them."""
        try:
            references = self.weight_paths(base_id)
        except WeightsError as error:
            return [], [str(error)]
        files, problems = [], []
        for reference in references:
            try:
                files.append(weights.inspect(weights.locate(reference, self.folder)))
            except WeightsError as error:
                problems.append(str(error))
        return files, problems


def find_template(name: str | Path | Template, *, trust_code: bool = False) -> Template:
    """Return the template of an installed name, or of a folder or repository with a `model.py`.

    Args:
        name: a name that `silkscreen list` shows, `distribution:name`, a path to a folder, or a source such as
            `modelscope:owner/repo@revision`, which is fetched; its template is called as the repository is.
        trust_code: allow a folder's or repository's `model.py` to be executed.

    Raises:
        UnknownNameError, UnavailableError: no such template can be used.
        WeightsError: the source cannot be had.
        UntrustedCodeError: it is a folder or source, and `trust_code` is not given.
        ContractError: the module cannot be imported or breaks the contract.
    """
    if isinstance(name, Template):
        return name
    folder = name if isinstance(name, Path) else registry.template_folder(name)
    if folder is None:
        template = _from_entry(registry.find(registry.TEMPLATES, str(name)), str(name))
    else:
        template = _from_folder(folder, trust_code)
        if isinstance(name, str) and registry.is_source(name):
            template = dataclasses.replace(template, name=_name_in(name), origin=name)
    return _checked(template)


def import_template(entry: registry.Entry) -> Template:
    """Import the module of an entry, found or made up, and return the template it is.

    Raises:
        ContractError: the module cannot be imported or breaks the contract.
    """
    return _checked(_from_entry(entry, entry.name))


@contextmanager
def missing_packages_named(template: str, origin: str) -> Iterator[None]:
    """Say how to install a package that a template's code imports and that is not installed.

    Raises:
        ContractError: there is such a package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or find_spec(package) is not None:  # it is there, but lacks a module
            raise
        distribution = _DISTRIBUTIONS.get(package, package)
        problem = (
            f"{origin}: it imports {error.name}, which is not installed: pip install {distribution}, or, if that is "
            "the template's own code, add it to the template"
        )
        raise ContractError(template, [problem]) from error


def require_trust(folder: Path, module: Path, trust_code: bool) -> None:
    """Refuse to go on unless the code of a template folder is trusted; the file and its SHA-256 are shown or logged.

    Raises:
        UntrustedCodeError: `trust_code` is not given; the message has the file's sha256.
    """
    digest = sha256(module)
    if not trust_code:
        raise UntrustedCodeError(
            f"using {folder} as a template executes the code in {module} (sha256 {digest}). "
            "If you have read it and trust it, pass trust_code=True, or --trust-code on the command line"
        )
    _tell(module, digest)


@cache
def _tell(module: Path, digest: str) -> None:
    """Log, once, that code is run."""
    _logger.info("running %s (sha256 %s)", module, digest)


def _checked(template: Template) -> Template:
    problems = contract_violations(template.module, template.manifest)
    if problems:
        raise ContractError(template.name, [f"{template.origin}: {problem}" for problem in problems])
    manager = registry.plugin_manager()
    if not manager.is_registered(template.module):
        manager.register(template.module)
    return template


def contract_violations(module: ModuleType, manifest: Manifest | None = None) -> list[str]:
    """Return everything in a template module that breaks the contract, one sentence each."""
    where = module.__file__ or module.__name__
    model = getattr(module, "TEMPLATE_MODEL", None)
    if not (isinstance(model, type) and issubclass(model, nn.Module)):
        return [f"{where}: TEMPLATE_MODEL has to be a class derived from torch.nn.Module, it is {model!r}"]
    problems = []
    for method in ("process_inputs", "forward"):
        function = getattr(model, method, None)
        if function is None or function is nn.Module.forward:
            problems.append(f"{where}: {model.__name__} has no {method} method")
            continue
        parameters = inspect.signature(function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            problems.append(f"{where}: {model.__name__}.{method} has to take **kwargs")
        if "model_id" in parameters:
            problems.append(f"{where}: {model.__name__}.{method} may not have a parameter model_id, it is the caller's")
    taken = inputs_from_signature(model) if hasattr(model, "process_inputs") else {}
    if manifest is None or manifest.inputs is None:
        problems += [
            f"{where}: process_inputs may not have a parameter {name}, which means the same for every template: rename "
            "it, or list the inputs in a template.toml"
            for name in taken
            if name in CONTROLS
        ]
    elif hasattr(model, "process_inputs"):
        problems += [
            f"{where}: the manifest's input {name!r} is no parameter of process_inputs"
            for name in manifest.inputs
            if name not in taken
        ]
        problems += [
            f"{where}: process_inputs needs {name!r}, which the manifest does not list"
            for name, spec in taken.items()
            if spec.required and name not in manifest.inputs
        ]
    paths, config = getattr(module, "TEMPLATE_MODEL_PATH", None), getattr(module, "TEMPLATE_MODEL_CONFIG", None)
    for value in paths.values() if isinstance(paths, Mapping) else [paths]:
        listed = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(path, str | Path | None) for path in listed):
            problems.append(f"{where}: TEMPLATE_MODEL_PATH has to be a path, a list of paths, None or a dict of these")
    if config is not None and not isinstance(config, Mapping):
        problems.append(
            f"{where}: TEMPLATE_MODEL_CONFIG has to be a dict of constructor arguments, or one for each base"
        )
    processor = getattr(module, "TEMPLATE_DATA_PROCESSOR", None)
    if processor is not None and not (isinstance(processor, type) and callable(getattr(processor, "__call__", None))):  # noqa: B004
        problems.append(f"{where}: TEMPLATE_DATA_PROCESSOR has to be a class whose instances can be called")
    return problems


def inputs_from_signature(model: type) -> dict[str, Input]:
    """Return the inputs that a model's `process_inputs` takes, of type `any`."""
    inputs = {}
    for name, parameter in inspect.signature(model.process_inputs).parameters.items():  # type: ignore[attr-defined]
        if name in _NOT_INPUTS or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        given = {} if parameter.default is parameter.empty else {"default": parameter.default}
        inputs[name] = Input(name, "any", **given)
    return inputs


def _is_by_base(value: Any, paths: Any) -> bool:
    """Tell a dict keyed by base id from one of constructor arguments."""
    if not isinstance(value, Mapping) or not value:
        return False
    return value is paths or all(key in known_bases() or (isinstance(paths, Mapping) and key in paths) for key in value)


def _from_entry(entry: registry.Entry, name: str) -> Template:
    origin = f"{entry.distribution} {entry.version}"
    try:
        with missing_packages_named(name, origin):
            module = importlib.import_module(entry.module)
    except ContractError:
        raise
    except Exception as error:  # whatever a stranger's module raises
        problem = f"{origin}: importing {entry.module} raised {type(error).__name__}: {error}"
        raise ContractError(name, [problem]) from error
    folder = entry.folder or Path(module.__file__ or ".").parent
    return Template(name, module, folder, origin, entry.manifest)


def _name_in(source: str) -> str:
    """Return the last part of the path in a source, or of the repository where it has no path."""
    repo, _, path = source.partition(":")[2].partition(":")
    return (path.rstrip("/") or repo.partition("@")[0]).rpartition("/")[2]


def _from_folder(folder: Path, trust_code: bool) -> Template:
    path = folder / "model.py"
    if not path.is_file():
        raise ContractError(
            str(folder), [f"there is no {path}: name an installed template, or a folder with a model.py"]
        )
    require_trust(folder, path, trust_code)
    digest = sha256(path)
    name = f"silkscreen_folder_{digest[:16]}_{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            with missing_packages_named(str(folder), str(path)):
                spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            if isinstance(error, ContractError):
                raise
            raise ContractError(str(folder), [f"{path} raised {type(error).__name__}: {error}"]) from error
    manifest_path = folder / "template.toml"
    try:
        manifest = read_manifest(manifest_path) if manifest_path.is_file() else None
    except SilkscreenError as error:
        raise ContractError(str(folder), [str(error)]) from error
    return Template(folder.resolve().name, module, folder, str(folder), manifest)
