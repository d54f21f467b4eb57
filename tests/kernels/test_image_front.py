import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmm_serve.config import NMMConfig
from nmm_serve.image_processor import NMMImageProcessor
from nmm_serve.kernels.image_front import image_front, image_front_weight_grad
from nmm_serve.models.vision import PatchEmbed


def front(seed=0, width=64, p=4):
    torch.manual_seed(seed)
    embed = PatchEmbed(NMMConfig(hidden_size=width, patch_size=p, image_size=8 * p))
    with torch.no_grad():
        for parameter in embed.parameters():
            parameter.normal_()
    return embed


def both(images, p=4):
    """What the processor gives of the same images without and with `raw_pixels`."""
    processor = NMMImageProcessor(patch_size=p, image_size=8 * p)
    patches = processor.preprocess(images)
    processor.raw_pixels = True
    return patches, processor.preprocess(images)


def noise(generator, height, width):
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy()


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=4), st.sampled_from(["float32", "bfloat16"])
)
def test_raw_pixels_give_the_very_tokens_of_patches(sizes, dtype):
    sizes = [(h, w) for h, w in sizes if max(h, w) <= 16 * min(h, w)]
    generator = torch.Generator().manual_seed(len(sizes))
    patches, raw = both([noise(generator, h, w) for h, w in sizes])
    assert torch.equal(patches["image_grid"], raw["image_grid"])
    assert raw["pixel_values"].dtype == torch.uint8
    assert raw["pixel_values"].shape == patches["pixel_values"].shape
    embed = front().to(getattr(torch, dtype))
    expected = embed(patches["pixel_values"], patches["image_grid"])
    actual = embed(raw["pixel_values"], raw["image_grid"])
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_the_layer(autocast):
    generator = torch.Generator().manual_seed(0)
    patches, raw = both([noise(generator, 20, 30), noise(generator, 9, 9)])
    results = []
    for batch in (patches, raw):
        embed = front()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = embed(batch["pixel_values"], batch["image_grid"])
        assert y.dtype == torch.float32
        (y * y.detach().cos()).sum().backward()
        results.append([y.detach(), *(parameter.grad for parameter in embed.parameters())])
    for actual, expected in zip(*results[::-1], strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=2e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-4)


def test_operators_pass_opcheck():
    generator = torch.Generator().manual_seed(0)
    _, raw = both([noise(generator, 8, 12)], p=2)
    pixels, grid, embed = raw["pixel_values"], raw["image_grid"], front(p=2)
    tables = embed.row_embed.weight, embed.col_embed.weight
    torch.library.opcheck(image_front, (pixels, grid, embed.proj.weight, *tables))
    torch.library.opcheck(image_front_weight_grad, (torch.randn(len(pixels), 64), pixels, grid))


def test_checkpoint_does_not_keep_how_images_were_handed_over(tmp_path):
    processor = NMMImageProcessor(patch_size=4, image_size=32)
    processor.raw_pixels = True
    processor.save_pretrained(tmp_path)
    assert "raw_pixels" not in (tmp_path / "preprocessor_config.json").read_text()
    assert not NMMImageProcessor.from_pretrained(tmp_path).raw_pixels


def test_kernels_match_fp64_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    script = Path(__file__).with_name("image_front_in_interpreter.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-P", str(script)], env=environment, capture_output=True, text=True)
    assert run.stdout == "ok\n", run.stderr[-3000:]


def launches(p=14, width=800, patches=(256, 4096), dtype=torch.bfloat16):
    """What forward and gradient would launch for so many patches."""
    triton_aot = pytest.importorskip("triton_aot", reason="Triton is not installed")
    from nmm_serve.kernels import image_front_triton

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    with triton_aot.recorded(image_front_triton) as recorded:
        for number in patches:
            pixels, grid = meta(number, 3 * p * p, dtype=torch.uint8), meta(number // 200 + 1, 2, dtype=torch.int64)
            tables = meta(64, width), meta(64, width)
            image_front_triton.launch_forward(pixels, grid, meta(width, 3 * p * p), *tables)
            image_front_triton.launch_weight_grad(meta(number, width), pixels, grid)
    return recorded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_compile_for_hopper(dtype, tmp_path):
    """Ahead of time, without a GPU: no register is spilled, and the tensor cores are used (float32 has none)."""
    triton_aot = pytest.importorskip("triton_aot", reason="Triton is not installed")
    if not (triton_aot.TOOLS / "cuobjdump").exists():
        pytest.skip("this Triton comes without NVIDIA's assembler")
    for launch in launches(dtype=dtype):
        compiled = triton_aot.compile_ahead(launch, tmp_path)
        assert compiled.stack_bytes == compiled.count("STL") == compiled.count("LDL") == 0
        assert compiled.shared_bytes <= triton_aot.HOPPER_SHARED_BYTES
        assert (compiled.count("HGMMA") > 0) == (dtype == torch.bfloat16)
        assert "serialized" not in triton_aot.assembler_says(compiled, tmp_path), (
            "each product waits for the one before"
        )


def test_the_number_of_images_and_patches_never_means_a_new_compilation():
    small, large = (launches(patches=numbers) for numbers in ((1, 17, 256, 512), (513, 1000, 4096, 65536)))
    for same in (small, large):
        assert all(launch == same[k % 2] for k, launch in enumerate(same))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_match_fp64_on_a_gpu(dtype):
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    generator = torch.Generator().manual_seed(0)
    _, raw = both([noise(generator, 20, 30) for _ in range(20)] + [noise(generator, 9, 100)])
    pixels, grid = raw["pixel_values"], raw["image_grid"]
    front_parameters = [parameter.detach().to(dtype) for parameter in front().parameters()]
    leaves = [parameter.cuda().requires_grad_() for parameter in front_parameters]
    exact_leaves = [parameter.double().requires_grad_() for parameter in front_parameters]
    y, exact = image_front(pixels.cuda(), grid.cuda(), *leaves), image_front(pixels, grid, *exact_leaves)
    dy = torch.randn(exact.shape, generator=generator).to(dtype)
    grads, exact_grads = (
        torch.autograd.grad(y, leaves, dy.cuda()),
        torch.autograd.grad(exact, exact_leaves, dy.double()),
    )
    for actual, expected in zip((y, *grads), (exact, *exact_grads), strict=True):
        assert (actual.cpu().double() - expected).abs().max() <= bound * expected.abs().max()
