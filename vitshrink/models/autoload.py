"""How transformers learns of compressed checkpoints, whether it is imported before vitshrink, after it, or never."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vitshrink.models.format import QUANT_METHOD

REGISTRY = "transformers.quantizers.auto"
"""The module that holds transformers' table of quantization methods."""


class CompressedConfig:
    """Stands in the table until the first compressed checkpoint is read.

    The table may be made while transformers is only half imported, and what reads checkpoints needs all of it.
    """

    @classmethod
    def from_dict(cls, entries: dict[str, Any], **more: Any) -> Any:
        """The real ``VitshrinkConfig``, which takes this one's place, and its quantizer a place beside it."""
        from vitshrink.models import hf_quantizer

        hf_quantizer.register()
        return hf_quantizer.VitshrinkConfig.from_dict(entries, **more)  # type: ignore[no-untyped-call]


class _Finder(MetaPathFinder):
    """Finds the module of the table as Python does, and enters vitshrink when it has been run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Finder))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_enter(module: ModuleType) -> None:
                run(module)
                _enter(module)

            spec.loader.exec_module = run_and_enter  # type: ignore[method-assign]
        return spec


def _enter(registry: ModuleType) -> None:
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, CompressedConfig)


def teach_transformers() -> None:
    """Let transformers load compressed checkpoints, without importing it. May be called again."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if REGISTRY in sys.modules:
        _enter(importlib.import_module(REGISTRY))  # which waits where another thread is still at it
