"""The measurements: ``python -m bench``. Every figure comes from a result that was checked in the same run."""
