"""Generation: a prompt in, one more token a step.

    rows = complete(model, tokenizer, [ids, ids], 100, stop_ids=[EOS_ID], temperature=0.0)

Each layer keeps the keys and values of all tokens so far (KV cache), so a step reads one new token.
A step is little arithmetic. Its time goes into reading every weight once, and into starting some
thirty operations a layer. So here products run on all cores, the cache is allocated beforehand, and
a step can be compiled.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from hardware import matmul_dtype
from model import rope_angles


def weights_dtype(name, device):
    """The torch.dtype 'bfloat16' or 'float32'; of 'auto', bf16 where the device has units for it.

    model.to(torch.bfloat16) takes norm gains and the KV cache along, as transformers does: a norm
    still computes in fp32, and so do RoPE's angles and the softmax over the logits.
    """
    if name == 'auto':
        return matmul_dtype(torch.device(device).type)
    return getattr(torch, name)


# --------------------------------------------------------------------------------------------------
# One pass over what is new

# Into how many slices a weight is cut: a power of two, which divides most sizes, and at least the
# number of threads; on 2 threads 8 slices are faster than 2 where there are 8 rows.
SLICES = max(8, 1 << (torch.get_num_threads() - 1).bit_length())


class SlicedLinear(nn.Linear):
    """A linear that multiplies few rows on all cores.

    A new token is one row, and its product takes as long as reading the weight. BLAS does that on
    one core (14 ms for the proxy's 80 MB). A batch of products, each with a slice of the weight, it
    spreads over all cores (8 ms on two).
    """

    def forward(self, x):
        return sliced_linear(x, self.weight)


def sliced_linear(x, weight):
    """x (..., K), weight (N, K) -> (..., N)."""
    N, K = weight.shape
    rows = x.numel() // K
    # (in bf16 the whole product is 1.2 times as fast as slices, at the proxy's sizes)
    if x.device.type != 'cpu' or x.dtype == torch.bfloat16 or rows > 16 or N % SLICES:
        return F.linear(x, weight)
    copies = x.reshape(1, rows, K).expand(SLICES, rows, K)         # takes no memory
    slices = weight.view(SLICES, N // SLICES, K)
    y = torch.bmm(copies, slices.mT)                               # (SLICES, rows, N / SLICES)
    return y.transpose(0, 1).reshape(*x.shape[:-1], N)


class KVCache:
    """One layer's keys and values, k and v (B, n_kv_head, max_len, hd), of B texts."""

    def __init__(self, model, B, max_len):
        c = model.config
        shape = B, c.n_kv_head, max_len, c.hd
        # zeros, not empty: attention gives a masked column the weight 0, and 0 x NaN is NaN
        self.k = model.embed.weight.new_zeros(shape)
        self.v = model.embed.weight.new_zeros(shape)
        # set before each pass: the columns to write (see append), and how many are read
        self.at, self.seen = None, 0

    def append(self, k, v):
        """Put k, v (B, n_kv_head, T, hd) into columns `at` (T,); returns the first `seen` ones."""
        self.k.index_copy_(2, self.at, k)
        self.v.index_copy_(2, self.at, v)
        return self.k[:, :, :self.seen], self.v[:, :, :self.seen]


class Decoder:
    """A model with the keys and values of B texts, padded on the left, by pad (B,), to one length.

    decoder(idx) reads their next T ids, (B, T), and returns the logits after the last, (B, V).
    The model's linears stay SlicedLinear afterwards: only the class changes, not the weights.
    """

    def __init__(self, model, pad, compiled=False):
        self.model, self.pad, self.padded = model, pad, bool(pad.any())
        self.compiled_pass = None
        if compiled:
            self.compiled_pass = torch.compile(one_pass, dynamic=False, fullgraph=True)
        self.caches = []                                           # one a layer
        self.max_len = 0                                           # columns of each
        self.end = 0                                               # of them hold a token
        self.one_column = torch.zeros(1, dtype=torch.long, device=pad.device)
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = SlicedLinear

    def reserve(self, max_len):
        """Make room for max_len tokens beforehand, so that no step allocates; keeps what was read.

        The length is a multiple of 256, or twice the old one (a chat grows by turns): each length
        compiles a step of its own, so there should be few.
        """
        if max_len <= self.max_len:
            return
        multiple_of_256 = math.ceil(max_len / 256) * 256
        self.max_len = max(multiple_of_256, 2 * self.max_len)
        self.keys = torch.arange(self.max_len, device=self.pad.device)          # all columns
        existing = self.caches
        self.caches = [KVCache(self.model, len(self.pad), self.max_len)
                       for _ in self.model.blocks]
        for new, old in zip(self.caches, existing):
            new.k[:, :, :self.end] = old.k[:, :, :self.end]
            new.v[:, :, :self.end] = old.v[:, :, :self.end]

    @torch.inference_mode()
    def __call__(self, idx):
        T, first = idx.size(1), self.end
        self.reserve(first + T)
        self.end = first + T
        at = self.keys[first:self.end]
        if T == 1:
            at = self.one_column.fill_(first)                      # the same memory each time
        # a compiled step has the same shapes each time: it reads all columns, and masks most
        run_pass, seen = one_pass, self.end
        if self.compiled_pass is not None and T == 1:
            run_pass, seen = self.compiled_pass, self.max_len
        for cache in self.caches:
            cache.at, cache.seen = at, seen
        keys = None                     # one token sees all that was read, or idx sees itself alone
        if (first and T > 1) or self.padded or run_pass is not one_pass:
            keys = self.keys[:seen]
        return run_pass(self.model, self.caches, idx, at, self.pad, keys)


def one_pass(model, caches, idx, at, pad, keys):
    """Logits (B, V) after idx (B, T), which stand in columns `at` (T,) of the caches.

    keys: the columns that attention reads, (keys,), or None where idx is all that there is or one
    token that sees every column.
    """
    positions = (at - pad[:, None]).clamp(min=0)                                # (B, T)
    cos, sin = rope_angles(positions, model.config.hd, model.config.rope_theta)  # (B, T, 1, hd/2)
    mask = None
    if keys is not None:
        queries, start = at[:, None], pad[:, None, None]
        # padding sees padding: no key at all would give NaN
        mask = (keys <= queries) & ((keys >= start) | (queries < start))        # (B, T, keys)
        mask = mask[:, None]                                                    # (B, 1, T, keys)
    x = model.hidden(idx, cos, sin, caches, mask)[:, -1]                        # (B, C)
    return sliced_linear(x, model.embed.weight).float() * model.table['logits'].multiplier


# --------------------------------------------------------------------------------------------------
# Generation

def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_ids=(),
             generator=None, done=None, decoder=None, compiled=False):
    """Continue B prompts, non-empty lists of token ids of any lengths.

    Yields for each step (ids (B,), their natural log-probabilities (B,)); the latter are the
    model's own, before temperature, top_k and top_p. temperature 0 is greedy; top_k 0 and top_p 1
    leave the distribution whole.

    A row that has met one of stop_ids repeats its last token, as does one that the caller marks in
    done (B,), bool, which is changed in place. Generation ends when all rows are done.

    decoder: a Decoder that has read what comes before `prompts`, which then have one length; it was
    compiled or not when it was made. FloatingPointError: the logits are not finite.
    """
    device = model.embed.weight.device
    P = max(map(len, prompts))
    stops = torch.tensor(stop_ids, dtype=torch.long, device=device)
    n_padding = [P - len(ids) for ids in prompts]                               # on the left
    padded = [[0] * n + list(ids) for n, ids in zip(n_padding, prompts)]
    idx = torch.tensor(padded, device=device)                                   # (B, P)
    if done is None:
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    if decoder is None:
        decoder = Decoder(model, torch.tensor(n_padding, device=device), compiled)
    decoder.reserve(decoder.end + P + max_new_tokens)
    token = idx[:, -1]
    for _ in range(max_new_tokens):
        logits = decoder(idx)                                                   # (B, vocab_size)
        total = logits.logsumexp(-1)                                            # (B,)
        if not total.isfinite().all():
            raise FloatingPointError('its logits are not finite: training ruined the weights')
        new = sample_token(logits, temperature, top_k, top_p, generator)        # (B,)
        token = torch.where(done, token, new)
        done |= torch.isin(token, stops)
        logprob = logits.gather(1, token[:, None])[:, 0] - total
        yield token, logprob
        if done.all():
            return
        idx = token[:, None]                                                    # (B, 1)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """logits (B, vocab_size) -> ids (B,), drawn from the top_k likeliest within the mass top_p."""
    if min(temperature, top_p) < 1e-6:                # greedy; and temperature 0 is no divisor
        return logits.argmax(-1)
    logits, ids = (logits / temperature).sort(descending=True)     # (B, vocab_size) each
    if top_k:
        logits[:, top_k:] = -math.inf
    p = logits.softmax(-1)
    if top_p < 1:                                     # in fp32 a sum over all may exceed 1
        p[p.cumsum(-1) - p >= top_p] = 0                           # the likeliest always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


