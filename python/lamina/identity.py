"""What decides whether stored numbers can be used again: what made them, bit for bit.

Compared are the model (class, modules, configuration or else plain attributes, every parameter and
buffer as it is in memory), the tokenizer, the token ids, sites, positions, dtype and attention
implementation. Names, paths and versions are recorded beside it. What cannot be seen from here
makes an identity *opaque*.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from typing import TYPE_CHECKING, Any, TypeAlias

from lamina.errors import IdentityError, InputError
from lamina.wording import counted, listed, module_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    Json: TypeAlias = str | int | float | bool | list[Any] | dict[str, Any] | None
    Fields: TypeAlias = dict[str, Json]

__all__ = [
    "OpaqueWarning",
    "RoundingWarning",
    "autocast_field",
    "differing",
    "model_fields",
    "opaque_reasons",
    "refusal",
    "rounding_facts",
    "user_fields",
    "weights_digest",
]

HASH_BYTES = 1 << 26
"""Tensors are hashed, and brought from their device, this much at a time."""

USER_PREFIX = "identity."
"""Fields named by the caller are kept apart from ours."""

NAMED = 16
"""How many differing fields a message shows; the error itself carries all."""

_RECORDED_ONLY = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "dtype",
        "gguf_file",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of a configuration that say where it came from or what a call returns."""


_ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


class OpaqueWarning(UserWarning):
    """A capture is begun that can be neither resumed nor recognised, as nobody names its edits."""


class RoundingWarning(UserWarning):
    """A store was made on another device or with other versions: numbers may differ in rounding."""


def model_fields(module: torch.nn.Module) -> Fields:
    """Return the compared fields of a model, its weights hashed as they are in memory."""
    config = getattr(module, "config", None)
    fields: Fields = {"class": type(module).__name__}
    if config is not None and hasattr(config, "to_dict"):
        fields.update(_flat("config", config.to_dict()))
        fields["attention"] = getattr(config, "_attn_implementation", None)
    else:
        fields.update(_settings(module))
    if hasattr(module, "peft_config"):
        adapters = {name: item.to_dict() for name, item in dict(module.peft_config).items()}  # type: ignore[arg-type]
        # An adapter may be there and be switched off, or be scaled.
        states = [
            [name, *(str(getattr(each, key, None)) for key in _ADAPTER_STATE)]
            for name, each in module.named_modules()
            if hasattr(each, "disable_adapters")
        ]
        fields["adapters"] = _text_digest(
            json.dumps([adapters, states], sort_keys=True, default=str)
        )
    tree = [(name, type(each).__name__, _own_words(each)) for name, each in module.named_modules()]
    fields["modules"] = _text_digest(json.dumps(tree))
    fields["weights"] = weights_digest(module)
    return fields


def _own_words(module: torch.nn.Module) -> str:
    """Return what a module of torch prints of itself, such as the epsilon of a norm."""
    return module.extra_repr() if type(module).__module__.startswith("torch.") else ""


def _settings(module: torch.nn.Module) -> Fields:
    """Return the plain attributes of a model's own modules, which no configuration holds."""
    fields: Fields = {}
    for name, each in module.named_modules():
        if type(each).__module__.startswith("torch."):
            continue
        for key, value in sorted(vars(each).items()):
            if key.startswith("_") or key == "training":
                continue
            field = ".".join(filter(None, ("settings", name, key)))
            if isinstance(value, bool | int | str):
                fields[field] = value
            elif isinstance(value, float):
                fields[field] = value if math.isfinite(value) else str(value)
            elif callable(value) and hasattr(value, "__qualname__"):
                fields[field] = f"{value.__module__}.{value.__qualname__}"
    return fields


def weights_digest(module: torch.nn.Module) -> str:
    """Return a digest of all parameters and buffers: names, dtypes, shapes and bits.

    A tensor with several names is read once.
    """
    from lamina._core import hash_bytes

    known: dict[tuple[Any, ...], list[str]] = {}
    entries = []
    for name, tensor in sorted(_tensors(module), key=lambda pair: pair[0]):
        if tensor.device.type == "meta":
            digests = ["meta"]
        elif not _is_plain(tensor):
            digests = [type(tensor).__name__]  # the identity is opaque, see `opaque_reasons`
        else:
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if key not in known or not tensor.data_ptr():
                known[key] = [hash_bytes([part]) for part in _parts(tensor)]
            digests = known[key]
        entries.append([name, str(tensor.dtype), list(tensor.shape), digests])
    return _text_digest(json.dumps(entries))


def opaque_reasons(model: object, module: torch.nn.Module) -> list[str]:
    """Return what of a model cannot be compared, because it is not in its tensors."""
    import torch

    from lamina import tracing

    reasons: list[str] = []
    if tracing.has_edits(model):
        reasons.append("edits of the nnsight model")
    hooks = [
        f"{module_text(name)} ({found})"
        for name, each in module.named_modules()
        if (found := _foreign(each)) is not None
    ]
    if hooks:
        reasons.append(f"hooks or replaced forwards of others on {listed(hooks, most=3)}")
    anywhere = torch.nn.modules.module
    if anywhere._global_forward_hooks or anywhere._global_forward_pre_hooks:
        reasons.append("global forward hooks of torch")
    tensors = dict(_tensors(module))
    away = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if away:
        reasons.append(f"offloaded weights: {listed(away, most=3)}")
    strange = sorted({type(t).__name__ for t in tensors.values() if not _is_plain(t)})
    if strange or _computes_quantised(module):
        kinds = f" ({listed(strange)})" if strange else ""
        reasons.append(f"quantisation state outside the tensors{kinds}")
    return reasons


