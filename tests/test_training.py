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

import dl_utils as dl
from dl_utils import LeNet5, Setting, Split, TrainConfig, evaluate, train, train_many


def test_every_setting_learns_and_is_measured_without_dropout_after_each_epoch(trained, splits):
    hidden = ["conv1", "norm1", "conv2", "norm2", "fc3", "norm3", "fc4", "norm4"]
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
        names = [name for name in hidden if checkpoint.setting.batch_norm or name[:4] != "norm"]
        rows = list(zip(checkpoint.norms.epoch, checkpoint.norms.layer))
        assert rows == [(epoch, name) for epoch in range(4) for name in (*names, "fc5")]
        for epoch, model in ((0, dl.build_model(checkpoint.setting)), (3, checkpoint.model)):
            for row in checkpoint.norms[checkpoint.norms.epoch == epoch].itertuples():
                layer = model.layers.get_submodule(row.layer)
                weight, bias = (part.square().sum().sqrt() for part in (layer.weight, layer.bias))
                assert (row.weight, row.bias) == pytest.approx((weight.item(), bias.item()))


def test_small_data_are_learned_with_any_seed_or_tests_of_other_seeds_show_nothing(tiny):
    for seed, name in ((1, "baseline"), (2, "dropout_weight_decay"), (9, "baseline")):
        splits, config = dl.load_fashion_mnist(tiny, seed), TrainConfig(3, 16, seed)
        run = train(SETTINGS[name], splits, config, every_epoch=False)
        assert min(measured.accuracy for measured in run.metrics.values()) > 0.85, name


@pytest.mark.parametrize("name", ["weight_decay_batch_norm", "dropout_weight_decay"])
def test_a_shipped_run_begins_again_as_it_was(name, real_splits, monkeypatch):
    saved, found = dl.load_checkpoint(ROOT / f"weights/{name}.pt"), []
    here = torch.__version__, torch.backends.cpu.get_cpu_capability()
    same = here == (saved.versions["torch"], saved.versions["cpu"])
    # One more sign that this processor rounds as that one did.
    same = same and evaluate(saved.model, real_splits["val"]) == saved.metrics["val"]
    monkeypatch.setattr(dl, "evaluate", lambda *given: found.append(evaluate(*given)) or found[-1])
    with pytest.raises(StopIteration):  # after one epoch
        train(saved.setting, real_splits, saved.config, device="cpu", progress=iter(()).__next__)
    first = saved.history[saved.history.epoch == 1]
    assert list(first.split) == list(real_splits)
    if same:
        assert found == list(zip(first.loss, first.accuracy)), "to the last digit"
    for measured, accuracy in zip(found, first.accuracy, strict=True):
        assert measured.accuracy == pytest.approx(accuracy, abs=0.06)


def test_the_last_epoch_is_the_model_whatever_validation_says(splits):
    setting = replace(SETTINGS["baseline"], lr=0.3)  # accuracy goes up and down
    for seed in range(9):
        run = train(setting, splits, TrainConfig(6, 64, seed))
        *before, last = run.history[run.history.split == "val"].accuracy
        assert evaluate(run.model, splits["val"]).accuracy == last
        if last < max(before):
            return
    pytest.fail("no seed gives the test what it needs")


def test_all_settings_see_the_same_batches(splits, config, monkeypatch):
    seen, forward = {}, LeNet5.forward

    def record(self, images):
        if self.training:
            seen[name].append(images.clone())
        return forward(self, images)

    monkeypatch.setattr(LeNet5, "forward", record)
    for name, setting in SETTINGS.items():
        seen[name] = []
        train(setting, splits, config)
    seen[name := "other seed"] = []
    train(SETTINGS["baseline"], splits, replace(config, seed=1))
    assert not torch.equal(seen.pop(name)[0], seen["baseline"][0])
    assert [len(batch) for batch in seen["baseline"]] == 3 * [*[16] * 27, 8]
    epochs = [torch.cat(seen["baseline"][i : i + 28]).sum((1, 2, 3)) for i in (0, 28)]
    assert not torch.equal(*epochs), "one order for all epochs"
    for epoch in epochs:
        assert torch.equal(epoch.sort()[0], splits["train"].images.sum((1, 2, 3)).sort()[0])
    for name, batches in seen.items():
        assert all(map(torch.equal, batches, seen["baseline"])), name


def test_same_seed_same_bits_whatever_the_caller_has_set(splits, config, trained, unusual):
    torch.manual_seed(77)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        for name, setting in SETTINGS.items():
            again, first = train(setting, splits, config), trained[name]
            assert again.history.equals(first.history) and weights_equal(again, first)
            assert evaluate(again.model, splits["val"]) == first.metrics["val"]
            assert again.norms.equals(first.norms)
    assert dl.build_model(setting).layers.conv1.weight.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state), "training drew from the caller's generator"


