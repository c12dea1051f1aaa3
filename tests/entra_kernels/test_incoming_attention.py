"""`incoming_attention` on every backend, held to the reference in float64.

Error budget: at most twice the error of eager attention in the inputs' dtype, plus `SLACK` of the largest value. `SLACK` is
there because eager attention can be exact by luck on a handful of tokens. It is 16 float32 roundings, about what a sum of
products, a scale, an exponential and a sum of probabilities take.

Memory outside the sequences holds NaN in every test of values. Triton runs with small tiles, so that a few dozen tokens have
tiles on the diagonal, tiles off it and a last one cut short; `test_launch_sizes` takes the real ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import os

import pytest
import torch
from attention_problems import BACKENDS, DEVICES, SLACK, TARGETS, in_dtype, problem, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from entra_kernels import incoming_attention
from entra_kernels._spans import Spans
from entra_kernels.reference import AttentionOptions, attention_probabilities, future_queries

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # NaN in, NaN out


def eager(q, k, arguments):
    """What a model's eager attention gives: its softmax runs in float32 and is rounded to the dtype; the sums are float32."""

    def rounded(*tensors, **options):
        return attention_probabilities(*tensors, **options).to(q.dtype).to(torch.float32)

    reference = importlib.import_module("entra_kernels.reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "attention_probabilities", rounded)
        return incoming_attention(q, k, backend="reference", **arguments)


def check(q, k, arguments, backend):
    """Runs the backend and holds it to the budget; returns its result."""
    exact = incoming_attention(q.double(), k.double(), backend="reference", **in_dtype(arguments, torch.float64))
    ours = incoming_attention(q, k, backend=backend, **arguments)
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    assert ours.isfinite().all()
    if exact.numel():
        error = (ours - exact).abs().max().item()
        budget = 2 * (eager(q, k, arguments) - exact).abs().max().item() + SLACK * exact.abs().max().item()
        assert error <= budget, f"error {error:.3g} is over the budget {budget:.3g}"
    return ours


CASES = {
    "right padded": {},
    "left padded": {"layout": "left"},
    "padded on both sides": {"layout": "both"},
    "packed": {"layout": "packed", "lengths": (33, 1, 64, 0, 16)},
    "heads inside tokens": {"strides": "heads inside"},
    "expanded batch": {"strides": "expanded", "lengths": (50, 50)},
    "every second element": {"strides": "every second"},
    "one head": {"heads": 1, "kv_heads": 1},
    "group of 3": {"heads": 9, "kv_heads": 3, "lengths": (37,)},
    "group of 4": {"heads": 4, "kv_heads": 1},
    "group of 8": {"heads": 8, "kv_heads": 1, "lengths": (40,)},
    **{
        f"d={d}": {"head_dim": d, "lengths": (35,), "heads": 2, "kv_heads": 1} for d in (16, 64, 72, 80, 96, 128, 192, 256, 512)
    },
    **{f"window {w}": {"sliding_window": w} for w in (1, 2, 5, 20, 40, 1000)},
    "window 2**70": {"sliding_window": 2**70},
    "least softcap": {"softcap": 1e-30},
    "largest softcap": {"softcap": 1e30},
    "window, packed": {"sliding_window": 24, "layout": "packed"},
    "softcap": {"softcap": 1.5},
    "wide softcap": {"softcap": 1e4, "scale": 2.0},
    "saturated softcap": {"softcap": 0.01, "scale": 30.0},
    "sinks": {"sinks": True},
    "given lse": {"given_lse": True},
    "given lse, packed": {"given_lse": True, "layout": "packed"},
    "per head": {"per_head": True},
    "per head, packed": {"per_head": True, "layout": "packed"},
    "row weights": {"row_weights": True},
    "not normalized": {"normalize": False},
    "large scale": {"scale": 3.0},
    "negative scale": {"scale": -0.7},
    "scale 0": {"scale": 0.0},
    "everything": {
        "sliding_window": 20,
        "softcap": 2.0,
        "sinks": True,
        "row_weights": True,
        "layout": "packed",
        "per_head": True,
        "strides": "every second",
        "head_dim": 24,
    },
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_against_the_reference(case, target, backend, small_tiles):
    q, k, arguments = problem(*target, **case)
    check(q, k, arguments, backend)


LAUNCHED = {
    "plain": {},
    "given lse": {"given_lse": True},
    "per head": {"per_head": True},
    "sinks, packed": {"sinks": True, "layout": "packed"},
    "everything": {"sliding_window": 200, "softcap": 3.0, "row_weights": True, "sinks": True},
    "last": {"last": 300, "include_diagonal": True, "per_head": True},
    "maximum": {"last": 500, "reduction": "max", "row_weights": True},
    "sampled": {"sample_rows": 300},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 72, 128, 192, 256, 512])
@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in LAUNCHED.items()])
def test_launch_sizes_on_matrix_units(options, head_dim, dtype):
    """The code that ships: the small tiles of the other tests are too small for a warpgroup's matrix instruction."""
    options = dict(options)
    sample_rows = options.pop("sample_rows", None)
    q, k, arguments = problem("cuda", dtype, lengths=(1100, 700), heads=4, kv_heads=1, head_dim=head_dim, **options)
    if sample_rows is None:
        check(q, k, arguments, "triton")
        return
    ours, exact = (
        incoming_attention(*tensors, sample_rows=sample_rows, backend=backend, **arguments)
        for tensors, backend in (((q, k), "triton"), ((q.double(), k.double()), "reference"))
    )
    for field, right in zip(ours, exact, strict=True):
        assert (field - right).abs().max() <= 4 * SLACK * exact.estimate.max()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [{"head_dim": 64}, {"sliding_window": 150}], ids=["full", "window"])
