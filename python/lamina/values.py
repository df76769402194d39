"""The tree behind `store.values` and `saved.values`: paths by attribute and index.

    store.values.transformer.h[2].output[-1]

The leading `model` of a path may be left out. Names complete in notebooks. Behind a port the
brackets are elements of it where elements were recorded, and a position otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from lamina.errors import SiteNotFoundError
from lamina.wording import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lamina import _core
    from lamina.column import Position

__all__ = ["Leaf", "Values", "grow", "steps_of"]

Step: TypeAlias = int | str
"""One step down the tree: an index, or a name."""

Leaf: TypeAlias = "Callable[[Position], Any]"
"""Gives what is kept of a site at a position; None is the whole of it."""


class Values:
    """A node of the tree: children by attribute and index, at a port what is kept there.

    >>> import lamina as lm, numpy as np, tempfile
    >>> directory = tempfile.mkdtemp()
    >>> sites = {"model.h[0].output": (2, "float32"), "model.h[1].output": (2, "float32")}
    >>> with lm.create(directory, sites=sites) as writer:
    ...     rows = np.ones((3, 2), dtype=np.float32)
    ...     writer.append({site: rows for site in sites}, tokens=[1, 2, 3])
    >>> values = lm.open(directory).values
    >>> values.h
    <Values model.h: [0] and [1]>
    >>> values.h[1].output[-1].shape, values.h[1].output.shape
    ((1, 2), (3, 2))
    """

    __slots__ = ("_children", "_leaf", "_path")

    def __init__(self, path: str) -> None:
        self._path = path
        self._children: dict[Step, Values] = {}
        self._leaf: Leaf | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  a node, or what is kept there
        if name in Values.__slots__ or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # what Python itself looks for is never a site
        if name in self._children:
            return _found(self._children[name])
        if name == "model" and self._path in ("model", "model.model"):
            return self  # the canonical path, of which the tree leaves the first `model` out
        if self._leaf is not None and not name.startswith("_"):
            return getattr(self._leaf(None), name)
        raise AttributeError(f"nothing is kept at {self._path}.{name}; {self._have()}")

    def __getitem__(self, key: Step | Position | tuple[int, ...]) -> Any:  # noqa: ANN401
        if isinstance(key, tuple):
            key = list(key)
        if isinstance(key, int | str) and key in self._children:
            return _found(self._children[key])
        if self._leaf is not None and not isinstance(key, str):
            return self._leaf(key)
        if isinstance(key, slice | list):
            raise IndexError(
                f"{self._path}[…] stands for several modules: name one ({self._have()}), or use "
                f"store['{self._path}[:]…'], which takes patterns"
            )
        text = f"nothing is kept at {self._path}[{key!r}]; {self._have()}"
        raise (SiteNotFoundError if isinstance(key, str) else IndexError)(text)

    def __dir__(self) -> list[str]:
        return [step for step in self._children if isinstance(step, str) and step.isidentifier()]

    def __call__(self) -> NoReturn:
        """Refuse what would be a mapping's `values()`."""
        raise TypeError(
            "values is a tree of sites, not a method: values.….output; items() goes over the sites"
        )

    def __iter__(self) -> Iterator[Any]:
        """Go over the children; where there are none, over the rows of what is kept."""
        if self._leaf is not None and not self._children:
            return iter(self._leaf(None))
        return iter([_found(node) for node in self._children.values()])

    def __len__(self) -> int:
        return (
            len(self._children) if self._children or self._leaf is None else len(self._leaf(None))
        )

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<Values {self._path}: {self._have().removeprefix('there is ')}>"

    def _ipython_key_completions_(self) -> list[Step]:
        return list(self._children)

    def _have(self) -> str:
        shown = [f"[{step}]" if isinstance(step, int) else step for step in self._children]
        if self._leaf is not None:
            shown.append("positions in brackets")
        return f"there is {listed(shown)}" if shown else "nothing is there"


def _found(node: Values) -> Any:  # noqa: ANN401
    """Return a node, or the value itself where nothing but the whole of it is kept."""
    whole = getattr(node._leaf, "only", None)
    return node if whole is None or node._children else whole


def steps_of(path: _core.Path) -> tuple[Step, ...]:
    """Return the steps from the root to a site: `transformer`, `h`, 2, `output`."""
    steps: list[Step] = [step for step in path.steps if isinstance(step, int | str)]
    steps.append(path.port)
    if path.call:
        steps.append(f"@{path.call}")
    steps.extend(path.elements)
    return (*steps, "grad") if path.grad else tuple(steps)


def grow(entries: Iterable[tuple[_core.Path, Leaf]]) -> Values:
    """Return the tree of sites, children in the order in which they come."""
    root = Values("model")
    for path, leaf in entries:
        node = root
        for step in steps_of(path):
            if step not in node._children:
                shown = f"[{step}]" if isinstance(step, int) else f".{step}"
                node._children[step] = Values(node._path + shown.replace(".@", "@"))
            node = node._children[step]
        node._leaf = leaf
    return root
