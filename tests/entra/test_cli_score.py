"""`entra score`: resumed output equals uninterrupted output, bad rows stop nothing, columns and values stay as they were."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import entra
import entra.cli.fingerprint as fingerprints
from entra.cli import main
from entra.cli.fingerprint import fingerprint
from entra.cli.output import Output
from entra.policy import load_policy

CONTEXT = 128
ROWS = 22
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}<assistant>"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a random llama with 128 tokens of context, whose tokenizer has a chat template and more ids than the model."""
    text = "first we add 3 and 4, which gives 7; then we check: 3 plus 4 is 7. so the answer is 7."
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([text], trainer)
    vocabulary = bpe.get_vocab_size()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<unknown to the model>"])
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    build("llama", vocab_size=vocabulary, max_position_embeddings=CONTEXT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """22 good rows of different lengths, text and chat mixed, with columns that a table could not hold."""
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(ROWS):
            prompt = f"add {i} and 4" if i % 3 else [{"role": "user", "content": f"add {i} and 4"}]
            text = f"first we add {i} and 4. " + "then we check; " * (i % 5)
            completion = text if i % 2 else [{"role": "assistant", "content": text}]
            row = {
                "id": i,
                "prompt": prompt,
                "completion": completion,
                "mixed": [i, "\u2028 \ud800", None, 1.5][i % 4],
                "é": {"a": [i]},
            }
            file.write(json.dumps(row, ensure_ascii=bool(i % 2)) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(traces, model, tmp_path_factory):
    """The bytes of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "scores.jsonl"
    assert score(traces, model, output) == 0
    return output.read_bytes()


@pytest.fixture(autouse=True)
def _threads():
    """A resumed run takes over the threads of the run before."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def score(traces, model, output, *options):
    return main(command(traces, model, output, *options))


def command(traces, model, output, *options):
    return ["score", str(traces), "--model", str(model), "--output", str(output), "--batch-size", "5", *options]


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


# Runs the command line in a process that kills itself with SIGKILL: `score_batch` on its nth call, or `append` on its
# nth, after it has written some of the bytes.
KILLED = """
import os, signal, sys
import entra.cli.scoring as scoring
from entra.cli import main
from entra.cli.output import Output
from entra.cli.output import json_line

where, call, share = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
owner, name = {"score": (scoring, "score_batch"), "append": (Output, "append")}[where]
original = getattr(owner, name)
calls = 0

def deadly(*args, **kwargs):
    global calls
    calls += 1
    if calls < call:
        return original(*args, **kwargs)
    if where == "append":
        output, rows = args
        data = b"".join(map(json_line, rows))
        output._file.write(data[: int(len(data) * share)])
        output._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, deadly)
main(sys.argv[4:])
"""


@pytest.mark.parametrize(
    ("where", "call", "share", "whole_lines"),
    [
        pytest.param("score", 3, 0.0, 10, id="between-batches"),
        pytest.param("append", 2, 0.55, 7, id="in-a-line-within-a-batch"),
        pytest.param("append", 5, 0.3, 20, id="in-the-first-line-of-the-last-batch"),
    ],
)
def test_killed_and_resumed_is_byte_identical(where, call, share, whole_lines, traces, model, whole, tmp_path):
    output = tmp_path / "scores.jsonl"
    arguments = [where, str(call), str(share), *command(traces, model, output)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    part = output.read_bytes()
    assert whole.startswith(part)
    assert part.count(b"\n") == whole_lines
    assert part.endswith(b"\n") == (where == "score")
    assert score(traces, model, output) == 0
    assert output.read_bytes() == whole


def test_every_cut_is_resumed(traces, model, whole, tmp_path):
    """Whatever number of bytes is there, also none, also all: the same file comes out."""
    output = tmp_path / "scores.jsonl"
    assert score(traces, model, output) == 0
    assert output.read_bytes() == whole
    for size in [0, 1, *range(len(whole) // 7, len(whole), len(whole) // 7), len(whole) - 1, len(whole)]:
        output.write_bytes(whole[:size])
        assert score(traces, model, output) == 0
        assert output.read_bytes() == whole, f"cut at byte {size}"


def test_equals_score_batch_and_carries_columns_through(traces, model, whole):
    given = rows_of(traces)
    policy = load_policy(str(model))
    scores = entra.score_batch(
        [row["prompt"] for row in given], [row["completion"] for row in given], model=str(model), details=True
    )
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == ROWS
    for i, (row, before) in enumerate(zip(rows, given, strict=True)):
        assert list(row) == [*before, "reward", "tokens", "mean_logprob", "mean_incoming", "protected_tokens"]
        assert {name: row[name] for name in before} == before
        assert row["tokens"] == len(scores.token_ids[i])
        assert row["protected_tokens"] == int(scores.protected[i].sum())
        # Another split into batches: some float32 rounding of sums over 48 weights and 2 layers.
        assert math.isclose(row["mean_logprob"], float(scores.logprobs[i].mean()), rel_tol=1e-5)
        assert math.isclose(row["mean_incoming"], float(scores.incoming[i].mean()), rel_tol=1e-5)
        assert math.isclose(row["reward"], scores.rewards[i], rel_tol=1e-5)
    assert policy.tokenizer.chat_template == TEMPLATE


def test_parquet_gives_the_same_scores(model, tmp_path, capsys):
    import datasets

    rows = [
        # Keys in alphabetical order: datasets 4 writes them so.
        {"prompt": [{"content": f"add {i}", "role": "user"}], "completion": f"then we check {i}; " * (1 + i % 3), "n": i / 8}
        for i in range(7)
    ]
    lines = write_rows(tmp_path / "traces.jsonl", rows)
    table = tmp_path / "traces[1].parquet"
    datasets.Dataset.from_list(rows).to_parquet(table)
    assert score(lines, model, tmp_path / "a.jsonl") == 0
    assert score(table, model, tmp_path / "b.jsonl") == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    cut = (tmp_path / "b.jsonl").read_bytes().splitlines(keepends=True)[:6]
    (tmp_path / "b.jsonl").write_bytes(b"".join(cut))
    assert score(table, model, tmp_path / "b.jsonl") == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert "7 rows, 6 of them from earlier runs" in capsys.readouterr().err


GOOD = {"prompt": "add 3 and 4", "completion": "3 plus 4 is 7, so the answer is 7."}
BAD_ROWS = {
    "no-completion": ({"prompt": "add"}, "missing field"),
    "null-prompt": ({"prompt": None, "completion": "x"}, "missing field"),
    "empty-completion": ({**GOOD, "completion": ""}, "empty completion"),
    "only-eos": ({**GOOD, "completion": "</s></s>"}, "empty completion"),
    "no-messages": ({**GOOD, "completion": []}, "empty completion"),
    "number": ({**GOOD, "completion": 7}, "not text"),
    "message-without-role": ({**GOOD, "prompt": [{"content": "x"}]}, "not text"),
    "content-not-text": ({**GOOD, "completion": [{"role": "assistant", "content": None}]}, "not text"),
    "user-as-completion": ({**GOOD, "completion": [{"role": "user", "content": "x"}]}, "cannot be tokenised"),
    "template-refuses": ({**GOOD, "prompt": [{"role": "tool", "content": "x"}]}, "cannot be tokenised"),
    "too-long": ({**GOOD, "completion": "check " * CONTEXT}, "longer than the context"),
    "id-outside": ({**GOOD, "prompt": "<unknown to the model>"}, "outside the vocabulary"),
    "half-a-surrogate-pair": ('{"prompt": "x", "completion": "\\ud800"}', None),
    "cut-off": ('{"prompt": "x", "comple', "malformed"),
    "list": ('["x", "y"]', "malformed"),
    "not-utf8": (None, "malformed"),
}


def test_bad_rows_become_errors_and_stop_nothing(model, tmp_path, capsys):
    """One bad row of each kind, each between good ones; the good ones score as without them."""
    traces = tmp_path / "traces.jsonl"
    with traces.open("wb") as file:
        for row, _ in BAD_ROWS.values():
            line = b'{"prompt": "\xff"}' if row is None else (row if isinstance(row, str) else json.dumps(row)).encode()
            file.write(json.dumps(GOOD).encode() + b"\n" + line + b"\n\n")  # and an empty line, which is no row
    output = tmp_path / "scores.jsonl"
    assert score(traces, model, output) == 0
    rows = rows_of(output)
    assert len(rows) == 2 * len(BAD_ROWS)
    for good in rows[::2]:
        assert "error" not in good
        assert good["tokens"] == rows[0]["tokens"]
        assert math.isclose(good["reward"], rows[0]["reward"], rel_tol=1e-6)
    counts = {}
    for (name, (given, kind)), row in zip(BAD_ROWS.items(), rows[1::2], strict=True):
        if kind is None:
            kind = row["error"].partition(":")[0]
            assert kind in ("not text", "cannot be tokenised")
        assert row["error"].startswith(kind + ": "), name
        assert "reward" not in row, name
        if isinstance(given, dict):
            assert {column: row[column] for column in given} == given, name
        counts[kind] = counts.get(kind, 0) + 1
    assert "line 41" in next(row["error"] for row in rows if row.get("error", "").startswith("malformed"))
    message = capsys.readouterr().err
    assert f"errors       {len(BAD_ROWS)} (" in message
    for kind, count in counts.items():
        assert f"{count} {kind}" in message
    # Alone in its batch, a row has the same error.
    alone = tmp_path / "alone.jsonl"
    assert score(traces, model, alone, "--batch-size", "1") == 0
    assert [row.get("error") for row in rows_of(alone)] == [row.get("error") for row in rows]


def test_chat_without_template_is_an_error_of_the_row(model, tmp_path, monkeypatch):
    monkeypatch.setattr(load_policy(str(model)).tokenizer, "chat_template", None)
    traces = write_rows(tmp_path / "t.jsonl", [GOOD, {**GOOD, "prompt": [{"role": "user", "content": "x"}]}])
    assert score(traces, model, tmp_path / "s.jsonl") == 0
    good, bad = rows_of(tmp_path / "s.jsonl")
    assert "reward" in good
    assert bad["error"].startswith("cannot be tokenised: ")
    assert "no chat template" in bad["error"]


def test_score_that_is_not_finite_is_an_error_of_the_row(model, tmp_path):
    """A NaN in one token's embedding reaches only the rows that hold the token."""
    policy = load_policy(str(model))
    (poisoned,) = policy.tokenizer("Z", add_special_tokens=False)["input_ids"]
    weight = policy.model.get_input_embeddings().weight
    before = weight[poisoned].clone()
    traces = write_rows(tmp_path / "t.jsonl", [GOOD, {**GOOD, "completion": "Z7"}, GOOD])
    with torch.no_grad():
        try:
            weight[poisoned] = math.nan
            assert score(traces, model, tmp_path / "s.jsonl") == 0
        finally:
            weight[poisoned] = before
    first, bad, last = rows_of(tmp_path / "s.jsonl")
    assert bad["error"].startswith("not finite: ")
    assert math.isfinite(first["reward"])
    assert first == last


def test_details_and_prefix(model, tmp_path):
    traces = write_rows(tmp_path / "t.jsonl", [{"question": "add 3", "answer": GOOD["completion"], "reward": 5}, {}])
    names = ("--prompt-column", "question", "--completion-column", "answer")
    assert score(traces, model, tmp_path / "s.jsonl", *names, "--prefix", "") == 2, "reward would be overwritten"
    assert not (tmp_path / "s.jsonl").exists()
    assert score(traces, model, tmp_path / "s.jsonl", *names, "--prefix", "entra_", "--details") == 0
    row, empty = rows_of(tmp_path / "s.jsonl")
    assert row["reward"] == 5
    assert list(empty) == ["entra_error"]
    scores = entra.score_batch(["add 3"], [GOOD["completion"]], model=str(model), details=True)
    for name in ("token_ids", "logprobs", "incoming", "importance", "protected"):
        assert row["entra_" + name] == getattr(scores, name)[0].tolist()


def test_columns_of_the_input_keep_their_names_without_a_flag(model, tmp_path, capsys):
    """A file with a column `tokens` was refused."""
    traces, output = write_rows(tmp_path / "t.jsonl", [{**GOOD, "tokens": 227}]), tmp_path / "s.jsonl"
    assert score(traces, model, output) == 0
    assert "the input has tokens, so the names of all added columns begin with entra_" in capsys.readouterr().err
    (row,) = rows_of(output)
    assert row["tokens"] == 227
    assert list(row)[3:] == [
        f"entra_{name}" for name in ("reward", "tokens", "mean_logprob", "mean_incoming", "protected_tokens")
    ]
    assert score(traces, model, output) == 0
    assert "1 of them from earlier runs" in capsys.readouterr().err
    assert score(traces, model, output, "--prefix", "x_") == 2
    assert "prefix='entra_', now it is 'x_'" in capsys.readouterr().err
    assert score(output, model, tmp_path / "again.jsonl") == 2
    told = "the input has columns that would be added: entra_reward, entra_tokens, "
    assert told in (err := capsys.readouterr().err)
    assert "; choose another --prefix" in err


def test_options_reach_the_config(model, tmp_path):
    traces = write_rows(tmp_path / "t.jsonl", [GOOD])
    chosen = {
        "protect_fraction": 0.5,
        "attention_statistic": "lift",
        "length_adjusted": 5,
        "copy_ngram": 2,
        "reward_ngram": 3,
        "logprob_weight": -1,
    }
    options = (word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value)))
    assert score(traces, model, tmp_path / "s.jsonl", *options) == 0
    config = entra.ScoreConfig(**chosen)
    scores = entra.score_batch([GOOD["prompt"]], [GOOD["completion"]], model=str(model), config=config, details=True)
    (row,) = rows_of(tmp_path / "s.jsonl")
    assert row["reward"] == scores.rewards[0]
    assert row["protected_tokens"] == int(scores.protected[0].sum())
    assert json.loads((tmp_path / "s.jsonl.meta.json").read_text())["config"].items() >= chosen.items()


def test_output_of_something_else_is_refused(model, tmp_path, capsys):
    traces = write_rows(tmp_path / "t.jsonl", [GOOD] * 3)
    output = tmp_path / "s.jsonl"
    assert score(traces, model, output) == 0
    before = output.read_bytes()
    other = write_rows(tmp_path / "other.jsonl", [GOOD, {**GOOD, "prompt": "add"}, GOOD])
    capsys.readouterr()
    assert score(traces, model, output, "--attention-weight", "1e-4") == 2
    assert "config.attention_weight=2.0, now it is 0.0001" in capsys.readouterr().err
    assert score(traces, model, output, "--reward-ngram", "4") == 2
    assert "config.reward_ngram=1, now it is 4" in capsys.readouterr().err
    assert score(other, model, output) == 2
    assert "input.sha256" in capsys.readouterr().err
    assert score(traces, model, output, "--details") == 2
    assert "details=False, now it is True" in capsys.readouterr().err
    (tmp_path / "s.jsonl.meta.json").rename(tmp_path / "kept.json")
    assert score(traces, model, output) == 2
    assert "s.jsonl.meta.json" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert score(traces, "no/such-model", output, "--overwrite") == 2
    assert output.read_bytes() == before, "--overwrite must wait until the model is there"
    (tmp_path / "kept.json").rename(tmp_path / "s.jsonl.meta.json")
    assert score(other, model, output, "--overwrite") == 0
    assert [row["prompt"] for row in rows_of(output)] == ["add 3 and 4", "add", "add 3 and 4"]


def _changed_config(name, value):
    def change(folder):
        file = folder / ("generation_config.json" if name == "eos_token_id" else "config.json")
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, name: value}))

    return change


