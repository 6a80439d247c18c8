"""Checks of the ideas of this ladder, each against a slow or independent form of it, and its tables."""
import collections, contextlib, hashlib, itertools, json, math, pathlib, shutil, signal, subprocess, sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from test_smoke import (  # before torch: it has kernels interpreted
    ENV, call, changed_lines, docstring, hyp, load, machine, markdown, mean_std, read_results, scripts,
    write_cifar)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
MAINS = [path for _, path in scripts("hypernet") if path.name.startswith("main")]
LOADED = [load(path) for path in MAINS]
SEPARATE, BATCHED, HYPER, NORM, COSINE, INIT, BASIS, FAST, SEARCH, SIGNED = LOADED
ASIF, EMBED = (load(HERE / f"{name}.py") for name in ("asif", "embed"))

@contextlib.contextmanager
def settings(module, **values):
    """Hyperparameters for a while."""
    before = dict(module.HYP)
    module.HYP.update(values)
    try:
        yield
    finally:
        module.HYP.clear(), module.HYP.update(before)

def write_pairs(folder, n=200, encoders=None, **changed):
    """A folder of pairs in the format of embed.py; arrays can be replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, known = SEPARATE.draw_pairs(n, seed=3)
    arrays.update(changed)
    for part, array in arrays.items():
        np.save(folder / f"{part}.npy", array)
    sums = {part: hashlib.sha256((folder / f"{part}.npy").read_bytes()).hexdigest() for part in arrays}
    sets = [dict(name="drawn", rows=(0, n // 5), prompts=(0, 10))]
    (folder / "meta.json").write_text(json.dumps(dict(
        data="other", text_width=48, sha256=sums, encoders=encoders or known, sets=sets)))
    return folder

def write_data(folder):
    """What the scripts of this folder need beside the images."""
    write_pairs(folder / "emb")

@pytest.fixture(scope="module")
def pairs():
    return SEPARATE.load_pairs("synthetic", False)

# ---------------------------------------------------------------------- FLOPs as published
def test_flops_of_separate_connectors():
    for width, published in ((384, 843.96), (768, 1687.92), (1024, 2250.56)):
        assert SEPARATE.step_flops(1, 2 ** 14, width, 768, 4) / 1e9 == pytest.approx(published, abs=0.005)
    step = SEPARATE.step_flops(1, 2 ** 14, 384, 768, 4) / 1e9
    assert step == pytest.approx(843.961073664, abs=1e-9) and round(370 * 843.96) == 312265
    assert 370 * step == pytest.approx(312265.2, abs=0.5)

@pytest.mark.parametrize("count, published", [(4, 29260.649), (10, 73151.6236)])
def test_flops_of_the_hypernetwork(count, published):
    macs = HYPER.decoder_macs(1024, 768)
    with settings(HYPER):
        sizes = HYPER.batch_sizes(595375)
    assert len(sizes) == 1163 and sizes[-1] == 431
    flops = sum(HYPER.step_flops(count, size, width, 768, 4, macs)
                for size, width in zip(sizes, itertools.cycle((384, 768, 1024))))
    assert flops / 1e9 == pytest.approx(published, abs=1e-3)

def test_flops_of_auto_decoding():
    step = SEARCH.search_flops(8, 384, 768, 4, HYPER.decoder_macs(1024, 768)) / 1e9
    assert step == pytest.approx(2.42926, abs=5e-6)
    counted = 2 * math.floor(100 * step / 2) / 100  # the published counter rounds multiply-adds, then doubles
    assert counted == 2.42 and math.ceil(595375 / 8) == 74422
    assert round(74422 * counted) == 180101 and round(10000 * counted) == 24200
    assert 312265 / 24200 == pytest.approx(12.9, abs=0.05)

def test_published_batches_and_parameters():
    assert SEPARATE.batch_sizes(595375) == ([16384] * 36 + [5551]) * 10
    families = [(384, list("abcdefghij")), (768, list("klmnopqrst")), (1024, list("uvwxyzABCD"))]
    with torch.device("meta"):
        count = lambda module: sum(p.numel() for p in module.Connectors(families, 768).parameters())
        assert count(HYPER) == 606088992 and 20 < count(HYPER) / count(BASIS) < 25
    assert 20 < HYPER.decoder_macs(1024, 768) / BASIS.decoder_macs(1024, 768) < 25

def test_formulas_count_what_runs(pairs):
    """Against torch's counter, for a step with gradients"""
    for module in (SEPARATE, HYPER):
        model = module.Connectors(pairs.families(), 48)
        rows = torch.arange(32)
        for family, (width, names) in enumerate(pairs.families()):
            text, images = pairs.batch(rows, names, CPU)
            with FlopCounterMode(display=False) as counter:
                module.info_nce(module.connect(text, *model(family)), images).mean().backward()
            more = () if module is SEPARATE else (module.decoder_macs(64, 48),)
            formula = module.step_flops(len(names), 32, width, 48, 2, *more)
            assert counter.get_total_flops() == pytest.approx(formula, rel=0.01)

# ---------------------------------------------------------------------- loss
def hard_pairs(images, noise):
    """Vectors [n, B, width] as far from theirs of images as from the nearest of others, more or less"""
    return F.normalize((2 * math.log(images.shape[1]) / images.shape[2]) ** 0.5 * images + noise, dim=2)

def info_nce_slow(mapped, images, scale=100.0):
    losses = []
    for y, z in zip(mapped, images):
        logits, labels = scale * z @ y.T, torch.arange(len(y), device=y.device)
        losses.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    return torch.stack(losses)

@pytest.mark.parametrize("n, rows, width, dtype", [
    (1, 431, 24, torch.float32), (2, 70, 96, torch.float32), (3, 1, 5, torch.float32),
    (1, 64, 300, torch.float32), (2, 131, 33, torch.float16)])
