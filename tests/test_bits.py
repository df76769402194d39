"""Damage of every kind: it is found, it is named, and what is whole stays readable."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tests import decoder
from tests.golden.make import Feeder

import lamina as lm
from lamina import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

GOLDEN = Path(__file__).parent / "golden" / "v1"
FILE = r"shard [0-9a-f]{32}\.safetensors"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty folder in memory where there is one: nothing here waits for a disk."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def prompts(scratch: Path) -> Path:
    """Five shards of four rows, prompts over borders, texts; see tests/golden/make.py."""
    return copied("prompts", scratch)


def copied(name: str, to: Path) -> Path:
    shutil.copytree(GOLDEN / name, to / name)
    for path in (to / name).rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    return to / name


class Flipper:
    """Flips bits of one file, and flips them back."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR)
        self.nbytes = os.fstat(self._file).st_size

    def close(self) -> None:
        os.close(self._file)

    @contextmanager
    def flipped(self, at: int, bit: int) -> Iterator[None]:
        byte = os.pread(self._file, 1, at)
        os.pwrite(self._file, bytes([byte[0] ^ 1 << bit]), at)
        try:
            yield
        finally:
            os.pwrite(self._file, byte, at)


@contextmanager
def flipper(path: Path) -> Iterator[Flipper]:
    flips = Flipper(path)
    try:
        yield flips
    finally:
        flips.close()


def shards(store: Path) -> list[Path]:
    """Return the shards in the order of the store."""
    return [store / "shards" / name for name, *_ in _core.Store.open(store).shards]


def entries(store: Path) -> tuple[dict, list[dict]]:
    group = decoder.read_store(store).group
    return group, group["shards"]


# ── Bits ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_bit_of_a_shard_is_guarded(scratch):
    store = copied("tiny", scratch)
    opened = _core.Store.open(store)
    (shard,) = shards(store)
    missed = []
    with flipper(shard) as flips:
        assert flips.nbytes == 4432
        for at in range(flips.nbytes):
            for bit in range(8):
                with flips.flipped(at, bit):
                    if not opened.verify(1):
                        missed.append((at, bit))
    assert not missed
    assert not opened.verify()


def test_a_bit_of_every_byte_of_every_shard_is_guarded_and_named(prompts):
    opened = _core.Store.open(prompts)
    group, listed = entries(prompts)
    for entry, (name, start, *_) in zip(listed, opened.shards, strict=True):
        tensors = decoder.layout(group, entry)
        tables = [tensor.name for tensor in tensors].index("#crc32c")
        header = decoder.header_bytes(group)
        where = [("header", at) for at in [*range(0, 1200, 5), *range(1200, header, 64)]]
        for index, tensor in enumerate(tensors):
            guarded = tensor.name if index < tables else "header"
            step = 64 if tensor.name.startswith("#pad") else 1
            span = range(tensor.offset, tensor.offset + tensor.nbytes)
            where += [(guarded, at) for at in [*span[::step], *span[-1:]]]
        with flipper(prompts / "shards" / name) as flips:
            for guarded, at in where:
                with flips.flipped(at, at % 8):
                    damage = opened.verify(1)
                assert [(each.shard, each.site) for each in damage] == [(name, guarded)], at
                assert damage[0].row_start == start
                assert damage[0].row_stop == start + entry["rows"]
    assert not opened.verify()


def test_every_bit_of_a_manifest_is_guarded_by_open(prompts):
    name = "manifests/00000000000000000002.json"
    with flipper(prompts / name) as flips:
        for at in range(flips.nbytes):
            for bit in range(8):
                with flips.flipped(at, bit), pytest.raises(lm.CorruptError) as caught:
                    _core.Store.open(prompts)
                message = str(caught.value)
                assert f"{name}` is damaged" in message
                assert "version 1 is there: open it with version=1" in message
    assert _core.Store.open(prompts).rows == 19


def test_the_version_before_opens_where_the_newest_is_damaged(prompts):
    with flipper(prompts / "manifests/00000000000000000002.json") as flips, flips.flipped(9, 0):
        assert lm.open(prompts, version=1).rows == 0
        with pytest.raises(lm.CorruptError, match=r"manifests/0+2\.json` is damaged: its checksum"):
            lm.open(prompts)


