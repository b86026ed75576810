"""The stand-ins with which TRL's own tests run: their shapes, and one test run as TRL's are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import one_thread  # noqa: F401
from trl_standins import save_model, standin_data, standin_ids

SUPPORT = Path(__file__).parent / "support"
ASK = [{"role": "user", "content": "Where is the river?"}]
A_TEST = """
import pytest
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

MODEL = "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"


def test_trains(tmp_path):
    pairs = load_dataset("trl-internal-testing/zen", "conversational_preference", split="train")
    config = DPOConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = DPOTrainer(MODEL, args=config, train_dataset=pairs)
    trainer.train()


def test_refused(tmp_path):
    texts = load_dataset("trl-internal-testing/zen", "standard_language_modeling", split="train")
    config = SFTConfig(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    with pytest.raises(ValueError):
        SFTTrainer(MODEL, args=config, train_dataset=texts)


def test_absent_model():
    AutoModelForCausalLM.from_pretrained("trl-internal-testing/small-one")


def test_absent_data():
    load_dataset("trl-internal-testing/zen-image", "conversational_preference")
"""


@pytest.mark.parametrize(
    "name",
    [
        "tiny-Qwen2ForCausalLM-2.5",
        "tiny-GptOssForCausalLM",
        "tiny-MistralForCausalLM-0.2",
        "tiny-Qwen2ForSequenceClassification-2.5",
    ],
)
def test_a_model_of_a_name(name, tmp_path, one_thread):  # noqa: F811
    from transformers import AutoConfig, AutoTokenizer

    assert standin_ids(f'"trl-internal-testing/{name}"') == {name}
    save_model(name, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert config.architectures == [name.split("-")[1]]
    assert config.vocab_size == len(tokenizer) and config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("the river, so")["input_ids"]) == "the river, so"
    if "Mistral" in name:
        assert tokenizer.pad_token is None and tokenizer.chat_template is None
    else:
        assert "river?" in tokenizer.apply_chat_template(ASK, tokenize=False)


def test_data_sets_have_trls_columns():
    columns = {
        ("zen", "standard_preference"): {"prompt", "chosen", "rejected"},
        ("zen", "conversational_implicit_prompt_preference"): {"chosen", "rejected"},
        ("zen", "standard_unpaired_preference"): {"prompt", "completion", "label"},
        ("zen", "conversational_language_modeling"): {"messages"},
        ("harmony", "preference"): {"prompt", "chosen", "rejected", "chat_template_kwargs"},
        ("toolcall", "preference"): {"prompt", "chosen", "rejected", "tools"},
    }
    for (name, config), expected in columns.items():
        data = standin_data(f"trl-internal-testing/{name}", config)
        assert set(data["train"].column_names) == expected and len(data["test"]) == 2
    assert standin_data("trl-internal-testing/zen-image", "conversational_preference") is None
    assert standin_data("someone/zen", "standard_preference") is None


def test_a_test_like_trls_runs_through_fuse(tmp_path):
    (tmp_path / "test_one.py").write_text(A_TEST)
    plugin = ["-p", "trl_upstream", "--fuse", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rsx", *plugin, "--rootdir=.", "test_one.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{SUPPORT}:{SUPPORT.parents[1]}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert "1 passed, 2 skipped, 1 xfailed" in found.stdout, found.stdout + found.stderr
    assert "fuse: 1 trainers; linear_token_logps: " in found.stdout
    assert "refused by fuse: trainer: fuse does not support label_smoothing_factor" in found.stdout
    assert "no stand-in: the data set trl-internal-testing/zen-image" in found.stdout
