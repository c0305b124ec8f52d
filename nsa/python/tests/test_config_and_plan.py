import copy
import os
import pathlib

import numpy as np
import pytest

import nsa


def test_config_lists_every_broken_rule():
    with pytest.raises(ValueError, match="num_q_heads = 63.*window_tokens = 0"):
        nsa.Config(num_q_heads=63, window_tokens=0)
    with pytest.raises(ValueError, match="compressor = 'max'"):
        nsa.Config(compressor="max")
    # Not the default, which is the library's 0, and not what is left of a number in 32 bits.
    for scale in (0.0, 1e-50, -1.0, float("nan")):
        with pytest.raises(ValueError, match="softmax_scale = .*must be finite and positive"):
            nsa.Config(softmax_scale=scale)
    with pytest.raises(ValueError, match=f"window_tokens = {2**32 + 512}"):
        nsa.Config(window_tokens=2**32 + 512)


def test_config_from_text():
    text = "num_q_heads: 8 head_dim_qk: 192 compressor: LINEAR softmax_scale: 0.5"
    config = nsa.Config(num_q_heads=8, head_dim_qk=192, compressor="linear", softmax_scale=0.5)
    assert nsa.Config.from_text(text) == config
    assert nsa.Config.from_text("{}") == nsa.Config()
    with pytest.raises(ValueError, match="heads"):
        nsa.Config.from_text("{'heads': 1}")


PLANS = {
    "contiguous": nsa.Plan(1000, 4),
    "zigzag": nsa.Plan(1001, 4, sharding="zigzag"),
    "uneven": nsa.Plan(10, 3, sharding="uneven", tokens_of_rank=[4, 0, 6]),
    "documents": nsa.Plan(
        num_ranks=2, sharding="zigzag_per_document", cu_seqlens=[0, 40, 47, 47, 100]
    ),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_shard_and_unshard(plan):
    whole = np.random.default_rng(0).random((3, plan.num_tokens, 2))
    shards = [plan.shard(whole, rank, dim=1) for rank in range(plan.num_ranks)]
    for rank, shard in enumerate(shards):
        assert shard.shape[1] == plan.tokens_of_rank(rank)
        assert (shard == whole[:, plan.positions(rank)]).all()
    assert (plan.unshard(shards, dim=1) == whole).all()
    with pytest.raises(ValueError, match="tokens, must be"):
        plan.shard(whole[:, 1:], 0, dim=1)
    with pytest.raises(ValueError, match=r"shards\[0\]"):
        plan.unshard([shard[:, 1:] for shard in shards], dim=1)


def test_positions():
    plan = PLANS["documents"]
    assert (plan.num_tokens, plan.num_documents) == (100, 3)
    starts = np.array([0, 40, 47])
    for rank in range(2):
        documents = plan.documents(rank)
        assert (plan.positions(rank) == starts[documents] + plan.positions_in_document(rank)).all()
    # Parts 0 and 3 of 4 of the first document.
    assert (plan.positions(0)[:20] == [*range(10), *range(30, 40)]).all()


def test_copies_of_a_plan_outlive_it():
    plan = nsa.Plan(64)
    text, copied = str(plan), copy.copy(plan)
    del plan
    assert str(copied) == text


def test_plans_compare_by_what_they_say():
    same = nsa.Plan(num_ranks=2, sharding="zigzag", cu_seqlens=np.array([0, 5, 9]))
    assert same == nsa.Plan(9, 2, sharding="zigzag", cu_seqlens=[0, 5, 9])
    assert len({same, nsa.Plan(9, 2, sharding="zigzag"), nsa.Plan(9, 2)}) == 3


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(num_tokens=0), "num_tokens"),
        (dict(num_tokens=8, cu_seqlens=[0, 9, 8]), "cu_seqlens"),
        (dict(cu_seqlens=np.array([0, 4.7, 8.0])), "cu_seqlens: is float64"),
        (dict(cu_seqlens=[[0, 4], [4, 8]]), "cu_seqlens: is int64"),
        (dict(num_tokens=8, num_ranks=2**32 + 1), "num_ranks = 4294967297"),
        (dict(num_tokens=8, num_ranks=2, sharding="striped"), "sharding"),
        (dict(num_tokens=8, num_ranks=2, sharding="uneven", tokens_of_rank=[8]), "tokens_of_rank"),
    ],
)
def test_wrong_plans(arguments, text):
    with pytest.raises(ValueError, match=text):
        nsa.Plan(**arguments)


def test_versions_agree():
    pyproject = pathlib.Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    assert f'\nversion = "{nsa.__version__}"' in pyproject
    # What is tested is what is meant.
    installed = bool(os.environ.get("NSA_TEST_INSTALLED"))
    assert ("site-packages" in nsa.__file__) == installed
