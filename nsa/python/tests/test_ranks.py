"""Ranks that are processes: on CPUs over UCX, and one GPU each where there are enough."""

import functools
import os
import time

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

import nsa  # noqa: E402
import ranks  # noqa: E402
from torch_testing import (  # noqa: E402
    TOLERANCE,
    dtype_of,
    make_inputs,
    need,
    relative_error,
    start,
    with_compressor,
)

CONFIG = with_compressor("weighted")
DOCUMENTS = [0, 30, 310, 480]
PLANS = {
    "contiguous": lambda size: nsa.Plan(480, size),
    "zigzag": lambda size: nsa.Plan(480, size, sharding="zigzag"),
    "documents": lambda size: nsa.Plan(
        num_ranks=size, cu_seqlens=DOCUMENTS, sharding="zigzag_per_document"
    ),
}


def make_params(device):
    generator = torch.Generator().manual_seed(7)
    return {
        name: {
            "weight": torch.rand(2, 32, generator=generator).to(device).requires_grad_(),
            "pe": torch.randn(2, 32, 64, generator=generator).to(device).requires_grad_(),
        }
        for name in ("compress_k", "compress_v")
    }


def results_of(engine, group, device, sum_over_ranks=False):
    """o and gradients of this rank's share of the same inputs, whatever the ranks."""
    inputs = make_inputs(480, CONFIG, device.type)
    mine = [engine.plan.shard(t.detach(), group.rank).to(device).requires_grad_() for t in inputs]
    params = make_params(device)
    o = nsa.attention(engine, *mine, **params, sum_over_ranks=sum_over_ranks)
    leaves = mine + [p for of in params.values() for p in of.values()]
    d_o = engine.plan.shard(torch.ones(480, 8, 64, dtype=o.dtype, device=device).cumsum(0) / 480,
                            group.rank)  # fmt: skip
    return o.detach(), torch.autograd.grad(o, leaves, d_o)


def compare(rank, size, device):
    device = start(device, rank, size)
    threads = {"num_threads": 1}
    group = nsa.Group.from_process_group(device=device, **threads)
    assert (group.rank, group.size) == (rank, size)
    alone = nsa.Group.local(device, **threads)
    dtype = dtype_of(device.type)
    for name, make_plan in PLANS.items():
        whole = make_plan(1)
        expected, expected_gradients = results_of(alone.engine(CONFIG, whole, dtype=dtype), alone,
                                                  device)  # fmt: skip
        plan = make_plan(size)
        engine = group.engine(CONFIG, plan, dtype=dtype)
        o, gradients = results_of(engine, group, device)
        # Outputs and gradients of queries and gates have the same bits.
        assert torch.equal(plan.gather(o), expected), name
        for i in (0, 3):
            assert torch.equal(plan.gather(gradients[i]), expected_gradients[i]), name
        for i in (1, 2):
            assert (
                relative_error(plan.gather(gradients[i]), expected_gradients[i]) < TOLERANCE[dtype]
            ), name
        _, summed = results_of(engine, group, device, sum_over_ranks=True)
        for own, of_all, of_one in zip(gradients[4:], summed[4:], expected_gradients[4:]):
            dist.all_reduce(own)
            assert relative_error(own, of_one, least=100) < TOLERANCE[dtype], name
            assert relative_error(of_all, of_one, least=100) < TOLERANCE[dtype], name
    return len(PLANS)


@pytest.mark.parametrize("device, size", [("cpu", 2), ("cpu", 4), ("cuda", 2), ("cuda", 4)])
def test_one_rank_against_several(device, size):
    need(device, size)
    assert ranks.run(compare, size, device) == [3] * size


