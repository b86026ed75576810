"""Reward models: one logit for each text, whatever it is batched with, and errors that say why."""

import pytest
import torch
from texts import CHATML, assistant, byte_tokenizer, user
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig

from prefalign.errors import ModelError, RunError
from prefalign.reward_models import RewardModel, load_reward_model
from prefalign.rewards import Rewards, load_reward, load_rewards

PROMPTS = ["What is it?", "b", "And a longer question: what is it now?", "c?"]
COMPLETIONS = [" A cat.", " No", " Nothing.", " It is the longest answer of these four by far."]


def classifier(config=None, labels=1, seed=0):
    config = config or CONFIGS["llama"]()
    config.num_labels = labels
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def alone(model, ids):
    """Return the reward of one unpadded text, as the model's own forward pass gives it."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize("max_tokens", [1, 60, 100, 16384])
def test_a_text_scores_the_same_in_any_batch(max_tokens):
    model, tokenizer = classifier(), tiny_tokenizer()
    reward = RewardModel(model, tokenizer, max_tokens=max_tokens)
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    scores = reward(PROMPTS, COMPLETIONS)
    assert all(rows == 1 or rows * width <= max_tokens for rows, width in sizes)
    assert len(sizes) == {1: 4, 60: 3, 100: 2, 16384: 1}[max_tokens]
    expected = [
        alone(model, tokenizer(prompt + completion)["input_ids"])
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert len({round(score, 3) for score in expected}) == 4
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert reward([], []) == []


def test_an_encoder_gets_its_special_tokens():
    tokenizer = byte_tokenizer(bos=True, eos=True)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.3,
    )
    model = classifier(config)
    scores = RewardModel(model, tokenizer)(PROMPTS, COMPLETIONS)
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert all(x[0] == tokenizer.bos_token_id and x[-1] == tokenizer.eos_token_id for x in ids)
    assert scores == pytest.approx([alone(model, x) for x in ids], rel=1e-4, abs=1e-5)


def test_a_conversation_goes_through_the_models_own_template():
    tokenizer = byte_tokenizer(bos=True, eos=True, template=CHATML)
    model = classifier()
    model.resize_token_embeddings(len(tokenizer))
    prompts = [[user("One?")], [user("Two?"), assistant("b"), user("And three?")]]
    rewards = Rewards(RewardModel(model, tokenizer))
    scores = rewards.score(prompts, ["a", [assistant("c")]])
    texts = [
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n",
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert scores == pytest.approx([alone(model, x) for x in ids], rel=1e-4, abs=1e-5)


def test_a_conversation_without_a_template_is_written_in_lines(caplog):
    model, tokenizer = classifier(), tiny_tokenizer()
    reward = RewardModel(model, tokenizer, name="judge")
    scores = [reward([[user("One?")]], [[assistant("a")]]) for _ in range(2)]
    expected = alone(model, tokenizer("user: One?\nassistant: a")["input_ids"])
    assert scores == [pytest.approx([expected], rel=1e-4)] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "judge: its tokenizer has no chat template: messages are written as 'role: content' lines"
    ]


def test_a_text_that_is_too_long_keeps_its_first_special_token_and_its_end(caplog):
    model, tokenizer = classifier(), byte_tokenizer(bos=True)
    model.resize_token_embeddings(len(tokenizer))
    reward = RewardModel(model, tokenizer, max_length=9)
    assert reward.max_length == 9
    ids = tokenizer("abcdefgh12345678")["input_ids"]
    expected = [alone(model, ids[:1] + ids[-8:]), alone(model, tokenizer("ab")["input_ids"])]
    assert reward(["abcdefgh", "a"], ["12345678", "b"]) == pytest.approx(expected, rel=1e-4)
    reward(["abcdefgh"], ["12345678"])
    assert [r.getMessage() for r in caplog.records] == [
        f"{reward.name}: texts are cut to their last 9 tokens"
    ]
    assert RewardModel(model, tokenizer).max_length == 128  # the config's
    tokenizer.model_max_length = 64
    assert RewardModel(model, tokenizer).max_length == 64


def test_a_missing_pad_token():
    model, tokenizer = classifier(), tiny_tokenizer()
    model.config.pad_token_id = None
    tokenizer.pad_token = None
    expected = [
        alone(model, tokenizer(prompt + completion)["input_ids"])
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    reward = RewardModel(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    # The config's own, where it names one: EOS as padding would hide a text's last token.
    tokenizer.pad_token, model.config.pad_token_id = None, 0
    assert RewardModel(model, tokenizer).tokenizer.pad_token == "<pad>"
    tokenizer.pad_token = tokenizer.eos_token = model.config.pad_token_id = None
    with pytest.raises(ModelError, match="the tokenizer has neither a pad nor an EOS token"):
        RewardModel(model, tokenizer)


def test_nothing_of_the_model_is_trained_and_its_mode_is_kept():
    config = CONFIGS["llama"]()
    config.attention_dropout = 0.5
    model = classifier(config)
    reward = RewardModel(model, tiny_tokenizer())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    model.train()
    assert reward(PROMPTS, COMPLETIONS) == reward(PROMPTS, COMPLETIONS)
    assert model.training


def test_the_model_is_on_the_device_while_it_scores_and_on_the_cpu_after():
    moves = []
    model = classifier()
    move = model.to
    model.to = lambda device: moves.append(str(device)) or move("cpu")
    rewards = Rewards([RewardModel(model, tiny_tokenizer()), lambda p, c: [0.0] * len(p)])
    with rewards.on_device("elsewhere"):
        assert moves == ["elsewhere"]
    with pytest.raises(KeyError), rewards.on_device("elsewhere"):
        raise KeyError
    assert moves == ["elsewhere", "cpu"] * 2


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_the_cpu():
    reward = RewardModel(classifier(), tiny_tokenizer(), max_tokens=60)
    expected = reward(PROMPTS, COMPLETIONS)
    before = torch.cuda.memory_allocated()
    with Rewards(reward).on_device("cuda"):
        assert reward.device.type == "cuda"
        scores = reward(PROMPTS, COMPLETIONS)
    assert scores == pytest.approx(expected, rel=1e-2, abs=1e-2)
    assert reward.device.type == "cpu"
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected 1 or more, got 0"),
        ({"max_length": 1}, "max_length: expected 2 or more, got 1"),
    ],
)
def test_limits(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RewardModel(classifier(), tiny_tokenizer(), **kwargs)


# From a folder


def saved(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def test_a_model_by_its_folder(tmp_path):
    model = classifier()
    path = saved(tmp_path / "rm", model)
    expected = RewardModel(model, tiny_tokenizer())(PROMPTS, COMPLETIONS)
    reward = load_reward(path)
    assert reward.name == path
    assert reward(PROMPTS, COMPLETIONS) == expected
    rewards = load_rewards([path, path], [1.0, -0.5], max_tokens=30)
    assert rewards.names == [path, path]
    assert rewards.functions[0].max_tokens == 30
    halves = [score / 2 for score in expected]
    assert rewards.score(PROMPTS, COMPLETIONS) == pytest.approx(halves, rel=1e-4, abs=1e-5)
    half = load_reward_model(path, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=0.2, abs=0.2)


def test_more_than_one_label(tmp_path):
    path = saved(tmp_path / "rm", classifier(labels=3))
    with pytest.raises(RunError) as error:
        load_reward(path, setting="rewards")
    assert str(error.value) == (
        f"rewards: {path}: a reward model has one label, and this has 3 (LABEL_0, LABEL_1, LABEL_2)"
    )


def test_a_language_model_is_no_reward_model(tmp_path):
    path = saved(tmp_path / "lm", tiny_model("llama"))
    with pytest.raises(ModelError) as error:
        load_reward_model(path)
    assert str(error.value) == (
        f"{path}: is no reward model: the checkpoint has no weights for score.weight"
    )


def test_folders_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="the folder holds no model: there is no config.json"):
        load_reward_model(str(tmp_path))
    path = saved(tmp_path / "rm", classifier())
    (tmp_path / "rm" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot load a sequence-classification model: "):
        load_reward_model(path)


def test_a_score_that_is_not_finite_names_the_rows(tmp_path):
    model = classifier()
    torch.nn.init.constant_(model.score.weight, float("nan"))
    with pytest.raises(RunError, match=r"judge returned nan, expected finite numbers \(rows 0 to"):
        Rewards(RewardModel(model, tiny_tokenizer(), name="judge")).score(PROMPTS, COMPLETIONS)
