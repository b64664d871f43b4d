"""Image i of every source here is red with value i; BROKEN is unreadable wherever a source can hold such an image."""

import io
import os
import re
import sys
import tarfile
import warnings
import weakref
import zlib

import datasets
import numpy as np
import PIL.EpsImagePlugin
import pytest
import torch
import transformers
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from testreg.io import decoding
from testreg.io.decoding import FORMATS, open_image
from testreg.io.images import ImageStream, batched
from testreg.io.sources import EXTENSIONS, check_images, image_paths

NUM, BROKEN = 11, 3


def picture(i):
    return Image.new("RGB", (4, 4), (i, 0, 0))


def encoded(i):
    if i == BROKEN:
        return b"no image"
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def red(image):
    return torch.full((3, 1, 1), float(image.getpixel((0, 0))[0]))


def tensors():
    return torch.arange(NUM).float()[:, None, None, None].expand(-1, 3, 1, 1).clone()


class Pictures(Dataset):
    def __len__(self):
        return NUM

    def __getitem__(self, i):
        return picture(i), "label"


class Endless(IterableDataset):
    def __iter__(self):
        return map(picture, range(NUM))


def write_folder(folder):
    for i in range(NUM):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (folder / str(i % 2) / f"{i:02}.png").write_bytes(encoded(i))
    (folder / "notes.md").write_text("no image")
    return folder


def write_list(folder):
    lines = [str(path.relative_to(folder)) for path in sorted(write_folder(folder).rglob("*.png"))]
    (folder / "list.txt").write_text("# photographs\n\n" + "\n".join([f"  {lines[0]} ", *lines[1:]]) + "\n")
    return folder / "list.txt"


