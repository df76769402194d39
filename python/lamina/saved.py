"""`SavedActivation`: what one run computed, under the addresses where another can use it."""

from __future__ import annotations

import html
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lamina import _core
from lamina.column import as_torch
from lamina.errors import InputError, SiteNotFoundError
from lamina.wording import bytes_text, counted, listed, shape_text

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from lamina.column import Position, Several
    from lamina.prompts import Prompts
    from lamina.values import Values

__all__ = ["SavedActivation", "load"]


class _Entry(NamedTuple):
    """One target: the site, the position, its tensor and, where rows vary, rows per prompt."""

    site: str
    position: Position
    tensor: torch.Tensor
    lengths: NDArray[np.int64] | None


class SavedActivation(Mapping[str, "torch.Tensor"]):
    """Tensors under their targets, in the order in which the model computes the sites.

    A target is a site at a position; its tensor is `[prompts, *feature]` and a copy of its own.
    A target without a position, or with a slice, holds `[rows, *feature]`, prompt by prompt, with
    `lengths`. `store.load(...)` makes one; `lm.patched(model, saved)` puts it into a run.

    >>> import lamina as lm, numpy as np, tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with lm.create(directory, sites={"model.h[0].output": (2, "float32")}) as writer:
    ...     rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    ...     writer.append({"model.h[0].output": rows}, tokens=[5, 6, 7], lengths=[1, 2])
    >>> saved = lm.open(directory).load("model.h[:].output[-1]")
    >>> saved
    <SavedActivation: 1 target, 16 B>
      model.h[0].output[-1]  [2, 2] float32
    >>> saved["model.h[0].output[-1]"]
    tensor([[0., 1.],
            [4., 5.]])
    """

    __slots__ = ("_entries", "_identity", "_index", "_tree")

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._identity: dict[str, Any] = {}
        self._index: tuple[_core.SiteIndex, list[list[str]]] | None = None
        self._tree: Values | None = None

    @classmethod
    def _of(cls, entries: Iterable[_Entry], identity: Mapping[str, Any]) -> SavedActivation:
        saved = cls()
        saved._entries = {_text(entry.site, entry.position): entry for entry in entries}
        saved._identity = dict(identity)
        return saved

    @property
    def identity(self) -> dict[str, Any]:
        """What made the numbers: the identity of the store they come from; a copy."""
        return dict(self._identity)

    @property
    def lengths(self) -> dict[str, NDArray[np.int64]]:
        """Rows per prompt, for the targets that hold several of each: target to int64 array."""
        return {
            path: entry.lengths.copy()
            for path, entry in self._entries.items()
            if entry.lengths is not None
        }

    @property
    def values(self) -> Values:
        """The same by attribute and index: `saved.values.transformer.h[2].output[10]`."""
        from lamina.values import grow

        if self._tree is None:
            sites: dict[str, _Site] = {}
            for entry in self._entries.values():
                sites.setdefault(entry.site, _Site(entry.site)).add(entry)
            self._tree = grow((_core.Path(site), kept) for site, kept in sites.items())
        return self._tree

    def keys(self) -> KeysView[str]:
        """Return the targets as canonical texts, in order."""
        return super().keys()

    def items(self) -> ItemsView[str, torch.Tensor]:
        """Return each target with its tensor, in order."""
        return super().items()

    def subset(self, paths: str | Sequence[str]) -> SavedActivation:
        """Return some of the targets, in the same order; tensors are shared.

        Args:
            paths: Targets or patterns. One without a position takes all positions of its sites.

        Raises:
            SiteNotFoundError: A path names no target here; the message lists those that exist.
        """
        wanted: set[str] = set()
        for path in [paths] if isinstance(paths, str) else paths:
            found = self._find(path)
            if not found:
                raise self._unknown(path)
            wanted.update(found)
        kept = (entry for path, entry in self._entries.items() if path in wanted)
        return SavedActivation._of(kept, self._identity)

    def __getitem__(self, path: str) -> torch.Tensor:
        """Return the tensor of one target, in any spelling.

        Raises:
            SiteNotFoundError: Nothing is kept there.
        """
        if path in self._entries:
            return self._entries[path].tensor
        found = self._find(path)
        if len(found) != 1:
            raise self._unknown(path)
        return self._entries[found[0]].tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, path: object) -> bool:
        if path in self._entries:
            return True
        try:
            return isinstance(path, str) and len(self._find(path)) == 1
        except (InputError, SiteNotFoundError, ValueError):
            return False

    def __repr__(self) -> str:
        nbytes = sum(entry.tensor.nbytes for entry in self._entries.values())
        lines = [f"<SavedActivation: {counted(len(self), 'target')}, {bytes_text(nbytes)}>"]
        return "\n".join([*lines, *(f"  {path}  {facts}" for path, facts in self._facts())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(path)}</td>"
            f"<td style='text-align:left'>{html.escape(facts)}</td></tr>"
            for path, facts in self._facts()
        )
        caption = f"SavedActivation: {counted(len(self), 'target')}"
        return f"<table><caption><b>{caption}</b></caption>{rows}</table>"

    def _facts(self) -> Iterator[tuple[str, str]]:
        for path, entry in self._entries.items():
            tensor = entry.tensor
            where = "" if tensor.device.type == "cpu" else f" {tensor.device}"
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield path, f"{shape_text(tensor.shape)} {dtype}{where}"

    def _find(self, path: str) -> list[str]:
        """Return the targets kept that a path or pattern stands for."""
        if self._index is None:
            sites: dict[str, list[str]] = {}
            for text, entry in self._entries.items():
                sites.setdefault(entry.site, []).append(text)
            self._index = _core.SiteIndex(list(sites)), list(sites.values())
        index, targets = self._index
        found: list[str] = []
        for number, position in index.find(path):
            here = targets[number]
            exact = [text for text in here if self._entries[text].position == position]
            if not exact and isinstance(position, list):
                exact = [text for text in here if self._entries[text].position in position]
            if not exact and position in (None, slice(None)):
                exact = here
            found.extend(exact)
        return found

    def _unknown(self, path: str) -> SiteNotFoundError:
        kept = listed(self._entries, most=4) or "nothing"
        return SiteNotFoundError(f"{path} is no single target here; kept are {kept}")


