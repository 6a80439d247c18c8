"""Checks of the ideas of this ladder, each against a slow or independent form of it, and of its long runs."""
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import xml.etree.ElementTree

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from test_smoke import (  # before torch: it has kernels interpreted
    ENV, call, changed_lines, docstring, hyp, load, machine, markdown, mean_std, read_results, scripts,
    side_by_side, write_cifar)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.io import write_jpeg, write_png
from torchvision.transforms.v2.functional import resized_crop

CPU = torch.device("cpu")
MAINS = [path for _, path in scripts("vitfreeze") if path.name.startswith("main")]
LOADED = [load(path) for path in MAINS]  # all of them now: later the kernels may not be interpreted
BASE, HOG, NORMS, LAST = (LOADED[number] for number in (0, 1, 3, -1))

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

def photos(n, side=32, seed=5):
    """uint8 [n, 3, side, side]"""
    images = BASE.draw_synthetic(n, seed)["images"].permute(0, 3, 1, 2).float()
    return F.interpolate(images, size=(side, side), mode="bicubic").round().clamp(0, 255).to(torch.uint8)

@pytest.fixture(scope="module")
def plain_norms():
    """Norms and HOG in plain torch: kernels, which are interpreted here, have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "")
        yield

# ---------------------------------------------------------------------- model
@pytest.mark.parametrize("size, parameters, decayed, other, gflops", [
    ("small", 25463276, 81, 158, 11.6), ("base", 89916140, 81, 158, 31.17),
    ("large", 307632364, 129, 254, 97.0), ("micro", 1445164, 55, 106, 0.22)])
def test_published_sizes(size, parameters, decayed, other, gflops):
    for path in MAINS[:9]:
        module = load(path)
        with settings(module, size=size), torch.device("meta"):
            model = module.LocalMIM()
            assert sum(p.numel() for p in model.parameters()) == parameters
            groups = collections.defaultdict(list)
            for group in module.make_optimizer(model).param_groups:
                groups[group["weight_decay"]] += group["params"]
            assert {decay: len(group) for decay, group in groups.items()} == {0.05: decayed, 0: other}
            tokens = {id(p) for name, p in model.named_parameters() if name.endswith("_token")}
            assert tokens < {id(p) for p in groups[0.05]}
            assert module.train_flops() / 1e9 == pytest.approx(gflops, rel=0.02)

def test_positions():
    table = BASE.positions(16, 3)[0]
    assert table.shape == (10, 16) and (table[0] == 0).all()
    for patch in range(9):
        row, column = divmod(patch, 3)
        for i in range(4):
            frequency = 10000 ** (-i / 4)
            wanted = [math.sin(column * frequency), math.cos(column * frequency),
                      math.sin(row * frequency), math.cos(row * frequency)]
            assert table[1 + patch, [i, 4 + i, 8 + i, 12 + i]].tolist() == pytest.approx(wanted, abs=1e-6)

def test_zero_prediction_costs_a_ninth_per_stage():
    with settings(BASE, size="micro"):
        model = BASE.make_model(CPU, 0)
        for decoder in model.decoders:
            torch.nn.init.zeros_(decoder.pred.weight), torch.nn.init.zeros_(decoder.pred.bias)
        assert model(photos(8), torch.rand(8, 64)).tolist() == pytest.approx([1 / 9] * 4, rel=1e-3)

def test_only_hidden_patches_count():
    """Targets of visible patches do not matter, and those of hidden ones do."""
    with settings(BASE, size="micro"):
        model, images, noise = BASE.make_model(CPU, 0), photos(2), torch.rand(2, 64)
        _, weights = model.predict(images, noise)
        assert [w.sum(1).tolist() for w in weights] == [[48 * s * s] * 2 for s in (2, 1, 0.5, 0.25)]
        hidden = weights[1].view(2, 8, 8) > 0
        grown = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        taps = model.encode(images, noise.argsort(1)[:, :16])
        changed = torch.where(grown, 255 - images, images)
        for x, y in zip(taps, model.encode(changed, noise.argsort(1)[:, :16])):
            assert torch.equal(x, y), "a hidden patch reaches the encoder"

def run_steps(module, size, steps, images, noises):
    """Losses [steps, 4] of a model of seed 0 and its predictions after them."""
    with settings(module, size=size):
        model = module.make_model(CPU, 0)
        optimizer, losses = module.make_optimizer(model), []
        for noise in noises[:steps]:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            losses.append(model(images, noise))
            losses[-1].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            predictions, weights = model.predict(images, noises[0])
            shown = [x * (w[:, :, None] > 0) for x, w in zip(predictions, weights)]
            return torch.stack(losses).detach(), shown, model.targets(images), model.encode(images)[-1]

@pytest.mark.parametrize("size, steps, interpret", [("nano", 20, ""), ("small64", 2, ""), ("nano", 1, "1")])
def test_all_steps_of_the_ladder_compute_the_same(size, steps, interpret, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    torch.manual_seed(3)
    count = min(steps + 1, 4)
    images, noises = photos(count, BASE.SIZES[size].image), torch.rand(steps, count, 64)
    losses, shown, targets, tokens = run_steps(BASE, size, steps, images, noises)
    assert steps == 1 or (losses[-1] < losses[0]).all()
    for path in MAINS[1:5 if interpret else 9]:  # the others have the same kernels, which are slow here
        other = run_steps(load(path), size, steps, images, noises)
        torch.testing.assert_close(other[0], losses, atol=1e-4, rtol=0)
        torch.testing.assert_close(other[2], targets, atol=1e-5, rtol=0)
        torch.testing.assert_close(other[1], shown, atol=2e-3, rtol=0)
        torch.testing.assert_close(other[3], tokens, atol=2e-2, rtol=1e-2)

# ---------------------------------------------------------------------- HOG
@pytest.mark.parametrize("nbins", [9, 18])
def test_bins_of_every_gradient(nbins):
    """All integer gradients that uint8 images can have, against the angle in fp64, and main0's formula."""
    g = torch.arange(-1020, 1021, dtype=torch.float32)
    gx, gy = (part.flatten() for part in torch.meshgrid(g, g, indexing="ij"))
    turn = 1 - 2 * ((gx < 0) | (gx == 0) & (gy < 0)).float()
    bins = sum((gx * turn * cos >= gy * turn * sin).int() for cos, sin in HOG.bin_sides(nbins)[1:].tolist())
    share = nbins * torch.atan2(gx.double(), gy.double()) / math.pi
    exact = (share + 1e-9).floor().int() % nbins
    reference = (nbins * torch.atan2(gx, gy) / math.pi).floor().int() % nbins
    matter = (gx != 0) | (gy != 0)
    assert torch.equal(bins[matter], exact[matter]) and torch.equal(reference[matter], exact[matter])

