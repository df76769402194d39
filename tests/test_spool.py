"""The spool: what it keeps, what it trusts, and how little memory it takes."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.words import word_tokenizer

from lamina.errors import DiskError, DiskFullError
from lamina.spool import Spool, digest_prompts, write_spool
from lamina.tokens import Encoder, Limits, Tokenised, tokenise


def groups_of(prompts: list[tuple[list[int], str | None]], size: int = 3) -> Iterator[Any]:
    items = [Tokenised(np.array(ids, dtype=np.uint32), text) for ids, text in prompts]
    for start in range(0, len(items), size):
        yield items[start : start + size]


PROMPTS: list[tuple[list[int], str | None]] = [
    ([1, 2, 3], "a b c"), ([], ""), ([70000], "größer"), ([9, 8], "i h"), ([5], "日本"),
]  # fmt: skip
IDS = st.lists(st.integers(0, 2**32 - 1), max_size=5)


@settings(max_examples=50, deadline=None)
@given(
    prompts=st.lists(st.tuples(IDS, st.text(max_size=5)), min_size=1, max_size=20),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)  # fmt: skip
def test_what_goes_in_comes_out_and_grouping_does_not_show(
    tmp_path_factory: pytest.TempPathFactory, prompts: Any, sizes: tuple[int, int]
) -> None:
    directory = tmp_path_factory.mktemp("spool") / "spool"
    summary = write_spool(directory, groups_of(prompts, sizes[0]), texts=True)
    assert digest_prompts(groups_of(prompts, sizes[1])).digest == summary.digest
    spool = Spool.reopen(directory)
    assert spool is not None
    assert spool.summary == summary
    assert len(spool) == summary.prompts == len(prompts)
    assert spool[:].tolist() == [len(ids) for ids, _ in prompts]
    assert spool.ids(0, summary.tokens).tolist() == [token for ids, _ in prompts for token in ids]
    for start in (0, len(prompts) // 2):
        assert spool.texts(start, len(prompts)) == [text for _, text in prompts[start:]]


def test_lengths_count_in_the_digest() -> None:
    one = digest_prompts(groups_of([([1, 2], None), ([3], None)]))
    other = digest_prompts(groups_of([([1], None), ([2, 3], None)]))
    assert one.tokens == other.tokens
    assert one.digest != other.digest


def test_texts_can_be_read_in_any_order(tmp_path: Path) -> None:
    write_spool(tmp_path / "s", groups_of(PROMPTS), texts=True)
    spool = Spool.reopen(tmp_path / "s")
    assert spool is not None
    assert spool.texts(3, 5) == ["i h", "日本"]
    assert spool.texts(0, 2) == ["a b c", ""]
    assert spool.texts(2, 3) == ["größer"]


def test_texts_are_dropped_if_one_prompt_has_none(tmp_path: Path) -> None:
    summary = write_spool(tmp_path / "s", groups_of([*PROMPTS, ([4], None)]), texts=True)
    assert summary.text_bytes is None
    assert Spool(tmp_path / "s", summary).texts(0, 2) is None


@pytest.mark.parametrize("name", ["ids.u32", "lengths.u64", "texts.utf8", "finished.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_spool_that_is_not_whole_is_not_reopened(tmp_path: Path, name: str, harm: str) -> None:
    write_spool(tmp_path / "s", groups_of(PROMPTS), texts=True)
    file = tmp_path / "s" / name
    data = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data if harm == "flip" else data[:-1])
    assert Spool.reopen(tmp_path / "s") is None


def test_a_new_spool_replaces_what_was_there(tmp_path: Path) -> None:
    write_spool(tmp_path / "s", groups_of(PROMPTS), texts=True)
    (tmp_path / "s" / "ids.u32").write_bytes(b"half")
    write_spool(tmp_path / "s", groups_of(PROMPTS[:1]), texts=False)
    spool = Spool.reopen(tmp_path / "s")
    assert spool is not None
    assert spool.ids(0, 3).tolist() == [1, 2, 3]


def test_a_spool_cut_under_a_reader_is_an_error(tmp_path: Path) -> None:
    summary = write_spool(tmp_path / "s", groups_of(PROMPTS), texts=False)
    (tmp_path / "s" / "ids.u32").write_bytes(b"1234")
    with pytest.raises(DiskError, match=r"ids\.u32 is shorter than it was"):
        Spool(tmp_path / "s", summary).ids(0, 5)


def test_a_full_disk_is_our_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    from lamina import spool

    with pytest.raises(DiskFullError, match="No space left"), spool._disk(tmp_path):
        full.write_bytes(b"1")


def test_memory_does_not_grow_with_the_prompts(tmp_path: Path) -> None:
    def prompts() -> Iterator[list[int]]:
        for number in range(20_000):
            yield [number % 100] * 50

    tracemalloc.start()
    try:
        summary = write_spool(tmp_path / "s", tokenise(prompts(), None, Limits()), texts=False)
        spool = Spool.reopen(tmp_path / "s")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert spool is not None
    assert summary.tokens == 1_000_000  # 4 MB
    assert peak < 3 << 20  # most of it two parts of the file, read to check it


@pytest.mark.parametrize("bare", [False, True])
def test_texts_are_tokenised_in_groups_and_between_given_ids(bare: bool) -> None:
    tokenizer = word_tokenizer()
    encoder = Encoder(tokenizer.backend_tokenizer if bare else tokenizer)
    calls: list[int] = []
    encode = encoder.encode
    encoder.encode = lambda texts, **k: calls.append(len(texts)) or encode(texts, **k)  # type: ignore[method-assign]
    prompts: list[Any] = ["the cat"] * 300 + [[5, 6]] + ["a dog"]
    groups = list(tokenise(prompts, encoder, Limits()))
    flat = [prompt for group in groups for prompt in group]
    assert calls == [256, 45]
    assert [p.ids.tolist() for p in flat[:1] + flat[-2:]] == [
        tokenizer("the cat")["input_ids"], [5, 6], tokenizer("a dog")["input_ids"],
    ]  # fmt: skip
    assert [p.text for p in flat[-2:]] == [None, "a dog"]


def test_a_bare_tokenizer_keeps_its_padding_and_truncation() -> None:
    backend = word_tokenizer().backend_tokenizer
    backend.enable_padding(length=9)
    backend.enable_truncation(2, stride=1)
    before = json.loads(backend.to_str())
    assert Encoder(backend).encode(["the cat sat on"])[0] == [1, *backend_ids()]
    assert json.loads(backend.to_str()) == before


def backend_ids() -> list[int]:
    vocabulary = word_tokenizer().get_vocab()
    return [vocabulary[word] for word in ("the", "cat", "sat", "on")]


def test_a_processor_lends_its_tokenizer() -> None:
    class Processor:
        tokenizer = word_tokenizer()

    assert Encoder(Processor()).encode(["dog"]) == [[1, word_tokenizer().get_vocab()["dog"]]]
