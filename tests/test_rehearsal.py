"""A selection of the tests that need a GPU, on the GPU that is none of `fake_cuda.py`; `make rehearse` runs all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they run themselves")
ROOT = Path(__file__).parent.parent

TRIES = """
import json, sys
import pytest, torch
import fake_cuda
from entra.attention_lse import LseObserver
from entra_kernels import incoming_attention, linear_token_logprobs, redundancy
from torch.nn.attention import SDPBackend, sdpa_kernel

q, k = (torch.randn(1, heads, 20, 16, device="cuda") for heads in (2, 1))
bounds = torch.tensor([0, 20])

def launching(run):
    fake_cuda.launching = True
    try:
        return run()
    finally:
        fake_cuda.launching = False

tries = {
    "mixed": lambda: q + torch.ones(16),
    "a number": lambda: q + torch.tensor(1.0),
    "brought": lambda: q + torch.ones(16).cuda(),
    "to numpy": lambda: q.numpy(),
    "the host's copy": lambda: q.cpu().numpy(),
    "bounds of the host": lambda: redundancy(*q[0, 0, :, :2].T, torch.arange(20, device="cuda"), bounds, backend="triton"),
    "read back": lambda: launching(lambda: q.max().item()),
    "a mask": lambda: launching(lambda: q[q > 0]),
    "pageable": lambda: launching(lambda: bounds.to("cuda", non_blocking=True)),
    "pinned": lambda: launching(lambda: bounds.pin_memory().to("cuda", non_blocking=True)),
    "read back before": lambda: q.max().item(),
    "launched": lambda: incoming_attention(q, k, backend="triton"),
}

def reused(name):
    half = q.half()
    with torch.no_grad(), sdpa_kernel(getattr(SDPBackend, name)), LseObserver() as observer:
        torch.nn.functional.scaled_dot_product_attention(half, half, half, is_causal=True)
    lse, source = observer.lse_of(half, half, scale=0.25)
    one, two = (incoming_attention(half, half, lse=given, backend="triton") for given in (lse, None))
    return source, (one - two).abs().max().item()

def streams():
    flat = q[0, 0]
    ids = torch.arange(20, device="cuda")
    fake_cuda.launches.clear()
    with torch.cuda.stream(torch.cuda.Stream()) as side:
        incoming_attention(q, k, backend="triton", start=ids[:1], length=ids[9:10])
        linear_token_logprobs(flat, flat, ids, backend="triton")
        redundancy(flat[:, 0], flat[:, 1], ids, 20 * ids[:2], backend="triton")
    return [(name, stream is side) for name, stream in fake_cuda.launches]

reuses = [reused(f"{name}_ATTENTION") for name in ("FLASH", "CUDNN", "EFFICIENT")]
launched = streams()
found = {}
for name, run in tries.items():
    try:
        run()
        found[name] = ""
    except Exception as error:
        found[name] = str(error)
selection = sys.argv[1:]
code = pytest.main(["-p", "fake_cuda", "-m", "gpu", "-q", "-p", "no:cacheprovider", *selection])
print()
result = str(incoming_attention(q, k).device)
print(json.dumps({"found": found, "code": int(code), "result": result, "reuses": reuses, "streams": launched}))
"""

SELECTION = (
    "entra_kernels/test_incoming_attention.py::test_auto_is_triton_on_a_gpu",
    "entra_kernels/test_general.py::test_against_the_oracle[triton-everything, packed, last-gpu]",
    "entra_kernels/test_redundancy.py::TestByHand::test_example[gpu-triton]",
    "entra_kernels/test_sampled.py::test_against_the_reference[triton-packed-gpu-fp32]",
    "entra_kernels/test_logprobs.py::TestLinearTokenLogprobs::test_options[all-gpu-triton-fused-bfloat16]",
)


@pytest.fixture(scope="module")
def rehearsed():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    command = [sys.executable, "-c", TRIES, *(str(ROOT / "tests" / name) for name in SELECTION)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_a_selection_passes(rehearsed):
    result, output = rehearsed
    assert result["code"] == 0, output
    assert f"{len(SELECTION)} passed" in output
    assert result["result"] == "cuda:0"


def test_what_cuda_would_refuse_is_refused(rehearsed):
    found = rehearsed[0]["found"]
    waits = "makes the host wait for the device in a path that launches kernels"
    assert {name: error for name, error in found.items() if not error} == dict.fromkeys(
        ("a number", "brought", "the host's copy", "pinned", "read back before", "launched"), ""
    )
    assert "found cuda:0 and cpu in" in found["mixed"]
    assert "cuda:0 device type tensor to numpy" in found["to numpy"]
    assert {name for name, error in found.items() if waits in error} == {"read back", "a mask", "pageable"}


def test_the_log_sum_exp_of_cudas_attention_is_reused(rehearsed):
    """To what the fast exponential of the CPU's kernel may cost (`test_attention_lse.py`). `make rehearse` also captures it out
    of a model."""
    sources, errors = zip(*rehearsed[0]["reuses"], strict=True)
    assert [source.removeprefix("aten::_scaled_dot_product_") for source in sources] == [
        f"{name}_attention" for name in ("flash", "cudnn", "efficient")
    ]
    assert max(errors) <= 1.3e-4


def test_every_launch_goes_to_the_current_stream(rehearsed):
    names, there = zip(*rehearsed[0]["streams"], strict=True)
    assert {"_column_sum_kernel", "_place_tiles_kernel", "_head_kernel", "_reward_kernel"} <= set(names)
    assert all(there)
