"""From paths to sites: which tensors of a model are meant, in the order in which it computes them.

Nothing is guessed: the paths are expanded against the model's modules, and what brackets after a
port mean, which axis is what, and the order come from two tiny forwards (see `rehearsal`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lamina import forward, ports
from lamina._core import ModuleTree, Path
from lamina.dtypes import dtype_name
from lamina.errors import DtypeError, InputError, PositionError, SiteError
from lamina.positions import parse_positions
from lamina.rehearsal import SIZES, Inputs, Rehearsal, rehearse
from lamina.spelling import read_path, wildcards_explained
from lamina.wording import counted, module_text, shape_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lamina.ports import Leaf, Structure

__all__ = ["Resolved", "Site", "Target", "locate", "resolve"]


@dataclass(frozen=True)
class Site:
    """A place in a model where a tensor of one vector per token can be read.

    Attributes:
        path: The canonical path, without a position.
        module: The module's name, as `named_modules()` gives it.
        port: `"output"` or `"input"`.
        call: Which call of the module within one forward.
        elements: What leads from the port's value to the tensor.
        shape: The shape of one token's values.
        dtype: The dtype that the model computes.
        flat: Whether the tensor is `[batch·sequence, *shape]`, not `[batch, sequence, *shape]`.
    """

    path: Path
    module: str
    port: str
    call: int
    elements: tuple[int | str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    flat: bool

    def __str__(self) -> str:
        """Return the path's text."""
        return str(self.path)

    def expected(self, batch: int, sequence: int) -> tuple[int, ...]:
        """Return the tensor's shape in a batch."""
        return (
            batch * sequence if self.flat else batch,
            *(() if self.flat else (sequence,)),
            *self.shape,
        )


@dataclass(frozen=True)
class Target:
    """A site with a position, as one path named it.

    Attributes:
        site: The site.
        position: The position that the path carries; None if it carries none.
        given: The text of the path or pattern, as the caller gave it.
        order: When the model computes it; compares with that of other targets.
    """

    site: Site
    position: int | slice | list[int] | None
    given: str
    order: tuple[int, ...]


@dataclass(frozen=True)
class Resolved:
    """The sites of a capture.

    Attributes:
        sites: In the order in which the model computes them, each once.
        position: The position that the paths carry, the same for all; None if they carry none.
        structure: Per port that is no plain tensor, what it holds, for people to read.
        position_ids: Whether the forward takes position ids that count from 0.
    """

    sites: tuple[Site, ...]
    position: int | slice | list[int] | None
    structure: dict[str, str] = field(default_factory=dict)
    position_ids: bool = False


def resolve(model: object, sites: str | Path | Sequence[str | Path]) -> Resolved:
    """Find the sites that paths and patterns stand for, in execution order.

    Runs two tiny forwards, which leave no trace in the model.

    Args:
        model: A transformers model, another module that takes `input_ids` and `attention_mask`,
            or an nnsight model.
        sites: Paths or patterns.

    Raises:
        PathError: A text is no path.
        SiteNotFoundError: A path names no module; the nearest real names are listed.
        SiteError: A site cannot be captured: never reached, a tuple with no element named, no
            tensor of one vector per token.
        PositionError: The paths carry different positions.
    """
    targets, rehearsal = locate(model, sites)
    targets.sort(key=lambda target: target.order)
    first = targets[0]
    for target in targets[1:]:
        if parse_positions(target.position) != parse_positions(first.position):
            raise PositionError(
                f"all sites of a capture have the same positions: "
                f"`{first.site.path.at(first.position)}` and "
                f"`{target.site.path.at(target.position)}` differ"
            )
    found = tuple(dict.fromkeys(target.site for target in targets))
    structure = {}
    for site in found:
        outline = rehearsal.runs[0].seen[site.module, site.port, site.call]
        if isinstance(outline, ports.Branch):
            structure[_port_text(site)] = ports.outline(outline)
    return Resolved(found, first.position, structure, rehearsal.position_ids)


def locate(
    model: object, paths: str | Path | Iterable[str | Path], *, position_ids: bool = True
) -> tuple[list[Target], Rehearsal]:
    """Find the targets that paths and patterns stand for, in the order in which they are given.

    Positions may differ. A target is listed as often as the paths name it.

    Args:
        model: The model.
        paths: Paths or patterns.
        position_ids: Whether to find out if the forward takes position ids (more tiny forwards).
    """
    if not isinstance(paths, str | Path | Iterable):
        raise InputError(f"sites={paths!r}: expected paths, such as 'model.layers[:].output'")
    texts = [paths] if isinstance(paths, str | Path) else list(paths)
    if not texts:
        raise InputError("no sites were given; for instance 'model.layers[:].output'")
    given: list[object] = [*texts]
    if strange := [item for item in given if not isinstance(item, str | Path)]:
        raise InputError(f"{strange[0]!r} is no site: expected a path as text")
    module = forward.unwrap(model)
    modules = dict(module.named_modules(remove_duplicate=False))
    tree = ModuleTree(list(modules))
    concrete = [(str(text), path) for text in texts for path in _expand(tree, text)]
    _refuse_shared(modules, dict(module.named_modules()), [path for _, path in concrete])
    wanted = {(path.module, path.port) for _, path in concrete}
    rehearsal = rehearse(model, wanted, position_ids=position_ids)
    return [_target(given, path, module, modules, rehearsal) for given, path in concrete], rehearsal


def _expand(tree: ModuleTree, text: str | Path) -> list[Path]:
    path = read_path(text)
    if path.grad:
        raise SiteError(f"`{path}`: gradients cannot be captured, not yet")
    if isinstance(path.call, slice):
        raise SiteError(f"`{path}`: ranges of calls cannot be captured, not yet; name one call")
    with wildcards_explained(path):
        return tree.expand(path)


