"""Turn the files of three public repositories into traces of real reasoning models, one completion a row.

    git clone https://github.com/tianyi-lab/MiP-Overthinking
    git -C MiP-Overthinking checkout 4090d3b15e7bb93cc5ed4d62250fdd0e8c51d5e2
    python -m benchmarks.traces.real_traces mip MiP-Overthinking mip_gsm8k.jsonl

The checkout is only read, and none of its code is run. An exported tree without `.git` does as well. `CORPORA` holds the
commits, and the SHA-256 of each output: other files are refused, so that they cannot pass for these. The data itself is not
in this repository.

| name | public repository, licence | rows, problems |
|---|---|---|
| thinking-traces | JesseRWeigel/thinking-traces, MIT | 800, 200 |
| thought-anchors | interp-reasoning/thought-anchors.com, MIT | 40, 10 |
| mip | tianyi-lab/MiP-Overthinking, MIT | 2,247, 321 |

**Every row** has `prompt`, `completion`, `problem_id`, `model`, `source`, `licence`, `correct`, `kind` and `annotations`:
a list of `{start, end, label, ...}`, where `start` and `end` count characters of the completion. Thinking stands between
`<think>` and `</think>`. The rows of thinking-traces and mip also have `complete`: false where the text was cut.

**thinking-traces** takes all 200 items of `data/items.json` and the four files in `data/raw`: each item by Qwen3-8B and
Qwen3.5-9B, without and with thinking (`kind`). `correct` follows that repository's rules, see `graders.py`. `complete` says
that the model stopped by itself (`done_reason`). The 63 that reached the limit while they thought hold no `</think>`.
`tokens` is `eval_count`, and `task` is the item's type.

**thought-anchors** takes `problem.json`, `base_solution.json` and `chunks_labeled.json` of ten problems by R1-Distill-Llama-8B
and R1-Distill-Qwen-14B, a right and a wrong solution each. `prompt` goes without the `<think>` that ends it there.
A chunk is about a sentence. Each is looked for as it stands, behind the last one that was found, and becomes an annotation with
its measures. 116 of 5,814 chunks are left out: the solution does not hold them as they stand, because the source joined their
parts by other white space. `rollout_accuracy` is the share of resampled continuations that reach the right answer. From
`settled_at` on, the start of a chunk, it is at least 0.9 in every chunk that is kept. `settled_at` is null where the last chunk
has less, as in all wrong solutions and one right one.

**mip** takes the well-posed questions of `data/gsm8k.json` and seven models' answers to them in `response/gsm8k/normal`.
`problem_id` is the place in that file. 321 of the 582 questions are kept: those whose `problem_id` has the lowest SHA-256.
`answer` is what follows `####`. `correct` compares it with the last number in the last box, or in all of the completion
where nothing is boxed. The files do not say what was cut. `complete` is true where the thinking ended. Elsewhere it is false if
the text ends in a letter or digit without having boxed an answer, else true. Five by Phi-3 end so. Their last lines are sums,
so they may well be whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.traces.graders import correct_item, correct_number

Row = dict[str, Any]

OPEN, CLOSE = "<think>\n", "</think>"
SETTLED = 0.9
"""Rollout accuracy from which an answer counts as settled."""
MIP_PROBLEMS = 321
MEASURES = (
    "resampling_importance_accuracy",
    "resampling_importance_kl",
    "counterfactual_importance_accuracy",
    "counterfactual_importance_kl",
    "forced_importance_accuracy",
    "forced_importance_kl",
    "different_trajectories_fraction",
    "overdeterminedness",
)
"""What thought-anchors measured of each chunk, under these names in its files and in the rows."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A public repository at one commit, and what its files become."""

    repository: str
    """owner/name on GitHub."""
    commit: str
    sha256: str
    """Of the output, in hexadecimal digits."""
    convert: Callable[[Path], list[Row]]


