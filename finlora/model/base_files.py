"""A base as far as it is known without its weights: what every verb looks at first, before it takes a GPU or starts Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.config import ModelConfig
from finlora.data.chat_template import choose_date
from finlora.model.contract import Contract, read_contract
from finlora.model.source import ModelSource, find_source, fingerprint_weights
from finlora.model.tokenizer import hash_tokenizer, load_tokenizer, require_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFiles:
    """The checked files of a base, its tokenizer, and the date of its prompts."""

    model: ModelConfig
    source: ModelSource
    tokenizer: PreTrainedTokenizerFast
    template_date: str | None
    """Day that the chat template writes into prompts to the base alone; None: it writes none, or always its own."""

    def hash_weights(self) -> str:
        return fingerprint_weights(self.source)

    def hash_tokenizer(self) -> str:
        return hash_tokenizer(self.tokenizer)

    def check_adapter(self, folder: Path, contract: Contract) -> str | None:
        """Refuse an adapter of another base, tokenizer, template or date; returns the date of its prompts.

        Raises:
            AdapterError: names everything that differs and how to override.
        """
        contract.check_hashes(folder, self.hash_weights(), self.hash_tokenizer(), self.model.template)
        return contract.choose_date(folder, self.template_date, self.model.template_date)


def read_base_files(model: ModelConfig) -> BaseFiles:
    """Find a base and read what stands beside its weights.

    Raises:
        ModelError: the files are not a Llama that every path computes (architecture.py), the tokenizer does not belong to it, or
            its chat template is missing or takes no date.
    """
    source = find_source(model)
    tokenizer = load_tokenizer(source.tokenizer_path)
    require_rows(tokenizer, source.shape.vocab_size)
    date = choose_date(tokenizer, model.template, model.template_date)
    return BaseFiles(model=model, source=source, tokenizer=tokenizer, template_date=date)


def check_base(model: ModelConfig, adapter: Path | None = None) -> None:
    """Look at a base, and an adapter for it, as far as files tell: before Ray is started and GPUs are waited for.

    Raises:
        ModelError: the base's files are not usable.
        AdapterError: the adapter is incomplete or was made for another base, tokenizer or template.
    """
    files = read_base_files(model)
    if adapter is not None:
        files.check_adapter(adapter, read_contract(adapter))
