"""Checks of the scripts that try further ideas of the notes on ViTFreeze, each against a slow form of its
idea, and against the script before it, which it is where its flag says so."""
import itertools
import json
import math
import pathlib
import signal
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from test_vitfreeze import (  # before torch: it has kernels interpreted
    CPU, MAINS, after, data, final, flags, forks, load, pair, photos, plain_norms, same_weights, send,
    settings, whole)

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("plain_norms")
AUTO, TASKS, DISTILL, DROP, CURRICULUM = (load(path) for path in MAINS[12:17])
MULTI = load(HERE / "finetune_multi.py")
FROZEN = dict(size="nano", latent="targets")

def noise_of(n, seed=1):
    return torch.rand(n, 64, generator=torch.Generator().manual_seed(seed))

def frozen_inputs(model, images, noise, level):
    """What the store gives to a step: tokens of the kept patches, and of all, after that many layers"""
    with torch.no_grad():
        return model.prefix(images, model.kept(noise), level), model.prefix(images, None, level)

# ---------------------------------------------------------------------- pixels as targets
def slow_pixels(image, cell, nbins=9):
    """Cells row by row [cells, 3 * cell * cell], pixel by pixel"""
    mean, std = (torch.tensor(part)[:, None, None] for part in (TASKS.MEAN, TASKS.STD))
    image, rows = (image / 255 - mean) / std, []
    for y in range(0, image.shape[1], cell):
        for x in range(0, image.shape[2], cell):
            part = torch.stack([image[c, y + i, x + j]
                                for c in range(3) for i in range(cell) for j in range(cell)])
            centre = part.sum() / len(part)
            variance = (part - centre).square().sum() / (len(part) - 1)
            rows.append((part - centre) / (variance + 1e-6).sqrt() / nbins ** 0.5)
    return torch.stack(rows)

@pytest.mark.parametrize("size, stages", [("nano", 4), ("micro", 1), ("small64", 5)])
def test_pixel_targets(size, stages):
    with settings(TASKS, size=size, pixel_stages=stages), settings(AUTO, size=size):
        model, images = TASKS.make_model(CPU, 0), photos(2, TASKS.SIZES[size].image)
        found, hog = model.targets(images), AUTO.make_model(CPU, 0).targets(images)
        assert len(found) == len(model.size.scales)
        for stage, (cells, scale) in enumerate(zip(found, model.size.scales)):
            if stage >= stages:
                assert torch.equal(cells, hog[stage])
                continue
            for image, own in zip(images, cells):
                wanted = slow_pixels(image, int(model.size.patch / scale))
                torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)

def test_stages_of_pixels_keep_their_say_and_learn_what_is_hidden():
    """Predicting 0 costs about a ninth in each stage; a prediction of the targets costs nothing."""
    with settings(TASKS, size="nano", pixel_stages=4):
        model, images, noise = TASKS.make_model(CPU, 0), photos(8), noise_of(8)
        for decoder in model.decoders:
            torch.nn.init.zeros_(decoder.pred.weight), torch.nn.init.zeros_(decoder.pred.bias)
        assert model(images, noise).tolist() == pytest.approx([1 / 9] * 4, rel=0.1)
        cells, hidden = model.cells(images), noise.argsort(1)[:, 16:]
        exact = [torch.stack([own[patches] for own, patches in zip(part, hidden)]) if scale >= 1 else part
                 for part, scale in zip(cells, model.size.scales)]
        stages = model.stages
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "stages", lambda *inputs: (exact, *stages(*inputs)[1:]))
            assert model(images, noise).tolist() == [0] * 4

