"""Making a store of tensors from anywhere, no model needed."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager, suppress
from operator import index
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np

from lamina import _core
from lamina.dtypes import dtype_name, row_bytes
from lamina.errors import (
    ClosedError,
    IdentityError,
    InputError,
    LaminaError,
    SiteError,
    SiteNotFoundError,
    StoreExistsError,
    StoreNotFoundError,
)
from lamina.prompts import UNKNOWN_TOKEN
from lamina.spelling import read_path, store_directory
from lamina.tensors import as_bytes, as_integers
from lamina.wording import bytes_text, counted, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    import torch
    from numpy.typing import NDArray

    from lamina.positions import Positions

__all__ = ["Writer", "append", "create"]

Integers: TypeAlias = "Sequence[int] | NDArray[Any] | torch.Tensor"
"""Integers in one dimension, one after another."""

SiteFacts: TypeAlias = "tuple[int | Sequence[int], object]"
"""The shape of a row and its dtype: `(768, "bfloat16")`, `((12, 64), torch.float32)`."""

_MAKER = "lamina.create"


def create(
    to: str | os.PathLike[str],
    sites: Mapping[str, SiteFacts],
    *,
    identity: Mapping[str, Any] | None = None,
    recorded: Mapping[str, Any] | None = None,
    positions: int | Sequence[int] | slice | str | None = None,
    texts: bool = False,
    shard_bytes: int = 1 << 30,
    commit_seconds: float = 60.0,
) -> Writer:
    """Begin a new store, and return the writer that fills it.

    Args:
        to: A directory that is missing or empty.
        sites: Each site's path with the shape of a row and its dtype. A single number is a
            one-dimensional shape, `()` one number a row. Paths are kept as typed (in canonical
            form) and come in structural order: layer 2 before layer 10.
        identity: What decides later whether these numbers can be reused: fields of your own with
            JSON values. `append` compares them.
        recorded: What else should be known of them; kept, never compared.
        positions: Which tokens of each prompt will be given, such as `-1` or `"-4:"`; all of
            them otherwise.
        texts: Whether each prompt's text will be given and kept.
        shard_bytes: How large a file grows at most.
        commit_seconds: An `append` commits at its end, if so many seconds have passed since the
            last commit.

    Raises:
        StoreExistsError: There is a store already; `lamina.append` continues one.
        ForeignDirectoryError: The directory holds something else.
        StoreInUseError: Another writer holds it.
        PathError: A path cannot be read.
        SiteError: A path stands for several sites, has a position, or comes twice.
        DtypeError: No store can hold the dtype.

    >>> import lamina as lm, numpy as np, tempfile
    >>> directory = tempfile.mkdtemp()
    >>> site = "model.layers[7].output"
    >>> with lm.create(directory, sites={site: (4, "float32")}, identity={"run": 1}) as writer:
    ...     rows = np.zeros((5, 4), dtype=np.float32)
    ...     writer.append({site: rows}, tokens=[1, 2, 3, 1, 9], lengths=[3, 2])
    >>> with lm.append(directory, identity={"run": 1}) as writer:
    ...     writer.append({site: rows[:2]}, tokens=[4, 5])
    >>> lm.open(directory).rows, len(lm.open(directory).prompts)
    (7, 3)
    """
    from lamina.positions import parse_positions

    directory = store_directory(to)
    declared = _declared(sites)
    fields = _json(identity, "identity")
    wanted = parse_positions(positions)
    about = {
        "recorded": {**_json(recorded, "recorded"), "made_by": _MAKER},
        "options": {"positions": wanted.text, "texts": texts, "shard_bytes": shard_bytes},
        "structure": {},
    }
    if shard_bytes <= 0 or commit_seconds < 0:
        raise InputError("shard_bytes must be positive, and commit_seconds not negative")
    if _core.probe(directory) == "store":
        raise StoreExistsError(
            f"{directory} is a store already: lamina.append(...) continues it, "
            f"and `rm -r {directory}` removes it"
        )
    with _claimed(directory) as core:
        if core.has_store:  # made between the look and the lock
            raise StoreExistsError(f"{directory} is a store already")
        core.begin(
            declared,
            identity=json.dumps(fields),
            about=json.dumps(about),
            rows_total=None,
            shard_bytes=shard_bytes,
            texts=texts,
            commit_seconds=commit_seconds,
        )
        return Writer(core, wanted, texts=texts)


def append(
    to: str | os.PathLike[str],
    *,
    identity: Mapping[str, Any] | None = None,
    commit_seconds: float = 60.0,
) -> Writer:
    """Continue a store that `create` began, and return the writer that adds to it.

    What was committed stays; what an interrupted writer had not committed is gone. The store
    counts as not complete until this writer ends.

    Args:
        to: The store.
        identity: The same fields and values as were given to `create`.
        commit_seconds: As for `create`.

    Raises:
        StoreNotFoundError: There is no store there.
        IdentityError: Some fields differ; the message names them, with both values.
        StoreInUseError: Another writer holds it.
        InputError: A capture made the store; only the same capture can continue it.
    """
    from lamina.positions import parse_positions

    directory = store_directory(to)
    if _core.probe(directory) in ("missing", "empty"):
        raise StoreNotFoundError(f"{directory} holds no store; lamina.create(...) begins one")
    with _claimed(directory) as core:
        if not core.has_store:
            raise StoreNotFoundError(
                f"{directory} was begun and holds no version; lamina.create(...) begins it again"
            )
        found = _core.Store.open(directory)
        about = json.loads(found.about)
        if about.get("recorded", {}).get("made_by") != _MAKER:
            raise InputError(
                f"{directory} was made by a capture: run the same capture again to continue it"
            )
        _compare(directory, json.loads(found.identity), _json(identity, "identity"))
        core.resume(rows_total=None, commit_seconds=commit_seconds)
        options = about["options"]
        return Writer(core, parse_positions(options["positions"]), texts=bool(options["texts"]))


@contextmanager
def _claimed(directory: str) -> Iterator[_core.Writer]:
    """Yield the one writer of a directory; an error gives it back."""
    core = _core.Writer(directory)
    try:
        yield core
    except BaseException:
        core.close()
        raise


class Writer:
    """Fills a store; `create` and `append` make one.

    As a context manager it commits when the block ends well, and marks the store complete. An
    exception in the block abandons what was not committed; earlier commits stay.

    Attributes:
        directory: Where the store is.
        sites: Canonical path, dtype and shape of a row of each site, in order.
    """

    def __init__(self, core: _core.Writer, positions: Positions, *, texts: bool) -> None:
        self._core = core
        self._wanted = positions
        self._texts = texts
        self._open = True
        self._ended = (0, 0, 0)  # rows, prompts and version when the writer ended
        self.directory: str = os.fspath(core.directory)
        self.sites: list[tuple[str, str, tuple[int, ...]]] = core.sites
        self._order = {path: at for at, (path, _, _) in enumerate(self.sites)}
        self._index = _core.SiteIndex([path for path, _, _ in self.sites])

    @property
    def rows(self) -> int:
        """How many rows were appended, committed or not, those found by `append` included."""
        return self._core.rows if self._open else self._ended[0]

    @property
    def prompts(self) -> int:
        """How many prompts were appended, as `rows`."""
        return self._core.prompts if self._open else self._ended[1]

    @property
    def version(self) -> int:
        """The version last committed."""
        return self._core.version if self._open else self._ended[2]

    def append(
        self,
        columns: Mapping[str, object],
        *,
        tokens: Integers | None = None,
        lengths: Integers | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        """Add prompts: some rows of every site, all with the same tokens.

        Args:
            columns: Each site's rows, `[rows, *feature]`, in the dtype declared: tensors of torch
                on any device, NumPy arrays, anything with DLPack or the buffer protocol. They are
                read before this returns.
            tokens: The token ids of these prompts, one after another. All of them, also where
                the store keeps only some positions. Without `lengths` they are one prompt.
            lengths: Tokens per prompt. Without it and without `tokens`, each row is a prompt of
                its own, with no ids.
            texts: One text per prompt, for a store that keeps texts.

        Raises:
            SiteNotFoundError: A path names no site of this store.
            InputError: A site is missing, a shape does not fit, or lengths do not add up.
            DtypeError: A tensor has another dtype than the site.
            PositionError: A prompt lacks a position that the store keeps.
            DiskFullError: There is no room; what was committed stays.
            ClosedError: The writer has ended.
        """
        self.flush()
        buffers, rows = self._columns(columns)
        ids, sizes = _prompts(tokens, lengths, rows, self._wanted.is_all)
        counts, positions = _rows(sizes, self._wanted, self._core.prompts)
        if int(counts.sum()) != rows:
            per = "" if self._wanted.is_all else f", of which [{self._wanted}] are "
            total = counted(int(counts.sum()), "row")
            raise InputError(
                f"lengths add up to {counted(int(sizes.sum()), 'token')}{per or ', so '}{total}, "
                f"and the tensors have {counted(rows, 'row')}"
            )
        if self._texts != (texts is not None):
            raise InputError(
                "this store keeps texts: give texts=, one per prompt"
                if self._texts
                else "this store keeps no texts; create(..., texts=True) makes one that does"
            )
        if texts is not None and (isinstance(texts, str) or len(texts) != len(sizes)):
            given = "a single text" if isinstance(texts, str) else counted(len(texts), "text")
            raise InputError(f"{given} for {counted(len(sizes), 'prompt')}")
        if not len(sizes):
            return
        if ids is None:
            row_tokens = np.full(rows, UNKNOWN_TOKEN, dtype=np.uint32)
        else:
            starts = np.repeat(np.cumsum(sizes) - sizes, counts)
            row_tokens = ids[starts + positions].astype(np.uint32)
        self._core.append(
            buffers,
            tokens=row_tokens,
            positions=positions.astype(np.uint32),
            flags=np.zeros(rows, dtype=np.uint8),
            prompt_rows=counts.astype(np.uint64),
            prompt_lengths=(np.zeros_like(sizes) if ids is None else sizes).astype(np.uint64),
            prompt_ids=np.empty(0, np.uint32) if ids is None else ids.astype(np.uint32),
            texts=None if texts is None else list(texts),
        )

    def flush(self) -> None:
        """Hand everything appended so far to the operating system, uncommitted.

        `append` does so before it returns, so there is nothing left to wait for. Only `commit`
        makes rows visible to readers and safe from a crash.

        Raises:
            ClosedError: The writer has ended.
        """
        if not self._open:
            raise ClosedError(f"the writer of {self.directory} has ended")

    def commit(self) -> None:
        """Make everything appended so far the next version: durable, and visible to readers.

        Raises:
            ClosedError: The writer has ended.
        """
        self.flush()
        self._core.commit()

    def close(self) -> None:
        """Commit, mark the store complete, and release it; nothing if the writer has ended."""
        if self._open:
            rows, prompts, version = self._ended = (self.rows, self.prompts, self.version)
            self._open = False
            try:
                self._core.finish()
            finally:
                self._core.close()
            with suppress(LaminaError):  # gone meanwhile: the version before is the last known
                version = _core.Store.open(self.directory).version
            self._ended = (rows, prompts, version)

    def abandon(self) -> None:
        """End without committing: what was appended since the last commit is gone."""
        if self._open:
            self._ended = (self.rows, self.prompts, self.version)
            self._open = False
            self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def __repr__(self) -> str:
        state = f"{counted(self.rows, 'row')} so far" if self._open else "ended"
        row = bytes_text(row_bytes(self.sites))
        sites = counted(len(self.sites), "site")
        return f"<Writer {self.directory}: {sites}, {row} a row, {state}>"

    def _columns(self, columns: Mapping[str, object]) -> tuple[list[NDArray[np.uint8]], int]:
        """Return every site's bytes in the order of the store, and how many rows they have."""
        if not hasattr(columns, "items"):
            kind = type(columns).__name__
            raise InputError(f"append takes a dict from each site to its rows, not a {kind}")
        given: dict[int, object] = {}
        for path, values in columns.items():
            at = self._order.get(path)
            if at is None:
                found = self._index.find(path)
                if len(found) != 1 or found[0][1] is not None:
                    raise SiteNotFoundError(
                        f"{path} is no single site of {self.directory}, "
                        f"which has {listed(self._order, most=4)}"
                    )
                at = found[0][0]
            if at in given:
                raise InputError(f"{path} is given twice, as {self.sites[at][0]}")
            given[at] = values
        missing = [path for path, at in self._order.items() if at not in given]
        if missing:
            raise InputError(f"rows are missing for {listed(missing, most=4)}")
        buffers, rows = [], -1
        for at, (path, dtype, feature) in enumerate(self.sites):
            buffer, here = as_bytes(given[at], path, dtype, feature)
            if rows not in (-1, here):
                raise InputError(
                    f"{path} has {counted(here, 'row')}, {self.sites[0][0]} has {rows:,}: "
                    "all sites need the same rows"
                )
            rows = here
            buffers.append(buffer)
        return buffers, rows


