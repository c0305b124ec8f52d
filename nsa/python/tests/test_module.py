"""CoreAttention and NSAAttention on one rank."""

import concurrent.futures
import copy
import io

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

import nsa  # noqa: E402
import reference  # noqa: E402
from torch_testing import (  # noqa: E402
    CONFIG,
    DEVICES,
    TOLERANCE,
    dtype_of,
    make_inputs,
    relative_error,
    with_compressor,
)

HIDDEN = 96
BATCH, TOKENS = 2, 150


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def make_layer(device, compressor="mlp", **options):
    torch.manual_seed(0)
    return nsa.NSAAttention(
        HIDDEN,
        with_compressor(compressor),
        rope_theta=10000.0,
        device=device,
        dtype=dtype_of(device),
        **options,
    )


def make_x(device, batch=BATCH):
    return torch.randn(batch, TOKENS, HIDDEN, device=device, dtype=dtype_of(device))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("compressor", ["weighted", "linear", "mlp"])
def test_summaries_start_as_the_mean(device, compressor, per_head):
    inputs = make_inputs(190, device=device)  # few, so that rounding selects no other blocks
    mean = nsa.CoreAttention(CONFIG)(*inputs)
    core = nsa.CoreAttention(
        with_compressor(compressor), compressor_per_head=per_head, device=device
    )
    assert relative_error(core(*inputs), mean) < TOLERANCE[inputs[0].dtype]
    heads = 2 if per_head else 1
    assert all(p.shape[0] == heads for p in core.parameters())


