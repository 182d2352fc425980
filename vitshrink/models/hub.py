"""The Hugging Face Hub: which commit of a repository is read, and a finished directory that is published."""

from contextlib import suppress
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from vitshrink.errors import OutputError, UsageError

PLACEHOLDER = "path/to/this/directory"
"""What the model card says before it is known where the model will lie."""


def revision(name: str, kind: str, *, offline: bool) -> str | None:
    """The commit of a ``model`` or ``dataset``: asked of the Hub or, where it does not answer, of the local cache."""
    with suppress(Exception):  # those of the HTTP library, and the Hub's own: then it is not known
        if not (offline or constants.HF_HUB_OFFLINE):
            return HfApi().repo_info(name, repo_type=kind, timeout=10).sha
    with suppress(HFValidationError):
        cached = try_to_load_from_cache(name, _KNOWN_FILE[kind], repo_type=kind)
        return Path(cached).parent.name if isinstance(cached, str) else None
    return None


_KNOWN_FILE = {"model": "config.json", "dataset": "README.md"}


def require_hub(repository: str, *, offline: bool) -> None:
    """Before any work: whether a push to ``repository`` can be hoped for.

    Raises UsageError for an id that is none, without a network or a token, or with a token that the Hub refuses.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub {repository}: give the id of a Hub model, such as me/small-vit.") from error
    if offline or constants.HF_HUB_OFFLINE:
        raise UsageError("--push-to-hub needs the network: leave out --offline, and unset HF_HUB_OFFLINE.")
    if not get_token():
        raise UsageError("--push-to-hub needs a token with write access: run 'hf auth login', or set HF_TOKEN.")
    try:
        HfApi().whoami()
    except Exception as error:  # those of the HTTP library, and the Hub's own
        raise UsageError(
            f"--push-to-hub: the Hub rejects the token, or cannot be reached ({_reason(error)}). Run 'hf auth "
            "login' with a token with write access, or remove the flag."
        ) from error


def push(directory: Path, repository: str, *, private: bool = False) -> str:
    """Upload a directory in one commit, the repository made where there is none. Returns its address.

    Raises OutputError, which says how to try again; the directory stays as it is.
    """
    try:
        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        files = sorted(file for file in directory.rglob("*") if file.is_file())
        operations = [
            CommitOperationAdd(
                file.relative_to(directory).as_posix(),
                _card(file, made.repo_id) if file == directory / "README.md" else str(file),
            )
            for file in files
        ]
        api.create_commit(made.repo_id, operations, commit_message="Compressed with vitshrink")
    except Exception as error:  # those of the HTTP library, and the Hub's own
        raise OutputError(
            f"the result is complete in {directory}, but it was not pushed to {repository} ({_reason(error)}). "
            f"To push it later: hf upload {repository} {directory}"
        ) from error
    return str(made)


def _card(file: Path, repository: str) -> bytes:
    return file.read_text(encoding="utf-8").replace(PLACEHOLDER, repository).encode()


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
