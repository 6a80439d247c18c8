"""knn.py -- k nearest neighbours on the features of a frozen encoder.

Adds: the k-NN test of any mainN checkpoint (--finetune), or of a random encoder, without training
Changes: HYP flag_parser Memory Folder encoder_flops Encoder COLUMNS pretrained features raw_features
leave_one_out evaluate make_model measure main make_optimizer learning_rate rng crop_boxes cubic_weights
crop_batch plan Decoder cell_weights LocalMIM train_flops glyphs save_picture save_checkpoint read_checkpoint
latest_checkpoint tick train
Result: not measured
Vs previous: not measured
Source: DINO (arXiv 2104.14294) for the votes; written afresh.
Run: python vitfreeze/knn.py --finetune CHECKPOINT

Features are the mean patch token ("gap") and the class token ("cls") of the last stage after its norm, as
they are and with the mean of the train set taken off ("centred"); --features takes pixels or HOG of the
images instead, as something to beat. All images are read in file order, each once, without augmentation;
neither --batch_size nor the number of workers or processes enters the result.
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
    features="encoder",     # or, for comparison: pixels, hog (of 4 x 4 cells)
    batch_size=128,         # images of a forward pass
    workers=8,              # processes that decode an image folder
    knn_temperature=0.07,   # of the votes of the neighbours
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
    parser.add_argument("--dry-run", action="store_true", help="a random encoder is nano; marks the result")
    parser.add_argument("--output_dir", metavar="DIR", help="for log.jsonl with the table (default: none)")
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

class Memory:
    """A train or test set held as uint8 [N, 3, H, W]."""
    def __init__(self, images, labels):
        self.digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        self.images, self.labels, self.broken = images.permute(0, 3, 1, 2).contiguous(), labels, set()
    def views(self, size):
        """(uint8 [n, 3, size, size], labels [n]) of all images in order"""
        for images, labels in zip(*(part.split(HYP["batch_size"]) for part in (self.images, self.labels))):
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
        (index, size), broken = item, []
        while len(broken) < 100:
            path = self.paths[index]
            with contextlib.suppress(RuntimeError, OSError):
                image = torchvision.io.read_image(path, torchvision.io.ImageReadMode.RGB)
                image = center_crop(resize(image, [size * 8 // 7], interpolation=3), [size, size])
                return image, self.labels[index], broken
            broken, index = broken + [path], (index + 1) % len(self.paths)
        raise OSError(f"100 images in a row cannot be decoded, the last is {path}")
    def load(self, batches):
        """(uint8 [n, 3, size, size], labels [n]) for each batch of (index, size)"""
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
    def views(self, size):
        index = torch.arange(len(self.paths)).split(HYP["batch_size"])
        yield from self.load([(int(i), size) for i in part] for part in index)

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

#############################################
#                   Model                   #
#############################################
def hog(images, cell, nbins):
    """Histograms of oriented gradients of uint8 [B, 3, H, W] in cells of that many pixels, per colour of unit
    length, or 0 where nothing varies: [B, H / cell * W / cell, 3 * nbins]"""
    sobel, cells = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=images.device), []
    for colour in images.float().split(1, 1):
        padded = F.pad(colour, [1] * 4, mode="reflect")
        gx, gy = (F.conv2d(padded, kernel[None, None]) for kernel in (sobel, sobel.T))
        bins = (nbins * torch.atan2(gx, gy) / math.pi).floor().long() % nbins
        planes = torch.zeros_like(gx).repeat(1, nbins, 1, 1).scatter_(1, bins, (gx ** 2 + gy ** 2).sqrt())
        cells.append(F.normalize(F.avg_pool2d(planes, cell), dim=1))
    return torch.cat(cells, 1).flatten(2).mT

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
COLUMNS = "run", "features   ", "k  ", "top1  ", "top5  ", "train_loss"
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

def raw_features(model, dataset):
    """(pixels or HOG [N, values], labels [N]) of images at the size that the model takes"""
    device, rows = model.cls_token.device, []
    for images, labels in dataset.views(model.size.image):
        images = images.to(device)
        x = hog(images, model.size.image // 4, 9) if HYP["features"] == "hog" else images.float()
        rows.append((x.flatten(1), labels.to(device)))
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

def leave_one_out(features, labels):
    """Cross-entropy of the votes of all other train images for up to 1000 of them whose class has more than
    one: features [N, dim], labels [N] -> float. The loss of neighbourhood components analysis."""
    features = F.normalize(features, dim=1)
    index = torch.arange(0, len(labels), max(1, len(labels) // 1000), device=labels.device)[:1000]
    votes = features[index] @ features.T / HYP["knn_temperature"]
    votes.scatter_(1, index[:, None], -math.inf)
    right = votes.masked_fill(labels[index, None] != labels, -math.inf)
    losses = votes.logsumexp(1) - right.logsumexp(1)
    return float(losses[losses < math.inf].mean())

def evaluate(model, train_set, test_set):
    """Rows of the table: dict(features, k, top1, top5, train_loss) for each kind of feature and each k."""
    extract = features if HYP["features"] == "encoder" else raw_features
    *train_features, labels = extract(model, train_set)
    *test_features, test_labels = extract(model, test_set)
    names, rows = ("gap", "cls") if extract is features else (HYP["features"],), []
    for name, x, y in zip(names, train_features, test_features):
        for name, mean in ((name, 0), (f"{name} centred", x.mean(0))):
            loss = leave_one_out(x - mean, labels)
            for k, (top1, top5) in knn(x - mean, labels, y - mean, test_labels).items():
                rows.append(dict(features=name, k=k, top1=top1, top5=top5, train_loss=loss))
    return rows
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

def peak_memory():
    """MiB on the GPU, or else of the process."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**20

