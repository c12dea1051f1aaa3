"""Incoming attention out of one forward of any transformers causal LM, without an N x N matrix.

Attention modules of transformers look their attention function up by name, in `config._attn_implementation`, on every
call, and hand it q and k after RoPE and q/k norms. So for the length of a `with` block the *one* module that is scored
gets a shallow copy of its config that names a function of ours. That function puts the module's own config back, calls
the function that would have run, and reduces q and k to incoming attention. Everything else (the masks, which are built
from the model's config, the other layers, the class, the hooks) is untouched: the logits stay bit-identical.

Decisions taken here:

- Geometry (first token and length of each row) comes from the caller, never from the mask that arrives: that may be
  None, 2-D, 4-D, or a BlockMask, depending on the attention implementation.
- Scale, window, softcap and sinks are those that the attention call receives, head sizes those of its tensors. The
  config decides only which layer is scored.
- Attention runs first, because where it computes the log-sum-exp of these scores anyway, the reduction takes it and the
  Triton kernels need one pass over them instead of two (`entra/attention_lse.py`).
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
from typing import Any

import torch
from torch import Tensor, nn

from entra.attention_lse import OBSERVABLE, LseObserver, flex_attention_lse
from entra_kernels import incoming_attention

_PREFIX = "entra_capture|"

# transformers' names of layers (`ALLOWED_ATTN_LAYER_TYPES`) whose softmax runs over every earlier token, over a window
# of them, or that hold no softmax at all. "hybrid" layers add a recurrent branch beside the attention. Every other
# name (indexed, compressed, chunked, ...) is attention to a subset of the keys that q and k alone do not tell.
_FULL = frozenset({"full_attention", "attention", "hybrid"})
_WINDOWED = frozenset({"sliding_attention", "hybrid_sliding"})
_NO_SOFTMAX = frozenset({"linear_attention", "mamba", "recurrent", "conv", "moe", "mlp"})

# Arguments of an attention call that change the scores or the set of keys in a way that start and length do not tell:
# relative positions (Inkling), sparse attention (DSA, MiniMax-M3), several sequences packed into a row.
_UNSCORABLE_ARGUMENTS = ("position_bias", "indices", "block_indices", "cu_seq_lens_q")


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


class Capture:
    """What `capture_incoming_attention` yields: the result of the last forward run inside the block."""

    def __init__(
        self,
        *,
        config: Any,
        attend: Callable[..., Any],
        index: int,
        name: str,
        layer_type: str,
        start: Tensor | None,
        length: Tensor | None,
        statistic: str,
        head_reduction: str,
        backend: str,
        reuse_lse: bool,
    ) -> None:
        self._config = config
        self._attend = attend
        self._index = index
        self._name = name
        self._layer_type = layer_type
        # Without layer_types all layers are alike, and only the call tells whether they have a window.
        self._uniform = getattr(config, "layer_types", None) is None
        self._start = start
        self._length = length
        self._statistic = statistic
        self._head_reduction = head_reduction
        self._backend = backend
        self._reuse_lse = reuse_lse
        self._result: tuple[Tensor, CapturedLayer] | None = None
        self.inspect: Callable[[Tensor, Tensor, dict[str, Any]], None] | None = None
        """Called with q [B, H, N, D], k [B, G, N, D] and the other arguments of `incoming_attention`, for `entra.verify`."""

    @property
    def incoming(self) -> Tensor:
        """Incoming attention, float32 [B, N], zeros outside the rows' spans; RuntimeError before a forward."""
        return self._finished()[0]

    @property
    def layer(self) -> CapturedLayer:
        """The layer that was scored; RuntimeError before a forward."""
        return self._finished()[1]

    def _finished(self) -> tuple[Tensor, CapturedLayer]:
        if self._result is None:
            raise RuntimeError(
                f"nothing was captured: the attention of {self._name!r} did not run inside the with block; call the "
                "model that was given to capture_incoming_attention (or a wrapper around it) once inside the block"
            )
        return self._result

    def _refuse_unscorable(self, module: Any, q: Tensor, k: Tensor, mask: Any, arguments: dict[str, Any]) -> None:
        """Raise for an attention call that start and length do not describe; q [B, H, N, D], k [B, Hkv, N, D]."""
        batch, _, tokens, _ = q.shape
        if k.shape[2] != tokens:
            raise RuntimeError(
                f"{self._name} attends from {tokens} queries to {k.shape[2]} keys; a capture needs the whole sequence "
                "in one forward: pass use_cache=False and no past_key_values"
            )
        unscorable = [name for name in _UNSCORABLE_ARGUMENTS if arguments.get(name) is not None]
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1:
            unscorable.append("a mask per head")  # Doge's dynamic sparse mask
        if arguments.get("is_causal") is False:
            unscorable.append("is_causal=False")
        if unscorable:
            raise RuntimeError(
                f"{self._name} ({type(module).__name__}, {self._layer_type}) attends with {unscorable[0]}, which "
                "incoming attention cannot reproduce; run one sequence per row through a model with plain attention"
            )
        for name, value in (("start", self._start), ("length", self._length)):
            if value is not None and value.shape != (batch,):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} but the forward ran a batch of {batch}; "
                    f"give one entry per row, shape ({batch},)"
                )

    def _reusable_lse(self, mask: Any, arguments: dict[str, Any]) -> str | None:
        """The attention implementation, when the log-sum-exp of its rows may be that of the rows that are scored.

        A row's keys are those from token 0 on only without `start`; right padding is then never seen. Sinks are not in an
        operation's log-sum-exp. What a mask holds only the device knows, BlockMasks aside.
        """
        if (
            not self._reuse_lse
            or self._start is not None
            or isinstance(mask, Tensor)
            or arguments.get("s_aux") is not None
            or torch.compiler.is_compiling()
        ):
            return None
        return (self._config._attn_implementation or "eager").removeprefix(_PREFIX)

    def _reduce(
        self, module: Any, q: Tensor, k: Tensor, arguments: dict[str, Any], known_lse: Callable[..., Any] | None
    ) -> None:
        """Set the result from one attention call; q [B, H, N, D], k [B, Hkv, N, D]."""
        batch, _, tokens, dim = q.shape
        window = self._window(module, arguments)
        windowed = self._uniform and window is not None
        start = None if self._start is None else self._start.to(q.device)
        length = None if self._length is None else self._length.to(q.device)
        sinks = arguments.get("s_aux")
        scale = arguments.get("scaling")
        scale = dim**-0.5 if scale is None else float(scale)
        row_weights = None
        if self._statistic == "lift":
            row_weights = _visible_keys(batch, tokens, start, window, q.device)
        softcap = arguments.get("softcap")
        known = None if known_lse is None else known_lse(q, k, scale=scale, sliding_window=window, softcap=softcap)
        lse, lse_source = (None, None) if known is None else known

        options: dict[str, Any] = {
            "start": start,
            "length": length,
            "scale": scale,
            "sliding_window": window,
            "softcap": softcap,
            "sinks": sinks,
            "row_weights": row_weights,
        }
        if self.inspect is not None:
            self.inspect(q, k, options)
        incoming = incoming_attention(q, k, lse=lse, per_head=self._head_reduction == "max", backend=self._backend, **options)
        if self._head_reduction == "max":
            incoming = incoming.amax(dim=1)
        self._result = (
            incoming,
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
        )

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
def capture_incoming_attention(
    model: nn.Module,
    *,
    start: Tensor | Sequence[int] | None = None,
    length: Tensor | Sequence[int] | None = None,
    statistic: str = "mean",
    head_reduction: str = "mean",
    backend: str = "auto",
    reuse_lse: bool = True,
) -> Iterator[Capture]:
    """Score the last full-attention layer during the forwards inside a `with` block: `sum_{j>i} A_ji / (N - i)`.

        with capture_incoming_attention(model, start=start, length=length) as captured:
            model(input_ids, use_cache=False)
        captured.incoming  # float32 [B, N]

    The layer is the last one of full attention, or where every softmax layer has a window the last of those, with its
    window. The logits are bit-identical to those without capture (inductor compiles another graph, so there up to its
    rounding), and the model's config, mode, and hooks are as before after the block, also when the forward raised.

    Every forward inside the block replaces the result of the one before; so does gradient checkpointing's second pass,
    with the same values. No gradient flows through a result, and attention dropout is not part of it. One thread at a time
    may run a model that is captured.

    Args:
        model: a transformers causal LM, bare or wrapped (PEFT, DDP, FSDP2, torch.compile with or without fullgraph).
        start: int [B], each row's first token; None: 0. A row is one sequence; packing by position_ids is not seen.
        length: int [B], each row's count of tokens; None: all from `start` on. Pads outside the span count for
            nothing. The model's own attention_mask is the caller's business: right padding needs none.
        statistic: "mean", or "lift": each query's attention as a multiple of its uniform share, `sum_{j>i} w_j A_ji`
            over the same divisor with w_j the number of keys that j sees, at most the window. 1 everywhere when all
            scores are equal.
        head_reduction: over query heads, "mean" or "max" of the heads' statistics.
        backend: of `entra_kernels.incoming_attention`.
        reuse_lse: take the log-sum-exp that the attention call computes, where it does (SDPA's fused kernels, flash-attn;
            `captured.layer.lse_source` says which): one pass of the Triton kernels instead of two. It needs a call without
            mask and `start`, and a window only where the operation applies it (flash-attn). False: always compute it.

    Raises:
        ValueError: an unknown statistic or head_reduction; start or length that do not fit the batch; a model without
            a softmax layer that can be scored (only linear, sparse, or indexed attention), with its layer types; a softcap
            that the attention implementation leaves out (Gemma 2 with SDPA before transformers 5.21).
        TypeError: start or length that are not whole numbers.
        RuntimeError: a forward with a key-value cache in use, or with a position bias, sparse indices, or
            packed sequences; reading `captured.incoming` before a forward.

    Source: docs/method.md, incoming attention.
    """
    for option, value, allowed in (
        ("statistic", statistic, ("mean", "lift")),
        ("head_reduction", head_reduction, ("mean", "max")),
    ):
        if value not in allowed:
            raise ValueError(f"{option}={value!r} must be one of {', '.join(map(repr, allowed))}")

    first, count = _whole_numbers("start", start), _whole_numbers("length", length)
    name, module, layer_type = scored_layer(model)
    config = module.config
    original = config._attn_implementation
    capture = Capture(
        config=config,
        attend=_attention_function(name, module),
        index=module.layer_idx,
        name=name,
        layer_type=layer_type,
        start=first,
        length=count,
        statistic=statistic,
        head_reduction=head_reduction,
        backend=backend,
        reuse_lse=reuse_lse,
    )
    swapped = copy.copy(config)
    # The public setter writes through to sub-configs, which the copy shares with the original.
    swapped._attn_implementation_internal = _registered_name(original)
    swapped._entra_capture = capture
    module.config = swapped
    try:
        yield capture
    finally:
        module.config = config


