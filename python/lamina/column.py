"""Columns: all rows of one site, or those at a position, as tensors of torch or NumPy.

A column of a whole site is a view of the files: nothing is read before it is used, nothing is
copied, and its size may exceed memory. A column at a position holds rows from many places, so
its numbers are gathered, as a copy, when they are asked for.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lamina.dtypes import SIZES, WITHOUT_NUMPY
from lamina.errors import DtypeError, InputError, PositionError
from lamina.wording import bytes_text, listed, shape_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import EllipsisType

    import torch
    from numpy.typing import DTypeLike, NDArray

    from lamina import _core
    from lamina.prompts import Prompts, Selection

__all__ = ["Column", "Position", "RowKey", "Several", "as_array", "as_indices", "as_torch"]

Position: TypeAlias = int | slice | list[int] | None
"""What stands in the brackets behind a site; None where there are none."""

Several: TypeAlias = "Sequence[int] | Sequence[bool] | NDArray[Any] | torch.Tensor"
"""Indices in any order, or a mask with one bool for each."""

RowKey: TypeAlias = "int | slice | EllipsisType | Several"
"""What selects rows: one, a run, all of them, or several."""


class Column:
    """The rows of one site: `[rows, *feature]`, or at a position `[prompts, *feature]`.

    `store["model.layers[7].output"]` is the whole site. `.tensor`, `.numpy()`, `column[i]` and
    slices of it share memory with the files, through one private mapping that this column owns:
    writing in place is seen by its other views, never by the files, `gather`, `load` or other
    columns. Lists, arrays and masks copy.

    `store["model.layers[7].output[-1]"]` is one position of every prompt, `[0, -1]` gives
    `[prompts, 2, *feature]`, and a slice such as `[-4:]` gives `[rows, *feature]`, prompt by
    prompt, with `.lengths`. These copy whenever they are asked for numbers.

    Attributes:
        path: Canonical text, with the position if there is one.
        site: Canonical text of the site.
        position: An index, a list of them, a slice, or None for every row.
        shape: Of the tensor.
        dtype: The torch name of the dtype, such as `bfloat16`.
    """

    __slots__ = (
        "__weakref__",
        "_core",
        "_feature",
        "_index",
        "_mapped",
        "_prompts",
        "_selection",
        "dtype",
        "path",
        "position",
        "shape",
        "site",
    )

    path: str
    site: str
    position: Position
    shape: tuple[int, ...]
    dtype: str

    def __init__(
        self,
        core: _core.Store,
        prompts: Prompts,
        index: int,
        facts: tuple[str, str, tuple[int, ...]],
        path: str,
        position: Position,
    ) -> None:
        self._core = core
        self._prompts = prompts
        self._index = index
        self._mapped: _core.Tensor | None = None
        self.site, self.dtype, self._feature = facts
        self.path = path
        self.position = position
        # Short prompts raise here, not when the numbers are wanted.
        self._selection: Selection | None = None if position is None else prompts.select(position)
        leading = (core.rows,) if self._selection is None else self._selection.rows.shape
        self.shape = (*leading, *self._feature)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor."""
        return math.prod(self.shape) * SIZES[self.dtype]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The store's row behind each entry: `[rows]`, `[prompts]` or `[prompts, k]`, int64."""
        if self._selection is None:
            return np.arange(self._core.rows, dtype=np.int64)
        return self._selection.rows.copy()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many rows each prompt has here, `[prompts]`, int64: 1 at one position, k at k."""
        if self._selection is None:
            return self._prompts.row_counts
        return self._selection.lengths.copy()

    @property
    def tier(self) -> str | None:
        """How the site is mapped: in pages of `2 MiB`, `64 KiB`, `4 KiB`, or `copy`.

        None at a position, where rows are gathered.
        """
        return self._core.tiers()[self._index] if self._selection is None else None

    @property
    def tensor(self) -> torch.Tensor:
        """All of it as a torch tensor on the CPU, in the dtype stored.

        Without a position: a view of the files, whatever the size. With one: a copy.
        """
        if self._selection is None:
            return as_torch(self._view())
        return self._copied(self._selection.rows)

    def numpy(self, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Return all of it as a NumPy array: a view of the files, or at a position a copy.

        Args:
            dtype: The stored dtype from `ml_dtypes` (`ml_dtypes.bfloat16`), for the three that
                NumPy lacks. Other dtypes convert, which copies.

        Raises:
            DtypeError: NumPy has no such dtype (bfloat16, float8) and none was given.
        """
        if dtype is None and self.dtype in WITHOUT_NUMPY:
            raise DtypeError(
                f"{self.path} is {self.dtype}, which NumPy does not have: use `.tensor` (torch), "
                f"or with the package ml_dtypes `.numpy(ml_dtypes.{self.dtype})`"
            )
        shared = self._view() if self._selection is None else self._gather(self._selection.rows)
        array = as_array(shared, self.dtype, None if dtype is None else np.dtype(dtype))
        return array.reshape(self.shape)

    def rows_as_floats(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return rows of the store as float64, without torch where that can be: a copy."""
        tensor = self._gather(rows)
        shape = (*rows.shape, *self._feature)
        if self.dtype.startswith("float8"):
            return as_torch(tensor).double().reshape(shape).numpy()
        return as_array(tensor, self.dtype, np.dtype(np.float64)).reshape(shape)

    def __array__(
        self,
        dtype: DTypeLike | None = None,
        copy: bool | None = None,  # noqa: FBT001  NumPy passes it so
    ) -> NDArray[Any]:
        array = self.numpy(dtype)
        if self._selection is None and array.dtype.name == self.dtype:
            return array.copy() if copy else array
        if copy is False:
            raise ValueError(f"{self.path} cannot be given to NumPy without a copy")
        return array

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        if self._selection is None:
            return self._view().__dlpack__(
                stream=stream, max_version=max_version, dl_device=dl_device, copy=copy
            )
        given = {"stream": stream, "max_version": max_version, "dl_device": dl_device, "copy": copy}
        # Versions of torch differ in what they take: only what was given is passed on.
        keywords: dict[str, Any] = {name: each for name, each in given.items() if each is not None}
        return self.tensor.__dlpack__(**keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # the CPU

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tensor)

    def __getitem__(self, key: RowKey | tuple[RowKey, ...]) -> torch.Tensor:
        """Return rows as a torch tensor: views for an index or slice, copies for the rest.

        At a position everything is a copy. Further axes may follow: `column[rows, :10]`.

        Raises:
            PositionError: A row lies outside.
            InputError: The key selects no rows: a mask of another length, an array of floats.
        """
        if isinstance(key, tuple):
            return self._indexed(key)
        if key is Ellipsis:
            return self.tensor
        if self._selection is None and isinstance(key, slice) and (key.step or 1) > 0:
            return self.tensor[key]
        entries = as_indices(key, len(self), self.path)
        if self._selection is None:
            return self._copied(entries) if entries.ndim else self.tensor[int(entries)]
        return self._copied(self._selection.rows[entries])

    def __repr__(self) -> str:
        how = "gathered" if self.tier is None else f"{self.tier} pages"
        return (
            f"<Column {self.path} {shape_text(self.shape)} {self.dtype}, "
            f"{bytes_text(self.nbytes)}, {how.replace('copy pages', 'copied')}>"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (os.fspath(self._core.directory), self._core.version, self.path)

    def _indexed(self, key: tuple[RowKey, ...]) -> torch.Tensor:
        if not key or key[0] is Ellipsis:
            return self.tensor[key]
        chosen, rest = self[key[0]], key[1:]
        axes = np.ndim(key[0]) if not isinstance(key[0], slice) else 1
        if rest:
            chosen = chosen[(*[slice(None)] * axes, *rest)]
        return chosen

    def _view(self) -> _core.Tensor:
        """Return the mapping of this column, made at its first use."""
        if self._mapped is None:
            self._mapped = self._core.column(self._index)
        return self._mapped

    def _gather(self, rows: NDArray[np.int64]) -> _core.Tensor:
        return self._core.gather([self._index], np.ascontiguousarray(rows.reshape(-1)))[0]

    def _copied(self, rows: NDArray[np.int64]) -> torch.Tensor:
        return as_torch(self._gather(rows)).reshape(*rows.shape, *self._feature)


def as_torch(tensor: _core.Tensor) -> torch.Tensor:
    """Return a tensor of the core as torch's, sharing its memory.

    Raises:
        InputError: torch is not installed.
    """
    try:
        from torch.utils.dlpack import from_dlpack
    except ImportError:
        raise InputError(
            "this gives torch tensors and torch is not installed; "
            "`.numpy()` and `np.asarray(column)` work without it"
        ) from None
    return from_dlpack(tensor)


def as_array(tensor: _core.Tensor, dtype: str, wanted: np.dtype[Any] | None) -> NDArray[Any]:
    """Return a tensor of the core as a NumPy array, sharing its memory unless it is converted.

    Raises:
        DtypeError: NumPy can neither hold nor convert it.
    """
    if dtype not in WITHOUT_NUMPY:
        array = np.asarray(tensor)
        return array if wanted is None else array.astype(wanted, copy=False)
    raw = np.asarray(tensor.bytes())
    if wanted is not None and wanted.name == dtype:
        return raw.view(wanted)
    if wanted is not None and dtype == "bfloat16" and wanted.kind == "f":
        widened = raw.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return widened.view(np.float32).astype(wanted, copy=False)
    raise DtypeError(
        f"NumPy cannot make {'an array' if wanted is None else wanted.name} of {dtype}: "
        f"use `.tensor` (torch), or `.numpy(ml_dtypes.{dtype})`"
    )


def as_indices(key: object, length: int, what: str) -> NDArray[np.int64]:
    """Return what selects entries as their indices: int64, in the shape given, none negative.

    Args:
        key: An index, a slice, a list, array or tensor of indices (negative ones count from the
            end), or a mask of `length` bools.
        length: How many entries there are.
        what: Names the thing indexed in messages.

    Raises:
        PositionError: An index lies outside.
        InputError: The key is none of these.
    """
    if isinstance(key, slice):
        return np.arange(*key.indices(length), dtype=np.int64)
    if hasattr(key, "detach"):
        key = key.detach().cpu().numpy()
    try:
        entries = np.asarray(key)
    except ValueError:
        entries = np.asarray(None)
    if entries.size == 0 and isinstance(key, list | tuple):
        entries = entries.astype(np.int64)
    if entries.dtype == np.bool_ and entries.ndim > 0:
        if entries.shape != (length,):
            raise InputError(
                f"a mask over {what} must have shape {shape_text([length])}, "
                f"not {shape_text(entries.shape)}"
            )
        return np.flatnonzero(entries)
    if entries.dtype.kind not in "iu":
        found = type(key).__name__ if entries.dtype == object else f"{entries.dtype} values"
        raise InputError(
            f"{what} is indexed by integers, slices, lists or arrays of integers, "
            f"or a mask of bools, not by {found}"
        )
    outside = (entries >= length) | (entries < -length if entries.dtype.kind == "i" else False)
    if outside.any():
        raise PositionError(
            f"{listed(entries[outside].reshape(-1), most=5)} "
            f"{'lies' if outside.sum() == 1 else 'lie'} outside {what} "
            + (f"(0 to {length - 1})" if length else "(there are none)")
        )
    entries = entries.astype(np.int64)
    return np.where(entries < 0, entries + length, entries)


def _reopened(directory: str, version: int, path: str) -> Column:
    """Return a column that another process pickled."""
    from lamina.store import open as open_store

    column = open_store(directory, version=version)[path]
    assert isinstance(column, Column), path
    return column
