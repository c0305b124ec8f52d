"""nsa.attention on one rank."""

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils import checkpoint  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import nsa.ops  # noqa: E402
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

TOKENS = 300
DOCUMENTS = [0, 20, 170, 300]


@pytest.fixture(scope="module", params=DEVICES)
def group(request):
    return nsa.Group.local(request.param)


def make_engine(group, config=CONFIG, plan=nsa.Plan(TOKENS), **options):
    return group.engine(config, plan, dtype=dtype_of(group.device[:4]), **options)


def flat_leaves(*tensors):
    leaves = []
    for tensor in tensors:
        leaves.extend(tensor if isinstance(tensor, (tuple, list)) else [tensor])
    return leaves


@pytest.mark.parametrize("separate", [False, True], ids=["shared_kv", "separate_kv"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "packed"])
@pytest.mark.parametrize("compressor", ["mean", "weighted", "linear", "mlp"])
def test_against_dense_fp64(group, compressor, documents, separate):
    config = with_compressor(compressor)
    engine = make_engine(
        group, config, nsa.Plan(TOKENS, cu_seqlens=documents), max_hidden_width=128
    )
    q, k, v, gate = make_inputs(TOKENS, config, group.device[:4], separate)
    core = nsa.CoreAttention(config, group, device=group.device)
    for parameter in core.parameters():  # off the mean, so that every one of them matters
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    params = {
        name: dict(getattr(core, name).named_parameters()) for name in ("compress_k", "compress_v")
    }
    o = nsa.attention(engine, q, k, v, gate, **params)
    d_o = torch.randn_like(o)
    leaves = flat_leaves(q, k, v, gate) + list(core.parameters())
    gradients = torch.autograd.grad(o, leaves, d_o)

    with torch.no_grad():
        _, more = engine.forward(q, k, v, gate, **params, extras=["block_indices"])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    at = iter(exact)
    q_, k_ = next(at), [next(at) for _ in flat_leaves(k)]
    v_, gate_ = [next(at) for _ in flat_leaves(v)], next(at)
    params_ = {name: {key: next(at) for key in of} for name, of in params.items()}
    times = 1 if separate else 3
    expected = reference.attention(
        config, q_, k_ * times, v_ * times, gate_, more["block_indices"], **params_,
        cu_seqlens=documents,
    )  # fmt: skip
    tolerance = TOLERANCE[q.dtype]
    assert relative_error(o, expected) < tolerance
    expected = torch.autograd.grad(expected, exact, d_o.double())
    # What is added to all keys changes nothing: its gradient is 0 but for rounding.
    least = max(float(of.norm()) for of in expected) / 100
    for leaf, gradient, of in zip(leaves, gradients, expected):
        assert gradient.dtype == leaf.dtype
        assert relative_error(gradient, of, least) < 3 * tolerance


def test_gradcheck():
    # All blocks are selected, as a step of finite differences must not change which are.
    config = with_compressor("weighted")
    engine = nsa.Engine(config, nsa.Plan(80), nsa.Group.local(), dtype=torch.float32)
    q, k, v, gate = (leaf.detach().double() for leaf in make_inputs(80))
    weight = torch.rand(2, 32, dtype=torch.double) / 16
    pe = torch.randn(1, 32, 64, dtype=torch.double) / 8

    def function(q, k, v, gate, weight, pe):
        q, k, v, gate, weight, pe = (t.float() for t in (q, k, v, gate, weight, pe))
        params = {"weight": weight, "pe": pe.expand(2, -1, -1).contiguous()}
        o = nsa.attention(engine, q, k, v, gate, compress_k=params, compress_v=params)
        return o.double()

    inputs = [t.requires_grad_() for t in (q, k, v, gate, weight, pe)]
    assert torch.autograd.gradcheck(
        function, inputs, eps=1e-2, atol=1e-3, rtol=1e-3, fast_mode=True
    )


def test_no_copies(group, monkeypatch):
    """The library is given the very memory of its arguments."""
    engine = make_engine(group)
    q, k, v, gate = make_inputs(TOKENS, device=group.device[:4])
    seen = []
    forward = engine._forward
    monkeypatch.setattr(
        engine, "_forward",
        lambda inputs, outputs, saved: seen.append(
            ([view.data for view in inputs.tensors[:8]], outputs.tensors[0].data)
        ) or forward(inputs, outputs, saved),
    )  # fmt: skip
    packed = torch.stack([k, v], 1).detach().requires_grad_()  # as a fused projection gives them
    o = nsa.attention(engine, q, packed[:, 0], packed[:, 1], gate)
    ((inputs, output),) = seen
    k_address, v_address = packed[:, 0].data_ptr(), packed[:, 1].data_ptr()
    assert inputs == [q.data_ptr(), *(k_address, v_address) * 3, gate.data_ptr()]
    assert output == o.data_ptr()
    assert torch.equal(o, nsa.attention(engine, q, k, v, gate))


