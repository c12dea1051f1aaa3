"""docs/kv-eviction.md has the table of the results that are committed, and what it says about them holds."""

import json
from pathlib import Path

from benchmarks import kv_eviction

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/kv-eviction.md").read_text()
RESULTS = json.loads((ROOT / "benchmarks/results/kv-eviction-cpu.json").read_text())


def test_the_page_has_the_measured_table():
    assert kv_eviction.table(RESULTS) in PAGE
