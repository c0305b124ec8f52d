"""A byte-level transformer whose attention is sparse or dense, each sequence sharded over ranks."""

import dataclasses
import functools

import nsa
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

_NO_BYTE = 256  # before the first


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    attention: str  # "nsa" or "dense"
    num_layers: int = 4
    hidden: int = 256  # H
    mlp: int = 352
    num_q_heads: int = 8  # Hq
    num_kv_heads: int = 1  # Hkv
    head_dim: int = 128  # D
    compress_block_tokens: int = 32
    select_block_tokens: int = 64
    num_selected_blocks: int = 16
    window_tokens: int = 512
    separate_kv: bool = False
    compress_k_weight: float = 0.25  # of each token of a block, at first
    compress_v_weight: float = 0.125
    rope_theta: float = 10000.0
    ngram: int = 12  # bytes that a token is made of

    def sparse(self) -> nsa.Config:
        return nsa.Config(
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim_qk=self.head_dim,
            head_dim_v=self.head_dim,
            compress_block_tokens=self.compress_block_tokens,
            select_block_tokens=self.select_block_tokens,
            num_selected_blocks=self.num_selected_blocks,
            window_tokens=self.window_tokens,
            compressor="weighted",
        )


@functools.lru_cache
def _positions(plan, rank, device, in_document):
    """Of this rank's tokens, in their document or in all of them. [T] int64."""
    positions = plan.positions_in_document(rank) if in_document else plan.positions(rank)
    return torch.tensor(positions, device=device)


class _AllGather(torch.autograd.Function):
    """[n,...] of each rank to [P*n,...]; its backward adds up what the ranks have for each."""

    @staticmethod
    def forward(ctx, x):
        gathered = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        mine = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(mine, gradient.contiguous())
        return mine