def test_gradients_of_what_is_wanted_only(group):
    engine = make_engine(group)
    q, k, v, gate = make_inputs(TOKENS, device=group.device[:4])
    o = nsa.attention(engine, q, k, v, gate)
    expected = torch.autograd.grad(o.float().sum(), (q, v))
    o = nsa.attention(engine, q, k.detach(), v, gate.detach())
    for gradient, of in zip(torch.autograd.grad(o.float().sum(), (q, v)), expected):
        assert torch.equal(gradient, of)
    with torch.no_grad():
        assert not nsa.attention(engine, q, k, v, gate).requires_grad
    assert not nsa.attention(engine, *(t.detach() for t in (q, k, v, gate))).requires_grad


def test_many_forwards_wait_for_their_backwards():
    group = nsa.Group.local()
    engine = make_engine(group)
    batches = [make_inputs(TOKENS, seed=seed) for seed in range(4)]

    def loss(batch):
        return nsa.attention(engine, *batch).square().sum()

    expected = [torch.autograd.grad(loss(batch), batch) for batch in batches]
    losses = [loss(batch) for batch in batches]
    for batch, value, of in reversed(list(zip(batches, losses, expected))):
        gradients = torch.autograd.grad(value, batch, retain_graph=True)
        gradients = torch.autograd.grad(value, batch)
        assert all(map(torch.equal, gradients, of))
    # An engine that its group has let go of lives until then.
    value = loss(batches[0])
    group.close()
    del engine
    assert all(map(torch.equal, torch.autograd.grad(value, batches[0]), expected[0]))


def test_gradient_accumulation(group):
    engine = make_engine(group)
    inputs = make_inputs(TOKENS, device=group.device[:4])
    for scale in (1, 2):
        (nsa.attention(engine, *inputs).float().sum() * scale).backward()
    once = torch.autograd.grad(nsa.attention(engine, *inputs).float().sum(), inputs)
    for leaf, gradient in zip(inputs, once):
        assert relative_error(leaf.grad, 3 * gradient) < TOLERANCE[engine_dtype(group)]


def engine_dtype(group):
    return dtype_of(group.device[:4])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(group, reentrant):
    engine = make_engine(group)
    inputs = make_inputs(TOKENS, device=group.device[:4])

    def layers(q, k, v, gate):
        o = nsa.attention(engine, q, k, v, gate)
        return nsa.attention(engine, o.to(q.dtype), k, v, gate)

    expected = torch.autograd.grad(layers(*inputs).float().sum(), inputs)
    o = checkpoint.checkpoint(layers, *inputs, use_reentrant=reentrant)
    o.float().sum().backward()
    assert all(map(torch.equal, (leaf.grad for leaf in inputs), expected))


def test_saved_tensors_may_be_copies(group):
    """As those are that wait in another memory, such as torch.autograd.graph.save_on_cpu's."""
    engine = make_engine(group)
    inputs = make_inputs(TOKENS, device=group.device[:4])
    other = make_inputs(TOKENS, seed=1, device=group.device[:4])
    expected = torch.autograd.grad(nsa.attention(engine, *inputs).float().sum(), inputs)
    with torch.autograd.graph.save_on_cpu():
        o = nsa.attention(engine, *inputs)
    nsa.attention(engine, *other).float().sum().backward()
    assert all(map(torch.equal, torch.autograd.grad(o.float().sum(), inputs), expected))


def test_engine_without_backward():
    engine = nsa.Engine(CONFIG, nsa.Plan(TOKENS), nsa.Group.local(), dtype="f32", backward=False)
    inputs = make_inputs(TOKENS)
    with pytest.raises(nsa.FailedPreconditionError, match="backward=False"):
        nsa.attention(engine, *inputs)
    with torch.no_grad():
        nsa.attention(engine, *inputs)


