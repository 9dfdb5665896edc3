"""Stage 3: a bundle becomes tokens and logits. Needs numpy and one backend; neither torch nor onnx.

from k25_runtime import Runtime
with Runtime.open("bundle") as runtime:
    print(runtime.generate("Hello").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k25_runtime.runtime import Runtime

__all__ = ["Runtime"]


def __getattr__(name: str) -> Any:
    if name == "Runtime":
        from k25_runtime.runtime import Runtime

        return Runtime
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
