"""ENTRA: rewards for reasoning traces that do not repeat themselves (arXiv 2601.07123).

    rewards = entra.score_batch(prompts, completions, model=model, tokenizer=tokenizer)

Importing this loads torch and nothing heavier: transformers, trl and triton load when they are used.
"""

import warnings
from typing import TYPE_CHECKING, Any

from entra.capture import capture_incoming_attention
from entra.config import ScoreConfig
from entra.doctor import doctor
from entra.name_clash import name_clash
from entra.policy import bind_policy
from entra.reward import EntraReward
from entra.score import Scores, score_batch

if TYPE_CHECKING:
    from entra.trl import EntraGRPOTrainer, EntraRLOOTrainer

__all__ = [
    "EntraGRPOTrainer",
    "EntraRLOOTrainer",
    "EntraReward",
    "ScoreConfig",
    "Scores",
    "bind_policy",
    "capture_incoming_attention",
    "doctor",
    "score_batch",
]
__version__ = "0.2.0"

if (_clash := name_clash()) is not None:
    warnings.warn(_clash, RuntimeWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name not in ("EntraGRPOTrainer", "EntraRLOOTrainer"):
        raise AttributeError(f"module 'entra' has no attribute {name!r}")
    try:
        import entra.trl
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ModuleNotFoundError(
            f"entra.{name} needs TRL, which is not installed; pip install 'entra-reward[train]'", name="trl"
        ) from error
    return getattr(entra.trl, name)
