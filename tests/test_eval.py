"""eval.py's own scores and its table, beside float64 and what is known."""
import errno
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, refused, run

import eval as script
from checkpoint import load_model
from lab import harness
from loader import get_windows, open_data
from tokenizer import get_tokenizer


def test_the_validation_loss_is_that_of_float64(tiny_run, data_dir, monkeypatch):
    monkeypatch.setattr(script, 'eval_tokens', 640)
    data = open_data(data_dir, ['arith'], 512)['arith']
    model, _ = load_model(tiny_run)
    with torch.no_grad():
        loss, bits = script.validation_loss(model, data, 64)
        there = data.n_windows('val', 64)
        x, y = get_windows(data, 'val', [i * there // 10 for i in range(10)], 64)
        logprobs = model.double()(x)[0].log_softmax(-1)
        right = -logprobs[y >= 0].gather(1, y[y >= 0][:, None]).mean().item()
    val = data.meta['val']
    assert loss == pytest.approx(right, rel=1e-5)
    assert bits == pytest.approx(right / math.log(2) * val['tokens'] / val['bytes'], rel=1e-5)


def test_a_sum_is_solved_by_the_number_after_the_signs_alone(data_dir, monkeypatch):
    data = open_data(data_dir, ['arith'], 512)['arith']
    tokenizer = script.tokenizer_of({'path': 'none', 'config': SimpleNamespace(vocab_size=512)})
    written = {tuple(prompt): tokenizer.decode(worked) for prompt, worked in data.pairs('val')}
    says = {}

    def fake(model, tokenizer, prompts, max_new_tokens, **how):
        for prompt in prompts:
            right = written[tuple(prompt)]
            number = right.partition('#### ')[2].partition('<')[0].strip()
            kind = len(says) % 4
            says[tuple(prompt)] = (right, f'#### {int(number) + 1}', number,
                                   f'#### {number} and so #### 99')[kind]
        return [SimpleNamespace(text=says[tuple(prompt)]) for prompt in prompts]

    monkeypatch.setattr(script, 'complete', fake)
    monkeypatch.setattr(script, 'problems', 40)
    scores = script.solve_problems(None, data, tokenizer)
    by_steps = scores.pop('by_steps')
    assert scores == {'solved': 20, 'tried': 40, 'left_out': 0} and len(says) == 40
    asked = [text.partition('####')[0].count('=') for text in map(written.get, says)]
    assert {n: tried for n, (_, tried) in by_steps.items()} == Counter(asked)
    assert sum(solved for solved, _ in by_steps.values()) == 20
    assert script.answer('#### -3') == -3 and script.answer('### 3') is None


def test_a_sum_may_take_twice_the_tokens_of_the_longest_written_answer(data_dir, monkeypatch):
    data = open_data(data_dir, ['arith'], 512)['arith']
    tokenizer = script.tokenizer_of({'path': 'none', 'config': SimpleNamespace(vocab_size=512)})
    written = {tuple(prompt): worked for prompt, worked in data.pairs('val')}
    filler, = tokenizer.encode_ordinary('.')
    longest = []                                                   # of each batch

    def fake(model, prompts, max_new_tokens, done, **how):
        longest.append(max(len(written[tuple(prompt)]) for prompt in prompts))
        says = []
        for i, prompt in enumerate(prompts):
            *answer, end = written[tuple(prompt)]
            # as written; its last token the last that is allowed; and one token too late
            n_filler = (0, 2 * longest[-1] - len(answer), 2 * longest[-1] - len(answer) + 1)[i % 3]
            says.append([filler] * n_filler + answer + [end] * max_new_tokens)
        for tokens in list(zip(*says))[:max_new_tokens]:
            yield torch.tensor(tokens), torch.zeros(len(tokens))
            if done.all():
                return

    monkeypatch.setattr('generate.generate', fake)
    monkeypatch.setattr(script, 'problems', 24)
    monkeypatch.setattr(script, 'batch_size', 1)                   # 8 problems at a time
    model = SimpleNamespace(embed=SimpleNamespace(weight=torch.zeros(1)))
    scores = script.solve_problems(model, data, tokenizer)
    assert (scores['solved'], scores['tried']) == (3 * 6, 24)      # of 8 two are too late
    assert len(longest) == 3 and len(set(longest)) > 1


def test_each_question_is_asked_once_and_a_calculation_in_other_words_after_the_others(monkeypatch):
    tokenizer = get_tokenizer(512)
    documents = [('Tom has 1 pen and gets 1.', '1 + 1 = 2\n#### 2'),
                 ('Ann has 1 coin and gets 1.', '1 + 1 = 2\n#### 2'),
                 ('Ben has 2 pens and gets 1.', '2 + 1 = 3\n#### 3'),
                 ('Ben has 2 pens and gets 1.', '2 + 1 = 3\n#### 3'),
                 ('Ben has 2 pens and gets 1.', '1 + 2 = 3\n#### 3'),
                 ('', '#### 5'), ('Who?', 'Tom.'), ('Why?', '#### because')]
    pairs = [tuple(map(tokenizer.encode_ordinary, document)) for document in documents]
    data = SimpleNamespace(pairs={'val': pairs}.get)
    asked = []

    def fake(model, tokenizer, prompts, *rest, **how):
        asked.extend(map(tokenizer.decode, prompts))
        return [SimpleNamespace(text='#### 2')] * len(prompts)
    monkeypatch.setattr(script, 'complete', fake)
    assert script.solve_problems(None, data, tokenizer) == \
        {'solved': 2, 'tried': 3, 'left_out': 3, 'by_steps': {1: [2, 3]}}
    assert [words[:3] for words in asked] == ['Ann', 'Ben', 'Tom']
    monkeypatch.setattr(script, 'problems', 2)
    assert script.solve_problems(None, data, tokenizer)['tried'] == 2 and len(asked) == 5


@pytest.mark.parametrize('text, number', [
    ('1,234', 1234), ('1,999', 1999), ('3.50', 3.5), ('3.75', 3.75), ('.5', 0.5), ('7.', 7),
    ('1/2', 0.5), ('2/4', 0.5), ('3/4', 0.75), ('$12', 12), ('-$12', -12), ('$-12', -12),
    ('US$ 12', 12), ('12 apples', 12), ('50%', 50), ('12,345,678.5', 12345678.5), ('0012', 12),
    ('-3', -3), ('\u22123', -3), ('+3', 3), ('5 and so #### 99', 5),
    # nothing, or what can be read in two ways
    ('\t5', 5), ('10.', 10), ('3)', 3), ('5-', 5), ('12 x', 12), ('5, 6', 5), ('3.5.', 3.5),
    ('–5', -5), ('-.5', -0.5), ('1,234,567', 1234567), ('7\n8', 7), ('12.', 12),
    ('0,500', None), ('1\u00a0234', None), ("1'234", None), ('0x10', None), ('√2', None),
    ('3 + 4', None), ('1/-2', None), ('9' * 5000, None),
    ('1 000', None), ('1 234 567', None), ('1_000', None), ('1e3', None), ('1.5e-3', None),
    ('3 x 10^4', None), ('1½', None), ('2^3', None), ('10:30', None), ('3-4', None), ('3*4', None),
    ('x', None), ('', None), ('1,23', None), ('1 1/2', None), ('1/0', None), ('12 / 4', None),
    ('1234,567', None), ('\n7', None)])
def test_an_answer_is_a_number(text, number):
    assert script.answer(f'5 + 5 = 10\n#### {text}') == number
    assert script.answer(f'5 + 5 = 10\n### {text}') is None or '####' in text


def test_other_sft_data_are_scored_by_name(monkeypatch):
    data = {name: SimpleNamespace(masks=masks) for name, masks in
            (('stdlib', {}), ('arith', {'val': 1}), ('gsm', {'val': 1}))}
    assert script.sets_of_problems(data) == ['arith']
    assert script.sets_of_problems({'stdlib': data['stdlib'], 'gsm': data['gsm']}) == []
    monkeypatch.setattr(script, 'problem_sets', 'gsm, arith')
    assert script.sets_of_problems(data) == ['gsm', 'arith']
    for name in ('stdlib', 'none'):
        monkeypatch.setattr(script, 'problem_sets', name)
        with pytest.raises(ValueError, match=f"'{name}' should be one of .*arith, gsm"):
            script.sets_of_problems(data)


@pytest.mark.parametrize('k, n', [(0, 10), (10, 10), (209, 400), (1, 3)])
def test_wilsons_interval_has_the_shares_whose_deviation_is_196(k, n):
    for p in script.wilson(k, n):
        if 0 < p < 1:
            assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n))
    low, high = script.wilson(k, n)
    assert low <= k / n <= high and (low == pytest.approx(0, abs=1e-12)) == (k == 0)


