"""The bundled data set, Parquet files, torchvision's data sets, channels, imbalance, and the list of data sets."""

import gzip
import importlib.util
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import torch
import torchvision.datasets
import yaml
from PIL import Image

from fishermask import cli
from fishermask.config import DataConfig, ExperimentConfig, parse
from fishermask.data import sources
from fishermask.data.dataset import load_dataset
from fishermask.data.imbalance import select_pool
from fishermask.errors import InputError
from fishermask.experiment.inputs import prepare_inputs
from fishermask.sweeps import sweep_file

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "platform/fishermask/data/fashion_mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
DIGEST = "9f0053cf56ccd94f6af8870d7983a947afbea5c5309fae3b5231f8b1ebb686d1"

spec = importlib.util.spec_from_file_location("make_bundled_data", ROOT / "scripts/make_bundled_data.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


def bundled():
    """Return the bundled data set."""
    return load_dataset(DataConfig())


def test_bundled_data_have_1000_and_200_images_of_each_class_in_8_megabytes():
    data = bundled()
    assert torch.bincount(data.train.labels).tolist() == [1000] * 10
    assert torch.bincount(data.test.labels).tolist() == [200] * 10
    assert data.image_shape == (1, 28, 28)
    assert data.classes[9] == "Ankle boot"
    assert len(set(data.train.ids)) == 10_000
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 8e6


def test_script_reproduces_bundled_data_from_idx_files(tmp_path):
    """Use the original files if Debian's package is installed, otherwise IDX files with the same images."""
    assert script.content_digest(BUNDLED) == DIGEST
    source = DEBIAN
    if not DEBIAN.exists():
        source = tmp_path / "idx"
        source.mkdir()
        data = bundled()
        for prefix, split in (("train", data.train), ("t10k", data.test)):
            rows = [int(name.split("/")[1].removesuffix(".png")) for name in split.ids]
            # The script skips the images in between, as their label 255 is no class.
            images, labels = np.zeros((max(rows) + 1, 28, 28), np.uint8), np.full(max(rows) + 1, 255, np.uint8)
            images[rows], labels[rows] = split.images[:][:, 0].numpy(), split.labels.numpy()
            write_idx(source / f"{prefix}-images-idx3-ubyte.gz", images)
            write_idx(source / f"{prefix}-labels-idx1-ubyte.gz", labels)
    assert script.make_files(source, tmp_path / "made") == DIGEST


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def png(shape=(8, 8), value=0) -> bytes:
    return encode(np.full(shape, value, np.uint8))


NOISE = encode(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8))


def write_parquet(path: Path, images: list, labels: list, image="image", label="label", paths=None) -> Path:
    paths = paths or [None] * len(images)
    structs = [None if b is None else {"bytes": b, "path": p} for b, p in zip(images, paths, strict=True)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({image: pa.array(structs, kind), label: pa.array(labels)}), path)
    return path


def load_parquet(path: Path, **settings):
    return load_dataset(pictures.config(path).model_copy(update=settings))


def test_parquet_paths_become_ids(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [png(value=v) for v in (1, 2, 3)], [0, 2, 1], "img", paths=list("xyz"))
    data = load_parquet(file)
    assert list(data.train.ids) == ["x", "y", "z"]
    assert data.train.images[:][:, 0, 0, 0].tolist() == [1, 2, 3]
    assert data.train.labels.tolist() == [0, 2, 1]
    assert data.classes == ["0", "1", "2"]


def test_parquet_folders_and_globs_are_read_in_order_and_rows_without_paths_get_ids(tmp_path):
    write_parquet(tmp_path / "b.parquet", [png(value=2)], [1])
    write_parquet(tmp_path / "a.parquet", [png(value=1)], [0])
    for source in (tmp_path, tmp_path / "*.parquet"):
        data = load_parquet(source)
        assert data.train.images[:][:, 0, 0, 0].tolist() == [1, 2]
        assert list(data.train.ids) == ["train-00000000", "train-00000001"]


