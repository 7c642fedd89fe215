"""FlashInfer: `chain_speculative_sampling`, on top of `mcsd_kernels.verify`.

Source: flashinfer/sampling.py of FlashInfer 0.6.18 (signature, shapes, what is added in place). Nothing of their code
is here.
"""

from __future__ import annotations

import torch

from mcsd_kernels import _checks as check
from mcsd_kernels import draw_uniforms, verify

from ._trees import chain, rows_of

# Between the seeds of neighbouring requests, so that seeds 1 and 2 of two calls share no request's numbers.
_STRIDE = 0x9E3779B97F4A7C15 - 2**64


def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    maybe_output_accepted_token_num: torch.Tensor | None = None,
    maybe_output_emitted_draft_token_num: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    *,
    rule: str = "recursive",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Speculative sampling of chains from probabilities, which are read as they are.

    Args:
        draft_probs: `[batch, drafts, vocab]` f16, bf16 or f32.
        draft_token_ids: `[batch, drafts]` int32 or int64; -1 was never drafted.
        target_probs: `[batch, drafts + 1, vocab]`.
        maybe_output_accepted_token_num: `[batch]` int32, added to in place: how many drafts pass their test, each by
            itself. (A draft that ended the chain does not pass; FlashInfer tosses for it again.)
        maybe_output_emitted_draft_token_num: `[batch]` int32, added to in place: how many drafts are emitted.
        deterministic: results never depend on the schedule here.
        generator: for the random numbers, where there is no seed.
        seed: an int, or `[1]` or `[batch]` int64: the numbers are counter-based, see `draw_uniforms`.
        offset: an int, or `[1]` or `[batch]` int64, which must change from call to call; None: 0.
        rule: "recursive", or "traversal" for block verification.
        backend: as in `verify`.

    Returns:
        `output_token_ids` `[batch, drafts + 1]` int32 (-1 after the end) and the two counts, `[batch]` int32.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    check.tensor("draft_probs", draft_probs, (None, None, None), check.FLOATS)
    batch, drafts, vocab = draft_probs.shape
    check.tensor("draft_token_ids", draft_token_ids, (batch, drafts), check.INTEGERS)
    check.tensor("target_probs", target_probs, (batch, drafts + 1, vocab), check.FLOATS)
    device = draft_probs.device
    coins = _coins(batch, drafts + 3, generator, seed, offset, device)
    place = torch.arange(drafts + 1, device=device)
    request = torch.arange(batch, device=device)[:, None]
    verified = verify(
        target_probs,
        rows_of("draft_probs", draft_probs),
        torch.nn.functional.pad(draft_token_ids, (1, 0), value=-1),
        chain(drafts + 1, device),
        coins,
        proposal="with_replacement",
        rule=rule,
        inputs="probabilities",
        draft_rows=request * drafts + place.clamp(max=drafts - 1),
        max_depth=drafts,
        backend=backend,
    )
    emitted = verified.length - 1
    # the tests that the walk did not come to
    x = draft_token_ids.long()
    known = (x >= 0) & (x < vocab)
    p, q = (
        rows[:, :drafts].gather(2, x.clamp(0, vocab - 1)[..., None])[..., 0] for rows in (target_probs, draft_probs)
    )
    passed = (coins[:, 1 : drafts + 1] * q < p) & known & (place[1:] > verified.length[:, None])
    accepted = emitted + passed.sum(1, dtype=torch.int32)
    if maybe_output_accepted_token_num is not None:
        accepted = maybe_output_accepted_token_num.add_(accepted)
    if maybe_output_emitted_draft_token_num is not None:
        emitted = maybe_output_emitted_draft_token_num.add_(emitted)
    return verified.tokens.int(), accepted, emitted


def _coins(
    batch: int,
    count: int,
    generator: torch.Generator | None,
    seed: int | torch.Tensor | None,
    offset: int | torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """`[batch, count]` uniforms, from the seed where there is one."""
    if seed is None:
        return torch.rand(batch, count, generator=generator, device=device)
    seeds = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(-1)
    for name, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, torch.Tensor) and value.numel() not in (1, batch):
            raise ValueError(f"{name}: expected shape [1] or [{batch}], got {list(value.shape)}")
    if seeds.numel() != batch:
        seeds = seeds + torch.arange(batch, device=device) * _STRIDE
    step = torch.as_tensor(0 if offset is None else offset, dtype=torch.int64, device=device).reshape(-1) & 0xFFFFFFFF
    return draw_uniforms(seeds, step.expand(batch).contiguous(), count)
