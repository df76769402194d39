"""Rows of several sites in one pass, for `Store.gather`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lamina.column import as_indices, as_torch
from lamina.errors import InputError
from lamina.wording import shape_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lamina import _core
    from lamina.column import Several

    Site: TypeAlias = tuple[int, tuple[str, str, tuple[int, ...]]]

__all__ = ["gather"]


def gather(
    core: _core.Store,
    sites: Sequence[Site],
    rows: int | slice | Several,
    out: torch.Tensor | None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return rows of sites as a copy: see `Store.gather`.

    Args:
        core: The store.
        sites: Each site's number with its path, dtype and shape of a row.
        rows: Which rows of the store.
        out: Where to put them, or None.
    """
    if not sites:
        raise InputError("gather needs at least one site")
    wanted = as_indices(rows, core.rows, "the rows of the store")
    flat = np.ascontiguousarray(wanted.reshape(-1))
    indices = [index for index, _ in sites]
    facts = [fact for _, fact in sites]
    same = len({fact[1:] for fact in facts}) == 1
    if out is not None:
        _, dtype, feature = facts[0]
        raw = _raw(out, dtype if same else None, (*wanted.shape, len(sites), *feature))
        core.gather(indices, flat, [raw])
        return out
    tensors = [as_torch(tensor) for tensor in core.gather(indices, flat)]
    shaped = [tensor.reshape(*wanted.shape, *tensor.shape[1:]) for tensor in tensors]
    if same:
        return shaped[0]
    return {fact[0]: tensor for fact, tensor in zip(facts, shaped, strict=True)}


def _raw(out: torch.Tensor, dtype: str | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return the bytes of a tensor that gathered rows can be put into as they are."""
    import torch

    if not isinstance(out, torch.Tensor):
        raise InputError(f"out must be a torch tensor, not a {type(out).__name__}")
    if dtype is None:
        raise InputError("sites of different dtypes or shapes cannot be gathered into one `out`")
    found = str(out.dtype).removeprefix("torch.")
    if found != dtype or tuple(out.shape) != shape:
        raise InputError(
            f"out must be {shape_text(shape)} {dtype}, not {shape_text(out.shape)} {found}"
        )
    if not out.is_contiguous() or out.device.type != "cpu":
        raise InputError(f"out must be contiguous and on the CPU; it is on {out.device}")
    return out.detach().reshape(-1).view(torch.uint8).numpy()
