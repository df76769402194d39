"""The recorder: what it hands over, when it stops, and that it leaves the model as it was."""

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import LAYERS, bert, bloom, gpt2, llama, mixtral, one_thread, plain
from tests.recording import prompts_of, record, same_bits, wanted

from lamina.errors import InputError, PromptError, SiteError
from lamina.positions import make_batch
from lamina.recorder import Recorder
from lamina.sites import resolve

BLOCKS = "model.transformer.h[:].output"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def hooks_on(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def one_run(model: Any, sites: Any, sink: Any, prompts: Any = None, positions: Any = None) -> None:
    prompts = prompts_of([5, 2]) if prompts is None else prompts
    batch = make_batch(prompts)
    with Recorder(model, resolve(model, sites)) as recorder:
        recorder.run(batch, *wanted(batch, prompts, positions), sink)


def test_rows_own_only_their_bytes() -> None:
    def sink(_site: int, rows: torch.Tensor) -> None:
        assert rows.untyped_storage().nbytes() == rows.numel() * rows.element_size() == 2 * 32 * 4
        assert not rows.requires_grad

    one_run(gpt2(), BLOCKS, sink, positions=-1)


def test_nothing_keeps_the_whole_tensors_alive() -> None:
    model = gpt2()
    whole: list[Any] = []
    model.transformer.h[0].mlp.register_forward_hook(
        lambda _m, _a, output: whole.append(weakref.ref(output))
    )
    alive: list[bool] = []

    def sink(_site: int, _rows: torch.Tensor) -> None:
        gc.collect()
        alive.append(whole[-1]() is not None)

    one_run(model, ["model.transformer.h[0].mlp.output", "model.transformer.h[2].output"], sink)
    assert alive == [True, False]


def test_the_forward_stops_after_the_last_site() -> None:
    model = gpt2()
    resolved = resolve(model, ["model.transformer.h[1].output", "model.transformer.h[0].output"])
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _m, _a, name=name: called.append(name))
    record(model, resolved, prompts_of([4]))
    assert "transformer.h.1.mlp" in called
    assert "transformer.h.2" not in called
    assert "lm_head" not in called


def test_no_except_in_a_model_swallows_the_stop() -> None:
    model = plain()
    forward = model.pair.forward

    def careful(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except Exception:
            pytest.fail("the stop was caught as an Exception")

    model.pair.forward = careful
    assert len(record(model, "model.pair.inner.output", prompts_of([3]))) == 1


def test_hooks_sit_only_on_the_modules_asked_for_and_only_during_a_run() -> None:
    model = gpt2()
    resolved = resolve(model, BLOCKS)
    seen: list[int] = []
    prompts = prompts_of([3])
    batch = make_batch(prompts)
    with Recorder(model, resolved) as recorder:
        assert hooks_on(model) == 0
        recorder.run(batch, *wanted(batch, prompts), lambda *_: seen.append(hooks_on(model)))
        assert hooks_on(model) == 0
    assert seen == [LAYERS] * LAYERS


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_hooks_are_removed_and_flags_restored_on_any_exit(error: type[BaseException]) -> None:
    model = gpt2()
    model.train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]

    def sink(*_: object) -> None:
        assert not any(module.training for module in model.modules())
        raise error

    with pytest.raises(error):
        one_run(model, BLOCKS, sink)
    assert hooks_on(model) == 0
    assert flags == [module.training for module in model.modules()]
    assert torch.is_grad_enabled()


def test_values_are_those_after_the_interventions_of_others() -> None:
    model = gpt2()
    prompts = prompts_of([4, 6])
    before = record(model, BLOCKS, prompts)
    model.transformer.h[1].register_forward_hook(lambda _m, _a, output: output * 2)
    model.transformer.h[1].register_forward_pre_hook(lambda _m, args: (args[0] + 1, *args[1:]))
    after = record(model, [BLOCKS, "model.transformer.h[1].input"], prompts)
    names = [f"model.transformer.h[{layer}].output" for layer in range(LAYERS)]
    assert same_bits(before[names[0]], after[names[0]])
    assert not torch.equal(before[names[1]], after[names[1]])
    assert same_bits(after["model.transformer.h[1].input"], after[names[0]] + 1)


