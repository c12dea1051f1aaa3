"""One rank of the runs that `tests/entra/test_distributed.py` starts: it does the work and writes down what came out.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/entra/distributed_worker.py TASK FOLDER

FOLDER holds the policy (`FOLDER/model`) and takes `TASK.RANK.pt`, what a rank has seen; nothing is judged here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_models import FAMILIES, build
from tiny_tokenizer import build_tokenizer
from torch import nn

import entra
from entra import forward
from entra.policy import bound_rollout, resolve_policy
from entra.rollout import Rollout
from entra.rope import transformers_version
from entra.verify import verify

STEPS = 4
"""Optimisation steps of a whole run."""
KILLED_AT = 3
"""The step that rank 1 does not live to finish; there is a checkpoint after each step before."""

TRAINS_WHAT_IT_SHARDED = (5, 19)
"""The first transformers whose Trainer leaves a model alone that transformers has sharded; before, it wraps it in DDP."""

_CONFIG = entra.ScoreConfig(token_budget=40)
ONE_A_FORWARD = entra.ScoreConfig(token_budget=20)
# Long enough for a rank that must wait for the other's imports, short enough for a test.
_TIMEOUT = timedelta(seconds=120)


def unequal_rows(rank: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of a rank, as ids: 1 long row and 6 short ones (7 forwards), or none to score (no forward)."""
    completions = [[]] * 2
    if rank == 0:
        ids = torch.randint(5, 101, (150,), generator=torch.Generator().manual_seed(1)).tolist()
        completions = [ids, *(ids[i : i + 18] for i in range(6))]
    return [[1, 7, 8, 9]] * len(completions), completions


def score_unequal(model: nn.Module | str, rank: int) -> entra.Scores:
    """Details of a rank's own unequal rows."""
    prompts, completions = unequal_rows(rank)
    return entra.score_batch(prompts, completions, model=model, config=_CONFIG, details=True)


def score_groups(model: nn.Module, rank: int, config: entra.ScoreConfig = ONE_A_FORWARD) -> entra.Scores:
    """Details of a rank's own groups: 6 rows behind one prompt (7 forwards), or 3 behind another and a whole one (5)."""
    ids = torch.randint(5, 101, (100,), generator=torch.Generator().manual_seed(2 + rank)).tolist()
    if rank == 0:
        prompts, completions = [ids[:32]] * 6, [ids[i + 32 : i + 50] for i in range(6)]
    else:
        prompts, completions = [*[ids[:64]] * 3, ids[:3]], [ids[64:74], ids[64:99], ids[70:90], ids[3:33]]
    return entra.score_batch(prompts, completions, model=model, config=config, details=True)


class Recorded(entra.EntraReward):
    """A reward that keeps what it returned, for which rows, and what the policy was then."""

    def __call__(self, prompts, completions, completion_ids=None, **columns):
        rewards = super().__call__(prompts, completions, completion_ids, **columns)
        policy = resolve_policy(None, None)
        scores = entra.score_batch(prompts, completions, completion_ids, config=self.config, details=True)
        self.calls.append(
            {
                "prompts": prompts,
                "completion_ids": completion_ids,
                "rewards": rewards,
                "scores": scores,
                "rode": bound_rollout().is_recorded,
                "weights": _whole_weights(policy.model),
            }
        )
        return rewards

    @property
    def calls(self) -> list[dict[str, Any]]:
        return self.__dict__.setdefault("_calls", [])


def recorded_rewards(rank: int) -> list[Recorded]:
    """Rewards that tell one rank's rows from all rows: the rows of rank 0 are right, so half of each group is."""

    def first_rank_is_right(completions, **columns):
        return [1.0 - rank] * len(completions)

    return [
        Recorded(name="plain", config=_CONFIG),
        Recorded(name="half_right", config=_CONFIG, gate=first_rank_is_right, group_gate=0.5),
        Recorded(name="too_few_right", config=_CONFIG, gate=first_rank_is_right, group_gate=0.6),
        Recorded(name="one_band", config=_CONFIG, dead_band=2.0),
    ]


