"""Every error that vitshrink raises on purpose.

    VitshrinkError              1   something failed; the message says what to do
    ├── CheckpointError         1   a model directory that cannot be read, trusted or supported
    ├── DataError               1   calibration or evaluation data that cannot be used
    ├── NumericsError           1   non-finite values, a decomposition that fails
    ├── OutputError             1   the output directory cannot be written, verified or published
    ├── DependencyError         1   an optional package is missing or does not fit
    ├── UsageError              2   wrong flags or a wrong recipe
    │   └── TargetError         2   a size that cannot be reached
    └── GateError               3   a bound that the user set (``--min-accuracy`` …) is missed

The number is the exit code of the command line.
"""


class VitshrinkError(Exception):
    """Base class of all errors that vitshrink raises on purpose."""

    exit_code = 1
    silent = False
    """Whether somebody else says why."""


def explanation(error: OSError) -> str:
    """What the operating system says, and of which file, if it does."""
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{reason} ({error.filename})"


class CheckpointError(VitshrinkError):
    """A checkpoint is missing, damaged, unsafe or of an unsupported kind."""


class DataError(VitshrinkError):
    """A data set is missing, empty, mislabeled or unreadable."""


class NumericsError(VitshrinkError):
    """Non-finite weights or activations, or a decomposition that does not converge."""


class OutputError(VitshrinkError):
    """The output cannot be written, or differs from the model in memory."""


class DependencyError(VitshrinkError):
    """An optional package is missing or does not match the installed torch."""


class UsageError(VitshrinkError):
    """A flag or recipe entry is unknown, out of range or contradicts another."""

    exit_code = 2


class TargetError(UsageError):
    """The requested size cannot be reached. The message gives the smallest possible size."""


class GateError(VitshrinkError):
    """A bound that the user set is missed."""

    exit_code = 3
