"""`verify` in Triton: the scalar programs of `_rules` as one state machine, and two schedules that run it.

Walk: one program a request visits only the rows on its own way through the tree; every pass over a row is its own.

Split: the rows of all nodes are measured first, and then swept in waves; the walk that follows finds statistics and
masses in memory and computes scalars only. A sweep is the pass over two rows that follows a candidate's rejection: the
masses of (p - ratio q)_+. The scalars of a node after some rejections do not depend on the coins, so a sweep needs
nothing but earlier sweeps: those of the node's earlier candidates and, under `traversal`, whose weights flow down,
those on the way from the root. `_prepare_kernel` counts them: that is the sweep's wave. There is one launch a wave;
what exceeds the launch table's number of waves is left to the walk, so the number of launches depends on no data.

Masses are whole numbers and the scalar code is the same, so the answer does not depend on the schedule. Scalars are
float64. Siblings are kept side by side: a node's children stand in draw order at the places from `first` on.
"""

# ruff: noqa: SIM102  a condition that the compiler decides stands apart from one that the kernel decides

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import _sampling_triton as sampling_triton
from ._rows_triton import (
    DRAW_BLOCK,
    EMPTY_ROW,
    LARGEST_VOCAB,
    NAN_ROW,
    blocks_of,
    draw,
    find_law,
    is_spoilt,
    known_mass,
    load_masses,
    mass_outside,
    own_masses,
    probability,
    row_options,
    store_masses,
    store_statistics,
    strike_out,
    total_of,
)
from ._rules import SMALL_DRAFT_MASS
from ._sampling_triton import parameters
from ._schedule import Launch, choose_launch
from .types import PLACEHOLDER, Status

_PLACEHOLDER = tl.constexpr(PLACEHOLDER)
_BAD_TOKEN = tl.constexpr(int(Status.BAD_TOKEN))
_BAD_TREE = tl.constexpr(int(Status.BAD_TREE))
_BAD_UNIFORM = tl.constexpr(int(Status.BAD_UNIFORM))
_BAD_SAMPLING = tl.constexpr(int(Status.BAD_SAMPLING))

# A candidate as the walk sees it: a token, or one of these.
_MISSING = tl.constexpr(-1)
_REPEATED = tl.constexpr(-2)

# [batch, 9, nodes] int32. Of a node: the place of its first child, the number of its children (0 for a leaf), its own
# place, the wave of the sweep that follows its rejection, and the ancestor up to which the wave has been counted. Of a
# place: the node, the candidate, and the candidate again if its rejection counts. Of a node, where some nodes were
# chosen: the number of its children that were drawn.
_LINKS = tl.constexpr(9)
_FIRST, _COUNT, _PLACE, _WAVE, _ANCESTOR, _NODE, _CANDIDATE, _TRIED, _DRAWN = (tl.constexpr(i) for i in range(9))

# [batch, nodes, sides, 8] f64, target and then draft: a row's numbers; its status bits; and of a draft row under
# "greedy", 1 / (mass outside the most probable siblings), 0 where nothing is left or none was drawn. A row that came as
# a law has no numbers.
_RECORD = tl.constexpr(8)
_BITS, _INVERSE_MASS = tl.constexpr(5), tl.constexpr(6)

# [batch, nodes, 8] f64: the scalars of a node's parent when the node is tested, `tested` and `swept` last.
_FRAME = tl.constexpr(8)

_SMALL_DRAFT_MASS = tl.constexpr(SMALL_DRAFT_MASS)
_NO_WEIGHT = tl.constexpr(1e-30)
_LARGEST_RATIO = tl.constexpr(3.0e38)

# States of the walk.
_ENTER, _TEST, _REJECTED, _STOP, _DONE = (tl.constexpr(i) for i in range(5))


# ---- what the host hands over


