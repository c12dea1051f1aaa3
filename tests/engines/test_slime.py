"""slime's request, and the function of docs/engines.md. slime is on no index: a sample here has the fields of its public
source, THUDM/slime, slime/utils/types.py at commit 0d234f3e3a83c81b7d37209994e0b994deacbb24."""

import asyncio
from types import SimpleNamespace

import aiohttp
import pytest
from page import blocks
from serving import running
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra
from entra.policy import Policy
from entra.serve.app import create_app
from entra.serve.micro_batches import Limits

POLICY = Policy(build("qwen3"), build_tokenizer())


def ids(text):
    return POLICY.tokenizer(text, add_special_tokens=False)["input_ids"]


def sample(response="it is 4, it is 4", label="4", prompt="<user>1 + 3?<assistant>"):
    tokens = [*ids(response), 2] if response else []
    fields = {"tokens": [*ids(prompt), *tokens], "response_length": len(tokens)}
    return SimpleNamespace(prompt=prompt, response=response, label=label, **fields)


def expected(one):
    return entra.score_batch([ids(one.prompt)], [ids(one.response)], model=POLICY.model)[0]


def test_what_its_client_sends_gets_a_number():
    async def post(url, one):  # the payload of `remote_rm`
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
            session.post(url, json={"prompt": one.prompt, "response": one.response, "label": one.label}) as answer,
        ):
            answer.raise_for_status()
            return await answer.json()

    with running(create_app(POLICY)) as port:
        assert asyncio.run(post(f"http://127.0.0.1:{port}/slime", sample())) == pytest.approx(expected(sample()))


def test_the_function_of_the_page(monkeypatch):
    (code,) = blocks("slime", "python")
    samples = [sample(), sample(label="5"), sample(response=""), sample(response="so it is 4")] * 4

    async def rewarded(reward):
        return await asyncio.gather(*(reward(SimpleNamespace(), one) for one in samples))

    # There is room for two rows, so some come again.
    with running(create_app(POLICY, limits=Limits(queue_rows=2, max_rows=2), token="secret")) as port:
        monkeypatch.setenv("ENTRA_SERVE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("ENTRA_SERVE_TOKEN", "secret")
        module = {}
        exec(compile(code, "docs/engines.md", "exec"), module)
        found = asyncio.run(rewarded(module["reward"]))
    assert found == pytest.approx([1 + 0.5 * expected(samples[0]), 0.0, 0.0, 1 + 0.5 * expected(samples[3])] * 4)
