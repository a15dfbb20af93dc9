"""Adoption of a PEFT adapter that another program trained: checked against its base, copied, and given FinLoRA's contract.

A PEFT folder names its base by a text alone: no hash, no tokenizer, no prompt. What no file and no user states is listed as
unknown in the contract. The given folder is not changed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finlora.card.base_facts import find_hub_id
from finlora.config import Bits, ModelConfig, Template
from finlora.configfile import config_from_tree, show
from finlora.data.sets.catalog import task_named
from finlora.data.taskfile.load import load_task_file
from finlora.data.taskfile.read import make_task
from finlora.durable import follow_umask, scratch_folder, write_whole
from finlora.errors import AdapterError, ConfigError, DatasetError, counted
from finlora.exchange.foreign_folder import find_folder, read_json, refuse_pickle, shorten, without_links
from finlora.formula.llama import PROJECTION_NAMES, LlamaShape
from finlora.formula.low_rank import LoraSettings, adapted_name, is_magnitude, rank_axis, read_settings
from finlora.model.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_adapter,
    check_file,
    find_sites,
    open_weights,
    read_lora_settings,
    read_peft_settings,
)
from finlora.model.base_files import BaseFiles, read_base_files
from finlora.model.contract import CONTRACT_FILE, QUANTISATION, Adopted, Contract, write_contract, write_tasks
from finlora.model.git_lfs import refuse_pointer

_MAX_TOKENIZER_BYTES, _MAX_TEXT_BYTES = 2**26, 2**24
_MAX_WEIGHTS_BYTES = 8 * 2**30
_PLAIN_STARTS = (False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights after which a trained adapter is plain LoRA on the unchanged base. PiSSA, OLoRA, CorDA, LoftQ
and LoRA-GA change the base's weights at the start.
Source: peft/tuners/lora/layer.py, reset_lora_parameters, and its *_init methods, PEFT 0.21."""
_UNUSED = ("auto_mapping", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config")
"""Settings that no longer matter: each projection that the adapter updates is checked by the names of its tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adoption:
    """Result of an adoption."""

    folder: Path
    contract: Contract
    num_tensors: int
    agreed: list[str]
    """Facts that were compared and agree."""


def adopt(
    source: str,
    model: ModelConfig,
    output: Path,
    *,
    template: Template | None,
    bits: Bits | None,
    tasks: Sequence[str] = (),
    is_other_base: bool = False,
) -> Adoption:
    """Check an adapter against a base, and write a copy with its contract.

    Args:
        source: folder with PEFT's two files, or hub id (`owner/name`, `owner/name@revision`).
        model: the base, its tokenizer, and the template if it is known.
        output: new folder.
        template: of the training prompts. None: unknown; any is then accepted.
        bits: of the base in training. None: unknown.
        tasks: that it was trained on, by name; or task files, which it then brings.
        is_other_base: accept that adapter_config.json names another base than `model` is.

    Raises:
        AdapterError: the adapter is incomplete, pickled, needs another formula than LoRA's, or does not fit the base.
        ModelError: the base cannot be used.
        ConfigError: the output is not empty, or a task is unknown.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: it is not empty. Give a new folder: the given adapter is not changed.")
    cards, names, hashes = _read_tasks(tasks)
    folder, origin = find_folder(source)
    if (folder / CONTRACT_FILE).is_file():
        raise AdapterError(f"{folder} has its {CONTRACT_FILE} already: use it as it is.")
    refuse_pickle(folder)
    base = read_base_files(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with without_links(folder, output.parent) as given, scratch_folder(output.parent, f".{output.name}-") as staging:
        values, rewritten, settings, num_tensors = copy_adapter(given, staging, base.shape)
        agreed = [f"{counted(num_tensors, 'tensor')} in the names, ranks and shapes of the base"]
        named, unknown = _compare_base(given, values, model.base, is_other_base)
        if not unknown:
            agreed.append(f"the base's name {named}")
        if _compare_tokenizer(given, base, template):
            agreed.append(f"the {len(base.tokenizer):,} tokens of its tokenizer")
        contract = Contract(
            base=model.base,
            revision=base.source.revision,
            weights_hash=base.weights_hash,
            tokenizer_hash=base.tokenizer_hash,
            template=template,
            bits=bits,
            quantisation=QUANTISATION[bits] if bits else "unknown",
            rank=settings.rank,
            alpha=settings.alpha,
            lora_variant=settings.variant,
            target_modules=[name for name in PROJECTION_NAMES if name in settings.target_modules],
            data_hashes={},
            num_train_examples=None,
            adapter_mib=round((staging / ADAPTER_WEIGHTS).stat().st_size / 2**20, 3),
            template_date=base.template_date if template else None,
            tasks=hashes,
            adopted=Adopted(
                source=origin,
                base_named=named,
                tasks=names,
                unknown=[*unknown, *_list_unknown(template, bits, names, base)],
                rewritten=rewritten,
            ),
        )
        write_whole(staging / "config.yaml", _write_config(output.name, model, contract, settings))
        write_tasks(staging, cards)
        write_contract(staging, contract)
        follow_umask(staging)
        staging.replace(output)
    return Adoption(folder=output, contract=contract, num_tensors=num_tensors, agreed=agreed)


def copy_adapter(given: Path, staging: Path, shape: LlamaShape) -> tuple[dict[str, Any], list[str], LoraSettings, int]:
    """Copy PEFT's two files, the settings in their plain form, and check them against a base.

    Returns:
        PEFT's settings, the keys of them that were rewritten, what decides the updates, and the number of tensors.

    Raises:
        AdapterError: the adapter is incomplete, needs another formula than LoRA's, or does not fit the base.
    """
    given_values, names = read_peft_settings(given), _list_names(given)
    values, rewritten = _normalise(given_values, names)
    shutil.copyfile(given / ADAPTER_WEIGHTS, staging / ADAPTER_WEIGHTS)
    if rewritten:
        write_whole(staging / ADAPTER_CONFIG, json.dumps(values, indent=2) + "\n")
    else:
        shutil.copyfile(given / ADAPTER_CONFIG, staging / ADAPTER_CONFIG)
    settings, num_tensors = _check(staging, given, shape, names)
    return values, rewritten, settings, num_tensors


def _read_tasks(tasks: Sequence[str]) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """Return the cards of task files, the names of all tasks, and the hashes of what task files ask."""
    cards, names, hashes = {}, [], {}
    for text in tasks:
        path = Path(text).expanduser()
        if path.suffix in (".yaml", ".yml"):
            task = make_task(load_task_file(path))
            if task.card is None or task.card_hash is None:
                raise ConfigError(
                    f"--task {text}: it asks nothing by itself. Give a task file as `new-task` writes it."
                )
            cards[task.name], hashes[task.name] = task.card, task.card_hash
            names.append(task.name)
        else:
            try:
                names.append(task_named(text).name)
            except DatasetError as error:
                raise ConfigError(
                    f"--task {error} A task of your own is named by its file: --task letters.yaml"
                ) from error
    return cards, names, hashes


def _list_names(folder: Path) -> list[str]:
    """Return the names of an adapter file's tensors. Reads the header only."""
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_WEIGHTS
    check_file(path, _MAX_WEIGHTS_BYTES)
    refuse_pointer(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise AdapterError(f"{path} is not a complete safetensors file ({error}): copy the adapter again.") from error


def _normalise(values: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return PEFT's settings without forms that mean the same, and the keys that changed.

    PEFT resolves patterns and lists of target names when it trains; the file's tensors show which projections it took.

    Args:
        names: of the file's tensors.
    """
    new, listed = dict(values), values.get("target_modules")
    found = {adapted_name(name) for name in names if rank_axis(name) is not None} - {""}
    if found and (not isinstance(listed, list) or set(map(str, listed)) != found):
        new["target_modules"] = [name for name in PROJECTION_NAMES if name in found] + sorted(
            found - {*PROJECTION_NAMES}
        )
    if any(new.get("init_lora_weights") is one or new.get("init_lora_weights") == one for one in _PLAIN_STARTS):
        new["init_lora_weights"] = True
    for key in _UNUSED:
        if new.get(key):
            new[key] = None
    if new.get("use_rslora") is True and (settings := read_settings(new)) is not None:
        # Rank-stabilised LoRA (arXiv:2312.03732) scales by alpha / sqrt(rank), also where a pattern names one of both.
        new["use_rslora"], new["lora_alpha"] = False, settings.alpha * math.sqrt(settings.rank)
        if single := [*settings.rank_pattern, *settings.alpha_pattern]:
            new["alpha_pattern"] = {name: settings.scale_of(name) * settings.rank_of(name) for name in single}
    return new, sorted(key for key in new if new[key] != values.get(key) or type(new[key]) is not type(values.get(key)))


def _check(staging: Path, given: Path, shape: LlamaShape, names: Sequence[str]) -> tuple[LoraSettings, int]:
    """Check settings and tensors against the base, with the given folder in the messages."""
    try:
        has_lengths = read_lora_settings(staging).dora
        if odd := sorted(
            name for name in names if rank_axis(name) is None and not (has_lengths and is_magnitude(name))
        ):
            raise AdapterError(
                f"{staging / ADAPTER_WEIGHTS} holds {counted(len(odd), 'tensor')} that are no LoRA pair, such as "
                f"{show(odd[0])[1:-1]}: FinLoRA adds LoRA to the projections of decoder layers alone. An embedding or head "
                "stands there after `modules_to_save`, or after tokens were added. Save it without, or use PEFT itself."
            )
        settings = check_adapter(staging)
        with open_weights(staging, settings) as (_, shapes):
            find_sites(staging, settings, shapes, shape)
            return settings, len(shapes)
    except AdapterError as error:
        raise AdapterError(str(error).replace(str(staging), str(given))) from error


def _compare_base(given: Path, values: Mapping[str, Any], base: str, is_other: bool) -> tuple[str | None, list[str]]:
    """Return the base that the adapter names, and what stays unknown of it.

    Raises:
        AdapterError: it names another hub id.
    """
    named = values.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None, [f"its base ({ADAPTER_CONFIG} names none; the shapes fit)"]
    named = shorten(named)
    known = find_hub_id(base)
    if named in (known, base):
        return named, []
    is_hub_id = named.count("/") == 1 and not named.startswith((".", "/", "~"))
    if known is None or not is_hub_id:
        return named, [f"whether the base given is {named}, which it names (the shapes fit)"]
    if not is_other:
        raise AdapterError(
            f"{given} names {named} as its base, and --base is {known}: give the base that it names. If both hold the same "
            "weights under two names, accept that with --other-base."
        )
    return named, [f"whether {known} has the weights of {named}, which it names (the shapes fit)"]


def _compare_tokenizer(given: Path, base: BaseFiles, template: Template | None) -> bool:
    """Compare the tokenizer in the adapter's folder with the base's; returns whether there is one.

    Raises:
        AdapterError: tokens or their ids differ, or the chat template does where the adapter was trained with it.
    """
    from tokenizers import Tokenizer

    path = given / "tokenizer.json"
    if template == "chat" and (found := _read_chat_template(given)) and found != base.tokenizer.chat_template:
        raise AdapterError(
            f"{given} brings another chat template than the base's tokenizer: give its own with --tokenizer {given}, and set "
            "model.tokenizer to that folder later on."
        )
    if not path.exists():
        return False
    check_file(path, _MAX_TOKENIZER_BYTES)
    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise AdapterError(
            f"{path} is not a tokenizer ({error}): copy the adapter again, or remove the file."
        ) from error
    own = base.tokenizer.get_vocab()
    if differing := sorted(
        token for token in vocabulary.keys() | own.keys() if vocabulary.get(token) != own.get(token)
    ):
        raise AdapterError(
            f"{given} brings a tokenizer of {len(vocabulary):,} tokens, the base's has {len(own):,}; "
            f"they differ in {counted(len(differing), 'token')}, such as {show(differing[0])}: it was made for another base. If "
            "only a padding token was added, which stands in no prompt, remove the tokenizer's files from a copy of the folder."
        )
    return True


def _read_chat_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        check_file(path, _MAX_TEXT_BYTES)
        return path.read_bytes().decode("utf-8", "replace")
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else None


def _list_unknown(template: Template | None, bits: Bits | None, tasks: Sequence[str], base: BaseFiles) -> list[str]:
    found = ["rows of the training data and their number"]
    if bits is None:
        found.append("bits of the base in training")
    if template is None:
        found.append("prompt template (raw or chat)")
    if not tasks:
        found.append("wording of the training prompts")
    if template == "chat" and base.template_date:
        found.append(f"date in the training prompts ({base.template_date} is used)")
    return found


def _write_config(name: str, model: ModelConfig, contract: Contract, settings: LoraSettings) -> str:
    """Return config.yaml with what is known; settings of the training are not among it.

    Raises:
        ConfigError: the folder's name cannot name a run.
    """
    keys = ("base", "revision", "tokenizer")
    tree: dict[str, Any] = {
        "name": name,
        "model": {key: value for key in keys if (value := getattr(model, key)) is not None},
        "lora": {"rank": contract.rank, "alpha": contract.alpha, "target_modules": contract.target_modules},
    }
    patterns = {"rank_pattern": settings.rank_pattern, "alpha_pattern": settings.alpha_pattern}
    tree["lora"] |= {key: dict(pattern) for key, pattern in patterns.items() if pattern}
    if settings.dora:
        tree["lora"]["dora"] = True
    tree["model"] |= {key: value for key in ("template", "bits") if (value := getattr(contract, key)) is not None}
    if contract.task_names:
        tree["data"] = {"tasks": contract.task_names}
    config_from_tree(tree)
    return yaml.safe_dump(tree, sort_keys=False)
