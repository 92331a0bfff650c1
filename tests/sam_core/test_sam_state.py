"""Saving and resuming: N steps, save, load in a fresh process, M steps equal N + M steps bit for bit."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sam_core
from sam_cases import BASES, METHODS, assert_bitwise, copies, make_closure, make_model
from sam_core import SAM, TwoPassOptimizer
from sam_core.ascent import Move

RESUME = """
import sys

path, *folders = sys.argv[1:]
sys.path[:0] = folders
import torch
from sam_cases import BASES, METHODS, make_closure, make_model

checkpoints = torch.load(path, weights_only=True)
for (method, base), (model_state, optimizer_state) in checkpoints.items():
    model = make_model()
    optimizer = METHODS[method](model.parameters(), BASES[base][0], **{**BASES[base][1], "lr": 123.0})
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    for _ in range(3):
        optimizer.step(make_closure(model, method=method))
    checkpoints[method, base] = model.state_dict()
torch.save(checkpoints, path)
"""


def test_resume_in_a_fresh_process_is_exact(tmp_path):
    """Regression: peers' defect 1, the base optimizer's moments were lost."""
    models, checkpoints, path = {}, {}, tmp_path / "checkpoints.pt"
    for case in itertools.product(METHODS, BASES):
        method, base = case
        models[case] = make_model()
        optimizer = METHODS[method](models[case].parameters(), BASES[base][0], **BASES[base][1])
        for _ in range(2):
            optimizer.step(make_closure(models[case], method=method))
        checkpoints[case] = copy.deepcopy((models[case].state_dict(), optimizer.state_dict()))
        for _ in range(3):
            optimizer.step(make_closure(models[case], method=method))
    torch.save(checkpoints, path)
    folders = [str(Path(__file__).parent), str(Path(sam_core.__file__).parents[1])]
    subprocess.run([sys.executable, "-c", RESUME, str(path), *folders], check=True, timeout=120)
    resumed = torch.load(path, weights_only=True)
    for case, model in models.items():
        assert_bitwise(list(resumed[case].values()), copies(model))


@pytest.mark.parametrize("base", BASES)
def test_state_dict_holds_moments_options_and_no_backup(base):
    model = make_model()
    optimizer = METHODS["sam"](model.parameters(), BASES[base][0], **BASES[base][1])
    optimizer.step(make_closure(model))
    make_closure(model)()
    optimizer.first_step()
    saved, base_saved = optimizer.state_dict(), optimizer.base_optimizer.state_dict()
    assert saved["state"].keys() == base_saved["state"].keys() == {0, 1, 2, 3}
    assert all(saved["state"][i].keys() == base_saved["state"][i].keys() for i in range(4))
    assert saved["param_groups"][0]["rho"] == 0.1
    assert saved["param_groups"][0]["sam_core.num_skipped"] == 0
    assert not any(name.startswith("sam_core.") for name in base_saved["param_groups"][0])


def test_num_skipped_is_resumed():
    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, nonfinite="skip")
    make_closure(model)()
    model[0].weight.grad.fill_(float("nan"))
    optimizer.first_step()
    optimizer.second_step()
    other = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.num_skipped == 1
    assert not any(name.startswith("sam_core.") for name in other.param_groups[0])


def test_plain_checkpoint_of_the_base_optimizer_keeps_the_options():
    model = make_model()
    base = torch.optim.AdamW(model.parameters(), lr=0.5)
    make_closure(model)()
    base.step()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.7, lr=0.1)
    optimizer.load_state_dict(base.state_dict())
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (0.7, 0.5)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], base.state[model[0].weight]["exp_avg"])
    base.load_state_dict(optimizer.state_dict())  # and back


@pytest.mark.parametrize("method", ["sam", "friendlysam", "momentumsam", "looksam", "msam"])
def test_a_state_of_before_perturb_and_known_resumes(method):
    """As older versions saved it: what it holds was known; groups take the option of the optimizer that loads it."""
    models = [make_model(), make_model()]
    whole, resumed = (METHODS[method](model.parameters(), torch.optim.AdamW, lr=0.01) for model in models)
    for _ in range(3):  # LookSAM keeps a g_v for the fourth
        whole.step(make_closure(models[0]))
    saved = copy.deepcopy(whole.state_dict())
    for group in saved["param_groups"]:
        del group["perturb"]
    for entries in saved["state"].values():
        assert entries.pop("sam_core.known", method == "sam")
    models[1].load_state_dict(models[0].state_dict())
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["perturb"] is True
    for model, optimizer in zip(models, (whole, resumed), strict=True):
        optimizer.step(make_closure(model))
    assert_bitwise(copies(models[1]), copies(models[0]))


def test_other_groups_are_refused():
    optimizer = SAM(make_model().parameters(), torch.optim.SGD, lr=0.1)
    other = SAM([nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"^loaded state dict contains a parameter group that doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())


def test_loading_forgets_a_step_begun():
    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    saved_model, saved = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    make_closure(model)()
    optimizer.first_step()
    model.load_state_dict(saved_model)
    optimizer.load_state_dict(saved)
    optimizer.restore()
    assert_bitwise(copies(model), list(saved_model.values()))
    optimizer.step(make_closure(model))


class _Remembering(TwoPassOptimizer):
    """A method with state of its own: a float64 average of the gradients of parameters of any dtype."""

    def __init__(self, params, base_optimizer, **kwargs):
        super().__init__(params, base_optimizer, {"rho": 0.1}, **kwargs)
        self._counters["num_steps"] = 0

    def _check_group(self, group):
        pass

    def _ascend(self, params, grads, norm):
        self._counters["num_steps"] += 1
        for param, grad in zip(params[0], grads[0], strict=True):
            average = self._method_state.setdefault(param, {"average": torch.zeros_like(param, dtype=torch.float64)})
            average["average"].lerp_(grad.double(), 0.1)
        return [Move(params[0], [self._method_state[p]["average"].to(p.dtype) for p in params[0]], 1.0)]


@pytest.mark.parametrize("base", BASES)
def test_a_methods_own_state_is_kept_apart_and_never_cast(base):
    param = nn.Parameter(torch.linspace(-1, 1, 5).bfloat16())

    def closure():
        loss = param.float().pow(4).sum()
        loss.backward()
        return loss

    optimizer = _Remembering([param], BASES[base][0], **BASES[base][1])
    for _ in range(2):
        optimizer.step(closure)
    assert "average" not in optimizer.state[param]
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["sam_core.average"].dtype == torch.float64
    assert not any(name.startswith("sam_core.") for name in optimizer.state[param])

    start = param.detach().clone()
    optimizer.step(closure)
    expected = param.detach().clone()
    with torch.no_grad():
        param.copy_(start)
    other = _Remembering([param], BASES[base][0], **BASES[base][1])
    other.load_state_dict(saved)
    average = other._method_state[param]["average"]
    assert average.dtype == torch.float64
    assert average.data_ptr() != saved["state"][0]["sam_core.average"].data_ptr()
    other.step(closure)
    assert_bitwise([param], [expected])
    assert other._counters["num_steps"] == 3
    assert not any(name.startswith("sam_core.") for name in other.state[param])


def test_state_that_the_base_optimizer_makes_on_construction_is_kept():
    optimizer = SAM(make_model().parameters(), torch.optim.Adagrad, lr=0.1)
    assert len(optimizer.state) == 4
    assert optimizer.state is optimizer.base_optimizer.state


def test_a_group_added_to_the_base_optimizer_has_the_methods_options():
    model, extra = make_model(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1)
    optimizer.base_optimizer.add_param_group({"params": [extra]})
    assert (optimizer.param_groups[1]["rho"], optimizer.param_groups[1]["perturb"]) == (0.2, True)

    def closure():
        make_closure(model)()
        extra.square().sum().backward()

    optimizer.step(closure)
    assert not torch.equal(extra, torch.ones_like(extra))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_step_alone(way):
    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step(make_closure(model))
    pair = copy.deepcopy((model, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    pair[1].step(make_closure(pair[0]))
    optimizer.step(make_closure(model))
    assert_bitwise(copies(pair[0]), copies(model))
    assert pair[1].param_groups is pair[1].base_optimizer.param_groups


def test_state_dict_hooks_run():
    optimizer, seen = SAM(make_model().parameters(), torch.optim.SGD, lr=0.1), []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, saved: seen.append(saved.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", 1, "loaded"]


def test_distributed_checkpoint_state_dict_round_trip():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = make_model()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.2, lr=0.1)
    optimizer.step(make_closure(model))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other_model = copy.deepcopy(model)
    other = SAM(other_model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.3)
    set_optimizer_state_dict(other_model, other, saved)
    optimizer.step(make_closure(model))
    other.step(make_closure(other_model))
    assert_bitwise(copies(other_model), copies(model))


@pytest.mark.parametrize("method", ["looksam", "efficientsam"])
@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_distributed_checkpoint_counts_no_step(method, num_steps):
    """Of a base optimizer without state it takes a step on zero gradients before it saves: the schedule must rest."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    results = []
    for saving in (False, True):
        model = make_model()
        optimizer = METHODS[method](model.parameters(), torch.optim.SGD, lr=0.1)
        for step in range(4):
            if saving and step == num_steps:
                optimizer.zero_grad()
                get_optimizer_state_dict(model, optimizer)
            optimizer.step(make_closure(model, method=method))
        results.append(copies(model))
    assert_bitwise(results[1], results[0])
