"""Score a checkpoint: on its own held-out text and sums, or on benchmarks by lm-evaluation-harness.

    python eval.py out/proxy20m                          # newest checkpoint of the run
    python eval.py out/proxy20m/step_800.pt              # an earlier one: here, before decay
    python eval.py out/xmodel25 --tasks=paper --allow_code_execution        # the paper's 13 tasks
    python eval.py out/xmodel25 --tasks=arc_easy,wikitext2 --limit=100 --resume
    python eval.py lm_eval run --model xmodel --model_args pretrained=out/proxy20m --tasks arc_easy

By default what the machine has: loss (nats a token), perplexity and bits a byte of each data set of
the run's mixture, or, of imported weights, of each in data_dir; and the held-out problems of the
data set `arith` (disjoint from the training problems, see data_prep.py), decoded greedily, solved
if the number after `####` is the answer. The interval is Wilson's, at 95 %.

--tasks wants `pip install lm_eval`, and takes any of its tasks and groups (the last command above
is lm-eval's own, with our model beside its others), or `wikitext2`: the perplexity of WikiText-2's
test text, its lines joined, in windows that follow one another and do not overlap, at each of
--lengths. `paper` is the 13 tasks, shots and metrics of Xmodel-2.5's paper. Data sets come from the
hub, or from data_dir/OWNER/NAME, a folder laid out as there. HumanEval and MBPP run what the model
wrote: only with --allow_code_execution, and in sandbox.py, which says what that does not contain.
(lm-eval's own command runs it in its own way, without that.)

Scores are kept beside the checkpoint, in step_N.eval.json and as a table in step_N.eval.md: of each
task the last ones. With --resume those that are finished, in the same settings, are not made again.
The exit code is 1 where a task was left out.
"""
import contextlib
import difflib
import hashlib
import importlib.util
import json
import logging
import math
import numbers
import os
import random
import re
import sys
import zipfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load_model, read_checkpoint, replace_file, usable_device
from configurator import check_range, configure, fail, int_list
from data_prep import get_windows, open_data
from generate import complete
from tokenizer import EOS_ID, OtherTokenizer, tokenizer_of

checkpoint = 'out/proxy20m'   # a step_N.pt, or a run's folder: its newest checkpoint
data_dir = ''                 # where the data sets are; '': where training had them
device = 'cpu'                # or 'cuda', 'mps'
# --- what the machine has: without --tasks ---
eval_tokens = 50_000          # of each validation set, at most
problems = 400                # held-out arithmetic problems, at most
block_size = 512              # length of the validation windows
batch_size = 8                # windows, or 8 times as many problems (short ones), at a time
# --- lm-eval's tasks ---
tasks = ''                    # 'paper', or lm-eval's names and wikitext2, with commas
include_path = ''             # a folder of your own tasks' YAML files, for lm-eval
num_fewshot = -1              # worked examples before a question; -1: as the paper, or the task
limit = 0                     # questions of a task, or windows of wikitext2, at most; 0: all
lengths = '2048,4096,8192,16384'  # of wikitext2's windows, in tokens
batch_tokens = 8192           # tokens at a time in lm-eval's tasks
allow_code_execution = False  # let tasks run programs that the model wrote
resume = False                # keep the scores of tasks that are finished
dtype = 'float32'             # 'float32' | 'bfloat16': of weights

# task of lm-eval: shots, metric, Xmodel-2.5's score if its paper has it, and after stable 1
PAPER = {
    'arc_challenge': (25, 'acc_norm,none', 46.16, 30.63),
    'arc_easy': (25, 'acc_norm,none', None, 60.06),
    'piqa': (0, 'acc_norm,none', None, 70.35),
    'hellaswag': (10, 'acc_norm,none', None, 55.19),
    'winogrande': (5, 'acc,none', None, 59.59),
    'bbh': (3, 'exact_match,get-answer', None, 26.23),
    'mmlu': (5, 'acc,none', 49.98, 26.28),
    'gsm8k': (8, 'exact_match,strict-match', 56.56, 1.59),
    'minerva_math': (4, 'math_verify,none', None, None),
    'humaneval': (0, 'pass@1,create_test', None, 0.0),
    'mbpp': (3, 'pass_at_1,none', None, 5.4),
    'cmmlu': (5, 'acc_norm,none', 44.29, 24.88),
    'ceval-valid': (5, 'acc_norm,none', 43.16, 27.64),
}
PAPER_AVERAGE = 52.49