def _rotate(x, angles):
    """RoPE of x [B,T,heads,D] by angles [B,T,1,D/2]."""
    a, b = x.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class DenseAttention(nn.Module):
    """As nsa.NSAAttention, but causal attention over all tokens: K and V are all-gathered, and each
    of this rank's two zig-zag chunks attends to what stands before it and itself."""

    def __init__(self, config: ModelConfig, rope_theta: float | None):
        super().__init__()
        self.config, self.rope_theta = config, rope_theta
        kv_dim, q_dim = (
            heads * config.head_dim for heads in (config.num_kv_heads, config.num_q_heads)
        )
        self.q_proj = nn.Linear(config.hidden, q_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.hidden, bias=False)

    def forward(self, x, *, plan):
        """x [B,T,H], B documents of P*T tokens, of `plan`."""
        head_dim = self.config.head_dim
        q, k, v = (
            projection(x).unflatten(-1, (-1, head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope_theta is not None:
            half = head_dim // 2
            powers = torch.arange(half, device=x.device) / half
            positions = _positions(plan, dist.get_rank(), x.device, True)
            angles = positions.view(*x.shape[:2], 1, 1) * self.rope_theta**-powers
            q, k = _rotate(q, angles), _rotate(k, angles)
        # [2*P,B,T/2,2*Hkv,D] in rank order: rank r holds chunks r and 2P-1-r.
        gathered = _AllGather.apply(torch.stack(torch.cat([k, v], 2).chunk(2, 1)))
        chunks = torch.cat([gathered[::2], gathered[1::2].flip(0)])
        chunks = chunks.transpose(0, 1).flatten(1, 2)  # [B,S,2*Hkv,D]
        k, v = chunks.transpose(1, 2).chunk(2, 1)  # [B,Hkv,S,D]
        size, rank = dist.get_world_size(), dist.get_rank()
        outputs = []
        for chunk, part in zip((rank, 2 * size - 1 - rank), q.transpose(1, 2).chunk(2, 2)):
            seen = (chunk + 1) * part.shape[2]
            outputs.append(
                F.scaled_dot_product_attention(
                    part,
                    k[:, :, :seen],
                    v[:, :, :seen],
                    attn_mask=causal_lower_right(part.shape[2], seen),
                    enable_gqa=True,
                )
            )
        return self.o_proj(torch.cat(outputs, 2).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, group: nsa.Group, rope_theta: float | None, mlp: int):
        super().__init__()
        hidden = config.hidden
        if config.attention == "nsa":
            self.attention = nsa.NSAAttention(
                hidden,
                config.sparse(),
                group,
                separate_kv=config.separate_kv,
                rope_theta=rope_theta,
                engine_options={"agree_on_change_only": True},
            )
            # Not the mean, 1/32: among many blocks its softmax is flat, and teaches little.
            core = self.attention.core
            nn.init.constant_(core.compress_k.weight, config.compress_k_weight)
            nn.init.constant_(core.compress_v.weight, config.compress_v_weight)
            self.attention.gate_proj.register_forward_hook(self._close_gates)
        else:
            self.attention = DenseAttention(config, rope_theta)
        self.has_positions = rope_theta is not None
        self.summaries_only = False
        self.attention_norm = nn.RMSNorm(hidden)
        self.mlp_norm = nn.RMSNorm(hidden)
        self.up = nn.Linear(hidden, mlp, bias=False)
        self.down = nn.Linear(mlp, hidden, bias=False)
        nn.init.zeros_(self.down.weight)
        if rope_theta is None:
            self._look_for_what_came_before(config.head_dim)

    def _close_gates(self, _, __, logits):
        """Of gate_proj. Attention that has nothing but the summaries has to learn to find things by
        them, and it is by them that blocks are selected. While it can do without, because what
        it looks for lies in the window or is selected by chance, it learns that slowly."""
        if not self.summaries_only:
            return logits
        closed = logits.new_tensor([0.0, float("-inf"), float("-inf")])
        return (logits.unflatten(-1, (-1, 3)) + closed).flatten(-2)

    @torch.no_grad()
    def _look_for_what_came_before(self, head_dim):
        """A query starts out equal to the keys of tokens that follow the same bytes as it stands
        for: the second half of a token is the first half of the token before it."""
        q, k = self.attention.q_proj.weight, self.attention.k_proj.weight
        half = q.shape[1] // 2
        projection = torch.randn(head_dim, half) * half**-0.5
        q.mul_(0.5)
        k.mul_(0.5)
        q[:, :half] += projection.repeat(q.shape[0] // head_dim, 1)
        k[:, half:] += projection.repeat(k.shape[0] // head_dim, 1)

    def forward(self, x, *, plan):
        x = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return x + self.attention(self.attention_norm(x), plan=plan)


class Model(nn.Module):
    """Bytes to the logits of the next byte.

    A token is the sum of embeddings of the last `ngram` bytes, with a table for each distance; half
    of its channels are those of the token before ("token shift"). Both are made of the bytes alone,
    so that no rank needs a neighbour's. The first layer and every second one have no
    positions (NoPE), the others RoPE. The dense model's MLPs are wider by what NSA has more:
    parameters of the two are about as many.
    """

    def __init__(self, config: ModelConfig, group: nsa.Group):
        super().__init__()
        self.config, self.group = config, group
        mlp = config.mlp
        if config.attention == "dense":
            # In steps of 16, as tensor cores like them.
            mlp += 16 * round(_more_parameters(config, group) / (32 * config.hidden))
        self.embedding = nn.Parameter(torch.randn(config.ngram * (_NO_BYTE + 1), config.hidden // 2))
        self.layers = nn.ModuleList(
            Layer(config, group, config.rope_theta if i % 2 else None, mlp)
            for i in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, 256, bias=False)

    def shard(self, tensor, plan):
        """[B,S] of all tokens to [B,T] of this rank's."""
        positions = _positions(plan, self.group.rank, tensor.device, False)
        return tensor.flatten(0, 1)[positions].unflatten(0, (len(tensor), -1))

    def forward(self, tokens, *, plan, summaries_only=False):
        """tokens [B,S] uint8, the same on every rank. Returns logits [B,T,256] f32 of this rank's
        tokens of `plan`, B documents of S tokens. summaries_only: sparse layers without positions
        attend to nothing else."""
        ngram = self.config.ngram
        padded = F.pad(tokens.long(), (ngram, 0), value=_NO_BYTE)
        distances = torch.arange(ngram, device=tokens.device)
        # Token t's bytes are padded[t+ngram-j], and those of the token before at one less.
        grams = padded.unfold(1, ngram, 1).flip(-1) + distances * (_NO_BYTE + 1)
        grams = self.shard(torch.stack([grams[:, 1:], grams[:, :-1]], 2), plan)  # [B,T,2,ngram]
        x = F.embedding_bag(grams.flatten(0, 2), self.embedding, mode="sum") * ngram**-0.5
        x = x.view(*grams.shape[:2], -1)
        for layer in self.layers:
            layer.summaries_only = summaries_only and not layer.has_positions
            x = layer(x, plan=plan)
        return self.head(self.norm(x)).float()


def _more_parameters(config, group):
    """Of an NSA layer than of a dense one of the same config."""

    def count(attention):
        layer = Layer(dataclasses.replace(config, attention=attention), group, None, config.mlp)
        return sum(parameter.numel() for parameter in layer.parameters())

    return count("nsa") - count("dense")
