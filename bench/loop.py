"""The loop on a GPU: what a step costs outside the forwards, and tokens a second, for models of real size.

PYTHONPATH=. python bench/loop.py            # Llama-3.2-1B and 8B shapes on the GPU
PYTHONPATH=. python bench/loop.py --smoke    # tiny shapes on the CPU, some seconds

The models have random layers, so every forward costs what it costs in a trained model of that shape, but the text is
known: the embedding outweighs the layers by more than the format can hold, and the head maps each token to its
successor on one long cycle. Every side must write exactly that text, or it is not timed. An assistant model, or a
drafter that costs next to nothing, knows the successor of a given share of the tokens: that is the acceptance.

transformers' `generate` gets its attention mask, a padding token that is no token of the text, and models whose
`forward` is their own. Forwards are timed by hooks, and replays of captured graphs by events, in a turn of their own in
which each is replayed twice and the second one is timed. A side whose steps are captured whole has its forwards inside
one graph, so its time outside them is its wall time less what the same forwards take where only they are captured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import harness
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import mcsd
from mcsd import Drafter, ModelDrafter, Proposal, State, graphs
from mcsd.drafters.base import Captures
from mcsd.trees import StaticTree, parents_of

# hidden, intermediate, layers, heads, key-value heads, head width, vocabulary
SHAPES = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "assistant": (2048, 8192, 2, 32, 8, 64, 128256),
    "smoke": (64, 96, 2, 4, 2, 16, 499),
    "smoke-assistant": (64, 96, 1, 4, 2, 16, 499),
}
OUTWEIGHS = 1e6
TREES = ((4, 2, 2), (1, 1, 1))


class Cycle:
    """One cycle through all tokens but the last, which pads: the text of every model here.

    Args:
        vocab: size of the vocabulary.
        device: of the tables.
    """

    def __init__(self, vocab: int, device: torch.device) -> None:
        order = torch.randperm(vocab - 1, generator=torch.Generator().manual_seed(0))
        follows = torch.full((vocab,), vocab - 1)
        follows[order] = order.roll(-1)
        self.follows = follows.to(device)
        self.coins = torch.rand(vocab, generator=torch.Generator().manual_seed(1)).to(device)
        self.vocab, self.order = vocab, order.tolist()

    def known(self, acceptance: float) -> torch.Tensor:
        """`[vocab]` int64: the successor of this share of the tokens, another token for the rest."""
        wrong = (self.follows + 1) % (self.vocab - 1)
        return torch.where(self.coins < acceptance, self.follows, wrong)

    def text(self, start: int, length: int) -> list[int]:
        """Part of the cycle."""
        return [self.order[(start + i) % len(self.order)] for i in range(length)]


def model_of(shape: str, follows: torch.Tensor, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama whose layers are random and whose next token is `follows[token]`."""
    hidden, intermediate, layers, heads, kv_heads, width, vocab = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    random = torch.Generator(device).manual_seed(2)
    direction = torch.randn(vocab, hidden, generator=random, device=device)
    direction /= direction.norm(dim=1, keepdim=True)
    model.model.embed_tokens.weight.copy_(direction * OUTWEIGHS)
    model.lm_head.weight.zero_().index_add_(0, follows, (direction * hidden**-0.5).to(dtype))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, None)
    return model


class Controlled(Drafter):
    """The tree of some branching factors; the first child of a node is what a table says, the others are wrong.

    Args:
        table: `[vocab]` int64, the successor of each token.
        branching: children of a node at depth 0, 1, ...
        whole: let its steps be captured as one graph, not only the target's forwards.
    """

    def __init__(self, table: torch.Tensor, branching: tuple[int, ...], whole: bool = True) -> None:
        self.table, self.branching, self.whole = table, branching, whole

    def propose(self, state: State) -> Proposal:
        tree = StaticTree.of(parents_of(self.branching), state.device)
        levels = [state.tail[:, -1:]]
        for width in self.branching:
            ranks = torch.arange(width, device=state.device)
            first = self.table[levels[-1]]
            # one later for each rank; the last token pads and is never proposed
            children = (first[..., None] + ranks) % (len(self.table) - 1)
            levels.append(children.flatten(1))
        return Proposal(
            torch.cat(levels, 1),
            tree.parents,
            tree.depth,
            ancestors=tree.node_ancestors,
            node_depth=tree.node_depth,
        )

    def captures(self, state: State) -> Captures | None:
        return Captures(len(parents_of(self.branching)), (id(self.table), self.branching)) if self.whole else None