def _refuse_shared(
    modules: dict[str, torch.nn.Module], own: dict[str, torch.nn.Module], paths: list[Path]
) -> None:
    names = {id(each): name for name, each in own.items()}
    for path in paths:
        name = names[id(modules[path.module])]
        if name != path.module:
            port = f"{module_text(name)}.{path.port}"
            raise SiteError(
                f"`{path}` is the same module as `{port}`, used more than once; its calls are "
                f"`{port}`, `{port}@1` and so on"
            )


def _target(
    given: str,
    path: Path,
    module: torch.nn.Module,
    modules: dict[str, torch.nn.Module],
    rehearsal: Rehearsal,
) -> Target:
    key = (path.module, path.port, _call(path))
    if any(key not in run.seen for run in rehearsal.runs):
        raise SiteError(_unreached(path, module, modules, rehearsal))
    seen = [run.seen[key] for run in rehearsal.runs]
    used, first, place = _element(path, seen[0])
    _, second, _ = _element(path, seen[1])
    site_path, position = path.split(used)
    shape, flat = _axes(site_path, first, second)
    elements = path.elements[:used]
    site = Site(site_path, path.module, path.port, _call(path), elements, shape, first.dtype, flat)
    return Target(site, position, given, (rehearsal.runs[0].order[key], *place))


def _element(path: Path, seen: Structure | Inputs) -> tuple[int, Leaf, list[int]]:
    """Return how many selectors lead to the tensor, the tensor, and its place in the port."""
    port, selectors, used, place = path.port, path.elements, 0, []
    if isinstance(seen, Inputs):
        structure = seen.first
        if selectors and isinstance(selectors[0], str):
            name = selectors[0]
            if name not in seen.named:
                listed = ports.listing(ports.Branch("arguments", seen.named), port)
                raise SiteError(f"`{path}`: the module is not given `{name}`; it is given {listed}")
            structure, used, place = seen.named[name], 1, [list(seen.named).index(name)]
            port = f"{port}.{name}"
    else:
        structure = seen
    whole = structure
    more, structure = ports.consumed(whole, selectors[used:])
    chosen = selectors[used : used + more]
    used += more
    if isinstance(structure, ports.Leaf):
        if names := [name for name in selectors[used:] if isinstance(name, str)]:
            raise SiteError(f"`{path}`: {structure} has no element `.{names[0]}`")
        return used, structure, place + ports.places(whole, chosen)
    reached = port + "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in chosen)
    text = f"`{module_text(path.module)}.{reached}`"
    if isinstance(structure, ports.Branch):
        raise SiteError(f"{text} is a {structure}: {ports.listing(structure, reached)}; name one")
    if isinstance(seen, Inputs) and port == path.port and seen.named:
        listed = ports.listing(ports.Branch("arguments", seen.named), port)
        raise SiteError(f"{text} is {structure}, not a tensor; the module is given {listed}")
    raise SiteError(f"{text} is {structure}, not a tensor")


def _axes(path: Path, first: Leaf, second: Leaf) -> tuple[tuple[int, ...], bool]:
    (batch, sequence), (other_batch, other_sequence) = SIZES
    feature, other_feature = first.shape[2:], second.shape[2:]
    if first.dtype == second.dtype:
        try:
            dtype_name(first.dtype)
        except DtypeError as error:
            raise SiteError(f"`{path}`: {error}") from None
        if (
            first.shape[:2] == (batch, sequence)
            and second.shape[:2] == (other_batch, other_sequence)
            and feature == other_feature
        ):
            return feature, False
        if (
            first.shape[:1] == (batch * sequence,)
            and second.shape[:1] == (other_batch * other_sequence,)
            and first.shape[1:] == second.shape[1:]
        ):
            return first.shape[1:], True
    raise SiteError(
        f"`{path}` cannot be captured: it is {_shown(first)} for {batch} prompts of {sequence} "
        f"tokens and {_shown(second)} for {other_batch} prompts of {other_sequence} tokens; "
        f"expected [batch, sequence, *feature] or [batch·sequence, *feature]"
    )


def _shown(leaf: Leaf) -> str:
    return f"{shape_text(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"


def _unreached(
    path: Path, module: torch.nn.Module, modules: dict[str, torch.nn.Module], rehearsal: Rehearsal
) -> str:
    import torch

    name = path.module
    calls = [run.calls[name] for run in rehearsal.runs]
    text = f"`{path}` is never reached"
    if max(calls) and _call(path) >= max(calls):
        return f"{text}: the module is called {counted(max(calls), 'time')} in one forward"
    if max(calls):
        return f"{text} in some forwards: whether the module is called depends on the tokens"
    each = modules[name]
    if isinstance(each, torch.nn.ModuleList | torch.nn.ModuleDict):
        held = "[:]" if isinstance(each, torch.nn.ModuleList) else f".{next(iter(each), '…')}"
        return (
            f"{text}: a {type(each).__name__} only holds modules and is never called; "
            f"name what it holds: {module_text(name)}{held}.{path.port}"
        )
    attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if re.search("attn|attention", name.lower()) and attention not in (None, "eager"):
        return (
            f"{text}: fused attention (attn_implementation={attention!r}) skips it; load the "
            f"model with attn_implementation='eager'"
        )
    parent = name.rpartition(".")[0]
    if name and parent in modules and not rehearsal.runs[0].calls[parent]:
        return f"{text}: `{module_text(parent)}`, which holds it, is not called either"
    return f"{text}: the forward does not call this module (it may use its weights directly)"


def _call(path: Path) -> int:
    return path.call if isinstance(path.call, int) else 0


def _port_text(site: Site) -> str:
    return f"{module_text(site.module)}.{site.port}" + (f"@{site.call}" if site.call else "")