def write_shards(folder, members=lambda i: {"png": encoded(i), "json": b"{}"}):
    """Two shards, of 6 and 5 samples."""
    for shard, numbers in enumerate((range(6), range(6, NUM))):
        with tarfile.open(folder / f"photos-{shard}.tar", "w") as tar:
            for i in numbers:
                for extension, data in members(i).items():
                    member = tarfile.TarInfo(f"{i:03}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"{folder}/photos-{{0..1}}.tar"


def hf_dataset(column="image"):
    features = datasets.Features({"label": datasets.Value("int64"), column: datasets.Image()})
    images = [{"bytes": encoded(i), "path": None} for i in range(NUM)]
    return datasets.Dataset.from_dict({"label": list(range(NUM)), column: images}, features=features)


def saved(dataset, folder):
    dataset.save_to_disk(folder / "saved")
    return f"hf-dataset:{folder / 'saved'}"


def parquet(folder):
    hf_dataset().to_parquet(folder / "train.parquet")
    return f"hf-dataset:{folder}"


SOURCES = {
    "folder": write_folder,
    "list file": write_list,
    "paths": lambda folder: sorted(write_folder(folder).rglob("*.png")),
    "list": lambda folder: [None if i == BROKEN else picture(i) for i in range(NUM)],
    "dataset": lambda folder: Pictures(),
    "iterable dataset": lambda folder: Endless(),
    "tensor": lambda folder: tensors(),
    "pairs": lambda folder: TensorDataset(tensors(), torch.arange(NUM)),
    "list of batches": lambda folder: list(tensors().split(4)),
    "dataloader": lambda folder: DataLoader(TensorDataset(tensors(), torch.arange(NUM)), batch_size=4),
    "rows": lambda folder: [{"label": i, "jpg": encoded(i)} for i in range(NUM)],
    "hf dataset": lambda folder: hf_dataset(),
    "hf dataset, pandas format": lambda folder: hf_dataset("photo").with_format("pandas"),
    "hf iterable dataset": lambda folder: hf_dataset("photo").to_iterable_dataset(),
    "saved hf dataset": lambda folder: saved(hf_dataset(), folder),
    "hf dataset by name": parquet,
    "shards": write_shards,
    "webdataset": lambda folder: webdataset.WebDataset(write_shards(folder), shardshuffle=False),
}
IN_ORDER = SOURCES.keys() - {"folder", "list file", "paths", "saved hf dataset"}
INDEXED = ("folder", "list file", "paths", "list", "dataset", "tensor", "pairs", "rows", "saved hf dataset")
INDEXED += ("hf dataset", "hf dataset, pandas format")
WHOLE = ("dataset", "iterable dataset", "tensor", "pairs", "list of batches", "dataloader")  # have no broken image


def read(stream, *args):
    return [(number, int(image[0, 0, 0])) for number, image in stream.numbered(*args)]


@pytest.mark.parametrize("kind", SOURCES)
def test_numbers_do_not_depend_on_start_or_world_size(kind, tmp_path):
    images = SOURCES[kind](tmp_path)

    def stream():
        return ImageStream(images, red)

    everything = read(stream())
    broken = {} if kind in WHOLE else {BROKEN}
    assert sorted(value for _, value in everything) == sorted(set(range(NUM)).difference(broken))
    assert len({number for number, _ in everything}) == NUM - len(broken)
    assert max(number for number, _ in everything) == NUM - 1
    if kind in IN_ORDER:
        assert all(number == value for number, value in everything)
    assert stream().length == (NUM if kind in INDEXED else None)

    assert read(stream(), 5) == [each for each in everything if each[0] >= 5]
    for start, world_size in ((0, 2), (0, 3), (5, 2)):
        skipped = []
        for rank in range(world_size):
            mine = stream()
            assert read(mine, start, rank, world_size) == [
                (number, value) for number, value in everything if number >= start and number // 2 % world_size == rank
            ]
            skipped.append(mine.num_skipped)
        if not start:
            assert sum(skipped) == len(broken)


def test_ranks_take_turns_by_two():
    stream = ImageStream(tensors())
    assert [number for number, _ in read(stream, 0, 0, 2)] == [0, 1, 4, 5, 8, 9]
    assert [number for number, _ in read(stream, 3, 1, 2)] == [3, 6, 7, 10]
    assert stream.num_read == 10  # of both calls


@pytest.mark.parametrize("workers", [0, 2])
def test_only_images_of_the_rank_are_loaded(workers, tmp_path):
    class Noted(Pictures):
        def __getitem__(self, i):
            (tmp_path / str(i)).touch()  # a file, because workers are processes
            return super().__getitem__(i)

    stream = ImageStream(Noted(), red, workers=workers)
    (tmp_path / "0").unlink()  # looked at to see whether the items are batches
    assert [number for number, _ in stream.numbered(4, 1, 2)] == [6, 7, 10]
    assert {file.name for file in tmp_path.iterdir()} == {"6", "7", "10"}


@pytest.mark.parametrize("kind", ["hf iterable dataset", "shards", "iterable dataset"])
def test_streams_decode_only_images_of_the_rank(kind, tmp_path):
    decoded = []

    def noting(image):
        decoded.append(image.getpixel((0, 0))[0])
        return red(image)

    list(ImageStream(SOURCES[kind](tmp_path), noting).numbered(4, 1, 2))
    assert decoded == [6, 7, 10]


@pytest.mark.parametrize("kind", ["folder", "list file", "saved hf dataset"])
def test_num_images_samples_what_is_sorted_by_class(kind, tmp_path):
    images = SOURCES[kind](tmp_path)

    def sample(seed):
        return [value for _, value in read(ImageStream(images, red, num_images=6, seed=seed))]

    assert sample(0) == sample(0) != sample(1)
    assert {*sample(0), BROKEN} != {*range(7)}
    assert ImageStream(images, red, num_images=6).length == 6


@pytest.mark.parametrize("kind", ["list", "dataloader", "hf dataset", "hf dataset by name", "shards"])
def test_num_images_takes_the_first_of_the_rest(kind, tmp_path):
    stream = ImageStream(SOURCES[kind](tmp_path), red, num_images=5)
    assert read(stream) == [(i, i) for i in range(5) if kind == "dataloader" or i != BROKEN]
    assert stream.num_read + stream.num_skipped == 5


def test_workers_change_nothing(tmp_path):
    write_folder(tmp_path)
    assert read(ImageStream(tmp_path, red, workers=2)) == read(ImageStream(tmp_path, red))


def test_reading_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(ImageStream(tensors()).numbered())
    assert torch.equal(torch.rand(1), expected)


# Batches --------------------------------------------------------------------------------------------------------------


def test_a_stream_may_be_read_again_in_batches(tmp_path):
    stream = ImageStream(write_folder(tmp_path), red)
    for times in (1, 2):
        assert [len(batch) for batch in batched((image for _, image in stream.numbered()), 4)] == [4, 4, 2]
        assert (stream.num_read, stream.num_skipped, stream.length) == (times * (NUM - 1), times, NUM)
    assert stream.source == str(tmp_path)


def test_why_nothing_was_read():
    stream = ImageStream([None, None], red)
    assert read(stream) == []
    assert str(stream.nothing_read()).startswith("no image could be read from list: all 2 were unreadable")


def test_batched():
    batches = list(batched(iter(tensors()), 4))
    assert [batch[:, 0, 0, 0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    different = [torch.zeros(3, 2, 2), torch.zeros(3, 2, 4)]
    with pytest.raises(ValueError, match=r"different shapes \(\(3, 2, 2\), \(3, 2, 4\)\).*use batch_size=1"):
        list(batched(different, 2))
    assert [batch.shape for batch in batched(different, 1)] == [(1, 3, 2, 2), (1, 3, 2, 4)]


# Lists of paths -------------------------------------------------------------------------------------------------------


def test_a_list_is_read_in_its_order_relative_to_its_folder(tmp_path):
    for name in ("b.png", "a.png"):
        picture(0).save(tmp_path / name)
    (tmp_path / "lists").mkdir()
    file = tmp_path / "lists" / "photos.txt"
    file.write_text(f"../b.png\n\n  # not this one: c.png\n{tmp_path}/a.png\n")
    assert [path.resolve() for path in image_paths(file)] == [tmp_path / "b.png", tmp_path / "a.png"]


def test_a_list_names_its_missing_files(tmp_path):
    file = tmp_path / "photos.txt"
    picture(0).save(tmp_path / "a.png")
    file.write_text("# photos\na.png\nb.png\n")
    with pytest.raises(FileNotFoundError, match=r"photos.txt, line 3: there is no file .*b.png$"):
        image_paths(file)
    file.write_text("# photos\nb.png\na.png\nc.png\n")
    with pytest.raises(FileNotFoundError, match=r"line 2: there is no file .*b.png \(2 of 3 are missing\)"):
        image_paths(file)


# Hugging Face datasets ------------------------------------------------------------------------------------------------


def test_the_column_of_images_is_found():
    images = [{"bytes": encoded(i), "path": None} for i in (9, 5)]
    both = {"mask": [images[0]], "image": [images[1]]}
    dataset = datasets.Dataset.from_dict(both, features=datasets.Features(dict.fromkeys(both, datasets.Image())))
    assert read(ImageStream(dataset, red)) == [(0, 5)]
    assert read(ImageStream(dataset.rename_column("image", "overlay"), red)) == [(0, 9)]
    assert read(ImageStream([{"mask": picture(9), "png": picture(8), "image": picture(5)}], red)) == [(0, 5)]


@pytest.mark.parametrize("kind", ["dataset", "stream", "rows"])
def test_rows_without_images_name_their_columns(kind):
    dataset = hf_dataset().remove_columns("image").add_column("text", ["a"] * NUM)
    images = {"dataset": dataset, "stream": dataset.to_iterable_dataset(), "rows": list(dataset)}[kind]
    with pytest.raises(ValueError, match="no column of images among label, text: name one of them 'image'"):
        read(ImageStream(images, red))


def test_a_transform_of_the_dataset_is_kept():
    dataset = hf_dataset().select([0, 1, 2])
    dataset.set_transform(lambda rows: {"image": [red(image) + 100 for image in rows["image"]]})
    assert read(ImageStream(dataset)) == [(0, 100), (1, 101), (2, 102)]


def test_splits_are_chosen_by_name(tmp_path):
    dataset = hf_dataset()
    splits = datasets.DatasetDict({"train": dataset.select([0, 1]), "test": dataset.select([8, 9])})
    name = saved(splits, tmp_path)
    assert sorted(value for _, value in read(ImageStream(f"{name}:test", red))) == [8, 9]
    with pytest.raises(ValueError, match=f"has several splits: write {name}:train or {name}:test"):
        ImageStream(name, red)
    with pytest.raises(ValueError, match=f"has no split val: write {name}:train or {name}:test"):
        ImageStream(f"{name}:val", red)
    with pytest.raises(ValueError, match="DatasetDict is several sources of images: choose one of train, test"):
        ImageStream(splits, red)


# Shards ---------------------------------------------------------------------------------------------------------------


def test_samples_of_shards_without_an_image_are_counted(tmp_path):
    shards = write_shards(tmp_path, lambda i: {"json": b"{}"} if i in (0, 7) else {"JPG": encoded(i)})
    stream = ImageStream(shards, red)
    assert [number for number, _ in read(stream)] == [1, 2, 4, 5, 6, 8, 9, 10]
    assert stream.num_skipped == 3


def test_a_shard_may_be_empty(tmp_path):
    tarfile.open(tmp_path / "empty.tar", "w").close()
    stream = ImageStream(tmp_path / "empty.tar", red)
    assert read(stream) == []
    assert str(stream.nothing_read()) == f"no image could be read from {tmp_path / 'empty.tar'}"


def test_nothing_in_a_shard_is_unpickled(tmp_path):
    shards = write_shards(tmp_path, lambda i: {"png": encoded(i), "pkl": b"cbuiltins\nexit\n(tR."})
    assert len(read(ImageStream(shards, red))) == NUM - 1


def test_shards_are_shared_out_by_number_in_processes_of_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # of which webdataset would split shards, or refuse
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [number for number, _ in read(ImageStream(write_shards(tmp_path), red), 0, 1, 2)] == [2, 6, 7, 10]


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("{}/none", FileNotFoundError, "no folder of images at .*none: give a folder, a list of paths"),
        ("hf:someone/photos", FileNotFoundError, r"hf:someone/photos: give .* or hf-dataset:NAME\[:SPLIT\]"),
        ("{}", ValueError, r"no images \(.bmp, "),
        (__file__, ValueError, r"test_images.py is neither an image \(.bmp, .*\) nor a list \(.txt\): give a folder"),
        ("{}/none.txt", FileNotFoundError, "no list of images at .*none.txt"),
        ("{}/empty.txt", ValueError, "empty.txt lists no images"),
        ("{}/none.txt/hf-dataset:x", FileNotFoundError, "no folder of images"),
        ("hf-dataset:", ValueError, "hf-dataset: names no dataset: write hf-dataset:NAME"),
        ("hf-dataset:{}/none:train", FileNotFoundError, "no dataset's folder at .*none$"),
        ("hf-dataset:./none", FileNotFoundError, "no dataset's folder at ./none"),
        ("{}/photos-{{0..2}}.tar", FileNotFoundError, "no shard at .*photos-1.tar"),
        ("pipe:cat {}/photos-0.tar", ValueError, "is a shell command, which is not run"),
    ],
)
def test_names_are_checked_early(images, error, message, tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "photos-0.tar").touch()
    with pytest.raises(error, match=message):
        check_images(images.format(tmp_path))
    with pytest.raises(error, match=message):
        ImageStream(images.format(tmp_path), red)


@pytest.mark.parametrize("kind", ["folder", "list file", "saved hf dataset", "hf dataset by name", "shards"])
def test_good_names_pass(kind, tmp_path):
    check_images(SOURCES[kind](tmp_path))


def test_checking_a_name_downloads_nothing():
    check_images("hf-dataset:someone/photos:train")  # would fail: tests are offline
    check_images("https://example.invalid/photos-{000..015}.tar")


@pytest.mark.parametrize(("images", "library"), [("hf-dataset:x", "datasets"), ("x.tar", "webdataset")])
def test_a_missing_library_is_named(images, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ImportError, match=rf'{images} is read by {library}, which is missing: pip install "testreg\[data\]"'
    ):
        check_images(images)


def test_wrong_images(tmp_path):
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        ImageStream([], num_images=0)
    with pytest.raises(ValueError, match="needs a transform from PIL image to tensor"):
        ImageStream(write_folder(tmp_path))
    with pytest.raises(ValueError, match="Image images need a transform"):
        list(ImageStream([picture(0)]).numbered())
    with pytest.raises(ValueError, match=r"expected PIL images, paths or tensors .* got int"):
        list(ImageStream([7], red).numbered())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_is_an_unreadable_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the image is turned, and its tags are written anew
    exif[0x011A] = 1.5
    picture(0).save(tmp_path / "good.jpg", exif=exif)
    good = (tmp_path / "good.jpg").read_bytes()
    open_image(tmp_path / "good.jpg")
    broken = 0
    for position in range(20, good.index(b"\xff\xdb")):  # the EXIF tags, a byte at a time
        for value in (0, 2, 255):
            damaged = io.BytesIO(good[:position] + bytes([value]) + good[position + 1 :])
            try:
                open_image(damaged)
            except OSError:
                broken += 1
    assert broken


# Images in every form -------------------------------------------------------------------------------------------------


def as_input(image):
    """As ToTensor makes it."""
    return torch.from_numpy(np.array(image)).movedim(2, 0) / 255


def colourful():
    """(h, w, 3) uint8, no two rows, columns or colours alike."""
    rows, columns, colours = np.ogrid[:4, :5, :3]
    return (rows * 60 + columns * 10 + colours).astype(np.uint8)


def processed():
    processor = transformers.ViTImageProcessor(
        size={"height": 4, "width": 5}, image_mean=[0.0] * 3, image_std=[1.0] * 3, do_resize=False
    )
    return processor(images=Image.fromarray(colourful()), return_tensors="pt")


def in_file(folder, name="photo.png"):
    Image.fromarray(colourful()).save(folder / name)
    return folder / name


ONE_IMAGE = {
    "array": lambda folder: colourful(),
    "arrays": lambda folder: [colourful()],
    "batch of arrays": lambda folder: colourful()[None],
    "batches of arrays": lambda folder: iter([colourful()[None]]),
    "uint8 tensor": lambda folder: torch.from_numpy(colourful()).movedim(2, 0),
    "uint8 tensors": lambda folder: [torch.from_numpy(colourful()).movedim(2, 0)],
    "batch of uint8 tensors": lambda folder: torch.from_numpy(colourful()).movedim(2, 0)[None],
    "loader of uint8 tensors": lambda folder: DataLoader(torch.from_numpy(colourful()).movedim(2, 0)[None]),
    "float tensor": lambda folder: as_input(colourful()),
    "float array": lambda folder: as_input(colourful()).numpy(),
    "batch of float arrays": lambda folder: as_input(colourful()).numpy()[None],
    "PIL image": lambda folder: Image.fromarray(colourful()),
    "path": in_file,
    "name": lambda folder: str(in_file(folder)),
    "paths": lambda folder: [str(in_file(folder))],
    "list of folders": lambda folder: [in_file(folder).parent],
    "transformers": lambda folder: processed(),
    "dict": lambda folder: {"pixel_values": [as_input(colourful()).numpy()]},
    "loader of dicts": lambda folder: DataLoader([{"pixel_values": as_input(colourful())}]),
}


@pytest.mark.parametrize("kind", ONE_IMAGE)
def test_an_image_in_every_form_is_the_same_image(kind, tmp_path):
    ((number, image),) = ImageStream(ONE_IMAGE[kind](tmp_path), as_input).numbered()
    assert number == 0
    torch.testing.assert_close(image, as_input(colourful()))


@pytest.mark.parametrize(
    "make", [lambda: torch.zeros(3, 4, 4, dtype=torch.uint8), lambda: np.zeros((4, 4, 3), "uint8")]
)
def test_pixels_need_a_transform(make):
    with pytest.raises(ValueError, match=r"need a transform to float tensors \(3, h, w\): pass transform="):
        list(ImageStream([make()]).numbered())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"expected uint8 tensors \(3, h, w\) .* got uint8 \(4, 4, 3\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), r"expected uint8 tensors .* got int64"),
        (np.zeros((3, 4, 4), "uint8"), r"expected uint8 arrays \(h, w, 3\) .* got uint8 \(3, 4, 4\)"),
        (np.zeros((4, 4), "uint8"), r"expected uint8 arrays .* got uint8 \(4, 4\)"),
        (torch.zeros(8, 8, 3), r"image 0 of list is \(8, 8, 3\): move the channels to the front"),
        (torch.zeros(4, 4), r"expected image tensors \(3, h, w\)"),
        (torch.tensor([[[0.0, torch.nan]]]), "image 0 of list holds values that are not finite"),
        (torch.tensor([[[0.0, torch.inf]]]), "image 0 of list holds values that are not finite"),
    ],
)
def test_what_is_no_image_is_an_error(image, message):
    with pytest.raises(ValueError, match=message):
        list(ImageStream([image], as_input).numbered())


