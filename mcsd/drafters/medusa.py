"""Medusa heads: head i guesses the token i + 1 places after the root, whatever stands between."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ..placement import floating_weight, hidden_dtype, input_device
from .heads import check_fit

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors")
# the layout that vLLM converts to, in that of the original
_CONVERTED = re.compile(r"(?:blocks\.(?P<block>\d+)\.layers\.(?P<layer>\d+)|lm_heads\.(?P<head>\d+))\.(?P<what>\w+)")


class ResBlock(nn.Module):
    """x + SiLU(W x + b); with W = 0 and b = 0, as heads start out, x itself.

    Args:
        width: of x.
        bias: whether there is b.
    """

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias)
        nn.init.zeros_(self.linear.weight)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., width]`, as x is."""
        return x + nn.functional.silu(self.linear(x))


class MedusaHeads(nn.ModuleList):
    """Heads of residual blocks and a linear layer each, all reading the same hidden state.

    The parameters have the names of the published checkpoints (`0.0.linear.weight`, `0.0.linear.bias`, `0.1.weight`:
    head 0, its block 0, and its linear layer), so `torch.save(heads.state_dict(), "medusa_lm_head.pt")` writes one.

    Args:
        hidden: width of the target's hidden states.
        vocab: of the target.
        heads: how many.
        layers: residual blocks a head.
        bias: of the residual blocks.

    Source: Cai et al., arXiv 2401.10774; checkpoint layout of github.com/FasterDecoding/Medusa.
    """

    shares_rows = True

    def __init__(self, hidden: int, vocab: int, heads: int, layers: int = 1, bias: bool = True) -> None:
        super().__init__(
            nn.Sequential(*(ResBlock(hidden, bias) for _ in range(layers)), nn.Linear(hidden, vocab, bias=False))
            for _ in range(heads)
        )

    @classmethod
    def of(cls, target: PreTrainedModel, heads: int, layers: int = 1) -> MedusaHeads:
        """Untrained heads for a target: each a copy of its output head, in its dtype and on its device.

        Raises:
            ValueError: the output head is quantised or offloaded.
        """
        weight = floating_weight("target", target.get_output_embeddings(), "heads that begin as copies of it")
        made = cls(weight.shape[1], weight.shape[0], heads, layers).to(input_device(target), weight.dtype)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name.endswith(f".{layers}.weight"):
                    parameter.copy_(weight)
        return made

    @classmethod
    def from_folder(cls, folder: str | Path, target: PreTrainedModel, heads: int | None = None) -> MedusaHeads:
        """Load a published checkpoint; how many heads and layers there are is read off the weights.

        Args:
            folder: holds `medusa_lm_head.pt`, or the same tensors as `medusa_lm_head.safetensors`, or
                `model.safetensors` in vLLM's layout (`blocks.0.layers.0.weight`, `lm_heads.0.weight`).
            target: the model they were trained on.
            heads: use this many of them; None: all.

        Returns:
            The heads on the target's device and in its dtype, in evaluation mode, without gradients.

        Raises:
            ValueError: no such file, other tensors in it, or heads of another model.
        """
        path = next((Path(folder) / name for name in FILES if (Path(folder) / name).is_file()), None)
        if path is None:
            raise ValueError(f"folder: expected one of {', '.join(FILES)} in {folder}")
        stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        weights = _in_original_layout(stored)
        sizes = [re.fullmatch(r"(\d+)\.(\d+)\.weight", name) for name in weights]
        last = {int(match[1]): int(match[2]) for match in sizes if match}
        if not last or len(set(last.values())) > 1 or sorted(last) != list(range(len(last))):
            raise ValueError(f"{path}: expected Medusa heads (0.0.linear.weight, 0.1.weight, ...), got {_some(stored)}")
        layers = last[0]
        vocab, hidden = weights[f"0.{layers}.weight"].shape
        check_fit(target, hidden, vocab, f"the heads in {folder}")
        count = len(last) if heads is None else heads
        if not 1 <= count <= len(last):
            raise ValueError(f"heads: expected a number in [1, {len(last)}], got {heads!r}")
        made = cls(hidden, vocab, len(last), layers, "0.0.linear.bias" in weights)
        if made.state_dict().keys() != weights.keys():
            odd = sorted(made.state_dict().keys() ^ weights.keys())
            raise ValueError(f"{path}: expected {len(last)} heads of {layers} blocks, missing or unknown: {odd[:5]}")
        made.load_state_dict(weights)
        del made[count:]
        return made.to(input_device(target), hidden_dtype(target)).eval().requires_grad_(False)

    @property
    def count(self) -> int:
        """How many tokens ahead there is a head for."""
        return len(self)

    def start(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[batch, 1, hidden]` from `[batch, hidden]`."""
        return hidden[:, None]

    def level(self, level: int, state: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, 1, vocab]` logits, the same for all nodes of the level, and the state as it was."""
        return self[level](state), state


def _in_original_layout(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names of the original, whichever layout they come in."""
    names = {re.sub(r"^(?:.*\.)?medusa_heads?\.", "", name): name for name in stored}
    found = {name: _CONVERTED.fullmatch(name) for name in names}
    layers = 1 + max((int(match["layer"]) for match in found.values() if match and match["block"]), default=-1)
    weights = {}
    for name, match in found.items():
        tensor = stored[names[name]]
        if match and match["block"]:
            name = f"{match['block']}.{match['layer']}.linear.{match['what']}"
        elif match:
            name = f"{match['head']}.{layers}.{match['what']}"
        weights[name] = tensor
    return weights


def _some(stored: dict[str, torch.Tensor]) -> str:
    return ", ".join(sorted(stored)[:4]) or "nothing"
