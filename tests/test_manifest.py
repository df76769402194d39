"""What a manifest must say, field by field of the tables of docs/format.md, and what it may add."""

from __future__ import annotations

import json
import resource
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import decoder

import lamina as lm
from lamina import _core

GOLDEN = Path(__file__).parent / "golden" / "v1"
MANIFEST = "manifests/00000000000000000002.json"
OPTIONAL = {"text_bytes", "counts"}
HEADINGS = {
    "Fields of a manifest": (),
    "Fields of a group": ("groups", 0),
    "Fields of a shard": ("groups", 0, "shards", 0),
}
FIELDS = [
    (heading, row["field"], row["type"]) for heading in HEADINGS for row in decoder.table(heading)
]
WRONG: dict[str, list[Any]] = {
    "integer": [-1, 1.5, "1", None, True, 2**64],
    "text": [1, None, ["a"]],
    "boolean": [0, "true", None],
    "list": [{}, "a", 1, None],
    "any JSON": [],
}


@pytest.fixture
def store(tmp_path):
    """A store whose manifest can be changed."""
    target = tmp_path / "acts"
    shutil.copytree(GOLDEN / "prompts", target)
    return target


def written(store: Path) -> dict[str, Any]:
    return decoder.read_manifest((store / MANIFEST).read_bytes())


def write(store: Path, manifest: dict[str, Any] | str) -> None:
    text = manifest if isinstance(manifest, str) else json.dumps(manifest, ensure_ascii=False)
    (store / MANIFEST).write_bytes(decoder.seal(text))


def at(manifest: Any, heading: str) -> dict[str, Any]:
    for key in HEADINGS[heading]:
        manifest = manifest[key]
    found: dict[str, Any] = manifest
    return found


def test_manifests_hold_the_fields_of_the_tables_in_their_order(store):
    manifest = written(store)
    for heading in HEADINGS:
        names = [field for where, field, _ in FIELDS if where == heading]
        found = list(at(manifest, heading))
        assert found == [name for name in names if name not in OPTIONAL or name in found]
    seen = set().union(*written(store)["groups"][0]["shards"])
    assert seen >= OPTIONAL


def test_writers_put_no_white_space_outside_what_was_given(store):
    text = (store / MANIFEST).read_text()[:-34]
    assert json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")) == text


@pytest.mark.parametrize(("heading", "field", "kind"), FIELDS)
def test_fields_that_are_missing_or_of_another_type_are_damage(store, heading, field, kind):
    for value in ["missing", *WRONG[kind]]:
        manifest = written(store)
        fields = at(manifest, heading)
        if value == "missing":
            fields.pop(field, None)
        else:
            fields[field] = value
        write(store, manifest)
        if value == "missing" and field in OPTIONAL:
            lm.open(store)
            continue
        with pytest.raises(lm.CorruptError, match=rf"`.*{MANIFEST}` is damaged.*version=1"):
            lm.open(store)
        assert lm.open(store, version=1).rows == 0


@pytest.mark.parametrize("heading", HEADINGS)
def test_fields_that_nobody_knows_yet_are_ignored(store, heading):
    manifest = written(store)
    at(manifest, heading)["later"] = {"deep": [1, {"x": None}]}
    write(store, manifest)
    assert lm.open(store).rows == 19
    assert lm.open(store).verify().intact


@pytest.mark.parametrize("heading", HEADINGS)
def test_fields_that_come_twice_are_refused(store, heading):
    manifest = written(store)
    field = next(field for where, field, _ in FIELDS if where == heading)
    value = at(manifest, heading)[field]
    at(manifest, heading)["again"] = value
    write(store, json.dumps(manifest).replace('"again"', json.dumps(field)))
    with pytest.raises(lm.CorruptError, match=f"duplicate field `{field}`"):
        lm.open(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(lamina=2), "it is of format 2, not 1"),
        (lambda m: m.update(version=3), "it says that it is version 3"),
        (lambda m: m["groups"].clear(), "expected a list of groups, the first of them dense"),
        (lambda m: m["groups"][0].update(rows_per_shard=3), "a power of two up to 1048576"),
        (lambda m: m["groups"][0].update(rows_per_shard=1 << 21), "a power of two up to 1048576"),
        (lambda m: m["groups"][0]["sites"][0].append("x"), "text is wrong"),
        (lambda m: m["groups"][0]["sites"][0].__setitem__(0, "#x"), "empty or reserved"),
        (lambda m: m["groups"][0]["sites"][0].__setitem__(0, ""), "empty or reserved"),
        (lambda m: m["groups"][0]["sites"][0].__setitem__(0, "__metadata__"), "reserved"),
        (lambda m: m["groups"][0]["sites"][0].__setitem__(0, "model.b.output"), "named twice"),
        (lambda m: m["groups"][0]["sites"][0].__setitem__(1, "F32X"), "unknown dtype `F32X`"),
        (lambda m: m["groups"][0]["sites"][0].__setitem__(2, [3, 0]), "has a zero"),
        (lambda m: m["groups"][0]["sites"][0].__setitem__(2, [1 << 40]), "over 1099511627776"),
        (lambda m: m["groups"][0]["shards"][0].update(name="../../x"), "a shard is called"),
        (lambda m: m["groups"][0]["shards"][0].update(name="A" * 32), "a shard is called"),
        (lambda m: m["groups"][0]["shards"][0].update(rows=5), "has 5 rows"),
        (lambda m: m["groups"][0]["shards"][0].update(rows=1), "short shards have more than 4"),
        (lambda m: m["groups"][0]["shards"][1].update(head=5), "has 4 rows, 5 head"),
        (lambda m: m["groups"][0]["shards"][0].update(head=1), "begins inside no prompt"),
        (lambda m: m["groups"][0]["shards"][0].update(counts=[[2, 1, 0, 0]]), "counts a site"),
        (lambda m: m["groups"][0]["shards"][0].update(prompts=1 << 63), "its sums overflow"),
    ],
)
def test_what_the_arithmetic_cannot_use_is_refused(store, change, message):
    manifest = written(store)
    change(manifest)
    write(store, manifest)
    with pytest.raises(lm.CorruptError, match=message):
        lm.open(store)


