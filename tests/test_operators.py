"""The operators: opcheck, torch.compile through every public function, and fake tensors that nobody may read."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mcsd_kernels
from mcsd_kernels import (
    SamplingParams,
    _library,
    ancestor_bits,
    draw_candidates,
    draw_uniforms,
    keep_path,
    node_depths,
    row_cutoffs,
    tree_attention,
    tree_attention_mask,
    verify,
)

NAMESPACE = "mcsd_kernels::"

Arguments = dict[str, Any]


def tree_call() -> Arguments:
    generator = torch.Generator().manual_seed(0)
    return {
        "target_logits": torch.randn(3, 5, 40, generator=generator),
        "draft_logits": torch.randn(3, 5, 40, generator=generator),
        "tokens": torch.randint(40, (3, 5), generator=generator),
        "parents": torch.tensor([-1, 0, 0, 1, 1]),
        "uniforms": torch.rand(3, 7, generator=generator),
    }


def rows_call() -> Arguments:
    """The same with row indices, half precision, int32, its own tree for each request, and tensors as parameters."""
    call = tree_call()
    rows = torch.arange(15, dtype=torch.int32).reshape(3, 5)
    return call | {
        "target_logits": call["target_logits"].reshape(15, 40).bfloat16(),
        "draft_logits": call["draft_logits"].reshape(15, 40).bfloat16(),
        "tokens": call["tokens"].int(),
        "parents": torch.tensor([[-1, 0, 0, 1, 1], [-1, 0, 1, 2, 3], [-1, 0, -1, 1, -1]], dtype=torch.int32),
        "target_rows": rows,
        "draft_rows": rows.clone(),
        "sampling": SamplingParams(
            temperature=torch.tensor([0.0, 0.7, 1.0]), top_k=9, top_p=torch.tensor([1.0, 0.9, 0.5])
        ),
        "draft_sampling": SamplingParams(min_p=0.01),
        "proposal": "greedy",
        "rule": "traversal",
        "max_depth": 3,
    }


def mixed_call() -> Arguments:
    """A grammar's mask, chosen siblings beside drawn ones, and a draft over fewer tokens that hands over laws."""
    call = tree_call()
    return call | {
        "draft_logits": torch.softmax(call["draft_logits"][..., :9], -1),
        "draft_inputs": "probabilities",
        "draft_ids": torch.arange(9) * 4,
        "bitmask": torch.full((3, 5, 2), -1, dtype=torch.int32),
        "point_nodes": torch.tensor([False, False, True, False, True]),
    }


def candidates_call() -> Arguments:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    return {"draft_logits": logits, "k": 3, "seeds": torch.arange(6), "step": 2}


def attention_call() -> Arguments:
    generator = torch.Generator().manual_seed(0)
    return {
        "query": torch.randn(2, 4, 5, 16, generator=generator),
        "key": torch.randn(2, 2, 20, 16, generator=generator),
        "value": torch.randn(2, 2, 20, 16, generator=generator),
        "ancestors": ancestor_bits(torch.tensor([-1, 0, 0, 1, 1])),
        "prefix_lengths": torch.tensor([7, 0]),
    }


def paged_call() -> Arguments:
    generator = torch.Generator().manual_seed(0)
    return attention_call() | {
        "key": torch.randn(9, 2, 5, 16, generator=generator),
        "value": torch.randn(9, 2, 5, 16, generator=generator),
        "block_table": torch.arange(8, dtype=torch.int32).reshape(2, 4),
        "window": 3,
        "softcap": 4.0,
        "scale": 0.3,
        "sinks": torch.zeros(4),
    }


def keep_call() -> Arguments:
    cache = torch.arange(2 * 2 * 20 * 4).float().reshape(2, 2, 20, 4)
    return {
        "key": cache,
        "value": -cache,
        "prefix_lengths": torch.tensor([7, 0]),
        "path": torch.tensor([[0, 2, 4], [0, 1, -1]], dtype=torch.int32),
        "length": torch.tensor([3, 2], dtype=torch.int32),
    }


