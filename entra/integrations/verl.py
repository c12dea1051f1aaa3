"""verl: scores of the live policy, out of the pass that verl makes for the old log-probs anyway.

    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=entra_sync +actor_rollout_ref.model.model_type=entra ...

verl loads this module by itself (entry point group `verl.plugins`). It adds two names to verl's registries, and nothing else:

- The model type `entra`: verl's FSDP engine. In a forward-only pass that asks for it, the capture is put around verl's own
  forward, and each row comes back with incoming attention beside its log-probs. Rows may be padded or packed.
- The trainer mode `entra_sync`: verl's synchronous trainer. It asks for incoming attention in the pass for the old log-probs.
  Then it turns the batch into rewards and writes them to `rm_scores`, before advantages are computed. It sees whole groups, so
  `group_gate` and `dead_band` work. verl's own score of a completion is the gate.

No method of verl's is copied: the classes are mixins, put before verl's own. `tests/engines/test_verl.py` names what they rely
on. The names are added once verl itself has imported the registries. To import them here would load all of verl's engines into
every process that imports verl.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from entra.capture import capture_incoming_attention
from entra.config import ScoreConfig, names_unknown_options
from entra.encode import Encoder
from entra.forward import TokenSignals
from entra.policy import Policy, bound
from entra.reward import EntraReward
from entra.rollout import Rollout
from entra_kernels._checks import check_number

MODEL_TYPE = "entra"
"""Of `actor_rollout_ref.model.model_type`."""

TRAINER_MODE = "entra_sync"
"""Of `trainer.v1.trainer_mode`."""


@names_unknown_options
@dataclass(frozen=True, kw_only=True)
class Options:
    """What stands under `entra` in verl's configuration: `+entra.weight=0.5 +entra.guards.group_gate=0.5`.

    Raises:
        ValueError: a value outside its range.
        TypeError: an unknown key (the message names the nearest right one), or a value of another type.
    """

    weight: float = 1.0
    """What ENTRA's reward counts for: a completion gets `score_weight * score + weight * reward`."""

    score_weight: float = 1.0
    """What verl's own score of the completion counts for, beside ENTRA's reward."""

    gate: bool = True
    """Whether verl's own score, at least 0, is the gate: only right answers are paid for being concise."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `entra.ScoreConfig`."""

    guards: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `entra.guards.Guards`."""

    scorer: Mapping[str, Any] = field(default_factory=dict)
    """The frozen scorer, if there is one: see `entra.integrations.verl_scorer`."""

    def __post_init__(self) -> None:
        for name in ("weight", "score_weight"):
            check_number(f"entra.{name}", getattr(self, name), "at least 0 and finite; it multiplies a reward", low=0.0)

    @classmethod
    def of(cls, config: Any) -> Options:
        """Out of verl's whole configuration; the defaults where it has no `entra`."""
        from omegaconf import OmegaConf

        given = OmegaConf.select(config, "entra")
        return cls() if given is None else cls(**OmegaConf.to_container(given, resolve=True))

    def reward(self, **scorer: Any) -> EntraReward:
        """The reward that these options describe, with a model and tokenizer of its own if they are given."""
        gate = verl_score if self.gate else None
        return EntraReward(config=ScoreConfig(**self.config), gate=gate, name="entra", **self.guards, **scorer)


def verl_score(verl_score: Sequence[float], **_: Any) -> Sequence[float]:
    """The gate: verl's own score of each completion."""
    return verl_score


_ASKED = "entra_capture"  # in a batch: the options of the capture
_INCOMING = "entra_incoming"  # in a model's output: incoming attention, as nested as the input ids


