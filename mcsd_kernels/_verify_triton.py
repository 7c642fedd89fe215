"""`verify` in Triton, schedule "walk": one program a request visits only the rows on its own way through the tree.

The scalar programs are those of `_rules`, as state machines; scalars are float64 there and here. Three kernels: one
turns each request's small inputs into links, settings and early status bits; then one a rule walks.

Masses are sums of whole numbers: a weight counts in units of 2**-60. Integer sums do not depend on their order, so the
answer depends neither on the launch nor on the batch, the alignment of the rows or the hardware's reduction tree, and
an inverse CDF over them has no rounding to guard against.
"""

# ruff: noqa: SIM102  a condition that the compiler decides stands apart from one that the kernel decides

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._schedule import Launch, choose_launch
from .types import DRAW_BLOCK, PLACEHOLDER, Status

_BLOCK = tl.constexpr(DRAW_BLOCK)
_PLACEHOLDER = tl.constexpr(PLACEHOLDER)
_NAN_ROW = tl.constexpr(int(Status.NAN_ROW))
_EMPTY_ROW = tl.constexpr(int(Status.EMPTY_ROW))
_BAD_TOKEN = tl.constexpr(int(Status.BAD_TOKEN))
_BAD_TREE = tl.constexpr(int(Status.BAD_TREE))
_BAD_UNIFORM = tl.constexpr(int(Status.BAD_UNIFORM))
_BAD_SAMPLING = tl.constexpr(int(Status.BAD_SAMPLING))

# A node's candidate as the walk sees it: a token, or one of these.
_MISSING = tl.constexpr(-1)
_REPEATED = tl.constexpr(-2)

# [batch, 4, nodes] int32: the candidate, the first child (-1: a leaf), the next sibling, the last child.
_LINKS = tl.constexpr(4)
_CANDIDATE, _FIRST, _NEXT, _LAST = (tl.constexpr(i) for i in range(4))

# [batch, 2, 4] float64, target and then draft: 1 / temperature (0: temperature 0), top_k (0: off), top_p, and
# log(min_p) * temperature, the distance of min-p's cut-off from the largest logit (-inf: off).
_SETTINGS = tl.constexpr(8)

# [batch, nodes, 2, 8] float64, target and then draft: what makes a row of logits a law; see `_law`.
_RECORD = tl.constexpr(8)
_SCALE, _CUTOFF, _TOP, _INVERSE, _ONLY = (tl.constexpr(i) for i in range(5))

# [batch, nodes, 8] float64: a node's scalars while `traversal` is in the subtree of one of its children.
_FRAME = tl.constexpr(8)

# Units of a weight (their sum is at most about 1) and of exp(x - max) (at most the vocabulary, 2**20).
_MASS_UNIT = tl.constexpr(2.0**60)
_EXP_UNIT = tl.constexpr(2.0**42)
_LARGEST_VOCAB = 1 << 20

# Without fused multiply-adds, whose choice is the compiler's, every pass over a row sees the same weights.
_OPTIONS = {"enable_fp_fusion": False}

_SMALL_DRAFT_MASS = tl.constexpr(1e-6)
_NO_WEIGHT = tl.constexpr(1e-30)
_SMALLEST_KEY = tl.constexpr(-(2**31) + 0x7FFFFF)  # of -inf

# States of the traversal.
_ENTER, _TEST, _REJECTED, _STOP, _DONE = (tl.constexpr(i) for i in range(5))


# ---- rows of logits as laws


@triton.jit
def _row(logits_ptr, rows_ptr, request, node, nodes, stride_request, stride_row):
    """Where a node's logits begin; the node has a row."""
    if rows_ptr is None:
        offset = request.to(tl.int64) * stride_request + node.to(tl.int64) * stride_row
    else:
        offset = tl.load(rows_ptr + request.to(tl.int64) * nodes + node).to(tl.int64) * stride_row
    return logits_ptr + offset


@triton.jit
def _record(record_ptr, wanted):
    """A row's law: (scale, cutoff, top, inverse, only); of no use where it is not wanted."""
    scale = tl.load(record_ptr + _SCALE, mask=wanted, other=0.0).to(tl.float32)
    cutoff = tl.load(record_ptr + _CUTOFF, mask=wanted, other=0.0).to(tl.float32)
    top = tl.load(record_ptr + _TOP, mask=wanted, other=0.0).to(tl.float32)
    inverse = tl.load(record_ptr + _INVERSE, mask=wanted, other=0.0).to(tl.float32)
    only = tl.load(record_ptr + _ONLY, mask=wanted, other=0.0).to(tl.int32)
    return scale, cutoff, top, inverse, only


@triton.jit
def _law(row_ptr, record, ids, valid):
    """exp((x - top) * scale) * inverse where x >= cutoff; with only >= 0, at that token alone (temperature 0)."""
    scale, cutoff, top, inverse, only = record
    x = tl.load(row_ptr + ids, mask=valid, other=float("-inf")).to(tl.float32)
    kept = valid & (x >= cutoff) & ((ids == only) | (only < 0))
    return tl.where(kept, tl.exp((x - top) * scale) * inverse, 0.0)


@triton.jit
def _probability(row_ptr, record, token):
    """The law at one token, float64; 0 for none."""
    return _law(row_ptr, record, token, token >= 0).to(tl.float64)


