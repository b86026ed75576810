"""The plots of a report in their sections, for each algorithm."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import plots
from . import report_iteration_plots as by_iteration
from .report_tables import model_name
from .run_figures import IterationFigures, RunFigures, Series, number_of

Section = tuple[str, list[plots.Plot]]


def spa_sections(run: RunFigures) -> list[Section]:
    """Return SPA's plots."""
    iterations = {it.number: it for it in run.iterations}
    held_out = {
        n: (p, int(it.gauged("held_out_pairs") or 0))
        for n, it in iterations.items()
        if (p := it.gauged("judge_accuracy")) is not None
    }
    quantile = number_of(run.setting("noise.quantile"))
    return _drawn(
        {
            "Evaluation": [plots.win_rates(_rates(run), _baseline(run))],
            "Gauge against collapse": [
                by_iteration.judge(
                    held_out,
                    _gauged(run, "label_accuracy"),
                    number_of(run.setting("gauge.min_accuracy")),
                ),
                _lengths(
                    run,
                    "Longer at every iteration, towards the limit, is how a judge that fools "
                    "itself looks.",
                ),
                _cut(run),
                by_iteration.margins({n: np.asarray(it.margins) for n, it in iterations.items()}),
            ],
            "Training": [*_preference_training(run, "Loss")],
            "Noise detection": [
                plots.over_steps(
                    "Pairs flagged noisy",
                    "share of pairs",
                    run.series("noise/share"),
                    lines={} if quantile is None else {"quantile asked for": quantile},
                    note="Flagged: confidence below the threshold.",
                ),
                plots.over_steps(
                    "Threshold of confidence",
                    "confidence (probability)",
                    run.series("noise/threshold"),
                    note="A pair whose confidence is lower is flagged.",
                ),
                by_iteration.shares(
                    "Pairs flagged noisy, whole iteration",
                    "share of pairs",
                    {n: it.noisy for n, it in iterations.items() if it.noisy is not None},
                    None,
                    "Of the pairs trained on while there was a threshold.",
                ),
            ],
        }
    )


def ple_sections(run: RunFigures) -> list[Section]:
    """Return PLE's plots; of its baselines, the evaluation and the rewards."""
    kinds = {
        f"{kind} responses": {
            it.number: it.kinds[kind] for it in run.iterations if kind in it.kinds
        }
        for kind in ("guided", "plain")
    }
    return _drawn(
        {
            "Evaluation": _evaluation(run),
            "Responses and their rewards": [
                by_iteration.lines(
                    "Reward of guided and plain responses",
                    "mean reward",
                    {
                        "guided responses": _gauged(run, "guided_reward"),
                        "plain responses": _gauged(run, "plain_reward"),
                    },
                    "Of the responses that the iteration learns from, by the rewards of the run; "
                    "both answer the plain query.",
                ),
                by_iteration.lines(
                    "Length of guided and plain responses",
                    "mean length (tokens)",
                    kinds,
                    "A reward that rises with the length may be a reward of the length.",
                ),
                by_iteration.ranked(
                    _gauged(run, "ranked_share"),
                    _gauged(run, "guided_ahead"),
                    _gauged(run, "threshold"),
                ),
                _lengths(run, "Guided and plain responses together."),
                _cut(run),
            ],
            "Training": [
                plots.over_steps(
                    "Threshold τ",
                    "gap of rewards",
                    run.series("ple/threshold"),
                    note="A guided response that is ahead by more is ranked above the plain one.",
                ),
                plots.over_steps(
                    "Pairs ranked in training",
                    "share of pairs",
                    run.series("ple/ranked"),
                    note="Of each step's pairs.",
                    share=True,
                ),
                plots.over_steps(
                    "Guided over plain in training",
                    "difference (nats per token)",
                    run.series("logps/guided", minus="logps/plain"),
                    note="Mean log-prob of the guided response less that of the plain one, both to "
                    "the plain query. Below 0 at first where the guided one is new to the model.",
                ),
                *_preference_training(run, "Loss of the iterations", "loss (mean over pairs)"),
                _sft_loss(run, "Loss of SFT"),
            ],
            "Baselines": [
                by_iteration.lines(
                    f"Reward of {kind} responses, by method",
                    "mean reward",
                    _by_method(run, f"{kind}_reward"),
                    "Of the responses that an iteration learns from. At iteration 1 the model is "
                    "the same for all.",
                )
                for kind in ("plain", "guided")
                if run.baselines
            ],
        }
    )


def tuning_sections(run: RunFigures) -> list[Section]:
    """Return the plots of one stage of training, with labels or with demonstrations."""
    return _drawn(
        {
            "Evaluation": _evaluation(run),
            "Training": [
                *_preference_training(run, "Loss", "loss (mean over pairs)"),
                _sft_loss(run, "Loss per token"),
            ],
        }
    )


