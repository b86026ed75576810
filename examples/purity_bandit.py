"""PLE's theory on a bandit small enough to enumerate: whether a level set is pure, and grows.

Each of X queries has two responses, a plain y and a guided y^p. A policy has one logit a query,
z(x) = log π(y^p|x) - log π(y|x), so its gap is π(y^p|x) - π(y|x) = tanh(z / 2). The optimum is
π* ∝ exp(reward), whose gap is tanh(g / 2) where g is the true reward gap; a reward model R sees
another gap. A query is ranked rightly by R when the signs of the two gaps agree. Then

    level set         L(e, π, R) = {x : π(y^p|x) - π(y|x) > e},                0 <= e
    pure              R ranks every query of it rightly (the empty set is pure, to no use)
    purity threshold  the smallest e whose level set is pure: 0, or the largest gap of a wrong query

Two reward models with equally many wrong queries: `boundary` adds noise of at most ε to the gap, so
that only queries with a true gap below ε are wrong; `everywhere` flips as many queries at random.

The policy is linear in features shared by the queries, and trained as PLE does: where R's gap
exceeds τ, max(0, log π(y|x) - log π(y^p|x)); elsewhere SFT on both, weighted by softmax(R); after
each round τ ← α τ. Gradients are exact. What came out is in docs/purity_bandit.md.

    python examples/purity_bandit.py --plot purity_bandit.png
"""

import argparse
from typing import NamedTuple

import numpy as np

REGIMES = ("boundary", "everywhere")
FEATURES, STEPS, LEARNING_RATE = 8, 10, 0.1  # steps of gradient descent in a round
GAP_SCALE, GAP_MEAN = 1.5, 0.5  # y^p is the better response of some 63 % of queries
START_COSINE = 0.5  # of the first policy's direction with the true reward's


class Bandit(NamedTuple):
    """Queries as ``features`` [X, F]; ``true_gap`` and ``reward_gap`` [X], y^p's less y's."""

    features: np.ndarray
    true_gap: np.ndarray
    reward_gap: np.ndarray


class Run(NamedTuple):
    """Readings before each round and after the last: [rounds + 1], ``pure`` [rounds + 1, X]."""

    tau: np.ndarray
    threshold: np.ndarray  # purity threshold
    bound: np.ndarray  # see threshold_bound
    largest: np.ndarray  # the largest gap of any query: the bound says something below it
    pure: np.ndarray  # members of the level set at the purity threshold
    agreement: np.ndarray  # share of queries on which the policy prefers what the optimum prefers


def level_set(gap, e):
    return gap > e


def ranked_rightly(bandit):
    return np.sign(bandit.reward_gap) == np.sign(bandit.true_gap)


def purity_threshold(gap, right):
    return max(0.0, gap[~right].max(initial=0.0))


def threshold_bound(bandit, gap, right):
    """At most this: the optimum's gap at the wrong query of largest true gap, plus sup |π - π*|."""
    worst = np.abs(bandit.true_gap[~right]).max(initial=0.0)
    return np.tanh(worst / 2) + np.abs(gap - np.tanh(bandit.true_gap / 2)).max()


def make_bandit(regime, noise, queries, seed, memory=0.0):
    """Return a bandit and the first policy; of one seed, the regimes differ in R alone."""
    draw = np.random.default_rng(seed)
    shared = draw.normal(size=(queries, FEATURES))
    truth, other = draw.normal(size=(2, FEATURES))
    truth /= np.linalg.norm(truth)
    other -= other @ truth * truth
    other /= np.linalg.norm(other)
    true_gap = GAP_SCALE * (shared @ truth) + GAP_MEAN
    reward_gap = true_gap + draw.uniform(-noise, noise, queries)
    if regime == "everywhere":
        wrong = np.count_nonzero(np.sign(reward_gap) != np.sign(true_gap))
        flip = draw.permutation(queries)[:wrong]
        reward_gap = true_gap.copy()
        reward_gap[flip] *= -1
    own = memory * np.eye(queries) if memory else np.empty((queries, 0))
    features = np.hstack([shared, np.ones((queries, 1)), own])
    theta = np.zeros(features.shape[1])
    theta[:FEATURES] = START_COSINE * truth + np.sqrt(1 - START_COSINE**2) * other
    return Bandit(features, true_gap, reward_gap), theta


def gradient(bandit, theta, tau, ranking_only=False):
    """Of the mean over queries of PLE's loss, by ``theta`` [F]."""
    z = bandit.features @ theta
    rank = -(z < 0).astype(float)
    sft = (np.tanh(z / 2) - np.tanh(bandit.reward_gap / 2)) / 2  # σ(z) - softmax(R)'s weight
    by_logit = np.where(bandit.reward_gap > tau, rank, 0.0 if ranking_only else sft)
    return bandit.features.T @ by_logit / len(z)


