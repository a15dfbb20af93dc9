"""Load test of a deployed server: many users, each answer compared with the engine's; and the engine's rate without HTTP.

    python benchmarks/serve_load.py --config serve_configs/cpu-demo.yaml --users 64 --seconds 120
    python benchmarks/serve_load.py --config ... --users 64 --seconds 120 --kills 2
    python benchmarks/serve_load.py --config serve_configs/llama-8b-8bit.yaml --labels-only model.weights=random

First the bare engine, with its stages, answers as many encoded questions at once as there are users: these are the expected
answers and the reference rate. Questions repeat, so their prompts are in the prefix cache if it is large enough: give more
`--questions` than fit to measure uncached prompts. `--texts 1 8`, after the overrides, requests one label at a time and then
eight, so the engine has users x texts questions at once, and so has the bare engine. Then the same YAML is deployed on a local
Ray and asked over HTTP; some seconds of warm-up count only for wrong answers. A user waits for its answer before it asks again;
a documented refusal is retried and counted. `--kills N` kills a stage's process N times in each run. Exit code 1 if an answer
was lost or wrong.

The engine's answers to a question vary with the rest of the batch: in float32 in the sixth digit, in bfloat16 in the third, and
at 8 bit, where the batch decides which columns stay in 16 bit, in the first with random weights. An answer over HTTP is wrong if
it differs from the engine's by more than twice this variation and by more than 0.002.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from load_users import LABEL_TOLERANCE, Question, StageWatch, Tally, percentiles, run_clients, run_users

FIRST_S = 20.0
"""Seconds of load before the first kill."""
BARE_S = 20.0
"""Seconds of measurement without HTTP."""
WARM_UP_S = 5.0
"""Seconds of warm-up load before the first measured run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="Serve YAML")
    parser.add_argument("overrides", nargs="*", help="key=value words that override its args")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--questions", type=int, default=256, help="different questions")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of a continuation")
    parser.add_argument(
        "--labels-only",
        action="store_true",
        help="request only labels; without it every fourth question is a continuation",
    )
    parser.add_argument("--texts", type=int, nargs="+", default=[1], help="texts a request, one run for each number")
    parser.add_argument("--direct", type=int, help="the server's HTTP processes to ask directly, past the proxy")
    parser.add_argument("--clients", type=int, default=1, help="processes that share the users")
    parser.add_argument("--kills", type=int, default=0, help="stages to kill in each run")
    parser.add_argument("--output", type=Path, help="JSON file of all numbers")
    options = parser.parse_args()
    if max(options.texts) > 1 and not options.labels_only:
        parser.error("--texts asks for labels: give --labels-only too")
    if options.users % options.clients:
        parser.error(f"--users {options.users} cannot be shared evenly by --clients {options.clients}")
    if options.kills and options.clients > 1:
        parser.error("--kills needs --clients 1: the users continue until all stages are back")

    os.environ.setdefault("FINLORA_API_KEY", secrets.token_urlsafe(32))
    from finlora.cluster import connect

    port, direct_port = find_free_port(), find_free_port()
    connect.connect(log_to_driver=False)
    from finlora.serve.deploy.serve_yaml import read_deployment
    from finlora.serve.settings import DirectConfig, make_absolute

    deployment = read_deployment(options.config, options.overrides)
    # Only the key of this run's environment, and no audit log: the YAML's would be the operator's.
    settings = dataclasses.replace(make_absolute(deployment.settings), keys_file=None, audit_dir=None)
    if options.direct:
        direct = DirectConfig(port=direct_port, processes=options.direct)
        settings = dataclasses.replace(settings, direct=direct)
    questions = make_questions(options.questions, options.tokens, options.labels_only)
    at_once = [options.users * texts for texts in options.texts]
    bares, expected, spread = run_bare(settings, questions, at_once, min(BARE_S, options.seconds))
    say(f"the engine's answers to a question differ by up to {spread:.5f} in a probability")
    tolerance = max(LABEL_TOLERANCE, 2 * spread)
    ports = port, direct_port if options.direct else port
    (warm_up, *tallies), kills = serve_load(deployment, settings, questions, expected, tolerance, ports, options)
    runs = []
    for texts, bare, tally in zip(options.texts, bares, tallies, strict=True):
        http = {
            "per_second": round(tally.per_second, 2),
            "latency_ms": percentiles(tally.whole),
            "first_text_ms": percentiles(tally.first),
            "right": tally.num_right,
            "wrong": len(tally.wrong),
            "lost": len(tally.lost),
            "refused": dict(tally.refused),
            "stages": tally.stages,
        }
        runs.append({"texts": texts, "bare": bare, "http": http})
        say(f"{options.users} users, {texts} text{'s' * (texts > 1)} a request")
        say(f"  bare engine: {bare['per_second']:.1f} answers/s, {bare['latency_ms']}; {bare['meter']}")
        say(
            f"  over HTTP:   {http['per_second']:.1f} answers/s, {http['latency_ms']}, first text {http['first_text_ms']}"
        )
        say(f"               {tally.stages}")
        say(f"  HTTP / bare: {tally.per_second / bare['per_second']:.2f}")
        say(f"  {http['right']:,} right, {http['wrong']} wrong, {http['lost']} lost, refused {http['refused']}")
    for tally in (warm_up, *tallies):
        for line in (*tally.wrong[:5], *tally.lost[:5]):
            say(f"    {line}")
    say(f"seconds from each kill to full service: {kills}")
    if options.output:
        values = {"users": options.users, "seconds": options.seconds, "spread": spread, "kills": kills, "runs": runs}
        options.output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return int(any(tally.wrong or tally.lost for tally in (warm_up, *tallies)))


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def make_questions(count: int, num_tokens: int, labels_only: bool) -> list[Question]:
    """Return distinct questions on generated sentences, in a seeded order."""
    from finlora.data.prompts import SENTIMENTS
    from finlora.data.tasks.synthetic import sentiment_sentence

    rng, texts = random.Random("serve-load"), {}
    while len(texts) < count:
        texts[sentiment_sentence(rng, "test", rng.choice(SENTIMENTS))[0]] = None
    return [Question(text, labels_only or number % 4 > 0, num_tokens) for number, text in enumerate(texts)]