def hog_slow(images, cell, nbins):
    """Pixel by pixel with integers."""
    n, _, height, width = images.shape
    cells = torch.zeros(n, height // cell, width // cell, 3, nbins, dtype=torch.float64)
    reflect = lambda i, size: -i if i < 0 else 2 * size - 2 - i if i >= size else i
    for b, c, y, x in torch.cartesian_prod(*map(torch.arange, (n, 3, height, width))).tolist():
        at = lambda dy, dx: int(images[b, c, reflect(y + dy, height), reflect(x + dx, width)])
        gx = sum(k * (at(d, -1) - at(d, 1)) for d, k in ((-1, 1), (0, 2), (1, 1)))
        gy = sum(k * (at(-1, d) - at(1, d)) for d, k in ((-1, 1), (0, 2), (1, 1)))
        share = nbins * math.atan2(gx, gy) / math.pi
        cells[b, y // cell, x // cell, c, math.floor(share + 1e-9) % nbins] += math.hypot(gx, gy)
    return F.normalize(cells, dim=4).flatten(3).flatten(1, 2).float()

def test_hog_of_pixels_one_by_one():
    images = photos(1)
    for cell in (4, 16):
        torch.testing.assert_close(BASE.hog(images, cell, 9), hog_slow(images, cell, 9), atol=1e-5, rtol=0)

def hog_cases():
    edge = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    edge[0, :, :, 13:], edge[1, :, 9:] = 255, 255
    torch.manual_seed(1)
    noise = torch.randint(256, (2, 3, 64, 32), dtype=torch.uint8)
    return dict(noise=noise, constant=torch.full_like(noise, 77), edge=edge, photo=photos(2),
                saturated=(noise > 127).to(torch.uint8) * 255)

@pytest.mark.parametrize("name", ["noise", "constant", "saturated", "edge", "photo"])
@pytest.mark.parametrize("cell, nbins", [(2, 9), (4, 9), (4, 18)])
def test_hog_kernel_and_plain_form(name, cell, nbins):
    """Four levels: cells of 2, 4, 8, 16, or 4, 8, 16, 32 pixels."""
    images = hog_cases()[name]
    sides = HOG.bin_sides(nbins)
    both = zip(HOG.hog(images, cell, sides), HOG.hog_plain(images, cell, sides))
    for level, (kernel, plain) in enumerate(both):
        reference = BASE.hog(images, cell << level, nbins)
        torch.testing.assert_close(plain, reference, atol=1e-5, rtol=0)
        torch.testing.assert_close(kernel, reference, atol=1e-5, rtol=0)
    assert (name == "constant") == (kernel == 0).all()

def test_nested_order():
    """Cells of a patch are together, in quarters of quarters."""
    nested = LAST.nested(2, 4)
    assert nested.flatten().sort().values.tolist() == list(range(64))
    assert nested[1].tolist() == [4, 5, 12, 13, 6, 7, 14, 15, 20, 21, 28, 29, 22, 23, 30, 31]
    images = photos(2)
    for scale in (1, 2, 4):
        sides = LAST.bin_sides(9)
        for kernel, plain in zip(LAST.hog(images, 4, sides, scale), LAST.hog_plain(images, 4, sides, scale)):
            torch.testing.assert_close(kernel, plain, atol=1e-5, rtol=0)

def test_glyphs_run_along_edges():
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[..., 16:] = 255  # a vertical edge
    glyph = BASE.glyphs(BASE.hog(image, 16, 9)[0], 2, 64)[0, :32, :32]
    assert glyph[:, 14:18].sum() > 3 * glyph[14:18].sum()

# ---------------------------------------------------------------------- norm kernels
@pytest.mark.parametrize("n_cols", [1, 7, 64, 192, 256, 384, 768, 1025])
@pytest.mark.parametrize("add", [True, False])
def test_norm_kernels(n_cols, add):
    torch.manual_seed(n_cols)
    x, branch, ds, dy = torch.randn(4, 37, n_cols)
    norm = torch.nn.LayerNorm(n_cols, eps=1e-6)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    def results(function, dtype):
        inputs = [part.clone().to(dtype).requires_grad_() for part in (x, branch)]
        module = torch.nn.LayerNorm(n_cols, eps=1e-6).to(torch.promote_types(dtype, torch.float32))
        module.load_state_dict(norm.state_dict())
        s, y = function(inputs[0], inputs[1] if add else None, module)
        ((s * ds).sum() * add + (y * dy).sum()).backward()
        grads = [part.grad for part in (*inputs[:1 + add], module.weight, module.bias)]
        return [s, y, *grads]
    def exact(x, branch, norm):
        s = x.double() if branch is None else x.double() + branch.double()
        return s, norm(s)
    wanted = results(exact, torch.float64)
    plain = results(lambda x, branch, norm: (s := x + branch if add else x, norm(s)), torch.float32)
    for ours, theirs, reference in zip(results(NORMS.add_norm, torch.float32), plain, wanted):
        size = reference.abs().max().clamp(min=1)
        error = (ours - reference).abs().max() / size
        assert error <= max(1e-5, 2 * (theirs - reference).abs().max() / size), error

def test_norm_in_bf16_rounds_once():
    torch.manual_seed(0)
    x, norm = torch.randn(33, 192), torch.nn.LayerNorm(192, eps=1e-6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, y = NORMS.add_norm(x, None, norm)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm(x), rtol=2 ** -7, atol=1e-6)  # the interpreter truncates

def test_kernels_compile_for_a_gpu():
    """To machine code for an H100, which needs none."""
    code = f"""
import sys, triton
sys.path.insert(0, {str(HERE)!r})
import {LAST.__name__} as m
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
def check(kernel, pointers, **constants):
    types = {{name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}}
    types.update({{"eps": "fp32"}} if "eps" in types else {{}}, **pointers)
    types.update(dict.fromkeys(constants, "constexpr"))
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    assert len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 1000
for cell, splits in ((2, (1, 0, 0)), (4, (2, 1, 0))):
    check(m._hog_fwd_kernel, dict(X_ptr="*u8"), NBINS=9, BINS=16, CELL=cell, SPLITS_0=splits[0],
          SPLITS_1=splits[1], SPLITS_2=splits[2])
for add in (True, False):
    check(m._norm_fwd_kernel, dict(Y_ptr="*bf16", R_ptr="*bf16"), ROWS=4, BLOCK_SIZE=1024, ADD=add, STATS=add)
    check(m._norm_bwd_kernel, dict(DY_ptr="*bf16"), ROWS=4, STEPS=8, BLOCK_SIZE=1024, ADD=add)
"""
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True)

# ---------------------------------------------------------------------- data
@pytest.mark.parametrize("side", [32, 20, 48])
def test_crops_equal_those_of_torchvision(side):
    torch.manual_seed(2)
    images, numbers = photos(32), torch.rand(32, 23)
    crops = BASE.crop_batch(images, numbers, side)
    for image, crop, row, *box in zip(images, crops, numbers, *(part.int().tolist() for part in
                                                                BASE.crop_boxes(numbers, 32, 32))):
        wanted = resized_crop(image.float(), *box, [side, side], interpolation=3, antialias=True)
        wanted = wanted.round().clamp(0, 255)
        wanted = wanted.flip(-1) if row[22] < 0.5 else wanted
        assert (wanted - crop).abs().max() <= 1

def test_crop_boxes_have_the_published_shares():
    numbers = torch.rand(20000, 23, generator=torch.Generator().manual_seed(0))
    top, left, h, w = BASE.crop_boxes(numbers, 480, 640)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 480).all() and (left + w <= 640).all()
    share, ratio = h * w / (480 * 640), w / h
    assert 0.199 < share.min() < 0.21 and share.max() > 0.95 and 0.74 < ratio.min() and ratio.max() < 1.35
    assert abs(float(ratio.log().mean())) < 0.05
    _, _, h, w = BASE.crop_boxes(numbers, 600, 600)  # size and shape are drawn apart
    assert abs(float(torch.corrcoef(torch.stack([h * w, (w / h).log()]))[0, 1])) < 0.05
    wide = BASE.crop_boxes(numbers[:5] * 0 + 0.99, 10, 1000)  # nothing fits: the middle
    assert [part[0].item() for part in wide] == [0, 493, 10, 13]

def test_numbers_of_a_step_do_not_depend_on_the_processes(monkeypatch):
    def all_of(world, passes):
        with settings(BASE, size="nano", batch_size=8 // world // passes, accum_iter=passes):
            monkeypatch.setattr(BASE, "WORLD", world)
            seen = []
            for rank in range(world):
                monkeypatch.setattr(BASE, "RANK", rank)
                seen.append(list(BASE.plan(train_set, 4, 2, 5)))
            parts = [part for step in zip(*seen) for part in step]
            return [torch.cat(column) for column in zip(*((*batch, noise) for batch, noise in parts))]
    train_set = BASE.Memory(**BASE.draw_synthetic(20, 0))
    whole = all_of(1, 1)
    assert whole[0].shape == (24,) and len(set(whole[0][:8].tolist())) == 8
    for split in ((2, 1), (2, 2), (1, 4)):
        assert all(map(torch.equal, all_of(*split), whole)), split

def test_learning_rate():
    with settings(BASE, epochs=100, warmup_epochs=10, batch_size=1024, accum_iter=2, blr=2e-4, min_lr=1e-6):
        rates = [BASE.learning_rate(step, 50) for step in (0, 250, 500, 2750, 5000)]
        assert rates == pytest.approx([0, 8e-4, 1.6e-3, (1.6e-3 + 1e-6) / 2, 1e-6])

def write_folder(root, broken=False, tiny=False):
    """Photos as JPEG files in the layout of ImageNet or of Tiny-ImageNet."""
    notes = []
    for part, count in (("train", 12), ("val", 6)):
        for number, image in enumerate(photos(count, 48, seed=count)):
            wnid = f"n{number % 2}"
            folder = root / part / (wnid if part == "train" or not tiny else "") / ("images" if tiny else "")
            folder.mkdir(parents=True, exist_ok=True)
            write_jpeg(image if number != 3 else image[:1], str(folder / f"{number}.JPEG"))  # one is grey
            notes += [f"{number}.JPEG\t{wnid}\t0\t0\t1\t1"] * (part == "val")
    if tiny:
        (root / "val" / "val_annotations.txt").write_text("\n".join(notes))
    if broken:
        path = next(root.glob("train/n1/*.JPEG"))
        path.write_bytes(path.read_bytes()[:200])
        return path

@pytest.mark.parametrize("tiny", [False, True])
def test_image_folders(tmp_path, tiny):
    write_folder(tmp_path / "set", tiny=tiny)
    with settings(BASE, workers=0):
        name, train_set, test_set = BASE.load_data(tmp_path / "set")
        assert name == "other" and train_set.labels.tolist() == [0] * 6 + [1] * 6
        images, labels = next(test_set.views(32))
        assert images.shape == (6, 3, 32, 32) and labels.bincount().tolist() == [3, 3]
        numbers = torch.rand(3, 23)
        crops = next(train_set.crops([(torch.tensor([0, 5, 7]), numbers)], 32))
        again = next(train_set.crops([(torch.tensor([0, 5, 7]), numbers)], 32))
        assert torch.equal(crops, again) and crops.dtype == torch.uint8
        shutil.copytree(tmp_path / "set" / "train" / "n0", tmp_path / "set" / "train" / "a")
        _, train_set, test_set = BASE.load_data(tmp_path / "set")  # where a class has no test images
        assert train_set.labels.bincount().tolist() == [6] * 3 and test_set.labels.tolist().count(0) == 0
        shutil.rmtree(tmp_path / "set" / "train" / "n1")
        with pytest.raises(SystemExit) as left:
            BASE.load_data(tmp_path / "set")
        assert left.value.code == 3

def test_a_broken_image_is_named_counted_and_skipped(tmp_path):
    path, out = write_folder(tmp_path / "set", broken=True), tmp_path / "o.jsonl"
    text = call(MAINS[0], "--data", tmp_path / "set", "--dry-run", "--workers=2", "--out", out)
    assert text.count(f"warning: skipped {path}") == 1
    assert json.loads(out.read_text())["runs"][0]["broken"] == [str(path)]

def test_decoding_by_a_device_gives_what_the_workers_give(tmp_path, capsys):
    """Here the device is the CPU; a broken image among good ones goes the usual way, and so does a PNG."""
    path = write_folder(tmp_path / "set", broken=True)
    write_png(photos(1, 48)[0], str(tmp_path / "set/train/n0/0.JPEG"))
    (tmp_path / "set/train/n0/2.JPEG").write_bytes(b"")
    batch = torch.arange(12), torch.rand(12, 23)
    def read(device, workers):
        with settings(LAST, workers=workers):
            train_set, test_set = LAST.load_data(tmp_path / "set")[1:]
            train_set.to(CPU), test_set.to(CPU)
            assert train_set.device is None  # the workers decode unless the device is a GPU that can
            train_set.device = test_set.device = device
            views, labels = next(test_set.views(32))
            return next(train_set.crops([batch], 32)), views, labels, train_set.broken
    wanted, *found = read(None, 0), read(CPU, 0), read(CPU, 2)
    assert wanted[3] == {str(path), str(tmp_path / "set/train/n0/2.JPEG")}
    assert capsys.readouterr().err.count(f"skipped {path}") == 3
    for result in found:
        assert all(map(torch.equal, result[:3], wanted[:3])) and result[3] == wanted[3]

# ---------------------------------------------------------------------- long runs
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("data"), train=96)

