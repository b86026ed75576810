"""Short training runs on a CPU: in one process, and under DDP, FSDP2 and ZeRO-3 with gloo.

``python distributed_worker.py FOLDER ENGINE PROCESSES CASE ...`` runs the cases one after the other
and writes ``FOLDER/results.pt``. The processes are forks, for what is imported takes longest.
"""

import gc
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from training import SETTINGS, Groups, noise_kwargs, random_groups, training_arguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import prefalign
from prefalign.attention import use_packed_attention
from prefalign.enhancement import EnhancementTrainer
from prefalign.models import head_arguments, with_head
from prefalign.ple_config import EnhancementSettings
from prefalign.references import reference_of, snapshot_reference
from prefalign.sft_trainer import SFTTrainer
from prefalign.trainer import PreferenceTrainer

WORLD, RANK = 1, 0  # set in each process

RATE = 0.05
# SGD, whose steps are the gradients: AdamW's do not show a factor that all gradients have. The norm
# is logged, and never clipped.
ARGUMENTS = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
    "save_strategy": "no",
    "disable_tqdm": True,
}
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # else it keeps weights this small whole
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
ENGINES = {
    "one": {},
    "ddp": {"ddp_backend": "gloo"},
    "fsdp2": {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2}},
    "zero3": {"use_cpu": False, "deepspeed": ZERO3},
}

TIED, UNTIED = "llama", "qwen2"
LORA = {"target_modules": ["q_proj", "down_proj"]}
LORA_ON_HEAD = {"target_modules": ["q_proj", "lm_head"]}
HEAD_SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}

TRAINERS = {
    "dpo, tied head": {"name": TIED, "evaluates": True},
    "dpo, accumulated": {"name": UNTIED, "arguments": {"gradient_accumulation_steps": 2}},
    "dpo, saved and resumed": {"name": UNTIED, "saves": True},
    "dpo, checkpointing": {"name": UNTIED, "arguments": {"gradient_checkpointing": True}},
    "noise-aware, tied head": {"name": TIED, "kind": "noise"},
    "noise-aware, exact threshold": {"name": UNTIED, "kind": "noise", "threshold": "exact"},
    "enhancement": {"name": UNTIED, "kind": "enhancement"},
    "sft": {"name": UNTIED, "kind": "sft"},
    "lora, adapter off": {"name": TIED, "lora": LORA, "reference": "off"},
    "lora, noise-aware, second adapter": {"name": UNTIED, "kind": "noise", "lora": LORA},
    "lora on the head": {"name": UNTIED, "lora": LORA_ON_HEAD, "reference": "off"},
    "lora on the head, second adapter": {"name": UNTIED, "lora": LORA_ON_HEAD},
    "head saved by peft": {"name": UNTIED, "lora": HEAD_SAVED},
}
LOOPS = {
    "loop, tied head": {"name": TIED},
    "loop, untied head": {"name": UNTIED},
    "loop, tied head in shards": {"name": TIED, "reshards": True},
    "loop, untied head in shards": {"name": UNTIED, "reshards": True},
    "loop, accelerate": {"name": UNTIED, "prepared": True},
}
TRL = {"trl, tied head": {"name": TIED}, "trl, untied head": {"name": UNTIED}}
CASES = TRAINERS | LOOPS | TRL


