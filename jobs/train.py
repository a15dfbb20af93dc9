"""Train an adapter as a Ray job.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/train.py --config jobs/configs/NAME.yaml
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