def test_the_papers_columns_stand_beside_its_own_settings_alone():
    def entry(name, i, limit=0, **changed):
        shots, metric, *_ = script.PAPER[name]
        what, _, kind = metric.partition(',')
        found = {'shots': shots, metric: i / 100, f'{what}_stderr,{kind}': 0.01, 'sample_len': 50,
                 'other,none': 0.5} | changed
        groups = {name: found, 'a_part_of_it': found}
        return {'settings': {'shots': found['shots'], 'limit': limit}, 'parts': {name: found},
                'scores': groups}

    table = {'tasks': {name: entry(name, i) for i, name in enumerate(script.PAPER, 1)}}
    rows = script.rows_of(table)
    whole = {row[0]: row for row in rows if row[0] in script.PAPER}
    assert whole['arc_challenge'] == \
        ('arc_challenge', '25', '50', 'acc_norm', 1.0, 1.0, 46.16, 30.63)
    assert whole['gsm8k'][3:] == ('exact_match,strict-match', 8.0, 1.0, 56.56, 1.59)
    # as the paper has them: the released model's score, and that at the end of stable 1
    assert {name: row[-2:] for name, row in whole.items()} == {
        'arc_challenge': (46.16, 30.63), 'arc_easy': (None, 60.06), 'piqa': (None, 70.35),
        'hellaswag': (None, 55.19), 'winogrande': (None, 59.59), 'bbh': (None, 26.23),
        'mmlu': (49.98, 26.28), 'gsm8k': (56.56, 1.59), 'minerva_math': (None, None),
        'humaneval': (None, 0.0), 'mbpp': (None, 5.4), 'cmmlu': (44.29, 24.88),
        'ceval-valid': (43.16, 27.64)}
    parts = [row[-2:] for row in rows if row[0] == 'a_part_of_it']
    assert len(parts) >= 13 and set(parts) == {(None, None)}
    assert rows[-1] == ('average of the 13', '', '', '', pytest.approx(7.0), None, 52.49, None)
    table['tasks']['arc_easy'] = entry('arc_easy', 2, shots=0)     # no longer the paper's
    table['tasks']['piqa'] = entry('piqa', 3, limit=50)
    rows = script.rows_of(table)
    assert rows[-1][0] != 'average of the 13'
    assert {row[-2:] for row in rows if row[0] in ('arc_easy', 'piqa')} == {(None, None)}
    assert {row[2] for row in rows if row[0] == 'piqa'} == {'first 50'}
    # the others keep theirs
    assert {row[0]: row[-2:] for row in rows if row[0] in ('arc_challenge', 'hellaswag')
            and row[-2:] != (None, None)} == {'arc_challenge': (46.16, 30.63),
                                              'hellaswag': (None, 55.19)}


