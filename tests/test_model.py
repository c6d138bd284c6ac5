"""The network: exact sizes, each technique in its own setting, one start for all settings."""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import weights_equal
from torch import nn

from dl_utils import (
    SETTINGS,
    LeNet5,
    MaxPool,
    Setting,
    TrainConfig,
    build_model,
    classify,
    evaluate,
    layer_summary,
    train,
)

TECHNIQUES = {"baseline": set(), "dropout": {"dropout"}, "weight_decay": {"weight_decay"},
              "batch_norm": {"batch_norm"}, "combined": {"dropout", "weight_decay", "batch_norm"},
              "dropout_weight_decay": {"dropout", "weight_decay"},
              "dropout_batch_norm": {"dropout", "batch_norm"},
              "weight_decay_batch_norm": {"weight_decay", "batch_norm"}}  # fmt: skip


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SETTINGS)
def test_each_technique_is_in_its_own_settings_and_no_others(name):
    setting = SETTINGS[name]
    on = {key for key in ("dropout", "weight_decay", "batch_norm") if getattr(setting, key)}
    assert on == TECHNIQUES[name] and name == setting.name
    layers = list(build_model(setting).modules())
    assert sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in layers) == 4 * (
        "batch_norm" in on
    )
    assert [m.p for m in layers if isinstance(m, nn.Dropout)] == [setting.dropout] * 2
    acts = [type(m) for m in layers if type(m).__module__ == nn.ReLU.__module__]
    assert acts == [nn.ReLU] * 4, "an activation has drifted"


def test_the_settings_of_the_assignment_come_in_its_order():
    four = ["baseline", "dropout", "weight_decay", "batch_norm"]
    assert list(SETTINGS)[:4] == four and list(SETTINGS)[-1] == "combined"


def test_parameter_counts_are_those_of_the_paper():
    assert count(LeNet5()) == count(LeNet5(dropout=0.5)) == 61_706
    assert count(LeNet5(batch_norm=True)) == 61_706 + 2 * (6 + 16 + 120 + 84)
    table = layer_summary(LeNet5())
    assert [n for n in table.parameters if n] == [156, 2416, 48_120, 10_164, 850]
    shapes = table.set_index("layer")["output shape"]
    assert shapes["conv1"] == (1, 6, 28, 28) and shapes["pool1"] == (1, 6, 14, 14)
    assert shapes["conv2"] == (1, 16, 10, 10) and shapes["pool2"] == (1, 16, 5, 5)
    assert shapes["flatten"] == (1, 400) and shapes["fc5"] == (1, 10)


def test_one_seed_gives_every_setting_the_same_names_and_weights():
    models = [build_model(setting, TrainConfig(seed=4)) for setting in SETTINGS.values()]
    first = models[0].state_dict()
    for model in models[1:]:
        assert list(model.layers._modules) == list(models[0].layers._modules)
        weights = model.state_dict()
        assert all(torch.equal(first[key], weights[key]) for key in first)
    other = build_model(SETTINGS["baseline"], TrainConfig(seed=5)).state_dict()
    assert not torch.equal(first["layers.conv1.weight"], other["layers.conv1.weight"])


def test_building_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_model(SETTINGS["combined"], TrainConfig(seed=9))
    assert torch.equal(torch.rand(3), expected)


def test_all_settings_compute_the_same_function_at_initialization(splits):
    images = splits["test"].images
    expected = build_model(SETTINGS["baseline"]).eval()(images)
    for setting in SETTINGS.values():
        logits = build_model(setting).eval()(images)
        # Fresh batch norm divides by sqrt(1 + 1e-5), once for each of four layers.
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_outputs_are_logits_not_probabilities(splits, trained):
    for run in trained.values():
        sums = run.model(splits["test"].images).exp().sum(1)
        assert not torch.allclose(sums, torch.ones_like(sums), atol=0.1)
        assert isinstance(run.model.layers[-1], nn.Linear)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_fast_pooling_gives_the_bits_of_max_pool2d(layout):
    maps = torch.randn(7, 6, 28, 28).to(memory_format=layout)
    maps[0, 0, :2, :2] = torch.tensor([[float("nan"), 1.0], [float("-inf"), 0.0]])
    with torch.no_grad():
        found = MaxPool(2)(maps)
    torch.testing.assert_close(found, nn.MaxPool2d(2)(maps), rtol=0, atol=0, equal_nan=True)
    with_gradient = maps.requires_grad_()
    assert "MaxPool" in type(MaxPool(2)(with_gradient).grad_fn).__name__


