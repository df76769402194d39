"""What a writer leaves in a store's directory, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tests import decoder
from tests.golden.make import Feeder

import lamina as lm
from lamina import _core

SITES = [("model.a.output", "uint8", (3,))]


@pytest.fixture
def target():
    """Where a store can be made, in memory where there is one."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder) / "acts"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def kept(target: Path) -> set[str]:
    """Return the shards that the two newest manifests name."""
    newest = max(int(name[:20]) for name in names(target / "manifests"))
    stores = [decoder.read_store(target, version) for version in (newest - 1, newest)]
    return {f"{entry['name']}.safetensors" for each in stores for entry in each.group["shards"]}


def test_the_two_newest_versions_are_kept_and_only_their_shards(target):
    feeder = Feeder(target, SITES, shard_bytes=4 * 12)
    for version in range(2, 12):
        feeder.window([1, 2])
        feeder.core.commit()
        assert names(target / "manifests") == {f"{version - 1:020}.json", f"{version:020}.json"}
        shards = {name for name in names(target / "shards") if not name.endswith(".part")}
        assert shards == kept(target)
    feeder.core.finish()
    assert names(target / "shards") == kept(target)
    assert names(target) == {"FORMAT", "LOCK", "manifests", "shards"}


def test_version_one_comes_before_any_row_and_names_no_shard(target):
    feeder = Feeder(target, SITES)
    found = decoder.read_store(target)
    assert (found.manifest["version"], found.manifest["complete"]) == (1, False)
    assert not found.group["shards"]
    feeder.core.close()
    assert lm.open(target).rows == 0


def test_every_version_has_the_same_store_id_and_every_store_its_own(target):
    ids = set()
    for at in range(3):
        feeder = Feeder(target / str(at), SITES)
        feeder.window([2])
        feeder.core.finish()
        found = {decoder.read_store(target / str(at), version).manifest["store"]
                 for version in (1, 2)}  # fmt: skip
        assert len(found) == 1
        ids |= found
    assert len(ids) == 3
    assert all(len(each) == 32 and set(each) <= set("0123456789abcdef") for each in ids)


def test_parts_and_shards_that_nobody_names_go_and_foreign_names_stay(target):
    feeder = Feeder(target, SITES)
    feeder.window([2])
    feeder.core.commit()
    feeder.core.close()
    stray = f"{'0' * 32}.safetensors"
    for name in (stray, "filling.part", "notes.txt", "model.safetensors"):
        (target / "shards" / name).write_bytes(b"x")
    (target / "README").write_text("mine")
    feeder.reopen()
    feeder.window([1])
    feeder.core.finish()
    assert names(target / "shards") == kept(target) | {"notes.txt", "model.safetensors"}
    assert (target / "README").read_text() == "mine"
    assert lm.open(target).verify().intact


@pytest.mark.parametrize("damage", [None, 0, 4100, -1])
def test_a_shard_whose_name_exists_is_used_if_intact_and_replaced_if_not(target, damage):
    def fill(directory: Path) -> Feeder:
        feeder = Feeder(directory, SITES)
        feeder.window([2, 3])
        return feeder

    fill(target / "one").core.finish()
    (shard,) = (target / "one" / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    if damage is not None:
        data[damage] ^= 1
    second = fill(target / "two")
    there = target / "two" / "shards" / shard.name
    there.write_bytes(data)
    inode = there.stat().st_ino
    second.core.finish()
    assert there.read_bytes() == shard.read_bytes()
    assert (there.stat().st_ino == inode) == (damage is None)
    assert lm.open(target / "two").verify().intact


def test_the_same_numbers_give_the_same_files_whatever_was_recorded(target):
    found = []
    for at, about in enumerate(("{}", '{"recorded":{"host":"here"}}')):
        feeder = Feeder(target / str(at), SITES, about=about, identity=f'{{"run":{at}}}')
        feeder.window([4, 1])
        feeder.core.finish()
        (shard,) = (target / str(at) / "shards").iterdir()
        found.append((shard.name, shard.read_bytes()))
    assert found[0] == found[1]


def test_what_is_in_the_making_is_no_store_yet(target):
    target.mkdir()
    (target / "shards").mkdir()
    (target / "shards" / "filling.part").write_bytes(b"")
    assert _core.probe(target) == "unready"
    with pytest.raises(lm.StoreNotReadyError):
        lm.open(target)
    feeder = Feeder(target, SITES)
    feeder.core.finish()
    assert lm.open(target).complete


def test_a_finished_store_keeps_no_piece_that_its_last_shard_replaced(target):
    feeder = Feeder(target, SITES, shard_bytes=64 * 12)
    for _ in range(3):
        feeder.window([1, 2])
        feeder.core.commit()
    assert len(names(target / "shards")) > 3
    feeder.core.finish()
    newest = max(int(name[:20]) for name in names(target / "manifests"))
    (entry,) = decoder.read_store(target, newest).group["shards"]
    assert names(target / "shards") == {f"{entry['name']}.safetensors"}
    assert lm.open(target).complete
    assert not lm.open(target, version=newest - 1).complete