@pytest.mark.parametrize("field", ["prompts", "ids", "text_bytes"])
def test_sizes_that_the_files_do_not_bear_out_are_found_before_they_are_used(store, field):
    for size in (3, 1 << 40, (1 << 62) + 1):
        manifest = written(store)
        manifest["groups"][0]["shards"][0][field] = size
        write(store, manifest)
        with pytest.raises(lm.CorruptError):
            _core.Store.open(store).column(0)


def integers(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all integers of a JSON value."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return [found for key, value in items for found in integers(value, (*path, key))]
    return [path] if type(node) is int else []


EDGES = [0, 1, 2, 5, 2**20, 2**31, 2**40, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("number", EDGES)
def test_no_number_in_a_manifest_does_harm(store, number):
    """Whatever a number says: an error of ours, or numbers; and memory stays in bounds."""
    uses = [
        lambda opened: opened.verify(1),
        lambda opened: opened.column(1),
        lambda opened: opened.read(0, 0, min(opened.rows, 4)),
        lambda opened: opened.row_table(0, min(opened.rows, 19)),
        lambda opened: opened.prompt_table(0, min(opened.prompts, 12)),
        lambda opened: opened.prompt_ids(3),
        lambda opened: opened.prompt_text(3),
        lambda opened: opened.prompts_of(np.array([7])),
        lambda opened: opened.shards,
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    written_first = written(store)
    for path in integers(written_first):
        manifest = written(store)
        *way, last = path
        node = manifest
        for key in way:
            node = node[key]
        node[last] = number
        write(store, manifest)
        try:
            opened = _core.Store.open(store)
        except lm.LaminaError:
            pass
        else:
            for use in uses:
                with suppress(lm.LaminaError):
                    use(opened)
        write(store, written_first)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024, f"{grown} KiB for a store of 50"


@pytest.mark.parametrize("text", ["lamina 1.1", "lamina 1.0\nmore", "lamina 1.4294967295"])
def test_any_minor_version_is_accepted(store, text):
    (store / "FORMAT").write_text(text + "\n")
    assert lm.open(store).rows == 19


@pytest.mark.parametrize(
    "text", ["lamina 2.0", "lamina 0.9", "lamina 11.0", "lamina 1", "lamina 1.x", "lamina", ""]
)
def test_another_major_version_is_refused(store, text):
    (store / "FORMAT").write_text(text + "\n")
    with pytest.raises(lm.FormatVersionError, match=rf'format "{text}".* reads `lamina 1\.0`'):
        lm.open(store)


def test_names_of_the_directory_are_those_of_the_table(tmp_path):
    names = [row["name"].rstrip("/") for row in decoder.table("The directory")]
    with lm.create(tmp_path / "acts", {"model.output": (1, "f32")}) as writer:
        found = {path.name for path in (tmp_path / "acts").iterdir()}
        assert found == set(names) - {"spool"}
        assert (tmp_path / "acts" / "LOCK").read_bytes() == b""
        owner = (tmp_path / "acts" / "OWNER").read_text()
        writer.commit()
    assert owner.startswith("process ")
    assert " on host " in owner
    assert owner.endswith(" UTC\n")
    found = {path.name for path in (tmp_path / "acts").iterdir()}
    assert found == set(names) - {"spool", "OWNER"}
    assert (tmp_path / "acts" / "FORMAT").read_text() == f"{_core.FORMAT}\n"
