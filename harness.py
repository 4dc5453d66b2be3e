"""Our model as lm-evaluation-harness (pip install lm_eval) sees it: eval.py --tasks=... runs it.

    python eval.py lm_eval run --model xmodel --model_args pretrained=out/proxy20m --tasks arc_easy

lm-eval builds prompts and computes metrics; a model answers three kinds of requests, with text in
and numbers or text out: how likely a continuation is, how likely a whole text, what comes next.

Almost all of a multiple-choice question is prompt, the same for its four choices, and often its
first part, the worked examples, is the same for many questions. So here requests are sorted as
token sequences, neighbours that begin alike share that beginning, and it is read once. What differs
follows as one row for each group, on the beginning's keys and values (KV cache): branches beside
one another, each blind to the others by the attention mask.
"""
import math
import random
from itertools import groupby

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from checkpoint import load_model
from generate import KVCache, common_prefix, complete
from model import rope_angles
from tokenizer import CHAT_TEMPLATE, OtherTokenizer, chat_prompt, tokenizer_of

LONGEST_ROW = 1024            # tokens of a group's branches: attention costs their square


class Branch:
    """One distinct input: its ids, and the requests (number, continuation) that end there."""

    def __init__(self, ids, asked):
        self.ids, self.asked = ids, asked
        # the last `scored` positions predict continuations; before them nothing is to be known
        self.scored = max(len(continuation) for _, continuation in asked)


def groups_of(branches):
    """Branches in groups [(prefix length, [branch, ...]), ...], with few tokens to read in all.

    In sorted order, a branch joins its neighbour's group if that saves a quarter of its tokens.
    Alone it costs len(ids). Joining it saves `joined` of them; but where that shortens the group's
    prefix, what is cut from it is read once by each member, in place of once.
    """
    groups, length, members = [], 0, []
    for branch in sorted(branches, key=lambda branch: branch.ids):
        alone = len(branch.ids) - branch.scored       # what is scored has to be in the row
        joined = min(length, alone, common_prefix(branch.ids, members[-1].ids) if members else 0)
        size = sum(len(b.ids) - joined for b in (*members, branch))            # of the row
        saved = joined - (length - joined) * (len(members) - 1)
        if saved > len(branch.ids) / 4 and size <= LONGEST_ROW:
            length = joined
            members.append(branch)
        else:
            groups.append((length, members))
            length, members = alone, [branch]
    return [*groups[1:], (length, members)]