def test_flops_and_pictures_of_pixels(tmp_path):
    with settings(TASKS, size="base"):
        with settings(TASKS, pixel_stages=0):
            plain = TASKS.train_flops()
        grid = 14 * TASKS.SIZES["base"].scales[0]  # cells of 2 pixels, so 12 values and not 27
        width = TASKS.SIZES["base"].dec_dim // TASKS.SIZES["base"].scales[0]
        assert TASKS.train_flops() - plain == 3 * 2 * grid ** 2 * width * (12 - 27)
    with settings(TASKS, size="nano", pixel_stages=1):
        images = photos(1)
        shown = TASKS.drawing(TASKS.make_model(CPU, 0).targets(images)[0][0], 0, 128)
        assert shown.shape == (3, 128, 128)
        cells = F.avg_pool2d(shown[None], 8, stride=8)[0]  # no cell has a mean, over its colours, but grey
        assert torch.allclose(cells.mean(0), torch.full((16, 16), 0.5), atol=1e-3)
        bright = F.avg_pool2d(images[0].float().mean(0)[None, None], 1)[0, 0] / 255
        patch = shown.mean(0)[::4, ::4][:2, :2].flatten(), bright[:2, :2].flatten()
        assert torch.corrcoef(torch.stack(patch))[0, 1] > 0.5

