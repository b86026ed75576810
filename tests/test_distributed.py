"""DDP, FSDP2 and DeepSpeed's ZeRO-3 over two and four processes against one, on a CPU with gloo.

A launch runs many cases, and is made once, whichever tests ask for it.
"""

import os
import subprocess
import sys

import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import is_deepspeed_available
from filelock import FileLock
from safetensors.torch import load_file
from tiny_models import one_thread as one_thread
from tiny_models import tiny_model
from torch.distributed.fsdp import fully_shard

import prefalign
from prefalign.attention import use_packed_attention
from prefalign.errors import ModelError
from prefalign.models import can_share_prompts, head_arguments, read_head

SHARDED = ("fsdp2", "zero3")
# With four processes, a case of each kind.
OF_FOUR = {
    "dpo, tied head",
    "noise-aware, exact threshold",
    "lora on the head",
    "loop, untied head",
    "loop, tied head in shards",
}
# float32 sums in another order: 4e-6 of a step at most was measured, 1e-6 of a logged number.
TOLERANCE = 1e-5


def cases_of(engine, processes):
    """Return the cases of a launch."""
    return [
        name
        for name in worker.CASES
        if processes < 4 or name in OF_FOUR
        if engine in ("one", "fsdp2") or not name.endswith("in shards")
        if engine != "zero3" or name != "loop, accelerate"
    ]


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """Return the results of a launch, which the first test to ask for it makes, of all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def launch(engine, processes):
        if engine == "zero3" and not is_deepspeed_available():
            pytest.skip("DeepSpeed is not installed")
        folder = base / f"distributed-{engine}-{processes}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                run(folder, engine, processes)
        assert (folder / "results.pt").exists(), (folder / "printed").read_text()[-3000:]
        return torch.load(folder / "results.pt"), folder

    return launch


def run(folder, engine, processes):
    """Run the worker, which leaves what it prints in the folder."""
    command = [sys.executable, worker.__file__, folder, engine, str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "printed", "w") as printed:
        subprocess.run(
            [*command, *cases_of(engine, processes)],
            env=environment | {"DS_ACCELERATOR": "cpu"},
            stdout=printed,
            stderr=subprocess.STDOUT,
            timeout=400,
        )


def start_of(case):
    """Return the weights that a case starts from."""
    model = worker.started(case["name"], case.get("lora"))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def distances(ours, theirs, start):
    """Return each parameter's distance from another run's, and how far that one went."""
    assert ours.keys() == theirs.keys()
    return {
        name: ((ours[name] - x).norm().item(), (x - start.get(name, x)).norm().item())
        for name, x in theirs.items()
    }


def launches():
    for engine in ("ddp", *SHARDED):
        for processes in (2, 4):
            for name in cases_of(engine, processes):
                yield pytest.param(engine, processes, name, id=f"{engine}-{processes}-{name}")


@pytest.mark.parametrize("engine, processes, name", launches())
def test_several_processes_equal_one(engine, processes, name, launched):
    case = worker.CASES[name]
    one, found = launched("one", 1)[0][name], launched(engine, processes)[0][name]
    assert len(found["logs"]) == len(one["logs"]) > 0
    for ours, theirs in zip(found["logs"], one["logs"], strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "noise/threshold"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE, abs=TOLERANCE), key
    if "eval_loss" in one:
        assert found["eval_loss"] == pytest.approx(one["eval_loss"], rel=TOLERANCE)
    apart = distances(found["weights"], one["weights"], start_of(case))
    moved = sum(went**2 for _, went in apart.values()) ** 0.5
    assert moved > 0.01
    assert sum(gap**2 for gap, _ in apart.values()) ** 0.5 < TOLERANCE * moved
    if not case.get("saves"):  # AdamW divides rounding by rounding where a gradient is 0
        for each, (gap, went) in apart.items():
            size = one["weights"][each].norm().item()
            assert gap <= TOLERANCE * went + torch.finfo(torch.float32).eps * size, each
    if "passes" in found and "accumulated" not in name:
        assert len(set(map(tuple, found["passes"]))) > 1  # each process had its own number


@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
@pytest.mark.parametrize("name", ["loop, tied head", "loop, untied head"])
def test_gradients_synchronise(engine, name, launched):
    """One step on different rows: what a process's own gradients give is far from what is there."""
    found = launched(engine, 2)[0][name]["weights"]
    start = start_of(worker.CASES[name])
    union = launched("one", 1)[0][name]["weights"]
    for each, (gap, went) in distances(found, union, start).items():
        assert gap <= TOLERANCE * went + torch.finfo(torch.float32).eps * start[each].norm(), each
    for process in (0, 1):
        alone = worker.run_loop("one", None, **worker.CASES[name], share=(process, 2))["weights"]
        for each, (gap, went) in distances(found, alone, start).items():
            assert gap > 0.1 * went > 0, each


@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_a_run_is_saved_whole_and_resumed(engine, launched):
    results, folder = launched(engine, 2)
    name = "dpo, saved and resumed"
    found = results[name]
    for each, weight in found["weights"].items():
        torch.testing.assert_close(found["resumed"][each], weight, rtol=0, atol=1e-6)
    place = folder / str(cases_of(engine, 2).index(name))
    for each, weight in load_file(place / "saved/model.safetensors").items():
        torch.testing.assert_close(weight, found["resumed"][each], rtol=0, atol=0)
    assert sorted(path.name for path in place.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]


def test_a_shard_is_refused_by_name(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        head = fully_shard(torch.nn.Linear(4, 8, bias=False))
        hidden, targets = torch.randn(3, 4), torch.tensor([0, 1, 2])
        with pytest.raises(TypeError, match="weight: expected a whole .* DTensor.*with_head"):
            prefalign.linear_token_logps(hidden, head.weight, targets)
    finally:
        dist.destroy_process_group()


def test_what_zero3_divided_is_refused_where_it_would_be_read():
    """Outside of ``with_head``; and prompts are not tried before an engine has the model."""
    model = tiny_model("qwen2")
    use_packed_attention(model)
    for parameter in model.parameters():
        parameter.ds_id, parameter.data = 0, torch.empty(0)
    with pytest.raises(ModelError, match="divided by ZeRO-3, expected it within with_head"):
        head_arguments(read_head(model), torch.randn(3, 32))
    assert "was divided by ZeRO-3 before it could be tried" in can_share_prompts(model)
