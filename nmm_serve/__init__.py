"""nmm-serve: train, serve, evaluate and compare native multimodal models.

`import nmm_serve` registers the model family with the transformers Auto classes. It does so when
transformers' auto modules are first imported, not before: the commands and servers that do not
need torch then start without it.
"""

from importlib.metadata import version

import wrapt

__version__ = version("nmm-serve")


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register_config(auto):
    from nmm_serve.config import NMMConfig

    auto.AutoConfig.register(NMMConfig.model_type, NMMConfig, exist_ok=True)


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register_model(auto):
    from nmm_serve.config import NMMConfig
    from nmm_serve.models import NMMForConditionalGeneration

    for auto_class in (auto.AutoModelForCausalLM, auto.AutoModelForImageTextToText):
        auto_class.register(NMMConfig, NMMForConditionalGeneration, exist_ok=True)


@wrapt.when_imported("transformers.models.auto.image_processing_auto")
def _register_image_processor(auto):
    from nmm_serve.config import NMMConfig
    from nmm_serve.image_processor import NMMImageProcessor

    auto.AutoImageProcessor.register(NMMConfig, image_processor_classes={"pil": NMMImageProcessor}, exist_ok=True)


@wrapt.when_imported("transformers.models.auto.processing_auto")
def _register_processor(auto):
    from nmm_serve.config import NMMConfig
    from nmm_serve.processor import NMMProcessor

    auto.AutoProcessor.register(NMMConfig, NMMProcessor, exist_ok=True)