def test_losses(n, rows, width, dtype):
    """The plain form, and the kernels in the interpreter: loss and gradient"""
    torch.manual_seed(rows)
    images, mapped = F.normalize(torch.randn(2, n, rows, width), dim=3)
    mapped, images = hard_pairs(images, mapped), images.to(dtype)
    wanted, ours, exact = (mapped.clone().requires_grad_() for _ in range(3))
    weights = torch.rand(n)
    plain, fused = FAST.info_nce(wanted, images), FAST.FusedInfoNCE.apply(ours, images, 100.0)
    slow = info_nce_slow(exact.double(), images.double())
    for losses in (plain, fused, slow):
        (losses * weights).sum().backward()
    close = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(plain.double(), slow, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.double(), slow, atol=close, rtol=1e-4 if close == 1e-5 else 1e-2)
    size = exact.grad.abs().max()
    assert (wanted.grad - exact.grad).abs().max() <= 1e-5 * size.clamp(min=1)
    assert (ours.grad - exact.grad).abs().max() <= (1e-5 if close == 1e-5 else 1e-2) * size.clamp(min=1)

def test_fused_loss_under_compile(monkeypatch):
    """Traced whole, with the kernels as operations of their own"""
    images, mapped = F.normalize(torch.randn(2, 2, 40, 24), dim=3)
    mapped.requires_grad_()
    loss = torch.compile(FAST.FusedInfoNCE.apply, backend="aot_eager", fullgraph=True)(mapped, images, 100.0)
    loss.sum().backward()
    torch.testing.assert_close(loss, FAST.info_nce(mapped, images))
    wanted, = torch.autograd.grad(FAST.info_nce(mapped, images).sum(), mapped)
    torch.testing.assert_close(mapped.grad, wanted, atol=1e-5, rtol=1e-4)

def test_kernels_compile_for_a_gpu():
    """To machine code for an H100, which needs none."""
    code = f"""
import sys, triton
sys.path.insert(0, {str(HERE)!r})
import {FAST.__name__} as m
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for dtype in ("*fp16", "*fp32"):
    for kernel, more in ((m._nce_stats_kernel, dict()), (m._nce_grad_kernel, dict(BLOCK_D=256))):
        constants = dict(ROWS=16384, D=768, BLOCK=64, BLOCK_K=64, PRECISION="tf32", **more)
        types = {{name: "fp32" if name == "scale" else "*fp32" for name in kernel.arg_names}}
        types.update({{name: dtype for name in types if name[0] in "ABXY" and name.endswith("_ptr")}})
        types.update(dict.fromkeys(constants, "constexpr"))
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        assert len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 1000
"""
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True)

# ---------------------------------------------------------------------- training
def test_batched_connectors_train_as_if_alone(pairs):
    """Against nn.Linear, torch's loss and an optimizer of its own, step by step"""
    with settings(BATCHED, steps=9, batch_size=64):
        torch.manual_seed(0)
        connectors, _ = BATCHED.fit(pairs.families(), pairs, 0, CPU)
        torch.manual_seed(0)
        start = BATCHED.Connectors(pairs.families(), 48)
        for turn, (width, names) in enumerate(pairs.families()):
            for place, name in enumerate(names):
                linear = torch.nn.Linear(48, width)
                linear.weight.data, linear.bias.data = (p[place].detach().clone() for p in start(turn))
                optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=0)
                for step in range(turn, 9, 3):
                    rows = torch.arange(64 * step, 64 * step + 64)
                    mapped = F.normalize(linear(pairs.text[rows].float()), dim=1)
                    info_nce_slow(mapped[None], pairs.images[name][rows][None].float()).sum().backward()
                    optimizer.step(), optimizer.zero_grad()
                for ours, theirs in zip(connectors[name], (linear.weight, linear.bias)):
                    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)

def test_what_the_hypernetwork_predicts(pairs):
    families, made = pairs.families(), {}
    for module in (HYPER, NORM, INIT, BASIS):
        torch.manual_seed(0)
        made[module] = module.Connectors(families, 48)
    torch.testing.assert_close(made[NORM].state_dict(), made[HYPER].state_dict())
    for family, (width, names) in enumerate(families):
        (weight, bias), (scaled, scaled_bias) = made[HYPER](family), made[NORM](family)
        assert weight.shape == (2, width, 48) and bias.shape == (2, width)
        model = made[HYPER]
        codes = model.encoder_code.weight[2 * family:2 * family + 2] + model.width_code.weight[family]
        for place, code in enumerate(codes):
            whole, whole_bias = (head(code) for head in model.heads)
            assert len(whole) == 96 * 48 and len(whole_bias) == 96  # half as many again as the widest takes
            flat = whole[:width * 48].view(width, 48)
            torch.testing.assert_close(weight[place], flat / whole.norm())
            torch.testing.assert_close(bias[place], whole_bias[:width] / whole_bias.norm())
            torch.testing.assert_close(scaled[place], flat / (width * 48) ** 0.5)
            torch.testing.assert_close(scaled_bias[place], whole_bias[:width] / width ** 0.5)
    spread = torch.cat([made[INIT](i)[0].detach().flatten() * width ** 0.5
                        for i, (width, _) in enumerate(families)])
    assert spread.std() * (48 / (24 + 48 + 64) * 3) ** 0.5 == pytest.approx(1, rel=0.15)
    model = made[BASIS]
    basis, offset = model.heads[0][-1].weight, model.heads[0][-1].bias
    hidden = model.heads[0][:-1](model.encoder_code.weight[:2] + model.width_code.weight[0])
    assert hidden.shape == (2, 32) and len(offset) == 64 * 48
    mixture = offset + sum(hidden[:, k, None] * basis[:, k] for k in range(32))
    torch.testing.assert_close(model(0)[0], mixture.view(2, 64, 48)[:, :24] / (24 * 48) ** 0.5)