def test_later_writes_in_place_do_not_reach_recorded_rows() -> None:
    model = gpt2()
    expected = record(model, BLOCKS, prompts_of([4]))
    model.transformer.h[1].ln_1.register_forward_pre_hook(lambda _m, args: args[0].zero_())
    recorded = record(model, BLOCKS, prompts_of([4]))
    name = "model.transformer.h[0].output"
    assert same_bits(recorded[name], expected[name])


def test_dropout_is_off_while_recording() -> None:
    model = gpt2(resid_pdrop=0.5)
    quiet = record(model, BLOCKS, prompts_of([5]))
    model.train()
    assert all(
        same_bits(rows, quiet[name])
        for name, rows in record(model, BLOCKS, prompts_of([5])).items()
    )


def test_a_changed_shape_or_dtype_is_noticed_in_every_batch() -> None:
    model = gpt2()
    resolved = resolve(model, BLOCKS)
    handle = model.transformer.h[1].register_forward_hook(lambda _m, _a, output: output[:, :-1])
    with pytest.raises(SiteError) as caught:
        record(model, resolved, prompts_of([4, 6]))
    assert str(caught.value) == (
        "`model.transformer.h[1].output` has shape [2, 5, 32] torch.float32 in a batch of 2 "
        "prompts padded to 6 tokens; expected [2, 6, 32] torch.float32"
    )
    handle.remove()
    model.transformer.h[2].register_forward_hook(lambda _m, _a, output: output.double())
    with pytest.raises(
        SiteError, match=r"float64 in a batch .*; expected \[1, 3, 32\] torch\.float32"
    ):
        record(model, resolved, prompts_of([3]))


def test_a_site_that_a_batch_does_not_reach_is_an_error() -> None:
    model = gpt2()
    resolved = resolve(model, "model.transformer.h[:].mlp.output")
    model.transformer.h[1].forward = lambda hidden, *_args, **_kwargs: hidden
    with pytest.raises(
        SiteError, match=r"`model\.transformer\.h\[1\]\.mlp\.output` was not reached"
    ):
        record(model, resolved, prompts_of([3]))


def test_left_padding_is_refused_where_the_model_cannot_be_told_positions() -> None:
    prompts = prompts_of([5, 2])
    with pytest.raises(PromptError, match="padding='left' changes what Plain computes"):
        record(plain(), "model.mix.output", prompts, padding="left")
    record(plain(), "model.mix.output", prompts, padding="right")
    record(plain(), "model.mix.output", prompts_of([3, 3]), padding="left")
    record(bloom(), "model.transformer.h[0].output[0]", prompts, padding="left")


def test_use_outside_of_with_restores_the_flags_too() -> None:
    model = gpt2().train()
    batch = make_batch([np.array([1, 2])])
    Recorder(model, resolve(model, BLOCKS)).run(
        batch, *wanted(batch, [np.array([1, 2])]), lambda *_: None
    )
    assert all(module.training for module in model.modules())


def test_a_forward_error_passes_through() -> None:
    model = gpt2()
    with pytest.raises(IndexError):
        record(model, BLOCKS, [np.array([60, 61])])
    assert hooks_on(model) == 0


# nnsight: what an edit changes is what is recorded, and nothing waits for an order.


def traced(build: Any = gpt2) -> Any:
    nnsight = pytest.importorskip("nnsight")
    return nnsight.NNsight(build())