def simulate(bandit, theta, *, rounds, tau=2.0, decay=0.85, ranking_only=False, absolute=False):
    """Train from ``theta``; ``absolute`` reads level sets as |π(y^p|x) - π(y|x)| > e."""
    right, readings = ranked_rightly(bandit), []
    for done in range(rounds + 1):
        gap = np.tanh(bandit.features @ theta / 2)
        agreement = np.mean(np.sign(gap) == np.sign(bandit.true_gap))
        bound = threshold_bound(bandit, gap, right)
        gap = np.abs(gap) if absolute else gap
        e = purity_threshold(gap, right)
        readings.append((tau, e, bound, gap.max(), level_set(gap, e), agreement))
        if done < rounds:
            for _ in range(STEPS):
                theta = theta - LEARNING_RATE * gradient(bandit, theta, tau, ranking_only)
            tau *= decay
    return Run(*map(np.array, zip(*readings, strict=True)))


def summarise(runs):
    """Return what the table shows, by column: shares, or a pair of means, first and last."""
    pure = np.array([run.pure for run in runs])  # [seeds, rounds + 1, X]
    exists = pure.any(2)
    shrank = np.diff(pure.sum(2), axis=1) < 0
    left = (pure[:, :-1] & ~pure[:, 1:]).any(2)
    return {
        "exists": exists.mean(),  # rounds with a pure level set that is not empty
        "always": exists.all(1).mean(),  # runs in which every round has one
        "assured": np.mean([run.bound < run.largest for run in runs]),
        "threshold": np.mean([run.threshold[[0, -1]] for run in runs], 0),
        "pure set": pure.mean(2)[:, [0, -1]].mean(0),
        "agreement": np.mean([run.agreement[[0, -1]] for run in runs], 0),
        "shrank": shrank.mean(),  # rounds after which the pure set is smaller
        "left": left.mean(),  # rounds after which some query is no longer in it
        "monotone": (~left.any(1)).mean(),  # runs in which no query ever left
    }


def table(results):
    """Return the lines of the table: ``results`` is {(regime, noise): (wrong share, runs)}."""
    rows = []
    for (regime, noise), (wrong, runs) in results.items():
        row = {"regime": regime, "noise": f"{noise:g}", "wrong": f"{wrong:.3f}"}
        for name, value in summarise(runs).items():
            row[name] = "{:.3f} → {:.3f}".format(*value) if np.ndim(value) else f"{value:.3f}"
        rows.append(row)
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [dict(zip(widths, widths, strict=True)), *rows]
    return ["  ".join(f"{line[name]:>{widths[name]}}" for name in widths) for line in lines]


def draw_plot(results, noise, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for regime, colour in zip(REGIMES, ("#1f77b4", "#d62728"), strict=True):
        runs = results[regime, noise][1]
        rounds = np.arange(len(runs[0].tau))
        for axes, style, values, label in (
            (left, "-", [run.threshold for run in runs], f"purity threshold, {regime}"),
            (right, "-", [run.pure.mean(1) for run in runs], f"pure set, {regime}"),
            (right, "--", [run.agreement for run in runs], f"agreement, {regime}"),
        ):
            axes.plot(rounds, np.mean(values, 0), style, color=colour, label=label)
            low, high = np.percentile(values, (25, 75), axis=0)
            axes.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)
    left.plot(rounds, np.tanh(runs[0].tau / 2), ":", color="0.3", label="tanh(τ / 2)")
    left.set(title=f"Thresholds, noise {noise:g}", xlabel="round", ylabel="gap", ylim=(0, 1))
    right.set(title="Share of queries", xlabel="round", ylim=(0, 1))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.savefig(path, dpi=80)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=20, help="how many: 0, 1, ...")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="ε")
    parser.add_argument("--tau", type=float, default=2.0, help="τ_0, in units of the reward gap")
    parser.add_argument("--decay", type=float, default=0.85, help="α; 1 keeps τ where it is")
    parser.add_argument(
        "--memory", type=float, default=0.0, help="size of each query's own feature"
    )
    parser.add_argument("--ranking_only", action="store_true", help="no SFT at or below τ")
    parser.add_argument("--absolute", action="store_true", help="level sets of |gap|")
    parser.add_argument("--plot", metavar="PNG", help="draw the middle level of noise")
    args = parser.parse_args(argv)
    for name in ("rounds", "queries", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    for noise in args.noise:
        if not 0 < noise < float("inf"):
            parser.error(f"--noise must be positive and finite, got {noise:g}")
    if not 0 < args.decay <= 1:
        parser.error(f"--decay must be above 0 and at most 1, got {args.decay:g}")
    names = ("rounds", "tau", "decay", "ranking_only", "absolute")
    options = {name: getattr(args, name) for name in names}
    results = {}
    for regime in REGIMES:
        for noise in args.noise:
            made = [
                make_bandit(regime, noise, args.queries, seed, args.memory)
                for seed in range(args.seeds)
            ]
            wrong = np.mean([~ranked_rightly(bandit) for bandit, _ in made])
            results[regime, noise] = wrong, [simulate(*bandit, **options) for bandit in made]
    print("\n".join(table(results)))
    if args.plot:
        draw_plot(results, args.noise[len(args.noise) // 2], args.plot)


if __name__ == "__main__":
    main()
