"""`token_logprobs` and `linear_token_logprobs`: every backend against float64, and what must hold whatever the numbers are.

Error budget: at most twice what plain PyTorch in the same dtype loses against float64, plus 8 float32 units at the size of the
logits. These are for the rounding of the result, and for exp2 and log2 on a GPU, which are good to about 2 units each.
"""

import importlib
import itertools
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from entra_kernels import LogprobsAndEntropy, _torch, linear_token_logprobs, reference, token_logprobs

# Triton's interpreter computes NaN and inf with numpy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
ON_EVERY_DEVICE = pytest.mark.usefixtures("device")
BACKENDS = ["torch", "triton"]
# The head on Triton has two ways, and a rule that chooses; tests take both.
HEAD_BACKENDS = ["torch", "triton-fused", "triton-chunked"]
# Triton's interpreter returns garbage for bfloat16 dots, so on a CPU the fused kernel does not meet bfloat16.
HEAD_CASES = [
    pytest.param(
        *device.values,
        backend,
        dtype,
        id=f"{device.id}-{backend}-{str(dtype)[6:]}",
        marks=device.marks,
    )
    for device, backend, dtype in itertools.product(DEVICES, HEAD_BACKENDS, (torch.float32, torch.float16, torch.bfloat16))
    if (device.id, backend, dtype) != ("cpu", "triton-fused", torch.bfloat16)
]
UNIT = 2.0**-23


