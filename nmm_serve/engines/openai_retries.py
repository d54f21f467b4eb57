"""When a request to a server is tried again, and when it is given up."""

import random
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from nmm_serve.engines.openai_answer import retry_after, server_message
from nmm_serve.errors import EngineError

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
RETRIED_STATUS = {408, 409, 425, 429}
"""Beside every 5xx: too slow, conflict, too early, too many."""

T = TypeVar("T")


class Retry(Exception):
    """An answer that another attempt may mend."""


class NotFound(EngineError):
    """404: no such path, or no such model."""


class Retries:
    """Try until it works, the server refuses for good, or the retries are used up.

    Args:
        openai: the client's package, whose errors are told apart here.
        server: as errors call it.
        timeout: what the client waits, for the error that says so.
        max_retries: how often a request is tried again.
    """

    def __init__(self, openai: Any, server: str, timeout: float, max_retries: int) -> None:
        self.openai, self.server = openai, server
        self.timeout, self.max_retries = timeout, max_retries
        self.stopping = threading.Event()
        """Set: no thread starts another attempt."""

    def __call__(self, attempt: Callable[[], T]) -> T:
        """Raises EngineError; its message is the server's."""
        openai, tries = self.openai, self.max_retries + 1
        for attempt_number in range(tries):
            wait = None
            try:
                return attempt()
            except Retry as error:
                reason = str(error)
            except openai.APITimeoutError:
                reason = f"no answer within {self.timeout:g} s"
            except openai.APIConnectionError as error:
                reason = f"cannot connect ({type(error.__cause__ or error).__name__})"
            except openai.APIStatusError as error:
                reason = f"HTTP {error.status_code}: {server_message(error)}"
                if error.status_code == 404:
                    raise NotFound(f"{self.server}: {reason}") from error
                if error.status_code < 500 and error.status_code not in RETRIED_STATUS:
                    hint = "; set OPENAI_API_KEY to the server's key" if error.status_code in (401, 403) else ""
                    raise EngineError(f"{self.server}: {reason}{hint}") from error
                wait = retry_after(error)
            except openai.APIError as error:  # an error event within a stream, or an answer that is no JSON
                reason = server_message(error)
            except (ValueError, TypeError, KeyError, IndexError) as error:
                reason = f"the answer is not in OpenAI's shape ({type(error).__name__})"
            if attempt_number + 1 < tries:
                backoff = min(FIRST_DELAY_S * 2**attempt_number, LONGEST_DELAY_S) * random.uniform(0.5, 1.0)
                if self.stopping.wait(min(max(backoff, wait or 0.0), 2 * LONGEST_DELAY_S)):
                    break
        raise EngineError(f"{self.server}: {reason}; gave up after {attempt_number + 1} attempts")
