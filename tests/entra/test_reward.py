"""The guards around the reward, and that a trainer can name, pickle and call it."""

import asyncio
import functools
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra
from entra.encode import prompt_value
from entra.gates import called_once
from entra.guards import Guards, Judged, correlation, dead_banded, gated, group_gated, group_std, halved


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


class AsyncGate:
    async def __call__(self, completions, **columns):
        return is_long(completions)


def is_long(completions, **columns):
    """A gate at module level, as pickle needs it."""
    return [1.0 if len(c) > 10 else 0.0 for c in completions]


PROMPTS = ["2+2=", "2+2=", "name?"]
COMPLETIONS = ["4.", "It is four, I am sure of it.", "It is what it is what it is."]


def test_without_options_it_is_score_batch(model, tokenizer):
    plain = entra.score_batch(PROMPTS, COMPLETIONS, model=model, tokenizer=tokenizer)
    assert entra.EntraReward(model=model, tokenizer=tokenizer)(PROMPTS, COMPLETIONS) == plain


def test_gate_gets_the_trainers_columns_and_pays_only_right_answers(model, tokenizer):
    seen = {}

    def gate(prompts, completions, completion_ids, **columns):
        seen.update(columns)
        return [1.0, 0.0, None]

    reward = entra.EntraReward(model=model, tokenizer=tokenizer, gate=gate)
    plain = entra.score_batch(PROMPTS, COMPLETIONS, model=model, tokenizer=tokenizer)
    assert reward(PROMPTS, COMPLETIONS, answer=["4", "4", "x"], trainer_state=None) == [plain[0], 0.0, None]
    assert seen == {"answer": ["4", "4", "x"], "trainer_state": None}


def test_a_dataset_column_cannot_take_the_place_of_an_option(model, tokenizer):
    seen = {}

    def gate(completions, **columns):
        seen.update(columns)
        return is_long(completions)

    reward = entra.EntraReward(model=model, tokenizer=tokenizer, gate=gate)
    names = ("model", "config", "details", "function", "arguments", "self", "reward", "gate")
    columns = {"trainer_state": object(), **{name: ["x"] * 3 for name in names}}
    assert reward(PROMPTS, COMPLETIONS, **columns) == reward(PROMPTS, COMPLETIONS)
    assert columns.items() <= seen.items()


def test_bound_policy_is_used(model, tokenizer):
    reward = entra.EntraReward()
    with entra.bind_policy(model, tokenizer):
        assert reward(PROMPTS, COMPLETIONS) == entra.score_batch(PROMPTS, COMPLETIONS)
    with pytest.raises(RuntimeError, match="no model to score with"):
        reward(PROMPTS, COMPLETIONS)


def test_it_pickles_and_scores_the_same(model, tokenizer):
    reward = entra.EntraReward(model=model, tokenizer=tokenizer, gate=is_long, min_length=3, name="concise")
    again = pickle.loads(pickle.dumps(reward))
    assert again.__name__ == "concise"
    assert again(PROMPTS, COMPLETIONS) == reward(PROMPTS, COMPLETIONS)
    assert not isinstance(reward, torch.nn.Module)  # TRL would take it for a classifier


def test_truncated_completions_are_not_scored(model, tokenizer):
    reward = entra.EntraReward(model=model, tokenizer=tokenizer, skip_truncated=True)
    ids = [[9, 10, 11, 2], [9, 10, 11], []]
    first, second, third = reward(["a", "a", "a"], ["", "", ""], ids)
    assert first is not None
    assert (second, third) == (None, None)
    with pytest.raises(ValueError, match="skip_truncated=True needs completion_ids"):
        reward(["a"], ["b"])


def judged(score, length=30, mean_logprob=-1.0, redundant=None, gate=1.0, ended=True, group="a"):
    return Judged(group, length, mean_logprob, score, redundant, gate, ended)


