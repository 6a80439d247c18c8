"""main2_dirac.py -- CIFAR-10 to 94 % test accuracy.

Adds: the first in_channels filters of every 3x3 convolution start as the identity (dirac).
Changes: HYP Conv
Result: 94.09 ± 0.09 % (n=2), 4.019 ± 0.320 s, NVIDIA H200 at 700.00 W, torch 2.11.0
Vs previous: not measured
Source: Keller Jordan's airbench ablations (arXiv 2404.00498); written afresh.
Run: python airbench/main2_dirac.py --runs 40

One copy per convolution instead of one per channel (920 launches before).
"""
CODE = open(__file__, encoding="utf-8").read()
#############################################
#                   Setup                   #
#############################################
import argparse, collections, contextlib, copy, hashlib, importlib.metadata, itertools, json, math, os
import pathlib, platform, re, resource, socket, subprocess, sys, tempfile, time, zipfile

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
from torch.utils.flop_counter import FlopCounterMode
torch.backends.cudnn.benchmark = True
#############################################
#              Hyperparameters              #
#############################################
HYP = dict(
    epochs=18.0,            # the last one may be partial
    batch_size=1024,        # the smaller batch at the end of an epoch is dropped
    lr=10.0,                # per kilostep, see make_optimizer
    momentum=0.85,          # Nesterov
    weight_decay=0.0153,    # share of a weight lost per 1024 examples at the peak
    lr_curve=((0, 0.2), (0.2, 1.0), (1, 0.0)),  # (share of the steps, factor of all lr), linear in between
    label_smoothing=0.2,
    translate=2,            # pixels, reflect-padded
    whiten_images=5000,     # of the train set give the filters of the stem
    whiten_eps=5e-4,        # added to the variance of each direction
    widths=(64, 256, 256),  # channels of the groups
    bn_keep=0.9,            # share of the running statistics that a step keeps
    logit_scale=1 / 9,
    tta_views=2,            # of each test image
    eval_batch_size=2000,
    target=0.94,            # what p_value is about without --target
    nominal_macs=119.25e6,  # per forward image, in the counting of the published PFLOPs
)
#############################################
#                 Optimizer                 #
#############################################
def make_optimizer(model):
    """SGD on the summed loss, with lr and weight_decay per kilostep, so that neither depends on the other."""
    kilostep = 1024 * (1 + 1 / (1 - HYP["momentum"]))  # a gradient's reach under Nesterov momentum
    lr, wd = HYP["lr"] / kilostep, HYP["weight_decay"] * HYP["batch_size"] / kilostep
    groups = [dict(params=[p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=wd / lr)]
    return torch.optim.SGD(groups, momentum=HYP["momentum"], nesterov=True)

def schedule(step, total_train_steps):
    """Factor of all learning rates at a 0-based step, piecewise linear through the points of lr_curve."""
    shares, factors = zip(*HYP["lr_curve"])
    return float(np.interp(step, [int(share * total_train_steps) for share in shares], factors))
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

def batch_crop(padded, size):
    """A random window of each image in one gather: [N, 3, H, W] -> [N, 3, size, size] in channels_last."""
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 4, 5, 1)
    dy, dx = (torch.randint(places, (len(padded),), device=padded.device) for places in windows.shape[1:3])
    return windows[torch.arange(len(padded), device=padded.device), dy, dx].permute(0, 3, 1, 2)

def batch_flip_lr(images):
    """[N, 3, H, W], each image mirrored left-right with probability 1/2."""
    flip = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)

class CifarLoader:
    """An iteration is an epoch of (inputs [batch_size, 3, 32, 32] in channels_last, labels [batch_size])."""
    def __init__(self, images, labels):
        images, self.labels = normalize(images), labels
        padded = F.pad(images, [HYP["translate"]] * 4, mode="reflect")
        self.padded = padded.contiguous(memory_format=torch.channels_last)
    def __len__(self):
        return len(self.labels) // HYP["batch_size"]
    def __iter__(self):
        images = batch_flip_lr(batch_crop(self.padded, 32))
        order = torch.randperm(len(images), device=images.device)
        for batch in order.split(HYP["batch_size"])[:len(self)]:
            yield images[batch], self.labels[batch]
#############################################
#                   Model                   #
#############################################
class Conv(nn.Conv2d):
    """3x3 convolution without bias that keeps the size of the map, first filters start as the identity."""
    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    def reset_parameters(self):
        super().reset_parameters()
        identity = torch.eye(self.in_channels, device=self.weight.device)[:, :, None, None]
        self.weight.data[:self.in_channels] = F.pad(identity, (1, 1, 1, 1)).to(self.weight.dtype)

class BatchNorm(nn.BatchNorm2d):
    """Batch norm with a trainable bias and the scale fixed at 1."""
    def __init__(self, channels):
        super().__init__(channels, eps=1e-12, momentum=1 - HYP["bn_keep"])
        self.weight.requires_grad = False

class ConvGroup(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H // 2, W // 2]"""
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1, self.norm1 = Conv(in_channels, out_channels), BatchNorm(out_channels)
        self.conv2, self.norm2 = Conv(out_channels, out_channels), BatchNorm(out_channels)
    def forward(self, inputs):
        hidden = F.gelu(self.norm1(F.max_pool2d(self.conv1(inputs), 2)))
        return F.gelu(self.norm2(self.conv2(hidden)))

class CifarNet(nn.Module):
    """Eight layers with weights: [N, 3, 32, 32] -> logits [N, 10]"""
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, kernel_size=2)
        self.stem.weight.requires_grad = False
        self.groups = nn.Sequential(*(ConvGroup(*io) for io in itertools.pairwise((24, *HYP["widths"]))))
        self.head = nn.Linear(HYP["widths"][-1], 10, bias=False)
    def forward(self, inputs):
        hidden = F.gelu(self.stem(inputs))
        hidden = F.max_pool2d(self.groups(hidden), 3).flatten(1)
        return self.head(hidden) * HYP["logit_scale"]

