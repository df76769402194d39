"""What a person sees while a capture runs: the size first, then a line with rates and an ETA.

Written to a terminal or a notebook only; where standard error goes elsewhere nothing is printed.
What a person should know about their data in any case (prompts cut, values that overflowed) is
logged instead.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, TextIO

from lamina.wording import bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Progress", "count_text", "duration_text"]

LOGGER = logging.getLogger("lamina")
REDRAW_SECONDS = 0.1
RATE_SECONDS = 30.0


class Progress:
    """One capture's progress line.

    Args:
        show: Whether to show anything at all.
        stream: Where to; standard error by default.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        *,
        show: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._active = show and _is_seen(self._stream)
        self._drawn = 0.0
        self._width = 0
        self._total = self._total_bytes = 0
        self._done = self._done_bytes = 0
        self._marks: deque[tuple[float, int, int]] = deque()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._active:
            self._erase()
            print(text, file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Log what a person should know, whether or not progress is shown."""
        self._erase()
        LOGGER.warning(text)

    def reading(self, prompts: int, tokens: int) -> None:
        """Show how far the pass over the prompts has come."""
        self._draw(f"reading prompts  {prompts:,} prompts  {count_text(tokens)} tokens")

    def start(self, *, total: int, total_bytes: int, done: int = 0, done_bytes: int = 0) -> None:
        """Begin the capture itself.

        Args:
            total: Tokens in all.
            total_bytes: Bytes of rows in all.
            done: Tokens of windows that an earlier run committed.
            done_bytes: Bytes of their rows.
        """
        self._total, self._total_bytes = total, total_bytes
        self._done, self._done_bytes = done, done_bytes
        self._marks.append((self._clock(), done, done_bytes))

    def advance(self, tokens: int, row_bytes: int) -> None:
        """Count what a batch computed."""
        self._done += tokens
        self._done_bytes += row_bytes
        now = self._clock()
        while len(self._marks) > 1 and now - self._marks[0][0] > RATE_SECONDS:
            self._marks.popleft()
        if now - self._marks[-1][0] >= REDRAW_SECONDS:
            self._marks.append((now, self._done, self._done_bytes))
        self._draw(self._line(now))

    def finish(self, text: str) -> None:
        """End the line with what became of the capture."""
        self.say(text)

    def clear(self) -> None:
        """Take the line away."""
        self._erase()

    def _line(self, now: float) -> str:
        since, tokens, row_bytes = self._marks[0]
        seconds = max(now - since, 1e-9)
        rate = (self._done - tokens) / seconds
        speed = (self._done_bytes - row_bytes) / seconds
        share = self._done / self._total if self._total else 1.0
        left = duration_text((self._total - self._done) / rate) if rate else "?"
        filled = int(share * 10)
        return (
            f"{share:6.1%} [{'#' * filled}{' ' * (10 - filled)}] "
            f"{count_text(self._done)}/{count_text(self._total)} tokens  "
            f"{count_text(rate)} tok/s  {bytes_text(speed)}/s  ETA {left}"
        )

    def _draw(self, text: str) -> None:
        now = self._clock()
        if not self._active or now - self._drawn < REDRAW_SECONDS:
            return
        self._drawn = now
        room = shutil.get_terminal_size().columns - 1
        shown = text[:room]
        self._stream.write("\r" + shown + " " * max(0, min(self._width, room) - len(shown)))
        self._stream.flush()
        self._width = len(shown)

    def _erase(self) -> None:
        if self._active and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


def _is_seen(stream: TextIO) -> bool:
    """Return whether a person sees the stream as it grows: a terminal, or a notebook's output."""
    in_notebook = type(stream).__module__.partition(".")[0] == "ipykernel"
    return in_notebook or bool(getattr(stream, "isatty", lambda: False)())


def count_text(count: float) -> str:
    """Return a count in three digits or so.

    >>> count_text(999), count_text(12_345), count_text(2_500_000)
    ('999', '12.3k', '2.5M')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / (1e3 if letter == 'k' else size):.1f}{letter}"
    return f"{count:.0f}"


def duration_text(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds.

    >>> duration_text(62), duration_text(3_725)
    ('1:02', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
