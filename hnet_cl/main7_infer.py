"""main7_infer.py -- continual learning on SplitCIFAR with hypernetworks.

Adds: the task of a test image is inferred, from what the networks of all tasks say about it
Changes: HYP COLUMNS infer_tasks final_tests main
Result: 74.55 ± 1.57 % (n=3), 0.1 ± 0.0 min, AMD EPYC, 1 threads, float32, torch 2.11.0
Vs previous: not measured
Source: task inference as in arXiv 2103.01133 (posterior replay); written afresh.
Run: python hnet_cl/main7_infer.py

The accuracy of a run is the mean over tasks on their test images, the task being known, after the last task.
The default is a check for a CPU: 2,000 images of each of five tasks, halved, on a network of 19,338 weights.
"""
CODE = open(__file__, encoding="utf-8").read()
#############################################
#                   Setup                   #
#############################################
import argparse, collections, contextlib, copy, hashlib, importlib.metadata, itertools, json, math, os
import pathlib, platform, re, resource, signal, socket, subprocess, sys, tempfile, time, zipfile

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
    num_tasks=5,            # tasks, of classes in their order: CIFAR-10, then CIFAR-100
    num_classes_per_task=2,  # of each task; 1, 2, 5 or 10
    skip_tasks=0,           # tasks to leave out first; 1, of 10 classes, leaves CIFAR-100 alone
    train_images=2000,      # of each task; 0: all
    val_set_size=100,       # images of each task that are held out of its train set, before these
    disable_data_augmentation=True,  # neither crops nor mirror images
    net_type="tiny",        # main network: tiny, resnet, wrn or iresnet
    resnet_block_depth=5,   # blocks in a group of the resnet, 6 n + 2 layers in all
    resnet_channel_sizes="16,16,32,64",  # of its first layer and of its groups
    wrn_block_depth=4,      # blocks in a group of the wrn, 6 n + 4 layers in all
    wrn_widening_factor=10,  # channels of its groups over 16, 32 and 64
    wrn_use_fc_bias=False,  # a bias in its last layer in spite of --no_bias
    iresnet_use_fc_bias=False,  # nothing: the published counts are those of a last layer without bias
    iresnet_projection_shortcut=False,  # 1x1 convolutions in the shortcuts of the iresnet, with batch norm
    no_bias=False,          # no biases in convolutions and the last layer
    epochs=-1.0,            # passes over the train set of a task; -1: n_iter steps
    n_iter=200,             # steps of a task
    batch_size=32,          # images of a step
    lr=1e-3,                # of Adam
    lambda_lr_scheduler=False,  # lr / 10, 100, 1000 and 2000 after epochs 80, 120, 160 and 180
    beta=50.0,              # of the penalty, beside a loss that is a sum over the images of the task
    hnet_reg_batch_size=-1,  # earlier tasks in the penalty of a step, drawn anew; -1: all
    calc_hnet_reg_targets_online=False,  # targets of the penalty made in each step, not kept
    clip_grad_norm=-1.0,    # largest norm of the gradient; -1: no limit
    cond_emb_size=32,       # of the vector of a task
    hnet_type="chunked_hmlp",  # hypernetwork: hmlp (all weights at once), chunked_hmlp, structured_hmlp
    hmlp_arch="",           # layers of the hypernetwork before the last one, or of each group of it with ;
    chmlp_chunk_size=250,   # weights that chunked_hmlp makes at once
    chunk_emb_size="32",    # of the vector of a chunk, for each group of structured_hmlp
    shmlp_gcd_chunking=False,  # parts of layers in structured_hmlp, of the largest size that divides all
    use_cond_chunk_embs=False,  # vectors of the chunks for each task
    std_normal_emb=1.0,     # deviation of the vectors of chunks at the start
    gain_offset=1.0,        # added to what is made for the gains of batch norm; 0: nothing
    hnet_init="xavier",     # start of the hypernetwork; xavier, normal or hyperfan
    allow_over_budget=False,  # a hypernetwork with more weights than it makes
    hnet_net_act="relu",    # activation between these layers; relu, sigmoid or tanh
    std_normal_temb=1.0,    # deviation of the vectors of tasks at the start
    infer="ent",            # task of an image: the one of least entropy (ent) or highest probability (conf)
    infer_batch_size=1,     # images, known to be of one task, that this is decided for together
    val_batch_size=1000,    # images of a forward pass of evaluation
    save_steps=1000,        # between checkpoints, which are also written after each task
)

