"""linprobe.py -- linear classification on the features of a frozen ViT encoder.

Adds: the linear probe of any mainN checkpoint (--finetune), or of a random encoder, as the control
Changes: HYP PHOTO flag_parser LARS shift_batch Memory Folder plan encoder_flops Encoder COLUMNS pretrained
features view_features accuracy make_model make_head train probe main make_optimizer hog Decoder cell_weights
LocalMIM train_flops glyphs save_picture tick knn evaluate
Result: not measured
Vs previous: not measured
Source: recipe of MAE (arXiv 2111.06377), LARS (arXiv 1708.03888); written afresh.
Run: python vitfreeze/linprobe.py --finetune CHECKPOINT

The encoder is frozen, so it sees each image a few times only: as it is, and in --views random crops. Their
features are kept (4 * (views + 1) * images * dim bytes), and the head trains on a random one of them per
image and epoch: a cheaper equivalent of a new crop in every epoch. A feature is the mean patch token, or the
class token, of the last stage after its norm. A step is one batch for the batch norm, however many passes or
processes make it up: these share the work of the encoder on crops, and then all train the same head.
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
    size="tiny",            # of a random encoder (a checkpoint has its own)
    epochs=90.0,            # passes over the train set
    warmup_epochs=10.0,     # of these, with a learning rate that rises linearly from 0
    batch_size=512,         # images of a forward pass of one process
    accum_iter=1,           # forward passes of a step; a step has batch_size * accum_iter * processes images
    blr=1.0,                # peak learning rate per 256 images of a step (ImageNet, of more steps: 0.1)
    min_lr=0.0,             # at the end of the cosine
    weight_decay=0.0,       # of the weights, not the bias
    momentum=0.9,           # of LARS
    trust=1e-3,             # of LARS: length of a step to that of the weights, at learning rate 1
    cls_token=0,            # 1: classify by the class token; 0: by the mean of the patch tokens
    views=8,                # random crops of each image
    shift=4,                # pixels that an image moves at most (over 64 px: 0)
    crop_scale=(1.0, 1.0),  # share of the area of an image that a crop shows
    crop_ratio=(1.0, 1.0),  # width to height of a crop
    save_epochs=30.0,       # between checkpoints
    workers=8,              # processes that decode an image folder
)
PHOTO = dict(shift=0, crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3))  # instead, for sizes over 64 px
Size = collections.namedtuple("Size", "image patch dim depth heads dec_dim dec_heads taps scales")
SIZES = dict(  # taps: blocks, from 1 on, with a decoder; scales: cells of its targets per patch and direction
    nano=Size(32, 4, 96, 4, 3, 48, 2, (1, 2, 3, 4), (2, 1, 1 / 2, 1 / 4)),
    micro=Size(32, 4, 128, 6, 4, 64, 2, (1, 3, 5, 6), (2, 1, 1 / 2, 1 / 4)),
    tiny=Size(32, 4, 192, 12, 3, 64, 2, (2, 4, 10, 12), (2, 1, 1 / 2, 1 / 4)),
    small64=Size(64, 8, 384, 12, 6, 128, 4, (2, 4, 10, 12), (4, 2, 1, 1 / 2)),
    small=Size(224, 16, 384, 12, 6, 256, 8, (2, 4, 10, 12), (4, 2, 1, 1 / 2)),
    base=Size(224, 16, 768, 12, 12, 256, 8, (2, 4, 10, 12), (4, 2, 1, 1 / 2)),
    large=Size(224, 16, 1024, 24, 16, 256, 8, (2, 4, 22, 24), (4, 2, 1, 1 / 2)))

def flag_parser():
    """Flags of the measurement, and one for each hyperparameter of a single value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(2, f"{message} (--help lists the flags)")
    parser.add_argument("--finetune", metavar="CKPT", help="checkpoint of a mainN (default: random weights)")
    parser.add_argument("--data", metavar="DIR", help="CIFAR, image folder or 'synthetic' (default: data)")
    parser.add_argument("--runs", metavar="N", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of run 0 (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    parser.add_argument("--out", metavar="FILE", help="for the JSON line (default: results/ by the script)")
    parser.add_argument("--target", metavar="A", type=float, help="exit 1 if the mean accuracy is below A")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile in scripts that use it")
    parser.add_argument("--dry-run", action="store_true", help="two steps of 8 images, then the evaluation")
    parser.add_argument("--output_dir", metavar="DIR", help="for checkpoints and log (default: in runs/)")
    parser.add_argument("--resume", metavar="FILE", help="go on from it (default: newest in output_dir)")
    for name, value, text in re.findall(r"^    (\w+)=(.*?),\s+# (.*)$", CODE, re.M):
        if isinstance(value := HYP[name], (int, float, str)):
            choices = list(SIZES) if name == "size" else None
            parser.add_argument(f"--{name}", type=type(value), default=value, choices=choices,
                                metavar=name[0].upper(), help=f"{text} (default: {value})")
    return parser


if __name__ == "__main__":
    ARGS = flag_parser().parse_args()  # before torch is imported: --help is instant
import numpy as np, torch, torchvision, torch.nn as nn, torch.nn.functional as F
import torch.distributed as dist
from torchvision.transforms.v2.functional import center_crop, resize
#############################################
#                 Optimizer                 #
#############################################
class LARS(torch.optim.Optimizer):
    """SGD with momentum; a gradient is scaled to the share `trust` of the length of its weights. That and
    weight decay leave out tensors of one dimension (arXiv 1708.03888, in the form of MAE)."""
    def __init__(self, parameters):
        super().__init__(parameters, dict(lr=0.0))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                gradient = p.grad
                if p.ndim > 1:
                    gradient = gradient + HYP["weight_decay"] * p
                    length, other = p.norm(), gradient.norm()
                    ratio = HYP["trust"] * length / other
                    gradient = gradient * torch.where((length > 0) & (other > 0), ratio, 1.0)
                speed = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * speed.mul_(HYP["momentum"]).add_(gradient))

def learning_rate(step, steps_per_epoch):
    """Of a 0-based step: linear from 0 to the peak in the warm-up, then half a cosine down to min_lr."""
    peak = HYP["blr"] * HYP["batch_size"] * HYP["accum_iter"] * WORLD / 256
    epoch = step / steps_per_epoch
    if epoch < HYP["warmup_epochs"]:
        return peak * epoch / HYP["warmup_epochs"]
    share = (epoch - HYP["warmup_epochs"]) / max(HYP["epochs"] - HYP["warmup_epochs"], 1e-9)
    return HYP["min_lr"] + (peak - HYP["min_lr"]) * (1 + math.cos(math.pi * share)) / 2
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

def shift_batch(images, numbers, most):
    """Moved by up to `most` pixels each way, black beyond the edge: uint8 [n, 3, S, S], numbers [n, 2]"""
    (y, x), span = (numbers * (2 * most + 1)).long().T, torch.arange(images.shape[2], device=images.device)
    rows, columns = (y[:, None] + span)[:, None, :, None], (x[:, None] + span)[:, None, None, :]
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    colour = torch.arange(3, device=images.device)[:, None, None]
    return F.pad(images, [most] * 4)[image, colour, rows, columns]

class Memory:
    """A train or test set held as uint8 [N, 3, H, W] and cropped in batches."""
    def __init__(self, images, labels):
        self.digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        self.images, self.labels, self.broken = images.permute(0, 3, 1, 2).contiguous(), labels, set()
    def crops(self, batches, size):
        """(uint8 [n, 3, size, size], labels [n]) for each (index [n], numbers [n, 23])"""
        for index, numbers in batches:
            yield crop_batch(self.images[index], numbers, size), self.labels[index]
    def views(self, size):
        """(uint8 [n, 3, size, size], labels [n]) of all images in order"""
        for images, labels in zip(self.images.split(500), self.labels.split(500)):
            if images.shape[2:] != (size, size):
                images = resize(images, [size, size], interpolation=3)
            yield images, labels

class Folder(torch.utils.data.Dataset):
    """An image folder, decoded by worker processes; an image that cannot be decoded is named and skipped."""
    def __init__(self, samples):
        self.paths, labels = zip(*samples)
        self.labels, self.broken = torch.tensor(labels), set()
        self.digest = hashlib.sha256(repr(samples).encode()).hexdigest()
    def __getitem__(self, item):
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
    def load(self, batches):
        """(uint8 [n, 3, size, size], labels [n]) for each batch of (index, numbers or None, size)"""
        def collate(items):
            images, labels, broken = zip(*items)
            return torch.stack(images), torch.stack(labels), sum(broken, [])
        loader = torch.utils.data.DataLoader(self, batch_sampler=batches, num_workers=HYP["workers"],
                                             collate_fn=collate)
        for images, labels, broken in loader:
            for path in set(broken) - self.broken:
                print(f"{SCRIPT.name}: warning: skipped {path}, which cannot be decoded", file=sys.stderr)
            self.broken.update(broken)
            yield images, labels
    def crops(self, batches, size):
        yield from self.load([(int(i), row, size) for i, row in zip(*batch)] for batch in batches)
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

def plan(n_train, seed, first_step, last_step):
    """Yields (index, view), each [images of a step], which depend on the seed and the step alone."""
    per_step = HYP["batch_size"] * HYP["accum_iter"] * WORLD
    per_epoch = n_train // per_step
    for step in range(first_step, last_step):
        epoch, place = divmod(step, per_epoch)
        if step == first_step or place == 0:
            order = torch.randperm(n_train, generator=rng("cpu", "order", seed, epoch))
        view = torch.randint(HYP["views"] + 1, (per_step,), generator=rng("cpu", "step", seed, step))
        yield order[place * per_step:(place + 1) * per_step], view

#############################################
#                   Model                   #
#############################################
def encoder_flops(backward):
    """FLOPs of the encoder on an image: its matmuls and convolutions, forward or (True) backward, too."""
    size = SIZES[HYP["size"]]
    tokens = (size.image // size.patch) ** 2 + 1
    embed = 6 * (tokens - 1) * size.dim * size.patch ** 2
    blocks = size.depth * tokens * (24 * size.dim ** 2 + 4 * tokens * size.dim)
    return embed + blocks + backward * (embed + 2 * blocks)  # pixels need no gradient

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
    """Pre-norm transformer block: [B, tokens, dim] -> the same"""
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.fc1 = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

class Encoder(nn.Module):
    """ViT encoder of a mainN with the norm of its last stage: uint8 [B, 3, S, S] -> [B, 1 + patches, dim]"""
    def __init__(self):
        super().__init__()
        self.size = size = SIZES[HYP["size"]]
        self.patch_embed = nn.Conv2d(3, size.dim, size.patch, size.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.register_buffer("positions", positions(size.dim, size.image // size.patch), persistent=False)
        self.blocks = nn.ModuleList(Block(size.dim, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        for linear in [module for module in self.modules() if isinstance(module, nn.Linear)]:
            nn.init.xavier_uniform_(linear.weight), nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.data.flatten(1))
    def forward(self, images):
        mean, std = torch.tensor([MEAN, STD], device=images.device)[:, :, None, None]
        x = self.patch_embed((images / 255 - mean) / std).flatten(2).mT + self.positions[:, 1:]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
#############################################
#                  Logging                  #
#############################################
COLUMNS = "run", "epoch", "train_loss", "val_acc", "val_top5", "minutes_left"
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

def pretrained(path):
    """(size, origin, weights) of the encoder in a checkpoint of any mainN; 'norm' is that of its last stage.
    Exit 3 where the file is missing, damaged or something else."""
    with contextlib.suppress(Exception):
        assert zipfile.ZipFile(path).testzip() is None  # checksums, which torch.load does not look at
        state = torch.load(path, weights_only=True, map_location="cpu")
        size, model = state["hyp"]["size"], state["model"]
        stages = [int(name.split(".")[1]) for name in model if name.startswith("decoders.")]
        norm = f"decoders.{max(stages)}.norm."
        names = [name for name in model if name.startswith(("patch_embed.", "cls_token", "blocks.", norm))]
        weights = {name.replace(norm, "norm."): model[name] for name in names}
        assert SIZES[size].dim == len(weights["norm.weight"])
        origin = {name: state.get(name) for name in ("script", "seed", "step")}
        origin.update({name: state["hyp"][name] for name in ("epochs", "batch_size", "accum_iter")})
        origin["sha256"] = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
        return size, origin, weights
    fail(3, f"{path} is missing, damaged or no checkpoint of a mainN")

#############################################
#                Evaluation                 #
#############################################
def features(model, dataset):
    """(gap [N, dim], cls [N, dim], labels [N]): mean patch and class token of the last tap after its norm"""
    model.eval()
    device, rows = model.cls_token.device, []
    with torch.no_grad(), autocast(device):
        for images, labels in dataset.views(model.size.image):
            tokens = model(images.to(device)).float()
            rows.append((tokens[:, 1:].mean(1), tokens[:, 0], labels.to(device)))
    return [torch.cat(part) for part in zip(*rows)]

def view_features(model, train_set, seed):
    """Features [views, N, dim] of random crops. Processes share the batches and get the same table."""
    device, size, n = model.cls_token.device, model.size, len(train_set.labels)
    table = torch.zeros(HYP["views"], n, size.dim, device=device)
    parts = torch.arange(n).split(500)[RANK::WORLD]
    with torch.no_grad(), autocast(device):
        for view in range(HYP["views"]):
            numbers = torch.rand(n, 25, generator=rng("cpu", "view", seed, view))
            crops = train_set.crops([(index, numbers[index, :23]) for index in parts], size.image)
            for index, (images, _) in zip(parts, crops):
                images = shift_batch(images.to(device), numbers[index, 23:].to(device), HYP["shift"])
                tokens = model(images).float()
                table[view, index] = tokens[:, 0] if HYP["cls_token"] else tokens[:, 1:].mean(1)
    WORLD > 1 and dist.all_reduce(table)
    return table

def accuracy(head, inputs, labels):
    """(top-1, top-5) of a head on features [N, dim]"""
    head.eval()
    with torch.no_grad():
        logits = head(inputs)
    head.train()
    right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return int(right[:, 0].sum()) / len(labels), int(right.sum()) / len(labels)
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

def make_model(device, seed, weights):
    """The encoder with the weights of a checkpoint or, without any (None), random ones of a seed."""
    torch.manual_seed(seed)
    model = Encoder()
    weights and model.load_state_dict(weights)
    return model.requires_grad_(False).to(device)

def make_head(dim, classes, seed):
    """Batch norm without weights, then a linear map: [B, dim] -> [B, classes]"""
    head = nn.Sequential(nn.BatchNorm1d(dim, eps=1e-6, affine=False), nn.Linear(dim, classes))
    nn.init.zeros_(head[1].bias)
    nn.init.normal_(head[1].weight, std=0.01, generator=rng("cpu", "head", seed))
    return head

def peak_memory():
    """MiB on the GPU, or else of the process."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**20

def train(args, folder, table, labels, test_inputs, test_labels, run, seed):
    """Trains a head on features [views + 1, N, dim], from fresh weights or a checkpoint. -> (rows, Timer)"""
    timer, stop, device = Timer(), [], table.device
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    per_step, classes = HYP["batch_size"] * HYP["accum_iter"] * WORLD, int(labels.max()) + 1
    per_epoch, head = len(labels) // per_step, make_head(table.shape[2], classes, seed).to(device)
    last_step, optimizer = round(HYP["epochs"] * per_epoch), LARS(head.parameters())
    state = latest_checkpoint(folder, args.resume, per_step, seed)
    step, rows, count, loss_sum = 0, [], 0, torch.zeros((), device=device)
    if state:
        head.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, rows, count, loss_sum = state["step"], state["rows"], state["count"], state["sums"].to(device)
        timer.update(state["seconds"])
        print(f"continuing after {step} of {last_step} steps")
    def report():
        """Row of the table on the steps of this epoch, with the test, and logged."""
        timer.lap("train")
        loss = loss_sum.item() / count
        math.isfinite(loss) or fail(1, f"the loss is {loss} in run {run}, by step {step}")
        row = dict(epoch=step / per_epoch, train_loss=loss, lr=learning_rate(step - 1, per_epoch))
        row["val_acc"], row["val_top5"] = accuracy(head, test_inputs, test_labels)
        rows.append(row)
        minutes = timer["train"] / step * (last_step - step) / 60
        print_training_details(COLUMNS, dict(row, run=run, minutes_left=minutes))
        RANK or append_line(folder / "log.jsonl", row)
        timer.lap("eval")
    def save():
        timer.lap("train")
        RANK or save_checkpoint(folder, dict(
            model=head.state_dict(), optimizer=optimizer.state_dict(), step=step, rows=rows, sums=loss_sum,
            count=count, seconds=dict(timer), hyp=HYP, seed=seed, per_step=per_step, script=SCRIPT.name))
        timer.lap("save")
    timer.lap("reset")
    for index, view in plan(len(labels), seed, step, last_step):
        index, view = index.to(device), view.to(device)
        optimizer.param_groups[0]["lr"] = learning_rate(step, per_epoch)
        loss = F.cross_entropy(head(table[view, index]), labels[index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.detach()
        step, count, stopping = step + 1, count + 1, torch.tensor(len(stop))
        WORLD > 1 and dist.all_reduce(stopping)  # all processes stop after the same step
        if step % per_epoch == 0 or step == last_step:
            report()
            count, loss_sum = 0, torch.zeros_like(loss_sum)
        if stopping or step == last_step or step % max(1, round(HYP["save_epochs"] * per_epoch)) == 0:
            save()
        stopping and fail(143, f"stopped after {step} of {last_step} steps; the same command continues")
    return rows, timer

def probe(args, folder, train_set, test_set, run, seed, device, weights):
    """One run: features of all views, then the head. -> dict for the result line"""
    timer = Timer()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to save yet
    model = make_model(device, seed, weights)
    timer.lap("reset")
    *inputs, labels = features(model, train_set)
    *test_inputs, test_labels = features(model, test_set)
    which = HYP["cls_token"]
    table = torch.cat([inputs[which][None], view_features(model, train_set, seed)])
    seconds = timer.lap("features")
    rows, parts = train(args, folder, table, labels, test_inputs[which], test_labels, run, seed)
    broken = sorted(train_set.broken | test_set.broken)
    return dict(acc=rows[-1]["val_acc"], top5=rows[-1]["val_top5"], time_seconds=seconds + parts["train"],
                seed=seed, parts=timer + parts, broken=broken, epochs=rows)

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
    WORLD > 1 and dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    HYP.update({name: value for name, value in vars(args).items() if name in HYP})
    args.dry_run and HYP.update(size="nano", batch_size=8, accum_iter=1, views=1,
                                workers=min(2, HYP["workers"]))
    for name in ("batch_size", "accum_iter", "epochs"):
        HYP[name] > 0 or fail(2, f"--{name} must be above 0")
    HYP["views"] >= 0 or fail(2, "--views starts at 0")
    HYP["cls_token"] in (0, 1) or fail(2, "--cls_token is 0 or 1")
    args.runs > 0 <= args.seed < 2 ** 63 or fail(2, "--runs starts at 1 and --seed at 0, to end by 2^63")
    out = pathlib.Path(args.out or SCRIPT.parent / "results" / f"{SCRIPT.stem}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # better to learn of a wrong --out now
    HYP["size"], HYP["pretrained"], weights = (
        pretrained(args.finetune) if args.finetune else (HYP["size"], None, None))
    SIZES[HYP["size"]].image > 64 and HYP.update(PHOTO)
    name, train_set, test_set = load_data(args.data)
    n_train, per_step = len(train_set.labels), HYP["batch_size"] * HYP["accum_iter"] * WORLD
    per_step > 1 or fail(2, "a step must have two images or more, for the batch norm")
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
    images = round(HYP["epochs"] * (n_train // per_step)) * per_step
    views = n_train * (HYP["views"] + 1) + len(test_set.labels)
    flops = views * encoder_flops(backward=False)  # the head has few
    env["gpu"] or print(f"No GPU, {env['cpu_threads']} CPU threads: ~{flops / peak / 15:.0f} min a run")
    key = hashlib.sha256(json.dumps([SHA256, HYP, name, n_train]).encode()).hexdigest()[:8]
    place = tempfile.mkdtemp() if args.dry_run else SCRIPT.parent / "runs" / f"{SCRIPT.stem}-{key}"
    print_columns(COLUMNS, f"{SCRIPT.stem} on {name} data")
    runs = []
    for seed in range(args.seed, args.seed + args.runs):
        folder = pathlib.Path(args.output_dir or place) / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        runs.append(probe(args, folder, train_set, test_set, len(runs), seed, device, weights))
        print(f"checkpoint and log: {os.path.relpath(folder)}")
    WORLD > 1 and dist.destroy_process_group()
    if RANK:
        return
    target = args.target or 0
    acc_mean, acc_std, acc_ci95, p_value = statistics([run["acc"] for run in runs], target)
    time_mean, time_std, *_ = statistics([run["time_seconds"] for run in runs], 0)
    finish(dict(
        script=SCRIPT.name, data=name, n=len(runs), acc_mean=acc_mean, acc_std=acc_std, acc_ci95=acc_ci95,
        target=target, p_value=p_value, time_mean=time_mean, time_std=time_std, load_seconds=timer["load"],
        compile_seconds=0,
        diag_seconds=sum(run["parts"]["eval"] + run["parts"]["save"] for run in runs),
        wall_seconds=time.perf_counter() - START, cpu_seconds=time.process_time(), peak_mib=peak_memory(),
        timed="data, augmentation, features, training", untimed="load, checkpoints, tests",
        images_per_s=images / time_mean, peak_tflops=peak / 1e12, mfu=flops / peak / time_mean,
        pflops_nominal=flops / 1e15, pflops=flops / 1e15,
        dry_run=args.dry_run, compiled=False, device=device.type, processes=WORLD, **env, sha256=SHA256,
        data_sha256=train_set.digest, argv=sys.argv[1:], hyp=HYP, runs=runs,
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
