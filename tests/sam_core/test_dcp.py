"""torch.distributed.checkpoint: saved on 2 ranks, resumed on 1, 2 and 4 as if never interrupted."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import dcp_ranks
from dcp_ranks import CASES, DDP_CASES, FULL_CASES, LOCAL_CASES, NUM_AFTER, NUM_BEFORE, REMEMBERING, build, place, train
from sam_cases import BASES, METHODS, TWO_PASS, assert_bitwise, copies, make_batch, make_closure, make_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
PAIR = pytest.mark.parametrize(("method", "other"), list(itertools.permutations(("sam", "asam", *REMEMBERING), 2)))
CASE = pytest.mark.parametrize("case", CASES, ids="-".join)


def keys(state):
    """Names of all entries, by parameter and by group."""
    groups = [(tuple(group["params"]), sorted(group.keys())) for group in state["param_groups"]]
    return {name: sorted(entries) for name, entries in state["state"].items()}, groups


def forget(state):
    """The same without what the method knows of the parameters."""
    state = copy.deepcopy(state)
    for entries in state["state"].values():
        assert entries["sam_core.known"]
        entries["sam_core.known"] = False
    return state


# The same entries at all times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_entries_do_not_depend_on_history(method, base):
    model, optimizer = build((method, base, ""))
    own = {name for entries in optimizer.state_dict()["state"].values() for name in entries}
    expected = {f"sam_core.{REMEMBERING[method]}", "sam_core.known"} if method in REMEMBERING else set()
    assert own == expected
    fresh = keys(get_optimizer_state_dict(model, optimizer))
    assert all(expected < set(entries) for entries in fresh[0].values())
    for step in range(3):  # LookSAM has a g_v after the first and the third
        train(model, optimizer, step, 1)
        assert keys(get_optimizer_state_dict(model, optimizer)) == fresh
        with optimizer.at_weights():
            assert keys(get_optimizer_state_dict(model, optimizer)) == fresh


@pytest.mark.parametrize("method", REMEMBERING)
def test_unknown_stays_unknown(method):
    """Zeros are written for it, and neither saving nor loading takes them for values."""
    _, optimizer = build((method, "sgd", ""))
    _, other = build((method, "sgd", ""), fresh=True)
    for state in (optimizer.state_dict(), optimizer.state_dict()):
        other.load_state_dict(state)
        assert not any(entries["sam_core.known"] for entries in other.state_dict()["state"].values())


@pytest.mark.parametrize("method", ["friendlysam", "momentumsam", "msam"])
def test_what_is_never_perturbed_takes_no_room(method):
    """So that a file does not hold zeros for a whole model of which the norms alone are perturbed."""
    model = make_model()
    groups = [{"params": model[0].parameters(), "perturb": False}, {"params": model[2].parameters()}]
    optimizer = METHODS[method](groups, torch.optim.AdamW)
    for _ in range(3):
        entries = optimizer.state_dict()["state"]
        own = {number: f"sam_core.{REMEMBERING[method]}" in entries.get(number, {}) for number in range(4)}
        assert own == {0: False, 1: False, 2: True, 3: True}
        optimizer.step(make_closure(model))


def test_state_of_half_weights_is_wide():
    """A template of another dtype would round what is loaded into it."""
    param = torch.nn.Parameter(torch.ones(2).bfloat16())
    for method in REMEMBERING:
        optimizer = METHODS[method]([param], torch.optim.AdamW)
        names = []
        for known in (False, True):
            own = optimizer.state_dict()["state"][0]
            assert own["sam_core.known"] == known
            names.append(
                {name: value.dtype for name, value in own.items() if name == f"sam_core.{REMEMBERING[method]}"}
            )

            def closure():
                (param.float() * torch.tensor([1.0, 2.0]) ** param.float()).sum().backward()

            optimizer.step(closure)
        assert names[0] == names[1]


# What torch's initialisation does -------------------------------------------------------------------------------------


@CASE
def test_initialisation_is_the_base_optimizers_alone(case):
    """It steps on zero gradients with lr = 0: weights stay, the method counts and remembers nothing."""
    model, optimizer = build(case)
    before, counters = copies(model), dict(optimizer._counters)
    with place(optimizer, case[2]):
        get_optimizer_state_dict(model, optimizer)
        assert_bitwise(copies(model), before)
    assert_bitwise(dcp_ranks.clean_weights(model, optimizer), before)
    assert_bitwise(copies(model), before)
    assert optimizer._counters == counters
    assert optimizer._method_state == {}
    assert optimizer.param_groups[0]["lr"] == BASES[case[1]][1]["lr"]
    assert len(optimizer.state) == 6

    other_model, other = build(case)
    if case[:2] != ("msam", "sgd"):  # it lets go of the momentum that SGD makes of weight decay
        get_optimizer_state_dict(other_model, other.base_optimizer)
    train(model, optimizer, 0, 3)
    train(other_model, other, 0, 3)
    assert_bitwise(copies(model), copies(other_model))


def backward(model):
    model(make_batch()[0]).square().mean().backward()


def begin(model, optimizer):
    """The first half of a first step, its gradients cleared."""
    backward(model)
    optimizer.first_step(zero_grad=True)
    return copies(model)


@pytest.mark.parametrize("method", TWO_PASS)
def test_initialisation_does_not_end_a_step_begun(method):
    results = []
    for early in (True, False):  # AdamW counts the initialisation, whenever it is
        model, optimizer = build((method, "adamw", ""))
        if early:
            get_optimizer_state_dict(model, optimizer)
        moved = begin(model, optimizer)
        get_optimizer_state_dict(model, optimizer)
        assert_bitwise(copies(model), moved)
        assert optimizer.in_second_pass and len(optimizer.state) == 6
        backward(model)
        optimizer.step()
        results.append(copies(model))
    assert_bitwise(*results)


def test_a_first_step_at_a_learning_rate_of_zero_is_no_initialisation():
    """A warm-up begins so: its gradients tell the two apart."""
    model, optimizer = build(("sam", "adamw", ""))
    before = copies(model)
    optimizer.param_groups[0]["lr"] = 0.0
    begin(model, optimizer)
    backward(model)
    optimizer.step()
    assert not optimizer.in_second_pass
    assert_bitwise(copies(model), before)


@pytest.mark.parametrize("method", TWO_PASS)
def test_a_load_into_a_step_begun_keeps_the_loaded_weights(method):
    """The initialisation must not put back the weights that the step was begun from."""
    model, optimizer = build((method, "adamw", ""))
    train(model, optimizer, 0, NUM_BEFORE)
    other, resumed = build((method, "adamw", ""), fresh=True)
    begin(other, resumed)
    model_state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    set_model_state_dict(other, model_state)
    set_optimizer_state_dict(other, resumed, optimizer_state)
    assert_bitwise(copies(other), copies(model))
    assert not resumed.in_second_pass
    train(model, optimizer, NUM_BEFORE, NUM_AFTER)
    train(other, resumed, NUM_BEFORE, NUM_AFTER)
    assert_bitwise(copies(other), copies(model))


# From one process to another ------------------------------------------------------------------------------------------


@CASE
def test_file_is_loaded_into_a_fresh_optimizer(case, tmp_path):
    whole = dcp_ranks.save_and_go_on(case, "plain", tmp_path)
    resumed = dcp_ranks.resume(case, "plain", dcp_ranks.name(tmp_path, case, "plain"))
    assert_bitwise(resumed["loaded"], whole["loaded"])
    assert_bitwise(resumed["final"], whole["final"])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", REMEMBERING)
def test_a_loss_of_state_would_show(method, base):
    """The runs compared here differ where what the method knows is lost: the others cannot pass by chance."""
    results = []
    for lost in (False, True):
        model, optimizer = build((method, base, ""))
        train(model, optimizer, 0, NUM_BEFORE)
        other, resumed = build((method, base, ""), fresh=True)
        state = optimizer.state_dict()
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(forget(state) if lost else state)
        train(other, resumed, NUM_BEFORE, NUM_AFTER)
        results.append(dcp_ranks.clean_weights(other, resumed))
        train(model, optimizer, NUM_BEFORE, NUM_AFTER)
        expected = dcp_ranks.clean_weights(model, optimizer)
    assert_bitwise(results[0], expected)
    assert max(float((a - b).abs().max()) for a, b in zip(results[1], expected, strict=True)) > 1e-5


@pytest.mark.parametrize("saved", ["inside", "outside", "model outside, optimizer inside"])
@pytest.mark.parametrize("loaded", ["inside", "outside"])
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_msam_never_takes_moved_weights_for_clean_ones(base, saved, loaded, order, used, tmp_path):
    model, optimizer = build(("msam", base, ""))
    train(model, optimizer, 0, NUM_BEFORE)
    moved = copy.deepcopy(model.state_dict())
    with place(optimizer, "inside" if "inside" in saved else "outside"):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        model_state = moved if "outside" in saved else model_state
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "file")

    other, resumed = build(("msam", base, ""), fresh=True)
    if used:
        train(other, resumed, 7, 1)
    with place(resumed, loaded):
        model_state, optimizer_state = get_state_dict(other, resumed)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=tmp_path / "file")
        model_state = copy.deepcopy(state["model"])  # else it is the model's own, and follows the optimizer
        if order == "model first":
            set_model_state_dict(other, model_state)
        set_optimizer_state_dict(other, resumed, state["optimizer"])
        if order == "optimizer first":
            set_model_state_dict(other, model_state)
    for _ in range(2):
        assert_bitwise(dcp_ranks.clean_weights(other, resumed), dcp_ranks.clean_weights(model, optimizer))
        assert_bitwise(copies(other), copies(model))
        train(model, optimizer, NUM_BEFORE, NUM_AFTER)
        train(other, resumed, NUM_BEFORE, NUM_AFTER)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"full_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}])
def test_whole_tensors_and_frozen_parameters(method, options):
    results = []
    for fresh in (False, True):
        model, optimizer = build((method, "adamw", ""), fresh=fresh)
        model[0].bias.requires_grad_(False)
        if not fresh:
            train(model, optimizer, 0, NUM_BEFORE)
            model_state, state = copy.deepcopy(get_state_dict(model, optimizer, options=StateDictOptions(**options)))
            assert "0.bias" not in state["state"]
        else:
            set_model_state_dict(model, model_state, options=StateDictOptions(full_state_dict=True))
            set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
        train(model, optimizer, NUM_BEFORE, NUM_AFTER)
        results.append(copies(model))
    assert_bitwise(*results)


def test_checkpoint_of_the_base_optimizer_keeps_the_options():
    model, optimizer = build(("friendlysam", "adamw", ""))
    plain = torch.optim.AdamW(model.parameters(), lr=0.5)
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, plain))
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (0.1, 0.5)
    assert optimizer._method_state == {}


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_flattened_state_is_refused(method):
    """Torch looks for the names of a base optimizer alone when it takes such a state apart."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = build((method, "adamw", ""))
    train(model, optimizer, 0, 1)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    assert (f"state.0.weight.sam_core.{REMEMBERING.get(method)}" in state) == (method in REMEMBERING)
    message = r"^state_dict must hold entries 'sam_core\.\*' of \w+, got none: torch drops them with StateDictOptions"
    with pytest.raises(ValueError, match=message):
        set_optimizer_state_dict(model, optimizer, state, options=options)


