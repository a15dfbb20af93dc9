"""Vocabularies of the kinds of tokenizers that bases have."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finlora.engine.micro_batch import MicroBatch, Output, Sample
from finlora.errors import ModelError
from finlora.grammar.compile import choice
from finlora.grammar.vocabulary import Vocabulary
from finlora.model.tokenizer import load_tokenizer

TEXTS = ["up by 3", "\u00fcber", "down"]


def make_metaspace():
    """A tokenizer as Mistral's: spaces are \u2581, unknown characters are bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", *"upbydon3w", "up", "\u2581b", "\u2581by", "\u25813", "do", "wn", "down"]
    merges = [("u", "p"), ("\u2581", "b"), ("\u2581b", "y"), ("\u2581", "3"), ("d", "o"), ("w", "n"), ("do", "wn")]
    model = models.BPE(
        {word: index for index, word in enumerate(dict.fromkeys(words))}, merges, byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("text", TEXTS)
def test_greedy_walk_spells_the_only_choice(kind, text, tiny_base):
    from torch import device

    from finlora.stage.grammar_masks import GrammarMasks

    tokenizer = load_tokenizer(Path(tiny_base)) if kind == "bytes" else make_metaspace()
    masks, tokens = GrammarMasks(Vocabulary(tokenizer, tokenizer.eos_token_id), device("cpu")), []
    while True:
        position = len(tokens)
        sample = Sample(0, 0.0, 1.0, 0, position, 0)
        found = masks.fill(
            MicroBatch(position, samples=[sample], grammars=[(0, choice([text]))] if not position else [])
        )
        word = int.from_bytes(found.bits[0].numpy().tobytes(), "little")
        token = (word & -word).bit_length() - 1
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
        masks.follow(MicroBatch(position, samples=[sample]), lambda token=token: Output(0, [(token, 0.0)], ()))
    assert tokenizer.decode(tokens) == text


def test_tokenizer_of_another_kind_is_refused():
    words = {"[UNK]": 0, "</s>": 1, "up": 2, "##per": 3}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="[UNK]")
    with pytest.raises(ModelError, match="structured output is not possible with this base"):
        Vocabulary(wrapped, 1).open()