def flag_parser():
    """Flags of the measurement, and one for each hyperparameter of a single value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(2, f"{message} (--help lists the flags)")
    parser.add_argument("--data", metavar="DIR", help="CIFAR-10 and -100 or 'synthetic' (default: data)")
    parser.add_argument("--runs", metavar="N", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of run 0 (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    parser.add_argument("--out", metavar="FILE", help="for the JSON line (default: results/ by the script)")
    parser.add_argument("--target", metavar="A", type=float, help="exit 1 if the mean accuracy is below A")
    parser.add_argument("--no-compile", action="store_true", help="no CUDA graph in scripts that use one")
    parser.add_argument("--dry-run", action="store_true", help="two steps of 8 images a task, then all tests")
    parser.add_argument("--output_dir", metavar="DIR", help="for checkpoints (default: in runs/)")
    parser.add_argument("--resume", metavar="FILE", help="go on from it (default: newest in output_dir)")
    for name, value, text in re.findall(r"^    (\w+)=(.*?),\s+# (.*)$", CODE, re.M):
        if isinstance(value := HYP.get(name), bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=value, help=text)
        elif isinstance(value, (int, float, str)):
            parser.add_argument(f"--{name}", type=type(value), default=value, metavar=name[0].upper(),
                                help=f"{text} (default: {value if value != '' else 'none'})")
    return parser

if __name__ == "__main__":
    ARGS = flag_parser().parse_args()  # before torch is imported: --help is instant
import numpy as np, torch, torchvision, torch.nn as nn, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
torch.set_float32_matmul_precision("high")  # TF32 on a GPU
#############################################
#                 Optimizer                 #
#############################################
def make_optimizer(model):
    """Adam, made anew for each task"""
    return torch.optim.Adam(model.parameters(), lr=HYP["lr"])

def learning_rate(step, steps_per_epoch):
    """Of a 0-based step of a task."""
    past = sum(step // steps_per_epoch > epoch for epoch in (80, 120, 160, 180))
    return HYP["lr"] * (1, 0.1, 0.01, 1e-3, 5e-4)[past if HYP["lambda_lr_scheduler"] else 0]
#############################################
#                   Data                    #
#############################################
CIFARS = dict(cifar10=torchvision.datasets.CIFAR10, cifar100=torchvision.datasets.CIFAR100)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
DTYPE = dict(cuda=torch.float32, cpu=torch.float32)  # of weights
PARTS = "train", "val", "test"

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

def read_cache(path, classes):
    """Prepared part of a set of that many classes: (images uint8 [N, 32, 32, 3], labels int64 [N]); exit 3 if
    it is no good."""
    with contextlib.suppress(Exception):  # whatever damage leads to, the sentence below is the answer
        assert zipfile.ZipFile(path).testzip() is None  # checksums, which torch.load does not look at
        cache = torch.load(path, weights_only=True)
        images, labels = cache["images"], cache["labels"]
        assert (images.dtype, images.shape) == (torch.uint8, (len(labels), 32, 32, 3))
        assert labels.dtype == torch.int64 and labels.min() == 0 and labels.max() == classes - 1
        return images, labels
    fail(3, f"{path} is missing, damaged or not of {classes} classes; delete both caches there and add the "
            "official archive")

def load_sets(folder):
    """{'cifar10' or 'cifar100': [(images, labels) of train and test]} for the sets that the tasks need, and
    the name of the data: those names with a plus sign, 'synthetic', or 'other' for sets of another size."""
    per_task, sets = HYP["num_classes_per_task"], {}
    first, end = (per_task * n for n in (HYP["skip_tasks"], HYP["skip_tasks"] + HYP["num_tasks"]))
    names = [name for name, used in (("cifar10", first < 10), ("cifar100", end > 10)) if used]
    root, classes = pathlib.Path(folder or "data"), dict(cifar10=10, cifar100=100)
    for name in names:
        if folder == "synthetic":
            drawn = draw_synthetic(5000, seed=1), draw_synthetic(1000, seed=2)
            sets[name] = [(x["images"], torch.arange(len(x["labels"])) % classes[name]) for x in drawn]
            continue
        cifar, files = CIFARS[name], ("train.pt", CIFARS[name].base_folder, CIFARS[name].filename)
        places = (root / name, root) if name == "cifar100" or "cifar100" in names else (root, root / name)
        found = [place for place in places if any((place / file).exists() for file in files)]
        place, archive = found[0] if found else root / name, f"{cifar.filename} (md5 {cifar.tgz_md5})"
        found or not folder or fail(3, f"no {name} in {folder}; put {archive} there")
        try:
            socket.setdefaulttimeout(10)
            for part in () if (place / "train.pt").exists() else ("test", "train"):
                download = (place / cifar.filename).exists() or not found
                whole = cifar(place, train=part == "train", download=download)
                partial = place / f"{part}.{os.getpid()}"
                torch.save(dict(images=torch.tensor(whole.data), labels=torch.tensor(whole.targets),
                                classes=whole.classes), partial)
                os.replace(partial, place / f"{part}.pt")  # a reader sees all of it or nothing
        except Exception as error:  # of the network, a proxy, a read-only or full disk, a damaged file
            found and fail(3, f"cannot prepare {name} in {place} ({error}); empty it and put {archive} there")
            (place / cifar.filename).unlink(missing_ok=True)
            print(f"NOTICE: {root} holds no {name}, and downloading it failed ({type(error).__name__}).\n"
                  "NOTICE: Training on built-in synthetic images instead, to show that all works.\n"
                  f"NOTICE: For real results put {archive} into {root / name}.")
            return load_sets("synthetic")
        sets[name] = [read_cache(place / f"{part}.pt", classes[name]) for part in ("train", "test")]
    whole = all([len(labels) for _, labels in parts] == [50000, 10000] for parts in sets.values())
    return sets, folder if folder == "synthetic" else "+".join(names) if whole else "other"

def split(sets, device):
    """The tasks: [{part: (images uint8 [n, 3, 32, 32], labels int64 [n] from 0 on)}], on the device"""
    per_task, tasks = HYP["num_classes_per_task"], []
    for number in range(HYP["skip_tasks"], HYP["skip_tasks"] + HYP["num_tasks"]):
        first = per_task * number
        name, first = ("cifar10", first) if first < 10 else ("cifar100", first - 10)
        rows, held = [], HYP["val_set_size"]
        for images, labels in sets[name]:
            mine = (labels >= first) & (labels < first + per_task)
            rows.append((images[mine].permute(0, 3, 1, 2).contiguous(), labels[mine] - first))
        (images, labels), test = rows
        last = held + HYP["train_images"] if HYP["train_images"] else len(labels)
        parts = (images[held:last], labels[held:last]), (images[:held], labels[:held]), test
        min(len(parts[0][1]), len(test[1])) or fail(3, f"task {number} has no images but the {held} held out")
        tasks.append({key: tuple(x.to(device) for x in part) for key, part in zip(PARTS, parts)})
    return tasks

def plan(n, seed, task, first_step, last_step, device):
    """Yields (step, index [batch_size], crop numbers [batch_size, 3]) of a task. One permutation of its n
    images follows the other; a step depends on seed, task and its own number alone."""
    size, orders = HYP["batch_size"], {}
    for step in range(first_step, last_step):
        epochs = range(step * size // n, (step * size + size - 1) // n + 1)
        for epoch in epochs:
            if epoch not in orders:
                draws = rng(device, "order", seed, task, epoch)
                orders[epoch] = torch.randperm(n, generator=draws, device=device)
        orders = {epoch: orders[epoch] for epoch in epochs}
        first = step * size - epochs[0] * n
        numbers = torch.rand(size, 3, generator=rng(device, "crop", seed, task, step), device=device)
        yield step, torch.cat([*orders.values()])[first:first + size], numbers

def augment(images, numbers):
    """Windows of 32 x 32 of images with 4 black pixels around, half of them mirrored: uint8 [n, 3, 32, 32],
    uniform numbers [n, 3] -> the same shape"""
    padded, pixels = F.pad(images, [4] * 4), torch.arange(32, device=images.device)
    padded = torch.where(numbers[:, 0, None, None, None] < 0.5, padded.flip(3), padded)
    rows, columns = ((9 * numbers[:, i, None]).long() + pixels for i in (1, 2))
    image, channel = (torch.arange(k, device=images.device) for k in images.shape[:2])
    return padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None],
                  columns[:, None, None, :]]

def prepare(images):
    """uint8 [n, 3, 32, 32] -> normalized floats, for the tiny network of half the height and width"""
    mean, std = torch.tensor([MEAN, STD], device=images.device)[:, :, None, None]
    x = (images / 255 - mean) / std
    return F.avg_pool2d(x, 2) if HYP["net_type"] == "tiny" else x
#############################################
#                   Model                   #
#############################################
# The main network as data. shapes: of its weights in their order, gain and shift of each batch norm, 1x1
# projections, convolutions with biases, last layer; size: their number; norms: channels of the batch norms;
# last: tensors of the last layer, head: their weights.
Net = collections.namedtuple("Net", "kind channels blocks projections shapes size norms last head")

def numbers_of(text):
    """'16,16,32,64' -> [16, 16, 32, 64]; exit 2 for something else"""
    re.fullmatch("[0-9,]*", text) or fail(2, f"'{text}' is no list of numbers, as 16,16,32,64 is")
    return [int(part) for part in text.split(",") if part]

def main_net():
    """The main network by its flags; exit 2 for one that there is not."""
    k, per_task = HYP["wrn_widening_factor"], HYP["num_classes_per_task"]
    kinds = dict(tiny=([8, 8, 16, 32], 1), iresnet=([64, 64, 128, 256, 512], 2),
                 resnet=(numbers_of(HYP["resnet_channel_sizes"]), HYP["resnet_block_depth"]),
                 wrn=([16, 16 * k, 32 * k, 64 * k], HYP["wrn_block_depth"]))
    kind = HYP["net_type"]
    kind in kinds or fail(2, f"--net_type is one of {', '.join(kinds)}")
    channels, blocks = kinds[kind]
    min(*channels, len(channels), blocks) > 0 or fail(
        2, "channels, blocks and widening factor are above 0")
    projections = [(a, b) for a, b in itertools.pairwise(channels) if kind == "wrn" or a != b and
                   kind == "iresnet" and HYP["iresnet_projection_shortcut"]]
    layers = [channels[0], *(c for c in channels[1:] for _ in range(2 * blocks))]
    norms = layers + [b for _, b in projections if kind == "iresnet"]
    biased = not HYP["no_bias"]
    shapes = [(c,) for c in norms for _ in range(2)] + [(b, a, 1, 1) for a, b in projections]
    for a, b in itertools.pairwise([3, *layers]):
        shapes += [(b, a, 3, 3)] + [(b,)] * biased
    classes = HYP["num_tasks"] * per_task
    last = [(classes, channels[-1])] + [(classes,)] * (biased or kind == "wrn" and HYP["wrn_use_fc_bias"])
    size, head = (sum(map(math.prod, part)) for part in (shapes + last, last))
    return Net(kind, channels, blocks, projections, shapes + last, size, norms, len(last), head)

def unpack(net, flat):
    """Weights [size] in a row -> list of tensors"""
    return [part.view(shape) for part, shape in zip(flat.split([*map(math.prod, net.shapes)]), net.shapes)]

def conv(x, weight, bias, stride):
    """Convolution that keeps the size of the map, over stride"""
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

def batch_norm(x, gain, shift, stats, training):
    """Over the batch in training, which brings running stats [2, channels] up to date, and else by these"""
    return F.batch_norm(x, *stats, gain, shift, training, 0.1, 1e-5)

def pad_channels(x, channels):
    """Channels of 0 before and after those of x [n, c, H, W]"""
    more = channels - x.shape[1]
    return F.pad(x, [0, 0, 0, 0, more // 2, more - more // 2])

def linear(x, weight, bias=None):
    """[n, in] -> [n, out]"""
    return F.linear(x, weight, bias)

def forward(net, flat, stats, x, training):
    """Logits [n, all classes] of the main network with weights flat [size] and batch-norm statistics stats
    [2, channels of all norms] for inputs x [n, 3, H, W]"""
    tensors, count, wide = unpack(net, flat), len(net.norms), net.kind == "wrn"
    norms = list(zip(tensors[:2 * count:2], tensors[1:2 * count:2], stats.split(net.norms, 1)))
    projections = tensors[2 * count:2 * count + len(net.projections)]
    rest = tensors[2 * count + len(net.projections):]
    starts = [i for i, p in enumerate(rest) if p.ndim == tensors[0].ndim + 3]  # of layers; biases follow
    convs = [(rest[i], rest[i + 1] if i + 1 not in starts and rest[i + 1].ndim == tensors[0].ndim else None)
             for i in starts]
    norm = lambda i, x: batch_norm(x, *norms[i], training)
    x, i = conv(x, *convs[0], 1), 0
    x = x if wide else F.relu(norm(0, x))
    for group, (before, after) in enumerate(itertools.pairwise(net.channels)):
        for block in range(net.blocks):
            stride, shortcut = 2 if group and not block else 1, x
            if (before, after) in net.projections and not block:
                k = net.projections.index((before, after))
                shortcut = conv(x, projections[k], None, stride)
                shortcut = shortcut if wide else norm(len(convs) + k, shortcut)
            elif not block:
                shortcut = pad_channels(x[:, :, ::stride, ::stride], after)
            if wide:
                x = conv(F.relu(norm(i, x)), *convs[i + 1], stride)
                x = conv(F.relu(norm(i + 1, x)), *convs[i + 2], 1) + shortcut
            else:
                x = F.relu(norm(i + 1, conv(x, *convs[i + 1], stride)))
                x = F.relu(norm(i + 2, conv(x, *convs[i + 2], 1)) + shortcut)
            i += 2
    return linear((F.relu(norm(i, x)) if wide else x).mean((2, 3)), *rest[-net.last:])

def mlp_params(sizes):
    """Weight and bias of each layer to train from: Xavier's, 0"""
    for a, b in itertools.pairwise(sizes):
        yield nn.init.xavier_uniform_(torch.empty(b, a))
        yield torch.zeros(b)

