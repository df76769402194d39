"""What lies at a module's port: tensors, or tuples, dicts and model outputs that hold tensors.

A port's value is addressed by selectors: an index from 0 in a tuple or list, a name in a dict, a
model output or a named tuple. Nothing is ever changed in place: `replaced` rebuilds what
holds the tensor.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

__all__ = [
    "Branch",
    "Leaf",
    "Opaque",
    "Selector",
    "Structure",
    "Value",
    "argument",
    "consumed",
    "describe",
    "first_tensor",
    "forward_parameters",
    "listing",
    "outline",
    "parameter_names",
    "pick",
    "places",
    "replaced",
    "split_argument",
    "with_argument",
]

Selector: TypeAlias = int | str

Value: TypeAlias = Any
"""Whatever a module is given or returns."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        """Return what an error message shows."""
        return f"Tensor {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Branch:
    """A tuple, list, dict or model output: what it is called, and what it holds."""

    kind: str
    items: dict[Selector, Structure]

    def __str__(self) -> str:
        """Return what an error message shows."""
        return f"{self.kind} of {len(self.items)}"


@dataclass(frozen=True, slots=True)
class Opaque:
    """Anything else: None, a cache, a number."""

    kind: str

    def __str__(self) -> str:
        """Return what an error message shows."""
        return self.kind


Structure: TypeAlias = Leaf | Branch | Opaque


def describe(value: object) -> Structure:
    """Return the structure of a value: shapes and names, no data."""
    import torch

    if isinstance(value, torch.Tensor):
        return Leaf(tuple(value.shape), value.dtype)
    parts = _parts(value)
    if parts is None:
        return Opaque("None" if value is None else type(value).__name__)
    return Branch(type(value).__name__, {name: describe(part) for name, part in parts.items()})


def consumed(structure: Structure, selectors: tuple[Selector, ...]) -> tuple[int, Structure]:
    """Return how many selectors lead to a tensor (or as far as they lead), and what is there."""
    used = 0
    while isinstance(structure, Branch) and used < len(selectors):
        found = structure.items.get(selectors[used])
        if found is None:
            break
        structure = found
        used += 1
    return used, structure


def listing(structure: Structure, prefix: str) -> str:
    """Return the elements that a path could name: `output[0] Tensor [2, 3, 64], output[1] None`."""
    if not isinstance(structure, Branch):
        return f"{prefix} {structure}"
    return ", ".join(
        f"{prefix}[{name}] {item}" if isinstance(name, int) else f"{prefix}.{name} {item}"
        for name, item in structure.items.items()
    )


def places(structure: Structure, selectors: tuple[Selector, ...]) -> list[int]:
    """Return where the selected element stands among its neighbours, level by level."""
    found = []
    for selector in selectors:
        if not isinstance(structure, Branch):
            break
        found.append(list(structure.items).index(selector))
        structure = structure.items[selector]
    return found


def outline(structure: Structure) -> str:
    """Return a structure without its shapes: `tuple(Tensor, None)`, `dict(logits: Tensor)`."""
    if isinstance(structure, Leaf):
        return "Tensor"
    if isinstance(structure, Opaque):
        return structure.kind
    items = (
        outline(item) if isinstance(name, int) else f"{name}: {outline(item)}"
        for name, item in structure.items.items()
    )
    return f"{structure.kind}({', '.join(items)})"


def pick(value: Value, selectors: tuple[Selector, ...]) -> Value:
    """Return the element that the selectors lead to.

    Raises:
        LookupError: There is no such element.
    """
    for selector in selectors:
        parts = _parts(value)
        if parts is None or selector not in parts:
            raise LookupError(
                f"{listing(describe(value), 'the value is')}: no element {selector!r}"
            )
        value = parts[selector]
    return value


def replaced(value: Value, selectors: tuple[Selector, ...], new: object) -> Value:
    """Return a value equal to the given one except for the element that the selectors lead to.

    Containers on the way are rebuilt with their own type; nothing is written in place.

    Raises:
        LookupError: There is no such element.
    """
    if not selectors:
        return new
    selector, rest = selectors[0], selectors[1:]
    inner = replaced(pick(value, (selector,)), rest, new)
    if isinstance(value, tuple) and hasattr(value, "_replace"):
        return value._replace(**{str(selector): inner})
    if isinstance(value, tuple | list):
        items = list(value)
        items[int(selector)] = inner
        return type(value)(items)
    if isinstance(value, MutableMapping):
        rebuilt = copy.copy(value)
        rebuilt[selector] = inner
        return rebuilt
    return replace(value, **{str(selector): inner})


def argument(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str | None
) -> tuple[int | str, Any] | None:
    """Return one argument of a call with where it stands: its place, or its keyword.

    Args:
        names: The forward's parameter names, as `parameter_names` gives them.
        args: The positional arguments.
        kwargs: The keyword arguments.
        name: The parameter meant; None means the first positional argument, or else the first
            keyword argument that is a tensor.
    """
    import torch

    if name is None:
        if args:
            return 0, args[0]
        for keyword, value in kwargs.items():
            if isinstance(value, torch.Tensor):
                return keyword, value
        return None
    if name in kwargs:
        return name, kwargs[name]
    if name in names[: len(args)]:
        place = names.index(name)
        return place, args[place]
    return None


def split_argument(selectors: tuple[Selector, ...]) -> tuple[str | None, tuple[Selector, ...]]:
    """Return which argument an input port's selectors name (None: the first), and the rest."""
    if selectors and isinstance(selectors[0], str):
        return selectors[0], selectors[1:]
    return None, selectors


def with_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int | str, value: object
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with one of them exchanged."""
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), dict(kwargs)
    return args, {**kwargs, place: value}


def parameter_names(module: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of a module's forward parameters, `self` left out."""
    return tuple(forward_parameters(type(module).forward))[1:]


@lru_cache(maxsize=1024)
def forward_parameters(forward: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a forward by name, `self` first.

    Ask with the class's: libraries that trace a model replace the instance's `forward`.
    """
    return inspect.signature(forward).parameters


def first_tensor(value: object) -> torch.Tensor | None:
    """Return the first tensor in a value, or None."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    for part in (_parts(value) or {}).values():
        if (found := first_tensor(part)) is not None:
            return found
    return None


def _parts(value: object) -> dict[Selector, Any] | None:
    names = getattr(value, "_fields", None)
    if isinstance(value, tuple) and names:
        return dict(zip(names, value, strict=True))
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None
