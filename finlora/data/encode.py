"""Encoding of examples and prompts as token ids, equal in training, evaluation and serving.

Shapes: B examples of a batch, T the longest of them in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from finlora.data.chat_template import render_turns
from finlora.data.example import Example
from finlora.errors import ConfigError, DatasetError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""Label of positions without loss, which torch.nn.functional.cross_entropy ignores."""


_TEXTS_AT_ONCE = 64
"""Texts of one call of the tokenizer, which holds some hundred bytes for each token until it returns."""


class Asked(Protocol):
    """An example, or a user's question."""

    @property
    def prompt(self) -> str: ...
    @property
    def turns(self) -> tuple[tuple[str, str], ...]: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example: the prompt with one leading BOS, the answer with one end token."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    weight: float = 1.0
    """Factor of its loss."""

    @property
    def loss_tokens(self) -> float:
        """Answer tokens times weight: what the loss of a step is divided by."""
        return len(self.answer_ids) * self.weight

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded examples. `labels` is IGNORED on prompt and padding, and not shifted: position t is token t."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    attention_mask: torch.Tensor
    """(B, T) int64, 1 on real tokens."""
    labels: torch.Tensor
    """(B, T) int64."""
    num_tokens: int
    """Real tokens, padding not counted."""
    weights: torch.Tensor | None = None
    """(B,) float32; None: all 1."""

    def to(self, device: torch.device) -> Batch:
        weights = None if self.weights is None else self.weights.to(device)
        moved = (self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))
        return Batch(*moved, self.num_tokens, weights)


def encode_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerFast, template: Literal["raw", "chat"], date: str | None = None
) -> tuple[int, ...]:
    """Render a prompt to token ids, with exactly one leading BOS; without one where the base has none, or does not use it.

    Text that looks like a special token (`<|eot_id|>` inside a tweet) is encoded as plain characters, so no document can
    end or open a turn.

    Args:
        date: that a chat template writes as today, from `choose_date` or an adapter's contract. Never the clock's.

    Raises:
        ModelError: template is `chat` and the tokenizer has no chat template, or one that does not take a prompt.
    """
    (ids,) = encode_prompts([prompt], tokenizer, template, date)
    return ids


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    template: Literal["raw", "chat"],
    date: str | None = None,
) -> list[tuple[int, ...]]:
    """Render many prompts, each as `encode_prompt` does, in less time: the template and the tokenizer run once for many."""
    if template == "raw":
        bos = _list_bos(tokenizer)
        return [(*bos, *ids) for ids in encode_texts(prompts, tokenizer)]
    # A placeholder marks the prompt: the template's text around it is encoded with special tokens, the prompt without.
    marker = "\ue000prompt\ue000"
    frame = render_turns([{"role": "user", "content": marker}], tokenizer, date)
    if frame.count(marker) != 1:
        raise ModelError(
            f"the tokenizer's chat template writes a user's message {frame.count(marker)} times: expected once. Set "
            "model.template=raw, or correct the template."
        )
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in frame.split(marker))
    plain = encode_texts([prompt.strip() for prompt in prompts], tokenizer)
    bos = _list_missing_bos(before, tokenizer)
    return [(*bos, *before, *ids, *after) for ids in plain]


def encode_turns(
    turns: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    template: Literal["raw", "chat"],
    date: str | None = None,
) -> tuple[int, ...]:
    """Render a conversation up to the start of the assistant's next turn. One user message is a prompt as any other.

    Text that looks like a special token is encoded as plain characters, so that no message can end or open a turn.

    Args:
        turns: role and content of each message.
        date: as in `encode_prompt`.

    Raises:
        ConfigError: several turns under the template `raw`, or turns that the chat template refuses or leaves out.
    """
    if len(turns) == 1 and turns[0][0] == "user":
        return encode_prompt(turns[0][1], tokenizer, template, date)
    if template == "raw":
        roles = ", ".join(role for role, _ in turns)
        raise ConfigError(
            f"a conversation holds {len(turns)} turns ({roles}), and model.template=raw has none: set model.template=chat."
        )
    # The template renders placeholders: its own text is encoded with special tokens, the messages without.
    markers = [f"\ue000{index}\ue001" for index in range(len(turns))]
    try:
        rest = render_turns(
            [{"role": role, "content": marker} for (role, _), marker in zip(turns, markers, strict=True)],
            tokenizer,
            date,
        )
    except ModelError as error:
        raise ConfigError(f"{error}: expected system, user, assistant, user in turn.") from error
    ids: list[int] = []
    for (_, content), marker in zip(turns, markers, strict=True):
        before, found, rest = rest.partition(marker)
        if not found:
            raise ConfigError(
                "the base's chat template leaves out some of these turns: expected system, user, assistant."
            )
        ids += tokenizer.encode(before, add_special_tokens=False)
        ids += encode_text(content.strip(), tokenizer)
    ids += tokenizer.encode(rest, add_special_tokens=False)
    return (*_list_missing_bos(ids, tokenizer), *ids)


def encode_asked(
    asked: Asked, tokenizer: PreTrainedTokenizerFast, template: Literal["raw", "chat"], date: str | None = None
) -> tuple[int, ...]:
    """Render what an example or a question asks: its conversation where it has one, else its prompt."""
    if asked.turns:
        return encode_turns(asked.turns, tokenizer, template, date)
    return encode_prompt(asked.prompt, tokenizer, template, date)


