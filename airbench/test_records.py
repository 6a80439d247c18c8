"""Checks of the steps past the ablation, from main9 on, each against a slow or independent form of it."""
import contextlib
import subprocess
import sys

import test_airbench
from test_airbench import BF16, MAINS, images, main, model_of
from test_smoke import ENV, read_results, welch

import pytest
import torch
import torch.nn.functional as F

def test_orthogonalize_keeps_singular_vectors():
    torch.manual_seed(0)
    for shape in ((6, 6), (5, 90), (64, 216)):
        update = torch.randn(shape) * 1e3
        u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
        s = s / s.norm()
        for _ in range(3):
            s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
        slow = u @ s.diag() @ v
        assert (main(9).orthogonalize(update) - slow).abs().max() < (0.05 if BF16 else 1e-4)
        assert 0.6 < s.min() and s.max() < 1.3
    assert not main(9).orthogonalize(torch.zeros(3, 9)).any()

def test_muon_against_the_recurrence():
    module = main(9)
    model = model_of(module)
    optimizer = module.make_optimizer(model)
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert lrs == [0.053, 0.053, 0.67, 0.24] and len(optimizer.param_groups[3]["params"]) == 6
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    slow = {name: p.detach().clone() for name, p in named.items()}
    buffers = {name: torch.zeros_like(p) for name, p in slow.items()}
    for _ in range(3):
        for name, p in named.items():
            p.grad = torch.randn_like(p)
            conv, value = p.ndim == 4, slow[name]
            lr = 0.24 if conv else 0.67 if name == "head.weight" else 0.053
            grad = p.grad if conv else p.grad + 0.004 / lr * value
            buffers[name] = (0.6 if conv else 0.85) * buffers[name] + grad
            update = grad + (0.6 if conv else 0.85) * buffers[name]
            if conv:
                value = value * len(value) ** 0.5 / value.norm()
                update = module.orthogonalize(update.flatten(1)).view_as(value)
            slow[name] = value - lr * update
        optimizer.step()
        optimizer.zero_grad()
        for name, p in named.items():
            assert torch.allclose(p, slow[name], atol=1e-4), name

@pytest.mark.parametrize("numbers", [(12, 13), (18, 21)])
def test_stacks_give_the_same_updates_as_single_filters(numbers):
    """One stack of all shapes does, too, traced for compilation in one piece."""
    models = [model_of(main(number)) for number in numbers]
    models[1].load_state_dict(models[0].state_dict())  # whitened by other images
    optimizers = [main(number).make_optimizer(model) for number, model in zip(numbers, models)]
    if numbers[1] == 21:
        optimizers[1].update = torch.compile(optimizers[1].update, backend="aot_eager", fullgraph=True)
    shapes = [p.shape for p in optimizers[1].param_groups[3]["params"]]
    assert len(shapes) == 6 and len(set(shapes)) == 4
    for optimizer in optimizers:
        optimizer.reset([9] * 4)
    before = [p.detach().clone() for p in models[0].parameters()]
    for _ in range(3):
        for p, q in zip(*(model.parameters() for model in models)):
            p.grad = torch.randn_like(p) if p.requires_grad else None
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for old, p, q in zip(before, *(model.parameters() for model in models)):
        assert (p - q).norm() <= (0.01 if BF16 else 1e-4) * (p - old).norm()

def test_learning_rates_fall_to_zero():
    schedule = main(9).schedule
    assert [schedule(step, 200) for step in (0, 50, 200)] == [1, 0.75, 0]
    assert schedule(75, 75) == schedule(99, 75) == schedule(0, 0) - 1 == 0
    model = model_of(main(9))
    assert model.head.weight.std().item() == pytest.approx(1, abs=1e-5) and model.stem.bias.any()

def test_device_learning_rates_give_the_same_updates():
    """main9 with a scheduler and main10 with tensors, on the same gradients, after a run and a reset."""
    models = [model_of(main(number)) for number in (9, 10)]
    optimizers = [main(number).make_optimizer(model) for number, model in zip((9, 10), models)]
    falls = [2, 5, 5, 5]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizers[0], [
        lambda step, fall=fall: main(9).schedule(step, fall) for fall in falls])
    for p in models[1].parameters():  # a run before leaves nothing behind
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizers[1].step()
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].reset(falls)
    for step in range(3):
        for p, q in zip(*(model.parameters() for model in models)):
            p.grad = torch.randn_like(p) if p.requires_grad else None
            q.grad = None if p.grad is None else p.grad.clone()
        lrs = [group["lr"] for group in optimizers[0].param_groups]
        for optimizer in optimizers:
            optimizer.step()
        assert [group["lr"].item() for group in optimizers[1].param_groups] == pytest.approx(lrs)
        scheduler.step()
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.allclose(p, q, atol=1e-5)