@pytest.mark.parametrize("transform", [np.array, lambda image: torch.from_numpy(np.array(image))])
def test_a_transform_makes_float_tensors(transform):
    with pytest.raises(ValueError, match=r"image 0 of list is .* after its transform: a model takes float tensors"):
        list(ImageStream([picture(0)], transform).numbered())


def test_pixels_that_were_not_normalised_are_warned_of_once():
    pixels = as_input(colourful()) * 255
    with pytest.warns(UserWarning, match="the values of image 1 of list run from 0 to 222, like") as caught:
        list(ImageStream([pixels / 255, pixels, pixels]).numbered())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(ImageStream([pixels - 100, pixels / 255, torch.full((3, 4, 4), 200.0)]).numbered())


# What lies among images -----------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_picture_is_skipped_and_counted(workers, tmp_path):
    for name in ("good.png", "good.bmp", "good.gif", "good.webp", "good.tif", "good.ppm", "good.jpeg"):
        picture(7).save(tmp_path / name)
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "dangling.jpg").symlink_to("nothing")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "program.jpg").write_bytes(EPS)
    for images in (tmp_path, sorted(tmp_path.iterdir()), [*tmp_path.iterdir(), tmp_path / "none.jpg"]):
        stream = ImageStream(images, red, workers=workers)
        assert len(read(stream)) == 7
        assert stream.num_skipped == 6 + (tmp_path / "none.jpg" in images if isinstance(images, list) else 0)
    stream = ImageStream([tmp_path / "fifo.jpg"], red, workers=workers)
    assert read(stream) == []
    message = str(stream.nothing_read())
    assert re.search(r"all 1 were unreadable \(the first: .*fifo.jpg is not a regular file", message)


