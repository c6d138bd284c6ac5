"""The network: exact sizes, each technique in its own setting, one start for all settings."""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import dl_utils as dl
from dl_utils import SETTINGS, LeNet5, MaxPool, Setting, TrainConfig, build_model

DROPOUT, DECAY, NORM = TECHNIQUES = "dropout", "weight_decay", "batch_norm"


def test_each_technique_is_in_its_own_settings_and_no_others_in_the_order_of_the_assignment():
    on = {name: [*filter(vars(setting).get, TECHNIQUES)] for name, setting in SETTINGS.items()}
    four = {"baseline": [], DROPOUT: [DROPOUT], DECAY: [DECAY], NORM: [NORM]}
    pairs = {f"{a}_{b}": [a, b] for a, b in combinations(TECHNIQUES, 2)}
    assert [*on.items()][:8] == [*(four | pairs | {"combined": [*TECHNIQUES]}).items()]
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
    norm = dl.layer_summary(LeNet5(batch_norm=True))
    assert norm.parameters.sum() == 61_706 + 2 * (6 + 16 + 120 + 84)
    order = "conv1 pool1 relu1 norm1 conv2 pool2 relu2 norm2 flatten fc3 relu3 norm3 drop3"
    assert " ".join(LeNet5(0.5, True).layers._modules) == f"{order} fc4 relu4 norm4 drop4 fc5"


def test_one_seed_starts_every_setting_at_the_same_weights_and_logits(splits):
    images = splits["test"].images
    first, *others = (build_model(row, TrainConfig(seed=4)).eval() for row in SETTINGS.values())
    expected, logits = first.state_dict(), first(images)
    assert logits.min() < 0 < logits.max(), "these are probabilities"
    for model in others:
        assert [*model.layers._modules] == [*first.layers._modules]
        weights = model.state_dict()
        assert all(torch.equal(expected[key], weights[key]) for key in expected)
        # Fresh batch norm divides by sqrt(1 + 1e-5), once for each of four layers.
        torch.testing.assert_close(model(images), logits, rtol=1e-3, atol=1e-4)
    other = build_model(SETTINGS["baseline"], TrainConfig(seed=5)).state_dict()
    assert not torch.equal(expected["layers.conv1.weight"], other["layers.conv1.weight"])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_fast_pooling_gives_the_bits_of_max_pool2d(layout):
    maps = torch.randn(7, 6, 28, 28).to(memory_format=layout)
    maps[0, 0, :2, :2] = torch.tensor([[float("nan"), 1.0], [float("-inf"), 0.0]])
    with torch.no_grad():
        found = MaxPool()(maps)
    torch.testing.assert_close(found, nn.MaxPool2d(2)(maps), rtol=0, atol=0, equal_nan=True)
    assert "MaxPool" in type(MaxPool()(maps.requires_grad_()).grad_fn).__name__


BAD = {"dropout": [1.0, math.nan, "0.2"], "weight_decay": [-1e-3, math.inf], "lr": [0.0, None]}
BAD |= {"batch_norm": ["no"], "name": ["a/b"], "label": [""], "epochs": [1.5], "batch_size": [0]}
BAD |= {"seed": [-1, 2**31], "optimizer": ["rmsprop", ["sgd"]]}


@pytest.mark.parametrize("name", BAD)
def test_a_value_that_torch_would_silently_take_is_refused(name):
    good = TrainConfig() if hasattr(TrainConfig, name) else Setting("a", "b")
    for value in BAD[name]:
        with pytest.raises(ValueError, match=f"^{name} is .*; expected"):
            replace(good, **{name: value})


