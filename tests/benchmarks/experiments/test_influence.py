"""Leave-one-out and Bayes' rule beside brute force on tiny models: a plain forward for every token and alternative."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, build
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.experiments.influence import (
    Replay,
    bidirectional,
    layer_attention,
    leave_one_out,
    likely_alternatives,
)
from entra.capture import capture_incoming_attention

PROMPT = 4
# float32 log-probs of these models differ by up to 1e-5 between a packed and a plain forward; sums have up to 20 of them.
TOLERANCE = 2e-4


def sequence(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextmanager
def attention(model: Any, function: Any) -> Iterator[None]:
    """All layers attend by `function`."""
    before = model.config._attn_implementation
    AttentionInterface.register("test_influence", function)
    model.set_attn_implementation("test_influence")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def hiding(key: int) -> Any:
    """Attention in plain matrix products in which no query after `key` sees it."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **options: Any) -> tuple[Tensor, None]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = scaling * q @ k.transpose(2, 3)
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        scores[:, :, key + 1 :, key] = -torch.inf
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    return attend


@torch.no_grad()
def logprobs_of(model: Any, rows: list[list[int]]) -> Tensor:
    """[B, N - 1] of all tokens but the first."""
    ids = torch.tensor(rows)
    logits = model(input_ids=ids, use_cache=False).logits.double()
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_leave_one_out_is_a_forward_with_the_column_hidden(family: str, implementation: str) -> None:
    model, ids = build(family, attn_implementation=implementation), sequence(20)
    result = leave_one_out(Replay(model, ids, PROMPT, budget=30))
    plain = logprobs_of(model, [ids])[0]
    for i in range(PROMPT, len(ids)):
        with attention(model, hiding(i)):
            hidden = logprobs_of(model, [ids])[0]
        difference = (plain - hidden)[i + 1 :]  # the first entry is of token 1
        assert (plain - hidden)[:i].abs().max() < 1e-5  # what is hidden changes nothing before
        assert float(result.total[i - PROMPT]) == pytest.approx(float(difference.sum()), abs=TOLERANCE)
        assert float(result.absolute[i - PROMPT]) == pytest.approx(float(difference.abs().sum()), abs=TOLERANCE)
        assert int(result.counted[i - PROMPT]) == max(len(ids) - i - 2, 0)
    assert result.total[:-2].abs().min() > 10 * TOLERANCE  # else nothing was compared


