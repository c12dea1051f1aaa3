"""The clients of the load test, in a process of their own: python load_clients.py PORT cases.json

Prints as JSON what became of the requests, and the server's memory after a quarter of them and at the end.
"""

import asyncio
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import aiohttp

CLIENTS = 64


async def main(port: str, path: str) -> dict:
    cases = list(enumerate(json.loads(Path(path).read_text())))
    url = f"http://127.0.0.1:{port}"
    found: dict = {"right": 0, "wrong": [], "hung_up": 0, "sent_away": 0, "memory": []}
    start = time.monotonic()

    async def memory(session):
        async with session.get(f"{url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        found["memory"].append(float(next(line for line in lines if line.startswith("process_resident")).split()[1]))

    async def ask(session, case):
        while True:
            async with session.post(f"{url}/score", json=case["body"]) as answer:
                if answer.status != 503:
                    return answer.status, await answer.json()
                found["sent_away"] += 1
                await asyncio.sleep(float(answer.headers["Retry-After"]) / 10)

    async def client():
        async with aiohttp.ClientSession() as session:
            while cases:
                number, case = cases.pop(0)
                if case["hang_up"]:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(ask(session, case), 0.005 * (number % 4))
                    found["hung_up"] += 1
                    continue
                status, answer = await ask(session, case)
                if is_right(case, status, answer):
                    found["right"] += 1
                else:
                    found["wrong"].append([number, case, status, answer])

    async with aiohttp.ClientSession() as session:
        later = cases[len(cases) // 4 :]
        del cases[len(cases) // 4 :]
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        await memory(session)
        cases += later
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        await memory(session)
    found["seconds"] = time.monotonic() - start
    return found


def is_right(case, status, answer):
    if status != case["status"] or status != 200:
        return status == case["status"] and "detail" in answer
    kinds = [error and error.partition(":")[0] for error in answer["errors"]]
    return kinds == case["kinds"] and all(
        got is due if due is None or got is None else abs(got - due) < 1e-5
        for got, due in zip(answer["rewards"], case["rewards"], strict=True)
    )


print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
