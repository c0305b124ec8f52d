"""NSA in Hugging Face models: tiny ones, with random weights."""

import copy
import dataclasses
import itertools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch.distributed as dist  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import nsa  # noqa: E402
import ranks  # noqa: E402
from adapter_testing import (  # noqa: E402
    DENSE,
    DENSE_BRANCHES,
    assert_close,
    assert_same,
    config_of,
    gradients_of,
    is_ours,
    make_config,
    only,
    perturb,
    run_readme,
)
from torch_testing import DEVICES, dtype_of, need, relative_error, start  # noqa: E402

from nsa.adapters import huggingface as adapter  # noqa: E402
from nsa.adapters._shared import plan_of_ends  # noqa: E402

CONFIG = make_config(compressor="mlp")
SIZES = dict(
    vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=64,
    num_attention_heads=4, num_key_value_heads=2, num_experts=2, num_local_experts=2,
    num_experts_per_tok=1, moe_intermediate_size=64, pad_token_id=0,
)  # fmt: skip
MODELS = ("llama", "qwen3")
OTHER_MODELS = ("cohere", "gemma", "glm4", "mixtral", "olmo2", "phi3", "qwen3_moe")


def positions(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


PACKED = positions(100, 37, 163)


def make_model(kind="llama", device="cpu", **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | options))
    return AutoModelForCausalLM.from_config(config, dtype=dtype_of(device)).to(device)


def make_ids(batch, tokens=300):
    return torch.randint(0, 50, (batch, tokens), generator=torch.Generator().manual_seed(1))


def right_padding(batch, tokens=300):
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, 211:] = 0
    return mask


INPUTS = {
    "batch": {"input_ids": make_ids(2)},
    "ones": {"input_ids": make_ids(2), "attention_mask": torch.ones(2, 300)},
    "padded": {"input_ids": make_ids(2), "attention_mask": right_padding(2)},
    "packed": {"input_ids": make_ids(1), "position_ids": PACKED},
}


@pytest.mark.parametrize(
    "device, kind, branch, inputs",
    [*itertools.product(DEVICES, MODELS, DENSE_BRANCHES, INPUTS)]
    + [("cpu", kind, "window", "batch") for kind in OTHER_MODELS],
)
def test_dense_branch_is_sdpa(device, kind, branch, inputs):
    model = make_model(kind, device, attn_implementation="sdpa")
    inputs = {name: tensor.to(device) for name, tensor in INPUTS[inputs].items()}
    ours = copy.deepcopy(model)
    adapter.attach(ours, DENSE)
    only(DENSE_BRANCHES[branch], ours)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    labels = inputs["input_ids"].masked_fill(~real, -100)
    expected = model(**inputs, labels=labels, use_cache=False)
    actual = ours(**inputs, labels=labels, use_cache=False)
    assert_close(actual.logits[real], expected.logits[real])
    expected.loss.backward()
    actual.loss.backward()
    assert_same(gradients_of(ours), gradients_of(model))


@pytest.mark.parametrize("device", DEVICES)
def test_documents_are_independent(device):
    model = make_model(device=device)
    adapter.attach(model, CONFIG)
    perturb(model)
    ids, position_ids = make_ids(1).to(device), PACKED.to(device)
    packed = model(ids, position_ids=position_ids, use_cache=False).logits
    ends = torch.tensor([0, 100, 137, 300], dtype=torch.int32, device=device)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": 163}
    by_ends = model(ids, position_ids=position_ids, use_cache=False, **lengths).logits
    assert torch.equal(packed, by_ends)
    for begin, end in zip(ends, ends[1:]):
        alone = model(ids[:, begin:end], use_cache=False).logits
        assert_close(packed[:, begin:end], alone)
    assert relative_error(packed, model(ids, use_cache=False).logits) > 0.1
    position_ids.add_(0)  # counts as a change: read again
    assert torch.equal(packed, model(ids, position_ids=position_ids, use_cache=False).logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "kind, checkpointing", [("llama", False), ("llama", True), ("qwen3", True)]
)
def test_training(device, kind, checkpointing):
    model, ids = make_model(kind, device), make_ids(2).to(device)
    adapter.attach(model, CONFIG)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if is_ours(name))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_cache, fullgraph", [(True, True), (False, True), (False, False)])
