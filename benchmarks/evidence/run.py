"""One GRPO run from the SFT checkpoint: train, evaluate on held-out problems, hand back one dict for a JSON file.

Every arm has the same problems, steps, learning rate, batch and weight of accuracy. Advantages are scaled by the group's
standard deviation (TRL's default), no KL term, one optimiser step per batch of rollouts.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import DEAD_BAND, GROUP_GATE, HALVE_AT, WEIGHT, rewards_of
from benchmarks.evidence.evaluate import MAX_NEW_TOKENS, graded, mean_logprobs, sample
from benchmarks.evidence.problems import KINDS, Problem, mixed
from benchmarks.experiments.results import cpu_name
from entra.config import ScoreConfig

STEPS = 70
HELD_OUT = 1000
GROUP = 8
PROMPTS_PER_STEP = 16
LEARNING_RATE = 2e-4
_TRAIN_SEED = 100  # the problems of seed k are drawn with 100 + k for training and 200 + k for holding out
_HELD_OUT_SEED = 200

Progress = Callable[[str], None]


def run(
    arm: str,
    seed: int,
    sft: Path,
    *,
    steps: int = STEPS,
    held_out: int = HELD_OUT,
    prompts_per_step: int = PROMPTS_PER_STEP,
    learning_rate: float = LEARNING_RATE,
    score_config: ScoreConfig | None = None,
    kinds: Sequence[str] = KINDS,
    save_to: Path | None = None,
    device: str = "cpu",
    max_seconds: float | None = None,
    added: Callable[[], float] | None = None,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Trains one arm and evaluates it.

    Args:
        arm: a key of `arms.ARMS`.
        seed: of rollouts, training problems and held-out problems.
        sft: the checkpoint to start from.
        steps: GRPO steps, each of `prompts_per_step` prompts with `GROUP` completions.
        held_out: how many held-out problems.
        learning_rate: of AdamW, linear to 0 after 5 steps of warm-up.
        score_config: of the arms that score; None: the defaults.
        kinds: of the training problems; the held-out ones are of all kinds.
        save_to: folder for the trained model; None: it is not kept.
        device: "cpu" or "cuda".
        max_seconds: of training; after them no step begins. None: all steps are taken.
        added: gives the seconds that ENTRA has added to the training so far. The curve then holds `step_seconds` and
            `entra_seconds` of each step.
        progress: called with a line now and then.

    Returns:
        Config, versions, seconds, training curve, `held_out` as `evaluated` returns it.

    Raises:
        ValueError: a weight is not finite after the training.
    """
    started = time.monotonic()
    model, tokenizer, curve = _trained(
        arm,
        seed,
        sft,
        steps,
        prompts_per_step,
        learning_rate,
        score_config,
        kinds,
        device,
        max_seconds,
        added,
        lambda line: progress(f"{arm} seed {seed}: {line}"),
    )
    trained_at = time.monotonic()
    lost = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if lost:
        raise ValueError(f"{len(lost)} weights are not finite after {len(curve['tokens'])} steps of {arm}, first {lost[0]}")
    if save_to is not None:
        model.save_pretrained(save_to)
        tokenizer.save_pretrained(save_to)
    return {
        "arm": arm,
        "seed": seed,
        "config": recorded(steps, prompts_per_step, learning_rate, score_config, kinds),
        "held_out": evaluated(model, tokenizer, sft, seed, held_out),
        "curve": curve,
        "seconds": {"training": round(trained_at - started, 1), "evaluation": round(time.monotonic() - trained_at, 1)},
        **environment(),
    }


def recorded(
    steps: int = STEPS,
    prompts_per_step: int = PROMPTS_PER_STEP,
    learning_rate: float = LEARNING_RATE,
    score_config: ScoreConfig | None = None,
    kinds: Sequence[str] = KINDS,
) -> dict[str, Any]:
    """What a run's JSON says of its settings. Of `score_config` it names what differs from the defaults."""
    score = ScoreConfig() if score_config is None else score_config
    default = ScoreConfig()
    return {
        "steps": steps,
        "prompts_per_step": prompts_per_step,
        "group": GROUP,
        "learning_rate": learning_rate,
        "schedule": "linear",
        "max_new_tokens": MAX_NEW_TOKENS,
        "weight": WEIGHT,
        "group_gate": GROUP_GATE,
        "halve_at": HALVE_AT,
        "dead_band": DEAD_BAND,
        "scale_rewards": "group",
        "loss_type": "dapo",
        "score": {
            field.name: getattr(score, field.name)
            for field in fields(score)
            if getattr(score, field.name) != getattr(default, field.name)
        },
        "kinds": list(kinds),
    }


