"""The demo runs through, and its results are what they are known to be."""

import contextlib
import io
import re

import pytest

from lamina import demo


@pytest.fixture(scope="module")
def output(tmp_path_factory, smollm2):
    """What the demo prints on fewer prompts, and the folder it leaves."""
    out = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(demo, "load_model", lambda: smollm2)
        demo.run(out, prompts=40)
    return printed.getvalue(), out


def test_the_same_capture_is_recognised_and_others_are_refused_by_field(output):
    text, _ = output
    assert "the same: recognised" in text
    dtype, tokens = re.findall(r"refused, IdentityError on (.*)", text)
    assert "dtype" in dtype
    assert "tokens" in tokens
    assert "dtype" not in tokens


def test_probes_beat_the_majority_on_held_out_prompts(output):
    text, _ = output
    majority, *probes = (float(share) for share in re.findall(r"^  \S.* (\d+\.\d)%$", text, re.M))
    assert len(probes) == 8
    assert min(probes) > majority + 5


def test_patching_changes_the_answer_late_in_the_model_alone(output):
    text, _ = output
    rows = re.findall(r"^  (nothing|layer \d+) +' (\w+)' +([\d.]+) +([\d.]+)$", text, re.M)
    says = {name: word for name, word, _, _ in rows}
    early = ["nothing", *(f"layer {layer}" for layer in range(0, 22, 3))]
    assert [says[name] for name in early] == ["Paris"] * len(early)
    assert says["layer 24"] == says["layer 27"] == "Rome"
    chances = {name: float(rome) for name, _, _, rome in rows}
    assert chances["layer 24"] == pytest.approx(0.75, abs=0.02)
    assert chances["layer 27"] == pytest.approx(0.77, abs=0.02)


def test_pictures_are_drawn_where_it_says(output):
    text, out = output
    for name in ("norms.png", "patching.png"):
        assert str(out / name) in text
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_texts_differ_in_length_and_are_each_new():
    texts = list(demo.docstrings())
    assert len(texts) >= 240
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) < 120 < 400 < max(map(len, texts))
