"""Tar shards whose keys or bytes are not as they should be. What good ones say is in test_data_sources.py."""

import logging
import tarfile

import pytest
from tiny_data import png, write_tar

from nmm_serve.errors import DataError
from nmm_serve.train.data.sources import Visit, open_source

SAMPLES = {f"{n}.{ending}": png(n) if ending == "png" else b"a cat" for n in range(4) for ending in ("png", "txt")}


def test_a_shard_in_which_a_key_comes_twice_is_refused(tmp_path):
    first = {"a/0.jpg": png(1), "a/0.txt": b"one", "a/0.mask.png": png(2), "a/1.txt": b"two"}
    write_tar(tmp_path / "a.tar", first | {"a/1.png": png(3)})
    assert len(open_source({"kind": "webdataset", "path": str(tmp_path / "a.tar")})) == 2
    for name, message in (
        ("a/0.png", "image of 'a/0', a/0.jpg and a/0.png"),
        ("a/1.TXT", "txt of 'a/1', a/1.txt and a/1.TXT"),
    ):
        write_tar(tmp_path / "b.tar", first | {name: b"again"})
        with pytest.raises(DataError, match=rf"b\.tar has two files for the {message}; give each sample a key"):
            open_source({"kind": "webdataset", "path": str(tmp_path / "b.tar")})


def test_images_whose_name_has_a_dot_are_counted_as_bad(tmp_path):
    members = {f"photo.{n}.{ending}": png(n) for n in range(3) for ending in ("png", "txt")}
    write_tar(tmp_path / "a.tar", members | {"0.png": png(0), "0.txt": b"good", "._0.png": b"", "0.cls": b"3"})
    source = open_source({"kind": "webdataset", "path": str(tmp_path / "a.tar"), "name": "w"})
    assert sorted(source.item_name(i) for i in range(len(source))) == [
        "w:a.tar/0", "w:a.tar/photo.0", "w:a.tar/photo.1", "w:a.tar/photo.2",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"w:a\.tar/photo\.\d is no sample: .* first dot, so this is '\d' of 'photo'"):
        source.document(3, Visit("1/test", 0, "pretrain"))


def test_a_link_leaves_its_sample_bad(tmp_path):
    path = write_tar(tmp_path / "a.tar", SAMPLES)
    with tarfile.open(path, "a") as tar:
        for ending in ("png", "txt"):
            link = tarfile.TarInfo(f"again.{ending}")
            link.type, link.linkname = tarfile.LNKTYPE, f"0.{ending}"
            tar.addfile(link)
    source = open_source({"kind": "webdataset", "path": str(path)})
    assert len(source) == 5
    with pytest.raises(DataError, match=r"a\.tar/again has no member with an image .*links are not followed"):
        source.document(4, Visit("1/test", 0, "pretrain"))


def headers(path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, at: data[: at[4]] + b"!" + data[at[4] + 1 :], "behind its first 4 members"),
        (lambda data, at: data[: at[4] + 100], "behind its first 4 members"),
        (lambda data, at: data[: at[4] + 520], "is damaged or cut short after 5 members"),
        (lambda data, at: data + data, "behind its first 8 members, .* several archives"),
    ],
    ids=["header", "cut in a header", "cut in a file", "two in one"],
)
def test_a_shard_that_cannot_be_read_to_its_end_is_refused(tmp_path, damage, message):
    path = write_tar(tmp_path / "a.tar", SAMPLES)
    path.write_bytes(damage(path.read_bytes(), headers(path)))
    with pytest.raises(DataError, match=rf"a\.tar.* {message}"):
        open_source({"kind": "webdataset", "path": str(path)})


def test_a_shard_without_its_end_is_told_of(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", SAMPLES)
    with caplog.at_level(logging.WARNING):
        open_source({"kind": "webdataset", "path": str(path)})
        assert not caplog.records
        path.write_bytes(path.read_bytes()[: headers(path)[4]])
        assert len(open_source({"kind": "webdataset", "path": str(path)})) == 2
    assert "a.tar does not end as a tar file does" in caplog.text
