"""What a capture was asked for, and what a store says it holds: the two that are compared."""

from __future__ import annotations

import json
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lamina import _core, forward
from lamina.dtypes import dtype_name
from lamina.errors import DtypeError, InputError
from lamina.identity import rounding_facts
from lamina.options import Options
from lamina.tokens import Encoder, Limits, model_length_limit
from lamina.wording import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lamina.positions import Positions
    from lamina.sites import Resolved
    from lamina.spool import Summary

__all__ = [
    "PROMPT_FIELDS",
    "Found",
    "Request",
    "dtype_field",
    "encoder_of",
    "pad_id_of",
    "placed_on",
    "stored_dtypes",
]

PROMPT_FIELDS = ("tokenizer", "prompts", "tokens")
"""Compared fields that are known only once all prompts were read."""


@dataclass(frozen=True)
class Found:
    """What the directory's store says about itself."""

    identity: dict[str, Any]
    recorded: dict[str, Any]
    options: dict[str, Any]
    complete: bool
    windows: int
    rows: int

    @classmethod
    def look(cls, directory: str) -> Found | None:
        """Return what the store in a directory says, or None where there is none; takes no lock."""
        if _core.probe(directory) != "store":
            return None
        store = _core.Store.open(directory)
        about = json.loads(store.about)
        return cls(
            identity=json.loads(store.identity),
            recorded=about.get("recorded", {}),
            options=about.get("options", {}),
            complete=store.complete,
            windows=store.windows,
            rows=store.rows,
        )


@dataclass(frozen=True)
class Request:
    """What was asked for, as far as it is known before the prompts are read."""

    model: object
    module: torch.nn.Module
    prompts: object
    encoder: Encoder | None
    resolved: Resolved
    positions: Positions
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    given: dict[str, Any]
    options: Options
    fields: dict[str, Any]
    opaque: list[str]
    named: bool
    directory: str

    def with_store(self, found: Found) -> Request:
        """Return the request with the store's options where none were given."""
        return replace(self, options=Options.settle(self.given, found.options))

    def limits(self) -> Limits:
        """Return what a prompt may be."""
        own = model_length_limit(self.module)
        asked = self.options.max_length
        if asked is not None and own is not None and asked > own:
            raise InputError(
                f"max_length={asked:,} is more than the model's limit of {own:,} tokens"
            )
        embedding = None
        with suppress(AttributeError, NotImplementedError):
            embedding = self.module.get_input_embeddings()  # type: ignore[operator]
        return Limits(
            length=own if asked is None else asked,
            truncate=self.options.truncate or asked is not None,
            empty=self.options.empty,
            vocabulary=getattr(embedding, "num_embeddings", None),
        )

    def full_identity(self, summary: Summary) -> dict[str, Any]:
        """Return all compared fields."""
        used = self.encoder is not None and self.encoder.used
        return {
            **self.fields,
            "opaque": self.opaque,
            "tokenizer": self.encoder.digest() if self.encoder is not None and used else None,
            "prompts": summary.prompts,
            "tokens": summary.digest,
        }

    def about(self, limits: Limits, summary: Summary) -> dict[str, Any]:
        """Return what is recorded beside the identity: origins, options, structure."""
        from importlib.metadata import PackageNotFoundError, version

        config = getattr(self.module, "config", None)
        recorded: dict[str, Any] = {
            "model_name": getattr(config, "_name_or_path", None) or type(self.module).__name__,
            "revision": getattr(config, "_commit_hash", None),
            "tokenizer": None if self.encoder is None else self.encoder.name,
            "rounding": self.rounding(),
            "texts_kept": summary.text_bytes is not None,
        }
        with suppress(PackageNotFoundError):
            recorded["lamina"] = version("lamina")
        if self.opaque:
            recorded["opaque"] = self.opaque
        for name, tally in (("truncated", limits.truncated), ("skipped", limits.skipped)):
            if tally.count:
                recorded[name] = tally.count
        return {
            "recorded": recorded,
            "options": {**asdict(self.options), "positions": self.positions.text},
            "structure": self.resolved.structure,
            "containers": self.containers(),
        }

    def containers(self) -> dict[str, int]:
        """Return how long the model's lists of modules are: what `[-1]` means in the store."""
        tree = _core.ModuleTree([name for name, _ in self.module.named_modules()])
        return tree.lengths([site.path for site in self.resolved.sites])

    def rounding(self) -> dict[str, Any]:
        """Return what changes no more than rounding."""
        return dict(rounding_facts(self.module, self.device))

    def core_sites(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return the sites as the core takes them."""
        return [
            (str(site), dtype_name(dtype), tuple(site.shape))
            for site, dtype in zip(self.resolved.sites, self.dtypes, strict=True)
        ]


def stored_dtypes(resolved: Resolved, dtype: object) -> tuple[torch.dtype, ...]:
    """Return what each site is stored as: floating ones as asked for, others as they are."""
    import torch

    if dtype is None:
        return tuple(site.dtype for site in resolved.sites)
    wanted: torch.dtype = getattr(torch, dtype_name(dtype))
    if not wanted.is_floating_point:
        raise DtypeError(f"dtype={dtype_name(dtype)!r}: activations are stored in floating point")
    return tuple(wanted if s.dtype.is_floating_point else s.dtype for s in resolved.sites)


def dtype_field(dtypes: tuple[torch.dtype, ...]) -> str | list[str]:
    """Return the stored dtypes as a compared field: one name where all are the same."""
    names = [dtype_name(dtype) for dtype in dtypes]
    return names[0] if len(set(names)) == 1 else names


def encoder_of(model: object, tokenizer: object) -> Encoder | None:
    """Return what turns texts into ids: the tokenizer given, or an nnsight model's own."""
    import torch

    if tokenizer is None and not isinstance(model, torch.nn.Module):
        tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else Encoder(tokenizer)


def pad_id_of(module: torch.nn.Module) -> int:
    """Return what fills padding; the mask hides it, but it must be a token that the model has."""
    config = getattr(module, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    pad = getattr(text_config, "pad_token_id", None)
    size = getattr(text_config, "vocab_size", None)
    fits = isinstance(pad, int) and pad >= 0 and (size is None or pad < size)
    return pad if fits and pad is not None else 0


@contextmanager
def placed_on(module: torch.nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Move a model for the time of a capture; without a device, leave it where it is."""
    import torch

    home = forward.input_device(module)
    goal = home
    if device is not None:
        try:
            goal = torch.empty(0, device=device).device  # as torch numbers it: `cuda` is `cuda:0`
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise InputError(f"device={str(device)!r}: {reason}") from None
    if str(goal) == str(home):
        yield home
        return
    homes = {t.device for t in (*module.parameters(), *module.buffers())}
    if len(homes) > 1 or hasattr(module, "hf_device_map"):
        raise InputError(
            f"device={str(device)!r}: the model is spread over {listed(sorted(map(str, homes)))}; "
            f"leave device out"
        )
    try:
        module.to(goal)
        yield goal
    finally:
        module.to(home)
