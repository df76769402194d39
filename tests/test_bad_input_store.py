"""What somebody may do to a store, or ask of it, and the message that follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.stores import SITES, WIDTH, make, numbers

import lamina as lm
from lamina import _core

SITE = SITES[0]


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "acts")


def shard_of(store: lm.Store) -> Path:
    return Path(store.directory) / "shards" / store.shards[0][0]


def change(path: Path, at: int, bits: int = 1) -> None:
    """Flip bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.chmod(0o644)
    path.write_bytes(data)


def manifests(store: lm.Store) -> list[Path]:
    return sorted((Path(store.directory) / "manifests").iterdir())


def test_no_store_is_said_and_nothing_is_made(tmp_path):
    with pytest.raises(lm.StoreNotFoundError, match=r"there is no lamina store at `.*/none`"):
        lm.open(tmp_path / "none")
    with pytest.raises(lm.StoreNotFoundError, match=r"create\(\.\.\.\) begins one"):
        lm.append(tmp_path / "none")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use", [lm.open, lm.append, lambda at: lm.create(at, {SITE: (1, "f32")})])
def test_a_directory_that_holds_something_else_is_left_alone(tmp_path, use):
    (tmp_path / "thesis.tex").write_text("dear reader")
    with pytest.raises(lm.ForeignDirectoryError, match=r"found thesis\.tex; nothing was touched"):
        use(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "acts").write_text("x")
    for use in (lm.open, lm.append, lambda at: lm.create(at, {SITE: (1, "f32")})):
        with pytest.raises(lm.DiskError, match=r"acts is a file; a store is a directory"):
            use(tmp_path / "acts")


def test_create_refuses_a_store_and_says_how_to_go_on(store):
    with pytest.raises(lm.StoreExistsError, match=r"lamina\.append.*rm -r .*acts"):
        lm.create(store.directory, sites={SITE: (1, "f32")})
    assert lm.open(store.directory).rows == 8


