"""What both ranks of test_trainers_ddp.py do: train with every method in each trainer, write the weights to a file.

torchrun --standalone --nproc-per-node 2 trainer_ranks.py FOLDER
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import TrainingArguments

from sam_cases import BASES, METHODS, copies, make_model, method_class
from sam_core.integrations.hugging_face import SAMTrainer
from sam_core.integrations.lightning import SharpnessAwareCallback

NUM_STEPS, SHARE = 3, 8  # samples of a step on each rank
LOCAL = ("sam", "asam", "memoryefficientsam")
ACCUMULATED = ("gsam", "looksam", "msam")


def make_data() -> TensorDataset:
    """Each trainer deals it out in its own way, but a step is always 16 samples that follow each other."""
    generator = torch.Generator().manual_seed(5)
    num = 2 * SHARE * NUM_STEPS
    inputs = torch.randn(num, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(3, (num,), generator=generator))


def make_optimizer(model: nn.Module, method: str):
    return METHODS[method](model.parameters(), BASES["sgd"][0], **BASES["sgd"][1])


def accelerated(method: str, *, local: bool = False, sharded: bool = False) -> list[torch.Tensor]:
    accelerator, net = sharding_accelerator() if sharded else Accelerator(cpu=True), make_model()
    optimizer = make_optimizer(net, method)
    model, _, loader = accelerator.prepare(net, optimizer, DataLoader(make_data(), batch_size=SHARE))
    for inputs, targets in loader:

        def closure(inputs=inputs, targets=targets):
            loss = cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            return loss

        def sample_losses(indices=slice(None), inputs=inputs, targets=targets):
            return cross_entropy(model(inputs[indices]), targets[indices], reduction="none")

        context = accelerator.no_sync(model) if local else None
        optimizer.step(sample_losses if optimizer.takes_sample_losses else closure, ascent_context=context)
    with optimizer.at_weights():
        return [p.full_tensor().clone() for p in model.parameters()] if sharded else copies(net)


def sharding_accelerator() -> Accelerator:
    """FSDP2 by accelerate, which keeps it for GPUs: on a CPU it must be told."""
    AcceleratorState._reset_state()
    options = {"auto_wrap_policy": "no_wrap", "cpu_ram_efficient_loading": False}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


class Module(LightningModule):
    def __init__(self, method: str, local: bool) -> None:
        super().__init__()
        self.net, self.method, self.local = make_model(), method, local

    def training_step(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return make_optimizer(self.net, self.method)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        context = self.trainer.strategy.block_backward_sync if self.local else None
        optimizer.step(optimizer_closure, ascent_context=context)


def lightning(method: str, *, local: bool = False) -> list[torch.Tensor]:
    module = Module(method, local)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    strategy = DDPStrategy(process_group_backend="gloo")
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "use_distributed_sampler": False, **quiet}
    trainer = LightningTrainer(max_epochs=1, callbacks=[SharpnessAwareCallback()], **options)
    sampler = DistributedSampler(make_data(), num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(make_data(), batch_size=SHARE, sampler=sampler))
    return copies(module.net)


class Labelled(nn.Module):
    """What a transformers model looks like to the Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, inputs, labels):
        return {"loss": cross_entropy(self.net(inputs), labels)}


def hugging_face(method: str, folder: str, accumulation: int = 1) -> list[torch.Tensor]:
    model = Labelled()
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        save_strategy="no",
        max_grad_norm=0,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        per_device_train_batch_size=SHARE // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    data = [{"inputs": inputs, "labels": targets} for inputs, targets in make_data()]
    SAMTrainer(model, arguments, train_dataset=data, optimizers=(make_optimizer(model, method), None)).train()
    return copies(model.net)


def main(folder: str) -> None:
    warnings.simplefilter("ignore")  # what the trainers say to each other is not tested here
    torch.set_num_threads(1)
    gc.freeze()  # Hugging Face's Trainer collects garbage each time
    seen = {}
    for method in METHODS:
        seen["accelerate", method] = accelerated(method)
        if not method_class(method).takes_sample_losses:
            seen["hugging_face", method] = hugging_face(method, folder)
            seen["lightning", method] = lightning(method)
    for method in ACCUMULATED:
        seen["hugging_face accumulated", method] = hugging_face(method, folder, accumulation=2)
    for method in LOCAL:
        seen["accelerate local", method] = accelerated(method, local=True)
        seen["lightning local", method] = lightning(method, local=True)
    for method in METHODS:  # last: accelerate leaves a mark of it in the environment
        if not method_class(method).takes_sample_losses:
            seen["accelerate fsdp2", method] = accelerated(method, sharded=True)
    torch.save(seen, Path(folder) / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
