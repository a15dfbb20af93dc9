"""The pages of docs/: links lead somewhere, files are there, and quoted messages are ones that are raised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finlora.configfile import load_config
from finlora.data.catalog import TASKS

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(path.relative_to(ROOT / "docs")): path for path in sorted((ROOT / "docs").rglob("*.md"))}
SOURCE = "\n".join(path.read_text() for path in (ROOT / "finlora").rglob("*.py"))
# Strings of the source that the formatter or the author cut into several are whole again.
SOURCE = re.sub(r'"\s*\n\s*f?"', "", SOURCE)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_to_files(page):
    text = PAGES[page].read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (PAGES[page].parent / link).is_file()] == []
    paths = re.findall(r"`((?:jobs|benchmarks|requirements|finlora|tests|cluster|docs|serve_configs)/[\w./-]*)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_a_page_names_exist(page):
    named = re.findall(r"`((?:model|lora|data|optim|train|eval)\.\w+|max_wait_s)\b(?!/)", PAGES[page].read_text())
    known = load_config(None, [])
    for name in named:
        part = known
        for key in name.split("."):
            assert hasattr(part, key), name
            part = getattr(part, key)


def test_each_task_has_a_page_with_its_licence_and_defects():
    pages = {page: path.read_text() for page, path in PAGES.items() if page.startswith("tasks/")}
    for task in TASKS.values():
        (page,) = [
            page
            for page, text in pages.items()
            if re.search(rf"^# .*\b{task.name}\b", text)
            or (task.family == "synthetic" and page == "tasks/synthetic.md")
        ]
        assert re.search(rf"^\|? ?.*{re.escape(task.licence)}", pages[page], flags=re.MULTILINE), task.name
        assert "## Defects" in pages[page]


def test_messages_in_troubleshooting_are_raised_by_us_or_named_as_others():
    quoted = re.findall(r"^\*\*`([^`]+)`", PAGES["troubleshooting.md"].read_text(), flags=re.MULTILINE)
    assert len(quoted) >= 8
    theirs = {"No available agent to submit job", "Maximum request body size 104857600 exceeded", "/readyz"}
    theirs |= {"NCCL error", "Duplicate GPU detected", "finlora plan", "ray job submit", "No such file"}
    parts = [part.strip(" ,:") for message in quoted if message not in theirs for part in message.split("...")]
    assert [part for part in parts if part and part not in SOURCE] == []
