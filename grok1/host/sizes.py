"""Human-readable sizes in bytes: `80GB`, `512 MiB`."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    prefix + ending: base**power
    for power, prefix in enumerate("KMGT", 1)
    for base, endings in ((1000, ("", "B")), (1024, ("I", "IB")))
    for ending in endings
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,6})?) *([a-z]{0,3})", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Parse a size such as `80GB` (10^9), `80GiB` (2^30), `1.5T` or `4096` into bytes.

    Raises:
        ValueError: if it is not a size; the message gives examples.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ValueError(f'invalid size "{text}", expected a number and a unit, such as 512MB, 80GB or 2GiB')
    return round(float(found[1]) * unit)


def format_bytes(count: int) -> str:
    """Return a number of bytes in decimal units, with three or more digits: `40.3 GB`, `512 kB`, `12 B`."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    digits = 0 if units[0] == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f} {units[0]}"
