"""`ScoreConfig`: every choice of the method, named and recorded with each result."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from entra_kernels._checks import check_ngram, check_number, shown

Class = TypeVar("Class", bound=type)


def names_unknown_options(cls: Class) -> Class:
    """Class decorator: an unknown keyword raises a TypeError that names the nearest right one. For keyword-only classes."""
    original = cls.__init__  # type: ignore[misc]
    known = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def __init__(self: Any, **options: Any) -> None:
        unknown = next((name for name in options if name not in known), None)
        if unknown is not None:
            remedy = nearest_of(unknown, known, options_elsewhere())
            raise TypeError(f"{cls.__name__}() got an unknown keyword {unknown!r}; {remedy}")
        original(self, **options)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def takes_fields_of(config: type) -> Callable[[Class], Class]:
    """Class decorator: the signature of a class that takes the fields of the dataclass `config` as keywords names them."""

    def decorate(cls: Class) -> Class:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        *own, _ = signature.parameters.values()  # the last one is **keywords
        more = [p for p in inspect.signature(config).parameters.values() if p.name not in signature.parameters]
        cls.__init__.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[misc]
        return cls

    return decorate


def nearest_of(name: str, known: Sequence[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """The end of an error message: the name that is meant, or all that are known.

    Args:
        name: what was typed, which is none of `known`.
        known: what would be right here.
        elsewhere: what would be right in another place, and how it is passed there.
    """
    elsewhere = {other: place for other, place in (elsewhere or {}).items() if other not in known}
    if name in elsewhere:
        return f"pass it as {elsewhere[name]}"
    nearest = difflib.get_close_matches(name, [other for other in (*known, *elsewhere) if other != name], n=1, cutoff=0.5)
    if not nearest:
        return f"known are {', '.join(known)}"
    place = elsewhere.get(nearest[0])
    return f"did you mean {nearest[0]!r}?" + (f" Pass it as {place}" if place else "")


TRAINER_OPTIONS = ("verify_every", "verify_on_breach")
"""Options of ENTRA's trainers that are not TRL's."""


def options_elsewhere() -> dict[str, str]:
    """Options that are easily passed to the wrong function, and how they are passed."""
    from entra.reward import EntraReward

    return {
        **{name: f"entra.EntraReward({name}=...)" for name in inspect.signature(EntraReward).parameters},
        **{field.name: f"config=entra.ScoreConfig({field.name}=...)" for field in fields(ScoreConfig)},
        **{name: f"entra.EntraGRPOTrainer({name}=...)" for name in TRAINER_OPTIONS},
        "prompts": "entra.EntraReward(...)(prompts=...): the class is no reward function, its instances are",
    }


# What scoring itself passes to apply_chat_template.
_TEMPLATE_ARGUMENTS = {"conversation", "tokenize", "return_dict", "add_generation_prompt", "continue_final_message"}

Statistic = Literal["mean", "lift"]
HeadReduction = Literal["mean", "max"]
RankingScope = Literal["completion", "sequence"]
Backend = Literal["auto", "reference", "torch", "triton"]


@names_unknown_options
@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How a completion is scored. Frozen, keyword-only, checks itself. The defaults are docs/method.md's.

    Raises:
        ValueError: a value outside its range. The message names the field, the value and the rule.
        TypeError: a value of another type, or an unknown option (the message names the nearest right one).
    """

    attention_weight: float = 2.0
    """lambda in I = logprob_weight * log P + lambda * mu. The paper used 2 for MATH and 1e-4 elsewhere. With 0, log P alone
    ranks."""

    logprob_weight: float = 1.0
    """What log P counts for in I = logprob_weight * log P + lambda * mu. 1 is the paper's: predictable tokens are protected. -1
    ranks by surprisal: what the model did not expect is protected. docs/real-traces.md compares the two on real traces. Our
    option."""

    protect_fraction: float = 0.2
    """tau: the share of the completion's tokens that is protected, in [0, 1]. They are those of highest importance, and the
    reward does not look at them."""

    attention_statistic: Statistic = "mean"
    """"mean": mean attention from future tokens, as in the paper. "lift": each query's attention as a multiple of its uniform
    share. Mean attention falls with the position by itself; lift removes this bias, and is our option."""

    head_reduction: HeadReduction = "mean"
    """How the query heads of the layer become one number. Our choice; the paper's summary does not fix it."""

    ranking_scope: RankingScope = "completion"
    """"completion": prompt tokens attend and are attended to, but only completion tokens are ranked and counted. "sequence":
    the prompt's tokens are ranked and counted too, except the first, which has no log P. Our choice; the paper's summary does
    not fix it."""

    copy_ngram: int | None = None
    """n, tokens, at least 1: a copy is protected last. A token is a copy when the n tokens that end at it stood before in the
    same row, in the prompt or the completion, maybe overlapping. First all other tokens are protected, by importance. Only
    where fewer of them are left than are to be protected, the copies follow, by importance. Importance itself stays as it is.
    None: importance alone decides. Our option."""

    reward_ngram: int = 1
    """n, tokens, at least 1: the reward is the entropy of n-grams. At each unprotected token it counts the n-gram that ends
    there, which may hold protected tokens. N-grams begin in the completion (ranking_scope="sequence": at any ranked token).
    The first n - 1 tokens end none, so each of them counts as an n-gram that occurs once. 1 is the paper's: token frequencies.
    docs/real-traces.md compares the two. Our option."""

    degenerate_reward: float = 0.0
    """The reward when at most one token is unprotected. Entropy over log M is undefined there. 0 is the worst reward: a
    one-token answer must not be the best one."""

    length_adjusted: int | None = None
    """At least 2: report the expected reward of this many unprotected positions, drawn at random (rarefaction). The reward of
    all of them falls with the length by itself. Completions with fewer positions are taken as they are. None: no adjustment."""

    token_budget: int | None = None
    """Padded tokens in one forward; 8 tokens of a shared prompt count as one. It decides memory and speed; results do not
    depend on it. None: 16,384 on a GPU and 1,024 on a CPU, where large batches gain nothing and padding costs as much as
    tokens."""

    share_prompts: bool = True
    """Completions of one prompt share its keys and values, so that it runs once. That is done where it saves a 16th of the
    tokens or more, and a call at least 128 on a CPU or 2,048 on a GPU. `entra doctor` says where a model does not allow it.
    Results are the same within the rounding that another batch brings. False: every row runs whole."""

    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of `apply_chat_template` for chat prompts, e.g. {"enable_thinking": False}."""

    backend: Backend = "auto"
    """The kernels' backend: "auto" is Triton on CUDA and ROCm, else torch."""

    def __post_init__(self) -> None:
        check_number("attention_weight", self.attention_weight, "finite; the paper used 2.0 and 1e-4")
        check_number("logprob_weight", self.logprob_weight, "finite; 1 is the paper's, -1 ranks by surprisal")
        check_number("protect_fraction", self.protect_fraction, "in [0, 1]; 0.2 protects the top 20 %", low=0.0, high=1.0)
        check_number("degenerate_reward", self.degenerate_reward, "finite; rewards lie in 0 to 1")
        check_integer("copy_ngram", self.copy_ngram, 1, "tokens, or None for no difference")
        check_ngram(self.reward_ngram, "reward_ngram")
        check_integer("length_adjusted", self.length_adjusted, 2, "positions, or None for no adjustment")
        check_integer("token_budget", self.token_budget, 1, "tokens, or None")
        if not isinstance(self.share_prompts, bool):
            raise TypeError(f"share_prompts={shown(self.share_prompts)} must be True or False")
        for name, kind in (
            ("attention_statistic", Statistic),
            ("head_reduction", HeadReduction),
            ("ranking_scope", RankingScope),
            ("backend", Backend),
        ):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ValueError(f"{name}={shown(value)} must be one of {', '.join(map(repr, get_args(kind)))}")
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise TypeError(f"chat_template_kwargs={self.chat_template_kwargs!r} must be a mapping of names to values")
        reserved = _TEMPLATE_ARGUMENTS & set(self.chat_template_kwargs)
        if reserved:
            raise ValueError(f"chat_template_kwargs holds {min(reserved)!r}, which scoring sets itself; leave it out")


def check_integer(name: str, value: Any, low: int, unit: str) -> None:
    """Raises when `value` is neither None nor a whole number (TypeError), or below `low` (ValueError)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={shown(value)} must be a whole number of {unit}, not {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}={value} must be at least {low} {unit}")
