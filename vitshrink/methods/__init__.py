"""Methods: one file each, found by existing. Adding a file adds a method to the command line and to the tests."""

import importlib
import pkgutil

from vitshrink.methods.attention import AttentionMethod, attention_methods
from vitshrink.methods.registry import Factorization, LayerMethod, Method, available_methods, find_method, get_method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AttentionMethod",
    "Factorization",
    "LayerMethod",
    "Method",
    "attention_methods",
    "available_methods",
    "find_method",
    "get_method",
]
