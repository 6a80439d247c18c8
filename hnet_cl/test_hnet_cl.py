"""Checks of the ideas of this ladder, each against a slow or independent form of it, and its tables."""
import collections, contextlib, copy, functools, hashlib, itertools, json, math, multiprocessing, os, pathlib
import re, resource, shlex, signal, sys, tempfile, types

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from test_smoke import (
    call, changed_lines, docstring, hyp, load, machine, markdown, mean_std, read_results, scripts,
    write_cifar)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
MAINS = [path for _, path in scripts("hnet_cl") if path.name.startswith("main")]
LOADED = [load(path) for path in MAINS]
FINETUNE, FULL, CHUNKED, REG, BATCHED, GAIN, STRUCTURE, INFER, BBB, SAMPLES, SSGE, CLOSED, GRAM, *_ = LOADED
GRAPH, SEEDS = LOADED[13:]

@contextlib.contextmanager
def settings(module, **values):
    """Hyperparameters for a while."""
    before = dict(module.HYP)
    assert values.keys() <= before.keys(), values.keys() - before.keys()
    module.HYP.update(values)
    try:
        yield module.main_net()
    finally:
        module.HYP.clear(), module.HYP.update(before)

def made(module, net, seed=0):
    """Model and statistics in fp64"""
    torch.manual_seed(seed)
    return module.Model(net).double(), module.fresh_stats(net).double()

def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def close(a, b, tolerance=1e-10):
    """Equal but for rounding, on the scale of the larger one"""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), (a - b).abs().max()

# ---------------------------------------------------------------------- main networks
WRN = dict(net_type="wrn", no_bias=True, wrn_use_fc_bias=True)
IRESNET = dict(net_type="iresnet", no_bias=True, iresnet_projection_shortcut=True, iresnet_use_fc_bias=True)
SPLITS = {"6x10": dict(num_tasks=6, num_classes_per_task=10), "5x2": {},
          "10x10": dict(num_tasks=10, num_classes_per_task=10, skip_tasks=1)}
SIZES = {("resnet", "6x10"): 468540, ("resnet", "5x2"): 465290, ("resnet", "10x10"): 471140,
         ("wrn", "6x10"): 36511244, ("wrn", "5x2"): 36479194, ("iresnet", "10x10"): 11220032}

def flags_of(kind, split):
    return dict(dict(wrn=WRN, iresnet=IRESNET, resnet=dict(net_type="resnet"))[kind], **SPLITS[split])

@pytest.mark.parametrize("kind, split", SIZES)
def test_published_sizes_of_main_networks(kind, split):
    for module in (FINETUNE, SEEDS):
        with settings(module, **flags_of(kind, split)) as net:
            assert net.size == SIZES[kind, split] == sum(map(math.prod, net.shapes))
            assert len(net.shapes) == dict(resnet=126, wrn=80, iresnet=61)[kind]
            assert 2 * sum(net.norms) == dict(resnet=2272, wrn=17952, iresnet=9600)[kind]
            flops = dict(resnet=137.7, wrn=10486.6, iresnet=1110.8)[kind]
            assert FINETUNE is not module or module.forward_flops(net) / 1e6 == pytest.approx(flops, rel=2e-3)
    with settings(FINETUNE) as net:
        assert (net.size, net.head) == (19338, 330)

def test_a_typing_error_of_the_published_counts():
    """The Gaussian wrn for 5x2 is given the weights of that for 6x10."""
    assert 2 * SIZES["wrn", "6x10"] == 73022488 and 2 * SIZES["wrn", "5x2"] == 72958388

def resnet_slow(flat, net, x, norm):
    """6n + 2 layers from the weights in a row, one by one; norm(x, gain, shift) normalizes."""
    def take(*shape):
        nonlocal flat
        part, flat = flat[:math.prod(shape)].view(shape), flat[math.prod(shape):]
        return part
    widths = [net.channels[0]] + [c for c in net.channels[1:] for _ in range(2 * net.blocks)]
    norms = [(take(c), take(c)) for c in widths]
    convs = [(take(b, a, 3, 3), take(b)) for a, b in zip([3] + widths, widths)]
    last = take(10, widths[-1]), take(10)
    assert len(flat) == 0
    x = norm(F.conv2d(x, *convs[0], padding=1), *norms[0]).relu()
    for i in range(1, len(widths), 2):
        stride = 1 + (widths[i] != widths[i - 1] and i > 2 * net.blocks)
        y = norm(F.conv2d(x, *convs[i], padding=1, stride=stride), *norms[i]).relu()
        y = norm(F.conv2d(y, *convs[i + 1], padding=1), *norms[i + 1])
        skip = torch.zeros_like(y)
        before = (y.shape[1] - x.shape[1]) // 2
        skip[:, before:before + x.shape[1]] = x[:, :, ::stride, ::stride]
        x = (y + skip).relu()
    return F.linear(x.mean((2, 3)), *last)

def batch_norm_slow(x, gain, shift):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * gain[:, None, None] + shift[:, None, None]

@pytest.mark.parametrize("kind", ["resnet", "tiny"])
def test_resnet_layer_by_layer(kind):
    with settings(FINETUNE, net_type=kind, resnet_block_depth=2, resnet_channel_sizes="4,4,7,14") as net:
        flat, x = draws(net.size), draws(4, 3, 16, 16, seed=1)
        stats = FINETUNE.fresh_stats(net)[0].double()
        close(FINETUNE.forward(net, flat, stats, x, True), resnet_slow(flat, net, x, batch_norm_slow))

def test_iresnet_is_that_of_torchvision():
    """With weights, statistics and gradients in the order of the specification"""
    with settings(FINETUNE, **flags_of("iresnet", "10x10")) as net:
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=100).double()
        model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False).double(), torch.nn.Identity()
        model.fc.bias = None
        modules = dict(model.named_modules())
        names = [name for name in modules if re.search(r"conv\d$", name)]
        norms = [modules[re.sub(r"conv(\d)$", r"bn\1", name)] for name in names]
        shortcuts = [modules[f"layer{i}.0.downsample"] for i in (2, 3, 4)]
        norms += [shortcut[1] for shortcut in shortcuts]
        tensors = [p for norm in norms for p in (norm.weight, norm.bias)]
        tensors += [shortcut[0].weight for shortcut in shortcuts] + [modules[name].weight for name in names]
        flat = torch.cat([p.detach().flatten() for p in [*tensors, model.fc.weight]])
        stats, x = FINETUNE.fresh_stats(net)[0].double(), draws(2, 3, 16, 16)
        for training in (True, False):
            model.train(training)
            close(FINETUNE.forward(net, flat, stats, x, training), model(x))
        close(stats, torch.stack([torch.cat([getattr(norm, key) for norm in norms])
                                  for key in ("running_mean", "running_var")]))

def test_wrn_layer_by_layer():
    with settings(FINETUNE, **WRN, wrn_block_depth=2, wrn_widening_factor=1) as net:
        flat, x = draws(net.size), draws(3, 3, 8, 8, seed=1)
        parts = list(flat.split([*map(math.prod, net.shapes)]))
        parts = [part.view(shape) for part, shape in zip(parts, net.shapes)]
        norms, skips, convs, last = parts[:26], parts[26:29], parts[29:42], parts[42:]
        y, i = F.conv2d(x, convs[0], padding=1), 0
        for stage in range(3):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut = F.conv2d(y, skips[stage], stride=stride) if block == 0 else y
                for step in (stride, 1):
                    y = batch_norm_slow(y, *norms[2 * i:2 * i + 2]).relu()
                    y, i = F.conv2d(y, convs[i + 1], padding=1, stride=step), i + 1
                y = y + shortcut
        y = batch_norm_slow(y, *norms[24:]).relu().mean((2, 3))
        stats = FINETUNE.fresh_stats(net)[0].double()
        close(FINETUNE.forward(net, flat, stats, x, True), F.linear(y, *last))

def batch(net, n=6, seed=3):
    """inputs, labels, images of the train set"""
    side = 16 if net.kind == "tiny" else 32
    return draws(n, 3, side, side, seed=seed), torch.arange(n) % 2, 100

def test_head_and_statistics_of_other_tasks_stay_as_they_are():
    for module in LOADED[:3]:
        with settings(module) as net:
            model, stats = made(module, net)
            before = stats.clone()
            loss, _ = module.objective(net, model, stats, 1, *batch(net))
            weights = model(1)
            loss, _ = module.objective(net, lambda task: weights, stats, 1, *batch(net))
            grad, = torch.autograd.grad(loss, weights)
            head = grad[-net.head:]
            own = [False] * 2 + [True] * 2 + [False] * 6
            assert (head[:320].view(10, 32).abs().sum(1) > 0).tolist() == (head[320:] != 0).tolist() == own
            changed = [task for task in range(5) if not torch.equal(stats[task], before[task])]
            assert changed == ([0] if module is FINETUNE else [1])
    with settings(FINETUNE, train_from_scratch=True) as net:
        model, stats = made(FINETUNE, net)
        FINETUNE.objective(net, model, stats, 3, *batch(net))[0].backward()
        assert [bool(g.any()) for g in model.weights.grad] == [False] * 3 + [True, False]
        assert [task for task in range(5) if stats[task, 0].any()] == [3]

# ---------------------------------------------------------------------- data
def test_tasks_are_classes_in_order():
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    with settings(FINETUNE, train_images=4, val_set_size=1):
        part = images, torch.arange(40) % 10
        tasks = FINETUNE.split(dict(cifar10=[part, part]), CPU)
        kept = {name: [[int(x[0, 0, 0]) for x in task[name][0]] for task in tasks] for name in FINETUNE.PARTS}
        assert kept["val"] == [[0], [2], [4], [6], [8]] and kept["train"][1] == [3, 12, 13, 22]
        assert kept["test"][4] == [8, 9, 18, 19, 28, 29, 38, 39]
        assert tasks[1]["train"][1].tolist() == [1, 0, 1, 0]
    with settings(FINETUNE, **SPLITS["6x10"]):
        sets, _ = FINETUNE.load_sets("synthetic")
        assert [*sets] == ["cifar10", "cifar100"]
        tasks = FINETUNE.split(sets, CPU)
        wanted = sets["cifar100"][0][0][sets["cifar100"][0][1] == 13]
        held = tasks[2]["val"][0][tasks[2]["val"][1] == 3]
        assert torch.equal(held, wanted[:10].permute(0, 3, 1, 2))
    with settings(FINETUNE, **SPLITS["10x10"]):
        assert [*FINETUNE.load_sets("synthetic")[0]] == ["cifar100"]

