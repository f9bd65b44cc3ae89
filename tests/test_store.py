"""Stores of decoded images: their content, their lock, and damaged or unwritable ones."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import BY_NAME, KIND, NAMES, PIXELS, SHUFFLED, SMALL, config, load, png, stores, write

from fishermask.config import ExperimentConfig, parse
from fishermask.data import cache
from fishermask.data.dataset import load_dataset
from fishermask.data.store import describe_store, store_key
from fishermask.errors import InputError
from fishermask.experiment.inputs import prepare_inputs
from fishermask.experiment.loop import run
from fishermask.pool.shards import LocalShards
from fishermask.tensors.runtime import return_memory


@pytest.fixture(autouse=True)
def cache_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERMASK_CACHE", str(tmp_path / "cache"))


def test_store_has_arrays_sorted_by_the_bytes_of_the_ids(tmp_path):
    data = load(write(tmp_path / "a.parquet", SHUFFLED))
    (folder,) = stores(tmp_path)
    images, labels, ids = (np.load(folder / "train" / f"{name}.npy") for name in ("images", "labels", "ids"))
    assert (images == PIXELS[BY_NAME][:, None]).all()
    assert labels.tolist() == data.train.labels.tolist() == [i % 4 for i in BY_NAME]
    assert [name.decode() for name in ids] == list(data.train.ids) == [NAMES[i] for i in BY_NAME]
    assert sorted(path.name for path in folder.glob("train/*")) == sorted(
        ["images.npy", "labels.npy", "ids.npy", "source_rows.npy"]
    )


def test_order_of_the_source_does_not_change_the_rounds(tmp_path):
    results = []
    for name, order in (("a", range(120)), ("b", SHUFFLED)):
        settings = {
            "data": config(write(tmp_path / f"{name}.parquet", order)).model_dump(),
            "imbalance": {"kind": "step", "ratio": 3},
            "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
            "budget": {"initial": 8, "query": 5, "total": 18},
            "training": {"max_epochs": 3},
            "strategy": "bait",
        }
        setup = prepare_inputs(parse(ExperimentConfig, settings))
        assert len(setup.data.train.ids) == 2 * 30 + 2 * 10
        initial = [setup.data.train.ids[i] for i in setup.initial]
        rounds = [r.as_dict() | {"seconds": None} for r in run(setup, LocalShards)]
        results.append((list(setup.data.train.ids), setup.statistics, initial, rounds))
    assert results[0] == results[1]


def test_rows_without_unique_paths_keep_the_order_of_the_source(tmp_path):
    for file, names in (("a", None), ("b", [*NAMES[:-1], NAMES[0]])):
        train = load(write(tmp_path / f"{file}.parquet", SHUFFLED, names)).train
        assert list(train.ids) == [f"train-{row:08d}" for row in range(120)]
        assert (train.images[:][:, 0].numpy() == PIXELS[SHUFFLED]).all()


def test_image_with_lowest_id_determines_gray_or_color(tmp_path):
    gray, color = png(PIXELS[0]), png(np.stack([PIXELS[1]] * 3, -1))
    for name, order in (("ab", 1), ("ba", -1)):
        images = [{"bytes": gray, "path": "a"}, {"bytes": color, "path": "b"}][::order]
        pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / f"{name}.parquet")
        assert load(tmp_path / f"{name}.parquet").image_shape == (1, 8, 8)


def test_store_is_written_once_and_again_after_a_change_of_source_or_settings(tmp_path):
    file = write(tmp_path / "a.parquet")
    load(file)
    (first,) = stores(tmp_path)
    before = (first / "store.json").stat().st_mtime_ns
    load(file)
    load_dataset(config(file).model_copy(update={"augment": True, "statistics": "pool"}))
    assert (stores(tmp_path), (first / "store.json").stat().st_mtime_ns) == ([first], before)
    load_dataset(config(file).model_copy(update={"image_size": 6}))
    assert len(stores(tmp_path)) == 2
    write(file, SHUFFLED)
    load(file)
    assert len(stores(tmp_path)) == 3


def test_hashes_depend_on_pixels_labels_and_ids_only(tmp_path):
    hashes = load(write(tmp_path / "a.parquet")).hashes
    assert load(write(tmp_path / "b.parquet", SHUFFLED)).hashes == hashes  # another path, time and order
    table = pq.read_table(tmp_path / "a.parquet")
    rows = table["image"].to_pylist()
    changes = {
        "pixels": ("image", pa.array([rows[0] | {"bytes": rows[1]["bytes"]}, *rows[1:]], KIND)),
        "ids": ("image", pa.array([rows[0] | {"path": "a"}, *rows[1:]], KIND)),
        "labels": ("label", pa.array([1, *table["label"].to_pylist()[1:]])),
    }
    data = config(tmp_path / "a.parquet")
    for name, (column, values) in changes.items():
        file = tmp_path / f"{name}.parquet"
        pq.write_table(table.set_column(table.column_names.index(column), column, values), file)
        changed = load_dataset(data.model_copy(update={"train": str(file)})).hashes
        assert (changed["train"] != hashes["train"], changed["test"]) == (True, hashes["test"]), name


def test_two_concurrent_writers_leave_one_complete_store(tmp_path):
    file = write(tmp_path / "a.parquet")
    code = f"""
