"""`make accept`, or `python -m tests.acceptance --base FOLDER --output DIR`: see arguments.py."""

import sys
from pathlib import Path

# As `acceptance`: another package may hold the name `tests` in this environment.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acceptance.arguments import main

if __name__ == "__main__":
    sys.exit(main())
