"""Packs: every example complete and separate, the shared prefix once, and padding without effect."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finlora.data.encode import IGNORED, Encoded
from finlora.data.pack_size import form_of, pad_pack
from finlora.data.packing import (
    MIN_SHARED_PREFIX,
    pack_examples,
    shared_prefix_length,
    split_by_tokens,
)

SHARED = tuple(range(1000, 1012))


def make(num_examples=5, shared=SHARED):
    """Examples of different lengths with answers of one to three tokens."""
    return [
        Encoded(shared + tuple(range(10 * n, 10 * n + 3 + n)), tuple(range(500 + n, 501 + n + n % 3)))
        for n in range(num_examples)
    ]


def visible_tokens(pack, segments):
    """For each query of each segment, the tokens that it sees, in order."""
    keys = pack.input_ids if segments.key_rows is None else pack.input_ids[segments.key_rows]
    seen = []
    for length, own in zip(segments.query_lengths, keys.split(segments.key_lengths), strict=True):
        seen += [own[: len(own) - length + position + 1].tolist() for position in range(length)]
    return seen


def alone(items):
    """For each example, what each of its tokens but the last sees."""
    return [
        [list((item.prompt_ids + item.answer_ids)[: position + 1]) for position in range(item.num_tokens - 1)]
        for item in items
    ]


@pytest.mark.parametrize("share_prefix", [False, True])
def test_token_sees_what_it_sees_alone(share_prefix):
    items = make()
    pack = pack_examples(items, share_prefix=share_prefix)
    start = len(SHARED) if share_prefix else 0
    expected = [seen for example in alone(items) for seen in example[start:]]
    assert visible_tokens(pack, pack.segments)[start:] == expected
    # In the last layer only the label rows are queries.
    answers = [
        seen for item, example in zip(items, alone(items), strict=True) for seen in example[-len(item.answer_ids) :]
    ]
    assert visible_tokens(pack, pack.last_segments) == answers
    assert pack.targets.tolist() == [token for item in items for token in item.answer_ids]
    assert [seen[-1] for seen in answers] == pack.input_ids[pack.label_rows].tolist()


@pytest.mark.parametrize("share_prefix", [False, True])
def test_positions_are_those_of_the_example(share_prefix):
    pack = pack_examples(make(), share_prefix=share_prefix)
    seen = visible_tokens(pack, pack.segments)
    assert pack.positions.tolist() == [len(tokens) - 1 for tokens in seen]


def test_shared_prefix_occurs_once_and_the_end_token_is_left_out():
    items = make()
    plain, shared = pack_examples(items, share_prefix=False), pack_examples(items, share_prefix=True)
    assert len(plain.input_ids) == sum(item.num_tokens - 1 for item in items)
    assert len(plain.input_ids) - len(shared.input_ids) == (len(items) - 1) * len(SHARED)
    assert plain.num_tokens == shared.num_tokens == sum(item.num_tokens for item in items)


def test_short_prefix_is_not_shared():
    items = make(shared=SHARED[: MIN_SHARED_PREFIX - 1])
    assert pack_examples(items, share_prefix=True).segments.key_rows is None


def test_prefix_leaves_each_prompt_a_token():
    same = Encoded(SHARED, (7,))
    assert shared_prefix_length([same, same]) == len(SHARED) - 1
    assert shared_prefix_length([same, Encoded((*SHARED, 5), (7,))]) == len(SHARED) - 1
    assert shared_prefix_length([same]) == 0
    assert shared_prefix_length([same, Encoded((9,), (7,))]) == 0


def test_slots_lead_back_to_the_rows():
    segments = pack_examples(make(), share_prefix=True).segments
    num_prefix = len(SHARED)
    for row in range(num_prefix):
        assert (segments.key_rows[segments.prefix_slots[:, row]] == row).all()
    assert segments.key_rows[segments.own_slots].tolist() == list(range(num_prefix, int(segments.key_rows.max()) + 1))


@pytest.mark.parametrize("share_prefix", [False, True])
def test_padding_is_seen_by_nobody_and_predicts_nothing(share_prefix):
    pack = pack_examples(make(), share_prefix=share_prefix)
    padded = pad_pack(pack)
    num_rows = len(pack.input_ids)
    assert num_rows < len(padded.input_ids) <= num_rows * 1.125 + 32
    for part, own in ((padded.segments, pack.segments), (padded.last_segments, pack.last_segments)):
        num_queries = sum(own.query_lengths)
        assert visible_tokens(padded, part)[:num_queries] == visible_tokens(pack, own)
        assert part.max_queries >= max(part.query_lengths)
        assert part.max_keys >= max(part.key_lengths)
    num_labels = len(pack.label_rows)
    assert padded.targets[:num_labels].tolist() == pack.targets.tolist()
    assert set(padded.targets[num_labels:].tolist()) == {IGNORED}
    assert len(set(padded.label_rows.tolist())) == len(padded.label_rows)
    assert int(padded.label_rows[num_labels:].min()) >= num_rows


def test_form_tells_packs_of_other_sizes_apart_and_no_others():
    same = pad_pack(pack_examples(make(), share_prefix=True))
    other_tokens = [Encoded(tuple(token + 1 for token in item.prompt_ids), item.answer_ids) for item in make()]
    assert pad_pack(pack_examples(other_tokens, share_prefix=True)).form == same.form
    assert pad_pack(pack_examples(make(4), share_prefix=True)).form != same.form
    assert pad_pack(pack_examples(make(), share_prefix=False)).form != same.form


def test_few_forms_serve_many_lengths():
    forms = {
        pad_pack(pack_examples([Encoded(tuple(range(length)), (1,))], share_prefix=False)).form
        for length in range(256, 512)
    }
    assert len(forms) <= 18


def test_moving_reaches_every_tensor():
    pack = pack_examples(make(), share_prefix=True)
    assert {tensor.device.type for tensor in pack.to(torch.device("meta")).tensors()} == {"meta"}
    assert len(pack.tensors()) == 4 + 5 + 5


def test_split_keeps_order_and_the_limit():
    lengths = [5, 4, 3, 9, 1, 1]
    assert split_by_tokens([0, 1, 2, 4, 5], lengths, 9) == [[0, 1], [2, 4, 5]]
    assert split_by_tokens([2, 3, 4], lengths, 8) == [[2], [3], [4]]
    assert split_by_tokens([], lengths, 8) == []


@st.composite
def examples(draw):
    """Examples of any lengths that may begin alike, as far as they like."""
    shared = tuple(draw(st.lists(st.integers(1000, 1003), max_size=30)))
    own = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(tuple)
    answer = st.lists(st.integers(500, 503), min_size=1, max_size=4).map(tuple)
    return [Encoded(shared + draw(own), draw(answer)) for _ in range(draw(st.integers(1, 7)))]


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(items=examples(), share_prefix=st.booleans())
def test_any_examples_see_in_a_pack_what_they_see_alone(items, share_prefix):
    whole = pack_examples(items, share_prefix=share_prefix)
    for pack in (whole, pad_pack(whole)):
        seen = visible_tokens(pack, pack.segments)
        expected = alone(items)
        assert all(example[-1] in seen for example in expected)
        answers = [
            each for item, example in zip(items, expected, strict=True) for each in example[-len(item.answer_ids) :]
        ]
        targets = [token for item in items for token in item.answer_ids]
        found = visible_tokens(pack, pack.last_segments)
        assert found[: len(answers)] == answers
        assert pack.targets.tolist()[: len(targets)] == targets
        assert all(target == IGNORED for target in pack.targets.tolist()[len(targets) :])


@given(lengths=st.lists(st.integers(1, 50), max_size=20), most=st.integers(1, 60))
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_any_examples_are_split_in_order_within_the_bound(lengths, most):
    parts = split_by_tokens(range(len(lengths)), lengths, most)
    assert [index for part in parts for index in part] == list(range(len(lengths)))
    assert all(len(part) == 1 or sum(lengths[index] for index in part) <= most for part in parts)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_form_is_known_before_the_pack_is_built(share_prefix):
    rng = random.Random(share_prefix)
    for number in range(60):
        prefix = tuple(rng.choices(range(300), k=rng.choice((0, 5, 20, 400))))
        items = [
            Encoded(
                (*prefix, *rng.choices(range(300), k=rng.randint(1, 200))),
                tuple(rng.choices(range(300), k=rng.randint(1, 20))),
                weight=2.0 if number % 3 == 0 else 1.0,
            )
            for _ in range(rng.randint(1, 20))
        ]
        built = pad_pack(pack_examples(items, share_prefix=share_prefix))
        assert form_of(items, share_prefix=share_prefix) == built.form
