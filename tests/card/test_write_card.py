"""The card of a recorded run: every figure with its source, every gap by name, answers kept, nothing loaded."""

from __future__ import annotations

import dataclasses
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from carded import make_run

from finlora.card.approvals import add_approval
from finlora.card.evidence import collect_evidence
from finlora.card.profile import FIELDS_FILE, load_profile
from finlora.card.write_card import build_card, render_html, render_markdown
from finlora.durable import hash_file
from finlora.errors import AdapterError, ConfigError, ResultError
from finlora.model.contract import read_contract
from finlora.results import append_result, read_results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("card"))


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """The text of the card's Markdown, through the command line's own steps."""
    card = build_card(collect_evidence(trained, fields={"purpose": "To sort <b>letters</b>."}), load_profile("sr-26-2"))
    return render_markdown(card, dict.fromkeys(map(id, pictures_of(card)), "picture.png"))


def pictures_of(card):
    return [
        block
        for section in card.sections
        for part in section.parts
        for block in part.blocks
        if hasattr(block, "figure")
    ]


def part_of(text, title):
    """Return the Markdown of one part."""
    (found,) = re.findall(rf"^### {re.escape(title)}\n(.*?)(?=^##|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return found


def test_verdict_stands_first_and_open_points_behind_it(written):
    titles = re.findall(r"^## (.*)$", written, flags=re.MULTILINE)
    assert titles[0] == "Verdict"
    assert re.fullmatch(r"Open points \(\d+\)", titles[1])
    assert titles[2:5] == ["Model and purpose", "Data", "Development"]


def test_empty_required_field_and_unknown_figure_are_open_points(written):
    points = written.partition("## Open points")[2].partition("\n## ")[0]
    assert (
        "- Model and purpose: For what must the adapter not be used, and where is it known to be weak? (limits)"
        in points
    )
    assert "(purpose)" not in points
    assert "(alternatives)" not in points  # not required
    assert "- Licences: licence of the base: its folder, which is not on this machine, has no README.md" in points
    assert points.index("Unknown figures: ") < points.index("Questions without an answer: ")
    assert "nobody has approved it" in points
    assert "base's training cut-off" not in points  # its part is not required
    assert "Unknown: the base's training cut-off: no file of" in part_of(
        written, "Test rows and the base's training cut-off"
    )


def test_scores_stand_beside_base_and_majority_with_their_files(written, trained):
    part = part_of(written, "Scores against base and majority")
    run = trained.parent
    assert "| letters, 8 bit, by labels | base | 50.0 (35.2–64.8) |" in part
    assert "| letters, 8 bit, by labels | adapter | 75.0 (59.8–85.8) |" in part
    assert "| letters, 8 bit, by labels | its base | +25.0 (+12.5 to " in part
    assert "| better than | paired |" in part
    for source in (
        run / "results.jsonl",
        run / "answers" / "letters-4bit-r4.parquet",
        run / "answers" / "letters-base.parquet",
    ):
        assert f"`{source}`" in part


def test_segments_are_lengths_and_the_task_files_columns(written):
    part = part_of(written, "By segment")
    assert part.count(" characters | ") >= 2
    assert "| N | 30 | 75.0 | 73.3 (" in part
    assert "| S | 10 | 25.0 | 80.0 (" in part


def test_abstention_and_calibration_hold_their_rows(written):
    assert "| 0 | 40 | 100.0 | 75.0 (59.8–85.8) |" in part_of(written, "Abstention")
    assert "| 0.9 to 1.0 | 6 |" in part_of(written, "Calibration")
    assert "Expected calibration error" in part_of(written, "Calibration")
    assert "fitted on 40 of the answers, the mean probability of the answers is " in part_of(written, "Calibration")


def test_data_has_split_rule_licence_hashes_and_leaks(written, trained):
    contract = read_contract(trained)
    data = part_of(written, "Data")
    assert (
        "| split rule | by: column, test_share: 0.2, seed: 1, gap_days: 0, column: part, duplicates: together |" in data
    )
    assert f"| hash of the training rows | {contract.data_hashes['letters']} | finlora.yaml |" in data
    assert "| data of letters | internal |" in part_of(written, "Licences")
    assert re.search(
        r"their whole prompt is in train too \| 0 of 40 \(0.0 %\)", part_of(written, "Leaks between train and test")
    )


def test_prompt_is_a_whole_example_and_can_be_left_out(written, trained):
    assert "What is the tone?" in part_of(written, "Prompt")
    assert "Unknown: letters: the prompt's own tokens: the base" in part_of(written, "Prompt")
    card = build_card(collect_evidence(trained), load_profile("sr-26-2"), has_texts=False)
    assert "What is the tone?" not in part_of(
        render_markdown(card, dict.fromkeys(map(id, pictures_of(card)), "p")), "Prompt"
    )
    assert any("left out on request (--no-texts)" in point for point in card.open_points)


def test_lineage_goes_from_base_to_evaluation(written, trained):
    part = part_of(written, "Lineage")
    weights = hash_file(trained / "adapter_model.safetensors")
    steps = [line.split(" | ")[0].removeprefix("| ") for line in part.splitlines() if re.match(r"\| \d", line)]
    assert [step[0] for step in steps] == sorted(step[0] for step in steps)
    for digest in ("b" * 16, weights, hash_file(trained / "finlora.yaml"), f"adapter {weights}, base {'b' * 16}"):
        assert digest in part


def test_versions_seed_and_settings_are_there(written):
    assert "| device | Some GPU | Some GPU |" in part_of(written, "Versions and hardware")
    assert "| seed | 42 | config.yaml |" in part_of(written, "Training")
    assert "name: tone" in part_of(written, "All settings")


def test_cutoff_of_the_fields_tells_old_rows_from_new_ones(trained):
    evidence = collect_evidence(trained, fields={"base_training_cutoff": "2023-12-31"})
    card = build_card(evidence, load_profile("sr-26-2"))
    part = part_of(
        render_markdown(card, dict.fromkeys(map(id, pictures_of(card)), "p")),
        "Test rows and the base's training cut-off",
    )
    assert re.search(r"\| dated up to 2023-12-31 \| 20 \| 50.0 \| 70.0", part)
    assert re.search(r"\| dated after 2023-12-31 \| 20 \| 50.0 \| 80.0", part)
    assert "fields.yaml, base_training_cutoff" in part
    with pytest.raises(ConfigError, match=r"base_training_cutoff='Dec 2023': expected a date such as 2023-12-31"):
        collect_evidence(trained, fields={"base_training_cutoff": "Dec 2023"})


def test_answers_about_the_base_close_gaps_and_name_their_source(trained):
    fields = {"base_licence": "llama3.1", "base_hub_id": "meta-llama/Llama-3.1-8B-Instruct"}
    evidence = collect_evidence(trained, fields=fields)
    assert evidence.cutoff == ("2023-12-31", "Meta's model card of that base, which names a month: its last day")
    card = build_card(evidence, load_profile("sr-26-2"))
    text = render_markdown(card, dict.fromkeys(map(id, pictures_of(card)), "p"))
    assert "| base | llama3.1 | fields.yaml, base_licence |" in part_of(text, "Licences")
    assert "| base on the hub | meta-llama/Llama-3.1-8B-Instruct | fields.yaml, base_hub_id |" in part_of(
        text, "Adapter"
    )
    assert not any("licence of the base" in point or "where the base comes from" in point for point in card.open_points)


def test_part_of_the_test_split_is_an_open_point(trained, tmp_path):
    copy = shutil.copytree(trained.parent, tmp_path / "tone")
    path = copy / "results.jsonl"
    results = read_results(path)
    path.unlink()
    for result in results:
        is_own = result.kind == "evaluation" and result.variant != "base"
        append_result(path, dataclasses.replace(result, is_partial=is_own, num_examples=30) if is_own else result)
    card = build_card(collect_evidence(copy / "adapter"), load_profile("sr-26-2"))
    assert "right in 75.0 % of 30 of 40 test examples (95 %" in card.verdict[0]
    assert any("the whole test split: only 30 of 40 test examples were scored" in point for point in card.unknown)


def test_equal_evidence_makes_equal_bytes_and_approvals_are_shown(trained, tmp_path):
    copy = shutil.copytree(trained.parent, tmp_path / "tone")
    adapter = copy / "adapter"
    profile = load_profile("eu-ai-act-annex-iv")
    texts = [render_html(build_card(collect_evidence(adapter), profile)) for _ in range(2)]
    assert texts[0] == texts[1]
    entry = add_approval(adapter, by="A. Validator", decision="approved", note="for news")
    evidence = collect_evidence(adapter)
    card = build_card(evidence, profile)
    part = part_of(render_markdown(card, dict.fromkeys(map(id, pictures_of(card)), "p")), "Approvals")
    assert f"The chain of 1 entries is intact. Its last hash is {entry.hash}." in part
    assert "The last entry approves the adapter as it is now." in part
    assert "| A. Validator | approved | for news |" in part
    assert not any("an approval that holds" in point for point in card.open_points)


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.loads, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]


