"""What the experiments on tokens write: the same from the JSON alone, what was left out, plots that can be read."""

import pytest

import entra
from benchmarks.experiments import attention_weight, importance, measuring, results, threshold
from benchmarks.experiments.__main__ import main

NAMES = {"importance": importance, "threshold": threshold, "lambda": attention_weight}


@pytest.mark.parametrize("name", NAMES)
def test_redraw_writes_the_same_report_from_the_json_alone(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "draw", lambda figure, folder: None)
    monkeypatch.setattr(measuring, "load_policy", None)
    assert main([name, "--redraw", str(folder(name) / f"{name}.json"), "--output", str(tmp_path)]) == 0
    for ending in ("md", "json", "csv"):
        assert (tmp_path / f"{name}.{ending}").read_bytes() == (folder(name) / f"{name}.{ending}").read_bytes()


def test_a_result_records_the_version_of_this_project():
    """It was left out since the distribution has another name than the package."""
    assert list(results.environment()["versions"])[:2] == ["entra", "torch"]
    assert results.environment()["versions"]["entra"] == entra.__version__


@pytest.mark.parametrize("name", NAMES)
def test_report_says_what_was_left_out(name, folder):
    text = (folder(name) / f"{name}.md").read_text()
    assert "Left out: 1 rows that cannot be scored, the first: row 10: missing field: completion is not there." in text
    assert results.read(folder(name) / f"{name}.json").summary["left_out_rows"] == [
        "row 10: missing field: completion is not there"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_plots_have_labels_and_captions(name, folder):
    from matplotlib.figure import Figure

    drawn = NAMES[name].figures(results.read(folder(name) / f"{name}.json"))
    assert len({figure.name for figure in drawn}) == 3
    for figure in drawn:
        canvas = Figure()
        figure.draw(canvas)
        assert figure.title
        assert any(axes.get_xlabel() for axes in canvas.axes)
        assert any(axes.get_ylabel() for axes in canvas.axes)
        assert all(axes.has_data() for axes in canvas.axes)
        assert "9 completions of 3 problems" in figure.caption
        assert "95 % intervals" in figure.caption or "quartile" in figure.caption
