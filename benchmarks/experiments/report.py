"""docs/experiments.md from the results of the experiments: `python -m benchmarks.experiments.report RESULTS DOCUMENT`.

What stands in the document is drawn from the JSON files alone; each experiment's `READING` says in words what its numbers say.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from benchmarks.experiments import EXPERIMENTS
from benchmarks.experiments.results import Result, read, section

_INTRODUCTION = """\
# Experiments

What ENTRA's score sees, what it does not see, and what its options do: on SmolLM2-135M-Instruct, and for what happens in
training on the small model of [evidence.md](evidence.md). Each section was made by the command that stands in it, from the
raw numbers in `benchmarks/results/experiments` (JSON and CSV); `make experiments` runs them all again.

In two minutes:

- **The reward sees repetition, and length.** r is lower for an overthinking completion than for a text of about its length
  that goes on to new topics in 26 of 26 pairs, and than for its concise twin in 25 of 26, but that is because it is longer: at
  a fixed number of tokens the twins cannot be told apart (`threshold`).
- **It does not see whether a token matters.** New words that say nothing raise r (`threshold`), and r has no correlation with
  being right (`domain`, though the model is seldom right).
- **What is protected is what the model was sure of.** 90.3 % of it would be protected by log P alone (`importance`). Numbers
  and punctuation are protected more often than chance, reflection words and connectives less.
- **Attention hardly counts, and is a weak stand-in for influence.** λ = 2 changes a tenth of the protected set (`lambda`). μ
  orders tokens by exact leave-one-out no better than their position does (0.28 each; 0.11 is left given position and log P),
  and adding it to log P does not bring the importance nearer to log P given both sides. The importance as a whole protects
  the tokens that the later text misses least, because hiding an improbable token hurts more (`proxy`).
- **In training these choices matter little.** τ from 10 to 50 % and λ from 0 to 100 end within 5 and 4 tokens of each other,
  where GRPO takes away 36 to 43 of 85 (`train-threshold`, `train-lambda`). Conciseness carries over to problems that were not
  trained on (`transfer`).
- **It costs one forward**, 0.95 to 1.08 times its time on a CPU, and less memory; reading the same numbers off eager attention
  takes 1.19 to 4.29 times as long (`overhead`).

All of this is about small models and short texts. Where a larger one says otherwise, we want to know: the commands on traces
take `--model`.
"""


def report(results: Path, document: Path) -> str:
    """The document's text; `document` is where it will stand, for the links to the plots.

    Raises:
        FileNotFoundError: no results in that folder.
    """
    found = {name: results / f"{name}.json" for name in EXPERIMENTS if (results / f"{name}.json").is_file()}
    if not found:
        raise FileNotFoundError(f"{results} holds no results; make experiments")
    images = os.path.relpath(results, document.parent)
    return "\n".join([_INTRODUCTION, *(_section(name, read(path), images) for name, path in found.items())])


def _section(name: str, result: Result, images: str) -> str:
    module = importlib.import_module(EXPERIMENTS[name])
    environment = result.environment
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    made = f"`{environment['command']}`, {environment['date']}, {environment['machine']}; {versions}."
    body = section(module.tables(result), module.figures(result), images)
    return f"## {name}: {module.QUESTION}\n\n{module.READING.strip()}\n\n{made}\n\n{body}"


if __name__ == "__main__":
    folder, target = map(Path, sys.argv[1:])
    target.write_text(report(folder, target))