def test_rates_of_learning():
    rates = [SEPARATE.schedule(step) for step in (0, 24, 49, 210, 370)]
    assert rates == pytest.approx([0.02, 0.5, 1, 0.5, 0])
    assert {BATCHED.schedule(step) for step in range(1163)} == {1.0}
    assert COSINE.schedule(499) == 1 and COSINE.schedule(1163) == pytest.approx(0, abs=1e-9)

def test_fast_script_computes_what_main6_does(pairs):
    fast = FAST.load_pairs("synthetic", False)
    fast.to(CPU)
    results = []
    for module, source, more in ((BASIS, pairs, ()), (FAST, fast, (FAST.all_losses,))):
        with settings(module, steps=6, batch_size=64):
            torch.manual_seed(0)
            results.append(module.fit(source.families(), source, 0, CPU, *more)[0])
    for name, connector in results[0].items():
        for ours, theirs in zip(results[1][name], connector):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)

def test_mixtures_of_either_sign_are_farther_apart(pairs):
    """Encoders start as mixtures whose Gram matrix is better conditioned, and with the same spread."""
    least, spread = collections.Counter(), collections.Counter()
    for seed, module in itertools.product(range(5), (SEARCH, SIGNED)):
        torch.manual_seed(seed)
        model = module.Connectors(pairs.families(), pairs.text.shape[1])
        codes = torch.cat([model.encoder_code.weight[first:end] + code for first, end, code in zip(
            model.firsts, model.firsts[1:], model.width_code.weight)])
        mixtures = F.normalize(model.heads[0][:-1](codes).detach())
        assert (mixtures < -0.05).any() == (module is SIGNED)
        least[module] += torch.linalg.eigvalsh(mixtures @ mixtures.T)[0].item()
        spread[module] += sum(model(family)[0].std().item() for family in range(len(model.families)))
    assert least[SIGNED] > 1.3 * least[SEARCH] and spread[SIGNED] == pytest.approx(spread[SEARCH], rel=0.1)

@pytest.fixture(scope="module")
def trained(pairs):
    """{script: its connectors after a short run}"""
    found, fast = {}, SIGNED.load_pairs("synthetic", False)
    fast.to(CPU)
    for module in (*LOADED[1:7], SIGNED):
        source, more = (fast, [module.all_losses]) if module is SIGNED else (pairs, [])
        with settings(module, steps=120, batch_size=128):
            torch.manual_seed(0)
            found[module] = module.fit(source.families(), source, 0, CPU, *more)[0]
    return found

def accuracy(connectors, pairs):
    return np.mean([SEPARATE.evaluate(connectors[name], pairs, name)["drawn"] for name in pairs.widths])

def test_all_forms_learn(pairs, trained):
    found = {module.__name__: accuracy(connectors, pairs) for module, connectors in trained.items()}
    assert all(value > 0.5 for value in found.values()), found  # of ten classes

def test_scale_changes_nothing(pairs, trained):
    for name, (weight, bias) in trained[BATCHED].items():
        wanted = SEPARATE.evaluate((weight, bias), pairs, name)
        for scale in (1 / 64, 2.0, 1024.0):
            assert SEPARATE.evaluate((scale * weight, scale * bias), pairs, name) == wanted

