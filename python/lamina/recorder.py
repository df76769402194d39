"""Runs a model and hands over the rows that are wanted, as soon as each site has been computed.

Forward hooks sit on exactly the modules asked for, only while a forward runs. They come after the
hooks and edits of others, so what they see is what the rest of the model sees. Rows are gathered by
advanced indexing, which copies: nothing keeps a whole `[batch, sequence, hidden]` tensor alive. The
forward ends once the last site has been seen.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from lamina import forward, ports
from lamina.errors import PromptError, SiteError
from lamina.positions import make_batch
from lamina.rehearsal import tiny_ids
from lamina.wording import shape_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import torch

    from lamina.positions import Batch
    from lamina.sites import Resolved, Site

    Sink: TypeAlias = Callable[[int, torch.Tensor], None]

__all__ = ["Recorder"]

PADDING_TOLERANCE = 0.05
"""How far, relative to its norm, rounding may move a value when its prompt is padded."""


class Recorder:
    """Runs batches through a model and hands over rows of its sites.

    Entering it puts the model into evaluation mode; leaving restores every module's own flag.
    Outside of `run` the model carries no hook of ours.
    """

    def __init__(
        self, model: object, resolved: Resolved, *, device: torch.device | str | None = None
    ) -> None:
        """Prepare to record.

        Args:
            model: The model that `resolved` was made for.
            resolved: The sites.
            device: Where the inputs go; by default where the model's embedding is.
        """
        import torch

        self._model = model
        self._module = forward.unwrap(model)
        self._resolved = resolved
        self._device = None if device is None else torch.device(device)
        self._traced = model is not self._module
        self._exit = ExitStack()
        self._entered = False
        self._left_padding_checked = False
        self._ports: dict[tuple[str, str], list[int]] = defaultdict(list)
        for number, site in enumerate(resolved.sites):
            self._ports[site.module, site.port].append(number)
        modules = dict(self._module.named_modules())
        self._modules = {name: modules[name] for name, _ in self._ports}

    def __enter__(self) -> Self:
        """Put the model into evaluation mode."""
        self._exit.enter_context(forward.evaluating(self._module))
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore every module's own training flag."""
        self._entered = False
        self._exit.close()

    def run(self, batch: Batch, rows: torch.Tensor, columns: torch.Tensor, sink: Sink) -> None:
        """Run one forward and hand over the wanted tokens of every site, in computation order.

        Args:
            batch: What the model is given.
            rows: int64 `[n]`: which prompt of the batch each wanted token is of.
            columns: int64 `[n]`: the token's column in the batch, padding counted.
            sink: Called once per site with the site's number and a `[n, *feature]` tensor in the
                model's dtype, on the site's device. The tensor owns its memory.

        Raises:
            SiteError: A site was not reached, or had another shape or dtype than expected.
            PromptError: Left padding would change what this model computes.
        """
        import torch

        if not self._entered:
            with self:
                return self.run(batch, rows, columns, sink)
        self._check_left_padding(batch)
        arguments = forward.call_arguments(
            self._module,
            batch,
            position_ids=self._resolved.position_ids,
            device=self._device,
        )
        size = (batch.input_ids.shape[0], batch.input_ids.shape[1])
        seen = _Gathering(self._resolved.sites, size, rows, columns, sink)
        handles: list[Any] = []
        observe = {
            name: self._on_input(seen, name)
            for name, port in self._ports
            if port == "input" and self._traced
        }
        with (
            torch.no_grad(),
            suppress(forward.ForwardStop),
            forward.hooked(handles, lambda: self._install(handles, seen)),
        ):
            forward.call(self._model, arguments, observe)
        seen.check_complete()
        return None

    def _install(self, handles: list[Any], seen: _Gathering) -> None:
        for name, port in self._ports:
            module = self._modules[name]
            if port == "output":
                handles.append(module.register_forward_hook(self._on_output(seen, name)))
            elif not self._traced:
                before = self._on_input(seen, name)

                def hook(
                    _module: object,
                    args: tuple[Any, ...],
                    # torch installs a hook before it notes that the hook takes keywords, so another
                    # thread's forward may call it without.
                    kwargs: dict[str, Any] | None = None,
                    before: Callable[[tuple[Any, ...], dict[str, Any]], None] = before,
                ) -> None:
                    before(args, kwargs or {})

                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _on_output(
        self, seen: _Gathering, name: str
    ) -> Callable[[torch.nn.Module, object, object], None]:
        numbers = self._ports[name, "output"]

        def hook(_module: torch.nn.Module, _args: object, output: object) -> None:
            for number, site in seen.due(name, "output", numbers):
                seen.take(number, site, partial(ports.pick, output, site.elements))

        return hook

    def _on_input(
        self, seen: _Gathering, name: str
    ) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
        numbers = self._ports[name, "input"]
        parameters = ports.parameter_names(self._modules[name])

        def hook(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for number, site in seen.due(name, "input", numbers):
                seen.take(number, site, partial(given, site, args, kwargs))

        def given(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
            named, elements = ports.split_argument(site.elements)
            found = ports.argument(parameters, args, kwargs, named)
            if found is None:
                raise LookupError("the module is not given this argument")
            return ports.pick(found[1], elements)

        return hook

    def _check_left_padding(self, batch: Batch) -> None:
        """Refuse left padding where a model can neither be told positions nor finds them itself."""
        if self._left_padding_checked or self._resolved.position_ids:
            return
        if bool(batch.attention_mask[:, 0].ne(0).all()):
            return
        pad_id = int(batch.input_ids[batch.attention_mask.eq(0)][0])
        if self._padding_shifts(pad_id):
            raise PromptError(
                f"padding='left' changes what {type(self._module).__name__} computes, and its "
                f"forward takes no position ids that would tell it; use padding='right' or 'none'"
            )
        self._left_padding_checked = True

    def _padding_shifts(self, pad_id: int) -> bool:
        """Return whether a prompt's own rows differ, beyond rounding, when padded on the left."""
        import torch

        short, long = tiny_ids(self._module, 1, 3)[0], tiny_ids(self._module, 1, 5)[0]
        alone: dict[int, torch.Tensor] = {}
        padded: dict[int, torch.Tensor] = {}
        recorder = Recorder(self._module, self._resolved, device=self._device)
        recorder._left_padding_checked = True
        rows, columns = torch.zeros(3, dtype=torch.int64), torch.arange(3)
        with forward.quiet(self._module), recorder:
            recorder.run(make_batch([short], "none"), rows, columns, alone.__setitem__)
            both = make_batch([short, long], "left", pad_id)
            recorder.run(both, rows, columns + 2, padded.__setitem__)
        for number, values in alone.items():
            own, other = values.double(), padded[number].double()
            if float((own - other).norm()) > PADDING_TOLERANCE * float(own.norm()):
                return True
        return False


class _Gathering:
    """One forward's progress: calls counted, rows taken, and the stop after the last site."""

    def __init__(
        self,
        sites: tuple[Site, ...],
        size: tuple[int, int],
        rows: torch.Tensor,
        columns: torch.Tensor,
        sink: Sink,
    ) -> None:
        self._sites = sites
        self._size = size
        self._rows = rows
        self._columns = columns
        self._sink = sink
        self._thread = threading.get_ident()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._missing = set(range(len(sites)))
        self._placed: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def due(self, name: str, port: str, numbers: list[int]) -> list[tuple[int, Site]]:
        """Count one call of a module and return the sites that this very call computes."""
        if threading.get_ident() != self._thread:
            return []  # a forward that someone else runs meanwhile
        call = self._calls[name, port]
        self._calls[name, port] += 1
        return [(n, self._sites[n]) for n in numbers if self._sites[n].call == call]

    def take(self, number: int, site: Site, find: Callable[[], object]) -> None:
        """Hand over the wanted rows of one site; end the forward if it was the last one."""
        import torch

        try:
            value = find()
        except LookupError as error:
            raise SiteError(f"`{site}` changed between batches: {error}") from None
        expected = site.expected(*self._size)
        if not isinstance(value, torch.Tensor):
            raise SiteError(f"`{site}` is {ports.describe(value)} in this batch, not a tensor")
        if tuple(value.shape) != expected or value.dtype != site.dtype:
            raise SiteError(
                f"`{site}` has shape {shape_text(value.shape)} {value.dtype} in a batch of "
                f"{self._size[0]} prompts padded to {self._size[1]} tokens; expected "
                f"{shape_text(expected)} {site.dtype}"
            )
        rows, columns = self._on(value.device)
        taken = value[rows * self._size[1] + columns] if site.flat else value[rows, columns]
        self._sink(number, taken.detach())
        self._missing.discard(number)
        if not self._missing:
            raise forward.ForwardStop

    def check_complete(self) -> None:
        """Raise if a site was not reached."""
        if self._missing:
            lacking = self._sites[min(self._missing)]
            more = f" (and {len(self._missing) - 1} more)" if len(self._missing) > 1 else ""
            raise SiteError(
                f"`{lacking}`{more} was not reached in this batch, though it was in the tiny "
                f"forwards; an edit may skip its module, or its being called depends on the tokens"
            )

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._placed:
            self._placed[device] = (self._rows.to(device), self._columns.to(device))
        return self._placed[device]