def test_batches_from_buffers_equal_slow_crops(monkeypatch):
    module, pixels, labels = main(10), images(50), torch.arange(50)
    monkeypatch.setitem(module.HYP, "batch_size", 16)
    loader = module.CifarLoader(pixels)
    loader.reset(pixels, labels)
    padded = F.pad(module.normalize(pixels), [2] * 4, mode="reflect")
    mirrored = [{}, {}]
    for epoch in range(2):
        loader.shuffle()
        seen = []
        for i in range(len(loader)):
            inputs, found = loader.next()
            assert inputs.is_contiguous(memory_format=torch.channels_last)
            for j, (image, number) in enumerate(zip(inputs, found.tolist())):
                own, y, x, flip = loader.draws[:, i, j].tolist()
                window = padded[number, :, y:y + 32, x:x + 32]
                assert own == number and torch.equal(image, window.flip(-1) if flip else window)
                mirrored[epoch][number] = flip
            seen += found.tolist()
        assert len(set(seen)) == len(seen) == 48
    both = mirrored[0].keys() & mirrored[1].keys()
    assert len(both) >= 46 and all(mirrored[0][n] != mirrored[1][n] for n in both)
    assert 0 < sum(mirrored[0].values()) < 48

def test_sizes_grow_and_cost_what_their_maps_cost():
    module = main(11)
    assert [module.flags(epoch) for epoch in (0, 2, 3, 4, 6, 7, 9)] == [
        (True, 24), (True, 24), (False, 24), (False, 28), (False, 28), (False, 32), (False, 32)]
    model = model_of(module).eval()
    flops = {size: module.count_flops(model, False, size=size) for size in (24, 28, 32)}
    assert [round(flops[size] / flops[32], 3) for size in (24, 28)] == [0.522, 0.755]
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model(inputs), model_of(main(10)).eval()(inputs), atol=1e-5)  # at 32 as before
    for size, side in ((24, 2), (28, 3), (32, 3)):
        maps = model.groups(F.gelu(model.stem(inputs[:, :, :size, :size])))
        assert maps.shape[2:] == (side, side)
        slow = model.head(torch.stack([each.flatten(1).amax(1) for each in maps])) / 256
        assert torch.allclose(model(inputs[:, :, :size, :size]), slow, atol=1e-5)

@pytest.mark.parametrize("size", [20, 24, 28, 32])
def test_resized_batches_equal_slow_ones(size, monkeypatch):
    module, pixels = main(11), images(8)
    monkeypatch.setitem(module.HYP, "batch_size", 8)
    loader = module.CifarLoader(pixels)
    loader.reset(pixels, torch.arange(8))
    loader.shuffle()
    whole, small = loader.next(32)[0], loader.next(size)[0]  # the second call starts the batches anew
    places = ((torch.arange(size) + 0.5) * 32 / size - 0.5).clamp(0, 31)
    low, share = places.floor().long(), places.frac()
    def halfway(values):  # along the last axis
        return values[..., low] * (1 - share) + values[..., (low + 1).clamp(max=31)] * share
    slow = halfway(halfway(whole).transpose(2, 3)).transpose(2, 3)
    assert torch.allclose(small, slow, atol=1e-5) and small.is_contiguous(memory_format=torch.channels_last)

def moves_of(n_images, n, seed=0):
    """Indices of n images with their crops, the most extreme ones among them."""
    torch.manual_seed(seed)
    moves = torch.stack([torch.randint(n_images, (n,)), *torch.randint(5, (2, n)), torch.randint(2, (n,))])
    moves[1:, :4] = torch.tensor([[0, 0, 4, 4], [0, 4, 0, 4], [0, 1, 1, 0]])
    return moves