def test_guards():
    completions = [judged(0.9, length=2), judged(0.8, mean_logprob=-9.0), judged(0.7), judged(None)]
    rewards, stopped = Guards(min_length=3, min_mean_logprob=-5.0).apply(completions)
    assert rewards == [0.0, 0.0, 0.7, None]
    assert stopped == {"min_length": 1 / 3, "min_mean_logprob": 1 / 3}
    assert Guards().apply(completions) == ([0.9, 0.8, 0.7, None], {})


def test_every_guard_is_a_keyword_of_the_reward():
    options = {"halve_at": 5.0, "group_gate": 0.5, "min_length": 2, "min_mean_logprob": -9.0, "dead_band": 0.1}
    reward = entra.EntraReward(gate=is_long, **options, skip_truncated=True)
    assert reward.guards == Guards(**options, skip_truncated=True)
    parameters = inspect.signature(entra.EntraReward).parameters
    assert {name: parameters[name].default for name in vars(Guards())} == vars(Guards())


def test_gating_never_pays_for_redundancy():
    # A negative gate times a reward would rank the more redundant completion higher.
    assert gated([0.9, 0.5, 0.5, None], [-1.0, -1.0, 2.0, 1.0]) == [0.0, 0.0, 1.0, None]


def test_dead_band_levels_only_groups_without_spread():
    rewards = [0.500, 0.504, None, 0.50, 0.60, 0.3]
    assert dead_banded(rewards, ["a", "a", "a", "b", "b", "c"], 0.01) == [0.502, 0.502, None, 0.50, 0.60, 0.3]
    assert dead_banded(rewards, list("aaabbc"), 0.0) == rewards


def test_dead_band_groups_by_prompt(model, tokenizer):
    wide = entra.EntraReward(model=model, tokenizer=tokenizer, dead_band=10.0)(PROMPTS, COMPLETIONS)
    plain = entra.score_batch(PROMPTS, COMPLETIONS, model=model, tokenizer=tokenizer)
    assert wide[0] == wide[1] == pytest.approx((plain[0] + plain[1]) / 2)
    assert wide[2] == plain[2]


CHAT = [{"role": "user", "content": "2+2="}]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param([5, 6], (5, 6), id="list and tuple"),
        pytest.param([5, 6], np.array([5, 6]), id="list and array"),
        pytest.param([5, 6], torch.tensor([5, 6]), id="list and tensor"),
        pytest.param(CHAT, np.array(CHAT), id="messages in an array"),
        pytest.param(CHAT, [{"content": "2+2=", "role": "user"}], id="another order of the keys"),
    ],
)
def test_prompts_of_one_value_are_one_group(one, other, model, tokenizer):
    rewards = entra.EntraReward(model=model, tokenizer=tokenizer, dead_band=10.0)([one, other], COMPLETIONS[:2])
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(np.arange(1100) % 90, np.where(np.arange(1100) == 550, 7, np.arange(1100) % 90), id="long arrays"),
        pytest.param([5, 6], [5, 7], id="ids"),
        pytest.param(CHAT, [{"role": "user", "content": "2+3="}], id="messages"),
    ],
)
def test_prompts_of_two_values_are_two_groups(one, other, tokenizer):
    """numpy shortens the text of an array of more than 1,000 numbers, by which groups were told apart."""
    roomy = build("llama", max_position_embeddings=2048)
    rewards = entra.EntraReward(model=roomy, tokenizer=tokenizer, dead_band=10.0)([one, other], COMPLETIONS[:2])
    assert rewards[0] != rewards[1]


