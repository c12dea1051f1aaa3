"""score_batch against an oracle that follows docs/method.md with eager attention, full logits and Python's Counter."""

import math
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, build
from tiny_tokenizer import build_tokenizer

import entra
from entra.rope import transformers_version
from entra.score import Scores

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 forwards of two attention implementations; measured differences are below 4e-6 on every family.
LOGPROB_TOLERANCE = 2e-5
ATTENTION_TOLERANCE = 2e-6
LENGTHS = [(4, 13), (9, 1), (1, 30), (6, 22)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def rows():
    """(prompt ids, completion ids) with repeats, so that rewards differ."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(3, 40, (p,), generator=generator).tolist(), torch.randint(3, 20, (n,), generator=generator).tolist())
        for p, n in LENGTHS
    ]


def oracle(family, prompt, completion, weight=2.0, fraction=0.2):
    """(reward, logprobs [n], mu [n]) of one row in float64 from an eager forward with full logits and attention."""
    model = build(family, attn_implementation="eager")
    with entra.capture_incoming_attention(model) as captured, torch.no_grad():
        output = model(torch.tensor([prompt + completion]), use_cache=False, output_attentions=True)
    layer_types = getattr(model.config, "layer_types", None) or ["attention"] * model.config.num_hidden_layers
    with_attention = [i for i, kind in enumerate(layer_types) if kind != "linear_attention"]
    attention = output.attentions[with_attention.index(captured.layer.index)][0].double().mean(0)  # [N, N]
    total, n = len(prompt) + len(completion), len(completion)
    window = captured.layer.sliding_window or total + 1
    divisor = torch.tensor([max(min(total - i, window - 1), 1) for i in range(1, total + 1)])
    mu = (attention.tril(-1).sum(0) / divisor)[-n:]
    logprobs = torch.log_softmax(output.logits[0].double(), -1)[:-1].gather(1, torch.tensor(prompt + completion)[1:, None])
    logprobs = logprobs.squeeze(1)[-n:]
    importance = (logprobs + weight * mu).tolist()
    k = math.floor(fraction * n + 1e-9)
    protected = sorted(range(n), key=lambda i: (-importance[i], i))[:k]
    left = [token for i, token in enumerate(completion) if i not in protected]
    if len(left) <= 1:
        return 0.0, logprobs, mu
    shares = [c / len(left) for c in Counter(left).values()]
    return -sum(s * math.log(s) for s in shares) / math.log(len(left)), logprobs, mu


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_eager(family, rows):
    scores = entra.score_batch([p for p, _ in rows], [c for _, c in rows], model=build(family), details=True)
    for i, (prompt, completion) in enumerate(rows):
        reward, logprobs, mu = oracle(family, prompt, completion)
        torch.testing.assert_close(scores.logprobs[i].double(), logprobs, rtol=0, atol=LOGPROB_TOLERANCE)
        torch.testing.assert_close(scores.incoming[i].double(), mu, rtol=0, atol=ATTENTION_TOLERANCE)
        assert scores.rewards[i] == pytest.approx(reward, abs=1e-6)
        assert scores.token_ids[i].tolist() == completion


@pytest.mark.parametrize("options", [{"attention_weight": 50.0}, {"protect_fraction": 0.5}, {"attention_weight": 0.0}])
def test_options_of_the_method_reach_the_kernel(options, rows, llama):
    config = entra.ScoreConfig(**options)
    rewards = entra.score_batch([p for p, _ in rows], [c for _, c in rows], model=llama, config=config)
    for (prompt, completion), reward in zip(rows, rewards, strict=True):
        expected, _, _ = oracle("llama", prompt, completion, config.attention_weight, config.protect_fraction)
        assert reward == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scope", ["completion", "sequence"])
@pytest.mark.parametrize("weight", [-1.0, 0.0, -0.25])
def test_log_p_counts_as_much_as_it_is_weighted(weight, scope, rows, llama):
    """Against importance, protected tokens and entropy that are made by hand of the recorded signals."""
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    config = entra.ScoreConfig(logprob_weight=weight, ranking_scope=scope)
    plain = entra.score_batch(prompts, completions, model=llama, config=entra.ScoreConfig(ranking_scope=scope), details=True)
    weighted = entra.score_batch(prompts, completions, model=llama, config=config, details=True)
    for before, after in zip(plain, weighted, strict=True):
        assert torch.equal(before.logprobs, after.logprobs)
        assert torch.equal(before.incoming, after.incoming)
        torch.testing.assert_close(after.importance, weight * after.logprobs + 2 * after.incoming, rtol=1e-6, atol=1e-6)
    if scope == "completion":
        for after in weighted:
            order = sorted(range(len(after.importance)), key=lambda i: (-float(after.importance[i]), i))
            kept = set(order[: math.floor(0.2 * len(order) + 1e-9)])
            assert set(after.protected.nonzero()[:, 0].tolist()) == kept
            counts = Counter(int(token) for i, token in enumerate(after.token_ids) if i not in kept)
            total = counts.total()
            entropy = -sum(c / total * math.log(c / total) for c in counts.values())
            assert after.reward == pytest.approx(entropy / math.log(total) if total > 1 else 0.0, abs=1e-6)
    assert any(before.protected.tolist() != after.protected.tolist() for before, after in zip(plain, weighted, strict=True))


def test_surprisal_turns_the_order_of_log_p_around(llama, rows):
    """Without attention, what is protected first by log P is protected last by surprisal."""
    prompt, completion = max(rows, key=lambda row: len(row[1]))
    first, last = (
        entra.score_batch(
            [prompt],
            [completion],
            model=llama,
            config=entra.ScoreConfig(logprob_weight=weight, attention_weight=0, protect_fraction=0.5),
            details=True,
        )[0]
        for weight in (1, -1)
    )
    assert not (first.protected & last.protected).any()
    assert first.protected.sum() == last.protected.sum() == len(completion) // 2


@pytest.mark.parametrize("budget", [1, 40, 64, 10_000])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_the_split_into_forwards_changes_nothing(family, budget, rows):
    model = build(family)
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    alone = [entra.score_batch([p], [c], model=model, details=True) for p, c in rows]
    config = entra.ScoreConfig(token_budget=budget)
    together = entra.score_batch(prompts, completions, model=model, config=config, details=True)
    assert together.rewards == [score.rewards[0] for score in alone]
    for i, score in enumerate(alone):
        # The same numbers up to the order of additions in the model's own matrix products.
        torch.testing.assert_close(together.logprobs[i], score.logprobs[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(together.incoming[i], score.incoming[0], rtol=0, atol=1e-6)
        assert torch.equal(together.protected[i], score.protected[0])


def test_a_budget_splits_into_that_many_forwards(rows, llama):
    calls = []
    handle = llama.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        entra.score_batch([p for p, _ in rows], [c for _, c in rows], model=llama, config=entra.ScoreConfig(token_budget=62))
    finally:
        handle.remove()
    assert [tuple(shape) for shape in calls] == [(2, 31), (2, 17)]


def test_only_completion_positions_and_no_full_logits_go_through_the_head(rows, llama):
    """Logits are of a few positions a row, and log-probs are computed for completion tokens only."""
    sizes = []
    handle = llama.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:2]))
    try:
        scores = entra.score_batch([p for p, _ in rows], [c for _, c in rows], model=llama, details=True)
    finally:
        handle.remove()
    assert [tuple(size) for size in sizes] == [(4, 4)]
    assert [l.numel() for l in scores.logprobs] == [n for _, n in LENGTHS]


def test_text_chat_and_ids_give_the_same_number(tokenizer, llama):
    text = "It is four. It is four."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2"}], add_generation_prompt=True, return_dict=False
    )
    chat = [{"role": "user", "content": "2+2"}]
    forms = [
        ([chat], [text], None),
        ([chat], [[{"role": "assistant", "content": text}]], None),
        (["<user>2+2<assistant>"], [text + "</s>"], None),
        ([prompt_ids], [[*ids, 2, 0]], None),
        ([torch.tensor(prompt_ids)], [torch.tensor(ids)], None),
        ([chat], ["ignored"], [[*ids, 2]]),
        ([chat], None, [ids]),
    ]
    rewards = [entra.score_batch(p, c, i, model=llama, tokenizer=tokenizer)[0] for p, c, i in forms]
    assert rewards == [rewards[0]] * len(forms)
    assert 0 < rewards[0] < 1


def test_scores_are_a_sequence_of_the_scores_of_each_completion(rows, llama):
    scores = entra.score_batch([p for p, _ in rows], [c for _, c in rows], model=llama, details=True)
    assert len(scores) == len(rows)
    assert scores[1:] == [scores[i] for i in range(1, len(rows))]
    assert scores[-1] == list(scores)[-1] != scores[0]
    for i, one in enumerate(scores):
        assert isinstance(one, entra.CompletionScores)
        assert one.reward == scores.rewards[i]
        for name in ("token_ids", "logprobs", "incoming", "importance", "protected"):
            assert getattr(one, name) is getattr(scores, name)[i]
        assert one.unprotected == int((~one.protected).sum())
        assert one.reward == pytest.approx(one.entropy / math.log(one.unprotected) if one.unprotected > 1 else 0.0, abs=1e-6)
    with pytest.raises(IndexError):
        scores[len(rows)]


def test_given_signals_need_no_model(rows, llama):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    computed = entra.score_batch(prompts, completions, model=llama, details=True)
    given = entra.score_batch(prompts, completions, logprobs=computed.logprobs, incoming=computed.incoming, details=True)
    assert given.rewards == computed.rewards
    # A trainer's pass also covers the EOS and the pads that scoring drops.
    with_eos = [[*c, 2, 0] for c in completions]
    padded = [torch.cat([value, torch.tensor([-9.0, 0.0])]) for value in computed.logprobs]
    half = entra.score_batch(prompts, with_eos, model=llama, logprobs=padded, details=True)
    assert half.rewards == computed.rewards


def padded(rows, value):
    """[B, N], as trainers hold them."""
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray], ids=["tensor", "array"])
def test_rows_may_come_as_one_tensor_or_array(kind, rows, llama, tokenizer):
    """The truth of an array was asked for, and that is an error."""
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    expected = entra.score_batch(prompts, completions, model=llama, details=True)
    ids = kind(padded(completions, 0))
    assert entra.score_batch(prompts, ids, model=llama) == expected.rewards
    assert entra.score_batch(prompts, None, ids, model=llama) == expected.rewards
    assert entra.score_batch(prompts, completions, ids, model=llama) == expected.rewards
    signals = {"logprobs": kind(padded(expected.logprobs, 0.0)), "incoming": kind(padded(expected.incoming, 0.0))}
    assert entra.score_batch(kind(padded(prompts, 0)), None, ids, tokenizer=tokenizer, **signals) == expected.rewards


def test_rows_may_come_as_a_pandas_series_of_any_index(rows, llama, tokenizer):
    """Such as what is left of a table after a filter: its labels are not 0, 1, 2."""
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    texts = ["It is four.", "It is four, I am sure of it."]
    expected = entra.score_batch(["2+2=", "name?"], texts, model=llama, tokenizer=tokenizer, details=True)
    index = [7, 3]
    prompts, completions = pandas.Series(["2+2=", "name?"], index=index), pandas.Series(texts, index=index)
    assert entra.score_batch(prompts, completions, model=llama, tokenizer=tokenizer) == expected.rewards
    given = {name: pandas.Series(list(getattr(expected, name)), index=index) for name in ("logprobs", "incoming")}
    ids = pandas.Series([row.tolist() for row in expected.token_ids], index=index)
    assert entra.score_batch(prompts, None, ids, **given) == expected.rewards
    assert entra.EntraReward(model=llama, tokenizer=tokenizer, skip_truncated=True)(prompts, completions, ids) == [None, None]


def test_log_probs_and_attention_are_held_to_their_range(rows):
    """Probabilities, or sums that were not divided, gave a reward like any other."""
    given = {"prompts": [[5], [5]], "completions": None, "completion_ids": [[6], [7, 8]]}
    good = {"logprobs": [[-1.0], [0.0, -2.0]], "incoming": [[0.0], [1.0, 0.0]]}
    assert entra.score_batch(**given, **good) == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"row 1: logprobs holds 0.25 at token 1; .* at most 0: pass natural logarithms"):
        entra.score_batch(**given, **{**good, "logprobs": [[-1.0], [0.0, 0.25]]})
    for value in (1.5, -0.5):
        with pytest.raises(ValueError, match=rf"row 1: incoming holds {value} at token 0; mean attention lies in 0 to 1"):
            entra.score_batch(**given, **{**good, "incoming": [[0.0], [value, 0.0]]})
    lift = entra.ScoreConfig(attention_statistic="lift")
    assert entra.score_batch(**given, **{**good, "incoming": [[0.0], [1.5, 0.0]]}, config=lift) == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"row 1: incoming holds -0.5 at token 0; lift is at least 0"):
        entra.score_batch(**given, **{**good, "incoming": [[0.0], [-0.5, 0.0]]}, config=lift)


def test_sequence_scope_ranks_the_prompt_too(rows, llama):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    config = entra.ScoreConfig(ranking_scope="sequence")
    scores = entra.score_batch(prompts, completions, model=llama, config=config, details=True)
    plain = entra.score_batch(prompts, completions, model=llama, details=True)
    for i, (prompt, completion) in enumerate(rows):
        everything = entra.score_batch([prompt[:1]], [(prompt + completion)[1:]], model=llama)
        assert scores.rewards[i] == everything[0]
        assert scores.token_ids[i].tolist() == completion
        torch.testing.assert_close(scores.logprobs[i], plain.logprobs[i], rtol=0, atol=2e-5)


def copies_of(prompt, completion, ngram):
    """Of each of the completion's tokens whether the n-gram that ends at it was there before."""
    ids = prompt + completion
    grams = [tuple(ids[end - ngram : end]) if end >= ngram else None for end in range(1, len(ids) + 1)]
    return [gram is not None and gram in grams[:i] for i, gram in enumerate(grams)][len(prompt) :]


@pytest.mark.parametrize("ngram", [1, 2, 50])
@pytest.mark.parametrize("fraction", [0.2, 0.7, 1.0])
def test_copies_are_protected_last(ngram, fraction, rows, llama):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    plain = entra.score_batch(prompts, completions, model=llama, details=True)
    config = entra.ScoreConfig(copy_ngram=ngram, protect_fraction=fraction)
    scores = entra.score_batch(prompts, completions, model=llama, config=config, details=True)
    found = 0
    for i, (prompt, completion) in enumerate(rows):
        copied, importance = copies_of(prompt, completion, ngram), plain.importance[i].tolist()
        k = math.floor(fraction * len(completion) + 1e-9)
        expected = sorted(range(len(completion)), key=lambda j: (copied[j], -importance[j], j))[:k]
        assert scores.protected[i].nonzero()[:, 0].tolist() == sorted(expected)
        assert torch.equal(scores.importance[i], plain.importance[i])
        left = [token for j, token in enumerate(completion) if j not in expected]
        shares = [c / len(left) for c in Counter(left).values()]
        reward = -sum(s * math.log(s) for s in shares) / math.log(len(left)) if len(left) > 1 else 0.0
        assert scores.rewards[i] == pytest.approx(reward, abs=1e-6)
        found += sum(copied)
    assert (found > 0) == (ngram < 50)


def test_an_ngram_that_is_copied_may_stand_in_the_prompt(llama):
    """6 and 7 end 5 6 and 6 7, which the prompt had; the last 7 ends 8 7, which is new."""
    signals = {"logprobs": [[-3.0, -2.0, -1.0, -4.0, -5.0]], "incoming": [[0.0] * 5], "details": True}
    completion = [5, 6, 7, 8, 7]
    config = entra.ScoreConfig(copy_ngram=2, protect_fraction=0.6)
    for prompt, places in (([5, 6, 7], [0, 3, 4]), ([6, 7, 1, 5], [0, 1, 3]), ([9], [0, 1, 2])):
        scores = entra.score_batch([prompt], None, [completion], config=config, **signals)
        assert scores.protected[0].nonzero()[:, 0].tolist() == places
    with pytest.raises(ValueError, match="row 0: tokenizer=None, but text must be tokenised"):
        entra.score_batch(["text"], None, [completion], config=config, **signals)


@pytest.mark.parametrize("ngram", [1, 2])
def test_sequence_scope_protects_copies_in_the_prompt_last_too(ngram, rows, llama):
    """As a completion that begins after the prompt's first token: the row says the same."""
    config = entra.ScoreConfig(copy_ngram=ngram, protect_fraction=0.5)
    sequence = entra.ScoreConfig(copy_ngram=ngram, protect_fraction=0.5, ranking_scope="sequence")
    repeating = [(p + 2 * p[:3], c) for p, c in rows]
    for prompt, completion in repeating:
        scores = entra.score_batch([prompt], [completion], model=llama, config=sequence, details=True)
        everything = entra.score_batch([prompt[:1]], [prompt[1:] + completion], model=llama, config=config, details=True)
        assert any(copies_of(prompt[:1], prompt[1:], ngram))
        assert scores.rewards == everything.rewards
        assert torch.equal(scores.protected[0], everything.protected[0][-len(completion) :])
    together = entra.score_batch([p for p, _ in repeating], [c for _, c in repeating], model=llama, config=sequence)
    assert together == [entra.score_batch([p], [c], model=llama, config=sequence)[0] for p, c in repeating]


@pytest.mark.parametrize("scope", ["completion", "sequence"])
def test_copies_of_an_empty_completion(scope, llama):
    config = entra.ScoreConfig(copy_ngram=2, ranking_scope=scope)
    assert entra.score_batch([], [], config=config) == []
    rewards = entra.score_batch([[5, 5], [5]], [[], [6, 7, 6, 7, 8, 6]], model=llama, config=config)
    assert rewards[0] == 0.0
    assert rewards[1] > 0


REPEATING = [[5, 6, 7, 5, 6, 7, 8, 5, 6, 7, 9, 5, 6], [5, 5, 5, 5, 5], [4], [], [3, 4, 3, 4, 5, 3, 4, 3, 4, 6, 7]]
PROMPTS = [[1, 5, 6], [5, 5], [3], [3], [9, 3, 4, 3]]


def ngrams_of(ids, ngram):
    """Of each token the n-gram that ends at it, a shorter one at the start."""
    return [tuple(ids[max(end - ngram, 0) : end]) for end in range(1, len(ids) + 1)]


def signals_of(completions):
    """Log-probs and incoming attention that need no model."""
    generator = torch.Generator().manual_seed(0)
    logprobs, incoming = ([torch.rand(len(ids), generator=generator) for ids in completions] for _ in range(2))
    return {"logprobs": [-values for values in logprobs], "incoming": incoming}


@pytest.mark.parametrize(
    ("ngram", "backend"), [(1, "torch"), (2, "torch"), (4, "torch"), (50, "torch"), (2, "reference"), (2, "triton")]
)
def test_the_reward_of_ngrams(ngram, backend):
    """They reach over protected tokens, not into the prompt, and only those that end at unprotected ones count."""
    config = entra.ScoreConfig(reward_ngram=ngram, protect_fraction=0.3, degenerate_reward=0.25, backend=backend)
    scores = entra.score_batch(PROMPTS, None, REPEATING, config=config, details=True, **signals_of(REPEATING))
    for ids, one in zip(REPEATING, scores, strict=True):
        kept = [gram for gram, is_protected in zip(ngrams_of(ids, ngram), one.protected, strict=True) if not is_protected]
        entropy = -sum(c / len(kept) * math.log(c / len(kept)) for c in Counter(kept).values())
        expected = entropy / math.log(len(kept)) if len(kept) > 1 else 0.25
        assert one.reward == pytest.approx(expected, abs=1e-6)
        assert one.entropy == pytest.approx(entropy, abs=1e-6)
        assert one.repeated_share == pytest.approx(1 - len(set(kept)) / len(kept) if kept else 0.0)
        assert one.counts == Counter(one.token_ids[~one.protected].tolist())
    assert (scores.rewards[0] == 1) == (ngram >= 4), "its longest repeated run has three tokens"


@pytest.mark.parametrize("options", [{"copy_ngram": 2}, {"ranking_scope": "sequence"}, {"logprob_weight": -1}])
def test_ngrams_change_the_reward_alone(options, rows, llama):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    plain = entra.score_batch(prompts, completions, model=llama, config=entra.ScoreConfig(**options), details=True)
    config = entra.ScoreConfig(reward_ngram=2, **options)
    scores = entra.score_batch(prompts, completions, model=llama, config=config, details=True)
    for name in ("logprobs", "incoming", "importance", "protected"):
        assert all(map(torch.equal, getattr(scores, name), getattr(plain, name)))
    assert any(new > old for new, old in zip(scores.rewards, plain.rewards, strict=True))
    alone = [entra.score_batch([p], [c], model=llama, config=config)[0] for p, c in rows]
    assert scores.rewards == pytest.approx(alone, abs=1e-6)


def test_ngrams_of_the_sequence_begin_at_its_second_token(llama):
    """As those of a completion that begins there."""
    config = entra.ScoreConfig(reward_ngram=2, protect_fraction=0.5)
    sequence = entra.ScoreConfig(reward_ngram=2, protect_fraction=0.5, ranking_scope="sequence")
    for prompt, completion in zip(PROMPTS, REPEATING, strict=True):
        reward = entra.score_batch([prompt], [completion], model=llama, config=sequence)
        assert reward == entra.score_batch([prompt[:1]], [prompt[1:] + completion], model=llama, config=config)


def test_length_adjusted_reward_of_ngrams():
    """The expected entropy of m of the positions, each named by its n-gram; all of them give the plain reward."""
    kept = ngrams_of(REPEATING[0], 2)  # nothing is protected
    places = torch.tensor([kept.index(gram) for gram in kept])
    options = {"reward_ngram": 2, "protect_fraction": 0.0}
    signals = signals_of(REPEATING[:1])
    for positions in (5, 13):
        config = entra.ScoreConfig(length_adjusted=positions, **options)
        (reward,) = entra.score_batch(PROMPTS[:1], None, REPEATING[:1], config=config, **signals)
        assert reward == entra.rarefaction.rarefied_redundancy(places, positions)
    plain = entra.score_batch(PROMPTS[:1], None, REPEATING[:1], config=entra.ScoreConfig(**options), **signals)
    assert reward == pytest.approx(plain[0], abs=1e-6)


def test_tokens_are_counted_without_looking_for_ngrams(monkeypatch):
    """With reward_ngram=1 the plain path launches what it launched."""
    monkeypatch.delattr("entra.score.first_places")
    rewards = entra.score_batch(PROMPTS, None, REPEATING, **signals_of(REPEATING))
    assert rewards[1:4] == [0.0, 0.0, 0.0]
    with pytest.raises(NameError):
        entra.score_batch(PROMPTS, None, REPEATING, config=entra.ScoreConfig(reward_ngram=2), **signals_of(REPEATING))


def test_length_adjusted_reward(rows, llama):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    config = entra.ScoreConfig(length_adjusted=5)
    scores = entra.score_batch(prompts, completions, model=llama, config=config, details=True)
    for i, (_, completion) in enumerate(rows):
        left = scores.token_ids[i][~scores.protected[i]]
        expected = entra.rarefaction.rarefied_redundancy(left, 5) if len(completion) > 1 else 0.0
        assert scores.rewards[i] == expected


def test_lift_and_max_change_the_incoming_attention_only(rows, llama):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    plain = entra.score_batch(prompts, completions, model=llama, details=True)
    for options in ({"attention_statistic": "lift"}, {"head_reduction": "max"}):
        other = entra.score_batch(prompts, completions, model=llama, config=entra.ScoreConfig(**options), details=True)
        assert torch.equal(other.logprobs[0], plain.logprobs[0])
        assert (other.incoming[0][:-1] > plain.incoming[0][:-1]).all()


def test_empty_batch_and_empty_completion(llama):
    assert entra.score_batch([], [], model=llama) == []
    assert entra.score_batch([], []) == []
    empty = entra.score_batch([], [], details=True)
    assert isinstance(empty, Scores)
    assert empty.rewards == empty.token_ids == []
    assert entra.score_batch([[5], [5]], [[], [6, 7, 8]], model=llama)[0] == 0.0
    assert entra.score_batch([[5]], [[2]], model=llama, config=entra.ScoreConfig(degenerate_reward=0.25)) == [0.25]


def test_mode_hooks_and_config_are_as_before_also_after_an_exception(rows):
    model = build("llama")
    model.train()
    model.model.layers[0].eval()  # a mode that model.train() or model.eval() would not restore

    def state():
        return [
            (m.training, id(getattr(m, "config", None)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        ]

    before = state()
    entra.score_batch([rows[0][0]], [rows[0][1]], model=model)
    assert state() == before

    def fail(*_):
        raise ArithmeticError("in the middle")

    handle = model.model.layers[1].register_forward_hook(fail)
    with_failure = state()
    with pytest.raises(ArithmeticError, match="in the middle"):
        entra.score_batch([rows[0][0]], [rows[0][1]], model=model)
    assert state() == with_failure
    handle.remove()


def test_dropout_is_off_in_a_training_model(rows):
    model = build("llama", attention_dropout=0.5)
    quiet = entra.score_batch([rows[3][0]], [rows[3][1]], model=model)
    assert entra.score_batch([rows[3][0]], [rows[3][1]], model=model.train()) == quiet


def test_not_finite_gives_none_and_a_warning_that_names_the_row(rows, llama):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    scores = entra.score_batch(prompts, completions, model=llama, details=True)
    broken = [l.clone() for l in scores.logprobs]
    broken[2][5] = math.nan
    with pytest.warns(RuntimeWarning, match=r"row 2: a log-prob or incoming attention is not finite; its reward is None"):
        rewards = entra.score_batch(prompts, completions, logprobs=broken, incoming=scores.incoming)
    assert rewards == [*scores.rewards[:2], None, scores.rewards[3]]


def test_not_finite_weights_give_none_for_every_row(rows):
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    with pytest.warns(RuntimeWarning, match="row 0"):
        assert entra.score_batch([rows[0][0]], [rows[0][1]], model=model) == [None]


@pytest.mark.parametrize("transform", [lambda z: z * 3, lambda z: z.mul_(3)], ids=["copied", "in place"])
def test_a_transform_of_the_logits_that_is_not_known_is_an_error(rows, transform):
    model = build("llama")
    forward = type(model).forward

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = transform(output.logits)
            return output

    model.__class__ = Scaled
    with pytest.raises(RuntimeError, match=r"changes its head's output in a way that is not known"):
        entra.score_batch([rows[0][0]], [rows[0][1]], model=model)


def transformed(model, transform):
    """The model with its logits [B, N, V] transformed at the end of its forward, in their own precision."""
    forward = type(model).forward

    class Transformed(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = transform(output.logits)
            return output

    model.__class__ = Transformed
    return model


HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [*HALVES, pytest.param(torch.float32, id="fp32")])
def test_an_unknown_softcap_is_refused_in_every_precision(dtype, seed):
    """A cap of 30 changes logits of 3 by 0.3 %, less than bfloat16 rounds."""
    model = transformed(build("llama").to(dtype), lambda z: 30 * torch.tanh(z / 30))
    with torch.no_grad():
        model.lm_head.weight *= 0.2  # logits of about 3
    row = torch.randint(3, VOCABULARY, (24,), generator=torch.Generator().manual_seed(seed)).tolist()
    with pytest.raises(RuntimeError, match="changes its head's output in a way that is not known"):
        entra.score_batch([row[:4]], [row[4:]], model=model)


@pytest.mark.parametrize("dtype", HALVES)
def test_an_unknown_transform_on_top_of_a_known_one_is_refused_in_half_precision(dtype, rows):
    model = transformed(build("cohere2").to(dtype), lambda z: z + 0.01 * z.abs())
    with pytest.raises(RuntimeError, match="changes its head's output in a way that is not known"):
        entra.score_batch([rows[0][0]], [rows[0][1]], model=model)


def test_a_transform_of_other_positions_than_the_last_is_refused(rows):
    model = transformed(build("llama"), lambda z: torch.cat([z[:, :-1] * 3, z[:, -1:]], dim=1))
    reversed_order = transformed(build("llama"), lambda z: torch.cat([z[:, :1], z[:, 1:] * 3], dim=1))
    for one in (model, reversed_order):
        with pytest.raises(RuntimeError, match="changes its head's output in a way that is not known"):
            entra.score_batch([rows[0][0]], [rows[0][1]], model=one)


def test_logits_that_become_nan_are_refused(rows):
    model = transformed(build("llama"), lambda z: z.masked_fill(z > 1, math.nan))
    with pytest.raises(RuntimeError, match="changes its head's output in a way that is not known"):
        entra.score_batch([rows[0][0]], [rows[0][1]], model=model)


# torch multiplies groups of experts in float32 at most.
DOUBLE = [pytest.param(family, torch.float64, id=f"{family}-fp64") for family in ("llama", "gemma2", "cohere2")]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(pytest.param(f, torch.bfloat16, id=f"{f}-bf16") for f in FAMILIES),
        *DOUBLE,
        pytest.param("gemma2", torch.float16, id="gemma2-fp16"),
    ],
)
def test_no_family_is_refused_in_another_precision(family, dtype, rows):
    model = build(family).to(dtype)
    assert None not in entra.score_batch([p for p, _ in rows], [c for _, c in rows], model=model)
    transformed(model, lambda z: z.to(torch.bfloat16))  # as sharding with an output precision does
    assert None not in entra.score_batch([rows[0][0]], [rows[0][1]], model=model)


def recurrent_gemma(dtype=torch.float32, **overrides):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 48, "lru_width": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "recurrent_gemma", vocab_size=VOCABULARY, attention_window_size=64, logits_soft_cap=2.0, **sizes, **overrides
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            model.lm_head.weight.normal_(std=0.5)
    return model.to(dtype)


def minicpm3():
    from transformers import AutoConfig, AutoModelForCausalLM

    ranks = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("minicpm3", vocab_size=VOCABULARY, dim_model_base=12, **ranks, **sizes)
    assert config.logits_scaling == 4
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(recurrent_gemma, marks=pytest.mark.skipif(transformers_version() < (5, 17), reason="cannot be captured")),
        pytest.param(minicpm3, marks=pytest.mark.skipif(transformers_version() < (5, 17), reason="transformers lacks it")),
    ],
)
def test_logits_that_are_capped_or_scaled_under_another_name_are_scored(make, rows):
    model = make()
    prompt, completion = rows[2]
    scores = entra.score_batch([prompt], [completion], model=model, details=True)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].double()
    expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(prompt + completion)[1:, None])[-len(completion) :, 0]
    torch.testing.assert_close(scores.logprobs[0].double(), expected, rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("cohere2", {}),
        ("gemma2", {}),
        ("llama", {"model_type": "granite", "logits_scaling": 8.0}),
    ],
    ids=["cohere2", "gemma2", "granite"],
)
def test_known_transforms_matter(family, overrides, rows, monkeypatch):
    """With the transform the log-probs are those of the model's own logits; without it the check refuses them."""
    model = build(family, **overrides)
    prompt, completion = rows[0]
    scores = entra.score_batch([prompt], [completion], model=model, details=True)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(prompt + completion)[1:, None])[-len(completion) :, 0]
    torch.testing.assert_close(scores.logprobs[0].double(), expected, rtol=0, atol=LOGPROB_TOLERANCE)
    monkeypatch.setattr(entra.forward, "_logit_transform", lambda model: entra.forward._LogitTransform(1.0, None))
    with pytest.raises(RuntimeError, match="changes its head's output in a way that is not known"):
        entra.score_batch([prompt], [completion], model=model)