# --------------------------------------------------------------------------------------------------
# What the machine has

def validation_loss(model, dataset, T):
    """(loss in nats a token, bits a byte) over eval_tokens spread over the validation split."""
    there = dataset.n_windows('val', T)
    n = min(there, max(1, eval_tokens // T))
    windows = [i * there // n for i in range(n)]                  # spread over the split
    total = count = 0
    for i in tqdm(range(0, n, batch_size), desc=dataset.name, leave=False, disable=None):
        x, y = get_windows(dataset, 'val', windows[i:i + batch_size], T)
        targets = int((y >= 0).sum())
        total += model(x.to(device), y.to(device))[1].item() * targets
        count += targets
    val = dataset.meta['val']
    loss = total / count
    return loss, loss / math.log(2) * val['tokens'] / val['bytes']


def arithmetic(model, dataset, tokenizer):
    """(solved, tried): greedy answers to held-out problems against the written ones."""
    # each problem once, though the data tell some of them of other people and things, too
    pairs = {tuple(worked): (prompt, worked) for prompt, worked in dataset.pairs('val')}
    pairs = list(pairs.values())[:problems]
    solved, size = 0, 8 * batch_size
    for i in tqdm(range(0, len(pairs), size), desc='problems', leave=False, disable=None):
        batch = pairs[i:i + size]
        longest = max(len(completion) for _, completion in batch)
        rows = complete(model, tokenizer, [prompt for prompt, _ in batch], 2 * longest,
                        stop_ids=[EOS_ID], temperature=0.0)
        for (_, completion), row in zip(batch, rows):
            written, right = answer(row.text), answer(tokenizer.decode(completion))
            solved += written is not None and written == right
    return solved, len(pairs)


def answer(text):
    """What stands after the first #### of a worked solution, or None."""
    found = re.search(r'#### *(-?\d+)', text)
    return found and found[1]


def exp(loss):
    """The perplexity of a loss in nats, infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def wilson(k, n, z=1.96):
    """95 % interval of a share of which k in n were seen (Wilson 1927)."""
    p, d = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def score_here(model, about, table):
    """Put losses and solved problems of the checkpoint's own data sets into the table."""
    tokenizer = tokenizer_of(about)
    if isinstance(tokenizer, OtherTokenizer):
        raise ValueError(f'{about["path"]} has a tokenizer of its own, and the data sets ours; '  # noqa: TRY004
                         'but --tasks=NAMES can be scored')
    names = list(about['knobs'].get('data', ()))
    if not names and data_dir:                           # of imported weights: all that are there
        names = sorted(meta.parent.name for meta in Path(data_dir).glob('*/meta.json'))
        if not names:
            raise ValueError(f'{data_dir} has no folders of data sets, as data_prep.py writes them')
    if not names:
        raise ValueError(f'{about["path"]} names no data sets, as a checkpoint of train.py does; '
                         '--data_dir=FOLDER takes all in a folder')
    data = open_data(data_dir or about['knobs']['data_dir'], names, model.config.vocab_size)
    with torch.no_grad():
        table['validation'] = {
            name: dict(zip(('loss', 'bits_per_byte'),
                           validation_loss(model, data[name], block_size)))
            | {'block_size': block_size, 'eval_tokens': eval_tokens} for name in names}
    if problems and data.get('arith') and data['arith'].masks:     # which tell where prompts end
        solved, tried = arithmetic(model, data['arith'], tokenizer)
        table['arithmetic'] = {'solved': solved, 'tried': tried}


# --------------------------------------------------------------------------------------------------
# lm-eval's tasks

def load_dataset(load, hub, path, *args, **knobs):
    """datasets.load_dataset, but from data_dir where that has the folder `path`."""
    local = Path(hub['data_dir'], path)
    if local.is_dir() and not Path(path).exists():       # a task may also name a folder of its own
        try:
            return load(str(local), *args, **knobs)
        except Exception as e:
            if (local / 'README.md').exists():
                raise
            raise ValueError(f'{local} has no README.md, which names its parts: {e}') from e
    if hub['reached'] is None and path not in ('json', 'csv', 'text', 'parquet'):
        from huggingface_hub import constants, get_session
        try:                                   # once, as the library would try again and again
            get_session().head(constants.ENDPOINT, timeout=10)
            hub['reached'] = True
        except Exception:  # noqa: BLE001                          (of whatever HTTP library)
            hub['reached'] = False
            import datasets
            # what it has cached still loads
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return load(path, *args, **knobs)
    except Exception as e:
        if hub['reached'] is False:
            raise ValueError(f'its data set is missing: no {local} (--data_dir), and the hub '
                             'cannot be reached') from e
        raise


def code_eval(name, *args, **knobs):
    """What tasks get for evaluate.load('code_eval'), which runs programs in a mere fork of ours."""
    if name != 'code_eval':
        raise ValueError(f'its metric {name} comes from the hub as a program')
    if not allow_code_execution:
        raise ValueError('it runs programs that the model wrote: --allow_code_execution lets it '
                         '(what is not contained then: see sandbox.py)')
    from sandbox import CodeEval
    return CodeEval


def no_parse_expr():
    """Without parse_expr of sympy, by which some tasks grade answers: it runs them as Python."""
    if allow_code_execution or not importlib.util.find_spec('sympy'):
        return contextlib.nullcontext()
    return mock.patch('sympy.parsing.sympy_parser.parse_expr', side_effect=ValueError(
        'it runs answers as Python: --allow_code_execution lets it'))


def wikitext2(model, tokenizer):
    """{'wikitext2_T': perplexities a token and a word, bits a byte} of its test set at `lengths`.

    With a limit, of so many windows; their words and bytes are then taken to be a like share.
    """
    import datasets
    text = '\n\n'.join(datasets.load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1',
                                             split='test')['text'])     # as run_tasks patched it
    ids, found = torch.tensor(tokenizer.encode_ordinary(text)), {}
    for T in int_list('lengths', lengths):
        total = n = 0
        for a in tqdm(range(0, len(ids) - 1, T)[:limit or None], desc=f'wikitext2, {T} tokens',
                      leave=False, disable=None):
            window = ids[a:a + T + 1].to(device)
            x, y = window[None, :-1], window[None, 1:]                          # (1, T)
            with torch.no_grad():
                total += model(x, y)[1].item() * y.numel()
            n += y.numel()                                         # every token but the first
        share = n / len(ids)
        found[f'wikitext2_{T}'] = {
            'perplexity': exp(total / n),
            'word_perplexity': exp(total / (share * len(text.split()))),
            'bits_per_byte': total / math.log(2) / (share * len(text.encode())),
            'sample_len': n}
    return found


def score_task(lm, task, shots):
    """{metric: value} of one of lm-eval's tasks, as its simple_evaluate sets it up."""
    import lm_eval
    if shots is not None and task.get_config('num_fewshot') != 0:
        task.set_config(key='num_fewshot', value=shots)
    elif task.get_config('num_fewshot') is None:
        task.set_config(key='num_fewshot', value=0)
    task.set_fewshot_seed(seed=1234)
    random.seed(0)
    np.random.seed(1234)                                           # what tasks draw from
    torch.manual_seed(1234)
    lm.task = task.task_name
    found = lm_eval.evaluate(lm, {'tasks': {task.task_name: task}}, limit=limit or None,
                             bootstrap_iters=1000, log_samples=False,
                             confirm_run_unsafe_code=allow_code_execution)
    return {'shots': task.get_config('num_fewshot'), **found['results'][task.task_name]}


def find_tasks(names):
    """lm-eval's TaskManager that knows the names; ends the program in one line if there is none."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    knobs = {'include_path': include_path or None}
    try:
        manager = TaskManager(include_defaults=False, **knobs)
        missing = [name for name in names if name not in manager.all_tasks]
        for file in sorted(Path(include_path).rglob('*.yaml') if include_path and missing else ()):
            if any(name in file.read_text(errors='replace') for name in missing):
                try:                                     # lm-eval passes over those in silence
                    load_yaml(file, resolve_func=False)
                except Exception as e:  # noqa: BLE001   (of yaml, or of what it includes)
                    fail(f'tasks: {", ".join(missing)}: {file} cannot be read: {e}')
        if missing:
            manager = TaskManager(**knobs)                         # reading all takes 20 s
    except Exception as e:  # noqa: BLE001                         (a YAML may hold anything)
        fail(f'include_path={include_path}: lm-eval cannot read its YAML files: {e}')
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            fail(f'tasks: lm-eval has no task {name!r}' + (f', the nearest is {near[0]!r}'
                                                           if near else ''))
    return manager


def score_by_name(lm, manager, name, shots, entry, keep):
    """Fill the entry of a task, or group of tasks, and keep() it after each part."""
    if name == 'wikitext2':
        entry['scores'] = wikitext2(lm.model, lm.tokenizer)
        return keep()
    loaded = manager.load([name])
    for part, task in loaded['tasks'].items():
        if part not in entry['parts']:
            entry['parts'][part] = score_task(lm, task, shots)
            keep()
    groups = {group.name: group.aggregate(entry['parts'])
              for group in loaded['groups'].values() if group.has_aggregation}
    entry['scores'] = groups or entry['parts']
    keep()


def run_tasks(wanted, about, table, save):
    """Score the checkpoint on {task: shots or None} into table['tasks']; returns those left out."""
    import datasets

    from harness import XmodelLM
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    os.environ['DISABLE_MULTIPROC'] = '1'            # else lm-eval bootstraps in many processes
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    manager = find_tasks([name for name in wanted if name != 'wikitext2'])
    lm = XmodelLM(about, device, batch_tokens, dtype=dtype)
    hub = {'data_dir': data_dir or about['knobs'].get('data_dir', 'data'), 'reached': None}
    left_out = []
    with mock.patch('datasets.load_dataset', partial(load_dataset, datasets.load_dataset, hub)), \
            mock.patch('evaluate.load', code_eval), \
            mock.patch('lm_eval.api.task.tqdm', partial(tqdm, leave=False, disable=None)), \
            no_parse_expr():
        for name, shots in wanted.items():
            settings = {'shots': shots, 'limit': limit, 'dtype': dtype} | (
                {'lengths': lengths} if name == 'wikitext2' else {})
            entry = resume and table['tasks'].get(name) or {
                'settings': settings, 'parts': {}, 'scores': None}
            if entry['settings'] != settings:
                other = ', '.join(f'{key}={value}, now {settings[key]}'
                                  for key, value in entry['settings'].items()
                                  if value != settings[key])
                left_out.append(leave_out(name, f'its kept scores have {other}; without --resume '
                                                'they are replaced'))
            elif entry['scores']:
                print(f'eval.py: {name} is kept as it was scored before', file=sys.stderr)
            else:
                def keep(name=name, entry=entry):
                    table['tasks'][name] = entry
                    save()
                try:
                    score_by_name(lm, manager, name, shots, entry, keep)
                except Exception as e:  # noqa: BLE001             (a task's own code raises any)
                    left_out.append(leave_out(name, e))
    return left_out


def leave_out(name, error):
    """Say in one line why a task is left out; returns its name."""
    lines = str(error).splitlines() or [type(error).__name__]
    print(f'eval.py: {name} is left out: {lines[0][:300]}', file=sys.stderr)
    return name


def rows_of(table):
    """Rows (task, shots, questions, metric, score, standard error, the paper's two scores)."""
    rows, of_paper = [], []
    for name, entry in table['tasks'].items():
        shots, metric, final, early = PAPER.get(name, (None, None, None, None))
        settings = entry['settings']
        compared = name in PAPER and settings['shots'] == shots and not settings['limit']
        used = '/'.join(map(str, sorted({part['shots'] for part in entry['parts'].values()})))
        for part, scores in (entry['scores'] or {}).items():
            whole = compared and name == part                      # not a subject of it
            for key, value in scores.items():
                what, _, kind = key.partition(',')
                if '_stderr' in what or whole and key != metric or not (
                        isinstance(value, float) or ',' in key and isinstance(value, numbers.Real)):
                    continue
                error = scores.get(f'{what}_stderr,{kind}')
                # shares are told in per cent, as the paper does
                unit = 100 if re.search('(^|_)(acc|exact_match|math_verify|pass)', what) else 1
                n = str(scores.get('sample_len', ''))
                n = f'first {n}' if settings['limit'] else n
                rows.append((part, used, n, key.removesuffix(',none'), value * unit,
                             error * unit if isinstance(error, float) else None,
                             *((final, early) if whole else (None, None))))
                of_paper += [value * unit] if whole else []
    if len(of_paper) == len(PAPER):
        rows.append(('average of the 13', '', '', '', sum(of_paper) / len(PAPER), None,
                     PAPER_AVERAGE, None))
    return rows


def markdown(table):
    """The table of a checkpoint's scores."""
    lines = [f'{table["checkpoint"]}: step {table["step"]:,}, {table["tokens"]:,} tokens', '']
    if table['validation']:
        lines += ['| data set | window | loss | perplexity | bits a byte |',
                  '| --- | --- | --- | --- | --- |',
                  *(f'| {name} | {found["block_size"]} | {found["loss"]:.4f} | '
                    f'{exp(found["loss"]):.2f} | {found["bits_per_byte"]:.4f} |'
                    for name, found in table['validation'].items()), '']
    if table['arithmetic']:
        solved, tried = table['arithmetic']['solved'], table['arithmetic']['tried']
        low, high = wilson(solved, tried)
        lines += [f'arithmetic: {solved} of {tried} solved, {solved / tried:.1%}, 95 % interval '
                  + f'{low:.1%} to {high:.1%}', '']
    if rows := rows_of(table):
        head = ['task', 'shots', 'n', 'metric', 'score', 'std. error', 'Xmodel-2.5',
                'after stable 1']
        if all(row[-2:] == (None, None) for row in rows):
            head, rows = head[:-2], [row[:-2] for row in rows]
        lines += [f'| {" | ".join(head)} |', f'| {" | ".join("---" for _ in head)} |']
        for task, shots, n, metric, *numbers in rows:
            digits = 4 if 'bits' in metric else 2
            cells = ['' if number is None else f'{number:.{digits}f}' for number in numbers]
            lines.append(f'| {" | ".join([task, shots, n, metric, *cells])} |')
        lines.append('')
    return '\n'.join(lines)


# --------------------------------------------------------------------------------------------------
# The script

def plain(value):
    """What JSON has in place of a number of numpy's, or of anything else that it does not know."""
    return value.item() if isinstance(value, np.generic) else str(value)


def open_table(about):
    """(the table of scores kept so far, a function that saves it) of a checkpoint."""
    path = Path(about['path'])
    file = path.with_suffix('.eval.json')
    with zipfile.ZipFile(path) as parts:                           # torch.save's, with checksums
        sums = sorted((part.filename, part.CRC) for part in parts.infolist())
    own = path.with_name('tokenizer.json')
    digest = hashlib.sha256(repr(sums).encode() + (own.read_bytes() if own.exists() else b''))
    which = {'checkpoint': path.name, 'step': about['step'], 'tokens': about['tokens'],
             'content': digest.hexdigest()[:16]}
    table = which | {'validation': {}, 'arithmetic': None, 'tasks': {}}
    try:
        kept = json.loads(file.read_text(encoding='utf-8'))
        if {key: kept[key] for key in which} == which:
            markdown(kept)                                         # which raises if it is damaged
            table = kept
        elif resume:
            fail(f'{file} has scores of another {path.name}; without --resume they are replaced')
    except FileNotFoundError:
        pass
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        if resume:
            fail(f'{file} is damaged; without --resume it is replaced')

    def save():
        try:
            content = json.dumps(table, indent=1, default=plain).encode()
            replace_file(file, lambda f: f.write(content))
            replace_file(file.with_suffix('.md'), lambda f: f.write(markdown(table).encode()))
        except OSError as e:                                       # disk full, say
            fail(f'{e.filename or file}: {e.strerror}')
    return table, save


def main():
    check_range(globals(), 1, math.inf, 'eval_tokens', 'block_size', 'batch_size', 'batch_tokens')
    check_range(globals(), 0, math.inf, 'problems', 'limit')
    check_range(globals(), -1, math.inf, 'num_fewshot')
    int_list('lengths', lengths)
    if include_path and not Path(include_path).is_dir():
        fail(f'include_path={include_path}: there is no such folder')
    wanted = {}                                                    # task: shots, or None: its own
    for name in filter(None, map(str.strip, tasks.split(','))):
        if name == 'paper':
            wanted |= {n: p[0] for n, p in PAPER.items()}
        else:
            wanted.setdefault(name, None)
    if tasks and not wanted:
        fail(f'tasks={tasks!r} names none')
    if not tasks and (include_path or limit or num_fewshot >= 0):
        fail('include_path, limit and num_fewshot are for --tasks=NAMES')
    if num_fewshot >= 0:
        wanted = dict.fromkeys(wanted, num_fewshot)
    left_out = []
    usable_device(device)
    try:
        about = read_checkpoint(checkpoint)
    except ValueError as e:
        fail(e)
    table, save = open_table(about)
    try:
        if wanted:
            left_out = run_tasks(wanted, about, table, save)
        else:
            score_here(*load_model(about, device), table)
        save()
        # what was asked for; the file has all
        print(markdown(table | ({'validation': {}, 'arithmetic': None} if wanted else {}) | {
            'tasks': {name: entry for name, entry in table['tasks'].items()
                      if name in wanted and name not in left_out}}), end='', flush=True)
    except BrokenPipeError:
        pass
    except ValueError as e:
        fail(e)
    except FloatingPointError as e:
        fail(f'{about["path"]}: {e}')
    except ModuleNotFoundError as e:
        fail(f'{e.name} is missing: pip install lm_eval')
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)               # what is still to be flushed
        fail(f'{e.filename or "standard output"}: {e.strerror}')
    sys.exit(1 if left_out else 0)


if __name__ == '__main__':
    if sys.argv[1:2] == ['lm_eval']:
        try:
            from lm_eval.__main__ import cli_evaluate

            import harness  # noqa: F401                           (which registers the model)
        except ModuleNotFoundError as e:
            fail(f'{e.name} is missing: pip install lm_eval')
        sys.argv[:2] = ['lm_eval']
        try:
            cli_evaluate()
        except (ValueError, TypeError, OSError) as e:              # no hub, say
            fail(e, 'eval.py')
        sys.exit()
    configure(globals(), positional=['checkpoint'])
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('eval.py: stopped; --resume keeps the scores of finished tasks')