def test_batches_are_permutations_in_a_row():
    with settings(FINETUNE, batch_size=8):
        steps = list(FINETUNE.plan(20, 0, 1, 0, 5, CPU))
        index = torch.cat([index for _, index, _ in steps])
        assert sorted(index[:20].tolist()) == sorted(index[20:].tolist()) == list(range(20))
        assert not torch.equal(index[:20], index[20:])
        for wanted, found in zip(steps[3:], FINETUNE.plan(20, 0, 1, 3, 5, CPU)):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(wanted, found))
        other = next(FINETUNE.plan(20, 0, 2, 0, 5, CPU))
        assert not torch.equal(other[1], steps[0][1]) and not torch.equal(other[2], steps[0][2])

def test_crops_one_by_one():
    images = (255 * draws(4, 3, 32, 32).abs().clamp(0, 1)).to(torch.uint8)
    numbers = torch.tensor([[0.4, 0, 0], [0.5, 0.5, 0.5], [0.9, 0.99, 0.01], [0.1, 0.3, 0.7]])
    crops = FINETUNE.augment(images, numbers)
    for image, (flip, y, x), found in zip(images.numpy(), numbers.tolist(), crops):
        padded = np.pad(image[:, :, ::-1] if flip < 0.5 else image, ((0, 0), (4, 4), (4, 4)))
        top, left = math.floor(9 * y), math.floor(9 * x)
        assert np.array_equal(found.numpy(), padded[:, top:top + 32, left:left + 32])
    with settings(FINETUNE):
        wanted = torchvision.transforms.Normalize(FINETUNE.MEAN, FINETUNE.STD)(images / 255)
        close(FINETUNE.prepare(images), F.interpolate(wanted, scale_factor=0.5, mode="area"), 1e-6)
    with settings(FINETUNE, net_type="resnet"):
        close(FINETUNE.prepare(images), wanted, 1e-6)

def test_learning_rate():
    with settings(FINETUNE, lr=1.0, lambda_lr_scheduler=True):
        rates = {epoch: FINETUNE.learning_rate(epoch * 10, 10) for epoch in (0, 80, 80.9, 81, 121, 161, 199)}
        assert rates == {0: 1, 80: 1, 80.9: 1, 81: 0.1, 121: 0.01, 161: 1e-3, 199: 5e-4}

# ---------------------------------------------------------------------- hypernetworks
def call_by_call(params, cond, chunks, size):
    """A chunked hypernetwork with one hidden layer, one call after the other"""
    embs, w1, b1, w2, b2 = params
    outputs = []
    for k in range(chunks):
        hidden = (w1 @ torch.cat([cond, embs[k]]) + b1).clamp(min=0)
        outputs.append(w2 @ hidden + b2)
    return torch.cat(outputs)[:size]

def test_full_hypernetwork_is_an_mlp():
    with settings(FULL, hmlp_arch="5,7", hnet_net_act="sigmoid") as net:
        model, _ = made(FULL, net)
        layers = [torch.nn.Linear(a, b).double() for a, b in ((32, 5), (5, 7), (7, net.size))]
        for layer, weight, bias in zip(layers, model.params[::2], model.params[1::2]):
            layer.weight.data, layer.bias.data = weight.data, bias.data
            layer.bias.data += 0.1
        slow = torch.nn.Sequential(layers[0], torch.nn.Sigmoid(), layers[1], torch.nn.Sigmoid(), layers[2])
        close(model(3), slow(model.task_embs[3]))
    with settings(FULL):
        assert FULL.budget(FULL.main_net())["ratio"] == pytest.approx(33, abs=0.01)

@pytest.mark.parametrize("own", [False, True])
def test_chunks_call_by_call(own):
    for module in LOADED[2:5]:
        with settings(module, hmlp_arch="9", chmlp_chunk_size=700, use_cond_chunk_embs=own) as net:
            model, _ = made(module, net)
            embs, *rest = model.params
            for bias in rest[1::2]:
                bias.data += 0.1
            chunks = math.ceil(19338 / 700)
            assert embs.shape == ((5, chunks, 32) if own else (chunks, 32)) and chunks * 700 > 19338
            params = [embs[2] if own else embs, *rest]
            close(model(2), call_by_call(params, model.task_embs[2], chunks, net.size))

# ---------------------------------------------------------------------- penalty
def moved(module, net, **values):
    """A model, the same after training has moved it, and statistics"""
    before, stats = made(module, net)
    after = copy.deepcopy(before)
    with torch.no_grad():
        for i, p in enumerate(after.parameters()):
            p += 0.01 * draws(*p.shape, seed=i)
    return before, after, stats

def penalty_slow(net, before, after, tasks):
    """Weight by weight"""
    total = 0.0
    for old in tasks:
        now, then = after(old), before(old).detach()
        place = 0
        for i, shape in enumerate(net.shapes):
            for number in range(shape[0]):
                size = math.prod(shape[1:])
                if i < len(net.shapes) - 2 or number // 2 == old:
                    total = total + ((now[place:place + size] - then[place:place + size]) ** 2).sum()
                place += size
    return total / len(tasks)

def with_gradient(value, model):
    model.zero_grad()
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

@pytest.mark.parametrize("chunk, arch", [(250, ""), (700, "9"), (40, "6,5")])
def test_penalty_in_three_forms(chunk, arch):
    """Tensor by tensor, batched, weight by weight: value and gradient"""
    found = []
    for module in (REG, BATCHED):
        with settings(module, chmlp_chunk_size=chunk, hmlp_arch=arch) as net:
            before, after, _ = moved(module, net)
            reference = module.take_reference(net, before, 3)
            if module is REG:
                found.append(with_gradient(module.regularizer(net, after, reference), after))
                found.append(with_gradient(penalty_slow(net, before, after, range(3)), after))
            else:
                penalty = module.regularizer(net, after.batch([0, 1, 2]), reference, [0, 1, 2])
                found.append(with_gradient(penalty, after))
    for value, gradient in found[:-1]:
        close(value, found[-1][0]), close(gradient, found[-1][1])

def test_subsets_of_tasks_and_targets_made_online():
    with settings(BATCHED) as net:
        before, after, _ = moved(BATCHED, net)
        stored = BATCHED.take_reference(net, before, 4)
        with settings(BATCHED, calc_hnet_reg_targets_online=True):
            online = BATCHED.take_reference(net, before, 4)
        for chosen in ([1, 3], [0, 1, 2, 3]):
            a, b = (BATCHED.regularizer(net, after.batch(chosen), kept, chosen) for kept in (stored, online))
            close(a, b)
            close(a, penalty_slow(net, before, after, chosen))
        assert BATCHED.draw_tasks(4, 0, 7) == [0, 1, 2, 3]
    with settings(BATCHED, hnet_reg_batch_size=2):
        drawn = [BATCHED.draw_tasks(4, 0, step) for step in range(300)]
        assert all(len(set(part)) == 2 for part in drawn) and BATCHED.draw_tasks(1, 0, 3) == [0]
        counts = collections.Counter(itertools.chain(*drawn))
        assert all(abs(counts[task] - 150) < 35 for task in range(4))

def test_batched_objective_is_that_of_main3():
    found = []
    for module in (REG, BATCHED):
        with settings(module, beta=7.0) as net:
            before, after, stats = moved(module, net)
            more = (module.take_reference(net, before, 3),) + ([0, 1, 2],) * (module is BATCHED)
            loss, terms = module.objective(net, after, stats, 3, *batch(net), *more)
            found.append((*with_gradient(loss, after), terms, stats))
    for a, b in zip(*found):
        close(a, b)

def test_embeddings_of_later_tasks_do_not_move():
    with settings(BATCHED) as net:
        before, after, stats = moved(BATCHED, net)
        reference = BATCHED.take_reference(net, before, 2)
        loss, _ = BATCHED.objective(net, after, stats, 2, *batch(net), reference, [0, 1])
        loss.backward()
        assert [bool(g.any()) for g in after.task_embs.grad] == [True] * 3 + [False] * 2

def test_weights_of_old_tasks_stay_as_beta_grows():
    changes = []
    for beta in (0.0, 10.0, 1e3, 1e5):
        with settings(BATCHED, beta=beta, lr=1e-3) as net:
            model, stats = made(BATCHED, net)
            reference, optimizer = BATCHED.take_reference(net, model, 2), BATCHED.make_optimizer(model)
            for step in range(60):
                loss, terms = BATCHED.objective(net, model, stats, 2, *batch(net), reference, [0, 1])
                loss.backward(), optimizer.step(), optimizer.zero_grad()
            changes.append(float(terms[1]))
    assert changes[0] > 10 * changes[1] > 10 * changes[2] > 10 * changes[3] * 0.5, changes

def test_largest_chunk_that_fits():
    for split, kind, option, wanted in (("6x10", "resnet", "", 7155), ("5x2", "resnet", "100,100", 4390),
                                        ("10x10", "iresnet", "", 171000)):
        with settings(CHUNKED, **flags_of(kind, split), hmlp_arch=option) as net:
            chunk = CHUNKED.largest_chunk(net)
            assert chunk == pytest.approx(wanted, rel=0.01)
            for size, fits in ((chunk, True), (chunk + 1, False)):
                with settings(CHUNKED, chmlp_chunk_size=size):
                    sizes = CHUNKED.budget(net)
                    assert (sizes["ratio"] <= 1) == fits