class Tiny(torch.nn.Module):
    """A model of one layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 2)

    def forward(self, input_ids, attention_mask=None):
        return self.embed(input_ids)


def test_append_to_a_capture_is_refused(tmp_path):
    lm.capture(Tiny(), [[1, 2]], "model.embed.output", to=tmp_path / "acts", progress=False)
    with pytest.raises(lm.InputError, match="made by a capture: run the same capture again"):
        lm.append(tmp_path / "acts")


@pytest.mark.parametrize("text", ["lamina 2.0\n", "lamina 10.3\n"])
def test_a_newer_format_is_refused(store, text):
    (Path(store.directory) / "FORMAT").write_text(text)
    for use in (lm.open, lm.append):
        with pytest.raises(lm.FormatVersionError, match=r"install a newer lamina"):
            use(store.directory)


def test_a_newer_minor_format_is_read(store):
    (Path(store.directory) / "FORMAT").write_text("lamina 1.7\n")
    assert lm.open(store.directory).rows == 8


def test_a_missing_shard_is_named_with_its_rows(store):
    path = shard_of(store)
    path.unlink()
    reopened = lm.open(store.directory)
    with pytest.raises(lm.MissingShardError, match=f"{path.name}.*rows 0..8 of prompts 0..3"):
        _ = reopened[SITE].tensor
    with pytest.raises(lm.MissingShardError, match=path.name):
        reopened.gather(SITE, [0])
    report = reopened.verify()
    assert not report.intact
    assert (report.damage[0].row_start, report.damage[0].row_stop) == (0, 8)


@pytest.mark.parametrize("size", [0, 7, 4096, -1])
def test_a_short_shard_is_an_error_at_its_first_use(store, size):
    path = shard_of(store)
    path.chmod(0o644)
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    reopened = lm.open(store.directory)
    with pytest.raises(lm.CorruptError, match=path.name):
        _ = reopened[SITE].tensor
    assert not reopened.verify().intact


def test_a_shard_of_another_store_is_an_error_at_its_first_use(store, tmp_path):
    values = numbers() + 1
    sites = dict.fromkeys(SITES, (WIDTH, "f32"))
    with lm.create(tmp_path / "other", sites=sites) as writer:
        columns = {site: values[at] for at, site in enumerate(SITES)}
        writer.append(columns, tokens=[1] * 8, lengths=[3, 1, 4])
    other = shard_of(lm.open(tmp_path / "other"))
    other.replace(shard_of(store))
    with pytest.raises(lm.CorruptError, match=shard_of(store).name):
        _ = lm.open(store.directory)[SITE].tensor


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
def test_something_else_in_place_of_a_shard_is_refused(store, tmp_path, kind):
    path = shard_of(store)
    path.rename(tmp_path / "moved")
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "moved")
    with pytest.raises(lm.StoreError, match=path.name):
        _ = lm.open(store.directory)[SITE].tensor


def test_damaged_rows_are_found_by_load_and_verify_and_named(store):
    path = shard_of(store)
    wanted = numbers()[1, 5].tobytes()  # row 5 of the second site, a token of prompt 2
    change(path, path.read_bytes().index(wanted))
    reopened = lm.open(store.directory)
    with pytest.raises(lm.CorruptError, match=rf"{path.name}, model\.layers\[1\]\.output"):
        reopened.load(f"{SITES[1]}[1]", prompts=[2])
    assert reopened.load(f"{SITES[2]}[1]", prompts=[2])  # the rest is readable
    (damage,) = reopened.verify().damage
    assert (damage.shard, damage.site) == (path.name, SITES[1])
    assert damage.row_start <= 5 < damage.row_stop
    assert damage.prompt_start <= 2 < damage.prompt_stop
    assert str(reopened.verify()).startswith("damaged: 1 block of ")
    assert f"{path.name}  {SITES[1]}  rows " in str(reopened.verify())


def test_a_flipped_byte_in_a_manifest_is_named_and_the_version_before_opens(tmp_path):
    rows = np.ones((2, 1), dtype=np.float32)
    with lm.create(tmp_path / "acts", sites={SITE: (1, "f32")}) as writer:
        writer.append({SITE: rows}, tokens=[1, 2])
        writer.commit()
        writer.append({SITE: rows}, tokens=[1, 2])
    store = lm.open(tmp_path / "acts")
    newest = manifests(store)[-1]
    change(newest, newest.stat().st_size // 2)
    with pytest.raises(lm.CorruptError, match=rf"{newest.name}.*version={store.version - 1}"):
        lm.open(store.directory)
    assert lm.open(store.directory, version=store.version - 1).rows == 4  # not yet complete
    with pytest.raises(lm.CorruptError, match=newest.name):
        lm.append(store.directory)


def test_every_byte_of_a_manifest_counts(store):
    newest = manifests(store)[-1]
    good = newest.read_bytes()
    for at in range(0, len(good), 37):
        change(newest, at, 1 << (at % 7))
        with pytest.raises(lm.StoreError, match="0"):
            lm.open(store.directory)
        newest.write_bytes(good)
    assert lm.open(store.directory).rows == 8


def test_a_second_writer_is_told_who_holds_the_store(tmp_path):
    with lm.create(tmp_path / "acts", sites={SITE: (1, "f32")}) as writer:
        writer.append({SITE: np.ones((1, 1), dtype=np.float32)}, tokens=[1])
        with pytest.raises(lm.StoreInUseError, match=f"in use by process {os.getpid()} on host"):
            lm.append(tmp_path / "acts")
        code = f"import lamina as lm; lm.append({str(tmp_path / 'acts')!r})"
        other = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert f"StoreInUseError: the store at `{tmp_path / 'acts'}` is in use by process" in (
            other.stderr
        )
    lm.append(tmp_path / "acts").close()  # it is free again


@pytest.fixture
def unprivileged():
    """A directory that everybody may enter, and nobody's rights in the test."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_directory_without_write_permission_is_an_error_with_its_path(unprivileged):
    if os.geteuid() != 65534:
        unprivileged.chmod(0o555)
    with pytest.raises(lm.DiskError, match=rf"{unprivileged}/acts.*Permission denied") as caught:
        lm.create(unprivileged / "acts", sites={SITE: (1, "f32")})
    assert caught.value.errno == 13
    assert not (unprivileged / "acts").exists()


def test_a_store_without_read_permission_is_an_error_with_its_path(tmp_path):
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    path = manifests(make(folder / "acts"))[-1]
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(lm.DiskError, match="Permission denied") as caught:
            lm.open(folder / "acts")
    finally:
        if root:
            os.seteuid(0)
    assert caught.value.errno == 13


def test_reading_a_store_writes_nothing(store):
    def listing():
        return sorted(
            (str(path), path.stat().st_mtime_ns) for path in Path(store.directory).rglob("*")
        )

    before = listing()
    reopened = lm.open(store.directory)
    reopened[SITE].tensor.sum()
    reopened.gather(SITE, [0, 1])
    reopened.load(f"{SITE}[-1]")
    reopened.verify()
    repr(reopened)
    assert listing() == before


