"""Every exception that lamina raises, in one tree.

::

    LaminaError                        kind
    ├── PathError (ValueError)         "path"            text that is no path
    ├── SiteNotFoundError (KeyError)   "site-not-found"  a path that names nothing here
    ├── SiteError (ValueError)         "site"            a site that cannot be captured or patched
    ├── PositionError (IndexError)     "position"        a position that some prompt or row lacks
    ├── PromptError (ValueError)       "prompt"          prompts that cannot be used as given
    ├── InputError (ValueError)        "input"           an argument that does not fit
    ├── DtypeError (TypeError)         "dtype"           a dtype that is unknown or cannot be had
    ├── CastOverflowError (ArithmeticError) "overflow"   finite values became infinite in a cast
    ├── IdentityError (ValueError)     "identity"        the store holds something else
    ├── ClosedError (ValueError)       "closed"          a writer that has ended
    └── StoreError                     "store"
        ├── StoreNotFoundError (FileNotFoundError)  "store-not-found"
        ├── StoreExistsError (FileExistsError)      "store-exists"
        ├── ForeignDirectoryError (FileExistsError) "foreign-directory"  holds something not ours
        ├── StoreNotReadyError         "store-not-ready"   no version is committed yet
        ├── StoreInUseError            "store-in-use"      another writer holds it
        ├── FormatVersionError         "format-version"    written by a newer lamina
        ├── VersionNotFoundError (LookupError)      "version-not-found"
        ├── CorruptError               "corrupt"           bytes differ from their checksum
        │   └── MissingShardError      "missing-shard"
        └── DiskError (OSError)        "disk"              the system refused; errno, path
            └── DiskFullError          "disk-full"

``kind`` is stable text: it never changes for a class, and new classes only add to it.
"""

from typing import ClassVar, Self

__all__ = [
    "CastOverflowError",
    "ClosedError",
    "CorruptError",
    "DiskError",
    "DiskFullError",
    "DtypeError",
    "ForeignDirectoryError",
    "FormatVersionError",
    "IdentityError",
    "InputError",
    "LaminaError",
    "MissingShardError",
    "PathError",
    "PositionError",
    "PromptError",
    "SiteError",
    "SiteNotFoundError",
    "StoreError",
    "StoreExistsError",
    "StoreInUseError",
    "StoreNotFoundError",
    "StoreNotReadyError",
    "VersionNotFoundError",
]


class LaminaError(Exception):
    """The root of lamina's exceptions."""

    kind: ClassVar[str] = "lamina"

    def __str__(self) -> str:
        """Return the message itself (`KeyError` would return its repr)."""
        return str(self.args[0]) if self.args else ""


class PathError(LaminaError, ValueError):
    """A text is not a path; the message gives the byte, what was expected and what was found."""

    kind = "path"


class SiteNotFoundError(LaminaError, KeyError):
    """A path names no site here; the message lists the nearest that exist."""

    kind = "site-not-found"


class SiteError(LaminaError, ValueError):
    """A site exists but cannot be captured or patched: its shape, its call, or never reached."""

    kind = "site"


class PositionError(LaminaError, IndexError):
    """A position lies outside some prompts, or was not stored for them."""

    kind = "position"


class PromptError(LaminaError, ValueError):
    """Prompts cannot be used as given: empty, too long, without a mask or a tokenizer."""

    kind = "prompt"


class InputError(LaminaError, ValueError):
    """An argument does not fit: a tensor's shape, lengths that do not add up, an option."""

    kind = "input"


class DtypeError(LaminaError, TypeError):
    """A dtype is unknown, or cannot be had where it was asked for."""

    kind = "dtype"


class CastOverflowError(LaminaError, ArithmeticError):
    """Finite values became infinite when cast to the stored dtype."""

    kind = "overflow"


class IdentityError(LaminaError, ValueError):
    """A store holds something else than what was asked for.

    Attributes:
        fields: The differing fields, each with what the store holds and what was given.
    """

    kind = "identity"

    def __init__(
        self, message: str, fields: dict[str, tuple[object, object]] | None = None
    ) -> None:
        super().__init__(message)
        self.fields: dict[str, tuple[object, object]] = fields or {}


class ClosedError(LaminaError, ValueError):
    """A writer was used after it had ended, or after an error ended it."""

    kind = "closed"


class StoreError(LaminaError):
    """Something about a store as a whole."""

    kind = "store"


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store in this directory."""

    kind = "store-not-found"


class StoreExistsError(StoreError, FileExistsError):
    """A new store was asked for where one is already."""

    kind = "store-exists"


class ForeignDirectoryError(StoreError, FileExistsError):
    """A directory holds files that are not lamina's; nothing was touched."""

    kind = "foreign-directory"


class StoreNotReadyError(StoreError):
    """A store is being begun; it has no committed version yet."""

    kind = "store-not-ready"


class StoreInUseError(StoreError):
    """Another writer holds the store; the message says which process, where, since when."""

    kind = "store-in-use"


class FormatVersionError(StoreError):
    """A store was written in a format that this version of lamina does not know."""

    kind = "format-version"


class VersionNotFoundError(StoreError, LookupError):
    """The version asked for does not exist any more, or not yet."""

    kind = "version-not-found"


class CorruptError(StoreError):
    """Bytes on disk are not those that were written; the message says which and what they hold."""

    kind = "corrupt"


class MissingShardError(CorruptError):
    """A shard that the manifest names is not there."""

    kind = "missing-shard"


class DiskError(StoreError, OSError):
    """The operating system refused a disk operation.

    Attributes:
        errno: The system's error number, or None.
        filename: The path concerned.
    """

    kind = "disk"

    def __init__(self, message: str, errno: int | None = None, filename: str | None = None) -> None:
        super().__init__(message)
        self.errno = errno
        self.filename = filename

    def __reduce__(self) -> tuple[type[Self], tuple[str, int | None, str | None]]:
        """Keep the facts when another process gets the error."""
        return type(self), (str(self), self.errno, self.filename)


class DiskFullError(DiskError):
    """There is not enough room: what is needed and what is free stand in the message."""

    kind = "disk-full"
