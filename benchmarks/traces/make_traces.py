"""Make `entra/data/traces.jsonl`: sample SmolLM2 on reasoning-gym problems and join the written-out variants.

    python -m benchmarks.traces.make_traces [output]

Needs reasoning-gym beside the demo's packages (`pip install reasoning-gym`, which compiles pycosat). Every problem
draws its samples from its own seed on one CPU thread, so that problems can be added without changing the others. The
two completions kept per problem were picked by hand among those that ended by themselves: a correct and readable one
where there was one. The texts in `written.md` are prose, written for these completions and not tuned to any score.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entra.smollm2 import load_smollm2
from entra.traces import TRACES_FILE

INSTRUCTION = "Solve this problem in a few short steps. Write down each step, then state the answer.\n\n"
SAMPLING = {"temperature": 0.5, "top_p": 0.95, "max_new_tokens": 100, "num_return_sequences": 8}
MODEL_NAME = "SmolLM2-135M-Instruct"
WRITTEN = Path(__file__).with_name("written.md")
SHIPPED = Path(__file__).parents[2] / "entra" / "data" / TRACES_FILE


@dataclass(frozen=True)
class Recipe:
    """One problem: a reasoning-gym dataset with options, the seed of problem and sampling, and the samples kept."""

    task: str
    seed: int
    kept: tuple[int, int]
    """Index of the concise completion and of the second one among the samples."""
    options: dict[str, Any]

    @property
    def id(self) -> str:
        """`task-seed`."""
        return f"{self.task}-{self.seed}"


RECIPES = (
    Recipe(
        "basic_arithmetic",
        14,
        (4, 5),
        {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2, "allow_negation": False},
    ),
    Recipe("products", 54, (5, 6), {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    Recipe("syllogism", 31, (5, 1), {}),
    Recipe("syllogism", 33, (6, 5), {}),
    Recipe("syllogism", 132, (0, 1), {}),
    Recipe("family_relationships", 29, (0, 3), {"min_family_size": 4, "max_family_size": 4}),
    Recipe("aiw", 42, (4, 1), {}),
    Recipe("simple_equations", 36, (3, 0), {"min_value": 1, "max_value": 10, "min_terms": 2, "max_terms": 2}),
    Recipe("gcd", 37, (6, 0), {"min_value": 4, "max_value": 30}),
    Recipe("lcm", 38, (2, 1), {"min_value": 2, "max_value": 12}),
    Recipe("number_sequence", 40, (7, 5), {"min_value": 1, "max_value": 20, "max_complexity": 1}),
    Recipe("calendar_arithmetic", 27, (7, 1), {"tasks": ["is_leap_year"]}),
    Recipe("calendar_arithmetic", 26, (1, 6), {"tasks": ["weekday_of_date_from_first_date"]}),
    Recipe("simple_geometry", 44, (5, 7), {"min_sides": 3, "max_sides": 3}),
    Recipe("word_sequence_reversal", 45, (6, 3), {"min_words": 3, "max_words": 3}),
    Recipe("aiw", 43, (7, 1), {}),
    Recipe("chain_sum", 52, (6, 4), {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}),
    Recipe("chain_sum", 51, (2, 6), {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    Recipe("prime_factorization", 46, (0, 5), {"min_value": 4, "max_value": 30}),
    Recipe(
        "fraction_simplification",
        48,
        (1, 2),
        {"min_value": 1, "max_value": 6, "min_factor": 2, "max_factor": 4, "styles": ("plain",)},
    ),
    Recipe("count_primes", 49, (1, 0), {"min_n": 1, "max_n": 20}),
    Recipe(
        "number_filtering",
        50,
        (5, 7),
        {"min_numbers": 3, "max_numbers": 4, "min_decimals": 0, "max_decimals": 0, "min_value": 0, "max_value": 50},
    ),
    Recipe("spell_backward", 34, (1, 0), {"min_word_len": 3, "max_word_len": 3}),
    Recipe(
        "decimal_arithmetic",
        60,
        (4, 6),
        {"min_num_decimal_places": 1, "max_num_decimal_places": 1, "min_terms": 2, "max_terms": 2},
    ),
    Recipe(
        "basic_arithmetic",
        61,
        (0, 5),
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": False},
    ),
    Recipe("syllogism", 201, (5, 6), {}),
)


def main(output: Path = SHIPPED) -> None:
    """Write the traces to `output`, one problem a line, once all of them are made.

    Raises:
        RuntimeError: when reasoning-gym or SmolLM2 is not installed.
        ValueError: when `written.md` does not hold exactly the problems of `RECIPES`, in their order.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise RuntimeError("making the traces needs reasoning-gym; get it with: pip install reasoning-gym") from None
    import torch

    written = read_written(WRITTEN.read_text(encoding="utf-8"))
    if list(written) != [recipe.id for recipe in RECIPES]:
        raise ValueError(f"written.md holds {list(written)}; it must hold the ids of RECIPES in the same order")
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2()
    lines = []
    for recipe in RECIPES:
        dataset = reasoning_gym.create_dataset(recipe.task, seed=recipe.seed, size=1, **recipe.options)
        entry = dataset[0]
        prompt = INSTRUCTION + entry["question"].strip()
        samples = generate(model, tokenizer, prompt, recipe.seed)
        completions: list[dict[str, Any]] = []
        for kind, index in zip(("concise", "sample"), recipe.kept, strict=True):
            settings = {"seed": recipe.seed, **SAMPLING, "index": index}
            completions.append({"kind": kind, "text": samples[index], "source": MODEL_NAME, "sampling": settings})
        for kind, (style, text) in written[recipe.id].items():
            completions.append({"kind": kind, "text": text, "source": "written", "style": style})
        for completion in completions:
            text = completion["text"]
            completion["tokens"] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            is_control = completion["kind"] == "control"
            completion["correct"] = None if is_control else is_correct(dataset, entry, text)
        row = {
            "id": recipe.id,
            "task": recipe.task,
            "prompt": prompt,
            "answer": entry["answer"],
            "completions": completions,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        print(recipe.id, [(entry["kind"], entry["tokens"], entry["correct"]) for entry in completions], flush=True)
    output.write_text("".join(lines), encoding="utf-8")


def generate(model: Any, tokenizer: Any, prompt: str, seed: int) -> dict[int, str]:
    """The sampled completions that ended by themselves, by sample index."""
    import torch

    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    end = tokenizer.eos_token_id
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=end, **SAMPLING)
    texts = {}
    for index, tokens in enumerate(output[:, ids.shape[1] :].tolist()):
        if end in tokens:
            texts[index] = tokenizer.decode(tokens[: tokens.index(end)]).strip()
    return texts


