"""A drafter of one's own, alone and merged with prompt lookup: whatever it proposes, the text keeps the target's law.

python examples/custom_drafter.py [TARGET]
"""

import sys

import torch

import mcsd
from mcsd.drafters import MergedDrafter, NgramDrafter
from mcsd.models import load_target


class RecentTokens(mcsd.Drafter):
    """Proposes the last four different tokens of the text, in case one of them comes again."""

    proposal = "point"  # the candidates are chosen, not drawn, so there are no draft logits

    def propose(self, state: mcsd.State) -> mcsd.Proposal:
        trees = []
        for sequence in state.sequences:
            recent = list(dict.fromkeys(reversed(sequence)))[:4]
            trees.append([sequence[-1], *recent, *[-1] * (4 - len(recent))])  # -1: no candidate
        parents = torch.tensor([-1, 0, 0, 0, 0], dtype=torch.int32, device=state.device)
        return mcsd.Proposal(torch.tensor(trees, device=state.device), parents, depth=1)


target, tokenizer = load_target(*sys.argv[1:])
inputs = tokenizer("1, 2, 3, 1, 2, 3, 1, 2, 3,", return_tensors="pt")
generation = mcsd.generate(target, RecentTokens(), inputs.input_ids, max_new_tokens=32, temperature=0)
print(tokenizer.decode(generation.sequences[0], skip_special_tokens=True))
print(f"{generation.stats.tokens_per_call:.2f} tokens per target call")

both = MergedDrafter([RecentTokens(), NgramDrafter()])
stats = mcsd.generate(target, both, inputs.input_ids, max_new_tokens=32, temperature=0).stats
print(f"{stats.tokens_per_call:.2f} with prompt lookup beside it; accepted by drafter: {stats.accepted_by_origin}")
