"""Check every node of the cluster, and a config, as a Ray job.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/doctor.py --config jobs/configs/NAME.yaml
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
