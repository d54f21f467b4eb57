import os
import re
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


@pytest.mark.parametrize("tile", ["SMALL", "LARGE", "SMALL float32", "weight gradient"])
def test_kernels_compile_for_hopper(tile, tmp_path):
    """Ahead of time, without a GPU: no register is spilled, and the tensor cores are used (float32 has none)."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nmm_serve.kernels import image_front_triton

    number = "*fp32" if "float32" in tile else "*bf16"
    options = dict(getattr(image_front_triton, tile.split()[0], image_front_triton.SMALL))
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    kernel = image_front_triton.forward_kernel
    if tile == "weight gradient":
        kernel = image_front_triton.weight_grad_kernel
    constants = {"PATCH": 14, "G": image_front_triton.IMAGES_PER_LOOK, **options}
    pointers = {"pixels": "*u8", "grid": "*i64"} | dict.fromkeys(
        ("weight", "row_embed", "col_embed", "out", "grad"), number
    )
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in {*pointers, "width"}}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=launch
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def dump(what):
        return subprocess.run([cuobjdump, what, cubin], capture_output=True, text=True, check=True).stdout

    assert re.search(r"STACK:(\d+)", dump("--dump-resource-usage")).group(1) == "0"
    instructions = dump("--dump-sass")
    assert not re.search(r"\b(STL|LDL)\b", instructions)
    assert bool(re.search(r"\bHGMMA\b", instructions)) == (number == "*bf16")
    assert compiled.metadata.shared <= 232448
