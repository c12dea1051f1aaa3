"""A GPU that is none: the tests marked gpu, and the benchmarks, as they would run on one, but on the CPU. A plugin of pytest:

    PYTHONPATH=.:tests pytest -p fake_cuda -m gpu        # make rehearse runs everything

A tensor "on cuda:0" is a CPU tensor that says so and refuses to meet one that does not, as CUDA would. The kernels run in
Triton's interpreter. Within an operation that launches kernels whatever makes the host wait for the device is an error: a value
read back, a copy to the host, or one from memory that is not pinned. A graph could not capture these either.

Attention runs on the CPU under the names of CUDA's fused operations, which are chosen as `sdpa_kernel` says. So the log-sum-exp
that such an operation leaves behind can be observed and used.

It shows mixed devices, wrong launch arguments, waits, and the stream of each launch. It does not show what a GPU computes, nor
how fast, nor whether streams wait for each other.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import torch
import torch.nn.functional as F
from torch._library.custom_ops import CustomOpDef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
WAITS = {
    *("item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__contains__"),
    *("equal", "allclose", "is_nonzero", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"),
}
"""What returns a value to the host, or a shape that depends on one."""

MIXING = {
    *("to", "cuda", "cpu", "copy_", "type_as", "set_", "is_set_to", "__getitem__", "__setitem__", "index_put", "index_put_"),
    *("__get__", "__set__", "_has_compatible_shallow_copy_type"),
}
"""What takes tensors of both kinds."""

launching = False
"""Whether an operation that launches kernels is under way."""

in_backward = False
"""Whether gradients are computed."""


class CudaTensor(torch.Tensor):
    """Results are wrapped by `Mode`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def __deepcopy__(self, memo):
        copy = on_device(self.detach().clone())
        if getattr(self, "_is_param", False):
            copy._is_param = True
        return copy.requires_grad_(self.requires_grad)


def on_device(tensor):
    """The same memory, said to be the device's."""
    if type(tensor) is not torch.Tensor:
        return tensor
    if tensor.grad_fn is None:
        return torch.Tensor._make_subclass(CudaTensor, tensor.detach(), tensor.requires_grad)
    return tensor.as_subclass(CudaTensor)


def kind_of(value):
    """ "cuda" or "cpu" where `value` names a device."""
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, str):
        return value.partition(":")[0] if value.partition(":")[0] in ("cuda", "cpu", "meta") else None
    return None


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", str(function))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        host = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor) and tensor.ndim]
        if device and host and name not in MIXING and not in_backward:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {name}")
        if name == "numpy" and device:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

        target = kind_of(kwargs.get("device"))
        if target == "cuda":
            kwargs["device"] = "cpu"
        if name in ("to", "cuda", "cpu"):
            named = [kind_of(value) for value in args[1:] if kind_of(value)]
            like = [value for value in args[1:] if isinstance(value, torch.Tensor)]
            target = target or (named[0] if named else None) or (name if name != "to" else None)
            if like:
                target = "cuda" if isinstance(like[0], CudaTensor) else "cpu"
            args = tuple("cpu" if kind_of(value) == "cuda" else value for value in args)
            if name == "cuda":
                function, args, kwargs = torch.Tensor.to, (args[0], "cpu"), {}
        generator = kwargs.get("generator")
        if target == "cuda" and isinstance(generator, torch.Generator) and generator.device.type == "cpu" and name != "to":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' in {name}")
        self.check_waits(name, target, args, kwargs, device, host)
        if name in ("mm", "addmm") and "out_dtype" in kwargs:  # cuBLAS alone does this
            kwargs["out"].copy_(function(*(each.float() for each in args)))
            return kwargs["out"]
        if name == "scaled_dot_product_attention" and device:
            function = attention
        result = function(*args, **kwargs)
        moved = name in ("to", "cuda", "cpu") and target and bool(device) != (target == "cuda")
        if moved and result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr():
            result = result.clone()
        if target == "cuda" or (device and target is None):
            return tree_map(on_device, result)
        if moved or (device and target == "cpu"):
            return tree_map(lambda each: each.as_subclass(torch.Tensor) if isinstance(each, CudaTensor) else each, result)
        return result

    @staticmethod
    def check_waits(name, target, args, kwargs, device, host):
        """Raises where the host would wait for the device while it launches kernels."""
        if not launching:
            return
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, CudaTensor) and leaf.dtype == torch.bool]
        counted = name == "repeat_interleave" and "output_size" not in kwargs and isinstance(args[-1], CudaTensor)
        back = counted or (
            device and (name in WAITS or (name == "to" and target == "cpu") or (name == "__getitem__" and masks))
        )
        pinned = kwargs.get("non_blocking") and args and getattr(args[0], "was_pinned", False)
        there = target == "cuda" and ((name in ("to", "cuda") and host) or name in ("tensor", "as_tensor")) and not pinned
        if back or there:
            raise RuntimeError(f"{name} makes the host wait for the device in a path that launches kernels")


def run_backward(*args, engine=torch.autograd._engine_run_backward, **kwargs):
    """Functions in Python make tensors "on cuda:0" there, too. Gradients come as the CPU's, and may meet the others."""
    global in_backward
    in_backward = True
    try:
        with Mode():
            return engine(*args, **kwargs)
    finally:
        in_backward = False


