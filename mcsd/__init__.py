"""Lossless multi-candidate speculative decoding over Hugging Face models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checking import Check, check
    from .decode import Generation, generate
    from .drafters import (
        ConfidenceStop,
        Drafter,
        EarlyExitDrafter,
        EntropyStop,
        FeatureDrafter,
        HeadsDrafter,
        MedusaHeads,
        MergedDrafter,
        MLPSpeculator,
        ModelDrafter,
        NgramDrafter,
        Proposal,
        State,
        TopKDrafter,
        TrieDrafter,
    )
    from .integrations.transformers import TreeDecoding
    from .scoring import UnsupportedModelError
    from .stats import Stats

__all__ = [
    "Check",
    "ConfidenceStop",
    "Drafter",
    "EarlyExitDrafter",
    "EntropyStop",
    "FeatureDrafter",
    "Generation",
    "HeadsDrafter",
    "MLPSpeculator",
    "MedusaHeads",
    "MergedDrafter",
    "ModelDrafter",
    "NgramDrafter",
    "Proposal",
    "State",
    "Stats",
    "TopKDrafter",
    "TreeDecoding",
    "TrieDrafter",
    "UnsupportedModelError",
    "check",
    "generate",
]

_MODULES = {
    "Check": "checking",
    "ConfidenceStop": "drafters",
    "Drafter": "drafters",
    "EarlyExitDrafter": "drafters",
    "EntropyStop": "drafters",
    "FeatureDrafter": "drafters",
    "Generation": "decode",
    "HeadsDrafter": "drafters",
    "MLPSpeculator": "drafters",
    "MedusaHeads": "drafters",
    "MergedDrafter": "drafters",
    "ModelDrafter": "drafters",
    "NgramDrafter": "drafters",
    "Proposal": "drafters",
    "State": "drafters",
    "Stats": "stats",
    "TopKDrafter": "drafters",
    "TreeDecoding": "integrations.transformers",
    "TrieDrafter": "drafters",
    "UnsupportedModelError": "scoring",
    "check": "checking",
    "generate": "decode",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something is asked for: `mcsd --help` needs neither."""
    if name == "__version__":
        from importlib.metadata import version

        return version("mcsd")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