def _changed_normaliser(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "normalizer": {"type": "Lowercase"}}))


def _changed_weight(folder):
    """Every value of one weight but 64, evenly spread, which is what was looked at; size, name and time of the file stay."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    status = file.stat()
    weights = load_file(file)
    values = weights["model.layers.0.mlp.down_proj.weight"].reshape(-1)
    kept = values[:: max(1, values.numel() // 64)].clone()
    values += 1
    values[:: max(1, values.numel() // 64)] = kept
    save_file(weights, file, metadata={"format": "pt"})
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param(_changed_config("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}), "config.json", id="rope"),
        pytest.param(_changed_config("rms_norm_eps", 0.5), "config.json", id="eps"),
        pytest.param(_changed_config("hidden_act", "gelu"), "config.json", id="activation"),
        pytest.param(_changed_config("eos_token_id", [2, 7]), "generation_config.json", id="eos"),
        pytest.param(_changed_normaliser, "tokenizer.json", id="normaliser"),
        pytest.param(_changed_weight, "model.safetensors", id="one-weight"),
        pytest.param(lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja", id="file-gone"),
    ],
)
def test_resume_does_not_mix_models(change, name, model, tmp_path, capsys):
    """The vocabulary and 64 values of each weight were all that was compared."""
    folder, output = tmp_path / "model", tmp_path / "s.jsonl"
    traces = write_rows(tmp_path / "t.jsonl", [GOOD, GOOD])
    shutil.copytree(model, folder)
    assert score(traces, folder, output) == 0
    output.write_bytes(part := output.read_bytes()[:50])
    change(folder)
    load_policy.cache_clear()
    capsys.readouterr()
    assert score(traces, folder, output) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{output} exists and was made with model_files.{name}=" in told
    assert "use another --output, or --overwrite to start again" in told
    assert output.read_bytes() == part
    load_policy.cache_clear()


def test_hashes_of_hub_files_are_the_blobs_names_and_large_local_ones_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "_LARGE", 10)
    monkeypatch.setattr(fingerprints, "_SETTLED", -1.0)
    blobs, folder = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/c"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    (blobs / ("a" * 64)).write_text("weights, which are not read")
    (folder / "model.safetensors").symlink_to(blobs / ("a" * 64))
    (folder / "config.json").write_text('{"a": "more than 10 bytes"}')
    (folder / "README.md").write_text("no part of it")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    hashed = []
    original = fingerprints._hash
    monkeypatch.setattr(fingerprints, "_hash", lambda path, bar: (hashed.append(path.name), original(path, bar))[1])
    found = fingerprint(str(folder))
    assert found["model.safetensors"] == "a" * 64
    assert found["config.json"] == hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert set(found) == {"model.safetensors", "config.json", "adapter_config.json", f"{tmp_path / 'base'}: config.json"}
    assert sorted(hashed) == ["adapter_config.json", "config.json", "config.json"]
    hashed.clear()
    assert fingerprint(str(folder)) == found
    assert hashed == ["config.json"], "the small one of the base"
    (tmp_path / "cache/entra/hashes.json").write_text("[" * 10**5)
    assert fingerprint(str(folder)) == found
    before = (folder / "config.json").stat()
    (folder / "config.json").write_text('{"b": "more than 10 bytes"}')
    os.utime(folder / "config.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(str(folder))["config.json"] != found["config.json"], "same size and time of writing"


def test_weights_in_a_subfolder_and_code_of_another_repository_are_part_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, code = tmp_path / "model", tmp_path / "code"
    (folder / "parts").mkdir(parents=True)
    code.mkdir()
    classes = {"AutoModelForCausalLM": f"{code}--modeling.Mine", "AutoConfig": "configuration.Mine", "AutoTokenizer": [None]}
    (folder / "config.json").write_text(json.dumps({"auto_map": classes}))
    index = {"weight_map": {"a": "parts/one.safetensors", "b": "parts/one.safetensors", "c": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = (folder / "model.safetensors", folder / "parts/one.safetensors")
    for path in (*weights, code / "modeling.py", code / "helper.py", code / "other.safetensors"):
        path.write_text("before")
    found = fingerprint(str(folder))
    assert set(found) == {
        *("config.json", "model.safetensors", "model.safetensors.index.json", "parts/one.safetensors"),
        *(f"{code}: helper.py", f"{code}: modeling.py"),
    }
    for path in (weights[1], code / "helper.py"):
        path.write_text("after")
    after = fingerprint(str(folder))
    assert {name for name in found if found[name] != after[name]} == {"parts/one.safetensors", f"{code}: helper.py"}


def test_output_of_an_earlier_version_is_refused(model, traces, whole, tmp_path, capsys):
    output, sidecar = tmp_path / "s.jsonl", tmp_path / "s.jsonl.meta.json"
    assert score(traces, model, output) == 0
    record = json.loads(sidecar.read_text())
    for name in ("format", "written_by", "model_files"):
        del record[name]
    sidecar.write_text(json.dumps({**record, "weights": "0" * 64}))
    assert score(traces, model, output) == 2
    told = capsys.readouterr().err
    assert "written by another version of entra" in told
    assert "--overwrite to start again" in told
    assert score(traces, model, output, "--overwrite") == 0
    assert output.read_bytes() == whole


def test_row_of_the_output_that_is_not_the_inputs_is_found(model, traces, whole, tmp_path, capsys):
    output, lines = tmp_path / "s.jsonl", whole.splitlines(keepends=True)
    assert score(traces, model, output) == 0
    damages = {
        "exchanged": (1, [lines[1], lines[0], *lines[2:]]),
        "duplicated": (4, [*lines[:3], lines[2], *lines[3:]]),
        "missing": (4, [*lines[:3], *lines[4:]]),
        "one too many": (ROWS + 1, [*lines, lines[-1]]),
        "foreign": (2, [lines[0], lines[1].replace(b'"id": 1', b'"id": 7'), *lines[2:]]),
        "foreign and unfinished": (6, [*lines[:5], b'{"id": 5, "prompt": "of another file']),
    }
    for damage, (number, changed) in damages.items():
        output.write_bytes(b"".join(changed))
        capsys.readouterr()
        assert score(traces, model, output) == 2, damage
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.startswith(f"entra score: line {number} of {output} is not "), damage
        assert "--overwrite to start again" in told
        assert output.read_bytes() == b"".join(changed), damage


def test_absurd_sidecar_is_an_error(model, tmp_path, capsys):
    """Threads of 0 or null, and half of the others, ended in a traceback."""
    traces, output = write_rows(tmp_path / "t.jsonl", [GOOD]), tmp_path / "s.jsonl"
    assert score(traces, model, output) == 0
    before = json.loads((sidecar := tmp_path / "s.jsonl.meta.json").read_text())
    digits = "1" + "0" * 400
    threads = ["0", "null", '"2"', "true", "1.5", "-1", digits, "[]", '{"a": 1}']
    identity = [
        ("input", "3"),
        ("config", "null"),
        ("versions", f'{{"entra": {digits}}}'),
        ("model_files", "[]"),
        ("device", "[1]"),
    ]
    for name, value in [*(("threads", value) for value in threads), *identity]:
        rest = {key: kept for key, kept in before.items() if key != name}
        sidecar.write_text(json.dumps(rest)[:-1] + f', "{name}": {value}}}')
        assert score(traces, model, output) == 2, (name, value)
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert len(told) < 1000
        assert name != "threads" or "which must be a whole number from 1 to 4,096; use another --output" in told
    others = ["", "[]", "7", "{}", "[" * 10**5, '{"a":' * 500 + "1" + "}" * 500, '{"versions": {"entra": 1}, "input": []}']
    for content in [*others, "9" * 5000, "\xff"]:
        sidecar.write_bytes(content.encode("latin-1"))
        for options in ([], ["--overwrite"]):
            assert score(traces, model, output, *options) == 2, content[:50]
            assert "s.jsonl.meta.json beside it" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("output", "taken", "message"),
    [
        pytest.param(
            "x", "x.meta.json", "needs x.meta.json beside it, but there is one that entra score did not write", id="sidecar"
        ),
        pytest.param("x", "x", "x exists, but x.meta.json beside it", id="output"),
        pytest.param("t.jsonl", "y", "--output t.jsonl is the input", id="input"),
        pytest.param("t", "t.meta.json", "needs t.meta.json beside it, which is the input", id="sidecar-is-the-input"),
        pytest.param("link", "y", "--output link is the input", id="link-to-the-input"),
        pytest.param("z", "z", "z exists, and entra score did not write it", id="output-beside-a-sidecar-of-ours"),
    ],
)
def test_file_of_somebody_else_is_never_replaced(output, taken, message, model, tmp_path, capsys, monkeypatch):
    """--output x wrote x.meta.json over what was there, also over the input."""
    monkeypatch.chdir(tmp_path)
    source = write_rows(Path("t.jsonl"), [GOOD])
    assert score(source, model, "ours") == 0
    Path("link").symlink_to("t.jsonl")
    if message.endswith("is the input") and "meta" in message:
        source = write_rows(Path(taken), [GOOD])
    else:
        Path(taken).write_text('{"mine": 1}\n')
    if output == "z":
        shutil.copy("ours.meta.json", "z.meta.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for options in ([], ["--overwrite"]):
        capsys.readouterr()
        assert score(source, model, output, *options) == 2
        assert message in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unfinished_file_of_somebody_else_is_not_touched(model, tmp_path):
    traces = write_rows(tmp_path / "t.jsonl", [GOOD])
    (tmp_path / "s.jsonl.meta.json.tmp").write_text("mine")
    (tmp_path / f"s.jsonl.meta.json.{os.getpid()}-0.tmp").write_text("mine, too")
    assert score(traces, model, tmp_path / "s.jsonl") == 0
    assert (tmp_path / "s.jsonl.meta.json.tmp").read_text() == "mine"
    assert (tmp_path / f"s.jsonl.meta.json.{os.getpid()}-0.tmp").read_text() == "mine, too"


def piped(path):
    """A file of /dev/fd out of which comes what the file holds, once."""
    reading, writing = os.pipe()
    os.write(writing, path.read_bytes())
    os.close(writing)
    return reading


def test_pipe_is_read_once_and_leaves_no_record(traces, whole, model, tmp_path, capfd):
    """Its first reading took all there was; the second found no rows, and that was the result."""
    output, pipe = tmp_path / "s.jsonl", piped(traces)
    assert score(f"/dev/fd/{pipe}", model, output) == 0
    os.close(pipe)
    assert output.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]
    record = json.loads(next(line for line in capfd.readouterr().err.splitlines() if line.startswith("{")))
    assert record["input"]["rows"] == ROWS
    assert record["config"]["protect_fraction"] == 0.2
    for options in ([], ["--overwrite"]):
        pipe = piped(traces)
        assert score(f"/dev/fd/{pipe}", model, output, *options) == 2
        os.close(pipe)
        assert "s.jsonl exists, and a run that reads a pipe" in capfd.readouterr().err
    assert output.read_bytes() == whole


def test_stdin_and_stdout(traces, whole, model, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, "-m", "entra", *command("-", model, "-")]
    with traces.open("rb") as file:
        done = subprocess.run(words, stdin=file, capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == whole
    assert b'"input": {"rows": 22' in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_output_that_another_process_writes_is_refused(model, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    traces = write_rows(tmp_path / "t.jsonl", [GOOD])
    with (tmp_path / "s.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert score(traces, model, tmp_path / "s.jsonl") == 2
    assert "another entra score" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"traces": "missing.jsonl"}, "cannot read missing.jsonl: No such file", id="no-input"),
        pytest.param({"traces": "text.parquet"}, "is not a Parquet file", id="not-parquet"),
        pytest.param({"model": "no/such-model"}, "cannot load --model no/such-model", id="no-model"),
        pytest.param({"output": "no/such/s.jsonl", "model": "none"}, "there is no folder no/such; make it", id="no-folder"),
        pytest.param({"output": "x" * 300}, "x: File name too long; choose another --output", id="long-name"),
        pytest.param({"output": "traces.jsonl"}, "is the input", id="output-is-input"),
        pytest.param({"--prompt-column": "question"}, "no row has a column 'question'; there are prompt", id="no-column"),
        pytest.param({"--batch-size": "0"}, "--batch-size 0 must be at least 1", id="batch-size"),
        pytest.param({"--protect-fraction": "1.5"}, "protect_fraction=1.5 must be in [0, 1]", id="config"),
        pytest.param({"traces": "utf16.jsonl"}, "utf16.jsonl is not JSON Lines but starts as a binary file", id="utf-16"),
        pytest.param({"traces": "table.jsonl"}, "table.jsonl is not a Parquet file", id="parquet"),
        pytest.param({"output": "/dev/full"}, "cannot write --output /dev/full: it is no ordinary file", id="device"),
        pytest.param({"output": "taken"}, "cannot write taken.meta.json: Is a directory", id="folder-as-sidecar"),
        pytest.param({"--limit": "0"}, "--limit 0 must be at least 1 row", id="limit"),
        pytest.param({"--device": "moon"}, "--device moon cannot be used: ", id="device-of-no-kind"),
        pytest.param({"model": "damaged"}, "cannot load --model damaged: ", id="damaged-weights"),
    ],
)
def test_bad_usage_is_one_line(options, message, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("traces.jsonl"), [GOOD])
    write_rows(Path("text.parquet"), [GOOD])
    Path("utf16.jsonl").write_text(json.dumps(GOOD), encoding="utf-16")
    Path("table.jsonl").write_bytes(b"PAR1" + bytes(20))
    Path("taken.meta.json").mkdir()
    shutil.copytree(model, "damaged")
    Path("damaged/model.safetensors").write_bytes(b"not safetensors")
    positional = {"traces": "traces.jsonl", "model": model, "output": "s.jsonl"}
    positional.update({name: value for name, value in options.items() if name in positional})
    flags = [word for name, value in options.items() if name not in positional for word in (name, value)]
    assert score(*positional.values(), *flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    (line,) = (line for line in captured.err.splitlines() if line.startswith("entra score: "))
    assert message in line
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert json.loads(Path("traces.jsonl").read_text()) == GOOD


def test_progress_and_summary_go_to_stderr(traces, model, tmp_path, capfd):
    assert score(traces, model, tmp_path / "s.jsonl") == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert f"{ROWS}/{ROWS} rows" in captured.err
    assert "rows/s" in captured.err
    rows = rows_of(tmp_path / "s.jsonl")
    assert f"mean reward  {sum(row['reward'] for row in rows) / ROWS:.4f}" in captured.err
    assert f"tokens       {sum(row['tokens'] for row in rows):,}" in captured.err


def test_interrupted_says_how_to_go_on(traces, model, whole, tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return entra.score_batch(*args, **kwargs)

    output = tmp_path / "s.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("entra.cli.scoring.score_batch", interrupted)
        assert score(traces, model, output) == 130
    assert capsys.readouterr().err.strip().endswith(f"interrupted after 10 of {ROWS} rows; the same command goes on from there")
    assert output.read_bytes() == b"".join(whole.splitlines(keepends=True)[:10])
    assert score(traces, model, output) == 0
    assert output.read_bytes() == whole


def test_no_rows(model, tmp_path):
    traces = write_rows(tmp_path / "t.jsonl", [])
    assert score(traces, model, tmp_path / "s.jsonl") == 0
    assert (tmp_path / "s.jsonl").read_bytes() == b""


def test_help_names_every_field_of_the_config(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["score", "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in entra.ScoreConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert "the share of the completion's tokens" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--protect-fractoin", "0.3"], "--protect-fractoin; did you mean --protect-fraction?", id="misspelt"),
        pytest.param(["--protect-fractoin=0.3"], "--protect-fractoin; did you mean --protect-fraction?", id="with-equals-sign"),
        pytest.param(["--protect", "0.3"], "unknown argument --protect; ", id="prefix"),
        pytest.param(["--xyz"], "unknown argument --xyz; see --help", id="nothing-near"),
    ],
)
def test_unknown_arguments_name_the_nearest_option(words, message, model, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        score(tmp_path / "t.jsonl", model, tmp_path / "s.jsonl", *words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "Couldn't read it from one of:\n(1) this,\n(2) that."], ids=["empty", "lines"])
def test_all_of_a_loading_error_is_told_on_one_line(text, tmp_path, capsys, monkeypatch):
    def refuse(name):
        raise LookupError(text)

    monkeypatch.setattr("entra.cli.scoring.load_policy", refuse)
    assert score(write_rows(tmp_path / "t.jsonl", [GOOD]), "m", tmp_path / "s.jsonl") == 2
    told = " ".join(text.split())[:-1] or "LookupError"
    assert capsys.readouterr().err.splitlines()[1].startswith(f"entra score: cannot load --model m: {told}; give a folder")


def test_rows_that_are_all_malformed_become_errors_and_exit_with_2(model, tmp_path, capsys):
    traces = write_rows(tmp_path / "t.jsonl", ['["x", "y"]', '{"prompt": "x", "comple', '["half'])
    for _ in range(2):
        assert score(traces, model, tmp_path / "s.jsonl") == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("entra score: no row could be scored; the first is row 1: malformed: line 1 holds a list")
    assert [row["error"].partition(":")[0] for row in rows_of(tmp_path / "s.jsonl")] == ["malformed"] * 3


def test_damaged_parquet_page_is_one_line(model, tmp_path, capsys):
    """The pages are wrong, the footer that the survey reads is right."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    table = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 50), table)
    data = bytearray(table.read_bytes())
    data[4:60] = b"\xff" * 56
    table.write_bytes(data)
    assert score(table, model, tmp_path / "s.jsonl") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"entra score: cannot read {table} to its end: ")
    assert "write it again" in message


