"""The Triton backend on a GPU: checked first, then measured, one JSON row a result.

    bench/gpu.sh checks            answers against the oracle and the torch backend, and what may not matter to them
    bench/gpu.sh laws              chi-square of a million short texts a rule and proposal, with controls that must fail
    bench/gpu.sh sanitizer         compute-sanitizer's memcheck and racecheck, where the tool is there
    bench/gpu.sh verify            `verify` timed beside its rivals
    bench/gpu.sh candidates        `draw_candidates`, `row_cutoffs`, `draw_uniforms` timed beside theirs
    bench/gpu.sh all               these in turn
    bench/gpu.sh summary [FOLDER]  tables and targets from the rows

It needs torch with Triton and nothing else: no installation, no pytest. Rows go to `gpu_<part>.jsonl` in `$OUT`, or in
`bench/results` if that is not set.

A part is a list of units, the most valuable first. Workers run them in processes of their own and append rows as they
come, so a part that is killed keeps what it has; a unit that crashes or hangs costs a row that says so. Started
again, it goes on with the units that have no row yet, of this device and these kernels (each row has the sources'
hash), in `$OUT` or in `bench/results`. `--budget` bounds the seconds of a part, `--only` picks units.

Timing: a call is captured in a CUDA graph; before each replay another candidate tree and other uniform numbers are
copied in, and a buffer of several times the L2 cache is read, so that the rows come from memory and nothing dirty is
left to be written back. Rivals take turns, a slow one in fewer rounds, of which its entry says how many. A row has
median and 20/80 percentiles, in microseconds between two events, and the floor: the bytes of the rows that these calls
visited, over the bandwidth of a large copy measured just before; `traffic_bytes` is what the launched kernels move.
A kernel whose answer is wrong at a shape is not timed there: the row is an error row.

`--smoke` runs the same code without a GPU, in Triton's interpreter at tiny sizes, and writes to a temporary folder.
"""
