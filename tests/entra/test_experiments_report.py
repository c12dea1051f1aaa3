"""docs/experiments.md is what the committed results and readings make, and shows plots that are there."""

import re
from pathlib import Path

import pytest

from entra.experiments import EXPERIMENTS
from entra.experiments.report import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
DOCUMENT = ROOT / "docs" / "experiments.md"


def test_the_document_is_up_to_date():
    assert report(RESULTS, DOCUMENT) == DOCUMENT.read_text()


def test_every_experiment_is_in_it_with_its_plots():
    text = DOCUMENT.read_text()
    assert re.findall(r"^## ([a-z-]+): ", text, re.MULTILINE) == list(EXPERIMENTS)
    plots = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(plots) >= len(EXPERIMENTS)
    assert [plot for plot in plots if not (DOCUMENT.parent / plot).is_file()] == []


def test_no_results_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no results; make experiments"):
        report(tmp_path, DOCUMENT)
