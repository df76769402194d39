"""Which tokens of a prompt are meant, and how prompts become a padded batch.

A position is a token's index in its own prompt, padding not counted: `0` is the first real token,
`-1` the last. Everything here is arithmetic on lengths and masks; no model is involved. Padding is
told by the mask alone, so a token equal to the pad token inside a prompt is a real token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Literal, TypeAlias

from lamina.errors import InputError, PositionError, PromptError
from lamina.wording import counted, listed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    Integers: TypeAlias = NDArray[np.int64]

__all__ = [
    "Batch",
    "Padding",
    "Positions",
    "Short",
    "columns_of",
    "make_batch",
    "parse_positions",
    "same_positions",
    "select",
    "spans",
]

Padding: TypeAlias = Literal["right", "left", "none"]
Short: TypeAlias = Literal["error", "drop"]

_INTEGER = re.compile(r"[+-]?\d+")
_SLICE = re.compile(r"([+-]?\d+)?:([+-]?\d+)?(?::([+-]?\d+)?)?")


@dataclass(frozen=True)
class Positions:
    """Positions in their one canonical form.

    Attributes:
        value: An index, a tuple of indices, or a slice with a positive step; all tokens is
            `slice(None)`.
    """

    value: int | tuple[int, ...] | slice

    @property
    def text(self) -> str:
        """The canonical text, which `parse_positions` reads back: `-1`, `0,-1`, `-4:`, `:`."""
        if isinstance(self.value, slice):
            start, stop, step = (
                "" if part is None else str(part)
                for part in (self.value.start, self.value.stop, self.value.step)
            )
            return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
        if isinstance(self.value, tuple):
            return ",".join(map(str, self.value)) + ("," if len(self.value) == 1 else "")
        return str(self.value)

    @property
    def is_all(self) -> bool:
        """Whether every token of a prompt is meant."""
        return isinstance(self.value, slice) and self.value == slice(None)

    def __hash__(self) -> int:
        """Return the hash of the text (a slice has none before Python 3.12)."""
        return hash(self.text)

    def __str__(self) -> str:
        """Return the canonical text."""
        return self.text


@dataclass(frozen=True)
class Batch:
    """What one forward is given; all tensors are int64, on the CPU, `[batch, sequence]`.

    Attributes:
        input_ids: The token ids, pads included.
        attention_mask: 1 for the prompts' own tokens, 0 for padding.
        position_ids: Each real token's index in its own prompt.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def parse_positions(value: int | Sequence[int] | slice | str | Positions | None) -> Positions:
    """Return the positions that a value stands for.

    Args:
        value: An index, a list of indices, a slice, their text (`"-4:"`, `"[-1]"`, `"0,5"`,
            `"all"`), or None for all tokens.

    Raises:
        InputError: The value is no position.

    Examples:
        >>> parse_positions("[-4:]").text
        '-4:'
    """
    if isinstance(value, Positions):
        return value
    if value is None:
        return Positions(slice(None))
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, slice):
        return _from_slice(value)
    if isinstance(value, bool):
        raise _no_position(value)
    try:
        return Positions(index(value))  # type: ignore[arg-type]
    except TypeError:
        pass
    try:
        items = tuple(_index(item, value) for item in value)  # type: ignore[union-attr]
    except TypeError:
        raise _no_position(value) from None
    if not items:
        raise InputError("positions is an empty list; None or ':' stands for all tokens")
    return Positions(items)


def same_positions(
    from_paths: int | Sequence[int] | slice | None,
    argument: int | Sequence[int] | slice | str | Positions | None,
) -> Positions:
    """Return the positions given in the paths and as an argument; both given must be equal.

    Raises:
        PositionError: Both were given, and they differ.
    """
    if argument is None:
        return parse_positions(from_paths)
    given = parse_positions(argument)
    if from_paths is not None and parse_positions(from_paths) != given:
        raise PositionError(
            f"the paths say [{parse_positions(from_paths)}] and positions= says [{given}]; "
            f"give one of them, or both alike"
        )
    return given