def test_the_group_of_a_prompt_survives_the_way_to_another_rank():
    for prompt in ("text", [5, 6], np.arange(3), CHAT, [{"role": "user", "content": [{"type": "text", "text": "a"}]}]):
        value = prompt_value(prompt)
        assert pickle.loads(pickle.dumps(value)) == value
        assert hash(value) == hash(prompt_value(prompt))
    assert prompt_value("[5, 6]") != prompt_value([5, 6])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gate": 1.0}, TypeError, r"gate=1.0 must be a reward function"),
        ({"gate": AsyncGate}, TypeError, r"gate=<class .*AsyncGate'> must be a reward function"),
        ({"model": "no_such_folder"}, ValueError, r"model='no_such_folder' cannot be loaded; give a folder, a hub name or"),
        ({"model": 5}, TypeError, r"model=5 must be a transformers causal LM"),
        ({"model": torch.nn.Linear(1, 1)}, ValueError, r"pass a transformers causal LM"),
        ({"prompts": ["a"], "completions": ["b"]}, TypeError, r"'prompts'; pass it as entra.EntraReward\(...\)\(prompts=..."),
        ({"min_length": -1}, ValueError, r"min_length=-1 must be at least 0"),
        ({"min_mean_logprob": 1.0}, ValueError, r"min_mean_logprob=1.0 must be at most 0"),
        ({"dead_band": -0.1}, ValueError, r"dead_band=-0.1 must be at least 0"),
        ({"min_length": "3"}, TypeError, r"min_length='3' must be a whole number of tokens, not str"),
        ({"config": {"a": 1}}, TypeError, r"config=.* must be an entra.ScoreConfig, not dict"),
        ({"name": 5}, TypeError, r"name=5 must be text"),
        (
            {"protect_fractoin": 1},
            TypeError,
            r"did you mean 'protect_fraction'\? Pass it as config=entra.ScoreConfig\(protect_fraction=...\)$",
        ),
        ({"verify_every": 1}, TypeError, r"'verify_every'; pass it as entra.EntraGRPOTrainer\(verify_every=...\)$"),
        ({"gat": 1}, TypeError, r"EntraReward\(\) got an unknown keyword 'gat'; did you mean 'gate'\?"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        entra.EntraReward(**options)


async def coroutine_gate(completions, **_):
    await asyncio.sleep(0)
    return is_long(completions)


def test_an_asynchronous_gate_is_awaited(model, tokenizer):
    options = {"model": model, "tokenizer": tokenizer}
    expected = entra.EntraReward(gate=is_long, **options)(PROMPTS, COMPLETIONS)
    for gate in (coroutine_gate, AsyncGate(), functools.partial(coroutine_gate, extra=1)):
        assert entra.EntraReward(gate=gate, **options)(PROMPTS, COMPLETIONS) == expected

    async def in_a_loop():  # as in a notebook
        return entra.EntraReward(gate=coroutine_gate, **options)(PROMPTS, COMPLETIONS)

    assert asyncio.run(in_a_loop()) == expected


def test_asynchronous_gates_share_one_loop():
    """A client that a gate keeps open belongs to the loop that it was opened on."""

    async def loop_of():
        return asyncio.get_running_loop()

    assert called_once(loop_of) is called_once(loop_of)


def test_a_gate_that_would_wait_for_itself_is_an_error():
    async def inner():
        return [1.0]

    async def outer():
        return called_once(inner)

    with pytest.raises(RuntimeError, match=r"call the reward with asyncio.to_thread"):
        called_once(outer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], r"gate returned 1 values for 3 completions"),
        (None, r"gate returned None for 3 completions"),
        ([1.0, math.nan, 1.0], r"gate returned nan for row 1; it must be a finite number"),
        ([1.0, 1.0, math.inf], r"gate returned inf for row 2"),
        (["x", 1.0, 1.0], r"gate returned 'x' for row 0"),
        ({0: 1.0, 1: 0.0, 2: 1.0}, r"gate returned \{0: 1.0, 1: 0.0, 2: 1.0\} for 3 completions; it must return a list"),
        ({1.0, 0.5, 0.0}, r"gate returned \{.*\} for 3 completions; it must return a list"),
        (b"abc", r"gate returned b'abc' for 3 completions; it must return a list"),
    ],
)
def test_a_gate_that_returns_nonsense_is_an_error(values, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        entra.EntraReward(model=model, tokenizer=tokenizer, gate=lambda **_: values)(PROMPTS, COMPLETIONS)


def test_pads_do_not_make_a_completion_truncated(model, tokenizer):
    reward = entra.EntraReward(model=model, tokenizer=tokenizer, skip_truncated=True)
    ended, truncated = reward(["a", "a"], ["", ""], [[9, 10, 9, 2, 0, 0], [9, 10, 9, 0, 0]])
    assert ended is not None
    assert truncated is None


def test_truncation_without_an_eos_id_is_an_error():
    model = build("llama", eos_token_id=None)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="neither the tokenizer nor the model names an EOS id"):
        entra.EntraReward(model=model, skip_truncated=True)([[5]], [[6, 7]], [[6, 7]])


