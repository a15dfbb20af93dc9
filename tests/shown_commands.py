"""The commands that a document shows, as the words that bash would hand to each of them.

Bash itself reads the lines, in restricted mode and with nothing on its PATH: variables, quotes, `&&` and lines that go on are
as a user's shell has them, and no command runs.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted(path for path in (ROOT / "cluster").rglob("*") if path.is_file()),
        *sorted((ROOT / "serve_configs").glob("*.yaml")),
        *sorted((ROOT / "jobs").glob("*.py")),
        *sorted((ROOT / "benchmarks").glob("*.py")),
        *sorted(path for check in ("chaos", "fuzz", "soak") for path in (ROOT / "tests" / check).rglob("*.py")),
    )
}
"""Every file that shows commands, by its path in the checkout."""

PROGRAMS = ("finlora", "ray", "serve", "make", "python")
"""Those that we look at; what else stands on a line is for others to judge."""
_SHELL = re.compile(
    rf"(?:{'|'.join(PROGRAMS)}|sudo|cd|export|source|ssh|curl|\. |[A-Z_]+=|\$[A-Z]+|RAY\w+=)(?:\s|\S|$)"
)
_READER = """
set -u
cd() { :; }
source() { :; }
.() { :; }
command_not_found_handle() { printf '%s\\0' "$@" $'\\n'; }
"""


def shown_lines(name: str) -> list[str]:
    """Return the lines of a document that are typed into a shell: indented or fenced in Markdown, else in comments."""
    text = DOCUMENTS[name].read_text(encoding="utf-8")
    if name.endswith(".py"):
        text = ast.get_docstring(ast.parse(text)) or ""
    lines = []
    is_fenced = False
    for line in re.sub(r"\\\n\s*#?\s*", "", text).splitlines():
        if name.endswith(".md"):
            if line.lstrip().startswith("```"):
                is_fenced = not is_fenced
            shown = line.strip() if is_fenced or line.startswith("    ") else ""
        elif name.endswith(".py"):
            shown = line.strip()
        else:
            shown = line.lstrip().removeprefix("#").strip() if line.lstrip().startswith("#") else ""
        if _SHELL.match(shown) and not re.search(r"[^.]\.$|,$", shown):  # a sentence is no command
            lines.append(shown)
    return lines


def shown_commands(name: str) -> list[list[str]]:
    """Return the words of each command of a document that one of PROGRAMS would get, its name first."""
    found = []
    done = subprocess.run(
        ["/bin/bash", "--restricted", "--norc", "--noprofile", "-c", _READER + "\n".join(shown_lines(name))],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/nonexistent", "HOME": "/home/user"},
        timeout=60,
    )
    # In $(...) bash drops the zeros between words, which are of programs that we do not look at.
    faults = [line for line in done.stderr.splitlines() if line and "ignored null byte" not in line]
    assert faults == [], f"{name}: {faults}"
    for words in done.stdout.split("\n\0"):
        command = _without_sudo(words.removesuffix("\0").split("\0"))
        if Path(command[0]).name in PROGRAMS and command[1:]:
            found.append([Path(command[0]).name, *command[1:]])
    return found


def _without_sudo(words: list[str]) -> list[str]:
    while words[:1] and words[0] in ("sudo", "-H", "-u"):
        words = words[2:] if words[0] == "-u" else words[1:]
    return words or [""]
