"""What is recorded is what the model computed: bit for bit what a plain forward gives."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import FAMILIES, albert, bloom, one_thread, plain, roberta
from tests.recording import plain_forward, prompts_of, record, same_bits, truth

from lamina.positions import make_batch
from lamina.sites import resolve

LENGTHS = {"right": [5, 1, 9, 3, 9, 2, 7, 4], "left": [5, 1, 9, 3, 9, 2, 7, 4], "none": [6] * 8}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_a_plain_forward_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    build, paths = FAMILIES[family]
    model = build(dtype)
    resolved = resolve(model, paths)
    for padding in ("right", "left", "none"):
        prompts = prompts_of(LENGTHS[padding])
        for batch_size in (1, 8):
            options = {"padding": padding, "batch_size": batch_size}
            recorded = record(model, resolved, prompts, **options)
            expected = truth(model, resolved, prompts, **options)
            for name, rows in recorded.items():
                assert same_bits(rows, expected[name]), (name, padding, batch_size)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_each_prompt_alone(family: str, padding: str) -> None:
    build, paths = FAMILIES[family]
    model = build(torch.float32)
    resolved = resolve(model, paths)
    prompts = prompts_of(LENGTHS[padding])
    alone = record(model, resolved, prompts, batch_size=1)
    batched = record(model, resolved, prompts, padding=padding, batch_size=8)
    for name, rows in batched.items():
        assert torch.allclose(rows, alone[name], rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("build", [roberta, bloom, albert])
def test_models_with_position_rules_of_their_own(build: Any) -> None:
    model = build(torch.float32)
    paths = {
        roberta: "model.encoder.layer[:].output",
        bloom: "model.transformer.h[:].output[0]",
        albert: [
            f"model.encoder.albert_layer_groups[0].albert_layers[0].output@{k}" for k in (2, 0)
        ],
    }[build]
    pad_id = 1 if build is roberta else 0
    prompts = [ids[ids != 1] for ids in prompts_of(LENGTHS["right"])]
    prompts = [ids if len(ids) else np.array([2]) for ids in prompts]
    resolved = resolve(model, paths)
    assert resolved.position_ids == (build is albert)
    alone = record(model, resolved, prompts, batch_size=1)
    for padding in ("right", "left"):
        batched = record(model, resolved, prompts, padding=padding, pad_id=pad_id)
        for name, rows in batched.items():
            assert torch.allclose(rows, alone[name], rtol=1e-6, atol=1e-6), (name, padding)


def test_a_module_called_several_times_keeps_the_call_asked_for() -> None:
    model = albert()
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    prompts = prompts_of([4, 6])
    recorded = record(model, ["model." + layer + f".output@{k}" for k in (2, 0, 1)], prompts)
    log = plain_forward(model, make_batch(prompts))
    assert [name.partition("@")[2] for name in recorded] == ["", "1", "2"]
    for call, rows in enumerate(recorded.values()):
        whole = log[layer, "output", call]
        assert same_bits(rows, torch.cat([whole[0, :4], whole[1, :6]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_come_in_the_order_of_an_independent_hook_log(family: str) -> None:
    build, paths = FAMILIES[family]
    model = build()
    log = list(plain_forward(model, make_batch(prompts_of([4, 2]))))
    sites = resolve(model, paths[::-1]).sites
    places = [log.index((site.module, site.port, site.call)) for site in sites]
    assert places == sorted(places)
    assert len({str(site) for site in sites}) == len(sites)


def test_tokens_equal_to_the_pad_token_inside_a_prompt_are_real() -> None:
    model, paths = FAMILIES["gpt2"][0](), "model.transformer.h[:].output"
    prompts = [np.array([0, 0, 5, 0]), np.array([0]), np.array([7, 0, 0, 3, 0, 0])]
    alone = record(model, paths, prompts, batch_size=1)
    for padding in ("left", "right"):
        for name, rows in record(model, paths, prompts, padding=padding).items():
            assert len(rows) == 11
            assert torch.allclose(rows, alone[name], rtol=1e-6, atol=1e-6)


def test_a_model_of_no_library_is_recorded_too() -> None:
    model = plain()
    paths = [
        "model.pair.output[1].more",
        "model.pair.input",
        "model.output.hidden",
        "model.mix.output",
    ]
    resolved = resolve(model, paths)
    prompts = prompts_of(LENGTHS["right"])
    recorded = record(model, resolved, prompts)
    expected = truth(model, resolved, prompts)
    assert all(same_bits(rows, expected[name]) for name, rows in recorded.items())
    alone = record(model, resolved, prompts, batch_size=1)
    assert all(torch.allclose(rows, alone[name], atol=1e-6) for name, rows in recorded.items())


def test_smollm2_rows_equal_a_plain_forward(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    texts = [
        "The Colosseum is in the city of",
        "def mean(values):\n    return sum(values) / len(values)",
        "Water boils at 100 degrees. It freezes at zero degrees, unless it is under pressure.",
        "Yes",
    ]
    prompts = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    resolved = resolve(model, ["model.layers[:].output", "model.layers[29].self_attn.output[0]"])
    assert len(resolved.sites) == 31
    batched = record(model, resolved, prompts)
    expected = truth(model, resolved, prompts)
    assert all(same_bits(rows, expected[name]) for name, rows in batched.items())
    alone = record(model, resolved, prompts, batch_size=1)
    for padding, rows_of in (("right", batched), ("left", None)):
        for name, rows in (rows_of or record(model, resolved, prompts, padding=padding)).items():
            apart = (rows - alone[name]).norm(dim=-1) / alone[name].norm(dim=-1)
            assert float(apart.max()) <= 1e-5, (name, padding)
