"""Forms: how a site may be stored. One file each, with a maker that offers the form and builds it.

The low-rank and attention makers serve the methods that have such forms; others are asked for by ``forms`` of a job and
found by existing: adding a file adds a form.
"""

import importlib
import pkgutil

from vitshrink.compression.forms.registry import Maker, Material, form_maker, known_forms, make_form

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Maker", "Material", "form_maker", "known_forms", "make_form"]
