"""`score_batch`: from prompts and completions to rewards. It encodes, runs the policy, calls the kernels, assembles."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from entra.config import ScoreConfig, nearest_of, options_elsewhere
from entra.copies import copied_tokens
from entra.encode import EncodedRow, Encoder, as_ids
from entra.forward import TokenSignals, token_signals, unwrapped
from entra.policy import Policy, bound_rollout, resolve_policy
from entra.rarefaction import rarefied_redundancy
from entra_kernels import first_places, redundancy
from entra_kernels._checks import shown

if TYPE_CHECKING:
    from entra.view.notebook import NotebookView

_SHOWN = 20
"""Completions that `Scores.show()` shows unasked."""

_OPTIONS = ("completion_ids", "model", "tokenizer", "logprobs", "incoming", "config", "details")


@dataclass(frozen=True, kw_only=True, eq=False)
class CompletionScores:
    """The reward of one completion of n tokens, and what it was made of: CPU tensors [n].

    The tokens are the completion's, without pads and trailing EOS.
    """

    reward: float | None
    """r in [0, 1], high when the unprotected tokens do not repeat. None where a log-prob or attention is not finite."""
    token_ids: Tensor
    """int64 ids."""
    logprobs: Tensor
    """float32, log P(x_i given x_<i), natural log."""
    incoming: Tensor
    """float32, mu: mean attention from future tokens (or lift)."""
    importance: Tensor
    """float32, logprob_weight * log P + lambda * mu: log P + lambda * mu by default."""
    protected: Tensor
    """bool, the tokens of highest importance (copies last with `copy_ngram`), which the reward does not look at."""
    reward_ngram: int = 1
    """n of the n-grams that the reward counts; 1 for tokens."""

    def __eq__(self, other: object) -> bool:
        """Whether reward and every element are equal."""
        if not isinstance(other, CompletionScores):
            return NotImplemented
        tensors = ("token_ids", "logprobs", "incoming", "importance", "protected")
        return self.reward == other.reward and all(torch.equal(getattr(self, n), getattr(other, n)) for n in tensors)

    @cached_property
    def counts(self) -> Counter[int]:
        """How often each token id occurs among the unprotected tokens."""
        return Counter(self.token_ids[~self.protected].tolist())

    @cached_property
    def ngram_counts(self) -> Counter[int]:
        """How often each n-gram that the reward counts ends at an unprotected token, by where it ended first; `counts` if n is
        1."""
        if self.reward_ngram == 1:
            return self.counts
        bounds = torch.tensor([0, self.token_ids.numel()])
        places = first_places(self.token_ids, bounds, ngram=self.reward_ngram, backend="torch")
        return Counter(places[~self.protected].tolist())

    @property
    def unprotected(self) -> int:
        """M, the number of unprotected tokens."""
        return self.counts.total()

    @property
    def entropy(self) -> float:
        """Of the n-grams' frequencies at the unprotected tokens, in nats: from 0, all the same, to log M, all different."""
        total = self.unprotected
        return math.log(total) - sum(c * math.log(c) for c in self.ngram_counts.values()) / total if total else 0.0

    @property
    def repeated_share(self) -> float:
        """Share of the unprotected tokens whose n-gram came before among them, (M - different n-grams) / M, in [0, 1)."""
        return 1 - len(self.ngram_counts) / self.unprotected if self.unprotected else 0.0

    @property
    def redundant_tokens(self) -> float | None:
        """D = M (1 - r): 0 when no unprotected token repeats, M when all are the same; None where r means nothing."""
        unprotected = int((~self.protected).sum())
        return None if self.reward is None or unprotected <= 1 else unprotected * (1.0 - self.reward)


