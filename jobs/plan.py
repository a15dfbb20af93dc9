"""Forecast a run's memory as a Ray job, on the cluster's storage.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/plan.py --config jobs/configs/NAME.yaml
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
