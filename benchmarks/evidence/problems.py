"""The problems of the evidence runs, the overthinking traces that the model is first trained on, and the checker.

Problems and checkers are reasoning-gym's. A trace is a concise core that computes the answer, then 0 to 4 episodes of
overthinking (re-verify, restate, dead end, second guess), then the answer. In the kind `guess` the core is a mental guess,
wrong in 40 % of the traces, and a check that corrects it. That check is needed: the 15 % of traces that skip it are often
wrong.
Whether a problem is for training or held out depends on its text alone, so the two never meet.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Split = Literal["train", "held-out"]

KINDS = ("sum", "guess", "sort", "reverse")
EPISODES = (0, 1, 2, 3, 4)
EPISODE_WEIGHTS = (0.08, 0.16, 0.26, 0.26, 0.24)
GUESS_WRONG = 0.4
CHECK_SKIPPED = 0.15

_DATASETS: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("chain_sum", {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}),
    "guess": ("chain_sum", {"min_terms": 5, "max_terms": 5, "min_digits": 1, "max_digits": 1}),
    "sort": (
        "number_sorting",
        {"min_numbers": 4, "max_numbers": 4, "max_decimals": 0, "min_value": 10, "max_value": 99},
    ),
    "reverse": ("spell_backward", {"min_word_len": 4, "max_word_len": 7}),
}
_TOKEN = re.compile(r"[a-z]+|[^a-z\s]")


@dataclass(frozen=True)
class Problem:
    """One problem. `entry` is reasoning-gym's record as JSON; its checker needs it."""

    kind: str
    prompt: str
    answer: str
    """As the model is to write it, with spaces between tokens."""
    entry: str


def tokens_of(text: str) -> list[str]:
    """Words are tokens, digits and signs too; spaces are not."""
    return _TOKEN.findall(text)


def spaced(text: str) -> str:
    """The text as the tokenizer decodes it: one space between tokens."""
    return " ".join(tokens_of(text))


def problems(kind: str, split: Split, seed: int) -> Iterator[Problem]:
    """Endless problems of one kind. None comes twice before most of those that reasoning-gym can generate have come."""
    name, options = _DATASETS[kind]
    seen: set[str] = set()
    repeats = 0
    for start in itertools.count(seed * 1_000_000_007, 1000):  # entry i of a dataset of seed s is drawn with the seed s + i
        for entry in _generator(name, 1000, start, **options):
            problem = _problem(kind, entry)
            if problem is None or _split(problem.prompt) != split:
                continue
            if problem.prompt in seen:
                repeats += 1
                if repeats <= 20 * len(seen):
                    continue
                seen, repeats = set(), 0
            seen.add(problem.prompt)
            yield problem


def mixed(count: int, split: Split, seed: int, kinds: Sequence[str] = KINDS) -> list[Problem]:
    """`count` problems, the kinds in turn."""
    streams = [problems(kind, split, seed) for kind in kinds]
    return [next(streams[i % len(kinds)]) for i in range(count)]


def correct(problem: Problem, completion: str) -> bool:
    """Whether reasoning-gym's checker gives full marks to what stands behind the last "answer :"."""
    _, marker, answer = completion.rpartition("answer :")
    if not marker:
        return False
    text = "".join(answer.split())
    if problem.kind == "sort":
        text = str(text.split(","))
    return _checker(problem.kind).score_answer(text, json.loads(problem.entry)) == 1.0


def trace(problem: Problem, rng: random.Random, episodes: int | None = None) -> str:
    """A completion: core, episodes (a random number when None), answer."""
    count = rng.choices(EPISODES, EPISODE_WEIGHTS)[0] if episodes is None else episodes
    core, found = _core(problem, rng)
    thoughts = [_episode(problem, found, rng) for _ in range(count)]
    return spaced(" ".join([core, *thoughts, f"answer : {found}"]))


@cache
def _checker(kind: str) -> Any:
    name, options = _DATASETS[kind]
    return _generator(name, 1, 0, **options)


def _generator(name: str, size: int, seed: int, **options: Any) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=size, seed=seed, **options)


def _split(prompt: str) -> Split:
    return "held-out" if zlib.crc32(prompt.encode()) % 5 == 0 else "train"


def _problem(kind: str, entry: dict[str, Any]) -> Problem | None:
    """reasoning-gym's entry as a compact prompt; None for sums that fall below zero on the way."""
    metadata, answer = entry["metadata"], entry["answer"]
    if kind in ("sum", "guess"):
        prompt = f"{kind} : {metadata['expression']} ="
        terms, signs = _terms(prompt)
        if min(total for _, _, _, total in _running(terms, signs)) < 0:
            return None
    elif kind == "sort":
        numbers = [n.removesuffix(".0") for n in metadata["original_numbers"]]
        prompt = f"sort {metadata['direction']} : {' , '.join(numbers)} ="
        answer = " , ".join(n.removesuffix(".0") for n in metadata["sorted_numbers"])
    else:
        if not re.fullmatch("[a-z]+", metadata["word"]):
            return None
        prompt = f"reverse : {' '.join(metadata['word'])} ="
        answer = " ".join(answer)
    kept = json.dumps({"answer": entry["answer"], "metadata": metadata})
    return Problem(kind, spaced(prompt), spaced(answer), kept)


