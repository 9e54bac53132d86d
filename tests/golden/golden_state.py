"""The state that the golden checkpoints hold. Never change it: the committed files were written from it."""

import argparse
import collections
import datetime
import pathlib
from typing import Any

import numpy as np
import torch
from torch import nn

STEP = 7


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.last.weight


def fill(tensor: torch.Tensor, start: float) -> None:
    with torch.no_grad():
        tensor.copy_((torch.arange(tensor.numel(), dtype=torch.float64) / 8 + start).view(tensor.shape))


def golden_state() -> dict[str, Any]:
    """Build the live objects in the state of the golden checkpoint, without any randomness."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 5])
    for position, tensor in enumerate(model.state_dict().values()):
        if tensor.is_floating_point():
            fill(tensor, position)
    for position, parameter in enumerate(model.parameters()):
        slots = {"step": torch.tensor(float(STEP)), "exp_avg": torch.empty(0), "exp_avg_sq": torch.empty(0)}
        slots["exp_avg"], slots["exp_avg_sq"] = torch.empty_like(parameter), torch.empty_like(parameter)
        fill(slots["exp_avg"], position + 0.5)
        fill(slots["exp_avg_sq"], position + 0.25)
        optimizer.state[parameter] = slots
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "extra": golden_values()}


def golden_values() -> dict[str, Any]:
    """Return a value of every kind that the format holds."""
    dtypes = [
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
        torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    ]  # fmt: skip
    return {
        "tensors": {str(dtype): torch.tensor([0, 1, 2, 3]).to(dtype) for dtype in dtypes},
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "channels_last": torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "sparse": torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse(),
        "array": np.arange(300, dtype=np.int32).reshape(3, 100),
        "plain": [None, True, 1, 2**70, 1.5, float("inf"), float("-inf"), "text", b"\x00\xff", (1, (2,)), {3, 4}],
        "keys": {1: "int", "1": "str", None: 0, "$tensor": "escaped"},
        "containers": [
            collections.OrderedDict(b=1, a=2),
            collections.Counter("aab"),
            collections.defaultdict(list, a=[1]),
            collections.deque([1, 2], maxlen=3),
            argparse.Namespace(lr=0.1),
            frozenset({"x"}),
        ],
        "others": [
            pathlib.PurePosixPath("a/b").name,
            datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
            datetime.timedelta(days=1, seconds=2),
            1 + 2j,
            np.float32(0.5),
            torch.float16,
            torch.Size([1, 2]),
            torch.device("cpu"),
            slice(1, 2),
            range(3),
        ],
    }