def test_crops_from_uint8_equal_those_from_padded_images():
    old, new, pixels, moves = main(13), main(14), images(9), moves_of(9, 40)
    padded = F.pad(old.normalize(pixels), [2] * 4, mode="reflect").permute(0, 2, 3, 1)
    for size in (24, 28, 32):
        slow = old.batch_crop(padded, *moves)
        slow = F.interpolate(slow, size=size, mode="bilinear") if size < 32 else slow
        fast = new.batch_crop(pixels, *moves, size)
        assert torch.allclose(fast, slow, atol=1e-5)
        assert fast.is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize("size, number", [(20, 14), (24, 14), (28, 14), (32, 14), (23, 14), (24, 19),
                                          (32, 19), (20, 35)])
def test_crop_kernel_equals_its_plain_form(size, number, monkeypatch):
    """In Triton's interpreter, which test_smoke turns on."""
    module, pixels, moves, tones = main(number), images(9), moves_of(9, 7), torch.rand(2, 7)
    scale = torch.tensor([module.CIFAR_MEAN, module.CIFAR_STD])
    slow, arguments = module.batch_crop(pixels, *moves, size), (pixels, moves, scale, size)
    if number == 19:
        slow = torch.stack([(image + shift) * factor for image, shift, factor in zip(slow, *tones)])
        arguments = pixels, moves, tones, scale, size
    fast = module.augment(*arguments)
    assert fast.shape == slow.shape and fast.is_contiguous(memory_format=torch.channels_last)
    assert (fast - slow).abs().max() < 1e-5
    monkeypatch.setenv("TRITON_INTERPRET", "")
    assert (module.augment(*arguments) - slow).abs().max() < 1e-5

def test_tones_vary_within_their_bounds(monkeypatch):
    module = main(19)
    monkeypatch.setitem(module.HYP, "batch_size", 16)
    loader = module.CifarLoader(images(64))
    loader.reset(torch.arange(64))
    drawn = []
    for _ in range(50):
        loader.shuffle()
        drawn.append(loader.tones.clone())
    (shifts, factors), bounds = torch.stack(drawn, 1), (0.1399, 0.1308)
    for values, bound in zip((shifts, factors - 1), bounds):
        assert 0.95 * bound < values.max() <= bound + 1e-6 and -bound - 1e-6 <= values.min() < -0.95 * bound
        assert abs(values.mean()) < 0.05 * bound and values.unique().numel() > 3000
    whole = images(64)[loader.draws[0, 1]]
    monkeypatch.setitem(module.HYP, "translate", 0)
    loader.draws[1:3], loader.batch[0] = 0, 1
    mirrored = loader.draws[3, 1].bool()[:, None, None, None]
    slow = module.normalize(torch.where(mirrored, whole.flip(2), whole))
    slow = (slow + loader.tones[0, 1][:, None, None, None]) * loader.tones[1, 1][:, None, None, None]
    assert torch.allclose(loader.next(32)[0], slow, atol=1e-5)

@pytest.mark.parametrize("number", [14, 19])
def test_crop_kernel_compiles_for_a_gpu(number):
    """To machine code for an H100, which needs none; in its own process, where nothing is interpreted."""
    code = f"""
import sys, triton
sys.path.insert(0, {str(MAINS[number].parent)!r})
import {MAINS[number].stem} as m
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
types = dict(X_ptr="*u8", move_ptr="*i64", tone_ptr="*fp32", scale_ptr="*fp32", Y_ptr="*fp16", n="i32",
             size="i32", PAD="constexpr", BLOCK_SIZE="constexpr")
types = {{name: types[name] for name in m._crop_fwd_kernel.arg_names}}
source = ASTSource(fn=m._crop_fwd_kernel, signature=types, constexprs=dict(PAD=2, BLOCK_SIZE=1024))
assert len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 1000
"""
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True)

def test_silu_stands_where_gelu_was_but_for_the_stem():
    """Maps of a group and logits of main16 against x * sigmoid(x) between the layers of main15."""
    model, other = model_of(main(16)).eval(), model_of(main(15)).eval()
    inputs = torch.randn(2, 3, 32, 32)
    hidden = F.gelu(other.stem(inputs))
    for group in other.groups:
        hidden = group.norm1(F.max_pool2d(group.conv1(hidden), 2))
        hidden = group.norm2(group.conv2(hidden * hidden.sigmoid()))
        hidden = hidden * hidden.sigmoid()
    slow = other.head(hidden.flatten(2).amax(2)) / 256
    assert torch.allclose(model(inputs), slow, atol=1e-5)
    assert not torch.allclose(other(inputs), slow, atol=1e-3)