def flags(data, folder, **more):
    values = dict(size="nano", epochs=3, warmup_epochs=1, batch_size=8, blr=0.02, save_epochs=1, data=data,
                  device="cpu", output_dir=folder, out=folder / "o.jsonl", **more)
    return [f"--{name}={value}" for name, value in values.items()]

def final(folder, step=36):
    return torch.load(folder / "seed0" / f"checkpoint-{step:08d}.pt", weights_only=True)

def same_weights(a, b):
    return all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())

def forks(*runs):
    """[(exit code, what was printed)] of runs of scripts at the same time, each (script, flags) and perhaps a
    function that changes the module, in forks of this process, which saves the seconds that imports take."""
    def child(file, path, flags, change=lambda module: None):
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ["TRITON_INTERPRET"] = ""
        change(load(path))
        load(path).main(load(path).flag_parser().parse_args(list(map(str, flags))))
    files = [tempfile.TemporaryFile("w+") for _ in runs]
    processes = [multiprocessing.get_context("fork").Process(target=child, args=(file, *run))
                 for file, run in zip(files, runs)]
    for process in processes:
        process.start()
    for process, file in zip(processes, files):
        process.join(300), process.kill(), file.seek(0)  # who waits for ever has failed
    return [(process.exitcode, file.read()) for process, file in zip(processes, files)]

def whole(*runs):
    """What forks print that come to their end"""
    results = forks(*runs)
    for code, text in results:
        assert code == 0, text
    return [text for _, text in results]

def pair(path, flags, change=lambda module: None):
    """Runs for forks() that are two processes of one"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    def of(rank):
        def as_rank(module):
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
            module.RANK, module.LOCAL_RANK, module.WORLD = rank, rank, 2
            change(module)
        return path, flags, as_rank
    return of(0), of(1)

def after(name, number, act):
    """Change of a module: once its function `name` has returned for the number-th time, act()"""
    def change(module):
        function, calls = getattr(module, name), itertools.count(1)
        def wrapped(*args, **more):
            result = function(*args, **more)
            next(calls) == number and act()
            return result
        setattr(module, name, wrapped)
    return change

def send(number):
    """Send a signal to the process that is running"""
    return lambda: os.kill(os.getpid(), number)

@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    whole((MAINS[0], flags(data, folder)))
    return folder

def test_training_lowers_the_loss(whole_run):
    rows = [json.loads(line) for line in (whole_run / "seed0" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[2]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert sum(rows[2][f"stage_{i}"] for i in range(1, 5)) == pytest.approx(rows[2]["train_loss"])
    assert (whole_run / "seed0" / "picture.png").read_bytes()[:4] == b"\x89PNG"

def test_a_stopped_run_goes_on_with_the_same_command(data, whole_run, tmp_path):
    """Sent SIGTERM, it saves first; killed, it loses what came after the last checkpoint, whether it trains,
    writes the log, or writes a checkpoint; a damaged checkpoint is named and the one before used."""
    def half_written(module):
        replace = os.replace
        module.os = types.SimpleNamespace(**vars(os))
        module.os.replace = lambda a, b: send(signal.SIGKILL)() if "00024" in str(b) else replace(a, b)
    ways = dict(term=after("learning_rate", 35, send(signal.SIGTERM)),
                kill=after("learning_rate", 35, send(signal.SIGKILL)),
                log=after("append_line", 2, send(signal.SIGKILL)),
                saved=after("save_checkpoint", 2, send(signal.SIGKILL)), half=half_written)
    commands = {name: (MAINS[0], flags(data, tmp_path / name)) for name in (*ways, "damaged")}
    stops = dict(zip(commands, forks(*((*commands[name], ways.get(name, lambda module: None))
                                       for name in commands))))
    assert {name: code for name, (code, _) in stops.items()} == dict(
        dict.fromkeys(ways, -signal.SIGKILL), term=143, damaged=0)
    assert re.search(r"\n.*: error: stopped after 18 of 36 steps; .*\n$", stops["term"][1])
    assert list((tmp_path / "half" / "seed0").glob(".checkpoint.*"))
    newest = tmp_path / "damaged" / "seed0" / "checkpoint-00000036.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    texts = dict(zip(commands, whole(*commands.values())))
    for name, step in dict(term=18, kill=12, log=12, saved=24, half=12, damaged=24).items():
        assert f"continuing after {step} of 36 steps" in texts[name], name
        assert same_weights(final(tmp_path / name), final(whole_run)), name
        assert final(tmp_path / name)["rows"] == final(whole_run)["rows"], name
    assert f"warning: {newest} is missing or damaged" in texts["damaged"]
    of = lambda file, *more: [*flags(data, tmp_path / "term"), f"--resume={file}", *more]
    wrong = {"cannot resume from none.pt": (MAINS[0], of("none.pt")), "another blr": (
        MAINS[0], [*flags(data, tmp_path / "term"), "--blr=0.1"]),
             "another seed": (MAINS[0], of(newest, "--seed=1")), "another script": (MAINS[1], of(newest))}
    for sentence, (code, text) in zip(wrong, forks(*wrong.values())):
        assert code == 2 + ("none.pt" in sentence) and sentence in text, text

def test_full_disk_loses_no_checkpoint(data, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    text = call(MAINS[0], *flags(data, tmp_path), code=1, preexec_fn=limit)
    assert "cannot write" in text and not list((tmp_path / "seed0").glob("*checkpoint*"))

def test_two_processes_train_as_one(data, whole_run, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*torchrun, MAINS[0], *flags(data, tmp_path), "--batch_size=2", "--accum_iter=2"]
    run = subprocess.run(command, env=ENV, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    for ours, theirs in zip(final(tmp_path)["rows"], final(whole_run)["rows"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=5e-3)

def test_processes_report_as_one_and_share_a_stopped_epoch(data, tmp_path):
    """Though one has a clock that runs faster, so that it alone would have a report to make and wait for the
    other with it; and the loss of an epoch is that of all processes, also where it was interrupted."""
    def fast(module):
        clock = lambda: time.perf_counter() * (1 + 1000 * module.RANK)
        module.time = types.SimpleNamespace(**dict(vars(time), perf_counter=clock))
    def fast_and_stopped(module):
        fast(module), after("learning_rate", 29, send(signal.SIGTERM))(module)
    parts = {name: [*flags(data, tmp_path / name), "--batch_size=4"] for name in ("whole", "stopped")}
    first, *_ = whole(*pair(MAINS[0], parts["whole"], fast))
    assert len(re.findall(r"^\|  +0  \|  [\d.]+  \|", first, re.M)) > 3, first
    assert [code for code, _ in forks(*pair(MAINS[0], parts["stopped"], fast_and_stopped))] == [143, 143]
    assert "continuing after 15 of 36" in whole(*pair(MAINS[0], parts["stopped"], fast))[0]
    for ours, theirs in zip(*(final(tmp_path / name)["rows"] for name in parts), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)

def test_all_steps_of_the_ladder_train_the_same(data, whole_run, tmp_path):
    """Through their own loops, data and optimizers, from the command line."""
    wanted = [row["train_loss"] for row in final(whole_run)["rows"]]
    whole(*((path, [*flags(data, tmp_path / path.stem), *["--no-compile"] * (path == MAINS[4])])
            for path in MAINS[1:5]))
    for path in MAINS[1:5]:
        found = [row["train_loss"] for row in final(tmp_path / path.stem)["rows"]]
        assert found == pytest.approx(wanted, abs=5e-3), path.name

def test_compiled_blocks_compute_the_same(data, tmp_path):
    """Two steps of main4, with and without torch.compile, which leaves its code in a folder."""
    def losses(name, *more):
        command = [sys.executable, MAINS[4], *flags(data, tmp_path / name), "--epochs=0.2", *more]
        env = dict(ENV, TORCH_COMPILE_DISABLE="0", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / f"{name}-code"))
        subprocess.run(command, env=env, check=True, capture_output=True)
        return [row["train_loss"] for row in final(tmp_path / name, 2)["rows"]]
    plain, compiled = side_by_side(losses, ("plain", "compiled"), ("--no-compile", "--seed=0"))
    assert compiled == pytest.approx(plain, abs=1e-4)
    code = {name: list(tmp_path.glob(f"{name}-code/**/*.so")) for name in ("plain", "compiled")}
    assert code["compiled"] and not code["plain"]
    assert json.loads((tmp_path / "compiled" / "o.jsonl").read_text())["compiled"]

def test_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    (code, text), = forks((MAINS[0], [*flags(data, tmp_path), "--blr=1e9", "--warmup_epochs=0"]))
    assert code == 1 and re.search(r"the loss is (nan|inf)", text)

def test_wrong_flags(data, tmp_path):
    wrong = ("--batch_size=0", "--mask_ratio=1", "--size=huge", "--epochs=-1", "--runs=0", "--epochs=0.01",
             "--epochs=inf", f"--seed={2 ** 63}")
    common = ["--data", data, "--out", tmp_path / "o", "--batch_size=8"]
    for code, text in forks(*((MAINS[0], [*common, flag]) for flag in wrong)):
        assert code == 2 and text.count("\n") == 1, text

# ---------------------------------------------------------------------- tables
@functools.cache
def text_of(path):
    """sha256 of a script's text below its header"""
    return hashlib.sha256(path.read_text().split('"""', 2)[2].encode()).hexdigest()

