#!/usr/bin/env python3
"""Checks a GPU machine, one line for each check: `smoke.py torch|te|all-kernels [--dry]`.

The checks are independent: after a failure the other checks still run. The exit status is the
number of failures. With --dry, for a machine without a GPU, the program only imports the modules.
"""

import argparse
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

Check = Callable[[], object]
BIG = 8192  # rows and columns of the matrices in the timed products


def run(checks: dict[str, Check]) -> int:
    """Runs all checks and returns the number of failures."""
    failures = 0
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            said = check()
        except BaseException as error:  # on an unknown machine anything may fail
            failures += 1
            traceback.print_exc()
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            verdict = "FAIL"
        else:
            verdict = "ok  "
        seconds = time.perf_counter() - start
        print(f"CHECK {verdict} {name} {seconds:.1f}s {said or ''}", flush=True)
    return failures


def milliseconds(work: Check) -> float:
    """Returns the median time of ten repeats, after three warm-up repeats."""
    times = []
    for repeat in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def error_of(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the relative error: the norm of the difference over the norm of the reference.

    Raises:
        ValueError: the error is not below 0.2.
    """
    error = float((ours.double() - reference.double()).norm() / reference.double().norm())
    if not error < 0.2:
        raise ValueError(f"relative error {error}")
    return error


def random(*shape: int) -> torch.Tensor:
    """Returns a random tensor in bfloat16."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def loopback() -> str:
    """Checks that a process can connect to itself, as ranks do; resolves the host's name."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    name = socket.gethostname()
    try:
        return f"{name} is {socket.gethostbyname(name)}"
    except OSError as error:
        return f"{name} cannot be resolved ({error})"


def device() -> str:
    """Describes the GPU."""
    card = torch.cuda.get_device_properties(0)
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    return (
        f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} SMs, "
        f"{free:.1f} of {total:.1f} GiB free, torch {torch.__version__}"
    )


def product_bf16() -> str:
    """Measures the speed of a matrix product in BF16."""
    a, b = random(BIG, BIG), random(BIG, BIG)
    return f"{2 * BIG**3 / milliseconds(lambda: a @ b) / 1e9:.0f} TFLOP/s"


def product_fp8() -> str:
    """Measures the speed of a matrix product in FP8."""
    a, b = (random(BIG, BIG).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def work() -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return f"{2 * BIG**3 / milliseconds(work) / 1e9:.0f} TFLOP/s"


def copy() -> str:
    """Measures the speed of a copy in GPU memory."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source))
    return f"{2 * source.nbytes / took / 1e6:.0f} GB/s read and written"


def collectives() -> str:
    """Checks NCCL and gloo with a single rank."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK="0", WORLD_SIZE="1")
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl")
    torch.distributed.all_reduce(torch.ones(4, device="cuda"))
    torch.distributed.barrier()
    gloo = torch.distributed.new_group(backend="gloo")
    torch.distributed.all_reduce(torch.ones(1), group=gloo)
    torch.distributed.destroy_process_group()
    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def compilation() -> str:
    """Checks a kernel that torch.compile makes."""

    def gated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * y

    x, y = random(512, 512), random(512, 512)
    return f"relative error {error_of(torch.compile(gated)(x, y), gated(x, y)):.1e}"


def of_torch(dry: bool) -> dict[str, Check]:
    """Returns the checks of what torch needs from the machine."""
    if dry:
        return {"torch": lambda: torch.__version__}
    return {
        "loopback": loopback,
        "device": device,
        "matmul-bf16": product_bf16,
        "matmul-fp8": product_fp8,
        "copy": copy,
        "nccl": collectives,
        "torch.compile": compilation,
    }


def te_import() -> str:
    """Checks that Transformer Engine loads, and reports which FP8 recipes it supports."""
    import transformer_engine
    import transformer_engine.pytorch as te

    return (
        f"{transformer_engine.__version__}, cuDNN {te.get_cudnn_version()}, "
        f"fp8 {te.is_fp8_available(return_reason=True)}, "
        f"blockwise {te.is_fp8_block_scaling_available(return_reason=True)}"
    )


def te_imports_dry() -> str:
    """Checks the same without a GPU, through Megatron."""
    import transformer_engine.pytorch  # noqa: F401
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return f"HAVE_TE {HAVE_TE}"


def te_linear(name: str, recipe_name: str | None) -> str:
    """Checks a linear layer, forward and backward, against float64."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    settings = getattr(recipe, recipe_name)() if recipe_name else None
    torch.manual_seed(1)
    layer = getattr(te, name)(1024, 512, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = random(512, 1024).requires_grad_()
    for _ in range(3):  # delayed scales are not known in the first step
        layer.zero_grad()
        x.grad = None
        with te.autocast(enabled=settings is not None, recipe=settings):
            out = layer(x)
        out.float().square().sum().backward()
    exact_x, exact_w = (y.detach().double().requires_grad_() for y in (x, layer.weight))
    normed = exact_x
    if name == "LayerNormLinear":
        normed = torch.nn.functional.layer_norm(exact_x, (1024,))
    exact = normed @ exact_w.t()
    exact.square().sum().backward()
    pairs = ((out, exact), (x.grad, exact_x.grad), (layer.weight.grad, exact_w.grad))
    return "relative errors out {:.1e} dx {:.1e} dw {:.1e}".format(*(error_of(*y) for y in pairs))


def te_norm() -> str:
    """Checks RMSNorm, a kernel of Transformer Engine's own; matrix products are cuBLAS kernels."""
    import transformer_engine.pytorch as te

    x = random(512, 1024)
    ours = te.RMSNorm(1024, params_dtype=torch.bfloat16, device="cuda")(x)
    return f"relative error {error_of(ours, torch.nn.functional.rms_norm(x.double(), (1024,))):.1e}"


def te_adam() -> str:
    """Checks three steps of fused Adam against torch's AdamW."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    start, gradient = torch.randn(2, 4096, device="cuda")
    moved = []
    for kind in (FusedAdam, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=1e-2, weight_decay=0.01)
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
        moved.append(parameter.detach() - start)
    return f"relative error {error_of(*moved):.1e}"


def te_rope() -> str:
    """Checks the fused rotary embedding at angles of 0."""
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb

    x = random(64, 2, 4, 32)
    angles = torch.zeros(64, 1, 1, 32, device="cuda")
    return f"relative error {error_of(fused_apply_rotary_pos_emb(x, angles), x):.1e}"


def te_attention(kind: str, layout: str) -> str:
    """Checks attention, forward and backward, against float64.

    Args:
        kind: kind of mask, by Transformer Engine's name.
        layout: `sbhd`, or `thd` with two documents in each row.
    """
    import transformer_engine.pytorch as te

    os.environ |= dict(NVTE_DEBUG="1", NVTE_DEBUG_LEVEL="1")  # prints the chosen kernels
    s, b, heads, size = 256, 2, 8, 64
    ends = [0, 100, s, s + 17, 2 * s]
    q, k, v = (random(s, b, heads, size).requires_grad_() for _ in range(3))
    layer = te.DotProductAttention(
        heads, size, attention_dropout=0.0, qkv_format=layout, attn_mask_type=kind
    )
    if layout == "sbhd":
        out = layer(q, k, v, attn_mask_type=kind).view(s, b, heads, size)
    else:
        bounds = torch.tensor(ends, dtype=torch.int32, device="cuda")
        limits = dict(cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=s, max_seqlen_kv=s)
        flat = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        out = layer(*flat, qkv_format=layout, attn_mask_type=kind, **limits)
        out = out.view(b, s, heads, size).transpose(0, 1)
    out.float().square().sum().backward()
    query, key, value = (
        x.detach().double().permute(1, 2, 0, 3).requires_grad_() for x in (q, k, v)
    )
    number = torch.zeros(b * s, device="cuda")
    for end in ends[1:-1] if layout == "thd" else ():
        number[end:] += 1
    number = number.view(b, 1, s)
    mask = number[..., :, None] == number[..., None, :]
    mask = mask.tril() if kind == "causal" else mask
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    expected.square().sum().backward()
    assert q.grad is not None and query.grad is not None
    pairs = ((out, expected), (q.grad, query.grad))
    return "relative errors out {:.1e} dq {:.1e}".format(
        *(error_of(x, y.permute(2, 0, 1, 3)) for x, y in pairs)
    )


def of_transformer_engine(dry: bool) -> dict[str, Check]:
    """Returns the checks of what training needs from Transformer Engine."""
    if dry:
        return {"te-import": te_imports_dry}
    linears = {
        "te-linear-bf16": ("Linear", None),
        "te-layernormlinear-bf16": ("LayerNormLinear", None),
        "te-linear-fp8-current": ("Linear", "Float8CurrentScaling"),
        "te-linear-fp8-delayed": ("Linear", "DelayedScaling"),
        "te-layernormlinear-fp8-delayed": ("LayerNormLinear", "DelayedScaling"),
        "te-linear-fp8-blockwise": ("Linear", "Float8BlockScaling"),
    }
    return {
        "te-import": te_import,
        "te-rmsnorm": te_norm,
        **{name: call(te_linear, *given) for name, given in linears.items()},
        "te-adam": te_adam,
        "te-rope": te_rope,
        "te-attention-full": call(te_attention, "no_mask", "sbhd"),
        "te-attention-causal": call(te_attention, "causal", "sbhd"),
        "te-attention-documents": call(te_attention, "padding", "thd"),
    }


def call(function: Callable[..., Any], *given: Any) -> Check:
    """Turns a function with arguments into a check."""
    return lambda: function(*given)


def all_kernels() -> str:
    """Loads all GPU code at once; run with CUDA_MODULE_LOADING=EAGER."""
    import transformer_engine.pytorch as te

    te.RMSNorm(64, device="cuda")(torch.randn(4, 64, device="cuda"))
    torch.cuda.synchronize()
    mode = os.environ.get("CUDA_MODULE_LOADING")
    return f"loading {mode}, {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB free"


def main() -> None:
    """Runs the requested checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["torch", "te", "all-kernels"])
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if args.what == "torch":
        checks = of_torch(args.dry)
    elif args.what == "te":
        checks = of_transformer_engine(args.dry)
    else:
        checks = {"all-kernels": all_kernels}
    if "te-import" in checks and run({"te-import": checks.pop("te-import")}):
        sys.exit(1)  # the other checks would fail for the same reason
    sys.exit(run(checks))


if __name__ == "__main__":
    main()
