"""Write LOSSLESS.md: how far every rule is from the target's law, and what a wrong rule looks like.

python scripts/lossless.py [--output LOSSLESS.md] [--scale 1.0] [--interpreter-minutes 0]

About three minutes on one core; `--scale` multiplies every number of samples but those of Triton's interpreter, which
takes hours to see as much. What it emitted is counted by `scripts/interpreted.py`, kept in `scripts/interpreted.json`
from one run to the next, and only read here; `--interpreter-minutes` adds to it first.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import decisions
import interpreted
import laws
import numpy as np
import torch
from interpreted import PROPOSALS
from laws import Law, Model, law_of, marginal

from mcsd_kernels import SamplingParams, draw_candidates, draw_uniforms, reference, verify

ROOT = Path(__file__).resolve().parent.parent
RULES = {"recursive": reference.recursive, "traversal": reference.traversal}

STAR, CHAIN, TWO_LEVELS = [-1, 0, 0, 0], [-1, 0, 1, 2], [-1, 0, 0, 1, 1]
BINARY, UNEVEN = [-1, 0, 0, 1, 1, 2, 2], [-1, 0, 0, 1, 3]

EXACT = 1e-12  # an enumeration's rounding stays below
BIASED = 1e-3  # and a mistake's error above
SMALLEST_P = 1e-4
CONTROL_P = 1e-9


# ---- every draw and every decision


def problems() -> list[tuple[Model, list[int]]]:
    """Laws and trees small enough for every branch to be visited."""
    p = [0.4, 0.3, 0.15, 0.1, 0.05]
    named = {
        "overlap": ([0.1, 0.35, 0.3, 0.05, 0.2], p),
        "equal": (p, p),
        "differ by a rounding": ([0.4 + 1e-15, 0.3 - 1e-15, 0.15, 0.1, 0.05], p),
        "disjoint": ([0.0, 0.0, 0.2, 0.3, 0.5], [0.5, 0.5, 0.0, 0.0, 0.0]),
        "one-hot draft": ([0.0, 1.0, 0.0, 0.0, 0.0], p),
        "one-hot target": (p, [0.0, 0.0, 1.0, 0.0, 0.0]),
        "confident draft": ([0.9997, 1e-4, 1e-4, 5e-5, 5e-5], p),
    }
    found = [(laws.fixed_model(target, draft), tree) for draft, target in named.values() for tree in (STAR, CHAIN)]
    found += [(laws.random_model(4, seed), tree) for seed in range(8) for tree in (STAR, CHAIN, TWO_LEVELS)]
    filtered = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.02}
    found += [(laws.random_model(5, seed, filtered, {"temperature": 1.3}), TWO_LEVELS) for seed in (3, 4)]
    found += [(laws.random_model(4, 5, {}, {"top_k": 3}), tree) for tree in (BINARY, UNEVEN)]
    return found


def enumerated() -> list[dict[str, Any]]:
    """A row a rule and proposal: problems, branches, and the largest error of the joint law."""
    rows = []
    for rule, function in RULES.items():
        for proposal in PROPOSALS:
            error, branches = 0.0, 0
            for model, parents in problems():
                emitted = laws.enumerate_branches(model, parents, proposal, function)
                branches += emitted.branches
                error = max(error, laws.distances(model, emitted.law, laws.depth(parents) + 1)[0])
            cases = len(problems())
            rows.append({"rule": rule, "proposal": proposal, "cases": cases, "branches": branches, "error": error})
            progress(f"enumerated {rule} {proposal}: {branches} branches, error {error:.1e}")
    return rows


# ---- the backends, decision by decision


def decided(backend: str, device: str) -> list[dict[str, Any]]:
    """A row a rule and proposal: how many answers were asked for and wrong, and wrong with a mistake."""
    rows = []
    for rule in RULES:
        for proposal in PROPOSALS:
            rows.append(decisions.row(rule, proposal, backend, device))
            progress(f"decisions, {backend}: {rows[-1]}")
    return rows


# ---- the backends, sampled

VOCAB, TREE = 5, [-1, 0, 0, 0, 1, 1]
SAMPLING = SamplingParams(temperature=0.8, top_k=4, top_p=0.97, min_p=0.02)
DRAFT_SAMPLING = SamplingParams(temperature=1.3, top_k=4, top_p=0.98)


def sampled(backend: str, requests: dict[str, int], device: str, inputs: str = "logits") -> list[dict[str, Any]]:
    """A row a rule and proposal: chi-square of three tokens, and how many answers differ from the torch backend's."""
    # row 0 follows no token, row 1 + a token a, row 6 + 5 a + b tokens a, b
    target, draft = laws.logit_rows(1 + VOCAB + VOCAB**2, VOCAB, SAMPLING, DRAFT_SAMPLING)
    p = [law_of(row.double().numpy(), SAMPLING) for row in target]
    joint = [
        ((a, b, c), float(p[0][a] * p[1 + a][b] * p[6 + 5 * a + b][c]))
        for a in range(VOCAB)
        for b in range(VOCAB)
        for c in range(VOCAB)
    ]
    q_rows = draft.to(device)
    options: dict[str, Any] = {"sampling": SAMPLING, "draft_sampling": DRAFT_SAMPLING}
    p_rows, verified_q = target.to(device), q_rows
    if inputs == "probabilities":
        p_rows = torch.tensor(np.stack(p)).float().to(device)
        q = [law_of(row.double().numpy(), DRAFT_SAMPLING) for row in draft]
        verified_q, options = torch.tensor(np.stack(q)).float().to(device), {"inputs": inputs}
    rows_out = []
    for rule in RULES:
        for proposal in PROPOSALS:
            rng, differ, start = np.random.default_rng(1), 0, time.perf_counter()
            counts: dict[tuple[int, ...], int] = {}
            todo = requests[rule]
            for first in range(0, todo, 1000):
                seeds = torch.arange(first, min(first + 1000, todo), device=device)
                tokens, rows = drafted(q_rows, seeds, proposal)
                arguments = (p_rows, verified_q, tokens, torch.tensor(TREE, device=device))
                coins = draw_uniforms(seeds, 0, len(TREE) + 2)
                given = {
                    "proposal": proposal,
                    "rule": rule,
                    "target_rows": rows,
                    "draft_rows": rows,
                    "max_depth": 2,
                    **options,
                }
                found = verify(*arguments, coins, backend=backend, **given)
                if backend != "torch":
                    twin = verify(*arguments, coins, backend="torch", **given)
                    same = [(x == y).reshape(len(seeds), -1).all(1) for x, y in zip(found, twin, strict=True)]
                    differ += int((~torch.stack(same).all(0)).sum())
                for text in found.tokens.tolist():
                    kept = [token for token in text if token >= 0]
                    while len(kept) < 3:
                        row = 1 + kept[0] if len(kept) == 1 else 6 + 5 * kept[0] + kept[1]
                        kept.append(int(rng.choice(VOCAB, p=p[row])))
                    counts[tuple(kept)] = counts.get(tuple(kept), 0) + 1
            known = 3 if todo >= 2000 else 1  # so many tokens that most outcomes are expected five times
            value = laws.chi_square(marginal(known, joint).items(), marginal(known, counts.items()))
            row_out = {"rule": rule, "proposal": proposal, "requests": todo, "tokens": known}
            rows_out.append({**row_out, "p": value, "differ": differ})
            seconds = time.perf_counter() - start
            progress(f"{backend} {inputs} {rule} {proposal}: {todo} requests, p = {value:.3g}, {seconds:.0f} s")
    return rows_out


