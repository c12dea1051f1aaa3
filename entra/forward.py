"""One forward of the policy that yields log-probabilities and incoming attention of chosen tokens, and no logits.

A hook on the language-model head takes the hidden states on their way in. It turns those of the wanted positions into
log-probabilities, in chunks, and lets only a few positions through. So the model computes logits of those instead of
[B, N, vocabulary], whatever its class. The work happens while the head's weight is whole: FSDP2 and ZeRO-3 gather it only for
the head's forward. What the model does to its logits after the head (scaling, softcap) is read from its config. The
model goes on with what the head yields in float32, whatever the model's precision. It must return exactly that with the known
transform. So an unknown transform is an error and never a silently wrong number.

Rows are padded on the right and run without an attention mask, which is exact for causal models: no token sees a later one.
Rows whose RoPE would change with a longer one beside them (`entra/rope.py`) do not share its forward. A prompt may run once,
and its rows' completions behind it (`entra/prompts.py`). A forward of either kind calls the same modules in the same order. So
ranks that hold parts of the model need to agree on nothing but the number of forwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from entra.capture import OverRanks, capture_incoming_attention, scored_layer
from entra.config import ScoreConfig
from entra.rope import RopeGroups, forgetful_rope
from entra_kernels import linear_token_logprobs, token_logprobs

if TYPE_CHECKING:
    from entra.prompts import Prompts

# So many tokens of a prompt that ran count as one of a forward behind it, which holds their keys and values of one layer at a
# time: 384 numbers a token in SmolLM2, 2,048 in Qwen3-8B. The MLP alone holds 4,608 and 36,864 for a token that runs.
_CACHED = 8

# Logits of one chunk when the head must be called as a module (LoRA on the head, quantised heads): 2**24 are 64 MiB in float32.
_CHUNK_LOGITS = 2**24

# Rows of logits that the model computes itself, to be compared with ours: this many, and at least one of each sequence.
_CHECKED_ROWS = 16
_CHECKED_POSITIONS = 4

# Padded tokens of one forward when the config leaves it open. A CPU is busy with a single row, and padding only adds to it.
_CPU_TOKEN_BUDGET, _DEVICE_TOKEN_BUDGET = 1_024, 16_384


LogprobsBy = Callable[[str, Tensor, Tensor], Tensor]
"""(backend, hidden [n, C], ids [n]) to log-probs [n], through one head."""


class TokenSignals(NamedTuple):
    """What the method needs of one row: `logprobs` and `incoming`, float32 [n] each, for its last n tokens."""

    logprobs: Tensor
    incoming: Tensor


class _LogitTransform(NamedTuple):
    """What the model does between head and logits: `softcap * tanh(scale * z / softcap)`."""

    scale: float
    softcap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Inspector(Protocol):
    """Looks at what the kernels are given, in the middle of a forward (`entra.verify`)."""

    def attention(self, q: Tensor, k: Tensor, options: dict[str, Any], over_ranks: OverRanks) -> None:
        """q and k of the scored layer, the other arguments of `incoming_attention`, and how ranks put heads together."""

    def head(self, logprobs_by: LogprobsBy, weight: Tensor | None, hidden: Tensor, ids: Tensor) -> None:
        """Hidden states on their way into the head, the ids that they predict, and their log-probs by any backend."""


def check_scorable(model: Any) -> None:
    """Raises a ValueError when no layer of the model can be scored or it adds virtual tokens, a RuntimeError when it has no
    head."""
    scored_layer(model)
    adapters = getattr(model, "peft_config", {})
    if isinstance(adapters, dict) and any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        raise ValueError("the adapter adds virtual tokens (prompt tuning), whose attention is not that of text; use LoRA")
    _head_of(unwrapped(model))


def token_signals(
    model: Any,
    rows: Sequence[Sequence[int]],
    last: Sequence[int],
    config: ScoreConfig,
    inspector: Inspector | None = None,
) -> list[TokenSignals]:
    """Log-probabilities and incoming attention of the last `last[r]` tokens of each row.

    Args:
        model: a transformers causal LM or a wrapper around one. Its mode, config and hooks are as before afterwards.
        rows: token ids. Row r needs at least last[r] + 1 of them, because the first token of a sequence has no log P.
        last: how many tokens of each row are wanted. A row of 0 is left out of the forwards.
        config: `token_budget`, `share_prompts`, `attention_statistic`, `head_reduction` and `backend` are used.
        inspector: looks at every forward.

    Returns:
        One `TokenSignals` per row, on the model's device, not dependent on how the rows were split into forwards. Where ranks
        hold parts of the model, every rank must call this the same number of times, with as many rows as it likes. Ranks with
        fewer forwards run empty ones until all have run the same number. The ranks of a tensor-parallel model must
        pass the same rows.

    Raises:
        ValueError: no layer of the model can be scored (see `entra.capture`).
        RuntimeError: the model has no head that can be hooked, or changes its logits in a way that is not known.
    """
    from entra.prompts import heads_not_repeated, may_mix_prompts, most_pads, shared_prompts, tokens_together, why_whole

    model = unwrapped(model)
    _register_head(model)
    signals = [TokenSignals(torch.zeros(0), torch.zeros(0))] * len(rows)
    with _lock(model), torch.no_grad(), _evaluation_mode(model), forgetful_rope(model) as forget:
        device = model.get_input_embeddings().weight.device
        budget = config.token_budget or (_CPU_TOKEN_BUDGET if device.type == "cpu" else _DEVICE_TOKEN_BUDGET)
        lengths, rope = [len(row) for row in rows], RopeGroups(model)
        may_share = inspector is None and why_whole(model, config) is None
        groups = shared_prompts(rows, last, rope, device) if may_share else []
        whole = {r for r, n in enumerate(last) if n}.difference(*groups)
        batches = _micro_batches(whole, lengths, budget, rope)
        most = most_pads(device)
        before = [length - n for length, n in zip(lengths, last, strict=True)]
        prompts = [rows[members[0]][: before[members[0]]] for members in groups]
        plan: list[tuple[list[int], list[list[int]]]] = []  # prompts of one forward, and the rows of each behind it
        for batch in _micro_batches(range(len(groups)), [len(ids) for ids in prompts], tokens_together(budget), rope, most):
            pools = [groups[g] for g in batch]
            pools = [list(chain(*pools))] if may_mix_prompts(model) else pools
            plan.append((batch, [part for pool in pools for part in _micro_batches(pool, lengths, budget, rope, most, before)]))
        ours = len(batches) + sum(1 + len(parts) for _, parts in plan)
        # Asked before the first forward: a rank that waits here takes part in nobody's forward.
        forwards = _most_forwards(ours) if forwards_are_collective(model) else ours
        for batch in batches:
            forget()
            results = _forward(model, device, [rows[r] for r in batch], [last[r] for r in batch], config, inspector)
            for r, result in zip(batch, results, strict=True):
                signals[r] = result
        for ran, parts in plan:
            forget()
            prompt_of = {r: i for i, g in enumerate(ran) for r in groups[g]}
            firsts = [(i, rows[r][before[r]]) for r, i in prompt_of.items()]
            cached, logprobs = _run_prompts(model, device, [prompts[g] for g in ran], firsts, config)
            first = dict(zip(prompt_of, logprobs, strict=True))
            for batch in parts:
                forget()
                completions, behind = [rows[r][before[r] :] for r in batch], (cached, [prompt_of[r] for r in batch])
                with heads_not_repeated(device):
                    results = _forward(model, device, completions, [last[r] for r in batch], config, behind=behind)
                for r, result in zip(batch, results, strict=True):
                    signals[r] = TokenSignals(torch.cat([first[r], result.logprobs]), result.incoming)
            del cached, behind  # before the next prompts have theirs
        for _ in range(forwards - ours):
            _forward(model, device, [[0, 0]], [1], config)
    return signals


def forwards_are_collective(model: Any) -> bool:
    """Whether the ranks of this run hold parts of the model (FSDP2, ZeRO-3), so that all of them must run each forward."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def _most_forwards(ours: int) -> int:
    """The largest number of forwards that a rank has; every rank must ask."""
    counts: list[Any] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, ours)
    return max(counts)


