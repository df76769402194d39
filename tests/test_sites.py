"""From paths to sites: names, ports, shapes and order, and what is refused with which message."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.models import (
    LAYERS,
    VOCABULARY,
    WIDTH,
    Plain,
    albert,
    bert,
    bloom,
    gpt2,
    llama,
    mixtral,
    one_thread,
    plain,
    roberta,
    t5,
)
from torch import nn

from lamina.errors import InputError, PathError, PositionError, SiteError, SiteNotFoundError
from lamina.sites import resolve


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def texts(model: Any, paths: Any) -> list[str]:
    return [str(site) for site in resolve(model, paths).sites]


@pytest.fixture(scope="module")
def a_llama() -> Any:
    return llama()


def test_three_spellings_of_a_llama_layer_are_one_site(a_llama: Any) -> None:
    spellings = ["model.layers[2].output", "model.layers.2.output", "model.model.layers[2].output"]
    assert texts(a_llama, spellings) == ["model.model.layers[2].output"]


def test_negative_indices_name_the_layer_they_mean(a_llama: Any) -> None:
    assert texts(a_llama, "model.layers[-1].output") == [f"model.model.layers[{LAYERS - 1}].output"]


def test_order_is_that_of_execution_not_of_names_or_registration(a_llama: Any) -> None:
    parts = ["output", "mlp.output", "self_attn.output[0]", "input_layernorm.output"]
    paths = [f"model.layers[:].{part}" for part in [*parts, "post_attention_layernorm.output"]]
    block = ["input_layernorm.output", "self_attn.output[0]", "post_attention_layernorm.output"]
    expected = [
        f"model.model.layers[{layer}].{part}"
        for layer in range(LAYERS)
        for part in [*block, "mlp.output", "output"]
    ]
    assert texts(a_llama, ["model.lm_head.output", *paths]) == [*expected, "model.lm_head.output"]


def test_input_comes_before_output_and_elements_in_their_order() -> None:
    paths = ["model.pair.output[1].more", "model.pair.output[0]", "model.pair.input"]
    assert texts(plain(), paths) == paths[::-1]


def test_a_site_knows_where_it_is_and_what_it_holds(a_llama: Any) -> None:
    (site,) = resolve(a_llama, "model.layers[1].self_attn.output[0][-1]").sites
    assert (site.module, site.port, site.call) == ("model.layers.1.self_attn", "output", 0)
    assert (site.elements, site.shape, site.dtype) == ((0,), (WIDTH,), torch.float32)
    assert not site.flat
    (logits,) = resolve(a_llama, "model.output.logits").sites
    assert (logits.module, logits.elements, logits.shape) == ("", ("logits",), (VOCABULARY,))


def test_routers_are_flat_and_keep_their_own_dtype() -> None:
    resolved = resolve(mixtral(torch.bfloat16), "model.layers[0].mlp.gate.output[2]")
    (site,) = resolved.sites
    assert (site.shape, site.dtype, site.flat) == ((2,), torch.int64, True)
    assert resolved.structure == {
        "model.model.layers[0].mlp.gate.output": "tuple(Tensor, Tensor, Tensor)"
    }


def test_modules_called_output_are_told_from_ports() -> None:
    paths = ["encoder.layer[0].output", "encoder.layer[0].output.output"]
    found = resolve(bert(), [f"model.{path}" for path in paths])
    assert [site.module for site in found.sites] == ["encoder.layer.0.output", "encoder.layer.0"]


def test_a_tuple_without_an_element_lists_its_elements(a_llama: Any) -> None:
    with pytest.raises(SiteError) as caught:
        resolve(a_llama, "model.layers[0].self_attn.output")
    assert str(caught.value) == (
        "`model.model.layers[0].self_attn.output` is a tuple of 2: "
        "output[0] Tensor [2, 3, 32], output[1] None; name one"
    )


def test_a_negative_bracket_after_a_tuple_is_not_taken_for_its_element() -> None:
    with pytest.raises(
        SiteError, match=r"is a tuple of 2: output\[0\] .* output\[1\] .*; name one"
    ):
        resolve(bloom(), "model.transformer.h[:].output[-1]")


def test_the_first_bracket_after_a_tuple_is_the_element_the_rest_the_position() -> None:
    resolved = resolve(bloom(), "model.transformer.h[0].output[0][-1]")
    assert (texts(bloom(), "model.transformer.h[0].output[0]"), resolved.position) == (
        ["model.transformer.h[0].output[0]"],
        -1,
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "model.pair.output[1]",
            r"output\[1\]` is a dict of 2: output\[1\]\.more Tensor \[2, 3, 32\]",
        ),
        ("model.pair.output[1].less", r"output\[1\]` is a dict of 2: .*; name one"),
        ("model.pair.output[2]", r"is a tuple of 2: .*; name one"),
        ("model.pair.output[0].more", r"Tensor \[2, 3, 32\] has no element `\.more`"),
        ("model.output[0]", r"`model\.output` is a dict of 2: output\.logits .*; name one"),
        ("model.pair.input.mask", r"is not given `mask`; it is given input\.hidden .*input\.scale"),
        ("model.pair.output[1].total", r"it is \[\] float32 for 2 prompts of 3 tokens and \[\]"),
        ("model.unused.output", r"is never reached: the forward does not call this module"),
        ("model.pair.output@1[0]", r"is never reached: the module is called 1 time in one forward"),
        ("model.pair.output@0:2[0]", r"ranges of calls cannot be captured, not yet; name one call"),
        (
            "model.mix.output.grad",
            r"`model\.mix\.output\.grad`: gradients cannot be captured, not yet",
        ),
    ],
)
def test_what_cannot_be_captured_says_why(path: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        resolve(plain(), path)


def test_what_was_meant_is_said_where_little_is_missing() -> None:
    with pytest.raises(PathError, match=r"at byte 0: .*; did you mean `model\.mix\.output`\?"):
        resolve(plain(), "mix.output")
    with pytest.raises(PathError, match=r"found `2`$"):
        resolve(plain(), "2].output")
    with pytest.raises(SiteNotFoundError, match=r"write `\[:\]`: `model\.layers\[:\]\.output`"):
        resolve(llama(), "model.layers.*.output")


def test_odd_shapes_are_refused_with_both_printed(a_llama: Any) -> None:
    with pytest.raises(SiteError) as caught:
        resolve(a_llama, "model.rotary_emb.output[0]")
    assert str(caught.value) == (
        "`model.model.rotary_emb.output[0]` cannot be captured: it is [1, 3, 8] float32 for 2 "
        "prompts of 3 tokens and [1, 5, 8] float32 for 3 prompts of 5 tokens; expected "
        "[batch, sequence, *feature] or [batch·sequence, *feature]"
    )
    with pytest.raises(SiteError, match=r"it is \[12, 48\] .* and \[30, 48\]"):
        resolve(Flat(), "model.inner.output")


class Flat(nn.Module):
    """Expands every token twice, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 48)
        self.inner = nn.Identity()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.inner(self.embed(input_ids).flatten(0, 1).repeat(2, 1)) * attention_mask.sum()


