"""Which tokens of a row an attention call keeps apart, so that several sequences packed into a row are scored one by one.

What counts is what the attention function is going to do, not what the caller meant:

- SDPA, eager attention and FlexAttention go by their mask. A token opens a sequence where it does not see the token before it.
  The diagonal below the main one tells that: N entries of the N x N. In transformers, a mask is cut where `position_ids` start
  again, but only without `attention_mask` and without a cache, and not in every model (gpt-oss).
- Flash attention has no such mask. Without one of pads it goes by `cu_seq_lens_q`, else, with a single row, by `position_ids`.
- `position_ids` or `cu_seq_lens_q` may open a sequence that attention does not keep apart. Then the sequences see each other,
  and no score of such a forward is that of a sequence.

Everything stays on the device: values are looked at by who waits for them anyway.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Separation(NamedTuple):
    """What one attention call keeps apart; bool [B, N] each, the first token of a row never counts."""

    opens: Tensor
    """Tokens that do not see the token before them, where neither is a pad."""
    pads: Tensor
    """Tokens that do not even see themselves."""
    joined: Tensor
    """Tokens at which the call's arguments begin a sequence, but which do see the token before them."""
    unclear: Tensor
    """Tokens to whose score with themselves or with the token before the mask adds neither 0 nor what hides a key."""
    may_open: bool
    """False where `opens` cannot hold anything, known without waiting for the device."""


def separation(
    implementation: str, mask: Any, arguments: dict[str, Any], q: Tensor, positions: Any = None, keys: int | None = None
) -> Separation | None:
    """What an attention call over q [B, H, N, D] keeps apart; None where its implementation is not known to us.

    Args:
        implementation: the name of the attention function, as transformers has it.
        mask: as it arrives there: [B, 1, N, N], a BlockMask, flash attention's [B, N], or None.
        arguments: the keyword arguments of the call.
        positions: the `position_ids` of the model's call. Some attention functions do not get them.
        keys: of how many keys the queries are the last ones. None: as many as there are queries.
    """
    batch, _, tokens, _ = q.shape
    cached = 0 if keys is None else keys - tokens
    nothing = torch.zeros(batch, tokens, dtype=torch.bool, device=q.device)
    opens, pads, lost, unclear, may_open = nothing, nothing, nothing, nothing, True
    named = _named_starts(arguments, nothing)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        square = mask[:, 0, :, cached : cached + tokens]
        itself, last = square.diagonal(dim1=-2, dim2=-1), square.diagonal(-1, dim1=-2, dim2=-1)
        opens, pads = _opened(visible(itself), visible(last), nothing)
        unclear = nothing | biased(itself)
        unclear[:, 1:] |= biased(last)
    elif hasattr(mask, "mask_mod"):
        row = torch.arange(batch, device=q.device)[:, None]
        token = torch.arange(tokens, device=q.device)[None]
        head = torch.zeros((), dtype=torch.long, device=q.device)
        key = token + cached
        sees_itself = mask.mask_mod(row, head, token, key)
        opens, pads = _opened(sees_itself, mask.mask_mod(row, head, token[:, 1:], key[:, :-1]), nothing)
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        pads, may_open = ~mask[:, -tokens:].bool(), False
    elif is_flash(implementation):
        if all(arguments.get(name) is not None for name in _VARLEN):
            opens = named
        elif batch == 1:
            opens, lost = _flash_starts(arguments, nothing)
        may_open = opens is not nothing
    elif implementation in ("sdpa", "eager", "flex_attention"):
        may_open = False
    else:
        return None
    claimed = (named | _restarts(arguments, positions, nothing) | lost) & ~beside(pads)
    return Separation(opens, pads, claimed & ~opens, unclear, may_open)


def begins_sequences(arguments: dict[str, Any], q: Tensor, positions: Any = None) -> Tensor:
    """bool [B, N], tokens at which the arguments of a call over q [B, H, N, D] begin a sequence, as for `separation`."""
    nothing = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    return _named_starts(arguments, nothing) | _restarts(arguments, positions, nothing)


def beside(pads: Tensor) -> Tensor:
    """bool [B, N], tokens that are a pad or follow one."""
    return pads | pads.roll(1, 1)


def is_flash(implementation: str) -> bool:
    """Whether the name is one of flash attention's, kernels of the hub included; transformers tells them in the same way."""
    return "flash" in implementation


def sequences_of(found: Separation) -> list[Tensor]:
    """cu_seqlens [S + 1], int32, of each row: every pad is a sequence of its own. Waits for the device."""
    tokens = found.opens.shape[1]
    opens = found.opens | beside(found.pads)
    opens[:, :1] = True
    return [torch.cat([row.nonzero().flatten(), row.new_full((1,), tokens, dtype=torch.long)]).int() for row in opens]


