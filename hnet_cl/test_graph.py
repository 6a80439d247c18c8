"""Checks of main13's step, which a GPU can replay as a graph, and of main14's, which is one of all seeds."""
import contextlib, functools, types, unittest.mock

import pytest
from test_hnet_cl import (  # before torch: it has kernels interpreted
    CPU, GRAPH, SEEDS, WAYS, Operations, close, settings)
import torch

def step_of(net, task, device="cpu", graphed=False, seed=0):
    """A step of main13 on 40 images, or of main14 where there are several seeds; what draws for step i"""
    seeds, module = (seed, SEEDS) if isinstance(seed, list) else ([seed], GRAPH)
    torch.manual_seed(seeds[0])
    with torch.device(device):
        model, stats, sums = module.Model(net), module.fresh_stats(net), torch.zeros(4)
        if module is SEEDS:
            model, sums = SEEDS.seeded(net, seeds), sums.repeat(len(seeds), 1)
            stats = stats.repeat(len(seeds), 1, 1, 1)
        part = torch.arange(122880).remainder(251).byte().view(40, 3, 32, 32), torch.arange(40) % 2
        kept = (GRAPH.take_reference if module is GRAPH else SEEDS.references)(net, model, task)
        optimizer = module.make_optimizer(model)
    def drawn(i):
        samples = module.HYP["train_sample_size"]
        parts = [(*next(module.plan(40, seed, task, i, i + 1, CPU))[1:],
                  module.draw_tasks(task, seed, i, CPU), module.draw_noise(net, samples, CPU, seed, i))
                 for seed in seeds]
        return parts[0] if module is GRAPH else [torch.stack(part) for part in zip(*parts)]
    return module.Step(net, model, stats, task, part, kept, optimizer, sums, graphed), drawn

@pytest.mark.parametrize("values", WAYS)
def test_capturing_leaves_no_trace(values):
    """Captured at the start of a task or within it, steps are bit for bit those without a graph. In place of
    graphs of a GPU: what is captured is not done, but is at each replay."""
    @contextlib.contextmanager
    def capture(graph):
        before = [x.detach().clone() for x in other.changing()]
        yield
        [x.data.copy_(old) for x, old in zip(other.changing(), before, strict=True)]
    fakes = unittest.mock.patch.multiple(
        torch.cuda, Stream=unittest.mock.Mock(), current_stream=unittest.mock.Mock(), graph=capture,
        stream=contextlib.nullcontext, CUDAGraph=lambda: types.SimpleNamespace(replay=other.eager))
    with settings(GRAPH, hnet_reg_batch_size=2, batch_size=8, **values) as net, fakes:
        (one, drawn), (other, _), places = step_of(net, 3), step_of(net, 3, graphed=True), set()
        for i in range(4):
            other.graph = other.graph if i != 2 else None
            one(10.0 ** -i, *drawn(i)), other(10.0 ** -i, *drawn(i))
            assert all(torch.equal(a, b) for a, b in zip(one.changing(), other.changing(), strict=True)), i
            places.add(tuple(x.data_ptr() for x in other.changing() + other.drawn))
        assert len(places) == 1 and other.calls == 12 and other.optimizer.param_groups[0]["lr"] is other.lr

@pytest.mark.parametrize("values", [
    *WAYS, dict(WAYS[0], use_cond_chunk_embs=True, hmlp_arch="5"), dict(WAYS[2], regularizer="fkl"),
    dict(WAYS[0], hnet_type="structured_hmlp", chunk_emb_size="0,0,8,8,8,0", shmlp_gcd_chunking=True),
    dict(heuristic_kernel=True, full_support_perturbation=0.1)])