def _computes_quantised(module: torch.nn.Module) -> bool:
    """Return whether a quantiser's own modules compute; GGUF files are unpacked to plain ones."""
    plain = ("torch.nn.", "transformers.models.", "transformers.activations")
    return bool(getattr(module, "is_quantized", False)) and any(
        not type(each).__module__.startswith(plain) for each in module.modules()
    )


def rounding_facts(module: torch.nn.Module, device: torch.device) -> Fields:
    """Return what changes no more than rounding: device, versions, threads, kernels."""
    import torch

    facts: Fields = {
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts["device"] = f"cuda ({torch.cuda.get_device_name(device)})"
        facts["matmul_precision"] = torch.get_float32_matmul_precision()
        del facts["threads"]
    elif device.type == "cpu":
        facts["device"] = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    if type(module).__module__.startswith("transformers."):
        import transformers

        facts["transformers"] = transformers.__version__
    experts = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if experts is not None:
        facts["experts"] = str(experts)
    return facts


def autocast_field(device: torch.device) -> str | None:
    """Return the dtype that `torch.autocast` computes in, where the caller has switched it on."""
    import torch

    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def user_fields(given: Mapping[str, object] | None) -> Fields:
    """Return the caller's own fields under names of their own.

    Raises:
        InputError: They are no mapping of names to JSON values.
    """
    if given is None:
        return {}
    if not hasattr(given, "items"):
        raise InputError(f"identity={given!r}: expected a dict, such as {{'edits': 'v1'}}")
    fields: Fields = {}
    for name, value in given.items():
        if not isinstance(name, str):
            raise InputError(f"identity has the name {name!r}; names are texts")
        try:
            fields[USER_PREFIX + name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise InputError(f"identity[{name!r}] is {value!r}; expected a JSON value") from None
    return fields


def differing(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, each with the stored and the given value."""
    names = [*stored, *(name for name in given if name not in stored)]
    return {
        name: (stored.get(name), given.get(name))
        for name in names
        if stored.get(name) != given.get(name)
    }


def refusal(
    directory: str, fields: dict[str, tuple[Any, Any]], hints: Sequence[str] = ()
) -> IdentityError:
    """Return the error for a store that holds something else: the fields with both their values."""
    lines = [f"{directory} holds another capture; {counted(len(fields), 'field')} differ:"]
    if len(fields) == 1:
        lines[0] = f"{directory} holds another capture; this field differs:"
    shown = list(fields.items())[:NAMED]
    lines += [
        f"  {name}: the store has {_shown(stored)}, this capture {_shown(given)}"
        for name, (stored, given) in shown
    ]
    if len(fields) > len(shown):
        lines.append(f"  and {len(fields) - len(shown)} more")
    lines += list(hints)
    lines.append(f"Choose another directory, or remove this store: rm -r {shlex.quote(directory)}")
    return IdentityError("\n".join(lines), fields)


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, list) and len(text) > 160:
        return f"{listed(value, most=4)} ({len(value)} in all)"
    return text if len(text) <= 160 else text[:157] + "…"


def _flat(name: str, value: Any) -> Iterator[tuple[str, Json]]:  # noqa: ANN401
    if isinstance(value, dict) and value:
        for key, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            if str(key) not in _RECORDED_ONLY:
                yield from _flat(f"{name}.{key}", item)
        return
    # JSON has no infinity, and some configurations do: text stands for it.
    yield name, json.loads(json.dumps(value, default=str), parse_constant=str)


def _text_digest(text: str) -> str:
    return "blake2b:" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _parts(tensor: torch.Tensor) -> Iterator[Any]:
    """Yield a tensor's bytes in row-major order, a bounded part at a time, on the CPU."""
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    step = HASH_BYTES // max(flat.element_size(), 1)
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().view(torch.uint8).numpy()


def _is_plain(tensor: torch.Tensor) -> bool:
    import torch

    plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    dense = type(tensor) in plain and tensor.layout == torch.strided
    return dense and not tensor.is_quantized


def _foreign(module: torch.nn.Module) -> str | None:
    """Return what else takes part in a module's forward, or None (transformers' hooks look on)."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        origin = str(getattr(hook, "__module__", None) or type(hook).__module__)
        if not origin.startswith("transformers.utils.output_capturing"):
            return f"a hook of {origin}"
    if "forward" not in vars(module):
        return None
    replaced = vars(module)["forward"]
    if type(replaced).__module__.startswith("nnsight."):
        return None
    mover = getattr(module, "_hf_hook", None)
    if type(mover).__name__ == "AlignDevicesHook" and not getattr(mover, "offload", True):
        return None  # accelerate only moves the inputs
    return f"forward of {getattr(replaced, '__module__', type(replaced).__module__)}"
