"""A small stand-in for torchvision, which cannot be installed beside every torch: classes laid out like the real ones.

The attributes are those of torchvision 0.20: what a constructor takes is not always what it keeps.
"""

from __future__ import annotations

from pathlib import Path

FILES = {
    "torchvision/__init__.py": "__version__ = '0.20.0'\n",
    "torchvision/transforms/__init__.py": "from .transforms import *\nfrom .functional import InterpolationMode\n",
    "torchvision/transforms/functional.py": """
from enum import Enum

class InterpolationMode(Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
""",
    "torchvision/transforms/transforms.py": """
import torch
from torch import nn

__all__ = ["Compose", "Normalize"]

class Compose:
    def __init__(self, transforms):
        self.transforms = transforms
    def __call__(self, img):
        for t in self.transforms:
            img = t(img)
        return img

class Normalize(nn.Module):
    def __init__(self, mean, std, inplace=False):
        super().__init__()
        self.mean, self.std, self.inplace = mean, std, inplace
    def forward(self, x):
        mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (self.mean, self.std))
        return (x - mean) / std
""",
    "torchvision/transforms/_presets.py": """
from torch import nn
from .functional import InterpolationMode

class ImageClassification(nn.Module):
    def __init__(self, *, crop_size, resize_size=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
                 interpolation=InterpolationMode.BILINEAR, antialias=True):
        super().__init__()
        self.crop_size, self.resize_size = [crop_size], [resize_size]
        self.mean, self.std, self.interpolation, self.antialias = list(mean), list(std), interpolation, antialias
    def forward(self, x):
        return x * self.std[0] - self.mean[0] + self.crop_size[0]
""",
    "torchvision/transforms/v2/__init__.py": """
from ._transform import Transform
from ._container import Compose, RandomApply
from ._misc import Lambda, Normalize, ToDtype
from ._geometry import Resize
""",
    "torchvision/transforms/v2/_transform.py": """
from torch import nn

class Transform(nn.Module):
    _transformed_types = (object,)
    def forward(self, *inputs):
        return self.transform(inputs[0], {})
""",
    "torchvision/transforms/v2/_container.py": """
from collections.abc import Sequence
from ._transform import Transform

class Compose(Transform):
    def __init__(self, transforms):
        super().__init__()
        if not isinstance(transforms, Sequence):
            raise TypeError("Argument transforms should be a sequence of callables")
        elif not transforms:
            raise ValueError("Pass at least one transform")
        self.transforms = transforms
    def forward(self, *inputs):
        sample = inputs[0]
        for transform in self.transforms:
            sample = transform(sample)
        return sample

class RandomApply(Transform):
    def __init__(self, transforms, p=0.5):
        super().__init__()
        self.transforms = transforms
        self.p = p
    def forward(self, sample):
        for transform in self.transforms:
            sample = transform(sample)
        return sample
""",
    "torchvision/transforms/v2/_misc.py": """
import torch
from ._transform import Transform

class Lambda(Transform):
    _transformed_types = (object,)
    def __init__(self, lambd, *types):
        super().__init__()
        self.lambd = lambd
        self.types = types or self._transformed_types
    def transform(self, inpt, params):
        return self.lambd(inpt) if isinstance(inpt, self.types) else inpt

class Normalize(Transform):
    def __init__(self, mean, std, inplace=False):
        super().__init__()
        self.mean, self.std, self.inplace = list(mean), list(std), inplace
    def transform(self, x, params):
        mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (self.mean, self.std))
        return (x - mean) / std

class ToDtype(Transform):
    def __init__(self, dtype, scale=False):
        super().__init__()
        self.dtype, self.scale = dtype, scale
    def transform(self, x, params):
        dtype = self.dtype[type(x)] if isinstance(self.dtype, dict) else self.dtype
        return x.to(dtype) / 255 if self.scale else x.to(dtype)
""",
    "torchvision/transforms/v2/_geometry.py": """
from torch.nn import functional as F
from ..functional import InterpolationMode
from ._transform import Transform

class Resize(Transform):
    def __init__(self, size, interpolation=InterpolationMode.BILINEAR, max_size=None, antialias=True):
        super().__init__()
        if isinstance(size, int):
            size = [size]
        elif not (isinstance(size, (list, tuple)) and len(size) in (1, 2)):
            raise ValueError(f"size can be an integer or a sequence of one or two integers, got {size}")
        self.size = list(size)
        self.interpolation, self.max_size, self.antialias = interpolation, max_size, antialias
    def transform(self, x, params):
        side = (self.size * 2)[:2]
        return F.interpolate(x[None], side, mode=self.interpolation.value)[0]
""",
    "torchvision/tv_tensors/__init__.py": """
import torch

class Image(torch.Tensor):
    pass
""",
}


def write_torchvision(directory: Path) -> None:
    """Write the package below a directory, which is then to be put on ``sys.path``."""
    for name, source in FILES.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source.lstrip())
