"""What `verify` and `draw_candidates` are measured against: in their fastest form at hand, nothing left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from mcsd_kernels import SamplingParams, row_cutoffs

from .plan import FILTERED, SAMPLING, Tree

PROCESSORS = 132  # of an H200
MOST_ROWS = 1 << 40


def flashinfer() -> Any:
    """FlashInfer's sampling module, or None where it cannot be imported."""
    try:
        return importlib.import_module("flashinfer.sampling")
    except Exception:  # a package built for another machine fails in ways of its own
        return None


# ---- (a) the textbook


def law(logits: torch.Tensor, filters: str) -> torch.Tensor:
    """fp32 laws of rows of logits at temperature 1."""
    return top_k_top_p(logits) if filters == FILTERED else torch.softmax(logits, -1, dtype=torch.float32)


def textbook(
    target: torch.Tensor,
    draft: torch.Tensor,
    tokens: torch.Tensor,
    children: torch.Tensor,
    uniforms: torch.Tensor,
    branching: tuple[int, ...],
    filters: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Recursive rejection sampling without replacement as papers state it, for a batch and without a host round trip.

    After a rejection p becomes norm((p - q)_+) and q loses the tried token and is normalised. Only the rows of the
    nodes that are reached are made into laws, which is less than its users do.

    Args:
        target, draft: `[batch, nodes, vocab]`.
        tokens: `[batch, nodes]`.
        children: `[nodes]`, each node's first child; siblings are numbered in a row.
        uniforms: `[batch, nodes + 2]`.
        branching: children of the nodes of each level.
        filters: a name in `plan.SAMPLING`.

    Returns:
        path `[batch, depth + 1]`, -1 after its end; length `[batch]`; the last token `[batch]`.

    Source: Algorithm 2 of Yang et al., arXiv 2401.06706, and of Miao et al., arXiv 2305.09781.
    """
    batch = torch.arange(len(tokens), device=tokens.device)
    node = torch.zeros_like(tokens[:, 0])
    alive = torch.ones_like(node, dtype=torch.bool)
    path, length = [node], torch.ones_like(node)
    p = law(target[batch, node], filters)
    for width in branching:
        q = law(draft[batch, node], filters)
        going, reached = alive, node
        for rank in range(width):
            child = children[node] + rank
            x = tokens.gather(1, child[:, None])
            drawn = going & (x[:, 0] >= 0)
            x = x.clamp(min=0)
            u = uniforms.gather(1, child[:, None])[:, 0]
            take = drawn & (u * q.gather(1, x)[:, 0] < p.gather(1, x)[:, 0])
            reject = drawn & ~take
            reached = torch.where(take, child, reached)
            going = going & ~take
            residual = torch.relu(p - q)
            residual = residual / residual.sum(-1, keepdim=True)
            p = torch.where(reject[:, None], residual, p)
            rest = q.scatter(1, x, 0.0)
            q = torch.where(reject[:, None], rest / rest.sum(-1, keepdim=True), q)
        alive = alive & ~going
        node = reached
        path.append(torch.where(alive, node, -1))
        length = length + alive
        p = torch.where(alive[:, None], law(target[batch, node], filters), p)
    cumulative = p.cumsum(-1)
    threshold = uniforms[:, -1:] * cumulative[:, -1:]
    last = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=p.shape[-1] - 1)
    return torch.stack(path, 1), length, last


def first_children(tree: Tree, device: torch.device) -> torch.Tensor:
    """`[nodes]` int64: each node's first child, 0 for a leaf."""
    children = tree.children()
    return torch.tensor([children.get(node, [0])[0] for node in range(len(tree.parents))], device=device)


def published_walk(target: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, tree: Tree) -> list[int]:
    """The textbook as published, one request, the host deciding: see `bench/rivals.py`."""
    from bench import rivals

    return rivals.textbook_tree(target, draft, tokens, tree.parents)


# ---- (b) the preparation that chain and target-only kernels need


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """fp32 probabilities of rows of logits."""
    return torch.softmax(logits, -1, dtype=torch.float32)


def top_k_top_p(logits: torch.Tensor, k: int = 50, share: float = 0.9) -> torch.Tensor:
    """fp32 probabilities after top-k and top-p, zero elsewhere; only k logits a row are sorted."""
    values, ids = torch.topk(logits, min(k, logits.shape[-1]), dim=-1)
    kept = torch.softmax(values, -1, dtype=torch.float32)
    kept = torch.where(kept.cumsum(-1) - kept < share, kept, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros(logits.shape, dtype=torch.float32, device=logits.device).scatter_(-1, ids, kept)


def softmax_above(logits: torch.Tensor, cutoffs: torch.Tensor) -> torch.Tensor:
    """fp32 probabilities of the logits that reach their row's cut-off."""
    return torch.softmax(torch.where(logits >= cutoffs[:, None], logits.float(), float("-inf")), -1)


def preparations(filters: str, compiled: Callable[..., Any]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name -> what makes `[rows, vocab]` logits into fp32 probabilities.

    Args:
        filters: a name in `plan.SAMPLING`.
        compiled: `torch.compile`, or what stands for it.
    """
    package = flashinfer()
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if filters != FILTERED:
        plain = compiled(softmax)
        found["torch softmax"] = softmax
        found["compiled softmax"] = lambda logits: plain(any_number_of_rows(logits))
        if package is not None:
            found["flashinfer softmax"] = lambda logits: package.softmax(logits.float())
        return found
    above, sampling = compiled(softmax_above), SamplingParams(**SAMPLING[FILTERED])
    found["torch top-k, top-p of the k"] = top_k_top_p
    found["row_cutoffs, compiled softmax"] = lambda logits: above(
        any_number_of_rows(logits), any_number_of_rows(row_cutoffs(logits, sampling, backend="triton"))
    )
    if package is not None:
        found["flashinfer softmax, renormalisations"] = lambda logits: package.top_p_renorm_probs(
            package.top_k_renorm_probs(softmax(logits), 50), 0.9
        )
    return found


def any_number_of_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Two compilations serve every number of rows; the vocabulary stays a constant.

    The compiler splits a row among programs where rows are fewer than twice the processors, and decides that when it
    first sees some.
    """
    few = len(tensor) < 2 * PROCESSORS
    torch._dynamo.mark_dynamic(
        tensor, 0, min=2 if few else 2 * PROCESSORS, max=2 * PROCESSORS - 1 if few else MOST_ROWS
    )
    return tensor


# ---- (c) a chain kernel


def flashinfer_chain(
    target: torch.Tensor,
    draft_probabilities: torch.Tensor,
    tokens: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    *,
    prepared: torch.Tensor | None,
) -> Any:
    """FlashInfer's chain verification, from target logits, or from `prepared` probabilities.

    Args:
        target: `[batch, nodes, vocab]` logits of chains.
        draft_probabilities: `[batch, nodes - 1, vocab]` fp32, which drafting has left behind.
        tokens: `[batch, nodes]`.
        seed, offset: `[1]` int64: with torch's generator, whose state it reads, it could not be captured.
        prepared: the softmax of `target`; None: it is part of the call.
    """
    probabilities = softmax(target) if prepared is None else prepared
    return flashinfer().chain_speculative_sampling(
        draft_probabilities, tokens[:, 1:].int(), probabilities, seed=seed, offset=offset
    )


def chain_acceptance(
    draft_probabilities: torch.Tensor, tokens: torch.Tensor, target_probabilities: torch.Tensor
) -> tuple[float, float]:
    """Mean and variance of how many drafts of these chains speculative sampling emits, summed over the batch.

    The i-th draft is emitted with probability prod_{j <= i} min(1, p_j(x_j) / q_j(x_j)).

    Args:
        draft_probabilities, tokens: as in `flashinfer_chain`.
        target_probabilities: `[batch, nodes, vocab]`.
    """
    drafted = tokens[:, 1:, None]
    p, q = target_probabilities[:, :-1].gather(2, drafted), draft_probabilities.gather(2, drafted)
    reached = (p.double() / q.double()).clamp(max=1.0)[..., 0].cumprod(1)
    mean = reached.sum(1)
    square = (reached * (2 * torch.arange(1, reached.shape[1] + 1, device=reached.device) - 1)).sum(1)
    return float(mean.sum()), float((square - mean**2).sum())


def chain_faults(
    found: Any, draft_probabilities: torch.Tensor, tokens: torch.Tensor, target_probabilities: torch.Tensor
) -> list[str]:
    """What is wrong with an answer of `flashinfer_chain`, whatever its random numbers were.

    Args:
        found: the emitted tokens `[batch, nodes]`, -1 after the end; how many drafts pass their test, each by itself;
            how many are emitted.
        draft_probabilities, tokens, target_probabilities: as in `chain_acceptance`.
    """
    emitted, passed, count = (x.long() for x in found)
    drafts, vocab = tokens.shape[1] - 1, target_probabilities.shape[2]
    if bool(((count < 0) | (count > passed) | (passed > drafts)).any()):
        return ["counts out of bounds"]
    place = torch.arange(drafts + 1, device=tokens.device)
    faults = []
    accepted = place[:-1] < count[:, None]
    if bool((accepted & (emitted[:, :-1] != tokens[:, 1:])).any()):
        faults.append("an accepted token is not the drafted one")
    if bool(((emitted == -1) != (place > count[:, None])).any()):
        faults.append("-1 elsewhere than after the end")
    last = emitted.gather(1, count[:, None])
    if bool(((last < 0) | (last >= vocab)).any()):
        return [*faults, "the last token is none of the vocabulary"]
    request = torch.arange(len(tokens), device=tokens.device)
    p = target_probabilities[request, count, last[:, 0]]
    q = draft_probabilities[request, count.clamp(max=drafts - 1), last[:, 0]]
    if bool((p <= torch.where(count < drafts, q, 0.0)).any()):
        faults.append("the last token has no probability in the residual")
    return faults


# ---- operations on rows


def gumbel_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """k draws without replacement: the k largest of logits plus Gumbel noise."""
    noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).exponential_()
    return torch.topk(logits.float() - noise.log(), k, dim=-1).indices


def gumbel_top_k_of_few(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The same after top-k and top-p, among the tokens that they keep."""
    values, ids = torch.topk(logits, min(50, logits.shape[-1]), dim=-1)
    kept = torch.softmax(values, -1, dtype=torch.float32)
    few = torch.where(kept.cumsum(-1) - kept < 0.9, values.float(), float("-inf"))
    return ids.gather(-1, gumbel_top_k(few, k))


def multinomial(logits: torch.Tensor, k: int, replacement: bool) -> torch.Tensor:
    return torch.multinomial(softmax(logits), k, replacement=replacement)


def most_probable(logits: torch.Tensor, k: int) -> torch.Tensor:
    return torch.topk(logits, k, dim=-1).indices


def cutoffs(logits: torch.Tensor, filters: str) -> torch.Tensor:
    """The cut-off logit of each row, by sorting no more than is needed."""
    sampling = SAMPLING[filters]
    k = int(sampling.get("top_k", 0))
    values = torch.topk(logits, min(k, logits.shape[-1]), dim=-1).values if k else logits.sort(-1, descending=True)[0]
    if "top_p" not in sampling:
        return values[:, -1].float()
    mass = torch.softmax(values, -1, dtype=torch.float32)
    count = (mass.cumsum(-1) - mass < sampling["top_p"]).sum(-1, keepdim=True)
    return values.gather(-1, count - 1)[:, 0].float()
