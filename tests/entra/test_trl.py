"""ENTRA in TRL's trainers: as a plain reward function, and scoring the live policy in the trainers of `entra.trl`."""

import asyncio
import functools
import json
import math
import multiprocessing
import types
import warnings

import pytest
import torch
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra
import entra.capture
import entra.forward
import entra.rollout
import entra.verify

trl = pytest.importorskip("trl", reason="needs TRL: pip install 'entra-reward[train]'")
pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{"prompt": f"{'1+' * (i % 3)}{i}=", "answer": str(i), "model": "a column"} for i in range(8)]
# Two forwards of one sequence under different padding, float32: some roundings of numbers up to about 10.
LOGPROB_TOLERANCE, INCOMING_TOLERANCE = 2e-5, 2e-6


def every_second(completions, **columns):
    """An accuracy reward."""
    return [float(i % 2) for i in range(len(completions))]


def trainer_of(tmp_path, kind, reward_funcs, model=None, options=None, **config):
    """A trainer of `kind` that generates 4 completions of 12 tokens a prompt with a tiny model, two prompts at a time."""
    from datasets import Dataset

    defaults = {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "beta": 0.0,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    config_class = trl.RLOOConfig if issubclass(kind, trl.RLOOTrainer) else trl.GRPOConfig
    args = config_class(**{**defaults, **config})
    model = build("qwen3") if model is None else model
    return kind(
        model=model,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
        **(options or {}),
    )


def tokenizer():
    made = build_tokenizer()
    made.padding_side = "left"
    return made


def logged(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


@pytest.fixture(autouse=True)
def no_warning_of_an_ungated_reward(request):
    if "warns" in request.node.name:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "beta=0 and a live ENTRA reward")
        yield


@pytest.fixture
def own_forwards(monkeypatch):
    """Rows that scoring ran a forward of its own for, one entry per call."""
    calls = []
    original = entra.rollout.token_signals

    def spy(model, rows, *args, **kwargs):
        calls.append(len(rows))
        return original(model, rows, *args, **kwargs)

    monkeypatch.setattr(entra.rollout, "token_signals", spy)
    return calls


class Comparison:
    """A reward function that scores the live policy twice: as the trainer offers it, and by a forward of its own."""

    __name__ = "comparison"

    def __init__(self, config=None):
        self.reward = entra.EntraReward(config=config)
        self.model = None
        self.live, self.alone = [], []

    def __call__(self, prompts, completions, completion_ids, **columns):
        live = entra.score_batch(prompts, completions, completion_ids, config=self.reward.config, details=True)
        self.live.append(live)
        self.alone.append(
            entra.score_batch(
                prompts,
                completions,
                completion_ids,
                model=self.model,
                tokenizer=tokenizer(),
                config=self.reward.config,
                details=True,
            )
        )
        return live.rewards

    def check(self):
        assert self.live
        for live, alone in zip(self.live, self.alone, strict=True):
            for ours, theirs in zip(live.token_ids, alone.token_ids, strict=True):
                assert ours.tolist() == theirs.tolist()
            for ours, theirs in zip(live.logprobs, alone.logprobs, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGPROB_TOLERANCE)
            for ours, theirs in zip(live.incoming, alone.incoming, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=INCOMING_TOLERANCE)


def compare(tmp_path, kind=None, config=None, **options):
    """Trains a step; the scores of the live policy must be those of `score_batch` on its own."""
    comparison = Comparison(config)
    # The EntraReward beside it tells the trainer what to compute.
    trainer = trainer_of(tmp_path, kind or entra.EntraGRPOTrainer, [comparison.reward, comparison], **options)
    comparison.model = trainer.model
    entries = logged(trainer)
    comparison.check()
    return trainer, entries


# As reward functions of TRL's own trainers.


def test_frozen_scorer_in_a_plain_grpo_trainer(tmp_path):
    reward = entra.EntraReward(model=build("qwen3"), tokenizer=build_tokenizer(), gate=every_second)
    (entry,) = logged(trainer_of(tmp_path, trl.GRPOTrainer, [reward], multi_objective_aggregation="normalize_then_sum"))
    assert 0 < entry["rewards/entra_reward/mean"] <= 0.5
    for name in ("score", "protected_share", "incoming", "group_std"):
        assert 0 < entry[f"entra_reward/{name}"] < 1


def test_score_batch_itself_with_the_bound_policy(tmp_path):
    model = build("llama")
    trainer = trainer_of(tmp_path, trl.GRPOTrainer, [entra.score_batch], model)
    with entra.bind_policy(model, tokenizer()):
        (entry,) = logged(trainer)
    assert 0 < entry["rewards/score_batch/mean"] <= 1


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_a_pass_of_its_own_runs_each_prompt_once(tmp_path, monkeypatch, frozen):
    prompts = [{"prompt": f"{'1+' * 20}{i}="} for i in range(8)]
    monkeypatch.setitem(globals(), "ROWS", prompts)
    runs, original = [], entra.forward._run_prompts

    def spy(model, device, prompts, firsts, config):
        runs.append(([len(ids) for ids in prompts], len(firsts)))
        return original(model, device, prompts, firsts, config)

    def whole(prompts, completions, completion_ids, **columns):
        config, ids = entra.ScoreConfig(share_prompts=False), None if frozen else completion_ids  # a frozen scorer reads text
        return entra.score_batch(prompts, completions, ids, model=scorer, tokenizer=tokenizer(), config=config)

    monkeypatch.setattr(entra.forward, "_run_prompts", spy)
    policy = build("qwen3")
    scorer = build("llama") if frozen else policy
    reward = entra.EntraReward(model=scorer, tokenizer=tokenizer()) if frozen else entra.EntraReward()
    kind = trl.GRPOTrainer if frozen else entra.EntraGRPOTrainer
    (entry,) = logged(trainer_of(tmp_path, kind, [reward, whole], policy))
    assert runs == [([43, 43], 8)]
    assert entry["rewards/entra_reward/mean"] == pytest.approx(entry["rewards/whole/mean"], abs=1e-6)


def test_frozen_scorer_in_rloo(tmp_path):
    reward = entra.EntraReward(model=build("qwen3"), tokenizer=build_tokenizer(), name="brevity")
    (entry,) = logged(trainer_of(tmp_path, trl.RLOOTrainer, [reward]))
    assert 0 < entry["rewards/brevity/mean"] <= 1


def test_trl_grpo_takes_a_reward_by_its_dotted_name(tmp_path, monkeypatch, capsys):
    from trl.scripts.grpo import main, make_parser

    build("qwen3").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "my_rewards.py").write_text(
        "import entra\n"
        "def accuracy(completions, answer, **columns):\n"
        "    return [float(right in text) for text, right in zip(completions, answer)]\n"
        "concise = entra.EntraReward(model='model', gate=accuracy, name='concise')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = (
        "--model_name_or_path model --dtype float32 --dataset_name data --reward_funcs my_rewards.concise --output_dir run "
        "--per_device_train_batch_size 4 --num_generations 4 --max_completion_length 8 --max_steps 1 --logging_steps 1 "
        "--report_to none --use_cpu true --bf16 false --save_strategy no --disable_tqdm true"
    )
    main(*make_parser().parse_args_and_config(words.split()))
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "rewards/concise/mean" in capsys.readouterr().out


class Judge:
    """A gate that counts how often it is asked, and never says the same twice."""

    __name__ = "judge"

    def __init__(self):
        self.asked = []

    def __call__(self, completions, **columns):
        self.asked.append([float((i + len(self.asked)) % 2) for i in range(len(completions))])
        return self.asked[-1]


class AsyncJudge(Judge):
    """On whose loop it is asked counts, too: a client stays open between batches."""

    async def __call__(self, completions, **columns):
        self.loops = {*getattr(self, "loops", ()), asyncio.get_running_loop()}
        return super().__call__(completions, **columns)


@pytest.mark.parametrize("first", ["reward", "gate"])
@pytest.mark.parametrize("kind", [Judge, AsyncJudge])
def test_a_gate_that_is_also_a_reward_is_asked_once_for_each_batch(tmp_path, kind, first):
    judge = kind()
    concise = entra.EntraReward(gate=judge)
    also = entra.EntraReward(gate=judge, halve_at=5.0, name="total")
    functions = [judge, concise, also] if first == "reward" else [concise, also, judge]
    trainer = trainer_of(tmp_path, entra.EntraGRPOTrainer, functions, max_steps=2)
    entries = logged(trainer)
    assert len(judge.asked) == 2
    assert trainer.reward_funcs == functions
    assert entries[0]["rewards/judge/mean"] == 0.5
    assert entries[0]["rewards/entra_reward/mean"] > 0
    assert entries[0]["entra_reward/stopped/gate"] == 0.5
    if kind is AsyncJudge:
        assert judge.loops == {trainer.async_loop}


def test_a_gate_is_asked_again_about_other_rows(tmp_path):
    judge = Judge()
    concise = entra.EntraReward(gate=judge)

    def halves(prompts, completions, completion_ids, **columns):
        parts = (slice(0, 4), slice(4, 8))
        return [r for p in parts for r in concise(prompts[p], completions[p], completion_ids[p], log_metric=None)]

    logged(trainer_of(tmp_path, entra.EntraGRPOTrainer, [concise, halves]))
    assert [len(values) for values in judge.asked] == [8, 4, 4]


def test_two_rewards_of_one_name_are_refused(tmp_path):
    """TRL averages what two functions of one name return, and logs it as one."""
    rewards = [entra.EntraReward(gate=every_second), entra.EntraReward(gate=every_second, halve_at=5.0)]
    with pytest.raises(ValueError, match=r"2 functions called 'entra_reward', .* entra.EntraReward\(name=...\)"):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, rewards)
    frozen = [entra.EntraReward(model=build("qwen3"), tokenizer=build_tokenizer()) for _ in range(2)]
    with pytest.raises(ValueError, match=r"reward_funcs holds 2 functions called 'entra_reward'"):
        trainer_of(tmp_path, trl.GRPOTrainer, frozen).train()


def test_a_class_where_an_instance_belongs(tmp_path):
    with pytest.raises(TypeError, match=r"reward_funcs holds the class EntraReward, which scores nothing; pass an instance"):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [entra.EntraReward])


def test_a_scorer_whose_weights_cannot_be_loaded_fails_at_construction(tmp_path):
    build("qwen3").config.save_pretrained(tmp_path / "scorer")  # without weights
    reward = entra.EntraReward(model=tmp_path / "scorer")
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [reward])


def test_a_frozen_scorer_without_a_tokenizer_takes_the_trainers_ids(tmp_path):
    """The prompts, too: it raised that text must be tokenised."""
    seen = []

    def look(prompts, completions, completion_ids, **columns):
        ids = [tokenizer()(prompt)["input_ids"] for prompt in prompts]
        seen.append(entra.score_batch(ids, None, completion_ids, model=frozen, tokenizer=tokenizer()))
        return seen[-1]

    frozen = build("llama")
    reward = entra.EntraReward(model=frozen, name="frozen")
    (entry,) = logged(trainer_of(tmp_path, entra.EntraGRPOTrainer, [reward, look]))
    assert entry["rewards/frozen/mean"] == entry["rewards/look/mean"] > 0


# Riding on TRL's pass, or a pass of one's own.


@pytest.mark.parametrize("statistic", ["mean", "lift"])
def test_scores_ride_on_trls_pass(tmp_path, own_forwards, statistic):
    config = entra.ScoreConfig(attention_statistic=statistic)
    compare(tmp_path, num_iterations=2, config=config)
    assert own_forwards == []


def test_no_extra_forward_runs_when_riding_and_one_otherwise(tmp_path):
    def forwards(kind, reward, **config):
        model, count = build("qwen3"), 0

        def hook(*_):
            nonlocal count
            count += 1

        model.register_forward_pre_hook(hook)
        trainer_of(tmp_path, kind, [reward], model, **config).train()
        return count

    for config, extra in (({"num_iterations": 2}, 0), ({}, 1)):
        plain = forwards(trl.GRPOTrainer, every_second, **config)
        assert forwards(entra.EntraGRPOTrainer, entra.EntraReward(gate=every_second), **config) == plain + extra


def test_aligned_steps_make_their_own_pass(tmp_path, own_forwards):
    compare(tmp_path)
    assert own_forwards == [8]


def test_rloo(tmp_path, own_forwards):
    compare(tmp_path, entra.EntraRLOOTrainer)
    assert own_forwards == []  # RLOO always makes a log-prob pass