def _whole_numbers(name: str, value: Tensor | Sequence[int] | None) -> Tensor | None:
    if value is None:
        return None
    tensor = torch.as_tensor(value)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}={value!r} must hold whole numbers of tokens (int32 or int64); convert it with .long()")
    return tensor


def _capturing_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """The registered attention function: attend as the module's own config says, and reduce q and k."""
    swapped = module.config
    capture: Capture = swapped._entra_capture
    capture._refuse_unscorable(module, query, key, attention_mask, kwargs)
    implementation = capture._reusable_lse(attention_mask, kwargs)
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
        capture._reduce(module, query, key, kwargs, known_lse)
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
    text_config = _text_config(model)
    layer_types = getattr(text_config, "layer_types", None)
    candidates = attention_layers(model)
    full = [candidate for candidate in candidates if candidate[2] in _FULL]
    windowed = [candidate for candidate in candidates if candidate[2] in _WINDOWED]
    # A window is the whole story only where no other layer reaches further by attending sparsely.
    sparse = set(layer_types or ()) - _FULL - _WINDOWED - _NO_SOFTMAX
    scorable = full or ([] if sparse else windowed)
    if not scorable:
        raise ValueError(_refusal(model, text_config, layer_types))
    # Stable: of two stacks with the same indices (HRM) the one that comes later.
    layer = sorted(scorable, key=lambda candidate: candidate[1].layer_idx)[-1]
    _refuse_dropped_softcap(layer[1])
    return layer


