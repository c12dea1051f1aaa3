"""`redundancy`: every backend against the reference, and what must hold whatever the numbers are.

Inputs are multiples of 1/64, so that importance is exact in float32 and the ranking is the same in every precision. Then the
reward may miss the reference's by 1.4e-8 (logarithms are summed in units of 2**-26) and two roundings to float32.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entra_kernels import redundancy, reference

# Triton's interpreter computes NaN and inf with numpy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
ON_EVERY_DEVICE = pytest.mark.usefixtures("device")
BACKENDS = ["torch", "triton"]
EVERY_BACKEND = [*BACKENDS, "reference"]
REWARD_ERROR = 1.4e-8 + 2 * 2.0**-25


@pytest.fixture(params=DEVICES)
def device(request):
    """Where a test makes its tensors. Skips Triton on CPU tensors where a GPU turned its interpreter off.

    On a CPU uninitialised memory holds NaN, or the largest integer, so that a result that nobody wrote shows.
    """
    backend = request.node.callspec.params["backend"]
    if request.param == "cpu" and backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off because a GPU is present")
    torch.use_deterministic_algorithms(request.param == "cpu")
    with torch.device(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)


def _random(draw, *arguments, seed=0):
    """`draw(*arguments)`, the same numbers on every device."""
    return draw(*arguments, generator=torch.Generator().manual_seed(seed), device="cpu").to(torch.get_default_device())


def _tokens(lengths, seed=0, vocabulary=50, levels=640):
    """Log-probs in (-levels / 64, 0], incoming attention in [0, 1), ids and cu_seqlens. Few levels make many ties."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    logprobs = -torch.randint(0, levels, (total,), generator=generator, device="cpu") / 64
    incoming = torch.randint(0, min(levels, 64), (total,), generator=generator, device="cpu") / 64
    ids = torch.randint(0, vocabulary, (total,), generator=generator, device="cpu")
    return *(tensor.to(torch.get_default_device()) for tensor in (logprobs, incoming, ids)), _bounds(*lengths)


def _bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def _one(importance, ids, backend, **options):
    """`redundancy` of one sequence whose importances are given."""
    logprobs = torch.tensor(importance, dtype=torch.float32)
    ids = torch.tensor(ids, dtype=torch.int64)
    return redundancy(logprobs, torch.zeros_like(logprobs), ids, _bounds(len(ids)), backend=backend, **options)