def test_guards_and_dead_band_at_their_boundaries():
    boundary = Guards(min_length=3, min_mean_logprob=-5.0)
    assert boundary.apply([judged(0.9, length=3, mean_logprob=-5.0)])[0] == [0.9]
    assert boundary.apply([judged(0.9, length=2, mean_logprob=-5.0)])[0] == [0.0]
    assert dead_banded([0.25, 0.5], ["a", "a"], 0.25) == [0.25, 0.5]


def test_group_gate_pays_only_where_enough_of_the_prompt_is_right():
    rewards, groups = [0.9, 0.0, 0.8, 0.0, None], ["a", "a", "b", "b", "b"]
    gate = [1.0, 0.0, 1.0, 0.0, 0.0]
    assert group_gated(rewards, gate, groups, 0.0) == rewards
    assert group_gated(rewards, gate, groups, 0.5) == [0.9, 0.0, 0.0, 0.0, None]
    assert group_gated(rewards, [1.0, None, 5.0, -3.0, None], groups, 0.75) == [0.9, 0.0, 0.0, 0.0, None]
    assert group_gated([0.5], [None], ["a"], 0.1) == [0.0]


def test_group_gate_of_the_reward(model, tokenizer):
    options = {"model": model, "tokenizer": tokenizer, "gate": lambda completions, **_: [1.0, 0.0, 1.0]}
    plain = entra.EntraReward(**options)(PROMPTS, COMPLETIONS)
    assert entra.EntraReward(**options, group_gate=0.6)(PROMPTS, COMPLETIONS) == [0.0, 0.0, plain[2]]
    with pytest.raises(ValueError, match=r"group_gate=0.5 needs a gate"):
        entra.EntraReward(group_gate=0.5)
    with pytest.raises(ValueError, match=r"group_gate=2 must be in \[0, 1\]"):
        entra.EntraReward(gate=is_long, group_gate=2)


def test_spread_and_correlation():
    assert group_std([0.0, 1.0, 5.0, None], ["a", "a", "b", "b"]) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(group_std([1.0, None], ["a", "a"]))
    assert correlation([1.0, 2.0, None, 4.0], [3, 2, 99, 0]) == pytest.approx(-1.0)
    assert math.isnan(correlation([1.0, 1.0], [1, 2]))


def test_what_it_logs_under_a_trainer(model, tokenizer):
    metrics, columns = {}, {}
    reward = entra.EntraReward(model=model, tokenizer=tokenizer, gate=is_long, name="brevity")
    rewards = reward(
        PROMPTS, COMPLETIONS, trainer_state=object(), log_metric=metrics.__setitem__, log_extra=columns.__setitem__
    )
    scores = entra.score_batch(PROMPTS, COMPLETIONS, model=model, tokenizer=tokenizer, details=True)
    assert columns["brevity/score"] == scores.rewards
    assert columns["brevity/protected_share"] == pytest.approx([float(p.float().mean()) for p in scores.protected])
    assert columns["brevity/incoming"] == pytest.approx([float(mu.mean()) for mu in scores.incoming])
    assert metrics["brevity/score"] == pytest.approx(sum(scores.rewards) / 3)
    assert metrics["brevity/group_std"] == pytest.approx(abs(rewards[0] - rewards[1]) / math.sqrt(2))
    lengths = torch.tensor([float(ids.numel()) for ids in scores.token_ids])
    assert metrics["brevity/length_correlation"] == pytest.approx(
        float(torch.corrcoef(torch.stack([torch.tensor(rewards), lengths]))[0, 1]), abs=1e-5
    )


