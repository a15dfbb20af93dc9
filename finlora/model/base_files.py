"""Record of a base without its weights, resolved once a process: files, config, shapes, tokenizer and template date."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.config import ModelConfig
from finlora.data.chat_template import choose_date
from finlora.data.task import Task
from finlora.formula.llama import LlamaShape
from finlora.model.architecture import check_window
from finlora.model.contract import Contract, read_merged_tasks
from finlora.model.source import ModelSource, find_source, fingerprint_weights
from finlora.model.tokenizer import hash_tokenizer, load_tokenizer, require_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """The checked files of a base, its tokenizer, and the date of its prompts. A verb passes it to all that use the base."""

    model: ModelConfig
    """Settings it was resolved from; a loader may use another compute type or other bits."""
    source: ModelSource
    tokenizer: PreTrainedTokenizerFast
    template_date: str | None
    """Date that the chat template writes into prompts to the base alone; None: it writes none, or a fixed one."""

    @property
    def shape(self) -> LlamaShape:
        return self.source.shape

    @property
    def context_length(self) -> int:
        """Longest sequence, in tokens, that the base was trained for."""
        return int(self.source.config.max_position_embeddings)

    @cached_property
    def weights_hash(self) -> str:
        """`fingerprint_weights`; reads 4 MiB a shard at the first call."""
        return fingerprint_weights(self.source)

    @cached_property
    def tokenizer_hash(self) -> str:
        return hash_tokenizer(self.tokenizer)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Tasks of task files that a merged model brings; errors as `read_merged_tasks`."""
        return read_merged_tasks(self.source.folder)

    def check_adapter(self, folder: Path, contract: Contract) -> str | None:
        """Refuse an adapter of another base, tokenizer, template or date; returns the date of its prompts.

        Raises:
            AdapterError: names everything that differs and how to override.
        """
        contract.check(folder, self, self.model.template)
        return contract.choose_date(folder, self.template_date, self.model.template_date)


def read_base_files(model: ModelConfig) -> BaseFiles:
    """Find a base and read the files beside its weights.

    Raises:
        ModelError: the files are not of a supported family (architecture.py), `max_seq_len` exceeds the base's attention window,
            the tokenizer belongs to another base, or its chat template is missing or takes no date.
    """
    source = find_source(model)
    check_window(source.folder, source.shape, model.max_seq_len)
    tokenizer = load_tokenizer(source.tokenizer_path)
    require_rows(tokenizer, source.shape.vocab_size)
    date = choose_date(tokenizer, model.template, model.template_date)
    return BaseFiles(model=model, source=source, tokenizer=tokenizer, template_date=date)
