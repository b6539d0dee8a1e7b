"""How many threads compute, by what the system says about its processors."""

import os

import pytest

from grok1.host import threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a machine whose processors share cores as given, with control groups."""

    def machine(cores, usable, cgroup="", quotas=()):
        for cpu, core in cores.items():
            folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "core_cpus_list").write_text(f"{core}\n")
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for name, text in dict(quotas).items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable, raising=False)
        return tmp_path

    return machine


HYPERTHREADS = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}


@pytest.mark.parametrize(
    ("usable", "expected"), [(set(range(8)), 4), ({0, 4}, 1), ({0, 1, 5}, 2), ({3}, 1), (set(range(4)), 4)]
)
def test_one_for_each_core_of_the_affinity_mask(usable, expected, machine):
    assert threads.default_threads(machine(HYPERTHREADS, usable)) == expected


@pytest.mark.parametrize(
    ("cgroup", "quotas", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 2),
        ("0::/a\n", {"a/cpu.max": "50000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 4),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "300000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 3),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 4),
        ("0::/gone\n", {}, 4),
    ],
)
def test_control_groups_limit_them(cgroup, quotas, expected, machine):
    assert threads.default_threads(machine(HYPERTHREADS, set(range(8)), cgroup, quotas)) == expected


def test_systems_that_say_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5}, raising=False)
    assert threads.default_threads(tmp_path) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads.default_threads(tmp_path) == 6


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [(None, 3, "3"), ("5", None, "5"), ("5", 2, "2"), ("many", None, "4"), ("0", None, "4")],
)
def test_the_environment_gives_way_to_what_is_asked_for(given, count, expected, monkeypatch):
    monkeypatch.setattr(threads, "default_threads", lambda: 4)
    monkeypatch.delenv("NPROC", raising=False)
    if given is not None:
        monkeypatch.setenv("NPROC", given)
    threads.set_threads(count)
    assert os.environ["NPROC"] == expected
    assert threads.num_threads() == int(expected)
