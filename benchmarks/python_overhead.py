#!/usr/bin/env python3
"""What the Python package adds to a call of the C interface, on the host: prints JSON.

python_overhead.py [--tokens 8192] [--device cuda] [--calls 10] [--repetitions 50]

Host times, in bursts of --calls calls that only enqueue; the device is waited for between bursts,
outside of the times. "c" is nsa_engine_forward or _backward with structs that are ready, less what
ctypes takes for a call of a function that does nothing; "python" is nsa.attention, and
torch.autograd.grad of its output; "overhead" their difference. "torch" is the same with a function
of as many tensors that does nothing in place of nsa.attention: what autograd itself takes.
"""

import argparse
import ctypes
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "nsa/python"))

import torch  # noqa: E402

import nsa  # noqa: E402
from nsa import _library  # noqa: E402
from nsa._tensors import Structs  # noqa: E402
from nsa.engine import flatten, places_of  # noqa: E402


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx, d_o):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=50)
    args = parser.parse_args()
    is_gpu = args.device != "cpu"
    dtype = torch.bfloat16 if is_gpu else torch.float32

    config = nsa.Config()  # 64 query and 4 kv heads of 128
    group = nsa.Group.local(args.device)
    engine = nsa.Engine(config, nsa.Plan(args.tokens), group, dtype=dtype)

    def leaf(heads, dim):
        shape = (args.tokens, heads, dim)
        return torch.randn(shape, device=args.device, dtype=dtype).requires_grad_()

    q, k, v = leaf(64, 128), leaf(4, 128), leaf(4, 128)
    gate = torch.rand(args.tokens, 64, 3, device=args.device).requires_grad_()
    inputs = (q, k, v, gate)
    d_o = torch.randn_like(q)

    def time_us(function, before=lambda: None):
        """The median over repetitions of a call's host time; function(before())."""
        times = []
        for _ in range(args.repetitions + 3):
            prepared = [before() for _ in range(args.calls)]
            if is_gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            for arguments in prepared:
                function(arguments)
            times.append((time.perf_counter() - begin) / args.calls * 1e6)
            if is_gpu:
                torch.cuda.synchronize()
        return statistics.median(times[3:])

    # The C interface with structs that are ready.
    tensors = flatten(*(t.detach() for t in inputs))
    gradients = [torch.empty_like(t) if t is not None else None for t in tensors]
    o, saved, stream = torch.empty_like(q), engine.save(), engine._current_stream()
    structs = [
        # Of their own: the engine's are filled anew in each of its calls.
        Structs(kind, names, group.device_index).fill(of, places)
        for kind, names, of, places in (
            (_library.ForwardInputs, _library.INPUTS, tensors, places_of(tensors)),
            (_library.ForwardOutputs, _library.OUTPUTS, (o,), None),
            (_library.OneTensor, ("d_o",), (d_o,), None),
            (_library.Gradients, _library.INPUTS, gradients, places_of(tensors)),
        )
    ]
    c_inputs, c_outputs, c_d_o, c_gradients = map(ctypes.byref, structs)
    lib, handle = _library.lib, engine.handle

    def c_forward(_):
        lib.nsa_engine_forward(handle, c_inputs, c_outputs, saved.handle, stream)

    def c_backward(_):
        lib.nsa_engine_backward(handle, c_inputs, c_d_o, saved.handle, c_gradients, stream)

    nothing = lib.nsa_group_rank
    ctypes_us = time_us(lambda _: nothing(group.handle, None, None))
    results = {}
    for name, c_call, python_call, torch_call in (
        (
            "forward",
            (c_forward,),
            (lambda _: nsa.attention(engine, *inputs),),
            (lambda _: Nothing.apply(*inputs),),
        ),
        (
            "backward",
            (c_backward,),
            (
                lambda o: torch.autograd.grad(o, inputs, d_o),
                lambda: nsa.attention(engine, *inputs),
            ),
            (lambda o: torch.autograd.grad(o, inputs, d_o), lambda: Nothing.apply(*inputs)),
        ),
    ):
        c = time_us(*c_call) - ctypes_us
        python = time_us(*python_call)
        results[name] = {
            "c_us": c,
            "python_us": python,
            "overhead_us": python - c,
            "torch_us": time_us(*torch_call),
        }
    with torch.no_grad():
        python = time_us(lambda _: nsa.attention(engine, *inputs))
        c = time_us(lambda _: lib.nsa_engine_forward(handle, c_inputs, c_outputs, None, stream))
    c -= ctypes_us
    results["forward_without_grad"] = {"c_us": c, "python_us": python, "overhead_us": python - c}
    for result in results.values():
        result.update({name: round(value, 1) for name, value in result.items()})
    print(
        json.dumps(
            {
                "benchmark": "python_overhead",
                "command": " ".join(["benchmarks/python_overhead.py", *sys.argv[1:]]),
                "device": torch.cuda.get_device_name() if is_gpu else "cpu",
                "torch": torch.__version__,
                "tokens": args.tokens,
                "ctypes_us": round(ctypes_us, 2),
                "results": results,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