def train(
    folder: Path,
    model: nn.Module,
    rank: int,
    *,
    riding: bool = False,
    steps: int = STEPS,
    checkpoints: str | None = None,
    resume: bool = False,
    kill: bool = False,
    fsdp: dict[str, Any] | None = None,
    deepspeed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a training saw; each scoring call looks at one prompt's completions, half of them on each rank.

    Riding: one generation serves two optimisation steps, so that TRL needs the old log-probs and makes a pass for them.
    `checkpoints` is the folder to save them in, after each step; `fsdp` the configuration for accelerate's sharding,
    `deepspeed` that of DeepSpeed.
    """
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == KILLED_AT - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    args = trl.GRPOConfig(
        output_dir=str(folder / (checkpoints or "nowhere")),
        save_strategy="steps" if checkpoints else "no",
        save_steps=1,
        per_device_train_batch_size=2,
        num_generations=8 if riding else 4,
        steps_per_generation=2 if riding else 1,
        max_completion_length=24,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=deepspeed is None,
        bf16=False,
        ddp_backend="gloo",
        deepspeed=deepspeed,
        fsdp=fsdp is not None,
        fsdp_config=fsdp,
        disable_tqdm=True,
    )
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    rewards = recorded_rewards(rank)
    trainer = entra.EntraGRPOTrainer(
        model=model,
        reward_funcs=[*rewards, entra.score_batch],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": f"{10**i}+{i}="} for i in range(8)]),
        processing_class=tokenizer,
        callbacks=[Killer()] if kill else [],
        verify_every=1,
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "calls": {reward.__name__: reward.calls for reward in rewards},
        "log": [entry for entry in trainer.state.log_history if "reward" in entry],
        "global_step": trainer.state.global_step,
        "weights": _whole_weights(trainer.model),
        "wrapped_by": type(trainer.model_wrapped).__name__,
    }


def failure(model: nn.Module, rank: int) -> dict[str, Any]:
    """What an exception in the middle of a forward leaves behind; the model is in training mode, one module aside."""
    model.train()
    inner = forward.unwrapped(model)
    inner.get_output_embeddings().eval()
    before = _state(inner)
    with mock.patch.object(forward, "linear_token_logprobs", side_effect=ArithmeticError("injected")):
        try:
            forward.token_signals(model, [[1, 7, 8, 9]], [2], _CONFIG)
            raised = False
        except ArithmeticError:
            raised = True
    return {"raised": raised, "before": before, "after": _state(inner)}


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (
            name,
            module.training,
            id(getattr(module, "config", None)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
        )
        for name, module in model.named_modules()
    ]


def _whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every rank must ask: parts of a weight come from the others."""
    weights = dict(forward.unwrapped(model).named_parameters())
    with _gathered(list(weights.values())):
        return {
            name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()
            for name, weight in weights.items()
        }


def _gathered(weights: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Inside, weights that ZeRO-3 holds in parts are whole."""
    if not hasattr(weights[0], "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights)


HEADS_OVER_RANKS = ("qwen3", "gemma2")
"""Families whose plan gives each rank some of the heads, here 2 of 4 with 1 of 2 kv heads."""
HEADS_ON_EVERY_RANK = ("phi3", "deepseek_v3")
"""Those whose plan leaves all heads on each rank: q, k and v in one product, or latents (MLA)."""
TENSOR_PARALLEL = tuple(f for f in (*HEADS_OVER_RANKS, *HEADS_ON_EVERY_RANK) if f in FAMILIES)


def build_divisible(family: str) -> nn.Module:
    """A tiny model with an even vocabulary: some versions of transformers refuse to halve an odd one."""
    return build(family, vocab_size=102)


def score_all_rows(model: nn.Module, head_reduction: str) -> entra.Scores:
    """Details of two rows that every rank of a tensor-parallel model scores, in two forwards."""
    prompts, completions = (rows[:2] for rows in unequal_rows(0))
    config = entra.ScoreConfig(token_budget=40, head_reduction=head_reduction)
    return entra.score_batch(prompts, completions, model=model, config=config, details=True)


def by_head(model: nn.Module) -> dict[str, Any]:
    """Incoming attention of the last layer, each head by itself."""
    found = {}
    for heads in ("query", "kv"):
        with torch.no_grad(), entra.capture_attention(model, layers=-1, heads=heads) as captured:
            model(torch.tensor([[1, 7, 8, 9]]), use_cache=False)
        (layer,) = captured.values()
        found[heads] = layer.incoming
    return found


def tensor_parallel(folder: Path, family: str, rank: int) -> dict[str, Any]:
    """A model in parts, scored: scores of both head reductions, how many query heads this rank has, what `verify` says."""
    from transformers import AutoModelForCausalLM

    whole = build_divisible(family)
    if rank == 0:
        whole.save_pretrained(folder / family)
    dist.barrier()
    how = whole.config._attn_implementation  # which is not saved
    model = AutoModelForCausalLM.from_pretrained(folder / family, tp_plan="auto", attn_implementation=how)
    seen: dict[str, Any] = {reduction: score_all_rows(model, reduction) for reduction in ("mean", "max")}
    with entra.capture_incoming_attention(model) as captured:
        captured.inspect = lambda q, *_: seen.update(heads=q.shape[1])
        model(torch.tensor([[1, 7, 8, 9]]), use_cache=False)
    seen["by head"] = by_head(model)
    prompts, completions = unequal_rows(0)
    rollout = Rollout(model, None, prompts, prompts, completions)
    seen["verified"] = verify(rollout, 0, entra.ScoreConfig()).breach()
    return seen


def ddp(folder: Path, rank: int) -> None:
    """Scoring tensor-parallel models, scoring and riding under DDP, then a run that does not live to its end."""
    wrapped = nn.parallel.DistributedDataParallel(build("qwen3"))
    seen = {"unequal": score_unequal(wrapped, rank), "failure": failure(wrapped, rank)}
    seen["tensor_parallel"] = {family: tensor_parallel(folder, family, rank) for family in TENSOR_PARALLEL}
    seen["riding"] = train(folder, build("qwen3"), rank, riding=True, steps=2)
    torch.save(seen, folder / f"ddp.{rank}.pt")
    train(folder, build("qwen3"), rank, checkpoints="killed", kill=True)


def resume(folder: Path, rank: int) -> None:
    """The killed run again, from its last checkpoint; and one that nothing interrupts."""
    resumed = train(folder, build("qwen3"), rank, checkpoints="killed", resume=True)
    torch.save({"resumed": resumed, "whole": train(folder, build("qwen3"), rank)}, folder / f"resume.{rank}.pt")


def fsdp2(folder: Path, rank: int) -> None:
    """Both ways to FSDP2: a policy that transformers shards as it loads it, and one that accelerate shards."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(fsdp_size=2))

    model = load()
    seen: dict[str, Any] = {"head": type(model.lm_head.weight).__name__, "unequal": score_unequal(model, rank)}
    seen["groups"] = score_groups(model, rank)
    if transformers_version() >= TRAINS_WHAT_IT_SHARDED:
        seen["riding"] = train(folder, load(), rank, riding=True, steps=2)
    with _accelerate_shards_on_a_cpu():
        fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}
        seen["own_pass"] = train(folder, build("qwen3"), rank, steps=2, fsdp=fsdp)
    seen["failure"] = failure(load(), rank)
    seen["disagreement"] = _disagreement(folder, model, rank)
    torch.save(seen, folder / f"fsdp2.{rank}.pt")


@contextmanager
def _accelerate_shards_on_a_cpu() -> Iterator[None]:
    """Accelerate looks at FSDP only where it has found an accelerator, but nothing that it then does needs one."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


def _disagreement(folder: Path, model: nn.Module, rank: int) -> str:
    """What becomes of unequal rows when ranks do not agree on the number of forwards: "done", or "stuck" 2 s after the other
    rank was done. A stuck rank cannot go on, so this is the last thing that a run does."""
    with mock.patch.object(forward, "_most_forwards", lambda ours: ours):
        scoring = threading.Thread(target=score_unequal, args=(model, rank), daemon=True)
        scoring.start()
        if rank == 1:
            scoring.join()
            (folder / "scored").touch()
            _wait_for(folder / "judged")  # a rank that is gone would be an error to the one that waits for it
            return "done"
        _wait_for(folder / "scored")
        scoring.join(timeout=2)
        result = "stuck" if scoring.is_alive() else "done"
    (folder / "judged").touch()
    return result


def _wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.1)


_ZERO3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    # A weight below the threshold, 100,000 numbers by default, stays whole on every rank; here that would be all of them.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def zero3(folder: Path, rank: int) -> None:
    """Scoring and training under DeepSpeed's ZeRO-3, every weight in parts."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # Reductions through shared memory, which DeepSpeed would compile here and now; killed while it does, it leaves a lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=_TIMEOUT)
    engine, *_ = deepspeed.initialize(model=build("qwen3"), config=_ZERO3)
    parts = {name: (weight.ds_tensor.numel(), weight.ds_numel) for name, weight in engine.module.named_parameters()}
    seen: dict[str, Any] = {"parts": parts, "unequal": score_unequal(engine, rank), "groups": score_groups(engine, rank)}
    with _accelerate_lets_deepspeed_run_on_a_cpu():
        seen["riding"] = train(folder, build("qwen3"), rank, riding=True, steps=2, deepspeed=_ZERO3)
        seen["own_pass"] = train(folder, build("qwen3"), rank, steps=3, deepspeed=_ZERO3)
    training = HfDeepSpeedConfig(_ZERO3)  # what a trainer's arguments hold: transformers then parts what it loads
    seen["frozen"] = score_unequal(str(folder / "model"), rank)
    seen["parts_of_the_next"] = hasattr(AutoModelForCausalLM.from_pretrained(folder / "model").lm_head.weight, "ds_id")
    del training
    torch.save(seen, folder / f"zero3.{rank}.pt")


def _accelerate_lets_deepspeed_run_on_a_cpu() -> AbstractContextManager[Any]:
    """Accelerate knows no backend of several processes but those of accelerators, unless it leaves DeepSpeed out."""
    from accelerate.state import DistributedType, PartialState

    return mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.NO))


def main(task: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    {"ddp": ddp, "resume": resume, "fsdp2": fsdp2, "zero3": zero3}[task](Path(folder), dist.get_rank())
    sys.stdout.flush()
    os._exit(0)  # a stuck thread, or a group whose other end is gone, must not keep a finished rank


if __name__ == "__main__":
    main(*sys.argv[1:])