def _terms(prompt: str) -> tuple[list[int], list[str]]:
    body = "".join(prompt.split(":")[1].split())
    return [int(n) for n in re.findall(r"\d+", body)], re.findall(r"[+-]", body)


def _running(terms: Sequence[int], signs: Sequence[str]) -> list[tuple[int, str, int, int]]:
    """(total so far, sign, term, new total) for each step."""
    total, steps = terms[0], []
    for sign, term in zip(signs, terms[1:], strict=True):
        new = total + term if sign == "+" else total - term
        steps.append((total, sign, term, new))
        total = new
    return steps


def _listed(problem: Problem) -> list[str]:
    """What the prompt lists: numbers or letters."""
    body = problem.prompt.split(":")[1].removesuffix(" =")
    return [part.strip() for part in (body.split(",") if problem.kind == "sort" else body.split())]


def _steps(problem: Problem) -> str:
    """The computation that gives the answer."""
    if problem.kind in ("sum", "guess"):
        return " , ".join(f"{total} {sign} {term} = {new}" for total, sign, term, new in _running(*_terms(problem.prompt)))
    if problem.kind == "sort":
        return "order " + " then ".join(problem.answer.split(" , "))
    return "from the end " + problem.answer


def _core(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """The core and the answer that it finds."""
    if problem.kind != "guess":
        return f"{_steps(problem)} .", problem.answer
    guess = _slip(problem, rng) if rng.random() < GUESS_WRONG else problem.answer
    if rng.random() < CHECK_SKIPPED:
        return f"by feel {guess} .", guess
    verdict = "good" if spaced(guess) == problem.answer else "corrected"
    return f"by feel {guess} . check {_steps(problem)} {verdict} .", problem.answer


def _slip(problem: Problem, rng: random.Random) -> str:
    """Another answer, near the right one."""
    if problem.kind in ("sum", "guess"):
        value = int(problem.answer.replace(" ", ""))
        return str(rng.choice([v for v in (value - 2, value - 1, value + 1, value + 2) if v >= 0]))
    parts = problem.answer.split(" , ") if problem.kind == "sort" else problem.answer.split()
    i = rng.randrange(len(parts) - 1)
    parts[i], parts[i + 1] = parts[i + 1], parts[i]
    return (" , " if problem.kind == "sort" else " ").join(parts)


def _episode(problem: Problem, found: str, rng: random.Random) -> str:
    kinds: list[Callable[[Problem, str, random.Random], str]] = [_verify, _restate, _dead_end, _second_guess]
    return rng.choices(kinds, [0.4, 0.2, 0.2, 0.2])[0](problem, found, rng)


def _verify(problem: Problem, found: str, rng: random.Random) -> str:
    opening = rng.choice(
        (
            "wait , let me check that again .",
            "let me verify .",
            "hold on , once more to be sure :",
            "actually , i should double check this .",
        )
    )
    closing = rng.choice(("yes , that is right .", "so it is {} .", "good , the same .", "ok , it holds ."))
    steps = _steps(problem) if found == problem.answer else f"{found} seems fine"
    return f"{opening} {steps} . {closing.format(found)}"


def _restate(problem: Problem, found: str, rng: random.Random) -> str:
    asked = problem.prompt.split(":")[1].removesuffix(" =").strip()
    return rng.choice(
        (
            f"so the problem gives {asked} and i found {found} .",
            f"to restate : we have {asked} . my result is {found} .",
            f"in other words , {asked} leads to {found} .",
        )
    )


def _dead_end(problem: Problem, found: str, rng: random.Random) -> str:
    if problem.kind in ("sum", "guess"):
        terms, _ = _terms(problem.prompt)
        i = rng.randrange(len(terms) - 1)
        tried = f"take {terms[i + 1]} and {terms[i]} first"
    elif problem.kind == "sort":
        a, b = rng.sample(_listed(problem), 2)
        tried = f"compare {a} with {b}"
    else:
        letters = _listed(problem)
        i = rng.randrange(len(letters))
        tried = f"start with {' '.join(letters[i:])}"
    opening = rng.choice(("maybe there is another way :", "alternatively ,", "what if i"))
    closing = rng.choice(
        ("no , that goes nowhere .", "hmm , that is longer , back to {} .", "this does not help , i stay with {} .")
    )
    return f"{opening} {tried} . {closing.format(found)}"


def _second_guess(problem: Problem, found: str, rng: random.Random) -> str:
    other = _slip(problem, rng)
    return rng.choice(
        (
            f"hmm , could it be {other} ? no , it is {found} .",
            f"is {other} possible ? i doubt it , {found} is better .",
            f"but what about {other} ? not really , keep {found} .",
            f"i am not sure about {found} . or {other} ? no , {found} .",
        )
    )


def vocabulary() -> list[str]:
    """Every token that a prompt or a trace can hold, sorted; the words are collected from traces of 400 problems."""
    rng = random.Random(0)
    words = set("abcdefghijklmnopqrstuvwxyz0123456789")
    for problem in mixed(400, "train", 0):
        words.update(tokens_of(problem.prompt))
        for _ in range(4):
            words.update(tokens_of(trace(problem, rng, 4)))
    return sorted(words)
