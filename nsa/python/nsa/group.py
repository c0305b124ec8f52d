"""Groups of ranks."""

import ctypes
import itertools
import threading

from nsa import _library
from nsa._library import check, lib

_TRANSPORTS = ("auto", "loopback", "ucx", "nccl")


def _device_index(device) -> int:
    """CUDA's number, or -1 for the CPU, of "cpu", "cuda", "cuda:1", 1, or a torch.device."""
    if isinstance(device, int):
        return device
    kind, _, number = str(device).partition(":")
    if kind == "cpu":
        return -1
    if kind != "cuda" or not (number or "0").isdigit():
        raise ValueError(f"device = {device!r}: must be 'cpu', 'cuda', 'cuda:N' or N")
    if number:
        return int(number)
    import torch

    return torch.cuda.current_device()


class Group:
    """The ranks that share a sequence, each a process with one device, or one rank alone. Making a
    group is collective: all its ranks do it. One thread at a time calls with what belongs to a
    group, but for forwards and backwards, which wait for one another; abort() and health() may be
    called beside it. A process forked from this one can use nothing of it."""

    def __init__(
        self,
        device="cpu",
        *,
        rank: int = 0,
        size: int = 1,
        rendezvous: str | None = None,
        name: str = "",
        transport: str = "auto",
        timeout_seconds: float = 60.0,
        num_threads: int = 0,
        from_environment: bool = False,
        max_engines: int = 16,
    ):
        """
        Args:
            device: "cpu", "cuda", "cuda:N", N, or a torch.device: of this rank; the same kind on
                all ranks.
            rank, size: of this process in the group.
            rendezvous: "host:port" of rank 0, where the ranks meet; None for one rank.
            name: ranks meet only ranks of the same name.
            transport: "auto" (NCCL on GPUs, UCX on CPUs), "loopback", "ucx" or "nccl".
            timeout_seconds: of every wait for another rank.
            num_threads: of a rank on a CPU; 0: its share of the host's cores under torchrun or
                mpirun, else all.
            from_environment: rank, size and rendezvous as torchrun and mpirun say.
            max_engines: engines that engine() keeps at most.
        """
        if max_engines < 1:
            raise ValueError(f"max_engines = {max_engines}: must be at least 1")
        if transport not in _TRANSPORTS:
            raise ValueError(f"transport = {transport!r}: must be one of {_TRANSPORTS}")
        self.device_index = _device_index(device)
        self.device = "cpu" if self.device_index < 0 else f"cuda:{self.device_index}"
        options = _library.GroupOptions(
            from_environment=from_environment,
            rank=rank,
            size=0 if from_environment else size,
            device=self.device_index,
            transport=_TRANSPORTS.index(transport),
            num_threads=num_threads,
            timeout_ms=round(timeout_seconds * 1000),
            rendezvous=rendezvous.encode() if rendezvous else None,
            name=name.encode() or None,
        )
        self.handle = _library.create("group", ctypes.byref(options))
        number, count = ctypes.c_int32(), ctypes.c_int32()
        check(lib.nsa_group_rank(self.handle, ctypes.byref(number), ctypes.byref(count)))
        self.rank, self.size = number.value, count.value
        self.max_engines = max_engines
        self.lock = threading.RLock()  # of what one thread at a time does
        self._engines = {}  # least recently used first

    @classmethod
    def local(cls, device="cpu", **options) -> "Group":
        """One rank. `options`: as of Group."""
        return cls(device, **options)

    @classmethod
    def from_env(cls, device="cpu", **options) -> "Group":
        """The ranks that torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) or mpirun started;
        one rank without any of their variables."""
        return cls(device, from_environment=True, **options)

    @classmethod
    def from_process_group(cls, process_group=None, device=None, **options) -> "Group":
        """The ranks of a torch.distributed ProcessGroup (None: the default one), which need not be
        all ranks: groups of several subgroups may be made at the same time. The group has
        connections of its own; `process_group` only tells the ranks where to meet.

        device: None: the CPU where the process group is of gloo or there is no GPU, else the
            current GPU.
        """
        import torch
        import torch.distributed as dist

        if process_group is None:
            process_group = dist.group.WORLD
        if device is None:
            is_gpu = torch.cuda.is_available() and dist.get_backend(process_group) != "gloo"
            device = "cuda" if is_gpu else "cpu"
        rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if size == 1:
            return cls(device, **options)
        address = [None, None]
        if rank == 0:
            address = [
                _library.text(lib.nsa_rendezvous_address, None),
                f"{process_group.group_name}/{next(_numbers)}",
            ]
        dist.broadcast_object_list(
            address, src=dist.get_global_rank(process_group, 0), group=process_group
        )
        rendezvous, name = address
        return cls(device, rank=rank, size=size, rendezvous=rendezvous, name=name, **options)

    @classmethod
    def from_device_mesh(cls, mesh, dim: str = "cp", device=None, **options) -> "Group":
        """The ranks along dimension `dim` of a torch DeviceMesh, such as "cp" of ("dp", "cp")."""
        if device is None and mesh.device_type == "cpu":
            device = "cpu"
        return cls.from_process_group(mesh.get_group(dim), device, **options)

    def barrier(self) -> None:
        """Collective on the host: returns when all ranks have called it."""
        check(lib.nsa_group_barrier(self.handle))

    def health(self) -> None:
        """Raises the error that broke the group, if one did; never waits. On a GPU this is where
        errors of enqueued work show."""
        check(lib.nsa_group_health(self.handle))

    def abort(self, reason: str = "") -> None:
        """Breaks the group on every rank, whose calls then raise AbortedError with `reason`."""
        check(lib.nsa_group_abort(self.handle, reason.encode()))

    def engine(self, config, plan, *, dtype, **options):
        """The Engine of these arguments (as of Engine), made by the first call and kept, so that
        layers alike share one. Collective when it makes one. All share the memory of their calls.
        Of more than `max_engines` the one not used for longest is let go."""
        from nsa.engine import Engine, dtype_name

        key = (config, plan, dtype_name(dtype), *sorted(options.items()))
        with self.lock:
            engine = self._engines.pop(key, None)
            if engine is None:
                other = next(reversed(self._engines.values()), None)
                engine = Engine(config, plan, self, dtype=dtype, memory_of=other, **options)
                while len(self._engines) >= self.max_engines:
                    del self._engines[next(iter(self._engines))]
            self._engines[key] = engine
        return engine

    def close(self) -> None:
        """Lets the group and its engines go; else this happens when they are collected."""
        self._engines.clear()
        self.handle = None

    def __deepcopy__(self, memo):
        return self  # a copy of a module has the same ranks

    def __repr__(self):
        return f"Group(rank={self.rank}, size={self.size}, device={self.device!r})"


_numbers = itertools.count()
