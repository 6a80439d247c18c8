"""main4_cosine.py -- connectors from a frozen text encoder into the spaces of frozen image encoders.

Adds: the learning rate rises for 500 steps, then falls to 0 by half a cosine
Changes: HYP
Result: 29.74 ± 0.18 % (n=3), 4.2 ± 0.0 min, AMD EPYC, 1 threads, float32, torch 2.11.0
Vs previous: not measured
Source: the schedule of HYMA (arXiv 2507.10015); written afresh.
Run: python hypernet/main4_cosine.py

The accuracy of a run is the mean over encoders and test sets of zero-shot classification. FLOPs are those of
matmuls by formula: pflops as they run, pflops_nominal as the published numbers count them (logits twice).
"""
CODE = open(__file__, encoding="utf-8").read()
#############################################
#                   Setup                   #
#############################################
import argparse, collections, contextlib, hashlib, importlib.metadata, itertools, json, math, os, pathlib
import platform, re, resource, subprocess, sys, tempfile, time

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
    batch_size=512,         # pairs of a step
    shrink=0,               # 1: with fewer than 595,375 pairs a batch is smaller in proportion; 0: it is not
    steps=1163,             # once all of these pairs; the widths take turns, so an encoder sees a third
    shuffle=0,              # 1: the pairs in a new order in each pass; 0: in the order of the file
    lr=1e-2,                # of AdamW
    weight_decay=0.0,       # of AdamW
    warmup_steps=500,       # with a learning rate that rises linearly from lr / warmup_steps
    cosine=1,               # 1: then half a cosine to 0 follows; 0: a constant
    logit_scale=100.0,      # of the cosines in the loss
    encoders="",            # to be connected, names with commas between them; none: all but the held-out ones
    retrieval=5000,         # test images and captions that retrieval looks through
    code_width=32,          # of the vectors of an encoder and of its width, whose sum is decoded
    hidden=(128, 512),      # sizes of the layers of both heads before the last one
    spare=1.5,              # of the rows that a head predicts, per row that the widest encoder takes
)
FULL = 595375  # pairs of LLaVA-CC3M-Pretrain-595K, for which the recipes were made

