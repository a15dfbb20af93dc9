"""Imports without torch's compiler: what changes inside, and that all is as before afterwards."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from finlora.machine.lean_imports import lean_imports

MARKS = (torch.compile, torch.compiler.disable, torch._disable_dynamo)


def read_marks():
    return (torch.compile, torch.compiler.disable, torch._disable_dynamo)


def test_marks_do_nothing_inside_and_are_restored():
    with lean_imports():
        assert not gc.isenabled()
        for mark in read_marks():
            assert mark(len) is len
            assert mark(dynamic=False)(len) is len
            assert mark(len, False) is len
    assert read_marks() == MARKS
    assert gc.isenabled()


def test_all_is_restored_after_an_import_that_fails():
    with pytest.raises(ImportError), lean_imports():
        raise ImportError("no such library")
    assert read_marks() == MARKS
    assert gc.isenabled()


def test_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with lean_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_threads_that_overlap_restore_at_the_last_ones_end():
    inside, leaves = threading.Event(), threading.Event()

    def run():
        with lean_imports():
            inside.set()
            leaves.wait(20)

    thread = threading.Thread(target=run)
    with lean_imports():
        thread.start()
        assert inside.wait(20)
        with lean_imports():
            pass
    assert torch.compile is not MARKS[0]  # the thread still imports
    leaves.set()
    thread.join()
    assert read_marks() == MARKS
    assert gc.isenabled()
