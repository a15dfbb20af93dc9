"""Loader of a base's tokenizer: a Hugging Face tokenizer.json, or Llama 3's tiktoken file.

Source of the tiktoken pattern and of the special ids: the Llama 3 reference tokenizer,
https://github.com/meta-llama/llama-models/blob/a9c89c471f793423afd4cc3ca8671d6e56fe64cb/models/llama3/tokenizer.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.errors import ModelError
from finlora.machine.lean_imports import lean_imports
from finlora.model.git_lfs import refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NUM_RANKS, _NUM_RESERVED = 128_000, 256
_NAMED_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}

# The header form of a Llama 3 conversation, without a default system turn: the prompt holds the given messages alone.
LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder, or from a Llama 3 `tokenizer.model` file. It has EOS and a padding token; BOS only if the
    base uses one.

    Raises:
        ModelError: there is no loadable tokenizer at `path`, or it lacks an EOS token.
    """
    with lean_imports():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for file in (path, path / "tokenizer.json", path / "tokenizer.model"):
        if file.is_file():
            refuse_pointer(file)
    if path.is_file():
        tokenizer = _from_tiktoken(path)
    elif (path / "tokenizer.json").is_file():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
            if _is_rebuilt(tokenizer, path):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        except (
            Exception
        ) as error:  # the tokenizers library raises its own types, and plain Exception for a damaged file
            raise ModelError(f"the tokenizer at {path} cannot be read ({error}): copy the model again.") from error
    elif (path / "tokenizer.model").is_file():
        tokenizer = _from_tiktoken(path / "tokenizer.model")
    else:
        raise ModelError(
            f"{path} holds no tokenizer: expected tokenizer.json or Llama 3's tokenizer.model. "
            "Copy it beside the weights, or set model.tokenizer to it."
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer at {path} has no EOS token: expected one, which ends an answer.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padded positions are masked, so any existing id serves
    return tokenizer


def _is_rebuilt(tokenizer: PreTrainedTokenizerFast, folder: Path) -> bool:
    """Return whether transformers made Qwen 2's tokenizer from the vocabulary of a tokenizer.json that splits text otherwise.

    It does so for every base with model_type qwen2. The base was trained with the file's tokens.
    """
    if type(tokenizer).__name__ != "Qwen2Tokenizer":
        return False
    own = json.loads(tokenizer.backend_tokenizer.to_str())
    file = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return any(own.get(part) != file.get(part) for part in ("normalizer", "pre_tokenizer"))


def require_rows(tokenizer: PreTrainedTokenizerFast, num_rows: int) -> None:
    """Refuse a tokenizer with an id for which the embedding has no row.

    Raises:
        ModelError: says both sizes.
    """
    size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if size > num_rows:
        raise ModelError(
            f"the tokenizer has {size} tokens but the model embeds {num_rows}: model.tokenizer does not belong to model.base."
        )


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return 16 hex digits that change with vocabulary, merges, special tokens or chat template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # The backend keeps padding and truncation of the last call, which are not part of the tokenizer.
    state["padding"] = state["truncation"] = None
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several named templates; prompts use the default one
        template = template.get("default")
    text = json.dumps(state) + (template or "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _from_tiktoken(path: Path) -> PreTrainedTokenizerFast:
    """Convert tiktoken BPE ranks (128,000 base tokens + 256 reserved special tokens) to a fast tokenizer with equal ids."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    specials = _special_tokens()
    try:
        # The converter's default pattern is Llama 3's own.
        backend = TikTokenConverter(vocab_file=str(path), extra_special_tokens=specials).converted()
    except (ValueError, IndexError, OSError) as error:
        raise ModelError(
            f"{path} is not a tiktoken file ({error}): expected lines of a base64 token and its rank, as Llama 3 ships it."
        ) from error
    num_ranks = backend.get_vocab_size() - _NUM_RESERVED
    if num_ranks != _NUM_RANKS:
        # The special tokens follow the last rank: a missing rank would shift their ids.
        raise ModelError(
            f"{path} holds {num_ranks:,} tokens, expected {_NUM_RANKS:,} as Llama 3 ships it: it is truncated or another "
            "model's, copy it again."
        )
    bos = specials[0]
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=_NAMED_SPECIALS[1],
        pad_token=_NAMED_SPECIALS[4],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = LLAMA3_CHAT_TEMPLATE
    return tokenizer


def _special_tokens() -> list[str]:
    """List the 256 special tokens in id order, as the Llama 3.1 tokenizer numbers them."""
    tokens, reserved = [], 0
    for index in range(_NUM_RESERVED):
        if index in _NAMED_SPECIALS:
            tokens.append(_NAMED_SPECIALS[index])
        else:
            tokens.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return tokens