def test_page_loads_nothing_and_reads_no_answer_as_markup(trained):
    evidence = collect_evidence(trained, fields={"purpose": "<script>alert(1)</script>"})
    text = render_html(build_card(evidence, load_profile("sr-26-2")))
    page = _Page(text)
    assert all(load.startswith(("#", "data:image/svg+xml;base64,")) for load in page.loads)
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert page.tags.count("img") == 4  # confusion, reliability, abstention, loss


def test_part_that_a_profile_does_not_name_stands_at_the_end(trained, tmp_path):
    own = {
        "name": "own",
        "title": "Report",
        "source": "ours",
        "sections": [{"title": "A", "parts": [{"name": "scores"}]}],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    card = build_card(collect_evidence(trained), load_profile(str(tmp_path / "own.yaml")))
    assert [part.name for part in card.sections[0].parts] == ["scores"]
    assert len(card.sections[1].parts) == 16
    assert card.open_points == ()


def test_changed_answers_and_other_data_are_gaps_by_name(trained, tmp_path):
    copy = shutil.copytree(trained.parent, tmp_path / "tone")
    (copy / "answers" / "letters-4bit-r4.parquet").write_bytes(b"other")
    evidence = collect_evidence(copy / "adapter", data=tmp_path)
    card = build_card(evidence, load_profile("sr-26-2"))
    points = "\n".join(card.open_points)
    assert "letters-4bit-r4.parquet was changed after its evaluation" in points
    assert "Data: letters: train split: " in points
    text = render_markdown(card, dict.fromkeys(map(id, pictures_of(card)), "p"))
    assert "| letters, 8 bit, by labels | its base | +25.0 (+3.8 to +43.3) | better than | unpaired |" in text
    assert "by: column" in part_of(text, "Data")  # from the adapter's own tasks.yaml
    assert "Thresholds are the bounds of ten bins" in part_of(text, "Abstention")


def test_adapter_that_is_damaged_gets_no_card(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "adapter")
    (copy / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors differs"):
        collect_evidence(copy)
    with pytest.raises(ResultError, match=r"does not exist: give a results file"):
        collect_evidence(trained, [tmp_path / "absent"])
    with pytest.raises(ResultError, match=r"holds no results: give a results file"):
        collect_evidence(trained, [copy])


def test_results_of_other_weights_do_not_count(trained, tmp_path):
    copy = shutil.copytree(trained.parent, tmp_path / "tone")
    path = copy / "results.jsonl"
    results = read_results(path)
    path.unlink()
    for result in results:
        append_result(path, dataclasses.replace(result, adapter_hash=result.adapter_hash and "another"))
    evidence = collect_evidence(copy / "adapter")
    assert (evidence.scored, evidence.trained) == ((), None)


def test_verb_writes_the_card_and_keeps_the_answers(call, trained, tmp_path):
    output = tmp_path / "card"
    code, out, _ = call("card", trained, "--output", output)
    assert code == 0
    assert "better than its base" in out
    assert "Approval: nobody has approved it: have it judged" in out
    assert f"Written: {output / 'card.html'}, card.md and 4 plots" in out
    fields = output / FIELDS_FILE
    assert "\npurpose:\n" in fields.read_text()
    fields.write_text(fields.read_text().replace("\npurpose:\n", "\npurpose: To sort letters.\n"))
    kept = fields.read_text()
    before = re.search(r"Open points: (\d+)", out)[1]
    code, out, _ = call("card", trained, "--output", output)
    assert int(re.search(r"Open points: (\d+)", out)[1]) == int(before) - 1
    assert "To sort letters." in (output / "card.html").read_text()
    assert fields.read_text() == kept
    for name in re.findall(r"\]\(([^)]+\.png)\)", (output / "card.md").read_text()):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    code, _, error = call("card", trained.parent, "--output", output)
    assert (code, f"is the folder of a run: give {trained}" in error) == (4, True)
