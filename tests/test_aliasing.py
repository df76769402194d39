"""Who sees a write, and how long memory lives: views, copies, files, threads, forks, the end."""

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.memory import SITE, digests, pattern, writable_mappings, write_store

from lamina import _core

SHAPE = (16,)
ROWS = 1000
OTHER = "model.layers[1].output"


@pytest.fixture(params=["one shard", "many shards", "pieces"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> _core.Store:
    columns = {
        SITE: ("float32", SHAPE, pattern("float32", SHAPE, ROWS)),
        OTHER: ("bfloat16", (3,), pattern("bfloat16", (3,), ROWS, seed=1)),
    }
    options = {
        "one shard": {},
        "many shards": {"shard_bytes": 16 << 10},
        "pieces": {"shard_bytes": 16 << 10, "finish": False},
    }
    return write_store(tmp_path / "store", columns, **options[request.param])


def values_of(site: str) -> torch.Tensor:
    if site == SITE:
        return torch.from_numpy(pattern("float32", SHAPE, ROWS)).view(torch.float32)
    return torch.from_numpy(pattern("bfloat16", (3,), ROWS, seed=1)).view(torch.bfloat16)


def test_a_write_is_seen_by_the_views_of_one_column_and_nothing_else(store, tmp_path):
    before = digests(tmp_path)
    rows = np.arange(ROWS, dtype=np.int64)
    for index, site in enumerate((SITE, OTHER)):
        exported = store.column(index)
        tensor = torch.from_dlpack(exported)
        assert torch.equal(tensor, values_of(site))
        tensor.zero_()
        tensor[ROWS // 2].fill_(3)
        assert torch.from_dlpack(exported.rows(ROWS // 2, ROWS // 2 + 1)).unique().tolist() == [3]
        assert not torch.from_dlpack(exported.rows(0, 9)).any()

        another = torch.from_dlpack(store.column(index))
        assert torch.equal(another, values_of(site))
        for result in (
            store.gather([index], rows)[0],
            store.gather([index], rows, verify=True)[0],
            store.read(index, 0, ROWS),
            _core.Store.open(str(tmp_path / "store")).column(index),
        ):
            assert torch.equal(
                torch.from_dlpack(result).view(values_of(site).shape), values_of(site)
            )
        assert not tensor[: ROWS // 2].any()
    assert store.verify() == []
    assert digests(tmp_path) == before


def test_what_was_gathered_is_nobody_elses(store):
    first = torch.from_dlpack(store.read(0, 0, ROWS))
    first.zero_()
    assert torch.equal(torch.from_dlpack(store.read(0, 0, ROWS)), values_of(SITE))
    assert torch.equal(torch.from_dlpack(store.column(0)), values_of(SITE))


def test_writes_through_a_read_only_array_that_torch_took_do_no_harm(store, tmp_path):
    before = digests(tmp_path)
    array = np.from_dlpack(store.column(0))
    assert not array.flags.writeable
    tensor = torch.from_dlpack(array)  # without a word, and torch knows no read-only memory
    tensor.add_(1)
    assert torch.equal(torch.from_dlpack(store.read(0, 0, ROWS)), values_of(SITE))
    assert digests(tmp_path) == before


def test_tensors_outlive_store_column_and_files(store, tmp_path):
    exported = store.column(0)
    tensors = [
        torch.from_dlpack(exported),
        torch.from_dlpack(exported.rows(3, 900)),
        torch.from_numpy(np.array(store.column(0), copy=False).view(np.int32).copy()),
        torch.from_dlpack(store.gather([0], np.arange(ROWS, dtype=np.int64))[0]),
    ]
    array = np.asarray(store.column(0))
    view = memoryview(exported)
    del store, exported
    gc.collect()
    shutil.rmtree(tmp_path / "store")
    expected = values_of(SITE)
    assert torch.equal(tensors[0], expected)
    assert torch.equal(tensors[1], expected[3:900])
    assert torch.equal(tensors[2].view(torch.float32), expected)
    assert torch.equal(tensors[3].view(ROWS, -1), expected)
    assert array.tobytes() == view.tobytes() == expected.numpy().tobytes()
    tensors[0].mul_(2)
    assert torch.equal(tensors[1], 2 * expected[3:900])


def test_no_mapping_outlives_its_last_tensor(store, tmp_path):
    exported = store.column(0)
    mapped = writable_mappings(tmp_path)
    assert mapped > 0
    first = torch.from_dlpack(exported)
    second = first[5:7].t()
    array = np.from_dlpack(exported.rows(0, 2))
    del exported, first
    gc.collect()
    assert writable_mappings(tmp_path) == mapped
    del second
    gc.collect()
    assert writable_mappings(tmp_path) == mapped
    del array
    gc.collect()
    assert writable_mappings(tmp_path) == 0


def test_shards_lie_one_after_another_where_huge_pages_can_be_used(tmp_path):
    rows = 70_000
    values = pattern("float32", SHAPE, rows)
    store = write_store(
        tmp_path / "store",
        {SITE: ("float32", SHAPE, values)},
        window_rows=rows,
        shard_bytes=3 << 20,
    )
    assert store.tiers() == ["2 MiB"]
    assert len(store.shards) == 3
    tensor = torch.from_dlpack(store.column(0))
    assert tensor.view(torch.uint8).numpy().tobytes() == values.tobytes()
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, offset, *_ = line.split()
        if permissions == "rw-p" and f"{tmp_path}/" in line:
            start, end = (int(address, 16) for address in span.split("-"))
            mapped.append((start, end))
            if len(mapped) < 3:  # the last shard is short, and aligned to 4 KiB only
                assert (start - int(offset, 16)) % (2 << 20) == 0
    assert [start for start, _ in mapped[1:]] == [end for _, end in mapped[:-1]]
    assert mapped[0][0] == tensor.data_ptr()
    assert len(mapped) == 3


WITHOUT_ADDRESSES = """
import resource, sys
from pathlib import Path
from lamina import _core
from lamina.errors import DiskError

store = _core.Store.open(sys.argv[1])
store.column(0)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (1 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    store.column(0)
except DiskError as error:
    print(error)
"""


@pytest.mark.parametrize("store", ["many shards"], indirect=True)
def test_addresses_that_cannot_be_had_are_an_error_that_names_the_setting(store):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ADDRESSES, store.directory],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = r"cannot map 64000 bytes: the process is limited to \d+ bytes of addresses \(`ulimit"
    assert re.match(expected, done.stdout), done.stdout


@pytest.mark.parametrize("store", ["many shards"], indirect=True)
def test_opening_and_dropping_columns_leaves_nothing_behind(store):
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    def use() -> None:
        tensor = torch.from_dlpack(store.column(0))
        tensor[0] += 1
        store.column(1).__dlpack__()
        torch.from_dlpack(store.read(0, 0, ROWS), copy=True)

    for _ in range(20):
        use()
    gc.collect()
    before = mappings()
    for _ in range(200):
        use()
    gc.collect()
    assert mappings() <= before + 20


def test_columns_are_read_written_and_dropped_by_many_threads(store):
    expected = values_of(SITE)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(30):
                tensor = torch.from_dlpack(store.column(0))
                tensor[number::8].fill_(number)
                rows = np.random.default_rng(number).integers(0, ROWS, 50)
                got = torch.from_dlpack(store.gather([0], rows)[0]).view(50, -1)
                assert torch.equal(got, expected[torch.from_numpy(rows)])
                del tensor
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_deleter_needs_neither_the_interpreter_nor_its_thread(store, tmp_path):
    class Versioned(ctypes.Structure):
        _fields_ = [
            ("version", ctypes.c_uint32 * 2),
            ("context", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
        ]

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    rename = ctypes.pythonapi.PyCapsule_SetName
    rename.argtypes = [ctypes.py_object, ctypes.c_char_p]
    capsule = store.column(0).__dlpack__(max_version=(1, 0))
    address = pointer(capsule, b"dltensor_versioned")
    used = ctypes.create_string_buffer(b"used_dltensor_versioned")
    rename(capsule, used)  # what a consumer does: the memory is now its own
    del capsule
    gc.collect()
    assert writable_mappings(tmp_path)
    # A call through `CFUNCTYPE` releases the GIL.
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(Versioned.from_address(address).deleter)
    thread = threading.Thread(target=deleter, args=(address,))
    thread.start()
    thread.join()
    assert writable_mappings(tmp_path) == 0


AT_THE_END = """
import sys, threading, time
import numpy as np, torch
from lamina import _core

store = _core.Store.open(sys.argv[1])
column = store.column(0)
tensor = torch.from_dlpack(column)
array = np.asarray(store.column(0))
view = memoryview(store.column(0))
capsules = [column.__dlpack__(), column.__dlpack__(max_version=(1, 0))]
taken = torch.utils.dlpack.from_dlpack(column.__dlpack__())
sys.keep = [tensor, column, store]              # goes when the modules go
cycle = [torch.from_dlpack(store.column(0))]
cycle.append(cycle)
out = np.zeros(tensor.numel() * 4, np.uint8)


def work():
    rows = np.arange(len(column), dtype=np.int64)
    while True:
        store.gather([0], rows, [out])


threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
print(float(tensor.sum()))
"""


@pytest.mark.parametrize("store", ["many shards"], indirect=True)
def test_whatever_is_left_at_the_end_of_the_interpreter_is_no_harm(store):
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END, store.directory],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) == float(values_of(SITE).sum())


class Rows(torch.utils.data.Dataset):
    """Rows of a column, which each worker overwrites as it reads them."""

    def __init__(self, column: torch.Tensor) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor]:
        value = self.column[row].clone()
        self.column[row] = -1
        return os.getpid(), value


@pytest.mark.parametrize("store", ["many shards"], indirect=True)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forked_loader_workers_read_the_column_and_write_to_their_own(store):
    column = torch.from_dlpack(store.column(0))
    loader = torch.utils.data.DataLoader(
        Rows(column), batch_size=50, num_workers=2, multiprocessing_context="fork"
    )
    processes: set[int] = set()
    batches: list[torch.Tensor] = []
    for process, values in loader:
        processes.update(process.tolist())
        batches.append(values)
    assert len(processes - {os.getpid()}) == 2
    assert torch.equal(torch.cat(batches), values_of(SITE))
    assert torch.equal(column, values_of(SITE))


@pytest.mark.parametrize("store", ["many shards"], indirect=True)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_uses_and_drops_the_store_by_itself(store, tmp_path):
    tensor = torch.from_dlpack(store.column(0))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            tensor.fill_(9)
            fresh = torch.from_dlpack(store.column(0))
            rows = torch.from_dlpack(store.read(0, 0, ROWS))
            if torch.equal(fresh, values_of(SITE)) and torch.equal(rows, values_of(SITE)):
                del tensor, store, fresh, rows
                gc.collect()
                status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(tensor, values_of(SITE))
    assert torch.equal(torch.from_dlpack(store.read(0, 0, ROWS)), values_of(SITE))


@pytest.mark.parametrize("store", ["many shards"], indirect=True)
def test_a_gather_overlaps_with_python(store):
    """The GIL is released while rows are gathered: another thread counts meanwhile."""
    rows = np.tile(np.arange(ROWS, dtype=np.int64), 2000)
    out = np.empty((len(rows), *SHAPE), np.float32)
    counted = 0
    gathering = threading.Event()
    finished = threading.Event()

    def gather() -> None:
        gathering.set()
        store.gather([0], rows, [out.view(np.uint8)])
        finished.set()

    thread = threading.Thread(target=gather)
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.5)  # whoever holds the GIL keeps it
    try:
        thread.start()
        gathering.wait()
        while not finished.is_set():
            counted += 1
        thread.join()
    finally:
        sys.setswitchinterval(before)
    assert counted > 0
    assert np.array_equal(out[-ROWS:], values_of(SITE).numpy())
