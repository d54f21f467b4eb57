"""The built-in data set: rendered scenes and real handwriting, with captions, questions and text, from a seed."""

if __name__ != "nmm_serve.train.data.builtin":
    raise ImportError(
        f"{__name__!r} was picked up from the source folder because the current directory is on sys.path; "
        "import nmm_serve.train.data.builtin, and start Python with -P (or PYTHONSAFEPATH=1) from here"
    )

from nmm_serve.train.data.builtin.balance import best_constant_by_type, question_only_ceiling
from nmm_serve.train.data.builtin.disk import export
from nmm_serve.train.data.builtin.example import Example, builtin_images, image_id
from nmm_serve.train.data.builtin.interleaved import interleaved_document
from nmm_serve.train.data.builtin.scene import IMAGE_SIZE, SPLITS, Difficulty, Object, Scene, sample_scene
from nmm_serve.train.data.builtin.stories import text_document

__all__ = [
    "IMAGE_SIZE",
    "SPLITS",
    "Difficulty",
    "Example",
    "Object",
    "Scene",
    "best_constant_by_type",
    "builtin_images",
    "export",
    "image_id",
    "interleaved_document",
    "question_only_ceiling",
    "sample_scene",
    "text_document",
]