def _prompts(
    tokens: Integers | None,
    lengths: Integers | None,
    rows: int,
    every: bool,  # noqa: FBT001
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64]]:
    """Return token ids and how many each prompt has."""
    ids = None if tokens is None else as_integers(tokens, "tokens", UNKNOWN_TOKEN - 1)
    if lengths is None:
        if ids is None:
            return None, np.ones(rows, dtype=np.int64)
        return ids, np.array([len(ids)], dtype=np.int64)
    sizes = as_integers(lengths, "lengths", 2**32 - 1)
    if ids is None and not every:
        raise InputError("a store of some positions needs tokens=, not lengths= alone")
    if ids is not None and int(sizes.sum()) != len(ids):
        raise InputError(
            f"lengths add up to {counted(int(sizes.sum()), 'token')}, and tokens holds {len(ids):,}"
        )
    return ids, sizes


def _rows(
    sizes: NDArray[np.int64], wanted: Positions, first: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many rows each prompt has, and the position of each row."""
    from lamina.positions import select

    return select(sizes, wanted, first_prompt=first)


def _declared(sites: Mapping[str, SiteFacts]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return path, dtype and shape of each site, in structural order."""
    if not sites:
        raise InputError("sites is empty: a store needs at least one")
    if not hasattr(sites, "items"):
        raise InputError(
            f"sites is a {type(sites).__name__}; expected a dict from each path to the shape of a "
            "row and its dtype: {'model.layers[7].output': (768, 'bfloat16')}"
        )
    declared: dict[_core.Path, tuple[str, str, tuple[int, ...]]] = {}
    for text, facts in sites.items():
        path = read_path(text)
        if not path.is_concrete:
            raise SiteError(f"{text} stands for several sites; a store needs each by itself")
        if path.position is not None:
            raise SiteError(f"{text} has a position; positions= says which tokens a store keeps")
        if path.elements and isinstance(last := path.elements[-1], int) and last < 0:
            raise SiteError(
                f"{text}: an element has no negative number; for last tokens pass positions={last}"
            )
        if path in declared:
            raise SiteError(f"{text} comes twice, as {path}")
        try:
            shape, dtype = facts
            size = (index(shape),) if hasattr(shape, "__index__") else tuple(map(index, shape))
        except (TypeError, ValueError):
            size = (0,)
        if any(length < 1 for length in size):
            raise InputError(
                f"{text}: expected the shape of a row and its dtype, such as (768, 'bfloat16') or "
                f"((12, 64), 'float32'), got {facts!r}"
            ) from None
        declared[path] = (str(path), dtype_name(dtype), size)
    return [declared[path] for path in sorted(declared)]


def _json(fields: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """Return fields as they come back from a file."""
    if fields is not None and not hasattr(fields, "items"):
        raise InputError(f"{what}={fields!r}: {what} is a dict of names to values")
    try:
        plain = json.loads(json.dumps(dict(fields or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be fields with JSON values: {error}") from None
    if not all(isinstance(name, str) for name in fields or {}):
        raise InputError(f"{what} must have texts for names")
    return dict(plain)


def _compare(directory: str, stored: dict[str, Any], given: dict[str, Any]) -> None:
    from lamina.identity import differing

    fields = differing(stored, given)
    if fields:
        lines = [
            f"  {name}: the store has {_value(stored, name)}, given is {_value(given, name)}"
            for name in fields
        ]
        raise IdentityError("\n".join([f"{directory} holds something else:", *lines]), fields)


def _value(fields: dict[str, Any], name: str) -> str:
    text = json.dumps(fields[name], ensure_ascii=False) if name in fields else "nothing"
    return text if len(text) <= 80 else f"{text[:79]}…"
