"""The conclusion of an estimate in one sentence: whether a model fits, or what to change so that it does."""

from __future__ import annotations

from grok1.errors import TooSmallError
from grok1.host.sizes import format_bytes
from grok1.plan.estimate import Estimate, next_fit, widest_split


def verdict(estimate: Estimate) -> str:
    """Return a sentence that says whether a model fits and, if not, what would help."""
    if estimate.devices.usable_bytes is None:
        return f"unknown: the model needs {_needed(estimate)}; the available memory could not be determined"
    if estimate.fits:
        context = estimate.config.sequence_len
        noun = "sequence" if estimate.sequences == 1 else "sequences"
        return f"fits: the weights and {estimate.sequences} {noun} of {context} tokens at a time"
    return f"does not fit: {_shortage(estimate)}; {_remedy(estimate)}"


def room(estimate: Estimate) -> int | None:
    """Return the number of sequences of full context that fit at a time; None if memory is unknown.

    Raises:
        TooSmallError: if none fits; the message names the smallest change that would help.
    """
    if estimate.fits is False:
        raise TooSmallError(f"{_shortage(estimate)}; {_remedy(estimate)}")
    return estimate.sequences


def _shortage(estimate: Estimate) -> str:
    usable = format_bytes(estimate.devices.usable_bytes or 0)
    where = "on this machine" if estimate.devices.kind.shares_memory else "per device"
    return f"the model needs {_needed(estimate)}, but {usable} is available {where}"


def _needed(estimate: Estimate) -> str:
    weights = estimate.weight_bytes
    where = " per device"
    if estimate.devices.kind.shares_memory:
        weights, where = weights * estimate.mesh[1], " of memory"
    total = format_bytes(estimate.needed_bytes())
    return f"{total}{where} ({format_bytes(weights)} for weights, the rest for one sequence)"


def _remedy(estimate: Estimate) -> str:
    fit = next_fit(estimate)
    if fit is None and estimate.devices.kind.shares_memory:
        return f"use a machine with {format_bytes(estimate.needed_bytes())} of free memory"
    if fit is None:
        most = widest_split(estimate)
        need = format_bytes(most.needed_bytes())
        return (
            f"use devices with more memory: the model can be split across at most {most.mesh[1]} devices and then "
            f"needs {need} on each"
        )
    options = []
    if fit.devices.count > estimate.devices.count:
        options.append(f"{fit.devices.count} such devices")
    if fit.mesh != estimate.mesh:
        options.append("--mesh {},{}".format(*fit.mesh))
    if fit.dtype != estimate.dtype:
        options.append(f"--dtype {fit.dtype}")
    return f"it fits with {' and '.join(options)}"