@dataclass(frozen=True, kw_only=True)
class Scores(Sequence[CompletionScores]):
    """The scores of all completions: a sequence of `CompletionScores`, and each of their fields as a list.

    The tokens are the completion's, without pads and trailing EOS.
    """

    rewards: list[float | None]
    """r in [0, 1], high when the unprotected tokens do not repeat. None where a log-prob or attention is not finite."""
    token_ids: list[Tensor]
    """int64 ids."""
    logprobs: list[Tensor]
    """float32, log P(x_i given x_<i), natural log."""
    incoming: list[Tensor]
    """float32, mu: mean attention from future tokens (or lift)."""
    importance: list[Tensor]
    """float32, logprob_weight * log P + lambda * mu: log P + lambda * mu by default."""
    protected: list[Tensor]
    """bool, the tokens of highest importance (copies last with `copy_ngram`), which the reward does not look at."""
    config: ScoreConfig
    """The options that produced all this."""
    tokenizer: Any = field(default=None, repr=False, compare=False)
    """The policy's, for the text of the tokens. None where ids were scored without one."""

    def __len__(self) -> int:
        return len(self.rewards)

    @overload
    def __getitem__(self, index: int) -> CompletionScores: ...
    @overload
    def __getitem__(self, index: slice) -> list[CompletionScores]: ...
    def __getitem__(self, index: int | slice) -> CompletionScores | list[CompletionScores]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return CompletionScores(
            reward=self.rewards[index],
            token_ids=self.token_ids[index],
            logprobs=self.logprobs[index],
            incoming=self.incoming[index],
            importance=self.importance[index],
            protected=self.protected[index],
            reward_ngram=self.config.reward_ngram,
        )

    def show(self, rows: int | slice | None = None) -> NotebookView:
        """Show completions in a notebook, with every token shaded by importance; elsewhere, as text.

        Args:
            rows: the index of one completion, or a slice. None: the first 20.

        Raises:
            IndexError: there is no completion of that index.
        """
        from entra.view.notebook import NotebookView
        from entra.view.trace import Trace, pieces_of

        count = len(self.rewards)
        if isinstance(rows, int) and not -count <= rows < count:
            raise IndexError(f"rows={rows} must be an index of the {count} completions")
        chosen = [range(count)[rows]] if isinstance(rows, int) else range(count)[slice(_SHOWN) if rows is None else rows]
        traces = [
            Trace(
                name=f"completion {i}",
                prompt="",
                pieces=pieces_of(self.tokenizer, self.token_ids[i].tolist()),
                scores=self[i],
                error=None if self.rewards[i] is not None else "a log-prob or incoming attention is not finite",
            )
            for i in chosen
        ]
        more = f"The first {_SHOWN} of {count}; others: show(index) or show(slice)." if rows is None and count > _SHOWN else ""
        return NotebookView(traces, more)


