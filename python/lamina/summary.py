"""What a store holds, told to a person: as JSON facts, as text and for notebooks."""

from __future__ import annotations

import html
import os
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lamina import _core
from lamina.dtypes import row_bytes
from lamina.wording import bytes_text, counted, listed, shape_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["as_html", "as_text", "facts"]

_MODEL_FIELDS = ("model_name", "model", "name", "class")
"""Where a capture, or a caller of `lm.create`, says which model it was; the first found counts."""


def facts(
    core: _core.Store,
    identity: Mapping[str, Any],
    recorded: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the facts about a store, as JSON values."""
    sites = core.sites
    shards = core.shards
    counts = core.counts()
    return {
        "directory": os.fspath(core.directory),
        "format": _core.FORMAT,
        "store_id": core.store_id,
        "version": core.version,
        "complete": core.complete,
        "created": datetime.fromtimestamp(core.created, UTC).isoformat(timespec="seconds"),
        "model": _model(identity, recorded),
        "rows": core.rows,
        "prompts": core.prompts,
        "windows": core.windows,
        "texts": core.has_texts,
        "nbytes": row_bytes(sites) * core.rows,
        "disk_bytes": sum(shard[5] for shard in shards),
        "shards": len(shards),
        "rows_per_shard": core.rows_per_shard,
        "tiers": dict(Counter(core.tiers())),
        "sites": [
            {
                "path": path,
                "shape": list(shape),
                "dtype": dtype,
                "nan": count[0],
                "infinite": count[1],
                "overflowed": count[2],
            }
            for (path, dtype, shape), count in zip(sites, counts, strict=True)
        ],
        "identity": dict(identity),
        "recorded": dict(recorded),
        "options": dict(options),
    }


def as_text(info: Mapping[str, Any]) -> str:
    """Return the facts as a few lines of text."""
    return "\n".join([f"<Store {info['directory']}>", *(f"  {k:<9} {v}" for k, v in _lines(info))])


def as_html(info: Mapping[str, Any]) -> str:
    """Return the facts as a table for a notebook, every text escaped."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
        for name, text in _lines(info)
    )
    title = html.escape(f"Store {info['directory']}")
    return f"<table><caption><b>{title}</b></caption>{rows}</table>"


def _lines(info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is worth a line, each with its name."""
    if info["model"]:
        yield "model", info["model"]
    sites = info["sites"]
    paths = [site["path"] for site in sites]
    span = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
    yield "sites", f"{len(sites):,}: {span}"
    kinds = Counter((site["dtype"], tuple(site["shape"])) for site in sites)
    yield (
        "each",
        listed(
            (
                f"{shape_text(shape)} {dtype}"
                + (f" ({counted(count, 'site')})" if len(kinds) > 1 else "")
                for (dtype, shape), count in kinds.items()
            ),
            most=4,
        ),
    )
    yield "rows", f"{info['rows']:,} of {counted(info['prompts'], 'prompt')}"
    if (positions := info["options"].get("positions")) not in (None, ":"):
        yield "positions", f"[{positions}]"
    yield (
        "bytes",
        f"{bytes_text(info['nbytes'])}; on disk {bytes_text(info['disk_bytes'])} in "
        + (counted(info["shards"], "shard")),
    )
    tiers = (f"{tier} pages" if tier != "copy" else "copied" for tier in info["tiers"])
    yield "mapping", listed(tiers)
    for name, what in (("nan", "NaN"), ("infinite", "infinite"), ("overflowed", "overflowed")):
        having = [site for site in sites if site[name]]
        if having:
            total = sum(site[name] for site in having)
            where = listed((site["path"] for site in having), most=3)
            yield what.lower() if what == "NaN" else what, f"{counted(total, 'value')} in {where}"
    state = "complete" if info["complete"] else "not complete: what is committed so far"
    yield "version", f"{info['version']}, {state}"
    yield "created", info["created"].replace("T", " ").replace("+00:00", " UTC")


def _model(identity: Mapping[str, Any], recorded: Mapping[str, Any]) -> str | None:
    """Return what the model is called, with its class where both are known."""
    for source in (recorded, identity):
        for field in _MODEL_FIELDS:
            if isinstance(source.get(field), str) and source[field]:
                kind = identity.get("class")
                extra = f" ({kind})" if isinstance(kind, str) and kind != source[field] else ""
                return f"{source[field]}{extra}"
    return None
