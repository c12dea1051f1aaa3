"""The traces of real reasoning models that `real` reads: which are chosen, their tokens, and where their sentences are.

The files are not in the repository. `python -m benchmarks.traces.real_traces` makes them from public repositories.

Decisions taken here:

- Problems are chosen whole, in the order of a hash of their name, so that a larger `--limit` adds to a smaller one.
- A completion is encoded by the scorer's tokenizer. A sentence's tokens are those that start within it.
- A completion of fewer than 2 tokens, or longer than the scorer's context, is left out and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from entra.encode import Encoder

SETS = ("thought_anchors", "thinkonoff", "mip_gsm8k")
"""The files: `NAME.jsonl`, anywhere below the folder that `--folder` names."""


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One annotated sentence of a trace."""

    first: int
    """Its first token, counted from the completion's first."""
    last: int
    """Its last token; not before `first`."""
    label: str
    """Its category, as the data calls it: `active_computation`, `self_checking` and so on."""
    importance: dict[str, float]
    """Resampling and counterfactual importance by name, as the data has them."""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class RealTrace:
    """One completion of a real model."""

    set: str
    """One of `SETS`."""
    problem: str
    """Unique over all sets."""
    model: str
    kind: str
    """`thinking`, `no-thinking`, `reasoning`, `instruct`, `correct` or `incorrect`."""
    task: str
    """arith, deduct, recall, instruct, overthink, gsm8k or math."""
    right: bool
    """Whether it is right and complete."""
    prompt_ids: list[int]
    token_ids: list[int]
    starts: list[int]
    """The character of the completion at which each token starts."""
    text: str
    sentences: list[Sentence] = field(default_factory=list)
    settled: int | None = None
    """The first token after the answer has settled; None: it never does, or nobody measured it."""


def chosen(problems: Iterable[str], limit: int | None) -> set[str]:
    """The first `limit` of them in the order of their hashes; None: all."""
    return set(sorted(set(problems), key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:limit])


def read(folder: Path, encoder: Encoder, tokenizer: Any, limits: dict[str, int | None]) -> tuple[list[RealTrace], list[str]]:
    """The chosen traces of all sets, and what is wrong with rows that are left out.

    Args:
        folder: in which the files lie, at any depth.
        encoder: of the scorer.
        tokenizer: the scorer's, a fast one: it says where tokens start.
        limits: problems of each set; None: all.

    Raises:
        FileNotFoundError: a file is missing; the message says how to make it.
    """
    traces: list[RealTrace] = []
    faults: list[str] = []
    for name in SETS:
        found = sorted(folder.rglob(f"{name}.jsonl"))
        if not found:
            raise FileNotFoundError(f"{folder} holds no {name}.jsonl; python -m benchmarks.traces.real_traces makes it")
        rows = [json.loads(line) for line in found[0].read_text(encoding="utf-8").splitlines()]
        wanted = chosen((row["problem_id"] for row in rows), limits.get(name))
        for row in rows:
            if row["problem_id"] in wanted:
                try:
                    traces.append(_trace(name, row, encoder, tokenizer))
                except ValueError as error:
                    faults.append(f"{name}, {row['problem_id']}, {row['model']}: {error}")
    return traces, faults


def _trace(name: str, row: dict[str, Any], encoder: Encoder, tokenizer: Any) -> RealTrace:
    text = row["completion"]
    encoded = encoder.encode([{"role": "user", "content": row["prompt"]}], text)
    token_ids = encoded.completion
    if len(token_ids) < 2:
        raise ValueError(f"{len(token_ids)} tokens; at least 2 are needed")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoding["input_ids"][: len(token_ids)] != token_ids:
        raise ValueError("the tokenizer cuts the completion differently when it stands alone")
    starts = [start for start, _ in encoding["offset_mapping"][: len(token_ids)]]

    def token_at(character: int) -> int:
        """The first token that starts there or later."""
        return next((i for i, start in enumerate(starts) if start >= character), len(starts))

    sentences = []
    for note in row["annotations"]:
        if "chunk" in note:
            first, end = token_at(note["start"]), token_at(note["end"])
            if end > first:
                importance = {key: value for key, value in note.items() if "_importance_" in key and value is not None}
                said = text[note["start"] : note["end"]]
                sentences.append(Sentence(first=first, last=end - 1, label=note["label"], importance=importance, text=said))
    settled = row.get("settled_at")
    return RealTrace(
        set=name,
        problem=f"{name}/{row['problem_id']}",
        model=row["model"].split(" (")[0],
        kind=row.get("model_kind") or row["kind"],
        task=row.get("task") or {"mip_gsm8k": "gsm8k"}.get(name, "math"),
        right=bool(row["correct"]) and row.get("complete") is not False,
        prompt_ids=encoded.prompt,
        token_ids=token_ids,
        starts=starts,
        text=text,
        sentences=sentences,
        settled=None if settled is None else token_at(settled),
    )


def shuffled(trace: RealTrace, order: Callable[[list[int]], None]) -> RealTrace:
    """The trace with its sentences in another order; `order` shuffles a list of sentence numbers in place.

    What stands between two sentences stays with the first. What was measured of the sentences no longer holds, and is gone.
    """
    bounds = [0, *sorted({sentence.first for sentence in trace.sentences[1:]}), len(trace.token_ids)]
    numbers = list(range(len(bounds) - 1))
    order(numbers)
    token_ids: list[int] = []
    sentences: list[Sentence] = []
    for number in numbers:
        start, end = bounds[number : number + 2]
        by = len(token_ids) - start
        inside = [sentence for sentence in trace.sentences if start <= sentence.first < end]
        sentences += [replace(s, first=s.first + by, last=min(s.last, end - 1) + by, importance={}) for s in inside]
        token_ids += trace.token_ids[start:end]
    return with_tokens(trace, token_ids, sentences)


def with_tokens(trace: RealTrace, token_ids: list[int], sentences: Sequence[Sentence] = ()) -> RealTrace:
    """Other tokens under the same name; what is said of characters no longer holds."""
    return replace(trace, token_ids=token_ids, starts=[0] * len(token_ids), text="", sentences=list(sentences))
