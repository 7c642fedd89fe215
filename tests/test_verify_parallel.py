"""`verify` with the vocabulary split over processes: the answer of a single process, on every rank."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
import torch.distributed as dist

from mcsd_kernels import SamplingParams, Status, draw_uniforms, reference, verify

RANKS = 4


def split(rows: torch.Tensor | None, shares: list[int], rank: int) -> torch.Tensor | None:
    """This rank's columns, of which `shares` says how many."""
    return None if rows is None else rows.split(shares, -1)[rank].contiguous()


def shares_of(rng: np.random.Generator, vocab: int, ranks: int) -> list[int]:
    """A random split of the vocabulary, in which a rank may be left with little or nothing."""
    cuts = sorted(rng.integers(0, vocab + 1, ranks - 1).tolist())
    return [b - a for a, b in itertools.pairwise([0, *cuts, vocab])]


def compare(case: cases.Case, shares: list[int], group: Any) -> int:
    """Requests whose answer is not the oracle's, close decisions apart; and every rank must say the same."""
    rank = dist.get_rank(group)
    target, draft, *rest = case.arguments
    got = verify(split(target, shares, rank), split(draft, shares, rank), *rest, **case.options, group=group)
    expected, margin = reference.verify(*case.arguments, **case.options, return_margin=True)
    for part in got:
        everyone = [torch.empty_like(part) for _ in shares]
        dist.all_gather(everyone, part.contiguous(), group=group)
        assert all(torch.equal(part, other) for other in everyone)
    same = torch.ones(len(margin), dtype=torch.bool)
    for a, b in zip(expected, got, strict=True):
        same &= (a == b).reshape(len(margin), -1).all(1)
    return int((~same & (margin > cases.NEAR)).sum())


def masked(case: cases.Case, rng: np.random.Generator) -> cases.Case:
    """The case with random grammar masks."""
    batch, nodes = case.arguments[2].shape
    words = rng.integers(-(2**31), 2**31, (batch, nodes, -(-case.arguments[0].shape[-1] // 32)))
    return cases.Case(case.arguments, case.options | {"bitmask": torch.from_numpy(words).int()}, case.note)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=120))
    pair, everyone = dist.new_group([0, 1]), dist.new_group(list(range(RANKS)))
    for ranks, group in ((2, pair), (4, everyone)):
        if rank >= ranks:
            continue
        wrong = 0
        for seed, (rule, proposal) in enumerate(itertools.product(cases.RULES, cases.PROPOSALS)):
            for again in range(5):
                rng = np.random.default_rng([seed, again, ranks])
                case = cases.random_case(rng, rule=rule, proposal=proposal, faults=again == 4)
                case = masked(case, rng) if again == 3 else case
                vocab = case.arguments[0].shape[-1]
                shares = shares_of(rng, vocab, ranks) if again else [vocab // ranks] * (ranks - 1)
                wrong += compare(case, shares if again else [*shares, vocab - sum(shares)], group)
        assert wrong == 0

    # probabilities, and a mistake that must not leave anybody waiting
    vocab, shares = 2500, [1, 1499, 0, 1000]
    p, q = (torch.softmax(torch.randn(2, 3, vocab, generator=torch.Generator().manual_seed(s)), -1) for s in (1, 2))
    tokens, parents = torch.tensor([[0, 5, 2000], [0, 1, 7]]), torch.tensor([-1, 0, 0])
    rest = (tokens, parents, draw_uniforms(torch.arange(2), 0, 5))
    whole = verify(p, q, *rest, inputs="probabilities")
    mine = [split(x, shares, rank) for x in (p, q)]
    assert torch.equal(verify(*mine, *rest, inputs="probabilities", group=everyone).tokens, whole.tokens)
    with pytest.raises(ValueError, match="tokens, parents, uniforms: expected the same on every rank"):
        verify(*mine, tokens + (rank == 2), *rest[1:], group=everyone)
    with pytest.raises(ValueError, match="bitmask: expected 79 words for all ranks, got 2"):
        verify(*mine, *rest, bitmask=torch.zeros(2, 3, 2, dtype=torch.int32), group=everyone)
    broken = mine[0].clone()
    if rank == 3:
        broken[1] = torch.nan
    assert verify(broken, mine[1], *rest, group=everyone).status.tolist() == [0, Status.NAN_ROW]
    # of logits, +inf is no number either, whoever has it; -inf is a token without mass
    for value, bits in ((torch.inf, [0, Status.NAN_ROW]), (-torch.inf, [0, 0])):
        infinite = mine[0].clone()
        if rank == 1:
            infinite[1, :, 5] = value
        assert verify(infinite, mine[1], *rest, group=everyone).status.tolist() == bits
        root = infinite[:, :1], mine[1][:, :1], tokens[:, :1], parents[:1], rest[2][:, :3].contiguous()
        assert verify(*root, group=everyone).status.tolist() == bits
    # a coin that is no number refuses its own request; and no gradient is wanted of anything
    coins = rest[2].clone()
    coins[1, 2] = torch.nan
    wanting = [part.clone().requires_grad_() for part in mine]
    assert verify(*wanting, tokens, parents, coins, group=everyone).status.tolist() == [0, Status.BAD_UNIFORM]
    dist.destroy_process_group()
    Path(folder, f"done-{rank}").touch()


def test_every_rank_answers_like_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=RANKS)
    assert len(list(tmp_path.glob("done-*"))) == RANKS


@pytest.mark.parametrize("options", [{"draft_ids": torch.arange(4)}, {"backend": "triton"}], ids=["ids", "triton"])
def test_what_a_group_cannot_do_is_refused(options: dict[str, Any]) -> None:
    rows = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match='group: expected None with draft_ids or backend="triton"'):
        verify(
            rows, rows, torch.zeros(1, 2).long(), torch.tensor([-1, 0]), torch.zeros(1, 4),
            sampling=SamplingParams(), group=object(), **options,
        )  # fmt: skip