def drafted(q_rows: torch.Tensor, seeds: torch.Tensor, proposal: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`[requests, nodes]` tokens and row numbers: three candidates, two more under the first of them."""

    def candidates(rows: torch.Tensor, k: int, node: int) -> torch.Tensor:
        nodes = torch.full_like(seeds, node)
        return draw_candidates(
            q_rows[rows], k, seeds, 0, proposal=proposal, sampling=DRAFT_SAMPLING, nodes=nodes, backend="torch"
        )

    first = candidates(torch.zeros_like(seeds), 3, 0)
    below = 1 + first[:, :1].clamp(min=0)
    second = candidates(below[:, 0], 2, 1)
    root = torch.zeros_like(seeds)[:, None]
    deeper = 6 + 5 * (below - 1) + second.clamp(min=0)
    tokens = torch.cat([root, first, second], 1)
    return tokens, torch.cat([root, 1 + first.clamp(min=0), deeper], 1).int()


# ---- mistakes, and rules of other systems


def by_q(q: Law, candidates: laws.Context) -> laws.Context:
    """The candidates in the order of their draft probability."""
    return tuple(sorted(candidates, key=lambda x: -q[x]))


def likely_only(q: Law, candidates: laws.Context) -> laws.Context:
    """The candidates without those whose draft probability is small."""
    return tuple(x if q[x] > 0.2 else -1 for x in candidates)


def mistakes() -> list[tuple[str, str, Any, dict[str, Any], list[int], Model]]:
    """What is done wrong, how it is verified, the rule, its options, the tree and the model."""
    one = laws.random_model(5, 1)
    # what temperature 0 of the draft means in the paper's code: q is the softmax over the k largest logits alone
    cut = laws.random_model(5, 1, {}, {"top_k": 2})
    wor, wr = "without_replacement", "with_replacement"
    found: list[tuple[str, str, Any, dict[str, Any], list[int], Model]] = []
    for rule in RULES:
        found += [
            (f"candidates sorted by q, `{rule}`", wor, RULES[rule], {"arrange": by_q}, STAR[:3], one),
            (f"candidates with small q taken out, `{rule}`", wr, RULES[rule], {"arrange": likely_only}, STAR[:3], one),
        ]
    point = {"drawn_as": "point"}
    for rule in RULES:
        found += [
            (f"**top-k children tested as if sampled**, `{rule}`", wor, RULES[rule], point, STAR[:3], one),
            (f"**MCSD's code at draft temperature 0**, `{rule}`", wor, RULES[rule], point, STAR[:3], cut),
        ]
    found += [
        ("**p and q unchanged between siblings**, without replacement", wor, laws.unchanged_laws, {}, STAR[:3], one),
        ("**p and q unchanged between siblings**, with replacement", wr, laws.unchanged_laws, {}, STAR[:3], one),
        ("**longest path, each with coins of its own**", wr, laws.longest_path, {}, BINARY, laws.random_model(3, 2)),
    ]
    return found


def controls(trials: int) -> list[dict[str, Any]]:
    """A row a mistake: its error by enumeration, chi-square of samples, and a sound rule on the same problem."""
    rows = []
    for name, proposal, rule, options, parents, model in mistakes():
        count = laws.depth(parents) + 1
        emitted = laws.enumerate_branches(model, parents, proposal, rule, **options)
        largest, variation = laws.distances(model, emitted.law, count)
        counts = laws.sample_branches(model, parents, proposal, rule, trials, 3, **options)
        value = laws.chi_square(laws.target_law(model, count).items(), counts)
        sound = options.get("drawn_as") or proposal
        right = laws.enumerate_branches(model, parents, sound, reference.recursive)
        rows.append(
            {
                "name": name,
                "error": largest,
                "variation": variation,
                "trials": trials,
                "p": value,
                "sound": sound,
                "sound_error": laws.distances(model, right.law, count)[0],
                "accepted": emitted.length,
                "sound_accepted": right.length,
            }
        )
        progress(f"{name}: total variation {variation:.3f}, p = {value:.2g}")
    return rows


# ---- the page


def page(parts: dict[str, Any]) -> str:
    """LOSSLESS.md."""
    lines = [
        "# Lossless, and how one can tell",
        "",
        "Generated by `python scripts/lossless.py`; do not edit. "
        f"{parts['date']}, {parts['machine']}, {parts['versions']}.",
        "",
        "A verifier is lossless when the emitted tokens are distributed as if the target had generated them one at",
        "a time. Acceptance rates and benchmark scores do not show whether it is: a wrong rule often accepts *more*.",
        "",
        "## 1. Every draw and every decision, summed up",
        "",
        "The float64 oracle (`mcsd_kernels/reference.py`) on small vocabularies and trees: every tuple of candidates",
        "that can be drawn, every accept and reject, each with its probability. What is compared is the joint law of",
        "depth + 1 tokens with the target's own; the error is the largest difference of a probability.",
        "",
        "| rule | proposal | laws and trees | branches | largest error |",
        "|---|---|---|---|---|",
        *(
            f"| `{r['rule']}` | `{r['proposal']}` | {r['cases']} | {r['branches']:,} | {r['error']:.1e} |"
            for r in parts["enumerated"]
        ),
        "",
        "## 2. The backends, decision by decision",
        "",
        "For given candidates, what `verify` emits is a step function of its uniform numbers: each is compared with a",
        "threshold. For every tuple of candidates that can be drawn in three small trees the oracle says where the",
        f"thresholds are, and a backend is asked on both sides of each, {decisions.MARGIN:g} away; in a final draw for",
        "every token. If no answer is wrong, the law of what the backend emits is the target's to 1e-4, given that",
        "of the candidates. *Control*: how many answers are wrong when the backend's target is, by less than 3e-4 in",
        "total variation.",
        "",
        "| backend | rule | proposal | tuples | requests | wrong | control |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | `{r['rule']}` | `{r['proposal']}` | {r['tuples']} | {r['requests']} | {r['wrong']} | "
            f"{r['control']} |"
            for name, rows in parts["decided"].items()
            for r in rows
        ),
        "",
        "## 3. The backends, sampled",
        "",
        f"Candidates from `draw_candidates`, coins from `draw_uniforms`, the tree {TREE}, {VOCAB} tokens,",
        "target and draft with temperatures and filters of their own (overlap 0.4 to 0.5). Pearson's chi-square of",
        f"the first tokens' joint law, at fixed seeds; the page is not written if a p is below {SMALLEST_P:g}.",
        "",
        "| backend | rule | proposal | requests | tokens | p | differ from the torch backend |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in parts["sampled"].items():
        lines += [
            f"| {name} | `{r['rule']}` | `{r['proposal']}` | {r['requests']:,} | {r['tokens']} | {r['p']:.3f} | "
            f"{'–' if name.startswith('torch') else r['differ']} |"
            for r in rows
        ]
    lines += [
        "",
        *interpreter_lines(parts["interpreted"]),
        "## 4. What these measurements can see",
        "",
        "The first and the third measurement of what is wrong. In bold: rules found in other systems, written here in",
        "a few lines of our own (`scripts/laws.py`), not their code. Tokens a call stand in brackets. The last column",
        "is our rule for how the candidates really came about, on the same problem: no less simple, and lossless.",
        "",
        f"| done wrong | total variation | p of {parts['controls'][0]['trials']:,} samples | lossless instead: error |",
        "|---|---|---|---|",
        *(
            f"| {r['name']} | {r['variation']:.3f} [{r['accepted']:.2f}] | {small(r['p'])} | "
            f"`{r['sound']}` {r['sound_error']:.0e} [{r['sound_accepted']:.2f}] |"
            for r in parts["controls"]
        ),
        "",
        "MCSD's code at draft temperature 0 takes the k most probable tokens, and for q the softmax over their logits",
        "alone (NJUNLP/MCSD, `MCSD/inference/strategies.py`). The paper's rule with sampled candidates is lossless: it",
        "is the first row of the first table. Coins keyed by position, a stale residual and other mistakes are",
        "controls in `tests/test_reference.py` and `tests/test_verify.py`.",
        "",
    ]
    return "\n".join(lines)


def interpreter_lines(counted: dict[str, Any] | None) -> list[str]:
    """The part on Triton's interpreter; nothing where nothing was counted."""
    if counted is None or not counted["rows"]:
        return []
    same = "these kernels" if interpreted.is_current(counted) else "earlier kernels, changed since"
    return [
        "### Triton, interpreted",
        "",
        f"The Triton backend in its interpreter, with candidates and coins that Triton drew: {same} (sources",
        f"{counted['kernels']}), {' and '.join(counted['dates'])}, {counted['versions']}.",
        *(
            f"Of each pair's requests {earlier['requests']:,} were answered by kernels {earlier['kernels']}; to the "
            f"first {interpreted.REPLAYED} their successors' answers are the same."
            for earlier in counted.get("carried", [])
        ),
        f"The tree {interpreted.TREE} with virtual leaves, {interpreted.VOCAB} tokens; the candidates of a request are",
        "verified by both rules. *Sees* is the total variation, in whatever direction, that so many requests",
        "show nine times in ten by a p below 0.01: the one for which the non-centrality 4 n TV² suffices.",
        "",
        "| rule | proposal | requests | p of one token | sees | p of two | sees | differ from the torch backend |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {' | '.join(f'`{word}`' for word in r['name'].split())} | {r['requests']:,} | "
            + " | ".join(f"{p:.3f} | {sees:.3f}" for p, sees in zip(r["p"], r["sees"], strict=True))
            + f" | {r['differ']} |"
            for r in counted["rows"]
            if r["name"] != interpreted.CONTROL
        ),
        "",
        *(
            f"What must fail, by the same way: {r['name']} under `recursive`, `without_replacement`;\n"
            f"{r['requests']:,} requests, p = {small(r['p'][0])} of one token, {small(r['p'][1])} of two."
            for r in counted["rows"]
            if r["name"] == interpreted.CONTROL
        ),
        "Answer by answer the Triton backend is compared with the oracle in `tests/test_triton_verify.py`.",
        "",
    ]


