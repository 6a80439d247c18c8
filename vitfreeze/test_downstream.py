"""Checks of fine-tuning, linear probe and k-NN, each part against a slow, published or independent form."""
import contextlib, json, math, os, pathlib, re, signal, socket, subprocess, sys, types

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from test_smoke import ENV, blocks, call, load, scripts, write_cifar  # before torch: kernels are interpreted

import pytest
import torch
import torch.nn.functional as F
from torchvision.io import write_jpeg
from torchvision.transforms.v2 import functional as vision

CPU = torch.device("cpu")
MAINS = [path for _, path in scripts("vitfreeze") if path.name.startswith("main")]
PATHS = {name: HERE / f"{name}.py" for name in ("finetune", "linprobe", "knn")}
BASE, TUNE, PROBE, KNN = (load(path) for path in (MAINS[0], *PATHS.values()))

@contextlib.contextmanager
def settings(module, **values):
    """Hyperparameters for a while, in fp32."""
    before, cpuinfo = dict(module.HYP), module.CPUINFO
    module.HYP.update(values)
    module.CPUINFO = ""
    try:
        yield
    finally:
        module.HYP.clear(), module.HYP.update(before)
        module.CPUINFO = cpuinfo

def run(module, *flags):
    """Run a script in this process, in fp32."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with settings(module):
            module.main(module.flag_parser().parse_args(["--device=cpu", *map(str, flags)]))
    finally:
        signal.signal(signal.SIGTERM, handler)

def photos(n, seed=5):
    """uint8 [n, 3, 32, 32]"""
    return BASE.draw_synthetic(n, seed)["images"].permute(0, 3, 1, 2).contiguous()

def clusters(n, spread, seed=0):
    """Features [n, 24] around the ten first unit vectors, and labels."""
    labels = torch.arange(n) % 10
    generator = torch.Generator().manual_seed(seed)
    return F.one_hot(labels, 24) + spread * torch.randn(n, 24, generator=generator), labels

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("data"))

@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    """Checkpoint of a run of main0."""
    folder = tmp_path_factory.mktemp("main0")
    run(BASE, "--dry-run", "--data", data, "--out", folder / "o", "--output_dir", folder)
    return next(folder.glob("seed0/checkpoint-*.pt"))

# ---------------------------------------------------------------------- k-NN
def test_knn_of_clusters_and_of_shuffled_labels():
    x, labels = clusters(1000, 0.05)
    y, wanted = clusters(400, 0.05, seed=1)
    assert set(KNN.knn(x, labels, y, wanted).values()) == {(1.0, 1.0)}
    shuffled = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    for top1, top5 in KNN.knn(x, shuffled, y, wanted).values():
        assert 0.02 < top1 < 0.25 and 0.3 < top5 < 0.7
    assert KNN.leave_one_out(x, labels) < 0.01 and KNN.leave_one_out(x, shuffled) > 1.5

def slow_knn(x, labels, y, wanted, k):
    """(top-1, top-5) image by image and vote by vote"""
    top1 = top5 = 0
    for query, label in zip(y, wanted.tolist()):
        cosine = [float(F.cosine_similarity(query, other, dim=0)) for other in x]
        votes = [0.0] * 10
        for i in sorted(range(len(x)), key=lambda i: -cosine[i])[:k]:
            votes[int(labels[i])] += math.exp(cosine[i] / 0.07)
        ranks = sorted(range(10), key=lambda c: -votes[c])
        top1, top5 = top1 + (label == ranks[0]), top5 + (label in ranks[:5])
    return top1 / len(y), top5 / len(y)

def test_knn_equals_slow_votes_in_any_chunks():
    x, labels = clusters(150, 0.6)
    y, wanted = clusters(40, 0.6, seed=1)
    table = KNN.knn(x, labels, y, wanted)
    for k in (20, 100):
        assert table[k] == slow_knn(x, labels, y, wanted, k)
    assert table[10][0] == slow_knn(x, labels, y, wanted, 10)[0]  # fewer than five classes may have votes
    y, wanted = clusters(1100, 0.6, seed=2)  # in three chunks, or in hundred
    whole, parts = KNN.knn(x, labels, y, wanted), [KNN.knn(x, labels, *part) for part in
                                                   zip(y.split(11), wanted.split(11))]
    for k, (top1, top5) in whole.items():
        assert 0.2 < top1 < 0.95
        assert sum(part[k][0] for part in parts) / 100 == pytest.approx(top1, abs=1e-9)
        assert sum(part[k][1] for part in parts) / 100 == pytest.approx(top5, abs=1e-9)

def test_leave_one_out_equals_its_definition():
    x, labels = clusters(60, 0.6)
    labels[59] = 77  # alone in its class, so it cannot be right
    similar, losses = (F.normalize(x) @ F.normalize(x).T / 0.07).double(), []
    for i in range(59):
        votes = {j: math.exp(similar[i, j]) for j in range(60) if j != i}
        losses.append(-math.log(sum(votes[j] for j in votes if labels[j] == labels[i]) / sum(votes.values())))
    assert KNN.leave_one_out(x, labels) == pytest.approx(sum(losses) / 59, rel=1e-4)

def test_knn_does_not_depend_on_batches_or_workers(tmp_path):
    for part, n in (("train", 24), ("val", 12)):
        for i, image in enumerate(photos(n, seed=n)):
            (tmp_path / part / str(i % 3)).mkdir(parents=True, exist_ok=True)
            write_jpeg(image, str(tmp_path / part / str(i % 3) / f"{i}.jpg"))
    tables = []
    for batch_size, workers in ((5, 0), (64, 2)):
        with settings(KNN, size="nano", batch_size=batch_size, workers=workers):
            model = KNN.make_model(CPU, 0, None)
            tables.append(KNN.evaluate(model, *KNN.load_data(tmp_path)[1:])
                          + KNN.evaluate(model, *(KNN.Memory(**KNN.draw_synthetic(n, n)) for n in (90, 40))))
    assert [(row["k"], row["features"]) for row in tables[0]][:4] == [(k, "gap") for k in (10, 20, 100, 200)]
    for one, other in zip(*tables, strict=True):
        loss = one.pop("train_loss")
        assert other.pop("train_loss") == pytest.approx(loss, rel=1e-5) and one == other
    assert len({row["top1"] for row in tables[0]}) > 4

def test_knn_of_images_without_an_encoder(data, tmp_path):
    """Against votes on arrays made here."""
    for kind in ("pixels", "hog"):
        run(KNN, "--size=nano", "--features", kind, "--data", data, "--out", tmp_path / kind)
        line = json.loads((tmp_path / kind).read_text())
        (x, labels), (y, wanted) = ((part.images, part.labels) for part in KNN.load_data(data)[1:])
        x, y = (part.float() if kind == "pixels" else BASE.hog(part, 8, 9) for part in (x, y))
        x, y = x.flatten(1), y.flatten(1)
        assert x.shape[1] == dict(pixels=3 * 32 * 32, hog=16 * 27)[kind]
        rows = {(row["features"], row["k"]): row["top1"] for row in line["runs"][0]["epochs"]}
        assert rows[kind, 20] == KNN.knn(x, labels, y, wanted)[20][0]
        centred = KNN.knn(x - x.mean(0), labels, y - x.mean(0), wanted)[20][0]
        assert line["acc_mean"] == rows[f"{kind} centred", 20] == centred and len(rows) == 8
    for wrong in (["--features=colour"], ["--features=hog", "--finetune=c.pt"]):
        with pytest.raises(SystemExit) as left:
            run(KNN, *wrong, "--data", data, "--out", tmp_path / "o")
        assert left.value.code == 2

# ---------------------------------------------------------------------- fine-tuning: optimizer
@pytest.mark.parametrize("size, decay", [("nano", 0.75), ("base", 0.65)])
def test_layer_decay_and_weight_decay(size, decay):
    with settings(TUNE, size=size, layer_decay=decay, weight_decay=0.05), torch.device("meta"):
        model = TUNE.Classifier(10)
        groups = TUNE.make_optimizer(model).param_groups
    depth = len(model.blocks)
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        level = depth + 1 if name.split(".")[0] in ("norm", "head") else 0
        level = 1 + int(name.split(".")[1]) if name.startswith("blocks") else level
        decayed = name.endswith("weight") and "norm" not in name
        assert found[id(p)] == (pytest.approx(decay ** (depth + 1 - level)), 0.05 * decayed), name
    assert len({scale for scale, _ in found.values()}) == depth + 2
    if size == "base":  # as the published table of multipliers goes
        assert min(found.values())[0] == pytest.approx(0.65 ** 13) and max(found.values())[0] == 1

def test_learning_rate_by_lr_or_blr():
    with settings(TUNE, lr=4e-3, min_lr=1e-5, epochs=100, warmup_epochs=20):
        assert TUNE.learning_rate(10 * 20, 20) == pytest.approx(2e-3)
        assert TUNE.learning_rate(60 * 20, 20) == pytest.approx((4e-3 + 1e-5) / 2)
    with settings(TUNE, lr=0.0, blr=1e-3, batch_size=128, accum_iter=4, warmup_epochs=5):
        assert TUNE.learning_rate(100, 20) == pytest.approx(2e-3)

def test_drop_path():
    with settings(TUNE, size="nano", drop_path=0.3):
        generator = torch.Generator().manual_seed(0)
        factors = TUNE.branch_factors(torch.rand(50000, 4, 2, generator=generator))
        for block, rate in enumerate((0, 0.1, 0.2, 0.3)):
            assert factors[:, block].unique().tolist() == pytest.approx([0, 1 / (1 - rate)][rate == 0:])
            assert factors[:, block].mean((0,)).tolist() == pytest.approx([1, 1], abs=0.02)
        model, images = TUNE.make_model(CPU, 0, None, 10), photos(6)
        x = torch.randn(6, 5, 96)
        assert torch.equal(model.blocks[0](x, torch.zeros(6, 2)), x)
        torch.nn.init.normal_(model.head.weight)
        assert torch.equal(model(images), model(images, torch.ones(6, 4, 2)))
        half, full = model(images, torch.cat([torch.ones(3, 4, 2), torch.zeros(3, 4, 2)])), model(images)
        assert torch.allclose(half[:3], full[:3], atol=1e-4) and not torch.allclose(half, full, atol=1e-2)

# ---------------------------------------------------------------------- fine-tuning: augmentation
def test_mixup_and_cutmix():
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 32, 32)
    targets, kinds = F.one_hot(torch.arange(8), 10) * 0.9 + 0.01, []
    for seed in range(200):
        mixed, soft = TUNE.mix(images, targets, TUNE.np.random.default_rng(seed))
        assert torch.allclose(soft.sum(1), torch.ones(8))
        share = (float(soft[0, 0]) - 0.01) / 0.9
        assert soft[0, 1].item() == pytest.approx(0.01 + 0.9 * (1 - share), abs=1e-5)
        kinds.append(set(mixed.unique().tolist()) <= set(range(8)))
        if kinds[-1]:  # CutMix: a rectangle of the neighbour whose area is its share of the label
            hole = mixed[0, 0] == 1
            rows, columns = hole.any(1).sum(), hole.any(0).sum()
            assert hole.sum() == rows * columns and (mixed[0] == hole).all()
            assert float(hole.float().mean()) == pytest.approx(1 - share, abs=1e-5)
        else:
            assert mixed[2, 0, 0, 0].item() == pytest.approx(2 * share + 3 * (1 - share), abs=1e-4)
        assert torch.allclose(mixed[0] + mixed[1], torch.ones(3, 32, 32), atol=1e-5)
    assert 60 < sum(kinds) < 140
    for off, kind in (("mixup", True), ("cutmix", False)):
        with settings(TUNE, **{off: 0.0}):
            mixed, _ = TUNE.mix(images, targets, TUNE.np.random.default_rng(3))
            assert (set(mixed.unique().tolist()) <= set(range(8))) == kind

def strength(value, n=1):
    return torch.full((n, 1, 1, 1), float(value))

@pytest.mark.parametrize("number", range(4, 15))
def test_operations_without_strength_change_nothing(number):
    images = photos(4)
    assert torch.equal(TUNE.OPERATIONS[number](images, strength(0, 4)).to(torch.uint8), images)

GREY = [255 * mean for mean in TUNE.MEAN]

def moved(x, **change):
    """torchvision's affine transform about the top left corner or, when it turns, the centre."""
    whole = dict(angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0], center=[0.0, 0.0]) | change
    return vision.affine(x, interpolation=vision.InterpolationMode.BILINEAR, fill=GREY, **whole)

