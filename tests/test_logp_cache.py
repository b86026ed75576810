"""The cache of log-probs: what it depends on, that it never lies, and that it survives."""

import errno
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scoring import passes as passes
from tiny_models import tiny_model
from training import random_groups
from whole_runs import (
    ENVIRONMENT,
    pairs,
    refused,
    run_here,
    run_on_two_processes,
    write_jsonl,
    write_model,
)

from prefalign import _logp_file, models
from prefalign._logp_file import FORMAT, LogpFile
from prefalign._weights_hash import tokens_hash, weights_hash
from prefalign.attention import use_packed_attention
from prefalign.errors import ModelError, RunError
from prefalign.loading import load_model
from prefalign.logp_cache import LogpCache, logps_of
from prefalign.models import score, token_scores
from prefalign.packing import Group
from prefalign.references import Reference, reference_of, snapshot_reference
from prefalign.run_folder import read_rows


def packed_model(name="llama", dtype=torch.float32, **changes):
    model = tiny_model(name, dtype, **changes)
    use_packed_attention(model)
    return model


def lora_model(**changes):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, **changes)
    model = get_peft_model(packed_model(), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".default" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def files(folder):
    return sorted(folder.glob("*.sqlite"))


def rows_in(path):
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return database.execute("SELECT count(*) FROM logps").fetchone()[0]


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share_prompts", [True, False])
def test_fresh_and_kept_have_the_bits_of_a_score_without_a_cache(
    tmp_path, passes, dtype, share_prompts
):
    model, groups = packed_model("gemma2", dtype), random_groups(9)
    options = {"max_tokens": 40, "share_prompts": share_prompts}
    expected = list(score(model, groups, **options))
    cache = LogpCache(tmp_path)
    assert cache.logps(model, groups, **options) == expected
    passes.clear()
    # In another order, other packing and another instance: nothing is packed at all.
    again = LogpCache(tmp_path).logps(model, groups[::-1], max_tokens=7)
    assert again == expected[::-1] and passes == []


def test_each_tokens_log_prob_is_kept(tmp_path):
    model, groups = packed_model(), random_groups(5)
    cached = LogpCache(tmp_path).of(model)
    for _ in range(2):
        found = list(cached.token_logps(groups, max_tokens=50))
        fresh = list(token_scores(model, groups, max_tokens=50))
        for group, ours, theirs in zip(groups, found, fresh, strict=True):
            assert [len(x) for x in ours] == [len(ids) for ids in group.response_ids]
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    # LD-DPO weighs the tokens past the shorter response by alpha: each alpha from the same file.
    for alpha in (0.0, 0.3, 1.0):
        for ours, theirs in zip(found, fresh, strict=True):
            short = min(map(len, ours))
            for a, b in zip(ours, theirs, strict=True):
                assert a[:short].sum() + alpha * a[short:].sum() == (
                    b[:short].sum() + alpha * b[short:].sum()
                )


def test_ragged_groups_and_equal_responses(tmp_path, passes):
    one, two = [5, 6, 7], [8]
    groups = [
        Group([3, 4], [one]),
        Group([3, 4], [one, two, one, [9, 9]]),
        Group([3], [[4, *one]]),  # the same tokens, divided elsewhere
        Group([3, 4], [one, [9, 9]]),
    ]
    model, cache = packed_model(), LogpCache(tmp_path)
    found = cache.logps(model, groups, max_tokens=100)
    expected = list(score(model, groups, max_tokens=100))
    assert [len(x) for x in found] == [1, 4, 1, 2]
    assert torch.allclose(torch.tensor([*chain(*found)]), torch.tensor([*chain(*expected)]))
    assert found[0][0] == found[1][0] == found[1][2] == found[3][0]
    assert passes[0] == 4 and rows_in(*files(tmp_path)) == 4
    assert cache.logps(model, groups, max_tokens=100) == found


def test_only_what_is_missing_is_computed(tmp_path, passes):
    model, groups, cache = packed_model(), random_groups(6), LogpCache(tmp_path)
    cache.logps(model, groups[2:4], max_tokens=100)
    passes.clear()
    new = Group(groups[2].prompt_ids, [*groups[2].response_ids, [7, 7, 7]])
    found = cache.logps(model, [*groups, new], max_tokens=100)
    assert sum(passes) == 2 * 4 + 1
    assert found[-1][:2] == found[2]


def test_groups_get_their_reference_log_probs(tmp_path):
    model, groups = packed_model(), random_groups(3, extras={"weights": [2.0]})
    found = LogpCache(tmp_path).with_reference(model, groups, max_tokens=100)
    expected = list(score(model, groups, max_tokens=100))
    assert [g.extras["reference_logps"] for g in found] == expected
    assert all(g.extras["weights"] == [2.0] and "reference_logps" not in groups[0].extras
               for g in found)  # fmt: skip


# What a log-prob depends on


def changed_weight(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3


def changed_epsilon(model):
    model.config.rms_norm_eps = 0.5
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


def changed_scale(model):
    model.config.logit_scale = 0.5


def changed_cap(model):
    model.config.final_logit_softcapping = 2.0


def changed_dtype(model):
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [changed_weight, changed_epsilon, changed_scale, changed_cap, changed_dtype]
)
def test_another_model_gets_log_probs_of_its_own(tmp_path, passes, change):
    model, groups, cache = packed_model(), random_groups(4), LogpCache(tmp_path)
    first = cache.logps(model, groups, max_tokens=100)
    change(model)
    expected = list(score(model, groups, max_tokens=100))
    assert expected != first
    passes.clear()
    assert cache.logps(model, groups, max_tokens=100) == expected
    assert sum(passes) == 8 and len(files(tmp_path)) == 2


def test_the_temperature_and_autocast_are_told_apart(tmp_path):
    model, groups, cache = packed_model(), random_groups(4), LogpCache(tmp_path)
    plain = cache.logps(model, groups, max_tokens=100)
    cool = cache.logps(model, groups, max_tokens=100, temperature=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        half = cache.logps(model, groups, max_tokens=100)
        assert half == list(score(model, groups, max_tokens=100))
    assert plain != cool and plain != half and len(files(tmp_path)) == 3
    tokens = token_scores(model, groups, max_tokens=100, temperature=0.5)
    assert cool == models.sum_tokens(list(tokens), "cpu")


def test_the_prompt_and_the_response_are_told_apart():
    assert len({tokens_hash(*x) for x in (([1, 2], [3]), ([1], [2, 3]), ([1, 2, 3], [3]))}) == 3
    assert tokens_hash((1, 2), torch.tensor([3])) == tokens_hash([1, 2], [3])


def test_a_copy_in_another_folder_is_the_same_model(tmp_path, passes):
    model, groups, cache = packed_model("qwen2"), random_groups(4), LogpCache(tmp_path / "cache")
    first = cache.logps(model, groups, max_tokens=100)
    model.config.use_cache, model.config.pad_token_id = False, 7  # as a Trainer sets them
    model.save_pretrained(tmp_path / "elsewhere")
    passes.clear()
    copy = load_model(tmp_path / "elsewhere")
    assert cache.logps(copy, groups, max_tokens=100) == first and passes == []


def test_an_adapter_that_is_off_is_the_base_model_and_one_that_is_on_is_not(tmp_path, passes):
    base, model, groups = packed_model(), lora_model(), random_groups(4)
    cache = LogpCache(tmp_path)
    off = cache.logps(base, groups, max_tokens=100)
    passes.clear()
    assert cache.logps(reference_of(model), groups, max_tokens=100) == off and passes == []
    on = cache.logps(model, groups, max_tokens=100)
    assert on == list(score(model, groups, max_tokens=100)) and on != off
    passes.clear()
    # A snapshot is the same adapter under another name.
    snapshot = snapshot_reference(model)
    assert cache.logps(snapshot, groups, max_tokens=100) == on and passes == []
    model.get_parameter(
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    ).data += 0.1
    assert cache.logps(snapshot, groups, max_tokens=100) == on and passes == []
    assert cache.logps(model, groups, max_tokens=100) != on and passes
    assert len(files(tmp_path)) == 3


def test_an_adapters_scaling_counts_and_its_dropout_does_not():
    hashes = {weights_hash(lora_model(lora_alpha=alpha)) for alpha in (4, 8)}
    assert len(hashes) == 2
    assert weights_hash(lora_model(lora_alpha=8, lora_dropout=0.5)) in hashes


def test_modules_that_peft_trains_whole_follow_the_adapter():
    model = lora_model(modules_to_save=["lm_head"])
    base = weights_hash(packed_model())
    assert weights_hash(reference_of(model)) == base
    on = weights_hash(model)
    model.base_model.model.lm_head.modules_to_save.default.weight.data[0, 0] += 1
    assert weights_hash(reference_of(model)) == base and weights_hash(model) != on


def test_a_merged_adapter_is_refused():
    model = lora_model()
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged into its weights"):
        weights_hash(model)


def test_weights_that_are_not_there_are_refused():
    model = packed_model()
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight is sharded or offload"):
        weights_hash(model)


def test_the_model_is_as_it_was_between_two_windows(tmp_path):
    model = lora_model().train()
    on = list(score(model, random_groups(4), max_tokens=100))
    for asked in (
        logps_of(reference_of(model), random_groups(4), max_tokens=100, lookahead=1),
        LogpCache(tmp_path)
        .of(reference_of(model))
        .logps(random_groups(4), max_tokens=100, lookahead=1),
    ):
        first = next(asked)
        assert list(score(model, random_groups(4), max_tokens=100)) == on and model.training
        off = [first, *asked]
        assert all(a != b for a, b in zip(off, on, strict=True))


# Files


def test_a_file_says_what_it_is_of(tmp_path):
    model = packed_model("gemma2")
    model.config._name_or_path = "some/model"
    LogpCache(tmp_path).logps(model, random_groups(2), max_tokens=100)
    with sqlite3.connect(*files(tmp_path)) as database:
        found = dict(database.execute("SELECT name, value FROM metadata"))
    found = {name: json.loads(value) for name, value in found.items()}
    assert found["model"] == "some/model" and found["dtype"] == "torch.float32"
    assert found["softcap"] == 4.0 and found["logit_scale"] == 1.0 and found["autocast"] is None
    assert found["weights_sha256"] == weights_hash(model)
    assert found["prefalign"] and found["created"].endswith("+00:00")


def garbage(path):
    path.write_bytes(b"not a database, though as long as one" * 100)


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def flipped_bit(path):
    with sqlite3.connect(path) as database:
        ((row, blob),) = database.execute("SELECT rowid, logps FROM logps LIMIT 1").fetchall()
        blob = bytes([blob[0] ^ 1]) + blob[1:]
        database.execute("UPDATE logps SET logps = ? WHERE rowid = ?", (blob, row))


def other_tables(path):
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
        database.execute(f"PRAGMA user_version = {FORMAT}")


def other_format(path):
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (garbage, "is damaged, or no cache of log-probs"),
        (cut_short, "is damaged, or no cache of log-probs"),
        (flipped_bit, "a checksum does not match"),
        (other_tables, "is damaged, or no cache of log-probs"),
        (other_format, f"is of format 99, expected {FORMAT}"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, harm, message):
    model, groups, cache = packed_model(), random_groups(40), LogpCache(tmp_path)
    cache.logps(model, groups, max_tokens=1000)
    (path,) = files(tmp_path)
    harm(path)
    with pytest.raises(RunError, match=message) as caught:
        cache.logps(model, groups, max_tokens=1000)
    assert str(caught.value).startswith("reference_cache: ") and str(path) in str(caught.value)


def test_a_file_that_was_only_just_made_is_used(tmp_path):
    model, groups, cache = packed_model(), random_groups(2), LogpCache(tmp_path)
    first = cache.logps(model, groups, max_tokens=100)
    (path,) = files(tmp_path)
    path.write_bytes(b"")  # a process killed between making it and filling it
    assert cache.logps(model, groups, max_tokens=100) == first and rows_in(path) == 4


@pytest.mark.parametrize("folder", ["file/cache", "/proc/cache", "/proc"])
def test_a_folder_that_cannot_be_written_is_one_error(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="^reference_cache: the folder .* cannot be written to"):
        LogpCache(tmp_path / folder)


def full_disk(monkeypatch, pages):
    connect = sqlite3.connect

    def limited(*args, **kwargs):
        database = connect(*args, **kwargs)
        database.execute(f"PRAGMA max_page_count = {pages}")
        return database

    monkeypatch.setattr(_logp_file.sqlite3, "connect", limited)


def test_a_full_disk_is_the_systems_error_and_harms_nothing(tmp_path, monkeypatch):
    model, groups, cache = packed_model(), random_groups(200), LogpCache(tmp_path)
    kept = cache.logps(model, groups[:10], max_tokens=1000)
    with monkeypatch.context() as patch:
        full_disk(patch, 8)
        with pytest.raises(OSError, match="No space left on device") as caught:
            cache.logps(model, groups, max_tokens=1000)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(*files(tmp_path))
    assert rows_in(*files(tmp_path)) == 20
    assert cache.logps(model, groups, max_tokens=1000)[:10] == kept


def test_a_file_that_another_process_holds_is_named_in_the_end(tmp_path, monkeypatch):
    model, groups, cache = packed_model(), random_groups(2), LogpCache(tmp_path)
    cache.logps(model, groups[:1], max_tokens=100)
    monkeypatch.setattr(_logp_file, "_WAIT_SECONDS", 0.1)
    holder = sqlite3.connect(*files(tmp_path), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert cache.logps(model, groups[:1], max_tokens=100)  # reading needs nobody's leave
    with pytest.raises(RunError, match="was locked by another process for 0 s"):
        cache.logps(model, groups, max_tokens=100)
    holder.execute("ROLLBACK")
    holder.close()
    assert cache.logps(model, groups, max_tokens=100)


def test_what_another_process_kept_first_stays(tmp_path):
    file = LogpFile(tmp_path / "x.sqlite", {})
    name = tokens_hash([1], [2])
    assert file.add([(name, torch.tensor([-1.0]))])[name].tolist() == [-1.0]
    assert file.add([(name, torch.tensor([-2.0]))])[name].tolist() == [-1.0]
    assert file.read([name, b"unknown"]).keys() == {name}


# Processes


def worker(folder, *, count, lookahead, backwards=False, dies_in_pass=0):
    """Start a process that scores groups and keeps what it finds in ``folder / "cache"``."""
    script = Path(__file__).parent / "support" / "cache_worker.py"
    options = [folder, count, lookahead, int(backwards), dies_in_pass]
    return subprocess.Popen(
        [sys.executable, script, *map(str, options)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_process_that_is_killed_loses_a_window_at_most(tmp_path, passes):
    (tmp_path / "go").touch()
    process = worker(tmp_path, count=12, lookahead=2, dies_in_pass=4)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert rows_in(*files(tmp_path / "cache")) == 3 * 2 * 2
    model, groups = packed_model(), random_groups(12)
    expected = list(score(model, groups, max_tokens=1000, lookahead=2))
    passes.clear()
    cached = LogpCache(tmp_path / "cache").of(model)
    assert list(cached.logps(groups, max_tokens=1000, lookahead=2)) == expected
    assert passes == [4, 4, 4]


def test_processes_that_compute_the_same_at_once_agree(tmp_path, passes):
    count = 40
    kwargs = {"count": count, "lookahead": 1}
    both = [worker(tmp_path, **kwargs), worker(tmp_path, **kwargs, backwards=True)]
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert all(process.poll() is None for process in both)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    found = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    groups = random_groups(count)
    distinct = {tokens_hash(g.prompt_ids, ids) for g in groups for ids in g.response_ids}
    assert rows_in(*files(tmp_path / "cache")) == len(distinct)
    kept = LogpCache(tmp_path / "cache").logps(packed_model(), groups, max_tokens=1000)
    assert found == [kept, kept] and passes == []


# Whole runs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Options of a DPO run that keeps its log-probs."""
    folder = tmp_path_factory.mktemp("cached")
    write_model(folder / "model")
    write_jsonl(folder / "pairs.jsonl", pairs(8))
    return folder, {
        "model.path": folder / "model",
        "data.preferences": folder / "pairs.jsonl",
        "data.max_length": 64,
        "data.max_prompt_length": 32,
        "training.learning_rate": 1e-3,
        "training.batch_size": 4,
        "training.max_tokens": 100,
        "training.logging_steps": 1,
        "generation.chunk_size": 2,
        "loss.beta": 0.5,
    }


def test_runs_of_other_settings_share_and_begin_at_ln_2(prepared, tmp_path, passes):
    options = {**prepared[1], "reference_cache": tmp_path / "cache"}
    run_here("dpo", {**options, "output_dir": tmp_path / "one"})
    assert sum(passes) == 16
    passes.clear()
    others = {
        "output_dir": tmp_path / "two",
        "training.learning_rate": 3e-4,
        "training.batch_size": 2,
        "training.max_tokens": 60,
        "training.share_prompts": "false",
        "generation.chunk_size": 3,
        "loss.beta": 0.1,
        "seed": 7,
    }
    run_here("dpo", {**options, **others})
    assert passes == []
    for name in ("one", "two"):
        first = read_rows(tmp_path / name / "metrics.jsonl")[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # Nor does it matter which losses the log-probs are for.
    smoothed = {"output_dir": tmp_path / "three", "loss.label_smoothing": 0.2}
    run_here("dpo", {**options, **smoothed})
    assert passes == [] and rows_in(*files(tmp_path / "cache")) == 16
    without = tmp_path / "without"
    run_here("dpo", {**prepared[1], "output_dir": without})
    for chunk in sorted((without / "dpo" / "reference").glob("*.jsonl")):
        assert read_rows(chunk) == read_rows(tmp_path / "one" / "dpo" / "reference" / chunk.name)


def test_a_run_hashes_a_stages_weights_once(prepared, tmp_path, monkeypatch):
    from prefalign import pipeline

    hashed = []
    monkeypatch.setattr(
        pipeline, "weights_hash", lambda model: hashed.append(1) or weights_hash(model)
    )
    options = {**prepared[1], "reference_cache": tmp_path / "cache"}
    run_here("dpo", {**options, "output_dir": tmp_path / "run"})
    assert len(list((tmp_path / "run" / "dpo" / "reference").glob("*.jsonl"))) == 4
    assert hashed == [1]


def test_a_run_that_is_taken_up_again_may_have_another_cache(prepared, tmp_path):
    options = {**prepared[1], "output_dir": tmp_path / "run"}
    run_here("dpo", options)
    run_here("dpo", {**options, "reference_cache": tmp_path / "cache"}, "--resume")


def test_a_cache_that_cannot_be_used_is_one_line(prepared, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    options = {**prepared[1], "output_dir": tmp_path / "run", "reference_cache": tmp_path / "file"}
    assert refused(capsys, "dpo", options).startswith("reference_cache: the folder ")
    assert not (tmp_path / "run").exists()
    options["reference_cache"] = tmp_path / "cache"
    with monkeypatch.context() as patch:
        full_disk(patch, 1)
        assert "no disk space left" in refused(capsys, "dpo", options)
    run_here("dpo", options, "--resume")
    (path,) = files(tmp_path / "cache")
    garbage(path)
    options["output_dir"] = tmp_path / "other"
    line = refused(capsys, "dpo", options)
    assert line.startswith(f"reference_cache: {path} is damaged")


def test_two_processes_share_a_cache(prepared, tmp_path, passes):
    options = {**prepared[1], "reference_cache": tmp_path / "cache"}
    done = run_on_two_processes("dpo", {**options, "output_dir": tmp_path / "two"}, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows_in(*files(tmp_path / "cache")) == 16
    run_here("dpo", {**options, "output_dir": tmp_path / "one"})
    assert passes == []
    one, two = (
        [read_rows(path) for path in sorted((tmp_path / x / "dpo" / "reference").glob("*.jsonl"))]
        for x in ("one", "two")
    )
    assert one == two


def test_a_reference_that_is_a_model_is_taken_as_it_is(tmp_path):
    model, groups = packed_model(), random_groups(3)
    cache = LogpCache(tmp_path)
    assert cache.logps(Reference(model), groups, max_tokens=99) == cache.logps(
        model, groups, max_tokens=99
    )
    assert len(files(tmp_path)) == 1
