"""Checks of the final evaluation from main12 on, which does not see all test images in all views."""
import contextlib

from test_airbench import MAINS, images, main, model_of

import pytest
import torch
import torch.nn.functional as F

def leads(logits):
    """Of the class that each of logits [N, 10] is for over the next one."""
    ordered = logits.sort(1).values
    return ordered[:, -1] - ordered[:, -2]

def six_views(inputs):
    """Lists of images [N, 3, 32, 32]: as they are, mirrored, and in the four moved views."""
    padded = F.pad(inputs, [1] * 4, mode="reflect")
    moved = [padded[:, :, :32, :32], padded[:, :, 2:, 2:]]
    return [[inputs], [inputs.flip(-1)], [*moved, *(view.flip(-1) for view in moved)]]

@pytest.fixture
def prepared(monkeypatch):
    """Module of a number, model, 40 uint8 images, and their logits in the mean of each list of views."""
    def prepare(number):
        module, pixels = main(number), images(40)
        monkeypatch.setenv("TRITON_INTERPRET", "")  # the plain forms of kernels will do
        monkeypatch.setitem(module.HYP, "eval_batch_size", 7)
        monkeypatch.setattr(module, "autocast", contextlib.nullcontext)  # bf16 moves images over a bound
        model = model_of(module).eval()
        with torch.no_grad():
            model.head.weight *= 30  # or else all are as uncertain as each other
            means = [sum(map(model, views)) / len(views) for views in six_views(module.normalize(pixels))]
        return module, model, pixels, means
    return prepare

@pytest.mark.parametrize("number", [12, 42])
def test_only_uncertain_images_are_seen_again(number, prepared, monkeypatch):
    """Those of the lowest probability of the top class, or of the smallest lead of it over the next."""
    module, model, pixels, (plain, mirrored, moved) = prepared(number)
    six, chances = plain / 4 + mirrored / 4 + moved / 2, plain.softmax(1).amax(1)
    assert (six.argmax(1) != plain.argmax(1)).any()
    assert set(leads(plain).argsort()[:10].tolist()) != set(chances.argsort()[:10].tolist())
    top, name, shares = (chances, "tta_share", (0.25, 1.0, 0.0)) if number == 12 else (
        leads(plain), "tta_images", (10, 40, 0))
    bound = top.sort().values[9]
    slow = torch.stack([(six if top[i] <= bound else plain)[i].argmax() for i in range(40)])
    wrong = slow + torch.arange(40) % 2  # so that the accuracy is a half with these alone
    for share, labels, acc in ((shares[0], slow, 1.0), (shares[0], wrong % 10, 0.5),
                               (shares[1], six.argmax(1), 1.0), (shares[2], plain.argmax(1), 1.0)):
        monkeypatch.setitem(module.HYP, name, share)
        assert module.evaluate(model, pixels, labels, 6) == acc
    assert module.evaluate(model, pixels, plain.argmax(1), 1) == 1

def test_moved_views_are_of_images_that_two_views_leave_uncertain(prepared, monkeypatch):
    module, model, pixels, (slow, mirrored, moved) = prepared(43)
    plain, chosen = slow.argmax(1), []
    for n, logits in ((20, mirrored), (8, moved)):
        chosen.append(leads(slow).argsort()[:n])
        slow = torch.stack([(slow[i] + logits[i]) / 2 if i in chosen[-1] else slow[i] for i in range(40)])
        counts = [(1, 20), (4, 8)][:len(chosen)]
        monkeypatch.setitem(module.HYP, "tta_images", counts)
        for wrong, acc in ((0, 1), (torch.arange(40) % 4 < 3, 0.25)):
            assert module.evaluate(model, pixels, (slow.argmax(1) + wrong) % 10, 6) == acc
        assert module.evaluate(model, pixels, plain, 1) == 1 > module.evaluate(model, pixels, plain, 6)
    assert set(chosen[1].tolist()) != set(chosen[0][:8].tolist())
    with torch.no_grad():
        inputs = module.normalize(pixels)
        for more, logits in ((1, mirrored), (4, moved)):
            assert torch.allclose(module.infer(model, inputs, more), logits, atol=1e-4)

@pytest.mark.parametrize("number", [number for number in MAINS if number >= 12])
def test_warm_up_evaluates_batches_of_all_sizes(number, monkeypatch):
    """Or else compiling for another one would be timed in the first run."""
    module, sizes = main(number), []
    class Sizes(torch.nn.Module):
        def forward(self, inputs):
            sizes[-1].add(len(inputs))
            return torch.rand(len(inputs), 10)
    monkeypatch.setattr(module, "normalize", lambda images: images)
    for n in (10000, module.HYP["eval_batch_size"]):  # as a run and warm_up() have them
        sizes.append(set())
        module.evaluate(Sizes(), torch.zeros(n, 3, 2, 2), torch.zeros(n), module.HYP["tta_views"])
    assert sizes[0] <= sizes[1]
