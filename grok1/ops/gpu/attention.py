"""Attention on GPUs: a Pallas kernel compiled by Triton. On CPUs it is interpreted, for tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grok1.ops.gpu.tiles import (
    MIN_PROGRAMS,
    MIN_ROWS,
    dot,
    launch,
    leading,
    load,
    mask_of,
    store,
    within,
    within_slice,
)

_DECODE_BLOCK = 64  # cache positions per iteration
_MIN_SPLIT = 256  # minimum number of cache positions per program, if several share a context
_MAX_SPLITS = 16
_QUERY_ROWS = 64


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array | int,
    positions: jax.Array,
    slots: jax.Array | None = None,
    *,
    multiplier: float,
    cap: float,
) -> jax.Array:
    """Compute `grok1.ops.xla.attention.attend`.

    Capped logits need no maximum, so that the sums of programs that read different parts of a context are simply added.
    """
    batch, seq, heads, size = query.shape
    kv_heads, max_seq_len = keys.shape[2], keys.shape[3]
    count = heads // kv_heads * seq
    rows = min(_QUERY_ROWS, max(MIN_ROWS, pl.next_power_of_2(count)))
    grouped = query.reshape(batch, seq, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, count, size).astype(keys.dtype)
    of_rows = positions if seq == 1 else jnp.tile(positions, (1, heads // kv_heads))
    programs = batch * kv_heads * pl.cdiv(count, rows)
    splits = 1
    while splits < _MAX_SPLITS and 2 * splits * _MIN_SPLIT <= max_seq_len and programs * splits < MIN_PROGRAMS:
        splits *= 2
    kernel = functools.partial(
        _attention_kernel, rows=rows, splits=splits, multiplier=multiplier, cap=cap, kv_heads=kv_heads
    )
    weighted, mass = launch(
        kernel,
        "grok1_attention",
        (pl.cdiv(count, rows), batch * kv_heads, splits),
        [
            jax.ShapeDtypeStruct((splits, batch, kv_heads, count, size), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, kv_heads, count), jnp.float32),
        ],
        4,
        2,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        jnp.arange(batch, dtype=jnp.int32) if slots is None else slots.astype(jnp.int32),
        of_rows.astype(jnp.int32),
        grouped,
        keys,
        values,
    )
    weighted, mass = jnp.sum(weighted, axis=0), jnp.sum(mass, axis=0)
    output = weighted / jnp.where(mass > 0, mass, 1.0)[..., None]  # padding attends to nothing
    output = output.reshape(batch, kv_heads, heads // kv_heads, seq, size)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, size)


def _attention_kernel(
    layer: Any,
    slots: Any,
    positions: Any,
    query: Any,
    keys: Any,
    values: Any,
    weighted: Any,
    mass: Any,
    *,
    rows: int,
    splits: int,
    multiplier: float,
    cap: float,
    kv_heads: int,
) -> None:
    """Attend with some query rows of one key/value head to every `splits`-th block of visible positions."""
    count, size, max_seq_len = query.shape[2], query.shape[3], keys.shape[3]
    width = max(MIN_ROWS, pl.next_power_of_2(size))
    batch, head, split = pl.program_id(1) // kv_heads, pl.program_id(1) % kv_heads, pl.program_id(2)
    of_program = pl.ds(pl.program_id(0) * rows, rows)
    across = leading(width, split)
    present, inside = within_slice(of_program, count), within(0, width, size)
    if positions.shape[1] == 1:
        own = jnp.full((rows,), positions[batch, 0])
    else:
        own = load(positions.at[batch, of_program], present)
    if present is not None:
        own = jnp.where(present, own, -1)
    inputs = load(query.at[batch, head, of_program, across], mask_of((rows, width), present, inside))
    blocks = (jnp.max(own) + _DECODE_BLOCK) // _DECODE_BLOCK  # up to the largest position of a row
    place = layer[0], slots[batch], head

    def add(i: Any, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = (split + i * splits) * _DECODE_BLOCK
        at = start + jnp.arange(_DECODE_BLOCK)
        known = at < max_seq_len if max_seq_len % _DECODE_BLOCK else None
        block = (*place, pl.ds(start, _DECODE_BLOCK), across)
        mask = mask_of((_DECODE_BLOCK, width), known, inside)
        logits = dot(inputs, load(keys.at[block], mask).T) * (multiplier / cap)
        visible = at[None, :] <= own[:, None]
        if known is not None:
            visible &= known[None, :]
        weights = jnp.where(visible, jnp.exp(cap * (jnp.tanh(logits) - 1)), 0.0)
        block_values = load(values.at[block], mask)
        total, all_mass = totals
        return total + dot(weights.astype(block_values.dtype), block_values), all_mass + jnp.sum(weights, axis=1)

    zeros = jnp.zeros((rows, width), jnp.float32), jnp.zeros((rows,), jnp.float32)
    total, all_mass = lax.fori_loop(0, (blocks - split + splits - 1) // splits, add, zeros)
    out = weighted.at[split, batch, head, of_program, across]
    store(out, total, mask_of((rows, width), present, inside))
    store(mass.at[split, batch, head, of_program], all_mass, present)
