"""Whole runs in seconds: a tiny model on disk, data files, the command, and killed runs."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from tiny_models import tiny_model, tiny_tokenizer

from prefalign import cli, loop
from prefalign.run_folder import read_rows

WORDS = (
    "amber birch cedar delta ember flint grove haven inlet jetty knoll ledge marsh north".split()
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def pairs(count, salt=""):
    return [
        {
            "prompt": f"{salt}{WORDS[i % 14]} {i}:",
            "chosen": f" {WORDS[(i + 3) % 14]}",
            "rejected": f" {WORDS[(i + 5) % 14]}{i}",
        }
        for i in range(count)
    ]


def reward(name):
    """Return how settings name a function of ``rewards.py``."""
    return f"{Path(__file__).with_name('rewards.py').as_posix()}:{name}"


def write_model(folder, name="llama", chat_template=False, **changes):
    model = tiny_model(name, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


def arguments(options):
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def command(algorithm, options, *flags):
    """Return the command line of a process."""
    return [sys.executable, "-m", "prefalign.cli", algorithm, *arguments(options), *flags]


def run(algorithm, options, *flags, **kwargs):
    """Run the command line in a process of its own."""
    return subprocess.run(
        command(algorithm, options, *flags),
        env=ENVIRONMENT, capture_output=True, text=True, **kwargs,
    )  # fmt: skip


def run_here(algorithm, options, *flags, report=False):
    """Run the command line in this process, which saves a start; return what it printed.

    Without the report, whose plots take longer than all the rest.
    """
    printed = io.StringIO()
    write = loop.write_report if report else (lambda folder: None)
    with contextlib.redirect_stdout(printed), mock.patch.object(loop, "write_report", write):
        assert cli.main([algorithm, *arguments(options), *flags]) == 0
    return printed.getvalue()


def refused(capsys, algorithm, options, *flags):
    """Run the command line in this process; return its one line of complaint."""
    capsys.readouterr()
    try:
        status = cli.main([algorithm, *arguments(options), *flags])
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("prefalign: error: ")]
    assert status == 2, error
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0].removeprefix("prefalign: error: ")


def run_on_two_processes(algorithm, options, timeout=300):
    """Run the command line on two processes of a launcher."""
    python, *rest = command(algorithm, options)
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, *rest], env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


def final_weights(output_dir, stage="iteration-2"):
    from safetensors.torch import load_file

    files = sorted((output_dir / stage / "model").glob("*.safetensors"))
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    assert tensors
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def losses(run_dir):
    return [(m["stage"], m["step"], m["loss"]) for m in read_rows(run_dir / "metrics.jsonl")]


def progress(run_dir, without=()):
    """Count what a run has left so far: chunks, log lines, models; without some arms'."""
    # os.walk passes over folders that vanish while it looks.
    files = [Path(folder, name) for folder, _, names in os.walk(run_dir) for name in names]
    files = [path for path in files if not {*path.parts, path.stem} & {*without}]
    chunks = sum(path.suffix == ".jsonl" for path in files)
    models = sum(path.suffix == ".safetensors" and path.parent.name == "model" for path in files)
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    steps = sum(not any(f'"{name}/' in line for name in without) for line in lines)
    return chunks + models + steps


def run_killed(algorithm, options, until, kills):
    """Kill a run at random points, resume it each time, let it end; return what to say of them.

    Args:
        algorithm: The command.
        options: Its options.
        until: The ``progress`` that it will make in all.
        kills: How often.
    """
    seed = time.time_ns()
    chosen = random.Random(seed)
    output_dir = options["output_dir"]
    moments = sorted(chosen.sample(range(until), kills))
    for kill, moment in enumerate(moments):
        process = subprocess.Popen(
            command(algorithm, options, *["--resume"] * (kill > 0)),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not output_dir.exists() or progress(output_dir) < moment:
            assert process.poll() is None, (seed, moments, "ended before it was killed")
            time.sleep(0.005)
        time.sleep(chosen.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = run(algorithm, options, "--resume")
    assert done.returncode == 0, (seed, moments, done.stderr[-3000:])
    return seed, moments