def test_learning_rates_fall_to_a_floor():
    """main17 after 272 of its 284 steps, and its stem's bias after 6."""
    module, steps = main(17), torch.arange(284)
    factors = module.schedule(steps, torch.tensor(0.958 * 284))
    assert torch.allclose(factors, (1 - steps / 272.072).clamp(min=0.05)) and factors.argmin() == 259
    assert factors[0] == 1 and factors[-1] == factors[259] == 0.05 < factors[258]
    model = model_of(module)
    step = module.Step(model, main(0).draw_synthetic(3072, 1))
    falls = []
    step.optimizer.reset = falls.extend
    class Stop(Exception):
        pass
    def stop():
        raise Stop
    step.loader.shuffle = stop
    with pytest.raises(Stop):
        module.train(step, main(0).draw_synthetic(3072, 1), {}, run=0, seed=0)
    assert falls == pytest.approx([0.2 * 2, *[0.958 * 18] * 3])  # 8.875 epochs of two batches

def test_tail_average_against_the_recurrence():
    """Six points, 20 to 0 steps before the end, and in the end they are the model."""
    module = main(18)
    model = model_of(module)
    tail, points = module.TailAverage(model), []
    for left in range(29, -1, -1):
        values = [value for value in model.state_dict().values() if value.is_floating_point()]
        for value in values:
            value.add_(torch.randn_like(value))
        now = [value.clone() for value in values]
        if left in (20, 16, 12, 8, 4, 0):
            points.append([value.double() for value in now])
        tail.update(left)
        assert not left or all(map(torch.equal, values, now))  # training goes on from where it was
    weights = [0.7 ** 5, *(0.3 * 0.7 ** k for k in (4, 3, 2, 1, 0))]
    assert len(values) == len(list(model.parameters())) + 12 and sum(weights) == pytest.approx(1)
    for value, *history in zip(values, *points):
        slow = sum(weight * point for weight, point in zip(weights, history))
        assert torch.allclose(value.double(), slow, atol=1e-4)
    tail = module.TailAverage(model)  # of a run of few steps, which begins within the tail
    before = [value.clone() for value in values]
    tail.update(1), tail.update(0)
    assert all(torch.equal(value, old) for value, old in zip(values, before))

def test_even_kernel_starts_as_the_identity_and_spares_a_row():
    module = main(20)
    model = model_of(module)
    assert [group.conv1.kernel_size for group in model.groups] == [(3, 3), (3, 3), (2, 2)]
    inputs = torch.randn(2, 256, 7, 7)
    outputs = model.groups[2].conv1(inputs)
    assert torch.allclose(outputs, inputs[:, :, :6, :6], atol=1e-5)
    flops = [main(number).count_flops(model_of(main(number)), False) for number in (19, 20)]
    assert flops[0] - flops[1] == 2 * 256 * 256 * (9 * 49 - 4 * 36)
    share = 2 * 24 * 64 * 9 * 31 * 31 / flops[1]  # what the frozen stem saves, of the matmuls alone
    assert module.HYP["nominal_frozen"] == pytest.approx(share, rel=0.02)

def test_rest_of_the_step_compiled_gives_the_same_weights(monkeypatch):
    """Loss, metrics and learning rates in pieces that are traced whole, over the whole fall of the rates."""
    monkeypatch.setenv("TRITON_INTERPRET", "")
    found = []
    for number in (23, 24):
        module = main(number)
        monkeypatch.setitem(module.HYP, "batch_size", 8)
        model, train_set = model_of(module), module.draw_synthetic(40, 0)
        step = module.Step(model, train_set)
        if number == 24:
            step.objective, step.optimizer.tick = (torch.compile(
                part, backend="aot_eager", fullgraph=True) for part in (module.objective, module.tick))
        torch.manual_seed(3)
        step.loader.reset(train_set["labels"])
        step.loader.shuffle()
        step.optimizer.reset([2] + [4] * 3)
        model.train()
        rates, metrics = [], []
        for index in range(5):
            step(index < 2, 24)
            rates.append([float(group["lr"]) for group in step.optimizer.param_groups])
            metrics.append(step.metrics.tolist())
        found.append((rates, metrics, [p.detach().clone() for p in model.parameters()]))
    (rates, metrics, weights), (others, rows, values) = found
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(others))
    torch.testing.assert_close(torch.tensor(metrics), torch.tensor(rows), rtol=1e-4, atol=0)
    assert all(torch.allclose(p, q, atol=1e-3 if BF16 else 1e-5) for p, q in zip(weights, values))
    assert len({rate[0] for rate in rates}) == 3 and rates[4][3] == pytest.approx(0.05 * rates[0][3])

