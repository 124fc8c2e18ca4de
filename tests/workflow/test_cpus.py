"""CPUs of a process: affinity, quotas of cgroups in both versions, threads and workers that follow from them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pixelclip.workflow.cpus import count_cpus, count_threads, count_workers

V1_PATHS = "9:name=systemd:/\n4:memory:/pod/x\n2:cpu,cpuacct:{}\n"
V1_MOUNT = "37 32 0:32 {root} {folder}/cpu ro,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
V1_OTHER = "38 32 0:33 / {folder}/cpuset ro - cgroup cgroup rw,cpuset\n39 1 8:1 / / rw - ext4 /dev/vda rw\n"
V2_MOUNT = "30 23 0:26 {root} {folder} ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate\n"


@pytest.fixture(autouse=True)
def many_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def process(folder: Path, mounts: str, paths: str, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "mountinfo").write_text(mounts)
    (folder / "cgroup").write_text(paths)
    return folder


@pytest.mark.parametrize(
    ("root", "path", "files", "expected"),
    [
        # docker run --cpus 1.5: the container sees its own group at the top, and its path from outside
        ("/docker/4c", "/docker/4c", {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ("/", "/docker/4c", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("/", "/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        # a pod limits its containers
        (
            "/",
            "/pods/a/b",
            {
                "cpu/pods/a/cpu.cfs_quota_us": "800000",
                "cpu/pods/a/cpu.cfs_period_us": "100000",
                "cpu/pods/a/b/cpu.cfs_quota_us": "-1",
                "cpu/pods/a/b/cpu.cfs_period_us": "100000",
            },
            8,
        ),
        ("/", "/", {}, 64),
    ],
)
def test_quota_of_cgroup_v1(tmp_path, root, path, files, expected):
    mounts = (V1_OTHER + V1_MOUNT).format(root=root, folder=tmp_path)
    assert count_cpus(process(tmp_path, mounts, V1_PATHS.format(path), files)) == expected


@pytest.mark.parametrize(
    ("path", "files", "expected"),
    [
        ("/", {"cpu.max": "200000 100000\n"}, 2),
        ("/", {"cpu.max": "max 100000\n"}, 64),
        ("/slice/pod", {"cpu.max": "max 100000", "slice/cpu.max": "400000 100000", "slice/pod/cpu.max": "75000 50000"}, 1.5),
        ("/slice/pod", {"slice/cpu.max": "100000 100000", "slice/pod/cpu.max": "400000 100000"}, 1),
        ("/../elsewhere", {"cpu.max": "300000 100000"}, 3),
        ("/", {}, 64),
    ],
)
def test_quota_of_cgroup_v2(tmp_path, path, files, expected):
    assert count_cpus(process(tmp_path, V2_MOUNT.format(root="/", folder=tmp_path), f"0::{path}\n", files)) == expected


def test_affinity_limits_and_other_systems_have_neither(tmp_path, monkeypatch):
    assert count_cpus(tmp_path / "no-proc") == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    files = {"cpu.max": "800000 100000"}
    assert count_cpus(process(tmp_path, V2_MOUNT.format(root="/", folder=tmp_path), "0::/\n", files)) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert count_cpus(tmp_path / "no-proc") == 5


@pytest.mark.parametrize(
    ("cpus", "processes", "threads"), [(0.5, 1, 1), (1.9, 1, 1), (2, 1, 2), (16, 4, 4), (3, 4, 1), (8, 3, 2)]
)
def test_threads_are_whole_cpus_shared_by_the_processes_of_a_machine(monkeypatch, cpus, processes, threads):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert count_threads(cpus) == threads


def test_workers(monkeypatch):
    monkeypatch.setattr("pixelclip.workflow.cpus.count_cpus", lambda: 6.5)
    assert [count_workers(-1, most) for most in (4, 64)] == [4, 6]
    assert [count_workers(workers, 4) for workers in (0, 1, 9)] == [0, 1, 9], "a number is taken as it is"


REPORT = """
import os
from types import SimpleNamespace
import torch
{prepare}
from pixelclip.distributed import pick_device
pick_device("cpu")
pick_device("cpu")
print(torch.get_num_threads())
"""


def report(prepare: str, **environment: str) -> tuple[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    words = [sys.executable, "-c", REPORT.format(prepare=prepare)]
    done = subprocess.run(words, env=kept | environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.slow
def test_process_limits_its_threads_and_logs_it_once():
    quota = "import pixelclip.workflow.cpus; pixelclip.workflow.cpus._quotas = lambda _: [1.5]; torch.set_num_threads(7)"
    threads, log = report(quota)
    assert threads == "1"
    assert log.count("threads: 1 (this process may use ") == 1 and "OMP_NUM_THREADS overrides it" in log
    assert report(quota, OMP_NUM_THREADS="3") == ("7", ""), "the user decides"
    assert report("os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); torch.set_num_threads(7)")[0] == "1"
