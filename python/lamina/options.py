"""The options of a capture that a store records: how its rows were cut, batched and kept.

Not given means: for a new store the default, for one that is there what it was begun with. Defaults
are constants; none depends on the machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from operator import index
from typing import TYPE_CHECKING, Any, Self

from lamina.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LAYOUT", "Options"]

LAYOUT = frozenset({"shard_bytes", "texts"})
"""Options that are settled by a store's first version, before any window is done."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "padding": ("right", "left", "none"),
    "short": ("error", "drop"),
    "empty": ("error", "skip"),
    "overflow": ("report", "error"),
}
_LEAST = {"batch_size": 1, "window_bytes": 1, "shard_bytes": 1 << 12, "max_length": 1}


@dataclass(frozen=True, slots=True)
class Options:
    """Recorded options with their defaults.

    Attributes:
        batch_size: Prompts per forward.
        padding: The side on which shorter prompts of a batch are padded.
        max_length: Prompts are cut to this many tokens; None cuts none.
        truncate: Whether prompts over the model's own limit are cut to it.
        short: What happens to prompts too short for a position.
        empty: What happens to prompts without tokens.
        overflow: What happens when a cast makes a finite value infinite.
        texts: Whether the prompts' texts are kept, where every prompt has one.
        window_bytes: How many bytes of rows a window may hold (one batch at least).
        window_batches: How many batches of prompts a window may hold, so that a crash costs little
            where rows are small too. No argument sets it; it is recorded for later versions.
        shard_bytes: How many bytes of rows a full shard may hold.
    """

    batch_size: int = 32
    padding: str = "right"
    max_length: int | None = None
    truncate: bool = False
    short: str = "error"
    empty: str = "error"
    overflow: str = "report"
    texts: bool = True
    window_bytes: int = 1 << 28
    window_batches: int = 8
    shard_bytes: int = 1 << 30

    @classmethod
    def settle(cls, given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> Self:
        """Return the options in force: given ones, else the store's, else the defaults.

        Args:
            given: Options by name; None stands for not given.
            stored: What a store was begun with, or None where there is none.

        Raises:
            InputError: An option has a value it cannot have.
        """
        values: dict[str, Any] = {}
        for item in fields(cls):
            if given.get(item.name) is not None:
                values[item.name] = _checked(item.name, given[item.name])
            elif stored is not None and item.name in stored:
                values[item.name] = stored[item.name]
        return cls(**values)

    def differing(self, stored: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the options that differ from a store's, each with the stored value and this."""
        return {
            name: (stored[name], value)
            for name, value in asdict(self).items()
            if name in stored and stored[name] != value
        }


def _checked(name: str, value: Any) -> Any:  # noqa: ANN401
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            choices = " or ".join(map(repr, _CHOICES[name]))
            raise InputError(f"{name}={value!r}: expected {choices}")
        return value
    if name in _LEAST:
        try:
            number = index(value)
        except TypeError:
            raise InputError(f"{name}={value!r}: expected an integer") from None
        if isinstance(value, bool) or number < _LEAST[name]:
            raise InputError(f"{name}={value!r}: expected at least {_LEAST[name]:,}")
        return number
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r}: expected True or False")
    return value
