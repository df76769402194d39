"""patched: what was stored is set in a run, exactly there, and nothing else changes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import VOCABULARY, albert, bloom, gpt2, llama, mixtral, one_thread, plain
from tests.recording import plain_forward, prompts_of, record
from torch import nn

from lamina.errors import (
    CastOverflowError,
    DtypeError,
    InputError,
    PositionError,
    SiteError,
    SiteNotFoundError,
)
from lamina.positions import Batch, make_batch
from lamina.replay import patched

H = "model.transformer.h"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def arguments(batch: Batch) -> dict[str, torch.Tensor]:
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }


def logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments(batch)).logits


def hooks_on(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_prompt_patched_with_another_ends_like_the_other(build: Any, padding: Any) -> None:
    model = build()
    site = f"{H}[2].output" if build is gpt2 else "model.model.layers[2].output"
    source, target = prompts_of([6], seed=1), prompts_of([5, 9, 1])
    saved = {f"{site}[-1]": record(model, site, source, positions=-1)[site]}
    batch = make_batch(target, padding, 0)
    before = logits(model, batch)
    with patched(model, saved):
        after = logits(model, batch)
    expected = logits(model, make_batch(source))[0, -1]
    last = [8, 8, 8] if padding == "left" else [4, 8, 0]
    for row, column in enumerate(last):
        assert torch.allclose(after[row, column], expected, atol=1e-5)
        assert not torch.allclose(before[row, column], expected, atol=1e-3)
        assert torch.equal(after[row, :column], before[row, :column])
    assert torch.equal(logits(model, batch), before)


def test_n_prompts_go_to_n_rows_in_order() -> None:
    model = gpt2()
    site = f"{H}[1].output"
    values = torch.randn(3, 32)
    batch = make_batch(prompts_of([4, 6, 2]))
    with patched(model, {f"{site}[0]": values}):
        seen = plain_forward(model, batch)["transformer.h.1", "output", 0]
        into = plain_forward(model, batch)["transformer.h.2", "input", 0][0][0]
    assert torch.equal(seen[:, 0], values)
    assert torch.equal(into[:, 0], values)
    assert torch.equal(
        seen[:, 1:], plain_forward(model, batch)["transformer.h.1", "output", 0][:, 1:]
    )


def test_a_list_of_positions_takes_one_vector_each() -> None:
    model = gpt2()
    values = torch.randn(1, 2, 32)
    batch = make_batch(prompts_of([4, 6]), "left")
    with patched(model, {f"{H}[1].output[0,-1]": values}):
        seen = plain_forward(model, batch)["transformer.h.1", "output", 0]
    assert torch.equal(seen[0, [2, 5]], values[0])
    assert torch.equal(seen[1, [0, 5]], values[0])


def test_writing_is_out_of_place() -> None:
    """`h[1].input` is the very tensor that `h[0].output` was."""
    model = gpt2()
    batch = make_batch(prompts_of([4]))
    kept: list[torch.Tensor] = []
    model.transformer.h[0].register_forward_hook(lambda _m, _a, output: kept.append(output))
    plain_forward(model, batch)
    with patched(model, {f"{H}[1].input[1]": torch.zeros(1, 32)}):
        log = plain_forward(model, batch)
    assert torch.equal(kept[0], kept[-1])
    assert not log["transformer.h.1", "input", 0][0][0][0, 1].any()


def test_patching_a_norms_input_leaves_the_residual_alone() -> None:
    model = gpt2()
    batch = make_batch(prompts_of([4]))
    before = plain_forward(model, batch)
    with patched(model, {f"{H}[1].ln_1.input[1]": torch.ones(1, 32)}):
        after = plain_forward(model, batch)
    attention = after["transformer.h.1.attn", "output", 0][0]
    assert not torch.equal(attention, before["transformer.h.1.attn", "output", 0][0])
    residual = before["transformer.h.0", "output", 0] + attention
    assert torch.equal(after["transformer.h.1.ln_2", "input", 0][0][0], residual)


def test_tuples_dicts_and_named_arguments_are_rebuilt() -> None:
    model = plain()
    prompts = prompts_of([4, 3])
    batch = make_batch(prompts)
    zeros = torch.zeros(1, 32)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    targets = [
        "model.pair.output[1].more[-1]",
        "model.pair.input.hidden[0]",
        "model.output.logits[0]",
    ]
    shapes = [zeros, zeros, torch.zeros(1, VOCABULARY)]
    with patched(model, dict(zip(targets, shapes, strict=True))), torch.no_grad():
        log = plain_forward(model, batch, position_ids=False)
        result = model(**given)
    assert not log["pair", "output", 0][1]["more"][[0, 1], [3, 2]].any()
    assert not log["pair", "input", 0][0][0][:, 0].any()
    assert not result["logits"][:, 0].any()
    assert result["logits"][:, 1].any()


def test_model_outputs_are_rebuilt_with_their_own_type() -> None:
    model = llama()
    batch = make_batch(prompts_of([4]))
    with torch.no_grad():
        before = model(**arguments(batch))
        with patched(model, {"model.output.logits[-1]": torch.zeros(1, VOCABULARY)}):
            after = model(**arguments(batch))
    assert type(after) is type(before)
    assert after.past_key_values is not None
    assert not after.logits[0, -1].any()
    assert not after["logits"][0, -1].any()
    assert torch.equal(after.logits[0, :-1], before.logits[0, :-1])


def test_flat_sites_find_their_rows() -> None:
    model = mixtral()
    batch = make_batch(prompts_of([4, 6]), "left")
    values = torch.full((1, 4), 0.5)
    with patched(model, {"model.model.layers[0].mlp.gate.output[0][0]": values}):
        seen = plain_forward(model, batch)["model.layers.0.mlp.gate", "output", 0][0]
    assert (seen.reshape(2, 6, 4)[[0, 1], [2, 0]] == 0.5).all()
    assert (seen == 0.5).all(dim=-1).sum() == 2


def test_the_call_asked_for_is_patched() -> None:
    model = albert()
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    batch = make_batch(prompts_of([4]))
    with patched(model, {f"model.{layer}.output@1[-1]": torch.zeros(1, 32)}):
        log = plain_forward(model, batch)
    untouched = [bool(log[layer, "output", call][0, -1].any()) for call in range(3)]
    assert untouched == [True, False, True]


def test_generation_with_a_cache_patches_the_prompt_only() -> None:
    model = gpt2()
    batch = make_batch(prompts_of([5, 3], seed=2), "left")
    calls: list[tuple[int, bool]] = []

    def look(_m: Any, _a: Any, output: torch.Tensor) -> None:
        calls.append((output.shape[1], bool((output[:, -1] == 7).all())))

    with patched(model, {f"{H}[1].output[-1]": torch.full((1, 32), 7.0)}):
        model.transformer.h[1].register_forward_hook(look)
        model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
        )
    assert calls == [(5, True), (1, False), (1, False)]


def test_a_step_by_hand_with_a_cache_and_no_mask_is_not_patched() -> None:
    model = gpt2()
    ids = make_batch(prompts_of([4])).input_ids
    after = model(ids, use_cache=True).past_key_values
    plainly = model(ids[:, :1], past_key_values=after).logits
    again = model(ids, use_cache=True).past_key_values
    with patched(model, {f"{H}[1].output[-1]": torch.full((1, 32), 7.0)}):
        assert torch.equal(model(ids[:, :1], past_key_values=again).logits, plainly)


def test_a_part_of_the_model_run_by_itself_is_refused_not_left_unpatched() -> None:
    model = gpt2()
    batch = make_batch(prompts_of([4]))
    with patched(model, {f"{H}[1].output[-1]": torch.full((1, 32), 7.0)}):
        for _ in range(2):  # before a forward of the whole, and after one
            with pytest.raises(InputError, match="call the model itself inside lm"):
                model.transformer(input_ids=batch.input_ids)
            logits(model, batch)


def test_values_are_cast_to_the_models_dtype_unless_they_overflow() -> None:
    model = gpt2(torch.float16)
    batch = make_batch(prompts_of([3]))
    site = f"{H}[0].output[-1]"
    with patched(model, {site: torch.full((1, 32), 2.0)}):
        seen = plain_forward(model, batch)["transformer.h.0", "output", 0]
    assert seen.dtype == torch.float16
    assert (seen[0, -1] == 2).all()
    with (
        patched(model, {site: torch.full((1, 32), 1e6)}),
        pytest.raises(
            CastOverflowError, match=r"cast from torch\.float32 to the model's torch\.float16"
        ),
    ):
        logits(model, batch)


def test_gradients_flow_around_a_patch() -> None:
    model = gpt2()
    batch = make_batch(prompts_of([3]))
    with patched(model, {f"{H}[0].output[-1]": torch.zeros(1, 32)}):
        model(**arguments(batch)).logits.sum().backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("target", "shape", "error", "message"),
    [
        (f"{H}[7].output[-1]", (1, 32), SiteNotFoundError, r"h\[7\]"),
        (f"{H}[0].attn.output[-1]", (1, 32), SiteError, r"is a tuple of 2: .*; name one"),
        (f"{H}[0].output", (1, 32), SiteError, r"names no single tokens"),
        (f"{H}[0].output[1:]", (1, 32), SiteError, r"names no single tokens"),
        (
            f"{H}[:].output[-1]",
            (1, 32),
            SiteError,
            r"stands for 3 sites; a tensor to patch has one",
        ),
        (f"{H}[0].output[-1]", (32,), InputError, r"needs a tensor \[prompts, 32\], not \[32\]"),
        (
            f"{H}[0].output[-1]",
            (1, 31),
            InputError,
            r"needs a tensor \[prompts, 32\], not \[1, 31\]",
        ),
        (
            f"{H}[0].output[0,1]",
            (1, 32),
            InputError,
            r"needs a tensor \[prompts, 2, 32\], not \[1, 32\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_forward(
    target: str, shape: Any, error: type[Exception], message: str
) -> None:
    model = gpt2()
    with pytest.raises(error, match=message), patched(model, {target: torch.zeros(shape)}):
        pytest.fail("the block was entered")
    assert hooks_on(model) == 0


def test_integers_do_not_go_where_floats_are() -> None:
    values = torch.zeros(1, 32, dtype=torch.int64)
    with pytest.raises(
        DtypeError, match=r"is torch\.float32 in the model, the values are torch\.int64"
    ):
        patched(gpt2(), {f"{H}[0].output[-1]": values}).__enter__()


def test_nothing_to_patch_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to patch"), patched(gpt2(), {}):
        pass


@pytest.mark.parametrize("saved", [None, torch.zeros(1, 32), {f"{H}[0].output[-1]": "x"}])
def test_what_holds_no_tensors_is_refused_with_what_is_taken(saved: Any) -> None:
    with (
        pytest.raises(InputError, match=r"patched takes what store\.load\(\.\.\.\) returns, or a"),
        patched(gpt2(), saved),
    ):
        pass


def test_targets_that_meet_are_refused() -> None:
    model = gpt2()
    zero = torch.zeros(1, 32)
    with (
        pytest.raises(
            SiteError, match=r"`.*h\[2\]\.output\[-1\]` and `.*h\[-1\]\.output\[-1\]` set the same"
        ),
        patched(model, {f"{H}[2].output[-1]": zero, f"{H}[-1].output[-1]": zero}),
    ):
        pass
    saved = {f"{H}[1].output[2]": zero, f"{H}[1].output[-1]": zero}
    with patched(model, saved):
        logits(model, make_batch(prompts_of([4, 5])))
        with pytest.raises(SiteError, match=r"set the same token in rows 1"):
            logits(model, make_batch(prompts_of([4, 3])))


def test_batches_of_another_size_are_refused() -> None:
    model = gpt2()
    with (
        patched(model, {f"{H}[1].output[-1]": torch.zeros(3, 32)}),
        pytest.raises(InputError, match=r"holds 3 prompts, the batch has 2 rows; expected as many"),
    ):
        logits(model, make_batch(prompts_of([4, 5])))


def test_rows_too_short_for_a_position_are_named() -> None:
    model = gpt2()
    with (
        patched(model, {f"{H}[1].output[10]": torch.zeros(1, 32)}),
        pytest.raises(PositionError, match=r"row 1 has no token 10; it has 5 tokens"),
    ):
        logits(model, make_batch(prompts_of([12, 5])))


def test_ids_without_a_mask_are_refused_unless_there_is_one_row() -> None:
    model = gpt2()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with patched(model, {f"{H}[1].output[-1]": torch.zeros(1, 32)}), torch.no_grad():
        model(ids[:1])
        with pytest.raises(InputError, match="a batch of 2 prompts without an attention mask"):
            model(ids)


def test_a_site_cut_short_in_this_forward_is_refused() -> None:
    model = llama()
    batch = make_batch(prompts_of([5, 3]))
    with (
        patched(model, {"model.lm_head.input[-1]": torch.zeros(1, 32)}),
        pytest.raises(
            SiteError, match=r"has shape \[2, 1, 32\] in this forward; expected \[2, 5, 32\]"
        ),
        torch.no_grad(),
    ):
        model(**arguments(batch), logits_to_keep=1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_hooks_are_removed_on_any_exit(error: type[BaseException]) -> None:
    model = gpt2()

    def block() -> None:
        with patched(model, {f"{H}[1].output[-1]": torch.zeros(1, 32)}):
            assert hooks_on(model) == 3
            raise error

    with pytest.raises(error):
        block()
    assert hooks_on(model) == 0


def test_a_recorder_inside_sees_the_patch() -> None:
    model = gpt2()
    with patched(model, {f"{H}[1].output[-1]": torch.zeros(1, 32)}):
        rows = record(model, f"{H}[1].output", prompts_of([4]))[f"{H}[1].output"]
    assert rows[:3].any()
    assert not rows[3].any()


def test_a_second_patch_of_the_same_model_runs_no_tiny_forward() -> None:
    model = gpt2()
    saved = {f"{H}[1].output[-1]": torch.zeros(1, 32)}
    forwards: list[int] = []
    with patched(model, saved):
        pass
    model.transformer.wte.register_forward_hook(lambda *_: forwards.append(1))
    with patched(model, saved):
        logits(model, make_batch(prompts_of([3])))
    assert forwards == [1]


def test_an_nnsight_model_is_patched_below_its_traces() -> None:
    nnsight = pytest.importorskip("nnsight")
    model = nnsight.NNsight(bloom())
    batch = make_batch(prompts_of([4, 2]), "left")
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    before = model.trace(trace=False, **given).logits
    saved = {f"{H}[2].output[0][-1]": torch.zeros(1, 32)}
    with torch.no_grad(), patched(model, saved), model.trace(**given):
        normed = nnsight.save(model.transformer.ln_f.input)
        after = nnsight.save(model.output.logits)
    assert not normed[:, -1].any()
    assert torch.equal(after[0, :-1], before[0, :-1])
    assert not torch.equal(after[:, -1], before[:, -1])


def test_other_rows_of_a_batch_keep_their_values() -> None:
    model = llama()
    batch = make_batch(prompts_of([4, 6]))
    values = torch.randn(2, 32)
    site = "model.model.layers[1].output"
    own = record(model, site, prompts_of([4, 6]), positions=-1)[site]
    values[1] = own[1]
    before = logits(model, batch)
    with patched(model, {f"{site}[-1]": values}):
        after = logits(model, batch)
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0, 3], before[0, 3])


def test_what_numpy_or_a_module_of_ones_own_gives_can_be_patched() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.embed(input_ids) * attention_mask[..., None]

    model = Tiny()
    values = torch.from_numpy(np.full((1, 4), 3, dtype=np.float32))
    with patched(model, {"model.embed.output[-1]": values}), torch.no_grad():
        result = model(input_ids=torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2))
    assert (result[0, 1] == 3).all()
