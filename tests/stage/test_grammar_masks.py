"""Masks against a plain reference that tries every token, and the restriction of logits by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import regex as partial_regex
import torch

from finlora.engine.micro_batch import MicroBatch, Output, Sample
from finlora.grammar.compile import choice, json_schema
from finlora.grammar.vocabulary import Vocabulary
from finlora.model.tokenizer import load_tokenizer
from finlora.stage.grammar_masks import GrammarMasks, Masks
from finlora.stage.sampling import restrict, sample

CPU = torch.device("cpu")
END = 1


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(Path(tiny_base))


@pytest.fixture
def masks(tokenizer):
    return GrammarMasks(Vocabulary(tokenizer, END), CPU)


def try_every_token(pattern, text, tokenizer):
    """Plain reference: the tokens after which `text` can still become a match of `pattern`, or is one (END)."""
    allowed = {END} if partial_regex.fullmatch(pattern, text) else set()
    special = set(tokenizer.all_special_ids)
    for token in set(range(len(tokenizer))) - special:
        piece = tokenizer.decode([token])
        if piece and partial_regex.fullmatch(pattern, text + piece, partial=True):
            allowed.add(token)
    return allowed


def batch_of(number, *samples, grammars=(), released=()):
    return MicroBatch(number, samples=list(samples), grammars=list(grammars), released=list(released))


def sample_of(matcher, position):
    return Sample(0, 0.0, 1.0, 0, position, matcher)


def allowed_of(found, index=0):
    bits = found.bits[index].numpy().view("uint8")
    return {8 * byte + bit for byte, word in enumerate(bits) for bit in range(8) if word >> bit & 1}


@pytest.mark.parametrize(
    "pattern", [r"(up|down)( by [0-9]{1,2} %)?", r"[a-z]{2,5}", r"-?(0|[1-9][0-9]*)(\.[0-9]+)?", r"(a|an|and)+!"]
)
def test_masks_are_those_of_trying_every_token(masks, tokenizer, pattern):
    """Without forced tokens: where only one text is possible, llguidance allows only its usual spelling (`no_forcing`)."""
    grammar = json.dumps({"grammars": [{"lark_grammar": f'%llguidance {{"no_forcing": true}}\nstart: /{pattern}/'}]})
    for seed in range(4):
        generator, text = torch.Generator().manual_seed(seed), ""
        for position in range(12):
            batch = batch_of(position, sample_of(seed, position), grammars=[(seed, grammar)] if position == 0 else ())
            found = masks.fill(batch)
            allowed = allowed_of(found)
            assert allowed == try_every_token(pattern, text, tokenizer)
            assert found.faults == []
            token = sorted(allowed)[int(torch.randint(len(allowed), (), generator=generator))]
            masks.follow(batch, lambda token=token, number=position: Output(number, [(token, 0.0)], ()))
            if token == END:
                assert partial_regex.fullmatch(pattern, text)
                break
            text += tokenizer.decode([token])


def test_forced_text_keeps_the_tokenizers_own_spelling(masks, tokenizer):
    """A model continues what it would have written itself, not an odd split of it."""
    ids, batch = (
        tokenizer.encode("negative", add_special_tokens=False),
        batch_of(0, sample_of(0, 0), grammars=[(0, choice(["negative"]))]),
    )
    assert allowed_of(masks.fill(batch)) == {ids[0]}


def test_requests_of_one_micro_batch_have_their_own_masks(masks, tokenizer):
    samples = [sample_of(None, 0), sample_of(4, 0), sample_of(None, 3), sample_of(9, 0)]
    found = masks.fill(batch_of(0, *samples, grammars=[(4, choice(["up"])), (9, choice(["down"]))]))
    assert list(found.rows) == [1, 3]
    starts = ["".join(tokenizer.decode([token]) for token in allowed_of(found, index)) for index in range(2)]
    assert starts[0].startswith("u")
    assert starts[1].startswith("d")
    assert masks.fill(batch_of(1, sample_of(None, 1))) is None


def test_speculative_row_behind_the_end_allows_all_and_is_no_fault(masks, tokenizer):
    first = batch_of(0, sample_of(0, 0), grammars=[(0, choice(["up", ""]))])
    masks.fill(first)
    masks.follow(first, lambda: Output(0, [(END, 0.0)], ()))
    found = masks.fill(batch_of(1, sample_of(0, 1)))
    assert found.faults == []
    assert found.bits.eq(-1).all()


def test_two_micro_batches_may_be_unread(masks):
    """Several stages have several micro-batches in flight, and the last stage may read late."""
    one = batch_of(0, sample_of(0, 0), grammars=[(0, choice(["up", "down"]))])
    two = batch_of(1, sample_of(1, 0), grammars=[(1, choice(["up", "down"]))])
    tokens = []
    for batch in (one, two):
        tokens.append(min(allowed_of(masks.fill(batch)) - {END}))
        masks.follow(batch, lambda batch=batch: Output(batch.number, [(tokens[batch.number], 0.0)], ()))
    found = masks.fill(batch_of(2, sample_of(1, 1), sample_of(0, 1)))
    assert found.faults == []
    assert len(found.rows) == 2


def test_token_that_was_forbidden_is_a_fault(masks):
    """argmax of NaN is a token that no grammar knows of."""
    first = batch_of(0, sample_of(0, 0), grammars=[(0, choice(["up"]))])
    wrong = min(set(range(5, 500)) - allowed_of(masks.fill(first)))
    masks.follow(first, lambda: Output(0, [(wrong, 0.0)], ()))
    ((index, reason),) = masks.fill(batch_of(1, sample_of(0, 1))).faults
    assert index == 0
    assert reason


def test_matcher_is_dropped_when_it_is_released(masks):
    masks.fill(batch_of(0, sample_of(0, 0), grammars=[(0, choice(["up"]))]))
    masks.fill(batch_of(1, released=[0]))
    assert masks._matches == {}


def test_grammar_is_compiled_once(masks, monkeypatch):
    calls = []
    start = Vocabulary.start
    monkeypatch.setattr(Vocabulary, "start", lambda *given: (calls.append(given), start(*given))[1])
    grammar = json_schema({"type": "object", "properties": {"a": {"type": "integer"}}})
    for number in range(3):
        masks.fill(batch_of(number, sample_of(number, 0), grammars=[(number, grammar)]))
    assert len(calls) == 1


@pytest.mark.parametrize("width", [64, 70, 61])
def test_forbidden_tokens_get_minus_infinity_and_other_rows_keep_their_values(width):
    """Also where the head has more columns than the vocabulary has tokens, or the mask more bits than the head has columns."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, width, generator=generator)
    bits = torch.randint(-(2**31), 2**31, (2, 2), generator=generator, dtype=torch.int32)
    found = restrict(logits, Masks([1, 3], bits, ()))
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    for index, row in enumerate((1, 3)):
        for token in range(width):
            word = int(bits[index, token // 32]) if token < 64 else 0
            expected = float(logits[row, token]) if word >> token % 32 & 1 else -torch.inf
            assert float(found[row, token]) == expected
    both = restrict(logits[[1, 3]], Masks([0, 1], bits, ()))
    assert torch.equal(both, found[[1, 3]])


def test_sampled_token_is_allowed_and_keeps_its_unmasked_log_probability():
    logits = torch.zeros(200, 64)
    logits[:, 5] = 4.0
    bits = torch.tensor([[1 << 7 | 1 << 9, 0]] * 200, dtype=torch.int32)
    samples = [Sample(0, 1.0 * (n % 2), 0.9, n, 0, n) for n in range(200)]
    tokens, log_probs = sample(logits, samples, Masks(range(200), bits, ()))
    assert set(tokens.tolist()) == {7, 9}
    assert log_probs.tolist() == pytest.approx([float(logits[0].log_softmax(-1)[7])] * 200)
