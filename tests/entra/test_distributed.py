"""Training and scoring on two CPU processes (gloo): DDP, tensor parallelism, FSDP2, a rank that is killed, and ZeRO-3 with
`make test-deepspeed`.

FSDP2 comes in two ways. transformers shards a model as it loads it (`DistributedConfig`), which needs nothing special on a CPU.
accelerate's (`fsdp=True`) is silently DDP on a CPU, so the worker tells accelerate to go on. Not run here: FSDP1, which torch
refuses on a CPU and ENTRA's trainer everywhere; NCCL; mixed precision; a checkpoint of a sharded model; and, unless DeepSpeed
can be imported, ZeRO-3.

Whatever ranks saw is compared with one process that has the same weights and all rows. Its forwards hold other rows, and so
round differently: a few float32 roundings of log-probs of up to 10 nats, 1e-5.
"""

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
from tiny_models import build
from tiny_tokenizer import build_tokenizer
from transformers.distributed import DistributedConfig

import entra
from entra import forward
from entra.rope import transformers_version

pytest.importorskip("trl", reason="needs TRL: pip install 'entra-reward[train]'")
pytestmark = pytest.mark.timeout(600)  # one test may have to launch two runs

TOLERANCE = {"rtol": 0, "atol": 1e-5}

# A run takes some 10 s of two idle cores, most of them imports; one that hangs must fail, not stall the suite.
LIMIT = 240