def test_hard_images_are_shown_again(monkeypatch):
    """Of 50 images, 48 in any order, then as asked for those of the highest losses, each mirrored in turn."""
    module = main(29)
    monkeypatch.setitem(module.HYP, "batch_size", 16)
    loader = module.CifarLoader(images(50))
    loader.reset(torch.arange(50))
    losses, flips, first = torch.rand(50), {}, []
    for epoch, n in enumerate((3, 2, 1, 3, 2)):
        expected = loader.losses.argsort(descending=True)[:16 * n].tolist()
        loader.shuffle(n)
        assert not loader.batch.item()
        seen = []
        for i in range(n):
            _, labels = loader.next(24)
            seen += labels.tolist()
            for own, flip in loader.draws[[0, 3], i].T.tolist():
                assert flips.get(own, 1 - flip) != flip  # not as the last time
                flips[own] = flip
            loader.note(losses[labels])
        assert len(set(seen)) == 16 * n and seen != sorted(seen)
        assert not epoch or set(seen) == set(expected) and seen != expected  # nor in the order of the losses
        first.append(seen)
        assert torch.equal(loader.losses[seen], losses[seen])
        losses = losses + torch.randn(50) * (epoch != 2)
    assert first[1] != [number for number in first[0] if number in set(first[1])]
    loader.reset(torch.arange(50))
    assert loader.losses.isinf().all()

def test_losses_go_to_their_images_and_epochs_shrink(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "")  # the kernels take half a minute there
    module = main(29)
    assert module.batches(32) == [32] * 3 + [22] * 7 and main(30).batches(32) == [32] * 3 + [21] * 7
    labels = torch.randint(10, (40,))
    model = model_of(module)
    monkeypatch.setitem(module.HYP, "batch_size", 8)
    step = module.Step(model, dict(images=images(40), labels=labels))
    step.loader.reset(labels)
    step.loader.shuffle(5)
    step.optimizer.reset([2] + [4] * 3)
    model.train()
    moves = step.loader.draws[:, 0].contiguous()
    inputs, same = module.augment(images(40), moves, step.loader.scale, 24), model_of(module).train()
    with module.autocast(inputs.device):
        logits = same(inputs, False).float()
    step(False, 24)
    slow = -0.91 * logits.softmax(1)[range(8), labels[moves[0]]].log() - 0.09 * logits.log_softmax(1).mean(1)
    torch.testing.assert_close(step.loader.losses[moves[0]], slow, rtol=1e-4, atol=0)
    assert step.loader.losses.isinf().sum() == 32
    monkeypatch.setitem(module.HYP, "epochs", 4.5)
    taken, falls, part = [], [], dict(images=images(40), labels=labels)
    step.eager, step.optimizer.reset = lambda *flags: taken.append(flags), falls.extend
    module.train(step, part, part, run=0, seed=0)
    assert taken == [(True, 24)] * 5 + [(False, 24)] * 10 + [(False, 28)] * (4 + 2)
    assert falls == pytest.approx([0.2 * 5, *[0.958 * 21] * 3])
    monkeypatch.setitem(module.HYP, "batch_size", 1536)
    assert module.batches(32) == [32] * 3 + [22, 11]
    pflops = module.count_pflops(model, 50000, 0)[1]
    frozen, half = (module.count_flops(model, True, False, size) for size in (24, 28))
    first = module.count_flops(model, True, True, 24)
    assert pflops == pytest.approx(1536 * (32 * first + 64 * frozen + 33 * half) / 1e15)

def test_steps_are_of_the_machine_measured_last(monkeypatch):
    line = next(line for line in read_results("airbench") if "seconds_per_image" in line)
    lines = [dict(line, cpu=cpu, round=i) for i, cpu in enumerate(("one", "other", "one", "other"))]
    monkeypatch.setattr(test_airbench, "read_results", lambda _: lines)
    assert test_airbench.step_lines("seconds_per_image")[8] == lines[1::2]

