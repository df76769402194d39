"""Recording without a store, and the truth to hold it against."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lamina.positions import Batch, make_batch, parse_positions, select, spans
from lamina.recorder import Recorder
from lamina.sites import Resolved, Site, resolve

Rows = list[torch.Tensor]


def prompts_of(lengths: Sequence[int], vocabulary: int = 61, seed: int = 0) -> list[np.ndarray]:
    """Random prompts; token 0, which pads, is in them too."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, n) for n in lengths]


def record(
    model: Any,
    sites: str | list[str] | Resolved,
    prompts: Sequence[np.ndarray],
    *,
    padding: str = "right",
    batch_size: int = 8,
    positions: Any = None,
    pad_id: int = 0,
) -> dict[str, torch.Tensor]:
    """Every site's rows, in prompt order."""
    resolved = sites if isinstance(sites, Resolved) else resolve(model, sites)
    got: dict[str, list[torch.Tensor]] = {str(site): [] for site in resolved.sites}
    names = list(got)
    with Recorder(model, resolved) as recorder:
        for begin in range(0, len(prompts), batch_size):
            some = prompts[begin : begin + batch_size]
            batch = make_batch(some, padding, pad_id)
            rows, columns = wanted(batch, some, positions)
            recorder.run(batch, rows, columns, lambda n, values: got[names[n]].append(values))
    return {name: torch.cat(parts) for name, parts in got.items()}


def wanted(
    batch: Batch, prompts: Sequence[np.ndarray], positions: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the wanted tokens of one batch."""
    counts, chosen = select([len(p) for p in prompts], parse_positions(positions))
    rows = torch.from_numpy(np.repeat(np.arange(len(prompts)), counts))
    return rows, torch.from_numpy(chosen) + spans(batch.attention_mask)[0][rows]


def plain_forward(model: Any, batch: Batch, *, position_ids: bool = True) -> dict[Any, Any]:
    """Everything that every module of a plain forward was given and gave, by (name, port, call).

    Tensors are cloned at once, so what comes later cannot change them.
    """
    log: dict[Any, Any] = {}
    handles = []
    for name, module in model.named_modules():

        def before(_m: Any, args: Any, kwargs: Any, name: str = name) -> None:
            calls = sum(key[:2] == (name, "input") for key in log)
            log[name, "input", calls] = cloned((args, kwargs))

        def after(_m: Any, _a: Any, output: Any, name: str = name) -> None:
            calls = sum(key[:2] == (name, "output") for key in log)
            log[name, "output", calls] = cloned(output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if position_ids:
        arguments["position_ids"] = batch.position_ids
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return log


def cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: cloned(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [cloned(item) for item in value]
    return value


def tensor_of(log: dict[Any, Any], site: Site) -> torch.Tensor:
    value = log[site.module, site.port, site.call]
    elements = list(site.elements)
    if site.port == "input":
        args, kwargs = value
        if elements and isinstance(elements[0], str):
            value = kwargs[elements.pop(0)]
        else:
            value = args[0] if args else next(iter(kwargs.values()))
    for element in elements:
        value = value[element]
    return value


def truth(
    model: Any,
    resolved: Resolved,
    prompts: Sequence[np.ndarray],
    *,
    padding: str = "right",
    batch_size: int = 8,
) -> dict[str, torch.Tensor]:
    """What plain forwards of the same batches give for every token of every prompt."""
    rows: dict[str, Rows] = {str(site): [] for site in resolved.sites}
    for begin in range(0, len(prompts), batch_size):
        some = prompts[begin : begin + batch_size]
        batch = make_batch(some, padding, 0)
        width = batch.input_ids.shape[1]
        log = plain_forward(model, batch, position_ids=resolved.position_ids)
        for site in resolved.sites:
            tensor = tensor_of(log, site)
            if site.flat:
                tensor = tensor.reshape(len(some), width, *tensor.shape[1:])
            for row, prompt in enumerate(some):
                first = width - len(prompt) if padding == "left" else 0
                rows[str(site)].append(tensor[row, first : first + len(prompt)])
    return {name: torch.cat(parts) for name, parts in rows.items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )
