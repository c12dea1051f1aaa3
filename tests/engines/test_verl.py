"""ENTRA in verl: its own engine, trainer and reward loop, on a CPU; `make test-verl` makes the environment.

`verl_cpu` holds what verl lacks on a CPU. All else is verl's: models come up under FSDP2, verl makes the micro-batches, workers
are Ray actors, and the trainer is started as a user starts it.
"""

import asyncio
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra

HERE = Path(__file__).parent
ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
    "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE))),
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # as nice as the tests, not by 15 more
}
os.environ.update(ENVIRONMENT)  # Ray's workers have it, too

pytest.importorskip("verl", reason="needs verl: make test-verl")

import ray  # noqa: E402
import transfer_queue  # noqa: E402
import verl  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import open_dict  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl.experimental.agent_loop import AgentLoopWorker  # noqa: E402
from verl.experimental.reward_loop import RewardLoopManager  # noqa: E402
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls  # noqa: E402
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase  # noqa: E402
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager  # noqa: E402
from verl.protocol import DataProto  # noqa: E402
from verl.trainer.ppo.v1 import trainer_base, trainer_sync  # noqa: E402
from verl.utils import import_utils  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.dataset.rl_dataset import RLHFDataset  # noqa: E402
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig  # noqa: E402
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp import transformer_impl  # noqa: E402
from verl.workers.engine.utils import postprocess_batch_func  # noqa: E402

from entra.integrations import verl as plugin  # noqa: E402
from entra.integrations import verl_scorer  # noqa: E402

# As in tests/entra/test_trl.py: two forwards of one sequence under different padding, float32.
LOGPROB_TOLERANCE, INCOMING_TOLERANCE = 2e-5, 2e-6
FAMILY = "llama"  # for which verl asks nothing of the tokenizer
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
EOS = 2
ASKED = {"statistic": "mean", "head_reduction": "mean", "backend": "auto"}
PROMPTS = [[{"role": "user", "content": f"{10**i}+{i}="}] for i in range(4)]


def score_of(text):
    """1 for texts with an odd number of digits."""
    return float(sum(map(str.isdigit, text)) % 2)


SCORE = "def compute_score(data_source, solution_str, ground_truth, extra_info, **_):\n    return score_of(solution_str)\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, data of four prompts, and a score for verl."""
    import pandas

    path = tmp_path_factory.mktemp("verl")
    build(FAMILY).save_pretrained(path / "model")
    build_tokenizer().save_pretrained(path / "model")
    (path / "score.py").write_text(f"{inspect.getsource(score_of)}\n\n{SCORE}")
    columns = {"data_source": "tiny", "reward_model": {"ground_truth": ""}}
    rows = [{"prompt": prompt, "extra_info": {"index": i}, **columns} for i, prompt in enumerate(PROMPTS)]
    pandas.DataFrame(rows).to_parquet(path / "data.parquet")
    return path


@pytest.fixture(scope="module")
def model():
    return build(FAMILY)


def ragged(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.fixture(scope="module")
def rows():
    """Prompts and responses as ids; three responses end in EOS, one of them in two."""
    draw = torch.Generator().manual_seed(3)

    def ids(count):
        return torch.randint(5, 101, (count,), generator=draw)

    ends = ([EOS], [], [EOS, EOS], [EOS])
    responses = [torch.cat([ids(n), torch.tensor(end, dtype=torch.long)]) for n, end in zip((11, 5, 17, 8), ends, strict=True)]
    return [ids(n) for n in (4, 9, 6, 3)], responses


class TestPlugin:
    """Both are installed, and verl is imported: names are added, and nothing else changes."""

    def test_verl_finds_it_by_itself(self):
        assert [point.value for point in entry_points(group="verl.plugins")] == ["entra.integrations.verl"]
        code = "import sys, verl; print('entra.integrations.verl' in sys.modules, 'verl.workers.engine' in sys.modules)"
        assert python(code) == "True False"

    def test_names_are_added_and_those_of_verl_stay(self):
        engines = EngineRegistry._engines
        assert engines["language_model"]["fsdp2"]["cuda"] is transformer_impl.FSDPEngineWithLMHead
        assert trainer_base.TRAINER_REGISTRY["sync"] is trainer_sync.PPOTrainerSync
        assert issubclass(engines["entra"]["fsdp"]["cuda"], transformer_impl.FSDPEngineWithLMHead)
        assert set(engines["entra"]) == {"fsdp", "fsdp2"}
        assert issubclass(trainer_base.get_trainer_cls("entra_sync"), trainer_sync.PPOTrainerSync)


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1]