def test_nan_and_infinity_are_kept_counted_and_shown(tmp_path):
    rows = torch.zeros(3, 4)
    rows[0, 1] = rows[2, 2] = float("nan")
    rows[1, 0] = float("inf")
    sites = {"model.a.output": (4, "f32"), "model.b.output": (4, "bf16")}
    with lm.create(tmp_path / "acts", sites=sites) as writer:
        writer.append({"model.a.output": rows, "model.b.output": rows.bfloat16()}, tokens=range(3))
        writer.append(
            {"model.a.output": -rows, "model.b.output": rows.bfloat16() * 0}, tokens=[1] * 3
        )
    store = lm.open(tmp_path / "acts")
    assert store["model.a.output"].tensor[:3].isnan().sum() == 2
    found = {site["path"]: (site["nan"], site["infinite"]) for site in store.info()["sites"]}
    assert found == {"model.a.output": (4, 2), "model.b.output": (5, 1)}
    text = repr(store)
    assert "nan       9 values in model.a.output and model.b.output" in text
    assert "infinite  3 values in" in text


FULL = """
import errno, os, sys, numpy as np, lamina as lm
rows = np.random.default_rng(0).random((1000, 64), dtype=np.float32)
writer = lm.create(sys.argv[1] + "/acts", sites={"model.a.output": (64, "f32")})
writer.append({"model.a.output": rows}, tokens=range(1000))
writer.commit()
try:
    for _ in range(100):
        writer.append({"model.a.output": rows}, tokens=range(1000))
        writer.commit()
except lm.DiskFullError as error:
    assert error.errno == errno.ENOSPC
    print(error)
writer.abandon()
store = lm.open(sys.argv[1] + "/acts")
assert store.rows >= 1000 and store.verify().intact
print("intact", store.rows % 1000)
"""


def test_a_full_disk_is_an_error_and_what_was_committed_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "fill.py").write_text(FULL)
    mount = f"mount -t tmpfs -o size=4m tmpfs {tmp_path}/disk"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    try:
        able = subprocess.run([*command, mount], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs `unshare` to mount a small disk")
    if able.returncode:
        pytest.skip(f"needs to mount a small disk: {able.stderr.strip()}")
    script = f"{mount} && {sys.executable} {tmp_path}/fill.py {tmp_path}/disk"
    done = subprocess.run([*command, script], capture_output=True, text=True, check=False)
    assert "no room left on the disk" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "intact 0"


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        (10**6).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"{}",
        (400_000).to_bytes(8, "little") + b"[" * 400_000,
        json.dumps({"../../x": {"dtype": "F32", "shape": [2**62, 9], "data_offsets": [0, 1]}})
        .encode()
        .join([(97).to_bytes(8, "little"), b" " * 20]),
    ],
    ids=["huge", "beyond the file", "empty", "deep", "overflow"],
)
def test_a_hostile_header_is_an_error(store, header):
    path = shard_of(store)
    size = path.stat().st_size
    path.chmod(0o644)
    path.write_bytes((header + b"\0" * size)[: max(size, len(header))])
    with pytest.raises(lm.CorruptError, match=path.name):
        _ = lm.open(store.directory)[SITE].tensor


def test_a_store_begun_by_a_killed_process_says_that_nobody_writes_it(
    tmp_path,
):
    script = (
        "import os, signal, sys; from lamina import _core\n"
        "writer = _core.Writer(sys.argv[1])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "acts")], check=False)
    assert (tmp_path / "acts" / "OWNER").exists()
    with pytest.raises(lm.StoreNotReadyError, match="nobody is writing it, run the capture again"):
        lm.open(tmp_path / "acts")
    writer = _core.Writer(str(tmp_path / "acts"))
    with pytest.raises(lm.StoreNotReadyError, match=r"process \d+ on host .* is writing it"):
        lm.open(tmp_path / "acts")
    writer.close()


def test_shards_that_lost_their_manifests_are_not_removed_by_a_new_store(tmp_path):
    directory = tmp_path / "acts"
    make(directory)
    shards = sorted((directory / "shards").iterdir())
    for manifest in (directory / "manifests").iterdir():
        manifest.unlink()
    with pytest.raises(lm.ForeignDirectoryError, match=r"found shards/[0-9a-f]{32}\.safetensors"):
        lm.create(directory, sites=dict.fromkeys(SITES, (WIDTH, "float32")))
    with pytest.raises(lm.ForeignDirectoryError, match="nothing was touched"):
        lm.open(directory)
    assert sorted((directory / "shards").iterdir()) == shards


def test_a_store_that_a_later_minor_version_wrote_is_read_but_not_written(tmp_path):
    directory = tmp_path / "acts"
    make(directory)
    (directory / "FORMAT").write_text("lamina 1.7\n")
    assert lm.open(directory).rows > 0
    with pytest.raises(lm.FormatVersionError, match=r"has format .*1\.7.*install a newer lamina"):
        lm.append(directory)
