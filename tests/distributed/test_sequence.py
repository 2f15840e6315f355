"""Sequence parallelism over up to 4 gloo processes, by heads, round a ring and both = one process, same weights."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import pytest
import torch

from longrl.parallel.layout import require_heads
from tests.distributed import ranks
from tests.distributed.conftest import start
from tests.distributed.ranks import CASES, DECODE, HEAD_DIM, LAYERS, LAYOUTS, LONG, TRAFFIC, WORLD
from tests.parity.test_shared_prefix import largest_difference

pytestmark = pytest.mark.distributed

# transformers' norms and rotary embedding compute in fp32 whatever the dtype: the floor in fp64 is about 1e-8
BOUNDS = {torch.float64: 1e-7, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[tuple[str, int], dict[str, Any]]]:
    """What each rank of one start found, by (job, ranks in the group)."""
    folder = tmp_path_factory.mktemp("ranks")
    start(ranks.run, WORLD, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@cache
def alone(name: str) -> dict[str, Any]:
    return ranks.train(CASES[name], None)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_logprobs_entropy_and_gradients_equal_one_process(found, name, layout):
    theirs, bound = alone(name), BOUNDS[CASES[name].dtype]
    for rank in range(prod(layout)):
        ours = found[rank][name, layout]
        assert (ours["logprobs"] - theirs["logprobs"]).abs().max() < bound * 10
        assert (ours["entropy"] - theirs["entropy"]).abs().max() < bound * 10
        assert largest_difference(ours["gradients"], theirs["gradients"]) < bound
        # the same bits everywhere: ranks that step from these stay equal
        first = found[0][name, layout]
        assert torch.equal(ours["logprobs"], first["logprobs"])
        assert all(torch.equal(g, first["gradients"][n]) for n, g in ours["gradients"].items())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("temperature", [0.9, 0.0])
def test_decoding_draws_what_one_process_draws(found, temperature, layout):
    theirs = ranks.decode(temperature, None)["rollouts"]
    assert len({len(one.token_ids) for one in theirs}) >= 3 or not temperature
    first = found[0][f"decode {temperature:g}", layout]["rollouts"]
    for rank in range(prod(layout)):
        ours = found[rank][f"decode {temperature:g}", layout]["rollouts"]
        assert ours == first
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids
            assert (torch.tensor(one.logprobs) - torch.tensor(other.logprobs)).abs().max() < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_engine_and_trainer_agree(found, layout):
    for rank in range(prod(layout)):
        ours = found[rank]["agree", layout]
        assert ours["tokens"] > 50
        assert ours["difference"] < 1e-5  # as in one process


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_holds_its_share_of_the_prefix(found, layout):
    """Hidden states (and media, which become rows of them), keys and values, all that the backward keeps."""
    theirs, (heads, ring), size = ranks.hold(None), layout, prod(layout)
    for rank in range(size):
        ours = found[rank]["hold", layout]
        share = -(-theirs["length"] // size)
        assert ours["rows"] == theirs["rows"] if size == 1 else ours["rows"] <= share
        positions = row_length(layout, rank, theirs["length"])
        assert positions <= -(-theirs["length"] // ring)
        assert ours["kv_bytes"] * heads * theirs["length"] == theirs["kv_bytes"] * positions
        # what attention makes is kept as it is there, for its own backward, and as it comes back, for o_proj's
        twice = LAYERS * theirs["length"] * LONG.heads * HEAD_DIM * 8
        whole = 8 * (theirs["length"] + 1)  # token ids
        assert ours["kept"] <= (theirs["kept"] + twice) * share / theirs["length"] + whole
        assert ours["kept"] + ours["kv_bytes"] <= 1.15 * (theirs["kept"] + theirs["kv_bytes"]) / size


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_keys_and_values_stay_with_their_heads(found, name, layout):
    """KV heads / heads of them, or one where there are fewer than ranks to deal them to; of its place in the ring."""
    for rank in range(prod(layout)):
        length = row_length(layout, rank, alone(name)["length"])
        for heads, positions, _ in found[rank][name, layout]["shapes"]:
            assert (heads, positions) == (max(1, CASES[name].kv_heads // layout[0]), length)


def ring_lengths(layout, total) -> list[int]:
    """Tokens of each place in the ring, and so of a row of ranks that share the heads."""
    return [total * (place + 1) // layout[1] - total * place // layout[1] for place in range(layout[1])]


def row_length(layout, rank, total) -> int:
    return ring_lengths(layout, total)[rank // layout[0]]


def counts(case, layout) -> tuple[int, int, int]:
    """Query and KV heads of a rank, the former with padding, and bytes of one of them in one token."""
    heads, dim = (4, 32) if case.heads is None else (case.heads, HEAD_DIM)
    copies = max(1, layout[0] // case.kv_heads)
    queries = case.kv_heads * copies * -(-(heads // case.kv_heads) // copies) // layout[0]
    return queries, max(1, case.kv_heads // layout[0]), dim * torch.finfo(case.dtype).bits // 8


def exchange_bytes(case, layout, rank, total) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a rank sends in a layer's attention over `total` tokens: (forward, backward) of the way in, of the way out.

    In: its tokens to every other rank of its row, as that rank's queries, keys and values. Out: its heads' results to
    the ranks that own the row's other tokens. The backward sends the gradients back the same ways.
    """
    queries, kv, row = counts(case, layout)
    mine, size = total * (rank + 1) // prod(layout) - total * rank // prod(layout), layout[0]
    kept = mine * (size - 1), row_length(layout, rank, total) - mine
    both = (queries + 2 * kv) * row
    return (kept[0] * both, kept[1] * both), (kept[1] * queries * row, kept[0] * queries * row)