def select(
    lengths: Sequence[int] | Integers,
    positions: Positions,
    short: Short = "error",
    *,
    first_prompt: int = 0,
) -> tuple[Integers, Integers]:
    """Return how many tokens of each prompt are meant, and which: absolute, distinct, in order.

    Slices never raise: a prompt too short for one gives fewer rows, perhaps none.

    Args:
        lengths: Tokens per prompt.
        positions: Which tokens.
        short: What to do with prompts that lack a position: raise, or give them no rows.
        first_prompt: The number of the first prompt, for messages.

    Returns:
        Counts per prompt, and the positions of all prompts one after another.

    Raises:
        PositionError: Some prompts are too short, and `short` is `"error"`.
    """
    import numpy as np

    if short not in ("error", "drop"):
        raise InputError(f"short={short!r}: expected 'error' or 'drop'")
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if isinstance(positions.value, slice):
        start = _bound(positions.value.start, sizes, 0)
        stop = _bound(positions.value.stop, sizes, None)
        step = positions.value.step or 1
        counts = np.maximum((stop - start + step - 1) // step, 0)
        before = np.cumsum(counts) - counts
        within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(before, counts)
        return counts, np.repeat(start, counts) + step * within

    value = positions.value
    wanted = np.array(value if isinstance(value, tuple) else [value], dtype=np.int64)
    absolute = np.where(wanted < 0, wanted + sizes[:, None], wanted)
    lacking = ((absolute < 0) | (absolute >= sizes[:, None])).any(axis=1)
    if short == "error" and lacking.any():
        raise PositionError(_too_short(positions, np.flatnonzero(lacking), sizes, first_prompt))
    absolute.sort(axis=1)
    keep = np.ones(absolute.shape, dtype=bool)
    keep[:, 1:] = absolute[:, 1:] != absolute[:, :-1]
    keep[lacking] = False
    return keep.sum(axis=1, dtype=np.int64), absolute[keep]


def make_batch(
    ids: Sequence[Integers | Sequence[int]], padding: Padding = "right", pad_id: int | None = None
) -> Batch:
    """Return the prompts as one padded batch.

    Args:
        ids: Token ids, one sequence per prompt.
        padding: The side that is padded; `"none"` needs prompts of one length.
        pad_id: What fills the padding (0 if None); the mask hides it from the model.

    Raises:
        PromptError: No prompt, an empty prompt, or lengths that differ with `padding="none"`.
        InputError: `padding` is none of the three.
    """
    import numpy as np
    import torch

    if padding not in ("right", "left", "none"):
        raise InputError(f"padding={padding!r}: expected 'right', 'left' or 'none'")
    lengths = np.array([len(prompt) for prompt in ids], dtype=np.int64)
    if not len(lengths):
        raise PromptError("a batch needs at least one prompt")
    if not lengths.all():
        raise PromptError(f"prompt {int(lengths.argmin())} of the batch has no tokens")
    width = int(lengths.max())
    if padding == "none" and int(lengths.min()) != width:
        raise PromptError(
            f"padding='none' needs prompts of one length in a batch; these have "
            f"{listed(sorted(set(lengths.tolist())))} tokens (batch_size=1 always works)"
        )
    starts = width - lengths if padding == "left" else np.zeros_like(lengths)
    column = np.arange(width, dtype=np.int64)
    real = (column >= starts[:, None]) & (column < (starts + lengths)[:, None])
    tokens = np.full(real.shape, pad_id or 0, dtype=np.int64)
    tokens[real] = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in ids])
    # Pads on the right count on, so that position ids stay what the model itself would make.
    position_ids = np.maximum(column - starts[:, None], 0)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(real.astype(np.int64)),
        torch.from_numpy(position_ids),
    )


