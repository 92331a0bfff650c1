"""The two-step form and what holds it together, over every method that has it and two base optimizers."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from sam_cases import (
    BASES,
    METHODS,
    TWO_PASS,
    assert_bitwise,
    copies,
    make_batch,
    make_closure,
    make_model,
    method_class,
)
from sam_core.ascent import Move


@pytest.fixture(params=TWO_PASS)
def method(request):
    return request.param


@pytest.fixture(params=BASES)
def base(request):
    return request.param


@pytest.fixture
def build(method, base):
    """Builds the optimizer of this case over a model or parameters."""

    def build(params, **options):
        params = params.parameters() if isinstance(params, nn.Module) else params
        return METHODS[method](params, BASES[base][0], **{**BASES[base][1], **options})

    return build


# Forms ----------------------------------------------------------------------------------------------------------------


def test_both_forms_agree_bit_for_bit(build):
    results = []
    for form in ("closure", "grads_ready", "two_step", "two_step_zero_grad", "two_step_in_place"):
        model = make_model()
        optimizer, closure = build(model), make_closure(model)
        for _ in range(3):
            if form == "closure":
                optimizer.step(closure)
            elif form == "grads_ready":
                optimizer.zero_grad()
                closure()
                optimizer.step(closure, grads_ready=True)
            else:
                optimizer.zero_grad()
                closure()
                optimizer.first_step(zero_grad=form == "two_step_zero_grad")
                if form == "two_step":
                    assert all(p.grad is not None for p in model.parameters())
                    optimizer.zero_grad()
                elif form == "two_step_in_place":  # what a method keeps of the first gradients must be its own
                    optimizer.zero_grad(set_to_none=False)
                closure()
                optimizer.second_step(zero_grad=True)
                assert all(p.grad is None for p in model.parameters())
        results.append(copies(model))
    for other in results[1:]:
        assert_bitwise(other, results[0])


def test_grads_ready_returns_the_loss_at_the_perturbed_point(build):
    model = make_model()
    optimizer, closure = build(model), make_closure(model)
    loss = closure()
    perturbed_loss = optimizer.step(closure, grads_ready=True)
    assert perturbed_loss > loss


@pytest.mark.parametrize("given", ["function", "context"])
def test_ascent_context_surrounds_the_first_pass_of_local_ascent_alone(build, given):
    """The others step with that gradient, or remember it: it must be synchronised."""
    model = make_model()
    optimizer, closure, events = build(model), make_closure(model), []

    @contextlib.contextmanager
    def context():
        events.append("enter")
        yield
        events.append("exit")

    def recording():
        events.append("closure")
        return closure()

    optimizer.step(recording, ascent_context=context if given == "function" else context())
    assert events == (["enter", "closure", "exit", "closure"] if optimizer.local_ascent else ["closure", "closure"])


def test_ascent_context_is_not_entered_where_the_gradient_is_stepped_with(build):
    """With rho = 0, for one: it must be synchronised."""
    optimizer, entered = build(model := make_model(), rho=0.0), []
    optimizer.step(make_closure(model), ascent_context=lambda: entered.append(1))
    assert not entered


def test_closure_runs_with_gradients_cleared_and_enabled(build):
    model = make_model()
    optimizer, closure = build(model), make_closure(model)
    for param in model.parameters():
        param.grad = torch.full_like(param, 100.0)

    def checking():
        assert torch.is_grad_enabled()
        assert all(p.grad is None for p in model.parameters())
        return closure()

    with torch.no_grad():
        optimizer.step(checking)


# Weights come back ----------------------------------------------------------------------------------------------------


def test_second_step_restores_in_place(build):
    """Regression: peers' defect 3, the storage of the weights was swapped."""
    model = make_model()
    optimizer, closure = build(model, lr=0.0, weight_decay=0.0), make_closure(model)
    before, pointers = copies(model), [p.data_ptr() for p in model.parameters()]
    closure()
    optimizer.first_step(zero_grad=True)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    closure()
    optimizer.second_step()
    assert_bitwise(list(model.parameters()), before)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_weights_come_back_when_the_second_pass_raises(build):
    model = make_model()
    optimizer, closure, before, calls = build(model), make_closure(model), copies(model), []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert_bitwise(list(model.parameters()), before)
    optimizer.step(closure)  # and the optimizer goes on


