"""`copies` and `first_places`: every backend against the reference, bit for bit, and what must hold whatever the ids are."""

import importlib
import math
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entra_kernels import copies, first_places, redundancy

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
BACKENDS = ["torch", "triton"]
EVERY_BACKEND = [*BACKENDS, "reference"]
ON_EVERY_DEVICE = pytest.mark.usefixtures("device")
LENGTHS = (70, 1, 0, 300, 33)


@pytest.fixture(params=DEVICES)
def device(request):
    """Where a test makes its tensors. On a CPU uninitialised memory holds the largest integer: what nobody wrote shows."""
    torch.use_deterministic_algorithms(request.param == "cpu")
    with torch.device(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)


def _ids(lengths, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (sum(lengths),), generator=generator, device="cpu")
    return ids.to(torch.get_default_device()), _bounds(*lengths)


def _bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def _one(ids, ngram, backend):
    """Places of the copies in one sequence."""
    copied = copies(torch.tensor(ids, dtype=torch.int64), _bounds(len(ids)), ngram=ngram, backend=backend)
    return copied.nonzero()[:, 0].tolist()


def _places(ids, ngram, backend):
    return first_places(torch.tensor(ids, dtype=torch.int64), _bounds(len(ids)), ngram=ngram, backend=backend).tolist()


