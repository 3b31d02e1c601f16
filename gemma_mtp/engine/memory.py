"""How much memory keys and values may take."""

import os
import re
from pathlib import Path

from gemma_mtp.engine.interface import BatchEngine
from gemma_mtp.errors import SettingsError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes of '512MB', '2GiB' or a plain number. Raises SettingsError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise SettingsError(f"'{text}' is no size: give bytes, or a number with KB, MB, GB, KiB, MiB or GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def kv_memory_of(engine: BatchEngine, asked: int | None, parallel: int) -> int:
    """Bytes to bound the cache to: see AsyncEngine. Raises SettingsError where one request would not fit."""
    one = engine.memory_for(engine.context)
    if asked is None:
        return max(one, min(2 * parallel * one, free_memory() // 2))
    if asked < one:
        raise SettingsError(
            f"The memory for keys and values is {asked / 2**20:.0f} MiB, but one request with the context of "
            f"{engine.context} tokens may need {one / 2**20:.0f} MiB: give more, or choose a smaller context."
        )
    return asked


def free_memory() -> int:
    """Bytes that this process can still get without swapping, as far as the system says."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if (meminfo := Path("/proc/meminfo")).exists():
        match = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
        free = int(match[1]) << 10 if match else free
    group = Path("/sys/fs/cgroup")  # of a container
    try:
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # there is no such bound
        return free
    return max(free, 0)