def evaluated(model: Any, tokenizer: Any, sft: Path, seed: int, held_out: int = HELD_OUT) -> dict[str, Any]:
    """`model` on the held-out problems of a seed, one sample at temperature 1 each.

    Returns:
        Per problem `kinds`, `correct` and `finished` ("1" or "0"), `tokens` (EOS included) and `sft_logprob`, the mean log P of
        the completion under the SFT model; and some `examples`.
    """
    from transformers import AutoModelForCausalLM

    problems = held_out_problems(seed, held_out)
    completions = sample(model, tokenizer, problems, seed)
    before = AutoModelForCausalLM.from_pretrained(sft).to(model.device)
    improbable = mean_logprobs(before, tokenizer, problems, completions)
    return {
        "correct": _bits(graded(tokenizer, problems, completions)),
        "finished": _bits([ids[-1:] == [tokenizer.eos_token_id] for ids in completions]),
        "tokens": [len(ids) for ids in completions],
        "sft_logprob": [round(value, 3) for value in improbable],
        "kinds": [problem.kind for problem in problems],
        "examples": [
            {"prompt": problem.prompt, "completion": tokenizer.decode(ids)}
            for problem, ids in zip(problems[:8], completions[:8], strict=True)
        ],
    }


def held_out_problems(seed: int, count: int) -> list[Problem]:
    """The held-out problems of a seed, the same for every arm and for the SFT model."""
    return mixed(count, "held-out", _HELD_OUT_SEED + seed)


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    import torch

    packages = ("torch", "transformers", "trl", "reasoning-gym")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
    }


def _trained(
    arm: str,
    seed: int,
    sft: Path,
    steps: int,
    prompts_per_step: int,
    learning_rate: float,
    score_config: ScoreConfig | None,
    kinds: Sequence[str],
    device: str,
    max_seconds: float | None,
    added: Callable[[], float] | None,
    progress: Progress,
) -> tuple[Any, Any, dict[str, list[float]]]:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        """Notes what each step took, where that is asked for, and ends the training when its time is over."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun, self.before = time.monotonic(), added() if added else 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if added:
                trainer.curve.setdefault("entra_seconds", []).append(added() - self.before)
                trainer.curve.setdefault("step_seconds", []).append(time.monotonic() - self.begun)
            control.should_training_stop |= max_seconds is not None and time.monotonic() - began > max_seconds

    tokenizer = AutoTokenizer.from_pretrained(sft)
    model = AutoModelForCausalLM.from_pretrained(sft)
    functions, weights = rewards_of(arm, seed, score_config)
    problems = mixed(prompts_per_step * steps, "train", _TRAIN_SEED + seed, kinds)
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder,
            seed=seed,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=5,
            per_device_train_batch_size=prompts_per_step * GROUP,
            num_generations=GROUP,
            max_completion_length=MAX_NEW_TOKENS,
            temperature=1.0,
            top_k=0,
            beta=0.0,
            loss_type="dapo",
            scale_rewards="group",
            reward_weights=weights,
            gradient_checkpointing=False,
            logging_strategy="no",
            report_to=[],
            use_cpu=device == "cpu",
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = _recording_trainer()(
            model=model,
            reward_funcs=functions,
            args=args,
            train_dataset=Dataset.from_list([vars(problem) for problem in problems]),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.say = progress
        began = time.monotonic()
        trainer.train()
    return model, tokenizer, trainer.curve


def _recording_trainer() -> Any:
    """The class is made here because importing TRL takes seconds."""
    from entra.guards import correlation, group_std
    from entra.trl import EntraGRPOTrainer

    class RecordingTrainer(EntraGRPOTrainer):
        """Notes the weighted rewards as the trainer is about to use them."""

        say: Progress

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.curve: dict[str, list[float]] = {
                name: [] for name in ("accuracy", "tokens", "reward", "within_group_std", "reward_length_correlation")
            }

        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
            per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            total = (per_function * self.reward_weights).nansum(dim=1).tolist()
            lengths = [len(ids) for ids in completion_ids_list]
            self._note("accuracy", statistics.fmean(per_function[:, 0].tolist()))
            self._note("tokens", statistics.fmean(lengths))
            self._note("reward", statistics.fmean(total))
            self._note("within_group_std", group_std(total, prompts))
            self._note("reward_length_correlation", correlation(total, lengths))
            step = len(self.curve["tokens"])
            if step % 5 == 1 or step == self.args.max_steps:
                last = {name: values[-1] for name, values in self.curve.items()}
                self.say(f"step {step}/{self.args.max_steps}, {last['tokens']:.0f} tokens, accuracy {last['accuracy']:.3f}")
            return per_function

        def _note(self, name: str, value: float) -> None:
            self.curve[name].append(round(value, 4))

    return RecordingTrainer


def _bits(flags: Sequence[bool]) -> str:
    return "".join("01"[flag] for flag in flags)