def test_no_second_derivatives():
    engine = make_engine(nsa.Group.local())
    q, k, v, gate = make_inputs(TOKENS)
    (gradient,) = torch.autograd.grad(
        nsa.attention(engine, q, k, v, gate).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_forward_mode_and_transforms_are_refused():
    """Where gradients or tangents would be lost."""
    engine = make_engine(nsa.Group.local())
    q, k, v, gate = (t.detach() for t in make_inputs(TOKENS))

    def function(q):
        return nsa.attention(engine, q, k, v, gate)

    several = torch.stack([q, -q])
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda q: function(q).sum())(q)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(function)(several.requires_grad_())
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(function, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="jvp"):
            function(torch.autograd.forward_ad.make_dual(q, q))
        assert torch.equal(function(q), function(q.clone()))
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(function)(several)[1], function(-q))


def test_views_of_the_same_branches(group):
    engine = make_engine(group)
    q, k, v, gate = make_inputs(TOKENS, device=group.device[:4])
    expected = torch.autograd.grad(nsa.attention(engine, q, k, v, gate).float().sum(), (k, v))
    views = [t.expand(3, *t.shape).unbind() for t in (k, v)]
    o = nsa.attention(engine, q, *views, gate)
    for gradient, of in zip(torch.autograd.grad(o.float().sum(), (k, v)), expected):
        assert relative_error(gradient, of) < 3 * TOLERANCE[engine_dtype(group)]


def test_operations_keep_their_promises(group):
    """torch's own checks of schema and fake kernels."""
    engine = make_engine(group)
    q, k, v, gate = (t.detach() for t in make_inputs(TOKENS, device=group.device[:4]))
    tensors = (q, k, v, None, None, None, None, gate)
    # Not what is saved, which has gaps that differ from run to run.
    torch.library.opcheck(
        torch.ops.nsa.forward.default,
        tensors,
        {"engine": engine.number, "saved_bytes": 0},
        test_utils=("test_schema", "test_faketensor"),
    )
    o, saved = torch.ops.nsa.forward(*tensors, engine=engine.number, saved_bytes=engine.saved_bytes)
    torch.library.opcheck(
        torch.ops.nsa.backward.default,
        (o, saved, *tensors),
        {
            "engine": engine.number,
            "wanted": [True, False, True, *[False] * 4, True],
            "sum_over_ranks": False,
        },
        test_utils=("test_schema", "test_faketensor"),
    )


def test_modes_see_operations(group):
    class Seen(TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    engine = make_engine(group)
    inputs = make_inputs(TOKENS, device=group.device[:4])
    expected = torch.autograd.grad(nsa.attention(engine, *inputs).float().sum(), inputs)
    with Seen() as seen:
        actual = torch.autograd.grad(nsa.attention(engine, *inputs).float().sum(), inputs)
    assert {"nsa.forward.default", "nsa.backward.default"} <= set(seen.names)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("shared", [False, True])
def test_compile_without_graph_breaks(group, shared):
    engine = make_engine(group)
    inputs = make_inputs(TOKENS, device=group.device[:4], separate=not shared)
    leaves = flat_leaves(*inputs)

    def step(q, k, v, gate):
        o = nsa.attention(engine, q * 2, k, v, gate.sigmoid())
        return (o.float() ** 2).sum()

    expected = torch.autograd.grad(step(*inputs), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        actual = torch.autograd.grad(compiled(*inputs), leaves)
        for gradient, of in zip(actual, expected):
            assert relative_error(gradient, of) < TOLERANCE[engine_dtype(group)]
    with torch.no_grad():
        assert relative_error(compiled(*inputs), step(*inputs)) < 1e-5


def test_wrong_tensors_are_value_errors(group):
    engine = make_engine(group)
    q, k, v, gate = make_inputs(TOKENS, device=group.device[:4])
    with pytest.raises(ValueError, match=r"q.shape = \[299,8,64\]: must be \[300,8,64\]"):
        nsa.attention(engine, q[1:], k, v, gate)
    with pytest.raises(ValueError, match="k_cmp.*stride"):
        nsa.attention(engine, q, k.mT.contiguous().mT, v, gate)
    with pytest.raises(ValueError, match="v_cmp.*float64"):
        nsa.attention(engine, q, k, v.double(), gate)
    nsa.attention(engine, q, k, v, gate)
    for changed in (k.to("meta"), FakeTensorMode().from_tensor(k.detach())):
        with torch.no_grad(), pytest.raises(ValueError, match="k_cmp: is "):
            engine.forward(q, changed, v, gate)
    if group.device_index >= 0:
        with pytest.raises(ValueError, match="k_cmp: is on cpu, must be on cuda:0"):
            nsa.attention(engine, q, k.cpu(), v, gate)
    nsa.attention(engine, q, k, v, gate).float().sum().backward()
