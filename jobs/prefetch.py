"""Mirror base models and datasets as a Ray job, onto the cluster's storage, from the one node that reaches the hub.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/prefetch.py --models OWNER/NAME --tasks fpb --output DIR

Clusters of cluster/ ask no hub: before --working-dir, add --runtime-env-json '{"env_vars": {"HF_HUB_OFFLINE": "0"}}'.
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["prefetch", *sys.argv[1:]])