def run_bare(
    settings: Any, questions: list[Question], at_once: list[int], seconds: float
) -> tuple[list[dict[str, Any]], dict[Question, Any], float]:
    """Ask the bare engine: each question once for its answer, then again for `seconds` with each number of questions at once.

    Returns:
        Rate and latencies of the second part, whose prompts are in the prefix cache as over HTTP; the answers of the first; and
        the largest difference of a label's probability between the parts.
    """
    from finlora.data.sets.catalog import make_question
    from finlora.engine.request import normalise_choices
    from finlora.inference.ask import rank_choices
    from finlora.serve.served_model import open_pipeline, read_base

    started = time.monotonic()
    base = read_base(settings)
    opened = open_pipeline(settings, base)
    say(f"the bare engine is ready after {time.monotonic() - started:.0f} s")
    core, texts = opened.core, {}
    numbers = itertools.count()
    requests = [make_request("", question, base) for question in questions]
    todo = itertools.cycle(requests)

    def take(name: str, piece: Any) -> None:
        texts[name] = texts.get(name, "") + piece.text

    def ask(num_users: int, until: Callable[[int], bool]) -> tuple[list[float], list[Any]]:
        """Keep `num_users` questions in flight until `until`; returns the seconds of each, and the answers."""
        starts: dict[str, float] = {}
        taken: list[float] = []
        answers: list[Any] = []
        while not until(len(starts)) or not core.is_idle:
            while len(starts) - len(answers) < num_users and not until(len(starts)):
                request = dataclasses.replace(next(todo), id=f"q{next(numbers)}")
                starts[request.id] = time.monotonic()
                core.submit(request)
            for answer in core.step(take):
                answers.append(answer)
                taken.append(time.monotonic() - starts[answer.request_id])
        return taken, answers

    try:
        first = {answer.request_id: answer for answer in ask(at_once[0], lambda count: count == len(questions))[1]}
        bares, spread = [], 0.0
        for num_users in at_once:
            since, before = time.monotonic(), core.meter.totals()
            taken, answers = ask(num_users, lambda _count: time.monotonic() > since + seconds)  # noqa: B023
            rate = len(taken) / (time.monotonic() - since)
            meter = core.meter.read(before).describe()
            bares.append({"per_second": rate, "latency_ms": percentiles(taken), "meter": meter})
            for answer in answers:
                if answer.log_probs:
                    other = first[f"q{int(answer.request_id[1:]) % len(questions)}"]
                    pairs = zip(*map(normalise_choices, (answer.log_probs, other.log_probs)), strict=True)
                    spread = max(spread, *(abs(one - two) for one, two in pairs))
    finally:
        opened.close()
    expected = {
        question: rank_choices(make_question("fpb", question.text, None).choices, first[f"q{number}"].log_probs)
        if question.is_label
        else texts.get(f"q{number}", "")
        for number, question in enumerate(questions)
    }
    return bares, expected, spread


