"""Where an audit runs: its device, its memory, and what to record of all that."""

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from probes.errors import InputError

DTYPES = ("float32", "float64", "bfloat16", "float16")
RECORDED = ("numpy", "pandas", "safetensors", "transformers", "peft", "joblib")


def device(name: str) -> str:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` stands for on this machine.

    Raises:
        InputError: unknown, or not on this machine.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    asked = re.fullmatch(r"cuda(?::(\d+))?", name)
    if asked is None:
        raise InputError(f"--device {name}: unknown; known: auto, cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        raise InputError(
            f"--device {name}: this torch ({torch.__version__}) sees no CUDA device; use --device cpu"
        )
    count = torch.cuda.device_count()
    if int(asked[1] or 0) >= count:
        raise InputError(f"--device {name}: there are {count}, counted from cuda:0")
    return name


def dtype(name: str | None) -> str | None:
    """The dtype of that name, for the arithmetic of the analyses; None leaves each at its own default.

    Raises:
        InputError: unknown.
    """
    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype {name}: unknown; known: {', '.join(DTYPES)}")
    return name


class PeakMemory:
    """The largest resident memory of this process since `start`, where the system tells it."""

    def start(self) -> None:
        """Forget earlier peaks, as far as the system can (Linux)."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # no such file, or not allowed: the peak is then that of the whole process

    def megabytes(self) -> float | None:
        """The peak in MB (1e6 bytes); None where the system does not tell."""
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            status = ""
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        if peak:
            return int(peak[1]) * 1024 / 1e6
        try:
            import resource
        except ImportError:  # Windows
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def environment(device: str) -> dict[str, Any]:
    """What an audit records of the machine and its packages; nothing that names the machine or its user."""
    import torch

    versions = {}
    for package in RECORDED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else "",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "packages": versions,
    }
