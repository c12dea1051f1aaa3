"""TRL takes score_batch and EntraReward as reward functions, unchanged."""

import pytest
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra

trl = pytest.importorskip("trl", reason="needs TRL: pip install 'entra[train]'")


@pytest.fixture
def train(tmp_path):
    """Runs two GRPO steps on a tiny model and returns what the trainer logged."""
    from datasets import Dataset

    def run(reward_funcs, bind=False):
        model, tokenizer = build("llama"), build_tokenizer()
        tokenizer.padding_side = "left"
        dataset = Dataset.from_list([{"prompt": f"{i}+{i}=", "answer": str(2 * i), "model": "a column"} for i in range(8)])
        args = trl.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=12,
            max_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=model, reward_funcs=reward_funcs, args=args, train_dataset=dataset, processing_class=tokenizer
        )
        if bind:
            with entra.bind_policy(model, tokenizer):
                trainer.train()
        else:
            trainer.train()
        return [entry for entry in trainer.state.log_history if "reward" in entry]

    return run


def test_frozen_scorer_in_a_plain_grpo_trainer(train):
    def short(completions, answer, **columns):
        return [1.0] * len(completions)

    reward = entra.EntraReward(model=build("qwen3"), tokenizer=build_tokenizer(), gate=short)
    logged = train([reward])
    assert len(logged) == 2
    assert all(0 < entry["rewards/entra_reward/mean"] <= 1 for entry in logged)


def test_score_batch_itself_with_the_bound_policy(train):
    logged = train([entra.score_batch], bind=True)
    assert all(0 < entry["rewards/score_batch/mean"] <= 1 for entry in logged)
