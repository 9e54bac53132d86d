"""torchvision's transforms, by a stand-in with the layout of the real package."""

import importlib
import sys

import pytest
import torch
from preprocess_functions import halved
from preprocess_samples import nobody, only, same_outputs, stored_and_built
from pretend_torchvision import write_torchvision
from torch import nn

from ckptmgr.errors import (
    CorruptCheckpointError,
    NotAllowedError,
    StateMismatchError,
    UnsupportedStateError,
    UsageError,
)
from ckptmgr.preprocess.differences import first_differences
from ckptmgr.preprocess.fingerprint import fingerprint
from ckptmgr.preprocess.kinds import build_preprocessor, capture_preprocessor, find_kind

IMAGE = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)


def forget_torchvision():
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


@pytest.fixture
def transforms(tmp_path, monkeypatch):
    assert "torchvision" not in sys.modules
    write_torchvision(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("torchvision.transforms.v2")
    forget_torchvision()


def evaluation(v2):
    return v2.Compose(
        [v2.Resize(8), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.1, 0.2, 0.3], (0.5, 0.25, 0.125))]
    )


def test_nested_transforms_come_back_and_give_the_same_tensors(transforms):
    made = transforms.Compose([transforms.ToDtype(torch.float32, scale=True), evaluation(transforms)])
    built = stored_and_built(made)
    assert type(built) is type(made)
    assert [type(part) for part in built.transforms[1].transforms] == [type(p) for p in made.transforms[1].transforms]
    kind = find_kind(made)
    assert kind.name == "transforms"
    assert same_outputs(kind.encode(built, IMAGE), kind.encode(made, IMAGE))
    assert fingerprint(capture_preprocessor(built)) == fingerprint(capture_preprocessor(made))


def test_they_come_back_in_a_program_that_has_not_imported_torchvision(transforms):
    tree = capture_preprocessor(transforms.Compose([evaluation(transforms)]))
    forget_torchvision()
    built = build_preprocessor(tree, nobody)
    assert built.transforms[0].transforms[0].interpolation.name == "BILINEAR"


def test_the_preset_of_a_models_weights_comes_back(transforms):
    presets = importlib.import_module("torchvision.transforms._presets")
    made = presets.ImageClassification(crop_size=224, resize_size=232)
    built = stored_and_built(made)
    assert built.crop_size == [224]
    assert built.resize_size == [232]
    assert same_outputs(built(torch.ones(2)), made(torch.ones(2)))


def test_both_generations_are_told_apart(transforms):
    v1 = importlib.import_module("torchvision.transforms")
    made = v1.Compose([v1.Normalize([0.5], [0.5]), transforms.Normalize([0.5], [0.5])])
    built = stored_and_built(made)
    assert type(built) is v1.Compose
    assert [type(part) for part in built.transforms] == [v1.Normalize, transforms.Normalize]


def test_types_functions_and_module_lists_inside_of_transforms_come_back(transforms):
    image = importlib.import_module("torchvision.tv_tensors").Image
    made = transforms.Compose(
        [
            transforms.ToDtype({torch.Tensor: torch.float32, image: torch.float64, "others": None}),
            transforms.Lambda(halved, torch.Tensor),
            transforms.RandomApply(nn.ModuleList([transforms.Normalize([1.0], [2.0])]), p=1.0),
        ]
    )
    built = stored_and_built(made, only(halved))
    assert built.transforms[0].dtype == made.transforms[0].dtype
    assert built.transforms[1].lambd is halved
    assert built.transforms[1].types == (torch.Tensor,)
    assert isinstance(built.transforms[2].transforms, nn.ModuleList)
    assert built.transforms[2].transforms[0].mean == [1.0]
    with pytest.raises(NotAllowedError):
        stored_and_built(made)


def test_a_lambda_in_a_transform_is_refused_with_its_place(transforms):
    made = transforms.Compose([evaluation(transforms), transforms.Lambda(lambda x: x)])
    with pytest.raises(UnsupportedStateError, match=r"Compose\.transforms\[1\]") as error:
        capture_preprocessor(made)
    assert "lambda" in str(error.value)


def test_a_difference_names_the_transform_and_its_setting(transforms):
    saved, live = evaluation(transforms), evaluation(transforms)
    live.transforms[2].mean[1] = 0.5
    (line,) = first_differences(capture_preprocessor(saved), capture_preprocessor(live))
    assert line.endswith("mean[1] is 0.2 in the checkpoint, 0.5 now")


def test_a_live_transform_takes_a_saved_state_in_place(transforms):
    saved, live = transforms.Normalize([1.0], [2.0]), transforms.Normalize([0.0], [1.0])
    find_kind(live).restore(live, find_kind(saved).capture(saved))
    assert live.mean == [1.0]
    with pytest.raises(StateMismatchError):
        find_kind(live).restore(live, find_kind(saved).capture(transforms.Resize(3)))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("torchvision.transforms.functional.InterpolationMode", CorruptCheckpointError),
        ("torchvision.transforms.v2._misc.Nothing", CorruptCheckpointError),
        ("torchvision.io.image.ImageReadMode", NotAllowedError),
        ("os.system", NotAllowedError),
        ("torch.nn.modules.linear.Linear", CorruptCheckpointError),
        (None, CorruptCheckpointError),
    ],
)
def test_a_name_that_is_no_transform_is_refused(transforms, name, error):
    tree = capture_preprocessor(transforms.Normalize([1.0], [2.0]))
    tree["state"]["class"] = name
    with pytest.raises(error):
        build_preprocessor(tree, nobody)


def test_without_torchvision_the_error_names_it(transforms):
    tree = capture_preprocessor(transforms.Normalize([1.0], [2.0]))
    forget_torchvision()
    sys.path.pop(0)
    importlib.invalidate_caches()
    with pytest.raises(UsageError, match="torchvision"):
        build_preprocessor(tree, nobody)
