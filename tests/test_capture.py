"""`lm.capture`: what is stored, in which order, from which prompts, and what a second call does."""

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import LAYERS, VOCABULARY, WIDTH, gpt2, llama, mixtral
from tests.recording import prompts_of
from tests.words import word_tokenizer

import lamina as lm
from lamina.identity import RoundingWarning
from lamina.progress import Progress

RESIDUALS = "model.layers[:].output"
LENGTHS = [5, 1, 12, 7, 7, 3, 20, 2, 9, 1, 16, 4]
TEXTS = ["the cat sat on a mat", "dog", "a dog ran far from home", "in rain the cat ran"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small models are quickest on one thread, and never wait for another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def a_llama() -> Any:
    return llama()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [ids.tolist() for ids in prompts_of(LENGTHS)]


def alone(model: Any, ids: Any, layer: int) -> torch.Tensor:
    """What a layer gives for one prompt by itself."""
    with torch.no_grad():
        model.eval()
        states = model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    return states[layer + 1][0]


def count_forwards(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collects the shapes of the ids that the model is run on from now on."""
    shapes: list[tuple[int, int]] = []
    inner = type(model.model).forward

    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return inner(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", forward)
    return shapes


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_rows_are_each_prompts_own_in_prompt_order_whatever_the_batches(
    a_llama: Any, prompts: list[list[int]], tmp_path: Path, padding: str, batch_size: int
) -> None:
    store = lm.capture(
        a_llama, prompts, RESIDUALS, to=tmp_path / "acts", padding=padding, batch_size=batch_size
    )
    assert store.complete
    assert list(store.sites) == [f"model.model.layers[{n}].output" for n in range(LAYERS)]
    column = store["model.layers[1].output"].tensor
    assert column.shape == (sum(LENGTHS), WIDTH)
    start = 0
    for number, ids in enumerate(prompts):
        prompt = store.prompts[number]
        assert prompt.rows == slice(start, start + len(ids))
        assert list(prompt.ids) == ids
        # The norms are about 10 here; 1e-5 is far below what another token would give.
        assert (column[prompt.rows] - alone(a_llama, ids, 1)).abs().max() < 1e-5
        start += len(ids)
    assert store.tokens.tolist() == [token for ids in prompts for token in ids]
    assert store.positions.tolist() == [p for ids in prompts for p in range(len(ids))]
    assert store.verify()


def test_many_windows_give_the_rows_of_one(
    a_llama: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    one = lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path / "one", batch_size=1)
    many = lm.capture(
        a_llama, prompts, RESIDUALS, to=tmp_path / "many", batch_size=1, window_bytes=1
    )
    for site in one.sites:
        assert torch.equal(one[site].tensor, many[site].tensor)


def test_the_same_capture_twice_gives_the_same_files(
    a_llama: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    for name in "ab":
        lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path / name, batch_size=4, window_bytes=3000)
    files = [
        {f.name: f.read_bytes() for f in (tmp_path / name / "shards").iterdir()} for name in "ab"
    ]
    assert files[0] == files[1]


def test_the_same_capture_again_computes_nothing(
    a_llama: Any, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path)
    before = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in tmp_path.rglob("*")}
    shapes = count_forwards(a_llama, monkeypatch)
    again = lm.capture(a_llama, iter(prompts), RESIDUALS, to=tmp_path)
    assert (again.version, again.identity) == (first.version, first.identity)
    assert set(shapes) <= {(2, 3), (3, 5)}  # the tiny forwards that resolve the sites
    assert {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in tmp_path.rglob("*")} == before


def test_a_hit_takes_no_lock_and_works_read_only(
    a_llama: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path / "acts")
    writer = lm._core.Writer(str(tmp_path / "acts"))
    try:
        assert lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path / "acts").complete
    finally:
        writer.close()
    folders = [tmp_path / "acts", *(f for f in (tmp_path / "acts").rglob("*") if f.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path / "acts").complete
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_hit_makes_what_it_saw_durable(
    a_llama: Any, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path)
    synced: list[str] = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink())),
    )
    lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path)
    assert synced == [str(tmp_path / "shards"), str(tmp_path / "manifests")]


def test_the_tokenizers_padding_side_does_not_matter_and_its_state_stays(
    a_llama: Any, tmp_path: Path
) -> None:
    tokenizer = word_tokenizer(padding_side="left")
    tokenizer(TEXTS, padding=True, truncation=True, max_length=3)
    before = tokenizer.backend_tokenizer.to_str()
    store = lm.capture(a_llama, TEXTS, RESIDUALS, to=tmp_path, tokenizer=tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before
    for number, text in enumerate(TEXTS):
        ids = word_tokenizer()(text)["input_ids"]
        assert list(store.prompts[number].ids) == ids
        got = store["model.layers[1].output"].tensor[store.prompts[number].rows]
        assert (got - alone(a_llama, ids, 1)).abs().max() < 1e-5


def test_texts_are_kept_where_every_prompt_has_one(a_llama: Any, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    kept = lm.capture(a_llama, TEXTS, RESIDUALS, to=tmp_path / "a", tokenizer=tokenizer)
    assert [prompt.text for prompt in kept.prompts] == TEXTS
    left_out = lm.capture(
        a_llama, TEXTS, RESIDUALS, to=tmp_path / "b", tokenizer=tokenizer, texts=False
    )
    assert left_out.prompts[0].text is None
    mixed = lm.capture(a_llama, [*TEXTS, [3, 4]], RESIDUALS, to=tmp_path / "c", tokenizer=tokenizer)
    assert mixed.prompts[0].text is None


def forms(ids: list[list[int]]) -> Iterator[tuple[str, Any]]:
    from datasets import Dataset
    from transformers import BatchEncoding

    padded, mask = torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.int64)
    for row, own in enumerate(ids):
        padded[row, 6 - len(own) :], mask[row, 6 - len(own) :] = torch.tensor(own), 1
    dataset = Dataset.from_dict({"input_ids": ids, "label": [0, 1, 2]})
    yield "tuples", [tuple(own) for own in ids]
    yield "arrays", [np.array(own, dtype=np.int16) for own in ids]
    yield "tensors", [torch.tensor(own) for own in ids]
    yield "dicts", [{"input_ids": own} for own in ids]
    yield (
        "dicts with masks",
        [{"input_ids": [0, *own, 0], "attention_mask": [0, *[1] * len(own), 0]} for own in ids],
    )
    yield "a padded batch with its mask", {"input_ids": padded, "attention_mask": mask}
    yield "a batch encoding", BatchEncoding({"input_ids": padded, "attention_mask": mask})
    yield (
        "batches of one",
        [
            {"input_ids": torch.tensor([own]), "attention_mask": torch.ones(1, len(own))}
            for own in ids
        ],
    )
    yield "a ragged batch", {"input_ids": ids}
    yield "a generator", (own for own in ids)
    yield "a datasets column", dataset["input_ids"]
    yield "a dataset", dataset


def test_prompts_may_come_in_many_forms(a_llama: Any, tmp_path: Path) -> None:
    ids = [[0, 5, 7, 0], [9], [3, 0, 0, 8, 2, 1]]
    expected = lm.capture(a_llama, ids, RESIDUALS, to=tmp_path).identity
    for name, prompts in forms(ids):
        found = lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path).identity
        assert found == expected, name


def test_a_column_of_texts_is_captured_as_its_texts(a_llama: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    dataset = Dataset.from_dict({"text": TEXTS})
    options: Any = {"to": tmp_path, "tokenizer": word_tokenizer()}
    first = lm.capture(a_llama, dataset["text"], RESIDUALS, **options)
    again = lm.capture(a_llama, [{"text": text} for text in TEXTS], RESIDUALS, **options)
    assert first.version == again.version


def test_one_tensor_of_one_dimension_is_one_prompt(a_llama: Any, tmp_path: Path) -> None:
    store = lm.capture(a_llama, torch.tensor([4, 5, 6]), RESIDUALS, to=tmp_path)
    assert len(store.prompts) == 1
    assert list(store.prompts[0].ids) == [4, 5, 6]


def test_positions_choose_the_rows(a_llama: Any, prompts: list[list[int]], tmp_path: Path) -> None:
    store = lm.capture(a_llama, prompts, "model.layers[0].output[-1]", to=tmp_path / "last")
    assert store.rows == len(prompts)
    assert store.positions.tolist() == [n - 1 for n in LENGTHS]
    for number, ids in enumerate(prompts):
        got = store["model.layers[0].output"].tensor[number]
        assert (got - alone(a_llama, ids, 0)[-1]).abs().max() < 1e-5
    ends = lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path / "ends", positions=[0, -1])
    assert ends.rows == sum(min(n, 2) for n in LENGTHS)
    last = lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path / "few", positions="-4:")
    assert last.rows == sum(min(n, 4) for n in LENGTHS)


def test_prompts_too_short_for_a_position_are_left_out_on_request(
    a_llama: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    store = lm.capture(
        a_llama, prompts, "model.layers[0].output[6]", to=tmp_path, short="drop", batch_size=2
    )
    kept = [number for number, size in enumerate(LENGTHS) if size > 6]
    assert store.rows == len(kept)
    assert len(store.prompts) == len(prompts)
    for row, number in enumerate(kept):
        assert store.prompts[number].rows == slice(row, row + 1)


def test_empty_prompts_keep_their_number_when_they_are_skipped(
    a_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = lm.capture(
        a_llama, [[], [3, 4], [], [5]], RESIDUALS, to=tmp_path, empty="skip", batch_size=1
    )
    assert [prompt.rows for prompt in store.prompts] == [
        slice(0, 0), slice(0, 2), slice(2, 2), slice(2, 3)
    ]  # fmt: skip
    assert store.recorded["skipped"] == 2
    assert "2 prompts without tokens left out: 0 and 2" in caplog.text


def test_cutting_is_done_only_when_asked_for_and_is_reported(
    a_llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [[3, 4, 5, 6, 7], [3, 4]]
    store = lm.capture(a_llama, long, RESIDUALS, to=tmp_path / "a", max_length=3)
    assert [list(prompt.ids) for prompt in store.prompts] == [[3, 4, 5], [3, 4]]
    assert store.recorded["truncated"] == 1
    assert "1 prompt cut to 3 tokens: 0 (5)" in caplog.text
    over = [[1] * 70]
    cut = lm.capture(a_llama, over, RESIDUALS, to=tmp_path / "b", truncate=True)
    assert cut.rows == 64  # the model's limit


def test_a_cut_text_keeps_its_special_tokens(a_llama: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <unk>", special_tokens=[("<s>", 1), ("<unk>", 2)]
    )
    store = lm.capture(
        a_llama, TEXTS[:1], RESIDUALS, to=tmp_path, tokenizer=tokenizer, max_length=4
    )
    assert list(store.prompts[0].ids) == [1, 3, 4, 2]


def test_a_limit_below_the_special_tokens_cuts_all_the_same(a_llama: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <unk>", special_tokens=[("<s>", 1), ("<unk>", 2)]
    )
    store = lm.capture(
        a_llama, TEXTS[:1], RESIDUALS, to=tmp_path, tokenizer=tokenizer, max_length=1
    )
    assert list(store.prompts[0].ids) == [1]


def test_a_dtype_casts_floating_sites_only(tmp_path: Path) -> None:
    model = mixtral()
    sites = ["model.layers[0].output", "model.layers[0].mlp.gate.output[2]"]
    prompts = [[3, 4, 5], [6, 7]]
    plain = lm.capture(model, prompts, sites, to=tmp_path / "plain")
    store = lm.capture(model, prompts, sites, to=tmp_path / "bf16", dtype="bf16")
    assert [store[site].dtype for site in store.sites] == ["int64", "bfloat16"] or [
        store[site].dtype for site in store.sites
    ] == ["bfloat16", "int64"]
    for site in store.sites:
        expected = plain[site].tensor
        if expected.dtype == torch.float32:
            expected = expected.to(torch.bfloat16)
        assert torch.equal(store[site].tensor, expected)


def test_values_too_large_for_the_dtype_are_counted_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 70000.0
    store = lm.capture(model, [[3], [7, 7]], "model.embed_tokens.output", to=tmp_path, dtype="f16")
    assert torch.isinf(store["model.embed_tokens.output"].tensor).sum() == 2 * WIDTH
    assert f"became infinite at model.model.embed_tokens.output ({2 * WIDTH})" in caplog.text
    with pytest.raises(lm.CastOverflowError, match="embed_tokens"):
        lm.capture(
            model, [[3], [7, 7]], "model.embed_tokens.output", to=tmp_path, dtype="f16",
            overflow="error",
        )  # fmt: skip


def test_overflow_is_an_error_on_request_that_names_site_and_prompts(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 70000.0
    prompts = [[3], [4, 5], [6, 7], [8], [7]]
    with pytest.raises(lm.CastOverflowError) as caught:
        lm.capture(
            model, prompts, "model.embed_tokens.output", to=tmp_path, dtype="float16",
            overflow="error", batch_size=2,
        )  # fmt: skip
    message = str(caught.value)
    assert message.startswith(
        "`model.model.embed_tokens.output` has float32 values that float16 cannot hold, in prompts"
    )
    assert "2" in message or "4" in message


def test_after_an_overflow_the_capture_goes_on_as_its_message_advises(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 70000.0
    prompts, site = [[1, 2]] * 8 + [[7]], "model.embed_tokens.output"
    given: dict[str, Any] = {
        "to": tmp_path, "dtype": "f16", "batch_size": 1, "window_bytes": 1, "commit_seconds": 0,
    }  # fmt: skip
    with pytest.raises(lm.CastOverflowError, match="overflow='report'"):
        lm.capture(model, prompts, site, overflow="error", **given)
    assert lm.open(tmp_path).rows > 0
    store = lm.capture(model, prompts, site, overflow="report", **given)
    assert store.rows == 17
    assert store.options["overflow"] == "report"


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    a_llama = llama()
    a_llama.train()
    a_llama.model.layers[1].eval()
    flags = [module.training for module in a_llama.modules()]
    lm.capture(a_llama, [[3, 4]], RESIDUALS, to=tmp_path, device="cpu")
    assert [module.training for module in a_llama.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in a_llama.modules())


def test_an_iterator_is_read_once_and_not_kept(a_llama: Any, tmp_path: Path) -> None:
    held = []

    def source() -> Iterator[list[int]]:
        for number in range(2000):
            held.append(number)
            yield [number % VOCABULARY, 3]

    store = lm.capture(a_llama, source(), "model.layers[0].output[-1]", to=tmp_path, batch_size=500)
    assert len(held) == len(store.prompts) == 2000


def test_other_batches_on_a_hit_are_a_warning_about_rounding(
    a_llama: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path, batch_size=4)
    with pytest.warns(RoundingWarning, match="batch_size 4, now 8; computed now"):
        lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path, batch_size=8)


def test_what_made_a_store_is_recorded(a_llama: Any, tmp_path: Path) -> None:
    tokenizer = word_tokenizer(name_or_path="words")
    store = lm.capture(a_llama, TEXTS, RESIDUALS, to=tmp_path, tokenizer=tokenizer, batch_size=3)
    assert store.recorded["model_name"] == "LlamaForCausalLM"
    assert store.recorded["tokenizer"] == "words"
    assert store.recorded["rounding"]["torch"] == torch.__version__
    about = json.loads(lm._core.Store.open(str(tmp_path)).about)
    assert about["options"]["batch_size"] == 3
    assert about["options"]["positions"] == ":"


def test_nothing_is_printed_where_standard_error_is_no_terminal(
    a_llama: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lm.capture(a_llama, [[3, 4]], RESIDUALS, to=tmp_path)
    assert capfd.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_size_first_then_rate_and_eta(
    a_llama: Any, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("lamina.progress.REDRAW_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "120")
    lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path, batch_size=2)
    shown = terminal.getvalue()
    estimate = re.search(
        r"3 sites × 87 rows of 384 B: 34\.\d kB to .* \([\d.]+ [GT]B free\)", shown
    )
    bar = re.search(r" *[\d.]+% \[#* *\] \d+/87 tokens  .*tok/s  .*B/s  ETA 0:0\d", shown)
    assert estimate
    assert bar
    assert estimate.start() < bar.start()
    assert shown.endswith(f"87 rows in {tmp_path}, version 2\n")
    silent = Terminal()
    monkeypatch.setattr("sys.stderr", silent)
    lm.capture(a_llama, prompts, RESIDUALS, to=tmp_path / "silent", progress=False)
    assert silent.getvalue() == ""


def test_a_notebook_is_shown_progress_too() -> None:
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    Progress(stream=stream).say("3 sites")
    assert stream.getvalue() == "3 sites\n"


def test_the_eta_follows_the_rate_of_the_last_half_minute() -> None:
    now = [0.0]
    terminal = Terminal()
    progress = Progress(stream=terminal, clock=lambda: now[0])
    progress.start(total=10_000, total_bytes=0)
    for _ in range(60):  # ten tokens a second, then a hundred
        now[0] += 1
        progress.advance(10, 0)
    for _ in range(40):
        now[0] += 1
        progress.advance(100, 0)
    assert "46.0%" in terminal.getvalue().rpartition("\r")[2]
    assert terminal.getvalue().endswith("ETA 0:54")  # 5,400 tokens at 100 a second


def test_a_line_that_is_logged_does_not_run_into_the_bar(
    caplog: pytest.LogCaptureFixture,
) -> None:
    terminal = Terminal()
    progress = Progress(stream=terminal, clock=lambda: 100.0)
    progress.reading(3, 4)
    with caplog.at_level(logging.WARNING, logger="lamina"):
        progress.note("two prompts were cut")
    assert terminal.getvalue().endswith("\r")
    assert caplog.messages == ["two prompts were cut"]


def test_a_gpt2_with_left_padding_gives_each_prompts_own_rows(tmp_path: Path) -> None:
    model = gpt2()
    prompts = [[3, 4, 5], [6], [7, 8]]
    store = lm.capture(model, prompts, "model.transformer.h[:].output", to=tmp_path, padding="left")
    for number, ids in enumerate(prompts):
        got = store["model.transformer.h[1].output"].tensor[store.prompts[number].rows]
        assert (got - alone(model, ids, 1)).abs().max() < 1e-5


def test_an_nnsight_model_brings_its_tokenizer_and_its_edits(tmp_path: Path) -> None:
    import nnsight

    inner = llama()
    model = nnsight.TransformersModel(inner, tokenizer=word_tokenizer(), task="text-generation")
    store = lm.capture(model, TEXTS, RESIDUALS, to=tmp_path / "plain")
    ids = word_tokenizer()(TEXTS[0])["input_ids"]
    got = store["model.layers[0].output"].tensor[: len(ids)]
    assert (got - alone(inner, ids, 0)).abs().max() < 1e-5
    with model.edit(inplace=True):
        model.model.layers[0].output = model.model.layers[0].output * 0 + 1
    with pytest.warns(lm.OpaqueWarning, match="edits of the nnsight model"):
        edited = lm.capture(model, TEXTS, RESIDUALS, to=tmp_path / "edited")
    assert edited["model.layers[0].output"].tensor.unique().tolist() == [1.0]
    assert edited.identity["opaque"] == ["edits of the nnsight model"]
