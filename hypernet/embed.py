"""embed.py -- frozen features of image-caption pairs, for the connectors of this folder.

Adds: runs image encoders and a text encoder over all pairs once, and writes one array of all features
Changes: everything
Result: not measured
Vs previous: not measured
Source: pairs and widths as in HYMA (arXiv 2507.10015); encoders and captions are our own.
Run: python hypernet/embed.py

Images are those of CIFAR-10 and CIFAR-100, in up to six views. Encoders are trained here in minutes, by
RECIPES, or come from torchvision's zoo (--zoo, weights from the cache of torch.hub or downloaded), or
as features in files (--features). Captions name the class and what the pixels show; their vectors are sums of
hashed words, unless --text or --text-encoder brings others. The accuracy of a run is that of a ridge
regression on the features, a mean over encoders and sets. An interrupted run continues, encoder by encoder.
"""
CODE = open(__file__, encoding="utf-8").read()
#############################################
#                   Setup                   #
#############################################
import argparse, collections, contextlib, functools, hashlib, importlib, importlib.metadata, itertools, json
import math, os, pathlib, platform, re, resource, subprocess, sys, tempfile, time, zipfile, zlib

START = time.perf_counter()
SCRIPT = pathlib.Path(__file__).resolve()
SHA256 = hashlib.sha256(CODE.split('"""', 2)[2].encode()).hexdigest()  # of all but the docstring

