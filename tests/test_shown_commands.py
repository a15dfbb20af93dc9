"""Every command in a document is valid for its program: verbs, options, configs, overrides, files and targets."""

from __future__ import annotations

import re
import shlex

import click
import pytest
import typer.main
from shown_commands import DOCUMENTS, PROGRAMS, ROOT, shown_commands

from finlora.cli.main import app
from finlora.configfile import load_config
from finlora.serve.deploy.serve_yaml import read_deployment
from finlora.train.search.space import load_search

VERBS = typer.main.get_command(app).commands
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def check_finlora(verb, *rest):
    values = VERBS[verb].make_context(verb, list(rest)).params  # raises on an unknown option or a missing argument
    config = values.get("config")
    is_own = config and config.name == "config.yaml"  # of an adapter's folder
    if config and not is_own and not config.stem.isupper() and str(config) != "...":  # NAME is the reader's file
        is_server = verb == "serve" or config.parts[0] == "serve_configs"  # `doctor` takes both kinds
        load = read_deployment if is_server else load_search if verb == "tune" else load_config
        overrides = [text for text in values["overrides"] or [] if text != "name=SEARCH"]
        load(ROOT / config if not config.is_file() else config, overrides)


def check_ray(*words):
    from ray.scripts.scripts import cli

    *_, entrypoint = parse(cli, list(words))
    if words[:2] == ("job", "submit"):
        check_python(*entrypoint["entrypoint"][1:])


def check_serve(*words):
    from ray.serve.scripts import cli

    parse(cli, list(words))
    if words[0] == "deploy" and words[1].startswith("serve_configs/"):
        read_deployment(ROOT / words[1])


def check_make(*words):
    for word in words:
        variable, is_set, _ = word.partition("=")
        pattern = rf"\$\({variable}\)" if is_set else rf"^{word}:"
        assert re.search(pattern, MAKEFILE, flags=re.MULTILINE), word


def check_python(script, *rest):
    path = ROOT / script
    if script == "-m":
        module, *rest = rest
        assert module.startswith("tests."), module
        path = ROOT.joinpath(*module.split("."))
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert path.is_file(), (script, *rest)
    if path.parent.name == "jobs" and path.stem in VERBS:
        check_finlora(path.stem, *rest)
        return
    source = "\n".join(
        other.read_text(encoding="utf-8") for other in path.parent.glob("*.py")
    )  # some share their options
    unknown = [word for word in rest if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source]
    assert unknown == []


CHECKS = {"finlora": check_finlora, "ray": check_ray, "serve": check_serve, "make": check_make, "python": check_python}


def parse(command, words):
    """Return click's parameters of words: a group's, then its command's, down to the last."""
    found = []
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(click.Context(command), words)
        found.append({"command": name})
    return [*found, command.make_context(found[-1]["command"], words).params]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_shown_command_is_taken_by_its_program(name):
    for program, *words in shown_commands(name):
        if "--help" not in words:
            CHECKS[program](*words)
        if words[0] == "deploy":
            assert {"-a", "--address"} & set(words), f"{name}: serve {' '.join(words)} does not say which cluster"


def test_documents_that_lead_somewhere_show_commands():
    leading = [name for name in DOCUMENTS if name.startswith("docs/reference/tasks/")]
    leading += [
        "README.md",
        *(f"docs/tutorials/{page}.md" for page in ("first-run", "first-server", "own-table")),
        *(f"docs/how-to/{page}.md" for page in ("serve", "search")),
        *(f"docs/explanation/{page}.md" for page in ("life-of-a-run", "faults")),
    ]
    assert [name for name in leading if not shown_commands(name)] == []


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.endswith(".md")])
def test_commands_within_a_sentence_name_verbs_options_and_targets_that_are_there(name):
    text = re.sub(r"^    .*$", "", DOCUMENTS[name].read_text(encoding="utf-8"), flags=re.MULTILINE)
    for span in re.findall(r"`((?:finlora|make) [^`]+)`", text):
        program, *words = shlex.split(" ".join(span.split()))
        if program == "make":
            check_make(*(word for word in words if word != "..."))
            continue
        verb, *rest = words
        assert verb in VERBS, span
        options = {option for parameter in VERBS[verb].params for option in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options, span


def test_bash_reads_words_as_a_users_shell_does(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n    BASE=/srv/base  # set once\n    cd /x && sudo -H -u me make setup TORCH=gpu\n"
        "    ray job submit \\\n        -- python jobs/plan.py \"model.base=$BASE\" '~/kept'   # told\n    import os\n"
    )
    monkeypatch.setitem(DOCUMENTS, "page.md", page)
    assert shown_commands("page.md") == [
        ["make", "setup", "TORCH=gpu"],
        ["ray", "job", "submit", "--", "python", "jobs/plan.py", "model.base=/srv/base", "~/kept"],
    ]
    page.write_text('    curl -H "$KEY" http://127.0.0.1\n')
    with pytest.raises(AssertionError, match="KEY: unbound variable"):
        shown_commands("page.md")
    assert tuple(CHECKS) == PROGRAMS
