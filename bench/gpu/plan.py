"""What is measured, in which order: data alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

RULES = ("recursive", "traversal")
PROPOSALS = ("without_replacement", "with_replacement", "greedy", "point")

# Vocabularies of Llama 2, Llama 3, Qwen 2.5 and Gemma
VOCABULARIES = (32_000, 128_256, 151_936, 262_144)
BATCHES = (1, 8, 64, 256)

# The last two have 64 and 256 nodes, the root included.
CHAIN, SMALL, DEEP, NODES_64, NODES_256 = (1, 1, 1, 1), (4, 2, 2), (4, 2, 2, 1, 1), (3, 4, 4), (3, 4, 4, 4)
TREES = (CHAIN, SMALL, DEEP, NODES_64, NODES_256)

NO_FILTERS, FILTERED = "none", "top-k 50, top-p 0.9"
SAMPLING: dict[str, dict[str, float]] = {
    NO_FILTERS: {},
    FILTERED: {"top_k": 50, "top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
}


@dataclass(frozen=True)
class Tree:
    """A tree given by its branching factors, nodes numbered level by level."""

    branching: tuple[int, ...]

    @property
    def parents(self) -> list[int]:
        parents, level = [-1], [0]
        for width in self.branching:
            following = []
            for node in level:
                following += range(len(parents), len(parents) + width)
                parents += [node] * width
            level = following
        return parents

    @property
    def depth(self) -> int:
        return len(self.branching)

    def children(self) -> dict[int, list[int]]:
        """The children of each node that has any."""
        found: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                found.setdefault(parent, []).append(node)
        return found


@dataclass(frozen=True)
class Case:
    """One shape of `verify` to be timed, without filters and with, beside rivals of some kinds."""

    batch: int
    tree: tuple[int, ...]
    vocab: int
    rule: str = "recursive"
    proposal: str = "without_replacement"
    rivals: tuple[str, ...] = ("preparation", "textbook")

    @property
    def unit(self) -> str:
        tree = ",".join(map(str, self.tree))
        return f"verify batch={self.batch} tree={tree} vocab={self.vocab} {self.rule} {self.proposal} " + "+".join(
            self.rivals
        )

    @property
    def nodes(self) -> int:
        return len(Tree(self.tree).parents)

    def as_row(self) -> dict[str, Any]:
        shape = asdict(self) | {"tree": list(self.tree), "nodes": self.nodes, "dtype": "bfloat16"}
        del shape["rivals"]
        return shape


@dataclass(frozen=True)
class RowCase:
    """One shape of an operation on rows of logits to be timed."""

    operation: str
    rows: int
    vocab: int
    filters: str = NO_FILTERS
    k: int = 4
    proposal: str = "without_replacement"

    @property
    def unit(self) -> str:
        if self.operation == "draw_uniforms":
            return f"draw_uniforms rows={self.rows}"
        more = f" k={self.k} {self.proposal}" if self.operation == "draw_candidates" else ""
        return f"{self.operation} rows={self.rows} vocab={self.vocab}{more}, filters {self.filters}"


def verify_cases() -> Iterator[Case]:
    """Those with a target first; then vocabulary by vocabulary; then the compiled textbook and the other rules.

    The textbook runs beside every shape of the matrix. The compiler takes a minute a shape, so it is compiled for
    short trees and 128,256 tokens only.
    """
    seen = set()
    aimed = [Case(batch, NODES_64, 128_256) for batch in (1, 64, 256)]
    matrix = [
        Case(batch, tree, vocab) for vocab in (128_256, 151_936, 32_000, 262_144) for batch in BATCHES for tree in TREES
    ]
    compiled = [
        Case(batch, tree, 128_256, rivals=("preparation", "textbook", "compiled textbook"))
        for batch, tree in (*((batch, tree) for tree in (SMALL, CHAIN) for batch in (1, 64, 8, 256)), (64, DEEP))
    ]
    others = [
        Case(batch, tree, 128_256, rule, proposal, ("preparation",))
        for rule in reversed(RULES)
        for proposal in PROPOSALS
        for batch in (1, 64)
        for tree in (CHAIN, NODES_64)
    ]
    # some shapes of the compiled textbook and of traversal come before the long tail of the matrix
    early = [*aimed, *matrix[: len(BATCHES) * len(TREES)], *compiled[:2], *others[:4]]
    for case in [*early, *matrix, *compiled, *others]:
        if case not in seen:
            seen.add(case)
            yield case


def row_cases() -> Iterator[RowCase]:
    """The candidates of a 64-node tree and of a level first."""
    filters = (NO_FILTERS, FILTERED)
    for vocab in (128_256, 151_936, 32_000, 262_144):
        for rows in (1, 8, 64, 256, 1024):
            for some in filters:
                yield RowCase("draw_candidates", rows, vocab, some)
            yield RowCase("row_cutoffs", rows, vocab, FILTERED)
        if vocab == 128_256:
            for rows in (1, 64, 256):
                yield RowCase("draw_uniforms", rows, 0)
            for proposal in PROPOSALS[1:]:
                yield RowCase("draw_candidates", 64, vocab, proposal=proposal)
            for k in (1, 8):
                yield RowCase("draw_candidates", 64, vocab, k=k)
            for some in ("top-k 50", "top-p 0.9"):
                yield RowCase("row_cutoffs", 64, vocab, some)


@dataclass(frozen=True)
class Sizes:
    """How much is done: on a GPU, or in a smoke run."""

    smoke: bool
    vocabularies: tuple[int, ...] = VOCABULARIES
    invariance_vocabularies: tuple[int, ...] = (128_256, 1025)
    fuzz: tuple[tuple[int, str], ...] = ((5, "float32"), (1025, "bfloat16"), (2500, "float16"))
    fuzz_calls: int = 200
    fuzz_seconds: float = 25.0
    requests: int = 4
    oracle_calls: int = 6
    checked_requests: int = 2
    sets: int = 16
    rounds: tuple[int, int] = (20, 100)
    rival_rounds: int = 5
    round_seconds: float = 0.8
    law_vocab: int = 16
    law_tree: tuple[int, ...] = (3, 2)
    law_length: int = 3
    law_requests: int = 1_000_000
    law_chunk: int = 250_000
    copy_bytes: int = 4 << 30
    chunk_bytes: int = 2 << 30
    every: tuple[tuple[str, str], ...] = field(
        default=tuple((rule, proposal) for rule in RULES for proposal in PROPOSALS)
    )


GPU = Sizes(smoke=False)
SMOKE = Sizes(
    smoke=True,
    vocabularies=(40,),
    invariance_vocabularies=(40,),
    fuzz=((5, "float32"),),
    fuzz_calls=1,
    requests=2,
    oracle_calls=1,
    checked_requests=1,
    sets=1,
    rounds=(1, 1),
    round_seconds=0.0,
    law_vocab=4,
    law_tree=(2,),
    law_length=2,
    law_requests=2,
    law_chunk=1,
    copy_bytes=1 << 16,
    chunk_bytes=1 << 12,
    every=(("recursive", "without_replacement"), ("traversal", "greedy")),
)
SMOKE_CASES = (
    Case(1, (2, 1), 40, rivals=("preparation", "textbook", "compiled textbook")),
    Case(1, (1,), 40, "traversal", rivals=("preparation",)),
    Case(1 << 16, (2, 1), 1000),  # more memory than there is
)
SMOKE_ROW_CASES = (
    RowCase("draw_candidates", 1, 40, FILTERED, k=2),
    RowCase("draw_candidates", 2, 40, k=2),
    RowCase("row_cutoffs", 2, 40, "top-p 0.9"),
    RowCase("draw_uniforms", 2, 0),
)