class TestWhatIsReliedOn:
    """Every symbol of verl's and every signature, so that an upgrade that changes one fails here and says which."""

    def test_version(self):
        assert verl.__version__ == "0.9.1"

    def test_engine(self):
        engine = transformer_impl.FSDPEngineWithLMHead
        assert parameters(engine.__init__) == ["self", "model_config", "engine_config", "optimizer_config", "checkpoint_config"]
        assert parameters(engine.forward_step) == ["self", "micro_batch", "loss_function", "forward_only"]
        assert parameters(engine._get_packed_pad_size) == ["self", "packed_length"]
        assert parameters(EngineRegistry.register) == ["model_type", "backend", "device", "vendor"]
        assert parameters(tu.get_non_tensor_data)[:3] == ["data", "key", "default"]
        assert "ulysses_sequence_parallel_size" in FSDPEngineConfig.__dataclass_fields__
        # The model is built by the type's name, which the config lets us write.
        assert 'self.model_config.model_type == "language_model"' in source(engine._build_module)
        assert "model_type" in HFModelConfig._mutable_fields
        assert {"hf_config", "generation_config", "tokenizer"} <= set(HFModelConfig.__dataclass_fields__)

    def test_how_a_batch_reaches_the_model(self):
        text = source(transformer_impl.FSDPEngineWithLMHead.prepare_model_inputs)
        # Packed: rows in order, pads last, positions that start again. Padded: on the right.
        assert "input_ids_rmpad = input_ids.values().unsqueeze(0)" in text
        assert "static_pad_size = self._get_packed_pad_size(input_ids_rmpad.size(-1))" in text
        assert "torch.nested.to_padded_tensor(" in text
        assert 'key="use_remove_padding", default=True' in text
        assert "position_ids.dim() == 3" in text  # with pictures
        # Log-probs are those of the next token; every key of a model's output comes back.
        assert "torch.roll(input_ids_rmpad, shifts=-1, dims=1)" in text
        assert 'for key, val in o["model_output"].items()' in source(postprocess_batch_func)
        assert '"model_output": detach_tree(model_output)' in source(transformer_impl.FSDPEngineWithLMHead.forward_step)

    def test_trainer(self):
        trainer = trainer_sync.PPOTrainerSync
        assert parameters(trainer.__init__) == ["self", "config"]
        assert parameters(trainer._compute_old_log_prob) == ["self", "batch", "metrics"]
        assert parameters(trainer_base.register_trainer) == ["name"]
        assert parameters(transfer_queue.kv_batch_get)[:3] == ["keys", "partition_id", "select_fields"]
        assert {"keys", "partition_id", "fields"} <= set(parameters(transfer_queue.kv_batch_put))
        assert {"keys", "tags", "partition_id", "extra_info"} <= set(transfer_queue.KVBatchMeta.__dataclass_fields__)

    def test_order_of_events(self):
        # Rewards first, then old log-probs, then advantages out of rm_scores.
        text = source(trainer_base.PPOTrainer._step_once)
        names = ("_compute_reward_colocate", "_compute_old_log_prob", "_compute_ref_log_prob", "_compute_advantage")
        places = [text.index(f"self.{name}(") for name in names]
        assert places == sorted(places)
        advantage = source(trainer_base.PPOTrainer._compute_advantage)
        assert 'data.batch["token_level_scores"] = data.batch["rm_scores"]' in advantage
        old = source(trainer_base.PPOTrainer._compute_old_log_prob)
        assert "batch.extra_info.update(" in old  # keeps what is in there
        assert 'rollout_corr_config.get("bypass_mode", False)' in old
        assert 'tag.get("is_padding", False)' in source(trainer_base.PPOTrainer.step)
        assert 'self.trainer_mode == "sync"' in source(trainer_base.PPOTrainer._build_replay_buffer)

    def test_reward_loop(self):
        assert parameters(RewardManagerBase.__init__) == ["self", "config", "tokenizer", "compute_score"]
        assert parameters(RewardManagerBase.run_single) == ["self", "data"]
        assert {"config", "tokenizer", "compute_score"} <= set(parameters(NaiveRewardManager.__init__))
        text = source(NaiveRewardManager.run_single)
        assert 'return {"reward_score": reward, "reward_extra_info": reward_extra_info}' in text
        assert parameters(get_reward_manager_cls) == ["name"]
        assert import_utils.PKG_PATH_PREFIX == "pkg://"
        # The rows of a trajectory come padded, with their lengths and the messages.
        text = source(AgentLoopWorker._compute_score)
        for name in ("prompt_len", "response_len"):
            assert f'"{name}": np.array(' in text
        assert '"raw_prompt"' in source(RLHFDataset.__getitem__)


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(function):
    return inspect.getsource(inspect.unwrap(function))


