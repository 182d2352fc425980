"""The device of a job."""

import torch

from vitshrink.errors import UsageError


def find_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises UsageError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # the device "meta" exists, but holds nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"--device {name} cannot be used: choose auto, cpu, cuda or cuda:1 ({reason}).") from error
    return probe.device
