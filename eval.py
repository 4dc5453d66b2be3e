"""Score a checkpoint: on its own held-out text and sums, or on benchmarks by lm-evaluation-harness.

    python eval.py out/proxy20m                          # newest checkpoint of the run
    python eval.py out/proxy20m/step_1060.pt             # an earlier one: here, before decay
    python eval.py out/xmodel25 --tasks=paper --allow_code_execution        # the paper's 13 tasks
    python eval.py out/xmodel25 --tasks=arc_easy,wikitext2 --limit=100 --resume
    python eval.py lm_eval run --model xmodel --model_args pretrained=out/proxy20m --tasks arc_easy

Without --tasks no download is needed. Each data set of the run's mixture (of imported weights: each
in data_dir) gives the loss in nats a token, the perplexity and the bits a byte of its validation
split. The data set `arith` also holds problems that no training problem repeats (documents.py); so
may others (--problem_sets). The model decodes them greedily; one is solved if the number after
`####` is that of the written answer. The interval is Wilson's, at 95 %.

--tasks needs `pip install lm_eval` and is scored by lab/harness.py. It takes lm-eval's tasks and
groups, and two names of ours: `paper`, the 13 tasks, shots and metrics of the Xmodel-2.5 paper, and
`wikitext2`, the perplexity of WikiText-2's test text at each of --lengths. Data sets come from the
hub, or from data_dir/OWNER/NAME, a folder with the hub's layout. HumanEval and MBPP run programs
that the model wrote. They do so only with --allow_code_execution, and in lab/sandbox.py, which says
what it does not contain. The last command above is lm-eval's own program with our model added; it
runs such programs in its own way, without our sandbox.

Scores are kept beside the checkpoint: step_N.eval.json, and as a table step_N.eval.md. A task that
is scored again replaces its old scores. With --resume a task that was finished with the same
settings is not scored again. The exit code is 1 if a task was left out.
"""
import hashlib
import json
import math
import numbers
import os
import re
import sys
import zipfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from checkpoint import load_model, read_checkpoint, replace_file, to_json
from configurator import check_range, configure, fail, int_list, knob_values
from distributed import usable_device
from generate import complete, weights_dtype
from loader import get_windows, open_data
from processes import STOPPED, signals_as_ctrl_c
from tokenizer import EOS_ID, OtherTokenizer, tokenizer_of

checkpoint = 'out/proxy20m'   # a step_N.pt, or a run's folder: its newest checkpoint
data_dir = ''                 # where the data sets are; '': where training had them
device = 'cpu'                # or 'cuda', 'mps'
dtype = 'float32'             # 'auto' | 'bfloat16' | 'float32': of weights; fp32 is for tables
# --- held-out text and sums: without --tasks ---
eval_tokens = 50_000          # of each validation set, at most
problems = 400                # held-out problems, at most
problem_sets = ''             # SFT data sets with problems, with commas; '': arith, if it is there
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
# Held-out text and sums

