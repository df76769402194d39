"""From prompts as given to token ids: the tokenizer, the model's limits, what is cut or skipped.

The tokenizer is asked for plain ids, without padding or truncation, many texts at a time, and is
left in the state it was in. A prompt that cannot be used is an error that names it, raised after
the pass so that it names all; cutting and skipping happen only when asked for, and are counted.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lamina.errors import PromptError
from lamina.intake import Given, read_prompts
from lamina.wording import counted, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lamina.intake import Ids

__all__ = ["Encoder", "Limits", "Tally", "Tokenised", "model_length_limit", "tokenise"]

PROMPTS_AT_A_TIME = 256
CHARACTERS_AT_A_TIME = 1 << 20
NAMED = 8


@dataclass(frozen=True, slots=True)
class Tokenised:
    """One prompt's token ids, and its text where it was given as one."""

    ids: Ids
    text: str | None


@dataclass(slots=True)
class Tally:
    """Prompts that something happened to: how many, and the first of them with their lengths."""

    count: int = 0
    first: list[tuple[int, int]] = field(default_factory=list)

    def add(self, prompt: int, tokens: int) -> None:
        """Count a prompt."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append((prompt, tokens))

    def text(self, *, lengths: bool = True) -> str:
        """Return the prompts' numbers as running text, with their lengths if asked."""
        named = [
            f"{prompt} ({tokens:,})" if lengths else str(prompt) for prompt, tokens in self.first
        ]
        if self.count > len(named):
            named.append(f"{self.count - len(named):,} more")
        return listed(named, most=NAMED + 1)


@dataclass(slots=True)
class Limits:
    """What a prompt may be, and what became of those that are otherwise.

    Attributes:
        length: The most tokens of a prompt, or None.
        named: How messages call that limit.
        truncate: Whether longer prompts are cut to it.
        empty: What happens to prompts without tokens: "error" or "skip".
        vocabulary: Token ids must be below this, or None.
        truncated: The prompts that were cut, with their former lengths.
        skipped: The prompts without tokens.
        too_long: The prompts that are refused for their length.
    """

    length: int | None = None
    named: str = "the model's limit"
    truncate: bool = False
    empty: str = "error"
    vocabulary: int | None = None
    truncated: Tally = field(default_factory=Tally)
    skipped: Tally = field(default_factory=Tally)
    too_long: Tally = field(default_factory=Tally)

    def check(self, prompts: int) -> None:
        """Raise for what must not be in a capture, once all prompts were seen.

        Raises:
            PromptError: No prompts, empty ones, or some that are too long.
        """
        if not prompts:
            raise PromptError("there are no prompts: the list or iterator is empty")
        if self.skipped.count and self.empty == "error":
            verb = "has" if self.skipped.count == 1 else "have"
            raise PromptError(
                f"{counted(self.skipped.count, 'prompt')} {verb} no tokens: "
                f"{self.skipped.text(lengths=False)}; empty='skip' leaves them out"
            )
        if self.too_long.count:
            verb = "is" if self.too_long.count == 1 else "are"
            raise PromptError(
                f"{counted(self.too_long.count, 'prompt')} {verb} longer than {self.named} of "
                f"{self.length:,} tokens: {self.too_long.text()}; "
                f"truncate=True or max_length=… cuts them"
            )


class _TransformersTokenizer(Protocol):
    def __call__(self, text: list[str], **options: object) -> Any: ...  # noqa: ANN401


class Encoder:
    """A tokenizer, used without changing it.

    Args:
        tokenizer: A `transformers` tokenizer (or a processor that has one), or a
            `tokenizers.Tokenizer`.

    Attributes:
        used: Whether any text went through it.

    Raises:
        PromptError: It is neither.
    """

    def __init__(self, tokenizer: object) -> None:
        inner = getattr(tokenizer, "tokenizer", None)
        chosen: Any = tokenizer if inner is None or hasattr(tokenizer, "get_vocab") else inner
        self._bare = hasattr(chosen, "encode_batch")
        if not self._bare and not (callable(chosen) and hasattr(chosen, "get_vocab")):
            raise PromptError(
                f"tokenizer is a {type(tokenizer).__name__}; expected a transformers tokenizer "
                f"or a tokenizers.Tokenizer"
            )
        self.used = False
        self._tokenizer = chosen
        self._backend = chosen if self._bare else getattr(chosen, "backend_tokenizer", None)

    @property
    def name(self) -> str:
        """Where the tokenizer came from, or its class."""
        return str(getattr(self._tokenizer, "name_or_path", "") or type(self._tokenizer).__name__)

    def encode(self, texts: list[str], cut: int | None = None) -> list[list[int]]:
        """Return the token ids of the texts, special tokens included.

        Args:
            texts: The texts.
            cut: If given, longer ones are cut to this many tokens, special tokens kept.
        """
        self.used = True
        with self._unchanged():
            if self._bare:
                self._tokenizer.no_padding()
                if cut is None:
                    self._tokenizer.no_truncation()
                else:
                    self._tokenizer.enable_truncation(cut)
                return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
            encoded = self._tokenizer(
                texts,
                padding=False,
                truncation=cut is not None,
                max_length=cut,
                return_attention_mask=False,
                verbose=False,
            )
            return list(encoded["input_ids"])

    def digest(self) -> str:
        """Return what decides how texts become ids, padding and truncation left out."""
        if self._backend is not None:
            parts: Any = json.loads(self._backend.to_str())
            parts.pop("padding", None)
            parts.pop("truncation", None)
        else:
            special = getattr(self._tokenizer, "special_tokens_map", {})
            parts = [type(self._tokenizer).__name__, self._tokenizer.get_vocab(), special]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
        return "blake2b:" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        if self._backend is None:
            yield
            return
        padding, truncation = self._backend.padding, self._backend.truncation
        try:
            yield
        finally:
            self._backend.no_padding()
            self._backend.no_truncation()
            if padding is not None:
                self._backend.enable_padding(**padding)
            if truncation is not None:
                self._backend.enable_truncation(**truncation)


