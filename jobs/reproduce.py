"""Run the paper's whole table as a Ray job; the same job goes on with what is not done.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/reproduce.py --output /mnt/reproduce data.dir=/mnt/data
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])
