"""DistributedDataParallel, 2 and 4 processes: ranks stay equal bit for bit, and train as one process does.

ddp_ranks.py runs the cases, once for each number of ranks; here stands what must come out.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ddp_cases import LOOP_METHODS, LOOPS, PASSES, SAMPLE_LOSSES, STEPS, Branched, Normed, batch_of, build, uses_second
from sam_cases import BASES, DEFAULTS, METHODS, assert_bitwise, copies, make_model, method_class

pytestmark = pytest.mark.slow

LOCAL = ("sam", "asam", "memoryefficientsam", "efficientsam")  # each rank may look for its own worst neighbour
IN_THE_LOOP = [(kind, method) for kind, methods in LOOP_METHODS.items() for method in methods]
ASCENTS = [(method, local) for method in METHODS for local in (True, False)]


def launch(num_ranks: int, *arguments: str, folder: Path) -> str:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=(2, 4))
def runs(request, tmp_path_factory) -> list[dict]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp(f"ddp{request.param}")
    launch(request.param, str(Path(__file__).with_name("ddp_ranks.py")), str(folder), folder=folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def parts_of(model: nn.Module, step: int, num_ranks: int, num_batches: int = 1) -> list:
    """For each rank a closure of its share of the mean loss over batches, all in one process."""

    def make(rank: int):
        def closure() -> torch.Tensor:
            if isinstance(model, Branched):
                model.uses_second = uses_second(step, rank)
            inputs, targets = batch_of(step, rank)
            loss = cross_entropy(model(inputs), targets) / (num_ranks * num_batches)
            loss.backward()
            return loss.detach()

        return closure

    return [make(rank) for rank in range(num_ranks)]


def step_on_selected_samples(optimizer, model: nn.Module, step: int, num_ranks: int) -> torch.Tensor:
    """EfficientSAM: the mean of the gradients that it would step with on each rank."""
    losses, grads = [], []
    for rank in range(num_ranks):
        net = copy.deepcopy(model)
        if isinstance(net, Branched):
            net.uses_second = uses_second(step, rank)
        inputs, targets = batch_of(step, rank)
        alone = METHODS["efficientsam"](net.parameters(), torch.optim.SGD, lr=1.0)
        alone._counters.update(optimizer._counters)

        def sample_losses(indices=slice(None), net=net, inputs=inputs, targets=targets):
            return SAMPLE_LOSSES(net(inputs[indices]), targets[indices])

        losses.append(alone.step(sample_losses) / num_ranks)
        grads.append([p.grad for p in net.parameters()])
    for param, *own in zip(model.parameters(), *grads, strict=True):
        known = [g for g in own if g is not None]
        param.grad = sum(known) / num_ranks if known else None
    optimizer._descend("w", None)
    return sum(losses)


def in_one_process(method, base, num_ranks, *, local, model=None, **options) -> dict[str, list]:
    """The same training without ranks."""
    model = make_model() if model is None else model
    optimizer = build(method, model.parameters(), base, **options)
    seen: dict[str, list] = {"clean": [], "losses": []}
    for step in range(STEPS):
        parts = parts_of(model, step, num_ranks)
        if method == "efficientsam":
            loss = step_on_selected_samples(optimizer, model, step, num_ranks)
        elif local and method in LOCAL:
            loss = optimizer.step_m_sharpness(parts)
        else:
            loss = optimizer.step(lambda parts=parts: torch.stack([part() for part in parts]).sum())
        seen["losses"].append(loss)
        with optimizer.at_weights():
            seen["clean"].append(copies(model))
    return seen


def assert_near(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Float64 sums in another order; LookSAM and AdamW divide by small numbers."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def assert_same_training(runs: list[dict], pick) -> None:
    first = pick(runs[0])
    for run in runs:
        other = pick(run)
        assert other["agree"] == "none"
        for kind in ("weights", "clean"):
            for step in range(STEPS):
                assert_bitwise(other[kind][step], first[kind][step])


def assert_trained_as(runs: list[dict], pick, truth: dict[str, list]) -> None:
    assert_same_training(runs, pick)
    for step in range(STEPS):
        assert_near(pick(runs[0])["clean"][step], truth["clean"][step])
        mean_loss = sum(pick(run)["losses"][step] for run in runs) / len(runs)
        torch.testing.assert_close(mean_loss, truth["losses"][step], rtol=1e-8, atol=1e-10)


# Steps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("method", "local"), ASCENTS)
def test_ranks_stay_equal_and_train_as_one_process(runs, method, base, local):
    """Local ascent is m-sharpness with the ranks' batches as micro-batches; any other is a step on their union."""
    truth = in_one_process(method, base, len(runs), local=local)
    assert_trained_as(runs, lambda run: run["steps"][method, base, local], truth)


