"""Commands that need no weights, and their memory use, on hollow files of the full release."""

import json
import subprocess
import sys

import pytest

# The peak memory of a process is at least that of its parent, so a small process starts it.
MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "grok1", *sys.argv[1:]], stdout=subprocess.PIPE)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.returncode, peak * (1 if sys.platform == "darwin" else 1024), done.stdout.decode()]))
"""

H200 = ("--device", "h200", "--count", "8")


def measured(*command):
    """Return the exit code, peak resident memory in bytes, and output of a command."""
    process = subprocess.run([sys.executable, "-c", MEASURE, *map(str, command)], stdout=subprocess.PIPE, check=True)
    return json.loads(process.stdout)


@pytest.mark.parametrize(
    ("command", "lines", "bound"),
    [
        (["inspect", "DIR", "--json"], 1, 200_000_000),
        (["inspect", "DIR", "--tensors"], 771, 200_000_000),
        (["verify", "DIR", "--json"], 1, 200_000_000),
        (["plan", "-c", "DIR", *H200, "--json"], 1, 500_000_000),
    ],
)
def test_commands_use_little_memory_on_the_full_release(command, lines, bound, hollow_release):
    code, peak, out = measured(*[hollow_release if word == "DIR" else word for word in command])
    assert (code, len(out.splitlines())) == (0, lines)
    assert 5_000_000 < peak < bound


def test_plan_and_inspect_agree(hollow_release):
    record = {}
    for name, *options in (
        ("inspect", hollow_release),
        ("verify", hollow_release),
        ("plan", "-c", hollow_release, *H200),
    ):
        _, _, out = measured(name, *options, "--json")
        record[name] = json.loads(out)
    assert record["inspect"]["bytes"] == record["verify"]["bytes"] == 318_239_886_140
    assert record["inspect"]["parameters"] == record["plan"]["parameters"]
    # File headers are not loaded, the embedding matrix takes half the size in bfloat16, and norms and routers are
    # replicated on every device.
    data = 8 * record["plan"]["weight_bytes"]
    embedding = record["inspect"]["kinds"][0]["bytes"]
    whole = sum(kind["bytes"] for kind in record["inspect"]["kinds"] if kind["kind"] in ("norms", "router"))
    assert data == pytest.approx(318_239_886_140 - embedding / 2 + 7 * whole, rel=1e-5)


def test_content_check_reports_missing_weights(hollow_release):
    code, peak, out = measured("verify", "--content", hollow_release)
    assert code == 1
    assert "hollow" in out
    assert peak < 200_000_000
