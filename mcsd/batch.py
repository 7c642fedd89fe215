"""A file of prompts, and a file of results that can be taken up again where it was left."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
        ValueError: a line is not such an object, an id occurs twice, there is no prompt, or the file is not UTF-8.
    """
    as_json = path.suffix.lower() in (".jsonl", ".ndjson")
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path}: expected text, or JSON lines in a file that ends in .jsonl")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: expected UTF-8, got the byte {data[error.start]:#04x}") from None
    prompts: list[Prompt] = []
    lines: dict[str | int, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        name, prompt = _parse(line, f"{path}, line {number}", number) if as_json else (number, line)
        if name in lines:
            raise ValueError(f"{path}, line {number}: the id {name!r} stands in line {lines[name]} already")
        lines[name] = number
        prompts.append(Prompt(name, prompt, len(prompts)))
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt")
    return prompts


def _parse(line: str, where: str, number: int) -> tuple[str | int, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where}: expected an object with a text "prompt", got {line.strip()[:60]}')
    name = row.get("id", number)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f'{where}: expected a text or a whole number as "id", got {name!r}')
    return name, row["prompt"]


@dataclass(frozen=True)
class Share:
    """Which prompts a process does: every `count`-th one, from its rank on.

    Args:
        rank: of this process, 0 to count - 1.
        count: how many processes there are.
        local: its number on this machine, which picks its GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @staticmethod
    def of_environment(environment: Mapping[str, str] = os.environ) -> Share:
        """What torchrun and accelerate say: RANK, WORLD_SIZE and LOCAL_RANK; without them one process does all.

        Raises:
            ValueError: they are no such numbers, or there are several processes and this one has no rank.
        """
        count = environment.get("WORLD_SIZE", "1")
        rank = environment.get("RANK", "0" if count == "1" else "")
        try:
            share = Share(int(rank), int(count), int(environment.get("LOCAL_RANK", rank)))
        except ValueError:
            share = Share(-1)
        if not 0 <= share.rank < share.count or share.local < 0:
            raise ValueError(f"RANK, WORLD_SIZE: expected numbers as torchrun sets them, got {rank!r} and {count!r}")
        return share

    def has(self, prompt: Prompt) -> bool:
        """Whether the prompt is this process's to do."""
        return prompt.index % self.count == self.rank


