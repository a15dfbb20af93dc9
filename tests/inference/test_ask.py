"""`finlora ask` from question to reply on the tiny base: adapters, contract checks, and the same replies from stages."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from finlora.config import LoraConfig
from finlora.data.grounding import find_quote
from finlora.data.sets.catalog import make_question
from finlora.engine.request import Sampling
from finlora.errors import AdapterError, ConfigError
from finlora.inference.ask import ask, rank_choices
from finlora.model.base import load_base
from finlora.model.contract import make_contract, write_contract
from finlora.model.lora import attach_lora, save_adapter, trainable_parameters
from finlora.terminal import show_reply

QUESTION = make_question("fpb", "Profit rose", None)
SAMPLING = Sampling(max_tokens=6)


@pytest.fixture
def adapter(make_config, tmp_path):
    config = make_config()
    base = load_base(config.model, 16, torch.device("cpu"), 0)
    model = attach_lora(base.model, LoraConfig(), config.model.base, 1)
    torch.manual_seed(4)
    for parameter in trainable_parameters(model).values():
        parameter.data = torch.randn_like(parameter) * 2
    size = save_adapter(model, tmp_path / "adapter")
    write_contract(
        tmp_path / "adapter", make_contract(base, config.model.base, LoraConfig(), "raw", {"t": "x"}, 5, size, {})
    )
    return tmp_path / "adapter"


def ignore(_piece):
    """Discard streamed text."""


def test_probabilities_are_ranked_and_change_with_the_adapter(make_config, adapter):
    replies = [ask(make_config(), chosen, QUESTION, SAMPLING, 1, ignore) for chosen in (None, adapter)]
    for reply in replies:
        assert set(reply.probabilities) == {"negative", "neutral", "positive"}
        assert sum(reply.probabilities.values()) == pytest.approx(1)
        assert list(reply.probabilities.values()) == sorted(reply.probabilities.values(), reverse=True)
        assert reply.text == next(iter(reply.probabilities))
        assert reply.finish == "choice"
    assert replies[0].probabilities != pytest.approx(replies[1].probabilities, abs=1e-3)


def test_free_text_streams(make_config):
    pieces = []
    reply = ask(make_config(), None, make_question(None, "Profit rose", None), SAMPLING, 1, pieces.append)
    assert reply.text == "".join(pieces)
    assert (reply.probabilities, reply.finish in ("length", "end")) == ({}, True)
    assert reply.quote == find_quote(reply.text, "Profit rose")


def test_stage_actors_give_the_same_probabilities(make_config, adapter, ray_instance):
    one, two = (ask(make_config(), adapter, QUESTION, SAMPLING, stages, ignore) for stages in (1, 2))
    assert one.probabilities == pytest.approx(two.probabilities, rel=1e-5)


def test_adapter_of_another_template_or_base_is_refused_before_the_base_loads(
    make_config, dated_base, adapter, monkeypatch
):
    monkeypatch.setattr("finlora.inference.open_base.open_executor", None)
    with pytest.raises(AdapterError, match=r"template is chat, trained with raw"):
        ask(make_config(f"model.base={dated_base}", "model.template=chat"), adapter, QUESTION, SAMPLING, 1, ignore)
    with pytest.raises(AdapterError, match=r"absent does not exist"):
        ask(make_config(), adapter.parent / "absent", QUESTION, SAMPLING, 1, ignore)


def test_likeliest_choice_comes_first_even_for_large_negative_sums():
    assert rank_choices(["a", "b"], [-1000.0, -999.0]) == pytest.approx({"b": 0.7311, "a": 0.2689}, abs=1e-4)


def test_bars_show_answer_and_share():
    console = Console(width=100, record=True, file=io.StringIO())
    show_reply({"positive": 0.75, "[odd]": 0.25}, None, console, is_quoted=False)
    text = console.export_text()
    assert "positive         75.0%   " + "█" * 30 in text
    assert "[odd]" in text


@pytest.mark.parametrize(
    ("quote", "words"), [((1200, 1204), "at characters 1,200 to 1,204 of"), (None, "not found in")]
)
def test_answer_from_a_filing_shows_its_position(quote, words):
    console = Console(width=100, record=True, file=io.StringIO())
    show_reply({}, quote, console, is_quoted=True)
    assert f"Answer {words} the text asked about." in console.export_text()


def test_sampling_is_checked():
    with pytest.raises(Exception, match=r"top_p=0: expected 0 < top_p <= 1"):
        dataclasses.replace(SAMPLING, top_p=0)


@pytest.mark.parametrize("limit", [64, 100_000])
def test_text_too_long_is_refused_before_the_base_is_loaded(make_config, monkeypatch, limit):
    monkeypatch.setattr("finlora.inference.open_base.open_engine", None)
    longest = min(limit, 8192)
    question = make_question("fpb", "Profit rose. " * 2000, None)
    with pytest.raises(
        ConfigError, match=rf"tokens with the room for its answer, and the model {longest:,}: shorten the text"
    ):
        ask(make_config(f"model.max_seq_len={limit}"), None, question, SAMPLING, 1, ignore)