def test_patches_are_those_of_unfold():
    filters = [main(number).whitening_filters(images(50)) for number in (32, 33)]
    assert filters[0].shape == (24, 3, 2, 2) and torch.equal(*filters)

def test_filters_are_updated_while_the_gradient_goes_on(monkeypatch):
    """Those of the third and the second group before the first has gradients; to the weights of main33."""
    found, taken, part = [], [], dict(images=images(40), labels=torch.arange(40) % 10)
    monkeypatch.setenv("TRITON_INTERPRET", "")
    for number in (33, 34):
        module, model = main(number), model_of(main(number))
        monkeypatch.setitem(module.HYP, "batch_size", 8)
        monkeypatch.setattr(module, "autocast", lambda device: contextlib.nullcontext())
        step, first = module.Step(model, part), model.groups[0].conv2.weight
        def update(filters, grads, *rest, optimizer=step.optimizer, first=first):
            taken.append(([list(p.shape[:2]) for p in filters], first.grad is not None))
            type(optimizer).update(filters, grads, *rest)
        step.optimizer.update = update
        torch.manual_seed(1)
        step.loader.reset(part["labels"])
        step.loader.shuffle(5)
        step.optimizer.reset([2] + [9] * 3)
        model.train()
        for index in range(4):
            step(index < 2, 20 if index < 3 else 24)
            assert all(p.grad is None for p in model.parameters())
        found.append([*model.parameters(), *model.buffers()])
    groups = [([[256, 256]] * 2, False), ([[256, 64], [256, 256]], False), ([[64, 24], [64, 64]], True)]
    live = [*groups[:2], (groups[2][0], True)]
    assert taken[4:] == live * 2 + groups * 2 and [len(shapes) for shapes, _ in taken[:4]] == [6] * 4
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(*found, strict=True))

def test_order_of_memory_gives_the_same_updates():
    found = []
    for number in (35, 36):
        torch.manual_seed(0)
        filters = [layer.weight.data for layer in model_of(main(number)).modules()
                   if isinstance(layer, main(number).Conv)]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
        before = [p.clone() for p in filters]
        grads, buffers = ([torch.randn_like(p) for p in filters] for _ in range(2))
        main(number).update_filters(filters, grads, buffers, 0.2, 0.6)
        found.append((filters, buffers))
    for old, p, q in zip(before, found[0][0], found[1][0]):
        assert (p - q).norm() <= (0.01 if BF16 else 1e-4) * (p - old).norm()
    assert all(map(torch.equal, found[0][1], found[1][1]))

def test_next_epoch_is_drawn_before_an_epoch_is_waited_for(monkeypatch):
    """With the batches, losses and accuracy of main36."""
    found, part = [], main(0).draw_synthetic(80, 1)
    monkeypatch.setenv("TRITON_INTERPRET", "")
    for number in (36, 37):
        module, done = main(number), []
        monkeypatch.setitem(module.HYP, "batch_size", 8)
        monkeypatch.setitem(module.HYP, "epochs", 4.5)
        step, shuffle, lap = module.Step(model_of(module), part), module.CifarLoader.shuffle, module.Timer.lap
        note = lambda what, call: lambda self, *rest: (done.append((what, *rest)), call(self, *rest))[1]
        monkeypatch.setattr(module.CifarLoader, "shuffle", note("drawn", shuffle))
        monkeypatch.setattr(module.Timer, "lap", note("lap", lap))
        with contextlib.redirect_stdout(None):
            result = module.train(step, part, part, run=0, seed=7)
        found.append((result["acc"], result["epochs"]))
        sizes = [10, 10, 10, 6, 3]
        assert [each[1] for each in done if each[0] == "drawn"] == sizes
        waits = [i for i, each in enumerate(done) if each == ("lap", "train")]
        drawn = [sum(each[0] == "drawn" for each in done[:i]) for i in waits]
        assert drawn == ([1, 2, 3, 4, 5] if number == 36 else [2, 3, 4, 5, 5])
    assert found[0] == found[1]

