"""The way from a GPU to the disk: run with a GPU by `benches/cuda_all.sh`, skipped without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.interrupting import Interrupt
from tests.models import llama, mixtral
from tests.recording import prompts_of

import lamina as lm
from lamina import _core
from lamina.identity import RoundingWarning, model_fields
from lamina.ring import Arena, Ring, cast

pytestmark = pytest.mark.cuda

SITES = "model.layers[:].output"
PROMPTS = [ids.tolist() for ids in prompts_of([5, 1, 12, 7, 7, 3, 20, 2, 9, 1, 16, 40] * 3)]


@pytest.fixture
def model() -> Any:
    return llama().cuda()


def written(row_bytes: list[int], fill: Any, **options: Any) -> list[Any]:
    """What a ring hands to its writer."""
    windows: list[Any] = []

    def write(arena: Arena, payload: object) -> None:
        windows.append(([c.copy() for c in arena.columns], list(arena.overflow), payload))

    with Ring(row_bytes, write, **options) as ring:
        fill(ring)
        ring.drain()
    return windows


def test_rows_arrive_whole_though_their_memory_is_used_again_at_once() -> None:
    rows, width = 4096, 512

    def fill(ring: Any) -> None:
        for window in range(8):
            arena = ring.open(rows)
            for part in range(4):
                goal = np.arange(part, rows, 4)
                values = torch.from_numpy(goal).cuda()[:, None].float() + window
                values = values.expand(-1, width).contiguous()
                ring.put(arena, 0, values, goal)
                del values
                torch.full((len(goal), width), -1.0, device="cuda")  # would get the same memory
            ring.submit(arena, window)

    for columns, _, window in written([4 * width], fill):
        got = columns[0].view(np.float32).reshape(rows, width)
        assert (got == np.arange(rows, dtype=np.float32)[:, None] + window).all()


def test_a_copy_waits_for_the_kernels_that_compute_its_values() -> None:
    def fill(ring: Any) -> None:
        arena = ring.open(256)
        left = torch.full((4096, 4096), 1 / 4096, device="cuda")
        product = left
        for _ in range(50):
            product = product @ left  # stays 1/4096 everywhere, and takes a while
        ring.put(arena, 0, product[:256, :64].contiguous(), np.arange(256))
        ring.submit(arena, None)

    ((columns, _, _),) = written([256], fill)
    assert np.allclose(columns[0].view(np.float32), 1 / 4096)


def test_rows_computed_on_another_stream_arrive_whole() -> None:
    stream = torch.cuda.Stream()

    def fill(ring: Any) -> None:
        with torch.cuda.stream(stream):
            for _ in range(20):
                arena = ring.open(64)
                big = torch.ones(2048, 2048, device="cuda")
                values = (big @ big)[:64, :64].contiguous()
                ring.put(arena, 0, values, np.arange(64))
                ring.submit(arena, None)

    for columns, _, _ in written([256], fill):
        assert (columns[0].view(np.float32) == 2048.0).all()


def test_slots_are_pinned_and_there_are_no_more_than_said() -> None:
    pinned: set[int] = set()

    def fill(ring: Any) -> None:
        arena = ring.open(100)
        for row in range(100):
            ring.put(arena, 0, torch.full((1, 8), float(row), device="cuda"), np.array([row]))
        ring.submit(arena, None)
        ring.drain()
        for slot in ring._state.slots:
            assert slot.pinned is None or slot.pinned.is_pinned()
            pinned.update([] if slot.pinned is None else [slot.pinned.data_ptr()])

    ((columns, _, _),) = written([32], fill, slots=3)
    assert 1 <= len(pinned) <= 3
    assert columns[0].view(np.float32).reshape(100, 8)[:, 0].tolist() == list(range(100))


def test_overflow_is_counted_on_the_gpu_and_travels_with_the_rows() -> None:
    values = torch.tensor([[1.0, 1e6], [2.0, 3.0], [-1e6, 1e7]], device="cuda")
    stored, counts = cast(values, torch.float16)
    assert counts is not None
    assert counts.is_cuda
    assert stored.is_cuda

    def fill(ring: Any) -> None:
        arena = ring.open(3)
        ring.put(arena, 0, stored, np.array([2, 1, 0]), counts)
        ring.submit(arena, None)

    ((columns, overflow, _),) = written([4], fill)
    assert overflow == [(0, 0, 2), (0, 2, 1)]
    assert np.isinf(columns[0].view(np.float16)).sum() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_stored_rows_equal_a_forward_on_the_gpu_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, padding: str
) -> None:
    model = llama(dtype).cuda()
    store = lm.capture(model, PROMPTS, SITES, to=tmp_path, padding=padding, batch_size=1)
    column = store["model.layers[1].output"].tensor
    for number, ids in enumerate(PROMPTS):
        batch = {
            "input_ids": torch.tensor([ids], device="cuda"),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64, device="cuda"),
            "position_ids": torch.arange(len(ids), device="cuda")[None],
        }
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        assert torch.equal(column[store.prompts[number].rows], states[2][0].cpu())
    assert store.verify()


def test_batches_on_the_gpu_give_each_prompts_own_rows(model: Any, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    alone = lm.capture(model, PROMPTS, SITES, to=tmp_path / "alone", batch_size=1)
    batched = lm.capture(model, PROMPTS, SITES, to=tmp_path / "batched", batch_size=16)
    for site in alone.sites:
        assert (alone[site].tensor - batched[site].tensor).abs().max() < 1e-4


def test_a_cast_on_the_gpu_is_the_cast_of_the_values(model: Any, tmp_path: Path) -> None:
    plain = lm.capture(model, PROMPTS, SITES, to=tmp_path / "plain")
    store = lm.capture(model, PROMPTS, SITES, to=tmp_path / "bf16", dtype="bfloat16")
    for site in store.sites:
        assert torch.equal(store[site].tensor, plain[site].tensor.to(torch.bfloat16))


def test_integer_sites_of_a_mixture_of_experts(tmp_path: Path) -> None:
    model = mixtral().cuda()
    sites = ["model.layers[:].mlp.gate.output[2]", SITES]
    store = lm.capture(model, PROMPTS, sites, to=tmp_path, dtype="f16")
    assert {store[site].dtype for site in store.sites} == {"int64", "float16"}


def test_a_capture_cut_off_on_the_gpu_ends_with_the_same_files(model: Any, tmp_path: Path) -> None:
    options: Any = {"batch_size": 2, "window_bytes": 5000, "shard_bytes": 1 << 14}

    def shards(directory: Path) -> dict[str, bytes]:
        names = [shard[0] for shard in _core.Store.open(str(directory)).shards]
        return {name: (directory / "shards" / name).read_bytes() for name in names}

    lm.capture(model, PROMPTS, SITES, to=tmp_path / "whole", **options)
    with Interrupt(model, 9, RuntimeError("cut")), pytest.raises(RuntimeError, match="cut"):
        lm.capture(model, PROMPTS, SITES, to=tmp_path / "cut", **options)
    lm.capture(model, PROMPTS, SITES, to=tmp_path / "cut")
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")


def test_a_model_is_moved_to_the_gpu_for_the_capture_and_back(tmp_path: Path) -> None:
    model = llama()
    store = lm.capture(model, PROMPTS, SITES, to=tmp_path, device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert store.recorded["rounding"]["device"].startswith("cuda (")
    with pytest.warns(RoundingWarning, match="device cuda"):
        lm.capture(model, PROMPTS, SITES, to=tmp_path)


def test_weights_on_the_gpu_have_the_identity_of_the_same_on_the_cpu() -> None:
    assert model_fields(llama().cuda()) == model_fields(llama())


def test_gpu_memory_does_not_pile_up(model: Any, tmp_path: Path) -> None:
    lm.capture(model, PROMPTS, SITES, to=tmp_path / "a")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    lm.capture(model, PROMPTS * 5, SITES, to=tmp_path / "b")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 16)