def make_request(name: str, question: Question, base: Any) -> Any:
    """Encode a question as the server does."""
    from finlora.data.encode import encode_answer, encode_prompt
    from finlora.data.sets.catalog import make_question
    from finlora.engine.request import Request, Sampling

    if not question.is_label:
        ids = encode_prompt(question.text, base.tokenizer, "raw")
        return Request(id=name, prompt_ids=ids, sampling=Sampling(max_tokens=question.num_tokens))
    labelled = make_question("fpb", question.text, None)
    ids = encode_prompt(labelled.prompt, base.tokenizer, base.template)
    choices = [encode_answer(choice, base.tokenizer, base.template) for choice in labelled.choices]
    return Request(id=name, prompt_ids=ids, choices=tuple(choices))


def serve_load(
    deployment: Any,
    settings: Any,
    questions: list[Question],
    expected: dict[Question, Any],
    tolerance: float,
    ports: tuple[int, int],
    options: Any,
) -> tuple[list[Tally], list[float]]:
    """Deploy, let the users ask, and shut down.

    Args:
        ports: of Ray Serve's proxy, and the one to ask.

    Returns:
        The users' sums, the warm-up's first, and the seconds from each kill until all stages are back.
    """
    from ray import serve

    from finlora.serve.deploy.replica import ServerDeployment
    from finlora.serve.settings import to_args

    http = deployment.http | {"host": "127.0.0.1", "port": ports[0]}
    serve.start(http_options=http, proxy_location=deployment.proxy_location)
    started = time.monotonic()
    kills: list[float] = []
    key = os.environ["FINLORA_API_KEY"]
    address = f"http://127.0.0.1:{ports[1]}"

    async def kill_stages() -> None:
        if not options.kills:
            return
        await asyncio.sleep(min(FIRST_S, options.seconds / 4))
        for number in range(options.kills):
            pids = stage_pids()
            os.kill(pids[number % len(pids)], signal.SIGKILL)
            kills.append(await wait_until_served(address, key, len(kills) + 1))
            await asyncio.sleep(min(FIRST_S, options.seconds / 8))

    try:
        application = ServerDeployment.options(**deployment.options).bind(to_args(settings))
        route = {"name": deployment.name, "route_prefix": deployment.route_prefix}
        serve.run(application, **route, logging_config=deployment.logging or None)
        say(f"the server is ready after {time.monotonic() - started:.0f} s")

        def run(num_texts: int, seconds: float, meanwhile: Any = None) -> Tally:
            users = (address, key, settings.name, questions, expected, options.users, seconds)
            with StageWatch(address, key) as watch:
                if options.clients > 1:
                    tally = run_clients(options.clients, users, num_texts, tolerance)
                else:
                    tally = asyncio.run(run_users(*users, meanwhile, num_texts=num_texts, tolerance=tolerance))
            tally.stages = watch.describe()
            return tally

        tallies = [run(options.texts[0], min(WARM_UP_S, options.seconds))]
        tallies += [run(num_texts, options.seconds, kill_stages) for num_texts in options.texts]
        return tallies, kills
    finally:
        serve.shutdown()


def stage_pids() -> list[int]:
    """Return the process ids of the live stages."""
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    actors = list_actors(address=address, detail=True, filters=[("state", "=", "ALIVE")])
    return [actor.pid for actor in actors if actor.class_name == "StageActor"]


async def wait_until_served(address: str, key: str, num_losses: int) -> float:
    """Return the seconds that the server measured from the loss until all stages were back."""
    import aiohttp

    async with aiohttp.ClientSession(address, headers={"Authorization": f"Bearer {key}"}) as session:
        while True:
            async with session.get("/v1/stages") as reply:
                body = await reply.json()
            if body["losses"] >= num_losses and body["stages"]:
                return round(float(body["recovery_s"]), 2)
            await asyncio.sleep(0.2)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
