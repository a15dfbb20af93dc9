"""The `finlora` command: one verb a step of the work, and the same verbs as Ray jobs (jobs/).

Heavy packages are imported inside the verbs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

try:
    from finlora.cli import (
        answer_verbs,
        card_verbs,
        data_verbs,
        doctor_verb,
        exchange_verbs,
        feedback_verb,
        report_verbs,
        score_verb,
        search_verbs,
        serve_verbs,
        train_verbs,
    )
    from finlora.cli.app import app
    from finlora.machine.cpu import set_environment
    from finlora.machine.host import check_arguments, check_home, soften_output
    from finlora.machine.signals import end_in_order
    from finlora.terminal import exit_with
except KeyboardInterrupt:  # Ctrl-C while packages are read: a slow disk takes seconds
    sys.stderr.write("Stopped by SIGINT before anything began.\n")
    raise SystemExit(130) from None

# Importing a group registers its verbs.
GROUPS = (
    doctor_verb,
    data_verbs,
    train_verbs,
    search_verbs,
    answer_verbs,
    exchange_verbs,
    score_verb,
    serve_verbs,
    feedback_verb,
    report_verbs,
    card_verbs,
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; our errors become one message and their exit code."""
    # Hub progress bars and tokenizer forks only add noise to job logs.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A checkpoint and the end of a run wait for the next look of Ray Train at its workers, by default 2 s away.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    words = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> None:
        check_arguments(words)
        check_home()
        set_environment()
        with end_in_order():
            app(args=words, standalone_mode=True)

    # The interpreter would look for garbage in all modules before it ends, which takes a second once torch is imported.
    atexit.register(gc.freeze)
    soften_output()
    exit_with(run)


if __name__ == "__main__":
    main()