def _assert_same(ours, expected):
    """Bitwise, NaN equal to NaN."""
    for left, right in zip(ours, expected, strict=True):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def _check(arguments, backend, **options):
    ours = redundancy(*arguments, backend=backend, **options)
    expected = redundancy(*arguments, backend="reference", **options)
    _assert_same(ours[1:], expected[1:])
    torch.testing.assert_close(ours.reward, expected.reward, rtol=0, atol=REWARD_ERROR, equal_nan=True)
    return ours


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", EVERY_BACKEND)
class TestByHand:
    def test_example(self, backend):
        """tau = 0.2 protects one token of five, the 9; of 7 7 8 7 the entropy is -(3/4 log 3/4 + 1/4 log 1/4)."""
        reward, importance, protected = redundancy(
            torch.tensor([-1.0, -0.5, -2.0, -0.25, -1.0]),
            torch.tensor([0.125, 0.0, 0.5, 0.25, 0.0]),
            torch.tensor([7, 7, 8, 9, 7]),
            _bounds(5),
            backend=backend,
        )
        assert importance.tolist() == [-0.75, -0.5, -1.0, 0.25, -1.0]
        assert protected.tolist() == [False, False, False, True, False]
        assert reward.item() == pytest.approx(0.4056390622, abs=REWARD_ERROR)

    def test_ties_go_to_the_lower_index(self, backend):
        ours = _one([0.5, 1.0, 0.5, 0.5, 0.5], [1, 2, 3, 4, 5], backend, protect_fraction=0.6)
        assert ours.protected.tolist() == [True, True, True, False, False]

    def test_negative_zero_ties_with_zero(self, backend):
        zeros = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0])
        ours = redundancy(zeros, zeros, torch.arange(5), _bounds(5), protect_fraction=0.4, backend=backend)
        assert ours.importance.signbit().tolist() == [False, True, False, True, False]
        assert ours.protected.tolist() == [True, True, False, False, False]

    def test_last_are_those_that_are_told(self, backend):
        """Of 5 tokens 2 come last. 60 % are 3, which the others fill; 80 % are 4, the more important of the last included."""
        importance, last = [5.0, 1.0, 4.0, 3.0, 2.0], torch.tensor([True, False, True, False, False])
        for fraction, places in ((0.2, [3]), (0.4, [3, 4]), (0.6, [1, 3, 4]), (0.8, [0, 1, 3, 4]), (1.0, [0, 1, 2, 3, 4])):
            ours = _one(importance, range(5), backend, protect_fraction=fraction, protect_last=last)
            assert ours.importance.tolist() == importance
            assert ours.protected.nonzero()[:, 0].tolist() == places

    def test_order_of_signs_and_subnormals(self, backend):
        values = [-1e38, 1e-42, -1e-42, 3.0, 0.0, 1e38, -2.0, 2e-42]
        ours = _one(values, range(8), backend, protect_fraction=0.5)
        assert ours.protected.nonzero()[:, 0].tolist() == [1, 3, 5, 7]

    @pytest.mark.parametrize(
        ("tokens", "fraction", "count"),
        [(5, 0.2, 1), (10, 0.3, 3), (100, 0.29, 29), (7, 0.2, 1), (4, 0.2, 0), (29, 0.1, 2), (6, 0.0, 0), (6, 1.0, 6)],
    )
    def test_how_many_are_protected(self, backend, tokens, fraction, count):
        """100 * 0.29 is 29, though float64 makes it 28.999999999999996."""
        ours = _one([float(i) for i in range(tokens)], range(tokens), backend, protect_fraction=fraction)
        assert ours.protected.tolist() == [i >= tokens - count for i in range(tokens)]

    @pytest.mark.parametrize("tokens", [2, 3, 17, 1500])
    def test_distinct_tokens_give_one(self, backend, tokens):
        assert _one([0.0] * tokens, range(tokens), backend).reward.item() == 1.0

    @pytest.mark.parametrize("tokens", [2, 3, 17, 1500])
    def test_identical_tokens_give_zero(self, backend, tokens):
        assert _one([0.0] * tokens, [3] * tokens, backend).reward.item() <= 1e-15

    @pytest.mark.parametrize(
        ("tokens", "fraction"), [(0, 0.2), (1, 0.2), (1, 1.0), (5, 1.0), (5, 0.8)], ids=["n0", "n1", "n1k1", "n5k5", "n5k4"]
    )
    @pytest.mark.parametrize("degenerate", [0.0, -0.5])
    def test_at_most_one_token_left(self, backend, tokens, fraction, degenerate):
        ours = _one([0.0] * tokens, range(tokens), backend, protect_fraction=fraction, degenerate_reward=degenerate)
        assert ours.reward.tolist() == [degenerate]

    def test_no_sequences(self, backend):
        ours = _one([], [], backend)
        assert ours.reward.tolist() == [0.0]
        empty = torch.empty(0)
        ours = redundancy(empty, empty, empty.long(), _bounds(), backend=backend)
        assert [tuple(field.shape) for field in ours] == [(0,), (0,), (0,)]

    def test_tokens_outside_every_sequence(self, backend):
        logprobs, incoming, ids, _ = _tokens([12])
        ours = redundancy(logprobs, incoming, ids, torch.tensor([2, 7, 7, 10]), backend=backend)
        alone = redundancy(logprobs[2:10], incoming[2:10], ids[2:10], _bounds(5, 0, 3), backend=backend)
        assert torch.equal(ours.importance, logprobs + 2.0 * incoming)
        assert torch.equal(ours.reward, alone.reward)
        assert torch.equal(ours.protected[2:10], alone.protected)
        assert not ours.protected[:2].any()
        assert not ours.protected[10:].any()


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", BACKENDS)
class TestAgainstTheReference:
    def test_sequences_longer_than_a_block(self, backend):
        """2500 tokens with a handful of levels: the threshold's ties begin in one block and end in another."""
        _check(_tokens([2500, 1, 1024, 0, 1025], levels=5), backend)
        _check(_tokens([2500, 1, 1024, 0, 1025], seed=1, vocabulary=3000), backend, protect_fraction=0.37)

    def test_all_importances_equal(self, backend):
        logprobs, incoming, ids, bounds = _tokens([1700, 300])
        ours = _check((torch.zeros_like(logprobs), torch.zeros_like(incoming), ids, bounds), backend)
        assert ours.protected[:340].all()
        assert ours.protected[1700:1760].all()
        assert ours.protected.sum() == 400

    @pytest.mark.parametrize("digit", range(4))
    def test_every_digit_of_the_key_decides(self, backend, digit):
        """Importances that differ in one byte of their float32 alone."""
        bits = 0x3F2A4B1C ^ (_random(torch.randint, 0, 64, (200,), seed=digit) << 8 * digit)
        values = bits.to(torch.int32).view(torch.float32)
        _check((values, torch.zeros(200), *_tokens([120, 80])[2:]), backend)

    @pytest.mark.parametrize("weight", [0.0, 1e-4, -3.0, 0.1])
    def test_attention_weight_rounds_twice(self, backend, weight):
        """Not multiples of 1/64: a fused multiply-add would show in the last bit."""
        logprobs, incoming = _random(torch.randn, 2, 400)
        ours = redundancy(logprobs, incoming, *_tokens([150, 250])[2:], attention_weight=weight, backend=backend)
        assert torch.equal(ours.importance, logprobs + weight * incoming)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_half_precision_counts_in_float32(self, backend, dtype):
        logprobs, incoming, ids, bounds = _tokens([90, 40])
        half, full = logprobs.to(dtype), logprobs.to(dtype).float()
        ours = redundancy(half, incoming, ids, bounds, backend=backend)
        _assert_same(ours, redundancy(full, incoming, ids, bounds, backend=backend))

    def test_any_strides_and_integers(self, backend):
        logprobs, incoming, ids, bounds = _tokens([60, 40])
        expected = redundancy(logprobs, incoming, ids, bounds, backend=backend)
        spread = [torch.stack([tensor, tensor], dim=1)[:, 0] for tensor in (logprobs, incoming, ids)]
        _assert_same(redundancy(*spread, bounds, backend=backend), expected)
        _assert_same(redundancy(logprobs, incoming, ids.int(), bounds.int(), backend=backend), expected)

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        lengths=st.lists(st.integers(0, 60), max_size=6),
        seed=st.integers(0, 2**31),
        vocabulary=st.sampled_from([1, 4, 1000]),
        levels=st.sampled_from([1, 3, 640]),
        fraction=st.floats(0, 1),
    )
    def test_any_batch(self, backend, lengths, seed, vocabulary, levels, fraction):
        _check(_tokens(lengths, seed, vocabulary, levels), backend, protect_fraction=fraction, degenerate_reward=0.25)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", BACKENDS)
