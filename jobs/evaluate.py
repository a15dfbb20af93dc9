"""Score a base or adapter as a Ray job: the evaluation is a Ray task that reserves eval.num_gpus.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/evaluate.py --config jobs/configs/NAME.yaml
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["evaluate", "--ray", *sys.argv[1:]])
