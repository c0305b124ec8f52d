"""NSA in Megatron-core's own layers and models, on GPUs as users run it, and on the CPU with gloo
groups, where what Megatron does on GPUs only (dealing RoPE's tables) is done as it does. It deals
thd batches with Transformer Engine only: nsa.Plan does it here, and Megatron's RoPE of thd checks
it."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.common.embeddings import rotary_pos_embedding  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.enums import AttnBackend, AttnMaskType  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.utils import get_batch_on_this_cp_rank  # noqa: E402

import nsa  # noqa: E402
import ranks  # noqa: E402
from adapter_testing import (  # noqa: E402
    TOLERANCE,
    assert_close,
    assert_same,
    config_of,
    gradients_of,
    is_ours,
    make_config,
    perturb,
    run_readme,
)
from torch_testing import DEVICES, dtype_of, need, start  # noqa: E402

from nsa.adapters.megatron import NSACoreAttention, get_nsa_layer_spec  # noqa: E402

CONFIG = make_config(compressor="mlp")
HIDDEN, TOKENS, VOCABULARY = 64, 320, 64
# Padded to multiples of 4, for two ranks.
ENDS, PADDED_ENDS = [0, 98, 134, 310], [0, 100, 136, 320]


def make_transformer_config(device="cpu", **fields):
    dtype = dtype_of(device)
    return TransformerConfig(
        **{
            "num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 4,
            "num_query_groups": 2, "kv_channels": 64, "attention_dropout": 0.0,
            "hidden_dropout": 0.0, "bf16": dtype == torch.bfloat16, "params_dtype": dtype,
            "use_cpu_initialization": torch.device(device).type == "cpu",
        } | fields
    )  # fmt: skip


def seed(device):
    torch.manual_seed(0)
    if torch.device(device).type == "cuda":
        model_parallel_cuda_manual_seed(0)


def make_layer(config=CONFIG, device="cpu", **fields):
    seed(device)
    spec = get_nsa_layer_spec(get_gpt_layer_local_spec(), config)
    layer = build_module(spec, config=make_transformer_config(device, **fields), layer_number=1)
    perturb(layer)
    return layer.to(device, dtype_of(device))


def make_gpt(groups=None, config=CONFIG, device="cpu", **fields):
    """As Megatron's training does it."""
    seed(device)
    model = GPTModel(
        make_transformer_config(device, num_layers=2, calculate_per_token_loss=True, **fields),
        get_nsa_layer_spec(get_gpt_layer_local_spec(), config),
        vocab_size=VOCABULARY,
        max_sequence_length=TOKENS,
        position_embedding_type="rope",
        pg_collection=groups,
    )
    perturb(model)
    model.to(device)
    return Float16Module(model.config, model) if model.config.bf16 else model


def make_ids(batch):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY, (batch, TOKENS), generator=generator)


def packed_seq_params(ends=ENDS, padded_ends=PADDED_ENDS, device="cpu"):
    """Of documents with padding between them; none with `ends` None."""
    padded_q, padded_kv = torch.tensor([padded_ends] * 2, dtype=torch.int32, device=device)
    lengths = {"max_seqlen_q": TOKENS, "max_seqlen_kv": TOKENS}
    if ends is None:
        return PackedSeqParams("thd", padded_q, padded_kv, **lengths)
    ends = torch.tensor(ends, dtype=torch.int32, device=device)
    return PackedSeqParams("thd", ends, ends, padded_q, padded_kv, **lengths)


def rope(positions):
    """As Megatron's RotaryEmbedding: angles [tokens,1,1,64]."""
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    return torch.cat([angles, angles], -1)[:, None, None]


def deal(tensor, group=None):
    """[B,T,...] as Megatron deals batches."""
    return get_batch_on_this_cp_rank({"": tensor.contiguous()}, group)[""]


def use_cpu(patch):
    """Megatron keeps tables and random states on the current GPU."""
    patch.setattr(torch.cuda, "current_device", lambda: "cpu")
    no_state = torch.empty(0, dtype=torch.uint8)
    patch.setattr(torch.cuda.random, "get_rng_state", lambda **_: no_state)
    patch.setattr(
        rotary_pos_embedding,
        "get_pos_emb_on_this_cp_rank",
        lambda table, dim, group: deal(table.transpose(0, 1), group).transpose(0, 1),
    )


