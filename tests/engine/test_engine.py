"""Engine against transformers: tokens and probabilities for any stages, batches and adapters."""

from __future__ import annotations

import pytest
import torch
from engine_requests import END, RAGGED, generate_alone, make_requests, run, score_alone, tokens_of

from finlora.engine.request import Request, Sampling
from finlora.errors import AdapterError
from finlora.stage.adapter_weights import Bank


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_greedy_tokens_equal_transformers_on_any_number_of_stages(make_core, plain, num_stages):
    answers, _ = run(make_core(num_stages), make_requests())
    for number, prompt in enumerate(RAGGED):
        assert tokens_of(answers[f"r{number}"]) == generate_alone(plain(), prompt, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_stages_equal_the_quantised_model(make_core, plain, bits):
    """Within 0.5 %: on CPU bitsandbytes' own products of inference round activations, to bfloat16 at 4 bit."""
    choices = ((5, END), (6, 7, END))
    answers, _ = run(make_core(2, bits), [Request(id="c", prompt_ids=RAGGED[2], choices=choices)])
    expected = [score_alone(plain(bits), RAGGED[2], choice) for choice in choices]
    assert list(answers["c"].log_probs) == pytest.approx(expected, rel=5e-3)
    assert list(answers["c"].log_probs) != pytest.approx(
        [score_alone(plain(), RAGGED[2], c) for c in choices], rel=5e-3
    )


def test_unpacked_weights_give_the_same_numbers(make_core):
    request = Request(id="c", prompt_ids=RAGGED[2], choices=((5, END), (6, 7, END)))
    packed, unpacked = (run(make_core(1, 4, keep_unpacked=flag), [request])[0]["c"].log_probs for flag in (False, True))
    assert list(packed) == pytest.approx(list(unpacked), rel=1e-6)


@pytest.mark.parametrize("num_stages", [1, 4])
def test_logits_equal_transformers(make_core, plain, num_stages):
    core = make_core(num_stages)
    for request in make_requests():
        core.submit(request)
    batch, hidden = core.scheduler.next_batch(), None
    for stage in core.executor.stages:
        hidden = stage.forward(batch, hidden)
    own = core.executor.stages[-1].compute_logits(hidden).split([len(prompt) for prompt in RAGGED])
    for prompt, logits in zip(RAGGED, own, strict=True):
        with torch.no_grad():
            expected = plain()(input_ids=torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("limits", [{}, {"max_batch_tokens": 16}, {"keeps_prefixes": False}])
def test_choices_of_several_tokens_are_scored_in_full(make_core, plain, limits):
    choices = ((9, END), (10, 11, 12, END), (13,), (10, 11, END))
    prompts = [RAGGED[3], (*RAGGED[3][:40], 8, 8), RAGGED[5]]
    requests = [Request(id=f"r{n}", prompt_ids=prompt, choices=choices) for n, prompt in enumerate(prompts)]
    answers, _ = run(make_core(2, **limits), requests)
    for number, prompt in enumerate(prompts):
        answer = answers[f"r{number}"]
        assert answer.finish == "choice"
        expected = [score_alone(plain(), prompt, choice) for choice in choices]
        assert list(answer.log_probs) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_adapters_in_one_batch_answer_as_alone(make_core, plain):
    names = [None, "few", "all", "few", None, "all"]
    requests = [
        Request(id=f"r{n}", prompt_ids=prompt, adapter=name, sampling=Sampling(max_tokens=6))
        for n, (prompt, name) in enumerate(zip(RAGGED, names, strict=True))
    ]
    core = make_core(2)
    core.submit(requests[0])
    answers, _ = run(core, requests[1:])
    expected = {n: generate_alone(plain(adapter=name), RAGGED[n], 6) for n, name in enumerate(names)}
    assert {n: tokens_of(answers[f"r{n}"]) for n in expected} == expected
    assert expected[1] != generate_alone(plain(), RAGGED[1], 6)


@pytest.mark.parametrize("num_stages", [1, 4])
def test_filters_change_their_own_request_alone(make_core, plain, num_stages):
    """Greedy answers of transformers' model with the same bias, beside plain ones in one batch."""
    prompt, other = RAGGED[2], RAGGED[3]
    first, *_ = generate_alone(plain(), prompt, 4)
    biased = Sampling(max_tokens=4, logit_bias=((first, -100.0), (77, 100.0)))
    requests = [
        Request(id="biased", prompt_ids=prompt, sampling=biased),
        Request(id="plain", prompt_ids=prompt, sampling=Sampling(max_tokens=4, num_top=3)),
        Request(id="one", prompt_ids=prompt, sampling=Sampling(max_tokens=4, temperature=1.5, top_k=1, seed=3)),
        Request(id="other", prompt_ids=other, sampling=Sampling(max_tokens=4)),
    ]
    answers, _ = run(make_core(num_stages), requests)
    assert tokens_of(answers["biased"]) == [77] * 4
    assert tokens_of(answers["plain"]) == tokens_of(answers["one"]) == generate_alone(plain(), prompt, 4)
    assert tokens_of(answers["other"]) == generate_alone(plain(), other, 4)
    assert [token.top for token in answers["other"].tokens] == [()] * 4
    with torch.no_grad():
        wanted = torch.log_softmax(plain()(input_ids=torch.tensor([[*prompt, first]])).logits[0, -2:], -1).topk(3)
    for token, values, ids in zip(
        answers["plain"].tokens, wanted.values.tolist(), wanted.indices.tolist(), strict=False
    ):
        assert [each for each, _ in token.top] == ids
        assert [value for _, value in token.top] == pytest.approx(values, rel=1e-4, abs=1e-4)
        assert token.top[0] == (token.id, pytest.approx(token.log_prob, abs=1e-5)), "greedy takes the likeliest"


@pytest.mark.parametrize("num_stages", [1, 4])
def test_penalties_equal_those_of_a_loop_over_transformers_model(make_core, plain, num_stages):
    """Plain reference: logits less presence and count times frequency (OpenAI's API reference), then the likeliest token."""
    net, found = plain(), []
    wish = ((77, 60.0), (78, 59.0), (79, 58.5))  # without penalties the answer is 77 alone
    for _ in range(12):
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([[*RAGGED[2], *found]])).logits[0, -1]
        for token, bias in wish:
            logits[token] += bias
        for token in set(found):
            logits[token] -= 0.8 + found.count(token) * 0.7
        found.append(int(logits.argmax()))
    sampling = Sampling(max_tokens=12, presence_penalty=0.8, frequency_penalty=0.7, logit_bias=wish)
    requests = [
        Request(id="fined", prompt_ids=RAGGED[2], sampling=sampling),
        Request(id="plain", prompt_ids=RAGGED[2], sampling=Sampling(max_tokens=12)),
    ]
    answers, _ = run(make_core(num_stages), requests)
    assert tokens_of(answers["fined"]) == found
    assert set(found) == {77, 78, 79}
    assert tokens_of(answers["plain"]) == generate_alone(net, RAGGED[2], 12)


def test_end_is_not_sampled_before_min_tokens_and_may_be_ignored(make_core):
    wish = ((END, 100.0),)
    settings = {
        "ends": Sampling(max_tokens=6, logit_bias=wish),
        "later": Sampling(max_tokens=6, logit_bias=wish, min_tokens=3),
        "ignored": Sampling(max_tokens=6, logit_bias=wish, ignore_end=True),
    }
    answers, _ = run(make_core(2), [Request(id=n, prompt_ids=RAGGED[2], sampling=s) for n, s in settings.items()])
    assert [(answers[name].finish, len(answers[name].tokens)) for name in settings] == [
        ("end", 0),
        ("end", 3),
        ("length", 6),
    ]
    assert tokens_of(answers["ignored"]) == [END] * 6


@pytest.mark.parametrize("keeps_prefixes", [True, False])
def test_prefix_cache_changes_no_answer(make_core, plain, keeps_prefixes):
    prompts = [(*RAGGED[5], *range(100 + n, 104 + n)) for n in range(5)]
    core = make_core(1, keeps_prefixes=keeps_prefixes)
    answers, _ = run(core, make_requests(prompts, 5))
    for number, prompt in enumerate(prompts):
        assert tokens_of(answers[f"r{number}"]) == generate_alone(plain(), prompt, 5)
    cached = [answers[f"r{number}"].num_cached for number in range(5)]
    assert cached == ([0, 90, 90, 90, 90] if keeps_prefixes else [0] * 5)


def test_cancelled_request_changes_no_other_answer(make_core, plain):
    core = make_core(2)
    answers, _ = run(core, make_requests(count=10), lambda step: core.cancel("r2") if step == 5 else None)
    assert answers["r2"].finish == "cancelled"
    assert 0 < len(answers["r2"].tokens) < 10
    for number in (0, 1, 3, 4, 5):
        assert tokens_of(answers[f"r{number}"]) == generate_alone(plain(), RAGGED[number], 10)


def test_text_streams_and_ends_at_a_stop_string(make_core):
    core = make_core()
    (request,) = make_requests([RAGGED[1]], 12)
    answers, texts = run(core, [request])
    whole = core.tokenizer.decode(tokens_of(answers["r0"]), skip_special_tokens=True)
    assert texts["r0"] == whole
    stop = whole[len(whole) // 2 :][:3]
    stopped = Request(id="s", prompt_ids=RAGGED[1], sampling=Sampling(max_tokens=12, stop=(stop,)))
    answers, texts = run(core, [stopped])
    assert answers["s"].finish == "stop"
    assert texts["s"] == whole[: whole.index(stop)]


def test_adapters_are_loaded_and_unloaded_by_name(make_core, adapter_folders):
    core = make_core()
    with pytest.raises(AdapterError, match=r"adapter 'few' is loaded already, from .*few: unload it first"):
        core.load_adapter("few", adapter_folders["few"])
    with pytest.raises(AdapterError, match=r"adapter 'nobody' is not loaded; loaded are: all, few"):
        core.submit(Request(id="r", prompt_ids=(5,), adapter="nobody"))
    core.submit(Request(id="r", prompt_ids=(5, 6, 7), adapter="few"))
    with pytest.raises(AdapterError, match=r"requests still use adapter 'few'"):
        core.unload_adapter("few")
    run(core, [])
    core.unload_adapter("few")
    assert sorted(core.adapters) == ["all"]
    core.load_adapter("few", adapter_folders["all"])
    answers, _ = run(core, [Request(id="again", prompt_ids=(5, 6, 7), adapter="few")])
    assert answers["again"].num_cached == 0  # another adapter has this name now


def adapters_of(core):
    """Names of each stage's adapters, and the non-zero rows of its tensors."""
    return [
        (
            sorted(stage.adapters),
            {key: down.count_nonzero(dim=(1, 2)).nonzero().tolist() for key, (down, _) in stage.bank._pairs.items()},
        )
        for stage in core.executor.stages
    ]


def test_adapter_that_a_later_stage_refuses_is_unloaded_from_all(make_core, plain, late_fault, adapter_folders):
    core = make_core(2)
    before = adapters_of(core)
    with pytest.raises(AdapterError, match=r"layers.3.self_attn.v_proj as \[24, 4\]"):
        core.load_adapter("late", late_fault)
    assert adapters_of(core) == before
    core.load_adapter("late", adapter_folders["few"])  # the name is free
    answers, _ = run(core, make_requests(count=4, adapter="late"))
    assert tokens_of(answers["r2"]) == generate_alone(plain(adapter="few"), RAGGED[2], 4)


def test_adapter_that_does_not_fit_into_memory_is_unloaded_from_all(make_core, plain, adapter_folders, monkeypatch):
    core = make_core(2)
    core.load_adapter("third", adapter_folders["few"])  # a fourth needs larger tensors
    before = adapters_of(core)
    grow, calls = Bank._grow, []

    def grow_until_full(self, *tensors):
        calls.append(self)
        if len(calls) == 11:  # of eight on each stage: three on the second
            raise torch.OutOfMemoryError("no room")
        return grow(self, *tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Bank, "_grow", grow_until_full)
        with pytest.raises(AdapterError, match=r"does not fit into the memory that is left on cpu \(no room\)"):
            core.load_adapter("fourth", adapter_folders["all"])
    assert len({id(bank) for bank in calls}) == 2
    assert adapters_of(core) == before
    answers, _ = run(core, make_requests(count=4, adapter="all"))
    assert tokens_of(answers["r2"]) == generate_alone(plain(adapter="all"), RAGGED[2], 4)
    core.load_adapter("fourth", adapter_folders["few"])
    answers, _ = run(core, make_requests(count=4, adapter="fourth"))
    assert tokens_of(answers["r2"]) == generate_alone(plain(adapter="few"), RAGGED[2], 4)
