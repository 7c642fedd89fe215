"""What `mcsd tune` found for a pair of models on a machine: the tree to draft, and what it was chosen from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

from mcsd_kernels.verify import PROPOSALS, RULES

from .trees import check_parents

VERSION = 1
_DECIDING = {"target", "draft", "dtype", "device", "temperature", "top_k", "top_p", "min_p"}


@dataclass(frozen=True)
class Ladder:
    """Nested trees for `AdaptiveDrafter`: the first nodes of one tree.

    Args:
        parents: of the largest tree, most valuable nodes first; siblings in draw order.
        values: for each node the probability that it is accepted; 1 for the root.
        sizes: of the trees, root included, ascending.
        seconds: for each of them, what one step with it costs.
        proposal: how siblings are drawn; not "greedy", whose siblings depend on how many there are.

    Raises:
        ValueError: the lists do not fit together.
    """

    parents: tuple[int, ...]
    values: tuple[float, ...]
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    proposal: str = "without_replacement"

    def __post_init__(self) -> None:
        for name in ("parents", "values", "sizes", "seconds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        nodes = len(check_parents(self.parents))
        if len(self.values) != nodes:
            raise ValueError(f"values: expected one for each of {nodes} nodes, got {len(self.values)}")
        sizes = self.sizes
        if not sizes or sizes != tuple(sorted(set(sizes))) or sizes[0] < 2 or sizes[-1] > nodes:
            raise ValueError(f"sizes: expected ascending numbers in [2, {nodes}], got {sizes}")
        if len(self.seconds) != len(sizes) or min(self.seconds) <= 0:
            raise ValueError(f"seconds: expected a time > 0 for each of {len(sizes)} sizes, got {self.seconds}")
        if self.proposal not in PROPOSALS or self.proposal == "greedy":
            expected = ", ".join(name for name in PROPOSALS if name != "greedy")
            raise ValueError(f"proposal: expected one of {expected}, got {self.proposal!r}")

    @property
    def digest(self) -> str:
        """A name for what it holds."""
        return sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Profile:
    """The tree of most tokens a second for a pair of models on a machine, and the measurements behind it.

    Args:
        parents: of the tree: -1, then each node's parent; siblings in draw order.
        proposal: how siblings are drawn.
        rule: in which order they are verified.
        settings: what it was measured with: models, dtype, device, threads, temperature and filters.
        tokens_per_call: measured with this tree.
        tokens_per_second: the same.
        plain_tokens_per_second: plain decoding beside it.
        acceptance: proposal -> for each depth and each number of children, the acceptance of each sibling rank.
        costs: seconds by size: "target" and "rest" by nodes of the tree, "draft" by nodes of a level.
        curve: a row for each tree size: what was predicted, and measured where it was.
        shapes: a row for each tree that was measured.
        ladder: for adaptive trees.

    Raises:
        ValueError: the tree, the proposal or the rule is none.
    """

    parents: tuple[int, ...]
    proposal: str
    rule: str = "recursive"
    settings: dict[str, Any] = field(default_factory=dict)
    tokens_per_call: float = 0.0
    tokens_per_second: float = 0.0
    plain_tokens_per_second: float = 0.0
    acceptance: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    ladder: Ladder | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parents", check_parents(self.parents))
        for name, allowed in (("proposal", PROPOSALS), ("rule", RULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def proposal_at(self, temperature: float) -> str:
        """The proposal, but "point" at temperature 0, where a sampled draft has a single candidate."""
        return "point" if temperature == 0 else self.proposal

    def differences(self, settings: dict[str, Any]) -> list[str]:
        """What else the profile was measured with than these settings, in words; what is best depends on it."""
        return [
            f"{name} {self.settings[name]}, not {settings[name]}"
            for name in self.settings.keys() & settings.keys() & _DECIDING
            if self.settings[name] != settings[name]
        ]

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps({"mcsd_profile": VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(source: Profile | str | PathLike[str]) -> Profile:
        """A profile, or the one in a file.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        if isinstance(source, Profile):
            return source
        path = Path(source)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"profile: expected a file written by `mcsd tune`, cannot read {path}: {error}") from None
        try:
            row = json.loads(text)
            version = row.pop("mcsd_profile")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"profile: expected a file written by `mcsd tune`, {path} is something else") from None
        if version != VERSION:
            raise ValueError(f"profile: expected format {VERSION}, {path} has {version!r}; run `mcsd tune` again")
        try:
            unknown = row.keys() - {f.name for f in fields(Profile)}
            if unknown:
                raise ValueError(f"unknown entries {', '.join(sorted(unknown))}")
            ladder = row.pop("ladder", None)
            return Profile(**row, ladder=None if ladder is None else Ladder(**ladder))
        except (TypeError, ValueError) as error:
            raise ValueError(f"profile: {path}: {error}") from None