class _Engine:
    """Before verl's `FSDPEngineWithLMHead`: returns incoming attention in the forward-only passes that ask for it.

    Raises:
        ValueError: sequence parallelism, or a model with positions for pictures.
    """

    module: Any
    _get_packed_pad_size: Callable[[int], int]

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        size = engine_config.ulysses_sequence_parallel_size
        if size > 1:
            raise ValueError(
                f"ulysses_sequence_parallel_size={size} cuts sequences, so no rank sees the attention of a whole one. "
                f"model_type={MODEL_TYPE} needs actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=1"
            )
        model_config.model_type = "language_model"  # verl builds the model by this name
        super().__init__(model_config, engine_config, *args, **kwargs)  # type: ignore[call-arg]
        policy = _policy(model_config)
        self._entra_encoder = Encoder(policy.tokenizer, policy.model, {})

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> tuple[Any, dict[str, Any]]:
        from verl.utils import tensordict_utils as tu

        options = tu.get_non_tensor_data(micro_batch, _ASKED, None)
        if options is None or not forward_only:
            result: tuple[Any, dict[str, Any]] = super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore[misc]
            return result
        ids = micro_batch["input_ids"]
        if micro_batch["position_ids"].dim() == 3:
            raise ValueError("the model has positions for pictures, but ENTRA scores text only; use a model of text")
        offsets = ids.offsets()
        lengths, total = offsets.diff(), int(offsets[-1])
        places = {"length": self._counted(lengths, micro_batch["responses"])}
        packed = tu.get_non_tensor_data(micro_batch, "use_remove_padding", True)
        if packed:
            places["cu_seqlens"] = offsets
            pads = self._get_packed_pad_size(total)
            if pads:  # a sequence of its own, of which nothing counts
                places["cu_seqlens"] = torch.cat([offsets, offsets.new_tensor([total + pads])])
                places["length"] = torch.nn.functional.pad(places["length"], (0, 1))
        with capture_incoming_attention(self.module, **places, **options) as captured:  # type: ignore[arg-type]
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore[misc]
        incoming = captured.incoming
        if packed:
            values = incoming[0, :total]
        else:
            values = incoming[torch.arange(incoming.shape[1], device=incoming.device) < lengths.to(incoming.device)[:, None]]
        output["model_output"][_INCOMING] = torch.nested.nested_tensor_from_jagged(values, offsets.to(incoming.device))
        return loss, output

    def _counted(self, lengths: Tensor, responses: Any) -> Tensor:
        """int64 [B], how many tokens of rows of `lengths` [B] count: trailing EOS and pads of the responses do not."""
        rows = [row.tolist() for row in responses.unbind()]
        return lengths.cpu() - torch.tensor([len(row) - len(self._entra_encoder.trimmed(row)) for row in rows])


class _Trainer:
    """Before verl's `PPOTrainerSync`: writes ENTRA's reward of the live policy to `rm_scores`.

    It logs what `EntraReward` logs, as `entra/score`, `entra/group_std` and so on. Its options are those of `Options`.

    Raises:
        ValueError: a key of verl's configuration that does not go with it; the message names it.
    """

    config: Any

    def __init__(self, config: Any) -> None:
        _check(config)
        self._entra = Options.of(config)
        self._entra_reward = self._entra.reward()
        config.trainer.v1.trainer_mode = "sync"  # all else that verl has goes by this name
        super().__init__(config)  # type: ignore[call-arg]

    @cached_property
    def _entra_policy(self) -> Policy:
        from verl.utils.config import omega_conf_to_dataclass

        return _policy(omega_conf_to_dataclass(self.config.actor_rollout_ref.model))

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        import transfer_queue as tq
        from tensordict import TensorDict

        wanted = self._entra_reward.config
        batch.extra_info[_ASKED] = {
            "statistic": wanted.attention_statistic,
            "head_reduction": wanted.head_reduction,
            "backend": wanted.backend,
        }
        real = [not tag.get("is_padding", False) for tag in batch.tags]
        batch = super()._compute_old_log_prob(batch, metrics)  # type: ignore[misc]
        batch.extra_info.pop(_ASKED, None)  # the pass of the reference needs none
        fields = ["uid", "prompts", "responses", "response_mask", "log_probs", _INCOMING, "rm_scores"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        rows = [r for r, one in enumerate(real) if one]
        scores = [row.clone() for row in data["rm_scores"].unbind()]
        rewards = self._entra_rewards(data, rows, [float(scores[r].sum()) for r in rows], metrics)
        for r, reward in zip(rows, rewards, strict=True):
            scores[r] *= self._entra.score_weight
            scores[r][-1] += self._entra.weight * (reward or 0.0)
        new = {"rm_scores": torch.nested.as_nested_tensor(scores, layout=torch.jagged)}
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(new, batch_size=len(scores)))
        return batch

    def _entra_rewards(
        self, data: Any, rows: Sequence[int], scores: Sequence[float], metrics: dict[str, Any]
    ) -> list[float | None]:
        """ENTRA's rewards of some rows of the batch, whose prompts are told apart by verl's `uid`."""
        uids = list(data["uid"])
        prompts, responses, own, logprobs, incoming = (
            [data[name].unbind()[r] for r in rows] for name in ("prompts", "responses", "response_mask", "log_probs", _INCOMING)
        )
        groups = [uids[r] for r in rows]
        completions = [row.tolist() for row in responses]
        ids = ([row.tolist() for row in prompts], completions, [row.tolist() for row in own])
        rollout = _Computed(*self._entra_policy, groups, *ids)
        # verl's log-prob at position i is that of the token at i + 1; incoming attention is that of the token at i.
        rollout.computed = [
            TokenSignals(l[p.numel() - 1 : p.numel() - 1 + n].float(), mu[p.numel() : p.numel() + n])
            for p, l, mu, n in zip(prompts, logprobs, incoming, (len(row.completion) for row in rollout.sequences), strict=True)
        ]
        with bound(self._entra_policy, rollout):
            columns = {"verl_score": scores, "log_metric": metrics.__setitem__}
            return self._entra_reward(groups, completions, completions, **columns)