@pytest.fixture(params=DEVICES)
def device(request):
    """Where a test makes its tensors. Skips Triton on CPU tensors where a GPU turned its interpreter off.

    On a CPU uninitialised memory holds NaN, so that a result that nobody wrote shows. (On a GPU the switch forbids some
    products.)
    """
    backend = request.node.callspec.params.get("backend", "")
    if request.param == "cpu" and backend.startswith("triton") and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off because a GPU is present")
    torch.use_deterministic_algorithms(request.param == "cpu")
    with torch.device(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def backend(request, monkeypatch):
    """A backend's name. "triton-fused" and "triton-chunked" are "triton" with the rule replaced, and chunks of 1 MiB."""
    backend, _, way = request.param.partition("-")
    if way:
        module = importlib.import_module("entra_kernels._triton.logprobs")
        monkeypatch.setattr(module, "fused_is_faster", lambda *shape: way == "fused")
        monkeypatch.setattr(module, "WORKSPACE", 1 << 20)
    return backend


def _random(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, device="cpu") * scale
    return values.to(torch.get_default_device(), dtype)


def _ids(vocabulary, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, shape, generator=generator, device="cpu").to(torch.get_default_device())


def _assert_within_budget(ours, eager, exact, size):
    """`size` is the largest logit's."""
    assert ours.dtype == torch.float32
    error = (ours.double() - exact).abs().max().item()
    budget = 2 * (eager.double() - exact).abs().max().item() + 8 * UNIT * max(size, 1.0)
    assert error <= budget, f"error {error:.3g}, budget {budget:.3g}"


def _check_logits(logits, targets, backend, temperature=1.0):
    ours = token_logprobs(logits, targets, temperature=temperature, backend=backend)
    eager = (logits.float() / temperature).log_softmax(-1).gather(-1, targets[..., None].long())[..., 0]
    exact = reference.token_logprobs(logits.double(), targets, temperature=temperature)
    assert ours.shape == targets.shape
    assert (ours <= 0).all()
    # Not the largest logit: a common offset must cost nothing.
    _assert_within_budget(ours, eager, exact, exact.abs().max().item())


def _eager_head(hidden, weight, targets, bias=None, logit_scale=1.0, softcap=None, temperature=1.0):
    logits = (hidden @ weight.T).float()
    if bias is not None:
        logits = logits + bias.float()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = (logits / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[..., None].long())[..., 0], entropy, logits.abs().max().item()


def _check_head(hidden, weight, targets, backend, **options):
    ours = linear_token_logprobs(hidden, weight, targets, backend=backend, **options)
    both = linear_token_logprobs(hidden, weight, targets, return_entropy=True, backend=backend, **options)
    *eager, size = _eager_head(hidden, weight, targets, **options)
    everything = {"bias": None, "logit_scale": 1.0, "softcap": None, "temperature": 1.0, "entropy": True, **options}
    if everything["bias"] is not None:
        everything["bias"] = everything["bias"].double()
    exact = reference.linear_token_logprobs(hidden.double(), weight.double(), targets, **everything)
    size /= everything["temperature"]
    assert isinstance(both, LogprobsAndEntropy)
    assert ours.shape == both.logprobs.shape == both.entropy.shape == targets.shape
    assert (ours <= 0).all()
    assert (both.logprobs <= 0).all()
    assert (both.entropy >= 0).all()
    _assert_within_budget(ours, eager[0], exact[0], size)
    _assert_within_budget(both.logprobs, eager[0], exact[0], size)
    _assert_within_budget(both.entropy, eager[1], exact[1], max(size, math.log(weight.shape[0])))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
class TestTokenLogprobs:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("vocabulary", [1, 507, 4096, 9001])
    def test_matches_float64(self, backend, dtype, vocabulary):
        _check_logits(_random(23, vocabulary, scale=4.0, dtype=dtype), _ids(vocabulary, 23), backend)

    @pytest.mark.parametrize("temperature", [0.3, 1.7])
    def test_temperature(self, backend, temperature):
        _check_logits(_random(9, 507, scale=4.0), _ids(507, 9), backend, temperature)

    @pytest.mark.parametrize("offset", [1e4, -1e4])
    def test_common_offset_costs_no_digits(self, backend, offset):
        _check_logits(_random(9, 5003, scale=4.0) + offset, _ids(5003, 9), backend)

    @pytest.mark.parametrize(
        "view",
        [
            pytest.param(lambda x: x[:, :-1], id="shifted"),
            pytest.param(lambda x: x[..., ::2], id="every-other-entry"),
            pytest.param(lambda x: x.transpose(0, 1), id="batch-second"),
            pytest.param(lambda x: x.permute(2, 1, 0), id="vocabulary-first"),
            pytest.param(lambda x: x[:, :1].expand(-1, 4, -1), id="expanded"),
            pytest.param(lambda x: x[0], id="rows"),
            pytest.param(lambda x: x[0, 0], id="one-row"),
            pytest.param(lambda x: x[None, :, :-1, None].transpose(0, 2), id="five-dims"),
        ],
    )
    def test_any_strides(self, backend, view):
        logits = view(_random(3, 6, 50))
        targets = _ids(logits.shape[-1], *logits.shape[:-1])
        _check_logits(logits, targets, backend)

    def test_targets_of_any_stride_and_width(self, backend):
        logits, targets = _random(6, 11), _ids(11, 12)[::2]
        expected = token_logprobs(logits, targets.contiguous(), backend=backend)
        assert torch.equal(token_logprobs(logits, targets, backend=backend), expected)
        assert torch.equal(token_logprobs(logits, targets.int(), backend=backend), expected)

    @pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5)])
    def test_empty(self, backend, shape):
        out = token_logprobs(_random(*shape), _ids(5, *shape[:-1]), backend=backend)
        assert out.shape == shape[:-1]

    def test_not_finite_stays_in_its_row(self, backend):
        logits, targets = _random(6, 300), _ids(300, 6)
        clean = token_logprobs(logits, targets, backend=backend)
        logits[1, 7], logits[2, 8], logits[3] = math.nan, math.inf, -math.inf
        logits[4, targets[4]] = -math.inf
        ours = token_logprobs(logits, targets, backend=backend)
        assert ours[1:4].isnan().all()
        assert ours[4] == -math.inf
        assert torch.equal(ours[[0, 5]], clean[[0, 5]])

    def test_masked_entries(self, backend):
        """Logits of -inf, a whole block of them first, are tokens that cannot be: no NaN comes of them."""
        logits = _random(2, 9000)
        logits[:, :5000] = -math.inf
        ours = token_logprobs(logits, torch.tensor([6000, 8999]), backend=backend)
        exact = reference.token_logprobs(logits[:, 5000:].double(), torch.tensor([1000, 3999]), temperature=1.0)
        assert (ours.double() - exact).abs().max() <= 8 * UNIT * exact.abs().max()

    def test_one_token_vocabulary_is_certain(self, backend):
        assert torch.equal(
            token_logprobs(_random(4, 1), torch.zeros(4, dtype=torch.int64), backend=backend),
            torch.zeros(4),
        )

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(rows=st.integers(0, 40), vocabulary=st.integers(1, 700), scale=st.sampled_from([0.0, 1.0, 30.0]))
    def test_any_shape(self, backend, rows, vocabulary, scale):
        if rows:
            _check_logits(_random(rows, vocabulary, scale=scale), _ids(vocabulary, rows), backend)


@ON_EVERY_DEVICE
@pytest.mark.parametrize(("device", "backend", "dtype"), HEAD_CASES, indirect=["device", "backend"])
class TestLinearTokenLogprobs:
    def test_matches_float64(self, backend, dtype):
        """252 x 507 x 123: no multiple of any tile."""
        _check_head(_random(252, 123, dtype=dtype), _random(507, 123, seed=2, dtype=dtype), _ids(507, 252), backend)

    def test_several_stretches_of_the_vocabulary(self, backend, dtype):
        _check_head(_random(5, 33, dtype=dtype), _random(4999, 33, seed=2, dtype=dtype), _ids(4999, 5), backend)

    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({"logit_scale": 0.0625}, id="logit-scale"),
            pytest.param({"softcap": 5.0}, id="softcap"),
            pytest.param({"temperature": 0.6}, id="temperature"),
            pytest.param({"bias": True}, id="bias"),
            pytest.param({"bias": True, "logit_scale": 0.5, "softcap": 30.0, "temperature": 1.3}, id="all"),
        ],
    )
    def test_options(self, backend, dtype, options):
        options = {**options, "bias": _random(301, seed=3, dtype=dtype)} if "bias" in options else options
        _check_head(_random(37, 40, dtype=dtype), _random(301, 40, seed=2, dtype=dtype), _ids(301, 37), backend, **options)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", HEAD_BACKENDS, indirect=True)