def test_weights_come_back_when_the_ascent_fails(build, monkeypatch):
    model = make_model()
    optimizer, before = build(model), copies(model)
    make_closure(model)()
    moves = [Move([model[0].weight], [model[0].weight.grad], 1.0), Move([model[0].bias], [torch.ones(7)], 1.0)]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"^perturbation 0 must have shape \[4\], got"):
        patch.setattr(optimizer, "_ascend", lambda params, grads, norm: moves)
        optimizer.first_step()
    assert_bitwise(copies(model), before)
    optimizer.step(make_closure(model))


def test_restore_gives_a_step_up(build):
    model = make_model()
    optimizer, before = build(model), copies(model)
    make_closure(model)()
    optimizer.first_step()
    optimizer.restore()
    optimizer.restore()
    assert_bitwise(list(model.parameters()), before)
    with pytest.raises(RuntimeError, match=r"^second_step needs a first_step before it\.$"):
        optimizer.second_step()


def test_gradient_in_only_one_pass(build):
    """Regression: peers' defect 2, weights stayed perturbed or a KeyError came."""
    first, second, both = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    optimizer = build([first, second, both], lr=0.0, weight_decay=0.0)
    calls = []

    def closure():
        calls.append(1)
        loss = ((first if len(calls) == 1 else second) ** 2).sum() + (both**3).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_bitwise([first, second, both], [torch.ones(3, dtype=torch.float64)] * 3)


def test_a_gradient_in_one_pass_alone_steps_with_the_second(method):
    first, second, both = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    optimizer = METHODS[method]([first, second, both], torch.optim.SGD, lr=0.1)
    optimizer.zero_grad()
    first.grad, both.grad = torch.full_like(first, 2.0), torch.full_like(both, 3.0)
    optimizer.first_step(zero_grad=True)
    second.grad, both.grad = torch.full_like(second, 4.0), torch.full_like(both, 5.0)
    optimizer.second_step()
    assert_bitwise([first], [torch.ones_like(first)])
    torch.testing.assert_close(second.detach(), torch.full_like(second, 0.6), rtol=1e-14, atol=0)
    assert not torch.equal(both, torch.ones_like(both))


# Non-finite gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_nonfinite_gradient_leaves_weights_and_moments(build, method, bad, bad_pass, nonfinite):
    model, options = make_model(), {"k": 1} if method == "looksam" else {}
    optimizer = build(list(model.named_parameters()), nonfinite=nonfinite, **options)
    closure, calls = make_closure(model), []
    optimizer.step(closure)
    before, state = copies(model), copy.deepcopy(optimizer.base_optimizer.state_dict()["state"])

    def spoiled():
        calls.append(1)
        loss = closure()
        if len(calls) == bad_pass:
            model[2].weight.grad[1, 2] = bad
        return loss

    def step():
        optimizer.zero_grad()
        spoiled()
        optimizer.first_step(zero_grad=True)
        spoiled()
        optimizer.second_step()

    if nonfinite == "raise":
        where = "w" if bad_pass == 1 else r"w \+ perturbation"
        message = rf"^the gradient of parameter 2 '2\.weight' with shape \[3, 4\] is not finite at {where}\.$"
        with pytest.raises(FloatingPointError, match=message):
            step()
        assert optimizer.num_skipped == 0
    else:
        step()
        assert optimizer.num_skipped == 1
        assert len(calls) == 2
    assert_bitwise(list(model.parameters()), before)
    for number, values in optimizer.base_optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert value is state[number][name] or torch.equal(value, state[number][name])
    optimizer.step(closure)  # goes on, from the clean weights
    assert not torch.equal(before[0], next(model.parameters()))


