"""What tests share: the real model, and the condition of the tests that need a GPU."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to others


MEMORY = Path("/dev/shm")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Put stores into memory: there an fsync costs nothing, and the tests make many."""
    worker = hasattr(config, "workerinput")
    if worker:  # one of several processes: more threads than cores only get in each other's way
        os.environ["OMP_NUM_THREADS"] = "1"
    elif config.option.basetemp is None and os.access(MEMORY, os.W_OK):
        made = tempfile.mkdtemp(prefix="lamina-tests-", dir=MEMORY)
        config.option.basetemp = made
        config.add_cleanup(lambda: shutil.rmtree(made, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests of the real model to one process, so that it is loaded once."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("smollm2"))


@pytest.fixture(scope="session")
def smollm2() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """SmolLM2-135M-Instruct in float32 and its tokenizer, as the demo loads them."""
    from lamina.demo import load_model

    return load_model()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked `cuda` where torch finds no GPU."""
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU, and torch finds none here")