def thinking_traces(checkout: Path) -> list[Row]:
    """The rows of thinking-traces: by item, then model, without thinking first.

    Raises:
        OSError, KeyError, ValueError: for a file that is missing or of another shape.
    """
    models = {"qwen3-8b": "Qwen3-8B (Ollama, temperature 0)", "qwen3.5-9b": "Qwen3.5-9B (Ollama, temperature 0)"}
    replies = {}
    for model in models:
        for kind, name in (("no-thinking", "off"), ("thinking", "on")):
            lines = _read(checkout / f"data/raw/{model}__think-{name}.jsonl").rstrip("\n").split("\n")
            replies[model, kind] = {reply["item_id"]: reply for reply in map(json.loads, lines)}
    rows = []
    for item in json.loads(_read(checkout / "data/items.json")):
        for (model, kind), by_item in replies.items():
            reply = by_item[item["id"]]
            completion, annotations = _thought(reply["thinking"], reply["content"])
            row = {
                **_start("thinking-traces", item["prompt"], completion, item["id"], models[model]),
                "correct": correct_item(item, reply["content"]),
                "kind": kind,
                "task": item["type"],
                "answer": item["answer"],
                "complete": reply["done_reason"] == "stop",
                "tokens": reply["eval_count"],
                "annotations": annotations,
            }
            rows.append(row)
    return rows


def _thought(thinking: str, reply: str) -> tuple[str, list[Row]]:
    """Thinking and reply as one completion, and where each of them stands in it."""
    if not thinking:
        return reply, []
    completion = OPEN + thinking
    annotations = [{"start": len(OPEN), "end": len(completion), "label": "thinking"}]
    if reply:
        completion += f"\n{CLOSE}\n\n"
        annotations.append({"start": len(completion), "end": len(completion + reply), "label": "answer"})
    return completion + reply, annotations


def thought_anchors(checkout: Path) -> list[Row]:
    """The rows of thought-anchors: by problem, then model, the right solution first.

    Raises:
        OSError, KeyError, ValueError: for a file that is missing or of another shape.
    """
    data = checkout / "src/app/data"
    models = ("DeepSeek-R1-Distill-Llama-8B", "DeepSeek-R1-Distill-Qwen-14B")
    problems = sorted(path.name for path in (data / models[0].lower() / "correct_base_solution").iterdir())
    rows = []
    for problem_id in problems:
        for model in models:
            for kind in ("correct", "incorrect"):
                folder = data / model.lower() / f"{kind}_base_solution" / problem_id
                names = ("problem", "base_solution", "chunks_labeled")
                problem, solution, chunks = (json.loads(_read(folder / f"{name}.json")) for name in names)
                completion = OPEN + solution["solution"]
                annotations = _located(chunks, completion)
                row = {
                    "settled_at": settled_at(annotations),
                    **_start("thought-anchors", solution["prompt"].removesuffix(OPEN), completion, problem_id, model),
                    "correct": solution["is_correct"],
                    "kind": kind,
                    "nickname": problem["nickname"],
                    "problem": problem["problem"],
                    "answer": problem["gt_answer"],
                    "given_answer": solution["answer"],
                    "annotations": annotations,
                }
                rows.append(row)
    return rows


def _located(chunks: list[Row], completion: str) -> list[Row]:
    """The chunks that the completion holds as they stand, in their order."""
    annotations = []
    end = len(OPEN)
    for chunk in chunks:
        start = completion.find(chunk["chunk"], end)
        if start < 0:
            continue
        end = start + len(chunk["chunk"])
        annotation = {
            "start": start,
            "end": end,
            "label": chunk["function_tags"][0],
            "chunk": chunk["chunk_idx"],
            "depends_on": [int(index) for index in chunk["depends_on"]],
            "rollout_accuracy": chunk["accuracy"],
            **{name: chunk[name] for name in MEASURES},
        }
        annotations.append(annotation)
    return annotations


def settled_at(annotations: Sequence[Row]) -> int | None:
    """The character from which on every chunk has a rollout accuracy of at least 0.9; None where the last one has less."""
    start = None
    for annotation in reversed(annotations):
        if annotation["rollout_accuracy"] < SETTLED:
            break
        start = annotation["start"]
    return start


