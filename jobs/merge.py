"""Merge an adapter into its base as a Ray job, on the cluster's storage.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/merge.py -c jobs/configs/NAME.yaml --output /mnt/merged
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