def spans(attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's first real column and its number of real tokens.

    Raises:
        InputError: The mask is not two-dimensional, has an empty row, or a hole inside a prompt.
    """
    if attention_mask.dim() != 2:
        raise InputError(
            f"the attention mask has shape {list(attention_mask.shape)}; expected [batch, sequence]"
        )
    real = attention_mask.ne(0)
    lengths = real.sum(dim=-1)
    starts = real.int().argmax(dim=-1)
    last = real.shape[1] - 1 - real.flip(-1).int().argmax(dim=-1)
    if bool((lengths == 0).any()):
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise InputError(f"rows {listed(rows)} of the attention mask have no real token")
    if bool((last - starts + 1 != lengths).any()):
        rows = (last - starts + 1 != lengths).nonzero().flatten().tolist()
        raise InputError(
            f"rows {listed(rows)} of the attention mask have padding between real tokens"
        )
    return starts, lengths


def columns_of(attention_mask: torch.Tensor, position: int) -> torch.Tensor:
    """Return the column of one position in every row, for left and right padding alike.

    Raises:
        PositionError: Some rows are too short; the message names them.
    """
    starts, lengths = spans(attention_mask)
    absolute = lengths + position if position < 0 else lengths.new_full(lengths.shape, position)
    lacking = (absolute < 0) | (absolute >= lengths)
    if bool(lacking.any()):
        rows = lacking.nonzero().flatten().tolist()
        tokens = lengths[rows].tolist()
        raise PositionError(
            f"row {rows[0]} has no token {position}; it has {counted(tokens[0], 'token')}"
            if len(rows) == 1
            else f"rows {listed(rows)} have no token {position}; they have {listed(tokens)} tokens"
        )
    return starts + absolute


def _parse_text(text: str) -> Positions:
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    inner = re.sub(r"\s*([,:])\s*", r"\1", inner.strip())
    if inner == "all":
        return Positions(slice(None))
    if _INTEGER.fullmatch(inner):
        return Positions(int(inner))
    if found := _SLICE.fullmatch(inner):
        return _from_slice(slice(*(int(part) if part else None for part in found.groups())))
    parts = inner.removesuffix(",").split(",")
    if all(_INTEGER.fullmatch(part) for part in parts):
        return Positions(tuple(map(int, parts)))
    raise _no_position(text)


def _from_slice(value: slice) -> Positions:
    parts = [
        None if part is None else _index(part, value)
        for part in (value.start, value.stop, value.step)
    ]
    start, stop, step = parts
    if step is not None and step <= 0:
        raise InputError(
            f"positions {_slice_text(value)}: the step must be positive (rows are in token order)"
        )
    return Positions(slice(None if start == 0 else start, stop, None if step == 1 else step))


def _slice_text(value: slice) -> str:
    return ":".join(
        "" if part is None else str(part) for part in (value.start, value.stop, value.step)
    )


def _index(item: object, value: object) -> int:
    if isinstance(item, bool):
        raise _no_position(value)
    try:
        return index(item)  # type: ignore[arg-type]
    except TypeError:
        raise _no_position(value) from None


def _no_position(value: object) -> InputError:
    return InputError(
        f"positions={value!r} is no position: expected an index, a list of indices, a slice, "
        f"or text such as '-1', '0,5' or '-4:'"
    )


def _bound(value: int | None, sizes: Integers, missing: int | None) -> Integers:
    import numpy as np

    if value is None:
        return sizes if missing is None else np.full_like(sizes, missing)
    return np.clip(sizes + value if value < 0 else np.full_like(sizes, value), 0, sizes)


def _too_short(positions: Positions, lacking: Integers, sizes: Integers, first: int) -> str:
    prompts = [f"{prompt + first} ({counted(int(sizes[prompt]), 'token')})" for prompt in lacking]
    return (
        f"position [{positions}] is outside {len(lacking)} of {counted(len(sizes), 'prompt')}: "
        f"{listed(prompts)}; short='drop' leaves them out"
    )