@pytest.mark.parametrize("source", ["file", "bytes", "row of a dataset", "path of a dataset", "url of a dataset"])
def test_no_program_is_run_to_read_an_image(source, tmp_path, monkeypatch):
    def run(*args, **options):
        pytest.fail("Ghostscript was run")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", run)
    file = tmp_path / "photo.jpg"
    file.write_bytes(EPS)
    images = {
        "file": [file],
        "bytes": [{"jpg": EPS}],
        "row of a dataset": [{"image": {"bytes": EPS, "path": None}}],
        "path of a dataset": [{"image": {"bytes": None, "path": str(file)}}],
        "url of a dataset": [{"image": {"bytes": None, "path": f"file://{file}"}}],
    }[source]
    stream = ImageStream(images, red)
    assert (read(stream), stream.num_skipped) == ([], 1)
    picture(7).save(file, "PNG")  # which the same source would read
    if file.name in str(images):
        assert read(stream) == [(0, 7)]


def png(width, height, rows):
    """Of 1 bit a pixel."""

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (1, 300_000, "it has 1 x 300000 pixels: no side may be 50 times the other"),
        (30_000, 30_000, "could be decompression bomb"),
    ],
)
def test_small_files_of_huge_pictures_are_not_decoded(width, height, message, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(width, height, b"\0\0" * 300_000))
    assert (tmp_path / "bomb.png").stat().st_size < 2_000
    stream = ImageStream(tmp_path, lambda image: pytest.fail(f"{image.size} was decoded"))
    assert read(stream) == []
    assert (stream.num_skipped, message in stream.first_unreadable) == (1, True)


