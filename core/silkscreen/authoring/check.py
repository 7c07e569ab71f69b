"""Checking: everything that a reviewer of a template would ask, as a list of findings with cures."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from safetensors import safe_open
from torch import nn

from silkscreen import weights
from silkscreen.authoring.inputs import PROMPTS, inputs_of, plain_values
from silkscreen.authoring.process import run
from silkscreen.authoring.proof import obstacle_to
from silkscreen.authoring.target import Target, find_target
from silkscreen.cache import TemplateCache, inject, stack
from silkscreen.carriers import carriers
from silkscreen.content import content, nbytes
from silkscreen.errors import (
    CacheError,
    ContractError,
    ManifestError,
    PackError,
    SilkscreenError,
    TrainingError,
)
from silkscreen.flux2.context import TemplateContext
from silkscreen.flux2.loading import load_base
from silkscreen.manifest import MISSING, Input, example_command
from silkscreen.pipeline import TemplatePipeline
from silkscreen.template import Template, inputs_from_signature
from silkscreen.training.data import seed_all
from silkscreen.training.encoding import stacked

TINY = "flux2-tiny"
UNTRAINED = "untrained"
"""Key in the metadata of weights that were made and not learned; see `silkscreen.authoring.new`."""

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""What ends the names of files that can run any code when they are read."""

_LARGEST_SIDE = 256
_TOLERANCE = 0.02
"""What two pictures, 0 to 1, may differ by when only how they were computed does."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One question that was asked, and its answer.

    Attributes:
        name: the question, in a word.
        passed: whether the answer is as it has to be.
        detail: what was found.
        cure: what to do; empty where it passed.
    """

    name: str
    passed: bool
    detail: str
    cure: str


class _FaultError(Exception):
    """What is wrong, and its cure."""

    def __init__(self, detail: str, cure: str) -> None:
        super().__init__(detail)
        self.cure = cure


