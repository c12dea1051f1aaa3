"""`entra inspect`: what is shown is what `score_batch` computes, scored files are not scored again, bad rows stop nothing."""

import json
import math

import pytest
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra
from entra.cli import main
from entra.traces import load_traces


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer().save_pretrained(folder)
    build("llama", max_position_embeddings=2048).save_pretrained(folder)
    return folder


@pytest.fixture
def shown(monkeypatch):
    """What would be written: a list of (traces, path, title, config, facts)."""
    page = pytest.importorskip("entra.view.page")
    calls = []
    monkeypatch.setattr(page, "write_page", lambda traces, path, **options: calls.append((list(traces), path, options)))
    return calls


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


GOOD = {"prompt": "add 3 and 4", "completion": "3 plus 4 is 7, so the answer is 7."}


def test_shows_what_score_batch_computes(model, shown, tmp_path):
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": "add"}]
    rows = [
        {**GOOD, "id": "a", "n": 3},
        {"prompt": chat, "completion": "it is 7", "id": "b"},
        {**GOOD, "prompt": [9, 10], "id": 3},
    ]
    traces = write_rows(tmp_path / "t.jsonl", rows)
    options = ("--attention-weight", "3", "--batch-size", "2")
    assert main(["inspect", traces, "--model", str(model), "-o", "out.html", *options]) == 0
    ((found, path, written),) = shown
    assert (str(path), written["title"]) == ("out.html", traces)
    assert written["config"] == entra.ScoreConfig(attention_weight=3.0)
    assert written["facts"]["model"] == str(model)
    scores = entra.score_batch(
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        model=str(model),
        config=written["config"],
        details=True,
    )
    tokenizer = build_tokenizer()
    for i, trace in enumerate(found):
        assert list(trace.token_ids) == scores.token_ids[i].tolist()
        assert list(trace.protected) == scores.protected[i].tolist()
        assert "".join(trace.pieces) == tokenizer.decode(scores.token_ids[i]) == rows[i]["completion"]
        # Other batches: float32 rounding of sums over 48 weights and 2 layers.
        assert list(trace.logprobs) == pytest.approx(scores.logprobs[i].tolist(), rel=1e-5)
        assert list(trace.incoming) == pytest.approx(scores.incoming[i].tolist(), rel=1e-5)
        assert list(trace.importance) == pytest.approx(scores.importance[i].tolist(), rel=1e-5)
        assert trace.reward == pytest.approx(scores.rewards[i], rel=1e-5)
    assert [trace.name for trace in found] == ["a", "b", "3"]
    assert [trace.prompt for trace in found] == ["add 3 and 4", "system: be short\n\nuser: add", tokenizer.decode([9, 10])]
    assert [trace.columns for trace in found] == [{"id": "a", "n": 3}, {"id": "b"}, {"id": 3}]


@pytest.mark.parametrize("prefix", ["", "entra_"])
@pytest.mark.parametrize("parquet", [False, True], ids=["jsonl", "parquet"])
def test_scored_file_is_shown_without_weights(prefix, parquet, model, shown, tmp_path, monkeypatch, capsys):
    rows = [{**GOOD, "id": i, "note": "x" * i} for i in range(3)] + [{"prompt": "add", "completion": None, "id": 3, "note": ""}]
    traces = write_rows(tmp_path / "t.jsonl", rows)
    flags = ["--protect-fraction", "0.3"] if parquet else ["--protect-fraction", "0.3", "--reward-ngram", "2"]
    command = ["score", traces, "--model", str(model), "--output", "s.jsonl", "--details", *flags]
    assert main([*command, "--prefix", prefix]) == 0
    assert main(["inspect", traces, "--model", str(model), *flags]) == 0
    scored, arguments = "s.jsonl", []
    if parquet:
        import pyarrow.json
        import pyarrow.parquet

        scored = "s.parquet"  # not by datasets, whose 4.7 cannot read rows with different keys
        pyarrow.parquet.write_table(pyarrow.json.read_json("s.jsonl"), scored)
        assert main(["inspect", scored]) == 2
        assert "give --model: its tokenizer is needed" in capsys.readouterr().err
        arguments = ["--model", str(model)]
    monkeypatch.setattr("entra.cli.inspect.load_as", None)
    monkeypatch.setattr("entra.cli.scoring.load_policy", None)
    assert main(["inspect", scored, *arguments]) == 0
    (fresh, path, _), (kept, _, written) = shown
    assert str(path) == "report.html"
    assert kept == fresh
    assert [trace.scores.entropy for trace in kept] == [trace.scores.entropy for trace in fresh]
    assert [trace.error is None for trace in kept] == [True, True, True, False]
    assert kept[3].error == "missing field: completion is null"
    assert "note" in kept[0].columns
    expected = None if parquet else entra.ScoreConfig(protect_fraction=0.3, reward_ngram=2)
    assert written["config"] == expected, "the file alone does not say"
    assert "4 traces, 1 of them with an error (1 missing field)" in capsys.readouterr().err


