"""The exception tree: as drawn, with stable kinds, and each class met in earnest."""

from __future__ import annotations

import builtins
import copy
import inspect
import pickle
import re

import pytest
import torch
from tests.stores import SITES, WIDTH, make

import lamina as lm
from lamina import _core, errors
from lamina.cli_capture import read_texts

SITE = SITES[0]
CLASSES = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, errors.LaminaError)
]
ROOTS = {errors.LaminaError, errors.StoreError}  # never raised themselves


def drawn() -> dict[str, tuple[str | None, str | None, str]]:
    """Return the tree in the docstring: name to parent, builtin parent and kind."""
    tree: dict[str, tuple[str | None, str | None, str]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([ │├└─]*)(\w+Error)\b(?: \((\w+)\))?(.*)$", line)
        if found is None:
            continue
        depth, name = len(found[1]), found[2]
        while above and above[-1][0] >= depth:
            above.pop()
        kind = re.search(r'"([a-z-]+)"', found[4])
        tree[name] = (above[-1][1] if above else None, found[3], kind[1] if kind else "lamina")
        above.append((depth, name))
    return tree


def test_the_tree_in_the_docstring_is_that_of_the_classes():
    actual = {}
    for each in CLASSES:
        parents = [base.__name__ for base in each.__bases__]
        own = [name for name in parents if hasattr(errors, name)]
        other = [name for name in parents if name not in own and name != "Exception"]
        assert all(hasattr(builtins, name) for name in other)
        actual[each.__name__] = (own[0] if own else None, other[0] if other else None, each.kind)
    assert drawn() == actual


def test_kinds_are_unique_and_all_names_are_public():
    assert len({each.kind for each in CLASSES}) == len(CLASSES)
    assert sorted(each.__name__ for each in CLASSES) == errors.__all__
    assert all(getattr(lm, name) is getattr(errors, name) for name in errors.__all__)


@pytest.mark.parametrize("each", CLASSES, ids=lambda each: each.__name__)
def test_the_text_is_the_message_and_survives_a_process_boundary(each):
    error = each("what went wrong")
    assert str(error) == "what went wrong"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (each, "what went wrong")


def test_facts_survive_a_process_boundary():
    identity = copy.copy(errors.IdentityError("differs", {"dtype": ("bf16", "f32")}))
    assert identity.fields == {"dtype": ("bf16", "f32")}
    disk = pickle.loads(pickle.dumps(errors.DiskError("no", 13, "/x")))
    assert (disk.errno, disk.filename, str(disk)) == (13, "/x", "no")


class Loud(torch.nn.Module):
    """A model whose activations are too large for float16."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding.from_pretrained(torch.full((8, 2), 1e6))

    def forward(self, input_ids, attention_mask=None):
        return self.embed(input_ids)


def damaged(directory):
    store = make(directory)
    path = directory / "shards" / store.shards[0][0]
    data = bytearray(path.read_bytes())
    data[data.index(b"{") + 3] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    return lm.open(directory)[SITE].tensor


def without_shard(directory):
    store = make(directory)
    (directory / "shards" / store.shards[0][0]).unlink()
    return lm.open(directory)[SITE].tensor


def newer(directory):
    make(directory)
    (directory / "FORMAT").write_text("lamina 2.0\n")
    lm.open(directory)


def foreign(directory):
    directory.mkdir()
    (directory / "thesis.tex").touch()
    lm.create(directory, sites={SITE: (1, "f32")})


def twice(directory):
    with lm.create(directory, sites={SITE: (1, "f32")}):
        lm.append(directory)


def unready(directory):
    writer = _core.Writer(str(directory))
    try:
        lm.open(directory)
    finally:
        writer.close()


def without_room(directory):
    before = _core.free_bytes
    _core.free_bytes = lambda _: 10
    try:
        lm.capture(Loud(), [[1, 2]], "model.embed.output", to=directory, progress=False)
    finally:
        _core.free_bytes = before


def under_a_file(directory):
    directory.touch()
    lm.create(directory / "acts", sites={SITE: (1, "f32")})


RAISED = {
    "PathError": lambda at: make(at)["model.h[1"],
    "SiteNotFoundError": lambda at: make(at)["model.nothing.output"],
    "SiteError": lambda at: lm.create(at, sites={"model.h[:].output": (1, "f32")}),
    "PositionError": lambda at: make(at)[f"{SITE}[3]"],
    "PromptError": lambda at: read_texts(str(at / "none.txt"), "text"),
    "InputError": lambda at: make(at).gather([], [0]),
    "DtypeError": lambda at: lm.create(at, sites={SITE: (1, "f31")}),
    "CastOverflowError": lambda at: lm.capture(
        Loud(), [[1]], "model.embed.output", to=at, dtype="f16", overflow="error", progress=False
    ),
    "IdentityError": lambda at: lm.append(make(at).directory, identity={"other": 1}),
    "ClosedError": lambda at: _core.Writer(str(at)).commit(),
    "StoreNotFoundError": lm.open,
    "StoreExistsError": lambda at: lm.create(make(at).directory, sites={SITE: (WIDTH, "f32")}),
    "ForeignDirectoryError": foreign,
    "StoreNotReadyError": unready,
    "StoreInUseError": twice,
    "FormatVersionError": newer,
    "VersionNotFoundError": lambda at: lm.open(make(at).directory, version=99),
    "CorruptError": damaged,
    "MissingShardError": without_shard,
    "DiskError": under_a_file,
    "DiskFullError": without_room,
}


def test_every_class_that_can_be_raised_is_raised_below():
    assert set(RAISED) == {each.__name__ for each in CLASSES if each not in ROOTS}


@pytest.mark.parametrize("name", RAISED)
def test_each_class_is_raised_from_python(tmp_path, name):
    with pytest.raises(errors.LaminaError) as caught:
        RAISED[name](tmp_path / "acts")
    assert type(caught.value).__name__ == name
    assert len(str(caught.value)) > 10
