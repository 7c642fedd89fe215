"""EAGLE's and Medusa's trees: `retrieve_indices`, with the logits of the nodes or of the paths."""

import torch

from mcsd.integrations.eagle import evaluate_posterior, evaluate_tree
from mcsd_kernels import SamplingParams

torch.manual_seed(0)
tree_logits = torch.randn(1, 6, 32000)
draft_tokens = torch.tensor([[9, 1, 2, 3, 4, 5]])
retrieve_indices = torch.tensor([[0, 1, 3, 5], [0, 1, 4, -1], [0, 2, -1, -1]])
tree_logits[0, [0, 1], [1, 4]] = 30.0  # the target likes 1, and 4 after it
best, length, token = evaluate_tree(tree_logits, draft_tokens, retrieve_indices, sampling=SamplingParams(top_p=0.9))
print("path", int(best), "accepted", int(length), "then", int(token))

candidates = torch.nn.functional.pad(draft_tokens[0], (0, 1), value=-1)[retrieve_indices]
best, length, token = evaluate_posterior(tree_logits[0, retrieve_indices], candidates)  # greedy
print("path", int(best), "accepted", int(length), "then", int(token))