def test_flags_that_would_not_change_the_scores_of_a_file_are_refused(model, shown, tmp_path, capsys):
    traces = write_rows(tmp_path / "t.jsonl", [SCORED])
    assert main(["inspect", traces, "--model", str(model), "--attention-weight", "7"]) == 2
    assert "t.jsonl holds scores, which the method's flags do not change" in capsys.readouterr().err
    assert (
        main(
            [
                "score",
                write_rows(tmp_path / "u.jsonl", [GOOD]),
                "--model",
                str(model),
                "--output",
                "s.jsonl",
                "--details",
                "--attention-weight",
                "7",
            ]
        )
        == 0
    )
    assert main(["inspect", "s.jsonl", "--attention-weight", "7"]) == 0
    assert shown.pop()[2]["config"] == entra.ScoreConfig(attention_weight=7.0)
    assert main(["inspect", "s.jsonl", "--attention-weight", "6"]) == 2


def test_file_that_was_scored_twice_asks_which(model, shown, tmp_path, capsys):
    scores = {"token_ids": [5, 6], "logprobs": [-1, -2], "incoming": [0, 0], "importance": [-1, -2], "protected": [True, False]}
    both = {"a_" + name: value for name, value in {**scores, "reward": 0.5}.items()}
    both |= {"b_" + name: value for name, value in {**scores, "reward": 0.25}.items()}
    traces = write_rows(tmp_path / "t.jsonl", [{**GOOD, **both}])
    assert main(["inspect", traces, "--model", str(model)]) == 2
    assert "choose with --prefix, one of 'a_', 'b_'" in capsys.readouterr().err
    assert main(["inspect", traces, "--model", str(model), "--prefix", "b_"]) == 0
    ((trace,), _, _) = shown.pop()
    assert trace.reward == 0.25
    assert trace.columns["a_reward"] == 0.5
    assert not [name for name in trace.columns if name.startswith("b_")]
    assert main(["inspect", traces, "--model", str(model), "--prefix", "c_"]) == 2
    assert "lacks one of the columns c_reward, c_token_ids" in capsys.readouterr().err