def test_color_images_stay_color_and_image_size_resizes_them(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [png((8, 8, 3)), png((16, 16, 3))], [0, 1])
    with pytest.raises(InputError, match="row 1 is 16 x 16 pixels, but .* 8 x 8; set data.image_size"):
        load_parquet(file)
    assert load_parquet(file, image_size=12).image_shape == (3, 12, 12)


def luma(color: np.ndarray) -> np.ndarray:
    """Return uint8 [h, w] of RGB [h, w, 3] by ITU-R 601-2, in the 16-bit integers of PIL's documentation."""
    return ((color.astype(np.int64) @ [19595, 38470, 7471] + 2**15) >> 16).astype(np.uint8)


def test_channels_are_converted_when_images_are_decoded(tmp_path):
    rng = np.random.default_rng(0)
    color, gray = rng.integers(0, 256, (8, 8, 3), np.uint8), rng.integers(0, 256, (8, 8), np.uint8)
    file = write_parquet(tmp_path / "a.parquet", [encode(color), encode(gray)], [0, 1], paths=["a", "b"])
    expected = {
        "keep": [color.transpose(2, 0, 1), np.stack([gray] * 3)],
        "rgb": [color.transpose(2, 0, 1), np.stack([gray] * 3)],
        "gray": [luma(color)[None], gray[None]],
    }
    for channels, images in expected.items():
        assert np.array_equal(load_parquet(file, channels=channels).train.images[:].numpy(), images)
    converted = load_parquet(file, channels="gray").train.images
    sent = pickle.dumps(converted)
    shutil.rmtree(converted.origin.store)
    assert np.array_equal(pickle.loads(sent)[:].numpy(), expected["gray"])


