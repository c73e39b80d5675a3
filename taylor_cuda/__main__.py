"""``python -m taylor_cuda``: the same as ``taylor-cuda``."""

import os
import sys

from taylor_cuda.cli.main import main
from taylor_cuda.train.launch import rank_of_environment

if __name__ == "__main__":
    code = main()
    if rank_of_environment()[1] > 1:
        # Threads of gloo may outlive Python, and C++ then aborts a rank whose work is done and written: seen once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