def flag_parser():
    """Flags of the measurement, and one for each hyperparameter of a single value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: fail(2, f"{message} (--help lists the flags)")
    parser.add_argument("--data", metavar="DIR", help="pairs by embed.py or 'synthetic' (default: data)")
    parser.add_argument("--runs", metavar="N", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of run 0 (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    parser.add_argument("--out", metavar="FILE", help="for the JSON line (default: results/ by the script)")
    parser.add_argument("--target", metavar="A", type=float, help="exit 1 if the mean accuracy is below A")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile in scripts that use it")
    parser.add_argument("--dry-run", action="store_true", help="a step of 8 pairs for each width")
    parser.add_argument("--mmap", action="store_true", help="read pairs from disk step by step, not at once")
    parser.add_argument("--connectors", metavar="FILE", help="for {encoder: (weight, bias)} (default: runs/)")
    for name, value, text in re.findall(r"^    (\w+)=(.*?),\s+# (.*)$", CODE, re.M):
        if isinstance(value := HYP[name], (int, float, str)):
            parser.add_argument(f"--{name}", type=type(value), default=value, metavar=name[0].upper(),
                                help=f"{text} (default: {value or 'none'})")
    return parser

if __name__ == "__main__":
    ARGS = flag_parser().parse_args()  # before torch is imported: --help is instant
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
torch.set_float32_matmul_precision("high")  # TF32 on a GPU
#############################################
#                 Optimizer                 #
#############################################
def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=HYP["lr"], weight_decay=HYP["weight_decay"])

def schedule(step):
    """Factor of the learning rate at a 0-based step."""
    if step < HYP["warmup_steps"]:
        return (step + 1) / HYP["warmup_steps"]
    share = (step - HYP["warmup_steps"]) / max(HYP["steps"] - HYP["warmup_steps"], 1)
    return (1 + math.cos(math.pi * share)) / 2 if HYP["cosine"] else 1.0
#############################################
#                   Data                    #
#############################################
DTYPE = dict(cuda=torch.float32, cpu=torch.float32)  # of weights and matmuls
PARTS = "train_image", "train_text", "test_image", "test_text", "test_labels", "prompts"  # .npy

class Pairs:
    """Features of N image-caption pairs, rows of unit length, and M more that test them.
    arrays: train_image [N, sum of widths], train_text [N, T], test_image [M, ...], test_text [M, T],
    test_labels int64 [M], prompts [classes of all sets, T]; encoders: [dict(name, width, held_out)] in the
    order of the columns; sets: [dict(name, rows (first, end) of the test part, prompts (first, end))]."""
    def __init__(self, name, arrays, encoders, sets, digest):
        self.name, self.sets, self.digest = name, sets, digest
        self.text, self.test_text, self.labels, self.prompts = (
            torch.from_numpy(arrays[part]) for part in ("train_text", "test_text", "test_labels", "prompts"))
        widths = [encoder["width"] for encoder in encoders]
        parts = (torch.from_numpy(arrays[part]).split(widths, 1) for part in ("train_image", "test_image"))
        self.images, self.test_images = ({e["name"]: x for e, x in zip(encoders, part)} for part in parts)
        self.held_out = [e["name"] for e in encoders if e["held_out"]]
        wanted = HYP["encoders"].split(",") if HYP["encoders"] else [
            e["name"] for e in encoders if not e["held_out"]]
        unknown = set(wanted) - set(self.images)
        unknown and fail(2, f"no encoder {', '.join(sorted(unknown))}; there are {', '.join(self.images)}")
        self.widths = {e["name"]: e["width"] for e in encoders if e["name"] in wanted}
    def families(self):
        """[(width, [encoder])] of the encoders to be connected, narrow ones first"""
        by_width = collections.defaultdict(list)
        for name, width in self.widths.items():
            by_width[width].append(name)
        return sorted(by_width.items())
    def batch(self, rows, names, device):
        """(text [B, T], images [encoders, B, width]) of rows [B] of encoders of one width, in fp32"""
        images = torch.stack([self.images[name][rows] for name in names])
        return self.text[rows].to(device).float(), images.to(device).float()

def draw_pairs(n, seed):
    """Built-in stand-in: ten classes, three widths, each encoder with its noise. -> arrays, encoders"""
    rng, normal = np.random.default_rng(seed), lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    classes, m, labels = rng.normal(size=(10, 16)), n // 5, np.arange(n // 5 + n) % 10
    latent = np.concatenate([classes, classes[labels] + 0.7 * rng.normal(size=(n + m, 16))])
    def view(width, noise):
        x = latent @ rng.normal(size=(16, width)) / 4
        return normal(x + noise * rng.normal(size=x.shape)).astype(np.float16)
    encoders = [dict(name=f"drawn{i}-{width}", width=width, held_out=i == 2) for width in (24, 48, 64)
                for i in range(3)]
    text = view(48, 0.3)
    images = np.concatenate([view(e["width"], (0.3, 1.0, 0.5)[i % 3]) for i, e in enumerate(encoders)], 1)
    return dict(train_image=images[10 + m:], train_text=text[10 + m:], test_image=images[10:10 + m],
                test_text=text[10:10 + m], test_labels=labels[:m], prompts=text[:10]), encoders

def free_memory():
    """Bytes of memory that can be had."""
    text = pathlib.Path("/proc/meminfo").read_text() if sys.platform == "linux" else ""
    found = re.search(r"MemAvailable: +(\d+) kB", text)
    return int(found[1]) * 1024 if found else 1 << 60

def read_part(path, digest, mmap):
    """An array of a folder of pairs, and the sha256 of its file, which must be the one given, if one is. Exit
    3 where it is missing or damaged, 1 where memory is too small."""
    with contextlib.suppress(Exception):  # whatever damage leads to, the sentence below is the answer
        array = np.load(path, mmap_mode="c")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        assert found == digest or not digest
        need, free = array.nbytes, free_memory()
        mmap or need < free or fail(1, f"{path.name} takes {need >> 20} MiB of memory and {free >> 20} are "
                                       "free; --mmap reads it from disk step by step")
        for first in range(0, len(array), 10000):
            bad = ~np.isfinite(array[first:first + 10000])
            bad.any() and fail(3, f"{path}: row {first + int(bad.nonzero()[0][0])} holds NaN or infinity")
        return array if mmap else np.array(array), found
    fail(3, f"{path} is missing or damaged; delete its folder and run embed.py again")

def load_pairs(folder, mmap):
    """Pairs of a folder that embed.py wrote, of its subfolder emb, or 'synthetic'; exit 3 for a bad one."""
    root = pathlib.Path(folder or "data")
    place = next((path for path in (root, root / "emb") if (path / "meta.json").exists()), None)
    if folder == "synthetic" or not place and not folder:
        folder or print("NOTICE: data/emb holds no pairs; python hypernet/embed.py makes them.\n"
                        "NOTICE: Training on built-in synthetic pairs instead, to show that all works.")
        sets = [dict(name="drawn", rows=(0, 400), prompts=(0, 10))]
        return Pairs("synthetic", *draw_pairs(2000, seed=1), sets, "synthetic")
    place or fail(3, f"no meta.json in {folder}; python hypernet/embed.py --data {folder} makes the pairs")
    try:
        meta = json.loads((place / "meta.json").read_text())
        encoders, sets, sums, width = (meta[key] for key in ("encoders", "sets", "sha256", "text_width"))
        widths = sum(encoder["width"] + 0 * encoder["held_out"] for encoder in encoders)
        [(*s["rows"], *s["prompts"], s["name"]) for s in sets]
        sums = {part: sums[part] if sums else None for part in PARTS}
        if len({encoder["name"] for encoder in encoders}) < len(encoders):
            raise ValueError("two encoders of one name")
    except (KeyError, TypeError, ValueError) as error:
        fail(3, f"{place / 'meta.json'} is damaged ({type(error).__name__}: {error})")
    arrays = {}
    for part in PARTS:
        arrays[part], sums[part] = read_part(place / f"{part}.npy", sums[part], mmap)
    for part, array in arrays.items():
        wanted = widths if "image" in part else width
        found = array.shape[1] if array.ndim == 2 else wanted
        found == wanted or fail(3, f"{part}.npy is {found} wide, by meta.json {wanted}")
    for a, b in (("train_image", "train_text"), ("test_image", "test_text"), ("test_image", "test_labels")):
        rows = len(arrays[a]), len(arrays[b])
        rows[0] == rows[1] or fail(3, f"{a}.npy has {rows[0]} rows and {b}.npy {rows[1]}: these are no pairs")
    digest = hashlib.sha256(json.dumps([meta["encoders"], sums]).encode()).hexdigest()
    return Pairs(meta.get("data", "other"), arrays, encoders, sets, digest)

def batch_sizes(n):
    """Pairs in each step of a run over n of them, pass after pass, the last batch of a pass smaller."""
    batch = HYP["batch_size"] * (min(1, n / FULL) if HYP["shrink"] else 1)
    batch = min(max(round(batch), 1), n)
    sizes = [min(batch, n - first) for first in range(0, n, batch)]
    return list(itertools.islice(itertools.cycle(sizes), HYP["steps"]))

def batches(n, seed):
    """Rows of each step."""
    first, generator = n, torch.Generator().manual_seed(seed)
    for size in batch_sizes(n):
        if first == n:
            first, order = 0, torch.randperm(n, generator=generator) if HYP["shuffle"] else torch.arange(n)
        yield order[first:first + size]
        first += size
#############################################
#                   Model                   #
#############################################
def jobs(pairs):
    """What is trained apart from each other, as lists of families (width, [encoder]): here, nothing."""
    return [pairs.families()]

class Connectors(nn.Module):
    """Hypernetwork that predicts linear maps from text into the spaces of image encoders: weight
    [n, width, T], bias [n, width] of a family of n encoders of one width. What its two heads predict is
    divided by the root of the number of weights, and of biases; of a matrix for the widest encoder, a narrow
    one takes the first rows."""
    def __init__(self, families, text_width):
        super().__init__()
        self.families, self.text_width = families, text_width
        self.firsts = list(itertools.accumulate((len(names) for _, names in families), initial=0))
        self.encoder_code = nn.Embedding(self.firsts[-1], HYP["code_width"])
        self.width_code = nn.Embedding(len(families), HYP["code_width"])
        rows = round(HYP["spare"] * families[-1][0])
        self.heads = nn.ModuleList()
        for out in (rows * text_width, rows):
            sizes = HYP["code_width"], *HYP["hidden"], out
            layers = [layer for io in itertools.pairwise(sizes) for layer in (nn.Linear(*io), nn.GELU())]
            self.heads.append(nn.Sequential(*layers[:-1]))
    def forward(self, family):
        width, first, end = self.families[family][0], self.firsts[family], self.firsts[family + 1]
        codes = self.encoder_code.weight[first:end] + self.width_code.weight[family]
        weight, bias = (head(codes) for head in self.heads)
        weight = weight.view(len(codes), -1, self.text_width)[:, :width]
        return weight * (width * self.text_width) ** -0.5, bias[:, :width] * width ** -0.5

def connect(text, weight, bias):
    """Text [B, T] in the spaces of n image encoders, rows of unit length: [n, B, width]"""
    mapped = torch.baddbmm(bias[:, None], text.expand(len(weight), -1, -1), weight.transpose(1, 2))
    return F.normalize(mapped, dim=2)

def info_nce(mapped, images):
    """Loss [n] of texts mapped to images, both [n, B, width]: cross-entropy of the right text of each image
    and of the right image of each text, halved (arXiv 2103.00020)."""
    logits = HYP["logit_scale"] * images @ mapped.transpose(1, 2)
    right = logits.diagonal(dim1=1, dim2=2)
    return ((logits.logsumexp(1) + logits.logsumexp(2)) / 2 - right).mean(1)

def step_flops(n, batch, width, text_width, k, macs):
    """FLOPs of a step of n encoders: decoding with that many multiply-adds, forward and twice backward,
    mapping, and logits with k / 2 matmuls forward and as many backward."""
    return 2 * n * (3 * macs + 2 * text_width * width * batch + k * batch ** 2 * width)

def decoder_macs(width, text_width):
    """Multiply-adds of both heads for one encoder, where the widest one has that width"""
    sizes, rows = (HYP["code_width"], *HYP["hidden"]), round(HYP["spare"] * width)
    return 2 * sum(a * b for a, b in itertools.pairwise(sizes)) + sizes[-1] * rows * (text_width + 1)

def count_flops(pairs, k):
    """{encoder: FLOPs of its share of a run}"""
    flops, sizes, text_width = collections.Counter(), batch_sizes(len(pairs.text)), pairs.text.shape[1]
    macs = decoder_macs(max(pairs.widths.values()), text_width)
    for job in jobs(pairs):
        for step, size in enumerate(sizes):
            width, names = job[step % len(job)]
            for name in names:
                flops[name] += step_flops(1, size, width, text_width, k, macs)
    return flops
#############################################
#                  Logging                  #
#############################################
CPUINFO = pathlib.Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""

def columns(pairs):
    """Of the table: accuracy on each test set, retrieval of captions, cost of training."""
    longest = max(map(len, pairs.widths))
    return ("run", "encoder".ljust(longest), "width", *(s["name"] for s in pairs.sets), "R@1", "R@5", "R@10",
            "train_loss", "steps", "seconds", "TFLOPs", "nominal")

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
def evaluate(connector, pairs, name):
    """{test set: zero-shot accuracy, 'R@k': share of images whose own caption is among the k nearest ones}
    of an encoder with a connector (weight [width, T], bias [width])."""
    device, row = connector[0].device, {}
    mapped = lambda text: connect(text.to(device).float(), *(p[None] for p in connector))[0]
    images, text = pairs.test_images[name].to(device).float(), pairs.test_text
    for s in pairs.sets:
        (first, end), labels = s["rows"], pairs.labels.to(device)
        logits = images[first:end] @ mapped(pairs.prompts[s["prompts"][0]:s["prompts"][1]]).T
        row[s["name"]] = (logits.argmax(1) == labels[first:end]).double().mean().item()
    rows = torch.linspace(0, len(text) - 1, min(HYP["retrieval"], len(text))).round().long()
    cosines = images[rows.to(device)] @ mapped(text[rows]).T
    before = (cosines > cosines.diagonal()[:, None] + 1e-6).sum(1)  # the same caption may come again
    return dict(row, **{f"R@{k}": (before < k).double().mean().item() for k in (1, 5, 10)})
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
        return self["train"] + self["eval"]

def peak_flops(device):
    """FLOP/s of the fastest of ten large matmuls in the precision of the training; MFU is the share of it."""
    timer, n = Timer(), 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device)
    for trial in range(11):  # the first lap holds the set-up too
        a @ a
        timer.lap(trial)
    return 2 * n ** 3 / min(timer.values())

def fit(families, pairs, seed, device):
    """Train connectors, one family a step, by turns.
    -> {encoder: (weight, bias)}, {encoder: (last loss, steps)}"""
    model = Connectors(families, pairs.text.shape[1]).to(device)
    optimizer, losses, steps = make_optimizer(model), {}, collections.Counter()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step, rows in enumerate(batches(len(pairs.text), seed)):
        family = step % len(families)
        text, images = pairs.batch(rows, families[family][1], device)
        losses[family] = info_nce(connect(text, *model(family)), images)
        losses[family].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        steps[family] += 1
    connectors, last = {}, {}
    for family, (_, names) in enumerate(families):
        with torch.no_grad():
            connectors.update(zip(names, zip(*model(family))))
        last.update((name, (loss, steps[family])) for name, loss in zip(names, losses[family].tolist()))
    return connectors, last

def train(pairs, run, seed, device, names):
    """One run, from fresh weights to the evaluation. -> dict for the result line, connectors"""
    timer, rows, connectors, last = Timer(), [], {}, {}
    executed, nominal = count_flops(pairs, 2), count_flops(pairs, 4)
    torch.manual_seed(seed)
    timer.lap("before")
    for job in jobs(pairs):
        more, losses = fit(job, pairs, seed, device)
        connectors.update(more), last.update(losses)
    timer.lap("train")
    for name, width in pairs.widths.items():
        loss, steps = last[name]
        math.isfinite(loss) or fail(1, f"the loss of {name} is {loss} in run {run}")
        rows.append(dict(
            encoder=name, width=width, **evaluate(connectors[name], pairs, name), train_loss=loss,
            steps=steps, TFLOPs=executed[name] / 1e12, nominal=nominal[name] / 1e12))
    time_seconds = timer.lap("eval")
    mean = {key: float(np.mean([row[key] for row in rows])) for key in list(rows[0])[2:]}
    mean.update(encoder="mean", steps=round(mean["steps"]), seconds=time_seconds)
    for row in (*rows, mean):
        print_training_details(names, {name: dict(row, run=run).get(name.strip(), "") for name in names})
    acc = float(np.mean([mean[s["name"]] for s in pairs.sets]))
    return dict(acc=acc, time_seconds=time_seconds, seed=seed, parts=timer, epochs=rows), connectors

def save_connectors(connectors, path):
    """{encoder: (weight [width, T], bias [width])} in fp32 for torch.load: all of the file or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: tuple(p.cpu().clone() for p in pair) for name, pair in connectors.items()}, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save has both for a full disk
        partial.unlink(missing_ok=True)
        fail(1, f"cannot write {path} ({' '.join(str(error).split()[:12])})")

