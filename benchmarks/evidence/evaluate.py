"""One sampled completion for each held-out problem, and what it amounts to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.evidence.problems import Problem, correct

MAX_NEW_TOKENS = 192


def sample(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    seed: int,
    *,
    batch: int = 256,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[list[int]]:
    """Completion ids at temperature 1. They end with the EOS where there was one."""
    import torch

    torch.manual_seed(seed)
    model.eval()
    completions: list[list[int]] = []
    for start in range(0, len(problems), batch):
        part = problems[start : start + batch]
        inputs = tokenizer([p.prompt for p in part], return_tensors="pt", padding=True, return_token_type_ids=False)
        inputs = inputs.to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=max_new_tokens)
        for ids in output[:, inputs.input_ids.shape[1] :].tolist():
            completions.append(ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids)
        progress(len(completions), len(problems))
    return completions


def graded(tokenizer: Any, problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> list[bool]:
    """Whether each completion has ended and its answer is right."""
    return [
        ids[-1:] == [tokenizer.eos_token_id] and correct(problem, tokenizer.decode(ids, skip_special_tokens=True))
        for problem, ids in zip(problems, map(list, completions), strict=True)
    ]


def mean_logprobs(model: Any, tokenizer: Any, problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> list[float]:
    """Mean log P of each completion's tokens, EOS included, under `model`."""
    import torch

    model.eval()
    means: list[float] = []
    for start in range(0, len(problems), 64):
        prompts = tokenizer([p.prompt for p in problems[start : start + 64]]).input_ids
        part = [list(c) for c in completions[start : start + 64]]
        width = max(len(p) + len(c) for p, c in zip(prompts, part, strict=True))
        padded = [(p + c + [tokenizer.pad_token_id] * width)[:width] for p, c in zip(prompts, part, strict=True)]
        ids = torch.tensor(padded, device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        logprobs = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for row, p, c in zip(logprobs, prompts, part, strict=True):
            means.append(float(row[len(p) - 1 : len(p) + len(c) - 1].mean()))
    return means
