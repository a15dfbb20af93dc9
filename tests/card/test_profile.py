"""Profiles: shipped ones load, a bank's own one is checked, and answers to fields are kept."""

from __future__ import annotations

import pytest

from finlora.card.profile import FIELDS_FILE, Field, extend_fields, list_profiles, load_profile, read_fields
from finlora.card.write_card import PARTS
from finlora.errors import ConfigError

OWN = """
name: ours
title: "Report"
source: "Policy 4.2"
sections:
  - title: "Purpose"
    fields: [{name: purpose, ask: "Why?"}]
    parts: [{name: scores}]
"""


@pytest.mark.parametrize("name", list_profiles())
def test_shipped_profile_shows_every_part(name):
    profile = load_profile(name)
    parts = [part.name for section in profile.sections for part in section.parts]
    assert profile.name == name
    assert sorted(parts) == sorted(PARTS)
    assert {"purpose", "limits", "monitoring", "base_training_cutoff"} <= {field.name for field in profile.fields}
    assert all(field.ask.endswith((".", "?")) for field in profile.fields)


def test_shipped_profiles_are_the_two_that_the_help_names():
    assert list_profiles() == ["eu-ai-act-annex-iv", "sr-26-2"]


def test_annex_iv_has_its_nine_points_in_order():
    sections = load_profile("eu-ai-act-annex-iv").sections
    assert [section.refers for section in sections[:9]] == [f"Annex IV, point {number}" for number in range(1, 10)]


def test_annex_iv_asks_for_each_letter_of_points_1_and_2():
    asked = " ".join(field.ask for field in load_profile("eu-ai-act-annex-iv").fields)
    letters = {f"({point}{letter})" for point in (1, 2) for letter in "abcdefgh"}
    assert {letter for letter in letters if letter not in asked} == set()


def test_sr_26_2_has_the_agencies_areas_and_says_what_it_was_not_compared_with():
    profile = load_profile("sr-26-2")
    areas = {section.refers.partition(":")[0] for section in profile.sections if section.refers}
    assert areas == {
        "model development and model use",
        "model validation and monitoring",
        "governance and controls",
        "vendor and other third-party products",
    }
    assert "not with its full text" in profile.note


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: scores", "name: scoers", r"parts\[0\].name='scoers': expected one of adapter, data"),
        ("name: purpose", "name: Purpose", r"field 'Purpose': expected a name of a to z"),
        ("name: purpose", "name: 'no'", r"field 'no': expected a name"),
        ("{name: scores}", "{name: scores}, {name: scores}", r"part scores stands twice: expected once"),
        ('ask: "Why?"', 'aks: "Why?"', r"aks is not a setting: did you mean ask"),
        ('source: "Policy 4.2"\n', "", r"source is missing"),
    ],
)
def test_wrong_profile_is_refused_by_its_words(tmp_path, old, new, words):
    path = tmp_path / "own.yaml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        load_profile(str(path))


def test_missing_profile_names_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist: expected one of eu-ai-act-annex-iv, sr-26-2, or a file"):
        load_profile("sr-11-7")


def test_missing_fields_are_appended_and_the_rest_of_the_file_stays(tmp_path):
    fields = [Field(name="purpose", ask="Why?"), Field(name="limits", ask="Where not?")]
    assert extend_fields(tmp_path, fields[:1]) == ["purpose"]
    path = tmp_path / FIELDS_FILE
    assert "# Why?\npurpose:\n" in path.read_text()
    assert read_fields(tmp_path) == {}
    path.write_text(path.read_text().replace("\npurpose:", "\npurpose: |\n  First.\n  Second.\n# my remark\nother: 3"))
    before = path.read_text()
    assert extend_fields(tmp_path, fields) == ["limits"]
    assert path.read_text() == before + "\n# Where not?\nlimits:\n"
    assert read_fields(tmp_path) == {"purpose": "First.\nSecond.", "other": "3"}
    assert extend_fields(tmp_path, fields) == []


def test_date_is_read_as_it_is_written(tmp_path):
    (tmp_path / FIELDS_FILE).write_text("base_training_cutoff: 2023-12-31\n")
    assert read_fields(tmp_path) == {"base_training_cutoff": "2023-12-31"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("purpose: [a]\n", r"'purpose' is \['a'\], expected a text"),
        ("- a\n", r"expected keys"),
        ("a: {", r"cannot be read"),
    ],
)
def test_file_that_holds_no_texts_is_refused(tmp_path, text, words):
    (tmp_path / FIELDS_FILE).write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_fields(tmp_path)