class TestLinearProperties:
    def test_common_offset_costs_no_digits(self, backend):
        """Multiples of 1/64 below 2**14 are exact in float32, so the logits are, and only the log-sum-exp can lose digits."""
        hidden, weight = (_random(rows, 16, seed=rows).mul(8).round() / 8 for rows in (20, 300))
        bias, targets = torch.full((300,), 1e4), _ids(300, 20)
        exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        ours = linear_token_logprobs(hidden, weight, targets, bias=bias, backend=backend)
        assert (ours.double() - exact).abs().max() <= 8 * UNIT * exact.abs().max()

    def test_any_strides(self, backend):
        hidden, weight, bias = _random(24, 60).T[::2], _random(24, 200, seed=2).T, _random(400, seed=3)[::2]
        targets = _ids(200, 60)[::2]
        ours = linear_token_logprobs(hidden, weight, targets, bias=bias, backend=backend)
        tidy = (tensor.contiguous() for tensor in (hidden, weight, targets))
        expected = linear_token_logprobs(*tidy, bias=bias.contiguous(), backend=backend)
        # Not bitwise: a product may take another path for transposed factors.
        assert (ours - expected).abs().max() <= 8 * UNIT * expected.abs().max()

    def test_leading_dims(self, backend):
        hidden, weight, targets = _random(2, 3, 8), _random(50, 8, seed=2), _ids(50, 2, 3)
        flat = linear_token_logprobs(hidden.view(6, 8), weight, targets.view(6), backend=backend)
        assert torch.equal(linear_token_logprobs(hidden, weight, targets, backend=backend), flat.view(2, 3))
        alone = linear_token_logprobs(hidden[0, 0], weight, targets[0, 0], backend=backend)
        assert alone.shape == ()
        assert (alone - flat[0]).abs() <= 8 * UNIT * flat[0].abs()

    @pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8)])
    def test_empty(self, backend, shape):
        out = linear_token_logprobs(_random(*shape), _random(50, 8, seed=2), _ids(50, *shape[:-1]), backend=backend)
        assert out.shape == shape[:-1]

    def test_no_channels_is_uniform(self, backend):
        out = linear_token_logprobs(_random(3, 0), _random(50, 0), _ids(50, 3), backend=backend)
        assert (out + math.log(50)).abs().max() <= 4 * UNIT * math.log(50)

    def test_not_finite_stays_in_its_row(self, backend):
        hidden, weight, targets = _random(6, 8), _random(50, 8, seed=2), _ids(50, 6)
        clean = linear_token_logprobs(hidden, weight, targets, return_entropy=True, backend=backend)
        hidden[1, 0], hidden[4, 7] = math.nan, math.inf
        ours = linear_token_logprobs(hidden, weight, targets, return_entropy=True, backend=backend)
        for dirty, tidy in zip(ours, clean, strict=True):
            assert dirty[[1, 4]].isnan().all()
            assert torch.equal(dirty[[0, 2, 3, 5]], tidy[[0, 2, 3, 5]])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite_is_nan_also_with_a_softcap(self, backend, value):
        """The cap made a finite logit of inf, and of it a log-prob like any other."""
        hidden, weight, targets = _random(5, 8), _random(50, 8, seed=2), _ids(50, 5)
        options = {"softcap": 30.0, "return_entropy": True, "backend": backend}
        clean = linear_token_logprobs(hidden, weight, targets, **options)
        hidden[1, 0] = value
        ours = linear_token_logprobs(hidden, weight, targets, **options)
        picked = linear_token_logprobs(hidden, weight, targets, rows=torch.tensor([3, 1]), **options)
        for dirty, some, tidy in zip(ours, picked, clean, strict=True):
            assert dirty[1].isnan()
            assert torch.equal(dirty[[0, 2, 3, 4]], tidy[[0, 2, 3, 4]])
            assert some.isnan().tolist() == [False, True]

    def test_bias_can_mask_tokens(self, backend):
        """-inf over the first 4100 entries: more than a tile, a stretch, and whatever else is taken at a time."""
        hidden, weight = _random(3, 8), _random(4500, 8, seed=2)
        bias = torch.zeros(4500)
        bias[:4100] = -math.inf
        targets = torch.tensor([4100, 4499, 5])
        ours, entropy = linear_token_logprobs(hidden, weight, targets, bias=bias, return_entropy=True, backend=backend)
        expected = linear_token_logprobs(hidden, weight[4100:], targets % 4100, return_entropy=True, backend=backend)
        assert (ours[:2] - expected.logprobs[:2]).abs().max() <= 8 * UNIT * expected.logprobs[:2].abs().max()
        assert ours[2] == -math.inf
        assert (entropy - expected.entropy).abs().max() <= 8 * UNIT * math.log(400)

    def test_equals_token_logprobs_of_the_logits(self, backend):
        hidden, weight, targets = _random(7, 16), _random(333, 16, seed=2), _ids(333, 7)
        logits = hidden @ weight.T
        ours = linear_token_logprobs(hidden, weight, targets, temperature=0.7, backend=backend)
        other = token_logprobs(logits, targets, temperature=0.7, backend=backend)
        assert (
            ours - other
        ).abs().max() <= 16 * UNIT * logits.abs().max() / 0.7  # products of 16 terms, added in another order

    def test_repeats_bitwise(self, backend):
        arguments = _random(70, 24), _random(2300, 24, seed=2), _ids(2300, 70)
        first = linear_token_logprobs(*arguments, backend=backend)
        assert torch.equal(linear_token_logprobs(*arguments, backend=backend), first)

    def test_every_token_masked_is_nan(self, backend):
        bias = torch.full((2300,), -math.inf)
        ours = linear_token_logprobs(
            _random(2, 8), _random(2300, 8), _ids(2300, 2), bias=bias, return_entropy=True, backend=backend
        )
        assert ours.logprobs.isnan().all()
        assert ours.entropy.isnan().all()

    def test_entropy_of_equal_logits_is_log_v(self, backend):
        ours = linear_token_logprobs(
            torch.zeros(3, 8), _random(2300, 8), _ids(2300, 3), return_entropy=True, backend=backend
        ).entropy
        assert (ours - math.log(2300)).abs().max() <= 4 * UNIT * math.log(2300)

    @pytest.mark.parametrize("others", [-math.inf, -3e38, -1e4])
    def test_entropy_of_one_certain_token_is_0(self, backend, others):
        bias = torch.full((2300,), others)
        bias[1234] = 0.0
        ours = linear_token_logprobs(
            torch.zeros(2, 8),
            _random(2300, 8),
            torch.tensor([1234, 7]),
            bias=bias,
            temperature=0.01,
            return_entropy=True,
            backend=backend,
        )
        assert ours.logprobs.tolist() == [0.0, torch.tensor(others * 100).item()]
        assert ours.entropy.tolist() == [0.0, 0.0]

    def test_entropy_does_not_feel_a_common_offset(self, backend):
        """Products that are exact with it and without it, as above; the highest comes late, so that sums have to move."""
        hidden, weight = (_random(rows, 16, seed=rows).mul(8).round() / 8 for rows in (20, 3000))
        bias = torch.arange(3000) / 64
        ours = linear_token_logprobs(hidden, weight, _ids(3000, 20), bias=bias + 1e4, return_entropy=True, backend=backend)
        logits = hidden.double() @ weight.double().T + bias.double()
        exact = torch.special.entr(logits.softmax(-1)).sum(-1)
        assert (ours.entropy.double() - exact).abs().max() <= 8 * UNIT * math.log(3000)

    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(rows=st.integers(1, 80), channels=st.integers(1, 70), vocabulary=st.integers(1, 300))
    def test_any_shape(self, backend, rows, channels, vocabulary):
        _check_head(_random(rows, channels), _random(vocabulary, channels, seed=2), _ids(vocabulary, rows), backend)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", [*HEAD_BACKENDS, "reference"], indirect=True)
