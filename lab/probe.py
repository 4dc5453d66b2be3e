"""What lab/ablate.py measures on finished runs, beside their losses and the sums that they solve.

    length       loss by position in long windows, and keys that are told early and asked late
    steps        sums of 1 to 6 steps, greedily and by a majority of 8, and the errors by kind
    landscape    sharpness, spectra of weights and updates, rare tokens, the line between two runs

Each takes a Run and returns {measure: number}; where a name ends in 'solved' or 'errors', the
number is a share.
"""
import math
import random
import re
import statistics
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import eval
from checkpoint import load_model
from documents import arith
from generate import complete
from loader import get_windows, open_data
from tokenizer import EOS_ID, Encoding, tokenizer_of

WINDOWS = 64                         # of held-out text, spread over its split
PROBLEMS = 100                       # of each kind
N_STEPS = (1, 2, 3, 4, 5, 6)         # of sums
ITERATIONS = 100                     # of power iteration at most
SAMPLES, TEMPERATURE = 8, 0.7        # of which a majority answers


class Run(NamedTuple):
    """The last checkpoint of a run, in use."""
    model: nn.Module
    tokenizer: Encoding
    knobs: dict

    def data(self, name):
        """One of its data sets."""
        return open_data(self.knobs['data_dir'], [name], self.model.config.vocab_size)[name]

    def block_size(self):
        """Of its first phase."""
        return self.knobs['phases'][0]['block_size']


def load(folder):
    """The Run in a folder."""
    model, about = load_model(folder)
    return Run(model, tokenizer_of(about), about['knobs'])


