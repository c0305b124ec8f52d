"""The configuration of one attention layer."""

import ctypes
import dataclasses

from nsa import _library
from nsa._library import check, lib

COMPRESSORS = ("mean", "weighted", "linear", "mlp")


@dataclasses.dataclass(frozen=True)
class Config:
    """Heads, dimensions and block sizes; symbols of arXiv:2502.11089. ValueError lists all broken
    rules."""

    num_q_heads: int = 64  # Hq, a multiple of num_kv_heads
    num_kv_heads: int = 4  # Hkv
    head_dim_qk: int = 128  # Dk, one of 64, 128, 192, 256
    head_dim_v: int = 128  # Dv, likewise
    compress_block_tokens: int = 32  # l, a multiple of 16 and of d
    compress_stride_tokens: int = 16  # d, a multiple of 16
    select_block_tokens: int = 64  # l', a multiple of d
    num_selected_blocks: int = 16  # n, the forced blocks counted in
    num_initial_blocks: int = 1  # forced first blocks
    num_local_blocks: int = 2  # forced last blocks up to the query's own
    window_tokens: int = 512  # w, the query's own token counted in
    softmax_scale: float | None = None  # None: 1 / sqrt(Dk)
    compressor: str = "mean"  # or "weighted", "linear", "mlp"

    def __post_init__(self):
        if self.compressor not in COMPRESSORS:
            raise ValueError(f"compressor = {self.compressor!r}: must be one of {COMPRESSORS}")
        # 0, also as what is left of a smaller number, is the library's word for the default.
        if self.softmax_scale is not None and not ctypes.c_float(self.softmax_scale).value:
            raise ValueError(f"softmax_scale = {self.softmax_scale}: must be finite and positive")
        check(lib.nsa_config_validate(ctypes.byref(self.c_struct())))

    @classmethod
    def from_text(cls, text: str) -> "Config":
        """From JSON, or text-proto as nsa/config.proto describes it."""
        struct = _library.Config()
        check(lib.nsa_config_from_text(text.encode(), ctypes.byref(struct)))
        fields = {field.name: getattr(struct, field.name) for field in dataclasses.fields(cls)}
        fields["compressor"] = COMPRESSORS[struct.compressor]
        fields["softmax_scale"] = struct.softmax_scale or None
        return cls(**fields)

    def c_struct(self) -> _library.Config:
        fields = dataclasses.asdict(self)
        fields["compressor"] = COMPRESSORS.index(self.compressor)
        fields["softmax_scale"] = self.softmax_scale or 0.0
        return _library.Config(**fields)
