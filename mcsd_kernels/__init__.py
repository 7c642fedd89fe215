"""Multi-candidate verification and token-tree attention for speculative decoding: pure functions over tensors."""

from .attention import tree_attention
from .candidates import draw_candidates
from .cutoffs import row_cutoffs
from .random import draw_uniforms
from .sampling import SamplingParams
from .tree import ancestor_bits, keep_path, node_depths, tree_attention_mask
from .types import Status, Verified
from .verify import verify

__all__ = [
    "SamplingParams",
    "Status",
    "Verified",
    "ancestor_bits",
    "draw_candidates",
    "draw_uniforms",
    "keep_path",
    "node_depths",
    "row_cutoffs",
    "tree_attention",
    "tree_attention_mask",
    "verify",
]
