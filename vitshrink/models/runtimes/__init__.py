"""Runtimes: programs that run a model, fast or slow. One file each, found by existing."""

import importlib
import pkgutil

from vitshrink.models.runtimes.registry import RUNTIMES, Program, Runtime, find_runtime, require_running, running

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["RUNTIMES", "Program", "Runtime", "find_runtime", "require_running", "running"]