def lines_of(path, file, data="cifar10"):
    """Result lines of a script in results/FILE on that data, oldest first; of lines with the same settings on
    the same machine those of the script's present text, or else those of the text that was measured last."""
    lines, groups = [line for line in read_results("vitfreeze") if line["file"] == f"{file}.jsonl"], {}
    lines = [line for line in lines if line["script"] == path.name and line["data"] == data]
    lines = sorted((line for line in lines if not line["dry_run"]), key=lambda line: line["utc"])
    key = lambda line: json.dumps([line["hyp"], machine(line)])
    for line in lines:
        groups.setdefault(key(line), []).append(line["sha256"])
    texts = {name: text_of(path) if text_of(path) in group else group[-1] for name, group in groups.items()}
    return [line for line in lines if line["sha256"] == texts[key(line)]]

def named(path, lines):
    """The script's name, with a mark where a line is of an earlier text of it."""
    return f"`{path.name}`" + " (†)" * any(line["sha256"] != text_of(path) for line in lines)

def ladder_rows():
    """A row per step: speed on a CPU against the step before, as pairs of runs made in turns; on a GPU speed
    of ViT-B and its share of what matmuls alone would allow."""
    rows = [["Script", "Adds", "Diff", "Images/s, CPU", "Step, ms", "against the step before (pairs)",
             "Peak MiB", "Machine", "Images/s, ViT-B, GPU", "Median step, ms",
             "% of the matmul rate", "Peak GiB", "Machine"]]
    for before, path in zip([None] + MAINS, MAINS[:5]):
        lines, ratio, measured = lines_of(path, "speed", "synthetic"), "", ["not measured"] * 5
        assert len({json.dumps([line["hyp"], machine(line)]) for line in lines}) <= 1, "speeds do not compare"
        if before:
            both = zip(lines_of(before, "speed", "synthetic"), lines, strict=True)
            pairs = [new["images_per_s"] / old["images_per_s"] for old, new in both]
            ratio = f"{mean_std(pairs, 2)} ({len(pairs)})" if pairs else "not measured"
        if lines:
            measured = [mean_std([line["images_per_s"] for line in lines], 0),
                        mean_std([line["step_ms_p50"] for line in lines], 0), ratio,
                        f"{max(line['peak_mib'] for line in lines):.0f}", machine(lines[-1])]
        large, fast = lines_of(path, "base", "synthetic"), ["not measured"] * 5
        if large:
            fast = [mean_std([line["images_per_s"] for line in large], 0),
                    mean_std([line["step_ms_p50"] for line in large], 0),
                    mean_std([line["mfu"] for line in large], 1, 100),
                    f"{max(line['peak_mib'] for line in large) / 1024:.1f}", machine(large[-1])]
        diff = "+{} -{}".format(*changed_lines(before, path)) if before else ""
        adds = docstring(path)["Adds"].removeprefix("the baseline: ")
        rows.append([named(path, lines + large), adds, diff, *measured, *fast])
    return rows

def kernels():
    """Check the kernels on this GPU against plain forms, time both, and add JSON lines to kernels.jsonl."""
    from triton.testing import do_bench
    torch.manual_seed(0)
    gpu, out = torch.device("cuda"), HERE / "results" / "kernels.jsonl"
    def measure(name, size, ways):
        """ways: {name: (function, bytes that it must move)}"""
        for way, (function, moved) in ways.items():
            low, middle, high = do_bench(function, quantiles=(0.2, 0.5, 0.8))
            line = dict(script="test_vitfreeze.py", kernel=name, size=size, way=way, ms=middle, ms_20=low,
                        ms_80=high, gb_per_s=moved / middle / 1e6, **BASE.environment(gpu))
            print(json.dumps(line), flush=True)
            BASE.append_line(out, dict(line, device="cuda"))
    blank = torch.empty(1 << 30, dtype=torch.uint8, device=gpu)
    measure("copy", "1 GiB", dict(torch=(lambda: blank.clone(), 2 << 30)))
    for side, cell, scale in ((224, 4, 4), (32, 2, 2)):
        images = torch.randint(256, (2048, 3, side, side), dtype=torch.uint8, device=gpu)
        sides = LAST.bin_sides(9).to(gpu)
        levels = LAST.hog(images, cell, sides, scale)
        for ours, plain in zip(levels, LAST.hog_plain(images, cell, sides, scale)):
            torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
        moved = images.numel() + 4 * sum(level.numel() for level in levels)
        measure("hog", f"2048 images of {side}", dict(
            triton=(lambda: LAST.hog(images, cell, sides, scale), moved),
            main0=(lambda: [BASE.hog(images, cell << i, 9) for i in range(4)], moved)))
    for n_rows, n_cols in ((2048 * 50, 768), (2048 * 197, 256), (1024 * 17, 192)):
        x, branch = torch.randn(2, n_rows, n_cols, device=gpu)
        branch, norm = branch.bfloat16(), torch.nn.LayerNorm(n_cols, eps=1e-6, device=gpu)
        def plain(x, branch):
            s = x + branch
            return s, norm(s).bfloat16()
        def ours(x, branch):
            with torch.autocast("cuda", torch.bfloat16):
                return NORMS.add_norm(x, branch, norm)
        def both_ways(function):
            inputs = x.clone().requires_grad_(), branch.clone().requires_grad_()
            def run():
                s, y = function(*inputs)
                torch.autograd.backward((s, y), (x, branch))
            return run
        for one, two in zip(ours(x, branch), plain(x, branch)):
            torch.testing.assert_close(one.float(), two.float(), atol=2e-2, rtol=1e-2)
        forms = dict(triton=ours, eager=plain, inductor=torch.compile(plain))
        measure("add and norm, forward", f"{n_rows} x {n_cols}", {
            name: (lambda form=form: form(x, branch), x.numel() * 12) for name, form in forms.items()})
        measure("add and norm, forward and backward", f"{n_rows} x {n_cols}", {
            name: (both_ways(form), x.numel() * 28) for name, form in forms.items()})

def freezing_rows():
    """A row per step that freezes layers."""
    return [["Script", "Adds", "Diff"]] + [
        [f"`{path.name}`", docstring(path)["Adds"], "+{} -{}".format(*changed_lines(before, path))]
        for before, path in zip(MAINS[4:], MAINS[5:])]

def freezing_runs():
    """[(script, schedule, [(line of a run, that without freezing of its round)])], by size and machine"""
    ways = {}
    for path in MAINS[5:]:
        lines = lines_of(path, "saving", "synthetic")
        key = lambda line: (path, line["hyp"]["size"], machine(line), line["sha256"])
        whole = {(key(line), line["runs"][0]["seed"]): line for line in lines if line["hyp"]["t_0"] == 1}
        for line in lines:
            if line["hyp"]["t_0"] < 1:
                modes = [mode for mode in ("keep_graph", "dont_freeze_pe") if line["hyp"][mode]]
                way = " ".join(map(str, (line["hyp"]["how_scale"], line["hyp"]["t_0"], *modes)))
                other = whole[key(line), line["runs"][0]["seed"]]
                ways.setdefault((*key(line), way), []).append((line, other))
    ways = sorted(ways.items(), key=lambda item: (MAINS.index(item[0][0]), item[0][1:]))
    return [(path, way, pairs) for (path, *_, way), pairs in ways]

def saving_rows():
    """A row per way to freeze: time and FLOPs against the same run without freezing, round by round."""
    rows = [["Script", "Size", "Schedule", "FLOPs saved %", "Time saved % (rounds)", "Machine"]]
    for path, way, pairs in freezing_runs():
        saved, line = [1 - line["time_mean"] / whole["time_mean"] for line, whole in pairs], pairs[-1][0]
        flops = 1 - line["pflops"] / line["pflops_nominal"]
        rows.append([named(path, [line]), line["hyp"]["size"], way, f"{100 * flops:.1f}",
                     f"{mean_std(saved, 1, 100)} ({len(saved)})", machine(line)])
    return rows

