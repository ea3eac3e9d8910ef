"""The device that a run computes on, and how much of it the run uses."""

import contextlib
import functools
import os
import platform
import subprocess
import sys
import warnings
from importlib import metadata
from typing import Any, Literal

import torch

from utils.errors import UserError, one_line, shown
from utils.files import ROOT
from utils.process import distributed

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


Precision = Literal["auto", "fp32", "bf16"]


def pick_device(name: str) -> torch.device:
    """The device of a `--device` value; `auto` is an NVIDIA or AMD GPU where there is one.

    Every other device of torch, `mps` among them, is tried if it is named.

    Raises:
        UserError: for a name that torch does not know or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.processes() > 1:
        name = f"cuda:{distributed.local_rank()}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that torch is giving up
            device = torch.device(name)
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        is_absent = str(error).startswith("Could not run")  # what follows is for torch's developers
        reason = "this torch is made without it" if is_absent else shown(one_line(error), 200)
        raise UserError(
            f"--device: {name} is not usable here ({reason}); give auto, cpu or cuda, or mps"
        ) from None
    return device


def images_at_once(device: torch.device, side: int) -> int:
    """Images per pass, if the result does not depend on it; few, so that a CPU's caches hold them.

    Args:
        device: where they are computed.
        side: of the images, in pixels; a GPU's memory holds fewer large images.
    """
    return 32 if device.type == "cpu" else max(1, min(1024, (1 << 23) // side**2))


def rounded_up(device: torch.device, count: int) -> int:
    """How many images to compute on if `count` are needed: on a GPU a multiple of 128.

    So only few shapes occur. For each shape the GPU chooses kernels, and passes are recorded.
    """
    return count if device.type == "cpu" else -(-count // 128) * 128


def rows_of(wanted: torch.Tensor) -> torch.Tensor:
    """The positions that are wanted, first.

    On a GPU other positions follow, up to a multiple of 128, so that only few sizes occur. This is
    for callers whose result does not change with more images.

    Args:
        wanted: bool (N,).

    Returns:
        int64 positions; none if none is wanted.
    """
    count = int(wanted.sum())
    order = (~wanted).int().argsort(stable=True)
    return order[: rounded_up(wanted.device, count)]


def pick_precision(name: Precision, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies it natively, fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    checks = (
        getattr(torch.cpu, check, None)
        for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return "bf16" if any(check() for check in checks if check) else "fp32"


def run_conditions(device: torch.device, precision: str) -> dict[str, str | int]:
    """What may change a run's numbers, beside its flags and data; the commit is not everywhere."""
    now = environment(device, precision)
    names = ("device_name", "precision", "threads", "processes", "commit")
    return {
        "device": device.type,
        **{name: now[name] for name in names if now[name] is not None},
        **now["versions"],
    }


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Device, precision, threads, versions and commit, as plain data for `summary.json`."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    versions = {package: metadata.version(package) for package in ("torch", "torchvision", "numpy")}
    return {
        "device": str(device),
        "device_name": name,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processes": distributed.processes(),
        "versions": {"python": platform.python_version(), **versions},
        "commit": _git_commit(),
    }


def peak_memory() -> int:
    """The largest number of bytes that this process has had in memory.

    Raises:
        ImportError: if this system has neither `resource` nor psutil.
    """
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    import psutil  # here, because it needs `resource` itself where that is usual

    now = psutil.Process().memory_info()
    return getattr(now, "peak_wset", now.rss)  # Windows has the peak, too


def usable_cores() -> int:
    """How many of the processor's cores this process may use, >= 1."""
    ask = getattr(os, "sched_getaffinity", None)  # Linux
    return len(ask(0)) if ask else os.cpu_count() or 1


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """Largest resident memory of this process, if it is known, and of torch on the GPU, in MiB."""
    peak = {}
    with contextlib.suppress(ImportError):
        peak["peak_memory_mib"] = round(peak_memory() / 2**20, 1)
    if device.type == "cuda":
        peak["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return peak


@functools.cache
def _git_commit() -> str | None:
    """The commit of this checkout, with '+' if tracked files differ; None outside git.

    It is that of the first call, because the code that runs was loaded before.
    """
    try:
        call = [
            "git",
            "-C",
            str(ROOT),
            "describe",
            "--always",
            "--abbrev=40",
            "--dirty=+",
            "--exclude=*",
        ]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
