"""Files of a run that another process, or the same one after a crash, can rely on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it: under its own name it is complete or absent."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a file that a run goes on from holds.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, and it is made again") from None


def same_settings(folder: Path, name: str, settings: dict[str, Any], later: Collection[str] = ()) -> None:
    """Record what a folder was made with, or compare with what is recorded.

    Args:
        folder: made if it is not there.
        name: of the JSON file in it.
        settings: plain values.
        later: those that older files do not have, which get them.

    Raises:
        ValueError: the folder was made with other settings, or the file is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        write_whole(path, lambda partial: _write_json(partial, settings))
        return
    recorded = read_json(path)
    known = {key: settings[key] for key in later} | recorded
    for key in sorted(settings.keys() | known.keys()):
        if settings.get(key) != known.get(key):
            raise ValueError(
                f"{path}: made with {key} = {known.get(key)!r}, now it is {settings.get(key)!r}; "
                "choose another --output, or the same settings to continue"
            )
    if known != recorded:
        write_whole(path, lambda partial: _write_json(partial, settings))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