def joint(model: Any, ids: list[int], i: int) -> Tensor:
    """log P(v, x_>i | x_<i) for all v, [V]."""
    return logprobs_of(model, [[*ids[:i], v, *ids[i + 1 :]] for v in range(VOCABULARY)])[:, i - 1 :].sum(1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bayes_over_the_whole_vocabulary_is_enumeration(family: str) -> None:
    model, ids = build(family), sequence(12, seed=1)
    replay = Replay(model, ids, PROMPT, budget=64)
    alternatives = likely_alternatives(replay, 0.0, VOCABULARY)
    result = bidirectional(replay, alternatives)
    for i in range(PROMPT, len(ids)):
        expected = joint(model, ids, i).log_softmax(0)[ids[i]]
        assert float(result.value[i - PROMPT]) == pytest.approx(float(expected), abs=TOLERANCE)
        assert float(result.lower[i - PROMPT]) == pytest.approx(float(expected), abs=TOLERANCE)
    assert result.tail.max() < 1e-9
    assert float(result.value[-1]) == pytest.approx(float(replay.logprobs[-1]))


def test_bayes_over_a_few_alternatives_bounds_the_true_value() -> None:
    model, ids = build("llama"), sequence(14, seed=2)
    replay = Replay(model, ids, PROMPT)
    alternatives = likely_alternatives(replay, 0.0, 6)
    result = bidirectional(replay, alternatives)
    promised = 0
    for i, chosen in enumerate(alternatives[:-1]):
        table = joint(model, ids, PROMPT + i)
        run = [ids[PROMPT + i], *chosen]
        logprobs = replay.distribution[i]
        future = table - logprobs
        others = [v for v in range(VOCABULARY) if v not in run]
        true = float(table.log_softmax(0)[run[0]])
        assert sorted(logprobs[chosen].tolist()) == sorted(
            logprobs[[v for v in range(VOCABULARY) if v != run[0]]].topk(6).values.tolist()
        )
        assert float(result.tail[i]) == pytest.approx(float(logprobs[others].exp().sum()), abs=1e-9)
        assert float(result.value[i]) >= true - TOLERANCE
        if future[others].max() <= future[run].max():  # what the lower bound assumes
            assert float(result.lower[i]) <= true + TOLERANCE
            promised += 1
    assert promised > 0
    assert (result.value - result.lower)[:-1].min() > 10 * TOLERANCE


def test_alternatives_stop_where_little_is_left() -> None:
    replay = Replay(build("llama"), sequence(16), PROMPT)
    few = likely_alternatives(replay, 0.5, VOCABULARY)
    tail = bidirectional(replay, few).tail
    assert tail.max() <= 0.5
    one_less = bidirectional(replay, [row[:-1] for row in few]).tail
    assert all(float(left) > 0.5 for left, row in zip(one_less, few, strict=True) if row)
    assert few[-1] == []
    assert any(row for row in few)


def test_packing_changes_nothing() -> None:
    model, ids = build("qwen3"), sequence(20)
    alone, packed = (leave_one_out(Replay(model, ids, PROMPT, budget=budget)).total for budget in (1, 1000))
    torch.testing.assert_close(alone, packed, atol=TOLERANCE, rtol=0)


def test_every_token_that_runs_is_counted() -> None:
    ids = sequence(20)
    counted: list[int] = []
    replay = Replay(build("llama"), ids, PROMPT, budget=40, on_tokens=counted.append)
    leave_one_out(replay)
    n = len(ids) - PROMPT
    assert sum(counted) == (n - 1) * (n - 2) // 2
    assert len(counted) > 2
    assert max(counted) <= 40


@pytest.mark.parametrize("statistic", ["mean", "lift"])
def test_attention_of_every_layer_is_what_capture_takes_there(statistic: str) -> None:
    model, ids = build("qwen3", num_hidden_layers=3), sequence(20)
    layers = getattr(layer_attention(model, ids), statistic)
    assert model.config._attn_implementation == "sdpa"
    for depth in (3, 2, 1):
        model.model.layers = model.model.layers[:depth]
        model.config.num_hidden_layers = depth
        with capture_incoming_attention(model, statistic=statistic) as captured, torch.no_grad():
            model(input_ids=torch.tensor([ids]), use_cache=False)
        torch.testing.assert_close(layers[depth - 1].float(), captured.incoming[0], atol=1e-5, rtol=1e-4)


def test_a_mask_that_is_not_honoured_is_an_error() -> None:
    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **options: Any) -> tuple[Tensor, None]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = scaling * q @ k.transpose(2, 3)
        causal = torch.ones(scores.shape[-2:]).triu(1 + scores.shape[-1] - scores.shape[-2]).bool()
        return (scores.masked_fill(causal, -torch.inf).softmax(-1) @ v).transpose(1, 2).contiguous(), None

    model = build("llama")
    with attention(model, attend), pytest.raises(RuntimeError, match="4-D mask"):
        Replay(model, sequence(20), PROMPT)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(lambda: build("mistral"), "sliding_window=5", id="window"),
        pytest.param(lambda: build("olmo3"), "sliding_attention", id="some-windows"),
        pytest.param(lambda: build("qwen3_next"), "linear_attention", id="linear"),
        pytest.param(lambda: build("llama", dtype=torch.bfloat16), r"model.float\(\)", id="bfloat16"),
    ],
)
def test_models_that_one_mask_does_not_describe_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Replay(model(), sequence(20), PROMPT)
