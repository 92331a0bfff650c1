"""MSAM: weights that are moved out between steps, and come back exactly when they are looked at or saved."""

from __future__ import annotations

import collections
import contextlib
import copy

import pytest
import torch

from sam_cases import BASES, assert_bitwise, copies, make_batch, make_closure, make_model
from sam_core import MSAM


@pytest.fixture(params=BASES)
def base(request):
    return request.param


def make(model, base, **options):
    return MSAM(model.parameters(), BASES[base][0], **{"rho": 0.2, **BASES[base][1], **options})


def train(model, optimizer, num_steps):
    """The loop of a plain optimizer."""
    for _ in range(num_steps):
        optimizer.zero_grad()
        make_closure(model)()
        optimizer.step()


def test_plain_loop_closure_and_scaler_agree(base):
    results = []
    for form in ("plain", "closure", "grads_ready", "scaler"):
        model = make_model()
        optimizer = make(model, base)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(4):
            if form == "closure":
                assert optimizer.step(make_closure(model)) > 0
                continue
            optimizer.zero_grad()
            make_closure(model, scaler=scaler if form == "scaler" else None)()
            if form == "plain":
                optimizer.step()
            elif form == "grads_ready":
                assert optimizer.step(make_closure(model), grads_ready=True) is None
            else:
                scaler.step(optimizer)
                scaler.update()
        results.append(copies(model))
    for other in results[1:]:
        assert_bitwise(other, results[0])


def test_at_weights_gives_w_and_goes_back(base):
    model = make_model()
    optimizer = make(model, base)
    train(model, optimizer, 3)
    moved = copies(model)
    with optimizer.at_weights():
        clean = copies(model)
        with optimizer.at_weights():
            assert_bitwise(copies(model), clean)
        assert_bitwise(copies(model), clean)
        with pytest.raises(RuntimeError, match=r"^step must be called outside at_weights\(\), after train\(\)"):
            optimizer.step(make_closure(model))
    assert_bitwise(copies(model), moved)
    with pytest.raises(KeyError), optimizer.at_weights():
        raise KeyError
    assert_bitwise(copies(model), moved)
    distance = torch.cat([(m - c).flatten() for m, c in zip(moved, clean, strict=True)]).norm()
    torch.testing.assert_close(distance.item(), 0.2, rtol=1e-10, atol=0)


