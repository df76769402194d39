"""Opening a store and reading what it holds.

NumPy and torch are imported where numbers are wanted: opening a store and saying what it holds
take a few milliseconds without them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeAlias

from lamina import _core
from lamina.dtypes import row_bytes
from lamina.errors import InputError, PathError, SiteNotFoundError
from lamina.spelling import read_path, store_directory, wildcards_explained
from lamina.wording import bytes_text, counted, listed, shape_text

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from lamina.column import Column, Position, Several
    from lamina.prompts import Prompts
    from lamina.saved import SavedActivation
    from lamina.values import Values

__all__ = ["Columns", "Store", "Verification", "open"]

Targets: TypeAlias = "str | _core.Path | Sequence[str | _core.Path]"
"""A path or pattern, or several."""


def open(directory: str | os.PathLike[str], *, version: int | None = None) -> Store:
    """Open a store to read it, also while it is being written.

    Reads the newest manifest and nothing else. Takes no lock and writes nothing.

    Args:
        directory: Where the store is.
        version: An earlier version; the newest and the one before it are kept.

    Raises:
        StoreNotFoundError: There is no store there.
        StoreNotReadyError: It is being begun; nothing is committed yet.
        VersionNotFoundError: That version is gone, or never was.
        FormatVersionError: A newer lamina wrote it.
        CorruptError: The manifest is damaged; the message names the file.
        ForeignDirectoryError: The directory holds something else.

    >>> import lamina as lm, numpy as np, tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with lm.create(directory, sites={"model.h[0].output": (2, "float32")}) as writer:
    ...     rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    ...     writer.append({"model.h[0].output": rows}, tokens=[5, 6, 7], lengths=[1, 2])
    >>> store = lm.open(directory)
    >>> store["model.h[0].output"].tensor
    tensor([[0., 1.],
            [2., 3.],
            [4., 5.]])
    >>> store["model.h[0].output[-1]"].numpy().tolist()
    [[0.0, 1.0], [4.0, 5.0]]
    """
    return Store(_core.Store.open(store_directory(directory), version))


class Store:
    """What was computed at some sites of a model, row by row: a mapping from paths to columns.

    Iteration, `keys()`, `items()` and `len()` go over the sites, in the order in which the model
    computes them. `store[path]` takes any spelling of a site, with or without a position, and
    patterns. One object shows one version; `refresh()` moves it to a newer one.
    """

    def __init__(self, core: _core.Store) -> None:
        self._adopt(core)

    def _adopt(self, core: _core.Store) -> None:
        about: dict[str, dict[str, Any]] = json.loads(core.about)
        self._core = core
        self._recorded = about.get("recorded", {})
        self._options = about.get("options", {})
        self._lengths: dict[str, int] = about.get("containers", {})
        self._identity: dict[str, Any] = json.loads(core.identity)
        self._prompts: Prompts | None = None
        self._index: _core.SiteIndex | None = None
        self._tree: Values | None = None
        self._tokens: NDArray[np.int64] | None = None
        self._positions: NDArray[np.int64] | None = None

    @cached_property
    def _facts(self) -> list[tuple[str, str, tuple[int, ...]]]:
        # Not needed to read one column, and slow with thousands of sites.
        return self._core.sites

    # ── What it is ───────────────────────────────────────────────────────────────────────────────

    @property
    def directory(self) -> str:
        """Where it is, as it was given."""
        return os.fspath(self._core.directory)

    @property
    def version(self) -> int:
        """The version that this object shows; every commit makes the next."""
        return self._core.version

    @property
    def complete(self) -> bool:
        """Whether what makes the store has finished."""
        return self._core.complete

    @property
    def identity(self) -> dict[str, Any]:
        """What decides whether these numbers can be reused, as fields with JSON values; a copy."""
        return dict(self._identity)

    @property
    def recorded(self) -> dict[str, Any]:
        """What else is known of its making: names, versions, device; never compared; a copy."""
        return dict(self._recorded)

    @property
    def options(self) -> dict[str, Any]:
        """The options it is made with, which a resume takes from here; a copy."""
        return dict(self._options)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites as canonical texts, in the order in which the model computes them."""
        return tuple(site for site, _, _ in self._facts)

    @property
    def rows(self) -> int:
        """How many rows each column has."""
        return self._core.rows

    @property
    def prompts(self) -> Prompts:
        """The prompts: `store.prompts[3].rows`, `.ids`, `.positions`, `.text`."""
        from lamina.prompts import Prompts

        if self._prompts is None:
            self._prompts = Prompts(self._core, stored=self._options.get("positions"))
        return self._prompts

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The token id of every row, int64 `[rows]`; -1 where the producer gave none.

        Read at the first use; the array belongs to this object, so copy it before changing it.
        """
        import numpy as np

        from lamina.prompts import UNKNOWN_TOKEN

        if self._tokens is None:
            tokens = np.asarray(self._core.row_table(0, self.rows)[0]).astype(np.int64)
            tokens[tokens == UNKNOWN_TOKEN] = -1
            self._tokens = tokens
        return self._tokens

    @property
    def positions(self) -> NDArray[np.int64]:
        """The position of every row in its own prompt, int64 `[rows]`; as `tokens` otherwise."""
        import numpy as np

        if self._positions is None:
            self._positions = np.asarray(self._core.row_table(0, self.rows)[1]).astype(np.int64)
        return self._positions

    @property
    def shards(self) -> list[tuple[str, int, int, int, int, int, bool]]:
        """The files: name, first row, rows, first prompt, prompts, bytes, whether full."""
        return self._core.shards

    @property
    def nbytes(self) -> int:
        """The bytes of all columns, tables and checksums not counted."""
        return row_bytes(self._facts) * self.rows

    # ── Columns ──────────────────────────────────────────────────────────────────────────────────

    # As in typeshed: `Columns` only for patterns, so the union itself would burden every caller.
    def __getitem__(self, target: str | _core.Path) -> Column | Any:  # noqa: ANN401
        """Return the column of a site or target, or those of a pattern, in order.

        Each call makes new columns, each with one private mapping of its own.

        Raises:
            PathError: The text is no path.
            SiteNotFoundError: It names nothing here; the message lists the nearest sites.
            PositionError: A prompt lacks the position, or it was not stored.
        """
        found, pattern = self.find(target)
        columns = [self._column(index, position) for index, position in found]
        return Columns(self, columns) if pattern else columns[0]

    @property
    def values(self) -> Values:
        """The same by attribute and index: `store.values.transformer.h[2].output[-1]`."""
        from lamina.values import grow

        if self._tree is None:
            self._tree = grow(
                (_core.Path(site), partial(self._column, index))
                for index, (site, _, _) in enumerate(self._facts)
            )
        return self._tree

    def keys(self) -> tuple[str, ...]:
        """Return the sites, as `sites`."""
        return self.sites

    def items(self) -> Iterator[tuple[str, Column]]:
        """Return each site with its column, in order."""
        for index, (site, _, _) in enumerate(self._facts):
            yield site, self._column(index, None)

    def get(self, target: str, default: object = None) -> object:
        """Return `store[target]`, or the default where no site is found."""
        try:
            return self[target]
        except SiteNotFoundError:
            return default

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self._facts)

    def __bool__(self) -> bool:
        return True

    def __contains__(self, target: object) -> bool:
        if not isinstance(target, str | _core.Path):
            return False
        try:
            self.find(target)
        except (PathError, SiteNotFoundError):
            return False
        return True

    def gather(
        self,
        sites: Targets,
        rows: int | slice | Several,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return rows of several sites in one pass, as a copy: `[n, site, *feature]`.

        Sites of different dtypes or shapes come as a dict, site by site: `[n, *feature]` each.

        Args:
            sites: Paths or patterns without positions; the order given is the order returned.
            rows: A slice, or a list, array, tensor or mask of rows; `n` stands for its shape.
            out: Where to put it: contiguous, on the CPU, of just this dtype and shape.

        Raises:
            SiteNotFoundError: A path names nothing here.
            PositionError: A row lies outside the store.
            InputError: A path has a position, or `out` does not fit.
        """
        from lamina.gather import gather

        indices: list[int] = []
        for found, position in self._targets(sites):
            if position not in (None, slice(None)):
                raise InputError(
                    f"gather takes sites and rows; {self._text(found, position)} has a position: "
                    "use store[...] or store.load(...), or rows from store.prompts.rows_at(...)"
                )
            indices.append(found)
        return gather(self._core, [(index, self._facts[index]) for index in indices], rows, out)

    def load(
        self, targets: Targets, *, prompts: int | slice | Several | None = None
    ) -> SavedActivation:
        """Return what is kept at some targets as a `SavedActivation`: a copy, every byte verified.

        `[-1]` and other single positions give `[prompts, *feature]`, a list of them one target
        each. Without a position, or with a slice, `[rows, *feature]`, prompt by prompt.

        Args:
            targets: Paths or patterns with positions, such as `model.layers[:].output[-1]`.
            prompts: Which prompts, in which order; None for all.

        Raises:
            SiteNotFoundError: A path names nothing here.
            PositionError: A prompt lacks the position, or it was not stored.
            CorruptError: Bytes differ from their checksum.
        """
        from lamina.saved import load

        return load(self._core, self.prompts, self._targets(targets), prompts, self._identity)

    # ── The store as a whole ─────────────────────────────────────────────────────────────────────

    def refresh(self) -> bool:
        """Move to the newest version of the store, and return whether there was a newer one.

        Columns made before keep showing what they showed; row numbers never change.
        """
        newer = self._core.newer()
        if newer is not None:
            self._adopt(newer)
        return newer is not None

    def verify(
        self, *, threads: int = 0, progress: Callable[[int, int], None] | None = None
    ) -> Verification:
        """Read every byte of every shard, and return what is damaged.

        Args:
            threads: How many; 0 for as many as there are cores.
            progress: Called now and then with the bytes done and the bytes in all.
        """
        if threads < 0:
            raise InputError(f"threads={threads}: expected a number of threads, or 0 for all cores")
        started = time.monotonic()
        damage = self._core.verify(threads, progress)
        return Verification(
            damage=tuple(damage),
            shards=len(self._core.shards),
            nbytes=sum(shard[5] for shard in self._core.shards),
            seconds=time.monotonic() - started,
        )

    def info(self) -> dict[str, Any]:
        """Return what `lamina info --json` prints: the facts about the store, as JSON values."""
        from lamina.summary import facts

        return facts(self._core, self._identity, self._recorded, self._options)

    def __repr__(self) -> str:
        from lamina.summary import as_text

        return as_text(self.info())

    def _repr_html_(self) -> str:
        from lamina.summary import as_html

        return as_html(self.info())

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (self.directory, self.version)

    # ── Looking paths up ─────────────────────────────────────────────────────────────────────────

    def find(self, target: str | _core.Path) -> tuple[list[tuple[int, Position]], bool]:
        """Return the sites that a target stands for, each with its position, and if a pattern.

        Sites are numbers into `sites`, in order.

        Raises:
            PathError: The text is no path.
            SiteNotFoundError: It names nothing here; the message lists the nearest sites.
        """
        exact = self._core.site_index(target) if isinstance(target, str) else None
        if exact is not None:
            return [(exact, None)], False
        if self._index is None:
            self._index = _core.SiteIndex(list(self.sites), self._lengths)
        path = read_path(target)
        several = any(isinstance(step, slice | list) for step in path.steps)
        with wildcards_explained(path):
            return self._index.find(path.text), several or isinstance(path.call, slice)

    def _targets(self, targets: Targets) -> list[tuple[int, Position]]:
        several = [targets] if isinstance(targets, str | _core.Path) else targets
        return [found for target in several for found in self.find(target)[0]]

    def _text(self, index: int, position: Position) -> str:
        return str(_core.Path(self._core.site_at(index)[0]).at(position))

    def _column(self, index: int, position: Position) -> Column:
        if position == slice(None):
            position = None  # all of it, as a view
        from lamina.column import Column

        facts = self._core.site_at(index)
        path = facts[0] if position is None else self._text(index, position)
        return Column(self._core, self.prompts, index, facts, path, position)


