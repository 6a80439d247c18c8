"""Checks of the scripts that freeze layers, against published times, plain forms and scripts that do not."""
import collections
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import types

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from test_vitfreeze import (  # before torch: it has kernels interpreted
    CPU, ENV, MAINS, after, data, final, flags, forks, load, pair, photos, plain_norms, same_weights, send,
    settings, whole)

import pytest
import torch

pytestmark = pytest.mark.usefixtures("plain_norms")
FREEZE, GLOBAL, CONSTANT, WEIGHTS, STAGES, CACHE, LATENT, AUTO = (load(path) for path in MAINS[5:13])
WHOLE = [MAINS[5], MAINS[10], MAINS[11]]  # the others share their training loop

# ---------------------------------------------------------------------- when what freezes
def freeze_epochs(**hyp):
    """Epochs after which each layer no longer trains, in a run of 100 with 10 of warm-up, by looking at every
    thousandth of an epoch"""
    with settings(FREEZE, **dict(dict(size="base", epochs=100.0, warmup_epochs=10.0), **hyp)):
        levels = [FREEZE.freeze_level(step, 1000) for step in range(100000)]
    assert levels == sorted(levels) and levels[10000] == 0
    return [levels.index(level) / 1000 for level in range(1, max(levels) + 1)]

def test_freeze_times_are_the_published_ones():
    assert freeze_epochs(t_0=0.8, how_scale="cubic") == pytest.approx(
        [56.1, 59.0, 62.1, 65.3, 68.6, 72.0, 75.6, 79.3, 83.2, 87.2, 91.3, 95.6], abs=0.06)
    for t_0, first, *stages in ((0.65, 34.7, 42, 51, 85), (0.7, 40.9, 48, 56, 87), (0.75, 48.0, 55, 62, 89),
                                (0.85, 65.3, 70, 76, 93), (0.9, 75.6, 79, 83, 96)):
        times = freeze_epochs(t_0=t_0, how_scale="cubic")
        assert times[0] == pytest.approx(first, abs=0.06)
        assert [times[tap] for tap in (2, 4, 10)] == pytest.approx(stages, abs=0.6)
    assert freeze_epochs(t_0=0.5, how_scale="linear")[0] == pytest.approx(55.0, abs=0.01)
    assert freeze_epochs(t_0=1.0) == []
    with settings(FREEZE, size="base", t_0=0.8, how_scale="squared"):
        assert FREEZE.shares() == pytest.approx([
            0.64, 0.667, 0.694, 0.723, 0.751, 0.78, 0.81, 0.84, 0.871, 0.902, 0.934, 0.967, 1], abs=6e-4)
    with settings(FREEZE, size="base", t_0=0.8, dont_freeze_pe=True):
        assert FREEZE.shares()[:2] == pytest.approx([1, 0.512]) and FREEZE.shares()[-1] == pytest.approx(1)

@pytest.mark.parametrize("schedule, original, prefix", [
    (("cubic", 0.9), 5.2, 8.4), (("cubic", 0.8), 9.7, 15.7), (("cubic", 0.65), 15.2, 24.7),
    (("cubic", 0.5), 19.5, 31.8), (("squared", 0.8), 6.9, 11.2), (("linear", 0.5), 9.3, 14.9)])
def test_flops_saved(schedule, original, prefix):
    """In percent of a run of ViT-B, as a formula over the shares gives them"""
    how_scale, t_0 = schedule
    for keep_graph, saved in ((True, original), (False, prefix)):
        with settings(FREEZE, size="base", how_scale=how_scale, t_0=t_0, keep_graph=keep_graph, epochs=100.0,
                      warmup_epochs=10.0):
            levels = collections.Counter(FREEZE.freeze_level(step, 20) for step in range(2000))
            flops = sum(count * FREEZE.train_flops(level) for level, count in levels.items()) / 2000
            assert 100 * (1 - flops / FREEZE.train_flops()) == pytest.approx(saved, abs=0.25)

