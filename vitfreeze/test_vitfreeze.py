"""Checks of the ideas of this ladder, each against a slow or independent form of it, and of its long runs."""
import collections
import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

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

@pytest.mark.parametrize("size, steps, interpret", [("nano", 20, ""), ("small64", 3, ""), ("nano", 1, "1")])
def test_all_steps_of_the_ladder_compute_the_same(size, steps, interpret, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    torch.manual_seed(3)
    count = min(steps + 1, 4)
    images, noises = photos(count, BASE.SIZES[size].image), torch.rand(steps, count, 64)
    losses, shown, targets, tokens = run_steps(BASE, size, steps, images, noises)
    assert steps == 1 or (losses[-1] < losses[0]).all()
    for path in MAINS[1:9]:
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

@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    call(MAINS[0], *flags(data, folder))
    return folder

def test_training_lowers_the_loss(whole_run):
    rows = [json.loads(line) for line in (whole_run / "seed0" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[2]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert sum(rows[2][f"stage_{i}"] for i in range(1, 5)) == pytest.approx(rows[2]["train_loss"])
    assert (whole_run / "seed0" / "picture.png").read_bytes()[:4] == b"\x89PNG"

def stop_and_continue(data, folder, how, when):
    """Send a signal once the glob `when` finds something, then run the same command to the end."""
    folder.mkdir(exist_ok=True)
    run = subprocess.Popen([sys.executable, MAINS[0], *flags(data, folder)], env=ENV, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(folder.glob(when)) and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(how)
    _, errors = run.communicate()
    return run.returncode, errors, call(MAINS[0], *flags(data, folder))

def test_sigterm_saves_and_the_same_command_continues(data, whole_run, tmp_path):
    code, errors, text = stop_and_continue(data, tmp_path, signal.SIGTERM, "seed0/log.jsonl")
    assert code == 143 and re.fullmatch(r".*: error: stopped after \d+ of 36 steps; .*\n", errors)
    step = int(re.search(r"stopped after (\d+)", errors)[1])
    assert f"continuing after {step} of 36 steps" in text
    assert same_weights(final(tmp_path), final(whole_run))
    assert [row["train_loss"] for row in final(tmp_path)["rows"]] == [
        row["train_loss"] for row in final(whole_run)["rows"]]

@pytest.mark.parametrize("when", ["seed0/checkpoint-00000012.pt", "seed0/.checkpoint.*", "seed0/log.jsonl"])
def test_kill_costs_at_most_the_work_since_the_last_checkpoint(data, whole_run, tmp_path, when):
    code, _, text = stop_and_continue(data, tmp_path, signal.SIGKILL, when)
    assert code == -signal.SIGKILL
    assert when[6:7] != "c" or re.search(r"continuing after (12|24) of 36 steps", text)
    assert same_weights(final(tmp_path), final(whole_run))

def test_damaged_checkpoint_is_named_and_the_one_before_used(data, whole_run, tmp_path):
    call(MAINS[0], *flags(data, tmp_path))
    newest = tmp_path / "seed0" / "checkpoint-00000036.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    text = call(MAINS[0], *flags(data, tmp_path))
    assert f"warning: {newest} is missing or damaged" in text and "continuing after 24 of 36 steps" in text
    assert same_weights(final(tmp_path), final(whole_run))
    text = subprocess.run([sys.executable, MAINS[0], *flags(data, tmp_path), "--resume=none.pt"], env=ENV,
                          capture_output=True, text=True)
    assert text.returncode == 3 and "cannot resume from none.pt" in text.stderr
    assert "another blr" in call(MAINS[0], *flags(data, tmp_path), "--blr=0.1", code=2)

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

def test_all_steps_of_the_ladder_train_the_same(data, whole_run, tmp_path):
    """Through their own loops, data and optimizers, from the command line."""
    def losses(path):
        call(path, *flags(data, tmp_path / path.stem))
        return [row["train_loss"] for row in final(tmp_path / path.stem)["rows"]]
    wanted = [row["train_loss"] for row in final(whole_run)["rows"]]
    for path, found in zip(MAINS[1:5], side_by_side(losses, MAINS[1:5]), strict=True):
        assert found == pytest.approx(wanted, abs=5e-3), path.name

def test_compiled_blocks_compute_the_same(data, tmp_path):
    """Two steps of main4, with and without torch.compile, which leaves its code in a folder."""
    def losses(name, *more):
        command = [sys.executable, MAINS[4], *flags(data, tmp_path / name), "--epochs=0.2", *more]
        env = dict(ENV, TORCH_COMPILE_DISABLE="0", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / f"{name} code"))
        subprocess.run(command, env=env, check=True, capture_output=True)
        return [row["train_loss"] for row in final(tmp_path / name, 2)["rows"]]
    plain, compiled = side_by_side(losses, ("plain", "compiled"), ("--no-compile", "--seed=0"))
    assert compiled == pytest.approx(plain, abs=1e-4)
    code = {name: list(tmp_path.glob(f"{name} code/**/*.so")) for name in ("plain", "compiled")}
    assert code["compiled"] and not code["plain"]
    assert json.loads((tmp_path / "compiled" / "o.jsonl").read_text())["compiled"]

def test_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    text = call(MAINS[0], *flags(data, tmp_path), "--blr=1e9", "--warmup_epochs=0", code=1)
    assert re.search(r"the loss is (nan|inf)", text)

def test_wrong_flags(data, tmp_path):
    for flag in ("--batch_size=0", "--mask_ratio=1", "--size=huge", "--epochs=-1", "--runs=0"):
        call(MAINS[0], "--data", data, "--out", tmp_path / "o", flag, code=2)

# ---------------------------------------------------------------------- tables
def lines_of(path, file, data="cifar10"):
    """Result lines of a script in results/FILE on that data, oldest first."""
    lines = [line for line in read_results("vitfreeze") if line["file"] == f"{file}.jsonl"]
    lines = [line for line in lines if line["script"] == path.name and line["data"] == data]
    return sorted((line for line in lines if not line["dry_run"]), key=lambda line: line["utc"])

def named(path, lines):
    """The script's name, with a mark where a line is of an earlier text of it."""
    body = hashlib.sha256(path.read_text().split('"""', 2)[2].encode()).hexdigest()
    return f"`{path.name}`" + " (†)" * any(line["sha256"] != body for line in lines)

def ladder_rows():
    """A row per step: speed on a CPU against the step before, as pairs of runs made in turns; on a GPU speed
    of ViT-B and its share of what matmuls alone would allow."""
    rows = [["Script", "Adds", "Diff", "Images/s, CPU", "Step, ms", "against the step before (pairs)",
             "Peak MiB", "Machine", "Images/s, ViT-B, GPU", "% of the matmul rate", "Peak GiB", "Machine"]]
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
        large, fast = lines_of(path, "base", "synthetic"), ["not measured"] * 4
        if large:
            fast = [mean_std([line["images_per_s"] for line in large], 0),
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

def saving_rows():
    """A row per way to freeze: time and FLOPs against the same run without freezing, round by round."""
    rows = [["Script", "Schedule", "FLOPs saved %", "Time saved % (rounds)", "Machine"]]
    for path in MAINS[5:]:
        lines = lines_of(path, "saving", "synthetic")
        whole = {line["runs"][0]["seed"]: line for line in lines if line["hyp"]["t_0"] == 1}
        ways = {}
        for line in lines:
            if line["hyp"]["t_0"] < 1:
                modes = [mode for mode in ("keep_graph", "dont_freeze_pe") if line["hyp"][mode]]
                ways.setdefault((line["hyp"]["how_scale"], line["hyp"]["t_0"], *modes), []).append(line)
        for way, group in sorted(ways.items()):
            saved = [1 - line["time_mean"] / whole[line["runs"][0]["seed"]]["time_mean"] for line in group]
            flops = 1 - group[0]["pflops"] / group[0]["pflops_nominal"]
            rows.append([named(path, group), " ".join(f"{part}" for part in way), f"{100 * flops:.1f}",
                         f"{mean_std(saved, 1, 100)} ({len(saved)})", machine(group[-1])])
    return rows

def frontier():
    """{(script, epochs, flags): [(line, run)]} of CIFAR-10, from results/frontier.jsonl, in ladder order"""
    found = {}
    for path in MAINS[4:]:
        normal = dict(hyp(path), size="micro", batch_size=128, blr=2e-3)
        for line in lines_of(path, "frontier"):
            own = {name: value for name, value in line["hyp"].items() if normal[name] != value}
            own = {name: value for name, value in own.items() if "epochs" not in name}
            flags = " ".join(f"--{name}" + f" {value}" * (value is not True) for name, value in own.items())
            found.setdefault((path, line["hyp"]["epochs"], flags), []).extend(
                (line, run) for run in line["runs"])
    return found

def frontier_rows():
    """A row per setting: FLOPs and k-NN, and how far above main4, between its lengths, at as many FLOPs."""
    rows = [["Script", "Epochs", "Flags", "PFLOPs", "20-NN % patch mean, centred", "runs",
             "above main4 of as many PFLOPs", "Machine"]]
    means = {key: [sum(values) / len(runs) for values in zip(
        *((line["pflops"], 100 * run["acc"]) for line, run in runs))] for key, runs in frontier().items()}
    control = sorted(mean for (path, _, flags), mean in means.items() if path == MAINS[4] and not flags)
    costs, levels = zip(*control) if control else ((math.inf,), (math.nan,))
    for (path, epochs, flags), runs in frontier().items():
        scores, (cost, _), above = [100 * run["acc"] for _, run in runs], means[path, epochs, flags], ""
        if (flags or path != MAINS[4]) and costs[0] <= cost <= 1.001 * costs[-1]:
            above = mean_std([score - np.interp(cost, costs, levels) for score in scores], 1)
        rows.append([named(path, [line for line, _ in runs]), f"{epochs:g}", flags, f"{cost:.2f}",
                     mean_std(scores, 1), str(len(scores)), above, machine(runs[-1][0])])
    return rows

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
    """A row per script and encoder: accuracy of linear probe or fine-tuning, seed by seed against random."""
    rows = [["Script", "Epochs", "Encoder", "Accuracy %", "runs", "less that of random weights (pairs)",
             "Machine"]]
    for path in (HERE / "linprobe.py", HERE / "finetune.py"):
        def settings_of(line):
            return json.dumps({key: value for key, value in line["hyp"].items() if key != "pretrained"})
        groups = groups_of(path, lambda line: (settings_of(line), origin(line)))
        for (settings_, name), group in groups.items():
            accs = {run["seed"]: run["acc"] for _, run in group}
            random = groups.get((settings_, f"{group[0][0]['hyp']['size']}, random weights"), [])
            pairs = [accs[run["seed"]] - run["acc"] for _, run in random if run["seed"] in accs]
            against = f"{mean_std(pairs, 2, 100)} ({len(pairs)})" if pairs and random is not group else ""
            rows.append([named(path, [line for line, _ in group]), f"{group[0][0]['hyp']['epochs']:g}", name,
                         mean_std([*accs.values()], 2, 100), str(len(accs)), against, machine(group[-1][0])])
    return rows

def test_control_is_drawn_between_the_lengths_of_main4(monkeypatch):
    def line(path, pflops, acc, **own):
        values = dict(hyp(path), size="micro", batch_size=128, blr=2e-3, epochs=2 * pflops)
        return dict(file="frontier.jsonl", script=path.name, data="cifar10", dry_run=False, utc="", sha256="",
                    hyp=dict(values, **own), pflops=pflops, runs=[dict(acc=acc)], device="cpu", cpu="x",
                    cpu_threads=2, torch="y")
    lines = [line(MAINS[4], 2.0, 0.4), line(MAINS[4], 2.0, 0.42), line(MAINS[4], 4.0, 0.5),
             line(MAINS[5], 3.0, 0.43, how_scale="linear"), line(MAINS[5], 5.0, 0.6)]
    monkeypatch.setitem(lines_of.__globals__, "read_results", lambda ladder: lines)
    assert [row[1:7] for row in frontier_rows()[1:]] == [
        ["4", "", "2.00", "41.0 ± 1.4", "2", ""], ["8", "", "4.00", "50.0", "1", ""],
        ["6", "--how_scale linear", "3.00", "43.0", "1", "-2.5"], ["10", "", "5.00", "60.0", "1", ""]]

TABLES = {name: lambda rows=rows: markdown(rows()) for name, rows in dict(
    ladder=ladder_rows, learning=learning_rows, votes=votes_rows, probes=probes_rows, freezing=freezing_rows,
    saving=saving_rows, frontier=frontier_rows).items()}
