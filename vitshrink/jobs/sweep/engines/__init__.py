"""Engines: what runs the jobs of a sweep, here or on other machines. One file each, found by existing."""

import importlib
import pkgutil

from vitshrink.jobs.sweep.engines.registry import ENGINES, Engine, Task, Wanted, Work, open_engine

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["ENGINES", "Engine", "Task", "Wanted", "Work", "open_engine"]
