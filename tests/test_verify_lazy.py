"""The torch backend is lazy: it touches the rows on a request's own way, and makes nothing of the size of all rows."""

from __future__ import annotations

import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcsd_kernels import _verify_torch, draw_candidates, draw_uniforms
from mcsd_kernels.types import DRAW_BLOCK

PARENTS = [-1, 0, 0, 0, 0, *(i for i in range(1, 5) for _ in range(4))]  # (4, 4)
# a long vocabulary is one request at a time, shorter ones are taken together
SHAPES = [pytest.param(2, 32_768, id="long"), pytest.param(64, 4096, id="short")]


class Made(TorchDispatchMode):
    """The names of the operators, and the most bytes that one of their results has to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operator._schema.name)
        found = operator(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for result in tree_leaves(found):
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, result.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize(("batch", "vocab"), SHAPES)
def test_nothing_of_the_size_of_all_rows_is_made(batch: int, vocab: int, rule: str, filters: bool) -> None:
    nodes = len(PARENTS)
    generator = torch.Generator().manual_seed(0)
    target, draft = (torch.randn(batch, nodes, vocab, generator=generator).bfloat16() for _ in range(2))
    seeds = torch.arange(batch)
    tokens = torch.cat([seeds[:, None]] + [draw_candidates(draft[:, i], 4, seeds, 0) for i in range(5)], 1)
    numbers, none = [0.8, 50.0, 0.9, 0.0] if filters else [0.8, 0.0, 1.0, 0.0], [None] * 4
    arguments = (target, draft, tokens, torch.tensor(PARENTS), draw_uniforms(seeds, 0, nodes + 2), None, None)
    arguments += (numbers, none, numbers, none, "without_replacement", rule, 2, "logits", "logits", None, None, None)
    with Made():  # what is imported and kept between calls is there from now on
        _verify_torch.verify(*arguments)
    tracemalloc.start()
    with Made() as made:
        _verify_torch.verify(*arguments)
    _, by_numpy = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # float32 rows of the requests that are taken together
    bound = 4 * max(vocab, _verify_torch.rows_torch._CHUNK_ENTRIES if vocab < 8192 else 0) + 64 * DRAW_BLOCK
    assert bound < batch * nodes * vocab * 4 / 4
    assert max(made.largest, by_numpy) <= bound
    assert made.names and not any("multinomial" in name for name in made.names)


SCRIPT = """
import ctypes, mmap, os, sys
import torch
from mcsd_kernels import draw_candidates, draw_uniforms, verify

batch, vocab, parents, control, rule = 3, int(sys.argv[1]), eval(sys.argv[2]), sys.argv[3], sys.argv[4]
nodes, size = len(parents), vocab * 4
assert size % mmap.PAGESIZE == 0
memory = [mmap.mmap(-1, batch * nodes * size) for _ in range(2)]
target, draft = (torch.frombuffer(m, dtype=torch.float32).view(batch, nodes, vocab) for m in memory)
target.normal_(generator=torch.Generator().manual_seed(0))
draft.copy_(target).add_(torch.randn(draft.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
seeds = torch.arange(batch)
tokens = torch.cat([seeds[:, None]] + [draw_candidates(draft[:, i], 4, seeds, 0) for i in range(5)], 1)
uniforms = draw_uniforms(seeds, 0, nodes + 2)
uniforms[2] = 2.0  # this request is refused, and has no way at all
arguments = tokens, torch.tensor(parents), uniforms
path = verify(target, draft, *arguments, rule=rule).path
on_path = [[node for node in row if node >= 0] for row in path.tolist()]
assert max(map(len, on_path)) > 1
inner = set(parents)
# "traversal" may have entered any node
ways = on_path[:2] if rule == "recursive" else [range(nodes)] * 2
visited = [{(b, i) for b, way in enumerate(ways) for i in way}]
visited.append({(b, i) for b, i in visited[0] if i in inner})
if control != "none":
    visited[int(control)].remove((0, 0))
protect = ctypes.CDLL(None, use_errno=True).mprotect
for rows, wanted in zip((target, draft), visited):
    for b in range(batch):
        for i in range(nodes):
            if (b, i) not in wanted:
                assert protect(ctypes.c_void_p(rows[b, i].data_ptr()), ctypes.c_size_t(size), 0) == 0
again = verify(target, draft, *arguments, rule=rule).path
assert torch.equal(again, path)
print("untouched")
os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are protected by Linux's mprotect")
@pytest.mark.parametrize(
    ("rule", "control"), [("recursive", "none"), ("recursive", "0"), ("recursive", "1"), ("traversal", "none")]
)
@pytest.mark.parametrize("vocab", [1024, 16_384])
def test_rows_off_the_way_are_not_touched(vocab: int, rule: str, control: str) -> None:
    """Their pages cannot be read, so to touch one would end the process; a control protects a root's row, too."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(vocab), repr(PARENTS), control, rule],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    if control == "none":
        assert done.returncode == 0 and "untouched" in done.stdout, done.stderr
    else:
        assert done.returncode == -signal.SIGSEGV, done.stderr
