#!/usr/bin/env python3
"""What the Python package adds to a call of the C interface, on the host: prints JSON.

python_overhead.py [--tokens 8192] [--device cuda] [--calls 10] [--repetitions 50]

Host times of nsa.attention, and of torch.autograd.grad of its output, in bursts of --calls calls
that only enqueue; the device is waited for between bursts, outside of the times. In us, [median,
least, largest] of the bursts:

    layer     with a library whose functions do nothing: all that is not the library's time
    autograd  of these, what an autograd function takes that makes as many results and calls it
    python    with the library
    c         nsa_engine_forward or _backward alone, with structs that are ready
    bare      the same in an autograd function that does nothing else
    added     python less c, of bursts in turns. What a call of the library takes depends on what ran
              before it and in which thread, so this differs more from run to run
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

    def burst_us(function, before=lambda: None):
        """Host time of a call function(before())."""
        prepared = [before() for _ in range(args.calls)]
        if is_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for arguments in prepared:
            function(arguments)
        duration = time.perf_counter() - begin
        if is_gpu:
            torch.cuda.synchronize()
        return duration / args.calls * 1e6

    def time_us(*cases):
        """The times over repetitions of each case, a tuple of arguments of burst_us; in turns."""
        rounds = [[burst_us(*case) for case in cases] for _ in range(args.repetitions + 3)]
        return list(zip(*rounds[3:]))

    # The C interface with structs that are ready.
    tensors = flatten(*(t.detach() for t in inputs))
    d_inputs = [torch.empty_like(t) if t is not None else None for t in tensors]
    o, saved, stream = torch.empty_like(q), engine.save(), engine._current_stream()
    structs = [
        # Of their own: the engine's are filled anew in each of its calls.
        Structs(kind, names, group.device_index).fill(of, places)
        for kind, names, of, places in (
            (_library.ForwardInputs, _library.INPUTS, tensors, places_of(tensors)),
            (_library.ForwardOutputs, _library.OUTPUTS, (o,), None),
            (_library.OneTensor, ("d_o",), (d_o,), None),
            (_library.Gradients, _library.INPUTS, d_inputs, places_of(tensors)),
        )
    ]
    c_inputs, c_outputs, c_d_o, c_gradients = map(ctypes.byref, structs)
    lib, handle = _library.lib, engine.handle

    functions = lib.nsa_engine_forward, lib.nsa_engine_backward

    def c_forward(_):
        lib.nsa_engine_forward(handle, c_inputs, c_outputs, None, stream)

    def c_forward_saved(_):
        lib.nsa_engine_forward(handle, c_inputs, c_outputs, saved.handle, stream)

    def c_backward(_):
        lib.nsa_engine_backward(handle, c_inputs, c_d_o, saved.handle, c_gradients, stream)

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            c_forward_saved(None)
            return torch.empty_like(tensors[0])

        @staticmethod
        def backward(ctx, d_o):
            c_backward(None)
            return tuple(map(torch.empty_like, ctx.saved_tensors))

    def attention(_=None):
        return nsa.attention(engine, *inputs)

    def bare(_=None):
        return Bare.apply(*inputs)

    def gradients(o):
        return torch.autograd.grad(o, inputs, d_o)

    @torch.no_grad()
    def attention_without_grad(_):
        return nsa.attention(engine, *inputs)

    def bare_without_grad(_):
        c_forward(None)
        return torch.empty_like(q)

    results = {}
    for name, c_call, case, bare_case in (
        ("forward", c_forward, (attention_without_grad,), (bare_without_grad,)),
        ("forward_with_grad", c_forward_saved, (attention,), (bare,)),
        ("backward", c_backward, (gradients, attention), (gradients, bare)),
    ):
        c, python, of_bare = time_us((c_call,), case, bare_case)
        for function in ("nsa_engine_forward", "nsa_engine_backward"):
            setattr(lib, function, lambda *_: 0)
        layer, autograd = time_us(case, bare_case)
        lib.nsa_engine_forward, lib.nsa_engine_backward = functions
        added = [p - of for p, of in zip(python, c)]
        times = dict(layer=layer, autograd=autograd, python=python, c=c, bare=of_bare, added=added)
        results[name] = {
            of: [round(figure(values), 1) for figure in (statistics.median, min, max)]
            for of, values in times.items()
        }
    print(
        json.dumps(
            {
                "benchmark": "python_overhead",
                "command": " ".join(["benchmarks/python_overhead.py", *sys.argv[1:]]),
                "device": torch.cuda.get_device_name() if is_gpu else "cpu",
                "torch": torch.__version__,
                "tokens": args.tokens,
                "calls": args.calls,
                "repetitions": args.repetitions,
                "results": results,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