def _drawn(sections: Mapping[str, list[plots.Plot | None]]) -> list[Section]:
    found = [(title, [plot for plot in some if plot]) for title, some in sections.items()]
    return [(title, some) for title, some in found if some]


# The evaluation.


def _baseline(run: RunFigures) -> str:
    return model_name(run.evaluation[0]) if run.evaluation else ""


def _rates(run: RunFigures, *, tokens: bool = False) -> list[plots.ModelFigure]:
    return _of_models(run, "win_rate", "win_rate_stderr", tokens=tokens)


def _of_models(
    run: RunFigures, figure: str, error: str = "", *, tokens: bool = True
) -> list[plots.ModelFigure]:
    return [
        plots.ModelFigure(
            row["key"],
            model_name(row),
            value,
            number_of(row.get(error)),
            number_of(row.get("mean_tokens")) if tokens else None,
        )
        for row in run.evaluation
        if (value := number_of(row.get(figure))) is not None
    ]


def _evaluation(run: RunFigures) -> list[plots.Plot | None]:
    return [
        plots.win_rates(_rates(run, tokens=True), _baseline(run)),
        plots.by_model(
            "Mean reward",
            "mean reward of the evaluation",
            _of_models(run, "mean_reward"),
            "Beside it the mean length of the same responses.",
        ),
    ]


# The iterations.


def _gauged(run: RunFigures, name: str) -> dict[int, float]:
    return {it.number: x for it in run.iterations if (x := it.gauged(name)) is not None}


def _by_method(run: RunFigures, name: str) -> dict[str, dict[int, float]]:
    """Return one figure of the gauge by iteration, for PLE itself and each baseline."""
    found = {"PLE": _gauged(run, name)}
    for it in run.baselines:
        method = model_name(run.models[it.arm]) if it.arm in run.models else it.arm
        if (value := it.gauged(name)) is not None:
            found.setdefault(method, {})[it.number] = value
    return found


def _cut(run: RunFigures) -> plots.Plot | None:
    return by_iteration.shares(
        "Responses cut at the length limit",
        "share of responses",
        {it.number: it.cut for it in run.iterations if it.cut is not None},
        number_of(run.setting("gauge.max_cut")),
        "A cut response has no end; many of them are a model that does not stop.",
    )


def _lengths(run: RunFigures, note: str) -> plots.Plot | None:
    return by_iteration.lengths(
        {it.number: s for it in run.iterations if (s := _spread(it)) is not None},
        number_of(run.setting("generation.max_new_tokens")),
        _longest(run),
        note,
    )


def _spread(iteration: IterationFigures) -> by_iteration.Spread | None:
    if iteration.tokens:
        quantiles = np.quantile(iteration.tokens, (0.1, 0.25, 0.75, 0.9))
        return by_iteration.Spread(float(np.mean(iteration.tokens)), tuple(map(float, quantiles)))
    mean = iteration.gauged("mean_tokens")
    return None if mean is None else by_iteration.Spread(mean)


def _longest(run: RunFigures) -> float | None:
    """Return the mean length past which the gauge warns, from a ratio it has reported."""
    most = number_of(run.setting("gauge.max_length_ratio"))
    for iteration in run.iterations:
        mean, ratio = iteration.gauged("mean_tokens"), iteration.gauged("length_ratio")
        if most is not None and mean is not None and ratio:
            return most * mean / ratio
    return None


# Training.


def _preference_training(
    run: RunFigures, loss: str, label: str = "loss (nats per pair)"
) -> list[plots.Plot | None]:
    """Return the curves of training on pairs: of the stages that log them."""
    accuracies = run.series("rewards/accuracies")
    # A trainer that logs no accuracy means by its margin one of the data, not of the model.
    margins = {s: p for s, p in run.series("rewards/margins").items() if s in accuracies}
    demonstrations = run.series("logps_per_token")
    losses: Series = {
        stage: points for stage, points in run.series("loss").items() if stage not in demonstrations
    }
    return [
        plots.over_steps(
            "Margins in training",
            "reward of chosen − rejected (nats)",
            margins,
            note="Against each stage's own reference, so every stage begins at 0.",
        ),
        plots.over_steps(
            "Accuracy in training",
            "share of pairs",
            accuracies,
            note="Pairs whose chosen response has the higher reward.",
            share=True,
        ),
        plots.over_steps(loss, label, losses),
    ]


def _sft_loss(run: RunFigures, title: str) -> plots.Plot | None:
    """Return the loss of the stages that learn from demonstrations."""
    demonstrations = run.series("logps_per_token")
    losses = {s: points for s, points in run.series("loss").items() if s in demonstrations}
    return plots.over_steps(title, "loss (nats per token)", losses)
