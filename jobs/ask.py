"""Ask a base or adapter one question as a Ray job; --stages spreads the model over actors of the cluster.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/ask.py 'Profit rose' --task fpb -c jobs/configs/NAME.yaml
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["ask", *sys.argv[1:]])
