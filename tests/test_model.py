"""The network: exact sizes, each technique in its own setting, one start for all settings."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import weights_equal
from PIL import Image
from torch import nn

import dl_utils as dl
from dl_utils import SETTINGS, LeNet5, MaxPool, Setting, TrainConfig, build_model, train

DROPOUT, DECAY, NORM = TECHNIQUES = "dropout", "weight_decay", "batch_norm"


def test_each_technique_is_in_its_own_settings_and_no_others_in_the_order_of_the_assignment():
    on = {
        name: tuple(key for key in TECHNIQUES if getattr(setting, key))
        for name, setting in SETTINGS.items()
    }
    four = {"baseline": (), DROPOUT: (DROPOUT,), DECAY: (DECAY,), NORM: (NORM,)}
    pairs = {f"{a}_{b}": (a, b) for a, b in ((DROPOUT, DECAY), (DROPOUT, NORM), (DECAY, NORM))}
    assert list(on.items()) == list((four | pairs | {"combined": TECHNIQUES}).items())
    for name, setting in SETTINGS.items():
        layers = list(build_model(setting).modules())
        norms = sum(isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) for layer in layers)
        assert name == setting.name and norms == 4 * (NORM in on[name])
        assert [m.p for m in layers if isinstance(m, nn.Dropout)] == [setting.dropout] * 2
        acts = [type(m) for m in layers if type(m).__module__ == nn.ReLU.__module__]
        assert acts == [nn.ReLU] * 4, "an activation has drifted"


def test_layers_are_those_of_the_paper_with_batch_norm_where_the_config_says():
    table = dl.layer_summary(LeNet5(dropout=0.5))
    assert [n for n in table.parameters if n] == [156, 2416, 48_120, 10_164, 850]
    shapes = table.set_index("layer")["output shape"]
    assert shapes["conv1"] == (1, 6, 28, 28) and shapes["pool1"] == (1, 6, 14, 14)
    assert shapes["conv2"] == (1, 16, 10, 10) and shapes["pool2"] == (1, 16, 5, 5)
    assert shapes["flatten"] == (1, 400) and shapes["fc5"] == (1, 10)
    assert sum(p.numel() for p in LeNet5().parameters()) == 61_706
    norm = dl.layer_summary(LeNet5(batch_norm=True))
    assert norm.parameters.sum() == 61_706 + 2 * (6 + 16 + 120 + 84)
    for place, order in (
        ("after_activation", "pool1 act1 norm1"),
        ("before_activation", "norm1 pool1 act1"),
    ):
        model = build_model(SETTINGS["batch_norm"], TrainConfig(norm_place=place))
        assert " ".join(model.layers._modules).startswith(f"conv1 {order} conv2")


def test_one_seed_gives_every_setting_the_same_weights_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    models = [build_model(setting, TrainConfig(seed=4)) for setting in SETTINGS.values()]
    assert torch.equal(torch.get_rng_state(), state)
    first = models[0].state_dict()
    for model in models[1:]:
        assert list(model.layers._modules) == list(models[0].layers._modules)
        weights = model.state_dict()
        assert all(torch.equal(first[key], weights[key]) for key in first)
    other = build_model(SETTINGS["baseline"], TrainConfig(seed=5)).state_dict()
    assert not torch.equal(first["layers.conv1.weight"], other["layers.conv1.weight"])


def test_all_settings_compute_the_same_logits_at_initialization(splits):
    images = splits["test"].images
    expected = build_model(SETTINGS["baseline"]).eval()(images)
    sums = expected.exp().sum(1)
    assert not torch.allclose(sums, torch.ones_like(sums), atol=0.1), "these are probabilities"
    for setting in SETTINGS.values():
        model = build_model(setting).eval()
        # Fresh batch norm divides by sqrt(1 + 1e-5), once for each of four layers.
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
        assert isinstance(model.layers[-1], nn.Linear)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_fast_pooling_gives_the_bits_of_max_pool2d(layout):
    maps = torch.randn(7, 6, 28, 28).to(memory_format=layout)
    maps[0, 0, :2, :2] = torch.tensor([[float("nan"), 1.0], [float("-inf"), 0.0]])
    with torch.no_grad():
        found = MaxPool(2)(maps)
    torch.testing.assert_close(found, nn.MaxPool2d(2)(maps), rtol=0, atol=0, equal_nan=True)
    assert "MaxPool" in type(MaxPool(2)(maps.requires_grad_()).grad_fn).__name__


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adam"},
        {"activation": "tanh"},
        {"pooling": "average"},
        {"norm_place": "before_activation"},
    ],
)
def test_every_option_of_a_config_changes_the_training(splits, change):
    setting = replace(SETTINGS["batch_norm"], lr=0.01)
    runs = [train(setting, splits, TrainConfig(1, 32, **part)) for part in (change, {})]
    assert not weights_equal(*runs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("dropout", "0.2"),
        ("weight_decay", -1e-3),
        ("weight_decay", float("inf")),
        ("lr", 0.0),
        ("lr", None),
        ("batch_norm", "no"),
        ("name", "a/b"),
        ("label", ""),
        ("epochs", 1.5),
        ("batch_size", 0),
        ("seed", -1),
        ("seed", 2**31),
        ("activation", ["relu"]),
        ("pooling", "min"),
    ],
)
def test_a_value_that_torch_would_silently_take_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*; expected"):
        replace(TrainConfig() if hasattr(TrainConfig, name) else Setting("a", "b"), **{name: value})


def test_numbers_of_numpy_are_numbers():
    setting = Setting("a", "b", np.float64(0.5), np.int64(0), np.bool_(True), np.float32(0.5))
    assert asdict(setting) == asdict(Setting("a", "b", 0.5, 0.0, True, 0.5))
    assert all(type(value) in (str, float, bool) for value in asdict(setting).values())
    assert type(TrainConfig(epochs=np.float64(2.0)).epochs) is int


def test_a_picture_of_ones_own_is_classified(splits, trained, tmp_path):
    image = (splits["test"].images[1, 0] * dl.STD + dl.MEAN).clamp(0, 1).numpy()
    grey = (255 * image).round().astype("uint8")
    Image.fromarray(255 - grey).resize((280, 280)).convert("RGB").save(tmp_path / "photo.jpg")
    Image.fromarray(np.dstack([grey] * 3 + [0 * grey + 255])).save(tmp_path / "drawing.png")
    pictures = image, grey, np.dstack([grey] * 3), tmp_path / "photo.jpg"
    for picture in (*pictures, str(tmp_path / "drawing.png")):
        found = dl.classify(trained["baseline"].model, picture)
        assert found.index[0] == dl.CLASSES[int(splits["test"].labels[1])]
        assert found.is_monotonic_decreasing and len(found) == 10
        assert found.sum() == pytest.approx(1, abs=1e-5)
    for wrong in (splits["test"].images[1], 255 * image, grey[0]):
        with pytest.raises(ValueError, match="a picture is an array"):
            dl.classify(trained["baseline"].model, wrong)
