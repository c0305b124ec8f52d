"""Decoding."""

import ctypes
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from nsa import _library
from nsa._library import check, lib
from nsa._tensors import DTYPES, Structs, Tensor, current_stream, dtype_name, empty_like, memory_of
from nsa.config import Config
from nsa.engine import Engine, flatten, places_of
from nsa.group import Group


class KVCache:
    """Keys and values of sequences, in pages on all ranks. Each sequence has a home, the rank that
    opened it and decodes it. Making a cache is collective; an error of a call leaves every sequence
    as it was. Tensors are as for Engine."""

    def __init__(
        self,
        config: Config,
        group: Group,
        *,
        dtype,
        num_pages: int,
        max_sequences: int = 0,
        home_shares: Sequence[float] | None = None,
        max_tokens: int = 0,
        summary_tokens: int = 0,
        max_step_rows: int = 0,
        max_rollback_tokens: int = 0,
        separate_kv: bool = False,
        compress_k: Mapping[str, Tensor] | None = None,
        compress_v: Mapping[str, Tensor] | None = None,
    ):
        """
        Args:
            dtype: of q, k, v and o.
            num_pages: of l' tokens each, of this rank's memory, for all homes together.
            max_sequences: that this rank is home of; 0: 64.
            home_shares: [P] what part of the pages each home gets; None: equal parts.
            max_tokens: of a sequence; 0: 2^20.
            summary_tokens: that the summaries hold; 0: as many as the pages of this home.
            max_step_rows: new tokens of all sequences in a step; 0: 64.
            max_rollback_tokens: that truncate() can take back; 0: 64.
            separate_kv: branches have k and v of their own.
            compress_k, compress_v: as in Engine.forward; the cache keeps the tensors.
        """
        self.device_index = group.device_index
        self._separate_kv = separate_kv
        self._compressors = [
            (params or {}).get(name)
            for params in (compress_k, compress_v)
            for name in _library.PARAMS
        ]
        shares = None if home_shares is None else np.ascontiguousarray(home_shares, np.float64)
        if shares is not None and shares.shape != (group.size,):
            raise ValueError(f"home_shares: has shape {shares.shape}, must be [{group.size}]")
        options = Structs(_library.KVCacheOptions, _library.INPUTS[8:], self.device_index).fill(
            self._compressors,
            dtype=DTYPES.index(dtype_name(dtype)),
            max_sequences=max_sequences,
            num_pages=num_pages,
            home_shares=None if shares is None else shares.ctypes.data,
            max_tokens=max_tokens,
            summary_tokens=summary_tokens,
            max_step_rows=max_step_rows,
            separate_kv=separate_kv,
            max_rollback_tokens=max_rollback_tokens,
        )
        self.handle = _library.create(
            "kv_cache",
            ctypes.byref(options),
            ctypes.byref(config.c_struct()),
            group.handle,
        )
        self._tokens = Structs(_library.KVTokens, _library.KV, self.device_index)
        self._inputs = Structs(_library.StepInputs, _library.INPUTS[:8], self.device_index)
        self._outputs = Structs(_library.StepOutputs, _library.OUTPUTS[:1], self.device_index, True)
        self._forward_inputs = Structs(_library.ForwardInputs, _library.INPUTS, self.device_index)
        self._current_stream = current_stream(self.device_index)

    @property
    def is_reachable(self) -> bool:
        """True: kernels load the pages of every rank in place. False: step() is collective; a rank
        without sequences passes none."""
        result = ctypes.c_int32()
        check(lib.nsa_kv_cache_is_reachable(self.handle, ctypes.byref(result)))
        return bool(result.value)

    def open(self) -> int:
        """An empty sequence, whose home is this rank; its number is never used again."""
        return self._number(lib.nsa_kv_cache_open)

    def _number(self, function, *arguments):
        number = ctypes.c_int64()
        check(function(self.handle, *arguments, ctypes.byref(number)))
        return number.value

    def num_tokens(self, sequence: int) -> int:
        """Of a sequence of this home."""
        return self._number(lib.nsa_kv_cache_num_tokens, sequence)

    def append(self, sequence: int, k, v) -> None:
        """Appends T >= 1 tokens, which attend to nothing. k [T,Hkv,Dk], v [T,Hkv,Dv], or with
        separate_kv three of each (cmp, slc, win)."""
        tensors = self._flatten(None, k, v, None)
        places = places_of(tensors) or tuple(range(8))
        tokens = self._tokens.fill(tensors, places[1:7])
        stream = self._current_stream()
        check(lib.nsa_kv_cache_append(self.handle, sequence, ctypes.byref(tokens), stream))

    def _flatten(self, q, k, v, gate):
        tensors = flatten(q, k, v, gate)
        if not self._separate_kv:
            others = [tensors[i : i + 2] for i in (3, 5) if tensors[i] is not None]
            if any(memory_of(*pair) != memory_of(*tensors[1:3]) for pair in others):
                raise ValueError("k, v: must be the same in all branches, or separate_kv be True")
        return tensors

    def append_forward(
        self, home, sequence, engine: Engine, q, k, v, gate, *,
        compress_k=None, compress_v=None, document: int = 0,
    ) -> None:  # fmt: skip
        """Collective: to an empty sequence of rank `home` (others pass any `sequence`) the tokens
        of one document of the last forward of `engine`, which had these arguments, of the same
        config and group."""
        try:
            tensors = flatten(q, k, v, gate, compress_k, compress_v)
            inputs = self._forward_inputs.fill(tensors, places_of(tensors))
        except Exception:
            # The other ranks' call fails at once, as this one, not when they have waited for long.
            self._append_forward(home, sequence, engine, _library.ForwardInputs(), document)
            raise
        check(self._append_forward(home, sequence, engine, inputs, document))

    def _append_forward(self, home, sequence, engine, inputs, document) -> int:
        return lib.nsa_kv_cache_append_forward(
            self.handle,
            home,
            sequence,
            engine.handle,
            ctypes.byref(inputs),
            document,
            self._current_stream(),
        )

    def step(self, sequences: Sequence[tuple[int, int]], q, k, v, gate, *, o=None):
        """Appends each sequence's new tokens and attends with them.

        Args:
            sequences: (sequence, number of new tokens, 1 to 64) each; their rows, R in all, follow
                one another in the tensors.
            q: [R,Hq,Dk].
            k, v: [R,Hkv,Dk] and [R,Hkv,Dv], or with separate_kv three of each (cmp, slc, win).
            gate: [R,Hq,3] f32 or the cache's dtype.
            o: where to put the result; None: a new tensor.

        Returns:
            o [R,Hq,Dv].
        """
        run = functools.partial(lib.nsa_kv_cache_step, self.handle)
        try:
            arguments = _step_sequences(sequences)
            inputs, outputs, o = self._step_tensors(q, k, v, gate, o)
        except Exception:
            self._step_without_rows(run, *_step_sequences(()))
            raise
        check(run(*arguments, ctypes.byref(inputs), ctypes.byref(outputs), self._current_stream()))
        return o

    def _step_tensors(self, q, k, v, gate, o):
        tensors = self._flatten(q, k, v, gate)
        if o is None:
            o = empty_like(q, (*q.shape[:2], tensors[2].shape[-1]))
        return self._inputs.fill(tensors, places_of(tensors)), self._outputs.fill((o,)), o

    def _step_without_rows(self, run, *arguments):
        """This rank's part of a collective step when it has none; else nothing."""
        if not self.is_reachable:
            inputs, outputs = _library.StepInputs(), _library.StepOutputs()
            run(*arguments, ctypes.byref(inputs), ctypes.byref(outputs), self._current_stream())

    def plan_step(self, sequences: Sequence[tuple[int, int]]) -> None:
        """The part of step() that takes pages and tells the kernels. Local."""
        arguments = _step_sequences(sequences)
        check(lib.nsa_kv_cache_plan_step(self.handle, *arguments, self._current_stream()))

    def run_step(self, q, k, v, gate, *, o=None):
        """The rest, which only enqueues: may be captured in a CUDA graph where the cache is
        reachable, which then serves every later plan_step() of as many rows or fewer."""
        run = functools.partial(lib.nsa_kv_cache_run_step, self.handle)
        try:
            inputs, outputs, o = self._step_tensors(q, k, v, gate, o)
        except Exception:
            self._step_without_rows(run, 0)
            raise
        check(run(q.shape[0], ctypes.byref(inputs), ctypes.byref(outputs), self._current_stream()))
        return o

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Takes back all tokens from `num_tokens` on."""
        check(lib.nsa_kv_cache_truncate(self.handle, sequence, num_tokens))

    def fork(self, sequence: int) -> int:
        """A sequence with the same tokens, which shares pages until one of the two writes."""
        return self._number(lib.nsa_kv_cache_fork, sequence)

    def close(self, sequence: int) -> None:
        """Lets a sequence go."""
        check(lib.nsa_kv_cache_close(self.handle, sequence))

    def stats(self) -> dict[str, int]:
        """Of this home: sequences, pages (on all ranks), pages_used, summary_pages,
        summary_pages_used, steps, tokens_appended, bytes_fetched."""
        stats = _library.KVCacheStats()
        check(lib.nsa_kv_cache_get_stats(self.handle, ctypes.byref(stats)))
        return {name: getattr(stats, name) for name, _ in stats._fields_[1:]}


def _step_sequences(sequences):
    array = (_library.StepSequence * len(sequences))(*sequences)
    return ctypes.byref(array), len(sequences)
