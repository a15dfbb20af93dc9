"""README.md of an adapter in the form that the Hugging Face hub reads: YAML on top, then how to load it, settings and scores.

A training writes it. No hash of the adapter covers it: people may edit it, and `finlora evaluate` puts scores between two
marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.card.base_facts import find_hub_id, find_licence
from finlora.card.origin_parts import describe_lora
from finlora.config import RunConfig
from finlora.data.question import Form
from finlora.data.sets.catalog import TASKS
from finlora.data.taskfile.load import read_card
from finlora.data.taskfile.read import make_task
from finlora.durable import hash_file, write_whole
from finlora.model.adapter_files import ADAPTER_WEIGHTS
from finlora.model.contract import Contract
from finlora.report.pairing import pair_results
from finlora.report.scores import find_majority
from finlora.report.tables import TextTable, format_score
from finlora.report.write import list_markdown_rows
from finlora.results import Result, read_results

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

README = "README.md"
BEGIN, END = "<!-- finlora: scores -->", "<!-- finlora: end of scores -->"
_MODEL_INDEX = re.compile(r"^model-index:\n(?:[ -].*\n)*", flags=re.MULTILINE)
_FRONT = re.compile(r"\A---\n(.*?)^---\n", flags=re.MULTILINE | re.DOTALL)
_DATASET = re.compile(r"(?P<title>.*?)(?P<part>, [\d,]+ examples alone)?")
_ROW = re.compile(r"\| (?P<title>[^|]+) \| [\d,]+(?P<part>\\\*)? \|.*")
_TEXT = "Operating profit rose to EUR 13.1 mn from EUR 8.7 mn."
"""Made-up text of the example prompt."""


def write_readme(
    folder: Path, config: RunConfig, contract: Contract, licences: Mapping[str, str], cards: Mapping[str, str]
) -> None:
    """Write the README of a newly trained adapter, without scores.

    Args:
        licences: task -> licence of its data.
        cards: task of a task file -> that file, as YAML.
    """
    from huggingface_hub import ModelCardData

    hub_id = find_hub_id(contract.base)
    data = ModelCardData(
        base_model=hub_id,
        library_name="peft",
        pipeline_tag="text-generation",
        license="other",
        license_name="as-base-and-data",
        license_link="README.md",
        datasets=sorted({task.hub_id for name in contract.data_hashes if (task := TASKS.get(name)) and task.hub_id})
        or None,
        metrics=["accuracy", "f1"],
        tags=["finlora", "lora", "qlora", "finance", *([f"base_model:adapter:{hub_id}"] if hub_id else [])],
    )
    comment = (
        "" if hub_id else "# base_model: OWNER/NAME  (trained on a local folder: fill it in before you publish this)\n"
    )
    body = "\n\n".join(
        [
            f"# {config.name}",
            f"LoRA adapter of rank {contract.rank} for `{hub_id or Path(contract.base).name}`, trained with FinLoRA on "
            f"{', '.join(contract.data_hashes)}. It answers prompts of the form below; other prompts were not trained.",
            "## Load it with PEFT",
            _write_code(config, contract, hub_id, cards),
            "## Use it with FinLoRA",
            _write_commands(contract),
            "## Settings",
            "\n".join(list_markdown_rows(_list_settings(config, contract))),
            "## Data and licences",
            "\n".join(list_markdown_rows(_list_licences(contract, licences))),
            "The adapter has no licence of its own in this file: those of base and data apply.",
            "## Scores",
            f"{BEGIN}\nNot evaluated yet. `finlora evaluate` writes the scores here.\n{END}",
        ]
    )
    write_whole(folder / README, f"---\n{comment}{data.to_yaml()}\n---\n\n{body}\n")


def refresh_scores(adapter: Path, results: Path) -> str:
    """Put the scores of a results file into an adapter's README; returns what to tell the user, empty where nothing changed.

    A folder that cannot be written keeps its README: the scores are in the results file.
    """
    path = adapter / README
    try:
        if update_scores(adapter, read_results(results), hash_file(adapter / ADAPTER_WEIGHTS)):
            return f"Scores written to {path}"
    except OSError as error:
        return f"{path} keeps its old scores: it cannot be written ({error.strerror})."
    return ""


def update_scores(folder: Path, results: Iterable[Result], weights_hash: str) -> bool:
    """Put the scores of an adapter into its README, between the two marks and as `model-index` on top.

    Scores that stand there stay, unless a result measures the same: `finlora evaluate` may write into another folder each time.

    Args:
        results: of any runs; those of these weights count.
        weights_hash: SHA-256 of the adapter's weights.

    Returns:
        Whether there is a README with these marks; one without them is left as it is.

    Raises:
        OSError: it cannot be written.
    """
    from huggingface_hub import EvalResult, ModelCardData

    path = folder / README
    if not path.is_file():
        return False
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    front = _FRONT.match(text)
    before, begin, rest = text.partition(BEGIN)
    block, end, after = rest.partition(END)
    scored = [result for result in results if result.kind == "evaluation" and result.adapter_hash == weights_hash]
    scored = [kept.result for kept in pair_results(scored).kept]
    if not (front and begin and end and scored):
        return False
    entries = [
        EvalResult(
            task_type="text-generation",
            dataset_type=(TASKS[result.task].hub_id if result.task in TASKS else None) or result.task,
            dataset_name=f"{_title(result)}{_name_part(result)}",
            dataset_config=f"{result.bits} bit, by {result.method}{_name_part(result)}",  # else the library merges them
            dataset_split="test",
            metric_type=kind,
            metric_name=f"{name}, 95 % interval {result.metrics[f'{key}_low']:.4f} to {result.metrics[f'{key}_high']:.4f}",
            metric_value=round(result.metrics[key], 4),
        )
        for result in scored
        for kind, key, name in (("accuracy", "accuracy", "Accuracy"), ("f1", "weighted_f1", "Weighted F1"))
        if key in result.metrics and f"{key}_low" in result.metrics
    ]
    measured = {(_title(result), result.is_partial) for result in scored}
    old = [each for each in _read_index(front[1]) if _stays(_DATASET.fullmatch(each.dataset_name), measured)]
    index = ModelCardData(model_name=scored[0].run or folder.name, eval_results=[*old, *entries]).to_yaml()
    (found,) = _MODEL_INDEX.findall(index + "\n") or [""]
    matter = _MODEL_INDEX.sub("", front[1]) + found
    header, rule, *rows = list_markdown_rows(_list_scores(scored))
    kept = [line for line in block.splitlines() if _stays(_ROW.fullmatch(line), measured)]
    table = "\n".join([header, rule, *kept, *rows])
    body = (
        before[front.end() :]
        + f"{BEGIN}\n{table}\n\n% with 95 % interval, on the whole test split unless marked *.\n{END}{after}"
    )
    write_whole(path, f"---\n{matter}---\n{body}")
    return True


def _read_index(matter: str) -> list[EvalResult]:
    """Return the scores of a front matter; none where people have changed their form."""
    import yaml
    from huggingface_hub.repocard_data import model_index_to_eval_results

    try:
        index = yaml.safe_load("".join(_MODEL_INDEX.findall(matter)))
        return model_index_to_eval_results(index["model-index"])[1] if index else []
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return []


def _stays(found: re.Match[str] | None, measured: Set[tuple[str, bool]]) -> bool:
    """Return whether a score stays in the README: no new one, of the whole split or as partial as it is, measures the same.

    Args:
        found: its `title` and, if it is partial, `part`.
        measured: title, and whether it is partial, of each new one.
    """
    if found is None:
        return False
    title, is_partial = found["title"], found["part"] is not None
    return measured.isdisjoint({(title, False), (title, is_partial)})


def _title(result: Result) -> str:
    return f"{result.task}, {result.bits} bit, by {result.method}"


def _name_part(result: Result) -> str:
    return f", {result.num_examples:,} examples alone" if result.is_partial else ""


def _write_code(config: RunConfig, contract: Contract, hub_id: str | None, cards: Mapping[str, str]) -> str:
    base = hub_id or "BASE"
    revision = f', revision="{contract.revision}"' if hub_id and contract.revision else ""
    if contract.template == "chat":
        date = datetime.fromisoformat(contract.template_date) if contract.template_date else None
        given = "enable_thinking=False" + (f', date_string="{date:%d %b %Y}"' if date else "")
        encode = (
            'messages = [{"role": "user", "content": prompt.strip()}]\n'
            f"text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, {given})\n"
            'ids = tokenizer(text, add_special_tokens=False)["input_ids"]'
        )
    else:
        encode = (
            "first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]\n"
            'ids = [*first, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]'
        )
    return (
        "```python\nimport torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{base}"{revision})\n'
        f'net = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype=torch.bfloat16)\n'
        'model = PeftModel.from_pretrained(net, ".").eval()\n'
        f"prompt = {_example_prompt(contract, cards)!r}\n"
        f"{encode}\n"
        f"output = model.generate(torch.tensor([ids]), max_new_tokens={min(config.eval.max_new_tokens, 16)}, do_sample=False)\n"
        "print(tokenizer.decode(output[0, len(ids):], skip_special_tokens=True))\n```\n\n"
        '`"."` is this folder'
        + ("" if hub_id else ", `BASE` that of the base model")
        + f". The base was held at {contract.bits} bit in training: at other bits some answers differ (`finlora parity .` counts "
        "them)."
    )


def _example_prompt(contract: Contract, cards: Mapping[str, str]) -> str:
    """Return a prompt of the first task with a form, with a made-up text; else a placeholder."""
    for name in contract.data_hashes:
        form: Form | None = TASKS[name].form if name in TASKS else None
        if name in cards:
            form = make_task(read_card(cards[name])).form
        if form is not None:
            about = {"none": "", "entity": "EUR", "question": "QUESTION"}[form.about]
            return form.render(_TEXT, form.about_values[0] if form.about_values else about)
    return "A prompt as the training set has it."


def _write_commands(contract: Contract) -> str:
    asked = [name for name in contract.data_hashes if name in contract.tasks or (name in TASKS and TASKS[name].form)]
    task = f" --task {asked[0]}" if asked else ""
    return (
        f'    finlora ask "{_TEXT}"{task} --config config.yaml --adapter .\n'
        "    finlora card . --output card/\n\n"
        "To serve it, copy this folder into `adapters_dir`. `finlora.yaml` names base, tokenizer and data by hash; FinLoRA "
        "refuses any other base, and changed files."
    )


def _list_settings(config: RunConfig, contract: Contract) -> TextTable:
    rows: Sequence[tuple[str, object]] = (
        ("rank, alpha, dropout", f"{describe_lora(contract)}, {config.lora.dropout:g}"),
        ("projections", ", ".join(contract.target_modules)),
        ("base in training", f"{contract.bits} bit ({contract.quantisation})"),
        ("prompt form", f"{contract.template}{f', dated {contract.template_date}' if contract.template_date else ''}"),
        ("seed", config.seed),
        ("epochs, global batch size", f"{config.train.epochs}, {config.train.global_batch_size}"),
        ("optimiser, learning rate", f"{config.optim.name}, {config.optim.learning_rate:g} ({config.optim.schedule})"),
        ("training examples", f"{contract.num_train_examples:,}"),
        *((name.replace("_", " "), f"{value:g}") for name, value in contract.metrics.items()),
        ("hash of the base's weights", f"`{contract.weights_hash}`"),
    )
    return TextTable(title="", header=("setting", "value"), rows=tuple((name, str(value)) for name, value in rows))


def _list_licences(contract: Contract, licences: Mapping[str, str]) -> TextTable:
    folder = Path(contract.base).expanduser()
    base = find_licence(folder) if folder.is_dir() else None
    rows = [(f"base {find_hub_id(contract.base) or folder.name}", base[0] if base else "see the base", "")]
    rows += [
        (f"data {name}", licences.get(name, "not stated"), f"`{digest[:16]}`")
        for name, digest in contract.data_hashes.items()
    ]
    return TextTable(title="", header=("of", "licence", "hash of the training rows"), rows=tuple(rows))


def _list_scores(scored: Sequence[Result]) -> TextTable:
    rows = []
    for result in scored:
        majority = find_majority(result)
        rows.append(
            (
                _title(result),
                f"{result.num_examples:,}{'*' if result.is_partial else ''}",
                format_score(result, "accuracy"),
                format_score(result, "weighted_f1") if "weighted_f1" in result.metrics else "none",
                f"{100 * majority.accuracy:.1f} ({majority.label})" if majority else "none",
                result.created[:10] or "not recorded",
            )
        )
    header = ("evaluation", "examples", "accuracy", "weighted F1", "always the most frequent label", "date")
    return TextTable(title="", header=header, rows=tuple(rows))
