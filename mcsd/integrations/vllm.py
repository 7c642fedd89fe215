"""vLLM: its two rejection samplers, on top of `mcsd_kernels.verify`. Chains are trees of width 1.

Put in place of vLLM's own with, for instance::

    import vllm.v1.sample.rejection_sampler as sampler
    sampler.rejection_sample = mcsd.integrations.vllm.rejection_sample

Source: signatures, shapes and dtypes of vllm/v1/sample/rejection_sampler.py (main of 2026; older releases hand over
`target_probs` in the place of `target_logits`, which is not this function) and of
vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py (model runner V2, commit 02e318b). Nothing of their code is
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mcsd_kernels import SamplingParams, Status, draw_uniforms, verify
from mcsd_kernels import _checks as check

from ._trees import rows_of


def rejection_sample(
    draft_token_ids: torch.Tensor,
    num_draft_tokens: Sequence[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    sampling_metadata: Any,
    synthetic_mode: bool = False,
    synthetic_conditional_rates: torch.Tensor | None = None,
    *,
    rule: str = "recursive",
    backend: str | None = None,
) -> torch.Tensor:
    """vLLM V1's `rejection_sample`: flattened drafts of several requests, and bonus tokens that were sampled before.

    Args:
        draft_token_ids: `[num_tokens]` int32 or int64, the requests' drafts one after the other; -1 was never drafted.
        num_draft_tokens: drafts of each request, on the host.
        max_spec_len: the longest draft.
        cu_num_draft_tokens: `[batch]` int32 or int64, cumulative sums of `num_draft_tokens`.
        draft_probs: `[num_tokens, vocab]` f32, what each token was drawn from. None: it was chosen (n-gram).
        target_logits: `[num_tokens, vocab]`, temperature and filters applied, as vLLM hands them over.
        bonus_token_ids: `[batch, 1]` int32 or int64, emitted after a draft that was accepted whole.
        sampling_metadata: only its `all_greedy`, `temperature` (`[batch]`, <= 0 for greedy requests, or None) and
            `generators` (index in the batch -> `torch.Generator`) are read.
        synthetic_mode: acceptance by a given rate; refused, it does not keep the target's law.
        synthetic_conditional_rates: its rates; ignored.
        rule: "recursive", or "traversal" for block verification.
        backend: as in `verify`.

    Returns:
        `[batch, max_spec_len + 1]` int32: accepted drafts, then the recovered or the bonus token, -1 after the end.

    Raises:
        ValueError: `synthetic_mode`, or a wrong shape or dtype.
    """
    if synthetic_mode:
        raise ValueError("synthetic_mode: expected False, got True; synthetic acceptance is not lossless")
    device, batch, rows = target_logits.device, len(num_draft_tokens), sum(num_draft_tokens)
    if min(num_draft_tokens, default=0) < 0 or max(num_draft_tokens, default=0) > max_spec_len:
        raise ValueError(
            f"num_draft_tokens: expected numbers in [0, max_spec_len = {max_spec_len}], got {list(num_draft_tokens)}"
        )
    check.tensor("draft_token_ids", draft_token_ids, (rows,), check.INTEGERS)
    check.tensor("cu_num_draft_tokens", cu_num_draft_tokens, (batch,), check.INTEGERS)
    check.tensor("target_logits", target_logits, (rows, None), check.FLOATS)
    if draft_probs is not None:
        check.tensor("draft_probs", draft_probs, (rows, target_logits.shape[1]), check.FLOATS)
    check.tensor("bonus_token_ids", bonus_token_ids, (batch, 1), check.INTEGERS)
    last_row = rows - 1
    place = torch.arange(max_spec_len + 1, device=device)
    if last_row < 0:  # nobody drafted anything
        return torch.where(place == 0, bonus_token_ids.view(batch, 1), -1).int()
    counts = torch.diff(cu_num_draft_tokens.long(), prepend=cu_num_draft_tokens.new_zeros(1))[:, None]
    row = cu_num_draft_tokens.long()[:, None] - counts + place  # the row after each node, below the last one
    tokens = torch.where(place > 0, draft_token_ids.long()[(row - 1).clamp(0, last_row)], -1)
    # The last draft has no row of its own: a virtual node, whose acceptance ends the walk.
    target_rows = torch.where(place < counts.clamp(min=1), row.clamp(max=last_row), -1)
    greedy = sampling_metadata.all_greedy
    temperature = 0.0 if greedy else (sampling_metadata.temperature > 0).float()
    by_choice = draft_probs is None or greedy
    verified = verify(
        target_logits,
        None if by_choice else draft_probs,
        tokens,
        torch.where(place <= counts, place - 1, -1),
        _coins(batch, max_spec_len + 3, num_draft_tokens, sampling_metadata.generators, device),
        proposal="point" if by_choice else "with_replacement",
        rule=rule,
        sampling=SamplingParams(temperature=temperature),
        draft_sampling=None if by_choice else SamplingParams(),
        draft_inputs=None if by_choice else "probabilities",
        target_rows=target_rows,
        draft_rows=None if by_choice else row.clamp(max=last_row),
        max_depth=max_spec_len,
        backend=backend,
    )
    # A rejected draft is never the token drawn in its place, so the last token tells whether it was accepted.
    ends = verified.tokens.gather(1, (counts - 1).clamp(min=0)) == tokens.gather(1, counts)
    whole = (verified.length[:, None] == counts) & ends & (verified.status[:, None] & ~Status.BAD_TOKEN == 0)
    bonus = (place == counts) & (whole | (counts == 0))
    return torch.where(bonus, bonus_token_ids.view(batch, 1), verified.tokens).int()


def _coins(
    batch: int, count: int, drafts: Sequence[int], generators: dict[int, torch.Generator], device: torch.device
) -> torch.Tensor:
    """`[batch, count]` uniforms; a request with a generator takes as many numbers from it as its own draft needs."""
    coins = torch.rand(batch, count, device=device)
    for request, generator in generators.items():
        if drafts[request] > 0:
            coins[request, : drafts[request] + 3].uniform_(generator=generator)
    return coins.roll(-2, 1)


def rejection_sample_v2(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    draft_sampled: torch.Tensor,
    cu_num_logits: torch.Tensor,
    pos: torch.Tensor,
    idx_mapping: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    num_speculative_steps: int,
    synthetic_conditional_rates: torch.Tensor | None = None,
    use_fp64: bool = False,
    use_block_verification: bool = False,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Model runner V2's `rejection_sample`: chains with a row for every node, and a seed for every request.

    Args:
        target_logits: `[num_logits, vocab]`, temperature and filters applied: each request's root and drafts.
        draft_logits: `[max_num_reqs, num_speculative_steps, draft vocab]` by request state, temperature applied. None:
            drafts were chosen. Columns of the target beyond the draft's vocabulary are padding, as in vLLM.
        draft_sampled: `[num_logits]`, each request's last token and then its drafts; -1 was never drafted.
        cu_num_logits: `[num_reqs + 1]` int32.
        pos: `[num_logits]` int64, the position of each token: with the seed, it keys the random numbers.
        idx_mapping: `[num_reqs]` int32, each request's state.
        expanded_idx_mapping: `[num_logits]`; not needed here.
        expanded_local_pos: `[num_logits]`; not needed here.
        temperature: `[max_num_reqs]` f32; 0 means argmax, any other value has been applied already.
        seed: `[max_num_reqs]` int64.
        num_speculative_steps: the longest draft.
        synthetic_conditional_rates: refused, they do not keep the target's law.
        use_fp64: precision of vLLM's Gumbel noise; there is none here.
        use_block_verification: the "traversal" rule.
        backend: as in `verify`.

    Returns:
        `sampled` `[num_reqs, num_speculative_steps + 1]` int64, -1 after the end, and `num_sampled` `[num_reqs]` int32.

    Raises:
        ValueError: `synthetic_conditional_rates`, or a wrong shape or dtype.
    """
    if synthetic_conditional_rates is not None:
        raise ValueError("synthetic_conditional_rates: expected None, got a tensor; such acceptance is not lossless")
    check.whole("num_speculative_steps", num_speculative_steps, 1)
    check.tensor("target_logits", target_logits, (None, None), check.FLOATS)
    if draft_logits is not None:
        check.tensor("draft_logits", draft_logits, (temperature.shape[0], None, None), check.FLOATS)
    for name, numbers in (("draft_sampled", draft_sampled), ("pos", pos)):
        check.tensor(name, numbers, (target_logits.shape[0],), check.INTEGERS)
    check.tensor("idx_mapping", idx_mapping, (None,), check.INTEGERS)
    check.tensor("cu_num_logits", cu_num_logits, (idx_mapping.shape[0] + 1,), check.INTEGERS)
    check.tensor("seed", seed, (temperature.shape[0],), check.INTEGERS)
    state = idx_mapping.long()
    place = torch.arange(num_speculative_steps + 1, device=target_logits.device)
    start = cu_num_logits[:-1].long()[:, None]
    drafts = cu_num_logits[1:].long()[:, None] - start - 1
    row = (start + place).clamp(max=draft_sampled.shape[0] - 1)
    draft_rows = None
    if draft_logits is not None:
        steps = draft_logits.shape[1]
        draft_rows = state[:, None] * steps + place.clamp(max=steps - 1)
        target_logits = target_logits[:, : draft_logits.shape[2]]
        draft_logits = rows_of("draft_logits", draft_logits)
    # From 1 on: a step of 0 would share counters with vLLM's own numbers under the same seed.
    step = (pos.long()[start[:, 0]] + 1) & 0xFFFFFFFF
    verified = verify(
        target_logits,
        draft_logits,
        draft_sampled[row],
        torch.where(place <= drafts, place - 1, -1),
        draw_uniforms(seed[state], step, num_speculative_steps + 3).roll(-2, 1),
        proposal="point" if draft_logits is None else "with_replacement",
        rule="traversal" if use_block_verification else "recursive",
        sampling=SamplingParams(temperature=(temperature[state] > 0).float()),
        draft_sampling=SamplingParams(),
        target_rows=row,
        draft_rows=draft_rows,
        max_depth=num_speculative_steps,
        backend=backend,
    )
    return verified.tokens, verified.length
