"""A file of prompts, and a file of results that can be taken up again where it was left."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Args:
        id: its name in the results.
        text: the prompt.
        index: its place in the file, which its seed depends on.
    """

    id: str | int
    text: str
    index: int


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a text file, one a line, or of a `.jsonl` file: objects with "prompt" and, if wanted, "id".

    Blank lines are skipped; the id of a prompt without one is the number of its line.

    Raises:
        ValueError: a line is not such an object, an id occurs twice, or there is no prompt.
    """
    as_json = path.suffix.lower() in (".jsonl", ".ndjson")
    prompts: list[Prompt] = []
    lines: dict[str | int, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        name, text = _parse(line, f"{path}, line {number}", number) if as_json else (number, line)
        if name in lines:
            raise ValueError(f"{path}, line {number}: the id {name!r} stands in line {lines[name]} already")
        lines[name] = number
        prompts.append(Prompt(name, text, len(prompts)))
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt")
    return prompts


def _parse(line: str, where: str, number: int) -> tuple[str | int, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON object: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where}: expected an object with a text "prompt", got {line.strip()[:60]}')
    name = row.get("id", number)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f'{where}: expected a text or a whole number as "id", got {name!r}')
    return name, row["prompt"]


class Results:
    """JSON lines, one a prompt, each written whole; a file that is there already is continued.

    A last line without its end (a run was killed while writing it) is removed, so that its prompt is done again.

    Args:
        path: None: standard output.
        prompts: all that were asked for.
        settings: what the results depend on; stands in every row.

    Raises:
        ValueError: the file holds something else, or results of other prompts or settings.
    """

    def __init__(self, path: Path | None, prompts: Sequence[Prompt], settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.done: set[str | int] = set()
        self._file: BinaryIO | None = None
        keep = self._resume(path, prompts) if path is not None and path.exists() else 0
        if path is not None:
            self._file = path.open("ab")
            self._file.truncate(keep)

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, prompt: Prompt, row: dict[str, Any]) -> None:
        """Add one prompt's row."""
        line = json.dumps({"id": prompt.id, **row, "settings": self.settings}) + "\n"
        if self._file is not None:
            self._file.write(line.encode())
            self._file.flush()
        else:
            sys.stdout.write(line)
            sys.stdout.flush()
        self.done.add(prompt.id)

    def _resume(self, path: Path, prompts: Sequence[Prompt]) -> int:
        """Take in what is there; returns how many bytes of it are whole lines."""
        *lines, torn = path.read_bytes().split(b"\n")
        texts = {prompt.id: prompt.text for prompt in prompts}
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
                name, text, settings = row["id"], row["prompt"], row["settings"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{where}: no result of this program; choose another --output") from None
            if name in texts and texts[name] != text:
                raise ValueError(f"{where}: the result of another prompt {name!r}; choose another --output")
            for key in sorted(self.settings.keys() | settings.keys()):
                if self.settings.get(key) != settings.get(key):
                    raise ValueError(
                        f"{where}: written with {key} = {settings.get(key)!r}, now it is "
                        f"{self.settings.get(key)!r}; choose another --output"
                    )
            self.done.add(name)
        start = b'{"id": '
        if not (torn.startswith(start) or start.startswith(torn)):
            raise ValueError(f"{path}, line {len(lines) + 1}: no result of this program; choose another --output")
        return sum(len(line) + 1 for line in lines)