@pytest.fixture(scope="module", params=["cpu"])
def megatron(request):
    """One rank's groups, on the device that it is; and what this process had before."""
    device = request.param
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            use_cpu(patch)
        rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in rank.items():
            patch.setenv(name, value)
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield device
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


on_devices = pytest.mark.parametrize("megatron", DEVICES, indirect=True)


def direct(core, q, k, v, plan):
    """nsa.attention() of q [T,Hq,D], ... with the parameters of a core attention."""
    gate = torch.einsum("thd,hgd->thg", q, core.gate_weight) + core.gate_bias
    group = nsa.Group.local(q.device.type)
    engine = nsa.Engine(core.config, plan, group, dtype=q.dtype, max_hidden_width=128)
    params = {
        name: dict(getattr(core, name).named_parameters()) for name in ("compress_k", "compress_v")
    }
    return nsa.attention(engine, q, k, v, gate.sigmoid(), **params)


def make_qkv(*tokens, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    qkv = [torch.randn(*tokens, heads, 64, generator=generator) for heads in (4, 2, 2)]
    return [x.to(device, dtype_of(device)).requires_grad_() for x in qkv]


def compare(actual, expected, leaves):
    assert_close(actual, expected)
    d_o = torch.randn_like(actual)
    gradients, of = (
        dict(enumerate(torch.autograd.grad(o, leaves, d_o))) for o in (actual, expected)
    )
    assert_same(gradients, of)


@on_devices
@pytest.mark.parametrize("batch", [1, 3])
def test_sbhd_is_nsa_attention(megatron, batch):
    core = make_layer(device=megatron).self_attention.core_attention
    q, k, v = make_qkv(TOKENS, batch, device=megatron)
    o = core(q, k, v, None, attn_mask_type=AttnMaskType.causal)
    assert o.shape == (TOKENS, batch, 4 * 64)
    plan = nsa.Plan(TOKENS)
    expected = torch.stack(
        [direct(core.core, q[:, b], k[:, b], v[:, b], plan).flatten(1) for b in range(batch)], 1
    )
    compare(o, expected, [q, k, v, *core.parameters()])


def test_one_sequence_is_not_copied(megatron, monkeypatch):
    core = make_layer().self_attention.core_attention
    q, k, v = make_qkv(TOKENS, 1)
    given = []
    run = nsa.Engine.run_forward
    monkeypatch.setattr(
        nsa.Engine, "run_forward",
        lambda self, tensors, *rest, **named: given.extend(tensors[:3])
        or run(self, tensors, *rest, **named),
    )  # fmt: skip
    core(q, k, v, None)
    assert [t.data_ptr() for t in given] == [t.data_ptr() for t in (q, k, v)]


@on_devices
@pytest.mark.parametrize("padded", [False, True])
def test_thd_is_nsa_attention(megatron, padded):
    core = make_layer(device=megatron).self_attention.core_attention
    q, k, v = make_qkv(TOKENS, device=megatron)
    packed = packed_seq_params(ENDS if padded else None, device=megatron)
    o = core(q, k, v, None, packed_seq_params=packed)
    assert o.shape == (TOKENS, 4 * 64)
    real = torch.cat([
        torch.arange(begin, begin + length)
        for begin, length in zip(PADDED_ENDS, torch.tensor(ENDS if padded else PADDED_ENDS).diff())
    ])  # fmt: skip
    plan = nsa.Plan(cu_seqlens=ENDS if padded else PADDED_ENDS)
    expected = direct(core.core, q[real], k[real], v[real], plan).flatten(1)
    compare(o[real], expected, [q, k, v, *core.parameters()])


def test_layer(megatron):
    """TransformerLayer: training, and what a checkpoint is given."""
    layer = make_layer()
    x = torch.randn(TOKENS, 2, HIDDEN)
    y = layer(x, attention_mask=None, rotary_pos_emb=rope(torch.arange(TOKENS)))[0]
    y.square().sum().backward()
    assert all(p.grad.norm() > 0 for name, p in layer.named_parameters() if is_ours(name))
    sharded = layer.sharded_state_dict()
    prefix = "self_attention.core_attention."
    ours = layer.self_attention.core_attention.state_dict()
    assert len(ours) == 12
    for name, value in ours.items():
        assert torch.equal(sharded[prefix + name].data, value)


@pytest.mark.parametrize(
    "text, fields",
    [
        ("attention_dropout", {"attention_dropout": 0.1}),
        ("window_size", {"window_size": (128, 0)}),
        ("softmax_type", {"softmax_type": "off-by-one"}),
        ("apply_query_key_layer_scaling", {"apply_query_key_layer_scaling": True}),
        ("log_max_attention_logit", {"log_max_attention_logit": True}),
        ("attention_backend", {"attention_backend": AttnBackend.flash}),
        ("cp_comm_type", {"cp_comm_type": "a2a"}),
        ("softmax scale", {"softmax_scale": 0.1}),
        ("num_q_heads = 4: the model has 8", {"num_attention_heads": 8}),
        ("head_dim_qk = 64: the model has 128", {"kv_channels": 128}),
    ],
)
def test_configs_that_cannot_be_honoured(megatron, text, fields):
    with pytest.raises(ValueError, match=text):
        if "cp_comm_type" in fields:
            NSACoreAttention(
                make_transformer_config(),
                1,
                AttnMaskType.causal,
                "self",
                nsa_config=CONFIG,
                **fields,
            )
        else:
            make_layer(**fields)


def test_calls_that_cannot_be_honoured(megatron):
    from megatron.core.inference.contexts import StaticInferenceContext

    config = make_transformer_config()
    for mask_type, attention in ((AttnMaskType.padding, "self"), (AttnMaskType.causal, "cross")):
        with pytest.raises(ValueError, match="attn_mask_type|attention_type"):
            NSACoreAttention(config, 1, mask_type, attention, nsa_config=CONFIG)
    layer = make_layer()
    core = layer.self_attention.core_attention
    x, (q, k, v) = torch.randn(TOKENS, 1, HIDDEN), make_qkv(TOKENS, 1)
    mask = torch.ones(1, 1, TOKENS, TOKENS).triu(1).bool()
    unequal = packed_seq_params()
    unequal.cu_seqlens_kv_padded = torch.tensor([0, 320])
    for text, call in {
        "attention_mask": lambda: layer(x, attention_mask=mask),
        "attention_bias": lambda: core(q, k, v, None, attention_bias=mask.float()),
        "attn_mask_type": lambda: core(q, k, v, None, attn_mask_type=AttnMaskType.no_mask),
        "qkv_format": lambda: core(q, k, v, None, packed_seq_params=PackedSeqParams("sbhd")),
        "must be equal": lambda: core(
            *(t[:, 0] for t in (q, k, v)), None, packed_seq_params=unequal
        ),
        "local_cp_size": lambda: core(
            *(t[:, 0] for t in (q, k, v)), None,
            packed_seq_params=PackedSeqParams("thd", local_cp_size=1),
        ),
        "cu_seqlens_q, cu_seqlens_kv: must be given": lambda: core(
            *(t[:, 0] for t in (q, k, v)), None, packed_seq_params=PackedSeqParams("thd")
        ),
        "k_cmp": lambda: core(q[:1], k, v, None),
        "inference_context": lambda: layer(
            x, attention_mask=None, inference_context=StaticInferenceContext(1, 512)
        ),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(ValueError, match="SelfAttention"):
        get_nsa_layer_spec(get_nsa_layer_spec(get_gpt_layer_local_spec(), CONFIG), CONFIG)


RECOMPUTE = {
    "none": {},
    "full": {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective"},  # core attention
}  # fmt: skip


@on_devices
@pytest.mark.parametrize("thd", [False, True])
def test_training(megatron, thd, monkeypatch):
    """GPTModel, with and without activation checkpointing."""
    run, calls = nsa.Engine.run_forward, []
    monkeypatch.setattr(
        nsa.Engine, "run_forward",
        lambda self, *arguments: calls.append(1) or run(self, *arguments),
    )  # fmt: skip
    ids, losses = make_ids(1 if thd else 2).to(megatron), {}
    packed = packed_seq_params(device=megatron) if thd else None
    for name, fields in RECOMPUTE.items():
        model = make_gpt(device=megatron, **fields)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        losses[name], steps = [], 4
        calls.clear()
        for _ in range(steps):
            loss = model(ids, None, None, labels=ids, packed_seq_params=packed).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(float(loss.detach()))
        assert len(calls) == steps * 2 * (1 if name == "none" else 2)
        tolerance = 1e-4 if megatron == "cpu" else 1e-2
        assert losses[name] == pytest.approx(losses["none"], rel=tolerance)
    assert losses["none"][-1] < losses["none"][0] - 0.1, losses


@on_devices
def test_compile(megatron):
    core = make_layer(device=megatron).self_attention.core_attention
    backend = "aot_eager" if megatron == "cpu" else "inductor"
    run = torch.compile(core, backend=backend, fullgraph=True)
    leaves = make_qkv(TOKENS, 1, device=megatron)
    compare(run(*leaves, None), core(*leaves, None), [*leaves, *core.parameters()])
    leaves = make_qkv(TOKENS, device=megatron)
    other = packed_seq_params(ENDS, [0, 160, 240, TOKENS], megatron)
    run(*leaves, None, packed_seq_params=packed_seq_params(device=megatron))
    with torch.compiler.set_stance("fail_on_recompile"):
        o = run(*leaves, None, packed_seq_params=other)
    compare(o, core(*leaves, None, packed_seq_params=other), [*leaves, *core.parameters()])


def context_parallel(rank, size, device):
    device = start(device, rank, size)
    if device.type == "cpu":
        use_cpu(pytest.MonkeyPatch())
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    one = ProcessGroupCollection.use_mpu_process_groups()
    one.cp = dist.new_subgroups(1)[0]
    config = config_of(device, CONFIG)
    alone = make_gpt(one, config, device)
    sharded = make_gpt(None, config, device, context_parallel_size=size)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    parallel = DistributedDataParallel(sharded.config, ddp_config, sharded)
    by_document = nsa.Plan(num_ranks=size, sharding="zigzag_per_document", cu_seqlens=PADDED_ENDS)
    for packed in (None, packed_seq_params(None, device=device)):
        ids = make_ids(2 if packed is None else 1).to(device)
        mine = deal(ids) if packed is None else by_document.shard(ids, rank, dim=1)
        plan = nsa.Plan(TOKENS, size, sharding="zigzag") if packed is None else by_document
        expected = alone(ids, None, None, packed_seq_params=packed)
        actual = parallel(mine, None, None, packed_seq_params=packed)
        assert_close(plan.gather(actual, dim=1), expected)
        expected.square().sum().backward()
        actual.square().sum().backward()
        parallel.finish_grad_sync()
        gradients = {name: p.main_grad for name, p in sharded.named_parameters()}
        assert_same(gradients, gradients_of(alone))
        alone.zero_grad()
        parallel.zero_grad_buffer()
    core = next(module for module in sharded.modules() if isinstance(module, NSACoreAttention))
    ends = torch.tensor([0, 99, TOKENS], device=device)
    qkv = make_qkv(TOKENS // size, device=device)
    try:
        core(*qkv, None, packed_seq_params=PackedSeqParams("thd", ends, ends))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_context_parallel_ranks_against_one(device):
    need(device, 2)
    for text in ranks.run(context_parallel, 2, device):
        assert "multiple of 4" in text


def tensor_parallel(rank, size):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    config, x = (
        make_config(),
        torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(4)),
    )
    torch.manual_seed(0)
    spec = get_nsa_layer_spec(get_gpt_layer_local_spec(), config)
    fields = make_transformer_config(tensor_model_parallel_size=size)
    layer = build_module(spec, config=fields, layer_number=1)
    core = layer.self_attention.core_attention.core
    assert core.gate_weight.shape == (2, 3, 64) and core.gate_weight.tensor_model_parallel
    y = layer(x, attention_mask=None)[0]
    texts = []
    for build in (
        lambda: make_layer(config, tensor_model_parallel_size=size, num_query_groups=1),
        lambda: build_module(
            get_nsa_layer_spec(get_gpt_layer_local_spec(), config, compressor_per_head=False),
            config=fields, layer_number=1,
        ),
    ):  # fmt: skip
        try:
            build()
        except ValueError as error:
            texts.append(str(error))
    return y.detach().numpy(), texts


def test_two_tensor_parallel_ranks_against_one(megatron):
    torch.manual_seed(0)
    spec = get_nsa_layer_spec(get_gpt_layer_local_spec(), make_config())
    layer = build_module(spec, config=make_transformer_config(), layer_number=1)
    x = torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(4))
    expected = layer(x, attention_mask=None)[0].detach()
    for y, texts in ranks.run(tensor_parallel, 2):
        torch.testing.assert_close(torch.from_numpy(y), expected, **TOLERANCE)
        assert len(texts) == 2 and "num_query_groups" in texts[0], texts


def test_readme(megatron):
    names = run_readme("Megatron-core")
    assert names["y"].shape == names["x"].shape
