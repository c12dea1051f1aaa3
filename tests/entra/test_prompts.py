"""Rows whose prompt runs once against the same rows run whole."""

import os
import weakref
from contextlib import suppress

import pytest
import torch
from test_rows_alone import CASES, INCOMING_TOLERANCE, LOGPROB_TOLERANCE, ORIGINAL
from tiny_models import FAMILIES, VOCABULARY, build
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import entra
from entra.forward import token_signals
from entra.prompts import Prompts, heads_not_repeated, shared_prompts, tokens_together, why_whole
from entra.rope import RopeGroups

STATEFUL = ("qwen3_next", "qwen3_5")
# The prompt of each row, and the tokens of its completion.
PROMPTS = (30, 70, 24)
ROWS = ((0, 9), (0, 1), (1, 4), (0, 14), (1, 12), (0, 9), (2, 5), (2, 3), (2, 6))
BUDGET = 60

pytestmark = pytest.mark.usefixtures("one_thread")


def random_ids(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def rows():
    prompts = random_ids(*PROMPTS)
    completions = random_ids(*(n for _, n in ROWS), seed=1)
    return [prompts[prompt] + completion for (prompt, _), completion in zip(ROWS, completions, strict=True)]


LAST = [n for _, n in ROWS]


def score(model, rows, last=LAST, **options):
    return token_signals(model, rows, last, entra.ScoreConfig(**{"token_budget": BUDGET, **options}))


def shapes_of(model, *arguments, **options):
    """The shapes of the ids of each forward while rows are scored."""
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        score(model, *arguments, **options)
    finally:
        handle.remove()
    return shapes


def assert_equal(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=LOGPROB_TOLERANCE)
        torch.testing.assert_close(ours.incoming, theirs.incoming, rtol=0, atol=INCOMING_TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_behind_their_prompt_are_scored_as_whole_ones(family, rows):
    model = build(family)
    assert_equal(score(model, rows), score(model, rows, share_prompts=False))
    shapes = shapes_of(model, rows)
    if family in STATEFUL:
        assert why_whole(model, entra.ScoreConfig()) == "1 of the model's 4 layers are attention, and the others keep a state"
        assert shapes == shapes_of(model, rows, share_prompts=False)
    else:
        assert shapes == [(1, 70), (2, 12), (2, 30), (3, 14), (4, 6)]


@pytest.mark.parametrize(
    ("implementation", "options"),
    [
        ("eager", {}),
        ("flex_attention", {}),
        ("sdpa", {"attention_statistic": "lift"}),
        ("sdpa", {"head_reduction": "max"}),
    ],
    ids=str,
)
def test_so_it_is_with_each_attention_and_each_statistic(implementation, options, rows):
    model = build("gemma3", attn_implementation=implementation)
    with torch.compiler.set_stance("force_eager"):  # transformers compiles FlexAttention, for a minute
        assert_equal(score(model, rows, **options), score(model, rows, share_prompts=False, **options))


@pytest.mark.parametrize("budget", [1, 10_000])
def test_the_token_budget_holds_for_keys_too(budget, rows):
    model = build("llama")
    alone = [(1, 70), (1, 12), (1, 4), (1, 30), (1, 14), (1, 9), (1, 9), (1, 1), (1, 24), (1, 6), (1, 5), (1, 3)]
    together = [(1, 70), (2, 12), (2, 30), (7, 14)]
    assert shapes_of(model, rows, token_budget=budget) == (alone if budget == 1 else together)
    assert_equal(score(model, rows, token_budget=budget), score(model, rows, share_prompts=False))


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_a_prompt_with_another_rope_than_its_rows_runs_with_them(family, overrides):
    """The prompt is as long as the model was trained on. One token more, and RoPE is another one for all tokens."""
    model, last = build(family, **overrides), [9, 4, 3, 2, 1]
    rows = [random_ids(ORIGINAL)[0] + completion for completion in random_ids(*last, seed=1)]
    assert shapes_of(model, rows, last) == shapes_of(model, rows, last, share_prompts=False)
    model, last = build(family, **overrides), [1] * 14
    rows = [row[:10] + completion for row in rows[:1] for completion in random_ids(*last, seed=1)]
    assert shapes_of(model, rows, last) == [(1, 10), (14, 1)]
    assert_equal(score(model, rows, last), score(model, rows, last, share_prompts=False))


def test_a_prompt_runs_once_where_that_saves_tokens(rows):
    rope, cpu = RopeGroups(build("llama")), torch.device("cpu")
    assert shared_prompts(rows, LAST, rope, cpu) == [[0, 1, 3, 5], [2, 4], [6, 7, 8]]
    assert shared_prompts(rows, [0] * len(rows), rope, cpu) == []
    assert shared_prompts(rows, LAST, rope, torch.device("cuda")) == []
    for prompt, completion, count, device, runs_once in (
        (128, 9, 1, "cpu", False),
        (128, 9, 2, "cpu", True),
        (127, 9, 2, "cpu", False),  # 127 tokens
        (128, 896, 2, "cpu", True),
        (128, 897, 2, "cpu", False),  # less than a 16th
        (1024, 9, 2, "cuda", False),
        (1024, 9, 3, "cuda", True),
    ):
        group = [[5] * (prompt + completion)] * count
        found = shared_prompts(group, [completion] * count, rope, torch.device(device))
        assert found == ([list(range(count))] if runs_once else [])
    two_groups = [[token] * (64 + 9) for token in (5, 6, 5, 6)]
    assert shared_prompts(two_groups, [9] * 4, rope, cpu) == [[0, 2], [1, 3]]


def test_completions_of_very_unequal_lengths_share_no_forward():
    """On a CPU 32 pads cost more than another forward."""
    rows = [random_ids(44)[0] + completion for completion in random_ids(50, 18, 17, 3, seed=1)]
    assert shapes_of(build("llama"), rows, [50, 18, 17, 3], token_budget=1_000) == [(1, 44), (2, 50), (2, 17)]


def test_prompts_keep_no_keys_of_their_completions(rows):
    model, cache = build("llama"), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([rows[1][:7], [*rows[0][:5], 0, 0]]), past_key_values=cache, use_cache=True)
        prompts = Prompts(cache, [7, 5])
        three, one = (
            model(
                torch.tensor([rows[0][5:9]] * count),
                **prompts.behind([1] * count, torch.tensor([4] * count), torch.device("cpu")),
            ).logits
            for count in (3, 1)
        )
        alone = model(torch.tensor([rows[0][:9]])).logits[:, 5:]
    assert {layer.keys.shape for layer in cache.layers} == {(2, 2, 7, 20)}
    torch.testing.assert_close(three[:1], one, rtol=0, atol=LOGPROB_TOLERANCE)
    torch.testing.assert_close(one, alone, rtol=0, atol=LOGPROB_TOLERANCE)


def test_pads_are_at_no_position_that_the_model_does_not_have():
    """The longest row fills a model that has learnt 64 positions; behind its prompt stand the pads of another's completion."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    rows = [random_ids(length)[0] for length in (60, 60, 60, 40, 40)]
    rows = [row + completion for row, completion in zip(rows, random_ids(4, 3, 2, 20, 19, seed=1), strict=True)]
    last = [4, 3, 2, 20, 19]
    assert shapes_of(model, rows, last, token_budget=1_000) == [(2, 60), (5, 20)]
    assert_equal(score(model, rows, last, token_budget=1_000), score(model, rows, last, share_prompts=False))


def test_a_model_that_counts_positions_by_itself_mixes_no_prompts():
    """In transformers 5.3 Ministral 3 scales attention by a token's place in the cache, pads before the row included."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    rope = {"rope_parameters": yarn | {"llama_4_scaling_beta": 1.0}}
    model = build("mistral", model_type="ministral3", sliding_window=None, max_position_embeddings=64, **rope)
    prompts, last = random_ids(60, 41), [5, 7, 9, 6, 6, 2]
    rows = [prompts[r // 3] + completion for r, completion in enumerate(random_ids(*last, seed=1))]
    assert shapes_of(model, rows, last, token_budget=1_000) == [(2, 60), (3, 9), (3, 6)]
    assert_equal(score(model, rows, last, token_budget=1_000), score(model, rows, last, share_prompts=False))


@pytest.mark.parametrize("lengths", [(100, 100), (100, 85)], ids=["equal", "unequal"])
def test_what_a_model_remembers_of_an_image_shifts_no_position(lengths):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3]}}
    text = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "pad_token_id": 0, **heads, **rope}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48}
    special = dict.fromkeys(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), VOCABULARY - 1
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)).eval()
    model.model.rope_deltas = torch.tensor([[-20]])  # what generating behind an image leaves
    prompts, last = random_ids(*lengths), [5, 7, 9, 4]
    rows = [prompts[r // 2] + completion for r, completion in enumerate(random_ids(*last, seed=1))]
    rows = [[min(token, VOCABULARY - 2) for token in row] for row in rows]
    once = score(model, rows, last, token_budget=1_000)
    assert model.model.rope_deltas.tolist() == [[-20]]
    assert_equal(once, score(model, rows, last, share_prompts=False))


def test_prompts_of_an_adapted_model_are_mixed(rows):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert shapes_of(model.base_model.model, rows) == shapes_of(build("llama"), rows)
    assert_equal(score(model, rows), score(model, rows, share_prompts=False))


def test_prompts_that_run_together_are_few_and_leave_before_the_next(monkeypatch):
    """Their keys of all layers are held: 2,048 tokens of the 16,384 of a forward on a GPU."""
    assert [tokens_together(budget) for budget in (100, 1_024, 16_384)] == [100, 1_024, 2_048]
    alive, held, init = [], [], Prompts.__init__

    def spy(self, *arguments):
        held.append(sum(prompts() is not None for prompts in alive))
        alive.append(weakref.ref(self))
        init(self, *arguments)

    monkeypatch.setattr(Prompts, "__init__", spy)
    rows = [ids + completion for ids in random_ids(40, 40, 40) for completion in random_ids(3, 4, seed=len(ids))]
    rows += [row[:-1] for row in rows]
    score(build("llama"), rows, [len(row) - 40 for row in rows], token_budget=80)
    assert held == [0, 0]


@pytest.mark.parametrize("mine", [None, "0"])
def test_the_switch_for_fewer_heads_is_as_before_afterwards(mine, monkeypatch):
    switch = "TRANSFORMERS_SDPA_FORCE_GQA"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv(switch, raising=False)
    if mine is not None:
        monkeypatch.setenv(switch, mine)
    with suppress(KeyError), heads_not_repeated(torch.device("cpu")):
        assert os.environ[switch] == (mine or "1")
        raise KeyError
    assert os.environ.get(switch) == mine
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with heads_not_repeated(torch.device("cpu")):
        assert os.environ.get(switch) == mine


def test_a_model_that_leaves_its_cache_empty_is_refused():
    with pytest.raises(RuntimeError, match="share_prompts=False"):
        Prompts(DynamicCache(), [5])


def test_why_rows_run_whole(monkeypatch):
    def why(change=lambda model: None, **options):
        model = build("llama")
        change(model)
        return why_whole(model, entra.ScoreConfig(**options))

    def unknown_attention(model):
        model.config._attn_implementation = "paged|sdpa"

    def another_cache(model):
        monkeypatch.setattr(model.model.layers[0].self_attn, "forward", lambda hidden_states, layer_past=None: None)

    def convolution(model):
        model.model.convolution = torch.nn.Conv1d(1, 1, 1)

    assert why() is None
    assert why(share_prompts=False) == "share_prompts=False"
    assert why(ranking_scope="sequence") == "ranking_scope='sequence' ranks the prompt's tokens, too"
    assert why(unknown_attention) == "what the attention function 'paged|sdpa' makes of a cache is not known"
    assert why(another_cache) == "the model's attention takes no past_key_values"
    assert why(convolution) == "the model has convolutions, which keep a state"
    assert why(lambda model: model.compile()) == "the model is compiled, and would be again for prompts of another length"
    assert why(lambda model: setattr(model.config, "num_hidden_layers", 3)).startswith("2 of the model's 3 layers")


def test_rows_run_whole_where_there_is_a_reason(rows):
    model, last = build("llama"), [len(row) - 1 for row in rows]
    prompts, completions = zip(*((row[:-n], row[-n:]) for row, n in zip(rows, LAST, strict=True)), strict=True)
    shapes = shapes_of(model, rows, share_prompts=False)
    assert {shape[1] for shape in shapes} == {82, 74, 44, 39, 31, 30, 27}
    calls = []
    model.register_forward_pre_hook(lambda m, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    config = entra.ScoreConfig(ranking_scope="sequence", token_budget=BUDGET)
    entra.score_batch(prompts, completions, model=model, config=config)
    assert calls == shapes == shapes_of(model, rows, last, ranking_scope="sequence")
