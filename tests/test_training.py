"""Training and evaluation: what the numbers mean, and that they can be had again."""

import contextlib
import os
import re
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SETTINGS, start, weights_equal
from torch.optim import Adam

import dl_utils as dl
from dl_utils import LeNet5, Setting, Split, TrainConfig, evaluate, train, train_many


def test_every_setting_learns_and_is_measured_without_dropout_after_each_epoch(trained, splits):
    for checkpoint in trained.values():
        history = checkpoint.history
        rows = list(zip(history.epoch, history.split))
        assert rows == [(e, s) for e in (1, 2, 3) for s in ("train", "val", "test")]
        last = history[history.epoch == 3].set_index("split")
        for name, (images, labels) in splits.items():
            loss, accuracy = checkpoint.metrics[name]
            logits = checkpoint.model.eval()(images)
            assert accuracy == (logits.argmax(1) == labels).sum().item() / len(labels) > 0.85
            assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
            assert (loss, accuracy) == tuple(last.loc[name, ["loss", "accuracy"]])
        # Of the norms the first are those of the start, the last those of the model.
        layers = checkpoint.model.layers.named_children()
        names = [name for name, layer in layers if [*layer.parameters()]]
        rows = list(zip(checkpoint.norms.epoch, checkpoint.norms.layer))
        assert rows == [(epoch, name) for epoch in range(4) for name in names]
        for epoch, model in ((0, dl.build_model(checkpoint.setting)), (3, checkpoint.model)):
            for row in checkpoint.norms[checkpoint.norms.epoch == epoch].itertuples():
                layer = model.layers.get_submodule(row.layer)
                weight, bias = (part.square().sum().sqrt() for part in (layer.weight, layer.bias))
                assert (row.weight, row.bias) == pytest.approx((weight.item(), bias.item()))


@pytest.mark.parametrize("name", ["weight_decay_batch_norm", "dropout_weight_decay"])
def test_a_shipped_run_begins_again_as_it_was(name, real_splits, monkeypatch):
    saved, found = dl.load_checkpoint(ROOT / f"weights/{name}.pt"), []
    here = torch.__version__, torch.backends.cpu.get_cpu_capability()
    same = here == (saved.versions["torch"], saved.versions["cpu"])
    # One more sign that this processor rounds as that one did.
    same = same and evaluate(saved.model, real_splits["val"]) == saved.metrics["val"]
    monkeypatch.setattr(dl, "evaluate", lambda *given: found.append(evaluate(*given)) or found[-1])
    norms = iter([[]])  # of epoch 0
    monkeypatch.setattr(dl, "layer_norms", lambda _: next(norms))
    with pytest.raises(StopIteration):  # after one epoch
        train(saved.setting, real_splits, saved.config, device="cpu")
    first = saved.history[saved.history.epoch == 1]
    assert list(first.split) == list(real_splits)
    if same:
        assert found == list(zip(first.loss, first.accuracy)), "to the last digit"
    for measured, accuracy in zip(found, first.accuracy, strict=True):
        assert measured.accuracy == pytest.approx(accuracy, abs=0.06)


def test_all_settings_see_the_same_batches(splits, config, monkeypatch):
    seen, forward = {}, LeNet5.forward

    def record(self, images):
        if self.training:
            seen.setdefault(name, []).append(images.clone())
        return forward(self, images)

    monkeypatch.setattr(LeNet5, "forward", record)
    for name, setting in (SETTINGS | {"other seed": SETTINGS["baseline"]}).items():
        train(setting, splits, replace(config, seed=int(name == "other seed")))
    assert not torch.equal(seen.pop("other seed")[0], seen["baseline"][0])
    assert [len(batch) for batch in seen["baseline"]] == 3 * [*[16] * 27, 8]
    epochs = [torch.cat(seen["baseline"][i : i + 28]).sum((1, 2, 3)) for i in (0, 28)]
    assert not torch.equal(*epochs), "one order for all epochs"
    for epoch in epochs:
        assert torch.equal(epoch.sort()[0], splits["train"].images.sum((1, 2, 3)).sort()[0])
    for name, batches in seen.items():
        assert all(map(torch.equal, batches, seen["baseline"])), name