SHEAR = math.degrees(math.atan(0.27))
PEERS = [  # what torchvision does for strengths 0.9 and -0.9, in the order of OPERATIONS
    (vision.autocontrast,) * 2, (vision.equalize,) * 2, (vision.invert,) * 2,
    (lambda x: vision.posterize(x, 1),) * 2, (lambda x: vision.solarize(x, 26),) * 2,
    (lambda x: torch.where(x < 128, x.int() + 99, x).clamp(max=255),) * 2,
    *([lambda x, f=f, adjust=adjust: adjust(x, f) for f in (1.81, 0.19)] for adjust in (
        vision.adjust_saturation, vision.adjust_contrast, vision.adjust_brightness, vision.adjust_sharpness)),
    [lambda x, a=a: moved(x, angle=a, center=None) for a in (-27.0, 27.0)],
    [lambda x, a=a: moved(x, shear=[a, 0.0]) for a in (SHEAR, -SHEAR)],
    [lambda x, a=a: moved(x, shear=[0.0, a]) for a in (SHEAR, -SHEAR)],
    [lambda x, a=a: moved(x, translate=[a, 0]) for a in (-12.96, 12.96)],
    [lambda x, a=a: moved(x, translate=[0, a]) for a in (-12.96, 12.96)]]

@pytest.mark.parametrize("number", range(15))
def test_operations_agree_with_torchvision(number):
    assert len(TUNE.OPERATIONS) == len(PEERS) == 15
    images = photos(6)
    for sign, peer in zip((0.9, -0.9), PEERS[number]):
        wanted = torch.stack([peer(image) for image in images]).float()
        found = TUNE.OPERATIONS[number](images, strength(sign, 6)).to(torch.uint8).float()
        assert (wanted - images).abs().mean() > 5  # it does something
        far = ((found - wanted).abs() > 1).float().mean()
        assert far == 0 or number > 9 and far < 0.07, far  # where the image meets the grey around it