def check(
    target: str | Path,
    *,
    base: str | None = None,
    trust_code: bool = False,
    progress: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Ask everything that a reviewer would ask of a template.

    A question that needs what an earlier one found missing is not asked: without weights, nothing is drawn.

    Args:
        target: an installed template, a project folder, a folder with a `model.py`, or a source.
        base: id or folder of the base to draw with; by default flux2-tiny, or one it is for that is on this disk.
        trust_code: let the code in a folder run.
        progress: is told each finding as soon as it is made.

    Raises:
        UnknownNameError, UnavailableError, ProjectError: there is no such template.
        UntrustedCodeError: it is a folder, and `trust_code` is not given.
    """
    findings: list[Finding] = []

    def ask(name: str, answer: Callable[[], str]) -> bool:
        findings.append(_find(name, answer))
        progress(findings[-1])
        return findings[-1].passed

    found = find_target(target, trust_code)
    ask("import", lambda: _imports_quietly(found))
    try:
        template = found.load()
    except (ContractError, ManifestError) as error:
        broken = [str(error)] if isinstance(error, ManifestError) else error.violations
        of_manifest = [problem for problem in broken if "manifest" in problem or "template.toml" in problem]
        of_code = [problem for problem in broken if problem not in of_manifest]
        ask("contract", lambda: _none_of(of_code, "it is a module of the field's format", "change the code as it says"))
        ask("manifest", lambda: _none_of(of_manifest, "", "change template.toml, or the code, so that they agree"))
        return findings
    ask("contract", lambda: f"{template.module.TEMPLATE_MODEL.__name__} is a template of the field's format")
    whole = ask("weights", lambda: _whole_weights(template))
    trial: list[_Trial] = []
    based = whole and ask("base", lambda: _load(trial, template, base))
    if not based or not ask("cache", lambda: trial[0].cache_sizes()):
        ask("manifest", lambda: _manifest_agrees(template, None))
        return findings
    ask("manifest", lambda: _manifest_agrees(template, trial[0].cache))
    ask("deterministic", trial[0].is_deterministic)
    ask("batch", trial[0].is_safe_in_batches)
    ask("sizes", trial[0].draws_two_sizes)
    ask("gradient", trial[0].gradient_arrives)
    ask("example", lambda: _example_runs(found, template, base or trial[0].base_id))
    return findings


def _find(name: str, answer: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, answer(), "")
    except _FaultError as fault:
        return Finding(name, False, str(fault), fault.cure)
    except SilkscreenError as error:
        return Finding(name, False, str(error), "do as it says")
    except Exception as error:  # whatever a template raises
        where = f"{type(error).__name__}: {error}"
        return Finding(name, False, where, "see that process_inputs and forward take such inputs")


def _none_of(problems: Sequence[str], good: str, cure: str) -> str:
    if problems:
        raise _FaultError("; ".join(problems), cure)
    return good


# -- before anything is computed

_IMPORT = """
import importlib, importlib.util, json, sys
import accelerate, diffusers, numpy, PIL.Image, safetensors.torch, torch, transformers
import silkscreen.architectures.dit, silkscreen.architectures.value, silkscreen.template

module, folder, report = sys.argv[1:]
seen = []
EVENTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile")

def watch(event, arguments):
    if not event.startswith(EVENTS) or not watching:
        return
    frame = own = sys._getframe(1)
    while own is not None and not own.f_code.co_filename.startswith(folder):
        own = own.f_back
    place = own or frame
    seen.append(f"{event} by line {place.f_lineno} of {place.f_code.co_filename}")
    raise PermissionError(f"{event} while a template is imported")

watching = True
sys.addaudithook(watch)
try:
    if module:
        importlib.import_module(module)
    else:
        spec = importlib.util.spec_from_file_location("template", f"{folder}/model.py")
        sys.modules["template"] = made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
except BaseException:
    pass  # whether it can be imported is asked elsewhere
finally:
    watching = False
    with open(report, "w") as file:
        json.dump(seen, file)
"""
"""Imports a template and writes down what it did that reaches out of the process; each such thing fails there."""


def _imports_quietly(target: Target) -> str:
    with tempfile.TemporaryDirectory(prefix="silkscreen-check-") as name:
        report = Path(name) / "report.json"
        words: list[str | Path] = [sys.executable, "-c", _IMPORT, target.module, str(target.folder.resolve()), report]
        run(words, "the template's import ends the interpreter", variables=target.variables(Path(name)))
        seen = json.loads(report.read_text(encoding="utf-8"))
    cure = "do it in process_inputs, where it is called for, or ship the file with the package"
    return _none_of(seen, "importing it opens no connection and starts no program", cure)


def _whole_weights(template: Template) -> str:
    pickles = sorted(path.name for path in template.folder.rglob("*") if path.suffix in PICKLES)
    if pickles:
        raise _FaultError(
            f"{', '.join(pickles)} in {template.folder}", "save weights by safetensors, and remove pickles"
        )
    told, problems = [], []
    for base_id in template.bases or (TINY,):
        references = template.weight_paths(base_id)
        if not references:
            told.append(f"{base_id}: none, as its constructor makes it")
            continue
        if any(weights.is_source(reference) for reference in references):
            told.append(f"{base_id}: {', '.join(references)}, not fetched")
            continue
        try:
            files = [weights.inspect(weights.locate(reference, template.folder)) for reference in references]
        except SilkscreenError as error:
            problems.append(f"{base_id}: {error}")
            continue

        def construct(base_id: str = base_id) -> nn.Module:
            return template.construct(base_id)

        problems += [f"{base_id}: {each}" for each in weights.differences(weights.build_empty(construct), files)]
        untrained = ", untrained" * any(_is_untrained(file.path) for file in files)
        told.append(f"{base_id}: {sum(len(file.shapes) for file in files)} tensors{untrained}")
    return _none_of(problems, "; ".join(told), "train it, and let `silkscreen pack` write the weights")


def _is_untrained(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        return UNTRAINED in (file.metadata() or {})


def _manifest_agrees(template: Template, cache: TemplateCache | None) -> str:
    manifest = template.manifest
    if manifest is None or manifest.inputs is None:
        what = "there is no template.toml" if manifest is None else "template.toml lists no inputs"
        raise _FaultError(what, f"write {template.folder / 'template.toml'}; `silkscreen wrap` makes one of a folder")
    problems = [f"it has no {key}" for key in ("title", "summary") if not getattr(manifest, key)]
    taken = inputs_from_signature(template.module.TEMPLATE_MODEL)
    for name, spec in manifest.inputs.items():
        default = taken[name].default
        if MISSING not in (default, spec.default) and default is not None and default != spec.default:
            problems.append(f"the default of {name} is {spec.default!r}, and {default!r} in process_inputs")
    if set(manifest.bases) != set(template.bases):
        problems.append(f"its bases are {list(manifest.bases)}, and TEMPLATE_MODEL_PATH has {list(template.bases)}")
    if cache is not None and set(manifest.carriers) != set(cache.fields):
        problems.append(f"its carriers are {list(manifest.carriers)}, and forward returned {list(cache.fields)}")
    told = f"{len(manifest.inputs)} inputs, {', '.join(manifest.carriers) or 'pipeline arguments only'}"
    return _none_of(problems, told, f"change {template.folder / 'template.toml'}, or the code, so that they agree")


# -- with a base


def _load(trial: list[_Trial], template: Template, base: str | None) -> str:
    if base is None:
        wanted = sorted(template.bases or (TINY,), key=lambda base_id: base_id != TINY)
        obstacles = {base_id: obstacle_to(base_id) for base_id in wanted}
        here = [base_id for base_id in wanted if not obstacles[base_id]]
        if not here:
            missing = "; ".join(obstacles.values())
            raise _FaultError(
                f"it is for no base on this disk: {missing}", "add weights for flux2-tiny, or name a base with --base"
            )
        base = here[0]
    pipe = load_base(base)
    pipe.set_progress_bar_config(disable=True)
    trial.append(_Trial(template, pipe))
    return f"drawn with {trial[0].base_id}"


class _Trial:
    """A template, tried on a base."""

    def __init__(self, template: Template, pipe: Any) -> None:
        self.template, self.pipe = template, pipe
        pipe.transformer.requires_grad_(False)
        self.context = TemplateContext(pipe)
        self.base_id = self.context.base.id
        self.inputs = inputs_of(template)
        side = min(self.context.base.call.get("height", _LARGEST_SIDE), _LARGEST_SIDE)
        self.size = (side, side)
        self.loaded = TemplatePipeline([template], cache_bytes=0)
        self.cache: TemplateCache

    def cache_sizes(self) -> str:
        """Compose its cache, and tell the size of each part of it."""
        self._settle_inputs()
        self.cache = self.loaded.compose(self.pipe, [self._values(0)])
        known = carriers()
        told = [
            f"{name}: {known[name].describe(value)}, {nbytes(value):,} bytes"
            for name, value in self.cache.fields.items()
        ]
        told += [f"pipeline argument {name}" for name in self.cache.arguments]
        if not told:
            raise _FaultError("forward returned an empty dict", 'return {"kv_cache": ...} or another carrier')
        return "; ".join(told)

    def is_deterministic(self) -> str:
        """Load the template and compose its cache twice, with other random numbers at hand."""
        several = []
        for seed in (0, 1):
            seed_all(seed)
            cache = TemplatePipeline([self.template]).compose(self.pipe, [self._values(0)])
            several.append([content(dict(cache.fields)), content(dict(cache.arguments))])
        if several[0] != several[1]:
            raise _FaultError(
                "loaded twice and given the same inputs, it returned other caches",
                "draw from a torch.Generator with a seed, and keep what the constructor draws in the weight file",
            )
        return "loaded twice and given the same inputs, it returns the same to the bit"

    def is_safe_in_batches(self) -> str:
        """Compare two pictures of a call with the same two one by one, and `forward` of two rows with two of one."""
        values = [self._values(variant) for variant in range(2)]
        if self.cache.arguments:
            values[1] = values[0]  # a call takes its arguments once
        both = self._draw(PROMPTS, [0, 1], values if not self.cache.arguments else values[:1], self.size)
        alone = [self._draw(PROMPTS[n : n + 1], [n], [values[n]], self.size)[0] for n in range(2)]
        worst = float(np.abs(both - np.stack(alone)).max())
        if not worst < _TOLERANCE:
            raise _FaultError(
                f"two pictures drawn in one call differ by up to {worst:.3f} from the same drawn one by one",
                "let process_inputs and forward depend on their arguments alone, and keep nothing between calls",
            )
        told = f"two pictures of a call are the same as one by one, within {worst:.0e}"
        if self.cache.arguments:
            return told
        return f"{told}; {self._trains_in_batches(values)}"

    @torch.no_grad()
    def _trains_in_batches(self, values: Sequence[Mapping[str, Any]]) -> str:
        model = self.template.load(self.base_id, dtype=self.context.torch_dtype, device=self.context.device)
        rows = [model.process_inputs(pipe=self.context, **each) for each in values]  # type: ignore[operator]
        singles = [self._fields(model, row) for row in rows]
        cure = "return tensors with a first dimension of 1 from process_inputs, and take any first dimension in forward"
        try:
            batched = self._fields(model, stacked(rows))
            expected = stack(singles)
            known = carriers()
            pairs = [
                (known[name].flatten(value)[key], tensor)
                for name, value in batched.fields.items()
                for key, tensor in known[name].flatten(expected.fields[name]).items()
            ]
            worst = max(float((one - other).abs().max()) for one, other in pairs)
        except (TrainingError, CacheError, RuntimeError, KeyError) as error:
            raise _FaultError(f"two rows of a training do not go through forward as a batch: {error}", cure) from error
        if not worst < _TOLERANCE:
            raise _FaultError(f"forward of a batch of two differs by up to {worst:.3f} from that of each", cure)
        return "a training's rows can be batched"

    def draws_two_sizes(self) -> str:
        """Draw at two sizes, with input pictures of these sizes."""
        sizes = [self.size, (self.size[0] + 64, self.size[1])]
        for width, height in sizes:
            drawn = self._draw(PROMPTS[:1], [0], [self._values(0, (width, height))], (width, height))
            if drawn.shape != (1, height, width, 3) or not np.isfinite(drawn).all():
                raise _FaultError(
                    f"at {width}x{height} the picture is not finite", "look for what overflows in forward"
                )
        return "draws at " + " and ".join(f"{width}x{height}" for width, height in sizes)

    def gradient_arrives(self) -> str:
        """See which trainable tensors a loss on the base's prediction reaches."""
        if self.cache.arguments:
            return f"it returns the pipeline arguments {', '.join(self.cache.arguments)}, and cannot be trained"
        model = self.template.load(self.base_id, dtype=self.context.torch_dtype, device=self.context.device)
        empty = weights.build_empty(lambda: self.template.construct(self.base_id))
        trainable = {name: model.get_parameter(name) for name, value in empty.named_parameters() if value.requires_grad}
        if not trainable:
            return "nothing in it is trainable"
        generator = torch.Generator().manual_seed(0)
        for parameter in trainable.values():  # values of zero, as many start from, would hide that they are used
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
            parameter.requires_grad_(True)
        processed = model.process_inputs(pipe=self.context, **self._values(0))  # type: ignore[operator]
        with torch.enable_grad(), inject(self.pipe, self._fields(model, processed), TemplateCache({}, {}, "")):
            self._predict(generator).float().square().mean().backward()  # type: ignore[no-untyped-call]
        gradients = {name: parameter.grad for name, parameter in trainable.items()}
        missed = [name for name, value in gradients.items() if value is None or not value.any()]
        if missed:
            raise _FaultError(
                f"no gradient reaches {_listed(missed)}",
                "let forward use them, without detach and outside of no_grad, or freeze them in the constructor by "
                "requires_grad_(False)",
            )
        broken = [name for name, value in gradients.items() if value is not None and not value.isfinite().all()]
        if broken:
            raise _FaultError(f"the gradient of {_listed(broken)} is not finite", "look for what overflows in forward")
        return f"it reaches all {len(trainable)} trainable tensors"

    def _predict(self, generator: torch.Generator) -> torch.Tensor:
        """Return what the transformer predicts for noise."""
        geometry, device = self.context.base.geometry, self.context.device
        noise = torch.randn(1, geometry.in_channels, *(side // 16 for side in self.size), generator=generator)
        noise = noise.to(device, self.context.torch_dtype)
        embeds, ids = self.context.encode_prompt(PROMPTS[0])
        velocity: torch.Tensor = self.pipe.transformer(
            hidden_states=Flux2KleinPipeline._pack_latents(noise),
            encoder_hidden_states=embeds,
            timestep=torch.tensor([0.5], device=device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(noise).to(device),
            txt_ids=ids,
            guidance=torch.ones(1, device=device) if geometry.guidance_embeds else None,
            return_dict=False,
        )[0]
        return velocity

    def _fields(self, model: nn.Module, processed: Mapping[str, Any]) -> TemplateCache:
        return TemplateCache.from_result(model(pipe=self.context, **processed), self.template.name)

    def _values(self, variant: int, size: tuple[int, int] | None = None) -> dict[str, Any]:
        return plain_values(self.inputs, size or self.size, variant)

    def _settle_inputs(self) -> None:
        """Give inputs of a type that nothing tells the first type whose values the template takes."""
        untold = [name for name, spec in self.inputs.items() if spec.type == "any" and spec.required]
        for kind in ("number", "image", "text") if untold else ():
            tried = {**self.inputs, **{name: Input(name, kind) for name in untold}}
            try:
                self.loaded.compose(self.pipe, [plain_values(tried, self.size, 0)])
            except Exception:  # whatever a template raises on what it does not take
                continue
            self.inputs = tried
            return
        if untold:
            raise _FaultError(
                f"its inputs {', '.join(untold)} are of a type that nothing tells", "list them in a template.toml"
            )

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        values: Sequence[Mapping[str, Any]],
        size: tuple[int, int],
    ) -> np.ndarray[Any, Any]:
        inputs = [[value] for value in values]
        result = self.loaded(
            self.pipe,
            prompt=list(prompts),
            template_inputs=inputs if len(inputs) > 1 else inputs[0],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=2,
            width=size[0],
            height=size[1],
            output_type="np",
        )
        return np.asarray(result.images)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# -- as a user has it


def _example_runs(target: Target, template: Template, base: str) -> str:
    inputs = inputs_of(template)
    command = example_command(target.name, inputs)
    with tempfile.TemporaryDirectory(prefix="silkscreen-check-") as name:
        folder = Path(name)
        for key, value in plain_values(inputs, (128, 128), 0).items():
            if inputs[key].type in ("image", "mask"):
                (value[0] if isinstance(value, list) else value).save(folder / f"{key}.png")
        words = [
            sys.executable,
            "-m",
            *shlex.split(command),
            "--steps",
            "2",
            "--base",
            str(Path(base).resolve()) if Path(base).is_dir() else base,
        ]
        trust = [] if target.module else ["--trust-code"]
        try:
            run([*words, *trust], "it fails", folder=folder, variables=target.variables(folder))
        except PackError as error:
            cure = "give inputs defaults and bounds in template.toml that the template takes"
            raise _FaultError(str(error), cure) from error
    return command