class ForwardClock:
    """Time inside models' forwards, by hooks, and in replays; on a GPU, by events on its stream.

    Args:
        models: keep their hooks; graphs of a model with other hooks are other graphs.
    """

    replays: ClassVar[list[tuple[Any, Any]]] = []
    twice: ClassVar[bool] = False
    """Run every replay a second time and time that one: it waits for the first, and not for the host to launch it."""

    def __init__(self, *models: PreTrainedModel) -> None:
        self.gpu = models[0].device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []
        self._hooks = [model.register_forward_pre_hook(self._enter) for model in models]
        self._hooks += [model.register_forward_hook(self._leave) for model in models]

    def _now(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, *_: Any) -> None:
        self._start = None if self._is_captured() else self._now()

    def _leave(self, *_: Any) -> None:
        if self._start is not None:
            self.marks.append((self._start, self._now()))

    def _is_captured(self) -> bool:
        """Whether nothing runs now, and an event would become a part of the graph."""
        return self.gpu and torch.cuda.is_current_stream_capturing()

    def start(self) -> None:
        """Forget what was measured."""
        self.marks, ForwardClock.replays = [], []

    def seconds(self) -> float:
        """In forwards and replays, since `start`."""
        if self.gpu:
            torch.cuda.synchronize()
            return sum(a.elapsed_time(b) for a, b in self.marks + self.replays) / 1e3
        return sum(b - a for a, b in self.marks)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    @classmethod
    def capture(
        cls, function: Callable[[], Any], device: torch.device, pool: Any = None
    ) -> tuple[Callable[[], None], Any]:
        """`mcsd.graphs.capture`, whose replays are timed."""
        replay, outputs = _CAPTURE(function, device, pool)

        def timed() -> None:
            if cls.twice:  # the first changes nothing that the second would not change
                replay()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            replay()
            after.record()
            cls.replays.append((before, after))

        return timed, outputs


_CAPTURE = graphs.capture