def test_every_bit_of_the_format_but_its_minor_version_is_guarded(scratch):
    store = copied("tiny", scratch)
    accepted = set()
    with flipper(store / "FORMAT") as flips:
        for at in range(flips.nbytes):
            for bit in range(8):
                with flips.flipped(at, bit):
                    try:
                        _core.Store.open(store)
                    except lm.FormatVersionError:
                        continue
                    accepted.add((store / "FORMAT").read_text())
    assert accepted == {f"lamina 1.{minor}\n" for minor in (1, 2, 4, 8)}


def test_headers_and_checksum_tables_are_checked_at_first_use(scratch):
    store = copied("tiny", scratch)
    (shard,) = shards(store)
    group, (entry,) = entries(store)
    header = decoder.header_bytes(group)
    tables = next(one for one in decoder.layout(group, entry) if one.name == "#crc32c").offset
    rows = np.arange(3)
    uses = [
        lambda opened: opened.column(0),
        lambda opened: opened.gather([0], rows),
        lambda opened: opened.read(0, 0, 1),
        lambda opened: opened.row_table(0, 1),
        lambda opened: opened.prompt_table(0, 1),
        lambda opened: opened.prompt_ids(0),
    ]
    with flipper(shard) as flips:
        for at in [*range(1000), *range(1000, header, 8), *range(tables, flips.nbytes)]:
            opened = _core.Store.open(store)
            with flips.flipped(at, at % 8):
                use = uses[at % len(uses)]
                with pytest.raises(lm.CorruptError, match=rf"{FILE}, header, rows 0\.\.3"):
                    use(opened)
            use(opened)  # the damage was not kept


def test_tables_of_rows_and_prompts_are_checked_at_first_use(prompts):
    group, listed = entries(prompts)
    every = np.arange(19)
    uses = {
        "#row.token": lambda opened: opened.row_table(0, 19),
        "#row.position": lambda opened: opened.row_table(0, 19),
        "#row.flags": lambda opened: opened.row_table(0, 19),
        "#prompt.rows": lambda opened: opened.prompts_of(every),
        "#prompt.length": lambda opened: opened.prompt_table(0, 12),
        "#prompt.ids": lambda opened: [opened.prompt_ids(at) for at in range(12)],
        "#prompt.text_length": lambda opened: [opened.prompt_text(at) for at in range(12)],
        "#prompt.text": lambda opened: [opened.prompt_text(at) for at in range(12)],
    }
    for shard, entry in zip(shards(prompts), listed, strict=True):
        with flipper(shard) as flips:
            for tensor in decoder.layout(group, entry):
                if tensor.name not in uses:
                    continue
                message = rf"damaged shard {shard.name}, {re.escape(tensor.name)}, rows"
                for at in range(tensor.offset, tensor.offset + tensor.nbytes):
                    opened = _core.Store.open(prompts)
                    with (
                        flips.flipped(at, at % 8),
                        pytest.raises(lm.CorruptError, match=message),
                    ):
                        uses[tensor.name](opened)


# ── What is loaded, and what stays readable ──────────────────────────────────────────────────────


def test_what_is_loaded_is_checked_and_views_are_what_the_disk_holds(prompts):
    site = "model.a.output"
    before = lm.open(prompts)[site].tensor.view(torch.int16).clone()  # NaN equals itself then
    group, listed = entries(prompts)
    offset = decoder.layout(group, listed[1])[0].offset
    with flipper(shards(prompts)[1]) as flips, flips.flipped(offset, 3):
        store = lm.open(prompts)
        with pytest.raises(lm.CorruptError, match=rf"{site}, rows 4\.\.8 of prompts 3\.\.6: block"):
            store.load(site)
        changed = (store[site].tensor.view(torch.int16) != before).any(dim=1)
        assert changed.nonzero().flatten().tolist() == [4]
        gathered = store.gather(site, [0, 3, 9])[:, 0].view(torch.int16)
        assert gathered.tolist() == before[[0, 3, 9]].tolist()


