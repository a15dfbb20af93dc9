"""Search rank, bits, learning rate and more as a Ray job; the same job continues a stopped search.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/tune.py --config jobs/configs/NAME.yaml name=SEARCH
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
