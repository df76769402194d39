"""What decides whether stored numbers are used again: every compared field, and what is opaque."""

import copy
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interrupting import Interrupt
from tests.models import gpt2, llama
from tests.words import word_tokenizer

import lamina as lm
from lamina.forward import input_device
from lamina.identity import (
    RoundingWarning,
    differing,
    model_fields,
    opaque_reasons,
    refusal,
    rounding_facts,
    weights_digest,
)

SITES = "model.layers[:].output"
PROMPTS = [[3, 4, 5], [6, 7], [8]]
TEXTS = ["the cat sat", "a dog"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> Any:
    return llama()


def refused(
    model: Any, to: Path, prompts: Any = PROMPTS, sites: Any = SITES, **options: Any
) -> Any:
    """The error of a capture into a store that holds something else; nothing is touched."""
    before = {file: file.read_bytes() for file in to.rglob("*") if file.is_file()}
    with pytest.raises(lm.IdentityError) as caught:
        lm.capture(model, prompts, sites, to=to, **options)
    assert {file: file.read_bytes() for file in to.rglob("*") if file.is_file()} == before
    return caught.value


def test_the_error_names_each_field_with_both_values(model: Any, tmp_path: Path) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path)
    error = refused(model, tmp_path, dtype="bfloat16", positions=-1)
    assert str(error).splitlines() == [
        f"{tmp_path} holds another capture; 2 fields differ:",
        '  positions: the store has ":", this capture "-1"',
        '  dtype: the store has "float32", this capture "bfloat16"',
        f"Choose another directory, or remove this store: rm -r {tmp_path}",
    ]
    assert error.fields == {"positions": (":", "-1"), "dtype": ("float32", "bfloat16")}


def test_one_changed_weight_is_noticed(model: Any, tmp_path: Path) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path)
    weight = model.model.layers[2].mlp.down_proj.weight
    with torch.no_grad():
        old = float(weight[3, 5])
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert list(refused(model, tmp_path).fields) == ["weights"]
    with torch.no_grad():
        weight[3, 5] = old
    assert lm.capture(model, PROMPTS, SITES, to=tmp_path).complete


def test_a_buffer_counts_like_a_weight(model: Any) -> None:
    before = weights_digest(model)
    model.model.rotary_emb.inv_freq[1] *= 1.5
    assert weights_digest(model) != before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: setattr(m.config, "rms_norm_eps", 1e-3), "config.rms_norm_eps"),
        (lambda m: m.config.rope_parameters.update(rope_theta=5e5), "config.rope_parameters"),
        (lambda m: m.set_attn_implementation("eager"), "attention"),
        (lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.Tanh()), "modules"),
        (lambda m: m.to(torch.bfloat16), "weights"),
    ],
)
def test_what_changes_the_numbers_is_compared(
    model: Any, tmp_path: Path, change: Any, field: str
) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path, dtype="float32")
    change(model)
    fields = refused(model, tmp_path, dtype="float32").fields
    assert [name for name in fields if name.startswith(field)]


def test_where_a_model_came_from_is_recorded_only(model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    lm.capture(model, PROMPTS, SITES, to=tmp_path / "acts")
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    loaded.config.use_cache = False
    loaded.config.transformers_version = "9.9"
    assert model_fields(loaded) == model_fields(model)
    assert lm.capture(loaded, PROMPTS, SITES, to=tmp_path / "acts").complete


def test_a_copy_of_a_model_is_the_same_model(model: Any) -> None:
    assert model_fields(copy.deepcopy(model)) == model_fields(model)


def test_an_earlier_forward_that_recorded_hidden_states_does_not_matter(
    model: Any, tmp_path: Path
) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path)
    model(torch.tensor([[1, 2]]), output_hidden_states=True)  # transformers leaves hooks behind
    assert lm.capture(model, PROMPTS, SITES, to=tmp_path).complete