def staircase_rows():
    """A row per way to freeze in main5: time of each epoch, of that without freezing, and what FLOPs say."""
    rows = [["Size", "Schedule", "", *(f"Epoch {epoch}" for epoch in range(1, 6)), "Machine"]]
    for path, way, pairs in freezing_runs():
        line, module = pairs[-1][0], load(path)
        if path != MAINS[5]:
            continue
        shares = [[mine / other for mine, other in zip(*(
            run["runs"][0]["epoch_images_per_s"] for run in (whole, line)))] for line, whole in pairs]
        per_epoch = 5000 // line["hyp"]["batch_size"]  # of the built-in set
        with settings(module, **line["hyp"]):
            costs = [module.train_flops(module.freeze_level(step, per_epoch)) / module.train_flops()
                     for step in range(5 * per_epoch)]
        formula = [sum(costs[epoch * per_epoch:][:per_epoch]) / per_epoch for epoch in range(5)]
        rows.append([line["hyp"]["size"], way, f"time ({len(pairs)})",
                     *(mean_std(epoch, 2) for epoch in zip(*shares)), machine(line)])
        rows.append([line["hyp"]["size"], way, "FLOPs", *(f"{share:.2f}" for share in formula), ""])
    return rows

def written(value):
    """A hyperparameter as on the command line"""
    return f"{value:g}" if isinstance(value, float) else str(value)

def spread(values):
    """(mean, standard deviation, 0 of a single value, and both as text), without the interval that takes the
    mean_std of test_smoke a fifth of a second"""
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return mean, std, f"{mean:.1f}" + f" ± {std:.1f}" * (len(values) > 1)

@functools.cache
def quantile(df):
    """That Student's t exceeds with a probability of 2.5 %"""
    mean, std, (_, high), _ = BASE.statistics(range(df + 1), 0)
    return (high - mean) / std * (df + 1) ** 0.5

RUNS, LENGTH = dict(size="micro", batch_size=32, blr=4e-3), 1.0  # hyperparameters and epochs of the frontier

def frontier():
    """{(script, epochs, flags): [(line, run)]} of CIFAR-10, from results/frontier.jsonl, in ladder order"""
    found = {}
    for path in MAINS[4:]:
        for line in lines_of(path, "frontier"):
            epochs = line["hyp"]["epochs"]
            normal = dict(hyp(path), **RUNS, epochs=epochs, warmup_epochs=epochs / 10)
            normal.update(save_epochs=line["hyp"]["save_epochs"])
            own = {name: written(value) for name, value in line["hyp"].items()
                   if written(normal[name]) != written(value)}
            flags = " ".join(f"--{name}" + f" {value}" * (value != "True") for name, value in own.items())
            found.setdefault((path, epochs, flags), []).extend((line, run) for run in line["runs"])
    return found

def frontier_rows():
    """A row per setting: FLOPs and k-NN, and how far, seed by seed, above main4 at as many FLOPs."""
    rows, found = [["Script", "Epochs", "Flags", "TFLOPs", "20-NN % patch mean, centred", "runs",
                    "above main4 of as many TFLOPs (pairs)", "Machine"]], frontier()
    for (path, epochs, flags), runs in found.items():
        cost = 1000 * sum(line["pflops"] for line, _ in runs) / len(runs)
        control = control_scores(cost, found) if flags or path != MAINS[4] else {}
        points = [100 * run["acc"] - control[run["seed"]] for _, run in runs if run["seed"] in control]
        rows.append([named(path, [line for line, _ in runs]), f"{epochs:g}", flags, f"{cost:.1f}",
                     spread([100 * run["acc"] for _, run in runs])[2], str(len(runs)),
                     f"{spread(points)[2]} ({len(points)})" if points else "", machine(runs[-1][0])])
    return rows

def frontier_svg():
    """Picture of the table of settings: k-NN against FLOPs, numbered as in the list at its side."""
    points = []  # name, script's number, TFLOPs, mean, std, whether it is a length of main4
    for (path, epochs, flags), runs in frontier().items():
        mean, std, _ = spread([100 * run["acc"] for _, run in runs])
        cost, name = 1000 * sum(line["pflops"] for line, _ in runs) / len(runs), path.stem.split("_")[0]
        name += f" {flags}" * bool(flags) + f", {epochs:g} epoch{'s' * (epochs != 1)}" * (epochs != LENGTH)
        points.append((name, MAINS.index(path), cost, mean, std, path == MAINS[4] and not flags))
    height, lines = max(500, 40 + 15 * len(points)), []
    def write(x, y, text, more=""):
        text = text.replace("<", "&lt;")
        lines.append(f'<text x="{x:.1f}" y="{y:.1f}"{more}>{text}</text>')
    def draw(x1, y1, x2, y2, colour, width=1.0):
        lines.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
                     f'stroke-width="{width}"/>')
    def axis(values, start, end):
        """(function from values to places, ticks)"""
        low, high = min(values), max(values)
        low, high = low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3
        step = 10 ** math.floor(math.log10(high - low))
        step *= next(part for part in (0.2, 0.5, 1) if (high - low) / (step * part) <= 10)
        ticks = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return lambda value: start + (value - low) / (high - low) * (end - start), ticks
    if points:
        place_x, ticks_x = axis([point[2] for point in points], 60, 580)
        place_y, ticks_y = axis([mean + side * std for *_, mean, std, _ in points for side in (-1, 1)],
                                height - 90, 40)
        for tick in ticks_x:
            draw(place_x(tick), 40, place_x(tick), height - 90, "#ddd")
            write(place_x(tick), height - 74, f"{tick:g}", ' text-anchor="middle"')
        for tick in ticks_y:
            draw(60, place_y(tick), 580, place_y(tick), "#ddd")
            write(54, place_y(tick) + 4, f"{tick:g}", ' text-anchor="end"')
        control = sorted(point[2:4] for point in points if point[5])
        for one, two in zip(control, control[1:]):
            draw(place_x(one[0]), place_y(one[1]), place_x(two[0]), place_y(two[1]), "#000", 1.5)
    taken = [(place_x(point[2]), place_y(point[3])) for point in points]
    for number, (name, script, cost, mean, std, is_control) in enumerate(points, 1):
        colour = "#000" if is_control else f"hsl({47 * script % 360},80%,{34 + 8 * (script % 2)}%)"
        x, y, row = place_x(cost), place_y(mean), 40 + 15 * (number - 1)
        draw(x, place_y(mean - std), x, place_y(mean + std), colour)
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        spots = [(x + far * math.cos(turn / 8 * math.pi), y + far * math.sin(turn / 8 * math.pi))
                 for far in (11, 18, 26, 36) for turn in range(16)]
        room = [min(max(abs(a - c) / 13, abs(b - d) / 10) for c, d in taken) for a, b in spots]
        spot = next((spot for spot, free in zip(spots, room) if free >= 1), spots[room.index(max(room))])
        taken.append(spot)
        math.dist(spot, (x, y)) > 12 and draw(x, y, *spot, "#bbb", 0.5)
        write(spot[0], spot[1] + 4, str(number), f' text-anchor="middle" fill="{colour}"')
        write(612, row + 4, str(number), f' text-anchor="end" fill="{colour}"')
        write(620, row + 4, name)
    points or write(60, 60, "Nothing was measured yet.")
    write(60, 20, "20-NN %, patch mean, centred, against TFLOPs of a run (CIFAR-10, size micro, an epoch)")
    write(60, height - 46, "FLOPs stand for time, as runs shared the machine. Bars: standard deviation")
    write(60, height - 30, "over seeds. Black line: main4 with other numbers of epochs, the control of all.")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}" font-family="sans-serif" '
            f'font-size="11"><rect width="900" height="{height}" fill="#fff"/>\n' + "\n".join(lines)
            + "\n</svg>\n")

# ---------------------------------------------------------------------- questions
CONTROL = "main4 of as many FLOPs"
def rung(number, flags="", epochs=LENGTH):
    """A setting of the table of accuracy against FLOPs"""
    return f"main{number}", flags, epochs

