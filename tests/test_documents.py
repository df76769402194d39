"""README and guide: their examples run, and their figures say where they come from."""

import builtins
import linecache
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "docs/guide.md"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # stood in for by the same model, installed


def blocks(document: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def here(tmp_path, monkeypatch, smollm2):
    """An empty folder to run in, and the installed model under the name on the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = smollm2
    for kind, loaded in ((AutoModelForCausalLM, model), (AutoTokenizer, tokenizer)):
        given = {MODEL: loaded}
        monkeypatch.setattr(kind, "from_pretrained", given.__getitem__)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_examples_print_what_their_comments_say(document, here, monkeypatch):
    code = "\n".join(blocks(document, "python"))
    expected = re.findall(r"^ *print\(.*\)  +# (.*)$", code, flags=re.MULTILINE)
    printed = []

    def record(*values: object) -> None:
        printed.append(" ".join(map(str, values)).strip())

    assert code
    # nnsight reads the source of a `with` block, as of any module's.
    monkeypatch.setitem(
        linecache.cache, document, (len(code), None, code.splitlines(True), document)
    )
    exec(compile(code, document, "exec"), {"__builtins__": vars(builtins) | {"print": record}})
    assert printed == [text.strip('" ') for text in expected]


def test_console_examples_of_the_guide_succeed(here, capsys, smollm2):
    import lamina as lm
    from lamina.cli import main

    model, tokenizer = smollm2
    texts = ["The Colosseum is in the city of", "The Eiffel Tower is in the city of"]
    lm.capture(model, texts, "model.layers[:].output", to="acts/", tokenizer=tokenizer)
    lines = "".join(blocks("docs/guide.md", "console")).splitlines()
    commands = [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]
    assert commands
    for program, *arguments in commands:
        assert program == "lamina"
        capsys.readouterr()
        assert not main(arguments)
        assert capsys.readouterr().out


def test_the_first_example_begins_early_and_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines.index("```python") < 15
    assert sum(bool(line) for line in blocks("README.md", "python")[0].splitlines()) <= 12


def test_every_benchmark_figure_stands_with_its_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rest, section = text.split("## Benchmarks", 1)
    section = section.split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert rows
    for row in rows:
        bench = re.search(r"`(benches/\w+\.py)`", row)
        assert bench, row
        assert (ROOT / bench[1]).is_file(), row
    assert not re.findall(r"\d×", rest)
    assert not [
        line
        for document in ("docs/guide.md", "docs/design.md")
        for line in (ROOT / document).read_text(encoding="utf-8").splitlines()
        if re.search(r"\d×", line) and "benches/" not in line
    ]


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *DOCUMENTS[1:], "docs/design.md"]
)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / document).parent / target).exists(), target
