"""The Gluon passes for sm_90: which q and k they take, and on such a GPU, the same bits as the plain passes."""

import pytest
import torch

from entra_kernels import incoming_attention
from entra_kernels._triton import hopper
from entra_kernels._triton.launch import HOPPER, attention_launch


def heads_within_tokens(batch, heads, tokens, head_dim):
    return torch.arange(batch * tokens * heads * head_dim).view(batch, tokens, heads, head_dim).transpose(1, 2)


def tokens_within_heads(batch, heads, tokens, head_dim):
    return torch.arange(batch * heads * tokens * head_dim).view(batch, heads, tokens, head_dim)


def part_of_fused_projection(batch, heads, tokens, head_dim):
    rows = torch.arange(batch * tokens * 3 * heads * head_dim).view(batch, tokens, 3 * heads * head_dim)
    return rows[..., heads * head_dim : 2 * heads * head_dim].unflatten(-1, (heads, head_dim)).transpose(1, 2)


def every_second_row(batch, heads, tokens, head_dim):
    return tokens_within_heads(2 * batch, heads, tokens, head_dim)[::2]


LAYOUTS = (heads_within_tokens, tokens_within_heads, part_of_fused_projection, every_second_row)


@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (1, 3, 5, 64), (2, 1, 5, 64), (1, 1, 1, 64)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_the_matrix_is_a_token(layout, shape):
    numbers = layout(*shape)
    tensor = torch.empty_strided(numbers.shape, numbers.stride(), dtype=torch.bfloat16)
    rows = hopper.Rows.of(tensor)
    assert rows is not None
    matrix = numbers.as_strided((rows.rows, rows.columns), (numbers.stride(2), 1))
    for batch in range(shape[0]):
        for head in range(shape[1]):
            first, column = batch * rows.row_batch + head * rows.row_head, head * rows.column_head
            part = matrix[first : first + shape[2], column : column + shape[3]]
            assert torch.equal(part, numbers[batch, head])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3, 5, 65, dtype=torch.bfloat16)[..., :64],
        torch.zeros(2, 3, 5, 128, dtype=torch.bfloat16)[..., ::2],
        torch.zeros(2, 3, 64, 5, dtype=torch.bfloat16).transpose(2, 3),
        torch.zeros(2 * 3 * 5 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 3, 5, 64),
        torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16).expand(2, 3, 5, 64),
        torch.zeros(2, 2, 4, 64, dtype=torch.bfloat16, device="meta").as_strided((2, 2, 4, 64), (2**39, 2**38, 64, 1)),
    ],
    ids=["rows of 130 bytes", "strided dim", "tokens innermost", "offset of 2 bytes", "expanded", "over 2**31 rows"],
)
def test_what_tma_cannot_read_is_left_to_the_plain_passes(tensor):
    assert hopper.Rows.of(tensor) is None


def test_a_negative_scale_is_left_to_the_plain_passes():
    q = k = torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16)
    assert hopper.Views.of(q, k, 0.1) is not None
    assert hopper.Views.of(q, k, -0.1) is None


def test_launches_that_have_a_ring():
    """Options need registers that the ring's groups do not have, other head dims another layout in shared memory."""
    taken = {d for d in (16, 64, 72, 80, 96, 128, 192, 256, 512) if attention_launch(d, 4, 2, HOPPER, options=False).ring}
    assert taken == {64, 128, 256}
    assert attention_launch(128, 4, 2, HOPPER, options=True).ring is None
    assert attention_launch(128, 4, 4, HOPPER, options=False).ring is None
    for head_dim in taken:
        assert attention_launch(head_dim, 4, 2, HOPPER, options=False).resident == hopper.RESIDENT


def needs_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


@pytest.fixture
def plain(monkeypatch):
    """`incoming_attention` by the plain passes."""

    def run(*tensors, **options):
        with monkeypatch.context() as patch:
            patch.setattr(hopper.Views, "of", lambda *_: None)
            return incoming_attention(*tensors, **options)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_same_bits_as_the_plain_passes(plain, head_dim, dtype):
    needs_hopper()
    torch.manual_seed(0)
    batch, tokens = 2, 2500
    q, k = (torch.randn(batch, tokens, heads, head_dim, device="cuda").to(dtype).transpose(1, 2) for heads in (8, 2))
    first = incoming_attention(q, k)
    assert torch.equal(first, plain(q, k))
    assert all(torch.equal(first, incoming_attention(q, k)) for _ in range(20))
    odd = [torch.empty(*x.shape[:3], head_dim + 1, device="cuda", dtype=dtype)[..., :head_dim].copy_(x) for x in (q, k)]
    assert torch.equal(first, incoming_attention(*odd))
    for options in (
        {"lse": 6 + torch.rand(batch, 8, tokens, device="cuda")},
        {"per_head": True},
        {"sinks": torch.randn(8, device="cuda")},
        {"length": torch.tensor([tokens, 700], device="cuda"), "start": torch.tensor([0, 33], device="cuda")},
    ):
        assert torch.equal(incoming_attention(q, k, **options), plain(q, k, **options)), list(options)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_sequences_are_their_own(head_dim):
    """Alone bit for bit, near float64, and untouched by NaN in the sequence behind, which the copy engine reads too."""
    needs_hopper()
    torch.manual_seed(0)
    q, k = (torch.randn(2500, heads, head_dim, device="cuda", dtype=torch.bfloat16) for heads in (8, 2))
    bounds = [0, 700, 701, 2401, 2500]
    packed = incoming_attention(q, k, cu_seqlens=torch.tensor(bounds, device="cuda"))
    broken_q, broken_k = q.clone(), k.clone()
    broken_q[2401:], broken_k[2401:] = float("nan"), float("nan")
    broken = incoming_attention(broken_q, broken_k, cu_seqlens=torch.tensor(bounds, device="cuda"))
    assert torch.equal(broken[:2401], packed[:2401])
    for first, end in zip(bounds[:3], bounds[1:4], strict=True):
        rows = [x[first:end].transpose(0, 1)[None] for x in (q, k)]
        assert torch.equal(packed[first:end], incoming_attention(*rows)[0])
        exact = incoming_attention(*(x.double() for x in rows), backend="reference")[0]
        assert (packed[first:end] - exact).abs().max() <= 4e-5 * exact.abs().max()
