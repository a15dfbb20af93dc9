"""Reference page of a table of corrections, from the record that reads it. `python docs/generate.py` writes it."""

from __future__ import annotations

from generate import clean, code, page, table, texts_of

_LINES = """```json
{"task": "letters", "text": "Why does nobody call me back?", "label": "grumble", "answered": "ask", "by": "A. Analyst"}
{"task": "letters", "request_id": "req-19657792d6a2bd69fc2a667f", "label": "praise"}
{"task": "helpdesk", "messages": [{"role": "user", "content": "My card is lost."}], "label": "Block it in the app, then call us."}
```"""


def make_corrections() -> str:
    from finlora.feedback.corrections import COLUMNS, Correction

    texts = texts_of(Correction)
    return page(
        "Corrections",
        "Corrected answers of a served model, one row each, as CSV, TSV, JSON lines, JSON or Parquet. `finlora feedback` makes "
        "the next training set from them, see "
        "[Monitor a served adapter](../how-to/monitor.md#turn-corrections-into-the-next-training-set). The form is fixed: the "
        "web page and programs of your own can write it. The order of columns does not matter. Columns of other names are not "
        "read, and the command names them. An empty field and a missing one mean the same.",
        table(("column", "required", "meaning"), ((code(n), _need_of(n), clean(texts[n])) for n in COLUMNS)),
        "As JSON lines:",
        _LINES,
        "`finlora feedback --output DIR` writes `DIR/TASK.corrections.csv`: the same columns after `source` (file and line), "
        "`fate` and `test_example`. `fate` is one of:",
        table(
            ("`fate`", "the correction"),
            (
                ("`added`", "is a new training row"),
                ("`replaces`", "is a training row in place of those with another label for the same text"),
                ("`in train`", "is a training row already"),
                ("`duplicate`", "says what an earlier row says"),
                ("`in test`", "is left out: its text is that of `test_example`"),
                ("`near test`", "is left out: its text is nearly that of `test_example`"),
                ("`group in test`", "is left out: `test_example` has the same group"),
            ),
        ),
    )


def _need_of(column: str) -> str:
    return {
        "task": "yes",
        "label": "yes",
        "text": "or `request_id`",
        "request_id": "or `text`",
        "messages": "or `text`",
    }.get(column, "")
