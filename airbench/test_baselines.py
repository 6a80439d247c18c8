"""Checks of the scripts of this folder beside the ladder: of their budgets and ideas, each against a slow or
independent form of it."""
import math

from test_airbench import CPU, baseline, by_label, images, model_of

import pytest
import torch
import torch.nn.functional as F

@pytest.mark.parametrize("name, nominal, params", [
    ("train_resnet18", 4.35, 11173962), ("cifar10_fast", 1.14, None), ("hlb_cifar10", 0.60, None),
    ("airbench96", 4.90, 9918776)])
def test_published_budget_of_baselines(name, nominal, params):
    module = baseline(name)
    model = module.make_model(CPU)
    assert round(module.count_pflops(model, 50000, 10000)[0], 2) == nominal
    assert module.count_flops(model, False) == pytest.approx(2 * module.HYP["nominal_macs"], rel=1e-5)
    assert module.HYP["target"] == (0.96 if name == "airbench96" else 0.94)
    assert params is None or sum(p.numel() for p in model.parameters()) == params

def test_page_whitens_patches():
    module = baseline("cifar10_fast")
    stem = model_of(module).stem
    outputs = stem(module.normalize(images(500))).detach()[:, :, 1:-1, 1:-1]  # whole patches only
    rows = outputs.transpose(0, 1).flatten(1).double()
    covariance = rows @ rows.T / rows.shape[1]
    assert torch.allclose(covariance - torch.diag(covariance.diag()), torch.zeros(27, 27).double(), atol=0.02)
    assert 0.5 < covariance.diag().min() and covariance.diag().max() < 1.01

def test_random_squares():
    for name, size in (("train_resnet18", 12), ("airbench96", 12), ("hlb_cifar10", 3)):
        mask = baseline(name).random_squares(torch.zeros(200, 3, 32, 32), size)
        assert (mask.sum((1, 2, 3)) == size * size).all()
        assert (mask.any(3).sum(2) == size).all() and (mask.any(2).sum(2) == size).all()
        assert mask.any(0)[0, 0, 0] or mask.any(0).float().mean() > 0.5

def test_cutmix_labels_follow_the_area(monkeypatch):
    module = baseline("hlb_cifar10")
    monkeypatch.setitem(module.HYP, "batch_size", 64)
    loader = module.CifarLoader(images(), torch.arange(64) % 10)
    plain = torch.cat([labels for _, labels in loader])
    loader.epoch = math.ceil(module.HYP["epochs"] - module.HYP["cutmix_epochs"])
    mixed = torch.cat([labels for _, labels in loader])
    assert set(plain.unique().tolist()) == {0.0, 1.0} and torch.allclose(mixed.sum(1), torch.ones(64))
    parts = {round(value, 4) for value in mixed.unique().tolist()}
    assert parts <= {0.0, round(9 / 1024, 4), round(1 - 9 / 1024, 4), 1.0} and len(parts) > 2

def test_ghost_norm_equals_a_norm_per_split():
    module = baseline("cifar10_fast")
    norm, inputs = module.BatchNorm(5).train(), torch.randn(96, 5, 4, 4)
    norm.bias.data.normal_()
    outputs = norm(inputs)
    groups = inputs.view(32, 3, 5, 4, 4)  # every third image, as the reshape splits them
    mean, var = groups.mean((0, 3, 4), keepdim=True), groups.var((0, 3, 4), unbiased=False, keepdim=True)
    slow = (groups - mean) / (var + norm.eps).sqrt() + norm.bias.view(1, 1, 5, 1, 1)
    assert torch.allclose(outputs, slow.view(inputs.shape), atol=1e-5)
    assert torch.allclose(norm.running_mean, 0.1 * mean.mean(1).flatten(), atol=1e-6)

def test_hlb_initialization():
    module = baseline("hlb_cifar10")
    torch.manual_seed(0)
    for first, second in ((64, 64), (64, 256)):
        conv, inputs = module.Conv(first, second), torch.randn(1, first, 5, 5)
        passed = conv(inputs)[:, :first]
        if first == second:
            assert torch.equal(passed, inputs)
        else:
            default = torch.nn.Conv2d(first, second, 3, bias=False).weight.detach()
            assert conv.weight.std().item() == pytest.approx(default.std().item(), rel=0.05)
            assert torch.corrcoef(torch.stack([passed.flatten(), inputs.flatten()]))[0, 1] > 0.3

def test_second_finish_line_crops_flips_and_cuts_out(monkeypatch):
    """Each image of airbench96 is a crop of the padded one, the other way round in every other epoch, but for
    a square of 12 pixels that lies in the crop and is 0 on all channels."""
    module = baseline("airbench96")
    monkeypatch.setitem(module.HYP, "batch_size", 16)
    loader, pixels = module.CifarLoader(images(16), torch.arange(16)), module.normalize(images(16))
    padded, mirrored = F.pad(pixels, [4] * 4, mode="reflect"), []
    for _ in range(3):
        epoch = by_label(loader)
        for image, whole in zip(epoch, padded):
            square = (image == 0).all(0)
            assert square.sum() == 144 and square.any(0).sum() == square.any(1).sum() == 12
            crops = [whole[:, y:y + 32, x:x + 32] for y in range(9) for x in range(9)]
            found = [flip for crop in crops for flip, view in enumerate((crop, crop.flip(-1)))
                     if torch.equal(image, view * ~square)]
            assert len(found) == 1
            mirrored += found
    first, second, third = torch.tensor(mirrored).view(3, 16)
    assert torch.equal(first, 1 - second) and torch.equal(first, third) and 0 < first.sum() < 16

def test_second_finish_line_against_a_slow_form():
    """A group of airbench96 from its formula, and the settings of its optimizer."""
    module = baseline("airbench96")
    model = model_of(module)
    group, inputs = model.groups[0].eval(), torch.randn(2, 24, 31, 31)
    def norm(maps, layer):
        return maps / (1 + 1e-12) ** 0.5 + layer.bias.view(1, -1, 1, 1)
    for layer in (group.norm1, group.norm2, group.norm3):
        layer.bias.data.normal_()
    first = F.gelu(norm(F.max_pool2d(F.conv2d(inputs, group.conv1.weight, padding=1), 2), group.norm1))
    second = F.gelu(norm(F.conv2d(first, group.conv2.weight, padding=1), group.norm2))
    slow = F.gelu(first + norm(F.conv2d(second, group.conv3.weight, padding=1), group.norm3))
    assert slow.shape == (2, 128, 15, 15) and torch.allclose(group(inputs), slow, atol=1e-5)
    groups = module.make_optimizer(model).param_groups
    assert [len(group["params"]) for group in groups] == [11, 9]  # nine filters, head, stem's bias; norms
    assert groups[1]["lr"] == pytest.approx(64 * groups[0]["lr"])
    curve, total = module.schedule, math.ceil(module.HYP["epochs"] * 48)
    assert total == 1776 and (curve(0, total), curve(177, total), curve(total, total)) == (0.2, 1.0, 0.0)
