"""Simulated users of a deployed server: each waits for its answer, checks it, and sends the next request.

serve_load.py, a script, imports this file as `load_users`; tests.chaos.serve, run from the repository root, imports it as
`benchmarks.load_users`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Any

import aiohttp

LABEL_TOLERANCE = 2e-3
"""Smallest tolerance of probabilities: batches of other sizes add in another order."""
RETRY_S = 0.25
START_UP_S = 4.0
"""Seconds for the users' processes to start."""
PROXY_WORDS = "Internal Server Error"
"""Plain-text answer of Ray Serve's proxy to requests in flight at a killed replica."""


@dataclass(frozen=True, slots=True)
class Question:
    """A text, and the request for its label or its continuation."""

    text: str
    is_label: bool
    num_tokens: int

    @property
    def path(self) -> str:
        return "/v1/classify" if self.is_label else "/v1/completions"

    def body(self, model: str) -> dict[str, Any]:
        if self.is_label:
            return {"model": model, "task": "fpb", "text": self.text}
        return {"model": model, "prompt": self.text, "max_tokens": self.num_tokens, "stream": True}


@dataclass(frozen=True, slots=True)
class Texts:
    """One request for the labels of several texts."""

    questions: tuple[Question, ...]
    path = "/v1/classify"

    def body(self, model: str) -> dict[str, Any]:
        return {"model": model, "task": "fpb", "texts": [question.text for question in self.questions]}


Expected = Mapping[Question, dict[str, float] | str]
"""The engine's answer: probability of each label, or text."""


@dataclass(slots=True)
class Tally:
    """Sums over all users."""

    tolerance: float = LABEL_TOLERANCE
    """Largest deviation of a label's probability."""
    seconds: float = 0.0
    whole: list[float] = field(default_factory=list)
    """Seconds from each request to the end of its answer."""
    first: list[float] = field(default_factory=list)
    """Seconds from each request to the first text of its stream."""
    num_right: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """Error code -> count; each request was retried and answered."""
    lost: list[str] = field(default_factory=list)
    """Broken connections, undocumented statuses, missing answers."""
    stages: str = ""
    """Load of the stages."""

    def add(self, other: Tally) -> None:
        """Add the sums of users in another process."""
        self.seconds = max(self.seconds, other.seconds)
        self.num_right += other.num_right
        self.refused += other.refused
        for name in ("whole", "first", "wrong", "lost"):
            getattr(self, name).extend(getattr(other, name))

    @property
    def per_second(self) -> float:
        return self.num_right / self.seconds if self.seconds else 0.0


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p90, p99 and the largest, in milliseconds."""
    ranked = sorted(values)
    if not ranked:
        return {}
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(1000 * ranked[min(len(ranked) - 1, int(share * len(ranked)))], 1) for name, share in shares.items()
    }


async def run_users(
    address: str,
    key: str,
    model: str,
    questions: Sequence[Question],
    expected: Expected,
    num_users: int,
    seconds: float,
    meanwhile: Callable[[], Any] | None = None,
    may_break: bool = False,
    num_texts: int = 1,
    tolerance: float = LABEL_TOLERANCE,
) -> Tally:
    """Let `num_users` ask one question after the other for `seconds`; waits for the last answers.

    Args:
        meanwhile: runs beside the users, who continue until it has ended too.
        may_break: retry after a broken connection or the proxy's 500, as a client does whose proxy or replica was killed.
        num_texts: texts a request; with more than one, only labels are requested.
        tolerance: of a label's probability.
    """
    tally, todo = Tally(tolerance), itertools.cycle(questions)
    until, started = time.monotonic() + seconds, time.monotonic()
    # One connection a user, so that requests wait in the server.
    connector = aiohttp.TCPConnector(limit=num_users)
    headers = {"Authorization": f"Bearer {key}"}
    timeout = aiohttp.ClientTimeout(total=400)
    async with aiohttp.ClientSession(address, connector=connector, headers=headers, timeout=timeout) as session:

        async def user() -> None:
            while time.monotonic() < until or (other is not None and not other.done()):
                asked = Texts(tuple(islice(todo, num_texts))) if num_texts > 1 else next(todo)
                await _ask(session, model, asked, expected, tally, may_break)

        other = asyncio.create_task(meanwhile()) if meanwhile is not None else None
        tasks = [asyncio.create_task(user()) for _ in range(num_users)]
        await asyncio.gather(*tasks)
        if other is not None:
            await other
    tally.seconds = time.monotonic() - started
    return tally


class StageWatch(threading.Thread):
    """Context manager that polls the server's status twice a second."""

    def __init__(self, address: str, key: str) -> None:
        super().__init__(daemon=True)
        self._request = urllib.request.Request(f"{address}/v1/stages", headers={"Authorization": f"Bearer {key}"})
        self._over = threading.Event()
        self._seen: list[dict[str, Any]] = []

    def run(self) -> None:
        while not self._over.wait(0.5):
            with contextlib.suppress(OSError), urllib.request.urlopen(self._request, timeout=5) as reply:
                self._seen.append(json.load(reply))

    def __enter__(self) -> StageWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def describe(self) -> str:
        seen = [body for body in self._seen if body["stages"]]
        if not seen:
            return "no status with busy stages was read"
        busy = [
            sum(body["stages"][index]["busy"] for body in seen) / len(seen) for index in range(len(seen[0]["stages"]))
        ]
        counts = {name: sum(body[name] for body in seen) / len(seen) for name in ("active", "queue")}
        shares = " / ".join(f"{share:.0%}" for share in busy)
        return f"stages busy {shares}, {counts['active']:.0f} requests in flight and {counts['queue']:.0f} in the queue"


