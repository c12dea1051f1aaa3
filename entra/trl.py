"""TRL's GRPO and RLOO trainers, scoring with the live policy.

    trainer = entra.EntraGRPOTrainer(model=model, reward_funcs=[accuracy_reward, entra.score_batch], args=args, ...)

Decisions taken here:

- A mixin overrides three methods and calls each of them. `_generate` keeps the token ids. `_get_per_token_logps_and_entropies`
  lets the capture ride on the log-prob pass that TRL makes of the policy anyway. `_calculate_rewards` binds the policy while
  the reward functions run. No method of TRL's is copied; `tests/entra/test_trl_drift.py` says what is relied on.
- TRL makes such a pass only when generation and optimisation steps are not aligned, or with vLLM and its importance sampling
  correction. Otherwise scoring runs one more forward, without gradients. So it does where the numbers of TRL's pass are not
  those of `score_batch`: a temperature other than 1, dropout, rows that are masked out, an adapter switched off.
- A pass may run the model on the rows as they are padded, or packed one after the other into a single row. Which, is read from
  the token ids that reach the embedding; on anything else scores do not ride, so that none is taken for another row's.
- That forward runs before the reward functions are called, on every rank alike. So a gate's decision cannot make ranks of a
  sharded model run different numbers of forwards.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from entra.capture import Capture, capture_incoming_attention
from entra.config import TRAINER_OPTIONS, ScoreConfig, check_integer, nearest_of
from entra.forward import check_scorable, unwrapped
from entra.gates import called_once, one_batch
from entra.policy import Policy, bound, load_policy
from entra.reward import EntraReward, check_names
from entra.rollout import Rollout
from entra.score import score_batch
from entra.verify import verify


class _LivePolicy:
    """The mixin; it goes before a trainer of TRL's."""

    # Where `_generate` returns the mask of the tokens that the policy wrote itself.
    _own_position: int | None = None
    reward_funcs: list[Any]

    def __init__(self, *args: Any, verify_every: int = 0, verify_on_breach: str = "raise", **kwargs: Any) -> None:
        check_integer("verify_every", verify_every, 0, "scoring calls, or 0 for never")
        if verify_on_breach not in ("raise", "warn"):
            raise ValueError(f"verify_on_breach={verify_on_breach!r} must be 'raise' or 'warn'")
        signature = inspect.signature(super().__init__)
        _check_keywords(type(self), signature, kwargs)
        _check_arguments(signature.bind(*args, **kwargs).arguments)
        super().__init__(*args, **kwargs)
        _check_tokenizer(self._tokenizer)  # type: ignore[attr-defined]
        _check_sharding(getattr(self.accelerator.state, "fsdp_plugin", None))  # type: ignore[attr-defined]
        check_scorable(self.model)  # type: ignore[attr-defined]
        check_names(self.reward_func_names)  # type: ignore[attr-defined]
        self._entra_configs = _live_configs(self.reward_funcs)
        if verify_every and not self._entra_configs:
            raise ValueError(
                f"verify_every={verify_every}, but there is nothing to verify: no reward function is entra.score_batch or a "
                "live entra.EntraReward. Put one of them in; a function of yours that calls score_batch is not verified"
            )
        if self.beta == 0 and any(_is_ungated(reward) for reward in self.reward_funcs):  # type: ignore[attr-defined]
            warnings.warn(
                "beta=0 and a live ENTRA reward without a gate: nothing holds the policy near where it started. r alone is "
                "highest for a few different tokens, or for gibberish that never repeats. Gate the reward, "
                "entra.EntraReward(gate=accuracy_reward, min_length=..., min_mean_logprob=...), or set beta > 0",
                UserWarning,
                stacklevel=2,
            )
        self._entra_verify_every = verify_every
        self._entra_on_breach = verify_on_breach
        self._entra_calls = 0
        self._entra_rollout: Rollout | None = None
        self._entra_adapters: object = None
        self._entra_warned = False

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        output: tuple[Any, ...] = super()._generate(prompts)  # type: ignore[misc]
        if any(map(_has_images, prompts)) or any(self._tool_images(output)):
            raise ValueError("a prompt or a tool's answer has images, but ENTRA scores text only; train with trl's own trainer")
        own = None if self._own_position is None else output[self._own_position]
        self._entra_rollout = Rollout(self.model, self._tokenizer, prompts, output[0], output[1], own)  # type: ignore[attr-defined]
        self._entra_adapters = _adapters(self.model)  # type: ignore[attr-defined]
        return output

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        logprobs_of = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        config = self._config_to_ride_on(model, kwargs)
        if config is None or self._entra_rollout is None:
            result: tuple[Any, ...] = logprobs_of(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs
            )
            return result
        rollout, first = self._entra_rollout, input_ids.shape[1] - logits_to_keep
        start = torch.tensor([first - len(row.prompt) for row in rollout.sequences])
        length = torch.tensor([len(row.prompt) + len(row.completion) for row in rollout.sequences])
        whole = attention_mask.sum(dim=1).cpu() >= length  # rows that are masked out have no completion
        logprobs, incoming = [], []
        for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            with (
                capture_incoming_attention(
                    model,
                    statistic=config.attention_statistic,
                    head_reduction=config.head_reduction,
                    backend=config.backend,
                ) as captured,
                _riding(model, captured, input_ids[part], attention_mask[part], start[part], length[part]) as ride,
            ):
                captured.refuse_other_rope = False  # the rollout leaves such rows out
                logprobs.append(logprobs_of(model, input_ids[part], attention_mask[part], logits_to_keep, **kwargs)[0])
            incoming.append(ride.incoming())
            if not ride.fits:
                whole[part] = False
                self._warn_of_a_pass_of_our_own()
        joined = torch.cat(logprobs)
        rollout.record(config, joined, torch.cat(incoming), first, whole.tolist())
        return joined, None, None

    def _warn_of_a_pass_of_our_own(self) -> None:
        if not self._entra_warned:
            warnings.warn(
                f"the log-prob pass of {type(self).__name__} does not run the rows in one forward, padded or packed in order "
                "into one row. So it cannot give scores, and ENTRA runs another forward for them",
                UserWarning,
                stacklevel=3,
            )
        self._entra_warned = True

    def _config_to_ride_on(self, model: Any, kwargs: dict[str, Any]) -> ScoreConfig | None:
        """The config whose signals this pass can yield: one of the policy as it generated, over text, at temperature 1."""
        if (
            torch.is_grad_enabled()
            or model is not self.model  # type: ignore[attr-defined]
            or self._entra_rollout is None
            or self._entra_rollout.is_recorded
            or self.temperature != 1.0  # type: ignore[attr-defined]
            or any(value is not None and value is not False for value in kwargs.values())  # images, entropies, auxiliary loss
            or _adapters(model) != self._entra_adapters
            or _has_dropout(model)
        ):
            return None
        return next((config for config in self._entra_configs if config.ranking_scope == "completion"), None)

    def _tool_images(self, output: tuple[Any, ...]) -> list[Any]:
        return [] if self._own_position is None else output[-1] or []

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rollout, self._entra_rollout = self._entra_rollout, None
        for config in self._entra_configs:
            if rollout is not None:
                rollout.signals(config)
        if rollout is not None:
            self._verify(rollout)
        functions = self.reward_funcs
        self.reward_funcs = _gates_called_once(functions)
        try:
            with bound(Policy(self.model, self._tokenizer), rollout), one_batch():  # type: ignore[attr-defined]
                return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        finally:
            self.reward_funcs = functions

    def _verify(self, rollout: Rollout) -> None:
        self._entra_calls += 1
        if not self._entra_verify_every or self._entra_calls % self._entra_verify_every:
            return
        row = self._entra_calls // self._entra_verify_every % len(rollout.sequences)
        config = next((c for c in self._entra_configs if c.ranking_scope == "completion"), self._entra_configs[0])
        deviation = verify(rollout, row, config)
        for name, value in deviation.metrics().items():
            self._log_metric(f"entra/verify/{name}", value)  # type: ignore[attr-defined]
        breach = deviation.breach()
        if breach is not None and self._entra_on_breach == "raise":
            raise RuntimeError(breach)
        if breach is not None:
            warnings.warn(breach, RuntimeWarning, stacklevel=2)


