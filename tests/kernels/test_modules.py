"""The module forms give what the functions give."""

import torch
from prefalign.kernels import modules
from prefalign.kernels.enhancement_loss import enhancement_loss
from prefalign.kernels.linear_token_logps import linear_token_logps
from prefalign.kernels.noise_aware_loss import noise_aware_loss
from prefalign.kernels.pairwise_preference_logits import pairwise_preference_logits
from prefalign.kernels.preference_loss import preference_loss
from prefalign.kernels.sequence_logps import sequence_logps
from prefalign.kernels.token_logps import token_logps


def test_token_logps():
    logits, targets = torch.randn(3, 5), torch.tensor([1, -100, 4])
    module = modules.TokenLogps(temperature=0.5, outputs=["entropy"])
    expected = token_logps(logits, targets, temperature=0.5, outputs=["entropy"])
    assert torch.equal(module(logits, targets).entropy, expected.entropy)
    assert "temperature=0.5" in repr(module)


def test_linear_token_logps_takes_its_tensors_in_ligers_order():
    weight, hidden, bias = torch.randn(7, 4), torch.randn(3, 4), torch.randn(7)
    targets = torch.tensor([1, -100, 6])
    module = modules.LinearTokenLogps(logit_scale=0.5, softcap=3.0)
    expected = linear_token_logps(hidden, weight, targets, bias=bias, logit_scale=0.5, softcap=3.0)
    assert torch.equal(module(weight, hidden, targets, bias), expected)


def test_sequence_logps():
    logps, cu = torch.randn(6), torch.tensor([0, 2, 6])
    mask = torch.tensor([1, 0, 1, 1, 1, 0]).bool()
    for got, want in zip(
        modules.SequenceLogps()(logps, cu, mask),
        sequence_logps(logps, cu_seqlens=cu, mask=mask),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_losses():
    logps, weights = torch.randn(6, 4), torch.rand(4)
    found = modules.PreferenceLoss(beta=0.3, label_smoothing=0.1)(*logps[:4], weights)
    expected = preference_loss(*logps[:4], beta=0.3, label_smoothing=0.1, weights=weights)
    assert torch.equal(found.losses, expected.losses)
    found = modules.NoiseAwareLoss(beta=0.3)(*logps, alpha=0.2, threshold=0.6, weights=weights)
    expected = noise_aware_loss(*logps, beta=0.3, alpha=0.2, threshold=0.6, weights=weights)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.is_noisy, expected.is_noisy)


def test_enhancement_loss():
    plain, guided, rewards, others = torch.randn(4, 6)
    lengths = torch.tensor([3, 1, 4, 1, 5, 9])
    module = modules.EnhancementLoss(ranking="logistic", sft="sum", temperature=0.5)
    found = module(plain, guided, rewards, others, lengths, lengths.flip(0), threshold=0.1)
    expected = enhancement_loss(
        plain,
        guided,
        rewards,
        others,
        plain_lengths=lengths,
        guided_lengths=lengths.flip(0),
        threshold=0.1,
        ranking="logistic",
        sft="sum",
        temperature=0.5,
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "ranking='logistic'" in repr(module)


def test_pairwise_preference_logits():
    policy, reference = torch.randn(2, 5)
    module = modules.PairwisePreferenceLogits(beta=0.3, layout="flat")
    expected = pairwise_preference_logits(
        policy, reference, group_sizes=[2, 3], beta=0.3, layout="flat"
    )
    assert torch.equal(module(policy, reference, [2, 3]), expected)
    assert torch.equal(module(policy, reference, None, torch.tensor([0, 2, 5])), expected)
