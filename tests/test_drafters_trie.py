"""Context tries: what they count, and the trees that come of it."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
import torch

import mcsd
from mcsd import Proposal
from mcsd.drafters.trie import ContextTrie, TrieDrafter
from tests.small_law import P, p_of, sample
from tests.test_drafters import paths_of, state_of
from tests.tiny import greedy, pad, prompt, tiny


def random_text(seed: int, length: int, vocab: int) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


TEXTS = {
    "two-letters": random_text(0, 60, 2),
    "four-letters": random_text(1, 80, 4),
    "all-different": list(range(30)),
    "one-letter": [5] * 30,
    "period": [1, 2, 3] * 10,
    "fibonacci": [1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1],
}


@pytest.mark.parametrize("pieces", [1, 7], ids=["token-by-token", "in-pieces"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_trie_counts_every_ngram(text: list[int], pieces: int) -> None:
    longest = 5
    trie = ContextTrie(longest, width=99)
    read: list[int] = []
    for at in range(0, len(text), pieces):
        trie.extend(text[at : at + pieces])
        read += text[at : at + pieces]
        if at % 3:
            trie.find(read[-3:])  # a look does not change what is counted
        counts = Counter(tuple(read[i : i + n]) for n in range(1, longest + 1) for i in range(len(read) - n + 1))
        for ngram, count in counts.items():
            node = trie.find(ngram)
            assert node is not None and trie.count[node] == count, (read, ngram)
            if len(ngram) < longest:
                followers = {t: c for t, _, c in trie.followers(node)}
                assert followers == {g[-1]: c for g, c in counts.items() if g[:-1] == ngram}
                assert list(followers.values()) == sorted(followers.values(), reverse=True)
    assert trie.find([*text[:2], 77]) is None


def test_followers_of_equal_counts_stand_the_most_recent_first() -> None:
    trie = ContextTrie(3, width=2)
    trie.extend([7, 1, 7, 2, 7, 3])
    node = trie.find([7])
    assert node is not None and [t for t, _, _ in trie.followers(node)] == [3, 2]
    trie.extend([7, 1, 7, 1, 7, 2])
    assert [(t, c) for t, _, c in trie.followers(node)] == [(1, 3), (2, 2)]


def tree(text: list[int], **options: Any) -> tuple[Proposal, list[list[int]]]:
    drafter = TrieDrafter(**options)
    state = state_of([text])
    drafter.begin(state)
    proposal = drafter.propose(state)
    return proposal, [path for path in paths_of(proposal, 0).values() if path]


def test_the_frequent_continuation_comes_before_the_recent_one() -> None:
    text = [7, 10, 11, 7, 10, 11, 7, 10, 12, 7, 20, 21, 7]
    _, paths = tree(text, longest=1, depth=2, nodes=8)
    assert paths == [[10], [10, 11], [20], [20, 21], [10, 12]]  # weights 3/5, 2/5, 1/5, 1/5, 1/5
    _, paths = tree(text, longest=1, depth=2, nodes=3)
    assert paths == [[10], [10, 11]]
    _, paths = tree(text, longest=1, depth=2, nodes=8, continuations=1)
    assert paths == [[10], [10, 11]]


def test_longer_contexts_come_first_and_shorter_ones_share_their_nodes() -> None:
    # after (5, 7): 30 once; after (7): 40 three times, 30 once
    text = [7, 40, 1, 7, 40, 2, 5, 7, 30, 31, 7, 40, 3, 5, 7]
    _, paths = tree(text, longest=2, depth=1, nodes=9)
    assert paths == [[30], [40]]
    _, paths = tree(text, longest=1, depth=1, nodes=9)
    assert paths == [[40], [30]]
    _, paths = tree(text, longest=2, shortest=2, depth=1, nodes=9)
    assert paths == [[30]]
    proposal, _ = tree(text, longest=2, depth=2, nodes=9)
    tokens, parents = proposal.tokens[0].tolist(), proposal.parents[0].tolist()
    assert len(set(zip(parents, tokens, strict=True))) == len(tokens), "no sibling twice"


def test_without_a_match_it_is_plain_decoding() -> None:
    for text in ([1, 2, 3], [4]):
        proposal, paths = tree(text)
        assert paths == [] and proposal.tokens.tolist() == [[text[-1]]]


@pytest.mark.parametrize("nodes", [2, 16, 40])
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_it_keeps_to_its_bounds(depth: int, nodes: int) -> None:
    for seed in range(10):
        text = random_text(seed, 60, 4)
        proposal, paths = tree(text, depth=depth, nodes=nodes)
        parents = proposal.parents[0].tolist()
        assert proposal.tokens.shape[1] <= nodes and max(map(len, paths)) <= depth <= proposal.depth
        assert parents[0] == -1 and all(parent < node for node, parent in enumerate(parents))
        for path in paths:
            assert any(text[i - 1] == text[-1] and text[i : i + len(path)] == path for i in range(1, len(text)))


def test_requests_apart_and_what_was_generated() -> None:
    drafter = TrieDrafter(longest=2, depth=2)
    state = state_of([[1, 2, 3], [9, 8, 9]])
    drafter.begin(state)
    first = drafter.propose(state)
    assert paths_of(first, 0) == {0: []} and list(paths_of(first, 1).values()) == [[], [8], [8, 9]]
    state.sequences[0] += [4, 2]
    state.active[1] = False
    second = drafter.propose(state)
    assert list(paths_of(second, 0).values()) == [[], [3], [3, 4]]
    assert paths_of(second, 1) == {0: []}, "a request that is over proposes nothing"


def test_greedy_text_is_plain_greedy() -> None:
    llama = tiny()
    ids, mask = pad([prompt(17, 1), [5, 6, 7] * 5, prompt(9, 3)])
    wanted = greedy(llama, ids, mask, 40)
    found = mcsd.generate(llama, TrieDrafter(), ids, mask, max_new_tokens=40, temperature=0.0)
    assert torch.equal(found.sequences, wanted) and found.stats.tokens_per_call > 1.05


def test_sampled_text_has_the_targets_law() -> None:
    found, stats = sample(TrieDrafter(), rule="traversal")
    assert 0 < sum(stats.accepted_by_depth) < sum(stats.tested_by_depth)
    assert p_of(found) > P


def test_long_texts_cost_what_is_new_in_them() -> None:
    drafter = TrieDrafter()
    for text in ([5] * 20_000, random_text(3, 20_000, 300)):
        state = state_of([text], capacity=30_000)
        drafter.begin(state)
        drafter.propose(state)
        trie = drafter._tries[0]
        assert len(trie.count) < 3.5 * len(text), "about two nodes a token"
        seconds = []
        for _ in range(20):
            state.sequences[0].append(5)
            start = time.perf_counter()
            drafter.propose(state)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.01  # a rescan of the text takes ten times as long


@pytest.mark.parametrize(
    "options",
    [{"shortest": 0}, {"longest": 2, "shortest": 3}, {"depth": 0}, {"continuations": 0}, {"nodes": 1}],
    ids=["shortest-zero", "shortest-above-longest", "no-depth", "no-continuations", "root-alone"],
)
def test_mistakes_are_named(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        TrieDrafter(**options)
