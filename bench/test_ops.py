"""The table of ``prefalign bench`` as pytest-benchmark tests: ``pytest bench --benchmark-only``.

One test per suite, shape, dtype and provider; a provider is timed once its outputs and gradients
have passed the gate. ``--real`` takes the device's own shapes.
"""

import functools

import pytest
import torch

from prefalign.benchmarks import gate
from prefalign.benchmarks.cases import Unsupported, chunked_step, step
from prefalign.benchmarks.providers import BARE, EAGER, OURS
from prefalign.benchmarks.shapes import QUICK
from prefalign.benchmarks.suites import SUITES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    wanted = DEVICE.type if metafunc.config.getoption("--real") else QUICK
    table = [
        (suite.name, shape, dtype, provider)
        for suite in SUITES.values()
        for shape in suite.shapes
        if wanted in shape.sets
        for dtype in suite.dtypes
        for provider in suite.providers
    ]
    names = [f"{s}-{h.name}-{str(d)[6:]}-{p.name.replace(' ', '_')}" for s, h, d, p in table]
    metafunc.parametrize(("suite", "shape", "dtype", "provider"), table, ids=names)


@functools.lru_cache(maxsize=1)
def answers(suite, shape, dtype):
    """Return the case, the exact results and those of eager torch in the same dtype."""
    torch._dynamo.reset()
    case = SUITES[suite].make(shape, dtype, DEVICE)
    eager = next(p for p in SUITES[suite].providers if p.role == EAGER)
    exact = chunked_step(eager.build, case.to(torch.float64), 1024)
    return case, exact, chunked_step(eager.build, case, 1024)


def test_op(benchmark, suite, shape, dtype, provider):
    case, exact, eager = answers(suite, shape, dtype)
    try:
        forward = provider.build(case)
        results = step(forward, case)
    except (ImportError, Unsupported) as reason:
        pytest.skip(f"{provider.name}: {reason}")
    if provider.role != BARE:
        found = gate.errors(results, eager, exact)
        verdict = gate.verdict(found)
        benchmark.extra_info |= {"errors": found, "verdict": verdict}
        assert provider.role != OURS or verdict == gate.OK, found
        if verdict == gate.WRONG:
            pytest.skip(f"{provider.name} is wrong: {found}")
    benchmark.group = f"{suite}, {shape}, {dtype}"

    def work():
        step(forward, case)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(work, rounds=5, warmup_rounds=1)
