"""What ran: versions, machine, command. Written beside every run, so that it can be repeated."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("rating_train", "torch", "deepspeed", "transformers", "mosaicml-streaming", "numpy", "pillow")


def provenance(**more: Any) -> dict[str, Any]:
    """What ran: versions, machine, command line. No environment variables: they may hold secrets."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **more,
    }