@overload
def score_batch(
    prompts: Sequence[Any],
    completions: Sequence[Any] | None,
    completion_ids: Sequence[Any] | None = ...,
    *,
    model: Any | None = ...,
    tokenizer: Any | None = ...,
    logprobs: Sequence[Any] | None = ...,
    incoming: Sequence[Any] | None = ...,
    config: ScoreConfig | None = ...,
    details: Literal[False] = ...,
    **columns: Any,
) -> list[float | None]: ...
@overload
def score_batch(
    prompts: Sequence[Any],
    completions: Sequence[Any] | None,
    completion_ids: Sequence[Any] | None = ...,
    *,
    model: Any | None = ...,
    tokenizer: Any | None = ...,
    logprobs: Sequence[Any] | None = ...,
    incoming: Sequence[Any] | None = ...,
    config: ScoreConfig | None = ...,
    details: Literal[True],
    **columns: Any,
) -> Scores: ...
def score_batch(
    prompts: Sequence[Any],
    completions: Sequence[Any] | None,
    completion_ids: Sequence[Any] | None = None,
    *,
    model: Any | None = None,
    tokenizer: Any | None = None,
    logprobs: Sequence[Any] | None = None,
    incoming: Sequence[Any] | None = None,
    config: ScoreConfig | None = None,
    details: bool = False,
    **columns: Any,
) -> list[float | None] | Scores:
    """`entropy(unprotected token ids) / log(M)` of each completion: 1 when nothing repeats, 0 when all is the same.

    It has the signature of a TRL reward function, so it is one: `reward_funcs=[accuracy_reward, entra.score_batch]`. TRL passes
    `trainer_state`. Then the bound policy scores (`entra.EntraGRPOTrainer`, `entra.bind_policy`), and every other keyword is a
    dataset column that is left alone, whatever its name. For options under TRL use `entra.EntraReward`.

    Args:
        prompts: one per completion: text, chat messages, or token ids. Here and in the next arguments, rows may come as a list,
            a Series, or an array or tensor [B, N].
        completions: text, assistant messages, or token ids. May be None if `completion_ids` is given.
        completion_ids: token ids to score, instead of tokenising `completions`. Pads and trailing EOS are dropped.
        model: a transformers causal LM (also wrapped by PEFT, DDP, FSDP2 or torch.compile), a folder or hub name, or "smollm2".
            None: the policy bound by `entra.bind_policy`.
        tokenizer: the model's. Not needed for token ids, nor for a model given by name.
        logprobs: float [n] per completion. Log P of its tokens (natural log, at most 0), for example from a trainer's pass.
            With `logprobs` and `incoming` given, no forward runs.
        incoming: float [n] per completion. The mean incoming attention of its tokens, in 0 to 1 (lift: at least 0), from
            `entra.capture_incoming_attention`.
        config: the options of the method. None: the defaults.
        details: return `Scores` instead of the rewards alone.

    Returns:
        One float in [0, 1] per completion, or None (with a warning) where a value was not finite. With `details` a `Scores`.

    Raises:
        ValueError: numbers of rows differ, or a row cannot be encoded (see `entra.encode`). Or logprobs or incoming do not fit
            the tokens or are out of their range. Or the model cannot be scored.
        TypeError: an unknown keyword (the message names the nearest right one), an argument that does not hold rows, or a row
            that is neither text nor messages nor ids.
        RuntimeError: no model at all, logprobs or incoming that require grad, a model whose logits cannot be reproduced.

    Source: arXiv 2601.07123; docs/method.md.
    """
    if "trainer_state" in columns:
        model = tokenizer = logprobs = incoming = config = None
        details = False
    elif columns:
        name = next(iter(columns))
        raise TypeError(f"score_batch() got an unknown keyword {name!r}; {nearest_of(name, _OPTIONS, options_elsewhere())}")
    config = ScoreConfig() if config is None else config
    if not isinstance(config, ScoreConfig):
        raise TypeError(f"config={shown(config)} must be an entra.ScoreConfig, not {type(config).__name__}")
    prompts = _listed("prompts", prompts)
    count = len(prompts)
    completions, completion_ids = _listed("completions", completions, count), _listed("completion_ids", completion_ids, count)
    logprobs, incoming = _listed("logprobs", logprobs, count), _listed("incoming", incoming, count)
    given = completions if completion_ids is None else completion_ids
    if given is None:
        raise ValueError("completions=None and completion_ids=None; one of them must be given")

    policy = resolve_policy(model, tokenizer)
    if policy is None and count and (logprobs is None or incoming is None):
        raise RuntimeError(
            "there is no model to score with; pass model=... (and tokenizer=... for text), or call inside "
            "entra.bind_policy(model, tokenizer) or entra.EntraGRPOTrainer, or pass logprobs and incoming. TRL's async trainer "
            "runs rewards in a process without the policy; there model=... is the only way"
        )
    rollout = bound_rollout() if model is None and logprobs is None and incoming is None else None
    if rollout is not None and rollout.holds(prompts, completion_ids):
        rows, signals = rollout.rows(), rollout.signals(config)
        copied = rollout.copied(config, _device(signals))
    else:
        with_prompts = logprobs is None or incoming is None or config.copy_ngram is not None
        rows = _encode(prompts, given, policy, tokenizer, config, with_prompts)
        signals = _signals(rows, policy, logprobs, incoming, config, given)
        copied = copied_tokens(rows, config, _device(signals))
    scores = _assemble(rows, signals, copied, config, tokenizer if policy is None else policy.tokenizer)
    return scores if details else scores.rewards