def test_rand_augment_draws():
    images = photos(30)
    draw = torch.tensor([0.5, 0.4, 0.5, 0.1]).expand(30, 1, 4)
    assert torch.equal(TUNE.rand_augment(images.clone(), draw), images)  # an operation that is not applied
    for sign, direction in ((0.1, 0.9), (0.9, -0.9)):
        numbers = torch.tensor([[(i % 15 + 0.5) / 15, 0.6, 0.5, sign] for i in range(30)])[:, None]
        found = TUNE.rand_augment(images.clone(), numbers)
        for i in range(30):
            wanted = TUNE.OPERATIONS[i % 15](images[i:i + 1], strength(direction)).to(torch.uint8)
            assert torch.equal(found[i:i + 1], wanted), i
    numbers = torch.rand(3000, 2, 4, generator=torch.Generator().manual_seed(0))
    many = images.repeat(100, 1, 1, 1)
    changed = (TUNE.rand_augment(many.clone(), numbers) != many).flatten(1).any(1).float().mean()
    assert 0.65 < changed < 0.8  # 3 in 4 get an operation, of which some do nothing here

def test_erasing():
    generator = torch.Generator().manual_seed(0)
    numbers, noise = (draw(*shape, generator=generator) for draw, shape in
                      ((torch.rand, (4000, 6)), (torch.randn, (1 << 16,))))
    blank = torch.full((4000, 3, 32, 32), -1e4)
    found = TUNE.erase(blank, numbers, noise)
    holes = (found != blank).all(1)
    assert ((found != blank).any(1) == holes).all()
    rate = holes.flatten(1).any(1).float().mean()
    assert rate == pytest.approx(0.25, abs=0.035)
    sizes = set()
    for hole in holes[holes.flatten(1).any(1)]:
        h, w = int(hole.any(1).sum()), int(hole.any(0).sum())
        assert hole.sum() == h * w  # a rectangle
        assert (h + 0.5) * (w + 0.5) >= 0.02 * 1024 and (h - 0.5) * (w - 0.5) <= 1024 / 3
        assert (h + 0.5) / (w - 0.5) >= 0.3 and (h - 0.5) / (w + 0.5) <= 1 / 0.3
        sizes.add((h, w))
    assert len(sizes) > 150 and holes[:, 0, 0].any() and holes[:, 31, 31].any()
    mean, std = torch.tensor([TUNE.MEAN, TUNE.STD])[:, :, None, None]
    normal = ((found / 255 - mean) / std)[holes[:, None].expand(-1, 3, -1, -1)]
    assert normal.mean() == pytest.approx(0, abs=0.05) and normal.std() == pytest.approx(1, abs=0.05)

