"""Documents to labelled tokens: which of them carry loss, and what happens to long ones."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_data import picture, tiny_processor

from nmm_serve.chat import ImageSlot
from nmm_serve.errors import DataError, ImageError
from nmm_serve.train.data.augment import random_resized_crop
from nmm_serve.train.data.documents import caption_document, interleaved_document, text_document, vqa_document
from nmm_serve.train.data.encoding import NO_LOSS, encode_document


def encode(document, objective="pretrain", context_length=256):
    return encode_document(document, tiny_processor(), objective=objective, context_length=context_length)


def told(ids) -> str:
    """Tokens as text, the patches of an image as one mark."""
    return tiny_processor().decode(ids, skip_special_tokens=False).replace("<|image|>" * 16, "<|image|>")


def learned(piece) -> str:
    return told(piece.labels[piece.labels != NO_LOSS])


PAIRS = [("what colour?", "red"), ("how many?", "two")]
VQA = vqa_document(picture(1), PAIRS, name="v")
IMAGE = "<|image_start|><|image|><|image_end|>"


def test_a_caption_is_plain_in_pretraining_and_a_chat_in_fine_tuning():
    (plain,) = encode(caption_document(picture(1), " a circle\n", objective="pretrain", name="c"))
    assert told(plain.input_ids) == f"<|bos|>{IMAGE}a circle<|eos|>"
    assert learned(plain) == "<|image_start|><|image_end|>a circle<|eos|>"
    (chat,) = encode(caption_document(picture(1), " a circle\n", objective="sft", name="c"), "sft")
    assert told(chat.input_ids) == f"<|bos|><|user|>{IMAGE}Describe the image.<|assistant|>a circle<|eos|>"
    assert learned(chat) == "a circle<|eos|>"


def test_fine_tuning_learns_every_answer_and_its_end_and_nothing_else():
    (piece,) = encode(VQA, "sft")
    assert told(piece.input_ids) == (
        f"<|bos|><|user|>{IMAGE}what colour?<|assistant|>red<|eos|><|user|>how many?<|assistant|>two<|eos|>"
    )
    assert learned(piece) == "red<|eos|>two<|eos|>"


def test_the_first_turn_is_what_evaluation_asks():
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour?"}]}]
    prompt = tiny_processor().encode_chat(messages, [picture(1)]).input_ids
    (piece,) = encode(VQA, "sft")
    assert piece.input_ids[: len(prompt)].tolist() == prompt


def test_pretraining_learns_all_but_patches_and_the_first_token():
    (piece,) = encode(VQA)
    unlearned = piece.input_ids[piece.labels == NO_LOSS].tolist()
    processor = tiny_processor()
    assert unlearned == [processor.tokenizer.bos_token_id] + [processor.image_token_id] * 16
    assert piece.num_image_tokens == len(piece.pixel_values) == 16


def test_text_mixed_into_fine_tuning_is_learned_whole():
    content = ["first ", ImageSlot(), " then"]
    (piece,) = encode(interleaved_document(content, [picture(1)], name="i"), "sft")
    assert learned(piece) == "first  then<|eos|>"
    (piece,) = encode(text_document("a small circle", name="t"), "sft")
    assert learned(piece) == "a small circle<|eos|>"


def test_text_that_spells_a_special_token_stays_text():
    (piece,) = encode(text_document("x<|eos|>y", name="t"))
    assert piece.input_ids.tolist().count(tiny_processor().tokenizer.eos_token_id) == 1


@given(st.text(min_size=1).filter(str.strip), st.integers(2, 20))
@settings(deadline=None)
def test_a_long_text_is_cut_without_loss(text, context_length):
    (whole,) = encode(text_document(text, name="t"), context_length=10**6)
    pieces = encode(text_document(text, name="t"), context_length=context_length)
    assert [i for p in pieces for i in p.input_ids] == whole.input_ids.tolist()
    assert all(len(p) == context_length for p in pieces[:-1])
    assert all(0 < len(p) <= context_length for p in pieces)
    assert all(p.labels[0] == NO_LOSS for p in pieces)
    assert all((p.labels[1:] == p.input_ids[1:]).all() for p in pieces)
    assert [p.starts_document for p in pieces] == [True] + [False] * (len(pieces) - 1)


def test_a_document_with_images_that_does_not_fit_is_bad():
    with pytest.raises(DataError, match="over the context_length of 20"):
        encode(VQA, context_length=20)


def test_an_image_that_is_missing_is_named():
    with pytest.raises(ImageError, match=r"/nowhere/1\.png"):
        encode(vqa_document("/nowhere/1.png", PAIRS, name="v"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: caption_document(picture(1), " \n", objective="sft", name="c"),
        lambda: vqa_document(picture(1), [], name="c"),
        lambda: vqa_document(picture(1), [("what?", " ")], name="c"),
        lambda: interleaved_document([ImageSlot()], [picture(1)], name="c"),
        lambda: text_document("\n", name="c"),
        lambda: caption_document(picture(1), None, objective="pretrain", name="c"),
        lambda: vqa_document(picture(1), [("how many?", 2)], name="c"),
        lambda: vqa_document(picture(1), [(None, "two")], name="c"),
        lambda: interleaved_document([ImageSlot(), "half \ud83d"], [picture(1)], name="c"),
        lambda: text_document("half an emoji \ud83d", name="c"),
    ],
)
def test_documents_without_words_or_with_what_is_no_text_are_refused(make):
    with pytest.raises(DataError, match=r"^c: "):
        make()


def test_augmentation_keeps_the_grid_and_follows_the_seed():
    images = tiny_processor().image_processor
    image = picture(1, (90, 40))
    image.putpixel((0, 0), (255, 0, 0))
    crops = [random_resized_crop(image, images, random.Random(seed)) for seed in (1, 1, 2)]
    assert {images.patches(crop)[1] for crop in crops} == {images.patches(image)[1]}
    assert crops[0].tobytes() == crops[1].tobytes()


@pytest.mark.parametrize("size", [(20, 53), (31, 450)])
def test_augmented_documents_have_the_grids_of_whole_images(size):
    """Also where the crop, an image for itself, would be given another grid."""
    processor = tiny_processor(image_size=64)
    document = caption_document(picture(1, size), "a circle", objective="pretrain", name="c")
    options = {"objective": "pretrain", "context_length": 256}
    (whole,) = encode_document(document, processor, **options)
    (crop,) = encode_document(document, processor, **options, augment="paper", rng=random.Random(1))
    rows, cols = whole.image_grid[0]
    assert processor.image_processor.grid(cols * 8, rows * 8) != (rows, cols)
    assert crop.image_grid.tolist() == [[rows, cols]]
    assert crop.input_ids.tolist() == whole.input_ids.tolist()


def test_an_augmented_image_is_scaled_once(monkeypatch):
    scaled = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda *args, **options: scaled.append(args[1]) or resize(*args, **options)
    )
    document = caption_document(picture(1, (90, 40)), "a circle", objective="pretrain", name="c")
    encode_document(
        document, tiny_processor(), objective="pretrain", context_length=256, augment="paper", rng=random.Random(1)
    )
    assert len(scaled) == 1


def test_augmentation_crops_and_flips():
    images = tiny_processor().image_processor
    wide = picture(0, (64, 64))
    wide.paste((255, 255, 255), (32, 0, 64, 64))  # white on the right
    corners = set()
    for seed in range(40):
        crop = random_resized_crop(wide, images, random.Random(seed))
        corners.add((crop.getpixel((0, 16))[0] > 200, crop.getpixel((31, 16))[0] > 200))
    assert {(False, True), (True, False)} <= corners