class TestProtectLast:
    @pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0], ids=["none", "few", "most", "all"])
    def test_any_share(self, backend, fraction, share):
        """Ties begin in one block and end in another, and at 0.5 of which 0.6 come last the others are all protected."""
        arguments = _tokens([2500, 1, 1024, 0, 1025], levels=5)
        last = _random(torch.rand, 4550) < share
        ours = _check(arguments, backend, protect_fraction=fraction, protect_last=last)
        first = 0
        for length in (2500, 1, 1024, 0, 1025):
            span = slice(first, first + length)
            assert ours.protected[span].sum() == reference.protected_count(length, fraction)
            if (ours.protected & last)[span].any():
                assert ours.protected[span][~last[span]].all()
            first += length

    @pytest.mark.parametrize("value", [False, True])
    def test_the_same_for_all_changes_nothing(self, backend, value):
        arguments = _tokens([300, 70], levels=7)
        ours = redundancy(*arguments, protect_last=torch.full((370,), value), backend=backend)
        _assert_same(ours, redundancy(*arguments, backend=backend))

    def test_any_strides(self, backend):
        arguments = _tokens([300, 70])
        last = _random(torch.rand, 370) < 0.5
        spread = torch.stack([last, ~last], dim=1)[:, 0]
        expected = redundancy(*arguments, protect_last=last, backend=backend)
        _assert_same(redundancy(*arguments, protect_last=spread, backend=backend), expected)

    @pytest.mark.parametrize("last", [False, True])
    def test_not_finite_stays_in_its_sequence(self, backend, last):
        """Also where the token that is not finite is none that importance decides among."""
        arguments = _tokens([70, 200, 33])
        arguments[0][100] = math.nan
        mask = _random(torch.rand, 303) < 0.5
        mask[100] = last
        ours = _check(arguments, backend, protect_last=mask)
        assert ours.reward.isnan().tolist() == [False, True, False]
        assert not ours.protected[70:270].any()

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        lengths=st.lists(st.integers(0, 60), max_size=6),
        seed=st.integers(0, 2**31),
        levels=st.sampled_from([1, 3, 640]),
        fraction=st.floats(0, 1),
        share=st.floats(0, 1),
    )
    def test_any_batch(self, backend, lengths, seed, levels, fraction, share):
        last = _random(torch.rand, sum(lengths), seed=seed) < share
        _check(_tokens(lengths, seed, levels=levels), backend, protect_fraction=fraction, protect_last=last)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", BACKENDS)
