"""Environments, streams and limits of a process that are unusual."""

import resource
import signal

from .oddity import oddity
from .place import Place


@oddity(Place, slot="interpreter", outcome="works")
def posix_locale(place: Place) -> None:
    place.startup |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@oddity(Place, slot="interpreter", outcome="works")
def latin1_terminal(place: Place) -> None:
    place.startup |= {"PYTHONIOENCODING": "latin-1"}


@oddity(Place, slot="interpreter", outcome="works")
def no_home(place: Place) -> None:
    place.startup |= {"HOME": "/does/not/exist"}


@oddity(Place, slot="temporary", outcome="works")
def temporary_directory_missing(place: Place) -> None:
    place.environment["TMPDIR"] = "/does/not/exist"


@oddity(Place, slot="terminal", outcome="works")
def dumb_terminal(place: Place) -> None:
    place.environment["TERM"] = "dumb"


@oddity(Place, slot="terminal", outcome="works")
def one_column(place: Place) -> None:
    place.environment["COLUMNS"] = "1"


@oddity(Place, slot="terminal", outcome="works")
def columns_of_letters(place: Place) -> None:
    place.environment["COLUMNS"] = "wide"


@oddity(Place, slot="terminal", outcome="works")
def forced_colors(place: Place) -> None:
    place.environment |= {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"}


@oddity(Place, slot="stdout", outcome="works")
def narrow_terminal(place: Place) -> None:
    place.stdout = place.stderr = "terminal"
    place.columns = 20


@oddity(Place, slot="stdout", outcome="works")
def wide_terminal(place: Place) -> None:
    place.stdout = place.stderr = "terminal"
    place.columns = 200


@oddity(Place, slot="stdout", outcome="works")
def quiet_environment(place: Place) -> None:
    place.environment |= {"NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}


@oddity(Place, slot="environment", outcome="works")
def no_environment(place: Place) -> None:
    place.environment |= dict.fromkeys(("PATH", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "HOME"))


@oddity(Place, slot="environment", outcome="works")
def leftovers_of_torchrun(place: Place) -> None:
    place.environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@oddity(Place, slot="stdin", outcome="works")
def stdin_closed(place: Place) -> None:
    place.stdin = "closed"


@oddity(Place, slot="stdout")
def stdout_closed(place: Place) -> None:
    place.stdout = "closed"


@oddity(Place, slot="stdout")
def stdout_full(place: Place) -> None:
    place.stdout = "full"


@oddity(Place, slot="stdout")
def stdout_gone(place: Place) -> None:
    place.stdout = "gone"


@oddity(Place, slot="stderr")
def stderr_closed(place: Place) -> None:
    place.stderr = "closed"


@oddity(Place, slot="stderr")
def stderr_full(place: Place) -> None:
    place.stderr = "full"


@oddity(Place, slot="stderr")
def stderr_gone(place: Place) -> None:
    place.stderr = "gone"


def _small_files(place: Place, size: int) -> None:
    place.limits[resource.RLIMIT_FSIZE] = size
    place.stdout = "pipe" if place.stdout == "file" else place.stdout
    place.stderr = "pipe" if place.stderr == "file" else place.stderr


@oddity(Place, slot="limits")
def files_of_no_size(place: Place) -> None:
    _small_files(place, 0)


@oddity(Place, slot="limits")
def files_of_4_kilobytes(place: Place) -> None:
    _small_files(place, 4096)


@oddity(Place, slot="limits")
def files_of_60_kilobytes(place: Place) -> None:
    _small_files(place, 60_000)


@oddity(Place, slot="limits")
def few_open_files(place: Place) -> None:
    place.limits[resource.RLIMIT_NOFILE] = 24


@oddity(Place, slot="limits", outcome="works")
def no_core_and_one_processor(place: Place) -> None:
    place.limits[resource.RLIMIT_CORE] = 0
    place.environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@oddity(Place, slot="mask", outcome="works")
def private_mask(place: Place) -> None:
    place.umask = 0o077


@oddity(Place, slot="mask", outcome="works")
def open_mask(place: Place) -> None:
    place.umask = 0


@oddity(Place, outcome="works")
def figures_are_drawn(place: Place) -> None:
    place.drawing = True


@oddity(Place, slot="signal")
def interrupted_at_once(place: Place) -> None:
    place.ended = (signal.SIGINT, 0.3)


@oddity(Place, slot="signal")
def terminated_at_once(place: Place) -> None:
    place.ended = (signal.SIGTERM, 0.3)


@oddity(Place, slot="signal")
def terminated_soon(place: Place) -> None:
    place.ended = (signal.SIGTERM, 0.7)