QUESTIONS = [  # what is asked, and pairs of settings: yes means that the first is better than the second
    ("Do stages at several depths allow early freezing, against main4 of as many FLOPs? (O1, Q1)",
     [(rung(5, f"--t_0 {t_0}"), CONTROL) for t_0 in (0.35, 0.5, 0.65)] + [(rung(5), CONTROL)]),
    ("Does FreezeOut's learning rate per layer harm, so that others do better? (O2)",
     [(other, rung(5)) for other in (rung(6), rung(5, "--not_scale_lr"), rung(5, "--non_layerwise_lr"))]),
    ("Does training twice as long help? (O3)",
     [(rung(4, epochs=epochs), rung(4, epochs=epochs / 2)) for epochs in (2.0, 1.0)]),
    ("Do losses fall from fine to coarse stages, as 4 : 3 : 2 : 1? (O4)", "sizes"),
    ("Are weights of 1/4, 1/3, 1/2, 1 from fine to coarse stages better than equal ones? And 1 / loss? (O5)",
     [(rung(8), rung(7)),  # main7 has equal ones
      (rung(8, "--stage_weights equalised", 3.0), rung(7, epochs=3.0))]),  # by the losses of the last epoch
    ("Is a constant learning rate with a short decay better than a cosine, without freezing? (O6, T7)",
     [(rung(7, "--t_0 1"), rung(4))]),
    ("Does freezing beat stopping early, as main4 of as many FLOPs does? (O7)",
     [(rung(number), CONTROL) for number in range(5, 12)]),
    ("Do runs still gain by their last quarter, without and with freezing, so that neither peaks early? (Q2)",
     [(rung(number), rung(number, epochs=0.75)) for number in (4, 5)]),
    ("Do other t_0 than 0.8 do better with one learning rate for all layers? (T1)",
     [(rung(6, f"--t_0 {t_0}"), rung(6)) for t_0 in (0.6, 0.7, 0.9)] + [(rung(4), rung(6))]),
    ("Does a stage on every block help? (T2)",
     [(rung(9, flags), rung(8, flags)) for flags in ("", "--t_0 0.5")]),
    ("Does another task for the finest stage help: pixels? (T3)", [(rung(13), rung(12))]),
    ("Does a ramp of the weights from fine to coarse stages help? (T4)",
     [(rung(8, "--stage_weights ramp", 3.0), rung(7, epochs=3.0))]),  # from epoch to epoch
    ("Does self-distillation help? (T5)", [(rung(14), rung(13))]),
    ("Does skipping layers at random help? (T6)", [(rung(15), rung(14))]),
    ("Does freezing in fine-tuning, where it saves time, help? (T8)",
     [(("finetune_freeze", ""), ("finetune", ""))]),
    ("Do heads at several depths help fine-tuning? (T9)", [(("finetune_multi", ""), ("finetune", ""))]),
    ("Does a higher mask ratio help? (T10)",
     [(rung(4, f"--mask_ratio {ratio}"), rung(4)) for ratio in (0.85, 0.9)]),
    ("Do masks that get harder with time help? (T11)", [(rung(16), rung(15))]),
    ("Does another learning rate help the linear probe? (T12)",
     [(("linprobe", f"--blr {blr}"), ("linprobe", "--blr 1")) for blr in (0.5, 2)]),
    ("Are features better targets than HOG, and better inputs, too, than images? (T13)",
     [(rung(11, flags), rung(11, "--latent off")) for flags in ("", "--latent both")]),
    ("Do frozen features that are stored and used again, of one view of each image, help? (T13)",
     [(rung(10, "--t_0 0.5 --views 1", 3.0), rung(9, "--t_0 0.5", 3.0))]),  # stored in the second epoch
    ("Does freezing by plasticity beat freezing by a schedule?",
     [(rung(12, epochs=3.0), rung(11, epochs=3.0))]),  # the first plasticity is that of two epochs
    ("Does a class token that trains to the end help, or a lower rate for lower layers in fine-tuning? (N1)",
     [(rung(5, "--keep_graph"), rung(5)),
      (("finetune", "--layer_decay 0.75"), ("finetune", "--layer_decay 1"))]),
    ("Does a patch embedding that never freezes help, or no warm-up? (N2)",
     [(rung(5, flags), rung(5)) for flags in ("--dont_freeze_pe", "--warmup_epochs 0")])]

def scores(setting, found):
    """({seed: 20-NN % of its last run}, mean TFLOPs or None) of a setting of a mainN"""
    name, flags, epochs = setting
    runs = found.get((MAINS[int(name[4:])], epochs, flags), [])
    costs = [1000 * line["pflops"] for line, _ in runs]
    return {run["seed"]: 100 * run["acc"] for _, run in runs}, sum(costs) / len(costs) if costs else None

def between(cost, lengths):
    """{seed: %} of main4 at that many TFLOPs, or {}, from ({seed: %}, TFLOPs) of some of its lengths"""
    lengths = sorted(lengths, key=lambda length: length[1])
    costs = [length[1] for length in lengths]
    if cost is None or not costs or not costs[0] <= cost <= 1.001 * costs[-1]:
        return {}
    seeds = set.intersection(*({*values} for values, _ in lengths))
    return {seed: float(np.interp(cost, costs, [values[seed] for values, _ in lengths])) for seed in seeds}

def control_scores(cost, found):
    """{seed: 20-NN % of main4, between its lengths, at that many TFLOPs}"""
    return between(cost, [scores((name.stem.split("_")[0], flags, epochs), found)
                          for name, epochs, flags in found if name == MAINS[4] and not flags])

def downstream_scores(one, two):
    """[({(checkpoint, seed): %}, TFLOPs)] of both settings, of lines that agree in all else, the checkpoint
    too, of those from checkpoints that differ by their seed alone; most runs, then latest"""
    groups, (own, others) = {}, (dict(re.findall(r"--(\w+) (\S+)", flags)) for _, flags in (one, two))
    lines = [[line for line in lines_of(HERE / f"{name}.py", name) if line["hyp"].get("pretrained") and all(
        written(line["hyp"][key]) == value for key, value in wanted.items())]
        for (name, _), wanted in ((one, own), (two, others))]
    for line, other in ((line, other) for line in lines[0] for other in lines[1]):
        shared = (line["hyp"].keys() & other["hyp"].keys()) - own.keys() - others.keys()
        if all(line["hyp"][key] == other["hyp"][key] for key in shared):
            source = line["hyp"]["pretrained"]
            kind = {key: value for key, value in source.items() if key not in ("seed", "sha256")}
            key = json.dumps([kind, {key: line["hyp"][key] for key in sorted(shared - {"pretrained"})}])
            pair = groups.setdefault(key, [({}, 1000 * part["pflops"]) for part in (line, other)])
            for (values, _), part in zip(pair, (line, other)):
                values.update({(source["sha256"], run["seed"]): 100 * run["acc"] for run in part["runs"]})
    return max(reversed(groups.values()), default=[({}, None)] * 2, key=lambda pair: len(
        pair[0][0].keys() & pair[1][0].keys()))

def compared(one, two, found):
    """(points of the first setting above the second, seed by seed; a note on FLOPs where they differ)"""
    if not one[0].startswith("main"):
        (values, cost), (others, before) = downstream_scores(one, two)
    else:
        values, cost = scores(one, found)
        others, before = (control_scores(cost, found), cost) if two == CONTROL else scores(two, found)
    differ = cost and before and abs(cost / before - 1) > 0.005
    note = f", {cost:.1f} against {before:.1f} TFLOPs" if differ else ""
    note = ", no main4 of as many FLOPs" if values and not others and two == CONTROL else note
    return [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())], note

def verdict(points):
    """Yes or no by the 95 % t-interval of the mean of paired differences"""
    if not points:
        return "not measured"
    mean, std, _ = spread(points)
    half = quantile(len(points) - 1) * std / len(points) ** 0.5 if len(points) > 1 else math.inf
    if abs(mean) <= half:
        return f"no difference shown at n = {len(points)}"
    return f"{'yes' if mean > 0 else 'no'}: {mean:+.1f} points"

def command_of(setting):
    name, flags, epochs = (*setting, LENGTH)[:3]
    path, = HERE.glob(f"{name}_*.py") if name.startswith("main") else [HERE / f"{name}.py"]
    return " ".join(filter(None, (path.name, flags, "" if epochs == LENGTH else f"--epochs {epochs:g}")))

def sizes_row():
    """Commands, number and answer on the losses of main4's four stages at the end of its runs"""
    runs = [run for _, run in frontier().get((MAINS[4], LENGTH, ""), [])]
    losses = [[run["epochs"][-1][f"stage_{i}"] for i in range(1, 5)] for run in runs]
    if not losses:
        return "not measured", "not measured"
    means = [sum(column) / len(losses) for column in zip(*losses)]
    falling = "yes" if all(row == sorted(row, reverse=True) for row in losses) else "no"
    ratio = " : ".join(f"{mean / means[-1]:.1f}" for mean in means)
    return ", ".join(f"{mean:.4f}" for mean in means) + f" ({len(runs)})", f"{falling}: {ratio}"

def questions_rows():
    """A row per question: differences of paired runs, and what their 95 % intervals say."""
    rows, found = [["Question", "Command", "Number (pairs)", "Answer"]], frontier()
    for question, pairs in QUESTIONS:
        if pairs == "sizes":
            rows.append([question, f"`{command_of(rung(4))}`", *sizes_row()])
            continue
        firsts, seconds = ([*dict.fromkeys(part)] for part in zip(*pairs))
        commands = ["; ".join(f"`{command_of(setting)}`" for setting in part if setting != CONTROL)
                    for part in (firsts, seconds)]
        numbers, answers = [], []
        for one, two in pairs:
            name, *own = command_of(one).split(" ", 1)
            label = f"`{own[0] if own else one[0]}`: " if len(pairs) > 1 else ""
            points, note = compared(one, two, found)
            number = f"{spread(points)[2]} ({len(points)})" if points else "not measured"
            numbers.append(label + number + note)
            answers.append(label + verdict(points))
        missing = all(answer.endswith("not measured") for answer in answers + numbers)
        results = ["not measured"] * 2 if missing else ["; ".join(numbers), "; ".join(answers)]
        rows.append([question, " against ".join(filter(None, commands)), *results])
    return rows

# ---------------------------------------------------------------------- runs and votes
KINDS = "gap", "gap centred", "cls", "cls centred"

