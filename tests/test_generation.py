import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer
from tiny_models import one_thread as one_thread
from torch import nn

from prefalign.attention import PACKED_ATTENTION, use_packed_attention
from prefalign.errors import ModelError
from prefalign.generation import Completion, TransformersGenerator, VLLMGenerator, eos_ids

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


def generator(model, **options):
    options = {"samples_per_prompt": 2, "temperature": 1.0, "max_new_tokens": 6, **options}
    return TransformersGenerator(model, TOKENIZER, **{"batch_size": 3, **options})


def packed_model(name="llama", **changes):
    model = tiny_model(name, **changes)
    use_packed_attention(model)
    return model


class Scripted(nn.Module):
    """A head under which only some tokens can follow, by the last token."""

    def __init__(self, model, followers):
        super().__init__()
        self.hidden, self.embedding = model.lm_head, model.get_input_embeddings()
        self.followers = followers
        self.last = None
        self.embedding.register_forward_hook(self.remember)

    def remember(self, module, args, output):
        self.last = args[0][:, -1]

    def forward(self, hidden):
        logits = self.hidden(hidden)
        kept = torch.full_like(logits, -1e4)
        for row, token in enumerate(self.last.tolist()):
            kept[row, -1, self.followers(token)] = 0.0
        return kept


def test_the_seed_alone_decides():
    sampler = generator(packed_model())
    first = sampler.generate(PROMPTS, seed=1)
    torch.rand(3)
    sampler.generate(PROMPTS[:1], seed=5)
    assert sampler.generate(PROMPTS, seed=1) == first
    assert sampler.generate(PROMPTS, seed=2) != first
    assert [len(completions) for completions in first] == [2] * len(PROMPTS)
    # The samples of a prompt are drawn apart.
    assert any(a != b for a, b in first)


@pytest.mark.parametrize("name", [*CONFIGS])
def test_greedy_responses_do_not_depend_on_padding(name):
    model = packed_model(name)
    sampler = generator(model, temperature=0.0, samples_per_prompt=1, batch_size=4)
    together = sampler.generate(PROMPTS, seed=0)
    alone = [sampler.generate([prompt], seed=0)[0] for prompt in PROMPTS]
    assert together == alone
    for prompt, [completion] in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        model.set_attn_implementation("eager")
        for token in completion.ids:
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)
        model.set_attn_implementation(PACKED_ATTENTION)


def test_an_eos_ends_a_response_and_the_limit_cuts_it():
    model = packed_model("qwen2")
    # 5 is followed by EOS at once, 6 by 20, 20 by EOS, anything else by 30 for ever.
    follow = {5: EOS, 6: 20, 20: EOS}
    model.lm_head = Scripted(model, lambda token: follow.get(token, 30))
    out = generator(model, samples_per_prompt=1).generate([[9, 6], [5], [9, 9]], seed=0)
    assert out == [
        [Completion([20, EOS], cut=False)],
        [Completion([EOS], cut=False)],
        [Completion([30] * 6, cut=True)],
    ]


def test_an_eos_in_the_last_place_is_not_a_cut():
    model = packed_model("qwen2")
    model.lm_head = Scripted(model, lambda token: EOS if token == 30 else 30)
    sampler = generator(model, samples_per_prompt=1, max_new_tokens=2)
    assert sampler.generate([[9]], seed=0) == [[Completion([30, EOS], cut=False)]]
    sampler = generator(model, samples_per_prompt=1, max_new_tokens=1)
    assert sampler.generate([[9]], seed=0) == [[Completion([30], cut=True)]]


def test_every_eos_of_the_model_ends_a_response():
    model = packed_model("qwen2")
    model.generation_config.eos_token_id = [40, 41]
    assert eos_ids(model, TOKENIZER) == [EOS, 40, 41]
    model.lm_head = Scripted(model, lambda token: 41)
    [[completion]] = generator(model, samples_per_prompt=1).generate([[9]], seed=0)
    assert completion == Completion([41], cut=False)


def test_the_models_own_sampling_defaults_are_left_out():
    model = packed_model("qwen2")
    plain = generator(model).generate(PROMPTS, seed=0)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    model.generation_config.min_new_tokens = 6
    assert generator(model).generate(PROMPTS, seed=0) == plain


def test_temperature_and_top_p_shape_the_distribution():
    model = packed_model("qwen2")
    greedy = generator(model, temperature=0.0).generate(PROMPTS, seed=0)
    assert generator(model, top_p=1e-6).generate(PROMPTS, seed=0) == greedy
    assert generator(model, temperature=1e-4).generate(PROMPTS, seed=0) == greedy
    assert generator(model, temperature=5.0).generate(PROMPTS, seed=0) != greedy


@pytest.mark.parametrize("peft", [False, True])
def test_everything_is_restored(peft):
    model = packed_model("llama")
    if peft:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    first = next(model.modules().__iter__().__next__().children())
    first.eval()
    defaults = model.generation_config
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()

    generator(model).generate(PROMPTS, seed=3)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.config._attn_implementation == PACKED_ATTENTION
    assert model.generation_config is defaults
    assert model.config.use_cache is False
    checkpointed = [m.gradient_checkpointing for m in model.modules() if is_layer(m)]
    assert checkpointed and all(checkpointed)


def is_layer(module):
    return "gradient_checkpointing" in vars(module) and type(module).__name__.endswith("Layer")


def test_an_adapter_takes_part():
    model = get_peft_model(packed_model(), LoraConfig(task_type="CAUSAL_LM", r=2))
    plain = generator(model, temperature=0.0).generate(PROMPTS, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    assert generator(model, temperature=0.0).generate(PROMPTS, seed=0) != plain


def test_numbers_out_of_range_and_empty_prompts():
    model = packed_model()
    for wrong in (
        {"samples_per_prompt": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"batch_size": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            generator(model, **wrong)
    with pytest.raises(ValueError, match="none in 1"):
        generator(model).generate([[5], []], seed=0)
    assert generator(model).generate([], seed=0) == []


def test_vllm_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ModelError, match="vllm package"):
        VLLMGenerator(packed_model(), TOKENIZER)
