"""Optional parts of the distribution: a verb whose part is missing says how to install it."""

from __future__ import annotations

import importlib.util

from k25_plugins.errors import BackendMissingError

_MODULES = {
    "export": ("torch", "onnx", "onnx_ir", "onnxscript", "orjson"),
    "validate": ("torch", "onnx", "onnx_ir", "onnxscript", "orjson", "safetensors"),
    "transformers": ("transformers",),
    "tensorrt-rtx": ("onnx",),  # TensorRT itself may be either flavour: k25_engines looks for it
}


def require_extra(extra: str) -> None:
    """Raise `BackendMissingError` with the install line where a module of the extra is missing."""
    missing = [module for module in _MODULES[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise BackendMissingError(
            f"this needs {', '.join(missing)}, which is not installed: pip install 'k25-export[{extra}]'"
        )
