"""Multi-candidate speculative decoding for any decoder-only model: `model.generate(custom_generate="<repository>")`."""

from collections.abc import Sequence
from typing import Any

from transformers import GenerationMixin

from mcsd.integrations.transformers import TreeDecoding


def generate(
    model: Any,
    inputs: Any = None,
    *,
    assistant_model: Any = None,
    branching: Sequence[int] = (4, 2, 2),
    proposal: str | None = None,
    rule: str = "recursive",
    seed: int | None = None,
    streamer: Any = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Any:
    """`model.generate` with token trees; every other argument means what it means there.

    Args:
        model: the target; transformers puts it in.
        inputs: the prompts.
        assistant_model: the draft, a model with the same vocabulary. None: look continuations up in the text ("ngram").
        branching: candidates for the first drafted token, for the one after each of them, and so on.
        proposal: how siblings are drawn, see `mcsd_kernels.verify`.
        rule: "recursive" or "traversal".
        seed: of the random numbers. None: torch's generator decides.
        streamer: gets the prompt and then every token; batch 1 only.
        stop_strings: end a request when its text ends in one of these.
        tokenizer: for `stop_strings`.
        options: everything else that `generate` takes.
    """
    decoding = TreeDecoding(
        "ngram" if assistant_model is None else assistant_model,
        branching,
        proposal=proposal,
        rule=rule,
        seed=seed,
        streamer=streamer,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
    # not model.generate, which is this function where it was loaded together with the model
    return GenerationMixin.generate(model, inputs, custom_generate=decoding, **options)
