"""What a Trainer has logged so far: metrics that callbacks and schedulers decide by, and means under way.

A checkpoint of Lightning's holds none of it, so after a restart in mid-epoch the mean of an epoch is that of its rest,
a scheduler that follows a metric of the last step fails, and so on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["capture_metrics", "fresh_metrics", "restore_metrics", "validation_metrics"]

_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "metric_attribute",
)
_STORES = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def fresh_metrics(
    trainer: Any, *, is_epoch_done: bool, validation_names: set[str], has_validated: bool
) -> dict[str, float]:
    """Return the scalar metrics that describe the state right now, by name.

    A Trainer keeps metrics until they are logged again. Those of an earlier validation or epoch are left out: they say
    nothing about this step.

    Args:
        trainer: At a step boundary.
        is_epoch_done: The metrics of the epoch have been computed.
        validation_names: What validation logs.
        has_validated: Validation ran after the last optimizer step.
    """
    metrics = dict(trainer.callback_metrics)
    if not is_epoch_done:
        of_step = set(trainer.fit_loop.epoch_loop._results.metrics(True)["callback"])
        metrics = {name: value for name, value in metrics.items() if name in of_step | validation_names}
    return {
        name: float(value)
        for name, value in metrics.items()
        if (has_validated or name not in validation_names)
        and (isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1))
    }


def validation_metrics(trainer: Any) -> set[str]:
    """Return the names of the metrics of the validation that has just ended. Called in ``on_validation_end``."""
    results = trainer.fit_loop.epoch_loop.val_loop._results
    return set(results.metrics(False)["callback"])


def capture_metrics(trainer: Any) -> dict[str, Any]:
    """Return the logged metrics, the means under way, and the state of torchmetrics in the module."""
    connector = trainer._logger_connector
    results = trainer.fit_loop.epoch_loop._results
    return {
        "stores": {name: dict(getattr(connector, name)) for name in _STORES},
        "first_loop_iter": connector._first_loop_iter,
        "current_fx": connector._current_fx,
        "results": [_capture_result(metric) for metric in results.values()],
        "modules": {name: _capture_metric(metric) for name, metric in _metrics_of(trainer.lightning_module)},
    }


def restore_metrics(trainer: Any, tree: Mapping[str, Any], *, is_new_rank: bool = False) -> None:
    """Put captured metrics back.

    Args:
        trainer: The Trainer.
        tree: What `capture_metrics` returned.
        is_new_rank: They are those of another rank. What that one has gathered so far is not gathered twice.
    """
    connector = trainer._logger_connector
    device = trainer.strategy.root_device
    modules = dict(_metrics_of(trainer.lightning_module))
    for name, saved in tree["modules"].items():
        if name in modules and is_new_rank:
            modules[name].reset()
        elif name in modules:
            _restore_metric(modules[name], saved)
    for name in _STORES:
        values = {key: _on(device, value) for key, value in tree["stores"][name].items()}
        setattr(connector, name, values)
    results = trainer.fit_loop.epoch_loop._results
    for saved in tree["results"]:
        _restore_result(trainer, results, _emptied(saved) if is_new_rank else saved, modules)
    connector._first_loop_iter = tree["first_loop_iter"]
    connector._current_fx = tree["current_fx"]


def _capture_result(metric: Any) -> dict[str, Any]:
    meta = metric.meta
    captured = {
        "meta": {name: getattr(meta, name) for name in _META},
        "dataloader_idx": meta.dataloader_idx,
        "reduce_fx": meta.reduce_fx.__name__,
        "sync_dist": meta.sync._should,
        "rank_zero_only": meta.sync.rank_zero_only,
        "is_tensor": metric.is_tensor,
        "has_reset": metric.has_reset,
        "forward_cache": metric._forward_cache,
        "update_count": metric._update_count,
    }
    if metric.is_tensor:
        captured["value"] = metric.value
        if meta.is_mean_reduction:
            captured["cumulated_batch_size"] = metric.cumulated_batch_size
    return captured


def _emptied(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a mean or a sum to which this rank has added nothing. A smallest or largest value stays what it is."""
    names = [name for name in ("value", "cumulated_batch_size") if name in saved]
    if saved["reduce_fx"] not in ("mean", "sum"):
        return saved
    return {**saved, **{name: torch.zeros_like(torch.as_tensor(saved[name])) for name in names}}


def _restore_result(trainer: Any, results: Any, saved: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    meta = saved["meta"]
    value: Any = torch.zeros((), device=trainer.strategy.root_device)
    if not saved["is_tensor"]:
        value = modules.get(str(meta["metric_attribute"]))
        if value is None:
            return
    index = saved["dataloader_idx"]
    suffix = "" if index is None else f".{index}"
    options = {name: meta[name] for name in _META if name not in ("fx", "name")}
    results.dataloader_idx = index
    # `log` registers the metric; what it accumulates is replaced below.
    results.log(
        meta["fx"].removesuffix(suffix) if suffix else meta["fx"],
        meta["name"],
        value,
        reduce_fx=saved["reduce_fx"],
        sync_dist=saved["sync_dist"],
        sync_dist_fn=trainer.strategy.reduce,
        rank_zero_only=saved["rank_zero_only"],
        batch_size=1,
        **options,
    )
    metric = results[f"{meta['fx'].removesuffix(suffix) if suffix else meta['fx']}.{meta['name']}{suffix}"]
    results.dataloader_idx = None
    for name in ("value", "cumulated_batch_size"):
        if name in saved:
            setattr(metric, name, _on(trainer.strategy.root_device, saved[name]))
    metric._forward_cache = _on(trainer.strategy.root_device, saved["forward_cache"])
    metric._update_count = saved["update_count"]
    metric._computed = None
    metric.has_reset = saved["has_reset"]


def _metrics_of(module: Any) -> Iterator[tuple[str, Any]]:
    # Lightning imports torchmetrics; a program without it has no metrics of this kind.
    kind = getattr(sys.modules.get("torchmetrics"), "Metric", None)
    if kind is None or module is None:
        return
    for name, part in module.named_modules():
        if isinstance(part, kind):
            yield name, part


def _capture_metric(metric: Any) -> dict[str, Any]:
    states = {}
    for name in metric._defaults:
        value = getattr(metric, name)
        states[name] = list(value) if isinstance(value, list) else value
    return {"states": states, "update_count": metric._update_count}


def _restore_metric(metric: Any, saved: Mapping[str, Any]) -> None:
    for name, value in saved["states"].items():
        if name in metric._defaults:
            setattr(metric, name, _on(metric.device, value))
    metric._update_count = saved["update_count"]
    metric._computed = None


def _on(device: Any, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [_on(device, item) for item in value] if isinstance(value, list) else value