def test_pooling_before_the_activation_is_the_same_function(splits):
    layers = dict(build_model(SETTINGS["baseline"]).layers.named_children())
    orders = "conv1 pool1 act1 conv2 pool2 act2", "conv1 act1 pool1 conv2 act2 pool2"
    maps = [
        nn.Sequential(*[layers[name] for name in order.split()])(splits["val"].images)
        for order in orders
    ]
    assert torch.equal(*maps)


@pytest.mark.parametrize(
    ("place", "order"),
    [
        ("after_activation", ["pool1", "act1", "norm1"]),
        ("before_activation", ["norm1", "pool1", "act1"]),
    ],
)
def test_batch_norm_stands_where_the_config_says(place, order):
    names = [name for name, _ in LeNet5(batch_norm=True, norm_place=place).layers.named_children()]
    assert names[names.index("conv1") + 1 : names.index("conv2")] == order


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adam"}, {"activation": "tanh", "pooling": "average"},
        {"norm_place": "before_activation"},
    ],
)  # fmt: skip
def test_every_option_of_a_config_trains(splits, change):
    setting = replace(SETTINGS["batch_norm"], lr=0.01)
    runs = [train(setting, splits, TrainConfig(1, 32, **part)) for part in (change, {})]
    assert not weights_equal(*runs)


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": float("nan")}, {"dropout": "0.2"},
        {"weight_decay": -1e-3}, {"weight_decay": float("inf")}, {"lr": 0.0}, {"lr": None},
        {"batch_norm": "no"}, {"name": "a/b"}, {"name": ""}, {"label": ""},
    ],
)  # fmt: skip
def test_a_setting_that_torch_would_silently_take_is_refused(change):
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"^{key} is {value!r}; expected"):
        Setting(**{"name": "name", "label": "label", **change})


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0}, {"epochs": 1.5}, {"batch_size": 0}, {"seed": -1}, {"seed": 2**31},
        {"optimizer": "lion"}, {"activation": ["relu"]}, {"pooling": "min"}, {"norm_place": None},
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_trained_is_refused(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))} is .*; expected"):
        TrainConfig(**change)


def test_numbers_of_numpy_and_pandas_are_numbers():
    row = pd.DataFrame({"dropout": [0.5], "batch_norm": [True], "epochs": [np.int32(2)]}).iloc[0]
    setting = Setting("a", "b", dropout=row.dropout, batch_norm=np.bool_(True), lr=np.float32(0.5))
    assert asdict(setting) == asdict(Setting("a", "b", 0.5, 0.0, True, 0.5))
    assert all(type(value) in (str, float, bool) for value in asdict(setting).values())
    assert type(TrainConfig(epochs=np.float64(2.0)).epochs) is int


def test_a_picture_of_ones_own_is_classified(splits, trained, tmp_path):
    from PIL import Image

    from dl_utils import CLASSES, MEAN, STD

    model = trained["baseline"].model
    assert evaluate(model, splits["test"]).accuracy > 0.8
    image = (splits["test"].images[1, 0] * STD + MEAN).clamp(0, 1).numpy()
    grey = (255 * image).round().astype("uint8")
    Image.fromarray(255 - grey).resize((280, 280)).convert("RGB").save(tmp_path / "photo.jpg")
    alpha = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    Image.fromarray(alpha).save(tmp_path / "drawing.png")
    label = CLASSES[int(splits["test"].labels[1])]
    pictures = image, grey, np.dstack([grey] * 3), tmp_path / "photo.jpg"
    for picture in (*pictures, str(tmp_path / "drawing.png")):
        found = classify(model, picture)
        assert found.index[0] == label and found.is_monotonic_decreasing
        assert found.sum() == pytest.approx(1, abs=1e-5) and len(found) == 10