@pytest.mark.parametrize("method", METHODS)
def test_only_local_methods_look_at_the_context(runs, method):
    own, common = (runs[0]["steps"][method, "sgd", local]["weights"][-1] for local in (True, False))
    assert torch.equal(own[0], common[0]) == (method not in LOCAL or method == "efficientsam")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bucket views", "static graph", "static graph, bucket views", "look for unused"])
def test_options_of_the_engine_do_not_change_a_bit(runs, kind, method):
    for run in runs:
        for actual, expected in zip(
            run["engine_options"][kind, method]["weights"], run["steps"][method, "sgd", True]["weights"], strict=True
        ):
            assert_bitwise(actual, expected) if len(runs) == 2 else assert_near(actual, expected)


@pytest.mark.parametrize("method", METHODS)
def test_clipping_and_frozen_parameters(runs, method):
    clipped = in_one_process(method, "sgd", len(runs), local=True, max_grad_norm=0.05)
    assert_trained_as(runs, lambda run: run["engine_options"]["clipped", method], clipped)
    model = make_model()
    model[0].bias.requires_grad_(False)
    frozen = in_one_process(method, "sgd", len(runs), local=True, model=model)
    assert_trained_as(runs, lambda run: run["engine_options"]["frozen", method], frozen)
    assert torch.equal(runs[0]["engine_options"]["frozen", method]["weights"][-1][1], make_model()[0].bias)


@pytest.mark.parametrize(("method", "local"), ASCENTS)
def test_branches_that_some_ranks_or_all_leave_out(runs, method, local):
    truth = in_one_process(method, "sgd", len(runs), local=local, model=Branched())
    assert_trained_as(runs, lambda run: run["unused"][method, local], truth)
    weights = runs[-1]["unused"][method, local]["clean"]
    assert not torch.equal(weights[0][4], Branched().second.weight)  # learnt from the first rank
    assert torch.equal(weights[-1][6], Branched().third.weight)


def test_the_halves_under_no_sync_are_the_whole_step(runs):
    for run in runs:
        for method in ("sam", "asam"):
            assert_bitwise(run["halves"][method], run["steps"][method, "sgd", True]["weights"][-1])


def test_recomputed_activations_change_no_bit(runs):
    for run in runs:
        assert_bitwise(*run["recomputed"])


def test_a_compiled_model(runs):
    for run in runs:
        assert_near(run["compiled"], runs[0]["steps"]["sam", "sgd", True]["weights"][-1])
        assert_bitwise(run["compiled"], runs[0]["compiled"])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_whole_one_bit_for_bit(runs, method, base):
    for run in runs:
        assert_bitwise(*run["resumed"][method, base])


@pytest.mark.parametrize("method", METHODS)
def test_a_base_optimizer_that_shares_out_its_state(runs, method):
    """In four steps, resumed after two."""
    for run in runs:
        seen = run["zero_redundancy"]
        if method == "msam":  # it would train as AdamW
            assert seen["msam", "message"].startswith("ValueError: base_optimizer must keep its momentum in its state")
            continue
        assert seen[method, "message"] == "none"
        assert_near(seen[method], run["steps"][method, "adamw", True]["weights"][-1])
        assert_bitwise(seen[method], runs[0]["zero_redundancy"][method])


# Bad gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("answer", ["skip", "raise", "scaler"])
@pytest.mark.parametrize(("method", "bad_pass"), PASSES)
def test_a_bad_gradient_of_one_rank_is_answered_by_all(runs, method, bad_pass, answer, local):
    for run in runs:
        seen = run["nonfinite"][method, bad_pass, answer, local]
        assert seen["message"].startswith("FloatingPointError: the gradient of " if answer == "raise" else "none")
        assert seen["num_skipped"] == (answer != "raise")
        assert seen["scale"] == (2.0**9 if answer == "scaler" else None)
        assert seen["same"] and seen["moved"] and seen["finite"] and seen["agree"] == "none"


@pytest.mark.parametrize("answer", ["skip", "raise", "scaler"])
@pytest.mark.parametrize("bad_call", [1, 2, 3, 4])
def test_a_bad_part_of_one_rank_is_answered_by_all(runs, bad_call, answer):
    for run in runs:
        seen = run["nonfinite_part"][bad_call, answer]
        assert seen["message"].startswith("FloatingPointError: the gradient of " if answer == "raise" else "none")
        assert seen["num_skipped"] == (answer != "raise")
        assert seen["scale"] == (2.0**9 if answer == "scaler" else None)
        assert seen["same"]


