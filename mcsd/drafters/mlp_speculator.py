"""MLP speculator: heads that read the target's hidden state once and then each drawn token, like a small RNN."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ..placement import hidden_dtype, input_device
from .heads import check_fit

_PARTS = ("emb", "proj", "ln", "head")


class _Norm(nn.Module):
    """x / rms(x), times a weight, plus a bias.

    Args:
        width: of x.
        affine: whether there are weight and bias.
    """

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__()
        self.affine = affine
        if affine:
            self.weight = nn.Parameter(torch.ones(width))
            self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., width]`, as x is; the mean square in float32."""
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return normed * self.weight + self.bias if self.affine else normed


class MLPSpeculator(nn.Module):
    """Heads that depend on the tokens between: the state goes from node to child.

    `s_i = GELU(norm_i(a * proj_i(s_{i-1}) + b * emb_i(token_i)))`, logits `head_i(s_i)`, with s_{-1} the target's
    hidden state, token_0 the root, a = 0.5^(0.5 / heads) and b = sqrt((1 - a^2) * inner / 2).

    Args:
        hidden: width of the target's hidden states (`emb_dim` in a checkpoint's configuration).
        vocab: of the target.
        heads: how many (`n_predict`).
        inner: width of the state (`inner_dim`); 0: `hidden`.
        tie_weights: all heads share their weights, but for the first projection.
        scale_input: normalise the target's hidden state first.

    Source: Wertheimer et al., arXiv 2404.19124; layout of the ibm-fms and ibm-granite checkpoints as vLLM's
    `mlp_speculator.py` and github.com/foundation-model-stack/fms-extras read it.
    """

    shares_rows = False

    def __init__(
        self,
        hidden: int,
        vocab: int,
        heads: int,
        inner: int = 0,
        tie_weights: bool = False,
        scale_input: bool = False,
    ) -> None:
        super().__init__()
        inner = inner or hidden
        self.tie_weights, self.scale_input = tie_weights, scale_input
        self.emb = nn.ModuleList(nn.Embedding(vocab, inner) for _ in range(heads))
        self.proj = nn.ModuleList(nn.Linear(inner if i else hidden, inner, bias=False) for i in range(heads))
        self.ln = nn.ModuleList(_Norm(inner) for _ in range(heads))
        self.head = nn.ModuleList(nn.Linear(inner, vocab, bias=False) for _ in range(heads))
        if tie_weights:
            for part in _PARTS:
                modules = getattr(self, part)
                for i in range(1, heads):
                    modules[i] = modules[_tied(part, i)]
        self._input = _Norm(hidden, affine=False)
        self._state_weight = 0.5 ** (0.5 / heads)
        self._token_weight = math.sqrt((1 - self._state_weight**2) * inner / 2)

    @classmethod
    def from_folder(cls, folder: str | Path, target: PreTrainedModel) -> MLPSpeculator:
        """Load a published checkpoint.

        Args:
            folder: holds `config.json` (`n_predict`, `emb_dim`, `inner_dim`, `vocab_size`, `tie_weights`,
                `scale_input`) and `*.safetensors` or `pytorch_model*.bin` with `speculator.emb.0.weight`,
                `speculator.proj.0.weight`, `speculator.ln.0.weight`, `speculator.ln.0.bias`,
                `speculator.head.0.weight`, ...; tied weights may stand there once or for every head.
            target: the model it was trained on.

        Returns:
            The heads on the target's device and in its dtype, in evaluation mode, without gradients.

        Raises:
            ValueError: a file is missing, the tensors do not fit the configuration, or it was made for another model.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"folder: expected config.json in {folder}")
        config = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("n_predict", "emb_dim", "vocab_size") if name not in config]
        if missing:
            raise ValueError(f"{path}: expected the configuration of an MLP speculator, {', '.join(missing)} missing")
        check_fit(target, config["emb_dim"], config["vocab_size"], f"the speculator in {folder}")
        made = cls(
            config["emb_dim"],
            config["vocab_size"],
            config["n_predict"],
            config.get("inner_dim", 0),
            config.get("tie_weights", False),
            config.get("scale_input", False),
        )
        made._load(_stored(Path(folder)), str(folder))
        return made.to(input_device(target), hidden_dtype(target)).eval().requires_grad_(False)

    def _load(self, stored: dict[str, torch.Tensor], where: str) -> None:
        weights = {name.removeprefix("speculator."): tensor for name, tensor in stored.items()}
        wanted: dict[str, torch.Tensor] = {}
        absent = []
        for name in self.state_dict():
            part, index, kind = name.split(".")
            tied = f"{part}.{_tied(part, int(index))}.{kind}" if self.tie_weights else name
            source = name if name in weights else tied
            if source in weights:
                wanted[name] = weights[source]
            else:
                absent.append(name)
        unknown = sorted(weights.keys() - self.state_dict().keys())
        if absent or unknown:
            raise ValueError(
                f"{where}: expected the tensors of {self.count} heads, missing {absent[:4]}, unknown {unknown[:4]}"
            )
        try:
            self.load_state_dict(wanted)
        except RuntimeError as error:
            raise ValueError(f"{where}: the tensors do not fit config.json: {error}") from None

    @property
    def count(self) -> int:
        """How many tokens ahead there is a head for."""
        return len(self.head)

    def start(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[batch, 1, hidden]` from `[batch, hidden]`."""
        hidden = hidden[:, None]
        return self._input(hidden) / math.sqrt(2) if self.scale_input else hidden

    def level(self, level: int, state: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, nodes, vocab]` logits and `[batch, nodes, inner]` state after the nodes' tokens."""
        embedded: torch.Tensor = self.emb[level](tokens.clamp(min=0))
        mixed = self.proj[level](state) * self._state_weight + embedded * self._token_weight
        state = nn.functional.gelu(self.ln[level](mixed))
        return self.head[level](state), state


def _tied(part: str, index: int) -> int:
    """Which module a tied one is; the first projection may have another width and stands alone."""
    return min(index, 1) if part == "proj" else 0


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all shards.

    Raises:
        ValueError: there are none.
    """
    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    if not tensors:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            tensors |= torch.load(path, "cpu", weights_only=True)
    if not tensors:
        raise ValueError(f"folder: expected *.safetensors or pytorch_model*.bin in {folder}")
    return tensors
