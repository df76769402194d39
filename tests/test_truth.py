"""What is recorded is what the model computed: bit for bit what a plain forward gives."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import FAMILIES, albert, bloom, one_thread, plain, roberta
from tests.recording import plain_forward, prompts_of, record, same_bits, tensor_of, truth

import lamina as lm
from lamina.positions import Batch, make_batch
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


TEXTS = [
    "The Colosseum is in the city of",
    "def mean(values):\n    return sum(values) / len(values)",
    "Water boils at 100 degrees. It freezes at zero degrees, unless it is under pressure.",
    "Yes",
    "E = mc²",
    "Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte",
    "to be, or not to be",
    "1, 1, 2, 3, 5, 8, 13, 21,",
]
SMOLLM2_SITES = [
    "model.layers[0,15,29].output",
    "model.layers[29].self_attn.output[0]",
    "model.layers[15].mlp.input",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_smollm2_rows_equal_a_plain_forward_bit_for_bit(
    smollm2: tuple[Any, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, tokenizer = smollm2
    model = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    resolved = resolve(model, SMOLLM2_SITES)
    for padding in ("right", "left", "none"):
        prompts = [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]
        if padding == "none":
            prompts = [np.resize(prompt, 5) for prompt in prompts]
        for batch_size in (1, 8):
            options = {"padding": padding, "batch_size": batch_size}
            recorded = record(model, resolved, prompts, **options)
            expected = truth(model, resolved, prompts, **options)
            for name, rows in recorded.items():
                assert same_bits(rows, expected[name]), (name, padding, batch_size)
    spy = Spy(model)
    store = lm.capture(
        model,
        TEXTS,
        SMOLLM2_SITES,
        to=tmp_path / "acts",
        tokenizer=tokenizer,
        batch_size=8,
        identity={"hooks": "a spy that changes nothing"},
        progress=False,
    )
    prompts = [store.prompts[number].ids.tolist() for number in range(len(TEXTS))]
    for name, stored, expected in stored_and_expected(model, store, prompts, spy.stop()):
        assert same_bits(stored, expected), name


def test_smollm2_batched_equals_each_prompt_alone(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    prompts = [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]
    resolved = resolve(model, "model.layers[:].output")
    alone = record(model, resolved, prompts, batch_size=1)
    for padding in ("right", "left"):
        for name, rows in record(model, resolved, prompts, padding=padding).items():
            apart = (rows - alone[name]).norm(dim=-1) / alone[name].norm(dim=-1)
            assert float(apart.max()) <= 1e-5, (name, padding)


class Spy:
    """Keeps what a model is given, so that a plain forward can be given the same."""

    def __init__(self, model: Any) -> None:
        self.batches: list[Batch] = []
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _module: Any, _args: Any, given: dict[str, torch.Tensor]) -> None:
        ids, mask = given["input_ids"], given["attention_mask"]
        self.batches.append(Batch(ids, mask, given.get("position_ids", torch.zeros(0))))

    def stop(self) -> list[Batch]:
        self._handle.remove()
        return self.batches


def stored_and_expected(
    model: Any, store: Any, prompts: list[np.ndarray], batches: list[Batch]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Every site's stored rows of every prompt, and those of a plain forward of its batch."""
    numbers = {tuple(prompt): number for number, prompt in enumerate(prompts)}
    resolved = resolve(model, list(store.sites))
    columns = {str(site): store[str(site)].tensor for site in resolved.sites}
    met = set()
    for batch in batches:
        real = batch.attention_mask.bool()
        rows = [tuple(ids[own].tolist()) for ids, own in zip(batch.input_ids, real, strict=True)]
        if not all(row in numbers for row in rows):
            continue  # the tiny forwards
        log = plain_forward(model, batch, position_ids=resolved.position_ids)
        for site in resolved.sites:
            tensor = tensor_of(log, site)
            if site.flat:
                tensor = tensor.reshape(*real.shape, *tensor.shape[1:])
            for place, row in enumerate(rows):
                where = store.prompts[numbers[row]].rows
                yield str(site), columns[str(site)][where], tensor[place][real[place]]
                met.add(row)
    assert met == set(numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_holds_what_plain_forwards_of_its_batches_give(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    build, paths = FAMILIES[family]
    model = build(dtype)
    for padding in ("right", "left", "none"):
        prompts = prompts_of(LENGTHS[padding], seed=4)
        for batch_size in (1, 8):
            spy = Spy(model)
            to = tmp_path / f"{padding}-{batch_size}"
            lm.capture(
                model,
                [prompt.tolist() for prompt in prompts],
                paths,
                to=to,
                padding=padding,
                batch_size=batch_size,
                identity={"hooks": "a spy that changes nothing"},
                progress=False,
            )
            batches = spy.stop()
            store = lm.open(to)
            assert store.rows == sum(map(len, prompts))
            assert list(store.sites) == [str(site) for site in resolve(model, paths).sites]
            for name, stored, expected in stored_and_expected(model, store, prompts, batches):
                assert same_bits(stored, expected), (name, padding, batch_size)


def test_a_store_of_an_edited_nnsight_model_holds_edited_values(tmp_path: Path) -> None:
    nnsight = pytest.importorskip("nnsight")
    model = nnsight.NNsight(FAMILIES["gpt2"][0]())
    with model.edit(inplace=True):
        model.transformer.h[1].input = model.transformer.h[1].input * 2
    prompts = prompts_of([4, 2, 7])
    paths = ["model.transformer.h[1].input", "model.transformer.h[:].output"]
    store = lm.capture(
        model,
        [prompt.tolist() for prompt in prompts],
        paths,
        to=tmp_path / "acts",
        identity={"edits": "doubled"},
        batch_size=1,
        progress=False,
    )
    first = store["model.transformer.h[0].output"].tensor
    assert same_bits(store["model.transformer.h[1].input"].tensor, first * 2)
    expected = record(model, paths, prompts, batch_size=1)
    assert all(same_bits(store[name].tensor, rows) for name, rows in expected.items())


def test_what_a_store_holds_can_be_patched_into_a_run(tmp_path: Path) -> None:
    model = FAMILIES["llama"][0]()
    source, target = prompts_of([6, 3], seed=1), prompts_of([5, 9], seed=2)
    store = lm.capture(
        model,
        [prompt.tolist() for prompt in source],
        "model.layers[:].output",
        to=tmp_path / "acts",
        progress=False,
        batch_size=1,
    )
    saved = store.load("model.layers[2].output[-1]", prompts=[1])
    batch = make_batch(target, "left", 0)
    with torch.no_grad(), lm.patched(model, saved):
        patched = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    alone = make_batch(source[1:])
    expected = model(input_ids=alone.input_ids, attention_mask=alone.attention_mask).logits[0, -1]
    assert torch.allclose(patched[:, -1], expected.expand(2, -1), atol=1e-5)
