"""The counting in machine code, on listings short enough to count by hand; the budgets; the table."""

import re
from dataclasses import replace

import pytest

from benchmarks.static import aot, disassembly, sass

PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXP = "MUFU.EX2 R7, R7"
SHUFFLE = "SHFL.BFLY PT, R33, R80, 0x2, 0x1f"
ADD = "FADD R1, R1, R2"


def listing(*lines):
    """A listing in the format of `nvdisasm -c`; a line that ends in a colon is a label."""
    text = [line if line.endswith(":") else f"        /*{16 * i:04x}*/              {line} ;" for i, line in enumerate(lines)]
    return disassembly.parse("\n".join(["\t.headerflags\t@", *text]))


def rocm(*lines):
    return disassembly.parse("\n".join(line if line.endswith(":") else "\t" + line for line in lines))


def test_nested_loops_are_told_apart():
    inner = (".L_x_1:", PRODUCT, WAIT, EXP, EXP, SHUFFLE, "@!P0 BRA `(.L_x_1)")
    code = listing(ADD, ".L_x_0:", ADD, ADD, *inner, ADD, "@P1 BRA `(.L_x_0)", "EXIT")
    assert disassembly.loops(code) == [tuple(range(1, 11)), tuple(range(3, 9))]
    counts = disassembly.count(code, exponentials=2)
    assert (counts.instructions, counts.exponentials, counts.shuffles, counts.matrix) == (6, 2, 1, 1)
    assert counts.matrix_name == "HGMMA.64x64x16.F32.BF16"


def test_the_unmasked_loop_is_taken_wherever_it_stands():
    masked = (".L_x_0:", PRODUCT, WAIT, EXP, "ISETP.GT.AND P0, PT, R1, R2, PT", "FSEL R7, R7, RZ, P0", "@P1 BRA `(.L_x_0)")
    unmasked = (".L_x_1:", PRODUCT, WAIT, EXP, "@P1 BRA `(.L_x_1)")
    for code in (listing(*masked, *unmasked, "EXIT"), listing(*unmasked, *masked, "EXIT")):
        counts = disassembly.count(code, exponentials=1)
        assert (counts.instructions, counts.matrix, counts.matrix_in_kernel) == (4, 1, 2)


def test_a_loop_with_too_few_exponentials_is_not_the_one():
    """A head dim cut into pieces has a loop of products inside the loop over tiles."""
    code = listing(".L_x_0:", ADD, ".L_x_1:", PRODUCT, WAIT, "@P0 BRA `(.L_x_1)", EXP, EXP, "@P1 BRA `(.L_x_0)", "EXIT")
    assert disassembly.count(code, exponentials=2).instructions == 7
    assert disassembly.count(code).instructions == 3
    assert disassembly.count(code, exponentials=3) is None


@pytest.mark.parametrize(
    "lines",
    [
        (PRODUCT, WAIT, EXP, "EXIT"),
        (PRODUCT, WAIT, ".L_x_0:", EXP, "@P0 BRA `(.L_x_0)", "EXIT"),
        (".L_x_0:", PRODUCT, WAIT, "@P0 BRA `(.L_x_0)", EXP, "EXIT"),
        ("@P0 BRA `(.L_x_0)", PRODUCT, EXP, ".L_x_0:", "EXIT"),
        ("EXIT", ".L_x_0:", PRODUCT, EXP, "BRA `(.L_x_0)"),
    ],
    ids=["no loop", "product outside", "exponential outside", "forward branch", "never reached"],
)
def test_no_inner_loop_is_none(lines):
    assert disassembly.count(listing(*lines), exponentials=1) is None


def test_a_wait_behind_the_end_makes_no_loop():
    """sm_100 retries a failed wait behind EXIT and branches back to the instruction after the wait."""
    code = listing(
        ".L_x_0:", PRODUCT, "@!P4 BRA `(.L_x_2)", ".L_x_1:", EXP, "BRA.U !UP0, `(.L_x_0)", ADD, ADD, "EXIT",
        ".L_x_2:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR73], R22", "@!P4 BRA `(.L_x_2)", "BRA `(.L_x_1)",
    )  # fmt: skip
    assert disassembly.loops(code) == [(0, 1, 2, 3, 7, 8, 9), (7, 8)]
    assert disassembly.count(code, exponentials=1).instructions == 7


