"""What ENTRA adds to a GRPO step: on TRL's log-prob pass, with an extra pass, and compared with TRL's repetition penalty.

The policy is a random model in the Qwen3 architecture. It always writes the same number of tokens, so that all arms do the same
work. Where TRL makes a log-prob pass (here: two iterations per batch) scores ride on it. With its defaults TRL makes none. Then
scoring costs one no-grad forward, which is also timed alone. A difference of a few percent between whole steps drowns in the
noise of a busy machine, so what ENTRA adds is also clocked by itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import entra
from benchmarks.speed.clock import clock_of_entra
from benchmarks.speed.compare import compare
from benchmarks.speed.measure import DEVICE, DTYPE, by_size
from benchmarks.speed.results import Results
from entra.forward import token_signals

PROMPT_TOKENS = by_size(tiny=8, small=32, full=256)
LONG_PROMPT_TOKENS = by_size(tiny=24, small=256, full=1024)
COMPLETION_TOKENS = by_size(tiny=16, small=128, full=256)
GROUP, PROMPTS = 4, by_size(tiny=1, small=1, full=4)
CASES = {"TRL makes a log-prob pass": 2, "TRL's defaults, no pass": 1}
"""Iterations per batch."""
ADDED = "ours, riding: what ENTRA adds"


def accuracy(completions: list[Any], **columns: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def model() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = by_size(
        tiny=(64, 2, 4, 2, 16, 128, 1000), small=(320, 8, 8, 4, 40, 960, 16_384), full=(1024, 28, 16, 8, 128, 3072, 151_936)
    )
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size"
    config = AutoConfig.for_model("qwen3", **dict(zip(names.split(), sizes, strict=True)), eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE)


def tokenizer(vocabulary: int) -> Any:
    """Words that are numbers: token i is the text "i"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="1", unk_token="2", padding_side="left")


def trainer(kind: Any, reward: Any, iterations: int, folder: Path) -> Any:
    """Its `train()` is one batch of rollouts and the optimiser steps on it."""
    import trl
    from datasets import Dataset

    policy = model()
    words = " ".join(str(10 + i % 50) for i in range(PROMPT_TOKENS))
    args = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=GROUP * PROMPTS,
        num_generations=GROUP,
        num_iterations=iterations,
        max_steps=iterations,
        max_completion_length=COMPLETION_TOKENS,
        generation_kwargs={"min_new_tokens": COMPLETION_TOKENS},
        gradient_checkpointing=False,
        use_cpu=DEVICE == "cpu",
        bf16=DTYPE is torch.bfloat16,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": f"{i} {words}"} for i in range(PROMPTS)])
    return kind(
        model=policy, reward_funcs=[reward], args=args, train_dataset=rows, processing_class=tokenizer(policy.config.vocab_size)
    )


def passes(policy: Any, plain: Any, prompt_tokens: int) -> dict[str, Callable[[], Any]]:
    """Passes over a batch whose groups share their prompt: ours, a bare forward, and the trainer's for log-probs."""
    rows = [[10 + i % PROMPTS, *range(11, 10 + prompt_tokens + COMPLETION_TOKENS)] for i in range(GROUP * PROMPTS)]
    batch = torch.tensor(rows, device=DEVICE)

    @torch.no_grad()
    def forward() -> None:
        policy(input_ids=batch, use_cache=False, logits_to_keep=COMPLETION_TOKENS)

    @torch.no_grad()
    def log_prob_pass() -> None:
        plain._get_per_token_logps_and_entropies(plain.model, batch, torch.ones_like(batch), COMPLETION_TOKENS)

    return {
        "ours, the pass alone": lambda: token_signals(policy, rows, [COMPLETION_TOKENS] * len(rows), entra.ScoreConfig()),
        "one no-grad forward": forward,
        "TRL's no-grad log-prob pass": log_prob_pass,
    }


@pytest.mark.priority(6)
@pytest.mark.parametrize("case", CASES)
def test_training_step(results: Results, once: Any, tmp_path: Path, case: str) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install 'entra-reward[train]'")
    rewards = pytest.importorskip("trl.rewards")
    iterations = CASES[case]
    way = "riding" if iterations > 1 else "a pass of its own"
    ours = f"ours, {way}"
    trainers = {
        "without ENTRA": trainer(trl.GRPOTrainer, accuracy, iterations, tmp_path),
        ours: trainer(entra.EntraGRPOTrainer, entra.EntraReward(gate=accuracy), iterations, tmp_path),
        "TRL's repetition penalty": trainer(trl.GRPOTrainer, rewards.get_repetition_penalty_reward(), iterations, tmp_path),
    }
    added = []

    def clocked() -> None:
        with clock_of_entra() as seconds:
            trainers[ours].train()
        added.append(seconds["override"] - seconds["trl"] + seconds["ours"])

    runs: dict[str, Callable[[], Any]] = {name: made.train for name, made in trainers.items()} | {ours: clocked}
    if iterations == 1:
        policy, plain = model(), trainers["without ENTRA"]
        runs |= passes(policy, plain, PROMPT_TOKENS)

    def check(name: str, result: Any) -> None:
        # The Trainer leaves NaN losses out of its log; a policy of NaN ends the next generation by an assertion on the GPU.
        lost = [n for n, p in trainers[name].model.named_parameters() if not p.isfinite().all()] if name in trainers else []
        if lost:
            raise ValueError(f"not finite after its optimiser steps: {len(lost)} parameters, first {lost[0]}")
        print(f"{case}, {name}: ran" + (", all weights finite" if name in trainers else ""), flush=True)

    records = compare(
        results,
        "training step",
        case,
        runs,
        check=check,
        rounds=by_size(tiny=1, small=5, full=5),
        seconds=by_size(tiny=1, small=4, full=8),  # nearly all of a step is generation, and what ENTRA adds is clocked below
        rows=GROUP * PROMPTS,
        completion_tokens=COMPLETION_TOKENS,
        memory_of=None if DEVICE == "cuda" else (),
    )
    once(clocked if iterations > 1 else runs["ours, the pass alone"])
    if iterations == 1:
        compare(
            results,
            "training step",
            f"{case}, prompts of {LONG_PROMPT_TOKENS} tokens",
            passes(policy, plain, LONG_PROMPT_TOKENS),
            rounds=5,
            seconds=by_size(tiny=1, small=3, full=8),
            rows=GROUP * PROMPTS,
            completion_tokens=COMPLETION_TOKENS,
        )
    if iterations > 1:
        ms = statistics.median(added) * 1e3
        share = ms / records[ours]["ms"]
        results.add("training step", case, ADDED, ms=ms, share_of_step=share)
        if results.asserts():
            assert share < 0.02
