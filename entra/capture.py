"""Incoming attention out of one forward of any transformers causal LM, without an N x N matrix.

Attention modules of transformers look their attention function up by name, in `config._attn_implementation`, on every
call, and hand it q and k after RoPE and q/k norms. So for the length of a `with` block each module that is scored
gets a shallow copy of its config that names a function of ours. That function puts the module's own config back, calls
the function that would have run, and reduces q and k to incoming attention. Everything else (the masks, which are built
from the model's config, the other layers, the class) is untouched: the logits stay bit-identical.

Decisions taken here:

- Geometry (first token and length of each row, or the sequences packed into it) comes from the caller. What the attention
  call keeps apart (`entra/packing.py`) must agree with it. Without any geometry the sequences are taken from there: a row
  that packs several is never scored as one.
- What would make a result wrong is looked at on the device and reported when the result is read, so that no forward waits.
- Scale, window, softcap and sinks are those that the attention call receives, head sizes those of its tensors. The
  config decides only which layers are scored.
- Attention runs first. Where it computes the log-sum-exp of these scores anyway, the reduction takes it, and the Triton kernels
  need one pass over them instead of two (`entra/attention_lse.py`).
- With a cache, the queries are the last tokens of the keys. A result has a column for every token up to now. No query sees keys
  that a sliding cache has dropped: they get 0.
- Tensor parallelism gives each rank some of the heads. One exchange of the result makes it that of all of them.
- The name that is registered ends in the original one (`entra_capture|flash_attention_2`), because models ask whether
  "flash" is in the name before they pad v (MLA).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from entra.attention_lse import OBSERVABLE, LseObserver, flex_attention_lse
from entra.packing import (
    Separation,
    begins_sequences,
    beside,
    biased,
    places,
    positions_of,
    separation,
    sequences_of,
    shortened,
    starts_of,
    visible,
)
from entra.rope import RopeGroups, transformers_version
from entra_kernels import incoming_attention
from entra_kernels._checks import shown

_PREFIX = "entra_capture|"

# transformers' names of layers (`ALLOWED_ATTN_LAYER_TYPES`) whose softmax runs over every earlier token, over a window
# of them, or that hold no softmax at all. "hybrid" layers add a recurrent branch beside the attention. Every other
# name (indexed, compressed, chunked, ...) is attention to a subset of the keys that q and k alone do not tell.
_FULL = frozenset({"full_attention", "attention", "hybrid"})
_WINDOWED = frozenset({"sliding_attention", "hybrid_sliding"})
_NO_SOFTMAX = frozenset({"linear_attention", "mamba", "recurrent", "conv", "moe", "mlp"})

# Arguments of an attention call that change the scores or the set of keys. start and length do not tell how.
# They are relative positions (Inkling) and sparse attention (DSA, MiniMax-M3).
_UNSCORABLE_ARGUMENTS = ("position_bias", "indices", "block_indices")

# Layers that carry a state from token to token: no mask keeps packed sequences apart there.
_STATEFUL = frozenset({"linear_attention", "mamba", "recurrent", "conv", "hybrid", "hybrid_sliding"})

_PACKING_REMEDY = "Run one sequence per row, or pass attention_mask=None, use_cache=False and position_ids that start again"


@dataclass(frozen=True, kw_only=True)
class CapturedLayer:
    """The attention layer that was scored, with what its attention call received."""

    index: int
    """The layer's index in the decoder, from 0."""
    name: str
    """The attention module's name in the model that was passed in, as `model.get_submodule` takes it."""
    layer_type: str
    """The entry of `config.layer_types`; "full_attention" or "sliding_attention" where the config has none."""
    sliding_window: int | None
    """How many keys a query sees, itself included; None means all."""
    softcap: float | None
    """The cap of Gemma 2, `softcap * tanh(score / softcap)`; None means none."""
    scale: float
    """What q . k is multiplied by."""
    has_sinks: bool
    """Whether learned sinks take part in the softmax's denominator (gpt-oss)."""
    lse_source: str | None
    """What the attention call computed the log-sum-exp with that was used, like "aten::_scaled_dot_product_flash_attention";
    None when scoring computed its own."""


# Why a result cannot be used; `_Doubt.check` names the token.
_JOINED = (
    "a sequence begins at token {token} of row {row} (position_ids start again, or cu_seq_lens_q says so). The attention "
    "({implementation}) of {name} does not keep it apart from the tokens before it. There is a cache or an attention_mask, or "
    "the model builds its masks without these position_ids (gpt-oss; Qwen2.5-VL and Qwen3-VL unless they are [4, B, N]). "
    + _PACKING_REMEDY
)
_SEVERAL = (
    "row {row} packs several sequences, but start and length describe one sequence per row. The attention ({implementation}) "
    "of {name} keeps token {token} apart from the one before it. Pass cu_seqlens instead, or none of the three"
)
_GIVEN_BUT_JOINED = (
    "cu_seqlens begins a sequence at token {token}, but the attention ({implementation}) of {name} does not keep it apart from "
    "the tokens before it. " + _PACKING_REMEDY
)
_NOT_GIVEN = (
    "the attention ({implementation}) of {name} keeps token {token} apart from the one before it, but cu_seqlens begins no "
    "sequence there; pass the cu_seqlens of what was packed"
)
_OTHER_MASK = (
    "the attention mask of {name} lets token {token} of row {row} see other tokens than the earlier ones of its sequence. "
    "Incoming attention cannot reproduce that. " + _PACKING_REMEDY
)
_CACHED_OTHER_MASK = (
    "the attention mask of {name} lets token {token} of row {row} see other tokens than the earlier ones of its sequence. "
    "With a cache, a row is one sequence without gaps, from `start` to its last token: pad prompts on the left, and pass start"
)
_CACHED_SEVERAL = (
    "row {row} packs several sequences behind a cache: the attention ({implementation}) of {name} keeps token {token} apart "
    "from the one before it. Run one sequence per row"
)
_BIASED = (
    "the attention mask of {name} adds a number to the scores of token {token} of row {row} that neither shows a key (0) "
    "nor hides it (-1000 or less). Incoming attention cannot reproduce that; pass a bool mask, or one of 0 and -inf"
)
_OTHER_ROPE = (
    "token {token} of row {row} has another RoPE in this forward than its sequence alone. LongRoPE and dynamic RoPE depend on "
    "the largest position of a forward, pads included. Pad to the longest sequence only. With LongRoPE, run sequences of up to "
    "original_max_position_embeddings tokens apart from longer ones. With dynamic RoPE that number is max_position_embeddings, "
    "and longer ones run one by one"
)
_COMPILED = (
    "row {row} packs several sequences: the attention of {name} keeps token {token} apart from the one before it. They "
    "cannot be counted inside a compiled model; pass cu_seqlens"
)
_UNREADABLE = (
    "a sequence begins at token {token} of row {row} (position_ids start again, or cu_seq_lens_q says so). What the "
    "attention function {implementation!r} of {name} makes of that is not known; pass cu_seqlens if it keeps the sequences "
    "apart, or run one sequence per row"
)


