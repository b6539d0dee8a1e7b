"""What is said of a model that gets less than it could."""

from types import SimpleNamespace

import pytest

from grok1.cli.loading import note_shortfall
from grok1.cli.terminal import Terminal


@pytest.mark.parametrize(
    ("idle", "loads", "fallback", "notes"),
    [
        ([], [], None, []),
        ([0], [], None, ["1 of 9 devices stays idle: the mesh is 2,4"]),
        ([0, 0], [], None, ["2 of 10 devices stay idle: the mesh is 2,4"]),
        ([1, 1, 2], "abb", None, ["3 of 11 devices stay idle (3 on b): the mesh is 2,4"]),
        ([0, 1], "ab", None, ["2 of 10 devices stay idle (1 on a, 1 on b): the mesh is 2,4"]),
        ([], [], "it rains", ["XLA computes, which is slower than the kernels made for it: it rains"]),
    ],
)
def test_notes_about_idle_devices_and_slower_kernels(idle, loads, fallback, notes, monkeypatch):
    said = []
    terminal = Terminal()
    monkeypatch.setattr(terminal, "note", said.append)
    model = SimpleNamespace(
        idle=[SimpleNamespace(process_index=process) for process in idle],
        loads=[{"host": host} for host in loads],
        kernels_fallback=fallback,
        mesh_shape=(2, 4),
    )
    note_shortfall(model, terminal)
    assert said == notes
