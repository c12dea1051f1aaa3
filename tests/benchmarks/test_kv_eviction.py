"""docs/kv-eviction.md has the table of the results that are committed, and what it says about them holds."""

import json
import re
from pathlib import Path

from benchmarks import kv_eviction

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/kv-eviction.md").read_text()
RESULTS = json.loads((ROOT / "benchmarks/results/kv-eviction-cpu.json").read_text())


TABLE = kv_eviction.table(RESULTS)


def test_the_page_has_the_measured_table():
    assert TABLE in PAGE


def test_the_numbers_that_the_page_reads_out_of_it_are_there():
    prose = PAGE.split("## Time and memory")[1].split(kv_eviction.BEGIN)[0]
    said = set(re.findall(r"\d\.\d\d", prose))
    assert len(said) >= 4
    assert said <= set(re.findall(r"\d\.\d\d", TABLE))
