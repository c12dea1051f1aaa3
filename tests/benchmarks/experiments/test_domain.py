"""The domain experiment: what is generated, what is counted, and that the page can be drawn again."""

import argparse

import pytest
import tiny_models
import torch
from tiny_tokenizer import build_tokenizer

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
pytest.importorskip("datasets", reason="needs datasets: pip install 'entra-reward[train]'")

from benchmarks.experiments import domain, measuring, results
from benchmarks.experiments.__main__ import main
from entra.policy import Policy

EOS = 2


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_models.build("llama"), build_tokenizer())


def options(**changes):
    parser = argparse.ArgumentParser()
    domain.add_arguments(parser)
    given = {"problems": 4, "max_new_tokens": 24, "max_prompt_tokens": 3000, "batch_size": 5, "positions": 8, **changes}
    return argparse.Namespace(**{**vars(parser.parse_args([])), **given})


def test_completions_do_not_depend_on_pads_and_end_at_the_eos(policy, monkeypatch):
    """Near temperature 0 sampling is greedy, so a batch of different lengths must give what each prompt gives alone."""
    prompts = [[1, 10, 20], [1, 30, 40, 50, 60, 70, 80], [1, 90]]
    greedy = options(temperature=1e-4, batch_size=3)
    together = domain.generated(policy.model, policy.tokenizer, prompts, greedy)
    alone = [domain.generated(policy.model, policy.tokenizer, [prompt], greedy)[0] for prompt in prompts]
    assert together == alone
    end = together[0][5]
    monkeypatch.setattr(policy.tokenizer, "_eos_token", policy.tokenizer.convert_ids_to_tokens(end), raising=False)
    monkeypatch.setattr(type(policy.tokenizer), "eos_token_id", end, raising=False)
    cut = domain.generated(policy.model, policy.tokenizer, prompts[:1], greedy)[0]
    assert cut == together[0][: together[0].index(end) + 1]


def test_the_same_seed_gives_the_same_completions_and_leaves_the_generator_alone(policy):
    before = torch.get_rng_state()
    first, again, other = (
        domain.generated(policy.model, policy.tokenizer, [[1, 10, 20]], options(seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_rows_say_what_was_generated_and_redraw_gives_the_same_page(policy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "load_model", lambda options: policy)
    result = domain.run(options())
    assert [row["domain"] for row in result.rows] == [name for name in domain.DOMAINS for _ in range(4)]
    assert [row["task"] for row in result.rows] == [task for tasks in domain.DOMAINS.values() for task in tasks]
    for row in result.rows:
        groups = ("numbers", "operators", "words", "punctuation")
        assert sum(row[f"tokens_{group}"] for group in groups) == row["tokens"]
        assert sum(row[f"protected_{group}"] for group in groups) == int(0.2 * row["tokens"] + 1e-9)
        assert row["finished"] == (row["tokens"] < 24)
    everything = result.summary["by_domain"][domain.ALL]
    assert everything["completions"] == 16
    assert everything["tokens"].mean == pytest.approx(sum(row["tokens"] for row in result.rows) / 16)
    written = results.write(result, tmp_path / "out", domain.tables(result), domain.figures(result))
    again = ["--redraw", str(tmp_path / "out" / "domain.json"), "--output", str(tmp_path / "again")]
    assert main(["domain", *again]) == 0
    assert (tmp_path / "again" / "domain.md").read_text() == written == capsys.readouterr().out
