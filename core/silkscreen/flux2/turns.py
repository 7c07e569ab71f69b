"""Threads that share a transformer take turns: what one injects is never seen in another's pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock, RLock
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from silkscreen.flux2.loading import base_of

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
