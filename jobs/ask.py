"""Ask base or adapter one question as a Ray job, with --stages spread over actors of the cluster.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/ask.py 'Profit rose' --task fpb -c jobs/configs/NAME.yaml
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["ask", *sys.argv[1:]])
