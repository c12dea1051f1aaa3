"""What `entra.trl` relies on in TRL and transformers, so that an upgrade that changes it fails here and says what."""

import inspect
import re

import pytest

trl = pytest.importorskip("trl", reason="needs TRL: pip install 'entra-reward[train]'")

TRAINERS = [trl.GRPOTrainer, trl.RLOOTrainer]


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(function):
    return inspect.getsource(inspect.unwrap(function))


@pytest.mark.parametrize("trainer", TRAINERS)
class TestOverriddenMethods:
    def test_signatures(self, trainer):
        assert parameters(trainer._generate) == ["self", "prompts"]
        assert parameters(trainer._calculate_rewards) == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
        assert parameters(trainer._get_per_token_logps_and_entropies)[:6] == [
            "self",
            "model",
            "input_ids",
            "attention_mask",
            "logits_to_keep",
            "batch_size",
        ]
        assert parameters(trainer.__init__)[:7] == [
            "self",
            "model",
            "reward_funcs",
            "args",
            "train_dataset",
            "eval_dataset",
            "processing_class",
        ]

    def test_what_generate_returns(self, trainer):
        # Prompt and completion ids come first; in GRPO the mask of the policy's own tokens is third, tools' images last.
        (returned,) = re.findall(r"\n        return (.*)\n$", source(trainer._generate))
        names = returned.split(", ")
        assert names[:2] == ["prompt_ids", "completion_ids"]
        assert (names[2] == "tool_mask") == (trainer is trl.GRPOTrainer)
        assert (names[-1] == "tool_images") == (trainer is trl.GRPOTrainer)

    def test_order_of_events(self, trainer):
        # Generation, then log-probs of the policy, then those of the reference, then rewards, all in one method.
        text = source(trainer._generate_and_score_completions)
        first = text.index("self._generate(prompts)")
        policy, reference = (
            re.search(rf"self\._get_per_token_logps_and_entropies\(\s*self\.{model},", text).start()
            for model in ("model", "ref_model")
        )
        rewards = text.index("self._calculate_rewards(inputs, prompts, completions, completion_ids_list)")
        assert first < policy < reference < rewards
        # Rows that are masked out lose their attention mask, and text has no images.
        assert "completion_mask = completion_mask * (~is_truncated)" in text
        assert "if images is not None else None" in text
        # Left-padded prompts and right-padded completions, the completions last.
        assert "torch.cat([prompt_ids, completion_ids], dim=1)" in text
        assert "logits_to_keep = completion_ids.size(1)" in text
        assert "torch.no_grad()" in text[first:policy]

    def test_what_a_log_prob_pass_returns(self, trainer):
        # Log-probs of the last logits_to_keep tokens are the first of three values, divided by the temperature.
        text = source(trainer._get_per_token_logps_and_entropies)
        assert "return logps, entropies, aux_loss" in text
        assert "all_logps.append(outputs.log_probs[:, -logits_to_keep:])" in text
        assert re.search(r"add_fused_lm_head\(\s*self\.model.*,\s*temperature=self\.temperature", source(trainer.__init__))

    def test_what_reward_functions_get(self, trainer):
        text = source(trainer._calculate_rewards)
        for name in ("trainer_state", "log_extra", "log_metric"):
            assert f'reward_kwargs["{name}"]' in text
        assert "prompts=prompts, completions=completions, completion_ids=completion_ids_list" in text
        # An nn.Module would be taken for a classifier, a coroutine would run after the policy is unbound.
        assert "isinstance(reward_func, nn.Module)" in text
        assert parameters(trainer._log_metric) == ["self", "name", "value"]
        assert parameters(trainer._log_completion_extra) == ["self", "column", "values"]
        # The owner of the function that logs is the trainer. Asynchronous rewards run on its loop. The functions are looked up
        # for each batch, in which those that are gates as well are exchanged.
        assert 'reward_kwargs["log_metric"] = self._log_metric' in text
        assert "asyncio.run_coroutine_threadsafe(_run_async_funcs(), self.async_loop)" in text
        assert "zip(self.reward_funcs, self.reward_processing_classes, self.reward_func_names, strict=True)" in text

    def test_attributes(self, trainer):
        text = source(trainer.__init__) + source(trainer)
        for name in ("reward_funcs", "temperature", "beta", "model", "processing_class", "mask_truncated_completions"):
            assert f"self.{name}" in text, name


def test_the_reference_pass_of_an_adapter_switches_layers():
    peft = pytest.importorskip("peft", reason="needs PEFT")
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    assert isinstance(inspect.getattr_static(layer, "disable_adapters"), property)
    assert isinstance(inspect.getattr_static(layer, "active_adapters"), property)
    assert "disable_adapter()" in source(trl.trainer.utils.use_adapter)


def test_a_reward_is_named_and_synchronous():
    from trl.trainer.utils import get_callable_name, is_async_callable

    import entra

    reward = entra.EntraReward(name="brevity")
    assert get_callable_name(reward) == "brevity"
    assert get_callable_name(entra.score_batch) == "score_batch"
    assert not is_async_callable(reward)
    assert not is_async_callable(entra.score_batch)


def test_the_async_trainer_spawns_its_rewards_away():
    # EntraReward refuses to be pickled for a new process; that is where the async trainer would send it.
    from trl.experimental.async_grpo import async_rollout_worker

    text = inspect.getsource(async_rollout_worker)
    assert 'get_context("spawn")' in text
    assert "reward_funcs" in text


def test_transformers_looks_attention_up_by_the_config_of_the_module():
    from transformers import AttentionInterface
    from transformers.models.qwen3 import modeling_qwen3

    assert callable(AttentionInterface.register)
    text = source(modeling_qwen3.Qwen3Attention.forward)
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in text
    assert "self.config._attn_implementation" in text


def test_the_version_of_fsdp_is_where_accelerate_keeps_it():
    from accelerate import FullyShardedDataParallelPlugin

    assert "fsdp_version" in FullyShardedDataParallelPlugin.__dataclass_fields__
    assert "self.accelerator" in source(trl.GRPOTrainer)


def test_what_the_command_line_uses():
    assert {"return_remaining_strings", "separate_remaining_strings"} <= set(parameters(trl.TrlParser.parse_args_and_config))
    assert callable(trl.get_dataset)
    end = getattr(trl.GRPOTrainer, "end", None)  # new in transformers 5.18: where it is, ending the accelerator is all it does
    assert end is None or source(end).rstrip().endswith('"""\n        self.accelerator.end_training()')
    assert callable(trl.GRPOConfig.main_process_first)


def test_configs_that_baselines_and_docs_name():
    for name in (
        "scale_rewards",
        "multi_objective_aggregation",
        "mask_truncated_completions",
        "num_iterations",
        "reward_weights",
    ):
        assert name in trl.GRPOConfig.__dataclass_fields__
