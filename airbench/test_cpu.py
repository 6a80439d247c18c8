"""Checks of what main45 and main46 do on a CPU alone: memory that is kept, and convolutions of bytes; and of
the table of steps there."""
import subprocess
import sys

import test_airbench
from test_airbench import MAINS, main, model_of
from test_smoke import read_results

import pytest
import torch
import torch.nn.functional as F

FAULTS = """
import importlib.util, resource, sys, torch
spec = importlib.util.spec_from_file_location("script", sys.argv.pop(1))
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
script.load_data = lambda folder: sys.exit()  # memory is kept before
try:
    script.main(script.argument_parser().parse_args())
except SystemExit:
    pass
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [torch.ones(2 ** 24) is None or count() for _ in range(50)]  # 64 MiB; glibc gives back over 32
print("faults", counts[-1] - counts[39])  # the heap may grow for some of the first
"""

@pytest.mark.parametrize("number", [44, 45])
def test_memory_is_kept(number, tmp_path):
    """Pages that are written anew after they were freed are as good as never asked for again."""
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, MAINS[number], "--device", "cpu", "--out", tmp_path / "line.jsonl"],
        capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    faults = int(run.stdout.split("faults ")[1])
    assert faults < 16384 if number == 45 else faults > 10 * 16384 - 100  # pages of one, or of all ten

def maps_like(*shape, seed=0):
    """Like those after a norm and SiLU, in bf16 and channels_last; each image has a scale of its own."""
    torch.manual_seed(seed)
    maps = F.silu(torch.randn(shape)) * torch.arange(1.0, shape[0] + 1).view(-1, 1, 1, 1)
    return maps.bfloat16().contiguous(memory_format=torch.channels_last)

def rounded(values, dims):
    """To 127 steps of the largest along dims."""
    unit = values.abs().amax(dims, keepdim=True) / 127
    return (values / unit).round() * unit

@pytest.mark.parametrize("shape, channels", [((3, 64, 9, 9), 256), ((2, 256, 7, 5), 64), ((4, 64, 1, 2), 64)])
def test_convolution_of_bytes(shape, channels):
    """That of values rounded by image and by filter, to bf16; gradients as without bytes, within 3 %."""
    module, inputs = main(46), maps_like(*shape).requires_grad_()
    filters = (torch.randn(channels, shape[1], 3, 3) * torch.rand(channels, 1, 1, 1)).requires_grad_()
    outputs = module.ByteConv.apply(inputs, filters)
    slow = F.conv2d(rounded(inputs.float(), (1, 2, 3)), rounded(filters, (1, 2, 3)), padding=1)
    assert outputs.dtype == torch.bfloat16
    assert outputs.is_contiguous(memory_format=torch.channels_last) and shape[2] > 1 or shape[2] == 1
    atol = 1e-3 * slow.abs().amax((1, 2, 3)).min().item()
    assert torch.allclose(outputs.float(), slow, rtol=2 ** -7, atol=atol)
    grad = maps_like(*outputs.shape, seed=1)
    outputs.backward(grad)
    exact = [part.detach().float().requires_grad_() for part in (inputs, filters)]
    F.conv2d(*exact, padding=1).backward(grad.float())
    for part, right, bound in zip((inputs, filters), exact, (0.03, 0.005)):
        assert (part.grad.float() - right.grad).norm() < bound * right.grad.norm()
    assert filters.grad.dtype == torch.float32 and inputs.grad.dtype == torch.bfloat16
    assert (module.scaled_conv(torch.zeros_like(inputs), filters) == 0).all()  # an image that is learned

def test_bytes_are_for_training_in_bf16_alone(monkeypatch):
    """And for convolutions of more than the channels of the stem; their gradients, too."""
    module, sizes = main(46), []
    monkeypatch.setenv("TRITON_INTERPRET", "")
    call = module.byte_conv
    monkeypatch.setattr(module, "byte_conv", lambda maps, filters: (
        sizes.append((*filters.shape[1::-1],)), call(maps, filters))[1])
    model, inputs = model_of(module), torch.randn(4, 3, 20, 20)
    for mode, bf16, found in ((True, False, []), (False, True, []), (True, True, [
            (64, 64), (64, 256), (256, 256), (256, 256), (256, 256),
            (256, 256), (256, 256), (256, 256), (256, 64), (64, 64)])):
        model.train(mode)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(inputs).sum().backward()
        assert sizes == found

def test_convolution_of_bytes_compiled(monkeypatch):
    """The compiler joins the rounding to what is before it and leaves the convolution alone."""
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)  # they miss byte_conv_like()
    module, inputs = main(46), maps_like(2, 64, 9, 9).requires_grad_()
    filters, grad = torch.randn(64, 64, 3, 3, requires_grad=True), maps_like(2, 64, 9, 9, seed=1)
    found = []
    for conv in (module.ByteConv.apply, torch.compile(module.ByteConv.apply, fullgraph=True)):
        outputs = conv(inputs * 2, filters)
        found.append((outputs, *torch.autograd.grad(outputs, (inputs, filters), grad)))
    for eager, compiled in zip(*found):
        assert eager.dtype == compiled.dtype
        atol = 0.02 * eager.abs().max().item()
        assert torch.allclose(eager.float(), compiled.float(), rtol=0.02, atol=atol)

def test_values_that_are_not_finite_stay_so():
    """Or else a run whose loss is lost would go on."""
    module = main(46)
    for value in (float("nan"), float("inf")):
        for place in (0, 1):
            parts = [maps_like(2, 64, 3, 3), torch.randn(64, 64, 3, 3)]
            parts[place][0, 0, 0, 0] = value
            outputs = module.scaled_conv(*parts)
            assert not outputs[0].isfinite().all()

def test_steps_are_compared_with_those_of_main8_in_their_turn(monkeypatch):
    """Whichever scripts took turns with it, in however many goes."""
    line = next(line for line in read_results("airbench") if "seconds_per_image" in line)
    lines = [dict(line, script=MAINS[number].name, seconds_per_image=seconds, peak_tflops=1.0)
             for number, seconds in ((8, 2.0), (38, 1.0), (8, 4.0), (46, 1.0), (8, 8.0), (46, 2.0))]
    monkeypatch.setattr(test_airbench, "read_results", lambda _: lines)
    _, *rows = test_airbench.step_rows()
    share = 347 * 1024 / 487424
    assert [row[0] for row in rows] == [f"`{MAINS[number].name}`" for number in (8, 38, 46)]
    assert [row[3] for row in rows] == ["1.00", f"{share / 2:.2f}", f"{share / 4:.2f}"]