def test_shifts():
    image = photos(1)
    padded, numbers = F.pad(image[0], [4] * 4), (torch.cartesian_prod(*[torch.arange(9)] * 2) + 0.5) / 9
    found = TUNE.shift_batch(image.expand(81, -1, -1, -1), numbers, 4)
    for i in range(81):
        y, x = divmod(i, 9)
        assert torch.equal(found[i], padded[:, y:y + 32, x:x + 32])
    assert torch.equal(TUNE.shift_batch(image, torch.tensor([[0.9, 0.1]]), 0), image)

def test_defaults_show_whole_images_and_those_of_photos_crop():
    images, numbers = photos(64), torch.rand(64, 23, generator=torch.Generator().manual_seed(0))
    flipped = numbers[:, 22, None, None, None] < 0.5
    assert torch.equal(TUNE.crop_batch(images, numbers, 32), torch.where(flipped, images.flip(3), images))
    with settings(TUNE, **TUNE.PHOTO):
        boxes = TUNE.crop_boxes(numbers, 224, 224)
        share = boxes[2] * boxes[3] / 224 ** 2
        assert TUNE.HYP["shift"] == 0 and 0.07 < share.min() < 0.2 and 0.8 < share.max() <= 1

def write_folder(root, train=24, val=12):
    """An image folder of two classes of greys, dark and bright; an image of the train set is broken."""
    for part, n in (("train", train), ("val", val)):
        for i in range(n):
            path = root / part / str(i % 2) / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jpeg(torch.full((3, 40, 52), (60, 190)[i % 2], dtype=torch.uint8), str(path))
    (root / "train" / "0" / f"{train - 2:02}.jpg").write_bytes(b"no image")  # the next one is of class 1
    return root