def test_a_line_of_pixels_is_refused_in_memory_too():
    stream = ImageStream([np.zeros((1, 51, 3), "uint8"), Image.new("L", (51, 1))], as_input)
    assert (read(stream), stream.num_skipped) == ([], 2)
    assert len(read(ImageStream([np.zeros((1, 50, 3), "uint8"), Image.new("L", (50, 1))], as_input))) == 2


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("deep.png", np.array([[0, 257, 25700, 65535]], "uint16"), [0, 1, 100, 255]),
        ("deep.tif", np.array([[0, 257, 25700, 65535]], "uint16"), [0, 1, 100, 255]),
        ("big-endian.tif", np.array([[0, 257, 25700, 65535]], ">u2"), [0, 1, 100, 255]),
        ("deep.pgm", np.array([[0, 257, 25700, 65535]], "int32"), [0, 1, 100, 255]),
        ("float.tif", np.array([[0, 0.2, 0.4, 1]], "float32"), [0, 51, 102, 255]),
        ("integers.tif", np.array([[0, 1, 100, 255]], "int32"), [0, 1, 100, 255]),
        ("unscaled.tif", np.array([[0, 1, 100, 255]], "float32"), "floats that do not lie between 0 and 1"),
        ("nan.tif", np.array([[0, 1, np.nan, 1]], "float32"), "floats that do not lie between 0 and 1"),
        ("unscaled-integers.tif", np.array([[0, 1, 100, 256]], "int32"), "integers that do not lie between 0 and 255"),
    ],
)
def test_more_than_8_bits_are_scaled_or_refused(name, values, expected, tmp_path):
    file = tmp_path / name
    if name.endswith(".pgm"):
        file.write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(file)
    if isinstance(expected, str):
        with pytest.raises(OSError, match=f"{name} is not a readable image: .*{expected}"):
            open_image(file)
    else:
        assert np.array(open_image(file))[0].tolist() == [[value] * 3 for value in expected]


def test_an_error_without_a_message_has_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *args, **options: (_ for _ in ()).throw(ValueError()))
    with pytest.raises(OSError, match=r"photo.png is not a readable image: ValueError"):
        open_image(in_file(tmp_path))


def test_every_extension_has_its_format():
    Image.init()
    assert {Image.EXTENSION[extension] for extension in EXTENSIONS} <= {*FORMATS}


def test_many_names_cost_no_memory_and_open_no_file(tmp_path, monkeypatch):
    """50,000 names of one picture, of which 200 are read."""
    in_file(tmp_path)
    (tmp_path / "list.txt").write_text("photo.png\n" * 50_000)
    opened, alive = [], weakref.WeakSet()
    most = 0

    def noting(file, real=decoding.open_image):
        opened.append(file)
        return real(file)

    def transform(image):
        tensor = as_input(image)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(decoding, "open_image", noting)
    stream = ImageStream(tmp_path / "list.txt", transform)
    assert (stream.length, opened) == (50_000, [])
    for number, _ in stream.numbered():
        most = max(most, len(alive))
        if number == 199:
            break
    assert (len(opened), most) == (200, 1)
