"""`import lamina` is quick and brings in nothing heavy; its names are where they are said to be."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.stores import make

import lamina as lm

HEAVY = ("torch", "transformers", "nnsight", "matplotlib", "pandas", "datasets")


def modules_after(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has after running some code."""
    code += "\nimport sys; print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_importing_lamina_imports_no_torch_nor_numpy():
    loaded = modules_after("import lamina")
    assert not loaded & {*HEAVY, "numpy"}


def test_opening_and_describing_a_store_imports_no_torch(tmp_path):
    make(tmp_path / "acts")
    code = f"from lamina.cli import main; main(['info', {str(tmp_path / 'acts')!r}])"
    assert not modules_after(code) & {*HEAVY, "numpy"}


def test_capture_and_patching_import_no_nnsight():
    loaded = modules_after("import lamina; lamina.capture, lamina.patched, lamina.SavedActivation")
    assert "nnsight" not in loaded
    assert "transformers" not in loaded


@pytest.mark.parametrize("name", lm.__all__)
def test_every_public_name_is_there(name):
    assert getattr(lm, name) is not None
    assert name in dir(lm)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lm.nothing


def test_capture_stays_the_function_when_its_module_is_imported():

    assert callable(lm.capture)
    assert lm.capture is sys.modules["lamina.capture"].capture


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert lm.__version__ == version("lamina")
