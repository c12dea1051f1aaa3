"""Three problems with three completions each, measured by a tiny model; what three experiments wrote about them."""

import functools
import json

import pytest
import tiny_models
from tiny_tokenizer import build_tokenizer

from benchmarks.experiments import measuring, results
from benchmarks.experiments.__main__ import main
from entra.policy import Policy

PROBLEMS = [
    (
        "Compute 3 * 4 + 2.",
        {
            "concise": "3 * 4 = 12, so 12 + 2 = 14.",
            "overthinking": "3 * 4 = 12, so 12 + 2 = 14. Wait, let me check again: 3 * 4 = 12, yes, 12 + 2 = 14.",
            "control": "12 and 2 make 14; the next even numbers are 16 and 18, because each is two more than before.",
        },
    ),
    (
        "Is every square a rectangle?",
        {
            "concise": "Yes: it has four right angles.",
            "overthinking": "Yes: it has four right angles. Hmm, does it? Yes, it has four right angles.",
            "control": "Yes, though not the reverse. Kites, by contrast, need two pairs of equal sides that touch.",
        },
    ),
    (
        "Which is larger, 7 or 9?",
        {
            "concise": "9 > 7.",
            "overthinking": "9 > 7. Let me verify: 9 > 7, so 9.",
            "control": "9, as 9 - 7 = 2. Ten is rounder.",
        },
    ),
]


@pytest.fixture(scope="session")
def problems():
    """Prompts with their completions by kind."""
    return PROBLEMS


@pytest.fixture(scope="session")
def policy():
    return Policy(tiny_models.build("llama"), build_tokenizer())


@pytest.fixture(scope="session")
def measured(policy):
    samples = [
        measuring.Sample(problem=str(i), kind=kind, prompt=[{"role": "user", "content": prompt}], completion=text)
        for i, (prompt, texts) in enumerate(PROBLEMS)
        for kind, text in texts.items()
    ]
    return measuring.measure(policy, measuring.Samples(samples))


@pytest.fixture(scope="session")
def folder(policy, tmp_path_factory):
    """Where an experiment wrote, without the plots, about the problems and one bad row; by its name, when it is asked for."""
    folder = tmp_path_factory.mktemp("experiments")
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "completion": text, "kind": kind, "id": str(i)}
        for i, (prompt, texts) in enumerate(PROBLEMS)
        for kind, text in texts.items()
    ]
    lines = [*map(json.dumps, rows), '{"prompt": "no completion"}']
    (folder / "traces.jsonl").write_text("\n".join(lines))

    @functools.cache
    def written(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measuring, "load_policy", lambda name: policy)
            patch.setattr(results, "draw", lambda figure, folder: None)
            arguments = ["--model", "tiny", "--traces", str(folder / "traces.jsonl"), "--output", str(folder)]
            assert main([name, *arguments, *(["--draws", "3"] if name == "threshold" else [])]) == 0
        return folder

    return written