@contextmanager
def full_disk(size):
    """A limit on the size of files stands in for the disk: the write fails in the middle of a row."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_keeps_what_is_there(traces, model, whole, tmp_path, capsys):
    output = tmp_path / "s.jsonl"
    with full_disk(len(whole) // 2):
        assert score(traces, model, output) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    remedy = "the rows before are there; make room, and the same command goes on"
    assert message == f"entra score: cannot write {output}: File too large; {remedy}"
    assert whole.startswith(output.read_bytes())
    assert score(traces, model, output) == 0
    assert output.read_bytes() == whole


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
def test_full_disk_leaves_the_old_file_of_an_overwriting_run(link, traces, model, whole, tmp_path, capsys):
    """Its rows were emptied before the first new one was scored."""
    output = tmp_path / "s.jsonl"
    if link:
        (tmp_path / "elsewhere").mkdir()
        output.symlink_to("elsewhere/s")
    part = tmp_path / ("elsewhere/s.part" if link else "s.jsonl.part")
    half = ["--protect-fraction", "0.5"]
    assert score(traces, model, output, *half) == 0
    old, record = output.read_bytes(), (tmp_path / "s.jsonl.meta.json").read_bytes()
    with full_disk(len(whole) // 2):
        assert score(traces, model, output, "--overwrite") == 1
    remedy = "the rows before are there; make room, and the same command without --overwrite goes on"
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(remedy)
    assert (output.read_bytes(), (tmp_path / "s.jsonl.meta.json").read_bytes()) == (old, record)
    assert part.read_bytes() == whole[: len(part.read_bytes())] != b""
    assert score(traces, model, output, *half) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{part} exists and was made with config.protect_fraction=0.2, now it is 0.5" in told
    assert f"or remove {part}" in told
    assert score(traces, model, output) == 0
    assert "of them from earlier runs" in capsys.readouterr().err
    assert output.read_bytes() == whole
    assert output.is_symlink() == link
    assert not part.exists()
    assert len(list(tmp_path.iterdir())) == 2 + link
    assert json.loads((tmp_path / "s.jsonl.meta.json").read_text())["config"]["protect_fraction"] == 0.2


@pytest.mark.parametrize("steps", range(3))
def test_killed_at_any_step_of_the_replacement_is_never_mixed(steps, traces, model, whole, tmp_path, monkeypatch):
    """Old rows never stand beside the new record, nor new rows beside the old one."""
    output, half, done = tmp_path / "s.jsonl", ["--protect-fraction", "0.5"], []
    assert score(traces, model, output, *half) == 0

    def stopping(original):
        def step(self, *arguments, **options):
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(self)
            return original(self, *arguments, **options)

        return step

    with monkeypatch.context() as patch:
        original = Output.finish

        def finish(self):
            for name in ("unlink", "replace"):
                patch.setattr(Path, name, stopping(getattr(Path, name)))
            return original(self)

        patch.setattr(Output, "finish", finish)
        assert score(traces, model, output, "--overwrite") == 130
    assert score(traces, model, output, *half) == 2
    monkeypatch.setattr("entra.cli.scoring.score_batch", None)  # all rows are there
    assert score(traces, model, output) == 0
    assert output.read_bytes() == whole
    assert sorted(files_in(tmp_path)) == ["s.jsonl", "s.jsonl.meta.json"]


def test_removing_the_new_rows_gives_the_old_output_back(traces, model, whole, tmp_path):
    output = tmp_path / "s.jsonl"
    assert score(traces, model, output) == 0
    with full_disk(len(whole) // 2):
        assert score(traces, model, output, "--overwrite", "--protect-fraction", "0.5") == 1
    (tmp_path / "s.jsonl.part").unlink()
    assert score(traces, model, output, "--protect-fraction", "0.5") == 2
    assert score(traces, model, output) == 0
    assert output.read_bytes() == whole


@pytest.mark.parametrize("name", ["s.jsonl.part", "s.jsonl.part.meta.json"])
def test_overwriting_leaves_a_part_of_somebody_else(name, traces, model, tmp_path, capsys):
    output = tmp_path / "s.jsonl"
    assert score(traces, model, output) == 0
    (tmp_path / name).write_text('{"mine": 1}\n')
    before = files_in(tmp_path)
    assert score(traces, model, output, "--overwrite") == 2
    assert "entra score did not write" in capsys.readouterr().err
    assert files_in(tmp_path) == before
    assert score(traces, model, output) == 0


SCORES = '"reward": 1, "tokens": 3, "mean_logprob": 0, "mean_incoming": 0, "protected_tokens": 1'


def test_output_line_that_is_no_row_of_scores_is_refused(model, tmp_path, capsys):
    traces, output = write_rows(tmp_path / "t.jsonl", [GOOD, GOOD]), tmp_path / "s.jsonl"
    assert score(traces, model, output) == 0
    first = output.read_bytes().splitlines(keepends=True)[0]
    for line in [
        *["7", "[]", "{}", '{"reward": 1.0}', '{"reward": null, "tokens": 3}', "{"],
        '{"error": [1], ' + SCORES + "}",
        "{" + SCORES.replace("1", "true", 1) + "}",
        "{" + SCORES.replace("3", "1" + "0" * 400) + "}",
        "{" + SCORES.replace("3", "9" * 5000) + "}",
        '{"a": ' + "[" * 10**5 + "}",
    ]:
        output.write_bytes(first + line.encode() + b"\n")
        capsys.readouterr()
        assert score(traces, model, output) == 2
        assert f"line 2 of {output} is not a row of scores: {line.encode()[:39]!r}"[:-1] in capsys.readouterr().err


def test_numbers_that_json_does_not_have_are_carried_as_they_came(model, tmp_path):
    traces = write_rows(tmp_path / "t.jsonl", [{**GOOD, "score": math.nan, "best": [math.inf, -math.inf]}])
    assert score(traces, model, tmp_path / "s.jsonl") == 0
    assert '"score": NaN, "best": [Infinity, -Infinity], "reward": ' in (tmp_path / "s.jsonl").read_text()


def test_device_on_record_is_the_models_own(model, tmp_path, monkeypatch):
    """Also where there is a GPU that the model is not on."""
    load_policy(str(model))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "a GPU")
    device = next(load_policy(str(model)).model.parameters()).device
    assert score(write_rows(tmp_path / "t.jsonl", [GOOD]), model, tmp_path / "s.jsonl") == 0
    recorded = json.loads((tmp_path / "s.jsonl.meta.json").read_text())
    assert recorded["device"] == ("a GPU" if device.type == "cuda" else "cpu")
