"""lamina: an activation store for PyTorch language models.

Run a model once, keep what it computed, and use it for months::

    import lamina as lm

    store = lm.capture(model, prompts, "model.layers[:].output", to="acts/")
    store = lm.open("acts/")  # another day, another process
    store["model.layers[7].output"].tensor  # [rows, d], mapped, nothing read yet
    store["model.layers[7].output[-1]"].tensor  # [prompts, d]: each prompt's last token
    saved = store.load("model.layers[24].output[-1]", prompts=[0])
    with lm.patched(model, saved):
        model(**batch)

`import lamina` itself is quick: torch, transformers and nnsight are imported where they are first
needed, and not at all for looking into a store.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.capture import capture as capture
    from lamina.column import Column as Column
    from lamina.errors import CastOverflowError as CastOverflowError
    from lamina.errors import ClosedError as ClosedError
    from lamina.errors import CorruptError as CorruptError
    from lamina.errors import DiskError as DiskError
    from lamina.errors import DiskFullError as DiskFullError
    from lamina.errors import DtypeError as DtypeError
    from lamina.errors import ForeignDirectoryError as ForeignDirectoryError
    from lamina.errors import FormatVersionError as FormatVersionError
    from lamina.errors import IdentityError as IdentityError
    from lamina.errors import InputError as InputError
    from lamina.errors import LaminaError as LaminaError
    from lamina.errors import MissingShardError as MissingShardError
    from lamina.errors import PathError as PathError
    from lamina.errors import PositionError as PositionError
    from lamina.errors import PromptError as PromptError
    from lamina.errors import SiteError as SiteError
    from lamina.errors import SiteNotFoundError as SiteNotFoundError
    from lamina.errors import StoreError as StoreError
    from lamina.errors import StoreExistsError as StoreExistsError
    from lamina.errors import StoreInUseError as StoreInUseError
    from lamina.errors import StoreNotFoundError as StoreNotFoundError
    from lamina.errors import StoreNotReadyError as StoreNotReadyError
    from lamina.errors import VersionNotFoundError as VersionNotFoundError
    from lamina.identity import OpaqueWarning as OpaqueWarning
    from lamina.identity import RoundingWarning as RoundingWarning
    from lamina.prompts import Prompt as Prompt
    from lamina.replay import patched as patched
    from lamina.saved import SavedActivation as SavedActivation
    from lamina.store import Store as Store
    from lamina.store import open as open
    from lamina.writer import Writer as Writer
    from lamina.writer import append as append
    from lamina.writer import create as create

_HOMES = {
    "Column": "column",
    "Prompt": "prompts",
    "OpaqueWarning": "identity",
    "RoundingWarning": "identity",
    "SavedActivation": "saved",
    "Store": "store",
    "Writer": "writer",
    "append": "writer",
    "capture": "capture",
    "create": "writer",
    "open": "store",
    "patched": "replay",
}
_ERRORS = (
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
)
_HOMES |= dict.fromkeys(_ERRORS, "errors")

__all__ = [
    "__version__",
    *_HOMES,
]


def __getattr__(name: str) -> object:
    """Return a public name, imported when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import version

        found: object = version("lamina")
    elif name in _HOMES:
        found = getattr(import_module(f"lamina.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'lamina' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)


class _Package(ModuleType):
    """This module: `lamina.capture` stays the function when `lamina/capture.py` is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
