"""The processor: how many cores this process may use, what they are, what they multiply."""

import os
import platform
from pathlib import Path

NATIVE_BF16 = ("amx_bf16", "avx512_bf16")
CPU_FILE = Path("/proc/cpuinfo")


def num_cores() -> int:
    """Return how many cores this process may use: OMP_NUM_THREADS, or all it is allowed."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdigit():
        return int(allowed)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Return the processor with the number of threads, as latencies are recorded with."""
    words = [platform.machine(), platform.processor()]
    if CPU_FILE.is_file():
        named = (line for line in CPU_FILE.read_text().splitlines() if "model name" in line)
        words.append(next(named, "").partition(":")[2].strip())
    return ", ".join([*filter(None, words), f"{num_cores()} threads"])


def has_native_bf16() -> bool:
    """Tell whether this CPU multiplies bf16 itself; elsewhere bf16 is slower than fp32."""
    import torch  # takes a second to load

    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in NATIVE_BF16)
