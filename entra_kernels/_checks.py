"""Checks that every operation shares: backend, gradients, dtype, device, options.

Nothing here reads a tensor's values, so nothing here waits for a GPU or breaks a torch.compile graph. What needs values
is checked inside the custom ops (`_custom_ops.py`), on the CPU only, where looking costs nothing.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "torch", "triton")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
LARGEST = torch.finfo(torch.float32).max
"""Options are numbers that float32 can hold: kernels take them as float32."""


def check_backend(backend: str, tensor: Tensor) -> str:
    """`backend` itself. "auto" stays: a program that is exported on one device decides where it runs.

    Raises:
        ValueError: for an unknown name.
        TypeError: when Triton is asked for float64.
    """
    check_among("backend", backend, BACKENDS)
    if backend == "triton" and tensor.dtype == torch.float64:
        raise TypeError("backend='triton' has no float64; use backend='torch' or backend='reference', or convert to float32")
    return backend


def choose_backend(backend: str, tensor: Tensor) -> str:
    """`check_backend`, with "auto" decided: "triton" for a tensor on CUDA or ROCm, else "torch"."""
    if check_backend(backend, tensor) == "auto":
        return "triton" if tensor.is_cuda and tensor.dtype != torch.float64 else "torch"
    return backend


def shown(value: object) -> str:
    """`repr(value)` for an error message: of an array its type and shape, of anything else at most 80 characters."""
    shape = getattr(value, "shape", None)
    if shape:
        return f"{type(value).__name__} of shape {list(shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_scoring_only(**tensors: Tensor | None) -> None:
    """Refuses inputs through which a gradient would have to flow.

    Raises:
        RuntimeError: when grad mode is on and a tensor requires grad.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{name} requires grad, but this operation is for scoring only and has no backward; "
                f"call it under torch.no_grad(), or pass {name}.detach()"
            )


def check_dtype(allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    """Raises a TypeError that names the argument when a tensor's dtype is not among `allowed`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}={shown(tensor)} must be a torch.Tensor, not {type(tensor).__name__}")
        if tensor.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(
                f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; it must be one of {names}; convert it with .to()"
            )


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises a ValueError that names both arguments when two tensors live on different devices."""
    first_name, first = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device}, {first_name} on {first.device}; move it with {name}.to({first_name}.device)"
            )


def under_autocast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where autocast is on and their dtypes differ, as torch's own products take them."""
    kind = a.device.type
    if a.dtype == b.dtype or torch.float64 in (a.dtype, b.dtype) or not torch.is_autocast_enabled(kind):
        return a, b
    dtype = torch.get_autocast_dtype(kind)
    return a.to(dtype), b.to(dtype)


def check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...], letters: str) -> None:
    """Raises a ValueError with the letters and the sizes when `tensor` has another shape than `expected`."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {letters} = {list(expected)}")


def check_number(name: str, value: float, rule: str, *, low: float = -LARGEST, high: float = LARGEST) -> float:
    """`value` as a float. `rule` continues "must be": the rule and the remedy.

    Raises:
        TypeError: when it is not a number.
        ValueError: when it is not in low ... high; NaN never is.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={shown(value)} must be a number, not {type(value).__name__}; pass a float")
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must be {rule}")
    return float(value)


def check_temperature(temperature: float) -> float:
    """`temperature` as a float. Below the least normal float32 its reciprocal would overflow."""
    rule = "greater than 0 (from 1.2e-38) and finite; 1.0 is the model's own distribution"
    return check_number("temperature", temperature, rule, low=torch.finfo(torch.float32).tiny)


def check_softcap(softcap: float | None) -> float | None:
    """`softcap` as a float, or None for None and 0. Logits divided by it, and it in log2 units, must stay inside float32."""
    if softcap is None:
        return None
    rule = "positive, 1e-30 to 1e30, or None for none"
    return check_number("softcap", softcap, rule, low=1e-30, high=1e30) if softcap != 0 else None


def check_window(sliding_window: int | None) -> int | None:
    """`sliding_window` as an int that any kernel can add to a position: beyond 2**30 tokens no window cuts anything off."""
    if sliding_window is None:
        return None
    if isinstance(sliding_window, bool) or not isinstance(sliding_window, numbers.Integral):
        raise TypeError(
            f"sliding_window={shown(sliding_window)} must be an int, not {type(sliding_window).__name__}; pass tokens"
        )
    if sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window} must be at least 1 token, or None for full attention")
    return min(int(sliding_window), 2**30)


def check_last(last: int | None) -> int | None:
    """`last` as an int: no sequence has more than 2**30 queries."""
    if last is None:
        return None
    if isinstance(last, bool) or not isinstance(last, numbers.Integral):
        raise TypeError(f"last={shown(last)} must be an int, not {type(last).__name__}; pass a number of queries")
    if last < 1:
        raise ValueError(f"last={last} must be at least 1 query, or None for all")
    return min(int(last), 2**30)


def check_among(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError that lists them when `value` is not among `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={shown(value)} must be one of {', '.join(map(repr, choices))}")


def check_ngram(ngram: int, name: str = "ngram") -> int:
    """`ngram` as an int that any kernel can add to a position: no sequence has an n-gram of more than 2**30 tokens."""
    if isinstance(ngram, bool) or not isinstance(ngram, numbers.Integral):
        raise TypeError(f"{name}={shown(ngram)} must be an int, not {type(ngram).__name__}; pass tokens")
    if ngram < 1:
        raise ValueError(f"{name}={ngram} must be at least 1 token; 4 is a start")
    return min(int(ngram), 2**30)


def check_sample(sample_rows: int, seed: int, tokens: int) -> int:
    """`sample_rows`, at most the `tokens` that there are: more are all of them.

    Raises when they cannot make one stratum of two and the last rows, or `seed` is no seed."""
    for name, value in (("sample_rows", sample_rows), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}={shown(value)} must be an int, not {type(value).__name__}; pass int({name})")
    if sample_rows < 4:
        raise ValueError(f"sample_rows={sample_rows} must be at least 4 rows, or None for all")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be in 0 to 2**63 - 1; 0 is the default")
    return min(int(sample_rows), max(tokens, 4))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed and returned in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