class TestTokenIds:
    """Ids are names: what they are called must not matter, whatever table holds them."""

    def test_order_and_labels_do_not_matter(self, backend):
        """Bitwise, over the tokens that are not protected: protected ones are put first, where they stay."""
        _, _, ids, bounds = _tokens([300], vocabulary=40)
        importance = torch.zeros(300)
        expected = redundancy(importance, importance, ids, bounds, backend=backend).reward
        order = torch.cat([torch.arange(60), 60 + _random(torch.randperm, 240, seed=3)])
        labels = _random(torch.randperm, 100_000, seed=4)[:40]
        shuffled = redundancy(importance, importance, labels[ids[order]], bounds, backend=backend).reward
        assert torch.equal(shuffled, expected)

    @pytest.mark.parametrize(
        "rename",
        [
            pytest.param(lambda ids: ids * 600, id="congruent-to-the-table"),
            pytest.param(lambda ids: ids << 32, id="low-half-zero"),
            pytest.param(lambda ids: 2**63 - 1 - ids, id="largest"),
            pytest.param(lambda ids: ids + 2**31 - 20, id="around-2**31"),
        ],
    )
    def test_huge_and_congruent_ids(self, backend, rename):
        logprobs, incoming, ids, bounds = _tokens([300], vocabulary=40)
        expected = redundancy(logprobs, incoming, ids, bounds, backend=backend)
        _assert_same(redundancy(logprobs, incoming, rename(ids), bounds, backend=backend), expected)

    def test_all_ids_hash_alike(self, backend):
        """The ids whose product with the hash's multiplier shares its upper half: one chain through the whole table."""
        inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
        colliding = [i for i in ((inverse * (0xFFFFFFFF << 32 | low)) % 2**64 for low in range(80)) if i < 2**63][:30]
        assert len(colliding) == 30
        logprobs, incoming, ids, bounds = _tokens([200, 50], vocabulary=30)
        expected = redundancy(logprobs, incoming, ids, bounds, backend=backend)
        names = torch.tensor(colliding)
        _assert_same(redundancy(logprobs, incoming, names[ids], bounds, backend=backend), expected)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", BACKENDS)