@pytest.fixture(scope="module")
def one_rank():
    """A process group of this process alone, which verl's engines want."""
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29577", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def engine_of(folder, **options):
    return EngineRegistry.new(
        "entra",
        "fsdp2",
        model_config=HFModelConfig(path=str(folder / "model"), override_config={"attn_implementation": "sdpa"}),
        engine_config=FSDPEngineConfig(strategy="fsdp2", mixed_precision=FP32, use_torch_compile=False, **options),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=None,
    )


@pytest.fixture(scope="module")
def engine(folder, one_rank):
    engine = engine_of(folder)
    engine.initialize()
    return engine


def batch_of(rows, **told):
    """What verl's trainer hands its workers for the old log-probs: two micro-batches."""
    prompts, responses = rows
    whole = [torch.cat(row) for row in zip(prompts, responses, strict=True)]
    ones = ragged([torch.ones(len(row)) for row in responses])
    tensors = {
        "input_ids": ragged(whole),
        "position_ids": ragged([torch.arange(len(row)) for row in whole]),
        "prompts": ragged(prompts),
        "responses": ragged(responses),
        "response_mask": ones,
        "loss_mask": ones,
    }
    told = {"temperature": 1.0, "use_dynamic_bsz": True, "max_token_len_per_gpu": 50, "calculate_entropy": True, **told}
    return tu.get_tensordict(tensors, non_tensor_dict=told)


def infer(engine, rows, **told):
    with engine.eval_mode():
        return engine.infer_batch(batch_of(rows, **told))["model_output"]


class TestEngine:
    @pytest.mark.parametrize(("packed", "pads"), [(True, 0), (True, 16), (False, 0)], ids=["packed", "to_length", "padded"])
    @pytest.mark.parametrize("statistic", ["mean", "lift"])
    def test_incoming_attention_and_log_probs_are_those_of_score_batch(
        self, engine, model, rows, packed, pads, statistic, monkeypatch
    ):
        monkeypatch.setattr(engine, "pad_to_length", bool(pads))
        monkeypatch.setattr(engine, "pad_to_length_bucket", pads)
        prompts, responses = rows
        config = entra.ScoreConfig(attention_statistic=statistic)
        expected = entra.score_batch(
            [row.tolist() for row in prompts], [row.tolist() for row in responses], model=model, config=config, details=True
        )
        output = infer(engine, rows, use_remove_padding=packed, entra_capture={**ASKED, "statistic": statistic})
        for r, (p, scores) in enumerate(zip(map(len, prompts), expected, strict=True)):
            n = len(scores.token_ids)
            assert n == sum(responses[r] != EOS)
            incoming, logprobs = output["entra_incoming"][r], output["log_probs"][r]
            assert len(incoming) == len(logprobs) == p + len(responses[r])
            torch.testing.assert_close(incoming[p : p + n], scores.incoming, rtol=0, atol=INCOMING_TOLERANCE)
            torch.testing.assert_close(logprobs[p - 1 : p - 1 + n], scores.logprobs, rtol=0, atol=LOGPROB_TOLERANCE)
            assert incoming[p + n :].tolist() == [0.0] * (len(incoming) - p - n)  # trailing EOS

    @pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
    def test_a_pass_that_does_not_ask_is_verls(self, engine, rows, packed):
        asked = infer(engine, rows, use_remove_padding=packed, entra_capture=ASKED)
        plain = infer(engine, rows, use_remove_padding=packed)
        assert set(asked) - set(plain) == {"entra_incoming"}
        assert torch.equal(asked["log_probs"].values(), plain["log_probs"].values())

    def test_training_captures_nothing(self, engine, rows, monkeypatch):
        monkeypatch.setattr(plugin, "capture_incoming_attention", None)  # a call would fail

        def loss(model_output, data, dp_group):
            return -model_output["log_probs"].values().mean(), {}

        with engine.train_mode():
            output = engine.forward_backward_batch(batch_of(rows, entra_capture=ASKED), loss)
        assert len(output["loss"]) == 2

    def test_sequence_parallelism_is_refused_by_name(self, folder, one_rank):
        with pytest.raises(ValueError, match="ulysses_sequence_parallel_size=2 cuts sequences"):
            engine_of(folder, ulysses_sequence_parallel_size=2)

    def test_pictures_are_refused(self, engine, rows):
        batch = batch_of(rows, entra_capture=ASKED)
        batch["position_ids"] = ragged([torch.arange(len(row)).expand(4, -1) for row in batch["input_ids"].unbind()])
        with engine.eval_mode(), pytest.raises(ValueError, match="ENTRA scores text only"):
            engine.forward_step(batch, None, True)