class _Doubt(NamedTuple):
    """A reason not to use a result, which only the device knows: any true token [B, N]."""

    tokens: Tensor
    message: str
    name: str
    implementation: str

    def check(self) -> None:
        """Raises a RuntimeError that names the first such token."""
        if bool(self.tokens.any()):
            row, token = self.tokens.nonzero()[0].tolist()
            raise RuntimeError(self.message.format(row=row, token=token, name=self.name, implementation=self.implementation))


OverRanks = Callable[[Tensor], Tensor]
"""From a result over the heads of this rank to that over the heads of all ranks; every rank must call it."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The options of `capture_attention` that say what is computed."""

    heads: str
    queries: int | Tensor | None
    reduction: str
    include_diagonal: bool
    accumulate: bool
    backend: str
    reuse_lse: bool

    @property
    def by_head(self) -> bool:
        """Whether the operation must return each query head: adding up parts of a sequence comes before that over heads."""
        return self.heads == "max" or self.accumulate

    def __post_init__(self) -> None:
        for option, allowed in (("heads", ("mean", "max", "query", "kv")), ("reduction", ("mean", "lift", "sum", "max"))):
            value = getattr(self, option)
            if value not in allowed:
                raise ValueError(f"{option}={shown(value)} must be one of {', '.join(map(repr, allowed))}")
        if self.accumulate and self.reduction not in ("sum", "max"):
            raise ValueError(
                f"accumulate=True needs reduction='sum' or 'max', but reduction={self.reduction!r}: means of several forwards "
                "do not add up; take the sum, and divide it by the number of queries"
            )
        if isinstance(self.queries, Tensor) and self.queries.dtype != torch.bool:
            raise TypeError(
                f"queries has dtype {self.queries.dtype}; a tensor of queries must be bool, true where a query counts"
            )


