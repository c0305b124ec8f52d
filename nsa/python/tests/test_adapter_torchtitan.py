"""NSA in torchtitan's Llama 3, of a small size, on the CPU."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchtitan")

import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torchtitan.distributed.context_parallel import apply_cp_to_forward, cp_shard  # noqa: E402
from torchtitan.models.common import ComplexRoPE  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import (  # noqa: E402
    _build_llama3_layers,
    llama3_configs,
    model_registry,
)

import ranks  # noqa: E402
from adapter_testing import (  # noqa: E402
    DENSE,
    DENSE_BRANCHES,
    assert_same,
    gradients_of,
    is_ours,
    make_config,
    only,
    perturb,
    run_readme,
)

from nsa.adapters.torchtitan import NSAConverter, NSAInnerAttention  # noqa: E402

CONFIG = make_config(compressor="linear")
TOKENS = 320
PACKED = torch.cat([torch.arange(length) for length in (100, 37, 183)])[None]


def llama_config():
    """torchtitan's debugmodel with heads of 64."""
    rope = ComplexRoPE.Config(dim=64, max_seq_len=TOKENS, theta=1e4, scaling="none")
    layers = _build_llama3_layers(
        n_layers=2, dim=256, n_heads=4, n_kv_heads=2, hidden_dim=64, rope=rope, attn_backend="flex"
    )
    return dataclasses.replace(llama3_configs["debugmodel"](attn_backend="flex"), layers=layers)


def init(model, seed=0):
    torch.manual_seed(seed)
    model.to_empty(device="cpu")
    model.init_states(buffer_device=torch.device("cpu"))
    return model


def make_model(config=CONFIG, **options):
    """As torchtitan's trainer does it."""
    with torch.device("meta"):
        converter = NSAConverter.Config(nsa=config, **options).build()
        model = converter.convert(llama_config()).build()
    model.verify_module_protocol()
    return init(model)


def make_dense():
    config = llama_config()
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    with torch.device("meta"):
        model = config.build()
    return init(model)


def make_ids(batch=1):
    return torch.randint(0, 2048, (batch, TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("branch", DENSE_BRANCHES)
def test_dense_branch_is_sdpa(branch):
    model, ours = make_dense(), make_model(DENSE)
    loaded = ours.load_state_dict(model.state_dict(), strict=False)
    assert not loaded.unexpected_keys and all(map(is_ours, loaded.missing_keys))
    only(DENSE_BRANCHES[branch], ours)
    positions = torch.arange(TOKENS).expand(2, -1)
    expected = model(make_ids(2), positions=positions)
    actual = ours(make_ids(2), positions=positions)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(ours(make_ids(2)), actual)
    expected.square().mean().backward()
    actual.square().mean().backward()
    assert_same(gradients_of(ours), gradients_of(model))


def test_documents_are_independent():
    model = make_model()
    perturb(model)
    packed = model(make_ids(), positions=PACKED)
    begin = 0
    for length in (100, 37, 183):
        document = slice(begin, begin + length)
        alone = model(make_ids()[:, document], positions=torch.arange(length)[None])
        torch.testing.assert_close(packed[:, document], alone, rtol=1e-3, atol=1e-4)
        begin += length
    assert not torch.allclose(packed, model(make_ids()))


def test_training():
    model = make_model(make_config(compressor="mlp"))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(4):
        logits = model(make_ids(2), positions=PACKED.expand(2, -1))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), make_ids(2).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2, losses
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if is_ours(name))


def test_what_cannot_be_honoured():
    for field, text in (("num_q_heads", "num_q_heads = 8: the model has 4"),):
        with pytest.raises(ValueError, match=text):
            make_model(make_config(**{field: 8}))
    with pytest.raises(ValueError, match="load_balancer = 'ptrr'"):
        make_model(load_balancer="ptrr")
    with pytest.raises(ValueError, match="softmax scale"):
        make_model(make_config(softmax_scale=0.1))(make_ids())
    model = make_model()
    with pytest.raises(ValueError, match="GQAttention.Config"):
        NSAConverter.Config(nsa=CONFIG).build().convert(model.config)
    with pytest.raises(ValueError, match="attention_masks"):
        model(make_ids(), attention_masks=torch.ones(1))
    inner = model.layers["0"].attention.inner_attention
    assert isinstance(inner, NSAInnerAttention)
    q, k = torch.randn(1, TOKENS, 4, 64), torch.randn(1, TOKENS, 2, 64)
    with pytest.raises(ValueError, match="is_causal"):
        inner(q, k, k, is_causal=False)
    with pytest.raises(ValueError, match="partial_dtensor"):
        model.parallelize(None)


def context_parallel(rank, size, load_balancer):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    alone, sharded = make_model(), make_model(load_balancer=load_balancer)
    for model in (alone, sharded):
        perturb(model)
    apply_cp_to_forward(
        [block.attention.inner_attention for block in sharded.layers.values()], mesh
    )
    cases = [(make_ids(), PACKED)]
    if load_balancer is not None:
        cases.append((make_ids(2), torch.arange(TOKENS).expand(2, -1)))
    for ids, positions in cases:
        d_logits = torch.randn(*ids.shape, 2048, generator=torch.Generator().manual_seed(2)) / 100
        (mine, my_positions, my_d_logits), _ = cp_shard(
            mesh, (ids, positions, d_logits), None, load_balancer
        )
        expected = alone(ids, positions=positions)
        (my_expected,), _ = cp_shard(mesh, (expected.detach(),), None, load_balancer)
        actual = sharded(mine, positions=my_positions)
        torch.testing.assert_close(actual, my_expected, rtol=1e-3, atol=1e-4)
        expected.backward(d_logits)
        actual.backward(my_d_logits)
        gradients = gradients_of(sharded)
        for gradient in gradients.values():
            dist.all_reduce(gradient)
        assert_same(gradients, gradients_of(alone))
        alone.zero_grad()
        sharded.zero_grad()
    texts = []
    for batch, positions in ((1, None), (1, 7 + torch.arange(TOKENS // size)[None]), (2, PACKED)):
        if positions is PACKED:
            (positions,), _ = cp_shard(mesh, (PACKED,), None, load_balancer)
        try:
            sharded(mine[:1].expand(batch, -1), positions=positions)
        except ValueError as error:
            texts.append(str(error))
    return texts


@pytest.mark.parametrize("load_balancer", ["headtail", None])
def test_two_context_parallel_ranks_against_one(load_balancer):
    for texts in ranks.run(context_parallel, 2, load_balancer):
        for text, part in zip(texts, ("must be given", "put together", "batch of 2"), strict=True):
            assert part in text


def fsdp(rank, size):
    """torchtitan shards a model on the meta device, then initialises it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with torch.device("meta"):
        model = NSAConverter.Config(nsa=CONFIG).build().convert(llama_config()).build()
    for block in model.layers.values():
        fully_shard(block)
    fully_shard(model)
    init(model)
    expected = make_model()
    checked = 0
    for (name, parameter), of in zip(model.named_parameters(), expected.parameters()):
        if is_ours(name):
            assert torch.equal(parameter.full_tensor(), of), name
            checked += 1
    logits = model(make_ids(), positions=PACKED)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.full_tensor().isfinite().all(), name
    return checked


def test_sharded_parameters():
    assert ranks.run(fsdp, 2) == [12, 12]


def test_readme():
    names = run_readme("torchtitan")
    inner = names["spec"].model.layers[0].attention.inner_attention
    assert isinstance(inner, NSAInnerAttention.Config)
    assert len(names["spec"].model.layers) == len(model_registry("8B").model.layers)