def test_crops_of_folders_come_with_their_labels(tmp_path, capsys):
    with settings(TUNE, workers=0):
        train_set = TUNE.load_data(write_folder(tmp_path))[1]
        index = torch.arange(24).flip(0)
        images, labels = next(train_set.crops([(index, torch.rand(24, 23))], 32))
    assert labels.tolist() == [1] * 13 + [0] * 11 and len(train_set.broken) == 1
    assert torch.equal(images.float().mean((1, 2, 3)) > 125, labels == 1)
    assert "22.jpg" in capsys.readouterr().err
    memory = TUNE.Memory(photos(9).permute(0, 2, 3, 1), torch.arange(9))
    images, labels = next(memory.crops([(torch.tensor([7, 2]), torch.full((2, 23), 0.9))], 32))
    assert labels.tolist() == [7, 2] and torch.equal(images, memory.images[[7, 2]])

# ---------------------------------------------------------------------- linear probe
def test_lars_by_hand():
    weights, bias = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = PROBE.LARS([weights, bias])
    optimizer.param_groups[0]["lr"] = 2.0
    with settings(PROBE, trust=0.01, momentum=0.5, weight_decay=0.1):
        for step in range(2):
            weights.grad, bias.grad = torch.tensor([[0.0, 1.0]]), torch.tensor([0.25])
            optimizer.step()
            if step == 0:  # gradient + decay = (0.3, 1.4), scaled to 0.01 * 5
                length = math.hypot(0.3, 1.4)
                speed = [0.05 * 0.3 / length, 0.05 * 1.4 / length]
                w = [3 - 2 * speed[0], 4 - 2 * speed[1]]
                assert weights[0].tolist() == pytest.approx(w, abs=1e-6) and bias.item() == 0.5
        g = [0.1 * w[0], 1 + 0.1 * w[1]]
        factor = 0.01 * math.hypot(*w) / math.hypot(*g)
        speed = [0.5 * speed[i] + factor * g[i] for i in (0, 1)]
        assert weights[0].tolist() == pytest.approx([w[i] - 2 * speed[i] for i in (0, 1)], abs=1e-6)
        assert bias.item() == pytest.approx(0.5 - 2 * (0.5 * 0.25 + 0.25))
    zero = torch.nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    optimizer = PROBE.LARS([zero])
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert (zero == -1).all()

def probe_rows(folder, x, labels, y, wanted, **hyp):
    hyp = dict(dict(epochs=20.0, warmup_epochs=2.0, batch_size=100, blr=20.0, views=0), **hyp)
    with settings(PROBE, **hyp):
        return PROBE.train(types.SimpleNamespace(resume=None), folder, x, labels, y, wanted, 0, 0)[0]

