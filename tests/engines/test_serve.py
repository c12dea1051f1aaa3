"""`entra serve`: answers are those of `score_batch`, whoever else asks; what is refused, and how; load and throughput."""

import http.client
import json
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from page import blocks
from serving import Client, entra_serve, running, until
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra
from entra.cli import main
from entra.policy import Policy, load_policy
from entra.serve.app import create_app
from entra.serve.micro_batches import Limits

POLICY = Policy(build("qwen3"), build_tokenizer())
HELLO = {"prompts": ["say"], "completions": ["hello, hello"]}
TOKEN = "a-secret-of-the-tests"


def scored(prompts, completions, **options):
    config = entra.ScoreConfig(**options)
    return entra.score_batch(prompts, completions, model=POLICY.model, tokenizer=POLICY.tokenizer, config=config, details=True)


@pytest.fixture(scope="module")
def client():
    limits = Limits(max_body=10_000, max_rows=8, max_tokens=500, queue_rows=16, queue_tokens=1_000)
    with running(create_app(POLICY, limits=limits)) as port:
        yield Client(port)


class TestScore:
    def test_text_messages_and_ids_get_the_rewards_of_score_batch(self, client):
        chat = [{"role": "user", "content": "say"}]
        prompts, completions = (
            ["say", chat, [1, 7, 8]],
            ["hello, hello", [{"role": "assistant", "content": "oh, no"}], [9, 9, 7]],
        )
        status, answer = client.post("/score", {"prompts": prompts, "completions": completions})
        assert status == 200
        assert answer == {"rewards": pytest.approx(scored(prompts, completions).rewards), "errors": [None] * 3}

    def test_ids_are_taken_instead_of_text(self, client):
        _, answer = client.post("/score", {**HELLO, "completion_ids": [[9, 9, 7, 8, 8]]})
        assert answer["rewards"] == pytest.approx(scored(["say"], [[9, 9, 7, 8, 8]]).rewards)

    def test_options_and_details(self, client):
        options = {"protect_fraction": 0.5, "attention_weight": 0.0, "chat_template_kwargs": {"thinking": True}}
        status, answer = client.post("/score", {**HELLO, "options": options, "details": True})
        expected = scored(HELLO["prompts"], HELLO["completions"], **options)
        assert status == 200
        assert answer["rewards"] == pytest.approx(expected.rewards)
        assert answer["rewards"] != pytest.approx(scored(HELLO["prompts"], HELLO["completions"]).rewards)
        (details,) = answer["details"]
        assert list(details) == ["token_ids", "logprobs", "incoming", "importance", "protected"]
        for name, values in details.items():
            torch.testing.assert_close(torch.tensor(values, dtype=getattr(expected, name)[0].dtype), getattr(expected, name)[0])

    def test_a_bad_row_is_an_error_in_its_place(self, client):
        prompts = ["say", 5, "say", "say", [400], "say\ud800"]
        completions = ["hello, hello", "a", "", "b" * 4_200, "c", "d"]
        with running(create_app(POLICY)) as port:
            status, answer = Client(port).post("/score", {"prompts": prompts, "completions": completions, "details": True})
        assert status == 200
        assert answer["rewards"] == pytest.approx([*scored(["say"], ["hello, hello"]).rewards, *[None] * 5])
        assert [error and error.partition(":")[0] for error in answer["errors"]] == [
            None, "not text", "empty completion", "longer than the context", "outside the vocabulary", "not text",
        ]  # fmt: skip
        assert [details is None for details in answer["details"]] == [False, *[True] * 5]

    def test_values_that_are_not_finite_are_an_error(self):
        model = build("qwen3")
        with torch.no_grad():
            model.model.embed_tokens.weight[20] = torch.nan
        with running(create_app(Policy(model, POLICY.tokenizer))) as port:
            _, answer = Client(port).post("/score", {"prompts": [[1], [1]], "completion_ids": [[9, 9, 7], [9, 20, 7]]})
        assert answer["rewards"] == pytest.approx([*scored([[1]], [[9, 9, 7]]).rewards, None])
        assert answer["errors"][1].startswith("not finite: ")

    def test_no_rows(self, client):
        assert client.post("/score", {"prompts": [], "completions": []}) == (200, {"rewards": [], "errors": []})