@torch.no_grad()
def score(model, groups):
    """{request's number: (log-likelihood in nats, is it the greedy text)} of groups_of's groups.

    A group is one row of two passes. The second reads the keys of the first: so for the group of
    the branches A (two tokens) and B (one), beside a longer one,

        keys:      prefix . . pad pad | A A B pad       (P columns and S columns)
        A's ids    1 1 1  0 0   0   0 | 1 0 0  0        what they attend to
                   1 1 1  0 0   0   0 | 1 1 0  0
        B's id     1 1 1  0 0   0   0 | 0 0 1  0        at the same position as A's first
    """
    c, device = model.config, model.embed.weight.device
    P = max(length for length, _ in groups)
    rows = [[branch.ids[length:] for branch in members] for length, members in groups]
    G, S = len(groups), max(sum(map(len, row)) for row in rows)
    prefix, ids = (torch.zeros(G, n, dtype=torch.long) for n in (P, S))     # padded on the right
    positions = torch.zeros(G, S, dtype=torch.long)
    which = torch.full((G, S), -1)                                  # branch, or -1 in the padding
    scored = []                                # (place in (G, S), next id, number of the request)
    for g, ((length, members), row) in enumerate(zip(groups, rows)):
        prefix[g, :length] = torch.tensor(members[0].ids[:length])
        at = 0
        for i, (branch, part) in enumerate(zip(members, row)):
            end = at + len(part)
            ids[g, at:end], which[g, at:end] = torch.tensor(part), i
            positions[g, at:end] = length + torch.arange(len(part))
            scored += [(g * S + end - len(continuation) + j, token, number)
                       for number, continuation in branch.asked
                       for j, token in enumerate(continuation)]
            at = end
    prefix, ids, positions, which = (t.to(device) for t in (prefix, ids, positions, which))

    caches = mask = None                       # without a prefix: a branch a row, and causal
    if P:
        columns = torch.arange(P + S, device=device)
        caches = [KVCache(model, G, P + S) for _ in model.blocks]
        for cache in caches:
            cache.at, cache.seen = columns[:P], P
        model.hidden(prefix, *rope_angles(columns[:P], c.hd, c.rope_theta), caches)
        for cache in caches:
            cache.at, cache.seen = columns[P:], P + S
        lengths = torch.tensor([length for length, _ in groups], device=device)
        in_prefix = columns[:P] < lengths[:, None]                              # (G, P)
        own = (which[:, :, None] == which[:, None]).tril()                      # (G, S, S)
        mask = torch.cat((in_prefix[:, None].expand(G, S, P), own), -1)[:, None]  # (G, 1, S, P + S)
    x = model.hidden(ids, *rope_angles(positions, c.hd, c.rope_theta), caches, mask)    # (G, S, C)

    place, token, number = torch.tensor(scored, device=device).T                # (n,) each
    found = {}
    step = max(1, 2**(28 if x.is_cuda else 24) // c.vocab_size)     # 1 GB (64 MB) of logits in fp32
    for some in torch.arange(len(scored), device=device).split(step):
        logits = model.logits(x.flatten(0, 1)[place[some]]).float()             # (step, V)
        right = logits.log_softmax(-1).gather(1, token[some, None])[:, 0]       # (step,)
        best = logits.argmax(-1) == token[some]                                 # (step,)
        for i, value, same in zip(number[some].tolist(), right.tolist(), best.tolist()):
            total, greedy = found.get(i, (0.0, True))
            found[i] = total + value, greedy and same
    if any(math.isnan(value) for value, _ in found.values()):
        raise FloatingPointError('log-likelihoods are NaN: training ruined the weights')
    return found


@register_model('xmodel')
class XmodelLM(TemplateLM):
    """pretrained: a run's folder, step_N.pt, or what was read of it.

    lm-eval's batch_size is not asked for: a batch is as many rows as have batch_tokens, padding
    included.
    """

    def __init__(self, pretrained, device='cpu', batch_tokens=8192, max_length=None,
                 dtype='float32', batch_size=None, max_batch_size=None):
        super().__init__()
        if str(device).startswith('cuda') and not torch.cuda.is_available():
            device = 'cpu'                                         # lm-eval's default is cuda:0
        self._device = torch.device(device)
        self.model, self.about = load_model(pretrained, self._device)
        self.model.to(getattr(torch, dtype))
        self.tokenizer = tokenizer_of(self.about)
        self.max_length = max_length or self.model.config.block_size
        self.batch_tokens, self.task = batch_tokens, 'requests'

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
        return super().loglikelihood(requests, disable_tqdm=True)  # its bar of tokenizing, not ours

    def _loglikelihood_tokens(self, requests, **_):
        """[(texts, ids before, ids to score)] -> [(log-likelihood, whether it is greedy)].

        What is too long loses its beginning.
        """
        inputs, answers = {}, [(0.0, True)] * len(requests)         # of an empty continuation
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                continue
            context = context or [self.prefix_token_id]            # where it was all white space
            ids = (*context, *continuation)[-self.max_length - 1:-1]
            inputs.setdefault(ids, []).append((number, continuation[-self.max_length:]))
        groups = groups_of([Branch(*entry) for entry in inputs.items()]) if inputs else []

        def size(group):
            """(length of its prefix, of its row)"""
            length, members = group
            return length, sum(len(branch.ids) - length for branch in members)

        # alike beside one another, so that little is padding; long first, to see soon what is too
        # much for the memory
        groups.sort(key=size, reverse=True)
        with tqdm(total=sum(sum(size(group)) for group in groups), desc=self.task, unit='tok',
                  unit_scale=True, leave=False, disable=None) as bar:
            while groups:
                n, longest = 0, (0, 0)
                for n, group in enumerate(groups):
                    wider = tuple(map(max, longest, size(group)))
                    if n and (n + 1) * sum(wider) > self.batch_tokens:
                        break
                    longest = wider
                else:
                    n += 1
                batch, groups = groups[:n], groups[n:]
                for number, answer in score(self.model, batch).items():
                    answers[number] = answer
                    if requests[number][0] is not None:                        # else a window
                        self.cache_hook.add_partial('loglikelihood', requests[number][0],
                                                    answer)
                bar.update(sum(sum(size(group)) for group in batch))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihoods of whole texts, in windows of max_length that do not overlap."""
        windows = [(number, (None, *make_disjoint_window(window)))
                   for number, (text,) in enumerate(request.args for request in requests)
                   for window in get_rolling_token_windows(
                       self.tok_encode(text), self.prefix_token_id, self.max_length, 1)]
        totals = [0.0] * len(requests)
        values = self._loglikelihood_tokens([window for _, window in windows])
        for (number, _), (value, _) in zip(windows, values):
            totals[number] += value
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
        return totals

    # --- text ---

    def generate_until(self, requests, disable_tqdm=False):
        """Continuations, each up to the first of its stop strings."""
        texts = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        with tqdm(total=len(requests), desc=self.task, unit='answer', leave=False,
                  disable=disable_tqdm or None) as bar:
            for _, part in groupby(order, key=lambda i: repr(requests[i].args[1])):
                part = list(part)                                  # those with the same settings
                how = normalize_gen_kwargs(requests[part[0]].args[1])
                known = {'until', 'max_gen_toks', 'temperature', 'do_sample', 'top_k', 'top_p'}
                if how.get('num_beams') == 1:                      # greedy, or plain sampling
                    known.add('num_beams')
                if others := how.keys() - known:
                    raise ValueError(f'generation_kwargs: {min(others)} is not known here')
                until, n = how['until'], how['max_gen_toks']
                room = self.max_length - n
                if room <= 0:
                    raise ValueError(f'{n} tokens are to be generated, and the model is meant for '
                                     f'texts of {self.max_length}')
                sampling = {'temperature': how.get('temperature', 1.0) if how['do_sample'] else 0.0,
                            'top_k': how.get('top_k') or 0, 'top_p': how.get('top_p') or 1.0,
                            'generator': torch.Generator(self._device).manual_seed(
                                random.getrandbits(32))}
                prompts = {i: self.tok_encode(requests[i].args[0])[-room:] or
                           [self.prefix_token_id] for i in part}
                part.sort(key=lambda i: -len(prompts[i]))
                while part:
                    B = max(1, self.batch_tokens // (len(prompts[part[0]]) + n))
                    batch, part = part[:B], part[B:]
                    rows = complete(self.model, self.tokenizer, [prompts[i] for i in batch], n,
                                    until, self.about['eos_ids'], **sampling)
                    for i, row in zip(batch, rows):
                        # as lm-eval's own model: decoded without the prompt, and cut by its rule
                        text = self.tokenizer.decode(row.context[len(prompts[i]):])
                        texts[i] = postprocess_generated_text(text, until, None)
                        self.cache_hook.add_partial('generate_until', requests[i].args, texts[i])
                    bar.update(len(batch))
        return texts

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
