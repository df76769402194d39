"""docs/format.md is true: its tables, its example, and every store, read by a second reader."""

from __future__ import annotations

import json
import random
import re
import struct
from functools import cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tests import decoder
from tests.golden import make
from tests.golden.make import Feeder

import lamina as lm
from lamina import _core

GOLDEN = Path(__file__).parent / "golden" / "v1"
TINY = GOLDEN / "tiny"


# ── Stores of every kind ─────────────────────────────────────────────────────────────────────────


def tiers(directory: Path) -> None:
    """A full shard with a site of each tier, and a short one."""
    sites = [
        ("model.copy.output", "uint8", (1, 3)),
        ("model.huge.output", "float32", (32, 32)),
        ("model.page.output", "int64", ()),
        ("model.large.output", "bfloat16", (64,)),
    ]
    feeder = Feeder(directory, sites, shard_bytes=512 * (3 + 4096 + 8 + 128 + 9))
    feeder.window([400, 200, 0, 100])
    feeder.core.finish()


def blocks(directory: Path) -> None:
    """Tensors of several checksum blocks: rows that fit a block twice, once, not at all."""
    sites = [
        ("model.a.output", "float32", (10_000,)),
        ("model.b.output", "uint8", (131_072,)),
        ("model.c.output", "uint8", (131_073,)),
    ]
    feeder = Feeder(directory, sites, shard_bytes=8 * 303_000)
    feeder.window([5, 1, 3])
    feeder.core.finish()


def long_tables(directory: Path) -> None:
    """Side tensors of several checksum blocks."""
    feeder = Feeder(directory, [("model.a.output", "uint8", ())], texts=True)
    feeder.window([40_000, 3, 2], last=1)
    feeder.window([2] * 17_000, last=2)
    feeder.core.finish()


def twins(directory: Path) -> None:
    """Two full shards of the same bytes are one file."""
    with lm.create(directory, {"model.output": (2, "f32")}, shard_bytes=2 * 17) as writer:
        for _ in range(2):
            writer.append({"model.output": np.ones((2, 2), np.float32)}, tokens=[7, 8])


def no_rows(directory: Path) -> None:
    """Prompts, and no row at all."""
    feeder = Feeder(directory, [("model.a.output", "float64", (2,))], texts=True)
    feeder.window([0, 0])
    feeder.core.finish()


def no_tokens(directory: Path) -> None:
    """Rows without tokens: each is a prompt without ids."""
    with lm.create(directory, {"model.output": ((), "int64")}) as writer:
        writer.append({"model.output": np.arange(3)})


def border_pieces(directory: Path) -> None:
    """Pieces at the border of a shard, where prompts without rows wait; not complete."""
    feeder = Feeder(directory, [("model.a.output", "uint16", (2,))], shard_bytes=4 * 13)
    for lengths in ([3, 0], [0, 1], [0], [0, 2], [0]):
        feeder.window(lengths)
        feeder.core.commit()
    feeder.core.close()


MADE = {
    made.__name__: made
    for made in (tiers, blocks, long_tables, twins, no_rows, no_tokens, border_pieces)
}


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """A folder where each store is made once."""
    return tmp_path_factory.mktemp("format")