def main() -> None:
    """Print and write one row a side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--model", action="append", choices=("llama-3.2-1b", "llama-3-8b"))
    parser.add_argument("--acceptance", action="append", type=float)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    graphs.capture = ForwardClock.capture
    device = torch.device("cpu" if options.smoke or not torch.cuda.is_available() else "cuda")
    if device.type == "cpu" and not options.smoke:
        parser.error("expected a GPU; --smoke runs tiny shapes on the CPU")
    dtype = torch.float32 if options.smoke else torch.bfloat16
    if options.smoke:
        options.prompt, options.tokens, options.rounds = 12, 12, 2
    names = ["smoke"] if options.smoke else options.model or ["llama-3.2-1b", "llama-3-8b"]
    for name in names:
        cycle = Cycle(SHAPES[name][-1], device)
        target = model_of(name, cycle.follows, device, dtype)
        for acceptance in options.acceptance or ([0.6] if options.smoke else [0.6, 0.8]):
            table = cycle.known(acceptance)
            assistant = model_of("smoke-assistant" if options.smoke else "assistant", table, device, dtype)
            compare(name, target, assistant, table, cycle, acceptance, options)
            del assistant
        del target


def compare(
    name: str,
    target: PreTrainedModel,
    assistant: PreTrainedModel,
    table: torch.Tensor,
    cycle: Cycle,
    acceptance: float,
    options: argparse.Namespace,
) -> None:
    """All sides of one target and acceptance, in turns; one row each."""
    device = target.device
    ids = torch.tensor([cycle.text(0, options.prompt)], device=device)
    mask = torch.ones_like(ids)
    wanted = cycle.text(0, options.prompt + options.tokens)

    def hugging_face(**settings: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        text = target.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=options.tokens,
            do_sample=False,
            pad_token_id=cycle.vocab - 1,
            **settings,
        )
        return text, {}

    def assisted(count: int) -> Callable[[], tuple[torch.Tensor, dict[str, Any]]]:
        def run() -> tuple[torch.Tensor, dict[str, Any]]:
            assistant.generation_config.num_assistant_tokens = count
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = 0.0
            return hugging_face(assistant_model=assistant)

        return run

    def ours(drafter: Drafter, captured: bool = True) -> Callable[[], tuple[torch.Tensor, dict[str, Any]]]:
        def run() -> tuple[torch.Tensor, dict[str, Any]]:
            found = mcsd.generate(
                target, drafter, ids, mask, max_new_tokens=options.tokens, temperature=0.0, graphs=captured
            )
            stats = found.stats
            return found.sequences, {
                "steps": stats.target_calls,
                "tokens_per_call": round(stats.tokens_per_call, 3),
                "acceptance_by_depth": [round(a, 3) for a in stats.acceptance_by_depth],
            }

        return run

    sides: dict[str, Callable[[], tuple[torch.Tensor, dict[str, Any]]]] = {
        "transformers greedy": hugging_face,
        **{f"transformers assisted, {count} tokens": assisted(count) for count in (3, 5)},
    }
    for shape in TREES:
        sides[f"mcsd controlled {shape}"] = ours(Controlled(table, shape))
        sides[f"mcsd controlled {shape}, forwards captured"] = ours(Controlled(table, shape, whole=False))
    sides |= {
        f"mcsd controlled {TREES[0]}, eager": ours(Controlled(table, TREES[0]), captured=False),
        **{f"mcsd assistant {shape}": ours(ModelDrafter(assistant, shape, "point")) for shape in TREES},
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    forwards: dict[str, float] = {}
    details: dict[str, dict[str, Any]] = {}
    clock = ForwardClock(target, assistant)
    for turn in range(-3, options.rounds):
        ForwardClock.twice = turn == -1  # two turns to warm up, and one for the forwards alone
        for side, run in sides.items():
            synchronize(device)
            clock.start()
            start = time.perf_counter()
            text, details[side] = run()
            synchronize(device)
            elapsed = time.perf_counter() - start
            if text[0].tolist() != wanted:
                raise AssertionError(f"{side} did not write the text it must write; not timed")
            if turn == -1:
                forwards[side] = clock.seconds()
            elif turn >= 0:
                seconds[side].append(elapsed)
    clock.close()
    plain = harness.spread(seconds["transformers greedy"])["median"]
    best = min(harness.spread(seconds[f"transformers assisted, {count} tokens"])["median"] for count in (3, 5))
    for side in sides:
        spread = harness.spread(seconds[side])
        steps = details[side].get("steps")
        row = {
            "bench": "loop",
            "target": name,
            "side": side,
            "acceptance": acceptance,
            "prompt": options.prompt,
            "new_tokens": options.tokens,
            "dtype": str(target.dtype).removeprefix("torch."),
            "seconds": spread,
            "tokens_per_second": round(options.tokens / spread["median"], 2),
            "over_greedy": round(plain / spread["median"], 3),
            "over_assisted": round(best / spread["median"], 3),
            **details[side],
        }
        # where a whole step is one graph, the forwards' own time comes from the side that captures nothing else
        apart = side if side.endswith(("captured", "eager")) else f"{side}, forwards captured"
        if steps:
            row["microseconds_per_step"] = round(spread["median"] / steps * 1e6, 1)
        if steps and apart in sides:
            outside = statistics.median(seconds[side]) - forwards[apart]
            row["microseconds_outside_forwards_per_step"] = round(outside / steps * 1e6, 1)
        write(row, options.smoke)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def write(row: dict[str, Any], smoke: bool) -> None:
    """Print a row and append it to `$OUT/loop_gpu.jsonl`, or to `bench/results`; a smoke run only where OUT says."""
    row = {**row, "date": time.strftime("%Y-%m-%d"), "machine": harness.machine()}
    if torch.cuda.is_available():
        row["machine"]["gpu"] = torch.cuda.get_device_name()
    print(json.dumps(row), flush=True)
    folder = os.environ.get("OUT")
    if folder or not smoke:
        path = Path(folder) if folder else Path(__file__).parent / "results"
        path.mkdir(parents=True, exist_ok=True)
        with open(path / "loop_gpu.jsonl", "a") as out:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
