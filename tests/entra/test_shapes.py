"""Prompt and completion in files of every shape in which people have them: each is the beginning of such a file."""

import csv
import gzip
import json
import os
from pathlib import Path

import pytest

from entra.commands import CommandError
from entra.encode import completion_text
from entra.rows import format_of
from entra.shapes import ANSWERS, ARGUMENTS, INDEX, PROMPTS, RESPONSES, take
from entra.source import Source

USER = {"role": "user", "content": "What is 17 + 26?"}
SYSTEM = {"role": "system", "content": "Be short."}
ANSWER = {"role": "assistant", "content": "It is 43."}
THOUGHT = "<think>\n7 + 6 is 13.\n</think>\n\nIt is 43."

# As datasets `open-r1/OpenR1-Math-220k` has them: the messages repeat one of the generations.
OPENR1 = {
    "problem": "What is 17 + 26?",
    "solution": "43",
    "answer": "43",
    "problem_type": "Algebra",
    "source": "olympiads",
    "uuid": "586fd646-76d6-5070-8c81-9993ab9d8559",
    "is_reasoning_complete": [True, False],
    "generations": [THOUGHT, "<think>\n7 + 6 is"],
    "correctness_math_verify": [True, False],
    "correctness_llama": None,
    "finish_reasons": ["stop", "length"],
    "correctness_count": 1,
    "messages": [USER, {"role": "assistant", "content": THOUGHT}],
}
CHOICE = {"index": 0, "message": {**ANSWER, "refusal": None}, "logprobs": None, "finish_reason": "stop"}
THINKING = {
    "index": 1,
    "message": {"role": "assistant", "reasoning_content": "\n7 + 6 is 13.\n", "content": "\n\nIt is 43."},
    "finish_reason": "length",
}