def test_gemma_2_whose_sdpa_leaves_out_the_softcap_is_refused_by_name(rows, monkeypatch):
    """transformers before 5.21 takes SDPA for it by default: log-probs are off by 0.74 without the cap."""
    monkeypatch.setattr(entra.capture, "transformers_version", lambda: (5, 20))
    model = build("gemma2")
    assert entra.score_batch([rows[0][0]], [rows[0][1]], model=model) != [None]
    model.config._attn_implementation_internal = "sdpa"
    message = r"Gemma2Attention caps its attention scores \(attn_logit_softcapping=2.0\).*attn_implementation=\"eager\", or use"
    with pytest.raises(ValueError, match=message):
        entra.score_batch([rows[0][0]], [rows[0][1]], model=model)
    with pytest.raises(ValueError, match=message):
        entra.forward.check_scorable(model)
    without_cap = build("gemma2", attn_logit_softcapping=None)
    without_cap.config._attn_implementation_internal = "sdpa"
    assert entra.score_batch([rows[0][0]], [rows[0][1]], model=without_cap) != [None]


@pytest.mark.parametrize("hook", [lambda head, args, z: z * 2, lambda head, args, z: z.mul_(2)], ids=["copied", "in place"])
def test_a_hook_on_the_head_is_not_ignored(rows, llama, hook):
    handle = llama.lm_head.register_forward_hook(hook)
    try:
        with pytest.raises(RuntimeError, match="changes its head's output"):
            entra.score_batch([rows[0][0]], [rows[0][1]], model=llama)
    finally:
        handle.remove()


