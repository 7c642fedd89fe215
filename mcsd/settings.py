"""What the command line asks for, and how a terminal is told about each of it; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

import typer

# The bundled draft on a CPU: there every node costs, and a second level costs more than it brings (docs/notes.md).
DEFAULT_BRANCHING = (2,)
OTHER_BRANCHING = (4, 2, 2)

DEFAULT_TARGET = "smollm2-135m-instruct"
DEFAULT_DRAFT = "smollm2-draft"


class Proposal(str, Enum):
    """`mcsd_kernels.verify`'s proposals."""

    WITHOUT_REPLACEMENT = "without_replacement"
    WITH_REPLACEMENT = "with_replacement"
    GREEDY = "greedy"
    POINT = "point"


class Rule(str, Enum):
    """`mcsd_kernels.verify`'s rules."""

    RECURSIVE = "recursive"
    TRAVERSAL = "traversal"


@dataclass(frozen=True)
class Settings:
    """The options that every generating command has; the annotations are their help.

    Raises:
        ValueError: `branching` is not a list of whole numbers.
    """

    target: Annotated[str, typer.Option(help="A folder, a name on the model hub, or the bundled model.")] = (
        DEFAULT_TARGET
    )
    draft: Annotated[
        str | None,
        typer.Option(
            help=f"A folder, a hub name, {DEFAULT_DRAFT!r}, or 'ngram' (prompt lookup, no model).",
            show_default=f"{DEFAULT_DRAFT} for the bundled target, else ngram",
        ),
    ] = None
    branching: Annotated[
        str | None,
        typer.Option(
            help="Children of a tree node at depth 0, 1, ..., such as 4,2,2.",
            show_default=f"{','.join(map(str, DEFAULT_BRANCHING))} for the bundled draft on a CPU, "
            f"else {','.join(map(str, OTHER_BRANCHING))}",
        ),
    ] = None
    proposal: Annotated[
        Proposal | None,
        typer.Option(
            help="How siblings are drawn.",
            show_default="the drafter's own; for a model without_replacement, point at temperature 0",
        ),
    ] = None
    rule: Annotated[Rule, typer.Option(help="The order in which the tree is verified.")] = Rule.RECURSIVE
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = 0
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens up to this mass; 1 keeps all.")] = 1.0
    min_p: Annotated[float, typer.Option(help="Keep tokens of at least this share of the largest probability.")] = 0.0
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest continuation.")] = 128
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ...; auto: bfloat16 where the device has it.")] = "auto"
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")] = "auto"
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Put the prompt into the tokenizer's chat template, or take it as it is.",
            show_default="chat where there is a template",
        ),
    ] = None

    def __post_init__(self) -> None:
        _ = self.factors

    @property
    def factors(self) -> tuple[int, ...] | None:
        """`branching` as numbers."""
        if self.branching is None:
            return None
        try:
            return tuple(int(factor) for factor in self.branching.split(","))
        except ValueError:
            raise ValueError(
                f"branching: expected whole numbers >= 1 with commas between, such as 4,2,2, got {self.branching!r}"
            ) from None
