"""Estimates of memory and communication against what small models really allocate and send, up to 1,024 ranks."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

import sam_core
from sam_core.planning import (
    BASE_OPTIMIZERS,
    METHOD_NAMES,
    Collective,
    estimate_communication,
    estimate_memory,
    method_costs,
    record_collectives,
    record_memory,
    ring_bytes,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

import optimizer_scale
from simulated_ranks import simulated_ranks
from small_models import (
    FULL_PRECISION,
    OPTIMIZERS,
    K,
    LanguageModel,
    count_collectives,
    make_distributed,
    matrices,
    measure_memory,
    measure_single,
)

NUM_PARAMS = sum(p.numel() for p in matrices().parameters())
BF16 = torch.bfloat16
MIXED = MixedPrecisionPolicy(BF16, torch.float32)


def assert_close(measured, estimate, *, rtol, closures=True):
    """EfficientSAM's backward runs outside its closure: of that method the peak alone is compared."""
    torch.testing.assert_close(measured.resident, estimate.resident, rtol=rtol, atol=0)
    torch.testing.assert_close(measured.peak, estimate.peak, rtol=rtol, atol=0)
    if closures:
        torch.testing.assert_close(measured.in_closure, estimate.in_closure, rtol=rtol, atol=0)
        torch.testing.assert_close(measured.in_step, estimate.in_step, rtol=rtol, atol=0)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_every_method_is_known():
    assert set(METHOD_NAMES) == {"base", *sam_core.METHODS}
    assert set(BASE_OPTIMIZERS) == set(OPTIMIZERS)