def launch(task: str, folder: Path) -> tuple[int, str]:
    """Two ranks do `task`; exit status and output."""
    tests = Path(worker.__file__).parents[1]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*command, worker.__file__, task, str(folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its ranks; killed, it would leave them
        output, _ = process.communicate()
        pytest.fail(f"{task} was not done after {LIMIT} s:\n{output}")
    return process.returncode, output


def seen(task: str, folder: Path) -> list[dict[str, Any]]:
    """What each rank has written."""
    return [torch.load(folder / f"{task}.{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    build("qwen3").save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def killed(folder):
    return launch("ddp", folder)


@pytest.fixture(scope="module")
def ddp(folder, killed):
    return seen("ddp", folder)


@pytest.fixture(scope="module")
def resumed(folder, killed):
    if transformers_version() < (5, 18):
        pytest.skip("this transformers asks torch for a device cpu:0 when several ranks load an optimizer")
    status, output = launch("resume", folder)
    assert status == 0, output
    return seen("resume", folder)


@pytest.fixture(scope="module")
def fsdp2(folder):
    if "fsdp_size" not in inspect.signature(DistributedConfig).parameters:
        pytest.skip("this transformers does not shard a model as it loads it")
    status, output = launch("fsdp2", folder)
    assert status == 0, output
    return seen("fsdp2", folder)


def assert_same_scores(got: entra.Scores, expected: entra.Scores) -> None:
    for field in ("logprobs", "incoming", "importance"):
        for ours, theirs in zip(getattr(got, field), getattr(expected, field), strict=True):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert got.rewards == pytest.approx(expected.rewards, abs=1e-5)


def assert_scores_of_one_process(run: list[dict[str, Any]], rode: bool) -> None:
    """Each scoring call of a training, against one process with the same weights and the rows of both ranks."""
    model, tokenizer = build("qwen3"), build_tokenizer()
    calls = list(zip(*(rank["calls"]["plain"] for rank in run), strict=True))
    assert calls
    for i, ranks in enumerate(calls):
        model.load_state_dict(ranks[0]["weights"])
        everything = []
        for call in ranks:
            assert call["rode"] == rode
            scores = entra.score_batch(
                call["prompts"], None, call["completion_ids"], model=model, tokenizer=tokenizer, details=True
            )
            assert_same_scores(call["scores"], scores)
            assert call["rewards"] == pytest.approx(scores.rewards, abs=1e-5)
            everything += scores.rewards
        if rode:  # several optimisation steps share a scoring call
            continue
        for rank in run:
            assert rank["log"][i]["rewards/score_batch/mean"] == pytest.approx(sum(everything) / len(everything), abs=1e-5)


def assert_group_spans_ranks(run: list[dict[str, Any]]) -> None:
    """The completions of a call's one prompt are right on rank 0 and wrong on rank 1."""
    calls = [dict(zip(rank["calls"], each, strict=True)) for rank in run for each in zip(*rank["calls"].values(), strict=True)]
    half = len(calls) // 2
    for right, wrong in zip(calls[:half], calls[half:], strict=True):
        plain = right["plain"]["rewards"] + wrong["plain"]["rewards"]
        assert right["half_right"]["rewards"] == right["plain"]["rewards"]
        assert set(wrong["half_right"]["rewards"]) == {0.0}
        assert set(right["too_few_right"]["rewards"] + wrong["too_few_right"]["rewards"]) == {0.0}
        assert right["one_band"]["rewards"] == pytest.approx([sum(plain) / len(plain)] * len(right["plain"]["rewards"]))
        assert wrong["one_band"]["rewards"] == right["one_band"]["rewards"]


def assert_unequal_rows_score_as_in_one_process(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(ranks):
        assert_same_scores(result["unequal"], worker.score_unequal(build("qwen3"), rank))


def assert_groups_score_as_whole_rows_of_one_process(ranks: list[dict[str, Any]]) -> None:
    """Ranks have unequal numbers of forwards of prompts, of completions behind them, and of whole rows."""
    for rank, (result, forwards) in enumerate(zip(ranks, (7, 5), strict=True)):
        model, calls = build("qwen3"), []
        assert_same_scores(result["groups"], worker.score_groups(model, rank, replace(worker._CONFIG, share_prompts=False)))
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        worker.score_groups(model, rank)
        assert len(calls) == forwards


def assert_failure_left_no_trace(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["failure"]["raised"]
        assert result["failure"]["after"] == result["failure"]["before"]


def test_ddp_scores_are_those_of_one_process(ddp):
    assert_unequal_rows_score_as_in_one_process(ddp)
    assert_scores_of_one_process([rank["riding"] for rank in ddp], rode=True)


def test_ddp_groups_are_looked_at_over_all_ranks(ddp):
    assert_group_spans_ranks([rank["riding"] for rank in ddp])


@pytest.mark.parametrize("family", worker.TENSOR_PARALLEL)
def test_tensor_parallel_scores_are_those_of_one_process(ddp, family):
    """A rank once took the mean over its own heads for that over all: off by 0.027 of at most 0.061 (Qwen3)."""
    model = worker.build_divisible(family)
    heads = model.config.num_attention_heads
    expected = {reduction: worker.score_all_rows(model, reduction) for reduction in ("mean", "max")}
    for rank in ddp:
        seen = rank["tensor_parallel"][family]
        for reduction, scores in expected.items():
            assert_same_scores(seen[reduction], scores)
        assert seen["heads"] == (heads // 2 if family in worker.HEADS_OVER_RANKS else heads)
        for heads_apart, incoming in worker.by_head(model).items():
            torch.testing.assert_close(seen["by head"][heads_apart], incoming, rtol=0, atol=1e-5)
        assert seen["verified"] is None


def test_ddp_failure_leaves_config_mode_and_hooks(ddp):
    assert_failure_left_no_trace(ddp)


def test_a_killed_rank_ends_the_run_and_the_last_checkpoint_resumes(killed, folder, resumed):
    status, output = killed
    assert status != 0
    assert "SIGKILL" in output
    # The other rank may or may not have finished the step in which its peer died, but there is a checkpoint before it.
    assert (folder / "killed" / f"checkpoint-{worker.KILLED_AT - 1}").is_dir()
    for rank in resumed:
        run, whole = rank["resumed"], rank["whole"]
        assert run["wrapped_by"] == "DistributedDataParallel"
        assert run["global_step"] == whole["global_step"] == worker.STEPS
        assert [entry["step"] for entry in run["log"]] == list(range(1, worker.STEPS + 1))
        assert len(run["calls"]["plain"]) == worker.STEPS - worker.KILLED_AT + 1
        for name, weight in whole["weights"].items():
            torch.testing.assert_close(run["weights"][name], weight, **TOLERANCE)


def test_ddp_own_pass(resumed):
    run = [rank["whole"] for rank in resumed]
    assert_scores_of_one_process(run, rode=False)
    assert_group_spans_ranks(run)


def test_fsdp2_unequal_numbers_of_forwards(fsdp2):
    """One rank has seven forwards, the other no row to score; without the agreement on the number of forwards it hangs."""
    assert {rank["head"] for rank in fsdp2} == {"DTensor"}
    assert_unequal_rows_score_as_in_one_process(fsdp2)
    assert [rank["disagreement"] for rank in fsdp2] == ["stuck", "done"]
    assert_groups_score_as_whole_rows_of_one_process(fsdp2)


@pytest.mark.parametrize("run", ["riding", "own_pass"])
def test_fsdp2_training(fsdp2, run):
    if run == "riding" and transformers_version() < worker.TRAINS_WHAT_IT_SHARDED:
        pytest.skip("this transformers does not train a model that it sharded")
    ranks = [rank[run] for rank in fsdp2]
    assert {rank["wrapped_by"] for rank in ranks} == {"FSDPQwen3ForCausalLM"}
    assert_scores_of_one_process(ranks, rode=run == "riding")
    assert_group_spans_ranks(ranks)


def test_fsdp2_failure_leaves_config_mode_and_hooks(fsdp2):
    assert_failure_left_no_trace(fsdp2)


def test_an_engine_whose_config_is_a_dict_is_looked_through():
    """DeepSpeed's, here and in `.module` of DDP and of torch.compile."""

    class Engine(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.config = module, {"train_batch_size": 1}

    model = build("qwen3")
    for wrapped in (Engine(model), Engine(torch.compile(model)), torch.compile(Engine(model))):
        assert forward.unwrapped(wrapped) is model
        prompts, completions = [[1, 7, 8, 9]], [[10, 11, 12, 10, 11]]
        expected = entra.score_batch(prompts, completions, model=model)
        assert entra.score_batch(prompts, completions, model=wrapped) == expected


@pytest.fixture(scope="module")
def zero3(folder):
    pytest.importorskip("deepspeed", reason="ZeRO-3 needs DeepSpeed: make test-deepspeed")
    status, output = launch("zero3", folder)
    assert status == 0, output
    return seen("zero3", folder)


def test_zero3_scores_through_the_engine_with_every_weight_in_parts(zero3):
    """The engine's `.config` is a dict, at which `unwrapped` once stopped; weights of this size stay whole unless told."""
    for rank in zero3:
        assert rank["parts"]
        for held, whole in rank["parts"].values():
            assert held == -(-whole // 2)
    assert_unequal_rows_score_as_in_one_process(zero3)
    assert_groups_score_as_whole_rows_of_one_process(zero3)


@pytest.mark.parametrize("run", ["riding", "own_pass"])
def test_zero3_training(zero3, run):
    """A pass of our own made DeepSpeed fetch the head ahead, so that the backward of TRL's fused head found it gone."""
    ranks = [rank[run] for rank in zero3]
    assert {rank["wrapped_by"] for rank in ranks} == {"DeepSpeedEngine"}
    assert_scores_of_one_process(ranks, rode=run == "riding")
    assert_group_spans_ranks(ranks)


def test_zero3_a_frozen_scorer_loaded_by_name_is_whole(zero3):
    """transformers left it in parts, which nothing gathered: "'weight' must be 2-D". The policy must still come in parts."""
    assert_unequal_rows_score_as_in_one_process([{"unequal": rank["frozen"]} for rank in zero3])
    assert all(rank["parts_of_the_next"] for rank in zero3)
