"""Where a checkpoint lies: a folder, or a model of the Hub that was downloaded before. Known without reading it."""

from pathlib import Path

from vitshrink.config.names import is_portable, unportable
from vitshrink.errors import CheckpointError, UsageError
from vitshrink.runtime.storage import is_url

CONFIG = "config.json"


def find(path_or_id: str | Path, *, offline: bool = False, revision: str | None = None) -> Path | None:
    """The folder of a checkpoint or, ``offline``, the snapshot of a Hub model; None for what has to be fetched.

    Raises:
        CheckpointError: there is no such folder or, ``offline``, no such model in the local cache.
        UsageError: a revision was given for a local folder.
    """
    if is_url(path_or_id):
        return None
    path = Path(path_or_id).expanduser()
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error
    if is_directory:
        if not is_portable(path):
            raise CheckpointError(unportable(path))
        if revision is not None:
            raise UsageError(f"{path} is a local folder, and a revision ({revision!r}) works only with a Hub id.")
        return path
    if is_file:
        raise CheckpointError(f"{path} is a file: give the directory that contains it and its {CONFIG}.")
    name = str(path_or_id)
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1 or not name.strip():
        raise CheckpointError(f"no such folder: {name!r}. Check the path.")
    return _downloaded(name, offline=offline, revision=revision)


def absent(name: str) -> str:
    """How an error about a Hub model begins."""
    return f"no such folder: {name!r}, and"


def _downloaded(name: str, *, offline: bool, revision: str | None) -> Path | None:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, CONFIG, revision=revision)
    except HFValidationError as error:
        raise CheckpointError(f"{absent(name)} it is not a Hub model id either. Check the path.") from error
    if not (offline or constants.HF_HUB_OFFLINE):
        return None
    if isinstance(cached, str):
        return Path(cached).parent
    raise CheckpointError(
        f"{absent(name)} the local Hub cache has no such model, and offline mode is on. Give a local folder, or "
        "run once with a network connection."
    )