@pytest.mark.parametrize("method", ["sam"])
@pytest.mark.parametrize("base", ["sgd"])
def test_finite_gradients_whose_norm_overflows_are_named_as_such(build):
    weight = nn.Parameter(torch.ones(100))
    weight.grad = torch.full((100,), 1e38)
    with pytest.raises(FloatingPointError, match=r"^the global norm of the gradients is not finite at w\.$"):
        build([weight]).first_step()


def test_nan_weights_are_not_left_behind(build):
    """Add and subtract would turn a NaN perturbation into NaN weights (regression: peers' defect 7)."""
    model = make_model()
    optimizer, before = build(model), copies(model)
    make_closure(model)()
    optimizer._ascend = lambda params, grads, norm: [Move(params[0], grads[0], float("nan"))]
    optimizer.first_step()
    assert all(p.isnan().all() for p in model.parameters())
    optimizer.restore()
    assert_bitwise(list(model.parameters()), before)


# Groups, schedulers ---------------------------------------------------------------------------------------------------


def test_groups_are_the_base_optimizers(build):
    model = make_model()
    optimizer = build(model)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5, "rho": 0.3})
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    assert [group["rho"] for group in optimizer.param_groups][1:] == [0.3]
    assert optimizer.param_groups[1]["lr"] == 0.5
    optimizer.base_optimizer.load_state_dict(optimizer.base_optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups


@pytest.mark.parametrize("attach", ["wrapper", "base"])
@pytest.mark.parametrize("form", ["closure", "two_step", "skipped"])
def test_schedulers_attach_without_a_warning(build, base, attach, form):
    """Regression: peers' defect 6."""
    model = make_model()
    optimizer, closure = build(model, nonfinite="skip"), make_closure(model)
    target = optimizer if attach == "wrapper" else optimizer.base_optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(target, step_size=1, gamma=0.5)
    if form == "closure":
        optimizer.step(closure)
    else:
        closure()
        if form == "skipped":
            model[0].bias.grad.fill_(float("nan"))
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5 * BASES[base][1]["lr"]


# dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_whose_squares_overflow(build, dtype):
    param = nn.Parameter(torch.full((4,), 0.5, dtype=dtype))
    optimizer = build([param], rho=1.0)
    param.grad = torch.full((4,), 50000.0, dtype=dtype)
    optimizer.first_step()
    torch.testing.assert_close(param.detach().float(), torch.full((4,), param[0].item()), rtol=0, atol=0)
    # e = rho T^2 g / ||T g|| = T / 2 in each entry
    group = optimizer.param_groups[0]
    t = 0.5 + group["eta"] if group.get("adaptive") else 1.0
    torch.testing.assert_close(param[0].item(), 0.5 + t / 2, rtol=0, atol=4e-3)
    optimizer.second_step()
    assert param.isfinite().all()


# Loss scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["closure", "grads_ready", "two_step"])
def test_grad_scaler_gives_the_unscaled_steps(build, form):
    """Regression: peers' defect 5, a second unscale_ raised."""
    plain, model = make_model(torch.float32), make_model(torch.float32)
    batch = make_batch(dtype=torch.float32)
    reference, optimizer = build(plain), build(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def closure():
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        return loss

    for _ in range(3):
        reference.step(make_closure(plain, batch))
        if form == "closure":
            optimizer.step(closure, grad_scaler=scaler)
        elif form == "grads_ready":
            optimizer.zero_grad()
            closure()
            optimizer.step(closure, grads_ready=True, grad_scaler=scaler)
        else:
            optimizer.zero_grad()
            closure()
            optimizer.first_step(zero_grad=True, grad_scaler=scaler)
            closure()
            optimizer.second_step(grad_scaler=scaler)
        scaler.update()
    assert_bitwise(copies(model), copies(plain))  # a power of two loses no bit
    assert scaler.get_scale() == 2.0**10


def test_disabled_grad_scaler_changes_nothing(build):
    model, plain = make_model(), make_model()
    build(model).step(make_closure(model), grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
    build(plain).step(make_closure(plain))
    assert_bitwise(copies(model), copies(plain))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, r"^rho must be >= 0, got -0\.1\.$"),
        ({"rho": float("nan")}, r"^rho must be finite, got nan\.$"),
        ({"rho": "big"}, r"^rho must be a real number, got 'big'\.$"),
        ({"nonfinite": "stop"}, r"^nonfinite must be one of 'raise', 'skip', 'ignore', got 'stop'\.$"),
        ({"max_grad_norm": 0}, r"^max_grad_norm must be > 0, got 0\.$"),
        ({"foreach": "yes"}, r"^foreach must be one of None, True, False, got 'yes'\.$"),
    ],
)
def test_bad_options(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(make_model(), **options)


def test_bad_base_optimizers(method):
    params = make_model().parameters()
    with pytest.raises(ValueError, match=r"^base_optimizer must be an optimizer class, e\.g\. torch\.optim"):
        METHODS[method](params, torch.optim.SGD(make_model().parameters()))
    with pytest.raises(ValueError, match=r"^base_optimizer must step without a closure, got LBFGS\.$"):
        METHODS[method](params, torch.optim.LBFGS)


def test_bad_group_option(build):
    with pytest.raises(ValueError, match=r"^rho must be finite, got inf\.$"):
        build([{"params": make_model().parameters(), "rho": float("inf")}])


def test_no_gradient_at_all(build):
    model = make_model()
    optimizer = build(model)
    message = r"^no parameter has a gradient at w: call backward on the loss before the step\.$"
    with pytest.raises(RuntimeError, match=message):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(lambda: 0.0)
    before = copies(model)
    make_closure(model)()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"^no parameter has a gradient at w \+ perturbation: "):
        optimizer.second_step()
    assert_bitwise(copies(model), before)


