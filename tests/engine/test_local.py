"""The local engine against transformers: each choice as if it stood alone, and greedy decoding token for token."""

from __future__ import annotations

import pytest
import torch

from finlora.config import LoraConfig, ModelConfig
from finlora.data.encode import encode_answer, encode_prompt
from finlora.engine.local import LocalEngine
from finlora.model.base import load_base
from finlora.model.lora import attach_lora, trainable_parameters

CPU = torch.device("cpu")
PROMPTS = [
    "Profit rose at Brunholt .",
    "x",
    "Instruction: What is the sentiment of this news?\nInput: Sales fell 3 %\nAnswer: ",
]
CHOICES = [
    ["negative", "neutral", "positive"],
    ["Yes", "No"],
    ["strong negative", "neutral", "mildly positive outlook"],
]


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), 16, CPU, 0)


@pytest.fixture(scope="module", params=["base", "adapter"])
def engine(request, tiny_base):
    base = load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), 16, CPU, 0)
    model = base.model
    if request.param == "adapter":
        model = attach_lora(model, LoraConfig(rank=4, dropout=0.5), model.name_or_path, 1).eval()
        torch.manual_seed(3)
        for parameter in trainable_parameters(model).values():
            parameter.data = torch.randn_like(parameter) * 0.1
    return LocalEngine(model, base.tokenizer, "raw", CPU)


@pytest.fixture(scope="module")
def prompts(base):
    return [encode_prompt(text, base.tokenizer, "raw") for text in PROMPTS]


@pytest.fixture(scope="module")
def choices(base):
    return [[encode_answer(text, base.tokenizer, "raw") for text in own] for own in CHOICES]


def score_alone(model, prompt, choice):
    """Log probability of a choice after its prompt, in a forward pass of its own."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *choice]])).logits[0].double()
    log_probs = torch.log_softmax(logits, dim=-1)
    return sum(float(log_probs[len(prompt) - 1 + place, token]) for place, token in enumerate(choice))


def test_scores_equal_a_forward_pass_for_each_choice(engine, prompts, choices):
    assert len({len(prompt) for prompt in prompts}) == 3
    assert len({len(choice) for own in choices for choice in own}) > 2
    scores = engine.score_choices(prompts, choices)
    for prompt, own, row in zip(prompts, choices, scores, strict=True):
        alone = torch.tensor([score_alone(engine.model, prompt, choice) for choice in own], dtype=torch.float64)
        assert row == pytest.approx(torch.softmax(alone, dim=0).tolist(), rel=1e-5, abs=1e-8)


def test_scores_are_probabilities_that_neighbours_do_not_change(engine, prompts, choices):
    together = engine.score_choices(prompts, choices)
    assert [sum(row) for row in together] == pytest.approx([1.0] * 3)
    for number in range(3):
        (alone,) = engine.score_choices([prompts[number]], [choices[number]])
        assert alone == pytest.approx(together[number], rel=1e-5)
    (backwards,) = engine.score_choices([prompts[0]], [choices[0][::-1]])
    assert backwards[::-1] == pytest.approx(together[0], rel=1e-5)


def test_bf16_scores_stay_near_float32(tiny_base, base, prompts, choices):
    rough = load_base(ModelConfig(base=str(tiny_base)), 16, CPU, 0)
    exact = LocalEngine(base.model, base.tokenizer, "raw", CPU).score_choices(prompts, choices)
    rounded = LocalEngine(rough.model, rough.tokenizer, "raw", CPU).score_choices(prompts, choices)
    assert [value for row in rounded for value in row] == pytest.approx([v for row in exact for v in row], abs=0.05)


def test_generation_equals_transformers_greedy_one_prompt_at_a_time(engine, prompts):
    tokenizer = engine.tokenizer
    texts = engine.generate(prompts, max_new_tokens=12)
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            output = engine.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        assert text == tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    assert any(texts)


def test_generation_stops_at_the_end_token(base, prompts):
    engine = LocalEngine(base.model, base.tokenizer, "raw", CPU)
    with torch.inference_mode():
        row = base.model.generate(
            input_ids=torch.tensor([prompts[0]]),
            attention_mask=torch.ones(1, len(prompts[0]), dtype=torch.long),
            do_sample=False,
            max_new_tokens=8,
            pad_token_id=0,
            eos_token_id=-1,
        )[0, len(prompts[0]) :].tolist()
    assert len(row) == 8
    # An untrained base may open with special tokens, which no text shows: the first plain one serves as end token.
    place = next(index for index, token in enumerate(row) if token not in base.tokenizer.all_special_ids)
    engine.end_token_id = row[place]
    stopped, whole = (base.tokenizer.decode(part, skip_special_tokens=True) for part in (row[: place + 1], row))
    assert engine.generate([prompts[0]], 8) == [stopped]
    assert stopped != whole


def test_generated_text_is_kept_as_the_model_wrote_it(base, monkeypatch):
    """Llama 3's tokenizer settings ask for a clean-up that pulls full stops and `n't` to the word before."""
    text = "It rose 3 % . They did n't say why ."
    ids = base.tokenizer.encode(text, add_special_tokens=False)

    class Writes:
        def generate(self, input_ids, **_settings):
            return torch.cat([input_ids, torch.tensor([ids])], dim=1)

    monkeypatch.setattr(base.tokenizer, "clean_up_tokenization_spaces", True)
    engine = LocalEngine(base.model, base.tokenizer, "raw", CPU)
    engine.model = Writes()
    assert engine.generate([(1, 2)], 50) == [text]