class PacksRows(trl.GRPOTrainer):
    """Stands in for trainers whose log-prob pass packs rows: TRL's coming `padding_free`, Unsloth."""

    use_cache = False

    def arrange(self, rows):
        """The rows [n] of a batch as the model gets them, and where each row then stands."""
        return [(torch.cat(rows), torch.cat([torch.arange(len(row)) for row in rows]), range(len(rows)))]

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        mask = attention_mask.bool()
        logps = torch.zeros(input_ids.shape)
        for ids, positions, order in self.arrange([row[m] for row, m in zip(input_ids, mask, strict=True)]):
            out = model(input_ids=ids[None], position_ids=positions[None], use_cache=self.use_cache).logits[0]
            found = out[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            found = torch.cat([found.new_zeros(1), found])  # the first token of a row is not asked for
            for row, part in zip(order, found.split([int(mask[row].sum()) for row in order]), strict=True):
                logps[row, mask[row]] = part
        return logps[:, -logits_to_keep:], None, None


class Packed(entra.EntraGRPOTrainer, PacksRows):
    """Scores on top of its pass."""


def test_rewards_of_a_packed_pass_are_those_of_a_padded_one(tmp_path, own_forwards):
    rewards = {}
    for kind in (Packed, entra.EntraGRPOTrainer):
        comparison = Comparison()
        trainer = trainer_of(
            tmp_path, kind, [comparison.reward, comparison], num_iterations=2, options={"verify_every": 1}, seed=3
        )
        comparison.model = trainer.model
        logged(trainer)
        comparison.check()
        (live,) = comparison.live
        rewards[kind] = live.rewards
    assert rewards[Packed] == pytest.approx(rewards[entra.EntraGRPOTrainer], abs=1e-6)
    assert len(set(rewards[Packed])) > 1
    assert own_forwards == []


def test_masked_out_rows_of_a_packed_pass_fall_back(tmp_path, own_forwards):
    model = build("qwen3")
    model.generation_config.eos_token_id = list(range(2, 12))
    _, (entry,) = compare(tmp_path, Packed, num_iterations=2, mask_truncated_completions=True, model=model)
    assert own_forwards == [round(8 * entry["completions/clipped_ratio"])]
    assert 0 < own_forwards[0] < 8


class PacksInAnotherOrder(Packed):
    def arrange(self, rows):
        ((ids, positions, order),) = super().arrange(rows[::-1])
        return [(ids, positions, order[::-1])]


class RunsRowByRow(Packed):
    def arrange(self, rows):
        return [(row, torch.arange(len(row)), [i]) for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", [PacksInAnotherOrder, RunsRowByRow])
def test_another_pass_falls_back_and_warns(tmp_path, own_forwards, kind):
    with pytest.warns(UserWarning, match=f"log-prob pass of {kind.__name__} .* ENTRA runs another forward for them"):
        compare(tmp_path, kind, num_iterations=2)
    assert own_forwards == [8]


class PacksWithACache(Packed):
    use_cache = True


@pytest.mark.parametrize(
    ("kind", "family", "message"),
    [
        (PacksWithACache, "qwen3", "cu_seqlens begins a sequence .* pass attention_mask=None, use_cache=False"),
        (Packed, "qwen3_next", "carries a state from each into the next"),
        (Packed, "gpt_oss", "does not keep it apart"),
    ],
    ids=["cache", "linear layers", "masks"],
)
def test_a_packed_pass_whose_rows_see_each_other_ends_the_run(tmp_path, kind, family, message):
    trainer = trainer_of(tmp_path, kind, [entra.score_batch], build(family), num_iterations=2)
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


def test_another_temperature_falls_back(tmp_path, own_forwards):
    compare(tmp_path, num_iterations=2, temperature=0.7)
    assert own_forwards == [8]


def test_dropout_falls_back(tmp_path, own_forwards):
    trainer, _ = compare(tmp_path, num_iterations=2, model=build("qwen3", attention_dropout=0.5))
    assert own_forwards == [8]
    assert trainer.model.training


def test_rows_that_are_masked_out_fall_back(tmp_path, own_forwards):
    model = build("qwen3")
    model.generation_config.eos_token_id = list(range(2, 12))  # so that some of 12 tokens end
    _, (entry,) = compare(tmp_path, num_iterations=2, mask_truncated_completions=True, model=model)
    truncated = round(8 * entry["completions/clipped_ratio"])
    assert 0 < truncated < 8
    assert own_forwards == [truncated]


def test_rows_whose_rope_the_longest_row_changes_fall_back(tmp_path, own_forwards):
    """LongRoPE: TRL pads all rows to one length, at which short rows would have the long factors."""
    factors = {"short_factor": [1.0] * 10, "long_factor": [1.0 + 0.5 * i for i in range(10)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12, "factor": 4.0, **factors}
    model = build("llama", rope_parameters=rope, max_position_embeddings=48)
    model.generation_config.eos_token_id = list(range(2, 12))  # so that some of 12 tokens end
    compare(tmp_path, num_iterations=2, model=model)
    assert len(own_forwards) == 1
    assert 0 < own_forwards[0] < 8


def test_rows_of_learned_positions_fall_back_where_they_are_padded_on_the_left(tmp_path, own_forwards):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=1, eos_token_id=2))
    compare(tmp_path, num_iterations=2, model=model, shuffle_dataset=False)  # prompts of 2 and of 4 tokens
    assert own_forwards == [4]


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_reference_pass_of_an_adapter_is_not_taken_for_the_policy(tmp_path, own_forwards, num_iterations):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False, lora_dropout=0.0)
    model = peft.get_peft_model(build("qwen3"), adapter)
    compare(tmp_path, num_iterations=num_iterations, beta=0.1, model=model)
    # With aligned steps the reference pass is the only one, and the adapter is off in it.
    assert own_forwards == ([8] if num_iterations == 1 else [])


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("mask", [[1, 1, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], ids=["inside", "at_the_end"])
def test_tokens_of_tools_are_neither_ranked_nor_counted(tmp_path, own_forwards, num_iterations, mask):
    ids = [10, 11, 50, 50, 50, 12, 13, 2]
    seen = {}

    def rollout(prompts, trainer):
        return {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": [ids] * len(prompts),
            "logprobs": [[0.0] * 8] * len(prompts),
            "env_mask": [mask] * len(prompts),
        }

    def look(prompts, completions, completion_ids, **columns):
        seen["own"] = entra.score_batch(prompts, completions, completion_ids, details=True)
        seen["all"] = entra.score_batch(
            prompts, completions, completion_ids, model=trainer.model, tokenizer=tokenizer(), details=True
        )
        return seen["own"].rewards

    trainer = trainer_of(
        tmp_path,
        entra.EntraGRPOTrainer,
        [entra.EntraReward(), look],
        num_iterations=num_iterations,
        options={"rollout_func": rollout},
    )
    trainer.train()
    assert own_forwards == ([8] if num_iterations == 1 else [])
    places = [i for i in range(7) if mask[i]]  # the EOS is dropped
    for i, own in enumerate(seen["own"].token_ids):
        assert own.tolist() == [ids[place] for place in places]
        for name, tolerance in (("logprobs", LOGPROB_TOLERANCE), ("incoming", INCOMING_TOLERANCE)):
            whole = getattr(seen["all"], name)[i]
            torch.testing.assert_close(getattr(seen["own"], name)[i], whole[places], rtol=0, atol=tolerance)


@pytest.mark.parametrize("scope", ["completion", "sequence"])
def test_what_a_tool_wrote_is_copied_from(scope):
    """50 51 is the tool's. The policy's 51 repeats it; its 52 follows a token of the tool's, and 11 52 was never there."""
    own = [1, 1, 0, 0, 1, 1, 1]
    rollout = entra.rollout.Rollout(
        build("qwen3"), tokenizer(), ["p"] * 2, [[10, 11, 12]] * 2, [[10, 11, 50, 51, 52, 50, 51]] * 2, [own, [0] * 7]
    )
    config = entra.ScoreConfig(copy_ngram=2, ranking_scope=scope)
    copied, none = rollout.copied(config, torch.device("cpu"))
    assert copied.tolist()[-5:] == [False, True, False, False, True]
    assert copied.numel() == len(rollout.rows()[0].ranked(scope)) == {"completion": 5, "sequence": 7}[scope]
    assert none.numel() == 0
    assert rollout.copied(entra.ScoreConfig(), torch.device("cpu")) is None


def test_ngrams_leave_out_what_a_tool_wrote():
    """50 51 is the tool's. Of the policy's 10 11 12 10 11 12 13 the pairs 10 11 and 11 12 come twice."""
    ids, own = [10, 11, 12, 50, 51, 10, 11, 12, 13], [1, 1, 1, 0, 0, 1, 1, 1, 1]
    model = build("qwen3")
    rollout = entra.rollout.Rollout(model, tokenizer(), ["p"], [[9]], [ids], [own])
    config = entra.ScoreConfig(reward_ngram=2, protect_fraction=0.0)
    with entra.policy.bound(entra.policy.Policy(model, tokenizer()), rollout):
        (one,) = entra.score_batch(["p"], None, [ids], config=config, details=True)
    assert one.token_ids.tolist() == [10, 11, 12, 10, 11, 12, 13]
    assert sorted(one.ngram_counts.values()) == [1, 1, 1, 2, 2]
    assert one.reward == pytest.approx(1 - 2 * 2 * math.log(2) / (7 * math.log(7)), abs=1e-6)


def test_a_wrapper_of_score_batch_with_other_prompts_gets_its_own_forward(tmp_path):
    def blind(prompts, completions, completion_ids, **columns):
        return entra.score_batch(["?"] * len(prompts), completions, completion_ids)

    trainer = trainer_of(tmp_path, entra.EntraGRPOTrainer, [blind], num_iterations=2)
    (entry,) = logged(trainer)
    assert 0 < entry["rewards/blind/mean"] <= 1


# Verification by the reference.


def test_verification_logs_small_deviations(tmp_path):
    trainer = trainer_of(
        tmp_path, entra.EntraGRPOTrainer, [entra.score_batch], num_iterations=2, max_steps=4, options={"verify_every": 2}
    )
    entries = logged(trainer)
    verified = [entry for entry in entries if "entra/verify/incoming" in entry]
    assert len(verified) == 1  # two scoring calls
    for name, bound in (("incoming", 1e-5), ("logprobs", 1e-5), ("scored_incoming", 1e-5), ("scored_logprobs", 1e-5)):
        assert 0 <= verified[0][f"entra/verify/{name}"] < bound


def test_a_wrong_kernel_ends_the_run_or_warns(tmp_path, monkeypatch):
    right = entra.capture.incoming_attention
    monkeypatch.setattr(entra.capture, "incoming_attention", lambda *a, **k: 1.001 * right(*a, **k))
    wrong = trainer_of(tmp_path, entra.EntraGRPOTrainer, [entra.score_batch], options={"verify_every": 1})
    with pytest.raises(RuntimeError, match=r"off from the reference: incoming by 0\.001"):
        wrong.train()
    warned = trainer_of(
        tmp_path, entra.EntraGRPOTrainer, [entra.score_batch], options={"verify_every": 1, "verify_on_breach": "warn"}
    )
    with pytest.warns(RuntimeWarning, match="off from the reference: incoming"):
        warned.train()


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("iterations", [1, 2], ids=["own_pass", "riding"])
def test_mixed_precision_is_no_breach(tmp_path, family, iterations):
    """TRL's default: float32 weights, and products in bfloat16; Gemma 2 caps its logits before they become float32 again."""
    options = {"verify_every": 1}
    trainer = trainer_of(
        tmp_path, entra.EntraGRPOTrainer, [entra.score_batch], build(family), options, bf16=True, num_iterations=iterations
    )
    (entry,) = logged(trainer)
    assert 0 <= entry["entra/verify/scored_logprobs"] < 0.05


def test_signals_recorded_at_the_wrong_place_end_the_run(tmp_path, monkeypatch):
    right = entra.rollout.Rollout.record
    monkeypatch.setattr(
        entra.rollout.Rollout, "record", lambda self, c, l, mu, *rest: right(self, c, l, mu.roll(1, dims=1), *rest)
    )
    trainer = trainer_of(tmp_path, entra.EntraGRPOTrainer, [entra.score_batch], num_iterations=2, options={"verify_every": 1})
    with pytest.raises(RuntimeError, match="scored_incoming"):
        trainer.train()


# Bad input, at construction.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_weights": [0.0, 0.0]}, r"reward_weights=\[0.0, 0.0\] are all zero"),
        ({"num_generations": 1}, "at least 2"),
        ({"options": {"verify_every": -1}}, "verify_every=-1 must be at least 0"),
        ({"options": {"verify_on_breach": "shout"}}, "verify_on_breach='shout' must be 'raise' or 'warn'"),
    ],
)
def test_config_that_cannot_work(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [every_second, entra.score_batch], **change)