def test_compile(device, use_cache, fullgraph):
    """Of the whole model; other documents compile nothing anew."""
    if fullgraph and not use_cache and torch.__version__ < (2, 12):
        pytest.skip("torch 2.11 does not trace the check of a mask, which is made without a cache")
    model, ids = make_model(device=device), make_ids(1).to(device)
    adapter.attach(model, CONFIG)
    perturb(model)
    backend = "aot_eager" if device == "cpu" else "inductor"
    run = torch.compile(model, backend=backend, fullgraph=fullgraph)
    inputs = {"labels": ids, "use_cache": use_cache}
    run(ids, position_ids=PACKED.to(device), **inputs).loss.backward()
    model.zero_grad()
    inputs["position_ids"] = positions(163, 137).to(device)
    with torch.compiler.set_stance("fail_on_recompile" if fullgraph else "default"):
        actual = run(ids, **inputs)
    actual.loss.backward()
    gradients = gradients_of(model)
    model.zero_grad()
    expected = model(ids, **inputs)
    expected.loss.backward()
    assert_close(actual.logits, expected.logits)
    assert_same(gradients, gradients_of(model))


def test_generate():
    """Without a KV cache; with one of any kind the error says so."""
    model = make_model(attn_implementation="sdpa")
    ours = copy.deepcopy(model)
    adapter.attach(ours, DENSE)
    only(2, ours)
    prompt = make_ids(2, 70)
    inputs = {"attention_mask": torch.ones(2, 70), "max_new_tokens": 5, "do_sample": False}
    for beams in (1, 2):
        options = {**inputs, "num_beams": beams, "use_cache": False}
        assert torch.equal(ours.generate(prompt, **options), model.generate(prompt, **options))
        with pytest.raises(ValueError, match="1 queries, 71 keys.*use_cache=False"):
            ours.generate(prompt, **inputs, num_beams=beams)
    with pytest.raises(ValueError, match="70 queries, 74 keys.*use_cache=False"):
        ours.generate(prompt, **inputs, cache_implementation="static")
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, :5] = 0
    with pytest.raises(ValueError, match="on the right only"):
        ours.generate(prompt, **inputs, use_cache=False)


def test_state_dict(tmp_path):
    from safetensors.torch import load_file

    model = make_model()
    adapter.attach(model, CONFIG)
    perturb(model)
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    adapter.attach(other, CONFIG)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(
        other(make_ids(1), use_cache=False).logits, model(make_ids(1), use_cache=False).logits
    )


def test_what_cannot_be_honoured():
    model = make_model()
    with pytest.raises(ValueError, match="attach"):
        fresh = make_model()
        fresh.set_attn_implementation("nsa")
        fresh(make_ids(1))
    for field, value in (("num_q_heads", 8), ("num_kv_heads", 4), ("head_dim_qk", 128)):
        with pytest.raises(ValueError, match=f"nsa.Config.{field} = {value}"):
            adapter.attach(model, nsa.Config(**{**vars(CONFIG), field: value}))
    adapter.attach(model, CONFIG)
    left = right_padding(2).flip(-1)
    arbitrary = torch.ones(1, 1, 300, 300).tril()
    for text, inputs in {
        "on the right": {"attention_mask": left},
        "attention_mask": {"attention_mask": arbitrary},
        "output_attentions": {"output_attentions": True},
        "must be causal": {"is_causal": False},
        "softcap": {"softcap": 30.0},
        "s_aux": {"s_aux": torch.zeros(4)},
        "sliding_window": {"sliding_window": 64},
        "new_thing": {"new_thing": 1},
        "must be equal": {
            "cu_seq_lens_q": torch.tensor([0, 600]),
            "cu_seq_lens_k": torch.tensor([0, 300, 600]),
        },
    }.items():
        with pytest.raises(ValueError, match=text):
            model(make_ids(2), use_cache=False, **inputs)
    module, q, k = model.model.layers[0].self_attn, torch.ones(1, 4, 9, 64), torch.ones(1, 2, 9, 64)
    with pytest.raises(ValueError, match="is_causal = False"):
        adapter.nsa_attention(module, q, k, k, None, is_causal=False)
    with pytest.raises(ValueError, match="softmax scale = 0.125"):
        scaled = make_model()
        adapter.attach(scaled, make_config(softmax_scale=0.1))
        scaled(make_ids(1))
    with pytest.raises(ValueError, match="dropout"):
        dropping = make_model(attention_dropout=0.1)
        adapter.attach(dropping, CONFIG)
        dropping.train()(make_ids(1))
    for kind, text in {
        "mistral": "mask: ",  # a sliding window
        "gemma2": "mask: ",
        "deepseek_v3": "head_dim_qk = 64: the model has None",
        "granite": "softmax scale = 1.0",
    }.items():
        with pytest.raises(ValueError, match=text):
            other = make_model(kind)
            adapter.attach(other, CONFIG)
            other(make_ids(1), use_cache=False)
    with pytest.raises(ValueError, match="GPTJAttention: has no AttentionInterface"):
        adapter.attach(make_model("gptj", hidden_size=256), CONFIG)


