"""The network: exact sizes, each technique in its own setting, one start for all settings."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dl_utils import BLOCK_ORDERS, SETTINGS, LeNet5, Setting, build_model, layer_summary

TECHNIQUES = {"dropout": {"dropout"}, "weight_decay": {"weight_decay"},
              "batch_norm": {"batch_norm"}, "baseline": set(),
              "combined": {"dropout", "weight_decay", "batch_norm"}}  # fmt: skip


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_settings_are_the_five_of_the_report_in_order():
    five = ["baseline", "dropout", "weight_decay", "batch_norm", "combined"]
    assert [name for name in SETTINGS if name in five] == five
    assert all(name == setting.name for name, setting in SETTINGS.items())


@pytest.mark.parametrize("name", TECHNIQUES)
def test_each_technique_is_in_its_own_settings_and_no_others(name):
    setting = SETTINGS[name]
    on = {key for key in ("dropout", "weight_decay", "batch_norm") if getattr(setting, key)}
    assert on == TECHNIQUES[name]
    layers = list(build_model(setting).modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in layers) == ("batch_norm" in on)
    dropouts = [m.p for m in layers if isinstance(m, nn.Dropout)]
    assert dropouts == [setting.dropout] * 2


def test_settings_differ_only_in_techniques_and_learning_rate():
    for setting in SETTINGS.values():
        same = replace(
            SETTINGS["baseline"],
            **{
                key: getattr(setting, key)
                for key in ("name", "label", "dropout", "weight_decay", "batch_norm", "lr")
            },
        )
        assert setting == same


def test_parameter_counts():
    assert count(LeNet5()) == 61_706
    assert count(LeNet5(dropout=0.5)) == 61_706
    assert count(LeNet5(batch_norm=True, norm_layers="conv")) == 61_706 + 2 * (6 + 16)
    assert count(LeNet5(batch_norm=True, norm_layers="all")) == 61_706 + 2 * (6 + 16 + 120 + 84)
    layers = [156, 2416, 48_120, 10_164, 850]
    assert [n for n in layer_summary(LeNet5()).parameters if n] == layers


def test_layer_summary_shapes():
    table = layer_summary(LeNet5()).set_index("layer")["output shape"]
    assert table["conv1"] == (1, 6, 28, 28) and table["pool1"] == (1, 6, 14, 14)
    assert table["conv2"] == (1, 16, 10, 10) and table["pool2"] == (1, 16, 5, 5)
    assert table["flatten"] == (1, 400) and table["fc5"] == (1, 10)


def test_one_seed_gives_every_setting_the_same_names_and_weights():
    models = [build_model(setting, seed=4) for setting in SETTINGS.values()]
    first = models[0].state_dict()
    for model in models[1:]:
        assert str(list(model.layers._modules)) == str(list(models[0].layers._modules))
        weights = model.state_dict()
        assert all(torch.equal(first[key], weights[key]) for key in first)
    other = build_model(SETTINGS["baseline"], seed=5).state_dict()
    assert not torch.equal(first["layers.conv1.weight"], other["layers.conv1.weight"])


def test_building_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_model(SETTINGS["combined"], seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_all_settings_compute_the_same_function_at_initialization(splits):
    images = splits["test"].images
    expected = build_model(SETTINGS["baseline"]).eval()(images)
    for setting in SETTINGS.values():
        logits = build_model(setting).eval()(images)
        # Fresh batch norm divides by sqrt(1 + 1e-5), once for each of up to four layers.
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_outputs_are_logits(splits, trained):
    for run in trained.values():
        sums = run.model(splits["test"].images).exp().sum(1)
        assert not torch.allclose(sums, torch.ones_like(sums), atol=0.1)
        assert isinstance(run.model.layers[-1], nn.Linear)


def test_pooling_before_the_activation_is_the_same_function(splits):
    model = build_model(SETTINGS["baseline"])
    layers = dict(model.layers.named_children())
    swapped = nn.Sequential(
        *[layers[n] for n in ("conv1", "act1", "pool1", "conv2", "act2", "pool2", "flatten")]
    )
    images = splits["val"].images
    assert torch.equal(swapped(images), model.layers[: list(layers).index("flatten") + 1](images))


@pytest.mark.parametrize("place", BLOCK_ORDERS)
def test_batch_norm_stands_where_the_setting_says(place):
    names = [name for name, _ in LeNet5(batch_norm=True, norm_place=place).layers.named_children()]
    block = names[names.index("conv1") + 1 : names.index("conv2")]
    assert tuple(name.rstrip("1") for name in block) == BLOCK_ORDERS[place]


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 2.0}, {"dropout": -0.1}, {"dropout": float("nan")}, {"dropout": "0.2"},
        {"weight_decay": -1e-3}, {"weight_decay": float("inf")}, {"lr": 0.0}, {"lr": float("nan")},
        {"batch_norm": 1}, {"activation": "gelu"}, {"pooling": "min"}, {"norm_place": "nowhere"},
        {"norm_layers": ["all"]}, {"decay_all": "no"},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change):
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"^{key} is .*; expected"):
        Setting("name", "label", **{key: value})
    if key not in ("lr", "weight_decay", "decay_all"):
        with pytest.raises(ValueError, match=f"^{key} is .*; expected"):
            LeNet5(**{key: value})


def test_arguments_that_the_network_does_not_have_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight_decay'"):
        LeNet5(weight_decay=0.5)
