"""Random micro-batches of every composition and size for hypothesis, with the scheduler's cache layout."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from finlora.engine.micro_batch import MicroBatch, Sample, Score

VOCABULARY = 500
ADAPTERS = (None, "few", "all")
KINDS = ("token", "chunk", "short", "labels", "answers alone", "long answers")


def add_request(batch, kind, start, cached, size, answers):
    """Append the rows of one request whose cache rows begin at `start`; returns its number of cache rows.

    Args:
        cached: tokens in the cache already.
        size: rows of its prompt in this micro-batch.
        answers: lengths of its label answers without their first tokens.
    """

    def ids(count):
        return [3 + (7 * batch.num_rows + 11 * number) % VOCABULARY for number in range(count)]

    if kind == "token":
        row = batch.add(ids(1), cached, [start + cached], [(start, cached + 1)])
        batch.samples.append(Sample(row, 0.0, 1.0, 0, 0))
        return cached + 1
    end = cached
    if kind != "answers alone":
        end += size
        row = batch.add(ids(size), cached, range(start + cached, start + end), [(start, end)])
        batch.samples.append(Sample(row + size - 1, 0.0, 1.0, 0, 0))
    else:
        end = max(1, cached)
    if kind in ("chunk", "short"):
        return end
    position = start + end
    for length in answers:
        keys = [(start, end), (position, length)]
        if position == start + end and kind != "answers alone":
            keys = [(start, end + length)]  # the first answer's rows follow the prompt's
        row = batch.add(ids(length), end, range(position, position + length), keys)
        batch.scores += [Score(row + number, 5 + number) for number in range(length)]
        position += length
    return position - start


@st.composite
def micro_batches(draw, cache_rows):
    """Draw a micro-batch for a cache of `cache_rows`; its requests are sorted by adapter, those without one first."""
    kinds = sorted(draw(st.sets(st.sampled_from(KINDS), min_size=1, max_size=3)))
    adapters = draw(st.sampled_from([(None,), ("all",), ADAPTERS]))
    most_requests = draw(st.sampled_from([1, 2, 4, 12, 40, 70, 100, 140]))
    longest = draw(st.sampled_from([2, 16, 130, 600]))
    most_rows = draw(st.sampled_from([64, 200, 500, 1000, 2048]))
    rng = random.Random(draw(st.integers(0, 2**32)))
    batch, start = MicroBatch(0), 0
    owners = sorted((rng.choice(adapters) for _ in range(rng.randint(1, most_requests))), key=lambda name: name or "")
    for adapter in owners:
        kind, cached, before = rng.choice(kinds), rng.randint(0, 9), batch.num_rows
        size = rng.randint(1, min(longest, 3 if kind == "short" else longest))
        answers = [rng.randint(1, 12 if kind == "long answers" else 3) for _ in range(rng.randint(1, 4))]
        fits = start + cached + size + sum(answers) + 16 <= cache_rows
        if not fits or (before and before + size + sum(answers) > most_rows):
            continue
        start += -(-add_request(batch, kind, start, cached, size, answers) // 16) * 16
        batch.adapters.append((adapter, batch.num_rows - before))
    return batch
