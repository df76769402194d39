"""The command line: output, exit statuses, and sentences instead of tracebacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.stores import IDS, SITES, make, numbers

import lamina as lm
from lamina.cli import main
from lamina.cli_capture import load_model, read_texts

SITE = SITES[1]


@pytest.fixture
def acts(tmp_path):
    return make(tmp_path / "acts", texts=True).directory


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error of a command."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_info_prints_what_the_store_prints(acts, capsys):
    status, out, err = run(capsys, "info", acts)
    assert (status, err) == (0, "")
    assert out == f"{lm.open(acts)!r}\n"


def test_info_as_json_is_all_facts(acts, capsys):
    status, out, _ = run(capsys, "info", acts, "--json")
    assert status == 0
    assert json.loads(out) == lm.open(acts).info()


def test_info_is_quick(acts):
    best = 9.0
    for _ in range(5):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "lamina.cli", "info", acts], capture_output=True, check=True
        )
        best = min(best, time.perf_counter() - begun)
    assert b"8 of 3 prompts" in done.stdout
    assert best < 0.5


def test_ls_lists_sites_prompts_and_shards(acts, capsys):
    status, out, _ = run(capsys, "ls", acts)
    assert status == 0
    assert out.splitlines() == [
        "site                     shape   dtype    bytes",
        "model.layers[0].output   [8, 6]  float32  192 B",
        "model.layers[1].output   [8, 6]  float32  192 B",
        "model.layers[2].output   [8, 6]  float32  192 B",
        "model.layers[10].output  [8, 6]  float32  192 B",
    ]
    assert run(capsys, "ls", acts, "--prompts")[1].splitlines() == [
        "prompt  tokens  rows  text",
        "0       3       0:3   a b c",
        "1       1       3:4   d",
        "2       4       4:8   e f g h",
    ]
    _, out, _ = run(capsys, "ls", acts, "--shards")
    assert out.splitlines()[1].split()[:3] == [lm.open(acts).shards[0][0], "0:8", "0:3"]


def test_an_earlier_version_can_be_asked_for(tmp_path, capsys):
    with lm.create(tmp_path / "acts", sites={SITE: (1, "f32")}) as writer:
        writer.append({SITE: np.ones((2, 1), dtype=np.float32)}, tokens=[1, 2])
    newest = lm.open(tmp_path / "acts").version
    assert "0 of 0 prompts" in run(capsys, "info", tmp_path / "acts", "--at", newest - 1)[1]
    status, _, err = run(capsys, "info", tmp_path / "acts", "--at", 77)
    assert status == 3
    assert "has no version 77" in err


def test_verify_succeeds_on_an_intact_store(acts, capsys):
    status, out, err = run(capsys, "verify", acts)
    assert (status, err) == (0, "")
    assert out.startswith("intact: ")


def test_verify_lists_damage_and_exits_with_one(acts, capsys):
    store = lm.open(acts)
    path = Path(acts) / "shards" / store.shards[0][0]
    data = bytearray(path.read_bytes())
    data[data.index(numbers()[1, 5].tobytes())] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)
    status, out, _ = run(capsys, "verify", acts, "--threads", 1)
    assert status == 1
    assert out.startswith("damaged: 1 block of ")
    assert f"{path.name}  {SITE}  rows 0:8, prompts 0:3" in out


def test_cat_shows_one_vector(acts, capsys):
    status, out, err = run(capsys, "cat", acts, f"{SITE}[-1]", "--prompt", 2)
    assert (status, err) == (0, "")
    vector = numbers()[1, 7]
    lines = out.splitlines()
    assert lines[0] == f"{SITE}  prompt 2, position 3, token {IDS[7]}, row 7"
    assert lines[1].startswith(f"  [6] float32  norm {np.linalg.norm(vector):.6g}, mean")
    assert lines[2].split() == ["[" + f"{vector[0]:g}", *(f"{x:g}" for x in vector[1:-1]),
                                f"{vector[-1]:g}]"]  # fmt: skip


def test_cat_without_a_position_shows_all_rows_of_the_prompt(acts, capsys):
    _, out, _ = run(capsys, "cat", acts, SITE, "--prompt", -1, "--json")
    found = json.loads(out)
    assert [each["position"] for each in found] == [0, 1, 2, 3]
    assert [each["values"] for each in found] == numbers()[1, 4:].tolist()
    assert found[0] | {"values": None} == {
        "path": SITE, "prompt": 2, "position": 0, "token": 31, "row": 4, "dtype": "float32",
        "shape": [6], "values": None,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "int8", "bool"])
def test_cat_shows_every_dtype(tmp_path, capsys, dtype):
    values = torch.tensor([[0, 1, 2, 3]]).to(getattr(torch, dtype))
    with lm.create(tmp_path / "acts", sites={SITE: (4, dtype)}) as writer:
        writer.append({SITE: values}, tokens=[1])
    _, out, _ = run(capsys, "cat", tmp_path / "acts", SITE, "--json")
    assert json.loads(out)[0]["values"] == [values.double().tolist()[0]][0]


def test_cat_shortens_long_vectors_unless_asked_not_to(tmp_path, capsys):
    values = torch.arange(1000.0)[None]
    values[0, 3] = float("nan")
    with lm.create(tmp_path / "acts", sites={SITE: (1000, "f32")}) as writer:
        writer.append({SITE: values}, tokens=[1])
    short = run(capsys, "cat", tmp_path / "acts", SITE)[1]
    whole = run(capsys, "cat", tmp_path / "acts", SITE, "--all")[1]
    assert "..." in short
    assert "1 not finite" in short
    assert " 500" not in short
    assert " 500 " in whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "lamina: there is no lamina store at `nowhere`"),
        (["cat", "ACTS", "model.nothing.output"], "model.nothing.output"),
        (["cat", "ACTS", "model.layers[1"], "at byte"),
        (["cat", "ACTS", "model.layers[:].output"], "stands for 4 sites; name one of them"),
        (["cat", "ACTS", f"{SITE}[1]", "--prompt", "1"], "position 1 lies outside prompt 1"),
        (["cat", "ACTS", SITE, "--prompt", "9"], "9 lies outside the prompts"),
        (["capture", "x", "none.txt", "--sites", "model.x.output", "--to", "y"], "none.txt is no"),
        (["capture", ".", "TEXTS", "--sites", "model.x.output", "--to", "y"], "no config.json"),
        (["capture", "x.gguf", "TEXTS", "--sites", "model.x.output", "--to", "y"], "x.gguf is no"),
        (
            ["capture", "x", "TEXTS", "--sites", "h[3].mlp.output", "--to", "y"],
            "did you mean `model.h[3].mlp.output`?",
        ),
        (["capture", "./x", "TEXTS", "--sites", "model.x.output", "--to", "y"], "./x: no such fol"),
        (
            ["capture", "x", "TEXTS", "--sites", "model.x.output", "--to", "texts.txt"],
            "texts.txt is a file; a store is a directory",
        ),
        (["info", "texts.txt"], "texts.txt is a file; a store is a directory"),
        (["verify", "ACTS", "--threads", "-3"], "--threads -3: expected a number of threads"),
        (["demo", "--out", "texts.txt/out"], "cannot make texts.txt/out: Not a directory"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_status_three(
    acts, capsys, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a\n")
    given = [{"ACTS": acts, "TEXTS": "texts.txt"}.get(each, each) for each in arguments]
    status, out, err = run(capsys, *given)
    assert (status, out) == (3, "")
    assert err.startswith("lamina: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["info"], ["cat", "a", "b", "--prompt", "x"]]
)
def test_a_wrong_command_line_is_status_two(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("usage: lamina")


@pytest.mark.parametrize("command", [None, "capture", "info", "ls", "verify", "cat", "demo"])
def test_help_has_examples_and_exit_statuses(capsys, command):
    status, out, _ = run(capsys, *([command] if command else []), "--help")
    assert status == 0
    assert "examples:\n  lamina " in out
    assert "exit status:" in out


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"lamina {lm.__version__}\n")


def test_an_interrupt_is_status_130_and_no_traceback(acts, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lm.Store, "verify", interrupted)
    assert run(capsys, "verify", acts)[::2] == (130, "lamina: interrupted\n")


def test_output_that_nobody_reads_on_is_no_error(acts):
    command = (
        f"{sys.executable} -m lamina.cli ls {acts} --prompts | head -n 0; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_texts_are_lines_or_fields(tmp_path, monkeypatch):
    lines = tmp_path / "texts.txt"
    lines.write_text("one\n\n  two \r\nthree", encoding="utf-8")
    empty = {"input_ids": [], "text": ""}
    blank: list[int] = []
    assert list(read_texts(str(lines), "text", None, blank)) == ["one", empty, "  two ", "three"]
    assert blank == [2]
    assert list(read_texts(str(lines), "text", limit=2)) == ["one", empty]
    objects = tmp_path / "texts.jsonl"
    objects.write_text('{"text": "é", "q": "x"}\n\n{"text": "b\\n", "q": "y"}\n', encoding="utf-8")
    assert list(read_texts(str(objects), "text")) == ["é", "b\n"]
    assert list(read_texts(str(objects), "q")) == ["x", "y"]
    with lines.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert list(read_texts("-", "text")) == ["one", empty, "  two ", "three"]


def test_the_line_end_at_the_end_of_a_file_is_no_prompt(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n")
    assert list(read_texts(str(path), "text")) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "a"}', r"line 1: no text in the field 'text' \(there is 'body'\); --field"),
        (b"[1]", r"no text in the field 'text' \(there is no object\)"),
        (b'{"text": 3}', "no text in the field"),
        (b"{", "line 1: no JSON"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_line_that_is_no_text_is_named(tmp_path, line, message):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(line)
    with pytest.raises(lm.PromptError, match=message):
        list(read_texts(str(path), "text"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with a tokenizer, in a folder, as somebody's own model would be."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    words = {word: at for at, word in enumerate(["[UNK]", "the", "cat", "sat", "on", "mat"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_capture_of_a_folder_equals_a_plain_forward(folder, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("the cat sat\non the mat the cat\n")
    status, out, err = run(
        capsys, "capture", folder, tmp_path / "texts.txt", "--to", tmp_path / "acts",
        "--sites", "model.layers[:].output", "model.lm_head.output", "--batch-size", 1, "--quiet",
    )  # fmt: skip
    assert status == 0, err
    store = lm.open(tmp_path / "acts")
    assert out == f"{store!r}\n"
    assert store.prompts[1].text == "on the mat the cat"
    model, tokenizer = load_model(str(folder))
    with torch.no_grad():
        found = model(**tokenizer("on the mat the cat", return_tensors="pt"))
    assert torch.equal(store["model.lm_head.output"].tensor[3:], found.logits[0])
    again = run(
        capsys, "capture", folder, tmp_path / "texts.txt", "--to", tmp_path / "acts",
        "--sites", "model.layers[:].output", "--quiet",
    )  # fmt: skip
    assert again[0] == 3
    assert "sites" in again[2]


def test_blank_lines_are_named_and_keep_their_numbers_if_skipped(folder, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat\n\nmat\n \n")
    given = ["--sites", "model.layers[0].output", "--to", tmp_path / "acts", "--quiet"]
    status, _, err = run(capsys, "capture", folder, texts, *given)
    assert status == 3
    assert "2 prompts have no tokens: 1 and 3; --empty skip leaves them out" in err
    assert f"blank in {texts}: lines 2 and 4" in err
    status, _, err = run(capsys, "capture", folder, texts, *given, "--empty", "skip")
    assert status == 0, err
    store = lm.open(tmp_path / "acts")
    assert [prompt.text for prompt in store.prompts] == ["the cat", "", "mat", " "]
    assert [prompt.length for prompt in store.prompts] == [2, 0, 1, 0]


def test_a_wrong_site_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "texts.txt").write_text("a\n")
    code = (
        "import sys; from lamina.cli import main; "
        "status = main(['capture', 'x', 'texts.txt', '--sites', 'h.output', '--to', 'y']); "
        "sys.exit('torch' in sys.modules or status != 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path)
    assert done.returncode == 0


def test_verify_of_a_store_too_damaged_to_open_is_status_one(acts, capsys):
    before, newest = sorted(Path(acts, "manifests").iterdir())[-2:]
    text = newest.read_bytes()
    newest.write_bytes(text[: len(text) // 2])
    status, out, _ = run(capsys, "verify", acts)
    assert status == 1
    assert out.startswith("damaged: ")
    assert f"open it with --at {int(before.stem)}\n" in out
    newest.write_bytes(text)
    Path(acts, "FORMAT").unlink()
    status, out, _ = run(capsys, "verify", acts)
    assert (status, "FORMAT" in out) == (1, True)


def test_capture_with_positions_dtype_and_limit(folder, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text('{"t": "the cat"}\n{"t": "mat"}\n{"t": "on the mat"}\n')
    status, _, err = run(
        capsys, "capture", folder, tmp_path / "texts.jsonl", "--field", "t", "--limit", 2,
        "--to", tmp_path / "acts", "--sites", "model.layers[1].output", "--positions", "-1",
        "--dtype", "bf16", "--padding", "left", "--quiet",
    )  # fmt: skip
    assert status == 0, err
    store = lm.open(tmp_path / "acts")
    assert (store.rows, store["model.layers[1].output"].dtype) == (2, "bfloat16")
    assert store.options["padding"] == "left"


def test_positions_that_begin_with_a_minus_need_no_equals_sign(folder, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("the cat sat\n")
    to = tmp_path / "acts"
    given = ["--sites", "model.layers[0].output", "--to", to, "--positions", "-2:", "--quiet"]
    assert run(capsys, "capture", folder, tmp_path / "texts.txt", *given)[0] == 0
    assert lm.open(to).options["positions"] == "-2:"


def test_a_device_that_is_not_there_is_one_sentence(folder, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("the cat sat\n")
    given = ["--sites", "model.layers[0].output", "--to", tmp_path / "acts", "--device", "nowhere"]
    status, out, err = run(capsys, "capture", folder, tmp_path / "texts.txt", *given)
    assert (status, out) == (3, "")
    assert "--device nowhere: " in err


def test_the_command_is_installed():
    done = subprocess.run(
        [Path(sys.executable).parent / "lamina", "--version"],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    assert done.stdout == f"lamina {lm.__version__}\n"
