#!/usr/bin/env python3
"""Dense causal attention by cuDNN, through torch: what the sparse passes are compared with.

    dense_attention.py --tokens 8192,65536                                       one GPU
    dense_attention.py --pass decode --cached 65536 --batch 1,8,32               one GPU
    torchrun --standalone --nproc-per-node 4 dense_attention.py --tokens 65536   one GPU a rank
    ... --pass backward                                      after a forward that is not timed; or step
    ... --check                                                                  against fp64 first

On one GPU a call of scaled_dot_product_attention. On several the sequence is dealt in zig-zag: of
2P chunks rank r holds r and 2P-1-r. K and V of all ranks are gathered while each chunk attends to
itself (causal); then it attends to the chunks before it (no mask), and the two are merged by their
log-sum-exps. One call a chunk will not do: torch aligns cuDNN's causal mask to the first key.
The backward gathers K and V again, goes over the same parts with the merged output and log-sum-exp,
and reduce-scatters the gradients of K and V.

A step of decoding is one query a sequence over all that is cached, replayed as a CUDA graph.

Prints one line of JSON for each length (and batch), with the fields of passes_cuda and decode_cuda
(see benchmarks/README.md).
"""

import argparse
import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

WARM_UPS = 3
FLUSH_BYTES = 256 << 20  # larger than the L2
HOLD_CYCLES = 200_000  # about 100 us, longer than the host takes to launch a graph


@triton.jit
def merge_rows(a, b, lse_a, lse_b, tokens, HEADS: tl.constexpr, DIM: tl.constexpr,
               ROWS: tl.constexpr):
    """a = the attention over both sets of keys. Grid: ROWS rows (token, head) of a and b each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens * HEADS
    place = (row % HEADS) * tokens + row // HEADS  # of [head, token]
    weight = tl.sigmoid(tl.load(lse_a + place, mask=inside, other=0.0) -
                        tl.load(lse_b + place, mask=inside, other=0.0))[:, None]
    at = row[:, None].to(tl.int64) * DIM + tl.arange(0, DIM)[None, :]
    mask = inside[:, None]
    merged = (weight * tl.load(a + at, mask=mask, other=0.0).to(tl.float32) +
              (1 - weight) * tl.load(b + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(a + at, merged.to(a.dtype.element_ty), mask=mask)


def heads_first(x):
    """[tokens, heads, dim] as torch wants it: [1, heads, tokens, dim], without a copy."""
    return x.transpose(0, 1).unsqueeze(0)


def attend(q, k, v, causal):
    """cuDNN's output, [tokens, heads, dim] as q, k and v are, and log-sum-exp [heads, tokens]."""
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        heads_first(q), heads_first(k), heads_first(v), None, True, 0.0, causal)
    return out[0].squeeze(0).transpose(0, 1), out[1].reshape(q.shape[1], q.shape[0])


def attend_backward(d_o, q, k, v, out, lse, causal):
    """cuDNN's dq, dk, dv, [tokens, heads, dim] each, given output and log-sum-exp of all keys."""
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        heads_first(d_o), heads_first(q), heads_first(k), heads_first(v), heads_first(out),
        lse.reshape(1, q.shape[1], q.shape[0], 1), seed, seed, None, None, None, q.shape[0],
        k.shape[0], 0.0, causal)
    return [x.squeeze(0).transpose(0, 1) for x in grads]


class OneGpu:
    """The whole sequence on one GPU."""

    def __init__(self, tokens, make, trains):
        self.q, self.k, self.v, d_o = make(0, tokens)
        self.d_o = d_o if trains else None
        for x in (self.q, self.k, self.v):
            x.requires_grad_(trains)

    def forward(self):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            self.out = torch.nn.functional.scaled_dot_product_attention(
                heads_first(self.q), heads_first(self.k), heads_first(self.v), is_causal=True,
                enable_gqa=True)
        return [(0, self.out.detach().squeeze(0).transpose(0, 1))]

    def backward(self):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.autograd.grad(self.out, (self.q, self.k, self.v), heads_first(self.d_o),
                                       retain_graph=True)


