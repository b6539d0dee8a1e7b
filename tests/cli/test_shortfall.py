"""Notes about models that do not use all devices or native kernels."""

from types import SimpleNamespace

import pytest

from grok1.cli.loading import note_shortfall
from grok1.cli.terminal import Terminal


@pytest.mark.parametrize(
    ("idle", "loads", "fallback", "notes"),
    [
        ([], [], None, []),
        ([0], [], None, ["1 of 9 devices is not used by the mesh 2,4."]),
        ([0, 0], [], None, ["2 of 10 devices are not used by the mesh 2,4."]),
        ([1, 1, 2], "abb", None, ["3 of 11 devices are not used by the mesh 2,4: 3 on b."]),
        ([0, 1], "ab", None, ["2 of 10 devices are not used by the mesh 2,4: 1 on a, 1 on b."]),
        ([], [], "no compiler", ["Using XLA kernels, which are slower than native kernels: no compiler"]),
    ],
)
def test_notes_about_idle_devices_and_slower_kernels(idle, loads, fallback, notes, monkeypatch):
    printed = []
    terminal = Terminal()
    monkeypatch.setattr(terminal, "note", printed.append)
    model = SimpleNamespace(
        idle=[SimpleNamespace(process_index=process) for process in idle],
        loads=[{"host": host} for host in loads],
        kernels_fallback=fallback,
        mesh_shape=(2, 4),
    )
    note_shortfall(model, terminal)
    assert printed == notes
