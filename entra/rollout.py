"""What a trainer generated in one go, and its tokens' signals: computed once, for every reward that asks.

Decisions taken here:

- A reward function gets text and completion ids from a trainer. Prompts are taken as the ids that the trainer generated from.
  So no template or truncation can come out differently a second time.
- Signals that a pass of the trainer yielded anyway are recorded; rows without any get a forward of their own when asked for.
  So do rows whose numbers the pass's padding changes (`entra/rope.py`): they are not those of the row alone.
- Tokens that a tool wrote attend and are attended to, but they are not the policy's: they are neither ranked nor counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entra.config import ScoreConfig
from entra.copies import copied_tokens
from entra.encode import EncodedRow, Encoder, prompt_value
from entra.forward import TokenSignals, forwards_are_collective, token_signals, unwrapped
from entra.rope import RopeGroups, has_seen_longer, sees_left_pads


class _Statistic(NamedTuple):
    """What of a config decides about the signals; everything else happens after them."""

    attention_statistic: str
    head_reduction: str


def _statistic(config: ScoreConfig) -> _Statistic:
    return _Statistic(config.attention_statistic, config.head_reduction)


def _same(one: Any, other: Any) -> bool:
    return one is other or prompt_value(one) == prompt_value(other)


class Rollout:
    """One generated batch of R rows.

    Args:
        model: the policy that will score it, bare or wrapped.
        tokenizer: its tokenizer. It names EOS and pads, which are dropped from the ends.
        prompts: as reward functions get them.
        prompt_ids: token ids of each prompt, without pads.
        completion_ids: token ids of each completion, without pads.
        own: for each completion token 1 when the policy wrote it and 0 when a tool did. None: all are the policy's.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Any],
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        own: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._completion_ids = completion_ids
        encoder = Encoder(tokenizer, unwrapped(model), {})
        self._sequences = [
            EncodedRow(list(prompt), encoder.trimmed([int(i) for i in completion]))
            for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        ]
        self._own = None
        if own is not None:
            self._own = [
                torch.tensor(mask[: len(row.completion)], dtype=torch.bool)
                for mask, row in zip(own, self._sequences, strict=True)
            ]
        self._recorded: dict[_Statistic, list[TokenSignals | None]] = {}
        self._computed: dict[tuple[_Statistic, str], list[TokenSignals]] = {}

    @property
    def model(self) -> Any:
        """The policy."""
        return self._model

    @property
    def is_recorded(self) -> bool:
        """Whether a trainer's own pass has yielded signals."""
        return bool(self._recorded)

    @property
    def sequences(self) -> list[EncodedRow]:
        """The R prompts and completions, without pads and trailing EOS, tools' tokens included."""
        return self._sequences

    def holds(self, prompts: Sequence[Any], completion_ids: Sequence[Any] | None) -> bool:
        """Whether these are the rows of this batch, all of them and in order."""
        return completion_ids is not None and all(
            given is ours or (len(given) == len(ours) and all(map(_same, given, ours)))
            for given, ours in ((prompts, self._prompts), (completion_ids, self._completion_ids))
        )

    def record(self, config: ScoreConfig, logprobs: Tensor, incoming: Tensor, first: int, complete: Sequence[bool]) -> None:
        """Keep the signals of a trainer's own pass over the batch, padded on the left and on the right.

        Args:
            config: names the statistic that was captured.
            logprobs: float [R, C], of the tokens from position `first` on.
            incoming: float [R, N], of all positions.
            first: the position of the first completion token in every row.
            complete: [R], False for rows that the pass did not see whole (masked out). They are computed when asked for. So are
                rows whose numbers the padding changes.

        Raises:
            RuntimeError: the pass saw other positions than those of the batch.
        """
        if incoming.shape[1] != first + logprobs.shape[1]:
            raise RuntimeError(
                f"attention of {incoming.shape[1]} positions for {first + logprobs.shape[1]} tokens: the model adds tokens, so "
                "the scores would go to the wrong ones; use a model that adds none"
            )
        alike = self._as_alone(first, incoming.shape[1])
        self._recorded[_statistic(config)] = [
            TokenSignals(logprobs[r, :n].float(), incoming[r, first : first + n].float()) if complete[r] and alike[r] else None
            for r, n in enumerate(len(row.completion) for row in self._sequences)
        ]

    def _as_alone(self, first: int, width: int) -> list[bool]:
        """Whether a pass padded to `width` positions, completions at `first`, yields the numbers that each row has alone."""
        model = unwrapped(self._model)
        groups, padded_ok = RopeGroups(model), not sees_left_pads(model)
        if has_seen_longer(model):
            return [False] * len(self._sequences)
        return [
            groups.of(len(row.prompt) + len(row.completion)) == groups.of(width) and (padded_ok or len(row.prompt) == first)
            for row in self._sequences
        ]

    def rows(self) -> list[EncodedRow]:
        """The R rows as they are scored: without what tools wrote."""
        if self._own is None:
            return self._sequences
        return [
            EncodedRow(row.prompt, [i for i, mine in zip(row.completion, own.tolist(), strict=True) if mine])
            for row, own in zip(self._sequences, self._own, strict=True)
        ]

    def own_mask(self, r: int) -> Tensor:
        """bool [n], the completion tokens of row r that the policy wrote itself."""
        return torch.ones(len(self._sequences[r].completion), dtype=torch.bool) if self._own is None else self._own[r]

    def signals(self, config: ScoreConfig) -> list[TokenSignals]:
        """Signals of the ranked tokens of `rows()`: recorded ones, and a forward for the rows that have none.

        Where ranks hold parts of the model, all of them must ask for the same configs in the same order.
        """
        key = (_statistic(config), config.ranking_scope)
        if key not in self._computed:
            self._computed[key] = self._without_tools(self._complete(config))
        return self._computed[key]

    def copied(self, config: ScoreConfig, device: torch.device) -> list[Tensor] | None:
        """As `copied_tokens`, of the ranked tokens of `rows()`. A copy of what a tool wrote is one, too."""
        found = copied_tokens(self._sequences, config, device)
        return found if found is None else [self._of_the_policy(r, copied) for r, copied in enumerate(found)]

    def _complete(self, config: ScoreConfig) -> list[TokenSignals]:
        found: list[TokenSignals | None] = [None] * len(self._sequences)
        if config.ranking_scope == "completion":
            found = list(self._recorded.get(_statistic(config), found))
        missing = [r for r, signal in enumerate(found) if signal is None]
        if missing or forwards_are_collective(self._model):
            rows = [self._sequences[r] for r in missing]
            wanted = [len(row.ranked(config.ranking_scope)) for row in rows]
            results = token_signals(self._model, [row.prompt + row.completion for row in rows], wanted, config)
            for r, signal in zip(missing, results, strict=True):
                found[r] = signal
        return [signal for signal in found if signal is not None]

    def _without_tools(self, signals: list[TokenSignals]) -> list[TokenSignals]:
        return [TokenSignals(*(self._of_the_policy(r, values) for values in signal)) for r, signal in enumerate(signals)]

    def _of_the_policy(self, r: int, values: Tensor) -> Tensor:
        """The values of row r's ranked tokens, without those of tokens that a tool wrote."""
        if self._own is None:
            return values
        own = self._own[r]
        ranked_prompt = torch.full((values.numel() - own.numel(),), bool(own.any()))
        return values[torch.cat([ranked_prompt, own]).to(values.device)]