def score_rows(rows: list[EncodedRow], policy: Policy, config: ScoreConfig) -> list[CompletionScores | str]:
    """The scores of rows that are token ids already, or "not finite: message" where a value is not finite."""
    signals = _run(rows, policy, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows that are not finite: they get an error
        scores = _assemble(rows, signals, copied_tokens(rows, config, _device(signals)), config, policy.tokenizer)
    return list(map(finite, scores))


def finite(scores: CompletionScores) -> CompletionScores | str:
    """The scores, or "kind: message" where a value of theirs is not finite."""
    if scores.reward is None:
        return "not finite: a log-probability or attention of this row is not finite under this model"
    return scores


@overload
def _listed(name: str, rows: Sequence[Any], count: None = ...) -> list[Any]: ...
@overload
def _listed(name: str, rows: Sequence[Any] | None, count: int) -> list[Any] | None: ...
def _listed(name: str, rows: Any, count: int | None = None) -> list[Any] | None:
    """The rows of an argument, `count` of them; None stays None where there is a count. Also those of an array or a tensor
    [B, N], and those of a pandas Series, which looks its labels up where a list counts."""
    if rows is None and count is not None:
        return None
    if isinstance(rows, str | bytes):
        raise TypeError(f"{name}={rows[:40]!r} must be a list with one entry per completion, not a single text; use [{name}]")
    if isinstance(rows, Mapping | Set) or not hasattr(rows, "__len__") or getattr(rows, "ndim", 1) == 0:
        raise TypeError(
            f"{name}={shown(rows)} must be a list with one entry per completion (or an array, a tensor or a Series), not "
            f"{type(rows).__name__}"
        )
    if count is not None and len(rows) != count:
        raise ValueError(f"{name} has {len(rows)} rows but prompts has {count}; there must be one per prompt")
    return list(rows)


def _encode(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    policy: Policy | None,
    tokenizer: Any | None,
    config: ScoreConfig,
    with_prompts: bool,
) -> list[EncodedRow]:
    """Token ids of every row; of the completions alone when neither a forward nor an option looks at the prompts."""
    model = None if policy is None else unwrapped(policy.model)
    encoder = Encoder(tokenizer if policy is None else policy.tokenizer, model, config.chat_template_kwargs)
    rows = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        try:
            rows.append(
                encoder.encode(prompt, completion) if with_prompts else EncodedRow([], encoder.encode_completion(completion))
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"row {i}: {error}") from error
    return rows


def _signals(
    rows: list[EncodedRow],
    policy: Policy | None,
    logprobs: Sequence[Any] | None,
    incoming: Sequence[Any] | None,
    config: ScoreConfig,
    given: Sequence[Any],
) -> list[TokenSignals]:
    """Log-probs and incoming attention of each row's ranked tokens: those given, else those of a forward."""
    if (logprobs is not None or incoming is not None) and config.ranking_scope != "completion":
        raise ValueError(
            f"ranking_scope={config.ranking_scope!r} ranks prompt tokens too, but logprobs and incoming hold the completion's; "
            "leave them out, or use ranking_scope='completion'"
        )
    computed: list[TokenSignals] = []
    if logprobs is None or incoming is None:
        computed = _run(rows, policy, config)
    signals = []
    for i, row in enumerate(rows):
        ranked = len(row.ranked(config.ranking_scope))
        ids = as_ids(given[i])
        length = None if ids is None else len(ids)
        signals.append(
            TokenSignals(
                computed[i].logprobs if logprobs is None else _given("logprobs", i, logprobs[i], ranked, length, config),
                computed[i].incoming if incoming is None else _given("incoming", i, incoming[i], ranked, length, config),
            )
        )
    return signals


def _run(rows: list[EncodedRow], policy: Policy | None, config: ScoreConfig) -> list[TokenSignals]:
    if policy is None:
        return []  # there are no rows
    wanted = [len(row.ranked(config.ranking_scope)) for row in rows]
    return token_signals(policy.model, [row.prompt + row.completion for row in rows], wanted, config)


def _given(name: str, i: int, value: Any, tokens: int, untrimmed: int | None, config: ScoreConfig) -> Tensor:
    """One row of values that were passed in: [n], or with values for the trailing EOS and pads that were dropped."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"row {i}: {name} requires grad, but scores have no gradient; pass {name} detached")
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"row {i}: {name} must be one number per completion token, not {type(value).__name__}: {error}"
        ) from error
    if tensor.ndim != 1 or tensor.shape[0] not in (tokens, untrimmed):
        raise ValueError(
            f"row {i}: {name} has shape {list(tensor.shape)} but the completion has {tokens} tokens without pads and trailing "
            "EOS; give one number per completion token"
        )
    _check_range(name, i, tensor[:tokens], config)
    return tensor[:tokens]


_ROUNDING = 1e-3
"""How far a value that was computed in some other precision may stick out of its range."""


def _check_range(name: str, i: int, values: Tensor, config: ScoreConfig) -> None:
    """Raises a ValueError for a value that no model can yield. What is not finite is left alone: its row gets no reward."""
    low, high = -math.inf, 0.0
    rule = "log-probabilities are at most 0: pass natural logarithms"
    if name == "incoming" and config.attention_statistic == "lift":
        low, high, rule = 0.0, math.inf, "lift is at least 0: pass what entra.capture_incoming_attention yields"
    elif name == "incoming":
        low, high, rule = 0.0, 1.0, "mean attention lies in 0 to 1: divide sums by the number of future queries"
    outside = ((values < low - _ROUNDING) | (values > high + _ROUNDING)) & values.isfinite()
    if bool(outside.any()):
        token = int(outside.nonzero()[0])
        raise ValueError(f"row {i}: {name} holds {float(values[token]):g} at token {token}; {rule}")


def _device(signals: list[TokenSignals]) -> torch.device:
    """Where the rewards are computed: where most of a row's signals are."""
    return max((signal.logprobs for signal in signals), key=Tensor.numel, default=torch.empty(0)).device


def _assemble(
    rows: list[EncodedRow], signals: list[TokenSignals], copied: list[Tensor] | None, config: ScoreConfig, tokenizer: Any
) -> Scores:
    ranked = [torch.tensor(row.ranked(config.ranking_scope), dtype=torch.int64) for row in rows]
    lengths = [ids.numel() for ids in ranked]
    if not rows:
        return Scores(
            rewards=[], token_ids=[], logprobs=[], incoming=[], importance=[], protected=[], config=config, tokenizer=tokenizer
        )
    device = _device(signals)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device)
    counted_ids = torch.cat(ranked).to(device)
    if config.reward_ngram > 1:
        counted_ids = first_places(counted_ids, bounds, ngram=config.reward_ngram, backend=config.backend)
    logprobs = torch.cat([signal.logprobs.to(device) for signal in signals])
    result = redundancy(
        logprobs if config.logprob_weight == 1 else config.logprob_weight * logprobs,
        torch.cat([signal.incoming.to(device) for signal in signals]),
        counted_ids,
        bounds,
        attention_weight=config.attention_weight,
        protect_fraction=config.protect_fraction,
        degenerate_reward=config.degenerate_reward,
        protect_last=None if copied is None else torch.cat(copied),
        backend=config.backend,
    )
    counted = ranked if config.reward_ngram == 1 else list(counted_ids.cpu().split(lengths))
    protected = list(result.protected.cpu().split(lengths))
    importance = list(result.importance.cpu().split(lengths))
    rewards: list[float | None] = []
    for i, reward in enumerate(result.reward.tolist()):
        if not math.isfinite(reward):
            warnings.warn(f"row {i}: a log-prob or incoming attention is not finite; its reward is None", RuntimeWarning, 3)
            rewards.append(None)
            continue
        unprotected = counted[i][~protected[i]]
        if unprotected.numel() <= 1:
            reward = config.degenerate_reward  # as given, not rounded to float32
        elif config.length_adjusted is not None:
            reward = rarefied_redundancy(unprotected, config.length_adjusted)
        rewards.append(reward)

    def completion(values: Sequence[Tensor]) -> list[Tensor]:
        return [value.cpu()[value.numel() - len(row.completion) :] for value, row in zip(values, rows, strict=True)]

    return Scores(
        rewards=rewards,
        token_ids=completion(ranked),
        logprobs=completion([signal.logprobs for signal in signals]),
        incoming=completion([signal.incoming for signal in signals]),
        importance=completion(importance),
        protected=completion(protected),
        config=config,
        tokenizer=tokenizer,
    )
