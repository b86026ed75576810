"""token_logps: values and gradients against float64, and every place where peers broke."""

import itertools
import math

import pytest
import torch
from prefalign.kernels import _token_logps_chunked
from prefalign.kernels._common import row_views
from prefalign.kernels.configs import row_for
from prefalign.kernels.token_logps import OUTPUTS, TokenLogps, token_logps
from tolerance import assert_as_exact_as_eager
from torch.utils._python_dispatch import TorchDispatchMode

IMPLS = ("chunked", "triton")
BLOCK_V = row_for(torch.device("cuda" if torch.cuda.is_available() else "cpu")).token_block
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = {}
SCALED = {"temperature": 0.7, "softcap": 5.0}


def example(shape, device, dtype=torch.float32, scale=4.0, seed=0):
    """Return logits, targets with an ignored one where there is room, and two upstreams."""
    generator = torch.Generator().manual_seed(seed)
    rows = shape[:-1]
    logits = (torch.randn(shape, generator=generator) * scale).to(dtype)
    targets = torch.randint(shape[-1], rows, generator=generator)
    if targets.numel() > 2:
        targets.view(-1)[1] = -100
    upstreams = torch.randn(2, *rows, generator=generator)
    return logits.to(device), targets.to(device), *upstreams.to(device)


def run(logits, targets, upstreams, impl, names=(), **options):
    """Return the outputs by name and the gradient under the given upstreams."""
    logits = logits.detach().requires_grad_()
    found = token_logps(logits, targets, outputs=names, impl=impl, **options)
    found = found._asdict() if names else {"logps": found}
    found = {name: value for name, value in found.items() if value is not None}
    roots = [found[name] for name in ("logps", "entropy") if name in found]
    grads = [upstream.to(root.dtype) for upstream, root in zip(upstreams, roots, strict=False)]
    (grad,) = torch.autograd.grad(roots, logits, grads)
    return {**found, "grad": grad}


def check(logits, targets, upstreams, impl, names=OUTPUTS, **options):
    actual = run(logits, targets, upstreams, impl, names, **options)
    eager = run(logits, targets, upstreams, "reference", names, **options)
    exact = run(logits.double(), targets, upstreams, "reference", names, **options)
    assert actual["grad"].dtype == logits.dtype
    for name, value in actual.items():
        if value.dtype == torch.bool:
            assert torch.equal(value, exact[name]), name
        else:
            if name != "grad":
                assert value.dtype == torch.float32, name
            assert_as_exact_as_eager(value, eager[name], exact[name], name)


