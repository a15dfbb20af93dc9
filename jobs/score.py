"""Score a table as a Ray job.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/score.py /mnt/in.csv /mnt/out.csv --task fpb -c FILE
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