def test_pairs_must_be_pairs(pairs):
    """Text rows out of place leave chance; one connector for all lies between that and one each."""
    def run(**values):
        with settings(BATCHED, steps=240, batch_size=128, **values):
            torch.manual_seed(0)
            return accuracy(BATCHED.fit(pairs.families(), pairs, 0, CPU)[0], pairs)
    own, shared, text = run(), run(shared=1), pairs.text
    pairs.text = text.roll(777, 0)[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
    mixed = run()
    pairs.text = text
    assert mixed < 0.25 < shared < own - 0.03, (mixed, shared, own)

def test_retrieval_one_by_one(pairs, trained):
    name = next(iter(pairs.widths))
    connector = trained[BATCHED][name]
    row = SEPARATE.evaluate(connector, pairs, name)
    mapped = F.normalize(pairs.test_text.float() @ connector[0].T + connector[1], dim=1)
    ranks = []
    for i, image in enumerate(pairs.test_images[name].float()):
        cosines = (mapped @ image).tolist()
        ranks.append(sum(value > cosines[i] + 1e-6 for value in cosines))
    for k in (1, 5, 10):
        assert row[f"R@{k}"] == pytest.approx(np.mean([rank < k for rank in ranks]), abs=0.003)

# ---------------------------------------------------------------------- encoders that training has not seen
def test_search_moves_the_vector_alone():
    pairs = SEARCH.load_pairs("synthetic", False)
    pairs.to(CPU)
    with settings(SEARCH, steps=100, batch_size=128):
        torch.manual_seed(0)
        _, _, model = SEARCH.fit(pairs.families(), pairs, 0, CPU, SEARCH.all_losses)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        known = pairs.families()[1][1][0]
        (weight, bias), start = SEARCH.auto_decode(model, pairs, known, 1, 0.0, 200, CPU)
        found, loss = SEARCH.auto_decode(model, pairs, known, 1, 1e-2, 2000, CPU)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        assert loss < start - 0.2
        accs = [SEARCH.evaluate(c, pairs, known)["drawn"] for c in ((weight, bias), found)]
        assert accs[1] > accs[0] + 0.1  # of an encoder that the hypernetwork does know

def test_scratch_is_a_linear_layer():
    pairs = SEARCH.load_pairs("synthetic", False)
    with settings(SEARCH, batch_size=128):
        connector = SEARCH.scratch(pairs, "drawn2-48", 60, 0, CPU)
    assert SEARCH.evaluate(connector, pairs, "drawn2-48")["drawn"] > 0.5

# ---------------------------------------------------------------------- files
def test_connectors_can_be_loaded_as_trained(tmp_path):
    path = tmp_path / "connectors.pt"
    flags = "--data=synthetic", "--steps=30", "--batch_size=64", "--out", tmp_path / "o"
    call(MAINS[2], *flags, "--connectors", path)
    row = json.loads((tmp_path / "o").read_text())["runs"][0]["epochs"][-1]
    weight, bias = torch.load(path, weights_only=True)[row["encoder"]]
    pairs = SEPARATE.load_pairs("synthetic", False)
    assert SEPARATE.evaluate((weight, bias), pairs, row["encoder"])["drawn"] == row["drawn"]

def test_bad_pairs(tmp_path, capsys, monkeypatch):
    arrays, known = SEPARATE.draw_pairs(200, seed=3)
    hole = arrays["train_image"].copy()
    hole[17, 3] = np.nan
    short = "train_image.npy has 200 rows and train_text.npy 199"
    cases = [(dict(train_text=arrays["train_text"][:-1]), short),
             (dict(train_image=hole), "row 17 holds NaN"),
             (dict(encoders=known[:-1]), "408 wide, by meta.json 344"),
             (dict(test_labels=arrays["test_labels"][1:]), "these are no pairs"),
             (dict(prompts=arrays["prompts"][:, 1:]), "prompts.npy is 47 wide"),
             (dict(), "no encoder nobody")]
    for number, (changed, sentence) in enumerate(cases):
        folder = write_pairs(tmp_path / str(number), **changed)
        with settings(SEPARATE, encoders="" if changed else "nobody"), pytest.raises(SystemExit) as end:
            SEPARATE.load_pairs(folder, False)
        assert end.value.code == (3 if changed else 2) and sentence in capsys.readouterr().err
    path = folder / "test_text.npy"
    whole = path.read_bytes()
    for bad in (whole[:1000], b"", whole[:-9] + b"\1" + whole[-8:], None):
        path.write_bytes(bad) if bad is not None else path.unlink()
        with pytest.raises(SystemExit) as end:
            SEPARATE.load_pairs(folder, False)
        assert end.value.code == 3 and "test_text.npy is missing or damaged" in capsys.readouterr().err
    path.write_bytes(whole)
    monkeypatch.setattr(SEPARATE, "free_memory", lambda: 100)
    with pytest.raises(SystemExit) as end:
        SEPARATE.load_pairs(folder, False)
    assert end.value.code == 1 and "--mmap" in capsys.readouterr().err
    assert torch.equal(SEPARATE.load_pairs(folder, True).text, torch.from_numpy(arrays["train_text"]))
    meta, digests = json.loads((folder / "meta.json").read_text()), []
    for sums in ({}, "", None):  # with none, the files say what they are
        (folder / "meta.json").write_text(json.dumps(dict(meta, sha256=sums)))
        np.save(path, -np.load(path))
        digests.append(SEPARATE.load_pairs(folder, True).digest)
    assert digests[0] == digests[2] != digests[1]
    for bad in (dict(encoders=[{k: e[k] for k in ("name", "width")} for e in known]), dict(
            encoders=[dict(e, name="one") for e in known]), dict(sha256={"prompts": "0"})):
        (folder / "meta.json").write_text(json.dumps(dict(meta, **bad)))
        with pytest.raises(SystemExit) as end:
            SEPARATE.load_pairs(folder, True)
        assert end.value.code == 3 and "meta.json is damaged" in capsys.readouterr().err
    (folder / "meta.json").write_text("{}")
    call(MAINS[0], "--data", folder, "--out", tmp_path / "o", code=3)
    assert "embed.py" in call(MAINS[0], "--data", tmp_path, "--out", tmp_path / "o", code=3)

def test_pairs_may_stay_on_disk(tmp_path, capsys, monkeypatch):
    """Batches are the same; without --mmap there must be room for those of the encoders side by side."""
    folder = write_pairs(tmp_path / "emb")
    loaded, mapped = (FAST.load_pairs(folder, mmap) for mmap in (False, True))
    loaded.to(CPU), mapped.to(CPU)
    rows = torch.tensor([7, 0, 199, 7])
    for ours, theirs in zip(mapped.batch(rows), loaded.batch(rows), strict=True):
        assert torch.equal(ours, theirs)
    wanted = torch.cat([loaded.images[name] for _, names in loaded.families() for name in names], 1)
    assert torch.equal(loaded.batch(rows)[1], wanted[rows]) and loaded.parts[0].shape == wanted.shape
    assert mapped.parts[0].data_ptr() in [part.data_ptr() for part in mapped.images.values()]
    monkeypatch.setattr(FAST, "free_memory", lambda: 100)
    mapped.to(CPU)
    with pytest.raises(SystemExit) as end:
        loaded.to(CPU)
    assert end.value.code == 1 and "--mmap" in capsys.readouterr().err

def test_wrong_flags(tmp_path, capsys):
    flags = [(SEPARATE, flag) for flag in ("--steps=0", "--batch_size=-1", "--runs=0", "--encoders=nobody")]
    flags += [(BATCHED, "--steps=2"), (HYPER, "--spare=0.5"), (SEARCH, "--spare=0.5"),
              (SEPARATE, f"--seed={2 ** 63}"), (EMBED, "--widths=96,96,192")]
    flags += [(EMBED, flag) for flag in ("--count=4", "--widths=96", "--widths=30,60,90", "--pairs=-1",
                                         "--features=x", "--zoo=NoNet_Weights.V1")]
    for module, flag in flags:
        places = ["--data=synthetic", "--out", str(tmp_path / "o"), "--device=cpu", flag]
        places += ["--emb", str(tmp_path / "e")] if module is EMBED else []
        with settings(module), pytest.raises(SystemExit) as end:
            module.main(module.flag_parser().parse_args(places))
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1, flag

# ---------------------------------------------------------------------- embedding
SMALL = ("--widths=32,64,96", "--count=3", "--pairs=300", "--text_width=48", "--epochs=0.5",
         "--batch_size=16")

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("images"), train=96)

