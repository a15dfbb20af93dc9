"""Chat templates: the day that is set comes out on any day, in each form in which a template asks for it."""

from __future__ import annotations

import pytest

from finlora.data.chat_template import DEFAULT_DATE, choose_date, fix_inputs, render_turns
from finlora.data.encode import encode_prompt
from finlora.errors import ModelError
from finlora.model.tokenizer import LLAMA3_CHAT_TEMPLATE, load_tokenizer

TURNS = [{"role": "user", "content": "Profit rose"}]
# As in Llama 3.1: the template holds a date, which the caller may replace.
OWN_DATE = (
    '{% if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}'
    "{{ date_string }} {{ messages[0].content }}"
)


@pytest.fixture
def make_tokenizer(tiny_base):
    def make(template):
        tokenizer = load_tokenizer(tiny_base)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def dated(dated_base):
    return load_tokenizer(dated_base)


def test_clock_is_not_asked(dated, pretend_day):
    found = []
    for day in ("2026-11-30", "2026-12-01"):
        pretend_day(day)
        own = dated.apply_chat_template(TURNS, tokenize=False)
        assert own.startswith(
            f"<|begin_of_text|>Today Date: {'30 Nov' if day.endswith('30') else '01 Dec'} 2026"
        )  # the clock is simulated
        date = choose_date(dated, "chat", None)
        found.append((date, render_turns(TURNS, dated, date), encode_prompt("Profit rose", dated, "chat", date)))
    assert found[0] == found[1]
    assert found[0][:2] == (
        DEFAULT_DATE,
        "<|begin_of_text|>Today Date: 26 Jul 2024\n\n[user] Profit rose\n[assistant] ",
    )
    assert encode_prompt("Profit rose", dated, "chat") == found[0][2]  # nor where no date is handed on


THINKING = {
    "qwen3": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
    "smollm3": "{%- if enable_thinking is not defined -%}\n{%- set enable_thinking = true -%}\n{%- endif -%}\n"
    '{%- set today = strftime_now("%d %B %Y") -%}\n{{- today }}{% for m in messages %}\n{{ m.content }}{% endfor %}'
    "{%- if not enable_thinking %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}",
}
"""Lines of the templates of Qwen3 and SmolLM3 that turn thinking off.
Source: tokenizer_config.json of https://huggingface.co/Qwen/Qwen3-8B, chat_template.jinja of HuggingFaceTB/SmolLM3-3B."""


@pytest.mark.parametrize("name", THINKING)
def test_thinking_is_off_here_and_in_folders_for_others(make_tokenizer, pretend_day, name):
    tokenizer = make_tokenizer(THINKING[name])
    date = choose_date(tokenizer, "chat", None)
    pretend_day(date or "2026-12-01")
    both = [
        tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False, enable_thinking=thinks)
        for thinks in (True, False)
    ]
    assert both[0] != both[1]
    assert render_turns(TURNS, tokenizer, date) == both[1]
    fix_inputs(tokenizer, date)
    assert tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False) == both[1]
    assert render_turns(TURNS, tokenizer, choose_date(tokenizer, "chat", None)) == both[1]


TEMPLATES = {
    "two forms": '{{ strftime_now("%Y-%m-%d") }}|{{ strftime_now(\'%d "%B"\') }}',
    "in a loop and a macro": '{% macro day() %}{{ strftime_now("%A") }}{% endmacro %}'
    "{% for m in messages %}{{ day() }}{{ m.content }}{% endfor %}",
    "white space in front": '\n  {% if messages %}{{ strftime_now("%d/%m") }}{% endif %}\n  x',
    "transformers' tag": "{% for m in messages %}{% generation %}"
    '{{ strftime_now("%j") }}{% endgeneration %}{% break %}{% endfor %}',
}


@pytest.mark.parametrize("name", [*TEMPLATES, "as Llama 3.2's"])
def test_text_is_what_transformers_writes_on_that_day(make_tokenizer, dated, pretend_day, name):
    tokenizer = make_tokenizer(TEMPLATES.get(name, dated.chat_template))
    pretend_day("2025-03-09")
    expected = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    pretend_day("1999-01-01")
    assert render_turns(TURNS, tokenizer, "2025-03-09") == expected
    # A folder that is written with the date gives it to any program, without a clock.
    fix_inputs(tokenizer, "2025-03-09")
    assert tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False) == expected
    assert choose_date(tokenizer, "chat", None) is None


def test_templates_own_date_stays_unless_one_is_set(make_tokenizer):
    tokenizer = make_tokenizer(OWN_DATE)
    assert choose_date(tokenizer, "chat", None) is None
    assert render_turns(TURNS, tokenizer, None) == "26 Jul 2024 Profit rose"
    date = choose_date(tokenizer, "chat", "2025-03-09")
    assert render_turns(TURNS, tokenizer, date) == "09 Mar 2025 Profit rose"
    fix_inputs(tokenizer, date)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "09 Mar 2025 Profit rose"


def test_template_without_a_date_takes_none(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA3_CHAT_TEMPLATE)
    assert choose_date(tokenizer, "chat", None) is None
    assert choose_date(tokenizer, "raw", None) is None
    with pytest.raises(
        ModelError, match=r"model.template_date=2025-03-09, but the tokenizer's chat template writes no date"
    ):
        choose_date(tokenizer, "chat", "2025-03-09")


def test_of_several_templates_the_default_one_is_used_and_dated(make_tokenizer):
    tokenizer = make_tokenizer({"default": '{{ strftime_now("%Y") }}', "rag": "other"})
    assert render_turns(TURNS, tokenizer, "2025-03-09") == "2025"
    fix_inputs(tokenizer, "2025-03-09")
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "2025"
    assert tokenizer.chat_template["rag"] == "other"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            None,
            r"the tokenizer has no chat template: \S*tiny has none in tokenizer_config.json and no chat_template.jinja. Copy",
        ),
        ({"rag": "x"}, r"tiny has several chat templates, none of them named `default`"),
        ("{% if %}", r"chat template cannot be read \(.*\): copy the model again"),
        (
            '{% set form = "%d" %}{{ strftime_now(form) }}',
            r"computes the format of today's date while it runs",
        ),
        (
            '{% set ask = strftime_now %}{{ ask("%d") }}',
            r"computes the format of today's date while it runs",
        ),
    ],
)
def test_template_that_cannot_be_used_is_refused_with_a_message(make_tokenizer, template, words):
    with pytest.raises(ModelError, match=words):
        choose_date(make_tokenizer(template), "chat", None)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('system first') }}", "refuses these turns: system first"),
        ("Hello", "writes a user's message 0 times: expected once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "writes a user's message 2 times: expected once"),
    ],
)
def test_template_that_takes_no_prompt_is_refused_with_a_message(make_tokenizer, template, words):
    with pytest.raises(ModelError, match=words):
        encode_prompt("Profit rose", make_tokenizer(template), "chat")