_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()


def _lock(model: Any) -> threading.RLock:
    """One thread at a time runs a set of weights: hooks, mode and the captured module's config belong to its forward. Models
    around the same weights (PEFT and its base) have their input embeddings in common."""
    return _LOCKS.setdefault(model.get_input_embeddings(), threading.RLock())


def unwrapped(model: Any) -> Any:
    """The model inside DDP, DeepSpeed (`.module`) and torch.compile (`._orig_mod`); FSDP2 and PEFT need no unwrapping."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        # DeepSpeed's engine has a `config` too, a dict of its own settings.
        if inner is None and not hasattr(getattr(model, "config", None), "get_text_config"):
            inner = getattr(model, "module", None)
        if inner is None:
            return model
        model = inner


def _register_head(model: Any) -> None:
    """Tell ZeRO-3 that the model's own forward needs the head's weights whole, as TRL's fused head does, which never calls it.

    DeepSpeed finds that out by itself where the weights are in parts when they are asked for. After a pass of ours, which calls
    the head, it fetches them ahead: then they are whole in a trainer's forward, and gone in its backward.
    """
    weights = [weight for weight in _head_of(model).parameters() if hasattr(weight, "ds_id")]
    if weights:
        from deepspeed.runtime.zero import register_external_parameter  # type: ignore[import-not-found]

        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        for weight in weights:
            register_external_parameter(causal_lm, weight)


def _micro_batches(
    rows: Iterable[int],
    lengths: Sequence[int],
    token_budget: int,
    groups: RopeGroups,
    most_pads: int | None = None,
    before: Sequence[int] | None = None,
) -> list[list[int]]:
    """The indices `rows` in batches, longest first. The padded tokens of a batch stay within the budget (one row always fits),
    no row has more pads than `most_pads`, and all have the same RoPE as alone. Of the `before` tokens of a row that are in
    a cache, `_CACHED` count as one."""
    cached = before or [0] * len(lengths)
    batches: list[list[int]] = []
    new = most_cached = longest = 0  # of the last batch: tokens that run of its first row, and the most of any row
    least = 0.0  # what its smallest row weighs
    for r in sorted(rows, key=lambda r: (cached[r] - lengths[r], -cached[r], r)):
        own = lengths[r] - cached[r]
        weight, behind, total = own + cached[r] / _CACHED, max(most_cached, cached[r]), max(longest, lengths[r])
        weighs = new + behind / _CACHED  # each row of the batch, padded
        if (
            batches
            and weighs * (len(batches[-1]) + 1) <= token_budget
            and (most_pads is None or weighs - min(least, weight) <= most_pads)
            and groups.of(total) == groups.of(lengths[batches[-1][0]]) == groups.of(lengths[r])
        ):
            batches[-1].append(r)
            most_cached, longest, least = behind, total, min(least, weight)
        else:
            batches.append([r])
            new, most_cached, longest, least = own, cached[r], lengths[r], weight
    return batches


def _run_prompts(
    model: Any, device: torch.device, prompts: list[Sequence[int]], firsts: list[tuple[int, int]], config: ScoreConfig
) -> tuple[Prompts, tuple[Tensor, ...]]:
    """The keys and values of `prompts`, and log P, [1] each, of `firsts`: tokens behind the prompt of an index."""
    from transformers import DynamicCache

    from entra.prompts import Prompts, takes_positions

    input_ids, length = _padded(prompts)
    cache = DynamicCache()
    ends = torch.arange(len(prompts)) * input_ids.shape[1] + length - 1
    positions = ends[[i for i, _ in firsts]].to(device)
    targets = torch.tensor([token for _, token in firsts], device=device)
    told = takes_positions(model)
    place = {"position_ids": torch.arange(input_ids.shape[1], device=device).expand(input_ids.shape)} if told else {}
    with _head_logprobs(model, input_ids.shape, positions, targets, config.backend) as head:
        output = model(input_ids=input_ids.to(device), past_key_values=cache, use_cache=True, return_dict=True, **place)
    head.check(output.logits)
    return Prompts(cache, length.tolist(), told), head.logprobs.to(device).split(1)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, N], zeros behind each row, and the rows' lengths [B]."""
    length = torch.tensor([len(row) for row in rows])
    input_ids = torch.zeros(len(rows), int(length.max()), dtype=torch.long)
    for r, row in enumerate(rows):
        input_ids[r, : len(row)] = torch.as_tensor(row)
    return input_ids, length


