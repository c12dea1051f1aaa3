"""OpenRLHF's own client, as its rollouts use it, asks `entra serve`: by address, and through the file of docs/engines.md."""

import asyncio
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from openrlhf.utils.agent import SingleTurnAgentExecutor
from page import blocks
from serving import Client, running
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra
from entra.policy import Policy
from entra.serve.app import create_app

POLICY = Policy(build("qwen3"), build_tokenizer())
PROMPT, RESPONSE = "<user>1 + 3?<assistant>", "it is 4, it is 4"
TOKEN = "a-secret-of-the-tests"


@pytest.fixture(scope="module")
def port():
    with running(create_app(POLICY)) as port:
        yield port


def ids(text):
    return POLICY.tokenizer(text, add_special_tokens=False)["input_ids"]


def expected(response=RESPONSE):
    return entra.score_batch([ids(PROMPT)], [response], model=POLICY.model, tokenizer=POLICY.tokenizer)[0]


class Engine:
    """Generates the same answer, as vLLM's engine gives it."""

    def __init__(self, text):
        self._text = text

    async def generate(self, prompt_ids, params, multi_modal_data=None):
        assert prompt_ids == ids(PROMPT)
        output = SimpleNamespace(token_ids=[*ids(self._text), 2], finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


def rolled_out(executor, label="4", text=RESPONSE):
    params = SimpleNamespace(max_tokens=64, logprobs=None)
    return asyncio.run(executor.execute(PROMPT, label, params, 128, POLICY.tokenizer, Engine(text)))


def test_a_rollout_gets_the_reward_of_score_batch(port):
    output = rolled_out(SingleTurnAgentExecutor(f"http://127.0.0.1:{port}/openrlhf"))
    assert output["reward"] == output["scores"] == pytest.approx([expected()])
    assert output["extra_logs"] == {"entra_error": [0.0]}


def test_several_servers_share_the_rows_of_a_call(port):
    executor = SingleTurnAgentExecutor([f"http://127.0.0.1:{port}/openrlhf"] * 2)
    texts = [f"it is {i}, it is {i}" for i in range(5)]
    found = asyncio.run(executor._fetch_rewards_via_http([PROMPT + text for text in texts], [PROMPT] * 5, ["4"] * 5))
    assert [len(answer["rewards"]) for answer in found] == [3, 2]
    assert [reward for answer in found for reward in answer["rewards"]] == pytest.approx([expected(text) for text in texts])


@pytest.fixture
def file(tmp_path):
    (code,) = blocks("OpenRLHF", "python")
    (tmp_path / "entra_reward.py").write_text(code)
    return str(tmp_path / "entra_reward.py")


def test_the_file_of_the_page_pays_for_right_answers_alone(file, monkeypatch):
    with running(create_app(POLICY, token=TOKEN)) as port:
        monkeypatch.setenv("ENTRA_SERVE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("ENTRA_SERVE_TOKEN", TOKEN)
        executor = SingleTurnAgentExecutor(file)
        right, wrong = rolled_out(executor), rolled_out(executor, label="5")
        assert right["reward"] == pytest.approx([1 + 0.5 * expected()])
        assert right["scores"] == [1.0]
        assert right["extra_logs"] == {"entra": pytest.approx([expected()]), "entra_error": [0.0]}
        assert (wrong["reward"], wrong["scores"]) == ([0.0], [0.0])


def test_a_wrong_token_is_said_and_no_log_holds_it(file, monkeypatch, caplog):
    with running(create_app(POLICY, token=TOKEN)) as port:
        monkeypatch.setenv("ENTRA_SERVE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("ENTRA_SERVE_TOKEN", "a-guess-of-the-tests")
        assert rolled_out(SingleTurnAgentExecutor(file))["reward"] is None
    assert "this server wants its token" in caplog.text
    assert "a-guess-of-the-tests" not in caplog.text


def test_every_flag_of_the_page_is_openrlhfs():
    source = Path(find_spec("openrlhf.cli.train_ppo_ray").origin).read_text()
    (command,) = blocks("OpenRLHF", "bash")
    flags = re.findall(r"--[\w.]+", command)
    assert len(flags) == 8
    assert [flag for flag in flags if f'"{flag}"' not in source] == []


def test_the_server_counts_what_openrlhf_asked(port):
    client = Client(port)
    before = client.metric("entra_tokens_total")
    rolled_out(SingleTurnAgentExecutor(f"http://127.0.0.1:{port}/openrlhf"))
    assert client.metric("entra_tokens_total") == before + len(ids(PROMPT + RESPONSE))