from fishermask.data import dataset
print(dataset.load_dataset(dataset.DataConfig(**{config(file).model_dump()})).train.images[:].sum().item())
"""
    writers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {writer.communicate()[0].strip() for writer in writers} == {str(PIXELS.sum())}
    assert len(stores(tmp_path)) == 1


def test_second_writer_keeps_the_store_of_the_first(tmp_path):
    """This happens on file systems without locks."""
    cache.cache_folder().mkdir()
    for text in ("first", "second"):
        with cache.create_store("key") as folder:
            (folder / cache.METADATA).write_text(text)
    assert [path.name for path in stores(tmp_path)] == ["key"]
    assert (cache.cache_folder() / "key" / cache.METADATA).read_text() == "first"


def test_next_writer_removes_the_files_of_a_killed_writer(tmp_path):
    file = write(tmp_path / "a.parquet")
    code = f"""
import os, signal
from fishermask.config import DataConfig
from fishermask.data import cache, dataset
write_rows = cache.write_rows
def write_and_die(path, rows, values):
    write_rows(path, rows, values)
    if path.name == cache.IMAGES:
        os.kill(os.getpid(), signal.SIGKILL)
cache.write_rows = write_and_die
dataset.load_dataset(DataConfig(**{config(file).model_dump()}))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (partial,) = stores(tmp_path)
    assert partial.name.endswith(".partial")
    assert (load(file).train.images[:][:, 0].numpy() == PIXELS[BY_NAME]).all()
    assert len(stores(tmp_path)) == 1
    assert partial not in stores(tmp_path)


def test_invalid_source_leaves_no_files_in_the_cache(tmp_path):
    images = [{"bytes": png(PIXELS[0]), "path": "a"}, {"bytes": b"?", "path": "b"}]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 1: the image does not decode"):
        load(tmp_path / "a.parquet")
    assert stores(tmp_path) == []


@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_allocated_array_occupies_its_disk_space(tmp_path, monkeypatch, system):
    """A sparse file would end the process when the disk is full."""
    if system == "macOS":
        monkeypatch.delattr(os, "posix_fallocate")
    path, size = tmp_path / "a.npy", 2 * len(cache.ZEROS) + 7
    cache.allocate_array(path, "|u1", (size,))
    assert 512 * path.stat().st_blocks >= size
    assert not np.load(path).any()
    assert len(np.load(path)) == size


def test_fifo_in_place_of_a_lock_is_refused_without_blocking(tmp_path):
    data = config(write(tmp_path / "a.parquet"))
    cache.cache_folder().mkdir()
    lock = cache.cache_folder() / f"{store_key(describe_store(data))}.lock"
    os.mkfifo(lock)
    with pytest.raises(InputError, match=f"^FISHERMASK_CACHE: {lock} is a FIFO"):
        load_dataset(data)