@pytest.mark.parametrize("options", [PLAIN, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("vocab", [1, 2, 17, BLOCK_V - 1, BLOCK_V, BLOCK_V + 1, 9973])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_logps_and_gradient(impl, dtype, vocab, options, device):
    # Enough rows of a small vocabulary that the mean error is not the luck of a few.
    rows = 5 if vocab > 100 else 31
    logits, targets, *upstreams = example((rows, vocab), device, dtype)
    check(logits, targets, upstreams, impl, names=(), **options)


@pytest.mark.parametrize("options", [PLAIN, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("vocab", [7, 2 * BLOCK_V + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_extras_and_gradient_through_entropy(impl, dtype, vocab, options, device):
    rows = 5 if vocab > 100 else 31
    logits, targets, *upstreams = example((rows, vocab), device, dtype)
    logits[0, targets[0]] = 50.0
    check(logits, targets, upstreams, impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_float64_where_it_is_supported(impl, device):
    logits, targets, *upstreams = example((4, 33), device, torch.float64)
    if impl == "triton":
        with pytest.raises(ValueError, match="impl: 'triton' computes in float32, got float64"):
            token_logps(logits, targets, impl=impl)
        return
    exact = run(logits, targets, upstreams, "reference", OUTPUTS, **SCALED)
    for name, value in run(logits, targets, upstreams, impl, OUTPUTS, **SCALED).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("vocab", [31, BLOCK_V + 31])
@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("impl", IMPLS)
def test_shifted_logits_lose_nothing(impl, shift, vocab, device):
    # verl #2899: a vocabulary that the block does not divide, wrong by 5.4 once logits are shifted.
    logits, targets, *upstreams = example((4, vocab), device)
    shifted = logits + shift
    check(shifted, targets, upstreams, impl, names=("entropy",))
    moved = run(shifted, targets, upstreams, impl)["logps"]
    exact = run((shifted - shift).double(), targets, upstreams, "reference")["logps"]
    torch.testing.assert_close(moved.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_262144_tokens(impl, device):
    logits, targets, *upstreams = example((2, 262144), device, torch.bfloat16)
    check(logits, targets, upstreams, impl, names=("entropy", "lse"))


@pytest.mark.parametrize("options", [PLAIN, {"temperature": 0.5}], ids=["plain", "scaled"])
@pytest.mark.parametrize("impl", IMPLS)
def test_minus_infinity_is_probability_zero(impl, options, device):
    logits, targets, *upstreams = example((5, BLOCK_V + 9), device)
    logits[0, 3] = -math.inf
    logits[2, :BLOCK_V] = -math.inf  # a whole tile before the first finite one
    targets[2] = BLOCK_V + 1
    logits[3, targets[3]] = -math.inf
    check(logits, targets, upstreams, impl, names=("entropy", "is_top1"), **options)
    found = run(logits, targets, upstreams, impl, **options)
    assert found["grad"].isfinite().all()
    assert found["grad"][0, 3] == 0
    assert found["logps"][3] == -math.inf


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_a_row_with_a_target_shows(impl, device):
    logits, targets, *_ = example((3, BLOCK_V + 5), device)
    logits[2, 7] = math.nan
    found = token_logps(logits, targets, impl=impl)
    assert found[2].isnan() and found[0].isfinite()


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_ignored_rows_are_exactly_zero_even_if_nan(impl, device):
    logits, targets, *upstreams = example((6, 37), device)
    targets[[0, 1, 5]] = -100
    logits[0] = math.nan
    logits[5] = math.inf
    found = run(logits, targets, upstreams, impl, OUTPUTS, **SCALED)
    kept = run(logits[2:5], targets[2:5], [u[2:5] for u in upstreams], impl, OUTPUTS, **SCALED)
    for name, value in found.items():
        assert (value[[0, 1, 5]] == 0).all(), name
        assert torch.equal(value[2:5], kept[name]), name


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_all_ignored_empty_and_single(impl, device):
    logits, _, *upstreams = example((4, 19), device)
    none = torch.full((4,), -100, device=device)
    for value in run(logits, none, upstreams, impl, OUTPUTS).values():
        assert (value == 0).all()
    empty = run(logits[:0], none[:0], [u[:0] for u in upstreams], impl, OUTPUTS)
    assert all(value.shape[0] == 0 for value in empty.values())
    certain = run(logits[:, :1], none * 0, upstreams, impl)
    assert (certain["logps"] == 0).all() and (certain["grad"] == 0).all()
    scalar = run(logits[0], none[0] * 0 + 3, [u[0] for u in upstreams], impl)
    assert scalar["logps"].shape == () and scalar["grad"].shape == (19,)


@pytest.mark.parametrize("impl", IMPLS)
def test_another_ignore_index(impl, device):
    logits, targets, *upstreams = example((5, 23), device)
    targets = torch.where(targets == -100, 7, targets)
    targets[3] = 0
    found = run(logits, targets, upstreams, impl, ignore_index=0)
    expected = run(logits, torch.where(targets == 0, -100, targets), upstreams, impl)
    assert found["logps"][3] == 0
    for name, value in found.items():
        assert torch.equal(value, expected[name])


STRIDED = {
    "shifted": lambda x: x[:, :-1],
    "every_other_row": lambda x: x[:, ::2],
    "part_of_the_vocabulary": lambda x: x[..., 3:-4],
    "vocabulary_not_innermost": lambda x: x[..., :5].transpose(1, 2),
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1),
    "expanded_first": lambda x: x[:1].expand(3, -1, -1),
    "three_strides": lambda x: x.view(3, 2, 4, 41)[:, :, 1:3].transpose(0, 1)[:, ::2],
}


@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("impl", IMPLS)
def test_strided_logits(impl, view, device):
    logits = STRIDED[view](torch.randn(3, 8, 41, generator=torch.Generator().manual_seed(1)))
    _, targets, *upstreams = example(logits.shape, device)
    logits = (
        logits.to(device)
        if device.type == "cpu"
        else STRIDED[view](
            torch.randn(3, 8, 41, generator=torch.Generator().manual_seed(1)).to(device)
        )
    )
    found = run(logits, targets, upstreams, impl, OUTPUTS)
    expected = run(logits.contiguous(), targets, upstreams, impl, OUTPUTS)
    for name, value in found.items():
        assert value.shape == expected[name].shape
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("view", STRIDED)
def test_row_views_cover_every_row_without_a_copy(view):
    logits = STRIDED[view](torch.arange(3.0 * 8 * 41).view(3, 8, 41))
    pieces = []
    for piece, first in row_views(logits):
        assert first == sum(p.shape[0] for p in pieces)
        assert piece.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
        pieces.append(piece.flatten(0, 1))
    assert torch.equal(torch.cat(pieces), logits.flatten(0, -2))


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_beyond_32_bits(impl, device, tmp_path):
    # Each stride fits 32 bits; the last two rows' offsets do not.
    vocab, stride = 33, 2**30 + 64
    size = 3 * stride + vocab
    if device.type == "cuda":
        storage = torch.zeros(size, dtype=torch.float16, device=device)
    else:  # a sparse file: no memory until it is touched
        (tmp_path / "logits").touch()
        storage = torch.from_file(
            str(tmp_path / "logits"), shared=True, size=size, dtype=torch.float16
        )
    small, targets, *upstreams = example((4, vocab), device, torch.float16)
    logits = storage.as_strided((4, vocab), (stride, 1))
    logits.copy_(small)
    found = run(logits, targets, upstreams, impl)
    expected = run(small, targets, upstreams, impl)
    for name, value in found.items():
        assert torch.equal(value, expected[name])


def test_chunks_stay_within_the_budget_and_cover_all_rows(monkeypatch):
    monkeypatch.setattr(_token_logps_chunked, "CHUNK_BYTES", 3 * 4 * 41 * 5)
    for view in STRIDED.values():
        logits = view(torch.arange(3.0 * 8 * 41).view(3, 8, 41))
        seen = []
        for piece, rows in _token_logps_chunked._chunks(logits, copies=3):
            assert piece.numel() <= 41 * 5
            assert rows.start == len(seen)
            seen.extend(piece.flatten(0, 1))
            assert rows.stop == len(seen)
        assert torch.equal(torch.stack(seen), logits.flatten(0, -2))


class Largest(TorchDispatchMode):
    """Remember the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            old = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in old:
                self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


def test_chunked_never_holds_a_float32_copy_of_the_logits(monkeypatch):
    monkeypatch.setattr(_token_logps_chunked, "CHUNK_BYTES", 96 << 10)
    logits, targets, *upstreams = example((256, 501), "cpu", torch.bfloat16)
    stats = [torch.empty(256) for _ in range(5)]
    stats.insert(5, torch.empty(256, dtype=torch.bool))
    stats.append(torch.empty(256))
    with Largest() as largest:
        _token_logps_chunked.forward(logits, targets, 0.7, 5.0, -100, stats)
    assert 0 < largest.bytes <= 32 << 10

    grad = torch.empty_like(logits)
    with Largest() as largest:
        _token_logps_chunked.backward(
            grad, upstreams, logits, targets, [stats[1], stats[2], stats[3]], 0.7, 5.0, -100
        )
    assert 0 < largest.bytes <= 32 << 10


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_of_a_sum_and_of_one_row(impl, device):
    # Liger #968, NeMo Automodel #3853: only grad_output[0] was used.
    logits, targets, *_ = example((6, 29), device)
    for upstream in (torch.ones(()).expand(6), torch.eye(6)[4]):
        check(logits, targets, [upstream.to(device)], impl, names=())


@pytest.mark.parametrize("impl", IMPLS)
def test_entropy_alone_and_logps_alone(impl, device):
    logits, targets, g, h = example((4, 65), device)
    logits.requires_grad_()
    both = token_logps(logits, targets, outputs=("entropy",), impl=impl)
    by_entropy = torch.autograd.grad(both.entropy, logits, h, retain_graph=True)[0]
    by_logps = torch.autograd.grad(both.logps, logits, g)[0]
    expected = run(logits, targets, (g, h), impl, ("entropy",))["grad"]
    torch.testing.assert_close(by_entropy + by_logps, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(by_logps, run(logits, targets, (g,), impl)["grad"])


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_outputs_are_what_was_asked_for(impl, device):
    logits, targets, *_ = example((3, 11), device)
    logits.requires_grad_()
    assert isinstance(token_logps(logits, targets, impl=impl), torch.Tensor)
    for names in itertools.combinations(OUTPUTS, 2):
        found = token_logps(logits, targets, outputs=names, impl=impl)
        assert isinstance(found, TokenLogps) and found[0] is found.logps
        assert {n for n in OUTPUTS if getattr(found, n) is not None} == set(names)
        for name in names:
            assert getattr(found, name).requires_grad == (name == "entropy")
    assert not token_logps(logits.detach(), targets, impl=impl).requires_grad


@pytest.mark.parametrize("impl", (*IMPLS, "reference"))
def test_equal_largest_logits_are_all_top1(impl, device):
    logits = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [1.0, 3.0, 3.0]], device=device)
    targets = torch.tensor([0, 1, 2], device=device)
    found = token_logps(logits, targets, outputs=["is_top1"], impl=impl)
    assert found.is_top1.tolist() == [False, True, True]


BAD = {
    "logits: expected a tensor, got list": ([[1.0]], torch.zeros(1, dtype=torch.long), {}),
    "logits: expected dtype .*, got int64": (
        torch.ones(2, 3, dtype=torch.long),
        torch.zeros(2, dtype=torch.long),
        {},
    ),
    "logits: expected a vocabulary of at least 1": (
        torch.ones(2, 0),
        torch.zeros(2, dtype=torch.long),
        {},
    ),
    r"targets: expected shape \(2,\), got \(3,\)": (
        torch.ones(2, 3),
        torch.zeros(3, dtype=torch.long),
        {},
    ),
    "targets: expected dtype int32, int64, got float32": (torch.ones(2, 3), torch.zeros(2), {}),
    "targets: expected a tensor on cpu, as logits, got meta": (
        torch.ones(2, 3),
        torch.zeros(2, dtype=torch.long, device="meta"),
        {},
    ),
    r"targets: expected labels in \[0, 3\) or ignore_index=-100, got 3": (
        torch.ones(2, 3),
        torch.tensor([0, 3]),
        {},
    ),
    r"targets: expected labels in \[0, 3\) or ignore_index=-1, got -100": (
        torch.ones(2, 3),
        torch.tensor([0, -100]),
        {"ignore_index": -1},
    ),
    "temperature: expected a number above 0, got 0": (None, None, {"temperature": 0}),
    "temperature: expected a number above 0, got nan": (None, None, {"temperature": math.nan}),
    "temperature: expected a number, got str": (None, None, {"temperature": "1"}),
    "softcap: expected a number above 0, got -1": (None, None, {"softcap": -1}),
    "softcap: expected a finite number, got inf": (None, None, {"softcap": math.inf}),
    "outputs: expected one of 'lse'.*, got 'entropies'": (None, None, {"outputs": ["entropies"]}),
    "outputs: expected a sequence of names, got the string": (None, None, {"outputs": "lse"}),
    "outputs: expected distinct names": (None, None, {"outputs": ["lse", "lse"]}),
    "impl: expected one of 'auto'.*, got 'cuda'": (None, None, {"impl": "cuda"}),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("impl", ("chunked", "triton", "reference"))
def test_bad_arguments(impl, message):
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("CPU tensors, which Triton refuses first on a machine with a GPU")
    logits, targets, options = BAD[message]
    logits = torch.ones(2, 3) if logits is None else logits
    targets = torch.zeros(2, dtype=torch.long) if targets is None else targets
    with pytest.raises((TypeError, ValueError), match=message):
        token_logps(logits, targets, **{"impl": impl, **options})


@pytest.mark.gpu
def test_bad_label_stops_the_gpu_without_a_sync():
    # In a process of its own: a device-side assertion leaves its context unusable.
    import subprocess
    import sys

    code = (
        "import torch; from prefalign.kernels.token_logps import token_logps\n"
        "torch.cuda.set_sync_debug_mode('error')\n"
        "x = torch.zeros(2, 8, device='cuda'); t = torch.full((2,), 8, device='cuda')\n"
        "token_logps(x, t); print('launched', flush=True)\n"
        "torch.cuda.set_sync_debug_mode('default'); torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "launched" in done.stdout and done.returncode != 0