def test_at_weights_within_an_autocast_region(base):
    """Its cache of cast weights must follow the moves."""
    model = make_model(torch.float32)
    optimizer, inputs = make(model, base, rho=2.0), make_batch(dtype=torch.float32)[0]
    optimizer.step(make_closure(model, make_batch(dtype=torch.float32)))
    fresh = []
    for context in (contextlib.nullcontext, optimizer.at_weights):
        with context(), torch.autocast("cpu", torch.bfloat16):
            fresh.append(model(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model(inputs)]
        with optimizer.at_weights():
            outputs.append(model(inputs))
        outputs.append(model(inputs))
    assert_bitwise(outputs, [*fresh, fresh[0]])
    assert not torch.equal(*fresh)


def test_first_step_is_the_base_optimizers(base):
    model, plain = make_model(), make_model()
    optimizer = make(model, base)
    train(model, optimizer, 1)
    train(plain, BASES[base][0](plain.parameters(), **BASES[base][1]), 1)
    with optimizer.at_weights():
        assert_bitwise(copies(model), copies(plain))


@pytest.mark.parametrize("saved", ["inside", "outside", "model outside, optimizer inside"])
@pytest.mark.parametrize("loaded", ["inside", "outside"])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("target", ["fresh", "used", "same"])
def test_resume_is_exact(base, saved, loaded, order, target):
    """Moved weights are never taken for clean ones."""
    model = make_model()
    optimizer = make(model, base)
    train(model, optimizer, 3)

    model_state = copy.deepcopy(model.state_dict())
    with optimizer.at_weights() if "inside" in saved else contextlib.nullcontext():
        optimizer_state = copy.deepcopy(optimizer.state_dict())
        if saved == "inside":
            model_state = copy.deepcopy(model.state_dict())
    train(model, optimizer, 3)
    expected = copies(model)

    other = model if target == "same" else make_model()
    resumed = optimizer if target == "same" else make(other, base, lr=123.0 if target == "fresh" else 0.05)
    if target == "used":
        train(other, resumed, 2)
    loads = [lambda: other.load_state_dict(model_state), lambda: resumed.load_state_dict(optimizer_state)]
    with resumed.at_weights() if loaded == "inside" else contextlib.nullcontext():
        for load in loads if order == "model first" else loads[::-1]:
            load()
    train(other, resumed, 3)
    assert_bitwise(copies(other), expected)
    with optimizer.at_weights(), resumed.at_weights():
        assert_bitwise(copies(other), copies(model))


def test_weights_written_from_outside_are_clean_ones():
    model, written = make_model(), make_model()
    optimizer = make(model, "sgd")
    train(model, optimizer, 2)
    model.load_state_dict(written.state_dict())
    with optimizer.at_weights():
        assert_bitwise(copies(model), copies(written))
    assert not torch.equal(copies(model)[0], copies(written)[0])
    with optimizer.at_weights():
        model[0].bias.data.fill_(3.0)
    with optimizer.at_weights():
        assert (model[0].bias == 3).all()


def test_copies_train_on(base):
    model = make_model()
    optimizer = make(model, base)
    train(model, optimizer, 2)
    other_model, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    train(other_model, other, 2)
    assert_bitwise(copies(other_model), copies(model))


def test_plain_checkpoint_of_the_base_optimizer_resumes(base):
    """From a run without MSAM: its weights are the clean ones."""
    model = make_model()
    plain = BASES[base][0](model.parameters(), **BASES[base][1])
    train(model, plain, 2)
    other = make_model()
    other.load_state_dict(model.state_dict())
    optimizer = make(other, base)
    optimizer.load_state_dict(plain.state_dict())
    with optimizer.at_weights():
        assert_bitwise(copies(other), copies(model))
    assert not torch.equal(copies(other)[0], copies(model)[0])


def test_weight_decay_is_taken_at_the_clean_weights():
    model = make_model()
    optimizer = make(model, "sgd", rho=5.0, lr=0.1, weight_decay=0.5, momentum=0.5)
    train(model, optimizer, 2)
    with optimizer.at_weights():
        clean = copies(model)
    old = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    optimizer.zero_grad()
    make_closure(model)()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    with optimizer.at_weights():
        for w, v, g, param in zip(clean, old, grads, model.parameters(), strict=True):
            torch.testing.assert_close(param.detach(), w - 0.1 * (0.5 * v + g + 0.5 * w), rtol=1e-12, atol=1e-14)


def test_rho_may_rise_from_zero_and_fall_to_it():
    model = make_model()
    optimizer = make(model, "sgd", rho=0.0)
    for rho, distance in ((0.0, 0.0), (0.4, 0.4), (0.1, 0.1), (0.0, 0.0)):
        optimizer.param_groups[0]["rho"] = rho
        train(model, optimizer, 1)
        moved = copies(model)
        with optimizer.at_weights():
            clean = copies(model)
        actual = torch.cat([(m - c).flatten() for m, c in zip(moved, clean, strict=True)]).norm()
        torch.testing.assert_close(actual.item(), distance, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"base": "adamw", "betas": (0.0, 0.9)}, {"base": "adagrad"}])
def test_a_momentum_is_needed(options):
    base = options.pop("base", "sgd")
    kind = torch.optim.Adagrad if base == "adagrad" else BASES[base][0]
    with pytest.raises(
        ValueError, match=r"^base_optimizer must have a momentum, e\.g\. SGD with momentum=0\.9, got none"
    ):
        MSAM(make_model().parameters(), kind, lr=0.1, **options)
    model = make_model()
    MSAM(model.parameters(), kind, rho=0.0, lr=0.1, **options).step(make_closure(model))  # the base optimizer


def test_a_momentum_that_is_kept_elsewhere_is_refused(base):
    """It would train as the base optimizer, without a word."""

    class Wrapped(BASES[base][0]):
        """As ZeroRedundancyOptimizer, whose state is that of an optimizer inside."""

        def step(self, closure=None):
            super().step(closure)
            self.hidden, self.state = self.state, collections.defaultdict(dict)

    model = make_model()
    optimizer = MSAM(model.parameters(), Wrapped, **BASES[base][1])
    make_closure(model)()
    with pytest.raises(
        ValueError,
        match=r"^base_optimizer must keep its momentum in its state, as momentum_buffer or exp_avg, got Wrapped with ",
    ):
        optimizer.step()


def test_eval_and_train_are_the_block_for_loops_that_are_not_one(base):
    """What Hugging Face's Trainer and accelerate call; again is the same as once."""
    model = make_model()
    optimizer = make(model, base)
    train(model, optimizer, 3)
    moved = copies(model)
    with optimizer.at_weights():
        clean = copies(model)
    for _ in range(2):
        optimizer.eval()
        assert_bitwise(copies(model), clean)
    with optimizer.at_weights():
        assert_bitwise(copies(model), clean)
    assert_bitwise(copies(model), clean)
    with pytest.raises(RuntimeError, match=r"^step must be called outside at_weights\(\), after train\(\)"):
        optimizer.step()
    for _ in range(2):
        optimizer.train()
        assert_bitwise(copies(model), moved)
