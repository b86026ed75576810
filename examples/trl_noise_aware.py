"""SPA's training with TRL: DPO on labels that the model gave itself, the doubtful ones smoothed.

    python examples/trl_noise_aware.py --model_name_or_path ./sft-model --dataset_name ./labelled \
        --output_dir ./spa-1 --learning_rate 5e-7 --noise_extrapolation 0.5 --use_peft

Rows are TRL's: `prompt`, `chosen`, `rejected`. Arguments are TRL's own and those of the noise-aware
loss (`--help` lists them). `prefalign spa` also samples the responses and labels them. Needs
`pip install 'prefalign[trl]'`.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from prefalign.integrations.trl_trainers import NoiseAwareDPOConfig, NoiseAwareDPOTrainer


def main(arguments: list[str] | None = None) -> NoiseAwareDPOTrainer:
    parser = TrlParser((ScriptArguments, NoiseAwareDPOConfig, ModelConfig))
    script, config, model = parser.parse_args_and_config(arguments)
    trainer = NoiseAwareDPOTrainer(
        model.model_name_or_path,  # the reference, too: a copy, or the model without its adapter
        args=config,
        train_dataset=load_dataset(script.dataset_name, split=script.dataset_train_split),
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model(config.output_dir)
    return trainer


if __name__ == "__main__":
    main()
