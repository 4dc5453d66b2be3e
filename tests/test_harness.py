"""eval.py on lm-evaluation-harness, whose own model `hf`, on what we export, is the oracle."""
import json
import math
import os
import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from conftest import make_chain, refused, run

import eval as script
from checkpoint import load_model
from generate import complete
from model import Xmodel, XmodelConfig
from tokenizer import EOS_ID, OtherTokenizer, get_tokenizer

lm_eval = pytest.importorskip('lm_eval')
pytest.importorskip('accelerate')                                  # lm-eval's model hf needs it
import datasets
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from lab import harness

THEIRS = Path(lm_eval.__file__).parent / 'tasks'
# branches strong enough that texts are not one token repeated
SHAPE = XmodelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ffn=160, vocab_size=1024,
                     block_size=512, residual_scale=30.0)
SENTENCES = [' '.join(s.split()) for text in topics.values() for s in text.split('. ')
             if 40 < len(s) < 300 and '"' not in s]


def document(kind, i, rng):
    """A made-up question in the layout of a benchmark."""
    def say(most=200):
        return rng.choice(SENTENCES)[:most]

    match kind:
        case 'arc':
            return {'id': str(i), 'question': say(), 'answerKey': rng.choice('ABCD'), 'choices': {
                'text': [say(40) for _ in range(4)], 'label': list('ABCD')}}
        case 'hellaswag':
            return {'ind': i, 'activity_label': 'Reading', 'ctx_a': say(), 'ctx_b': 'then they',
                    'endings': [say(60) for _ in range(4)], 'label': str(rng.randrange(4))}
        case 'piqa':
            return {'goal': say(), 'sol1': say(80), 'sol2': say(80), 'label': rng.randrange(2)}
        case 'winogrande':
            return {'sentence': say(60) + ' _ ' + say(60), 'option1': 'Tom', 'option2': 'Ann',
                    'answer': rng.choice('12')}
        case 'mmlu':
            return {'question': say(), 'subject': 'anatomy', 'answer': rng.randrange(4),
                    'choices': [say(30) for _ in range(4)]}
        case 'gsm8k':
            return {'question': say(), 'answer': f'{say(60)}\n#### {i}'}
        case 'bbh':
            return {'input': say(100), 'target': rng.choice(('True', 'False'))}
        case 'wikitext':
            return {'page': ' \n '.join(say() for _ in range(rng.randrange(1, 25)))}
        case 'humaneval':
            # what the model writes is a comment: every third program is right whatever that is
            return {'task_id': f'{i}', 'prompt': f'def f{i}(x):\n    return {i % 3 or "x"}  # ',
                    'canonical_solution': '', 'entry_point': f'f{i}',
                    'test': 'def check(f):\n    assert f(7) == 7\n'}


def write_jsonl(file, kind, n, rng):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(json.dumps(document(kind, i, rng)) + '\n' for i in range(n)))
    return str(file)