def test_a_far_jump_leaves_the_loop_and_a_call_returns():
    code = listing(
        ".L_x_0:", PRODUCT, WAIT, EXP, "CALL.REL.NOINC `($helper)", "@P0 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)",
        ADD, ".L_x_1:", "EXIT", "$helper:", "RET.REL.NODEC R2 `(kernel)",
    )  # fmt: skip
    assert disassembly.loops(code) == [tuple(range(6))]


def test_two_branches_to_one_label_are_one_loop():
    code = listing(".L_x_0:", PRODUCT, EXP, "@P0 BRA `(.L_x_0)", ADD, "@P1 BRA `(.L_x_0)", "EXIT")
    assert disassembly.loops(code) == [(0, 1, 2, 3, 4)]


def test_unrolled_predicated_and_idle_instructions_all_count():
    code = listing(".L_x_0:", *(PRODUCT, WAIT, EXP, EXP) * 2, f"@P3 {ADD}", "@!UPT UIADD3 UR4, UR4, UR5, URZ", "NOP",
                   "@P0 BRA `(.L_x_0)", "EXIT")  # fmt: skip
    counts = disassembly.count(code, exponentials=2)
    assert (counts.instructions, counts.exponentials, counts.matrix) == (12, 4, 2)


@pytest.mark.parametrize(
    ("body", "overlapped"),
    [
        ((PRODUCT, WAIT, EXP, EXP), 0),
        ((PRODUCT, EXP, WAIT, EXP, EXP), 1),
        ((WAIT, EXP, PRODUCT, EXP, EXP), 2),
        ((PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", EXP, EXP), 2),
        ((PRODUCT, PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", EXP, WAIT, EXP), 1),
        ((PRODUCT.removesuffix(", gsb0"), EXP, PRODUCT, WAIT, EXP), 1),
    ],
    ids=[
        "none",
        "one before the wait",
        "waited for in the next trip",
        "one left open",
        "one of two left open",
        "group not closed",
    ],
)
def test_exponentials_under_a_product(body, overlapped):
    code = listing(".L_x_0:", *body, "@P0 BRA `(.L_x_0)", "EXIT")
    assert disassembly.count(code, exponentials=1).overlapped == overlapped


def test_no_overlap_is_claimed_without_hgmma():
    code = listing(".L_x_0:", "HMMA.16816.F32.BF16 R4, R8, R12, R4", EXP, "@P0 BRA `(.L_x_0)", "EXIT")
    assert disassembly.count(code, exponentials=1).overlapped is None


@pytest.mark.parametrize(
    ("waits", "left"),
    [((), None), (("DEPBAR.LE SB0, 0x1",), 1), (("DEPBAR.LE SB0, 0x2", "DEPBAR.LE SB0, 0x0"), 0), ((WAIT,), None)],
)
def test_copies_under_way_at_the_strictest_wait(waits, left):
    """A wait for products, or outside the loop, is none."""
    code = listing(
        "DEPBAR.LE SB0, 0x0", ".L_x_0:", *waits, "HMMA.16816.F32.BF16 R4, R8, R12, R4", EXP, "@P0 BRA `(.L_x_0)", "EXIT"
    )
    assert disassembly.count(code, exponentials=1).copies_left == left


def test_rocm_assembly():
    """The loop is rotated: it is entered in the middle, and its last branch goes back to before the entry."""
    code = rocm(
        "kernel:", "s_load_dword s0, s[0:1], 0x0 ; comment", "s_branch .LBB0_2", ".LBB0_1:", "v_add_f32_e32 v2, v2, v3",
        "s_cbranch_scc0 .LBB0_4", ".LBB0_2:", "v_mfma_f32_32x32x8_bf16 v[2:17], v[86:87], v[38:39], 0",
        "s_cbranch_execz .LBB0_3",
        "v_exp_f32_e32 v2, v2", "ds_bpermute_b32 v78, v79, v74", "v_mov_b32_dpp v78, v78 quad_perm:[1,0,3,2]", ".LBB0_3:",
        "s_branch .LBB0_1", ".LBB0_4:", "s_endpgm",
    )  # fmt: skip
    counts = disassembly.count(code, exponentials=1)
    assert (counts.instructions, counts.exponentials, counts.shuffles, counts.matrix) == (8, 1, 2, 1)


def test_what_is_no_disassembly_is_refused():
    with pytest.raises(ValueError, match="holds no instruction"):
        disassembly.parse("Error: cannot open the file\n")
    with pytest.raises(ValueError, match=r"'\.L_x_9', which is no label here"):
        listing("@P0 BRA `(.L_x_9)", "EXIT")


BUDGET = aot.Budget(per_score=7.5, per_shuffle=8)
WITHIN = aot.Compiled(
    name="column_sum",
    registers=216,
    shared_memory=131_072,
    spills=0,
    scores=128,
    counts=disassembly.Counts(
        instructions=960,
        exponentials=128,
        shuffles=16,
        matrix=16,
        matrix_name="HGMMA.64x128x16.F32.BF16",
        matrix_in_kernel=32,
        overlapped=0,
    ),
)


def test_exactly_the_budget_is_within_it():
    assert WITHIN.per_score == 7.5
    assert aot.over_budget(WITHIN, BUDGET) == ""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"instructions": 961}, "7.51 instructions per score, at most 7.5"),
        ({"shuffles": 17}, "a shuffle per 7.5 exponentials, at most one per 8"),
        ({"matrix_name": "HMMA.16816.F32.BF16"}, "its products run as HMMA.16816.F32.BF16, they must run as HGMMA"),
        ({"exponentials": 256}, "2.00 exponentials per score, at most 1.25 where one trip makes one tile once"),
        (None, "no loop with matrix products and an exponential per score; was the kernel changed?"),
    ],
    ids=["instructions", "shuffles", "HMMA", "repeated", "no loop"],
)
def test_a_broken_budget_is_named_with_its_number(change, problem):
    counts = None if change is None else replace(WITHIN.counts, **change)
    assert aot.over_budget(replace(WITHIN, counts=counts), BUDGET) == problem


