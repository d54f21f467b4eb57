"""Hugging Face directories with random weights, as a user would have downloaded them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionModel,
)

WORDS = ["what is the colour of the circle ? red green blue", "describe the image . a large square and a small circle"]
SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA, QWEN3 = (LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)


def write_language_model(path: Path, kind=LLAMA, specials: tuple[str, ...] = ("<s>", "</s>"), **fields) -> Path:
    """A decoder with its tokenizer. `specials`: begin and end token, or one for both."""
    config_class, model_class = kind
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(WORDS * 10, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=specials[0] if len(specials) > 1 else None, eos_token=specials[-1]
    ).save_pretrained(path)
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return path


TOWER = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip
ENCODERS = {
    "clip": (CLIPConfig, CLIPModel, CLIPVisionModel, CLIPImageProcessor),
    "siglip": (SiglipConfig, SiglipModel, SiglipVisionModel, SiglipImageProcessor),
}


def write_encoder(path: Path, kind: str, whole: bool = True, **fields) -> Path:
    """CLIP or SigLIP with its image processor, or its image side alone."""
    config_class, model_class, tower_class, images_class = ENCODERS[kind]
    torch.manual_seed(0)
    config = config_class(text_config=TEXT, vision_config=TOWER | fields)
    model = model_class(config) if whole else tower_class(config.vision_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.uniform_(-0.5, 1.5)
    model.save_pretrained(path)
    images_class().save_pretrained(path)
    return path