class TestRows:
    """Selected positions cost and return what a call with only these does, bit for bit: it is the same call below."""

    def _arguments(self):
        return _random(4, 9, 16), _random(1100, 16, seed=2), _ids(1100, 4, 9)

    def _assert_equal(self, ours, expected):
        for got, wanted in zip(ours, expected, strict=True):
            assert torch.equal(got, wanted)

    @pytest.mark.parametrize("width", [torch.int32, torch.int64])
    @pytest.mark.parametrize(
        "rows",
        [
            pytest.param([5, 35, 0, 9], id="any-order"),
            pytest.param([7, 7, 1, 7], id="repeated"),
            pytest.param([], id="none"),
            pytest.param(list(range(36)), id="all"),
        ],
    )
    def test_indices(self, backend, rows, width):
        hidden, weight, targets = self._arguments()
        rows = torch.tensor(rows, dtype=width)
        ours = linear_token_logprobs(hidden, weight, targets, rows=rows, return_entropy=True, backend=backend)
        wanted = hidden.view(36, 16)[rows.long()], weight, targets.view(36)[rows.long()]
        assert ours.logprobs.shape == ours.entropy.shape == rows.shape
        self._assert_equal(ours, linear_token_logprobs(*wanted, return_entropy=True, backend=backend))

    @pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
    def test_mask(self, backend, share):
        hidden, weight, targets = self._arguments()
        mask = torch.rand(4, 9) < share
        ours = linear_token_logprobs(hidden, weight, targets, rows=mask, backend=backend)
        assert torch.equal(ours, linear_token_logprobs(hidden[mask], weight, targets[mask], backend=backend))

    def test_hidden_and_targets_of_any_strides(self, backend):
        """The positions that predict, hidden[:, :-1], cannot be flattened without a copy."""
        hidden, weight, targets = self._arguments()
        tidy = hidden[:, :-1].contiguous(), weight, targets[:, 1:].contiguous()
        rows = torch.tensor([31, 8, 15])
        ours = linear_token_logprobs(hidden[:, :-1], weight, targets[:, 1:], rows=rows, backend=backend)
        assert torch.equal(ours, linear_token_logprobs(*tidy, rows=rows, backend=backend))
        mask = (torch.arange(36).view(9, 4) % 3 == 0).T[:, 1:]
        ours = linear_token_logprobs(hidden[:, :-1], weight, targets[:, 1:], rows=mask, backend=backend)
        assert torch.equal(ours, linear_token_logprobs(*tidy, rows=mask.contiguous(), backend=backend))

    def test_one_position(self, backend):
        hidden, weight, targets = _random(16), _random(50, 16, seed=2), _ids(50)
        ours = linear_token_logprobs(hidden, weight, targets, rows=torch.zeros(2, dtype=torch.int64), backend=backend)
        expected = linear_token_logprobs(hidden, weight, targets, backend=backend)
        assert ours.shape == (2,)
        assert (ours - expected).abs().max() <= 8 * UNIT * expected.abs()
        assert linear_token_logprobs(hidden, weight, targets, rows=torch.tensor(False), backend=backend).shape == (0,)

    def test_targets_that_are_not_selected_are_not_looked_at(self, backend):
        """Trainers fill labels with -100 where there is nothing to predict."""
        hidden, weight, targets = self._arguments()
        mask = torch.rand(4, 9) < 0.5
        expected = linear_token_logprobs(hidden, weight, targets, rows=mask, backend=backend)
        ours = linear_token_logprobs(hidden, weight, targets.masked_fill(~mask, -100), rows=mask, backend=backend)
        assert torch.equal(ours, expected)

    def test_no_positions(self, backend):
        hidden, weight, targets = _random(0, 3, 8), _random(50, 8), _ids(50, 0, 3)
        for rows in (torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)):
            ours = linear_token_logprobs(hidden, weight, targets, rows=rows, return_entropy=True, backend=backend)
            assert ours.logprobs.shape == ours.entropy.shape == (0,)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