# The loop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("kind", "method"), IN_THE_LOOP)
def test_the_loop_is_one_process_on_all_batches(runs, kind, method, scaled):
    size = LOOPS[kind].get("accumulation_steps", 1)
    model = make_model()
    optimizer = build(method, model.parameters())
    for start in range(0, STEPS, size):
        # for each rank its parts of this step
        steps = range(start, start + size)
        ranks = list(zip(*(parts_of(model, step, len(runs), size) for step in steps), strict=True))

        def together(parts):
            return lambda: torch.stack([part() for part in parts]).sum()

        if kind == "m-sharpness":
            optimizer.step_m_sharpness([part for parts in ranks for part in parts])
        elif method in LOCAL and "sync" not in kind:
            optimizer.step_m_sharpness([together(parts) for parts in ranks])
        else:
            optimizer.step(together([part for parts in ranks for part in parts]))
    for run in runs:
        with optimizer.at_weights():
            assert_near(run["loop"][kind, method, scaled], copies(model))
        assert_bitwise(run["loop"][kind, method, scaled], runs[0]["loop"][kind, method, scaled])


def test_the_loop_for_methods_that_select_samples(runs):
    for run in runs:
        assert_bitwise(
            run["loop"]["local", "efficientsam", False], run["steps"]["efficientsam", "sgd", True]["clean"][-1]
        )


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_are_equal_on_all_ranks(runs, method):
    for kind in ("local", "sync"):
        if (method, kind) == ("efficientsam", "sync"):
            continue
        first = runs[0]["running_statistics"][method, kind]
        assert first[2] == STEPS  # num_batches_tracked: the second pass does not count
        for run in runs[1:]:
            assert_bitwise(run["running_statistics"][method, kind], first)


def test_running_statistics_of_each_rank_where_the_model_keeps_them_apart(runs):
    for rank, run in enumerate(runs):
        model = Normed()
        model(batch_of(0, rank)[0])
        assert_near(run["running_statistics"]["kept apart"], list(model.buffers()))


def test_the_mean_loss_is_logged_once(runs):
    model = make_model()
    losses = [cross_entropy(model(x), y) for x, y in (batch_of(s, r) for s in range(2) for r in range(len(runs)))]
    assert runs[0]["logged"] == [f"loss {sum(losses) / len(losses):.4f}"]
    assert all(run["logged"] == [] for run in runs[1:])


def test_the_loop_with_fsdp2(runs):
    truth = in_one_process("sam", "sgd", len(runs), local=False)
    for run in runs:
        assert_near(run["sharded"]["weights"], truth["clean"][-1])
        assert run["sharded"]["message"].startswith("ValueError: sync_ascent must be True for an FSDP2 module: no rank")
        assert run["sharded"]["agree"] == "ValueError: values must be whole on each rank, got a DTensor for 0.weight."


def test_refusals_on_all_ranks(runs):
    number = len(runs)
    static = (
        "ValueError: model must have made a backward before if it has static_graph=True: the first one fixes the "
        "graph, and must not be a local one, as ascent and accumulation have."
    )
    for run in runs:
        assert run["refusals"] == {
            "not parallel": "ValueError: model must be a DistributedDataParallel or an FSDP2 module on "
            f"{number} ranks, got Sequential: each rank would train apart.",
            "lengths": "ValueError: train_loader must give equally many batches on each rank, "
            f"got {list(range(1, number + 1))}: use a DistributedSampler.",
            "no lengths": "ValueError: train_loader must give equally many batches on each rank, got only 1 on ranks "
            "[0].",
            "empty": "ValueError: train_loader must give at least one batch, got none.",
            "device": "ValueError: device must be the model's, cpu, got 'meta'.",
            "sync and m": "ValueError: sync_ascent must be False with m_sharpness=True: each batch has its own worst "
            "neighbour.",
            "sync and samples": "ValueError: sync_ascent must be False for EfficientSAM: its first gradient is that of "
            "some parameters, and DistributedDataParallel synchronises all or none.",
            "mean for samples": "ValueError: loss_fn must return one loss a sample for EfficientSAM, e.g. "
            'partial(cross_entropy, reduction="none"), got shape [].',
            "samples and parts": "ValueError: optimizer must take one loss a batch, got EfficientSAM, which selects "
            "samples.",
            "m of gsam": "ValueError: optimizer must be SAM or ASAM with m_sharpness=True, got GSAM.",
            "static": static,
            "static, parts": static,
            "static, gsam": "none",
            "static, sync": "none",
            "static, samples": "RuntimeError: EfficientSAM's first pass must not be the first backward under "
            "static_graph=True: run an ordinary one on the DistributedDataParallel model before.",
        }