def _refuse_dropped_softcap(module: Any) -> None:
    """Raise for SDPA with a softcap (Gemma 2): transformers took it and left it out, in every layer, before it refused it."""
    softcap = getattr(module, "attn_logit_softcapping", None)
    implementation = (module.config._attn_implementation or "eager").removeprefix(_PREFIX)
    if softcap is not None and implementation == "sdpa" and transformers_version() < (5, 21):
        raise ValueError(
            f"{type(module).__name__} caps its attention scores (attn_logit_softcapping={softcap}), but attn_implementation="
            "'sdpa' of transformers before 5.21 leaves the cap out, so that logits and attention are not the model's; load it "
            'with attn_implementation="eager", or use transformers>=5.21'
        )


def transformers_version() -> tuple[int, int]:
    """Major and minor version of the transformers that is installed."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


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
        index = getattr(module, "layer_idx", None)
        if (
            not isinstance(index, int)
            or (depth is not None and index >= depth)
            or type(getattr(module, "config", None)) is not type(text_config)
            or not getattr(module, "is_causal", True)
            or not getattr(text_config, "is_causal", True)
            or not _uses_attention_interface(module)
        ):
            continue
        candidates.append((name, module, "full_attention" if layer_types is None else layer_types[index]))
    return candidates


def _text_config(model: nn.Module) -> Any:
    """The config of the text decoder inside any wrapper."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            if getattr(config, "is_encoder_decoder", False):
                raise ValueError(
                    f"{type(module).__name__} (model_type={config.model_type!r}) is an encoder-decoder model; "
                    "incoming attention is defined for decoder-only language models, pass one of those"
                )
            return config.get_text_config(decoder=True)
    raise ValueError(f"model is a {type(model).__name__} without a transformers config; pass a transformers causal LM")


def _refusal(model: nn.Module, text_config: Any, layer_types: Sequence[str] | None) -> str:
    """The message for a model without a layer to score: its layer types, and its layers' classes."""
    classes = {type(module).__name__ for module in model.modules() if hasattr(module, "layer_idx")} or {
        type(layer).__name__ for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module
    }
    types = f"of type {', '.join(sorted(set(layer_types)))}; they are " if layer_types else ""
    built = ", ".join(sorted(classes)) or "no known class"
    return (
        f"no layer of this model (model_type={text_config.model_type!r}) can be scored: its layers are {types}"
        f"built from {built}; incoming attention needs a causal softmax layer, full or windowed, that goes through "
        "transformers' attention interface; score with another model"
    )
