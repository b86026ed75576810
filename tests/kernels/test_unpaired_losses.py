"""The baselines of unpaired losses: KTO's KL estimate and BCO's running shift."""

import json
import math
import subprocess
import sys

import pytest
import torch
from prefalign.kernels.unpaired_loss import unpaired_loss
from prefalign.kernels.unpaired_losses import RunningShift, kl_baseline

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_baseline(dtype, device):
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-60 + 20 * torch.randn(2, 82, generator=generator)).to(device, dtype)
    policy, reference = policy[::2].requires_grad_(), reference[::2]
    mean = (policy.detach().double() - reference.double()).mean()
    assert mean != 0
    for given, wanted in (((policy, reference), mean), ((reference, policy), -mean)):
        found = kl_baseline(*given)
        assert found.shape == () and not found.requires_grad
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), wanted.clamp(min=0), rtol=1e-5, atol=1e-6)
    assert kl_baseline(policy[:0], reference[:0]) == 0


def test_kl_baseline_clamps_the_mean_and_not_its_terms():
    assert kl_baseline(torch.tensor([5.0, -2.0]), torch.zeros(2)) == 1.5
    assert kl_baseline(torch.tensor([-5.0, 2.0]), torch.zeros(2)) == 0


def test_kl_baseline_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^reference_kl_logps: expected shape \(3,\), got \(2,\)"):
        kl_baseline(torch.zeros(3), torch.zeros(2))
    with pytest.raises(TypeError, match="^policy_kl_logps: expected dtype .* got int64"):
        kl_baseline(torch.zeros(3).long(), torch.zeros(3))


def test_running_shift_is_the_mean_of_all_steps(device):
    generator = torch.Generator().manual_seed(0)
    steps = [3 * torch.randn(n, generator=generator).to(device) + 1 for n in (4, 1, 0, 7, 2)]
    shift, seen = RunningShift(device=device), []
    assert shift.value == 0 and shift.value.device.type == device.type
    for rewards in steps:
        seen.append(rewards)
        delta = shift.update(rewards.requires_grad_())
        assert delta.shape == () and not delta.requires_grad
        torch.testing.assert_close(delta, torch.cat(seen).double().mean().detach())
    assert torch.equal(shift.value, delta)
    logps = [torch.zeros(3, device=device)] * 2
    found = unpaired_loss(*logps, logps[0] > 0, loss_type="bco", baseline=delta)
    wanted = torch.nn.functional.softplus(-delta).float()
    torch.testing.assert_close(found.losses, wanted.expand(3))


def test_running_shift_leaves_out_what_is_not_finite():
    shift = RunningShift()
    shift.update(torch.tensor([1.0, math.inf, math.nan, 2.0, -math.inf]))
    assert shift.value == 1.5
    assert shift.update(torch.tensor([math.nan])) == 1.5
    with pytest.raises(ValueError, match=r"^rewards: expected 1 dimension\(s\), got shape \(\)"):
        shift.update(torch.tensor(1.0))


def test_running_shift_goes_on_from_its_state(tmp_path):
    whole, first, second = RunningShift(), RunningShift(), RunningShift()
    for steps, shift in ((3, whole), (3, first)):
        for step in range(steps):
            shift.update(torch.arange(1 + step) / 7)
    torch.save(first.state_dict(), tmp_path / "shift.pt")
    second.load_state_dict(torch.load(tmp_path / "shift.pt", weights_only=True))
    assert torch.equal(second.value, whole.value)
    for shift in (whole, second, first):
        shift.update(torch.tensor([0.3, 0.7]))
    assert torch.equal(second.value, whole.value) and second.value != 0
    with pytest.raises(ValueError, match="^state: expected the keys 'count' and 'total', got"):
        second.load_state_dict({"mean": torch.tensor(0.0)})


PROCESS = """
import json, sys
import torch
import torch.distributed as dist
from prefalign.kernels.unpaired_losses import RunningShift, kl_baseline

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
own = [dist.new_group([r]) for r in range(2)][rank]
logps = torch.tensor([[8.0], [1.0, 0.0, -1.0]][rank])
zeros = torch.zeros_like(logps)
found = [kl_baseline(logps, zeros), kl_baseline(logps, zeros, sync=False)]
found += [kl_baseline(logps, zeros, group=own), kl_baseline(-logps, zeros)]
shift, alone = RunningShift(), RunningShift(sync=False)
for step in range(2):
    found += [shift.update(logps + step), alone.update(logps + step)]
print(json.dumps([x.item() for x in found]))
dist.destroy_process_group()
"""


def test_baselines_over_processes_that_have_unlike_numbers_of_responses(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", PROCESS, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        first, second = (json.loads(worker.communicate(timeout=120)[0]) for worker in workers)
    finally:
        for worker in workers:
            worker.kill()
    assert first == [2, 8, 8, 0, 2, 8, 2.5, 8.5]
    assert second == [2, 0, 0, 0, 2, 0, 2.5, 0.5]
