"""Paths and directories as people type them: taken, or refused with a hint at what was meant."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lamina import _core
from lamina.errors import DiskError, PathError, SiteNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["read_path", "store_directory", "wildcards_explained"]


def read_path(text: str | _core.Path) -> _core.Path:
    """Return the path that a text spells.

    Raises:
        PathError: It is no path; if it only lacks the leading `model`, the message says so.

    >>> read_path("transformer.h[3].output")
    Traceback (most recent call last):
        ...
    lamina.errors.PathError: invalid path `transformer.h[3].output` at byte 0: expected `model`, \
found `transformer`; did you mean `model.transformer.h[3].output`?
    """
    if not isinstance(text, str):
        return text
    try:
        return _core.Path(text)
    except PathError as error:
        try:
            meant = _core.Path(f"model.{text}")
        except PathError:
            raise error from None
        raise PathError(f"{error}; did you mean `{meant}`?") from None


@contextmanager
def wildcards_explained(path: _core.Path) -> Iterator[None]:
    """Say what stands for all modules where `*` was tried and names none."""
    try:
        yield
    except SiteNotFoundError as error:
        if "*" not in path.steps:
            raise
        meant = path.text.replace(".*", "[:]")
        raise SiteNotFoundError(f"{error}; for every module write `[:]`: `{meant}`") from None


def store_directory(given: str | os.PathLike[str]) -> str:
    """Return where a store is, or is to be.

    Raises:
        DiskError: There is a file.
    """
    directory = os.fspath(given)
    if os.path.isfile(directory):  # noqa: PTH113  pathlib is slow to import
        raise DiskError(f"{directory} is a file; a store is a directory", errno.ENOTDIR, directory)
    return directory