def test_documents_that_attention_is_not_told_of():
    """Persimmon's models keep position_ids to themselves."""
    sizes = {"hidden_size": 256, "num_key_value_heads": 4}
    model = make_model("persimmon", attn_implementation="sdpa", **sizes)
    ours = copy.deepcopy(model)
    adapter.attach(ours, dataclasses.replace(DENSE, num_kv_heads=4))
    only(2, ours)
    ids = make_ids(1)
    assert_close(ours(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    with pytest.raises(ValueError, match="position_ids: .* PersimmonAttention"):
        ours(ids, position_ids=PACKED, use_cache=False)


def test_documents_in_inference_mode():
    """Whose tensors do not count their changes."""
    with torch.inference_mode():
        ends = torch.tensor([0, 100, 300])
        assert plan_of_ends(ends) == nsa.Plan(
            cu_seqlens=[0, 100, 300], sharding="zigzag_per_document"
        )
        ends[1] = 50
        assert plan_of_ends(ends) == nsa.Plan(
            cu_seqlens=[0, 50, 300], sharding="zigzag_per_document"
        )


class OnGpu(torch.Tensor):
    is_cuda = True


def test_documents_in_a_cuda_graph(monkeypatch):
    """Even those that were read before: a graph would keep them, whatever it is launched with."""
    ends = torch.tensor([0, 300]).as_subclass(OnGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert plan_of_ends(ends) == plan_of_ends(torch.tensor([0, 300]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="documents: cannot be read"):
        plan_of_ends(ends)


def masks_that_are_not_causal_documents():
    from transformers import masking_utils as m

    yield m.sliding_window_causal_mask_function(64)
    yield m.bidirectional_mask_function
    yield m.or_masks(m.causal_mask_function, lambda b, h, q, k: q < k)
    yield m.and_masks(m.causal_mask_function, lambda b, h, q, k: q < 2 * k)
    yield m.and_masks(m.causal_mask_function, m.sliding_window_overlay(3))


def test_masks():
    from transformers import masking_utils as m

    sizes = {"q_length": 300, "kv_length": 300}
    documents = m.packed_sequence_mask_function(PACKED)
    adapter.nsa_mask(mask_function=m.and_masks(m.causal_mask_function, documents), **sizes)
    for function in masks_that_are_not_causal_documents():
        with pytest.raises(ValueError, match="must be causal"):
            adapter.nsa_mask(mask_function=function, **sizes)


def context_parallel(rank, size, device):
    device = start(device, rank, size)
    ids = make_ids(1, 320).to(device)
    target = ids.roll(-1)
    alone, sharded = make_model(device=device), make_model(device=device)
    config = config_of(device, CONFIG)
    adapter.attach(alone, config)
    adapter.attach(sharded, config, dist.group.WORLD)
    for model in (alone, sharded):
        perturb(model)
    plan = nsa.Plan(320, size, sharding="zigzag")
    for lengths in ((320,), (100, 37, 183)):
        position_ids = positions(*lengths).to(device)
        expected = alone(
            ids, position_ids=position_ids, shift_labels=target, labels=target, use_cache=False
        )
        expected.loss.backward()
        mine = {
            name: plan.shard(tensor, rank, dim=1)
            for name, tensor in dict(
                input_ids=ids, position_ids=position_ids, shift_labels=target, labels=target
            ).items()
        }
        actual = sharded(**mine, use_cache=False)
        logits = plan.gather(actual.logits, dim=1)
        assert_close(logits, expected.logits)
        actual.loss.backward()
        gradients = gradients_of(sharded)
        for gradient in gradients.values():
            dist.all_reduce(gradient.div_(size))
        assert_same(gradients, gradients_of(alone))
        alone.zero_grad()
        sharded.zero_grad()
    try:
        sharded(mine["input_ids"], use_cache=False)  # its position_ids count from 0 on each rank
    except ValueError as error:
        assert "put together" in str(error)
        return True


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_ranks_against_one(device):
    need(device, 2)
    assert ranks.run(context_parallel, 2, device) == [True, True]


def test_readme():
    names = run_readme("Hugging Face")
    assert names["loss"].isfinite()
