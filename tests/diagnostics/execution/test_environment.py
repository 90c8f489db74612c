import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diagnostics.execution import environment

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def test_the_cpu_is_the_cpu():
    assert environment.device("cpu") == "cpu"


@without_cuda
def test_auto_is_the_cpu_where_there_is_nothing_else():
    assert environment.device("auto") == "cpu"


@without_cuda
def test_a_device_that_is_not_here_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match=r"--device cuda: this torch \(.*\) sees no CUDA device; use --device cpu"
    ):
        environment.device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_an_unknown_device_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown; known: auto, cpu, cuda, cuda:N"):
        environment.device(name)


def test_a_device_number_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert environment.device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match=r"--device cuda:2: there are 2, counted from cuda:0"):
        environment.device("cuda:2")


def test_an_unknown_dtype_is_refused_with_the_known_ones():
    assert environment.dtype("float64") == "float64"
    with pytest.raises(ValueError, match="--dtype int8: unknown; known: float32, float64"):
        environment.dtype("int8")


def resident_and_peak():
    status = Path("/proc/self/status").read_text()
    return tuple(int(re.search(rf"{field}:\s+(\d+)", status)[1]) / 1000 for field in ("VmRSS", "VmHWM"))


def test_the_peak_of_memory_counts_what_was_freed_again():
    resident, peak = resident_and_peak()
    size = max(0.0, peak - resident) + 200  # MB: above every earlier peak
    with environment.PeakMemory() as memory:
        held = np.ones(int(size * 1e6 / 8))  # touched
        del held
    assert memory.megabytes() > resident + size - 50


def test_an_earlier_peak_is_neither_counted_nor_reset():
    """Others in this process may read the counter of the system."""
    held = np.ones(50_000_000)  # 400 MB
    del held
    resident, peak = resident_and_peak()
    with environment.PeakMemory() as memory:
        held = np.ones(12_500_000)  # 100 MB
        time.sleep(0.3)
        del held
    assert resident + 50 < memory.megabytes() < peak - 100
    assert resident_and_peak()[1] >= peak


def test_the_environment_names_versions_and_no_person_or_machine():
    import getpass
    import platform

    description = environment.environment("cpu")
    assert description["torch"] == torch.__version__
    assert description["device"] == "cpu"
    assert "numpy" in description["packages"]
    assert platform.node() not in description.values()
    assert getpass.getuser() not in description.values()