class Capture:
    """One layer of a capture: the result of the last forward run inside the block."""

    def __init__(
        self,
        *,
        config: Any,
        attend: Callable[..., Any],
        index: int,
        name: str,
        layer_type: str,
        unpackable: str | None,
        rope: RopeGroups,
        device_mesh: Any,
        asked: _Asked,
    ) -> None:
        self._config = config
        self._attend = attend
        self._index = index
        self._name = name
        self._layer_type = layer_type
        # Without layer_types all layers are alike, and only the call tells whether they have a window.
        self._uniform = getattr(config, "layer_types", None) is None
        self._unpackable = unpackable
        self._rope = rope
        self._device_mesh = device_mesh
        self._asked = asked
        self._result: tuple[Tensor, CapturedLayer, list[Tensor] | None] | None = None
        self._so_far: Tensor | None = None  # of forwards that are parts of one sequence, by query head
        self._doubts: list[_Doubt] = []
        self._checked = False
        self._positions: Any = None
        self._cache: Any = None
        self.expect()
        self.inspect: Callable[[Tensor, Tensor, dict[str, Any], OverRanks], None] | None = None
        """Called with q, k, the other arguments of `incoming_attention`, and what makes a result of these heads that of all
        heads, for `entra.verify`."""
        self.refuse_other_rope = True
        """Whether rows that have another RoPE in the forward than alone are an error; False for who leaves them out."""

    def called_with(self, arguments: dict[str, Any]) -> None:
        """What the model is called with, by name: some do not hand `position_ids` on to their attention (GPT-BigCode)."""
        self._positions, self._cache = arguments.get("position_ids"), arguments.get("past_key_values")

    def _tokens(self, k: Tensor) -> int:
        """How many tokens the rows of k [B, Hkv, Nk, D] have up to now, those that a sliding cache has dropped included."""
        # A static cache counts on the device: then this waits.
        return k.shape[2] if self._cache is None else int(self._cache.get_seq_length()) or k.shape[2]

    def expect(self, *, start: Tensor | None = None, length: Tensor | None = None, cu_seqlens: Tensor | None = None) -> None:
        """Where the sequences of the next forward lie, in place of what `capture_incoming_attention` was told."""
        self._start, self._length, self._cu_seqlens = start, length, cu_seqlens

    @property
    def incoming(self) -> Tensor:
        """Incoming attention, float32 [B, N], zeros outside the sequences; [1, T] for packed rows. Heads come between the two.

        RuntimeError before a forward, or when attention did not keep apart what was to be scored.
        """
        return self._finished()[0]

    @property
    def layer(self) -> CapturedLayer:
        """The layer that was scored; RuntimeError as for `incoming`."""
        return self._finished()[1]

    @property
    def cu_seqlens(self) -> Tensor | None:
        """int32 [S + 1], where the sequences of packed rows begin and end in `incoming.flatten()`; None: a row is a sequence.

        RuntimeError as for `incoming`.
        """
        incoming, _, packed = self._finished()
        if packed is None:
            return None
        tokens = incoming.shape[-1]
        first = [cu_seqlens[:-1] + row * tokens for row, cu_seqlens in enumerate(packed)]
        return torch.cat([*first, packed[-1][-1:] + (len(packed) - 1) * tokens])

    def _finished(self) -> tuple[Tensor, CapturedLayer, list[Tensor] | None]:
        if self._result is None:
            raise RuntimeError(
                f"nothing was captured: the attention of {self._name!r} did not run inside the with block. Inside "
                "it, call the model that was given to the capture, or a wrapper around it"
            )
        if not self._checked:
            for doubt in self._doubts:
                doubt.check()
            self._checked = True
        return self._result

    def _refuse_unscorable(self, module: Any, q: Tensor, k: Tensor, mask: Any, arguments: dict[str, Any]) -> None:
        """Raise for an attention call that start and length do not describe; q [B, H, N, D], k [B, Hkv, N, D]."""
        batch, _, tokens, _ = q.shape
        unscorable = [name for name in _UNSCORABLE_ARGUMENTS if arguments.get(name) is not None]
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1:
            unscorable.append("a mask per head")  # Doge's dynamic sparse mask
        if arguments.get("is_causal") is False:
            unscorable.append("is_causal=False")
        if unscorable:
            raise RuntimeError(
                f"{self._name} ({type(module).__name__}, {self._layer_type}) attends with {unscorable[0]}. Incoming "
                "attention cannot reproduce that; run one sequence per row through a model with plain attention"
            )
        for name, value in (("start", self._start), ("length", self._length)):
            if self._cu_seqlens is None and value is not None and value.shape != (batch,):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} but the forward ran a batch of {batch}; "
                    f"give one entry per row, shape ({batch},)"
                )
        queries = self._asked.queries
        if isinstance(queries, Tensor) and queries.shape != (batch, tokens):
            raise ValueError(
                f"queries has shape {tuple(queries.shape)} but the forward ran {batch} rows of {tokens} tokens; "
                f"give each token of this forward an entry, shape ({batch}, {tokens})"
            )
        if self._cu_seqlens is not None and batch != 1:
            raise ValueError(
                f"cu_seqlens describes one row of packed sequences, [1, T], but the forward ran a batch of {batch}. "
                "Pack all sequences into one row, or leave cu_seqlens out: the capture then finds them in the call"
            )

    @property
    def _implementation(self) -> str:
        """transformers' name of the attention function."""
        return (self._config._attn_implementation or "eager").removeprefix(_PREFIX)

    def _packed_rows(self, module: Any, q: Tensor, k: Tensor, mask: Any, arguments: dict[str, Any]) -> list[Tensor] | None:
        """cu_seqlens of each row where rows pack several sequences, else None; notes what would make the result wrong."""
        tokens = self._tokens(k)
        held = min(k.shape[2], tokens)
        cached = tokens - q.shape[2]
        self._doubts, self._checked = self._doubts if self._asked.accumulate else [], False
        found = separation(self._implementation, mask, arguments, q, self._positions, held)
        if self._cu_seqlens is not None:
            if cached:
                raise RuntimeError(
                    f"{self._name} attends from {q.shape[2]} queries to {tokens} keys, but cu_seqlens describes whole "
                    "sequences. Pass use_cache=False and no past_key_values, or run one sequence per row"
                )
            return self._given_rows(module, q, mask, arguments, found)
        # A sequence that begins outside of the spans, or with them, does not matter.
        token = torch.arange(cached, tokens, device=q.device)[None]
        first = token.new_zeros(1, 1) if self._start is None else self._start.to(q.device)[:, None]
        length = tokens - first if self._length is None else self._length.to(q.device)[:, None]
        inside = (token >= 0 if self._start is None else token > first) & (token < first + length)
        if self._start is not None or self._length is not None:
            self._doubt_rope(length, inside, arguments, tokens, cached)
        if cached:
            self._doubt_cached_mask(module, mask, arguments, token + 1 - first, inside, held)
        if found is None:
            self._doubt(begins_sequences(arguments, q, self._positions) & inside, _UNREADABLE)
            return None
        self._doubt(found.unclear & ~found.pads & inside, _BIASED)
        self._doubt(found.joined & inside, _JOINED)
        if cached:
            self._doubt(found.opens & inside, _CACHED_SEVERAL)
            return None
        if self._start is not None or self._length is not None:
            self._doubt(found.opens & inside, _SEVERAL)
            return None
        if torch.compiler.is_compiling():
            self._doubt(found.opens, _COMPILED)
            return None
        if not found.may_open or not bool(found.opens.any()):
            return None
        self._refuse_unpackable()
        packed = sequences_of(found)
        self._doubt_mask(module, mask, arguments, packed)
        lengths = torch.stack([cu_seqlens.diff()[places(cu_seqlens, tokens)[0]] for cu_seqlens in packed])
        self._doubt_rope(lengths, ~found.pads, arguments, tokens)
        return packed

    def _given_rows(
        self, module: Any, q: Tensor, mask: Any, arguments: dict[str, Any], found: Separation | None
    ) -> list[Tensor]:
        """The caller's cu_seqlens, compared with what attention keeps apart where that is known."""
        assert self._cu_seqlens is not None
        cu_seqlens, tokens = self._cu_seqlens.to(q.device), q.shape[2]
        if cu_seqlens.numel() > 2:
            self._refuse_unpackable()
        sequence, position = places(cu_seqlens, tokens)
        counts = cu_seqlens.diff() if self._length is None else self._length.to(q.device)
        self._doubt_rope(cu_seqlens.diff()[sequence][None], (position <= counts[sequence])[None], arguments, tokens)
        if found is not None:
            self._doubt(found.unclear & ~found.pads, _BIASED)
            begins = starts_of(cu_seqlens, tokens)[None]
            self._doubt(begins & ~(found.opens | beside(found.pads)), _GIVEN_BUT_JOINED)
            self._doubt(found.opens & ~begins, _NOT_GIVEN)
            self._doubt(found.joined & ~begins, _JOINED)
            self._doubt_mask(module, mask, arguments, [cu_seqlens])
        return [cu_seqlens]

    def _refuse_unpackable(self) -> None:
        if self._unpackable is not None:
            raise RuntimeError(
                f"several sequences are packed into a row, but {self._unpackable}, which carries a state from each into the "
                "next; run one sequence per row"
            )

    def _doubt(self, tokens: Tensor, message: str) -> None:
        """An error with `message` once the result is read, if any of `tokens` [B, N] is true."""
        self._doubts.append(_Doubt(tokens, message, self._name, self._implementation))

    def _doubt_rope(self, lengths: Tensor, inside: Tensor, arguments: dict[str, Any], tokens: int, cached: int = 0) -> None:
        """Tokens `inside` [B, N] of sequences of `lengths` [B or 1, N or 1] must have the RoPE that the sequence has alone.

        So must those that a cache holds; they had that of an earlier forward, of `cached` tokens.
        """
        if not (self._rope.differ and self.refuse_other_rope):
            return
        positions = positions_of(arguments, self._positions)
        longest = lengths.new_tensor(tokens) if positions is None else positions.max().to(lengths.device) + 1
        other = self._rope.other(lengths, longest)
        if cached:
            other |= self._rope.other(longest.new_tensor(cached), longest)
        self._doubt(other & inside, _OTHER_ROPE)

    def _doubt_mask(self, module: Any, mask: Any, arguments: dict[str, Any], packed: list[Tensor]) -> None:
        """The tokens of packed rows must see every earlier one of their sequence and nothing else; [B, 1, N, N] masks."""
        if not (isinstance(mask, Tensor) and mask.ndim == 4) or all(cu_seqlens.numel() <= 2 for cu_seqlens in packed):
            return
        tokens = mask.shape[2]
        seen = visible(mask[:, 0, :, :tokens])
        position = torch.stack([places(cu_seqlens, tokens)[1] for cu_seqlens in packed])
        expected = position.clamp(min=1, max=self._window(module, arguments))
        sees_itself = seen.diagonal(dim1=-2, dim2=-1)
        self._doubt((seen.sum(-1) != expected) & sees_itself, _OTHER_MASK)
        self._doubt(biased(mask[:, 0, :, :tokens]).any(-1) & sees_itself, _BIASED)

    def _doubt_cached_mask(
        self, module: Any, mask: Any, arguments: dict[str, Any], position: Tensor, inside: Tensor, held: int
    ) -> None:
        """Queries behind a cache, at the 1-based `position` [B, Nq] of their row, must see every token up to themselves."""
        window, queries = self._window(module, arguments), position.shape[1]
        if isinstance(mask, Tensor) and mask.ndim == 4:
            seen = visible(mask[:, 0, :, :held]).sum(-1)
        elif isinstance(mask, Tensor) and mask.ndim == 2:  # flash attention's
            seen = mask.long().cumsum(-1)[:, -queries:].clamp(min=0, max=window)
        else:
            return
        self._doubt((seen != position.clamp(min=1, max=window)) & inside, _CACHED_OTHER_MASK)

    def _reusable_lse(self, mask: Any, arguments: dict[str, Any], packed: list[Tensor] | None, cached: bool) -> str | None:
        """The attention implementation, when the log-sum-exp of its queries may be that of those that are scored.

        A row's keys are those from token 0 on only without `start`; right padding is then never seen. Sinks are not in an
        operation's log-sum-exp. What a mask holds only the device knows, BlockMasks aside. Packed rows compute their own, as
        do queries behind a cache.
        """
        if (
            not self._asked.reuse_lse
            or packed is not None
            or self._start is not None
            or cached
            or isinstance(mask, Tensor)
            or arguments.get("s_aux") is not None
            or torch.compiler.is_compiling()
        ):
            return None
        return self._implementation

    def _reduce(
        self,
        module: Any,
        q: Tensor,
        k: Tensor,
        arguments: dict[str, Any],
        packed: list[Tensor] | None,
        known_lse: Callable[..., Any] | None,
    ) -> None:
        """Set the result from one attention call; q [B, H, Nq, D], k [B, Hkv, Nk, D], `packed` is each row's cu_seqlens."""
        batch, _, queries, dim = q.shape
        tokens = self._tokens(k)
        k = k[:, :, :tokens]  # a static cache has room for more
        dropped = tokens - k.shape[2]  # by a sliding cache
        window = self._window(module, arguments)
        windowed = self._uniform and window is not None
        sinks = arguments.get("s_aux")
        scale = arguments.get("scaling")
        scale = dim**-0.5 if scale is None else float(scale)
        softcap = arguments.get("softcap")
        known = None if known_lse is None else known_lse(q, k, scale=scale, sliding_window=window, softcap=softcap)
        lse, lse_source = (None, None) if known is None else known

        group = self._heads_over(module)
        if self._asked.heads in ("query", "kv") and q.shape[1] == self._config.num_attention_heads:
            group = None  # tensor parallelism leaves the heads of some models whole (Phi-3)
        over_ranks = partial(_over_ranks, group, self._asked.heads)
        options: dict[str, Any] = {"scale": scale, "sliding_window": window, "softcap": softcap, "sinks": sinks}
        chosen = self._asked.queries if isinstance(self._asked.queries, Tensor) else None
        if packed is None:
            start = None if self._start is None else self._start.to(q.device)
            length = None if self._length is None else self._length.to(q.device)
            weights = None
            if self._asked.reduction == "lift":
                weights = _visible_keys(batch, tokens, start, window, q.device)[:, tokens - queries :]
            if dropped or chosen is not None:
                first = torch.zeros(batch, dtype=torch.long, device=q.device) if start is None else start
                end = torch.full_like(first, tokens) if length is None else first + length
            if dropped:
                start = (first - dropped).clamp(min=0)
                length = (end - dropped - start).clamp(min=0)
            given = {"start": start, "length": length, **options, "row_weights": weights}
            incoming = self._incoming(q, k, lse, given, over_ranks, chosen)
            if dropped:
                incoming = nn.functional.pad(incoming, (dropped, 0))
            if chosen is not None:
                incoming = self._over_chosen(incoming, chosen, first[:, None], end[:, None], window)
        else:
            parts = []
            for row, cu_seqlens in enumerate(packed):
                sequence, position = places(cu_seqlens, tokens)
                weights = position.clamp(min=1, max=window).float() if self._asked.reduction == "lift" else None
                length = None if self._length is None else self._length.to(q.device)
                spans = cu_seqlens if length is None else shortened(cu_seqlens, length)
                given = {"cu_seqlens": spans, **options, "row_weights": weights}
                mine = None if chosen is None else chosen[row]
                part = self._incoming(q[row].transpose(0, 1), k[row].transpose(0, 1), None, given, over_ranks, mine)
                if mine is not None:
                    span, _ = places(spans, tokens)
                    part = self._over_chosen(part, mine, spans[:-1][span], spans[1:][span], window)
                # What is left of a sequence beyond its length was scored as one.
                parts.append(part if length is None else part.masked_fill(position > length[sequence], 0.0))
            incoming = torch.stack(parts)
        if self._asked.accumulate:
            if self._so_far is not None:
                before = nn.functional.pad(self._so_far, (0, tokens - self._so_far.shape[-1]))
                incoming = before + incoming if self._asked.reduction == "sum" else before.maximum(incoming)
            self._so_far = incoming
        if self._asked.by_head:
            incoming = _over_heads(incoming, self._asked.heads, k.shape[1])
        self._result = (
            over_ranks(incoming),
            CapturedLayer(
                index=self._index,
                name=self._name,
                layer_type="sliding_attention" if windowed else self._layer_type,
                sliding_window=window,
                softcap=softcap,
                scale=scale,
                has_sinks=sinks is not None,
                lse_source=lse_source,
            ),
            packed,
        )

    def _incoming(
        self, q: Tensor, k: Tensor, lse: Tensor | None, options: dict[str, Any], over_ranks: OverRanks, chosen: Tensor | None
    ) -> Tensor:
        """`incoming_attention` of padded or packed q and k over this rank's heads; the sum over chosen queries."""
        if self.inspect is not None:
            self.inspect(q, k, options, over_ranks)
        asked = self._asked
        reduction = "mean" if asked.reduction == "lift" else asked.reduction
        if chosen is not None:
            weights = options["row_weights"]
            options = {**options, "row_weights": chosen.to(q.device).float() * (1 if weights is None else weights)}
            reduction = "sum" if reduction == "mean" else reduction  # the mean over the chosen queries: `_over_chosen`
        return incoming_attention(
            q,
            k,
            lse=lse,
            heads="query" if asked.by_head else asked.heads,
            last=asked.queries if isinstance(asked.queries, int) else None,
            reduction=reduction,
            include_diagonal=asked.include_diagonal,
            backend=asked.backend,
            **options,
        )

    def _over_chosen(self, incoming: Tensor, chosen: Tensor, first: Tensor, end: Tensor, window: int | None) -> Tensor:
        """A sum over chosen queries [..., Nq] divided by how many of them see the key, where a mean was asked for.

        The queries are the last tokens of `incoming` [..., N] or [..., H, N]. A token's sequence is `first` to before `end`.
        """
        if self._asked.reduction in ("sum", "max"):
            return incoming
        tokens = incoming.shape[-1]
        token = torch.arange(tokens, device=incoming.device)
        counts = (
            nn.functional.pad(chosen.to(incoming.device), (tokens - chosen.shape[-1], 0)) & (token >= first) & (token < end)
        )
        before = nn.functional.pad(counts.cumsum(-1), (1, 0))  # how many of them there are before each token, and before none
        own = token + (not self._asked.include_diagonal)
        last = (token + (window or tokens)).minimum(end).maximum(own)
        seen = before.gather(-1, last.expand_as(counts)) - before.gather(-1, own.expand_as(counts))
        seen = seen if incoming.ndim == seen.ndim else seen.unsqueeze(-2)
        return incoming / seen.clamp(min=1)

    def _heads_over(self, module: Any) -> Any:
        """The process group that tensor parallelism spreads the module's heads over; None where this rank has all of them."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return None
        from torch.distributed.tensor import DTensor

        # What FSDP2 parts is whole while the module runs. transformers before 5.17 parts weights into plain tensors.
        meshes = (weight.device_mesh for weight in module.parameters() if isinstance(weight, DTensor))
        mesh = next(meshes, self._device_mesh)
        if mesh is None:
            return None
        return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")

    def _window(self, module: Any, arguments: dict[str, Any]) -> int | None:
        """The window of this call: what is passed, else that of the mask that the model builds."""
        if "sliding_window" in arguments:
            window = arguments["sliding_window"]
        elif self._layer_type in _WINDOWED:  # Qwen2-MoE
            window = getattr(module, "sliding_window", None) or getattr(self._config, "sliding_window", None)
        elif self._uniform and _builds_window_masks(module):  # PhiMoE
            window = getattr(self._config, "sliding_window", None)
        else:  # a config may carry a sliding_window that its model never reads
            window = None
        return None if window is None else int(window)


@contextmanager
def capture_attention(
    model: nn.Module,
    *,
    layers: int | Sequence[int] | None = None,
    heads: str = "mean",
    queries: int | Tensor | None = None,
    reduction: str = "mean",
    include_diagonal: bool = False,
    accumulate: bool = False,
    start: Tensor | Sequence[int] | None = None,
    length: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
    reuse_lse: bool = True,
) -> Iterator[dict[int, Capture]]:
    """Attention that keys receive in chosen layers, from chosen queries, during the forwards inside a `with` block.

        with capture_attention(model, layers=[3, -1], heads="kv", queries=64) as captured:
            model(input_ids, past_key_values=cache)
        captured[3].incoming  # float32 [B, Hkv, N]

    It is for those who evict keys from a cache, prune tokens or assign credit by attention. It needs neither eager attention
    nor changed model files. `capture_incoming_attention` is this for one layer, and says more about packed rows and caches.

    Args:
        model: as for `capture_incoming_attention`.
        layers: indices of decoder layers; -1 is the last. None: every layer with a softmax over all earlier tokens or a window.
        heads: "mean" over all query heads, [B, N]; "max" over them; "query", each by itself, [B, H, N]; "kv", the mean over the
            query heads of each key-value head, [B, Hkv, N].
        queries: w >= 1, only the last w of each sequence (an observation window, in time O(N w)). Or bool [B, N], true for
            those that count. Packed rows are [1, T]; behind a cache N counts the tokens of this forward. None: all.
        reduction: over the queries that count and see the key: "mean", "sum" or "max". "lift" is the mean of the attention as a
            multiple of the query's uniform share. Keys that no such query sees get 0. It comes before that over heads.
        include_diagonal: whether a query counts for its own key.
        accumulate: whether the forwards inside the block are parts of one sequence (prefill in chunks, decoding), whose sums or
            maxima go on. Not with "mean" and "lift", and not around gradient checkpointing, which runs a forward twice.
        start: int [B], each row's first token; this and the next four are as for `capture_incoming_attention`.
        length: int [B], each row's count of tokens.
        cu_seqlens: int [S + 1], the sequences packed into one row.
        backend: of `entra_kernels.incoming_attention`.
        reuse_lse: take the log-sum-exp that the attention call computes, if it computes one.

    Yields:
        A dict of the layers, by their indices from 0.

    Raises:
        ValueError: a layer has no softmax that can be scored, or an option is unknown. Or queries, start, length or cu_seqlens
            do not fit the batch or each other.
        TypeError: queries is a tensor but not bool, or start, length or cu_seqlens are not whole numbers.
        RuntimeError: as for `capture_incoming_attention`.

    Source: docs/method.md, incoming attention.
    """
    asked = _Asked(
        heads=heads,
        queries=queries,
        reduction=reduction,
        include_diagonal=include_diagonal,
        accumulate=accumulate,
        backend=backend,
        reuse_lse=reuse_lse,
    )
    first, count = _whole_numbers("start", start), _whole_numbers("length", length)
    packed = _whole_numbers("cu_seqlens", cu_seqlens)
    _check_packed(first, count, packed)
    captures: dict[int, Capture] = {}
    modules: list[tuple[Any, Any]] = []
    arguments_of = _arguments_of(model)
    of_all: dict[str, Any] = {
        "unpackable": _unpackable(model),
        "rope": RopeGroups(_transformers_model(model)),
        "device_mesh": _tensor_parallel_mesh(model),
        "asked": asked,
    }
    for index, (name, module, layer_type) in _chosen_layers(model, layers).items():
        config = module.config
        captures[index] = Capture(
            config=config,
            attend=_attention_function(name, module),
            index=index,
            name=name,
            layer_type=layer_type,
            **of_all,
        )
        captures[index].expect(start=first, length=count, cu_seqlens=packed)
        swapped = copy.copy(config)
        # The public setter writes through to sub-configs, which the copy shares with the original.
        swapped._attn_implementation_internal = _registered_name(config._attn_implementation)
        swapped._entra_capture = captures[index]
        modules.append((module, swapped))

    def before(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for capture in captures.values():
            capture.called_with(arguments_of(args, kwargs))

    # A model compiled in place would trace the hook and keep it.
    hooked = getattr(model, "_compiled_call_impl", None) is None
    handle = model.register_forward_pre_hook(before, with_kwargs=True) if hooked else None
    for module, swapped in modules:
        module.config = swapped
    try:
        yield captures
    finally:
        for (module, _), capture in zip(modules, captures.values(), strict=True):
            module.config = capture._config
            capture.called_with({})
        if handle is not None:
            handle.remove()


@contextmanager
def capture_incoming_attention(
    model: nn.Module,
    *,
    start: Tensor | Sequence[int] | None = None,
    length: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    statistic: str = "mean",
    head_reduction: str = "mean",
    backend: str = "auto",
    reuse_lse: bool = True,
) -> Iterator[Capture]:
    """Score the last full-attention layer during the forwards inside a `with` block: `sum_{j>i} A_ji / (N - i)`.

        with capture_incoming_attention(model, start=start, length=length) as captured:
            model(input_ids, use_cache=False)
        captured.incoming  # float32 [B, N]

    The layer is the last one of full attention. If every softmax layer has a window, it is the last of those, with its window.
    The logits are bit-identical to those without capture. (inductor compiles another graph, so there they differ by its
    rounding.) After the block the model's config, mode, and hooks are as before, also when the forward raised.

    **Packed rows.** Several sequences in one row (padding-free training) are scored one by one, each as if it had a row to
    itself. Give them as `cu_seqlens`, or let the capture find them in the attention call. It finds them where the mask cuts
    (`position_ids` that start again, with `attention_mask=None` and `use_cache=False`), or in what flash attention is told.
    `captured.cu_seqlens` says which they are. LongRoPE and dynamic RoPE depend on the largest position of a forward. A sequence
    whose RoPE would be another one if it ran alone is an error, in packed rows and in padded rows with `start` or `length`.

    **With a cache** (prefill in chunks, completions after a prompt, decoding) the queries are the tokens of this forward. They
    are the last ones of their rows. The mean is over those that see the key. `captured.incoming` has a column for every token
    up to now, and `start` and `length` count from the first one. Prompts of several lengths are padded on the left.

    Every forward inside the block replaces the result of the one before. So does the second pass of gradient checkpointing,
    with the same values. No gradient flows through a result, and attention dropout is not part of it. Only one thread at a
    time may run a model that is captured.

    Args:
        model: a transformers causal LM, bare or wrapped (PEFT, DDP, FSDP2, torch.compile with or without fullgraph), or
            tensor-parallel. The ranks of one tensor-parallel group run the same rows, and each gets the whole result.
        start: int [B], each row's first token. None: 0. With start or length a row is one sequence.
        length: int [B], each row's count of tokens. None: all from `start` on. Pads outside the span count for nothing. The
            model's attention_mask is up to you: right padding needs none. With cu_seqlens it is int [S]: how many tokens of
            each sequence count, from its first on.
        cu_seqlens: int [S + 1], the sequences packed into a batch of one row, [1, T]. It holds 0, then the running sums of
            their lengths. Not with start. None: found in the call.
        statistic: "mean" or "lift". Lift is each query's attention as a multiple of its uniform share: `sum_{j>i} w_j A_ji`
            over the same divisor. Here w_j is the number of keys that j sees, at most the window. Lift is 1 everywhere when all
            scores are equal.
        head_reduction: "mean" or "max" over the query heads.
        backend: of `entra_kernels.incoming_attention`.
        reuse_lse: take the log-sum-exp that the attention call computes, if it computes one (SDPA's fused kernels, flash-attn).
            The Triton kernels then make one pass instead of two. `captured.layer.lse_source` says where it came from. The call
            must have no mask and no `start`, and a window only if the operation applies it (flash-attn). False: always compute
            it.

    Raises:
        ValueError: the statistic or the head_reduction is unknown. Or start, length or cu_seqlens do not fit the batch or each
            other. Or no softmax layer of the model can be scored (the message names its layer types). Or the attention
            implementation leaves out the model's softcap (Gemma 2 with SDPA before transformers 5.21).
        TypeError: start, length or cu_seqlens are not whole numbers.
        RuntimeError: the forward uses a position bias or sparse indices. Or rows are packed behind a cache. Or rows are packed,
            and the model's layers carry a state from one sequence into the next (linear attention, Mamba). Four faults show
            when `captured.incoming` is read. There was no forward yet. Attention kept other sequences apart than those to be
            scored, or none (gpt-oss without flash attention). The mask biases scores. A sequence has another RoPE than it would
            have alone.

    Source: docs/method.md, incoming attention.
    """
    for option, value, allowed in (
        ("statistic", statistic, ("mean", "lift")),
        ("head_reduction", head_reduction, ("mean", "max")),
    ):
        if value not in allowed:
            raise ValueError(f"{option}={shown(value)} must be one of {', '.join(map(repr, allowed))}")
    name, module, _ = scored_layer(model)
    index = _layer_index(model, name, module)
    with capture_attention(
        model,
        layers=index,
        heads=head_reduction,
        reduction=statistic,
        start=start,
        length=length,
        cu_seqlens=cu_seqlens,
        backend=backend,
        reuse_lse=reuse_lse,
    ) as captured:
        yield captured[index]


def _tensor_parallel_mesh(model: nn.Module) -> Any:
    """The device mesh that transformers spread the model's heads over when it loaded it; None where it did not."""
    inner = _transformers_model(model)
    return getattr(inner, "_device_mesh", None) if (getattr(inner, "_tp_size", None) or 1) > 1 else None


def _over_heads(incoming: Tensor, heads: str, kv_heads: int) -> Tensor:
    """From [..., H, N] to [..., N], or with heads "query" and "kv" to [..., H, N] and [..., Hkv, N]."""
    if heads == "query":
        return incoming
    if heads == "kv":
        return incoming.unflatten(-2, (kv_heads, -1)).mean(-2)
    return incoming.amax(-2) if heads == "max" else incoming.mean(-2)


def _over_ranks(group: Any, heads: str, incoming: Tensor) -> Tensor:
    """Over the heads of all ranks of a group, each of which has as many as the next, or all of them."""
    if group is None:
        return incoming
    if heads in ("query", "kv"):  # [..., H, N]
        parts = [torch.empty_like(incoming) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, incoming.contiguous(), group)
        return torch.cat(parts, dim=-2)
    if heads == "mean":
        incoming = incoming / dist.get_world_size(group)  # gloo has no mean
    dist.all_reduce(incoming, dist.ReduceOp.MAX if heads == "max" else dist.ReduceOp.SUM, group)
    return incoming


def _whole_numbers(name: str, value: Tensor | Sequence[int] | None) -> Tensor | None:
    if value is None:
        return None
    tensor = torch.as_tensor(value)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}={shown(value)} must hold whole numbers of tokens (int32 or int64); convert it with .long()")
    return tensor