def test_learning_rates_of_layers():
    with settings(FREEZE, epochs=100, warmup_epochs=10, batch_size=2048, accum_iter=1, blr=2e-4, min_lr=1e-6):
        rate = lambda epoch, share: FREEZE.learning_rate(epoch * 50, 50, share)
        assert rate(5, 0.5) == pytest.approx(1.6e-3) and rate(10, 0.5) == pytest.approx(3.2e-3)
        assert rate(10 + 22.5, 0.5) == pytest.approx((3.2e-3 + 1e-6) / 2) and rate(55, 0.5) == 1e-6
        assert rate(70, 0.5) == 1e-6
        with settings(FREEZE, not_scale_lr=True):
            assert rate(10, 0.5) == pytest.approx(1.6e-3) and rate(55, 0.5) == pytest.approx(1e-6)

# ---------------------------------------------------------------------- what frozen means
def step_of(model, optimizer, level, seed):
    images, noise = photos(6, seed=seed), torch.rand(6, 64, generator=torch.Generator().manual_seed(seed))
    losses = model(images, noise, level)
    losses.sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return losses

@pytest.mark.parametrize("level", [1, 2, 3, 5, 6])
def test_what_is_frozen_needs_no_gradient_and_stays_to_the_bit(level):
    """Micro has stages on blocks 1, 3, 5 and 6."""
    with settings(FREEZE, size="micro"):
        model, seen = FREEZE.make_model(CPU, 0), {}
        optimizer = FREEZE.make_optimizer(model)
        step_of(model, optimizer, 0, seed=0)
        for i, block in enumerate(model.blocks, 1):
            block.register_forward_hook(
                lambda _, inputs, output, i=i: seen.update({i: output[0].requires_grad}))
        optimizer = FREEZE.freeze(model, optimizer, level)
        frozen = {name for name, _ in model.named_parameters() if not FREEZE.trains(name, level)}
        assert frozen == {name for name, p in model.named_parameters() if p.grad is None}
        assert {name for name in frozen if name.startswith("patch_embed")} and (
            ("cls_token" in frozen) == (level > 1))
        before = {name: p.clone() for name, p in model.state_dict().items()}
        for seed in range(5):
            losses = step_of(model, optimizer, level, seed)
            assert [loss > 0 for loss in losses.tolist()] == [tap >= level for tap in (1, 3, 5, 6)]
        assert seen == {i: i >= level for i in range(1, 7)} or level == 1 and all(seen.values())
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (name in frozen), name

@pytest.mark.parametrize("mode", ["prefix", "keep_graph", "dont_freeze_pe"])
def test_what_trains_has_the_gradients_that_it_would_have_anyway(mode):
    level, (images, noise) = 4, (photos(6), torch.rand(6, 64, generator=torch.Generator().manual_seed(1)))
    with settings(FREEZE, size="micro", **({} if mode == "prefix" else {mode: True})):
        model = FREEZE.make_model(CPU, 0)
        model(images, noise)[2:].sum().backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters() if FREEZE.trains(name, level)}
        model.zero_grad()
        if mode != "prefix":
            model.stand_ins = {i: load(MAINS[5]).Block(128, 4).requires_grad_(False) for i in range(1, level)}
            for i, block in model.stand_ins.items():
                block.load_state_dict(model.blocks[i - 1].state_dict())
        model(images, noise, level).sum().backward()
        assert ("cls_token" in wanted) == (mode != "prefix")
        assert ("patch_embed.weight" in wanted) == (mode == "dont_freeze_pe")
        for name, p in model.named_parameters():
            assert (p.grad is None) == (name not in wanted), name
            p.grad is None or torch.testing.assert_close(p.grad, wanted[name], atol=1e-6, rtol=1e-4)

def test_moments_of_what_still_trains_are_kept():
    with settings(FREEZE, size="micro"):
        model = FREEZE.make_model(CPU, 0)
        old = FREEZE.make_optimizer(model)
        step_of(model, old, 0, seed=0)
        new = FREEZE.freeze(model, old, 3)
        live = [p for name, p in model.named_parameters() if FREEZE.trains(name, 3)]
        assert {*map(id, new.state)} == {*map(id, live)} and len(live) < len(old.state)
        assert all(torch.equal(new.state[p]["exp_avg"], old.state[p]["exp_avg"]) for p in live)
        assert [group["share"] for group in new.param_groups] == sorted(
            [share for share in FREEZE.shares()[3:] for _ in (0, 1)], reverse=True)