def test_pooled_outputs_are_refused() -> None:
    with pytest.raises(SiteError, match=r"it is \[2, 32\] float32 .* and \[3, 32\] float32"):
        resolve(bert(), "model.pooler.output")


def test_sites_that_fused_attention_skips_say_so() -> None:
    with pytest.raises(SiteError, match=r"fused attention \(attn_implementation='sdpa'\) skips it"):
        resolve(gpt2(), "model.transformer.h[0].attn.attn_dropout.output")


def test_containers_are_never_called(a_llama: Any) -> None:
    with pytest.raises(
        SiteError,
        match=r"a ModuleList only holds .* name what it holds: model\.model\.layers\[:\]\.output",
    ):
        resolve(a_llama, "model.model.layers.output")


def test_unknown_sites_list_the_nearest(a_llama: Any) -> None:
    with pytest.raises(SiteNotFoundError, match="self_attn"):
        resolve(a_llama, "model.layers[0].self_atn.output[0]")


def test_all_sites_have_the_same_position(a_llama: Any) -> None:
    assert (
        resolve(a_llama, ["model.layers[0].output[-1]", "model.lm_head.output[-1]"]).position == -1
    )
    assert resolve(a_llama, "model.layers[0].output[-4:]").position == slice(-4, None)
    assert resolve(a_llama, "model.layers[0].output").position is None
    resolve(a_llama, ["model.layers[0].output[:]", "model.layers[1].output"])
    with pytest.raises(PositionError) as caught:
        resolve(a_llama, ["model.layers[0].output[-1]", "model.layers[1].output"])
    assert str(caught.value) == (
        "all sites of a capture have the same positions: `model.model.layers[0].output[-1]` and "
        "`model.model.layers[1].output` differ"
    )