ENGINE = ("trainer.v1.trainer_mode=entra_sync", "+actor_rollout_ref.model.model_type=entra")


def settings(folder, *more):
    """verl's own configuration for the tiny model, as words of a command line."""
    fsdp = "actor_rollout_ref.actor.fsdp_config"
    return [
        f"data.train_files={folder}/data.parquet",
        f"data.val_files={folder}/data.parquet",
        "data.train_batch_size=2",
        "data.shuffle=False",
        "data.max_prompt_length=32",
        "data.max_response_length=24",
        "data.dataloader_num_workers=0",
        f"actor_rollout_ref.model.path={folder}/model",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.actor.strategy=fsdp2",
        f"{fsdp}.use_torch_compile=False",
        f"+{fsdp}.mixed_precision={{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=256",
        "actor_rollout_ref.rollout.name=tiny",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.calculate_log_probs=False",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={folder}/score.py",
        "algorithm.adv_estimator=grpo",
        "trainer.device=cpu",
        "trainer.nnodes=1",
        "trainer.logger=[file]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "ray_kwargs.ray_init.num_cpus=32",
        "+ray_kwargs.ray_init.num_gpus=2",
        "+ray_kwargs.ray_init.include_dashboard=False",
        *more,
    ]


def composed(folder, *more):
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        return compose("ppo_trainer", settings(folder, *more))


def trained(folder, name, *more, **environment):
    """What verl's own trainer logs, one dict a step."""
    log = folder / f"{name}.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *settings(folder, *more)],
        env={**os.environ, "VERL_FILE_LOGGER_PATH": str(log), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line)["data"] for line in log.read_text().splitlines()]


class TestTrainer:
    @pytest.mark.parametrize(
        ("key", "match"),
        [
            ("actor_rollout_ref.rollout.temperature=0.7", "temperature=0.7, but .* needs 1:"),
            ("actor_rollout_ref.model.model_type=language_model", "model_type=language_model, but .* needs entra"),
            ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode=True, but .* needs False"),
            ("+entra.config.ranking_scope=sequence", "signals of completions only"),
            ("+entra.guards.group_gat=0.5", "did you mean 'group_gate'"),
            ("+entra.wait=1", "known are|did you mean"),
            ("+entra.weight=-1", "entra.weight=-1 must be at least 0"),
        ],
    )
    def test_what_does_not_go_with_it_is_refused_before_anything_starts(self, folder, key, match):
        config = composed(folder, *ENGINE, key)
        with pytest.raises((ValueError, TypeError), match=match):
            trainer_base.get_trainer_cls("entra_sync")(config)

    @pytest.mark.timeout(1500)
    def test_two_steps_on_two_workers(self, folder, model):
        """FSDP2 over two Ray workers, rows packed. What the trainer made of the first batch, the policy gives by itself."""
        guards = {"group_gate": 0.3, "dead_band": 0.02, "min_length": 3}
        log = trained(
            folder,
            "entra",
            *ENGINE,
            *(f"+entra.guards.{name}={value}" for name, value in guards.items()),
            "+entra.weight=0.5",
            "+entra.config.attention_statistic=lift",
            "trainer.n_gpus_per_node=2",
            "trainer.total_training_steps=2",
            f"trainer.rollout_data_dir={folder}/rollouts",
        )
        assert len(log) == 2
        for step in log:
            assert 0 < step["entra/score"] <= 1
            assert {"entra/group_std", "entra/stopped/gate", "entra/stopped/group_gate"} <= set(step)
            assert math.isfinite(step["actor/grad_norm"])
        tokenizer = build_tokenizer()
        rollouts = [json.loads(line) for line in (folder / "rollouts/1.jsonl").read_text().splitlines()]
        assert sorted(Counter(one["uid"].rsplit("_", 2)[0] for one in rollouts).values()) == [4, 4]
        prompts = {
            tokenizer.decode(ids, skip_special_tokens=True): ids
            for prompt in PROMPTS
            if (ids := tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        }
        scores = [score_of(one["output"]) for one in rollouts]
        reward = entra.EntraReward(
            model=model,
            config=entra.ScoreConfig(attention_statistic="lift"),
            gate=lambda **columns: scores,
            **guards,
        )
        completions = [tokenizer(one["output"], add_special_tokens=False)["input_ids"] for one in rollouts]
        given = [prompts[one["input"]] for one in rollouts]
        rewards = reward(prompts=given, completions=completions, completion_ids=completions)
        assert any(rewards)
        for one, score, r in zip(rollouts, scores, rewards, strict=True):
            assert one["score"] == pytest.approx(score + 0.5 * r, abs=1e-5)

    @pytest.mark.timeout(1500)
    def test_who_does_not_ask_for_it_gets_verls_own_run(self, folder):
        """verl's own model type and trainer, with the plugin installed and with plugins off: the same numbers."""
        runs = [
            trained(
                folder,
                policy,
                "trainer.n_gpus_per_node=1",
                "trainer.total_training_steps=1",
                VERL_ENGINE_DEVICE="cuda",  # verl registers its own engine for no CPU
                VERL_USE_EXTERNAL_PLUGINS=policy,
            )
            for policy in ("auto", "none")
        ]
        with_plugin, without = ({key: value for key, value in steps[0].items() if not measured(key)} for steps in runs)
        assert with_plugin.keys() == without.keys()
        assert not [key for key in with_plugin if "entra/" in key]
        assert "actor/grad_norm" in with_plugin
        for key, value in with_plugin.items():
            assert value == pytest.approx(without[key], rel=1e-4, abs=1e-6), key


def measured(key):
    """Whether a number is about this machine."""
    return key.startswith(("perf/", "timing", "actor/perf", "actor/mfu")) or "/perf/" in key


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=8, include_dashboard=False)
    yield
    ray.shutdown()