# ---------------------------------------------------------------------- later steps
def test_one_cosine_for_all_layers():
    with settings(GLOBAL, size="base", t_0=0.5), torch.device("meta"):
        groups = GLOBAL.make_optimizer(GLOBAL.LocalMIM(), 5).param_groups
        names = [name for name, _ in GLOBAL.LocalMIM().named_parameters() if GLOBAL.trains(name, 5)]
    assert [group["weight_decay"] for group in groups] == [0.05, 0]
    assert sum(len(group["params"]) for group in groups) == len(names)
    for epoch in (0, 5, 10, 60, 99):
        with settings(GLOBAL, epochs=100, warmup_epochs=10), settings(FREEZE, epochs=100, warmup_epochs=10):
            assert GLOBAL.learning_rate(epoch * 20, 20) == FREEZE.learning_rate(epoch * 20, 20)

def test_constant_learning_rate_and_cooldown():
    with settings(CONSTANT, epochs=100, warmup_epochs=10, batch_size=1024, blr=4e-4, min_lr=0, cooldown=0.2):
        rates = [CONSTANT.learning_rate(epoch * 20, 20) for epoch in (5, 10, 50, 80, 90, 100)]
    assert rates == pytest.approx([8e-4, 1.6e-3, 1.6e-3, 1.6e-3, 8e-4, 0])

def test_stage_weights():
    losses = dict(stage_1=0.08, stage_2=0.04, stage_3=0.02, stage_4=0.02)
    def weights(kind, done, losses):
        with settings(WEIGHTS, size="base", stage_weights=kind):
            return WEIGHTS.stage_weights(done, losses)
    assert weights("equal", 0.3, losses) == [1] * 4
    inverse = [4 * part / (25 / 12) for part in (1 / 4, 1 / 3, 1 / 2, 1)]
    assert weights("inverse", 0.3, {}) == pytest.approx(inverse)
    assert weights("ramp", 0, losses) == pytest.approx(inverse[::-1])
    assert weights("ramp", 1, losses) == pytest.approx(inverse)
    assert weights("equalised", 0, {}) == [1] * 4
    equal = weights("equalised", 0.5, losses)
    assert [a * b for a, b in zip(equal, losses.values())] == pytest.approx([0.08 * equal[0]] * 4)
    assert sum(equal) == pytest.approx(4) and weights("equalised", 0.5, dict(stage_4=0.1)) == [0, 0, 0, 4]

def test_weights_reach_the_gradients(data, tmp_path):
    """With all weight on the last two stages, the heads of the first two stand still but for weight decay."""
    def change(module):
        module.stage_weights = lambda done, losses: [0.0, 0.0, 2.0, 2.0]
    whole((MAINS[8], [*flags(data, tmp_path), "--no-compile", "--weight_decay=0"], change))
    with settings(WEIGHTS, size="nano"):
        fresh = WEIGHTS.make_model(CPU, 0).state_dict()
    moved = {name.split(".")[1] for name, p in final(tmp_path)["model"].items()
             if name.startswith("decoders") and not torch.equal(p, fresh[name])}
    assert moved == {"2", "3"}