def test_tensors_are_told_apart_by_bits_dtype_shape_and_name() -> None:
    def digest(name: str, tensor: torch.Tensor) -> str:
        module = torch.nn.Module()
        module.register_buffer(name, tensor)
        return weights_digest(module)

    base = torch.zeros(4, 6)
    others = {
        digest("a", base),
        digest("b", base),
        digest("a", base.view(6, 4)),
        digest("a", base.to(torch.int32)),
        digest("a", -base),  # minus zero
        digest("a", base.to(torch.bfloat16)),
        digest("a", torch.zeros(())),
    }
    assert len(others) == 7
    assert digest("a", torch.arange(24.0).view(4, 6).t()) == digest(
        "a", torch.arange(24.0).view(4, 6).t().contiguous()
    )


def test_tied_weights_are_read_once_and_equal_untied_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    tied, loose = gpt2(), gpt2()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    loose.lm_head.weight = torch.nn.Parameter(loose.transformer.wte.weight.detach().clone())
    assert weights_digest(tied) == weights_digest(loose)
    seen: list[int] = []
    inner = lm._core.hash_bytes
    monkeypatch.setattr(
        lm._core, "hash_bytes", lambda parts: seen.append(len(parts[0])) or inner(parts)
    )
    weights_digest(tied)
    tied_bytes = sum(seen)
    seen.clear()
    weights_digest(loose)
    assert sum(seen) - tied_bytes == tied.lm_head.weight.nbytes


def test_large_tensors_are_hashed_a_part_at_a_time(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    largest = []
    inner = lm._core.hash_bytes
    monkeypatch.setattr(
        lm._core, "hash_bytes", lambda parts: largest.append(len(parts[0])) or inner(parts)
    )
    monkeypatch.setattr("lamina.identity.HASH_BYTES", 1000)
    digests.add(weights_digest(model))
    assert max(largest) <= 1000


def test_weights_are_hashed_at_a_gigabyte_a_second_at_least() -> None:
    module = torch.nn.Module()
    module.register_buffer("weight", torch.zeros(1 << 26))  # 256 MiB
    begun = time.perf_counter()
    weights_digest(module)
    assert 2**28 / (time.perf_counter() - begun) > 1e9


def test_the_tokenizer_counts_without_its_padding_and_truncation(
    model: Any, tmp_path: Path
) -> None:
    lm.capture(model, TEXTS, SITES, to=tmp_path, tokenizer=word_tokenizer())
    used = word_tokenizer(padding_side="left")
    used(TEXTS, padding=True, truncation=True, max_length=2)
    assert lm.capture(model, TEXTS, SITES, to=tmp_path, tokenizer=used).complete
    other = word_tokenizer()
    other.add_tokens(["xylophone"])
    assert list(refused(model, tmp_path, TEXTS, tokenizer=other).fields) == ["tokenizer"]


def test_a_tokenizer_that_saw_no_text_does_not_count(model: Any, tmp_path: Path) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path, tokenizer=word_tokenizer())
    assert lm.capture(model, PROMPTS, SITES, to=tmp_path).identity["tokenizer"] is None


def test_other_prompts_are_refused_with_their_number(model: Any, tmp_path: Path) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path)
    assert list(refused(model, tmp_path, [*PROMPTS[:2], [9]]).fields) == ["tokens"]
    assert refused(model, tmp_path, PROMPTS[:2]).fields["prompts"] == (3, 2)
    assert "tokens" in refused(model, tmp_path, [[3, 4], [5, 6, 7], [8]]).fields


def test_some_of_the_sites_are_refused_with_a_hint_to_open(model: Any, tmp_path: Path) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path)
    error = refused(model, tmp_path, sites="model.layers[1].output")
    assert (
        f"All the sites asked for are in the store: lm.open({str(tmp_path)!r}) reads them."
        in str(error)
    )
    assert "lm.open" not in str(refused(model, tmp_path, sites="model.layers[:].mlp.output"))


def test_a_directory_with_spaces_is_quoted_in_the_command(tmp_path: Path) -> None:
    error = refusal(str(tmp_path / "my acts"), {"dtype": ("a", "b")})
    assert f"rm -r '{tmp_path}/my acts'" in str(error)
    assert "this field differs:" in str(error)


