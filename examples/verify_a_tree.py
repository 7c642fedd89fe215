"""Verify one drafted tree with `mcsd_kernels` alone: plain tensors in, plain tensors out."""

import torch

from mcsd_kernels import draw_candidates, draw_uniforms, verify

torch.manual_seed(0)
vocab, candidates = 1000, 4
parents = torch.tensor([-1] + [0] * candidates)  # a root and four candidates for the token after it
draft_logits = torch.randn(1, 1 + candidates, vocab)  # row i: the draft's logits after node i
target_logits = draft_logits + 0.5 * torch.randn_like(draft_logits)
seeds = torch.tensor([42])  # one for each request
drawn = draw_candidates(draft_logits[:, 0], candidates, seeds, step=0)
tokens = torch.cat([torch.tensor([[7]]), drawn], dim=1)  # node 0 is the last token of the text so far
uniforms = draw_uniforms(seeds, step=0, count=len(parents) + 2)
path, length, emitted, status = verify(target_logits, draft_logits, tokens, parents, uniforms, max_depth=1)

print("candidates", drawn.tolist())
print("accepted nodes", path[0, 1 : length[0]].tolist(), "tokens", emitted[0, : length[0]].tolist())
