"""The converters of public traces, on small made-up repositories of the same shape."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.traces import real_traces
from benchmarks.traces.real_traces import CORPORA, MEASURES, main, mip, settled_at, thinking_traces, thought_anchors

MIP_FOLDERS = ("QwQ", "deepseekR1", "DSQ", "s1.1", "Qwen32", "Gemma227", "phi3")
QWEN3, QWEN35 = "Qwen3-8B (Ollama, temperature 0)", "Qwen3.5-9B (Ollama, temperature 0)"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def cut(row: dict, label: str) -> str:
    """What the row's annotation of that label marks."""
    (annotation,) = (entry for entry in row["annotations"] if entry["label"] == label)
    return row["completion"][annotation["start"] : annotation["end"]]


@pytest.fixture
def thinking_checkout(tmp_path: Path) -> Path:
    """Two items by two models; the second model is cut while it thinks about the first."""
    items = [
        {"id": "b", "type": "arith", "prompt": "2 + 2?", "answer": "4", "accept": [], "grader": "numeric"},
        {"id": "a", "type": "recall", "prompt": "Capital of France?", "answer": "Paris", "accept": [], "grader": "text"},
    ]
    write(tmp_path / "data/items.json", items)
    replies = {
        ("qwen3-8b", "off"): [("a", "", "Paris", "stop", 1), ("b", "", "Answer: 4", "stop", 3)],
        ("qwen3-8b", "on"): [("a", "France…\u2028 hm.\n", "Lyon", "stop", 9), ("b", "Two and two.", "Answer: 4", "stop", 8)],
        ("qwen3.5-9b", "off"): [("a", "", "Par", "length", 1), ("b", "", "5", "stop", 1)],
        ("qwen3.5-9b", "on"): [("a", "Hm.", "Paris", "length", 7), ("b", "Two and", "", "length", 5)],
    }
    (tmp_path / "data/raw").mkdir()
    for (model, name), entries in replies.items():
        keys = ("item_id", "thinking", "content", "done_reason", "eval_count")
        lines = [json.dumps(dict(zip(keys, entry, strict=True)), ensure_ascii=False) + "\n" for entry in entries]
        (tmp_path / f"data/raw/{model}__think-{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_thinking_traces(thinking_checkout: Path):
    rows = thinking_traces(thinking_checkout)
    found = [(row["problem_id"], row["model"], row["kind"], row["correct"], row["complete"], row["tokens"]) for row in rows]
    assert found == [
        ("b", QWEN3, "no-thinking", True, True, 3),
        ("b", QWEN3, "thinking", True, True, 8),
        ("b", QWEN35, "no-thinking", False, True, 1),
        ("b", QWEN35, "thinking", False, False, 5),
        ("a", QWEN3, "no-thinking", True, True, 1),
        ("a", QWEN3, "thinking", False, True, 9),
        ("a", QWEN35, "no-thinking", False, False, 1),
        ("a", QWEN35, "thinking", True, False, 7),
    ]
    assert rows[1] == {
        "prompt": "2 + 2?",
        "completion": "<think>\nTwo and two.\n</think>\n\nAnswer: 4",
        "problem_id": "b",
        "model": QWEN3,
        "source": "github:JesseRWeigel/thinking-traces@31b24611a84d4a7dd26128369b163365c0c0bfa7",
        "licence": "MIT",
        "correct": True,
        "kind": "thinking",
        "task": "arith",
        "answer": "4",
        "complete": True,
        "tokens": 8,
        "annotations": [{"start": 8, "end": 20, "label": "thinking"}, {"start": 31, "end": 40, "label": "answer"}],
    }
    assert (rows[0]["completion"], rows[0]["annotations"]) == ("Answer: 4", [])
    assert rows[3]["completion"] == "<think>\nTwo and"
    assert [entry["label"] for entry in rows[3]["annotations"]] == ["thinking"]
    assert (cut(rows[5], "thinking"), cut(rows[5], "answer")) == ("France…\u2028 hm.\n", "Lyon")


def chunk(index: int, text: str, accuracy: float, depends_on: tuple[str, ...] = ()) -> dict[str, Any]:
    """An entry of `chunks_labeled.json`; its measures are distinct numbers."""
    measures = {name: index + place / 10 for place, name in enumerate(MEASURES)}
    entry = {"chunk": text, "chunk_idx": index, "function_tags": ["computation"], "depends_on": list(depends_on)}
    return {**entry, "accuracy": accuracy, "summary": "not taken", **measures}


@pytest.fixture
def anchors_checkout(tmp_path: Path) -> Path:
    """Two problems by two models. The second chunk has other white space than the solution, and the third repeats the first."""
    solution = "So 2.\n\nThen\n3. So 2. It is 5."
    chunks = [
        chunk(0, "So 2.", 0.95),
        chunk(1, "Then 3.", 0.1),
        chunk(2, "So 2.", 0.9, ("0", "1")),
        chunk(3, "It is 5.", 1.0, ("2",)),
    ]
    for model in ("deepseek-r1-distill-llama-8b", "deepseek-r1-distill-qwen-14b"):
        for kind in ("correct", "incorrect"):
            for problem_id in ("problem_20", "problem_3"):
                folder = tmp_path / "src/app/data" / model / f"{kind}_base_solution" / problem_id
                right = kind == "correct"
                base = {"prompt": "Solve: 2 + 3?<think>\n", "solution": solution, "answer": "5", "is_correct": right}
                write(folder / "base_solution.json", base)
                write(folder / "problem.json", {"problem": "2 + 3?", "gt_answer": "5" if right else "6", "nickname": "Sum"})
                write(folder / "chunks_labeled.json", chunks if right else [*chunks[:3], chunk(3, "It is 5.", 0.0)])
    return tmp_path


def test_thought_anchors(anchors_checkout: Path):
    rows = thought_anchors(anchors_checkout)
    llama, qwen = "DeepSeek-R1-Distill-Llama-8B", "DeepSeek-R1-Distill-Qwen-14B"
    found = [(row["problem_id"], row["model"], row["kind"], row["correct"]) for row in rows]
    assert found == [
        (problem_id, model, kind, kind == "correct")
        for problem_id in ("problem_20", "problem_3")
        for model in (llama, qwen)
        for kind in ("correct", "incorrect")
    ]
    right, wrong = rows[:2]
    annotations = right.pop("annotations")
    assert right == {
        "settled_at": 8,
        "prompt": "Solve: 2 + 3?",
        "completion": "<think>\nSo 2.\n\nThen\n3. So 2. It is 5.",
        "problem_id": "problem_20",
        "model": llama,
        "source": "github:interp-reasoning/thought-anchors.com@68acc04a666716c58273ae70837d4b80bf3e1c69",
        "licence": "MIT",
        "correct": True,
        "kind": "correct",
        "nickname": "Sum",
        "problem": "2 + 3?",
        "answer": "5",
        "given_answer": "5",
    }
    assert [(entry["chunk"], right["completion"][entry["start"] : entry["end"]]) for entry in annotations] == [
        (0, "So 2."),
        (2, "So 2."),
        (3, "It is 5."),
    ]
    assert annotations[1] == {
        "start": 23,
        "end": 28,
        "label": "computation",
        "chunk": 2,
        "depends_on": [0, 1],
        "rollout_accuracy": 0.9,
        **{name: 2 + place / 10 for place, name in enumerate(MEASURES)},
    }
    assert (wrong["settled_at"], wrong["answer"], wrong["correct"]) == (None, "6", False)


@pytest.mark.parametrize(
    ("accuracies", "settled"),
    [([0.2, 0.9, 0.95, 1.0], 1), ([0.9, 0.89, 1.0], 2), ([1.0, 1.0], 0), ([1.0, 0.8], None), ([], None)],
    ids=["once", "left again", "from the start", "not at the end", "nothing"],
)
def test_settled_at(accuracies: list[float], settled: int | None):
    annotations = [{"start": 10 * place, "rollout_accuracy": accuracy} for place, accuracy in enumerate(accuracies)]
    assert settled_at(annotations) == (None if settled is None else 10 * settled)


@pytest.fixture
def mip_checkout(tmp_path: Path) -> Path:
    """Three questions, which the answers' files hold in another order."""
    questions = [{"question": f"{number} + 1?", "answer": f"Add.\n#### 1,00{number + 1}"} for number in range(3)]
    write(tmp_path / "data/gsm8k.json", questions)
    texts = {
        "QwQ": "Hm {n}.\n</think>\n\nIt is \\boxed{{{n}}}.",
        "deepseekR1": "Hm {n}.</think>It is {n}",
        "DSQ": "Hm {n}.\n</think>\n\nIt is 7.",
        "s1.1": "think\nHm {n}.\nanswer\nAnswer: {n}",
        "Qwen32": "It is \\boxed{{{n}}} €s",
        "Gemma227": "It is **{n}**.\n",
        "phi3": "2 + 2 = {n}\n",
    }
    for folder in MIP_FOLDERS:
        key = "deepseek-reasoner (question)" if folder == "deepseekR1" else "model_answer"
        entries = [{"question": f"{number} + 1?", key: texts[folder].format(n=1001 + number)} for number in (2, 0, 1)]
        write(tmp_path / f"response/gsm8k/normal/{folder}/response.json", entries)
    return tmp_path


def test_mip(mip_checkout: Path):
    rows = mip(mip_checkout)
    assert [row["problem_id"] for row in rows] == [f"gsm8k-00{place}" for place in range(3) for _ in range(7)]
    assert rows[0] == {
        "prompt": "0 + 1?",
        "completion": "<think>\nHm 1001.\n</think>\n\nIt is \\boxed{1001}.",
        "problem_id": "gsm8k-000",
        "model": "QwQ-32B",
        "source": "github:tianyi-lab/MiP-Overthinking@4090d3b15e7bb93cc5ed4d62250fdd0e8c51d5e2",
        "licence": "MIT",
        "kind": "well-posed",
        "model_kind": "reasoning",
        "annotations": [{"start": 8, "end": 17, "label": "thinking"}, {"start": 25, "end": 46, "label": "answer"}],
        "correct": True,
        "answer": "1,001",
        "complete": True,
    }
    columns = ("model", "model_kind", "completion", "correct", "complete")
    assert [tuple(row[name] for name in columns) for row in rows[15:]] == [
        ("DeepSeek-R1", "reasoning", "<think>\nHm 1003.</think>It is 1003", True, True),
        ("DeepSeek-R1-Distill-Qwen-32B", "reasoning", "<think>\nHm 1003.\n</think>\n\nIt is 7.", False, True),
        ("s1.1-32B", "reasoning", "<think>\nHm 1003.\n</think>\n\nAnswer: 1003", True, True),
        ("Qwen2.5-32B-Instruct", "instruct", "It is \\boxed{1003} €s", True, True),
        ("Gemma-2-27B-it", "instruct", "It is **1003**.\n", True, True),
        ("Phi-3-medium", "instruct", "2 + 2 = 1003\n", True, False),
    ]
    assert (cut(rows[15], "thinking"), cut(rows[15], "answer")) == ("Hm 1003.", "It is 1003")
    assert rows[18]["annotations"] == []


def test_mip_keeps_the_problems_of_lowest_hash(mip_checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(real_traces, "MIP_PROBLEMS", 2)
    left_out = max((f"gsm8k-00{place}" for place in range(3)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert {row["problem_id"] for row in mip(mip_checkout)} == {"gsm8k-000", "gsm8k-001", "gsm8k-002"} - {left_out}


def test_the_command_writes_the_rows_and_nothing_else(
    mip_checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mip(mip_checkout))
    digest = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setitem(CORPORA, "mip", dataclasses.replace(CORPORA["mip"], sha256=digest))
    before = {path: path.read_bytes() for path in mip_checkout.rglob("*") if path.is_file()}
    output = tmp_path_factory.mktemp("output") / "rows.jsonl"
    main(["mip", str(mip_checkout), str(output)])
    assert output.read_bytes() == text.encode()
    assert list(output.parent.iterdir()) == [output]
    assert {path: path.read_bytes() for path in mip_checkout.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["other answers", "no file", "no key", "no JSON"])
def test_files_of_another_commit_are_refused(mip_checkout: Path, capsys: pytest.CaptureFixture, damage: str):
    path = mip_checkout / "response/gsm8k/normal/phi3/response.json"
    if damage == "no file":
        path.unlink()
    elif damage != "other answers":
        path.write_text('[{"question": "0 + 1?"}]' if damage == "no key" else "version https://git-lfs.github.com/spec/v1")
    output = mip_checkout / "rows.jsonl"
    with pytest.raises(SystemExit) as end:
        main(["mip", str(mip_checkout), str(output)])
    assert end.value.code == 2
    assert not output.exists()
    message = " ".join(capsys.readouterr().err.split())
    reasons = {"other answers": "sha256=", "no file": "phi3", "no key": "KeyError", "no JSON": "JSONDecodeError"}
    assert reasons[damage] in message
    commit = CORPORA["mip"].commit
    clone = "git clone https://github.com/tianyi-lab/MiP-Overthinking && git -C MiP-Overthinking checkout"
    assert f"{clone} {commit}" in message