def batch_line(number, choices, error=None):
    body = {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": choices, "usage": {"total_tokens": 9}}
    response = {"status_code": 200, "request_id": f"r{number}", "body": body} if error is None else None
    return {"id": f"batch_req_{number}", "custom_id": f"request-{number}", "response": response, "error": error}


def request_line(number):
    body = {"model": "m", "messages": [SYSTEM, USER], "max_tokens": 1000}
    return {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def harness_sample(response, arguments):
    return {
        "doc_id": 0,
        "doc": {"question": "What is 17 + 26?", "answer": "17 + 26 = 43\n#### 43"},
        "target": "17 + 26 = 43\n#### 43",
        "arguments": arguments,
        "resps": [response],
        "filtered_resps": ["43"],
        "filter": "strict-match",
        "metrics": ["exact_match"],
        "doc_hash": "d0",
        "prompt_hash": "p0",
        "target_hash": "t0",
        "exact_match": 1.0,
    }


def written(name, rows):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return Path(name)


def pairs(*names, **options):
    """Prompt and completion of each row, the completion as text; its fault where it has none."""
    rows = list(Source([Path(name) for name in names], **options).read())
    return [(row.prompt, completion_text(row.completion) if row.fault is None else row.fault) for row in rows]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


ASKED = "What is 17 + 26?"
SAID = "It is 43."
SHAPES = {
    "prompt-completion": ({"prompt": ASKED, "completion": SAID, "answer": "43"}, [(ASKED, SAID)]),
    "traces": (
        {
            "prompt": ASKED,
            "completion": THOUGHT,
            "problem": "17 + 26",
            "problem_id": "p1",
            "correct": True,
            "complete": True,
            "settled_at": 8,
            "annotations": [{"start": 8, "end": 20, "label": "active_computation", "depends_on": [0]}],
        },
        [(ASKED, THOUGHT)],
    ),
    "trl-conversational": ({"prompt": [USER], "completion": [ANSWER]}, [([USER], SAID)]),
    "openr1": (OPENR1, [(ASKED, THOUGHT), (ASKED, "<think>\n7 + 6 is")]),
    "problem-generation": ({"problem": ASKED, "generation": SAID, "solution": "43"}, [(ASKED, SAID)]),
    "question-response": ({"question": ASKED, "response": SAID}, [(ASKED, SAID)]),
    "alpaca": ({"instruction": "Add.", "input": "17 and 26", "output": SAID}, [("Add.\n\n17 and 26", SAID)]),
    "alpaca-without-input": ({"instruction": "Add 17 and 26.", "input": "", "output": SAID}, [("Add 17 and 26.", SAID)]),
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, [([SYSTEM, USER], SAID)]),
    "messages-of-several-turns": ({"messages": [USER, ANSWER, USER, ANSWER]}, [([USER, ANSWER, USER], SAID)]),
    "messages-in-parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, ANSWER]},
        [([USER], SAID)],
    ),
    "messages-with-reasoning": ({"messages": [USER, THINKING["message"]]}, [([USER], THOUGHT)]),
    "messages-with-reasoning-only": (
        {"messages": [USER, {"role": "assistant", "reasoning": "7 + 6 is", "content": None}]},
        [([USER], "<think>\n7 + 6 is")],
    ),
    "sharegpt": (
        {
            "id": "c1",
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": ASKED},
                {"from": "gpt", "value": SAID},
            ],
        },
        [([SYSTEM, USER], SAID)],
    ),
    "harness": (
        harness_sample([SAID], {"gen_args_0": {"arg_0": ASKED, "arg_1": {"until": ["Question:"], "do_sample": False}}}),
        [(ASKED, SAID)],
    ),
    "harness-of-repeats": (harness_sample([SAID, "43"], {"gen_args_0": {"arg_0": ASKED}}), [(ASKED, SAID), (ASKED, "43")]),
    "harness-of-older-versions": (harness_sample([SAID], [[ASKED, {"until": ["\n"]}]]), [(ASKED, SAID)]),
    "harness-with-chat": (harness_sample([SAID], {"gen_args_0": {"arg_0": [json.dumps([USER])]}}), [([USER], SAID)]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read_without_flags(shape):
    row, expected = SHAPES[shape]
    source = Source([written("t.jsonl", [row, row])])
    assert source.rows == 2 * len(expected)
    assert pairs("t.jsonl") == expected * 2
    assert len(source.lines()) == 1
    assert source.lines()[0].startswith("t.jsonl: ")
    # From any row on, as a run that goes on reads it.
    assert [list(source.read(i)) for i in range(source.rows)] == [list(source.read())[i:] for i in range(source.rows)]


@pytest.mark.parametrize("shape", [name for name in SHAPES if not name.startswith("harness-")])
@pytest.mark.parametrize("form", ["json", "jsonl.gz", "jsonl.zst", "parquet", "csv", "csv.gz"])
def test_every_shape_is_read_from_every_format(shape, form):
    if (shape, form) == ("messages-in-parts", "parquet"):
        pytest.skip("text and parts have no type in common")
    row, expected = SHAPES[shape]
    path = Path(f"t.{form}")
    if form == "json":
        path.write_text(json.dumps([row, row], indent=1))
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n") * 2)  # two members, as of two runs
    elif form == "jsonl.zst":
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(2 * (json.dumps(row).encode() + b"\n"))
    elif form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("datasets")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    else:
        with (gzip.open if form.endswith("gz") else open)(path, "wt", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(row)
            cells = [json.dumps(value) if isinstance(value, list | dict) else value for value in row.values()]
            writer.writerows([cells, cells])
    if form == "parquet":  # which has one type for all messages of a column
        found = [(p if isinstance(p, str) else [{k: m[k] for k in USER} for m in p], c) for p, c in pairs(path)]
    else:
        found = pairs(path)
    assert found == expected * 2


def test_generations_get_an_index_and_their_own_values():
    rows = list(Source([written("t.jsonl", [OPENR1])]).read())
    assert [row.columns["generation_index"] for row in rows] == [0, 1]
    assert [row.columns["generations"] for row in rows] == OPENR1["generations"]
    assert [row.columns["correctness_math_verify"] for row in rows] == [True, False]
    assert [row.columns["finish_reasons"] for row in rows] == ["stop", "length"]
    assert [row.columns["messages"] for row in rows] == [OPENR1["messages"]] * 2
    # Rows that were made of one before stay as they are, also when they are read again.
    again = list(Source([written("again.jsonl", [row.columns for row in rows])]).read())
    assert [row.columns for row in again] == [row.columns for row in rows]
    written("taken.jsonl", [{**OPENR1, "generation_index": 5}])
    with pytest.raises(CommandError, match="whose number goes into the column generation_index; the file has one"):
        Source([Path("taken.jsonl")])


def test_output_of_a_batch_finds_its_requests():
    failed = batch_line(3, [], {"code": "server_error", "message": "no time"})
    output = written("output.jsonl", [batch_line(2, [CHOICE, THINKING]), batch_line(1, [CHOICE]), failed, batch_line(4, [])])
    requests = written("requests.jsonl", [request_line(number) for number in (1, 2, 3, 4)])
    for names in ((output, requests), (requests, output)):
        source = Source(names)
        rows = list(source.read())
        assert source.rows == len(rows) == 5
        assert pairs(*names) == [
            ([SYSTEM, USER], SAID),
            ([SYSTEM, USER], THOUGHT),
            ([SYSTEM, USER], SAID),
            ([SYSTEM, USER], "failed request: no time"),
            ([SYSTEM, USER], "missing field: response has no choices"),
        ]
        assert [row.columns.get("finish_reason") for row in rows] == ["stop", "length", "stop", None, None]
        assert all("error" not in row.columns for row in rows)
        assert rows[1].columns["response"]["body"]["choices"] == [THINKING]
        assert rows[1].columns["prompt"] == [SYSTEM, USER]
        assert "error" not in source.columns
    # Alone, and of other requests.
    assert pairs(output)[0][1].startswith("missing field: the prompt is in the file of the batch's requests; name it, too")
    others = written("others.jsonl", [request_line(9)])
    assert pairs(output, others)[0][1].startswith("missing field: no request has custom_id request-2")
    with pytest.raises(CommandError, match="holds the requests of a batch alone"):
        Source([requests])


def test_bad_rows_stay_rows():
    rows = {
        '{"question": "a", "respon': "malformed",
        json.dumps({"question": None, "response": "b"}): "missing field: question is null",
        json.dumps({"question": "a"}): "missing field: response is not there",
        json.dumps({"question": "a", "response": "b"}): None,
    }
    source = Source([written("t.jsonl", rows)])
    assert [(row.malformed and "malformed") or row.fault for row in source.read()] == list(rows.values())
    chats = {
        "missing field: messages ends with a message of role 'user'": [ANSWER, USER],
        "not text: messages must be a list": "text",
        "not text: a message is from 'nobody'": [{"from": "nobody", "value": "x"}],
        "missing field: messages is null": None,
    }
    written("chats.jsonl", [{"messages": messages} for messages in chats.values()])
    for (_, fault), expected in zip(pairs("chats.jsonl"), chats, strict=True):
        assert fault.startswith(expected)
    choices = harness_sample([["-3.5", "False"], ["-0.1", "True"]], {"gen_args_0": {"arg_0": "a", "arg_1": " b"}})
    written("harness.jsonl", [choices])
    assert all(fault.startswith("not text: resps holds no generated text") for _, fault in pairs("harness.jsonl"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "completion", "response"], "completion and response could both hold the completion: use --completion"),
        (["problem", "question", "completion"], "problem and question could both hold the prompt: use --prompt-column"),
        (["prompt", "completion", "messages"], "completion and messages could both hold the completion: use --compl"),
        (["messages", "conversations"], "messages and conversations could both hold the completion"),
        (["prompt", "answer"], "no column is known to hold the completion; there are prompt, answer: use --completion-column"),
        (["text", "response"], "no column is known to hold the prompt; there are text, response: use --prompt-column"),
    ],
)
def test_what_nobody_can_tell_is_an_error_that_names_the_flag(columns, message):
    with pytest.raises(CommandError, match=message):
        take(columns)