@pytest.mark.parametrize("build", [gpt2, llama, mixtral])
def test_an_nnsight_model_gives_what_the_plain_model_gives(build: Any) -> None:
    head = "transformer.h" if build is gpt2 else "model.layers"
    paths = [f"model.{head}[:].output", f"model.{head}[1].mlp.input", "model.lm_head.output"]
    prompts = prompts_of([5, 1, 7])
    expected = record(build(), paths, prompts)
    recorded = record(traced(build), paths, prompts, padding="right")
    assert list(recorded) == list(expected)
    assert all(same_bits(rows, expected[name]) for name, rows in recorded.items())


def test_a_transformers_model_of_nnsight_too() -> None:
    nnsight = pytest.importorskip("nnsight")
    model = nnsight.TransformersModel(gpt2(), task="text-generation", tokenizer=word_tokenizer())
    paths = [BLOCKS, "model.transformer.h[1].input"]
    for padding in ("right", "left"):
        expected = record(gpt2(), paths, prompts_of([5, 1, 7]), padding=padding)
        recorded = record(model, paths, prompts_of([5, 1, 7]), padding=padding)
        assert all(same_bits(rows, expected[name]) for name, rows in recorded.items())


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, 61)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
    )


def test_edits_take_effect_at_output_and_input_ports() -> None:
    model = traced()
    paths = [BLOCKS, "model.transformer.h[2].input", "model.transformer.h[2].ln_1.output"]
    before = record(model, paths, prompts_of([4, 2]))
    with model.edit(inplace=True):
        model.transformer.h[1].output = model.transformer.h[1].output * 0
    with model.edit(inplace=True):
        model.transformer.h[2].input = model.transformer.h[2].input + 1
    after = record(model, paths, prompts_of([4, 2]))
    first, second = (f"model.transformer.h[{layer}].output" for layer in (0, 1))
    assert same_bits(before[first], after[first])
    assert not after[second].any()
    assert torch.equal(after["model.transformer.h[2].input"], torch.ones(6, 32))
    model.clear_edits()
    assert same_bits(record(model, paths, prompts_of([4, 2]))[second], before[second])


def test_an_edited_copy_is_recorded_with_its_edits_the_original_without() -> None:
    model = traced()
    with model.edit() as (_tracer, edited):
        edited.transformer.h[0].output = edited.transformer.h[0].output * 3
    plainly, changed = (record(m, BLOCKS, prompts_of([3])) for m in (model, edited))
    name = "model.transformer.h[0].output"
    assert same_bits(changed[name], plainly[name] * 3)


def test_edits_that_fail_on_the_tiny_forwards_are_no_obstacle() -> None:
    model = traced()
    with model.edit(inplace=True):
        model.transformer.h[0].output[:, 9] = 0
    rows = record(model, BLOCKS, prompts_of([12]))["model.transformer.h[0].output"]
    assert not rows[9].any()
    assert rows[8].any()


def test_stopping_with_edits_and_inputs_pending_is_quiet() -> None:
    model = traced()
    with model.edit(inplace=True):
        model.transformer.h[2].output = model.transformer.h[2].output * 0
    inputs = record(model, "model.transformer.h[0].input", prompts_of([3]))
    outputs = record(model, "model.transformer.h[0].output", prompts_of([3]))
    assert len(inputs) == len(outputs) == 1
    assert not model.interleaver.interleaving
    assert record(model, BLOCKS, prompts_of([3]))["model.transformer.h[2].output"].sum() == 0


def test_sites_given_backwards_need_no_order_in_a_trace() -> None:
    paths = [
        "model.lm_head.input",
        "model.transformer.h[2].input",
        "model.transformer.h[0].ln_1.input",
    ]
    recorded = record(traced(), paths, prompts_of([3, 5]))
    assert list(recorded) == paths[::-1]
    expected = record(gpt2(), paths, prompts_of([3, 5]))
    assert all(same_bits(rows, expected[name]) for name, rows in recorded.items())


