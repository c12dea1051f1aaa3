"""`copies` and `first_places`: the public operations. They check, choose a backend and call it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _custom_ops
from ._checks import INTEGERS, check_backend, check_dtype, check_ngram, check_same_device


def copies(token_ids: Tensor, cu_seqlens: Tensor, *, ngram: int, backend: str = "auto") -> Tensor:
    """`tuple(ids[i + 1 - ngram : i + 1]) in {tuple(ids[j + 1 - ngram : j + 1]) for j in range(ngram - 1, i)}` of each token i.

    A token is a copy when the n-gram that ends at it occurred before in its sequence. The two may overlap: in 5 5 5 with
    ngram = 2 the last token is a copy. The first ngram - 1 tokens of a sequence end no n-gram, so they are no copies. With
    ngram = 1 a token is a copy when its id occurred before.

    N-grams are compared id by id, so the result is exact. It is one fused operation, without N x N memory and without a host
    synchronisation.

    Args:
        token_ids: int [T], any ids, packed: prompt and completion of each sequence where copies of the prompt count too.
        cu_seqlens: int [S + 1]: 0, then the running sums of the sequence lengths.
        ngram: n, tokens, at least 1.
        backend: "auto" (Triton on CUDA and ROCm, else torch), "reference", "torch" or "triton".

    Returns:
        bool [T]. Tokens that cu_seqlens leaves out belong to no sequence and are no copies.

    Raises:
        ValueError: shapes that are not packed, ngram below 1, or (on a CPU only) a cu_seqlens that falls or leaves the tokens.
            On a GPU a look would wait for the device, so sequences are clamped to the tokens, and the results of sequences
            that overlap mean nothing.
        TypeError: a dtype that is not supported, an ngram that is no int.
        RuntimeError: the backend that you named cannot run here.

    Source: docs/method.md, "Copies".
    """
    return _found(_custom_ops.copies, token_ids, cu_seqlens, ngram, backend)


def first_places(token_ids: Tensor, cu_seqlens: Tensor, *, ngram: int, backend: str = "auto") -> Tensor:
    """`grams.index(grams[i])` of each token i, with `grams[i] = tuple(ids[max(i + 1 - ngram, 0) : i + 1])`.

    It is where the n-gram that ends at the token ended first. Tokens of one sequence have one first place exactly when they
    end the same n-gram. So with these instead of ids `redundancy` computes the entropy of n-grams. The first ngram - 1 tokens
    of a sequence end no n-gram, so each is its own first place. Where `copies` is true the first place is an earlier token.

    N-grams are compared id by id, so the result is exact. It is one fused operation, without N x N memory and without a host
    synchronisation.

    Args:
        token_ids: int [T], any ids, packed.
        cu_seqlens: int [S + 1]: 0, then the running sums of the sequence lengths.
        ngram: n, tokens, at least 1.
        backend: "auto" (Triton on CUDA and ROCm, else torch), "reference", "torch" or "triton".

    Returns:
        int64 [T], positions counted from the first token of each sequence. -1 for tokens that cu_seqlens leaves out.

    Raises:
        ValueError, TypeError, RuntimeError: as `copies` does.

    Source: docs/method.md, "Entropy of n-grams".
    """
    return _found(_custom_ops.first_places, token_ids, cu_seqlens, ngram, backend)


def _found(operation: Any, token_ids: Tensor, cu_seqlens: Tensor, ngram: int, backend: str) -> Tensor:
    check_dtype(INTEGERS, token_ids=token_ids, cu_seqlens=cu_seqlens)
    check_same_device(token_ids=token_ids, cu_seqlens=cu_seqlens)
    if token_ids.ndim != 1:
        raise ValueError(f"token_ids has shape {list(token_ids.shape)}; it must be packed, [T]")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [S + 1]")
    found: Tensor = operation(token_ids, cu_seqlens, check_ngram(ngram), check_backend(backend, token_ids))
    return found
