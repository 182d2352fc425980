"""Structures: what may stand in the place of a module of the dense model. One file each, found by existing.

A structure is a small description that goes into the checkpoint's config, and from which the module is built empty, on
the meta device, before its weights are read.
"""

import importlib
import pkgutil

from vitshrink.models.structures.registry import Structure, connect, describe, fill, read, structure, structure_of

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Structure", "connect", "describe", "fill", "read", "structure", "structure_of"]
