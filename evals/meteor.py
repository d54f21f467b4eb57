"""METEOR through pycocoevalcap's Java child, with a way out when that child dies or hangs."""

import contextlib
import threading
from collections.abc import Sequence

from nmm_serve.errors import EngineError

_START_S = 120
_PER_IMAGE_S = 0.5


def meteor(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR 1.5 (English, normalised) of tokenised captions: the corpus score and one per image, both 0 to 1.

    Raises EngineError when Java dies, answers nonsense or takes longer than two minutes plus half a second an image.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    limit_s = _START_S + _PER_IMAGE_S * len(hypotheses)
    try:
        scorer = Meteor()
    except OSError as error:
        raise EngineError(f"METEOR's Java could not be started: {error.strerror}") from None
    # `|||` separates fields in METEOR's protocol; inside a caption it would shift them.
    res = {i: [_without_separator(h)] for i, h in enumerate(hypotheses)}
    gts = {i: [_without_separator(r) for r in refs] for i, refs in enumerate(references)}
    # Killing the child closes its pipes, which ends a read that would otherwise wait for ever.
    watchdog = threading.Timer(limit_s, scorer.meteor_p.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        total, per_image = scorer.compute_score(gts, res)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"METEOR's Java died or ran over {limit_s:.0f} s ({type(error).__name__}); the other metrics stand"
        ) from None
    finally:
        watchdog.cancel()
        if scorer.lock.locked():
            scorer.lock.release()  # left held by an exception, it would hang the scorer's destructor for ever
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()
        scorer.meteor_p.kill()
        scorer.meteor_p.wait()
    return total, per_image


def _without_separator(text: str) -> str:
    return " ".join(text.replace("|||", " ").split())
