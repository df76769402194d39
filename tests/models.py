"""Small random models of several families, and modules that are awkward on purpose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

WIDTH = 32
VOCABULARY = 61
LAYERS = 3

_COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def _seeded(build: Callable[[], Any], dtype: torch.dtype, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name.lower() and "ln_" not in name:
                    parameter.mul_(1.5)  # initial weights are so small that mistakes would hide
    return model.to(dtype).eval()


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **_COMMON, **_SPECIAL, intermediate_size=48, num_key_value_heads=2, **options
    )
    return _seeded(lambda: LlamaForCausalLM(config), dtype)


def gpt2(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, n_positions=64, **_SPECIAL
    )
    for name, value in options.items():
        setattr(config, name, value)
    return _seeded(lambda: GPT2LMHeadModel(config), dtype)


def gpt_neox(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(**_COMMON, **_SPECIAL, intermediate_size=48)
    return _seeded(lambda: GPTNeoXForCausalLM(config), dtype)


def qwen3(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **_COMMON, **_SPECIAL, intermediate_size=48, num_key_value_heads=2, head_dim=8
    )
    return _seeded(lambda: Qwen3ForCausalLM(config), dtype)


def mixtral(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **_COMMON,
        **_SPECIAL,
        intermediate_size=48,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return _seeded(lambda: MixtralForCausalLM(config), dtype)


def bert(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(**_COMMON, pad_token_id=0, intermediate_size=48)
    return _seeded(lambda: BertModel(config), dtype)


def roberta(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(**_COMMON, pad_token_id=1, intermediate_size=48)
    return _seeded(lambda: RobertaModel(config), dtype)


def bloom(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        hidden_size=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, **_SPECIAL
    )
    return _seeded(lambda: BloomForCausalLM(config), dtype)


def albert(dtype: torch.dtype = torch.float32) -> Any:
    """One layer, called three times."""
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(**_COMMON, embedding_size=16, intermediate_size=48)
    return _seeded(lambda: AlbertModel(config), dtype)


def t5(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    return _seeded(lambda: T5Model(config), dtype)


class Plain(nn.Module):
    """A model of nobody's library: learned absolute positions, no position_ids in its forward."""

    def __init__(self, *, vocabulary: int = VOCABULARY, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(64, width)
        self.mix = nn.Linear(width, width)
        self.pair = Pair(width)
        self.head = nn.Linear(width, vocabulary)
        self.unused = nn.Linear(width, width)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        hidden = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        hidden = hidden + torch.tanh(self.mix(hidden))
        left, extra = self.pair(hidden, scale=torch.ones(()))
        hidden = left + extra["more"] * attention_mask[..., None]
        return {"logits": self.head(hidden), "hidden": hidden}


class Pair(nn.Module):
    """Returns a tuple that holds a dict; takes a tensor and a keyword."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(
        self, hidden: torch.Tensor, *, scale: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.inner(hidden) * scale, {"more": hidden * 0.5, "total": hidden.sum()}


def plain(dtype: torch.dtype = torch.float32, **options: Any) -> Plain:
    return _seeded(lambda: Plain(**options), dtype)


FAMILIES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "llama": (
        llama,
        [
            "model.layers[:].output",
            "model.layers[:].self_attn.output[0]",
            "model.layers[:].mlp.input",
            "model.model.norm.output",
            "model.lm_head.output",
        ],
    ),
    "gpt2": (
        gpt2,
        [
            "model.transformer.h[:].output",
            "model.transformer.h[:].attn.output[0]",
            "model.transformer.h[:].mlp.output",
            "model.transformer.h[1].ln_1.input",
            "model.lm_head.output",
        ],
    ),
    "gpt_neox": (
        gpt_neox,
        [
            "model.gpt_neox.layers[:].output",
            "model.gpt_neox.layers[:].mlp.output",
            "model.gpt_neox.layers[:].attention.output[0]",
            "model.gpt_neox.final_layer_norm.output",
        ],
    ),
    "qwen3": (
        qwen3,
        [
            "model.layers[:].output",
            "model.layers[:].self_attn.q_norm.output",
            "model.layers[:].self_attn.input.hidden_states",
            "model.embed_tokens.output",
        ],
    ),
    "mixtral": (
        mixtral,
        [
            "model.layers[:].output",
            "model.layers[:].mlp.output",
            "model.layers[:].mlp.gate.output[0]",
            "model.layers[:].mlp.gate.output[2]",
        ],
    ),
    "bert": (
        bert,
        [
            "model.encoder.layer[:].output",
            "model.encoder.layer[:].output.output",
            "model.encoder.layer[1].attention.self.output[0]",
            "model.embeddings.output",
        ],
    ),
}
"""Per family: how to build it, and paths that are worth capturing."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Small models are fastest on one thread, above all where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
