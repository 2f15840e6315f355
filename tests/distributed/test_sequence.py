"""Sequence parallelism over 4, 2 and 1 gloo processes = one process, on the same weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from longrl.parallel.layout import require_heads
from tests.distributed import ranks
from tests.distributed.conftest import start
from tests.distributed.ranks import CASES, DECODE, HEAD_DIM, LAYERS, LONG, SIZES
from tests.parity.test_shared_prefix import largest_difference

pytestmark = pytest.mark.distributed

# transformers' norms and rotary embedding compute in fp32 whatever the dtype: the floor in fp64 is about 1e-8
BOUNDS = {torch.float64: 1e-7, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[tuple[str, int], dict[str, Any]]]:
    """What each rank of one start found, by (job, ranks in the group)."""
    folder = tmp_path_factory.mktemp("ranks")
    start(ranks.run, max(SIZES), str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(max(SIZES))]


@cache
def alone(name: str) -> dict[str, Any]:
    return ranks.train(CASES[name], None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_logprobs_entropy_and_gradients_equal_one_process(found, name, size):
    theirs, bound = alone(name), BOUNDS[CASES[name].dtype]
    for rank in range(size):
        ours = found[rank][name, size]
        assert (ours["logprobs"] - theirs["logprobs"]).abs().max() < bound * 10
        assert (ours["entropy"] - theirs["entropy"]).abs().max() < bound * 10
        assert largest_difference(ours["gradients"], theirs["gradients"]) < bound
        # the same bits everywhere: ranks that step from these stay equal
        first = found[0][name, size]
        assert torch.equal(ours["logprobs"], first["logprobs"])
        assert all(torch.equal(g, first["gradients"][n]) for n, g in ours["gradients"].items())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.9, 0.0])
def test_decoding_draws_what_one_process_draws(found, temperature, size):
    theirs = ranks.decode(temperature, None)["rollouts"]
    assert len({len(one.token_ids) for one in theirs}) >= 3 or not temperature
    first = found[0][f"decode {temperature:g}", size]["rollouts"]
    for rank in range(size):
        ours = found[rank][f"decode {temperature:g}", size]["rollouts"]
        assert ours == first
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids
            assert (torch.tensor(one.logprobs) - torch.tensor(other.logprobs)).abs().max() < 1e-10


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_holds_its_share_of_the_prefix(found, size):
    """Hidden states (and media, which become rows of them), keys and values, all that the backward keeps."""
    theirs = ranks.hold(None)
    for rank in range(size):
        ours = found[rank]["hold", size]
        share = -(-theirs["length"] // size)
        assert ours["rows"] == theirs["rows"] if size == 1 else ours["rows"] <= share
        assert ours["kv_bytes"] * size == theirs["kv_bytes"]
        # what attention makes is kept as it is there, for its own backward, and as it comes back, for o_proj's
        twice = LAYERS * theirs["length"] * LONG.heads * HEAD_DIM * 8
        assert ours["kept"] <= (theirs["kept"] + twice) * share / theirs["length"] + 64


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_keys_and_values_stay_with_their_heads(found, name, size):
    """kv_heads / size of them, or one where there are fewer heads than ranks."""
    for rank in range(size):
        for heads, length, _ in found[rank][name, size]["shapes"]:
            assert (heads, length) == (max(1, CASES[name].kv_heads // size), alone(name)["length"])


def exchange_bytes(case, size, rank, total) -> tuple[int, int]:
    """What a rank sends in a layer's attention over `total` tokens: (forward, backward) of the way in, of the way out.

    In: its tokens to every other rank, as that rank's queries, keys and values. Out: its heads' results to the ranks
    that own the other tokens. The backward sends the gradients back the same ways.
    """
    heads, dim = (4, 32) if case.heads is None else (case.heads, HEAD_DIM)
    copies = max(1, size // case.kv_heads)
    queries = case.kv_heads * copies * -(-(heads // case.kv_heads) // copies) // size
    mine = total * (rank + 1) // size - total * rank // size
    kept = mine * (size - 1), total - mine
    row = dim * torch.finfo(case.dtype).bits // 8
    both = (queries + 2 * max(1, case.kv_heads // size)) * row
    return (kept[0] * both, kept[1] * both), (kept[1] * queries * row, kept[0] * queries * row)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_messages_of_training_are_as_long_as_reckoned(found, name, size):
    """The suffix's do not depend on the length of the prefix: keys and values stay."""
    case, layers = CASES[name], 4 if CASES[name].heads is None else LAYERS
    count, length = alone(name)["stream_shape"]
    rows = max(1, case.stream_tokens // length)
    batches = [min(rows, count - start) * max(length, -(-size // min(rows, count - start)))
               for start in range(0, count, rows)]  # fmt: skip
    for rank in range(size):
        (go, back), (out, out_back) = exchange_bytes(case, size, rank, alone(name)["length"])
        passes = 1 + (case.memory.recompute != "none")
        # the last layer has no way out, and no reason to be asked again for its keys and values
        prefix = layers * (go + back) + (layers - 1) * ((passes - 1) * go + passes * out + out_back)
        suffix = 0
        for total in batches:
            (go, back), (out, out_back) = exchange_bytes(case, size, rank, total)
            suffix += layers * (passes * (go + out) + back + out_back)
        # log-prob and entropy of a part of the tokens to every other rank
        width = torch.finfo(case.dtype).bits // 8
        scores = sum(2 * width * -(-total // size) for total in batches) * (size - 1)
        assert found[rank][name, size]["bytes"] == {"prefix": prefix, "suffix": suffix, "scores": scores}


@pytest.mark.parametrize("size", SIZES)
def test_messages_of_decoding_are_as_long_as_reckoned(found, size):
    """8 streams, 12 draws each, after a first call with what the longer question has after the prefix."""
    theirs = ranks.decode(0.0, None)["rollouts"]
    longest = max(DECODE.questions)
    tokens = 8 * (longest + 11)
    assert [len(one.token_ids) for one in theirs] == [12] * 8
    per_kv_head = 4 if size == 4 else 3  # of 3 query heads, two ranks share the 4 they are padded to
    for rank in range(size):
        heads = (size - 1) * tokens * LAYERS * 2 * per_kv_head // size * HEAD_DIM * 8
        draws = (size - 1) * 8 * (12 * 8 + 12 * 8) if rank == 0 else 0
        sent = found[rank]["decode 0", size]["bytes"]
        assert (sent["decode"], sent.get("draws", 0)) == (heads, draws)


@pytest.mark.parametrize("size", SIZES)
def test_too_few_tokens_and_wrong_heads_are_refused_on_every_rank(found, size):
    for rank in range(size):
        ours = found[rank]["refuse", size]
        assert ours["short"] is not None
        assert f"{size - 1} tokens cannot be split over {size} sequence-parallel ranks" in ours["short"]
        wrong = {4: "4 = 1 x 3 + 1", 2: "3 = 1 x 2 + 1"}.get(size)
        assert (ours["heads"] is None) if wrong is None else (wrong in ours["heads"])


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_split_almost_equally(found, size):
    for total in range(size, 40):
        spans = [found[rank]["refuse", size]["spans"][total] for rank in range(size)]
        assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
        assert spans[-1].stop == total
        lengths = [span.stop - span.start for span in spans]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_summed_whoever_has_them(found, size):
    ranks_sum = sum(range(size))
    for rank in range(size):
        gradients = found[rank]["sum", size]["gradients"]
        assert gradients["nowhere"] is None
        assert gradients["frozen"] is None
        assert torch.equal(gradients["first"], torch.arange(3.0))
        assert torch.equal(gradients["last"], torch.arange(9.0) * size + ranks_sum)
        assert torch.equal(gradients["everywhere"], torch.arange(20.0).view(4, 5) * size + ranks_sum)


@pytest.mark.parametrize(("kv_heads", "size"), [(4, 1), (4, 2), (4, 4), (4, 8), (2, 8), (1, 3)])
def test_head_counts_that_work(kv_heads, size):
    require_heads(kv_heads, size)


@pytest.mark.parametrize(("kv_heads", "size", "why"), [(4, 6, "6 = 1 x 4 + 2"), (8, 3, "8 = 2 x 3 + 2")])
def test_head_counts_that_do_not(kv_heads, size, why):
    with pytest.raises(ValueError, match="KV heads cannot be dealt to") as refusal:
        require_heads(kv_heads, size)
    assert why in str(refusal.value)
    assert "\n" not in str(refusal.value)
