"""What tests share: the real model, and the condition of the tests that need a GPU."""

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")


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
