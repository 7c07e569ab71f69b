"""Both sides of guidance in one pass, as a batch of two, in which each side has its own text and its own content.

A pipeline makes two passes a step. Small ones take most of their time for being started, and one of a batch of two
takes little longer. The negative side's text is known once it is encoded; the negative half of the result is kept for
the pass that the pipeline makes next, which then has nothing left to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch

from silkscreen.flux2.replacing import method_replaced
from silkscreen.flux2.sides import BOTH, NEGATIVE, POSITIVE, Call, Sides

LARGEST = 2**17
"""Tokens times their size, in one side's pass, up to which it is run together with the other's."""

_TEXT = ("encoder_hidden_states", "txt_ids")
_BATCHED = ("hidden_states", "timestep", "guidance", "encoder_hidden_states")
_OTHERS = ("img_ids", "txt_ids", "joint_attention_kwargs", "return_dict")


@contextmanager
def in_one_pass(pipe: Any, sides: Sides) -> Iterator[None]:
    """Let a pipeline's transformer run both sides in one pass where that can be done, for as long as the context lasts.

    To be entered last, because a pass has to be made that of both sides before anything else is done to it.
    """
    transformer = pipe.transformer
    run = _OnePass(transformer, sides)
    context, encode = transformer.cache_context, pipe.encode_prompt

    @contextmanager
    def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
        with context(run.side_of(name), **kwargs):
            yield

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        encoded = encode(*args, **kwargs)
        run.expect_text(encoded)
        return encoded

    end = transformer.register_forward_pre_hook(run.before_pass, prepend=True, with_kwargs=True).remove
    try:
        with (
            method_replaced(pipe, "encode_prompt", encode_prompt),
            method_replaced(transformer, "cache_context", cache_context),
            method_replaced(transformer, "forward", run.forward),
        ):
            yield
    finally:
        end()


class _OnePass:
    """Where a run is between the two passes of a step."""

    def __init__(self, transformer: Any, sides: Sides) -> None:
        self._forward = transformer.forward
        self._size: int = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self._sides = sides
        self._moves_weights = any("_hf_hook" in vars(module) for module in transformer.modules())
        """Whether hooks of accelerate make weights anew in a pass, which inference mode would keep from training."""
        self._text: Call | None = None
        """The negative side's text, once it is known."""
        self._expected: Call = {}
        """The negative pass whose result is known, and it."""
        self._result: torch.Tensor | None = None
        self._now: Literal["one side", "both", "known"] = "one side"

    def expect_text(self, encoded: tuple[torch.Tensor, ...]) -> None:
        """Take a text for the negative side's, which pipelines encode last; where it is not, that is found out."""
        self._text = dict(zip(_TEXT, encoded, strict=False))

    def side_of(self, name: str) -> str:
        """Return the side, or both, that a pass is to run, which the pipeline calls by a name."""
        if name == POSITIVE and self._result is not None:  # the negative pass was not made: guidance has ended
            self._text = self._result = None
        return BOTH if name == POSITIVE and self._text is not None else name

    def before_pass(self, _: Any, args: tuple[Any, ...], call: dict[str, Any]) -> tuple[tuple[Any, ...], Call]:
        """Double the arguments of a pass that is to be that of both sides."""
        self._now = "one side"
        suits = not args and self._suits(call)
        if self._sides.running == NEGATIVE:
            self._text = {name: call[name] for name in _TEXT} if suits else None
            if self._result is not None and _equal(call, self._expected):
                self._now = "known"
            else:
                self._result = None
        elif self._sides.running == BOTH:
            negative = {**call, **(self._text or {})}
            if suits and _alike(call, negative):
                self._now, self._expected = "both", negative
                return args, {**call, **{name: torch.cat([call[name], negative[name]]) for name in _batched(call)}}
            self._sides.run(POSITIVE)
        return args, call

    def forward(self, *args: Any, **call: Any) -> Any:
        """Run the pass that `before_pass` has told."""
        if self._now == "one side":
            return self._forward(*args, **call)
        if self._now == "both":
            # noting for each view what it is of takes a twentieth of a small pass, and is only for gradients
            noted = torch.is_grad_enabled() or self._moves_weights
            with nullcontext() if noted else torch.inference_mode():
                output = self._forward(*args, **call)
            positive, self._result = output[0].clone().chunk(2)
            return (positive,)
        result, self._result = self._result, None
        return (result,)

    def _suits(self, call: Call) -> bool:
        if not {*_BATCHED, *_OTHERS} >= call.keys() or call.get("joint_attention_kwargs") or call["return_dict"]:
            return False
        picture, text = call["hidden_states"], call["encoder_hidden_states"]
        tokens: int = picture.shape[1] + text.shape[1]
        return len(picture) == len(text) == 1 and tokens * self._size <= LARGEST


def _batched(call: Call) -> list[str]:
    return [name for name in _BATCHED if isinstance(call.get(name), torch.Tensor)]


def _alike(one: Call, other: Call) -> bool:
    """Whether two passes may be one: they differ in the text's embeddings alone, and not in how many there are."""
    texts = [call["encoder_hidden_states"] for call in (one, other)]
    return texts[0].shape == texts[1].shape and _equal({**one, "encoder_hidden_states": texts[1]}, other)


def _equal(one: Call, other: Call) -> bool:
    return one.keys() == other.keys() and all(_is(one[name], other[name]) for name in one)


def _is(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or torch.equal(one, other)
    return bool(one == other)