def test_model_that_cannot_be_captured(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=101, hidden_size=16, num_hidden_layers=1, eos_token_id=2, pad_token_id=0))
    with pytest.raises(ValueError, match="no layer of this model"):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [entra.score_batch], model)


def test_fsdp1_is_refused(tmp_path, monkeypatch):
    """It runs on accelerators alone, so that all there can be is accelerate's word for it."""
    from accelerate.state import AcceleratorState

    plugin = types.SimpleNamespace(fsdp_version=1, activation_checkpointing=False, limit_all_gathers=True)
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match=r"fsdp_version=1, but ENTRA scores under FSDP2 only"):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [entra.score_batch])


def test_tokenizer_without_eos(tmp_path):
    bare = tokenizer()
    bare.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        entra.EntraGRPOTrainer(model=build("qwen3"), reward_funcs=[entra.score_batch], processing_class=bare)


def test_tokenizer_without_eos_beside_a_saved_model(tmp_path):
    bare = tokenizer()
    bare.eos_token = None
    build("qwen3").save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    from datasets import Dataset

    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        entra.EntraGRPOTrainer(
            model=str(tmp_path),
            train_dataset=Dataset.from_list(ROWS),
            reward_funcs=[entra.score_batch],
            args=trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
        )


def test_prompt_tuning(tmp_path):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="the adapter adds virtual tokens"):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [entra.score_batch], options={"peft_config": virtual})


