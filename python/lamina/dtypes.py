"""Element types by their many names: those of torch, NumPy and safetensors, and short ones."""

import math
from collections.abc import Iterable

from lamina.errors import DtypeError

__all__ = ["SIZES", "WITHOUT_NUMPY", "dtype_name", "row_bytes"]

SIZES: dict[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""The torch name of every dtype that a store can hold, with the bytes of one element."""

_SHORT = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
    "f8_e4m3": "float8_e4m3fn",
    "f8_e5m2": "float8_e5m2",
}

WITHOUT_NUMPY = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2"})
"""The dtypes that NumPy knows only where ml_dtypes is installed."""


def dtype_name(value: object) -> str:
    """Return the torch name of a dtype.

    Args:
        value: A torch dtype, a NumPy dtype or scalar type, or a name: torch (`bfloat16`,
            `torch.bfloat16`), short (`bf16`) or safetensors (`BF16`).

    Raises:
        DtypeError: No store can hold it.

    >>> dtype_name("BF16"), dtype_name("torch.float32"), dtype_name("f8_e4m3")
    ('bfloat16', 'float32', 'float8_e4m3fn')
    """
    if isinstance(value, str):
        text = value
    elif isinstance(value, type):
        text = value.__name__  # numpy.float32, bool
    else:
        text = str(getattr(value, "name", value))  # numpy dtypes have a name, torch's only a text
    bare = text.removeprefix("torch.").lower()
    name = _SHORT.get(bare, bare)
    if name not in SIZES:
        raise DtypeError(
            f"unknown dtype `{text[:64]}`: a store holds {', '.join(SIZES)} "
            f"(short and safetensors names work too: bf16, BF16)"
        )
    return name


def row_bytes(sites: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Return the bytes of one row of all sites, each given by path, dtype and shape of a row.

    >>> row_bytes([("model.a.output", "bfloat16", (768,)), ("model.b.output", "float32", ())])
    1540
    """
    return sum(SIZES[dtype] * math.prod(shape) for _, dtype, shape in sites)
