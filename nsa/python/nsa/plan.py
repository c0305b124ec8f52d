"""How the tokens of a sequence are dealt to ranks."""

import ctypes
import itertools
import weakref
from collections.abc import Sequence

import numpy as np

from nsa import _library
from nsa._library import check, lib

_SHARDINGS = ("contiguous", "zigzag", "zigzag_per_document", "uneven")


# By Plan.number.
_plans = weakref.WeakValueDictionary()
_numbers = itertools.count()


def plan_of_number(number: int) -> "Plan":
    return _plans[number]


def _integers(name, values):
    """[...] int64, or None."""
    if values is None:
        return None
    array = np.asarray(values)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: is {array.dtype} {list(array.shape)}, must be integers in a row")
    return np.ascontiguousarray(array, np.int64)


class Plan:
    """Which rank holds which of the S tokens of one global sequence, which may be several packed
    documents. Host data that needs no group. Equal plans compare and hash as equal."""

    def __init__(
        self,
        num_tokens: int | None = None,
        num_ranks: int = 1,
        *,
        sharding: str = "contiguous",
        cu_seqlens: Sequence[int] | None = None,
        tokens_of_rank: Sequence[int] | None = None,
    ):
        """
        Args:
            num_tokens: S; None: the last of cu_seqlens.
            num_ranks: P.
            sharding: "contiguous"; "zigzag" (rank r holds parts r and 2P-1-r of 2P, as Megatron
                deals a sequence); "zigzag_per_document" (the same inside each document, as Megatron
                deals packed sequences); "uneven" (rank r holds the next tokens_of_rank[r]).
            cu_seqlens: 0, then each document's end, ascending, the last S; any sequence, array or
                tensor of integers. None: one document.
            tokens_of_rank: [P], for "uneven" only.
        """
        if sharding not in _SHARDINGS:
            raise ValueError(f"sharding = {sharding!r}: must be one of {_SHARDINGS}")
        ends = _integers("cu_seqlens", cu_seqlens)
        tokens = _integers("tokens_of_rank", tokens_of_rank)
        if tokens is not None and tokens.shape != (num_ranks,):
            raise ValueError(f"tokens_of_rank: has shape {tokens.shape}, must be [{num_ranks}]")
        options = _library.PlanOptions(
            num_tokens=num_tokens or 0,
            num_ranks=num_ranks,
            sharding=_SHARDINGS.index(sharding),
            cu_seqlens=None if ends is None else ends.ctypes.data,
            num_cu_seqlens=0 if ends is None else ends.size,
            tokens_of_rank=None if tokens is None else tokens.ctypes.data,
        )
        self.handle = _library.create("plan", ctypes.byref(options))
        size = [ctypes.c_int64(), ctypes.c_int32(), ctypes.c_int32()]
        check(lib.nsa_plan_size(self.handle, *map(ctypes.byref, size)))
        self.num_tokens, self.num_ranks, self.num_documents = (number.value for number in size)
        self.sharding = sharding
        self.number = next(_numbers)
        _plans[self.number] = self
        self._positions_of = {}  # by rank
        self._key = (
            self.num_tokens,
            num_ranks,
            sharding,
            None if ends is None else ends.tobytes(),
            None if tokens is None else tokens.tobytes(),
        )

    def tokens_of_rank(self, rank: int) -> int:
        """T of `rank`."""
        count = ctypes.c_int64()
        check(lib.nsa_plan_tokens_of_rank(self.handle, rank, ctypes.byref(count)))
        return count.value

    def _positions(self, rank):
        if rank in self._positions_of:
            return self._positions_of[rank]
        count = self.tokens_of_rank(rank)
        arrays = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int32)
        check(lib.nsa_plan_positions(self.handle, rank, *(array.ctypes.data for array in arrays)))
        for array in arrays:
            array.flags.writeable = False
        self._positions_of[rank] = arrays
        return arrays

    def positions(self, rank: int) -> np.ndarray:
        """Of each token of `rank`, in the order in which it holds them: its place in the global
        sequence. [T] int64."""
        return self._positions(rank)[0]

    def positions_in_document(self, rank: int) -> np.ndarray:
        """Likewise its place in its document, as RoPE counts. [T] int64."""
        return self._positions(rank)[1]

    def documents(self, rank: int) -> np.ndarray:
        """Likewise the number of its document, of those with tokens. [T] int32."""
        return self._positions(rank)[2]

    def shard(self, tensor, rank: int, dim: int = 0):
        """What `rank` holds of a numpy array or torch tensor that has all S tokens along `dim`: a
        copy with T in place of S, through which gradients flow back."""
        if tensor.shape[dim] != self.num_tokens:
            raise ValueError(f"tensor: has {tensor.shape[dim]} tokens, must be {self.num_tokens}")
        positions = self.positions(rank)
        if isinstance(tensor, np.ndarray):
            return tensor.take(positions, dim)
        import torch

        return tensor.index_select(dim, torch.tensor(positions, device=tensor.device))

    def unshard(self, shards: Sequence, dim: int = 0):
        """The whole sequence of all ranks' shards (numpy arrays or torch tensors), in rank order:
        the inverse of shard()."""
        for rank, shard in enumerate(shards):
            if shard.shape[dim] != self.tokens_of_rank(rank):
                raise ValueError(
                    f"shards[{rank}]: has {shard.shape[dim]} tokens, "
                    f"must be {self.tokens_of_rank(rank)}"
                )
        order = np.argsort(np.concatenate([self.positions(r) for r in range(self.num_ranks)]))
        if isinstance(shards[0], np.ndarray):
            return np.concatenate(shards, dim).take(order, dim)
        import torch

        whole = torch.cat(list(shards), dim)
        return whole.index_select(dim, torch.tensor(order, device=whole.device))

    def gather(self, shard, process_group=None, dim: int = 0):
        """Collective over a torch ProcessGroup of P ranks (None: the default one): the whole
        sequence, on every rank, of each rank's torch tensor. Carries no gradient."""
        import torch
        import torch.distributed as dist

        counts = [self.tokens_of_rank(rank) for rank in range(self.num_ranks)]
        shard = shard.detach().movedim(dim, 0)
        count = counts[dist.get_rank(process_group)]
        if len(shard) != count:
            raise ValueError(f"shard: has {len(shard)} tokens, must be {count}")
        # Padded, as not every backend gathers tensors of different sizes.
        mine = shard.new_zeros(max(counts), *shard.shape[1:])
        mine[: len(shard)] = shard
        gathered = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(gathered, mine, group=process_group)
        shards = [padded[:count] for padded, count in zip(gathered, counts)]
        return self.unshard(shards).movedim(0, dim)

    def __eq__(self, other):
        return isinstance(other, Plan) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

    def __str__(self):
        return _library.text(lib.nsa_plan_text, self.handle)