def test_the_page_names_every_column():
    page = (Path(__file__).parents[2] / "docs/command-line.md").read_text()
    assert [
        name for name in (*PROMPTS, *ANSWERS[: -len(RESPONSES)], ARGUMENTS, RESPONSES[0], INDEX) if f"`{name}`" not in page
    ] == []


def test_flags_choose():
    columns = ["prompt", "question", "completion", "response", "messages", "answer"]
    assert take(columns, "question", "answer") == ("question", "answer")
    assert take(columns, None, "answer") == ("prompt", "answer")
    assert take(columns, None, "messages") == ("messages", "messages")
    assert take(["question", "answer", "response"], None, "answer") == ("question", "answer")
    assert take(["question", "answer", "response"], "answer") == ("answer", "response")
    with pytest.raises(CommandError, match="no row has a column 'x'; there are prompt, question"):
        take(columns, "x")


def test_several_files_each_in_its_shape_are_one_input():
    written("runs/b.jsonl", [SHAPES["sharegpt"][0]])
    written("runs/deep/a.jsonl", [OPENR1])
    written("runs/c.json", [json.dumps([SHAPES["alpaca"][0]])])
    written("runs/results.json", [json.dumps({"results": {"gsm8k": 1}}, indent=2)])
    written("runs/b.jsonl.meta.json", ["{}"])
    written("runs/.hidden/d.jsonl", ["{"])
    written("runs/model.bin", ["x"])
    written("runs/code.py", ["open('executed', 'w')"])
    expected = [*SHAPES["sharegpt"][1], *SHAPES["alpaca"][1], *SHAPES["openr1"][1]]
    assert pairs("runs") == expected
    source = Source([Path("runs")])
    assert list(map(len, (source.files, source.taken["prompt"]))) == [3, 3]
    assert [line.partition(":")[0] for line in source.lines()] == [
        "runs/b.jsonl",
        "runs/c.json",
        "runs/deep/a.jsonl",
        "left out, without rows",
    ]
    assert pairs("runs/*.json*") == expected[:2]
    assert pairs("runs/deep/a.jsonl", "runs/b.jsonl", limit=2) == SHAPES["openr1"][1]
    assert [list(source.read(i)) for i in range(5)] == [list(source.read())[i:] for i in range(5)]
    # What is written is not read.
    assert [file.name for file in Source([Path("runs")], output=Path("runs/b.jsonl")).files] == [
        Path("runs/c.json"),
        Path("runs/deep/a.jsonl"),
    ]
    with pytest.raises(CommandError, match=r"no file matches none\*"):
        Source([Path("none*")])
    Path("empty").mkdir()
    with pytest.raises(CommandError, match=r"the folder empty has no file \*.jsonl"):
        Source([Path("empty")])
    assert not Path("executed").exists()


