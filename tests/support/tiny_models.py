"""Tiny models with random weights, one for each architecture, and a byte-level tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 3 + 256  # pad, bos, eos and every byte

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # The default of 0.02 leaves such small models nearly uniform, and errors invisible.
    "initializer_range": 0.3,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_OPT_SHAPE = {name: value for name, value in _SHAPE.items() if name != "intermediate_size"}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=5),
    "gemma2": lambda: Gemma2Config(
        **_GROUPED,
        **_SLIDING,
        head_dim=16,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_GROUPED,
        **_SLIDING,
        head_dim=16,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "phi3": lambda: Phi3Config(**_GROUPED, sliding_window=6),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE, use_parallel_residual=True, rotary_pct=0.5),
    "opt": lambda: OPTConfig(**_OPT_SHAPE, ffn_dim=48, word_embed_proj_dim=24),
    "granite": lambda: GraniteConfig(
        **_GROUPED,
        logits_scaling=3.0,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        residual_multiplier=0.7,
    ),
    "cohere": lambda: CohereConfig(**_GROUPED, logit_scale=0.3),
}
"""The eleven architectures that must be reproduced, by name."""

ODD_CONFIGS = {
    "mamba": lambda: MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "falcon_alibi": lambda: FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_GROUPED, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=5
    ),
    "cohere2": lambda: Cohere2Config(**_GROUPED, **_SLIDING, logit_scale=0.3),
}
"""Architectures beyond the eleven, some of them refused."""


def tiny_model(name, dtype=torch.float32, seed=0, **changes):
    """Return a model with random weights (norms and biases too), in eval mode.

    ``changes`` are set on the config.
    """
    config = {**CONFIGS, **ODD_CONFIGS}[name]()
    for field, value in changes.items():
        setattr(config, field, value)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def tiny_tokenizer(chat_template=False):
    """Return a tokenizer with a token for every byte, and pad, bos and eos.

    With ``chat_template``, messages render as ``<role>: <content>`` lines.
    """
    tokens = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    if chat_template:
        fast.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
            "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    return fast


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread: a pool costs more than it gives where models are this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64_throughout(monkeypatch):
    """Keep float64 where transformers' norms and rotary factors would go through float32."""
    to = torch.Tensor.to

    def keep(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values()):
            return tensor
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
