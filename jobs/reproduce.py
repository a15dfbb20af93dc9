"""Run the paper's whole table as a Ray job; the same job continues an interrupted one.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/reproduce.py --output /mnt/reproduce data.dir=/mnt/data
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])
