"""The sizes that are measured.

N tokens, V vocabulary, D hidden, B pairs, T tokens of a sequence, K responses to a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

QUICK, CPU, FULL, GPU = "quick", "cpu", "full", "cuda"


@dataclass(frozen=True)
class Shape:
    """One size, by name, and the sets of sizes it belongs to.

    ``quick`` is for ``--quick``, ``cpu`` and ``cuda`` for such a device, ``full`` for a CPU that
    is given hours (``--full``).
    """

    name: str
    sets: tuple[str, ...]
    N: int = 0
    V: int = 0
    D: int = 0
    softcap: float | None = None
    B: int = 0
    T: int = 0
    K: int = 0

    def __str__(self) -> str:
        """Return the sizes that are set, as ``N 64  V 1,000``."""
        sizes = ((name, getattr(self, name)) for name in "NVDBTK")
        text = "  ".join(f"{name} {size:,}" for name, size in sizes if size)
        return text if self.softcap is None else f"{text}  softcap {self.softcap:g}"


# (vocabulary, hidden size, softcap) of the models' heads.
_MODELS = {
    "qwen2.5-0.5b": (151_936, 896, None),
    "llama-3.2-1b": (128_256, 2048, None),
    "llama-3-8b": (128_256, 4096, None),
    "gemma-2-2b": (256_000, 2304, 30.0),
    "gemma-3-1b": (262_144, 1152, None),
}


def _model(name: str, N: int, *sets: str, suffix: str = "") -> Shape:
    V, D, softcap = _MODELS[name]
    return Shape(name + suffix, sets, N=N, V=V, D=D, softcap=softcap)


HEADS = (
    Shape("tiny", (QUICK,), N=64, V=1000, D=64),
    Shape("tiny-softcap", (), N=72, V=1009, D=48, softcap=30.0),
    Shape("cpu-a", (FULL,), N=1024, V=64_000, D=896),
    Shape("cpu-b", (FULL,), N=512, V=32_000, D=2048),
    _model("qwen2.5-0.5b", 256, CPU, suffix="-n256"),
    *(_model(name, 256, FULL, suffix="-n256") for name in list(_MODELS)[1:]),
    *(_model(name, 8192, GPU) for name in _MODELS),
    _model("qwen2.5-0.5b", 64, CPU, GPU, suffix="-n64"),
    _model("llama-3-8b", 64, FULL, GPU, suffix="-n64"),
)

# Half as many rows on a GPU: the gate holds several tensors of N x V in float64.
LOGITS = (
    *(shape for shape in HEADS if GPU not in shape.sets),
    *(_model(name, 4096, GPU, suffix="-n4096") for name in _MODELS),
    _model("qwen2.5-0.5b", 64, CPU, GPU, suffix="-n64"),
)

BATCHES = (
    Shape("tiny-pairs", (QUICK,), B=8, T=16, K=3),
    Shape("64-pairs", (CPU, GPU), B=64, T=512, K=4),
    Shape("4096-pairs", (CPU, GPU), B=4096, T=256, K=8),
)
