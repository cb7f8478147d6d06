"Image sets: what is found on disk, what damage is named, what a download may do, what decoding gives"
import hashlib
import http.server
import io
import os
import shutil
import signal
import tarfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import EpsImagePlugin, Image

from sumix_nb.data import sources
from sumix_nb.data.layouts import list_images
from sumix_nb.data.loaders import get_dls
from sumix_nb.data.scenes import scenes
from sumix_nb.data.sources import SOURCES, decode_images, download, draw_sets, find_root, open_image
from sumix_nb.data.sources import rank_in_class, read_folders, read_set, unpack
from tests.data.oracles import MAKERS, NAMES, white_noise, write_image

CIFAR = SOURCES["cifar10"]


@contextmanager
def at_most(seconds):
    "A test that would wait for ever fails instead"
    def ring(*_): pytest.fail(f"still waiting after {seconds} seconds")
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_labels_match_pixels(folders):
    data, names = read_folders(CIFAR, folders)
    assert names == NAMES
    for split, n, blue in (("train", 60, 0), ("test", 30, 255)):
        images = decode_images(data[split].items, 32)
        assert images.shape == (n, 3, 32, 32) and (images[:, 2] == blue).all()
        assert torch.equal(images[:, 0, 5, 9].long(), 10 * data[split].target)


def test_sumix_data_is_used_and_hidden_files_are_not(folders, monkeypatch):
    (folders / "train" / ".cache").mkdir()
    (folders / "train" / NAMES[0] / "._0.png").write_bytes(b"rubbish")
    (folders / "labels.txt").write_text("x")
    monkeypatch.setenv("SUMIX_DATA", str(folders.parent))
    assert len(read_set(CIFAR)[0]["train"].items) == 60
    assert find_root(CIFAR, folders.parent) == folders.parent  # `path` comes first


def test_linked_folders_and_files_count(folders):
    (folders / "elsewhere").mkdir()
    (folders / "train" / "class1").rename(folders / "elsewhere" / "class1")
    (folders / "train" / "class1").symlink_to(folders / "elsewhere" / "class1")
    file = folders / "train" / "class2" / "0.png"
    file.rename(folders / "elsewhere" / "0.png")
    file.symlink_to(folders / "elsewhere" / "0.png")
    assert len(read_folders(CIFAR, folders)[0]["train"].items) == 60


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255
    file.write_bytes(content)


def forget(root, *names):
    for name in names: shutil.rmtree(root / name)