def test_linear_probe_of_separable_features_and_of_shuffled_labels(tmp_path):
    x, labels = clusters(1000, 0.05)
    y, wanted = clusters(500, 0.05, seed=1)
    for name in ("separable", "shuffled"):
        (tmp_path / name).mkdir()
    rows = probe_rows(tmp_path / "separable", x[None], labels, y, wanted)
    assert rows[-1]["val_acc"] == 1 and rows[-1]["train_loss"] < 0.1 < rows[0]["train_loss"]
    shuffled = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    rows = probe_rows(tmp_path / "shuffled", x[None], shuffled, y, wanted)
    assert rows[-1]["val_acc"] < 0.3

def test_probe_uses_all_views_and_whole_steps():
    with settings(PROBE, views=2, batch_size=20):
        plan = list(PROBE.plan(65, 0, 0, 6))
        again = list(PROBE.plan(65, 0, 4, 6))
        assert same(plan[4:], again)
        epochs = [torch.cat([index for index, _ in part]) for part in (plan[:3], plan[3:])]
        assert all(len(epoch.unique()) == 60 for epoch in epochs) and not torch.equal(*epochs)
        assert torch.cat([view for _, view in plan]).bincount().min() > 20
    with settings(PROBE, size="nano", views=2):
        train_set = PROBE.Memory(**PROBE.draw_synthetic(30, 1))
        model = PROBE.make_model(CPU, 0, None)
        table, again = (PROBE.view_features(model, train_set, seed) for seed in (0, 0))
        plain = PROBE.features(model, train_set)[0]
        assert table.shape == (2, 30, 96) and torch.equal(table, again)
        near, far = (F.cosine_similarity(table[0] - plain.mean(0), other - plain.mean(0)).mean()
                     for other in (table[1], table[1].roll(1, 0)))
        assert not torch.equal(table[0], table[1]) and near > 0.2 + far  # of the same images

# ---------------------------------------------------------------------- checkpoints
def test_the_scripts_share_their_text():
    texts = {name: blocks(path) for name, path in PATHS.items()}
    for names, scripts_ in (("pretrained encoder_flops", "finetune linprobe knn"),
                            ("Encoder features make_model", "linprobe knn"),
                            ("shift_batch PHOTO Memory Folder", "finetune linprobe")):
        for name in names.split():
            forms = {re.sub(r"^#(#+| +\w+ +#)\n", "", texts[script][name], flags=re.M)  # without banners
                     for script in scripts_.split()}
            assert len(forms) == 1, name

def test_a_checkpoint_of_main0_is_loaded_exactly(pretrained):
    state = torch.load(pretrained)["model"]
    size, _, weights = TUNE.pretrained(pretrained)
    with settings(TUNE, size=size), settings(BASE, size=size):
        tuned = TUNE.make_model(CPU, 7, weights, 10)
        fresh, base = TUNE.make_model(CPU, 7, None, 10), BASE.make_model(CPU, 0)
    base.load_state_dict(state)
    encoder = {name for name in state if not name.startswith("decoders.")}
    assert len(encoder) == 51 and encoder | {"positions"} == {
        name for name in tuned.state_dict() if name.split(".")[0] not in ("norm", "head")}
    for name in encoder:
        assert torch.equal(tuned.state_dict()[name], state[name]), name
    assert not torch.equal(tuned.patch_embed.weight, fresh.patch_embed.weight)
    assert torch.equal(tuned.positions, base.positions)
    for own in (tuned, fresh):
        assert (own.norm.weight == 1).all() and (own.head.bias == 0).all()
        assert own.head.weight.std().item() == pytest.approx(2e-5, rel=0.2)
    images = photos(5)
    wanted = base.decoders[-1].norm(base.encode(images)[-1])
    for module in (PROBE, KNN):
        with settings(module, size=size):
            assert torch.equal(module.make_model(CPU, 0, module.pretrained(pretrained)[2])(images), wanted)
    torch.nn.init.normal_(tuned.head.weight)
    tokens = base.encode(images)[-1]
    for cls_token, vector in ((0, tokens[:, 1:].mean(1)), (1, tokens[:, 0])):
        with settings(TUNE, cls_token=cls_token):
            assert torch.allclose(tuned(images), tuned.head(tuned.norm(vector)), atol=1e-5)

def test_checkpoints_of_every_main_are_read(tmp_path):
    for path in MAINS:
        module = load(path)
        with settings(module, size="nano"):
            model = module.make_model(CPU, 3)
            torch.save(dict(hyp=module.HYP, model=model.state_dict()), tmp_path / "c.pt")
        size, _, weights = KNN.pretrained(tmp_path / "c.pt")
        with settings(KNN, size=size):
            encoder = KNN.make_model(CPU, 0, weights)
        assert torch.equal(encoder.blocks[3].fc2.weight, model.blocks[3].fc2.weight)