def test_a_pass_over_other_positions_is_not_recorded():
    rollout = entra.rollout.Rollout(build("qwen3"), tokenizer(), ["?"], [[5, 6]], [[7, 8]])
    with pytest.raises(RuntimeError, match="attention of 7 positions for 4 tokens"):
        rollout.record(entra.ScoreConfig(), torch.zeros(1, 2), torch.zeros(1, 7), 2, [True])


def test_a_batch_is_known_again_by_its_values():
    rollout = entra.rollout.Rollout(build("qwen3"), tokenizer(), ["?"], [[5, 6]], [[7, 8]])
    for same in ([7, 8], (7, 8), torch.tensor([7, 8])):
        assert rollout.holds(["?"], [same])
    assert not rollout.holds(["?"], torch.tensor([[7, 9]]))


def test_images_in_a_prompt():
    class Generates:
        def _generate(self, prompts):
            return [[5]], [[6]], []

    class Trainer(entra.trl._LivePolicy, Generates):
        """A trainer without its construction."""

    message = {"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "1+1="}]}
    with pytest.raises(ValueError, match="has images, but ENTRA scores text only"):
        object.__new__(Trainer)._generate([[message]])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("verify_evry", r"EntraGRPOTrainer\(\) got an unknown keyword 'verify_evry'; did you mean 'verify_every'\?$"),
        ("protect_fraction", r"; pass it as entra.EntraReward\(config=entra.ScoreConfig\(protect_fraction=...\)\)$"),
        ("min_length", r"'min_length'; pass it as entra.EntraReward\(min_length=...\)$"),
        ("num_generation", r"did you mean 'num_generations'\? Pass it as args=trl.GRPOConfig\(num_generations=...\)$"),
    ],
)
def test_an_option_that_belongs_elsewhere_is_named_with_its_place(tmp_path, option, message):
    with pytest.raises(TypeError, match=message):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [every_second], options={option: 1})