def test_a_pass_over_its_budget_fails_the_command(python):
    """With tiles this small the shuffles, once per tile and key, outweigh the exponentials."""
    done = python("-m", "benchmarks.static.sass", "--tile", "64x32x4x1", "--head-dim", "64", "--processes", "1")
    assert done.returncode == 1, done.stderr
    assert "| column_sum d=64 | sm_90 | 64 x 32 | 4 | 1 |" in done.stdout
    assert re.search(r"column_sum d=64 64 x 32: (a shuffle per|.* instructions per score, at most)", done.stderr)


@pytest.mark.parametrize(
    ("registers", "shared_memory", "warps", "programs"),
    [(128, 96 * 1024, 8, 2), (129, 96 * 1024, 8, 1), (64, 113 * 1024, 8, 2), (64, 114 * 1024, 8, 1), (32, 0, 16, 4)],
    ids=["registers", "registers come in eights", "shared memory", "with 1 KiB for the system", "warps"],
)
def test_programs_per_sm(registers, shared_memory, warps, programs):
    compiled = replace(WITHIN, registers=registers, shared_memory=shared_memory)
    assert sass.programs_per_sm(compiled, warps, 227 * 1024) == programs


def test_the_table_replaces_the_one_between_the_markers():
    text = f"before\n{sass.BEGIN}\nold\n{sass.END}\nafter\n"
    once = sass.replaced(text, "new", "README.md")
    assert once == f"before\n{sass.BEGIN}\n\nnew\n\n{sass.END}\nafter\n"
    assert sass.replaced(once, "new", "README.md") == once
    with pytest.raises(ValueError, match=r"README\.md has no section for the table; add the lines"):
        sass.replaced(f"before\n{sass.BEGIN}\n", "new", "README.md")


def test_a_tile_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--tile '128x64' must be RESIDENTxSTREAMEDxWARPSxSTAGES"):
        sass.resized(None, "128x64")
