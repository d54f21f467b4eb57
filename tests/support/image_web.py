"""A web server with an image, for what fetches images."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

OTHER_SPELLINGS = (
    "http://127.0.0.1.evil.example/", "http://127.0.0.1@evil.example/", "http://evil.example#127.0.0.1",
    "http://[::ffff:127.0.0.1]/", "http://2130706433/", "http://0x7f000001/", "http://localhost/",
    "HTTP://EVIL.EXAMPLE/", "http://127.1/", "http:///a.png", "//127.0.0.1/a.png",
)  # fmt: skip
"""What is not the host 127.0.0.1, or not as it was named."""


def png(image=None):
    buffer = io.BytesIO()
    (image or Image.new("RGB", (4, 3), "red")).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def image_web() -> Iterator[ThreadingHTTPServer]:
    """/a.png is an image, /away redirects to it, /endless never ends, /slow says nothing; others are 404. `asked` lists
    the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append(self.path)
            if self.path == "/slow":
                time.sleep(3)
                return
            self.send_response({"/a.png": 200, "/endless": 200, "/away": 302}.get(self.path, 404))
            if self.path == "/away":
                self.send_header("location", "/a.png")
            self.end_headers()
            if self.path == "/a.png":
                self.wfile.write(png())
            try:
                while self.path == "/endless":
                    self.wfile.write(bytes(2**16))
            except OSError:
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.asked = asked
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