def test_what_is_undamaged_stays_readable(prompts, scratch):
    rows = [row for row in range(19) if not 8 <= row < 12]
    whole = lm.open(prompts)
    expected = {site: column.tensor[rows] for site, column in whole.items()}
    ids = whole.prompts[3].ids.tolist()
    group, listed = entries(prompts)
    damaged = shards(prompts)[2]
    tables = next(one for one in decoder.layout(group, listed[2]) if one.name == "#crc32c").offset
    sound = lm.open(copied("prompts", scratch / "sound"))
    with flipper(damaged) as flips, flips.flipped(tables, 0):
        store = lm.open(prompts)
        for site, values in expected.items():
            gathered = store.gather(site, rows)[:, 0]
            assert torch.equal(gathered.view(torch.int16), values.view(torch.int16))
            with pytest.raises(lm.CorruptError, match=damaged.name):
                store.gather(site, [8])
        assert store.prompts[3].ids.tolist() == ids
        for position in ("", "[-1]", "[-2:]"):
            target = f"model.a.output{position}"
            ((_, some),) = store.load(target, prompts=[3, 1, 9]).items()
            ((_, every),) = sound.load(target, prompts=[3, 1, 9]).items()
            assert torch.equal(some.view(torch.int16), every.view(torch.int16))
            with pytest.raises(lm.CorruptError, match=damaged.name):
                store.load(target, prompts=[3, 7])
        result = store.verify()
    assert [(each.row_start, each.row_stop) for each in result.damage] == [(8, 12)]
    assert str(result).startswith("damaged: 1 block of ")


def test_damage_names_the_rows_of_the_block_and_their_prompts(scratch):
    sites = [("model.a.output", "uint8", (65_536,)), ("model.b.output", "uint8", ())]
    feeder = Feeder(scratch / "acts", sites, shard_bytes=8 * 65_546)
    feeder.window([0, 3, 2, 0, 1])  # rows 0:3, 3:5, 5:6
    feeder.window([6, 0, 1, 2, 0])  # rows 6:12, 12:13, 13:15; the border of a shard is row 8
    feeder.core.finish()
    group, listed = entries(scratch / "acts")
    opened = _core.Store.open(scratch / "acts")
    expected = {  # block: rows, prompts; two rows a block
        (0, 0): ((0, 2), (1, 2)),
        (0, 1): ((2, 4), (1, 3)),
        (0, 2): ((4, 6), (2, 5)),
        (0, 3): ((6, 8), (5, 6)),
        (1, 0): ((8, 10), (5, 6)),
        (1, 2): ((12, 14), (7, 9)),
        (1, 3): ((14, 15), (8, 9)),
    }
    for (shard, block), (rows, prompts) in expected.items():
        path = shards(scratch / "acts")[shard]
        tensors = decoder.layout(group, listed[shard])
        offset = next(each.offset for each in tensors if each.name == "model.a.output")
        with flipper(path) as flips, flips.flipped(offset + block * 131_072 + 77, 5):
            (found,) = opened.verify()
            with pytest.raises(lm.CorruptError) as caught:
                opened.read(0, rows[0], rows[0] + 1)
        assert (found.shard, found.site) == (path.name, "model.a.output")
        assert (found.row_start, found.row_stop) == rows
        assert (found.prompt_start, found.prompt_stop) == prompts
        assert re.match(rf"block {block} has the checksum [0-9a-f]{{8}}, recorded", found.message)
        place = f"rows {rows[0]}..{rows[1]} of prompts {prompts[0]}..{prompts[1]}"
        assert f"damaged shard {path.name}, model.a.output, {place}: block" in str(caught.value)


def test_all_damage_is_listed_in_the_order_of_the_store(prompts):
    group, listed = entries(prompts)
    expected = []
    for shard, entry in zip(shards(prompts), listed, strict=True):
        for tensor in decoder.layout(group, entry)[:2]:
            if not tensor.name.startswith("#"):
                flips = Flipper(shard)
                byte = os.pread(flips._file, 1, tensor.offset)
                os.pwrite(flips._file, bytes([byte[0] ^ 1]), tensor.offset)
                flips.close()
                expected.append((shard.name, tensor.name))
    for threads in (1, 2, 7):
        damage = lm.open(prompts).verify(threads=threads).damage
        assert [(each.shard, each.site) for each in damage] == expected


# ── Whole files ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("change", [-1, -4096, 1, 4096])
def test_cut_and_extended_shards_are_found_at_first_use_and_by_verify(prompts, change):
    shard = shards(prompts)[2]
    size = shard.stat().st_size
    os.truncate(shard, size + change)
    store = lm.open(prompts)
    with pytest.raises(lm.CorruptError, match=f"it has {size + change} bytes, not {size}"):
        store["model.a.output"].tensor  # noqa: B018
    (found,) = store.verify().damage
    assert (found.shard, found.site, found.row_start, found.row_stop) == (
        shard.name,
        "whole file",
        8,
        12,
    )
    assert store.gather("model.b.output", [7, 12]).shape == (2, 1)


