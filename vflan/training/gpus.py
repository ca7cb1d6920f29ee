"""The GPUs of this machine: can PyTorch use them, and what has to be installed if it cannot."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

# The oldest NVIDIA driver for each major version of CUDA, by NVIDIA's compatibility table. Any
# 12.x runs on a driver for 12.0.
OLDEST_DRIVER = {13: 580, 12: 525, 11: 450}
# The index with PyTorch's wheels for a major version of CUDA.
WHEELS = {13: "cu130", 12: "cu126"}
INDEX = "https://download.pytorch.org/whl"


def driver_version() -> str:
    """The version of NVIDIA's driver, such as 535.104.05; "" without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        file = Path("/proc/driver/nvidia/version")
        # A container may have the driver without the program.
        printed = printed or (file.read_text() if file.is_file() else "")
    except (OSError, subprocess.TimeoutExpired):
        printed = ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", printed)
    return found[0] if found else ""


def find_problem() -> str:
    """Why PyTorch can use no GPU here, and what to do, as sentences; "" if it can use one."""
    import torch

    if torch.cuda.is_available():
        return ""
    driver, cuda = driver_version(), torch.version.cuda
    if not driver:
        return "there is no GPU, or NVIDIA's driver is not installed (nvidia-smi shows it)."
    here = f"the driver is {driver}"
    if not cuda:
        advice = install_command(driver)
        return f"torch {torch.__version__} is built without CUDA, and {here}. {advice}"
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)
    if int(driver.split(".")[0]) < oldest:
        needed = f"torch {torch.__version__} is built for CUDA {cuda}, which needs driver {oldest}"
        return f"{needed} or newer, and {here}. Update the driver. Or {install_command(driver)}"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"{here}, but CUDA_VISIBLE_DEVICES={visible!r} may hide the GPUs: unset it."
    return f"{here}, which is new enough: python -c 'import torch; torch.cuda.init()' says more."


def install_command(driver: str) -> str:
    """Which build of this torch a driver can run, as a sentence with the command."""
    import torch

    release = torch.__version__.split("+")[0]
    for cuda, oldest in OLDEST_DRIVER.items():
        if int(driver.split(".")[0]) >= oldest and cuda in WHEELS:
            command = f"pip install torch=={release} --index-url {INDEX}/{WHEELS[cuda]}"
            return f"install a build for CUDA {cuda}: {command}."
    return f"update the driver: it is too old for any build of torch {release}."
