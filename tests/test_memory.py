import concurrent.futures

import pytest

from grok1.host.memory import MemoryBudget, available_bytes

GIB = 1 << 30


def write(root, **files):
    for path, text in files.items():
        target = root.joinpath(*path.split("__"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


@pytest.fixture
def machine(tmp_path):
    """A Linux machine with 8 GiB available, in files."""
    write(tmp_path, proc__meminfo=f"MemTotal: {16 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {8 << 20} kB\n")
    return tmp_path


def group(folder, version, limit, usage, active, inactive):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}active_file {active}\n{prefix}inactive_file {inactive}\n")


def test_what_linux_says(machine):
    assert available_bytes(machine) == 8 * GIB


def test_nobody_says(tmp_path):
    assert available_bytes(tmp_path) is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_leaves_less(machine, version):
    """Its cache can be had back, so that it does not count as used."""
    write(machine, proc__self__cgroup="0::/a/b\n" if version == 2 else "5:cpu:/x\n4:cpuset,memory:/a/b\n")
    mount = machine / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    group(mount / "a/b", version, 4 * GIB, 3 * GIB, GIB // 2, GIB)
    assert available_bytes(machine) == 5 * GIB // 2


@pytest.mark.parametrize(("outer", "expected"), [("max", 3), (2 * GIB, 1), (100 * GIB, 3), (GIB // 2, 0)])
def test_the_tightest_group_counts(machine, outer, expected):
    write(machine, proc__self__cgroup="0::/a/b\n")
    group(machine / "sys/fs/cgroup/a", 2, outer, GIB, 0, 0)
    group(machine / "sys/fs/cgroup/a/b", 2, 4 * GIB, GIB, 0, 0)
    assert available_bytes(machine) == expected * GIB


def test_this_machine_or_nobody():
    assert available_bytes() is None or available_bytes() > 0


def test_a_budget_is_never_exceeded_and_all_get_their_turn():
    budget = MemoryBudget(100)

    def hold(count):
        with budget.hold(count):
            return budget.held

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        held = list(pool.map(hold, [1, 99, 50, 100, 30] * 100))
    assert len(held) == 500
    assert max(held) <= 100
    assert budget.held == 0


def test_more_than_the_whole_budget_is_refused():
    with pytest.raises(ValueError, match="101 bytes"), MemoryBudget(100).hold(101):
        pass
