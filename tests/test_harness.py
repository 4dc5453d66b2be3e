"""eval.py on lm-evaluation-harness: our answers are those of its own model `hf` on what we export."""
import json
import os
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused, run

from checkpoint import load_model
from model import Xmodel, XmodelConfig
from tokenizer import get_tokenizer

lm_eval = pytest.importorskip('lm_eval')
pytest.importorskip('accelerate')                                  # lm-eval's model hf needs it
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from pydoc_data.topics import topics  # noqa: E402

import harness  # noqa: E402

THEIRS = Path(lm_eval.__file__).parent / 'tasks'
# branches strong enough that texts are not one token repeated
SHAPE = XmodelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ffn=160, vocab_size=1024,
                     block_size=512, residual_scale=30.0)
SENTENCES = [' '.join(s.split()) for text in topics.values() for s in text.split('. ')
             if 40 < len(s) < 300 and '"' not in s]


def documents(kind, n, rng):
    """n made-up questions in the layout of a benchmark."""
    def say(most=200):
        return rng.choice(SENTENCES)[:most]

    for i in range(n):
        yield {
            'arc': lambda: {'id': str(i), 'question': say(), 'answerKey': rng.choice('ABCD'),
                            'choices': {'text': [say(40) for _ in range(4)],
                                        'label': list('ABCD')}},
            'hellaswag': lambda: {'ind': i, 'activity_label': 'Reading', 'ctx_a': say(),
                                  'ctx_b': 'then they', 'endings': [say(60) for _ in range(4)],
                                  'label': str(rng.randrange(4))},
            'piqa': lambda: {'goal': say(), 'sol1': say(80), 'sol2': say(80),
                             'label': rng.randrange(2)},
            'winogrande': lambda: {'sentence': say(60) + ' _ ' + say(60), 'option1': 'Tom',
                                   'option2': 'Ann', 'answer': rng.choice('12')},
            'mmlu': lambda: {'question': say(), 'subject': 'anatomy', 'answer': rng.randrange(4),
                             'choices': [say(30) for _ in range(4)]},
            'gsm8k': lambda: {'question': say(), 'answer': f'{say(60)}\n#### {i}'},
            'bbh': lambda: {'input': say(100), 'target': rng.choice(('True', 'False'))},
            'wikitext': lambda: {'page': ' \n '.join(say() for _ in range(rng.randrange(1, 25)))},
        }[kind]()


TASKS = {  # our task: (lm-eval's YAML, layout, what else)
    'arc': ('arc/arc_easy.yaml', 'arc', 'num_fewshot: 3'),
    'hellaswag': ('hellaswag/hellaswag.yaml', 'hellaswag', 'num_fewshot: 2'),
    'piqa': ('piqa/piqa.yaml', 'piqa', 'num_fewshot: 0'),
    'winogrande': ('winogrande/default.yaml', 'winogrande', 'num_fewshot: 2'),
    'mmlu': ('mmlu/default/mmlu_anatomy.yaml', 'mmlu', 'num_fewshot: 5'),
    'gsm8k': ('gsm8k/gsm8k.yaml', 'gsm8k',
              'num_fewshot: 2\ngeneration_kwargs: {until: ["Question:", " th"], do_sample: false, '
              'max_gen_toks: 40}'),
    'bbh': ('bbh/cot_fewshot/boolean_expressions.yaml', 'bbh',
            'generation_kwargs: {until: ["Q", "\\n\\n"], do_sample: false, max_gen_toks: 100}'),
    'wikitext': ('wikitext/wikitext.yaml', 'wikitext', ''),
    'long': ('arc/arc_easy.yaml', 'arc', 'num_fewshot: 25'),      # longer than block_size
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the tasks above on made-up data, run/step_0.pt, and hf/, the same exported."""
    folder, rng = tmp_path_factory.mktemp('harness'), random.Random(0)
    (folder / 'tasks').mkdir()
    for name, (theirs, kind, more) in TASKS.items():
        files = {}
        for split, n in (('train', 40), ('validation', 24), ('test', 24), ('dev', 5)):
            file = folder / f'{name}_{split}.jsonl'
            file.write_text(''.join(json.dumps(doc) + '\n' for doc in documents(kind, n, rng)))
            files[split] = str(file)
        (folder / f'tasks/{name}.yaml').write_text(
            f'include: {THEIRS / theirs}\ntask: my_{name}\ntag: mine\ndataset_path: json\n'
            f'dataset_name: null\ndataset_kwargs: {json.dumps({"data_files": files})}\n{more}\n')
    torch.manual_seed(0)
    (folder / 'run').mkdir()
    torch.save({'config': asdict(SHAPE), 'model': Xmodel(SHAPE).state_dict()},
               folder / 'run/step_0.pt')
    assert run('export.py', folder / 'run', folder / 'hf').returncode == 0
    return folder


@pytest.fixture(scope='module')
def both(folder, tmp_path_factory):
    """Results of lm-eval with each document's answers: of its own model, and of ours."""
    os.environ['HF_HOME'] = os.environ['HF_DATASETS_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    os.environ['DISABLE_MULTIPROC'] = '1'
    manager = TaskManager(include_path=str(folder / 'tasks'), include_defaults=False)
    models = (HFLM(str(folder / 'hf'), device='cpu', batch_size=4, dtype='float32'),
              harness.XmodelLM(folder / 'run', batch_tokens=3000))
    return [lm_eval.simple_evaluate(model, tasks=[f'my_{name}' for name in TASKS], limit=20,
                                    task_manager=manager, bootstrap_iters=10) for model in models]


@pytest.mark.parametrize('task', TASKS)
def test_each_document_gets_the_answer_of_lm_evals_own_model(both, task):
    theirs, ours = (sorted(found['samples'][f'my_{task}'],
                           key=lambda s: (s['doc_id'], s['filter'])) for found in both)
    assert len(theirs) == len(ours) >= 20
    texts = set()
    for a, b in zip(theirs, ours):
        assert a['arguments'] == b['arguments']
        for x, y in zip(a['resps'], b['resps'], strict=True):
            x, y = x[0], y[0]
            if isinstance(x, str):
                assert x == y
                texts.add(x)
            elif isinstance(x, tuple):
                assert x[0] == pytest.approx(y[0], abs=1e-4) and x[1] == y[1]
            else:
                assert x == pytest.approx(y, rel=1e-6)
    assert not texts or len(texts) > 10 and max(map(len, texts)) > 20
    for key, value in both[0]['results'][f'my_{task}'].items():
        assert both[1]['results'][f'my_{task}'][key] == (
            pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
