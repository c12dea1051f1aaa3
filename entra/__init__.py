"""ENTRA: rewards for reasoning traces that do not repeat themselves (arXiv 2601.07123).

    rewards = entra.score_batch(prompts, completions, model=model, tokenizer=tokenizer)

Importing this loads torch and nothing heavier: transformers, trl and triton load when they are used.
"""

from entra.capture import capture_incoming_attention
from entra.config import ScoreConfig
from entra.policy import bind_policy
from entra.reward import EntraReward
from entra.score import Scores, score_batch

__all__ = ["EntraReward", "ScoreConfig", "Scores", "bind_policy", "capture_incoming_attention", "score_batch"]
__version__ = "0.1.0"