class _Computed(Rollout):
    """A batch whose signals, tools' tokens included, verl's workers have computed."""

    computed: list[TokenSignals]

    def signals(self, config: ScoreConfig) -> list[TokenSignals]:
        return self._without_tools(self.computed)


def _policy(model_config: Any) -> Policy:
    """All that scoring asks of a policy whose weights are elsewhere: its configs and its tokenizer."""
    configs = SimpleNamespace(config=model_config.hf_config, generation_config=model_config.generation_config)
    return Policy(configs, model_config.tokenizer)


def _check(config: Any) -> None:
    """Raises a ValueError for a configuration under which log-probs or incoming attention would not be those of the policy."""
    from omegaconf import OmegaConf

    rules = (
        ("actor_rollout_ref.model.model_type", None, MODEL_TYPE, "it is what returns incoming attention"),
        ("actor_rollout_ref.rollout.temperature", 1, 1, "verl divides the logits by it, and scores are of the policy as it is"),
        ("algorithm.rollout_correction.bypass_mode", False, False, "scores come from the pass for old log-probs"),
        ("entra.config.ranking_scope", "completion", "completion", "verl's batch has signals of completions only"),
    )
    for key, default, needed, why in rules:
        value = OmegaConf.select(config, key, default=default)
        if value != needed:
            raise ValueError(f"{key}={value}, but trainer.v1.trainer_mode={TRAINER_MODE} needs {needed}: {why}")


def _register_engine(module: Any) -> None:
    """After `verl.workers.engine.fsdp.transformer_impl` was imported."""
    engine = type("EntraEngine", (_Engine, module.FSDPEngineWithLMHead), {})
    module.EngineRegistry.register(MODEL_TYPE, ["fsdp", "fsdp2"], ["cuda", "npu", "cpu"])(engine)


def _register_trainer(module: Any) -> None:
    """After `verl.trainer.ppo.v1.trainer_sync` was imported."""
    module.register_trainer(TRAINER_MODE)(type("EntraTrainer", (_Trainer, module.PPOTrainerSync), {}))


_AWAITED: dict[str, Callable[[Any], None]] = {
    "verl.workers.engine.fsdp.transformer_impl": _register_engine,
    "verl.trainer.ppo.v1.trainer_sync": _register_trainer,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets Python find the modules that are awaited as ever, and registers what is ours once they have run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in _AWAITED else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                _AWAITED[name](module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


# verl imports what an entry point names, and calls nothing.
sys.meta_path.insert(0, _Finder())
for _name, _register in _AWAITED.items():
    if _name in sys.modules:
        _register(sys.modules[_name])