class TestBatches:
    LENGTHS = (70, 1, 0, 1300, 33)

    def test_packed_equals_separate(self, backend):
        arguments = _tokens(self.LENGTHS, vocabulary=20)
        together = redundancy(*arguments, backend=backend)
        first = 0
        for sequence, length in enumerate(self.LENGTHS):
            span = slice(first, first + length)
            alone = redundancy(*(tensor[span] for tensor in arguments[:3]), _bounds(length), backend=backend)
            _assert_same(alone, (together.reward[sequence, None], together.importance[span], together.protected[span]))
            first += length

    def test_repeats_bitwise(self, backend):
        arguments = _tokens(self.LENGTHS, vocabulary=20)
        _assert_same(redundancy(*arguments, backend=backend), redundancy(*arguments, backend=backend))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("field", [0, 1], ids=["logprobs", "incoming"])
    def test_not_finite_stays_in_its_sequence(self, backend, bad, field):
        arguments = _tokens(self.LENGTHS)
        clean = redundancy(*arguments, backend=backend)
        arguments[field][71 + 1200] = bad
        ours = redundancy(*arguments, backend=backend)
        span = slice(71, 1371)
        assert ours.reward[3].isnan()
        assert not ours.protected[span].any()
        clean.reward[3], clean.protected[span] = math.nan, False
        assert torch.equal(ours.reward[[0, 1, 2, 4]], clean.reward[[0, 1, 2, 4]])
        assert torch.equal(ours.protected, clean.protected)
        assert (ours.importance != clean.importance).nonzero()[:, 0].tolist() == [71 + 1200]

    def test_not_finite_alone_in_a_sequence(self, backend):
        """NaN wins over the degenerate reward of a sequence with a single token."""
        assert _one([math.nan], [1], backend).reward.isnan().tolist() == [True]


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("double", [(True, True), (True, False), (False, True)], ids=["both", "logprobs", "incoming"])
def test_float64_stays_float64(backend, double):
    """Found the choice of Triton for float32 log-probs with float64 attention, and a quotient of integers in float32."""
    logprobs, incoming, ids, bounds = _tokens([90, 40])
    logprobs = logprobs.double() - 1e-12 if double[0] else logprobs
    incoming = incoming.double() if double[1] else incoming
    ours = redundancy(logprobs, incoming, ids, bounds, backend=backend)
    assert ours.reward.dtype == ours.importance.dtype == torch.float64
    assert torch.equal(ours.importance, logprobs.double() + 2.0 * incoming.double())
    options = reference.RedundancyOptions(attention_weight=2.0, protect_fraction=0.2, degenerate_reward=0.0)
    expected = reference.redundancy(logprobs.double(), incoming.double(), ids, bounds, None, options)
    assert torch.equal(ours.protected, expected[2])
    assert (ours.reward - expected[0]).abs().max() <= 1.4e-8
    with pytest.raises(TypeError, match="'triton' has no float64"):
        redundancy(logprobs, incoming, ids, bounds, backend="triton")


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", EVERY_BACKEND)
class TestAsCustomOp:
    def test_opcheck(self, backend):
        torch.library.opcheck(torch.ops.entra_kernels.redundancy, (*_tokens([9, 0, 5]), None, 2.0, 0.2, 0.0, backend))
        last = torch.arange(14) % 3 == 0
        torch.library.opcheck(torch.ops.entra_kernels.redundancy, (*_tokens([9, 0, 5]), last, 2.0, 0.2, 0.0, backend))

    def test_compiles_into_one_graph(self, backend):
        arguments = _tokens([9, 0, 5])

        def score(*arguments):
            return tuple(redundancy(*arguments, protect_fraction=0.4, backend=backend))

        torch._dynamo.reset()
        _assert_same(torch.compile(score, fullgraph=True, backend="aot_eager")(*arguments), score(*arguments))


