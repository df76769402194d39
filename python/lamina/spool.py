"""The spool: all prompts as token ids, in files beside the store, before the model runs.

What must be known first comes from it: errors of input, the exact size, identity, and where each
row will stand. Memory holds a few hundred prompts at a time. A spool is used again only if it was
finished and its bytes still have the digest it was finished with.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lamina.errors import DiskError, DiskFullError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    import numpy as np
    from numpy.typing import NDArray

    from lamina.tokens import Tokenised

__all__ = ["Spool", "Summary", "digest_prompts", "write_spool"]

IDS, LENGTHS, TEXTS, TEXT_LENGTHS = "ids.u32", "lengths.u64", "texts.utf8", "text_lengths.u64"
FINISHED = "finished.json"
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Summary:
    """What one pass over the prompts found.

    Attributes:
        prompts: How many there are, skipped ones counted.
        tokens: How many tokens they have together.
        digest: Of all lengths and token ids.
        text_bytes: Bytes of the kept texts, or None where they are not kept.
        text_digest: Of the kept texts, or None.
    """

    prompts: int
    tokens: int
    digest: str
    text_bytes: int | None
    text_digest: str | None


class _Digest:
    """Hashes lengths and ids as they come; how they are grouped does not show."""

    def __init__(self) -> None:
        self.lengths = hashlib.blake2b(digest_size=32)
        self.ids = hashlib.blake2b(digest_size=32)

    def text(self) -> str:
        both = hashlib.blake2b(self.lengths.digest() + self.ids.digest(), digest_size=16)
        return "blake2b:" + both.hexdigest()


class _Pass:
    """Counts and hashes the prompts of one pass, and writes them where files are given."""

    def __init__(self, directory: Path | None, *, texts: bool) -> None:
        self.prompts = self.tokens = self.text_bytes = 0
        self.digest = _Digest()
        self.text_digest = hashlib.blake2b(digest_size=16)
        self.texts = texts and directory is not None
        self.files: dict[str, BinaryIO] = {}
        if directory is not None:
            names = (IDS, LENGTHS, TEXTS, TEXT_LENGTHS) if texts else (IDS, LENGTHS)
            for name in names:
                self.files[name] = (directory / name).open("xb")

    def add(self, group: list[Tokenised]) -> None:
        import numpy as np

        lengths = np.array([len(prompt.ids) for prompt in group], dtype="<u8").tobytes()
        ids = np.concatenate([prompt.ids for prompt in group]).astype("<u4", copy=False).tobytes()
        self.prompts += len(group)
        self.tokens += len(ids) // 4
        self.digest.lengths.update(lengths)
        self.digest.ids.update(ids)
        if not self.files:
            return
        self.files[LENGTHS].write(lengths)
        self.files[IDS].write(ids)
        if self.texts and any(prompt.text is None for prompt in group):
            self.texts = False  # texts are kept only where every prompt has one
        if self.texts:
            encoded = [(prompt.text or "").encode() for prompt in group]
            sizes = np.array([len(text) for text in encoded], dtype="<u8").tobytes()
            joined = b"".join(encoded)
            self.text_digest.update(joined)
            self.text_bytes += len(joined)
            self.files[TEXT_LENGTHS].write(sizes)
            self.files[TEXTS].write(joined)

    def summary(self) -> Summary:
        return Summary(
            prompts=self.prompts,
            tokens=self.tokens,
            digest=self.digest.text(),
            text_bytes=self.text_bytes if self.texts else None,
            text_digest="blake2b:" + self.text_digest.hexdigest() if self.texts else None,
        )

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def digest_prompts(groups: Iterable[list[Tokenised]]) -> Summary:
    """Read all prompts without writing anything."""
    counting = _Pass(None, texts=False)
    for group in groups:
        counting.add(group)
    return counting.summary()


def write_spool(directory: Path, groups: Iterable[list[Tokenised]], *, texts: bool) -> Summary:
    """Read all prompts into a new spool, replacing one that is there; not finished yet.

    Args:
        directory: The spool's own directory.
        groups: The prompts, as `tokens.tokenise` yields them.
        texts: Whether texts are kept (where every prompt has one).

    Raises:
        DiskError: The spool could not be written.
    """
    with _disk(directory):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        writing = _Pass(directory, texts=texts)
    try:
        for group in groups:
            with _disk(directory):
                writing.add(group)
        with _disk(directory):
            writing.close()
    finally:
        with _disk(directory):
            writing.close()
    summary = writing.summary()
    with _disk(directory):
        (directory / FINISHED).write_text(json.dumps(asdict(summary)), encoding="utf-8")
    return summary


class Spool:
    """A finished spool, read a run of prompts at a time.

    Args:
        directory: The spool's own directory.
        summary: What was written.
    """

    def __init__(self, directory: Path, summary: Summary) -> None:
        self.directory = directory
        self.summary = summary
        self._text_cursor = (0, 0)

    @classmethod
    def reopen(cls, directory: Path) -> Spool | None:
        """Return the spool in a directory, or None if it is not whole: then it is begun again."""
        try:
            summary = Summary(**json.loads((directory / FINISHED).read_text(encoding="utf-8")))
            spool = cls(directory, summary)
            return spool if spool._is_whole() else None
        except (OSError, ValueError, TypeError):
            return None

    def __len__(self) -> int:
        """Return how many prompts there are."""
        return self.summary.prompts

    def __getitem__(self, run: slice, /) -> NDArray[np.uint64]:
        """Return the lengths of a run of prompts."""
        start, stop, _ = run.indices(len(self))
        lengths: NDArray[np.uint64] = self._read(LENGTHS, "<u8", start, stop)
        return lengths

    def ids(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Return a run of token ids, counted over all prompts."""
        ids: NDArray[np.uint32] = self._read(IDS, "<u4", start, stop)
        return ids

    def texts(self, start: int, stop: int) -> list[str] | None:
        """Return the texts of a run of prompts, or None where they are not kept."""
        if self.summary.text_bytes is None:
            return None
        prompt, offset = self._text_cursor if self._text_cursor[0] <= start else (0, 0)
        while prompt < start:
            part = self._read(TEXT_LENGTHS, "<u8", prompt, min(start, prompt + READ_BYTES))
            prompt, offset = prompt + len(part), offset + int(part.sum())
        texts = []
        with _disk(self.directory), (self.directory / TEXTS).open("rb") as file:
            file.seek(offset)
            for size in self._read(TEXT_LENGTHS, "<u8", start, stop).tolist():
                texts.append(file.read(size).decode())
                offset += size
        self._text_cursor = (stop, offset)
        return texts

    def _read(self, name: str, kind: str, start: int, stop: int) -> NDArray[Any]:
        import numpy as np

        size = np.dtype(kind).itemsize
        with _disk(self.directory), (self.directory / name).open("rb") as file:
            file.seek(start * size)
            data = file.read((stop - start) * size)
        if len(data) != (stop - start) * size:
            raise DiskError(
                f"{self.directory / name} is shorter than it was", None, str(self.directory / name)
            )
        return np.frombuffer(data, dtype=kind)

    def _is_whole(self) -> bool:
        digest = _Digest()
        for name, hasher in ((LENGTHS, digest.lengths), (IDS, digest.ids)):
            for part in _parts(self.directory / name):
                hasher.update(part)
        if digest.text() != self.summary.digest:
            return False
        if self.summary.text_bytes is None:
            return True
        texts = hashlib.blake2b(digest_size=16)
        for part in _parts(self.directory / TEXTS):
            texts.update(part)
        sizes = (self.directory / TEXT_LENGTHS).stat().st_size
        whole = "blake2b:" + texts.hexdigest() == self.summary.text_digest
        return whole and sizes == 8 * self.summary.prompts


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            yield part


@contextmanager
def _disk(directory: Path) -> Iterator[None]:
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = DiskFullError if full else DiskError
        where = str(error.filename or directory)
        raise kind(f"cannot write {where}: {error.strerror}", error.errno, where) from error
