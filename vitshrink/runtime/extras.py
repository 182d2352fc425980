"""Optional packages: looked for before any work that needs them."""

from importlib import import_module

from vitshrink.errors import DependencyError

EXTRAS = {
    "tensor": ("tensorly",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "ray": ("ray",),
}
"""The packages behind the optional extras of the same names in pyproject.toml."""


def require(extra: str, purpose: str) -> None:
    """Raises DependencyError where a package of the extra is missing, or cannot be imported."""
    for package in EXTRAS[extra]:
        try:
            import_module(package)
        except Exception as error:  # a package built for other versions fails in any way
            reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
            raise DependencyError(
                f'{purpose} needs the package {package}, which {reason}: pip install "vitshrink[{extra}]"'
            ) from error
