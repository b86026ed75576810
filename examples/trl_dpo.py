"""TRL's DPO with one line more, `fuse(trainer)`: no tensor of tokens times vocabulary is made.

    python examples/trl_dpo.py --model_name_or_path ./sft-model --dataset_name ./pairs \
        --output_dir ./dpo-model --learning_rate 5e-7 --use_peft

Arguments are TRL's own (`--help` lists them). `--fuse false` runs the same without the line, to
compare. Needs `pip install 'prefalign[trl]'`.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from prefalign.integrations.trl import fuse


@dataclass
class Arguments(ScriptArguments):
    """TRL's, and whether to fuse."""

    fuse: bool = field(default=True, metadata={"help": "Compute log-probs with prefalign."})


def main(arguments: list[str] | None = None) -> DPOTrainer:
    parser = TrlParser((Arguments, DPOConfig, ModelConfig))
    script, config, model = parser.parse_args_and_config(arguments)
    trainer = DPOTrainer(
        model.model_name_or_path,
        args=config,
        train_dataset=load_dataset(script.dataset_name, split=script.dataset_train_split),
        peft_config=get_peft_config(model),
    )
    if script.fuse:
        fuse(trainer)
    trainer.train()
    trainer.save_model(config.output_dir)
    return trainer


if __name__ == "__main__":
    main()
