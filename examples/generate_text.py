"""Generate with the bundled pair, or with any two models that share a tokenizer.

python examples/generate_text.py [TARGET DRAFT]
"""

import sys

import mcsd
from mcsd.draft_model import load_draft
from mcsd.models import default_pair, load_target

if len(sys.argv) == 3:
    target, tokenizer = load_target(sys.argv[1])
    draft = load_draft(sys.argv[2], target)
else:
    target, draft, tokenizer = default_pair()

inputs = tokenizer("The lighthouse keeper opened the letter and", return_tensors="pt")
generation = mcsd.generate(
    target, draft, inputs.input_ids, inputs.attention_mask, branching=(4,), max_new_tokens=48, temperature=0.7
)
print(tokenizer.decode(generation.sequences[0], skip_special_tokens=True))
print(f"{generation.stats.tokens_per_call:.2f} tokens per target call")
