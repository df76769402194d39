"""What a user can get wrong when capturing, and what they are told."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.interrupting import Interrupt
from tests.models import llama
from tests.words import word_tokenizer

import lamina as lm
from lamina import _core

SITES = "model.layers[:].output"
PROMPTS = [[3, 4, 5], [6, 7], [8]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def message(
    kind: type[Exception], model: Any, to: Path, prompts: Any = PROMPTS, **options: Any
) -> str:
    """What a capture that is refused says; where there was no store, none is left."""
    sites = options.pop("sites", SITES)
    before = _core.probe(str(to))
    with pytest.raises(kind) as caught:
        lm.capture(model, prompts, sites, to=to, **options)
    assert (_core.probe(str(to)) == "store") == (before == "store")
    assert not (to / "spool").exists() or before == "store"
    return str(caught.value)


# ── Prompts ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("the cat sat", "prompts is a single text; for one prompt write ['the cat sat']"),
        ("x" * 99, f"prompts is a single text; for one prompt write ['{'x' * 37}…']"),
        ([1, 2, 3], "prompts is a single list of token ids; write [[1, 2, 3]]"),
        ([1, 2, 3, 4, 5], "prompts is a single list of token ids; write [[1, 2, 3, 4, …]]"),
        ((np.int64(4),), "prompts is a single list of token ids; write [[4]]"),
        ([], "there are no prompts: the list or iterator is empty"),
        (iter(()), "there are no prompts: the list or iterator is empty"),
        (
            torch.ones(2, 3, dtype=torch.int64),
            "prompts has shape [2, 3] and no attention mask, so padding cannot be told from "
            "tokens; give {'input_ids': …, 'attention_mask': …} or a list of one-dimensional "
            "tensors",
        ),
        (
            {"input_ids": np.ones((2, 3), dtype=np.int64)},
            "prompts has shape [2, 3] and no attention mask, so padding cannot be told from "
            "tokens; give {'input_ids': …, 'attention_mask': …} or a list of one-dimensional "
            "tensors",
        ),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 2)},
            "attention_mask is [2, 2] and input_ids [2, 3]; they must have one shape",
        ),
        (
            {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]},
            "prompt 0: the attention mask has padding between real tokens",
        ),
        (
            [[3], torch.ones(1, 3, dtype=torch.int64)],
            "prompt 1 has shape [1, 3]; expected one-dimensional token ids (a batch needs its "
            "attention_mask: {'input_ids': …, 'attention_mask': …})",
        ),
        ([[3], [1.5]], "prompt 1 holds float64 values; token ids are integers"),
        ([[3], [4, -1]], "prompt 1 has token id -1; token ids lie between 0 and 4294967295"),
        ([[3], [4, 61]], "prompt 1 has token id 61, and the model's vocabulary has 61 tokens"),
        (
            [[3], None],
            "prompt 1 is None; a prompt is a text, a list or one-dimensional tensor of token ids, "
            "or a dict with 'input_ids' or 'text'",
        ),
        (
            [{"words": "a", "label": 1}],
            "prompt 0 is a dict that has 'words' and 'label'; expected 'input_ids' or 'text' (of a "
            "dataset, give the column: dataset['name'])",
        ),
        ({"b", "a"}, "prompts is a set, which has no order; give a list"),
        (
            [{"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 1]]}],
            "prompt 0 has shape [2, 2]: it is a batch, not one prompt",
        ),
        (
            Path("texts.txt"),
            "prompts is a PosixPath; give a list of texts or of token id lists, a datasets column, "
            "or an iterator of them",
        ),
        (
            [[3], "the cat"],
            "prompt 1 is a text and there is no tokenizer; pass tokenizer=… or token ids",
        ),
        (
            [[3], [], [4], []],
            "2 prompts have no tokens: 1 and 3; empty='skip' leaves them out",
        ),
        (
            {"input_ids": [[0, 5]], "attention_mask": [[0, 0]]},
            "1 prompt has no tokens: 0; empty='skip' leaves them out",
        ),
        (
            [[1] * 64, [1] * 65, [1] * 70],
            "2 prompts are longer than the model's limit of 64 tokens: 1 (65) and 2 (70); "
            "truncate=True or max_length=… cuts them",
        ),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used_are_refused_with_the_form_that_can(
    model: Any, tmp_path: Path, prompts: Any, expected: str
) -> None:
    assert message(lm.PromptError, model, tmp_path, prompts) == expected


def test_a_set_of_splits_asks_for_one_of_them(model: Any, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = DatasetDict(train=Dataset.from_dict({"text": ["a"]}))
    assert message(lm.PromptError, model, tmp_path, splits) == (
        "prompts is a set of splits (train); give one of them, or its column"
    )


def test_a_text_that_is_no_unicode_is_named(model: Any, tmp_path: Path) -> None:
    texts = ["the cat", "a \ud800 dog"]
    assert message(lm.PromptError, model, tmp_path, texts, tokenizer=word_tokenizer()) == (
        "prompt 1 is no valid Unicode: a lone surrogate at character 2"
    )


def test_something_that_is_no_tokenizer_is_refused(model: Any, tmp_path: Path) -> None:
    assert message(lm.PromptError, model, tmp_path, ["a"], tokenizer="gpt2") == (
        "tokenizer is a str; expected a transformers tokenizer or a tokenizers.Tokenizer"
    )


def test_an_error_of_the_callers_iterator_reaches_the_caller(model: Any, tmp_path: Path) -> None:
    def prompts() -> Iterator[list[int]]:
        yield [3]
        raise ConnectionResetError("the stream broke")

    assert message(ConnectionResetError, model, tmp_path, prompts()) == "the stream broke"


# ── Sites and positions ──────────────────────────────────────────────────────────────────────────


def test_an_unknown_site_lists_the_nearest_real_names(model: Any, tmp_path: Path) -> None:
    text = message(
        lm.SiteNotFoundError, model, tmp_path / "new", sites="model.layers[:].mpl.output"
    )
    assert "nearest: `model.model.layers[:].mlp.output`" in text
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ([], "no sites were given; for instance 'model.layers[:].output'"),
        (3, "sites=3: expected paths, such as 'model.layers[:].output'"),
        ([3], "3 is no site: expected a path as text"),
    ],
)
def test_sites_that_are_no_paths_are_refused(
    model: Any, tmp_path: Path, sites: Any, expected: str
) -> None:
    assert message(lm.InputError, model, tmp_path, sites=sites) == expected


def test_a_typo_in_a_path_is_shown_at_its_byte(model: Any, tmp_path: Path) -> None:
    text = message(lm.PathError, model, tmp_path / "new", sites="model.layers[2.output")
    assert "at byte 14" in text
    assert not (tmp_path / "new").exists()


def test_a_position_that_some_prompts_lack_names_them(model: Any, tmp_path: Path) -> None:
    text = message(lm.PositionError, model, tmp_path, sites="model.layers[0].output[2]")
    assert text == (
        "position [2] is outside 2 prompts of 3: 1 (2 tokens) and 2 (1 token); "
        "short='drop' leaves them out"
    )


def test_positions_in_path_and_argument_must_agree(model: Any, tmp_path: Path) -> None:
    text = message(
        lm.PositionError, model, tmp_path, sites="model.layers[0].output[-1]", positions=0
    )
    assert "[-1]" in text
    assert "[0]" in text


# ── Options ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"batch_size": "8"}, "batch_size='8': expected an integer"),
        ({"batch_size": True}, "batch_size=True: expected at least 1"),
        ({"padding": "both"}, "padding='both': expected 'right' or 'left' or 'none'"),
        ({"short": "skip"}, "short='skip': expected 'error' or 'drop'"),
        ({"empty": "drop"}, "empty='drop': expected 'error' or 'skip'"),
        ({"overflow": "ignore"}, "overflow='ignore': expected 'report' or 'error'"),
        ({"texts": "yes"}, "texts='yes': expected True or False"),
        ({"shard_bytes": 100}, "shard_bytes=100: expected at least 4,096"),
        ({"max_length": 65}, "max_length=65 is more than the model's limit of 64 tokens"),
        ({"commit_seconds": -1}, "commit_seconds=-1: expected a number of seconds"),
    ],
)  # fmt: skip
def test_options_say_what_they_expect(
    model: Any, tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    assert message(lm.InputError, model, tmp_path, **options) == expected


def test_a_device_that_is_not_there_is_refused(model: Any, tmp_path: Path) -> None:
    text = message(lm.InputError, model, tmp_path, device="nowhere")
    assert text.startswith("device='nowhere': Expected one of cpu, cuda")


def test_a_dtype_that_is_none_is_refused(model: Any, tmp_path: Path) -> None:
    assert "unknown dtype `float13`" in message(lm.DtypeError, model, tmp_path, dtype="float13")
    assert message(lm.DtypeError, model, tmp_path, dtype="int8") == (
        "dtype='int8': activations are stored in floating point"
    )


def test_something_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "str is no model" in message(lm.InputError, "gpt2", tmp_path)


# ── Directories ──────────────────────────────────────────────────────────────────────────────────


def test_a_directory_that_holds_something_else_is_left_alone(model: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(lm.ForeignDirectoryError, match=r"thesis\.tex"):
        lm.capture(model, PROMPTS, SITES, to=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_without_write_permission_is_named(tmp_path: Path) -> None:
    # Root may write anywhere, so the capture runs as another user where this is root.
    to = tmp_path / "closed" / "acts"
    to.parent.mkdir()
    to.parent.chmod(0o555)
    script = (
        "import os, sys, lamina as lm\n"
        "from lamina import _core\n"
        "if os.getuid() == 0:\n"
        "    os.setuid(65534)\n"
        "try:\n"
        "    _core.Writer(sys.argv[1])\n"
        "except lm.DiskError as error:\n"
        "    print(error.errno, error)\n"
    )
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        [sys.executable, "-c", script, str(to)], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(str(errno.EACCES)), done.stderr
    assert str(to) in done.stdout
    to.parent.chmod(0o755)


def test_a_second_writer_is_told_who_writes(model: Any, tmp_path: Path) -> None:
    writer = _core.Writer(str(tmp_path))
    try:
        with pytest.raises(lm.StoreInUseError, match=str(os.getpid())):
            lm.capture(model, PROMPTS, SITES, to=tmp_path)
    finally:
        writer.close()


def test_too_little_room_is_refused_before_anything_is_computed(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "free_bytes", lambda _: 3000)
    text = message(lm.DiskFullError, model, tmp_path)
    assert text == (
        f"{tmp_path}: the capture needs 4.9 kB while it runs (2.4 kB in the end), "
        f"and 3.0 kB are free"
    )


def test_a_disk_that_is_full_in_the_middle_keeps_what_is_committed(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lamina.computing as computing

    append, calls = computing._append, []

    def full(writer: Any, arena: Any, tables: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise lm.DiskFullError("no room", errno.ENOSPC, str(tmp_path))
        append(writer, arena, tables)

    monkeypatch.setattr(computing, "_append", full)
    options: Any = {"batch_size": 1, "window_bytes": 1}
    with pytest.raises(lm.DiskFullError, match="no room"):
        lm.capture(model, PROMPTS, SITES, to=tmp_path, commit_seconds=0, **options)
    assert lm.open(tmp_path).rows == 5
    monkeypatch.undo()
    assert lm.capture(model, PROMPTS, SITES, to=tmp_path).rows == 6


# ── The model ────────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_raises_in_a_batch_keeps_what_was_committed_and_tells_the_prompts(
    model: Any, tmp_path: Path
) -> None:
    prompts = [[3] * n for n in (9, 4, 8, 5, 7, 6)]
    error = RuntimeError("out of something")
    with Interrupt(model, 2, error), pytest.raises(RuntimeError, match="out of something"):
        lm.capture(
            model, prompts, SITES, to=tmp_path, batch_size=2, window_bytes=1, commit_seconds=0
        )
    assert error.__notes__[0] == "while computing prompts 4 and 5"
    store = lm.open(tmp_path)
    assert store.rows == 26
    assert store.verify()


def test_nan_and_infinity_are_stored_counted_and_shown(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
        model.model.embed_tokens.weight[8, 0] = float("inf")
    store = lm.capture(model, [[3, 7], [8]], "model.embed_tokens.output", to=tmp_path)
    values = store["model.embed_tokens.output"].tensor
    assert torch.isnan(values).sum() == 32
    assert torch.isinf(values).sum() == 1
    counts = _core.Store.open(str(tmp_path)).counts()
    assert counts == [(32, 1, 0)]
    assert "32 values in model.model.embed_tokens.output" in repr(store)
    assert "infinite  1 value in model.model.embed_tokens.output" in repr(store)