def make_model(device):
    """The network on the device: channels_last, weights in the device's dtype, BatchNorm in fp32."""
    model = CifarNet().to(device, DTYPE[device.type], memory_format=torch.channels_last)
    for norm in [module for module in model.modules() if isinstance(module, BatchNorm)]:
        norm.float()
    return model

def whitening_filters(images):
    """Filters [24, 3, 2, 2] that whiten 2x2 patches of images uint8 [N, 32, 32, 3], then these negated."""
    patches = F.unfold(normalize(images).float(), kernel_size=2).transpose(1, 2).flatten(0, 1)
    covariance = (patches.T @ patches / len(patches)).double().cpu()  # cuSOLVER takes longer for 12 x 12
    variances, vectors = torch.linalg.eigh(covariance)
    filters = (vectors / (variances + HYP["whiten_eps"]).sqrt()).T.flip(0).view(12, 3, 2, 2)
    return torch.cat([filters, -filters])

def reset(model, images):
    """Fresh weights, in place; images uint8 [N, 32, 32, 3] are the train set."""
    for layer in [module for module in model.modules() if hasattr(module, "reset_parameters")]:
        layer.reset_parameters()
    model.stem.weight.data.copy_(whitening_filters(images[:HYP["whiten_images"]]))
    model.stem.bias.data.zero_()

def count_flops(model, backward, *flags):
    """FLOPs of the convolutions and matmuls of one image."""
    model = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.empty(1, 3, 32, 32, device="meta", dtype=model.head.weight.dtype), *flags)
        backward and logits.sum().backward()
    return counter.get_total_flops()

def count_pflops(model, n_train, n_test):
    """PFLOPs of a run: (nominal, counted as in the published table; executed by convolutions and matmuls)."""
    steps, views = math.ceil(HYP["epochs"] * (n_train // HYP["batch_size"])), n_test * HYP["tta_views"]
    nominal = 2 * HYP["nominal_macs"] * (3 * n_train * HYP["epochs"] + views)
    executed = count_flops(model, True) * HYP["batch_size"] * steps + count_flops(model, False) * views
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
def infer(model, inputs, views):
    """Logits [N, 10], the mean over 1 view (the images) or 2 (and their mirror images)."""
    if views == 1:
        return model(inputs)
    return (model(inputs) + model(inputs.flip(-1))) / 2

def evaluate(model, images, labels, views):
    """Accuracy on images uint8 [N, 32, 32, 3] and labels int64 [N], with that many views of each image."""
    model.eval()
    with torch.no_grad(), autocast(images.device):
        logits = [infer(model, inputs, views) for inputs in normalize(images).split(HYP["eval_batch_size"])]
    return (torch.cat(logits).argmax(1) == labels).double().mean().item()
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

def train(model, train_set, test_set, run, seed):
    """One run, from fresh weights to the final evaluation. -> dict(acc, time_seconds, seed, parts, epochs)"""
    timer, step, rows = Timer(), 0, []
    torch.manual_seed(seed)
    timer.lap("before")
    reset(model, train_set["images"])
    optimizer, loader = make_optimizer(model), CifarLoader(**train_set)
    total_train_steps = math.ceil(HYP["epochs"] * len(loader))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, total_train_steps))
    timer.lap("reset")
    for epoch in range(math.ceil(HYP["epochs"])):
        model.train()
        for inputs, labels in itertools.islice(loader, total_train_steps - step):
            with autocast(inputs.device):
                logits = model(inputs).float()
            losses = F.cross_entropy(logits, labels, label_smoothing=HYP["label_smoothing"], reduction="none")
            losses.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
        timer.lap("train")
        train_loss, train_acc = losses.mean().item(), (logits.argmax(1) == labels).double().mean().item()
        math.isfinite(train_loss) or fail(1, f"the loss is {train_loss} in run {run}, epoch {epoch + 1}")
        val_acc = evaluate(model, **test_set, views=1)
        rows.append(dict(epoch=epoch + 1, train_loss=train_loss, train_acc=train_acc, val_acc=val_acc))
        print_training_details(COLUMNS, dict(rows[-1], run=run, time_seconds=timer.lap("diag")))
    acc = evaluate(model, **test_set, views=HYP["tta_views"])
    time_seconds = timer.lap("eval")
    print_training_details(COLUMNS, dict(run=run, epoch="eval", tta_val_acc=acc, time_seconds=time_seconds))
    return dict(acc=acc, time_seconds=time_seconds, seed=seed, parts=timer, epochs=rows)

def warm_up(model, train_set, test_set):
    """A short untimed run on random labels, for the choices of cuDNN and the allocator; a CPU needs none."""
    if train_set["labels"].device.type == "cuda":
        labels, epochs = torch.randint_like(train_set["labels"], 10), HYP["epochs"]
        HYP["epochs"] = 3 * HYP["batch_size"] / len(labels)
        train(model, dict(train_set, labels=labels), test_set, run="-", seed=0)
        HYP["epochs"] = epochs

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
    warm_up(model, train_set, test_set)
    timer.lap("compile")
    for run in range(len(runs), args.runs):
        runs.append(train(model, train_set, test_set, run, args.seed + run))
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
        mfu=executed * 1e15 / peak / time_mean, dry_run=args.dry_run, compiled=False,
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