def test_damaged_checkpoints(pretrained, data, tmp_path, capsys):
    good, path = pretrained.read_bytes(), tmp_path / "c.pt"
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    torch.save(dict(model={}, hyp=dict(size="nano")), tmp_path / "other.pt")
    for content in (None, good[:len(good) // 2], bytes(flipped), b"", (tmp_path / "other.pt").read_bytes()):
        path.unlink(missing_ok=True)
        content is None or path.write_bytes(content)
        for module in (TUNE, PROBE, KNN):
            with pytest.raises(SystemExit) as left:
                module.pretrained(path)
            assert left.value.code == 3
            assert capsys.readouterr().err.count("\n") == 1
    flags = ["--dry-run", "--finetune", path, "--data", data, "--out", tmp_path / "o"]
    text = call(PATHS["finetune"], *flags, code=3)
    assert f"{path} is missing, damaged or no checkpoint of a mainN" in text
    for module, *wrong in ((TUNE, "--mixup=-1", "--cutmix=0"), (TUNE, "--rand_ops=-1"),
                           (TUNE, "--epochs=0.01"), (PROBE, "--cls_token=2"), (PROBE, "--epochs=0.01")):
        with pytest.raises(SystemExit) as left:
            run(module, "--data", data, "--out", tmp_path / "o", "--batch_size=8", *wrong)
        assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1, wrong

# ---------------------------------------------------------------------- whole runs
FLAGS = {"finetune": ["--batch_size=16", "--epochs=2", "--warmup_epochs=0.5", "--lr=2e-3",
                      "--save_epochs=0.75"],
         "linprobe": ["--batch_size=64", "--epochs=2", "--warmup_epochs=0.5", "--views=1"]}

def final(folder):
    return torch.load(sorted(folder.glob("seed0/checkpoint-*.pt"))[-1])

def same(a, b):
    """Whether two nests of dicts, lists, tensors and numbers are equal, bit for bit"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

@pytest.fixture(scope="module")
def whole(data, pretrained, tmp_path_factory):
    """Folder of a whole run of fine-tuning, of 8 steps."""
    folder = tmp_path_factory.mktemp("whole")
    run(TUNE, *FLAGS["finetune"], "--data", data, "--finetune", pretrained, "--out", folder / "o",
        "--output_dir", folder)
    return folder

def test_stopped_fine_tuning_goes_on_bit_by_bit(data, pretrained, whole, tmp_path, monkeypatch, capsys):
    flags = [*FLAGS["finetune"], "--data", data, "--finetune", pretrained, "--out", tmp_path / "o",
             "--output_dir", tmp_path]
    schedule = TUNE.learning_rate
    def schedule_and_stop(step, per_epoch):
        step == 4 and os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, per_epoch)
    with monkeypatch.context() as patch:
        patch.setattr(TUNE, "learning_rate", schedule_and_stop)
        with pytest.raises(SystemExit) as left:
            run(TUNE, *flags)
    assert left.value.code == 143 and final(tmp_path)["step"] == 5
    assert "stopped after 5 of 8 steps" in capsys.readouterr().err
    run(TUNE, *flags)
    assert "continuing after 5 of 8 steps" in capsys.readouterr().out
    ours, theirs = final(tmp_path), final(whole)
    for state in (ours, theirs):
        state.pop("seconds")
    assert same(ours, theirs) and ours["step"] == 8 and len(ours["rows"]) == 2
    assert json.loads((tmp_path / "o").read_text())["runs"][0]["epochs"] == ours["rows"]
    for change in ("--drop_path=0.2", f"--finetune={whole}/none", "--batch_size=32"):
        with pytest.raises(SystemExit) as left:
            run(TUNE, *flags, change)
        assert left.value.code == (3 if "none" in change else 2)
    assert "another batch_size" in capsys.readouterr().err

def test_another_checkpoint_starts_no_continuation(data, pretrained, whole, tmp_path, capsys):
    state = torch.load(pretrained)
    state["model"]["cls_token"] += 1
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(SystemExit) as left:
        run(TUNE, *FLAGS["finetune"], "--data", data, "--finetune", tmp_path / "c.pt",
            "--out", tmp_path / "o", "--output_dir", whole)
    assert left.value.code == 2 and "another pretrained" in capsys.readouterr().err

@pytest.mark.parametrize("module, rate", [(TUNE, "--lr=1e30"), (PROBE, "--blr=1e38")])
def test_folders_and_losses_that_are_not_finite(module, rate, data, tmp_path, capsys):
    flags = ["--size=nano", "--workers=0", "--batch_size=8", "--warmup_epochs=0", "--out", tmp_path / "o",
             "--data", write_folder(tmp_path / "data"), *["--views=1"] * (module is PROBE)]
    run(module, *flags, "--epochs=1", "--output_dir", tmp_path / "a")
    assert json.loads((tmp_path / "o").read_text())["runs"][0]["broken"] == [
        str(tmp_path / "data" / "train" / "0" / "22.jpg")]
    with pytest.raises(SystemExit) as left:
        run(module, *flags, "--epochs=1", "--output_dir", tmp_path / "b", "--data", data, rate)
    assert left.value.code == 1 and "the loss is" in capsys.readouterr().err

def test_two_processes_do_as_one(data, pretrained, whole, tmp_path):
    wide = write_cifar(tmp_path / "wide", train=600)  # more than a batch of features
    run(PROBE, *FLAGS["linprobe"], "--data", wide, "--finetune", pretrained, "--out", tmp_path / "o",
        "--output_dir", tmp_path / "alone")
    with socket.socket() as one, socket.socket() as two:
        one.bind(("localhost", 0)), two.bind(("localhost", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    flags = {name: ["--device=cpu", "--finetune", str(pretrained), "--out", str(tmp_path / "o"), "--data",
                    str(place), "--output_dir", str(tmp_path / name), *FLAGS[name], *more]
             for name, place, more in (("finetune", data, ["--batch_size=4", "--accum_iter=2"]),
                                       ("linprobe", wide, ["--batch_size=32"]))}
    code = f"""import os, sys; sys.path.insert(0, {str(HERE)!r}); import finetune, linprobe
for port, module in zip({ports}, (finetune, linprobe)):
    os.environ["MASTER_PORT"], module.CPUINFO = str(port), ""  # in fp32
    module.main(module.flag_parser().parse_args({flags!r}[module.__name__]))"""
    env = dict(ENV, WORLD_SIZE="2", MASTER_ADDR="localhost")
    pair = [subprocess.Popen([sys.executable, "-c", code], env=dict(env, RANK=rank, LOCAL_RANK=rank),
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for rank in "01"]
    try:
        assert [process.communicate(timeout=300)[1] for process in pair] == [b"", b""]
    finally:
        for process in pair:
            process.kill()
    ours, theirs, start = final(tmp_path / "finetune"), final(whole), torch.load(pretrained)["model"]
    names = start.keys() & theirs["model"].keys()
    way = sum((theirs["model"][name] - start[name]).norm() for name in names)
    apart = sum((theirs["model"][name] - ours["model"][name]).norm() for name in names)
    assert apart < 0.05 * way, (apart, way)
    for one, two in zip(ours["rows"], theirs["rows"], strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], abs=1e-4)
    ours, theirs = final(tmp_path / "linprobe"), final(tmp_path / "alone")
    for name, value in theirs["model"].items():  # other numbers of threads round in another way
        torch.testing.assert_close(ours["model"][name], value, atol=1e-4, rtol=1e-3)
    for one, two in zip(ours["rows"], theirs["rows"], strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], abs=1e-4)

def test_knn_of_a_checkpoint_is_that_of_main0(data, pretrained, tmp_path):
    run(KNN, "--finetune", pretrained, "--data", data, "--out", tmp_path / "o", "--batch_size=64",
        "--output_dir", tmp_path)
    line = json.loads((tmp_path / "o").read_text())
    with settings(BASE, size="nano"):
        model = BASE.make_model(CPU, 0)
        model.load_state_dict(torch.load(pretrained)["model"])
        table = BASE.evaluate(model, *BASE.load_data(data)[1:])
    rows = line["runs"][0]["epochs"]
    assert {(row["features"], row["k"]): (row["top1"], row["top5"]) for row in rows} == {
        (name, k): value for name, part in table.items() for k, value in part.items()}
    assert line["acc_mean"] == table["gap centred"][20][0] and line["hyp"]["size"] == "nano"
    assert json.loads((tmp_path / "seed0" / "log.jsonl").read_text())["epochs"] == rows