def test_a_stage_on_every_block():
    with settings(STAGES, size="base"), torch.device("meta"):
        model = STAGES.LocalMIM()
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(98.85e6, rel=1e-3)
        assert sum(p.numel() for p in model.decoders[0].parameters()) == 1160923 + 1536  # its norm
        assert STAGES.train_flops() / 1e9 == pytest.approx(41.8, rel=0.01)
    for size in STAGES.SIZES.values():
        assert size.taps == tuple(range(1, size.depth + 1)) and len(size.scales) == size.depth
    with settings(STAGES, size="base", t_0=0.5), torch.no_grad():
        size = STAGES.SIZES["base"]._replace(dim=24, heads=2, dec_dim=16, dec_heads=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(STAGES.SIZES, "base", size)
            model, images = STAGES.make_model(CPU, 0), photos(2, 224)
        for scale, cells in zip(size.scales, model.targets(images), strict=True):
            wanted = load(MAINS[0]).hog(images, int(16 / scale), 9)
            torch.testing.assert_close(cells, wanted, atol=1e-5, rtol=0)
        losses = model(images, torch.rand(2, 196), 4)
        assert [loss > 0 for loss in losses.tolist()] == [False] * 3 + [True] * 9

def test_stored_tokens_are_those_of_the_whole_prefix(monkeypatch):
    """To the bit: of no view, fresh ones, those that go on from a lower level, also in mid-epoch. Those of an
    epoch are used again if all of it was seen, as it is not by a run that goes on in the midst of it."""
    levels, calls = dict(enumerate([0, 2, 2, 2, 2, 3, 3, 4])), []  # when an epoch of two steps begins
    monkeypatch.setitem(CACHE.Views.__call__.__globals__, "freeze_level", lambda step, _: levels[step // 2])
    prefix = CACHE.LocalMIM.prefix
    def counted(self, images, kept, level, x=None, passed=0):
        calls.append((passed, level))
        return prefix(self, images, kept, level, x, passed)
    with settings(CACHE, size="nano", views=2):
        model, views = CACHE.make_model(CPU, 0), CACHE.Views(9, 2, CPU)
        images, noise = photos(9), torch.rand(9, 64, generator=torch.Generator().manual_seed(1))
        monkeypatch.setattr(CACHE.LocalMIM, "prefix", counted)
        for index, step, level, expected in (
                ([3, 1, 7], 1, 2, [(0, 2)]),  # no view
                ([1, 5, 2], 3, 2, [(0, 2)]),  # an epoch whose first step was not seen
                ([3, 1, 7], 4, 2, [(0, 2)]), ([5, 8, 2], 5, 2, [(0, 2)]),
                ([7, 5, 1], 6, 2, [(0, 2)]), ([3, 2, 8], 7, 2, [(0, 2)]),
                ([2, 3, 5], 8, 2, []), ([7, 1, 8], 9, 3, [(2, 3)]),
                ([8, 7, 5], 10, 3, [(2, 3)]), ([3, 2, 1], 11, 4, [(2, 3), (3, 4)]),
                ([7, 3, 8], 12, 4, [(2, 3), (3, 4)]), ([5, 1, 2], 13, 4, [(2, 3), (3, 4)]),
                ([5, 7, 1], 14, 4, [(3, 4)]), ([3, 2, 8], 15, 4, [(3, 4)])):
            index, view = torch.tensor(index), None if step < 2 else step // 2 % 2
            found = views(model, images[index], noise[index], index, view, step, level)
            wanted = prefix(model, images[index], model.kept(noise[index]), level)
            assert torch.equal(found, wanted) and not found.requires_grad
            assert calls == expected, step
            calls.clear()
        assert set(views.tokens) == {0, 1}
        whole = model(images, noise, 3)
        stored = model(images, noise, 3, model.prefix(images, model.kept(noise), 3).detach())
        assert torch.equal(whole, stored)

def test_views_take_turns_and_stay_the_same():
    with settings(CACHE, size="nano", views=2, batch_size=4, epochs=10.0, warmup_epochs=1.0, t_0=0.5):
        train_set = CACHE.Memory(**CACHE.draw_synthetic(20, 0))
        first = next(step for step in range(50) if CACHE.freeze_level(step, 5) > 1)
        steps, seen = list(CACHE.plan(train_set, 0, 0, 50, CPU)), collections.defaultdict(set)
        again = list(CACHE.plan(train_set, 0, first + 3, 50, CPU))
        for one, two in zip(steps[first + 3:], again, strict=True):
            assert torch.equal(one[0][1], two[0][1]) and torch.equal(one[1], two[1])
        for (index, numbers), noise in steps:
            for image, *rest in zip(index.tolist(), numbers[:, 0].tolist(), noise[:, 0].tolist()):
                seen[image].add(tuple(rest))
        assert {len(values) for values in seen.values()} == {math.ceil(first / 5) + 2}
        assert first % 5 and [CACHE.view_of(step, 5) for step in (first, 40, 44, 45)] == [None, 0, 0, 1]

def test_views_show_the_same_images_at_the_same_places():
    """Of 23 images 20 fill an epoch, always the same from the first epoch with a store on, each at the same
    place in a step, but not in the same step; before that, all images have their turns."""
    with settings(CACHE, size="nano", views=2, batch_size=4, epochs=10.0, warmup_epochs=1.0, t_0=0.5):
        train_set = CACHE.Memory(**CACHE.draw_synthetic(23, 0))
        orders = torch.stack([index for (index, _), _ in CACHE.plan(train_set, 0, 0, 50, CPU)]).view(10, 5, 4)
        start = math.ceil(next(step for step in range(50) if CACHE.freeze_level(step, 5) > 1) / 5)
        assert 2 < start < 7 and len(orders[:start].unique()) == 23
        for place in range(4):
            columns = {tuple(sorted(epoch[:, place].tolist())) for epoch in orders[start:]}
            assert len(columns) == 1 and len({*columns.pop()}) == 5
            assert len({tuple(epoch[:, place].tolist()) for epoch in orders[start:]}) > 1
        assert len(orders[start].unique()) == 20

@pytest.mark.parametrize("t_0, saved", [(0.8, 22.0), (0.5, 44.6)])
def test_flops_saved_by_storing(t_0, saved):
    """As the formula says when nothing frozen ever runs; a view must come once for that."""
    with settings(CACHE, size="base", t_0=t_0, epochs=100.0, warmup_epochs=10.0):
        sizes = dict(taps=(2, 4, 10, 12), scales=(4, 2, 1, 1 / 2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CACHE.SIZES, "base", CACHE.SIZES["base"]._replace(**sizes))
            levels = [CACHE.freeze_level(step, 20) for step in range(2000)]
            flops = sum(CACHE.train_flops(level, level) for level in levels) / 2000
            assert 100 * (1 - flops / CACHE.train_flops()) == pytest.approx(saved, abs=0.3)

def test_storing_changes_nothing_but_time(data, tmp_path):
    """A run that computes every prefix afresh ends with the same weights; and one with a store does the work
    that its line says, here with steps of which an epoch leaves some images out."""
    def afresh(self, model, images, noise, index, view, step, level):
        with torch.no_grad():
            return model.prefix(images, model.kept(noise), level)
    def change(module):
        module.Views.__call__ = afresh
    def count(module):
        prefix = module.LocalMIM.prefix
        def counted(self, images, kept, level, x=None, passed=0):
            with open(tmp_path / "prefixes", "a") as file:
                print(level, passed, file=file)
            return prefix(self, images, kept, level, x, passed)
        module.LocalMIM.prefix = counted
    more = ["--no-compile", "--views=1", "--t_0=0.2", "--epochs=5", "--batch_size=7"]
    whole((MAINS[10], [*flags(data, tmp_path / "a"), *more], change),
          (MAINS[10], [*flags(data, tmp_path / "b"), *more], count))
    line = json.loads((tmp_path / "b" / "o.jsonl").read_text())
    (per_epoch, left), last = divmod(96, 7), 65
    assert left and same_weights(final(tmp_path / "a", last), final(tmp_path / "b", last))
    with settings(CACHE, **line["hyp"]):
        levels = [CACHE.freeze_level(step, per_epoch) for step in range(last)]
        calls = [tuple(map(int, call.split())) for call in (tmp_path / "prefixes").read_text().splitlines()]
        work = sum(CACHE.train_flops(level, level * (level > 1)) for level in levels)
        work += sum(CACHE.train_flops(*call) - CACHE.train_flops(call[0], call[0]) for call in calls)
    assert line["pflops"] * 1e15 == pytest.approx(7 * work)
    first = next(step for step, level in enumerate(levels) if level > 1)
    fresh = (math.ceil(first / per_epoch) + 1) * per_epoch - first  # until all images are stored
    assert len([call for call in calls if not call[1]]) == fresh < len(levels) - first
    (code, _), (other, text) = forks((MAINS[10], [*flags(data, tmp_path / "c"), "--views=-1"]), (
        MAINS[10], [*flags(data, tmp_path / "c"), "--views=1000000000", "--epochs=1e9"]))
    assert code == other == 2 and "MiB" in text

def test_effective_rank():
    torch.manual_seed(0)
    x = torch.randn(4000, 3, 16)
    assert LATENT.effective_rank(x) == pytest.approx(15, abs=0.2)  # of 16, the norm takes one
    line = torch.randn(4000, 3, 1).sign() * torch.randn(16)
    assert LATENT.effective_rank(line) == pytest.approx(1, abs=0.01)

def frozen_tokens(model, images, noise, level):
    """(masked tokens, tokens of all patches) after that many layers"""
    return model.prefix(images, model.kept(noise), level), model.prefix(images, None, level)

def test_frozen_features_are_the_targets():
    with settings(LATENT, size="nano"):
        model, images = LATENT.make_model(CPU, 0), photos(5)
        noise, level = torch.rand(5, 64, generator=torch.Generator().manual_seed(1)), 2
        with torch.no_grad():
            tokens, whole = frozen_tokens(model, images, noise, level)
        losses = model(images, noise, level, tokens, whole)
        losses.sum().backward()
        losses = losses.detach()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in model.named_parameters() if LATENT.trains(name, level)}
        assert "decoders.1.latent.weight" in trained and "decoders.1.pred.weight" not in trained
        assert not LATENT.trains("decoders.1.latent.weight", 1) and LATENT.trains("decoders.1.pred.weight", 1)
        assert losses[0] == 0 and (losses[1:] > 0).all()
        y = torch.nn.functional.layer_norm(whole[:, 1:], (96,))
        order = noise.argsort(1)
        with torch.no_grad():
            x = model.stages(images, noise, level, tokens, True)[0]
        hidden = torch.stack([y[i, order[i, 16:]] for i in range(5)])
        assert losses[1] == pytest.approx(float((x[0][:, :, 0] - hidden).square().mean()), rel=1e-5)
        cells = y.view(5, 4, 2, 4, 2, 96).mean((2, 4)).flatten(1, 2)
        weights = (noise.argsort(1).argsort(1) >= 16).float().view(5, 4, 2, 4, 2).mean((2, 4)).flatten(1)
        wanted = ((x[1] - cells).square().mean(2) * weights).sum() / weights.sum()
        assert losses[2] == pytest.approx(float(wanted), rel=1e-5)

def test_hidden_patches_reach_the_inputs_only_where_the_header_says():
    with settings(LATENT, size="nano"), torch.no_grad():
        model, images = LATENT.make_model(CPU, 0), photos(2)
        noise = torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
        hidden = (noise.argsort(1).argsort(1) >= 16).view(2, 1, 8, 8)
        changed = torch.where(hidden.repeat_interleave(4, 2).repeat_interleave(4, 3), 255 - images, images)
        (tokens, whole), (same, others) = (frozen_tokens(model, x, noise, 3) for x in (images, changed))
        assert torch.equal(tokens, same)
        places = model.kept(noise)[:, :, None].expand(-1, -1, 96) + 1
        assert not torch.equal(whole.gather(1, places), others.gather(1, places))

def test_other_uses_of_frozen_features(data, tmp_path):
    whole(*((MAINS[11], [*flags(data, tmp_path / latent), *EARLY, f"--latent={latent}"])
            for latent in ("both", "off")))
    for latent in ("both", "off"):
        rows = final(tmp_path / latent)["rows"]
        assert ["rank" in row for row in rows] == [False] + [latent == "both"] * 2
        assert latent == "off" or 1 < rows[-1]["rank"] < 96 and rows[-1]["train_loss"] > rows[0]["train_loss"]

def test_cka():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 3000, 8)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    assert AUTO.cka(x, 3 * x @ turn + 5) == pytest.approx(1, abs=1e-5)
    assert AUTO.cka(x, noise) < 0.02
    found = [AUTO.cka(x, x + share * noise) for share in (0.1, 0.5, 2)]
    assert found == sorted(found, reverse=True) and found[0] > 0.95

def test_layers_freeze_by_plasticity(data, tmp_path):
    """At once where the bound is high, never where it is 0, which is main11 without freezing; and a run that
    lost its end goes on as if it had not."""
    ways = dict(high=(MAINS[12], "--plasticity=1"), never=(MAINS[12], "--plasticity=0"),
                main11=(MAINS[11], "--t_0=1"), some=(MAINS[12], "--plasticity=0.3"))
    more = ["--epochs=4", "--warmup_epochs=1", "--no-compile"]
    runs = {name: (path, [*flags(data, tmp_path / name), *more, flag]) for name, (path, flag) in ways.items()}
    whole(*runs.values())
    high, never, main11, some = (final(tmp_path / name, 48) for name in runs)
    assert [row["frozen"] for row in high["rows"]] == [0, 0, 4, 4] and high["freezes"] == [24] * 4
    assert never["freezes"] == [] and same_weights(never, main11)
    assert [len(row["plasticities"]) for row in some["rows"]] == [0, 5, 5, 5]
    line = json.loads((tmp_path / "high" / "o.jsonl").read_text())
    assert line["pflops"] < 0.95 * line["pflops_nominal"] and line["runs"][0]["freezes"] == [24] * 4
    for name in ("high", "some"):
        (tmp_path / name / "seed0" / "checkpoint-00000048.pt").unlink()
    whole(runs["high"], runs["some"])
    for name, state in (("high", high), ("some", some)):
        again = final(tmp_path / name, 48)
        assert same_weights(again, state) and again["rows"] == state["rows"]
        assert again["freezes"] == state["freezes"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*torchrun, MAINS[12], *flags(data, tmp_path / "two"), *more, "--plasticity=1"]
    command.append("--batch_size=4")
    done = subprocess.run(command, env=ENV, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(final(tmp_path / "two", 48)["rows"], high["rows"], strict=True):
        assert ours["frozen"] == theirs["frozen"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=5e-3)

def test_views_that_no_run_stores_need_no_memory(data, tmp_path):
    def no_memory(module):
        module.os = types.SimpleNamespace(**dict(vars(os), sysconf=lambda name: 1))
    common = ["--data", data, "--dry-run", "--out", tmp_path / "o", "--no-compile"]
    results = forks(*((path, [*common, *more], no_memory)
                      for path in MAINS[10:13] for more in ([], ["--keep_graph"])))
    assert [code for code, _ in results] == [2, 0] * 3 and "MiB" in results[0][1]

# ---------------------------------------------------------------------- whole runs
EARLY = ["--t_0=0.5", "--epochs=3", "--warmup_epochs=0.5", "--no-compile"]  # the first layer in step 10 of 36

def test_runs_that_freeze_late_enough_are_those_of_main4(data, tmp_path):
    whole(*((path, [*flags(data, tmp_path / path.stem), "--no-compile", *["--t_0=1"] * (path != MAINS[4])])
            for path in MAINS[4:7]))
    main4, *others = (final(tmp_path / path.stem) for path in MAINS[4:7])
    for other in others:
        assert same_weights(other, main4)
        assert [row["train_loss"] for row in other["rows"]] == [row["train_loss"] for row in main4["rows"]]

@pytest.fixture(scope="module")
def early_runs(data, tmp_path_factory):
    """{script: folder of a run in which layers freeze in steps 10 to 33 of 36}"""
    folders = {path: tmp_path_factory.mktemp(path.stem) for path in WHOLE}
    whole(*((path, [*flags(data, folder), *EARLY]) for path, folder in folders.items()))
    return folders

@pytest.fixture(params=WHOLE, ids=lambda path: path.stem)
def early(request, early_runs):
    return request.param, early_runs[request.param]

def test_layers_and_stages_leave_the_table_and_the_time(early):
    path, folder = early
    line, rows = json.loads((folder / "o.jsonl").read_text()), final(folder)["rows"]
    assert [row["frozen"] for row in rows] == [1, 3, 4]
    second = path != MAINS[11]  # where losses of epoch 2 count from the change of targets on
    assert ["stage_1" in row for row in rows] == [True, second, False] and "stage_4" in rows[-1]
    assert line["pflops"] < 0.95 * line["pflops_nominal"] and len(line["runs"][0]["epoch_images_per_s"]) == 3

def test_a_killed_run_goes_on_across_freezes(early, data, tmp_path):
    path, folder = early
    runs = {step: (path, [*flags(data, tmp_path / str(step)), *EARLY]) for step in (12, 24)}
    killed = forks(*((*run, after("save_checkpoint", step // 12, send(signal.SIGKILL)))
                     for step, run in runs.items()))
    assert [code for code, _ in killed] == [-signal.SIGKILL] * 2
    for step, text in zip(runs, whole(*runs.values())):
        state = final(tmp_path / str(step))
        assert f"continuing after {step} of 36 steps" in text
        assert same_weights(state, final(folder)) and state["rows"] == final(folder)["rows"]

def test_two_processes_freeze_as_one(early, data, tmp_path):
    path, folder = early
    whole(*pair(path, [*flags(data, tmp_path), *EARLY, "--batch_size=2", "--accum_iter=2"]))
    for ours, theirs in zip(final(tmp_path)["rows"], final(folder)["rows"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=5e-3)
        assert ours["frozen"] == theirs["frozen"]

def test_the_original_graph_can_be_kept(data, tmp_path):
    modes = "keep_graph", "dont_freeze_pe"
    whole(*((MAINS[5], [*flags(data, tmp_path / mode), *EARLY, f"--{mode}"]) for mode in modes))
    for mode in modes:
        rows = final(tmp_path / mode)["rows"]
        assert rows[-1]["frozen"] == 4 and rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert forks((MAINS[5], [f"--data={data}", f"--out={tmp_path}/o", "--t_0=0"]))[0][0] == 2

# ---------------------------------------------------------------------- fine-tuning
TUNING = ["--size=nano", "--epochs=2", "--warmup_epochs=0.5", "--lr=2e-3", "--device=cpu"]

def tuning(path, data, folder, *more):
    """A run of fine-tuning, of 12 steps, for forks()"""
    return path, [f"--data={data}", f"--out={folder}/o.jsonl", f"--output_dir={folder}", *TUNING,
                  "--batch_size=16", "--save_epochs=0.5", *more]

def tuned(folder):
    return torch.load(sorted(folder.glob("seed0/checkpoint-*.pt"))[-1], weights_only=True)

@pytest.fixture(scope="module")
def tuned_runs(data, tmp_path_factory):
    """Folders of runs of fine-tuning: without freezing, with it after the end, and on the way"""
    folder = tmp_path_factory.mktemp("tuning")
    scripts_ = dict(plain=(HERE / "finetune.py", "--seed=0"), late=(HERE / "finetune_freeze.py", "--t_0=1"),
                    early=(HERE / "finetune_freeze.py", "--t_0=0.5"))
    whole(*(tuning(path, data, folder / name, flag) for name, (path, flag) in scripts_.items()))
    return {name: folder / name for name in scripts_}

def test_fine_tuning_that_freezes_late_enough_is_fine_tuning(tuned_runs):
    plain, late, early = map(tuned, tuned_runs.values())
    assert same_weights(late, plain) and not same_weights(early, plain)
    assert [row["frozen"] for row in early["rows"]] == [1, 4]
    line = json.loads((tuned_runs["early"] / "o.jsonl").read_text())
    assert line["pflops"] < 0.9 * line["pflops_nominal"]

def test_frozen_layers_of_fine_tuning_stay_and_a_stopped_run_goes_on(tuned_runs, data, tmp_path):
    path, whole_run = HERE / "finetune_freeze.py", tuned(tuned_runs["early"])
    (code, _), = forks((*tuning(path, data, tmp_path, "--t_0=0.5"),
                        after("save_checkpoint", 3, send(signal.SIGKILL))))
    before, module = tuned(tmp_path), load(path)
    with settings(module, size="nano", t_0=0.5, epochs=2.0, warmup_epochs=0.5):
        level = module.freeze_level(before["step"] - 1, 6)
        frozen = {name for name in before["model"] if not module.trains(name, level)}
    assert code == -signal.SIGKILL and level == 3 and before["step"] == 9
    assert {"positions", "cls_token"} < frozen
    same = {name for name, p in whole_run["model"].items() if torch.equal(p, before["model"][name])}
    assert same >= frozen
    text, = whole(tuning(path, data, tmp_path, "--t_0=0.5"))
    again = tuned(tmp_path)
    assert "continuing after 9 of 12 steps" in text
    assert same_weights(again, whole_run) and again["rows"] == whole_run["rows"]

def test_two_processes_fine_tune_as_one_across_freezes(tuned_runs, data, tmp_path):
    path, run = tuning(HERE / "finetune_freeze.py", data, tmp_path, "--t_0=0.5", "--batch_size=8")
    whole(*pair(path, run))
    for ours, theirs in zip(tuned(tmp_path)["rows"], tuned(tuned_runs["early"])["rows"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-3)
        assert ours["frozen"] == theirs["frozen"]
