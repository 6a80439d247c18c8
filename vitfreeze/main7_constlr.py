"""main7_constlr.py -- masked image modelling with local multi-scale HOG targets (LocalMIM) on a ViT.

Adds: a constant learning rate after the warm-up, with a short linear decay at the end, in place of the cosine
Changes: HYP learning_rate main
Result: not measured
Vs previous: not measured
Source: the schedule of warm-up, stable phase and decay (arXiv 2404.06395); written afresh.
Run: python vitfreeze/main7_constlr.py
"""
CODE = open(__file__, encoding="utf-8").read()
#############################################
#                   Setup                   #
#############################################
import argparse, collections, contextlib, datetime, hashlib, importlib.metadata, itertools, json, math, os
import pathlib, platform, re, resource, signal, socket, subprocess, sys, tempfile, time, zipfile

START = time.perf_counter()
SCRIPT = pathlib.Path(__file__).resolve()
SHA256 = hashlib.sha256(CODE.split('"""', 2)[2].encode()).hexdigest()  # of all but the docstring
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(key, default))  # as torchrun sets them
                           for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

def fail(code, message):
    """Leave with one line on stderr; 1: the run failed, 2: usage, 3: data, 4: no usable GPU."""
    print(f"{SCRIPT.name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)
#############################################
#              Hyperparameters              #
#############################################
HYP = dict(  # those of one value are flags, too, with the comments as help
    size="tiny",            # nano, micro, tiny (32 px), small64 (64 px), small, base or large (224 px)
    epochs=100.0,           # passes over the train set
    warmup_epochs=10.0,     # of these, with a learning rate that rises linearly from 0
    batch_size=1024,        # images of a forward pass of one process
    accum_iter=1,           # forward passes of a step; a step has batch_size * accum_iter * processes images
    blr=2.5e-4,             # peak learning rate per 256 images of a step
    min_lr=1e-6,            # at the end of the run
    cooldown=0.15,          # share of the epochs, the last ones, with a learning rate that falls linearly
    weight_decay=0.05,      # of tensors with two dimensions or more
    betas=(0.9, 0.95),      # of AdamW
    mask_ratio=0.75,        # share of the patches that the encoder does not see
    hog_nbins=9,            # orientations in 180 degrees
    crop_scale=(0.2, 1.0),  # share of the area of an image that a crop shows
    crop_ratio=(3 / 4, 4 / 3),  # width to height of a crop
    save_epochs=5.0,        # between checkpoints
    workers=8,              # processes that decode an image folder
    knn_temperature=0.07,   # of the votes of the neighbours
    how_scale="cubic",      # from depth to the share of the steps that a layer trains: linear, squared, cubic
    t_0=0.8,                # that share for the first layer, before squaring or cubing; 1: nothing freezes
    dont_freeze_pe=False,   # the patch embedding trains to the end, and with it all gradients are needed
    keep_graph=False,       # so does the class token, as in the original
)
Size = collections.namedtuple("Size", "image patch dim depth heads dec_dim dec_heads taps scales")
SIZES = dict(  # taps: blocks, from 1 on, with a decoder; scales: cells of its targets per patch and direction
    nano=Size(32, 4, 96, 4, 3, 48, 2, (1, 2, 3, 4), (2, 1, 1 / 2, 1 / 4)),
    micro=Size(32, 4, 128, 6, 4, 64, 2, (1, 3, 5, 6), (2, 1, 1 / 2, 1 / 4)),
    tiny=Size(32, 4, 192, 12, 3, 64, 2, (2, 4, 10, 12), (2, 1, 1 / 2, 1 / 4)),
    small64=Size(64, 8, 384, 12, 6, 128, 4, (2, 4, 10, 12), (4, 2, 1, 1 / 2)),
    small=Size(224, 16, 384, 12, 6, 256, 8, (2, 4, 10, 12), (4, 2, 1, 1 / 2)),
    base=Size(224, 16, 768, 12, 12, 256, 8, (2, 4, 10, 12), (4, 2, 1, 1 / 2)),
    large=Size(224, 16, 1024, 24, 16, 256, 8, (2, 4, 22, 24), (4, 2, 1, 1 / 2)))
POWERS = dict(linear=1, squared=2, cubic=3)

def flag_parser():
    """Flags of the measurement, and one for each hyperparameter of a single value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(2, f"{message} (--help lists the flags)")
    parser.add_argument("--data", metavar="DIR", help="CIFAR, image folder or 'synthetic' (default: data)")
    parser.add_argument("--runs", metavar="N", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of run 0 (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    parser.add_argument("--out", metavar="FILE", help="for the JSON line (default: results/ by the script)")
    parser.add_argument("--target", metavar="A", type=float, help="exit 1 if the mean accuracy is below A")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile in scripts that use it")
    parser.add_argument("--dry-run", action="store_true", help="two steps of 8 images, then the evaluation")
    parser.add_argument("--output_dir", metavar="DIR", help="for checkpoints and picture (default: in runs/)")
    parser.add_argument("--resume", metavar="FILE", help="go on from it (default: newest in output_dir)")
    for name, value, text in re.findall(r"^    (\w+)=(.*?),\s+# (.*)$", CODE, re.M):
        if HYP[name] is False:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        elif isinstance(value := HYP[name], (int, float, str)):
            choices = dict(size=list(SIZES), how_scale=list(POWERS)).get(name)
            parser.add_argument(f"--{name}", type=type(value), default=value, choices=choices,
                                metavar=name[0].upper(), help=f"{text} (default: {value})")
    return parser

if __name__ == "__main__":
    ARGS = flag_parser().parse_args()  # before torch is imported: --help is instant
import numpy as np, torch, torchvision, torch.nn as nn, torch.nn.functional as F
import torch.distributed as dist
from torchvision.transforms.v2.functional import center_crop, resize
import triton, triton.language as tl
#############################################
#                  Kernels                  #
#############################################
@triton.jit
def _hog_level(Y_ptr, cells, n_images, plane, tile_y, tiles_y, tile_x, tiles_x,
               SIDE: tl.constexpr, SPLITS: tl.constexpr, NBINS: tl.constexpr, BINS: tl.constexpr):
    """Write cells [SIDE, SIDE, BINS] of a tile at unit length, those of a patch (of 2 ** SPLITS rows and
    columns) together, quarter by quarter; -> where the next level starts."""
    row = (plane // 3 * tiles_y + tile_y) * SIDE + tl.arange(0, SIDE)[:, None, None]
    column = tile_x * SIDE + tl.arange(0, SIDE)[None, :, None]
    cell = (row >> SPLITS) * (tiles_x * SIDE >> SPLITS) + (column >> SPLITS) << 2 * SPLITS
    for split in tl.static_range(SPLITS):
        cell += ((row >> split & 1) * 2 + (column >> split & 1)) << 2 * split
    k = tl.arange(0, BINS)[None, None, :]
    length = tl.sqrt(tl.sum(cells * cells, 2))[:, :, None]
    place = (cell * 3 + plane % 3).to(tl.int64) * NBINS + k
    tl.store(Y_ptr + place, cells / tl.maximum(length, 1e-12), mask=k < NBINS)
    return Y_ptr + n_images * tiles_y * tiles_x * (SIDE * SIDE * 3 * NBINS)

@triton.jit
def _hog_fwd_kernel(X_ptr, Y_ptr, sides_ptr, n_images, height, width,
                    NBINS: tl.constexpr, BINS: tl.constexpr, CELL: tl.constexpr,
                    SPLITS_0: tl.constexpr, SPLITS_1: tl.constexpr, SPLITS_2: tl.constexpr):
    """Four nested levels of HOG of a tile of 8 x 8 cells of CELL pixels, of one colour of one image."""
    TILE: tl.constexpr = 8 * CELL
    plane, tile_y, tile_x = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    y, x = tile_y * TILE + tl.arange(0, TILE)[:, None], tile_x * TILE + tl.arange(0, TILE)[None, :]
    up, down = tl.where(y == 0, 1, y - 1), tl.where(y == height - 1, height - 2, y + 1)  # reflected
    left, right = tl.where(x == 0, 1, x - 1), tl.where(x == width - 1, width - 2, x + 1)
    X_ptr += plane.to(tl.int64) * height * width
    top, middle, bottom = X_ptr + up * width, X_ptr + y * width, X_ptr + down * width
    nw, n = tl.load(top + left).to(tl.int32), tl.load(top + x).to(tl.int32)
    ne, w = tl.load(top + right).to(tl.int32), tl.load(middle + left).to(tl.int32)
    e, sw = tl.load(middle + right).to(tl.int32), tl.load(bottom + left).to(tl.int32)
    s, se = tl.load(bottom + x).to(tl.int32), tl.load(bottom + right).to(tl.int32)
    gx = (nw - ne + 2 * (w - e) + sw - se).to(tl.float32)
    gy = (nw - sw + 2 * (n - s) + ne - se).to(tl.float32)
    magnitude, bins = tl.sqrt(gx * gx + gy * gy), tl.zeros((TILE, TILE), tl.int32)
    turn = tl.where((gx < 0) | ((gx == 0) & (gy < 0)), -1.0, 1.0)  # to angles from 0 to pi
    for j in tl.static_range(1, NBINS):  # beyond the lower side of bin j
        cos, sin = tl.load(sides_ptr + 2 * j), tl.load(sides_ptr + 2 * j + 1)
        bins += (gx * turn * cos >= gy * turn * sin).to(tl.int32)
    k = tl.arange(0, BINS)[None, None, :]
    votes = tl.where(bins[:, :, None] == k, magnitude[:, :, None], 0.0)
    cells = tl.sum(tl.sum(tl.reshape(votes, (8, CELL, 8, CELL, BINS)), 3), 1)
    tiles_y, tiles_x = height // TILE, width // TILE
    Y_ptr = _hog_level(Y_ptr, cells, n_images, plane, tile_y, tiles_y, tile_x, tiles_x,
                       8, SPLITS_0, NBINS, BINS)
    cells = tl.sum(tl.sum(tl.reshape(cells, (4, 2, 4, 2, BINS)), 3), 1)
    Y_ptr = _hog_level(Y_ptr, cells, n_images, plane, tile_y, tiles_y, tile_x, tiles_x,
                       4, SPLITS_1, NBINS, BINS)
    cells = tl.sum(tl.sum(tl.reshape(cells, (2, 2, 2, 2, BINS)), 3), 1)
    Y_ptr = _hog_level(Y_ptr, cells, n_images, plane, tile_y, tiles_y, tile_x, tiles_x,
                       2, SPLITS_2, NBINS, BINS)
    cells = tl.sum(tl.sum(tl.reshape(cells, (1, 2, 1, 2, BINS)), 3), 1)
    _hog_level(Y_ptr, cells, n_images, plane, tile_y, tiles_y, tile_x, tiles_x, 1, 0, NBINS, BINS)

@triton.jit
def _norm_fwd_kernel(X_ptr, R_ptr, W_ptr, B_ptr, S_ptr, Y_ptr, mean_ptr, rstd_ptr, n_rows, n_cols, eps,
                     ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ADD: tl.constexpr, STATS: tl.constexpr):
    """S = X + R if ADD; Y = (S - mean) * rstd * W + B, with mean and rstd, which STATS keeps, of each row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_SIZE)[None, :]
    place, mask = row[:, None] * n_cols + column, (row < n_rows)[:, None] & (column < n_cols)
    x = tl.load(X_ptr + place, mask=mask, other=0).to(tl.float32)
    if ADD:
        x += tl.load(R_ptr + place, mask=mask, other=0).to(tl.float32)
        tl.store(S_ptr + place, x, mask=mask)
    mean = tl.sum(x, 1) / n_cols
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / n_cols + eps)
    if STATS:
        tl.store(mean_ptr + row, mean, mask=row < n_rows)
        tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    weight = tl.load(W_ptr + column, mask=column < n_cols, other=0)
    bias = tl.load(B_ptr + column, mask=column < n_cols, other=0)
    tl.store(Y_ptr + place, centred * rstd[:, None] * weight + bias, mask=mask)

