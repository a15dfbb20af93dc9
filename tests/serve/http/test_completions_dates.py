"""Adapters of several dates on one server: each prompt carries the date of its adapter's training, never today's."""

from __future__ import annotations

import pytest
from live_server import live_server, make_adapter, make_settings
from wire import send

from finlora.data.sets.catalog import make_question
from finlora.engine.request import Sampling
from finlora.inference.ask import ask

DATES = {"early": "2024-12-01", "late": "2026-03-05"}


@pytest.fixture(scope="module")
def live(dated_base, tmp_path_factory):
    model = {"base": str(dated_base), "bits": 16, "compute_dtype": "float32", "template": "chat"}
    folder = tmp_path_factory.mktemp("dated-adapters")
    settings = make_settings(dated_base, model=model, adapters_dir=str(folder))
    for name, date in DATES.items():
        make_adapter(settings.model, folder / name, 1, "chat", date)  # with equal weights
    with live_server(settings, tmp_path_factory.mktemp("keys")) as live:
        yield live


def test_prompts_carry_the_adapters_date_and_not_todays(live, make_config, dated_base, pretend_day):
    config = make_config(f"model.base={dated_base}", "model.template=chat")
    listed = send(live.address, "/v1/adapters", live.keys["admin"]).body["data"]
    assert {facts["name"]: facts["template_date"] for facts in listed} == DATES
    found = {}
    for day in ("2026-11-30", "2026-12-01"):
        pretend_day(day)
        for name in (None, *DATES):
            model = f"tiny:{name}" if name else "tiny"
            labelled = send(
                live.address, "/v1/classify", live.keys["desk"], {"model": model, "task": "fpb", "text": "Profit rose"}
            )
            said = send(
                live.address,
                "/v1/chat/completions",
                live.keys["desk"],
                {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "Profit rose"}]},
            )
            (result,) = labelled.body["results"]
            found.setdefault(name, []).append((result["probabilities"], said.body["choices"][0]["message"]["content"]))
            folder = live.server.config.adapters_folder / name if name else None
            alone = ask(config, folder, make_question("fpb", "Profit rose", None), Sampling(), 1, lambda _piece: None)
            assert alone.template_date == DATES.get(name, "2024-07-26")
            assert result["probabilities"] == pytest.approx(alone.probabilities, rel=1e-4)
    for (first, first_text), (second, second_text) in found.values():
        assert first == pytest.approx(second, rel=1e-4)
        assert first_text == second_text
    assert found["early"][0][0] != pytest.approx(found["late"][0][0], rel=1e-3)  # the date changes the answer
