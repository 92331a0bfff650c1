"""Arithmetic over DTensors, each rank's part in turn in one process, against whole float64 tensors cut by hand."""

from __future__ import annotations

import itertools
import math
import sys
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sam_cases import true_perturbation
from sam_core import SAM, AdaptiveAscent, EfficientSAM, L2Ascent, _dtensors, _tensors, compute_perturbation, perturb
from sam_core.ascent import find_moves
from sam_core.weights import restore

SHAPES = [(5, 4), (1,), (3, 1, 2), (4, 6), (2, 2)]
PLACEMENTS = {  # of a mesh; None is a plain tensor; shards of uneven and of no rows
    (2,): [(Shard(0),), (Shard(0),), (Replicate(),), (Shard(1),), None],
    (4,): [(Shard(0),), (Shard(0),), (Shard(2),), (Replicate(),), None],
    (2, 2): [
        (Replicate(), Shard(0)),
        (Replicate(), Shard(0)),
        (Replicate(), Replicate()),
        (Replicate(), Shard(1)),
        None,
    ],
    (2, 3): [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(0), Replicate()), (Shard(1), Shard(0)), None],
}


@contextmanager
def process_group(rank: int, num_ranks: int):
    """A group of one real process, or one of several whose collectives do nothing."""
    backend, store = ("gloo", dist.HashStore()) if num_ranks == 1 else ("fake", FakeStore())
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def mesh():
    """One rank, whose collectives are real."""
    with process_group(0, 1):
        yield init_device_mesh("cpu", (1,))


def cut(whole, mesh, placements):
    """What this rank holds of a tensor."""
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            parts = whole.chunk(mesh.size(dim), placement.dim)
            place = mesh.get_local_rank(dim)
            whole = parts[place] if place < len(parts) else parts[0].narrow(placement.dim, 0, 0)
    return whole.clone()


