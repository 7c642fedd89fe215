"""`mcsd tune` on the bundled pair: what it chooses, beside trees made by hand and plain decoding.

python bench/tune.py                          # a quarter of an hour on two quiet cores
python bench/tune.py --profile profile.json   # keep what `mcsd tune` wrote with these sources
python bench/tune.py -- --temperature 0       # what follows "--" goes to `mcsd tune`
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

from mcsd.bundled import DEFAULT_TARGET
from mcsd.profile import Profile


def main() -> None:
    """Tune, or read a profile, and record the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="a profile of the bundled pair, written on this machine")
    parser.add_argument("options", nargs="*", help="of `mcsd tune`")
    options = parser.parse_args()
    if options.profile is not None:
        profile = Profile.load(options.profile)
    elif harness.recorded("tune", [{"target": DEFAULT_TARGET, "options": options.options}]):
        print("there is a row of this code and machine")
        return
    else:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "profile.json"
            command = [sys.executable, "-m", "mcsd", "tune", "--output", str(output), *options.options]
            subprocess.run(command, check=True, cwd=harness.ROOT)
            profile = Profile.load(output)
    harness.record("tune", {**row_of(profile), "options": options.options})


def row_of(profile: Profile) -> harness.Row:
    """What a reader wants to know of a profile; its acceptance and costs stay behind."""
    names = ("target", "draft", "dtype", "device", "temperature", "prompts", "max_new_tokens", "seed")
    return {
        "bench": "tune",
        **{name: profile.settings[name] for name in names},
        "chosen": {"parents": profile.parents, "proposal": profile.proposal, "rule": profile.rule},
        "tokens_per_call": profile.tokens_per_call,
        "tokens_per_second": profile.tokens_per_second,
        "plain_tokens_per_second": profile.plain_tokens_per_second,
        "shapes": profile.shapes,
        "curve": profile.curve,
    }


if __name__ == "__main__":
    main()
