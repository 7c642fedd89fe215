"""SGLang's tree of first children and next siblings, verified in place; here the candidates were drawn, not chosen."""

import torch

from mcsd.integrations.sglang import tree_speculative_sampling_target_only
from mcsd_kernels import draw_candidates

torch.manual_seed(0)
vocab, seeds = 32000, torch.tensor([3])
draft_probs = torch.randn(1, 4, vocab).softmax(-1)
target_probs = (draft_probs.log() + 0.5 * torch.randn(1, 4, vocab)).softmax(-1)
first, second = draw_candidates(draft_probs[:, 0].log(), 2, seeds, 0)[0].tolist()
child = int(draw_candidates(draft_probs[:, 2].log(), 1, seeds, 0, nodes=torch.tensor([2]))[0, 0])

# node 2 was drawn first and has node 3 as its child; node 1 comes after it
predicts = torch.full((4,), -1, dtype=torch.int32)
accept_index = torch.full((1, 3), -1, dtype=torch.int32)
accept_token_num = torch.zeros(1, dtype=torch.int32)
tree_speculative_sampling_target_only(
    predicts,
    accept_index,
    accept_token_num,
    candidates=torch.tensor([[17, second, first, child]]),
    retrieve_index=torch.arange(4)[None],
    retrieve_next_token=torch.tensor([[2, -1, 3, -1]]),
    retrieve_next_sibling=torch.tensor([[-1, -1, 1, -1]]),
    uniform_samples=torch.rand(1, 4),
    uniform_samples_for_final_sampling=torch.rand(1),
    target_probs=target_probs,
    draft_probs=draft_probs,
    proposal="without_replacement",  # SGLang itself has no rule for drawn trees and takes them as chosen
)
print("accepted nodes", accept_index[0].tolist(), "tokens after them", predicts.tolist())
