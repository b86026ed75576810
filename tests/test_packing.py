import pytest
import torch

from prefalign.packing import Group, PackedBatch, pack, split_by_tokens

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


@pytest.mark.parametrize("seed", range(5))
def test_split_by_tokens_covers_each_example_once_within_the_budget(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 120, (57,), generator=generator).tolist()
    passes = split_by_tokens(lengths, 100)
    assert sorted(i for indices in passes for i in indices) == list(range(57))
    for indices in passes:
        assert sum(lengths[i] for i in indices) <= 100 or len(indices) == 1
    fewest = -(-sum(min(n, 100) for n in lengths) // 100)
    assert len(passes) <= 1.25 * fewest + 1


def test_split_by_tokens_gives_an_outlier_a_pass_of_its_own():
    assert split_by_tokens([10, 8000, 10], 100) == [[1], [0, 2]]


def test_split_by_tokens_refuses_a_budget_of_nothing():
    with pytest.raises(ValueError, match="max_tokens: expected 1 or more, got 0"):
        split_by_tokens([1], 0)


def test_the_type_holds_a_shared_prompt():
    # What prompt sharing will build: the prompt one segment, the parent of two responses'.
    batch = PackedBatch(
        input_ids=torch.tensor([1, 2, 3, 4, 5, 6]),
        position_ids=torch.tensor([0, 1, 2, 3, 4, 3]),
        cu_seqlens=torch.tensor([0, 3, 5, 6], dtype=torch.int32),
        parents=torch.tensor([-1, 0, 0], dtype=torch.int32),
        max_seqlen=3,
        target_rows=torch.tensor([2, 3, 2]),
        targets=torch.tensor([4, 5, 6]),
        cu_targets=torch.tensor([0, 2, 3], dtype=torch.int32),
        cu_groups=torch.tensor([0, 2], dtype=torch.int32),
        example_ids=torch.tensor([0]),
    )
    unshared = pack([Group([1, 2, 3], [[4, 5], [6]])])
    assert batch.targets.tolist() == unshared.targets.tolist()
    assert batch.cu_targets.tolist() == unshared.cu_targets.tolist()
    assert batch.num_tokens < unshared.num_tokens