def test_first_group_is_frozen_early(monkeypatch):
    """Until then all train as in main38 where the rates are the same; then the first group's weights stay."""
    found, part = [], dict(images=images(40), labels=torch.arange(40) % 10)
    monkeypatch.setenv("TRITON_INTERPRET", "")
    for number in (38, 39, 40):
        module, model = main(number), model_of(main(number))
        monkeypatch.setitem(module.HYP, "batch_size", 8)
        monkeypatch.setattr(module, "autocast", lambda device: contextlib.nullcontext())
        step, states, taken, falls = module.Step(model, part), [], [], []
        torch.manual_seed(1)
        step.loader.reset(part["labels"])
        step.loader.shuffle(5)
        step.optimizer.reset([2] + [9] * (4 if number == 39 else 3))
        model.train()
        for index in range(5):
            step(*(index < 2, 20, index < 4)[:2 if number == 38 else 3])
            assert all(p.grad is None for p in model.parameters())
            states.append({name: value.clone() for name, value in model.state_dict().items()})
        found.append(states)
        if number == 38:
            continue
        if number == 39:  # the rate of the first group falls by itself
            rates, own, update = {}, model.groups[0].conv1.weight, step.optimizer.update
            step.optimizer.update = lambda filters, grads, buffers, lr, momentum: (
                rates.update({filters[0] is own: float(lr)}), update(filters, grads, buffers, lr, momentum))
            step.optimizer.reset([2, 9, 9, 1, 9])
            step(False, 20, True)
            step(False, 20, True)
            peak = module.HYP["muon_lr"]
            assert rates == {True: pytest.approx(0.05 * peak), False: pytest.approx(8 / 9 * peak)}
        monkeypatch.setitem(module.HYP, "epochs", 4.5)
        monkeypatch.setitem(module.HYP, "freeze", 3)
        step.eager, step.optimizer.reset = lambda *flags, taken=taken: taken.append(flags), falls.extend
        module.train(step, part, part, run=0, seed=0)
        assert taken == [(True, 20, True)] * 5 + [(False, 20, True)] * 5 + [(False, 24, True)] * 5 + [
            (False, 28, False)] * (3 + 2)
        assert falls == pytest.approx([0.2 * 5, 20, 20, 15, 20] if number == 39 else [0.2 * 5, 20, 20, 20])
        whole, less = (module.count_flops(model, True, False, 32, first) for first in (True, False))
        assert whole - less == 2 * 9 * 64 * (31 * 31 * 24 + 15 * 15 * 2 * 64 + 15 * 15 * 256)
    plain, *others = found
    for name, before in plain[3].items():
        stays = name.startswith("groups.0") and name.endswith(("conv1.weight", "conv2.weight", "bias"))
        assert not stays or not torch.equal(plain[4][name], before)
        for states in others:
            assert torch.allclose(states[3][name], before, atol=1e-6), name
            assert torch.allclose(states[4][name], before if stays else plain[4][name], atol=1e-6), name

def test_hard_images_give_the_final_statistics(monkeypatch):
    """The hardest quarter of the images, once each, and nothing but statistics; then comes the evaluation."""
    part, found, done = dict(images=images(80), labels=torch.arange(80) % 10), {}, []
    monkeypatch.setenv("TRITON_INTERPRET", "")
    for number in (38, 41):
        module, model = main(number), model_of(main(number))
        monkeypatch.setitem(module.HYP, "batch_size", 4)
        monkeypatch.setitem(module.HYP, "epochs", 1)
        monkeypatch.setattr(module, "autocast", lambda device: contextlib.nullcontext())
        found[number] = module.count_pflops(model, 80, 40)
    share = 5 * 4 * module.count_flops(model, False) / 1e15
    assert found[41][1] - found[38][1] == pytest.approx(share)
    assert found[41][0] - found[38][0] == pytest.approx(2 * 119.25e6 * 5 * 4 / 1e15)
    loader = module.CifarLoader(part["images"])
    loader.losses.copy_(torch.randperm(80))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slow, shown = {name: value for name, value in before.items() if "running" in name}, []
    def follow(name):
        def hook(norm, args):
            moments = args[0].mean((0, 2, 3)), args[0].var((0, 2, 3))
            for key, value in zip(("running_mean", "running_var"), moments):
                slow[f"{name}.{key}"] = 0.5566 * slow[f"{name}.{key}"] + 0.4434 * value
        return hook
    hooks = [layer.register_forward_pre_hook(follow(name)) for name, layer in model.named_modules()
             if isinstance(layer, module.BatchNorm)]
    hooks.append(model.register_forward_pre_hook(lambda _, args: shown.append((args[0].shape, loader.shown))))
    module.recalibrate(model.eval(), loader)
    assert [shape for shape, _ in shown] == [(4, 3, 32, 32)] * 5 and len(slow) == 12
    hardest = loader.losses.topk(20).indices.sort().values
    assert torch.equal(torch.cat([each for _, each in shown]).sort().values, hardest)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, slow[name], atol=1e-5) if name in slow else (
            "batches" in name or torch.equal(value, before[name])), name
        assert name not in slow or not torch.allclose(value, before[name], atol=1e-3), name
    for hook in hooks:
        hook.remove()
    def note(name, call):
        return lambda *args, **kwargs: (done.append((name, kwargs.get("views"))), call(*args, **kwargs))[1]
    for name in ("recalibrate", "evaluate"):
        monkeypatch.setattr(module, name, note(name, getattr(module, name)))
    module.train(module.Step(model, part), part, part, run=0, seed=0)
    assert done == [("evaluate", 1), ("recalibrate", None), ("evaluate", 6)]

