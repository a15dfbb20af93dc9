"""Parts of a card on the adapter itself: settings, training, versions and hardware, lineage, approvals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from finlora.card.approvals import APPROVALS_FILE
from finlora.card.evidence import HUB_FIELD, Evidence
from finlora.card.part import UNKNOWN, Block, Code, Part, Picture, list_facts, make_part
from finlora.card.profile import FIELDS_FILE
from finlora.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finlora.model.contract import CONTRACT_FILE, Contract
from finlora.report.tables import TextTable, format_number
from finlora.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def describe_adapter(evidence: Evidence) -> Part:
    """Name, base and LoRA settings."""
    contract = evidence.contract
    rows = [
        ("name of the run", evidence.name if evidence.config or contract.adopted else None, "config.yaml"),
        ("base", contract.base, CONTRACT_FILE),
        ("base on the hub", *(evidence.hub_id or (None, "no mirror.json in its folder"))),
        ("commit of the base", contract.revision or "none: a local folder", CONTRACT_FILE),
        (
            "bits of the base in training",
            f"{contract.bits} ({contract.quantisation})" if contract.bits else None,
            CONTRACT_FILE,
        ),
        ("LoRA rank, alpha", describe_lora(contract), CONTRACT_FILE),
        ("projections", ", ".join(contract.target_modules), CONTRACT_FILE),
        ("prompt form", contract.template, CONTRACT_FILE),
        ("date in each prompt", contract.template_date or "none", CONTRACT_FILE),
        ("tasks", ", ".join(contract.task_names) or None, CONTRACT_FILE),
        (
            "trained examples",
            None if contract.num_train_examples is None else f"{contract.num_train_examples:,}",
            CONTRACT_FILE,
        ),
        ("size", f"{contract.adapter_mib:.2f} MiB", CONTRACT_FILE),
        ("hash on a server", evidence.adapter_hash[:16], f"{ADAPTER_WEIGHTS}, {ADAPTER_CONFIG}"),
    ]
    gaps = []
    if contract.adopted is not None:
        rows[1:1] = [
            ("trained by", f"another program; adopted from {contract.adopted.source}", CONTRACT_FILE),
            ("base that its settings name", contract.adopted.base_named, CONTRACT_FILE),
            ("tasks are", "as stated at the adoption" if contract.adopted.tasks else None, CONTRACT_FILE),
        ]
        gaps += contract.adopted.unknown
    if evidence.hub_id is None:
        gaps.append(
            f"where the base comes from: {contract.base} is a folder that no mirror.json names, known by the hash of its weights "
            f"alone. Write its hub id into {FIELDS_FILE} as {HUB_FIELD}"
        )
    return make_part("adapter", "Adapter", [list_facts(rows)], [evidence.folder], gaps)


def describe_training(evidence: Evidence) -> Part:
    """Seed, settings, loss and cost of the training."""
    config, trained = evidence.config, evidence.trained
    rows: list[tuple[str, object, object]] = []
    gaps = []
    blocks: list[Block] = []
    if config is None:
        gaps.append(f"settings: {evidence.why_no_config}")
    else:
        train, optim = config.train, config.optim
        values = (
            ("seed", config.seed),
            ("epochs", train.epochs),
            ("most steps", train.max_steps or "no limit"),
            ("global batch size", train.global_batch_size),
            ("optimiser", optim.name),
            ("learning rate, schedule", f"{optim.learning_rate:g}, {optim.schedule}"),
            ("weight decay", f"{optim.weight_decay:g}"),
            ("LoRA dropout", f"{config.lora.dropout:g}"),
            ("longest example", f"{config.model.max_seq_len:,} tokens"),
            ("most training examples", config.data.max_train_examples or "all"),
            ("workers", f"{train.num_workers} on {train.device}"),
        )
        rows += [(name, value, "config.yaml") for name, value in values]
    contract = evidence.contract
    rows += [(name, f"{value:g}", CONTRACT_FILE) for name, value in contract.metrics.items()]
    if trained is None:
        where = ", ".join(map(str, evidence.searched))
        gaps.append(f"loss curve, time and memory: {where} holds no training of exactly these weights")
    else:
        rows += [(name, value, evidence.trained_source) for name, value in _list_costs(trained)]
        if trained.loss_curve:
            blocks.append(Picture("Training loss", draw_loss(trained)))
    return make_part("training", "Training", [list_facts(rows), *blocks], [evidence.folder], gaps)


def describe_environment(evidence: Evidence) -> Part:
    """Versions and hardware of the training and of each evaluation."""
    measured = [("training", evidence.trained)] if evidence.trained else []
    measured += [(f"evaluation: {scored.name}", scored.result) for scored in evidence.scored]
    names = list(dict.fromkeys(name for _, result in measured for name in result.environment))
    table = TextTable(
        title="Versions and hardware",
        header=("", *(name for name, _ in measured)),
        rows=tuple((name, *(result.environment.get(name, UNKNOWN) for _, result in measured)) for name in names),
    )
    versions = [
        (f"FinLoRA that prepared {task.name}", split.finlora_version, task.folder)
        for task in evidence.tasks
        if (split := task.train or task.test)
    ]
    gaps = [] if evidence.trained else ["versions and hardware of the training: no result of it was found"]
    if not evidence.scored:
        gaps.append("versions and hardware of an evaluation: none was found")
    sources = [evidence.trained_source, *(scored.source for scored in evidence.scored)]
    blocks: list[Block] = [table] if names else []
    return make_part(
        "environment", "Versions and hardware", [*blocks, *([list_facts(versions)] if versions else [])], sources, gaps
    )


def describe_lineage(evidence: Evidence) -> Part:
    """Hashes from the base over the data to the adapter and its evaluations."""
    contract, base = evidence.contract, evidence.base
    rows: list[tuple[str, ...]] = [
        ("1 base", contract.base, contract.weights_hash, f"sample of its weights, {CONTRACT_FILE}"),
        ("1 tokenizer", contract.base, contract.tokenizer_hash, CONTRACT_FILE),
    ]
    rows += [("2 training data", name, digest, CONTRACT_FILE) for name, digest in contract.data_hashes.items()]
    rows += [("2 question of a task file", name, digest, CONTRACT_FILE) for name, digest in contract.tasks.items()]
    rows += [
        ("3 adapter's weights", ADAPTER_WEIGHTS, evidence.weights_hash, "SHA-256 of the file"),
        (
            "3 adapter",
            f"{ADAPTER_WEIGHTS}, {ADAPTER_CONFIG}",
            evidence.adapter_hash,
            "SHA-256; a server shows 16 digits",
        ),
        ("3 contract", CONTRACT_FILE, evidence.contract_hash, "SHA-256 of the file"),
    ]
    for scored in evidence.scored:
        result = scored.result
        rows.append(("4 test data", result.task, result.data_hash or UNKNOWN, str(scored.source)))
        rows.append(
            (
                "4 evaluation",
                f"{scored.name}, {result.created or 'date unknown'}",
                f"adapter {result.adapter_hash}, base {result.base_hash}",
                str(scored.source),
            )
        )
        if result.answers and result.answers_hash:
            rows.append(("4 answers", result.answers, result.answers_hash, str(scored.source)))
    gaps = []
    text = "The adapter's files agree with its contract."
    if base.files is None:
        gaps.append(f"the base's hash, compared with its files: {base.why_no_files}")
    elif base.files.weights_hash == contract.weights_hash and base.files.tokenizer_hash == contract.tokenizer_hash:
        text += f" The base and tokenizer in {base.folder} have the contract's hashes."
    else:
        gaps.append(f"the base of the training: {base.folder} holds another one (hash {base.files.weights_hash})")
    table = TextTable(title="Lineage", header=("step", "what", "hash", "source"), rows=tuple(rows))
    return make_part("lineage", "Lineage", [text, table], [evidence.folder], gaps)


def describe_approvals(evidence: Evidence) -> Part:
    """Decisions of people, the check of their hash chain, and whether they hold for the files as they are."""
    state = evidence.approvals
    path = evidence.folder / APPROVALS_FILE
    rows = tuple(
        (
            entry.time,
            entry.by,
            entry.decision,
            entry.note,
            entry.adapter_hash[:16],
            (entry.card_hash or "none")[:16],
            entry.hash,
        )
        for entry in state.entries
    )
    blocks: list[Block] = []
    if state.entries:
        blocks.append(
            f"The chain of {len(state.entries)} entries is intact. Its last hash is {state.entries[-1].hash}."
        )
    if state.is_approved:
        blocks.append("The last entry approves the adapter as it is now.")
    if rows:
        header = ("time (UTC)", "by", "decision", "note", "adapter's hash", "document's hash", "hash of the entry")
        blocks.append(TextTable(title="Approvals", header=header, rows=rows))
    gaps = [] if state.refusal is None else [f"an approval that holds: {state.refusal}"]
    return make_part("approvals", "Approvals", blocks, [path] if state.entries else [], gaps)


def describe_config(evidence: Evidence) -> Part:
    """All settings of the training."""
    if evidence.config is None:
        return make_part("config", "All settings", [], [], [f"the settings: {evidence.why_no_config}"])
    path = evidence.folder / "config.yaml"
    return make_part("config", "All settings", [Code(str(path), path.read_text(encoding="utf-8"))], [path], [])


def draw_loss(trained: Result) -> Figure:
    """Draw the training loss over optimiser steps."""
    from finlora.report.plots import COLOURS, new_figure

    figure, axes = new_figure(6.5, 3.6)
    steps, losses = zip(*trained.loss_curve, strict=True)
    axes.plot(steps, losses, color=COLOURS[0], linewidth=1.8, marker="o" if len(steps) == 1 else None)
    axes.set_xlabel("optimiser step", fontsize=12)
    axes.set_ylabel("training loss", fontsize=12)
    axes.set_ylim(bottom=0)
    axes.grid(color="#EEEEEE")
    return figure


def _list_costs(trained: Result) -> Iterator[tuple[str, object]]:
    metrics = trained.metrics
    yield "loss, first and last", f"{metrics.get('loss_first', 0):.4f}, {metrics.get('loss_last', 0):.4f}"
    yield "examples", f"{trained.num_examples:,}{' (a part)' if trained.is_partial else ''}"
    yield "starts", trained.attempts
    yield "run time, s", format_number(trained.wall_seconds, 0)
    yield (
        "GPU-hours",
        format_number(trained.gpu_hours, 2) if trained.gpu_hours is not None else "none: trained on a CPU",
    )
    yield "peak memory, GiB", format_number(trained.peak_memory_gib, 2)
    yield "tokens a second", format_number(trained.tokens_per_second, 0)
    yield "date", trained.created or None


def describe_lora(contract: Contract) -> str:
    """Return rank and alpha, with what differs from plain LoRA: `4, 32; rsLoRA`."""
    return f"{contract.rank}, {contract.alpha:g}{contract.lora_variant and f'; {contract.lora_variant}'}"
