"""The engine and the cache on numpy arrays."""

import atexit
import os
import signal
import time

import numpy as np
import pytest

import nsa
from nsa.engine import flatten

CONFIG = nsa.Config(
    num_q_heads=4,
    num_kv_heads=2,
    head_dim_qk=64,
    head_dim_v=128,
    num_selected_blocks=3,
    num_local_blocks=1,
    window_tokens=48,
)
TOKENS = 300


@pytest.fixture(scope="module")
def group():
    return nsa.Group.local(num_threads=2)


@pytest.fixture(scope="module")
def engine(group):
    return nsa.Engine(CONFIG, nsa.Plan(TOKENS), group, dtype=np.float32)


@pytest.fixture
def tensors():
    random = np.random.default_rng(1)
    shapes = dict(q=(4, 64), k=(2, 64), v=(2, 128), gate=(4, 3))
    return {
        name: random.standard_normal((TOKENS, *shape), np.float32) for name, shape in shapes.items()
    }


def softmax_attention(q, k, v, mask):
    """Rows of one head: q [R,D], k [C,D], v [C,Dv], mask [R,C]."""
    scores = np.where(mask, q @ k.T / np.sqrt(q.shape[-1]), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p @ v / p.sum(-1, keepdims=True)


def test_forward_gives_what_it_says(engine, tensors):
    extras = ("o_cmp", "o_slc", "o_win", "lse_win", "block_indices")
    o, more = engine.forward(**tensors, extras=extras)
    gates = np.split(tensors["gate"], 3, -1)
    branches = more["o_cmp"], more["o_slc"], more["o_win"]
    np.testing.assert_allclose(o, sum(g * b for g, b in zip(gates, branches)), atol=1e-5)
    q, k, v = (tensors[name].astype(float) for name in "qkv")
    row, column = np.ogrid[:TOKENS, :TOKENS]
    near = (column <= row) & (column > row - 48)
    indices = more["block_indices"]
    assert indices.shape == (TOKENS, 2, 3) and (indices[:, :, 0] == 0).all()
    for head in range(4):
        of = head // 2
        window = softmax_attention(q[:, head], k[:, of], v[:, of], near)
        np.testing.assert_allclose(more["o_win"][:, head], window, atol=1e-5)
        selected = (indices[:, of, :, None] == np.arange(TOKENS) // 64).any(1) & (column <= row)
        expected = softmax_attention(q[:, head], k[:, of], v[:, of], selected)
        np.testing.assert_allclose(more["o_slc"][:, head], expected, atol=1e-5)


def test_reads_and_writes_in_place(engine, tensors):
    expected = engine.forward(**tensors)
    # Heads first and every second token: strides are the library's business, copies nobody's.
    strided = {}
    for name, tensor in tensors.items():
        memory = np.full((tensor.shape[1], 2 * TOKENS, tensor.shape[2]), np.nan, np.float32)
        strided[name] = memory[:, ::2].swapaxes(0, 1)
        strided[name][:] = tensor
    memory = np.zeros((4, TOKENS, 128), np.float32)
    o = memory.swapaxes(0, 1)
    assert engine.forward(**strided, o=o) is o
    assert (o == expected).all() and (memory.swapaxes(0, 1) == expected).all()


def test_backward_adds_to_what_is_there(engine, tensors):
    saved = engine.save()
    assert saved.num_bytes > 0
    o = engine.forward(**tensors, saved=saved)
    gradients = engine.backward(**tensors, d_o=o, saved=saved)
    assert gradients.k.shape == (TOKENS, 2, 64) and gradients.compress_k is None
    twice = nsa.Gradients(q=gradients.q.copy(), v=gradients.v.copy())
    assert engine.backward(**tensors, d_o=o, saved=saved, into=twice, accumulate=True) is twice
    np.testing.assert_allclose(twice.q, 2 * gradients.q, rtol=1e-6, atol=1e-6)
    assert twice.gate is None
    # d(o . o) by the gates: o is linear in them.
    np.testing.assert_allclose(
        (gradients.gate * tensors["gate"]).sum(), (o.astype(float) ** 2).sum(), rtol=1e-4
    )


def test_branches_of_their_own(engine, tensors):
    saved = engine.save()
    shared = engine.forward(**tensors, saved=saved)
    gradients = engine.backward(**tensors, d_o=shared, saved=saved)
    for name in "kv":
        tensors[name] = [tensors[name].copy() for _ in range(3)]
    o = engine.forward(**tensors, saved=saved)
    assert (o == shared).all()
    separate = engine.backward(**tensors, d_o=shared, saved=saved)
    np.testing.assert_allclose(sum(separate.k), gradients.k, atol=1e-4)
    np.testing.assert_allclose(sum(separate.v), gradients.v, atol=1e-4)


@pytest.mark.parametrize("compressor", ["weighted", "linear", "mlp"])
def test_compressors_that_take_the_mean(group, engine, tensors, compressor):
    config = nsa.Config(**{**vars(CONFIG), "compressor": compressor})
    learned = nsa.Engine(config, nsa.Plan(TOKENS), group, dtype="f32", max_hidden_width=256)

    def params(dim):
        mean = np.tile(np.eye(dim, dtype=np.float32), 32)[None] / 32
        if compressor == "weighted":
            return {"weight": np.full((1, 32), 1 / 32, np.float32)}
        if compressor == "linear":
            return {"w": mean}
        eye = np.eye(dim, dtype=np.float32)[None]
        return {
            "w1": np.concatenate([mean, -mean], 1),
            "b1": np.zeros((1, 2 * dim), np.float32),
            "w2": np.concatenate([eye, -eye], 2),
            "b2": np.zeros((1, dim), np.float32),
        }

    compress = {"compress_k": params(64), "compress_v": params(128)}
    o = learned.forward(**tensors, **compress)
    np.testing.assert_allclose(o, engine.forward(**tensors), atol=1e-4)
    saved = learned.save()
    learned.forward(**tensors, **compress, saved=saved)
    gradients = learned.backward(**tensors, **compress, d_o=o, saved=saved)
    assert {n: t.shape for n, t in gradients.compress_v.items()} == {
        n: t.shape for n, t in compress["compress_v"].items()
    }
    assert all(np.abs(t).max() > 0 for t in gradients.compress_v.values())
    with pytest.raises(ValueError, match="may have"):
        learned.forward(**tensors, compress_k={"weights": tensors["q"]})
    with pytest.raises(ValueError, match="compress_k"):
        learned.forward(**tensors)
    with pytest.raises(ValueError, match="compress_v.pe: must be unset"):
        engine.forward(**tensors, compress_v={"pe": np.zeros((1, 32, 128), np.float32)})


@pytest.mark.parametrize(
    "name, change, text",
    [
        ("q", lambda t: t[1:], r"q.shape = \[299,4,64\]: must be \[300,4,64\]"),
        ("k", lambda t: t.astype(np.float16), "k_cmp"),
        ("v", lambda t: t.astype(np.float64), "v_cmp: has dtype float64"),
        ("v", lambda t: np.repeat(t, 2, -1)[..., ::2], "v_cmp.*stride"),
        ("k", lambda t: [t, t], "k, v: are 2 and 1"),
        ("gate", lambda t: t.tolist(), "gate: is a <class 'list'>"),
        ("gate", lambda t: None, "gate"),
    ],
)
def test_wrong_tensors_are_value_errors_and_harm_nothing(engine, tensors, name, change, text):
    expected = engine.forward(**tensors)
    with pytest.raises(ValueError, match=text):
        engine.forward(**{**tensors, name: change(tensors[name])})
    assert (engine.forward(**tensors) == expected).all()


def test_extras_do_not_take_one_another_for_their_own(group, tensors):
    """Memory that held one is given to the next."""
    expected, plan = {}, nsa.Plan(TOKENS)
    for name in ("lse_cmp", "lse_slc", "lse_win"):
        engine = nsa.Engine(CONFIG, plan, group, dtype="f32")
        expected[name] = engine.forward(**tensors, extras=[name])[1][name]
    memory, o = np.empty((TOKENS, 4), np.float32), np.empty((TOKENS, 4, 128), np.float32)
    for name, of in expected.items():
        memory[:] = np.nan
        engine.run_forward(flatten(**tensors), o, extras={name: memory})
        np.testing.assert_array_equal(memory, of)


def test_views_of_the_same_branches(engine, tensors):
    """Have gradients of their own, as copies have."""
    saved = engine.save()
    copies, views = dict(tensors), dict(tensors)
    for name in "kv":
        copies[name] = [tensors[name].copy() for _ in range(3)]
        views[name] = [tensors[name][:] for _ in range(3)]
    o = engine.forward(**copies, saved=saved)
    expected = engine.backward(**copies, d_o=o, saved=saved)
    assert (engine.forward(**views, saved=saved) == o).all()
    gradients = engine.backward(**views, d_o=o, saved=saved)
    for actual, of in zip(gradients.k + gradients.v, expected.k + expected.v):
        np.testing.assert_array_equal(actual, of)


def test_gradients_go_where_they_belong_or_nowhere(engine, tensors):
    saved = engine.save()
    o = engine.forward(**tensors, saved=saved)
    k = np.zeros_like(tensors["k"])
    with pytest.raises(ValueError, match="without `into`"):
        engine.backward(**tensors, d_o=o, saved=saved, accumulate=True)
    three = nsa.Gradients(k=[k, k.copy(), k.copy()])
    with pytest.raises(ValueError, match="dk_slc, dv_slc: must be those of _cmp"):
        engine.backward(**tensors, d_o=o, saved=saved, into=three)
    with pytest.raises(ValueError, match="into.k: is 2 tensors"):
        engine.backward(**tensors, d_o=o, saved=saved, into=nsa.Gradients(k=[k, k]))
    for name in "kv":
        tensors[name] = [tensors[name].copy() for _ in range(3)]
    engine.forward(**tensors, saved=saved)
    with pytest.raises(ValueError, match="dk_slc, dv_slc: must not be those of _cmp"):
        engine.backward(**tensors, d_o=o, saved=saved, into=nsa.Gradients(k=k))
    expected = engine.backward(**tensors, d_o=o, saved=saved)
    only_one = nsa.Gradients(k=[None, k, None])
    engine.backward(**tensors, d_o=o, saved=saved, into=only_one)
    np.testing.assert_array_equal(k, expected.k[1])


def test_read_only_arrays_are_not_written(engine, tensors):
    o = np.empty((TOKENS, 4, 128), np.float32)
    engine.forward(**tensors, o=o)
    o.flags.writeable = False
    with pytest.raises(ValueError, match="o: is read-only"):
        engine.forward(**tensors, o=o)
    for tensor in tensors.values():
        tensor.flags.writeable = False
    engine.forward(**tensors)


def test_groups_that_are_closed():
    group = nsa.Group.local()
    engine = group.engine(CONFIG, nsa.Plan(TOKENS), dtype="f32")
    group.close()
    for call in (
        group.barrier,
        group.health,
        lambda: group.engine(CONFIG, engine.plan, dtype="f32"),
    ):
        with pytest.raises(ValueError, match="group: null"):
            call()
    with pytest.raises(ValueError, match="max_engines = 0"):
        nsa.Group.local(max_engines=0)


def test_forked_processes_end(group, engine, tensors):
    """Nothing is let go there, which would wait for threads that only this process has."""
    engine.forward(**tensors)
    forked = os.fork()
    if forked == 0:
        atexit._run_exitfuncs()
        os._exit(0)
    for _ in range(200):
        pid, status = os.waitpid(forked, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)
        pytest.fail("the forked process does not end")
    assert status == 0
    engine.forward(**tensors)


def test_errors_have_their_types(group):
    plan = nsa.Plan(TOKENS)
    with pytest.raises(ValueError, match="dtype"):
        nsa.Engine(CONFIG, plan, group, dtype="int8")
    with pytest.raises(ValueError, match="num_ranks"):
        nsa.Engine(CONFIG, nsa.Plan(TOKENS, 2), group, dtype="f32")
    forward_only = nsa.Engine(CONFIG, plan, group, dtype="f32", backward=False)
    with pytest.raises(nsa.FailedPreconditionError):
        forward_only.save()
    with pytest.raises(MemoryError):
        nsa.KVCache(CONFIG, group, dtype="f32", num_pages=1 << 30)
    lonely = nsa.Group.local()
    lonely.abort("enough")
    with pytest.raises(ConnectionError, match="enough"):
        lonely.health()


def test_engines_are_shared_and_let_go():
    group = nsa.Group.local(max_engines=2)
    plans = [nsa.Plan(tokens) for tokens in (64, 65, 66)]
    first, second = (group.engine(CONFIG, plan, dtype="f32") for plan in plans[:2])
    assert group.engine(CONFIG, nsa.Plan(64), dtype=np.float32) is first
    group.engine(CONFIG, plans[2], dtype="f32")
    assert group.engine(CONFIG, plans[0], dtype="f32") is first
    assert group.engine(CONFIG, plans[1], dtype="f32") is not second


def test_stats(engine, tensors):
    engine.forward(**tensors)
    assert engine.stats()["num_tokens"] == str(TOKENS)
    assert len(engine.gather_stats()["ranks"]) == 1


@pytest.mark.parametrize("separate_kv", [False, True])
def test_decode_equals_forward(group, engine, tensors, separate_kv):
    if separate_kv:
        for name in "kv":
            tensors[name] = [tensors[name] * scale for scale in (1, 0.5, -1)]
    o = engine.forward(**tensors)
    cache = nsa.KVCache(CONFIG, group, dtype="f32", num_pages=32, separate_kv=separate_kv)
    first, second = cache.open(), cache.open()

    def each(function, *parts):
        """`function` of the parts' q, k, ..., or of those of each branch."""
        return {
            name: [function(of) for of in zip(*several)]
            if isinstance(several[0], list)
            else function(several)
            for name, several in ((name, [part[name] for part in parts]) for name in tensors)
        }

    def rows(begin, end):
        return each(lambda of: of[0][begin:end], tensors)

    head = rows(0, 290)
    cache.append(first, head["k"], head["v"])
    cache.append_forward(0, second, engine, **tensors)
    cache.truncate(second, 298)
    forked = cache.fork(first)
    assert (cache.num_tokens(first), cache.num_tokens(second)) == (290, 298)

    both = each(np.concatenate, rows(290, 293), rows(298, 300))
    steps = cache.step([(first, 3), (second, 2)], **both)
    np.testing.assert_allclose(steps, np.concatenate([o[290:293], o[298:]]), atol=1e-4)
    cache.plan_step([(forked, 1)])
    np.testing.assert_allclose(cache.run_step(**rows(290, 291)), o[290:291], atol=1e-4)
    assert cache.stats()["sequences"] == 3
    if not separate_kv:
        three = {**rows(290, 291), "k": [np.ones((1, 2, 64), np.float32) for _ in range(3)]}
        with pytest.raises(ValueError, match="separate_kv"):
            cache.append(first, three["k"], three["v"])
        with pytest.raises(ValueError, match="separate_kv"):
            cache.step([(first, 1)], **three)
    for sequence in (first, second, forked):
        cache.close(sequence)
    assert cache.stats()["pages_used"] == 0
    with pytest.raises(nsa.NsaError, match=str(first)):
        cache.num_tokens(first)
