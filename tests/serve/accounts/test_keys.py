"""API keys: stored as hashes, recognised, revoked while the server runs, and a damaged file refused."""

from __future__ import annotations

import stat

import pytest
import yaml

from finlora.errors import ConfigError
from finlora.serve.accounts.keys import KeyRing, add_key, read_keys

NO_LIMITS = {"adapters": None, "requests_per_minute": None, "tokens_per_minute": None, "is_admin": False}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.yaml"


def test_file_holds_only_the_hash_of_a_key(file):
    key = add_key(file, "desk", adapters=("good",), requests_per_minute=5, tokens_per_minute=9, is_admin=False)
    other = add_key(file, "night", **NO_LIMITS)
    assert key not in file.read_text()
    secret = key.removeprefix("finlora-desk-")  # the secret itself may contain and start with "-"
    assert len(secret) == 43
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ring = KeyRing(file, {})
    record = ring.check(key)
    assert (record.id, record.requests_per_minute, record.tokens_per_minute) == ("desk", 5, 9)
    assert [record.may_use(name) for name in ("good", "other", None)] == [True, False, False]
    assert ring.check(other).may_use(None)


def test_key_is_added_to_the_target_of_a_link(file):
    target = file.with_name("shared.yaml")
    file.symlink_to(target)
    add_key(file, "desk", **NO_LIMITS)
    add_key(file, "night", **NO_LIMITS)
    assert file.is_symlink()
    assert [record.id for record in read_keys(target)] == ["desk", "night"]
    loop = file.with_name("loop")
    loop.symlink_to("loop")
    with pytest.raises(ConfigError, match="loop is a link that leads to itself"):
        add_key(loop, "desk", **NO_LIMITS)


def test_key_that_could_not_be_shown_is_not_added(file):
    def fail(key):
        assert not file.exists()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        add_key(file, "desk", **NO_LIMITS, show=fail)
    assert list(file.parent.iterdir()) == []
    shown = []
    assert [add_key(file, "desk", **NO_LIMITS, show=shown.append)] == shown


@pytest.mark.parametrize(
    "change", [lambda k: k[:-1], lambda k: k + "a", lambda k: k.swapcase(), lambda k: "", lambda k: "é" + k]
)
def test_changed_key_is_unknown(file, change):
    key = add_key(file, "desk", **NO_LIMITS)
    assert KeyRing(file, {}).check(change(key)) is None


def test_keys_with_equal_rights_have_different_hashes(file):
    for name in ("one", "two"):
        add_key(file, name, **NO_LIMITS)
    first, second = read_keys(file)
    assert first.salt != second.salt
    assert first.hash != second.hash


def test_key_is_revoked_without_a_restart(file):
    key, kept = (add_key(file, name, **NO_LIMITS) for name in ("gone", "kept"))
    ring = KeyRing(file, {})
    assert ring.check(key)
    entries = [entry for entry in yaml.safe_load(file.read_text()) if entry["id"] != "gone"]
    file.write_text(yaml.safe_dump(entries))
    assert ring.check(key) is None
    assert ring.check(kept)


def test_key_of_the_environment_is_an_admin_key():
    ring = KeyRing(None, {"FINLORA_API_KEY": "s" * 32})
    assert ring.check("s" * 32).is_admin
    assert ring.check("s" * 31) is None
    with pytest.raises(ConfigError, match=r"FINLORA_API_KEY has 5 characters: expected at least 24"):
        KeyRing(None, {"FINLORA_API_KEY": "short"})


def test_server_without_any_key_does_not_start():
    with pytest.raises(ConfigError, match=r"there is no API key: keys_file is not set and FINLORA_API_KEY is not set"):
        KeyRing(None, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: b", "does not hold a list of keys"),
        ("[{id: desk}]", r"desk.hash has 0 characters"),
        ("- {id: a, salt: s, hash: abc}", "expected 64 hex digits"),
        ("[", "cannot be read"),
        (f"- {{id: A b, salt: s, hash: {'a' * 64}}}", "expected 1 to 32 small letters"),
        (f"- {{id: a, salt: s, hash: {'a' * 64}, rate: 3}}", "rate is not a setting"),
        (f"- &k {{id: a, salt: s, hash: {'a' * 64}}}\n- *k", r"found an alias \(\*name\)"),
        (f"- {{id: a, salt: s, hash: {'a' * 64}}}\n" * 2, "id a more than once"),
        (f"- {{id: a, salt: s, hash: {'ä' * 64}}}", "expected 64 hex digits"),
        (f'- {{id: a, salt: "\\ud800", hash: {"a" * 64}}}', "salt=.*expected a text without"),
        (f"- {{id: a, salt: ß, hash: {'a' * 64}}}", "a.salt is not ASCII"),
    ],
)
def test_damaged_file_is_refused_with_a_message(file, text, words):
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=words):
        KeyRing(file, {})


def test_file_readable_by_others_is_refused(file):
    add_key(file, "desk", **NO_LIMITS)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"others than its owner may read .*chmod 600"):
        KeyRing(file, {})


@pytest.mark.parametrize(("name", "words"), [("desk", "holds a key 'desk' already"), ("A b", "found the name 'A b'")])
def test_taken_or_malformed_name_is_refused_and_the_file_unchanged(file, name, words):
    add_key(file, "desk", **NO_LIMITS)
    before = file.read_text()
    with pytest.raises(ConfigError, match=words):
        add_key(file, name, **NO_LIMITS)
    assert file.read_text() == before