class EntraGRPOTrainer(_LivePolicy, GRPOTrainer):
    """`trl.GRPOTrainer` in which `entra.score_batch` and `entra.EntraReward` without a model score the live policy.

        trainer = entra.EntraGRPOTrainer(model=model, reward_funcs=[entra.EntraReward(gate=accuracy_reward)], args=args, ...)

    If TRL makes a log-prob pass of the policy, the scores come from that pass and no extra forward runs. Otherwise scoring
    costs one forward without gradients. All arguments of `trl.GRPOTrainer` are taken as they are.

    Args:
        verify_every: at every n-th scoring call, score one sequence again with the pure-PyTorch reference and log how far the
            kernels are off. It takes the first 2,048 tokens at most, one head at a time. 0: never.
        verify_on_breach: what to do when that exceeds the error budget: "raise" a RuntimeError, or "warn".

    Raises:
        ValueError: at construction: reward weights that are all zero, two rewards of one name, a tokenizer without EOS, FSDP1,
            an option out of its range, nothing to verify. Also a model whose attention cannot be captured; prompt tuning makes
            one, too, because of its virtual tokens.
        TypeError: an unknown keyword (the message says what takes it), a class instead of an instance.
        OSError: the weights of a frozen scorer cannot be loaded.
        RuntimeError: a model without a language-model head; while training, numbers beyond the error budget.

    Source: docs/training.md.
    """

    _own_position = 2