def _check_packed(start: Tensor | None, length: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raises a ValueError for a cu_seqlens [S + 1] that is none, or that does not go with start and length."""
    if cu_seqlens is None:
        return
    if start is not None:
        raise ValueError("start and cu_seqlens were both given; start belongs to padded rows, so pass one of them")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be (S + 1,): 0, then running sums of lengths"
        )
    if length is not None and length.shape != (cu_seqlens.numel() - 1,):
        raise ValueError(
            f"length has shape {tuple(length.shape)} but cu_seqlens has {cu_seqlens.numel() - 1} sequences; give each an entry"
        )
    if cu_seqlens.device.type != "cpu" or (length is not None and length.device.type != "cpu"):
        return  # looking would wait for the device
    if int(cu_seqlens[0]) != 0 or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens={cu_seqlens.tolist()} must start at 0 and never fall; pass running sums of the lengths")
    if length is not None and bool(((length < 0) | (length > cu_seqlens.diff())).any()):
        raise ValueError(f"length={length.tolist()} must lie in 0 to the sequences' lengths, {cu_seqlens.diff().tolist()}")


def _capturing_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """The registered attention function: attend as the module's own config says, and reduce q and k."""
    swapped = module.config
    capture: Capture = swapped._entra_capture
    capture._refuse_unscorable(module, query, key, attention_mask, kwargs)
    with torch.no_grad():
        packed = capture._packed_rows(module, query, key, attention_mask, kwargs)
    implementation = capture._reusable_lse(attention_mask, kwargs, packed, key.shape[2] != query.shape[2])
    observer = LseObserver() if implementation in OBSERVABLE else None
    # Flash attention reads module.config itself; a nested capture finds its own there.
    module.config = capture._config
    try:
        with nullcontext() if observer is None else observer:
            attended = capture._attend(module, query, key, value, attention_mask, *args, **kwargs)
    finally:
        module.config = swapped
    known_lse: Callable[..., Any] | None = None
    if observer is not None:
        known_lse = observer.lse_of
    elif implementation == "flex_attention":
        known_lse = partial(flex_attention_lse, attended, attention_mask)
    with torch.no_grad():
        capture._reduce(module, query, key, kwargs, packed, known_lse)
    return attended


def _registered_name(original: str | None) -> str:
    """The name under which the capturing function stands in for `original`, registered at first use."""
    from transformers import AttentionInterface

    name = _PREFIX + (original or "eager").removeprefix(_PREFIX)
    if name not in AttentionInterface():
        AttentionInterface.register(name, _capturing_attention)
    return name


def _uses_attention_interface(module: Any) -> bool:
    """Whether the module's forward looks its attention function up by name."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _builds_window_masks(module: Any) -> bool:
    """Whether the file that the attention module comes from builds sliding-window masks."""
    return "create_sliding_window_causal_mask" in inspect.unwrap(type(module).forward).__globals__


def _attention_function(name: str, module: Any) -> Callable[..., Any]:
    """The function that the module's forward would call without capture."""
    implementation = module.config._attn_implementation
    # Both live in the module's own file: "eager" is a fallback there, and a file may override the other names.
    scope = inspect.unwrap(type(module).forward).__globals__
    attend = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, scope.get("eager_attention_forward"))
    if attend is None:
        raise ValueError(
            f"attn_implementation={implementation!r} of {name} ({type(module).__name__}) cannot be captured: its file "
            'has no eager_attention_forward; load the model with attn_implementation="sdpa"'
        )
    return attend


