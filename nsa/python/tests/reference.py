"""The attention in plain torch, dense, with masks in place of blocks."""

import torch
from torch.nn import functional


def compress(x, params, config):
    """x [L,Hkv,D] of a document: summaries [N,Hkv,D]."""
    block = config.compress_block_tokens
    if len(x) < block:
        return x[:0]
    blocks = x.unfold(0, block, config.compress_stride_tokens).movedim(-1, 2)  # [N,Hkv,l,D]
    if config.compressor == "mean":
        return blocks.mean(2)
    params = {name: p.to(x.dtype).expand(x.shape[1], *p.shape[1:]) for name, p in params.items()}
    if "pe" in params:
        blocks = blocks + params["pe"]
    if config.compressor == "weighted":
        return torch.einsum("nhld,hl->nhd", blocks, params["weight"])
    flat = blocks.flatten(2)
    if config.compressor == "linear":
        return torch.einsum("nhx,hdx->nhd", flat, params["w"])
    hidden = torch.einsum("nhx,hfx->nhf", flat, params["w1"]) + params["b1"]
    hidden = functional.gelu(hidden)
    return torch.einsum("nhf,hdf->nhd", hidden, params["w2"]) + params["b2"]


def masked_attention(q, k, v, mask, scale):
    """q [L,Hq,Dk], k [C,Hkv,Dk], v [C,Hkv,Dv], mask [L,Hq,C]: rows without a key give 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("lhd,chd->lhc", q, k) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    seen = mask.any(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(~seen, 0), -1) * seen
    return torch.einsum("lhc,chd->lhd", p, v)


def attention(config, q, k, v, gate, block_indices, compress_k={}, compress_v={}, cu_seqlens=None):
    """As nsa.attention of one rank, but k and v are three each, with the blocks selected given:
    block_indices [T,Hkv,n] of Engine.forward."""
    scale = config.softmax_scale or config.head_dim_qk**-0.5
    group = config.num_q_heads // config.num_kv_heads
    ends = [0, len(q)] if cu_seqlens is None else cu_seqlens
    outputs = []
    for begin, end in zip(ends, ends[1:]):
        rows = slice(begin, end)
        t = torch.arange(end - begin, device=q.device)[:, None]
        s = t.T
        q_, gate_ = q[rows], gate[rows].to(q.dtype)
        (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win) = ([x[rows] for x in of] for of in (k, v))
        k_cmp, v_cmp = compress(k_cmp, compress_k, config), compress(v_cmp, compress_v, config)
        first = torch.arange(len(k_cmp), device=q.device) * config.compress_stride_tokens
        seen = first + config.compress_block_tokens - 1 <= t
        near = (s <= t) & (s > t - config.window_tokens)
        chosen = block_indices[rows].long()[..., None] == s // config.select_block_tokens
        chosen = chosen.any(2).repeat_interleave(group, 1) & (s <= t)[:, None]
        heads = (-1, config.num_q_heads, -1)
        outputs.append(
            gate_[..., :1] * masked_attention(q_, k_cmp, v_cmp, seen[:, None].expand(*heads), scale)
            + gate_[..., 1:2] * masked_attention(q_, k_slc, v_slc, chosen, scale)
            + gate_[..., 2:]
            * masked_attention(q_, k_win, v_win, near[:, None].expand(*heads), scale)
        )
    return torch.cat(outputs)
