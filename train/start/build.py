"""A new model whose parts are taken from elsewhere."""

from huggingface_hub.errors import StrictDataclassError

from nmm_serve.config import NMMConfig
from nmm_serve.errors import ConfigError
from nmm_serve.image_processor import NMMImageProcessor
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.processor import NMMProcessor
from nmm_serve.tokenizer import token_ids
from nmm_serve.train.config import TrainConfig
from nmm_serve.train.start.decoder import decoder_fields, grow, read_decoder_config, read_decoder_weights
from nmm_serve.train.start.tokenizer import adopt_tokenizer


def build_started(config: TrainConfig) -> tuple[NMMForConditionalGeneration, NMMProcessor]:
    """The model of `start`, its other parts from scratch.

    A late model without an encoder of its own gets the paper's: half the decoder's width, the same depth.

    Raises ConfigError for a directory that is missing, damaged or of another kind.
    """
    path = config.start.decoder
    assert path is not None
    theirs = read_decoder_config(path)
    if config.context_length > theirs.max_position_embeddings:
        raise ConfigError(
            f"context_length {config.context_length} is over max_position_embeddings "
            f"{theirs.max_position_embeddings} of {path}; lower it"
        )
    tokenizer, new = adopt_tokenizer(path)
    fields = decoder_fields(theirs) | token_ids(tokenizer)
    size = max(theirs.vocab_size, len(tokenizer))
    fields["vocab_size"] = -(-size // 64) * 64  # a multiple of 64 keeps the output layer on the fast paths
    if config.model.family == "late":
        width = max(32, round(theirs.hidden_size / 64) * 32)
        fields["vision_config"] = {"hidden_size": width, "num_hidden_layers": theirs.num_hidden_layers}
    try:
        built = NMMConfig(patch_size=config.model.patch_size, image_size=config.model.image_size, **fields)
    except (ValueError, StrictDataclassError) as error:
        raise ConfigError(f"start.decoder: {path}: {str(error.__cause__ or error).splitlines()[-1].strip()}") from error
    model = NMMForConditionalGeneration(built)
    weights = read_decoder_weights(path, theirs)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = grow(weights[name], built.vocab_size, new)
    _, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    images = NMMImageProcessor(patch_size=built.patch_size, image_size=built.image_size)
    return model, NMMProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
