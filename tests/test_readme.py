"""Every Python block of the README runs, and every file it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0] for block in BLOCKS])
def test_block_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert capsys.readouterr().out.strip()


def test_a_folder_of_the_name_hides_nothing(tmp_path: Path) -> None:
    """Scripts may lie beside a clone, which is a folder called mcsd as well."""
    (tmp_path / "mcsd").mkdir()
    found = subprocess.run(
        [sys.executable, "-c", "import mcsd; print(mcsd.generate)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0 and "function generate" in found.stdout, found.stderr


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 2


def test_named_files_exist() -> None:
    """Links, and the paths in the file map; a bare name belongs to the folder named before it in its row."""
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings], (
            link
        )
    table = README.split("## Where things are")[1].split("## Citation")[0]
    for row in table.splitlines():
        folder = ROOT
        for name in re.findall(r"`([\w./]+(?:\.py|/))`", row.split("|")[1] if row.count("|") > 1 else ""):
            path = ROOT / name if (ROOT / name).exists() else folder / name
            assert path.exists(), name
            folder = path if path.is_dir() else path.parent