FUSED = {
    "_scaled_dot_product_flash_attention": (torch.backends.cuda.flash_sdp_enabled, (0.0,)),
    "_scaled_dot_product_cudnn_attention": (torch.backends.cuda.cudnn_sdp_enabled, (None, False, 0.0)),
    "_scaled_dot_product_efficient_attention": (torch.backends.cuda.mem_efficient_sdp_enabled, (None, False, 0.0)),
}
"""CUDA's fused attention, in the order in which SDPA asks: whether it may, and the arguments between v and `is_causal`."""


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`scaled_dot_product_attention` as CUDA chooses: a fused operation where one takes these tensors and may. Otherwise, and
    for a mask or a backward, it is plain arithmetic."""
    half, grouped = query.dtype in (torch.float16, torch.bfloat16), query.shape[1] != key.shape[1]
    able = [name for name, (may, _) in FUSED.items() if may() and not (grouped if "efficient" in name else not half)]
    if not able and not torch.backends.cuda.math_sdp_enabled():
        raise RuntimeError("No available kernel. Aborting execution.")
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if able and attn_mask is None and not dropout_p and not recorded and query.shape[-1] == value.shape[-1]:
        operation, between = getattr(torch.ops.aten, able[0]), FUSED[able[0]][1]
        return operation(query, key, value, *between, is_causal, scale=scale)[0]
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def fused_attention(name):
    """What stands behind a name of `FUSED`: the CPU's flash attention, its log-sum-exp shaped as CUDA's."""
    schema = getattr(torch.ops.aten, name).default._schema

    def forward(query, key, value, *args, scale=None):
        given = dict(zip([argument.name for argument in schema.arguments][3:], args, strict=False))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = flash(query, key, value, 0.0, given.get("is_causal", False), scale=scale)  # defaults are not handed over
        # Flash attention has no such argument and always computes it.
        wanted = given.get("compute_log_sumexp", "flash" in name)
        if "efficient" in name:  # padded to a multiple of 32 rows
            lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=math.nan)[..., : None if wanted else 0]
        if "cudnn" in name:
            lse = lse.unsqueeze(-1) if wanted else None
        rest = [torch.empty(0) if "Tensor" in str(returned.type) else 0 for returned in schema.returns[2:]]
        return tree_map(on_device, (output, lse, *rest))  # a dispatch mode hands them out as they are

    return forward


def run_op(op, *args, **kwargs):
    """A custom op's own function: the dispatcher would send it by what its tensors truly are."""
    global launching
    before = launching
    launching = any(isinstance(each, CudaTensor) for each in args) and "triton" in args
    try:
        return op._init_fn(*args, **kwargs)
    finally:
        launching = before


def pinned(tensor):
    copy = tensor.clone()
    copy.was_pinned = True
    return copy


class Stream:
    def __init__(self, device=None, priority=0, **options):
        self.device, self.cuda_stream = DEVICE, id(self)

    def __getattr__(self, name):  # synchronize, wait_stream, record_event: nothing is late here
        return lambda *args: Event() if name == "record_event" else None


streams = [Stream()]
"""The current one is the last."""

launches = []
"""Name of each kernel that was launched, and the stream."""


@contextlib.contextmanager
def in_stream(stream):
    streams.append(stream or streams[-1])
    try:
        yield streams[-1]
    finally:
        streams.pop()


class Event:
    def __init__(self, **options):
        self.at = 0.0

    def record(self, *stream):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return max((later.at - self.at) * 1e3, 1e-3)


ATEN = torch.library.Library("aten", "IMPL")
PROPERTIES = SimpleNamespace(major=9, minor=0, multi_processor_count=2, name="no GPU", total_memory=80 << 30, warp_size=32)


def install():
    """Puts it all in place, for as long as the process lives."""
    numbers = {"current_device": 0, "device_count": 1, "_exchange_device": 0, "_maybe_exchange_device": 0}
    memory = {"memory_allocated": 0, "max_memory_allocated": 1, "mem_get_info": (64 << 30, 80 << 30)}
    truths = dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True)
    chip = {"get_device_name": "no GPU", "get_device_properties": PROPERTIES, "get_device_capability": (9, 0)}
    nothing = dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "init", "_lazy_init", "set_device"))
    seeds = {"get_rng_state": torch.get_rng_state(), **dict.fromkeys(("set_rng_state", "manual_seed", "manual_seed_all"))}
    for name, value in {**numbers, **memory, **truths, **chip, **nothing, **seeds}.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)  # one each: Dynamo tells them apart
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.stream = Event, Stream, in_stream
    torch.cuda.current_stream, torch.cuda.default_stream = lambda device=None: streams[-1], lambda device=None: streams[0]
    torch.Tensor.pin_memory = pinned
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter that is moved becomes one of the device's
    torch.compile = lambda model=None, **options: model or (lambda function: function)  # Dynamo does not know these tensors
    CustomOpDef.__call__ = run_op
    for name in FUSED:
        ATEN.impl(name, fused_attention(name), "CPU")
    Mode().__enter__()
    torch.autograd._engine_run_backward = run_backward

    import triton.language as tl
    from triton.runtime import driver, interpreter

    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 * 1024})
    driver.set_active(SimpleNamespace(utils=utils, get_current_device=lambda: 0, get_device_interface=lambda: torch.cuda))
    run = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        tensors = {name: value for name, value in zip(self.arg_names, args, strict=False) if isinstance(value, torch.Tensor)}
        tensors |= {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        host = [name for name, tensor in tensors.items() if not isinstance(tensor, CudaTensor)]
        if host and len(host) < len(tensors) and not in_backward:
            raise ValueError(f"Pointer argument {host[0]} of {self.fn.__name__} cannot be accessed from Triton (cpu tensor?)")
        launches.append((self.fn.__name__, streams[-1]))
        with torch._C.DisableTorchFunction():
            return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    # The interpreter multiplies the bits of bfloat16 as integers.
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)

    from entra_kernels._triton import hopper

    hopper.Views.of = lambda *tensors: None  # the interpreter runs no Gluon: the plain passes take its place


install()