def windows(dataset, T, n):
    """n windows of a held-out split, spread over it: x, y, (n, T) each."""
    available = dataset.n_windows('val', T)
    n = max(1, min(n, available))
    return get_windows(dataset, 'val', [i * available // n for i in range(n)], T)


@torch.no_grad()
def token_losses(model, x, y, rows=8):
    """Loss of every token, in nats: (n, T)."""
    losses = [F.cross_entropy(model(x[i:i + rows])[0].transpose(1, 2), y[i:i + rows],
                              reduction='none', ignore_index=-1)
              for i in range(0, len(x), rows)]
    return torch.cat(losses)


def solved(model, tokenizer, prompts, written, tokens, n_samples=1):
    """[(whether the answer is right, the worked text)] of each prompt, a list of ids.

    written: the right answer's text; tokens: to make at most. With n_samples > 1 the answer is the
    commonest of so many samples.
    """
    found = []
    generator = torch.Generator().manual_seed(0)
    sampling = {'temperature': TEMPERATURE if n_samples > 1 else 0.0, 'generator': generator}
    at_a_time = max(1, 200 // n_samples)
    for i in tqdm(range(0, len(prompts), at_a_time), leave=False, disable=None):
        part = prompts[i:i + at_a_time]
        rows = complete(model, tokenizer, [ids for ids in part for _ in range(n_samples)], tokens,
                        stop_ids=[EOS_ID], **sampling)
        for j in range(len(part)):
            texts = [row.text for row in rows[j * n_samples:(j + 1) * n_samples]]
            answers = Counter(eval.answer(text) for text in texts)
            commonest, _ = answers.most_common(1)[0]
            right = commonest is not None and commonest == eval.answer(written[i + j])
            found.append((right, texts[0]))
    return found


def share(results):
    """The share that is true."""
    return statistics.fmean(results)


# --------------------------------------------------------------------------------------------------
# Long context

def recall(n_documents, seed, most=110):
    """SFT records {'prompt', 'completion'}: a key, up to `most` sentences of no use, the question.

        Note: the key is 17.
        Tom has 5 apples. He gets 3 more. Ann has 9 pens. ...
        Question: What is the key?
        Answer:
        #### 17

    The longest take some 900 tokens.
    """
    rng = random.Random(f'recall {seed}')
    for _ in range(n_documents):
        key = rng.randint(0, 30)
        n = rng.randint(most // 10, most)
        stories = [document.prompt.removeprefix('Question: ').partition(' How many')[0]
                   for document in arith(n, rng.random(), steps=(1, 2))]
        sentences = re.split(r'(?<=\.) ', ' '.join(stories))[:n]
        prompt = (f'Note: the key is {key}.\n{" ".join(sentences)}\n'
                  'Question: What is the key?\nAnswer:\n')
        yield {'prompt': prompt, 'completion': f'#### {key}'}


def length(run, near=256, far=1024):
    """Losses of text in windows of `near` and `far` tokens, and keys found again by distance."""
    model, tokenizer = run.model, run.tokenizer
    found = {}
    x, y = windows(run.data('stdlib'), far, WINDOWS * near // far)              # (n, far)
    for T in (near, far):                                        # of the same text
        losses = token_losses(model, x.view(-1, T), y.view(-1, T), rows=4)
        found[f'loss of text, windows of {T}'] = losses.mean().item()
    by_position = losses.mean(0)                                                # (far,)
    edges = (0, near, far // 2, far)
    for a, b in pairwise(edges):
        found[f'loss of text, positions {a} to {b - 1} of {far}'] = by_position[a:b].mean().item()
    records = list(recall(8 * PROBLEMS, 'held out'))     # some fifth of them are near enough
    prompts = [tokenizer.encode(record['prompt']) for record in records]
    for a, b in ((0, near), (near, far)):
        chosen = [i for i, ids in enumerate(prompts) if a <= len(ids) < b][:PROBLEMS]
        results = solved(model, tokenizer, [prompts[i] for i in chosen],
                         [records[i]['completion'] for i in chosen], 8)
        found[f'keys of {a} to {b - 1} tokens ago, solved'] = share(right for right, _ in results)
    return found


# --------------------------------------------------------------------------------------------------
# Sums of more steps than in training

STEP = re.compile(r'(\d+) ([-+*]) (\d+) = (\d+)')
KINDS = ('wrong operation', 'wrong copy', 'wrong result', 'wrong stop')


def kind_of_error(text, written):
    """The first thing wrong with a worked answer beside the written one, one of KINDS; None: it is
    right.

    'wrong result': its own operands give another. 'wrong stop': a step too many or too few, or no
    answer after the last.
    """
    for line, right in zip(text.splitlines(), written.splitlines()):
        if line == right:
            continue
        ours, theirs = STEP.fullmatch(line), STEP.fullmatch(right)
        if not ours or not theirs:
            return 'wrong copy' if not ours and not theirs else 'wrong stop'
        if ours[2] != theirs[2]:
            return 'wrong operation'
        return 'wrong copy' if ours.group(1, 3) != theirs.group(1, 3) else 'wrong result'
    return None if text.count('\n') == written.count('\n') else 'wrong stop'


def sums_of(n_steps, seen, tokenizer):
    """(prompts, written answers) of PROBLEMS sums of n_steps whose worked answer is not in seen."""
    found = {}
    for document in arith(40 * PROBLEMS, f'probe {n_steps}', steps=(n_steps,)):
        if document.text not in seen:
            found.setdefault(document.text, document.prompt)
    chosen = list(found.items())[:PROBLEMS]
    return [tokenizer.encode(prompt) for _, prompt in chosen], [text for text, _ in chosen]


def steps(run):
    """Shares of sums solved, by their number of steps and way of answering, and errors by kind."""
    model, tokenizer = run.model, run.tokenizer
    seen = {tokenizer.decode(ids[:-1]) for _, ids in run.data('arith').pairs('train')}
    greedy, majority = {}, {}
    counts = {'1 to 3': Counter(), '4 to 6': Counter()}
    for n in N_STEPS:
        prompts, written = sums_of(n, seen, tokenizer)
        tokens = 2 * max(len(tokenizer.encode(text)) for text in written)
        results = solved(model, tokenizer, prompts, written, tokens)
        of = f'{n} steps ({len(written)} sums)'
        greedy[f'{of}, greedy, solved'] = share(right for right, _ in results)
        for (right, text), expected in zip(results, written):
            if not right:
                kind = kind_of_error(text, expected) or 'wrong stop'            # goes on after ####
                counts['1 to 3' if n <= 3 else '4 to 6'][kind] += 1
        results = solved(model, tokenizer, prompts, written, tokens, SAMPLES)
        majority[f'{of}, majority of {SAMPLES}, solved'] = share(right for right, _ in results)
    errors = {}
    for of, kinds in counts.items():
        n = max(1, sum(kinds.values()))
        for kind in KINDS:
            errors[f'{of} steps, {kind}, share of errors'] = kinds[kind] / n
    return greedy | majority | errors


# --------------------------------------------------------------------------------------------------
# The landscape of the loss

def gradient(model, x, y):
    """The gradient of the mean loss, as one vector."""
    model.zero_grad()
    for xs, ys in zip(x.split(8), y.split(8)):
        (model(xs, ys)[1] * (ys >= 0).sum() / (y >= 0).sum()).backward()
    return parameters_to_vector(p.grad for p in model.parameters())


def largest_curvature(model, x, y):
    """The eigenvalue of the loss's Hessian of largest magnitude.

    By power iteration, until a round changes it by less than 0.2 %, or ITERATIONS rounds.

    A product with the Hessian is a difference of two gradients, at weights a little to both sides.
    """
    weights = parameters_to_vector(model.parameters()).detach()
    v = torch.randn(len(weights), generator=torch.Generator().manual_seed(0))
    step = 1e-5 * weights.norm()
    eigenvalue = math.inf
    for _ in range(ITERATIONS):
        before = eigenvalue
        v /= v.norm()
        sides = []
        for sign in (1, -1):
            vector_to_parameters(weights + sign * step * v, model.parameters())
            sides.append(gradient(model, x, y))
        product = (sides[0] - sides[1]) / (2 * step)
        eigenvalue = (v @ product).item()
        v = product
        if abs(eigenvalue - before) < 0.002 * abs(eigenvalue):
            break
    vector_to_parameters(weights, model.parameters())
    return eigenvalue


def stable_rank(matrices):
    """Mean of ||M||_F² / ||M||_2²: how many equal singular values would carry as much."""
    return statistics.fmean((M.norm() / torch.linalg.matrix_norm(M, 2)).item()**2 for M in matrices)


def without(M, W):
    """M minus its projection on W.

    Weight decay moves along W, so this takes it out of an update.
    """
    return M - (M * W).sum() / W.square().sum() * W


def on_the_line(model, one, other, x, y, points=5):
    """Losses at weights between two checkpoints' (both ends included), evenly spaced."""
    losses = []
    for i in range(points):
        t = i / (points - 1)
        model.load_state_dict({name: (1 - t) * w + t * other[name] for name, w in one.items()})
        losses.append(token_losses(model, x, y)[y >= 0].mean().item())
    return losses


def frequent_and_rare(counts):
    """Masks of token ids by their counts in a text: its frequent half, and its rarest tenth."""
    order = np.argsort(-counts)
    so_far = np.cumsum(counts[order]) / counts.sum()             # of the text, by frequency
    ids = np.arange(len(counts))
    return np.isin(ids, order[so_far < 0.5]), np.isin(ids, order[so_far > 0.9])


def landscape(run, before, first):
    """Sharpness and spectra at a run's end, rare and frequent tokens, and the way to `first`'s end.

    before: the weights that it started from; first: those of the run that it is compared with.
    """
    model, text = run.model, run.data('stdlib')
    x, y = windows(text, run.block_size(), WINDOWS)
    losses = token_losses(model, x, y)
    counts = np.bincount(text.tokens['train'], minlength=model.config.vocab_size)
    frequent, rare = map(torch.from_numpy, frequent_and_rare(counts))
    known = y >= 0
    found = {'loss of the frequent half of the text': losses[known & frequent[y]].mean().item(),
             'loss of the rarest tenth of the text': losses[known & rare[y]].mean().item()}
    # the decay's own loss: two thirds sums
    x, y = (torch.cat(both) for both in zip(windows(text, run.block_size(), WINDOWS // 3),
                                            windows(run.data('arith'), run.block_size(),
                                                    WINDOWS - WINDOWS // 3)))
    eigenvalue = largest_curvature(model, x[::4], y[::4])
    size = parameters_to_vector(model.parameters()).square().sum().item()
    found |= {'largest eigenvalue of the Hessian': eigenvalue,
              'the same, times the squared norm of the weights': eigenvalue * size}
    end = {name: p.detach().clone() for name, p in model.named_parameters()}
    for part, modules in (('attention', ('qkv', 'out')), ('FFN', ('gate_up', 'down'))):
        names = [name for name in end if name.split('.')[-2] in modules]
        found[f'stable rank of weights, {part}'] = stable_rank(end[name] for name in names)
        found[f'stable rank of the update, {part}'] = stable_rank(
            without(end[name] - before[name], before[name]) for name in names)
    line = on_the_line(model, first, end, x, y)
    straight = np.linspace(line[0], line[-1], len(line))
    # the barrier of Entezari et al., arXiv 2110.06296
    found['loss barrier to the first'] = (np.array(line) - straight).max()
    moved = math.sqrt(sum((end[name] - before[name]).square().sum().item() for name in end))
    found['distance from the start'] = moved
    return found
