"""nonfinite="ignore": the same steps, without one look at a value."""

from __future__ import annotations

import pytest
import torch

from sam_cases import BASES, METHODS, assert_bitwise, copies, make_batch, make_closure, make_model

WAITLESS = ["sam", "asam", "wsam", "wsam_coupled", "friendlysam", "momentumsam", "memoryefficientsam"]


class NoLooking(torch.overrides.TorchFunctionMode):
    """Fails where Python asks a tensor for its value."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        looks = {torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.tolist}
        assert function not in looks, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_it_steps_as_ever(method, base):
    results = []
    for nonfinite in ("raise", "ignore"):
        model = make_model()
        optimizer = METHODS[method](
            model.parameters(), BASES[base][0], nonfinite=nonfinite, max_grad_norm=0.2, **BASES[base][1]
        )
        for _ in range(4):
            optimizer.step(make_closure(model, method=method))
        with optimizer.at_weights():
            results.append(copies(model))
    for ignoring, raising in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ignoring, raising, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("method", WAITLESS)
def test_no_value_is_looked_at(method):
    model = make_model()
    optimizer = METHODS[method](model.parameters(), torch.optim.SGD, nonfinite="ignore", max_grad_norm=0.2, lr=0.1)
    with NoLooking():
        for _ in range(2):
            optimizer.step(make_closure(model))
    raising = METHODS[method](model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(AssertionError, match=r"item|bool|float"), NoLooking():
        raising.step(make_closure(model))


@pytest.mark.parametrize("method", WAITLESS)
def test_a_zero_gradient_moves_nothing(method):
    model = make_model()
    before = copies(model)
    optimizer = METHODS[method](model.parameters(), torch.optim.SGD, nonfinite="ignore", lr=0.1)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.first_step()
        assert_bitwise(copies(model), before)
        optimizer.second_step()
    assert_bitwise(copies(model), before)


def test_a_scaler_still_skips():
    model = make_model(torch.float32)
    optimizer = METHODS["sam"](model.parameters(), torch.optim.SGD, nonfinite="ignore", lr=0.1)
    before, scaler = copies(model), torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def overflowing():
        loss = make_closure(model, make_batch(dtype=torch.float32), scaler=scaler)()
        model[0].weight.grad = torch.full_like(model[0].weight, torch.inf)
        return loss

    optimizer.step(overflowing, grad_scaler=scaler)
    scaler.update()
    assert optimizer.num_skipped == 1
    assert scaler.get_scale() == 2.0**15
    assert_bitwise(copies(model), before)
