"""Checks of the Triton kernels of pooling, norms, stem and first convolution, in the interpreter and compiled
for an H100."""
import subprocess
import sys

from test_airbench import MAINS, images, main, model_of
from test_smoke import ENV

import pytest
import torch
import torch.nn.functional as F

def pooled_maps(n, channels, height, width, dtype=torch.float32, seed=0):
    """Maps whose channels have means of up to seven deviations."""
    torch.manual_seed(seed)
    maps = torch.randn(n, channels, height, width) * 3 + torch.linspace(-20, 20, channels)[:, None, None]
    return maps.to(dtype, memory_format=torch.channels_last)

def pool_norm_act(inputs, grad, bias, interpret, monkeypatch, number=15):
    """Outputs, running statistics, gradients of inputs and bias, in double precision."""
    norm, inputs = main(number).BatchNorm(inputs.shape[1]), inputs.clone().requires_grad_()
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    norm.bias.data.copy_(bias)
    outputs = norm.pooled(inputs)
    outputs.backward(grad.to(outputs.dtype))
    assert outputs.dtype == inputs.grad.dtype == inputs.dtype
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in (outputs, inputs.grad))
    return [value.detach().double() for value in (
        outputs, norm.running_mean, norm.running_var, inputs.grad, norm.bias.grad)]

# of all sizes from 20, 24, 28 and 32 pixels, and others
MAPS = [(3, 64, 23, 21), (2, 64, 27, 27), (1, 64, 31, 31), (2, 256, 6, 6), (2, 128, 5, 5), (4, 64, 7, 3),
        (2, 64, 19, 19), *((1, 256, side, side) for side in (9, 11, 13, 15, 7))]

@pytest.mark.parametrize("shape, number", [(shape, 15) for shape in MAPS] + [
    (MAPS[0], 16), (MAPS[3], 16), (MAPS[1], 23), (MAPS[4], 23)])
