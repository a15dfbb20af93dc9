"""Folder of compiled kernels: the user's, one below the home folder, or one that no other account can write to."""

from __future__ import annotations

import logging
import os
import tempfile

import pytest

from finlora.machine import kernel_folder
from finlora.machine.kernel_folder import VARIABLE, keep_kernels


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """A home folder and a temporary folder of the test's own."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv(VARIABLE, "")
    kernel_folder._choose.cache_clear()
    yield tmp_path
    kernel_folder._choose.cache_clear()


def test_folder_is_below_the_home_folder_and_triton_is_told(places):
    assert keep_kernels() == places / "home/.cache/finlora/kernels"
    assert os.environ[VARIABLE] == str(places / "home/.cache/finlora/kernels")
    assert keep_kernels().is_dir()


def test_folder_that_the_user_has_set_is_used(places, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(places / "own"))
    assert keep_kernels() == places / "own"
    assert not (places / "home/.cache").exists()


def block_home(places):
    (places / "home/.cache").write_text("a file where a folder should be")


def test_home_that_cannot_be_written_is_named_once(places, caplog):
    block_home(places)
    with caplog.at_level(logging.WARNING):
        folder = keep_kernels()
        assert keep_kernels() == folder
    assert folder == places / f"tmp/finlora-kernels-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    (record,) = caplog.records
    assert f"cannot be kept in {places / 'home/.cache/finlora/kernels'}" in record.message
    assert "set TRITON_CACHE_DIR to a folder that can be written and lasts" in record.message


@pytest.mark.parametrize("kind", ["others write", "link"])
def test_temporary_folder_that_another_account_may_have_made_is_not_used(places, kind):
    """A kernel in it would run in our processes."""
    block_home(places)
    guessed = places / f"tmp/finlora-kernels-{os.getuid()}"
    if kind == "link":
        (places / "elsewhere").mkdir(mode=0o700)
        guessed.symlink_to(places / "elsewhere")
    else:
        guessed.mkdir()
        guessed.chmod(0o777)
    folder = keep_kernels()
    assert folder != guessed
    assert folder.parent == places / "tmp"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_binary_is_made_once_for_each_set_of_facts(places):
    made = []

    def make_of(*facts):
        def make():
            made.append(facts)
            return f"binary of {facts}".encode()

        return kernel_folder.keep_binary("few.cu", facts, make)

    for _ in range(2):
        assert make_of("source", "sm_90") == b"binary of ('source', 'sm_90')"
        assert make_of("source", "sm_86") == b"binary of ('source', 'sm_86')"
    assert made == [("source", "sm_90"), ("source", "sm_86")]


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 200])
def test_damaged_binary_is_made_again(places, damage):
    for expected in (b"first", b"second", b"second"):
        assert kernel_folder.keep_binary("few.cu", ("source",), lambda own=expected: own) == expected
        (path,) = (keep_kernels() / "nvrtc").iterdir()
        if expected == b"first":
            path.write_bytes(damage)


def test_binary_is_returned_where_it_cannot_be_kept(places, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(places / "file"))
    (places / "file").write_text("no folder")
    assert kernel_folder.keep_binary("few.cu", (), lambda: b"made") == b"made"
