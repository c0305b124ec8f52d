"""Attention as torch modules."""

import functools
import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import nn

from nsa._library import PARAMS
from nsa.config import Config
from nsa.engine import Engine, flatten
from nsa.group import Group
from nsa.ops import attention_of_number
from nsa.plan import Plan, plan_of_number

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a torch without torch.distributed
    DTensor = ()


def _assign(parameter, value):
    """parameter = value, broadcast. Of a DTensor, as FSDP2 makes parameters, the value of the mesh's
    first rank."""
    value = value.to(parameter.device).expand(parameter.shape)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


class Compressor(nn.Module):
    """The parameters of Config.compressor, for k or for v. H' is 1 or Hkv, D is Dk or Dv.

    weighted: weight [H',l]; linear: w [H',D,l*D]; mlp: w1 [H',F,l*D], b1 [H',F], w2 [H',D,F],
    b2 [H',D]; and for each of these pe [H',l,D].
    """

    def __init__(self, config: Config, head_dim: int, *, per_head, hidden, device, dtype):
        super().__init__()
        heads = config.num_kv_heads if per_head else 1
        block = config.compress_block_tokens
        shapes = {
            "mean": {},
            "weighted": {"weight": (block,)},
            "linear": {"w": (head_dim, block * head_dim)},
            "mlp": {
                "w1": (hidden, block * head_dim),
                "b1": (hidden,),
                "w2": (head_dim, hidden),
                "b2": (head_dim,),
            },
        }[config.compressor]
        if shapes:
            shapes["pe"] = (block, head_dim)
        for name, shape in shapes.items():
            parameter = torch.empty(heads, *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(parameter))
        self.compressor = config.compressor
        self.block_tokens, self.head_dim, self.hidden = block, head_dim, hidden
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The summary starts as the mean of the block's tokens (of an mlp with F < 2 D, as the
        mean's part in F / 2 random directions)."""
        for parameter in self.parameters():
            parameter.zero_()
        mean = torch.eye(self.head_dim).repeat(1, self.block_tokens) / self.block_tokens
        if self.compressor == "weighted":
            self.weight.fill_(1 / self.block_tokens)
        elif self.compressor == "linear":
            _assign(self.w, mean)
        elif self.compressor == "mlp":
            # gelu(x) - gelu(-x) = x.
            pairs = min(self.head_dim, self.hidden // 2)
            directions = torch.eye(self.head_dim)
            if pairs < self.head_dim:
                nn.init.orthogonal_(directions)
            directions = directions[:pairs]
            w1 = torch.empty(tuple(self.w1.shape)).normal_(std=self.w1.shape[-1] ** -0.5)
            w1[:, : 2 * pairs] = torch.cat([directions @ mean, -directions @ mean])
            w2 = torch.zeros(tuple(self.w2.shape))
            w2[..., : 2 * pairs] = torch.cat([directions.T, -directions.T], 1)
            _assign(self.w1, w1)
            _assign(self.w2, w2)

    def in_order(self) -> list[torch.Tensor | None]:
        """As flatten() orders them."""
        return [getattr(self, name, None) for name in PARAMS]


class EngineSource:
    """Where modules get engines from; see engine_source()."""

    def __init__(self, config, group, sharding, options):
        self.config, self.group, self.sharding, self.options = config, group, sharding, options
        self.number = next(_numbers)
        self.traced = set()  # engines that compiled code knows by number only

    def __reduce__(self):
        return engine_source, (self.config, self.group, self.sharding, self.options)

    def of_group(self, group: Group | None) -> "EngineSource":
        """The same of another group."""
        return engine_source(self.config, group, self.sharding, self.options)

    def engine(self, dtype, device, batch: int, tokens: int, plan=None) -> Engine:
        """Of this rank's `batch` sequences of `tokens` tokens; makes it, which is collective, when
        there is none."""
        group = self.group or _local_group(str(device))
        plan = plan or _plan_of_batch(batch, tokens, group.size, self.sharding)
        if plan.tokens_of_rank(group.rank) != batch * tokens:
            raise ValueError(
                f"q: has {batch * tokens} tokens, must have {plan.tokens_of_rank(group.rank)}, as "
                f"the plan deals rank {group.rank}"
            )
        return group.engine(self.config, plan, dtype=dtype, **self.options)


@functools.lru_cache(maxsize=64)
def _plan_of_batch(batch, tokens, num_ranks, sharding) -> Plan:
    """Of `batch` documents of num_ranks * tokens tokens."""
    if batch > 1 and num_ranks > 1 and sharding != "zigzag_per_document":
        raise ValueError(
            f"batch of {batch} sequences: sharding = {sharding!r} does not deal each of them to "
            "all ranks; give a plan, or use 'zigzag_per_document'"
        )
    length = num_ranks * tokens
    ends = [length * i for i in range(batch + 1)]
    return Plan(num_ranks=num_ranks, sharding=sharding, cu_seqlens=ends)


_numbers = itertools.count()
_sources = weakref.WeakValueDictionary()  # by what they are made of
_sources_by_number = weakref.WeakValueDictionary()


def engine_source(config: Config, group: Group | None, sharding: str, options: dict):
    """The EngineSource of these: modules alike share it, so that torch.compile, to which it is a
    number, need not compile each layer of a model anew."""
    key = (config, group, sharding, *sorted(options.items()))
    source = _sources.get(key)
    if source is None:
        source = _sources[key] = EngineSource(config, group, sharding, dict(options))
        _sources_by_number[source.number] = source
    return source


def source_of_number(number: int) -> EngineSource:
    return _sources_by_number[number]


def batch_and_tokens(q):
    return (1 if q.dim() == 3 else q.shape[0]), q.shape[-3]


# While torch.compile traces: of plain batches a constant, of plans what the graph finds as it runs.
@torch.compiler.assume_constant_result
def _constant_engine(numbers, dtype, device) -> int:
    source, batch, tokens = map(int, numbers.split())
    source = source_of_number(source)
    engine = source.engine(dtype, device, batch, tokens)
    source.traced.add(engine)
    return engine.number


_ops = torch.library.Library("nsa", "FRAGMENT")
_ops.define("engine_of_plan(Tensor q, SymInt plan, *, int source) -> SymInt")


def _engine_of_plan(q, plan, *, source):
    plan = plan_of_number(plan)
    return source_of_number(source).engine(q.dtype, q.device, *batch_and_tokens(q), plan).number


_ops.impl("engine_of_plan", _engine_of_plan, "CompositeExplicitAutograd")


@torch.library.register_fake("nsa::engine_of_plan", lib=_ops)
def _fake_engine_of_plan(q, plan, *, source):
    return torch.library.get_ctx().new_dynamic_size()


@functools.cache
def _local_group(device) -> Group:
    return Group.local(device)


class CoreAttention(nn.Module):
    """Native Sparse Attention that is given q, k and v: the compressors' parameters and, if wanted,
    gates made from q. For stacks that have projections of their own.

    Parameters: compress_k.* and compress_v.* as in Compressor; gate_weight [Hq,3,Dk] and gate_bias
    [Hq,3] with gate_from_query.
    """

    def __init__(
        self,
        config: Config,
        group: Group | None = None,
        *,
        gate_from_query: bool = False,
        compressor_per_head: bool = True,
        compressor_hidden: int | None = None,
        sum_over_ranks: bool = False,
        sharding: str = "zigzag_per_document",
        engine_options: dict | None = None,
        device=None,
        dtype=None,
    ):
        """
        Args:
            group: the context-parallel ranks; None: this rank alone, on the device of its inputs.
            gate_from_query: gate = sigmoid(q . gate_weight + gate_bias), for stacks that hand on
                only q, k and v. Else forward() is given the gates.
            compressor_per_head: parameters for each key/value head, else shared by all.
            compressor_hidden: F of an mlp; None: 2 D.
            sum_over_ranks: see nsa.attention.
            sharding: of the plan that forward() makes when it is given none.
            engine_options: of Engine, beyond config, plan, group and dtype. Layers of the same
                config, group and options share engines.
            device, dtype: of the parameters.
        """
        super().__init__()
        self.config = config
        self.sum_over_ranks = sum_over_ranks
        dims = config.head_dim_qk, config.head_dim_v
        hidden = [compressor_hidden or 2 * dim for dim in dims]
        self.compress_k, self.compress_v = (
            Compressor(
                config, dim, per_head=compressor_per_head, hidden=width, device=device, dtype=dtype
            )
            for dim, width in zip(dims, hidden)
        )
        engine_options = dict(engine_options or {})
        if config.compressor == "mlp":
            engine_options.setdefault("max_hidden_width", max(hidden))
        self.source = engine_source(config, group, sharding, engine_options)
        if gate_from_query:
            shape = config.num_q_heads, 3
            self.gate_weight = nn.Parameter(
                torch.empty(*shape, config.head_dim_qk, device=device, dtype=dtype)
            )
            self.gate_bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.gate_weight = self.gate_bias = None
        self.reset_parameters()

    @property
    def group(self) -> Group | None:
        return self.source.group

    @group.setter
    def group(self, group):
        self.source = self.source.of_group(group)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Summaries start as the mean of their tokens, gates at 1/2."""
        self.compress_k.reset_parameters()
        self.compress_v.reset_parameters()
        if self.gate_weight is not None:
            self.gate_weight.zero_()
            self.gate_bias.zero_()

    def engine_number(self, q: torch.Tensor, plan: Plan | None = None) -> int:
        """Of the engine that forward() of this q and plan uses, for what is traced; makes it, which
        is collective, when there is none."""
        if not torch.compiler.is_compiling():
            return self.source.engine(q.dtype, q.device, *batch_and_tokens(q), plan).number
        if plan is not None:
            return torch.ops.nsa.engine_of_plan(q, plan.number, source=self.source.number)
        # int() and a text are what torch.compile makes constants of, where these have changed.
        batch, tokens = batch_and_tokens(q)
        numbers = f"{int(self.source.number)} {int(batch)} {int(tokens)}"
        return _constant_engine(numbers, q.dtype, q.device)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | Sequence[torch.Tensor],
        v: torch.Tensor | Sequence[torch.Tensor],
        gate: torch.Tensor | None = None,
        *,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """
        Args:
            q: [T,Hq,Dk], or [B,T,Hq,Dk]: B sequences of P*T tokens, packed.
            k: [T,Hkv,Dk] or [B,T,Hkv,Dk], or three of them, for the branches (cmp, slc, win).
            v: likewise, of Dv.
            gate: [T,Hq,3] or [B,T,Hq,3], after its sigmoid; None with gate_from_query.
            plan: how the sequence is dealt to the ranks, B*T tokens to this one; None: B documents
                of P*T tokens, `sharding`. Plans that change make engines anew, which share their
                memory: of a group, the last Group.max_engines are kept. torch.compile compiles
                nothing anew for them.

        Returns:
            o [T,Hq,Dv] or [B,T,Hq,Dv].
        """
        number = self.engine_number(q, plan)
        if gate is None:
            if self.gate_weight is None:
                raise ValueError("gate: must be given without gate_from_query")
            gate = torch.einsum("...hd,hgd->...hg", q, self.gate_weight.to(q.dtype))
            gate = torch.sigmoid(gate + self.gate_bias)
        tensors = [
            t if t is None or t.dim() == 3 else t.flatten(0, 1) for t in flatten(q, k, v, gate)
        ]
        if self.config.compressor != "mean":
            for compressor in (self.compress_k, self.compress_v):
                tensors.extend(compressor.in_order())
        o = attention_of_number(number, tensors, self.sum_over_ranks)
        return o.unflatten(0, q.shape[:-2]) if q.dim() == 4 else o


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [...,T,heads,D] in pairs (i, i + D/2) by the angles of cos and sin [...,T,1,D/2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class NSAAttention(nn.Module):
    """A whole attention layer: projections, RoPE, gates, CoreAttention (as `core`), output
    projection.

    Parameters: q_proj [Hq*Dk,H]; k_proj [b*Hkv*Dk,H] and v_proj [b*Hkv*Dv,H] with b = 3 (cmp, slc,
    win) if separate_kv, else 1; gate_proj [Hq*3,H] with bias; o_proj [H,Hq*Dv]; core.*.
    """

    def __init__(
        self,
        hidden_size: int,
        config: Config,
        group: Group | None = None,
        *,
        separate_kv: bool = True,
        bias: bool = False,
        rope_theta: float | None = None,
        device=None,
        dtype=None,
        **core_options,
    ):
        """
        Args:
            hidden_size: H.
            group: the context-parallel ranks; None: this rank alone.
            separate_kv: each branch has keys and values of its own, as NSA's authors have it; else
                the branches share them.
            bias: of the projections of q, k, v and o.
            rope_theta: rotary embedding (of the halves of each head, as Llama's) of q and k by
                their place in the document, whatever the sharding; None: none.
            core_options: of CoreAttention.
        """
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config, self.rope_theta = config, rope_theta
        self.branches = 3 if separate_kv else 1
        q_heads, kv_heads = config.num_q_heads, config.num_kv_heads * self.branches
        dim_qk, dim_v = config.head_dim_qk, config.head_dim_v
        self.q_proj = nn.Linear(hidden_size, q_heads * dim_qk, bias, **factory)
        self.k_proj = nn.Linear(hidden_size, kv_heads * dim_qk, bias, **factory)
        self.v_proj = nn.Linear(hidden_size, kv_heads * dim_v, bias, **factory)
        self.gate_proj = nn.Linear(hidden_size, q_heads * 3, **factory)
        self.o_proj = nn.Linear(q_heads * dim_v, hidden_size, bias, **factory)
        self.core = CoreAttention(config, group, **factory, **core_options)
        nn.init.zeros_(self.gate_proj.weight)  # gates start at 1/2
        nn.init.zeros_(self.gate_proj.bias)

    def forward(self, x: torch.Tensor, *, plan: Plan | None = None) -> torch.Tensor:
        """x [T,H], or [B,T,H]: B sequences of P*T tokens, of which this rank holds T each. Returns
        the same shape. plan: as for CoreAttention."""
        config = self.config
        q = self.q_proj(x).unflatten(-1, (config.num_q_heads, -1))
        kv_heads = (self.branches, config.num_kv_heads, -1)
        k = self.k_proj(x).unflatten(-1, kv_heads)
        v = self.v_proj(x).unflatten(-1, kv_heads)
        gate = torch.sigmoid(self.gate_proj(x)).unflatten(-1, (config.num_q_heads, 3))
        if self.rope_theta is not None:
            engine = self.core.engine_number(q, plan)
            positions = torch.ops.nsa.positions(engine, x.shape[:-1].numel(), x.device)
            half = config.head_dim_qk // 2
            powers = torch.arange(half, device=x.device, dtype=torch.float32) / half
            angles = positions.view(q.shape[:-2]).unsqueeze(-1) * self.rope_theta**-powers
            cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
            q = _rotate(q, cos, sin)
            k = _rotate(k, cos.unsqueeze(-2), sin.unsqueeze(-2))
        o = self.core(q, k.unbind(-3), v.unbind(-3), gate, plan=plan)
        return self.o_proj(o.flatten(-2))
