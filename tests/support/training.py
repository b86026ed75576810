"""Small training runs: pairs of random tokens, a tiny model, and a worker for several processes."""

import gc
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from prefalign.kernels.preference_loss import preference_loss
from prefalign.kernels.sequence_logps import sequence_logps
from tiny_models import tiny_model

from prefalign.attention import use_packed_attention
from prefalign.config import TrainingSettings
from prefalign.models import response_token_logps
from prefalign.noise_aware import NoiseAwareTrainer
from prefalign.packed_trainer import Groups, MetricsCallback, training_arguments
from prefalign.packing import Group
from prefalign.references import snapshot_reference
from prefalign.spa_config import NoiseSettings
from prefalign.trainer import CHOSEN, REJECTED, PreferenceTrainer

SETTINGS = TrainingSettings(
    learning_rate=1e-3, batch_size=4, max_tokens=48, logging_steps=1, save_steps=2
)


def random_groups(count, seed=0, extras=None):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        n = torch.randint(low, high, (), generator=generator)
        return torch.randint(3, 250, (n,), generator=generator).tolist()

    return [Group(ids(2, 6), [ids(1, 9), ids(1, 9)], i, extras or {}) for i in range(count)]


def model_and_reference(seed=0, dtype=torch.float32):
    model = tiny_model("llama", dtype=dtype, seed=seed)
    use_packed_attention(model)
    return model, snapshot_reference(model)


def train(tmp_path, groups, trainer_class=PreferenceTrainer, settings=SETTINGS, **kwargs):
    model, reference = model_and_reference(dtype=kwargs.pop("dtype", torch.float32))
    logs = []
    arguments = training_arguments(
        settings,
        tmp_path,
        num_groups=len(groups),
        epochs=kwargs.pop("epochs", 1),
        max_steps=kwargs.pop("max_steps", None),
    )
    resume = kwargs.pop("resume", None)
    if issubclass(trainer_class, PreferenceTrainer):
        kwargs.setdefault("reference", reference)
    trainer = trainer_class(
        model,
        arguments,
        Groups(groups),
        max_tokens=settings.max_tokens,
        callbacks=[
            MetricsCallback(lambda step, log: logs.append(log)),
            *kwargs.pop("callbacks", []),
        ],
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, logs


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def eager_sum(model, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logps[rows, torch.tensor(response)].sum()


def dpo_losses(model, batches, reference):
    """Return the loss of each pair of several batches."""
    sums = []
    for batch in batches:
        logps = response_token_logps(model, batch, through_wrapper=True)
        sums.append(sequence_logps(logps, cu_seqlens=batch.cu_targets).sums)
    policy = torch.cat(sums).double()
    split = policy[CHOSEN], policy[REJECTED], reference[CHOSEN], reference[REJECTED]
    return preference_loss(*split, beta=0.1).losses


def with_reference_logps(groups):
    """Return the groups with the log-probs that the untrained model gives their responses."""
    model = tiny_model("llama")
    with torch.no_grad():
        return [
            replace(
                group,
                extras={
                    "reference_logps": [
                        eager_sum(model, group.prompt_ids, ids).item() for ids in group.response_ids
                    ]
                },
            )
            for group in groups
        ]


NOISE = NoiseSettings(alpha=0.3, alpha_warmup=0.25, quantile=0.25, window=4)


def noise_kwargs(**changes):
    noise = NoiseSettings(**{**vars(NOISE), **changes})
    return {"trainer_class": NoiseAwareTrainer, "noise": noise, "extrapolation": 0.5}


def main(folder, kind):
    """Train as one of the processes of a launcher; the first writes ``result.pt``."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    budget = 14 if kind == "split" else SETTINGS.max_tokens  # some pairs are longer, some are not
    settings = replace(
        SETTINGS, max_tokens=budget, arguments={"ddp_backend": "gloo"} if world > 1 else {}
    )
    logs = []
    model, reference = model_and_reference()
    kwargs = noise_kwargs() if kind == "noise" else {"trainer_class": PreferenceTrainer}
    trainer_class = kwargs.pop("trainer_class")
    arguments = training_arguments(
        settings, f"{folder}/checkpoints", num_groups=16, epochs=2, num_processes=world
    )
    trainer = trainer_class(
        model,
        arguments,
        Groups(random_groups(16)),
        max_tokens=settings.max_tokens,
        reference=reference,
        callbacks=[MetricsCallback(lambda step, log: logs.append(log))],
        **kwargs,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({"weights": weights(trainer), "logs": logs}, f"{folder}/result.pt")
    if world > 1:
        # Gloo waits forever where DDP's reducer outlives its process group.
        del trainer, model, reference
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