TASKS = {  # our task: (lm-eval's YAML, layout, what else)
    'arc': ('arc/arc_easy.yaml', 'arc', 'num_fewshot: 3'),
    'hellaswag': ('hellaswag/hellaswag.yaml', 'hellaswag', 'num_fewshot: 2'),
    'piqa': ('piqa/piqa.yaml', 'piqa', 'num_fewshot: 0'),
    'winogrande': ('winogrande/default.yaml', 'winogrande', 'num_fewshot: 2'),
    'mmlu': ('mmlu/default/mmlu_anatomy.yaml', 'mmlu', 'num_fewshot: 5'),
    'gsm8k': ('gsm8k/gsm8k.yaml', 'gsm8k', 'num_fewshot: 2\ngeneration_kwargs: '
              + '{until: ["Question:", " th"], max_gen_toks: 40}'),            # so greedy
    'bbh': ('bbh/cot_fewshot/boolean_expressions.yaml', 'bbh',
            'generation_kwargs: {until: ["Q", "\\n\\n"], do_sample: false, max_gen_toks: 60}'),
    'wikitext': ('wikitext/wikitext.yaml', 'wikitext', ''),
    'long': ('arc/arc_easy.yaml', 'arc', 'num_fewshot: 25'),      # longer than block_size
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the tasks above on made-up data, run/step_0.pt, and hf/, the same exported."""
    folder, rng = tmp_path_factory.mktemp('harness'), random.Random(0)
    (folder / 'tasks').mkdir()
    for name, (theirs, kind, more) in TASKS.items():
        files = {split: write_jsonl(folder / f'{name}_{split}.jsonl', kind, n, rng)
                 for split, n in (('train', 40), ('validation', 24), ('test', 24), ('dev', 5))}
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
def both(folder):
    """Results of lm-eval with each document's answers: of its own model, and of ours."""
    os.environ['DISABLE_MULTIPROC'] = '1'
    manager = TaskManager(include_path=str(folder / 'tasks'), include_defaults=False)
    models = (HFLM(str(folder / 'hf'), device='cpu', batch_size=4, dtype='float32'),
              harness.XmodelLM(folder / 'run', batch_tokens=3000))
    return [lm_eval.simple_evaluate(model, tasks=[f'my_{name}' for name in TASKS], limit=12,
                                    task_manager=manager, bootstrap_iters=10) for model in models]


@pytest.mark.parametrize('task', TASKS)
def test_each_document_gets_the_answer_of_lm_evals_own_model(both, task):
    theirs, ours = (sorted(found['samples'][f'my_{task}'],
                           key=lambda s: (s['doc_id'], s['filter'])) for found in both)
    assert len(theirs) == len(ours) >= 12
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


def test_what_begins_alike_is_read_once():
    prompt, other = list(range(100)), list(range(200, 290))
    branches = [harness.Branch((*text, *end[:-1]), [(n, end)]) for n, (text, end) in enumerate(
        [*((prompt, [n, n, n]) for n in range(4)), *((other, [n, n]) for n in range(2))])]
    groups = harness.groups_of(branches)
    # a choice's first token is scored where the prompt ends, so that is in each row
    assert sorted((length, len(members)) for length, members in groups) == [(89, 2), (99, 4)]
    alone = harness.groups_of([harness.Branch(tuple(range(i, 2 * i)), [(0, [1])])
                               for i in (50, 100)])
    assert [len(members) for _, members in alone] == [1, 1]


@pytest.mark.parametrize('batch_tokens, n', [(75, 5), (60, 4), (59, 3), (30, 2), (29, 1), (1, 1)])
def test_a_batch_has_as_many_tokens_as_it_may_and_no_more(batch_tokens, n):
    branch = harness.Branch(tuple(range(15)), [(0, [1])])
    assert harness.next_batch([(10, [branch])] * 5, batch_tokens) == n       # of 10 + 5 tokens


def test_the_padding_of_a_batch_counts():
    long, short = (harness.Branch(tuple(range(m)), [(0, [1])]) for m in (22, 15))
    groups = [(10, [short]), (2, [long])]                         # 10 + 5, and 2 + 20 tokens
    assert [harness.next_batch(groups, 2 * (10 + 20) - less) for less in (0, 1)] == [2, 1]


def test_chats_are_those_of_the_template(folder):
    lm = harness.XmodelLM(folder / 'run')
    said = [{'role': 'user', 'content': 'A'}, {'role': 'assistant', 'content': 'B'}]
    assert lm.apply_chat_template(said[:1]) == 'User: A\n\nAssistant:'
    assert lm.apply_chat_template(said, add_generation_prompt=False) == 'User: A\n\nAssistant: B'
    assert lm.apply_chat_template(said[:1], add_generation_prompt=False) == 'User: A'
    assert lm.chat_template() is None and 'Assistant' in lm.chat_template(True)
    # no text before it: as if after the end of a document
    request = [lm_eval.api.instance.Instance('loglikelihood', {}, ('', 'import os'), 0)]
    (found, _), = lm.loglikelihood(request, disable_tqdm=True)
    ids = torch.tensor([lm.prefix_token_id, *lm.tok_encode('import os')])
    right = lm.model(ids[None, :-1])[0][0].log_softmax(-1).gather(1, ids[1:, None]).sum()
    assert found == pytest.approx(right.item(), abs=1e-4)


def test_an_answer_ends_where_the_model_ends_its_document(tmp_path):
    prompt, word, other = (get_tokenizer(512).encode_ordinary(text)[-1] for text in 'aXY')
    lm = harness.XmodelLM(make_chain(tmp_path, [prompt, word, EOS_ID, other]))
    settings = {'until': ['\n\n'], 'max_gen_toks': 9, 'do_sample': False}
    request = lm_eval.api.instance.Instance('generate_until', {}, ('a', settings), 0)
    assert lm.generate_until([request], disable_tqdm=True) == ['X']


def test_a_prompt_loses_its_beginning_where_the_answer_needs_the_room(tmp_path, monkeypatch):
    read = []

    def recording(model, tokenizer, prompts, *rest, **how):
        read.extend(prompts)
        return complete(model, tokenizer, prompts, *rest, **how)

    monkeypatch.setattr(harness, 'complete', recording)
    text = 'one two three four five six seven'
    ids = get_tokenizer(512).encode_ordinary(text)
    lm = harness.XmodelLM(make_chain(tmp_path, [ids[-1]]), max_length=8)

    def answer(n):
        settings = {'until': ['\n\n'], 'max_gen_toks': n, 'do_sample': False}
        request = lm_eval.api.instance.Instance('generate_until', {}, (text, settings), 0)
        return lm.generate_until([request], disable_tqdm=True)

    for n in (5, 7):
        answer(n)
        assert read.pop() == ids[-(8 - n):]
    for n in (8, 9):                                               # no room for a single token
        with pytest.raises(ValueError, match=f'{n} tokens are to be generated'):
            answer(n)
    assert not read and len(ids) > 8


def test_of_a_continuation_that_is_too_long_the_end_is_scored(folder):
    lm = harness.XmodelLM(folder / 'run', max_length=8)
    text = ' '.join(SENTENCES[:3])
    ids = torch.tensor(lm.tok_encode('So') + lm.tok_encode(f' {text}'))
    (found, greedy), = lm.loglikelihood(
        [lm_eval.api.instance.Instance('loglikelihood', {}, ('So', f' {text}'), 0)])
    right = lm.model.double()(ids[None, -9:-1])[0][0].log_softmax(-1).gather(1, ids[-8:, None])
    assert len(ids) > 20 and found == pytest.approx(right.sum().item(), rel=1e-5) and not greedy


def test_weights_are_rounded_to_the_dtype_that_was_asked_for(folder):
    requests = [lm_eval.api.instance.Instance('loglikelihood', {}, (text[:80], text[80:]), i)
                for i, text in enumerate(sorted(t for t in SENTENCES if len(t) > 120)[:4])]
    exact, rounded = (harness.XmodelLM(folder / 'run', dtype=dtype)
                      for dtype in ('float32', 'bfloat16'))
    assert {p.dtype for p in rounded.model.parameters()} == {torch.bfloat16}
    a, b = ([value for value, _ in lm.loglikelihood(requests)] for lm in (exact, rounded))
    assert a != pytest.approx(b, rel=1e-6) and a == pytest.approx(b, rel=0.05)


def test_answers_kept_before_a_kill_are_those_of_their_own_questions(folder, tmp_path):
    lm, rng = harness.XmodelLM(folder / 'run', batch_tokens=600), random.Random(0)
    texts = [rng.choice(SENTENCES) for _ in range(6)]
    settings = {'until': ['.'], 'max_gen_toks': 20, 'do_sample': False}
    asked = {'loglikelihood': [(text[:20], text[20:]) for text in texts],
             'loglikelihood_rolling': [(text,) for text in texts],
             'generate_until': [(text, settings) for text in texts]}
    cached = CachingLM(lm, str(tmp_path / 'answers.db'))          # lm-eval's --use_cache
    for kind, arguments in asked.items():
        requests = [lm_eval.api.instance.Instance(kind, {}, args, i)
                    for i, args in enumerate(arguments)]
        answers = getattr(lm, kind)(requests, disable_tqdm=True)  # of a call that never returned
        assert len(set(answers)) > 3
        setattr(lm, kind, None)                                  # so that it is not asked again
        assert getattr(cached, kind)(requests) == answers, kind


def scores(run_folder, task):
    table = json.loads((run_folder / 'step_0.eval.json').read_text())
    return table['tasks'][task]['scores']


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of run/, whose table of scores is empty."""
    return Path(shutil.copytree(folder / 'run', tmp_path / 'run'))


def test_a_killed_evaluation_goes_on_to_the_same_table(folder, copy, tmp_path):
    own = tmp_path / 'tasks'
    own.mkdir()
    for name in ('arc', 'piqa', 'winogrande'):
        shutil.copy(folder / f'tasks/{name}.yaml', own)
    (own / 'kill.py').write_text(f"""
import os, signal
def process_results(doc, results):
    if os.path.exists({str(tmp_path / 'kill')!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    (first, _), (second, _) = results
    return {{'acc': float((first < second) == doc['label']), 'acc_norm': 0.0}}
""")
    with open(own / 'piqa.yaml', 'a') as f:
        f.write('process_results: !function kill.process_results\n')
    (own / 'group.yaml').write_text(
        'group: three\ntask: [my_arc, my_piqa, my_winogrande]\n'
        'aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n')
    args = ('--tasks=my_winogrande,three', f'--include_path={own}', '--limit=6', '--resume')

    (tmp_path / 'kill').touch()
    assert run('eval.py', copy, *args).returncode == -9
    table = json.loads((copy / 'step_0.eval.json').read_text())
    assert table['tasks']['my_winogrande']['scores']
    three = table['tasks']['three']
    assert list(three['parts']) == ['my_arc'] and not three['scores']
    (tmp_path / 'kill').unlink()
    three['parts']['my_arc']['acc,none'] += 0.03                   # to see that it is kept
    (copy / 'step_0.eval.json').write_text(json.dumps(table))
    done = run('eval.py', copy, *args)
    assert done.returncode == 0, done.stderr
    resumed = json.loads((copy / 'step_0.eval.json').read_text())['tasks']
    assert done.stdout == (copy / 'step_0.eval.md').read_text()
    assert 'my_winogrande is kept as it was scored before' in done.stderr

    done = run('eval.py', copy, *args[:-1])
    unbroken = json.loads((copy / 'step_0.eval.json').read_text())['tasks']
    assert done.returncode == 0
    assert unbroken['my_winogrande'] == resumed['my_winogrande']
    for part in ('my_piqa', 'my_winogrande'):
        assert unbroken['three']['parts'][part] == resumed['three']['parts'][part]
    means = [sum(part['acc,none'] for part in found['three']['parts'].values()) / 3
             for found in (resumed, unbroken)]
    assert means[0] == pytest.approx(means[1] + 0.01)
    # nothing that was kept is lost
    done = run('eval.py', copy, *args, '--limit=5', '--dtype=bfloat16')
    assert done.returncode == 1 and done.stderr.count('its kept scores have') == 2
    assert done.stderr.count('have limit=6, now 5, dtype=float32, now bfloat16; ') == 2
    assert json.loads((copy / 'step_0.eval.json').read_text())['tasks'] == unbroken
    for found, mean in zip((resumed, unbroken), means):
        assert found['three']['scores']['three']['acc,none'] == pytest.approx(mean)


def test_the_table_has_what_lm_eval_says(folder, copy, both):
    done = run('eval.py', copy, f'--include_path={folder / "tasks"}', '--limit=12',
                   '--tasks=my_mmlu,my_gsm8k,my_wikitext')
    assert done.returncode == 0, done.stderr
    for task in ('my_mmlu', 'my_gsm8k', 'my_wikitext'):
        for key, value in both[0]['results'][task].items():
            if isinstance(value, float):
                assert scores(copy, task)[task][key] == pytest.approx(value, rel=1e-5), key
    acc = 100 * both[0]['results']['my_mmlu']['acc,none']
    error = 100 * both[0]['results']['my_mmlu']['acc_stderr,none']
    assert f'| my_mmlu | 5 | first 12 | acc | {acc:.2f} | {error:.2f} |' in done.stdout
    assert '| my_gsm8k | 2 | first 12 | exact_match,strict-match | ' in done.stdout
    # and by the same name in lm-eval's own program
    done = run('eval.py', 'lm_eval', 'run', '--model', 'xmodel', '--model_args',
               f'pretrained={copy}', '--tasks', 'my_mmlu', '--include_path', folder / 'tasks',
               '--limit', 12)
    assert done.returncode == 0, done.stderr
    assert f'|{acc / 100:.4f}|' in done.stdout.replace(' ', '')


def hub_layout(data_dir):
    """Data sets laid out as on the hub: ai2_arc, humaneval, wikitext; not piqa."""
    rng = random.Random(1)
    for name, config, kind, splits in (
            ('allenai/ai2_arc', 'ARC-Easy', 'arc', ('train', 'validation', 'test')),
            ('openai/openai_humaneval', 'openai_humaneval', 'humaneval', ('test',))):
        for split in splits:
            write_jsonl(data_dir / name / config / f'{split}.jsonl', kind, 12, rng)
        files = ''.join(f'  - split: {split}\n    path: {config}/{split}.jsonl\n'
                        for split in splits)
        (data_dir / name / 'README.md').write_text(
            f'---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n')
    wiki = data_dir / 'Salesforce/wikitext'
    wiki.mkdir(parents=True)
    lines = [rng.choice(SENTENCES) for _ in range(60)]
    (wiki / 'test.jsonl').write_text(''.join(json.dumps({'text': s}) + '\n' for s in lines))
    (wiki / 'README.md').write_text(
        '---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: test\n'
        '    path: test.jsonl\n---\n')
    return '\n\n'.join(lines)


def test_data_sets_from_a_folder_and_one_line_for_each_that_is_missing(copy, tmp_path):
    text = hub_layout(tmp_path / 'data')
    own = tmp_path / 'tasks'
    own.mkdir()
    for name, file in (('arc_easy', 'arc/arc_easy'), ('piqa', 'piqa/piqa'),
                       ('humaneval', 'humaneval/humaneval')):
        (own / f'{name}.yaml').write_text(f'include: {THEIRS / file}.yaml\n')
    with open(own / 'humaneval.yaml', 'a') as f:                   # block_size is but 512
        f.write('generation_kwargs: {until: ["\\n", "\\r", "\\0"], do_sample: false, '
                'max_gen_toks: 40}\n')
    args = (copy, '--tasks=piqa,arc_easy,humaneval,wikitext2', f'--data_dir={tmp_path / "data"}',
            '--lengths=64,400', f'--include_path={own}')
    done = run('eval.py', *args)
    left_out = [line for line in done.stderr.splitlines() if 'is left out' in line]
    assert done.returncode == 1 and len(left_out) == 2, done.stderr
    assert 'piqa' in left_out[0] and str(tmp_path / 'data/baber/piqa') in left_out[0]
    assert 'humaneval' in left_out[1] and '--allow_code_execution' in left_out[1]
    assert '| arc_easy | 0 | 12 | acc_norm |' in done.stdout and 'humaneval' not in done.stdout
    model, _ = load_model(copy)                                    # the perplexity in float64
    ids = torch.tensor(get_tokenizer(SHAPE.vocab_size).encode_ordinary(text))
    model.double()
    for T in (64, 400):
        windows = [ids[a:a + T + 1] for a in range(0, len(ids) - 1, T)]
        nll = torch.cat([-model(w[None, :-1])[0][0].log_softmax(-1).gather(1, w[1:, None])
                         for w in windows]).mean().item()
        found = scores(copy, 'wikitext2')[f'wikitext2_{T}']
        assert found['perplexity'] == pytest.approx(math.exp(nll), rel=1e-4)
        assert found['bits_per_byte'] == pytest.approx(
            nll * len(ids) / math.log(2) / len(text.encode()), rel=1e-4)
        assert found['word_perplexity'] == pytest.approx(
            math.exp(nll * len(ids) / len(text.split())), rel=1e-3)
    done = run('eval.py', copy, '--tasks=humaneval', '--allow_code_execution', *args[2:])
    assert done.returncode == 0, done.stderr
    assert '| humaneval | 0 | 12 | pass@1,create_test | 33.33 |' in done.stdout
    assert 'arc_easy' not in done.stdout                           # though its scores are kept
    assert '| arc_easy |' in (copy / 'step_0.eval.md').read_text()


def test_the_papers_tasks_are_lm_evals():
    index = TaskManager().task_index

    def leaves(name):
        """The YAMLs of a task, or of all in a group or under a tag."""
        entry = index[name]
        if entry.kind.name == 'TASK':
            return [load_yaml(entry.yaml_path, resolve_func=False)]
        children = entry.tags if entry.kind.name == 'TAG' else \
            load_yaml(entry.yaml_path, resolve_func=False)['task']
        return [leaf for child in children for leaf in leaves(child)]

    sizes = {'bbh': 27, 'mmlu': 57, 'minerva_math': 7, 'cmmlu': 67, 'ceval-valid': 52}
    assert len(script.PAPER) == 13
    for name, (shots, metric, *_) in script.PAPER.items():
        what, _, kind = metric.partition(',')
        found = leaves(name)
        assert len(found) == sizes.get(name, 1), name
        if name in sizes:                                          # it is the group's metric too
            group = load_yaml(index[name].yaml_path, resolve_func=False)
            assert what in [m['metric'] for m in group['aggregate_metric_list']], name
        for config in found:
            metrics = ' '.join(str(m['metric']) for m in config['metric_list']).split()
            # the function utils.pass_at_k names its metric pass@1
            assert what in metrics or any(what.replace('@1', '_at_k') in m for m in metrics), name
            assert kind in ([f['name'] for f in config.get('filter_list', ())] or ['none']), name
            # a number of examples in the YAML is the paper's but for gsm8k, where it is 5; a zero
            # could not be changed
            assert config.get('num_fewshot') in (None, 5 if name == 'gsm8k' else shots), name
            samples = (config.get('fewshot_config') or {}).get('samples')
            if shots:
                assert not isinstance(samples, list) or len(samples) >= shots, name
                assert samples or config.get('fewshot_split') or config.get('training_split'), name


def test_a_yaml_that_cannot_be_read_is_named(copy, tmp_path):
    (tmp_path / 'mine.yaml').write_text('task: mine\n  dataset_path: json\n')
    line = refused(run('eval.py', copy, '--tasks=mine', f'--include_path={tmp_path}'))
    assert f'mine: {tmp_path}/mine.yaml cannot be read' in line
    (tmp_path / 'mine.yaml').write_text('task: mine\n')
    (tmp_path / 'five.yaml').write_text('task: 5\n')              # which lm-eval cannot sort
    line = refused(run('eval.py', copy, '--tasks=mine', f'--include_path={tmp_path}'))
    assert f'include_path={tmp_path}: lm-eval cannot read its YAML files: ' in line


def test_sympy_runs_no_answer_as_python_unless_that_is_allowed(tmp_path):
    from sympy.parsing import sympy_parser
    answer = f'open({str(tmp_path / "x")!r},"w").close()'
    with harness.no_parse_expr(False), pytest.raises(ValueError, match='allow_code_execution'):
        sympy_parser.parse_expr(answer)
    assert not (tmp_path / 'x').exists()
    with harness.no_parse_expr(True):
        assert sympy_parser.parse_expr('1 + 1') == 2
        sympy_parser.parse_expr(answer)
    assert (tmp_path / 'x').exists()                               # so it was no idle fear


@pytest.mark.parametrize('args, why', [
    (['--tasks=my_arc,no_such_task'], 'no_such_task'), (['--tasks=my_arc', '--limit=-1'], 'limit'),
    (['--tasks=my_arc', '--num_fewshot=-2'], 'num_fewshot'), (['--limit=3'], '--tasks'),
    (['--lengths=a'], 'lengths'),
    (['--tasks=my_arc', '--include_path=/no/such'], 'include_path'),
    (['--tasks=my_arc', '--dtype=int8'], 'dtype'), (['--batch_tokens=0'], 'batch_tokens'),
    (['--tasks=my_arc', '--device=nope'], 'nope')])
def test_wrong_knobs_are_one_line(folder, copy, args, why):
    if '--tasks=my_arc,no_such_task' in args:
        args = [*args, f'--include_path={folder / "tasks"}']
    assert why in refused(run('eval.py', copy, *args))
    assert not (copy / 'step_0.eval.json').exists()


@pytest.mark.parametrize('argv, says', [
    (['--model_args', 'pretrained=/none', '--tasks', 'arc_easy'], '/none does not exist'),
    (['--model_args', 'pretrained={copy},colour=red', '--tasks', 'arc_easy'], 'colour'),
    (['--tasks', 'arc_easy'], 'pretrained'),
    (['--model_args', 'pretrained={copy}', '--tasks', 'no_such_task'], 'no_such_task')])
def test_a_mistake_in_lm_evals_own_program_is_one_line(copy, argv, says):
    argv = [word.format(copy=copy) for word in argv]
    done = run('eval.py', 'lm_eval', 'run', '--model', 'xmodel', *argv)
    last = done.stderr.splitlines()[-1]                          # after what lm-eval logs
    assert done.returncode == 2 and last.startswith('eval.py: ') and says in last
    assert 'Traceback' not in done.stderr


def test_without_lm_eval_its_program_names_the_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'lm_eval.__main__', None)
    with pytest.raises(SystemExit):
        script.run_lm_eval()
    assert capsys.readouterr().err.endswith('is missing: pip install lm_eval\n')


def test_log_likelihoods_that_are_no_numbers_are_refused(folder):
    model, _ = load_model(folder / 'run')
    model.norm.weight.data.fill_(math.nan)
    x = torch.zeros(1, 1, model.config.n_embd)
    with pytest.raises(FloatingPointError, match='log-likelihoods are NaN'):
        harness.log_likelihoods(model, model.norm(x), [(0, 1, 0)])


def test_options_that_cannot_be_kept_are_refused():
    with pytest.raises(ValueError, match='generation_kwargs: num_beams is not known'):
        harness.sampling_of({'num_beams': 2, 'do_sample': False})
    with pytest.raises(ValueError, match='its metric bleu comes from the hub as a program'):
        harness.load_metric(True, 'bleu')
    other = SimpleNamespace(tokenizer=object.__new__(OtherTokenizer))
    with pytest.raises(NotImplementedError, match='chat template of another tokenizer'):
        harness.XmodelLM.apply_chat_template(other, [])


def test_a_folder_of_data_without_a_readme_says_so(tmp_path):
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own/a.jsonl').write_text('{"a": 1}\n')
    loader = harness.DatasetLoader(datasets.load_dataset, tmp_path)
    with pytest.raises(ValueError, match='own has no README.md, which names its parts'):
        loader('own', 'main')
    (tmp_path / 'own/README.md').write_text('---\nconfigs:\n- config_name: other\n---\n')
    with pytest.raises(ValueError, match='^(?!.*has no README)'):
        loader('own', 'main')


def test_lm_evals_own_program_that_is_stopped_is_one_line(monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt
    monkeypatch.setattr('lm_eval.__main__.cli_evaluate', stopped)
    monkeypatch.setattr(sys, 'argv', ['eval.py', 'lm_eval'])
    with pytest.raises(SystemExit) as e:
        script.run_lm_eval()
    assert (e.value.code, capsys.readouterr().err) == (130, 'eval.py: stopped\n')