def test_an_empty_shard_is_damage(prompts):
    shards(prompts)[0].write_bytes(b"")
    (found,) = lm.open(prompts).verify().damage
    assert found.message.startswith("it has 0 bytes")


def test_a_missing_shard_is_named(prompts):
    shard = shards(prompts)[1]
    shard.unlink()
    store = lm.open(prompts)
    with pytest.raises(lm.MissingShardError, match=rf"missing shard {shard.name}.*rows 4\.\.8"):
        store["model.a.output"].tensor  # noqa: B018
    (found,) = store.verify().damage
    assert (found.shard, found.message) == (shard.name, "the file is not there")
    assert (found.prompt_start, found.prompt_stop) == (3, 6)


def test_shards_in_each_others_place_are_found(prompts):
    first, second = shards(prompts)[1:3]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    damage = lm.open(prompts).verify().damage
    assert [each.shard for each in damage] == [first.name, second.name]


def test_a_shard_of_another_store_in_ones_place_is_found(scratch):
    stores = []
    for number in (1.0, 2.0):
        directory = scratch / f"{number}"
        with lm.create(directory, {"model.output": (4, "float32")}) as writer:
            rows = np.full((3, 4), number, dtype=np.float32)
            writer.append({"model.output": rows}, tokens=[1, 2, 3])
        stores.append(directory)
    one, other = (shards(store)[0] for store in stores)
    assert one.stat().st_size == other.stat().st_size  # the same layout, other numbers
    shutil.copy(other, one)
    (found,) = lm.open(stores[0]).verify().damage
    assert (found.shard, found.site) == (one.name, "header")
    assert found.message == f"header and checksum tables have the name {other.stem}"
    with pytest.raises(lm.CorruptError, match=other.stem):
        lm.open(stores[0])["model.output"].tensor  # noqa: B018


def test_a_manifest_of_another_version_in_ones_place_is_found(prompts):
    first, second = sorted((prompts / "manifests").iterdir())
    shutil.copy(first, second)
    with pytest.raises(lm.CorruptError, match="it says that it is version 1"):
        lm.open(prompts)


@pytest.mark.parametrize("length", [0, 1, 33, 34, 100])
def test_a_cut_manifest_is_found(prompts, length):
    manifest = max((prompts / "manifests").iterdir())
    os.truncate(manifest, length)
    with pytest.raises(lm.CorruptError, match=r"is damaged: (it is cut off|its checksum)"):
        lm.open(prompts)


@pytest.mark.parametrize("folder", ["manifests", "shards"])
def test_links_in_place_of_files_are_not_followed(prompts, folder):
    target = max((prompts / folder).iterdir())
    target.rename(prompts / "elsewhere")
    target.symlink_to(prompts / "elsewhere")
    with pytest.raises(lm.DiskError, match=target.name):
        lm.open(prompts)["model.a.output"].tensor  # noqa: B018


HEADERS = {
    "another dtype": lambda header: header.replace(b'"F32"', b'"I32"'),
    "a huge length": lambda header: b"\xff" * 8 + header[8:],
    "overlaps": lambda header: header.replace(b"[24,36]", b"[00,36]"),
    "an overflow": lambda header: header.replace(b"[3,2]", b"[9223372036854775807,2]"),
    "deep JSON": lambda header: header[:8] + b"[" * 4088,
    "a name twice": lambda header: header.replace(b"#row.position", b'#row.token"  '),
    "a path for a name": lambda header: header.replace(b"model.h[0].output", b"/../../etc/passwd"),
    "no JSON": lambda header: header[:8] + bytes(4088),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_found_and_never_used(scratch, change):
    """Whoever makes one can compute its name; offsets come from the manifest all the same."""
    store = copied("tiny", scratch)
    (shard,) = shards(store)
    group, (entry,) = entries(store)
    data = shard.read_bytes()
    header = change(data[:4096])[:4096].ljust(4096)
    assert header != data[:4096]
    tables = next(one for one in decoder.layout(group, entry) if one.name == "#crc32c").offset
    name = decoder.digest(header + data[tables:])
    (store / "shards" / f"{name}.safetensors").write_bytes(header + data[4096:])
    newest = max((store / "manifests").iterdir())
    newest.write_bytes(decoder.seal(newest.read_text()[:-34].replace(entry["name"], name)))
    (found,) = lm.open(store).verify().damage
    assert found.message == "it is not the header that the manifest's numbers give"
    assert lm.open(store)["model.h[0].output"].tensor[1].tolist() == [2.0, -2.5]
