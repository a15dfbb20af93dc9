"""Mirror base models and data sets onto the cluster's storage as a Ray job, on the one node that reaches the hub.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/prefetch.py --models OWNER/NAME --tasks fpb --output DIR

Clusters set up with cluster/ are offline: add --runtime-env-json '{"env_vars": {"HF_HUB_OFFLINE": "0"}}' before --working-dir.
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["prefetch", *sys.argv[1:]])
