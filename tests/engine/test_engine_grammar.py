"""Requests with a grammar beside plain ones, over any split into stages: each answer fits, and plain answers do not change."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from itertools import pairwise

import jsonschema
import pytest
import torch
from engine_requests import RAGGED, log_probs_of, run, tokens_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore
from finlora.engine.request import Request, Sampling
from finlora.engine.scheduler import Scheduler
from finlora.grammar.compile import choice, json_object, json_schema, regex
from finlora.grammar.vocabulary import Vocabulary
from finlora.inference.in_process import InProcess
from finlora.model.base import load_base
from finlora.stage.stage import Stage

CPU = torch.device("cpu")
END, ROWS = 1, 4096
LAYOUTS = [((), False), ((), True), ((2,), False), ((2,), True), ((1, 2, 3), True)]
"""First layers of all stages but the first, and whether speculative rows are sent."""
COMPANY = {
    "type": "object",
    "properties": {
        "up": {"type": "boolean"},
        "mood": {"enum": ["good", "bad"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["up", "mood", "score"],
}
LABELS = ("negative", "neutral", "positive")
QUARTER = r"Q[1-4] (19|20)[0-9]{2}"


@pytest.fixture(scope="module")
def make_core(four_layers):
    """Return an engine over stages that begin at layer 0 and the given ones."""
    loaded = {}

    def make(cuts=(), *, follows=False):
        edges = (0, *cuts, 4)
        if edges not in loaded:
            spans = [range(first, last) for first, last in pairwise(edges)]
            bases = [load_base(four_layers, 16, CPU, 0, span) for span in spans]
            words = Vocabulary(bases[0].tokenizer, END)
            loaded[edges] = (
                bases[0].tokenizer,
                [
                    Stage(base.model, span, ROWS, torch.float32, vocabulary=words)
                    for base, span in zip(bases, spans, strict=True)
                ],
            )
        tokenizer, stages = loaded[edges]
        for stage in stages:
            stage.forget_requests()
        limits = Limits(cache_rows=ROWS, max_in_flight=len(stages), follows=follows)
        return EngineCore(InProcess(stages), Scheduler(limits, END, lambda: 3), tokenizer)

    return make


def ask(name, grammar="", prompt=RAGGED[2], **sampling):
    return Request(id=name, prompt_ids=prompt, sampling=Sampling(grammar=grammar, **({"max_tokens": 64} | sampling)))


def mixed():
    """Requests of every kind for one batch, greedy and sampled."""
    asked = []
    for number, prompt in enumerate(RAGGED[1:4]):
        for name, grammar in (
            ("plain", ""),
            ("json", json_schema(COMPANY)),
            ("label", choice(LABELS)),
            ("quarter", regex(QUARTER)),
        ):
            asked.append(ask(f"{name}-{number}", grammar, prompt, max_tokens=40))
            asked.append(ask(f"{name}-{number}-warm", grammar, prompt, max_tokens=40, temperature=1.5, seed=number))
    return asked


def check(name, text, finish):
    """Assert that a text fits the grammar of a request of `mixed`."""
    kind = name.partition("-")[0]
    if kind != "plain":
        assert finish == "end"
    if kind == "json":
        jsonschema.validate(json.loads(text), COMPANY)
    elif kind == "label":
        assert text in LABELS
    elif kind == "quarter":
        assert re.fullmatch(QUARTER, text)


@pytest.mark.parametrize(("cuts", "follows"), LAYOUTS)
def test_each_answer_fits_its_grammar_and_plain_ones_do_not_change(make_core, cuts, follows):
    core = make_core(cuts, follows=follows)
    answers, texts = run(core, mixed())
    for name, text in texts.items():
        check(name, text, answers[name].finish)
    alone, _ = run(make_core(), [request for request in mixed() if not request.sampling.grammar])
    for name, answer in alone.items():
        assert tokens_of(answers[name]) == tokens_of(answer)
        assert [token.log_prob for token in answers[name].tokens] == pytest.approx(
            [token.log_prob for token in answer.tokens], abs=1e-4
        )


def test_layouts_give_equal_answers(make_core):
    found = [
        {name: tokens_of(answer) for name, answer in run(make_core(cuts, follows=follows), mixed())[0].items()}
        for cuts, follows in LAYOUTS
    ]
    assert all(other == found[0] for other in found)


def test_speculative_rows_are_sent_for_requests_with_a_grammar(make_core):
    core = make_core(follows=True)
    core.submit(ask("a", regex("[a-z]{40}")))
    followed = []
    start = core.executor.start
    core.executor.start = lambda batch: (followed.append(batch.follows), start(batch))[1]
    while not core.is_idle:
        core.step()
    assert sum(number is not None for number in followed) >= 5


def test_log_probabilities_are_those_before_the_grammar(make_core, plain):
    answers, texts = run(make_core(), [ask("a", choice(LABELS))])
    tokens = tokens_of(answers["a"])
    rows = log_probs_of(plain(), (*RAGGED[2], *tokens))[len(RAGGED[2]) - 1 : -1]
    expected = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    assert texts["a"] in LABELS
    assert [token.log_prob for token in answers["a"].tokens] == pytest.approx(expected, abs=1e-3)
    assert math.exp(sum(expected)) < 0.5, "the grammar had nothing to forbid"


def test_max_tokens_cuts_an_answer_off(make_core):
    answers, texts = run(make_core(), [ask("a", json_schema(COMPANY), max_tokens=3)])
    assert answers["a"].finish == "length"
    assert texts["a"].startswith("{")
    with pytest.raises(json.JSONDecodeError):
        json.loads(texts["a"])


@pytest.mark.parametrize("follows", [False, True])
def test_stop_string_inside_is_honoured(make_core, follows):
    answers, texts = run(make_core(follows=follows), [ask("a", json_schema(COMPANY), stop=('"mood"',))])
    assert answers["a"].finish == "stop"
    assert re.fullmatch(r'\{"up": (true|false), ', texts["a"])


def test_end_token_comes_only_where_the_grammar_is_complete(make_core):
    """The grammar allows an end after each letter; the seeds end at several lengths, and never at none."""
    asked = [ask(str(n), regex("[ab]{1,6}"), temperature=2.0, seed=n) for n in range(30)]
    _, texts = run(make_core(), asked)
    assert all(re.fullmatch("[ab]{1,6}", text) for text in texts.values())
    assert len({len(text) for text in texts.values()}) > 2


def test_matchers_are_dropped_with_their_requests(make_core):
    core = make_core((2,), follows=True)
    masks = core.executor.stages[-1]._masks
    for number in range(3):
        core.submit(ask(str(number), regex("[a-z]{50}")))
    for _ in range(4):
        core.step()
    assert len(masks._matches) == 3
    core.cancel("1")
    run(core, [])
    run(core, [ask("plain", max_tokens=2)])
    assert masks._matches == {}


def test_grammar_that_grows_too_large_ends_its_own_request_alone(make_core):
    """The door lets it pass: its size shows only after its first word."""
    asked = [ask("large", regex("(x|y)z{3}(a{1000}){1000}")), ask("label", choice(LABELS)), ask("plain", max_tokens=8)]
    answers, texts = run(make_core(follows=True), asked)
    assert answers["large"].finish == "grammar"
    assert "too many" in answers["large"].fault
    assert texts["label"] in LABELS
    assert len(answers["plain"].tokens) == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("follows", [False, True])
def test_answers_fit_on_a_gpu(four_layers, follows):
    """In bfloat16 with CUDA graphs, two passes: the first captures them, the second replays."""
    base = load_base(dataclasses.replace(four_layers, compute_dtype="bfloat16"), 16, torch.device("cuda:0"), 0)
    stage = Stage(base.model, range(4), ROWS, torch.bfloat16, vocabulary=Vocabulary(base.tokenizer, END))
    core = EngineCore(
        InProcess([stage]), Scheduler(Limits(cache_rows=ROWS, follows=follows), END, lambda: 3), base.tokenizer
    )
    for _ in range(3):
        answers, texts = run(core, mixed())
        for name, text in texts.items():
            check(name, text, answers[name].finish)


names = st.sampled_from(["a", "be", "case", "day_1", "\u00e9", "x y", 'q"'])
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "number", "minimum": -3, "maximum": 2.5}),
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more}, *[st.integers(0, 200)] * 2),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, *[st.integers(0, 5)] * 2
    ),
    st.sampled_from([{"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}, {"type": "string", "format": "date"}]),
    st.lists(st.sampled_from(["up", "down", 3, None, True, "\u00fc"]), min_size=1, max_size=4, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
)


@st.composite
def objects(draw, parts):
    properties = draw(st.dictionaries(names, parts, max_size=4))
    found = {"type": "object", "properties": properties}
    if properties:
        found["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    return found | draw(st.sampled_from([{}, {"additionalProperties": False}]))


schemas = st.recursive(
    leaves,
    lambda parts: st.one_of(
        objects(parts),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, parts, st.integers(0, 3)),
        st.lists(parts, min_size=1, max_size=3).map(lambda several: {"anyOf": several}),
    ),
    max_leaves=6,
)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    several=st.lists(schemas, min_size=2, max_size=5),
    layout=st.sampled_from(LAYOUTS),
    warm=st.sampled_from([0.0, 1.0, 2.0]),
)
def test_whatever_a_random_model_samples_parses_and_validates(make_core, several, layout, warm):
    cuts, follows = layout
    asked = [
        ask(str(n), json_schema(schema), temperature=warm, seed=n, max_tokens=400) for n, schema in enumerate(several)
    ]
    answers, texts = run(make_core(cuts, follows=follows), asked)
    for number, schema in enumerate(several):
        if answers[str(number)].finish == "length":  # a number may have any number of decimals
            assert len(texts[str(number)]) > 300
            continue
        assert answers[str(number)].finish == "end"
        jsonschema.Draft202012Validator(schema).validate(json.loads(texts[str(number)]))


def test_json_object_is_any_object(make_core):
    asked = [ask(str(n), json_object(), temperature=1.0, seed=n, max_tokens=40) for n in range(30)]
    answers, texts = run(make_core(), asked)
    ended = [json.loads(texts[name]) for name, answer in answers.items() if answer.finish == "end"]
    assert all(isinstance(value, dict) for value in ended)
    assert all(text.startswith("{") for text in texts.values())
    assert ended
