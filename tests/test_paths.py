"""Paths: the tables of `docs/paths.md` line by line, and what they cannot show."""

import pickle
import re
from pathlib import Path as File

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina._core import ModuleTree, Path, SiteIndex
from lamina.errors import PathError, SiteNotFoundError

ROOT = File(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "paths.md").read_text(encoding="utf-8")


def table(title: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without its two head lines."""
    section = DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell[1:-1] for cell in line[1:-1].split("|")] for line in lines[2:]]


def block(language: str) -> str:
    """Return the one fenced block of a language."""
    [text] = re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, flags=re.DOTALL | re.MULTILINE)
    return text


def code(cell: str) -> str:
    """Return what stands between a cell's backticks."""
    assert cell[:1] == cell[-1:] == "`", cell
    return cell[1:-1]


ACCEPTED = table("Accepted")
REFUSED = table("Refused")
EXPANDED = table("Patterns against a model")
FOUND = table("Paths against a store")
MODULES = ["", *block("modules").split()]
SITES = block("sites").split()


def first(row: list[str]) -> str:
    return code(row[0])


def test_the_document_has_its_tables():
    assert min(map(len, (ACCEPTED, REFUSED, EXPANDED, FOUND))) > 10


def test_the_documents_grammar_is_the_parsers():
    source = (ROOT / "rust" / "core" / "src" / "path.rs").read_text(encoding="utf-8")
    [grammar] = re.findall(r"^//! ```text\n(.*?)^//! ```$", source, flags=re.DOTALL | re.MULTILINE)
    assert grammar.replace("//! ", "") == block("text")


@pytest.mark.parametrize("row", ACCEPTED, ids=first)
def test_accepted_text_has_this_canonical_text_and_these_parts(row):
    text, canonical, module, port, call, elements, grad, position = row
    path = Path(code(text))
    assert path.text == str(path) == code(canonical)
    assert Path(path.text) == path
    assert path.port == code(port)
    assert repr(path.call) == code(call)
    assert repr(path.elements) == code(elements)
    assert repr(path.grad) == code(grad)
    assert repr(path.position) == code(position)
    if module == "-":
        assert not path.is_concrete
        with pytest.raises(PathError, match="is a pattern, not one module: expand it"):
            _ = path.module
    else:
        assert repr(path.module) == code(module)
        assert path.is_concrete == isinstance(path.call, int)


@pytest.mark.parametrize("row", REFUSED, ids=first)
def test_refused_text_gives_the_byte_what_was_expected_and_found(row):
    text = code(row[0])
    with pytest.raises(PathError) as caught:
        Path(text)
    assert str(caught.value) == f"invalid path `{text}` {row[1]}"
    assert caught.value.kind == "path"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("row", EXPANDED, ids=first)
def test_pattern_expands_against_the_model(row):
    path, expected = Path(code(row[0])), row[1]
    tree = ModuleTree(MODULES)
    if expected.startswith("error: "):
        with pytest.raises(SiteNotFoundError) as caught:
            tree.expand(path)
        assert str(caught.value) == expected.removeprefix("error: ")
    else:
        assert [f"`{found}`" for found in tree.expand(path)] == expected.split(" ")


@pytest.mark.parametrize("row", FOUND, ids=first)
def test_path_finds_recorded_sites(row):
    text, expected = code(row[0]), row[1]
    index = SiteIndex(SITES, ModuleTree(MODULES).lengths([Path(site) for site in SITES]))
    if expected.startswith("error: "):
        with pytest.raises(SiteNotFoundError) as caught:
            index.find(text)
        assert str(caught.value) == expected.removeprefix("error: ")
    else:
        assert [repr(found) for found in index.find(text)] == code(expected).split("` `")


def test_steps_are_names_indices_and_what_selects_several():
    path = Path("model.transformer.h[1:3].experts[0,7].mlp.output")
    assert path.steps == ("transformer", "h", slice(1, 3), "experts", [0, 7], "mlp")


def test_equal_paths_hash_equal_and_are_not_texts():
    one, other = Path("model.h[2].output"), Path("model.h.2.output@0")
    assert one == other
    assert hash(one) == hash(other)
    assert one != Path("model.h[3].output")
    assert one != "model.h[2].output"
    assert {one: "found"}[other] == "found"


def test_paths_sort_by_structure():
    sites = ["model.h[10].output", "model.h[2].output", "model.ln.output", "model.h[2].input"]
    assert [str(path) for path in sorted(map(Path, sites))] == [
        "model.h[2].input",
        "model.h[2].output",
        "model.h[10].output",
        "model.ln.output",
    ]
    positions = [Path(f"model.output[{index}]") for index in (3, 0, -1, -4)]
    assert [path.elements[0] for path in sorted(positions)] == [-4, -1, 0, 3]


def test_a_path_prints_as_its_call_and_survives_pickling():
    path = Path("model.it's.output[-4:]")
    assert repr(path) == """Path("model.it's.output[-4:]")"""
    assert eval(repr(path)) == path
    assert pickle.loads(pickle.dumps(path)) == path


def test_split_tells_elements_from_the_position():
    path = Path("model.attn.output[0][-1]")
    assert path.split(1) == (Path("model.attn.output[0]"), -1)
    assert Path("model.attn.output[0]").split(1) == (Path("model.attn.output[0]"), None)
    assert Path("model.output[-4:]").split(0) == (Path("model.output"), slice(-4, None))
    assert Path("model.output[0,-1]").split(0) == (Path("model.output"), [0, -1])
    with pytest.raises(PathError, match=r"names 0 of the 1 elements that lead to a tensor"):
        Path("model.attn.output").split(1)
    with pytest.raises(PathError, match=r"has `\[0\]\[-1\]` after the 0 elements of its port"):
        path.split(0)


@pytest.mark.parametrize(
    ("position", "text"),
    [
        (None, "model.output"),
        (-1, "model.output[-1]"),
        (slice(0, 4), "model.output[:4]"),
        (slice(None, None, 2), "model.output[::2]"),
        ([3], "model.output[3,]"),
        ([0, -1], "model.output[0,-1]"),
    ],
)
def test_a_site_at_a_position_is_what_its_text_says(position, text):
    target = Path("model.output").at(position)
    assert target == Path(text)
    assert target.split(0) == (
        Path("model.output"),
        slice(None, 4) if position == slice(0, 4) else position,
    )


def test_positions_that_no_path_can_carry_are_refused():
    site = Path("model.output")
    with pytest.raises(PathError, match="a step of 1 or more, found -1"):
        site.at(slice(None, None, -1))
    with pytest.raises(PathError, match="a list of one index or more, found none"):
        site.at([])
    with pytest.raises(PathError, match="a list of at most 4096 indices, found 5000"):
        site.at([0] * 5000)
    with pytest.raises(PathError, match="an index of at most 64 bits"):
        site.at(2**63)
    with pytest.raises(PathError, match=r"`model.output\[:\]` has a position already"):
        Path("model.output[:]").at(0)
    with pytest.raises(TypeError, match="int, slice, list of int or None, found str"):
        site.at("last")


def test_hostile_texts_are_refused_in_a_short_message():
    with pytest.raises(PathError, match="of 131083 bytes: at most 65536 are read"):
        Path(f"model.{'a' * 2**17}.output"[:131083])
    with pytest.raises(PathError, match="no valid Unicode"):
        Path("model.\ud800.output")
    with pytest.raises(PathError, match=r"path `model.a\\0\\u\{1b\}\[xb+...` at byte 10") as caught:
        Path(f"model.a\0\x1b[x{'b' * 10_000}")
    assert len(str(caught.value)) < 300


def test_an_exact_text_is_found_without_reading_the_others():
    index = SiteIndex(["no path at all", "model.output", "model.output["])
    assert index.find("no path at all") == [(0, None)]
    assert index.find("model.output[-1]") == [(1, -1)]
    with pytest.raises(PathError, match="invalid path"):
        index.find("nothing")


def test_ten_thousand_sites_keep_their_order():
    sites = [f"model.h[{layer}].part{part}.output" for layer in range(1000) for part in range(10)]
    index = SiteIndex(sites)
    assert index.find(sites[7654]) == [(7654, None)]
    assert index.find("model.h[:].part3.output[-1]") == [(at, -1) for at in range(3, 10_000, 10)]
    with pytest.raises(SiteNotFoundError, match=r"nearest: `model.h\[5\].part0.output`"):
        index.find("model.h[5].pert0.output")


TEXTS = st.lists(
    st.sampled_from([*"[]@:,-. 07é", "model", ".output", ".grad", "h", "\0", "9" * 20]) | st.text(),
    max_size=12,
).map(lambda words: "model" + "".join(words))


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_any_text_is_a_path_with_one_canonical_text_or_a_path_error(text):
    try:
        path = Path(text)
    except PathError:
        return
    assert Path(path.text) == path
    assert Path(path.text).text == path.text
    index = SiteIndex([path.text])
    assert index.find(text) == [(0, None)]
