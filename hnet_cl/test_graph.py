"""Checks of main13's step, which a GPU can replay as a graph."""
import contextlib, functools, types, unittest.mock

import pytest
from test_hnet_cl import CPU, GRAPH, WAYS, Operations, settings  # before torch: it has kernels interpreted
import torch

def step_of(net, task, device="cpu", graphed=False):
    """A step of main13 on 40 images, and what draws for step number i"""
    torch.manual_seed(0)
    with torch.device(device):
        model, stats, sums = GRAPH.Model(net), GRAPH.fresh_stats(net), torch.zeros(4)
        part = torch.arange(122880).remainder(251).byte().view(40, 3, 32, 32), torch.arange(40) % 2
        kept, optimizer = GRAPH.take_reference(net, model, task), GRAPH.make_optimizer(model)
    drawn = lambda i: (*next(GRAPH.plan(40, 0, task, i, i + 1, CPU))[1:], GRAPH.draw_tasks(task, 0, i, CPU),
                       GRAPH.draw_noise(net, GRAPH.HYP["train_sample_size"], CPU, i))
    return GRAPH.Step(net, model, stats, task, part, kept, optimizer, sums, graphed), drawn

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
def test_no_step_waits_for_the_host(values, monkeypatch):
    """A loss on tensors of a GPU that there is not, which hold nothing, takes none from the host. On the CPU,
    with backward and update: no number is read, and more tasks, samples and chunks are no more operations."""
    fake = torch._subclasses.FakeTensorMode()
    with settings(GRAPH, batch_size=8, **values), fake, monkeypatch.context() as patch:
        update, drawn = step_of(GRAPH.main_net("cuda"), 3, "cuda")
        update.optimizer = unittest.mock.MagicMock(param_groups=[])
        patch.setattr(GRAPH, "image_scale", functools.cache(GRAPH.image_scale.__wrapped__))
        patch.setattr(torch.Tensor, "backward", lambda loss: [
            setattr(p, "grad", torch.zeros_like(p)) for p in update.fixed[1].parameters()])
        update(1e-3, *(x.to("cuda") for x in drawn(0)))
        with Operations() as seen:
            update.eager()
        assert seen.devices == {"cuda"} and len(seen.names) > 100
    counts, chunk = set(), values.get("chmlp_chunk_size", 200)
    for task, more in ((2, {}), (4, dict(train_sample_size=3, chmlp_chunk_size=chunk // 2))):
        with settings(GRAPH, **dict(values, batch_size=8, **more)) as net:
            update, drawn = step_of(net, task)
            update(1e-3, *drawn(0))
            with Operations() as seen:
                update(1e-3, *drawn(1))
        assert not {"_local_scalar_dense", "nonzero"} & {*seen.names}
        counts.add(len(seen.names))
    assert len(counts) == 1, counts
