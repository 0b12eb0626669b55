"""Where lvm runs: the cores of the processor, the checkout of the project, settings of a server."""

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NATIVE_BF16 = ("amx_bf16", "avx512_bf16")
CPU_FILE = Path("/proc/cpuinfo")
# What may differ from server to server: a logged model's model_config, environment variables.
SERVER_SETTINGS = {
    "bank": "LVM_BANK",
    "cache_bytes": "LVM_CACHE_BYTES",
    "request_log": "LVM_REQUEST_LOG",
}


def num_cores() -> int:
    """Return the number of cores to use: OMP_NUM_THREADS, or all that this process may use."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdigit():
        return int(allowed)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Return the processor and the number of threads, recorded beside latencies."""
    words = [platform.machine(), platform.processor()]
    if CPU_FILE.is_file():
        named = (line for line in CPU_FILE.read_text().splitlines() if "model name" in line)
        words.append(next(named, "").partition(":")[2].strip())
    return ", ".join([*filter(None, words), f"{num_cores()} threads"])


def has_native_bf16() -> bool:
    """Tell whether this CPU has native bf16 products; without them bf16 is slower than fp32."""
    import torch  # takes a second to load

    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in NATIVE_BF16)


def has_amx_bf16() -> bool:
    """Tell whether this CPU has AMX, whose bf16 products are several times as fast as float32 ones.

    With avx512_bf16 alone they reached 0.6 of the float32 rate on one Xeon.
    """
    import torch  # takes a second to load

    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def server_settings(model_config: Mapping[str, Any]) -> dict[str, str]:
    """Return SERVER_SETTINGS, each from `model_config`, else from the environment; "" if unset."""
    given = {name: model_config.get(name) for name in SERVER_SETTINGS}
    return {
        name: os.environ.get(variable, "") if given[name] is None else str(given[name])
        for name, variable in SERVER_SETTINGS.items()
    }


def project_root() -> Path:
    """Return the folder of the MLproject file; the working folder if lvm is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "MLproject").is_file() else Path.cwd()


def checkout_root() -> Path:
    """Return the folder of the MLproject file; raises ValueError if there is none."""
    root = project_root()
    if not (root / "MLproject").is_file():
        raise ValueError(
            f"MLproject: is not in {root}, and without it no entry point can launch others; run "
            "this in a checkout of lvm, or the entry points one after another"
        )
    return root


def entry_points() -> set[str]:
    """Return the names of the entry points in the MLproject file; empty outside a checkout."""
    import yaml

    project = Path(__file__).resolve().parents[2] / "MLproject"
    return set(yaml.safe_load(project.read_text())["entry_points"]) if project.is_file() else set()


def is_dirty() -> bool | None:
    """Tell whether the checkout has uncommitted changes; None outside a git repository."""
    command = ["git", "-C", str(project_root()), "status", "--porcelain"]
    try:
        status = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return bool(status.stdout) if status.returncode == 0 else None
