"""ENTRA: rewards for reasoning traces that do not repeat themselves (arXiv 2601.07123).

    rewards = entra.score_batch(prompts, completions, model=model, tokenizer=tokenizer)

Importing this loads nothing: torch, transformers, trl and triton load when they are used.
"""

from __future__ import annotations

import importlib

from entra.name_clash import name_clash

TYPE_CHECKING = False  # typing takes longer than all else here, and Ctrl-C is not quiet until this file is through
if TYPE_CHECKING:
    from typing import Any

    from entra.capture import capture_attention, capture_incoming_attention
    from entra.config import ScoreConfig
    from entra.diagnosis import doctor
    from entra.policy import bind_policy
    from entra.reward import EntraReward
    from entra.score import CompletionScores, Scores, score_batch
    from entra.trl import EntraGRPOTrainer, EntraRLOOTrainer

_MODULES = {
    "CompletionScores": "score",
    "EntraGRPOTrainer": "trl",
    "EntraRLOOTrainer": "trl",
    "EntraReward": "reward",
    "ScoreConfig": "config",
    "Scores": "score",
    "bind_policy": "policy",
    "capture_attention": "capture",
    "capture_incoming_attention": "capture",
    "doctor": "diagnosis",
    "score_batch": "score",
}

__all__ = [
    "CompletionScores",
    "EntraGRPOTrainer",
    "EntraRLOOTrainer",
    "EntraReward",
    "ScoreConfig",
    "Scores",
    "bind_policy",
    "capture_attention",
    "capture_incoming_attention",
    "doctor",
    "score_batch",
]
__version__ = "0.2.0"

if (_clash := name_clash()) is not None:
    import warnings

    warnings.warn(_clash, RuntimeWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module 'entra' has no attribute {name!r}")
    module = f"entra.{_MODULES.get(name, name)}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise AttributeError(f"module 'entra' has no attribute {name!r}") from None
        if module != "entra.trl" or error.name != "trl":
            raise
        raise ModuleNotFoundError(
            f"entra.{name} needs TRL, which is not installed; pip install 'entra-reward[train]'", name="trl"
        ) from error
    return getattr(found, name) if name in _MODULES else found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
