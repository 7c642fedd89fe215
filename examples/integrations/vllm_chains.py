"""What vLLM's two model runners hand to their rejection samplers, handed to ours.

In vLLM: `vllm.v1.sample.rejection_sampler.rejection_sample = mcsd.integrations.vllm.rejection_sample`.
"""

from types import SimpleNamespace

import torch

from mcsd.integrations.vllm import rejection_sample, rejection_sample_v2

torch.manual_seed(0)
vocab, lengths = 32000, [3, 1]  # two requests, their drafts one after the other
ends = torch.tensor(lengths).cumsum(0).int()
draft_probs = torch.randn(4, vocab).softmax(-1)
drafts = draft_probs.argmax(-1).int()
target_logits = draft_probs.log() + 0.3 * torch.randn(4, vocab)
metadata = SimpleNamespace(  # vLLM's SamplingMetadata: the second request is greedy, the first has a seed of its own
    all_greedy=False, temperature=torch.tensor([0.8, 0.0]), generators={0: torch.Generator().manual_seed(7)}
)
bonus = torch.tensor([[5], [6]])
print("V1", rejection_sample(drafts, lengths, 3, ends, draft_probs, target_logits, bonus, metadata).tolist())

rows = torch.randn(6, vocab)  # runner V2 has a row for each request's last token, too
sampled, count = rejection_sample_v2(
    rows,
    torch.randn(8, 3, vocab),  # by request state: eight slots, three speculative steps
    torch.tensor([11, 1, 2, 3, 12, 4]),
    torch.tensor([0, 4, 6], dtype=torch.int32),
    pos=torch.tensor([20, 21, 22, 23, 31, 32]),
    idx_mapping=torch.tensor([5, 2], dtype=torch.int32),
    expanded_idx_mapping=torch.tensor([5, 5, 5, 5, 2, 2], dtype=torch.int32),
    expanded_local_pos=torch.tensor([0, 1, 2, 3, 0, 1], dtype=torch.int32),
    temperature=torch.ones(8),
    seed=torch.arange(8),
    num_speculative_steps=3,
    use_block_verification=True,
)
print("V2", sampled.tolist(), count.tolist())