def test_same_seed_same_bits_whatever_the_caller_has_set(splits, config, trained, request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        for name, setting in SETTINGS.items():
            again, first = train(setting, splits, config), trained[name]
            assert again.history.equals(first.history) and weights_equal(again, first)
            assert evaluate(again.model, splits["val"]) == first.metrics["val"]
            assert again.norms.equals(first.norms)
    assert dl.build_model(setting).layers.conv1.weight.dtype == torch.float32
    assert torch.get_num_threads() == 2 and torch.get_default_dtype() == torch.float64
    assert torch.equal(torch.get_rng_state(), state), "training drew from the caller's generator"


def test_a_run_that_cannot_be_used_is_said_and_not_saved(splits):
    for size in (1, 439):  # of 440 images
        with pytest.raises(ValueError, match="batch norm cannot train on a last batch of one"):
            train(SETTINGS["batch_norm"], splits, TrainConfig(1, size))
    for size in (256, 64):  # the last of two steps, and one before
        with pytest.raises(FloatingPointError, match="diverged in epoch 1"):
            train(replace(SETTINGS["baseline"], lr=1e30), splits, TrainConfig(1, size))


def test_evaluation_is_in_evaluation_mode_and_restores_what_it_sets(splits, request):
    model = dl.build_model(replace(SETTINGS["combined"], dropout=0.9)).train()
    statistics, threads = model.layers.norm1.running_mean.clone(), []
    model.register_forward_hook(lambda *_: threads.append(torch.get_num_threads()))
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(2)
    val = splits["val"]
    assert evaluate(model, val) == evaluate(model, val), "dropout is on"
    assert torch.equal(model.layers.norm1.running_mean, statistics)
    with pytest.raises(RuntimeError):
        evaluate(model, val._replace(images=val.images[..., 1:]))
    assert torch.get_num_threads() == 2 and {*threads} == {1}
    assert model.training and model.layers.drop3.training
    evaluate(model.eval(), Split(val.images[:1], val.labels[:1]))
    assert not model.training


def test_weight_decay_is_the_gradient_of_the_l2_penalty_on_weights(splits):
    setting = Setting("s", "s", weight_decay=0.01, batch_norm=True, lr=0.1)
    images, labels = (part[:64] for part in splits["train"])
    plain, decayed = dl.build_model(setting), dl.build_model(setting)
    penalty = 0.01 / 2 * sum(p.square().sum() for p in plain.parameters() if p.ndim > 1)
    (F.cross_entropy(plain(images), labels) + penalty).backward()
    dl.make_optimizer(plain, replace(setting, weight_decay=0.0), TrainConfig()).step()
    F.cross_entropy(decayed(images), labels).backward()
    dl.make_optimizer(decayed, setting, TrainConfig()).step()
    assert type(dl.make_optimizer(plain, setting, TrainConfig(optimizer="adam"))) is Adam
    for expected, found in zip(plain.parameters(), decayed.parameters()):
        torch.testing.assert_close(found, expected)


def test_the_rate_rises_for_a_fifth_of_the_steps_and_falls_to_zero():
    rates = [dl.warmup_cosine(step / 1000) for step in range(1001)]
    assert rates[0] == 0 and max(rates) == rates[200] == 1 and rates[1000] < 1e-12
    assert rates[:201] == sorted(rates[:201]) and rates[200:] == sorted(rates[200:], reverse=True)
    assert rates[100] == 0.5 and rates[600] == pytest.approx(0.5)


def test_test_data_has_no_say_and_validation_none_in_which_epoch_is_kept(splits, config, trained):
    run = train(replace(SETTINGS["baseline"], lr=0.5), splits, TrainConfig(4, 64))
    *before, last = run.history[run.history.split == "val"].accuracy  # which falls
    assert evaluate(run.model, splits["val"]).accuracy == last < max(before)
    two, whole = {name: splits[name] for name in ("train", "val")}, trained["dropout"]
    for options, epochs in (({}, [1, 1, 2, 2, 3, 3]), ({"every_epoch": False}, [3, 3])):
        found = train(SETTINGS["dropout"], two, config, **options)
        assert list(found.history.epoch) == epochs and set(found.metrics) == {"train", "val"}
        assert weights_equal(found, whole) and found.metrics["val"] == whole.metrics["val"]


def test_real_workers_give_the_bits_of_one_run_and_the_bar_tells_the_truth(tiny, tmp_path):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    command = "train", "baseline", "combined", "--epochs", 3, "--seeds", 0, 3, "--out", tmp_path
    process = start(tiny, *command, "--workers", 2, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # at the end
        while part := os.read(terminal, 4096):
            shown += part
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 0 and len(re.findall(r"seed \d: train .* test", out)) == 4, shown
    counts = [int(n) for n in re.findall(rb"(\d+)/4 ", shown)]
    assert counts == sorted(counts) and counts[-1] == 4
    assert {1, 2, 3} & {*counts}, "nothing was shown before the first run ended"
    for found in dl.load_runs(tmp_path):
        setting, seed = dl.SETTINGS[found.setting.name], found.config.seed
        alone = train(setting, dl.load_fashion_mnist(tiny, seed), TrainConfig(3, seed=seed))
        assert weights_equal(found, alone) and found.history.equals(alone.history)


def test_a_dask_cluster_gives_the_same_bits(tiny, config, trained):
    distributed = pytest.importorskip("distributed")
    jobs = [(SETTINGS[name], config) for name in ("baseline", "combined")]
    with distributed.Client(n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        client.run(exec, f"import dl_utils; dl_utils.DATA_FILES = {dl.DATA_FILES}")
        runs = train_many(jobs, client.get_executor(), root=tiny)
    assert all(weights_equal(run, trained[run.setting.name]) for run in runs)


def test_a_run_is_kept_while_the_next_trains_or_said_lost(tiny, one, monkeypatch, capsys):
    kept = threading.Event()

    def wait_and_train(setting, *rest, **options):
        assert setting.name == "baseline" or kept.wait(20), "the first result waits"
        return train(setting, *rest, **options)

    def keep(index, _):
        kept.set()
        if index == 0:
            raise OSError("disk full")

    monkeypatch.setattr(dl, "train", wait_and_train)
    jobs = [(dl.SETTINGS[name], TrainConfig(1)) for name in ("baseline", "dropout")]
    runs = train_many(jobs, one, root=tiny, on_finish=keep)
    assert isinstance(runs[0], OSError) and isinstance(runs[1], dl.Checkpoint)
    assert "baseline, seed 0, failed: disk full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"available": 3.7e9}, 3),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"}, 99),
        ({"proc/self/cgroup": "0::/a/b c\n", "sys/fs/cgroup/a/b c/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "2500000000"}, 2),
    ],
)
def test_workers_are_what_cpus_and_memory_allow(files, limit, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(99), raising=False)
    memory = dl.psutil.virtual_memory()._replace(available=files.pop("available", 1e12))
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert dl.usable_workers(tmp_path) == limit