def _forward(
    model: Any,
    device: torch.device,
    rows: list[Sequence[int]],
    last: list[int],
    config: ScoreConfig,
    inspector: Inspector | None = None,
    behind: tuple[Prompts, list[int]] | None = None,
) -> list[TokenSignals]:
    """Signals of the last tokens of rows, whole or each behind one of the prompts that ran. There the first token's log P is
    not among them."""
    input_ids, length = _padded(rows)
    tokens = input_ids.shape[1]
    # The token at position i is predicted by the hidden state at i - 1.
    places = [torch.arange(max(n - m, 1) - 1, n - 1) for n, m in zip(length.tolist(), last, strict=True)]
    positions = torch.cat([r * tokens + place for r, place in enumerate(places)])
    targets = input_ids.view(-1)[positions + 1].to(device)
    positions, input_ids = positions.to(device), input_ids.to(device)
    cached, arguments = torch.zeros_like(length), {"use_cache": False}
    if behind is not None:
        ran, prompts = behind
        cached, arguments = torch.tensor([ran.lengths[i] for i in prompts]), ran.behind(prompts, length, device)
    before = int(cached.max())
    with (
        _head_logprobs(model, input_ids.shape, positions, targets, config.backend) as head,
        capture_incoming_attention(
            model,
            start=None if int(cached.min()) == before else (before - cached).to(device),
            length=(cached + length).to(device),
            statistic=config.attention_statistic,
            head_reduction=config.head_reduction,
            backend=config.backend,
        ) as captured,
    ):
        if inspector is not None:
            head.inspect, captured.inspect = inspector.head, inspector.attention
        output = model(input_ids=input_ids, return_dict=True, **arguments)
    head.check(output.logits)
    logprobs = head.logprobs.to(device).split([len(place) for place in places])
    incoming = captured.incoming.to(device)[:, before:]
    return [
        TokenSignals(logprobs[r], incoming[r, n - m : n]) for r, (n, m) in enumerate(zip(length.tolist(), last, strict=True))
    ]


