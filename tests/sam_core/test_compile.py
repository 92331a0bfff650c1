"""torch.compile around each method: the model, the step, its first half, both passes as one graph.

What is compiled must train as Python does (SGD in float64, 1e-12), and nothing may be compiled anew from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sam_cases import BASES, METHODS, copies, make_batch, make_closure, make_model

# Dynamo asks every tensor that passes a graph break for its gradient.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

NUM_STEPS = 6
COMPILED = [method for method in METHODS if method != "wsam_coupled"]  # which is WSAM's code

#: engine -> method -> why it does not work; all other methods do.
REFUSED = {
    "model": {},
    "step": {},
    "first_step": {
        "efficientsam": "draws weights with a torch.Generator, which torch does not trace",
        "msam": "has one pass",
    },
    "passes": {
        "efficientsam": "draws weights with a torch.Generator, which torch does not trace",
        "msam": "has one pass",
    },
    "whole_step": dict.fromkeys(METHODS, "torch traces neither zero_grad nor its optimizers' own step into a graph"),
}
#: Graphs that a step ends up with: those that differ from one for all.
NUM_GRAPHS = {
    "model": {"efficientsam": 3},  # with gradient, without, and on the chosen samples
    "first_step": {
        "friendlysam": 2,  # without an average, and with one
        "momentumsam": 2,
        "looksam": 2,  # for the first step, and for any number of steps
    },
}
NUM_GRAPHS["passes"] = {**NUM_GRAPHS["first_step"], "looksam": 3}  # and for a step that is not perturbed


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Run:
    """A model, its optimizer, and what is compiled of them, counted."""

    def __init__(self, method: str, base: str = "sgd", backend: str = "eager", **options: object) -> None:
        self.method = method
        self.model = make_model()
        base_class, base_options = BASES[base]
        self.optimizer = METHODS[method](
            self.model.parameters(), base_class, nonfinite="ignore", **{**base_options, "max_grad_norm": 0.2, **options}
        )
        self.counter = CompileCounterWithBackend(backend)
        self.num_graphs: list[int] = []  # after each step

    def compile(self, function: Callable, *, fullgraph: bool = False) -> Callable:
        return torch.compile(function, backend=self.counter, fullgraph=fullgraph)

    def train(self, step: Callable[[tuple[Tensor, Tensor]], object] | None = None) -> list[list[Tensor]]:
        """Weights after each step; a step in Python if none is given."""
        weights = []
        for number in range(NUM_STEPS):
            batch = make_batch(number)
            if step is None:
                self.optimizer.step(make_closure(self.model, batch, method=self.method))
            else:
                step(batch)
            self.num_graphs.append(self.counter.frame_count)
            with self.optimizer.at_weights():
                weights.append(copies(self.model))
        return weights


def compiled_model(run: Run) -> Callable:
    model = run.compile(run.model, fullgraph=True)
    return lambda batch: run.optimizer.step(make_closure(model, batch, method=run.method))


def compiled_step(run: Run) -> Callable:
    step = run.compile(run.optimizer.step)
    return lambda batch: step(make_closure(run.model, batch, method=run.method))


def in_halves(run: Run, first_step: Callable, second_step: Callable) -> Callable:
    def step(batch: tuple[Tensor, Tensor]) -> None:
        if not run.optimizer.second_pass_is_due():
            run.optimizer.step(make_closure(run.model, batch))
            return
        closure = make_closure(run.model, batch)
        for half in (first_step, second_step):
            run.optimizer.zero_grad()
            closure()
            half()

    return step


def compiled_first_step(run: Run) -> Callable:
    return in_halves(run, run.compile(run.optimizer.first_step, fullgraph=True), run.optimizer.second_step)


def compiled_passes(run: Run) -> Callable:
    """Forward, backward, first_step, forward and backward as one graph; then the second half in Python."""
    params = list(run.model.parameters())

    def passes(inputs: Tensor, targets: Tensor) -> None:
        nn.functional.cross_entropy(run.model(inputs), targets).backward()
        run.optimizer.first_step()
        for param in params:  # torch traces no zero_grad
            param.grad = None
        nn.functional.cross_entropy(run.model(inputs), targets).backward()

    compiled = run.compile(passes, fullgraph=True)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        run.optimizer.zero_grad()
        compiled(*batch)
        run.optimizer.second_step()

    return step


ENGINES = {
    "model": compiled_model,
    "step": compiled_step,
    "first_step": compiled_first_step,
    "passes": compiled_passes,
}
QUICK = {("model", method) for method in METHODS} | {("first_step", "sam"), ("step", "msam")}
CELLS = [
    pytest.param(engine, method, marks=[] if (engine, method) in QUICK else pytest.mark.slow)
    for engine in ENGINES
    for method in (METHODS if engine == "model" else COMPILED)
    if method not in REFUSED[engine]
]


def assert_trains_alike(compiled: list[list[Tensor]], python: list[list[Tensor]], tolerance: float = 1e-12) -> None:
    for ours, theirs in zip(compiled, python, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in COMPILED if method != "msam"])
def test_the_second_half_breaks_where_torch_does(method):
    run, python = Run(method), Run(method)
    torch._dynamo.utils.counters.clear()
    weights = run.train(in_halves(run, run.optimizer.first_step, run.compile(run.optimizer.second_step)))
    optimizer = python.optimizer
    assert_trains_alike(weights, python.train(in_halves(python, optimizer.first_step, optimizer.second_step)))
    # EfficientSAM puts other weights back each time.
    assert (run.num_graphs[2] < run.num_graphs[-1]) == (method == "efficientsam")
    breaks = torch._dynamo.utils.counters["graph_break"]
    if method not in ("gsam", "looksam", "efficientsam"):  # which look at values
        assert {reason.split("\n")[0] for reason in breaks} == {"Call to `torch._dynamo.graph_break()`"}


@pytest.mark.parametrize("method", REFUSED["whole_step"])
def test_no_whole_step_is_one_graph(method):
    run = Run(method)
    step = run.compile(run.optimizer.step, fullgraph=True)
    with (
        torch._dynamo.config.patch(trace_autograd_ops=True),
        pytest.raises(torch._dynamo.exc.Unsupported, match="skip"),
    ):
        step(make_closure(run.model, method=method))


@pytest.mark.slow
def test_the_base_optimizers_step_is_no_part_of_a_graph():
    run = Run("sam")
    halves = in_halves(run, run.optimizer.first_step, run.compile(run.optimizer.second_step, fullgraph=True))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        halves(make_batch())


@pytest.mark.parametrize("engine", ["first_step", "passes"])
def test_a_generator_is_not_traced(engine):
    run = Run("efficientsam")
    with (
        torch._dynamo.config.patch(trace_autograd_ops=engine == "passes"),
        pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch.Generator|[Oo]paque object"),
    ):
        ENGINES[engine](run)(make_batch())


CHANGES = [  # method, what a schedule changes, how it is compiled
    pytest.param("asam", "rho", compiled_first_step),
    pytest.param("wsam", "lr", compiled_step, marks=pytest.mark.slow),
    pytest.param("wsam", "tensor lr", compiled_step, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "name", "compile_it"), CHANGES)
def test_numbers_that_a_schedule_changes(method, name, compile_it):
    results = []
    for engine in (compile_it, compiled_model):
        run = Run(method, **({"lr": torch.tensor(0.1, dtype=torch.float64)} if name == "tensor lr" else {}))
        step = engine(run)

        def slower(batch, step=step, group=run.optimizer.param_groups[0]):
            step(batch)
            if name == "tensor lr":
                group["lr"].mul_(0.9)
            else:
                group[name] *= 0.9

        results.append(run.train(slower))
        assert run.num_graphs[2] == run.num_graphs[-1], "it is compiled anew in a later step"
    assert_trains_alike(*results)


@pytest.mark.slow
def test_by_inductor_over_adamw():
    """AdamW's own compiled form counts its steps in float32: 1e-6."""
    run = Run("sam", "adamw", "inductor")
    assert_trains_alike(run.train(compiled_step(run)), Run("sam", "adamw").train(), tolerance=1e-6)
    assert run.num_graphs[2] == run.num_graphs[-1], "it is compiled anew in a later step"


# Last: torch.compile of second_step fails in a process that has compiled both passes as one graph (torch 2.14.1).
@pytest.mark.parametrize(("engine", "method"), CELLS)
def test_it_trains_as_python_does(engine, method):
    run = Run(method)
    with torch._dynamo.config.patch(trace_autograd_ops=engine == "passes"):
        weights = run.train(ENGINES[engine](run))
    assert_trains_alike(weights, Run(method).train())
    assert run.num_graphs[2] == run.num_graphs[-1], "it is compiled anew in a later step"
    if engine != "step":
        assert run.num_graphs[-1] == NUM_GRAPHS[engine].get(method, 1)
