"""Training and evaluation: what the numbers mean, and that they can be had again."""

import contextlib
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SETTINGS, start, weights_equal
from hypothesis import given, settings
from hypothesis import strategies as st

import dl_utils as dl
from dl_utils import LeNet5, Setting, Split, TrainConfig, evaluate, train, train_many


def test_every_setting_learns(trained):
    for name, checkpoint in trained.items():
        assert checkpoint.metrics["test"].accuracy > 0.7, name


def test_history_holds_every_epoch_and_split_and_ends_with_the_model(trained, splits):
    for checkpoint in trained.values():
        history = checkpoint.history
        rows = list(zip(history.epoch, history.split))
        assert rows == [(e, s) for e in (1, 2, 3) for s in ("train", "val", "test")]
        last = history[history.epoch == 3].set_index("split")
        for name, split in splits.items():
            again = evaluate(checkpoint.model, split)
            assert again == checkpoint.metrics[name] == tuple(last.loc[name, ["loss", "accuracy"]])


def test_the_last_epoch_is_the_model_whatever_validation_says(splits):
    setting = replace(SETTINGS["baseline"], lr=0.3)  # accuracy goes up and down
    for seed in range(9):
        checkpoint = train(setting, splits, TrainConfig(6, 64, seed))
        history = checkpoint.history[checkpoint.history.split == "val"]
        if history.accuracy.iloc[-1] < history.accuracy.max():
            break
    else:
        pytest.fail("no seed gives the test what it needs")
    assert evaluate(checkpoint.model, splits["val"]).accuracy == history.accuracy.iloc[-1]


def test_test_data_has_no_say(splits, config, trained):
    test = splits["test"]
    altered = {**splits, "test": Split(test.images.flip(0), test.labels)}
    assert weights_equal(train(SETTINGS["dropout"], altered, config), trained["dropout"])


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
    assert len(seen["baseline"]) == 3 * 28
    for name, batches in seen.items():
        assert all(map(torch.equal, batches, seen["baseline"])), name


def test_same_seed_same_bits_other_seed_other_bits(splits, config, trained):
    for name, setting in SETTINGS.items():
        again = train(setting, splits, config)
        assert again.history.equals(trained[name].history) and weights_equal(again, trained[name])
    other = train(SETTINGS["baseline"], splits, replace(config, seed=1))
    assert not other.history.equals(trained["baseline"].history)


def test_bits_do_not_depend_on_threads_or_on_the_global_generator(splits, config, trained):
    torch.set_num_threads(2)
    torch.manual_seed(77)
    expected = torch.rand(2)
    torch.manual_seed(77)
    try:
        again = train(SETTINGS["combined"], splits, config)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert weights_equal(again, trained["combined"])
    assert torch.equal(torch.rand(2), expected), "training drew from the caller's generator"


def test_training_twice_at_once_gives_the_same_bits(splits, config, trained):
    with ThreadPoolExecutor(2) as executor:
        for again in executor.map(train, 4 * [SETTINGS["combined"]], 4 * [splits], 4 * [config]):
            assert weights_equal(again, trained["combined"])


def test_evaluation_is_in_evaluation_mode_and_restores_the_mode(splits):
    model = dl.build_model(replace(SETTINGS["combined"], dropout=0.9)).train()
    statistics = model.layers.norm1.running_mean.clone()
    assert evaluate(model, splits["val"]) == evaluate(model, splits["val"])  # dropout is off
    assert torch.equal(model.layers.norm1.running_mean, statistics)
    one = Split(splits["val"].images[:1], splits["val"].labels[:1])
    evaluate(model, one)  # statistics of a batch of one would not exist
    assert model.training and model.layers.drop3.training
    evaluate(model.eval(), one)
    assert not model.training


def test_train_accuracy_is_measured_without_dropout(splits):
    setting = replace(SETTINGS["dropout"], dropout=0.7)
    checkpoint = train(setting, splits, TrainConfig(1, 32))
    row = checkpoint.history[checkpoint.history.split == "train"].iloc[0]
    logits, labels = checkpoint.model.eval()(splits["train"].images), splits["train"].labels
    assert row.accuracy == (logits.argmax(1) == labels).sum().item() / len(labels)
    assert row.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 150), batch_size=st.integers(1, 200))
def test_any_batch_size_gives_what_one_big_batch_gives(splits, trained, count, batch_size):
    model, images = trained["batch_norm"].model, splits["test"].images[:count]
    found = dl.compute_logits(model, images, batch_size)
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.argmax(1), model(images).argmax(1))


def test_minibatches_cover_the_split_once_in_a_seeded_order(splits):
    def batches():
        return list(dl.minibatches(splits["train"], 32, torch.Generator().manual_seed(3)))

    assert [len(batch.labels) for batch in batches()] == [32] * 13 + [24]
    images = torch.cat([batch.images for batch in batches()])
    sums = [part.sum((1, 2, 3)).sort()[0] for part in (images, splits["train"].images)]
    assert torch.equal(*sums) and not torch.equal(images[:32], splits["train"].images[:32])
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches(), batches()))


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


def test_training_measures_what_it_is_given_and_when_it_is_told(splits, config, trained):
    two = {name: splits[name] for name in ("train", "val")}
    checkpoint = train(SETTINGS["baseline"], two, config, every_epoch=False)
    assert list(checkpoint.history.epoch) == [3, 3] and set(checkpoint.metrics) == {"train", "val"}
    assert weights_equal(checkpoint, trained["baseline"])
    assert checkpoint.metrics["val"] == trained["baseline"].metrics["val"]


