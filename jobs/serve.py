"""Serve a model over HTTP as a Ray job; the server ends with the job (`ray job stop`). `serve deploy` outlives its caller.

ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/serve.py --config serve_configs/llama-8b-8bit.yaml
"""

import sys

from finlora.cli.main import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