def test_what_is_not_defined_is_not_logged(model, tokenizer):
    metrics = {}
    reward = entra.EntraReward(model=model, tokenizer=tokenizer)
    reward(["2+2="], ["It is four."], trainer_state=object(), log_metric=metrics.__setitem__)
    names = ("score", "redundant_tokens", "protected_share", "incoming")
    assert set(metrics) == {f"entra_reward/{name}" for name in names}


def test_the_total_of_redundant_tokens_is_halved(model, tokenizer):
    assert [halved(d, 10.0) for d in (0.0, 10.0, 30.0, None)] == [1.0, 0.5, 0.25, None]
    scores = entra.score_batch(PROMPTS, COMPLETIONS, model=model, tokenizer=tokenizer, details=True)
    expected = [1 / (1 + int((~p).sum()) * (1 - r) / 3.0) for r, p in zip(scores.rewards, scores.protected, strict=True)]
    reward = entra.EntraReward(model=model, tokenizer=tokenizer, halve_at=3.0)
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected)
    with pytest.raises(ValueError, match="halve_at=0 must be at least 1e-06 and finite"):
        entra.EntraReward(halve_at=0)


def test_new_words_raise_r_far_more_than_they_lower_the_total():
    """Why `halve_at` is there: r is a mean. The log-probs protect the same two tokens either way."""
    repeats, filler = [7, 7, 8, 8, 7, 7, 8, 8], list(range(20, 30))

    def scored(ids):
        logprobs = [0.0, 0.0] + [-5.0] * len(ids)
        config = entra.ScoreConfig(protect_fraction=2 / len(logprobs))
        return entra.score_batch(
            [[1]], None, [[50, 51, *ids]], logprobs=[logprobs], incoming=[[0.0] * len(logprobs)], config=config, details=True
        )

    short, long = scored(repeats), scored(repeats + filler)
    total = [sum(~s.protected[0]).item() * (1 - s.rewards[0]) for s in (short, long)]
    assert [round(s.rewards[0], 2) for s in (short, long)] == [0.33, 0.79]
    assert [round(d, 1) for d in total] == [5.3, 3.8]  # by the slow log M alone


def test_no_answer_is_not_the_best_answer(model):
    """With nothing that could repeat D would be 0, the best reward there is."""
    reward = entra.EntraReward(model=model, halve_at=50.0)
    rewards = reward([[5]] * 3, None, [[], [7], [7, 7, 7]])
    assert rewards[:2] == [0.0, 0.0]
    assert rewards[2] == pytest.approx(1 / (1 + 3 / 50))


@pytest.mark.parametrize("option", [{"ranking_scope": "sequence"}, {"length_adjusted": 20}])
def test_the_total_is_of_the_completion_as_it_is(option):
    with pytest.raises(ValueError, match=r"halve_at=5.0 counts the redundant tokens of the completion as it is"):
        entra.EntraReward(halve_at=5.0, config=entra.ScoreConfig(**option))


@pytest.mark.parametrize("option", ["copy_ngram", "reward_ngram"])
def test_ngrams_reach_a_reward_as_they_reach_score_batch(model, tokenizer, option):
    config = entra.ScoreConfig(protect_fraction=0.5, **{option: 1 if option == "copy_ngram" else 2})
    reward = entra.EntraReward(model=model, tokenizer=tokenizer, config=config)
    expected = entra.score_batch(PROMPTS, COMPLETIONS, model=model, tokenizer=tokenizer, config=config)
    assert reward(PROMPTS, COMPLETIONS) == expected
    plain = entra.ScoreConfig(protect_fraction=0.5)
    assert expected != entra.score_batch(PROMPTS, COMPLETIONS, model=model, tokenizer=tokenizer, config=plain)


