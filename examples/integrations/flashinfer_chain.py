"""FlashInfer's `chain_speculative_sampling`, with its own docstring's example."""

import torch

from mcsd.integrations.flashinfer import chain_speculative_sampling

draft_probs = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.1]]])
draft_token_ids = torch.tensor([[2, 1]], dtype=torch.int32)
target_probs = torch.tensor([[[0.0, 0.1, 0.6, 0.3], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]])
tokens, accepted, emitted = chain_speculative_sampling(draft_probs, draft_token_ids, target_probs, seed=42, offset=0)
print("tokens", tokens.tolist(), "would pass", accepted.tolist(), "emitted", emitted.tolist())