def split(tensors, mesh, placements):
    return [
        tensor.clone()
        if kind is None
        else DTensor.from_local(
            cut(tensor, mesh, kind), mesh, kind, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
        for tensor, kind in zip(tensors, placements, strict=True)
    ]


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def each_rank(shape):
    for rank in range(math.prod(shape)):
        with process_group(rank, math.prod(shape)):
            yield init_device_mesh("cpu", shape)


# A sum over ranks is the sum of their parts, since these collectives do nothing ---------------------------------------


@pytest.mark.parametrize("shape", PLACEMENTS, ids=str)
def test_each_entry_is_counted_on_one_rank(shape):
    left, right = draw(0), draw(1)
    plain = sum(float((tensor**2).sum()) for tensor, kind in zip(left, PLACEMENTS[shape], strict=True) if kind is None)
    squares, products = [], []
    dims = [dim for dim in range(len(shape)) if any(kind and kind[dim].is_shard() for kind in PLACEMENTS[shape])]
    for mesh in each_rank(shape):
        if any(mesh.get_local_rank(dim) > 0 for dim in set(range(len(shape))) - set(dims)):
            continue  # a replica that sums on its own
        xs, ys = (split(tensors, mesh, PLACEMENTS[shape]) for tensors in (left, right))
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            squares.append(float(_tensors.norm(xs)) ** 2 - plain)
        assert all_reduce.call_count == len(dims)  # for the whole list
        products.append(_tensors.dot(xs[:-1], ys[:-1]))
    expected = sum(float((x**2).sum()) for x in left) - plain
    assert sum(squares) == pytest.approx(expected, rel=1e-12)
    products_by_hand = sum(float((x * y).sum()) for x, y in zip(left[:-1], right[:-1], strict=True))
    assert sum(products) == pytest.approx(products_by_hand, rel=1e-12)


OPERATIONS = {
    "scale": (lambda xs, ys: _tensors.scale(xs, 1.5), lambda x, y: 1.5 * x),
    "multiply": (_tensors.multiply, torch.mul),
    "clone": (lambda xs, ys: _tensors.clone(xs), lambda x, y: x),
    "absolute": (lambda xs, ys: _tensors.absolute(xs), lambda x, y: x.abs()),
    "shift_": (lambda xs, ys: _tensors.shift_(xs, 0.5), lambda x, y: x + 0.5),
    "scale_": (lambda xs, ys: _tensors.scale_(xs, 1.5), lambda x, y: 1.5 * x),
    "scale_ by a tensor": (lambda xs, ys: _tensors.scale_(xs, torch.tensor(1.5)), lambda x, y: 1.5 * x),
    "add_": (lambda xs, ys: _tensors.add_(xs, ys, alpha=0.5), lambda x, y: x + 0.5 * y),
    "add_ a tensor times": (lambda xs, ys: _tensors.add_(xs, ys, alpha=torch.tensor(0.5)), lambda x, y: x + 0.5 * y),
    "lerp_": (lambda xs, ys: _tensors.lerp_(xs, ys, 0.25), lambda x, y: x + 0.25 * (y - x)),
    "copy_": (_tensors.copy_, lambda x, y: y),
}


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("shape", PLACEMENTS, ids=str)
def test_entrywise_operations_keep_the_split_and_do_not_communicate(shape, foreach):
    left, right, original = draw(0), draw(1), _tensors._apply
    for mesh in each_rank(shape):
        for name, (operation, by_hand) in OPERATIONS.items():
            xs, ys = (split(tensors, mesh, PLACEMENTS[shape]) for tensors in (left, right))
            pointers = [x.to_local().data_ptr() if isinstance(x, DTensor) else x.data_ptr() for x in xs]
            with mock.patch.object(_tensors, "_apply", lambda *a, **k: original(*a, **{**k, "foreach": foreach})):
                results = operation(xs, ys)
            if name.split()[0].endswith("_"):
                assert results is None
                assert pointers == [x.to_local().data_ptr() if isinstance(x, DTensor) else x.data_ptr() for x in xs]
                results = xs
            expected = split(list(map(by_hand, left, right)), mesh, PLACEMENTS[shape])
            for actual, wanted in zip(results, expected, strict=True):
                assert type(actual) is type(wanted)
                assert actual.shape == wanted.shape
                if isinstance(actual, DTensor):
                    assert actual.placements == wanted.placements
                    actual, wanted = actual.to_local(), wanted.to_local()
                torch.testing.assert_close(actual, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("eta", [None, 0.1])
def test_perturbation_and_way_back(mesh, eta, wait):
    params, grads = draw(0), draw(1)
    kinds = [*[(Shard(0),)] * 4, None]
    ws, gs = split(params, mesh, kinds), split(grads, mesh, kinds)
    rule = L2Ascent(rho=0.3) if eta is None else AdaptiveAscent(rho=0.3, eta=eta)
    (move,) = find_moves([rule], [gs], [ws], wait=wait)
    assert isinstance(move.factor, float if wait else torch.Tensor)
    backup = perturb(move.params, move.directions, alpha=move.factor)
    expected = [w + e for w, e in zip(params, true_perturbation(params, grads, 0.3, eta), strict=True)]
    for actual, wanted, copy, kind in zip(ws, expected, backup, kinds, strict=True):
        torch.testing.assert_close(actual.full_tensor() if kind else actual, wanted, rtol=1e-12, atol=1e-14)
        assert isinstance(copy, DTensor) == (kind is not None)
    restore(ws, backup)
    for actual, wanted, kind in zip(ws, params, kinds, strict=True):
        torch.testing.assert_close(actual.full_tensor() if kind else actual, wanted, rtol=0, atol=0)


# Norms of all sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e25])
def test_norm_is_safe_at_both_ends_of_the_range(mesh, size):
    whole = [torch.tensor([3.0, 0.0]) * size, torch.tensor([4.0]) * size, torch.zeros(0)]
    norm = _tensors.norm(split(whole, mesh, [(Shard(0),), None, (Shard(0),)]))
    torch.testing.assert_close(norm, torch.tensor(5.0) * size, rtol=1e-5, atol=2e-45)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norm_of_a_bad_entry_is_not_finite(mesh, bad):
    assert not _tensors.norm(split([torch.ones(3), torch.tensor([bad])], mesh, [(Shard(0),)] * 2)).isfinite()


def test_norm_of_zeros_and_of_nothing_is_zero(mesh):
    for whole in (torch.zeros(3), torch.zeros(0)):
        assert _tensors.norm(split([whole], mesh, [(Shard(0),)])) == 0


def test_tensors_of_several_meshes_and_summands(mesh):
    other = init_device_mesh("cpu", (1, 1))
    whole = draw(0)
    kinds = [
        (mesh, (Shard(0),)),
        (other, (Replicate(), Shard(0))),
        (mesh, (Partial(),)),
        (other, (Shard(0), Partial())),
    ]
    tensors = [DTensor.from_local(x, m, kind) for x, (m, kind) in zip(whole, kinds, strict=False)]
    expected = sum(float((x**2).sum()) for x in whole[:4])
    assert float(_tensors.norm(tensors)) == pytest.approx(expected**0.5, rel=1e-12)
    assert _tensors.dot(tensors, tensors) == pytest.approx(expected, rel=1e-12)


def test_tensors_that_are_split_differently_are_brought_together(mesh):
    (x, *_), (y, *_) = draw(0), draw(1)
    for left, right in itertools.product([Shard(0), Shard(1), Replicate()], repeat=2):
        xs, ys = split([x], mesh, [(left,)]), split([y], mesh, [(right,)])
        assert _tensors.dot(xs, ys) == pytest.approx(float((x * y).sum()), rel=1e-12)
        _tensors.add_(xs, ys)
        assert xs[0].placements == (left,)
        torch.testing.assert_close(xs[0].full_tensor(), x + y, rtol=1e-14, atol=0)


# Without a look at values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-22, 1.0, 1e25])
@pytest.mark.parametrize("maximize", [False, True])
def test_factor_that_nobody_waits_for(dtype, size, maximize):
    """rho / ||g||; where the square leaves the range of the dtype the step is shorter, or up to a quarter longer."""
    grad = torch.tensor([3.0, -4.0], dtype=torch.float64).mul(size).to(dtype)
    (move,) = find_moves([L2Ascent(rho=0.05, maximize=maximize)], [[grad]], [[grad]], wait=False)
    (step,) = _tensors.scale(_tensors.wide(move.directions), move.factor)
    if size == 1.0 or (dtype == torch.float64 and size != 0):
        wanted = torch.tensor([0.03, -0.04]).to(step.dtype) * (-1 if maximize else 1)
        torch.testing.assert_close(step, wanted, rtol=1e-6, atol=0)
    assert step.isfinite().all()
    assert step.norm() <= 0.05 * 1.25
    if size == 0:
        assert move.factor == 0


def test_factor_of_a_subnormal_norm_is_finite():
    grad = torch.tensor([3e-45, 4e-45])
    (move,) = find_moves([L2Ascent(rho=0.05)], [[grad]], [[grad]], norm=torch.tensor(5e-45), wait=False)
    assert move.factor.isfinite()


def test_moves_compile_into_one_graph():
    def ascend(params, grads):
        moves = find_moves(
            [L2Ascent(rho=0.1), AdaptiveAscent(rho=0.2)], [grads[:3], grads[3:]], [params[:3], params[3:]], wait=False
        )
        return [perturb(move.params, move.directions, alpha=move.factor) for move in moves]

    eager, compiled, grads = draw(0), draw(0), draw(1)
    ascend(eager, grads)
    torch.compile(ascend, backend="eager", fullgraph=True)(compiled, grads)
    torch.testing.assert_close(compiled, eager, rtol=1e-14, atol=0)


# What a rank cannot do ------------------------------------------------------------------------------------------------


def test_gathered_weights_are_given_up_when_their_shards_move(mesh):
    model = fully_shard(nn.Linear(3, 2), mesh=mesh)
    params, inputs = list(model.parameters()), torch.ones(4, 3)
    with torch.no_grad():
        model(inputs)
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        perturb(params, [torch.ones_like(p) for p in params])
        assert all(isinstance(p, DTensor) for p in model.parameters())
        torch.testing.assert_close(model(inputs), inputs @ params[0].full_tensor().T + params[1].full_tensor())


def test_gathered_weights_cannot_be_trained(mesh):
    model = fully_shard(nn.Linear(3, 2), mesh=mesh)
    with torch.no_grad():
        model(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"^params must be the shards .* call reshard\(\) of the FSDPLinear before"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    model.reshard()
    SAM(model.parameters(), torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("method", [SAM, EfficientSAM])
def test_no_context_for_a_rank_of_its_own(mesh, method):
    (param,) = split([torch.ones(2)], mesh, [(Shard(0),)])
    optimizer = method([nn.Parameter(param)], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"^ascent_context must be None for DTensors: each rank holds a part"):
        optimizer.step(lambda: None, ascent_context=torch.no_grad)


def test_clipping_reaches_dtensors_beside_plain_tensors(mesh):
    params = [nn.Parameter(tensor) for tensor in split(draw(0), mesh, [*[(Shard(0),)] * 4, None])]
    optimizer, grads = SAM(params, torch.optim.SGD, rho=0.0, lr=1.0, max_grad_norm=0.5), draw(1)

    def closure():
        for param, grad in zip(params, split(grads, mesh, [*[(Shard(0),)] * 4, None]), strict=True):
            param.grad = grad

    optimizer.step(closure)
    length = sum(float((grad**2).sum()) for grad in grads) ** 0.5
    for param, start, grad in zip(params, draw(0), grads, strict=True):
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        torch.testing.assert_close(whole.detach(), start - grad * 0.5 / (length + 1e-6), rtol=1e-12, atol=1e-14)


def test_without_torch_distributed_there_are_no_dtensors(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor")
    assert not _dtensors.is_dtensor(torch.ones(1))
    (group,) = compute_perturbation([L2Ascent(rho=1.0)], [[torch.tensor([3.0, 4.0])]], [[torch.zeros(2)]])
    assert (group[0] - torch.tensor([0.6, 0.8])).abs().max() < 1e-6  # assert_close would import it again