def _visible_keys(batch: int, tokens: int, start: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """How many keys each query sees in its row, float32 [B, N]: its 1-based position, at most the window."""
    position = torch.arange(1, tokens + 1, device=device).expand(batch, tokens)
    if start is not None:
        position = position - start[:, None]
    return position.clamp(min=0, max=window).float()


def scored_layer(model: nn.Module) -> tuple[str, Any, str]:
    """Name, attention module, and layer type of the last full-attention layer, else of the last windowed one.

    Raises a ValueError where there is none, or where its attention implementation leaves out a softcap.
    """
    candidates = list(_scorable_layers(model).values())
    full = [candidate for candidate in candidates if candidate[2] in _FULL]
    # A window is the whole story only where no other layer reaches further by attending sparsely.
    sparse = set(getattr(_text_config(model), "layer_types", None) or ()) - _FULL - _WINDOWED - _NO_SOFTMAX
    scorable = full or ([] if sparse else candidates)
    if not scorable:
        raise ValueError(_refusal(model))
    _refuse_other_scores(scorable[-1][1])
    return scorable[-1]


def _chosen_layers(model: nn.Module, layers: int | Sequence[int] | None) -> dict[int, tuple[str, Any, str]]:
    """`_scorable_layers` of these indices, negative ones from the end; ValueErrors for those that are none."""
    scorable = _scorable_layers(model)
    if not scorable:
        raise ValueError(_refusal(model))
    if layers is not None:
        depth = int(_text_config(model).num_hidden_layers)
        asked = [layers] if isinstance(layers, int) else list(layers)
        indices = sorted({index + depth if index < 0 else index for index in asked})
        unknown = [index for index in indices if index not in scorable]
        if unknown or not indices:
            raise ValueError(
                f"layers={layers}: "
                + (f"layer {unknown[0]} cannot be scored" if unknown else "there must be one at least")
                + f"; of the {depth} layers of this model these can: {', '.join(map(str, scorable))}"
            )
        scorable = {index: scorable[index] for index in indices}
    for _, module, _ in scorable.values():
        _refuse_other_scores(module)
    return scorable


def _scorable_layers(model: nn.Module) -> dict[int, tuple[str, Any, str]]:
    """Of `attention_layers` those with full or windowed attention, by index. Of two with one index (HRM) the later one."""
    layers = [
        (_layer_index(model, name, module), (name, module, kind))
        for name, module, kind in attention_layers(model)
        if kind in _FULL | _WINDOWED
    ]
    return dict(sorted(layers, key=lambda layer: layer[0]))


def _refuse_other_scores(module: Any) -> None:
    """Raise for two softmax maps (DiffLlama), and for SDPA with a softcap (Gemma 2), which transformers left out at first."""
    if hasattr(module, "lambda_q1"):
        raise ValueError(
            f"{type(module).__name__} (model_type={module.config.model_type!r}) weighs values with the difference of two "
            "softmax maps, which may be negative. So there is no attention probability to take the mean of; score with another "
            "model"
        )
    softcap = getattr(module, "attn_logit_softcapping", None)
    implementation = (module.config._attn_implementation or "eager").removeprefix(_PREFIX)
    if softcap is not None and implementation == "sdpa" and transformers_version() < (5, 21):
        raise ValueError(
            f"{type(module).__name__} caps its attention scores (attn_logit_softcapping={softcap}), but attn_implementation="
            "'sdpa' of transformers before 5.21 leaves the cap out. Logits and attention are then not the model's; load it "
            'with attn_implementation="eager", or use transformers>=5.21'
        )


def attention_layers(model: nn.Module) -> list[tuple[str, Any, str]]:
    """Name, attention module, and layer type of every decoder layer that goes through transformers' attention interface.

    They are found by what they do, in any wrapper: modules with a layer index whose forward looks its attention function up.
    Modules of another config class than the text decoder's (vision towers, depth decoders) and layers past the decoder's depth
    (multi-token prediction) are left out.
    """
    text_config = _text_config(model)
    depth = getattr(text_config, "num_hidden_layers", None)
    layer_types = getattr(text_config, "layer_types", None)
    candidates: list[tuple[str, Any, str]] = []
    for name, module in model.named_modules():
        if (
            not isinstance(vars(module).get("layer_idx"), int)  # what is not there costs time in an nn.Module
            or (depth is not None and module.layer_idx >= depth)
            or type(getattr(module, "config", None)) is not type(text_config)
            or not getattr(module, "is_causal", True)
            or not getattr(text_config, "is_causal", True)
            or not _uses_attention_interface(module)
        ):
            continue
        kind = "full_attention" if layer_types is None else layer_types[_layer_index(model, name, module)]
        candidates.append((name, module, kind))
    return candidates


def _layer_index(model: nn.Module, name: str, module: Any) -> int:
    """The decoder layer that an attention module stands in.

    Zamba2's shared blocks all say -1; theirs is the place in the list of layers that their name goes through.
    """
    if module.layer_idx >= 0:
        return int(module.layer_idx)
    path = name.split(".")
    for end, part in enumerate(path):
        if part.isdigit() and isinstance(model.get_submodule(".".join(path[:end])), nn.ModuleList):
            return int(part)
    return int(module.layer_idx)


def _unpackable(model: nn.Module) -> str | None:
    """Why sequences in one row of this model cannot be kept apart by any mask; None when they can."""
    stateful = sorted(set(getattr(_text_config(model), "layer_types", None) or ()) & _STATEFUL)
    for module in model.modules():
        if getattr(module, "_is_stateful", False) or (stateful and hasattr(module, "_is_stateful")):
            layers = ", ".join(stateful) or "a recurrent kind"
            return f"{type(module).__name__} has layers of {'type ' if stateful else ''}{layers}"
    return None


def _arguments_of(model: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """What makes of the arguments of the model's call those by name, positional ones included.

    Wrappers (DDP, PEFT) take any arguments and hand them on; the first model inside that names its own tells their order.
    """
    signatures = (inspect.signature(module.forward) for module in model.modules())
    named = next(s for s in signatures if all(p.kind is not p.VAR_POSITIONAL for p in s.parameters.values()))

    def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**named.bind_partial(*args).arguments, **kwargs} if args else kwargs

    return arguments_of


def _text_config(model: nn.Module) -> Any:
    """The config of the text decoder inside any wrapper."""
    return _transformers_model(model).config.get_text_config(decoder=True)


def _transformers_model(model: nn.Module) -> Any:
    """The model inside any wrapper that has a transformers config."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            if getattr(config, "is_encoder_decoder", False):
                raise ValueError(
                    f"{type(module).__name__} (model_type={config.model_type!r}) is an encoder-decoder model. "
                    "Incoming attention is defined for decoder-only language models; pass one of those"
                )
            return module
    raise ValueError(f"model is a {type(model).__name__} without a transformers config; pass a transformers causal LM")


def _refusal(model: nn.Module) -> str:
    """The message for a model without a layer to score: its layer types, and its layers' classes."""
    text_config = _text_config(model)
    layer_types = getattr(text_config, "layer_types", None)
    classes = {type(module).__name__ for module in model.modules() if hasattr(module, "layer_idx")} or {
        type(layer).__name__ for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module
    }
    types = f"of type {', '.join(sorted(set(layer_types)))}; they are " if layer_types else ""
    built = ", ".join(sorted(classes)) or "no known class"
    return (
        f"no layer of this model (model_type={text_config.model_type!r}) can be scored: its layers are {types}"
        f"built from {built}. Incoming attention needs a causal softmax layer, full or windowed, that goes through "
        "transformers' attention interface; score with another model"
    )
