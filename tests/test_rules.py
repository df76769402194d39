"""Rules of the format whose breach nobody would notice: each is broken on purpose here."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from tests import decoder
from tests.golden.make import Feeder

import lamina as lm
from lamina import _core

SITES = [("model.a.output", "uint8", (5,)), ("model.b.output", "float16", ())]
# The generator of CRC32C as it lies in bytes: adding it to data does not change their checksum.
SAME_CRC = (1 | 0x82F63B78 << 1).to_bytes(5, "little")


@pytest.fixture
def target():
    """Where a store can be made, in memory where there is one."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder) / "acts"


def change(path: Path, at: int, bits: bytes) -> None:
    """Flip bits of a file in place."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        data = file.read(len(bits))
        file.seek(at)
        file.write(bytes(one ^ other for one, other in zip(data, bits, strict=True)))


def shard(target: Path, index: int) -> Path:
    return target / "shards" / _core.Store.open(target).shards[index][0]


def offset(target: Path, index: int, name: str) -> int:
    group = decoder.read_store(target).group
    tensors = decoder.layout(group, group["shards"][index])
    return next(tensor.offset for tensor in tensors if tensor.name == name)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def resealed(target: Path, index: int, name: str, values: list[int]) -> None:
    """Give a tensor of a shard other values, and all checksums and names that go with them."""
    group = decoder.read_store(target).group
    entry = group["shards"][index]
    path = target / "shards" / f"{entry['name']}.safetensors"
    data, tensors = bytearray(path.read_bytes()), decoder.layout(group, entry)
    where = {tensor.name: slice(tensor.offset, tensor.offset + tensor.nbytes) for tensor in tensors}
    data[where[name]] = np.array(values, dtype="<u8").tobytes()
    crcs, hashes = [], []
    for tensor in tensors[: list(where).index("#crc32c")]:
        part = bytes(data[where[tensor.name]])
        crcs += [decoder.crc32c(part[at : at + tensor.block])
                 for at in range(0, len(part), tensor.block)]  # fmt: skip
        hashes += decoder.xxh3(part)
    data[where["#crc32c"]] = np.array(crcs, dtype="<u4").tobytes()
    data[where["#xxh3"]] = np.array(hashes, dtype="<u8").tobytes()
    named = data[: decoder.header_bytes(group)] + data[where["#crc32c"].start :]
    digest = decoder.digest(bytes(named))
    (target / "shards" / f"{digest}.safetensors").write_bytes(data)
    newest = max((target / "manifests").iterdir())
    text = newest.read_text()[:-34].replace(entry["name"], digest)
    newest.write_bytes(decoder.seal(text))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("#prompt.rows", [1, 1], "its prompts do not cover the 3 rows of the shard"),
        ("#prompt.rows", [2**63, 2**63], "its prompts do not cover the 3 rows of the shard"),
        ("#prompt.length", [1, 1], "its sum is not the 3 ids of the shard"),
        ("#prompt.length", [2**64 - 1, 4], "its sum is not the 3 ids of the shard"),
        ("#prompt.text_length", [0, 1], "its sum is not the 5 bytes of text of the shard"),
    ],
)
def test_tables_whose_sums_do_not_agree_are_found_although_all_checksums_do(
    target, name, values, message
):
    with lm.create(target, {"model.output": (2, "int8")}, texts=True) as writer:
        rows = np.zeros((3, 2), np.int8)
        writer.append({"model.output": rows}, tokens=[5, 6, 7], lengths=[1, 2], texts=["a", "b ch"])
    assert lm.open(target).verify().intact
    resealed(target, 0, name, values)
    (found,) = lm.open(target).verify().damage
    assert (found.site, found.message) == (name, message)
    opened = _core.Store.open(target)
    for use in (opened.prompt_ids, opened.prompt_text):
        with suppress(lm.CorruptError):
            use(1)
    assert np.asarray(opened.column(0)).tolist() == rows.tolist()


def test_contents_with_the_same_crcs_have_different_names(target):
    made = []
    for at in range(2):
        rows = np.arange(10, dtype=np.uint8).reshape(2, 5)
        if at:
            rows[0] ^= np.frombuffer(SAME_CRC, np.uint8)
        with lm.create(target / str(at), {"model.output": (5, "uint8")}) as writer:
            writer.append({"model.output": rows}, tokens=[1, 2])
        group = decoder.read_store(target / str(at)).group
        (entry,) = group["shards"]
        data = shard(target / str(at), 0).read_bytes()
        made.append((entry["name"], decoder.read_shard(group, entry, data)["#crc32c"].tolist()))
    assert made[0][1] == made[1][1]
    assert made[0][0] != made[1][0]


def test_damage_that_no_crc_shows_is_found(target):
    feeder = Feeder(target, SITES)
    feeder.window([4])
    feeder.core.finish()
    change(shard(target, 0), offset(target, 0, "model.a.output") + 5, SAME_CRC)
    (found,) = lm.open(target).verify().damage
    assert (found.site, found.row_start, found.row_stop) == ("model.a.output", 0, 4)
    assert found.message == "its XXH3-128 differs although every block's CRC32C agrees"


@pytest.mark.parametrize("name", ["model.a.output", "#row.token", "#prompt.ids", "#crc32c"])
def test_damage_in_a_piece_is_never_written_again(target, name):
    feeder = Feeder(target, SITES)
    feeder.window([3])
    feeder.core.commit()
    feeder.window([2])
    feeder.core.commit()
    feeder.core.close()
    piece = shard(target, 1)
    change(piece, offset(target, 1, name), b"\x10")
    before = names(target / "shards"), names(target / "manifests")
    with pytest.raises(lm.CorruptError, match=rf"damaged shard {piece.name}, .* rows 3\.\.5"):
        feeder.reopen()
    assert (names(target / "shards"), names(target / "manifests")) == before
    assert [each.shard for each in lm.open(target).verify().damage] == [piece.name]


@pytest.mark.parametrize("step", ["commit", "finish"])
def test_bytes_that_change_under_the_writer_end_it(target, step):
    feeder = Feeder(target, SITES)
    feeder.window([3])
    feeder.core.commit()
    feeder.window([2])
    group = decoder.read_store(target).group
    size = {"rows": group["rows_per_shard"], "prompts": 0, "ids": 0}
    at = next(each for each in decoder.layout(group, size) if each.name == "model.a.output").offset
    change(target / "shards" / "filling.part", at + 3 * 5 + 1, b"\x01")
    damage = r"damaged shard filling\.part, model\.a\.output, rows 0\.\.5 .*memory is faulty"
    with pytest.raises(lm.CorruptError, match=damage):
        getattr(feeder.core, step)()
    with pytest.raises(lm.ClosedError):
        feeder.window([1])
    feeder.core.close()
    store = lm.open(target)
    assert (store.rows, store.complete) == (3, False)
    assert store.verify().intact


def test_a_store_made_anew_under_a_reader_is_not_taken_for_the_old_one(target):
    feeder = Feeder(target, SITES)
    feeder.window([3])
    feeder.core.finish()
    reader = lm.open(target)
    shutil.rmtree(target)
    with lm.create(target, {site: (shape, kind) for site, kind, shape in SITES}) as writer:
        for _ in range(3):
            columns = {"model.a.output": np.ones((3, 5), np.uint8)}
            columns["model.b.output"] = np.ones(3, np.float16)
            writer.append(columns, tokens=[1, 2, 3])
            writer.commit()
    assert not reader.refresh()
    with pytest.raises(lm.MissingShardError, match=r"rows 0\.\.3"):
        reader.gather("model.a.output", [0])


def test_a_reader_keeps_its_rows_when_its_pieces_are_replaced(target):
    feeder = Feeder(target, SITES, shard_bytes=8 * 16)
    for _ in range(2):
        feeder.window([3])
        feeder.core.commit()
    reader = lm.open(target)
    pieces = {name for name, *_ in reader.shards}
    feeder.window([1, 9])
    feeder.core.commit()
    feeder.window([2])
    feeder.core.finish()
    assert not pieces & names(target / "shards")
    assert reader.rows == 6
    column = reader["model.a.output"]
    expected = decoder.read_store(target).columns["model.a.output"][:30]
    assert column.tensor.numpy().tobytes() == expected
    assert reader.gather("model.a.output", slice(None)).numpy().tobytes() == expected
    assert reader.verify().intact
    with pytest.raises(lm.PositionError):
        reader.gather("model.a.output", [6])


def test_counts_of_a_window_that_is_done_again_are_not_doubled(target):
    sites = {"model.output": (2, "float32")}
    rows = np.array([[np.nan, 1], [np.inf, -np.inf]], dtype=np.float32)
    writer = lm.create(target, sites)
    writer.append({"model.output": rows}, tokens=[1, 2])
    writer.commit()
    writer.append({"model.output": rows}, tokens=[1, 2])
    writer.abandon()
    with lm.append(target) as writer:
        writer.append({"model.output": rows}, tokens=[1, 2])
    assert _core.Store.open(target).counts() == [(2, 4, 0)]


def test_a_version_that_somebody_else_published_ends_the_writer(target):
    feeder = Feeder(target, SITES)
    feeder.window([3])
    feeder.core.commit()
    feeder.window([1])
    other = target / "manifests" / f"{3:020}.json"
    shutil.copy(target / "manifests" / f"{2:020}.json", other)
    before = names(target / "manifests")
    with pytest.raises(lm.StoreError, match="expected version 2, found 3; nothing was removed"):
        feeder.core.commit()
    assert names(target / "manifests") == before
    assert names(target / "shards") >= {name for name, *_ in lm.open(target, version=2).shards}
    feeder.core.close()


def test_a_lock_that_was_replaced_protects_nothing_and_ends_the_writer(target):
    feeder = Feeder(target, SITES)
    feeder.window([3])
    (target / "LOCK").rename(target / "LOCK.old")
    (target / "LOCK").touch()
    with pytest.raises(lm.DiskError, match="it was replaced by another file"):
        feeder.core.commit()
    feeder.core.close()
    assert lm.open(target).rows == 0
