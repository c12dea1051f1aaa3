"""Changes that leave a completion as it is, under which its protected tokens should stay the same.

There are four:

- weights and arithmetic in bfloat16 instead of the model's dtype;
- another system message;
- a polite sentence in front of the question;
- the prompt as plain text, without the chat template.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.experiments import measuring
from entra.policy import Policy
from entra.score import Scores

_SYSTEM = "You are a careful teacher of mathematics."
_POLITE = "Could you please help me with this one? "
PERTURBATIONS = {
    "bfloat16": "weights and arithmetic in bfloat16",
    "system": "another system message",
    "polite": "a polite sentence in front",
    "plain": "no chat template",
}
"""What each is, for people."""
CHANGES = ("kept", "jaccard", "reward_change", "logprob_change")
"""What `stability_of` says of a trace."""


def measure_again(policy: Policy, measured: measuring.Measurement, name: str) -> dict[int, measuring.Measured]:
    """What was measured again under a perturbation, by index. Traces to which it does not apply are missing."""
    base = [trace.sample for trace in measured.traces]
    samples = base
    if name == "bfloat16":
        policy = policy._replace(model=copy.deepcopy(policy.model).to(torch.bfloat16))
    else:
        samples = [replace(sample, prompt=_PROMPTS[name](sample.prompt)) for sample in base]
    index = {id(sample): i for i, sample in enumerate(samples) if sample.prompt is not None}
    if not index:
        return {}
    applicable = measuring.Samples([samples[i] for i in index.values()])
    again = measuring.measure(policy, applicable, label=f"completions, {PERTURBATIONS[name]}")
    return {index[id(trace.sample)]: trace for trace in again.traces}


def stability_of(before: Scores, after: Scores) -> list[dict[str, float]]:
    """For each trace: `measuring.overlap` of the protected sets, the absolute change of r, and the mean one of log P."""
    return [
        {
            **measuring.overlap(before.protected[i], after.protected[i]),
            "reward_change": abs((after.rewards[i] or 0.0) - (before.rewards[i] or 0.0)),
            "logprob_change": float((after.logprobs[i] - before.logprobs[i]).abs().double().mean()),
        }
        for i in range(len(before.rewards))
    ]


def _system(prompt: Any) -> Any:
    if not _is_chat(prompt):
        return None
    return [{"role": "system", "content": _SYSTEM}, *(message for message in prompt if message["role"] != "system")]


def _polite(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return _POLITE + prompt
    users = [i for i, message in enumerate(prompt) if message["role"] == "user"] if _is_chat(prompt) else []
    if not users:
        return None
    last = prompt[users[-1]]
    return [*prompt[: users[-1]], {**last, "content": _POLITE + last["content"]}, *prompt[users[-1] + 1 :]]


def _plain(prompt: Any) -> Any:
    return "\n\n".join(message["content"] for message in prompt) + "\n\n" if _is_chat(prompt) else None


def _is_chat(prompt: Any) -> bool:
    """Whether it is messages of text."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in prompt)
    )


_PROMPTS: dict[str, Callable[[Any], Any]] = {"system": _system, "polite": _polite, "plain": _plain}
"""What each perturbation makes of a prompt; None where it does not apply."""