def test_fused_norm_equals_its_plain_form(shape, number, monkeypatch):
    """In Triton's interpreter: within 1e-5 in fp32, in fp16 no further from fp32 than the plain form is."""
    inputs, bias = pooled_maps(*shape), torch.randn(shape[1])
    grad = torch.randn(shape[0], shape[1], shape[2] // 2, shape[3] // 2)
    exact = pool_norm_act(inputs, grad, bias, "", monkeypatch, number)
    pooled = pool_norm_act(inputs, grad, bias, "1", monkeypatch, number)
    for name, fast, slow in zip("outputs mean var inputs bias".split(), pooled, exact):
        assert (fast - slow).abs().max() <= 1e-5 * slow.abs().max(), name
    inputs, grad = inputs.half(), grad.half()
    exact = pool_norm_act(inputs.float(), grad.float(), bias, "", monkeypatch, number)
    fast, slow = (pool_norm_act(inputs, grad, bias, interpret, monkeypatch, number)
                  for interpret in ("1", ""))
    for name, a, b, c in zip("outputs mean var inputs bias".split(), fast, slow, exact):
        assert (a - c).abs().max() <= (b - c).abs().max() + 1e-5 * c.abs().max(), name

def test_fused_norm_gives_ties_to_the_first_pixel(monkeypatch):
    """As torch does; also where a window is all zeros or holds NaN, whose place then takes the gradient."""
    inputs = torch.randint(3, (4, 64, 9, 9)).float().contiguous(memory_format=torch.channels_last)
    inputs[0, :, :2, :2] = 0
    grad, bias = torch.randn(4, 64, 4, 4), torch.zeros(64)
    fast, slow = (pool_norm_act(inputs, grad, bias, interpret, monkeypatch) for interpret in ("1", ""))
    assert torch.equal(fast[3] != 0, slow[3] != 0) and torch.allclose(fast[3], slow[3], atol=1e-5)
    assert not fast[3][:, :, 8].any() and not fast[3][..., 8].any()  # cut off by the pooling
    inputs[1, 5, 3, 2] = float("nan")
    outputs = pool_norm_act(inputs, grad, bias, "1", monkeypatch)[0]
    assert outputs[:, 5].isnan().all() and outputs.isnan().any(3).any(2).any(0).sum() == 1

def test_fused_statistics_bear_a_large_mean(monkeypatch):
    """The sum of squares alone would leave nothing of a variance of 1 beside a mean of 4000."""
    inputs, grad = torch.randn(4, 64, 16, 16) + 4000, torch.randn(4, 64, 8, 8)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    fast = pool_norm_act(inputs, grad, torch.zeros(64), "1", monkeypatch)
    exact = F.max_pool2d(inputs.double(), 2).var((0, 2, 3)) * 0.4 + 0.6
    assert torch.allclose(fast[2], exact, rtol=1e-4)

def test_last_step_trains_as_the_one_before(monkeypatch):
    """One step of main15 with its kernels, in the interpreter, against main14 without any."""
    torch.manual_seed(1)
    inputs = torch.randn(4, 3, 24, 24).contiguous(memory_format=torch.channels_last)
    models = [model_of(main(number)) for number in (14, 15)]
    models[1].load_state_dict(models[0].state_dict())
    for model, interpret in zip(models, ("", "1")):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        F.cross_entropy(model(inputs) * 30, torch.arange(4), reduction="sum").backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        assert p.grad is None or (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max(), name
    for (name, value), other in zip(models[0].named_buffers(), models[1].buffers()):
        assert "running" not in name or torch.allclose(value, other, atol=1e-5), name
    views = [model.eval()(inputs) for model in models]
    assert torch.allclose(*views, atol=1e-5)

@pytest.mark.parametrize("number, warps, threads", [
    (15, 16, (512, 512)), (16, 16, (512, 512)), (23, 4, (640, 896)), (26, 4, (640, 896)),
    (27, 4, (640, 896)), (28, 4, (640, 896))])
def test_fused_norm_compiles_for_a_gpu(number, warps, threads):
    """To machine code for an H100, without a GPU, of which so many threads find registers at a time; and
    torch.compile takes a group, or the whole network with its stem, in one piece, from whose outputs the
    gradient reaches the kernel. In its own process, where nothing is interpreted."""
    code = f"""
import os, re, subprocess, sys, tempfile, types, torch, torch.utils._triton, triton
sys.path.insert(0, {str(MAINS[number].parent)!r})
import {MAINS[number].stem} as m
from torch._functorch.aot_autograd import aot_module_simplified
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
target = GPUTarget("cuda", 90, 32)
for kernel, threads in zip((m._pool_fwd_kernel, m._pool_bwd_kernel), {threads}):
    types_ = {{name: "*fp16" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}}
    types_ |= {{name: kind for name, kind in dict(tap_ptr="*i8", part_ptr="*fp32", stat_ptr="*fp32").items()
               if name in types_}}
    sides = "height", "width"
    aligned = {{(i,): [["tt.divisibility", 16]] for i, name in enumerate(types_) if name not in sides}}
    source = ASTSource(fn=kernel, signature=types_, attrs=aligned)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(triton.compile(source, target=target, options=dict(num_warps={warps})).asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    registers = -(-int(re.search("REG:([0-9]+)", usage)[1]) // 8) * 8  # of 65536, in eights
    assert 65536 // (registers * 32 * {warps}) * 32 * {warps} == threads, usage
if {number} > 21:
    fixed = dict(size=32, C=24, BLOCK=128, LANES=32)
    kinds = {{name: "constexpr" if name in fixed else "*fp16" for name in m._stem_fwd_kernel.arg_names}}
    source = ASTSource(fn=m._stem_fwd_kernel, signature=dict(kinds, total="i32"), constexprs=fixed)
    assert len(triton.compile(source, target=target).asm["cubin"]) > 1000
for kernel, stages, steps, sign in (("_conv_fwd_kernel", 2, 0, "wgmma"), ("_conv_bwd_kernel", 1, 32, "wgmma"),
                                    ("_sums_bwd_kernel", 3, 4, ""), ("_stats_fwd_kernel", 3, 4, "")):
    if kernel := getattr(m, kernel, None):  # on tensor cores, with whole vectors from memory
        fixed = dict(BLOCK=64, STEPS=steps)
        kinds = {{name: "*fp16" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}}
        kinds |= dict(tap_ptr="*i8", part_ptr="*fp32", stat_ptr="*fp32", dW_ptr="*fp32") | {{
            name: "constexpr" for name in fixed}}
        kinds = {{name: kinds[name] for name in kernel.arg_names}}
        pointers = {{(i,): [["tt.divisibility", 16]] for i, name in enumerate(kinds)
                    if name[-4:] == "_ptr" or name == "C"}}
        values = {{name: value for name, value in fixed.items() if name in kinds}}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=values, attrs=pointers)
        made = triton.compile(source, target=target, options=dict(num_warps=4, num_stages=stages)).asm["ptx"]
        assert sign in made and ("ld.global.v4" in made or "cp.async.cg" in made)
        assert "ld.global.b16" not in made and ".local" not in made, kernel
os.environ["TRITON_INTERPRET"] = "1"  # now kernels are taken on a CPU, but as they are
torch.utils._triton.has_triton = lambda: True
triton.runtime.driver.set_active(types.SimpleNamespace(get_current_target=lambda: target))
def check(joint, *_, **__):
    reached, kernels = set(), []
    for node in joint.graph.nodes:
        if node.name.startswith("tangents") or reached & set(node.all_input_nodes):
            reached.add(node)
        if "triton" in str(node.target):
            kernels.append(node in reached)
    forward = 7 if {number} > 27 else 4 if {number} > 21 else 1
    backward = 9 if {number} > 27 else 6 if {number} > 26 else 3 if {number} > 21 else 1
    assert kernels == [False] * forward + [True] * backward, kernels
    os._exit(0)
model = (m.CifarNet() if {number} > 21 else m.ConvGroup(64, 64)).half()
for norm in [module for module in model.modules() if isinstance(module, m.BatchNorm)]:
    norm.float()
model.compile(dynamic=False, fullgraph=True, backend=lambda graph, inputs: aot_module_simplified(
    graph, inputs, fw_compiler=None, bw_compiler=None, partition_fn=check))
arguments = ((8, 3, 24, 24), False) if {number} > 21 else ((8, 64, 9, 9),)
model(torch.randn(arguments[0]).half().to(memory_format=torch.channels_last), *arguments[1:])
"""
    done = subprocess.run([sys.executable, "-c", code], env=dict(ENV, TORCH_COMPILE_DISABLE="0"))
    assert done.returncode == 0

@pytest.mark.parametrize("size", [32, 28, 24, 20, 5])
def test_stem_kernel_equals_its_plain_form(size, monkeypatch):
    """In the interpreter, in fp32 and as near in fp16 as rounding allows; a live bias gets its gradient."""
    model, module = model_of(main(22)), main(22)
    weight, bias = model.stem.weight.data, model.stem.bias.detach() + torch.randn(24)
    for inputs in (torch.randn(3, 3, size, size), torch.randn(3, size, size, 3).permute(0, 3, 1, 2)):
        slow = F.gelu(F.conv2d(inputs.double(), weight.double(), bias.double()))
        for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
            fast = module.stem(*(part.to(dtype) for part in (inputs, weight, bias)))
            assert fast.shape == slow.shape and fast.is_contiguous(memory_format=torch.channels_last)
            assert fast.dtype == dtype and (fast - slow).abs().max() <= bound * slow.abs().max()
    monkeypatch.setattr(module, "_stem_fwd_kernel", None)
    bias.requires_grad_()
    module.stem(inputs, weight, bias).sum().backward()
    x = F.conv2d(inputs, weight, bias).detach().requires_grad_()
    F.gelu(x).sum().backward()
    assert torch.allclose(bias.grad, x.grad.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("size", [20, 23])
def test_stem_kernel_fills_what_it_is_given(size, monkeypatch):
    module = main(44)
    model, inputs = model_of(module), module.normalize(images(3))[:, :, :size, :size]
    out = torch.full((3, 24, size - 1, size - 1), torch.nan).to(memory_format=torch.channels_last)
    slow = F.gelu(model.stem(inputs))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with torch.no_grad():
        assert module.stem(inputs, model.stem.weight, model.stem.bias, out) is out
    assert torch.allclose(out, slow, atol=1e-5) and out.is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize("side, n, number", [(31, 3, 26), (27, 3, 26), (23, 3, 26), (19, 3, 26),
                                             (8, 130, 26),  # in two programs
                                             (19, 70, 35)])  # in 45 of two steps, or one
def test_convolution_with_pooling_equals_its_plain_form(side, n, number, monkeypatch):
    """In the interpreter, on small whole numbers, whose products all forms add up without rounding, so that
    they agree on what is largest."""
    module, out = main(number), []
    inputs, grad = torch.randint(-2, 3, (n, 24, side, side)), torch.randn(n, 64, side // 2, side // 2)
    inputs[:, :, :2, -2:] = 0  # ties
    weight = torch.randint(-2, 3, (64, 24, 3, 3))
    for dtype, fused in ((torch.float64, False), (torch.float32, True), (torch.float16, False),
                         (torch.float16, True)):
        monkeypatch.setenv("TRITON_INTERPRET", "1" if fused else "")
        conv, norm = module.Conv(24, 64).to(dtype), module.BatchNorm(64)
        norm = norm.double() if dtype == torch.float64 else norm
        conv.weight.data.copy_(weight)
        maps = inputs.to(dtype, memory_format=torch.channels_last)
        outputs = norm.pooled(maps, conv)
        outputs.backward(grad.to(dtype))
        assert outputs.dtype == conv.weight.grad.dtype == dtype
        assert outputs.is_contiguous(memory_format=torch.channels_last)
        out.append([value.detach().double() for value in (
            outputs, norm.running_mean, norm.running_var, conv.weight.grad, norm.bias.grad)])
    for name, slow, fast, usual, half in zip("outputs mean var weight bias".split(), *out):
        assert (fast - slow).abs().max() <= 1e-5 * slow.abs().max(), name
        assert (half - slow).abs().max() <= (usual - slow).abs().max() + 1e-3 * slow.abs().max(), name

def test_convolution_with_pooling_is_taken_once_the_stem_is_frozen(monkeypatch):
    """And trains as the script before does."""
    taken, models = [], [model_of(main(number)) for number in (25, 26)]
    monkeypatch.setattr(main(26), "_conv_fwd_kernel", Counted(main(26)._conv_fwd_kernel, taken))
    models[1].load_state_dict(models[0].state_dict())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = torch.randn(2, 3, 24, 24)
    for train_stem, count in ((True, 0), (False, 1)):
        grads = []
        for model in models:
            model.zero_grad()
            F.cross_entropy(model(inputs, train_stem) * 30, torch.tensor([3, 8])).backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(taken) == count and len(grads[0]) == len(grads[1])
        for one, two in zip(*grads):
            assert (one - two).abs().max() <= 1e-4 * one.abs().max()
    for model in models:
        model.eval()(inputs)
    assert len(taken) == 1

class Counted:
    """A kernel that notes how it is launched."""
    def __init__(self, kernel, taken):
        self.kernel, self.taken = kernel, taken
    def __getitem__(self, grid):
        self.taken.append(grid)
        return self.kernel[grid]

def test_stem_kernel_is_taken_in_tests_and_once_the_stem_is_frozen(monkeypatch):
    taken, model, module = [], model_of(main(22)), main(22)
    monkeypatch.setattr(module, "_stem_fwd_kernel", Counted(module._stem_fwd_kernel, taken))
    inputs = torch.randn(2, 3, 24, 24)
    for train_stem, count in ((True, 0), (False, 1)):
        model(inputs, train_stem)
        assert len(taken) == count
    other = model_of(main(21))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        views = [model.eval()(inputs), other.eval()(inputs)]
    assert len(taken) == 2 and torch.allclose(*views, atol=1e-4)

@pytest.mark.parametrize("number, n, size", [(27, 16, 24), (28, 40, 32), (35, 40, 20)])
def test_sums_from_kernels_give_the_same_gradients(number, n, size, monkeypatch):
    """In the interpreter, in fp32, beside main26 without kernels."""
    models, found = [model_of(main(each)) for each in (number, 26)], []
    inputs = main(number).normalize(images(n))[:, :, :size, :size]
    for model, interpret in zip(models, ("1", "")):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(0.1 * name.endswith("bias"))
        F.cross_entropy(model(inputs, False) * 30, torch.arange(n) % 10).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None] + [
            value for name, value in model.named_buffers() if "running" in name])
    for fast, slow in zip(*found, strict=True):
        assert (fast - slow).abs().max() <= 1e-4 * slow.abs().max()

def test_small_blocks_need_few_registers():
    """Those of main35 for the sums, as compiled for an H100; those of main28 leave some in memory."""
    code = f"""
import re, subprocess, sys, tempfile, triton
sys.path.insert(0, {str(MAINS[35].parent)!r})
import {MAINS[35].stem} as m
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
names = m._sums_bwd_kernel.arg_names
for block, steps, most, spilled in ((64, 4, 256, True), (16, 16, 80, False)):
    fixed = dict(BLOCK=block, STEPS=steps)
    kinds = {{name: "constexpr" if name in fixed else "*fp32" if name in ("stat_ptr", "part_ptr") else
             "*fp16" if name.endswith("_ptr") else "i32" for name in names}}
    aligned = {{(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if name.endswith("_ptr") or name == "C"}}
    source = ASTSource(fn=m._sums_bwd_kernel, signature=kinds, constexprs=fixed, attrs=aligned)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    registers, stack = (int(re.search(name + ":([0-9]+)", usage)[1]) for name in ("REG", "STACK"))
    assert registers <= most and bool(stack) == spilled, usage
"""
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True)

def test_shifted_squares_bear_a_large_mean(monkeypatch):
    """As test_fused_statistics_bear_a_large_mean, for those of main28, in programs of unequal size."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs, norm = torch.randn(3, 64, 11, 11) + 4000, main(28).BatchNorm(64)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    norm.activated(inputs)
    exact = inputs.double().var((0, 2, 3)) * norm.momentum + 1 - norm.momentum
    assert torch.allclose(norm.running_var.double(), exact, rtol=1e-4)
    assert torch.allclose(norm.running_mean.double(), inputs.double().mean((0, 2, 3)) * norm.momentum)