SCORED = {
    **GOOD,
    "reward": 1.0,
    "token_ids": [5, 6],
    "logprobs": [-1.0, -2.0],
    "incoming": [0.5, 0.0],
    "importance": [0.0, -2.0],
    "protected": [True, False],
}


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        pytest.param({"logprobs": None}, "missing field: logprobs is null", id="null"),
        pytest.param({"incoming": [0.5]}, "malformed: incoming must hold a finite number for each of the 2", id="short"),
        pytest.param({"importance": [0.5, math.nan]}, "malformed: importance must hold a finite number", id="nan"),
        pytest.param({"importance": [0.5, 10**400]}, "malformed: importance must hold a finite number", id="no-float"),
        pytest.param({"reward": 10**400}, "malformed: reward=1000", id="reward-is-no-float"),
        pytest.param({"logprobs": [-1e300, -1.0]}, "malformed: logprobs must hold a finite number", id="no-float32"),
        pytest.param({"importance": [0.5, "x"]}, "malformed: importance must hold a finite number", id="text"),
        pytest.param({"protected": [1, 0]}, "malformed: protected must hold true or false", id="not-bool"),
        pytest.param({"token_ids": [5, -1]}, "malformed: token_ids must be a list of token ids", id="negative-id"),
        pytest.param({"token_ids": "ab"}, "malformed: token_ids must be a list of token ids", id="ids-are-text"),
        pytest.param({"token_ids": []}, "empty completion: ", id="no-tokens"),
        pytest.param({"reward": "high"}, "malformed: reward='high' must be a number", id="reward"),
        pytest.param({"error": "not text: x"}, "not text: x", id="error-of-entra-score"),
    ],
)
def test_damaged_scores_are_an_error_of_the_row(damage, error, model, shown, tmp_path):
    traces = write_rows(tmp_path / "t.jsonl", [SCORED, {**SCORED, **damage}, '{"cut', SCORED])
    assert main(["inspect", traces, "--model", str(model)]) == 0
    ((first, bad, cut, last), _, _) = shown.pop()
    assert first.error is last.error is None
    assert bad.error.startswith(error)
    assert len(bad.token_ids) == 0
    assert bad.prompt == GOOD["prompt"]
    assert cut.error.startswith("malformed: line 3")


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        pytest.param([{"id": 1}, {"id": 2}], ["1", "2"], id="id"),
        pytest.param([{"id": 1, "name": "x"}, {"id": 1, "name": "y"}], ["x", "y"], id="name-where-ids-repeat"),
        pytest.param([{"id": 1}, {}], ["row 1", "row 2"], id="not-all-have-one"),
        pytest.param([{"id": 1}, {"id": "1"}], ["row 1", "row 2"], id="equal-as-text"),
        pytest.param([{"id": [1]}, {"id": [2]}], ["row 1", "row 2"], id="not-text"),
        pytest.param([{"id": 7}, "{", {"id": 8}], ["7", "row 2", "8"], id="malformed-line"),
    ],
)
def test_names(rows, names, model, shown, tmp_path):
    traces = write_rows(tmp_path / "t.jsonl", [row if isinstance(row, str) else {**SCORED, **row} for row in rows])
    assert main(["inspect", traces, "--model", str(model)]) == 0
    assert [trace.name for trace in shown[0][0]] == names


def test_shipped_traces_without_a_file(model, shown):
    assert main(["inspect", "--model", str(model), "--limit", "3"]) == 0
    problem = load_traces()[0]
    (traces, _, written) = shown[0]
    assert [trace.name for trace in traces] == [f"{problem.id} · {c.kind}" for c in problem.completions[:3]]
    assert {trace.prompt for trace in traces} == {problem.prompt}
    assert "".join(traces[0].pieces) == problem.completions[0].text.replace("\n", "?"), "the tokenizer has no newline"
    assert traces[0].columns["correct"] is True
    assert written["title"] == "the traces that ship with entra"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["missing.jsonl"], "cannot read missing.jsonl: No such file", id="no-input"),
        pytest.param(["empty.jsonl"], "empty.jsonl has no rows; give a file with one JSON object a line", id="empty"),
        pytest.param(["t.jsonl", "--model", "no/such"], "cannot load --model no/such: ", id="no-such-model"),
        pytest.param(["t.jsonl"], "--model is needed to score the traces", id="no-model"),
        pytest.param(["t.jsonl", "-o", "no/such/r.html"], "there is no folder no/such; make it first", id="no-folder"),
        pytest.param(["t.html", "-o", "t.html"], "--output t.html is the input; choose another file", id="output-is-input"),
        pytest.param(["t.jsonl", "-o", "scores.jsonl"], "--output scores.jsonl must end in .html", id="not-html"),
        pytest.param(["t.jsonl", "-o", "folder.html"], "cannot write --output folder.html: it is no ordinary", id="folder"),
        pytest.param(["t.jsonl", "-o", "t.html"], "--output t.html exists, and entra inspect did not write it", id="not-ours"),
        pytest.param(["t.jsonl", "--limit", "0"], "--limit 0 must be at least 1 row", id="limit"),
        pytest.param(["t.jsonl", "--batch-size", "0"], "--batch-size 0 must be at least 1 row", id="batch-size"),
        pytest.param(["t.jsonl", "--prompt-column", "q"], "no row has a column 'q'; there are prompt, completion", id="column"),
        pytest.param(
            ["t.jsonl", "--marks", "kind", "--model", "m"],
            "--marks kind: no row has that column; there are prompt, completion",
            id="marks",
        ),
        pytest.param(["t.jsonl", "--protect-fraction", "2"], "protect_fraction=2.0 must be in [0, 1]", id="config"),
    ],
)
def test_bad_usage_is_one_line(words, message, tmp_path, capsys):
    write_rows(tmp_path / "t.jsonl", [GOOD])
    write_rows(tmp_path / "t.html", [GOOD])
    write_rows(tmp_path / "empty.jsonl", [])
    (tmp_path / "folder.html").mkdir()
    assert main(["inspect", *words]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("entra inspect: "))
    assert message in line
    assert not (tmp_path / "report.html").exists()