ROW, IDS = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
BOUNDS = torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "logprobs has dtype int64", lambda: redundancy(IDS, ROW, IDS, BOUNDS)),
        (TypeError, "incoming has dtype int64", lambda: redundancy(ROW, IDS, IDS, BOUNDS)),
        (TypeError, "token_ids has dtype float32", lambda: redundancy(ROW, ROW, ROW, BOUNDS)),
        (TypeError, "cu_seqlens has dtype float32", lambda: redundancy(ROW, ROW, IDS, BOUNDS.float())),
        (ValueError, "token_ids is on meta, logprobs on cpu", lambda: redundancy(ROW, ROW, IDS.to("meta"), BOUNDS)),
        (RuntimeError, "incoming requires grad", lambda: redundancy(ROW, ROW.clone().requires_grad_(), IDS, BOUNDS)),
        (ValueError, r"logprobs has shape \[1, 4\]; it must be packed", lambda: redundancy(ROW[None], ROW, IDS, BOUNDS)),
        (ValueError, r"incoming has shape \[3\]; it must be \[T\] = \[4\]", lambda: redundancy(ROW, ROW[:3], IDS, BOUNDS)),
        (ValueError, r"token_ids has shape \[3\]; it must be \[T\]", lambda: redundancy(ROW, ROW, IDS[:3], BOUNDS)),
        (ValueError, r"cu_seqlens has shape \[0\]; it must be \[S \+ 1\]", lambda: redundancy(ROW, ROW, IDS, BOUNDS[:0])),
        (TypeError, "protect_last has dtype int64", lambda: redundancy(ROW, ROW, IDS, BOUNDS, protect_last=IDS)),
        (
            ValueError,
            r"protect_last has shape \[3\]; it must be \[T\] = \[4\]",
            lambda: redundancy(ROW, ROW, IDS, BOUNDS, protect_last=IDS[:3] == 0),
        ),
        (ValueError, r"protect_fraction=1.2", lambda: redundancy(ROW, ROW, IDS, BOUNDS, protect_fraction=1.2)),
        (ValueError, r"protect_fraction=nan", lambda: redundancy(ROW, ROW, IDS, BOUNDS, protect_fraction=math.nan)),
        (ValueError, r"attention_weight=inf", lambda: redundancy(ROW, ROW, IDS, BOUNDS, attention_weight=math.inf)),
        (TypeError, "attention_weight='2' must be a number", lambda: redundancy(ROW, ROW, IDS, BOUNDS, attention_weight="2")),
        (TypeError, "protect_fraction='0' must be a number", lambda: redundancy(ROW, ROW, IDS, BOUNDS, protect_fraction="0")),
        (ValueError, "degenerate_reward=nan must be", lambda: redundancy(ROW, ROW, IDS, BOUNDS, degenerate_reward=math.nan)),
        (TypeError, "degenerate_reward='0' must be", lambda: redundancy(ROW, ROW, IDS, BOUNDS, degenerate_reward="0")),
        (ValueError, r"backend='c' must be one of", lambda: redundancy(ROW, ROW, IDS, BOUNDS, backend="c")),
        (
            ValueError,
            r"sequence 0 spans tokens 0 to 5, outside 0 to 4",
            lambda: redundancy(ROW, ROW, IDS, BOUNDS + BOUNDS // 4),
        ),
        (ValueError, r"sequence 1 spans tokens 4 to 2", lambda: redundancy(ROW, ROW, IDS, torch.tensor([0, 4, 2]))),
        (ValueError, r"sequence 0 spans tokens -1 to 3", lambda: redundancy(ROW, ROW, IDS, BOUNDS - 1)),
        (ValueError, r"token_ids holds -100; ids are at least 0", lambda: redundancy(ROW, ROW, IDS - 100, BOUNDS)),
    ],
)
def test_errors_say_what_and_why(error, match, call):
    with pytest.raises(error, match=match):
        call()