def encode_answer(answer: str, tokenizer: PreTrainedTokenizerFast, template: Literal["raw", "chat"]) -> tuple[int, ...]:
    """Render an answer to token ids, closed by the end token: EOS, or the end of turn under a chat template."""
    return (*encode_text(answer, tokenizer), end_token_id(tokenizer, template))


def encode_choices(
    choices: Sequence[str], tokenizer: PreTrainedTokenizerFast, template: Literal["raw", "chat"]
) -> tuple[tuple[int, ...], ...]:
    """Render the allowed answers of a question; no two of them have the same tokens.

    Raises:
        ModelError: an answer has no token, or two have the same tokens: their probabilities would mean nothing.
    """
    encoded = tuple(encode_answer(choice, tokenizer, template) for choice in choices)
    for index, ids in enumerate(encoded):
        if len(ids) == 1 or ids in encoded[:index]:
            why = "no token" if len(ids) == 1 else f"the same tokens as {choices[encoded.index(ids)]!r}"
            raise ModelError(
                f"the allowed answer {choices[index]!r} has {why} in this tokenizer, so it cannot be scored: model.tokenizer "
                "belongs to a model of another language."
            )
    return encoded


def end_token_id(tokenizer: PreTrainedTokenizerFast, template: Literal["raw", "chat"]) -> int:
    """Return the id that ends an answer."""
    if template == "chat":
        end_of_turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        if end_of_turn is not None and end_of_turn != tokenizer.unk_token_id:
            return int(end_of_turn)
    return int(tokenizer.eos_token_id)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    *,
    template: Literal["raw", "chat"],
    max_seq_len: int,
    too_long: Literal["error", "skip"],
    reserve: Sequence[int] = (),
    date: str | None = None,
) -> tuple[list[Encoded], list[int]]:
    """Encode examples without truncation: an XBRL question comes last, after thousands of tokens.

    Args:
        max_seq_len: longest prompt + answer in tokens.
        reserve: for each example, tokens reserved for generation; its answer counts as at least that many.
        date: as in `encode_prompt`.

    Returns:
        The encoded examples, and their indices (all of them under too_long="error").

    Raises:
        DatasetError: an example is too long and too_long is `error`; names it, its length and the limit. Or an answer has no
            token.
    """
    kept: list[int] = []
    encoded: list[Encoded] = []
    longest: tuple[int, Example] | None = None
    for index, example in enumerate(examples):
        item = Encoded(
            encode_asked(example, tokenizer, template, date),
            encode_answer(example.answer, tokenizer, template),
            example.weight,
        )
        if len(item.answer_ids) == 1:  # the end token alone
            raise DatasetError(
                f"{example.id} ({example.source}) has the answer {example.answer!r}, which has no token in this tokenizer: "
                "it cannot be learnt or scored. Remove the row and prepare the task again, or check model.tokenizer."
            )
        length = max(item.num_tokens, len(item.prompt_ids) + (reserve[index] if reserve else 0))
        if length <= max_seq_len:
            encoded.append(item)
            kept.append(index)
        elif longest is None or length > longest[0]:
            longest = (length, example)
    if longest is not None and too_long == "error":
        num_too_long = len(examples) - len(kept)
        raise DatasetError(
            f"{num_too_long} of {len(examples)} examples are longer than model.max_seq_len={max_seq_len} tokens; the longest "
            f"is {longest[1].id} ({longest[1].source}) with {longest[0]}. Nothing is truncated, since the question may come "
            "last: raise model.max_seq_len, or set data.too_long=skip to leave them out and count them."
        )
    if not encoded:
        raise DatasetError(
            f"none of {len(examples)} examples is left: every one is over max_seq_len={max_seq_len} tokens."
        )
    return encoded, kept


def collate(items: Sequence[Encoded], pad_token_id: int) -> Batch:
    """Pad a batch on the right to its longest example."""
    import torch

    longest = max(item.num_tokens for item in items)
    input_ids = torch.full((len(items), longest), pad_token_id, dtype=torch.long)
    labels = torch.full((len(items), longest), IGNORED, dtype=torch.long)
    mask = torch.zeros((len(items), longest), dtype=torch.long)
    for row, item in enumerate(items):
        start, end = len(item.prompt_ids), item.num_tokens
        input_ids[row, :end] = torch.tensor(item.prompt_ids + item.answer_ids)
        labels[row, start:end] = torch.tensor(item.answer_ids)
        mask[row, :end] = 1
    return Batch(input_ids, mask, labels, sum(item.num_tokens for item in items), stack_weights(items, repeats=False))


def stack_weights(items: Sequence[Encoded], *, repeats: bool) -> torch.Tensor | None:
    """Return the examples' weights; None where all are 1.

    Args:
        repeats: one for each answer token instead of one for each example.
    """
    import torch

    if all(item.weight == 1 for item in items):
        return None
    return torch.tensor([item.weight for item in items for _ in (item.answer_ids if repeats else (0,))])


def encode_text(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of a text; what looks like a special token in it is plain characters."""
    (ids,) = encode_texts([text], tokenizer)
    return ids


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Yield the ids of each text, as `encode_text` does."""
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        few = list(texts[start : start + _TEXTS_AT_ONCE])
        yield from tokenizer(few, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _list_bos(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return BOS; nothing for a tokenizer without one, as Qwen's."""
    return () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)


def _list_missing_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return BOS where a chat template rendered to `ids` wrote none and the tokenizer puts it before any text."""
    bos = _list_bos(tokenizer)
    is_there = tuple(ids[: len(bos)]) == bos or tuple(tokenizer("")["input_ids"][:1]) != bos
    return () if is_there else bos