@pytest.mark.parametrize("wrong", [-1, 6, 2**40])
def test_rows_outside_the_positions(device, backend, wrong):
    """As with targets: an error on the CPU, NaN on a GPU."""
    hidden, weight, targets = _random(2, 3, 8), _random(50, 8), _ids(50, 2, 3)

    def call():
        rows = torch.tensor([5, wrong, 0])
        return linear_token_logprobs(hidden, weight, targets, rows=rows, return_entropy=True, backend=backend)

    if device == "cpu":
        with pytest.raises(ValueError, match=rf"rows holds {wrong}, outside the positions 0 to 5; index targets.reshape"):
            call()
    else:
        for result in call():
            assert result.isnan().tolist() == [False, True, False]


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", ["triton-fused"], indirect=True)
def test_result_does_not_depend_on_the_batch(backend):
    """Not so where the product is a BLAS's: with the torch backend and the chunked way."""
    hidden, weight, targets = _random(150, 24), _random(2300, 24, seed=2), _ids(2300, 150)
    together = linear_token_logprobs(hidden, weight, targets, backend=backend)
    for rows in (slice(0, 1), slice(64, 150), slice(149, 150)):
        alone = linear_token_logprobs(hidden[rows], weight, targets[rows], backend=backend)
        assert torch.equal(alone, together[rows])


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", ["torch", "reference"], indirect=True)
def test_float64_stays_float64(backend):
    logits, targets = _random(5, 40, dtype=torch.float64), _ids(40, 5)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ours = token_logprobs(logits, targets, backend=backend)
    assert ours.dtype == torch.float64
    assert (ours - expected).abs().max() <= 1e-14
    identity = torch.eye(40, dtype=torch.float64)
    ours, entropy = linear_token_logprobs(logits, identity, targets, return_entropy=True, backend=backend)
    assert (ours - expected).abs().max() <= 1e-14
    assert entropy.dtype == torch.float64
    assert (entropy - torch.special.entr(logits.softmax(-1)).sum(-1)).abs().max() <= 1e-14


@pytest.mark.parametrize("backend", [*HEAD_BACKENDS, "reference"], indirect=True)
@pytest.mark.parametrize("wrong", [-1, 40, 2**40])
def test_target_outside_the_vocabulary(device, backend, wrong):
    """An error where looking costs nothing, NaN at its position where it would wait for the device."""
    logits, targets = _random(5, 40), _ids(40, 5)
    targets[3] = wrong
    calls = (
        lambda: token_logprobs(logits, targets, backend=backend),
        lambda: linear_token_logprobs(logits, torch.eye(40), targets, backend=backend),
    )
    for call in calls:
        if device == "cpu":
            with pytest.raises(ValueError, match=rf"targets holds id {wrong}, outside the vocabulary 0 to 39; check the token"):
                call()
        else:
            assert call().isnan().tolist() == [False, False, False, True, False]


