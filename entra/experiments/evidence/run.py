"""One GRPO run from the SFT checkpoint: train, evaluate on held-out problems, report as one JSON-able dict."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from entra.config import ScoreConfig
from entra.experiments.evidence.arms import Reward, rewards_of
from entra.experiments.evidence.evaluate import MAX_NEW_TOKENS, graded, mean_logprobs, sample
from entra.experiments.evidence.problems import mixed

STEPS = 100
HELD_OUT = 1000
GROUP = 8
PROMPTS_PER_STEP = 16
LEARNING_RATE = 1e-4
TRAIN_SEED = 100
"""Seeds of training problems start here, seeds of held-out problems at 200: any are disjoint, as the split is by the prompt."""


def trained(arm: str, seed: int, sft: Path, steps: int = STEPS, config: ScoreConfig | None = None, lr: float = LEARNING_RATE, scale: str = "group",
            progress: Callable[[dict[str, float]], None] = lambda entry: None, weights=None, loss_type="dapo", iters=1, group=GROUP) -> tuple[Any, Any, Any]:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    import entra

    tokenizer = AutoTokenizer.from_pretrained(sft)
    model = AutoModelForCausalLM.from_pretrained(sft)
    functions, w = rewards_of(arm, seed, config)
    w = weights or w
    watch = Watch()
    problems = mixed(PROMPTS_PER_STEP * steps, "train", TRAIN_SEED + seed)
    rows = [{"prompt": p.prompt, "kind": p.kind, "answer": p.answer, "entry": p.entry} for p in problems]

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            progress(logs)

    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder, seed=seed, max_steps=steps, learning_rate=lr, lr_scheduler_type="constant_with_warmup", warmup_steps=5,
            per_device_train_batch_size=PROMPTS_PER_STEP * GROUP, num_generations=group, num_iterations=iters,
            max_completion_length=MAX_NEW_TOKENS, temperature=1.0, top_k=0, beta=0.0, loss_type=loss_type, scale_rewards=scale,
            reward_weights=w, logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False, shuffle_dataset=False,
        )
        trainer = trl.GRPOTrainer(model=model, reward_funcs=[watch(f) for f in functions], args=args, train_dataset=Dataset.from_list(rows),
                                  processing_class=tokenizer, callbacks=[Progress()])
        with entra.bind_policy(model, tokenizer):
            trainer.train()
    return model, tokenizer, trainer.state.log_history


class Watch:
    def __init__(self): self.values = {}
    def __call__(self, f):
        return f