@pytest.mark.parametrize("base", ["sgd_momentum", "adamw"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_memory_on_one_device(method, base):
    estimate = estimate_memory(NUM_PARAMS, method, base, k=K)
    assert_close(measure_single(method, base), estimate, rtol=0.01, closures=method != "efficientsam")


@pytest.mark.parametrize("base", sorted(set(BASE_OPTIMIZERS) - {"sgd_momentum", "adamw"}))
def test_memory_of_other_base_optimizers(base):
    """5 %: Adafactor's rows and columns are taken as none."""
    assert_close(measure_single("sam", base), estimate_memory(NUM_PARAMS, "sam", base), rtol=0.05)


@pytest.mark.parametrize("method", ["base", "sam", "asam", "gsam", "wsam", "friendlysam", "looksam", "msam"])
def test_memory_of_half_parameters(method):
    estimate = estimate_memory(NUM_PARAMS, method, param_dtype=BF16, k=K)
    assert_close(measure_single(method, "adamw", dtype=BF16), estimate, rtol=0.02)


@pytest.mark.parametrize("method", ["base", "sam", "wsam"])
def test_memory_without_fused_lists_and_under_autocast(method):
    estimate = estimate_memory(NUM_PARAMS, method, foreach=False)
    assert_close(measure_single(method, "adamw", foreach=False), estimate, rtol=0.05)
    estimate = estimate_memory(NUM_PARAMS, method, compute_dtype=BF16)
    assert_close(measure_single(method, "adamw", autocast=BF16), estimate, rtol=0.02)


@pytest.mark.parametrize("method", ["sam", "gsam", "asam", "momentumsam"])
def test_memory_with_a_loss_scaler(method):
    """SGD, whose own step takes little, so that the move to w + e is the peak."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    measured = measure_single(method, "sgd", scaler=scaler, foreach=False)
    assert_close(measured, estimate_memory(NUM_PARAMS, method, "sgd", grad_scaler=True, foreach=False), rtol=0.01)


def test_looksam_with_k_of_one_keeps_nothing():
    estimate = estimate_memory(NUM_PARAMS, "looksam", k=1)
    assert estimate.method_state == 0
    assert_close(measure_single("looksam", "adamw", k=1), estimate, rtol=0.01)


def test_bytes_of_a_parameter_by_hand():
    """float32: w 4, gradient 4, Adam's moments 8, backup 4, gradient at w 4; fused lists 4."""
    assert [estimate_memory(100, m).peak_per_parameter for m in ("base", "sam", "gsam")] == [20, 20, 24]
    sharded = estimate_memory(10**6, "gsam", sharding="fsdp", num_ranks=8, unit_params=10)
    assert sharded.in_step == 10**6 * 24 // 8
    scaled = estimate_memory(100, "sam", "sgd", grad_scaler=True, compute_dtype=torch.float16)
    assert scaled.temporaries == 800 and scaled.compute == 0
    assert estimate_memory(100, "gsam", "sgd", grad_scaler=True).temporaries == 800
    assert estimate_memory(100, "base", param_dtype=BF16, compute_dtype=torch.float32).compute == 200


SHAPE = {"depth": 24, "width": 64, "hidden": 256}


def measure_simulated(method, num_ranks, sharding, *, vocabulary=128, **options):
    def make():
        return make_distributed(method, "adamw", sharding, LanguageModel(**SHAPE, vocabulary=vocabulary), **options)

    torch.manual_seed(0)
    with simulated_ranks(num_ranks):
        return measure_memory(make, num_steps=2)


def sizes(vocabulary=128):
    model = LanguageModel(**SHAPE, vocabulary=vocabulary)
    return sum(p.numel() for p in model.parameters()), model.unit_params, model.root_params


@pytest.mark.parametrize(
    ("method", "policy", "num_ranks", "vocabulary"),
    [("base", FULL_PRECISION, 8, 128), ("sam", MIXED, 8, 128), ("gsam", FULL_PRECISION, 64, 1024)],
)
def test_memory_under_fsdp(method, policy, num_ranks, vocabulary):
    """The last has a root of two units, on so many ranks that the gathered ones are most of all."""
    num_params, unit_params, root_params = sizes(vocabulary)
    dtypes = {} if policy == FULL_PRECISION else {"compute_dtype": BF16, "reduce_dtype": torch.float32}
    units = {"unit_params": unit_params, "root_params": root_params}
    estimate = estimate_memory(num_params, method, sharding="fsdp", num_ranks=num_ranks, **units, **dtypes)
    measured = measure_simulated(method, num_ranks, "fsdp", policy=policy, vocabulary=vocabulary)
    assert_close(measured, estimate, rtol=0.05)


@pytest.mark.parametrize(("method", "views"), [("base", True), ("sam", False), ("sam", True), ("gsam", False)])
def test_memory_under_ddp(method, views):
    options = {"foreach": True, "gradient_as_bucket_view": views}
    estimate = estimate_memory(sizes()[0], method, sharding="ddp", num_ranks=2, **options)
    assert estimate.buckets == (0 if views else estimate.parameters)
    assert_close(measure_simulated(method, 2, "ddp", **options), estimate, rtol=0.05)


# Communication --------------------------------------------------------------------------------------------------------


def count(method, sharding, num_ranks, **options):
    """Bytes sent, collectives and single numbers a step, counted; and the same estimated."""
    bucket_bytes = 2 * 1024 * 8 * 4  # two tensors
    torch.manual_seed(0)
    with simulated_ranks(num_ranks):
        model = LanguageModel(depth=3, width=8, hidden=1024, vocabulary=1024)
        buckets = {"bucket_cap_mb": bucket_bytes / 2**20} if sharding == "ddp" else {}
        collectives = count_collectives(
            make_distributed(method, "sgd_momentum", sharding, model, **buckets, **options)[0]
        )
    large = [call for call in collectives if call.num_bytes > 8]
    counted = (sum(call.bytes_sent(num_ranks) for call in large), len(large), len(collectives) - len(large))
    estimate = estimate_communication(
        sum(p.numel() for p in model.parameters()),
        method,
        sharding=sharding,
        num_ranks=num_ranks,
        ascent="local" if options.get("local", True) else "synchronised",
        num_units=3,
        root_params=model.root_params,
        bucket_bytes=bucket_bytes,
        k=K,
    )
    return tuple(n / K for n in counted), (estimate.bytes_sent, estimate.num_collectives, estimate.num_scalars)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_communication_of_every_method(method, sharding):
    counted, estimated = count(method, sharding, num_ranks=4)
    assert counted == pytest.approx(estimated)


@pytest.mark.parametrize("method", ["sam", "gsam", "efficientsam"])
def test_communication_of_a_synchronised_ascent(method):
    counted, estimated = count(method, "ddp", num_ranks=4, local=False)
    assert counted == pytest.approx(estimated)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_communication_from_1_to_1024_ranks(sharding):
    """Weak scaling: bytes grow as (N - 1) / N, collectives do not grow; one rank has nobody to send to."""
    bytes_sent = []
    powers = range(0, 11, 2)
    for num_ranks in (2**i for i in powers):
        counted, estimated = count("sam", sharding, num_ranks)
        bytes_sent.append(counted[0])
        assert counted[0] == pytest.approx(estimated[0])
        if num_ranks > 1:
            assert counted == pytest.approx(estimated)
    assert bytes_sent[0] == 0
    shares = [sent / bytes_sent[-1] for sent in bytes_sent[1:]]
    assert shares == pytest.approx([(1 - 1 / 2**i) / (1 - 1 / 1024) for i in powers[1:]])


def test_sam_with_a_local_ascent_sends_what_plain_training_sends():
    sent = {m: estimate_communication(10**9, m, sharding="ddp", num_ranks=64).bytes_sent for m in METHOD_NAMES}
    twice = {"gsam", "wsam", "friendlysam", "momentumsam"}
    assert {m: s / sent["base"] for m, s in sent.items()} == pytest.approx(
        {m: 2 if m in twice else 1.2 if m == "looksam" else 1 for m in METHOD_NAMES}
    )
    both = {
        ascent: estimate_communication(10**9, "sam", sharding="ddp", num_ranks=2, ascent=ascent)
        for ascent in ("local", "synchronised")
    }
    assert both["synchronised"].bytes_sent == 2 * both["local"].bytes_sent
    assert estimate_communication(100, "sam", sharding="none", num_ranks=1).bytes_sent == 0


def test_half_types_halve_what_fsdp_gathers():
    whole = estimate_communication(1000, "sam", sharding="fsdp", num_ranks=4)
    mixed = estimate_communication(
        1000, "sam", sharding="fsdp", num_ranks=4, compute_dtype=BF16, reduce_dtype=torch.float32
    )
    assert mixed.all_gathered == whole.all_gathered / 2 and mixed.reduce_scattered == whole.reduce_scattered


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_ring_bytes_by_walking_round_the_ring(num_ranks):
    """Each rank hands one part on in each of N - 1 rounds: once to reduce and scatter, once to gather."""
    part, sent = 60 // num_ranks, {"reduce_scatter": 0, "all_gather": 0}
    for kind in sent:
        for _ in range(num_ranks - 1):
            sent[kind] += part
    assert ring_bytes("reduce_scatter", 60, num_ranks) == sent["reduce_scatter"]
    assert ring_bytes("all_gather", 60, num_ranks) == sent["all_gather"]
    assert ring_bytes("all_reduce", 60, num_ranks) == sum(sent.values())


def test_step_seconds_by_hand():
    """1e9 float32 on 2 ranks send 4e9 bytes a pass: 2 s at 2e9 bytes a second, beside passes of 1 s."""
    times = {
        method: estimate_communication(10**9, method, sharding="ddp", num_ranks=2).step_seconds(
            pass_seconds=1.0, bytes_per_second=2e9
        )
        for method in ("base", "sam", "gsam", "looksam", "memoryefficientsam", "efficientsam")
    }
    assert times["base"] == pytest.approx((2, 3))
    assert times["sam"] == pytest.approx((3, 4))  # a pass without, then one with
    assert times["gsam"] == pytest.approx((4, 6))
    assert times["looksam"] == pytest.approx((2.4, 3.6))
    assert times["memoryefficientsam"] == pytest.approx((4 / 3 + 2, 8 / 3 + 2))  # each pass takes 4/3
    assert times["efficientsam"] == pytest.approx((7 / 6 + 2, 5 / 3 + 2))  # the one that sends takes 1/2
    alone = estimate_communication(10**9, "memoryefficientsam", sharding="none", num_ranks=1)
    assert alone.step_seconds(pass_seconds=3.0, bytes_per_second=1.0) == pytest.approx((8, 8))


def test_the_docs_hold_the_tables_that_the_benchmark_prints():
    page = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    for title, lines in optimizer_scale.tables().items():
        assert "\n".join(lines) in page, title
    for number in (optimizer_scale.NUM_PARAMS, optimizer_scale.BLOCK, optimizer_scale.ROOT):
        assert f"{number:,}" in page


# Recording ------------------------------------------------------------------------------------------------------------


def test_memory_is_recorded_by_name():
    with record_memory() as record:
        kept = torch.zeros(1000)
        with torch.profiler.record_function("outer"):
            more = [torch.zeros(2000)]
            with torch.profiler.record_function("inner"):
                more.append(torch.zeros(4000))
            more.clear()
            more.append(torch.zeros(500))
    assert (record.final, record.peak(), record.peak("inner")) == (6000, 28000, 28000)
    assert record.peak("outer", outside="inner") == 12000
    assert record.peak("unknown") == 0
    del kept


def test_collectives_are_recorded_once():
    """Functional ones call the plain ones: each counts once."""
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as functional

    with simulated_ranks(4), record_collectives() as collectives:
        dist.all_reduce(torch.zeros(3))
        dist.all_gather_single(torch.zeros(8), torch.zeros(2))
        dist.reduce_scatter_single(torch.zeros(2), torch.zeros(8))
        dist.broadcast(torch.zeros(5), src=0)
        dist.barrier()
        functional.all_reduce(torch.zeros(7), "sum", dist.group.WORLD).sum()
        functional.all_gather_single(torch.zeros(2), 0, dist.group.WORLD).sum()
        functional.reduce_scatter_single(torch.zeros(8), "sum", 0, dist.group.WORLD).sum()
    kinds = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_reduce", "all_gather", "reduce_scatter"]
    assert collectives == [Collective(*pair) for pair in zip(kinds, [12, 32, 32, 20, 28, 32, 32], strict=True)]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_params": 0}, r"num_params must be an integer >= 1, got 0\."),
        ({"method": "adam"}, r"method must be one of 'base', .*, got 'adam'\."),
        ({"base_optimizer": "lion"}, r"base_optimizer must be one of 'sgd', .*, got 'lion'\."),
        ({"param_dtype": torch.int8}, r"param_dtype must be one of .*, got torch\.int8\."),
        ({"compute_dtype": 16}, r"compute_dtype must be one of None, .*, got 16\."),
        ({"reduce_dtype": 16}, r"reduce_dtype must be one of None, .*, got 16\."),
        ({"sharding": "zero"}, r"sharding must be one of 'none', 'ddp', 'fsdp', got 'zero'\."),
        ({"num_ranks": 0}, r"num_ranks must be an integer >= 1, got 0\."),
        ({"num_ranks": 2}, r"num_ranks must be 1 without sharding, got 2\."),
        ({"sharding": "fsdp"}, r"unit_params must be an integer >= 1, got 0\."),
        ({"root_params": -1}, r"root_params must be an integer >= 0, got -1\."),
        ({"unit_params": 60, "root_params": 50}, r"unit_params \+ root_params must be <= num_params = 100, got 110\."),
        ({"foreach": "yes"}, r"foreach must be one of None, True, False, got 'yes'\."),
        ({"gradient_as_bucket_view": 2}, r"gradient_as_bucket_view must be one of True, False, got 2\."),
        ({"grad_scaler": "x"}, r"grad_scaler must be one of True, False, got 'x'\."),
        ({"k": 0}, r"k must be an integer >= 1, got 0\."),
        ({"perturbation_ratio": 0}, r"perturbation_ratio must be in \(0, 1\], got 0\."),
    ],
)
def test_memory_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(**{"num_params": 100, "method": "sam", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_params": 1.5}, r"num_params must be an integer >= 1, got 1\.5\."),
        ({"method": "SAM"}, r"method must be one of 'base', .*, got 'SAM'\."),
        ({"sharding": None}, r"sharding must be one of 'none', 'ddp', 'fsdp', got None\."),
        ({"ascent": "global"}, r"ascent must be one of 'local', 'synchronised', got 'global'\."),
        ({"num_ranks": 1.0}, r"num_ranks must be an integer >= 1, got 1\.0\."),
        ({"num_units": 0}, r"num_units must be an integer >= 1, got 0\."),
        ({"root_params": 200}, r"unit_params \+ root_params must be <= num_params = 100, got 200\."),
        ({"bucket_bytes": 0}, r"bucket_bytes must be an integer >= 1, got 0\."),
        ({"param_dtype": None}, r"param_dtype must be one of .*, got None\."),
    ],
)
def test_communication_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_communication(**{"num_params": 100, "method": "sam", "sharding": "ddp", "num_ranks": 4, **options})


def test_other_refusals():
    with pytest.raises(ValueError, match=r"sample_ratio must be in \(0, 1\], got 1\.5\."):
        method_costs("efficientsam", sample_ratio=1.5)
    with pytest.raises(ValueError, match=r"kind must be one of 'all_reduce', .*, got 'gather'\."):
        ring_bytes("gather", 1, 2)
    with pytest.raises(ValueError, match=r"num_bytes must be finite, got nan\."):
        ring_bytes("all_reduce", math.nan, 2)
    estimate = estimate_communication(10, "sam", sharding="ddp", num_ranks=2)
    with pytest.raises(ValueError, match=r"bytes_per_second must be > 0, got 0\."):
        estimate.step_seconds(pass_seconds=1, bytes_per_second=0)
    with pytest.raises(ValueError, match=r"pass_seconds must be >= 0, got -1\."):
        estimate.step_seconds(pass_seconds=-1, bytes_per_second=1)