def mlp(x, params):
    """x [..., in] through linear layers, whose weights and biases come in turn"""
    act = dict(relu=F.relu, sigmoid=torch.sigmoid, tanh=torch.tanh)[HYP["hnet_net_act"]]
    for i in range(0, len(params), 2):
        x = F.linear(act(x) if i else x, params[i], params[i + 1])
    return x

# A network inside the hypernetwork: it makes so many outputs in a call, is called so many times, each with a
# vector of size emb beside that of the task, and has hidden layers of the sizes arch.
Group = collections.namedtuple("Group", "outputs calls emb arch")

def hnet_groups(net, size, chunk):
    """The networks inside the hypernetwork that makes that many weights; exit 2 where lists do not fit."""
    if HYP["hnet_type"] == "structured_hmlp":
        (net.kind == "iresnet" or net.kind == "wrn" and not HYP["no_bias"]) and fail(
            2, "structured_hmlp has no groups for an iresnet or a wrn without --no_bias")
        with torch.device("meta"):  # sizes alone
            groups, _ = structure(net, HYP["shmlp_gcd_chunking"])
        embs, archs = numbers_of(HYP["chunk_emb_size"]), HYP["hmlp_arch"].split(";")
        archs = archs * len(groups) if len(archs) == 1 else archs
        for number, (outputs, calls) in enumerate(groups, 1):
            about = f"group {number} ({outputs} weights, called {calls} times)"
            number <= len(embs) or fail(2, f"{about} has no size in --chunk_emb_size, which has {len(embs)}")
            number <= len(archs) or fail(2, f"{about} has no layers in --hmlp_arch, which has {len(archs)}")
            embs[number - 1] > 0 or calls == 1 or fail(
                2, f"{about} needs a chunk embedding above 0: all its calls would be the same")
        extra = max(len(embs), len(archs))
        extra == len(groups) or fail(2, f"there are {len(groups)} groups, and group {extra} is one too many")
        return [Group(*group, emb, numbers_of(arch)) for group, emb, arch in zip(groups, embs, archs)]
    arch = numbers_of(HYP["hmlp_arch"])
    if HYP["hnet_type"] == "hmlp":
        return [Group(size, 1, 0, arch)]
    return [Group(chunk, -(-size // chunk), *numbers_of(HYP["chunk_emb_size"]), arch)]

def structure(net, gcd):
    """[(outputs, calls)] of the networks of structured_hmlp, and the place [size] among all outputs of each
    weight of the main network. A call makes a package: a convolution, its bias and the gain and shift of its
    batch norm, or a share of these, by output channels, in a wrn by input channels (of whose gains and shifts
    the first ones count)."""
    wide, channels, n, norms = net.kind == "wrn", net.channels, 2 * net.blocks, len(net.norms)
    pieces, biased = [], len(net.shapes) - net.last - 2 * norms - len(net.projections) > norms
    start, step = 2 * norms + len(net.projections), 2 if biased else 1
    for i in range(norms):  # a convolution each
        conv = start + step * i
        (b, a), (stage, later) = net.shapes[conv][:2], divmod(i - 1, n)
        key, share, pair = (stage, later > 0), a if wide else b, channels[max(stage, 0):stage + 2]
        if i == 0:
            key = "first"
        elif wide and max(pair) in (min(pair), 2 * min(pair)):
            key, share = stage, min(pair)
        elif wide and gcd:
            key, share = stage, math.gcd(*pair)
        elif gcd:
            key, share = stage + (later > 0), math.gcd(*channels)
        shape, vector = ((b, share, 3, 3), (b,)) if wide else ((share, a, 3, 3), (share,))
        package = [shape, *[vector] * (2 + biased)]
        tensors = [conv, *[conv + 1] * biased, 2 * i, 2 * i + 1]
        pieces.append((key, package, (a if wide else b) // share, tensors))
    for k in range(len(net.projections)):
        pieces.append((f"projection {k}", [net.shapes[2 * norms + k]], 1, [2 * norms + k]))
    last = range(len(net.shapes) - net.last, len(net.shapes))
    pieces.append(("last", [net.shapes[i] for i in last], 1, [*last]))
    groups = {}
    for key, package, calls, _ in pieces:
        outputs, before = sum(map(math.prod, package)), groups.get(key, (0, 0))[1]
        groups[key] = outputs, before + calls
    ends = itertools.accumulate(outputs * calls for outputs, calls in groups.values())
    firsts = {key: end - math.prod(groups[key]) for key, end in zip(groups, ends)}
    places = [None] * len(net.shapes)
    for key, package, calls, tensors in pieces:
        count = groups[key][0] * calls
        rows = torch.arange(firsts[key], firsts[key] + count).view(calls, -1)
        firsts[key] += count
        for part, shape, tensor in zip(rows.split([*map(math.prod, package)], 1), package, tensors):
            if wide and len(shape) == 4:
                places[tensor] = torch.cat([*part.view(calls, *shape)], 1).flatten()
            else:
                places[tensor] = part[:1 if wide else calls].flatten()
    return [*groups.values()], torch.cat(places)

def hnet_params(groups, cond):
    """Parameters to train from of the hypernetwork with task vectors of size cond: for each network those of
    its calls, [calls, emb] or [tasks, calls, emb], unless emb is 0, then weights and biases"""
    tables = (HYP["num_tasks"],) * HYP["use_cond_chunk_embs"]
    for group in groups:
        if group.emb:
            yield HYP["std_normal_emb"] * torch.randn(*tables, group.calls, group.emb)
        yield from mlp_params((cond + group.emb, *group.arch, group.outputs))

def generate(groups, params, cond):
    """Outputs [n, all] of the hypernetwork, from its parameters and n task vectors cond [n, e]"""
    params, rows = iter(params), []
    for group in groups:
        x = cond[:, None].expand(-1, group.calls, -1)
        x = torch.cat([x, next(params).expand(len(cond), -1, -1)], 2) if group.emb else x
        rows.append(mlp(x, [next(params) for _ in range(2 * len(group.arch) + 2)]).flatten(1))
    return torch.cat(rows, 1)

def gains(net):
    """[size]: 1 at the gains of batch norm, 0 elsewhere"""
    return torch.cat([torch.full((math.prod(shape),), float(i < 2 * len(net.norms) and i % 2 == 0))
                      for i, shape in enumerate(net.shapes)])

def spread(net):
    """[size]: variance to start from of the weights of the main network, He's where they come in matrices"""
    parts, fan_in = [], 1
    for i, shape in enumerate(net.shapes):
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else fan_in
        value = 1.0 if i < 2 * len(net.norms) else 2 / fan_in if len(shape) > 1 else 1 / (3 * fan_in)
        parts.append(torch.full((math.prod(shape),), value))
    return torch.cat(parts)

def by_fan_in(net, params, variances):
    """New values in place for the parameters of a hypernetwork whose outputs shall start with those variances
    [size]. With chunks the vectors of these carry them, and a chunk has the mean of its weights; without, the
    rows of the last layer do."""
    uniform = lambda x, variance: x.uniform_(-1, 1).mul_((3 * torch.as_tensor(variance)) ** 0.5)
    chunked, var_task = HYP["hnet_type"] == "chunked_hmlp", HYP["std_normal_temb"] ** 2
    weights = [p for p in params[chunked:] if p.ndim > 1]
    for weight in weights:
        uniform(weight, (1 if weight is weights[-1] else 2) / weight.shape[1])
    if chunked:
        embs, cond = params[0], HYP["cond_emb_size"]
        calls, emb = embs.shape[-2:]
        padded = F.pad(variances, [0, calls * len(weights[-1]) - len(variances)], value=math.nan)
        wanted = padded.view(calls, -1).nanmean(1)
        var_chunk = ((cond + emb) * wanted - cond * var_task) / emb
        uniform(embs, var_chunk.clamp(min=1e-5)[:, None])  # too many clipped: all chunks start the same
    else:
        norm = torch.arange(len(variances)) < 2 * sum(net.norms)
        uniform(weights[-1], (variances.masked_fill(norm, 0) / (weights[-1].shape[1] * var_task))[:, None])
        params[-1].copy_(gains(net) * (1 - HYP["gain_offset"]))

class Model(nn.Module):
    """Weights [size] of the main network for a task, made by a hypernetwork from the vector of the task"""
    def __init__(self, net):
        super().__init__()
        vectors = torch.randn(HYP["num_tasks"], HYP["cond_emb_size"])
        self.task_embs = nn.Parameter(HYP["std_normal_temb"] * vectors)
        self.size, self.groups = net.size, hnet_groups(net, net.size, HYP["chmlp_chunk_size"])
        layout = HYP["hnet_type"] == "structured_hmlp" and structure(net, HYP["shmlp_gcd_chunking"])
        self.register_buffer("places", layout[1] if layout else None, persistent=False)
        self.params = nn.ParameterList(hnet_params(self.groups, HYP["cond_emb_size"]))
        self.register_buffer("offset", HYP["gain_offset"] * gains(net), persistent=False)
        with torch.no_grad():
            if HYP["hnet_init"] == "normal":
                for weight, bias in itertools.pairwise(self.params):  # after vectors of chunks comes no bias
                    bias.ndim == 1 and weight.normal_(std=0.02)
            elif HYP["hnet_init"] == "hyperfan":
                by_fan_in(net, [*self.params], spread(net))
    def forward(self, task):
        return self.batch([task])[0]
    def batch(self, tasks):
        """Weights [n, size] for n tasks"""
        params = [p[tasks] if p.ndim == 3 else p for p in self.params]
        outputs = generate(self.groups, params, self.task_embs[tasks])
        return (outputs[:, :self.size] if self.places is None else outputs[:, self.places]) + self.offset

def fresh_stats(net):
    """Batch-norm statistics [tasks, 2, channels of all norms]: means of 0, variances of 1"""
    return torch.tensor([0.0, 1.0])[:, None].repeat(HYP["num_tasks"], 1, sum(net.norms))

def stats_of(stats, task):
    """Those of a task [2, channels], which its training alone brings up to date"""
    return stats[task]

def budget(net):
    """Sizes for the result line: weights of the main network and of what is trained, their ratio, and the
    ratio when the batch-norm statistics of the tasks count, too"""
    with torch.device("meta"):
        size = sum(p.numel() for p in Model(net).parameters())
    stats = HYP["num_tasks"] * 2 * sum(net.norms)
    return dict(main_weights=net.size, hnet_weights=size, ratio=size / net.size,
                ratio_bn=(size + stats) / net.size)

def largest_chunk(net):
    """Largest chunk with which chunked_hmlp has no more weights than it makes, or 0"""
    arch = [HYP["cond_emb_size"] + numbers_of(HYP["chunk_emb_size"])[0], *numbers_of(HYP["hmlp_arch"])]
    for chunk in range(net.size // (arch[-1] + 1), 0, -1):  # the last layer alone takes as much
        group, = hnet_groups(net, net.size, chunk)
        sets = HYP["num_tasks"] if HYP["use_cond_chunk_embs"] else 1
        size = sum((a + 1) * b for a, b in itertools.pairwise([*arch, chunk]))
        size += HYP["num_tasks"] * HYP["cond_emb_size"]
        if size + sets * group.calls * group.emb <= net.size:
            return chunk
    return 0

def check_budget(net, sizes):
    """Exit 2 for a hypernetwork that cannot be, or that is larger than what it makes."""
    if sizes["ratio"] > 1 and not HYP["allow_over_budget"]:
        chunked = HYP["hnet_type"] == "chunked_hmlp"
        chunk, advice = chunked and largest_chunk(net), "no chunk size fits" if chunked else "it lacks chunks"
        advice = f"the largest --chmlp_chunk_size that fits is {chunk}" if chunk else advice
        fail(2, f"the hypernetwork has {sizes['hnet_weights']:,} weights to make {sizes['main_weights']:,}; "
                f"{advice}; --allow_over_budget lets it be")

def take_reference(net, model, task):
    """What the penalty holds on to during a task: the weights [task, size] of the earlier ones as they are
    now, or the hypernetwork that makes these"""
    if HYP["calc_hnet_reg_targets_online"]:
        return copy.deepcopy(model)
    with torch.no_grad():
        return model.batch(range(task))

def head_masks(net, device):
    """[tasks, head]: 1 at weights of the last layer that belong to a task"""
    rows = torch.eye(HYP["num_tasks"], device=device).repeat_interleave(HYP["num_classes_per_task"], 1)
    parts = [rows[:, :, None].expand(-1, -1, math.prod(shape[1:])) for shape in net.shapes[-net.last:]]
    return torch.cat([part.flatten(1) for part in parts], 1)

def regularizer(net, weights, reference, chosen):
    """Squared change of the weights [n, size] of the n chosen earlier tasks, its mean over these; of the last
    layer, which has rows for all tasks, the rows of the task count"""
    with torch.no_grad():
        targets = reference[chosen] if torch.is_tensor(reference) else reference.batch(chosen)
        masks = head_masks(net, weights.device)[chosen]
    body, head = (weights - targets).split([net.size - net.head, net.head], 1)
    return (body.square().sum() + (head.square() * masks).sum()) / len(chosen)

def objective(net, model, stats, task, inputs, labels, n_train, reference, chosen):
    """Loss of a batch of a task with n_train images, at the scale of a sum over these, and its terms [2]; the
    penalty is on the chosen ones of the earlier tasks"""
    *old, now = model.batch([*chosen, task]).split([len(chosen)] * (len(chosen) > 0) + [1])
    loss = F.cross_entropy(own_head(forward(net, now[0], stats_of(stats, task), inputs, True), task), labels)
    penalty = regularizer(net, old[0], reference, chosen) if old else torch.zeros_like(loss)
    return n_train * loss + HYP["beta"] * penalty, torch.stack([loss, penalty]).detach()

def draw_tasks(task, seed, step):
    """The earlier tasks that the penalty of a step is on"""
    order = torch.randperm(task, generator=rng("cpu", "tasks", seed, task, step))
    count = HYP["hnet_reg_batch_size"]
    return sorted(order[:count].tolist()) if 0 <= count < task else list(range(task))

def own_rows(task):
    """Where the classes of a task are among those of all tasks"""
    per_task = HYP["num_classes_per_task"]
    return slice(task * per_task, (task + 1) * per_task)

def own_head(logits, task):
    """The logits [..., classes] of a task out of those of all tasks"""
    return logits[..., own_rows(task)]

def forward_flops(net):
    """FLOPs of the main network for an image"""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        x, stats = prepare(torch.empty(1, 3, 32, 32)), torch.empty(2, sum(net.norms))
        forward(net, torch.empty(net.size), stats, x, False)
    return counter.get_total_flops()
#############################################
#                  Logging                  #
#############################################
TERMS = ("train_loss", "penalty")  # of the loss, means over the steps of a task
COLUMNS = ("run", "task", *TERMS, "val_acc", "test_during", "test_final",
           "inferred", "right_task", "seconds", "minutes_left")
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
    number = state["task"] * 10 ** 7 + state["step"]
    path, partial = folder / f"checkpoint-{number:010d}.pt", folder / f".checkpoint.{os.getpid()}"
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

def latest_checkpoint(folder, resume, own):
    """State of the file to resume, or of the newest whole checkpoint of the folder, or None; exit 3 or 2, the
    latter if its settings are others, or what is its own: {key: value}."""
    paths = [pathlib.Path(resume)] if resume else sorted(folder.glob("checkpoint-*.pt"), reverse=True)
    state = next(filter(None, map(read_checkpoint, paths)), None)
    state or not resume or fail(3, f"cannot resume from {resume}")
    free = "save_steps", "val_batch_size"
    differing = [key for key in HYP if state and key not in free and state["hyp"].get(key) != HYP[key]]
    differing += [key for key in own if state and state.get(key) != own[key]]
    differing and fail(2, f"{resume or folder} holds a checkpoint of another {', '.join(differing)}")
    return state
#############################################
#                Evaluation                 #
#############################################
def predict(net, flat, stats, images, task):
    """Probabilities [n, classes] of the classes of a task for images uint8 [n, 3, 32, 32]"""
    with torch.no_grad():
        parts = [own_head(forward(net, flat, stats, prepare(part), False), task).softmax(1)
                 for part in images.split(HYP["val_batch_size"])]
    return torch.cat(parts)

def accuracy(net, flat, stats, part, task):
    """Share of the (images, labels) of a task that get the right one of its classes"""
    images, labels = part
    return (predict(net, flat, stats, images, task).argmax(1) == labels).double().mean().item()

def infer_tasks(probs):
    """Probabilities [tasks, n, classes] for n images by the networks of all tasks -> the task of each [n]"""
    if HYP["infer"] == "ent":
        clamped = probs.clamp(min=1e-5)
        doubts = -(clamped * clamped.log()).sum(2)
    else:
        doubts = -probs.amax(2)
    k, n = HYP["infer_batch_size"], probs.shape[1]
    doubts = F.pad(doubts, [0, -n % k]).unflatten(1, (-1, k)).sum(2)
    return doubts.argmin(0).repeat_interleave(k)[:n]

def final_tests(net, model, stats, tasks, during):
    """Columns of the table for each task, on test images: accuracy with the weights and statistics that it
    had right after its training, with those after the last task, and with these when the task is inferred,
    too; the share of images for which it is inferred rightly"""
    rows = []
    for task, (data, then) in enumerate(zip(tasks, during)):
        images, labels = data["test"]
        probs = torch.stack([predict(net, model(other).detach(), stats_of(stats, other), images, other)
                             for other in range(len(tasks))])
        guess, right = infer_tasks(probs), probs.argmax(2) == labels
        rows.append(dict(test_during=accuracy(net, *then, data["test"], task),
                         test_final=right[task].double().mean().item(),
                         inferred=(right[task] & (guess == task)).double().mean().item(),
                         right_task=(guess == task).double().mean().item()))
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

def peak_flops(device):
    """FLOP/s of the fastest of ten large matmuls in the precision of the training; MFU is the share of it."""
    timer, n = Timer(), 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device)
    for trial in range(11):  # the first lap holds the set-up too
        a @ a
        timer.lap(trial)
    return 2 * n ** 3 / min(timer.values())

def peak_memory():
    """MiB on the GPU, or else of the process."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**20

def train(args, folder, net, tasks, run, seed, device):
    """One run, from fresh weights or a checkpoint to the test of all tasks. -> dict for the result line"""
    timer, stop, rows, during, seconds, flops = Timer(), [], [], [], [], {}
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    own = dict(seed=seed, script=SCRIPT.name, data=args.digest)
    torch.manual_seed(seed)
    model, stats = Model(net).to(device), fresh_stats(net).to(device)
    sums, state = torch.zeros(len(TERMS), device=device), latest_checkpoint(folder, args.resume, own)
    first_task, first_step, batch_size = 0, 0, HYP["batch_size"]
    if state:
        model.load_state_dict(state["model"])
        stats, sums = state["stats"].to(device), state["sums"].to(device)
        during = [tuple(x.to(device) for x in pair) for pair in state["during"]]
        first_task, first_step, rows, seconds = (state[key] for key in ("task", "step", "rows", "seconds"))
        flops = state["flops"]
        timer.update(state["timer"])
        print(f"continuing with task {first_task + 1} after {first_step} steps")
    for task in range(first_task, len(tasks)):
        images, labels = tasks[task]["train"]
        per_epoch = math.ceil(len(labels) / batch_size)
        steps = HYP["n_iter"] if HYP["epochs"] < 0 else round(HYP["epochs"] * per_epoch)
        optimizer, done, start = make_optimizer(model), 0, timer["train"]
        if state and first_step:
            optimizer.load_state_dict(state["optimizer"])
            start, done = timer["train"] - state["spent"], first_step
            model.load_state_dict(state["previous"])
        previous = {name: p.clone() for name, p in model.state_dict().items()}
        reference = take_reference(net, model, task)
        if done:
            model.load_state_dict(state["model"])
        def row(**more):
            loss = (sums / max(done, 1)).tolist()
            math.isfinite(sum(loss)) or fail(
                1, f"the loss is {sum(loss)} in run {run}, task {task + 1}, by step {done}")
            return dict(task=task + 1, **dict(zip(TERMS, loss)), **more)
        def save(task, step):
            timer.lap("train")
            save_checkpoint(folder, dict(
                model=model.state_dict(), optimizer=optimizer.state_dict() if step else {}, stats=stats,
                task=task, step=step, rows=rows, sums=sums, during=during, previous=previous,
                seconds=seconds, flops=flops,
                spent=timer["train"] - start, timer=dict(timer), hyp=HYP, **own))
            timer.lap("save")
        timer.lap("reset")
        for step, index, numbers in plan(len(labels), seed, task, done, steps, device):
            inputs = images[index]
            inputs = prepare(inputs if HYP["disable_data_augmentation"] else augment(inputs, numbers))
            counter = contextlib.nullcontext() if task in flops else FlopCounterMode(display=False)
            with counter:
                batch = inputs, labels[index], len(labels)
                chosen = draw_tasks(task, seed, step)
                loss, terms = objective(net, model, stats, task, *batch, reference, chosen)
                loss.backward()
            if task not in flops:
                flops[task] = counter.get_total_flops() * steps
            if HYP["clip_grad_norm"] > 0:
                nn.utils.clip_grad_norm_(model.parameters(), HYP["clip_grad_norm"])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, per_epoch)
            optimizer.step()
            optimizer.zero_grad()
            sums += terms
            done = step + 1
            if time.perf_counter() - timer.last > 60:
                spent = timer.lap("train") - start
                left = spent * (steps * (len(tasks) - task) / done - 1)
                print_training_details(COLUMNS, row(run=run, seconds=spent, minutes_left=left / 60))
            if stop or done % HYP["save_steps"] == 0:
                save(task, done)
            stop and fail(143, f"stopped after {done} of {steps} steps of task {task + 1}; the same command "
                               "continues")
        seconds.append(timer.lap("train") - start)
        during.append((model(task).detach().clone(), stats_of(stats, task).clone()))
        rows.append(row())
        if HYP["val_set_size"]:
            rows[-1]["val_acc"] = accuracy(net, *during[-1], tasks[task]["val"], task)
        left = (len(tasks) - task - 1) * seconds[-1] / 60
        print_training_details(COLUMNS, dict(rows[-1], run=run, seconds=seconds[-1], minutes_left=left))
        timer.lap("eval")
        sums = torch.zeros_like(sums)
        save(task + 1, 0)
        first_step = 0
    for row, more in zip(rows, final_tests(net, model, stats, tasks, during)):
        row.update(more)
    names = [name for name in COLUMNS if name in rows[0] and name != "task"]
    mean = {name: float(np.mean([row[name] for row in rows])) for name in names}
    for row in (*rows, dict(mean, task="mean", seconds=timer["train"])):
        print_training_details(COLUMNS, dict(row, run=run))
    timer.lap("eval")
    stop and fail(143, f"stopped after run {run}; the same command continues")
    return dict(acc=mean["test_final"], time_seconds=timer["train"], seed=seed, parts=timer, epochs=rows,
                mean=mean, forgetting=mean["test_during"] - mean["test_final"], task_seconds=seconds,
                flops=sum(flops.values()))

def main(args):
    """All runs of the script: data, training, and the result as text and as a JSON line."""
    sys.stdout.reconfigure(line_buffering=True)
    args.runs > 0 <= args.seed < 2 ** 63 or fail(2, "--runs starts at 1 and --seed at 0, to end by 2^63")
    HYP.update({name: value for name, value in vars(args).items() if name in HYP})
    args.dry_run and HYP.update(batch_size=8, epochs=-1.0, n_iter=2, val_set_size=2)
    for name in ("num_tasks", "batch_size", "n_iter", "lr", "val_batch_size", "save_steps",
                 "cond_emb_size"):
        HYP[name] > 0 or fail(2, f"--{name} must be above 0")
    0 in numbers_of(HYP["hmlp_arch"].replace(";", ",")) and fail(2, "layers of --hmlp_arch must be above 0")
    math.isfinite(HYP["epochs"]) or fail(2, "--epochs must be finite")
    per_task, last = HYP["num_classes_per_task"], HYP["skip_tasks"] + HYP["num_tasks"]
    per_task in (1, 2, 5, 10) or fail(2, "--num_classes_per_task is 1, 2, 5 or 10")
    min(HYP["skip_tasks"], HYP["train_images"], HYP["val_set_size"]) >= 0 or fail(
        2, "--skip_tasks, --train_images and --val_set_size start at 0")
    HYP["hnet_net_act"] in ("relu", "sigmoid", "tanh") or fail(2, "--hnet_net_act is relu, sigmoid or tanh")
    last * per_task <= 110 or fail(2, f"both CIFARs have 110 classes, fewer than {last} tasks of {per_task}")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    args.device == "cuda" != found and fail(4, "no usable CUDA GPU; --device cpu needs none")
    timer, device, net = Timer(), torch.device(args.device or found), main_net()
    out = pathlib.Path(args.out or SCRIPT.parent / "results" / f"{SCRIPT.stem}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # better to learn of a wrong --out now
    HYP["hnet_type"] in ("hmlp", "chunked_hmlp", "structured_hmlp") or fail(
        2, "--hnet_type is hmlp, chunked_hmlp or structured_hmlp")
    structured = HYP["hnet_type"] == "structured_hmlp"
    HYP["hnet_init"] in ("xavier", "normal", "hyperfan"[:8 * (not structured)]) or fail(
        2, "--hnet_init is xavier, normal or, but for structured_hmlp, hyperfan")
    structured and HYP["use_cond_chunk_embs"] and fail(2, "--use_cond_chunk_embs is for chunked_hmlp")
    HYP["infer"] in ("ent", "conf") and HYP["infer_batch_size"] > 0 or fail(
        2, "--infer is ent or conf, and --infer_batch_size above 0")
    HYP["chmlp_chunk_size"] > 0 or fail(2, "--chmlp_chunk_size must be above 0")
    embs = numbers_of(HYP["chunk_emb_size"])
    HYP["hnet_type"] != "chunked_hmlp" or len(embs) == 1 and embs[0] > 0 or fail(
        2, "--chunk_emb_size is a number above 0: chunks without vectors would all be the same")
    sizes = budget(net)
    check_budget(net, sizes)
    timer.lap("import")
    sets, name = load_sets(args.data)
    name != "synthetic" or args.target is None or fail(1, "--target says nothing about synthetic data")
    args.digest = hashlib.sha256(b"".join(x.numpy().tobytes() for parts in sets.values() for part in parts
                                          for x in part)).hexdigest()
    tasks = split(sets, device)
    timer.lap("load")
    peak, env = peak_flops(device), environment(device)
    env["dtype"] = "tf32" if device.type == "cuda" else "float32"
    env["gpu"] and torch.cuda.reset_peak_memory_stats()
    HYP["iresnet_use_fc_bias"] and print("--iresnet_use_fc_bias changes nothing: the published counts are "
                                         "those of a last layer without bias")
    print(f"{len(tasks)} tasks, {len(tasks[0]['train'][1])} images in the first")
    print("main network: {main_weights:,} weights; trained: {hnet_weights:,}, ratio {ratio:.4f}, with "
          "batch-norm statistics {ratio_bn:.4f}".format(**sizes))
    env["gpu"] or print(f"No GPU, {env['cpu_threads']} CPU threads; the first row shows how long it takes")
    own = json.dumps([SHA256, HYP, args.digest, env["gpu"], env["cpu"], args.no_compile])
    key = hashlib.sha256(own.encode()).hexdigest()[:8]
    place = tempfile.mkdtemp() if args.dry_run else SCRIPT.parent / "runs" / f"{SCRIPT.stem}-{key}"
    print_columns(COLUMNS, f"{SCRIPT.stem} on {name} data")
    runs = []
    for seed in range(args.seed, args.seed + args.runs):
        folder = pathlib.Path(args.output_dir or place) / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        runs.append(train(args, folder, net, tasks, len(runs), seed, device))
        print(f"forgetting: {runs[-1]['forgetting']:.4f}; checkpoints: {os.path.relpath(folder)}")
    target = args.target or 0
    acc_mean, acc_std, acc_ci95, p_value = statistics([run["acc"] for run in runs], target)
    time_mean, time_std, *_ = statistics([run["time_seconds"] for run in runs], 0)
    flops, per_image = np.mean([run["flops"] for run in runs]), 3 * forward_flops(net)
    images = sum(HYP["batch_size"] * (HYP["n_iter"] if HYP["epochs"] < 0 else round(
        HYP["epochs"] * math.ceil(len(task["train"][1]) / HYP["batch_size"]))) for task in tasks)
    finish(dict(
        script=SCRIPT.name, data=name, n=len(runs), acc_mean=acc_mean, acc_std=acc_std, acc_ci95=acc_ci95,
        target=target, p_value=p_value, time_mean=time_mean, time_std=time_std, load_seconds=timer["load"],
        compile_seconds=sum(run["parts"]["compile"] for run in runs),
        diag_seconds=sum(run["parts"]["eval"] + run["parts"]["save"] for run in runs),
        wall_seconds=time.perf_counter() - START, cpu_seconds=time.process_time(), peak_mib=peak_memory(),
        timed="augmentation, training", untimed="load, evaluation, checkpoints", **sizes,
        mfu=flops / peak / time_mean, pflops_nominal=per_image * images / 1e15, pflops=flops / 1e15,
        peak_tflops=peak / 1e12, dry_run=args.dry_run, compiled=False, device=device.type, **env,
        sha256=SHA256, data_sha256=args.digest, argv=sys.argv[1:], hyp=HYP, runs=runs,
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
