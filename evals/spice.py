"""SPICE through the jar that pycocoevalcap bundles, where Stanford's models are already on disk.

pycocoevalcap's own wrapper downloads 384 MB into the installed package and keeps its temporary files and cache there.
Here nothing is downloaded, and what SPICE writes goes into a temporary folder.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nmm_serve.errors import EngineError, NMMError
from nmm_serve.evals import java

_START_S, _PER_IMAGE_S = 600.0, 2.0


def missing() -> str | None:
    """Why SPICE cannot be computed, in one line; None when its models are there."""
    try:
        folder = _folder()
    except NMMError as error:
        return str(error)
    absent = [name for name in _models() if not (folder / "lib" / name).is_file()]
    if not absent:
        return None
    return f"SPICE is left out: {absent[0]} is not in {folder / 'lib'}, and nothing is downloaded"


def spice(java_path: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Mean F-score and one per image, 0 to 1, of tokenised captions.

    Raises EngineError when the models are missing, or when Java fails or takes too long.
    """
    if reason := missing():
        raise EngineError(reason)
    captions = [
        {"image_id": i, "test": hypothesis, "refs": list(refs)}
        for i, (hypothesis, refs) in enumerate(zip(hypotheses, references, strict=True))
    ]
    with tempfile.TemporaryDirectory(prefix="nmm-spice-") as name:
        place = Path(name)
        (place / "captions.json").write_text(json.dumps(captions))
        (place / "cache").mkdir()
        command = [java_path, *java.OPTIONS, "-Xmx8G", "-jar", str(_folder() / "spice-1.0.jar")]
        command += [str(place / "captions.json"), "-cache", str(place / "cache"), "-out", str(place / "scores.json")]
        try:
            java.run([*command, "-subset", "-silent"], timeout_s=_START_S + _PER_IMAGE_S * len(captions))
            scored = json.loads((place / "scores.json").read_text())
            by_image = {image["image_id"]: float(image["scores"]["All"]["f"]) for image in scored}
            per_image = [by_image[i] for i in range(len(captions))]
        except EngineError as error:
            raise EngineError(f"SPICE's Java failed: {error}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"SPICE's Java left no scores that can be read ({type(error).__name__})") from None
    if not all(map(math.isfinite, per_image)):
        raise EngineError("SPICE gave no number for some images")
    return sum(per_image) / len(per_image), per_image


def _folder() -> Path:
    try:
        from pycocoevalcap.spice import get_stanford_models
    except ImportError:
        raise NMMError("SPICE needs pycocoevalcap; pip install 'nmm-serve[evals]'") from None
    return Path(get_stanford_models.__file__).parent


def _models() -> tuple[str, str]:
    from pycocoevalcap.spice.get_stanford_models import JAR

    return f"{JAR}.jar", f"{JAR}-models.jar"
