"""docs/experiments.md is what the committed results and readings make, and shows plots that are there."""

import re
from pathlib import Path

import pytest

from benchmarks.experiments import EXPERIMENTS, results
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.report import report
from benchmarks.experiments.results import read, section

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
DOCUMENT = ROOT / "docs" / "experiments.md"
PAGES = sorted({experiment.page for experiment in EXPERIMENTS.values()})


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_up_to_date(page):
    document = ROOT / "docs" / page
    assert report(RESULTS, document) == document.read_text()


def test_a_module_that_runs_has_its_markdown_and_each_has_a_place_of_its_own():
    folder = ROOT / "benchmarks" / "experiments"
    runs = {path for path in folder.glob("*.py") if "\ndef run(options: argparse.Namespace) -> Result:" in path.read_text()}
    assert {experiment.path for experiment in EXPERIMENTS.values()} == runs
    for page in PAGES:
        places = [experiment.place for experiment in EXPERIMENTS.values() if experiment.page == page]
        assert places == list(range(1, len(places) + 1))


@pytest.mark.parametrize("page", PAGES)
def test_every_experiment_is_on_its_page_with_its_plots(page):
    text = (ROOT / "docs" / page).read_text()
    shown = [name for name, experiment in EXPERIMENTS.items() if experiment.page == page]
    assert re.findall(r"^##? ([a-z-]+): ", text, re.MULTILINE) == shown
    plots = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(plots) >= len(shown)
    assert [plot for plot in plots if not (ROOT / "docs" / plot).is_file()] == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_decimal_of_a_reading_stands_in_the_tables_below_it(name):
    """What is said of the results was said of these."""
    module = EXPERIMENTS[name].module()
    result = read(RESULTS / f"{name}.json")
    shown = section(module.tables(result), module.figures(result))
    numbers = re.findall(r"\d+\.\d+", EXPERIMENTS[name].reading)
    assert numbers
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", shown)] == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_plot_has_a_title_labels_and_a_caption_that_stands_alone(name):
    from matplotlib.figure import Figure

    drawn = EXPERIMENTS[name].module().figures(read(RESULTS / f"{name}.json"))
    assert drawn
    for figure in drawn:
        assert len(figure.title) > 20
        assert len(figure.caption) > 150
        canvas = Figure()
        figure.draw(canvas)
        assert canvas.axes
        for axes in canvas.axes:
            assert axes.has_data()
            place = axes.get_subplotspec()
            for label, along, ticks in (
                ("get_xlabel", "colspan", axes.get_xticklabels()),
                ("get_ylabel", "rowspan", axes.get_yticklabels()),
            ):
                row = [a for a in canvas.axes if getattr(a.get_subplotspec(), along) == getattr(place, along)]
                words = all(any(c.isalpha() for c in tick.get_text()) for tick in ticks)
                assert words or any(getattr(other, label)() for other in row), (figure.name, label)


def test_no_results_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no results; make experiments"):
        report(tmp_path, DOCUMENT)


def test_files_of_somebody_else_are_not_replaced(tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    results.check_folder(folder, "domain")
    (folder / "domain.md").write_text("mine")
    command = ["domain", "--output", str(folder), "--redraw", str(tmp_path / "none.json")]
    assert main(command) == 1
    assert f"{folder / 'domain.md'} exists, and no experiment wrote it" in capsys.readouterr().err
    written = results.Result(name="domain", settings={}, rows=[{"a": 1}], summary={}, environment={})
    results.write(written, folder, [], [])
    results.check_folder(folder, "domain")
    (folder / "domain.json").write_text("[]")
    with pytest.raises(ValueError, match=r"domain\.csv exists, and no experiment wrote it"):
        results.check_folder(folder, "domain")
