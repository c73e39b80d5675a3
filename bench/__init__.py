"""The measurements: ``python -m taylor_cuda.bench``. Every figure comes from a result that was checked in the same run.

The files lie in ``bench/`` of the source tree and are installed as ``taylor_cuda.bench``.
"""
