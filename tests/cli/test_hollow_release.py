"""The release at its full size without its data: the commands that need no weights, and the memory they take."""

import json
import subprocess
import sys

import pytest

# A process's peak is at least that of the one that started it, so one that is small starts it.
MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "grok1", *sys.argv[1:]], stdout=subprocess.PIPE)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.returncode, peak * (1 if sys.platform == "darwin" else 1024), done.stdout.decode()]))
"""

H200 = ("--device", "h200", "--count", "8")


def measured(*command):
    """A command's exit code, peak resident memory in bytes, and what it wrote."""
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
def test_the_whole_release_takes_little_memory(command, lines, bound, hollow_release):
    code, peak, out = measured(*[hollow_release if word == "DIR" else word for word in command])
    assert (code, len(out.splitlines())) == (0, lines)
    assert 5_000_000 < peak < bound


def test_what_they_tell_agrees(hollow_release):
    told = {}
    for name, *options in (
        ("inspect", hollow_release),
        ("verify", hollow_release),
        ("plan", "-c", hollow_release, *H200),
    ):
        _, _, out = measured(name, *options, "--json")
        told[name] = json.loads(out)
    assert told["inspect"]["bytes"] == told["verify"]["bytes"] == 318_239_886_140
    assert told["inspect"]["parameters"] == told["plan"]["parameters"]
    # The files' headers are not loaded, and the embedding matrix is half as wide in bfloat16; what every device has
    # whole are norms and routers.
    data = 8 * told["plan"]["weight_bytes"]
    embedding = told["inspect"]["kinds"][0]["bytes"]
    whole = sum(kind["bytes"] for kind in told["inspect"]["kinds"] if kind["kind"] in ("norms", "router"))
    assert data == pytest.approx(318_239_886_140 - embedding / 2 + 7 * whole, rel=1e-5)


def test_its_content_is_told_to_be_missing(hollow_release):
    code, peak, out = measured("verify", "--content", hollow_release)
    assert code == 1
    assert "hollow" in out
    assert peak < 200_000_000
