"""docs/experiments.md is what the committed results and readings make, and shows plots that are there."""

import importlib
import re
from pathlib import Path

import pytest

from entra.experiments import EXPERIMENTS
from entra.experiments.report import report
from entra.experiments.results import read, section

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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_decimal_of_a_reading_stands_in_the_tables_below_it(name):
    """What is said of the results was said of these."""
    module = importlib.import_module(EXPERIMENTS[name])
    result = read(RESULTS / f"{name}.json")
    shown = section(module.tables(result), module.figures(result))
    numbers = re.findall(r"\d+\.\d+", module.READING)
    assert numbers
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", shown)] == []


def test_no_results_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no results; make experiments"):
        report(tmp_path, DOCUMENT)