def small(p: float) -> str:
    """A p-value that may be 0 in double precision."""
    return f"{p:.0e}" if p > 1e-300 else "< 1e-300"


def judge(parts: dict[str, Any]) -> list[str]:
    """What would make the page untrue."""
    wrong = [f"{r['rule']} {r['proposal']}: error {r['error']}" for r in parts["enumerated"] if not r["error"] <= EXACT]
    for name, rows in parts["sampled"].items():
        wrong += [f"{name} {r['rule']} {r['proposal']}: p {r['p']}" for r in rows if not r["p"] >= SMALLEST_P]
        wrong += [f"{name} {r['rule']} {r['proposal']}: {r['differ']} differ" for r in rows if r["differ"]]
    for name, rows in parts["decided"].items():
        wrong += [f"{name}: {r}" for r in rows if r["wrong"] or not r["control"]]
    for r in (parts["interpreted"] or {"rows": []})["rows"]:
        if r["name"] == interpreted.CONTROL:
            enough = r["requests"] >= interpreted.CONTROL_REQUESTS
            wrong += [f"control not seen: {r}"] if enough and not max(r["p"]) < CONTROL_P else []
        elif r["differ"] or not min(r["p"]) >= SMALLEST_P:
            wrong.append(f"Triton, interpreted: {r}")
    for r in parts["controls"]:
        if not (r["variation"] > BIASED and r["p"] < CONTROL_P and r["sound_error"] <= EXACT):
            wrong.append(f"control not seen: {r['name']}: {r}")
    return wrong


