"""What the trainers with SPA's and PLE's losses refuse, each with one error that names it."""

import sys

import pytest
from tiny_models import one_thread as one_thread
from tiny_models import tiny_model
from trl_runs import PAIRS

from prefalign.errors import ModelError
from prefalign.integrations import trl as integration
from prefalign.integrations.trl import unfuse

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'prefalign[trl]'")
if not trl.__version__.startswith(tuple(f"{version}." for version in integration.TESTED)):
    pytest.skip(f"TRL {trl.__version__} is not supported", allow_module_level=True)

from trl_pairs import ARGUMENTS, SCORED, TRAINERS, build  # noqa: E402
from trl_pairs import trls_op_runs_on_a_cpu as trls_op_runs_on_a_cpu  # noqa: E402

NOT_DPOS = [
    ("loss_type", ["hinge"]),
    ("loss_type", ["sigmoid", "sft"]),
    ("loss_weights", [0.5]),
    ("label_smoothing", 0.1),
    ("ld_alpha", 0.5),
    ("f_divergence_type", "forward_kl"),
    ("use_weighting", True),
]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("name, value", NOT_DPOS)
def test_settings_of_dpos_loss_are_refused(tmp_path, kind, name, value):
    with pytest.raises(
        ValueError, match=rf"^{name}: {kind.title()}.*DPOTrainer does not"
    ) as caught:
        build(kind, tmp_path, **{name: value})
    assert repr(value) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, value",
    [("beta", 0.5), ("sync_ref_model", True), ("precompute_ref_log_probs", True)],
)
def test_settings_of_a_reference_are_refused_where_there_is_none(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name}: EnhancementDPOTrainer does not"):
        build("enhancement", tmp_path, **{name: value})


def test_a_reference_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="^ref_model: .* has no reference.*got a LlamaForCausalLM"):
        build("enhancement", tmp_path, ref_model=tiny_model("llama"))


@pytest.mark.parametrize("value", [None, "high", float("nan")])
@pytest.mark.parametrize("where", ["train", "eval", "later"])
def test_rows_without_a_reward_are_refused(tmp_path, where, value):
    from datasets import Dataset

    bad = [{**row, "rejected_reward": value} for row in SCORED]
    message = rf"^rejected_reward: expected a column with a number in every row, got {value!r}"
    if where == "later":
        if isinstance(value, str):
            return  # no column has both
        trainer = build("enhancement", tmp_path, rows=[*SCORED[:4], bad[4]])
        with pytest.raises(ValueError, match=message):
            trainer.train()
        return
    settings = (
        {"rows": bad} if where == "train" else {"eval_dataset": {"a": Dataset.from_list(bad)}}
    )
    with pytest.raises(ValueError, match=message):
        build("enhancement", tmp_path, **settings)


def test_rows_without_the_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^chosen_reward: expected a column"):
        build("enhancement", tmp_path, rows=PAIRS)


def test_extrapolation_from_log_probs_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^precompute_ref_log_probs: .*noise_extrapolation=0;"):
        build("noise", tmp_path, precompute_ref_log_probs=True)


def test_a_reference_of_another_head_is_refused(tmp_path):
    reference = tiny_model("llama", hidden_size=48)
    with pytest.raises(ModelError, match=r"^ref_model: expected .*\(259, 32\).*got \(\(259, 48\)"):
        build("noise", tmp_path, ref_model=reference)
    build("noise", tmp_path, ref_model=reference, noise_extrapolation=0.0)


@pytest.mark.parametrize(
    "kind, name, value",
    [
        ("noise", "noise_alpha", 0.6),
        ("noise", "noise_alpha", float("nan")),
        ("noise", "noise_alpha_warmup", -0.1),
        ("noise", "noise_quantile", 1.5),
        ("noise", "noise_extrapolation", -1.0),
        ("noise", "noise_window", 1),
        ("enhancement", "enhancement_threshold", float("nan")),
        ("enhancement", "enhancement_step_decay", 0.0),
        ("enhancement", "enhancement_temperature", 0.0),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {value!r}$"):
        TRAINERS[kind][1](output_dir=str(tmp_path), **ARGUMENTS, **{name: value})


@pytest.mark.parametrize("name", ["ranking", "sft"])
def test_unknown_forms_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: expected one of .*mean"):
        build("enhancement", tmp_path, **{f"enhancement_{name}": "median"})


@pytest.mark.parametrize("kind", TRAINERS)
def test_another_config_is_refused(kind):
    trainer_class, config_class, *_ = TRAINERS[kind]
    with pytest.raises(TypeError, match=f"expected a {config_class.__name__}, got a DPOConfig"):
        trainer_class(tiny_model("llama"), args=trl.DPOConfig(**ARGUMENTS))


@pytest.mark.parametrize("kind", TRAINERS)
def test_another_version_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"TRL 1\.17\.0 .* pip install 'trl==1\.16\.\*'"):
        build(kind, tmp_path)


def test_without_trl_it_says_so(monkeypatch):
    for name in ("trl", "prefalign.integrations._trl_pairs"):
        monkeypatch.setitem(sys.modules, name, None) if name == "trl" else monkeypatch.delitem(
            sys.modules, name
        )
    with pytest.raises(ImportError, match=r"pip install 'prefalign\[trl\]'"):
        import prefalign.integrations._trl_pairs  # noqa: F401


def test_unfused_it_says_so(tmp_path):
    trainer = build("noise", tmp_path)
    unfuse(trainer)
    with pytest.raises(ModelError, match="NoiseAwareDPOTrainer takes its log-probs from the fused"):
        trainer.train()