def stated_answer(text: str, answer: str) -> str:
    """The answer that `text` states, in the form of `answer` so that reasoning-gym's checker can read it.

    It is read from what follows the last "answer is" or "answer:", else from the whole text. When `answer` is a number, it is
    the last number. When it is a word, it is that word where it occurs (for Yes and No the first word). Else it is the line.
    """
    plain = text.replace("**", "")
    stated = re.findall(r"(?i)answer\s*(?:is|:)[:\s]*(.+)", plain)
    span = stated[-1].strip(" *$.`'\"") if stated else plain
    if re.fullmatch(r"-?[\d.]+", answer):
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", span)
        return numbers[-1].replace(",", "") if numbers else span
    if answer.isalpha():
        words = re.findall(r"[A-Za-z]+", span)
        return answer if answer in words and answer not in ("Yes", "No") else "".join(words[:1])
    return span.splitlines()[-1]


def is_correct(dataset: Any, entry: dict[str, Any], text: str) -> bool:
    """Whether reasoning-gym's checker gives full marks to the answer that `text` states.

    Some checkers raise on an answer that is not of the asked form, for example no product of factors; that is wrong.
    """
    try:
        return bool(dataset.score_answer(stated_answer(text, entry["answer"]), entry) == 1.0)
    except (ValueError, TypeError):
        return False


def read_written(markdown: str) -> dict[str, dict[str, tuple[str | None, str]]]:
    """Style and text by problem id and kind, out of sections `## id` that hold `### kind` or `### kind: style`.

    Raises:
        ValueError: for a section without its problem, or one that comes twice.
    """
    problems: dict[str, dict[str, tuple[str | None, str]]] = {}
    for section in re.split(r"^## ", markdown, flags=re.MULTILINE)[1:]:
        name, *parts = re.split(r"^### ", section, flags=re.MULTILINE)
        texts: dict[str, tuple[str | None, str]] = {}
        for part in parts:
            heading, _, text = part.partition("\n")
            kind, _, style = heading.partition(":")
            if kind.strip() in texts:
                raise ValueError(f"written.md has kind={kind.strip()!r} twice for id={name.strip()!r}; keep one of them")
            texts[kind.strip()] = (style.strip() or None, text.strip())
        if name.strip() in problems:
            raise ValueError(f"written.md has id={name.strip()!r} twice; join the two sections")
        problems[name.strip()] = texts
    return problems


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
