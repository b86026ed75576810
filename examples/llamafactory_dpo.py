"""LLaMA-Factory's DPO without logits: what ``llamafactory-cli train dpo.yaml`` does, by this op.

    python examples/llamafactory_dpo.py dpo.yaml
    torchrun --nproc-per-node 4 examples/llamafactory_dpo.py dpo.yaml

LLaMA-Factory (here 0.9.5) has a DPO trainer of its own, on TRL 0.18 to 0.24, whose losses
(``pref_loss``: sigmoid, hinge, ipo, kto_pair, orpo, simpo) all begin with log-probs that one method
takes from the logits. This gives that method another body; data, arguments and losses stay
LLaMA-Factory's. ``logits/chosen`` and ``logits/rejected`` become means over the responses' tokens,
from means over prompts and padding too; ``ld_alpha``, FSDP and ZeRO-3 are not supported.

LLaMA-Factory asks for transformers of at most 5.6, prefalign for 5.10. What is used here works with
5.6 too: ``pip install --no-deps prefalign`` leaves LLaMA-Factory's in place.
"""

from typing import Any

import torch
from torch import Tensor

from prefalign import linear_token_logps
from prefalign._head import head_arguments, read_head
from prefalign.attention import causal_lm


def last_hidden(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the backbone's hidden states ``[B, S, D]``, through whatever is around the model."""
    states = []
    backbone = causal_lm(model).base_model
    hook = backbone.register_forward_hook(lambda module, args, output: states.append(output[0]))
    try:
        model(**inputs, return_dict=True, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return states[0]


def without_logits(trainer_class: type) -> Any:
    """Return LLaMA-Factory's DPO trainer with a forward pass that makes no logits."""

    class WithoutLogits(trainer_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if self.ld_alpha is not None or self.is_fsdp_enabled:
                raise ValueError("ld_alpha and FSDP are not supported here: leave them out")

        def concatenated_forward(
            self, model: torch.nn.Module, batch: dict[str, Tensor], is_ref_model: bool = False
        ) -> dict[str, Tensor]:
            inputs = dict(batch)
            labels = inputs.pop("labels")[:, 1:]
            scored = labels != -100
            rows = last_hidden(model, inputs)[:, :-1][scored]
            found = linear_token_logps(
                rows,
                targets=labels[scored],
                outputs=["mean_logits"],
                **head_arguments(read_head(model), rows),
            )
            sequences = scored.nonzero()[:, 0]  # whose token it is
            lengths = scored.sum(1)
            sums = found.logps.new_zeros(len(labels)).index_add(0, sequences, found.logps)
            means = sums / lengths
            logps = means if self.loss_type in ("ipo", "orpo", "simpo") else sums
            chosen, rejected = logps.chunk(2)
            first = sequences < len(labels) // 2
            return {
                "chosen_logps": chosen,
                "rejected_logps": rejected,
                "chosen_logits": found.mean_logits[first],
                "rejected_logits": found.mean_logits[~first],
                "chosen_logps_avg": means.chunk(2)[0],
            }

    return WithoutLogits


def main() -> None:
    from llamafactory.train.dpo import trainer
    from llamafactory.train.tuner import run_exp

    trainer.CustomDPOTrainer = without_logits(trainer.CustomDPOTrainer)
    run_exp()


if __name__ == "__main__":
    main()