def places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """int64 [T] each: the sequence of cu_seqlens [S + 1] that each token belongs to, and its 1-based position there."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    starts = cu_seqlens[:-1].long().contiguous()
    # The last sequence that starts at or before the token, also where empty ones start there too.
    sequence = torch.searchsorted(starts, token, right=True) - 1
    return sequence, token + 1 - starts[sequence]


def shortened(cu_seqlens: Tensor, length: Tensor) -> Tensor:
    """cu_seqlens [2 S + 1] of sequences of `length` [S], each followed by what is left of it as a sequence of its own."""
    ends = cu_seqlens[:-1] + length.to(cu_seqlens.dtype)
    return torch.cat([torch.stack([cu_seqlens[:-1], ends], dim=1).flatten(), cu_seqlens[-1:]])


def visible(mask: Tensor) -> Tensor:
    """bool, whether an entry of an attention mask lets its key be seen; float masks are added to the scores."""
    return mask if mask.dtype == torch.bool else mask > _HIDDEN


def biased(mask: Tensor) -> Tensor:
    """bool, whether an entry of an attention mask neither leaves a score as it is nor hides its key (ALiBi, NaN)."""
    return torch.zeros_like(mask) if mask.dtype == torch.bool else (mask != 0) & ~(mask <= _HIDDEN)


# Masks are filled with -inf, a dtype's lowest number, -1e9 or -1e4; exp(-1e3) is 0 even in float64.
_HIDDEN = -1e3


# transformers' flash attention goes by cu_seq_lens_q only where all of these are given.
_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _opened(sees_itself: Tensor, sees_last: Tensor, nothing: Tensor) -> tuple[Tensor, Tensor]:
    """`Separation.opens` and `pads` from two diagonals of a mask, [1 or B, N] and [1 or B, N - 1]."""
    pads = nothing | ~sees_itself
    opens = nothing.clone()
    opens[:, 1:] = ~sees_last & ~pads[:, 1:] & ~pads[:, :-1]
    return opens, pads


def _named_starts(arguments: dict[str, Any], nothing: Tensor) -> Tensor:
    """bool [B, N], where `cu_seq_lens_q` of the flattened rows begins a sequence."""
    cu_seqlens = arguments.get("cu_seq_lens_q")
    if not isinstance(cu_seqlens, Tensor):
        return nothing
    return starts_of(cu_seqlens.to(nothing.device), nothing.numel()).view(nothing.shape)


def starts_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """bool [T], where cu_seqlens [S + 1] begins a sequence, the first token aside."""
    starts = torch.zeros(tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
    starts[cu_seqlens.long().clamp(0, tokens)] = True
    starts[0] = False
    return starts[:tokens]


def _restarts(arguments: dict[str, Any], positions: Any, nothing: Tensor) -> Tensor:
    """bool [B, N], where `position_ids` [B, N] or [planes, B, N] do not go on but start again."""
    positions = positions_of(arguments, positions)
    if not isinstance(positions, Tensor) or positions.ndim not in (2, 3) or positions.shape[-1] != nothing.shape[1]:
        return nothing
    planes = positions.to(nothing.device).view(-1, *positions.shape[-2:])
    steps = planes.diff(dim=-1)
    # Inside of a picture planes (time, height, width) fall one by one; in text all are the same.
    text = (planes == planes[:1]).all(0)[:, :-1]
    restarts = nothing.clone()
    restarts[:, 1:] = (steps < 0).all(0) | ((steps < 1).all(0) & text)
    return restarts


def positions_of(arguments: dict[str, Any], positions: Any) -> Any:
    """The `position_ids` that an attention call gets, or those of the model's call where it gets none."""
    given = arguments.get("position_ids")
    return positions if given is None else given


def _flash_starts(arguments: dict[str, Any], nothing: Tensor) -> tuple[Tensor, Tensor]:
    """Where flash attention begins sequences by `position_ids` [1, N], and the first token when it begins none there."""
    positions = arguments.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape != nothing.shape:
        return nothing, nothing
    # transformers' rule: nothing is packed where positions only count up; else every lowest position begins a sequence.
    lowest = positions.min()
    packed = (positions - lowest != torch.arange(positions.shape[1], device=positions.device)).any()
    opens = (positions == lowest) & packed
    lost = nothing.clone()
    lost[:, :1] = packed & ~opens[:, :1]
    opens[:, :1] = False
    return opens, lost
