"""The names that every configuration may use: each was read, and neither runs nor loads what its arguments say.

What is left out on purpose:

- whatever unpickles or imports: ``torch.load``, ``torch.hub``, ``load_from_checkpoint``;
- functions, but for a few that only make tensors and splits;
- callbacks and strategies that take functions or read files of their own (`LambdaCallback`, `DeepSpeedStrategy`);
- loggers that speak to a service: they send the user's credentials to an address that the configuration chooses;
- metrics that download models, or load one by name (text, image, audio, video, multimodal).

`ModelCheckpoint` is in: it writes pickles, but reads none, and removes only what it wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["LEFT_OUT", "REVIEWED", "Reviewed"]


@dataclass(frozen=True, slots=True)
class Reviewed:
    """One exact name; or a pattern, with what a class below it must be.

    Attributes:
        pattern: An exact name, or one that ends in ``.*``.
        bases: The class must be one of these, or derive from it. Full names, so that nothing is imported to compare.
        homes: The class must be defined in one of these packages or modules.
    """

    pattern: str
    bases: tuple[str, ...] = ()
    homes: tuple[str, ...] = ()


_LIGHTNING = {
    "": "Trainer LightningDataModule.from_datasets",
    "callbacks": "BackboneFinetuning BatchSizeFinder DeviceStatsMonitor EarlyStopping EMAWeightAveraging "
    "GradientAccumulationScheduler LearningRateFinder LearningRateMonitor ModelCheckpoint ModelPruning ModelSummary "
    "OnExceptionCheckpoint RichModelSummary RichProgressBar SpikeDetection StochasticWeightAveraging "
    "ThroughputMonitor Timer TQDMProgressBar WeightAveraging",
    "loggers": "CSVLogger TensorBoardLogger",
    "profilers": "AdvancedProfiler PassThroughProfiler PyTorchProfiler SimpleProfiler",
    "strategies": "DDPStrategy FSDPStrategy ModelParallelStrategy SingleDeviceStrategy",
}
_OWN = (
    "AnyOf Budget CheckpointManager Checkpointer ElasticSampler EveryEpochs EverySeconds EverySteps KeepAll KeepBest "
    "Golden KeepEveryEpochs KeepEverySteps KeepLast KeepTagged KeepWithin OnException OnImprovement OnSignal "
    "PerSampleSeed Union"
)
_TORCH = "Generator Size device tensor"
_TORCH_DATA = (
    "BatchSampler ChainDataset ConcatDataset DataLoader DistributedSampler RandomSampler SequentialSampler "
    "StackDataset Subset SubsetRandomSampler TensorDataset WeightedRandomSampler default_collate random_split"
)
_METRICS = "aggregation classification clustering collections nominal regression retrieval segmentation wrappers"

LEFT_OUT = {
    "LambdaCallback": "its arguments are functions; write a callback of your own",
    "DeepSpeedStrategy": "it reads a configuration file of its own",
    **dict.fromkeys(
        ("WandbLogger", "MLFlowLogger", "CometLogger", "LitLogger", "NeptuneLogger"),
        "it speaks to a service with your credentials, at an address that the configuration can choose",
    ),
}


def _reviewed() -> Iterator[Reviewed]:
    module, optimizer, scheduler = (
        "torch.nn.modules.module.Module",
        "torch.optim.optimizer.Optimizer",
        "torch.optim.lr_scheduler.LRScheduler",
    )
    yield Reviewed("torch.nn.*", bases=(module,), homes=("torch.nn",))
    yield Reviewed("torch.optim.*", bases=(optimizer, scheduler, module), homes=("torch.optim",))
    homes = tuple(f"torchmetrics.{name}" for name in _METRICS.split())
    yield Reviewed("torchmetrics.*", bases=("torchmetrics.metric.Metric", module), homes=homes)
    for name in _TORCH.split():
        yield Reviewed(f"torch.{name}")
    for name in _TORCH_DATA.split():
        yield Reviewed(f"torch.utils.data.{name}")
    yield Reviewed("torch.utils.data.distributed.DistributedSampler")
    yield Reviewed("torchdata.stateful_dataloader.StatefulDataLoader")
    for tree in ("lightning.pytorch", "pytorch_lightning"):
        for room, names in _LIGHTNING.items():
            for name in names.split():
                yield Reviewed(f"{tree}.{room}.{name}" if room else f"{tree}.{name}")
    yield Reviewed("lightning.Trainer")
    for name in _OWN.split():
        yield Reviewed(f"ckptmgr.{name}")


REVIEWED: tuple[Reviewed, ...] = tuple(_reviewed())