def main(args):
    """All runs of the script: data, training, and the result as text and as a JSON line."""
    sys.stdout.reconfigure(line_buffering=True)
    args.runs > 0 <= args.seed < 2 ** 63 or fail(2, "--runs starts at 1 and --seed at 0, to end by 2^63")
    HYP.update({name: value for name, value in vars(args).items() if name in HYP})
    for name in ("batch_size", "steps", "retrieval", "logit_scale"):
        HYP[name] > 0 or fail(2, f"--{name} must be above 0")
    HYP["spare"] >= 1 or fail(2, "--spare must be 1 or more: the widest encoder takes that many rows")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    args.device == "cuda" != found and fail(4, "no usable CUDA GPU; --device cpu needs none")
    timer, device = Timer(), torch.device(args.device or found)
    out = pathlib.Path(args.out or SCRIPT.parent / "results" / f"{SCRIPT.stem}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()  # better to learn of a wrong --out now
    timer.lap("import")
    pairs = load_pairs(args.data, args.mmap)
    turn = max(map(len, jobs(pairs)))  # steps until each width has had one
    args.dry_run and HYP.update(batch_size=8, shrink=0, steps=turn)
    turn <= HYP["steps"] or fail(2, f"--steps must be at least {turn}, one for each width")
    timer.lap("load")
    pairs.name != "synthetic" or args.target is None or fail(1, "--target says nothing about synthetic data")
    peak, env = peak_flops(device), environment(device)
    env["dtype"] = "tf32" if device.type == "cuda" else "float32"
    env["gpu"] and torch.cuda.reset_peak_memory_stats()
    executed, nominal = (sum(count_flops(pairs, k).values()) for k in (2, 4))
    n_train = len(pairs.text)
    print(f"{n_train} pairs, {len(pairs.widths)} encoders, {batch_sizes(n_train)[0]} pairs a step")
    env["gpu"] or print(f"No GPU, {env['cpu_threads']} CPU threads: ~{executed / peak / 20:.0f} min a run")
    series = json.dumps([SHA256, HYP, args.seed, pairs.digest, env["gpu"], env["cpu"], args.no_compile])
    partial = out.with_name(f"{out.name}.{hashlib.sha256(series.encode()).hexdigest()[:8]}.partial")
    runs = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    runs and print(f"continuing after {len(runs)} of {args.runs} runs")
    names = columns(pairs)
    print_columns(names, f"{SCRIPT.stem} on {pairs.name} data")
    timer.lap("prepare")
    for run in range(len(runs), args.runs):
        result, connectors = train(pairs, run, args.seed + run, device, names)
        place = tempfile.mkdtemp() if args.dry_run else SCRIPT.parent / "runs"
        path = pathlib.Path(args.connectors or f"{place}/{SCRIPT.stem}-seed{args.seed + run}.pt")
        save_connectors(connectors, path)
        runs.append(result)
        append_line(partial, result)
        print(f"connectors: {os.path.relpath(path)}")
    target = args.target or 0
    acc_mean, acc_std, acc_ci95, p_value = statistics([run["acc"] for run in runs], target)
    time_mean, time_std, *_ = statistics([run["time_seconds"] for run in runs], 0)
    memory = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    finish(dict(
        script=SCRIPT.name, data=pairs.name, n=len(runs), acc_mean=acc_mean, acc_std=acc_std,
        acc_ci95=acc_ci95, target=target, p_value=p_value, time_mean=time_mean, time_std=time_std,
        load_seconds=timer["load"], compile_seconds=timer["compile"], diag_seconds=0,
        wall_seconds=time.perf_counter() - START,
        cpu_seconds=time.process_time(), peak_mib=memory / 2**20, timed="reset, training, evaluation",
        untimed="load, compile", pairs=n_train, text_width=pairs.text.shape[1], widths=pairs.widths,
        pflops_nominal=nominal / 1e15, pflops=executed / 1e15, peak_tflops=peak / 1e12,
        mfu=executed / peak / time_mean, dry_run=args.dry_run, compiled=False, device=device.type, **env,
        sha256=SHA256, data_sha256=pairs.digest, argv=sys.argv[1:], hyp=HYP, runs=runs,
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
        fail(130, "interrupted; finished runs are kept, the same command continues")
    except OSError as error:
        fail(2, error)
    except Exception as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate mem" not in str(error):
            raise
        pages = [os.sysconf(f"SC_{kind}PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") for kind in ("AV", "")]
        mib = [n >> 20 for n in (torch.cuda.mem_get_info() if torch.cuda.is_initialized() else pages)]
        fail(1, f"out of memory at batch size {HYP['batch_size']}, with {mib[0]} of {mib[1]} MiB free")