def run_trainer(engine, folder, *, name, kind="dpo", lora=None, reference="snapshot",
                threshold="rolling", arguments=None, evaluates=False, saves=False,
                resume=None):  # fmt: skip
    """Train for three steps of 8 groups."""
    model = started(name, lora)
    kwargs = {"trainer_class": PreferenceTrainer}
    if kind == "sft":
        kwargs = {"trainer_class": SFTTrainer}
    elif kind == "noise":
        kwargs = noise_kwargs(threshold=threshold)
    elif kind == "enhancement":
        kwargs = {"trainer_class": EnhancementTrainer, "threshold": 0.25}
        kwargs["enhancement"] = EnhancementSettings()
    trainer_class = kwargs.pop("trainer_class")
    if kind in ("dpo", "noise"):
        off = reference == "off"
        kwargs["reference"] = reference_of(model) if off else snapshot_reference(model)
    extras = ENGINES[engine] | (arguments or {})
    if evaluates:
        extras |= {"per_device_eval_batch_size": 8 // WORLD}
    if saves:
        extras |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
        extras |= {"optim": "adamw_torch"}  # which has something to be saved
    settings = replace(
        SETTINGS,
        batch_size=8 // extras.get("gradient_accumulation_steps", 1),
        max_tokens=24,  # some pairs are longer; the processes differ in their passes
        learning_rate=RATE / 10 if saves else RATE,
        warmup_ratio=0.0,
        arguments=ARGUMENTS | extras,
    )
    groups = [replace(g, extras={"rewards": [g.example_id / 12, 1]}) for g in random_groups(24)]
    made = training_arguments(
        settings, folder, num_groups=24, epochs=1, max_steps=3, num_processes=WORLD
    )
    trainer = trainer_class(
        model, made, Groups(groups), max_tokens=settings.max_tokens,
        eval_dataset=Groups(groups[:16]) if evaluates else None, **kwargs,
    )  # fmt: skip
    passes, in_step = [], trainer.passes_in_step

    def counted(batches):
        passes.append(len(batches))
        return in_step(batches)

    trainer.passes_in_step = counted
    trainer.train(resume_from_checkpoint=resume)
    found = seen(engine, trainer) | {"passes": every_process(passes)}
    if evaluates:
        found["eval_loss"] = trainer.evaluate()["eval_loss"]
    if saves:
        trainer.save_model(folder / "saved")
    return found


def seen(engine, trainer):
    """Return the weights and the log of a Trainer that has trained."""
    kinds = {"fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}
    kind = trainer.accelerator.distributed_type
    assert kind == kinds.get(engine, DistributedType.NO if WORLD == 1 else "MULTI_CPU")
    return {
        "weights": whole_weights(engine, trainer.accelerator.unwrap_model(trainer.model)),
        "logs": [log for log in trainer.state.log_history if "loss" in log],
    }


def started(name, lora):
    """Return a tiny model, with packed attention and, if asked, an adapter that does something."""
    model = tiny_model(name)
    use_packed_attention(model)
    if lora is None:
        return model
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **lora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if "lora_B" in each:
                parameter.normal_(std=0.1, generator=generator)
    return model


def run_loop(engine, folder, *, name, reshards=False, prepared=False, share=None):
    """Take a step in a loop of one's own: the model's forward pass, then the op with its head.

    Of 8 rows each process has its share, or that of process ``share[0]`` of ``share[1]``.
    """
    model = tiny_model(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    wrapped, optimizer = (prepare if prepared else wrap)(engine, model, optimizer)
    ids = torch.randint(3, 250, (8, 9), generator=torch.Generator().manual_seed(0))
    first, step = share or (RANK, WORLD)
    mine = ids[first::step]
    hidden = wrapped(input_ids=mine, output_hidden_states=True, use_cache=False).hidden_states[-1]
    if reshards and engine == "fsdp2":
        model.reshard()
        assert isinstance(model.lm_head.weight, DTensor)

    def token_logps(hidden, head):
        return prefalign.linear_token_logps(
            hidden, targets=mine[:, 1:], **head_arguments(head, hidden)
        )

    loss = -with_head(wrapped, hidden[:, :-1], token_logps).mean()
    if engine == "zero3":
        wrapped.backward(loss)
        wrapped.step()
    else:
        loss.backward()
        optimizer.step()
    mean = sum(every_process(loss.item())) / WORLD
    return {"weights": whole_weights(engine, model), "logs": [{"loss": mean}]}


def wrap(engine, model, optimizer):
    """Wrap a model as a loop without accelerate does."""
    if engine == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif engine == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        model = fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    elif engine == "zero3":
        import deepspeed

        config = {name: value for name, value in ZERO3.items() if value != "auto"}
        config |= {"train_micro_batch_size_per_gpu": 8 // WORLD, "gradient_clipping": 1e9}
        model = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return model, optimizer


def prepare(engine, model, optimizer):
    """Wrap a model as accelerate does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    cpu = {"cpu": True} if engine != "fsdp2" else {"fsdp_plugin": plugin}
    return Accelerator(**cpu).prepare(model, optimizer)


def run_trl(engine, folder, *, name):
    """Train TRL's DPOTrainer, fused, for three steps of 4 pairs."""
    import trl_runs

    from prefalign.integrations.trl import fuse

    settings = ARGUMENTS | ENGINES[engine] | {"learning_rate": RATE, "max_steps": 3}
    settings |= {"per_device_train_batch_size": 4 // WORLD, "gradient_checkpointing": False}
    trainer = trl_runs.build("DPO", folder, model=name, **settings)
    fuse(trainer)
    trainer.train()
    return seen(engine, trainer)


def whole_weights(engine, model):
    """Return every parameter whole, as all processes have it."""
    weights = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) == (engine == "fsdp2")
        assert hasattr(parameter, "ds_id") == (engine == "zero3")
        if engine == "fsdp2":
            whole = parameter.full_tensor()
        elif engine == "zero3":
            import deepspeed

            assert not parameter.numel()  # the others' shards are not here
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        else:
            whole = parameter
        weights[name] = whole.detach().clone()
        for other in every_process(weights[name]):
            assert torch.equal(weights[name], other), f"the processes differ in {name}"
    return weights


def every_process(thing):
    """Return what each process has."""
    if WORLD == 1:
        return [thing]
    things = [None] * WORLD
    dist.all_gather_object(things, thing)
    return things


def free():
    """Let go of what outlives a trainer: gloo hangs where a model outlives its process group."""
    unset_hf_deepspeed_config()  # else the next model is made in shards
    gc.collect()


def run(engine, folder, name):
    """Run a case."""
    function = run_trainer if name in TRAINERS else run_loop if name in LOOPS else run_trl
    found = function(engine, folder, **CASES[name])
    free()
    if CASES[name].get("saves"):
        resume = os.fspath(folder / "checkpoint-2")
        found["resumed"] = function(engine, folder, **CASES[name], resume=resume)["weights"]
        free()
    return found


def process(rank, world, folder, engine, names):
    """Run cases as one of the processes, or as the only one."""
    global WORLD, RANK
    WORLD, RANK = world, rank
    if world > 1:
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in place.items()}
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
    results = {name: run(engine, Path(folder) / str(i), name) for i, name in enumerate(names)}
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(folder, engine, world, *names):
    """Run cases in processes of their own."""
    if engine in ("fsdp2", "zero3"):
        # On a CPU accelerate leaves FSDP and DeepSpeed out; these processes pass for GPUs'.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    if engine == "zero3":
        import deepspeed

        # Its collectives for processes that share memory would be compiled first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if set(names) & set(TRL):
        from prefalign.integrations import trl  # noqa: F401
    arguments = (int(world), os.path.abspath(folder), engine, names)
    if arguments[0] == 1:
        process(0, *arguments)
    else:
        start_processes(process, arguments, nprocs=arguments[0], start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
