"""Our model as lm-evaluation-harness (pip install lm_eval) sees it, and its tasks as we score them.

    python eval.py out/proxy20m --tasks=arc_easy                   # calls run_tasks below
    python eval.py lm_eval run --model xmodel --model_args pretrained=out/proxy20m --tasks arc_easy

lm-eval builds prompts and computes metrics. A model answers three kinds of requests: how likely a
continuation of a text is, how likely a whole text is, and which text comes next.

A multiple-choice question is almost all prompt, and its choices share that prompt. Often its first
part, the worked examples, is the same for many questions. So requests are sorted as token sequences
and neighbours that begin alike are put in a group. Their common prefix is read once, into a KV
cache. What differs follows as one row for each group: branches beside one another, each hidden
from the others by the attention mask.
"""
import contextlib
import difflib
import importlib.util
import logging
import math
import os
import random
import sys
from functools import partial
from itertools import groupby
from pathlib import Path
from unittest import mock

import datasets
import lm_eval
import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from checkpoint import load_model
from configurator import fail, int_list
from generate import KVCache, common_prefix, complete, weights_dtype
from lab.sandbox import CodeEval
from model import rope_angles
from tokenizer import CHAT_TEMPLATE, OtherTokenizer, chat_prompt, tokenizer_of

LONGEST_ROW = 1024            # tokens of a group's branches: attention costs their square


# --------------------------------------------------------------------------------------------------
# Log-likelihoods of many texts that begin alike

class Branch:
    """One distinct input: its ids, and the requests (number, continuation) that it ends with."""

    def __init__(self, ids, requests):
        self.ids, self.requests = ids, requests
        # the last `scored` positions predict continuations, and so have to be in the row
        self.scored = max(len(continuation) for _, continuation in requests)


def groups_of(branches):
    """Branches in groups [(prefix length, [branch, ...]), ...], with few tokens to read in all.

    In sorted order, a branch joins its neighbour's group if that saves a quarter of its tokens.
    Alone it costs len(ids). In the group it saves the tokens of the common prefix. But the group's
    prefix may become shorter for it, and each member then reads what was cut off.
    """
    groups, length, members = [], 0, []
    for branch in sorted(branches, key=lambda branch: branch.ids):
        longest_prefix = len(branch.ids) - branch.scored
        common = 0
        if members:
            common = min(length, longest_prefix, common_prefix(branch.ids, members[-1].ids))
        row_length = sum(len(b.ids) - common for b in (*members, branch))
        saved = common - (length - common) * (len(members) - 1)
        if saved > len(branch.ids) / 4 and row_length <= LONGEST_ROW:
            length = common
            members.append(branch)
        else:
            if members:
                groups.append((length, members))
            length, members = longest_prefix, [branch]
    groups.append((length, members))
    return groups


@torch.no_grad()
def score(model, groups):
    """{request's number: (log-likelihood in nats, is it the greedy text)} of groups_of's groups.

    A group is one row of two passes. The second reads the keys of the first. For the group of
    the branches A (two tokens) and B (one), beside a longer group, it reads

        keys:      prefix . . pad pad | A A B pad       (P columns and S columns)
        A's ids    1 1 1  0 0   0   0 | 1 0 0  0        what they attend to
                   1 1 1  0 0   0   0 | 1 1 0  0
        B's id     1 1 1  0 0   0   0 | 0 0 1  0        at the same position as A's first
    """
    G = len(groups)
    P = max(length for length, _ in groups)
    S = max(sum(len(branch.ids) - length for branch in members) for length, members in groups)
    prefix = torch.zeros(G, P, dtype=torch.long)                    # padded on the right
    ids = torch.zeros(G, S, dtype=torch.long)
    positions = torch.zeros(G, S, dtype=torch.long)
    branch_of = torch.full((G, S), -1)                              # -1: padding
    targets = []                               # (place in (G, S), next id, number of the request)
    for g, (length, members) in enumerate(groups):
        prefix[g, :length] = torch.tensor(members[0].ids[:length])
        begin = 0
        for i, branch in enumerate(members):
            rest = branch.ids[length:]
            end = begin + len(rest)
            ids[g, begin:end] = torch.tensor(rest)
            branch_of[g, begin:end] = i
            positions[g, begin:end] = length + torch.arange(len(rest))
            for number, continuation in branch.requests:
                first = g * S + end - len(continuation)
                targets += [(first + j, token, number) for j, token in enumerate(continuation)]
            begin = end
    device = model.embed.weight.device
    prefix_lengths = torch.tensor([length for length, _ in groups], device=device)
    x = hidden_states(model, prefix.to(device), prefix_lengths, ids.to(device),
                      positions.to(device), branch_of.to(device))
    return log_likelihoods(model, x, targets)