def measure(train_set, test_set, run, seed, device, weights):
    """One run: features, votes and the table. -> dict for the result line; acc is of gap (or what stands for
    it) centred, k = 20"""
    timer = Timer()
    model = make_model(device, seed, weights)
    timer.lap("reset")
    rows = evaluate(model, train_set, test_set)
    seconds = timer.lap("eval")
    for row in rows:
        print_training_details(COLUMNS, {name: row.get(name.strip(), run) for name in COLUMNS})
    math.isfinite(sum(row["train_loss"] for row in rows)) or fail(1, f"features are not finite in run {run}")
    kind = f"{rows[0]['features']} centred"
    acc = next(row["top1"] for row in rows if (row["features"], row["k"]) == (kind, 20))
    broken = sorted(train_set.broken | test_set.broken)
    return dict(acc=acc, time_seconds=seconds, seed=seed, parts=timer, broken=broken, epochs=rows)

def main(args):
    """All runs of the script: data, features, votes, and the result as text and as a JSON line."""
    if RANK:
        return  # one process does it all
    sys.stdout.reconfigure(line_buffering=True)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    args.device == "cuda" != found and fail(4, "no usable CUDA GPU; --device cpu needs none")
    timer, device = Timer(), torch.device(args.device or found)
    HYP.update({name: value for name, value in vars(args).items() if name in HYP})
    args.dry_run and HYP.update(size="nano", workers=min(2, HYP["workers"]))
    HYP["batch_size"] > 0 or fail(2, "--batch_size must be above 0")
    HYP["features"] in ("encoder", "pixels", "hog") or fail(2, "--features is encoder, pixels or hog")
    HYP["features"] == "encoder" or not args.finetune or fail(2, "--features of images take no --finetune")
    args.runs > 0 <= args.seed < 2 ** 63 or fail(2, "--runs starts at 1 and --seed at 0, to end by 2^63")
    out = pathlib.Path(args.out or SCRIPT.parent / "results" / f"{SCRIPT.stem}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # better to learn of a wrong --out now
    HYP["size"], checkpoint, weights = (
        pretrained(args.finetune) if args.finetune else (HYP["size"], None, None))
    name, train_set, test_set = load_data(args.data)
    name != "synthetic" or args.target is None or fail(1, "--target says nothing about synthetic data")
    timer.lap("load")
    peak, env = peak_flops(device), environment(device)
    with autocast(device):
        torch.is_autocast_enabled(device.type) or env.update(dtype="float32")
    env["gpu"] and torch.cuda.reset_peak_memory_stats()
    images = len(train_set.labels) + len(test_set.labels)
    flops = images * encoder_flops(backward=False) * (HYP["features"] == "encoder")
    env["gpu"] or print(f"No GPU, {env['cpu_threads']} CPU threads: ~{flops / peak / 15:.0f} min a run")
    print_columns(COLUMNS, f"{SCRIPT.stem} on {name} data")
    runs = []
    for seed in range(args.seed, args.seed + args.runs):
        runs.append(measure(train_set, test_set, len(runs), seed, device, weights))
        if args.output_dir:
            folder = pathlib.Path(args.output_dir) / f"seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            append_line(folder / "log.jsonl", dict(checkpoint=checkpoint, epochs=runs[-1]["epochs"]))
    target = args.target or 0
    acc_mean, acc_std, acc_ci95, p_value = statistics([run["acc"] for run in runs], target)
    time_mean, time_std, *_ = statistics([run["time_seconds"] for run in runs], 0)
    finish(dict(
        script=SCRIPT.name, data=name, n=len(runs), acc_mean=acc_mean, acc_std=acc_std, acc_ci95=acc_ci95,
        target=target, p_value=p_value, time_mean=time_mean, time_std=time_std, load_seconds=timer["load"],
        compile_seconds=0, diag_seconds=0, wall_seconds=time.perf_counter() - START,
        cpu_seconds=time.process_time(), peak_mib=peak_memory(), timed="features, votes", untimed="load",
        images_per_s=images / time_mean, peak_tflops=peak / 1e12, mfu=flops / peak / time_mean,
        pflops_nominal=flops / 1e15, pflops=flops / 1e15, checkpoint=checkpoint,
        dry_run=args.dry_run, compiled=False, device=device.type, processes=1, **env, sha256=SHA256,
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
