"""The table of docs/scale.md: what scoring costs on paper, for models and clusters that nobody here has.

    python -m benchmarks.scale

Nothing here is measured. FLOPs count the visible half of causal attention, 2 for a multiplication with its addition.
"""

from __future__ import annotations

from typing import NamedTuple

SEQUENCES = 1_024
"""Completions of a step, each as long as its row of the table says."""
FLOPS_PER_GPU = 4e14
"""What a GPU is assumed to sustain, a second."""
MEMORY = 80e9
"""Bytes of a GPU."""


class Model(NamedTuple):
    """A dense model with grouped-query attention; bfloat16 weights."""

    name: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = (Model("8B", 8.2e9, 36, 32, 8, 128), Model("400B", 405e9, 126, 128, 8, 128))


def forward_flops(model: Model, tokens: int) -> float:
    """One forward of a sequence: two per weight and token, and q k and p v in each layer."""
    return 2 * model.parameters * tokens + 2 * model.layers * tokens**2 * model.heads * model.head_dim


def column_flops(model: Model, tokens: int, lse_known: bool = True) -> float:
    """The column sums of one layer: its scores again, and twice where the log-sum-exp of the rows is not known."""
    return (1 if lse_known else 2) * tokens**2 * model.heads * model.head_dim


def query_key_bytes(model: Model, tokens: int) -> float:
    """q and k of the scored layer in bfloat16: what the column pass reads at least."""
    return 2 * tokens * (model.heads + model.kv_heads) * model.head_dim


def result_bytes(tokens: int) -> float:
    """One float32 number a token: what tensor parallelism reduces over its ranks."""
    return 4 * tokens


def ring_bytes(model: Model, tokens: int, ranks: int) -> float:
    """What one rank of context parallelism sends: every block of k but the last, with its column sums of each kv head."""
    return (ranks - 1) / ranks * tokens * model.kv_heads * (2 * model.head_dim + 4)


def first_limit(model: Model, gpus: int) -> str:
    """What stops or slows scoring first."""
    return "weights do not fit" if 2 * model.parameters / gpus > MEMORY else "the forward of an own pass"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value:,.1f} s"


def table() -> str:
    """The rows of the page."""
    lines = [
        "| model | GPUs | tokens | weights per GPU | riding | own pass | riding / forward | all-reduce | ring of k "
        "| first limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for gpus in (8, 512):
            for tokens in (4_096, 131_072):
                riding = column_flops(model, tokens, lse_known=False)
                seconds = SEQUENCES / gpus / FLOPS_PER_GPU
                forward = forward_flops(model, tokens)
                cells = (
                    model.name,
                    f"{gpus}",
                    f"{tokens // 1024}k",
                    f"{2 * model.parameters / gpus / 1e9:.3g} GB",
                    _seconds(riding * seconds),
                    _seconds((forward + riding) * seconds),
                    f"{riding / forward:.2%}",
                    f"{result_bytes(tokens) / 1e3:.3g} kB",
                    f"{ring_bytes(model, tokens, 8) / 1e6:.3g} MB",
                    first_limit(model, gpus),
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