def counted_before(path: Path) -> dict[str, Any] | None:
    """What `scripts/interpreted.py` has found: the decisions of the kernels as they are, and the rows of its counts."""
    if not path.exists():
        return None
    state = json.loads(path.read_text())
    decided = [row for row in state["decisions"].values() if interpreted.is_current(row)]
    return {**state, "decided": decided, "rows": interpreted.results(state)}


def machine() -> str:
    """The processor's name and, if there is one, the GPU's."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def versions() -> str:
    """What ran."""
    try:
        import triton

        kernels = f"Triton {triton.__version__}"
    except ImportError:
        kernels = "no Triton"
    return f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}, {kernels}"


def progress(text: str) -> None:
    """One line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, judge, write; the exit status says whether the page was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "LOSSLESS.md")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every number of samples")
    parser.add_argument("--counts", type=Path, default=interpreted.STATE, help="what the interpreter emitted so far")
    parser.add_argument("--interpreter-minutes", type=float, default=0.0, help="how long Triton's interpreter runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.interpreter_minutes:
        more = ["--minutes", str(options.interpreter_minutes), "--state", str(options.counts)]
        subprocess.check_call([sys.executable, interpreted.__file__, *more], stdout=sys.stderr)

    def scaled(recursive: int, traversal: int) -> dict[str, int]:
        return {name: max(int(n * options.scale), 1) for name, n in zip(RULES, (recursive, traversal), strict=True)}

    gpu = torch.cuda.is_available()
    counted = counted_before(options.counts)
    parts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "enumerated": enumerated(),
        "decided": {
            "torch": decided("torch", "cpu"),
            **({"Triton, GPU": decided("triton", "cuda")} if gpu else {}),
            **({"Triton, interpreted": counted["decided"]} if counted else {}),
        },
        "sampled": {
            "torch": sampled("torch", scaled(40_000, 15_000), "cpu"),
            "torch, from probabilities": sampled("torch", scaled(15_000, 6_000), "cpu", "probabilities"),
            **({"Triton, GPU": sampled("triton", scaled(100_000, 100_000), "cuda")} if gpu else {}),
        },
        "interpreted": counted,
        "controls": controls(max(int(8_000 * options.scale), 4_000)),  # fewer would not be sure to see them
    }
    wrong = judge(parts)
    for line in wrong:
        print(f"NOT LOSSLESS, or not seen: {line}", file=sys.stderr)
    if not wrong:
        options.output.write_text(page(parts))
    print(json.dumps({"written": not wrong, "output": str(options.output), "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
