"""Description of the machine and the code version that produced a result."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

#: Packages that a result may depend on.
PACKAGES = (
    "torchvision",
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "pillow",
    "tensorboardX",
    "timm",
)
ROOT = Path(__file__).resolve().parent.parent


def machine(device: str) -> dict[str, Any]:
    """Describe the machine: processor or GPU, threads, load, versions and date.

    Args:
        device: device of the computation, such as "cpu", "cuda" or "cuda:1".
    """
    about: dict[str, Any] = {
        "device": device,
        "name": _processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # average number of running or waiting processes in the last minute
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(torch.device(device))
        about |= {
            "name": gpu.name,
            "cuda": torch.version.cuda,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": gpu.L2_cache_size,
        }
    else:
        about["capability"] = torch.backends.cpu.get_cpu_capability()  # the instruction set, such as AVX2
    return about


def commit() -> str | None:
    """Return the git commit of this checkout, with a "+" if files were changed; None without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def main() -> None:
    """Print what a report of a problem should contain: machine, packages, operator and commit."""
    for name, value in machine("cuda" if torch.cuda.is_available() else "cpu").items():
        print(f"{name}: {value}")
    print(f"system: {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"{package}: {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package}: not installed")
    for name, package in (("operator", "cc_attention"), ("fused operators", "fused")):
        library = next((ROOT / package).glob("_C*.so"), None)
        print(f"{name}: {library.name if library else 'not built'}")
    print(f"commit: {commit()}")


if __name__ == "__main__":
    main()
