"""The errors this package raises on purpose. The command line shows them without a traceback."""


class TaylorError(Exception):
    """Base of every error raised on purpose: its message says what was wanted and what was given."""


class InputError(TaylorError, ValueError):
    """An argument, a file or a model that can't be used as it was given."""


class BudgetError(InputError):
    """A budget that no plan can meet; the message names the nearest feasible one."""


class CheckpointError(InputError):
    """A file that isn't a checkpoint, is damaged, or belongs to another model."""


class CutError(TaylorError, RuntimeError):
    """A cut that failed its own verification. The model was put back as it was."""