SCORER = {"model": None, "actors": 2, "num_gpus": 0, "num_cpus": 1, "rows": 2}


def options_of(folder, **more):
    return plugin.Options(scorer={**SCORER, "model": str(folder / "model")}, **more)


class TestScorer:
    @pytest.mark.parametrize("guard", ["group_gate", "dead_band"])
    def test_guards_that_need_groups_are_refused(self, folder, guard):
        config = composed(folder, f"+entra.guards.{guard}=0.5", f"+entra.scorer.model={folder}/model")
        with pytest.raises(ValueError, match=f"entra.guards.{guard}=0.5 needs all completions of a prompt"):
            verl_scorer.EntraRewardManager(config, build_tokenizer(), None)

    def test_no_model_is_an_error(self, folder):
        with pytest.raises(ValueError, match=r"entra\.scorer\.model is not there"):
            verl_scorer.EntraRewardManager(composed(folder), build_tokenizer(), None)

    def test_what_comes_at_once_is_one_batch_and_a_bad_row_is_an_error_in_its_place(self, folder, model, rows):
        prompts, responses = ([row.tolist() for row in part] for part in rows)
        pool = verl_scorer.Pool(**{**SCORER, "model": str(folder / "model"), "rows": 64})
        scorer = verl_scorer.Scorer(options_of(folder), pool)
        asked = [verl_scorer._Row(p, r, 1.0) for p, r in zip(prompts, responses, strict=True)]
        asked.insert(2, verl_scorer._Row(prompts[0], [9999], 1.0))  # no such token

        async def ask():
            return await asyncio.gather(*(scorer.score(row) for row in asked), return_exceptions=True)

        answers = asyncio.run(ask())
        bad = answers.pop(2)
        assert isinstance(bad, ValueError)
        assert "9999" in str(bad)
        assert answers == pytest.approx(entra.score_batch(prompts, responses, model=model), abs=1e-6)
        assert scorer.batches == [5]

    def test_a_scorer_of_another_vocabulary_reads_messages_and_text(self, folder, model, monkeypatch):
        monkeypatch.setattr(verl_scorer, "actors", lambda options, pool: [])
        config = composed(folder, f"+entra.scorer.model={folder}/model")
        manager = verl_scorer.EntraRewardManager(config, build_tokenizer(), None)
        data, prompts, responses, texts = trajectories(3)
        assert [manager._row(data[i], 1.0) for i in range(3)] == [
            verl_scorer._Row(p, r, 1.0) for p, r in zip(prompts, responses, strict=True)
        ]
        # As verl's agent loop pads them: all on the right.
        lengths = {"prompt_len": len(prompts[0]), "response_len": len(responses[0])}
        item = types.SimpleNamespace(
            batch={"prompts": torch.tensor([*prompts[0], 0, 0]), "responses": torch.tensor([*responses[0], 0])},
            non_tensor_batch=lengths,
        )
        assert manager._row(item, 0.5) == verl_scorer._Row(prompts[0], responses[0], 0.5)
        manager._ids = False
        asked = [manager._row(data[i], 1.0) for i in range(3)]
        assert asked == [verl_scorer._Row(PROMPTS[i], texts[i], 1.0) for i in range(3)]
        scorer = verl_scorer.Scorer(options_of(folder), verl_scorer.Pool(**{**SCORER, "model": str(folder / "model")}))
        expected = entra.score_batch(PROMPTS[:3], texts, model=model, tokenizer=build_tokenizer())
        assert list(scorer._rewards(asked)) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.timeout(1500)
    def test_a_pool_of_actors_one_of_which_dies(self, folder, model, cluster):
        """verl's reward loop: two reward workers, two scorers. One scorer is killed while requests are under way."""
        config = composed(
            folder,
            "reward.reward_manager.source=importlib",
            "reward.reward_manager.name=EntraRewardManager",
            "reward.reward_manager.module.path=pkg://entra.integrations.verl_scorer",
            f"+entra.scorer.model={folder}/model",
            "+entra.scorer.actors=2",
            "+entra.scorer.num_gpus=0",
            "+entra.scorer.rows=2",
            "+entra.weight=2",
        )
        with open_dict(config):
            config.reward.num_workers = 2
        data, prompts, responses, texts = trajectories(40)
        loop = RewardLoopManager(config)
        ray.get([worker.__ray_ready__.remote() for worker in loop.reward_loop_workers])  # they have started the scorers
        scorers = [ray.get_actor(f"entra_scorer_{i}") for i in range(2)]
        first = ray.get([scorer.__ray_call__.remote(lambda self: os.getpid()) for scorer in scorers])

        def kill():
            while not ray.get(scorers[0].__ray_call__.remote(lambda self: len(self.batches))):
                time.sleep(0.01)
            os.kill(first[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        output = loop.compute_rm_score(data)
        killer.join()
        scores = [score_of(text) for text in texts]
        expected = entra.score_batch(prompts, responses, model=model)
        total = output.batch["rm_scores"].sum(dim=1).tolist()
        for got, score, r in zip(total, scores, expected, strict=True):
            assert got == pytest.approx(score + 2 * score * r, abs=1e-5)
        assert output.non_tensor_batch["acc"].tolist() == scores
        now = ray.get([scorer.__ray_call__.remote(lambda self: os.getpid()) for scorer in scorers])
        assert now[0] != first[0]
        assert now[1] == first[1]


def trajectories(count):
    """What verl's agent loop hands the reward loop: a batch of one prompt with `count` responses of different lengths."""
    import numpy

    tokenizer = build_tokenizer()
    draw = torch.Generator().manual_seed(5)
    prompts = [
        tokenizer.apply_chat_template(PROMPTS[i % 4], add_generation_prompt=True, return_dict=False) for i in range(count)
    ]
    responses = [torch.randint(5, 101, (3 + i % 17,), generator=draw).tolist() for i in range(count)]
    left = max(map(len, prompts))
    width = max(map(len, responses))
    batch = {
        "prompts": torch.tensor([[0] * (left - len(p)) + p for p in prompts]),
        "responses": torch.tensor([r + [0] * (width - len(r)) for r in responses]),
        "attention_mask": torch.tensor(
            [
                [0] * (left - len(p)) + [1] * (len(p) + len(r)) + [0] * (width - len(r))
                for p, r in zip(prompts, responses, strict=True)
            ]
        ),
    }
    columns = {
        "data_source": ["tiny"] * count,
        "reward_model": [{"ground_truth": ""}] * count,
        "extra_info": [{} for _ in range(count)],
        "raw_prompt": [PROMPTS[i % 4] for i in range(count)],
    }
    held = {}
    for name, values in columns.items():
        held[name] = numpy.empty(count, dtype=object)
        held[name][:] = values
    texts = [tokenizer.decode(r, skip_special_tokens=True) for r in responses]
    return DataProto(TensorDict(batch, batch_size=count), held), prompts, responses, texts