def test_launch_sizes(options, target, backend):
    """Tiles as they are launched, with more than two of them to a sequence."""
    tokens = 600 if target[1] != torch.float32 else 200
    q, k, arguments = problem(*target, lengths=(tokens, 13), heads=2, kv_heads=1, **options)
    check(q, k, arguments, backend)


def test_launch_sizes_fit_every_chip():
    """Whatever the head dim: 227 KiB (sm_90, sm_100), 163 (sm_80), 99 (sm_86, sm_89, sm_120), 64 (gfx942)."""
    launch = importlib.import_module("entra_kernels._triton.launch")
    chips = {"sm_90": 227, "sm_100": 227, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_120": 99, "gfx942": 64}
    for arch, kib in chips.items():
        chip = launch.Chip(arch, kib * 1024)
        for element_size, options, group in itertools.product((2, 4), (False, True), (1, 8)):
            for head_dim in range(1, 513):
                size = launch.attention_launch(head_dim, group, element_size, chip, options=options)
                assert size.resident % size.streamed == 0
                assert launch.shared_bytes(size, element_size, chip) <= chip.shared_memory
                assert size.least_piece * group >= launch.LEAST_WORK
                if size.max_registers is not None:
                    assert 2 * 32 * size.num_warps * size.max_registers <= 65536


def test_each_launch_size_is_measured_or_assumed():
    launch = importlib.import_module("entra_kernels._triton.launch")
    for kind, entries in launch._table().items():
        for entry in entries:
            assert ("measured" in entry) != ("assumed" in entry), (kind, entry)
            assert entry.get("assumed") or set(entry["measured"]) == {"device", "date", "triton"}


@pytest.mark.parametrize(
    ("chip", "head_dim", "element_size", "options", "size"),
    [
        (("sm_90", 227), 128, 2, False, (256, 128, 128, 8, 2, None, 2, False, (4, False))),
        (("sm_90", 227), 256, 2, False, (256, 64, 256, 8, 3, None, 2, False, (3, True))),
        (("sm_90", 227), 80, 2, False, (256, 64, 128, 8, 2, 128, 2, False, None)),
        (("sm_90", 227), 128, 2, True, (128, 64, 128, 8, 3, 128, 2, False, None)),
        (("sm_90", 227), 192, 2, False, (128, 128, 256, 8, 2, None, 2, True, None)),
        (("sm_90", 227), 24, 4, False, (64, 64, 32, 8, 1, None, 2, False, None)),
        (("sm_100", 227), 128, 2, False, (128, 64, 128, 4, 3, None, 2, False, None)),
        (("sm_80", 163), 128, 2, False, (128, 64, 128, 8, 3, 128, 2, False, None)),
        (("sm_80", 163), 128, 2, True, (128, 64, 128, 8, 2, None, 2, False, None)),
        (("sm_80", 163), 256, 2, False, (256, 32, 256, 8, 3, None, 2, False, None)),
        (("sm_80", 163), 512, 2, False, (64, 64, 512, 4, 2, None, 2, False, None)),
        (("sm_86", 99), 256, 2, False, (128, 64, 256, 8, 2, None, 2, False, None)),
        (("sm_86", 99), 512, 2, True, (64, 32, 512, 4, 2, None, 2, False, None)),
        (("gfx942", 64), 256, 2, True, (64, 32, 256, 4, 2, None, 2, False, None)),
    ],
)
def test_launch_sizes_in_use(chip, head_dim, element_size, options, size):
    launch = importlib.import_module("entra_kernels._triton.launch")
    found = launch.attention_launch(head_dim, 4, element_size, launch.Chip(chip[0], chip[1] * 1024), options=options)
    assert found == size


@pytest.mark.parametrize(
    ("arch", "size", "taken"),
    [
        ("sm_80", (256, 32, 256, 8, 3), 163_840),
        ("sm_80", (256, 64, 256, 8, 2), 165_888),
        ("sm_80", (128, 64, 256, 8, 3), 132_096),
        ("sm_86", (64, 32, 512, 4, 2), 98_816),
        ("sm_89", (128, 64, 256, 8, 2), 99_328),
        ("sm_120", (64, 64, 256, 4, 2), 66_048),
        ("sm_90", (256, 64, 256, 8, 3), 229_376),
        ("sm_100", (128, 64, 128, 4, 3), 82_944),
    ],
)
def test_shared_memory_is_reckoned_as_triton_takes_it(arch, size, taken):
    """What Triton 3.7.1 says of compiled passes in bfloat16. Where no two warps share a row, 2 KiB are not taken."""
    launch = importlib.import_module("entra_kernels._triton.launch")
    reckoned = launch.shared_bytes(launch.AttentionLaunch(*size, None, 1), 2, launch.Chip(arch, 0))
    assert taken <= reckoned <= taken + 2048


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 75}, {"row_weights": True, "softcap": 3.0}], ids=["full", "window", "weights, softcap"]
)
def test_starting_a_product_ahead_changes_no_bit(options, target, monkeypatch):
    """`AttentionLaunch.ahead` is another order of the same operations. Enough tokens for no, one and many tiles ahead."""
    if target[0] == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off because a GPU is present")
    attention = importlib.import_module("entra_kernels._triton.attention")
    launch = importlib.import_module("entra_kernels._triton.launch")
    q, k, arguments = problem(*target, lengths=(150, 32, 40, 13), heads=2, kv_heads=1, **options)
    results = []
    for ahead in (False, True):
        size = launch.AttentionLaunch(32, 16, 32, 4, 1, None, least_piece=4, ahead=ahead)
        if target[1] == torch.float32:
            size = size._replace(depth=16)
        monkeypatch.setattr(attention, "attention_launch", lambda *_, size=size, **__: size)
        results.append(check(q, k, arguments, "triton"))
    assert torch.equal(*results)