def validation_loss(model, dataset, T):
    """(loss in nats a token, bits a byte) of windows of T tokens from the validation split.

    The windows hold some eval_tokens tokens, and are spread evenly over the split.
    """
    available = dataset.n_windows('val', T)
    n = min(available, max(1, eval_tokens // T))
    windows = [i * available // n for i in range(n)]
    total_loss = n_targets = 0
    for i in tqdm(range(0, n, batch_size), desc=dataset.name, leave=False, disable=None):
        x, y = get_windows(dataset, 'val', windows[i:i + batch_size], T)        # (B, T) each
        targets = int((y >= 0).sum())
        _, loss = model(x.to(device), y.to(device))
        total_loss += loss.item() * targets
        n_targets += targets
    loss = total_loss / n_targets
    val = dataset.meta['val']
    return loss, loss / math.log(2) * val['tokens'] / val['bytes']


def problems_of(dataset, tokenizer):
    """([(prompt, completion)], two lists of ids each; how many documents are left out).

    A problem is a held-out document with a prompt and a number after ####. Each prompt comes once.
    One for each worked answer comes first: the same calculation may occur with other names and
    things.
    """
    by_prompt, left_out = {}, 0
    for prompt, completion in dataset.pairs('val'):
        if prompt and answer(tokenizer.decode(completion)) is not None:
            by_prompt.setdefault(tuple(prompt), completion)
        else:
            left_out += 1
    by_answer = {tuple(completion): prompt for prompt, completion in by_prompt.items()}
    prompts = dict.fromkeys([*by_answer.values(), *by_prompt])           # those of by_answer first
    return [(list(prompt), by_prompt[prompt]) for prompt in prompts], left_out


def solve_problems(model, dataset, tokenizer):
    """{solved, tried, left_out, by_steps}: greedy answers to held-out problems, compared as numbers
    with the written ones. by_steps: {lines of the written answer before ####: [solved, tried]}."""
    found, left_out = problems_of(dataset, tokenizer)
    found = found[:problems]
    rows_at_a_time = 8 * batch_size
    by_steps = {}
    for i in tqdm(range(0, len(found), rows_at_a_time), desc='problems', leave=False, disable=None):
        batch = found[i:i + rows_at_a_time]
        prompts = [prompt for prompt, _ in batch]
        longest = max(len(completion) for _, completion in batch)
        rows = complete(model, tokenizer, prompts, 2 * longest, stop_ids=[EOS_ID], temperature=0.0)
        for (_, completion), row in zip(batch, rows):
            written = tokenizer.decode(completion)
            count = by_steps.setdefault(written.partition('####')[0].count('\n'), [0, 0])
            count[0] += answer(row.text) == answer(written)
            count[1] += 1
    return {'solved': sum(solved for solved, _ in by_steps.values()), 'tried': len(found),
            'left_out': left_out, 'by_steps': dict(sorted(by_steps.items()))}


ANSWER = re.compile(r"""
    \#\#\#\#[ \t]*
    (?P<sign>[-+−–]?)[ ]*
    [^\d\s.+−–√-]{0,3}[ ]*                      # a unit: $, €, US$
    (?P<sign_after_unit>[-+−–]?)
    (?P<number>(?:[1-9]\d{0,2}(?:,\d{3})+|\d{1,99})(?:\.\d{1,99})?|\.\d{1,99})
    (?:/(?P<below>\d{1,99}))?                   # a fraction
    # not what could be read in two ways: 1,23 1 1/2 1 000 1_000 1½ 1e3 2^3 10:30 3-4 1/-2
    (?! [.,']?\d | [^\S\n]\d | [½¼¾] | [eE][-+]?\d | [ ]*[-–+*x×^:_][ ]*\d | [ ]*/)
    """, re.VERBOSE)


def answer(text):
    """The number after the first #### of a worked solution, a Fraction; None if there is none.

    '#### $1,234.50 in all' is 2469/2.
    """
    match = ANSWER.search(text)
    if not match or (match['below'] and not int(match['below'])):
        return None
    number = Fraction(match['number'].replace(',', '')) / int(match['below'] or 1)
    signs = match['sign'] + match['sign_after_unit']
    return -number if set(signs) & set('-−–') else number


def data_sets_to_score(about):
    """Names of the data sets of a checkpoint's mixture, or, where it has none, of all in data_dir.

    ValueError if there are none at all.
    """
    names = list(about['knobs'].get('data', ()))
    if names:
        return names
    if not data_dir:
        raise ValueError(f'{about["path"]} names no data sets, as a checkpoint of train.py does; '
                         '--data_dir=FOLDER takes all in a folder')
    names = sorted(meta.parent.name for meta in Path(data_dir).glob('*/meta.json'))
    if not names:
        raise ValueError(f'{data_dir} has no folders of data sets, as data_prep.py writes them')
    return names


def sets_of_problems(data):
    """Names of the SFT data sets whose problems are to be solved: those of problem_sets or, by
    default, arith if it is there. ValueError for one that is none."""
    names = list(filter(None, map(str.strip, problem_sets.split(','))))
    sft = [name for name, dataset in data.items() if dataset.masks]            # where prompts end
    for name in names:
        if name not in sft:
            raise ValueError(f'problem_sets: {name!r} should be one of the SFT data sets: '
                             + (', '.join(sft) or 'there is none'))
    return names or [name for name in sft if name == 'arith']


def score_held_out(model, about, table):
    """Put the losses and the solved problems of a checkpoint's data sets into the table."""
    tokenizer = tokenizer_of(about)
    if isinstance(tokenizer, OtherTokenizer):
        raise ValueError(f'{about["path"]} has a tokenizer of its own, and the data sets ours; '  # noqa: TRY004
                         'but --tasks=NAMES can be scored')
    names = data_sets_to_score(about)
    folder = data_dir or about['knobs']['data_dir']
    data = open_data(folder, names, model.config.vocab_size)
    trained_on = about['knobs'].get('data', {})
    for name in names:
        if data[name].meta['train']['sha256'] != trained_on.get(name):
            print(f'eval.py: {folder}/{name} is not what {about["path"]} was trained on: what it '
                  'holds out may have been', file=sys.stderr)
    losses = {}
    with torch.no_grad():
        for name in names:
            loss, bits_per_byte = validation_loss(model, data[name], block_size)
            losses[name] = {'loss': loss, 'bits_per_byte': bits_per_byte,
                            'block_size': block_size, 'eval_tokens': eval_tokens, 'dtype': dtype}
    table['validation'] = losses
    table['problems'] = {}
    if problems:
        for name in sets_of_problems(data):
            table['problems'][name] = solve_problems(model, data[name], tokenizer)


# --------------------------------------------------------------------------------------------------
# lm-eval's tasks, by lab/harness.py, which needs packages that nothing else here needs

def run_tasks(wanted, about, table, save):
    """Score {task: shots or None} into table['tasks']; returns the names of tasks left out."""
    from lab import harness
    knobs = SimpleNamespace(**knob_values(globals()))
    return harness.run_tasks(wanted, about, table, save, knobs)


def run_lm_eval():
    """lm-eval's own program, `lm_eval ...`, which then also knows --model xmodel."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from lab import harness  # noqa: F401                      (importing it adds the model)
    except ModuleNotFoundError as e:
        fail(f'{e.name} is missing: pip install lm_eval')
    script = sys.argv.pop(0)                                       # it takes lm_eval for its name
    try:
        cli_evaluate()
    except (ValueError, TypeError, OSError) as e:                  # no hub, say
        sys.argv[0] = script                                       # which fail names
        fail(e)
    except KeyboardInterrupt:
        sys.argv[0] = script
        fail('stopped', STOPPED)


# --------------------------------------------------------------------------------------------------
# The table of scores

def perplexity(loss):
    """e^loss of a loss in nats, infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def wilson(k, n, z=1.96):
    """The 95 % interval of a proportion, of which k in n were seen (Wilson 1927)."""
    p = k / n
    d = 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def is_score(key, value):
    """Whether an entry of a task's results is a score: no standard error, and no setting."""
    metric, comma, _ = key.partition(',')
    if '_stderr' in metric:
        return False
    if comma:                                                      # lm-eval's 'METRIC,FILTER'
        return isinstance(value, numbers.Real)
    return isinstance(value, float)                                # wikitext2


def as_in_paper(name, entry):
    """Whether a task was scored with the paper's shots, on all of its questions."""
    settings = entry['settings']
    return name in PAPER and settings['shots'] == PAPER[name][0] and not settings['limit']


def rows_of_task(name, entry):
    """One task's rows, as in rows_of: one for each metric of each of its parts."""
    rows = []
    shots = '/'.join(map(str, sorted({part['shots'] for part in entry['parts'].values()})))
    for part, scores in (entry['scores'] or {}).items():
        comparable = part == name and as_in_paper(name, entry)     # a group's subject is not
        n = str(scores.get('sample_len', ''))
        if entry['settings']['limit']:
            n = f'first {n}'
        for key, value in scores.items():
            if not is_score(key, value):
                continue
            paper = None, None
            if comparable:
                _, paper_metric, *paper = PAPER[name]
                if key != paper_metric:
                    continue
            metric, _, kind = key.partition(',')
            error = scores.get(f'{metric}_stderr,{kind}')
            is_proportion = re.search('(^|_)(acc|exact_match|math_verify|pass)', metric)
            unit = 100 if is_proportion else 1                     # in per cent, as in the paper
            rows.append((part, shots, n, key.removesuffix(',none'), value * unit,
                         error * unit if isinstance(error, float) else None, *paper))
    return rows


def rows_of(table):
    """Rows (task, shots, questions, metric, score, standard error, the paper's two scores)."""
    rows, comparable = [], []
    for name, entry in table['tasks'].items():
        task_rows = rows_of_task(name, entry)
        rows += task_rows
        if as_in_paper(name, entry):
            comparable += [score for part, _, _, _, score, *_ in task_rows if part == name]
    if len(comparable) == len(PAPER):
        average = sum(comparable) / len(PAPER)
        rows.append(('average of the 13', '', '', '', average, None, PAPER_AVERAGE, None))
    return rows


def markdown_row(cells):
    return f'| {" | ".join(cells)} |'


def markdown(table):
    """The table of a checkpoint's scores, as text."""
    lines = [f'{table["checkpoint"]}: step {table["step"]:,}, {table["tokens"]:,} tokens', '']
    if table['validation']:
        lines.append(markdown_row(['data set', 'window', 'loss', 'perplexity', 'bits a byte']))
        lines.append(markdown_row(['---'] * 5))
        for name, scores in table['validation'].items():
            loss = scores['loss']
            lines.append(markdown_row([
                name, f'{scores["block_size"]}', f'{loss:.4f}', f'{perplexity(loss):.2f}',
                f'{scores["bits_per_byte"]:.4f}']))
        lines.append('')
    for name, scores in table['problems'].items():
        solved, tried = scores['solved'], scores['tried']
        line = f'{name}: no problems, that is, prompts with a number after #### in the answer'
        if tried:
            low, high = wilson(solved, tried)
            line = (f'{name}: {solved} of {tried} solved, {solved / tried:.1%}, '
                    f'95 % interval {low:.1%} to {high:.1%}')
        if scores['left_out']:
            line += f'; {scores["left_out"]} documents are no problems'
        lines += [line, '']
    rows = rows_of(table)
    if rows:
        head = ['task', 'shots', 'n', 'metric', 'score', 'std. error', 'Xmodel-2.5',
                'after stable 1']
        if all(row[-2:] == (None, None) for row in rows):          # nothing of the paper's
            head = head[:-2]
            rows = [row[:-2] for row in rows]
        lines.append(markdown_row(head))
        lines.append(markdown_row(['---'] * len(head)))
        for task, shots, n, metric, *scores in rows:
            digits = 4 if 'bits' in metric else 2
            cells = ['' if score is None else f'{score:.{digits}f}' for score in scores]
            lines.append(markdown_row([task, shots, n, metric, *cells]))
        lines.append('')
    return '\n'.join(lines)


def digest_of(path):
    """A hash of a checkpoint's content: of its tensors' checksums and of its own tokenizer."""
    with zipfile.ZipFile(path) as file:                            # torch.save writes a zip file
        checksums = sorted((entry.filename, entry.CRC) for entry in file.infolist())
    content = repr(checksums).encode()
    tokenizer = path.with_name('tokenizer.json')
    if tokenizer.exists():
        content += tokenizer.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def read_table(file, identity):
    """The table of scores in a file, or None if it has none of the checkpoint `identity`.

    With --resume it ends the program where scores would be lost.
    """
    try:
        kept = json.loads(file.read_text(encoding='utf-8'))
        if {key: kept[key] for key in identity} == identity:
            kept.setdefault('problems', {})                        # older ones have none
            markdown(kept)                                         # raises if the table is damaged
            return kept
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        if resume:
            fail(f'{file} is damaged; without --resume it is replaced')
        return None
    if resume:
        fail(f'{file} has scores of another {identity["checkpoint"]}; '
             'without --resume they are replaced')
    return None


def open_table(about):
    """(the table of a checkpoint's scores so far, a function that saves it)."""
    path = Path(about['path'])
    file = path.with_suffix('.eval.json')
    identity = {'checkpoint': path.name, 'step': about['step'], 'tokens': about['tokens'],
                'content': digest_of(path)}
    table = read_table(file, identity)
    if table is None:
        table = identity | {'validation': {}, 'problems': {}, 'tasks': {}}

    def save():
        try:
            content = to_json(table, indent=1, default=str).encode()
            replace_file(file, lambda f: f.write(content))
            replace_file(file.with_suffix('.md'), lambda f: f.write(markdown(table).encode()))
        except OSError as e:                                       # disk full, say
            fail(f'{e.filename or file}: {e.strerror}')
    return table, save


# --------------------------------------------------------------------------------------------------
# The script

def wanted_tasks():
    """{task: shots, or None for the task's own} of the knobs tasks and num_fewshot."""
    wanted = {}
    for name in map(str.strip, tasks.split(',')):
        if name == 'paper':
            wanted |= {task: shots for task, (shots, *_) in PAPER.items()}
        elif name:
            wanted.setdefault(name, None)
    if tasks and not wanted:
        fail(f'tasks={tasks!r} names none')
    if num_fewshot >= 0:
        wanted = dict.fromkeys(wanted, num_fewshot)
    return wanted


def check_knobs():
    """End the program in one line if a knob's value cannot be used."""
    check_range(globals(), 1, math.inf, 'eval_tokens', 'block_size', 'batch_size', 'batch_tokens')
    check_range(globals(), 0, math.inf, 'problems', 'limit')
    check_range(globals(), -1, math.inf, 'num_fewshot')
    int_list('lengths', lengths)
    if include_path and not Path(include_path).is_dir():
        fail(f'include_path={include_path}: there is no such folder')
    if not tasks and (include_path or limit or num_fewshot >= 0):
        fail('include_path, limit and num_fewshot are for --tasks=NAMES')


def of_this_call(table, wanted, left_out):
    """The table without scores that only earlier calls asked for, which the file keeps."""
    shown = dict(table)
    if wanted:
        shown |= {'validation': {}, 'problems': {}}
    shown['tasks'] = {name: entry for name, entry in table['tasks'].items()
                      if name in wanted and name not in left_out}
    return shown


def main():
    check_knobs()
    wanted = wanted_tasks()
    usable_device(device)
    try:
        about = read_checkpoint(checkpoint)
    except ValueError as e:
        fail(e)
    table, save = open_table(about)
    left_out = []
    try:
        if wanted:
            left_out = run_tasks(wanted, about, table, save)
        else:
            model, about = load_model(about, device)
            model.to(weights_dtype(dtype, device))
            score_held_out(model, about, table)
        save()
        print(markdown(of_this_call(table, wanted, left_out)), end='', flush=True)
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
        fail(f'{e.filename or "standard output"}: {e.strerror or e}')
    sys.exit(1 if left_out else 0)


if __name__ == '__main__':
    if sys.argv[1:2] in (['lm_eval'], ['lm-eval']):
        run_lm_eval()
        sys.exit()
    configure(globals(), positional=['checkpoint'])
    try:
        with signals_as_ctrl_c():
            main()
    except KeyboardInterrupt:
        fail('stopped; with --tasks, --resume keeps the scores of finished ones', STOPPED)
