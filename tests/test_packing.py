import pytest
import torch

from prefalign.attention import packed_inputs
from prefalign.packing import Group, pack
from prefalign.passes import PackingCollator, split_by_tokens

GROUPS = [
    Group([1, 2, 3], [[4, 5], [6]], example_id=7, extras={"reference_logps": [-1.5, -2.5]}),
    Group([8], [[9], [10, 11, 12]], example_id=3, extras={"reference_logps": [-3.0, -4.0]}),
]


def test_pack_lays_sequences_end_to_end_without_padding():
    batch = pack(GROUPS)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6, 8, 9, 8, 10, 11, 12]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 11, 15]
    assert batch.parents.tolist() == [-1, -1, -1, -1]
    assert batch.max_seqlen == 5
    assert batch.num_tokens == sum(group.num_tokens for group in GROUPS)
    assert batch.num_groups == 2
    assert batch.cu_groups.tolist() == [0, 2, 4]
    assert batch.example_ids.tolist() == [7, 3]
    assert batch.extras["reference_logps"].tolist() == [-1.5, -2.5, -3.0, -4.0]


def test_every_target_is_predicted_by_the_token_before_it():
    batch = pack(GROUPS)
    assert batch.targets.tolist() == [4, 5, 6, 9, 10, 11, 12]
    assert batch.cu_targets.tolist() == [0, 2, 3, 4, 7]
    assert batch.input_ids[batch.target_rows + 1].tolist() == batch.targets.tolist()


@pytest.mark.parametrize("group", [Group([], [[1]]), Group([1], [[2], []])])
def test_pack_refuses_an_empty_prompt_or_response(group):
    with pytest.raises(ValueError, match="groups: expected a prompt and responses"):
        pack([group])


def test_pack_refuses_no_groups():
    with pytest.raises(ValueError, match="at least one group"):
        pack([])


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = pack(GROUPS).to("meta")
    assert batch.input_ids.device.type == "meta"
    assert batch.extras["reference_logps"].device.type == "meta"
    assert batch.max_seqlen == 5


# A shared prompt


def test_a_prompt_is_laid_once_as_the_parent_of_its_responses():
    groups = [Group([1, 2, 3], [[4, 5], [6]]), Group([8], [[9]]), Group([7], [[1], [2], [3, 4]])]
    batch = pack(groups, share_prompts=True)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 7, 1, 2, 3, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 0, 1, 1, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 8, 9, 10, 11, 13]
    assert batch.parents.tolist() == [-1, 0, 0, -1, -1, 4, 4, 4]
    assert batch.target_rows.tolist() == [2, 3, 2, 6, 8, 8, 8, 11]
    assert batch.key_rows.tolist() == [
        0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 8, 9, 8, 10, 8, 11, 12,
    ]  # fmt: skip
    assert batch.cu_keys.tolist() == [0, 3, 8, 12, 14, 15, 17, 19, 22]
    assert (batch.max_seqlen, batch.max_keys) == (3, 5)
    plain = pack(groups)
    for name in ("targets", "cu_targets", "cu_groups", "example_ids"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    for shared, laid in ((True, batch), (False, plain)):
        assert laid.num_tokens == sum(group.tokens_laid(share_prompts=shared) for group in groups)
        assert laid.shares_prompts == shared
        assert ("key_rows" in packed_inputs(laid)) == shared
    assert batch.to("meta").key_rows.device.type == "meta"


def test_single_responses_have_nothing_to_share():
    batch = pack([Group([1, 2], [[3]])], share_prompts=True)
    assert not batch.shares_prompts and batch.cu_seqlens.tolist() == [0, 3]


def test_the_collator_counts_tokens_as_they_are_laid():
    groups = [Group([1] * 60, [[2] * 20, [3] * 20], i) for i in range(4)]
    for shared, count in ((True, 2), (False, 4)):
        passes = PackingCollator(200, share_prompts=shared)(groups)["passes"]
        assert len(passes) == count
        assert all(batch.num_tokens <= 200 for batch in passes)


# Passes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [0, 1, 57])
def test_split_by_tokens_covers_each_example_once_within_the_budget(seed, count):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 120, (count,), generator=generator).tolist()
    passes = split_by_tokens(lengths, 100)
    assert sorted(i for indices in passes for i in indices) == list(range(count))
    for indices in passes:
        assert indices == sorted(indices)
        assert sum(lengths[i] for i in indices) <= 100 or len(indices) == 1
    sizes = [sum(lengths[i] for i in indices) for indices in passes]
    assert sizes == sorted(sizes, reverse=True)
    fewest = -(-sum(min(n, 100) for n in lengths) // 100)
    assert len(passes) <= 1.25 * fewest + 1
    assert split_by_tokens(lengths, 100) == passes


def test_split_by_tokens_finds_the_fewest_passes_where_first_fit_does_not():
    # First-fit decreasing: 6 + 3, 5 + 2 + 2, and the last 2 alone.
    assert split_by_tokens([6, 5, 3, 2, 2, 2], 10) == [[0, 3, 4], [1, 2, 5]]


def test_split_by_tokens_evens_the_passes():
    assert split_by_tokens([9, 9, 3, 3], 20) == [[0, 2], [1, 3]]
    assert split_by_tokens([10] * 7, 50) == [[0, 2, 4, 6], [1, 3, 5]]


def test_split_by_tokens_gives_an_outlier_a_pass_of_its_own():
    assert split_by_tokens([10, 8000, 10], 100) == [[1], [0, 2]]


def test_split_by_tokens_refuses_a_budget_of_nothing():
    with pytest.raises(ValueError, match="max_tokens: expected 1 or more, got 0"):
        split_by_tokens([1], 0)


def ultrafeedback_like(count, seed):
    """Lengths of pairs: log-normal prompts of mean 180 up to 1024, responses of mean 280."""
    generator = torch.Generator().manual_seed(seed)

    def draw(mean, deviation, low, high):
        lengths = torch.randn(count, generator=generator).mul(deviation).add(mean).exp()
        return lengths.clamp(low, high).int()

    prompts = draw(4.70, 0.95, 8, 1024)
    return (prompts + draw(5.44, 0.65, 4, 1000) + draw(5.44, 0.65, 4, 1000)).tolist()


@pytest.mark.parametrize(("pairs_a_step", "max_tokens"), [(8, 4096), (32, 4096), (32, 16384)])
def test_less_than_two_percent_of_a_steps_passes_is_wasted(pairs_a_step, max_tokens):
    lengths = ultrafeedback_like(3200, seed=0)
    waste, more = [], 0
    for start in range(0, len(lengths), pairs_a_step):
        step = lengths[start : start + pairs_a_step]
        passes = split_by_tokens(step, max_tokens)
        sizes = [sum(step[i] for i in indices) for indices in passes]
        # What passes as large as the largest, which memory must hold, would take in besides.
        waste.append(1 - sum(sizes) / (len(sizes) * max(sizes)))
        more += len(passes) - -(-sum(step) // max_tokens)
    assert sum(waste) / len(waste) < 0.02
    assert more <= 0.03 * len(waste)
