"""Where an audit runs: device, dtype, memory, and what an audit records of the machine."""

import os
import platform
import re
import sys
import threading
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from probes.errors import InputError

DTYPES = ("float32", "float64", "bfloat16", "float16")
RECORDED = ("numpy", "pandas", "safetensors", "transformers", "peft", "joblib")


def device(name: str) -> str:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` stands for on this machine."""
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
    """The dtype for the arithmetic of the analyses; None is each one's default. Raises InputError."""
    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype {name}: unknown; known: {', '.join(DTYPES)}")
    return name


class PeakMemory:
    """The largest resident memory of this process while the block runs.

    The system counts the peak since the process began, and others may read that counter: it is not reset. A
    peak above the earlier one is exact; below it the memory is sampled.

    >>> with PeakMemory() as memory:
    ...     rows = list(range(1000))
    >>> memory.megabytes() > 1
    True
    """

    INTERVAL = 0.02  # seconds between samples

    def __enter__(self) -> "PeakMemory":
        self._before = process_peak()
        self._sampled = resident() or 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._after = process_peak()

    def megabytes(self) -> float | None:
        """The peak in MB (1e6 bytes), once the block has ended; None where the system does not tell."""
        if self._after is None:
            return None
        raised = self._before is None or self._after > self._before
        return (self._after if raised else self._sampled or self._after) / 1e6

    def _sample(self) -> None:
        while not self._ended.wait(self.INTERVAL):
            self._sampled = max(self._sampled, resident() or 0)


def resident() -> int | None:
    """Resident memory of this process in bytes, on Linux."""
    return _status("VmRSS")


def process_peak() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where the system does not tell."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int | None:
    """A size in /proc/self/status, in bytes."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    size = re.search(rf"{field}:\s+(\d+) kB", text)
    return int(size[1]) * 1024 if size else None


def environment(device: str) -> dict[str, Any]:
    """What an audit records of the machine and its packages; nothing that names the machine or its user."""
    import torch

    versions = {}
    for package in RECORDED:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__, "device": device,
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else "",
        "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "packages": versions,
    }  # fmt: skip
