"""Tags a wheel for its platform where it carries the native ops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeOpsHook(BuildHookInterface):  # type: ignore[type-arg]
    """The library is no Python extension: the wheel fits any Python, but one platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is built; an editable install stays pure."""
        if version == "editable" or not any(Path(self.root, "plugins/k25_plugins/native").glob("*.so")):
            return
        import sysconfig

        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
