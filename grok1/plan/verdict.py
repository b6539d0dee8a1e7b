"""Whether a model fits, in one sentence, with what would do if it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grok1.config import ModelConfig
from grok1.errors import TooSmallError
from grok1.host.sizes import format_bytes
from grok1.plan.devices import present_devices
from grok1.plan.estimate import Estimate, next_fit, widest_split


def verdict(estimate: Estimate) -> str:
    """One sentence: fits or does not, and what would."""
    if estimate.devices.usable_bytes is None:
        return f"not known: it needs {_needed(estimate)}, and how much there is could not be found out"
    if estimate.fits:
        context = estimate.config.sequence_len
        count = estimate.sequences
        noun = "sequence" if count == 1 else "sequences"
        return f"fits: the weights and {count} {noun} of {context} tokens at a time"
    return f"does not fit: {_shortage(estimate)}; {_remedy(estimate)}"


def require_room(config: ModelConfig, mesh: tuple[int, int], devices: Sequence[Any], dtype: str) -> int | None:
    """Makes sure that a model has room on devices of this process before it is loaded.

    Args:
        config: the model.
        mesh: sizes of the data and the model axis.
        devices: all JAX devices that may be used.
        dtype: of activations and of the cache.

    Returns:
        how many sequences of full context can be continued at a time; None if it cannot be found out.

    Raises:
        TooSmallError: if it is not one; it tells the smallest change that would do.
    """
    return room(Estimate(config, present_devices(devices), mesh, dtype))


def room(estimate: Estimate) -> int | None:
    """Makes sure that a model has room, as `require_room` does.

    Raises:
        TooSmallError: if it has not.
    """
    if estimate.fits is False:
        raise TooSmallError(f"{_shortage(estimate)}: {_remedy(estimate)}")
    return estimate.sequences


def _shortage(estimate: Estimate) -> str:
    usable = format_bytes(estimate.devices.usable_bytes or 0)
    where = "on this machine" if estimate.devices.kind.shares_memory else "on each device"
    return f"the model needs {_needed(estimate)}, but {usable} can be had {where}"


def _needed(estimate: Estimate) -> str:
    weights = estimate.weight_bytes
    where = " on each device"
    if estimate.devices.kind.shares_memory:
        weights, where = weights * estimate.mesh[1], " of memory"
    total = format_bytes(estimate.needed_bytes())
    return f"{total}{where} ({format_bytes(weights)} of weights, and one sequence)"


def _remedy(estimate: Estimate) -> str:
    """What would do."""
    fit = next_fit(estimate)
    if fit is None and estimate.devices.kind.shares_memory:
        return f"use a machine that has {format_bytes(estimate.needed_bytes())} free"
    if fit is None:
        most = widest_split(estimate)
        need = format_bytes(most.needed_bytes())
        return (
            f"use devices with more memory, as the model divides over at most {most.mesh[1]} and needs {need} on each"
        )
    options = []
    if fit.devices.count > estimate.devices.count:
        options.append(f"{fit.devices.count} such devices")
    if fit.mesh != estimate.mesh:
        options.append("--mesh {},{}".format(*fit.mesh))
    if fit.dtype != estimate.dtype:
        options.append(f"--dtype {fit.dtype}")
    return f"it fits with {' and '.join(options)}"
