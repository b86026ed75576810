"""The bandit of examples/: its definitions by hand and by brute force, and PLE's exact gradient."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PATH = Path(__file__).parent.parent / "examples/purity_bandit.py"
SPEC = importlib.util.spec_from_file_location("purity_bandit", PATH)
bandits = importlib.util.module_from_spec(SPEC)
sys.modules["purity_bandit"] = bandits
SPEC.loader.exec_module(bandits)

OPTIONS = {
    "PLE": {},
    "fixed": {"decay": 1.0},
    "ranking only": {"ranking_only": True},
    "absolute": {"absolute": True},
}


@pytest.mark.parametrize(
    "gap, right, threshold, members",
    [
        ((0.9, 0.5, 0.2), (True, False, True), 0.5, [0]),
        ((0.9, 0.5, 0.2), (True, True, False), 0.2, [0, 1]),
        ((0.9, 0.5, 0.2), (True, True, True), 0.0, [0, 1, 2]),
        # The policy's favourite is wrong: only the empty set is pure.
        ((0.9, 0.5, 0.2), (False, True, True), 0.9, []),
        # A tie with a wrong query stays out.
        ((0.5, 0.5, 0.9), (True, False, True), 0.5, [2]),
        # A wrong query whose plain response the policy prefers is in no level set.
        ((0.9, -0.5, 0.2), (True, False, True), 0.0, [0, 2]),
        ((-0.9, -0.5, -0.2), (True, False, True), 0.0, []),
    ],
)
def test_three_queries_by_hand(gap, right, threshold, members):
    gap, right = np.array(gap), np.array(right)
    e = bandits.purity_threshold(gap, right)
    assert e == threshold
    assert np.flatnonzero(bandits.level_set(gap, e)).tolist() == members


def test_a_run_of_three_queries_by_hand():
    # Gaps tanh(z / 2) of z = (2, 1, 0.5); the reward model has the second query wrong.
    bandit = bandits.Bandit(np.eye(3), np.array([1.0, 0.5, -1.0]), np.array([1.0, -0.5, -1.0]))
    run = bandits.simulate(bandit, np.array([2.0, 1.0, 0.5]), rounds=1, tau=0.8, decay=0.5)
    assert run.tau.tolist() == [0.8, 0.4]
    assert run.threshold[0] == pytest.approx(np.tanh(0.5))
    assert run.largest[0] == pytest.approx(np.tanh(1.0))
    assert run.pure[0].tolist() == [True, False, False]
    assert run.agreement[0] == pytest.approx(2 / 3)


def test_signed_and_absolute_level_sets():
    # The second query is wrong, and the policy prefers its plain response: outside L(0), inside
    # {|gap| > 0}.
    bandit = bandits.Bandit(np.eye(3), np.array([1.0, 0.5, -1.0]), np.array([1.0, -0.5, -1.0]))
    start = np.array([2.0, -1.0, 0.5])
    signed = bandits.simulate(bandit, start, rounds=1)
    absolute = bandits.simulate(bandit, start, rounds=1, absolute=True)
    assert signed.threshold[0] == 0 and signed.pure[0].tolist() == [True, False, True]
    assert absolute.threshold[0] == pytest.approx(np.tanh(0.5))
    assert absolute.pure[0].tolist() == [True, False, False]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("regime", bandits.REGIMES)
def test_purity_by_brute_force(regime, options, monkeypatch):
    seen = []
    threshold = bandits.purity_threshold

    def spy(gap, right):
        seen.append(gap)
        return threshold(gap, right)

    monkeypatch.setattr(bandits, "purity_threshold", spy)
    bandit, theta = bandits.make_bandit(regime, 0.7, 40, seed=3)
    run = bandits.simulate(bandit, theta, rounds=6, **options)
    right = [r * g > 0 for r, g in zip(bandit.reward_gap, bandit.true_gap, strict=True)]
    assert 0 < sum(right) < 40 and len(seen) == 7

    def pure(gap, e):
        return all(ok for value, ok in zip(gap, right, strict=True) if value > e)

    for gap, e, members in zip(seen, run.threshold, run.pure, strict=True):
        candidates = [0.0, *(value for value in gap if value > 0)]
        assert e == min(value for value in candidates if pure(gap, value))
        assert members.tolist() == [bool(value > e) for value in gap]
        assert all(pure(gap, value) for value in candidates if value > e)
        assert e == 0 or not pure(gap, np.nextafter(e, 0))


@pytest.mark.parametrize("tau", [-10.0, 0.3, 10.0])
@pytest.mark.parametrize("ranking_only", [False, True])
def test_the_gradient_is_that_of_ples_loss(tau, ranking_only):
    bandit, start = bandits.make_bandit("boundary", 0.5, 30, seed=1, memory=0.5)
    theta = torch.tensor(start, requires_grad=True)
    z = torch.tensor(bandit.features) @ theta
    guided, plain = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
    gap = torch.tensor(bandit.reward_gap)
    weights = torch.softmax(torch.stack([gap, torch.zeros_like(gap)]), 0)
    sft = -weights[0] * guided - weights[1] * plain
    loss = torch.where(gap > tau, torch.relu(plain - guided), 0 * sft if ranking_only else sft)
    (expected,) = torch.autograd.grad(loss.mean(), theta)
    actual = bandits.gradient(bandit, start, tau, ranking_only)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_the_regimes_differ_in_where_the_reward_model_errs(seed):
    noise = 0.5
    (near, first), (anywhere, same) = (
        bandits.make_bandit(regime, noise, 200, seed) for regime in bandits.REGIMES
    )
    assert (first == same).all() and (near.features == anywhere.features).all()
    assert (near.true_gap == anywhere.true_gap).all()
    wrong_near, wrong_anywhere = ~bandits.ranked_rightly(near), ~bandits.ranked_rightly(anywhere)
    assert 0 < wrong_near.sum() == wrong_anywhere.sum()
    assert np.abs(near.true_gap[wrong_near]).max() < noise
    assert np.abs(anywhere.true_gap[wrong_anywhere]).max() > noise


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("regime", bandits.REGIMES)
def test_the_bound_holds_and_assures_a_pure_set(regime, options):
    assured = 0
    for seed in range(4):
        bandit, theta = bandits.make_bandit(regime, 0.25, 80, seed)
        run = bandits.simulate(bandit, theta, rounds=20, **options)
        assert (run.threshold <= run.bound).all()
        sure = run.bound < run.largest
        assert run.pure.any(1)[sure].all()
        assured += sure.sum()
    if regime == "boundary":
        assert assured  # or the line above has checked nothing


def test_tau_decays_and_the_threshold_decides_the_branch():
    bandit, theta = bandits.make_bandit("boundary", 0.5, 50, seed=0)
    run = bandits.simulate(bandit, theta, rounds=5, tau=2.0, decay=0.5)
    assert run.tau.tolist() == [2.0, 1.0, 0.5, 0.25, 0.125, 0.0625]
    # At τ itself a pair is not ranked; just below it is, for here the policy prefers the plain one.
    tau = bandit.reward_gap.max()
    against = -bandit.features[bandit.reward_gap.argmax()]
    assert not bandits.gradient(bandit, against, tau, ranking_only=True).any()
    assert bandits.gradient(bandit, against, np.nextafter(tau, 0), ranking_only=True).any()
    # Ranking has a gradient only where the policy still prefers the plain response.
    all_ranked = bandits.gradient(bandit, theta, -np.inf, ranking_only=True)
    plain = bandit.features[bandit.features @ theta < 0]
    np.testing.assert_allclose(all_ranked, -plain.sum(0) / 50, rtol=1e-12)


def test_the_summary_counts_what_left():
    pure = np.array([[1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    grown = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], bool)
    zeros, ones = np.zeros(4), np.ones(4)
    runs = [bandits.Run(zeros, ones, ones, zeros, members, ones) for members in (pure, grown)]
    summary = bandits.summarise(runs)
    assert summary["exists"] == 6 / 8 and summary["always"] == 0 and summary["assured"] == 0
    assert summary["shrank"] == 1 / 6  # the last round of the first run
    assert summary["left"] == 2 / 6  # and its first, in which it grew
    assert summary["monotone"] == 1 / 2
    np.testing.assert_allclose(summary["pure set"], [0.25, 0.25])


def test_the_script_is_deterministic_and_draws(tmp_path, capsys):
    arguments = "--rounds 3 --queries 40 --seeds 2 --noise 0.3 0.8".split()
    outputs = []
    for number in range(2):
        bandits.main([*arguments, "--plot", str(tmp_path / f"{number}.png")])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == 5
    first, second = ((tmp_path / f"{number}.png").read_bytes() for number in range(2))
    assert first == second and first.startswith(b"\x89PNG")
    bandit, theta = bandits.make_bandit("everywhere", 0.3, 40, seed=0)
    other, _ = bandits.make_bandit("everywhere", 0.3, 40, seed=1)
    assert (bandit.true_gap != other.true_gap).any()


@pytest.mark.parametrize(
    "argument, value",
    [("rounds", 0), ("queries", -1), ("seeds", 0), ("noise", 0), ("noise", "nan"), ("decay", 0)],
)
def test_a_wrong_argument_is_named(argument, value, capsys):
    with pytest.raises(SystemExit):
        bandits.main([f"--{argument}", str(value)])
    error = capsys.readouterr().err
    assert f"--{argument} must be" in error and f"got {value}" in error