def tokenise(prompts: object, encoder: Encoder | None, limits: Limits) -> Iterator[list[Tokenised]]:
    """Yield the prompts as token ids, some hundred at a time, in order.

    Args:
        prompts: What `intake.read_prompts` takes.
        encoder: For texts.
        limits: What is checked; what is cut or skipped is counted in it.

    Raises:
        PromptError: A text without a tokenizer, a token id outside the model's vocabulary, or
            something that is no prompt.
    """
    number = 0
    for group in _groups(prompts):
        ready = _encode(group, encoder, number)
        for place, prompt in enumerate(ready):
            ready[place] = _within(prompt, number + place, encoder, limits)
        yield ready
        number += len(ready)


def model_length_limit(model: Any) -> int | None:  # noqa: ANN401
    """Return the most tokens of a prompt for which a model was made, or None if it does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text_config = getattr(config, "get_text_config", lambda: config)()
    names = (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_sequence_length",
        "max_seq_len",
    )
    found = [getattr(text_config, name, None) for name in names]
    limit = next((size for size in found if isinstance(size, int) and size > 0), None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        if limit is not None and name.endswith("position_embeddings"):
            padding = getattr(module, "padding_idx", None)
            if isinstance(padding, int) and getattr(module, "num_embeddings", 0) == limit:
                return limit - padding - 1
    return limit


def _groups(prompts: object) -> Iterator[list[Given]]:
    group: list[Given] = []
    characters = 0
    for given in read_prompts(prompts):
        group.append(given)
        characters += len(given.text or "")
        if len(group) == PROMPTS_AT_A_TIME or characters >= CHARACTERS_AT_A_TIME:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _encode(group: Sequence[Given], encoder: Encoder | None, first: int) -> list[Tokenised]:
    import numpy as np

    places = [place for place, given in enumerate(group) if given.ids is None]
    if places and encoder is None:
        raise PromptError(
            f"prompt {first + places[0]} is a text and there is no tokenizer; "
            f"pass tokenizer=… or token ids"
        )
    encoded: dict[int, Ids] = {}
    if places and encoder is not None:
        texts = [group[place].text or "" for place in places]
        for place, ids in zip(places, encoder.encode(texts), strict=True):
            encoded[place] = np.asarray(ids, dtype=np.uint32)
    return [
        Tokenised(encoded[place] if given.ids is None else given.ids, given.text)
        for place, given in enumerate(group)
    ]


def _within(prompt: Tokenised, number: int, encoder: Encoder | None, limits: Limits) -> Tokenised:
    import numpy as np

    size = len(prompt.ids)
    if not size:
        limits.skipped.add(number, 0)
        return prompt
    if limits.vocabulary is not None and int(prompt.ids.max()) >= limits.vocabulary:
        raise PromptError(
            f"prompt {number} has token id {int(prompt.ids.max())}, "
            f"and the model's vocabulary has {limits.vocabulary:,} tokens"
        )
    if limits.length is None or size <= limits.length:
        return prompt
    if not limits.truncate:
        limits.too_long.add(number, size)
        return prompt
    limits.truncated.add(number, size)
    if prompt.text is not None and encoder is not None:
        cut = encoder.encode([prompt.text], cut=limits.length)[0]
        if len(cut) <= limits.length:  # a limit below the special tokens alone cuts nothing
            return Tokenised(np.asarray(cut, dtype=np.uint32), prompt.text)
    return Tokenised(prompt.ids[: limits.length], prompt.text)