def learning_rows():
    """A row per training run on CIFAR-10 in results/mainN.jsonl."""
    rows = [["Script", "Size", "Epochs", "Images a step", "Loss after epoch 1", "at the end (stages)",
             "20-NN % patch mean", "centred", "class token", "centred", "Machine"]]
    for _, path in scripts("vitfreeze"):
        for line in lines_of(path, path.stem) if path.name.startswith("main") else []:
            for run in line["runs"]:
                first, last = run["epochs"][0], run["epochs"][-1]
                stages = " + ".join(f"{last[f'stage_{i}']:.4f}" for i in range(1, 5))
                votes = [f"{100 * run['knn'][kind]['20'][0]:.1f}" for kind in KINDS]
                hyp = line["hyp"]
                rows.append([named(path, [line]), hyp["size"], f"{hyp['epochs']:g}",
                             str(hyp["batch_size"] * hyp["accum_iter"] * line["processes"]),
                             f"{first['train_loss']:.3f}", f"{last['train_loss']:.3f} ({stages})", *votes,
                             machine(line)])
    return rows

def origin(line):
    """Where the features of a line of k-NN, probe or fine-tuning come from."""
    source = line["checkpoint"] if "checkpoint" in line else line["hyp"]["pretrained"]
    if line["hyp"].get("features", "encoder") != "encoder":
        return dict(hog="HOG of 4 x 4 cells", pixels="pixels")[line["hyp"]["features"]]
    return f"{line['hyp']['size']}, " + (
        f"`{source['script']}`, {source['epochs']:g} epochs" if source else "random weights")

def groups_of(path, key):
    """{key of the line: [(line, run)]} of a script, oldest first."""
    groups = {}
    for line in lines_of(path, path.stem):
        groups.setdefault(key(line), []).extend((line, run) for run in line["runs"])
    return groups

def votes_rows():
    """A row per kind of features: k-NN."""
    rows = [["Script", "Features", "20-NN % patch mean", "centred", "class token", "centred", "runs"]]
    path = HERE / "knn.py"
    for name, group in groups_of(path, origin).items():
        cells, raw = [], group[0][0]["hyp"]["features"]
        for kind in KINDS:
            wanted = kind if raw == "encoder" else kind.replace("gap", raw)
            votes = [row["top1"] for _, run in group for row in run["epochs"]
                     if row["k"] == 20 and row["features"] == wanted]
            cells.append(mean_std(votes, 1, 100) if votes else "")
        rows.append([named(path, [line for line, _ in group]), name, *cells, str(len(group))])
    return rows

def probes_rows():
    """A row per script and encoder: accuracy of linear probe or fine-tuning, seed by seed against random, and
    against main4 of as many FLOPs of pre-training, as the table of settings has them."""
    rows = [["Script", "Epochs", "Images a step", "Encoder", "Accuracy %", "runs",
             "less that of random weights (pairs)", "less that after main4 of as many TFLOPs (pairs)",
             "Machine"]]
    costs = {f"{RUNS['size']}, `{path.name}`, {epochs:g} epochs": 1000 * float(
        np.mean([line["pflops"] for line, _ in runs]))
        for (path, epochs, flags), runs in frontier().items() if not flags}
    for path in (HERE / "linprobe.py", HERE / "finetune.py"):
        def settings_of(line):
            return json.dumps({key: value for key, value in line["hyp"].items() if key != "pretrained"})
        groups = groups_of(path, lambda line: (settings_of(line), origin(line)))
        groups = {key: [*{run["seed"]: (line, run) for line, run in group}.values()]  # the last of each seed
                  for key, group in groups.items()}
        scores = {key: {run["seed"]: run["acc"] for _, run in group} for key, group in groups.items()}
        for (settings_, name), group in groups.items():
            accs = scores[settings_, name]
            random = scores.get((settings_, f"{group[0][0]['hyp']['size']}, random weights"), {})
            control = {} if MAINS[4].name in name else between(costs.get(name), [
                (values, costs[other]) for (same, other), values in scores.items()
                if same == settings_ and MAINS[4].name in other and other in costs])
            points = [[accs[seed] - values[seed] for seed in sorted(accs.keys() & values.keys())]
                      for values in (random if random is not accs else {}, control)]
            values, usual = json.loads(settings_), json.loads(next(iter(groups))[0])
            told = ["epochs", "warmup_epochs", "batch_size"]  # by columns, blr where it goes with the batch
            told += ["blr"] * (values["batch_size"] != usual["batch_size"])
            own = "".join(f" `--{key} {written(value)}`" for key, value in values.items()
                          if key not in told and usual[key] != value)
            rows.append([named(path, [line for line, _ in group]) + own, f"{values['epochs']:g}",
                         str(values["batch_size"] * values["accum_iter"]), name,
                         mean_std([*accs.values()], 2, 100), str(len(accs)),
                         *(f"{mean_std(part, 2, 100)} ({len(part)})" if part else "" for part in points),
                         machine(group[-1][0])])
    return rows

def result_line(path, values, accs, tflops, file="frontier"):
    """A line as a script writes it, of runs of seeds 0, 1 and so on"""
    stages = {f"stage_{i}": 0.08 / i for i in range(1, 5)}
    runs = [dict(acc=acc, seed=seed, epochs=[stages]) for seed, acc in enumerate(accs)]
    return dict(file=f"{file}.jsonl", script=path.name, data="cifar10", dry_run=False, utc="", sha256="",
                hyp=dict(hyp(path), **values), pflops=tflops / 1000, runs=runs, device="cpu", cpu="x",
                cpu_threads=2, torch="y")

def frontier_line(number, accs, tflops, epochs=LENGTH, **own):
    values = dict(RUNS, epochs=epochs, warmup_epochs=epochs / 10)
    return result_line(MAINS[number], dict(values, **own), accs, tflops)

def tuning_line(name, accs, checkpoint="a", step=1, **own):
    source = dict(step=step, seed=ord(checkpoint), sha256=checkpoint)
    return result_line(HERE / f"{name}.py", dict(own, pretrained=source), accs, 5.0, name)

def test_probes_are_compared_with_the_control(monkeypatch):
    """main5 costs as much as a run of main4 halfway between its two lengths would; others have no control."""
    def line(name, script, accs, epochs=LENGTH, **own):
        source = script and dict(script=script, epochs=epochs, seed=0, sha256="")
        values = dict(hyp(HERE / f"{name}.py"), pretrained=source, **dict(RUNS, **own))
        return result_line(HERE / f"{name}.py", values, accs, 5.0, name)
    monkeypatch.setitem(lines_of.__globals__, "read_results", lambda ladder: [
        frontier_line(4, [0.3], 10.0, 0.5), frontier_line(4, [0.3], 20.0), frontier_line(5, [0.3], 15.0),
        frontier_line(6, [0.3], 25.0), line("linprobe", None, [0.1, 0.2, 0.3]),
        line("linprobe", MAINS[4].name, [0.40, 0.50], 0.5), line("linprobe", MAINS[4].name, [0.50, 0.70]),
        line("linprobe", MAINS[5].name, [0.46, 0.58, 0.9]), line("linprobe", MAINS[6].name, [0.9]),
        line("linprobe", MAINS[5].name, [0.9], weight_decay=0.5), line("linprobe", None, [0.8], blr=2.0),
        line("linprobe", None, [0.8], blr=2.0, batch_size=9)])
    assert [row[3:8] for row in probes_rows()[1:]] == [
        ["micro, random weights", "20.00 ± 10.00", "3", "", ""],
        ["micro, `main4_compile.py`, 0.5 epochs", "45.00 ± 7.07", "2", "30.00 ± 0.00 (2)", ""],
        ["micro, `main4_compile.py`, 1 epochs", "60.00 ± 14.14", "2", "45.00 ± 7.07 (2)", ""],
        ["micro, `main5_freezeout.py`, 1 epochs", "64.67 ± 22.74", "3", "44.67 ± 13.32 (3)",
         "-0.50 ± 2.12 (2)"],
        ["micro, `main6_globallr.py`, 1 epochs", "90.00", "1", "80.00 (1)", ""],
        ["micro, `main5_freezeout.py`, 1 epochs", "90.00", "1", "", ""],
        *[["micro, random weights", "80.00", "1", "", ""]] * 2]
    assert [row[0][18:] for row in probes_rows()[-3:]] == ["`--weight_decay 0.5`", "`--blr 2`", ""]

def test_the_last_probe_of_a_seed_counts(monkeypatch):
    """An encoder trained again has another checkpoint, but is the same one to the reader of the table."""
    path = HERE / "linprobe.py"
    def line(accs, text, utc):
        source = dict(script=MAINS[4].name, epochs=1.0, seed=0, sha256=text)
        values = dict(hyp(path), size="micro", pretrained=source)
        return dict(result_line(path, values, accs, 5.0, "linprobe"), sha256=text, utc=utc)
    lines = [line([0.3, 0.4], text_of(path), "1"), line([0.1, 0.2], "older", "0")]
    monkeypatch.setitem(lines_of.__globals__, "read_results", lambda ladder: lines)
    assert [row[:1] + row[4:6] for row in probes_rows()[1:]] == [["`linprobe.py`", "35.00 ± 7.07", "2"]]
    lines[1]["runs"].append(dict(lines[1]["runs"][0], seed=2, acc=0.5))
    assert [row[:1] + row[5:6] for row in probes_rows()[1:]] == [["`linprobe.py` (†)", "3"]]