@pytest.fixture
def scratch():
    """An empty folder in memory where there is one: many stores, no disk to wait for."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(params=[*make.STORES, *MADE])
def directory(request, kept):
    if request.param in make.STORES:
        return GOLDEN / request.param
    target = kept / request.param
    if not target.exists():
        MADE[request.param](target)
    return target


@cache
def decoded(directory: Path) -> decoder.Store:
    return decoder.read_store(directory)


# ── Every store ──────────────────────────────────────────────────────────────────────────────────


def test_a_reader_of_the_document_alone_reads_what_lamina_reads(directory):
    found, store = decoded(directory), _core.Store.open(directory)
    manifest = found.manifest
    assert (store.version, store.store_id) == (manifest["version"], manifest["store"])
    assert (store.complete, store.windows) == (manifest["complete"], manifest["windows"])
    assert json.loads(store.identity) == manifest["identity"]
    assert json.loads(store.about) == manifest["about"]
    assert store.created == manifest["created"]
    assert [
        (path, _core.dtype_name(dtype), tuple(shape)) for path, dtype, shape in found.group["sites"]
    ] == store.sites
    assert store.rows == len(found.tokens)
    for at, path in enumerate(found.columns):
        assert np.asarray(store.column(at).bytes()).tobytes() == found.columns[path], path
    read = [np.asarray(table).tolist() for table in store.row_table(0, store.rows)]
    assert read == [found.tokens, found.positions, found.flags]


def test_prompts_of_the_document_are_those_of_lamina(directory):
    found, store = decoded(directory), _core.Store.open(directory)
    assert store.prompts == len(found.prompts)
    starts, rows, lengths = store.prompt_table(0, store.prompts)
    assert np.asarray(starts).tolist() == [prompt.start for prompt in found.prompts]
    assert np.asarray(rows).tolist() == [prompt.rows for prompt in found.prompts]
    assert np.asarray(lengths).tolist() == [prompt.length for prompt in found.prompts]
    for at, prompt in enumerate(found.prompts[:50]):
        assert np.asarray(store.prompt_ids(at)).tolist() == prompt.ids
        assert store.prompt_text(at) == prompt.text
    owners = [at for at, prompt in enumerate(found.prompts) for _ in range(prompt.rows)]
    every = np.arange(store.rows)
    assert np.asarray(store.prompts_of(every)).tolist() == owners
    positions = np.array(found.positions, dtype=np.int64)
    assert np.array_equal(store.locate(np.array(owners, dtype=np.int64), positions), every)


def test_shards_tiers_and_counts_follow_from_the_manifest(directory):
    found, store = decoded(directory), _core.Store.open(directory)
    group, row, prompt = found.group, 0, 0
    expected = []
    for entry in group["shards"]:
        last = decoder.layout(group, entry)[-1]
        full = entry["rows"] == group["rows_per_shard"]
        name = f"{entry['name']}.safetensors"
        size = last.offset + last.nbytes
        expected.append((name, row, entry["rows"], prompt, entry["prompts"], size, full))
        row, prompt = row + entry["rows"], prompt + entry["prompts"]
    assert store.shards == expected
    assert store.tiers() == [decoder.tier(group, site) for site in group["sites"]]
    counts = []
    for path, dtype, _ in group["sites"]:
        values = torch.frombuffer(bytearray(found.columns[path]) or bytearray(8), dtype=torch.uint8)
        values = values.view(getattr(torch, _core.dtype_name(dtype)))
        wide = values.to(torch.float64) if values.is_floating_point() else torch.zeros(1)
        counts.append((int(wide.isnan().sum()), int(wide.isinf().sum()), 0))
    assert store.counts() == counts


def test_short_shards_come_last_and_have_at_most_r_rows(directory):
    group = decoded(directory).group
    sizes = [entry["rows"] for entry in group["shards"]]
    full = sizes.count(group["rows_per_shard"])
    assert sizes[:full] == [group["rows_per_shard"]] * full
    assert sum(sizes[full:]) <= group["rows_per_shard"]


def test_any_safetensors_reader_opens_the_shards(directory):
    store = lm.open(directory)
    row = 0
    for name, _, rows, _, prompts, _, _ in store.shards:
        with safe_open(directory / "shards" / name, framework="pt") as shard:
            names = list(shard.keys())
            assert set(store.sites) <= set(names)
            assert shard.metadata()["format"] == "lamina 1"
            for site, column in store.items():
                tensor = shard.get_tensor(site)
                assert tensor.dtype == column.tensor.dtype
                assert tensor.shape == (rows, *column.shape[1:])
                expected = column.tensor[row : row + rows]
                assert same_bytes(tensor, expected), site
            tokens = shard.get_tensor("#row.token").numpy().astype(np.int64)
            assert np.array_equal(np.where(tokens == 2**32 - 1, -1, tokens),
                                  store.tokens[row : row + rows])  # fmt: skip
            assert shard.get_tensor("#prompt.rows").shape == (prompts,)
        row += rows


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.numel():
        return one.shape == other.shape
    flat = [each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
    return torch.equal(*flat)


def test_the_special_cases_are_there():
    made = {name: decoder.read_store(GOLDEN / name) for name in make.STORES}
    heads = [entry["head"] for entry in made["prompts"].group["shards"]]
    assert heads == [0, 1, 0, 4, 2]
    assert made["prompts"].group["shards"][3]["prompts"] == 0
    assert [entry["rows"] for entry in made["pieces"].group["shards"]] == [8, 4, 4]
    assert made["pieces"].group["shards"][1]["head"] == 1
    assert sum(made["prompts"].flags) == 1
    dtypes = {dtype for _, dtype, _ in made["dtypes"].group["sites"]}
    assert dtypes == decoder.element_sizes().keys()


# ── The tables ───────────────────────────────────────────────────────────────────────────────────


def test_element_types_are_those_of_the_core_and_of_torch():
    rows = decoder.table("Element types")
    assert [row["torch name"] for row in rows] == make.DTYPES
    for row in rows:
        for name in (row["name on disk"], row["torch name"], row["short name"]):
            assert _core.dtype_name(name) == row["torch name"]
            assert _core.dtype_size(name) == int(row["bytes"])
        dtype = getattr(torch, row["torch name"])
        assert dtype.itemsize == int(row["bytes"])


def test_dlpack_codes_are_those_that_leave_the_core():
    from ctypes import POINTER, c_char_p, c_uint8, c_void_p, cast, py_object, pythonapi

    pointer = pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = c_void_p, [py_object, c_char_p]
    store = _core.Store.open(GOLDEN / "dtypes")
    codes = {row["torch name"]: int(row["DLPack code"]) for row in decoder.table("Element types")}
    for at, (_, dtype, _) in enumerate(store.sites):
        capsule = store.column(at).__dlpack__()
        # DLTensor: data (8 bytes), device (8), ndim (4), then the code and the bits of the dtype.
        fields = cast(pointer(capsule, b"dltensor"), POINTER(c_uint8))
        assert fields[20] == codes[dtype]
        assert fields[21] == 8 * _core.dtype_size(dtype)


def test_tiers_follow_the_table():
    limits = [(row["tier"], [int(cell) for cell in list(row.values())[1:]])
              for row in decoder.table("Tiers")]  # fmt: skip
    assert [name for name, _ in limits] == ["2 MiB", "64 KiB", "4 KiB", "copy"]
    for region in (1, 3, 4095, 4096, 12_288, 65_535, 65_536, 131_072, 2 << 20, 6 << 20, 3 << 19):
        name, (_, full, short) = next(limit for limit in limits if region % limit[1][0] == 0)
        site = ["model.output", "U8", [region]]
        group = {"rows_per_shard": 1, "texts": False, "sites": [site, ["model.x", "U8", [1]]]}
        assert decoder.tier(group, site) == name
        entry = {"rows": 1, "prompts": 0, "ids": 0}
        for rows, alignment in ((1, full), (0, short)):
            laid = decoder.layout(group, entry | {"rows": rows})
            offset = next(tensor.offset for tensor in laid if tensor.name == "model.output")
            assert offset % alignment == 0


def test_regions_of_full_shards_start_where_the_table_says(kept):
    if not (kept / "tiers").exists():
        tiers(kept / "tiers")
    store = _core.Store.open(kept / "tiers")
    alignment = {row["tier"]: int(list(row.values())[2]) for row in decoder.table("Tiers")}
    short = {row["tier"]: int(list(row.values())[3]) for row in decoder.table("Tiers")}
    assert set(store.tiers()) == alignment.keys()
    assert [full for *_, full in store.shards] == [True, False]
    for (name, *_), limits in zip(store.shards, (alignment, short), strict=True):
        data = (kept / "tiers" / "shards" / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for (path, _, _), tier in zip(store.sites, store.tiers(), strict=True):
            assert (8 + length + header[path]["data_offsets"][0]) % limits[tier] == 0


def test_rows_per_shard_are_as_written():
    rng = random.Random(1)
    for _ in range(200):
        sites = [
            (f"model.h[{at}].output", rng.choice(make.DTYPES), (rng.randint(1, 5000),))
            for at in range(rng.randint(1, 4))
        ]
        limit = rng.randint(1, 1 << 31)
        listed = [[path, on_disk(dtype), list(shape)] for path, dtype, shape in sites]
        assert _core.rows_per_shard(sites, limit) == decoder.rows_per_shard(listed, limit)
    assert _core.rows_per_shard([("model.output", "uint8", (1,))], 1 << 40) == 1_048_576


def on_disk(dtype: str) -> str:
    rows = decoder.table("Element types")
    return next(row["name on disk"] for row in rows if row["torch name"] == dtype)


def test_checksums_are_the_ones_named():
    text = decoder.section("Checksums")
    check, low, high = re.findall(r"`([0-9a-f]{8}|[0-9a-f]{16})`", text)
    assert decoder.crc32c(b"123456789") == int(check, 16)
    assert decoder.xxh3(b"") == (int(low, 16), int(high, 16))
    assert _core.hash_bytes([b"rows"]) == f"{decoder.xxh3(b'rows')[1]:016x}" \
        f"{decoder.xxh3(b'rows')[0]:016x}"  # fmt: skip


@pytest.mark.parametrize(("sites", "length"), [(1, 4096), (30, 12_288), (10_000, 2_732_032)])
def test_the_header_has_the_length_that_its_sites_give(sites, length, scratch):
    every = [(f"model.layers[{at}].output", "bfloat16", (576,)) for at in range(sites)]
    feeder = Feeder(scratch / "acts", every)
    feeder.window([0])
    feeder.core.finish()
    (shard,) = (scratch / "acts" / "shards").iterdir()
    assert 8 + int.from_bytes(shard.read_bytes()[:8], "little") == length
    group = decoder.read_store(scratch / "acts").group
    assert decoder.header_bytes(group) == length
    for rows, prompts in ((0, 0), (group["rows_per_shard"], 3), (1, 10**15)):
        tensors = decoder.layout(group, {"rows": rows, "prompts": prompts, "ids": 10**17})
        assert len(decoder.header_text(tensors, length, 5)) <= length - 8


def test_links_of_the_document_lead_somewhere():
    text = decoder.DOCUMENT.read_text(encoding="utf-8")
    anchors = {re.sub(r"[^a-z0-9]+", "-", each.lower()).strip("-")
               for each in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}  # fmt: skip
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert (decoder.DOCUMENT.parent / file).exists(), target
        assert not anchor or anchor in anchors, target


# ── The example ──────────────────────────────────────────────────────────────────────────────────


def example() -> tuple[dict[str, Any], bytes]:
    manifest = decoder.read_manifest(decoder.block("Example manifest", "json").encode())
    return manifest, decoder.undump(decoder.block("Example shard", "text"))


def test_the_example_is_the_golden_store():
    manifest, shard = example()
    (name,) = [entry["name"] for entry in manifest["groups"][0]["shards"]]
    path = TINY / "shards" / f"{name}.safetensors"
    assert path.read_bytes() == shard
    text = decoder.section("Example shard")
    assert f"`shards/{path.name}`, {len(shard):,} bytes" in text
    file = re.search(r"`(manifests/\d+\.json)`", decoder.section("Example manifest"))
    assert file
    assert (TINY / file[1]).read_text() == decoder.block("Example manifest", "json")


def test_the_example_says_what_its_text_says():
    manifest, shard = example()
    (group,) = manifest["groups"]
    tensors = decoder.read_shard(group, group["shards"][0], shard)
    rows = tensors["model.h[0].output"].view("<f4").reshape(-1, 2).tolist()
    text = decoder.section("Example")
    assert rows == [[1.0, 1.5], [2.0, -2.5], [3.0, 0.0]]
    assert all(f"`{row}`" in text for row in rows)
    assert tensors["#prompt.ids"].tolist() == [5, 6, 7]
    assert tensors["#prompt.rows"].tolist() == [1, 2]


def test_the_bytes_of_the_example_are_as_listed():
    manifest, shard = example()
    (group,) = manifest["groups"]
    listed = decoder.table("Bytes of the example")
    assert [int(row["from"]) for row in listed[1:]] == [
        int(row["from"]) + int(row["bytes"]) for row in listed[:-1]
    ]
    length, header, *parts = listed
    assert int(length["value"]) == int.from_bytes(shard[:8], "little") == int(header["bytes"])
    text = shard[8 : 8 + int(header["bytes"])]
    assert f"JSON to byte {7 + len(text.rstrip())}" in header["what"]
    tensors = {tensor.name: tensor for tensor in decoder.layout(group, group["shards"][0])}
    assert [row["what"] for row in parts] == list(tensors)
    for row in parts:
        tensor = tensors[row["what"]]
        assert (int(row["from"]), int(row["bytes"])) == (tensor.offset, tensor.nbytes)
        data = shard[tensor.offset :][: tensor.nbytes]
        if row["value"] == "zeros":
            assert not any(data)
        elif row["what"] in ("#crc32c", "#xxh3"):
            width = 4 if row["what"] == "#crc32c" else 8
            shown = re.findall(r"[0-9a-f]{8,}", row["value"])
            assert shown == [
                f"{int.from_bytes(data[at : at + width], 'little'):0{2 * width}x}"
                for at in range(0, width * len(shown), width)
            ]
            assert len(shown) * width == tensor.nbytes or "and so on" in row["value"]
        else:
            code = {"F32": "f", "U32": "I", "U8": "B", "U64": "Q"}[tensor.dtype]
            values = struct.unpack(f"<{len(row['value'].split())}{code}", data)
            assert row["value"].split() == [str(value) for value in values]


# ── The prompt rule ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(30))
def test_prompts_lie_where_the_rules_say(seed, scratch):
    rng = random.Random(seed)
    limit = rng.choice([1, 2, 4, 8])
    sites = [("model.a.output", "uint8", (rng.choice([1, 7]),))]
    texts = rng.random() < 0.5
    windows = [
        [rng.choice([0, 0, 1, 2, 3, 5, 9]) for _ in range(rng.randint(1, 4))]
        for _ in range(rng.randint(1, 7))
    ]
    names = set()
    for commits, ends in ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.7, 0.4)):
        target = scratch / f"{commits}-{ends}"
        row = sites[0][2][0] + 9
        feeder = Feeder(target, sites, shard_bytes=limit * row, texts=texts)
        for lengths in windows:
            feeder.window(lengths)
            if rng.random() < commits:
                feeder.core.commit()
                check_rules(decoder.read_store(target), limit)
            if rng.random() < ends:  # a writer that continues: nothing shows in the end
                rng.choice([feeder.core.finish, feeder.core.commit])()
                feeder.core.close()
                check_rules(decoder.read_store(target), limit)
                feeder.reopen()
        feeder.core.finish()
        found = decoder.read_store(target)
        check_rules(found, limit)
        assert [prompt.length for prompt in found.prompts] == list(chain(*windows))
        names.add(tuple(entry["name"] for entry in found.group["shards"]))
        assert {path.stem for path in (target / "shards").iterdir()} >= set(max(names))
    assert len(names) == 1, "commits changed what is stored"


def check_rules(found: decoder.Store, limit: int) -> None:
    entries = found.group["shards"]
    full = sum(entry["rows"] == limit for entry in entries)
    if found.manifest["complete"]:
        assert len(entries) - full <= 1
    total = len(found.tokens)
    before = 0
    for prompt in found.prompts:
        by_count = before // limit
        if before == total:
            assert prompt.shard >= min(by_count, len(entries) - 1) or not prompt.rows
            if found.manifest["complete"]:
                assert prompt.shard == len(entries) - 1
        elif by_count < full:
            assert prompt.shard == by_count
        else:
            assert prompt.shard >= full
        assert prompt.start == before
        before += prompt.rows
    assert before == total
    assert [at for prompt in found.prompts for at in range(prompt.rows)] == found.positions


def test_prompts_are_in_the_piece_of_their_commit(kept):
    if not (kept / "border_pieces").exists():
        border_pieces(kept / "border_pieces")
    found = decoder.read_store(kept / "border_pieces")
    sizes = [(entry["rows"], entry["prompts"]) for entry in found.group["shards"]]
    assert sizes == [(4, 4), (2, 3), (0, 1)]
    before = decoder.read_store(kept / "border_pieces", version=found.manifest["version"] - 1)
    sizes = [(entry["rows"], entry["prompts"]) for entry in before.group["shards"]]
    assert sizes == [(4, 4), (2, 3)]