# What ranks agree on --------------------------------------------------------------------------------------------------


def test_what_differs_is_named_on_every_rank(runs):
    def differs(how_many: str, name: str) -> str:
        return f"RuntimeError: ranks must agree bit for bit: {how_many} differ, first {name}."

    for run in runs:
        assert run["agreement"] == {
            "equal": "none",
            "equal optimizer": "none",
            "swapped": differs("1 of 9", "layers.3.weight"),
            "two": differs("2 of 9", "layers.3.weight"),
            "state": differs("1 of 6", "layers.0.bias or its state"),
            "average": differs("1 of 6", "layers.3.bias or its state"),
            "kinds": "none",
            "negative zero": differs("1 of 8", "tensor 7"),
            "no tensors": "none",
            "group": "none",
        }


def test_the_loop_finds_weights_that_drift_apart(runs):
    for run in runs:
        message = "RuntimeError: ranks must agree bit for bit: 1 of 9 differ, first layers.0.weight."
        assert run["changed"]["found"] == message
        assert run["changed"]["ignored"] == "none"
        assert torch.equal(run["changed"]["found", "mean"], runs[0]["changed"]["found", "mean"])
    assert not torch.equal(runs[1]["changed"]["ignored", "mean"], runs[0]["changed"]["ignored", "mean"])


# Communication --------------------------------------------------------------------------------------------------------


def test_gradients_are_summed_over_ranks_as_often_as_the_docs_say(runs):
    """In all-reduces of the whole model a step, by calls and by bytes; docs/distributed.md has the table."""
    twice = dict.fromkeys(DEFAULTS, 2.0)
    once = {"looksam": 1 + 1 / DEFAULTS["looksam"]["k"], "msam": 1.0, "efficientsam": 1.0}
    expected = {("plain", None): 1.0}
    expected |= {(method, False): number for method, number in {**twice, **once}.items()}
    expected |= {(method, True): 1.0 if method in LOCAL else expected[method, False] for method in DEFAULTS}
    expected |= {("loop", "local"): 1.0, ("loop", "sync"): 2.0, ("loop", "m-sharpness"): 0.5}
    expected |= {("loop", "accumulated"): 0.5, ("loop", "accumulated, sync"): 1.0}  # a batch, two of which make a step
    for run in runs:
        calls = {key: calls for key, (calls, _) in run["communication"].items()}
        num_bytes = {key: num_bytes for key, (_, num_bytes) in run["communication"].items()}
        assert num_bytes == pytest.approx(expected)
        buckets = calls["plain", None]
        assert buckets > 1
        assert calls == pytest.approx({key: number * buckets for key, number in expected.items()})


def script_of_the_docs(engine: str, folder: Path) -> str:
    """What docs/distributed.md has under this heading, run on two ranks."""
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    section = page[page.index(f"\n## {engine}\n") :]
    script = re.search(r"<!-- This script runs as a test, under torchrun. -->\n```python\n(.*?)```", section, re.DOTALL)
    (folder / "train.py").write_text(script[1], encoding="utf-8")
    return launch(2, "train.py", folder=folder)


def test_the_script_of_the_docs_runs(tmp_path):
    output = script_of_the_docs("DistributedDataParallel", tmp_path)
    losses = [float(loss) for loss in re.findall(r"^loss (\S+)$", output, re.MULTILINE)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert float(re.search(r"^accuracy (\S+)$", output, re.MULTILINE)[1]) > 0.9
    assert torch.load(tmp_path / "model.pt").keys() >= {"0.weight", "1.running_mean"}


def test_the_script_of_the_docs_for_fsdp2_runs(tmp_path):
    output = script_of_the_docs("FSDP2", tmp_path)
    losses = [float(loss) for loss in re.findall(r"^loss (\S+)$", output, re.MULTILINE)]
    assert len(losses) == 3 and losses[-1] < losses[0] / 2


def test_which_methods_are_local():
    local = {method for method in METHODS if getattr(method_class(method), "local_ascent", False)}
    assert local == set(LOCAL)