def test_lines_of_the_present_text_take_the_place_of_others(monkeypatch):
    lines = [dict(frontier_line(6, [acc], 10.0, epochs), sha256=text, utc=utc) for acc, epochs, text, utc in (
        (0.1, 1.0, "other", "2"), (0.2, 1.0, "older", "0"), (0.3, 1.0, text_of(MAINS[6]), "1"),
        (0.4, 2.0, "old", "4"), (0.5, 2.0, "older", "3"), (0.6, 2.0, "old", "5"))]
    monkeypatch.setitem(lines_of.__globals__, "read_results", lambda ladder: lines)
    assert [line["runs"][0]["acc"] for line in lines_of(MAINS[6], "frontier")] == [0.3, 0.4, 0.6]
    assert [row[:4:3] for row in frontier_rows()[1:]] == [["`main6_globallr.py`", "10.0"],
                                                          ["`main6_globallr.py` (†)", "10.0"]]

def test_control_is_drawn_between_the_lengths_of_main4(monkeypatch):
    lines = [frontier_line(4, [0.4, 0.42], 20.0, 4.0), frontier_line(4, [0.5], 40.0, 8.0),
             frontier_line(5, [0.43], 30.0, how_scale="linear"), frontier_line(5, [0.6], 50.0)]
    monkeypatch.setitem(lines_of.__globals__, "read_results", lambda ladder: lines)
    assert [row[1:7] for row in frontier_rows()[1:]] == [
        ["4", "", "20.0", "41.0 ± 1.4", "2", ""], ["8", "", "40.0", "50.0", "1", ""],
        ["1", "--how_scale linear", "30.0", "43.0", "1", "-2.0 (1)"], ["1", "", "50.0", "60.0", "1", ""]]

def test_every_question_of_the_notes_has_commands_that_exist():
    tags = re.findall(r"[OQTN]\d+", " ".join(question for question, _ in QUESTIONS))
    assert {*tags} == {f"{kind}{i}" for kind, last in zip("OQTN", (7, 2, 13, 2)) for i in range(1, last + 1)}
    for setting in itertools.chain(*(pair for _, pairs in QUESTIONS if pairs != "sizes" for pair in pairs)):
        if setting != CONTROL:
            name, *wanted = command_of(setting).split()
            load(HERE / name).flag_parser().parse_args(wanted)

def test_questions_are_answered_by_intervals(monkeypatch):
    """The 95 % interval of three pairs is the mean and 4.303 / 3 ** 0.5 standard deviations on each side."""
    def answers(*lines):
        monkeypatch.setitem(lines_of.__globals__, "read_results", lambda ladder: list(lines))
        return {re.sub(r".*\((.*)\)$", r"\1", row[0]): row[2:] for row in questions_rows()[1:]}
    assert {*itertools.chain(*answers().values())} == {"not measured"}
    found = answers(
        frontier_line(4, [0.40, 0.41, 0.42], 20.0), frontier_line(4, [0.30, 0.31, 0.32], 10.0, 0.5),
        frontier_line(5, [0.37, 0.382, 0.388], 16.0), frontier_line(5, [0.33, 0.36, 0.33], 12.0, t_0=0.5),
        frontier_line(5, [0.5] * 3, 9.0, t_0=0.35), frontier_line(5, [0.9], 30.0, warmup_epochs=0.0),
        frontier_line(6, [0.36, 0.37, 0.376], 16.0), frontier_line(5, [0.1] * 3, 16.0, 4.0),
        tuning_line("finetune", [0.5, 0.6, 0.7]), tuning_line("finetune", [0.1] * 3, "b"),
        tuning_line("finetune_freeze", [0.52, 0.61]), tuning_line("finetune_freeze", [0.9], mixup=0.0),
        tuning_line("finetune_multi", [0.53], "a"), tuning_line("finetune_multi", [0.15], "b"),
        tuning_line("finetune_multi", [0.1] * 3, "c"), tuning_line("finetune", [0.0] * 3, "b", 2),
        tuning_line("linprobe", [0.5, 0.6, 0.7]), tuning_line("linprobe", [0.51, 0.6101, 0.71], blr=2.0))
    assert found["O3"] == [
        "`--epochs 2`: not measured; `main4`: 10.0 ± 0.0 (3), 20.0 against 10.0 TFLOPs",
        "`--epochs 2`: not measured; `main4`: yes: +10.0 points"]
    assert found["O1, Q1"] == [
        "`--t_0 0.35`: not measured, no main4 of as many FLOPs; `--t_0 0.5`: 1.0 ± 2.0 (3); "
        "`--t_0 0.65`: not measured; `main5`: 1.0 ± 0.2 (3)",
        "`--t_0 0.35`: not measured; `--t_0 0.5`: no difference shown at n = 3; "
        "`--t_0 0.65`: not measured; `main5`: yes: +1.0 points"]
    assert found["O2"][0].startswith("`main6`: -1.1 ± 0.1 (3); `--not_scale_lr`: not measured")
    assert found["O2"][1].startswith("`main6`: no: -1.1 points; ")
    assert found["O4"] == ["0.0800, 0.0400, 0.0267, 0.0200 (3)", "yes: 4.0 : 2.0 : 1.3 : 1.0"]
    assert found["N2"][0].endswith("; `--warmup_epochs 0`: 53.0 (1), 30.0 against 16.0 TFLOPs")
    assert found["N2"][1].endswith("; `--warmup_epochs 0`: no difference shown at n = 1")
    assert found["T8"] == ["1.5 ± 0.7 (2)", "no difference shown at n = 2"]
    assert found["T9"] == ["4.0 ± 1.4 (2)", "no difference shown at n = 2"]
    assert found["T12"][0] == "`--blr 0.5`: not measured; `--blr 2`: 1.0 ± 0.0 (3)"
    for spread, wanted in ((0.40, "yes"), (0.405, "no difference")):  # half of it is 2.484 times that, of 1
        points = [1 - spread, 1.0, 1 + spread]
        assert verdict(points).startswith(wanted)
        assert verdict([-part for part in points]).startswith(wanted.replace("yes", "no:"))

def test_picture_of_the_frontier_is_that_of_the_results(monkeypatch):
    assert FILES.keys() == {"frontier.svg"} and (HERE / "frontier.svg").read_text() == frontier_svg()
    lines = [frontier_line(4, [0.4, 0.42], 20.0), frontier_line(4, [0.2, 0.3], 10.0, 2.0),
             frontier_line(6, [0.35, 0.36], 15.0, t_0=0.6), frontier_line(6, [0.35, 0.36], 15.0, t_0=0.7)]
    monkeypatch.setitem(lines_of.__globals__, "read_results", lambda ladder: lines)
    root, space = xml.etree.ElementTree.fromstring(frontier_svg()), "{http://www.w3.org/2000/svg}"
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter(f"{space}circle")]
    (x1, y1), (x2, y2), (x3, y3), other = dots  # in the order of the list: main4 twice, main6 twice
    assert other == (x3, y3) and (x3 - x2) * 2 == pytest.approx(x1 - x2, abs=0.2)
    assert (y3 - y2) / (y1 - y2) == pytest.approx((35.5 - 25) / (41 - 25), abs=0.01)
    segments = [[float(part.get(key)) for key in "x1 y1 x2 y2".split()] for part in root.iter(f"{space}line")]
    assert [x2, y2, x1, y1] in segments  # the control
    bars = [abs(a[3] - a[1]) for a in segments if a[0] == a[2] == x2 and a[1] != 40]
    assert bars[0] / (y2 - y1) == pytest.approx(2 * 5 * 2 ** 0.5 / 16, abs=0.01)
    texts = [part.text for part in root.iter(f"{space}text")]
    assert {"main4", "main4, 2 epochs", "main6 --t_0 0.6", "main6 --t_0 0.7"} <= {*texts}
    places = [(float(part.get("x")), float(part.get("y"))) for part in root.iter(f"{space}text")
              if part.text in [*"1234"] and float(part.get("x")) < 590]
    assert len({*places}) == 4

def kernel_rows():
    """What the kernels reach on the GPU measured last, beside plain forms."""
    lines, ways = read_results("vitfreeze"), ("triton", "inductor", "eager")
    lines = [line for line in lines if "gb_per_s" in line]
    found = {(line["kernel"], line["size"], line["way"]): line for line in lines}
    rows = [["Kernel", "Size", "Triton ms", "Inductor ms", "eager ms", "Triton GB/s", "Machine"]]
    for kernel, size in dict.fromkeys((kernel, size) for kernel, size, _ in found):
        forms = [found.get((kernel, size, way)) for way in ways]
        forms[2] = forms[2] or found.get((kernel, size, "main0"))
        best = forms[0] or found[kernel, size, "torch"]
        rows.append([kernel, size, *(f"{form['ms']:.3f}" if form else "" for form in forms),
                     f"{best['gb_per_s']:.0f}", machine(best)])
    return rows if found else rows + [["hog; add and norm", *["not measured"] * 6]]

TABLES = {name: lambda rows=rows: markdown(rows()) for name, rows in dict(
    ladder=ladder_rows, kernels=kernel_rows, learning=learning_rows, votes=votes_rows, probes=probes_rows,
    freezing=freezing_rows, saving=saving_rows, staircase=staircase_rows, frontier=frontier_rows,
    questions=questions_rows).items()}
FILES = {"frontier.svg": frontier_svg}