# ---------------------------------------------------------------------- starts
def test_gains_start_at_one():
    for module in LOADED[5:10]:
        for offset in (0.0, 1.0):
            with settings(module, gain_offset=offset) as net:
                model, _ = made(module, net)
                tensors = [part.view(shape) for part, shape in
                           zip(model(0)[:net.size].split([*map(math.prod, net.shapes)]), net.shapes)]
                assert torch.cat(tensors[:14:2]).mean().item() == pytest.approx(offset, abs=0.1)
                assert torch.cat(tensors[1:14:2]).mean().item() == pytest.approx(0, abs=0.1)
    with settings(GAIN, gain_offset=0.0) as net:
        found = made(GAIN, net)[0]
        with settings(BATCHED):
            close(found(2), made(BATCHED, net)[0](2))

def deviation(model, chunks):
    """Of what the hypernetwork makes, chunk by chunk"""
    return torch.stack([part.std() for part in (model(0) - model.offset).split(chunks)])

def test_hyperfan_gives_the_variances_that_it_is_for():
    with settings(GAIN, hnet_init="hyperfan", gain_offset=0.0, chmlp_chunk_size=300, allow_over_budget=True,
                  std_normal_temb=0.05) as net:
        model, _ = made(GAIN, net)
        wanted = torch.stack([part.mean() for part in GAIN.spread(net).double().split(300)]) ** 0.5
        ratios = (deviation(model, 300) / wanted).detach()
        assert ratios.log().mean().item() == pytest.approx(0, abs=0.1) and (ratios.log().abs() < 0.5).all()
    with settings(GAIN, hnet_init="hyperfan", hnet_type="hmlp", gain_offset=1.0) as net:
        model, _ = made(GAIN, net)
        tensors = model(0).detach().split([*map(math.prod, net.shapes)])
        assert (torch.cat(tensors[:14:2]) == 1).all() and (torch.cat(tensors[1:14:2]) == 0).all()
        for shape, part in list(zip(net.shapes, tensors))[16:28:2]:
            assert part.std().item() == pytest.approx((2 / math.prod(shape[1:])) ** 0.5, rel=0.15)
    for module in (GAIN, SEEDS):
        with settings(module, hnet_init="normal", std_normal_emb=0.5) as net:
            vectors, weight, bias = made(module, net)[0].params
            assert weight.std().item() == pytest.approx(0.02, rel=0.05) and not bias.any()
            assert vectors.std().item() == pytest.approx(0.5, rel=0.1)

def test_large_task_vectors_make_all_chunks_start_the_same():
    """As in the published runs that combine gauss with vectors of deviation 1"""
    for deviation, alike in ((1.0, True), (0.05, False)):
        with settings(BBB, hnet_init="gauss", std_normal_temb=deviation, gain_offset=0.0) as net:
            model, _ = made(BBB, net)
            rows = (model(0) - model.offset)[:71 * 540].view(71, 540).detach()
            correlation = np.corrcoef(rows.numpy())[np.triu_indices(71, 1)]
            assert (correlation.min() > 0.99) == alike

# ---------------------------------------------------------------------- structure
GROUPS = {  # outputs and calls as published
    ("resnet", False): "480x1 2352x1 2352x9 4704x1 9312x9 18624x1 37056x9 650x1",
    ("resnet", True): "480x1 2352x1 2352x11 4656x22 9264x36 650x1",
    ("wrn", False): "464x1 23360x1 230720x7 461440x15 1844480x15 2560x1 51200x1 204800x1 6410x1",
    ("wrn", True): "464x1 23360x71 461440x15 1844480x15 2560x1 51200x1 204800x1 6410x1"}
R1, R2 = "32,3;32,3;32,6;64,32,3;64,32,6;64,32,3;64,32,6;32,3", "32,8;32,8;64,32,24;64,32,24;64,32,24;32,8"
W1, W2 = "32,8;32,8;64,32,10;64,32,12;64,32,12" + 4 * ";32,8", "32,5;64,32,21;64,32,13;64,32,13" + 4 * ";32,5"
STRUCTURED = [  # net, gcd, size of task vector, of chunk vectors, layers; weights and ratio of the Gaussian
    ("resnet", False, 3, "0,0,3,0,3,0,3,0", "", 896737, 0.9636),
    ("resnet", False, 8, "0,0,8,0,8,0,8,0", R1, 925322, 0.9943),
    ("resnet", True, 8, "0,0,16,16,16,0", "", 878524, 0.9441),
    ("resnet", True, 32, "0,0,32,32,32,0", R2, 930964, 1.0004),
    ("wrn", False, 8, "0,0,2,4,4,0,0,0,0", "", 70228360, 0.9626),
    ("wrn", False, 32, "0,0,32,32,32,0,0,0,0", W1, 70286104, 0.9634),
    ("wrn", True, 5, "0,16,8,8,0,0,0,0", "", 68781585, 0.9428),
    ("wrn", True, 32, "0,32,32,32,0,0,0,0", W2, 68838184, 0.9435)]

def twice(text, mark):
    """A list of groups for means and for rhos"""
    return f"{text}{mark}{text}" if text else ""

@pytest.mark.parametrize("kind, gcd", GROUPS)
def test_groups_and_places(kind, gcd):
    with settings(STRUCTURE, **flags_of(kind, "5x2")) as net:
        with torch.device("cpu" if kind == "resnet" else "meta"):
            groups, places = STRUCTURE.structure(net, gcd)
        assert " ".join(f"{outputs}x{calls}" for outputs, calls in groups) == GROUPS[kind, gcd]
        total = sum(map(math.prod, groups))
        share = dict(resnet=0, wrn=0.0009 if gcd else 0.0004)[kind]
        assert len(places) == net.size and 1 - net.size / total == pytest.approx(share, abs=5e-5)
        assert kind == "wrn" or torch.equal(places.sort().values, torch.arange(total))

