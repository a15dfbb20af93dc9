"""Run `finlora prepare` as a Ray job, on the cluster's storage.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/prepare.py --help
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
