"""What only a GPU has: streams, CUDA graphs, memory in float16."""

import pytest

torch = pytest.importorskip("torch")

import nsa  # noqa: E402
from torch_testing import CONFIG, make_inputs, relative_error, with_compressor  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

TOKENS = 512


@pytest.fixture(scope="module")
def group():
    return nsa.Group.local("cuda")


def make_layer(group):
    torch.manual_seed(0)
    return nsa.NSAAttention(
        128, with_compressor("mlp"), group, rope_theta=1e4, device="cuda", dtype=torch.bfloat16
    )


def make_x(seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(TOKENS, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
    return x.requires_grad_()


def step(layer, x):
    for parameter in (x, *layer.parameters()):
        parameter.grad = None
    y = layer(x)
    y.float().square().sum().backward()
    return y


def gradients(layer, x):
    return [t.grad.clone() for t in (x, *layer.parameters())]


def test_step_as_a_cuda_graph(group):
    layer, x = make_layer(group), make_x(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for parameter in (x, *layer.parameters()):
        parameter.grad = None
    with torch.cuda.graph(graph):
        y = layer(x)
        y.float().square().sum().backward()
    static = [t.grad for t in (x, *layer.parameters())]
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(make_x(seed))
        graph.replay()
        captured = [y.clone(), *(t.clone() for t in static)]
        fresh = make_x(seed)
        # Another forward between launches must not disturb the graph's memory, nor it that.
        expected = [step(layer, fresh), *gradients(layer, fresh)]
        graph.replay()
        for actual, again, of in zip(captured, [y, *static], expected):
            assert torch.equal(actual, of) and torch.equal(again, of)
    group.health()


def test_forward_and_backward_as_graphs_of_their_own(group):
    layer, x = make_layer(group), make_x(0)
    expected_layer = make_layer(group)
    graphed = torch.cuda.make_graphed_callables(layer, (x,))
    fresh, other = make_x(5), make_x(6)
    y = graphed(fresh)
    step(expected_layer, other)  # takes memory of the same engine between the two
    y.float().square().sum().backward()
    assert torch.equal(y, step(expected_layer, fresh.detach().requires_grad_()))
    for parameter, of in zip(layer.parameters(), expected_layer.parameters()):
        assert torch.equal(parameter.grad, of.grad)


def test_captured_forwards_keep_what_they_leave():
    """The graph's memory holds it, whatever runs between a launch and its backward's."""
    engine = nsa.Engine(CONFIG, nsa.Plan(TOKENS), nsa.Group.local("cuda"), dtype=torch.bfloat16)
    inputs, other = (make_inputs(TOKENS, CONFIG, "cuda", seed=seed) for seed in (0, 1))
    expected = torch.autograd.grad(nsa.attention(engine, *inputs).float().sum(), inputs)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        o = nsa.attention(engine, *inputs)
    with torch.cuda.graph(backward, pool=forward.pool()):
        gradients = torch.autograd.grad(o, inputs, torch.ones_like(o))
    for _ in range(2):
        forward.replay()
        torch.autograd.grad(nsa.attention(engine, *other).float().sum(), other)
        backward.replay()
        assert all(map(torch.equal, gradients, expected))


def test_engines_that_share_memory_and_a_graph():
    """What a graph has captured stays, also when an engine that shares its memory needs more."""
    group = nsa.Group.local("cuda")
    inputs = [t.detach() for t in make_inputs(4 * TOKENS, CONFIG, "cuda")]
    first = group.engine(CONFIG, nsa.Plan(TOKENS), dtype="bf16")
    few = [t[:TOKENS] for t in inputs]
    expected = nsa.attention(first, *few)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = nsa.attention(first, *few)
    second = group.engine(CONFIG, nsa.Plan(4 * TOKENS), dtype="bf16")
    whole = nsa.attention(second, *inputs)
    for _ in range(2):
        o.zero_()
        graph.replay()
        assert torch.equal(nsa.attention(second, *inputs), whole)
        assert torch.equal(o, expected) and torch.equal(nsa.attention(first, *few), expected)


def test_current_stream(group):
    engine = group.engine(CONFIG, nsa.Plan(TOKENS), dtype=torch.bfloat16)
    inputs = make_inputs(TOKENS, CONFIG, "cuda")
    expected = nsa.attention(engine, *inputs)
    q, k, v, gate = inputs
    stream = torch.cuda.Stream()
    late = torch.zeros_like(q)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a call on another stream would read zeros
        late.copy_(q)
        o = nsa.attention(engine, late, k, v, gate)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(o, expected)


def test_gradients_of_parts(group):
    """Whose rows begin anywhere, unlike those that kernels read."""
    engine = group.engine(CONFIG, nsa.Plan(TOKENS), dtype=torch.bfloat16)
    inputs = make_inputs(TOKENS, CONFIG, "cuda")
    d_o = torch.randn(TOKENS, 8 * 64 + 3, device="cuda", dtype=torch.bfloat16)
    o = nsa.attention(engine, *inputs)
    dense = d_o[:, 3:].unflatten(1, (8, 64)).clone()
    expected = torch.autograd.grad(o, inputs, dense, retain_graph=True)
    others = torch.zeros(TOKENS, 3, device="cuda", dtype=torch.bfloat16)
    joined = torch.cat([others, o.flatten(1)], 1)
    assert all(map(torch.equal, torch.autograd.grad(joined, inputs, d_o), expected))


def test_float16(group):
    inputs = [t.detach() for t in make_inputs(TOKENS, CONFIG, "cuda")]
    halves = [t.half() for t in inputs[:3]] + inputs[3:]
    bf16 = group.engine(CONFIG, nsa.Plan(192), dtype="bf16")
    f16 = group.engine(CONFIG, nsa.Plan(192), dtype="f16")
    o = nsa.attention(f16, *(t[:192] for t in halves))
    assert o.dtype == torch.float16
    assert relative_error(o, nsa.attention(bf16, *(t[:192] for t in inputs))) < 8e-3


def test_decode_as_a_graph(group):
    q, k, v, gate = (t.detach() for t in make_inputs(190, CONFIG, "cuda"))
    engine = group.engine(CONFIG, nsa.Plan(190), dtype="bf16")
    expected = nsa.attention(engine, q, k, v, gate)
    cache = nsa.KVCache(CONFIG, group, dtype="bf16", num_pages=16)
    assert cache.is_reachable
    sequence = cache.open()
    cache.append(sequence, k[:180], v[:180])
    row = [torch.empty_like(t[:1]) for t in (q, k, v, gate)]
    o = torch.empty_like(q[:1])

    def plan(t):
        for static, tensor in zip(row, (q, k, v, gate)):
            static.copy_(tensor[t : t + 1])
        cache.plan_step([(sequence, 1)])

    plan(180)
    cache.run_step(*row, o=o)
    assert relative_error(o[0], expected[180]) < 8e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.run_step(*row, o=o)
    for t in range(181, 190):
        plan(t)
        graph.replay()
        assert relative_error(o[0], expected[t]) < 8e-3
    assert cache.num_tokens(sequence) == 190
