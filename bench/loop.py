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
Times of a step are medians over all steps but the first, which reads the prompt.

A model and an acceptance are a group, whose rows are written when it is done; the one with targets comes first. A group
that has rows of this code and machine is left out (`MCSD_BENCH_AGAIN=1` measures it again). After `--budget` seconds
none is begun, and the one under way ends after two rounds. The last lines on stderr say which targets are met.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
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
ASSISTED = (3, 5)  # tokens
ONE_TOKEN = "mcsd one token, forwards captured"
# Set for this shape on an H200: name -> a field of the row, and the most or the least that it should be
AIMED = "llama-3-8b"
AT_MOST = {
    "<= 3 % of a target forward outside the forwards": ("outside_over_target_forward", 0.03),
    "<= 150 us a step outside the forwards": ("microseconds_outside_forwards_per_step", 150.0),
}
AT_LEAST = {">= 2.2 x greedy": ("over_greedy", 2.2), ">= 1.5 x assisted": ("over_assisted", 1.5)}


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


class Alone(Drafter):
    """The root and no candidates: plain decoding, by the same loop."""

    def propose(self, state: State) -> Proposal:
        return Proposal(state.tail[:, -1:], torch.full((1,), -1, dtype=torch.int32, device=state.device), 0)


class PartByPart(ModelDrafter):
    """As its base class, but no step is captured whole, only the models' forwards."""

    def captures(self, state: State) -> Captures | None:
        return None


class ForwardClock:
    """Time of steps, and of the forwards in them, by hooks, and in replays; on a GPU, by events on its stream.

    Args:
        models: keep their hooks; graphs of a model with other hooks are other graphs.

    Attributes:
        timing: whether forwards and replays are timed. Every replay then runs a second time and that one is timed: it
            waits for the first, and not for the host to launch it.
        marks: start and end of what was timed since `start`.
        replays: how many there were.
    """

    timing: ClassVar[bool] = False
    marks: ClassVar[list[tuple[Any, Any]]] = []
    replays: ClassVar[int] = 0

    def __init__(self, *models: PreTrainedModel) -> None:
        self.gpu = models[0].device.type == "cuda"
        self._ends: list[tuple[float, int]] = []
        self._start: Any = None
        self._hooks = [model.register_forward_pre_hook(self._enter) for model in models]
        self._hooks += [model.register_forward_hook(self._leave) for model in models]

    def _enter(self, *_: Any) -> None:
        # under capture nothing runs, and an event would become a part of the graph
        captured = self.gpu and torch.cuda.is_current_stream_capturing()
        self._start = now(self.gpu) if self.timing and not captured else None

    def _leave(self, *_: Any) -> None:
        if self._start is not None:
            self.marks.append((self._start, now(self.gpu)))

    def start(self) -> None:
        """Forget what was measured."""
        self._ends, ForwardClock.marks, ForwardClock.replays = [], [], 0

    def step(self, *_: Any) -> None:
        """A step is over, and the host has read its answer."""
        self._ends.append((time.perf_counter(), len(self.marks)))

    def walls(self) -> list[float]:
        """Seconds of each step but the first."""
        return [after - before for (before, _), (after, _) in pairwise(self._ends)]

    def forwards(self) -> list[float]:
        """The timed seconds in each step but the first."""
        synchronize(self.gpu)
        spans = [a.elapsed_time(b) / 1e3 if self.gpu else b - a for a, b in self.marks]
        return [sum(spans[before:after]) for (_, before), (_, after) in pairwise(self._ends)]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    @classmethod
    def capture(
        cls, function: Callable[[], Any], device: torch.device, pool: Any = None
    ) -> tuple[Callable[[], None], Any]:
        """`mcsd.graphs.capture`, whose replays are counted, and timed if that is wanted."""
        replay, outputs = _CAPTURE(function, device, pool)

        def counted() -> None:
            cls.replays += 1
            replay()
            if cls.timing:  # the first changed nothing that the second would not change
                start = now(device.type == "cuda")
                replay()
                cls.marks.append((start, now(device.type == "cuda")))

        return counted, outputs


_CAPTURE = graphs.capture