class _Site:
    """What is kept of one site, as a leaf of the `values` tree."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.kept: list[_Entry] = []

    def add(self, entry: _Entry) -> None:
        self.kept.append(entry)

    @property
    def only(self) -> torch.Tensor | None:
        """The tensor, where the whole of the site is all that is kept of it."""
        if len(self.kept) == 1 and self.kept[0].position is None:
            return self.kept[0].tensor
        return None

    def __call__(self, position: Position) -> torch.Tensor:
        for entry in self.kept:
            if entry.position == position:
                return entry.tensor
        shown = "all positions" if position is None else f"position {_bracket(position)}"
        have = listed(_bracket(entry.position) for entry in self.kept)
        raise IndexError(f"{shown} of {self.path} is not kept; there is {have}")


def load(
    core: _core.Store,
    prompts: Prompts,
    targets: Iterable[tuple[int, Position]],
    chosen: int | slice | Several | None,
    identity: Mapping[str, Any],
) -> SavedActivation:
    """Return copies of what a store holds at some targets, every byte read verified.

    Args:
        core: The store.
        prompts: Its prompts.
        targets: Sites by number, each with a position; the order does not matter.
        chosen: Which prompts, in which order; None for all.
        identity: That of the store.
    """
    wanted: dict[tuple[int, str], tuple[int, Position]] = {}
    for index, position in targets:
        for each in position if isinstance(position, list) else [position]:
            each = None if each == slice(None) else each
            wanted.setdefault((index, repr(each)), (index, each))
    rows: dict[str, tuple[NDArray[np.int64], NDArray[np.int64] | None]] = {}
    sites = core.sites
    entries = []
    for index, position in sorted(wanted.values(), key=_order):
        site, _, feature = sites[index]
        if repr(position) not in rows:
            selection = prompts.select(position, chosen)
            several = not isinstance(position, int)
            rows[repr(position)] = (
                np.ascontiguousarray(selection.rows),
                selection.lengths if several else None,
            )
        here, lengths = rows[repr(position)]
        tensor = as_torch(core.gather([index], here, verify=True)[0])
        entries.append(_Entry(site, position, tensor.reshape(len(here), *feature), lengths))
    return SavedActivation._of(entries, identity)


def _order(target: tuple[int, Position]) -> tuple[int, int, int]:
    """Sites in their order; of one site the whole, then slices, then positions, -1 before 0."""
    index, position = target
    kind = 0 if position is None else 1 if isinstance(position, slice) else 2
    return index, kind, position if isinstance(position, int) else 0


def _text(site: str, position: Position) -> str:
    return site if position is None else str(_core.Path(site).at(position))


def _bracket(position: Position) -> str:
    if isinstance(position, slice):
        start, stop = ("" if each is None else each for each in (position.start, position.stop))
        step = "" if position.step is None else f":{position.step}"
        return f"[{start}:{stop}{step}]"
    return "[:]" if position is None else f"[{position}]".replace("[[", "[").replace("]]", "]")