def _check(ids, bounds, ngram, backend):
    ours = copies(ids, bounds, ngram=ngram, backend=backend)
    assert ours.dtype == torch.bool
    assert torch.equal(ours, copies(ids, bounds, ngram=ngram, backend="reference"))
    return ours


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", EVERY_BACKEND)
class TestByHand:
    def test_example(self, backend):
        """Of 1 2 3 9 1 2 3 4 the second 2 ends the 2-gram 1 2, and the second 3 ends 2 3 and 1 2 3, which stood before."""
        ids = [1, 2, 3, 9, 1, 2, 3, 4]
        assert _one(ids, 1, backend) == [4, 5, 6]
        assert _one(ids, 2, backend) == [5, 6]
        assert _one(ids, 3, backend) == [6]
        assert _one(ids, 4, backend) == []

    def test_first_places(self, backend):
        ids = [1, 2, 3, 9, 1, 2, 3, 4, 2, 3]
        assert _places(ids, 1, backend) == [0, 1, 2, 3, 0, 1, 2, 7, 1, 2]
        assert _places(ids, 2, backend) == [0, 1, 2, 3, 4, 1, 2, 7, 8, 2]
        assert _places(ids, 3, backend) == [0, 1, 2, 3, 4, 5, 2, 7, 8, 9]
        assert _places([5, 5, 5, 5], 2, backend) == [0, 1, 1, 1]
        assert _places([5, 5, 5, 5], 3, backend) == [0, 1, 2, 2]

    def test_an_ngram_may_overlap_itself(self, backend):
        assert _one([5, 5, 5, 5], 2, backend) == [2, 3]
        assert _one([5, 6, 5, 6, 5], 3, backend) == [4]

    def test_the_same_tokens_in_another_order_are_no_copy(self, backend):
        assert _one([1, 2, 2, 1, 1], 2, backend) == []
        assert _one([1, 2, 3, 3, 2, 1, 2, 1, 3, 1, 3, 2], 3, backend) == []

    @pytest.mark.parametrize("ngram", [1, 2, 5])
    def test_distinct_tokens_are_no_copies(self, backend, ngram):
        assert _one(range(300), ngram, backend) == []

    @pytest.mark.parametrize("ngram", [1, 2, 5])
    def test_all_but_the_first_of_one_token_are_copies(self, backend, ngram):
        assert _one([3] * 300, ngram, backend) == list(range(ngram, 300))

    @pytest.mark.parametrize("ngram", [4, 5, 2**30, 2**80])
    def test_ngrams_longer_than_the_sequence(self, backend, ngram):
        assert _one([3] * 4, ngram, backend) == []
        assert _places([3] * 4, ngram, backend) == [0, 1, 2, 3]

    def test_no_tokens_and_no_sequences(self, backend):
        assert _one([], 1, backend) == []
        empty = torch.empty(0, dtype=torch.int64)
        assert copies(empty, _bounds(), ngram=1, backend=backend).shape == (0,)
        assert not copies(torch.zeros(3, dtype=torch.int64), _bounds(), ngram=1, backend=backend).any()
        assert first_places(empty, _bounds(), ngram=2, backend=backend).shape == (0,)
        assert first_places(torch.zeros(3, dtype=torch.int64), _bounds(), ngram=1, backend=backend).tolist() == [-1] * 3

    def test_tokens_outside_every_sequence(self, backend):
        """They are none, and nobody's copy of them counts."""
        ids = torch.full((12,), 7)
        ours = copies(ids, torch.tensor([2, 5, 5, 9]), ngram=2, backend=backend)
        assert ours.nonzero()[:, 0].tolist() == [4, 7, 8]
        places = first_places(ids, torch.tensor([2, 5, 5, 9]), ngram=2, backend=backend)
        assert places.tolist() == [-1, -1, 0, 1, 1, 0, 1, 1, 1, -1, -1, -1]


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", BACKENDS)
class TestAgainstTheReference:
    @pytest.mark.parametrize("ngram", [1, 2, 3, 4, 7])
    @pytest.mark.parametrize("vocabulary", [2, 6, 50])
    def test_random_ids(self, backend, ngram, vocabulary):
        ours = _check(*_ids(LENGTHS, vocabulary), ngram, backend)
        assert ours.any() or vocabulary**ngram > 10**5  # so many n-grams that none recurs here

    def test_sequences_longer_than_all_programs_take_in_one_go(self, backend):
        ids, bounds = _ids([4500, 4097], 9)
        ours = _check(ids, bounds, 4, backend)
        assert 0.2 < ours.float().mean() < 0.8

    def test_any_strides_and_integers(self, backend):
        ids, bounds = _ids(LENGTHS, 5)
        expected = copies(ids, bounds, ngram=3, backend=backend)
        spread = torch.stack([ids, ids + 1], dim=1)[:, 0]
        assert torch.equal(copies(spread, bounds, ngram=3, backend=backend), expected)
        assert torch.equal(copies(ids.int(), bounds.int(), ngram=3, backend=backend), expected)
        places = first_places(ids, bounds, ngram=3, backend=backend)
        assert torch.equal(first_places(spread, bounds.int(), ngram=3, backend=backend), places)

    @pytest.mark.parametrize(
        "rename",
        [
            pytest.param(lambda ids: ids << 32, id="low-half-zero"),
            pytest.param(lambda ids: ids << 61, id="two-bits"),
            pytest.param(lambda ids: 2**63 - 1 - ids, id="largest"),
            pytest.param(lambda ids: ids - 2, id="negative"),
        ],
    )
    def test_ids_are_names(self, backend, rename):
        ids, bounds = _ids(LENGTHS, 4)
        expected = copies(ids, bounds, ngram=3, backend=backend)
        assert torch.equal(copies(rename(ids), bounds, ngram=3, backend=backend), expected)

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        lengths=st.lists(st.integers(0, 60), max_size=6),
        seed=st.integers(0, 2**31),
        vocabulary=st.sampled_from([1, 2, 4, 1000]),
        ngram=st.integers(1, 9),
    )
    def test_any_batch(self, backend, lengths, seed, vocabulary, ngram):
        _check(*_ids(lengths, vocabulary, seed), ngram, backend)

    @pytest.mark.parametrize("ngram", [1, 3, 40])
    def test_first_places(self, backend, ngram):
        """Where a token is a copy, and only there, its n-gram ended earlier."""
        lengths = (60, 1, 0, 33)
        ids, bounds = _ids(lengths, 4)
        places = first_places(ids, bounds, ngram=ngram, backend=backend)
        assert places.dtype == torch.int64
        assert torch.equal(places, first_places(ids, bounds, ngram=ngram, backend="reference"))
        position = torch.cat([torch.arange(length) for length in lengths])
        assert torch.equal(places < position, copies(ids, bounds, ngram=ngram, backend=backend))

    @pytest.mark.parametrize(("ngram", "fraction"), [(1, 0.3), (2, 0.0), (4, 0.3), (4, 1.0)])
    def test_the_entropy_of_ngrams(self, backend, ngram, fraction):
        """`redundancy` of first places counts the n-grams that end at unprotected tokens, over protected tokens too."""
        lengths = (60, 1, 0, 33)
        ids, bounds = _ids(lengths, 3)
        logprobs = -torch.rand(ids.numel(), generator=torch.Generator().manual_seed(0), device="cpu").to(ids.device)
        places = first_places(ids, bounds, ngram=ngram, backend=backend)
        options = {"protect_fraction": fraction, "degenerate_reward": 0.25, "backend": backend}
        reward, _, protected = redundancy(logprobs, torch.zeros_like(logprobs), places, bounds, **options)
        start = 0
        for length, r in zip(lengths, reward.tolist(), strict=True):
            own, kept = ids[start : start + length].tolist(), protected[start : start + length].tolist()
            grams = Counter(tuple(own[max(i + 1 - ngram, 0) : i + 1]) for i in range(length) if not kept[i])
            assert r == pytest.approx(_normalised_entropy(grams), abs=1e-7)
            start += length


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", BACKENDS)
class TestBatches:
    def test_packed_equals_separate(self, backend):
        """What one sequence said is no copy in another."""
        ids, bounds = _ids(LENGTHS, 5)
        together = copies(ids, bounds, ngram=3, backend=backend)
        alone = [copies(part, _bounds(part.numel()), ngram=3, backend=backend) for part in ids.split(LENGTHS)]
        assert torch.equal(together, torch.cat(alone))
        together = first_places(ids, bounds, ngram=3, backend=backend)
        alone = [first_places(part, _bounds(part.numel()), ngram=3, backend=backend) for part in ids.split(LENGTHS)]
        assert torch.equal(together, torch.cat(alone))

    def test_two_equal_sequences_have_the_same_copies(self, backend):
        ids, _ = _ids([200], 5)
        twice = copies(torch.cat([ids, ids]), _bounds(200, 200), ngram=3, backend=backend)
        assert torch.equal(twice[:200], twice[200:])
        assert 0 < twice[:200].sum() < 200

    def test_repeats_bitwise(self, backend):
        arguments = _ids([1500, 700], 7)
        for operation, times in ((copies, 2), (first_places, 1)):
            expected = operation(*arguments, ngram=4, backend=backend)
            for _ in range(times):
                assert torch.equal(operation(*arguments, ngram=4, backend=backend), expected)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", ["triton"])