def test_confusion_matrix_counts_images(splits, trained):
    checkpoint, split = trained["baseline"], splits["test"]
    matrix = dl.confusion_matrix(checkpoint.model, split)
    assert list(matrix.sum(axis=1)) == torch.bincount(split.labels, minlength=10).tolist()
    hits = sum(matrix.iloc[k, k] for k in range(10))
    assert hits == round(checkpoint.metrics["test"].accuracy * len(split.labels))


def test_divergence_stops_with_the_epoch_and_what_to_do(splits, config):
    with pytest.raises(dl.DivergedError, match=r"diverged in epoch \d; choose a lower learning ra"):
        train(replace(SETTINGS["baseline"], lr=1e6), splits, config)


def test_a_device_that_is_not_there_is_said(splits, trained, tmp_path):
    dl.save_checkpoint(tmp_path / "run.pt", trained["baseline"])
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"cannot use the device {device}"):
            train(SETTINGS["baseline"], splits, TrainConfig(1), device=device)
        with pytest.raises(ValueError, match=f"cannot use the device {device}"):
            dl.load_checkpoint(tmp_path / "run.pt", device)


# Many runs.


def jobs_of(*names, config):
    return [(SETTINGS[name], config) for name in names]


def test_real_workers_give_the_bits_of_one_run_after_the_other_and_the_bar_tells_the_truth(
    tiny, tmp_path
):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    try:
        terminal, end = pty.openpty()
    except OSError:
        pytest.skip("there are no pseudo-terminals")
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
    for name in ("baseline", "combined"):
        for config in (TrainConfig(8, seed=0), TrainConfig(8, seed=3)):
            setting = dl.SETTINGS[name]
            found = dl.load_checkpoint(dl.checkpoint_path(tmp_path, setting, config))
            alone = train(setting, dl.load_fashion_mnist(tiny, config.seed), config)
            assert weights_equal(found, alone) and found.history.equals(alone.history)


def test_threads_give_the_same_bits_and_a_failed_job_does_not_end_the_others(
    tiny, config, trained, capsys
):
    bad = replace(SETTINGS["dropout"], name="bad", lr=1e6), config
    jobs = [bad, *jobs_of("baseline", "dropout", "combined", config=config)]
    finished = []
    with ThreadPoolExecutor(3) as executor:
        runs = train_many(jobs, executor, root=tiny, on_finish=lambda i, _: finished.append(i))
    assert isinstance(runs[0], dl.DivergedError) and sorted(finished) == [1, 2, 3]
    assert "bad, seed 0, failed: diverged in epoch" in capsys.readouterr().err
    for checkpoint, (setting, _) in zip(runs[1:], jobs[1:]):
        assert weights_equal(checkpoint, trained[setting.name])


def test_a_dask_cluster_gives_the_same_bits(tiny, config, trained):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.run(exec, f"import dl_utils; dl_utils.DATA_FILES = {dl.DATA_FILES}")
        jobs = jobs_of("baseline", "dropout", "combined", config=config)
        runs = train_many(jobs, client.get_executor(), root=tiny)
    for checkpoint, (setting, _) in zip(runs, jobs):
        assert weights_equal(checkpoint, trained[setting.name])


def test_a_run_is_kept_while_the_next_one_trains(config, trained, monkeypatch):
    kept = threading.Event()

    def job(job, **_):
        assert job[0].name == "baseline" or kept.wait(20), "the first result waits"
        return dl._to_bytes(trained[job[0].name])

    monkeypatch.setattr(dl, "_run_job", job)
    with ThreadPoolExecutor(1) as executor:
        jobs = jobs_of("baseline", "dropout", config=config)
        train_many(jobs, executor, on_finish=lambda *_: kept.set())


def test_an_interrupt_ends_what_has_not_begun(config, trained, monkeypatch):
    begun = []

    def job(job, **_):
        begun.append(job)
        time.sleep(0.2)
        return dl._to_bytes(trained["baseline"])

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dl, "_run_job", job)
    with ThreadPoolExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
        train_many(jobs_of(*SETTINGS, config=config), executor, on_finish=interrupt)
    assert len(begun) <= 3


def test_a_result_that_cannot_be_kept_does_not_end_the_others(tiny, config, capsys):
    def keep(index, _):
        if index == 0:
            raise OSError("disk full")

    with ThreadPoolExecutor(1) as executor:
        jobs = jobs_of("baseline", "dropout", config=config)
        runs = train_many(jobs, executor, root=tiny, on_finish=keep)
    assert isinstance(runs[0], OSError) and isinstance(runs[1], dl.Checkpoint)
    assert "baseline, seed 0, failed: disk full" in capsys.readouterr().err


def test_no_jobs_are_no_runs():
    assert train_many([]) == []


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, 99),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    3600000 kB\n"}, 3),
        ({"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"}, 99),
        ({"sys/fs/cgroup/memory.max": "5000000000\n"}, 4),
        ({"proc/self/cgroup": "0::/a/b c\n", "sys/fs/cgroup/a/b c/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "2500000000"}, 2),
    ],
)
def test_workers_are_what_cpus_and_memory_allow_and_not_what_the_host_has(
    files, limit, tmp_path, monkeypatch
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(99), raising=False)
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    assert dl.usable_workers(tmp_path) == limit