def test_the_mark_of_a_target_that_does_not_count_leads_to_rows():
    hidden, targets = _random(5, 40), torch.tensor([3, -100, 7, -100, 0])
    with pytest.raises(ValueError, match=r"targets holds id -100.*linear_token_logprobs\(rows=targets != -100\)"):
        linear_token_logprobs(hidden, torch.eye(40), targets)
    counted = targets != -100
    ours = linear_token_logprobs(hidden, torch.eye(40), targets.clamp(min=0), rows=counted)
    assert torch.equal(ours, linear_token_logprobs(hidden[counted], torch.eye(40), targets[counted]))


def test_autocast_takes_two_dtypes_as_torch_does():
    hidden, weight, targets = _random(5, 16), _random(40, 16), _ids(40, 5)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_token_logprobs(hidden, weight.bfloat16(), targets)
    assert torch.equal(ours, linear_token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets))


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", [*HEAD_BACKENDS, "reference"], indirect=True)
def test_backends_give_nan_for_a_target_outside(backend):
    """Below the check of the public function, as on a GPU."""
    module = reference if backend == "reference" else importlib.import_module(f"entra_kernels._{backend}")
    logits, targets = _random(3, 40), torch.tensor([0, -1, 40])
    expected = [False, True, True]
    assert module.token_logprobs(logits, targets, temperature=1.0).isnan().tolist() == expected
    options = {"bias": None, "logit_scale": 1.0, "softcap": None, "temperature": 1.0, "entropy": True}
    ours, entropy = module.linear_token_logprobs(logits, torch.eye(40), targets, **options)
    assert ours.isnan().tolist() == expected
    assert entropy.isfinite().all()  # it has nothing to do with the target


class _LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operation inside returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            # A view of an input is no new memory.
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