CALLS: list[Any] = [
    pytest.param(verify, tree_call, id="verify"),
    pytest.param(verify, rows_call, id="verify-rows-and-tensor-parameters"),
    pytest.param(verify, lambda: tree_call() | {"proposal": "point", "draft_logits": None}, id="verify-without-draft"),
    pytest.param(verify, mixed_call, id="verify-masked-mixed-smaller-draft"),
    pytest.param(draw_uniforms, lambda: {"seeds": torch.arange(4), "step": 3, "count": 7}, id="draw_uniforms"),
    pytest.param(
        draw_uniforms,
        lambda: {"seeds": torch.arange(4), "step": torch.arange(4), "count": 7},
        id="draw_uniforms-a-step-each",
    ),
    pytest.param(draw_candidates, candidates_call, id="draw_candidates"),
    pytest.param(
        draw_candidates,
        lambda: candidates_call() | {
            "proposal": "greedy", "nodes": torch.arange(6), "step": torch.arange(6),
            "sampling": SamplingParams(temperature=torch.ones(6), top_k=5),
        },
        id="draw_candidates-with-everything",
    ),
    pytest.param(
        row_cutoffs,
        lambda: {
            "logits": candidates_call()["draft_logits"],
            "sampling": SamplingParams(top_k=5, top_p=torch.full((6,), 0.9)),
        },
        id="row_cutoffs",
    ),
    pytest.param(ancestor_bits, lambda: {"parents": torch.tensor([-1, 0, 0, 1])}, id="ancestor_bits-shared"),
    pytest.param(ancestor_bits, lambda: {"parents": torch.tensor([[-1, 0, 0, 1]] * 3)}, id="ancestor_bits-batched"),
    pytest.param(
        tree_attention_mask,
        lambda: {"parents": torch.tensor([-1, 0, 0, 1]), "prefix_lengths": torch.tensor([2, 0, 5]), "total": 11},
        id="tree_attention_mask",
    ),
    pytest.param(tree_attention, attention_call, id="tree_attention"),
    pytest.param(tree_attention, paged_call, id="tree_attention-with-everything"),
    pytest.param(keep_path, keep_call, id="keep_path"),
    pytest.param(node_depths, lambda: {"ancestors": ancestor_bits(torch.arange(-1, 40))}, id="node_depths"),
]  # fmt: skip

# The operators of each public function, as its arguments reach them.
OPERATORS: list[Any] = [
    pytest.param(name, arguments, id=f"{name}-{note}")
    for name, note, arguments in [
        (
            "verify",
            "dense",
            lambda: (
                *tree_call().values(), None, None, [1.0, 0.0, 1.0, 0.0], [None] * 4, [0.5, 4.0, 0.9, 0.0], [None] * 4,
                "without_replacement", "recursive", 4, "logits", "logits", None, None, None, "torch",
            ),
        ),
        (
            "verify",
            "rows",
            lambda: (
                *list(rows_call().values())[:7], [0.0, 9.0, 0.0, 0.0], [torch.ones(3), None, torch.ones(3), None],
                [1.0, 0.0, 1.0, 0.0], [None] * 4, "with_replacement", "traversal", 2,
                "logits", "probabilities", torch.ones(5, dtype=torch.bool), torch.full((3, 5, 2), -1).int(),
                torch.arange(40), "torch",
            ),
        ),
        ("draw_uniforms", "one-step", lambda: (torch.arange(4), 3, None, 7, "torch")),
        ("draw_uniforms", "a-step-each", lambda: (torch.arange(4), 0, torch.arange(4), 7, "torch")),
        (
            "draw_candidates",
            "plain",
            lambda: (
                *candidates_call().values(), None, "without_replacement", [1.0, 0.0, 1.0, 0.0], [None] * 4, None,
                "torch",
            ),
        ),
        (
            "draw_candidates",
            "tensors",
            lambda: (
                torch.randn(6, 40).half(), 3, torch.arange(6), 0, torch.arange(6), "greedy", [0.0, 5.0, 1.0, 0.0],
                [torch.ones(6), None, None, None], torch.arange(6), "torch",
            ),
        ),
        (
            "row_cutoffs",
            "mixed",
            lambda: (torch.randn(3, 40), [1.0, 5.0, 0.9, 0.0], [torch.ones(3), None, None, None], "torch"),
        ),
        ("ancestor_bits", "shared", lambda: (torch.tensor([-1, 0, 0, 1]), "torch")),
        ("ancestor_bits", "batched", lambda: (torch.tensor([[-1, 0, 0, 1]] * 3, dtype=torch.int32), "torch")),
        ("node_depths", "two-words", lambda: (ancestor_bits(torch.arange(-1, 40)), "torch")),
        ("tree_attention_mask", "ragged", lambda: (torch.tensor([-1, 0, 0]), torch.tensor([2, 0]), 9, "torch")),
        ("tree_attention", "plain", lambda: (*attention_call().values(), 0.25, None, None, None, None, "torch")),
        (
            "tree_attention",
            "everything",
            lambda: (
                *list(paged_call().values())[:5], 0.25, 3, 4.0, paged_call()["block_table"], torch.zeros(4),
                "torch",
            ),
        ),
        ("keep_path", "ragged", lambda: (*keep_call().values(), "torch")),
    ]
]  # fmt: skip


