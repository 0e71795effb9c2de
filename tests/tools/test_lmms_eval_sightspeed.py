"""The adapter for lmms-eval, against as much of lmms_eval as a model sees."""

import importlib
import sys
import types

import pytest
from helpers_eval import TOKENIZER, save_tiny_run
from PIL import Image

import data
import eval as evaluation
import model
from tools import benchmarks


def fake_lmms_eval(monkeypatch) -> dict:
    """As much of lmms_eval as a model sees: its base class, the registry's decorator, requests."""
    registry = {}

    class lmms:
        def __init__(self):
            self.task_dict = {}

        @classmethod
        def create_from_arg_string(cls, text: str, more: dict | None = None):
            return cls(**dict(pair.split("=") for pair in text.split(",")), **(more or {}))

    def register_model(*names):
        return lambda cls: [registry.setdefault(name, cls) for name in names][0]

    parts = {"": {}, ".api": {}, ".api.model": {"lmms": lmms}}
    parts |= {".api.registry": {"register_model": register_model}}
    for name, content in parts.items():
        module = types.ModuleType("lmms_eval" + name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, "lmms_eval" + name, module)
    return registry


def test_answers_and_likelihoods_are_those_of_eval(tmp_path, monkeypatch):
    registry, run = fake_lmms_eval(monkeypatch), save_tiny_run(tmp_path)
    sys.modules.pop("tools.lmms_eval_sightspeed", None)
    importlib.import_module("tools.lmms_eval_sightspeed")
    adapter = registry["sightspeed"].create_from_arg_string(f"pretrained={run},device=cpu,batch_size=2")
    red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    documents = [{"image": [red]}, {"image": [blue, red]}, {"image": []}]
    adapter.task_dict = {"t": {"test": documents}}
    texts = ["What colour?", "Which of the two?", "Say a word."]

    def ask(i: int, second) -> types.SimpleNamespace:
        return types.SimpleNamespace(args=(texts[i], second, lambda doc: doc["image"], i, "t", "test"))

    tokens = {"max_new_tokens": 6, "until": ["\n\n"]}
    said = adapter.generate_until([ask(i, dict(tokens)) for i in (2, 0, 1)])
    vlm = model.VLM.from_pretrained(run).eval()
    questions = [evaluation.Question((*d["image"],), t, ["x"]) for d, t in zip(documents, texts)]
    task = benchmarks.BenchmarkTask("t", "vqa", questions, 6)
    images = [question.images for question in questions]
    right = evaluation.answer_all(vlm, TOKENIZER, task, images, "full", evaluation.EvalConfig())
    assert said == [right[i].partition("\n\n")[0].strip() for i in (2, 0, 1)]
    scored = adapter.loglikelihood([ask(0, "red"), ask(0, lambda doc: "blue")])
    q, cfg = questions[0], evaluation.EvalConfig()
    sample = data.load_sample(task.prompt(q, TOKENIZER), [red], vlm.cfg)
    options = [[TOKENIZER.encode(word) for word in ("red", "blue")]]
    (sums,) = evaluation.answer_likelihoods(vlm, [sample], options, cfg.tokens)
    assert [value for value, _ in scored] == pytest.approx([*sums], abs=1e-3)
    assert all(isinstance(greedy, bool) for _, greedy in scored)
    with pytest.raises(NotImplementedError):
        adapter.generate_until_multi_round([])