def hidden_states(model, prefix, prefix_lengths, ids, positions, branch_of):
    """What model.hidden gives, (G, S, C), for ids (G, S) after the prefixes (G, P).

    branch_of (G, S): tokens of one number see one another, and their group's prefix, alone.
    """
    c = model.config
    (G, P), S = prefix.shape, ids.size(1)
    caches = mask = None                       # without a prefix: a branch a row, and causal
    if P:
        columns = torch.arange(P + S, device=ids.device)
        caches = [KVCache(model, G, P + S) for _ in model.blocks]
        for cache in caches:
            cache.at, cache.seen = columns[:P], P
        model.hidden(prefix, *rope_angles(columns[:P], c.hd, c.rope_theta), caches)
        for cache in caches:
            cache.at, cache.seen = columns[P:], P + S
        in_prefix = columns[:P] < prefix_lengths[:, None]                       # (G, P)
        in_prefix = in_prefix[:, None].expand(G, S, P)
        in_branch = (branch_of[:, :, None] == branch_of[:, None]).tril()        # (G, S, S)
        mask = torch.cat((in_prefix, in_branch), -1)[:, None]                   # (G, 1, S, P + S)
    return model.hidden(ids, *rope_angles(positions, c.hd, c.rope_theta), caches, mask)


def log_likelihoods(model, x, targets):
    """{number: (log-likelihood, is it greedy)}, summed over targets (place, next id, number).

    x: (G, S, C). FloatingPointError if one is NaN.
    """
    device = x.device
    x = x.flatten(0, 1)                                                         # (G * S, C)
    place, token, number = torch.tensor(targets, device=device).T               # (n,) each
    max_logits = 2**28 if x.is_cuda else 2**24                     # 1 GB, or 64 MB, in fp32
    step = max(1, max_logits // model.config.vocab_size)
    sums = {}
    for chunk in torch.arange(len(targets), device=device).split(step):
        logits = model.logits(x[place[chunk]]).float()                          # (step, V)
        logprobs = logits.log_softmax(-1).gather(1, token[chunk, None])[:, 0]   # (step,)
        is_best = logits.argmax(-1) == token[chunk]                             # (step,)
        for i, logprob, best in zip(number[chunk].tolist(), logprobs.tolist(), is_best.tolist()):
            total, greedy = sums.get(i, (0.0, True))
            sums[i] = total + logprob, greedy and best
    if any(math.isnan(total) for total, _ in sums.values()):
        raise FloatingPointError('log-likelihoods are NaN: training ruined the weights')
    return sums


def lengths_of(group):
    """(length of a group's prefix, of its row)."""
    length, members = group
    return length, sum(len(branch.ids) - length for branch in members)


def next_batch(groups, batch_tokens):
    """How many of the first groups go into one batch of at most batch_tokens, padding included.

    At least one does.
    """
    longest = (0, 0)                                               # prefix, row
    for n, group in enumerate(groups):
        longest = tuple(map(max, longest, lengths_of(group)))
        if n > 0 and (n + 1) * sum(longest) > batch_tokens:
            return n
    return len(groups)


# --------------------------------------------------------------------------------------------------
# The model

def sampling_of(options):
    """The arguments of generate.complete that lm-eval's generation_kwargs ask for.

    ValueError names an option that is not supported.
    """
    supported = {'until', 'max_gen_toks', 'temperature', 'do_sample', 'top_k', 'top_p'}
    if options.get('num_beams') == 1:                              # greedy, or plain sampling
        supported.add('num_beams')
    unsupported = options.keys() - supported
    if unsupported:
        raise ValueError(f'generation_kwargs: {min(unsupported)} is not known here')
    temperature = options.get('temperature', 1.0) if options['do_sample'] else 0.0
    return {'temperature': temperature, 'top_k': options.get('top_k') or 0,
            'top_p': options.get('top_p') or 1.0}


@register_model('xmodel')
class XmodelLM(TemplateLM):
    """pretrained: a run's folder, step_N.pt, or what read_checkpoint returned.

    lm-eval's batch_size is not used: a batch has as many rows as fit into batch_tokens, padding
    included.
    """

    def __init__(self, pretrained, device='cpu', batch_tokens=8192, max_length=None,
                 dtype='float32', batch_size=None, max_batch_size=None):
        super().__init__()
        if str(device).startswith('cuda') and not torch.cuda.is_available():
            device = 'cpu'                                         # lm-eval's default is cuda:0
        self._device = torch.device(device)
        self.model, self.about = load_model(pretrained, self._device)
        self.model.to(weights_dtype(dtype, self._device))
        self.tokenizer = tokenizer_of(self.about)
        self.max_length = max_length or self.model.config.block_size
        self.batch_tokens = batch_tokens
        self.task = 'requests'                                     # name on the progress bar

    @property
    def eot_token_id(self):
        return self.about['eos_ids'][0]

    @property
    def prefix_token_id(self):
        bos = self.about['bos_id']
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string, add_special_tokens=None, **_):
        """Ids of a text; a model with its own tokenizer may begin it with a special one."""
        if isinstance(self.tokenizer, OtherTokenizer):
            return self.tokenizer.encode_ordinary(string, add_special_tokens is not False)
        return self.tokenizer.encode_ordinary(string)

    # --- log-likelihoods ---

    def loglikelihood(self, requests, disable_tqdm=False):
        """See TemplateLM. Only its own progress bar, of tokenizing, is switched off."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **_):
        """[(texts, ids before, ids to score)] -> [(log-likelihood, whether it is greedy)].

        Ids that are too many for the model lose their beginning.
        """
        answers = [(0.0, True)] * len(requests)                    # of an empty continuation
        inputs = {}                                                # ids: requests that end there
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                continue
            if not context:                                        # the text was all white space
                context = [self.prefix_token_id]
            ids = (*context, *continuation)[-self.max_length - 1:-1]
            inputs.setdefault(ids, []).append((number, continuation[-self.max_length:]))
        groups = []
        if inputs:
            groups = groups_of([Branch(ids, ends) for ids, ends in inputs.items()])
        # similar lengths side by side leave little padding; the longest come first, so that a
        # batch too large for the memory shows at once
        groups.sort(key=lengths_of, reverse=True)
        total = sum(sum(lengths_of(group)) for group in groups)
        with tqdm(total=total, desc=self.task, unit='tok', unit_scale=True, leave=False,
                  disable=None) as bar:
            while groups:
                n = next_batch(groups, self.batch_tokens)
                batch, groups = groups[:n], groups[n:]
                for number, answer in score(self.model, batch).items():
                    answers[number] = answer
                    texts = requests[number][0]
                    if texts is not None:                          # None: a window of a text
                        self.cache_hook.add_partial('loglikelihood', texts, answer)
                bar.update(sum(sum(lengths_of(group)) for group in batch))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihoods of whole texts, in windows of max_length that do not overlap."""
        numbers, windows = [], []
        for number, request in enumerate(requests):
            text, = request.args
            for window in get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                numbers.append(number)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(numbers, self._loglikelihood_tokens(windows)):
            totals[number] += value
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
        return totals

    # --- text ---

    def generate_until(self, requests, disable_tqdm=False):
        """Continuations, each up to the first of its stop strings."""
        def settings_of(i):
            return repr(requests[i].args[1])

        texts = [None] * len(requests)
        order = sorted(range(len(requests)), key=settings_of)
        with tqdm(total=len(requests), desc=self.task, unit='answer', leave=False,
                  disable=disable_tqdm or None) as bar:
            for _, numbers in groupby(order, key=settings_of):
                self.generate_alike(requests, list(numbers), texts, bar)
        return texts

    def generate_alike(self, requests, numbers, texts, bar):
        """Fill in texts[i] for the numbers i of requests with the same settings."""
        options = normalize_gen_kwargs(requests[numbers[0]].args[1])
        sampling = sampling_of(options)
        until, max_new_tokens = options['until'], options['max_gen_toks']
        max_prompt = self.max_length - max_new_tokens
        if max_prompt <= 0:
            raise ValueError(f'{max_new_tokens} tokens are to be generated, and the model is meant '
                             f'for texts of {self.max_length}')
        generator = torch.Generator(self._device).manual_seed(random.getrandbits(32))
        prompts = {}
        for i in numbers:
            ids = self.tok_encode(requests[i].args[0])[-max_prompt:]
            prompts[i] = ids or [self.prefix_token_id]
        numbers = sorted(numbers, key=lambda i: -len(prompts[i]))
        while numbers:
            row_tokens = len(prompts[numbers[0]]) + max_new_tokens              # of the longest
            B = max(1, self.batch_tokens // row_tokens)
            batch, numbers = numbers[:B], numbers[B:]
            rows = complete(self.model, self.tokenizer, [prompts[i] for i in batch],
                            max_new_tokens, until, self.about['eos_ids'], generator=generator,
                            **sampling)
            for i, row in zip(batch, rows):
                # as lm-eval's own model: decoded without the prompt, and cut by its rule
                text = self.tokenizer.decode(row.context[len(prompts[i]):])
                texts[i] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial('generate_until', requests[i].args, texts[i])
            bar.update(len(batch))

    # --- chat, as --apply_chat_template wants it ---

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        if isinstance(self.tokenizer, OtherTokenizer):
            raise NotImplementedError('the chat template of another tokenizer is not read')
        if add_generation_prompt:
            return chat_prompt(chat_history)
        if chat_history[-1]['role'] == 'assistant':                # whose words are to be continued
            return f'{chat_prompt(chat_history[:-1])} {chat_history[-1]["content"]}'
        return chat_prompt(chat_history).removesuffix('\n\nAssistant:')

    def chat_template(self, chat_template=False):
        return CHAT_TEMPLATE if chat_template else None

    @property
    def tokenizer_name(self):
        return f'xmodel-{self.model.config.vocab_size}'


# --------------------------------------------------------------------------------------------------
# What lm-eval's tasks load, and may run

class DatasetLoader:
    """datasets.load_dataset, but from data_dir where that holds the folder OWNER/NAME."""

    def __init__(self, load, data_dir):
        self.load, self.data_dir = load, data_dir
        self.hub_reached = None                                    # not tried yet

    def __call__(self, path, *args, **options):
        folder = Path(self.data_dir, path)
        if folder.is_dir() and not Path(path).exists():  # a task may also name a folder of its own
            return self.load_folder(folder, *args, **options)
        if self.hub_reached is None and path not in ('json', 'csv', 'text', 'parquet'):
            self.try_hub()
        try:
            return self.load(path, *args, **options)
        except Exception as e:
            if self.hub_reached is False:
                raise ValueError(f'its data set is missing: no {folder} (--data_dir), and the hub '
                                 'cannot be reached') from e
            raise

    def load_folder(self, folder, *args, **options):
        try:
            return self.load(str(folder), *args, **options)
        except Exception as e:
            if (folder / 'README.md').exists():
                raise
            raise ValueError(f'{folder} has no README.md, which names its parts: {e}') from e

    def try_hub(self):
        """Find out once whether the hub can be reached; the library would try again and again."""
        from huggingface_hub import constants, get_session
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
            self.hub_reached = True
        except Exception:  # noqa: BLE001                          (of whatever HTTP library)
            self.hub_reached = False
            # data sets in the library's cache can still be loaded
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def load_metric(allow_code_execution, name, *args, **options):
    """In place of evaluate.load. Its 'code_eval' would run programs in a mere fork of ours."""
    if name != 'code_eval':
        raise ValueError(f'its metric {name} comes from the hub as a program')
    if not allow_code_execution:
        raise ValueError('it runs programs that the model wrote: --allow_code_execution lets it '
                         '(what is not contained then: see lab/sandbox.py)')
    return CodeEval


def no_parse_expr(allow_code_execution):
    """Without sympy's parse_expr, which some tasks grade answers by: it runs them as Python."""
    if allow_code_execution or not importlib.util.find_spec('sympy'):
        return contextlib.nullcontext()
    return mock.patch('sympy.parsing.sympy_parser.parse_expr', side_effect=ValueError(
        'it runs answers as Python: --allow_code_execution lets it'))


@contextlib.contextmanager
def patched_libraries(data_dir, allow_code_execution):
    """While lm-eval's tasks run: the functions above in place of those of the libraries."""
    load = DatasetLoader(datasets.load_dataset, data_dir)
    with mock.patch('datasets.load_dataset', load), \
            mock.patch('evaluate.load', partial(load_metric, allow_code_execution)), \
            mock.patch('lm_eval.api.task.tqdm', partial(tqdm, leave=False, disable=None)), \
            no_parse_expr(allow_code_execution):
        yield


# --------------------------------------------------------------------------------------------------
# Scoring tasks, for eval.py; `knobs` is the namespace of its knobs

def perplexity(loss):
    """e^loss of a loss in nats, infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def wikitext2(lm, knobs):
    """{'wikitext2_T': perplexities a token and a word, bits a byte} of its test set at `lengths`.

    The lines are joined; windows of T tokens follow one another and do not overlap. With a limit,
    of so many windows: their words and bytes are then estimated by their proportion of the tokens.
    """
    lines = datasets.load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1', split='test')['text']
    text = '\n\n'.join(lines)
    ids = torch.tensor(lm.tokenizer.encode_ordinary(text))
    scores = {}
    for T in int_list('lengths', knobs.lengths):
        starts = range(0, len(ids) - 1, T)[:knobs.limit or None]
        total_loss = n = 0
        for start in tqdm(starts, desc=f'wikitext2, {T} tokens', leave=False, disable=None):
            window = ids[start:start + T + 1].to(knobs.device)
            x, y = window[None, :-1], window[None, 1:]                          # (1, T) each
            with torch.no_grad():
                _, loss = lm.model(x, y)
            total_loss += loss.item() * y.numel()
            n += y.numel()                                         # every token but the first
        proportion = n / len(ids)
        scores[f'wikitext2_{T}'] = {
            'perplexity': perplexity(total_loss / n),
            'word_perplexity': perplexity(total_loss / (proportion * len(text.split()))),
            'bits_per_byte': total_loss / math.log(2) / (proportion * len(text.encode())),
            'sample_len': n}
    return scores


def score_task(lm, task, shots, knobs):
    """{metric: value} of one of lm-eval's tasks, with the seeds that its simple_evaluate sets."""
    if shots is not None and task.get_config('num_fewshot') != 0:
        task.set_config(key='num_fewshot', value=shots)
    elif task.get_config('num_fewshot') is None:
        task.set_config(key='num_fewshot', value=0)
    task.set_fewshot_seed(seed=1234)
    random.seed(0)
    np.random.seed(1234)                                           # what tasks draw from
    torch.manual_seed(1234)
    lm.task = task.task_name
    found = lm_eval.evaluate(lm, {'tasks': {task.task_name: task}}, limit=knobs.limit or None,
                             bootstrap_iters=1000, log_samples=False,
                             confirm_run_unsafe_code=knobs.allow_code_execution)
    return {'shots': task.get_config('num_fewshot'), **found['results'][task.task_name]}


def check_yaml(names, include_path):
    """End the program in one line if a YAML file that mentions one of the names cannot be read.

    lm-eval itself skips such a file without a word.
    """
    for file in sorted(Path(include_path).rglob('*.yaml')):
        text = file.read_text(errors='replace')
        if any(name in text for name in names):
            try:
                load_yaml(file, resolve_func=False)
            except Exception as e:  # noqa: BLE001       (of yaml, or of what it includes)
                fail(f'tasks: {", ".join(names)}: {file} cannot be read: {e}')


def find_tasks(names, include_path):
    """lm-eval's TaskManager that knows the names; ends the program in one line if there is none."""
    options = {'include_path': include_path or None}
    try:
        manager = TaskManager(include_defaults=False, **options)
        missing = [name for name in names if name not in manager.all_tasks]
        if missing and include_path:
            check_yaml(missing, include_path)
        if missing:
            manager = TaskManager(**options)                       # reading all takes 20 s
    except Exception as e:  # noqa: BLE001                         (a YAML may hold anything)
        fail(f'include_path={include_path}: lm-eval cannot read its YAML files: {e}')
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f', the nearest is {near[0]!r}' if near else ''
            fail(f'tasks: lm-eval has no task {name!r}{hint}')
    return manager


def score_by_name(lm, manager, name, entry, save, knobs):
    """Fill the entry of a task, or group of tasks, and save() it after each part."""
    if name == 'wikitext2':
        entry['scores'] = wikitext2(lm, knobs)
        save()
        return
    loaded = manager.load([name])
    for part, task in loaded['tasks'].items():
        if part not in entry['parts']:
            entry['parts'][part] = score_task(lm, task, entry['settings']['shots'], knobs)
            save()
    groups = {group.name: group.aggregate(entry['parts'])
              for group in loaded['groups'].values() if group.has_aggregation}
    entry['scores'] = groups or entry['parts']
    save()


def differences(kept, settings):
    """'limit=5, now 6': where the settings of kept scores are not those of now; '' if nowhere."""
    return ', '.join(f'{key}={value}, now {settings[key]}'
                     for key, value in kept.items() if value != settings[key])


def print_left_out(name, reason):
    """Print in one line why a task is left out."""
    if isinstance(reason, KeyError):
        reason = f'its data have no split or column {reason}'
    lines = str(reason).splitlines() or [type(reason).__name__]
    print(f'eval.py: {name} is left out: {lines[0][:300]}', file=sys.stderr)


def run_tasks(wanted, about, table, save, knobs):
    """Score {task: shots or None} into table['tasks']; returns the names of tasks left out.

    about: the checkpoint, as read_checkpoint returns it. save() is called after each part.
    """
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    os.environ['DISABLE_MULTIPROC'] = '1'            # else lm-eval bootstraps in many processes
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    manager = find_tasks([name for name in wanted if name != 'wikitext2'], knobs.include_path)
    lm = XmodelLM(about, knobs.device, knobs.batch_tokens, dtype=knobs.dtype)
    data_dir = knobs.data_dir or about['knobs'].get('data_dir', 'data')
    left_out = []
    with patched_libraries(data_dir, knobs.allow_code_execution):
        for name, shots in wanted.items():
            settings = {'shots': shots, 'limit': knobs.limit, 'dtype': knobs.dtype}
            if name == 'wikitext2':
                settings['lengths'] = knobs.lengths
            entry = table['tasks'].get(name) if knobs.resume else None
            if not entry:
                entry = {'settings': settings, 'parts': {}, 'scores': None}
            if entry['settings'] != settings:
                print_left_out(name, f'its kept scores have '
                                     f'{differences(entry["settings"], settings)}; '
                                     'without --resume they are replaced')
                left_out.append(name)
                continue
            if entry['scores']:
                print(f'eval.py: {name} is kept as it was scored before', file=sys.stderr)
                continue

            def save_entry(name=name, entry=entry):
                table['tasks'][name] = entry
                save()
            try:
                score_by_name(lm, manager, name, entry, save_entry, knobs)
            except Exception as e:  # noqa: BLE001                 (a task's own code raises any)
                print_left_out(name, e)
                left_out.append(name)
    return left_out