def test_the_callers_own_fields_are_compared(model: Any, tmp_path: Path) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path, identity={"run": 7})
    assert lm.capture(model, PROMPTS, SITES, to=tmp_path, identity={"run": 7}).complete
    assert refused(model, tmp_path, identity={"run": 8}).fields == {"identity.run": (7, 8)}
    assert refused(model, tmp_path).fields == {"identity.run": (7, None)}


@pytest.mark.parametrize("given", [["run"], {"run": object()}, {1: "a"}, {"a": float("nan")}])
def test_identity_must_be_names_with_json_values(model: Any, tmp_path: Path, given: Any) -> None:
    with pytest.raises(lm.InputError, match="identity"):
        lm.capture(model, PROMPTS, SITES, to=tmp_path, identity=given)


def test_a_hook_of_others_makes_a_capture_opaque_unless_it_is_named(
    model: Any, tmp_path: Path
) -> None:
    model.model.layers[0].register_forward_hook(lambda _m, _a, output: output * 2)
    with pytest.warns(
        lm.OpaqueWarning, match=r"neither resumed nor recognised.*identity=\{'edits'"
    ):
        store = lm.capture(model, PROMPTS, SITES, to=tmp_path / "unnamed")
    assert store.identity["opaque"] == [
        f"hooks or replaced forwards of others on model.model.layers[0] (a hook of {__name__})"
    ]
    error = refused(model, tmp_path / "unnamed")
    assert "cannot be compared with this capture" in str(error)
    assert "differ" not in str(error)
    assert "identity={'edits': 'v1'}" in str(error)
    assert "identity.edits" in refused(model, tmp_path / "unnamed", identity={"edits": "v1"}).fields

    lm.capture(model, PROMPTS, SITES, to=tmp_path / "named", identity={"edits": "v1"})
    again = lm.capture(model, PROMPTS, SITES, to=tmp_path / "named", identity={"edits": "v1"})
    assert again.complete
    assert "identity.edits" in refused(model, tmp_path / "named", identity={"edits": "v2"}).fields


@pytest.mark.parametrize("identity", [None, {"hook": 1}])
def test_an_opaque_capture_resumes_only_if_it_is_named(
    model: Any, tmp_path: Path, identity: dict[str, object] | None
) -> None:
    model.model.layers[0].register_forward_hook(lambda _m, _a, output: output)
    options: Any = {"batch_size": 1, "window_bytes": 1, "identity": identity}
    warned = nullcontext() if identity else pytest.warns(lm.OpaqueWarning)
    with warned, Interrupt(model, 1, RuntimeError("cut")), pytest.raises(RuntimeError, match="cut"):
        lm.capture(model, PROMPTS, SITES, to=tmp_path, **options)
    assert lm.open(tmp_path).rows == len(PROMPTS[0])
    if identity is None:
        assert list(refused(model, tmp_path, **options).fields) == ["opaque"]
    else:
        assert lm.capture(model, PROMPTS, SITES, to=tmp_path, **options).complete


def test_what_makes_a_model_opaque() -> None:
    model = llama()
    assert opaque_reasons(model, model) == []
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    assert "model.model.layers[1].mlp (forward of" in opaque_reasons(model, model)[0]
    away = llama()
    away.model.layers[0].mlp.to("meta")
    assert opaque_reasons(away, away) == [
        "offloaded weights: model.layers.0.mlp.gate_proj.weight, "
        "model.layers.0.mlp.up_proj.weight and model.layers.0.mlp.down_proj.weight"
    ]

    class Packed(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, function: Any, *rest: Any) -> Any:
            if function in (torch.Tensor.data_ptr, torch.Tensor.contiguous):
                raise RuntimeError("has no storage of its own")
            return super().__torch_function__(function, *rest)

    strange = llama()
    strange.lm_head.weight = Packed(strange.lm_head.weight.data)
    assert weights_digest(strange) != weights_digest(llama())
    assert opaque_reasons(strange, strange) == ["quantisation state outside the tensors (Packed)"]
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert opaque_reasons(llama(), llama()) == ["global forward hooks of torch"]
    finally:
        handle.remove()


