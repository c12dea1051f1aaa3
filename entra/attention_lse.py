"""The row log-sum-exp that an attention call computes for itself, taken from it instead of computed again.

Fused attention keeps the log-sum-exp of every query for its backward. transformers drops it, so it is picked up on the way:

- SDPA and flash-attn run as operations that torch's dispatcher knows (`OPERATIONS`). A dispatch mode around the one call sees
  them, with their arguments, and asks those that leave the log-sum-exp out of an inference for it. Which kernel runs is decided
  before the operation is called, so the output stays bit-identical (on CUDA a test asks each backend; it has not run yet).
- FlexAttention returns it, but transformers rounds it to the dtype of v. In bfloat16 an LSE of 10 is off by up to 0.02, and so
  every probability by 2 %: only an unrounded one is taken. It must not run inside a dispatch mode, which turns torch.compile
  off.

It must be the log-sum-exp of exactly the scores that are asked for, as far as can be told without waiting for the device. That
means: the same q and k in memory, causal, the same scale, window and softcap, and no other argument that is set. Otherwise
there is none, and the caller computes its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "flash_attn::_flash_attn_forward",  # flash-attn 2.7 up
        "flash_attn_3::_flash_attn_forward",  # flash-attn 3, over the next one where it was built with both
        "flash_attn_3::fwd",
    }
)
"""Operations whose second output is the natural log-sum-exp, [B, H, N] (cuDNN: [B, H, N, 1]), possibly padded to more rows."""

OBSERVABLE = frozenset({"sdpa", "flash_attention_2", "flash_attention_3"})
"""transformers' names of the attention functions that may run inside `LseObserver`; any other may hold a torch.compile."""

# One thing under several names, by the name that is used here.
_SYNONYMS = {"query": "q", "key": "k", "value": "v", "is_causal": "causal", "softmax_scale": "scale"}

# Arguments that change neither the scores nor their log-sum-exp. All others but those compared below must be None or 0.
_IMMATERIAL = frozenset(
    {
        *("v", "compute_log_sumexp", "return_softmax", "return_debug_mask"),
        *("num_splits", "pack_gqa", "sm_margin", "rotary_interleaved", "is_rotary_interleaved"),
        "window_size_right",  # 0 when causal, whatever is passed
    }
)


@dataclass(frozen=True)
class _Operation:
    """One observed operation: its schema's name, its arguments by name, and its second output."""

    name: str
    arguments: dict[str, Any]
    lse: Any


class LseObserver(TorchDispatchMode):
    """Around one attention call: keeps the log-sum-exp that an operation in `OPERATIONS` computes there.

        with LseObserver() as observer:
            output = scaled_dot_product_attention(q, k, v, is_causal=True)
        observer.lse_of(q, k, scale=q.shape[-1] ** -0.5)  # float32 [B, H, N], and where it comes from; or None

    Not around anything that torch.compile has compiled: that would run uncompiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[_Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # higher-order operators have none
        if schema is None or schema.name not in OPERATIONS:
            return func(*args, **kwargs)
        names = [argument.name for argument in schema.arguments]
        if "compute_log_sumexp" in names:
            # In the place where it came, because modes below this one may take arguments by position.
            place = names.index("compute_log_sumexp")
            if place < len(args):
                args = (*args[:place], True, *args[place + 1 :])
            else:
                kwargs = {**kwargs, "compute_log_sumexp": True}
        outputs = func(*args, **kwargs)
        defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        arguments = {_SYNONYMS.get(name, name): value for name, value in given.items()}
        self._operations.append(_Operation(schema.name, arguments, outputs[1]))
        return outputs

    def lse_of(
        self, q: Tensor, k: Tensor, *, scale: float, sliding_window: int | None = None, softcap: float | None = None
    ) -> tuple[Tensor, str] | None:
        """The natural log-sum-exp of causal q and k, and the operation that computed it; None when it was not computed.

        Args:
            q, k: [B, H, N, D] and [B, Hkv, N, D], the very tensors that attention was called with.
            scale, sliding_window, softcap: as in `entra_kernels.incoming_attention`.

        Returns:
            float32 (float64 for float64) [B, H, N], a view of what the operation returned, and the operation's name.
        """
        if len(self._operations) != 1:  # several are parts of the scores (ring attention)
            return None
        operation = self._operations[0]
        arguments = {name: value for name, value in operation.arguments.items() if name not in _IMMATERIAL}
        tokens = q.shape[2]
        if not (
            _is_same_memory(arguments.pop("q"), q)
            and _is_same_memory(arguments.pop("k"), k)
            and arguments.pop("causal") is True
            and _or_default(arguments.pop("scale"), q.shape[-1] ** -0.5) == scale
            # A window of W is passed as W - 1 keys to the left, none as -1.
            and _effective(arguments.pop("window_size_left", -1) + 1, tokens) == _effective(sliding_window, tokens)
            and (arguments.pop("softcap", None) or None) == (softcap or None)
            and all(value is None or (not isinstance(value, Tensor) and value == 0) for value in arguments.values())
        ):
            return None
        lse = operation.lse
        if not isinstance(lse, Tensor) or lse.dtype not in (torch.float32, torch.float64):
            return None
        lse = (lse.squeeze(-1) if lse.ndim == 4 else lse)[..., :tokens].detach()
        return (lse, operation.name) if lse.shape == q.shape[:3] else None


def flex_attention_lse(
    returned: Any, mask: Any, q: Tensor, k: Tensor, *, scale: float, sliding_window: int | None, softcap: float | None
) -> tuple[Tensor, str] | None:
    """`LseObserver.lse_of` of what transformers' `flex_attention` function returned, (output, lse), for its `mask`.

    Its scale and softcap are those that it was called with. A BlockMask is known to be causal and nothing else when it was
    made of transformers' causal mask function alone; what is in it only the device knows.
    """
    lse = returned[1]
    plain = _is_plainly_causal(mask) and _effective(sliding_window, q.shape[2]) is None
    if not plain or not isinstance(lse, Tensor) or lse.dtype != torch.float32 or lse.shape != q.shape[:3]:
        return None
    return lse.detach(), "flex_attention"


def _is_same_memory(argument: Any, tensor: Tensor) -> bool:
    """Whether an operation's argument is `tensor` [B, H, N, D] itself, as it is or as [B, N, H, D] (flash-attn)."""
    return (
        isinstance(argument, Tensor)
        and argument.ndim == 4
        and (argument.is_set_to(tensor) or argument.transpose(1, 2).is_set_to(tensor))
    )


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _effective(sliding_window: int | None, tokens: int) -> int | None:
    """The window where it hides anything from `tokens` queries; 0 stands for none, like None."""
    return sliding_window if sliding_window and sliding_window < tokens else None


def _is_plainly_causal(mask: Any) -> bool:
    """Whether a BlockMask was made of transformers' causal mask function and no padding, window, or packing."""
    mask_mod = getattr(mask, "mask_mod", None)
    if mask_mod is None:
        return False
    from transformers.masking_utils import causal_mask_function

    plain = {"mask_function": causal_mask_function, "q_offset": 0, "kv_offset": 0}  # what a mask without a cache closes over
    return mask_mod is causal_mask_function or inspect.getclosurevars(mask_mod).nonlocals == plain
