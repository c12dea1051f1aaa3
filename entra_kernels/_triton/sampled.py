"""`incoming_attention` from a sample of the query rows, in Triton: the sampled rows' log-sum-exp, then the columns.

Both passes cost O(N m). The column pass has to hold all heads of a row together before it can square the difference of two
rows. So here a program owns a tile of keys of *all* kv heads. It adds the heads' probabilities up in registers, one tile of
rows after the other. Keys are read again for each tile of rows; the causal comparison, made once per tile for all heads, is
free. The sampled queries are copied, [S, m, H, D], since they lie apart; k is read where it is.

There is one program per tile of keys, which leaves SMs idle below some 20,000 tokens; there the exact passes are fast anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._sampling import SampledRows
from .._spans import Spans
from ..reference import AttentionOptions
from .attention import wide_tiles
from .launch import attention_launch, check_products, chip_of
from .plan import plan
from .primitives import (
    LOG2_E,
    LOWEST,
    Factors,
    Scoring,
    Shape,
    Tile,
    load_tile,
    negative_log_sum,
    probabilities,
    products,
    read_span,
    read_tile,
    scan_keys,
)


@triton.jit(do_not_specialize=["sampled", "heads", "group", "window"])
def _sampled_lse_kernel(
    q, k, sinks, rows, negative_lse, spans,
    k_stride_batch, k_stride_head, k_stride, k_stride_dim, sinks_stride, sampled, heads, group, window, score_factors,
    HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """negative_lse [S, H, sampled] in log2 units, -inf where there is no row. A program owns a tile of one head's rows, of
    which the later ones see more keys: later tiles come first."""
    shape: tl.constexpr = Shape(RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, WINDOW, FLIPPED)
    scoring = Scoring(score_factors, window)
    blocks = sampled // RESIDENT
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    block = blocks - 1 - program // heads % blocks
    sequence = (program // heads // blocks).to(tl.int64)
    start, tokens = read_span(spans, sequence)
    start = start.to(tl.int64)
    entry = block * RESIDENT + tl.arange(0, RESIDENT)
    query = tl.load(rows + sequence * sampled + entry)  # -1: none, sees nothing
    batch = 0 if PACKED else sequence
    k_first = k + batch * k_stride_batch + head // group * k_stride_head + start * k_stride
    keys = Tile(k_first, k_stride, k_stride_dim, tokens)
    q_first = q + ((sequence * sampled + block * RESIDENT) * heads + head) * HEAD_DIM
    queries = Tile(q_first, heads * HEAD_DIM, 1, RESIDENT)
    loaded = load_tile(queries, 0, shape, RESIDENT)  # [row, dim]
    highest = tl.full((RESIDENT,), LOWEST, tl.float32)
    total = tl.zeros((RESIDENT,), tl.float32)

    # Every row sees the keys up to the first row; which of the later ones it sees is compared. So is what a window hides.
    earliest = tl.min(tl.where(query < 0, tokens, query), axis=0)
    stop = tl.max(query, axis=0) + 1
    first = 0
    seen_by_all = tl.minimum(earliest, stop) // STREAMED * STREAMED
    if WINDOW:
        first = tl.maximum(earliest - window + 1, 0) // STREAMED * STREAMED
        seen_by_all = first
    highest, total = scan_keys(highest, total, loaded, queries, keys, query, first, seen_by_all, scoring, shape, False)
    highest, total = scan_keys(highest, total, loaded, queries, keys, query, seen_by_all, stop, scoring, shape, True)
    out = negative_lse + (sequence * heads + head) * sampled + entry
    tl.store(out, negative_log_sum(highest, total, sinks, sinks_stride, head, query >= 0))


@triton.jit(do_not_specialize=["sampled", "padded_tokens", "kv_heads", "group", "window"])
def _sampled_columns_kernel(
    q, k, negative_lse, rows, factors, weights, spread, estimate_out, error_out, tiles, spans,
    k_stride_batch, k_stride_head, k_stride, k_stride_dim, sampled, padded_tokens, kv_heads, group, window, score_factors,
    HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Estimate and standard error, [B, N] each, of one tile of keys.

    factors [S, sampled] are the user's row weights, weights [S, sampled] the inverse inclusion probabilities, spread
    [S, sampled / 2] the variance's coefficients."""
    shape: tl.constexpr = Shape(RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, WINDOW, False)
    scoring = Scoring(score_factors, window)
    tile = read_tile(tiles, tl.program_id(0))
    sequence = tile.sequence.to(tl.int64)
    start, tokens = read_span(spans, sequence)
    start = start.to(tl.int64)
    if tile.listed == 0:
        return
    begin = (tile.listed - 1) * RESIDENT
    batch = 0 if PACKED else sequence
    key = begin + tl.arange(0, RESIDENT)
    lane = tl.arange(0, STREAMED)
    half = tl.arange(0, STREAMED // 2)
    heads = kv_heads * group
    rows += sequence * sampled
    factors += sequence * sampled
    weights += sequence * sampled
    spread += sequence * (sampled // 2)

    # Rows ascend: the tiles before the first row behind the first key, and those behind the last key's window, add nothing.
    passed = 0
    within = 0
    for block in range(0, sampled, STREAMED):
        position = tl.load(rows + block + lane)
        passed += tl.sum(((position >= 0) & (position <= begin)).to(tl.int32), axis=0)
        visible_to_some = (position >= 0) & (position < begin + RESIDENT - 1 + window) if WINDOW else position >= 0
        within += tl.sum(visible_to_some.to(tl.int32), axis=0)

    estimate = tl.zeros((RESIDENT,), tl.float32)
    variance = tl.zeros((RESIDENT,), tl.float32)
    for nth in range(passed // STREAMED, tl.cdiv(within, STREAMED)):
        block = nth * STREAMED
        received = tl.zeros((RESIDENT, STREAMED), tl.float32)
        for kv_head in range(kv_heads):
            k_first = k + batch * k_stride_batch + tl.cast(kv_head, tl.int64) * k_stride_head + (start + begin) * k_stride
            keys = Tile(k_first, k_stride, k_stride_dim, tokens - begin)
            loaded = load_tile(keys, 0, shape, RESIDENT)
            for member in range(group):
                head = kv_head * group + member
                q_first = q + ((sequence * sampled + block) * heads + head) * HEAD_DIM
                queries = Tile(q_first, heads * HEAD_DIM, 1, STREAMED)
                product = products(loaded, keys, queries, shape)  # [key, row]
                shift = tl.load(negative_lse + (sequence * heads + head) * sampled + block + lane)[None, :]
                received += probabilities(product, shift, scoring.factors)
        position = tl.load(rows + block + lane)
        visible = key[:, None] < position[None, :]
        if WINDOW:
            visible &= position[None, :] - key[:, None] < window
        received = tl.where(visible, received * tl.load(factors + block + lane)[None, :], 0.0)
        estimate += tl.sum(received * tl.load(weights + block + lane)[None, :], axis=1)
        one, other = tl.split(tl.reshape(received, (RESIDENT, STREAMED // 2, 2)))
        difference = one - other
        coefficient = tl.load(spread + block // 2 + half)[None, :]
        variance += tl.sum(difference * difference * coefficient, axis=1)

    divisor = tl.zeros((RESIDENT,), tl.float32) + heads
    if NORMALIZE:
        future = tokens - 1 - key
        if WINDOW:
            future = tl.minimum(future, window - 1)
        divisor *= tl.maximum(future, 1).to(tl.float32)
    out = batch * padded_tokens + start + key
    tl.store(estimate_out + out, estimate / divisor, mask=key < tokens)
    tl.store(error_out + out, tl.sqrt(variance) / divisor, mask=key < tokens)


def sampled_incoming_attention(
    q: Tensor, k: Tensor, spans: Spans, sample: SampledRows, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """See `entra_kernels.incoming_attention` with `sample_rows`. Beside the results: the sampled queries and their
    log-sum-exp, m times H D entries."""
    check_products(q)
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    estimate = torch.zeros(batch, tokens, dtype=torch.float32, device=q.device)
    error = torch.zeros_like(estimate)
    if not spans.count or not estimate.numel():
        return estimate, error
    size = attention_launch(head_dim, group, q.element_size(), chip_of(q.device), options=True)
    # Whole tiles of rows: what is added is no row, weighs nothing and is seen by nobody.
    missing = -sample.rows.shape[1] % size.resident
    rows = torch.nn.functional.pad(sample.rows, (0, missing), value=-1)
    sampled = rows.shape[1]
    weights = torch.nn.functional.pad(sample.weights, (0, missing)).float()
    spread = torch.nn.functional.pad(sample.spread, (0, sampled // 2 - sample.spread.shape[1])).float()
    first = 0 if spans.starts is None else spans.starts.clamp(0, tokens)[:, None]
    place = (first + rows.clamp(min=0)).clamp(max=tokens - 1)  # [S, sampled]
    element = torch.zeros_like(place) if batch == 1 else torch.arange(batch, device=q.device)[:, None].expand_as(place)
    q_sampled = q[element, :, place].contiguous()  # [S, sampled, H, D]
    factors = (
        torch.ones_like(weights) if options.row_weights is None else options.row_weights[element, place].float().contiguous()
    )
    none = rows < 0
    rows = rows.int()

    packed = batch == 1
    score_factors = Factors.of(options)
    of_absolute = score_factors._replace(scale=abs(score_factors.scale))
    constexprs = {
        "HEAD_DIM": head_dim,
        "DEPTH": size.depth,
        "RESIDENT": size.resident,
        "STREAMED": size.streamed,
        "WIDE": wide_tiles(k, size),
        "PACKED": packed,
        "WINDOW": options.sliding_window is not None,
        **size.options,
    }
    window, sinks = options.sliding_window or 0, options.sinks
    with torch.cuda.device_of(q):
        tables = plan(spans, size=size, kv_heads=kv_heads, window=options.sliding_window, device=q.device)
        if options.lse is not None:
            negative_lse = (options.lse[element, :, place].float() * -LOG2_E.value).masked_fill(none[..., None], -torch.inf)
            negative_lse = negative_lse.transpose(1, 2).contiguous()  # [S, H, sampled]
        else:
            negative_lse = torch.empty(spans.count, heads, sampled, dtype=torch.float32, device=q.device)
            _sampled_lse_kernel[(spans.count * (sampled // size.resident) * heads,)](
                q_sampled, k, sinks, rows, negative_lse, tables.spans, *k.stride(), 0 if sinks is None else sinks.stride(0),
                sampled, heads, group, window, of_absolute, FLIPPED=options.scale < 0, **constexprs,
            )  # fmt: skip
        _sampled_columns_kernel[(tables.slots,)](
            q_sampled, k, negative_lse, rows, factors, weights, spread, estimate, error, tables.tiles, tables.spans,
            *k.stride(), sampled, tokens, kv_heads, group, window, score_factors,
            NORMALIZE=options.reduction == "mean", **constexprs,
        )  # fmt: skip
    return estimate, error