def test_an_edited_nnsight_model_is_opaque_and_a_plain_one_is_not() -> None:
    import nnsight

    model = nnsight.NNsight(llama())
    inner = model._module
    assert opaque_reasons(model, inner) == []
    assert opaque_reasons(inner, inner) == []  # though nnsight replaced every forward
    with model.edit(inplace=True):
        model.model.layers[0].output = model.model.layers[0].output * 2
    assert opaque_reasons(model, inner) == ["edits of the nnsight model"]


def test_autocast_is_compared_not_only_recorded(model: Any, tmp_path: Path) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = refused(model, tmp_path)
    assert error.fields == {"autocast": (None, "bfloat16")}


def test_what_changes_rounding_is_a_warning_on_a_hit(model: Any, tmp_path: Path) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path)
    torch.set_num_threads(2)
    try:
        with pytest.warns(RoundingWarning, match="threads 1, now 2; computed now, the numbers"):
            store = lm.capture(model, PROMPTS, SITES, to=tmp_path)
    finally:
        torch.set_num_threads(1)
    assert store.complete


def test_rounding_facts_tell_versions_device_and_threads(model: Any) -> None:
    facts = rounding_facts(model, input_device(model))
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == 1
    assert str(facts["device"]).startswith("cpu")
    assert "transformers" in facts


def test_fields_that_only_one_side_has_differ() -> None:
    assert differing({"a": 1, "b": 2}, {"a": 1, "c": 3}) == {"b": (2, None), "c": (None, 3)}


def test_options_that_a_store_lacks_are_refused_on_a_hit(model: Any, tmp_path: Path) -> None:
    lm.capture(model, TEXTS, SITES, to=tmp_path, tokenizer=word_tokenizer(), texts=False)
    error = refused(model, tmp_path, TEXTS, tokenizer=word_tokenizer(), texts=True)
    assert error.fields == {"texts": (False, True)}


class _Scaled(torch.nn.Module):
    """A model without a configuration: what it computes depends on plain attributes."""

    def __init__(self, scale: float, epsilon: float, act: object) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.norm = torch.nn.LayerNorm(4, eps=epsilon)
        self.scale, self.act = scale, act

    def forward(self, input_ids, attention_mask):
        return self.act(self.norm(self.embed(input_ids))) * self.scale


def test_settings_of_a_model_without_a_configuration_are_compared():
    def fields(scale=1.0, epsilon=1e-5, act=torch.tanh):
        torch.manual_seed(0)
        return model_fields(_Scaled(scale, epsilon, act))

    same = fields()
    assert differing(same, fields()) == {}
    assert differing(same, fields(scale=2.0)) == {"settings.scale": (1.0, 2.0)}
    assert set(differing(same, fields(epsilon=1.0))) == {"modules"}
    assert set(differing(same, fields(act=torch.sigmoid))) == {"settings.act"}
    assert json.loads(json.dumps(fields(scale=float("inf"))))["settings.scale"] == "inf"


def test_an_adapter_that_is_switched_off_or_scaled_is_another_model():
    class Adapted(torch.nn.Module):
        """What PEFT's layers show of themselves."""

        def __init__(self, *, disable: bool = False, scaling: float = 1.0) -> None:
            super().__init__()
            self.peft_config: dict[str, Any] = {}
            self.disable_adapters, self.active_adapters = disable, ["default"]
            self.scaling = {"default": scaling}

    plain = model_fields(Adapted())
    assert "adapters" in differing(plain, model_fields(Adapted(disable=True)))
    assert set(differing(plain, model_fields(Adapted(scaling=2.0)))) == {"adapters"}
    assert differing(plain, model_fields(Adapted())) == {}


def test_a_configuration_with_an_infinity_is_an_identity(tmp_path: Path) -> None:
    model = llama()
    model.config.time_step_limit = (0.0, float("inf"))
    assert lm.capture(model, PROMPTS, SITES, to=tmp_path).identity["config.time_step_limit"] == [
        0.0,
        "Infinity",
    ]
    assert lm.capture(model, PROMPTS, SITES, to=tmp_path).complete
    model.config.time_step_limit = (0.0, float("-inf"))
    assert list(refused(model, tmp_path).fields) == ["config.time_step_limit"]
