"""Writing stored activations back into a run: `patched`.

Values are set out of place: the module's tensor is cloned, the wanted tokens are exchanged in the
clone, and the clone takes the tensor's place (what holds it is rebuilt). Writing in place would
leak into every place that shares the tensor: a layer's input *is* the output of the one before.
"""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from lamina import forward, ports
from lamina.errors import CastOverflowError, DtypeError, InputError, SiteError
from lamina.positions import columns_of, parse_positions
from lamina.sites import locate
from lamina.wording import counted, listed, shape_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from lamina.ports import Value
    from lamina.sites import Site, Target

__all__ = ["Saved", "patched"]

_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Target]] = weakref.WeakKeyDictionary()


class Saved(Protocol):
    """What can be patched in: targets with their tensors, such as `Store.load` returns."""

    def items(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Return each target's path with its tensor `[prompts, *feature]`."""
        ...


@dataclass(frozen=True)
class _Patch:
    """New values for some positions of one site: `[prompts, positions, *feature]`."""

    text: str
    site: Site
    positions: tuple[int, ...]
    values: torch.Tensor


@contextmanager
def patched(model: object, saved: Saved | Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Set stored activations in every forward that runs inside the block.

    Positions are tokens of each row's own prompt, found by the attention mask, so left and right
    padding are alike. A target loaded for one prompt is set in every row of a batch; one loaded
    for n prompts needs a batch of n rows, in the same order. In generation with a key-value cache
    the prompt's forward is patched, the steps that follow are not. An nnsight model is patched
    below its traces: a module's own `.output` there is still the unpatched one, everything
    after it sees the patch.

    Args:
        model: The model.
        saved: What `Store.load` returned, or a mapping from targets to tensors `[prompts,
            *feature]` (`[prompts, k, *feature]` for a list of k positions). Each names single
            tokens: a whole site and a slice, such as `[-2:]`, are refused.

    Raises:
        SiteNotFoundError: A target's module is not in the model.
        SiteError: A target cannot be set in this model, or two targets are the same.
        InputError: A tensor or, in a forward, the batch does not fit.
        PositionError: In a forward: a row is too short for a position.

    For instance, what prompt 0 of a store left at a layer, in place of what this batch leaves::

        with lm.patched(model, store.load("model.layers[3].output[-1]", prompts=[0])):
            logits = model(**batch).logits
    """
    module = forward.unwrap(model)
    patches = _patches(model, _tensors(saved))
    handles: list[Any] = []
    run = _Run(module, patches)
    with forward.hooked(handles, lambda: run.install(handles)):
        yield


def _tensors(saved: object) -> dict[str, torch.Tensor]:
    import torch

    pairs = getattr(saved, "items", None)
    found: dict[str, Any] = dict(pairs()) if callable(pairs) else {"": None}
    if not all(isinstance(values, torch.Tensor) for values in found.values()):
        raise InputError(
            f"patched takes what store.load(...) returns, or a dict from targets to tensors; "
            f"this is of {type(saved)}"
        )
    return found


def _patches(model: object, saved: dict[str, torch.Tensor]) -> list[_Patch]:
    if not saved:
        raise InputError("nothing to patch: no target was given")
    patches = []
    cells: dict[tuple[Site, int], str] = {}
    for text, target in zip(saved, _located(model, list(saved)), strict=True):
        values, site = saved[text], target.site
        positions = parse_positions(target.position).value
        if isinstance(positions, slice):
            raise SiteError(
                f"`{text}` names no single tokens; positions that can be patched are such as "
                f"[-1] or [0,-1]"
            )
        single = isinstance(positions, int)
        each = (positions,) if isinstance(positions, int) else positions
        shape = site.shape if single else (len(each), *site.shape)
        if values.dim() != len(shape) + 1 or tuple(values.shape[1:]) != shape:
            raise InputError(
                f"`{text}` needs a tensor {shape_text(['prompts', *shape])}, not "
                f"{shape_text(values.shape)}"
            )
        if values.dtype.is_floating_point != site.dtype.is_floating_point:
            raise DtypeError(
                f"`{text}` is {site.dtype} in the model, the values are {values.dtype}"
            )
        for position in each:
            if other := cells.get((site, position)):
                raise SiteError(f"`{other}` and `{text}` set the same token of one site")
            cells[site, position] = text
        patches.append(_Patch(text, site, each, values[:, None] if single else values))
    return patches


def _located(model: object, texts: list[str]) -> list[Target]:
    """Return each text's one target; a model is asked once, then what it said is remembered."""
    known = _known.setdefault(forward.unwrap(model), {})
    if unknown := [text for text in texts if text not in known]:
        found: dict[str, list[Target]] = {text: [] for text in unknown}
        for target in locate(model, unknown, position_ids=False)[0]:
            found[target.given].append(target)
        for text, targets in found.items():
            if len(targets) != 1:
                raise SiteError(
                    f"`{text}` stands for {len(targets)} sites; a tensor to patch has one target"
                )
            known[text] = targets[0]
    return [known[text] for text in texts]


class _Run:
    """What the hooks of one `patched` block know of the forward that is running."""

    def __init__(self, module: torch.nn.Module, patches: list[_Patch]) -> None:
        self._module = module
        self._parameters = ports.parameter_names(module)
        self._patches: dict[tuple[str, str], dict[Site, list[_Patch]]] = {}
        for patch in patches:
            sites = self._patches.setdefault((patch.site.module, patch.site.port), {})
            sites.setdefault(patch.site, []).append(patch)
        self._running = False
        self._mask: torch.Tensor | None = None
        self._columns: dict[int, torch.Tensor] = {}
        self._calls: Counter[tuple[str, str]] = Counter()

    def install(self, handles: list[Any]) -> None:
        """Put hooks on the model and on the modules of the targets."""
        handles.append(
            self._module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        )
        modules = dict(self._module.named_modules())
        for (name, port), sites in self._patches.items():
            module = modules[name]
            if port == "output":
                hook = partial(self._set_output, (name, port), sites)
                handles.append(module.register_forward_hook(hook))
            else:
                parameters = ports.parameter_names(module)
                before = partial(self._set_input, (name, port), sites, parameters)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        # The last of all: the model's own output may be a target.
        handles.append(self._module.register_forward_hook(self._end, always_call=True))

    def _begin(self, _module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the attention mask of a forward that begins."""
        self._calls.clear()
        self._columns.clear()
        self._mask = None
        self._running = True
        found = {
            name: argument[1]
            for name in ("input_ids", "inputs_embeds", "attention_mask", "past_key_values")
            if (argument := ports.argument(self._parameters, args, kwargs, name)) is not None
        }
        tokens = found.get("input_ids")
        tokens = found.get("inputs_embeds") if tokens is None else tokens
        mask = found.get("attention_mask")
        if tokens is None:
            raise InputError("a forward was given neither input_ids nor inputs_embeds")
        if mask is None:
            if tokens.shape[0] != 1:
                raise InputError(
                    f"a batch of {tokens.shape[0]} prompts without an attention mask: which of its "
                    f"tokens are padding cannot be told; pass attention_mask"
                )
            mask = tokens.new_ones((1, tokens.shape[1])).long()
        if mask.dim() == 2 and mask.shape[1] > tokens.shape[1]:
            return  # a later step of generation: the prompt went through before
        cached = getattr(found.get("past_key_values"), "get_seq_length", None)
        if cached is not None and cached() and mask.shape[1] == tokens.shape[1]:
            return  # such a step by hand, given no mask of the whole
        self._mask = mask

    def _end(self, _module: object, _args: object, _output: object) -> None:
        """Forget the forward that is over."""
        self._running = False
        self._mask = None

    def _set_output(
        self,
        port: tuple[str, str],
        sites: dict[Site, list[_Patch]],
        _m: object,
        _a: object,
        out: Value,
    ) -> Value:
        for site in self._due(port, sites):
            out = ports.replaced(
                out, site.elements, self._set(site, sites[site], out, site.elements)
            )
        return out

    def _set_input(
        self,
        port: tuple[str, str],
        sites: dict[Site, list[_Patch]],
        parameters: tuple[str, ...],
        _module: object,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for site in self._due(port, sites):
            named, elements = ports.split_argument(site.elements)
            found = ports.argument(parameters, args, kwargs, named)
            if found is None:
                raise SiteError(f"`{site}`: the module is not given this argument in this forward")
            place, value = found
            value = ports.replaced(value, elements, self._set(site, sites[site], value, elements))
            args, kwargs = ports.with_argument(args, kwargs, place, value)
        return args, kwargs

    def _due(self, port: tuple[str, str], sites: dict[Site, list[_Patch]]) -> list[Site]:
        if not self._running:
            raise InputError(
                f"a part of {type(self._module).__name__} runs by itself, and which of its rows "
                f"are which tokens is not known; call the model itself inside lm.patched"
            )
        call = self._calls[port]
        self._calls[port] += 1
        return [] if self._mask is None else [site for site in sites if site.call == call]

    def _set(
        self, site: Site, patches: list[_Patch], value: Value, elements: tuple[int | str, ...]
    ) -> torch.Tensor:
        """Return the site's tensor with the wanted tokens exchanged: a new tensor."""
        import torch

        mask = self._mask
        try:
            tensor = ports.pick(value, elements)
        except LookupError as error:
            raise SiteError(f"`{site}`: {error}") from None
        if mask is None or not isinstance(tensor, torch.Tensor):
            raise SiteError(f"`{site}` is {ports.describe(tensor)} in this forward, not a tensor")
        batch, width = mask.shape
        expected = site.expected(batch, width)
        if tuple(tensor.shape) != expected:
            raise SiteError(
                f"`{site}` has shape {shape_text(tensor.shape)} in this forward; expected "
                f"{shape_text(expected)}"
            )
        rows = torch.arange(batch, device=tensor.device)
        result = tensor.clone()
        taken: dict[str, torch.Tensor] = {}
        for patch in patches:
            values = _fitted(patch, batch, tensor)
            for place, position in enumerate(patch.positions):
                columns = self._column(position, mask).to(tensor.device)
                _refuse_meeting(taken, columns, f"{site.path.at(position)}")
                taken[f"{site.path.at(position)}"] = columns
                if site.flat:
                    result[rows * width + columns] = values[:, place]
                else:
                    result[rows, columns] = values[:, place]
        return result

    def _column(self, position: int, mask: torch.Tensor) -> torch.Tensor:
        if position not in self._columns:
            self._columns[position] = columns_of(mask, position)
        return self._columns[position]


def _fitted(patch: _Patch, batch: int, tensor: torch.Tensor) -> torch.Tensor:
    """Return a patch's values for a batch, in the dtype and on the device of the tensor."""
    prompts = patch.values.shape[0]
    if prompts not in (1, batch):
        raise InputError(
            f"`{patch.text}` holds {counted(prompts, 'prompt')}, the batch has "
            f"{counted(batch, 'row')}; expected as many, or one prompt for all rows"
        )
    values = patch.values.to(device=tensor.device, dtype=tensor.dtype)
    if values.dtype != patch.values.dtype and values.dtype.is_floating_point:
        finite = patch.values.isfinite().to(values.device)
        if not bool(values.isfinite()[finite].all()):
            raise CastOverflowError(
                f"`{patch.text}`: values overflow when cast from {patch.values.dtype} to the "
                f"model's {values.dtype}"
            )
    return values.expand(batch, *values.shape[1:])


def _refuse_meeting(taken: dict[str, torch.Tensor], columns: torch.Tensor, text: str) -> None:
    for other, theirs in taken.items():
        if bool((meeting := theirs == columns).any()):
            rows = listed(meeting.nonzero().flatten().tolist())
            raise SiteError(f"`{other}` and `{text}` set the same token in rows {rows}")