class EntraRLOOTrainer(_LivePolicy, RLOOTrainer):
    """`trl.RLOOTrainer` in which `entra.score_batch` and `entra.EntraReward` without a model score the live policy.

    Arguments, errors and source are those of `EntraGRPOTrainer`.
    """


class _Ride:
    """What one forward of a trainer's log-prob pass ran the model on: B padded rows, or the same rows packed into one."""

    def __init__(self, captured: Capture, input_ids: Tensor, attention_mask: Tensor, start: Tensor, length: Tensor) -> None:
        self._captured = captured
        self._input_ids = input_ids
        self._mask = attention_mask.bool()
        self._start = start
        self._length = length
        self._forwards = 0
        self._packed = False
        self.fits = True
        """Whether the attention that was captured is that of the rows, each by itself."""
        captured.expect(start=start, length=length)

    def before(self, embedding: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """The pre-forward hook of the embedding: says to the capture where the rows lie in the ids that arrive."""
        self._forwards += 1
        self.fits = self._forwards == 1
        self._packed = False
        given = args[0].to(self._input_ids.device)
        if torch.equal(given, self._input_ids):
            self._captured.expect(start=self._start, length=self._length)
        elif torch.equal(given, self._input_ids[self._mask][None]):
            self._packed = True
            counts = self._mask.sum(dim=1).cpu()
            ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            self._captured.expect(cu_seqlens=ends, length=torch.minimum(self._length, counts))
        else:
            self.fits = False
            self._captured.expect()

    def incoming(self) -> Tensor:
        """float32 [B, N] in the places of the padded rows; zeros where it does not fit them."""
        if not self.fits:
            return torch.zeros(self._input_ids.shape, device=self._input_ids.device)
        incoming = self._captured.incoming
        if not self._packed:
            return incoming
        padded = incoming.new_zeros(self._input_ids.shape)
        padded[self._mask.to(padded.device)] = incoming[0]
        return padded


@contextmanager
def _riding(
    model: Any, captured: Capture, input_ids: Tensor, attention_mask: Tensor, start: Tensor, length: Tensor
) -> Iterator[_Ride]:
    """Looks at what reaches the embedding inside the block; where a compiled model does not tell, the rows are padded."""
    ride = _Ride(captured, input_ids, attention_mask, start, length)
    handle = unwrapped(model).get_input_embeddings().register_forward_pre_hook(ride.before)
    try:
        yield ride
    finally:
        handle.remove()


def _check_keywords(trainer: type, signature: inspect.Signature, keywords: dict[str, Any]) -> None:
    """Raises a TypeError for a keyword that no trainer takes; it names what takes it."""
    parameters = signature.parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = next((name for name in keywords if name not in parameters), None)
    if unknown is None:
        return
    config = RLOOConfig if issubclass(trainer, RLOOTrainer) else GRPOConfig
    elsewhere = {
        **{field.name: f"entra.EntraReward(config=entra.ScoreConfig({field.name}=...))" for field in fields(ScoreConfig)},
        **{name: f"entra.EntraReward({name}=...)" for name in inspect.signature(EntraReward).parameters},
        **{field.name: f"args=trl.{config.__name__}({field.name}=...)" for field in fields(config)},
    }
    remedy = nearest_of(unknown, (*parameters, *TRAINER_OPTIONS), elsewhere)
    raise TypeError(f"{trainer.__name__}() got an unknown keyword {unknown!r}; {remedy}")


def _check_arguments(arguments: dict[str, Any]) -> None:
    """What TRL would only fail on later, or not at all."""
    args, rewards = arguments.get("args"), arguments.get("reward_funcs")
    weights = getattr(args, "reward_weights", None)
    if weights and not any(weights):
        raise ValueError(f"reward_weights={weights} are all zero, so that nothing is trained; give one of them a weight")
    for reward in rewards if isinstance(rewards, list) else [rewards]:
        if inspect.isclass(reward):
            raise TypeError(f"reward_funcs holds the class {reward.__name__}, which scores nothing; pass an instance of it")
        if isinstance(reward, EntraReward) and isinstance(reward.model, str | os.PathLike):
            check_scorable(load_policy(os.fspath(reward.model)).model)
        if isinstance(reward, functools.partial) and reward.func is score_batch:
            raise ValueError(
                f"reward_funcs holds functools.partial(score_batch, {', '.join(reward.keywords)}), but under TRL score_batch "
                "takes its keywords for dataset columns; use entra.EntraReward(config=...)"
            )
    if arguments.get("processing_class") is not None:
        _check_tokenizer(getattr(arguments["processing_class"], "tokenizer", arguments["processing_class"]))


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no EOS token, so no completion would ever end and nothing could stand for a pad; "
            "set tokenizer.eos_token (and pad_token) first, and pass it as processing_class"
        )