def test_next_batch_is_ready_before_the_last_updates(monkeypatch):
    """And passes the stem there once that is frozen; with the losses and accuracy of main43."""
    found, part = [], main(0).draw_synthetic(80, 1)
    monkeypatch.setenv("TRITON_INTERPRET", "")
    for number in (43, 44):
        module, done, seen = main(number), [], []
        monkeypatch.setitem(module.HYP, "batch_size", 8)
        monkeypatch.setitem(module.HYP, "epochs", 4.5)
        step = module.Step(model_of(module), part)
        note = lambda what, call: lambda self, *rest: (done.append((what, *rest)), call(self, *rest))[1]
        monkeypatch.setattr(module.CifarLoader, "next", note("next", module.CifarLoader.next))
        monkeypatch.setattr(module.Muon, "step", note("update", module.Muon.step))
        step.model.register_forward_pre_hook(
            lambda model, args: seen.append((args[1], *args[0].shape[1:3])) if model.training else None)
        with contextlib.redirect_stdout(None):
            result = module.train(step, part, part, run=0, seed=7)
        found.append((result["acc"], result["epochs"]))
        steps, sizes = (10, 10, 10, 6, 3), (20, 20, 24, 28, 28)
        if number == 43:
            continue
        assert seen == sum(([(not i, 24 - 21 * (not i), size - (i > 0))] * n
                            for i, (n, size) in enumerate(zip(steps, sizes))), [])
        assert done == sum(([("next", size), *[("next", size), ("update",)] * n]
                            for n, size in zip(steps, sizes)), [])
    assert found[0] == found[1]

def test_records_are_of_scripts_shown_to_be_at_94_percent(monkeypatch):
    """On a GPU by the test at 1 %, on a CPU by the mean of three or more, none below 93.6 %; or before it."""
    def pools(*accs):
        line = dict(times=[1.0], mark="", device="cpu", cpu="C", cpu_threads=1, torch="0")
        parts = {MAINS[9]: [0.95, 0.951, 0.951], MAINS[test_airbench.LAST]: accs}
        return lambda lines, path, *_: path in parts and dict(line, accs=parts[path], n=len(parts[path]))
    for accs, gpu, cpu in (((0.941, 0.9415, 0.942), 9, test_airbench.LAST), ((0.9405, 0.9415), 9, 9),
                           ((0.9399, 0.94, 0.94), 9, 9), ((0.9359, 0.944, 0.944), 9, 9),
                           ((0.94, 0.9402) * 9, test_airbench.LAST, test_airbench.LAST)):
        monkeypatch.setattr(test_airbench, "pool", pools(*accs))
        assert [row[1] for row in test_airbench.record_rows()[-2:]] == [
            f"`{MAINS[number].name}`" for number in (gpu, cpu)]

def test_times_are_compared_within_one_go():
    """Of two lines of a script, that which ended nearest to the other script's counts; ten runs at least."""
    def line(seconds, utc, n=10):
        return dict(utc=utc, runs=[dict(time_seconds=seconds + i / 100) for i in range(n)])
    old = dict(lines=[line(2, "2026-11-26T09:00:00Z"), line(3, "2026-11-27T01:00:00Z")])
    new = dict(lines=[line(1, "2026-11-26T23:30:00Z")])
    assert welch(new, old).startswith("-2.000 [-2.0") and welch(new, old, 1 / 60).startswith("-0.033 [")
    assert welch(dict(lines=[line(1, "2026-11-26T23:30:00Z", 9)]), old) == "not measured"
