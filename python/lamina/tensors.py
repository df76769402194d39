"""Whatever holds numbers, as contiguous bytes: torch, NumPy, DLPack and buffer producers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from lamina.dtypes import SIZES, dtype_name
from lamina.errors import DtypeError, InputError
from lamina.wording import shape_text

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["as_bytes", "as_integers"]


def as_bytes(
    values: object, name: str, dtype: str, feature: tuple[int, ...]
) -> tuple[NDArray[np.uint8], int]:
    """Return the bytes of a tensor, row by row, and its number of rows.

    Shares memory where the tensor is contiguous and on the CPU already.

    Args:
        values: A torch tensor on any device, a NumPy array, anything with DLPack or a buffer.
        name: The site, for messages.
        dtype: The torch name of the dtype that it must have; nothing is cast.
        feature: The shape of a row.

    Raises:
        DtypeError: It has another dtype.
        InputError: It has another shape, or holds no numbers that can be read.
    """
    array, found, shape = _described(values, name)
    if found != dtype:
        raise DtypeError(
            f"{name} is stored as {dtype}, and got {found} {shape_text(shape)}: convert it first, "
            "nothing is cast here"
        )
    if not shape or shape[1:] != feature:
        raise InputError(
            f"{name}: expected {shape_text(['rows', *feature])}, got {shape_text(shape)}"
        )
    return array, shape[0]


def as_integers(values: object, name: str, largest: int) -> NDArray[np.int64]:
    """Return a list, array or tensor of integers as a one-dimensional int64 array.

    Raises:
        InputError: It has another shape, holds something else, or values outside 0..largest.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.asarray(None)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        what = (
            "values of several kinds"
            if array.dtype == object
            else (f"{array.dtype} {shape_text(array.shape)}")
        )
        raise InputError(f"{name} must be integers in one dimension, not {what}")
    if array.size and (int(array.min()) < 0 or int(array.max()) > largest):
        worst = int(array.min()) if int(array.min()) < 0 else int(array.max())
        raise InputError(f"{name} must lie between 0 and {largest}; found {worst}")
    return array.astype(np.int64)


def _described(values: object, name: str) -> tuple[NDArray[np.uint8], str, tuple[int, ...]]:
    """Return bytes, torch dtype name and shape of whatever holds numbers."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        return _from_torch(values, name)
    if isinstance(values, np.ndarray):
        return _from_numpy(values, name)
    if hasattr(values, "__dlpack__"):
        return _from_dlpack(values, name)
    try:
        view = memoryview(values)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(
            f"{name}: a {type(values).__name__} is no tensor; give one of torch or NumPy, or "
            "anything with __dlpack__ or the buffer protocol"
        ) from None
    return _from_numpy(np.asarray(view), name)


def _from_torch(tensor: torch.Tensor, name: str) -> tuple[NDArray[np.uint8], str, tuple[int, ...]]:
    import torch

    shape = tuple(tensor.shape)
    found = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise InputError(f"{name}: a {kind} tensor cannot be stored; make it dense first")
    if tensor.is_meta:
        raise InputError(f"{name}: the tensor is on the meta device and holds no numbers")
    if found not in SIZES:
        return np.empty(0, dtype=np.uint8), found, shape  # the caller names both dtypes
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy(), found, shape


def _from_numpy(array: NDArray[Any], name: str) -> tuple[NDArray[np.uint8], str, tuple[int, ...]]:
    try:
        found = dtype_name(array.dtype)
    except DtypeError:
        if array.dtype == object or array.dtype.kind not in "biufc":
            raise InputError(f"{name}: a NumPy array of {array.dtype} is no tensor") from None
        return np.empty(0, dtype=np.uint8), array.dtype.name, array.shape
    native = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    return np.ascontiguousarray(native).reshape(-1).view(np.uint8), found, array.shape


def _from_dlpack(
    values: Any,  # noqa: ANN401  whatever follows the protocol
    name: str,
) -> tuple[NDArray[np.uint8], str, tuple[int, ...]]:
    try:
        from torch.utils.dlpack import from_dlpack
    except ImportError:
        return _from_numpy(np.from_dlpack(values), name)
    return _from_torch(from_dlpack(values), name)