def test_prompt_tuning_is_refused(rows):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(RuntimeError, match=r"virtual tokens \(prompt tuning\) cannot be scored"):
        entra.score_batch([rows[0][0]], [rows[0][1]], model=model)


def test_threads_share_a_model(rows, llama):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    expected = entra.score_batch(prompts, completions, model=llama)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: entra.score_batch(prompts, completions, model=llama), range(12)))
    assert results == [expected] * 12
    with torch.no_grad():
        llama(torch.tensor([[5, 6, 7]]))  # runs as before: nothing of ours was left behind


@pytest.mark.parametrize("wrap", ["adapter", "compiled", "second model"])
def test_models_of_the_same_weights_share_a_lock(rows, wrap):
    """A PEFT model and its base: hooks, mode and the captured module's config are those of the modules that both run."""
    base = build("llama")
    if wrap == "adapter":
        peft = pytest.importorskip("peft")
        other = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    elif wrap == "compiled":
        other = torch.compile(base, backend="eager")
    else:  # a model around the same decoder
        other = type(base)(base.config).eval()
        other.model, other.lm_head = base.model, base.lm_head
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    expected = entra.score_batch(prompts, completions, model=base)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: entra.score_batch(prompts, completions, model=(base, other)[i % 2]), range(24)))
    assert results == [expected] * 24
    assert all(module.config is base.config for module in base.modules() if hasattr(module, "layer_idx"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_models_of_their_own_weights_have_their_own_locks(llama):
    assert entra.forward._lock(llama) is not entra.forward._lock(build("llama"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_row_that_is_not_finite_does_not_take_the_others_with_it(dtype, rows):
    model = build("gemma2").to(dtype)  # a softcap: its logits are rounded once more

    def poison(module, args, output):
        return output.masked_fill((args[0] == 50)[..., None], math.nan)

    model.get_input_embeddings().register_forward_hook(poison)
    config = entra.ScoreConfig(token_budget=1)
    prompts, completions = [rows[0][0], rows[3][0]], [[50, *rows[0][1]], rows[3][1]]
    with pytest.warns(RuntimeWarning, match="row 0"):
        first, second = entra.score_batch(prompts, completions, model=model, config=config)
    assert first is None
    assert 0 < second <= 1


def test_importance_is_what_the_method_says(rows, llama):
    config = entra.ScoreConfig(attention_weight=7.0)
    scores = entra.score_batch([p for p, _ in rows], [c for _, c in rows], model=llama, config=config, details=True)
    for l, mu, importance in zip(scores.logprobs, scores.incoming, scores.importance, strict=True):
        torch.testing.assert_close(importance, l + 7.0 * mu, rtol=1e-6, atol=1e-6)


def test_given_signals_need_neither_prompt_nor_tokenizer(rows, llama):
    computed = entra.score_batch([rows[0][0]], [rows[0][1]], model=llama, details=True)
    signals = {"logprobs": computed.logprobs, "incoming": computed.incoming}
    assert entra.score_batch(["text"], None, [rows[0][1]], **signals) == computed.rewards


def test_the_degenerate_reward_comes_out_as_it_went_in(llama):
    assert entra.score_batch([[5]], [[6]], model=llama, config=entra.ScoreConfig(degenerate_reward=0.3)) == [0.3]


def test_lora_on_the_head_takes_the_modules_own_forward(rows):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    scores = entra.score_batch([rows[0][0]], [rows[0][1]], model=model, details=True)
    with torch.no_grad():
        logits = model(torch.tensor([rows[0][0] + rows[0][1]])).logits[0].double()
    n = len(rows[0][1])
    expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(rows[0][0] + rows[0][1])[1:, None]).squeeze(1)[-n:]
    torch.testing.assert_close(scores.logprobs[0].double(), expected, rtol=0, atol=LOGPROB_TOLERANCE)


def test_compiled_and_wrapped_models(rows, llama):
    expected = entra.score_batch([rows[0][0]], [rows[0][1]], model=llama)
    assert entra.score_batch([rows[0][0]], [rows[0][1]], model=torch.compile(llama, backend="eager")) == expected

    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert entra.score_batch([rows[0][0]], [rows[0][1]], model=DistributedDataParallel(llama)) == expected


def test_bound_policy_nests_and_ends(rows, llama):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    expected = entra.score_batch(prompts, completions, model=llama)
    other = build("qwen3")
    with entra.bind_policy(llama):
        assert entra.score_batch(prompts, completions) == expected
        with entra.bind_policy(other):
            assert entra.score_batch(prompts, completions) == entra.score_batch(prompts, completions, model=other)
        assert entra.score_batch(prompts, completions) == expected
    with pytest.raises(RuntimeError, match=r"no model to score with; pass model=.*bind_policy.*logprobs"):
        entra.score_batch(prompts, completions)


def test_called_by_trl_columns_never_bind_to_options(rows, llama):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    columns = {
        "model": ["a"] * 4,
        "tokenizer": ["b"] * 4,
        "logprobs": [0] * 4,
        "incoming": [0] * 4,
        "config": ["c"] * 4,
        "details": [True] * 4,
        "answer": ["4"] * 4,
        "trainer_state": object(),
        "log_metric": print,
        "log_extra": print,
    }
    with entra.bind_policy(llama):
        rewards = entra.score_batch(prompts=prompts, completions=["text"] * 4, completion_ids=completions, **columns)
    assert rewards == entra.score_batch(prompts, completions, model=llama)


def test_a_model_by_folder(tmp_path, rows, llama, tokenizer):
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert entra.score_batch(["hi"], ["there"], model=str(tmp_path)) == entra.score_batch(
        ["hi"], ["there"], model=llama, tokenizer=tokenizer
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"completions": [[5]]}, ValueError, r"completions has 1 rows but prompts has 2; there must be one per prompt"),
        ({"completion_ids": [[5]] * 3}, ValueError, r"completion_ids has 3 rows but prompts has 2"),
        ({"logprobs": [[0.0]]}, ValueError, r"logprobs has 1 rows but prompts has 2"),
        ({"prompts": None}, TypeError, r"prompts=None must be a list with one entry per completion"),
        ({"completions": {6: 7, 8: 9}}, TypeError, r"completions=\{6: 7, 8: 9\} must be a list .*, not dict"),
        ({"completion_ids": torch.tensor(3)}, TypeError, r"completion_ids=tensor\(3\) must be a list with one entry per"),
        ({"completion_ids": (row for row in ([5], [6]))}, TypeError, r"completion_ids=<generator .*, not generator"),
        ({"logprobs": 0.5}, TypeError, r"logprobs=0.5 must be a list with one entry per completion"),
        ({"completions": None}, ValueError, r"completions=None and completion_ids=None; one of them must be given"),
        ({"completions": [[5], [VOCABULARY + 7]]}, ValueError, rf"row 1: the completion holds token id {VOCABULARY + 7}"),
        ({"completions": [[5], 7]}, TypeError, r"row 1: completion=7 must be text"),
        ({"logprobs": [[0.0], [0.0, 0.0]]}, ValueError, r"row 1: logprobs has shape \[2\] but the completion has 1 tokens"),
        ({"prompts": "ab", "completions": "cd"}, TypeError, r"prompts='ab' must be a list with one entry per completion"),
        ({"model": 42}, TypeError, r"model=42 must be a transformers causal LM"),
        ({"logprobs": [None, [0.0]]}, TypeError, r"row 0: logprobs must be one number per completion token, not NoneType"),
        (
            {"logprobs": [torch.zeros(1, requires_grad=True), [0.0]]},
            RuntimeError,
            r"row 0: logprobs requires grad, but scores have no gradient",
        ),
        ({"configg": 1}, TypeError, r"unknown keyword 'configg'; did you mean 'config'\?"),
        (
            {"attention_wieght": 1},
            TypeError,
            r"unknown keyword 'attention_wieght'; did you mean 'attention_weight'\? Pass it as config=entra.ScoreConfig",
        ),
        (
            {"attention_weight": 1},
            TypeError,
            r"unknown keyword 'attention_weight'; pass it as config=entra.ScoreConfig\(attention_weight=...\)$",
        ),
        ({"verify_every": 1}, TypeError, r"unknown keyword 'verify_every'; pass it as entra.EntraGRPOTrainer\(verify_every="),
        ({"gate": 1}, TypeError, r"unknown keyword 'gate'; pass it as entra.EntraReward\(gate=...\)$"),
        ({"config": {"tau": 1}}, TypeError, r"must be an entra.ScoreConfig, not dict"),
        (
            {"logprobs": [[0.0]] * 2, "config": entra.ScoreConfig(ranking_scope="sequence")},
            ValueError,
            r"ranking_scope='sequence' ranks prompt tokens too",
        ),
    ],
)
def test_bad_input(arguments, error, message, llama):
    with pytest.raises(error, match=message):
        entra.score_batch(**{"prompts": [[5], [5]], "completions": [[6], [7]], "model": llama, **arguments})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_weight": math.nan}, ValueError, r"attention_weight=nan must be finite"),
        (
            {"logprob_weight": math.inf},
            ValueError,
            r"logprob_weight=inf must be finite; 1 is the paper's, -1 ranks by surprisal",
        ),
        ({"logprob_weight": True}, TypeError, r"logprob_weight=True must be a number"),
        ({"attention_weight": 1e300}, ValueError, r"attention_weight=1e\+300 must be finite"),
        ({"attention_weight": "2"}, TypeError, r"attention_weight='2' must be a number, not str"),
        ({"protect_fraction": 1.5}, ValueError, r"protect_fraction=1.5 must be in \[0, 1\]"),
        ({"protect_fraction": True}, TypeError, r"protect_fraction=True must be a number, not bool"),
        ({"attention_statistic": "median"}, ValueError, r"attention_statistic='median' must be one of 'mean', 'lift'"),
        ({"head_reduction": "sum"}, ValueError, r"head_reduction='sum' must be one of"),
        ({"ranking_scope": "prompt"}, ValueError, r"ranking_scope='prompt' must be one of"),
        ({"backend": "cuda"}, ValueError, r"backend='cuda' must be one of"),
        ({"length_adjusted": 1}, ValueError, r"length_adjusted=1 must be at least 2"),
        ({"length_adjusted": 2.5}, TypeError, r"length_adjusted=2.5 must be a whole number"),
        ({"copy_ngram": 0}, ValueError, r"copy_ngram=0 must be at least 1"),
        ({"copy_ngram": 4.0}, TypeError, r"copy_ngram=4.0 must be a whole number of tokens"),
        ({"reward_ngram": 0}, ValueError, r"reward_ngram=0 must be at least 1 token; 4 is a start"),
        ({"reward_ngram": None}, TypeError, r"reward_ngram=None must be an int, not NoneType"),
        ({"token_budget": 0}, ValueError, r"token_budget=0 must be at least 1"),
        ({"token_budget": "5"}, TypeError, r"token_budget='5' must be a whole number"),
        ({"share_prompts": 1}, TypeError, r"share_prompts=1 must be True or False"),
        ({"degenerate_reward": math.inf}, ValueError, r"degenerate_reward=inf must be finite"),
        ({"chat_template_kwargs": "x"}, TypeError, r"chat_template_kwargs='x' must be a mapping"),
        ({"chat_template_kwargs": {"tokenize": False}}, ValueError, r"chat_template_kwargs holds 'tokenize'"),
        ({"min_length": 3}, TypeError, r"unknown keyword 'min_length'; pass it as entra.EntraReward\(min_length=...\)$"),
        (
            {"attention_wieght": 1},
            TypeError,
            r"ScoreConfig\(\) got an unknown keyword 'attention_wieght'; did you mean 'attention_weight'",
        ),
    ],
)
def test_config_checks_itself(options, error, message):
    with pytest.raises(error, match=message):
        entra.ScoreConfig(**options)


def test_config_is_a_value():
    assert hash(entra.ScoreConfig()) == hash(entra.ScoreConfig(chat_template_kwargs={}))
    assert entra.ScoreConfig(attention_weight=1) != entra.ScoreConfig()


def test_no_warning_and_no_output_on_good_input(rows, llama, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entra.score_batch([rows[0][0]], [rows[0][1]], model=llama)
    assert capsys.readouterr() == ("", "")
