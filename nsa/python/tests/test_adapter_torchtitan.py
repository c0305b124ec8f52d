"""NSA in torchtitan's Llama 3, of a small size, on the CPU."""

import copy
import dataclasses

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchtitan")

import torch.distributed as dist  # noqa: E402
from torch.distributed import fsdp  # noqa: E402

if not hasattr(fsdp, "DataParallelMeshDims"):
    pytest.skip("torchtitan 0.3.0 needs a later torch", allow_module_level=True)

from torch.distributed.tensor import distribute_tensor  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.optimizer import default_adamw  # noqa: E402
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.distributed import ParallelDims, parallel_dims  # noqa: E402
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC  # noqa: E402
from torchtitan.distributed.context_parallel import prepare_context_parallel_input  # noqa: E402
from torchtitan.distributed.utils import clip_grad_norm_  # noqa: E402
from torchtitan.models.common import ComplexRoPE  # noqa: E402
from torchtitan.models.common.attention import (  # noqa: E402
    ScaledDotProductAttention,
    VarlenAttention,
)
from torchtitan.models.llama3 import (  # noqa: E402
    _build_llama3_layers,
    llama3_configs,
    model_registry,
)
from torchtitan.models.llama3.parallelize import parallelize_llama  # noqa: E402

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


def make_meta_model(config=CONFIG, **options):
    with torch.device("meta"):
        converter = NSAConverter.Config(nsa=config, **options).build()
        model = converter.convert(llama_config()).build()
    model.verify_module_protocol()
    return model


def make_model(config=CONFIG, **options):
    """As torchtitan's trainer does it."""
    return init(make_meta_model(config, **options))


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


def train(model, ids, **inputs):
    """Losses of some steps, as torchtitan's trainer does them, and the gradients of the first."""
    optimizers = default_adamw(3e-3).build(model_parts=[model])
    loss_of = CrossEntropyLoss.Config().build()
    losses, gradients = [], {}
    for _ in range(4):
        optimizers.zero_grad()
        loss, _ = loss_of(model(ids, **inputs), ids, torch.tensor(2 * TOKENS))
        loss.backward()
        gradients = gradients or gradients_of(model)
        clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizers.step()
        losses.append(loss.detach())
    return torch.stack(losses), gradients


def test_training():
    losses, gradients = train(
        make_model(make_config(compressor="mlp")), make_ids(2), positions=PACKED.expand(2, -1)
    )
    assert losses[-1] < losses[0] - 0.2, losses
    assert all(gradient.norm() > 0 for name, gradient in gradients.items() if is_ours(name))


def test_what_cannot_be_honoured():
    for field, text in (("num_q_heads", "num_q_heads = 8: the model has 4"),):
        with pytest.raises(ValueError, match=text):
            make_model(make_config(**{field: 8}))
    windowed = llama_config()
    windowed.layers[0].attention.inner_attention = VarlenAttention.Config(window_size=(63, 0))
    with pytest.raises(ValueError, match="window_size"):
        NSAConverter.Config(nsa=CONFIG).build().convert(windowed)
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


def parallelize(like, compile=False, ac=None, load_balancer="headtail", **degrees):
    """As torchtitan's trainer does it: a model on the meta device, then its parameters."""
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **degrees)
    dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    model = parallelize_llama(
        make_meta_model(load_balancer=load_balancer),
        parallel_dims=dims,
        training=TrainingConfig(mixed_precision_param="float32"),
        parallelism=parallelism,
        compile_config=CompileConfig(enable=compile, backend="aot_eager"),
        ac_config=ac,
        dump_folder="",
    )
    init(model)
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    parameters = dict(like.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            of = parameters[plain(name)]
            if is_ours(name):
                assert torch.equal(parameter.full_tensor(), of), name
            parameter.copy_(distribute_tensor(of, parameter.device_mesh, parameter.placements))
    return model, dims


def plain(name):
    return name.replace("_checkpoint_wrapped_module.", "")


def assert_trains_alike(alone, model, ids, positions, my_ids, my_positions):
    """Of the sum of the ranks' losses."""
    expected, of = train(copy.deepcopy(alone), ids, positions=positions)
    actual, gradients = train(model, my_ids, positions=my_positions)
    dist.all_reduce(actual)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)
    gradients = {plain(name): gradient.full_tensor() for name, gradient in gradients.items()}
    assert_same(gradients, of)


def deal(ids, positions, dims, load_balancer):
    """What this rank holds of each, as torchtitan's trainer deals them."""
    ids, _, others = prepare_context_parallel_input(
        ids, ids, {"positions": positions}, dims.get_mesh("cp"), "cpu", load_balancer
    )
    return ids, others["positions"]


def two_ranks(rank, size):
    torch.set_num_threads(1)
    parallel_dims.device_type = "cpu"
    dist.init_process_group("gloo")
    alone, texts = make_model(), []

    for load_balancer, compile, ac, positions in (
        ("headtail", False, FullAC.Config(), PACKED),
        ("headtail", False, None, torch.arange(TOKENS).expand(2, -1)),
        (None, True, SelectiveAC.Config(), PACKED),
    ):
        ids = make_ids(len(positions))
        model, dims = parallelize(
            alone, compile=compile, ac=ac, load_balancer=load_balancer, context_parallel_degree=size
        )
        mine = deal(ids, positions, dims, load_balancer)
        assert_trains_alike(alone, model, ids, positions, *mine)

    for load_balancer in ("headtail", None):
        model, dims = parallelize(alone, load_balancer=load_balancer, context_parallel_degree=size)
        ids, positions = deal(make_ids(), PACKED, dims, load_balancer)
        for batch, wrong in (
            (1, None),
            (1, 7 + torch.arange(TOKENS // size)[None]),
            (2, positions),
        ):
            try:
                model(ids.expand(batch, -1), positions=wrong)
            except ValueError as error:
                texts.append(str(error))

    ids, mine = make_ids(2), slice(rank, rank + 1)
    model, _ = parallelize(alone, compile=True, ac=SelectiveAC.Config())
    positions = torch.cat([PACKED, torch.arange(TOKENS)[None]])
    assert_trains_alike(alone, model, ids, positions, ids[mine], positions[mine])
    return texts


def test_two_ranks_against_one():
    """FSDP2, context parallelism, activation checkpointing and compile, as torchtitan applies them
    to a model."""
    expected = ["must be given", "put together", "batch of 2"] * 2
    for texts in ranks.run(two_ranks, 2):
        for text, part in zip(texts, expected, strict=True):
            assert part in text


def test_readme():
    names = run_readme("torchtitan")
    inner = names["spec"].model.layers[0].attention.inner_attention
    assert isinstance(inner, NSAInnerAttention.Config)
    assert len(names["spec"].model.layers) == len(model_registry("8B").model.layers)
