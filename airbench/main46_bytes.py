"""main46_bytes.py -- CIFAR-10 to 94 % test accuracy.

Adds: on a CPU, maps, filters and gradients of maps are rounded to bytes before they are convolved
Changes: byte_conv byte_conv_like scaled_conv ByteConv Conv
Result: 94.02 ± 0.08 % (n=3), 7.6 ± 0.1 min, AMD EPYC, 2 threads, bf16, torch 2.11.0
Vs previous: not measured
Source: SwitchBack (arXiv 2304.13013), which leaves gradients of weights in 16 bits, as here.
Run: python airbench/main46_bytes.py --runs 200
"""
CODE = open(__file__, encoding="utf-8").read()
#############################################
#                   Setup                   #
#############################################
import argparse, collections, contextlib, copy, ctypes, hashlib, importlib.metadata, itertools, json, math
import os, pathlib, platform, re, resource, socket, subprocess, sys, tempfile, time, zipfile

START = time.perf_counter()
SCRIPT = pathlib.Path(__file__).resolve()
SHA256 = hashlib.sha256(CODE.split('"""', 2)[2].encode()).hexdigest()  # of all but the docstring

def fail(code, message):
    """Leave with one line on stderr; 1: the run failed, 2: usage, 3: data, 4: no usable GPU."""
    print(f"{SCRIPT.name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)

def argument_parser():
    """The flags of every script: they steer the measurement, never the method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(2, f"{message} (--help lists the flags)")
    parser.add_argument("--data", metavar="DIR", help="folder or 'synthetic' (default: data, else download)")
    parser.add_argument("--runs", metavar="N", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of run 0 (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    parser.add_argument("--out", metavar="FILE", help="for the JSON line (default: results/ by the script)")
    parser.add_argument("--target", metavar="A", type=float, help="exit 1 if the mean accuracy is below A")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile in scripts that use it")
    parser.add_argument("--dry-run", action="store_true", help="two steps of 8 images, then the evaluation")
    return parser

if __name__ == "__main__":
    ARGS = argument_parser().parse_args()  # before torch is imported: --help is instant
import numpy as np, torch, torchvision, torch.nn as nn, torch.nn.functional as F
import triton, triton.language as tl
from torch.utils.flop_counter import FlopCounterMode
torch.backends.cudnn.benchmark = True
torch.backends.cudnn.benchmark_limit = 0  # of the ways that it tries: none, not the ten that it ranks first
#############################################
#              Hyperparameters              #
#############################################
HYP = dict(
    epochs=10,              # the last one may be partial
    sizes=((0, 20), (2, 24), (3, 28), (5, 32)),  # (from this epoch on, pixels of a side)
    hard=((0, 1), (3, 0.6)),  # (from this epoch on, share of the images that are shown, the hardest)
    batch_size=1024,        # the smaller batch at the end of an epoch is dropped
    muon_lr=0.2255,         # of the 3x3 filters
    muon_momentum=0.655,    # Nesterov
    bias_lr=0.0573,         # of stem and BatchNorm, on the summed loss
    head_lr=0.5415,
    decay_share=1.0,        # of the steps, in which a straight line takes all learning rates to 0
    lr_floor=0.05,          # share of the learning rates that stays
    momentum=0.825,         # Nesterov, of biases and head
    weight_decay=1.0418e-6,  # share of a bias or of the head lost per example at the start
    label_smoothing=0.09,
    ema_steps=20,           # before the end, in which weights and statistics are averaged
    ema_every=4,            # steps
    ema_decay=0.7,
    translate=2,            # pixels, reflect-padded
    whiten_images=1000,     # of the train set give the filters of the stem
    whiten_eps=5e-4,        # added to the variance of each direction
    whiten_bias_epochs=0.2,  # in which its learning rate falls; it is frozen from the next whole one on
    widths=(64, 256, 256),  # channels of the groups
    bn_keep=0.5566,         # share of the running statistics that a step keeps
    logit_scale=1 / 256,
    tta_views=6,            # of the least certain test images
    tta_images=((1, 2000), (4, 700)),  # (more views, of so many images), the same in the warm-up
    eval_batch_size=2000,
    target=0.94,            # what p_value is about without --target
    nominal_macs=119.25e6,  # per forward image, in the counting of the published PFLOPs
    nominal_frozen=0.11141,  # share of them that the frozen stem saves, in that counting
)
#############################################
#                  Kernels                  #
#############################################
@triton.jit
def _crop_fwd_kernel(X_ptr, move_ptr, scale_ptr, Y_ptr, n, size, PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """batch_crop() in fp32; a program writes a block of one image of Y [n, size, size, 3]."""
    item, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    image, dy = tl.load(move_ptr + item), tl.load(move_ptr + n + item)
    dx, flip = tl.load(move_ptr + 2 * n + item), tl.load(move_ptr + 3 * n + item)
    mask, channel, value = place < size * size * 3, place % 3, tl.zeros((BLOCK_SIZE,), tl.float32)
    y = tl.maximum((place // 3 // size + 0.5) * 32 / size - 0.5, 0.0)  # in the window
    x = tl.maximum((place // 3 % size + 0.5) * 32 / size - 0.5, 0.0)
    for tap in tl.static_range(4):
        weight = tl.abs(1 - tap // 2 - (y - tl.floor(y))) * tl.abs(1 - tap % 2 - (x - tl.floor(x)))
        row = tl.minimum(tl.floor(y).to(tl.int32) + tap // 2, 31) + dy - PAD
        column = tl.minimum(tl.floor(x).to(tl.int32) + tap % 2, 31)
        column = tl.where(flip == 1, 31 - column, column) + dx - PAD
        row, column = 31 - tl.abs(31 - tl.abs(row)), 31 - tl.abs(31 - tl.abs(column))  # reflected
        value += weight * tl.load(X_ptr + ((image * 32 + row) * 32 + column) * 3 + channel, mask=mask)
    value = (value / 255 - tl.load(scale_ptr + channel)) / tl.load(scale_ptr + 3 + channel)
    tl.store(Y_ptr + item * size * size * 3 + place, value, mask=mask)

@triton.jit
def _stem_fwd_kernel(X_ptr, W_ptr, bias_ptr, Y_ptr, total, size: tl.constexpr, C: tl.constexpr,
                     BLOCK: tl.constexpr, LANES: tl.constexpr):
    """BLOCK of the total pixels of Y [N, size - 1, size - 1, C] from X [N, size, size, 3], W [C, 2, 2, 3]"""
    pixel, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, LANES)
    row, column, within, tap = pixel // (size - 1), pixel % (size - 1), pixel < total, tl.arange(0, 16)
    first = ((row // (size - 1) * size + row % (size - 1)) * size + column) * 3
    x = tl.load(X_ptr + first[:, None] + tap // 6 * 3 * size + tap % 6, within[:, None] & (tap < 12), 0.0)
    w = tl.load(W_ptr + channel * 12 + tap[:, None], (channel < C) & (tap < 12)[:, None], 0.0)
    y = tl.dot(x, w, input_precision="ieee") + tl.load(bias_ptr + channel, channel < C, 0.0).to(tl.float32)
    y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    tl.store(Y_ptr + pixel[:, None] * C + channel, y, within[:, None] & (channel < C))

@triton.jit
def _windows(n, C, height, width):
    """32 2x2 windows, also cut ones, x 64 channels: row, column, places of first pixel and result, whole"""
    channel, down, across = tl.program_id(0) * 64 + tl.arange(0, 64), (height + 1) // 2, (width + 1) // 2
    row = tl.program_id(1) * 32 + tl.arange(0, 32)[:, None]
    item, i, j = row // across // down, row // across % down * 2, row % across * 2
    first, place = (item * height + i) * width + j, (item * (height // 2) + i // 2) * (width // 2) + j // 2
    whole = (item < n) & (i + 1 < height) & (j + 1 < width)
    return i, j, first * C + channel, place * C + channel, whole, channel

@triton.jit
def _pool_fwd_kernel(X_ptr, Y_ptr, tap_ptr, part_ptr, n, C, height, width):
    """Y, the largest of each window; the first tap that is; count, mean and squared deviations of a block."""
    _, _, first, place, whole, channel = _windows(n, C, height, width)
    best, tap = tl.load(X_ptr + first, mask=whole, other=0.0).to(tl.float32), tl.zeros((32, 64), tl.int8)
    for k in tl.static_range(1, 4):
        value = tl.load(X_ptr + first + (k // 2 * width + k % 2) * C, mask=whole, other=0.0).to(tl.float32)
        larger = (value > best) | (value != value)  # NaN stays, as in torch
        best, tap = tl.where(larger, value, best), tl.where(larger, k, tap).to(tl.int8)
    tl.store(Y_ptr + place, best, mask=whole)
    tl.store(tap_ptr + place, tap, mask=whole)
    count, part_ptr = tl.sum(whole.to(tl.float32), 0), part_ptr + tl.program_id(1) * 3 * C + channel
    mean = tl.sum(best, 0) / tl.maximum(count, 1.0)
    tl.store(part_ptr, count)
    tl.store(part_ptr + C, mean)
    tl.store(part_ptr + 2 * C, tl.sum(tl.where(whole, (best - mean) * (best - mean), 0.0), 0))

@triton.jit
def _pool_bwd_kernel(dZ_ptr, Y_ptr, tap_ptr, stat_ptr, dX_ptr, n, C, height, width):
    """dX for Z = SiLU(y + bias), y = (Y - mean) * rstd; stat [5, C]: mean, rstd, bias, means of dy, dy * y"""
    i, j, first, place, whole, channel = _windows(n, C, height, width)
    mean, rstd = tl.load(stat_ptr + channel), tl.load(stat_ptr + C + channel)
    y = (tl.load(Y_ptr + place, mask=whole, other=0.0).to(tl.float32) - mean) * rstd
    z = y + tl.load(stat_ptr + 2 * C + channel)
    gate = tl.sigmoid(z)
    slope = gate * (1 + z * (1 - gate))
    dy = tl.load(dZ_ptr + place, mask=whole, other=0.0).to(tl.float32) * slope
    dY = (dy - tl.load(stat_ptr + 3 * C + channel) - y * tl.load(stat_ptr + 4 * C + channel)) * rstd
    tap = tl.load(tap_ptr + place, mask=whole, other=4)  # cut windows have none
    for k in tl.static_range(4):
        mask = (first < n * height * width * C) & (i + k // 2 < height) & (j + k % 2 < width)
        tl.store(dX_ptr + first + (k // 2 * width + k % 2) * C, tl.where(tap == k, dY, 0.0), mask=mask)

@triton.jit
def _rows_in_reach(X_ptr, window, total, k, height, width):
    """4 rows [windows, len(k)] of X [N, height, width, 24] from above to below whole 2x2 windows, and numbers
    k of the 4 x 24 from the pixel left of the window to that right of it."""
    across, down, inside = width // 2, height // 2, (window < total)[:, None]
    top, left = window // across % down * 2 - 1, window % across * 48 - 24
    place = left[:, None] + k
    inside &= (place >= 0) & (place < width * 24)
    place += ((window // across // down * height + top) * width * 24)[:, None]
    x0 = tl.load(X_ptr + place, inside & (top >= 0)[:, None], 0.0)
    x1 = tl.load(X_ptr + place + width * 24, inside, 0.0)
    x2 = tl.load(X_ptr + place + width * 48, inside, 0.0)
    x3 = tl.load(X_ptr + place + width * 72, inside & (top + 3 < height)[:, None], 0.0)
    return x0, x1, x2, x3

@triton.jit
def _conv_fwd_kernel(X_ptr, W_ptr, Y_ptr, tap_ptr, part_ptr, total, height, width, BLOCK: tl.constexpr):
    """_pool_fwd_kernel of a 3x3 convolution from 24 to 64 channels; W [3, 96, 128] takes a row in reach of a
    window to the two pixels of a row in it."""
    window, k, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 32), tl.arange(0, 128)
    upper, lower = tl.zeros((BLOCK, 128), tl.float32), tl.zeros((BLOCK, 128), tl.float32)
    for third in range(3):
        x0, x1, x2, x3 = _rows_in_reach(X_ptr, window, total, third * 32 + k, height, width)
        w = W_ptr + (third * 32 + k)[:, None] * 128 + columns
        w0, w1, w2 = tl.load(w), tl.load(w + 96 * 128), tl.load(w + 192 * 128)
        upper = tl.dot(x0, w0, upper, input_precision="ieee")
        upper = tl.dot(x1, w1, upper, input_precision="ieee")
        upper = tl.dot(x2, w2, upper, input_precision="ieee")
        lower = tl.dot(x1, w0, lower, input_precision="ieee")
        lower = tl.dot(x2, w1, lower, input_precision="ieee")
        lower = tl.dot(x3, w2, lower, input_precision="ieee")
    first, second = tl.split(upper.to(Y_ptr.dtype.element_ty).reshape(BLOCK, 64, 2))
    third, fourth = tl.split(lower.to(Y_ptr.dtype.element_ty).reshape(BLOCK, 64, 2))
    best, tap = first.to(tl.float32), tl.zeros((BLOCK, 64), tl.int8)
    for k in tl.static_range(1, 4):
        value = (second if k == 1 else third if k == 2 else fourth).to(tl.float32)
        larger = (value > best) | (value != value)  # NaN stays, as in torch
        best, tap = tl.where(larger, value, best), tl.where(larger, k, tap).to(tl.int8)
    whole, channel = (window < total)[:, None], tl.arange(0, 64)
    tl.store(Y_ptr + window[:, None] * 64 + channel, best, whole)
    tl.store(tap_ptr + window[:, None] * 64 + channel, tap, whole)
    count = tl.sum(whole + tl.zeros((BLOCK, 64), tl.float32), 0)
    part_ptr += tl.program_id(0) * 192 + channel
    mean = tl.sum(tl.where(whole, best, 0.0), 0) / count
    tl.store(part_ptr, count)
    tl.store(part_ptr + 64, mean)
    tl.store(part_ptr + 128, tl.sum(tl.where(whole, (best - mean) * (best - mean), 0.0), 0))

@triton.jit
def _conv_bwd_kernel(X_ptr, dZ_ptr, Y_ptr, tap_ptr, stat_ptr, dW_ptr, total, height, width,
                     BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Gradient of W [programs, 3, 3, 128, 32], by thirds of its 96, from dX of _pool_bwd_kernel."""
    k, channel = tl.arange(0, 32), tl.arange(0, 64)
    dw0, dw1 = tl.zeros((128, 32), tl.float32), tl.zeros((128, 32), tl.float32)
    dw2 = tl.zeros((128, 32), tl.float32)
    for step in range(STEPS):
        window = (tl.program_id(1) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        x0, x1, x2, x3 = _rows_in_reach(X_ptr, window, total, tl.program_id(0) * 32 + k, height, width)
        place, whole = window[:, None] * 64 + channel, (window < total)[:, None]
        rstd = tl.load(stat_ptr + 64 + channel)
        y = (tl.load(Y_ptr + place, whole, 0.0).to(tl.float32) - tl.load(stat_ptr + channel)) * rstd
        z = y + tl.load(stat_ptr + 128 + channel)
        gate = tl.sigmoid(z)
        dy = tl.load(dZ_ptr + place, whole, 0.0).to(tl.float32) * gate * (1 + z * (1 - gate))
        dY = (dy - tl.load(stat_ptr + 192 + channel) - y * tl.load(stat_ptr + 256 + channel)) * rstd
        dY, tap = dY.to(X_ptr.dtype.element_ty), tl.load(tap_ptr + place, whole, 4)
        none = tl.zeros_like(dY)
        upper = tl.join(tl.where(tap == 0, dY, none), tl.where(tap == 1, dY, none))
        lower = tl.join(tl.where(tap == 2, dY, none), tl.where(tap == 3, dY, none))
        upper, lower = upper.reshape(BLOCK, 128).trans(), lower.reshape(BLOCK, 128).trans()
        dw0 = tl.dot(upper, x0, tl.dot(lower, x1, dw0, input_precision="ieee"), input_precision="ieee")
        dw1 = tl.dot(upper, x1, tl.dot(lower, x2, dw1, input_precision="ieee"), input_precision="ieee")
        dw2 = tl.dot(upper, x2, tl.dot(lower, x3, dw2, input_precision="ieee"), input_precision="ieee")
    dW_ptr += (tl.program_id(1) * 3 + tl.program_id(0)) * 3 * 4096 + tl.arange(0, 128)[:, None] * 32 + k
    tl.store(dW_ptr, dw0)
    tl.store(dW_ptr + 4096, dw1)
    tl.store(dW_ptr + 8192, dw2)

@triton.jit
def _stats_fwd_kernel(X_ptr, part_ptr, rows, C, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Count, mean and squared deviations of STEPS blocks of rows x 64 channels of X [rows, C]."""
    channel, start = tl.program_id(0) * 64 + tl.arange(0, 64), tl.program_id(1) * STEPS * BLOCK
    shift, part_ptr = tl.load(X_ptr + start * C + channel).to(tl.float32), part_ptr + tl.program_id(1) * 3 * C
    sums, squares = tl.zeros((BLOCK, 64), tl.float32), tl.zeros((BLOCK, 64), tl.float32)
    for step in tl.static_range(STEPS):
        row = start + step * BLOCK + tl.arange(0, BLOCK)[:, None]
        x = tl.load(X_ptr + row * C + channel, row < rows, 0.0).to(tl.float32)
        x = tl.where(row < rows, x - shift, 0.0)  # of the size of the deviation, whatever the mean
        sums += x
        squares += x * x
    count, total = tl.minimum(rows - start, STEPS * BLOCK).to(tl.float32), tl.sum(sums, 0)
    tl.store(part_ptr + channel, tl.zeros((64,), tl.float32) + count)
    tl.store(part_ptr + C + channel, shift + total / count)
    tl.store(part_ptr + 2 * C + channel, tl.sum(squares, 0) - total * total / count)

@triton.jit
def _sums_bwd_kernel(dZ_ptr, Y_ptr, stat_ptr, part_ptr, rows, C, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Sums of dy and dy * y, as in _pool_bwd_kernel, over STEPS blocks of rows x 64 channels of [rows, C]."""
    channel, start = tl.program_id(0) * 64 + tl.arange(0, 64), tl.program_id(1) * STEPS * BLOCK
    mean, rstd = tl.load(stat_ptr + channel), tl.load(stat_ptr + C + channel)
    bias, part_ptr = tl.load(stat_ptr + 2 * C + channel), part_ptr + tl.program_id(1) * 2 * C + channel
    sums, products = tl.zeros((BLOCK, 64), tl.float32), tl.zeros((BLOCK, 64), tl.float32)
    for step in tl.static_range(STEPS):
        row = start + step * BLOCK + tl.arange(0, BLOCK)[:, None]
        place, within = row * C + channel, row < rows
        y = (tl.load(Y_ptr + place, within, 0.0).to(tl.float32) - mean) * rstd
        z = y + bias
        gate = tl.sigmoid(z)
        dy = tl.load(dZ_ptr + place, within, 0.0).to(tl.float32) * gate * (1 + z * (1 - gate))
        sums += dy
        products += dy * y
    tl.store(part_ptr, tl.sum(sums, 0))
    tl.store(part_ptr + C, tl.sum(products, 0))
#############################################
#                 Optimizer                 #
#############################################
def orthogonalize(update):
    """[n, rows, cols >= rows] -> same singular vectors, values about 1 unless tiny (Newton-Schulz)."""
    x = update.to(torch.bfloat16 if update.is_cuda else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    with autocast(x.device):
        for _ in range(3):  # of a quintic that lifts small singular values fast
            gram = x @ x.mT
            x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x

def update_filters(filters, grads, buffers, lr, momentum):
    """A step along Nesterov's momentum, orthogonalized as one stack: zeros fill smaller updates up."""
    for grad, buffer in zip(grads, buffers):
        buffer.mul_(momentum).add_(grad)
    updates = [(grad + momentum * buffer).permute(0, 2, 3, 1) for grad, buffer in zip(grads, buffers)]
    shapes, updates = [update.shape for update in updates], [update.flatten(1) for update in updates]
    rows, cols = map(max, zip(*(update.shape for update in updates)))
    stack = torch.stack([F.pad(x, (0, cols - x.shape[1], 0, rows - x.shape[0])) for x in updates])
    for p, x, shape, update in zip(filters, updates, shapes, orthogonalize(stack) * lr):
        update = update[:x.shape[0], :x.shape[1]].reshape(shape).permute(0, 3, 1, 2)
        p.mul_(len(p) ** 0.5 / p.norm()).sub_(update)

def tick(clocks, peaks, rates):
    """Set the learning rates of all groups and count a step, all in place."""
    rates.copy_(peaks * schedule(*clocks))
    clocks[0] += 1

class Muon(torch.optim.SGD):
    """SGD, but filters take orthogonalized updates and keep the norm of orthogonal ones. A step starts with
    start(), goes on with advance() for filters whose gradients are known, and ends with step()."""
    update, tick = staticmethod(update_filters), staticmethod(tick)
    def reset(self, falls):
        """Step 0 of a run; falls are the steps until the learning rate of each group is 0."""
        self.clocks.copy_(torch.tensor([[0.0] * len(falls), falls]))
        for buffer in [buffer for state in self.state.values() for buffer in state.values()]:
            buffer.zero_()
    def start(self):
        self.tick(self.clocks, self.peaks, self.rates)
        self.grads = []
    @torch.no_grad()
    def advance(self, *filters):
        """Update filters, on a GPU in a stream of its own, and take their gradients away."""
        group = self.param_groups[-1]
        self.side and self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for p in filters:
                if "buffer" not in self.state[p]:
                    self.state[p]["buffer"] = torch.zeros_like(p)
            grads, buffers = zip(*((p.grad, self.state[p]["buffer"]) for p in filters))
            self.update(filters, grads, buffers, group["lr"], group["momentum"])
        self.grads += grads  # whose memory is in use until the streams meet
        for p in filters:
            p.grad = None  # SGD passes over it
    @torch.no_grad()
    def step(self):
        self.advance(*(p for p in self.param_groups[-1]["params"] if p.grad is not None))
        super().step()
        self.side and torch.cuda.current_stream().wait_stream(self.side)
        self.grads.clear()

def make_optimizer(model):
    """Muon on the summed loss; groups of one learning rate: bias of the stem, BatchNorm, head, filters.
    Whatever changes from step to step is a tensor on the device: rates, and clocks, (steps done, steps to 0)
    of each group."""
    layers, wd = list(model.modules()), HYP["weight_decay"] * HYP["batch_size"]
    norms = [layer.bias for layer in layers if isinstance(layer, BatchNorm)]
    groups = [dict(params=params, lr=lr, weight_decay=wd / lr) for params, lr in (
        ([model.stem.bias], HYP["bias_lr"]), (norms, HYP["bias_lr"]), ([model.head.weight], HYP["head_lr"]))]
    filters = [layer.weight for layer in layers if isinstance(layer, Conv)]
    groups.append(dict(params=filters, lr=HYP["muon_lr"], momentum=HYP["muon_momentum"]))
    peaks = torch.tensor([group["lr"] for group in groups], device=model.head.weight.device)
    rates, clocks = torch.zeros_like(peaks), peaks.new_zeros(2, len(peaks))
    for group, rate in zip(groups, rates):
        group["lr"] = rate
    optimizer = Muon(groups, momentum=HYP["momentum"], nesterov=True, fused=True)
    optimizer.peaks, optimizer.rates, optimizer.clocks = peaks, rates, clocks
    optimizer.side = torch.cuda.Stream() if peaks.is_cuda else None
    return optimizer

def schedule(step, total_train_steps):
    """Factor of a learning rate at a 0-based step: on a straight line from 1 to 0, down to the floor."""
    return (1 - step / total_train_steps.clamp(min=1)).clamp(min=HYP["lr_floor"])

class TailAverage:
    """Moving average of all weights and BatchNorm statistics over the last steps, which ends in the model."""
    def __init__(self, model):
        self.values, self.average = [v for v in model.state_dict().values() if v.is_floating_point()], None
    def update(self, left):
        """After each step; so many are left."""
        if left > HYP["ema_steps"] or left % HYP["ema_every"]:
            return
        if self.average is None:
            self.average = [value.clone() for value in self.values]
        torch._foreach_lerp_(self.average, self.values, 1 - HYP["ema_decay"])
        left or torch._foreach_copy_(self.values, self.average)
#############################################
#                   Data                    #
#############################################
CIFAR10 = torchvision.datasets.CIFAR10
ARCHIVE = f"{CIFAR10.filename} (md5 {CIFAR10.tgz_md5})"
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DTYPE = dict(cuda=torch.float16, cpu=torch.float32)  # of images and weights

def draw_synthetic(n, seed):
    """Stand-in for CIFAR-10, as from read_cache: outlines of 0 to 5 lobes, filled or hollow, on noise."""
    rng, labels, grid = np.random.default_rng(seed), np.arange(n) % 10, np.linspace(-15.5, 15.5, 32)
    x, y, size, angle = (rng.uniform(*span, (n, 1, 1)) for span in ((-5, 5), (-5, 5), (6, 10), (0, 7)))
    z = (grid - x + 1j * (grid[:, None] - y)) * np.exp(1j * angle) / size
    lobes, hollow = np.array([0, 2, 3, 4, 5])[labels % 5, None, None], labels[:, None, None] >= 5
    level = abs(z) * (1 + 0.4 * np.cos(lobes * np.angle(z)))
    inside = (level < 1) & ~(hollow & (level < 0.6))
    paint, ground = rng.uniform(0, 255, (2, n, 1, 1, 3))
    images = np.where(inside[..., None], paint, ground) + rng.normal(0, 20, (n, 32, 32, 3))
    return dict(images=torch.tensor(images.clip(0, 255).astype(np.uint8)), labels=torch.tensor(labels))

def read_cache(path):
    """Prepared set, dict(images uint8 [N, 32, 32, 3], labels int64 [N]); exit 3 if it is no good."""
    with contextlib.suppress(Exception):  # whatever damage leads to, the sentence below is the answer
        assert zipfile.ZipFile(path).testzip() is None  # checksums, which torch.load does not look at
        cache = torch.load(path, weights_only=True)
        images, labels = cache["images"], cache["labels"]
        assert (images.dtype, images.shape) == (torch.uint8, (len(labels), 32, 32, 3))
        assert labels.dtype == torch.int64 and 0 <= labels.min() <= labels.max() <= 9
        return dict(images=images, labels=labels)
    fail(3, f"{path} is missing, damaged or not CIFAR-10; delete both caches there and add {ARCHIVE}")

def load_data(folder):
    """-> (name, train set, test set); name is 'cifar10', 'synthetic', or 'other' (of another size)."""
    if folder == "synthetic":
        return folder, draw_synthetic(5000, seed=1), draw_synthetic(1000, seed=2)
    root, names = pathlib.Path(folder or "data"), ("train.pt", CIFAR10.base_folder, CIFAR10.filename)
    places = [place for name in names for place in (root, root / "cifar10") if (place / name).exists()]
    place, md5 = places[0] if places else root / "cifar10", CIFAR10.tgz_md5
    archive, train, test = (place / name for name in (CIFAR10.filename, "train.pt", "test.pt"))
    places or not folder or fail(3, f"no CIFAR-10 in {folder}; put {ARCHIVE} there, or omit --data")
    whole = train.exists() or not archive.exists() or torchvision.datasets.utils.check_integrity(archive, md5)
    whole or fail(3, f"{archive} is damaged, its md5 is not {md5}; delete it and get it again")
    try:
        socket.setdefaulttimeout(10)
        for path in () if train.exists() else (test, train):
            part = CIFAR10(place, train=path == train, download=archive.exists() or not places)
            images, labels = torch.tensor(part.data), torch.tensor(part.targets)
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save(dict(images=images, labels=labels, classes=part.classes), partial)
            os.replace(partial, path)  # a reader sees all of it or nothing
    except Exception as error:  # of the network, a proxy, a read-only or full disk, a damaged file
        places and fail(3, f"cannot prepare CIFAR-10 in {place} ({error}); empty it and put {ARCHIVE} there")
        archive.unlink(missing_ok=True)
        print(f"NOTICE: {root} holds no CIFAR-10, and downloading it failed ({type(error).__name__}).\n"
              "NOTICE: Training on built-in synthetic images instead, to show that the installation works.\n"
              f"NOTICE: For real results put {ARCHIVE} into {root}.")
        return load_data("synthetic")
    sets = read_cache(train), read_cache(test)
    real = [part["labels"].bincount().tolist() for part in sets] == [[5000] * 10, [1000] * 10]
    return "cifar10" if real else "other", *sets

def normalize(images):
    """uint8 [N, 32, 32, 3] -> [N, 3, 32, 32] in channels_last, channels of mean 0 and deviation 1."""
    dtype = DTYPE[images.device.type]
    mean, std = torch.tensor([CIFAR_MEAN, CIFAR_STD], dtype=dtype, device=images.device)
    return ((images.to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2)

def batch_crop(images, image, dy, dx, flip, size):
    """Windows of padded images, mirrored where flip is 1: [N, 32, 32, 3], [B] each -> [B, 3, size, size]"""
    reach = torch.arange(32, device=images.device)
    places = dy[:, None] + reach, dx[:, None] + torch.where(flip[:, None] == 1, 31 - reach, reach)
    rows, columns = (31 - (31 - (place - HYP["translate"]).abs()).abs() for place in places)
    inputs = normalize(images[image[:, None, None], rows[:, :, None], columns[:, None]])
    return F.interpolate(inputs, size=size, mode="bilinear") if size < 32 else inputs
def augment(images, moves, scale, size):
    """batch_crop(images, *moves, size), channels_last; on a GPU one kernel; scale is (mean, std) [2, 3]."""
    if not images.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        return batch_crop(images, *moves, size)
    inputs = images.new_empty(moves.shape[1], size, size, 3, dtype=DTYPE[images.device.type])
    _crop_fwd_kernel[len(inputs), triton.cdiv(3 * size * size, 256)](
        images, moves, scale, inputs, len(inputs), size, HYP["translate"], 256, num_warps=2)
    return inputs.permute(0, 3, 1, 2)

class CifarLoader:
    """Batches (inputs [batch_size, 3, size, size] in channels_last, labels and images [batch_size]), from
    buffers that stay where they are. An image is mirrored whenever it was not the time before."""
    def __init__(self, images):
        self.images, self.scale = images, torch.tensor([CIFAR_MEAN, CIFAR_STD], device=images.device)
        self.draws, self.labels, self.mirrored, self.batch = (
            torch.zeros(size, dtype=torch.int64, device=images.device) for size in (
                (4, len(images) // HYP["batch_size"], HYP["batch_size"]), len(images), len(images), 1))
        self.losses = torch.zeros(len(images), device=images.device)  # when last shown
    def __len__(self):
        return self.draws.shape[1]
    def reset(self, labels):
        self.labels.copy_(labels)
        self.mirrored.random_(2)
        self.losses.fill_(math.inf)
    def shuffle(self, batches):
        """Order, windows and orientations of an epoch, of so many batches: the images of the highest loss."""
        draws, order = self.draws[:, :batches], torch.randperm(len(self.labels), device=self.labels.device)
        order = order[self.losses[order].topk(draws[0].numel(), sorted=False).indices.sort().values]
        moves = torch.randint(2 * HYP["translate"] + 1, (2, len(order)), device=order.device)
        draws.copy_(torch.stack([order, *moves, self.mirrored[order]]).view_as(draws))
        self.mirrored[order] ^= 1
        self.batch.zero_()
    def next(self, size):
        moves = self.draws.index_select(1, self.batch).squeeze(1)
        self.batch.add_(1).remainder_(len(self))
        return augment(self.images, moves, self.scale, size), self.labels[moves[0]], moves[0]
    def note(self, shown, losses):
        self.losses.index_copy_(0, shown, losses)
#############################################
#                   Model                   #
#############################################
@torch.library.custom_op("airbench::byte_conv", mutates_args=())
def byte_conv(maps: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """3x3 convolution, in bf16, of maps uint8 [N, C, H, W], less 128, with filters [O, C, 3, 3]; each filter
    is rounded to int8 in a unit of its own."""
    maps, where = maps.contiguous(memory_format=torch.channels_last), ([1, 1], [1, 1], [1, 1], 1)
    unit = filters.abs().amax((1, 2, 3)) / 127 + 1e-30
    filters = (filters / unit.view(-1, 1, 1, 1)).round().to(torch.int8)
    packed = torch.ops.onednn.qconv_prepack(filters, unit, 1.0, 128, *where, maps.shape)
    return torch.ops.onednn.qconv2d_pointwise(
        maps, 1.0, 128, packed, unit, unit.int() * 0, None, *where, 1.0, 0, torch.bfloat16, "none", [], "")

@byte_conv.register_fake
def byte_conv_like(maps, filters):
    """The shape that the compiler goes by."""
    outputs = maps.new_empty(len(maps), len(filters), *maps.shape[2:], dtype=torch.bfloat16)
    return outputs.contiguous(memory_format=torch.channels_last)

def scaled_conv(maps, filters):
    """byte_conv() of maps in floating point; each image is rounded in a unit of its own."""
    unit = maps.abs().amax((1, 2, 3), keepdim=True).float() / 127 + 1e-30
    return (byte_conv((maps / unit + 128).round().to(torch.uint8), filters) * unit).to(maps.dtype)

class ByteConv(torch.autograd.Function):
    """scaled_conv(), also of the gradient; that of the filters is not rounded."""
    @staticmethod
    def forward(ctx, inputs, filters):
        ctx.save_for_backward(inputs, filters)
        return scaled_conv(inputs, filters)
    @staticmethod
    def backward(ctx, grad):
        inputs, filters = ctx.saved_tensors
        slope = torch.nn.grad.conv2d_weight(inputs, filters.shape, grad, padding=1).to(filters.dtype)
        return scaled_conv(grad, filters.flip(2, 3).transpose(0, 1)), slope

class Conv(nn.Conv2d):
    """3x3 convolution without bias that keeps the size of the map, first filters start as the identity."""
    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    def reset_parameters(self):
        super().reset_parameters()
        identity = torch.eye(self.in_channels, device=self.weight.device)[:, :, None, None]
        self.weight.data[:self.in_channels] = F.pad(identity, (1, 1, 1, 1)).to(self.weight.dtype)
    def forward(self, inputs):
        if self.training and inputs.is_cpu and inputs.dtype == torch.bfloat16 and self.in_channels > 24:
            return ByteConv.apply(inputs, self.weight)
        return super().forward(inputs)

def merge(parts):
    """Mean and biased variance [C] of parts [n, 3, C] with their counts, means and squared deviations."""
    counts, means, squares = parts.unbind(1)
    mean = (counts * means).sum(0) / counts.sum(0)
    return mean, (squares + counts * (means - mean) ** 2).sum(0) / counts.sum(0)

def slope_sums(grad, maps, stats):
    """Sums [2, C] of dy and dy * y, for SiLU(y + bias), y = (maps - mean) * rstd, with stats [3, C] of mean,
    rstd, bias, and maps and gradient [N, C, H, W] in channels_last."""
    rows, channels = maps[:, 0].numel(), maps.shape[1]
    parts = stats.new_empty(triton.cdiv(rows, 16 * 16), 2, channels)
    _sums_bwd_kernel[channels // 64, len(parts)](grad, maps, stats, parts, rows, channels, 16, 16)
    return parts.sum(0)

class PoolNormAct(torch.autograd.Function):
    """Maps [N, C, H, W], C a multiple of 64, and bias [C] -> outputs of BatchNorm.pooled() in training, mean
    and biased variance [C]; kernels do what nothing else fuses. With weight [64, 24, 3, 3] the maps
    are those before its convolution."""
    @staticmethod
    def forward(ctx, inputs, bias, weight=None):
        (n, channels, height, width), ctx.shape = inputs.shape, inputs.shape
        channels, windows = len(bias), (n, height // 2, width // 2)
        pooled = inputs.new_empty(*windows, channels).permute(0, 3, 1, 2)
        taps = torch.empty_like(pooled, dtype=torch.int8)
        if weight is None:
            ctx.grid = channels // 64, triton.cdiv(n * ((height + 1) // 2) * ((width + 1) // 2), 32)
            parts = inputs.new_empty(ctx.grid[1], 3, channels, dtype=torch.float32)
            _pool_fwd_kernel[ctx.grid](inputs, pooled, taps, parts, *ctx.shape, num_warps=2)
        else:
            parts = inputs.new_empty(triton.cdiv(math.prod(windows), 64), 3, channels, dtype=torch.float32)
            rows = weight.to(inputs.dtype).permute(2, 3, 1, 0).flatten(1, 2)
            rows = torch.stack([F.pad(rows, (0, 0, 0, 24)), F.pad(rows, (0, 0, 24, 0))], 3)
            _conv_fwd_kernel[len(parts),](
                inputs, rows, pooled, taps, parts, math.prod(windows), height, width, 64,
                num_warps=4, num_stages=2)
        mean, var = merge(parts)
        ctx.mark_non_differentiable(mean, var)
        stats = torch.stack([mean, (var + 1e-12).rsqrt(), bias])
        ctx.save_for_backward(pooled, taps, stats, weight, None if weight is None else inputs)
        shift, scale, bias = stats.view(3, -1, 1, 1)
        outputs = F.silu((pooled - shift) * scale + bias)  # a copy, or else torch.compile loses its gradient
        return outputs.to(inputs.dtype, copy=True), mean, var
    @staticmethod
    def backward(ctx, grad, *_):
        pooled, taps, stats, weight, inputs = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        sums = slope_sums(grad, pooled, stats)
        stats = torch.cat([stats, sums / pooled[:, 0].numel()])
        n, channels, *size = ctx.shape
        if weight is None:
            result = grad.new_empty(n, *size, channels).permute(0, 3, 1, 2)
            _pool_bwd_kernel[ctx.grid](grad, pooled, taps, stats, result, *ctx.shape, num_warps=4)
            return result, sums[0], None
        windows = pooled[:, 0].numel()
        steps = triton.cdiv(windows, 64 * 88)  # two programs on each of 132 multiprocessors, 88 a third
        parts = stats.new_empty(triton.cdiv(windows, 64 * steps), 3, 3, 128, 32)
        _conv_bwd_kernel[3, len(parts)](inputs, grad, pooled, taps, stats, parts, windows, *size, 64, steps,
                                        num_warps=4, num_stages=1)
        rows = parts.sum(0).permute(1, 0, 3, 2).reshape(3, 96, 64, 2)
        rows = (rows[:, :72, :, 0] + rows[:, 24:, :, 1]).view(3, 3, 24, 64)
        return None, sums[0], rows.permute(3, 2, 0, 1).to(weight.dtype)

class NormAct(torch.autograd.Function):
    """As PoolNormAct, without pooling."""
    @staticmethod
    def forward(ctx, inputs, bias):
        rows, channels = inputs[:, 0].numel(), len(bias)
        parts = inputs.new_empty(triton.cdiv(rows, 16 * 16), 3, channels, dtype=torch.float32)
        _stats_fwd_kernel[channels // 64, len(parts)](inputs, parts, rows, channels, 16, 16, num_warps=2)
        mean, var = merge(parts)
        ctx.mark_non_differentiable(mean, var)
        stats = torch.stack([mean, (var + 1e-12).rsqrt(), bias])
        ctx.save_for_backward(inputs, stats)
        shift, scale, bias = stats.view(3, -1, 1, 1)
        return F.silu((inputs - shift) * scale + bias).to(inputs.dtype, copy=True), mean, var
    @staticmethod
    def backward(ctx, grad, *_):
        inputs, stats = ctx.saved_tensors
        grad, (mean, rstd, bias) = grad.contiguous(memory_format=torch.channels_last), stats.view(3, -1, 1, 1)
        sums, normed = slope_sums(grad, inputs, stats), (inputs - mean) * rstd
        inner = torch.ops.aten.silu_backward(grad.float(), normed + bias)
        both = (sums / inputs[:, 0].numel()).view(2, -1, 1, 1)
        return ((inner - both[0] - normed * both[1]) * rstd).to(inputs.dtype), sums[0]

class BatchNorm(nn.BatchNorm2d):
    """Batch norm with a trainable bias and the scale fixed at 1."""
    def __init__(self, channels):
        super().__init__(channels, eps=1e-12, momentum=1 - HYP["bn_keep"])
        self.weight.requires_grad = False
    def kernels(self, inputs):
        """Whether kernels norm these maps: in training on a GPU."""
        return self.training and (inputs.is_cuda or inputs.is_cpu and os.environ.get("TRITON_INTERPRET"))
    def follow(self, outputs, mean, var):
        """The running statistics take in those of a batch; -> outputs."""
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var / (1 - 1 / outputs[:, 0].numel()), self.momentum)  # unbiased
        return outputs
    def activated(self, inputs):
        """SiLU of the norm of maps."""
        if not self.kernels(inputs):
            return F.silu(self(inputs))
        return self.follow(*NormAct.apply(inputs.contiguous(memory_format=torch.channels_last), self.bias))
    def pooled(self, inputs, conv=None):
        """SiLU of the norm of max-pooled maps, or those of conv."""
        kernels = self.kernels(inputs)
        fused = kernels and conv is not None and conv.in_channels == 24 and not inputs.requires_grad
        inputs = inputs if fused or conv is None else conv(inputs)
        if not kernels:
            return F.silu(self(F.max_pool2d(inputs, 2)))
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        return self.follow(*PoolNormAct.apply(inputs, self.bias, conv.weight if fused else None))

class ConvGroup(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H // 2, W // 2]"""
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1, self.norm1 = Conv(in_channels, out_channels), BatchNorm(out_channels)
        self.conv2, self.norm2 = Conv(out_channels, out_channels), BatchNorm(out_channels)
    def forward(self, inputs):
        hidden = self.norm1.pooled(inputs, self.conv1)
        return self.norm2.activated(self.conv2(hidden))

def stem(inputs, weight, bias, out=None):
    """GELU of a 2x2 convolution: [N, 3, size, size] -> [N, C, size - 1, size - 1], in a kernel on a GPU while
    the bias needs no gradient; that can write into out, in channels_last."""
    live = torch.is_grad_enabled() and bias.requires_grad
    if live or not (inputs.is_cuda or inputs.is_cpu and os.environ.get("TRITON_INTERPRET")):
        return F.gelu(F.conv2d(inputs, weight, bias))
    inputs, weight = (part.contiguous(memory_format=torch.channels_last) for part in (inputs, weight))
    (n, _, _, size), channels = inputs.shape, len(weight)
    outputs = inputs.new_empty(n, size - 1, size - 1, channels).permute(0, 3, 1, 2) if out is None else out
    pixels = n * (size - 1) ** 2
    _stem_fwd_kernel[triton.cdiv(pixels, 128),](
        inputs, weight, bias, outputs, pixels, size, channels, 128, triton.next_power_of_2(channels))
    return outputs

@torch.compiler.disable
def announce(maps, group, then):
    """When the gradient of these inputs of a group is known, call then with its filters: theirs are, too."""
    maps.requires_grad and maps.register_hook(lambda _: then(group.conv1.weight, group.conv2.weight))

class CifarNet(nn.Module):
    """Eight layers with weights: [N, 3, size, size], or what the stem makes of it, -> logits [N, 10]; then()
    gets the filters of second and third group in the backward pass, as soon as their gradients are known."""
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, kernel_size=2)
        self.stem.weight.requires_grad = False
        self.groups = nn.Sequential(*(ConvGroup(*io) for io in itertools.pairwise((24, *HYP["widths"]))))
        self.head = nn.Linear(HYP["widths"][-1], 10, bias=False)
    def forward(self, inputs, train_stem=True, then=None):
        bias = self.stem.bias if train_stem else self.stem.bias.detach()
        first, second, third = self.groups
        hidden = first(stem(inputs, self.stem.weight, bias) if inputs.shape[1] == 3 else inputs)
        then and announce(hidden, second, then)  # torch.compile makes a piece of what is between
        hidden = second(hidden)
        then and announce(hidden, third, then)
        hidden = third(hidden).flatten(2).max(2).values  # adaptive pooling adds atomically backward
        return self.head(hidden) * HYP["logit_scale"]

def make_model(device):
    """The network on the device: channels_last, weights in the device's dtype, BatchNorm in fp32."""
    model = CifarNet().to(device, DTYPE[device.type], memory_format=torch.channels_last)
    for norm in [module for module in model.modules() if isinstance(module, BatchNorm)]:
        norm.float()
    return model

def whitening_filters(images):
    """Filters [24, 3, 2, 2] that whiten 2x2 patches of images uint8 [N, 32, 32, 3], then these negated."""
    windows = normalize(images).float().unfold(2, 2, 1).unfold(3, 2, 1)
    patches = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    covariance = (patches.T @ patches / len(patches)).double().cpu()  # cuSOLVER takes longer for 12 x 12
    variances, vectors = torch.linalg.eigh(covariance)
    filters = (vectors / (variances + HYP["whiten_eps"]).sqrt()).T.flip(0).view(12, 3, 2, 2)
    return torch.cat([filters, -filters])

def reset(model, images):
    """Fresh weights, in place; images uint8 [N, 32, 32, 3] are the train set."""
    for layer in [module for module in model.modules() if hasattr(module, "reset_parameters")]:
        layer.reset_parameters()
    model.stem.weight.data.copy_(whitening_filters(images[:HYP["whiten_images"]]))
    model.head.weight.data /= model.head.weight.std()

def count_flops(model, backward, train_stem=True, size=32):
    """FLOPs of the convolutions and matmuls of one image."""
    model = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter:
        inputs = torch.empty(1, 3, size, size, device="meta", dtype=model.head.weight.dtype)
        logits = model(inputs, train_stem)
        backward and logits.sum().backward()
    return counter.get_total_flops()

def count_pflops(model, n_train, n_test):
    """PFLOPs of a run: (nominal, counted as in the published table; executed by convolutions and matmuls)."""
    per_epoch, views = n_train // HYP["batch_size"], n_test + sum(more * n for more, n in HYP["tta_images"])
    executed, steps = count_flops(model, False) * views, batches(per_epoch)
    epochs = sum(steps) / per_epoch  # of all images
    frozen = max(epochs - HYP["whiten_bias_epochs"], 0) * HYP["nominal_frozen"]
    nominal = 2 * HYP["nominal_macs"] * (n_train * (3 * epochs - frozen) + views)
    for epoch in range(math.ceil(HYP["epochs"])):
        executed += count_flops(model, True, *flags(epoch)) * HYP["batch_size"] * steps[epoch]
    return nominal / 1e15, executed / 1e15
#############################################
#                  Logging                  #
#############################################
COLUMNS = ("run", "epoch", "train_loss", "train_acc", "val_acc", "tta_val_acc", "time_seconds")
CPUINFO = pathlib.Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""

def print_columns(columns, title):
    """Head of the table: a column is as wide as its name, the rule above carries the title."""
    line = "|" + "|".join(f"  {name}  " for name in columns) + "|"
    print(f"-- {title} ".ljust(len(line), "-"), line, "-" * len(line), sep="\n")

def print_training_details(columns, row):
    """A row of the table from a dict; what that does not hold stays blank."""
    cells = [row.get(name, "") for name in columns]
    cells = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in cells]
    print("|" + "|".join(f"  {cell:>{len(name)}}  " for cell, name in zip(cells, columns)) + "|")

def environment(device):
    """Machine and versions as a flat dict; None is what could not be found out."""
    ask, gpu = subprocess.getoutput, device.type == "cuda"
    smi = "2>/dev/null nvidia-smi --id=0 --format=csv,noheader,nounits --query-gpu="
    cpu = re.search("model name.*: (.*)", CPUINFO)
    versions = {name: importlib.metadata.version(name) for name in "torch torchvision numpy triton".split()}
    return dict(gpu=torch.cuda.get_device_name() if gpu else None, cpu=cpu[1] if cpu else platform.machine(),
                power_limit_w=gpu and ask(smi + "power.limit") or None, cpu_threads=torch.get_num_threads(),
                driver=gpu and ask(smi + "driver_version") or None, cuda=torch.version.cuda,
                cudnn=torch.backends.cudnn.version(), python=platform.python_version(), **versions,
                dtype="bfloat16 autocast" if not gpu and "bf16" in CPUINFO else str(DTYPE[device.type])[6:],
                git=ask(f"git -C '{SCRIPT.parent}' describe --always --dirty 2>/dev/null") or None)

def t_sf(t, df):
    """P(T > t) of Student's t; the density of a in t = sqrt(df) tan(a) is proportional to cos(a)**(df - 1)"""
    tail, half = (np.linspace(low, np.pi / 2, 100001) for low in (np.arctan(t / df ** 0.5), 0))
    tail, half = (np.trapezoid(np.cos(a).clip(0) ** (df - 1), a) for a in (tail, half))
    return float(tail / half / 2)

def statistics(values, target):
    """mean, std (ddof 1), 95 % interval of the mean, one-sided p of 'mean <= target'; None where std is 0."""
    n, mean, std = len(values), float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)))
    if std == 0:
        return mean, None, None, None
    low, high, error = 0.0, 100.0, std / n ** 0.5
    for _ in range(50):  # bisection for the t that leaves 2.5 % above
        middle = (low + high) / 2
        low, high = (middle, high) if t_sf(middle, n - 1) > 0.025 else (low, middle)
    return mean, std, [mean - low * error, mean + low * error], t_sf((mean - target) / error, n - 1)

def append_line(path, record):
    """Append a JSON line, all of it or nothing: a full disk or a kill leaves earlier lines as they were."""
    line, partial = json.dumps(record), path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text((path.read_text() if path.exists() else "") + line + "\n")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        print(line)
        fail(1, f"cannot write {path} ({error.strerror}); earlier lines are whole, the new one is above")

def finish(result, out):
    """Print the short values as 'key: value', append all as a JSON line to out, keep it with the source."""
    for key, value in result.items():
        if not isinstance(value, (dict, list)) or key == "acc_ci95":
            print(f"{key}: {value}")
    append_line(out, result)
    with contextlib.suppress(OSError):  # a log that only repeats ends no run
        path = SCRIPT.parent / "logs" / f"{result['utc'].replace(':', '')}-{SHA256[:8]}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{CODE}{'=' * 100}\n{json.dumps(result, indent=1)}\n")
#############################################
#                Evaluation                 #
#############################################
def infer(model, inputs, more):
    """Logits [N, 10] of the images, or the mean of so many more views: 1, mirrored, or 4, moved."""
    if more <= 1:
        return model(inputs.flip(-1) if more else inputs)
    padded = F.pad(inputs, [1] * 4, mode="reflect")
    moved = [padded[:, :, i:i + 32, i:i + 32].contiguous(memory_format=torch.channels_last) for i in (0, 2)]
    return sum(infer(model, images, side) for images in moved for side in (0, 1)) / 4

def evaluate(model, images, labels, views):
    """Accuracy on images uint8 [N, 32, 32, 3] and labels int64 [N], with one view of each, or up to that many
    of those whose two largest logits, so far, differ least; half the weight is that of the last views."""
    def logits_of(images, more):
        parts = normalize(images).split(HYP["eval_batch_size"])
        return torch.cat([infer(model, part, more) for part in parts]).float()
    model.eval()
    with torch.no_grad(), autocast(images.device):
        logits = logits_of(images, 0)
        for more, n in HYP["tta_images"] if views > 1 else ():
            first, second = logits.topk(2).values.unbind(1)
            unsure = (first - second).argsort()[:n]
            logits[unsure] = (logits[unsure] + logits_of(images[unsure], more)) / 2
    return (logits.argmax(1) == labels).double().mean().item()
#############################################
#                 Training                  #
#############################################
class Timer(collections.Counter):
    """Seconds by part: lap(part) adds what has passed since the last lap, and returns the sum that counts."""
    last = START
    def lap(self, part):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self[part] += time.perf_counter() - self.last
        self.last = time.perf_counter()
        return self["reset"] + self["train"] + self["eval"]

def autocast(device):
    """bf16 autocast on a CPU with bf16 instructions, nothing elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=device.type == "cpu" and "bf16" in CPUINFO)

def peak_flops(device):
    """FLOP/s of the fastest of ten large matmuls in the precision of the training; MFU is the share of it."""
    timer, n = Timer(), 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=DTYPE[device.type])
    for trial in range(11):  # the first lap holds the set-up too
        with autocast(device):
            a @ a
        timer.lap(trial)
    return 2 * n ** 3 / min(timer.values())

def batches(per_epoch):
    """Steps of each epoch, the last of which may be partial."""
    shares = [min(share for first, share in HYP["hard"] if first <= epoch) * min(HYP["epochs"] - epoch, 1)
              for epoch in range(math.ceil(HYP["epochs"]))]
    return [math.ceil(share * per_epoch) for share in shares]

def flags(epoch):
    """How the steps of an epoch differ from others: (whether the stem trains, pixels of a side)."""
    return epoch < HYP["whiten_bias_epochs"], max(size for first, size in HYP["sizes"] if first <= epoch)

def objective(logits, labels):
    """Logits [N, 10], labels [N] -> summed loss, mean loss and accuracy [2], and losses [N]"""
    logits = logits.float()
    losses = F.cross_entropy(logits, labels, label_smoothing=HYP["label_smoothing"], reduction="none")
    hits = logits.argmax(1) == labels
    return losses.sum(), torch.stack([losses.detach().mean(), hits.float().mean()]), losses.detach()

class Step:
    """A training step; it takes the next batch itself, so that a GPU can replay it, a graph for all flags."""
    objective = staticmethod(objective)
    def __init__(self, model, train_set):
        self.model, self.optimizer = model, make_optimizer(model)
        self.loader = CifarLoader(train_set["images"])
        self.graphs, self.metrics = {}, torch.zeros(2, device=train_set["images"].device)  # loss, accuracy
        self.batches, self.side = {}, torch.cuda.Stream() if self.metrics.is_cuda else None
    def prepare(self, train_stem, size, batches=0):
        """The next batch, past a frozen stem, for a step with these flags; first draw an epoch of so many."""
        batches and self.loader.shuffle(batches)
        inputs, *rest = self.loader.next(size)
        batch = self.batches.setdefault((train_stem, size), [None] * 3)
        if not train_stem:
            with torch.no_grad(), autocast(inputs.device):
                inputs = stem(inputs, self.model.stem.weight, self.model.stem.bias, batch[0])
        for i, (old, new) in enumerate(zip(batch, (inputs, *rest))):  # a graph finds it in the same memory
            batch[i] = new if old is None or not new.is_cuda else old.copy_(new)
    def eager(self, train_stem, size):
        inputs, labels, shown = self.batches[train_stem, size]
        with autocast(inputs.device):
            logits = self.model(inputs, train_stem, self.optimizer.advance)
        loss, metrics, losses = self.objective(logits, labels)
        self.optimizer.start()
        loss.backward()
        self.loader.note(shown, losses)
        self.side and self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.prepare(train_stem, size)
        self.optimizer.step()
        self.side and torch.cuda.current_stream().wait_stream(self.side)
        self.optimizer.zero_grad()
        self.metrics.copy_(metrics)
    def __call__(self, *flags):
        if self.metrics.device.type == "cpu":
            return self.eager(*flags)
        if flags not in self.graphs:
            side, self.graphs[flags] = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # whatever is tuned or allocated once
                    self.eager(*flags)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graphs[flags]):
                self.eager(*flags)
        self.graphs[flags].replay()

def train(step, train_set, test_set, run, seed):
    """One run, from fresh weights to the final evaluation. -> dict(acc, time_seconds, seed, parts, epochs)"""
    timer, rows, model, per_epoch = Timer(), [], step.model, len(step.loader)
    tail = TailAverage(model)
    steps = batches(per_epoch)
    total_train_steps = sum(steps)
    torch.manual_seed(seed)
    timer.lap("before")
    reset(model, train_set["images"])
    step.loader.reset(train_set["labels"])
    decay_steps = HYP["decay_share"] * total_train_steps
    step.optimizer.reset([HYP["whiten_bias_epochs"] * per_epoch] + [decay_steps] * 3)
    timer.lap("reset")
    step.prepare(*flags(0), steps[0])
    for epoch in range(math.ceil(HYP["epochs"])):
        model.train()
        for done in range(sum(steps[:epoch]), sum(steps[:epoch + 1])):
            step(*flags(epoch))
            tail.update(total_train_steps - done - 1)
        epoch + 1 < len(steps) and step.prepare(*flags(epoch + 1), steps[epoch + 1])
        timer.lap("train")
        train_loss, train_acc = step.metrics.tolist()
        math.isfinite(train_loss) or fail(1, f"the loss is {train_loss} in run {run}, epoch {epoch + 1}")
        val_acc = evaluate(model, **test_set, views=1)
        rows.append(dict(epoch=epoch + 1, train_loss=train_loss, train_acc=train_acc, val_acc=val_acc))
        print_training_details(COLUMNS, dict(rows[-1], run=run, time_seconds=timer.lap("diag")))
    acc = evaluate(model, **test_set, views=HYP["tta_views"])
    time_seconds = timer.lap("eval")
    print_training_details(COLUMNS, dict(run=run, epoch="eval", tta_val_acc=acc, time_seconds=time_seconds))
    return dict(acc=acc, time_seconds=time_seconds, seed=seed, parts=timer, epochs=rows)

def warm_up(step, train_set, test_set):
    """Short untimed runs on random labels compile the step for all flags that a run has."""
    labels, hyp = torch.randint_like(train_set["labels"], 10), dict(HYP)
    part = {key: value[:HYP["eval_batch_size"]] for key, value in test_set.items()}
    for live, size in dict.fromkeys(map(flags, range(math.ceil(HYP["epochs"])))):
        epochs = 2 * HYP["batch_size"] / len(labels)
        HYP.update(epochs=epochs, whiten_bias_epochs=int(live), sizes=((0, size),))
        train(step, dict(train_set, labels=labels), part, run="-", seed=0)
        HYP.update(hyp)

def keep_memory():
    """From now on, glibc takes no memory by mmap and gives none back, whose pages would be cleared anew."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD

def main(args):
    """All runs of the script: data, warm-up, training, and the result as text and as a JSON line."""
    sys.stdout.reconfigure(line_buffering=True)
    args.runs > 0 <= args.seed or fail(2, "--runs starts at 1 and --seed at 0")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    args.device == "cuda" != found and fail(4, "no usable CUDA GPU; --device cpu needs none")
    timer, device = Timer(), torch.device(args.device or found)
    out = pathlib.Path(args.out or SCRIPT.parent / "results" / f"{SCRIPT.stem}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # better to learn of a wrong --out now
    timer.lap("import")
    device.type == "cpu" and keep_memory()
    name, *sets = load_data(args.data)
    digest = hashlib.sha256(b"".join(s[key].numpy().tobytes() for s in sets for key in ("images", "labels")))
    train_set, test_set = ({key: s[key].to(device) for key in ("images", "labels")} for s in sets)
    n_train, n_test = len(train_set["labels"]), len(test_set["labels"])
    timer.lap("load")
    args.dry_run and HYP.update(batch_size=8, epochs=16 / n_train)
    n_train >= HYP["batch_size"] or fail(3, f"{n_train} images do not fill a batch of {HYP['batch_size']}")
    name != "synthetic" or args.target is None or fail(1, "--target says nothing about synthetic data")
    model, peak, env = make_model(device), peak_flops(device), environment(device)
    nominal, executed = count_pflops(model, n_train, n_test)
    env["gpu"] or print(f"No GPU, {env['cpu_threads']} CPU threads: ~{executed * 3e13 / peak:.0f} min a run")
    series = json.dumps([SHA256, HYP, args.seed, digest.hexdigest(), env["gpu"], env["cpu"], args.no_compile])
    partial = out.with_name(f"{out.name}.{hashlib.sha256(series.encode()).hexdigest()[:8]}.partial")
    runs = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    runs and print(f"continuing after {len(runs)} of {args.runs} runs")
    print_columns(COLUMNS, f"{SCRIPT.stem} on {name} data")
    timer.lap("prepare")
    if not args.no_compile:
        subprocess.getstatusoutput("${CXX:-g++} -v")[0] and fail(2, "no C++ compiler; use --no-compile")
        print("compiling, which takes minutes on a CPU")
        model.compile(dynamic=False)  # one set of parameters, a graph for each way of calling it
    step = Step(model, train_set)
    if not args.no_compile:
        step.objective, step.optimizer.update, step.optimizer.tick = (
            torch.compile(part, dynamic=False, options=dict(combo_kernels=env["gpu"] is not None))
            for part in (objective, update_filters, tick))
    args.no_compile and not env["gpu"] or warm_up(step, train_set, test_set)
    timer.lap("compile")
    for run in range(len(runs), args.runs):
        runs.append(train(step, train_set, test_set, run, args.seed + run))
        append_line(partial, runs[-1])
    target = HYP["target"] if args.target is None else args.target
    acc_mean, acc_std, acc_ci95, p_value = statistics([run["acc"] for run in runs], target)
    time_mean, time_std, *_ = statistics([run["time_seconds"] for run in runs], 0)
    memory = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    finish(dict(
        script=SCRIPT.name, data=name, n=len(runs), acc_mean=acc_mean, acc_std=acc_std, acc_ci95=acc_ci95,
        target=target, p_value=p_value, time_mean=time_mean, time_std=time_std, load_seconds=timer["load"],
        compile_seconds=timer["compile"], diag_seconds=sum(run["parts"]["diag"] for run in runs),
        wall_seconds=time.perf_counter() - START, cpu_seconds=time.process_time(), peak_mib=memory / 2**20,
        timed="reset, augmentation, training, evaluation", untimed="load, compile, warm-up, validation",
        pflops_nominal=nominal, pflops=executed, peak_tflops=peak / 1e12,
        mfu=executed * 1e15 / peak / time_mean, dry_run=args.dry_run, compiled=not args.no_compile,
        device=device.type, **env, sha256=SHA256, data_sha256=digest.hexdigest(), argv=sys.argv[1:], hyp=HYP,
        runs=runs, utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())), out)
    partial.unlink(missing_ok=True)
    args.target is None or acc_mean >= target or fail(1, f"mean accuracy {acc_mean:.4f} is below {target}")
#############################################
#                Entry point                #
#############################################
if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        fail(130, "interrupted; finished runs are kept, the same command continues")
    except OSError as error:
        fail(2, error)
    except Exception as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate mem" not in str(error):
            raise
        pages = [os.sysconf(f"SC_{kind}PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") for kind in ("AV", "")]
        mib = [n >> 20 for n in (torch.cuda.mem_get_info() if torch.cuda.is_initialized() else pages)]
        fail(1, f"out of memory at batch size {HYP['batch_size']}, with {mib[0]} of {mib[1]} MiB free")
