"""transformers' own assisted decoding, verified by `mcsd_kernels.verify`; "traversal" verifies whole blocks.

python examples/integrations/transformers_assisted.py [TARGET DRAFT]
"""

import sys

from mcsd.draft_model import load_draft
from mcsd.integrations.transformers import lossless_assisted_decoding
from mcsd.models import load_target

if len(sys.argv) == 3:
    target, tokenizer = load_target(sys.argv[1])
    draft = load_draft(sys.argv[2], target)
else:
    target, tokenizer = load_target()
    draft = load_draft("smollm2-draft", target)  # assisted decoding takes models only

inputs = tokenizer("The lighthouse keeper opened the letter and", return_tensors="pt").to(target.device)
with lossless_assisted_decoding(rule="traversal"):
    output = target.generate(**inputs, assistant_model=draft, do_sample=True, max_new_tokens=48)
print(tokenizer.decode(output[0], skip_special_tokens=True))
