"""What lmms-eval finds under its entry point `lmms_eval.models`. It is read while lmms-eval starts, so it is light."""

from typing import Any


def manifest() -> Any:
    """Our models under the name `nmm`: `lmms-eval --model nmm --model_args model=ckpt/,engine=vllm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="nmm", chat_class_path="nmm_serve.evals.lmms_eval_model.NMMForLMMs")
