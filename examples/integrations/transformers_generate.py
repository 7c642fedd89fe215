"""Token trees inside `model.generate`: one argument, and every other option stays what it was.

python examples/integrations/transformers_generate.py [TARGET DRAFT]
"""

import sys

from mcsd.draft_model import load_draft
from mcsd.integrations.transformers import TreeDecoding
from mcsd.models import default_pair, load_target

if len(sys.argv) == 3:
    target, tokenizer = load_target(sys.argv[1])
    draft = load_draft(sys.argv[2], target)
else:
    target, draft, tokenizer = default_pair()

inputs = tokenizer("The lighthouse keeper opened the letter and", return_tensors="pt").to(target.device)
decoding = TreeDecoding(draft, branching=(4, 2), seed=0)
output = target.generate(
    **inputs, custom_generate=decoding, max_new_tokens=48, do_sample=True, temperature=0.7, repetition_penalty=1.1
)
print(tokenizer.decode(output[0], skip_special_tokens=True))
print(f"{decoding.stats.tokens_per_call:.2f} tokens per target call")
