"""The look-up of NF4's numbers, run line by line on plain integers: it must give bitsandbytes' table, rounded to bfloat16."""

from __future__ import annotations

import random

import bitsandbytes as bnb
import torch

from finlora.model.nf4 import UNPACK_NF4

WORD = 0xFFFFFFFF


def prmt(low, high, selector):
    """PTX's byte permutation: a nibble chooses one of eight bytes; its bit 3 spreads that byte's sign instead."""
    table = [(word >> 8 * place) & 255 for word in (low, high) for place in range(4)]
    out = 0
    for place in range(4):
        nibble = (selector >> 4 * place) & 15
        byte = table[nibble & 7]
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * place
    return out


def lop3(first, second, third, table):
    out = 0
    for place in range(32):
        index = (first >> place & 1) << 2 | (second >> place & 1) << 1 | (third >> place & 1)
        out |= (table >> index & 1) << place
    return out


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b & WORD,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
}


def run(word):
    registers = {"$4": word}
    for line in UNPACK_NF4.strip().strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in OPERATIONS:
            target, *operands = (part.strip() for part in rest.split(","))
            values = [registers[part] if part in registers else int(part, 0) for part in operands]
            registers[target] = OPERATIONS[name](*values)
        else:
            assert name in ("", ".reg")
    return [registers[f"${number}"] for number in range(4)]


def test_every_byte_gives_its_two_numbers():
    numbers = bnb.functional.get_4bit_type("nf4", device="cpu").bfloat16().view(torch.int16).tolist()
    bits = [number & 0xFFFF for number in numbers]
    shuffled = random.Random(0).sample(range(256), 256)
    for start in range(0, 256, 4):
        four = shuffled[start : start + 4]
        even, odd = ([bits[byte >> 4] for byte in four], [bits[byte & 15] for byte in four])
        expected = [pair[0] | pair[1] << 16 for side in (even, odd) for pair in (side[:2], side[2:])]
        assert run(int.from_bytes(bytes(four), "little")) == expected
