import json
import shutil

import pytest

from prefalign.errors import RunError
from prefalign.run_folder import (
    RunFolder,
    StepLog,
    read_rows,
    require_space,
    write_rows,
    written_whole,
)


def begin(*args, **kwargs):
    run = RunFolder(*args, **kwargs)
    run.begin()
    return run


SETTINGS = {"output_dir": "x", "resume": False, "beta": 0.1, "gauge": {"on_collapse": "warn"}}


def test_written_whole_leaves_nothing_behind_on_failure(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_whole_replaces_a_folder(tmp_path):
    for content in ("a", "b"):
        with written_whole(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["b"]


def test_a_stage_is_finished_for_the_run_that_resumes(tmp_path):
    run = begin(tmp_path / "run", "spa", SETTINGS)
    assert run.finished("seed") is None
    run.finish("seed", steps=5)
    again = RunFolder(tmp_path / "run", "spa", {**SETTINGS, "resume": True}, resume=True)
    assert again.finished("seed") == {"steps": 5}


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    begin(tmp_path / "run", "spa", SETTINGS)
    with pytest.raises(RunError, match="already holds a run; continue it with --resume"):
        RunFolder(tmp_path / "run", "spa", SETTINGS)


def test_resuming_with_other_settings_names_them(tmp_path):
    begin(tmp_path / "run", "spa", SETTINGS)
    with pytest.raises(RunError, match="other settings: beta was 0.1, is 0.2$"):
        RunFolder(tmp_path / "run", "spa", {**SETTINGS, "beta": 0.2}, resume=True)


def test_what_a_collapse_does_may_change_on_resuming(tmp_path):
    begin(tmp_path / "run", "spa", SETTINGS)
    RunFolder(tmp_path / "run", "spa", {**SETTINGS, "gauge": {"on_collapse": "stop"}}, resume=True)


def test_resuming_with_another_algorithm_is_refused(tmp_path):
    begin(tmp_path / "run", "spa", SETTINGS)
    with pytest.raises(RunError, match="algorithm was 'spa', is 'ple'"):
        RunFolder(tmp_path / "run", "ple", SETTINGS, resume=True)


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    run = begin(tmp_path / "run", "spa", SETTINGS)
    run.finish("seed")
    assert begin(tmp_path / "run", "spa", SETTINGS, overwrite=True).finished("seed") is None
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("years of work")
    with pytest.raises(RunError, match="is not empty and does not hold a run"):
        RunFolder(other, "spa", SETTINGS, overwrite=True)
    assert (other / "chapter.tex").exists()


def test_looking_at_a_folder_writes_nothing(tmp_path):
    RunFolder(tmp_path / "run", "spa", SETTINGS)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file, expected a folder"):
        RunFolder(tmp_path / "run", "spa", SETTINGS)


def test_a_log_is_rewound_to_a_step_and_forgets_a_line_cut_short(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl")
    log.append({"stage": "seed", "step": s, "loss": 0.5} for s in (1, 2, 3))
    log.append([{"stage": "other", "step": 9}])
    with open(log.path, "a") as handle:
        handle.write('{"stage": "seed", "st')
    log.rewind("seed", 2)
    log.append([{"stage": "seed", "step": 3}])
    assert [(r["stage"], r["step"]) for r in log.rows()] == [
        ("seed", 1), ("seed", 2), ("other", 9), ("seed", 3),
    ]  # fmt: skip
    assert all(json.loads(line) for line in log.path.read_text().splitlines())


def test_rows_survive_hostile_text(tmp_path):
    rows = [
        {
            "text": 'line\nbreak \u2028 "quote" \ud83d\ude00'.encode(
                "utf-16", "surrogatepass"
            ).decode("utf-16")
        }
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_too_little_disk_space_is_said_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path / "not" / "there", free // 2)
    with pytest.raises(RunError, match="GiB of disk space left, and the run's models"):
        require_space(tmp_path / "not" / "there", free * 2)