def moved(value: Any, device: torch.device) -> Any:
    """`value` with the tensors in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, SamplingParams):
        return SamplingParams(**{name: moved(getattr(value, name), device) for name in value.__dataclass_fields__})
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    return value


def tensors(result: Any) -> list[torch.Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, torch.Tensor) else list(result)


def changed(function: Callable[..., Any], arguments: Arguments, result: Any) -> list[torch.Tensor]:
    """What a call gives: its results, or for the one operation in place the arguments that it has changed."""
    return [arguments["key"], arguments["value"]] if function is keep_path else tensors(result)


# ---- registration


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(NAMESPACE).split(".")[0] for name in names if name.startswith(NAMESPACE)}


def test_every_operator_is_checked_here() -> None:
    assert registered() == {parameters.values[0] for parameters in OPERATORS}


def test_every_public_function_is_called_here() -> None:
    functions = {getattr(mcsd_kernels, name) for name in mcsd_kernels.__all__}
    functions = {function for function in functions if not isinstance(function, type)}
    assert functions == {parameters.values[0] for parameters in CALLS}


@pytest.mark.parametrize(("name", "arguments"), OPERATORS)
def test_opcheck(name: str, arguments: Callable[[], tuple[Any, ...]], device: torch.device) -> None:
    """Schema, mutation, autograd registration, fake kernel, and tracing with dynamic shapes."""
    torch.library.opcheck(getattr(torch.ops.mcsd_kernels, name).default, moved(arguments(), device))


# ---- torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("function", "arguments"), CALLS)
def test_compiles_without_a_graph_break(
    function: Callable[..., Any], arguments: Callable[[], Arguments], backend: str, device: torch.device
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    mine, theirs = moved(arguments(), device), moved(arguments(), device)
    wanted = changed(function, mine, function(**mine))
    found = changed(function, theirs, compiled(**theirs))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_decoding_step_is_one_graph_for_any_batch(device: torch.device) -> None:
    """Draw, verify and keep in one graph; another batch size and another step compile nothing more after the second."""
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def step(logits: torch.Tensor, seeds: torch.Tensor, at: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        parents = torch.tensor([-1, 0, 0, 0], device=logits.device)
        sampling = SamplingParams(temperature=0.8, top_k=20)
        children = draw_candidates(logits[:, 0], 3, seeds, at, sampling=sampling)
        tokens = torch.cat([torch.zeros_like(seeds)[:, None], children], 1)
        verified = verify(
            logits, logits + 1, tokens, parents, draw_uniforms(seeds, at, 6), sampling=sampling, max_depth=1
        )
        keep_path(cache, cache.clone(), torch.zeros_like(seeds), verified.path, verified.length)
        return verified.tokens

    compiled = torch.compile(step, fullgraph=True, backend=count, dynamic=True)
    for i, batch in enumerate((3, 5, 8)):
        logits = torch.randn(batch, 4, 50, generator=torch.Generator().manual_seed(i)).to(device)
        seeds, at = torch.arange(batch, device=device), torch.full((batch,), i, device=device)
        caches = [torch.arange(batch * 40, device=device).float().reshape(batch, 1, 10, 4) for _ in range(2)]
        assert torch.equal(compiled(logits, seeds, at, caches[0]), step(logits, seeds, at, caches[1]))
        assert torch.equal(*caches)
    assert graphs == 1


def test_a_mistake_is_named_while_compiling(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda parents: ancestor_bits(parents), backend="eager")
    with pytest.raises(Exception, match="parents: expected a"):
        compiled(torch.zeros(1, 1, 1, dtype=torch.int64, device=device))


# ---- fake tensors: no values, so whoever reads one on the host fails

FAKE_DEVICES = [
    pytest.param("device", id="where-the-tests-run"),
    # The name of torch's module is the type of the device. Fake tensors need no such device to be there.
    pytest.param(torch.cuda.__name__.rpartition(".")[2], id="an-accelerator"),
]


@pytest.mark.parametrize("where", FAKE_DEVICES)
@pytest.mark.parametrize(("function", "arguments"), CALLS)
def test_shapes_are_known_without_values(
    function: Callable[..., Any], arguments: Callable[[], Arguments], where: str, device: torch.device
) -> None:
    real = moved(arguments(), device)
    wanted = changed(function, real, function(**real))
    fake_device = device if where == "device" else torch.device(where, 0)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def faked(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                with mode:
                    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=fake_device)
            if isinstance(value, SamplingParams):
                return SamplingParams(**{name: faked(getattr(value, name)) for name in value.__dataclass_fields__})
            return value

        inputs = {name: faked(value) for name, value in arguments().items()}
        found = changed(function, inputs, function(**inputs))
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert a.device == fake_device


@pytest.mark.parametrize(("function", "arguments"), CALLS)
def test_meta_tensors(function: Callable[..., Any], arguments: Callable[[], Arguments]) -> None:
    """A dry run: shapes and checks without memory."""
    real = arguments()
    wanted = changed(function, real, function(**real))
    inputs = moved(arguments(), torch.device("meta"))
    found = changed(function, inputs, function(**inputs))
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.is_meta


class OnGpu:
    """As much of a tensor as the choice of a device looks at."""

    is_cuda = True

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


def test_an_operator_runs_on_the_gpu_of_its_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    current, seen = [0], []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        try:
            yield
        finally:
            current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    run = _library._on_its_device(lambda *arguments: seen.append((current[0], len(arguments))))
    for first in (OnGpu(0), OnGpu(2), torch.zeros(1), OnGpu(1)):
        run(first, "more")
    assert seen == [(0, 2), (2, 2), (0, 2), (1, 2)] and current == [0]


@pytest.mark.parametrize("vocab", [50, 9000], ids=["short-rows", "long-rows"])
def test_inference_mode_and_gradients_do_not_matter(vocab: int) -> None:
    """A buffer made in inference mode must serve a later call outside it, and logits may want a gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, vocab, generator=generator)
    tokens, parents, seeds = torch.tensor([[0, 1, 2]] * 2), torch.tensor([-1, 0, 0]), torch.arange(2)
    uniforms = draw_uniforms(seeds, 0, 5)

    def both(target: torch.Tensor) -> list[torch.Tensor]:
        drawn = draw_candidates(target[:, 0], 2, seeds, 0)
        return [*verify(target, target.detach() + 1, tokens, parents, uniforms), drawn]

    with torch.inference_mode():
        inside = both(logits)
    for outside in (both(logits), both(logits.clone().requires_grad_())):
        for a, b in zip(inside, outside, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.7, top_k=5), SamplingParams(0.0)])
