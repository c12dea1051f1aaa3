"""Launches recorded without a GPU are what a GPU would get."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.static import sass


@pytest.fixture(scope="session")
def recorded(python):
    done = python(Path(__file__).parent / "recorded.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def case(recorded, name):
    (found,) = [case for case in recorded["some"] if case["name"] == name]
    return found


def test_strides_are_those_of_the_call(recorded):
    """Head dim 72: heads lie 72 apart, tokens 8 times as far. A loop over multiples of 16 loads vectors."""
    passes = case(recorded, "sm_90 bf16 attention column_sum d=72")
    assert passes["constexprs"]["q_stride_dim"] == 1
    assert passes["attributes"]["q_stride"] == [["tt.divisibility", 16]]
    assert passes["attributes"]["q_stride_head"] == []
    assert passes["attributes"]["slots"] == []  # told not to be specialised


def test_a_stride_of_one_is_a_constant(recorded):
    passes = case(recorded, "sm_90 bf16 attention column_sum one token")
    assert passes["types"]["q_stride_batch"] == "constexpr"
    assert passes["constexprs"]["q_stride_batch"] == passes["constexprs"]["k_stride"] == 1


def test_descriptors_are_recorded(recorded):
    passes = case(recorded, "sm_90 bf16 hopper ring_column_sum d=128")
    assert passes["types"]["q_desc"].startswith("tensordesc<bf16[128, 128],NVMMASharedLayout(")
    assert passes["types"]["lse_desc"].startswith("tensordesc<fp32[1, 128],NVMMASharedLayout(")
    # What other Tritons than those with a known Gluon launch is recorded, too.
    assert case(recorded, "sm_90 bf16 attention column_sum d=128")["constexprs"]["RESIDENT"] == 256


def test_a_bool_is_of_one_byte(recorded):
    assert case(recorded, "sm_90 fp32 redundancy select")["types"]["protected_out"] == "*u1"


def test_rocm_knows_tensors_of_less_than_2_gib(recorded):
    passes = case(recorded, "gfx942 bf16 attention column_sum d=128")
    assert ["tt.pointer_range", 32] in passes["attributes"]["q"]
    names = [case["name"] for case in recorded["some"] if "logprobs" in case["name"]]
    assert "gfx942 bf16 logprobs head" in names
    assert not any("stretch" in name for name in names)  # no BLAS there multiplies into float32


def test_the_first_call_names_a_case(recorded):
    """`given lse` launches the same column pass as `d=128`, and lays out the log-sum-exp besides."""
    names = [case["name"] for case in recorded["some"]]
    assert len(names) == len(set(names))
    assert "sm_90 bf16 attention lay_out given lse" in names
    assert "sm_90 bf16 attention column_sum given lse" not in names


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ("another device", "values is on cuda:1, the launch on cuda:0"),
        ("memory of the host", "values is on cpu, the launch on cuda:1"),
        ("another stream", "launched into stream 0, which is not the current one of cuda:1"),
        ("no program", "a grid of (0, 1, 1) is out of range"),
        ("second axis", "a grid of (1, 65536, 1) is out of range"),
        ("programs", "a grid of (32768, 32768, 2) is out of range"),
        ("threads", "a grid of (16777216, 1, 1) is out of range; gfx942 takes 1 to 16777215 programs"),
        ("block", "values describes [1024, 64] in blocks of [512, 64]; TMA cannot"),
    ],
)
def test_what_no_gpu_takes_is_refused(recorded, launch, message):
    assert message in recorded["refusals"][launch]


@pytest.mark.parametrize("launch", ["taken", "many, taken", "block, taken"])
def test_what_a_gpu_takes_is_not(recorded, launch):
    assert recorded["refusals"][launch] == ""


def test_another_scale_is_no_other_kernel(recorded):
    """The factors of a score are a tuple, whose integers Triton would specialise: 1 and 16 among them."""
    kernels = ["_column_sum_kernel", "_row_lse_kernel", "_sampled_columns_kernel", "_sampled_lse_kernel"]
    assert sorted(recorded["scaled"]) == kernels


def test_too_much_shared_memory_is_a_problem(recorded):
    assert "B of shared memory, sm_90 has 1024" in recorded["little"]


def test_the_subset_holds_every_kernel(recorded):
    kernels = {}
    for found in recorded["sample"]:
        kernels.setdefault(found["name"].split()[0], set()).add(found["kernel"])
    assert kernels["sm_90"] == {
        *(f"attention _{name}_kernel" for name in ("add", "column_sum", "lay_out", "row_lse")),
        *(f"hopper _{name}_kernel" for name in ("column_sum", "row_lse")),
        *(f"plan _{name}_kernel" for name in ("count_tiles", "place_tiles")),
        *(f"sampled _{name}_kernel" for name in ("sampled_columns", "sampled_lse")),
        *(f"logprobs _{name}_kernel" for name in ("head", "reduce", "row", "stretch")),
        *(redundancy := {f"redundancy _{name}_kernel" for name in ("count", "importance", "reward", "select")}),
        *(copies := {f"copies _{name}_kernel" for name in ("clear", "first", "place")}),
    }
    assert redundancy | copies <= kernels["gfx942"]


def test_the_printed_table_is_of_the_launch_sizes_in_use(recorded):
    """Kernel, chip, tile, warps and stages of each row; what was counted is for `make static-proof` to renew."""
    text = (Path(__file__).parents[3] / "benchmarks/README.md").read_text()
    section = text.partition(sass.BEGIN)[2].partition(sass.END)[0]
    printed = [row.split(" | ")[:5] for row in section.splitlines() if re.match(r"\| [a-z_]+ ?.* \| (sm_|gfx)", row)]
    assert printed == [found["row"] for found in recorded["table"]], "run: make static-proof"
