"""Generation: a prompt in, one more token a step, as sample.py and eval.py need it.

    rows = complete(model, tokenizer, [ids, ids], 100, stop=['\n\n'], temperature=0.0)

Each layer keeps the keys and values of all tokens so far (KV cache), so a step reads one new token.
It does little arithmetic then: its time is that of reading every weight once, and of starting some
thirty operations a layer. Hence the products on all cores, room made beforehand, and compilation.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from model import rope_angles
from tokenizer import special_ids

# --------------------------------------------------------------------------------------------------
# One pass over what is new

SLICES = max(8, torch.get_num_threads())


class SlicedLinear(nn.Linear):
    """A linear that multiplies few rows on all cores.

    A new token is one row, and a product takes as long as reading the weight. BLAS does that on
    one core; a batch of products, with a slice of the weight each, it shares out.
    """

    def forward(self, x):
        return sliced_linear(x, self.weight)


def sliced_linear(x, weight):
    """x (..., K), weight (N, K) -> (..., N)."""
    (N, K), rows = weight.shape, x.numel() // weight.size(1)
    if x.device.type != 'cpu' or rows > 16 or N % SLICES:
        return F.linear(x, weight)
    y = torch.bmm(x.reshape(1, rows, K).expand(SLICES, rows, K),
                  weight.view(SLICES, N // SLICES, K).mT)
    return y.transpose(0, 1).reshape(*x.shape[:-1], N)             # (n, rows, N/n) -> (..., N)


class KVCache:
    """One layer's keys and values, k and v (B, n_kv_head, max_len, hd), zeros where none is yet.

    (A masked column of NaN would still make the output NaN.)
    """

    def __init__(self, B, c, max_len, like):
        self.k, self.v = (like.new_zeros(B, c.n_kv_head, max_len, c.hd) for _ in range(2))
        self.at, self.seen = None, 0

    def append(self, k, v):
        """Put k, v (B, n_kv_head, T, hd) into columns `at` (T,); returns the first `seen` ones."""
        self.k.index_copy_(2, self.at, k)
        self.v.index_copy_(2, self.at, v)
        return self.k[:, :, :self.seen], self.v[:, :, :self.seen]


class Decoder:
    """A model with the keys and values of B texts, padded on the left, by pad (B,), to one length.

    decoder(idx) reads their next T ids, (B, T), and returns the logits after the last, (B, V).
    """

    def __init__(self, model, pad, compiled=False):
        self.model, self.pad, self.padded = model, pad, bool(pad.any())
        self.compiled = torch.compile(one_pass, dynamic=False, fullgraph=True) if compiled else None
        self.caches, self.max_len, self.end = [], 0, 0             # end: columns that hold a token
        self.last = torch.zeros(1, dtype=torch.long, device=pad.device)
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = SlicedLinear

    def reserve(self, max_len):
        """Make room for max_len tokens, and keep what is there: so no step has to allocate."""
        if max_len <= self.max_len:
            return
        self.max_len = max(max_len, 2 * self.max_len)
        self.keys = torch.arange(self.max_len, device=self.pad.device)
        old, self.caches = self.caches, [
            KVCache(len(self.pad), self.model.config, self.max_len, self.model.embed.weight)
            for _ in self.model.blocks]
        for new, there in zip(self.caches, old):
            new.k[:, :, :self.end] = there.k[:, :, :self.end]
            new.v[:, :, :self.end] = there.v[:, :, :self.end]

    @torch.no_grad()
    def __call__(self, idx):
        T, first = idx.size(1), self.end
        self.reserve(first + T)
        self.end = first + T
        static = self.compiled and T == 1          # then all shapes are those of the step before
        at = self.last.fill_(first) if T == 1 else torch.arange(first, self.end, device=idx.device)
        for cache in self.caches:
            cache.at, cache.seen = at, self.max_len if static else self.end
        keys = self.keys[:self.caches[0].seen] if first or self.padded else None
        step = self.compiled if static else one_pass
        return step(self.model, self.caches, idx, at, self.pad, keys)


def one_pass(model, caches, idx, at, pad, keys):
    """Logits (B, V) after idx (B, T), which stand in columns `at` (T,) of the caches.

    keys: the columns that attention reads, (keys,), or None where it is causal over idx alone.
    """
    positions = (at - pad[:, None]).clamp(min=0)                                # (B, T)
    cos, sin = rope_angles(positions, model.config.hd, model.config.rope_theta)  # (B, T, 1, hd/2)
    mask = None
    if keys is not None:
        queries, start = at[:, None], pad[:, None, None]
        # padding sees padding: no key at all would give NaN
        mask = (keys <= queries) & ((keys >= start) | (queries < start))        # (B, T, keys)
        mask = mask[:, None]
    x = model.hidden(idx, cos, sin, caches, mask)[:, -1]                        # (B, C)
    return sliced_linear(x, model.embed.weight).float() * model.table['logits'].multiplier


# --------------------------------------------------------------------------------------------------
# Generation

def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_ids=(),
             generator=None, done=None, decoder=None, compiled=False):
    """Continue B prompts, non-empty lists of token ids of any lengths.

    Yields a step's (ids (B,), their natural log-probabilities in the whole distribution (B,)).
    temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole. A row that has met
    one of stop_ids, or that the caller marks in done (B,), repeats its last token; generation ends
    when all rows have. decoder: one that has read all but `prompts` already.
    """
    device = model.embed.weight.device
    P, stops = max(map(len, prompts)), torch.tensor(stop_ids, dtype=torch.long, device=device)
    idx = torch.tensor([[0] * (P - len(p)) + list(p) for p in prompts], device=device)  # (B, P)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device) if done is None else done
    if decoder is None:
        pad = torch.tensor([P - len(p) for p in prompts], device=device)        # (B,), on the left
        decoder = Decoder(model, pad, compiled)
    decoder.reserve(decoder.end + P + max_new_tokens)
    token = idx[:, -1]
    for _ in range(max_new_tokens):
        logits = decoder(idx)                                                   # (B, vocab_size)
        new = sample_token(logits, temperature, top_k, top_p, generator)        # (B,)
        token = torch.where(done, token, new)
        done |= torch.isin(token, stops)
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        yield token, logprob
        if done.all():
            return
        idx = token[:, None]                                                    # (B, 1)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (B, vocab_size) -> ids (B,), of the top_k likeliest and those making up mass top_p."""
    if min(temperature, top_p) < 1e-6:                # in fp32 a division by it would overflow
        return logits.argmax(-1)
    logits, ids = (logits / temperature).sort(descending=True)     # (B, vocab_size) each
    if top_k:
        logits[:, top_k:] = -math.inf
    p = logits.softmax(-1)
    p[p.cumsum(-1) - p >= top_p] = 0                               # the likeliest always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


