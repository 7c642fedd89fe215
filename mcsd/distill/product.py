"""A trained drafter as the files that ship: int8 matrices, a configuration, the training log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..draft_model import WEIGHTS_FILE
from .files import write_whole
from .students import FeatureStudent, LayersStudent
from .training import LOG


def quantise(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices as int8 with one float16 scale a row, vectors as bfloat16, integers as int32.

    `int8[r, c] = round(W[r, c] / scale[r])`, `scale[r] = max |W[r]| / 127`; `mcsd.draft_model.dequantise` undoes it.

    Args:
        weights: by name.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu()
        if not tensor.is_floating_point():
            stored[name] = tensor.int()
        elif tensor.dim() == 2:
            # a scale that float16 rounds down would push the largest entry past 127
            scale = (tensor.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-7).half()
            stored[name] = (tensor.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
            stored[f"{name}.scale"] = scale
        else:
            stored[name] = tensor.bfloat16()
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def save_product(
    student: FeatureStudent | LayersStudent, folder: Path, run: Path | None = None, about: dict[str, Any] | None = None
) -> Path:
    """Write a folder that `mcsd.draft_model.load_draft` reads.

    Args:
        student: the trained drafter.
        folder: made if it is not there.
        run: the folder whose training log is copied beside the weights.
        about: plain values for `config.json`, under "training".

    Returns:
        The weights' path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = student.draft_ids.cpu()
    weights = dict(student.body.state_dict())
    if isinstance(student, FeatureStudent):
        config: dict[str, Any] = {"drafter": "feature", **student.model.config.as_dict()}
        if not torch.equal(ids, torch.arange(len(ids))):
            weights["draft_ids"] = ids
    else:
        config = student.config.to_dict()
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        weights["sub_vocab"] = ids
    if about:
        config["training"] = about
    path = folder / WEIGHTS_FILE
    content = quantise(weights)
    write_whole(path, lambda partial: save_file(content, partial))
    path.chmod(0o644)  # save_file leaves it to its owner alone
    write_whole(folder / "config.json", lambda partial: partial.write_text(json.dumps(config, indent=1) + "\n"))
    if run is not None and (run / LOG).exists():
        write_whole(folder / LOG, lambda partial: shutil.copyfile(run / LOG, partial))
    return path
