"""The verdict of a report: who wins against whom, in sentences, also where the algorithm loses."""

from __future__ import annotations

from .report_layouts import Layout
from .report_tables import model_name, with_error
from .run_figures import Row, RunFigures, iteration_number, number_of


def verdict(run: RunFigures, layout: Layout) -> list[str]:
    """Say in sentences how the result did against every model that is not an iteration of it."""
    if not run.evaluation:
        return ["No verdict: there is no evaluation."]
    result = layout.result(run)
    if result is None:
        what = "no iteration" if layout.columns else "no trained model"
        return [f"No verdict: {what} has been evaluated."]
    models, baseline = run.models, run.evaluation[0]["key"]
    last = models[result]
    sentences, outcomes = [], {}
    for key, row in models.items():
        if key == result or iteration_number(key) is not None:
            continue
        if key == baseline:
            rate, error = number_of(last.get("win_rate")), number_of(last.get("win_rate_stderr"))
        else:
            rate, error = run.head_to_head(result, key)
        if rate is None:
            sentences.append(f"{model_name(last)} was not compared with {model_name(row)}.")
            continue
        outcomes[key] = _outcome(rate, error)
        sentences.append(
            f"{model_name(last)} {outcomes[key]} {model_name(row)}: "
            f"it wins {with_error(rate, error)} of the prompts."
        )
    if layout.control:
        sentences += _control(models, outcomes)
    return sentences + _fall(run, result)


def _outcome(rate: float, error: float | None) -> str:
    if abs(rate - 0.5) <= 2 * (error or 0.0):
        return "cannot be told apart from"
    return "beats" if rate > 0.5 else "loses to"


def _control(models: dict[str, Row], outcomes: dict[str, str]) -> list[str]:
    if "control" not in models:
        return [
            "There is no control trained for as many steps, so more steps alone may explain a gain."
        ]
    if outcomes.get("seed") == "beats" and outcomes.get("control") != "beats":
        return ["So more steps on the human labels alone gain as much over the seed."]
    return []


def _fall(run: RunFigures, result: str) -> list[str]:
    models = run.models
    rates = {
        key: rate
        for key, row in models.items()
        if iteration_number(key) and (rate := number_of(row.get("win_rate"))) is not None
    }
    if result not in rates:
        return []
    best = max(rates, key=rates.__getitem__)
    slack = 2 * (number_of(models[result].get("win_rate_stderr")) or 0.0)
    if rates[best] <= rates[result] + slack:
        return []
    fell = f"from {rates[best]:.3f} against {model_name(run.evaluation[0])} to {rates[result]:.3f}"
    return [f"It got worse after {model_name(models[best])}: {fell}."]