class ZigZag:
    """This rank's two chunks, and room for K and V of all."""

    def __init__(self, tokens, make, trains):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if tokens % (2 * self.size):
            sys.exit(f"--tokens has {tokens}: must be a multiple of twice the {self.size} ranks")
        self.chunk = tokens // (2 * self.size)
        self.begins = [self.rank * self.chunk, (2 * self.size - 1 - self.rank) * self.chunk]
        made = [make(begin, begin + self.chunk) for begin in self.begins]
        self.chunks = [chunk[:3] for chunk in made]
        self.d_o = [chunk[3] for chunk in made]
        # Late chunks 2P-1 .. P as the ranks hold them, then the early ones 0 .. P-1: what comes
        # before a chunk lies in one piece. Its order does not matter where nothing is masked.
        self.gathered = [x.new_empty(tokens, *x.shape[1:]) for x in self.chunks[0][1:]]

        if trains:
            self.grads = [torch.zeros_like(x) for x in self.gathered]
        half = self.size * self.chunk
        self.before = [(half, half + self.rank * self.chunk),
                       ((self.rank + 1) * self.chunk, 2 * half)]

    def gather(self):
        """Of K and V; what to wait for."""
        half = self.size * self.chunk
        return [
            dist.all_gather_into_tensor(whole[begin:begin + half], x, async_op=True)
            for begin, chunk in ((half, self.chunks[0]), (0, self.chunks[1]))
            for whole, x in zip(self.gathered, chunk[1:])
        ]

    def forward(self):
        waits = self.gather()
        own = [attend(q, k, v, causal=True) for q, k, v in self.chunks]
        for wait in waits:
            wait.wait()
        self.merged = []
        for (q, _, _), (out, lse), (begin, end) in zip(self.chunks, own, self.before):
            self.merged.append((out, lse))
            if begin == end:
                continue
            k, v = (whole[begin:end] for whole in self.gathered)
            other, other_lse = attend(q, k, v, causal=False)
            tokens, heads, dim = out.shape
            assert out.is_contiguous() and other.is_contiguous()
            rows = 64
            merge_rows[(triton.cdiv(tokens * heads, rows),)](
                out, other, lse, other_lse, tokens, heads, dim, rows)
            self.merged[-1] = (out, torch.logaddexp(lse, other_lse))
        return [(begin, out) for begin, (out, _) in zip(self.begins, own)]

    def backward(self):
        waits = self.gather()
        parts = list(zip(self.chunks, self.d_o, self.merged, self.before))
        own = [attend_backward(d_o, q, k, v, out, lse, causal=True)
               for (q, k, v), d_o, (out, lse), _ in parts]
        for wait in waits:
            wait.wait()
        for grad in self.grads:
            grad.zero_()
        for ((q, _, _), d_o, (out, lse), (begin, end)), grads in zip(parts, own):
            if begin == end:
                continue
            k, v = (whole[begin:end] for whole in self.gathered)
            others = attend_backward(d_o, q, k, v, out, lse, causal=False)
            grads[0] += others[0]
            for grad, other in zip(self.grads, others[1:]):
                grad[begin:end] += other
        half = self.size * self.chunk
        for begin, grads in ((half, own[0]), (0, own[1])):
            for i, grad in enumerate(self.grads):
                of_others = torch.empty_like(grads[i + 1])
                dist.reduce_scatter_tensor(of_others, grad[begin:begin + half])
                grads[i + 1] += of_others
        return own


def relative_l2(outputs, q, k, v):
    """Of outputs [(first token, [tokens, heads, dim])] against fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    difference = norm = 0.0
    for begin, out in outputs:
        end = begin + out.shape[0]
        for head in range(q.shape[1]):
            logits = q[begin:end, head] @ k[:end, head // group].T * q.shape[2]**-0.5
            position = torch.arange(begin, end, device=q.device)[:, None]
            logits.masked_fill_(torch.arange(end, device=q.device) > position, float("-inf"))
            expected = logits.softmax(1) @ v[:end, head // group]
            difference += (out[:, head].double() - expected).square().sum().item()
            norm += expected.square().sum().item()
    return (difference / norm)**0.5


def check(case, tokens, make_values):
    """Exits when the result is wrong."""
    q, k, v, _ = make_values(tokens)
    error = relative_l2(
        case(tokens, lambda begin, end: [x[begin:end].contiguous() for x in (q, k, v, q)],
             trains=False).forward(), q, k, v)
    print(f"relative L2 against fp64, {tokens} tokens: {error:.2e}", file=sys.stderr, flush=True)
    if not error <= 6e-3:
        sys.exit("dense_attention: wrong result")


def time_pass(case, name, reps, seconds):
    """Milliseconds of each repetition, the slowest rank's; fewer repetitions past `seconds`."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    several = dist.is_initialized()
    times = []
    if name == "backward":
        case.forward()
    start = time.monotonic()
    for i in range(-WARM_UPS, reps):
        flush.zero_()
        torch.cuda.synchronize()
        if several:
            dist.barrier()
            torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if name != "backward":
            case.forward()
        if name != "forward":
            case.backward()
        end.record()
        end.synchronize()
        slowest = torch.tensor([begin.elapsed_time(end), time.monotonic() - start], device="cuda")
        if several:
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        ms, elapsed = slowest.tolist()
        if i >= 0:
            times.append(ms)
        if elapsed > seconds and len(times) >= 3:
            break
    free, total = torch.cuda.mem_get_info()
    return times, (total - free - FLUSH_BYTES) >> 20