FILE, UNREADABLE = "train/class2/3.png", (ValueError, "cannot decode .*3.png")
DAMAGES = {
    "no train": (lambda root: forget(root, "train"), FileNotFoundError, "train of <class>/.*png"),
    "no test": (lambda root: forget(root, "test"), FileNotFoundError, "no test images in"),
    "empty split": (lambda root: [shutil.rmtree(item) for item in (root / "test").iterdir()], ValueError, "10 of 10"),
    "empty class": (lambda root: [file.unlink() for file in (root / "train" / "class4").iterdir()], ValueError,
                    "1 of 10 classes have no image in the train .*.png, .jpg, .jpeg.*class4"),
    "class only in test": (lambda root: write_image(root / "test" / "extra" / "0.png", 0), ValueError,
                           "test split .* a class that cifar10 does not have: extra"),
    "class only in train": (lambda root: forget(root, "test/class7"), ValueError, "1 of 10 classes .* test .*class7"),
    "nine classes": (lambda root: forget(root, "train/class9", "test/class9"), ValueError,
                     "cifar10 has 10 classes, but .* has 9"),
    "truncated": (lambda root: (root / FILE).write_bytes((root / FILE).read_bytes()[:50]), *UNREADABLE),
    "flipped byte": (lambda root: flip_a_byte(root / FILE), *UNREADABLE),
    "empty file": (lambda root: (root / FILE).write_bytes(b""), *UNREADABLE),
    "one larger": (lambda root: write_image(root / FILE, 0, size=(48, 36)), ValueError,
                   "3.png has 48 x 36 pixels, expected 32 x 32; `size=` resizes"),
    "16 bits": (lambda root: write_image(root / FILE, 999, mode="I;16"), ValueError, "3.png has more than 8 bits"),
    "twice": (lambda root: shutil.copytree(root / "train/class2", root / "train/group/class2"), ValueError,
              "two folders .* named 'class2'"),
    "mixed levels": (lambda root: shutil.copytree(root / "train/class2", root / "train/class3/inner"), ValueError,
                     "class3 holds images and folders"),
    "pipe": (lambda root: os.mkfifo(root / "train/class2/pipe.png"), FileNotFoundError,
             "1 of 61 images are missing or no regular files, .*pipe.png"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_folders(folders, how):
    damage, error, text = DAMAGES[how]
    damage(folders)
    with pytest.raises(error, match=text), at_most(60):
        get_dls("cifar10", path=folders, bs=10, device="cpu")


@pytest.mark.parametrize("by", ["path", "environment"])
def test_missing_folder_says_what_to_do_and_downloads_nothing(tmp_path, monkeypatch, by):
    monkeypatch.setattr(sources, "download", lambda *args: pytest.fail("downloaded"))
    monkeypatch.setenv("SUMIX_DATA", str(tmp_path / "shared"))
    with pytest.raises(FileNotFoundError) as caught:
        get_dls("cifar100", path=tmp_path / "mine" if by == "path" else None)
    assert all(text in str(caught.value) for text in ("SUMIX_DATA", "path=", "downloaded from https"))
    assert str(Path("mine" if by == "path" else "shared/cifar100")) in str(caught.value)


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_image_of_a_published_set_is_named(name, tmp_path, few):
    make, read = MAKERS[name]
    lost = read(make(tmp_path))[0]["test"][0][-1]
    lost.unlink()
    # ImageNet knows its images by its folders only, and this was the one image of its class
    error, message = (ValueError, "1 of 3 classes have no image in the test split") if name == "imagenet" else (
        FileNotFoundError, rf"1 of \d images are missing.*{lost.name}")
    with pytest.raises(error, match=message): read_folders(SOURCES[name], tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_another_number_of_classes_is_an_error_with_the_source(name, tmp_path):
    expected = SOURCES[name].n_classes
    with pytest.raises(ValueError, match=f"{name} has {expected} classes, but .* has 3") as error:
        read_folders(SOURCES[name], MAKERS[name][0](tmp_path))
    assert SOURCES[name].url in str(error.value)


def test_kinds_of_image_files(tmp_path):
    colours = white_noise(0, 32, 32)
    for mode in ("L", "P", "1", "RGBA", "LA"):
        colours.convert(mode).save(tmp_path / "0.png")
        image, = decode_images([tmp_path / "0.png"], 32)
        expected = np.asarray(colours.convert(mode).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(image.numpy(), expected)
    write_image(tmp_path / "5.JPG", (90, 30, 200))
    assert (open_image(tmp_path / "5.JPG").getpixel((3, 9)) - np.array([90, 30, 200])).max() < 3
    colours.save(tmp_path / "really_a.jpg", format="PNG")  # ImageNet has such a file
    assert open_image(tmp_path / "really_a.jpg").tobytes() == colours.tobytes()


def test_decoding_keeps_the_order_of_many_images():
    images = [Image.new("RGB", (2, 2), (i % 256, i // 256, 7)) for i in range(1000)]
    out = decode_images(images, 2)
    assert torch.equal(out[:, 0, 0, 0].long() + 256 * out[:, 1, 1, 1].long(), torch.arange(1000))
    assert out.is_contiguous() and decode_images([], 2).shape == (0, 3, 2, 2)


def test_an_image_too_large_to_trust_is_named(tmp_path, monkeypatch):
    Image.new("L", (30, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # twice as many are an error for Pillow
    with pytest.raises(ValueError, match="bomb.png: .*900 pixels"): open_image(tmp_path / "bomb.png")


def test_postscript_never_reaches_its_interpreter(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("interpreted"))
    with pytest.raises(ValueError, match="cannot decode the image file .*a.png"): open_image(tmp_path / "a.png")


targets = hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 4)).map(torch.from_numpy)


@settings(max_examples=50, deadline=None)
@given(targets, st.integers(0, 5))
def test_rank_in_class_numbers_each_class(target, seed):
    for generator in (None, torch.Generator().manual_seed(seed)):
        rank = rank_in_class(target, generator)
        for k in target.unique():
            ranks = rank[target == k].tolist()
            assert sorted(ranks) == list(range(len(ranks)))
            assert generator is not None or ranks == sorted(ranks)


def check_statistics(images, source, tolerance):
    pixels = images.float() / 255
    for found, expected in ((pixels.mean((0, 2, 3)), source.mean), (pixels.std((0, 2, 3)), source.std)):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=tolerance)


def test_scenes_have_the_statistics_of_the_table():
    (data, names), drawn, source = draw_sets(32), scenes(4000, seed=1), SOURCES["scenes"]
    assert (len(data["train"].items), len(data["test"].items)) == (20000, 4000)
    assert len(names) == source.n_classes and torch.equal(data["test"].target, drawn.target)
    assert torch.equal(decode_images(data["test"].items, 32), drawn.images)
    check_statistics(decode_images(data["train"].items, 32), source, 3e-3)
    assert torch.equal(torch.stack([image.info["mask"] for image in data["test"].items]), drawn.masks)
    hard, _ = read_set(SOURCES["hard_scenes"])
    check_statistics(decode_images(hard["train"].items, 32), SOURCES["hard_scenes"], 5e-3)
    with pytest.raises(ValueError, match="`size`"): get_dls("scenes", size=8, device="cpu")


@pytest.mark.skipif(not Path(os.environ.get("SUMIX_DATA", "/nowhere"), "cifar100").is_dir(),
                    reason="needs $SUMIX_DATA/cifar100")
def test_real_cifar100():
    data, names = read_set(SOURCES["cifar100"])
    assert len(names) == 100
    for split, n in (("train", 500), ("test", 100)):
        assert torch.bincount(data[split].target).tolist() == [n] * 100
    check_statistics(decode_images(data["train"].items, 32, resize=False), SOURCES["cifar100"], 1e-4)


def packed(root, file, top="cifar10"):
    "The source that knows an archive of a folder"
    with tarfile.open(file, "w:gz") as tar: tar.add(root, top)
    return source_of(file)


def source_of(file, url=None):
    content = file.read_bytes()
    return replace(CIFAR, url=url or file.as_uri(), archive=(len(content), hashlib.md5(content[:2**20]).hexdigest()))


def test_download_from_a_server_once(folders, tmp_path, monkeypatch):
    archive = tmp_path / "web" / "cifar10.tgz"
    archive.parent.mkdir()
    packed(folders, archive)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(archive.parent))
        def log_message(self, *args): requests.append(args)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setitem(SOURCES, "cifar10", source_of(archive, address + "cifar10.tgz"))
        monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
        for _ in range(2): assert len(get_dls("cifar10", bs=10, device="cpu").train_ds) == 60
        assert len(requests) == 1 and os.listdir(tmp_path / "home" / "data") == ["cifar10"]
        with pytest.raises(ConnectionError, match="SUMIX_DATA"):
            download(source_of(archive, address + "gone.tgz"), tmp_path / "other")
        server.shutdown()
    with pytest.raises(ConnectionError, match="path="):
        download(source_of(archive, address + "cifar10.tgz"), tmp_path / "other")
    assert os.listdir(tmp_path / "other") == []


@pytest.mark.parametrize("top", ["cifar10", "another_name", "."])
def test_archive_with_any_top_folder(folders, tmp_path, top):
    root = download(packed(folders, tmp_path / "a.tgz", top), tmp_path / "store")
    assert root == tmp_path / "store" / "cifar10" and list(list_images(root / "train")) == NAMES
    assert os.listdir(tmp_path / "store") == ["cifar10"]


def archive_with(file, name, kind=tarfile.REGTYPE, mode=0o644, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size = kind, mode, link, 4 if kind == tarfile.REGTYPE else 0
    with tarfile.open(file, "w:gz") as tar: tar.addfile(info, io.BytesIO(b"evil"))


@pytest.mark.parametrize("member", [
    dict(name="../evil"), dict(name="/evil"), dict(name="cifar10/../../evil"),
    dict(name="link", kind=tarfile.SYMTYPE, link="/etc/passwd"), dict(name="pipe", kind=tarfile.FIFOTYPE),
    dict(name="hard", kind=tarfile.LNKTYPE, link="../a.tgz"), dict(name="disk", kind=tarfile.BLKTYPE)],
    ids=lambda member: member["name"])
def test_archive_cannot_write_outside(tmp_path, member):
    archive_with(tmp_path / "a.tgz", **member)
    with pytest.raises(ValueError, match="must hold only files and folders of its own"):
        download(source_of(tmp_path / "a.tgz"), tmp_path / "store")
    assert os.listdir(tmp_path / "store") == [] and sorted(os.listdir(tmp_path)) == ["a.tgz", "store"]
    assert not Path("/evil").exists()


@pytest.mark.parametrize("mode", [0o6777, 0o1666, 0o000])
def test_permissions_of_an_archive_are_ignored(tmp_path, mode):
    archive_with(tmp_path / "a.tgz", "cifar10/evil", mode=mode)
    unpack(tmp_path / "a.tgz", tmp_path / "out")
    (tmp_path / "mine").write_bytes(b"evil")
    evil = tmp_path / "out" / "cifar10" / "evil"
    assert evil.stat().st_mode == (tmp_path / "mine").stat().st_mode and evil.read_bytes() == b"evil"


def test_two_downloads_at_once(folders, tmp_path, monkeypatch):
    source, target = packed(folders, tmp_path / "a.tgz"), tmp_path / "store" / "cifar10"
    def other_process_wins(self, goal):
        (goal / "train").mkdir(parents=True)
        raise OSError("Directory not empty")
    monkeypatch.setattr(Path, "rename", other_process_wins)
    assert download(source, tmp_path / "store") == target and os.listdir(target.parent) == ["cifar10"]


def test_checksums_and_folder_are_those_of_fastai(monkeypatch, tmp_path):
    import fastai.data.download_checks as checks
    from fastai.data.external import fastai_path

    table = eval(Path(checks.__file__).read_text())
    archives = {source.url: source.archive for source in SOURCES.values() if source.archive}
    assert len(archives) == 2 and all(table[url] == facts for url, facts in archives.items())
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path))
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    assert download(CIFAR) == fastai_path("data") / "cifar10"
