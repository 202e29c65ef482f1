import sys

import grain
import numpy as np
import pytest
from jaxkit_experiments import data
from jaxkit_experiments.vq import images


def test_digits_come_in_one_order_and_cannot_be_changed():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    got = data.digit_images()
    assert np.array_equal(got.train_images * 16, bunch.images[order][:1257])
    assert np.array_equal(got.test_labels, bunch.target[order][1257:])
    assert (got.train_images.dtype, got.train_labels.dtype) == (np.float32, np.int32)
    assert got.train_images.max() == 1.0
    with pytest.raises(ValueError, match="read-only"):
        got.train_images[0] = 0


def test_cifar_is_read_channel_by_channel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    for folder, files, labels in (
        ("cifar-10-batches-bin", ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"), [[4]]),
        ("cifar-100-binary", ("train.bin", "test.bin"), [[9, 57]]),
    ):
        path = tmp_path / str(len(labels[0])) / folder
        path.mkdir(parents=True)
        records = [bytes(labels[0]) + image.tobytes() for image in pixels]
        (path / files[-1]).write_bytes(records[4])
        (path / files[0]).write_bytes(b"".join(records[: 4 if len(files) == 2 else 2]))
        if len(files) == 3:
            (path / files[1]).write_bytes(b"".join(records[2:4]))
        read = data.cifar(path)
        assert read.train_images.shape == (4, 32, 32, 3)
        np.testing.assert_array_equal(read.train_labels, labels[0][-1])
        got = read.train_images[3, 5, 7, 1]
        np.testing.assert_array_equal(got, np.float32(pixels[3, 1, 5, 7]) / 255)
        above = data.cifar(path.parent)  # the folder that holds it will do
        np.testing.assert_array_equal(above.test_images, read.test_images)
        np.testing.assert_array_equal(images.cifar(path).train, read.train_images)
        assert (read.test_images.shape, read.test_labels.dtype) == ((1, 32, 32, 3), np.int32)


def test_cifar_says_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="data must be a folder with the binary version"):
        data.cifar(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"x" * 3073)
    (tmp_path / "test.bin").write_bytes(b"x" * 3074)
    with pytest.raises(ValueError, match=r"whole records of 3074 bytes; .*train\.bin has 3073"):
        data.cifar(tmp_path)


def test_byte_corpus_of_the_standard_library():
    corpus = data.byte_corpus(limit=200_000)
    assert corpus.dtype == np.uint8
    assert np.array_equal(corpus[:1000], data.byte_corpus(limit=1000))
    # It is text: closed files are split by zero bytes, the first one compiles.
    first = bytes(corpus).split(b"\0")[0].decode()
    compile(first, "first", "exec", dont_inherit=True)


def test_byte_corpus_of_a_folder_is_sorted_and_skips_what_is_no_source(tmp_path):
    (tmp_path / "b.py").write_bytes(b"B")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.py").write_bytes(b"Z")
    (tmp_path / "a" / "c.txt").write_bytes(b"no")
    for folder in ("test", "site-packages", "__pycache__"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.py").write_bytes(b"no")
    (tmp_path / "_sysconfigdata_x.py").write_bytes(b"no")
    assert bytes(data.byte_corpus(tmp_path)) == b"Z\0B\0"
    assert bytes(data.byte_corpus(tmp_path, limit=3)) == b"Z\0B"
    assert bytes(data.byte_corpus(tmp_path / "a" / "c.txt")) == b"no"


def test_byte_windows_predict_every_byte_once():
    corpus = np.arange(12, dtype=np.uint8)
    windows = data.byte_windows(corpus, 4)
    assert np.array_equal(windows[:, 1:].ravel(), np.arange(1, 9))
    assert np.array_equal(data.byte_windows(corpus, 11), corpus[None])
    assert len(data.byte_windows(corpus, 4, stride=1)) == 8


def examples(count=10):
    return {"x": np.arange(count), "y": np.arange(count)[:, None] * np.ones((1, 3))}


def test_batches_are_a_map_dataset_with_random_access():
    batches = data.batches(examples(), 4, seed=3)
    assert isinstance(batches, grain.MapDataset)
    forwards = [batches[i] for i in range(12)]
    fresh = data.batches(examples(), 4, seed=3)
    for i in reversed(range(12)):
        assert np.array_equal(fresh[i]["x"], forwards[i]["x"])
        assert np.array_equal(fresh[i]["y"][:, 0], forwards[i]["x"])
        assert fresh[i]["y"].shape == (4, 3)
    assert len(batches) > sys.maxsize // 8


def test_every_epoch_is_another_permutation():
    batches = data.batches(examples(), 5, seed=0)
    epochs = [np.concatenate([batches[2 * e]["x"], batches[2 * e + 1]["x"]]) for e in range(6)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(10))
    assert len({epoch.tobytes() for epoch in epochs}) == 6
    assert not np.array_equal(data.batches(examples(), 5, seed=1)[0]["x"], epochs[0][:5])


def test_batches_straddle_epochs_and_lose_nothing():
    batches = data.batches(examples(), 4, seed=0)
    seen = np.concatenate([batches[i]["x"] for i in range(5)])
    assert np.array_equal(np.bincount(seen), np.full(10, 2))


def test_once_keeps_order_and_the_remainder():
    batches = data.batches(examples(), 4, repeat="once")
    assert [batch["x"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_take():
    taken = data.take(examples(), [3, 1])
    assert taken["x"].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: data.byte_corpus("/no/such/place"), FileNotFoundError, "nothing at /no/such"),
        (lambda: data.byte_corpus(limit=0), ValueError, "limit must be at least 1"),
        (lambda: data.byte_windows(np.zeros(4, np.uint8), 4), ValueError, "at least .* 5 bytes"),
        (lambda: data.byte_windows(np.zeros(4, np.uint8), 0), ValueError, "length must be"),
        (lambda: data.batches({}, 4), ValueError, "arrays must share"),
        (lambda: data.batches({"x": np.zeros(3), "y": np.zeros(4)}, 2), ValueError, "share"),
        (lambda: data.batches({"x": np.zeros(0)}, 2), ValueError, "at least 1"),
        (lambda: data.batches({"x": np.zeros(())}, 2), ValueError, "arrays must share"),
        (lambda: data.batches(examples(), 11), ValueError, "at most the 10 examples; got 11"),
        (lambda: data.batches(examples(), 0), ValueError, "batch_size must be at least 1"),
        (lambda: data.batches(examples(), 2, repeat="twice"), ValueError, "repeat must be one of"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds none"):
        data.byte_corpus(tmp_path)