def test_the_papers_shots_are_kept_beside_a_tasks_name(tiny_run, monkeypatch, tmp_path):
    wanted = []
    monkeypatch.setattr(script, 'run_tasks', lambda names, *rest: wanted.append(names))
    monkeypatch.setattr(script, 'checkpoint', str(tiny_run))
    for tasks in ('paper,arc_easy,swag', 'arc_easy,swag,paper'):
        monkeypatch.setattr(script, 'tasks', tasks)
        with pytest.raises(SystemExit):
            script.main()
    assert wanted[0] == wanted[1] == {n: p[0] for n, p in script.PAPER.items()} | {'swag': None}
    for shots in (0, 2):                                           # but for a number of one's own
        monkeypatch.setattr(script, 'num_fewshot', shots)
        with pytest.raises(SystemExit):
            script.main()
        assert wanted[-1] == dict.fromkeys(wanted[0], shots)


def test_some_windows_of_wikitext_stand_for_all_its_words_and_bytes(tiny_run, monkeypatch):
    lines = [line for text in sorted(topics.values()) for line in text.splitlines()][:400]
    text, model = '\n\n'.join(lines), load_model(tiny_run)[0]
    hub = SimpleNamespace(load_dataset=lambda *args, **knobs: {'text': lines})
    monkeypatch.setattr(harness, 'datasets', hub)
    lm = SimpleNamespace(model=model, tokenizer=get_tokenizer(512))
    knobs = SimpleNamespace(limit=3, lengths='64', device='cpu')
    found = harness.wikitext2(lm, knobs)['wikitext2_64']
    ids = torch.tensor(get_tokenizer(512).encode_ordinary(text))
    x, y = ids[:192].view(3, 64), ids[1:193].view(3, 64)
    with torch.no_grad():
        logprobs = model.double()(x)[0].log_softmax(-1)
    nll = -logprobs.gather(2, y[:, :, None]).mean().item()        # nats a token
    assert found['sample_len'] == 192 and len(ids) > 5000
    assert found['perplexity'] == pytest.approx(math.exp(nll), rel=1e-5)
    # of a word or a byte: by how many tokens it has on average in the whole text
    assert found['word_perplexity'] == pytest.approx(
        math.exp(nll * len(ids) / len(text.split())), rel=1e-4)
    assert found['bits_per_byte'] == pytest.approx(
        nll / math.log(2) * len(ids) / len(text.encode()), rel=1e-5)


