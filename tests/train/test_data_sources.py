"""Every kind of source on small files: what its documents say, and what is said about broken ones."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_data import picture_number, png, tiny_processor, write_coco, write_interleaved, write_tar

from nmm_serve.errors import DataError
from nmm_serve.train.data.encoding import encode_document
from nmm_serve.train.data.files import ReadAt
from nmm_serve.train.data.sources import Visit, open_source


def visit(epoch: int = 0, objective="pretrain") -> Visit:
    return Visit("1/test", epoch, objective)


def words(document) -> str:
    """The text of a document, images as [n] for the n-th picture."""
    patches = encode_document(document, tiny_processor(), objective="pretrain", context_length=4096)[0].pixel_values
    slots = iter([] if patches is None else patches.split(16))
    return "".join(
        str(part) if isinstance(part, str) else f"[{picture_number(next(slots))}]" for _, part in document.parts
    )


def write_parquet(path: Path, columns: dict, rows_a_group: int = 2) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=rows_a_group)
    return path


@pytest.mark.parametrize("which", ["caption", "vqa", "interleaved", "text"])
def test_builtin(which):
    source = open_source({"kind": "builtin", "which": which, "split": "val", "size": 7, "name": "b"})
    assert len(source) == 7
    documents = [source.document(3, visit()), source.document(3, visit())]
    assert [(r, str(p)) for r, p in documents[0].parts if isinstance(p, str)] == [
        (r, str(p)) for r, p in documents[1].parts if isinstance(p, str)
    ]
    assert (documents[0].kind, documents[0].name) == (which, "b:val#3")
    assert bool(documents[0].images) == (which != "text")


def test_builtin_captions_take_turns():
    source = open_source({"kind": "builtin", "which": "caption", "size": 3})
    captions = {words_of_caption(source.document(1, visit(epoch))) for epoch in range(5)}
    assert len(captions) == 5


def words_of_caption(document) -> str:
    return next(part for role, part in document.parts if role == "assistant")


def test_coco_captions(tmp_path):
    source = open_source({"kind": "coco_captions", "data": str(write_coco(tmp_path / "d")), "name": "c"})
    assert len(source) == 12
    assert source.document(5, visit()).name == "c:COCO_train_000000000005.png"
    seen = {words(source.document(5, visit(epoch))) for epoch in range(3)}
    assert seen == {f"<|bos|>[5]image 5 caption {k}<|eos|>" for k in range(3)}
    chat = words(source.document(5, visit(0, "sft")))
    assert chat.startswith("<|bos|><|user|>[5]Describe the image.<|assistant|>image 5 caption ")


def test_coco_captions_file_by_file(tmp_path):
    folder = write_coco(tmp_path / "d", "val")
    files = {"annotations": str(folder / "captions_val.json"), "images": str(folder / "images" / "val")}
    assert len(open_source({"kind": "coco_captions", **files})) == 12


def test_ids_that_come_twice_are_refused(tmp_path):
    """Of joined files: captions would be put under another image, and answers under another question."""
    folder = write_coco(tmp_path, n=2)
    for kind, file, key, change, message in (
        ("coco_captions", "captions_train.json", "images", {"file_name": "other.png"}, "image id 0 comes twice"),
        ("vqa_v2", "captions_train.json", "images", {"file_name": "other.png"}, "image id 0 comes twice"),
        ("vqa_v2", "vqa_train_questions.json", "questions", {"image_id": 1}, "question_id 0 comes twice"),
        (
            "vqa_v2",
            "vqa_train_annotations.json",
            "annotations",
            {"multiple_choice_answer": "no"},
            "question_id 0 comes",
        ),
    ):
        whole = (folder / file).read_text()
        document = json.loads(whole)
        for extra, is_refused in ((document[key][0], False), (document[key][0] | change, True)):
            (folder / file).write_text(json.dumps(document | {key: [*document[key], extra]}))
            if is_refused:
                with pytest.raises(DataError, match=rf"{file}: {message}"):
                    open_source({"kind": kind, "data": str(folder)})
            else:
                assert len(open_source({"kind": kind, "data": str(folder)})) == 2
        (folder / file).write_text(whole)


@pytest.mark.parametrize("no_id", [None, [1], {}, True])
def test_an_id_that_is_none_is_named(tmp_path, no_id):
    folder = write_coco(tmp_path, n=2)
    document = json.loads((folder / "captions_train.json").read_text())
    document["annotations"][1]["image_id"] = no_id
    (folder / "captions_train.json").write_text(json.dumps(document))
    with pytest.raises(
        DataError, match=r"captions_train\.json: annotations\[1\] has image_id .*; expected a number or text"
    ):
        open_source({"kind": "coco_captions", "data": str(folder)})


def test_vqa_asks_every_question_in_a_new_order_each_epoch(tmp_path):
    source = open_source({"kind": "vqa_v2", "data": str(write_coco(tmp_path / "d", questions=5)), "name": "v"})
    assert len(source) == 12
    orders = set()
    for epoch in range(4):
        _, *turns = words(source.document(7, visit(epoch))).replace("[7]", "").split("<|user|>")
        assert sorted(turns) == [f"question 7 {k} ?<|assistant|>7 a {k}<|eos|>" for k in range(5)]
        orders.add(tuple(turns))
    assert len(orders) > 1


def test_vqa_splits_many_questions_into_documents(tmp_path):
    folder = str(write_coco(tmp_path / "d", n=2, questions=7))
    source = open_source({"kind": "vqa_v2", "data": folder, "max_questions": 3, "name": "v"})
    assert len(source) == 6
    names = [source.item_name(i) for i in range(3)]
    assert names == [f"v:COCO_train_000000000000.png{end}" for end in ("", "#1", "#2")]
    for epoch in range(2):
        turns = [t for i in range(3) for t in words(source.document(i, visit(epoch))).split("<|user|>")[1:]]
        assert sorted(turn.replace("[0]", "") for turn in turns) == [
            f"question 0 {k} ?<|assistant|>0 a {k}<|eos|>" for k in range(7)
        ]


def test_vqa_answers_can_be_sampled(tmp_path):
    folder = str(write_coco(tmp_path / "d", n=1, questions=1))
    source = open_source({"kind": "vqa_v2", "data": folder, "answer": "sampled"})
    answers = Counter(words_of_caption(source.document(0, visit(epoch))) for epoch in range(200))
    assert set(answers) == {"0 a 0", "0 b 0"}
    assert 100 < answers["0 a 0"] < 180  # seven of ten


def test_vqa_finds_images_by_digits_without_a_captions_file(tmp_path):
    folder = write_coco(tmp_path / "d")
    (folder / "captions_train.json").unlink()
    source = open_source({"kind": "vqa_v2", "data": str(folder)})
    assert "[3]" in words(source.document(3, visit()))


def test_interleaved(tmp_path):
    source = open_source(
        {"kind": "interleaved_jsonl", "path": str(write_interleaved(tmp_path / "a.jsonl")), "name": "i"}
    )
    assert len(source) == 5
    assert words(source.document(2, visit())) == "<|bos|>before 2[4][5]after 2<|eos|>"
    assert source.document(2, visit()).name == "i:a.jsonl:3"


def test_interleaved_images_from_a_folder_and_joined_text(tmp_path):
    (tmp_path / "lines").mkdir()
    (tmp_path / "7.png").write_bytes(png(7))
    texts = [{"type": "text", "text": t} for t in ("a ", "b ", "c")]
    content = [*texts[:2], {"type": "image", "path": "7.png"}, texts[2]]
    (tmp_path / "lines" / "x.jsonl").write_text("\n" + json.dumps({"content": content}))
    source = open_source({"kind": "interleaved_jsonl", "path": str(tmp_path / "lines"), "images": str(tmp_path)})
    assert words(source.document(0, visit())) == "<|bos|>a b [7]c<|eos|>"
    assert [part for _, part in source.document(0, visit()).parts][1] == "a b "


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        pytest.param('{"content": ' + "[" * 10**5, id="deep"),
        '{"content": 3}',
        '{"content": [3]}',
        '{"content": [{"type": "video"}]}',
        '{"content": []}',
        "\udcff",
    ],
)
def test_broken_interleaved_lines_are_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"content": []}\n' + line.encode(errors="surrogateescape"))
    source = open_source({"kind": "interleaved_jsonl", "path": str(tmp_path / "a.jsonl")})
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        source.document(1, visit())


def all_texts(**options) -> list[str]:
    source = open_source({"kind": "text", **options})
    return [source.document(i, visit()).parts[1][1] for i in range(len(source))]


def test_text_files(tmp_path):
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.txt").write_text("\ufeffzero", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}')
    write_parquet(tmp_path / "d.parquet", {"text": ["five", "six", "seven"], "n": [1, 2, 3]})
    (tmp_path / "ignored.md").write_text("no")
    expected = ["zero", "one\n\ntwo\n", "three", "four", "five", "six", "seven"]
    assert all_texts(path=str(tmp_path)) == expected
    assert all_texts(path=[str(tmp_path / "*.txt"), str(tmp_path / "d.parquet")]) == [*expected[:2], *expected[4:]]


def test_a_pattern_finds_a_file_once(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "in/a.txt"):
        (tmp_path / name).write_text("hello")
    (tmp_path / "in/above").symlink_to(tmp_path)
    assert len(open_source({"kind": "text", "path": str(tmp_path / "**/*.txt")})) == 2


def test_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\nstill one\n \t\n\n\ntwo\r\n\r\nthree")
    assert all_texts(path=str(tmp_path / "a.txt"), documents="paragraph") == ["one\nstill one", "two\r", "three"]


def test_text_under_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    write_parquet(tmp_path / "b.parquet", {"body": ["y"]})
    assert all_texts(path=str(tmp_path), field="body") == ["x", "y"]


def test_parquet_in_any_order_with_a_small_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("nmm_serve.train.data.text_source.CACHE_BYTES", 1)
    texts = [f"row {i}" for i in range(11)]
    source = open_source({"kind": "text", "path": str(write_parquet(tmp_path / "a.parquet", {"text": texts}))})
    order = [7, 0, 10, 1, 6, 7]
    assert [source.document(i, visit()).parts[1][1] for i in order] == [texts[i] for i in order]


def test_webdataset(tmp_path):
    first = {"x/000.jpg": png(4), "x/000.txt": b"a cat", "x/000.cls": b"3", "x/1.b.png": png(5)}
    write_tar(tmp_path / "s-0.tar", {**first, "x/1.json": b'{"caption": "json cat"}'})
    write_tar(tmp_path / "s-1.tar", {"2.txt": b"later", "2.PNG": png(6)})
    write_tar(tmp_path / "s-2.tar", {"3.txt": b"no image", "4.png": png(7), "5.png": png(8), "5.json": b"{}"})
    source = open_source({"kind": "webdataset", "path": str(tmp_path / "s-*.tar"), "name": "w"})
    assert len(source) == 6
    by_name = {source.item_name(i): i for i in range(6)}
    assert words(source.document(by_name["w:s-0.tar/x/000"], visit())) == "<|bos|>[4]a cat<|eos|>"
    assert words(source.document(by_name["w:s-1.tar/2"], visit())) == "<|bos|>[6]later<|eos|>"
    for name, message in (
        ("w:s-2.tar/3", "no member with an image"),
        ("w:s-2.tar/4", "no member with a caption"),
        ("w:s-2.tar/5", "text under 'caption'"),
    ):
        with pytest.raises(DataError, match=f"{name}.*{message}"):
            source.document(by_name[name], visit())


def entry(tmp_path: Path, kind: str) -> dict:
    """A source of each kind that works."""
    if kind in ("coco_captions", "vqa_v2"):
        return {"kind": kind, "data": str(write_coco(tmp_path / "d"))}
    if kind == "interleaved_jsonl":
        return {"kind": kind, "path": str(write_interleaved(tmp_path / "a.jsonl"))}
    (tmp_path / "a.txt").write_text("hello")
    write_tar(tmp_path / "a.tar", {"1.png": png(1), "1.txt": b"hello"})
    return {"kind": kind, "path": str(tmp_path / ("a.txt" if kind == "text" else "a.tar"))}


BREAKS = [
    ("coco_captions", lambda p: (p / "d/captions_train.json").unlink(), "captions_train.json does not exist"),
    ("coco_captions", lambda p: (p / "d/captions_train.json").write_text("{"), "captions_train.json is not JSON"),
    ("coco_captions", lambda p: (p / "d/captions_train.json").write_text("{}"), "a list 'annotations'"),
    ("coco_captions", lambda p: (p / "d/images").rename(p / "gone"), "image folder .*images/train does not exist"),
    ("vqa_v2", lambda p: (p / "d/vqa_train_questions.json").unlink(), "questions file .* does not exist"),
    ("vqa_v2", lambda p: (p / "d/vqa_train_annotations.json").unlink(), "annotations file .* does not exist"),
    ("vqa_v2", lambda p: drop_annotation(p / "d/vqa_train_annotations.json"), "question 0 has no annotation"),
    ("vqa_v2", lambda p: (p / "d/vqa_train_questions.json").write_text('{"questions": [{}]}'), r"questions\[0\] lacks"),
    ("interleaved_jsonl", lambda p: (p / "a.jsonl").unlink(), "a.jsonl does not exist"),
    ("text", lambda p: (p / "a.txt").unlink(), "a.txt does not exist"),
    ("webdataset", lambda p: (p / "a.tar").write_bytes(b"\x1f\x8b" * 600), "not a plain tar file"),
    ("webdataset", lambda p: (p / "a.tar").unlink(), "a.tar does not exist"),
]


def drop_annotation(path: Path) -> None:
    document = json.loads(path.read_text())
    del document["annotations"][0]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(("kind", "damage", "message"), BREAKS)
def test_missing_and_broken_files_are_named_when_opened(tmp_path, kind, damage, message):
    source = entry(tmp_path, kind)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(source)


def test_wrong_image_folder_is_noticed_at_once(tmp_path):
    folder = write_coco(tmp_path / "d")
    (folder / "captions_train.json").unlink()
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="12 of 12 images of the questions are not found in"):
        open_source({"kind": "vqa_v2", "data": str(folder), "images": str(tmp_path / "other")})


def test_parquet_without_the_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"body": ["x"], "n": [1]})
    with pytest.raises(DataError, match="no column 'text'; its columns: body, n"):
        open_source({"kind": "text", "path": str(tmp_path / "a.parquet")})
    with pytest.raises(DataError, match="column 'n' holds int64; expected text"):
        open_source({"kind": "text", "path": str(tmp_path / "a.parquet"), "field": "n"})
    (tmp_path / "a.parquet").write_text("PAR")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        open_source({"kind": "text", "path": str(tmp_path / "a.parquet")})


def test_a_parquet_row_that_is_not_utf8_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    _, offsets, data = pa.array(["good", "bad!"]).buffers()
    rows = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(data.to_pybytes()[:4] + b"b\xff\xfe!"))
    source = open_source({"kind": "text", "path": str(write_parquet(tmp_path / "a.parquet", {"text": rows}))})
    assert source.document(0, visit()).parts[1][1] == "good"
    with pytest.raises(DataError, match=r"a\.parquet#1: column 'text' is not UTF-8 text \(byte 1\)"):
        source.document(1, visit())


def test_a_line_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 10**5 + "]" * 10**5 + "}")
    source = open_source({"kind": "text", "path": str(tmp_path / "a.jsonl")})
    with pytest.raises(DataError, match=r"a\.jsonl:1 is not JSON, or too deeply nested"):
        source.document(0, visit())


def changed(path: Path, records: str, **values) -> None:
    """Other values in the first record of a COCO file."""
    document = json.loads(path.read_text())
    document[records][0].update(values)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("captions", ["one", "all"])
def test_a_caption_that_is_no_text_is_named(tmp_path, captions):
    folder = write_coco(tmp_path / "d", captions=2)
    changed(folder / "captions_train.json", "annotations", caption=None)
    source = open_source({"kind": "coco_captions", "data": str(folder), "captions": captions})
    with pytest.raises(DataError, match=r"000000000000\.png: a caption is None; expected text"):
        source.document(0, visit())
    assert "caption" in words(source.document(1, visit()))


def test_a_question_without_answers_cannot_be_sampled(tmp_path):
    folder = write_coco(tmp_path / "d", questions=1)
    changed(folder / "vqa_train_annotations.json", "annotations", answers=[])
    source = open_source({"kind": "vqa_v2", "data": str(folder), "answer": "sampled"})
    with pytest.raises(DataError, match=r"'question 0 0 \?' has no answers to sample from"):
        source.document(0, visit())
    assert words(open_source({"kind": "vqa_v2", "data": str(folder)}).document(0, visit()))


def test_a_file_is_closed_when_the_interpreter_ends(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("hello")
    read = ReadAt(tmp_path / "a.txt")
    assert read(1, 3) == b"ell"
    monkeypatch.setattr("nmm_serve.train.data.files.os", None)  # as modules are then
    read.__del__()
    assert read._descriptor is None


def test_text_that_is_not_utf8_or_vanishes_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    source = open_source({"kind": "text", "path": str(path)})
    with pytest.raises(DataError, match=r"text:a\.txt is not UTF-8 text \(byte 3\)"):
        source.document(0, visit())
    source = open_source({"kind": "text", "path": str(path)})
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read"):
        source.document(0, visit())
