"""`python -m bench.gpu PART ...`: starts the workers, shows their progress, outlives their crashes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import bench.gpu

from . import rows, summary
from .worker import BEGIN, BROKEN, COMPILED, END, ORIGIN

# part -> (seconds it may take, processes); a part that times has the device to itself
PARTS = {"checks": (330, 12), "laws": (90, 6), "sanitizer": (150, 6), "verify": (560, 1), "candidates": (240, 1)}
COMMAND = [sys.executable, "-m", "bench.gpu.worker"]
WARM_WORKERS = 12
# The share of a timed part's seconds in which its kernels are compiled, by many processes at once.
WARM_SHARE = 0.25
# A worker that has said nothing for so long hangs: no unit and no compilation takes half of it.
SILENCE = 200.0
# What a unit that is under way may take beyond the part's seconds.
GRACE = 15.0
CRASHES = 8


@dataclass
class Worker:
    """A process, its place among the workers, and what it is at."""

    index: int
    process: subprocess.Popen[str]
    unit: str | None = None
    origin: rows.Row = field(default_factory=dict)
    heard: float = field(default_factory=time.time)


class Supervisor:
    """Runs parts in worker processes.

    Args:
        options: the command line's.
        out: where the rows go.
    """

    def __init__(self, options: argparse.Namespace, out: Path) -> None:
        self.options, self.out, self.crashes = options, out, 0
        self.started, self._threads = rows.now(), 1
        self._lines: queue.Queue[tuple[Worker, str | None]] = queue.Queue()

    def run(self, parts: list[str], seconds: float, workers: int, warm: str = "no") -> None:
        """Do the parts' units until they are done or the seconds are over.

        Args:
            parts: done by the same workers, in turn.
            seconds: after which no unit is begun.
            workers: how many share the units.
            warm: "only" compiles the kernels and no more, "first" compiles them before.
        """
        deadline = time.time() + seconds
        options, self._threads = self.options, max(1, (os.cpu_count() or 1) // workers)
        command = [*COMMAND, *parts, f"--out={self.out}", f"--deadline={deadline}"]
        command += [f"--workers={workers}", f"--warm={warm}", *(f"--only={text}" for text in options.only)]
        command += [f"--since={self.started}"] if options.again else []
        command += [f"--errors-since={self.started}"] if options.retry else []
        command += ["--smoke"] if options.smoke else []
        alive = [self._start(command, index) for index in range(workers)]
        try:
            self._watch(alive, command, deadline)
        finally:
            for worker in alive:
                _kill(worker)

    def _watch(self, alive: list[Worker], command: list[str], deadline: float) -> None:
        """Until no worker is left."""
        while alive:
            self._listen()
            for worker in list(alive):
                late = time.time() > deadline + GRACE
                silent = time.time() - worker.heard > self.options.silence
                if worker.process.poll() is None and (late or silent):
                    _kill(worker)
                elif worker.process.poll() is None:
                    continue
                self._listen()
                alive.remove(worker)
                if late and worker.unit is not None:
                    print(f"{worker.unit}: the seconds are over", flush=True)
                if worker.process.returncode == 0 or late:
                    continue
                reason = f"silent for {self.options.silence:.0f} s" if silent else f"exit {worker.process.returncode}"
                if self._crashed(worker, reason):
                    alive.append(self._start(command, worker.index))

    def _start(self, command: list[str], index: int) -> Worker:
        environment = os.environ | dict.fromkeys(
            ("TORCHINDUCTOR_COMPILE_THREADS", "OMP_NUM_THREADS"), str(self._threads)
        )
        environment |= {"TRITON_INTERPRET": "1"} if self.options.smoke else {}
        # a group of its own, so that what it has started goes with it
        process = subprocess.Popen(
            [*command, f"--index={index}"],
            cwd=rows.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=os.setpgrp,
        )
        worker = Worker(index, process)
        threading.Thread(target=self._relay, args=(worker,), daemon=True).start()
        return worker

    def _relay(self, worker: Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self._lines.put((worker, line))
        self._lines.put((worker, None))

    def _listen(self) -> None:
        """Take in what workers have said, for up to half a second."""
        until = time.time() + 0.5
        while True:
            try:
                worker, line = self._lines.get(timeout=max(until - time.time(), 0.01))
            except queue.Empty:
                return
            if line is None:
                worker.process.wait()
                return
            worker.heard = time.time()
            clock = time.strftime("%H:%M:%S")
            if line.startswith(ORIGIN):
                worker.origin = json.loads(line[len(ORIGIN) :])
            elif line.startswith(BEGIN):
                worker.unit = line[len(BEGIN) :].strip()
            elif line.startswith(END):
                print(f"{clock} {worker.unit}: {line[len(END) :].strip()}", flush=True)
                worker.unit = None
            elif not line.startswith(COMPILED):
                print(line, end="", flush=True)

    def _crashed(self, worker: Worker, reason: str) -> bool:
        """Record what a worker died of; returns whether another should take its place."""
        print(f"worker {worker.index}: {reason}, at {worker.unit}", flush=True)
        self.crashes += 1
        if worker.unit is not None:
            part, name = worker.unit.split(": ", 1)
            row = {"bench": f"gpu-{part}", "status": "error", "error": reason, "unit": name, "date": rows.now()}
            rows.append(self.out, part, [row | worker.origin])
        told = worker.unit is not None or worker.process.returncode == BROKEN
        return told and self.crashes <= CRASHES


def _kill(worker: Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="bench/gpu.sh", description=bench.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("parts", nargs="+", metavar="PART", help=f"{', '.join(PARTS)}, all, or summary [FOLDER]")
    made.add_argument("--budget", action="append", default=[], metavar="[PART=]SECONDS", help="seconds a part may take")
    made.add_argument("--jobs", type=int, help="processes that check, or compile ahead")
    made.add_argument("--only", action="append", default=[], metavar="TEXT", help="units whose name has it")
    made.add_argument("--again", action="store_true", help="also the units that have rows already")
    made.add_argument("--retry", action="store_true", help="also the units whose rows are errors")
    made.add_argument(
        "--smoke", action="store_true", help="no GPU: Triton's interpreter, tiny sizes, a temporary folder"
    )
    made.add_argument("--silence", type=float, default=SILENCE, help="seconds after which a silent worker is killed")
    options = made.parse_args(arguments)
    if options.parts[0] == "summary":
        return options
    if options.parts == ["all"]:
        options.parts = list(PARTS)
    if set(options.parts) - set(PARTS):
        made.error(f"PART: expected {', '.join(PARTS)}, all or summary, got {' '.join(options.parts)}")
    for text in options.budget:
        name, _, number = text.rpartition("=")
        if (name and name not in PARTS) or not number.isdecimal():
            made.error(f"--budget: expected SECONDS or PART=SECONDS, got {text}")
    return options


def budget(part: str, options: argparse.Namespace) -> float:
    """The seconds of a part: what the last `--budget` for it, or for every part, says."""
    seconds = PARTS[part][0]
    for text in options.budget:
        name, _, number = text.rpartition("=")
        if name in ("", part):
            seconds = int(number)
    return float(seconds)


def main() -> int:
    options = parse()
    if options.parts[0] == "summary":
        folders = [Path(folder) for folder in options.parts[1:]] or [Path(os.environ.get("OUT") or rows.RESULTS)]
        print(summary.text(folders, smoke=options.smoke))
        return 0
    out = Path(tempfile.mkdtemp(prefix="bench-gpu-") if options.smoke else os.environ.get("OUT") or rows.RESULTS)
    print(f"rows go to {out}", flush=True)
    supervisor = Supervisor(options, out)
    if options.smoke:
        supervisor.run(options.parts, budget(options.parts[0], options), 1, "first")
    else:
        for part in options.parts:
            seconds, start = budget(part, options), time.time()
            timed = PARTS[part][1] == 1
            if timed:
                supervisor.run([part], WARM_SHARE * seconds, options.jobs or WARM_WORKERS, "only")
                print(f"{part}: compiled ahead in {time.time() - start:.0f} s", flush=True)
            workers = 1 if timed else options.jobs or PARTS[part][1]
            supervisor.run([part], seconds - (time.time() - start), workers)
            print(f"{part}: {time.time() - start:.0f} of {seconds:.0f} s", flush=True)
    print(summary.text([out], smoke=options.smoke), flush=True)
    return 1 if supervisor.crashes or summary.failures([out], options.parts, smoke=options.smoke) else 0


if __name__ == "__main__":
    sys.exit(main())
