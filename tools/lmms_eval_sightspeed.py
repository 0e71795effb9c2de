"""A model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval) that answers with a run of this repository.

What has no row in tools/benchmarks.py can be asked through lmms-eval: it brings questions, pictures, scores,
and this repository the answers. lmms-eval finds models in a package that LMMS_EVAL_PLUGINS names; make one
that leads here, once, and run it in one process:

    mkdir -p plug/models
    echo 'AVAILABLE_MODELS = {"sightspeed": "Sightspeed"}' > plug/models/__init__.py
    echo 'from tools.lmms_eval_sightspeed import Sightspeed' > plug/models/sightspeed.py
    PYTHONPATH=.:PATH_OF_THIS_REPOSITORY LMMS_EVAL_PLUGINS=plug python -m lmms_eval \\
        --model sightspeed --model_args pretrained=runs/a/sft --tasks mmvet --batch_size 1

model_args: pretrained (a run or checkpoint folder), tokens (full or pruned), device, dtype, batch_size.
`python tools/lmms_eval_sightspeed.py` prints this manual.
"""

import os
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.api.registry import register_model
except ModuleNotFoundError:  # the manual can be read without it

    class lmms:
        pass

    def register_model(name):
        return lambda model_class: model_class


import data
import eval as evaluation
import model
from tools import benchmarks


@register_model("sightspeed")
class Sightspeed(lmms):
    """Greedy answers in the run's chat template, pictures in front of the text or at "<image 1>"."""

    def __init__(self, pretrained, device="auto", batch_size=8, tokens="full", dtype="auto", **unused):
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise NotImplementedError("sightspeed answers lmms-eval in one process")
        self.cfg = evaluation.EvalConfig(
            model=pretrained, batch_size=int(batch_size), tokens=tokens, device=device, dtype=dtype
        )
        evaluation.check_config(self.cfg)
        self.vlm, self.tokenizer, self.autocast = evaluation.load_model(self.cfg)

    def question(self, request):
        """A request as a Question, its second argument (how to answer, or the continuation), its document."""
        text, second, pictures_of, number, task, split = request.args
        document = self.task_dict[task][split][number]
        pictures = tuple(picture.convert("RGB") for picture in pictures_of(document) or ())
        return evaluation.Question(pictures, text, [], name=number), second, document

    def generate_until(self, requests):
        groups, answers = defaultdict(list), {}
        for i, request in enumerate(requests):
            question, settings, _ = self.question(request)
            if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
                raise NotImplementedError("sightspeed answers greedily: no do_sample, no num_beams")
            until = settings.get("until", [])
            marks = (until,) if isinstance(until, str) else tuple(until)
            groups[settings.get("max_new_tokens", 128), marks].append((i, question))
        for (max_new_tokens, marks), members in groups.items():
            numbers, questions = zip(*members)
            task = benchmarks.BenchmarkTask("lmms-eval", "vqa", [*questions], max_new_tokens)
            images, view = [question.images for question in questions], self.cfg.tokens
            with self.autocast:
                texts = evaluation.answer_all(self.vlm, self.tokenizer, task, images, view, self.cfg)
            answers |= {i: evaluation.cut_answer(text, marks) for i, text in zip(numbers, texts)}
        return [answers[i] for i in range(len(requests))]

    @torch.no_grad()
    def loglikelihood(self, requests):
        """The summed log-probability of each continuation, and whether greedy decoding gives it."""
        results, view, device = [], self.cfg.tokens, next(self.vlm.parameters()).device
        for request in requests:
            question, continuation, document = self.question(request)
            text = continuation(document) if callable(continuation) else continuation
            ids = self.tokenizer.encode(text)
            pieces = benchmarks.marked_prompt(question, self.tokenizer)
            sample = data.load_sample(pieces, [*question.images], self.vlm.cfg, "lmms-eval")
            batch = data.prompt_batch([sample], view, self.vlm.cfg).to(device)
            with self.autocast:
                (sums,) = evaluation.answer_likelihoods(self.vlm, [sample], [[ids]], view)
                greedy = self.vlm.generate(batch, self.tokenizer.end, len(ids))[0]
            results.append((float(sums[0]), greedy == ids))
        return results

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("sightspeed answers one question at a time")


def main(argv: list[str]) -> None:
    print(__doc__)


if __name__ == "__main__":
    model.run_cli(main)