class TestCollisions:
    """Who finds a place in the hash table taken compares the ids: a collision costs a step and changes nothing."""

    @pytest.mark.parametrize(
        "multiplier",
        [
            pytest.param(0, id="all-alike"),
            pytest.param(1 << 31, id="few-bits"),
            pytest.param(1 << 32, id="first-token-alone"),
        ],
    )
    @pytest.mark.parametrize("ngram", [1, 3])
    def test_a_weak_hash(self, backend, monkeypatch, multiplier, ngram):
        """With 0 every n-gram begins its search at the same place: one chain through the whole table, over its end."""
        module = importlib.import_module("entra_kernels._triton.copies")
        monkeypatch.setattr(module, "MULTIPLIER", multiplier)
        _check(*_ids((90, 1, 0, 200), 6), ngram, backend)

    def test_distinct_ngrams_of_one_hash(self, backend):
        """Ids whose product with the hash's multiplier shares its upper half. Every one is new once, then a copy."""
        inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
        colliding = [i for i in ((inverse * (0xFFFFFFFF << 32 | low)) % 2**64 for low in range(80)) if i < 2**63][:30]
        assert len(colliding) == 30
        ids = torch.tensor(colliding * 2)
        assert _check(ids, _bounds(60), 1, backend).tolist() == [False] * 30 + [True] * 30


