"""The report of a run: ``report.html``, one file that opens anywhere, and the table for the end.

Both are made from the run folder as it stands, so a run that was stopped has a report too; what is
not there is said.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import jinja2

from .plots import shortened
from .report_layouts import layout_of
from .report_samples import samples_of
from .report_tables import evaluation_table
from .report_verdict import verdict
from .run_figures import clean, mapping_of, read_run
from .run_folder import written_whole


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder, replacing an older one whole.

    Args:
        run_dir: The folder of a run, finished or not.

    Returns:
        The report's path. The file needs nothing outside itself and runs no script.

    Raises:
        RunError: There is no such folder.
    """
    run = read_run(Path(run_dir))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    versions = mapping_of(run.state.get("versions"))
    layout = layout_of(run)
    samples_title, samples = samples_of(run, layout.result(run))
    tables = [evaluation_table(run)] if run.evaluation else []
    page = environment.from_string(template).render(
        algorithm=clean(run.state.get("algorithm") or "run").upper(),
        model=clean(run.setting("model.path") or "model unknown"),
        date=_date(run.folder),
        versions=[f"{clean(name)} {clean(version)}" for name, version in versions.items()],
        finished=[clean(stage) for stage in mapping_of(run.state.get("finished"))],
        verdict=verdict(run, layout),
        warnings=[clean(warning) for warning in run.warnings],
        missing=run.missing,
        tables=tables + layout.iteration_tables(run),
        sections=layout.sections(run),
        samples_title=samples_title,
        samples=samples,
        settings=clean(run.settings_text),
    )
    path = run.folder / "report.html"
    with written_whole(path) as temporary:
        temporary.write_text(page, "utf-8")
    return path


def summary_table(run_dir: Path) -> str:
    """Return what a run came to, as plain text of at most 100 columns.

    Args:
        run_dir: The folder of a run, finished or not.

    Returns:
        A table of the models, one of the iterations and one of the baselines' iterations, with
        ``-`` where a figure is missing, then the verdict and the warnings.

    Raises:
        RunError: There is no such folder.
    """
    run = read_run(Path(run_dir))
    layout = layout_of(run)
    tables = [evaluation_table(run), *layout.iteration_tables(run, plain=True)]
    blocks = [_aligned([table.header, *table.rows]) for table in tables]
    lines = [*verdict(run, layout), *(f"warning: {clean(text)}" for text in run.warnings)]
    blocks.append("\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in lines))
    return "\n\n".join(blocks)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    rows = [(shortened(row[0], 28), *(shortened(cell, 21) for cell in row[1:])) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


def _date(folder: Path) -> str:
    paths = [*folder.glob("*.json"), *folder.glob("*.jsonl"), *folder.glob("*/*.jsonl")]
    if not paths:
        return "date unknown"
    latest = max(path.stat().st_mtime for path in paths)
    return datetime.fromtimestamp(latest, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