def run_clients(num_clients: int, users: tuple[Any, ...], num_texts: int, tolerance: float) -> Tally:
    """Run users in several processes, each starting at another question; returns the sums over all.

    Args:
        users: the arguments of `run_users` up to `seconds`.
    """
    *asked, questions, expected, num_users, seconds = users
    tally, begin = Tally(tolerance), time.monotonic() + START_UP_S
    with ProcessPoolExecutor(num_clients, get_context("spawn")) as pool:
        runs = []
        for client in range(num_clients):
            first = client * len(questions) // num_clients
            turned = [*questions[first:], *questions[:first]]
            own = (*asked, turned, expected, num_users // num_clients, seconds)
            runs.append(pool.submit(_run_client, own, num_texts, tolerance, begin))
        for run in runs:
            tally.add(run.result())
    return tally


def _run_client(users: tuple[Any, ...], num_texts: int, tolerance: float, begin: float) -> Tally:
    time.sleep(
        max(0.0, begin - time.monotonic())
    )  # all start together, because their answers are summed over the same seconds
    return asyncio.run(run_users(*users, num_texts=num_texts, tolerance=tolerance))


async def _ask(
    session: aiohttp.ClientSession,
    model: str,
    question: Question | Texts,
    expected: Expected,
    tally: Tally,
    may_break: bool,
) -> None:
    """Ask until there is an answer; retries a documented refusal after its Retry-After."""
    while True:
        started = time.monotonic()
        try:
            async with session.post(question.path, json=question.body(model)) as reply:
                if reply.status == 200:
                    if isinstance(question, Texts):
                        results = (await reply.json())["results"]
                        tally.whole.append(time.monotonic() - started)
                        for own, result in zip(question.questions, results, strict=True):
                            _check(own, dict(result["probabilities"]), expected[own], tally)
                        return
                    answer = await read_answer(reply, question, tally, started)
                    if isinstance(answer, Refused):
                        tally.refused[answer.code] += 1
                    else:
                        tally.whole.append(time.monotonic() - started)
                        _check(question, answer, expected[question], tally)
                        return
                else:
                    text = await reply.text()
                    try:
                        code = json.loads(text)["error"]["code"]
                    except (ValueError, KeyError, TypeError):
                        if may_break and (reply.status, text) == (500, PROXY_WORDS):
                            tally.refused["500 of Ray's proxy, without a code"] += 1
                            await asyncio.sleep(RETRY_S)
                            continue
                        tally.lost.append(f"{reply.status}: {text[:200]}")
                        return
                    if reply.status not in (429, 503):
                        tally.lost.append(f"{reply.status} {code}")
                        return
                    tally.refused[code] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            if may_break and isinstance(error, aiohttp.ClientError):
                tally.refused["the line broke"] += 1
                await asyncio.sleep(RETRY_S)
                continue
            tally.lost.append(f"{type(error).__name__}: {error}")
            return
        await asyncio.sleep(RETRY_S)


@dataclass(frozen=True, slots=True)
class Refused:
    code: str


async def read_answer(
    reply: aiohttp.ClientResponse, question: Question, tally: Tally, started: float
) -> dict[str, float] | str | Refused:
    if question.is_label:
        body = await reply.json()
        return dict(body["results"][0]["probabilities"])
    pieces: list[str] = []
    async for raw in reply.content:
        line = raw.decode().strip()
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return "".join(pieces)
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            return Refused(event["error"]["code"])
        if not pieces:
            tally.first.append(time.monotonic() - started)
        pieces.append(event["choices"][0]["text"])
    raise aiohttp.ClientPayloadError("a stream without [DONE]")


def _check(question: Question, answer: dict[str, float] | str, expected: dict[str, float] | str, tally: Tally) -> None:
    if isinstance(answer, dict) and isinstance(expected, dict):
        is_right = answer.keys() == expected.keys() and all(
            abs(answer[label] - expected[label]) <= tally.tolerance for label in expected
        )
    else:
        is_right = answer == expected
    if is_right:
        tally.num_right += 1
    else:
        tally.wrong.append(f"{question.text!r}: {answer!r} instead of {expected!r}")