def _has_images(prompt: Any) -> bool:
    """Whether a chat prompt holds anything but text."""
    contents = (message.get("content") for message in prompt) if isinstance(prompt, list) else ()
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(part.get("type") != "text" for part in parts)


def _check_sharding(fsdp_plugin: Any) -> None:
    """`fsdp_plugin` is accelerate's, None without FSDP."""
    if getattr(fsdp_plugin, "fsdp_version", None) == 1:
        raise ValueError(
            "fsdp_version=1, but ENTRA scores under FSDP2 only. FSDP1 does not tell which weights are in parts, so ranks with "
            "unequal numbers of forwards would wait for each other. Set fsdp_version: 2 in accelerate's config (its default "
            "is 1), or fsdp_config={'version': 2} in the training arguments"
        )


def _live_configs(rewards: list[Any]) -> list[ScoreConfig]:
    """Configs of the rewards that score the live policy, each once."""
    configs: list[ScoreConfig] = []
    for reward in rewards:
        config = None
        if reward is score_batch:
            config = ScoreConfig()
        elif isinstance(reward, EntraReward) and reward.model is None:
            config = reward.config
        if config is not None and config not in configs:
            configs.append(config)
    return configs


def _gates_called_once(rewards: list[Any]) -> list[Any]:
    """The reward functions, those that are gates as well in the form that is called once for each batch."""
    gates = [reward.gate for reward in rewards if isinstance(reward, EntraReward) and reward.gate is not None]
    return [functools.partial(called_once, reward) if any(reward == gate for gate in gates) else reward for reward in rewards]


def _is_ungated(reward: Any) -> bool:
    return reward is score_batch or (isinstance(reward, EntraReward) and reward.model is None and reward.gate is None)


def _adapters(model: Any) -> object:
    """Which adapters of a PEFT model are on: TRL switches them for the reference pass, on the same model."""
    layers = (
        (name, module) for name, module in model.named_modules() if isinstance(getattr(module, "disable_adapters", None), bool)
    )
    return [(name, tuple(layer.active_adapters), layer.disable_adapters) for name, layer in layers]


def _has_dropout(model: Any, training: bool = False) -> bool:
    """Whether a forward in the model's present mode is random, or with `training` in the mode that it is trained in."""
    for module in model.modules():
        p = module.p if isinstance(module, torch.nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if (training or module.training) and isinstance(p, int | float) and p > 0:
            return True
    return False
