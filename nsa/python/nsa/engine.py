"""Forward and backward on numpy arrays and torch tensors, which are read and written in place."""

import ctypes
import dataclasses
import itertools
import json
import weakref
from collections.abc import Mapping, Sequence

from nsa import _library
from nsa._library import check, lib
from nsa._tensors import (
    DTYPES,
    Structs,
    Tensor,
    address,
    current_stream,
    dtype_name,
    empty_like,
    memory_of,
)
from nsa.config import Config
from nsa.group import Group
from nsa.plan import Plan


def flatten(q, k, v, gate, compress_k=None, compress_v=None) -> tuple:
    """The tensors in order of _library.INPUTS; ends after gate without compressors' parameters.
    None: not there, or for the selected and window branch as the branch before."""
    ks = tuple(k) if isinstance(k, (tuple, list)) else (k,)
    vs = tuple(v) if isinstance(v, (tuple, list)) else (v,)
    if (len(ks), len(vs)) not in ((1, 1), (1, 3), (3, 1), (3, 3)):
        raise ValueError(
            f"k, v: are {len(ks)} and {len(vs)} tensors, must be 1 or 3 (cmp, slc, win)"
        )
    if len(ks) == len(vs) == 1:
        kv = (*ks, *vs, None, None, None, None)
    else:
        pairs = list(zip(ks * (3 // len(ks)), vs * (3 // len(vs))))
        kv = pairs[0]
        for (k0, v0), (k1, v1) in zip(pairs, pairs[1:]):
            kv += (None, None) if k0 is k1 and v0 is v1 else (k1, v1)
    tensors = (q, *kv, gate)
    if compress_k or compress_v:
        for name, params in (("compress_k", compress_k or {}), ("compress_v", compress_v or {})):
            unknown = set(params) - set(_library.PARAMS)
            if unknown:
                raise ValueError(f"{name}: has {sorted(unknown)}, may have {_library.PARAMS}")
            tensors += tuple(map(params.get, _library.PARAMS))
    return tensors


_SHARED_KV = (0, 1, 2, 1, 2, 1, 2)


def places_of(tensors):
    """Where in `tensors`, as flatten() gives them, each struct's tensor stands; None: in order."""
    if tensors[3] is not None and tensors[5] is not None:
        return None
    if tensors[3] is None and tensors[5] is None:
        kv = _SHARED_KV
    else:
        kv = (0, 1, 2, 1, 2, 5, 6) if tensors[3] is None else (0, 1, 2, 3, 4, 3, 4)
    return (*kv, *range(7, len(tensors)))


# By Engine.number.
_engines = weakref.WeakValueDictionary()
_numbers = itertools.count()


def engine_of_number(number: int) -> "Engine":
    engine = _engines.get(number)
    if engine is None:
        raise RuntimeError(
            f"engine {number} is gone: it must live as long as what was traced with it"
        )
    return engine


@dataclasses.dataclass
class Gradients:
    """Of what Engine.backward was asked for; None else."""

    q: Tensor = None  # [T,Hq,Dk]
    k: Tensor = None  # [T,Hkv,Dk], or three of them (cmp, slc, win) if k or v were
    v: Tensor = None  # [T,Hkv,Dv], likewise
    gate: Tensor = None  # [T,Hq,3]
    compress_k: dict[str, Tensor] | None = None  # f32, in the parameters' shapes
    compress_v: dict[str, Tensor] | None = None


class SavedForward:
    """What a forward leaves for its backward; may be used again. Made by Engine.save()."""

    def __init__(self, handle):
        self.handle = handle

    @property
    def num_bytes(self) -> int:
        """Of memory on the group's device."""
        count = ctypes.c_int64()
        check(lib.nsa_saved_forward_num_bytes(self.handle, ctypes.byref(count)))
        return count.value


class Engine:
    """Forward and backward of one config, plan and dtype. Making one, and its calls, are
    collective: every rank of the group does the same in the same order.

    Tensors are numpy arrays (CPU) or torch tensors on the group's device, of the engine's dtype
    unless said. They are never copied: the last dimension must be contiguous, other strides are
    free (on a GPU, every row of every head begins at a multiple of 16 bytes). On a GPU calls
    enqueue on torch's current stream, and may be captured in a CUDA graph.

    Errors: ValueError with the library's text, on every rank when any rank's arguments are wrong,
    and the engine goes on; MemoryError; TimeoutError and ConnectionError (UnavailableError,
    AbortedError) when another rank is slow, dead or gave up: then the group is broken on all ranks.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        group: Group,
        *,
        dtype,
        backward: bool = True,
        fetch_budget_bytes: int = 0,
        max_hidden_width: int = 0,
        drop_summaries: bool = False,
        keep_blocks: bool = False,
        agree_on_change_only: bool = False,
        time_stages: bool = False,
        memory_of: "Engine | None" = None,
    ):
        """Takes all memory that calls use, but for what a forward leaves for its backward.

        Args:
            dtype: of q, k, v and o: torch's or numpy's, or "f32" (CPU only), "bf16", "f16".
            backward: take the memory of the backward as well.
            fetch_budget_bytes: at most, for fetched blocks; 0: 1 GiB.
            max_hidden_width: of the MLP compressors that backward may be given, the largest F.
            drop_summaries: a backward makes and gathers the summaries again: less memory for each
                forward that waits for its backward.
            keep_blocks: keep what a forward fetches, else its backward fetches it again.
            agree_on_change_only: compare the ranks' arguments only in the first call and where
                this rank's have changed in more than their data. A call then does not wait for the
                other hosts, and a mistake of one rank alone breaks the group.
            time_stages: measure when each stage ran, for stats().
            memory_of: an engine of the same group, whose memory of calls this one uses as well,
                taking more only if it needs more; no call of the one may run beside the launch of a
                graph of the other's.
        """
        self.dtype = dtype_name(dtype)
        self.config = config
        self.plan = plan
        self.rank, self.device, self.device_index = group.rank, group.device, group.device_index
        self._lock = group.lock
        options = _library.EngineOptions(
            dtype=DTYPES.index(self.dtype),
            has_backward=backward,
            fetch_budget_bytes=fetch_budget_bytes,
            max_hidden_width=max_hidden_width,
            agree_on_change_only=agree_on_change_only,
            time_stages=time_stages,
            memory_of=memory_of and memory_of.handle,
        )
        self._save_options = _library.SaveOptions(
            drop_summaries=drop_summaries, keep_blocks=keep_blocks
        )
        self.handle = _library.create(
            "engine",
            ctypes.byref(options),
            ctypes.byref(config.c_struct()),
            plan.handle,
            group.handle,
        )
        self.number = next(_numbers)
        _engines[self.number] = self
        count = ctypes.c_int64()
        save_options = ctypes.byref(self._save_options)
        check(lib.nsa_engine_saved_bytes(self.handle, save_options, ctypes.byref(count)))
        self.saved_bytes = count.value  # what a forward leaves for its backward
        self._saved_in = {}  # SavedForward by address
        self._inputs = Structs(_library.ForwardInputs, _library.INPUTS, self.device_index)
        self._outputs = Structs(_library.ForwardOutputs, _library.OUTPUTS, self.device_index, True)
        self._d_o = Structs(_library.OneTensor, ("d_o",), self.device_index)
        names = tuple(f"d{name}" for name in _library.INPUTS)
        self._gradients = Structs(_library.Gradients, names, self.device_index, True)
        self._current_stream = current_stream(self.device_index)

    def forward(
        self,
        q: Tensor,
        k: Tensor | Sequence[Tensor],
        v: Tensor | Sequence[Tensor],
        gate: Tensor,
        *,
        compress_k: Mapping[str, Tensor] | None = None,
        compress_v: Mapping[str, Tensor] | None = None,
        o: Tensor | None = None,
        extras: Sequence[str] = (),
        saved: SavedForward | None = None,
    ):
        """
        Args:
            q: [T,Hq,Dk].
            k: [T,Hkv,Dk], or three of them, for the branches (cmp, slc, win).
            v: [T,Hkv,Dv], or three of them.
            gate: [T,Hq,3] f32 or the engine's dtype, after its sigmoid, order (cmp, slc, win).
            compress_k, compress_v: parameters of the compressor by name, f32 or the engine's dtype,
                all the same; H' is 1 (shared by the heads) or Hkv, D is Dk or Dv. weighted:
                weight [H',l]; linear: w [H',D,l*D]; mlp: w1 [H',F,l*D], b1 [H',F], w2 [H',D,F],
                b2 [H',D]; each also pe [H',l,D], which may be left out.
            o: where to put the result; None: a new tensor.
            extras: of "o_cmp", "o_slc", "o_win" [T,Hq,Dv], "lse_cmp", "lse_slc", "lse_win" [T,Hq]
                f32 (natural log, -inf without a key), "block_indices" [T,Hkv,n] int32 (in the
                query's document, -1 padded). Not with `saved`.
            saved: is filled for a backward.

        Returns:
            o [T,Hq,Dv]; with `extras` (o, a dict of them).
        """
        try:
            tensors = flatten(q, k, v, gate, compress_k, compress_v)
            if o is None:
                o = empty_like(q, (*q.shape[:2], tensors[2].shape[-1]))
            more = {name: self._empty_extra(name, q, o) for name in extras}
        except Exception:
            self.fail_forward(saved)
            raise
        self.run_forward(tensors, o, saved, more)
        return (o, more) if extras else o

    def _empty_extra(self, name, q, o):
        if name in _library.OUTPUTS[1:]:
            return empty_like(o)
        if name == "block_indices":
            config = self.config
            shape = (q.shape[0], config.num_kv_heads, config.num_selected_blocks)
            return empty_like(q, shape, "int32")
        if name in _library.ROW_OUTPUTS:
            return empty_like(q, tuple(q.shape[:2]), "float32")
        raise ValueError(f"extras: has {name!r}")

    def run_forward(self, tensors, o, saved=None, extras={}) -> None:
        """forward() of what flatten() gives."""
        with self._lock:
            try:
                inputs = self._inputs.fill(tensors, places_of(tensors))
                if extras:
                    rows = [of for of in _library.ROW_OUTPUTS if of in extras]
                    rows = {of: address(of, extras[of]) for of in rows}
                    outputs = (o, *(extras.get(name) for name in _library.OUTPUTS[1:]))
                    outputs = self._outputs.fill(outputs, **rows)
                else:
                    outputs = self._outputs.fill((o,))
            except Exception:
                self.fail_forward(saved)
                raise
            check(self._forward(inputs, outputs, saved))

    def fail_forward(self, saved=None) -> None:
        """For a rank that cannot make its call: that of the other ranks fails at once, as this one,
        not when they have waited for long."""
        with self._lock:
            self._forward(_library.ForwardInputs(), _library.ForwardOutputs(), saved)

    def _forward(self, inputs, outputs, saved) -> int:
        return lib.nsa_engine_forward(
            self.handle,
            ctypes.byref(inputs),
            ctypes.byref(outputs),
            saved and saved.handle,
            self._current_stream(),
        )

    def backward(
        self,
        q: Tensor,
        k: Tensor | Sequence[Tensor],
        v: Tensor | Sequence[Tensor],
        gate: Tensor,
        d_o: Tensor,
        saved: SavedForward,
        *,
        compress_k: Mapping[str, Tensor] | None = None,
        compress_v: Mapping[str, Tensor] | None = None,
        into: Gradients | None = None,
        accumulate: bool = False,
        sum_over_ranks: bool = False,
    ) -> Gradients:
        """The gradients of sum(o * d_o) of the forward that filled `saved` last, with the selected
        blocks held fixed.

        Args:
            q, k, v, gate, compress_k, compress_v: as the forward's, with the same contents.
            d_o: [T,Hq,Dv] in the engine's dtype.
            into: tensors to write, f32 or the engine's dtype each; those left out are not
                computed. None: new tensors for all, in the dtype of what they are gradients of,
                the compressors' in f32.
            accumulate: add to what the tensors of `into` hold.
            sum_over_ranks: compressors' gradients are of all ranks' tokens, else of this rank's
                blocks alone.
        """
        try:
            tensors = flatten(q, k, v, gate, compress_k, compress_v)
            places = places_of(tensors)
            if into is not None:
                gradients, places = _in_order(into), None
            elif accumulate:
                raise ValueError("accumulate = True: must be False without `into`")
            else:
                dtypes = [None] * 8 + ["float32"] * len(tensors[8:])
                gradients = tuple(
                    None if tensor is None else empty_like(tensor, dtype=dtype)
                    for tensor, dtype in zip(tensors, dtypes)
                )
        except Exception:
            self._fail_backward(saved)
            raise
        self._run_backward(tensors, d_o, saved, gradients, places, accumulate, sum_over_ranks)
        separate = isinstance(k, (tuple, list)) or isinstance(v, (tuple, list))
        return into or _named_gradients(gradients, tensors, separate)

    def run_backward(self, tensors, d_o, saved, gradients, sum_over_ranks=False) -> None:
        """backward() of what flatten() gives; `gradients` are None where they are not wanted or
        `tensors` are."""
        places = places_of(tensors)
        self._run_backward(tensors, d_o, saved, gradients, places, False, sum_over_ranks)

    def _run_backward(self, tensors, d_o, saved, gradients, places, accumulate, sum_over_ranks):
        """`places`: of `gradients`, as Structs.fill() takes them."""
        with self._lock:
            try:
                tensors = _apart(tensors)
                inputs = self._inputs.fill(tensors, places_of(tensors))
                d_o = self._d_o.fill((d_o,))
                gradients = self._gradients.fill(
                    gradients, places, accumulate=accumulate, sum_over_ranks=sum_over_ranks
                )
            except Exception:
                self._fail_backward(saved)
                raise
            check(self._backward(inputs, d_o, saved, gradients))

    def _fail_backward(self, saved) -> None:
        """As fail_forward()."""
        blanks = _library.ForwardInputs(), _library.OneTensor(), _library.Gradients()
        with self._lock:
            self._backward(*blanks[:2], saved, blanks[2])

    def _backward(self, inputs, d_o, saved, gradients) -> int:
        return lib.nsa_engine_backward(
            self.handle,
            ctypes.byref(inputs),
            ctypes.byref(d_o),
            saved.handle,
            ctypes.byref(gradients),
            self._current_stream(),
        )

    def save(self) -> SavedForward:
        """Collective: memory for one forward that waits for its backward."""
        return self._create_saved(None, False)

    def saved_in(self, memory: Tensor, is_filled: bool = False) -> SavedForward:
        """What a forward leaves, in `memory` of saved_bytes bytes, which may be a copy of what a
        forward has filled. For the next call alone."""
        place = address("memory", memory), is_filled
        saved = self._saved_in.get(place)
        if saved is None:  # an allocator gives the same places again and again
            if len(self._saved_in) >= Structs.MAX_KEPT:
                self._saved_in.clear()
            saved = self._saved_in[place] = self._create_saved(*place)
        return saved

    def _create_saved(self, memory, is_filled) -> SavedForward:
        with self._lock:
            self._save_options.memory, self._save_options.is_filled = memory, is_filled
            options = ctypes.byref(self._save_options)
            return SavedForward(_library.create("saved_forward", self.handle, options))

    def stats(self) -> dict:
        """What this rank's last call moved and took (nsa/stats.proto, RankStats). Waits for its
        end."""
        return json.loads(_library.text(lib.nsa_engine_stats, self.handle))

    def gather_stats(self) -> dict:
        """Collective: the same of all ranks (ForwardStats)."""
        return json.loads(_library.text(lib.nsa_engine_gather_stats, self.handle))


def _apart(tensors):
    """`tensors` with copies where the keys and values of several branches are tensors of their own
    in the same memory, such as views: each then has a gradient of its own."""
    if tensors[3] is None and tensors[5] is None:
        return tensors
    tensors, seen = list(tensors), set()
    for i in (1, 3, 5):
        if tensors[i] is None:
            continue
        k, memory = tensors[i], memory_of(*tensors[i : i + 2])
        if memory in seen:
            tensors[i] = k.clone() if hasattr(k, "clone") else k.copy()
        seen.add(memory)
    return tensors


def _in_order(gradients: Gradients) -> tuple:
    """Its tensors in order of _library.INPUTS."""
    kv = [of if isinstance(of, (tuple, list)) else [of] * 3 for of in (gradients.k, gradients.v)]
    for name, of in zip(("into.k", "into.v"), kv):
        if len(of) != 3:
            raise ValueError(f"{name}: is {len(of)} tensors, must be 1 or 3 (cmp, slc, win)")
    kv = [tensor for pair in zip(*kv) for tensor in pair]
    others = flatten(
        gradients.q, None, None, gradients.gate, gradients.compress_k, gradients.compress_v
    )
    return (others[0], *kv, *others[7:])


def _named_gradients(gradients, tensors, separate) -> Gradients:
    places = places_of(tensors) or range(len(tensors))
    gradients = [gradients[place] for place in places]
    k, v = gradients[1:7:2], gradients[2:7:2]
    params = (gradients[8:15], gradients[15:22])
    names = (dict(zip(_library.PARAMS, of)) for of in params)
    named = [{n: g for n, g in of.items() if g is not None} or None for of in names]
    return Gradients(
        gradients[0], k if separate else k[0], v if separate else v[0], gradients[7], *named
    )
