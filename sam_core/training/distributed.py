"""Distributed training: each rank looks for the worst neighbour of its own batch, and all step with the mean gradient.

That is m-sharpness with m the batch of a rank (Foret et al. 2021, section 4.1), and it communicates as much as plain
training does: the first of the two passes concerns this rank alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from sam_core._dtensors import is_dtensor
from sam_core.optimizers.wrapper import OptimizerWrapper
from sam_core.training.accumulation import Batch, Loss
from sam_core.training.loops import train_one_epoch
from sam_core.training.ranks import Ranks, check_ranks_agree

_logger = logging.getLogger(__name__)


def train_sam_distributed(
    model: nn.Module,
    train_loader: Iterable[Batch],
    optimizer: OptimizerWrapper,
    device: str | torch.device | None = None,
    loss_fn: Loss = cross_entropy,
    *,
    sync_ascent: bool = False,
    accumulation_steps: int = 1,
    m_sharpness: bool = False,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> nn.Module:
    """Train for one epoch on several ranks, of which each calls this with its own part of the data.

    With ranks r = 1..R of batch losses L_r, the base optimizer steps on every rank with

        (1 / R) sum_r grad L_r(w + e_r),    e_r the perturbation by grad L_r(w), or by (1 / R) sum_s grad L_s(w)

    without ``sync_ascent`` or with it. Methods that step with the first gradient, or keep it, always synchronise it. A
    rank's batch counts the same whatever its size. Where a gradient of one rank is not finite, all skip the step, or
    all raise. Afterwards weights are checked to be equal bit for bit, and so are buffers (running statistics), which
    are made rank 0's first, unless the model was told not to broadcast them. The mean loss over steps and ranks goes to
    the log ``sam_core.training.distributed`` of rank 0 at level INFO.

    Args:
        model: DistributedDataParallel, compiled or not; or an FSDP2 module (``fully_shard``), with ``sync_ascent``; or,
            in a single process, any module. Trained in place, left in training mode.
        train_loader: gives (inputs [n, ...], targets [n, ...]), equally often on each rank; loaders without a length
            cost one number of communication a batch. ``set_epoch`` of a DistributedSampler is called by whoever calls
            this.
        optimizer: any optimizer of sam_core, made of the parameters of ``model``.
        device: where the model is; None: the same.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over samples; for EfficientSAM each sample's loss, e.g.
            ``partial(cross_entropy, reduction="none")``.
        sync_ascent: all ranks look for the worst neighbour of their common batch; one more all-reduce a step.
        accumulation_steps: batches of the loader that make one step, >= 1; gradients are summed over ranks after the
            last one.
        m_sharpness: each of these batches looks for its own worst neighbour, see :meth:`SAM.step_m_sharpness`.
        grad_scaler: scales the losses; updated after each step. Its scale stays the same on all ranks.

    Returns:
        The model.

    Raises:
        ValueError: for a bad option, or loaders of different length: before the first step, or, if they have none, on
            all ranks when the first of them ends.
        FloatingPointError: for a non-finite gradient of any rank, if the optimizer has ``nonfinite="raise"``.
        RuntimeError: if weights differ between ranks, e.g. since they were changed on one of them.

    Example:
        >>> model = torch.nn.Linear(3, 2)  # under torchrun: DistributedDataParallel(model)
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> loader = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(6)]
        >>> model = train_sam_distributed(model, loader, optimizer)
    """
    plain = getattr(model, "_orig_mod", model)  # where torch.compile keeps it
    ddp = plain if isinstance(plain, DistributedDataParallel) else None
    own = next(model.parameters()).device
    ranks = Ranks.of(ddp.process_group if ddp is not None else None, own)
    _check(model, ddp, optimizer, ranks, sync_ascent=sync_ascent, m_sharpness=m_sharpness)
    is_local = accumulation_steps > 1 or (not sync_ascent and getattr(optimizer, "local_ascent", False))
    if ddp is not None and is_local and ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued:
        raise ValueError(
            "model must have made a backward before if it has static_graph=True: the first one fixes the graph, "
            "and must not be a local one, as ascent and accumulation have."
        )
    wanted = own if device is None else torch.device(device)
    if wanted.type != own.type or wanted.index not in (None, own.index):
        raise ValueError(f"device must be the model's, {own}, got {str(device)!r}.")
    loss = train_one_epoch(
        model,
        ranks.in_step(train_loader),
        optimizer,
        accumulation_steps,
        loss_fn,
        m_sharpness=m_sharpness,
        grad_scaler=grad_scaler,
        no_sync=None if ddp is None or sync_ascent else ddp.no_sync,
    )
    mean_loss = sum(ranks.gather(float(loss))) / ranks.num_ranks
    if ranks.number == 0:
        _logger.info("loss %.4f", mean_loss)
    if ddp is not None:
        common, buffers = dict(ddp.module.named_parameters()), dict(ddp.module.named_buffers())
        for name in ddp.parameters_to_ignore:
            common.pop(name, None)
            buffers.pop(name, None)
        if ddp.broadcast_buffers:
            ranks.broadcast_(buffers.values())
            common |= buffers
        with optimizer.at_weights():
            check_ranks_agree(common, ranks.group)
    return model


def _check(
    model: nn.Module,
    ddp: DistributedDataParallel | None,
    optimizer: OptimizerWrapper,
    ranks: Ranks,
    *,
    sync_ascent: bool,
    m_sharpness: bool,
) -> None:
    """Refuse what would hang, or train each rank apart."""
    sharded = any(map(is_dtensor, model.parameters()))
    if ddp is None and not sharded and ranks.num_ranks > 1:
        raise ValueError(
            f"model must be a DistributedDataParallel or an FSDP2 module on {ranks.num_ranks} ranks, "
            f"got {type(model).__name__}: each rank would train apart."
        )
    if sharded and not sync_ascent:
        raise ValueError("sync_ascent must be True for an FSDP2 module: no rank has a gradient of its own.")
    if sync_ascent and m_sharpness:
        raise ValueError("sync_ascent must be False with m_sharpness=True: each batch has its own worst neighbour.")
    if sync_ascent and ddp is not None and optimizer.takes_sample_losses:
        raise ValueError(
            f"sync_ascent must be False for {type(optimizer).__name__}: its first gradient is that of some parameters, "
            "and DistributedDataParallel synchronises all or none."
        )
