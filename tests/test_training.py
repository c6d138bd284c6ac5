"""Training and evaluation: what the numbers mean, and that they can be had again."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dl_utils
from dl_utils import (
    SCHEDULES,
    SETTINGS,
    Checkpoint,
    LeNet5,
    Setting,
    Split,
    TrainConfig,
    build_model,
    confusion_matrix,
    evaluate,
    load_checkpoint,
    make_optimizer,
    minibatches,
    predict,
    read_table,
    save_checkpoint,
    train,
    train_and_save,
    train_many,
)


def weights_equal(a, b):
    return all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))


def test_every_setting_learns(trained):
    for name, run in trained.items():
        assert run.metrics["test"].accuracy > 0.8, name


def test_history_is_tidy_and_holds_every_epoch_and_split(trained, config):
    for run in trained.values():
        assert list(run.history.columns) == ["epoch", "split", "loss", "accuracy"]
        rows = list(zip(run.history.epoch, run.history.split))
        assert rows == [(e, s) for e in (1, 2, 3) for s in ("train", "val", "test")]


def test_kept_model_is_that_of_the_best_validation_epoch(splits, monkeypatch):
    # A learning rate so high that accuracy goes up and down: the best epoch is not the last.
    monkeypatch.setitem(SCHEDULES, "constant", lambda t: 1.0)
    run = None
    for seed in range(8):
        config = TrainConfig(epochs=6, batch_size=64, seed=seed, schedule="constant")
        run = train(replace(SETTINGS["baseline"], lr=0.15), splits, config)
        if run.epoch < 5:
            break
    assert run.epoch < 5, "no seed gives the test what it needs"
    val = run.history[run.history.split == "val"].set_index("epoch").accuracy
    assert run.epoch == val.idxmax()  # the first of the greatest
    for name, split in splits.items():
        again = evaluate(run.model, split)
        row = run.history[(run.history.split == name) & (run.history.epoch == run.epoch)].iloc[0]
        assert again.accuracy == run.metrics[name].accuracy == row.accuracy
        assert again.loss == pytest.approx(row.loss) == pytest.approx(run.metrics[name].loss)


def test_test_data_has_no_say(splits, config):
    test = splits["test"]
    altered = {**splits, "test": Split(test.images.flip(0), test.labels)}
    runs = [train(SETTINGS["dropout"], data, config) for data in (splits, altered)]
    assert runs[0].epoch == runs[1].epoch and weights_equal(*runs)


def test_all_settings_see_the_same_batches(splits, config, monkeypatch):
    seen = {}
    for name, setting in SETTINGS.items():
        batches = seen.setdefault(name, [])
        forward = LeNet5.forward

        def record(self, images, batches=batches, forward=forward):
            if self.training:
                batches.append(images.clone())
            return forward(self, images)

        with monkeypatch.context() as patch:
            patch.setattr(LeNet5, "forward", record)
            train(setting, splits, config)
    assert len(seen["baseline"]) == 3 * 21
    for name, batches in seen.items():
        assert all(map(torch.equal, batches, seen["baseline"])), name


def test_same_seed_same_bits_other_seed_other_bits(splits, config, trained):
    for name, setting in SETTINGS.items():
        again = train(setting, splits, config)
        assert again.history.equals(trained[name].history)
        assert weights_equal(again, trained[name])
    other = train(SETTINGS["baseline"], splits, replace(config, seed=1))
    assert not other.history.equals(trained["baseline"].history)


def test_bits_do_not_depend_on_threads_or_the_global_generator(splits, config, trained):
    torch.set_num_threads(2)
    torch.manual_seed(77)
    try:
        again = train(SETTINGS["combined"], splits, config)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert weights_equal(again, trained["combined"])


def test_training_twice_at_once_gives_the_same_bits(splits, config, trained):
    with ThreadPoolExecutor(2) as executor:
        for run in executor.map(train, 4 * [SETTINGS["combined"]], 4 * [splits], 4 * [config]):
            assert weights_equal(run, trained["combined"])


def test_training_leaves_the_global_generator_alone(splits):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    train(SETTINGS["dropout"], splits, TrainConfig(1, 64))
    assert torch.equal(torch.rand(2), expected)


def test_evaluation_is_in_evaluation_mode_and_restores_training_mode(splits):
    model = build_model(replace(SETTINGS["combined"], dropout=0.9)).train()
    statistics = model.layers.norm1.running_mean.clone()
    first, second = evaluate(model, splits["val"]), evaluate(model, splits["val"])
    assert first == second  # dropout is off
    assert torch.equal(model.layers.norm1.running_mean, statistics)
    one = Split(splits["val"].images[:1], splits["val"].labels[:1])
    evaluate(model, one)  # statistics of a batch of one would not exist
    assert model.training and model.layers.drop3.training
    evaluate(model.eval(), one)
    assert not model.training


def test_train_accuracy_in_history_is_measured_without_dropout(splits):
    setting = replace(SETTINGS["dropout"], dropout=0.7)
    run = train(setting, splits, TrainConfig(1, 32))
    row = run.history[run.history.split == "train"].iloc[0]
    logits = run.model.eval()(splits["train"].images)
    hits = (logits.argmax(1) == splits["train"].labels).sum().item()
    assert row.accuracy == hits / len(splits["train"].labels)
    assert row.loss == pytest.approx(
        F.cross_entropy(logits, splits["train"].labels).item(), rel=1e-5
    )


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 150), batch_size=st.integers(1, 200))
def test_any_batch_size_gives_what_one_big_batch_gives(splits, trained, count, batch_size):
    model = trained["batch_norm"].model
    split = Split(splits["test"].images[:count], splits["test"].labels[:count])
    logits = model(split.images)
    with mock.patch.object(dl_utils, "EVALUATION_BATCH", batch_size):
        metrics = evaluate(model, split)
    assert metrics.accuracy == (logits.argmax(1) == split.labels).sum().item() / count
    loss = F.cross_entropy(logits, split.labels).item()
    assert metrics.loss == pytest.approx(loss, rel=1e-4, abs=1e-7)


def test_minibatches_cover_the_split_once_in_a_seeded_order(splits):
    split = splits["train"]
    batches = list(minibatches(split, 32, torch.Generator().manual_seed(3)))
    assert [len(b.labels) for b in batches] == [32] * 10 + [10]
    images = torch.cat([b.images for b in batches])
    assert torch.equal(images.sum((1, 2, 3)).sort()[0], split.images.sum((1, 2, 3)).sort()[0])
    again = list(minibatches(split, 32, torch.Generator().manual_seed(3)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again))
    assert not torch.equal(batches[0].images, split.images[:32])


def test_weight_decay_shrinks_weights(splits):
    def norm(weight_decay):
        setting = replace(SETTINGS["baseline"], weight_decay=weight_decay)
        model = train(setting, splits, TrainConfig(2, 32)).model
        return sum(p.square().sum().item() for p in model.parameters() if p.ndim > 1)

    assert norm(0.0) > norm(0.01) > norm(0.1)


@pytest.mark.parametrize("decay_all", [False, True])
def test_weight_decay_is_the_gradient_of_the_l2_penalty(splits, decay_all):
    setting = Setting("s", "s", weight_decay=0.01, batch_norm=True, lr=0.1, decay_all=decay_all)
    batch = Split(splits["train"].images[:64], splits["train"].labels[:64])
    plain, decayed = build_model(setting), build_model(setting)
    penalized = [p for p in plain.parameters() if decay_all or p.ndim > 1]
    penalty = 0.01 / 2 * sum(p.square().sum() for p in penalized)
    (F.cross_entropy(plain(batch.images), batch.labels) + penalty).backward()
    make_optimizer(plain, replace(setting, weight_decay=0.0), TrainConfig()).step()
    F.cross_entropy(decayed(batch.images), batch.labels).backward()
    make_optimizer(decayed, setting, TrainConfig()).step()
    for expected, found in zip(plain.parameters(), decayed.parameters()):
        torch.testing.assert_close(found, expected)


def test_a_job_given_twice_is_trained_once(splits, config, trained, tmp_path):
    job = SETTINGS["baseline"], config
    with ThreadPoolExecutor(1) as executor:
        runs = train_and_save([job, job], tmp_path, executor=executor, splits=splits)
    assert runs[0] is runs[1] and runs[0].history.equals(trained["baseline"].history)


def test_measure_limits_what_is_measured(splits, config, trained):
    without_test = {name: splits[name] for name in ("train", "val")}
    run = train(SETTINGS["baseline"], without_test, config, measure=("val",))
    assert set(run.history.split) == set(run.metrics) == {"val"}
    assert weights_equal(run, trained["baseline"])


def test_a_table_grows_by_the_columns_of_a_later_run(splits, tmp_path):
    with ThreadPoolExecutor(1) as executor:
        for name, measure in {"baseline": ("val",), "dropout": None}.items():
            job = (SETTINGS[name], TrainConfig(1, 32))
            options = {"executor": executor, "splits": splits, "measure": measure}
            (run,) = train_and_save([job], tmp_path, **options)
            assert isinstance(run, Checkpoint)
    table = read_table(tmp_path / "results.csv").set_index("setting")
    assert table.test_accuracy.isna().tolist() == [True, False]
    assert table.val_accuracy.notna().all()


def test_confusion_matrix_counts_images(splits, trained):
    run, split = trained["baseline"], splits["test"]
    matrix = confusion_matrix(run.model, split)
    assert matrix.to_numpy().sum() == len(split.labels)
    assert list(matrix.sum(axis=1)) == torch.bincount(split.labels, minlength=10).tolist()
    hits = sum(matrix.iloc[k, k] for k in range(10))
    assert hits == round(run.metrics["test"].accuracy * len(split.labels))
    torch.testing.assert_close(predict(run.model, split).sum(1), torch.ones(len(split.labels)))


def test_divergence_stops_with_the_epoch_and_the_loss(splits, config):
    with pytest.raises(
        ValueError, match=r"diverged in epoch \d: the validation loss is (nan|inf); choose a lower"
    ):
        train(replace(SETTINGS["baseline"], lr=1e6), splits, config)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0; expected a whole number >= 1"),
        ({"epochs": -3}, "epochs is -3; expected"),
        ({"epochs": 1.5}, "epochs is 1.5; expected"),
        ({"batch_size": 0}, "batch_size is 0; expected"),
        ({"seed": -1}, "seed is -1; expected"),
        ({"seed": 2**31}, "seed is 2147483648; expected a whole number >= 0 and < 1431655765"),
        ({"split_seed": 2**32}, "split_seed is 4294967296; expected"),
        ({"split_seed": True}, "split_seed is True; expected"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; expected one of sgd, adam"),
        ({"schedule": None}, "schedule is None; expected one of"),
    ],
)
def test_configs_out_of_range_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**change)


def test_batch_sizes_that_cannot_be_trained_on_are_refused(splits):
    with pytest.raises(ValueError, match="batch_size is 331; expected at most the 330"):
        train(SETTINGS["baseline"], splits, TrainConfig(1, 331))
    for size in (1, 47):  # 330 = 7 * 47 + 1
        with pytest.raises(ValueError, match=f"batch_size {size} leaves a batch of one image"):
            train(SETTINGS["batch_norm"], splits, TrainConfig(1, size))
    train(replace(SETTINGS["batch_norm"], norm_layers="conv"), splits, TrainConfig(1, 47))


def test_a_device_that_is_not_there_is_refused(splits, trained, tmp_path):
    save_checkpoint(tmp_path / "run.pt", trained["baseline"])
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"cannot use the device '{device}'; its own is"):
            train(SETTINGS["baseline"], splits, TrainConfig(1), device=device)
        with pytest.raises(ValueError, match=f"cannot use the device '{device}'; its own is"):
            load_checkpoint(tmp_path / "run.pt", device)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda s: Split(s.images.double(), s.labels), "images are .*float64; expected"),
        (lambda s: Split(s.images[:, :, :14], s.labels), r"images are \(100, 1, 14, 28\)"),
        (lambda s: Split(s.images.squeeze(1), s.labels), r"images are \(100, 28, 28\)"),
        (lambda s: Split(s.images, s.labels[1:]), r"labels are \(99,\).*expected \(100,\)"),
        (lambda s: Split(s.images, s.labels.int()), "labels are .*int32; expected"),
        (lambda s: Split(s.images, s.labels + 1), "labels run from 1 to 10; expected 0 to 9"),
        (lambda s: Split(s.images, s.labels - 1), "labels run from -1 to 8; expected 0 to 9"),
        (lambda s: Split(s.images[:0], s.labels[:0]), "the split is empty"),
    ],
)
def test_unusable_data_is_refused(splits, trained, make, sentence):
    split, model = make(splits["val"]), trained["baseline"].model
    for use in (evaluate, predict, confusion_matrix):
        with pytest.raises(ValueError, match=sentence):
            use(model, split)
    with pytest.raises(ValueError, match=sentence):
        train(SETTINGS["baseline"], {**splits, "val": split}, TrainConfig(1))


def test_training_needs_train_and_val_and_what_it_is_to_measure(splits):
    for name in ("train", "val"):
        rest = {key: split for key, split in splits.items() if key != name}
        for measure in (None, ("val",)):
            with pytest.raises(ValueError, match="expected splits named train, val"):
                train(SETTINGS["baseline"], rest, TrainConfig(1), measure=measure)
    with pytest.raises(ValueError, match="measure is test; expected val among them"):
        train(SETTINGS["baseline"], splits, TrainConfig(1), measure=("test",))
    with pytest.raises(ValueError, match="splits named train, val, tset; found train, val, test"):
        train(SETTINGS["baseline"], splits, TrainConfig(1), measure=("val", "tset"))


def test_train_many_gives_the_bits_of_one_after_the_other(splits, config, trained, capsys):
    jobs = [(setting, config) for setting in SETTINGS.values()]
    bad = replace(SETTINGS["dropout"], lr=1e6)
    finished = []
    runs = train_many([(bad, replace(config, seed=7)), *jobs], splits=splits, workers=2,
                      on_finish=finished.append)  # fmt: skip
    assert isinstance(runs[0], ValueError) and "diverged" in str(runs[0])
    assert "dropout, seed 7, failed: training diverged" in capsys.readouterr().err
    assert {id(run) for run in finished} == {id(run) for run in runs[1:]}
    for run, (name, alone) in zip(runs[1:], trained.items()):
        assert run.setting == SETTINGS[name]
        assert run.history.equals(alone.history) and weights_equal(run, alone)


def test_train_many_gives_the_same_bits_in_threads(splits, config, trained):
    jobs = [(SETTINGS[name], config) for name in ("baseline", "dropout", "combined")]
    with ThreadPoolExecutor(3) as executor:
        runs = train_many(jobs, executor, splits=splits)
    for run, (setting, _) in zip(runs, jobs):
        assert run.history.equals(trained[setting.name].history)


def test_a_result_that_cannot_be_kept_does_not_end_the_others(splits, config, capsys):
    kept = []

    def keep(run):
        if run.setting.name == "baseline":
            raise OSError("disk full")
        kept.append(run)

    jobs = [(SETTINGS[name], config) for name in ("baseline", "dropout")]
    with ThreadPoolExecutor(1) as executor:
        runs = train_many(jobs, executor, splits=splits, on_finish=keep)
    assert isinstance(runs[0], OSError) and kept == [runs[1]]
    assert "baseline, seed 0, failed: disk full" in capsys.readouterr().err


class Interrupted(ThreadPoolExecutor):
    """Ctrl-C comes while the third job is handed to it."""

    jobs = 0

    def submit(self, *arguments):
        self.jobs += 1
        if self.jobs == 3:
            raise KeyboardInterrupt
        return super().submit(*arguments)


def test_an_interrupt_while_jobs_are_handed_out_cancels_those_not_yet_begun(
    splits, config, trained, monkeypatch
):
    begun, interrupted = [], threading.Event()

    def stub(setting, *_, **__):
        begun.append(setting.name)
        interrupted.wait(20)
        return trained[setting.name]

    monkeypatch.setattr(dl_utils, "train", stub)
    with Interrupted(1) as executor:
        with pytest.raises(KeyboardInterrupt):
            jobs = [(setting, config) for setting in SETTINGS.values()]
            train_many(jobs, executor, splits=splits)
        interrupted.set()
    assert len(begun) <= 1


def test_a_result_is_kept_while_the_next_job_trains(splits, config, trained, monkeypatch):
    kept = threading.Event()

    def stub(setting, *_, **__):
        assert setting.name == "baseline" or kept.wait(20), "the first result waits"
        return trained[setting.name]

    monkeypatch.setattr(dl_utils, "train", stub)
    jobs = [(SETTINGS[name], config) for name in ("baseline", "dropout")]
    with ThreadPoolExecutor(1) as executor:
        runs = train_many(jobs, executor, splits=splits, on_finish=lambda run: kept.set())
    assert [run.setting.name for run in runs] == ["baseline", "dropout"]


def test_an_interrupt_cancels_the_jobs_not_yet_begun(splits, config, trained, monkeypatch):
    begun, interrupted = [], threading.Event()

    def stub(setting, *_, **__):
        begun.append(setting.name)
        assert len(begun) == 1 or interrupted.wait(20)
        return trained[setting.name]

    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(dl_utils, "train", stub)
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(KeyboardInterrupt):
            jobs = [(setting, config) for setting in SETTINGS.values()]
            train_many(jobs, executor, splits=splits, on_finish=interrupt)
        interrupted.set()
    assert len(begun) <= 2


def test_no_splits_are_not_those_of_fashion_mnist(config):
    with ThreadPoolExecutor(1) as executor:
        (run,) = train_many([(SETTINGS["baseline"], config)], executor, splits={})
    assert isinstance(run, ValueError) and "expected splits named train" in str(run)


def test_a_new_label_is_not_another_run(splits, trained, config, tmp_path):
    save_checkpoint(tmp_path / "baseline.pt", trained["baseline"])
    job = (replace(SETTINGS["baseline"], label="Plain"), config)
    (run,) = train_and_save([job], tmp_path, splits=splits)
    assert run.history.equals(trained["baseline"].history)


@pytest.mark.parametrize("name", ["1", "007", "null"])
def test_a_name_like_a_number_is_a_name(name, splits, tmp_path):
    for _ in range(2):
        with ThreadPoolExecutor(1) as executor:
            job = (Setting(name, "Odd"), TrainConfig(1, 64))
            train_and_save([job], tmp_path, splits=splits, executor=executor)
    assert list(read_table(tmp_path / "results.csv").setting) == [name]
    assert len(read_table(tmp_path / "history.csv")) == 3


def test_a_broken_table_is_said_before_training(config, tmp_path):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="results.csv lacks the columns setting, seed"):
        train_and_save([(SETTINGS["baseline"], config)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_workers_that_cannot_be_started_leave_ctrl_c_as_it_was(splits, config, monkeypatch):
    def refuse(*_, **__):
        raise OSError("too many open files")

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(dl_utils.ProcessPoolExecutor, "submit", refuse)
    with pytest.raises(OSError, match="too many open files"):
        train_many([(SETTINGS["baseline"], config)], splits=splits)
    assert signal.getsignal(signal.SIGINT) is handler


def test_train_many_of_nothing():
    assert train_many([]) == []
    with pytest.raises(ValueError, match="workers is 0; expected 1 or more"):
        train_many([], workers=0)


def test_different_jobs_for_one_file_are_refused(tmp_path):
    jobs = [(SETTINGS["baseline"], TrainConfig(epochs)) for epochs in (1, 2)]
    with pytest.raises(ValueError, match="two different jobs would write the same file"):
        train_and_save(jobs, tmp_path)


def test_train_many_takes_a_dask_cluster(splits, config, trained):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        jobs = [(SETTINGS[name], config) for name in ("baseline", "combined")]
        runs = train_many(jobs, client.get_executor(), splits=splits)
    for run, (setting, _) in zip(runs, jobs):
        assert weights_equal(run, trained[setting.name])