class _HeadLogprobs:
    """Hooks on the language-model head: log-probabilities of the wanted positions, logits of a few, of the last one always."""

    def __init__(
        self, transform: _LogitTransform, vocabulary: int, shape: torch.Size, positions: Tensor, targets: Tensor, backend: str
    ) -> None:
        self._transform = transform
        self._vocabulary = vocabulary
        self._shape = shape
        self._positions = positions
        self._targets = targets
        self._backend = backend
        self._busy = False
        self._logprobs: Tensor | None = None
        self._yielded: Tensor | None = None
        self.inspect: Callable[[LogprobsBy, Tensor | None, Tensor, Tensor], None] | None = None

    @property
    def logprobs(self) -> Tensor:
        """float32 [positions]; RuntimeError when the head never ran."""
        return self._finished()[0]

    def _finished(self) -> tuple[Tensor, Tensor]:
        """The log-probs, and what the head yielded for the positions let through, [B, P, V]."""
        if self._logprobs is None or self._yielded is None:
            raise RuntimeError(
                "the model's forward did not call the head that get_output_embeddings() names; pass another model"
            )
        return self._logprobs, self._yielded

    def before(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The pre-forward hook: takes hidden [B, N, C], lets [B, P, C] through."""
        if self._busy:
            return None
        hidden = args[0]
        if hidden.shape[:2] != self._shape:
            raise RuntimeError(
                f"the head received hidden states of shape {list(hidden.shape)} for ids of shape {list(self._shape)}; adapters "
                "that add virtual tokens (prompt tuning) cannot be scored: merge or disable the adapter"
            )
        self._busy = True  # the head may be called below, and must then run as it is
        try:
            self._logprobs = self._compute(head, hidden)
        finally:
            self._busy = False
        sequences, tokens = self._shape
        count = min(max(1, min(_CHECKED_POSITIONS, _CHECKED_ROWS // sequences)), tokens)
        through = torch.linspace(tokens - 1, 0, count, device=hidden.device).round().long()
        return (hidden[:, through], *args[1:])

    def after(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The forward hook, ahead of all others: keeps the head's own output, and has the model go on with it in float32."""
        if self._busy:
            return None
        precise = output.to(torch.promote_types(output.dtype, torch.float32))
        self._yielded = precise.clone()  # what the model does to it may happen in place
        return precise

    def _compute(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """Log-probs of the wanted positions."""
        wanted = hidden.reshape(-1, hidden.shape[-1])[self._positions.to(hidden.device)]
        targets = self._targets.to(hidden.device)
        plain = _is_plain_linear(head)
        weight: Any = head.weight if plain else None
        bias: Any = head.bias if plain else None

        def logprobs_by(backend: str, hidden: Tensor, targets: Tensor) -> Tensor:
            if plain:
                return linear_token_logprobs(
                    hidden.to(weight.dtype),
                    weight,
                    targets,
                    bias=bias,
                    logit_scale=self._transform.scale,
                    softcap=self._transform.softcap,
                    backend=backend,
                )
            tokens = max(1, _CHUNK_LOGITS // self._vocabulary)
            chunks = zip(hidden.split(tokens), targets.split(tokens), strict=True)
            return torch.cat([token_logprobs(self._transform(head(h).float()), t, backend=backend) for h, t in chunks])

        if self.inspect is not None:
            self.inspect(logprobs_by, weight, wanted, targets)
        return logprobs_by(self._backend, wanted, targets)

    def check(self, logits: Tensor) -> None:
        """Raises a RuntimeError when the model's own logits [B, P, V] are not what the log-probs were computed from."""
        _, yielded = self._finished()
        expected = self._transform(yielded)
        got = logits.to(expected)
        # Each logit by itself: a few roundings of the transform, and one more where the model returns another precision. Those
        # that are not finite are not compared: their rows become None, and must not take the others with them.
        rounding = 8 * torch.finfo(expected.dtype).eps
        if logits.dtype != expected.dtype:
            rounding += torch.finfo(logits.dtype).eps
        tolerance = rounding * expected.abs() + torch.finfo(logits.dtype).smallest_normal
        if got.shape != expected.shape or bool((~((got - expected).abs() <= tolerance) & expected.isfinite()).any()):
            raise RuntimeError(
                f"the model changes its head's output in a way that is not known (known: logit_scale={self._transform.scale}, "
                f"softcap={self._transform.softcap}, no hooks on the head); score with your own logprobs=..., or another model"
            )


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether the head is a matrix product and no more: no adapter, no quantised weight, nobody's forward but its own."""
    weight = getattr(head, "weight", None)
    return (
        type(head).forward is nn.Linear.forward
        and "forward" not in vars(head)
        and type(weight) is nn.Parameter
        and weight.is_floating_point()
    )


def _head_of(model: Any) -> nn.Module:
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise RuntimeError(
            f"{type(model).__name__} has no language-model head (get_output_embeddings() is None); pass a causal LM"
        )
    return head


@contextmanager
def _head_logprobs(model: Any, shape: torch.Size, positions: Tensor, targets: Tensor, backend: str) -> Iterator[_HeadLogprobs]:
    head = _head_of(model)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    hook = _HeadLogprobs(_logit_transform(model), vocabulary, shape, positions, targets, backend)
    handles = [head.register_forward_pre_hook(hook.before), head.register_forward_hook(hook.after, prepend=True)]
    try:
        yield hook
    finally:
        for handle in handles:
            handle.remove()


def _logit_transform(model: Any) -> _LogitTransform:
    """From the config: Cohere multiplies by logit_scale, Falcon-H1 by lm_head_multiplier, Granite divides by logits_scaling,
    Gemma 2 to 4 cap at final_logit_softcapping, RecurrentGemma at logits_soft_cap."""
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    # HyperCLOVA X multiplies by it, and MiniCPM3 divides the hidden states, before the head.
    scale *= {"hyperclovax": scaling, "minicpm3": 1.0}.get(config.model_type, 1 / scaling)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return _LogitTransform(scale, float(softcap) if softcap else None)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every submodule is in the mode it was in, also when they differed."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