class TestShapes:
    def test_openrlhf_gets_rewards_scores_and_logs(self, client):
        asked = {"query": ["sayhello, hello</s>", "stay"], "prompts": ["say", "say"], "labels": ["4", "4"]}
        status, answer = client.post("/openrlhf", asked)
        # Prompts went through a template: no second BOS comes before them. What cannot be scored gets the worst reward.
        expected = [*scored([POLICY.tokenizer("say", add_special_tokens=False)["input_ids"]], ["hello, hello"]).rewards, 0.0]
        assert (status, answer) == (
            200,
            {"rewards": pytest.approx(expected), "scores": pytest.approx(expected), "extra_logs": {"entra_error": [0.0, 1.0]}},
        )
        assert client.metric('entra_rows_total{outcome="foreign query"}') == 1

    def test_slime_gets_a_number(self, client):
        ids = POLICY.tokenizer("say", add_special_tokens=False)["input_ids"]
        asked = {"prompt": "say", "response": "hello, hello", "label": "4"}
        assert client.post("/slime", asked) == (200, pytest.approx(scored([ids], ["hello, hello"]).rewards[0]))
        chat = {"prompt": [{"role": "user", "content": "say"}], "response": "hello, hello", "label": None}
        assert client.post("/slime", chat) == (200, pytest.approx(scored([chat["prompt"]], ["hello, hello"]).rewards[0]))
        assert client.post("/slime", {**asked, "response": ""}) == (200, 0.0)

    def test_what_they_get_for_a_bad_row_is_the_servers_option(self):
        with running(create_app(POLICY, limits=Limits(bad_row_reward=-1.5))) as port:
            assert Client(port).post("/slime", {"prompt": "say", "response": ""}) == (200, -1.5)