class Continuation:
    """The text of one sample while its tokens arrive, up to a stop string or an end-of-text id."""

    def __init__(self, tokenizer, prompt_ids, stop=(), stop_ids=()):
        self.tokenizer, self.stop, self.stop_ids = tokenizer, [s for s in stop if s], set(stop_ids)
        # decoded so far: context[:b]; [a:b] is read again, as a token may end mid-character
        self.context, self.a, self.b = list(prompt_ids), 0, len(prompt_ids)
        self.ids, self.logprobs, self.text, self.told, self.finish = [], [], '', 0, None

    def add(self, token, logprob):
        """Take in one more id, unless the sample has ended."""
        tokenizer = self.tokenizer
        if self.finish:
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.stop_ids:
            self.finish = 'eos'
        elif token < tokenizer.n_vocab and token not in special_ids(tokenizer):
            self.context.append(token)
            text = tokenizer.decode(self.context[self.a:])
            if not text.endswith('\ufffd'):
                self.take(text)

    def take(self, text):
        """Take in the text of context[a:]."""
        self.text += text[len(self.tokenizer.decode(self.context[self.a:self.b])):]
        self.a, self.b = self.b, len(self.context)
        if found := [self.text.find(s) for s in self.stop if s in self.text]:
            self.text, self.finish = self.text[:min(found)], 'stop'

    def end(self):
        """Take in what is left: half a character, where max_new_tokens cut it."""
        if not self.finish and self.b < len(self.context):
            self.take(self.tokenizer.decode(self.context[self.a:]))
        self.finish = self.finish or 'length'
        return self

    def news(self):
        """Text not yet told, but for an end of it that could begin a stop string."""
        held = 0 if self.finish else max((n for s in self.stop for n in range(1, len(s))
                                          if self.text.endswith(s[:n])), default=0)
        new = self.text[self.told:len(self.text) - held]
        self.told += len(new)
        return new


def complete(model, tokenizer, prompts, max_new_tokens, stop=(), stop_ids=(), tell=None,
             **sampling):
    """The Continuations of B prompts, lists of ids; if there is one, tell(text) hears it grow.

    sampling: of generate, its knobs.
    """
    rows = [Continuation(tokenizer, ids, stop, stop_ids) for ids in prompts]
    done = torch.zeros(len(rows), dtype=torch.bool, device=model.embed.weight.device)
    for tokens, logprobs in generate(model, prompts, max_new_tokens, stop_ids=stop_ids, done=done,
                                     **sampling):
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
            row.add(token, logprob)
        done |= torch.tensor([row.finish is not None for row in rows], device=done.device)
        if tell:
            tell(rows[0].news())
    for row in rows:
        row.end()
    if tell:
        tell(rows[0].news())
    return rows