def test_a_run_that_cannot_be_used_is_said_and_not_saved(splits):
    for size in (1, 439):  # of 440 images
        with pytest.raises(ValueError, match="batch norm cannot train on one image"):
            train(SETTINGS["batch_norm"], splits, TrainConfig(1, size))
    for size in (256, 64):  # the last of two steps, and one before
        with pytest.raises(dl.DivergedError, match="diverged in epoch 1"):
            train(replace(SETTINGS["baseline"], lr=1e30), splits, TrainConfig(1, size))


def test_evaluation_is_in_evaluation_mode_and_one_thread_and_restores_both(splits, unusual):
    model, threads = dl.build_model(replace(SETTINGS["combined"], dropout=0.9)).train(), set()
    model.register_forward_hook(lambda *_: threads.add(torch.get_num_threads()))
    statistics = model.layers.norm1.running_mean.clone()
    assert evaluate(model, splits["val"]) == evaluate(model, splits["val"])  # dropout is off
    assert torch.equal(model.layers.norm1.running_mean, statistics)
    logits = [dl.compute_logits(model, splits["val"].images, size) for size in (7, 500)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    one = Split(splits["val"].images[:1], splits["val"].labels[:1])
    evaluate(model, one)  # statistics of a batch of one would not exist
    with pytest.raises(RuntimeError):
        evaluate(model, Split(one.images[..., 1:], one.labels))
    assert model.training and model.layers.drop3.training and threads == {1}
    evaluate(model.eval(), one)
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
    for expected, found in zip(plain.parameters(), decayed.parameters()):
        torch.testing.assert_close(found, expected)


def test_the_rate_rises_for_a_fifth_of_the_steps_and_falls_to_zero():
    rates = [dl.warmup_cosine(step / 1000) for step in range(1001)]
    assert rates[0] == 0 and max(rates) == rates[200] == 1 and rates[1000] < 1e-12
    assert rates[:201] == sorted(rates[:201]) and rates[200:] == sorted(rates[200:], reverse=True)
    assert rates[100] == 0.5 and rates[600] == pytest.approx(0.5)


def test_training_measures_what_it_is_told_and_test_data_has_no_say(splits, config, trained):
    two, whole = {name: splits[name] for name in ("train", "val")}, trained["dropout"]
    for options, epochs in (({}, [1, 1, 2, 2, 3, 3]), ({"every_epoch": False}, [3, 3])):
        found = train(SETTINGS["dropout"], two, config, **options)
        assert list(found.history.epoch) == epochs and set(found.metrics) == {"train", "val"}
        assert weights_equal(found, whole) and found.metrics["val"] == whole.metrics["val"]


def test_real_workers_give_the_bits_of_one_run_and_the_bar_tells_the_truth(tiny, tmp_path):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    command = "train", "baseline", "combined", "--epochs", 8, "--seeds", 0, 3, "--out", tmp_path
    process = start(tiny, *command, "--workers", 2, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # at the end
        while part := os.read(terminal, 4096):
            shown += part
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 0 and len(re.findall(r"seed \d: train .* test", out)) == 4, shown
    counts = [int(n) for n in re.findall(rb"(\d+)/32 ", shown)]
    assert counts == sorted(counts) and counts[-1] == 32
    assert {1, 2, 3} & {*counts}, "nothing was shown before the first run ended"
    for found in dl.load_runs(tmp_path):
        setting, seed = dl.SETTINGS[found.setting.name], found.config.seed
        alone = train(setting, dl.load_fashion_mnist(tiny, seed), TrainConfig(8, seed=seed))
        assert weights_equal(found, alone) and found.history.equals(alone.history)


@pytest.fixture
def jobs(config):
    return [(SETTINGS[name], config) for name in ("baseline", "dropout", "combined")]


def test_a_dask_cluster_gives_the_same_bits(tiny, jobs, trained):
    distributed = pytest.importorskip("distributed")
    workers = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": None}
    with distributed.LocalCluster(**workers) as cluster, distributed.Client(cluster) as client:
        client.run(exec, f"import dl_utils; dl_utils.DATA_FILES = {dl.DATA_FILES}")
        runs = train_many(jobs, client.get_executor(), root=tiny)
    for run, (setting, _) in zip(runs, jobs):
        assert weights_equal(run, trained[setting.name])


def test_a_run_is_kept_while_the_next_trains_or_said_lost(tiny, jobs, one, monkeypatch, capsys):
    kept = threading.Event()

    def wait_and_train(setting, *rest, **options):
        assert setting.name == "baseline" or kept.wait(20), "the first result waits"
        return train(setting, *rest, **options)

    def keep(index, _):
        kept.set()
        if index == 0:
            raise OSError("disk full")

    monkeypatch.setattr(dl, "train", wait_and_train)
    runs = train_many(jobs, one, root=tiny, on_finish=keep)
    assert isinstance(runs[0], OSError) and isinstance(runs[1], dl.Checkpoint)
    assert "baseline, seed 0, failed: disk full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    3600000 kB\n"}, 3),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"}, 99),
        ({"proc/self/cgroup": "0::/a/b c\n", "sys/fs/cgroup/a/b c/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "2500000000"}, 2),
    ],
)
def test_workers_are_what_cpus_and_memory_allow(files, limit, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(99), raising=False)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert dl.usable_workers(tmp_path) == limit
