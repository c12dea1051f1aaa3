"""vLLM generates for TRL in the training's own process (colocate), here its CPU build; `make test-vllm` makes the environment.

vLLM's CPU build packs the weights of linear layers away as it loads them, so that TRL's new weights after a step find none to
write to. Here they stay plain, as on a GPU.
"""

import pytest
import torch
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra
import entra.rollout

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
platforms = pytest.importorskip("vllm.platforms")
if not platforms.current_platform.is_cpu():
    pytest.skip("needs vLLM's CPU build: make test-vllm", allow_module_level=True)
trl = pytest.importorskip("trl", reason="needs TRL: make test-vllm")

STEPS = 3


def keep_plain(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps of GRPO: what was logged, how often scoring ran a forward of its own, and what was said before."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("vllm")
    build("qwen3", head_dim=64).save_pretrained(folder / "model")  # vLLM's attention has no head dim of 20
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder / "model")
    args = trl.GRPOConfig(
        output_dir=str(folder / "run"),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=24,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    rewards, own = [], []

    def first_half(completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    class Recorded(entra.EntraReward):
        def __call__(self, *given, **columns):
            rewards.append(super().__call__(*given, **columns))
            return rewards[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", keep_plain)
        right = entra.rollout.token_signals
        patch.setattr(entra.rollout, "token_signals", lambda *given, **named: own.append(1) or right(*given, **named))
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        said = entra.doctor(model, tokenizer, args=args)
        own.clear()
        trainer = entra.EntraGRPOTrainer(
            model=model,
            reward_funcs=[Recorded(gate=first_half)],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": f"{10**i}+{i}="} for i in range(8)]),
            processing_class=tokenizer,
            verify_every=1,
        )
        trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry], rewards, own, said


def test_three_steps_ride_on_trls_pass_and_are_verified(run):
    log, rewards, own, said = run
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    assert own == []
    assert "scores ride on TRL's own log-prob pass" in str(said)
    for entry, reward in zip(log, rewards, strict=True):
        assert 0 < entry["entra_reward/score"] <= 1
        assert entry["rewards/entra_reward/mean"] == pytest.approx(sum(reward) / len(reward), abs=1e-6)
        for name in ("incoming", "logprobs", "scored_incoming", "scored_logprobs"):
            assert 0 <= entry[f"entra/verify/{name}"] < 1e-3


def test_vllm_generates_from_the_policy_of_the_step(run):
    """vLLM runs in bfloat16, whose log-probs are off by 0.01 nats on average; with the weights of the step before by 1.8."""
    for entry in run[0]:
        assert entry["sampling/sampling_logp_difference/mean"] < 0.1