class Continuation:
    """The text of one sample while its tokens arrive, up to a stop string or an end-of-text id.

    text; ids as drawn; their logprobs; finish: 'eos', 'stop' or 'length', None before the end.
    """

    def __init__(self, tokenizer, prompt_ids, stop=(), stop_ids=()):
        self.tokenizer = tokenizer
        self.stop = [s for s in stop if s]
        self.stop_ids = set(stop_ids)
        self.ids, self.logprobs, self.text, self.finish = [], [], '', None
        # A token may end mid-character, and its text may depend on the token before it. So
        # context[start:] is decoded together; what context[start:end] gives is in text already.
        self.context, self.start, self.end = list(prompt_ids), 0, len(prompt_ids)
        self.n_streamed = 0                                        # characters

    def add(self, token, logprob):
        """Take in one more id, unless the sample has ended."""
        if self.finish:
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.stop_ids:
            self.add_text()
            self.finish = self.finish or 'eos'
        elif token < self.tokenizer.n_vocab and token not in self.tokenizer.special_ids:
            self.context.append(token)
            self.add_text(whole=True)

    def add_text(self, whole=False):
        """Add the text of context[end:]; whole: only if it does not end mid-character."""
        if self.end == len(self.context):
            return
        text = self.tokenizer.decode(self.context[self.start:])
        if whole and text.endswith('\ufffd'):
            return
        in_text = self.tokenizer.decode(self.context[self.start:self.end])
        self.text += text[len(in_text):]
        self.start, self.end = self.end, len(self.context)
        places = [self.text.find(s) for s in self.stop if s in self.text]
        if places:
            self.text, self.finish = self.text[:min(places)], 'stop'

    def close(self):
        """No more tokens come."""
        if not self.finish:
            self.add_text()
            self.finish = self.finish or 'length'

    def unstreamed(self):
        """Text that this has not returned yet, but for an end that could begin a stop string."""
        n_held = 0 if self.finish else self.begun_stop()
        new = self.text[self.n_streamed:len(self.text) - n_held]
        self.n_streamed += len(new)
        return new

    def begun_stop(self):
        """How many characters at the end of text are the beginning of a stop string."""
        longest = 0
        for stop in self.stop:
            for n in range(1, len(stop)):
                if self.text.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest


def complete(model, tokenizer, prompts, max_new_tokens, stop=(), stop_ids=(), on_text=None,
             **sampling):
    """The Continuations of B prompts, lists of ids.

    on_text is called with each new piece of the first row's text. sampling: see generate.
    """
    rows = [Continuation(tokenizer, ids, stop, stop_ids) for ids in prompts]
    done = torch.zeros(len(rows), dtype=torch.bool, device=model.embed.weight.device)
    for tokens, logprobs in generate(model, prompts, max_new_tokens, stop_ids=stop_ids, done=done,
                                     **sampling):
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
            row.add(token, logprob)
        done |= torch.tensor([row.finish is not None for row in rows], device=done.device)
        if on_text:
            on_text(rows[0].unstreamed())
    for row in rows:
        row.close()
    if on_text:
        on_text(rows[0].unstreamed())
    return rows


def common_prefix(a, b):
    """How many elements two sequences share at their beginning."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