@triton.jit
def _norm_bwd_kernel(DY_ptr, DS_ptr, S_ptr, W_ptr, mean_ptr, rstd_ptr, DX_ptr, DW_ptr, DB_ptr, n_rows, n_cols,
                     ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ADD: tl.constexpr):
    """DX = gradient through the norm, plus DS if ADD; DW and DB of the rows of this program."""
    column = tl.arange(0, BLOCK_SIZE)[None, :]
    weight = tl.load(W_ptr + column, mask=column < n_cols, other=0)
    dw, db = tl.zeros((BLOCK_SIZE,), tl.float32), tl.zeros((BLOCK_SIZE,), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        place, mask = row[:, None] * n_cols + column, (row < n_rows)[:, None] & (column < n_cols)
        mean = tl.load(mean_ptr + row, mask=row < n_rows, other=0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0)[:, None]
        x = (tl.load(S_ptr + place, mask=mask, other=0).to(tl.float32) - mean) * rstd
        x = tl.where(mask, x, 0.0)
        dy = tl.load(DY_ptr + place, mask=mask, other=0).to(tl.float32)
        dw, db, g = dw + tl.sum(dy * x, 0), db + tl.sum(dy, 0), dy * weight
        along, constant = tl.sum(g * x, 1)[:, None] / n_cols, tl.sum(g, 1)[:, None] / n_cols
        dx = (g - constant - x * along) * rstd
        if ADD:
            dx += tl.load(DS_ptr + place, mask=mask, other=0).to(tl.float32)
        tl.store(DX_ptr + place, dx, mask=mask)
    place = tl.program_id(0) * n_cols + tl.arange(0, BLOCK_SIZE)
    tl.store(DW_ptr + place, dw, mask=tl.arange(0, BLOCK_SIZE) < n_cols)
    tl.store(DB_ptr + place, db, mask=tl.arange(0, BLOCK_SIZE) < n_cols)

class AddNorm(torch.autograd.Function):
    """(x, branch, weight, bias, eps, dtype of y) -> (s = x + branch, y = LayerNorm(s)); without branch, y"""
    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, dtype):
        x, add, n_cols = x.contiguous(), branch is not None, x.shape[-1]
        branch = branch.contiguous() if add else x
        s = torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype)) if add else x
        y, n_rows, keep = torch.empty_like(x, dtype=dtype), x.numel() // n_cols, any(ctx.needs_input_grad)
        block = triton.next_power_of_2(n_cols)
        rows = max(1, 4096 // block)
        mean, rstd = x.new_empty(2, n_rows if keep else 0, dtype=torch.float32)
        _norm_fwd_kernel[(triton.cdiv(n_rows, rows),)](
            x, branch, weight, bias, s, y, mean, rstd, n_rows, n_cols, eps, rows, block, add, keep)
        ctx.save_for_backward(s, weight, mean, rstd)
        ctx.rows, ctx.block, ctx.branch = rows, block, branch.dtype if add else None
        return (s, y) if add else y
    @staticmethod
    def backward(ctx, *grads):
        s, weight, mean, rstd = ctx.saved_tensors
        add, n_rows, n_cols, steps = ctx.branch is not None, mean.numel(), s.shape[-1], 8
        ds, dy = (grads[0].contiguous(), grads[1].contiguous()) if add else (s, grads[0].contiguous())
        programs = triton.cdiv(n_rows, ctx.rows * steps)
        dx, (dw, db) = torch.empty_like(s), s.new_empty(2, programs, n_cols, dtype=torch.float32)
        _norm_bwd_kernel[(programs,)](dy, ds, s, weight, mean, rstd, dx, dw, db, n_rows, n_cols,
                                      ctx.rows, steps, ctx.block, add)
        return dx, dx.to(ctx.branch) if add else None, dw.sum(0), db.sum(0), None, None

def add_norm(x, branch, norm):
    """(s, norm(s)) for s = x + branch, or x where branch is None; on a GPU in one kernel each way."""
    if not x.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        x = x if branch is None else x + branch
        return x, norm(x)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    result = AddNorm.apply(x, branch, norm.weight, norm.bias, norm.eps, dtype)
    return (x, result) if branch is None else result
#############################################
#                 Optimizer                 #
#############################################
def layer_of(name):
    """Layer of a parameter: 0 for the patch embedding, then blocks; a stage has that of its block, the class
    token none."""
    part, _, rest = name.partition(".")
    if part == "decoders":
        return SIZES[HYP["size"]].taps[int(rest.split(".")[0])]
    return dict(patch_embed=0, cls_token=None).get(part) if part != "blocks" else int(rest.split(".")[0]) + 1

def shares():
    """Share of the steps after the warm-up that each layer trains: [1 + depth] from FreezeOut's rule"""
    first, depth = int(HYP["dont_freeze_pe"]), SIZES[HYP["size"]].depth
    steps = [HYP["t_0"] + (1 - HYP["t_0"]) * i / (depth - first) for i in range(depth + 1 - first)]
    return [1.0] * first + [step ** POWERS[HYP["how_scale"]] for step in steps]

def freeze_level(step, steps_per_epoch):
    """Layers frozen in a 0-based step, counted from the first on: of 2, the patch embedding and block 1."""
    epochs = HYP["epochs"] - HYP["warmup_epochs"]
    done = (step / steps_per_epoch - HYP["warmup_epochs"]) / max(epochs, 1e-9)
    return max((i for i, share in enumerate(shares(), 1) if done > share), default=0)

def keeps_graph():
    """Whether gradients pass through frozen blocks."""
    return HYP["dont_freeze_pe"] or HYP["keep_graph"]

def trains(name, level):
    """Whether a parameter trains when that many layers are frozen."""
    layer = layer_of(name)
    if layer is None:
        return keeps_graph() or level < 2
    return layer >= level or layer == 0 and HYP["dont_freeze_pe"]

def make_optimizer(model, level=0):
    """AdamW that decays tensors with two dimensions or more, tokens included, but no bias and no norm: those
    that train when that many layers are frozen."""
    parameters = [p for name, p in model.named_parameters() if trains(name, level)]
    groups = [dict(params=[p for p in parameters if (p.ndim > 1) == decayed],
                   weight_decay=HYP["weight_decay"] * decayed) for decayed in (True, False)]
    return torch.optim.AdamW(groups, lr=0.0, betas=HYP["betas"], fused=True)

def learning_rate(step, steps_per_epoch):
    """Of a 0-based step: linear from 0 to the peak in the warm-up, constant, and linear down to min_lr."""
    peak = HYP["blr"] * HYP["batch_size"] * HYP["accum_iter"] * WORLD / 256
    epoch = step / steps_per_epoch
    if epoch < HYP["warmup_epochs"]:
        return peak * epoch / HYP["warmup_epochs"]
    left = (HYP["epochs"] - epoch) / max(HYP["epochs"] * HYP["cooldown"], 1e-9)
    return HYP["min_lr"] + (peak - HYP["min_lr"]) * min(left, 1.0)
#############################################
#                   Data                    #
#############################################
CIFARS = dict(cifar10=torchvision.datasets.CIFAR10, cifar100=torchvision.datasets.CIFAR100)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
DTYPE = dict(cuda=torch.bfloat16, cpu=torch.float32)  # of matmuls; weights are fp32

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

def rng(device, *key):
    """Random generator of a purpose, so that no draw depends on what was drawn before it."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")
    return torch.Generator(device).manual_seed(seed)

def crop_boxes(numbers, height, width):
    """(top, left, height, width), each [n], of RandomResizedCrop from uniform numbers [n, 22]: the first of
    ten candidates that fits into the image, or else its middle."""
    (low, high), ratios = HYP["crop_scale"], np.log(HYP["crop_ratio"]).tolist()
    area = height * width * (low + (high - low) * numbers[:, :10])
    ratio = (ratios[0] + (ratios[1] - ratios[0]) * numbers[:, 10:20]).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits, widest = (w <= width) & (h <= height), HYP["crop_ratio"][1]
    first, none = fits.int().argmax(1, keepdim=True), ~fits.any(1)
    w = w.gather(1, first)[:, 0].masked_fill(none, min(width, round(height * widest)))
    h = h.gather(1, first)[:, 0].masked_fill(none, min(height, round(width * widest)))
    y, x = numbers[:, 20:22].masked_fill(none[:, None], 0.4999999).unbind(1)  # the middle, rounded down
    return ((height - h + 1) * y).floor(), ((width - w + 1) * x).floor(), h, w

def cubic_weights(start, length, size, out):
    """[n, out, size]: rows that resample `length` pixels from `start` on to `out`, antialiased bicubic."""
    scale = length[:, None, None] / out
    center = (torch.arange(out, device=start.device)[:, None] + 0.5) * scale - 0.5 + start[:, None, None]
    pixel = torch.arange(size, device=start.device)
    d = (pixel - center).abs() / scale.clamp(min=1)
    weights = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)
    inside = (pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None]) & (d < 2)
    return weights * inside / (weights * inside).sum(2, keepdim=True)

def crop_batch(images, numbers, size):
    """Random crops, half of them mirrored: uint8 [n, 3, H, W], numbers [n, 23] -> [n, 3, size, size]"""
    top, left, h, w = crop_boxes(numbers, *images.shape[2:])
    rows = cubic_weights(top, h, images.shape[2], size)
    columns = cubic_weights(left, w, images.shape[3], size)
    columns = torch.where(numbers[:, 22, None, None] < 0.5, columns.flip(1), columns)
    resized = rows[:, None] @ images.float() @ columns[:, None].mT
    return resized.round().clamp(0, 255).to(torch.uint8)

class Memory:
    """A train or test set held as uint8 [N, 3, H, W], on the GPU if there is one, and cropped in batches."""
    def __init__(self, images, labels):
        self.digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        self.images, self.labels, self.broken = images.permute(0, 3, 1, 2).contiguous(), labels, set()
    def to(self, device):
        self.images = self.images.to(device)
        return self
    def crops(self, batches, size):
        """uint8 [n, 3, size, size] for each (index [n], numbers [n, 23])"""
        for index, numbers in batches:
            yield crop_batch(self.images[index], numbers, size)
    def views(self, size):
        """(uint8 [n, 3, size, size], labels [n]) of all images in order"""
        for images, labels in zip(self.images.split(500), self.labels.split(500)):
            if images.shape[2:] != (size, size):
                images = resize(images, [size, size], interpolation=3)
            yield images, labels

class Folder(torch.utils.data.Dataset):
    """An image folder, decoded by the GPU where torchvision can, or else by worker processes; an image that
    cannot be decoded is named and skipped."""
    device = None  # that decodes
    def __init__(self, samples):
        self.paths, labels = zip(*samples)
        self.labels, self.broken = torch.tensor(labels), set()
        self.digest = hashlib.sha256(repr(samples).encode()).hexdigest()
    def to(self, device):
        probe = torchvision.io.encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
        with contextlib.suppress(RuntimeError):  # of a torchvision without nvJPEG
            if device.type == "cuda":
                torchvision.io.decode_jpeg([probe], device=device)
                self.device = device
        return self
    def __getitem__(self, item):
        if not self.device:
            return self.decoded(item)
        with contextlib.suppress(OSError):
            return pathlib.Path(self.paths[item[0]]).read_bytes() or b"empty", item
        return b"unreadable", item
    def decoded(self, item):
        (index, numbers, size), broken = item, []
        while len(broken) < 100:
            path = self.paths[index]
            with contextlib.suppress(RuntimeError, OSError):
                image = torchvision.io.read_image(path, torchvision.io.ImageReadMode.RGB)
                return self.view(image, numbers, size), self.labels[index], broken
            broken, index = broken + [path], (index + 1) % len(self.paths)
        raise OSError(f"100 images in a row cannot be decoded, the last is {path}")
    def view(self, image, numbers, size):
        if numbers is None:  # the middle of the image
            return center_crop(resize(image, [size * 8 // 7], interpolation=3), [size, size])
        top, left, h, w = (int(n) for n in crop_boxes(numbers[None], *image.shape[1:]))
        crop = resize(image[:, top:top + h, left:left + w], [size, size], interpolation=3)
        return crop.flip(-1) if numbers[22] < 0.5 else crop
    def decoded_on_device(self, files):
        """Rows as of decoded() from [(content, item)]; what the device cannot decode goes the usual way."""
        def decode(content):
            return torchvision.io.decode_jpeg(content, torchvision.io.ImageReadMode.RGB, device=self.device)
        contents = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content, _ in files]
        try:
            images = decode(contents)
        except RuntimeError:  # of at least one of them
            images = [None] * len(files)
            for place, content in enumerate(contents):
                with contextlib.suppress(RuntimeError):
                    images[place] = decode(content)
        for image, (_, (index, numbers, size)) in zip(images, files):
            if image is None:
                view, *rest = self.decoded((index, numbers, size))
                yield view.to(self.device), *rest
            else:
                yield self.view(image, numbers, size), self.labels[index], []
    def load(self, batches):
        """(uint8 [n, 3, size, size], labels [n]) for each batch of (index, numbers or None, size)"""
        def collate(rows):
            images, labels, broken = zip(*rows)
            return torch.stack(images), torch.stack(labels), sum(broken, [])
        loader = torch.utils.data.DataLoader(self, batch_sampler=batches, num_workers=HYP["workers"],
                                             collate_fn=list if self.device else collate)
        for batch in loader:
            images, labels, broken = collate(self.decoded_on_device(batch)) if self.device else batch
            for path in set(broken) - self.broken:
                print(f"{SCRIPT.name}: warning: skipped {path}, which cannot be decoded", file=sys.stderr)
            self.broken.update(broken)
            yield images, labels
    def crops(self, batches, size):
        for images, _ in self.load([(int(i), row, size) for i, row in zip(*batch)] for batch in batches):
            yield images
    def views(self, size):
        index = torch.arange(len(self.paths)).split(100)
        yield from self.load([(int(i), None, size) for i in part] for part in index)

def read_cache(path):
    """Prepared set, dict(images uint8 [N, S, S, 3], labels int64 [N]); exit 3 if it is no good."""
    with contextlib.suppress(Exception):  # whatever damage leads to, the sentence below is the answer
        assert zipfile.ZipFile(path).testzip() is None  # checksums, which torch.load does not look at
        cache = torch.load(path, weights_only=True)
        images, labels = cache["images"], cache["labels"]
        assert images.dtype == torch.uint8 and images.shape[3:] == (3,) and len(images) == len(labels) > 0
        assert labels.dtype == torch.int64 and labels.min() >= 0
        return images, labels
    fail(3, f"{path} is missing or damaged; delete both caches there and add the official archive")

def load_folder(root):
    """(train set, test set) of root/train/CLASS/... and root/val/CLASS/..., or val as in Tiny-ImageNet."""
    train = torchvision.datasets.ImageFolder(root / "train", allow_empty=True)
    notes = root / "val" / "val_annotations.txt"
    if notes.exists():
        rows = [line.split("\t")[:2] for line in notes.read_text().splitlines()]
        test = [(str(root / "val" / "images" / name), wnid) for name, wnid in rows]
    else:
        val = torchvision.datasets.ImageFolder(root / "val", allow_empty=True)
        test = [(path, val.classes[number]) for path, number in val.samples]
    train.samples and test or fail(3, f"no images under {root / 'train'} or {root / 'val'}")
    unknown = {name for _, name in test} - {*train.classes}
    unknown and fail(3, f"{root / 'val'} has images of {min(unknown)}, {root / 'train'} has none")
    test = [(path, train.class_to_idx[name]) for path, name in test]
    return Folder(train.samples), Folder(test)

def load_data(folder):
    """-> (name, train set, test set); name is 'cifar10', 'cifar100', 'synthetic', or 'other'."""
    if folder == "synthetic":
        return folder, Memory(**draw_synthetic(5000, seed=1)), Memory(**draw_synthetic(1000, seed=2))
    root = pathlib.Path(folder or "data")
    if (root / "train").is_dir():
        return "other", *load_folder(root)
    for name, place in itertools.product(CIFARS, (root, root / "cifar10", root / "cifar100")):
        files = "train.pt", CIFARS[name].base_folder, CIFARS[name].filename
        if found := any((place / file).exists() for file in files):
            break
    else:
        folder and fail(3, f"{folder} holds no CIFAR-10, CIFAR-100 or image folder (train/CLASS, val/CLASS)")
        name, place = "cifar10", root / "cifar10"
    cifar, archive = CIFARS[name], place / CIFARS[name].filename
    try:
        socket.setdefaulttimeout(10)
        for part in () if (place / "train.pt").exists() else ("test", "train"):
            whole = cifar(place, train=part == "train", download=archive.exists() or not found)
            images, labels = torch.tensor(whole.data), torch.tensor(whole.targets)
            partial = place / f"{part}.{os.getpid()}"
            torch.save(dict(images=images, labels=labels, classes=whole.classes), partial)
            os.replace(partial, place / f"{part}.pt")  # a reader sees all of it or nothing
    except Exception as error:  # of the network, a proxy, a read-only or full disk, a damaged file
        found and fail(3, f"cannot prepare {archive} ({error}); get it again, its md5 is {cifar.tgz_md5}")
        archive.unlink(missing_ok=True)
        print(f"NOTICE: {root} holds no data, and downloading CIFAR-10 failed ({type(error).__name__}).\n"
              "NOTICE: Training on built-in synthetic images instead, to show that the installation works.\n"
              f"NOTICE: For real results put {archive.name} (md5 {cifar.tgz_md5}) into {root}.")
        return load_data("synthetic")
    sets = [read_cache(place / f"{part}.pt") for part in ("train", "test")]
    counts = [labels.bincount().tolist() for _, labels in sets]
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        if counts == [[50000 // classes] * classes, [10000 // classes] * classes]:
            return name, *(Memory(*part) for part in sets)
    return "other", *(Memory(*part) for part in sets)

def plan(train_set, seed, first_step, last_step, device):
    """Yields ((index [batch_size], crop numbers [batch_size, 23]), noise [batch_size, patches]) of this
    process. The numbers of a step depend on the seed and the step alone, not on how many share it."""
    size, per_pass = SIZES[HYP["size"]], HYP["batch_size"] * WORLD
    per_step = per_pass * HYP["accum_iter"]
    per_epoch = len(train_set.labels) // per_step
    for step in range(first_step, last_step):
        epoch, place = divmod(step, per_epoch)
        if step == first_step or place == 0:
            draws = rng(device, "order", seed, epoch)
            order = torch.randperm(len(train_set.labels), generator=draws, device=device)
        index = order[place * per_step:(place + 1) * per_step]
        draws = rng(device, "step", seed, step)
        numbers = torch.rand(per_step, 23, generator=draws, device=device)
        noise = torch.rand(per_step, (size.image // size.patch) ** 2, generator=draws, device=device)
        for start in range(RANK * HYP["batch_size"], per_step, per_pass):
            part = slice(start, start + HYP["batch_size"])
            yield (index[part], numbers[part]), noise[part]
#############################################
#                   Model                   #
#############################################
def bin_sides(nbins):
    """Cosine and sine of the lower side of each orientation bin, [nbins, 2]"""
    angles = torch.arange(nbins, dtype=torch.float64) * math.pi / nbins
    return torch.stack([angles.cos(), angles.sin()], 1).float()

def nested(grid, scale):
    """Row-major places of the cells of each patch, quarter by quarter, [grid * grid, scale * scale]"""
    places = torch.arange((grid * scale) ** 2).view(grid, scale, grid, scale).transpose(1, 2)
    while places.shape[-1] > 1:
        places = places.unflatten(-2, (2, -1)).unflatten(-1, (2, -1)).transpose(-3, -2)
    return places.reshape(grid * grid, scale * scale)

def hog_plain(images, cell, sides, scale):
    """What hog() gives, in plain torch: gradients and votes once, coarse cells as sums of fine ones."""
    x = F.pad(images.float(), [1] * 4, mode="reflect")
    gx = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    gy = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    gx, gy = gx[..., :-2] - gx[..., 2:], gy[:, :, :-2] - gy[:, :, 2:]
    magnitude, turn = (gx * gx + gy * gy).sqrt(), 1 - 2 * ((gx < 0) | (gx == 0) & (gy < 0)).float()
    gx, gy = gx * turn, gy * turn  # to angles from 0 to pi
    bins = sum((gx * cos >= gy * sin).to(torch.uint8) for cos, sin in sides[1:].tolist())
    cells = [torch.stack([F.avg_pool2d(magnitude * (bins == k), cell) for k in range(len(sides))], 2)]
    for _ in range(3):
        cells.append(F.avg_pool2d(cells[-1].flatten(1, 2), 2).unflatten(1, (3, -1)))
    cells = [level / level.square().sum(2, keepdim=True).sqrt().clamp(min=1e-12) for level in cells]
    cells = [level.flatten(3).flatten(1, 2).mT for level in cells]
    grid, scales = images.shape[-1] // (cell * scale), [scale >> i for i in range(4)]
    return [level[:, nested(grid, s)] if s else level for level, s in zip(cells, scales)]

def hog(images, cell, sides, scale):
    """Histograms of oriented gradients of uint8 [B, 3, H, W] in cells of that many pixels, and of two, four
    and eight times as many, per colour of unit length, or 0 where nothing varies: four [B, cells, 3 * nbins],
    or [B, patches, cells, 3 * nbins] as long as a cell is no larger than a patch of cell * scale pixels.
    On a GPU in one kernel that reads the image once; H and W are multiples of 8 cells."""
    (n, _, height, width), tile, nbins = images.shape, 8 * cell, len(sides)
    if not images.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        return hog_plain(images, cell, sides, scale)
    shapes = [(n, height * width // (cell << level) ** 2, 3 * nbins) for level in range(4)]
    cells = torch.empty(sum(map(math.prod, shapes)), device=images.device)
    splits = scale.bit_length() - 1
    _hog_fwd_kernel[(3 * n, height // tile, width // tile)](
        images.contiguous(), cells, sides, n, height, width,
        nbins, triton.next_power_of_2(nbins), cell, *(max(splits - level, 0) for level in range(3)))
    levels = [part.view(shape) for part, shape in zip(cells.split([*map(math.prod, shapes)]), shapes)]
    scales = [scale >> level for level in range(4)]
    return [level.unflatten(1, (-1, s * s)) if s else level for level, s in zip(levels, scales)]

def positions(dim, grid):
    """Fixed positions [1, 1 + grid * grid, dim]: 0, then sines and cosines of the column and of the row."""
    angles = torch.arange(grid)[:, None] / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    table = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], 1)
    return torch.cat([torch.zeros(1, dim), table])[None]

class Attention(nn.Module):
    """Multi-head self-attention: [B, tokens, dim] -> the same"""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class Block(nn.Module):
    """Pre-norm transformer block: x [B, tokens, dim] and the branch still to be added to it -> the same"""
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.fc1 = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
    def forward(self, x, branch=None):
        x, y = add_norm(x, branch, self.norm1)
        x, y = add_norm(x, self.attn(y), self.norm2)
        return x, self.fc2(F.gelu(self.fc1(y)))

class Decoder(nn.Module):
    """Of one stage, from the tokens that its block puts out to the cells of its scale."""
    def __init__(self, size, scale, nbins):
        super().__init__()
        width, grid = size.dec_dim, size.image // size.patch
        self.scale, self.grid = scale, grid
        self.norm, self.embed = nn.LayerNorm(size.dim, eps=1e-6), nn.Linear(size.dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", positions(width, grid), persistent=False)
        self.block, self.out_norm = Block(width, size.dec_heads), nn.LayerNorm(width, eps=1e-6)
        ups = int(math.log2(max(scale, 1)))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(width >> i, width >> i + 1, 2, 2) for i in range(ups))
        self.up_norms = nn.ModuleList(nn.LayerNorm(width >> i + 1, eps=1e-6) for i in range(ups - 1))
        self.pred = nn.Conv2d(width >> ups, 3 * nbins, 1)
    def head(self, x):
        """Hidden patches [B, n, width] -> [B, n, scale ** 2, 3 * nbins]; below scale 1 all patches, in order,
        -> [B, cells, 3 * nbins]"""
        if self.scale < 1:
            x = F.avg_pool2d(x.mT.unflatten(2, (self.grid, self.grid)), int(1 / self.scale)).flatten(2).mT
        x = x if self.scale < 1 else x[:, :, None]
        for i, up in enumerate(self.ups):  # a patch never mixes with its neighbours
            weight, bias = up.weight.permute(2, 3, 1, 0).flatten(0, 2), up.bias.repeat(4)
            x = F.linear(x, weight, bias).unflatten(3, (4, -1)).flatten(2, 3)
            x = F.gelu(add_norm(x, None, self.up_norms[i])[1]) if i < len(self.up_norms) else x
        return F.linear(x, self.pred.weight.flatten(1), self.pred.bias)
    def forward(self, tokens, places, restore):
        """Kept tokens [B, 1 + n, dim], positions [B, 1 + patches, width] of these and then of the hidden
        patches, restore [B, patches], the places in that order -> predictions"""
        tokens = self.embed(add_norm(tokens, None, self.norm)[1])
        masked = self.mask_token.expand(len(tokens), places.shape[1] - tokens.shape[1], -1).to(tokens.dtype)
        x, branch = self.block(torch.cat([tokens, masked], 1) + places)
        x = add_norm(x, branch, self.out_norm)[1]
        if self.scale < 1:
            return self.head(x[:, 1:].gather(1, restore[:, :, None].expand(-1, -1, x.shape[2])))
        return self.head(x[:, tokens.shape[1]:])

def cell_weights(mask, scale):
    """Mask [B, patches], 1 where hidden -> share of each cell of a scale that is hidden, [B, cells]"""
    mask = mask.unflatten(1, (1, math.isqrt(mask.shape[1]), -1))
    mask = F.interpolate(mask, scale_factor=scale) if scale > 1 else F.avg_pool2d(mask, int(1 / scale))
    return mask.flatten(1)

class LocalMIM(nn.Module):
    """ViT encoder whose taps are trained by decoders of their own to predict HOG at their own scale."""
    def __init__(self):
        super().__init__()
        size = SIZES[HYP["size"]]
        self.size = size
        self.register_buffer("sides", bin_sides(HYP["hog_nbins"]), persistent=False)
        self.patch_embed = nn.Conv2d(3, size.dim, size.patch, size.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.register_buffer("positions", positions(size.dim, size.image // size.patch), persistent=False)
        self.register_buffer("mean_std", torch.tensor([MEAN, STD]), persistent=False)
        self.blocks = nn.ModuleList(Block(size.dim, size.heads) for _ in range(size.depth))
        self.decoders = nn.ModuleList(Decoder(size, scale, HYP["hog_nbins"]) for scale in size.scales)
        self.stand_ins = {}  # copies of frozen blocks where gradients still pass through these
        for name, p in self.named_parameters():
            if name.endswith("_token"):
                nn.init.normal_(p, std=0.02)
        for linear in [module for module in self.modules() if isinstance(module, nn.Linear)]:
            nn.init.xavier_uniform_(linear.weight), nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.data.flatten(1))
    def encode(self, images, kept=None, level=0):
        """uint8 [B, 3, S, S] and kept patches [B, n] or all -> tokens [B, 1 + n, dim] after each tap that
        trains; the first `level` layers are frozen"""
        grad = torch.is_grad_enabled()
        mean, std = self.mean_std.repeat_interleave(self.size.patch ** 2, 1)
        x = F.pixel_unshuffle(images, self.size.patch).flatten(2).mT
        at = self.positions[:, 1:].expand(len(x), -1, -1)
        if kept is not None:
            x, at = (part.gather(1, kept[:, :, None].expand(-1, -1, part.shape[2])) for part in (x, at))
        with torch.set_grad_enabled(grad and trains("patch_embed", level)):
            weight, bias = self.patch_embed.weight.flatten(1), self.patch_embed.bias
            x = F.linear((x / 255 - mean) / std, weight, bias) + at
        with torch.set_grad_enabled(grad and trains("cls_token", level)):
            x, taps = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], 1), []
        branch = None
        for i, block in enumerate(self.blocks, 1):
            with torch.set_grad_enabled(grad and (i >= level or keeps_graph())):
                x, branch = self.stand_ins.get(i, block)(x, branch)
                if i in self.size.taps:
                    x, branch = x + branch, None
                    taps += [x] * (i >= level)
        return taps
    def cells(self, images):
        """HOG of each stage as hog() gives it"""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            scale = self.size.scales[0]
            return hog(images, self.size.patch // scale, self.sides, scale)
    def stages(self, images, noise, level=0):
        """Predictions of each stage that trains as hog() gives targets, but of hidden patches alone; their
        places [B, n] and the mask [B, patches]"""
        order = noise.argsort(1)
        n_kept, restore = int(noise.shape[1] * (1 - HYP["mask_ratio"])), torch.empty_like(order)
        restore.scatter_(1, order, torch.arange(noise.shape[1], device=order.device).expand_as(order))
        places = F.pad(order + 1, (1, 0))  # the class token comes first
        places = self.decoders[0].positions[0, places]
        taps = self.encode(images, order[:, :n_kept], level)
        live = self.decoders[-len(taps):]
        predictions = [decoder(x, places, restore).float() for decoder, x in zip(live, taps)]
        return predictions, order[:, n_kept:], (restore >= n_kept).float()
    def rows(self, cells, scale):
        """Cells of all patches as hog() gives them -> [B, cells, 3 * nbins] row by row"""
        if scale < 1:
            return cells
        return cells.flatten(1, 2)[:, nested(self.decoders[0].grid, scale).flatten().argsort()]
    def targets(self, images):
        """HOG of each stage: uint8 [B, 3, S, S] -> [[B, cells, 3 * nbins]]"""
        return [self.rows(cells, scale) for cells, scale in zip(self.cells(images), self.size.scales)]
    def predict(self, images, noise):
        """Predictions and weights of all cells of each stage: [[B, cells, 3 * nbins]], [[B, cells]]"""
        predictions, hidden, mask = self.stages(images, noise)
        for i, (x, scale) in enumerate(zip(predictions, self.size.scales)):
            if scale >= 1:
                whole = x.new_zeros(len(x), mask.shape[1], *x.shape[2:])
                predictions[i] = whole.scatter(1, hidden[:, :, None, None].expand_as(x), x)
        predictions = [self.rows(x, scale) for x, scale in zip(predictions, self.size.scales)]
        return predictions, [cell_weights(mask, scale) for scale in self.size.scales]
    def forward(self, images, noise, level=0):
        """Losses of the stages [4]: mean squared errors over the hidden cells, or 0 where the block of the
        stage is among the first `level` layers, which are frozen"""
        (predictions, hidden, mask), losses = self.stages(images, noise, level), []
        retired = len(self.decoders) - len(predictions)
        for x, y, scale in zip(predictions, self.cells(images)[retired:], self.size.scales[retired:]):
            if scale >= 1:
                y = y.gather(1, hidden[:, :, None, None].expand(-1, -1, *y.shape[2:]))
                losses.append(F.mse_loss(x, y))
            else:
                w = cell_weights(mask, scale)
                losses.append(((x - y).square().mean(2) * w).sum() / w.sum())
        return F.pad(torch.stack(losses), (retired, 0))

def train_flops(level=0):
    """FLOPs to train on an image: matmuls and convolutions, forward and backward, when the first `level`
    layers are frozen."""
    size, kept = SIZES[HYP["size"]], 1 - HYP["mask_ratio"]
    n = (size.image // size.patch) ** 2
    block = lambda tokens, dim: tokens * (24 * dim ** 2 + 4 * tokens * dim)
    embed, seen = 6 * n * size.dim * size.patch ** 2, int(n * kept) + 1
    live, forward = size.depth - max(level - 1, 0), 0
    passed = size.depth if keeps_graph() else live  # by gradients
    for tap, scale in zip(size.taps, size.scales):
        if tap < level:
            continue
        width, cells = size.dec_dim, n * min(scale, 1) ** 2
        forward += 2 * seen * size.dim * width + block(n + 1, width)
        while scale > 1:
            forward, cells, width, scale = forward + 4 * cells * width ** 2, 4 * cells, width // 2, scale / 2
        forward += 2 * cells * width * 3 * HYP["hog_nbins"]
    encoder = block(seen, size.dim) * (size.depth + passed + live)
    return 3 * forward + encoder + embed * (1 + trains("patch_embed", level))
#############################################
#                  Logging                  #
#############################################
COLUMNS = ("run", "epoch", "frozen", "train_loss", *(f"stage_{i}" for i in range(1, 5)), "images_per_s",
           "minutes_left", "knn_acc")
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

def glyphs(cells, grid, pixels):
    """HOG cells [grid * grid, 3 * nbins] -> float [3, pixels, pixels]: lines along the edges, in colour"""
    nbins, size, cells = cells.shape[1] // 3, pixels // grid, cells.float().cpu().clamp(min=0)
    angle = (torch.arange(nbins) + 0.5)[:, None, None] * math.pi / nbins
    y, x = torch.arange(size) - (size - 1) / 2, torch.arange(size) - (size - 1) / 2
    off = (x * angle.sin() + y[:, None] * angle.cos()).abs()  # from the line at right angles to the gradient
    lines = (1 - off).clamp(0, 1) * ((x ** 2 + y[:, None] ** 2).sqrt() <= size / 2)
    drawn = torch.einsum("ghcb,byx->cgyhx", cells.view(grid, grid, 3, nbins), lines)
    return drawn.reshape(3, pixels, pixels)

def save_picture(model, images, noise, path):
    """PNG, a row per image: it, what the encoder sees, and for each stage targets beside predictions."""
    model.eval()
    with torch.no_grad(), autocast(images.device):
        (predictions, weights), targets = model.predict(images, noise), model.targets(images)
    grid, hidden, rows = math.isqrt(noise.shape[1]), weights[model.size.scales.index(1)].cpu(), []
    pixels = int(8 * grid * max(model.size.scales))
    zoom = lambda image, mode: F.interpolate(image[None], size=(pixels, pixels), mode=mode)[0]
    for i, image in enumerate(images.cpu()):
        large = zoom(image / 255, "bicubic").clamp(0, 1)
        panels = [large, large * (1 - zoom(hidden[i].view(1, grid, grid), "nearest"))]
        for prediction, weight, target in zip(predictions, weights, targets):
            for cells in (target[i], prediction[i] * (weight[i, :, None] > 0)):
                panels.append(glyphs(cells, math.isqrt(len(cells)), pixels))
        rows.append(torch.cat([F.pad(panel, [2] * 4, value=0.5) for panel in panels], 2))
    picture = (torch.cat(rows, 1).clamp(0, 1) * 255).to(torch.uint8)
    torchvision.io.write_png(picture, str(path))
#############################################
#                Checkpoints                #
#############################################
def save_checkpoint(folder, state):
    """Write checkpoint-STEP.pt, all of it or nothing, and keep the one before."""
    path, partial = folder / f"checkpoint-{state['step']:08d}.pt", folder / f".checkpoint.{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        fail(1, f"cannot write {path} ({error}); earlier checkpoints are whole")
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-2]:
        old.unlink()

def read_checkpoint(path):
    """State dict of a checkpoint, or None, with a line on stderr, where it is damaged."""
    with contextlib.suppress(Exception):
        assert zipfile.ZipFile(path).testzip() is None
        return torch.load(path, weights_only=True, map_location="cpu")
    print(f"{SCRIPT.name}: warning: {path} is missing or damaged", file=sys.stderr)

def latest_checkpoint(folder, resume, per_step, seed):
    """State of the file to resume, or of the newest whole checkpoint of the folder, or None; exit 3 or 2. How
    the images of a step are shared out may change, but neither their number nor seed nor script."""
    paths = [pathlib.Path(resume)] if resume else sorted(folder.glob("checkpoint-*.pt"), reverse=True)
    state = next(filter(None, map(read_checkpoint, paths)), None)
    state or not resume or fail(3, f"cannot resume from {resume}")
    free = "workers", "save_epochs", "batch_size", "accum_iter"
    differing = [key for key in HYP if state and key not in free and state["hyp"].get(key) != HYP[key]]
    differing += ["batch_size"] if state and state["per_step"] != per_step else []
    own = dict(seed=seed, script=SCRIPT.name)
    differing += [key for key in own if state and state[key] != own[key]]
    differing and fail(2, f"{resume or folder} holds a checkpoint of another {', '.join(differing)}")
    return state
#############################################
#                Evaluation                 #
#############################################
def features(model, dataset):
    """(gap [N, dim], cls [N, dim], labels [N]): mean patch and class token of the last tap after its norm"""
    model.eval()
    device, rows = model.cls_token.device, []
    with torch.no_grad(), autocast(device):
        for images, labels in dataset.views(model.size.image):
            tokens = model.decoders[-1].norm(model.encode(images.to(device))[-1]).float()
            rows.append((tokens[:, 1:].mean(1), tokens[:, 0], labels.to(device)))
    return [torch.cat(part) for part in zip(*rows)]

def knn(train_features, train_labels, test_features, test_labels, ks=(10, 20, 100, 200)):
    """{k: (top-1, top-5)} of k nearest neighbours, which vote with exp(cosine / temperature), as in DINO"""
    train_features, test_features = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    classes, hits = int(train_labels.max()) + 1, collections.Counter()
    for queries, labels in zip(test_features.split(500), test_labels.split(500)):
        similar, index = (queries @ train_features.T).topk(min(max(ks), len(train_features)))
        weights, votes = (similar / HYP["knn_temperature"]).exp(), train_labels[index]
        for k in ks:
            counts = torch.zeros(len(queries), classes, device=queries.device)
            counts.scatter_add_(1, votes[:, :k], weights[:, :k])
            right = counts.topk(min(5, classes)).indices == labels[:, None]
            hits[k, 1], hits[k, 5] = hits[k, 1] + int(right[:, :1].sum()), hits[k, 5] + int(right.sum())
    return {k: (hits[k, 1] / len(test_labels), hits[k, 5] / len(test_labels)) for k in ks}

def evaluate(model, train_set, test_set):
    """{'gap', 'gap centred', 'cls', 'cls centred': {k: (top-1, top-5)}} of k-NN on the features"""
    *train_features, labels = features(model, train_set)
    *test_features, test_labels = features(model, test_set)
    table = {}
    for name, x, y in zip(("gap", "cls"), train_features, test_features):
        table[name] = knn(x, labels, y, test_labels)
        table[f"{name} centred"] = knn(x - x.mean(0), labels, y - x.mean(0), test_labels)
    return table
#############################################
#                 Training                  #
#############################################
class Timer(collections.Counter):
    """Seconds by part: lap(part) adds what has passed since the last lap, and returns the sum of the part."""
    last = START
    def lap(self, part):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self[part] += time.perf_counter() - self.last
        self.last = time.perf_counter()
        return self[part]

def autocast(device):
    """bf16 autocast on a GPU, and on a CPU with bf16 instructions for models so wide that they gain by it."""
    wide = "bf16" in CPUINFO and SIZES[HYP["size"]].dim > 256
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or wide)

def peak_flops(device):
    """FLOP/s of the fastest of ten large matmuls in the precision of the training; MFU is the share of it."""
    timer, n = Timer(), 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=DTYPE[device.type])
    for trial in range(11):  # the first lap holds the set-up too
        with autocast(device):
            a @ a
        timer.lap(trial)
    return 2 * n ** 3 / min(timer.values())

def tick(device):
    """A point in time on the device, for which nothing waits: an event on a GPU, seconds on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

def make_model(device, seed):
    """The model with the weights of a seed."""
    torch.manual_seed(seed)
    return LocalMIM().to(device)

def peak_memory():
    """MiB on the GPU, or else of the process."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**20

def graphed(forward_backward, images, noise):
    """The function as a CUDA graph that takes new images and noise of the same shapes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # allocates gradients and buffers
            forward_backward(images, noise)
    torch.cuda.current_stream().wait_stream(side)
    graph, fixed = torch.cuda.CUDAGraph(), (images.clone(), noise.clone())
    with torch.cuda.graph(graph):
        losses = forward_backward(*fixed)
    def replay(images, noise):
        fixed[0].copy_(images), fixed[1].copy_(noise)
        graph.replay()
        return losses
    return replay

def freeze(model, optimizer, level):
    """The optimizer for the time when that many layers are frozen, with the moments of what still trains."""
    live = make_optimizer(model, level)
    for group in live.param_groups:
        live.state.update({p: optimizer.state[p] for p in group["params"] if p in optimizer.state})
    for name, p in model.named_parameters():
        p.grad = p.grad if trains(name, level) else None
    return live

def wrap(model, level):
    """The model as it is called in training; DDP must know which parameters get no gradients."""
    if WORLD == 1:
        return model
    frozen = [name for name, _ in model.named_parameters() if not trains(name, level)]
    frozen += [f".{name}" for name in frozen if name == "cls_token"]  # DDP's name for what no submodule holds
    parallel = nn.parallel.DistributedDataParallel
    parallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return parallel(model)

def train(args, folder, train_set, test_set, run, seed, device):
    """One run, from fresh weights or a checkpoint to the final evaluation. -> dict for the result line"""
    timer, passes, stop, ticks = Timer(), HYP["accum_iter"], [], []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    per_step = HYP["batch_size"] * passes * WORLD
    per_epoch = len(train_set.labels) // per_step
    last_step, model = round(HYP["epochs"] * per_epoch), make_model(device, seed)
    state, taps = latest_checkpoint(folder, args.resume, per_step, seed), model.size.taps
    level = freeze_level(state["step"] - 1 if state else 0, per_epoch)
    optimizer, net, lives, speeds = make_optimizer(model, level), None, [0] * len(taps), []
    step, rows, count, sums = 0, [], 0, torch.zeros(len(taps), device=device)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, rows, count, sums = state["step"], state["rows"], state["count"], state["sums"].to(device)
        timer.update(state["seconds"])
        lives, speeds = state["lives"], state["speeds"]
        print(f"continuing after {step} of {last_step} steps")
    def report(keep):
        """Row of the table on the steps of this epoch so far; if it is to be kept, of the log, too."""
        timer.lap("train")
        mean = sums / torch.tensor(lives, device=device).clamp(min=1) / WORLD
        WORLD > 1 and dist.all_reduce(mean)
        stages = mean.tolist()
        math.isfinite(sum(stages)) or fail(1, f"the loss is {sum(stages)} in run {run}, by step {step}")
        speed = count * per_step / (timer["train"] - timer["epochs"])
        row = dict(epoch=step / per_epoch, train_loss=sum(stages), lr=group["lr"], frozen=level)
        row.update((f"stage_{i}", loss) for i, (loss, n) in enumerate(zip(stages, lives), 1) if n)
        measured = dict(images_per_s=speed, minutes_left=(last_step - step) * per_step / speed / 60)
        print_training_details(COLUMNS, dict(row, run=run, **measured))
        if keep:
            rows.append(row)
            speeds.append(speed)
            timer["epochs"] = timer["train"]
            RANK or append_line(folder / "log.jsonl", dict(row, peak_mib=peak_memory(), **measured))
    def save():
        timer.lap("train")
        mean = sums / WORLD
        WORLD > 1 and dist.all_reduce(mean)
        RANK or save_checkpoint(folder, dict(
            model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, rows=rows, sums=mean,
            count=count, lives=lives, speeds=speeds, seconds=dict(timer), hyp=HYP, seed=seed,
            per_step=per_step, script=SCRIPT.name))
        timer.lap("save")
    def forward_backward(images, noise):
        with autocast(device):
            losses = net(images, noise, level)
        (losses.sum() / passes).backward()
        return losses.detach()
    def advance():
        """-> what takes a step while the present number of layers is frozen"""
        nonlocal net, optimizer
        net = None  # before there is another
        net, optimizer = wrap(model, level), freeze(model, optimizer, level)
        for i in range(1, level) if keeps_graph() else ():
            if i not in model.stand_ins:
                block = Block(model.size.dim, model.size.heads).to(device).requires_grad_(False)
                block.load_state_dict(model.blocks[i - 1].state_dict())
                args.no_compile or block.compile(dynamic=False)
                model.stand_ins[i] = block
        if args.no_compile:
            return forward_backward
        side, patches = model.size.image, model.positions.shape[1] - 1
        blank = torch.zeros(HYP["batch_size"], 3, side, side, dtype=torch.uint8, device=device)
        noise = torch.rand(HYP["batch_size"], patches, device=device)
        forward_backward(blank, noise)
        small = device.type == "cuda" and WORLD == 1 and side <= 64
        take_step = graphed(forward_backward, blank, noise) if small else forward_backward
        optimizer.zero_grad(set_to_none=False)
        timer.lap("compile")
        return take_step
    model.train()
    if not args.no_compile:  # by block: few graphs, whatever the depth
        subprocess.getstatusoutput("${CXX:-g++} -v")[0] and fail(2, "no C++ compiler; use --no-compile")
        print("compiling, which takes minutes on a CPU")
        torch._dynamo.config.recompile_limit = 32  # of one function: widths, with and without gradients
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            block.compile(dynamic=False)
    where = train_set.images.device if isinstance(train_set, Memory) else "cpu"
    plans, noises = itertools.tee(plan(train_set, seed, step, last_step, where))
    crops = train_set.crops((batch for batch, _ in plans), model.size.image)
    timer.lap("reset")
    take_step = advance()
    for number, (images, (_, noise)) in enumerate(zip(crops, noises), 1):
        if freeze_level(step, per_epoch) > level:
            timer.lap("train")
            level = freeze_level(step, per_epoch)
            take_step = advance()
        last_pass = number % passes == 0
        with contextlib.nullcontext() if last_pass or WORLD == 1 else net.no_sync():
            losses = take_step(images.to(device), noise.to(device))
        sums += losses / passes
        if not last_pass:
            continue
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, per_epoch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # a CUDA graph adds to the same gradients each time
        ticks.append(tick(device))
        lives = [n + (tap >= level) for n, tap in zip(lives, taps)]
        asked = torch.tensor([len(stop), time.perf_counter() - timer.last > 60])
        WORLD > 1 and dist.all_reduce(asked)  # all processes stop and report after the same step
        step, count, (stopping, late) = step + 1, count + 1, asked.tolist()
        if step % per_epoch == 0 or step == last_step:
            report(keep=True)
            count, lives, sums = 0, [0] * len(taps), torch.zeros_like(sums)
        elif late:
            report(keep=False)
        if stopping or step == last_step or step % max(1, round(HYP["save_epochs"] * per_epoch)) == 0:
            save()
        stopping and fail(143, f"stopped after {step} of {last_step} steps; the same command continues")
    pairs = itertools.pairwise(ticks)
    steps = [a.elapsed_time(b) if device.type == "cuda" else 1e3 * (b - a) for a, b in pairs]
    result = dict(acc=math.nan, time_seconds=timer["train"], seed=seed, parts=timer, epochs=rows,
                  step_ms_p50=float(np.median(steps)) if steps else None, epoch_images_per_s=speeds)
    if RANK == 0:
        torch.compiler.set_stance("force_eager")  # other shapes, once
        table = evaluate(model, train_set, test_set)
        images, patches = next(test_set.views(model.size.image))[0][:6], model.positions.shape[1] - 1
        noise = torch.rand(len(images), patches, generator=rng("cpu", "picture", seed))
        save_picture(model, images.to(device), noise.to(device), folder / "picture.png")
        torch.compiler.set_stance("default")
        timer.lap("eval")
        broken = sorted(train_set.broken | test_set.broken)
        result.update(acc=table["gap centred"][20][0], knn=table, broken=broken)
        print_training_details(COLUMNS, dict(run=run, epoch="k-NN", knn_acc=result["acc"]))
    stop and fail(143, f"stopped after run {run}; the same command continues")
    return result

def main(args):
    """All runs of the script: data, training, and the result as text and as a JSON line."""
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    sys.stdout.reconfigure(line_buffering=True)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    args.device == "cuda" != found and fail(4, "no usable CUDA GPU; --device cpu needs none")
    timer, device = Timer(), torch.device(args.device or found)
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    WORLD > 1 and dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                          timeout=datetime.timedelta(hours=12))  # others wait for the k-NN
    HYP.update({name: value for name, value in vars(args).items() if name in HYP})
    args.dry_run and HYP.update(size="nano", batch_size=8, accum_iter=1, workers=min(2, HYP["workers"]))
    for name in ("batch_size", "accum_iter", "epochs", "mask_ratio", "hog_nbins"):
        HYP[name] > 0 or fail(2, f"--{name} must be above 0")
    HYP["mask_ratio"] < 1 or fail(2, "--mask_ratio must be below 1")
    0 < HYP["t_0"] <= 1 or fail(2, "--t_0 must be above 0 and at most 1")
    0 <= HYP["cooldown"] <= 1 or fail(2, "--cooldown is a share, from 0 to 1")
    args.runs > 0 <= args.seed < 2 ** 63 or fail(2, "--runs starts at 1 and --seed at 0, to end by 2^63")
    out = pathlib.Path(args.out or SCRIPT.parent / "results" / f"{SCRIPT.stem}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # better to learn of a wrong --out now
    name, *sets = load_data(args.data)
    train_set, test_set = (part.to(device) for part in sets)
    n_train, per_step = len(train_set.labels), HYP["batch_size"] * HYP["accum_iter"] * WORLD
    n_train >= per_step or fail(3, f"{n_train} images do not fill a step of {per_step}")
    HYP["epochs"] = 2 / (n_train // per_step) if args.dry_run else HYP["epochs"]
    math.isfinite(HYP["epochs"]) and round(HYP["epochs"] * (n_train // per_step)) or fail(
        2, f"--epochs {HYP['epochs']} is no number of steps")
    name != "synthetic" or args.target is None or fail(1, "--target says nothing about synthetic data")
    timer.lap("load")
    peak, env = peak_flops(device), environment(device)
    with autocast(device):
        torch.is_autocast_enabled(device.type) or env.update(dtype="float32")
    env["gpu"] and torch.cuda.reset_peak_memory_stats()
    print(f"{WORLD} x {HYP['accum_iter']} x {HYP['batch_size']} images a step, peak learning rate "
          f"{HYP['blr'] * per_step / 256:.3g}")
    per_epoch = n_train // per_step
    images = round(HYP["epochs"] * per_epoch) * per_step
    levels = [freeze_level(step, per_epoch) for step in range(images // per_step)]
    flops = sum(train_flops(level) * levels.count(level) for level in set(levels)) * per_step
    env["gpu"] or print(f"No GPU, {env['cpu_threads']} CPU threads: ~{flops / peak / 15:.0f} min a run")
    key = hashlib.sha256(json.dumps([SHA256, HYP, name, n_train]).encode()).hexdigest()[:8]
    place = tempfile.mkdtemp() if args.dry_run else SCRIPT.parent / "runs" / f"{SCRIPT.stem}-{key}"
    print_columns(COLUMNS, f"{SCRIPT.stem} on {name} data")
    runs = []
    for seed in range(args.seed, args.seed + args.runs):
        folder = pathlib.Path(args.output_dir or place) / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        runs.append(train(args, folder, train_set, test_set, len(runs), seed, device))
        print(f"checkpoint, log and picture: {os.path.relpath(folder)}")
    WORLD > 1 and dist.destroy_process_group()
    if RANK:
        return
    target = args.target or 0
    acc_mean, acc_std, acc_ci95, p_value = statistics([run["acc"] for run in runs], target)
    time_mean, time_std, *_ = statistics([run["time_seconds"] for run in runs], 0)
    finish(dict(
        script=SCRIPT.name, data=name, n=len(runs), acc_mean=acc_mean, acc_std=acc_std, acc_ci95=acc_ci95,
        target=target, p_value=p_value, time_mean=time_mean, time_std=time_std, load_seconds=timer["load"],
        compile_seconds=sum(run["parts"]["compile"] for run in runs),
        diag_seconds=sum(run["parts"]["eval"] + run["parts"]["save"] for run in runs),
        wall_seconds=time.perf_counter() - START, cpu_seconds=time.process_time(), peak_mib=peak_memory(),
        timed="data, augmentation, training", untimed="load, compile, checkpoints, k-NN, picture",
        images_per_s=images / time_mean, step_ms_p50=runs[-1]["step_ms_p50"], peak_tflops=peak / 1e12,
        mfu=flops / peak / time_mean, pflops_nominal=images * train_flops() / 1e15,
        pflops=flops / 1e15,
        dry_run=args.dry_run, compiled=not args.no_compile, device=device.type, processes=WORLD, **env,
        sha256=SHA256, data_sha256=train_set.digest, argv=sys.argv[1:], hyp=HYP, runs=runs,
        utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())), out)
    acc_mean >= target or fail(1, f"mean accuracy {acc_mean:.4f} is below {target}")
#############################################
#                Entry point                #
#############################################
if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        fail(130, "interrupted; the same command continues from the last checkpoint")
    except OSError as error:
        fail(2, error)
    except Exception as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate mem" not in str(error):
            raise
        pages = [os.sysconf(f"SC_{kind}PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") for kind in ("AV", "")]
        mib = [n >> 20 for n in (torch.cuda.mem_get_info() if torch.cuda.is_initialized() else pages)]
        fail(1, f"out of memory at batch size {HYP['batch_size']}, with {mib[0]} of {mib[1]} MiB free")