class Columns(Mapping[str, "Column"]):
    """The columns that a pattern stands for, in the order of the sites: path to column."""

    def __init__(self, store: Store, columns: Sequence[Column]) -> None:
        self._store = store
        self._columns = {column.path: column for column in columns}

    def __getitem__(self, path: str) -> Column:
        if path in self._columns:
            return self._columns[path]
        found, _ = self._store.find(path)
        for index, position in found if len(found) == 1 else ():
            text = self._store._text(index, position)
            if text in self._columns:
                return self._columns[text]
        raise SiteNotFoundError(f"{path} is not among {listed(self._columns, most=4)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        lines = [f"<Columns: {counted(len(self), 'column')}>"]
        lines += [
            f"  {column.path}  {shape_text(column.shape)} {column.dtype}"
            for column in self._columns.values()
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Verification:
    """What `Store.verify` found; printed, it lists the damage.

    Attributes:
        damage: Each damaged block: `.shard`, `.site`, `.row_start`, `.row_stop`, `.prompt_start`,
            `.prompt_stop` (rows and prompts of the store) and `.message`.
        shards: How many files were read.
        nbytes: Their bytes.
        seconds: The time it took.
    """

    damage: tuple[_core.Damage, ...]
    shards: int
    nbytes: int
    seconds: float

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    def __str__(self) -> str:
        read = f"{bytes_text(self.nbytes)} in {counted(self.shards, 'shard')}"
        if self.intact:
            return f"intact: {read} verified in {self.seconds:.1f} s"
        lines = [f"damaged: {counted(len(self.damage), 'block')} of {read}"]
        lines += [
            f"  {each.shard}  {each.site}  rows {each.row_start}:{each.row_stop}, "
            f"prompts {each.prompt_start}:{each.prompt_stop}  {each.message}"
            for each in self.damage
        ]
        return "\n".join(lines)


def _reopened(directory: str, version: int) -> Store:
    """Return a store that another process pickled."""
    return open(directory, version=version)
