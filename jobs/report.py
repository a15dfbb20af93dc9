"""Run `finlora report` as a Ray job, on the cluster's storage.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/report.py /mnt/runs --output /mnt/report
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