def mesh_of_two_by_two(rank, size, device):
    """Data parallel times context parallel, FSDP2 around all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = start(device, rank, size)
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("dp", "cp"))
    group = nsa.Group.from_device_mesh(mesh, "cp", device, num_threads=1)
    assert (group.rank, group.size) == (rank % 2, 2)
    batch, tokens, hidden = 2, 96, 64  # few, so that rounding selects no other blocks
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, batch, 2 * tokens, hidden, generator=generator).to(device)
    documents = nsa.Plan(2 * tokens, 2, sharding="zigzag")

    def layer(group):
        torch.manual_seed(4)
        return nsa.NSAAttention(hidden, CONFIG, group, rope_theta=1e4, device=device)

    def loss_of(layer, x):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return layer(x).float().square().sum()

    # One rank with all data.
    alone = layer(nsa.Group.local(device, num_threads=1))
    loss = sum(loss_of(alone, x[i]) for i in range(2))
    loss.backward()

    sharded = layer(group)
    fully_shard(sharded, mesh=mesh._flatten("all") if hasattr(mesh, "_flatten") else mesh)
    mine = documents.shard(x[mesh.get_local_rank("dp")], group.rank, dim=1)
    part = loss_of(sharded, mine)
    part.backward()
    part = part.detach()
    dist.all_reduce(part)
    tolerance = 1e-4 if device.type == "cpu" else 2e-2
    assert relative_error(part, loss) < tolerance
    for (name, parameter), of in zip(sharded.named_parameters(), alone.parameters()):
        # FSDP averages over the ranks.
        gradient = parameter.grad.full_tensor() * size
        assert relative_error(gradient, of.grad, least=1) < tolerance, name
    return True


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_by_two_with_fsdp(device):
    need(device, 4)
    assert all(ranks.run(mesh_of_two_by_two, 4, device))


def one_rank_is_wrong(rank, size, device):
    """Every rank learns of one rank's mistake, at once, and goes on."""
    device = start(device, rank, size)
    group = nsa.Group.from_env(device, num_threads=1)  # torchrun's variables
    engine = nsa.Engine(CONFIG, nsa.Plan(480, size), group, dtype=dtype_of(device.type))
    results = [results_of(engine, group, device)]
    inputs = [engine.plan.shard(t.detach(), rank).to(device)
              for t in make_inputs(480, CONFIG, device.type)]  # fmt: skip
    texts = []
    for wrong in (lambda q: q[1:], lambda q: q.double()):
        q, *others = inputs
        began = time.monotonic()
        try:
            nsa.attention(engine, wrong(q) if rank == 1 else q, *others, **make_params(device))
        except ValueError as error:
            texts.append(str(error))
        assert time.monotonic() - began < 10
    q, k, v, gate = inputs
    arguments = {"q": q, "k": k, "v": v, "gate": gate, **make_params(device)}
    mistake = {"k": (k, k)} if rank == 1 else {}
    with torch.no_grad():
        saved = engine.save()
        d_o = engine.forward(**arguments, saved=saved)
        for call in (
            functools.partial(nsa.attention, engine),
            engine.forward,
            functools.partial(engine.backward, d_o=d_o, saved=saved),
        ):
            began = time.monotonic()
            try:
                call(**(arguments | mistake))
            except ValueError as error:
                texts.append(str(error))
            assert time.monotonic() - began < 10
    results.append(results_of(engine, group, device))
    assert torch.equal(results[0][0], results[1][0])
    return texts


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_rank_is_wrong(device):
    need(device, 2)
    first, second = ranks.run(one_rank_is_wrong, 2, device)
    assert "rank 1: q.shape" in first[0] and "rank 1: q.shape" in second[0]
    assert "rank 1" in first[1] and "q: has dtype torch.float64" in second[1]
    assert len(first) == 5 and all("rank 1: " in text for text in first[2:])
    assert second[2:] == ["k, v: are 2 and 1 tensors, must be 1 or 3 (cmp, slc, win)"] * 3


def one_rank_is_wrong_of_a_cache(rank, size, transports):
    """Where ranks do not read one another's pages in place, a step is collective."""
    if transports:
        os.environ["UCX_TLS"] = transports
    start("cpu", rank, size)
    group = nsa.Group.from_process_group(num_threads=1, timeout_seconds=15)
    cache = nsa.KVCache(CONFIG, group, dtype="f32", num_pages=32, **make_params("cpu"))
    plan = nsa.Plan(480, size)
    engine = nsa.Engine(CONFIG, plan, group, dtype="f32")
    q, k, v, gate = (plan.shard(t.detach(), rank) for t in make_inputs(480, CONFIG))
    inputs = {"q": q, "k": k, "v": v, "gate": gate}
    texts, sequence = [], cache.open()

    def wrong(of):
        return {**of, "q": of["q"].double()} if rank == 1 else of

    with torch.no_grad():
        engine.forward(**inputs, **make_params("cpu"))
        began = time.monotonic()
        try:
            cache.append_forward(0, sequence, engine, **wrong(inputs), **make_params("cpu"))
        except ValueError as error:
            texts.append(str(error))
        row = {name: tensor[-1:] for name, tensor in inputs.items()}
        cache.append(sequence, k[:-1], v[:-1])
        try:
            cache.step([(sequence, 1)], **wrong(row))
            cache.truncate(sequence, cache.num_tokens(sequence) - 1)
        except ValueError as error:
            texts.append(str(error))
        cache.step([(sequence, 1)], **row)
        group.barrier()
    assert time.monotonic() - began < 10
    return cache.is_reachable, texts


@pytest.mark.parametrize("transports", ["", "tcp,self"])
def test_one_rank_is_wrong_of_a_cache(transports):
    (reachable, first), (_, second) = ranks.run(one_rank_is_wrong_of_a_cache, 2, transports)
    assert reachable == (transports == "")
    assert len(first) == 1 and "rank 1: k_cmp.shape" in first[0]
    assert len(second) == 2 and all("q: has dtype torch.float64" in text for text in second)


def shards_of_wrong_sizes(rank, size):
    start("cpu", rank, size)
    try:
        return nsa.Plan(10, size).gather(torch.ones(4, 2))
    except ValueError as error:
        return str(error)


def test_shards_of_wrong_sizes_are_not_gathered():
    assert ranks.run(shards_of_wrong_sizes, 2) == ["shard: has 4 tokens, must be 5"] * 2


def one_rank_dies(rank, size, device):
    device = start(device, rank, size)
    group = nsa.Group.from_process_group(device=device, num_threads=1, timeout_seconds=10)
    engine = nsa.Engine(CONFIG, nsa.Plan(480, size), group, dtype=dtype_of(device.type))
    results_of(engine, group, device)
    dist.barrier()  # on GPUs others may be in that call still
    if rank == size - 1:
        ranks.die()
    began = time.monotonic()
    try:
        while True:
            results_of(engine, group, device)
            if device.type == "cuda":
                torch.cuda.synchronize()
                group.health()
    except (ConnectionError, TimeoutError) as error:
        return time.monotonic() - began, str(error)


@pytest.mark.parametrize("device, size", [("cpu", 3), ("cuda", 2)])
def test_a_rank_that_dies_is_told_to_the_others(device, size):
    need(device, size)
    results = ranks.run(one_rank_dies, size, device, timeout=120, may_die=(size - 1,))
    for seconds, text in results[:-1]:
        assert seconds < 20 and f"rank {size - 1}" in text
