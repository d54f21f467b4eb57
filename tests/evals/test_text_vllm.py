"""Text tasks through vLLM: the torch engine's scores."""

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `evals`")
pytest.importorskip("vllm")

from parity_checkpoint import make_parity_checkpoint
from text_fakes import likelihood

from nmm_serve.engines import open_engine
from nmm_serve.evals.datasets import Files
from nmm_serve.evals.lm_eval_model import NMM
from nmm_serve.evals.run import Options, evaluate, load_data
from nmm_serve.evals.text import TextOptions

pytestmark = pytest.mark.slow


def test_scores_are_the_torch_engines(tmp_path):
    checkpoint = str(make_parity_checkpoint(tmp_path / "tiny", "early"))
    scores, answers, cuts = {}, {}, {}
    for engine in ("torch", "vllm"):
        plan = Options(
            tasks=("text",), files=Files(split=""), out=tmp_path / f"{engine}.json", limit=6, text=TextOptions()
        )
        with open_engine(checkpoint, engine) as opened:
            record = evaluate(opened, load_data(plan), plan)
            model = NMM(opened)
            asked = [likelihood("what is the col", "our of"), likelihood("circle red " * 300, " blue", doc_id=1)]
            cuts[engine] = [logprob for logprob, _ in model.loglikelihood(asked)]
            assert model.truncated == {"toy": {1}}
        section = record["tasks"]["text"]
        assert section["failed"] == 0
        assert len(section["tasks"]) == 7
        scores[engine] = {name: task["metrics"] for name, task in section["tasks"].items()}
        answers[engine] = {name: task["hash"] for name, task in section["tasks"].items()}
    assert answers["torch"] == answers["vllm"]
    assert cuts["vllm"] == pytest.approx(cuts["torch"], rel=1e-5, abs=1e-3)
    for name, expected in scores["torch"].items():
        assert scores["vllm"][name] == pytest.approx(expected, rel=1e-4), name