def test_narrow_mlp_starts_as_a_projection_of_the_mean():
    core = nsa.CoreAttention(
        with_compressor("mlp"), compressor_hidden=32, compressor_per_head=False
    )
    x = torch.randn(32, 1, 64)
    summary = reference.compress(x, dict(core.compress_k.named_parameters()), core.config)
    mean = x.mean(0)
    assert 0 < summary.norm() < mean.norm()
    torch.testing.assert_close(
        (summary * (mean - summary)).sum(), torch.tensor(0.0), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("compressor", ["weighted", "linear", "mlp"])
def test_sharded_parameters_start_as_others(compressor):
    """As FSDP2 wants it: made on the meta device, sharded, then initialised."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            core = nsa.CoreAttention(with_compressor(compressor), gate_from_query=True)
        fully_shard(core, mesh=init_device_mesh("cpu", (1,)))
        core.to_empty(device="cpu")
        torch.manual_seed(0)
        core.reset_parameters()
        torch.manual_seed(0)
        whole = nsa.CoreAttention(with_compressor(compressor), gate_from_query=True)
        for (name, value), (_, expected) in zip(
            core.named_parameters(), whole.named_parameters(), strict=True
        ):
            assert isinstance(value, DTensor), name
            assert torch.equal(value.full_tensor(), expected), name
    finally:
        dist.destroy_process_group()


def test_gates_from_queries(device):
    q, k, v, _ = make_inputs(300, device=device)
    core = nsa.CoreAttention(CONFIG, gate_from_query=True, device=device)
    halves = torch.full((300, 8, 3), 0.5, device=device)
    assert torch.equal(core(q, k, v), core(q, k, v, halves))
    core(q, k, v).float().sum().backward()
    assert core.gate_weight.grad.norm() > 0 and core.gate_bias.grad.norm() > 0
    with pytest.raises(ValueError, match="gate"):
        nsa.CoreAttention(CONFIG)(q, k, v)


def dense_layer(layer, x, block_indices):
    """NSAAttention of one document, x [T,H], in plain torch."""
    config = layer.config
    q = (x @ layer.q_proj.weight.T).unflatten(-1, (8, 64))
    k, v = (
        (x @ proj.weight.T).unflatten(-1, (layer.branches, 2, 64))
        for proj in (layer.k_proj, layer.v_proj)
    )
    # Pairs (i, i + D/2) as complex numbers.
    angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(32) / 32)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.cdouble)

    def rotate(y):
        z = torch.complex(y[..., :32], y[..., 32:]) * turn.view(len(x), *[1] * (y.dim() - 2), 32)
        return torch.cat([z.real, z.imag], -1)

    q, k = rotate(q), rotate(k)
    gate = torch.sigmoid(x @ layer.gate_proj.weight.T + layer.gate_proj.bias).unflatten(-1, (8, 3))
    times = 3 // layer.branches
    o = reference.attention(
        config, q, list(k.unbind(1)) * times, list(v.unbind(1)) * times, gate, block_indices,
        dict(layer.core.compress_k.named_parameters()),
        dict(layer.core.compress_v.named_parameters()),
    )  # fmt: skip
    return o.flatten(1) @ layer.o_proj.weight.T


@pytest.mark.parametrize("separate_kv", [False, True])
def test_layer_against_dense_fp64(separate_kv, monkeypatch):
    layer = make_layer("cpu", "weighted", separate_kv=separate_kv)
    torch.nn.init.normal_(layer.gate_proj.weight, std=0.1)
    x = make_x("cpu").requires_grad_()
    # What the engine was given, to ask it for the blocks that it selected.
    given = []
    forward = nsa.Engine.run_forward
    monkeypatch.setattr(
        nsa.Engine, "run_forward",
        lambda self, tensors, *rest, **named: given.append((self, tensors))
        or forward(self, tensors, *rest, **named),
    )  # fmt: skip
    y = layer(x)
    d_y = torch.randn_like(y)
    parameters = [p for p in layer.parameters()]
    gradients = torch.autograd.grad(y, [x, *parameters], d_y)
    ((engine, tensors),) = given
    o, indices = (
        torch.empty(BATCH * TOKENS, 8, 64),
        torch.empty(BATCH * TOKENS, 2, 3, dtype=torch.int32),
    )
    with torch.no_grad():
        engine.run_forward(tensors, o, extras={"block_indices": indices})

    exact, x_ = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    y_ = torch.stack(
        [dense_layer(exact, x_[b], indices.unflatten(0, (BATCH, -1))[b]) for b in range(BATCH)]
    )
    assert relative_error(y, y_) < 1e-5
    expected = torch.autograd.grad(y_, [x_, *exact.parameters()], d_y.double())
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, gradient, of in zip(names, gradients, expected):
        assert relative_error(gradient, of, least=0.1) < 1e-4, name


def test_batches_are_documents(device):
    layer, x = make_layer(device), make_x(device)
    together = layer(x)
    for b in range(BATCH):
        assert torch.equal(layer(x[b]), layer(x[b : b + 1])[0])
        assert relative_error(together[b], layer(x[b])) < TOLERANCE[x.dtype]
    packed = layer(x.flatten(0, 1), plan=nsa.Plan(cu_seqlens=[0, TOKENS, BATCH * TOKENS]))
    assert torch.equal(packed, together.flatten(0, 1))
    with pytest.raises(ValueError, match="has 300 tokens, must have 299"):
        layer(x, plan=nsa.Plan(299))
    with pytest.raises(ValueError, match="num_tokens = 0: must lie in"):
        layer(x[:, :0])


def test_plans_that_change(device):
    """As those of packed documents do: engines share memory, and one that the group has let go of
    serves the backwards that wait for it."""
    group = nsa.Group.local(device, max_engines=2)
    core = nsa.CoreAttention(CONFIG, group, gate_from_query=True, device=device)
    steps = []
    for seed, ends in enumerate([(0, 200), (0, 7, 8, 200), (0, 150, 200), (0, 60, 200, 333)]):
        q, k, v, _ = make_inputs(ends[-1], CONFIG, device, seed=seed)
        steps.append(((q, k, v), nsa.Plan(cu_seqlens=ends)))
    waiting = [core(*inputs, plan=plan) for inputs, plan in steps]
    for (inputs, plan), o in zip(steps, waiting):
        alone = copy.deepcopy(core)
        alone.group = nsa.Group.local(device)
        expected = alone(*inputs, plan=plan)
        assert torch.equal(o, expected)
        gradients, of = (
            torch.autograd.grad(y.float().square().sum(), inputs) for y in (o, expected)
        )
        assert all(map(torch.equal, gradients, of))


def test_threads_wait_for_one_another(device):
    """Modules without a group share one."""
    cores = [nsa.CoreAttention(CONFIG) for _ in range(2)]
    inputs = [make_inputs(300, device=device, seed=seed) for seed in range(2)]
    expected = [core(*of) for core, of in zip(cores, inputs)]

    def run(i):
        return all(torch.equal(cores[i](*inputs[i]), expected[i]) for _ in range(30))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, range(2)))


def test_state_dict_round_trip(device):
    layer, x = make_layer(device), make_x(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make_layer(device)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), layer(x))
    assert {"core.compress_k.w1", "core.compress_v.pe", "gate_proj.bias"} <= set(layer.state_dict())


def test_copies_are_modules_of_their_own(device):
    layer, x = make_layer(device), make_x(device)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))
    copied.core.group = nsa.Group.local(device)
    assert layer.core.group is None and copied.core.group is not None
    assert torch.equal(copied(x), layer(x))


def test_autocast(device):
    layer, x = make_layer(device).float(), make_x(device).float()
    dtype = torch.bfloat16
    with torch.autocast(device, dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    if device == "cpu":
        assert relative_error(y, layer(x)) < 3e-2


def train(layer, x, steps=3):
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
    return loss


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training(device, backend):
    """The engine is made while the step is traced, too."""
    x = make_x(device)
    expected = make_layer(device)
    loss = train(expected, x)
    layer = make_layer(device, engine_options={"fetch_budget_bytes": 1 << 24})
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
    tolerance = 10 * TOLERANCE[x.dtype]
    assert relative_error(train(compiled, x), loss) < tolerance
    for parameter, of in zip(layer.parameters(), expected.parameters()):
        torch.testing.assert_close(parameter, of, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert relative_error(compiled(x), expected(x)) < tolerance


def test_layers_alike_are_compiled_once(device):
    """Else a model of more layers than torch's limit of recompilations would not compile."""
    counter = CompileCounterWithBackend("aot_eager")
    layers = [make_layer(device) for _ in range(3)]
    compiled = [torch.compile(layer, fullgraph=True, backend=counter) for layer in layers]
    x = make_x(device)
    for layer, of in zip(compiled, layers):
        assert relative_error(layer(x), of(x)) < TOLERANCE[x.dtype]
    assert counter.frame_count == 1


def test_plans_that_change_are_compiled_twice_at_most(device):
    """As a number, then as a symbol."""
    counter = CompileCounterWithBackend("aot_eager")
    layer, expected = make_layer(device), make_layer(device)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = make_x(device)
    for end in (100, 150, 200, 250):
        plan = nsa.Plan(cu_seqlens=[0, end, 300])
        for module in (compiled, expected):
            module(x, plan=plan).float().square().mean().backward()
    assert counter.frame_count <= 2
    for parameter, of in zip(layer.parameters(), expected.parameters()):
        assert relative_error(parameter.grad, of.grad) < 10 * TOLERANCE[x.dtype]


def test_compiled_for_many(device):
    """Engines and lengths that change are traced anew, not as symbols."""
    layer, compiled = (nsa.CoreAttention(CONFIG, nsa.Group.local(device)) for _ in range(2))
    compiled = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(300, device=device)
    for end in (100, 150, 200):
        inputs_ = make_inputs(end, device=device)
        assert torch.equal(compiled(*inputs_), layer(*inputs_))
    function = torch.compile(nsa.attention, fullgraph=True, backend="aot_eager")
    for end in (100, 150, 200):
        engine = layer.group.engine(CONFIG, nsa.Plan(cu_seqlens=[0, end, 300]),
                                    dtype=dtype_of(device))  # fmt: skip
        assert torch.equal(function(engine, *inputs), nsa.attention(engine, *inputs))