def test_steps_out_of_order(build):
    model = make_model()
    optimizer, closure = build(model), make_closure(model)
    with pytest.raises(RuntimeError, match=r"^second_step needs a first_step before it\.$"):
        optimizer.second_step()
    closure()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"^first_step was called twice; call second_step, or restore\(\)"):
        optimizer.first_step()


def test_step_without_a_closure(build, base):
    model, plain = make_model(), make_model()
    optimizer = build(model)
    make_closure(model)()
    with pytest.raises(ValueError, match=r"^closure must be given, got None: the second pass needs it\."):
        optimizer.step()
    # On zero gradients the perturbation is zero, and this is how torch.distributed.checkpoint initialises moments.
    base_optimizer = BASES[base][0](plain.parameters(), **BASES[base][1])
    for net in (model, plain):
        for param in net.parameters():
            param.grad = torch.zeros_like(param)
    assert optimizer.step(closure=None) is None
    base_optimizer.step()
    assert_bitwise(copies(model), copies(plain))
    assert len(optimizer.state) == len(list(model.parameters()))


def test_ascent_context_with_grads_ready(build):
    model = make_model()
    with pytest.raises(ValueError, match=r"^ascent_context must be None with grads_ready=True: "):
        build(model).step(make_closure(model), grads_ready=True, ascent_context=contextlib.nullcontext)


# Other people's loops -------------------------------------------------------------------------------------------------


def test_step_without_a_closure_ends_a_step_begun(build):
    models = [make_model(), make_model()]
    for model in models:
        optimizer, closure = build(model), make_closure(model)
        for _ in range(3):
            optimizer.zero_grad()
            closure()
            optimizer.first_step(zero_grad=True)
            assert optimizer.in_second_pass
            closure()
            assert (optimizer.step() if model is models[0] else optimizer.second_step()) is None
            assert not optimizer.in_second_pass
    assert_bitwise(copies(models[0]), copies(models[1]))


def test_step_after_first_step_refuses_a_closure(build):
    model = make_model()
    optimizer, closure = build(model), make_closure(model)
    closure()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"^step after first_step takes no closure: "):
        optimizer.step(closure)


def test_it_says_whether_a_second_pass_is_due(build, method):
    model = make_model()
    optimizer, closure, calls = build(model), make_closure(model), []
    for _ in range(4):
        due = optimizer.second_pass_is_due()
        calls.clear()
        optimizer.step(lambda: (calls.append(1), closure())[1])
        assert len(calls) == 1 + due
    assert not build(make_model(), rho=0.0).second_pass_is_due()


