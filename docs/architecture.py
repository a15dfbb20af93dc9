"""Generator of ARCHITECTURE.md's list of files and of the stair of rooms, from imports and docstrings.

    python docs/architecture.py        # rewrites ARCHITECTURE.md and docs/pictures/stair.svg

A room is a folder of finlora/, or a module outside any folder. tests/test_architecture_page.py compares both files with this.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "ARCHITECTURE.md"
STAIR = ROOT / "docs" / "pictures" / "stair.svg"
MODULES = sorted(path for path in (ROOT / "finlora").rglob("*.py") if path.name != "__init__.py")
KERNELS = sorted(path for suffix in ("cu", "cuh") for path in (ROOT / "finlora").rglob(f"*.{suffix}"))
BEGIN, END = "<!-- begin: one line a file -->\n", "<!-- end: one line a file -->\n"

_WIDTH, _BOX_HEIGHT, _GAP, _STEP, _MARGIN = 640, 30, 14, 56, 16
_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2430; text-anchor: middle; }
  rect.ground { fill: #ffffff; stroke: none; }
  rect { fill: #eef1fb; stroke: #4353b3; stroke-width: 1.2; rx: 6; }
  path { fill: none; stroke: #8a93b8; stroke-width: 1.1; opacity: 0.75; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e8f0; }
    rect { fill: #262b3d; stroke: #8f9cf0; } rect.ground { fill: #0d1117; } path { stroke: #6b749c; }
  }
"""


def own_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "finlora").with_suffix("").parts)


def room_of(name: str) -> str:
    """Return the folder of a module by its name without `finlora.`, or its name if it is in none."""
    return name.rpartition(".")[0] or name


def first_sentence(path: Path) -> str:
    """Return what a file says of itself: the first sentence of its docstring, or of the comment at its top."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = itertools.takewhile(lambda line: line.startswith("//"), text.splitlines())
        text = "\n".join(line.removeprefix("//").strip() for line in comment)
    paragraph = " ".join(text.partition("\n\n")[0].split())
    sentence = re.match(r".+?\.(?=\s|$)", paragraph)
    return sentence[0] if sentence else paragraph


def read_imports() -> dict[str, set[str]]:
    """Return room -> the rooms that its modules import."""
    names = {own_name(path): path for path in MODULES}
    imports: dict[str, set[str]] = defaultdict(set)
    for name, path in names.items():
        found = imports[room_of(name)]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "finlora":
                module = (node.module or "").partition(".")[2]
                inner = {f"{module}.{alias.name}".lstrip(".") for alias in node.names} & set(names)
                found |= {room_of(each) for each in inner or {module} & set(names)}
            elif isinstance(node, ast.Import):
                found |= {room_of(own) for each in node.names if (own := each.name.removeprefix("finlora.")) in names}
        found.discard(room_of(name))
    return dict(imports)


def floors_of(imports: dict[str, set[str]]) -> dict[str, int]:
    """Return room -> its floor: 0 where it imports no other room, else one above the highest that it imports."""
    floors: dict[str, int] = {}
    while len(floors) < len(imports):
        ready = {room for room, others in imports.items() if room not in floors and others <= floors.keys()}
        if not ready:
            raise ValueError(f"rooms import each other in a circle: {sorted(imports.keys() - floors.keys())}")
        floors |= {room: 1 + max((floors[other] for other in imports[room]), default=-1) for room in ready}
    return floors


def without_detours(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the arrows that no other way replaces."""
    reach: dict[str, set[str]] = {}
    for room in sorted(imports, key=floors_of(imports).__getitem__):
        reach[room] = imports[room].union(*(reach[other] for other in imports[room]))
    return {
        room: {each for each in others if not any(each in reach[other] for other in others - {each})}
        for room, others in imports.items()
    }


def draw_stair() -> str:
    """Return the picture: floors from the ground up, an arrow to each room that is imported and not reached otherwise."""
    imports = read_imports()
    floors = floors_of(imports)
    top = max(floors.values())
    boxes: dict[str, tuple[float, float, float]] = {}
    for floor in range(top + 1):
        rooms = sorted(room for room in floors if floors[room] == floor)
        widths = [max(74.0, 8.2 * len(room) + 20) for room in rooms]
        x = (_WIDTH - sum(widths) - _GAP * (len(rooms) - 1)) / 2
        for room, width in zip(rooms, widths, strict=True):
            boxes[room] = (x, _MARGIN + (top - floor) * _STEP, width)
            x += width + _GAP
    lines = []
    for room, others in sorted(without_detours(imports).items()):
        for other in sorted(others):
            (x, y, width), (x2, y2, width2) = boxes[room], boxes[other]
            start, end = x + width / 2, x2 + width2 / 2
            y += _BOX_HEIGHT
            lines.append(
                f'<path d="M{start:.0f} {y:.0f} C{start:.0f} {y + 20:.0f} {end:.0f} {y2 - 20:.0f} {end:.0f} {y2:.0f}"/>'
            )
    for room, (x, y, width) in sorted(boxes.items()):
        lines += [
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{_BOX_HEIGHT}"/>',
            f'<text x="{x + width / 2:.0f}" y="{y + 20:.0f}">{room.replace(".", "/")}</text>',
        ]
    height = 2 * _MARGIN + top * _STEP + _BOX_HEIGHT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">'
    ground = f'<rect class="ground" width="{_WIDTH}" height="{height}"/>'
    title = "<title>Rooms of finlora/ by floor; arrows go to the rooms that are imported</title>"
    return "\n".join([head, title, f"<style>{_STYLE}</style>", ground, *lines, "</svg>", ""])


def list_files() -> str:
    """Return a table a room, lowest floor first."""
    floors = floors_of(read_imports())
    parts = []
    ground = [path for path in MODULES if "." not in own_name(path)]
    folders = sorted({room_of(own_name(path)) for path in MODULES} - {own_name(path) for path in ground})
    for title, paths in [
        ("finlora/", ground),
        *(
            (f"{room.replace('.', '/')}/", [path for path in [*MODULES, *KERNELS] if room_of(own_name(path)) == room])
            for room in sorted(folders, key=lambda room: (floors[room], room))
        ),
    ]:
        parts += [f"\n### {title}\n\n", "| file | |\n| --- | --- |\n"]
        parts += [f"| `{path.name}` | {first_sentence(path).replace('|', '/')} |\n" for path in sorted(paths)]
    return "".join(parts).lstrip("\n") + "\n"


def write_page(text: str) -> str:
    """Return the page with an updated list of files."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE.name} lacks the two lines that hold its list of files: {BEGIN}{END}")
    return f"{before}{BEGIN}\n{list_files()}{END}{after}"


def named_modules(text: str) -> set[str]:
    """Return the paths of the package that the prose names, below finlora/."""
    prose = text.partition(BEGIN)[0]
    return {path for path in re.findall(r"`([\w/]+\.py)`", prose) if "/" in path}


if __name__ == "__main__":
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    STAIR.write_text(draw_stair(), encoding="utf-8")
