"""The lmms-eval model, against a stub of lmms-eval's contract (as in its 0.7.3), or lmms-eval itself where it is
installed."""

import dataclasses
import importlib
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `evals`")

from parity_checkpoint import noise_image
from tiny_checkpoint import make_checkpoint

from nmm_serve.engines.base import Request, SamplingParams
from nmm_serve.engines.torch import TorchEngine
from nmm_serve.errors import ConfigError, PromptError


class StubBase:
    """`lmms_eval.api.model.lmms`: what its constructor sets."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}


@dataclasses.dataclass(frozen=True)
class StubManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture
def lmms_eval(monkeypatch):
    """The base class and the manifest's."""
    try:
        base = importlib.import_module("lmms_eval.api.model").lmms
        manifest = importlib.import_module("lmms_eval.models.registry_v2").ModelManifest
        return SimpleNamespace(base=base, manifest=manifest)
    except ImportError:
        contents = {
            "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": StubBase},
            "lmms_eval.models": {}, "lmms_eval.models.registry_v2": {"ModelManifest": StubManifest},
        }  # fmt: skip
        for name, content in contents.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "nmm_serve.evals.lmms_eval_model", raising=False)
        return SimpleNamespace(base=StubBase, manifest=StubManifest)


@pytest.fixture
def model_class(lmms_eval):
    """As lmms-eval resolves it: entry point, manifest, class path, checks."""
    (point,) = (p for p in entry_points(group="lmms_eval.models") if p.name == "nmm")
    manifest = point.load()()
    assert isinstance(manifest, lmms_eval.manifest)
    assert manifest.model_id == "nmm"
    module, name = manifest.chat_class_path.rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    assert issubclass(cls, lmms_eval.base)
    assert cls.is_simple is False, "lmms-eval refuses a chat class that says it is simple"
    return cls


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("lmms") / "tiny"))


DOCS = [{"question": "what is", "image": noise_image(1, 40, 40)}, {"question": "describe", "image": None}]


def doc_to_messages(doc):
    images = [{"type": "image", "url": doc["image"]}] if doc["image"] else []
    return [{"role": "user", "content": [*images, {"type": "text", "text": doc["question"]}]}]


def request(doc_id, to_messages=doc_to_messages, **gen_kwargs):
    return SimpleNamespace(args=("ctx", to_messages, {"max_new_tokens": 5} | gen_kwargs, doc_id, "toy", "test"))


def test_answers_are_the_engines(model_class, checkpoint):
    model = model_class(checkpoint, engine="torch", batch_size=2, device="cpu")
    model.task_dict = {"toy": {"test": DOCS}}
    answers = model.generate_until([request(0), request(1, until=["\n\n"], do_sample=False, temperature=0)])
    sampling = SamplingParams(max_tokens=5)
    content = [{"type": "image"}, {"type": "text", "text": "what is"}]
    direct = [
        Request(messages=[{"role": "user", "content": content}], images=[DOCS[0]["image"]], sampling=sampling),
        Request(messages=[{"role": "user", "content": "describe"}], sampling=sampling),
    ]
    assert answers == [output.text for output in TorchEngine(checkpoint).generate(direct)]


def test_what_cannot_be_done_raises(model_class, checkpoint):
    model = model_class(checkpoint)
    model.task_dict = {"toy": {"test": DOCS}}
    film = lambda _doc: [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}]  # noqa: E731
    with pytest.raises(PromptError, match="toy/0 holds video"):
        model.generate_until([request(0, film)])
    with pytest.raises(PromptError, match="toy/1: the prompt has"):
        model.generate_until([request(1, max_new_tokens=4000)])
    with pytest.raises(ConfigError, match="num_beams=4"):
        model.generate_until([request(1, num_beams=4)])
    with pytest.raises(NotImplementedError):
        model.loglikelihood([])