@pytest.mark.parametrize("seeds", [0, [0, 1]])
def test_no_step_waits_for_the_host(values, seeds, monkeypatch):
    """A loss on tensors of a GPU that there is not, which hold nothing, takes none from the host. On the CPU,
    with backward and update: no number is read, and more tasks, samples, chunks and seeds are no more
    operations."""
    fake, module = torch._subclasses.FakeTensorMode(), SEEDS if seeds else GRAPH
    with settings(module, batch_size=8, **values), fake, monkeypatch.context() as patch:
        update, drawn = step_of(module.main_net("cuda"), 3, "cuda", seed=seeds)
        update.optimizer = unittest.mock.MagicMock(param_groups=[])
        patch.setattr(module, "image_scale", functools.cache(module.image_scale.__wrapped__))
        patch.setattr(torch.Tensor, "backward", lambda loss: [
            setattr(p, "grad", torch.zeros_like(p)) for p in update.fixed[1].parameters()])
        update(1e-3, *(x.to("cuda") for x in drawn(0)))
        with Operations() as seen:
            update.eager()
        assert seen.devices == {"cuda"} and not seen.moves and len(seen.names) > 100
        assert seen.numbers <= {"cuda"} or seeds  # those of the text have no dimension under vmap
    counts, chunk = set(), values.get("chmlp_chunk_size", 200)
    for task, more in ((2, {}), (4, dict(train_sample_size=3, chmlp_chunk_size=chunk // 2))):
        with settings(module, **dict(values, batch_size=8, **more)) as net:
            update, drawn = step_of(net, task, seed=seeds and [*range(task)])
            first, second = drawn(0), drawn(1)
            update(1e-3, *first)
            with Operations() as seen:
                update(1e-3, *second)
        assert not {"_local_scalar_dense", "nonzero"} & {*seen.names}
        counts.add(len(seen.names))
    assert len(counts) == 1, counts

@pytest.fixture
def double():
    """fp64 as the type of whatever is made"""
    torch.set_default_dtype(torch.float64)
    GRAPH.image_scale.cache_clear(), SEEDS.image_scale.cache_clear()
    yield
    torch.set_default_dtype(torch.float32)
    GRAPH.image_scale.cache_clear(), SEEDS.image_scale.cache_clear()

@pytest.mark.parametrize("values", [
    *WAYS, dict(WAYS[0], use_cond_chunk_embs=True, hmlp_arch="5", clip_grad_norm=0.1), dict(
        WAYS[2], regularizer="w2", calc_hnet_reg_targets_online=True, disable_data_augmentation=False),
    dict(WAYS[0], hnet_type="structured_hmlp", chunk_emb_size="0,0,8,8,8,0", shmlp_gcd_chunking=True,
         calc_hnet_reg_targets_online=True, no_bias=True),
    dict(net_type="wrn", no_bias=True, wrn_block_depth=1, wrn_widening_factor=1, allow_over_budget=True),
    dict(heuristic_kernel=True, full_support_perturbation=0.1, ssge_sample_size=3),
    dict(thr_ssge_eigenvals=0.9, clip_grad_norm=1.0), dict(num_ssge_eigenvals=2)])
def test_seeds_side_by_side_are_those_of_main13(values, double):
    """Three steps of a late task, in fp64: parameters, moments of Adam, statistics and sums of the terms.
    (With biases, whose gradient is 0 before a batch norm, Adam makes steps of what rounding leaves of it.)"""
    values = dict(values, hnet_reg_batch_size=2, batch_size=8)
    with settings(GRAPH, **values) as net, settings(SEEDS, **values):
        both, drawn = step_of(net, 3, seed=[4, 9])
        for number, seed in enumerate((4, 9)):
            one, draws = step_of(net, 3, seed=seed)
            for i in range(3):
                one(1e-3, *draws(i))
                number or both(1e-3, *drawn(i))
            for ours, theirs in zip(both.changing(), one.changing(), strict=True):
                close(ours[number] if ours.ndim else ours, theirs, 1e-6)
        assert not torch.equal(both.fixed[2][0], both.fixed[2][1])
        lone = SEEDS.one_seed(both.fixed[1], 1)
        close(lone(2), one.fixed[1](2), 1e-6)