@pytest.mark.parametrize("vocab", [50, 9000], ids=["short-rows", "long-rows"])
def test_tensors_that_are_not_all_in_their_memory(vocab: int, sampling: SamplingParams) -> None:
    """A negative view has its sign beside its memory, a ZeroTensor no memory at all; NumPy takes neither."""
    rows = torch.randn(2, 5, vocab, generator=torch.Generator().manual_seed(0))
    call = tree_call() | {"draft_logits": rows, "sampling": sampling}
    for odd, plain in ((torch._neg_view(rows), -rows), (torch._efficientzerotensor(rows.shape), 0 * rows)):
        for inputs in ("logits", "probabilities"):
            laws = {"inputs": "probabilities", "sampling": SamplingParams()} if inputs == "probabilities" else {}
            small = {name: value[:2] for name, value in call.items() if name in ("tokens", "uniforms")}
            found = verify(**call | small | laws | {"target_logits": odd})
            wanted = verify(**call | small | laws | {"target_logits": plain})
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert torch.equal(*(draw_candidates(x[:, 0], 2, torch.arange(2), 0, sampling=sampling) for x in (odd, plain)))


TRANSFORMED = """
import torch
from mcsd_kernels import SamplingParams, verify
torch.manual_seed(0)
for vocab in (90, 9000, 9001):
    for dtype in (torch.float32, torch.bfloat16):
        for sampling in (SamplingParams(), SamplingParams(0.7, top_k=5)):
            target, draft = torch.randn(2, 2, 5, vocab).to(dtype)
            others = draft, torch.randint(vocab, (2, 5)), torch.tensor([-1, 0, 0, 1, 1]), torch.rand(2, 7)
            run = lambda target: verify(target, *others, sampling=sampling).tokens
            inside = torch.func.functionalize(run)(target)
            assert torch.equal(inside, run(target)) and torch.equal(run(target), run(target.clone()))
            assert int(verify(target, *others, sampling=sampling).status.sum()) == 0
try:
    torch.func.vmap(run)(target[None])
except RuntimeError as error:
    print(str(error).strip())
"""


def test_functional_transforms_keep_nothing() -> None:
    """Their tensors look like ordinary ones; memory that is kept between calls would be one of them afterwards."""
    done = subprocess.run([sys.executable, "-c", TRANSFORMED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Batching rule not implemented for mcsd_kernels::verify" in done.stdout
