"""Two tiny forwards that tell what a model computes: in which order, where, of which shapes.

They are of different sizes, `[2, 3]` and `[3, 5]` tokens, so that every axis can be told from every
other. They leave no trace in the model.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lamina import forward, ports, tracing
from lamina.positions import make_batch

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["SIZES", "Call", "Inputs", "Rehearsal", "rehearse", "tiny_ids"]

SIZES = ((2, 3), (3, 5))
"""Prompts and tokens of the two forwards."""

Call = tuple[str, str, int]
"""A module's name, its port, and which call of the module."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call: the one that `.input` stands for, and each by its name."""

    first: ports.Structure
    named: dict[ports.Selector, ports.Structure]


@dataclass
class Run:
    """What one forward did."""

    order: dict[Call, int] = field(default_factory=dict)
    seen: dict[Call, ports.Structure | Inputs] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Rehearsal:
    """What both forwards did, and whether position ids may be given.

    Attributes:
        runs: The two forwards, in the order of `SIZES`.
        position_ids: Whether the forward takes position ids that count from 0. Some models count
            from elsewhere (RoBERTa from its padding index on); they are left to count themselves.
    """

    runs: tuple[Run, Run]
    position_ids: bool


def rehearse(
    model: object, wanted: set[tuple[str, str]], *, position_ids: bool = True
) -> Rehearsal:
    """Run the tiny forwards.

    An nnsight model runs with its edits; where these fail on so few tokens, without them.

    Args:
        model: The model, as the caller gave it.
        wanted: The (module, port) pairs whose structure is to be kept; order is kept for all.
        position_ids: Whether to find out if the forward takes position ids.
    """
    module = forward.unwrap(model)
    with forward.quiet(module):
        try:
            runs = tuple(_run(model, module, size, wanted) for size in SIZES)
        except Exception:
            if not tracing.has_edits(model):
                raise
            runs = tuple(_run(module, module, size, wanted) for size in SIZES)
        counts = position_ids and _counts_from_zero(module)
    return Rehearsal((runs[0], runs[1]), counts)


def tiny_ids(module: torch.nn.Module, prompts: int, tokens: int) -> NDArray[np.int64]:
    """Return token ids `[prompts, tokens]` that any vocabulary of the model has."""
    import numpy as np
    import torch

    rows = [m.num_embeddings for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    ids = np.arange(prompts * tokens, dtype=np.int64) % min(rows, default=2)
    return ids.reshape(prompts, tokens)


def _run(
    model: object, module: torch.nn.Module, size: tuple[int, int], wanted: set[tuple[str, str]]
) -> Run:
    run = Run()
    handles: list[Any] = []
    thread = threading.get_ident()

    def event(name: str, port: str) -> Call:
        key = (name, port, run.calls[name] if port == "input" else run.calls[name] - 1)
        run.order.setdefault(key, len(run.order))
        return key

    def install() -> None:
        for name, each in module.named_modules():
            parameters = ports.parameter_names(each) if (name, "input") in wanted else ()

            def before(
                _module: object,
                args: tuple[Any, ...],
                kwargs: dict[str, Any] | None = None,  # a thread that meets us installing has none
                name: str = name,
                parameters: tuple[str, ...] = parameters,
            ) -> None:
                if threading.get_ident() != thread:
                    return  # a forward that someone else runs meanwhile
                key = event(name, "input")
                run.calls[name] += 1
                if (name, "input") in wanted:
                    run.seen[key] = _describe_inputs(parameters, args, kwargs or {})

            def after(_module: object, _args: object, output: object, name: str = name) -> None:
                if threading.get_ident() != thread:
                    return
                key = event(name, "output")
                if (name, "output") in wanted:
                    run.seen[key] = ports.describe(output)

            handles.append(each.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(each.register_forward_hook(after))

    batch = make_batch(list(tiny_ids(module, *size)), "none")
    arguments = forward.call_arguments(module, batch, position_ids=False)
    with forward.hooked(handles, install):
        try:
            forward.call(model, arguments)
        except Exception as error:
            error.add_note(
                f"in a tiny forward of {size[0]} prompts of {size[1]} tokens, which tells the "
                f"order and the shapes of the sites"
            )
            if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
                error.add_note(
                    f"{type(module).__name__} is an encoder with a decoder; its encoder can be "
                    f"captured by itself: model.get_encoder()"
                )
            raise
    return run


def _describe_inputs(
    parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Inputs:
    found = ports.argument(parameters, args, kwargs, None)
    named = dict(zip(parameters, args, strict=False)) | kwargs
    return Inputs(
        ports.describe(None if found is None else found[1]),
        {name: ports.describe(value) for name, value in named.items()},
    )


def _counts_from_zero(module: torch.nn.Module) -> bool:
    """Return whether position ids matter to a model, and it counts from 0 when given none."""
    import torch

    if not forward.takes(module, "position_ids"):
        return False
    batch = make_batch(list(tiny_ids(module, *SIZES[0])), "none")
    backwards = replace(batch, position_ids=batch.position_ids.flip(-1))
    plainly = _result(module, forward.call_arguments(module, batch, position_ids=False))
    try:
        counted, reversed_ = (
            _result(module, forward.call_arguments(module, each, position_ids=True))
            for each in (batch, backwards)
        )
    except Exception:
        return False  # taken by name only, not in fact
    return torch.equal(plainly, counted) and not torch.equal(plainly, reversed_)


def _result(module: torch.nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    import torch

    found = ports.first_tensor(module(**arguments))
    return torch.zeros(0) if found is None else torch.nan_to_num(found)
