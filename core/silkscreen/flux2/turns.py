"""Threads that share a transformer take turns: what one injects is never seen in another's pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock, RLock, get_ident
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from silkscreen.errors import PipelineError
from silkscreen.flux2.loading import base_of
from silkscreen.flux2.replacing import is_compiled, method_replaced

Method = TypeVar("Method", bound=Callable[..., Any])

_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_making = Lock()


def in_turn(method: Method) -> Method:
    """Make a method whose first argument is a pipeline wait until no other thread runs one on the same transformer.

    Within one thread such methods may call each other.
    """

    @wraps(method)
    def wait(self: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        base_of(pipe)  # refuses what is no pipeline
        with _making:
            lock = _locks.setdefault(pipe if pipe.transformer is None else pipe.transformer, RLock())
        with lock:
            return method(self, pipe, *args, **kwargs)

    return cast(Method, wait)


@contextmanager
def refused_elsewhere(pipe: Any) -> Iterator[None]:
    """Refuse what other threads do with a pipeline or its transformer out of turn, while something is injected.

    To be entered last, because nothing else is to be reached by it. A transformer that is compiled as a whole gets no
    hook, which would have it compiled anew.

    Raises:
        PipelineError: in the other thread.
    """
    owner, transformer = get_ident(), pipe.transformer

    def check(*_: Any) -> None:
        if get_ident() != owner:
            raise PipelineError(
                "another thread is drawing with templates on this transformer: "
                "call the pipeline by TemplatePipeline([]), which waits for its turn"
            )

    def checked(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def checked_method(*args: Any, **kwargs: Any) -> Any:
            check()
            return method(*args, **kwargs)

        return checked_method

    hook = None if is_compiled(transformer) else transformer.register_forward_pre_hook(check, prepend=True)
    try:
        with (
            method_replaced(pipe, "encode_prompt", checked(pipe.encode_prompt)),
            method_replaced(transformer, "cache_context", checked(transformer.cache_context)),
        ):
            yield
    finally:
        if hook is not None:
            hook.remove()