def ring_bytes(case, layout, rank, total) -> tuple[int, int]:
    """What a rank sends round a ring for a layer of a prefix, forward and backward: the keys and values of all places
    but the one that is next, of which no more come by; backward those again and their gradients, of all places."""
    if layout[1] == 1:
        return 0, 0
    _, kv, row = counts(case, layout)
    lengths = ring_lengths(layout, total)
    keys = (total - lengths[(rank // layout[0] + 1) % layout[1]]) * 2 * kv * row
    return keys, keys + total * 2 * kv * row


def streams_bytes(case, layout, rank, total) -> tuple[int, int]:
    """What a rank sends to the other places of its ring for a layer of streams.

    Forward: its tokens as queries, keys and values; the others' tokens as partial results and their log-sum-exp, in
    fp64. Backward: its tokens again, with results, their gradient and log-sum-exp; the others' gradients.
    """
    queries, kv, row = counts(case, layout)
    lengths, places = ring_lengths(layout, total), layout[1] - 1
    dim = 32 if case.heads is None else HEAD_DIM
    others, sent = total - row_length(layout, rank, total), max(lengths) * places
    forward = sent * (queries + 2 * kv) * row + others * queries * (dim + 1) * 8
    backward = sent * ((3 * queries + 2 * kv) * row + queries * row // dim) + others * (queries + 2 * kv) * row
    return forward, backward


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_messages_of_training_are_as_long_as_reckoned(found, name, layout):
    """The suffix's do not depend on the length of the prefix: keys and values stay."""
    case, layers, size = CASES[name], 4 if CASES[name].heads is None else LAYERS, prod(layout)
    count, length = alone(name)["stream_shape"]
    rows = max(1, case.stream_tokens // length)
    batches = [min(rows, count - start) * max(length, -(-size // min(rows, count - start)))
               for start in range(0, count, rows)]  # fmt: skip
    passes = 1 + (case.memory.recompute != "none")
    for rank in range(size):
        (go, back), (out, out_back) = exchange_bytes(case, layout, rank, alone(name)["length"])
        # the last layer has no way out, and no reason to be asked again for its keys and values
        prefix = layers * (go + back) + (layers - 1) * ((passes - 1) * go + passes * out + out_back)
        there, and_back = ring_bytes(case, layout, rank, alone(name)["length"])
        ring = (layers - 1) * (passes * there + and_back)
        suffix = 0
        for total in batches:
            (go, back), (out, out_back) = exchange_bytes(case, layout, rank, total)
            forward, backward = streams_bytes(case, layout, rank, total)
            suffix += layers * (passes * (go + out + forward) + back + out_back + backward)
        # log-prob and entropy of a part of the tokens to every other rank
        width = torch.finfo(case.dtype).bits // 8
        scores = sum(2 * width * -(-total // size) for total in batches) * (size - 1)
        expected = {"prefix": prefix, "suffix": suffix, "scores": scores} | ({"ring": ring} if layout[1] > 1 else {})
        assert found[rank][name, layout]["bytes"] == expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_messages_of_decoding_are_as_long_as_reckoned(found, layout):
    """8 streams, 12 draws each, after a first call with what the longer question has after the prefix."""
    theirs, size = ranks.decode(0.0, None)["rollouts"], prod(layout)
    longest = max(DECODE.questions)
    tokens = 8 * (longest + 11)
    assert [len(one.token_ids) for one in theirs] == [12] * 8
    queries, _, row = counts(DECODE, layout)
    assert queries == {1: 6, 2: 3, 4: 2}[layout[0]]  # of 3 query heads, two ranks share the 4 they are padded to
    for rank in range(size):
        heads = (size - 1) * tokens * LAYERS * queries * (row + (8 if layout[1] > 1 else 0))
        draws = (size - 1) * 8 * (12 * 8 + 12 * 8) if rank == 0 else 0
        sent = found[rank]["decode 0", layout]["bytes"]
        assert (sent["decode"], sent.get("draws", 0)) == (heads, draws)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole weights", "sharded"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if prod(layout) > 1], ids=str)
def test_no_message_grows_with_the_prompt_but_the_exchange_of_its_tokens_and_the_rings_keys(found, layout, sharded):
    """Of all that torch.distributed sends in a step. The others are no longer than the suffix, or of weights and
    gradients."""
    weights = {"_allgather_base_", "_reduce_scatter_base_"} if sharded else {"allreduce_"}
    for rank in range(prod(layout)):
        by_length = found[rank]["traffic", layout]["messages"]
        short, long = (by_length[sharded, tokens] for tokens in TRAFFIC)
        assert [name for name, _ in short] == [name for name, _ in long]
        grown = {name for (name, size), (_, longer) in zip(short, long, strict=True) if longer > size}
        # where heads are not split, a rank exchanges its tokens with itself
        assert grown == {"alltoall_base_"} | ({"send", "recv_"} if layout[1] > 1 else set())
        # 4 streams of 4 + 5 - 1 tokens: queries, keys, values, results and their gradients, of all 8 and 4 heads
        suffix = 4 * 8 * 2 * (8 + 4 + 4 + 8) * HEAD_DIM * 8
        rest = [(name, size) for (name, size), other in zip(short, long, strict=True) if other == (name, size)]
        assert all(size <= suffix for name, size in rest if name not in weights)
        assert {name for name, _ in rest} >= weights
        assert len(rest) > 5 * LAYERS  # decoding a token has messages too


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_too_few_tokens_and_wrong_heads_are_refused_on_every_rank(found, layout):
    size = prod(layout)
    for rank in range(size):
        ours = found[rank]["refuse", layout]
        assert ours["short"] is not None
        assert f"{size - 1} tokens cannot be split over {size} sequence-parallel ranks" in ours["short"]
        wrong = {4: "4 = 1 x 3 + 1", 2: "3 = 1 x 2 + 1"}.get(layout[0])
        assert (ours["heads"] is None) if wrong is None else (wrong in ours["heads"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tokens_are_split_almost_equally(found, layout):
    size = prod(layout)
    for total in range(size, 40):
        spans = [found[rank]["refuse", layout]["span"][total] for rank in range(size)]
        assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
        assert spans[-1].stop == total
        lengths = [span.stop - span.start for span in spans]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_prefix_is_dealt_to_a_ring_from_both_ends(found, layout):
    """As many tokens as of streams, each to one rank; and the places of a ring attend to about as many keys each."""
    size = prod(layout)
    for total in range(size, 40):
        by_rank = [found[rank]["refuse", layout]["spans"][total] for rank in range(size)]
        tokens = [[i for span in spans for i in range(total)[span]] for spans in by_rank]
        assert sorted(i for some in tokens for i in some) == list(range(total))
        assert all(some == sorted(some) and len(spans) <= 2 for some, spans in zip(tokens, by_rank, strict=True))
        of_streams = [found[rank]["refuse", layout]["span"][total] for rank in range(size)]
        assert [len(some) for some in tokens] == [span.stop - span.start for span in of_streams]
        if layout[1] == 1:
            assert all(len(spans) == 1 for spans in by_rank)
        by_token = [sum(i + 1 for i in some) for some in tokens]
        work = [sum(by_token[first : first + layout[0]]) for first in range(0, size, layout[0])]
        assert max(work) - min(work) <= 2 * total


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_are_summed_whoever_has_them(found, layout):
    size = prod(layout)
    ranks_sum = sum(range(size))
    for rank in range(size):
        gradients = found[rank]["sum", layout]["gradients"]
        assert gradients["nowhere"] is None
        assert gradients["frozen"] is None
        assert torch.equal(gradients["first"], torch.arange(3.0))
        assert torch.equal(gradients["last"], torch.arange(9.0) * size + ranks_sum)
        assert torch.equal(gradients["everywhere"], torch.arange(20.0).view(4, 5) * size + ranks_sum)


@pytest.mark.parametrize(
    ("kv_heads", "sp", "ring"),
    [(4, 1, 1), (4, 2, 1), (4, 4, 1), (4, 8, 1), (2, 8, 1), (1, 3, 1), (4, 6, 3), (3, 8, 8), (8, 32, 4)],
)
def test_head_counts_that_work(kv_heads, sp, ring):
    require_heads(kv_heads, sp, ring)


@pytest.mark.parametrize(
    ("kv_heads", "sp", "ring", "why"),
    [
        (4, 6, 1, "4 KV heads cannot be dealt to 6 sequence-parallel ranks: one must be a multiple of the other, but "
                  "6 = 1 x 4 + 2"),
        (8, 3, 1, "8 = 2 x 3 + 2"),
        (4, 12, 2, "dealt to 6 sequence-parallel ranks (12 in rings of 2): one must"),
    ],
)  # fmt: skip
def test_head_counts_that_do_not(kv_heads, sp, ring, why):
    with pytest.raises(ValueError, match="KV heads cannot be dealt to") as refusal:
        require_heads(kv_heads, sp, ring)
    assert why in str(refusal.value)
    assert "\n" not in str(refusal.value)