class DecodeStep:
    """One new token for each sequence of a batch, as a CUDA graph."""

    def __init__(self, batch, cached, args):
        torch.manual_seed(1)
        self.q, self.k, self.v = (
            torch.randn(batch, heads, tokens, dim, dtype=torch.bfloat16, device="cuda")
            for heads, tokens, dim in ((args.q_heads, 1, args.dim_qk),
                                       (args.kv_heads, cached, args.dim_qk),
                                       (args.kv_heads, cached, args.dim_v)))
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self.attend()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.attend()

    def attend(self):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                self.q, self.k, self.v, enable_gqa=True)

    def relative_l2(self):
        """Against fp64, which looks at one sequence at a time."""
        self.graph.replay()
        difference = norm = 0.0
        for q, k, v, out in zip(self.q, self.k, self.v, self.out):
            q, k, v, out = (x.double() for x in (q, k, v, out))
            heads = q.shape[0] // k.shape[0]
            logits = q.view(k.shape[0], heads, -1) @ k.transpose(1, 2) * q.shape[2]**-0.5
            expected = (logits.softmax(2) @ v).view(out.shape)
            difference += (out - expected).square().sum().item()
            norm += expected.square().sum().item()
        return (difference / norm)**0.5

    def time(self, flush, reps):
        """Microseconds of each repetition."""
        times = []
        for i in range(-WARM_UPS, reps):
            if flush is not None:
                flush.zero_()
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HOLD_CYCLES)
            begin.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            if i >= 0:
                times.append(begin.elapsed_time(end) * 1e3)
        return times


def measure_decode(args, common):
    """Prints the lines of decoding."""
    if args.check:
        error = DecodeStep(3, 2048, args).relative_l2()
        print(f"relative L2 against fp64, 3 x 2048 cached: {error:.2e}", file=sys.stderr,
              flush=True)
        if not error <= 6e-3:
            sys.exit("dense_attention: wrong result")
    flush = None if args.no_flush else torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for cached in map(int, args.cached.split(",")):
        for batch in map(int, args.batch.split(",")):
            line = {**common, "flush": flush is not None, "cached": cached, "batch": batch}
            try:
                times = DecodeStep(batch, cached, args).time(flush, args.reps)
                median = statistics.median(times)
                line.update({
                    "median_us": round(median, 4), "min_us": round(min(times), 4),
                    "max_us": round(max(times), 4), "reps": len(times),
                    "tokens_per_s": round(batch / median * 1e6, 4),
                    "dense_bytes": batch * cached * args.kv_heads * (args.dim_qk + args.dim_v) * 2})
            except torch.OutOfMemoryError as no_room:
                line["skipped"] = str(no_room)
            torch.cuda.empty_cache()
            print(json.dumps(line), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", default="8192", help="of the global sequence, e.g. 8192,65536")
    parser.add_argument("--pass", dest="name", default="forward",
                        choices=("forward", "backward", "step", "decode"))
    parser.add_argument("--cached", default="16384,65536,262144,1048576", help="of decode")
    parser.add_argument("--batch", default="1,8,32", help="of decode: sequences")
    parser.add_argument("--no_flush", action="store_true", help="of decode: leave the L2 alone")
    parser.add_argument("--q_heads", type=int, default=64)
    parser.add_argument("--kv_heads", type=int, default=4)
    parser.add_argument("--dim_qk", type=int, default=128)
    parser.add_argument("--dim_v", type=int, default=128)
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20, help="past them, 3 repetitions do")
    parser.add_argument("--check", action="store_true", help="on 2048 tokens, against fp64, first")
    args = parser.parse_args()

    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl", device_id=torch.device("cuda", device))

    common = {
        "implementation": "dense", "pass": args.name, "gpu": torch.cuda.get_device_name(),
        "gpus": size, "q_heads": args.q_heads, "kv_heads": args.kv_heads, "dim_qk": args.dim_qk,
        "dim_v": args.dim_v, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    if args.name == "decode":
        if size > 1:
            sys.exit("--pass decode: must run on one GPU")
        measure_decode(args, common)
        return

    def make_values(tokens):
        torch.manual_seed(1)
        return [torch.randn(tokens, heads, dim, dtype=torch.bfloat16, device="cuda")
                for heads, dim in ((args.q_heads, args.dim_qk), (args.kv_heads, args.dim_qk),
                                   (args.kv_heads, args.dim_v), (args.q_heads, args.dim_v))]

    case = ZigZag if size > 1 else OneGpu
    if args.check:
        check(case, 2048, make_values)
    for tokens in map(int, args.tokens.split(",")):
        # Each rank its own values: they do not matter for the time.
        trains = args.name != "forward"
        times, used_mib = time_pass(
            case(tokens, lambda begin, end: make_values(end - begin), trains), args.name, args.reps,
            args.seconds)
        torch.cuda.empty_cache()
        if dist.is_initialized() and dist.get_rank() > 0:
            continue
        print(json.dumps({
            **common, "sharding": "zigzag", "tokens": tokens,
            "median_ms": round(statistics.median(times), 4), "min_ms": round(min(times), 4),
            "max_ms": round(max(times), 4),
            "reps": len(times), "peak_memory_mib": used_mib}), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
