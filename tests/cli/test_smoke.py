import numpy as np
import pytest

from grok1.diagnose import smoke
from grok1.model import Model


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return list(smoke.run_smoke(tmp_path_factory.mktemp("smoke") / "model"))


def test_every_check_is_ok(healthy):
    assert [(check.name, check.result) for check in healthy if check.result != "ok"] == []
    assert len(healthy) == 10


def test_wrong_results_on_all_devices_are_reported(grok1, monkeypatch, tmp_path, healthy):
    logits = Model.logits

    def wrong(self, tokens):
        found = logits(self, tokens)
        return found if self.mesh_shape == (1, 1) else found + 0.1 * np.abs(found).max()

    monkeypatch.setattr(Model, "logits", wrong)
    result = grok1("smoke", "--keep", tmp_path / "kept", "--json")
    assert result.code == 1
    failed = [line["name"] for line in result.lines if line["result"] == "FAILED"]
    assert failed == ["logits on one and all devices"]
    assert len(result.lines) == len(healthy)
    assert result.err == "grok1: error: 1 check failed: logits on one and all devices\n"


def test_existing_checkpoint_is_not_changed(grok1, checkpoint):
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    result = grok1("smoke", "--keep", checkpoint)
    assert result.code == 1
    assert result.out.count("FAILED") == 10
    assert "already contains ckpt-0" in result.out
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before