@triton.jit(do_not_specialize=["nodes", "target_row_count", "draft_row_count", "width"])
def _prepare_kernel(
    tokens_ptr,  # [batch, nodes] i32 or i64
    parents_ptr,  # [nodes] or [batch, nodes] i32 or i64
    uniforms_ptr,  # [batch, nodes + 2] f32
    points_ptr,  # [nodes] or [batch, nodes] u8; None: no node was chosen
    target,  # tuple: `_side`
    draft,  # the same; of no use without HAS_DRAFT
    links_ptr,  # out: [batch, 9, nodes] i32
    path_ptr,  # out: [batch, width] i32, -1 after a root that stays
    length_ptr,  # out: [batch] i32, 1
    emitted_ptr,  # out: [batch, width] i64, -1 after a placeholder
    status_ptr,  # out: [batch] i32, the bits that need no row
    parents_stride_batch,
    points_stride_batch,
    sampling,  # tuple: `_sampling_triton.arguments`
    draft_sampling,  # the same
    nodes,
    target_row_count,
    draft_row_count,
    width,
    PROPOSAL: tl.constexpr,
    RULE: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    WAVES: tl.constexpr,  # whether rejections are sorted into waves
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,  # nodes at once
):
    """One request's links and early status; grid (batch,).

    A node's children are those whose parent it is; comparing all pairs of nodes in tiles needs no order. They stand in
    draw order, the drawn ones before the chosen ones; but under "greedy" the one that was drawn from the rest, the last
    of the drawn ones, stands last of all: what is offered a share of p stands side by side.
    """
    request = tl.program_id(0)
    tokens_ptr += request.to(tl.int64) * nodes
    parents_ptr += request.to(tl.int64) * parents_stride_batch
    uniforms_ptr += request.to(tl.int64) * (nodes + 2)
    links_ptr += request.to(tl.int64) * _LINKS * nodes
    HAS_POINTS: tl.constexpr = points_ptr is not None
    if HAS_POINTS:
        points_ptr += request.to(tl.int64) * points_stride_batch

    bad_tree = (tl.load(parents_ptr) != -1).to(tl.int32)
    bad_token = bad_tree * 0
    bad_uniform = bad_tree * 0
    for start in range(0, nodes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < nodes
        later = inside & (i > 0)
        parent = _as_parent(tl.load(parents_ptr + i, mask=inside, other=-1))
        token = tl.load(tokens_ptr + i, mask=inside, other=-1)
        child = later & (parent != -1)
        stray = child & ((parent < 0) | (parent >= i))
        grandparent = tl.load(parents_ptr + parent, mask=child & (stray == 0), other=0)
        stray = stray | (child & (parent > 0) & (grandparent == -1))
        drawn = (token >= 0) & (token < VOCAB)
        bad_token = tl.maximum(bad_token, tl.max((child & (drawn == 0) & (token != -1)).to(tl.int32), 0))

        first = tl.zeros([BLOCK], tl.int32)
        count = tl.zeros([BLOCK], tl.int32)
        some = tl.zeros([BLOCK], tl.int32)
        place = tl.zeros([BLOCK], tl.int32)
        rank = tl.zeros([BLOCK], tl.int32)
        after = tl.zeros([BLOCK], tl.int32)
        repeated = tl.zeros([BLOCK], tl.int32)
        if HAS_POINTS:
            chosen = child & (tl.load(points_ptr + i, mask=inside, other=0) != 0)
            drawn_below = tl.zeros([BLOCK], tl.int32)
            drawn_beside = tl.zeros([BLOCK], tl.int32)
            chosen_beside = tl.zeros([BLOCK], tl.int32)
            last_drawn = tl.full([BLOCK], -1, tl.int32)
        for other_start in range(0, nodes, BLOCK):
            j = other_start + tl.arange(0, BLOCK)
            other_parent = _as_parent(tl.load(parents_ptr + j, mask=(j > 0) & (j < nodes), other=-1))[None, :]
            other_token = tl.load(tokens_ptr + j, mask=j < nodes, other=-1)[None, :]
            other_drawn = (other_token >= 0) & (other_token < VOCAB)
            below = other_parent == i[:, None]
            beside = (other_parent == parent[:, None]) & child[:, None]
            earlier = beside & (j[None, :] < i[:, None])
            follows = beside & (j[None, :] > i[:, None])
            same = earlier & (other_token == token[:, None])
            if HAS_POINTS:
                other_chosen = (tl.load(points_ptr + j, mask=j < nodes, other=0) != 0)[None, :]
                other_drew = beside & (other_chosen == 0)
                drawn_below += tl.sum((below & (other_chosen == 0)).to(tl.int32), 1)
                drawn_beside += tl.sum(other_drew.to(tl.int32), 1)
                chosen_beside += tl.sum((beside & other_chosen).to(tl.int32), 1)
                last_drawn = tl.maximum(last_drawn, tl.max(tl.where(other_drew, j[None, :], -1), 1))
                alike = other_chosen == chosen[:, None]
                follows = follows & alike
                same = same & alike
                if PROPOSAL == "greedy":
                    same = same | (other_drew & chosen[:, None] & (other_token == token[:, None]))
                earlier = (earlier & alike) | (other_drew & chosen[:, None])
            first += tl.sum(((other_parent >= 0) & (other_parent < i[:, None])).to(tl.int32), 1)
            count += tl.sum(below.to(tl.int32), 1)
            some += tl.sum((below & other_drawn).to(tl.int32), 1)
            place += tl.sum(((other_parent >= 0) & (other_parent < parent[:, None])).to(tl.int32), 1)
            rank += tl.sum(earlier.to(tl.int32), 1)
            after += tl.sum(follows.to(tl.int32), 1)
            repeated += tl.sum(same.to(tl.int32), 1)
        target_rows_ptr = target[1]
        if target_rows_ptr is not None:
            used = child | (i == 0)
            row = tl.load(target_rows_ptr + request.to(tl.int64) * nodes + i, mask=used, other=0)
            stray = stray | (used & ((row < -1) | (row >= target_row_count) | ((row < 0) & (i == 0))))
            some = tl.where(row < 0, 0, some)  # a virtual node is a leaf
        if HAS_DRAFT:
            draft_rows_ptr = draft[1]
            if draft_rows_ptr is not None:
                inner = inside & (some > 0)
                row = tl.load(draft_rows_ptr + request.to(tl.int64) * nodes + i, mask=inner, other=0)
                stray = stray | (inner & ((row < 0) | (row >= draft_row_count)))

        # how many sweeps come between the parent's entry and the node's own
        own = tl.where(after > 0, 1, 0) if PROPOSAL == "greedy" else rank
        offered = drawn
        if HAS_POINTS:
            if PROPOSAL == "greedy":
                own = tl.where(chosen, 1, own)
                rank += tl.where(i == last_drawn, chosen_beside, 0) - (chosen & (last_drawn >= 0)).to(tl.int32)
                last_token = tl.load(tokens_ptr + last_drawn, mask=chosen & (last_drawn >= 0), other=-1)
                repeated -= (chosen & drawn & (last_token == token)).to(tl.int32)
            else:
                own = tl.where(chosen, tl.maximum(drawn_beside, 1), own)
                offered = drawn & chosen
            tl.store(links_ptr + nodes * _DRAWN + i, drawn_below, mask=inside)
        candidate = tl.where(drawn, token.to(tl.int32), _MISSING)
        if PROPOSAL == "point" or PROPOSAL == "greedy" or HAS_POINTS:
            candidate = tl.where(offered & (repeated > 0), _REPEATED, candidate)
        place += rank
        tl.store(links_ptr + nodes * _FIRST + i, first, mask=inside)
        tl.store(links_ptr + nodes * _COUNT + i, tl.where(some > 0, count, 0), mask=inside)
        tl.store(links_ptr + nodes * _PLACE + i, place, mask=inside)
        tl.store(links_ptr + nodes * _NODE + place, i, mask=child)
        tl.store(links_ptr + nodes * _CANDIDATE + place, candidate, mask=child)
        tl.store(links_ptr + nodes * _TRIED + place, candidate, mask=child)
        if WAVES:
            tl.store(links_ptr + nodes * _WAVE + i, tl.where(child, own, 0), mask=inside)
            tl.store(links_ptr + nodes * _ANCESTOR + i, tl.where(child & (stray == 0), parent, 0), mask=inside)

        bad_tree = tl.maximum(bad_tree, tl.max(stray.to(tl.int32), 0))

    if WAVES and RULE == "traversal":
        _count_waves(links_ptr + nodes * _WAVE, links_ptr + nodes * _ANCESTOR, nodes, BLOCK)

    for start in range(0, nodes + 2, BLOCK):
        i = start + tl.arange(0, BLOCK)
        u = tl.load(uniforms_ptr + i, mask=i < nodes + 2, other=0.0)
        bad_uniform = tl.maximum(bad_uniform, tl.max(tl.where((u >= 0) & (u < 1), 0, 1), 0))
    _, _, _, _, sound = parameters(sampling, request.to(tl.int64), VOCAB)
    if HAS_DRAFT:
        _, _, _, _, draft_sound = parameters(draft_sampling, request.to(tl.int64), COLUMNS)
        sound = sound & draft_sound

    # a tree that is none has no candidates to speak of
    status = tl.where(bad_tree > 0, _BAD_TREE, bad_token * _BAD_TOKEN)
    status = status | (bad_uniform * _BAD_UNIFORM) | tl.where(sound, 0, _BAD_SAMPLING)
    tl.store(status_ptr + request, status)
    tl.store(length_ptr + request, 1)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = request.to(tl.int64) * width + i
        tl.store(path_ptr + at, tl.where(i == 0, 0, -1), mask=i < width)
        tl.store(emitted_ptr + at, tl.where(i == 0, _PLACEHOLDER, -1).to(tl.int64), mask=i < width)


@triton.jit
def _as_parent(number):
    """int32, of an int64 too large for it one that is as wrong."""
    return tl.minimum(tl.maximum(number, -2), 1 << 30).to(tl.int32)


@triton.jit
def _count_waves(
    wave_ptr,  # [nodes] i32, in, out: of one step to the ancestor; of the whole way from the root
    ancestor_ptr,  # [nodes] i32, in, out: the parent; the root
    nodes,
    BLOCK: tl.constexpr,
):
    """Sum the waves on the way from the root to each node, twice as much of it every round."""
    pending = nodes - 1
    while pending > 0:
        pending = pending * 0
        for start in range(0, nodes, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.debug_barrier()
            ancestor = tl.load(ancestor_ptr + i, mask=i < nodes, other=0)
            wave = tl.load(wave_ptr + i, mask=i < nodes, other=0) + tl.load(wave_ptr + ancestor)
            ancestor = tl.load(ancestor_ptr + ancestor)
            tl.debug_barrier()
            tl.store(wave_ptr + i, wave, mask=i < nodes)
            tl.store(ancestor_ptr + i, ancestor, mask=i < nodes)
            pending = tl.maximum(pending, tl.max(ancestor, 0))


@triton.jit
def _columns_kernel(
    ids_ptr,  # [COLUMNS] i64
    columns_ptr,  # in: -1 everywhere; out: [VOCAB + 2 + 2 COLUMNS] i32, see `_rows_triton`
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which columns of the draft's rows a token has; grid (COLUMNS / BLOCK,).

    The order of a token's columns may differ from call to call; their sum does not, see `laws_at`.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + column, mask=column < COLUMNS, other=-1)
    known = (token >= 0) & (token < VOCAB)
    token = tl.where(known, token, 0).to(tl.int32)
    following = tl.atomic_xchg(columns_ptr + token, column, mask=known)
    tl.store(columns_ptr + VOCAB + 1 + column, following, mask=known)
    tl.store(columns_ptr + VOCAB + 1 + COLUMNS + column, token, mask=known)
    tl.store(columns_ptr + VOCAB + column * 0, 1, mask=known & (following >= 0))
    tl.store(columns_ptr + VOCAB + 1 + 2 * COLUMNS + column * 0, 1, mask=(column < COLUMNS) & (known == 0))


# ---- a node of a request: its rows and its children


@triton.jit
def _pointers(
    side,  # tuple: `_side`
    request,
    node,
    nodes,
):
    """A node's row, as the first entry of a row's tuple; the node has a row."""
    values_ptr, rows_ptr, stride_request, stride_row, words_stride_request, words_stride_node, kind = side
    if rows_ptr is None:
        offset = request.to(tl.int64) * stride_request + node.to(tl.int64) * stride_row
    else:
        offset = tl.load(rows_ptr + request.to(tl.int64) * nodes + node).to(tl.int64) * stride_row
    row_ptr = values_ptr + offset
    words_ptr = row_ptr
    bitmask_ptr = kind[0]
    if bitmask_ptr is not None:
        words_ptr = bitmask_ptr + request.to(tl.int64) * words_stride_request + node.to(tl.int64) * words_stride_node
    return row_ptr, words_ptr


@triton.jit
def _load_numbers(record_ptr, wanted):
    """A row's numbers, from its record; without probability where it is not wanted."""
    scale = tl.load(record_ptr, mask=wanted, other=0.0).to(tl.float32)
    cutoff = tl.load(record_ptr + 1, mask=wanted, other=0.0).to(tl.float32)
    top = tl.load(record_ptr + 2, mask=wanted, other=0.0).to(tl.float32)
    inverse = tl.load(record_ptr + 3, mask=wanted, other=0.0).to(tl.float32)
    only = tl.load(record_ptr + 4, mask=wanted, other=0.0).to(tl.int32)
    return scale, cutoff, top, inverse, only


@triton.jit
def _measure(
    pointers,  # tuple: of one row
    kind,  # tuple
    sampling,  # tuple: `_sampling_triton.arguments`
    request,
    record_ptr,  # [8] f64, written
    statistics_ptr,  # [2, blocks] f32, written
    tokens_ptr,  # i32: a node's candidates, first the most probable ones; None: not of interest
    others,  # how many these are
    drawn,  # int32: the place of the candidate that was drawn from the rest, -1: none was
    FILTERS: tl.constexpr,
    MEASURED: tl.constexpr,
    VOCAB: tl.constexpr,  # of the target
    COLUMNS: tl.constexpr,  # of this row
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,  # of this row
):
    """Write a row's record and statistics; returns its status bits. Of a law that was handed over only the record."""
    laws = kind[2]
    if laws is None:
        scale, top_k, top_p, log_min_p, _ = parameters(sampling, request.to(tl.int64), COLUMNS)
        settings = (scale, top_k, top_p, log_min_p)
        numbers, bits = find_law(pointers, kind, settings, statistics_ptr, FILTERS, MEASURED, COLUMNS, TILE, BLOCKS)
        columns_ptr = kind[1]
        if columns_ptr is not None:
            scale, cutoff, top, inverse, only = numbers
            if (bits == 0) & (tl.load(columns_ptr + VOCAB + 1 + 2 * COLUMNS) >= 0):
                known = known_mass((pointers, kind, numbers), columns_ptr, 0, VOCAB, COLUMNS, TILE)
                inverse = tl.where(known > 0.0, inverse / tl.where(known > 0.0, known, 1.0), 0.0).to(tl.float32)
            numbers = (scale, cutoff, top, inverse, only)
        for i in tl.static_range(5):
            tl.store(record_ptr + i, numbers[i].to(tl.float64))
    else:
        zero = tl.full([], 0.0, tl.float32)
        numbers, bits = (zero, zero, zero, zero, tl.full([], -1, tl.int32)), tl.full([], 0, tl.int32)
    if tokens_ptr is not None:
        inverse_mass = tl.full([], 0.0, tl.float64)
        if (bits == 0) & (tl.load(tokens_ptr + drawn, mask=drawn >= 0, other=_MISSING) != _MISSING):
            inverse_mass += 1.0
            if others > 0:
                row = (pointers, kind, numbers)
                mass = mass_outside(row, statistics_ptr, tokens_ptr, others, VOCAB, COLUMNS, TILE, BLOCKS)
                inverse_mass = tl.where(mass > 0.0, 1.0 / tl.where(mass > 0.0, mass, 1.0), 0.0)
                if laws is not None:
                    bits = tl.where(mass == mass, bits, NAN_ROW)
        tl.store(record_ptr + _INVERSE_MASS, inverse_mass)
    tl.store(record_ptr + _BITS, bits.to(tl.float64))
    tl.debug_barrier()  # the record is the whole program's to read
    return bits


@triton.jit
def _spoilt_candidates(
    p,  # row
    q,  # row; without pointers: there is none
    tokens_ptr,  # [count] i32
    count,
    VOCAB: tl.constexpr,
):
    """NAN_ROW if an entry of a row that came as a law is no probability at a candidate, else 0."""
    bits = count * 0
    p_laws, q_laws = p[1][2], q[1][2]
    for i in range(count):
        x = tl.load(tokens_ptr + i)
        if p_laws is not None:
            at = probability(p, x, VOCAB)
            bits = tl.where((at >= 0.0) & (at < float("inf")), bits, NAN_ROW)
        if q_laws is not None:
            at = probability(q, x, VOCAB)
            bits = tl.where((at >= 0.0) & (at < float("inf")), bits, NAN_ROW)
    return bits


@triton.jit
def _is_virtual(target, request, node, nodes):
    rows_ptr = target[1]
    virtual = node < 0
    if rows_ptr is not None:
        virtual = tl.load(rows_ptr + request.to(tl.int64) * nodes + node) < 0
    return virtual


# ---- the scalar program
#
# state = (w, beta, S, Z, c), letters as in `docs/algorithm.md`; S is S under `recursive`, kappa under `traversal`, and
# what is left where siblings are offered shares of it ("point"; "greedy" after the drawn child). Chosen siblings among
# drawn ones are offered shares of S under `recursive` and of c under `traversal`, which is 1 when their turn comes.


@triton.jit
def _entered(w):
    """The state of a node entered with weight w."""
    one = w * 0.0 + 1.0
    return (w, w * 0.0, one, one, w)


@triton.jit
def _offer(state, px, qx, turn, drawn, PROPOSAL: tl.constexpr, RULE: tl.constexpr, POINTS: tl.constexpr):
    """(scale, mass) of a candidate: it is taken with probability mass / scale, or entered with that weight."""
    w, beta, S, Z, _ = state
    if PROPOSAL == "point":
        scale, mass = S, w * px
    elif PROPOSAL == "greedy":
        # a child drawn from what is as good as nothing (beta = 0) is passed over
        scale, mass = tl.where(turn == 0, qx * beta, S), tl.where((turn == 0) & (beta == 0.0), 0.0, w * px)
    elif RULE == "recursive":
        scale, mass = qx * S, tl.maximum(px - beta * qx, 0.0) * Z
    else:
        scale, mass = qx, S * tl.maximum(w * px - beta * qx, 0.0) * Z
    if POINTS:
        left, share = _chosen_share(state, px, qx, PROPOSAL, RULE)
        chosen = turn >= _first_offer(drawn, PROPOSAL)
        scale, mass = tl.where(chosen, left, scale), tl.where(chosen, share, mass)
    return scale, mass


@triton.jit
def _before_chosen(state, due, PROPOSAL: tl.constexpr, RULE: tl.constexpr):
    """The state in which the first chosen child of drawn ones is tested, if it is `due`."""
    w, beta, S, Z, c = state
    if PROPOSAL != "greedy" and RULE == "traversal":
        c = tl.where(due, 1.0, c)
    return w, beta, S, Z, c


@triton.jit
def _chosen_share(state, px, qx, PROPOSAL: tl.constexpr, RULE: tl.constexpr):
    """(what is left, the share of it) of a chosen sibling of drawn ones."""
    w, beta, S, _, c = state
    left, share = S, tl.maximum(w * px - beta * qx, 0.0)
    if PROPOSAL != "greedy" and RULE == "traversal":
        left, share = c, S * share
    return left, share


@triton.jit
def _first_offer(drawn, PROPOSAL: tl.constexpr):
    """The turn of the first chosen child; "greedy" has a turn for the child drawn from the rest even where none was."""
    return tl.maximum(drawn, 1) if PROPOSAL == "greedy" else drawn


@triton.jit
def _share(scale, mass):
    """The weight min(1, mass / scale) of a child; 0: it is not entered."""
    weight = tl.where(mass >= scale, 1.0, mass / tl.where(scale > 0.0, scale, 1.0))
    return tl.where(mass > scale * _NO_WEIGHT, weight, 0.0)


@triton.jit
def _ratio(w, beta):
    """beta / w, the factor of q in a sweep."""
    return tl.minimum(beta / w, _LARGEST_RATIO).to(tl.float32)


@triton.jit
def _next_beta(state, RULE: tl.constexpr):
    """The beta that a drawn candidate's rejection leads to."""
    _, beta, S, Z, _ = state
    return beta + (S / Z if RULE == "recursive" else 1.0 / (S * Z))


@triton.jit
def _after_drawn(state, total, qx, RULE: tl.constexpr, REPLACED: tl.constexpr):
    """A drawn candidate was rejected, and a sweep at `_next_beta` found the total.

    Returns:
        whether the rejection counts (else the state stays as it is: rounding, or a token that cannot have been drawn);
        the state that follows. Its Z may have to be found afresh, see `mass_outside`.
    """
    w, beta, S, Z, c = state
    next_beta = _next_beta(state, RULE)
    if RULE == "recursive":
        next_S, next_c = total, c
        counts = total > 0.0
    else:
        s = S * w * total
        rest = s + (1.0 - c)  # in this order a small s survives where c is 1
        counts = rest > 0.0
        next_S, next_c = S / tl.where(counts, rest, 1.0), s / tl.where(counts, rest, 1.0)
    next_Z = Z if REPLACED else Z - qx
    return counts, (
        w,
        tl.where(counts, next_beta, beta),
        tl.where(counts, next_S, S),
        tl.where(counts, next_Z, Z),
        tl.where(counts, next_c, c),
    )


@triton.jit
def _offered(p, tokens_ptr, count, VOCAB: tl.constexpr):
    """The mass of p on the first `count` candidates."""
    mass = tl.full([], 0.0, tl.float64)
    for i in range(count):
        mass += probability(p, tl.load(tokens_ptr + i), VOCAB)
    return mass


@triton.jit
def _after_greedy(state, p, tokens_ptr, count, total, VOCAB: tl.constexpr):
    """Under "greedy" the drawn child was rejected, and what is left of p outside the `count` others has mass total.

    Returns:
        whether anything is left (else the rejection is rounding's, and p itself is left); the state that follows.
    """
    w, beta, _, Z, c = state
    left = (1.0 - w) + w * _offered(p, tokens_ptr, count, VOCAB) + w * total
    some = left > 0.0
    return some, (w, tl.where(some, beta, 0.0), tl.where(some, left, 1.0), Z, c)


@triton.jit
def _after_offer(state, px):
    """A sibling was offered its share and refused; returns whether something is left then, and the state."""
    w, beta, S, Z, c = state
    left = S - w * px
    return left > 0.0, (w, beta, tl.where(left > 0.0, left, S), Z, c)


@triton.jit
def _after_chosen(state, px, qx, PROPOSAL: tl.constexpr, RULE: tl.constexpr):
    """The same of a chosen sibling of drawn ones; and the share."""
    w, beta, S, Z, c = state
    left, share = _chosen_share(state, px, qx, PROPOSAL, RULE)
    some = left - share > 0.0
    left = tl.where(some, left - share, left)
    if PROPOSAL == "greedy" or RULE == "recursive":
        S = left
    else:
        c = left
    return some, (w, beta, S, Z, c), share


@triton.jit
def _place_of(turn, first, count, PROPOSAL: tl.constexpr):
    """The place of the child that is tested at a turn: "greedy" tests the drawn child, the last one, first."""
    place = turn
    if PROPOSAL == "greedy":
        place = tl.where(turn == 0, count, turn) - 1
    return first + place


@triton.jit
def _turn_of(place, first, count, drawn, PROPOSAL: tl.constexpr, POINTS: tl.constexpr):
    """The inverse of `_place_of`."""
    turn = place - first
    if PROPOSAL == "greedy":
        is_drawn = turn == count - 1
        if POINTS:
            is_drawn = is_drawn & (drawn > 0)
        turn = tl.where(is_drawn, 0, turn + 1)
    return turn


@triton.jit
def _family(links_ptr, node, nodes, POINTS: tl.constexpr):
    """Of a node's children: the place of the first one, how many there are, how many of them were drawn."""
    first, count = tl.load(links_ptr + nodes * _FIRST + node), tl.load(links_ptr + nodes * _COUNT + node)
    drawn = count
    if POINTS:
        drawn = tl.minimum(tl.load(links_ptr + nodes * _DRAWN + node), count)
    return first, count, drawn


@triton.jit
def _load_frame(frame_ptr):
    w, beta, S = tl.load(frame_ptr), tl.load(frame_ptr + 1), tl.load(frame_ptr + 2)
    return (w, beta, S, tl.load(frame_ptr + 3), tl.load(frame_ptr + 4))


@triton.jit
def _store_frame(frame_ptr, state):
    for i in tl.static_range(5):
        tl.store(frame_ptr + i, state[i])


@triton.jit
def _with_beta(state, beta):
    return (state[0], beta, state[2], state[3], state[4])


@triton.jit
def _with_Z(state, Z):
    return (state[0], state[1], state[2], Z, state[4])


@triton.jit
def _small_draft_mass(kind):
    """Below this, what subtraction left of the draft's mass is summed afresh: always of laws that were handed over."""
    return _SMALL_DRAFT_MASS if kind[2] is None else 2.0


@triton.jit
def _left_masses(
    p, q, statistics_ptr, masses_ptr, ratio, measured, tokens_ptr, without,
    VOCAB: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """[BLOCKS] i64: what a sweep has left of p, or p itself where the ratio is 0, outside the first candidates.

    Args:
        measured: as in `own_masses`.
        without: how many candidates are left out; None: none is.
    """
    laws = p[1][2]
    if laws is None:
        masses = own_masses(p, statistics_ptr, measured, VOCAB, TILE, BLOCKS)
        if q[0] is not None:
            if ratio > 0.0:
                masses = load_masses(masses_ptr, VOCAB, BLOCKS)
    elif q[0] is None:
        masses = own_masses(p, statistics_ptr, measured, VOCAB, TILE, BLOCKS)
    elif ratio > 0.0:
        masses = load_masses(masses_ptr, VOCAB, BLOCKS)
    else:
        masses = own_masses(p, statistics_ptr, measured, VOCAB, TILE, BLOCKS)
    if without is not None:
        masses = strike_out(masses, p, q, ratio, tokens_ptr, without, VOCAB, BLOCKS)
    return masses


# ---- the schedule "split" before its walk


@triton.jit(do_not_specialize=["nodes"])
def _statistics_kernel(
    target,  # tuple: `_side`
    draft,  # the same; of no use without HAS_DRAFT
    parents_ptr,  # [nodes] or [batch, nodes] i32 or i64
    links_ptr,  # [batch, 9, nodes] i32
    statistics_ptr,  # out: [batch, nodes, 2 blocks + 2 draft blocks] f32
    status_ptr,  # [batch] i32
    parents_stride_batch,
    sampling,  # tuple: `_sampling_triton.arguments`
    draft_sampling,  # the same
    nodes,
    PROPOSAL: tl.constexpr,
    POINTS: tl.constexpr,  # some nodes were chosen
    HAS_DRAFT: tl.constexpr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the draft's rows
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,  # draw blocks of a program
):
    """The statistics of every row that a walk may visit, unfiltered; grid (batch * nodes, chunks, sides).

    Of the target's rows that came as laws, the masses of those from which a walk may draw as they are; of the draft's,
    nothing.
    """
    request, node = tl.program_id(0) // nodes, tl.program_id(0) % nodes
    blocks: tl.constexpr = (VOCAB + DRAW_BLOCK - 1) // DRAW_BLOCK
    draft_blocks: tl.constexpr = (COLUMNS + DRAW_BLOCK - 1) // DRAW_BLOCK
    if _is_idle(target, parents_ptr + request.to(tl.int64) * parents_stride_batch, status_ptr, request, node, nodes):
        return
    first = tl.program_id(1) * CHUNK
    last = tl.minimum(first + CHUNK, blocks)
    statistics_ptr += (request * nodes + node).to(tl.int64) * 2 * (blocks + draft_blocks)
    links_ptr += request.to(tl.int64) * _LINKS * nodes
    count = tl.load(links_ptr + nodes * _COUNT + node)
    low = float("-inf")
    if tl.program_id(2) == 0:
        target_kind = target[6]
        laws = target_kind[2]
        pointers = _pointers(target, request, node, nodes)
        if laws is None:
            scale, _, _, _, _ = parameters(sampling, request.to(tl.int64), VOCAB)
            scale = tl.where(scale > 0.0, scale, 1.0)
            store_statistics(pointers, target_kind, scale, low, statistics_ptr, first, last, VOCAB, TILE)
        else:
            if _draws_from_itself(count, PROPOSAL, POINTS):
                masses_ptr = statistics_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
                row, no_row = (pointers, target_kind, None), (None, (None, None, None), None)
                store_masses(row, no_row, 0.0, masses_ptr, first, last, VOCAB, TILE)
    if HAS_DRAFT:
        draft_kind = draft[6]
        draft_laws = draft_kind[2]
        if draft_laws is None:
            if (tl.program_id(2) == 1) & (count > 0):
                last = tl.minimum(first + CHUNK, draft_blocks)
                scale, _, _, _, _ = parameters(draft_sampling, request.to(tl.int64), COLUMNS)
                scale = tl.where(scale > 0.0, scale, 1.0)
                store_statistics(
                    _pointers(draft, request, node, nodes), draft_kind, scale, low, statistics_ptr + blocks * 2,
                    first, last, COLUMNS, TILE,
                )  # fmt: skip


@triton.jit
def _draws_from_itself(count, PROPOSAL: tl.constexpr, POINTS: tl.constexpr):
    """Whether "split" measures a target's row that came as a law: else a sweep's masses are drawn from, as a rule."""
    always: tl.constexpr = PROPOSAL == "point" or PROPOSAL == "greedy" or POINTS
    return (count == 0) | always


@triton.jit
def _is_idle(target, parents_ptr, status_ptr, request, node, nodes):
    """Whether the request is refused, or the node has no row."""
    refused = tl.load(status_ptr + request) & (_BAD_TREE | _BAD_UNIFORM | _BAD_SAMPLING)
    padding = (node > 0) & (tl.load(parents_ptr + node) == -1)
    return (refused != 0) | padding | _is_virtual(target, request, node, nodes)


@triton.jit(do_not_specialize=["nodes"])
def _records_kernel(
    target,  # tuple: `_side`
    draft,  # the same; of no use without HAS_DRAFT
    parents_ptr,  # [nodes] or [batch, nodes] i32 or i64
    links_ptr,  # [batch, 9, nodes] i32
    records_ptr,  # out: [batch, nodes, sides, 8] f64
    statistics_ptr,  # in, out: [batch, nodes, 2 blocks + 2 draft blocks] f32; out: of what the filters keep
    status_ptr,  # [batch] i32
    parents_stride_batch,
    sampling,  # tuple: `_sampling_triton.arguments`
    draft_sampling,  # the same
    nodes,
    PROPOSAL: tl.constexpr,
    POINTS: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    TARGET_FILTERS: tl.constexpr,
    DRAFT_FILTERS: tl.constexpr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    DRAFT_BLOCKS: tl.constexpr,
):
    """The records of those rows; grid (batch * nodes, sides)."""
    request, node = tl.program_id(0) // nodes, tl.program_id(0) % nodes
    blocks: tl.constexpr = (VOCAB + DRAW_BLOCK - 1) // DRAW_BLOCK
    draft_blocks: tl.constexpr = (COLUMNS + DRAW_BLOCK - 1) // DRAW_BLOCK
    if _is_idle(target, parents_ptr + request.to(tl.int64) * parents_stride_batch, status_ptr, request, node, nodes):
        return
    row = (request * nodes + node).to(tl.int64)
    record_ptr = records_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * _RECORD
    statistics_ptr += row * 2 * (blocks + draft_blocks)
    if tl.program_id(1) == 0:
        _measure(
            _pointers(target, request, node, nodes), target[6], sampling, request, record_ptr, statistics_ptr,
            None, 0, 0, TARGET_FILTERS, True, VOCAB, VOCAB, TILE, BLOCKS,
        )  # fmt: skip
    if HAS_DRAFT:
        links_ptr += request.to(tl.int64) * _LINKS * nodes
        first, count, drawn = _family(links_ptr, node, nodes, POINTS)
        if (tl.program_id(1) == 1) & (count > 0):
            tokens_ptr = links_ptr + nodes * _CANDIDATE + first
            _measure(
                _pointers(draft, request, node, nodes), draft[6], draft_sampling, request, record_ptr,
                statistics_ptr + blocks * 2, tokens_ptr if PROPOSAL == "greedy" else None, drawn - 1,
                tl.where(drawn > 0, count, 0) - 1, DRAFT_FILTERS, True, VOCAB, COLUMNS, TILE, DRAFT_BLOCKS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["nodes", "wave"])
def _sweep_kernel(
    target,  # tuple: `_side`
    draft,  # tuple
    parents_ptr,  # [nodes] or [batch, nodes] i32 or i64
    links_ptr,  # in, out: [batch, 9, nodes] i32
    records_ptr,  # [batch, nodes, 2, 8] f64
    statistics_ptr,  # [batch, nodes, 2 blocks + 2 draft blocks] f32
    masses_ptr,  # in, out: [batch, nodes, blocks] i64
    frames_ptr,  # in, out: [batch, nodes, 8] f64
    status_ptr,  # [batch] i32
    parents_stride_batch,
    nodes,
    wave,
    PROPOSAL: tl.constexpr,
    RULE: tl.constexpr,
    POINTS: tl.constexpr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    DRAFT_BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,  # draw blocks of a program
):
    """Sweep after the rejection of every node of a wave; grid (batch * nodes, chunks).

    The state in which a node is tested follows from its elder sibling's frame and masses, of an earlier wave. The child
    that is tested first has no elder: then the way goes up to an ancestor that has one, or to a child of the root, and
    down again from first child to first child. A chosen node is never swept, but leaves a frame under `traversal`;
    where no sibling was drawn, its state follows from its parent's frame, of an earlier wave too.
    """
    request, node = tl.program_id(0) // nodes, tl.program_id(0) % nodes
    parents_ptr += request.to(tl.int64) * parents_stride_batch
    links_ptr += request.to(tl.int64) * _LINKS * nodes
    refused = tl.load(status_ptr + request) & (_BAD_TREE | _BAD_UNIFORM | _BAD_SAMPLING)
    above = tl.load(parents_ptr + node).to(tl.int32)
    if (refused != 0) | (above < 0) | (tl.load(links_ptr + nodes * _WAVE + node) != wave):
        return
    blocks: tl.constexpr = (VOCAB + DRAW_BLOCK - 1) // DRAW_BLOCK
    row_statistics: tl.constexpr = 2 * (blocks + (COLUMNS + DRAW_BLOCK - 1) // DRAW_BLOCK)
    target_kind, draft_kind = target[6], draft[6]
    records_ptr += request.to(tl.int64) * nodes * 2 * _RECORD
    statistics_ptr += request.to(tl.int64) * nodes * row_statistics
    masses_ptr += request.to(tl.int64) * nodes * blocks
    frames_ptr += request.to(tl.int64) * nodes * _FRAME
    at = node
    first, count, drawn = _family(links_ptr, above, nodes, POINTS)
    turn = _turn_of(tl.load(links_ptr + nodes * _PLACE + at), first, count, drawn, PROPOSAL, POINTS)
    alive = count > 0
    if RULE == "recursive" or not POINTS:
        # the others' rejections need no sweep
        if PROPOSAL == "greedy":
            alive = alive & (turn == 0)
        elif POINTS:
            alive = alive & (turn < drawn)
    if RULE == "traversal":
        while alive & (turn == 0) & (above > 0) & (drawn > 0):
            at = above
            above = tl.load(parents_ptr + at).to(tl.int32)
            first, count, drawn = _family(links_ptr, above, nodes, POINTS)
            turn = _turn_of(tl.load(links_ptr + nodes * _PLACE + at), first, count, drawn, PROPOSAL, POINTS)
            alive = count > 0
    if not alive:
        return

    record_ptr = records_ptr + above * 2 * _RECORD
    p = (_pointers(target, request, above, nodes), target_kind, _load_numbers(record_ptr, True))
    q = (_pointers(draft, request, above, nodes), draft_kind, _load_numbers(record_ptr + _RECORD, True))
    inverse_mass_ptr = records_ptr + _RECORD + _INVERSE_MASS
    tokens_ptr = links_ptr + nodes * _CANDIDATE + first
    p_statistics_ptr = statistics_ptr + above * row_statistics
    state = _entered(tl.full([], 1.0, tl.float64))
    if POINTS and RULE == "traversal":
        if (drawn == 0) & (above > 0):
            parent = tl.load(parents_ptr + above).to(tl.int32)
            parent_first, parent_count, parent_drawn = _family(links_ptr, parent, nodes, POINTS)
            place = tl.load(links_ptr + nodes * _PLACE + above)
            parent_turn = _turn_of(place, parent_first, parent_count, parent_drawn, PROPOSAL, POINTS)
            x = tl.load(links_ptr + nodes * _CANDIDATE + place)
            record_ptr = records_ptr + parent * 2 * _RECORD
            parent_p = (_pointers(target, request, parent, nodes), target_kind, _load_numbers(record_ptr, True))
            parent_q = (_pointers(draft, request, parent, nodes), draft_kind, _load_numbers(record_ptr + _RECORD, True))
            scale, mass = _offer(
                _load_frame(frames_ptr + above * _FRAME),
                probability(parent_p, x, VOCAB), probability(parent_q, x, VOCAB),
                parent_turn, parent_drawn, PROPOSAL, RULE, POINTS,
            )  # fmt: skip
            state = _entered(tl.where(x >= 0, _share(scale, mass), 0.0))
            alive = state[0] > 0.0
    if PROPOSAL == "greedy":
        if (RULE == "recursive") | (turn == 0):
            state = _with_beta(state, tl.load(inverse_mass_ptr + above * 2 * _RECORD))
        else:
            swept_ptr, ratio = masses_ptr, tl.full([], 0.0, tl.float32)
            if drawn > 0:
                drawn_node = tl.load(links_ptr + nodes * _NODE + first + count - 1)
                state = _load_frame(frames_ptr + drawn_node * _FRAME)
                swept_ptr, ratio = masses_ptr + drawn_node * blocks, _ratio(state[0], state[1])
            tops = tl.maximum(drawn - 1, 0)
            masses = _left_masses(
                p, q, p_statistics_ptr, swept_ptr, ratio, True, tokens_ptr, tops, VOCAB, TILE, BLOCKS
            )  # fmt: skip
            _, state = _after_greedy(state, p, tokens_ptr, tops, total_of(masses), VOCAB)
            for i in range(tl.minimum(turn - 1, tops)):
                _, state = _after_offer(state, probability(p, tl.load(tokens_ptr + i), VOCAB))
    elif (turn > 0) & (drawn > 0):
        elder_turn = tl.minimum(turn, drawn) - 1
        elder = tl.load(links_ptr + nodes * _NODE + first + elder_turn)
        x = tl.load(tokens_ptr + elder_turn)
        state = _load_frame(frames_ptr + elder * _FRAME)
        if (x >= 0) & (state[3] > 0.0):  # with nothing left to draw it had no turn
            total = total_of(load_masses(masses_ptr + elder * blocks, VOCAB, BLOCKS))
            counts, state = _after_drawn(state, total, probability(q, x, VOCAB), RULE, PROPOSAL == "with_replacement")
            if counts:
                if PROPOSAL == "without_replacement":
                    if (state[3] < _small_draft_mass(draft_kind)) & (turn < drawn):
                        q_statistics_ptr = p_statistics_ptr + blocks * 2
                        tried_ptr = links_ptr + nodes * _TRIED + first
                        Z = mass_outside(
                            q, q_statistics_ptr, tried_ptr, turn, VOCAB, COLUMNS, TILE, DRAFT_BLOCKS
                        )  # fmt: skip
                        state = _with_Z(state, Z)
            elif tl.program_id(1) == 0:
                tl.store(links_ptr + nodes * _TRIED + first + elder_turn, _MISSING)
    if POINTS and RULE == "traversal":
        state = _before_chosen(state, turn >= drawn, PROPOSAL, RULE)
        offered = _first_offer(drawn, PROPOSAL)
        for i in range(offered, turn):
            x = tl.load(links_ptr + nodes * _CANDIDATE + _place_of(i, first, count, PROPOSAL))
            _, state, _ = _after_chosen(state, probability(p, x, VOCAB), probability(q, x, VOCAB), PROPOSAL, RULE)

    if RULE == "traversal":
        while alive & (at != node):
            x = tl.load(links_ptr + nodes * _CANDIDATE + tl.load(links_ptr + nodes * _PLACE + at))
            record_ptr = records_ptr + above * 2 * _RECORD
            above_p = (_pointers(target, request, above, nodes), target_kind, _load_numbers(record_ptr, True))
            above_q = (_pointers(draft, request, above, nodes), draft_kind, _load_numbers(record_ptr + _RECORD, True))
            scale, mass = _offer(
                state, probability(above_p, x, VOCAB), probability(above_q, x, VOCAB), turn, drawn,
                PROPOSAL, RULE, POINTS,
            )  # fmt: skip
            state = _entered(tl.where(x >= 0, _share(scale, mass), 0.0))
            alive = state[0] > 0.0
            above, turn = at, turn * 0
            first, count, drawn = _family(links_ptr, above, nodes, POINTS)
            at = tl.load(links_ptr + nodes * _NODE + _place_of(turn, first, count, PROPOSAL))
            if PROPOSAL == "greedy":
                state = _with_beta(state, tl.load(inverse_mass_ptr + above * 2 * _RECORD))

    if tl.program_id(1) == 0:
        _store_frame(frames_ptr + node * _FRAME, state)
    if PROPOSAL == "greedy":
        ratio = _ratio(state[0], state[1])
        wanted = (state[0] > 0.0) & (ratio > 0.0)
        if POINTS:
            wanted = wanted & (turn == 0)
    else:
        x = tl.load(links_ptr + nodes * _CANDIDATE + tl.load(links_ptr + nodes * _PLACE + node))
        ratio = _ratio(state[0], _next_beta(state, RULE))
        wanted = (state[0] > 0.0) & (state[3] > 0.0) & (x >= 0)
        if POINTS:
            wanted = wanted & (turn < drawn)
    if wanted:
        start = tl.program_id(1) * CHUNK
        last = tl.minimum(start + CHUNK, blocks)
        above = tl.load(parents_ptr + node).to(tl.int32)
        record_ptr = records_ptr + above * 2 * _RECORD
        p = (_pointers(target, request, above, nodes), target_kind, _load_numbers(record_ptr, True))
        q = (_pointers(draft, request, above, nodes), draft_kind, _load_numbers(record_ptr + _RECORD, True))
        store_masses(p, q, ratio, masses_ptr + node * blocks, start, last, VOCAB, TILE)


# ---- the walk


@triton.jit
def _emit(
    node, depth, token, bits, request, parents_ptr, tokens_ptr, path_ptr, length_ptr, emitted_ptr, status_ptr, width
):  # fmt: skip
    """Write a request's answer: the path down to `node`, and the last token."""
    out = request.to(tl.int64) * width
    tl.store(length_ptr + request, depth + 1)
    tl.store(emitted_ptr + out + depth, token.to(tl.int64))
    tl.store(status_ptr + request, tl.load(status_ptr + request) | bits)
    while depth > 0:
        tl.store(path_ptr + out + depth, node)
        tl.store(emitted_ptr + out + depth - 1, tl.load(tokens_ptr + node).to(tl.int64))
        node = tl.load(parents_ptr + node).to(tl.int32)
        depth -= 1


@triton.jit(do_not_specialize=["nodes", "width", "waves"])
def _walk_kernel(
    target,  # tuple: `_side`
    draft,  # the same; of no use without HAS_DRAFT
    tokens_ptr,  # [batch, nodes] i32 or i64
    parents_ptr,  # [nodes] or [batch, nodes] i32 or i64
    uniforms_ptr,  # [batch, nodes + 2] f32
    links_ptr,  # in, out: [batch, 9, nodes] i32
    records_ptr,  # [batch, nodes, sides, 8] f64; SPLIT: in, else scratch; so are the next two
    statistics_ptr,  # [batch, nodes, 2 blocks + 2 draft blocks] f32
    masses_ptr,  # [batch, nodes, blocks] i64; without a draft there are none
    frames_ptr,  # scratch: [batch, nodes, 8] f64
    path_ptr,  # out: [batch, width] i32
    length_ptr,  # out: [batch] i32
    emitted_ptr,  # out: [batch, width] i64
    status_ptr,  # in, out: [batch] i32
    parents_stride_batch,
    sampling,  # tuple: `_sampling_triton.arguments`
    draft_sampling,  # the same
    nodes,
    width,
    waves,  # SPLIT: the first so many are done
    PROPOSAL: tl.constexpr,
    RULE: tl.constexpr,
    POINTS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    TARGET_FILTERS: tl.constexpr,
    DRAFT_FILTERS: tl.constexpr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    DRAFT_BLOCKS: tl.constexpr,
):
    """One program a request; grid (batch,).

    The tree is its own stack: under `traversal` a node that fails goes back to its parent, whose scalars wait in the
    node's frame. `turn` counts the node's children under test; `swept` is the child whose sweep the masses are from of
    what is left of p, or -1: p itself is left; `tested` is the last child that was offered a share, or -1.

    Rows that came as laws are read where they are needed: single entries at the candidates, both rows in a sweep, p for
    a draw from p itself (at a leaf, or where no rejection was swept), q where its mass outside some tokens is needed.
    """
    OFFERS: tl.constexpr = PROPOSAL == "point" or PROPOSAL == "greedy"
    blocks: tl.constexpr = (VOCAB + DRAW_BLOCK - 1) // DRAW_BLOCK
    row_statistics: tl.constexpr = 2 * (blocks + (COLUMNS + DRAW_BLOCK - 1) // DRAW_BLOCK)
    target_kind = target[6]
    draft_kind = draft[6] if HAS_DRAFT else target_kind
    LAWS: tl.constexpr = target_kind[2] is not None or draft_kind[2] is not None
    request = tl.program_id(0)
    refused = tl.load(status_ptr + request) & (_BAD_TREE | _BAD_UNIFORM | _BAD_SAMPLING)
    if refused != 0:
        return
    tokens_ptr += request.to(tl.int64) * nodes
    parents_ptr += request.to(tl.int64) * parents_stride_batch
    uniforms_ptr += request.to(tl.int64) * (nodes + 2)
    links_ptr += request.to(tl.int64) * _LINKS * nodes
    sides: tl.constexpr = 2 if COLUMNS else 1
    records_ptr += request.to(tl.int64) * nodes * sides * _RECORD
    statistics_ptr += request.to(tl.int64) * nodes * row_statistics
    masses_ptr += request.to(tl.int64) * nodes * blocks
    frames_ptr += request.to(tl.int64) * nodes * _FRAME

    node, depth, bits, token = refused, refused, refused, refused
    turn, swept, tested = refused, refused - 1, refused - 1
    scalars = _entered(tl.full([], 1.0, tl.float64))
    phase = refused + _ENTER
    while phase != _DONE:
        first, children, drawn = _family(links_ptr, node, nodes, POINTS)
        inner = depth < width - 1
        count, drawn = tl.where(inner, children, 0), tl.where(inner, drawn, 0)
        turns = count
        if POINTS and PROPOSAL == "greedy":
            turns += ((count > 0) & (drawn == 0)).to(tl.int32)  # the first one without a child
        candidates_ptr = links_ptr + nodes * _CANDIDATE + first
        record_ptr = records_ptr + node * sides * _RECORD
        p_statistics_ptr = statistics_ptr + node * row_statistics
        q_statistics_ptr = p_statistics_ptr + blocks * 2
        p_pointers = _pointers(target, request, node, nodes)
        q_pointers = p_pointers
        if HAS_DRAFT:
            q_pointers = _pointers(draft, request, node, nodes)

        if phase == _ENTER:
            if SPLIT:
                bits = tl.load(record_ptr + _BITS).to(tl.int32)
                if HAS_DRAFT:
                    draft_bits = tl.load(record_ptr + _RECORD + _BITS, mask=count > 0, other=0.0).to(tl.int32)
                    bits = tl.where(bits == 0, draft_bits, bits)
            else:
                bits = _measure(
                    p_pointers, target_kind, sampling, request, record_ptr, p_statistics_ptr, None, 0, 0,
                    TARGET_FILTERS, False, VOCAB, VOCAB, TILE, BLOCKS,
                )  # fmt: skip
                if HAS_DRAFT:
                    if (bits == 0) & (count > 0):
                        bits = _measure(
                            q_pointers, draft_kind, draft_sampling, request, record_ptr + _RECORD, q_statistics_ptr,
                            candidates_ptr if PROPOSAL == "greedy" else None, drawn - 1,
                            tl.where(drawn > 0, count, 0) - 1, DRAFT_FILTERS, False, VOCAB, COLUMNS, TILE, DRAFT_BLOCKS,
                        )  # fmt: skip
            scalars = _entered(scalars[0])
            turn, swept, tested = turn * 0, turn * 0 - 1, turn * 0 - 1
            if PROPOSAL == "greedy":
                scalars = _with_beta(
                    scalars, tl.load(record_ptr + _RECORD + _INVERSE_MASS, mask=(bits == 0) & (count > 0), other=0.0)
                )
            phase = turn + _TEST
        p = (p_pointers, target_kind, _load_numbers(record_ptr, bits == 0))
        q = (None, (None, None, None), None)
        if HAS_DRAFT:
            q = (q_pointers, draft_kind, _load_numbers(record_ptr + _RECORD, (bits == 0) & (count > 0)))
        if LAWS:
            if (phase == _TEST) & (turn == 0) & (bits == 0):
                bits = _spoilt_candidates(p, q, candidates_ptr, count, VOCAB)
        if bits != 0:
            token = turn * 0 + _PLACEHOLDER
            phase = turn * 0 + _DONE
            if RULE == "traversal":  # nothing is accepted before a node has stopped
                node, depth = turn * 0, turn * 0
        measured = False
        if SPLIT:
            measured = _draws_from_itself(children, PROPOSAL, POINTS)
        # the final draw leaves out the siblings that were offered a share
        offered_ptr, without = candidates_ptr, None
        if PROPOSAL == "point":
            without = count
        elif PROPOSAL == "greedy":
            without = tl.maximum(count - 1, 0)
            if POINTS:
                without = count - (drawn > 0).to(tl.int32)
        elif POINTS:
            offered_ptr, without = candidates_ptr + drawn, count - drawn

        child, x = turn * 0 - 1, turn * 0 - 1
        px, qx = scalars[0] * 0.0, scalars[0] * 0.0
        under_test = ((phase == _TEST) | (phase == _REJECTED)) & (turn < turns)
        if POINTS and PROPOSAL == "greedy":
            under_test = under_test & ((turn > 0) | (drawn > 0))
        if under_test:
            place = _place_of(turn, first, count, PROPOSAL)
            child = tl.load(links_ptr + nodes * _NODE + place)
            x = tl.load(links_ptr + nodes * _CANDIDATE + place)
            px = probability(p, x, VOCAB)
            if HAS_DRAFT:
                qx = probability(q, x, VOCAB)
        chosen, weight = turn * 0 - 1, scalars[0]

        if phase == _TEST:
            phase = turn * 0 + _REJECTED
            if POINTS:
                scalars = _before_chosen(scalars, (turn == drawn) & (drawn < count), PROPOSAL, RULE)
            if turn >= turns:
                phase = turn * 0 + _STOP
            elif x >= 0:
                scale, mass = _offer(scalars, px, qx, turn, drawn, PROPOSAL, RULE, POINTS)
                u = tl.load(uniforms_ptr + child).to(tl.float64)
                if RULE == "recursive":
                    if u * scale < mass:
                        chosen = child
                else:
                    weight = _share(scale, mass)
                    # the row of a leaf that its coin refuses is not looked at
                    leaf = (depth + 2 >= width) | (tl.load(links_ptr + nodes * _COUNT + child) == 0)
                    leaf = leaf | _is_virtual(target, request, child, nodes)
                    if (weight > 0.0) & ((leaf == 0) | (u < weight)):
                        chosen = child

        if POINTS:
            if (phase == _REJECTED) & (chosen < 0) & (turn >= _first_offer(drawn, PROPOSAL)):
                some, scalars, share = _after_chosen(scalars, px, qx, PROPOSAL, RULE)
                tested = tl.where(share > 0.0, child, tested)
                if RULE == "recursive":
                    if (some == 0) & (share > 0.0):
                        chosen = child
                turn += 1
                phase = turn * 0 + _TEST
        if (phase == _REJECTED) & (chosen < 0):
            following = turn + 1
            if OFFERS:
                tested = tl.where(px > 0.0, child, tested)
            if PROPOSAL == "point":
                some, scalars = _after_offer(scalars, px)
                if RULE == "recursive":
                    if (some == 0) & (px > 0.0):
                        chosen = child
            else:
                # one sweep, for a drawn child
                beta = scalars[1]
                wanted = x >= 0
                if PROPOSAL == "greedy":
                    wanted = (turn == 0) & (beta > 0.0)
                else:
                    beta = _next_beta(scalars, RULE)
                ratio = tl.where(wanted, _ratio(scalars[0], beta), 0.0)
                if SPLIT:
                    wanted = wanted & (tl.load(links_ptr + nodes * _WAVE + child, mask=child >= 0, other=0) >= waves)
                if wanted & (ratio > 0.0):
                    store_masses(p, q, ratio, masses_ptr + child * blocks, 0, blocks, VOCAB, TILE)
                    tl.debug_barrier()
                if PROPOSAL == "greedy":
                    if turn == 0:
                        tops = tl.maximum(drawn - 1, 0)
                        masses = _left_masses(
                            p, q, p_statistics_ptr, masses_ptr + tl.maximum(child, 0) * blocks, ratio, measured,
                            candidates_ptr, tops, VOCAB, TILE, BLOCKS,
                        )  # fmt: skip
                        some, scalars = _after_greedy(scalars, p, candidates_ptr, tops, total_of(masses), VOCAB)
                        swept = tl.where((ratio > 0.0) & some, child, -1)
                        if LAWS:
                            bits = tl.where(is_spoilt(masses), NAN_ROW, 0)
                    else:
                        some, scalars = _after_offer(scalars, px)
                    if RULE == "recursive":
                        if (some == 0) & (tested >= 0) & ((turn == 0) | (px > 0.0)):
                            chosen = tested
                elif x >= 0:
                    masses = load_masses(masses_ptr + child * blocks, VOCAB, BLOCKS)
                    if LAWS:
                        bits = tl.where(is_spoilt(masses), NAN_ROW, 0)
                    total = total_of(masses)
                    some, scalars = _after_drawn(scalars, total, qx, RULE, PROPOSAL == "with_replacement")
                    if some:
                        swept = child
                        if PROPOSAL == "without_replacement":
                            if (scalars[3] < _small_draft_mass(draft_kind)) & (following < drawn):
                                Z = mass_outside(
                                    q, q_statistics_ptr, links_ptr + nodes * _TRIED + first, following,
                                    VOCAB, COLUMNS, TILE, DRAFT_BLOCKS,
                                )  # fmt: skip
                                scalars = _with_Z(scalars, Z)
                                following = tl.where(Z > 0.0, following, drawn)
                                if LAWS:
                                    bits = tl.where(Z == Z, bits, NAN_ROW)
                    else:
                        tl.store(links_ptr + nodes * _TRIED + first + turn, _MISSING)
                        tl.debug_barrier()
                        if RULE == "recursive":
                            if px > 0.0:
                                chosen = child
            turn = following
            phase = turn * 0 + _TEST
            if LAWS:
                chosen = tl.where(bits == 0, chosen, -1)

        if phase == _STOP:
            w, beta, S, _, c = scalars
            must = (depth == 0) | (RULE == "recursive")
            u = tl.load(uniforms_ptr + node).to(tl.float64)
            stops = must | (u < c)
            shares = False
            if OFFERS:
                shares = count > 0
            elif POINTS:
                shares = count > drawn
            if stops | shares:
                swept_ptr = masses_ptr + swept * blocks
                ratio = tl.where(swept >= 0, _ratio(w, beta), 0.0)
                masses = _left_masses(
                    p, q, p_statistics_ptr, swept_ptr, ratio, measured, offered_ptr, without, VOCAB, TILE, BLOCKS
                )  # fmt: skip
                total = total_of(masses)
                if shares:
                    if OFFERS or RULE == "recursive":
                        stops = must | (u * S < w * total)
                    else:
                        stops = must | (u * c < S * (w * total))
                if LAWS:
                    spoilt = is_spoilt(masses)
                    bits, stops = tl.where(spoilt, NAN_ROW, bits), stops | spoilt
                    masses, tested = tl.where(spoilt, 0, masses), tl.where(spoilt, -1, tested)
                if stops:
                    if (total <= 0.0) & (tested >= 0):
                        token = tl.load(tokens_ptr + tested).to(tl.int32)
                        if RULE == "recursive":
                            chosen = tested
                    else:
                        u_block, u_place = tl.load(uniforms_ptr + nodes), tl.load(uniforms_ptr + nodes + 1)
                        token = draw(masses, p, q, ratio, offered_ptr, without, u_block, u_place, VOCAB)
                        if LAWS:
                            if token < 0:
                                bits, token = tl.where(bits == 0, EMPTY_ROW, bits), token * 0 + _PLACEHOLDER
                            if RULE == "traversal":  # nothing is accepted before the last token is known
                                node, depth = tl.where(bits == 0, node, 0), tl.where(bits == 0, depth, 0)
                    phase = turn * 0 + _DONE
            if not stops:
                # back to the parent, whose child has failed
                frame_ptr = frames_ptr + node * _FRAME
                scalars = _load_frame(frame_ptr)
                tested = tl.load(frame_ptr + 5).to(tl.int32)
                swept = tl.load(frame_ptr + 6).to(tl.int32)
                place = tl.load(links_ptr + nodes * _PLACE + node)
                node = tl.load(parents_ptr + node).to(tl.int32)
                depth -= 1
                first, count, drawn = _family(links_ptr, node, nodes, POINTS)
                turn = _turn_of(place, first, count, drawn, PROPOSAL, POINTS)
                phase = turn * 0 + _REJECTED

        if chosen >= 0:
            if _is_virtual(target, request, chosen, nodes):
                token = tl.load(tokens_ptr + chosen).to(tl.int32)
                phase = turn * 0 + _DONE
            else:
                if RULE == "traversal":
                    tl.debug_barrier()  # until here the old frame may be read
                    frame_ptr = frames_ptr + chosen * _FRAME
                    _store_frame(frame_ptr, scalars)
                    tl.store(frame_ptr + 5, tested.to(tl.float64))
                    tl.store(frame_ptr + 6, swept.to(tl.float64))
                    tl.debug_barrier()
                    scalars = _entered(weight)
                node = chosen
                depth += 1
                phase = turn * 0 + _ENTER
    _emit(
        node, depth, token, bits, request, parents_ptr, tokens_ptr, path_ptr, length_ptr, emitted_ptr, status_ptr, width
    )  # fmt: skip


# ---- the host's side


def _side(
    values: torch.Tensor,
    rows: torch.Tensor | None,
    laws: bool,
    bitmask: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """One side's rows as one argument of a kernel.

    Args:
        values: `[batch, nodes, vocab]`, or `[rows, vocab]` with a row index.
        rows: `[batch, nodes]` integers or None.
        laws: whether the values are probabilities.
        bitmask: `[batch, nodes, words]` int32 or None.
        columns: what `_columns_kernel` writes, or None.

    Returns:
        the values, the row index, the strides of a request and a row; the strides of a request's and a node's words;
        the kind of the rows, see `_rows_triton`.
    """
    strides = (0, 0) if bitmask is None else bitmask.stride()[:2]
    stride_request = 0 if rows is not None else values.stride(0)
    return values, rows, stride_request, values.stride(-2), *strides, (bitmask, columns, 1 if laws else None)


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
    inputs: str = "logits",
    draft_inputs: str = "logits",
    point_nodes: torch.Tensor | None = None,
    bitmask: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
    *,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator behind `mcsd_kernels.verify`; arguments as there, already checked.

    Args:
        launch: in place of the table's choice; changes no answer.
    """
    batch, nodes = tokens.shape
    vocab, width, device = target_logits.shape[-1], max_depth + 1, target_logits.device
    columns = 0 if draft_logits is None else draft_logits.shape[-1]
    for name, size in (("target_logits", vocab), ("draft_logits", columns)):
        if size > LARGEST_VOCAB:
            raise ValueError(f"{name}: expected a vocabulary of at most {LARGEST_VOCAB} tokens, got {size}")
    launch = launch or choose_launch(batch, nodes, vocab, device)
    tokens, uniforms = tokens.contiguous(), uniforms.contiguous()
    parents = parents if parents.stride(-1) == 1 else parents.contiguous()
    target_rows = None if target_rows is None else target_rows.contiguous()
    draft_rows = None if draft_rows is None else draft_rows.contiguous()
    points = None if point_nodes is None else point_nodes.contiguous().view(torch.uint8)
    if bitmask is not None and bitmask.stride(-1) != 1:
        bitmask = bitmask.contiguous()

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    blocks, draft_blocks = blocks_of(vocab), blocks_of(columns)
    links = new(batch, _LINKS.value, nodes, dtype=torch.int32)
    sides = 1 if draft_logits is None else 2
    records = new(batch, nodes, sides, _RECORD.value, dtype=torch.float64)
    # laws that are handed over leave whole numbers of 64 bits there
    statistics = new(batch, nodes, 2 * blocks + 2 * draft_blocks, dtype=torch.float32)
    masses = new(batch, nodes if sides == 2 else 0, blocks, dtype=torch.int64)
    frames = new(batch, nodes, _FRAME.value, dtype=torch.float64)
    path, length = new(batch, width, dtype=torch.int32), new(batch, dtype=torch.int32)
    emitted, status = new(batch, width, dtype=torch.int64), new(batch, dtype=torch.int32)
    outputs = path, length, emitted, status
    if batch == 0:
        return outputs
    column_map = None
    if draft_logits is not None and draft_ids is not None:
        column_map = torch.full((vocab + 2 + 2 * columns,), -1, dtype=torch.int32, device=device)
    split = launch.schedule == "split"
    waves = min(launch.waves, nodes - 1) if split and proposal != "point" else 0  # "point" needs no sweep
    if proposal == "greedy" and rule == "recursive":
        waves = min(waves, 1)  # one sweep a node
    draft = None
    if draft_logits is not None:
        draft = _side(draft_logits, draft_rows, draft_inputs == "probabilities", columns=column_map)
    common: dict[str, Any] = {
        "target": _side(target_logits, target_rows, inputs == "probabilities", bitmask=bitmask),
        "draft": draft,
        "parents_ptr": parents,
        "links_ptr": links,
        "status_ptr": status,
        "parents_stride_batch": 0 if parents.dim() == 1 else parents.stride(0),
        "nodes": nodes,
        "VOCAB": vocab,
        "COLUMNS": columns,
    }
    program = {"PROPOSAL": proposal, "RULE": rule}
    chosen = {"POINTS": points is not None}
    laws = {
        "sampling": sampling_triton.arguments(sampling, sampling_tensors),
        "draft_sampling": sampling_triton.arguments(draft_sampling, draft_sampling_tensors),
        "HAS_DRAFT": draft_logits is not None,
    }
    filters = {
        "TARGET_FILTERS": sampling_triton.filters(sampling, sampling_tensors, vocab),
        "DRAFT_FILTERS": sampling_triton.filters(draft_sampling, draft_sampling_tensors, columns),
    }
    scratch = {"records_ptr": records, "statistics_ptr": statistics, "masses_ptr": masses, "frames_ptr": frames}
    rows = {"TILE": launch.tile_blocks, **row_options(launch.num_warps)}
    padded = {"BLOCKS": triton.next_power_of_2(blocks), "DRAFT_BLOCKS": triton.next_power_of_2(max(draft_blocks, 1))}
    answer = {
        "tokens_ptr": tokens,
        "uniforms_ptr": uniforms,
        "path_ptr": path,
        "length_ptr": length,
        "emitted_ptr": emitted,
        "width": width,
    }

    if column_map is not None and draft_ids is not None:
        _columns_kernel[(triton.cdiv(columns, 1024),)](
            ids_ptr=draft_ids.contiguous(),
            columns_ptr=column_map,
            VOCAB=vocab,
            COLUMNS=columns,
            BLOCK=1024,
            num_warps=8,
            enable_fp_fusion=False,
        )
    _prepare_kernel[(batch,)](
        points_ptr=points,
        points_stride_batch=0 if points is None or points.dim() == 1 else points.stride(0),
        target_row_count=target_logits.shape[0],
        draft_row_count=0 if draft_logits is None else draft_logits.shape[0],
        WAVES=split and proposal != "point",
        BLOCK=min(64, triton.next_power_of_2(nodes + 2)),
        **row_options(8),
        **common,
        **program,
        **laws,
        **answer,
    )
    if split:
        count, chunks = batch * nodes, triton.cdiv(blocks, launch.chunk_blocks)
        longest = max(chunks, triton.cdiv(draft_blocks, launch.chunk_blocks))
        chunk = {"CHUNK": launch.chunk_blocks, **rows}
        _statistics_kernel[(count, longest, sides)](
            statistics_ptr=statistics, PROPOSAL=proposal, **common, **chosen, **laws, **chunk
        )
        _records_kernel[(count, sides)](
            records_ptr=records,
            statistics_ptr=statistics,
            PROPOSAL=proposal,
            **common,
            **chosen,
            **laws,
            **filters,
            **padded,
            **rows,
        )
        for wave in range(waves):
            _sweep_kernel[(count, chunks)](wave=wave, **common, **program, **chosen, **scratch, **padded, **chunk)
    _walk_kernel[(batch,)](
        waves=waves,
        SPLIT=split,
        **common,
        **program,
        **chosen,
        **laws,
        **filters,
        **scratch,
        **answer,
        **padded,
        **rows,
    )
    return outputs


# ---- what must move: bytes, from memory and to it, of the kernels above


def prepare_bytes(batch: int, nodes: int, width: int, index_bytes: int = 8) -> int:
    """`_prepare_kernel`: the small inputs, the links, the cleared outputs.

    Args:
        batch, nodes, width: of the call; width is max_depth + 1.
        index_bytes: of an entry of tokens and parents.
    """
    read = nodes * 2 * index_bytes + (nodes + 2) * 4
    return batch * (read + nodes * _LINKS.value * 4 + width * (4 + 8) + 8)


def columns_bytes(vocab: int, columns: int) -> int:
    """`_columns_kernel`: the ids, the cleared map of the tokens, two entries a column."""
    return columns * 8 + (vocab + 2 + 2 * columns) * 4


def statistics_bytes(rows: int, vocab: int, logit_bytes: int) -> int:
    """`_statistics_kernel`: every row once, two numbers a draw block."""
    return rows * (vocab * logit_bytes + blocks_of(vocab) * 8)


def records_bytes(rows: int, vocab: int) -> int:
    """`_records_kernel`: the statistics, a record a row. Filters read rows again, which are in the cache by then."""
    return rows * (blocks_of(vocab) * 8 + _RECORD.value * 8)


def sweep_bytes(sweeps: int, vocab: int, logit_bytes: int) -> int:
    """`_sweep_kernel`: two rows and a number a draw block for every rejection that is swept."""
    return sweeps * (2 * vocab * logit_bytes + blocks_of(vocab) * 8)


def walk_bytes(rows: int, batch: int, width: int, vocab: int, logit_bytes: int) -> int:
    """`_walk_kernel` under "walk": the rows it visits, once each, for from then on they are in the cache; the answer.

    Args:
        rows: visited, of both sides, summed over the requests; 0 under "split".
    """
    return rows * vocab * logit_bytes + batch * (width * (4 + 8) + 8)


def verify_bytes(
    rows: int, batch: int, nodes: int, width: int, vocab: int, logit_bytes: int, index_bytes: int = 8
) -> int:
    """The floor of a whole call: each row that has to be read once, the small inputs, the answer; no scratch.

    Args:
        rows: of both sides, summed over the requests: all that a walk may visit under "split", those on the requests'
            own ways under "walk".
    """
    small = nodes * 2 * index_bytes + (nodes + 2) * 4
    return rows * vocab * logit_bytes + batch * (small + width * (4 + 8) + 8)
