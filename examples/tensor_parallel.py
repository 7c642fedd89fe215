"""A target split over processes by transformers' tensor-parallel plan; each verifies its own columns of the logits.

torchrun --nproc-per-node 2 examples/tensor_parallel.py TARGET DRAFT

Takes two models with one tokenizer, on GPUs if there are any. With several processes, the target's key-value heads must
be a multiple of them, and transformers needs `accelerate` for its plans. Plain `python` runs it in one process, to the
same text.
"""

import os
import sys
from importlib.util import find_spec

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.distributed import DistributedConfig

from mcsd_kernels import draw_candidates, draw_uniforms, keep_path, tree_attention_mask, verify

PROMPT, NEW_TOKENS = "The lighthouse keeper opened the letter and", 32
parents = torch.tensor([-1, 0, 0, 0, 1, 2, 3])  # three candidates for the next token, and one after each of them
depth = torch.tensor([0, 1, 1, 1, 2, 2, 2])
draft_rows = torch.tensor([[0, 1, 2, 3, 0, 0, 0]])  # those of the leaves are not read

if len(sys.argv) != 3:
    sys.exit("usage: torchrun --nproc-per-node 2 examples/tensor_parallel.py TARGET DRAFT")
world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
if world > 1:
    if find_spec("accelerate") is None:
        sys.exit("accelerate: transformers needs it for its plans: pip install accelerate")
    config = AutoConfig.from_pretrained(sys.argv[1]).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % world:
        sys.exit(f"TARGET: expected key-value heads that are a multiple of the {world} processes, it has {heads}")
# the plan's own head is "colwise_gather_output": "colwise" leaves each process its columns, of every row of logits
plan = DistributedConfig(tp_plan={"lm_head": "colwise"}) if world > 1 else None
target = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, distributed_config=plan).eval()
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
if plan is None:
    target.to(device)
draft = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).to(device).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
group = dist.group.WORLD if world > 1 else None
parents, depth, draft_rows = parents.to(device), depth.to(device), draft_rows.to(device)
seeds, nodes = torch.tensor([7], device=device), len(parents)

with torch.inference_mode():
    text = tokenizer(PROMPT, return_tensors="pt").input_ids.to(device)
    end, calls, cache = text.shape[1] + NEW_TOKENS, 0, DynamicCache(config=target.config)
    target(text[:, :-1], past_key_values=cache)
    while text.shape[1] < end:
        # draft: the same on every process; a loop that is not an example gives the draft a cache, too
        first = draft(text).logits[:, -1]
        children = draw_candidates(first, 3, seeds, calls)
        longer = torch.cat([text.expand(3, -1), children.clamp(min=0).T], 1)
        second = draft(longer).logits[:, -1]
        grandchildren = draw_candidates(second, 1, seeds.expand(3), calls, nodes=torch.arange(1, 4, device=device))
        tokens = torch.cat([text[:, -1:], children, grandchildren.T], 1)
        draft_logits = torch.cat([first, second])

        # score: one forward over the tree, behind the text in the cache
        prefix = torch.tensor([text.shape[1] - 1], device=device)
        mask = tree_attention_mask(parents, prefix, text.shape[1] - 1 + nodes)
        positions = (prefix + depth)[None]
        logits = target(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits

        # verify: processes exchange sums, and all come to the same answer
        out = verify(
            logits, draft_logits.chunk(world, -1)[rank], tokens, parents, draw_uniforms(seeds, calls, nodes + 2),
            draft_rows=draft_rows, max_depth=2, group=group,
        )  # fmt: skip

        # keep: the accepted nodes move to the end of the text, in each process's heads
        for layer in cache.layers:
            keep_path(layer.keys, layer.values, prefix, out.path, out.length)
        length = int(out.length)
        cache.crop(length - nodes)
        text, calls = torch.cat([text, out.tokens[:, :length]], 1), calls + 1

drafted = f"process {rank} of {world} has {logits.shape[-1]} of {draft_logits.shape[-1]} columns"
said = tokenizer.decode(text[0, :end], skip_special_tokens=True)
each = (text.shape[1] - end + NEW_TOKENS) / calls
print(f"{drafted}, {each:.2f} tokens per target call: {said!r}\n", end="")  # in one piece, among the others' lines
if group is not None:
    dist.destroy_process_group()