def check_place(name: str, path: Path, whose: str = "", source: str | os.PathLike[str] | None = None) -> None:
    """Refuse a place for a file before anything is done.

    Args:
        name: the option it came in, for the error.
        path: the place.
        whose: the other file is, in the genitive.
        source: a file that is read and must stay.

    Raises:
        ValueError: there is no such folder, or it is that file.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{name}: expected a file in a folder that exists, {path.parent} does not")
    if source is not None and path.exists() and path.samefile(source):
        raise ValueError(f"{name}: expected another file than the {whose}, got {path}")


def check_output(path: Path | None, batch_file: Path | None = None, share: Share = Share()) -> None:
    """What can be said of a place for results before any model is loaded.

    Raises:
        ValueError: it is no place for results, the prompts themselves, or no file while several processes need one.
    """
    if path is None:
        if share.count > 1:
            raise ValueError(f"output: expected a file, which {share.count} processes can share, got standard output")
        return
    if path.exists() and not path.is_file():
        raise ValueError(f"output: expected a file that can be read and continued, got {path}")
    check_place("output", path, "prompts'", batch_file)


class Results:
    """JSON lines, one a prompt, each written whole; files that are there already are continued.

    One process writes to the file itself. Several write to a part each, `NAME.part-RANK`, and whoever finds all prompts
    done puts the parts together in the order of the prompts and removes them; that may happen twice at once, with the
    same outcome. What any file holds counts as done, however many processes wrote it, and in whatever order; once all
    prompts are done, their rows are in the order of the prompts. A last line without its end (a run was killed while
    writing it) is removed, so that its prompt is done again. A prompt that cannot be done has a row, too, with an
    "error" in place of a text.

    Args:
        path: None: standard output.
        prompts: all that were asked for.
        settings: what the results depend on; stands in every row.
        share: what this process does.

    Raises:
        ValueError: a file holds something else, or results of other prompts or settings, or another process is
            writing it; or several processes have no file to write to.
    """

    def __init__(
        self, path: Path | None, prompts: Sequence[Prompt], settings: dict[str, Any], share: Share = Share()
    ) -> None:
        check_output(path, share=share)
        path = path and Path(os.path.realpath(path))  # a link stays one when the parts are put together
        self.path, self.settings, self.share = path, settings, share
        self._prompts = prompts
        self._texts = {prompt.id: prompt.text for prompt in prompts}
        self.done: set[str | int] = set()
        self.failed: set[str | int] = set()  # those of them that have an error
        self._file: BinaryIO | None = None
        if path is None:
            return
        own = path if share.count == 1 else path.with_name(f"{path.name}.part-{share.rank}")
        self._read_all(own)  # refuses before a file is made
        self._file = own.open("ab")
        if not _lock(self._file):
            self._file.close()
            raise ValueError(f"{own}: another process is writing it; wait for it or end it")
        self._read_all(own)  # with what another process wrote until now
        self._file.truncate(self._whole_bytes(own))
        self._own = own

    @property
    def todo(self) -> list[Prompt]:
        """Prompts of this process's share that are not done, in order."""
        return [prompt for prompt in self._prompts if self.share.has(prompt) and prompt.id not in self.done]

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
        if "error" in row:
            self.failed.add(prompt.id)

    def finish(self) -> bool:
        """Put parts together and rows in order if all prompts are done; returns whether the file is complete."""
        if self.path is None:
            return True
        parts = self._parts()
        lines: dict[str | int, bytes] = {}
        # the parts first: whoever removes them has written the file before
        for file in [*parts, self.path]:
            lines |= self._read(file)
        if self._texts.keys() - lines.keys():
            return False
        order = {prompt.id: prompt.index for prompt in self._prompts}
        places = [order[name] for name in lines if name in order]
        if not parts and self._own == self.path and places == sorted(places):
            self._remove(self._beside("whole"))  # of a process that was killed after another had done its work
            return True
        rows = sorted(lines.items(), key=lambda item: order.get(item[0], len(order)))
        whole = self.path.with_name(f"{self.path.name}.whole-{self.share.rank}")
        with suppress(FileNotFoundError):  # another process has just cleared it away, with a whole file of its own
            try:
                with whole.open("wb") as new:
                    new.writelines(line + b"\n" for _, line in rows)
                    new.flush()
                    os.fsync(new.fileno())
                os.replace(whole, self.path)
            except OSError:
                whole.unlink(missing_ok=True)
                raise
        self._remove([*parts, *self._beside("whole")])
        return True

    def _read_all(self, own: Path) -> None:
        """Note what is done."""
        assert self.path is not None
        for file in {self.path, own, *self._parts()}:
            self.done |= self._read(file).keys()

    @staticmethod
    def _remove(files: list[Path]) -> None:
        for file in files:
            file.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return self._beside("part")

    def _beside(self, kind: str) -> list[Path]:
        """The files `NAME.KIND-RANK`."""
        assert self.path is not None
        start = f"{self.path.name}.{kind}-"
        found = self.path.parent.glob(f"{glob.escape(start)}*")
        return sorted(file for file in found if file.name.removeprefix(start).isdecimal())  # and no "X.part-1.bak"

    def _read(self, path: Path) -> dict[str | int, bytes]:
        """Whole lines of a file by the id of their prompt; a file that is not there has none."""
        try:
            *lines, torn = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        found: dict[str | int, bytes] = {}
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            row = _result(line)
            if row is None:
                raise ValueError(f"{where}: no result of this program; choose another --output")
            name, text, settings = row["id"], row["prompt"], row["settings"]
            if name in self._texts and self._texts[name] != text:
                raise ValueError(f"{where}: the result of another prompt {name!r}; choose another --output")
            for key in sorted(self.settings.keys() | settings.keys()):
                if self.settings.get(key) != settings.get(key):
                    raise ValueError(
                        f"{where}: written with {key} = {settings.get(key)!r}, now it is "
                        f"{self.settings.get(key)!r}; choose another --output"
                    )
            found[name] = line
            if "error" in row:
                self.failed.add(name)
        if torn and not _is_torn(torn):
            raise ValueError(f"{path}, line {len(lines) + 1}: no result of this program; choose another --output")
        return found

    @staticmethod
    def _whole_bytes(path: Path) -> int:
        """Length of the file up to the end of its last whole line."""
        return path.read_bytes().rfind(b"\n") + 1


def _result(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None: it is none of ours."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("id"), (str, int)):
        return None
    return row if isinstance(row.get("prompt"), str) and isinstance(row.get("settings"), dict) else None


def _is_torn(line: bytes) -> bool:
    """Whether a line without its end may be the beginning of a row, or a whole one; other people's files are not."""
    start = b'{"id": '
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(start) or start.startswith(line)
    return _result(line) is not None


def _lock(file: BinaryIO) -> bool:
    """Keep other processes from writing the file until it is closed; where there are no locks, nothing is kept."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