def test_modules_that_an_edit_skips_give_what_replaces_them() -> None:
    model = traced()
    with model.edit(inplace=True):
        model.transformer.h[1].skip(model.transformer.h[1].input)
    recorded = record(model, BLOCKS, prompts_of([3, 4]))
    first, second = (recorded[f"model.transformer.h[{layer}].output"] for layer in (0, 1))
    assert same_bits(first, second)
    with pytest.raises(
        SiteError, match=r"`model\.transformer\.h\[1\]\.mlp\.output` is never reached"
    ):
        record(model, "model.transformer.h[1].mlp.output", prompts_of([3]))


def test_a_part_of_an_nnsight_model_is_a_model() -> None:
    whole = traced()
    recorded = record(whole.transformer, ["model.h[:].output", "model.h[1].input"], prompts_of([3]))
    expected = record(gpt2(), [BLOCKS, "model.transformer.h[1].input"], prompts_of([3]))
    for (_, rows), (_, others) in zip(recorded.items(), expected.items(), strict=True):
        assert same_bits(rows, others)


def test_a_model_is_not_recorded_inside_one_of_its_own_traces() -> None:
    model = traced()
    resolved = resolve(model, BLOCKS)
    ids = torch.tensor([[1, 2]])
    refused = pytest.raises(InputError, match="inside one of its own traces")
    with refused, model.trace(input_ids=ids, attention_mask=torch.ones_like(ids)):
        record(model, resolved, prompts_of([3]))
    assert len(record(model, resolved, prompts_of([3]))) == LAYERS


def test_a_session_of_nnsight_may_hold_a_recording() -> None:
    model = traced()
    expected = record(model, BLOCKS, prompts_of([3]))
    found: list[Any] = []
    with model.session():
        found.append(record(model, BLOCKS, prompts_of([3])))
    assert all(same_bits(rows, expected[name]) for name, rows in found[0].items())


def test_modules_that_nnsight_does_not_know_are_named() -> None:
    model = traced(plain)
    model._module.pair.inner = torch.nn.Linear(32, 32)
    with pytest.raises(SiteError, match=r"does not know the module 'pair\.inner'"):
        record(model, "model.pair.inner.input", prompts_of([3]))


def test_encoders_in_nnsight_whose_modules_are_called_output() -> None:
    with pytest.warns(UserWarning, match="submodule named 'output'"):
        model = traced(bert)
    paths = ["model.encoder.layer[0].output.output", "model.encoder.layer[1].output.input"]
    expected = record(bert(), paths, prompts_of([3, 5]))
    recorded = record(model, paths, prompts_of([3, 5]))
    assert all(same_bits(rows, expected[name]) for name, rows in recorded.items())


@pytest.mark.parametrize("wrap", [gpt2, traced])
def test_threads_that_record_one_model_do_not_meet(wrap: Any) -> None:
    model = wrap()
    plain_module = model if wrap is gpt2 else model._module
    plain_module.train()
    paths = [BLOCKS, "model.transformer.h[1].input"]
    resolved = resolve(model, paths)
    prompts = [prompts_of([4, 6, 2 + seed], seed=seed) for seed in range(3)]
    expected = [record(gpt2(), paths, each) for each in prompts]
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for _ in range(6):
                for name, rows in record(model, resolved, prompts[seed]).items():
                    if not same_bits(rows, expected[seed][name]):
                        wrong.append(name)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(module.training for module in plain_module.modules())


def test_nnsight_is_not_imported_for_a_plain_model() -> None:
    import subprocess
    import sys

    program = (
        "import sys, torch\n"
        "from tests.models import plain\n"
        "from tests.recording import prompts_of, record\n"
        "record(plain(), 'model.mix.output', prompts_of([3]))\n"
        "assert 'nnsight' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


def environment() -> dict[str, str]:
    import os
    from pathlib import Path

    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.cuda
def test_rows_are_gathered_on_the_gpu() -> None:
    model = gpt2().cuda()
    devices: list[str] = []
    one_run(model, BLOCKS, lambda _site, rows: devices.append(rows.device.type))
    assert devices == ["cuda"] * LAYERS