def test_the_page_asks_as_it_says(client):
    start, ask = blocks("Any engine that can POST: entra serve", "bash")
    assert start.splitlines()[1].startswith("entra serve --model smollm2 ")
    words = shlex.split(ask)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/score"]
    body = json.loads(words[words.index("-d") + 1])
    expected = scored(body["prompts"], body["completions"], **body["options"]).rewards
    assert expected[0] > expected[1]
    assert client.post("/score", body) == (200, {"rewards": pytest.approx(expected), "errors": [None, None]})


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "status", "message"),
        [
            (b"{", 422, "JSON decode error"),
            ({}, 422, "body.prompts: Field required"),
            ({**HELLO, "model": "x"}, 422, "body.model: Extra inputs are not permitted"),
            ({"prompts": ["a"]}, 422, "1 prompts, but neither completions or completion_ids; send one for each prompt"),
            ({"prompts": ["a"], "completions": []}, 422, "1 prompts, but 0 completions or completion_ids"),
            ({**HELLO, "options": {"protect_fractio": 0.5}}, 422, "did you mean 'protect_fraction'?"),
            ({**HELLO, "options": {"protect_fraction": 2}}, 422, "protect_fraction=2 must be in [0, 1]"),
            ({**HELLO, "options": {"backend": "torch"}}, 422, "'backend', which the server decides; leave it out"),
            ({**HELLO, "options": {"chat_template_kwargs": {"chat_template": "x"}}}, 422, "a program; send prompts as text"),
            (
                {"prompts": ["a"] * 9, "completions": ["b"] * 9},
                422,
                "9 rows, but a request has at most 8; send several requests",
            ),
            (
                {"prompts": ["a"] * 2, "completions": ["b" * 300] * 2},
                422,
                "604 tokens, but a request has at most 500; send fewer",
            ),
            (
                {"prompts": ["a"], "completions": ["b" * 10_000]},
                413,
                "more than 10000 bytes; send fewer rows at once, or start",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_bad_request_gets_the_rule_and_the_remedy(self, client, body, status, message):
        found, answer = client.post("/score", body)
        assert (found, message in answer["detail"]) == (status, True), answer

    def test_a_large_body_without_a_length_is_refused_too(self, client):
        chunks = iter([b'{"prompts": ["', *[b"a" * 1_000] * 50, b'"], "completions": ["b"]}'])
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        connection.request("POST", "/score", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413

    def test_errors_do_not_repeat_the_texts(self, client):
        _, answer = client.post("/score", {**HELLO, "details": "a text that is nobody's business"})
        assert "details" in answer["detail"]
        assert "business" not in answer["detail"]

    def test_other_paths_and_methods(self, client):
        assert client.get("/score")[0] == 405
        assert client.get("/no/such")[0] == 404

    def test_a_model_that_cannot_be_scored_is_refused_at_the_start(self):
        with pytest.raises(ValueError, match="attention"):
            create_app(Policy(build("qwen3_next", layer_types=["linear_attention"] * 4), POLICY.tokenizer))


class Held:
    """In place of `score_rows`: waits until it is let go."""

    def __init__(self, monkeypatch):
        import entra.serve.queue as module

        self.free, self.rows, self._original = threading.Event(), [], module.score_rows
        monkeypatch.setattr(module, "score_rows", self)

    def __call__(self, rows, policy, config):
        assert self.free.wait(60)
        self.rows += rows
        return self._original(rows, policy, config)


class TestQueue:
    @pytest.fixture
    def held(self, monkeypatch):
        held = Held(monkeypatch)
        yield held
        held.free.set()

    @pytest.mark.parametrize("limits", [{"queue_rows": 2, "max_rows": 2}, {"queue_tokens": 40, "max_tokens": 40}])
    def test_what_does_not_fit_gets_503_and_a_time_and_nothing_is_lost(self, held, limits):
        with running(create_app(POLICY, limits=Limits(**limits))) as port, ThreadPoolExecutor() as pool:
            client = Client(port)
            first = [pool.submit(client.post, "/score", HELLO) for _ in range(2)]
            unit = "rows" if "queue_rows" in limits else "tokens"
            until(lambda: client.metric(f"entra_queue_{unit}") >= (2 if unit == "rows" else 32))
            status, answer, headers = client.ask("POST", "/score", HELLO)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert f"{unit} are under way; send it again in 1 s" in answer["detail"]
            assert client.get("/ready") == (
                (503, {"status": "the queue is full"}) if unit == "rows" else (200, {"status": "ok"})
            )
            assert client.get("/health") == (200, {"status": "ok"})
            held.free.set()
            assert [future.result()[0] for future in first] == [200, 200]
            assert client.post("/score", HELLO)[0] == 200
            assert client.get("/ready") == (200, {"status": "ok"})

    def test_rows_whose_client_hung_up_are_not_scored(self, held):
        with running(create_app(POLICY)) as port, ThreadPoolExecutor() as pool:
            client = Client(port)
            first = pool.submit(client.post, "/score", HELLO)
            until(lambda: client.metric("entra_queue_rows") == 1)
            time.sleep(0.1)  # the thread takes it
            body = json.dumps({"prompts": ["gone"], "completions": ["gone"]}).encode()
            with socket.create_connection(("127.0.0.1", port)) as connection:
                head = (
                    f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                connection.sendall(head.encode() + body)
                until(lambda: client.metric("entra_queue_rows") == 2)
            until(lambda: client.metric("entra_queue_rows") == 1)
            held.free.set()
            assert first.result()[0] == 200
            assert client.post("/score", HELLO)[0] == 200
            assert client.metric('entra_requests_total{path="/score",status="499"}') == 1
        assert len(held.rows) == 2

    def test_a_model_that_fails_is_said_to(self, held, monkeypatch):
        held.free.set()
        monkeypatch.setattr(held, "_original", lambda rows, policy, config: 1 / 0)
        with running(create_app(POLICY)) as port:
            client = Client(port)
            for _ in range(3):
                assert client.get("/health")[0] == 200
                assert client.post("/score", HELLO) == (200, {"rewards": [None], "errors": ["failed: division by zero"]})
            assert client.get("/health") == (503, {"status": "the model fails; restart the server"})
            assert client.get("/ready")[0] == 503


class TestToken:
    def test_it_is_demanded_of_every_request_but_for_the_state(self):
        with running(create_app(POLICY, token=TOKEN)) as port:
            for wrong in (None, "", TOKEN[:-1], f"{TOKEN}x", "é"):
                client = Client(port, wrong and wrong.encode().decode("latin-1"))
                status, answer, headers = client.ask("POST", "/score", HELLO)
                assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
                assert "Authorization: Bearer TOKEN" in answer["detail"]
                assert client.get("/metrics")[0] == client.get("/openapi.json")[0] == 401
                assert client.get("/health")[0] == client.get("/ready")[0] == 200
            client = Client(port, TOKEN)
            assert client.post("/score", HELLO)[0] == client.get("/metrics")[0] == client.get("/openapi.json")[0] == 200

    def test_no_other_address_without_one(self, monkeypatch, capsys):
        monkeypatch.setenv("ENTRA_SERVE_TOKEN", "")
        assert main(["serve", "--model", "smollm2", "--host", "0.0.0.0"]) == 2
        assert "--host 0.0.0.0 lets others in, so a token is needed; set ENTRA_SERVE_TOKEN" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    POLICY.model.save_pretrained(folder)
    POLICY.tokenizer.save_pretrained(folder)
    return folder


class TestCommand:
    def test_it_finishes_what_is_under_way_and_its_log_has_no_secret(self, folder, tmp_path):
        words = ("--model", folder, "--protect-fraction", 0.5, "--batch-tokens", 32)
        with (
            entra_serve(*words, log=tmp_path / "log", ENTRA_SERVE_TOKEN=TOKEN) as (process, port),
            ThreadPoolExecutor(64) as pool,
        ):
            client = Client(port, TOKEN)
            many = {"prompts": HELLO["prompts"] * 8, "completions": HELLO["completions"] * 8}
            asked = [pool.submit(client.post, "/score", many) for _ in range(16)]
            assert Client(port, "a guess").post("/score", HELLO)[0] == 401
            assert client.post("/score", b"a text that is no JSON")[0] == 422
            until(lambda: client.metric("entra_queue_rows") >= 64)
            process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in asked]
            expected = scored(HELLO["prompts"], HELLO["completions"], protect_fraction=0.5).rewards
            assert answers == [(200, {"rewards": pytest.approx(expected * 8), "errors": [None] * 8})] * 16
            assert process.wait(60) == 0
        log = (tmp_path / "log").read_text()
        assert "requests must bring the token" in log
        assert not [secret for secret in (TOKEN, "a guess", "hello", "no JSON") if secret in log]

    def test_a_port_that_is_taken_is_an_error(self, folder, tmp_path, capfd):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(SystemExit) as stopped:
                main(["serve", "--model", str(folder), "--port", str(taken.getsockname()[1])])
        assert stopped.value.code != 0
        assert "address already in use" in capfd.readouterr().err


def cases(count, generator):
    """Requests for the load test, each with the answer that is due: a status, rewards, and kinds of errors."""
    letters = "abcdefgh ,."
    texts = ["".join(generator.choices(letters, k=generator.choice([3, 10, 40, 150]))) for _ in range(300)]
    rewards = dict(zip(texts, scored(["say"] * len(texts), texts).rewards, strict=True))
    bad_rows = [(5, "not text"), ("", "empty completion"), ([400], "outside the vocabulary")]
    bad_requests = [{"prompts": ["say"]}, {**HELLO, "options": {"protect_fraction": 7}}, "no object"]
    for i in range(count):
        chosen = generator.choices(texts, k=generator.randint(1, 4))
        due = [(rewards[text], None) for text in chosen]
        case = {"status": 200, "hang_up": i % 20 == 7}
        if i % 20 == 3:
            place, (completion, kind) = generator.randrange(len(chosen) + 1), generator.choice(bad_rows)
            chosen.insert(place, completion)
            due.insert(place, (None, kind))
        case["body"] = {"prompts": ["say"] * len(chosen), "completions": chosen}
        if i % 20 == 13:
            case |= {"status": 422, "body": generator.choice(bad_requests)}
        yield {**case, "rewards": [reward for reward, _ in due], "kinds": [kind for _, kind in due]}


@pytest.mark.timeout(1500)
def test_load(folder, tmp_path):
    """64 clients, 2,000 requests, one in ten bad, one in twenty that hangs up: every answer right, none lost."""
    (tmp_path / "cases.json").write_text(json.dumps(list(cases(2_000, random.Random(20260112)))))
    # There is room for fewer rows than 64 clients send, so some are sent away and come again.
    with entra_serve("--model", folder, "--queue-rows", 96, "--max-rows", 8, log=tmp_path / "log") as (process, port):
        clients = [sys.executable, str(Path(__file__).with_name("load_clients.py")), str(port), str(tmp_path / "cases.json")]
        done = subprocess.run(clients, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        client = Client(port)
        assert found["wrong"] == []
        assert found["right"] == 1_900
        assert found["hung_up"] == 100
        assert found["sent_away"] > 0
        assert client.metric("entra_queue_rows") == client.metric("entra_queue_tokens") == 0
        assert client.metric("entra_batch_rows_sum") / client.metric("entra_batch_rows_count") > 2
        warm, end = found["memory"]
        print(f"\nload: {found['seconds']:.1f} s, {found['sent_away']} sent away, {warm / 2**20:.0f} to {end / 2**20:.0f} MiB")
        assert end < 1.05 * warm
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.smollm2
@pytest.mark.timeout(1500)
def test_throughput(tmp_path):
    """SmolLM2 and rows of 256 to 1,024 tokens, sent one a request: at least 0.9 of `score_batch` on all of them at once."""
    generator, policy = random.Random(20260112), load_policy("smollm2")
    prompts = [[generator.randrange(20, 40_000) for _ in range(32)] for _ in range(8)]
    completions = [
        [generator.randrange(20, 40_000) for _ in range(n - 32)] for n in torch.linspace(256, 1_024, 8).int().tolist()
    ]
    generator.shuffle(completions)
    tokens = sum(map(len, prompts + completions))
    threads = str(torch.get_num_threads())
    with (
        entra_serve("--model", "smollm2", log=tmp_path / "log", OMP_NUM_THREADS=threads) as (_, port),
        ThreadPoolExecutor(8) as pool,
    ):
        client = Client(port)

        def served():
            bodies = [{"prompts": [p], "completion_ids": [c]} for p, c in zip(prompts, completions, strict=True)]
            return [answer["rewards"][0] for _, answer in pool.map(lambda body: client.post("/score", body), bodies)]

        def direct():
            return entra.score_batch(prompts, None, completions, model=policy.model, tokenizer=policy.tokenizer)

        assert served() == pytest.approx(direct(), abs=1e-5)  # and both are warm
        times = {served: [], direct: []}
        for _ in range(3):
            for run, taken in times.items():
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
    over_http, at_once = map(min, times.values())  # what else runs on the machine only ever adds time
    print(f"\nthroughput: {tokens / over_http:.0f} tokens/s over HTTP, {tokens / at_once:.0f} by score_batch")
    print(f"ratio {at_once / over_http:.3f}, {threads} threads; {times}")
    assert at_once / over_http >= 0.9
