"""docs/training.md says what `benchmarks/shared_prompts.py` measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_ratios_that_were_measured():
    results = json.loads((ROOT / "benchmarks/results/shared-prompts-cpu.json").read_text())
    page = (ROOT / "docs/training.md").read_text().split("python -m benchmarks.shared_prompts")[1]
    printed = re.findall(r"^\| .+ \| (0\.\d\d) \|$", page, re.MULTILINE)
    assert printed == [f"{record['ratio']:.2f}" for record in results["records"]]
    costs = re.search(r"measured (\d+) with SmolLM2, and (\d+) with a smaller model", page)
    assert costs is not None
    assert [int(cost) for cost in costs.groups()] == [round(cost) for cost in results["forward_in_tokens"].values()]
    assert max(record["rewards_differ"] for record in results["records"]) < 1e-6
