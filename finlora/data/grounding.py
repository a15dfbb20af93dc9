"""Grounding of a free-text answer: its position in the context, as a tag or number of an XBRL fragment. No torch.

Tags and plain numbers count as equal where `evaluate.metrics.normalise_free_text` makes them equal. A number keeps its unit,
since a value in millions is a different value.
"""

from __future__ import annotations

import re
from decimal import Decimal

# Parts of a date, a range, a time, an address ("us-gaap/2023#Assets") or a longer number do not count as numbers.
_NUMBER = re.compile(
    r"(?<![\w.,/#-])(?<!\d:)"
    r"(?P<sign>[-−](?:\$\s?)?|\$\s?[-−]?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:\s?(?P<unit>%|per\s?cent|thousand|million|billion|trillion|k|m|mn|bn|b))?"
    r"(?![\w/#%-]|[.,:]\d|\s?%|\s(?:per\s?cent|thousand|million|billion|trillion)(?!\w))",
    re.IGNORECASE,
)
_PREFIX = re.compile(r"us-gaap:\s*", re.IGNORECASE)
# The taxonomy's address equals its prefix; after any other prefix or address it is a company's own tag.
_PLAIN_START = r"(?:(?<![\w-])us-gaap/\d+#|(?<![\w:#-])(?<!\w[./]))"
_TEXT_END = r"(?![\w-]|[./:]\w)"


def find_quote(answer: str, context: str) -> tuple[int, int] | None:
    """Find the span (start, end) of the context that states the answer; None if there is none.

    A tag must occur as a whole, in any case; its "us-gaap:" is optional in both texts, and a span with it is preferred. A
    number must occur as a whole with its sign and unit; `$`, thousands commas and trailing zeros of the fraction are ignored,
    and a span that fills an element (`>1234<`) is preferred. Any other text must occur as whole words, in any case.
    """
    words = answer.strip().removesuffix(".").split()
    number = _NUMBER.fullmatch("".join(words))
    if number is not None:
        return _find_number(_read_number(number), context)
    words = _PREFIX.sub("", " ".join(words), count=1).split() if words else []
    return _find_words(words, context) if words else None


def _find_number(wanted: tuple[Decimal, str], context: str) -> tuple[int, int] | None:
    spans = [match.span() for match in _NUMBER.finditer(context) if _read_number(match) == wanted]
    return min(spans, key=lambda span: not _fills_element(span, context), default=None)


def _read_number(match: re.Match[str]) -> tuple[Decimal, str]:
    """Return value and unit as they are written, not multiplied."""
    value = Decimal(match["digits"].replace(",", ""))
    is_negative = any(minus in (match["sign"] or "") for minus in "-−")
    return -value if is_negative else value, "".join((match["unit"] or "").lower().split())


def _fills_element(span: tuple[int, int], context: str) -> bool:
    start, end = span
    return context[:start].rstrip().endswith(">") and context[end:].lstrip().startswith("<")


def _find_words(words: list[str], context: str) -> tuple[int, int] | None:
    text = r"\s+".join(re.escape(word) for word in words)
    for pattern in (rf"(?<![\w-])(us-gaap:{text}){_TEXT_END}", rf"{_PLAIN_START}({text}){_TEXT_END}"):
        # Search with IGNORECASE: a lower-cased copy may be longer than the context, with other indices.
        match = re.search(pattern, context, re.IGNORECASE)
        if match is not None:
            return match.span(1)
    return None
