"""Stand-ins for the models and the data sets that TRL's own tests take from the hub."""

import re
from importlib import resources
from pathlib import Path

ORGANISATION = "trl-internal-testing"
COMMIT = "0" * 40
"""What the stand-ins' only revision is called in the hub's cache."""

_WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # The default of 0.02 leaves such small models nearly uniform, and gradients too small to see.
    "initializer_range": 0.3,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
# What an architecture needs besides, by the start of its class's name; the first counts.
_CONFIGS = {
    "Cohere": {"logit_scale": 1.0},
    "DeepseekV3": {
        **_EXPERTS,
        **_LATENT,
        "v_head_dim": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "Gemma": {"head_dim": 4},
    "Glm4Moe": {**_EXPERTS, "head_dim": 4, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "GptOss": {"head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_multiple_of": 8,
        "block_auto_adjust_ff_dim": False,
    },
    "NemotronH": {
        **_EXPERTS,
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 4,
        "mamba_n_groups": 1,
        "ssm_state_size": 16,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 32,
        "use_mamba_kernels": False,
        "num_hidden_layers": 3,
    },
    "Qwen3Moe": {**_EXPERTS, "num_experts": 4, "head_dim": 4},
    "Qwen3": {"head_dim": 4},
}
# TRL's file with an architecture's chat template, and what ends a turn and pads there.
_CHATS = {
    "Cohere2": ("cohere2", "<|END_OF_TURN_TOKEN|>", "<PAD>"),
    "Cohere": ("cohere", "<|END_OF_TURN_TOKEN|>", "<PAD>"),
    "DeepseekV3": ("deepseekv3", "<|end|>", "<|pad|>"),
    "Gemma": ("gemma", "<end_of_turn>", "<pad>"),
    "Glm4Moe": ("glm4moe", "<|user|>", "<|endoftext|>"),
    "GptOss": ("gptoss", "<|return|>", "<|endoftext|>"),
    "Lfm2": ("lfm2", "<|im_end|>", "<|pad|>"),
    "Llama": ("llama3_2", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    "Mistral": (None, "</s>", None),
    "NemotronH": ("nemotron_3_nano", "<|im_end|>", "<|pad|>"),
    "Phi3": ("phi3", "<|end|>", "<|pad|>"),
    "Qwen3": ("qwen3", "<|im_end|>", "<|endoftext|>"),
    "": ("qwen2_5", "<|im_end|>", "<|endoftext|>"),
}
_REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def _of(table: dict, name: str):
    return table[next(start for start in table if name.startswith(start))]


def standin_ids(text: str) -> set[str]:
    """Return the ids of text models that ``text`` names, those that ``save_model`` can make."""
    found = set(re.findall(rf"{ORGANISATION}/(tiny-[\w.-]+)", text))
    kinds = ("ForCausalLM", "ForSequenceClassification")
    return {name for name in found if any(kind in name for kind in kinds)}


def cache_folder(cache: Path, name: str) -> Path:
    """Return the empty folder of a stand-in's files within the hub's cache."""
    repository = cache / f"models--{ORGANISATION}--{name}"
    files = repository / "snapshots" / COMMIT
    files.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return files


def tokenizer_for(name: str):
    """Return a small byte-pair tokenizer with an architecture's chat template and special tokens.

    The template is read from the installed TRL, which knows it by its text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    file, end, pad = _of(_CHATS, name)
    template = None
    if file is not None:
        template = (resources.files("trl") / "chat_templates" / f"{file}.jinja").read_text()
    marks = {end, *re.findall(r"<\|\w+\|>", template or ""), *([pad] if pad else [])}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<bos>", *sorted(marks)],
        show_progress=False,
    )
    # Instructions within templates are long: they would fill a context byte by byte.
    tokenizer.train_from_iterator([template or "", *_THINGS], learner)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token=end,
        pad_token=pad,
        chat_template=template,
    )


def save_model(name: str, folder: Path) -> None:
    """Save a tiny model with random weights of the architecture that ``name`` has in it.

    Args:
        name: As ``tiny-Qwen2ForCausalLM-2.5``.
        folder: An empty folder.
    """
    import torch
    import transformers

    architecture = re.match(r"tiny-(\w+)", name)[1]
    remote = architecture.startswith("Remote")
    tokenizer = tokenizer_for("Llama" if remote else architecture)
    model_class = getattr(transformers, "LlamaForCausalLM" if remote else architecture)
    own = _of({**_CONFIGS, "": {}}, architecture)
    config = model_class.config_class(
        **{**_WIDTHS, **own},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"num_labels": 1} if "Sequence" in architecture else {}),
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = model_class(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if remote:
        _make_remote(folder)


def _make_remote(folder: Path) -> None:
    """Turn a saved Llama into one whose code lies beside it."""
    import json

    (folder / "modeling_remote.py").write_text(_REMOTE)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {
        "model_type": "remote",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_remote.RemoteConfig",
            "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
        },
    }
    file.write_text(json.dumps(config))


_THINGS = [
    "river", "stone", "lamp", "garden", "engine", "letter", "window", "bridge", "forest", "clock",
    "harbour", "mirror", "ladder", "basket", "kettle", "pillow", "candle", "hammer", "violin",
]  # fmt: skip


def _columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _message(role: str, content: str, **more) -> list[dict]:
    return [{"role": role, "content": content, **more}]


def _rows(kind: str, conversational: bool) -> dict[str, list]:
    rows = []
    for i, thing in enumerate(_THINGS):
        if conversational:
            prompt = _message("user", f"Where is the {thing}?")
            good = _message("assistant", f"The {thing} is here." + " Look!" * (i % 3))
            bad = _message("assistant", "Who knows?" + " Not I." * (i % 2))
        else:
            prompt, good = f"The {thing} is", " here, as always." + " Look!" * (i % 3)
            bad = " gone for good." + " Sadly." * (i % 2)
        rows.append(
            {
                "language_modeling": {"messages" if conversational else "text": prompt + good},
                "prompt_only": {"prompt": prompt},
                "prompt_completion": {"prompt": prompt, "completion": good},
                "preference": {"prompt": prompt, "chosen": good, "rejected": bad},
                "implicit_prompt_preference": {"chosen": prompt + good, "rejected": prompt + bad},
                "unpaired_preference": {
                    "prompt": prompt,
                    "completion": good if i % 2 else bad,
                    "label": bool(i % 2),
                },
            }[kind]
        )
    return _columns(rows)


def _with_thoughts(kind: str) -> dict[str, list]:
    """Return conversations whose answers come after a thought, with arguments for the template."""
    columns = _rows(kind, conversational=True)
    for name in ("messages", "completion", "chosen", "rejected"):
        for messages in columns.get(name, ()):
            messages[-1]["thinking"] = "Let me see."
    efforts = ("low", "medium", "high")
    columns["chat_template_kwargs"] = [
        {"reasoning_effort": efforts[i % 3], "model_identity": "You are small."}
        for i in range(len(_THINGS))
    ]
    return columns


def _with_tools(kind: str) -> dict[str, list]:
    """Return conversations with a call of a tool, its answer and what is made of it."""
    rows = []
    for thing in _THINGS[:8]:
        function = {"name": "find", "arguments": {"thing": thing}}
        prompt = _message("user", f"Find the {thing}.")
        found = [
            {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
            *_message("tool", "on the shelf", name="find"),
            *_message("assistant", f"The {thing} is on the shelf."),
        ]
        parameters = {"type": "object", "properties": {"thing": {"type": "string"}}}
        description = {"name": "find", "description": "Find it.", "parameters": parameters}
        answer = {
            "language_modeling": {"messages": prompt + found},
            "preference": {
                "prompt": prompt,
                "chosen": found,
                "rejected": _message("assistant", f"I have no {thing}."),
            },
        }[kind]
        rows.append(answer | {"tools": [{"type": "function", "function": description}]})
    return _columns(rows)


def standin_data(path: str, config: str | None):
    """Return a ``DatasetDict`` with the columns of one of TRL's test data sets, or None.

    Args:
        path: As ``trl-internal-testing/zen``.
        config: As ``standard_preference``.
    """
    from datasets import Dataset

    name = path.removeprefix(f"{ORGANISATION}/")
    if name == path or config is None:
        return None
    try:
        if name == "zen":
            form, kind = config.split("_", 1)
            columns = _rows(kind, form == "conversational")
        else:
            columns = {"harmony": _with_thoughts, "toolcall": _with_tools}[name](config)
    except KeyError:
        return None
    mixed = {"on_mixed_types": "use_json"} if name == "toolcall" else {}
    return Dataset.from_dict(columns, **mixed).train_test_split(test_size=2, shuffle=False)
