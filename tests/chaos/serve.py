"""`finlora serve` on CPU under load: stages, replica and proxy are killed one after the other.

Users ask for labels and streamed texts. They compare each answer with the server's answer before the faults. They retry
a stated refusal and a broken connection. Lost is: a wrong answer, a status without an error code, a question that waits
longer than the configured limit. At the end the audit log must verify, name no request twice, and hold at least as many
answers as arrived.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.load_users import RETRY_S, Question, Refused, read_answer, run_users
from benchmarks.load_users import Tally as Answers
from tests.chaos.live_commands import READY_S, LiveCommands, descendants, title
from tests.chaos.record import Injection, Tally, say

PLAN = (*["stage"] * 3, *["replica"] * 3, *["proxy"] * 3)
TITLES = {"stage": "ray::StageActor", "replica": "ray::ServeReplica", "proxy": "ray::ProxyActor"}
MODELS = "demo"
USERS, QUESTIONS = 6, 24
HANG_S = 340.0
"""A little above the configured request_timeout_s: questions wait in the proxy while a replica is replaced."""
LEAST_WAIT_S = 2.0
WAIT_S = 400.0


def break_server(folder: Path, tally: Tally, seed: int) -> None:
    """Serve under load, kill processes, and judge the answers."""
    live = LiveCommands(folder)
    live.make_base()
    live.choose_port()
    rng = random.Random(f"{seed} serve")
    plan = list(PLAN)
    rng.shuffle(plan)
    try:
        live.serve()
        answers, injections = asyncio.run(_ask_with_faults(live, plan, rng, tally))
        lost = _judge(live, answers)
    finally:
        live.close()
    lost = "; ".join(filter(None, [lost, *live.faults]))
    for each in injections:
        tally.add(Injection(each.kind, each.target, each.seed, each.seen, each.lost or lost, each.recovery_s))


async def _ask_with_faults(
    live: LiveCommands, plan: list[str], rng: random.Random, tally: Tally
) -> tuple[Answers, list[Injection]]:
    questions = [
        Question(f"Nordhaven Shipping lifted its outlook after profit rose {n} %", n % 4 > 0, 12)
        for n in range(QUESTIONS)
    ]
    address, headers = f"http://127.0.0.1:{live.port}", {"Authorization": f"Bearer {live.key}"}
    async with aiohttp.ClientSession(address, headers=headers) as session:
        await _wait_until_ready(session)
        expected = {question: await _answer(session, question) for question in questions}
        injections: list[Injection] = []

        async def kill_all() -> None:
            for target in plan:
                if tally.is_over:
                    return
                await asyncio.sleep(LEAST_WAIT_S)
                injections.append(await _kill(live, session, target, rng.randrange(2**32), questions[1], expected))
                say(f"  {target} killed, recovered after {injections[-1].recovery_s:.1f} s {injections[-1].lost}")

        work = run_users(address, live.key, MODELS, questions, expected, USERS, 1.0, kill_all, may_break=True)
        answers = await work
    return answers, injections


async def _kill(
    live: LiveCommands, session: aiohttp.ClientSession, target: str, seed: int, question: Question, expected: Any
) -> Injection:
    """Kill one process of a kind at a random time, and ask until an answer comes and all processes are back."""
    rng = random.Random(seed)
    await asyncio.sleep(rng.uniform(0, 2))
    until = time.monotonic() + WAIT_S
    while not (victims := await asyncio.to_thread(_find, live, target)):
        if time.monotonic() > until:
            return Injection(
                "killed", f"server's {target}", seed, "", f"no {target} process for {WAIT_S:.0f} s", WAIT_S
            )
        await asyncio.sleep(0.5)
    started = time.monotonic()
    rng.choice(victims).kill()
    seen: dict[str, None] = {}
    while True:
        if time.monotonic() - started > WAIT_S:
            return Injection("killed", f"server's {target}", seed, "", f"no answer within {WAIT_S:.0f} s", WAIT_S)
        try:
            async with asyncio.timeout(HANG_S):
                async with session.post(question.path, json=question.body(MODELS)) as reply:
                    if reply.status == 200:
                        await reply.read()
                        if _all_stand(live):
                            break
                    else:
                        seen[f"{reply.status} {(await reply.json())['error']['code']}"] = None
        except TimeoutError:
            return Injection("killed", f"server's {target}", seed, "", f"a question waited for {HANG_S:.0f} s", HANG_S)
        except (aiohttp.ClientError, ValueError, KeyError) as error:
            seen[
                "the connection breaks" if isinstance(error, aiohttp.ClientError) else f"{reply.status} without a code"
            ] = None
        await asyncio.sleep(RETRY_S)
    words = ", ".join(sorted(seen)) or "nothing"
    return Injection("killed", f"server's {target}", seed, words, "", time.monotonic() - started)


def _all_stand(live: LiveCommands) -> bool:
    return len(_find(live, "stage")) == 2 and all(_find(live, role) for role in ("replica", "proxy"))


def _find(live: LiveCommands, role: str) -> list[psutil.Process]:
    below = descendants(live.roots["server"].pid)
    live.seen |= {process.pid: process for process in below}
    return [process for process in below if title(process).startswith(TITLES[role])]


async def _answer(session: aiohttp.ClientSession, question: Question) -> Any:
    async with session.post(question.path, json=question.body(MODELS)) as reply:
        answer = await read_answer(reply, question, Answers(), time.monotonic())
    if isinstance(answer, Refused):
        raise RuntimeError(f"refused before any fault: {answer.code}")
    return answer


async def _wait_until_ready(session: aiohttp.ClientSession) -> None:
    until = time.monotonic() + READY_S
    while True:
        async with session.get("/readyz") as reply:
            if reply.status == 200:
                return
        if time.monotonic() > until:
            raise TimeoutError(f"the server was not ready within {READY_S:.0f} s")
        await asyncio.sleep(0.5)


def _judge(live: LiveCommands, answers: Answers) -> str:
    """Return what was lost or wrong; empty where nothing was."""
    from finlora.serve.accounts.audit import list_logs, verify_audit

    wrong = [*(f"wrong: {each}" for each in answers.wrong[:3]), *(f"lost: {each}" for each in answers.lost[:3])]
    requests, outcomes = [], []
    for log in list_logs(live.folder / "audit"):
        verify_audit(log)
        for line in log.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            requests.append(entry["request_id"])
            outcomes.append(entry["output_hash"] is not None)
    if len(set(requests)) != len(requests):
        wrong.append(f"{len(requests) - len(set(requests))} requests occur twice in the audit log")
    if sum(outcomes) < answers.num_right:
        wrong.append(f"{answers.num_right} answers arrived, the audit log holds {sum(outcomes)}")
    counts = {role: len(_find(live, role)) for role in TITLES}
    if counts != {"stage": 2, "replica": 1, "proxy": 1}:
        wrong.append(f"processes at the end: {counts}")
    refused = re.sub(r"[{}']", "", str(dict(answers.refused)))
    say(
        f"{answers.num_right:,} right answers, {len(answers.wrong)} wrong, {len(answers.lost)} lost; refused: {refused}"
    )
    return "; ".join(wrong)
