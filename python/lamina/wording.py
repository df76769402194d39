"""How sizes, counts and lists are written for people."""

from collections.abc import Iterable, Sequence

__all__ = ["bytes_text", "counted", "listed", "module_text", "shape_text"]

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def bytes_text(count: float) -> str:
    """Return a number of bytes in the unit that suits it, 1000 to the next.

    >>> bytes_text(999), bytes_text(838_860_800), bytes_text(1_500)
    ('999 B', '838.9 MB', '1.5 kB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    unit = 0
    while count >= 999.95 and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.1f} {_UNITS[unit]}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun.

    >>> counted(1, "prompt"), counted(24310, "row")
    ('1 prompt', '24,310 rows')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listed(items: Iterable[object], *, most: int = 8) -> str:
    """Return items as running text, the first few of them if there are many.

    >>> listed([3]), listed([3, 9, 12]), listed(range(100), most=3)
    ('3', '3, 9 and 12', '0, 1, 2 and 97 more')
    """
    texts = [str(item) for item in items]
    if len(texts) > most + 1:
        texts = [*texts[:most], f"{len(texts) - most:,} more"]
    if len(texts) < 2:
        return "".join(texts)
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def module_text(name: str) -> str:
    """Return a module's name, as `named_modules()` gives it, as it stands in paths.

    >>> module_text("model.layers.3.mlp"), module_text("")
    ('model.model.layers[3].mlp', 'model')
    """
    parts = name.split(".") if name else []
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)


def shape_text(shape: Sequence[int | str]) -> str:
    """Return a shape in brackets.

    >>> shape_text([10, 768]), shape_text(["rows", 768]), shape_text([])
    ('[10, 768]', '[rows, 768]', '[]')
    """
    return f"[{', '.join(str(size) for size in shape)}]"
