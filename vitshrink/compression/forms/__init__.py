"""Forms: how a site may be stored. One file each, with a maker that offers the form and builds it."""

from vitshrink.compression.forms.registry import Maker, Material, Priced

__all__ = ["Maker", "Material", "Priced"]