def test_a_frozen_scorer_reads_text_with_its_own_tokenizer(model, tokenizer):
    """The ids that a trainer hands over are the policy's: under another tokenizer they mean something else."""
    ids_of_another = [[90, 91, 92, 93]] * 3
    expected = entra.score_batch(PROMPTS, COMPLETIONS, model=model, tokenizer=tokenizer)
    assert entra.EntraReward(model=model, tokenizer=tokenizer)(PROMPTS, COMPLETIONS, ids_of_another) == expected
    by_ids = entra.score_batch([[5]] * 3, None, ids_of_another, model=model)
    assert entra.EntraReward(model=model)([[5]] * 3, COMPLETIONS, ids_of_another) == by_ids


@pytest.mark.parametrize("values", [np.ones(3), [np.float32(1)] * 3, torch.ones(3), (1, True, 1.0)], ids=type)
def test_a_gate_may_return_whatever_trl_takes(model, tokenizer, values):
    plain = entra.score_batch(PROMPTS, COMPLETIONS, model=model, tokenizer=tokenizer)
    reward = entra.EntraReward(model=model, tokenizer=tokenizer, gate=lambda **_: values)
    assert reward(PROMPTS, COMPLETIONS) == plain


def test_a_gate_that_trl_would_call_in_another_way():
    with pytest.raises(TypeError, match="must be a reward function"):
        entra.EntraReward(gate=torch.nn.Linear(1, 1))


def test_metrics_say_why_a_reward_is_0(model, tokenizer):
    """Each guard by itself: shares of the completions that are scored."""
    prompts, completions = ["2+2="] * 3 + ["name?"], [*COMPLETIONS, "Four."]
    scores = entra.score_batch(prompts, completions, model=model, tokenizer=tokenizer, details=True)
    lengths = [ids.numel() for ids in scores.token_ids]
    means = [float(l.mean()) for l in scores.logprobs]
    options = {"min_length": max(lengths), "min_mean_logprob": sorted(means)[1], "dead_band": 5.0, "group_gate": 0.5}
    metrics = {}
    reward = entra.EntraReward(model=model, tokenizer=tokenizer, gate=lambda **_: [1.0, 0.0, -1.0, None], **options)
    rewards = reward(prompts, completions, trainer_state=object(), log_metric=metrics.__setitem__)
    assert rewards == [0.0, 0.0, 0.0, None]
    stopped = {name.removeprefix("entra_reward/stopped/"): share for name, share in metrics.items() if "/stopped/" in name}
    assert stopped == pytest.approx(
        {
            "gate": 2 / 3,
            "group_gate": 1.0,
            "min_length": sum(n < max(lengths) for n in lengths[:3]) / 3,
            "min_mean_logprob": sum(mean < sorted(means)[1] for mean in means[:3]) / 3,
            "dead_band": 0.0,  # all are 0 by then
        }
    )


def test_the_share_of_a_guard_is_of_what_it_stops_alone(model, tokenizer):
    def stopped(**options):
        metrics = {}
        reward = entra.EntraReward(model=model, tokenizer=tokenizer, **options)
        reward(PROMPTS, COMPLETIONS, trainer_state=object(), log_metric=metrics.__setitem__)
        return {name: share for name, share in metrics.items() if "/stopped/" in name}

    assert stopped() == {}
    assert stopped(dead_band=10.0) == pytest.approx({"entra_reward/stopped/dead_band": 2 / 3})
    half = {"gate": lambda **_: [1.0, 0.0, 1.0], "group_gate": 0.6}
    assert stopped(**half) == pytest.approx({"entra_reward/stopped/gate": 1 / 3, "entra_reward/stopped/group_gate": 2 / 3})
