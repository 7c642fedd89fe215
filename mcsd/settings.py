"""What the command line asks for, and how a terminal is told about each of it; imports nothing heavy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import typer

from .bundled import BUNDLED_DRAFTS, DEFAULT_DRAFT, DEFAULT_TARGET

if TYPE_CHECKING:
    from .profile import Profile

# The bundled draft on a CPU: there every node costs, and a second level costs more than it brings (docs/notes.md).
DEFAULT_BRANCHING = (2,)
OTHER_BRANCHING = (4, 2, 2)

NGRAM = "ngram"


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
        ValueError: `branching` is not a list of whole numbers or does not fit the draft, the bundled target and drafts
            have changed places, or there is no such profile.
    """

    target: Annotated[str, typer.Option(help="A folder, a name on the model hub, or the bundled model.")] = (
        DEFAULT_TARGET
    )
    draft: Annotated[
        str | None,
        typer.Option(
            help=f"A folder, a hub name, {', '.join(map(repr, BUNDLED_DRAFTS))}, or 'ngram' (prompt lookup, no model).",
            show_default=f"{DEFAULT_DRAFT} for the bundled target, else ngram",
        ),
    ] = None
    branching: Annotated[
        str | None,
        typer.Option(
            help="Children of a tree node at depth 0, 1, ..., such as 4,2,2; for ngram one number, of continuations.",
            show_default=f"{','.join(map(str, DEFAULT_BRANCHING))} for the bundled draft on a CPU, "
            f"else {','.join(map(str, OTHER_BRANCHING))}",
        ),
    ] = None
    proposal: Annotated[
        Proposal | None,
        typer.Option(
            help="How siblings are drawn.",
            show_default="the profile's, or the drafter's own; for a model without_replacement, point at temperature 0",
        ),
    ] = None
    rule: Annotated[
        Rule | None,
        typer.Option(
            help="The order in which the tree is verified.", show_default=f"the profile's, or {Rule.RECURSIVE.value}"
        ),
    ] = None
    profile: Annotated[
        str | None,
        typer.Option(help="A file from `mcsd tune`: its tree, in place of --branching.", show_default=False),
    ] = None
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Let the tree grow and shrink with what was accepted; needs --profile.")
    ] = False
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = 0
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens up to this mass; 1 keeps all.")] = 1.0
    min_p: Annotated[float, typer.Option(help="Keep tokens of at least this share of the largest probability.")] = 0.0
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest continuation.")] = 128
    seed: Annotated[int, typer.Option(help="Same seed and settings, same text.")] = 0
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, ...; auto: bfloat16 where the device is faster in it.")
    ] = "auto"
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
        for name in ("target", "draft"):
            value = getattr(self, name)
            if value is not None and value.startswith("~"):  # a shell leaves it in --target=~/model
                object.__setattr__(self, name, os.path.expanduser(value))
        if self.target in BUNDLED_DRAFTS and not os.path.isdir(self.target):
            raise ValueError(f"target: {self.target} is a bundled draft; the bundled target is {DEFAULT_TARGET}")
        if self.draft == DEFAULT_TARGET and not os.path.isdir(self.draft):
            raise ValueError(
                f"draft: {self.draft} is the bundled target; the bundled drafts are {' and '.join(BUNDLED_DRAFTS)}"
            )
        if self.factors and len(self.factors) > 1 and self.chosen_draft == NGRAM:
            raise ValueError(
                f"branching: expected one number beside the draft {NGRAM}, how many continuations it looks up, "
                f"got {self.branching!r}"
            )
        if self.adaptive and self.profile is None:
            raise ValueError("adaptive: expected a --profile beside it, which says what to expect of each tree")
        if self.profile is not None and self.branching is not None:
            raise ValueError("branching: expected either --branching or --profile, which brings its own tree")
        tuned = self.tuned
        if self.rule is None:
            object.__setattr__(self, "rule", Rule(tuned.rule) if tuned else Rule.RECURSIVE)
        if self.proposal is None and tuned is not None and not self.adaptive:  # which has a proposal of its own
            object.__setattr__(self, "proposal", Proposal(tuned.proposal_at(self.temperature)))

    @property
    def chosen_draft(self) -> str:
        """The draft's name, given or not."""
        return self.draft or (DEFAULT_DRAFT if self.target == DEFAULT_TARGET else NGRAM)

    @property
    def chosen_rule(self) -> str:
        """The rule, given or not."""
        return (self.rule or Rule.RECURSIVE).value

    @cached_property
    def tuned(self) -> Profile | None:
        """The profile, read."""
        if self.profile is None:
            return None
        from .profile import Profile

        return Profile.load(self.profile)

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