def photographs(grey):
    """A test image of the data as people would have it as a picture."""
    large = np.asarray(Image.fromarray(grey).resize((280, 280)))
    cut_out = np.dstack([grey, grey, grey, 255 * (grey > 0).astype("uint8")])
    return {
        "array": grey,
        "floats": grey / 255,
        "16 bits": Image.fromarray(grey.astype("uint16") * 257),
        "opacity": Image.fromarray(np.dstack([*3 * [0 * grey + 255], grey])),
        "bright item, transparent around": cut_out,
        "dark item, transparent around": Image.fromarray(cut_out ^ np.uint8([255, 255, 255, 0])),
        "on white": Image.fromarray(255 - large).convert("RGB"),
        "on black": large,
        "on grey": 200 - large // 2,
        "margins of 20 %": np.pad(255 - large, 93, constant_values=255),
        "margins of 30 %": np.pad(large, 210),
    }


def test_a_photograph_of_ones_own_gets_the_class_of_what_it_shows(real_splits, tmp_path):
    model, right = dl.load_checkpoint(ROOT / "weights/combined.pt").model, Counter()
    exif = Image.Exif()
    exif[274] = 3  # of a camera that was held upside down
    pixels = ((real_splits["test"].images[:20, 0] * dl.STD + dl.MEAN) * 255).round().byte().numpy()
    for grey, label in zip(pixels, real_splits["test"].labels):
        pictures = photographs(grey)
        pictures["on white"].rotate(180).save(tmp_path / "photo.jpg", exif=exif)
        for name, picture in (pictures | {"JPEG": tmp_path / "photo.jpg"}).items():
            right[name] += dl.classify(model, picture).index[0] == dl.CLASSES[label]
    assert len(right) == 12 and min(right.values()) >= 16, right


def test_a_file_a_pil_image_and_an_array_of_one_picture_get_one_answer(splits, tmp_path, request):
    model = build_model(SETTINGS["baseline"])
    grey = np.pad(255 - np.arange(0, 240, 2, dtype="uint8").reshape(10, 12), 3)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)  # of the caller; the answer is in float32 all the same
    for name, picture in photographs(grey).items():
        found = [dl.classify(model, picture), dl.classify(model, np.asarray(picture))]
        if name != "floats":
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            image.save(tmp_path / "a.png")
            found += [dl.classify(model, part) for part in (image, str(tmp_path / "a.png"))]
        assert all(map(found[0].equals, found)), name
        assert found[0].is_monotonic_decreasing and found[0].dtype == "float32"
        assert found[0].sum() == pytest.approx(1, abs=1e-5) and len(found[0]) == 10
    opacity = photographs(grey)["opacity"]  # white, which on white is nothing
    alone = dl.classify(model, opacity)  # the other pictures are in a batch of two
    np.testing.assert_allclose(alone, dl.classify(model, grey)[alone.index], rtol=1e-5)
    frame = Image.fromarray(grey)
    frame.save(tmp_path / "a.gif", save_all=True, append_images=[opacity])  # left open by PIL
    assert dl.classify(model, tmp_path / "a.gif").equals(dl.classify(model, grey))
    wrong = splits["test"].images[1], np.ones((3, 9, 9)) / 2, np.full((9, 9), np.nan), grey[0]
    batch = splits["test"].images[:5] > 0
    for picture in (*wrong, batch, 1.0 * grey, grey - 256.0, 0 * grey, grey[:0], grey * 1j, None):
        with pytest.raises(ValueError, match="^a picture (is an array|shows an item)"):
            dl.classify(model, picture)


def test_light_and_dark_parts_of_an_item_on_grey_stay_apart(monkeypatch):
    seen = []
    monkeypatch.setattr(dl, "compute_logits", lambda _, x: seen.append(x) or torch.eye(len(x), 10))
    ramp = np.pad(np.tile(np.linspace(0, 1, 28, dtype="float32"), (28, 1)), 4, constant_values=0.5)
    dl.classify(None, ramp)
    one, other = ((seen[0][:2, 0, 14] * dl.STD + dl.MEAN) * 255).round().int().tolist()
    assert min(one[0], one[-1]) < 9 and max(one[0], one[-1]) > 246
    assert (one[0], one[-1]) == (other[-1], other[0])
