"""``python -m taylor_cuda``: the same as ``taylor-cuda``."""

from taylor_cuda.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