Run = Callable[[], tuple[torch.Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class Side:
    """One way to write the text.

    Args:
        run: writes it; returns it, and what the row says of it.
        first: the turn it begins with. What is captured settles in two turns before the forwards' own, which is -1;
            the others are warm after one.
        forwards: of which side; None: forwards are not told from the rest.
        shape: of its trees.
    """

    run: Run
    first: int = -1
    forwards: str | None = None
    shape: tuple[int, ...] | None = None


def main() -> int:
    """Print and write one row a side; 1 if a side could not be timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, rows to $OUT if that is set")
    parser.add_argument("--model", action="append", choices=("llama-3.2-1b", "llama-3-8b"))
    parser.add_argument("--acceptance", action="append", type=float)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no group is begun")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget
    graphs.capture = ForwardClock.capture
    logging.basicConfig()
    logging.getLogger("mcsd").setLevel(logging.INFO)  # what is captured, and what cannot be
    device = torch.device("cpu" if options.smoke or not torch.cuda.is_available() else "cuda")
    if device.type == "cpu" and not options.smoke:
        parser.error("expected a GPU; --smoke runs tiny shapes on the CPU")
    dtype = torch.float32 if options.smoke else torch.bfloat16
    if options.smoke:
        options.prompt, options.tokens, options.rounds = 12, 12, 2
    os.environ["MCSD_BENCH_RECORD"] = "" if options.smoke and not os.environ.get("OUT") else "1"
    here = {
        "prompt": options.prompt,
        "new_tokens": options.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    groups = [
        {"bench": "loop", "target": name, "acceptance": acceptance, **here}
        for name in (["smoke"] if options.smoke else options.model or [AIMED, "llama-3.2-1b"])
        for acceptance in options.acceptance or ([0.6] if options.smoke else [0.6, 0.8])
    ]
    left = [group for group in groups if not harness.recorded("loop_gpu", [group])]
    if len(left) < len(groups):
        say(f"{len(groups) - len(left)} of {len(groups)} groups have rows of this code and machine")
    built, failed = None, 0
    for number, group in enumerate(left):
        if time.monotonic() > deadline:
            names = "; ".join(f"{group['target']}, acceptance {group['acceptance']:g}" for group in left[number:])
            say(f"left out after {options.budget:g} s: {names}")
            break
        name = group["target"]
        if name != built:
            built, target = name, None  # one goes before the next one comes
            cycle = Cycle(SHAPES[name][-1], device)
            target = model_of(name, cycle.follows, device, dtype)
        table = cycle.known(group["acceptance"])
        assistant = model_of("smoke-assistant" if options.smoke else "assistant", table, device, dtype)
        failed += compare(group, target, assistant, table, cycle, options.rounds, deadline)
        del assistant
    rows = [row for row in harness.read(harness.path_of("loop_gpu")) if row.get("code") == harness.code()]
    for line in verdicts([row for row in rows if row.get("device") == here["device"]]):
        say(line)
    return 1 if failed else 0


def sides_of(
    group: dict[str, Any],
    target: PreTrainedModel,
    assistant: PreTrainedModel,
    table: torch.Tensor,
    cycle: Cycle,
    clock: ForwardClock,
) -> dict[str, Side]:
    """All that write a group's text, by name."""
    tokens = group["new_tokens"]
    ids = torch.tensor([cycle.text(0, group["prompt"])], device=target.device)
    mask = torch.ones_like(ids)

    def hugging_face(**settings: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        text = target.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=cycle.vocab - 1,
            **settings,
        )
        return text, {}

    def assisted(count: int) -> Run:
        def run() -> tuple[torch.Tensor, dict[str, Any]]:
            assistant.generation_config.num_assistant_tokens = count
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = 0.0
            return hugging_face(assistant_model=assistant)

        return run

    def ours(drafter: Drafter, captured: bool = True) -> Run:
        def run() -> tuple[torch.Tensor, dict[str, Any]]:
            found = mcsd.generate(
                target,
                drafter,
                ids,
                mask,
                max_new_tokens=tokens,
                temperature=0.0,
                graphs=captured,
                callback=clock.step,
            )
            stats = found.stats
            return found.sequences, {
                "steps": stats.target_calls,
                "replays": clock.replays,
                "tokens_per_call": round(stats.tokens_per_call, 3),
                "acceptance_by_depth": [round(a, 3) for a in stats.acceptance_by_depth],
            }

        return run

    sides = {"transformers greedy": Side(hugging_face)}
    sides |= {f"transformers assisted, {count} tokens": Side(assisted(count)) for count in ASSISTED}
    sides[ONE_TOKEN] = Side(ours(Alone()), -3, ONE_TOKEN, ())
    for shape in TREES:
        for name, whole, parts in (
            ("controlled", Controlled(table, shape), Controlled(table, shape, whole=False)),
            ("assistant", ModelDrafter(assistant, shape, "point"), PartByPart(assistant, shape, "point")),
        ):
            side = f"mcsd {name} {shape}"
            apart = f"{side}, forwards captured"
            sides |= {side: Side(ours(whole), -3, apart, shape), apart: Side(ours(parts), -3, apart, shape)}
    eager = f"mcsd controlled {TREES[0]}, eager"
    sides[eager] = Side(ours(Controlled(table, TREES[0]), captured=False), -2, eager, TREES[0])
    return sides


def compare(
    group: dict[str, Any],
    target: PreTrainedModel,
    assistant: PreTrainedModel,
    table: torch.Tensor,
    cycle: Cycle,
    rounds: int,
    deadline: float,
) -> int:
    """All sides of one target and acceptance, in turns; one row each. Returns how many could not be timed."""
    clock = ForwardClock(target, assistant)
    sides = sides_of(group, target, assistant, table, cycle, clock)
    wanted = cycle.text(0, group["prompt"] + group["new_tokens"])
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    walls: dict[str, list[float]] = {name: [] for name in sides}
    forwards: dict[str, float] = {}
    details: dict[str, dict[str, Any]] = {}
    left = dict(sides)
    for turn in range(-3, rounds):
        if turn >= 2 and time.monotonic() > deadline:
            break
        ForwardClock.timing = turn == -1
        for name, side in list(left.items()):
            if turn < side.first:
                continue
            synchronize(clock.gpu)
            clock.start()
            start = time.perf_counter()
            try:
                text, details[name] = side.run()
                synchronize(clock.gpu)
                elapsed = time.perf_counter() - start
                assert text[0].tolist() == wanted, "it did not write the text that it must write"
            except Exception:
                traceback.print_exc()
                say(f"{name}: not timed")
                del left[name]
                continue
            if turn == -1 and side.forwards:
                forwards[name] = statistics.median(clock.forwards())
            elif turn >= 0:
                seconds[name].append(elapsed)
                walls[name] += clock.walls()
    clock.close()
    medians = {name: statistics.median(seconds[name]) for name in left}
    greedy = medians.get("transformers greedy")
    assisted = min((median for name, median in medians.items() if "assisted" in name), default=None)
    for name, median in medians.items():
        row = {
            **group,
            "side": name,
            "rounds": len(seconds[name]),
            "seconds": harness.spread(seconds[name]),
            "tokens_per_second": round(group["new_tokens"] / median, 2),
            "over_greedy": greedy and round(greedy / median, 3),
            "over_assisted": assisted and round(assisted / median, 3),
            **details[name],
            **of_a_step(name, sides[name], walls[name], forwards),
        }
        harness.record("loop_gpu", row | {"targets": targets(row)})
    return len(sides) - len(left)


def of_a_step(name: str, side: Side, walls: list[float], forwards: dict[str, float]) -> dict[str, Any]:
    """What a row says of a step.

    Args:
        name, side: whose row.
        walls: seconds of its steps.
        forwards: side -> median seconds in a step's forwards, or in its replay where a step is captured whole.
    """
    if side.forwards not in forwards:
        return {}
    wall, inside = statistics.median(walls) * 1e6, forwards[side.forwards] * 1e6
    row = {
        "microseconds_per_step": wall,
        "microseconds_in_forwards_per_step": inside,
        "microseconds_outside_forwards_per_step": wall - inside,
    }
    if side.forwards != name:
        row["microseconds_in_replay_per_step"] = forwards[name] * 1e6
    alone = {"target": f"mcsd controlled {side.shape}, forwards captured", "one_token": ONE_TOKEN}
    row |= {f"microseconds_of_a_{kind}_forward": forwards[of] * 1e6 for kind, of in alone.items() if of in forwards}
    row = {field: round(value, 1) for field, value in row.items()}
    if "microseconds_of_a_target_forward" in row:
        row["outside_over_target_forward"] = round((wall - inside) / row["microseconds_of_a_target_forward"], 4)
    return row


def targets(row: dict[str, Any]) -> dict[str, bool]:
    """Which targets a row has, and whether it meets them: those of whole steps, and of (4, 2, 2) at acceptance 0.6."""
    if row["target"] != AIMED or "microseconds_in_replay_per_step" not in row:
        return {}
    at_least = AT_LEAST if str(TREES[0]) in row["side"] and row["acceptance"] == 0.6 else {}
    found = {name: row[field] <= most for name, (field, most) in AT_MOST.items() if row.get(field) is not None}
    return found | {name: row[field] >= least for name, (field, least) in at_least.items() if row[field] is not None}


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each target of the newest row of each case."""
    lines = {}
    for row in rows:
        for name, met in row.get("targets", {}).items():
            case = f"{row['target']}, acceptance {row['acceptance']:g}, {row['side']}"
            figure = row[(AT_MOST | AT_LEAST)[name][0]]
            lines[case, name] = f"{'met' if met else 'MISSED'}: {case}: {name}: {figure}"
    return list(lines.values())


def now(gpu: bool) -> Any:
    """An event on the GPU's stream, or the time."""
    if not gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def synchronize(gpu: bool) -> None:
    """Wait for the GPU, if there is one."""
    if gpu:
        torch.cuda.synchronize()


def say(text: str) -> None:
    """A line on stderr; stdout is for rows."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