# ---------------------------------------------------------------------- self-distillation
@pytest.mark.parametrize("level", [0, 2, 4])
def test_stages_predict_the_last_one(level):
    """Loss of each stage by loops over images and tokens, and gradients of no other parameters than of the
    blocks below it and its own map."""
    with settings(DISTILL, **FROZEN, distill=0.0, pixel_stages=0):
        plain = DISTILL.make_model(CPU, 0)
    with settings(DISTILL, **FROZEN, distill=0.7, pixel_stages=0):
        model, images, noise = DISTILL.make_model(CPU, 0), photos(3), noise_of(3)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        frozen = frozen_inputs(model, images, noise, level) if level > 1 else ()
        losses, without = (each(images, noise, level, *frozen) for each in (model, plain))
        tokens = frozen[0] if frozen else None
        with torch.no_grad():
            taps = model.encode(images, model.kept(noise), level, tokens)
        first = 4 - len(taps)
        standard = lambda v: (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()
        for stage in range(4):
            wanted = 0.0
            for image in range(3) if first <= stage < 3 else ():
                for token in range(17):
                    guess = model.predictors[stage](standard(taps[stage - first][image, token])).detach()
                    wanted += 0.7 * (guess - standard(taps[-1][image, token])).square().mean() / 51
            found = (losses[stage] - without[stage]).item()
            assert found == pytest.approx(float(wanted), abs=2e-5)
        if level == 4:
            return
        grads = torch.autograd.grad(losses[first], [*model.parameters()], allow_unused=True)
        moved = {name for (name, _), grad in zip(model.named_parameters(), grads)
                 if grad is not None and grad.any()}
        assert {f"predictors.{first}.weight", f"blocks.{first}.fc2.weight"} <= moved
        assert {DISTILL.layer_of(name) for name in moved} <= {None, *range(first + 2)}
        with torch.no_grad():
            assert torch.equal(model(images, noise, level, *frozen), losses)

def test_maps_leave_with_their_stage_and_cost_what_they_cost():
    with settings(DISTILL, **FROZEN):
        model = DISTILL.make_model(CPU, 0)
        for level in range(5):
            trained = {name for name, _ in model.named_parameters()
                       if name.startswith("predictors.") and DISTILL.trains(name, level)}
            assert {int(name.split(".")[1]) + 1 for name in trained} == {*range(max(level, 1), 4)}
            more = DISTILL.train_flops(level)
            with settings(DISTILL, distill=0.0):
                more -= DISTILL.train_flops(level)
            assert more == 6 * 17 * 96 ** 2 * (4 - max(level, 1))

# ---------------------------------------------------------------------- dropped layers
def test_rates_of_dropped_blocks():
    with settings(DROP, size="nano", layer_drop=0.6):
        for level in (0, 1, 2, 4):
            draws = [DROP.dropped_blocks(step, 3, level) for step in range(3000)]
            rates = [sum(block in draw for draw in draws) / 3000 for block in range(1, 5)]
            wanted = [0.6 * (block - 1) / 3 * (block > level) for block in range(1, 5)]
            assert rates == pytest.approx(wanted, abs=0.03)
        assert draws != [DROP.dropped_blocks(step, 4, level) for step in range(3000)] or level == 4
        assert DROP.dropped_blocks(7, 3, 0) == DROP.dropped_blocks(7, 3, 0)
        together = sum({3, 4} <= {*DROP.dropped_blocks(step, 3, 0)} for step in range(3000)) / 3000
        assert together == pytest.approx(0.4 * 0.6, abs=0.03)

@pytest.mark.parametrize("level, dropped", [(0, (2,)), (0, (2, 3, 4)), (2, (4,)), (2, (3,))])
def test_a_model_without_its_dropped_blocks(level, dropped):
    """A step is that of a model that lacks the blocks and their stages."""
    with settings(DROP, **FROZEN):
        model, images, noise = DROP.make_model(CPU, 0), photos(4), noise_of(4)
        frozen = frozen_inputs(model, images, noise, level) if level > 1 else ()
        losses = model(images, noise, level, *frozen, dropped=dropped)
        losses.sum().backward()
        keep, less = [i for i in range(4) if i + 1 not in dropped], DROP.make_model(CPU, 0)
        less.blocks, less.decoders = (torch.nn.ModuleList(part[i] for i in keep)
                                      for part in (less.blocks, less.decoders))
        less.predictors = torch.nn.ModuleList(less.predictors[i] for i in keep[:-1])
        less.size = less.size._replace(taps=(*range(1, 1 + len(keep)),), depth=len(keep),
                                       scales=tuple(model.size.scales[i] for i in keep))
        less.cells = lambda images: [model.cells(images)[i] for i in keep]
        wanted = less(images, noise, level, *frozen)
        wanted.sum().backward()
        assert [loss for loss, i in zip(losses.tolist(), range(4)) if i in keep] == wanted.tolist()
        assert all(losses[block - 1] == 0 for block in dropped)
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        other = {name for name, p in less.named_parameters() if p.grad is not None}
        assert len(trained) == len(other)
        assert not {DROP.layer_of(name) for name in trained} & {*dropped}
        assert torch.equal(model.blocks[keep[-1]].fc2.weight.grad, less.blocks[-1].fc2.weight.grad)

def test_flops_of_dropped_blocks():
    with settings(DROP, **FROZEN, distill=0.0, pixel_stages=0):
        for level, passed in ((0, 0), (2, 0), (2, 2)):
            whole, block = DROP.train_flops(level, passed), 3 * 17 * (24 * 96 ** 2 + 4 * 17 * 96)
            with pytest.MonkeyPatch.context() as patch:
                size = DROP.SIZES["nano"]
                patch.setitem(DROP.SIZES, "nano", size._replace(taps=(1, 2, 3), scales=size.scales[:3]))
                stage = whole - DROP.train_flops(level, passed)
            assert whole - DROP.train_flops(level, passed, (4,)) == block + stage
        with settings(DROP, distill=0.1):
            maps = [DROP.train_flops(0, 0, dropped) for dropped in ((), (3,), (4,))]
        for more, dropped in zip(maps, ((), (3,), (4,))):
            assert more - DROP.train_flops(0, 0, dropped) == 6 * 17 * 96 ** 2 * (3 - len(dropped))

def test_what_is_dropped_stands_still(data, tmp_path):
    """With blocks 2 and 4 dropped from step 0 or 6 on, they and their stages keep the weights that they have
    then, in spite of weight decay and of moments; and FLOPs are counted as what ran."""
    def drop_from(first):
        def change(module):
            module.dropped_blocks = lambda step, seed, level: (2, 4) if step >= first else ()
        return change
    more = "--epochs=1", "--save_epochs=0.5"
    whole(*(run_of(15, data, tmp_path / str(first), *more, change=drop_from(first)) for first in (0, 6)))
    always, later, before = final(tmp_path / "0", 12), final(tmp_path / "6", 12), final(tmp_path / "6", 6)
    with settings(DROP, size="nano"):
        model = DROP.make_model(CPU, 0)
        wanted = {name for name, _ in model.named_parameters()
                  if DROP.layer_of(name) in (2, 4) or ".latent." in name or name.startswith("predictors.2.")}
        for state, start in ((always, model.state_dict()), (later, before["model"])):
            assert wanted == {name for name, p in state["model"].items() if torch.equal(p, start[name])}
        assert {"stage_1", "stage_3"} == {key for key in always["rows"][0] if key.startswith("stage")}
        flops = DROP.train_flops(), DROP.train_flops(0, 0, (2, 4))
        for folder, steps in (("0", (0, 12)), ("6", (6, 6))):
            line = json.loads((tmp_path / folder / "o.jsonl").read_text())
            assert line["pflops"] == pytest.approx(8 * sum(a * b for a, b in zip(steps, flops)) / 1e15)

# ---------------------------------------------------------------------- harder masks
def slow_clustered(noise, factor):
    """Patch by patch, neighbours across the edges included"""
    grid = math.isqrt(noise.shape[1])
    found = noise.clone()
    for row, values in enumerate(noise.tolist()):
        for y in range(grid):
            for x in range(grid):
                near = [values[(y + i) % grid * grid + (x + j) % grid]
                        for i in (-1, 0, 1) for j in (-1, 0, 1)]
                found[row, y * grid + x] += factor * sum(near) / 9
    return found

def distance(noise):
    """Mean distance of hidden patches to the nearest kept one, one by one"""
    found = []
    for order in noise.argsort(1).tolist():
        places = [divmod(patch, math.isqrt(noise.shape[1])) for patch in order]
        kept = places[:len(places) // 4]
        found += [min(math.dist(one, other) for other in kept) for one in places[len(kept):]]
    return sum(found) / len(found)

def test_masks_from_spread_out_to_clustered():
    noise = noise_of(400)
    torch.testing.assert_close(CURRICULUM.clustered(noise[:3], -1.5), slow_clustered(noise[:3], -1.5))
    far = [distance(CURRICULUM.clustered(noise[:100], factor)) for factor in (-2, -1, -0.5, 0, 1, 2, 4)]
    assert far == sorted(far) and far[5] > 1.15 * far[3] > 1.2 * far[0], far
    for factor in (-2, 2):  # no place is kept more often than others
        many = CURRICULUM.clustered(noise_of(8000), factor).argsort(1)[:, :16]
        rates = many.flatten().bincount(minlength=64) / 8000
        assert rates.min() > 0.22 and rates.max() < 0.28

def test_masks_get_harder_with_the_steps_and_stay_with_their_view():
    values = dict(size="nano", views=2, batch_size=4, epochs=10.0, warmup_epochs=1.0)
    with settings(CURRICULUM, **values), pytest.MonkeyPatch.context() as patch:
        train_set = CURRICULUM.Memory(**CURRICULUM.draw_synthetic(20, 0))
        def noises():
            return [noise for _, noise in CURRICULUM.plan(train_set, 0, 0, 50, CPU)]
        for freezes in ([], [5, 15]):  # block 1 never, or after three epochs of five steps
            patch.setattr(CURRICULUM, "FREEZES", freezes)
            with settings(CURRICULUM, curriculum=0.0):
                plain = noises()
            with settings(CURRICULUM, curriculum=2.0):
                hard = noises()
                late = [noise for _, noise in CURRICULUM.plan(train_set, 0, 33, 50, CPU)]
            assert all(map(torch.equal, late, hard[33:]))
            for step, (one, two) in enumerate(zip(plain, hard, strict=True)):
                shown = step if not freezes or step < 15 else 15 if step // 5 % 2 else 20
                torch.testing.assert_close(two, slow_clustered(one, 2 * (2 * shown / 50 - 1)))

# ---------------------------------------------------------------------- whole runs
def freeze_two(module):
    """Two of five layers freeze after the second epoch, when plasticities are measured for the first time."""
    turns = itertools.cycle([1.0] * 2 + [0.0] * 3)
    module.cka = lambda x, y: next(turns)

def run_of(number, data, folder, *more, change=lambda module: None):
    """A run of a script of 36 steps, 12 to an epoch, for forks()"""
    def both(module):
        freeze_two(module), change(module)
    return MAINS[number], [*flags(data, folder), "--warmup_epochs=0.5", "--plasticity=0.5", "--no-compile",
                           *more], both

OFF = {13: "--pixel_stages=0", 14: "--distill=0", 15: "--layer_drop=0", 16: "--curriculum=0"}

@pytest.fixture(scope="module")
def states(data, tmp_path_factory):
    """States after runs of scripts by number, of those without their own idea ('13 off'), and of the last
    without features as targets ('hog')"""
    folder = tmp_path_factory.mktemp("ideas")
    runs = {number: run_of(number, data, folder / str(number)) for number in range(12, 17)}
    runs.update((f"{number} off", run_of(number, data, folder / f"{number} off", flag))
                for number, flag in OFF.items())
    runs["hog"] = run_of(16, data, folder / "hog", "--latent=off", "--views=0")
    whole(*runs.values())
    return {name: final(folder / str(name)) for name in runs}

@pytest.mark.parametrize("number", OFF)
def test_without_its_idea_a_script_is_the_one_before(number, states):
    """To the bit, across a freeze and on stored views, with the ideas of the scripts before it"""
    found, wanted = states[f"{number} off"], states[number - 1]
    assert found["model"].keys() == wanted["model"].keys() and same_weights(found, wanted)
    assert found["rows"] == wanted["rows"] and [row["frozen"] for row in found["rows"]] == [0, 0, 2]
    assert states[number]["rows"] != wanted["rows"]

def test_ideas_do_without_features_as_targets(states):
    last, off = states[16], states["hog"]
    assert [[key for key in ("rank", "stage_1", "stage_2") if key in row] for row in last["rows"]] == [
        ["stage_1", "stage_2"], ["stage_1", "stage_2"], ["rank", "stage_2"]]
    assert off["rows"][:2] == last["rows"][:2] and "rank" not in off["rows"][2]
    assert off["rows"][2]["stage_4"] < off["rows"][0]["stage_4"]

def test_a_stopped_run_of_all_ideas_goes_on_to_the_bit(states, data, tmp_path):
    """Stopped within an epoch, before two layers freeze and after"""
    for stop, calls in ((6, 11), (30, 48)):  # two calls a step
        (code, text), = forks(run_of(16, data, tmp_path, change=after(
            "learning_rate", calls, send(signal.SIGTERM))))
        assert code == 143 and f"stopped after {stop} of 36" in text
    text, = whole(run_of(16, data, tmp_path))
    assert "continuing after 30 of 36" in text
    state = final(tmp_path)
    assert same_weights(state, states[16]) and state["rows"] == states[16]["rows"]

def test_two_processes_share_a_run_of_all_ideas(states, data, tmp_path):
    whole(*pair(*run_of(16, data, tmp_path, "--batch_size=2", "--accum_iter=2")))
    for ours, theirs in zip(final(tmp_path)["rows"], states[16]["rows"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=5e-3)
        assert ours["frozen"] == theirs["frozen"]

def test_wrong_flags_of_ideas(data, tmp_path):
    wrong = "--pixel_stages=-1", "--distill=-1", "--layer_drop=1", "--layer_drop=-0.1"
    for code, text in forks(*(run_of(16, data, tmp_path, flag) for flag in wrong)):
        assert code == 2 and text.count("\n") == 1

# ---------------------------------------------------------------------- fine-tuning at several depths
PLAIN = ["--mixup=0", "--cutmix=0", "--reprob=0", "--rand_ops=0", "--drop_path=0", "--shift=0",
         "--smoothing=0", "--layer_decay=1"]

def tune(name, data, folder, *more):
    """A run of fine-tuning, of 6 steps, for forks()"""
    return HERE / f"{name}.py", [
        f"--data={data}", f"--out={folder}/o.jsonl", f"--output_dir={folder}", "--size=nano", "--device=cpu",
        "--epochs=1", "--warmup_epochs=0.5", "--lr=2e-3", "--batch_size=16", "--save_epochs=0.5", *more]

def test_heads_on_earlier_blocks(data, tmp_path):
    """A step of plain gradient descent is that of the loss written out."""
    def change(module):
        module.make_optimizer = lambda model: torch.optim.SGD(
            [dict(params=[*model.parameters()], scale=1.0)], lr=0.0)
    step = ["--epochs=0.166667", "--warmup_epochs=0", "--lr=0.5", "--aux=0.6"]
    whole((*tune("finetune_multi", data, tmp_path, *PLAIN, *step), change))
    state = final(tmp_path, 1)
    with settings(MULTI, size="nano", batch_size=16, aux=0.6, rand_ops=0):
        model, train_set = MULTI.make_model(CPU, 0, None, 10), MULTI.load_data(data)[1]
        (batch, *_), = MULTI.plan(train_set, 0, 0, 1)
        images, labels = next(train_set.crops([batch], 32))
        mean, std = (torch.tensor(part)[:, None, None] for part in (MULTI.MEAN, MULTI.STD))
        x = model.patch_embed((images / 255 - mean) / std).flatten(2).mT + model.positions[:, 1:]
        x, losses = torch.cat([model.cls_token.expand(16, 1, 96), x], 1), []
        for block, head in zip(model.blocks, [*model.aux.values(), (model.norm, model.head)], strict=True):
            x = block(x, torch.ones(16, 2))
            logits = head[1](head[0](x[:, 1:].mean(1)))
            losses.append(-logits.log_softmax(1)[range(16), labels].mean())
        (losses[3] + 0.6 * (losses[0] + losses[1] + losses[2]) / 3).backward()
        assert state["rows"][0]["train_loss"] == pytest.approx(losses[3].item(), abs=1e-5)
        assert len(model.aux) == 3 and model(images).shape == (16, 10)
        for name, p in model.named_parameters():
            moved = p.detach() - state["model"][name]
            torch.testing.assert_close(moved, 0.5 * p.grad, atol=2e-6, rtol=1e-3)

def test_heads_at_several_depths(states, data, tmp_path):
    """Without them fine-tuning is as it was, to the bit; with them it starts from a checkpoint of a mainN and
    fresh heads that learn at the full rate, and goes on where it was killed."""
    torch.save(states[16], tmp_path / "c.pt")
    start = "--finetune", tmp_path / "c.pt"
    kill = after("save_checkpoint", 1, send(signal.SIGKILL))
    results = forks(tune("finetune", data, tmp_path / "plain", *start),
                    tune("finetune_multi", data, tmp_path / "off", *start, "--aux=0"),
                    tune("finetune_multi", data, tmp_path / "on", *start),
                    (*tune("finetune_multi", data, tmp_path / "killed", *start), kill),
                    tune("finetune_multi", data, tmp_path / "wrong", *start, "--aux=-1"))
    assert [code for code, _ in results] == [0, 0, 0, -signal.SIGKILL, 2]
    text, = whole(tune("finetune_multi", data, tmp_path / "killed", *start))
    assert "continuing after 3 of 6 steps" in text
    plain, off, on, killed = (final(tmp_path / name, 6) for name in ("plain", "off", "on", "killed"))
    assert off["model"].keys() == plain["model"].keys() and same_weights(off, plain)
    assert off["rows"] == plain["rows"]
    assert same_weights(killed, on) and killed["rows"] == on["rows"]
    size, _, weights = MULTI.pretrained(tmp_path / "c.pt")
    with settings(MULTI, size=size, layer_decay=0.5):
        model = MULTI.make_model(CPU, 7, weights, 10)
        groups, aux = MULTI.make_optimizer(model).param_groups, {*model.aux.parameters()}
        assert {group["scale"] for group in groups if aux & {*group["params"]}} == {1}
    assert torch.equal(model.blocks[2].fc1.weight, states[16]["model"]["blocks.2.fc1.weight"])
    assert all(head[1].weight.std() < 1e-4 for head in model.aux.values())
    assert on["model"]["aux.2.1.weight"].std() > 1e-4
