"""How a model is run: its plain module, the arguments its forward takes, quietly.

A *quiet* run leaves no trace in the model: evaluation mode with every module's own flag restored,
no gradients, no key-value cache, the random number generators where they were.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lamina import ports, tracing
from lamina.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from lamina.ports import Value
    from lamina.positions import Batch
    from lamina.tracing import Observer

__all__ = ["ForwardStop", "call", "call_arguments", "evaluating", "input_device", "takes", "unwrap"]

_guard = threading.Lock()
_evaluating: dict[torch.nn.Module, tuple[int, list[tuple[torch.nn.Module, bool]]]] = {}


class ForwardStop(BaseException):
    """Ends a forward whose every wanted value has been seen.

    It derives from `BaseException` so that no `except Exception` inside a model swallows it.
    """


def unwrap(model: object) -> torch.nn.Module:
    """Return the plain module of a transformers model, any other module, or an nnsight model.

    Raises:
        InputError: The model is neither.
    """
    import torch

    if isinstance(original := getattr(model, "_orig_mod", None), torch.nn.Module):
        raise InputError(
            f"the model was compiled by torch.compile, which hides its modules; pass the "
            f"{type(original).__name__} itself (model._orig_mod), or use model.compile()"
        )
    if isinstance(model, torch.nn.Module):
        return model
    module = tracing.underlying(model)
    if module is None:
        raise InputError(
            f"{type(model).__name__} is no model: expected a torch.nn.Module (such as a "
            f"transformers model) or an nnsight model"
        )
    return module


def takes(module: torch.nn.Module, name: str, *, by_name: bool = False) -> bool:
    """Return whether a module's forward takes a keyword argument.

    Args:
        module: The module.
        name: The argument's name.
        by_name: Whether only a parameter of that very name counts, not `**kwargs`.
    """
    parameters = ports.forward_parameters(type(module).forward)
    return name in parameters or (
        not by_name and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    )


def input_device(module: torch.nn.Module) -> torch.device:
    """Return where a model's token ids have to be: the device of its embedding."""
    import torch

    embedding = None
    if callable(getattr(module, "get_input_embeddings", None)):
        try:
            embedding = module.get_input_embeddings()  # type: ignore[operator]
        except NotImplementedError:  # transformers' way to say that a model names none
            embedding = None
    if not isinstance(embedding, torch.nn.Module):
        embedding = next((m for m in module.modules() if isinstance(m, torch.nn.Embedding)), module)
    for owner in (embedding, module):
        for tensor in (*owner.parameters(), *owner.buffers()):
            if tensor.device.type != "meta":
                return tensor.device
    return torch.device("cpu")


def call_arguments(
    module: torch.nn.Module, batch: Batch, *, position_ids: bool, device: torch.device | None = None
) -> dict[str, Any]:
    """Return the keyword arguments of one forward over a batch.

    Raises:
        InputError: The forward takes no `input_ids` or no `attention_mask`.
    """
    for name in ("input_ids", "attention_mask"):
        if not takes(module, name):
            raise InputError(
                f"the forward of {type(module).__name__} takes no {name}; a model must take "
                f"input_ids and attention_mask"
            )
    where = input_device(module) if device is None else device
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids.to(where),
        "attention_mask": batch.attention_mask.to(where),
    }
    if position_ids:
        arguments["position_ids"] = batch.position_ids.to(where)
    if takes(module, "use_cache", by_name=True):
        arguments["use_cache"] = False
    return arguments


def call(
    model: object, arguments: dict[str, Any], observe: dict[str, Observer] | None = None
) -> Value:
    """Run one forward and return what the model returns; an nnsight model runs in a trace.

    Args:
        model: The model, as the caller gave it.
        arguments: Keyword arguments of the forward.
        observe: For nnsight models: per module name, what is handed `(args, kwargs)` of each of
            its calls after edits.
    """
    module = unwrap(model)
    if model is module:
        return module(**arguments)
    return tracing.traced_forward(model, arguments, observe or {})


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; every module's own flag is back afterwards.

    Where several threads do so at once, the flags are back when the last one is done.
    """
    with _guard:
        users, flags = _evaluating.get(module) or (0, [(m, m.training) for m in module.modules()])
        _evaluating[module] = (users + 1, flags)
        if not users:
            module.eval()
    try:
        yield
    finally:
        with _guard:
            users, flags = _evaluating.pop(module)
            if users > 1:
                _evaluating[module] = (users - 1, flags)
            else:
                for each, training in flags:
                    each.training = training


@contextmanager
def quiet(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and random number generators that end where they were."""
    import torch

    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    with evaluating(module), torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def hooked(handles: list[Any], install: Callable[[], None]) -> Iterator[None]:
    """Install hooks, and remove those listed in `handles` however the block ends."""
    try:
        install()
        yield
    finally:
        for handle in handles:
            handle.remove()
        handles.clear()
