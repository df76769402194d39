"""`lm.capture`: run a model once over prompts and keep what it computed, resumably.

The order matters: what can be refused is refused before the model runs over anything. The sites
come first (two tiny forwards), then the prompts, read once into a spool, then the comparison with
what the directory holds, then the windows.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina import _core, forward
from lamina.computing import Work, compute
from lamina.errors import (
    CastOverflowError,
    DiskError,
    DiskFullError,
    IdentityError,
    InputError,
)
from lamina.identity import (
    OpaqueWarning,
    RoundingWarning,
    autocast_field,
    differing,
    model_fields,
    opaque_reasons,
    refusal,
    user_fields,
)
from lamina.options import LAYOUT, Options
from lamina.positions import same_positions
from lamina.progress import Progress
from lamina.request import (
    PROMPT_FIELDS,
    Found,
    Request,
    dtype_field,
    encoder_of,
    pad_id_of,
    placed_on,
    stored_dtypes,
)
from lamina.sites import resolve
from lamina.spelling import store_directory
from lamina.spool import Spool, Summary, digest_prompts, write_spool
from lamina.tokens import tokenise
from lamina.windows import check_positions
from lamina.wording import bytes_text, counted, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from lamina._core import Path as SitePath
    from lamina.store import Store
    from lamina.tokens import Limits, Tokenised

__all__ = ["capture"]

SPOOL = "spool"


def capture(
    model: object,
    prompts: object,
    sites: str | SitePath | Sequence[str | SitePath],
    *,
    to: str | os.PathLike[str],
    tokenizer: object = None,
    positions: int | Sequence[int] | slice | str | None = None,
    batch_size: int | None = None,
    padding: str | None = None,
    max_length: int | None = None,
    truncate: bool | None = None,
    dtype: object = None,
    device: torch.device | str | None = None,
    identity: Mapping[str, object] | None = None,
    progress: bool = True,
    texts: bool | None = None,
    short: str | None = None,
    empty: str | None = None,
    overflow: str | None = None,
    window_bytes: int | None = None,
    shard_bytes: int | None = None,
    commit_seconds: float = 60.0,
) -> Store:
    """Run a model over prompts and store what it computes at some sites.

    Where `to` holds the same capture, complete, it is returned and nothing is computed; where it
    was cut off, it goes on at the first window that was not committed; where it holds anything
    else, nothing is touched and the error names the fields that differ. Options left out are the
    store's own when there is one. Rows are in prompt order, then token order, whatever the batches.

    Memory beyond the model's own: two windows of rows (each `window_bytes`, or one batch's rows if
    that is more), four times one batch's rows of the widest site, and some 64 MB.

    Args:
        model: A transformers model, another `torch.nn.Module` whose forward takes `input_ids` and
            `attention_mask`, or an nnsight model, whose edits take effect.
        prompts: Texts, lists or tensors of token ids, dicts with `input_ids` or `text`, a datasets
            column, a batch with its mask, or any iterable of these; read once, from its start.
        sites: Paths or patterns: `"model.layers[:].output"`, `"model.layers[3].mlp.output[-1]"`.
        to: The store's directory; missing or empty for a new one.
        tokenizer: For texts; by default an nnsight model's own.
        positions: Which tokens of each prompt become rows: an index, a list, a slice or text such
            as `"-4:"`; by default what the paths say, or all.
        batch_size: Prompts per forward (32).
        padding: `"right"` (the default), `"left"` or `"none"`, whatever the tokenizer says.
        max_length: Cuts prompts to this many tokens; how many were cut is logged and recorded.
        truncate: Cuts prompts that are over the model's limit to it; otherwise they are refused.
        dtype: What floating-point sites are stored as; by default as the model computes them.
        device: Where to run: the model is moved there and back. By default where it is.
        identity: Names what cannot be compared, such as edits: `{"edits": "v1"}`.
        progress: Whether to show progress, on a terminal.
        texts: Whether to keep the prompts' texts (True: they cost little beside the rows, and ids
            do not always give them back). Kept only where every prompt has one.
        short: What happens to prompts too short for a position: `"error"` or `"drop"`.
        empty: What happens to prompts without tokens: `"error"` or `"skip"`.
        overflow: What happens when a cast makes finite values infinite: `"report"` or `"error"`.
        window_bytes: Rows that are done or not done together (256 MiB; one batch at least).
        shard_bytes: Rows of a full shard file (1 GiB).
        commit_seconds: Commits at the first window end after so many seconds since the last
            commit.

    Returns:
        The complete store.

    Raises:
        IdentityError: The directory holds another capture, or one whose model cannot be compared.
        PromptError: Prompts that cannot be used as given; all are named.
        SiteNotFoundError: A path names nothing in the model.
        SiteError: A site that cannot be captured.
        PositionError: Prompts too short for a position.
        CastOverflowError: Values overflowed and `overflow` is `"error"`.
        StoreInUseError: Another writer holds the store.
        ForeignDirectoryError: The directory holds something that is not a store.
        DiskFullError: There is not enough room; nothing was computed.
    """
    given = {
        "batch_size": batch_size,
        "padding": padding,
        "max_length": max_length,
        "truncate": truncate,
        "short": short,
        "empty": empty,
        "overflow": overflow,
        "texts": texts,
        "window_bytes": window_bytes,
        "shard_bytes": shard_bytes,
    }
    options = Options.settle(given)  # what cannot be is refused before anything is looked at
    if not commit_seconds >= 0:
        raise InputError(f"commit_seconds={commit_seconds!r}: expected a number of seconds")
    directory = store_directory(to)
    found = Found.look(directory)
    shown = Progress(show=progress)
    module = forward.unwrap(model)
    with placed_on(module, device) as placed:
        # First: rotary embeddings that depend on the length keep what the last forward left, and
        # the tiny forwards leave what a new model has, so that its buffers are hashed alike.
        resolved = resolve(model, sites)
        where = same_positions(resolved.position, positions)
        encoder = encoder_of(model, tokenizer)
        request = Request(
            model=model,
            module=module,
            prompts=prompts,
            encoder=encoder,
            resolved=resolved,
            positions=where,
            dtypes=stored_dtypes(resolved, dtype),
            device=placed,
            given=given,
            options=options,
            fields={
                **model_fields(module),
                "sites": [str(site) for site in resolved.sites],
                "positions": where.text,
                "dtype": dtype_field(stored_dtypes(resolved, dtype)),
                "autocast": autocast_field(placed),
                **user_fields(identity),
            },
            opaque=opaque_reasons(model, module),
            named=bool(identity),
            directory=directory,
        )
        if found is not None:
            _check_model(request, found)
            if found.complete:
                return _hit(request, found, shown)
        if found is None and request.opaque and not request.named:
            warnings.warn(
                f"this capture can be neither resumed nor recognised later: what the model "
                f"computes cannot be told from its tensors ({listed(request.opaque)}). Name it: "
                f"identity={{'edits': 'v1'}}",
                OpaqueWarning,
                stacklevel=2,
            )
        writer = _core.Writer(directory)
        try:
            return _write(request, writer, shown, commit_seconds)
        finally:
            shown.clear()
            writer.close()


def _check_model(request: Request, found: Found) -> None:
    """Refuse another model, other sites, or a model that cannot be compared."""
    stored = {k: v for k, v in found.identity.items() if k not in PROMPT_FIELDS}
    fields = differing(stored, {**request.fields, "opaque": request.opaque})
    if fields:
        raise refusal(request.directory, fields, _hints(fields, request.directory))
    if request.opaque and not request.named:
        raise IdentityError(
            f"{request.directory} cannot be compared with this capture: what the model computes "
            f"cannot be told from its tensors ({listed(request.opaque)}), so nothing says whether "
            f"these numbers are the same.\nName it when a store is begun and each time after: "
            f"identity={{'edits': 'v1'}}. To begin anew, choose another directory, or remove this "
            f"one: rm -r {shlex.quote(request.directory)}",
            {"opaque": (found.identity.get("opaque"), request.opaque)},
        )


def _check_prompts(request: Request, found: Found, summary: Summary) -> None:
    """Refuse other prompts."""
    fields = differing(found.identity, request.full_identity(summary))
    if fields:
        raise refusal(request.directory, fields, _hints(fields, request.directory))


def _check_texts(request: Request, found: Found, summary: Summary) -> None:
    """Refuse to go on without texts where the store has them, or with texts where it has none."""
    kept = found.recorded.get("texts_kept"), summary.text_bytes is not None
    if kept[0] != kept[1]:
        raise refusal(request.directory, {"texts": kept})


def _hints(fields: dict[str, tuple[Any, Any]], directory: str) -> list[str]:
    stored, given = fields.get("sites", ([], []))
    if stored and given and set(given) < set(stored):
        return [f"All the sites asked for are in the store: lm.open({directory!r}) reads them."]
    if "prompts" in fields:
        return ["Prompts are counted from the start: an iterator must not have been used before."]
    return []


def _hit(request: Request, found: Found, progress: Progress) -> Store:
    """Return a complete store, if the prompts are those it was made from; nothing is written."""
    request = request.with_store(found)
    limits = request.limits()
    summary = digest_prompts(_shown_groups(request, limits, progress))
    progress.clear()
    limits.check(summary.prompts)
    _check_prompts(request, found, summary)
    wanted = request.options.differing(found.options)
    if "texts" in wanted and request.options.texts:
        raise refusal(request.directory, {"texts": wanted["texts"]})
    over = _overflowed(request)
    if over and request.given["overflow"] == "error":
        raise CastOverflowError(
            f"{request.directory} holds infinities where values were too large for the stored "
            f"dtype, at {listed(over)}"
        )
    other = differing(found.recorded.get("rounding", {}), request.rounding())
    other |= {k: v for k, v in wanted.items() if k in ("batch_size", "padding")}
    if other:
        warnings.warn(
            f"{request.directory} was made with "
            + listed(f"{name} {stored}, now {given}" for name, (stored, given) in other.items())
            + "; computed now, the numbers could differ in rounding",
            RoundingWarning,
            stacklevel=3,
        )
    _settle(Path(request.directory))
    return _opened(request)


def _write(
    request: Request, writer: _core.Writer, progress: Progress, commit_seconds: float
) -> Store:
    """Begin or resume under the lock, compute what is missing, and finish."""
    found = Found.look(request.directory) if writer.has_store else None
    if found is not None:  # perhaps another than before the lock was taken
        _check_model(request, found)
        if found.complete:
            writer.close()
            return _hit(request, found, progress)
        request = request.with_store(found)
        _check_resume(request, found)
    limits = request.limits()
    try:
        spool = _spooled(request, found, Path(writer.directory) / SPOOL, limits, progress)
        limits.check(spool.summary.prompts)
        if found is not None:
            _check_prompts(request, found, spool.summary)
            _check_texts(request, found, spool.summary)
        if request.options.short == "error":
            check_positions(spool, request.positions)
        work = _work(request, spool)
        rows, row_bytes = sum(w.rows for w in work.windows()), sum(work.row_bytes)
        remaining = rows - (0 if found is None else found.rows)
        _check_space(request, remaining, row_bytes, spool.summary, progress)
    except BaseException:
        if found is None:
            shutil.rmtree(Path(writer.directory) / SPOOL, ignore_errors=True)
        raise
    about = json.dumps(request.about(limits, spool.summary))
    if found is None:
        writer.begin(
            request.core_sites(),
            identity=json.dumps(request.full_identity(spool.summary)),
            about=about,
            rows_total=rows,
            shard_bytes=request.options.shard_bytes,
            texts=spool.summary.text_bytes is not None,
            commit_seconds=commit_seconds,
        )
    else:
        writer.resume(rows_total=rows, commit_seconds=commit_seconds)
        if not found.windows or request.options.overflow != found.options.get("overflow"):
            writer.set_about(about)
    _tell(limits, progress)
    compute(work, writer, rows, progress)
    writer.finish()
    store = _opened(request)
    if over := _overflowed(request):
        progress.note(
            f"values too large for the stored dtype became infinite at {listed(over)}; "
            f"bfloat16 and float32 hold them"
        )
    progress.finish(f"{counted(rows, 'row')} in {request.directory}, version {store.version}")
    return store


def _check_resume(request: Request, found: Found) -> None:
    """Refuse what would give the rest of a store other numbers or another layout than its start."""
    wanted = request.options.differing(found.options)
    if not found.windows:  # nothing was computed yet: only the layout is settled
        wanted = {name: value for name, value in wanted.items() if name in LAYOUT}
    else:
        wanted |= differing(found.recorded.get("rounding", {}), request.rounding())
    wanted.pop("overflow", None)  # numbers and layout are the same; the error itself advises it
    if wanted:
        raise refusal(
            request.directory,
            wanted,
            ["A capture goes on only as it was begun; options left out are the store's own."],
        )


def _spooled(
    request: Request, found: Found | None, directory: Path, limits: Limits, progress: Progress
) -> Spool:
    """Read all prompts, into a new spool or against the one that the store was begun from."""
    groups = _shown_groups(request, limits, progress)
    spool = None if found is None else Spool.reopen(directory)
    if spool and found and spool.summary.digest == found.identity.get("tokens"):
        summary = digest_prompts(groups)
        # Other prompts are refused for their digest before anything of the spool is read.
        return spool if summary.digest == spool.summary.digest else Spool(directory, summary)
    summary = write_spool(directory, groups, texts=request.options.texts)
    return Spool(directory, summary)


def _shown_groups(
    request: Request, limits: Limits, progress: Progress
) -> Iterator[list[Tokenised]]:
    prompts = tokens = 0
    for group in tokenise(request.prompts, request.encoder, limits):
        prompts += len(group)
        tokens += sum(len(prompt.ids) for prompt in group)
        progress.reading(prompts, tokens)
        yield group


def _check_space(
    request: Request, rows: int, row_bytes: int, summary: Summary, progress: Progress
) -> None:
    """Say how much will be written, and refuse what does not fit."""
    tables = 9 * rows + 16 * summary.prompts + 4 * summary.tokens + (summary.text_bytes or 0)
    size = rows * row_bytes + tables
    # The shard being filled may stand on disk twice: as pieces and as the file that replaces them.
    needed = size + size // 500 + min(size, request.options.shard_bytes)
    free = _core.free_bytes(request.directory)
    progress.say(
        f"{counted(len(request.resolved.sites), 'site')} × {counted(rows, 'row')} of "
        f"{bytes_text(row_bytes)}: {bytes_text(size)} to {request.directory} "
        f"({bytes_text(free)} free)"
    )
    if needed > free:
        raise DiskFullError(
            f"{request.directory}: the capture needs {bytes_text(needed)} while it runs "
            f"({bytes_text(size)} in the end), and {bytes_text(free)} are free",
            errno.ENOSPC,
            request.directory,
        )


def _work(request: Request, spool: Spool) -> Work:
    return Work(
        model=request.model,
        resolved=request.resolved,
        dtypes=request.dtypes,
        positions=request.positions,
        options=request.options,
        spool=spool,
        pad_id=pad_id_of(request.module),
    )


def _tell(limits: Limits, progress: Progress) -> None:
    if limits.truncated.count:
        progress.note(
            f"{counted(limits.truncated.count, 'prompt')} cut to {limits.length:,} tokens: "
            f"{limits.truncated.text()}"
        )
    if limits.skipped.count:
        progress.note(
            f"{counted(limits.skipped.count, 'prompt')} without tokens left out: "
            f"{limits.skipped.text(lengths=False)}"
        )


def _overflowed(request: Request) -> list[str]:
    """Return the sites at which a cast made values infinite, with how many."""
    counts = _core.Store.open(request.directory).counts()
    return [
        f"{site} ({count:,})"
        for site, (_, _, count) in zip(request.resolved.sites, counts, strict=True)
        if count
    ]


def _settle(directory: Path) -> None:
    """Make what was seen durable: a version seen after a kill must not vanish in a power cut."""
    for name in ("shards", "manifests"):
        try:
            descriptor = os.open(directory / name, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EINVAL, errno.EACCES, errno.ENOENT):
                where = str(directory / name)
                raise DiskError(
                    f"cannot sync {where}: {error.strerror}", error.errno, where
                ) from error


def _opened(request: Request) -> Store:
    from lamina.store import open as open_store

    return open_store(request.directory)