def test_nothing_to_verify(tmp_path):
    with pytest.raises(ValueError, match="verify_every=3, but there is nothing to verify"):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [every_second], options={"verify_every": 3})


def test_options_that_trl_would_take_for_columns(tmp_path):
    reward = functools.partial(entra.score_batch, config=entra.ScoreConfig(protect_fraction=0.1))
    with pytest.raises(ValueError, match=r"entra.EntraReward\(config=...\)"):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [reward])


def test_beta_0_without_a_gate_warns(tmp_path):
    with pytest.warns(UserWarning, match="beta=0 and a live ENTRA reward without a gate"):
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [entra.EntraReward()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "beta=0 and")
        trainer_of(tmp_path, entra.EntraGRPOTrainer, [entra.EntraReward(gate=every_second)])


def test_a_live_reward_cannot_go_to_another_process():
    context = multiprocessing.get_context("spawn")
    with pytest.raises(RuntimeError, match="scores with the live policy, but it is being sent to another process"):
        context.Process(target=print, args=(entra.EntraReward(),)).start()


def test_an_error_while_riding_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model = build("qwen3")
    trainer = trainer_of(tmp_path, entra.EntraGRPOTrainer, [entra.score_batch], model, num_iterations=2)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]

    def fail(*args, **kwargs):
        assert model.training
        raise MemoryError("no room")

    monkeypatch.setattr(entra.capture, "incoming_attention", fail)
    with pytest.raises(MemoryError):
        trainer.train()
    assert all(a is b for a, b in zip(configs, [m.config for m in model.modules() if hasattr(m, "config")], strict=True))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert math.isfinite(float(model(torch.tensor([[5, 6]])).logits.sum()))
