"""Prompts as they are given, one after another: texts, token ids, dicts, columns, iterators.

Nothing here needs the model, and nothing keeps more than a few hundred prompts: whatever can be
iterated is read once, from its start. What cannot be told apart safely is refused with the form
that can: one text for a list of texts, padded ids without a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from lamina.errors import PromptError
from lamina.wording import listed, shape_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids: TypeAlias = NDArray[np.uint32]

__all__ = ["Given", "read_prompts"]

_NOTHING = object()


@dataclass(frozen=True, slots=True)
class Given:
    """One prompt as it was given.

    Attributes:
        ids: Its token ids, pads removed, or None where only the text was given.
        text: Its text, or None where only ids were given.
    """

    ids: Ids | None
    text: str | None


def read_prompts(prompts: object) -> Iterator[Given]:
    """Yield the prompts in order, checked.

    Args:
        prompts: Texts, lists or one-dimensional tensors of token ids, dicts with `input_ids` (and
            perhaps `attention_mask`) or `text`, in any iterable; a batch with its mask, as a
            tokenizer returns it; or one one-dimensional tensor, which is one prompt.

    Raises:
        PromptError: Something is no prompt; the message names it and shows the form that works.
    """
    for number, item in enumerate(_several(prompts)):
        yield item if isinstance(item, Given) else _single(item, f"prompt {number}")


def _several(prompts: object) -> Iterator[object]:
    if isinstance(prompts, str):
        raise PromptError(f"prompts is a single text; for one prompt write [{_short(prompts)}]")
    if _is_array(prompts):
        return _array(prompts)
    if isinstance(prompts, Mapping):
        return _batch(prompts)
    if type(prompts).__name__ == "DataFrame":
        raise PromptError("prompts is a DataFrame; give one column of it")
    if isinstance(prompts, set | frozenset):
        raise PromptError("prompts is a set, which has no order; give a list")
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable):
        raise PromptError(
            f"prompts is {_kind(prompts)}; give a list of texts or of token id lists, "
            f"a datasets column, or an iterator of them"
        )
    items = iter(prompts)
    first = next(items, _NOTHING)
    if first is _NOTHING:
        return iter(())
    if _is_integer(first):
        shown = list(prompts)[:4] if isinstance(prompts, list | tuple) else [int(str(first))]
        dots = ", …" if isinstance(prompts, list | tuple) and len(prompts) > 4 else ""
        inner = ", ".join(str(token) for token in shown)
        raise PromptError(f"prompts is a single list of token ids; write [[{inner}{dots}]]")
    return chain([first], items)


def _single(item: object, name: str) -> Given:
    if isinstance(item, str):
        return Given(None, _text(str(item), name))
    if isinstance(item, Mapping):
        return _from_mapping(item, name)
    if _is_array(item) or isinstance(item, list | tuple):
        return Given(_ids(item, name), None)
    raise PromptError(
        f"{name} is {_kind(item)}; a prompt is a text, a list or one-dimensional tensor of "
        f"token ids, or a dict with 'input_ids' or 'text'"
    )


def _from_mapping(item: Mapping[Any, Any], name: str) -> Given:
    text = item.get("text")
    if text is not None and not isinstance(text, str):
        raise PromptError(f"{name}: 'text' is {_kind(text)}; expected a text")
    kept = None if text is None else _text(str(text), name)
    if item.get("input_ids") is None:
        if kept is None:
            raise _no_key(item, f"{name} is a dict that")
        return Given(None, kept)
    return Given(_masked(item["input_ids"], item.get("attention_mask"), name), kept)


def _array(prompts: object) -> Iterator[object]:
    shape = _shape(prompts)
    if len(shape) == 1 and _holds_integers(prompts):
        return iter([prompts])
    if len(shape) == 2 and _holds_integers(prompts):
        raise PromptError(
            f"prompts has shape {shape_text(shape)} and no attention mask, so padding cannot be "
            f"told from tokens; give {{'input_ids': …, 'attention_mask': …}} "
            f"or a list of one-dimensional tensors"
        )
    if len(shape) == 1:
        return iter(prompts)  # type: ignore[call-overload, no-any-return]
    raise PromptError(
        f"prompts is an array of shape {shape_text(shape)}; "
        f"expected one-dimensional token ids for one prompt, or a list of them"
    )


def _batch(batch: Mapping[Any, Any]) -> Iterator[object]:
    ids, mask, texts = batch.get("input_ids"), batch.get("attention_mask"), batch.get("text")
    if ids is None and texts is None:
        if batch and all(hasattr(part, "column_names") for part in batch.values()):
            raise PromptError(
                f"prompts is a set of splits ({listed(batch)}); give one of them, or its column"
            )
        raise _no_key(batch, "prompts is a dict that")
    if ids is None:
        if texts is None or isinstance(texts, str):
            return iter([_from_mapping(batch, "prompt 0")])
        return iter(texts)
    if _is_array(ids) and len(_shape(ids)) == 2:
        if mask is None:
            return _array(ids)  # refused there
        if not _is_array(mask) or _shape(mask) != _shape(ids):
            found = shape_text(_shape(mask)) if _is_array(mask) else _kind(mask)
            raise PromptError(
                f"attention_mask is {found} and input_ids {shape_text(_shape(ids))}; "
                f"they must have one shape"
            )
        return _rows(ids, mask, texts)
    if not _is_array(ids) and len(ids) and not _is_integer(ids[0]):
        if mask is not None and len(mask) != len(ids):
            raise PromptError(f"attention_mask has {len(mask)} rows and input_ids {len(ids)}")
        return _rows(ids, mask, texts)
    return iter([_from_mapping(batch, "prompt 0")])


def _rows(ids: Any, mask: Any, texts: Any) -> Iterator[Given]:  # noqa: ANN401
    if texts is not None and (isinstance(texts, str) or len(texts) != len(ids)):
        raise PromptError(f"'text' does not have one text for each of the {len(ids)} prompts")
    for number in range(len(ids)):
        name = f"prompt {number}"
        text = None if texts is None else _text(texts[number], name)
        row = None if mask is None else mask[number]
        yield Given(_masked(ids[number], row, name), text)


def _masked(value: object, mask: object, name: str) -> Ids:
    import numpy as np

    if mask is None:
        return _ids(value, name)
    given = _numbers(value, name)
    real = np.asarray(_host(mask))
    if given.ndim == 2 and len(given) == 1 and real.shape == given.shape:
        given, real = given[0], real[0]
    if real.shape != given.shape:
        raise PromptError(
            f"{name}: attention_mask has shape {shape_text(real.shape)} and "
            f"input_ids {shape_text(given.shape)}"
        )
    if given.ndim != 1:
        raise PromptError(
            f"{name} has shape {shape_text(given.shape)}: it is a batch, not one prompt"
        )
    places = np.flatnonzero(real)
    if len(places) and int(places[-1]) - int(places[0]) + 1 != len(places):
        raise PromptError(f"{name}: the attention mask has padding between real tokens")
    return _ids(given[places], name)


def _ids(value: object, name: str) -> Ids:
    import numpy as np

    given = _numbers(value, name)
    if given.ndim != 1:
        raise PromptError(
            f"{name} has shape {shape_text(given.shape)}; expected one-dimensional token ids "
            f"(a batch needs its attention_mask: {{'input_ids': …, 'attention_mask': …}})"
        )
    if not len(given):
        return np.zeros(0, dtype=np.uint32)
    if given.dtype.kind not in "iu":
        raise PromptError(f"{name} holds {given.dtype} values; token ids are integers")
    least, most = int(given.min()), int(given.max())
    if least < 0 or most > 0xFFFF_FFFF:
        wrong = least if least < 0 else most
        raise PromptError(f"{name} has token id {wrong}; token ids lie between 0 and 4294967295")
    return given.astype(np.uint32)


def _numbers(value: object, name: str) -> NDArray[Any]:
    import numpy as np

    try:
        return np.asarray(_host(value))
    except (TypeError, ValueError) as error:
        raise PromptError(f"{name} is no list of token ids: {error}") from None


def _host(value: object) -> object:
    return value.detach().cpu().numpy() if _is_tensor(value) else value  # type: ignore[attr-defined]


def _text(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise PromptError(f"{name}: 'text' is {_kind(text)}; expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} is no valid Unicode: a lone surrogate at character {error.start}"
        ) from None
    return text


def _no_key(item: Mapping[Any, Any], what: str) -> PromptError:
    keys = f"has {listed(map(repr, item))}" if item else "is empty"
    return PromptError(
        f"{what} {keys}; expected 'input_ids' or 'text' (of a dataset, give the column: "
        f"dataset['name'])"
    )


def _is_tensor(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def _is_array(value: object) -> bool:
    return _is_tensor(value) or type(value).__name__ == "ndarray"


def _shape(value: object) -> list[int]:
    return [int(size) for size in value.shape]  # type: ignore[attr-defined]


def _holds_integers(value: object) -> bool:
    text = str(value.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
    return text.lstrip("u").startswith("int")


def _is_integer(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool)
    return hasattr(value, "__index__") and not getattr(value, "shape", ())


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "…")


def _kind(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
