"""A capture that was cut off goes on where it was, as it was begun, to the same bytes."""

import json
import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interrupting import Interrupt
from tests.models import llama
from tests.recording import prompts_of
from tests.words import word_tokenizer

import lamina as lm
from lamina import _core

capture: Any = import_module("lamina.capture")  # the attribute of that name is the function

SITES = "model.layers[:].output"
LENGTHS = [5, 1, 12, 7, 7, 3, 20, 2, 9, 1, 16, 40]
ROWS = sum(LENGTHS)
PROMPTS = [ids.tolist() for ids in prompts_of(LENGTHS)]
# Windows of one to four batches, 13 rows; a full shard holds 32 rows.
BEGUN: dict[str, Any] = {"batch_size": 1, "window_bytes": 5000, "shard_bytes": 1 << 14}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of an uninterrupted run, by name."""
    directory = tmp_path_factory.mktemp("whole")
    lm.capture(model, PROMPTS, SITES, to=directory, **BEGUN)
    return shards(directory)


def shards(directory: Path) -> dict[str, bytes]:
    """The shards that the newest manifest names."""
    names = [shard[0] for shard in _core.Store.open(str(directory)).shards]
    files = [file for file in (directory / "shards").iterdir() if file.name in names]
    assert len(files) == len(names)
    return {file.name: file.read_bytes() for file in files}


def cut_off(
    model: Any, to: Path, *, at: int, error: BaseException | None = None, **options: Any
) -> BaseException:
    """Begin a capture whose model raises after some batches; return what reached the caller."""
    raised = error or RuntimeError("the model broke")
    with Interrupt(model, at, raised), pytest.raises(type(raised)) as caught:
        lm.capture(model, PROMPTS, SITES, to=to, **(BEGUN | options))
    return caught.value


@pytest.mark.parametrize("at", range(len(PROMPTS)))
@pytest.mark.parametrize("commit_seconds", [0.0, math.inf])
def test_cut_off_after_any_batch_and_run_again_it_ends_with_the_same_files(
    model: Any, whole: dict[str, bytes], tmp_path: Path, at: int, commit_seconds: float
) -> None:
    cut_off(model, tmp_path, at=at, commit_seconds=commit_seconds)
    with Interrupt(model, 99, RuntimeError()) as counted:
        store = lm.capture(model, PROMPTS, SITES, to=tmp_path)  # options come from the store
    assert store.complete
    assert store.verify()
    assert shards(tmp_path) == whole
    assert counted.batches <= len(PROMPTS) - at + 2  # whole windows were not computed again
    assert not (tmp_path / "spool").exists()


def test_the_first_version_is_there_before_the_first_window(model: Any, tmp_path: Path) -> None:
    cut_off(model, tmp_path, at=0)
    store = lm.open(tmp_path)
    assert (store.rows, store.complete) == (0, False)
    assert store.identity["prompts"] == len(PROMPTS)
    assert (tmp_path / "manifests" / f"{1:020}.json").exists()


def test_cut_off_again_and_again_it_still_ends_with_the_same_files(
    model: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for _ in range(20):
        with Interrupt(model, 4, RuntimeError("again")):  # a window has at most 3
            try:
                store = lm.capture(model, PROMPTS, SITES, to=tmp_path, **BEGUN)
                break
            except RuntimeError:
                continue
    assert store.complete
    assert shards(tmp_path) == whole


def test_a_model_that_raises_tells_the_prompts_and_what_is_committed(
    model: Any, tmp_path: Path
) -> None:
    error = cut_off(model, tmp_path, at=5)
    assert str(error) == "the model broke"
    rows = lm.open(tmp_path).rows
    assert rows > 0
    assert error.__notes__ == [
        "while computing prompts 5",
        f"{rows} of {ROWS} rows are committed in {tmp_path}; the same capture, run again, goes on "
        f"from there",
    ]


def test_ctrl_c_commits_what_is_whole_and_says_how_to_resume(model: Any, tmp_path: Path) -> None:
    error = cut_off(model, tmp_path, at=6, error=KeyboardInterrupt(), commit_seconds=math.inf)
    store = lm.open(tmp_path)
    assert not store.complete
    assert store.rows > 0
    assert "run again, goes on from there" in error.__notes__[-1]
    expected = lm.capture(model, PROMPTS, SITES, to=tmp_path / "whole", **BEGUN)
    for site in store.sites:
        assert torch.equal(store[site].tensor, expected[site].tensor[: store.rows])


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ({"batch_size": 2}, "batch_size: the store has 1, this capture 2"),
        ({"padding": "left"}, 'padding: the store has "right", this capture "left"'),
        ({"window_bytes": 6000}, "window_bytes: the store has 5000, this capture 6000"),
        ({"shard_bytes": 1 << 20}, "shard_bytes: the store has 16384, this capture 1048576"),
        ({"short": "drop"}, 'short: the store has "error", this capture "drop"'),
    ],
)
def test_a_differing_option_is_refused_by_name(
    model: Any, tmp_path: Path, option: dict[str, Any], shown: str
) -> None:
    cut_off(model, tmp_path, at=6)
    version = lm.open(tmp_path).version
    with pytest.raises(lm.IdentityError) as caught:
        lm.capture(model, PROMPTS, SITES, to=tmp_path, **option)
    assert shown in str(caught.value)
    assert "A capture goes on only as it was begun" in str(caught.value)
    assert list(caught.value.fields) == list(option)
    assert lm.open(tmp_path).version == version


def test_the_batches_may_still_be_changed_before_anything_is_computed(
    model: Any, tmp_path: Path
) -> None:
    cut_off(model, tmp_path, at=0, batch_size=12)
    store = lm.capture(model, PROMPTS, SITES, to=tmp_path, batch_size=2)
    assert store.complete
    options = json.loads(_core.Store.open(str(tmp_path)).about)["options"]
    assert options["batch_size"] == 2


def test_what_changes_rounding_is_refused_in_the_middle(model: Any, tmp_path: Path) -> None:
    cut_off(model, tmp_path, at=6)
    torch.set_num_threads(2)
    try:
        with pytest.raises(lm.IdentityError, match="threads: the store has 1, this capture 2"):
            lm.capture(model, PROMPTS, SITES, to=tmp_path)
    finally:
        torch.set_num_threads(1)


def test_other_prompts_are_refused_and_the_store_can_still_be_finished(
    model: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    cut_off(model, tmp_path, at=6)
    for others in ([*PROMPTS[:-1], [1]], PROMPTS[:-1], iter(PROMPTS[3:])):
        with pytest.raises(lm.IdentityError, match="tokens: the store has"):
            lm.capture(model, others, SITES, to=tmp_path)
    lm.capture(model, iter(PROMPTS), SITES, to=tmp_path)
    assert shards(tmp_path) == whole


def test_a_half_used_iterator_is_refused_with_both_counts(model: Any, tmp_path: Path) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path)
    used = iter(PROMPTS)
    next(used)
    with pytest.raises(lm.IdentityError) as caught:
        lm.capture(model, used, SITES, to=tmp_path)
    assert "prompts: the store has 12, this capture 11" in str(caught.value)
    assert "an iterator must not have been used before" in str(caught.value)


def test_a_store_whose_windows_are_all_done_is_finished_without_the_model(
    model: Any, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(work: Any, writer: Any, *rest: Any) -> None:
        compute_whole(work, writer, *rest)
        writer.commit()
        raise KeyboardInterrupt

    compute_whole = capture.compute
    monkeypatch.setattr(capture, "compute", compute)
    with pytest.raises(KeyboardInterrupt):
        lm.capture(model, PROMPTS, SITES, to=tmp_path, **BEGUN)
    monkeypatch.undo()
    assert (lm.open(tmp_path).rows, lm.open(tmp_path).complete) == (ROWS, False)
    with Interrupt(model, 0, RuntimeError("nothing is left to compute")):
        assert lm.capture(model, PROMPTS, SITES, to=tmp_path).complete
    assert shards(tmp_path) == whole


@pytest.mark.parametrize("harm", ["half-written", "flipped", "gone", "kept"])
def test_a_spool_is_used_again_only_if_it_is_whole(
    model: Any, whole: dict[str, bytes], tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(model, tmp_path, at=6)
    ids = tmp_path / "spool" / "ids.u32"
    if harm == "half-written":
        (tmp_path / "spool" / "finished.json").unlink()
        ids.write_bytes(ids.read_bytes()[:40])
    elif harm == "flipped":
        data = bytearray(ids.read_bytes())
        data[-3] ^= 1
        ids.write_bytes(data)
    elif harm == "gone":
        for file in (tmp_path / "spool").iterdir():
            file.unlink()
    written = []
    write = capture.write_spool
    monkeypatch.setattr(capture, "write_spool", lambda *a, **k: written.append(1) or write(*a, **k))
    lm.capture(model, PROMPTS, SITES, to=tmp_path)
    assert shards(tmp_path) == whole
    assert len(written) == (0 if harm == "kept" else 1)


def test_a_spool_of_other_prompts_left_by_a_capture_that_never_began_is_not_used(
    model: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(lm.PositionError):  # after the spool is written, before the store begins
        lm.capture(model, [[1, 2]], SITES, to=tmp_path, positions=5)
    (tmp_path / "spool").mkdir(exist_ok=True)
    lm.capture(model, PROMPTS, SITES, to=tmp_path, **BEGUN)
    assert shards(tmp_path) == whole


def test_texts_are_in_the_resumed_store_too(model: Any, tmp_path: Path) -> None:
    texts = ["the cat sat", "a dog ran far", "home", "in rain the cat ran", "dog", "far"]
    options: Any = {"tokenizer": word_tokenizer(), "batch_size": 1, "window_bytes": 1}
    with Interrupt(model, 3, RuntimeError("cut")), pytest.raises(RuntimeError):
        lm.capture(model, texts, SITES, to=tmp_path, **options)
    store = lm.capture(model, texts, SITES, to=tmp_path, tokenizer=word_tokenizer())
    assert [prompt.text for prompt in store.prompts] == texts


def test_a_reader_sees_the_last_commit_while_the_capture_goes_on(
    model: Any, tmp_path: Path
) -> None:
    cut_off(model, tmp_path, at=4)
    store = lm.open(tmp_path)
    rows = store.rows
    assert 0 < rows < ROWS
    lm.capture(model, PROMPTS, SITES, to=tmp_path)
    assert store.rows == rows
    store.refresh()
    assert (store.rows, store.complete) == (ROWS, True)
