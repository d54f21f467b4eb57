import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmm_serve.models.masks import attention_mask, document_masks, image_spans

# rows of documents; each document is a list of segments: (is image, length). Text separates images, as in prompts.
segments = st.lists(st.integers(1, 4), min_size=1, max_size=5)
rows = st.lists(segments, min_size=1, max_size=3)


def lay_out(documents):
    """Flags and numbers of one row: segments alternate text, image, text, ..."""
    is_image, document, image, count = [], [], [], 0
    for number, lengths in enumerate(documents, 1):
        for k, length in enumerate(lengths):
            count += k % 2
            is_image += [bool(k % 2)] * length
            image += [count if k % 2 else 0] * length
            document += [number] * length
    return torch.tensor([is_image]), torch.tensor([document]), torch.tensor([image])


@settings(deadline=None)
@given(rows)
def test_mask_is_the_papers_rule(documents):
    is_image, document, image = lay_out(documents)
    mask = attention_mask(image_spans(is_image), is_image.shape[1], document_BT=document)[0, 0]
    for i in range(len(mask)):
        for j in range(len(mask)):
            same_image = image[0, i] > 0 and image[0, i] == image[0, j]
            expected = document[0, i] == document[0, j] and (j <= i or bool(same_image))
            assert mask[i, j] == expected, (i, j)


@settings(deadline=None)
@given(rows, st.integers(0, 3))
def test_masks_of_single_documents_are_the_blocks_of_the_whole(documents, padding):
    is_image, document, _ = lay_out(documents)
    is_image, document = (torch.nn.functional.pad(x, (0, padding)) for x in (is_image, document))
    span = image_spans(is_image)
    whole = attention_mask(span, is_image.shape[1], document_BT=document)[0, 0]
    (masks,) = document_masks(span, document, torch.float32)
    assert len(masks) == len(documents) + (padding > 0)
    blocks = [(mask[0, 0] == 0).int() for mask in masks]
    assert torch.equal(torch.block_diag(*blocks).bool(), whole)


@settings(deadline=None)
@given(segments, st.integers(0, 3))
def test_cached_prefix_gives_the_last_rows_of_the_whole_mask(lengths, keep):
    is_image, _, _ = lay_out([lengths])
    total = is_image.shape[1]
    whole = attention_mask(image_spans(is_image), total)[0, 0]
    cut = max(0, total - keep)
    while cut > 0 and bool(is_image[0, cut - 1]) and cut < total and bool(is_image[0, cut]):
        cut -= 1  # an image is never split between cache and new tokens
    part = attention_mask(image_spans(is_image[:, cut:]), total)[0, 0]
    assert torch.equal(part, whole[cut:])
    padding = torch.ones(1, total)
    roomy = attention_mask(image_spans(is_image[:, cut:]), total + 3, padding, num_past=cut)[0, 0]
    assert torch.equal(roomy[:, :total], whole[cut:])
    assert not roomy[:, total:].any(), "nothing is there yet"


def test_padding_is_seen_by_itself_alone():
    is_image = torch.tensor([[False, False, True, True, False]])
    padding = torch.tensor([[0, 0, 1, 1, 1]])
    mask = attention_mask(image_spans(is_image), 5, padding_BS=padding)[0, 0]
    assert mask[2:, :2].sum() == 0
    assert mask[0].tolist() == [True, False, False, False, False]
    assert mask[2, 3], "patches look ahead inside their image"
    assert mask.any(-1).all(), "an empty row would be NaN"


def test_neighbouring_images_are_apart():
    spans = image_spans(torch.tensor([[True, True, False, True, False, False, True]]))
    assert spans.tolist() == [[1, 1, 0, 2, 0, 0, 3]]