@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_unusable_cache_is_refused_with_the_variable(tmp_path, monkeypatch, system):
    if system == "macOS":
        monkeypatch.delattr(os, "posix_fallocate")
    file = write(tmp_path / "a.parquet")
    data = config(file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            InputError, match="^FISHERMASK_CACHE: .*/cache cannot hold .* MB of decoded images .*folder$"
        ):
            load_dataset(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    load(file)
    (folder,) = stores(tmp_path)
    os.truncate(folder / "train/images.npy", 1000)
    with pytest.raises(InputError, match=f"^FISHERMASK_CACHE: {folder} is damaged .*; remove it"):
        load(file)
    monkeypatch.setenv("FISHERMASK_CACHE", str(file))
    with pytest.raises(InputError, match="^FISHERMASK_CACHE: cannot write decoded images to .*a.parquet .*set it to"):
        load(file)


def test_environment_variables_locate_the_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_folder() == Path(os.environ["FISHERMASK_CACHE"])
    monkeypatch.delenv("FISHERMASK_CACHE")
    assert cache.cache_folder() == Path("/x/fishermask")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache/fishermask"


def private_bytes() -> int:
    """Return the modified private memory of this process; pages mapped from files do not count."""
    return_memory()  # freed memory that the allocator retains must not count
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def test_preparing_a_run_keeps_no_pixels_in_memory(tmp_path):
    """The pool has 147 MB of pixels."""
    image = png(np.full((128, 128, 3), 7, np.uint8))
    for name, count in (("big", 3000), ("small", 300)):
        images = pa.array([{"bytes": image, "path": f"{i:05d}"} for i in range(count)], KIND)
        table = pa.table({"image": images, "label": [i % 2 for i in range(count)]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    small = config(tmp_path / "small.parquet")
    big = small.model_copy(update={"train": str(tmp_path / "big.parquet")})
    for data in (small, big):
        settings = {"data": data.model_dump(), "budget": SMALL, "strategy": "random"}
        before = private_bytes()
        setup = prepare_inputs(parse(ExperimentConfig, settings))
        grown = private_bytes() - before
    assert setup.data.train.images.shape == (3000, 3, 128, 128)
    assert grown < 50e6


def _replace_array(name, change):
    def damage(folder):
        path = folder / "train" / name
        np.save(path, change(np.load(path)))

    return damage


def _replace_note(change):
    def damage(folder):
        note = json.loads((folder / "store.json").read_text())
        (folder / "store.json").write_text(json.dumps(change(note)))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "store.json").write_text("{"),
        lambda folder: (folder / "store.json").write_bytes(b"\xff"),
        _replace_note(lambda note: []),
        _replace_note(lambda note: {}),
        _replace_note(lambda note: note | {"classes": 5}),
        _replace_note(lambda note: note | {"shape": [1, 8]}),
        _replace_note(lambda note: note | {"shape": ["1", 8, 8]}),
        _replace_note(lambda note: note | {"files": {}}),
        _replace_note(lambda note: note | {"hashes": {"train": "0"}}),
        lambda folder: (folder / "train/labels.npy").unlink(),
        lambda folder: (folder / "train/labels.npy").write_bytes(b""),
        lambda folder: (folder / "train/ids.npy").write_bytes(b"noise"),
        lambda folder: (folder / "train/images.npy").unlink() or os.mkfifo(folder / "train/images.npy"),
        lambda folder: np.save(folder / "train/labels.npy", np.array([{}] * 120, dtype=object)),
        _replace_array("labels.npy", lambda labels: labels[:-1]),
        _replace_array("labels.npy", lambda labels: labels.astype(np.float64)),
        _replace_array("labels.npy", lambda labels: labels + 1),
        _replace_array("labels.npy", lambda labels: labels - 1),
        _replace_array("ids.npy", lambda names: np.arange(len(names))),
        _replace_array("images.npy", lambda images: images[:, :, :4]),
        _replace_array("images.npy", lambda images: images.astype(np.float32)),
        _replace_array("source_rows.npy", lambda rows: rows[:5]),
    ],
)
def test_damaged_store_is_refused_with_its_folder(tmp_path, damage):
    file = write(tmp_path / "a.parquet")
    load(file)
    (folder,) = stores(tmp_path)
    damage(folder)
    with pytest.raises(InputError, match=f"^FISHERMASK_CACHE: {folder} is damaged .*; remove it") as caught:
        load(file)
    assert "\n" not in str(caught.value)
