"""CPUs that a process may use: its affinity and the CPU quotas of its cgroups, which limit pods and containers."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROCESS = Path("/proc/self")
AUTO = -1
"""Value of a setting `workers`: one worker per CPU."""


def count_cpus(process: Path = _PROCESS) -> float:
    """Return the number of CPUs that a process may use, a fraction if a quota is one.

    Args:
        process: its folder in /proc; without one (macOS), every CPU of the machine counts.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(usable), *_quotas(process)])


def count_threads(cpus: float | None = None) -> int:
    """Return the number of threads for computations: one per whole CPU, shared by the processes of torchrun on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, int((count_cpus() if cpus is None else cpus) / processes))


def count_workers(workers: int, most: int) -> int:
    """Return the number of worker processes: the setting `workers`, or if it is `AUTO` one per thread, at most `most`."""
    return min(count_threads(), most) if workers == AUTO else workers


def _quotas(process: Path) -> Iterator[float]:
    """Yield the CPU quota of every cgroup of a process, in CPUs; a cgroup is limited by those above it, too."""
    try:
        mounts = (process / "mountinfo").read_text().splitlines()
        groups = (process / "cgroup").read_text().splitlines()
    except OSError:
        return
    # ID:CONTROLLERS:PATH, without ID and controllers in version 2
    paths = {name: path for _, names, path in (line.split(":", 2) for line in groups) for name in names.split(",")}
    for mount in mounts:
        # ID PARENT DEVICE ROOT MOUNT-POINT OPTIONS ... - TYPE SOURCE SUPER-OPTIONS
        (root, point), (kind, *_, options) = mount.split()[3:5], mount.partition(" - ")[2].split()
        controller = {"cgroup": "cpu", "cgroup2": ""}.get(kind)
        if controller is None or controller not in paths or (controller and controller not in options.split(",")):
            continue
        top = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point))
        path = Path(paths[controller])
        group = top / path.relative_to(root) if path.is_relative_to(root) else top  # a container may see only its own group
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            yield from _quota(folder)


def _quota(group: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):  # no such file, or the quota is "max"
        quota, period = (int(word) for word in (group / "cpu.max").read_text().split())
        yield quota / period
    with suppress(OSError, ValueError):
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if quota > 0:  # -1: unlimited
            yield quota / period