def test_scores_of_other_weights_are_not_kept(tiny_run, tmp_path):
    checkpoint = torch.load(tiny_run / 'step_20.pt', weights_only=True)

    def table():
        torch.save(checkpoint, tmp_path / 'step_20.pt')
        return script.open_table(script.read_checkpoint(tmp_path))

    first, save = table()
    first['tasks']['mine'] = {'settings': {'limit': 0, 'shots': None}, 'parts': {}, 'scores': {}}
    save()
    assert table()[0] == first                                     # though the file is a new one
    checkpoint['model']['blocks.1.ffn.down.weight'][3, 4] += 1e-3
    assert not table()[0]['tasks']


def test_scores_with_another_tokenizer_are_not_kept(tiny_run, tmp_path):
    shutil.copy(tiny_run / 'step_20.pt', tmp_path)

    def table(tokenizer):
        (tmp_path / 'tokenizer.json').write_text(tokenizer)
        return script.open_table(script.read_checkpoint(tmp_path))

    first, save = table('one')
    first['tasks']['mine'] = {'settings': {'limit': 0, 'shots': None}, 'parts': {}, 'scores': {}}
    save()
    assert table('one')[0] == first and not table('another')[0]['tasks']


def one_line(capsys, work, *args):
    """What a call that ends the program as a user's mistake does has told."""
    with pytest.raises(SystemExit) as e:
        work(*args)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count('\n') == 1
    return error


def test_a_table_that_cannot_be_gone_on_from_is_refused_or_replaced(tiny_run, tmp_path, monkeypatch,
                                                                    capsys):
    shutil.copy(tiny_run / 'step_20.pt', tmp_path)
    about, file = script.read_checkpoint(tmp_path), tmp_path / 'step_20.eval.json'
    table, save = script.open_table(about)
    save()
    for text, says in (('{', 'is damaged'), ('{"checkpoint": "step_20.pt"}', 'is damaged'),
                       ('[]', 'is damaged'),
                       (file.read_text().replace('"step": 20', '"step": 19'), 'has scores of')):
        file.write_text(text)
        monkeypatch.setattr(script, 'resume', True)
        assert says in one_line(capsys, script.open_table, about)
        assert file.read_text() == text                          # it is still there
        monkeypatch.setattr(script, 'resume', False)
        assert script.open_table(about)[0] == table              # a fresh one