def test_columns_are_shown_as_marks(model, shown, tmp_path, capsys):
    kinds = [{"start": 0, "end": 8, "label": "plan"}, {"start": 16, "end": 20, "label": "end"}, {"start": 30, "end": 40}]
    rows = [{**GOOD, "kinds": kinds, "place": 5, "note": "none"}, {**GOOD, "note": "none"}]
    traces = write_rows(tmp_path / "t.jsonl", rows)
    words = ["inspect", traces, "--model", str(model)]
    assert main([*words, "--marks", "kinds", "--marks", "place", "--marks", "kinds"]) == 0
    told = capsys.readouterr().err
    assert (
        "marks of kinds, place: 3 in 1 of 2 traces; kinds: 1 of 3 marks are left out; the first reaches beyond character 34"
        in told
    )
    (first, second), *_ = shown[0]
    assert [(mark.label, mark.start, mark.end) for mark in first.marked] == [("plan", 0, 8), ("place", 5, 5), ("end", 16, 20)]
    text = "".join(first.pieces)
    for mark in first.marked:
        upto = len("".join(first.pieces[: mark.first]))
        assert upto <= mark.start < upto + len(first.pieces[mark.first])
        assert len("".join(first.pieces[: mark.last])) < max(mark.end, mark.start + 1) <= len(text)
    assert (second.marked, second.left_out) == ([], [])
    assert first.columns == second.columns == {"note": "none"}, "a column of marks is not shown as one"
    assert main([*words, "--marks", "note"]) == 0
    told = capsys.readouterr().err
    assert "marks of note: 0 in 0 of 2 traces; note: 1 of 1 marks are left out; the first has no start and end" in told
    assert told.endswith(" (1 more such columns of rows)\n")
    assert main([*words, "--marks", "note", "--marks", "kind"]) == 2
    assert "--marks kind: no row has that column; there are " in capsys.readouterr().err


def test_code_in_a_file_and_beside_it_is_not_run(model, shown, tmp_path, monkeypatch, capsys):
    """The model on record comes with the file: code of its tokenizer was offered to run, with y as the way to say so."""
    code = f"open({str(tmp_path / 'executed')!r}, 'w').close()"
    entry = json.dumps({"answer": "7", "metadata": {"source_dataset": "n_queens", "valid_answers": []}})
    traces = write_rows(tmp_path / "t.jsonl", [{**GOOD, "completion": f"<answer>{code}</answer>", "entry": entry}])
    assert main(["score", traces, "--model", str(model), "--output", "s.jsonl", "--details"]) == 0
    assert main(["inspect", "s.jsonl", "-o", "out.html"]) == 0
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text(json.dumps({"model_type": "none", "auto_map": {"AutoConfig": "code.Config"}}))
    (evil / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}})
    )
    (evil / "code.py").write_text(code)
    record = json.loads((tmp_path / "s.jsonl.meta.json").read_text())
    (tmp_path / "s.jsonl.meta.json").write_text(json.dumps({**record, "model": str(evil)}))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    assert main(["inspect", "s.jsonl", "-o", "out.html"]) == 2
    assert "cannot load --model" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("config", {"attention_weight": 10**400}, 0),
        ("config", [1], 0),
        ("model", ["m"], 2),
        ("model", 10**400, 2),
        ("versions", None, 2),
    ],
    ids=["config", "config-is-a-list", "model-is-a-list", "model-is-a-number", "of-something-else"],
)
def test_absurd_values_beside_a_scored_file_end_in_no_traceback(name, value, code, model, shown, tmp_path, capsys):
    ids = [5, 6]
    columns = {key: [0.5, 0.5] for key in ("logprobs", "incoming", "importance")}
    write_rows(tmp_path / "s.jsonl", [{**GOOD, **columns, "token_ids": ids, "protected": [True, False], "reward": 0.5}])
    record = {"versions": {"entra": "0"}, "input": {}, "config": {}, "model": str(model), name: value}
    (tmp_path / "s.jsonl.meta.json").write_text(json.dumps(record))
    assert main(["inspect", "s.jsonl", "-o", "out.html"]) == code
    assert code == 0 or "give --model: its tokenizer is needed" in capsys.readouterr().err