def test_float16_is_computed_in_float32(backend, small_tiles):
    """Rounding the probabilities to float16 would be an error of 5e-4: a thousand times this budget."""
    q, k, arguments = problem("cpu", torch.float16)
    exact = incoming_attention(q.double(), k.double(), backend="reference", **arguments)
    single = incoming_attention(q.float(), k.float(), backend="reference", **arguments)
    budget = 2 * (single - exact).abs().max() + SLACK * exact.max()
    assert (incoming_attention(q, k, backend=backend, **arguments) - exact).abs().max() <= budget


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape(name, data):
    if name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off because a GPU is present")
    layout = data.draw(st.sampled_from(["left", "right", "both", "packed"]))
    kv_heads = data.draw(st.integers(1, 2))
    q, k, arguments = problem(
        "cpu",
        data.draw(st.sampled_from([torch.float32, torch.float16])),
        lengths=tuple(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))),
        heads=kv_heads * data.draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=data.draw(st.integers(1, 40)),
        layout=layout,
        strides=data.draw(st.sampled_from(["contiguous", "heads inside", "every second"])),
        sliding_window=data.draw(st.none() | st.integers(1, 50)),
        softcap=data.draw(st.none() | st.floats(0.1, 50)),
        row_weights=data.draw(st.booleans()),
        reduction=data.draw(st.sampled_from(["mean", "sum", "max"])),
        include_diagonal=data.draw(st.booleans()),
        last=data.draw(st.none() | st.integers(1, 50)),
        **data.draw(st.sampled_from([{}, {"sinks": True}, {"given_lse": True}])),
    )
    check(q, k, arguments | {"heads": data.draw(st.sampled_from(["mean", "query", "kv"]))}, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 7], ids=["full", "window"])
def test_columns_with_the_diagonal_add_up_to_the_tokens(window, device, backend, small_tiles):
    """Each row of A sums to 1, so the sums over strictly future queries and the diagonal make N per head."""
    tokens = 50
    q, k, _ = problem(device, torch.float32, lengths=(tokens,))
    q, k = q[:, :, :tokens], k[:, :, :tokens]
    sums = incoming_attention(q, k, per_head=True, normalize=False, sliding_window=window, backend=backend).sum(-1)[0]
    attention = attention_probabilities(q[0].double(), k[0].double(), scale=32**-0.5, sliding_window=window)
    diagonal = attention.diagonal(dim1=1, dim2=2).sum(-1)
    assert (sums + diagonal - tokens).abs().max() <= tokens * SLACK