@triton.jit
def _key(x):
    """An int32 in the order of the float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of an order-preserving key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _search(row_ptr, low, high, limit, top, scale, BY_MASS: tl.constexpr, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """The smallest logit with less than `limit` strictly above it, as a key: a bisection between logits of the row.

    Args:
        row_ptr: the logits.
        low, high: keys that enclose the answer; entries below `low` do not count.
        limit: float64, a number of tokens; with BY_MASS a mass in units of exp(x - top).
        top: the largest logit.
        scale: 1 / temperature.
    """
    floor = low
    while low < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = tl.zeros([TILE, _BLOCK], tl.int64)
        below = tl.full([TILE, _BLOCK], _SMALLEST_KEY, tl.int32)
        next_up = tl.full([TILE, _BLOCK], 0x7FFFFFFF, tl.int32)
        for start in range(0, VOCAB, TILE * _BLOCK):
            ids = start + tl.arange(0, TILE)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
            x = tl.load(row_ptr + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
            key = _key(x)
            counts = (key > middle) & (key >= floor)
            if BY_MASS:
                above += tl.where(counts, (tl.exp((x - top) * scale) * _EXP_UNIT).to(tl.int64), 0)
            else:
                above += counts.to(tl.int64)
            below = tl.maximum(below, tl.where(key <= middle, key, _SMALLEST_KEY))
            next_up = tl.minimum(next_up, tl.where(key > middle, key, 0x7FFFFFFF))
        if tl.sum(tl.sum(above, 1), 0).to(tl.float64) < limit:
            high = tl.maximum(tl.max(tl.max(below, 1), 0), floor)
        else:
            low = tl.min(tl.min(next_up, 1), 0)
    return high


@triton.jit
def _exp_mass(row_ptr, cutoff, top, scale, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Sum of exp((x - top) * scale) over x >= cutoff, in units."""
    total = tl.zeros([TILE, _BLOCK], tl.int64)
    for start in range(0, VOCAB, TILE * _BLOCK):
        ids = start + tl.arange(0, TILE)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        x = tl.load(row_ptr + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
        weight = tl.where(x >= cutoff, tl.exp((x - top) * scale), 0.0)
        total += (weight * _EXP_UNIT).to(tl.int64)
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def _measure(row_ptr, settings_ptr, record_ptr, FILTERS: tl.constexpr, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Write a row's record; returns its status bits, with which the record is void."""
    best = tl.full([TILE, _BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([TILE, _BLOCK], tl.int32)
    broken = tl.zeros([TILE, _BLOCK], tl.int32)
    for start in range(0, VOCAB, TILE * _BLOCK):
        ids = start + tl.arange(0, TILE)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        x = tl.load(row_ptr + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
        broken = tl.where(x < float("inf"), broken, 1)
        where = tl.where(x > best, ids, where)
        best = tl.maximum(best, x)
    top = tl.max(tl.max(best, 1), 0)
    bits = tl.where(tl.max(tl.max(broken, 1), 0) > 0, _NAN_ROW, tl.where(top == float("-inf"), _EMPTY_ROW, 0))
    if bits == 0:
        scale = tl.load(settings_ptr).to(tl.float32)
        cutoff = tl.cast(float("-inf"), tl.float32)
        inverse = tl.cast(1.0, tl.float32)
        only = tl.cast(-1, tl.int32)
        if scale == 0.0:
            scale += 1.0
            cutoff = top
            only = tl.min(tl.min(tl.where(best == top, where, VOCAB), 1), 0)
        else:
            if FILTERS:
                top_k = tl.load(settings_ptr + 1)
                top_p = tl.load(settings_ptr + 2)
                highest = _key(top)
                floor = tl.cast(_SMALLEST_KEY, tl.int32)
                if (top_k > 0) & (top_k < VOCAB):
                    floor = _search(row_ptr, floor, highest, top_k, top, scale, False, VOCAB, TILE)
                if top_p < 1:
                    mass = _exp_mass(row_ptr, _value(floor), top, scale, VOCAB, TILE)
                    floor = _search(row_ptr, floor, highest, top_p * mass.to(tl.float64), top, scale, True, VOCAB, TILE)
                min_p_cutoff = (top.to(tl.float64) + tl.load(settings_ptr + 3)).to(tl.float32)
                cutoff = tl.maximum(_value(floor), min_p_cutoff)
            mass = _exp_mass(row_ptr, cutoff, top, scale, VOCAB, TILE)
            inverse = (1.0 / mass.to(tl.float64) * _EXP_UNIT).to(tl.float32)
        tl.store(record_ptr + _SCALE, scale.to(tl.float64))
        tl.store(record_ptr + _CUTOFF, cutoff.to(tl.float64))
        tl.store(record_ptr + _TOP, top.to(tl.float64))
        tl.store(record_ptr + _INVERSE, inverse.to(tl.float64))
        tl.store(record_ptr + _ONLY, only.to(tl.float64))
    tl.debug_barrier()  # the stores above are the whole program's to read
    return bits


# ---- masses and draws


@triton.jit
def _weights(
    p_row_ptr, p_law, q_row_ptr, q_law, ratio, ids,
    Q_ALONE: tl.constexpr, HAS_DRAFT: tl.constexpr, VOCAB: tl.constexpr,
):  # fmt: skip
    """(p - ratio q)_+ of some tokens, or q itself, in units; where the ratio is 0, q is not read."""
    valid = ids < VOCAB
    if Q_ALONE:
        weight = _law(q_row_ptr, q_law, ids, valid)
    else:
        weight = _law(p_row_ptr, p_law, ids, valid)
        if HAS_DRAFT:
            if ratio != 0.0:
                weight = tl.maximum(weight - ratio * _law(q_row_ptr, q_law, ids, valid), 0.0)
    return (weight * _MASS_UNIT).to(tl.int64)


@triton.jit
def _without(units, ids, links_ptr, nodes, first, end):
    """Clear the entries of the candidates from sibling `first` up to, not including, `end`."""
    other = first
    while other != end:
        units = tl.where(ids == tl.load(links_ptr + nodes * _CANDIDATE + other), 0, units)
        other = tl.load(links_ptr + nodes * _NEXT + other)
    return units


@triton.jit
def _masses(
    p_row_ptr,
    p_law,
    q_row_ptr,
    q_law,
    masses_ptr,
    links_ptr,
    nodes,
    ratio,
    first,
    end,
    Q_ALONE: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the mass of each draw block of (p - ratio q)_+, or of q alone; returns the total, float64.

    The siblings from `first` up to, not including, `end` are left out (None: none is). Their blocks are summed
    once more without them, so that the pass over the row compares no ids.
    """
    blocks = tl.cdiv(VOCAB, _BLOCK)
    tl.debug_barrier()  # until here the old masses may be read
    for start in range(0, blocks, TILE):
        block = start + tl.arange(0, TILE)
        ids = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        units = _weights(p_row_ptr, p_law, q_row_ptr, q_law, ratio, ids, Q_ALONE, HAS_DRAFT, VOCAB)
        tl.store(masses_ptr + block, tl.sum(units, 1), mask=block < blocks)
    tl.debug_barrier()
    if first is not None:
        other = first
        while other != end:
            token = tl.load(links_ptr + nodes * _CANDIDATE + other)
            if token >= 0:
                block_id = token // _BLOCK
                ids = block_id * _BLOCK + tl.arange(0, _BLOCK)
                units = _weights(p_row_ptr, p_law, q_row_ptr, q_law, ratio, ids, Q_ALONE, HAS_DRAFT, VOCAB)
                tl.store(masses_ptr + block_id, tl.sum(_without(units, ids, links_ptr, nodes, first, end), 0))
            other = tl.load(links_ptr + nodes * _NEXT + other)
        tl.debug_barrier()
    lanes = tl.arange(0, BLOCKS)
    total = tl.sum(tl.load(masses_ptr + lanes, mask=lanes < blocks, other=0), 0)
    return total.to(tl.float64) / _MASS_UNIT


@triton.jit
def _first_above(masses, u):
    """The first lane whose cumulative mass exceeds u times the total, which is positive; its mass is not zero."""
    threshold = (u.to(tl.float64) * tl.sum(masses, 0).to(tl.float64)).to(tl.int64)
    return tl.sum((tl.cumsum(masses, 0) <= threshold).to(tl.int32), 0)


@triton.jit
def _draw(
    p_row_ptr,
    p_law,
    q_row_ptr,
    q_law,
    masses_ptr,
    links_ptr,
    nodes,
    ratio,
    first,
    end,
    u_block,
    u_place,
    HAS_DRAFT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One token from the weights whose block masses `_masses` has just written; their total is positive."""
    lanes = tl.arange(0, BLOCKS)
    masses = tl.load(masses_ptr + lanes, mask=lanes < tl.cdiv(VOCAB, _BLOCK), other=0)
    ids = _first_above(masses, u_block) * _BLOCK + tl.arange(0, _BLOCK)
    units = _weights(p_row_ptr, p_law, q_row_ptr, q_law, ratio, ids, False, HAS_DRAFT, VOCAB)
    if first is not None:
        units = _without(units, ids, links_ptr, nodes, first, end)
    return tl.minimum(tl.min(ids, 0) + _first_above(units, u_place), VOCAB - 1)


# ---- what the host hands over


@triton.jit
def _setting(number, tensor_ptr, request, stride):
    """One sampling parameter of a request: the tensor's, if there is one."""
    if tensor_ptr is None:
        value = tl.cast(number, tl.float64)
    else:
        value = tl.load(tensor_ptr + request.to(tl.int64) * stride).to(tl.float64)
    return value


@triton.jit
def _settings(settings_ptr, temperature, top_k, top_p, min_p):
    """Write one side's settings; returns whether they are out of range."""
    sound = (temperature >= 0) & (temperature < float("inf"))
    sound = sound & (top_k >= 0) & (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)
    hot = sound & (temperature > 0)
    tl.store(settings_ptr, tl.where(hot, 1.0 / tl.where(hot, temperature, 1.0), 0.0))
    tl.store(settings_ptr + 1, top_k)
    tl.store(settings_ptr + 2, top_p)
    limited = sound & (min_p > 0)
    below = tl.log(tl.where(limited, min_p, 1.0).to(tl.float32)).to(tl.float64) * tl.where(hot, temperature, 1.0)
    tl.store(settings_ptr + 3, tl.where(limited, below, float("-inf")))
    return sound == 0


@triton.jit
def _prepare_kernel(
    tokens_ptr,  # [batch, nodes] i32 or i64
    parents_ptr,  # [nodes] or [batch, nodes] i32 or i64
    uniforms_ptr,  # [batch, nodes + 2] f32
    target_rows_ptr,  # [batch, nodes] i32 or i64, or None
    draft_rows_ptr,  # [batch, nodes] i32 or i64, or None
    temperature_ptr,  # [batch] or None, in place of the number; so are the next ones
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    draft_temperature_ptr,
    draft_top_k_ptr,
    draft_top_p_ptr,
    draft_min_p_ptr,
    links_ptr,  # out: [batch, 4, nodes] i32
    settings_ptr,  # out: [batch, 2, 4] f64
    path_ptr,  # out: [batch, width] i32, -1 after a root that stays
    length_ptr,  # out: [batch] i32, 1
    emitted_ptr,  # out: [batch, width] i64, -1 after a placeholder
    status_ptr,  # out: [batch] i32, the bits that need no row
    parents_stride_batch,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    draft_temperature_stride,
    draft_top_k_stride,
    draft_top_p_stride,
    draft_min_p_stride,
    temperature,  # f32
    top_k,  # f32
    top_p,  # f32
    min_p,  # f32
    draft_temperature,  # f32
    draft_top_k,  # f32
    draft_top_p,  # f32
    draft_min_p,  # f32
    nodes,
    target_row_count,
    draft_row_count,
    width,
    DISTINCT: tl.constexpr,  # whether a candidate that repeats an earlier sibling is never offered
    HAS_DRAFT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,  # nodes at once
):
    """One request's links, settings and early status; grid (batch,).

    A node's children are those whose parent it is; comparing all pairs of nodes in tiles needs no order and no scratch.
    """
    request = tl.program_id(0)
    tokens_ptr += request.to(tl.int64) * nodes
    parents_ptr += request.to(tl.int64) * parents_stride_batch
    uniforms_ptr += request.to(tl.int64) * (nodes + 2)
    links_ptr += request.to(tl.int64) * _LINKS * nodes
    settings_ptr += request.to(tl.int64) * _SETTINGS

    bad_tree = (tl.load(parents_ptr) != -1).to(tl.int32)
    bad_token = bad_tree * 0
    bad_uniform = bad_tree * 0
    for start in range(0, nodes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < nodes
        later = inside & (i > 0)
        parent = tl.load(parents_ptr + i, mask=inside, other=-1).to(tl.int32)
        token = tl.load(tokens_ptr + i, mask=inside, other=-1)
        child = later & (parent != -1)
        stray = child & ((parent < 0) | (parent >= i))
        grandparent = tl.load(parents_ptr + parent, mask=child & (stray == 0), other=0).to(tl.int32)
        stray = stray | (child & (parent > 0) & (grandparent == -1))
        drawn = (token >= 0) & (token < VOCAB)
        bad_token = tl.maximum(bad_token, tl.max((child & (drawn == 0) & (token != -1)).to(tl.int32), 0))

        first = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
        following = first
        last = tl.full([BLOCK], -1, tl.int32)
        some = tl.zeros([BLOCK], tl.int32)
        repeated = tl.zeros([BLOCK], tl.int32)
        for other_start in range(0, nodes, BLOCK):
            j = other_start + tl.arange(0, BLOCK)
            other_parent = tl.load(parents_ptr + j, mask=(j > 0) & (j < nodes), other=-1).to(tl.int32)
            other_token = tl.load(tokens_ptr + j, mask=j < nodes, other=-1)
            other_drawn = (other_token >= 0) & (other_token < VOCAB)
            below = other_parent[None, :] == i[:, None]
            beside = (other_parent[None, :] == parent[:, None]) & child[:, None]
            first = tl.minimum(first, tl.min(tl.where(below, j[None, :], 0x7FFFFFFF), 1))
            last = tl.maximum(last, tl.max(tl.where(below, j[None, :], -1), 1))
            some = tl.maximum(some, tl.max((below & other_drawn[None, :]).to(tl.int32), 1))
            after = beside & (j[None, :] > i[:, None])
            following = tl.minimum(following, tl.min(tl.where(after, j[None, :], 0x7FFFFFFF), 1))
            if DISTINCT:
                same = beside & (j[None, :] < i[:, None]) & (other_token[None, :] == token[:, None])
                repeated = tl.maximum(repeated, tl.max(same.to(tl.int32), 1))
        candidate = tl.where(drawn, tl.where(repeated > 0, _REPEATED, token.to(tl.int32)), _MISSING)
        tl.store(links_ptr + nodes * _CANDIDATE + i, candidate, mask=inside)
        tl.store(links_ptr + nodes * _FIRST + i, tl.where(some > 0, first, -1), mask=inside)
        tl.store(links_ptr + nodes * _NEXT + i, tl.where(following < nodes, following, -1), mask=inside)
        tl.store(links_ptr + nodes * _LAST + i, last, mask=inside)

        if target_rows_ptr is not None:
            used = child | (i == 0)
            row = tl.load(target_rows_ptr + request.to(tl.int64) * nodes + i, mask=used, other=0)
            stray = stray | (used & ((row < -1) | (row >= target_row_count) | ((row < 0) & (i == 0))))
        if draft_rows_ptr is not None:
            inner = inside & (last >= 0)
            row = tl.load(draft_rows_ptr + request.to(tl.int64) * nodes + i, mask=inner, other=0)
            stray = stray | (inner & ((row < 0) | (row >= draft_row_count)))
        bad_tree = tl.maximum(bad_tree, tl.max(stray.to(tl.int32), 0))

    for start in range(0, nodes + 2, BLOCK):
        i = start + tl.arange(0, BLOCK)
        u = tl.load(uniforms_ptr + i, mask=i < nodes + 2, other=0.0)
        bad_uniform = tl.maximum(bad_uniform, tl.max(tl.where((u >= 0) & (u < 1), 0, 1), 0))

    out_of_range = _settings(
        settings_ptr,
        _setting(temperature, temperature_ptr, request, temperature_stride),
        _setting(top_k, top_k_ptr, request, top_k_stride),
        _setting(top_p, top_p_ptr, request, top_p_stride),
        _setting(min_p, min_p_ptr, request, min_p_stride),
    )
    if HAS_DRAFT:
        out_of_range = out_of_range | _settings(
            settings_ptr + 4,
            _setting(draft_temperature, draft_temperature_ptr, request, draft_temperature_stride),
            _setting(draft_top_k, draft_top_k_ptr, request, draft_top_k_stride),
            _setting(draft_top_p, draft_top_p_ptr, request, draft_top_p_stride),
            _setting(draft_min_p, draft_min_p_ptr, request, draft_min_p_stride),
        )

    # a tree that is none has no candidates to speak of
    status = tl.where(bad_tree > 0, _BAD_TREE, bad_token * _BAD_TOKEN)
    status = status | (bad_uniform * _BAD_UNIFORM) | (out_of_range.to(tl.int32) * _BAD_SAMPLING)
    tl.store(status_ptr + request, status)
    tl.store(length_ptr + request, 1)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = request.to(tl.int64) * width + i
        tl.store(path_ptr + at, tl.where(i == 0, 0, -1), mask=i < width)
        tl.store(emitted_ptr + at, tl.where(i == 0, _PLACEHOLDER, -1).to(tl.int64), mask=i < width)


@triton.jit
def _emit(
    node, depth, token, bits, request, parents_ptr, links_ptr, path_ptr, length_ptr, emitted_ptr, status_ptr,
    nodes, width,
):  # fmt: skip
    """Write a request's answer: the path down to `node`, and the last token."""
    out = request.to(tl.int64) * width
    tl.store(length_ptr + request, depth + 1)
    tl.store(emitted_ptr + out + depth, token.to(tl.int64))
    tl.store(status_ptr + request, tl.load(status_ptr + request) | bits)
    while depth > 0:
        tl.store(path_ptr + out + depth, node)
        tl.store(emitted_ptr + out + depth - 1, tl.load(links_ptr + nodes * _CANDIDATE + node).to(tl.int64))
        node = tl.load(parents_ptr + node).to(tl.int32)
        depth -= 1


@triton.jit
def _is_virtual(target_rows_ptr, request, node, nodes):
    if target_rows_ptr is None:
        virtual = node < 0
    else:
        virtual = tl.load(target_rows_ptr + request.to(tl.int64) * nodes + node) < 0
    return virtual


# ---- rule `recursive`


@triton.jit
def _test_drawn(
    p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, uniforms_ptr, nodes, first,
    REPLACED: tl.constexpr, VOCAB: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Proposals with and without replacement.

    Returns:
        the accepted child or -1; beta; the beta whose masses are in memory, or -1; their total.
    """
    one = tl.cast(1.0, tl.float64)
    beta, S, Z, held, total = one * 0, one, one, -one, one * 0
    chosen = first * 0 - 1
    child = first
    while (child >= 0) & (chosen < 0):
        x = tl.load(links_ptr + nodes * _CANDIDATE + child)
        following = tl.load(links_ptr + nodes * _NEXT + child)
        if x >= 0:
            px = _probability(p_row_ptr, p_law, x)
            qx = _probability(q_row_ptr, q_law, x)
            u = tl.load(uniforms_ptr + child).to(tl.float64)
            if u * qx * S < tl.maximum(px - beta * qx, 0.0) * Z:
                chosen = child
            else:
                next_beta = beta + S / Z
                total = _masses(
                    p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes,
                    next_beta.to(tl.float32), None, None, False, True, VOCAB, TILE, BLOCKS,
                )  # fmt: skip
                held = next_beta
                if total <= 0.0:  # rounding, or a token that cannot have been drawn
                    if px > 0.0:
                        chosen = child
                    else:
                        tl.store(links_ptr + nodes * _CANDIDATE + child, _MISSING)
                else:
                    beta, S = next_beta, total
                    if not REPLACED:
                        Z -= qx
                        if (Z < _SMALL_DRAFT_MASS) & (following >= 0):
                            Z = _masses(
                                p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes, 0.0,
                                first, following, True, True, VOCAB, TILE, BLOCKS,
                            )  # fmt: skip
                            held = -one
                            following = tl.where(Z > 0.0, following, -1)
        child = following
    return chosen, beta, held, total


@triton.jit
def _spend(p_row_ptr, p_law, links_ptr, uniforms_ptr, nodes, child, end, left, tested):
    """Offer each candidate from `child` up to `end` its share of what is `left`; a refused share is gone.

    Returns:
        the accepted child or -1; the last one tested that the target allows, or -1.
    """
    chosen = child * 0 - 1
    while (child != end) & (chosen < 0):
        x = tl.load(links_ptr + nodes * _CANDIDATE + child)
        if x >= 0:
            share = _probability(p_row_ptr, p_law, x)
            if tl.load(uniforms_ptr + child).to(tl.float64) * left < share:
                chosen = child
            elif share > 0.0:
                tested = child
                if left - share <= 0.0:
                    chosen = child
                left -= share
        child = tl.load(links_ptr + nodes * _NEXT + child)
    return chosen, tested


@triton.jit
def _offered(p_row_ptr, p_law, links_ptr, nodes, first, end):
    """The mass of p on the candidates from `first` up to `end`."""
    mass = tl.cast(0.0, tl.float64)
    child = first
    while child != end:
        mass += _probability(p_row_ptr, p_law, tl.load(links_ptr + nodes * _CANDIDATE + child))
        child = tl.load(links_ptr + nodes * _NEXT + child)
    return mass


@triton.jit
def _inverse_mass(
    p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes, first, last,
    VOCAB: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """1 / (mass of q outside the siblings before `last`), 0 where nothing is left to draw."""
    mass = tl.cast(1.0, tl.float64)
    if first != last:
        mass = _masses(
            p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes, 0.0, first, last,
            True, True, VOCAB, TILE, BLOCKS,
        )  # fmt: skip
    return tl.where(mass > 0.0, 1.0 / tl.where(mass > 0.0, mass, 1.0), 0.0)


@triton.jit
def _test_greedy(
    p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, uniforms_ptr, nodes, first, last,
    VOCAB: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Proposal "greedy": the drawn child, which is the last one, and then the most probable ones.

    Returns:
        as `_test_drawn`, and the last child tested that the target allows, or -1.
    """
    one = tl.cast(1.0, tl.float64)
    beta, held, total = one * 0, -one, one * 0
    chosen = first * 0 - 1
    tested = chosen
    if first >= 0:
        x = tl.load(links_ptr + nodes * _CANDIDATE + last)
        if x != _MISSING:
            beta = _inverse_mass(
                p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes, first, last, VOCAB, TILE, BLOCKS
            )
        if x >= 0:
            px = _probability(p_row_ptr, p_law, x)
            u = tl.load(uniforms_ptr + last).to(tl.float64)
            if u * _probability(q_row_ptr, q_law, x) * beta < px:
                chosen = last
            elif px > 0.0:
                tested = last
        if chosen < 0:
            total = _masses(
                p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes, beta.to(tl.float32),
                first, last, False, True, VOCAB, TILE, BLOCKS,
            )  # fmt: skip
            held = beta
            left = _offered(p_row_ptr, p_law, links_ptr, nodes, first, last) + total
            if left <= 0.0:
                if tested >= 0:
                    chosen = tested
                beta, left = one * 0, one
            if chosen < 0:
                chosen, tested = _spend(p_row_ptr, p_law, links_ptr, uniforms_ptr, nodes, first, last, left, tested)
    return chosen, beta, held, total, tested


@triton.jit
def _recursive_kernel(
    target_logits_ptr,  # [batch, nodes, vocab] or [rows, vocab] f16, bf16 or f32
    draft_logits_ptr,  # the same, or None
    target_rows_ptr,  # [batch, nodes] i32 or i64, or None
    draft_rows_ptr,  # [batch, nodes] i32 or i64, or None
    parents_ptr,  # [nodes] or [batch, nodes] i32 or i64
    uniforms_ptr,  # [batch, nodes + 2] f32
    links_ptr,  # [batch, 4, nodes] i32
    settings_ptr,  # [batch, 2, 4] f64
    records_ptr,  # scratch: [batch, nodes, 2, 8] f64
    masses_ptr,  # scratch: [batch, blocks] i64
    path_ptr,  # out: [batch, width] i32
    length_ptr,  # out: [batch] i32
    emitted_ptr,  # out: [batch, width] i64
    status_ptr,  # in, out: [batch] i32
    target_stride_batch,
    target_stride_row,
    draft_stride_batch,
    draft_stride_row,
    parents_stride_batch,
    nodes,
    width,
    PROPOSAL: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    TARGET_FILTERS: tl.constexpr,
    DRAFT_FILTERS: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,  # draw blocks at once
    BLOCKS: tl.constexpr,  # draw blocks of a row, rounded up to a power of two
):
    """Rule `recursive`, one program a request; grid (batch,)."""
    request = tl.program_id(0)
    refused = tl.load(status_ptr + request) & (_BAD_TREE | _BAD_UNIFORM | _BAD_SAMPLING)
    if refused != 0:
        return
    parents_ptr += request.to(tl.int64) * parents_stride_batch
    uniforms_ptr += request.to(tl.int64) * (nodes + 2)
    links_ptr += request.to(tl.int64) * _LINKS * nodes
    settings_ptr += request.to(tl.int64) * _SETTINGS
    records_ptr += request.to(tl.int64) * nodes * 2 * _RECORD
    masses_ptr += request.to(tl.int64) * tl.cdiv(VOCAB, _BLOCK)
    u_block, u_place = tl.load(uniforms_ptr + nodes), tl.load(uniforms_ptr + nodes + 1)
    node, depth, bits, token = refused, refused, refused, refused
    walking = refused == 0
    while walking:
        first = tl.where(depth < width - 1, tl.load(links_ptr + nodes * _FIRST + node), -1)
        last = tl.load(links_ptr + nodes * _LAST + node)
        record_ptr = records_ptr + node * 2 * _RECORD
        p_row_ptr = _row(
            target_logits_ptr, target_rows_ptr, request, node, nodes, target_stride_batch, target_stride_row
        )
        bits = _measure(p_row_ptr, settings_ptr, record_ptr, TARGET_FILTERS, VOCAB, TILE)
        p_law = _record(record_ptr, bits == 0)
        q_row_ptr, q_law = p_row_ptr, p_law
        if HAS_DRAFT:
            q_row_ptr = _row(
                draft_logits_ptr, draft_rows_ptr, request, node, nodes, draft_stride_batch, draft_stride_row
            )
            inner = (bits == 0) & (first >= 0)
            if inner:
                bits = _measure(q_row_ptr, settings_ptr + 4, record_ptr + _RECORD, DRAFT_FILTERS, VOCAB, TILE)
            q_law = _record(record_ptr + _RECORD, inner & (bits == 0))
        if bits != 0:
            token = node * 0 + _PLACEHOLDER
            walking = walking == 0
        else:
            # the final draw leaves out the siblings from `without` to `end`
            if PROPOSAL == "point":
                without, end = first, first * 0 - 1
                left = tl.cast(1.0, tl.float64)
                chosen, tested = _spend(p_row_ptr, p_law, links_ptr, uniforms_ptr, nodes, first, -1, left, end)
                beta = tl.cast(0.0, tl.float64)
                held, total = beta - 1, beta
            elif PROPOSAL == "greedy":
                without, end = first, tl.where(first >= 0, last, -1)
                chosen, beta, held, total, tested = _test_greedy(
                    p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, uniforms_ptr, nodes, first, last,
                    VOCAB, TILE, BLOCKS,
                )  # fmt: skip
            else:
                without, end = None, None
                chosen, beta, held, total = _test_drawn(
                    p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, uniforms_ptr, nodes, first,
                    PROPOSAL == "with_replacement", VOCAB, TILE, BLOCKS,
                )  # fmt: skip
                tested = first * 0 - 1
            ratio = beta.to(tl.float32)
            if (chosen < 0) & (held != beta):
                total = _masses(
                    p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes, ratio, without, end,
                    False, HAS_DRAFT, VOCAB, TILE, BLOCKS,
                )  # fmt: skip
            if (chosen < 0) & (total <= 0.0):
                chosen = tested
            if chosen < 0:
                token = _draw(
                    p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes, ratio, without, end,
                    u_block, u_place, HAS_DRAFT, VOCAB, BLOCKS,
                )  # fmt: skip
                walking = walking == 0
            elif _is_virtual(target_rows_ptr, request, chosen, nodes):
                token = tl.load(links_ptr + nodes * _CANDIDATE + chosen)
                walking = walking == 0
            else:
                node = chosen
                depth += 1
    _emit(
        node, depth, token, bits, request, parents_ptr, links_ptr, path_ptr, length_ptr, emitted_ptr, status_ptr,
        nodes, width,
    )  # fmt: skip


# ---- rule `traversal`


@triton.jit
def _traversal_kernel(
    target_logits_ptr,  # [batch, nodes, vocab] or [rows, vocab] f16, bf16 or f32
    draft_logits_ptr,  # the same, or None
    target_rows_ptr,  # [batch, nodes] i32 or i64, or None
    draft_rows_ptr,  # [batch, nodes] i32 or i64, or None
    parents_ptr,  # [nodes] or [batch, nodes] i32 or i64
    uniforms_ptr,  # [batch, nodes + 2] f32
    links_ptr,  # [batch, 4, nodes] i32
    settings_ptr,  # [batch, 2, 4] f64
    records_ptr,  # scratch: [batch, nodes, 2, 8] f64
    masses_ptr,  # scratch: [batch, blocks] i64
    frames_ptr,  # scratch: [batch, nodes, 8] f64
    path_ptr,  # out: [batch, width] i32
    length_ptr,  # out: [batch] i32
    emitted_ptr,  # out: [batch, width] i64
    status_ptr,  # in, out: [batch] i32
    target_stride_batch,
    target_stride_row,
    draft_stride_batch,
    draft_stride_row,
    parents_stride_batch,
    nodes,
    width,
    PROPOSAL: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    TARGET_FILTERS: tl.constexpr,
    DRAFT_FILTERS: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,  # draw blocks at once
    BLOCKS: tl.constexpr,  # draw blocks of a row, rounded up to a power of two
):
    """Rule `traversal`, one program a request; grid (batch,).

    The tree is its own stack: a node that fails goes back to its parent, whose scalars wait in its frame and whose rows
    need not be measured again. Of a node: w, beta, Z and c as in `docs/algorithm.md`; kappa is `left` where siblings
    are offered shares ("point", "greedy"); `child` is under test.
    """
    OFFERS: tl.constexpr = (PROPOSAL == "point") | (PROPOSAL == "greedy")
    request = tl.program_id(0)
    refused = tl.load(status_ptr + request) & (_BAD_TREE | _BAD_UNIFORM | _BAD_SAMPLING)
    if refused != 0:
        return
    parents_ptr += request.to(tl.int64) * parents_stride_batch
    uniforms_ptr += request.to(tl.int64) * (nodes + 2)
    links_ptr += request.to(tl.int64) * _LINKS * nodes
    settings_ptr += request.to(tl.int64) * _SETTINGS
    records_ptr += request.to(tl.int64) * nodes * 2 * _RECORD
    masses_ptr += request.to(tl.int64) * tl.cdiv(VOCAB, _BLOCK)
    frames_ptr += request.to(tl.int64) * nodes * _FRAME
    one = tl.cast(1.0, tl.float64)
    u_block, u_place = tl.load(uniforms_ptr + nodes), tl.load(uniforms_ptr + nodes + 1)
    node, depth, bits, token = refused, refused, refused, refused
    child, tested = node - 1, node - 1
    w, beta, kappa, Z, c = one, one * 0, one, one, one
    held, total = -one, one * 0  # whose masses are in memory
    state = node + _ENTER
    while state != _DONE:
        first = tl.where(depth < width - 1, tl.load(links_ptr + nodes * _FIRST + node), -1)
        last = tl.load(links_ptr + nodes * _LAST + node)
        record_ptr = records_ptr + node * 2 * _RECORD
        p_row_ptr = _row(
            target_logits_ptr, target_rows_ptr, request, node, nodes, target_stride_batch, target_stride_row
        )
        q_row_ptr = p_row_ptr
        if HAS_DRAFT:
            q_row_ptr = _row(
                draft_logits_ptr, draft_rows_ptr, request, node, nodes, draft_stride_batch, draft_stride_row
            )
        if state == _ENTER:
            bits = _measure(p_row_ptr, settings_ptr, record_ptr, TARGET_FILTERS, VOCAB, TILE)
            if HAS_DRAFT:
                if (bits == 0) & (first >= 0):
                    bits = _measure(q_row_ptr, settings_ptr + 4, record_ptr + _RECORD, DRAFT_FILTERS, VOCAB, TILE)
        p_law = _record(record_ptr, bits == 0)
        q_law = p_law
        if HAS_DRAFT:
            q_law = _record(record_ptr + _RECORD, (bits == 0) & (first >= 0))
        # the final draw leaves out the siblings from `without` to `end`
        if PROPOSAL == "point":
            without, end = first, first * 0 - 1
        elif PROPOSAL == "greedy":
            without, end = first, tl.where(first >= 0, last, -1)
        else:
            without, end = None, None

        if state == _ENTER:
            beta, kappa, Z, c, held = one * 0, one, one, w, -one
            child, tested = first, first * 0 - 1
            if PROPOSAL == "greedy":
                child = end
            state = node * 0 + _TEST
            if bits != 0:
                # nothing is accepted before a node has stopped
                node, depth, token = node * 0, depth * 0, node * 0 + _PLACEHOLDER
                state = node * 0 + _DONE
            elif PROPOSAL == "greedy":
                if first >= 0:
                    if tl.load(links_ptr + nodes * _CANDIDATE + last) != _MISSING:
                        beta = _inverse_mass(
                            p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes, first, last,
                            VOCAB, TILE, BLOCKS,
                        )  # fmt: skip

        x = node * 0 - 1
        px, qx = one * 0, one * 0
        if ((state == _TEST) | (state == _REJECTED)) & (child >= 0):
            x = tl.load(links_ptr + nodes * _CANDIDATE + child)
            px = _probability(p_row_ptr, p_law, x)
            if HAS_DRAFT:
                qx = _probability(q_row_ptr, q_law, x)

        if state == _TEST:
            if child < 0:
                state = node * 0 + _STOP
            elif x < 0:
                state = node * 0 + _REJECTED
            else:
                if PROPOSAL == "point":
                    scale, mass = kappa, w * px
                elif PROPOSAL == "greedy":
                    scale, mass = tl.where(child == last, qx * beta, kappa), w * px
                else:
                    scale, mass = qx, kappa * tl.maximum(w * px - beta * qx, 0.0) * Z
                state = node * 0 + _REJECTED
                if mass > scale * _NO_WEIGHT:
                    share = tl.where(mass >= scale, 1.0, mass / tl.where(scale > 0.0, scale, 1.0))
                    if _is_virtual(target_rows_ptr, request, child, nodes):
                        if tl.load(uniforms_ptr + child).to(tl.float64) < share:
                            token = x
                            state = node * 0 + _DONE
                    else:
                        frame_ptr = frames_ptr + node * _FRAME
                        tl.store(frame_ptr, w)
                        tl.store(frame_ptr + 1, beta)
                        tl.store(frame_ptr + 2, kappa)
                        tl.store(frame_ptr + 3, Z)
                        tl.store(frame_ptr + 4, c)
                        tl.store(frame_ptr + 5, tested.to(tl.float64))
                        node = child
                        depth += 1
                        w = share
                        state = node * 0 + _ENTER

        if state == _REJECTED:
            following = tl.load(links_ptr + nodes * _NEXT + child)
            if OFFERS:
                if px > 0.0:
                    tested = child
                drawn = child < 0
                if PROPOSAL == "greedy":
                    drawn = child == last
                    following = tl.where(following == last, -1, following)
                if drawn:
                    if HAS_DRAFT:
                        total = _masses(
                            p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes,
                            (beta / w).to(tl.float32), without, end, False, HAS_DRAFT, VOCAB, TILE, BLOCKS,
                        )  # fmt: skip
                        held = beta
                        kappa = (1.0 - w) + w * _offered(p_row_ptr, p_law, links_ptr, nodes, first, last) + w * total
                        if kappa <= 0.0:
                            beta, kappa = one * 0, one
                        following = tl.where(first == last, -1, first)
                elif kappa - w * px > 0.0:
                    kappa -= w * px
            elif x >= 0:
                next_beta = beta + 1.0 / (kappa * Z)
                total = _masses(
                    p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes,
                    (next_beta / w).to(tl.float32), None, None, False, HAS_DRAFT, VOCAB, TILE, BLOCKS,
                )  # fmt: skip
                held = next_beta
                s = kappa * w * total
                rest = s + (1.0 - c)  # in this order a small s survives where c is 1
                if rest <= 0.0:  # w = 1 and nothing is left: rounding
                    tl.store(links_ptr + nodes * _CANDIDATE + child, _MISSING)
                else:
                    beta, kappa, c = next_beta, kappa / rest, s / rest
                    if PROPOSAL == "without_replacement":
                        Z -= qx
                        if (Z < _SMALL_DRAFT_MASS) & (following >= 0):
                            Z = _masses(
                                p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes, 0.0,
                                first, following, True, HAS_DRAFT, VOCAB, TILE, BLOCKS,
                            )  # fmt: skip
                            held = -one
                            following = tl.where(Z > 0.0, following, -1)
            child = following
            state = node * 0 + _TEST

        if state == _STOP:
            must = depth == 0
            u = tl.load(uniforms_ptr + node).to(tl.float64)
            stops = must | (u < c)
            shares = OFFERS & (first >= 0)
            if (stops | shares) & (held != beta):
                total = _masses(
                    p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes,
                    (beta / w).to(tl.float32), without, end, False, HAS_DRAFT, VOCAB, TILE, BLOCKS,
                )  # fmt: skip
            if shares:
                stops = must | (u * kappa < w * total)
            if stops:
                if (total <= 0.0) & (tested >= 0):
                    token = tl.load(links_ptr + nodes * _CANDIDATE + tested)
                else:
                    token = _draw(
                        p_row_ptr, p_law, q_row_ptr, q_law, masses_ptr, links_ptr, nodes,
                        (beta / w).to(tl.float32), without, end, u_block, u_place, HAS_DRAFT, VOCAB, BLOCKS,
                    )  # fmt: skip
                state = node * 0 + _DONE
            else:
                # back to the parent, whose child has failed
                child = node
                node = tl.load(parents_ptr + node).to(tl.int32)
                depth -= 1
                tl.debug_barrier()
                frame_ptr = frames_ptr + node * _FRAME
                w = tl.load(frame_ptr)
                beta = tl.load(frame_ptr + 1)
                kappa = tl.load(frame_ptr + 2)
                Z = tl.load(frame_ptr + 3)
                c = tl.load(frame_ptr + 4)
                tested = tl.load(frame_ptr + 5).to(tl.int32)
                held = -one
                state = node * 0 + _REJECTED
    _emit(
        node, depth, token, bits, request, parents_ptr, links_ptr, path_ptr, length_ptr, emitted_ptr, status_ptr,
        nodes, width,
    )  # fmt: skip


# ---- the host's side


def verify(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    uniforms: torch.Tensor,
    target_rows: torch.Tensor | None,
    draft_rows: torch.Tensor | None,
    sampling: list[float],
    sampling_tensors: list[torch.Tensor | None],
    draft_sampling: list[float],
    draft_sampling_tensors: list[torch.Tensor | None],
    proposal: str,
    rule: str,
    max_depth: int,
    *,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator behind `mcsd_kernels.verify`; arguments as there, already checked.

    Args:
        launch: in place of the table's choice; changes no answer.
    """
    batch, nodes = tokens.shape
    vocab, width, device = target_logits.shape[-1], max_depth + 1, target_logits.device
    if vocab > _LARGEST_VOCAB:
        raise ValueError(f"target_logits: expected a vocabulary of at most {_LARGEST_VOCAB} tokens, got {vocab}")
    launch = launch or choose_launch(vocab)
    tokens, uniforms = tokens.contiguous(), uniforms.contiguous()
    parents = parents if parents.stride(-1) == 1 else parents.contiguous()
    target_rows = None if target_rows is None else target_rows.contiguous()
    draft_rows = None if draft_rows is None else draft_rows.contiguous()

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    blocks = -(-vocab // DRAW_BLOCK)
    links = new(batch, _LINKS.value, nodes, dtype=torch.int32)
    settings = new(batch, _SETTINGS.value, dtype=torch.float64)
    records = new(batch, nodes, 2, _RECORD.value, dtype=torch.float64)
    masses = new(batch, blocks, dtype=torch.int64)
    path, length = new(batch, width, dtype=torch.int32), new(batch, dtype=torch.int32)
    emitted, status = new(batch, width, dtype=torch.int64), new(batch, dtype=torch.int32)
    outputs = path, length, emitted, status
    if batch == 0:
        return outputs

    parents_stride = 0 if parents.dim() == 1 else parents.stride(0)
    strides = [0 if tensor is None or tensor.dim() == 0 else tensor.stride(0) for tensor in
               (*sampling_tensors, *draft_sampling_tensors)]  # fmt: skip
    _prepare_kernel[(batch,)](
        tokens, parents, uniforms, target_rows, draft_rows, *sampling_tensors, *draft_sampling_tensors, links, settings,
        *outputs, parents_stride, *strides, *sampling, *draft_sampling,
        nodes=nodes,
        target_row_count=target_logits.shape[0],
        draft_row_count=0 if draft_logits is None else draft_logits.shape[0],
        width=width,
        DISTINCT=proposal in ("point", "greedy"),
        HAS_DRAFT=draft_logits is not None,
        VOCAB=vocab,
        BLOCK=min(64, triton.next_power_of_2(nodes + 2)),
        num_warps=4,
        **_OPTIONS,
    )  # fmt: skip
    kernel, frames = _recursive_kernel, {}
    if rule == "traversal":
        kernel = _traversal_kernel
        frames = {"frames_ptr": new(batch, nodes, _FRAME.value, dtype=torch.float64)}
    kernel[(batch,)](
        target_logits_ptr=target_logits,
        draft_logits_ptr=draft_logits,
        target_rows_ptr=target_rows,
        draft_rows_ptr=draft_rows,
        parents_ptr=parents,
        uniforms_ptr=uniforms,
        links_ptr=links,
        settings_ptr=settings,
        records_ptr=records,
        masses_ptr=masses,
        **frames,
        path_ptr=path,
        length_ptr=length,
        emitted_ptr=emitted,
        status_ptr=status,
        target_stride_batch=0 if target_rows is not None else target_logits.stride(0),
        target_stride_row=target_logits.stride(-2),
        draft_stride_batch=0 if draft_logits is None or draft_rows is not None else draft_logits.stride(0),
        draft_stride_row=0 if draft_logits is None else draft_logits.stride(-2),
        parents_stride_batch=parents_stride,
        nodes=nodes,
        width=width,
        PROPOSAL=proposal,
        HAS_DRAFT=draft_logits is not None,
        TARGET_FILTERS=_filters(sampling, sampling_tensors),
        DRAFT_FILTERS=_filters(draft_sampling, draft_sampling_tensors),
        VOCAB=vocab,
        TILE=launch.tile_blocks,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=launch.num_warps,
        **_OPTIONS,
    )
    return outputs


def _filters(numbers: list[float], tensors: list[torch.Tensor | None]) -> bool:
    """Whether a request may have a filter."""
    _, top_k, top_p, min_p = numbers
    return any(tensor is not None for tensor in tensors[1:]) or top_k > 0 or top_p < 1 or min_p > 0


# ---- what a call must move


def prepare_bytes(batch: int, nodes: int, width: int, index_bytes: int = 8) -> int:
    """Bytes that `_prepare_kernel` reads and writes: the small inputs, the links and settings, the cleared outputs.

    Args:
        batch, nodes, width: of the call; width is max_depth + 1.
        index_bytes: of an entry of tokens and parents.
    """
    read = nodes * 2 * index_bytes + (nodes + 2) * 4
    written = nodes * _LINKS.value * 4 + _SETTINGS.value * 8 + width * (4 + 8) + 8
    return batch * (read + written)


def walk_bytes(target_passes: int, draft_passes: int, vocab: int, logit_bytes: int) -> int:
    """Bytes that a walk reads from rows, all else being small beside them.

    A row that is entered is measured in two passes (its largest logit; the sum), a filter adds a few. Each mass of
    (p - beta q)_+ is one pass over both rows, one of p or q alone a pass over that row. The rows fit the L2 cache, so
    the floor from memory is one pass a row.

    Args:
        target_passes, draft_passes: over rows of each side, summed over the requests.
        vocab: tokens in a row.
        logit_bytes: 2 or 4.
    """
    return (target_passes + draft_passes) * vocab * logit_bytes
