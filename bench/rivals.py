"""What `verify` is measured against, written as its users would have it: nothing weakened, nothing left out."""

from __future__ import annotations

import torch
from transformers.generation.utils import _speculative_sampling


def transformers_chain(target_logits: torch.Tensor, draft_logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' verification of one chain, from raw logits; `[1, tokens emitted]`."""
    chain = tokens.shape[1] - 1
    valid, _ = _speculative_sampling(
        tokens,
        draft_logits[:, :chain],
        chain,
        target_logits,
        False,
    )
    return valid


def textbook_tree(
    target_logits: torch.Tensor, draft_logits: torch.Tensor, tokens: torch.Tensor, parents: list[int]
) -> list[int]:
    """Softmax of every node, then recursive rejection sampling without replacement as papers state it (one request).

    After a rejection p becomes norm((p - q)_+) and q loses the tried token and is normalised.
    Source: Algorithm 2 of Yang et al., arXiv 2401.06706, and of Miao et al., arXiv 2305.09781.
    """
    p_rows = torch.softmax(target_logits[0].float(), -1)
    q_rows = torch.softmax(draft_logits[0].float(), -1)
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    node, emitted = 0, []
    while True:
        p, q = p_rows[node].clone(), q_rows[node].clone()
        for child in children.get(node, []):
            x = int(tokens[0, child])
            if float(torch.rand(())) * float(q[x]) < float(p[x]):
                emitted.append(x)
                node = child
                break
            p = torch.relu(p - q)
            p = p / p.sum()
            q[x] = 0.0
            q = q / q.sum()
        else:
            emitted.append(int(torch.multinomial(p, 1)))
            return emitted


def log_sum_exp(target_logits: torch.Tensor) -> torch.Tensor:
    """The floor that any verifier of all rows has: one log-sum-exp a row."""
    return torch.logsumexp(target_logits, -1)