@pytest.mark.parametrize("kind, gcd", GROUPS)
def test_structured_weights_layer_by_layer(kind, gcd):
    """The first convolution with another width in, as its calls put it together"""
    more = dict(resnet_block_depth=2) if kind == "resnet" else dict(wrn_block_depth=2, wrn_widening_factor=1)
    with settings(STRUCTURE, **flags_of(kind, "5x2"), **more) as net:
        groups, places = STRUCTURE.structure(net, gcd)
        assert len(places.unique()) == net.size
        outputs = draws(sum(map(math.prod, groups)))
        tensors = [part.view(shape) for part, shape in
                   zip(outputs[places].split([*map(math.prod, net.shapes)]), net.shapes)]
        if kind == "resnet":  # stage 2 begins with conv 5, of 16 channels in and 32 out
            ahead = sum(map(math.prod, groups[:3])) if not gcd else 480 + 2352 + 3 * 2352
            share = 16 if gcd else 32
            size = share * 16 * 9 + 3 * share
            packages = outputs[ahead:ahead + 32 // share * size].view(32 // share, size)
            conv = torch.cat([row[:share * 144].view(share, 16, 3, 3) for row in packages])
            vectors = [torch.cat([row[share * (144 + i):share * (145 + i)] for row in packages])
                       for i in range(3)]
            wanted = tensors[2 * 13 + 2 * 5], tensors[2 * 13 + 2 * 5 + 1], tensors[10], tensors[11]
        else:  # its second layer of stage 2, of 32 channels in and out, two calls of 16 input channels
            first = sum(map(math.prod, groups[:2]))
            size = 32 * 16 * 9 + 64
            packages = outputs[first + size:first + 3 * size].view(2, size)
            conv = torch.cat([row[:4608].view(32, 16, 3, 3) for row in packages], 1)
            vectors = [packages[0, 4608:4640], packages[0, 4640:]]
            wanted = tensors[26 + 3 + 6], tensors[12], tensors[13]
        for a, b in zip((conv, *vectors), wanted, strict=True):
            close(a, b)

def test_structured_network_by_network():
    """What each network inside makes in each call, put in its place"""
    with settings(STRUCTURE) as net:
        model, _ = made(STRUCTURE, net)
        groups, places = STRUCTURE.structure(net, True)
        params, rows = list(model.params), []
        for outputs, calls in groups:
            embs = params.pop(0) if calls > 1 else torch.empty(1, 0, dtype=torch.float64)
            layers = [params.pop(0) for _ in range(6)]
            for k in range(calls):
                x = torch.cat([model.task_embs[4], embs[k]])
                for weight, bias in zip(layers[::2], layers[1::2]):
                    x = weight @ (x if weight is layers[0] else x.clamp(min=0)) + bias
                rows.append(x)
        close(model(4), torch.cat(rows)[places] + model.offset)

@pytest.mark.parametrize("kind, gcd, cond, embs, arch, weights, ratio", STRUCTURED)
def test_published_structured_sizes(kind, gcd, cond, embs, arch, weights, ratio):
    common = dict(flags_of(kind, "5x2"), hnet_type="structured_hmlp", shmlp_gcd_chunking=gcd)
    lists = dict(chunk_emb_size=twice(embs, ","), hmlp_arch=twice(arch, ";"))
    with settings(BBB, **common, **lists, cond_emb_size=cond) as net:
        sizes = BBB.budget(net)
        assert sizes["hnet_weights"] == weights and sizes["ratio"] == pytest.approx(ratio, abs=5e-5)

# ---------------------------------------------------------------------- inference of tasks
def test_inference_of_tasks_image_by_image():
    probs = draws(3, 2, 7, 4).softmax(3)
    def entropy(p):
        return -sum(x * math.log(x) for x in p.clamp(min=1e-5).tolist())
    doubts = dict(ent=lambda p: entropy(p.mean(0)), conf=lambda p: -p.mean(0).max().item(),
                  agree=lambda p: p.std(0).mean().item())
    for kind, doubt in doubts.items():
        for k in (1, 3):
            def one_by_one(samples):
                table = [[doubt(probs[task, :samples, i]) for i in range(7)] for task in range(3)]
                sums = [[sum(row[i // k * k:i // k * k + k]) for row in table] for i in range(7)]
                return [int(np.argmin(row)) for row in sums]
            with settings(BBB, infer=kind, infer_batch_size=k):
                assert BBB.infer_tasks(probs).tolist() == one_by_one(2)
            if kind != "agree":
                with settings(INFER, infer=kind, infer_batch_size=k):
                    assert INFER.infer_tasks(probs[:, 0]).tolist() == one_by_one(1)

def test_columns_of_final_tests():
    """A network that is sure of what it knows: the heads of its task are large for its own images alone."""
    with settings(INFER, num_tasks=2) as net:
        model = lambda task: torch.tensor(float(task))
        stats = torch.zeros(2, 2, 1)
        sure = {0: [0.9, 0.1], 1: [0.4, 0.6]}
        def predict(net, flat, stats, images, task):
            own = images[:, 0] == task
            return torch.where(own[:, None], torch.tensor(sure[int(task)]), torch.tensor([0.45, 0.55]))
        images = [torch.tensor([[0.0]] * 3 + [[1.0]]), torch.tensor([[1.0]] * 4)]
        labels = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])
        tasks = [dict(test=pair) for pair in zip(images, labels)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(INFER, "predict", predict)
            rows = INFER.final_tests(net, model, stats, tasks, [(model(0), stats[0]), (model(1), stats[1])])
    assert rows[0] == dict(test_during=0.75, test_final=0.75, inferred=0.5, right_task=0.75)
    assert rows[1] == dict(test_during=0.75, test_final=0.75, inferred=0.75, right_task=1.0)

# ---------------------------------------------------------------------- Gaussians
def test_divergence_against_monte_carlo_and_torch():
    mean, std, old_mean, old_std = draws(3), draws(3, seed=1).exp(), draws(3, seed=2), draws(3, seed=3).exp()
    ours = BBB.divergence(mean, std, old_mean, old_std)
    normal = torch.distributions.Normal
    close(ours, torch.distributions.kl_divergence(normal(mean, std), normal(old_mean, old_std)))
    x = mean + std * draws(200000, 3, seed=4)
    sampled = (normal(mean, std).log_prob(x) - normal(old_mean, old_std).log_prob(x)).mean(0)
    assert ((ours - sampled).abs() < 0.02 * (1 + ours)).all()
    with settings(BBB, prior_variance=2.5) as net:
        model, _ = made(BBB, net)
        flat = model(1).detach()
        means, stds = flat[:net.size], torch.log1p(flat[net.size:].exp())
        close(BBB.prior_term(net, flat), (0.5 * ((stds ** 2 + means ** 2) / 2.5 - 1 + math.log(2.5)
                                                 - (stds ** 2).log())).sum())
        assert stds.mean().item() == pytest.approx(math.log1p(math.exp(-2.5)), rel=0.15)

def test_distances_of_gaussians():
    wanted = dict(w2=lambda m, s, o, t: (m - o) ** 2 + (s - t) ** 2,
                  fkl=lambda m, s, o, t: (s / t).log() + (t ** 2 + (m - o) ** 2) / (2 * s ** 2) - 0.5,
                  rkl=lambda m, s, o, t: (t / s).log() + (s ** 2 + (m - o) ** 2) / (2 * t ** 2) - 0.5)
    for kind, formula in wanted.items():
        with settings(BBB, regularizer=kind) as net:
            before, after, _ = moved(BBB, net)
            found = BBB.regularizer(net, after.batch([0, 2]), BBB.take_reference(net, before, 3), [0, 2])
            pairs = [BBB.decode(net, after(old)) + BBB.decode(net, before(old)) for old in (0, 2)]
            close(found, sum(formula(*pair).sum() for pair in pairs) / 2)

def test_penalty_of_gaussians_is_on_means_and_rhos():
    with settings(BBB) as net:
        before, after, _ = moved(BBB, net)
        found = BBB.regularizer(net, after.batch([1, 3]), BBB.take_reference(net, before, 4), [1, 3])
        halves = [slice(0, net.size), slice(net.size, None)]
        slow = sum(penalty_slow(net, lambda task: before(task)[half], lambda task: after(task)[half], [1, 3])
                   for half in halves)
        close(found, slow)

def test_mean_only_is_main7():
    found = []
    for module in (INFER, BBB, SAMPLES):
        more = {} if module is INFER else dict(mean_only=True, chmlp_chunk_size=250)
        with settings(module, **more) as net:
            before, after, stats = moved(module, net)
            last = () if module is INFER else (module.draw_noise(net, 4, CPU, 0).double(),)
            kept = module.take_reference(net, before, 3)
            loss, terms = module.objective(net, after, stats, 3, *batch(net), kept, [0, 1, 2], *last)
            found.append((*with_gradient(loss, after), terms[:2], stats))
    for other in found[1:]:
        for a, b in zip(other, found[0]):
            close(a, b)

@pytest.mark.parametrize("more", [
    {}, dict(net_type="resnet", resnet_block_depth=1, resnet_channel_sizes="4,4,7,14"),
    dict(WRN, wrn_block_depth=1, wrn_widening_factor=1), IRESNET])
def test_samples_side_by_side_are_those_of_the_loop(more):
    """Loss, gradient and statistics of a step; then what the test sees"""
    found = []
    for module in (BBB, SAMPLES):
        if more is IRESNET:  # its layers, without a hypernetwork
            with settings(module, **more) as net:
                flat = (0.05 * draws(2, net.size)).requires_grad_()
                stats, x = module.fresh_stats(net)[0].double(), draws(2, 3, 8, 8, seed=1)
                rows = [module.forward(net, part, stats, x, True) for part in flat] if module is BBB else (
                    module.forward(net, flat, stats, x, True))
                logits = torch.stack(rows) if module is BBB else rows
                found.append((logits, torch.autograd.grad(logits.square().sum(), flat)[0], stats))
            continue
        with settings(module, **more, train_sample_size=3, allow_over_budget=True) as net:
            before, after, stats = moved(module, net)
            noise = draws(3, net.size, seed=5)
            kept = module.take_reference(net, before, 2)
            loss, terms = module.objective(net, after, stats, 2, *batch(net), kept, [0, 1], noise)
            found.append((*with_gradient(loss, after), terms, stats))
            model, images = after.float(), torch.arange(12288).remainder(251).view(4, 3, 32, 32).byte()
            seen = module.predict(net, model(2).detach(), stats[2].float(), images, 2)
            assert seen.shape == (4, 4, 2)
            found[-1] += (seen.double().round(decimals=4),) if net.kind == "tiny" else ()
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-8 if a.dtype == torch.float64 and a.ndim < 3 else 2e-4)

# ---------------------------------------------------------------------- distributions without a formula
def test_score_by_its_definition():
    """Of main10: eigenfunction by eigenfunction, with gradients by autograd"""
    for values in ({}, dict(num_ssge_eigenvals=3), dict(thr_ssge_eigenvals=0.8), dict(heuristic_kernel=True)):
        with settings(SSGE, rbf_kernel_width=3.0, **values):
            x, y = draws(6, 9), draws(4, 9, seed=1)
            width = torch.cdist(x, x).flatten().median() if "heuristic_kernel" in values else 3.0
            k = lambda a, b: (-torch.cdist(a, b) ** 2 / (2 * width ** 2)).exp()
            values_, vectors = np.linalg.eigh(k(x, x).numpy())
            values_, vectors = values_[::-1].copy(), torch.from_numpy(vectors[:, ::-1].copy())
            kept = 3 if "num_ssge_eigenvals" in values else 6
            if "thr_ssge_eigenvals" in values:
                kept = sum(np.cumsum(values_) / values_.sum() < 0.8)
                assert 0 < kept < 6
            total = 0
            for j in range(kept):
                near = lambda at: (-(at[:, None] - x).square().sum(2) / (2 * width ** 2)).exp()
                psi = lambda at: 6 ** 0.5 / values_[j] * (near(at) @ vectors[:, j])
                at = x.clone().requires_grad_()
                beta = -torch.autograd.grad(psi(at).sum(), at)[0].mean(0)
                total = total + psi(y)[:, None] * beta
            close(SSGE.score(x, y), total, 1e-9)

@pytest.mark.parametrize("values", [dict(rbf_kernel_width=4.0), dict(heuristic_kernel=True)])
def test_closed_score_is_the_spectral_one(values):
    for module in LOADED[11:]:
        for more in ({}, dict(num_ssge_eigenvals=4), dict(thr_ssge_eigenvals=0.9)):
            x, y = draws(7, 40), draws(5, 40, seed=1)
            with settings(SSGE, **values, **more):
                wanted = SSGE.score(x, x), SSGE.score(x, y)
            with settings(module, **values, **more):
                close(module.score(x, x), wanted[0]), close(module.score(x, y), wanted[1])
    with settings(CLOSED, **values, rescale_score=True):
        with settings(SSGE, **values):
            close(CLOSED.score(x, x), SSGE.score(x, x) * 40 / 7)

def test_score_of_a_known_gaussian():
    cosines = []
    for seed in range(5):
        x = draws(200, 2, seed=seed) * torch.tensor([1.0, 0.5])
        with settings(CLOSED, heuristic_kernel=True, thr_ssge_eigenvals=0.9):
            found = CLOSED.score(x, x)
        true = -x / torch.tensor([1.0, 0.25])
        cosines.append(F.cosine_similarity(found.flatten(), true.flatten(), dim=0))
    assert torch.stack(cosines).mean() > 0.9

def test_score_far_apart_is_zero():
    """The published width of 1, in many dimensions"""
    x = 0.05 * draws(5, 100000)
    with settings(CLOSED, rbf_kernel_width=1.0):
        assert CLOSED.score(x, x).norm() < 1e-9
    with settings(CLOSED, heuristic_kernel=True):
        found = CLOSED.score(x, x)
        assert F.cosine_similarity(found, -x).min() > 0.8 and found.norm() < 1e-3 * (x / 0.0025).norm()

def test_weights_from_noise_call_by_call():
    for extra in (-1.0, 0.3):
        values = dict(imp_hmlp_arch="5", imp_chmlp_chunk_size=900, full_support_perturbation=extra)
        with settings(SSGE, **values) as net:
            made_ = draws(SSGE.made_size(net)) * 0.1
            noise = SSGE.draw_noise(net, 3, CPU, 0).double()
            assert noise.shape == (3, net.size if extra > 0 else 8)
            calls, parts = math.ceil(net.size / 900), []
            place = 0
            for shape in ((calls, 32), (5, 40), (5,), (900, 5), (900,)):
                parts.append(made_[place:place + math.prod(shape)].view(shape))
                place += math.prod(shape)
            assert len(made_) == place
            for z, found in zip(0.1 * noise, SSGE.sample(net, made_, noise)):
                inputs = torch.cat([z[:8].expand(calls, 8), parts[0]], 1)
                wanted = call_by_call([inputs, *parts[1:]], z[:0], calls, net.size) + GAIN.gains(net)
                close(found, wanted + (0.3 * z if extra > 0 else 0))

def test_gradient_of_the_entropy():
    """That of the weights, times the score, its mean over samples; and no part in the value"""
    for module in LOADED[10:]:
        with settings(module, prior_variance=2.0, ssge_sample_size=3) as net:
            model, _ = made(module, net)
            made_ = model(1).detach().requires_grad_()
            noise = module.draw_noise(net, 4, CPU, 1).double()
            weights = module.sample(net, made_, noise)
            value, norm = module.prior_term(net, made_, weights)
            close(value, sum((w ** 2).sum() for w in weights) / 4 / 4)
            found, = torch.autograd.grad(value, made_, retain_graph=True)
            scores = SSGE.score(weights[:3].detach(), weights[:3].detach())
            parts = [torch.autograd.grad(w, made_, s, retain_graph=True)[0] for w, s in zip(weights, scores)]
            prior, = torch.autograd.grad(weights.square().sum() / 16, made_)
            close(found, sum(parts) / 3 + prior), close(norm, scores.norm() / 3)

IMPLICIT = [("", 7000, 457144, 457272), ("100,100", 4000, 424344, 457112),
            ("10,10,10,10", 40000, 441364, 457208), ("125,250,500", 500, 445417, 457208)]

def test_published_sizes_of_both_hypernetworks():
    common = dict(flags_of("resnet", "5x2"), cond_emb_size=32, chunk_emb_size="32", chmlp_chunk_size=7000)
    for arch, chunk, made_, trained in IMPLICIT:
        with settings(SSGE, **common, latent_dim=32, imp_hmlp_arch=arch, imp_chmlp_chunk_size=chunk) as net:
            assert SSGE.made_size(net) == made_
            sizes = SSGE.budget(net)
            assert sizes["hnet_weights"] == trained and sizes["main_weights"] == 465290
    wanted = [448361, 462641, 439242, 465402, 35114160, 35142972, 34390780, 34419012]
    for (kind, gcd, latent, embs, arch, *_), size in zip(STRUCTURED, wanted):
        with settings(SSGE, **flags_of(kind, "5x2"), imp_hnet_type="none") as net, torch.device("meta"):
            SSGE.HYP.update(imp_hnet_type="structured_hmlp", imp_shmlp_gcd_chunking=gcd,
                            imp_chunk_emb_size=embs, imp_hmlp_arch=arch)
            groups = SSGE.hnet_groups(net, net.size, 1, "imp_")
            assert sum(p.numel() for p in SSGE.hnet_params(groups, latent, True)) == size
    with settings(SSGE, imp_hnet_type="structured_hmlp", imp_shmlp_gcd_chunking=True, imp_hmlp_arch="4",
                  imp_chunk_emb_size="0,0,2,2,2,0") as net:
        assert SSGE.sample(net, torch.zeros(SSGE.made_size(net)), torch.zeros(2, 8)).shape == (2, net.size)

def test_without_noise_all_scripts_are_main9():
    for more in ({}, dict(mean_only=True)):
        found = []
        for module in LOADED[9:]:
            common = dict(chmlp_chunk_size=540, std_normal_emb=1.0, std_normal_temb=1.0, beta=50.0, **more)
            with settings(module, **common, **{} if module is SAMPLES else dict(imp_hnet_type="none")) as net:
                before, after_, stats = moved(module, net)
                kept = module.take_reference(net, before, 3)
                noise = module.draw_noise(net, 2, CPU, 3).double()
                chosen = torch.tensor([0, 2]) if module in LOADED[13:] else [0, 2]
                loss, terms = module.objective(net, after_, stats, 3, *batch(net), kept, chosen, noise)
                found.append((*with_gradient(loss, after_), terms[:3], stats))
        for other in found[1:]:
            for a, b in zip(other, found[0]):
                close(a, b)

def test_scripts_with_noise_compute_the_same():
    found = []
    for module in LOADED[10:]:
        with settings(module, kl_scale=1.0) as net:
            before, after_, stats = moved(module, net)
            kept, noise = module.take_reference(net, before, 3), module.draw_noise(net, 4, CPU, 3).double()
            chosen = torch.arange(3) if module in LOADED[13:] else [0, 1, 2]
            loss, terms = module.objective(net, after_, stats, 3, *batch(net), kept, chosen, noise)
            found.append((*with_gradient(loss, after_), terms, stats))
    for other in found[1:]:
        for a, b in zip(other, found[0]):
            close(a, b, 1e-8)

# ---------------------------------------------------------------------- penalty by products
@pytest.mark.parametrize("values", [
    dict(mean_only=True, chmlp_chunk_size=250), dict(mean_only=True, chmlp_chunk_size=100, hmlp_arch="5,4"),
    dict(mean_only=True, hnet_type="hmlp"), dict(chmlp_chunk_size=300, hmlp_arch="7"),
    dict(chmlp_chunk_size=4834, hmlp_arch="3"),
    dict(mean_only=True, chmlp_chunk_size=293, use_cond_chunk_embs=True)])
def test_penalty_by_products(values):
    """Loop, batched form and products: value and gradient, with masked rows and unused outputs, and where the
    last chunk is full"""
    values = dict(values, imp_hnet_type="none", allow_over_budget=True)
    with settings(GRAM, **values) as net:
        before, after_, _ = moved(GRAM, net)
        for chosen in ([0, 1, 2], [2]):
            ours = GRAM.penalty_by_products(after_, GRAM.take_reference(net, before, 3), chosen)
            made_ = before.batch(range(3)).detach()
            direct = GRAM.regularizer(net, after_.batch(chosen), made_, chosen)
            parts = [slice(at, at + net.size) for at in range(0, after_.size, net.size)]
            slow = sum(penalty_slow(net, lambda t: before(t)[part], lambda t: after_(t)[part], chosen)
                       for part in parts)
            ours, direct, slow = (with_gradient(value, after_) for value in (ours, direct, slow))
            for a, b, c in zip(ours, direct, slow):
                close(a, c), close(b, c)

def test_penalty_by_products_makes_few_weights():
    """Its cost hardly grows with the earlier tasks."""
    common = dict(flags_of("resnet", "10x10"), imp_hnet_type="none", mean_only=True, chmlp_chunk_size=7000,
                  std_normal_emb=1.0)
    with settings(GRAM, **common) as net:
        model, flops = GRAM.Model(net), {}
        for count in (2, 8):
            kept = GRAM.take_reference(net, model, count)
            forms = dict(products=lambda: GRAM.penalty_by_products(model, kept, [*range(count)]),
                         direct=lambda: model.batch(range(count)))
            for name, penalty in forms.items():
                with FlopCounterMode(display=False) as counter:
                    penalty()
                flops[name, count] = counter.get_total_flops()
    assert flops["direct", 8] == 4 * flops["direct", 2]
    assert flops["products", 8] < 1.5 * flops["products", 2] and flops["products", 8] < flops["direct", 8]

# ---------------------------------------------------------------------- what a step dispatches
WAYS = [dict(imp_hnet_type="none", mean_only=True, chmlp_chunk_size=250), {}, dict(
    imp_hnet_type="none", chmlp_chunk_size=540, disable_data_augmentation=False, clip_grad_norm=1.0)]

class Operations(TorchDispatchMode):
    """Names of the operations that are dispatched, where their tensors are, with and without dimensions, and
    the copies from one device to another"""
    names, devices, numbers, moves = (), frozenset(), frozenset(), ()
    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        result, name = func(*args, **kwargs or {}), func.overloadpacket.__name__
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        places = [(x.device.type, x.ndim) for x in leaves if torch.is_tensor(x)]
        self.devices |= {device for device, dimensions in places if dimensions}
        self.numbers |= {device for device, dimensions in places if not dimensions}
        self.moves += (name,) if "copy" in name and len(dict(places)) > 1 else ()
        self.names += (name,)
        return result

# ---------------------------------------------------------------------- the flags of the original
RESNET = '--net_type=resnet --resnet_block_depth=5 --resnet_channel_sizes="16,16,32,64"'
WIDE_NET = "--net_type=wrn --wrn_block_depth=4 --wrn_widening_factor=10 --wrn_use_fc_bias --no_bias"
RESNET18 = "--net_type=iresnet --iresnet_use_fc_bias --no_bias --iresnet_projection_shortcut"
TASKS = {"6x10": "--num_tasks=6 --num_classes_per_task=10", "5x2": "--num_tasks=5 --num_classes_per_task=2",
         "10x10": "--num_tasks=10 --num_classes_per_task=10 --skip_tasks=1"}
OUTER = "--hh_hnet_type=chunked_hmlp --hh_cond_emb_size=32 --hh_chunk_emb_size=32 --hh_hmlp_arch=''"
INNER = "--imp_hnet_type=chunked_hmlp --latent_dim=32 --imp_chunk_emb_size=32"
STRUCT = "--imp_hnet_type=structured_hmlp"
GAUSS = "--hnet_type=chunked_hmlp --cond_emb_size=32 --chunk_emb_size=32"
CALLS = [  # the published examples, and the ratios that they come to
    ("ssge", "6x10", f"{RESNET} {INNER} {OUTER} --hh_chmlp_chunk_size=7000 --imp_hmlp_arch='125,250,500' "
     "--imp_chmlp_chunk_size=500", 0.9759),
    ("bbb", "6x10", f"{RESNET} {GAUSS} --hmlp_arch='10,10,10,10' --chmlp_chunk_size=90000", 1.0581),
    ("ssge", "6x10", f"{WIDE_NET} {INNER} {OUTER} --hh_chmlp_chunk_size=500000 "
     "--imp_hmlp_arch='250,500,1000' --imp_chmlp_chunk_size=30000", 0.8902),
    ("bbb", "6x10", f"{WIDE_NET} {GAUSS} --hmlp_arch='50,50,50,50' --chmlp_chunk_size=1000000", 0.6986),
    ("ssge", "5x2", f"{RESNET} {INNER} {OUTER} --hh_chmlp_chunk_size=7000 --imp_hmlp_arch='125,250,500' "
     "--imp_chmlp_chunk_size=500", 0.9826),
    ("ssge", "5x2", f'{RESNET} {STRUCT} --latent_dim=3 --imp_chunk_emb_size="0,0,3,0,3,0,3,0" {OUTER} '
     "--hh_chmlp_chunk_size=7000 --imp_hmlp_arch=''", 0.9828),
    ("bbb", "5x2", f"{RESNET} {GAUSS} --hmlp_arch='10,10,10,10' --chmlp_chunk_size=80000", 0.9473),
    ("bbb", "5x2", f'{RESNET} --hnet_type=structured_hmlp --cond_emb_size=3 '
     '--chunk_emb_size="0,0,3,0,3,0,3,0,0,0,3,0,3,0,3,0" --hmlp_arch=""', 0.9636),
    ("ssge", "5x2", f"{WIDE_NET} {INNER} {OUTER} --hh_chmlp_chunk_size=500000 "
     "--imp_hmlp_arch='250,500,1000' --imp_chmlp_chunk_size=30000", 0.8910),
    ("ssge", "5x2", f'{WIDE_NET} {STRUCT} --latent_dim=8 --imp_chunk_emb_size="0,0,2,4,4,0,0,0,0" {OUTER} '
     "--hh_chmlp_chunk_size=500000 --imp_hmlp_arch=''", 0.8909),
    ("bbb", "5x2", f"{WIDE_NET} {GAUSS} --hmlp_arch='50,50,50,50' --chmlp_chunk_size=1000000", 0.6992),
    ("ssge", "10x10", f"{RESNET18} --latent_dim=32 --imp_chunk_emb_size=32 {OUTER} "
     "--hh_chmlp_chunk_size=150000 --imp_hmlp_arch='250,500,1000' --imp_chmlp_chunk_size=10000", 0.8692),
    ("bbb", "10x10", f"{RESNET18} {GAUSS} --hmlp_arch='100,100,100,100' --chmlp_chunk_size=200000", 0.9020)]
SEED_SCRIPTS = dict(bbb=HERE / "train_resnet_bbb.py", ssge=HERE / "train_resnet_ssge.py")

@pytest.mark.parametrize("method, split, text, ratio", CALLS)
def test_calls_of_the_original(method, split, text, ratio):
    """Their flags are known and mean the networks that they are for."""
    module = load(SEED_SCRIPTS[method])
    args = module.flag_parser().parse_args(shlex.split(f"{TASKS[split]} {text}"))
    values = {name: value for name, value in vars(args).items() if name in module.HYP}
    with settings(module, **dict(values, imp_hnet_type="none")) as net:
        assert net.size == SIZES[values["net_type"], split]
        module.HYP.update(values)
        if method == "ssge":  # sizes alone: places of weights are checked elsewhere
            with torch.device("meta"):
                groups = module.hnet_groups(net, net.size, values["imp_chmlp_chunk_size"], "imp_")
                shapes = [p.shape for p in module.hnet_params(groups, values["latent_dim"], True)]
            net = net._replace(implicit=module.Implicit(groups, shapes, None, None))
        assert module.budget(net)["ratio"] == pytest.approx(ratio, abs=1.1e-4)

@pytest.mark.parametrize("number", [5, 7])
def test_a_step_of_calls_of_the_original(number):
    """On the ResNet-32, with its structured hypernetworks, from flags to changed weights"""
    method, split, text, _ = CALLS[number]
    module = load(SEED_SCRIPTS[method])
    args = module.flag_parser().parse_args(shlex.split(f"{TASKS[split]} {text}"))
    with settings(module, **{name: value for name, value in vars(args).items() if name in module.HYP}) as net:
        train_step(module, net, 2, 2)

def train_step(module, net, task, samples, n=2):
    """A step of a batch of real size 32 x 32: a finite loss, and all parameters of the task change."""
    torch.manual_seed(0)
    model, stats = module.Model(net), module.fresh_stats(net)
    optimizer = module.make_optimizer(model)
    inputs, labels, n_train = batch(net, n)
    kept = module.take_reference(net, model, task)
    noise = module.draw_noise(net, samples, CPU, 0)
    before = [p.detach().clone() for p in model.params]
    loss, terms = module.objective(net, model, stats, task, inputs.float(), labels, n_train, kept,
                                   [*range(task)], noise)
    loss.backward(), optimizer.step()
    assert terms.isfinite().all() and abs(float(terms[0])) < 20 and stats[task].ne(stats[task - 1]).any()
    assert all((a != b).any() for a, b in zip(before, model.params))

@pytest.mark.parametrize("kind, split, chunk", [("wrn", "5x2", 500000), ("iresnet", "10x10", 150000)])
def test_a_step_of_the_large_networks(kind, split, chunk):
    values = dict(flags_of(kind, split), imp_hnet_type="none", mean_only=True, chmlp_chunk_size=chunk)
    with settings(GRAM, **values) as net:
        train_step(GRAM, net, 1, 1)

def test_commands_of_the_readme():
    """Flags are known, and the hypernetworks are within their budgets."""
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    names = dict(re.findall(r'^([A-Z0-9]+)="(.*)"$', text, re.M))
    commands = re.findall(r"python hnet_cl/(\w+)\.py ([^`\n#]*--[^`\n#]*)", text)
    assert len(commands) > 9 and len(names) == 6
    for name, flags_ in commands:
        module, flags_ = load(HERE / f"{name}.py"), re.sub(r"\$(\w+)", lambda match: names[match[1]], flags_)
        args = module.flag_parser().parse_args(shlex.split(flags_))
        values = {key: value for key, value in vars(args).items() if key in module.HYP}
        if values.get("imp_hnet_type") == "structured_hmlp":
            continue  # among the calls of the original
        with settings(module, **values) as net:
            assert module.budget(net)["ratio"] <= (5 if "scratch" in flags_ else 1)

# ---------------------------------------------------------------------- whole runs
SHORT = dict(num_tasks=3, n_iter=6, batch_size=8, val_set_size=2, train_images=8, save_steps=2)

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("data"), train=96)

def flags(data, folder, **more):
    values = dict(SHORT, data=data, device="cpu", output_dir=folder, out=folder / "o.jsonl", **more)
    return [f"--{name}={value}" for name, value in values.items()]

def forks(*runs):
    """[(exit code, what was printed)] of runs of scripts at the same time, each (script, flags) and perhaps a
    function that changes the module, in forks of this process, which saves the seconds that imports take."""
    def child(file, path, flags, change=lambda module: None):
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
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

def final(folder):
    return torch.load(folder / "seed0" / "checkpoint-0030000000.pt", weights_only=True)

def outcome(folder):
    run, = json.loads((folder / "o.jsonl").read_text().splitlines()[-1])["runs"]
    return run["epochs"], run["flops"]

@pytest.mark.parametrize("path", [MAINS[0], MAINS[3], MAINS[-1]], ids=lambda path: path.stem)
def test_a_stopped_run_goes_on_bit_for_bit(path, data, tmp_path):
    """Sent SIGTERM, it saves first; killed, it loses what came after the last checkpoint, whether it trains
    or writes a checkpoint; a damaged checkpoint is named and the one before used."""
    def half_written(module):
        replace = os.replace
        module.os = types.SimpleNamespace(**vars(os))
        module.os.replace = lambda a, b: send(signal.SIGKILL)() if "10000004" in str(b) else replace(a, b)
    ways = dict(term=after("learning_rate", 9, send(signal.SIGTERM)),
                kill=after("learning_rate", 11, send(signal.SIGKILL)),
                saved=after("save_checkpoint", 3, send(signal.SIGKILL)), half=half_written)
    commands = {name: (path, flags(data, tmp_path / name)) for name in ("whole", *ways, "damaged")}
    stops = dict(zip(commands, forks(*((*commands[name], ways.get(name, lambda module: None))
                                       for name in commands))))
    assert {name: code for name, (code, _) in stops.items()} == dict(
        dict.fromkeys(ways, -signal.SIGKILL), term=143, whole=0, damaged=0), stops
    assert re.search(r"\n.*: error: stopped after 3 of 6 steps of task 2; .*\n$", stops["term"][1])
    assert list((tmp_path / "half" / "seed0").glob(".checkpoint.*"))
    newest = tmp_path / "damaged" / "seed0" / "checkpoint-0030000000.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    names = [*ways, "damaged"]
    texts = dict(zip(names, whole(*(commands[name] for name in names))))
    wanted = final(tmp_path / "whole")
    for name, place in dict(term="2 after 3", kill="2 after 4", saved="1 after 6", half="2 after 2",
                            damaged="3 after 6").items():
        assert f"continuing with task {place} steps" in texts[name], (name, texts[name])
        found = final(tmp_path / name)
        assert found["rows"] == wanted["rows"] and torch.equal(found["stats"], wanted["stats"]), name
        assert all(torch.equal(a, found["model"][key]) for key, a in wanted["model"].items()), name
        assert outcome(tmp_path / name) == outcome(tmp_path / "whole"), name
    assert f"warning: {newest} is missing or damaged" in texts["damaged"]
    of = lambda file, *more: [*flags(data, tmp_path / "term"), f"--resume={file}", *more]
    other = write_cifar(tmp_path / "other", train=97)
    wrong = {"cannot resume from none.pt": (path, of("none.pt")), "another lr": (
        path, [*flags(data, tmp_path / "term"), "--lr=0.1"]), "another seed": (path, of(newest, "--seed=1")),
             "another data": (path, of(newest, f"--data={other}")),
             "another script": (path, of(newest), lambda module: setattr(
                 module, "SCRIPT", tmp_path / "main99_other.py"))}
    for sentence, (code, text) in zip(wrong, forks(*wrong.values())):
        assert code == 2 + ("none.pt" in sentence) and sentence in text, text

def test_another_text_starts_anew(data, tmp_path):
    """Checkpoints in a folder that the script names are for its present text. SIGTERM in the last tests ends
    the series, too, and loses nothing."""
    command = MAINS[0], [flag for flag in flags(data, tmp_path) if "output_dir" not in flag]
    def elsewhere(module, **more):
        module.SCRIPT = tmp_path / module.SCRIPT.name
        vars(module).update(more)
    def stopped(module):
        elsewhere(module), after("final_tests", 1, send(signal.SIGTERM))(module)
    (code, text), = forks((command[0], [*command[1], "--runs=2"], stopped))
    assert code == 143 and "stopped after run 0; the same command continues" in text
    again, = whole((*command, elsewhere))
    anew, = whole((*command, lambda module: elsewhere(module, SHA256="0")))
    assert "continuing with task 4 after 0 steps" in again and "continuing" not in anew
    assert len(list((tmp_path / "runs").iterdir())) == 2

def test_statistics_in_use_count():
    for alone, sets in ((False, 1), (True, 5)):
        with settings(FINETUNE, train_from_scratch=alone) as net:
            sizes = FINETUNE.budget(net)
            assert sizes["ratio"] == sets
            assert (sizes["ratio_bn"] - sets) * net.size == pytest.approx(sets * 2 * sum(net.norms))

def test_runs_of_main13_and_main14_are_those_of_main12(data, tmp_path):
    """But for rounding, to which steps of Adam on gradients about 0 give weight. main14 has another run
    beside, and counts groups of convolutions as they are. What belongs to other seeds is refused."""
    for number, way in enumerate(WAYS):
        folders = [tmp_path / f"{number}-{path.stem}" for path in MAINS[12:15]]
        whole(*((path, [*flags(data, folder, hnet_reg_batch_size=1), f"--runs={1 + (path == MAINS[14])}"],
                 lambda module: module.HYP.update(way)) for path, folder in zip(MAINS[12:], folders)))
        first, *others = [json.loads((folder / "o.jsonl").read_text())["runs"] for folder in folders]
        terms = lambda run: [row[term] for row in run["epochs"] for term in GRAPH.TERMS]
        for runs in others:
            assert terms(runs[0]) == pytest.approx(terms(first[0]), rel=1e-3)
        graph, seeds = (runs[0]["flops"] for runs in others)
        assert graph == first[0]["flops"] and (seeds == graph if number == 0 else seeds < graph)
        assert [run["seed"] for run in runs] == [0, 1] and terms(runs[1]) != terms(runs[0])
        assert len({run["time_seconds"] for run in runs}) == 1
    found, = (tmp_path / "1-main14_seeds").glob("seed0-1/checkpoint-0030000000.pt")
    (code, text), = forks((MAINS[14], [*flags(data, tmp_path, hnet_reg_batch_size=1), f"--resume={found}"]))
    assert code == 2 and "of another seeds" in text

def test_full_disk_and_bad_loss(data, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
    text = call(MAINS[0], *flags(data, tmp_path), code=1, preexec_fn=limit)
    assert "cannot write" in text and not list((tmp_path / "seed0").glob("*checkpoint*"))
    (code, text), = forks((MAINS[1], [*flags(data, tmp_path / "other"), "--lr=1e30"]))
    assert code == 1 and re.search(r"the loss is (nan|inf)", text)

def test_wrong_flags_and_data(data, tmp_path):
    for path, flag, sentence in (
            (0, "--num_classes_per_task=3", "1, 2, 5 or 10"), (0, "--num_tasks=60", "110 classes"),
            (0, "--net_type=lenet", "tiny, iresnet, resnet, wrn"), (0, "--batch_size=0", "above 0"),
            (0, "--epochs=inf", "finite"), (0, f"--seed={2 ** 63}", "to end by 2^63"),
            (0, "--net_type=resnet --resnet_channel_sizes=", "channels, blocks"),
            (0, "--resnet_channel_sizes=16,x", "'16,x' is no list of numbers"),
            (1, "--cond_emb_size=0", "cond_emb_size must be above 0"), (1, "--hmlp_arch=5x", "no list of"),
            (1, "--hmlp_arch=0", "layers of --hmlp_arch must be above 0"),
            (2, "--chunk_emb_size=3.2", "no list of numbers"), (2, "--hnet_type=hmlp", "it lacks chunks"),
            (6, "--hmlp_arch=4;0", "layers of --hmlp"), (10, "--imp_hmlp_arch=0", "--imp_hmlp_arch must"),
            (12, "--train_sample_size=2 --heuristic_kernel", "three samples"),
            (1, "--hnet_net_act=elu", "relu, sigmoid or tanh"), (2, "--hnet_type=none", "chunked_hmlp"),
            (2, "--chmlp_chunk_size=300", "largest --chmlp_chunk_size that fits is 258"),
            (2, "--hmlp_arch=5000", "no chunk size fits"), (2, "--chunk_emb_size=0", "would all be the same"),
            (6, "--chunk_emb_size=0,0,8,8,0,0", "group 5 (2328 weights, called 4 times) needs a chunk"),
            (6, "--chunk_emb_size=0,0,8", "group 4 (1176 weights, called 6 times) has no size"),
            (6, "--hmlp_arch=3;3", "group 3 (600 weights, called 3 times) has no layers"),
            (6, "--chunk_emb_size=0,0,8,8,8,0,0", "group 7 is one too many"),
            (6, "--hnet_init=hyperfan", "but for structured_hmlp"), (7, "--infer=none", "ent or conf"),
            (8, "--regularizer=kl", "fkl, rkl or w2"), (8, "--train_sample_size=0", "above 0"),
            (10, "--imp_hnet_type=x", "one of hmlp"), (12, "--latent_dim=0", "latent_dim must be above 0"),
            (10, "--regularizer=w2", "goes with hmlp or chunked_hmlp, mse"),
            (11, "--hnet_init=hyperfan", "goes with hmlp or chunked_hmlp, mse"),
            (12, "--imp_chunk_emb_size=0", "would all be the same")):
        (code, text), = forks((MAINS[path], ["--data", data, "--out", tmp_path / "o", *flag.split()]))
        assert code == 2 and text.count("\n") == 1 and sentence in text, text
    cases = [({}, "no cifar10 in"), (dict(train=b"none"), "train.pt is missing, damaged or not of 10"),
             (dict(train=(data / "train.pt").read_bytes()), "test.pt is missing")]
    for number, (files, sentence) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / f"{name}.pt").write_bytes(content)
        (code, text), = forks((MAINS[0], ["--data", folder, "--out", tmp_path / "o"]))
        assert code == 3 and text.count("\n") == 1 and sentence in text, text
    (code, text), = forks((MAINS[0], ["--data", data, "--out", tmp_path / "o", "--skip_tasks=5"]))
    assert code == 3 and "of 100 classes" in text

# ---------------------------------------------------------------------- tables
PLAIN = [("", 7000), ("100,100", 4000), ("10,10,10,10", 40000), ("125,250,500", 500)]
WIDE = [("", 500000), ("50,50,50,50", 700000), ("250,500,1000", 30000)]
WIDE_GAUSS = [("", 1000000), ("50,50,50,50", 1000000), ("250,500,1000", 50000)]
PLAIN_GAUSS = [("", 14000), ("100,100", 9000), ("10,10,10,10", 80000), ("125,250,500", 1450)]
OPTIONS = {  # network and split: layers -> chunk of weights, and of Gaussians
    ("resnet", "6x10"): (
        PLAIN, [("", 14000), ("100,100", 9000), ("10,10,10,10", 90000), ("125,250,500", 1500)]),
    ("wrn", "6x10"): (WIDE, WIDE_GAUSS),
    ("resnet", "5x2"): (PLAIN, PLAIN_GAUSS),
    ("wrn", "5x2"): (WIDE, WIDE_GAUSS),
    ("iresnet", "10x10"): (
        [("", 150000), ("500,500", 20000), ("100,100,100,100", 100000), ("250,500,1000", 10000)],
        [("", 300000), ("500,500", 40000), ("100,100,100,100", 200000), ("250,500,1000", 20000)]),
    ("resnet", "10x10"): (PLAIN, PLAIN_GAUSS)}
PUBLISHED = """457336 67 .9761 1.0052 424568 118 .9062 .9352 441556 12 .9424 .9715 445833 938 .9515 .9806
    912336 67 .9736 .9881 929152 105 .9915 1.0061 991524 11 1.0581 1.0726 936817 625 .9997 1.0143
    32502560 74 .8902 .8932 35712788 53 .9781 .9811 30711918 1218 .8412 .8441
    65002560 74 .8902 .8916 51013460 74 .6986 .7001 50739694 1461 .6949 .6963
    457304 67 .9828 1.0073 424504 117 .9123 .9368 441524 12 .9489 .9733 445577 931 .9576 .9820
    912304 67 .9804 .9926 929088 104 .9984 1.0106 881524 12 .9473 .9595 912279 642 .9803 .9925
    32502496 73 .8910 .8934 35712756 53 .9790 .9815 30711822 1216 .8419 .8444
    65002496 73 .8910 .8922 51013396 73 .6992 .7004 50739630 1460 .6955 .6967
    9752720 75 .8692 .8778 10321304 562 .9199 .9285 10140736 113 .9038 .9124 10689006 1123 .9527 .9612
    19502720 75 .8691 .8734 20341304 562 .9065 .9108 20240736 113 .9020 .9063 20699006 1123 .9224 .9267
    457496 68 .9710 1.0193 424696 118 .9014 .9496 441684 12 .9375 .9857 446121 943 .9469 .9951
    912496 68 .9684 .9925 929280 105 .9862 1.0103 881684 12 .9357 .9598 912695 650 .9686 .9927""".split()

def option(kind, split, gauss, **values):
    """Sizes of a hypernetwork, and how often its networks are called"""
    with settings(BBB, mean_only=not gauss, **flags_of(kind, split), **values) as net:
        groups = BBB.hnet_groups(net, BBB.made_size(net), BBB.HYP["chmlp_chunk_size"])
        return BBB.budget(net), sum(group.calls for group in groups)

def budget_rows():
    """All published architectures: weights, calls and ratios, and which exceed what they make."""
    rows = [["Main network", "Split", "Weights made", "Hypernetwork", "Weights", "Calls", "Ratio",
             "with batch-norm statistics", ""]]
    def add(kind, split, gauss, name, sizes, calls):
        rows.append(["Gaussian " * gauss + kind, split, f"{sizes['main_weights']:,}", name,
                     f"{sizes['hnet_weights']:,}", f"{calls:,}", f"{sizes['ratio']:.4f}",
                     f"{sizes['ratio_bn']:.4f}", "over" * (sizes["ratio"] > 1)])
    for (kind, split), both in OPTIONS.items():
        for gauss, options in enumerate(both):
            for arch, chunk in options:
                found = option(kind, split, gauss, hmlp_arch=arch, chmlp_chunk_size=chunk)
                add(kind, split, gauss, f"`'{arch}'` -> {chunk}", *found)
    for kind, gcd, cond, embs, arch, *_ in STRUCTURED:
        for gauss in (False, True):
            embs_, arch_ = (twice(embs, ","), twice(arch, ";")) if gauss else (embs, arch)
            found = option(kind, "5x2", gauss, hnet_type="structured_hmlp", shmlp_gcd_chunking=gcd,
                           cond_emb_size=cond, chunk_emb_size=embs_, hmlp_arch=arch_)
            name = f"structured{', gcd' * gcd}, {'deep' if arch else 'linear'}, {cond}"
            add(kind, "5x2", gauss, name, *found)
    return rows

def test_published_budgets():
    """Weights, chunks and both ratios of the 44 chunked options; three options exceed what they make."""
    rows = budget_rows()[1:]
    wanted = list(zip(*[iter(PUBLISHED)] * 4))
    assert len(wanted) == 44 and len(rows) == 60
    for row, (weights, calls, ratio, ratio_bn) in zip(rows, wanted):
        assert [row[4].replace(",", ""), row[5].replace(",", "")] == [weights, calls], row
        assert [*map(float, row[6:8])] == pytest.approx([float(ratio), float(ratio_bn)], abs=1.01e-4), row
    over = [(row[0], row[1], row[3]) for row in rows if row[-1]]
    assert over == [("Gaussian resnet", "6x10", "`'10,10,10,10'` -> 90000"),
                    *((f"{kind}resnet", "5x2", "structured, gcd, deep, 32") for kind in ("", "Gaussian "))]

CHECK = [(3, dict(beta=0.0)), (3, {}), (5, {}), (5, dict(net_type="resnet", chmlp_chunk_size=7000))]

def lines_of(path, own):
    """Result lines of a script on real data with those values of its own, all others as in its text, and all
    of one text and machine, the ones last measured"""
    lines = [line for line in read_results("hnet_cl") if line["script"] == path.name
             and line["data"] == "cifar10" and not line["dry_run"] and line["hyp"] == dict(hyp(path), **own)]
    lines.sort(key=lambda line: line["utc"])
    kind = lambda line: (line["sha256"], machine(line))
    return [line for line in lines if kind(line) == kind(lines[-1])]

def mark(path, lines):
    """What marks lines that an earlier text of the script wrote"""
    body = hashlib.sha256(path.read_text().split('"""', 2)[2].encode()).hexdigest()
    return " (†)" * any(line["sha256"] != body for line in lines)

def ladder_rows():
    """A row per step, main3 without its penalty too, and main5 on ResNet-32."""
    rows = [["Script", "Adds", "Diff", "During %", "Final %", "Forgetting %", "Task-inferred %", "Weights",
             "Ratio", "s a task", "Peak MiB", "Runs", "Machine"]]
    for (before, path), number in zip(scripts("hnet_cl"), range(len(MAINS))):
        diff = "+{} -{}".format(*changed_lines(before, path)) if before else ""
        for own in [own for index, own in CHECK if index == number] or [{}]:
            lines, cells = lines_of(path, own), ["not measured"] * 6 + ["", "", "", ""]
            if lines:
                runs = [run for line in lines for run in line["runs"]]
                mean = lambda key: mean_std([run["mean"][key] for run in runs], 1, 100)
                cells = [mean("test_during"), mean("test_final"),
                         mean_std([run["forgetting"] for run in runs], 1, 100),
                         mean("inferred") if "inferred" in runs[0]["mean"] else "",
                         f"{lines[-1]['hnet_weights']:,}", f"{lines[-1]['ratio']:.3f}",
                         mean_std([seconds for run in runs for seconds in run["task_seconds"]], 1),
                         f"{max(line['peak_mib'] for line in lines):.0f}", str(len(runs)), machine(lines[-1])]
                cells[-2] += mark(path, lines)
            flags = "".join(f" `--{key} {str(value).removesuffix('.0')}`" for key, value in own.items())
            rows.append([f"`{path.name}`{flags}", docstring(path)["Adds"].removeprefix("the baseline: "),
                         diff if not own else "", *cells])
    return rows

def test_penalty_keeps_ten_points():
    """Of the five-task check, where it was measured: what the penalty is for."""
    without, held = ([run["acc"] for line in lines_of(MAINS[3], own) for run in line["runs"]]
                     for own in (dict(beta=0.0), {}))
    if len(without) < 3 or len(held) < 3:
        pytest.skip("not measured")
    assert np.mean(held) - np.mean(without) > 0.1

STEPS = [("the penalty", 3, {}), ("the penalty", 4, {}), ("the penalty", 12, WAYS[0]), ("4 samples", 8, {}),
         ("4 samples", 9, {}), ("the score of 4 samples", 10, {}), ("the score of 4 samples", 11, {})]

def operations(module, values):
    """Of a step, forward and backward, of the small network in the fifth task"""
    with settings(module, **values) as net:
        model, stats = made(module, net)
        last = module.take_reference(net, model, 4), [0, 1, 2, 3]
        if hasattr(module, "draw_noise"):
            last += (module.draw_noise(net, 4, CPU, 0).double(),)
        last = last[:1] if module is REG else last
        inputs = batch(net, 2)
        with Operations() as counter:
            loss, _ = module.objective(net, model, stats, 4, *inputs, *last)
            loss.backward()
        return len(counter.names)

@functools.cache
def operations_rows():
    """A row per step of the ladder that is for speed."""
    rows = [["Script", "What for", "Operations of a step", "of the script before it here"]]
    for (name, number, values), before in zip(STEPS, [None] + STEPS):
        count = operations(LOADED[number], values)
        share = count / int(rows[-1][2].replace(",", "")) if before and before[0] == name else None
        rows.append([f"`{MAINS[number].stem}`", name, f"{count:,}", f"{share:.2f}" if share else ""])
    return rows

def test_steps_for_speed_dispatch_less():
    counts = {row[0].strip("`"): int(row[2].replace(",", "")) for row in operations_rows()[1:]}
    by = {number: counts[MAINS[number].stem] for _, number, _ in STEPS}
    assert by[4] < 0.5 * by[3] and by[9] < 0.6 * by[8] and by[11] < by[10], by

def speed_rows():
    """Milliseconds of a step of the fifth task for a seed, of runs made in turns; a ratio is of a round."""
    rows, times = [["Script", "ms a step", "times faster than", "(rounds)", "Machine"]], {}
    for number, other in [(3, None), (4, 3), (12, 4), (8, None), (9, 8), (10, None), (11, 10), (13, None),
                          (14, 13)]:
        lines = [line for line in read_results("hnet_cl")
                 if (line["file"], line["script"]) == ("speed.jsonl", MAINS[number].name)]
        assert len({json.dumps([line["hyp"], machine(line)]) for line in lines}) <= 1, "speeds do not compare"
        times[number] = {line["runs"][0]["seed"]: np.mean([run["task_seconds"][-1] for run in line["runs"]])
                         / line["hyp"]["n_iter"] * 1e3 for line in lines}
        ratios = [times[other][seed] / time for seed, time in times[number].items()] if other else []
        rows.append([f"`{MAINS[number].stem}`",
                     mean_std(list(times[number].values()), 1) + mark(MAINS[number], lines),
                     f"`{MAINS[other].stem}`" if other else "",
                     f"{mean_std(ratios, 2)} ({len(ratios)})" if other else "", machine(lines[-1])]
                    if lines else [f"`{MAINS[number].stem}`", *["not measured"] * 2, "", ""])
    return rows

TABLES = {name: lambda rows=rows: markdown(rows()) for name, rows in dict(
    ladder=ladder_rows, operations=operations_rows, speed=speed_rows, budget=budget_rows).items()}
