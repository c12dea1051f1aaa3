"""Copies and first places in every sequence at once: n-grams are named by sorts, in log2(n) rounds.

It needs no hashes and no host synchronisation. Equal n-grams get equal names and different ones get different names. So no
collision can make a copy of a token that is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._spans import packed_bounds
from .redundancy import grouped, owner_of


def copies(token_ids: Tensor, cu_seqlens: Tensor, *, ngram: int) -> Tensor:
    """Whether each token ends an n-gram that its sequence had before. Needs a cu_seqlens that does not descend."""
    if token_ids.shape[0] < ngram:
        return torch.zeros_like(token_ids, dtype=torch.bool)
    within, order, repeated = _sorted_ngrams(token_ids, cu_seqlens, ngram)
    copied = torch.empty_like(repeated)
    copied[order] = repeated
    return copied & (within >= ngram - 1)


def first_places(token_ids: Tensor, cu_seqlens: Tensor, *, ngram: int) -> Tensor:
    """Where the n-gram that ends at each token ended first in its sequence. Needs a cu_seqlens that does not descend."""
    # Where all tokens together are fewer than n no n-gram ends, so what the sort says is not used.
    within, order, repeated = _sorted_ngrams(token_ids, cu_seqlens, ngram if ngram <= token_ids.shape[0] else 1)
    # Equal n-grams stand side by side in the order of their positions: the one that repeats none is the first of its run.
    first = order[torch.where(repeated, 0, torch.arange(order.shape[0], device=order.device)).cummax(0).values]
    places = torch.empty_like(order)
    places[order] = within[first]
    return places.where(within >= ngram - 1, within)


def _sorted_ngrams(token_ids: Tensor, cu_seqlens: Tensor, ngram: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: its position in its sequence, -1 where it is in none. An order of the tokens in which equal n-grams stand
    side by side, earlier ones first. And whether each, in this order, ends the n-gram of the one before it.

    The last two mean nothing at the first n - 1 tokens of a sequence.
    """
    tokens = token_ids.shape[0]
    starts, lengths = packed_bounds(cu_seqlens, tokens)
    position = torch.arange(tokens, device=token_ids.device)
    owner = owner_of(position, starts, lengths)
    # Tokens outside all spans are in no sequence, so they end no n-gram.
    within = (position - torch.nn.functional.pad(starts, (0, 1))[owner]).where(owner < starts.shape[0], -1)

    order = grouped(token_ids.sort(stable=True).indices, owner)
    repeated = _repeated(order, token_ids, owner)
    name, length = _names(order, repeated), 1
    while length < ngram:
        # Two n-grams of `length` tokens, which may overlap, make up the longer one.
        more = min(length, ngram - length)
        before = name[(position - more).clamp(min=0)]
        length += more
        code = (before * tokens + name).where(within >= length - 1, -1)
        order = code.sort(stable=True).indices
        repeated = _repeated(order, code)
        name = _names(order, repeated)
    return within, order, repeated


def _repeated(order: Tensor, *keys: Tensor) -> Tensor:
    """bool [T]: whether the keys of each token, taken in `order`, are those of the one before."""
    repeated = torch.ones_like(order, dtype=torch.bool)
    repeated[:1] = False
    for key in keys:
        key = key[order]
        repeated[1:] &= key[1:] == key[:-1]
    return repeated


def _names(order: Tensor, repeated: Tensor) -> Tensor:
    """int64 [T] below T: numbers that are equal where the keys of `_repeated` are."""
    return torch.empty_like(order).index_copy_(0, order, (~repeated).cumsum(0) - 1)