def test_statistics_of_a_bundled_data_set_follow_its_channels():
    color = load_dataset(DataConfig(channels="rgb"))
    assert color.published == ((0.2860,) * 3, (0.3530,) * 3)
    assert torch.equal(color.test.images[:5], bundled().test.images[:5].expand(5, 3, 28, 28))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: write_parquet(f, [png(), b"no image"], [0, 1]), "row 1: the image does not decode"),
        (lambda f: write_parquet(f, [png(), None], [0, 1]), "row 1: the image does not decode"),
        (lambda f: write_parquet(f, [png(), NOISE[: len(NOISE) // 2]], [0, 1]), "row 1: the image does not decode"),
        (
            lambda f: write_parquet(f, [png(), png()], [0, None]),
            "row 1: label must be 0 to 99999, got null; give the row",
        ),
        (
            lambda f: write_parquet(f, [png()], ["cat"]),
            r"data.label_column: column 'label' of .* is string; convert it to integers 0, 1, 2, \.\.\.$",
        ),
        (lambda f: write_parquet(f, [png()], [None]), "data.label_column: column 'label' of .* is null; convert it"),
        (lambda f: write_parquet(f, [png()], [0], label="y"), "data.label_column: .* integer columns: y"),
        (lambda f: write_parquet(f, [png(), png()], [0, 10**9]), "row 1: label must be 0 to 99999, got 1000000000"),
        (lambda f: pq.write_table(pa.table({"label": [1]}), f), "no single image column; .* none"),
        (lambda f: f.write_text("hello"), "cannot be read as Parquet"),
        (lambda f: None, "no Parquet file at"),
    ],
)
def test_bad_parquet_file_is_refused_with_its_name(tmp_path, make, message):
    file = tmp_path / "bad.parquet"
    make(file)
    with pytest.raises(InputError, match=message) as caught:
        load_parquet(file)
    assert "bad.parquet" in str(caught.value)


def decode(tmp_path: Path, *images: bytes) -> torch.Tensor:
    names = [f"{i}" for i in range(len(images))]
    return load_parquet(
        write_parquet(tmp_path / "a.parquet", list(images), [0] * len(images), paths=names)
    ).train.images[:]


@pytest.mark.parametrize(("suffix", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_16_bit_images_are_scaled_to_8_bits(tmp_path, suffix, dtype):
    """PIL would clip all values above 255, which are nearly black, to white."""
    values = np.array([0, 1, 128, 129, 255, 256, 257, 385, 386, 30_000, 32_767, 32_768, 65_406, 65_407, 65_535], dtype)
    values = np.resize(values, (8, 8)).astype(dtype)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, suffix)
    expected = np.rint(values.astype(np.float64) * 255 / 65_535).astype(np.uint8)
    assert np.array_equal(decode(tmp_path, buffer.getvalue())[0, 0].numpy(), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.arange(64, dtype=np.uint8).reshape(8, 8)
    # EXIF 2.3 defines each orientation by the sides of the picture that row 0 and column 0 of the file show.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).save(buffer, "PNG", exif=exif)
    assert np.array_equal(decode(tmp_path, buffer.getvalue())[0, 0].numpy(), upright)


def test_file_name_with_glob_characters_is_read_as_a_file(tmp_path):
    file = write_parquet(tmp_path / "train[1]*.parquet", [png(value=7)], [0])
    write_parquet(tmp_path / "train1.parquet", [png(value=8)], [0])
    assert load_parquet(file).train.images[:].unique().tolist() == [7]


def test_path_column_of_type_null_is_accepted(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.null())])
    images = pa.array([{"bytes": png(value=v), "path": None} for v in (5, 6)], kind)
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "a.parquet")
    data = load_parquet(tmp_path / "a.parquet")
    assert data.train.images[:][:, 0, 0, 0].tolist() == [5, 6]


def test_different_class_names_in_train_and_test_are_refused(tmp_path):
    files = []
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        file = write_parquet(tmp_path / f"{name}.parquet", [png(), png()], [0, 1])
        note = json.dumps({"info": {"features": {"label": {"names": classes}}}})
        pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": note}), file)
        files.append(str(file))
    with pytest.raises(
        InputError, match="data.test: its classes are dog, cat, but the classes of data.train are cat, dog"
    ):
        load_dataset(DataConfig(name="parquet", train=files[0], test=files[1]))
    with pytest.raises(InputError, match="b.parquet and an earlier file name different classes"):
        load_parquet(tmp_path)


def test_fashion_mnist_is_read_from_torchvision_files(tmp_path):
    data = bundled()
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for prefix, split in (("train", data.train), ("t10k", data.test)):
        for kind, array in (
            ("images-idx3", split.images[:30][:, 0]),
            ("labels-idx1", split.labels[:30].to(torch.uint8)),
        ):
            write_idx(raw / "x.gz", array.numpy())
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(gzip.decompress((raw / "x.gz").read_bytes()))
    assert not sources.needs_download(DataConfig(name="FashionMNIST", root=str(tmp_path), download=True))
    loaded = load_dataset(DataConfig(name="FashionMNIST", root=str(tmp_path)))
    assert torch.equal(loaded.train.images[:], data.train.images[:30])
    assert torch.equal(loaded.test.labels, data.test.labels[:30])
    assert loaded.published is not None
    part = pickle.dumps(loaded.train.images.take(torch.tensor([20, 3])))
    shutil.rmtree(loaded.train.images.origin.store)
    assert torch.equal(pickle.loads(part)[:], data.train.images[torch.tensor([20, 3])])


def test_cifar10_and_svhn_are_read_with_channels_first(tmp_path, monkeypatch):
    """The files have torchvision's format, but not the checksums of the originals."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 3, 32, 32), np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {"data": images.reshape(10, -1), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a, **k: True)
    loaded = load_dataset(DataConfig(name="CIFAR10", root=str(tmp_path)))
    assert torch.equal(loaded.train.images[:10], torch.from_numpy(images))
    assert loaded.classes[3] == "c3"
    gray = load_dataset(DataConfig(name="CIFAR10", root=str(tmp_path), channels="gray"))
    assert np.array_equal(gray.train.images[:10][:, 0].numpy(), [luma(image.transpose(1, 2, 0)) for image in images])
    assert gray.published is None
    assert load_dataset(DataConfig(name="CIFAR10", root=str(tmp_path), image_size=8)).image_shape == (3, 8, 8)

    for split in ("train", "test"):
        mat = {"X": images.transpose(2, 3, 1, 0), "y": np.arange(1, 11, dtype=np.uint8)[:, None]}
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", mat)
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    loaded = load_dataset(DataConfig(name="SVHN", root=str(tmp_path)))
    assert torch.equal(loaded.train.images[:], torch.from_numpy(images))
    assert loaded.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "imagenet"}, "unknown data set 'imagenet'; available: fashion_mnist_small, CIFAR10"),
        ({"name": "CIFAR10"}, "data.root: missing"),
        ({"name": "MNIST", "root": "/nowhere"}, "set data.download to true"),
        (
            {"name": "parquet", "train": "a"},
            "data.train: no Parquet file at /.*/a; relative paths start in the working folder",
        ),
    ],
)
def test_missing_data_are_refused_with_the_setting(settings, message):
    with pytest.raises(InputError, match=message):
        load_dataset(DataConfig(**settings))


def test_needs_download_is_true_for_missing_files_and_downloads_nothing(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    for name in ("MNIST", "CIFAR10", "SVHN"):
        config = DataConfig(name=name, root=str(tmp_path / "data"), download=True)
        assert sources.needs_download(config)
        assert not sources.needs_download(config.model_copy(update={"download": False}))
    assert not sources.needs_download(DataConfig())
    with pytest.raises(InputError, match="^data.root: missing"):
        sources.needs_download(DataConfig(name="SVHN", download=True))
    assert list(tmp_path.iterdir()) == []


def test_torchvision_is_imported_only_for_its_data_sets():
    code = "import sys; from fishermask.data.dataset import load_dataset; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_listed_data_sets_name_their_required_settings():
    datasets = {info.name: info for info in sources.list_datasets()}
    assert list(datasets) == ["fashion_mnist_small", "CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "SVHN", "parquet"]
    assert datasets["CIFAR10"][2:] == (("data.root",), True)
    assert datasets["parquet"][2:] == (("data.train", "data.test"), False)
    assert datasets["fashion_mnist_small"][2:] == ((), False)
    for name, info in datasets.items():
        if info.settings:  # the first one that is missing is reported
            with pytest.raises(InputError, match=f"^{info.settings[0]}: missing"):
                load_dataset(DataConfig(name=name))
        assert "\n" not in info.summary


def rule(**settings):
    return parse(ExperimentConfig, {"imbalance": settings}).imbalance


def counts(seed=0, sizes=(100, 100, 100, 100), **settings):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(seed)
    rows, classes = select_pool(labels, len(sizes), rule(**settings), generator)
    assert rows.tolist() == sorted(set(rows.tolist()))
    pool_sizes = torch.bincount(labels[rows], minlength=len(sizes)).tolist()
    assert classes == [c for c, size in enumerate(pool_sizes) if size]
    return pool_sizes


def write_uneven(tmp_path: Path) -> dict:
    """Write 5, 0 and 3 training images of three classes, and 2 test images of each; return the settings."""
    for split, labels in (("train", [0] * 5 + [2] * 3), ("test", [0, 0, 1, 1, 2, 2])):
        write_parquet(tmp_path / f"{split}.parquet", [png((28, 28), 20 * i) for i in range(len(labels))], labels)
    return {"name": "parquet", "train": str(tmp_path / "train.parquet"), "test": str(tmp_path / "test.parquet")}


def test_default_pool_has_all_training_images_and_test_set_has_their_classes(tmp_path):
    settings = {"data": write_uneven(tmp_path), "strategy": "random", "budget": {"initial": 2, "query": 2, "total": 8}}
    data = prepare_inputs(parse(ExperimentConfig, settings)).data
    assert data.train.labels.tolist() == [0] * 5 + [1] * 3
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.classes == ["0", "2"]
    with pytest.raises(InputError, match="^imbalance: class 1 has no training images"):
        prepare_inputs(parse(ExperimentConfig, settings | {"imbalance": "balanced"}))


def test_dry_run_prints_one_line_per_pool_with_the_images_that_imbalance_drops(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    budget = {"initial": 2, "query": 2, "total": 4}
    base = {"data": write_uneven(tmp_path), "strategy": "random", "budget": budget, "model": "mlp"}
    grid = {"imbalance": ["none", {"kind": "counts", "counts": {0: 1, 2: 3}}], "seed": [0, 1]}
    Path("x.yaml").write_text(yaml.safe_dump({"name": "x", "base": base, "grid": grid}))
    assert cli.main(["sweep", "x.yaml", "--dry-run"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("pool")] == [
        "pool: 8 training images of train.parquet, 2 of 3 classes (imbalance: none)",
        "pool: 4 of 8 training images of train.parquet, 2 of 3 classes "
        "(imbalance: {kind: counts, counts: {0: 1, 2: 3}})",
    ]
    assert cli.main(["sweep", "x.yaml", "--dry-run", "imbalance=balanced", "imbalance.per_class=1"]) == 2
    assert "imbalance.per_class: the grid varies imbalance" in capsys.readouterr().err


def test_pool_lines_name_the_data_set_and_the_classes_without_test_images(tmp_path):
    data, counts = bundled(), rule(kind="counts", counts={2: 5, 7: 9}, permute=True)
    small = data.restrict(*select_pool(data.train.labels, 10, counts, torch.Generator()))
    assert small.describe_pool(counts) == [
        "pool: 14 of 10,000 training images of fashion_mnist_small, 2 of 10 classes "
        "(imbalance: {kind: counts, counts: {2: 5, 7: 9}, permute: true})"
    ]
    for split, labels in (("train", [0, 1, 2]), ("test", [1])):
        write_parquet(tmp_path / f"{split}.parquet", [png(value=50 * i) for i in range(len(labels))], labels)
    files = {split: str(tmp_path / f"{split}.parquet") for split in sources.SPLITS}
    data = load_dataset(DataConfig(name="parquet", **files))
    assert data.describe_pool(rule(kind="none")) == [
        "pool: 3 training images of train.parquet, 3 classes (imbalance: none)",
        "data.test: no images of classes 0, 2; the metrics leave them out",
    ]
    data = data.restrict(torch.tensor([0, 1]), [0, 1])
    assert data.describe_pool(rule(kind="none"))[1] == "data.test: no images of class 0; the metrics leave it out"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "x.parquet"}, "data.train: not used by fashion_mnist_small; set data.name to parquet, or remove it"),
        ({"label_column": "y"}, "data.label_column: not used by fashion_mnist_small; set data.name to parquet, or"),
        (
            {"name": "parquet", "root": "x"},
            "data.root: not used by parquet; set data.name to CIFAR10, CIFAR100, MNIST,",
        ),
        ({"name": "MNIST", "root": "x", "test": "y"}, "data.test: not used by MNIST; set data.name to parquet, or"),
        ({"download": True}, "data.download: not used by fashion_mnist_small; set data.name to CIFAR10, "),
    ],
)
def test_settings_of_another_source_are_refused(settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        load_dataset(DataConfig(**settings))


def test_file_of_both_splits_is_refused(tmp_path):
    for name in ("a", "b"):
        pictures.write(tmp_path / f"{name}.parquet")
    (tmp_path / "link.parquet").symlink_to("b.parquet")
    for train, test, shared in (
        (".", "b.parquet", "b"),
        ("*.parquet", ".", "a"),
        ("b.parquet", "link.parquet", "link"),
    ):
        data = DataConfig(name="parquet", train=str(tmp_path / train), test=str(tmp_path / test))
        with pytest.raises(InputError, match=f"^data.test: .*/{shared}.parquet is also a training file; give other"):
            load_dataset(data)


def test_imbalance_name_is_short_for_its_kind():
    assert rule(kind="balanced") == parse(ExperimentConfig, {"imbalance": "balanced"}).imbalance
    config = sweep_file.SweepConfig(name="s", base={"imbalance": "balanced"}, grid={"imbalance.per_class": [3]})
    assert sweep_file.expand(config).runs[0].config.imbalance == rule(kind="balanced", per_class=3)


def test_balanced_reduces_every_class_to_the_smallest():
    assert counts(kind="balanced", sizes=(50, 80, 60)) == [50, 50, 50]
    assert counts(kind="balanced", per_class=7, sizes=(50, 80, 60)) == [7, 7, 7]


def test_step_divides_rare_classes_by_the_ratio():
    assert sorted(counts(kind="step", ratio=20)) == [5, 5, 100, 100]
    assert counts(kind="step", ratio=10, rare_classes=[1, 2, 3]) == [100, 10, 10, 10]
    assert counts(kind="step", ratio=1) == [100] * 4


def test_long_tail_class_sizes_fall_exponentially():
    assert counts(kind="long_tail", ratio=8, order=[2, 0, 3, 1], per_class=80) == [40, 10, 80, 20]


def test_counts_drop_unnamed_classes_and_permute_assigns_them_by_seed():
    paper = {"kind": "counts", "counts": {0: 10, 1: 90, 2: 10}}
    assert counts(**paper) == [10, 90, 10, 0]
    permuted = {tuple(counts(seed, **paper, permute=True)) for seed in range(20)}
    assert permuted == {(10, 90, 10, 0), (90, 10, 10, 0), (10, 10, 90, 0)}


def test_seed_determines_the_rare_classes():
    class_sizes = [tuple(counts(seed, kind="step", ratio=20)) for seed in range(20)]
    assert len(set(class_sizes)) > 3
    assert class_sizes == [tuple(counts(seed, kind="step", ratio=20)) for seed in range(20)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "balanced", "sizes": (5, 0, 5)},
            "class 1 has no training images; use none, or kind counts without this class",
        ),
        ({"kind": "balanced", "per_class": 101}, "imbalance.per_class: class 0: 101 images requested, 100 available"),
        ({"kind": "step", "ratio": 1000}, "ratio: 1000 leaves a class without images"),
        ({"kind": "step", "ratio": 2, "rare": 4}, "at most 3 can be rare"),
        (
            {"kind": "step", "ratio": 2, "rare": 2, "rare_classes": [0]},
            "imbalance.rare: 2, but imbalance.rare_classes lists 1; remove one of the two settings",
        ),
        (
            {"kind": "counts", "counts": {0: 5, 3: 500}},
            "imbalance.counts: class 3: 500 images requested, 100 available",
        ),
        ({"kind": "step", "ratio": 2, "rare_classes": [4]}, "no class 4; the data set has classes 0 to 3"),
        ({"kind": "long_tail", "ratio": 2, "order": [0, 1]}, "each of the 4 classes once"),
        ({"kind": "counts", "counts": {0: 5, 9: 5}}, "no class 9"),
    ],
)
def test_impossible_imbalance_is_refused_with_the_setting(settings, message):
    with pytest.raises(InputError, match=message):
        counts(**settings)


def test_test_set_has_the_classes_of_the_pool_with_labels_from_zero():
    data = bundled()
    rows, classes = select_pool(data.train.labels, 10, rule(kind="counts", counts={2: 5, 7: 9}), torch.Generator())
    small = data.restrict(rows, classes)
    assert small.classes == [data.classes[2], data.classes[7]]
    assert torch.bincount(small.train.labels).tolist() == [5, 9]
    assert torch.bincount(small.test.labels).tolist() == [200, 200]
    assert [data.train.ids[row] for row in rows] == list(small.train.ids)


def test_data_of_a_single_class_are_refused(tmp_path):
    table = pq.read_table(pictures.write(tmp_path / "four.parquet"))
    same = table.set_column(table.column_names.index("label"), "label", pa.array([0] * len(table)))
    pq.write_table(same, tmp_path / "one.parquet")
    settings = {
        "data": pictures.config(tmp_path / "one.parquet").model_dump(),
        "strategy": "random",
        "budget": {"initial": 2, "query": 2, "total": 4},
    }
    with pytest.raises(InputError, match="^data: all images belong to one class, '0'; a classifier needs two or more"):
        prepare_inputs(parse(ExperimentConfig, settings))