@PAIR
def test_another_method_is_refused(method, other):
    (model, optimizer), (other_model, resumed) = build((method, "sgd", "")), build((other, "sgd", ""), fresh=True)
    train(model, optimizer, 0, 1)
    names = type(resumed).__name__, type(optimizer).__name__
    with pytest.raises(
        ValueError, match=rf"^state_dict must be that of {names[0]}, got that of {names[1]}\. To change"
    ):
        set_optimizer_state_dict(other_model, resumed, get_optimizer_state_dict(model, optimizer))


@PAIR
def test_a_file_of_another_method_is_refused(method, other, tmp_path):
    """By torch, which misses an option or a state, or as above."""
    (model, optimizer), fresh = build((method, "sgd", "")), build((other, "sgd", ""), fresh=True)
    train(model, optimizer, 0, 1)
    dcp_ranks.save(model, optimizer, tmp_path / "file", where="outside")
    message = r"Missing key in checkpoint state_dict: optimizer\.(param_groups|state)\.|^state_dict must be that of"
    with pytest.raises((CheckpointException, ValueError), match=message):
        dcp_ranks.load(*fresh, tmp_path / "file", where="outside")


# Several processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The checkpoints of 2 ranks, and what the ranks had after they went on: from there, and on 4 ranks."""
    folder = tmp_path_factory.mktemp("dcp")
    script = str(Path(dcp_ranks.__file__))
    for task, num_ranks in (("save", 2), ("load", 4)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        run = subprocess.run([*command, script, task, str(folder)], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def saved(files):
    return torch.load(files / "save-0.pt", weights_only=True)


def assert_same_run(actual, expected, *, exactly):
    """The weights of another number of ranks differ by the order of sums; what is loaded does not."""
    assert_bitwise(actual["loaded"], expected["loaded"])
    tolerance = 0.0 if exactly else 1e-12
    torch.testing.assert_close(actual["final"], expected["final"], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@CASE
def test_two_ranks_resume_two(saved, case):
    assert_same_run(saved["resumed"][case], saved["fsdp2"][case], exactly=True)


@pytest.mark.slow
@CASE
def test_four_ranks_resume_two(files, saved, case):
    resumed = torch.load(files / "load-3.pt", weights_only=True)["resumed"]
    assert_same_run(resumed[case], saved["fsdp2"][case], exactly=False)


@pytest.mark.slow
@CASE
def test_one_process_resumes_two(files, saved, case):
    resumed = dcp_ranks.resume(case, "plain", dcp_ranks.name(files, case, "fsdp2"))
    assert_same_run(resumed, saved["fsdp2"][case], exactly=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", DDP_CASES, ids="-".join)
def test_one_process_resumes_distributed_data_parallel(files, saved, case):
    if case in LOCAL_CASES:
        return assert_same_run(saved["ddp resumed"][case], saved["ddp"][case], exactly=True)
    resumed = dcp_ranks.resume(case, "plain", dcp_ranks.name(files, case, "ddp"))
    return assert_same_run(resumed, saved["ddp"][case], exactly=False)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "broadcast"])
@pytest.mark.parametrize("case", FULL_CASES, ids="-".join)
def test_whole_state_is_sharded_again(saved, way, case):
    assert_same_run(saved[way][case], saved["fsdp2"][case], exactly=True)


@pytest.mark.slow
@CASE
def test_initialisation_leaves_shards_alone(saved, case):
    assert saved["initialised"][case]