def mip(checkout: Path) -> list[Row]:
    """The rows of MiP-Overthinking's well-posed GSM8K questions: by question, then model.

    Raises:
        OSError, KeyError, ValueError: for a file that is missing or of another shape.
    """
    folders = {
        "QwQ-32B": "QwQ",
        "DeepSeek-R1": "deepseekR1",
        "DeepSeek-R1-Distill-Qwen-32B": "DSQ",
        "s1.1-32B": "s1.1",
        "Qwen2.5-32B-Instruct": "Qwen32",
        "Gemma-2-27B-it": "Gemma227",
        "Phi-3-medium": "phi3",
    }
    reasoning = list(folders)[:4]
    texts = {}
    for model, folder in folders.items():
        key = "deepseek-reasoner (question)" if model == "DeepSeek-R1" else "model_answer"
        entries = json.loads(_read(checkout / f"response/gsm8k/normal/{folder}/response.json"))
        texts[model] = {entry["question"]: entry[key] for entry in entries}
    questions = {f"gsm8k-{place:03}": entry for place, entry in enumerate(json.loads(_read(checkout / "data/gsm8k.json")))}
    rows = []
    for problem_id in sorted(sorted(questions, key=_sha256)[:MIP_PROBLEMS]):
        question = questions[problem_id]["question"]
        answer = questions[problem_id]["answer"].rpartition("####")[2].strip()
        for model in folders:
            completion, annotations = texts[model][question], []
            if model == "s1.1-32B":
                thinking, _, reply = completion.removeprefix("think\n").partition("\nanswer\n")
                completion = f"{thinking}\n{CLOSE}\n\n{reply}"
            if model in reasoning:
                completion = OPEN + completion
                end = completion.index(CLOSE)
                annotations = [
                    {"start": len(OPEN), "end": end, "label": "thinking"},
                    {"start": end + len(CLOSE), "end": len(completion), "label": "answer"},
                ]
            row = {
                **_start("mip", question, completion, problem_id, model),
                "kind": "well-posed",
                "model_kind": "reasoning" if model in reasoning else "instruct",
                "annotations": annotations,
                "correct": correct_number(completion, answer),
                "answer": answer,
                "complete": model in reasoning or "\\boxed{" in completion or not completion.rstrip()[-1:].isalnum(),
            }
            rows.append(row)
    return rows


def _start(name: str, prompt: str, completion: str, problem_id: str, model: str) -> Row:
    source = f"github:{CORPORA[name].repository}@{CORPORA[name].commit}"
    row = {"prompt": prompt, "completion": completion, "problem_id": problem_id, "model": model}
    return {**row, "source": source, "licence": "MIT"}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


CORPORA = {
    "thinking-traces": Corpus(
        repository="JesseRWeigel/thinking-traces",
        commit="31b24611a84d4a7dd26128369b163365c0c0bfa7",
        sha256="c8caba05234cdd3e398aa1a5d493df9e1cb08883e5d2dc45ffc09904f5b9539b",
        convert=thinking_traces,
    ),
    "thought-anchors": Corpus(
        repository="interp-reasoning/thought-anchors.com",
        commit="68acc04a666716c58273ae70837d4b80bf3e1c69",
        sha256="bf2e8f929a6472e416424e87b5c98509cb4d1d877f84156e81c2ebda2269c6ca",
        convert=thought_anchors,
    ),
    "mip": Corpus(
        repository="tianyi-lab/MiP-Overthinking",
        commit="4090d3b15e7bb93cc5ed4d62250fdd0e8c51d5e2",
        sha256="cca0a805554e9fddb052680a5ad2cebf5fe31497b3b9506769464d3d49fa750e",
        convert=mip,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the rows of one repository as JSON Lines, or end with status 2 and a message, and write nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CORPORA, help="which of the three repositories")
    parser.add_argument("checkout", type=Path, help="a folder with its files at the commit in CORPORA")
    parser.add_argument("output", type=Path, help="the JSON Lines file to write")
    options = parser.parse_args(arguments)
    corpus = CORPORA[options.name]
    try:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in corpus.convert(options.checkout))
        if _sha256(text) != corpus.sha256:
            raise ValueError(f"the rows have sha256={_sha256(text)}, not {corpus.sha256}")
    except (OSError, KeyError, ValueError) as error:
        parser.error(
            f"{options.checkout} does not hold the files of {corpus.repository} at that commit "
            f"({type(error).__name__}: {error}). Get them with: git clone https://github.com/{corpus.repository} && "
            f"git -C {corpus.repository.partition('/')[2]} checkout {corpus.commit}"
        )
    options.output.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
