"""nnsight, and nothing else: the only file that imports it, and only once a model of its is given.

A traced forward here reads nothing from inside the trace's body. What has to be seen after edits
is handed over by an observer, nnsight's own way to watch a run: it needs no order, sees every call
of a module, and leaves nothing waiting, so the forward may be stopped at any point.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from lamina.errors import InputError, SiteError

if TYPE_CHECKING:
    import torch

    from lamina.ports import Value

__all__ = ["Observer", "has_edits", "is_nnsight", "traced_forward", "underlying"]

Model: TypeAlias = Any
"""An `nnsight.Envoy`; nnsight has no types of its own."""

Observer: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], None]
"""Is handed the arguments of one call of a module, edits applied."""

_locks: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def is_nnsight(model: object) -> bool:
    """Return whether a model is nnsight's, without importing nnsight for any other."""
    if "nnsight" not in sys.modules:
        return False
    import nnsight

    return isinstance(model, nnsight.Envoy)


def underlying(model: object) -> torch.nn.Module | None:
    """Return the plain module of an nnsight model (its weights loaded), or None for others."""
    if not is_nnsight(model):
        return None
    if getattr(model, "dispatched", True) is False:
        model.dispatch()  # type: ignore[attr-defined]
    module: torch.nn.Module = model._module  # type: ignore[attr-defined]
    return module


def has_edits(model: object) -> bool:
    """Return whether an nnsight model carries edits, which change what a forward computes."""
    return is_nnsight(model) and bool(model._edits)  # type: ignore[attr-defined]


def traced_forward(model: Model, arguments: dict[str, Any], observe: dict[str, Observer]) -> Value:
    """Run one forward of an nnsight model with its edits applied.

    Forwards of one model take turns: nnsight mixes up traces that run at the same time.

    Args:
        model: The nnsight model.
        arguments: Keyword arguments of the forward.
        observe: Per module name, as in `named_modules()`, what is handed its arguments.

    Returns:
        What the model returned; None where something was observed.
    """
    if model.interleaver.interleaving and _in_trace():
        raise InputError(
            "a model cannot be run inside one of its own traces; leave the trace first"
        )
    with _lock(model._module):
        if not observe:
            return model.trace(trace=False, **arguments)
        watcher = _Watcher(model, observe)
        with model.trace(**arguments):
            _watch(watcher)
    return None


class _Watcher:
    """What nnsight's interleaver takes for one of its caches, and hands every value it asks for."""

    def __init__(self, model: Model, observe: dict[str, Observer]) -> None:
        paths = {id(envoy._module): envoy.path for envoy in model.modules()}
        modules = dict(model._module.named_modules())
        self._observers = {}
        for name, observer in observe.items():
            if id(modules[name]) not in paths:
                raise SiteError(
                    f"nnsight does not know the module {name!r}, which was put into the model "
                    f"after it was wrapped; wrap the model again"
                )
            self._observers[f"{paths[id(modules[name])]}.input"] = observer

    def subscriptions(self) -> dict[str, str]:
        """Return the locations to be handed over, as nnsight names them."""
        return {location: location for location in self._observers}

    def wants(self, location: str) -> bool:
        """Return whether a location is handed over."""
        return location in self._observers

    def observe_selected(
        self, location: str, value: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> None:
        """Hand over the arguments of one call, edits applied."""
        args, kwargs = value
        self._observers[location](args, kwargs)


def _watch(watcher: _Watcher) -> None:
    """Let the trace whose body is running hand its values to the watcher."""
    from nnsight.intervention.interleaver import Mediator

    Mediator.current("the model's inputs").caches.append(watcher)


def _in_trace() -> bool:
    """Return whether this code runs inside the body of a trace."""
    from nnsight.intervention.interleaver import Mediator

    try:
        Mediator.current("the trace")
    except ValueError:  # nnsight's way to say that no trace is running here
        return False
    return True


def _lock(module: torch.nn.Module) -> threading.RLock:
    with _locks_guard:
        return _locks.setdefault(module, threading.RLock())