def test_no_sites_is_an_error(a_llama: Any) -> None:
    with pytest.raises(InputError, match="no sites were given"):
        resolve(a_llama, [])


def test_calls_of_a_module_used_several_times() -> None:
    layer = "model.encoder.albert_layer_groups[0].albert_layers[0].output"
    assert texts(albert(), [f"{layer}@2", layer, f"{layer}@1"]) == [
        layer,
        f"{layer}@1",
        f"{layer}@2",
    ]
    with pytest.raises(SiteError, match="the module is called 3 times in one forward"):
        resolve(albert(), f"{layer}@3")


def test_one_module_under_two_names_is_named_by_the_first() -> None:
    model = Flat()
    model.alias = model.inner
    with pytest.raises(
        SiteError, match=r"`model\.alias\.output` is the same module as `model\.inner"
    ):
        resolve(model, "model.alias.output")


def test_a_model_must_take_ids_and_mask() -> None:
    with pytest.raises(InputError, match="the forward of Linear takes no input_ids"):
        resolve(nn.Linear(2, 2), "model.output")
    with pytest.raises(InputError, match=r"str is no model: expected a torch\.nn\.Module"):
        resolve("gpt2", "model.output")
    with pytest.raises(InputError, match=r"pass the GPT2LMHeadModel itself \(model\._orig_mod\)"):
        resolve(torch.compile(gpt2(), backend="eager"), "model.lm_head.output")


class Wrapper(nn.Module):
    """Hands on whatever it is given, as adapters around a model do."""

    def __init__(self, inner: nn.Module, *, drop: str = "") -> None:
        super().__init__()
        self.inner = inner
        self.drop = drop

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        given.pop(self.drop, None)
        return self.inner(input_ids=input_ids, **given)


def test_position_ids_are_given_where_they_have_an_effect() -> None:
    site = "model.inner.lm_head.output"
    assert resolve(gpt2(), "model.lm_head.output").position_ids
    assert resolve(Wrapper(gpt2()), site).position_ids
    assert not resolve(Wrapper(gpt2(), drop="position_ids"), site).position_ids
    assert not resolve(plain(), "model.mix.output").position_ids
    assert not resolve(bloom(), "model.lm_head.output").position_ids
    assert not resolve(roberta(), "model.encoder.layer[0].output").position_ids


def test_a_vocabulary_of_two_tokens_is_enough() -> None:
    assert texts(Plain(vocabulary=2), "model.mix.output") == ["model.mix.output"]


@pytest.mark.parametrize("build", [llama, gpt2, mixtral, plain])
def test_the_tiny_forwards_leave_no_trace(build: Any) -> None:
    model = build()
    model.train()
    first = next(model.children())
    first.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    resolve(model, "model.mix.output" if build is plain else "model.lm_head.output")
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_encoder_with_a_decoder_says_what_can_be_captured() -> None:
    model = t5()
    with pytest.raises(ValueError, match="exactly one of") as caught:
        resolve(model, "model.encoder.block[0].output[0]")
    assert "its encoder can be captured by itself: model.get_encoder()" in caught.value.__notes__[1]
    assert texts(model.get_encoder(), "model.block[0].output[0]") == ["model.block[0].output[0]"]


def test_a_model_that_fails_on_the_tiny_forwards_fails_with_its_own_error() -> None:
    model = plain()
    model.mix.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        resolve(model, "model.pair.input")
    assert "in a tiny forward of 2 prompts of 3 tokens" in "".join(caught.value.__notes__)
    assert all(len(module._forward_hooks) == (module is model.mix) for module in model.modules())
