"""Standard output and error that never stop a job: what a full disk or a closed pipe does not take is thrown away."""

import errno
import io
import os
import sys
from typing import Any, TextIO


class Guarded:
    """A standard stream that goes on into nothing once its writing fails, and remembers why."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _give_up(self, error: OSError) -> None:
        self.failure = self.failure or error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.stream.fileno())  # what is still in the buffer has to go somewhere
        os.close(nothing)


def guard() -> Guarded:
    """Put guarded streams in the place of the standard ones, and give that of the output.

    One that was closed when the process started is opened on nothing: a model file must not get its number.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows less, but loses no result
    output = Guarded(sys.stdout or open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
    sys.stdout = output
    sys.stderr = Guarded(sys.stderr or open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    return output


def lost(output: Guarded) -> str | None:
    """Why results were not written, which nobody knows yet; a reader that has gone wanted no more of them."""
    output.flush()
    if output.failure is None or output.failure.errno == errno.EPIPE:
        return None
    return f"the results could not be written to the standard output: {output.failure.strerror}."