def fail(code, message):
    """Leave with one line on stderr; 1: the run failed, 2: usage, 3: data, 4: no usable GPU."""
    print(f"{SCRIPT.name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)
#############################################
#              Hyperparameters              #
#############################################
HYP = dict(  # those of one value are flags, too, with the comments as help
    count=12,               # encoders to be connected, a multiple of 3 up to 30; four more are held out
    widths="",              # of encoders, three; none: 384,768,1024 on a GPU and 96,192,256 without one
    pairs=0,                # image-caption pairs; 0: up to 595375 on a GPU and 100000 without one
    text_width=0,           # of the vectors of captions; 0: 768 on a GPU and 128 without one
    zoo="",                 # in place of RECIPES: torchvision weights, as ResNet18_Weights.IMAGENET1K_V1
    held_out="",            # which of zoo and features are not to be connected
    epochs=2.0,             # of training for an encoder
    batch_size=512,         # images of a step
    lr=0.2,                 # peak of Nesterov SGD, or a hundredth of it for AdamW (ViT)
    weight_decay=5e-4,      # of SGD; 0.05 for AdamW
    label_smoothing=0.1,    # of the cross-entropy
    bigram=0.4,             # weight of two words in a row against single words in the vector of a caption
)

def flag_parser():
    """Flags of the measurement, and one for each hyperparameter of a single value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(2, f"{message} (--help lists the flags)")
    parser.add_argument("--data", metavar="DIR", help="with CIFAR-10 or -100, or 'synthetic' (default: data)")
    parser.add_argument("--runs", metavar="N", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of run 0 (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    parser.add_argument("--out", metavar="FILE", help="for the JSON line (default: results/ by the script)")
    parser.add_argument("--target", metavar="A", type=float, help="exit 1 if the mean accuracy is below A")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile in scripts that use it")
    parser.add_argument("--dry-run", action="store_true", help="two steps of 8 images, 100 pairs")
    parser.add_argument("--emb", metavar="DIR", help="for the features (default: emb, beside the data)")
    parser.add_argument("--features", metavar="NAME=TRAIN.npy,TEST.npy", action="append", default=[],
                        help="features of the images in --export's files by any encoder; may come again")
    parser.add_argument("--export", action="store_true", help="write images.npy and captions.txt, then stop")
    parser.add_argument("--text", metavar="FILE.npy", help="a vector for each line of captions.txt")
    parser.add_argument("--text-encoder", metavar="NAME", help="of sentence-transformers, or its folder")
    for name, value, text in re.findall(r"^    (\w+)=(.*?),\s+# (.*)$", CODE, re.M):
        if isinstance(value := HYP[name], (int, float, str)):
            parser.add_argument(f"--{name}", type=type(value), default=value, metavar=name[0].upper(),
                                help=f"{text} (default: {value or 'none'})")
    return parser

if __name__ == "__main__":
    ARGS = flag_parser().parse_args()  # before torch is imported: --help is instant
import numpy as np, torch, torchvision, torch.nn as nn, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
torch.backends.cudnn.benchmark = True
torch.backends.mha.set_fastpath_enabled(False)  # which FLOP counters do not see
#############################################
#                   Data                    #
#############################################
CIFARS = dict(cifar10=torchvision.datasets.CIFAR10, cifar100=torchvision.datasets.CIFAR100)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
DTYPE = dict(cuda=torch.float32, cpu=torch.float32)  # of weights; matmuls in bf16 by autocast
FULL = 595375  # pairs of LLaVA-CC3M-Pretrain-595K, for which the recipes were made
VIEWS = ((False, 0), (True, 0), (False, 4), (True, 4), (False, -4), (True, -4))  # mirrored, pixels moved by
# A set: its name, images uint8 [N, 32, 32, 3] and labels int64 [N] of both parts, names of classes, and the
# number of a coarse class for each fine one, with their names.
Set = collections.namedtuple(
    "Set", "name images labels test_images test_labels classes coarse coarse_classes")

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

def read_cache(path, archive):
    """A prepared part: dict(images uint8 [N, 32, 32, 3], labels int64 [N], classes, ...); exit 3 if it is no
    good."""
    with contextlib.suppress(Exception):  # whatever damage leads to, the sentence below is the answer
        assert zipfile.ZipFile(path).testzip() is None  # checksums, which torch.load does not look at
        cache = torch.load(path, weights_only=True)
        images, labels = cache["images"], cache["labels"]
        assert (images.dtype, images.shape) == (torch.uint8, (len(labels), 32, 32, 3))
        assert labels.dtype == torch.int64 and 0 <= labels.min() <= labels.max() < len(cache["classes"])
        return cache
    fail(3, f"{path} is missing, damaged or not CIFAR; delete both caches there and add {archive}")

def load_set(name, place):
    """A CIFAR set from the caches in its folder, which are made from the official archive if need be."""
    cifar = CIFARS[name]
    archive = f"{cifar.filename} (md5 {cifar.tgz_md5})"
    try:
        for part in () if (place / "train.pt").exists() else ("test", "train"):
            whole = cifar(place, train=part == "train", download=(place / cifar.filename).exists())
            partial = place / f"{part}.{os.getpid()}"
            torch.save(dict(images=torch.tensor(whole.data), labels=torch.tensor(whole.targets),
                            classes=whole.classes), partial)
            os.replace(partial, place / f"{part}.pt")  # a reader sees all of it or nothing
    except Exception as error:  # of a read-only or full disk, a damaged file
        fail(3, f"cannot prepare {name} in {place} ({error}); empty it and put {archive} there")
    train, test = (read_cache(place / f"{part}.pt", archive) for part in ("train", "test"))
    coarse, names = None, train.get("coarse_classes")
    if names:
        coarse = torch.zeros(len(train["classes"]), dtype=torch.int64)
        coarse[train["labels"]] = train["coarse_labels"]
    return Set(name, train["images"], train["labels"], test["images"], test["labels"],
               [text.replace("_", " ") for text in train["classes"]], coarse, names)

def load_sets(folder):
    """-> (name of the data, its folder, [Set]): CIFAR-10 and CIFAR-100 from a folder or its subfolders
    cifar10 and cifar100, 'synthetic', or 'other' where it is of another size."""
    root = pathlib.Path(folder or "data")
    sets = []
    for name in CIFARS if folder != "synthetic" else ():
        files = "train.pt", CIFARS[name].base_folder, CIFARS[name].filename
        places = [place for place in (root / name, root) if any((place / file).exists() for file in files)]
        found = load_set(name, places[0]) if places else None
        if found and (places[0] != root or (len(found.classes) == 100) == (name == "cifar100")):
            sets.append(found)  # caches in the folder itself do not say of which set they are
    if sets:
        whole = [(len(s.labels), len(s.test_labels)) for s in sets] == [(50000, 10000)] * len(sets)
        return "+".join(s.name for s in sets) if whole else "other", root, sets
    wanted = f"{CIFARS['cifar10'].filename} (md5 {CIFARS['cifar10'].tgz_md5})"
    if folder not in (None, "synthetic"):
        fail(3, f"{folder} holds neither CIFAR-10 nor CIFAR-100; put {wanted} there")
    folder or print(f"NOTICE: {root} holds no CIFAR; python airbench/main8_compile.py downloads CIFAR-10.\n"
                    "NOTICE: Embedding built-in synthetic images instead, to show that all works.")
    train, test = draw_synthetic(5000, seed=1), draw_synthetic(1000, seed=2)
    names = "disc two three four five ring hole trefoil clover star".split()
    return "synthetic", root, [Set("drawn", train["images"], train["labels"], test["images"], test["labels"],
                                   names, None, None)]

def digest(s):
    """sha256 of the images and labels of a set"""
    parts = s.images, s.labels, s.test_images, s.test_labels
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

def plan(total, n):
    """Which image, of all sets in a row, and which view each of n pairs has: int64 [n], int64 [n]. Every
    image comes once before any comes in a second view; the order is a fixed random one."""
    rng = np.random.default_rng(0)
    images, order = rng.permutation(total), rng.permutation(n)
    return images[order % total], order // total

def view(images, number):
    """A view of images uint8 [N, 32, 32, 3]: mirrored, moved down and right with the edge repeated."""
    flip, move = VIEWS[number]
    index = (torch.arange(32) - move).clamp(0, 31)
    images = images.flip(2) if flip else images
    return images[:, index][:, :, index] if move else images

COLOURS = dict(black=(20, 20, 20), white=(235, 235, 235), grey=(128, 128, 128), red=(170, 60, 50),
               green=(80, 130, 60), blue=(90, 140, 200), brown=(130, 100, 70))

def colour_names(colours):
    """Nearest of COLOURS to mean colours [N, 3]"""
    table = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    return [list(COLOURS)[i] for i in torch.cdist(colours, table).argmin(1).tolist()]

def captions(images, kinds, groups, views, seed):
    """A sentence on each of images uint8 [N, 32, 32, 3]: its kind (name of the class) and group (coarse class
    or None), what its pixels are like, and the view; one of six forms, drawn at random."""
    rng, texts = np.random.default_rng(seed), []
    x = images.float()
    light, contrast = x.mean((1, 2, 3)).tolist(), x.std((1, 2, 3)).tolist()
    inside = colour_names(x[:, 8:24, 8:24].mean((1, 2)))
    edge = colour_names(torch.cat([x[:, :3].flatten(1, 2), x[:, -3:].flatten(1, 2)], 1).mean(1))
    for i, form in enumerate(rng.integers(6, size=len(images))):
        tone = "dark" if light[i] < 90 else "bright" if light[i] > 150 else "dim"
        kind, sharp = kinds[i], "crisp" if contrast[i] > 55 else "soft"
        group = f" a kind of {groups[i]}" if groups[i] else ""
        forms = (f"a photo of a {kind}", f"a {tone} {inside[i]} {kind} on {edge[i]}",
                 f"{sharp} image of the {kind}{group}", f"a {sharp} photo of a {inside[i]} {kind}{group}",
                 f"the {kind} in front of {edge[i]} in {tone} light", f"a {kind}{group} on {edge[i]}")
        flip, move = VIEWS[views[i]]
        texts.append(forms[form] + " mirrored" * flip + " shifted" * (move != 0))
    return texts

def hash_text(texts, width):
    """Unit vectors [N, width] of sentences: sum of a fixed random vector of each word, and of each two in a
    row with the weight of --bigram. Shared words are shared directions; it knows no synonyms."""
    known = {}
    def vector(token):
        if token not in known:
            known[token] = np.random.default_rng(zlib.crc32(token.encode())).normal(size=width) / width ** 0.5
        return known[token]
    found = {}
    for text in texts:
        if text not in found:
            words = text.split()
            total = sum(map(vector, words)) + HYP["bigram"] * sum(
                (vector(" ".join(two)) for two in itertools.pairwise(words)), start=np.zeros(width))
            found[text] = (total / np.linalg.norm(total)).astype(np.float16)
    return np.stack([found[text] for text in texts])

def text_vectors(args, texts):
    """Unit vectors float16 [N, width] of all sentences, from the source that the flags name."""
    if args.text:
        with contextlib.suppress(Exception):
            vectors = np.load(args.text)
            assert vectors.ndim == 2
            len(vectors) == len(texts) or fail(3, f"{args.text} has {len(vectors)} rows, captions.txt has "
                                                  f"{len(texts)} lines")
            return unit(torch.from_numpy(vectors).float(), args.text)
        fail(3, f"{args.text} is no array of rows of numbers")
    if args.text_encoder:
        try:
            package = importlib.import_module("sentence_transformers")
            model = package.SentenceTransformer(args.text_encoder)
        except Exception as error:  # not installed, no such model, no network
            fail(2, f"--text-encoder needs sentence-transformers and its model ({error})")
        return unit(torch.from_numpy(model.encode(texts, batch_size=256)).float(), args.text_encoder)
    return hash_text(texts, HYP["text_width"])

def unit(features, name):
    """Rows of unit length as float16 [N, width]; exit 3 where one is not finite or is 0."""
    bad = ~(features.isfinite().all(1) & (features.norm(dim=1) > 0))
    bad.any() and fail(3, f"{name}: the features of row {int(bad.nonzero()[0])} are 0, NaN or infinite")
    return F.normalize(features, dim=1).to(torch.float16).cpu().numpy()
#############################################
#                   Model                   #
#############################################
# epochs: share of --epochs; start: the recipe from whose weights it goes on
Recipe = collections.namedtuple("Recipe", "task epochs net activation pool start", defaults=(
    "all", 1.0, "conv", "gelu", "max", ""))
RECIPES = dict(  # of encoders to be connected, the first ones first, each in three widths
    all=Recipe(), rotation=Recipe("rotation"), fine=Recipe("fine"), random=Recipe("none", 0.0),
    ten=Recipe("ten"), weak=Recipe(epochs=0.1), relu=Recipe(activation="relu"), mean=Recipe(pool="mean"),
    residual=Recipe(net="residual"), vit=Recipe(net="vit"))
HELD_OUT = (  # (name, recipe, place of the width, bits of its weights): two relatives of those above, two not
    ("all-int4", Recipe(epochs=0.0, start="all"), 0, 4), ("all-other", Recipe(), 2, 0),
    ("fine-longer", Recipe("fine", 0.25, start="fine"), 1, 0), ("coarse", Recipe("coarse"), 0, 0))

class ConvNet(nn.Module):
    """Four 3x3 convolutions, each with BatchNorm: [N, 3, 32, 32] -> [N, width]"""
    def __init__(self, width, recipe):
        super().__init__()
        sizes = 3, width // 8, width // 4, width // 2, width
        conv = lambda a, b: nn.Conv2d(a, b, 3, padding=1, bias=False)
        self.convs = nn.ModuleList(map(conv, sizes, sizes[1:]))
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, sizes[1:]))
        self.more = nn.ModuleList(map(conv, sizes[1:], sizes[1:]) if recipe.net == "residual" else ())
        self.activation, self.mean = getattr(F, recipe.activation), recipe.pool == "mean"
    def forward(self, x):
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = self.activation(norm(conv(x)))
            x = x + self.activation(self.more[i](x)) if self.more else x
            x = F.max_pool2d(x, 2) if i < 3 else x
        return x.mean((2, 3)) if self.mean else x.amax((2, 3))

def make_net(width, recipe):
    """An encoder with fresh weights."""
    if recipe.net != "vit":
        return ConvNet(width, recipe)
    net = torchvision.models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=4, num_heads=width // 32, hidden_dim=width, mlp_dim=2 * width)
    net.heads = nn.Identity()
    return net

def normalize(images):
    """uint8 [N, 32, 32, 3] -> [N, 3, 32, 32] in channels_last"""
    mean, std = torch.tensor([MEAN, STD], device=images.device)
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)

def task_of(recipe, sets):
    """(images uint8 [N, 32, 32, 3], labels [N], classes) that an encoder learns: those of all sets, of the
    first one (ten) or of the last one (fine, coarse)."""
    if recipe.task in ("all", "rotation", "none"):
        firsts = itertools.accumulate((len(s.classes) for s in sets), initial=0)
        labels = torch.cat([s.labels + first for s, first in zip(sets, firsts)])
        classes = 4 if recipe.task == "rotation" else sum(len(s.classes) for s in sets)
        return torch.cat([s.images for s in sets]), labels, classes
    s = sets[0] if recipe.task == "ten" else sets[-1]
    if recipe.task == "coarse":
        return (s.images, s.labels // 2, (len(s.classes) + 1) // 2) if s.coarse is None else (
            s.images, s.coarse[s.labels], len(s.coarse_classes))
    return s.images, s.labels, len(s.classes)

def train_encoder(net, recipe, sets, seed, device, steps):
    """Train in place, by the recipe. -> last loss, or None without a step"""
    images, labels, classes = task_of(recipe, sets)
    torch.manual_seed(seed)
    head = nn.Linear(feature_width(net, device), classes).to(device)
    parameters, vit, loss = [*net.parameters(), *head.parameters()], recipe.net == "vit", None
    lr, batch_size = HYP["lr"] / (100 if vit else 1), HYP["batch_size"]
    optimizer = (torch.optim.AdamW(parameters, lr, weight_decay=0.05) if vit else torch.optim.SGD(
        parameters, lr, momentum=0.9, nesterov=True, weight_decay=HYP["weight_decay"]))
    net.train()
    for step in range(steps):
        share = step / steps  # the learning rate rises for a fifth of the steps, then falls to 0
        optimizer.param_groups[0]["lr"] = lr * min(5 * share + 1 / steps, (1 - share) / 0.8)
        rows = torch.randint(len(labels), (batch_size,))
        inputs, wanted = images[rows].to(device), labels[rows].to(device)
        inputs = normalize(torch.where((torch.rand(batch_size, device=device) < 0.5).view(-1, 1, 1, 1),
                                       inputs.flip(2), inputs))
        dy, dx = torch.randint(5, (2,)).tolist()
        inputs = F.pad(inputs, [2] * 4, mode="reflect")[:, :, dy:dy + 32, dx:dx + 32]
        if recipe.task == "rotation":
            wanted = torch.arange(batch_size, device=device) % 4
            inputs = torch.cat([inputs[turns::4].rot90(turns, (2, 3)) for turns in range(4)])
            wanted = torch.cat([wanted[turns::4] for turns in range(4)])
        with autocast(device):
            logits = head(net(inputs.contiguous(memory_format=torch.channels_last))).float()
        loss = F.cross_entropy(logits, wanted, label_smoothing=HYP["label_smoothing"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss if loss is None else loss.item()

def feature_width(net, device):
    with torch.no_grad():
        net.eval()
        return net(torch.zeros(1, 3, 32, 32, device=device)).shape[1]

def quantize(net, bits):
    """Round the weights of each filter to 2 ** bits - 1 levels, in place."""
    for p in net.parameters():
        if bits and p.ndim > 1:
            step = p.data.flatten(1).abs().amax(1).view(-1, *[1] * (p.ndim - 1)) / (2 ** (bits - 1) - 1)
            p.data.copy_((p.data / step.clamp(min=1e-12)).round() * step)

def zoo_model(name, device):
    """Function of images uint8 [N, 32, 32, 3] -> features [N, width] of torchvision weights: the input of the
    last linear layer."""
    try:
        weights = torchvision.models.get_weight(name)
        builder = next(b for b in torchvision.models.list_models(torchvision.models)
                       if torchvision.models.get_model_weights(b) is type(weights))
        model = torchvision.models.get_model(builder, weights=weights).eval().to(device)
    except Exception as error:  # an unknown name, no network, a damaged file
        fail(2 if isinstance(error, ValueError) else 3, f"no weights {name} ({error})")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    layers or fail(2, f"{name} has no linear layer whose input could be taken")
    seen, prepare = [], weights.transforms()
    layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    def features(images):
        model(prepare(images.permute(0, 3, 1, 2).to(device)))
        return seen.pop().flatten(1)
    return features
#############################################
#                  Logging                  #
#############################################
CPUINFO = pathlib.Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""

def columns(sets):
    """Of the table: loss of the training, accuracy of a probe on each set, time."""
    names = "run", "encoder         ", "width", "train_loss", *(s.name for s in sets)
    return *names, "seconds", "minutes_left"

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
def probe(train, labels, test, test_labels, classes):
    """Accuracy of ridge regression to one-hot labels: features [N, width], labels [N] -> float"""
    mean = train.mean(0)
    x, y = (train - mean).double(), F.one_hot(labels, classes).double()
    gram = x.T @ x
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram + ridge, x.T @ (y - y.mean(0)))
    logits = (test - mean).double() @ weight + y.mean(0)
    return (logits.argmax(1) == test_labels).double().mean().item()
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
        return self["train"] + self["embed"]

def autocast(device):
    """bf16 autocast on a GPU, and on a CPU with bf16 instructions."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or "bf16" in CPUINFO)

def peak_flops(device):
    """FLOP/s of the fastest of ten large matmuls in the precision of the training; MFU is the share of it."""
    timer, n = Timer(), 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=DTYPE[device.type])
    for trial in range(11):  # the first lap holds the set-up too
        with autocast(device):
            a @ a
        timer.lap(trial)
    return 2 * n ** 3 / min(timer.values())

