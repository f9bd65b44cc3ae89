"""Views of stored images: their content, and their transfer to other processes without pixels."""

import pickle
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from pictures import BY_NAME, NAMES, PIXELS, SHUFFLED, SMALL, config, load, stores, write

from fishermask.config import DataConfig, ExperimentConfig, parse
from fishermask.data.dataset import load_dataset
from fishermask.data.ids import Ids
from fishermask.errors import InputError
from fishermask.experiment.inputs import prepare_inputs
from fishermask.learning.models import mlp
from fishermask.pool.ray_shards import RayShards
from fishermask.pool.shard import Shard
from fishermask.pool.shards import LocalShards
from fishermask.tensors.precision import Precision


@pytest.fixture(autouse=True)
def cache_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERMASK_CACHE", str(tmp_path / "cache"))


def test_views_index_like_numpy_arrays(tmp_path):
    train = load(write(tmp_path / "a.parquet")).train
    all_images = torch.from_numpy(PIXELS[BY_NAME][:, None])
    rows = torch.tensor([0, 3, 4, 5, 50, 119])
    positions = torch.tensor([4, 1, 1, 0])
    views = [
        (train.images, all_images),
        (train.images.narrow(0, 10, 30), all_images[10:40]),
        (train.take(rows).images, all_images[rows]),
        (train.take(rows).images.take(positions), all_images[rows][positions]),
        (train.images.narrow(0, 10, 30).take(positions).narrow(0, 1, 3), all_images[10:40][positions][1:]),
        (train.images.narrow(0, 7, 0), all_images[7:7]),
    ]
    for view, expected in views:
        assert (len(view), view.shape) == (len(expected), expected.shape)
        for selection in (slice(None), slice(1, 3), slice(0, None, 2), torch.arange(len(view)).flip(0)):
            images = view[selection]
            assert torch.equal(images, expected[selection])
            assert (images.dtype, images.is_contiguous()) == (torch.uint8, True)
    for position in (-1, 30):
        with pytest.raises(IndexError):
            train.images.narrow(0, 10, 30)[torch.tensor([position])]
    train.images[:5].zero_()
    assert torch.equal(train.images[:5], all_images[:5])


def test_positions_of_ids_in_the_store_in_a_slice_and_in_selected_rows(tmp_path):
    ids = load(write(tmp_path / "a.parquet")).train.ids
    queries = [*NAMES, "", "bonn", "zzz", NAMES[0] + "x", "köln/" + "9" * 100]
    for rows in (slice(None), slice(20, 70), torch.tensor([0, 3, 4, 5, 50, 119]), torch.tensor([], dtype=torch.long)):
        part: Ids = ids.take(rows)
        names = list(part)
        assert part.positions(queries).tolist() == [names.index(name) if name in names else -1 for name in queries]
        copy = pickle.loads(pickle.dumps(part))
        assert list(copy) == names
        assert copy.positions(queries).tolist() == part.positions(queries).tolist()


def test_pickled_view_has_no_pixels_and_maps_an_existing_store(tmp_path, monkeypatch):
    images = load(write(tmp_path / "a.parquet")).train.images
    view = images.take(torch.tensor([7, 3, 90]))
    assert len(pickle.dumps(images)) < 2500 < PIXELS.nbytes
    (folder,) = stores(tmp_path)
    pickled_view = pickle.dumps(view)
    (tmp_path / "a.parquet").unlink()
    new_cache = tmp_path / "elsewhere"
    monkeypatch.setenv("FISHERMASK_CACHE", str(new_cache))
    assert torch.equal(pickle.loads(pickled_view)[:], view[:])  # located by path
    new_cache.mkdir()
    folder.rename(new_cache / folder.name)
    assert torch.equal(pickle.loads(pickled_view)[:], view[:])  # located by name in the cache


def pickle_and_remove_store(tmp_path, images) -> bytes:
    pickled_view = pickle.dumps(images)
    shutil.rmtree(tmp_path / "cache")
    return pickled_view


@pytest.mark.parametrize("order", [range(120), SHUFFLED])
def test_machine_without_store_reads_only_the_row_groups_of_the_view(tmp_path, order, monkeypatch):
    """A row group that the view does not need is overwritten with zeros, so that reading it fails."""
    file = write(tmp_path / "a.parquet", order)
    train = load(file).train
    group = {NAMES[i]: row // 30 for row, i in enumerate(order)}
    rows = torch.tensor([i for i, name in enumerate(train.ids) if group[name] != 1])[torch.randperm(90)]
    view = train.images.take(rows)
    expected, expected_slice = view[:], view[:][20:50]
    pickled_images = pickle.dumps(train.images)
    pickled_view = pickle_and_remove_store(tmp_path, view)
    pages = pq.ParquetFile(file).metadata.row_group(1).column(0)
    with file.open("r+b") as stream:
        stream.seek(pages.dictionary_page_offset or pages.data_page_offset)
        stream.write(bytes(pages.total_compressed_size))
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(pickled_view)[:], expected)
    unpickled_twice = pickle.loads(pickle.dumps(pickle.loads(pickled_view)))
    assert torch.equal(unpickled_twice.narrow(0, 20, 30)[:], expected_slice)
    assert torch.equal(unpickled_twice[torch.arange(89, -1, -1)], expected.flip(0))
    assert torch.equal(unpickled_twice.narrow(0, 20, 30)[:], expected_slice)
    with pytest.raises(Exception):  # noqa: B017  the exception depends on pyarrow
        pickle.loads(pickled_images)[:]
    assert not (tmp_path / "cache").exists()


def test_bundled_data_are_decoded_again_without_a_store(tmp_path):
    view = load_dataset(DataConfig()).test.images.narrow(0, 300, 20)
    expected = view[:]
    assert torch.equal(pickle.loads(pickle_and_remove_store(tmp_path, view))[:], expected)


def test_missing_or_changed_source_is_refused_with_its_name(tmp_path):
    file = write(tmp_path / "a.parquet")
    pickled_view = pickle_and_remove_store(tmp_path, load(file).train.images)
    write(file, names=None)
    with pytest.raises(
        InputError, match=rf"^data.train: {file} on .* differs from the file on the machine where the run began; .*"
    ):
        pickle.loads(pickled_view)[:1]
    file.unlink()
    with pytest.raises(InputError, match=rf"^data.train: {file} is not on .*; copy the file to every machine$"):
        pickle.loads(pickled_view)[:1]


def test_ray_shards_decode_their_images_without_a_store(tmp_path, ray_session):
    file = write(tmp_path / "a.parquet")
    inputs = prepare_inputs(
        parse(ExperimentConfig, {"data": config(file).model_dump(), "budget": SMALL, "strategy": "random"})
    )
    images, model = inputs.data.train.images, mlp(1, 8, 4, width=4, depth=1)

    def probabilities(shards):
        shards.call(Shard.set_model, model, Precision())
        try:
            return shards.call(Shard.probabilities, 0, 1)[0]
        finally:
            shards.close()

    expected = probabilities(LocalShards(images, inputs.statistics))
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(probabilities(RayShards(images, inputs.statistics, 1, 0.5, 0)), expected)
    file.unlink()
    with pytest.raises(InputError, match=f"{file} is not on "):
        probabilities(RayShards(images, inputs.statistics, 1, 0.5, 0))
