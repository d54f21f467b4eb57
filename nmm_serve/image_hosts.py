"""From where a server takes images, whichever engine it has: the rules and their words.

No remote image unless its host was named when the server was started, and no local file ever.
"""

from collections.abc import Sequence

from nmm_serve.errors import ImageError

MAX_DOWNLOAD_BYTES = 64 * 2**20
"""Of one fetched image, checked while it arrives."""
NO_FILES = "this server reads no files of its own; send the image itself as a base64 data URL"
NOT_BASE64 = "the image's data URL is not base64; expected data:image/png;base64,..."
BAD_BASE64 = "the image is not valid base64"


def check_host(host: str | None, named: Sequence[str]) -> None:
    """Raises ImageError for a host that was not named. Another spelling of a named host is another host."""
    if not named:
        raise ImageError(
            "this server fetches no images from other hosts; send the image itself as a base64 data URL, or have the "
            "operator name the domain with --allow-media-domain"
        )
    if host not in named:
        raise ImageError(f"this server fetches no images from that host; it was started for: {', '.join(named)}")


def not_fetched(host: str | None, why: str) -> str:
    return f"the image could not be fetched from {host} ({why})"
