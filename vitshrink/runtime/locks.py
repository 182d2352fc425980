"""Locks by which processes keep out of each other's way; they end with the process that holds them."""

import errno

from vitshrink.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def require_locks() -> None:
    """Raises OutputError on a system that has none, before any work."""
    if fcntl is None:
        raise OutputError(
            "vitshrink writes models and tables on Linux and macOS only, because it needs their file locks. On "
            "Windows, run it in WSL. Its models can be loaded on any system."
        )


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Whether the lock was free and is now ours, or ours and others' (``shared``); None where there are no locks."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno == errno.EWOULDBLOCK else None
    return True


def wait_for_lock(descriptor: int) -> None:
    """Return when the lock is ours. Raises OSError where the file system has no locks."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def unlock(descriptor: int) -> None:
    """Let others have the lock."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