def write_whole(path, write):
    """A file that write(file) fills, all of it or nothing; exit 1 where that fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save has both for a full disk
        partial.unlink(missing_ok=True)
        fail(1, f"cannot write {path} ({' '.join(str(error).split()[:12])})")

def sources(args, folder, sets, seed, device):
    """[(name, held out, function without arguments)]; that gives (function of images -> features [N, width],
    or two files that hold them; last loss or None; images that training has seen)."""
    held_out = HYP["held_out"].split(",")
    found = [(name, name in held_out, lambda name=name: (zoo_model(name, device), None, 0))
             for name in HYP["zoo"].split(",") if name]
    for text in args.features:
        match = re.fullmatch("([^=]+)=([^,]+),([^,]+)", text)
        name, *paths = match.groups() if match else fail(2, f"--features {text} is not NAME=FILE,FILE")
        found.append((name, name in held_out, lambda paths=paths: (paths, None, 0)))
    if not HYP["zoo"]:
        widths, chosen = list(map(int, HYP["widths"].split(","))), list(RECIPES.items())[:HYP["count"] // 3]
        listed = [(f"{name}-{width}", recipe, width, 0, False) for width in widths for name, recipe in chosen]
        listed += [(f"{name}-{widths[place]}", recipe, widths[place], bits, True)
                   for name, recipe, place, bits in HELD_OUT if recipe.start in ("", *dict(chosen))]
        make = functools.partial(trained_encoder, folder, sets, seed, device)
        found += [(name, out, functools.partial(make, name, *rest)) for name, *rest, out in listed]
    names = collections.Counter(name for name, *_ in found)
    max(names.values()) == 1 or fail(2, f"two encoders have the name {names.most_common(1)[0][0]}")
    return found

def trained_encoder(folder, sets, seed, device, name, recipe, width, bits):
    """An encoder by its recipe, from its file in that folder or trained and put there, as sources has it."""
    text = json.dumps([{name: HYP[name] for name in ("epochs", "batch_size", "lr", "weight_decay",
                                                     "label_smoothing")}, *map(digest, sets), seed, SHA256])
    key, own = hashlib.sha256(text.encode()).hexdigest()[:8], zlib.crc32(name.encode()) + seed
    path, loss = folder / f"{name}-{key}.pt", None
    torch.manual_seed(own)
    net = make_net(width, recipe)
    steps = math.ceil(HYP["epochs"] * recipe.epochs * len(task_of(recipe, sets)[1]) / HYP["batch_size"])
    trained = 0
    try:
        assert zipfile.ZipFile(path).testzip() is None
        state = torch.load(path, "cpu", weights_only=True)
        net.load_state_dict(state["net"])
        loss = state["loss"]
    except Exception:  # there is none, or a damaged one
        trained = steps * HYP["batch_size"]
        if recipe.start:  # made before those that are held out, and again where its file is gone or damaged
            start = f"{recipe.start}-{width}"
            *_, more = trained_encoder(folder, sets, seed, device, start, RECIPES[recipe.start], width, 0)
            trained += more
            net.load_state_dict(torch.load(folder / f"{start}-{key}.pt", "cpu", weights_only=True)["net"])
        net.to(device, memory_format=torch.channels_last)
        loss = train_encoder(net, recipe, sets, own, device, steps)
        loss is None or math.isfinite(loss) or fail(1, f"the loss of {name} is {loss}")
        quantize(net, bits)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: torch.save(dict(net=net.state_dict(), loss=loss), file))
    net.to(device, memory_format=torch.channels_last).eval()
    def features(images):
        with autocast(device):
            return net(normalize(images.to(device)).contiguous(memory_format=torch.channels_last)).float()
    return features, loss, trained

def embed(name, make, pairs, tests):
    """One encoder over the pairs (images, rows, views) and test images. -> dict(train, test: float16 arrays
    [N, width], train_loss or nothing, flops)"""
    features, loss, trained = make()
    (images, rows, views), flops = pairs, 0
    if isinstance(features, list):
        arrays = []
        for path, n in zip(features, (len(rows), len(tests))):
            try:
                array = torch.from_numpy(np.load(path)).float()
                assert array.ndim == 2, f"of the shape {[*array.shape]}"
            except Exception as error:  # whatever the file holds
                fail(3, f"cannot read {path} as an array of vectors ({error})")
            arrays.append(unit(array, path))
            len(arrays[-1]) == n or fail(3, f"{path} has {len(arrays[-1])} rows for {n} images")
        arrays[0].shape[1] == arrays[1].shape[1] or fail(3, f"{' and '.join(features)} differ in width")
        return dict(train=arrays[0], test=arrays[1], flops=0)
    def run(count, chunk_of):
        with torch.no_grad():
            chunks = (chunk_of(slice(first, first + 1000)) for first in range(0, count, 1000))
            return np.concatenate([unit(features(chunk), name) for chunk in chunks])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features(tests[:2])
    flops = counter.get_total_flops() / 2 * (len(rows) + len(tests) + 3 * trained)
    train = run(len(rows), lambda part: views_of(images, rows[part], views[part]))
    result = dict(train=train, test=run(len(tests), lambda part: tests[part]), flops=flops)
    return result if loss is None else dict(result, train_loss=loss)

def views_of(images, rows, views):
    """The images of rows, each in its view: uint8 [n, 32, 32, 3]"""
    chosen = images[rows]
    for number in np.unique(views).tolist():
        mask = torch.from_numpy(views == number)
        chosen[mask] = view(chosen[mask], number)
    return chosen

def write_array(path, parts, n):
    """Arrays [n, width], side by side, as one .npy file, by blocks of rows. -> its sha256"""
    first = parts[0]
    def write(file):
        shape = (n, sum(part.shape[1] for part in parts)) if first.ndim == 2 else first.shape
        np.lib.format.write_array_header_1_0(
            file, dict(descr=np.lib.format.dtype_to_descr(first.dtype), fortran_order=False, shape=shape))
        for start in range(0, n, 1 << 14):
            block = [part[start:start + (1 << 14)] for part in parts]
            file.write((np.concatenate(block, 1) if first.ndim == 2 else block[0]).tobytes())
    write_whole(path, write)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def build(args, root, name, sets, run, seed, device):
    """One run: all encoders, or those that an interrupted run left, and the folder of features. -> dict for
    the result line"""
    timer, rows, flops, results = Timer(), [], 0, []
    images, tests = (torch.cat([getattr(s, key) for s in sets]) for key in ("images", "test_images"))
    chosen, views = plan(len(images), HYP["pairs"])
    files = [file for text in args.features for file in text.partition("=")[2].split(",")]
    files = [hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() for file in [*files, args.text]
             if file and os.path.isfile(file)]
    flags = args.features, args.text, args.text_encoder, files
    settings = json.dumps([HYP, seed, SHA256, *map(digest, sets), *flags])
    key = hashlib.sha256(settings.encode()).hexdigest()[:8]
    place = pathlib.Path(args.emb or root / "emb")
    place = place.with_name(f"{place.name}-seed{seed}") if run else place
    listed = sources(args, place.parent / "encoders", sets, seed, device)
    partial = place.with_name(f"{place.name}.{key}.partial")
    place.exists() and fail(2, f"{place} is there already; delete it, or name another with --emb")
    partial.mkdir(parents=True, exist_ok=True)
    kinds = [kind for s in sets for kind in (s.classes[i] for i in s.labels.tolist())]
    groups = [group for s in sets for group in coarse_names(s, s.labels)]
    texts = []
    for start in range(0, len(chosen), 5000):
        part, which = chosen[start:start + 5000], views[start:start + 5000]
        texts += captions(views_of(images, part, which), [kinds[i] for i in part], [groups[i] for i in part],
                          which, start)
    test_kinds = [s.classes[i] for s in sets for i in s.test_labels.tolist()]
    texts += captions(tests, test_kinds, [g for s in sets for g in coarse_names(s, s.test_labels)],
                      [0] * len(tests), 2 ** 32 - 1)
    texts += [f"a photo of a {kind}" for s in sets for kind in s.classes]
    write_whole(partial / "captions.txt", lambda file: file.write("\n".join([*texts, ""]).encode()))
    if args.export:
        whole = torch.cat([views_of(images, chosen, views), tests]).numpy()
        write_whole(partial / "images.npy", lambda file: np.save(file, whole))
        print(f"{len(whole)} images and {len(texts)} lines of captions: {os.path.relpath(partial)}")
        sys.exit(0)
    text = text_vectors(args, texts)
    timer.lap("text")
    for number, (encoder, held_out, make) in enumerate(listed):
        path, result = partial / f"encoder-{encoder}.pt", None
        with contextlib.suppress(Exception):  # there is none, or a damaged one
            assert zipfile.ZipFile(path).testzip() is None
            result = torch.load(path, weights_only=True, mmap=True)
        if result is None:
            result = embed(encoder, make, (images, chosen, views), tests)
            result.update((part, torch.from_numpy(result[part])) for part in ("train", "test"))
            write_whole(path, lambda file: torch.save(result, file))
            flops += result["flops"]  # of what this process did
        row = {key: result[key] for key in ("train_loss",) if key in result}
        row.update(encoder=encoder, width=result["train"].shape[1], held_out=held_out)
        first, test_first = 0, 0
        for s in sets:
            mine = ((chosen >= first) & (chosen < first + len(s.labels))).nonzero()[0][:20000]
            labels = s.labels[chosen[mine] - first]
            test = result["test"][test_first:test_first + len(s.test_labels)].float()
            row[s.name] = probe(result["train"][mine].float(), labels, test, s.test_labels, len(s.classes))
            first, test_first = first + len(s.labels), test_first + len(s.test_labels)
        rows.append(row)
        results.append(result)
        seconds = timer.lap("train")
        left = seconds / (number + 1) * (len(listed) - number - 1) / 60
        shown = dict(row, run=run, seconds=seconds, minutes_left=left)
        print_training_details(columns(sets), {name: shown.get(name.strip(), "") for name in columns(sets)})
    n, m, sums = len(chosen), len(tests), {}
    labels = torch.cat([s.test_labels for s in sets]).numpy()
    for part, arrays in dict(
            train_image=[r["train"].numpy() for r in results],
            test_image=[r["test"].numpy() for r in results], train_text=[text[:n]],
            test_text=[text[n:n + m]], prompts=[text[n + m:]],
            test_labels=[labels]).items():
        sums[part] = write_array(partial / f"{part}.npy", arrays, len(arrays[0]))
    edges = [list(itertools.accumulate([0, *(len(getattr(s, key)) for s in sets)]))
             for key in ("test_labels", "classes")]
    meta = dict(
        data=name, seed=seed, text_width=text.shape[1], rows=dict(train=n, test=m), sha256=sums,
        encoders=[dict(name=row["encoder"], width=row["width"], held_out=row["held_out"]) for row in rows],
        sets=[dict(name=s.name, rows=rows_, prompts=prompts) for s, rows_, prompts in zip(
            sets, *(list(itertools.pairwise(edge)) for edge in edges))], probes=rows)
    write_whole(partial / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    for path in partial.glob("encoder-*.pt"):
        path.unlink()
    os.replace(partial, place)
    time_seconds = timer.lap("embed")
    print(f"{n} pairs, {len(rows)} encoders: {os.path.relpath(place)}")
    acc = float(np.mean([row[s.name] for row in rows for s in sets]))
    return dict(acc=acc, time_seconds=time_seconds, seed=seed, parts=timer, flops=flops, epochs=rows)

def coarse_names(s, labels):
    return [None] * len(labels) if s.coarse is None else [
        s.coarse_classes[i].replace("_", " ") for i in s.coarse[labels].tolist()]

def main(args):
    """All runs of the script: data, encoders, and the result as text and as a JSON line."""
    sys.stdout.reconfigure(line_buffering=True)
    args.runs > 0 <= args.seed < 2 ** 63 or fail(2, "--runs starts at 1 and --seed at 0, to end by 2^63")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    args.device == "cuda" != found and fail(4, "no usable CUDA GPU; --device cpu needs none")
    timer, device = Timer(), torch.device(args.device or found)
    HYP.update({name: value for name, value in vars(args).items() if name in HYP})
    if args.dry_run:
        HYP.update(batch_size=8, widths="32,64,96", text_width=48, pairs=100)
        args.emb = args.emb or f"{tempfile.mkdtemp()}/emb"
    large = device.type == "cuda"
    HYP.update(widths=HYP["widths"] or ("384,768,1024" if large else "96,192,256"),
               text_width=HYP["text_width"] or (768 if large else 128))
    right = re.fullmatch(r"(\d+,){2}\d+", HYP["widths"]) and all(
        int(width) % 32 == 0 for width in HYP["widths"].split(","))
    right or fail(2, "--widths are three multiples of 32")
    HYP["count"] in range(3, 31, 3) or fail(2, "--count is a multiple of 3 from 3 to 30")
    for name in ("pairs", "text_width", "batch_size"):
        HYP[name] > 0 or name == "pairs" and HYP[name] == 0 or fail(2, f"--{name} must be above 0")
    out = pathlib.Path(args.out or SCRIPT.parent / "results" / f"{SCRIPT.stem}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # better to learn of a wrong --out now
    name, root, sets = load_sets(args.data)
    total = sum(len(s.labels) for s in sets)
    HYP["epochs"] = 16 / total if args.dry_run else HYP["epochs"]
    most = len(VIEWS) * total
    HYP["pairs"] = HYP["pairs"] or min(FULL if large else 100000, most)
    HYP["pairs"] <= most or fail(3, f"{total} images make no more than {most} pairs")
    timer.lap("load")
    name != "synthetic" or args.target is None or fail(1, "--target says nothing about synthetic data")
    peak, env = peak_flops(device), environment(device)
    with autocast(device):
        torch.is_autocast_enabled(device.type) and env.update(dtype="bfloat16 autocast")
    env["gpu"] and torch.cuda.reset_peak_memory_stats()
    print_columns(columns(sets), f"{SCRIPT.stem} on {name} data")
    series = json.dumps([SHA256, HYP, args.seed, *map(digest, sets), args.features, args.emb, env["cpu"]])
    partial = out.with_name(f"{out.name}.{hashlib.sha256(series.encode()).hexdigest()[:8]}.partial")
    runs = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    runs and print(f"continuing after {len(runs)} of {args.runs} runs")
    for run in range(len(runs), args.runs):
        runs.append(build(args, root, name, sets, run, args.seed + run, device))
        append_line(partial, runs[-1])
    target, executed = args.target or 0, float(np.mean([run.pop("flops") for run in runs]))
    acc_mean, acc_std, acc_ci95, p_value = statistics([run["acc"] for run in runs], target)
    time_mean, time_std, *_ = statistics([run["time_seconds"] for run in runs], 0)
    memory = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    finish(dict(
        script=SCRIPT.name, data=name, n=len(runs), acc_mean=acc_mean, acc_std=acc_std, acc_ci95=acc_ci95,
        target=target, p_value=p_value, time_mean=time_mean, time_std=time_std, load_seconds=timer["load"],
        compile_seconds=0, diag_seconds=0, wall_seconds=time.perf_counter() - START,
        cpu_seconds=time.process_time(), peak_mib=memory / 2**20, timed="training, features, files",
        untimed="load", pflops_nominal=executed / 1e15, pflops=executed / 1e15, peak_tflops=peak / 1e12,
        mfu=executed / peak / time_mean, dry_run=args.dry_run, compiled=False, device=device.type, **env,
        sha256=SHA256, data_sha256="+".join(map(digest, sets)), argv=sys.argv[1:], hyp=HYP, runs=runs,
        utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())), out)
    partial.unlink(missing_ok=True)
    acc_mean >= target or fail(1, f"mean accuracy {acc_mean:.4f} is below {target}")
#############################################
#                Entry point                #
#############################################
if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        fail(130, "interrupted; finished encoders are kept, the same command continues")
    except OSError as error:
        fail(2, error)
    except Exception as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate mem" not in str(error):
            raise
        pages = [os.sysconf(f"SC_{kind}PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") for kind in ("AV", "")]
        mib = [n >> 20 for n in (torch.cuda.mem_get_info() if torch.cuda.is_initialized() else pages)]
        fail(1, f"out of memory at batch size {HYP['batch_size']}, with {mib[0]} of {mib[1]} MiB free")