def test_a_bad_first_gradient_makes_the_second_one_bad_for_other_ranks_to_see(build):
    model = make_model()
    optimizer, closure = build(model, nonfinite="skip"), make_closure(model)
    before = copies(model)
    closure()
    model[2].weight.grad[1, 2] = torch.inf
    optimizer.first_step(zero_grad=True)
    closure()
    assert all(p.grad.isnan().all() for p in model.parameters())
    optimizer.second_step(zero_grad=True)
    assert optimizer.num_skipped == 1
    assert_bitwise(copies(model), before)
    closure()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", [name for name in TWO_PASS if method_class(name).local_ascent], indirect=True)
def test_a_bad_first_gradient_of_one_rank_raises_after_the_second_pass(build):
    """So that the ranks that wait for its second gradient hear of it."""
    model = make_model()
    optimizer, closure, calls = build(model), make_closure(model), []
    before = copies(model)

    def spoiled():
        loss = closure()
        calls.append([p.grad.isnan().all().item() for p in model.parameters()])
        if len(calls) == 1:
            model[2].weight.grad[1, 2] = torch.inf
        return loss

    with pytest.raises(FloatingPointError, match=r"^the gradient of parameter 2 .* is not finite at w\.$"):
        optimizer.step(spoiled, ascent_context=contextlib.nullcontext)
    assert calls == [[False] * 4, [True] * 4]
    assert not optimizer.in_second_pass
    assert_bitwise(copies(model), before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_step_begun_with_a_bad_gradient_is_copied_with_it(build, way):
    model = make_model()
    optimizer, before = build(model, nonfinite="skip"), copies(model)
    make_closure(model)()
    model[0].bias.grad.fill_(torch.nan)
    optimizer.first_step()
    pair = copy.deepcopy((model, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    make_closure(pair[0])()
    pair[1].second_step()
    assert pair[1].num_skipped == 1 and optimizer.num_skipped == 0
    assert_bitwise(copies(pair[0]), before)


def test_a_scaler_that_was_not_updated_leaves_no_step_begun(build):
    """Its error must not leave behind what makes the second gradient bad."""
    model, scaler = make_model(), torch.amp.GradScaler("cpu")
    optimizer, closure = build(model), make_closure(model, scaler=scaler)
    closure()
    model[0].bias.grad.fill_(torch.nan)
    scaler.unscale_(optimizer.base_optimizer)
    with pytest.raises(RuntimeError, match=r"^unscale_\(\) has already been called"):
        optimizer.first_step(grad_scaler=scaler)
    assert not optimizer.in_second_pass
    optimizer.zero_grad()
    closure()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Part of the weights --------------------------------------------------------------------------------------------------


def test_a_group_that_is_not_perturbed_stays_and_does_not_count_in_the_norm(build, method):
    model, alone = make_model(), make_model()
    groups = [{"params": model[0].parameters(), "perturb": False}, {"params": model[2].parameters()}]
    optimizer, reference = build(groups), build(alone[2].parameters())
    make_closure(model)()
    make_closure(alone)()
    optimizer.first_step()
    reference.first_step()
    assert_bitwise(copies(model[0]), copies(make_model()[0]))
    assert_bitwise(copies(model[2]), copies(alone[2]))
    assert not torch.equal(model[2].weight, make_model()[2].weight)


def test_without_a_perturbed_group_it_is_the_base_optimizer(build, base):
    model, plain = make_model(), make_model()
    optimizer = build([{"params": model.parameters(), "perturb": False}])
    base_optimizer = BASES[base][0](plain.parameters(), **BASES[base][1])
    assert not optimizer.second_pass_is_due()
    for _ in range(3):
        optimizer.step(make_closure(model))
        base_optimizer.zero_grad()
        make_closure(plain)()
        base_optimizer.step()
    assert_bitwise(copies(model), copies(plain))


@pytest.mark.parametrize("bad", ["yes", None, 2])
def test_perturb_must_be_a_truth_value(build, bad):
    with pytest.raises(ValueError, match=r"^perturb must be one of True, False, got "):
        build([{"params": make_model().parameters(), "perturb": bad}])