def test_a_full_disk_under_the_table_is_one_line(tiny_run, tmp_path, monkeypatch, capsys):
    shutil.copy(tiny_run / 'step_20.pt', tmp_path)
    _, save = script.open_table(script.read_checkpoint(tmp_path))

    def full(file, write):
        raise OSError(errno.ENOSPC, 'No space left on device', file)
    monkeypatch.setattr(script, 'replace_file', full)
    assert 'step_20.eval.json: No space left on device' in one_line(capsys, save)


@pytest.mark.parametrize('error, says', [
    (FloatingPointError('losses are not finite'), 'step_20.pt: losses are not finite'),
    (ModuleNotFoundError(name='lm_eval'), 'lm_eval is missing: pip install lm_eval')])
def test_what_ends_the_scoring_is_one_line(tiny_run, tmp_path, monkeypatch, capsys, error, says):
    shutil.copy(tiny_run / 'step_20.pt', tmp_path)
    monkeypatch.setattr(script, 'checkpoint', str(tmp_path))

    def score(*args):
        raise error
    monkeypatch.setattr(script, 'score_held_out', score)
    assert says in one_line(capsys, script.main)


def test_weights_that_are_ruined_have_no_scores(tiny_run, tmp_path):
    saved = torch.load(tiny_run / 'step_20.pt', weights_only=True)
    saved['model']['norm.weight'].fill_(math.nan)
    torch.save(saved, tmp_path / 'step_20.pt')
    line = refused(run('eval.py', tmp_path))
    assert 'step_20.pt: ' in line and 'not finite' in line


@pytest.mark.parametrize('args, says', [
    (['--tasks=,'], "tasks=',' names none"), (['--lengths=0'], 'lengths'),
    (['--include_path=/none'], 'there is no such folder'), (['--limit=3'], 'are for --tasks')])
def test_knobs_that_score_nothing_are_refused(tiny_run, args, says):
    assert says in refused(run('eval.py', tiny_run, *args))


def test_bare_weights_and_an_empty_folder_of_data_are_refused(tiny_run, tmp_path):
    saved = torch.load(tiny_run / 'step_20.pt', weights_only=True)
    torch.save({key: saved[key] for key in ('config', 'model')}, tmp_path / 'bare.pt')
    line = refused(run('eval.py', tmp_path / 'bare.pt', f'--data_dir={tmp_path}'))
    assert 'has no folders of data sets' in line


@pytest.mark.parametrize('target, code, says', [
    ('/dev/full', 2, 'eval.py: standard output: No space left on device\n'), ('a pipe', 0, '')])
def test_standard_output_that_takes_nothing(tiny_run, data_dir, tmp_path, target, code, says):
    shutil.copy(tiny_run / 'step_20.pt', tmp_path)
    if target == 'a pipe':                                       # whose reader is gone
        reader, output = os.pipe()
        os.close(reader)
    else:
        output = os.open(target, os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, ROOT / 'eval.py', tmp_path, '--problems=0', '--eval_tokens=64'],
        stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    os.close(output)
    assert (done.returncode, done.stderr) == (code, says)


def test_data_that_a_run_was_not_trained_on_are_told(tiny_run, data_dir, tmp_path):
    shutil.copy(tiny_run / 'step_20.pt', tmp_path)
    args = (tmp_path, '--problems=0', '--eval_tokens=64')
    assert run('eval.py', *args).stderr == ''
    shutil.copytree(data_dir, tmp_path / 'data')
    done = run('data_prep.py', 'arith', '--num_docs=500', '--vocab_size=512', '--overwrite',
               f'--out_dir={tmp_path}/data/arith')
    assert done.returncode == 0, done.stderr
    done = run('eval.py', *args, f'--data_dir={tmp_path}/data')
    assert done.returncode == 0 and done.stderr.count('\n') == 1
    assert f'{tmp_path}/data/arith is not what {tmp_path}/step_20.pt was trained on' in done.stderr