@pytest.mark.parametrize("device", DEVICES)
def test_equal_scores_give_harmonic_numbers(device, backend, small_tiles):
    """With K = 0, A_ji = 1 / j and mu_i = (H_N - H_i) / (N - i); lift (w_j = j) is 1 everywhere but on the last token."""
    tokens = 70
    q = random(1, 4, tokens, 16).to(torch.float32).to(device)
    k = torch.zeros(1, 2, tokens, 16, device=device)
    harmonic = (1 / torch.arange(1, tokens + 1, dtype=torch.float64, device=device)).cumsum(0)
    future = future_queries(tokens, None, torch.device(device))
    expected = (harmonic[-1] - harmonic) / future.clamp(min=1)
    mu = incoming_attention(q, k, backend=backend)[0]
    assert (mu - expected).abs().max() <= SLACK * expected.max()

    j = torch.arange(1, tokens + 1, dtype=torch.float32, device=device)
    lift = incoming_attention(q, k, row_weights=j[None], backend=backend)[0]
    assert (lift[:-1] - 1).abs().max() <= SLACK
    assert lift[-1] == 0

    window = 9
    weights = j.clamp(max=window)
    lift = incoming_attention(q, k, row_weights=weights[None], sliding_window=window, backend=backend)[0]
    assert (lift[:-1] - 1).abs().max() <= SLACK


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 20, "per_head": True}, {"given_lse": True}], ids=["plain", "window", "lse"]
)
def test_packed_equals_separate(options, target, backend, small_tiles):
    """Bit for bit, in another layout, at another place of another batch, and in another run."""
    lengths = (45, 7, 0, 64, 1)
    q, k, arguments = problem(*target, lengths=lengths, layout="packed", **options)
    packed = incoming_attention(q, k, backend=backend, **arguments)
    assert torch.equal(packed, incoming_attention(q, k, backend=backend, **arguments))
    bounds = arguments.pop("cu_seqlens").tolist()
    lse = arguments.pop("lse", None)
    for first, end in itertools.pairwise(bounds):
        span = slice(first, end)
        alone = incoming_attention(
            q[None, span].transpose(1, 2),
            k[None, span].transpose(1, 2),
            lse=None if lse is None else lse[None, :, span],
            backend=backend,
            **arguments,
        )
        assert torch.equal(packed[..., span], alone[0])
    assert (packed[..., bounds[-1] :] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_place_in_the_row_changes_no_bit(device, backend):
    """From 5 kv heads on, ATen's sum over them adds in one order in vectors and in another in what is left at the end."""
    lengths = (200, 151, 77)
    q, k, arguments = problem(device, torch.float32, lengths=lengths, heads=8, kv_heads=8, head_dim=16, layout="packed")
    packed = incoming_attention(q, k, backend=backend, **arguments)
    for first, end in itertools.pairwise(arguments["cu_seqlens"].tolist()):
        alone = incoming_attention(q[None, first:end].transpose(1, 2), k[None, first:end].transpose(1, 2), backend=backend)
        assert torch.equal(packed[first:end], alone[0])


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_32_bits(device, backend, small_tiles):
    """Dimension 16 lies 2**31 + 128 elements after dimension 0: as a 32-bit product that offset is negative."""
    stride = 134_217_736
    values, k = (random(1, 1, 20, 17, seed=seed).to(device, torch.float16) for seed in (1, 2))
    q = torch.empty(17 * stride, dtype=torch.float16, device=device).as_strided((1, 1, 20, 17), (0, 0, 1, stride))
    q.copy_(values)
    assert torch.equal(incoming_attention(q, k, backend=backend), incoming_attention(values, k, backend=backend))


@pytest.mark.parametrize("device", DEVICES)
def test_appending_a_token_adds_its_row(device, backend, small_tiles):
    """Causal: sums over N + 1 tokens are those over N plus what the new query gives."""
    q, k, _ = problem(device, torch.float32, lengths=(65,))
    q, k = q[:, :, :65], k[:, :, :65]
    before = incoming_attention(q[:, :, :64], k[:, :, :64], per_head=True, normalize=False, backend=backend)
    after = incoming_attention(q, k, per_head=True, normalize=False, backend=backend)
    row = attention_probabilities(q[0].double(), k[0].double(), scale=32**-0.5)[:, -1]
    added = after[0].double()
    added[:, :-1] -= before[0]
    row[:, -1] = 0  # the diagonal does not count
    assert (added - row).abs().max() <= SLACK * after.max()


@pytest.mark.parametrize("device", DEVICES)
def test_last_token_and_lonely_token_get_nothing(device, backend):
    q, k, arguments = problem(device, torch.float32, lengths=(9, 1, 0), layout="packed")
    out = incoming_attention(q, k, backend=backend, **arguments)
    assert out[8] == 0
    assert out[9] == 0
    assert (out[:8] > 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_in_nothing_out(device, backend):
    q, k = torch.zeros(5, 4, 16, device=device), torch.zeros(5, 2, 16, device=device)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    assert torch.equal(incoming_attention(q, k, cu_seqlens=nothing, backend=backend), torch.zeros(5, device=device))
    assert incoming_attention(q[:0], k[:0], cu_seqlens=nothing, backend=backend).shape == (0,)
    assert incoming_attention(q[:0], k[:0], cu_seqlens=nothing, per_head=True, backend=backend).shape == (4, 0)
    padded_q, padded_k = torch.zeros(0, 4, 5, 16, device=device), torch.zeros(0, 2, 5, 16, device=device)
    assert incoming_attention(padded_q, padded_k, backend=backend).shape == (0, 5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_bad_values_stay_in_their_sequence(value, device, backend, small_tiles):
    q, k, arguments = problem(device, torch.float32, lengths=(40, 40, 30), layout="packed")
    clean = incoming_attention(q, k, backend=backend, **arguments)
    q, k = q.clone(), k.clone()
    q[40:80:7] = value
    k[50] = value
    out = incoming_attention(q, k, backend=backend, **arguments)
    assert out[40:80].isnan().any()
    assert torch.equal(out[:40], clean[:40])
    assert torch.equal(out[80:], clean[80:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 7}, {"per_head": True}, {"per_head": True, "sliding_window": 40}, {"reduction": "max"}],
    ids=["full", "window", "per head", "per head, window", "max"],
)
@pytest.mark.parametrize("given_lse", [False, True], ids=["", "given lse"])
def test_nan_reaches_only_what_the_query_sees(given_lse, options, device, backend, small_tiles):
    """Found NaN above the diagonal, which reached later tokens, even the last one."""
    q, k, arguments = problem(device, torch.float32, lengths=(70,), layout="packed", given_lse=given_lse, **options)
    bad, window = 45, options.get("sliding_window", 70)
    if given_lse:
        arguments["lse"][:, bad] = math.nan
    else:
        q[bad] = math.nan
    out = incoming_attention(q, k, backend=backend, **arguments)
    expected = [bad - window < i < bad for i in range(73)]
    assert (out if out.ndim == 1 else out[0]).isnan().tolist() == expected
    assert (out[..., 69:] == 0).all()
    assert (out.isnan() == torch.tensor(expected, device=device)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=["inf", "-inf"])
def test_infinite_lse_reaches_only_what_the_query_sees(value, device, backend, small_tiles):
    """Probability 0 below the diagonal for inf, infinite for -inf; above it nothing."""
    q, k, arguments = problem(device, torch.float32, lengths=(70,), layout="packed", given_lse=True)
    clean = incoming_attention(q, k, backend=backend, **arguments)
    arguments["lse"][:, 45] = value
    out = incoming_attention(q, k, backend=backend, **arguments)
    assert out.isinf().tolist() == [value < 0 and i < 45 for i in range(73)]
    assert not out.isnan().any()
    assert torch.equal(out[45:], clean[45:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [3e38, math.inf], ids=["3e38", "inf"])
def test_a_huge_sink_takes_all(value, device, backend, small_tiles):
    """In log2 units 3e38 is beyond float32: the result was NaN."""
    q, k, arguments = problem(device, torch.float32, heads=2, kv_heads=1, per_head=True)
    sinks = torch.tensor([value, -math.inf], device=device)
    out = incoming_attention(q, k, sinks=sinks, backend=backend, **arguments)
    assert (out[:, 0] == 0).all()
    assert (out[:, 1] - incoming_attention(q, k, backend=backend, **arguments)[:, 1]).abs().max() <= SLACK


def test_grids_have_one_axis(small_tiles):
    """CUDA allows 65,535 programs on the others: a batch must not be one of them."""
    grids = []

    class Grid(NoLaunch):
        def __getitem__(self, grid):
            grids.append(grid)
            return super().__getitem__(grid)

    q, k, arguments = problem("cpu", torch.float32, row_weights=True)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in KERNELS:
            patch.setattr(f"entra_kernels._triton.{module}.{name}", Grid())
        incoming_attention(q, k, backend="triton", **arguments)
    assert len(grids) == len(KERNELS)
    assert all(len(grid) == 1 for grid in grids)


@pytest.mark.gpu
def test_batch_larger_than_a_grid_axis():
    q, k = (
        random(1, 2, 3, 16).half().cuda().expand(65_537, -1, -1, -1),
        random(1, 1, 3, 16).half().cuda().expand(65_537, -1, -1, -1),
    )
    out = incoming_attention(q, k)
    assert torch.equal(out, incoming_attention(q[:1], k[:1]).expand_as(out))


def test_no_copy_of_q_or_k_and_no_wait_for_the_device(small_tiles):
    """What the Triton launcher does besides launching stays smaller than q and never reads a value back."""

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.calls.append((str(function), out.untyped_storage().data_ptr() if isinstance(out, torch.Tensor) else 0, out))
            return out

    tokens = 2000
    q, k, _ = problem("cpu", torch.float32, lengths=(tokens - 3, tokens - 503), strides="every second")
    ends = torch.tensor([tokens, tokens - 500])
    with Recorder() as recorder:
        launch_nothing(q, k, Spans(None, ends, 2, tokens, 2), row_weights=torch.ones(2, tokens))
    mine = {q.untyped_storage().data_ptr(), k.untyped_storage().data_ptr()}
    assert recorder.calls
    for name, storage, out in recorder.calls:
        assert "_local_scalar_dense" not in name, f"{name} waits for the device"
        assert "nonzero" not in name, f"{name} waits for the device"
        if isinstance(out, torch.Tensor) and storage not in mine:
            assert out.numel() < k.numel(), f"{name} makes {list(out.shape)}"


@pytest.mark.parametrize("device", DEVICES)
def test_bounds_of_any_strides(device, backend, small_tiles):
    """Columns of one tensor, one length for all rows, every second bound: a kernel took them as contiguous."""
    q, k, arguments = problem(device, torch.float32, lengths=(40, 40), layout="both")
    expected = incoming_attention(q, k, backend=backend, **arguments)
    columns = torch.stack([arguments["start"], arguments["length"]], dim=1)
    start, length = columns.unbind(1)
    assert torch.equal(incoming_attention(q, k, start=start, length=length, backend=backend), expected)
    q, k = q.nan_to_num(), k.nan_to_num()
    whole = incoming_attention(q, k, length=torch.tensor([30, 30], device=device), backend=backend)
    expanded = torch.tensor(30, device=device).expand(2)
    assert torch.equal(incoming_attention(q, k, length=expanded, backend=backend), whole)
    q, k = q[0].transpose(0, 1), k[0].transpose(0, 1)
    bounds = torch.tensor([0, 17, 40], device=device)
    assert torch.equal(
        incoming_attention(q, k, cu_seqlens=bounds.repeat_interleave(2)[::2], backend=backend),
        incoming_attention(q, k, cu_seqlens=bounds, backend=backend),
    )


@pytest.mark.parametrize("tokens", [1, 1000, 32_768, 1_048_576])
@pytest.mark.parametrize("given_lse", [False, True], ids=["two passes", "given lse"])
def test_extra_memory(tokens, given_lse):
    """At most 4 N (H + 2 Hkv) bytes + 16 MiB, whatever N: counted from what the launcher allocates."""
    q = torch.empty(1, 1, 1, 1, dtype=torch.float16).expand(1, 32, tokens, 128)
    k = torch.empty(1, 1, 1, 1, dtype=torch.float16).expand(1, 8, tokens, 128)
    lse = torch.empty(1, 1, 1).expand(1, 32, tokens) if given_lse else None
    allocated = allocated_by_launcher(q, k, Spans(None, None, 1, tokens, 1), lse=lse)
    assert tokens * 4 < allocated <= 4 * tokens * (32 + 2 * 8) + 2**24


@pytest.mark.parametrize(("count", "tokens", "packed"), [(65_537, 3, False), (1024, 100, True), (64, 1000, True)])
def test_extra_memory_of_many_short_sequences(count, tokens, packed):
    """Scratch space of one piece per SM for each of 65,537 rows of 3 tokens would be 35 GB."""
    batch, row = (1, count * tokens) if packed else (count, tokens)
    q = torch.empty(1, 1, 1, 1, dtype=torch.float16).expand(batch, 32, row, 128)
    k = torch.empty(1, 1, 1, 1, dtype=torch.float16).expand(batch, 8, row, 128)
    bounds = torch.zeros(count + 1, dtype=torch.int32)
    spans = Spans(bounds[:-1], bounds[1:], count, row, 1) if packed else Spans(None, None, count, row, batch)
    tiles = 256 * (count * tokens // 256 + count)
    # The log-sum-exp and the sums in whole tiles, and up to 8.25 further pieces per tile of 256 keys (G = 4).
    assert allocated_by_launcher(q, k, spans) <= 4 * tiles * (32 + 8 * (1 + 8.25)) + 4 * count * tokens + 2**20


def allocated_by_launcher(q, k, spans, **options):
    """Bytes of all tensors that the Triton launcher makes."""

    class Counter(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.storages = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.storages[out.untyped_storage().data_ptr()] = out.untyped_storage()  # kept, so that no address comes twice
            return out

    with Counter() as counter:
        launch_nothing(q, k, spans, **options)
    for tensor in (q, k, *options.values()):
        if tensor is not None:
            counter.storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in counter.storages.values())


KERNELS = (
    ("plan", "_count_tiles_kernel"),
    ("plan", "_place_tiles_kernel"),
    ("attention", "_row_lse_kernel"),
    ("attention", "_column_sum_kernel"),
    ("attention", "_lay_out_kernel"),
    ("attention", "_add_kernel"),
)


def launch_nothing(q, k, spans, **options):
    """The Triton launcher without its kernels."""
    attention = importlib.import_module("entra_kernels._triton.attention")
    with pytest.MonkeyPatch.context() as patch:
        for module, name in KERNELS:
            patch.setattr(f"entra_kernels._triton.{module}.{name}", NoLaunch())
        attention.incoming_attention(q, k, spans, AttentionOptions(scale=1.0, **options))


class NoLaunch:
    """A kernel that is not launched."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


def spans_of(arguments):
    return arguments["start"], arguments["start"] + arguments["length"], len(arguments["start"])


@pytest.mark.parametrize("device", DEVICES)
def test_custom_op(device, backend, small_tiles):
    q, k, arguments = problem(device, torch.float32, lengths=(20, 11))
    q, k = q.nan_to_num(), k.nan_to_num()
    torch.library.opcheck(
        torch.ops.entra_kernels.incoming_attention.default,
        (q, k, *spans_of(arguments), None, None, None, backend, 0.2, *[None] * 5, True, False, "mean", "mean", False),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_custom_op_with_every_option(device, backend, small_tiles):
    q, k, arguments = problem(device, torch.float32, lengths=(20, 11), sinks=True, row_weights=True)
    q, k, weights = q.nan_to_num(), k.nan_to_num(), arguments["row_weights"].nan_to_num()
    sinks, spans, none = arguments["sinks"], spans_of(arguments), (None, None, None)
    operation = torch.ops.entra_kernels.incoming_attention.default
    if backend != "triton":
        every = (True, True, "max", "kv", True)
        torch.library.opcheck(operation, (q, k, *spans, *none, backend, 0.2, 9, 3.0, sinks, None, weights, *every))
    lse = torch.full(q.shape[:3], 4.0, device=device)
    form = (True, False, "mean", "query", False)
    torch.library.opcheck(operation, (q, k, *spans, *none, backend, 0.2, 9, 3.0, None, lse, weights, *form))
    placed = (q[:, :, :5], k, *spans, None, spans[0], 3)
    if backend != "triton":
        torch.library.opcheck(operation, (*placed, backend, 0.2, None, None, None, None, weights[:, :5], *form))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph(device, backend, small_tiles):
    q, k, arguments = problem(device, torch.float32, lengths=(20, 11), sinks=True, sliding_window=9)

    def score(q, k, **arguments):
        return 2 * incoming_attention(q, k, backend=backend, **arguments)

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, **arguments), score(q, k, **arguments))


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu():
    q, k, arguments = problem("cuda", torch.bfloat16)
    assert torch.equal(incoming_attention(q, k, **arguments), incoming_attention(q, k, backend="triton", **arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tensors need not be on a CPU")
def test_auto_is_torch_on_a_cpu():
    q, k, arguments = problem("cpu", torch.float32)
    assert torch.equal(incoming_attention(q, k, **arguments), incoming_attention(q, k, backend="torch", **arguments))


def test_export_keeps_auto():
    """A program that is exported on a CPU runs Triton on a GPU, and torch here."""

    class Score(torch.nn.Module):
        def forward(self, q, k, arguments):
            return incoming_attention(q, k, **arguments)

    q, k, arguments = problem("cpu", torch.float32)
    program = torch.export.export(Score(), (q, k, arguments))
    (call,) = [node for node in program.graph.nodes if node.op == "call_function" and "entra_kernels" in str(node.target)]
    assert "auto" in call.args
    assert "torch" not in call.args
    assert torch.equal(program.module()(q, k, arguments), incoming_attention(q, k, **arguments))


def test_meta_tensors_have_shapes():
    q, k = Q.to("meta"), K.to("meta")
    assert incoming_attention(q, k, per_head=True).shape == (2, 4, 8)
    assert incoming_attention(q, k, sample_rows=4).standard_error.shape == (2, 8)
    assert incoming_attention(q, k, start=torch.zeros(2, dtype=torch.int64, device="meta")).device.type == "meta"


def test_autocast_takes_two_dtypes_as_torch_does():
    q, k, arguments = problem("cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = incoming_attention(q, k.bfloat16(), **arguments)
        alike = incoming_attention(q, k, **arguments)
    assert torch.equal(ours, incoming_attention(q.bfloat16(), k.bfloat16(), **arguments))
    assert torch.equal(alike, incoming_attention(q, k, **arguments))


def test_float64_stays_float64():
    q, k, arguments = problem("cpu", torch.float64)
    exact = incoming_attention(q, k, backend="reference", **arguments)
    ours = incoming_attention(q, k, backend="torch", **arguments)
    assert ours.dtype == exact.dtype == torch.float64
    assert (ours - exact).abs().max() <= 16 * torch.finfo(torch.float64).eps * exact.max()


Q, K = torch.zeros(2, 4, 8, 16), torch.zeros(2, 2, 8, 16)
MANY = torch.zeros(1, 600, 32, 16)
PACKED_Q, PACKED_K, BOUNDS = torch.zeros(8, 4, 16), torch.zeros(8, 2, 16), torch.tensor([0, 8])
REFUSALS = {
    "dtype of q": ((Q.int(), K), {}, TypeError, "q has dtype int32; it must be one of .* convert"),
    "an array": ((Q.numpy(), K), {}, TypeError, r"^q=ndarray of shape \[2, 4, 8, 16\] must be a torch.Tensor, not ndarray$"),
    "a number that is an array": ((Q, K), {"scale": Q.numpy()}, TypeError, r"scale=ndarray of shape \[2, 4, 8, 16\] must be a"),
    "a long list": (([1.0] * 999, K), {}, TypeError, r"^.{0,150}$"),
    "FlashAttention's layout, GQA": (
        (Q.transpose(1, 2), K.transpose(1, 2)),
        {},
        ValueError,
        r"q has shape \[2, 8, 4, 16\] and k \[2, 8, 2, 16\], which look like \[B, N, H, D\].*pass q.transpose\(1, 2\)",
    ),
    "FlashAttention's layout, as many heads": ((MANY, MANY), {}, ValueError, r"look like \[B, N, H, D\]"),
    "not a tensor": (([1.0], K), {}, TypeError, "q=.* must be a torch.Tensor, not list"),
    "dtypes differ": ((Q.half(), K), {}, TypeError, "k has dtype torch.float32 but q has torch.float16.*k.to"),
    "dtype of start": ((Q, K), {"start": torch.zeros(2)}, TypeError, "start has dtype float32"),
    "dtype of sinks": ((Q, K), {"sinks": torch.zeros(4, dtype=torch.int64)}, TypeError, "sinks has dtype int64"),
    "float64 in Triton": ((Q.double(), K.double()), {"backend": "triton"}, TypeError, "no float64; use backend='torch'"),
    "devices": ((Q, K.to("meta")), {}, ValueError, "k is on meta, q on cpu; move it with k.to"),
    "unknown backend": ((Q, K), {"backend": "cuda"}, ValueError, "backend='cuda' must be one of 'auto', 'reference'"),
    "both layouts": ((PACKED_Q, PACKED_K), {"cu_seqlens": BOUNDS, "start": BOUNDS}, ValueError, "pass one or the other"),
    "packed, 4 dims": ((Q, K), {"cu_seqlens": BOUNDS}, ValueError, r"q has shape \[2, 4, 8, 16\].*must be \[T, H, D\]"),
    "padded, 3 dims": ((PACKED_Q, PACKED_K), {}, ValueError, "with cu_seqlens"),
    "cu_seqlens dims": ((PACKED_Q, PACKED_K), {"cu_seqlens": BOUNDS[None]}, ValueError, r"cu_seqlens has shape \[1, 2\]"),
    "tokens": ((Q, K[:, :, :7]), {}, ValueError, "q has 8 tokens and k 7; a query stands at one of the keys"),
    "heads": ((Q[:, :3], K), {}, ValueError, "q_heads=3 must be a multiple of kv_heads=2; check the model's config"),
    "no kv heads": ((Q, K[:, :0]), {}, ValueError, "q_heads=4 must be a multiple of kv_heads=0"),
    "head dim": ((torch.zeros(1, 1, 2, 513), torch.zeros(1, 1, 2, 513)), {}, ValueError, "head_dim=513 must be 1 to 512"),
    "window": ((Q, K), {"sliding_window": 0}, ValueError, "sliding_window=0 must be at least 1"),
    "window of 2.5": ((Q, K), {"sliding_window": 2.5}, TypeError, "sliding_window=2.5 must be an int, not float"),
    "window of True": ((Q, K), {"sliding_window": True}, TypeError, "sliding_window=True must be an int, not bool"),
    "window of text": ((Q, K), {"sliding_window": "4"}, TypeError, "sliding_window='4' must be an int, not str"),
    "scale nan": ((Q, K), {"scale": math.nan}, ValueError, "scale=nan must be finite"),
    "scale of text": ((Q, K), {"scale": "1"}, TypeError, "scale='1' must be a number, not str"),
    "softcap inf": ((Q, K), {"softcap": math.inf}, ValueError, "softcap=inf must be positive"),
    "softcap 1e-31": ((Q, K), {"softcap": 1e-31}, ValueError, "softcap=1e-31 must be positive"),
    "softcap of text": ((Q, K), {"softcap": "30"}, TypeError, "softcap='30' must be a number, not str"),
    "no query heads": ((Q[:, :0], K), {}, ValueError, "q_heads=0 must be at least 1"),
    "packed k": (
        (PACKED_Q, PACKED_K[:7]),
        {"cu_seqlens": BOUNDS},
        ValueError,
        r"k has shape \[7, 2, 16\]; it must be \[T, Hkv, D\] = \[8, 2, 16\]",
    ),
    "packed lse": (
        (PACKED_Q, PACKED_K),
        {"cu_seqlens": BOUNDS, "lse": torch.zeros(8, 4)},
        ValueError,
        r"lse has shape \[8, 4\]; it must be \[H, Tq\] = \[4, 8\]",
    ),
    "packed row_weights": (
        (PACKED_Q, PACKED_K),
        {"cu_seqlens": BOUNDS, "row_weights": torch.zeros(1, 8)},
        ValueError,
        r"row_weights has shape \[1, 8\]; it must be \[Tq\] = \[8\]",
    ),
    "softcap": ((Q, K), {"softcap": -1.0}, ValueError, "softcap=-1.0 must be positive"),
    "sinks and lse": (
        (Q, K),
        {"sinks": torch.zeros(4), "lse": torch.zeros(2, 4, 8)},
        ValueError,
        "sinks and lse were both given",
    ),
    "shape of sinks": ((Q, K), {"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \[2\]; it must be \[H\] = \[4\]"),
    "shape of lse": ((Q, K), {"lse": torch.zeros(2, 4, 7)}, ValueError, r"lse has shape .*\[B, H, Nq\] = \[2, 4, 8\]"),
    "shape of row_weights": ((Q, K), {"row_weights": torch.zeros(8)}, ValueError, r"row_weights has shape \[8\]"),
    "shape of start": ((Q, K), {"start": BOUNDS[:1]}, ValueError, r"start has shape \[1\]; it must be \[B\] = \[2\]"),
    "shape of length": ((Q, K), {"length": BOUNDS[:1]}, ValueError, r"length has shape \[1\]; it must be \[B\] = \[2\]"),
    "length too long": ((Q, K), {"length": torch.tensor([8, 9])}, ValueError, "sequence 1 spans tokens 0 to 9, outside 0 to 8"),
    "start negative": ((Q, K), {"start": torch.tensor([-1, 0])}, ValueError, "sequence 0 spans tokens -1"),
    "cu_seqlens fall": (
        (PACKED_Q, PACKED_K),
        {"cu_seqlens": torch.tensor([0, 5, 3])},
        ValueError,
        "sequence 1 spans tokens 5 to 3.*check start and length, or cu_seqlens",
    ),
    "cu_seqlens too long": ((PACKED_Q, PACKED_K), {"cu_seqlens": BOUNDS + 1}, ValueError, "spans tokens 1 to 9"),
    "q requires grad": ((Q.clone().requires_grad_(), K), {}, RuntimeError, "q requires grad.*no_grad.*q.detach"),
    "lse requires grad": ((Q, K), {"lse": torch.zeros(2, 4, 8, requires_grad=True)}, RuntimeError, "lse requires grad"),
}


@pytest.mark.parametrize(
    ("tensors", "arguments", "error", "message"), [pytest.param(*case, id=name) for name, case in REFUSALS.items()]
)
def test_refusals(tensors, arguments, error, message):
    with pytest.raises(error, match=message):
        incoming_attention(*tensors, **arguments)


def test_options_are_checked_where_they_are_made():
    """A backend that is called by itself takes nothing that the public function would refuse."""
    options = AttentionOptions(scale=1, sliding_window=2**40, softcap=0)
    assert (options.scale, options.sliding_window, options.softcap) == (1.0, 2**30, None)
    with pytest.raises(ValueError, match="scale=nan must be finite"):
        AttentionOptions(scale=math.nan)
    with pytest.raises(ValueError, match="sliding_window=0 must be at least 1 token"):
        AttentionOptions(scale=1.0, sliding_window=0)
    with pytest.raises(ValueError, match="sinks and lse were both given"):
        AttentionOptions(scale=1.0, sinks=torch.zeros(4), lse=torch.zeros(2, 4, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.scale = 2.0


def test_no_grad_is_enough():
    with torch.no_grad():
        assert incoming_attention(Q.clone().requires_grad_(), K).shape == (2, 8)


def test_triton_on_a_cpu_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="move them to a GPU, use backend='torch', or set TRITON_INTERPRET=1"):
        incoming_attention(Q, K, backend="triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off because a GPU is present")
@pytest.mark.parametrize("options", [{}, {"sample_rows": 4}], ids=["all rows", "sampled"])
def test_bfloat16_in_the_interpreter_is_refused(options):
    """Its products were garbage."""
    with pytest.raises(RuntimeError, match=r"interpreter multiplies bfloat16 wrongly; use float32 or float16, or backend='tor"):
        incoming_attention(Q.bfloat16(), K.bfloat16(), backend="triton", **options)


def test_missing_triton_says_what_to_do(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(RuntimeError, match=r"pip install 'entra-reward\[triton\]', or use backend='torch'"):
        incoming_attention(Q, K, backend="triton")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_around_it_changes_nothing(backend):
    """A trainer's autocast is on where scores ride on its pass; the reference's products were then rounded to bfloat16."""
    q, k, arguments = problem("cpu", torch.float32)
    expected = incoming_attention(q, k, **arguments, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(incoming_attention(q, k, **arguments, backend=backend), expected)