def test_damaged_files():
    good = {"prompt": "a", "completion": "b" * 70_000}
    Path("cut.json").write_text(json.dumps([good, good])[:-10])
    rows = list(Source([Path("cut.json")]).read())
    assert [row.malformed is None for row in rows] == [True, False]
    assert "element 2 of the array cannot be parsed, and the rest is left out" in rows[1].malformed
    Path("mixed.json").write_text('[{"prompt": "a", "completion": "b"}, 12, {"prompt": "c", "completion": "d"}]')
    assert [row.malformed for row in Source([Path("mixed.json")]).read()] == [
        None,
        "element 2 of the array holds a int; it must be an object with a field for each column",
        None,
    ]
    Path("t.csv").write_bytes(b'\xef\xbb\xbfprompt,completion\n"a\nb",c\nx\ny,\xff\n\nz,\n')
    assert [(row.columns, row.malformed) for row in Source([Path("t.csv")]).read()] == [
        ({"prompt": "a\nb", "completion": "c"}, None),
        ({}, "line 4 has 1 cells, but the first line names 2 columns"),
        ({}, "line 5 is not UTF-8"),
        ({"prompt": "z"}, None),
    ]
    long = "w" * 200_000
    header = b"problem,answer,my response\na,b,c\n"
    of_pipes = {
        "comma": header,
        "tab": header.replace(b",", b"\t"),
        "quoted": b'\xef\xbb\xbf"problem","answer","my response"\na,b,c',
    }
    for name, content in {**of_pipes, "packed": gzip.compress(header)}.items():
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        (row,) = Source([Path(f"/dev/fd/{reading}")], completion="my response").read()
        os.close(reading)
        assert row.columns == {"problem": "a", "answer": "b", "my response": "c"}, name
        assert (row.prompt, row.completion) == ("a", "c")
    for content in ("", "prompt", '"prompt": "x", "completion": "y"', "3, 4", "[1], {}", '{"prompt": "x"}, 7', "a,,b"):
        Path("lines").write_text(content)
        assert format_of(Path("lines"), Path("-")).kind == "lines"
    Path("long.csv").write_text(f"prompt,completion\na,{long}\n")
    assert pairs("long.csv") == [("a", long)]
    packed = gzip.compress(json.dumps(good).encode() * 20)
    Path("cut.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(CommandError, match=r"cannot read cut.jsonl.gz to its end: .* the file is damaged"):
        Source([Path("cut.jsonl.gz")])
    Path("none.jsonl.gz").write_bytes(packed[:4])
    with pytest.raises(CommandError, match=r"cannot read none.jsonl.gz: it starts as gzip, but"):
        Source([Path("none.jsonl.gz")])


def test_a_file_that_becomes_shorter_is_found():
    path = written("t.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    source = Source([path])
    written("t.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(CommandError, match=r"t\.jsonl has become shorter; it had 3 rows when the run began"):
        list(source.read())
