"""Supervised training on the overthinking traces: the model that every arm starts from."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.model import build_model, build_tokenizer
from benchmarks.evidence.problems import Problem, mixed, trace

BATCH = 32
SORTED_BATCHES = 16
TOKENS = 3000  # about the completion tokens of a batch; a mean over the batch's own would favour the tokens of short traces
LEARNING_RATE = 2e-3
WARMUP = 100


def train_sft(
    folder: Path,
    *,
    steps: int = 1800,
    problems: int = 20_000,
    seed: int = 0,
    hidden: int | None = None,
    layers: int | None = None,
    device: str = "cpu",
    max_seconds: float | None = None,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> dict[str, Any]:
    """Trains a fresh model on `steps` batches of freshly written traces and saves model and tokenizer into `folder`.

    Args:
        folder: where the checkpoint goes.
        steps: optimiser steps of `BATCH` traces. Learning rate: linear warm-up, then linear to 0.
        problems: how many problems the traces are about.
        seed: of weights, problems and traces.
        hidden, layers: of the model; None: its defaults.
        device: where it is trained.
        max_seconds: after them no step begins, and the model is saved as it is; None: all steps are taken.
        progress: called with step, steps and the loss now and then.

    Returns:
        What there is to report: parameters, loss, seconds, steps, traces.
    """
    import torch

    started = time.monotonic()
    tokenizer = build_tokenizer()
    sizes = {name: size for name, size in (("hidden", hidden), ("layers", layers)) if size is not None}
    model = build_model(tokenizer, seed, **sizes).to(device)
    rng = random.Random(seed)
    pool = mixed(problems, "train", seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, max(steps - step, 1) / max(steps - WARMUP, 1))
    )
    loss = 0.0
    batches: list[list[tuple[str, str]]] = []
    done = 0
    for step in range(steps):
        if max_seconds is not None and time.monotonic() - started > max_seconds:
            break
        batches = batches or _of_like_length(pool, rng)
        ids, labels = (tensor.to(device) for tensor in _batch(tokenizer, batches.pop()))
        output = model(input_ids=ids, use_cache=False).logits[:, :-1]
        step_loss = torch.nn.functional.cross_entropy(output.transpose(1, 2), labels[:, 1:], reduction="sum") / TOKENS
        optimizer.zero_grad()
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        loss, done = step_loss.item(), step + 1
        if step % 20 == 0 or step == steps - 1:
            progress(done, steps, loss)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": round(loss, 4),
        "seconds": round(time.monotonic() - started, 1),
        "steps": done,
        "traces": done * BATCH,
        "seed": seed,
    }


def _of_like_length(pool: Sequence[Problem], rng: random.Random) -> list[list[tuple[str, str]]]:
    """`SORTED_BATCHES` batches of (prompt, trace), each of similar lengths, in random order: half as many pads."""
    chosen = [pool[rng.randrange(len(pool))] for _ in range(BATCH * SORTED_BATCHES)]
    rows = sorted(((p.prompt, trace(p, rng)) for p in chosen), key=lambda row: len(row[0]) + len(row[1]))
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    rng.shuffle(batches)
    return batches


def _batch(tokenizer: Any, rows: list[tuple[str, str]]) -> tuple[Any, Any]:
    """Ids [B, N] padded on the right, and labels that are -100 on prompts and pads."""
    import torch

    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    prompts = tokenizer([prompt for prompt, _ in rows]).input_ids
    completions = [[*ids, eos] for ids in tokenizer([text for _, text in rows]).input_ids]
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor(prompt + completion)
        labels[i, len(prompt) : end] = torch.tensor(completion)
    return ids, labels