@pytest.mark.gpu
def test_no_wait_for_the_device_and_no_quadratic_memory():
    """From token ids to rewards, 64 sequences of 16,384 tokens."""
    total = 64 * 16_384
    ids = torch.randint(0, 1000, (total,), device="cuda")
    bounds = torch.arange(0, total + 1, 16_384, device="cuda")
    logprobs, incoming = -torch.rand(total, device="cuda"), torch.rand(total, device="cuda")

    def run():
        places = first_places(ids, bounds, ngram=4)
        return redundancy(logprobs, incoming, places, bounds, protect_last=copies(ids, bounds, ngram=2))

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.cuda.max_memory_allocated() - before < 64 * total
    last, places = (operation(ids, bounds, ngram=n, backend="torch") for operation, n in ((copies, 2), (first_places, 4)))
    expected = redundancy(logprobs, incoming, places, bounds, protect_last=last, backend="torch")
    assert torch.equal(ours.protected, expected.protected)
    torch.testing.assert_close(ours.reward, expected.reward, rtol=0, atol=1e-7)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("operation", [copies, first_places])
class TestAsCustomOp:
    def test_opcheck(self, operation, backend):
        torch.library.opcheck(getattr(torch.ops.entra_kernels, operation.__name__), (*_ids([9, 0, 5], 3), 2, backend))

    def test_compiles_into_one_graph(self, operation, backend):
        arguments = _ids([9, 0, 5], 3)

        def find(*arguments):
            return operation(*arguments, ngram=2, backend=backend)

        torch._dynamo.reset()
        assert torch.equal(torch.compile(find, fullgraph=True, backend="aot_eager")(*arguments), find(*arguments))


def _normalised_entropy(counts):
    """H / log M of M = the sum of `counts`; 0.25 below two of them."""
    m = counts.total()
    return 0.25 if m <= 1 else -sum(c / m * math.log(c / m) for c in counts.values()) / math.log(m)


IDS, BOUNDS = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "token_ids has dtype float32", lambda: copies(IDS.float(), BOUNDS, ngram=2)),
        (TypeError, "cu_seqlens has dtype float32", lambda: copies(IDS, BOUNDS.float(), ngram=2)),
        (ValueError, "cu_seqlens is on meta, token_ids on cpu", lambda: copies(IDS, BOUNDS.to("meta"), ngram=2)),
        (ValueError, r"token_ids has shape \[1, 4\]; it must be packed", lambda: copies(IDS[None], BOUNDS, ngram=2)),
        (ValueError, r"cu_seqlens has shape \[0\]; it must be \[S \+ 1\]", lambda: copies(IDS, BOUNDS[:0], ngram=2)),
        (ValueError, "ngram=0 must be at least 1 token", lambda: copies(IDS, BOUNDS, ngram=0)),
        (TypeError, "ngram=2.0 must be an int, not float", lambda: copies(IDS, BOUNDS, ngram=2.0)),
        (TypeError, "ngram=True must be an int, not bool", lambda: copies(IDS, BOUNDS, ngram=True)),
        (ValueError, "backend='c' must be one of", lambda: copies(IDS, BOUNDS, ngram=2, backend="c")),
        (ValueError, r"sequence 1 spans tokens 4 to 2", lambda: copies(IDS, torch.tensor([0, 4, 2]), ngram=2)),
    ],
)
def test_errors_say_what_and_why(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_first_places_are_checked_alike():
    with pytest.raises(ValueError, match=r"sequence 1 spans tokens 4 to 2"):
        first_places(IDS, torch.tensor([0, 4, 2]), ngram=2)
    with pytest.raises(ValueError, match=r"ngram=0 must be at least 1 token"):
        first_places(IDS, BOUNDS, ngram=0)