class TestWorkspace:
    """On a CPU; the bound of a GPU's tile is another one."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_head_never_holds_the_logits(self, dtype):
        hidden, weight, targets = _random(4100, 8, dtype=dtype), _random(9000, 8, seed=2, dtype=dtype), _ids(9000, 4100)
        with _LargestTensor() as largest:
            _torch.linear_token_logprobs(
                hidden, weight, targets, bias=None, logit_scale=0.5, softcap=3.0, temperature=0.5, entropy=True
            )
        assert 1 << 20 < largest.bytes <= 16 << 20  # all the logits in float32: 141 MiB

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_logits_are_taken_in_blocks(self, dtype):
        logits, targets = torch.zeros(120, 100_000, dtype=dtype), _ids(100_000, 120)
        with _LargestTensor() as largest:
            _torch.token_logprobs(logits, targets, temperature=0.5)
        assert 1 << 20 < largest.bytes <= 8 << 20  # all the logits in float32: 46 MiB


class _Storages(TorchDispatchMode):
    """Every new storage that an operation inside returned, kept alive so that none is taken for another."""

    def __init__(self, *inputs):
        super().__init__()
        self._inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self._storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            storage = out.untyped_storage()
            if storage.data_ptr() not in self._inputs:
                self._storages[storage.data_ptr()] = storage
        return out

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self._storages.values())


@ON_EVERY_DEVICE
@pytest.mark.parametrize("way", ["fused", "chunked"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
class TestWorkspaceOfTriton:
    @pytest.mark.parametrize(("entropy", "numbers"), [(False, 3), (True, 4)], ids=["logprobs", "with-entropy"])
    def test_what_is_allocated(self, backend, way, entropy, numbers, monkeypatch):
        """Everything together: the chunk, 3 or 4 numbers per row and stretch, and the results."""
        module = importlib.import_module("entra_kernels._triton.logprobs")
        monkeypatch.setattr(module, "WORKSPACE", 1 << 20)
        hidden, weight, targets = _random(90, 8), _random(9000, 8, seed=2), _ids(9000, 90)
        options = {"bias": None, "logit_scale": 0.5, "softcap": 3.0, "temperature": 0.5, "entropy": entropy, "way": way}
        with _Storages(hidden, weight, targets) as storages:
            module.linear_token_logprobs(hidden, weight, targets, **options)
        parts = 4 * numbers * 90 * math.ceil(9000 / 1024)
        results = 4 * 90 * (2 if entropy else 1)
        chunk = (1 << 20) if way == "chunked" else 0
        assert parts + results + chunk // 2 <= storages.bytes <= parts + results + chunk  # all the logits: 3.2 MB


class TestRule:
    """Arithmetic of the rule and of the chunks; nothing runs."""

    @pytest.fixture
    def module(self):
        return importlib.import_module("entra_kernels._triton.logprobs")

    @pytest.mark.parametrize(
        ("rows", "channels", "element_size", "fused"),
        [
            pytest.param(8192, 8192, 2, False, id="many-channels"),
            pytest.param(8192, 4096, 2, True, id="as-measured"),
            pytest.param(8192, 2048, 2, True, id="few-channels"),
            pytest.param(128, 4096, 2, True, id="few-rows"),
            pytest.param(8192, 4096, 4, True, id="float32"),
        ],
    )
    def test_examples(self, module, rows, channels, element_size, fused):
        assert module.fused_is_faster(rows, channels, 131_072, element_size) is fused

    def test_memory_at_the_design_shape(self, module):
        """8,192 x 131,072: under 5 % of the bfloat16 logits, with the entropy too."""
        rows, columns = module.chunk(8192, 131_072)
        parts = 4 * 4 * 8192 * 131_072 // module.STRETCH
        assert 4 * rows * columns + parts < 0.05 * 2 * 8192 * 131_072

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(rows=st.integers(1, 200_000), vocabulary=st.integers(1, 300_000))
    def test_chunks(self, module, rows, vocabulary):
        chunk_rows, chunk_columns = module.chunk(rows, vocabulary)
        assert 4 * chunk_rows * chunk_columns <= module.WORKSPACE
        assert 1 <= chunk_rows <= rows
        assert chunk_columns % module.STRETCH == 0
        assert chunk_columns >= module.STRETCH
        # No more weight is read than the size of a chunk asks for.
        assert math.ceil(rows / chunk_rows) == math.ceil(rows / 4096)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_rule_chooses(backend, monkeypatch):
    """Chunked where the rule says so and a BLAS takes the matrices as they lie, else fused."""
    module = importlib.import_module("entra_kernels._triton.logprobs")
    taken = []
    for way in ("fused", "chunked"):
        real = getattr(module, f"_{way}")
        monkeypatch.setattr(module, f"_{way}", lambda *args, real=real, way=way: (taken.append(way), real(*args)))
    hidden, weight, targets = _random(6, 16), _random(50, 16, seed=2), _ids(50, 6)
    expected = linear_token_logprobs(hidden, weight, targets, backend=backend)
    monkeypatch.setattr(module, "fused_is_faster", lambda *shape: False)
    ours = linear_token_logprobs(hidden, weight, targets, backend=backend)
    strided = linear_token_logprobs(_random(6, 32)[:, ::2], weight, targets, backend=backend)
    assert taken == ["fused", "chunked", "fused"]
    assert strided.shape == ours.shape
    assert (ours - expected).abs().max() <= 16 * UNIT * expected.abs().max()


@ON_EVERY_DEVICE
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"], indirect=True)
class TestAsCustomOps:
    def test_opcheck(self, backend):
        hidden, weight, bias, targets = _random(5, 8), _random(40, 8, seed=2), _random(40), _ids(40, 5)
        torch.library.opcheck(torch.ops.entra_kernels.token_logprobs, (_random(5, 40), targets, 0.7, backend))
        for rows, entropy in ((None, False), (torch.tensor([3, 0]), True)):
            torch.library.opcheck(
                torch.ops.entra_kernels.linear_token_logprobs,
                (hidden, weight, targets, rows, bias, 0.5, 3.0, 0.7, entropy, backend),
            )

    def test_compiles_into_one_graph(self, backend):
        hidden, weight, targets = _random(2, 5, 8), _random(40, 8, seed=2), _ids(40, 2, 5)

        def both(hidden, weight, targets):
            fused = linear_token_logprobs(hidden, weight, targets, softcap=3.0, backend=backend)
            rows = torch.arange(0, 10, 3, device=targets.device)
            some = linear_token_logprobs(hidden, weight, targets, rows=rows, return_entropy=True, backend=backend)
            return fused, *some, token_logprobs(hidden @ weight.T, targets, temperature=0.7, backend=backend)

        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(hidden, weight, targets)
            for ours, eager in zip(compiled, both(hidden, weight, targets), strict=True):
                assert torch.equal(ours, eager)


def _head_of_rows(rows):
    return linear_token_logprobs(LOGITS, WEIGHT, TARGETS, rows=rows)


LOGITS, TARGETS, WEIGHT = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(7, 5)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, r"logits has dtype int64", lambda: token_logprobs(LOGITS.long(), TARGETS)),
        (TypeError, r"targets has dtype float32", lambda: token_logprobs(LOGITS, TARGETS.float())),
        (TypeError, r"targets=\[0, 0, 0\] must be a torch.Tensor", lambda: token_logprobs(LOGITS, [0, 0, 0])),
        (ValueError, r"logits has shape \[3, 0\]; it must be \[..., V\]", lambda: token_logprobs(LOGITS[:, :0], TARGETS)),
        (ValueError, r"logits has shape \[\]", lambda: token_logprobs(torch.tensor(1.0), TARGETS)),
        (ValueError, r"targets has shape \[2\]; it must be logits.shape", lambda: token_logprobs(LOGITS, TARGETS[:2])),
        (ValueError, r"temperature=0 must be greater than 0", lambda: token_logprobs(LOGITS, TARGETS, temperature=0)),
        (ValueError, r"temperature=1e-39 must be", lambda: token_logprobs(LOGITS, TARGETS, temperature=1e-39)),
        (ValueError, r"temperature=inf must be .* finite", lambda: token_logprobs(LOGITS, TARGETS, temperature=math.inf)),
        (TypeError, r"temperature='1' must be a number, not str", lambda: token_logprobs(LOGITS, TARGETS, temperature="1")),
        (TypeError, r"temperature=True must be a number", lambda: token_logprobs(LOGITS, TARGETS, temperature=True)),
        (
            ValueError,
            r"logit_scale=nan must be finite",
            lambda: linear_token_logprobs(LOGITS, WEIGHT, TARGETS, logit_scale=math.nan),
        ),
        (
            TypeError,
            r"logit_scale='2' must be a number",
            lambda: linear_token_logprobs(LOGITS, WEIGHT, TARGETS, logit_scale="2"),
        ),
        (ValueError, r"softcap=nan must be positive", lambda: linear_token_logprobs(LOGITS, WEIGHT, TARGETS, softcap=math.nan)),
        (ValueError, r"softcap=1e-31 must be positive", lambda: linear_token_logprobs(LOGITS, WEIGHT, TARGETS, softcap=1e-31)),
        (TypeError, r"softcap='3' must be a number", lambda: linear_token_logprobs(LOGITS, WEIGHT, TARGETS, softcap="3")),
        (ValueError, r"temperature=nan", lambda: token_logprobs(LOGITS, TARGETS, temperature=math.nan)),
        (ValueError, r"temperature=-1", lambda: linear_token_logprobs(LOGITS, WEIGHT, TARGETS, temperature=-1)),
        (ValueError, r"backend='cuda' must be one of 'auto'", lambda: token_logprobs(LOGITS, TARGETS, backend="cuda")),
        (TypeError, r"'triton' has no float64", lambda: token_logprobs(LOGITS.double(), TARGETS, backend="triton")),
        (RuntimeError, r"logits requires grad", lambda: token_logprobs(LOGITS.clone().requires_grad_(), TARGETS)),
        (ValueError, r"targets is on meta, logits on cpu", lambda: token_logprobs(LOGITS, TARGETS.to("meta"))),
        (TypeError, r"weight has dtype torch.float64", lambda: linear_token_logprobs(LOGITS, WEIGHT.double(), TARGETS)),
        (TypeError, r"bias has dtype int64", lambda: linear_token_logprobs(LOGITS, WEIGHT, TARGETS, bias=TARGETS)),
        (ValueError, r"weight has shape \[5\]; it must be \[V, C\]", lambda: linear_token_logprobs(LOGITS, WEIGHT[0], TARGETS)),
        (ValueError, r"V at least 1", lambda: linear_token_logprobs(LOGITS, WEIGHT[:0], TARGETS)),
        (ValueError, r"last size must be C=5", lambda: linear_token_logprobs(LOGITS[:, :4], WEIGHT, TARGETS)),
        (ValueError, r"targets has shape \[2\]", lambda: linear_token_logprobs(LOGITS, WEIGHT, TARGETS[:2])),
        (
            ValueError,
            r"bias has shape \[5\]; it must be \[V\]",
            lambda: linear_token_logprobs(LOGITS, WEIGHT, TARGETS, bias=WEIGHT[0]),
        ),
        (TypeError, r"rows has dtype float32; it must be one of bool", lambda: _head_of_rows(torch.ones(3))),
        (TypeError, r"rows=\[0\] must be a torch.Tensor", lambda: _head_of_rows([0])),
        (ValueError, r"rows is a mask of shape \[2\]; .* shape \[3\]; for indices", lambda: _head_of_rows(TARGETS[:2] == 0)),
        (ValueError, r"rows has shape \[1, 3\]; indices must be \[M\]", lambda: _head_of_rows(TARGETS[None])),
        (ValueError, r"rows is on meta, hidden on cpu", lambda: _head_of_rows(TARGETS.to("meta"))),
        (
            ValueError,
            r"rows holds 3 indices, but there are no positions",
            lambda: linear_token_logprobs(LOGITS[:0], WEIGHT, TARGETS[:0], rows=TARGETS),
        ),
        (ValueError, r"softcap=-1 must be positive", lambda: linear_token_logprobs(LOGITS, WEIGHT, TARGETS, softcap=-1)),
        (
            RuntimeError,
            r"weight requires grad",
            lambda: linear_token_logprobs(LOGITS, WEIGHT.clone().requires_grad_(), TARGETS),
        ),
    ],
)
def test_errors_say_what_and_why(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_gradients_are_no_matter_without_grad_mode():
    with torch.no_grad():
        assert token_logprobs(LOGITS.clone().requires_grad_(), TARGETS).shape == (3,)


@ON_EVERY_DEVICE
@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_softcap_off(off):
    hidden, weight, targets = _random(3, 5), _random(7, 5, seed=2), _ids(7, 3)
    assert torch.equal(
        linear_token_logprobs(hidden, weight, targets, softcap=off), linear_token_logprobs(hidden, weight, targets)
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_around_it_changes_nothing(backend):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(31, 16, generator=generator)
    targets = torch.arange(9)
    expected = linear_token_logprobs(hidden, weight, targets, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_token_logprobs(hidden, weight, targets, backend=backend), expected)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off because a GPU is present")
def test_bfloat16_products_in_the_interpreter_are_refused():
    """They were garbage."""
    with pytest.raises(RuntimeError, match=r"interpreter multiplies bfloat16 wrongly; use float32 or float16, or backend='tor"):
        linear_token_logprobs(LOGITS.bfloat16(), WEIGHT.bfloat16(), TARGETS, backend="triton")