def embed(images, folder, *more, **options):
    places = "--data", images, "--emb", folder / "emb", "--out", folder / "o"
    return call(HERE / "embed.py", *places, *SMALL, *more, **options)

@pytest.fixture(scope="module")
def embedded(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    embed(images, folder)
    return folder / "emb"

def test_embedded_pairs(embedded):
    pairs = SEPARATE.load_pairs(embedded, False)
    assert len(pairs.text) == 300 and [*pairs.widths] == ["all-32", "all-64", "all-96"]
    assert pairs.held_out == ["all-int4-32", "all-other-96", "coarse-32"]
    for features in (*pairs.images.values(), pairs.text, pairs.prompts):
        torch.testing.assert_close(features.float().norm(dim=1), torch.ones(len(features)), atol=2e-3, rtol=0)
    lines = (embedded / "captions.txt").read_text().splitlines()
    assert len(lines) == 300 + 40 + 10 and lines[-1] == "a photo of a 9"
    with settings(EMBED, bigram=0.4):
        assert np.array_equal(EMBED.hash_text(lines, 48)[:300], pairs.text.numpy())
    assert not list(embedded.parent.glob("*.partial"))

def test_rows_are_pairs(images, embedded):
    """Features of an encoder on the images that the plan names, and captions that name their class."""
    train = torch.load(images / "train.pt", weights_only=True)
    chosen, views = EMBED.plan(96, 300)
    lines = (embedded / "captions.txt").read_text().splitlines()
    assert all(str(train["labels"][i].item()) in line for i, line in zip(chosen, lines[:300]))
    assert sorted(np.bincount(chosen)) == [3] * 84 + [4] * 12 and set(views) == {0, 1, 2, 3}
    state = torch.load(next(embedded.parent.glob("encoders/all-64-*.pt")), weights_only=True)
    net = EMBED.make_net(64, EMBED.RECIPES["all"])
    net.load_state_dict(state["net"])
    net.eval()
    seen = EMBED.views_of(train["images"], chosen[:20], views[:20])
    with torch.no_grad():
        wanted = F.normalize(net(EMBED.normalize(seen)), dim=1)
    ours = SEPARATE.load_pairs(embedded, False).images["all-64"][:20].float()
    assert (ours * wanted).sum(1).min() > 0.99
    for row, (image, view) in enumerate(zip(chosen[:20].tolist(), views[:20].tolist())):
        flip, move = EMBED.VIEWS[view]
        x = train["images"][image].numpy()
        x = x[:, ::-1] if flip else x
        x = np.pad(x, ((4, 4), (4, 4), (0, 0)), mode="edge")[4 - move:36 - move, 4 - move:36 - move]
        assert np.array_equal(seen[row].numpy(), x)

def test_interrupted_embedding_continues(images, embedded, tmp_path):
    places = "--data", images, "--emb", tmp_path / "emb", "--out", tmp_path / "o"
    command = [sys.executable, HERE / "embed.py", *places, *SMALL]
    run = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("emb.*.partial/encoder-all-64.pt")) and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not (tmp_path / "emb").exists()
    first = next(tmp_path.glob("emb.*.partial/encoder-all-32.pt"))
    first.write_bytes(first.read_bytes()[:500])  # a damaged file is made anew
    subprocess.run(command, env=ENV, check=True, capture_output=True)
    for part in SEPARATE.PARTS:
        ours, theirs = (folder / f"{part}.npy" for folder in (tmp_path / "emb", embedded))
        assert ours.read_bytes() == theirs.read_bytes(), part
    assert "is there already" in embed(images, tmp_path, code=2)

