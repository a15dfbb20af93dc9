"""The `finlora` command: one verb a step of the work, and the same verbs as Ray jobs (jobs/).

Heavy packages are imported inside the verbs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

from finlora.cli import answers, data, reporting, searching, serving, training
from finlora.cli.app import app
from finlora.cpu import set_environment
from finlora.terminal import exit_with

# Importing a group registers its verbs.
GROUPS = (data, training, searching, answers, serving, reporting)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; our errors become one message and their exit code."""
    # Hub progress bars and tokenizer forks only add noise to job logs.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    set_environment()
    exit_with(lambda: app(args=list(arguments) if arguments is not None else None, standalone_mode=True))


if __name__ == "__main__":
    main()