def test_damaged_encoders_are_trained_anew(images, embedded, tmp_path):
    """That of a held-out relative, too, with the one that it starts from; FLOPs are those of work that was
    done; a series goes on after its finished runs."""
    (tmp_path / "encoders").mkdir()
    for path in embedded.parent.glob("encoders/*.pt"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        if not path.name.startswith("all-32"):
            (tmp_path / "encoders" / path.name).write_bytes(content)
    embed(images, tmp_path)
    for part in SEPARATE.PARTS:
        ours, theirs = (folder / f"{part}.npy" for folder in (tmp_path / "emb", embedded))
        assert ours.read_bytes() == theirs.read_bytes(), part
    shutil.rmtree(tmp_path / "emb")
    embed(images, tmp_path)
    anew, known = (json.loads(line)["pflops"] for line in (tmp_path / "o").read_text().splitlines())
    assert known < 0.9 * anew

def test_series_of_embeddings_continues(images, tmp_path):
    (tmp_path / "emb-seed1").mkdir()  # in the way of the second run
    assert "is there already" in embed(images, tmp_path, "--runs=2", code=2)
    (tmp_path / "emb-seed1").rmdir()
    assert "continuing after 1 of 2 runs" in embed(images, tmp_path, "--runs=2")
    line, = map(json.loads, (tmp_path / "o").read_text().splitlines())
    assert line["n"] == 2 and not list(tmp_path.glob("*.partial"))

def test_caches_in_the_folder_itself(tmp_path):
    """Ten classes are those of CIFAR-10, a hundred those of CIFAR-100."""
    for classes in (10, 100):
        write_cifar(tmp_path, train=200, test=200)
        for part in ("train", "test"):
            cache = torch.load(tmp_path / f"{part}.pt", weights_only=True)
            cache.update(labels=torch.arange(200) % classes, classes=[str(c) for c in range(classes)])
            torch.save(cache, tmp_path / f"{part}.pt")
        _, _, sets = EMBED.load_sets(tmp_path)
        assert [s.name for s in sets] == ["cifar100" if classes == 100 else "cifar10"]

def test_features_and_text_of_others(images, tmp_path):
    embed(images, tmp_path, "--export")
    folder = next(tmp_path.glob("emb.*.partial"))
    pixels, lines = np.load(folder / "images.npy"), (folder / "captions.txt").read_text().splitlines()
    assert pixels.shape == (340, 32, 32, 3) and len(lines) == 350
    rng, flat = np.random.default_rng(0), pixels.reshape(340, -1)[:, ::40].astype(np.float32) + 1
    np.save(tmp_path / "train.npy", flat[:300]), np.save(tmp_path / "test.npy", flat[300:])
    np.save(tmp_path / "text.npy", rng.normal(size=(350, 20)).astype(np.float32))
    names = f"--features=mine={tmp_path / 'train.npy'},{tmp_path / 'test.npy'}"
    embed(images, tmp_path, names, "--text", tmp_path / "text.npy", "--held_out=mine")
    pairs = SEPARATE.load_pairs(tmp_path / "emb", False)
    assert pairs.held_out[0] == "mine" and pairs.text.shape == (300, 20)
    wanted = F.normalize(torch.from_numpy(flat[300:]), dim=1)
    torch.testing.assert_close(pairs.test_images["mine"].float(), wanted, atol=1e-3, rtol=1e-3)
    np.save(tmp_path / "text.npy", np.zeros((349, 20)))
    other = tmp_path / "other"
    other.mkdir()
    assert "349 rows" in embed(images, other, "--text", tmp_path / "text.npy", code=3)
    for number, bad in enumerate((flat[0], flat[:, :, None, None], b"")):
        place = tmp_path / f"bad{number}.npy"
        place.write_bytes(bad) if isinstance(bad, bytes) else np.save(place, bad)
        assert "as an array of vectors" in embed(images, other, f"--features=x={place},{place}", code=3)
    assert "have the name mine" in embed(images, other, names, names, code=2)
    partials = lambda: {*other.glob("emb.*.partial")}
    before = partials()
    flat[5] = np.nan
    np.save(tmp_path / "train.npy", flat[:300])
    assert "row 5" in embed(images, other, names, code=3)
    between = partials()
    flat[5] = 1
    np.save(tmp_path / "train.npy", 2 * flat[:301])
    assert "301 rows" in embed(images, other, names, code=3)
    assert len(partials()) - 1 == len(between) == len(before) + 1  # other contents, another embedding
    assert "sentence-transformers" in embed(images, other, "--text-encoder=none", code=2)

def test_encoders_of_the_zoo(images, tmp_path, monkeypatch):
    """Weights in torchvision's cache; here random ones."""
    import torchvision
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5()
    place = tmp_path / "home" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    torch.save(model.state_dict(), place / pathlib.Path(weights.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    features = EMBED.zoo_model("ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1", CPU)
    pixels = torch.load(images / "test.pt", weights_only=True)["images"][:3]
    with torch.no_grad():
        found = features(pixels)
        logits = model.eval()(weights.transforms()(pixels.permute(0, 3, 1, 2)))
    torch.testing.assert_close(model.fc(found), logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(SystemExit) as end:
        EMBED.zoo_model("NoNet_Weights.V1", CPU)
    assert end.value.code == 2

def test_probe():
    torch.manual_seed(0)
    labels = torch.arange(600) % 3
    x = F.one_hot(labels, 20).float() + 0.2 * torch.randn(600, 20)
    assert EMBED.probe(x[:300], labels[:300], x[300:], labels[300:], 3) > 0.99
    assert EMBED.probe(x[:300], labels[:300].roll(1), x[300:], labels[300:], 3) < 0.05

def test_relative_representation(pairs):
    """Against loops over anchors, as the paper has it"""
    name = next(iter(pairs.widths))
    text, images = pairs.text.float(), pairs.images[name].float()
    def relative(row, anchors):
        values = (anchors @ row).clamp(min=0)
        kept = values.topk(20).indices
        out = torch.zeros(len(anchors))
        out[kept] = values[kept] ** 4
        return out / out.norm()
    prompts = torch.stack([relative(row, text) for row in pairs.prompts.float()])
    hits = [int((prompts @ relative(row, images)).argmax()) == label
            for row, label in zip(pairs.test_images[name].float()[:150], pairs.labels[:150].tolist())]
    with settings(ASIF, kept=20, power=4.0):
        known, _ = ASIF.fit(pairs.families(), pairs, 0, CPU)
        pairs.sets[0]["rows"] = (0, 150)
        ours = ASIF.evaluate(known[name], pairs, name)["drawn"]
        pairs.sets[0]["rows"] = (0, 400)
    assert ours == pytest.approx(np.mean(hits), abs=0.01) and ours > 0.3

# ---------------------------------------------------------------------- tables
DATA = "cifar10+cifar100"

def kernels():
    """Check the fused loss on this GPU against the plain one in double precision, time it beside the plain
    one in that of the scripts, and add lines to kernels.jsonl."""
    from triton.testing import do_bench
    torch.manual_seed(0)
    gpu, out, half = torch.device("cuda"), HERE / "results" / "kernels.jsonl", torch.float16
    sys.modules[FAST.__name__] = FAST  # torch.compile looks there
    for rows, width, dtype in ((431, 384, torch.float32), (5551, 384, torch.float32), (5551, 768, half),
                               (431, 768, torch.bfloat16), (16384, 384, half), (16384, 1024, half)):
        images, mapped = F.normalize(torch.randn(2, 1, rows, width, device=gpu), dim=3)
        mapped, images = hard_pairs(images, mapped).requires_grad_(), images.to(dtype)
        precise = mapped.detach().double().requires_grad_()
        loss = info_nce_slow(precise, images.double())
        grad, = torch.autograd.grad(loss.sum(), precise)
        with settings(FAST, fused_batch=math.inf):
            plain = lambda: FAST.info_nce(mapped, images)
            forms = dict(plain=plain, inductor=torch.compile(plain, dynamic=False),
                         triton=lambda: FAST.FusedInfoNCE.apply(mapped, images, 100.0))
            for form, function in forms.items():
                def both():
                    loss = function()
                    return loss, torch.autograd.grad(loss.sum(), mapped)[0]
                if form == "triton":
                    ours, mine = both()
                low, middle, high = do_bench(both, quantiles=(0.2, 0.5, 0.8))
                line = dict(script="test_hypernet.py", kernel="info_nce", form=form, pairs=rows, width=width,
                            images=str(dtype)[6:], ms=middle, ms_20=low, ms_80=high,
                            tflops=4 * rows ** 2 * width / middle / 1e9, **FAST.environment(gpu))
                print(json.dumps(line), flush=True)
                FAST.append_line(out, dict(line, device="cuda"))
        torch.testing.assert_close(ours.double(), loss, rtol=1e-4, atol=1e-4)
        assert (mine - grad).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2) * grad.abs().max()

def lines_of(path):
    """{flags that differ from the script's values: [(line, run)]} of its results on both CIFARs"""
    groups, usual = {}, hyp(path)
    for line in read_results("hypernet"):
        measured = line.get("data") == DATA and not line["dry_run"] and line["file"] != "speed.jsonl"
        if line["script"] == path.name and measured:
            own = {key: value for key, value in line["hyp"].items() if usual[key] != value}
            flags = " ".join(f"--{key} {value:g}" for key, value in own.items())
            groups.setdefault(flags, []).extend((line, run) for run in line["runs"])
    return groups

def named(path, group):
    """The script's name, with a mark where a line is of an earlier text of it."""
    body = hashlib.sha256(path.read_text().split('"""', 2)[2].encode()).hexdigest()
    return f"`{path.name}`" + " (†)" * any(line["sha256"] != body for line, _ in group)

def mean_of(run, key):
    return float(np.mean([row[key] for row in run["epochs"]]))

def steps_rows(paths):
    """A row per script and its flags: mean over encoders."""
    rows = [["Script", "Adds", "Diff", "Flags", "CIFAR-10 %", "CIFAR-100 %", "R@1 %", "R@10 %", "Steps",
             "Time s", "TFLOPs", "nominal", "Runs", "Encoders, pairs, machine"]]
    for before, path in scripts("hypernet"):
        if path.name not in paths:
            continue
        diff = "+{} -{}".format(*changed_lines(before, path)) if before else ""
        groups = lines_of(path) or {"": []}
        for flags, group in groups.items():
            cells = ["not measured"] * 9 + [""]
            if group:
                line = group[0][0]
                cells = [mean_std([mean_of(run, key) for _, run in group], 1, 100)
                         for key in ("cifar10", "cifar100", "R@1", "R@10")]
                cells += [f"{mean_of(group[0][1], 'steps'):.0f}",
                          mean_std([run["time_seconds"] for _, run in group], 1),
                          f"{1000 * line['pflops']:.3g}", f"{1000 * line['pflops_nominal']:.3g}",
                          str(len(group)), f"{len(line['widths'])}, {line['pairs']}, {machine(line)}"]
            rows.append([named(path, group), docstring(path)["Adds"].removeprefix("the baseline: "), diff,
                         f"`{flags}`" if flags else "", *cells])
    return rows

def scores(path, flags=""):
    """{encoder: mean over runs and sets of its accuracy}"""
    found = collections.defaultdict(list)
    for _, run in lines_of(path).get(flags, ()):
        for row in run["epochs"]:
            found[row["encoder"]].append((row["cifar10"] + row["cifar100"]) / 2)
    return {name: float(np.mean(values)) for name, values in found.items()}

def spearman(a, b):
    """Rank correlation of two dicts with the same keys; equal values share their mean rank."""
    def ranks(values):
        values = np.array(values)
        return [(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values]
    return float(np.corrcoef(ranks([a[name] for name in a]), ranks([b[name] for name in a]))[0, 1])

def test_spearman():
    assert spearman(dict(a=1, b=2, c=3), dict(a=10, b=20, c=30)) == pytest.approx(1)
    assert spearman(dict(a=1, b=2, c=3), dict(a=3, b=2, c=1)) == pytest.approx(-1)
    assert spearman(dict(a=1, b=2, c=3, d=4), dict(a=1, b=3, c=2, d=4)) == pytest.approx(0.8)

def encoder_rows():
    """A row per encoder: its accuracy by each script."""
    shown = {path: found for path in (*MAINS, HERE / "asif.py") if (found := scores(path))}
    probes = {row["encoder"]: (row["cifar10"] + row["cifar100"]) / 2
              for line in read_results("hypernet") if line["script"] == "embed.py" and line["data"] == DATA
              for run in line["runs"] for row in run["epochs"]}
    rows = [["Encoder", "Ridge regression on images %", *(f"{path.stem} %" for path in shown)]]
    for name in next(iter(shown.values()), ()):
        accs = [probes[name], *(found[name] for found in shown.values())]
        rows.append([name, *(f"{100 * acc:.1f}" for acc in accs)])
    return rows

def ranking_rows():
    """How the order of encoders agrees with that of connectors trained alone."""
    rows = [["Ranking by", "Spearman with main0", "best one the same", "of the best three"]]
    wanted = scores(MAINS[0])
    order = sorted(wanted, key=wanted.get, reverse=True)
    for path in (*MAINS[1:], HERE / "asif.py"):
        if wanted and (found := scores(path)):
            best = sorted(found, key=found.get, reverse=True)
            same = "yes" if best[0] == order[0] else "no"
            rows.append([f"`{path.name}`", f"{spearman(wanted, found):.2f}", same,
                         f"{len(set(best[:3]) & set(order[:3]))} of 3"])
    return rows

def held_out_rows():
    """A row per encoder that training has not seen and script that searches for it: means over runs."""
    found = collections.defaultdict(list)
    for path in MAINS[8:]:
        for line, run in lines_of(path).get("", ()):
            for row in run["held_out"]:
                found[row["encoder"], named(path, [(line, run)])].append(row)
    rates = [key for row in next(iter(found.values()), [{}])[:1] for key in row if key.startswith("lr ")]
    rows = [["Encoder", "Script", "Mean vector, no search %", *(f"{rate} %" for rate in rates),
             "Taken by its loss %", "Nearest relative's connector %", "From scratch, as many pairs %",
             "as many FLOPs %", "GFLOPs", "Runs"]]
    order = [name for name, _ in found]
    for (name, script), group in sorted(found.items(), key=lambda item: order.index(item[0][0])):
        relatives = ", ".join(sorted({row["relative"] for row in group}))
        keys = ("start", *rates, "found", "borrowed", "same_pairs", "same_flops")
        cells = [mean_std([row[key] for row in group], 1, 100) for key in keys]
        cells[-3] += f" ({relatives})"
        rows.append([name, script, *cells, f"{group[0]['GFLOPs']:.1f}", str(len(group))])
    return rows

def speed_rows():
    """Batches of an encoder that a second of training takes: a row per script, ratios of one round each."""
    rows, rates = [["Script", "Batches of an encoder per s", "against main1 (rounds)",
                    "against main2 (rounds)", "Machine"]], {}
    speeds = [line for line in read_results("hypernet") if line["file"] == "speed.jsonl"]
    speeds = [line for line in speeds if machine(line) == machine(speeds[-1])]
    for path in MAINS:
        lines = [line for line in speeds if line["script"] == path.name]
        rates[path] = {run["seed"]: mean_of(run, "steps") * len(run["epochs"]) / run["parts"]["train"]
                       for line in lines for run in line["runs"]}
        if lines:
            cells = [mean_std(list(rates[path].values()), 1)]
            for other in MAINS[1:3]:
                base = rates.get(other, {})
                ratios = [rate / base[seed] for seed, rate in rates[path].items() if seed in base]
                cells.append(f"{mean_std(ratios, 2)} ({len(ratios)})" if ratios and path != other else "")
            rows.append([named(path, [(line, None) for line in lines]), *cells, machine(lines[-1])])
    return rows

def flops_rows():
    """The published numbers beside the formulas."""
    macs = HYPER.decoder_macs(1024, 768)
    def hypernet(count):
        return sum(HYPER.step_flops(count, size, width, 768, 4, macs) for size, width in zip(
            HYPER.batch_sizes(595375), itertools.cycle((384, 768, 1024)))) / 1e9
    step = SEPARATE.step_flops(1, 2 ** 14, 384, 768, 4) / 1e9
    search = SEARCH.search_flops(8, 384, 768, 4, macs) / 1e9
    exact = sum(SEPARATE.step_flops(1, size, 384, 768, 4) for size in SEPARATE.batch_sizes(595375)) / 1e9
    once = sum(SEPARATE.step_flops(1, size, 384, 768, 2) for size in 10 * [*1162 * [512], 431]) / 1e9
    return [["Published GFLOPs", "What", "Formula", "Remark"],
            *([f"{published:.2f}", f"a step of a connector 768 to {width}",
               f"{SEPARATE.step_flops(1, 2 ** 14, width, 768, 4) / 1e9:.2f}", "logits counted twice"]
              for width, published in ((384, 843.96), (768, 1687.92), (1024, 2250.56))),
            ["312,265", "ten epochs of it, width 384", f"{370 * step:,.0f}",
             f"{exact:,.0f} with the last batch of 5,551; {once:,.0f} with batches of 512, logits once"],
            *([f"{published:.2f}", f"hypernetwork, {3 * count} encoders, an epoch", f"{hypernet(count):.2f}",
               "each encoder sees a third of the pairs"]
              for count, published in ((4, 29260.64), (10, 73151.62))),
            ["2.42", "a step of auto-decoding", f"{search:.5f}",
             "the counter rounds to 1.21 multiply-adds, then doubles"],
            ["180,101", "74,422 of these", f"{74422 * search:,.0f}", "with the rounded 2.42: 180,101"],
            ["24,200", "10,000 of these", f"{10000 * search:,.0f}",
             f"{312265 / 24200:.1f} times less than 312,265"]]

TABLES = {name: lambda rows=rows: markdown(rows()) for name, rows in dict(
    ladder=lambda: steps_rows([path.name for path in MAINS]), controls=lambda: steps_rows(["asif.py"]),
    encoders=encoder_rows, ranking=ranking_rows, held_out=held_out_rows, speed=speed_rows,
    flops=flops_rows).items()}
