"""generate.py and sample.py: decoding on a KV cache, stop strings, batches of prompts, chat."""
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, make_chain, refused, run
from test_model import TINY, build, granite, ids, one_thread  # noqa: F401             (a fixture)

import generate
import hardware
import sample
from checkpoint import load_model
from generate import Continuation, Decoder
from tokenizer import EOS_ID, chat_prompt, get_tokenizer


def ids_of(model, prompts, n, **knobs):
    """(B, steps) ids; a seed makes the generator."""
    if 'seed' in knobs:
        knobs['generator'] = torch.Generator().manual_seed(knobs.pop('seed'))
    return torch.stack([ids for ids, _ in generate.generate(model, prompts, n, **knobs)], dim=1)


def test_cached_greedy_equals_recomputation():
    # strong branches, since with weak ones the tied embedding just repeats the last token;
    # block_size is 64, and 200 tokens cross it
    model = build(replace(TINY, residual_scale=60.0))
    prompts = [ids(TINY, n, seed=n).tolist() for n in (3, 17, 1)]
    rows = ids_of(model, prompts, 200, temperature=0).tolist()
    for prompt, row in zip(prompts, rows):
        assert len(row) == 200 and len(set(row)) > 10            # not stuck on one token
        # row by row and without cache: the logits at t are those of model(seq[:t + 1]) (causality)
        logits = model(torch.tensor([prompt + row]))[0][0]
        assert logits.argmax(-1)[len(prompt) - 1:-1].tolist() == row


def test_stopped_rows_repeat_the_stop_token():
    model = build(replace(TINY, vocab_size=8))
    prompts, knobs = [[1], [2, 3], [4, 5, 6]], {'temperature': 5.0, 'seed': 0}
    free = ids_of(model, prompts, 100, **knobs)
    ends = [row.index(7) for row in free.tolist()]               # each row's first stop token
    assert len(set(ends)) == 3 and max(ends) < 99
    stopped = ids_of(model, prompts, 100, stop_ids=[7], **knobs)
    assert stopped.size(1) == max(ends) + 1
    for row, whole, end in zip(stopped.tolist(), free.tolist(), ends):
        assert row == whole[:end] + [7] * (len(row) - end)


def test_truncation_to_one_token_is_greedy_and_a_seed_fixes_sampling():
    model, prompts = build(TINY), [[1, 2], [3]]
    greedy = ids_of(model, prompts, 30, temperature=0)
    assert torch.equal(ids_of(model, prompts, 30, top_k=1), greedy)
    assert torch.equal(ids_of(model, prompts, 30, top_p=1e-6), greedy)
    a, b, c = (ids_of(model, prompts, 30, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c) and not torch.equal(a, greedy)


@pytest.mark.parametrize('knobs, expected', [                    # of p = 0.1, 0.4, 0.05, 0.25, 0.2
    ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
    ({'top_k': 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    ({'top_k': 99}, [0.1, 0.4, 0.05, 0.25, 0.2]),
    ({'top_p': 0.7}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),   # 0.4 + 0.25 do not make 0.7
    ({'top_p': 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    ({'temperature': 0.5}, [0.01 / 0.275, 0.16 / 0.275, 0.0025 / 0.275, 0.0625 / 0.275,
                            0.04 / 0.275]),                          # p², normalised
])
def test_sample_token_draws_from_the_truncated_softmax(knobs, expected):
    n, p, expected = 20_000, torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]), torch.tensor(expected)
    logits = (p.log() + 3).expand(n, 5)
    tokens = generate.sample_token(logits, generator=torch.Generator().manual_seed(0), **knobs)
    counts = tokens.bincount(minlength=5)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((counts - n * expected)[kept] ** 2 / (n * expected)[kept]).sum()
    assert chi2 < 20                                             # 4 degrees of freedom: 1 in 2000


@pytest.mark.parametrize('knobs, kept', [                        # of p = 0.4, 0.25, 0.2, 0.1, 0.05
    ({'temperature': 2.0, 'top_p': 0.8}, 4),                     # 3 if top_p came first
    ({'temperature': 0.5, 'top_p': 0.8}, 2),                     # likewise
    ({'top_k': 3, 'top_p': 0.7}, 2),                             # 3 if it did, or of the whole mass
    ({'top_k': 2, 'top_p': 0.7}, 2),
    ({'temperature': 2.0, 'top_k': 3, 'top_p': 0.7}, 2),
    ({'temperature': 2.0, 'top_k': 4, 'top_p': 0.75}, 3),
    ({'temperature': 0.5, 'top_k': 3, 'top_p': 0.95}, 3),
])
def test_knobs_of_sampling_together_draw_as_transformers_in_float64(knobs, kept):
    transformers = pytest.importorskip('transformers')
    p = torch.tensor([0.25, 0.05, 0.4, 0.1, 0.2])
    scores = (p.double().log() + 3)[None]
    scores = transformers.TemperatureLogitsWarper(knobs.get('temperature', 1.0))(None, scores)
    if 'top_k' in knobs:
        scores = transformers.TopKLogitsWarper(knobs['top_k'])(None, scores)
    expected = transformers.TopPLogitsWarper(knobs['top_p'])(None, scores)[0].softmax(-1)
    assert expected.count_nonzero() == kept
    n = 20_000
    logits = (p.log() + 3).expand(n, 5)
    tokens = generate.sample_token(logits, generator=torch.Generator().manual_seed(0), **knobs)
    counts = tokens.bincount(minlength=5)
    assert torch.equal(counts > 0, expected > 0)
    allowed = expected > 0
    chi2 = ((counts - n * expected) ** 2 / (n * expected))[allowed].sum()
    assert chi2 < 20                                             # 4 degrees of freedom: 1 in 2000


def test_log_probabilities_are_those_of_the_whole_distribution():
    model = build(TINY)
    prompt, drawn = [3, 5, 7], []
    for token, logprob in generate.generate(model, [prompt], 20, 0.7, top_k=5,
                                            generator=torch.Generator().manual_seed(0)):
        drawn.append((token.item(), logprob.item()))
    text = [*prompt, *(token for token, _ in drawn)]
    right = model.double()(torch.tensor([text]))[0][0].log_softmax(-1)
    for at, (token, logprob) in enumerate(drawn, len(prompt) - 1):
        assert abs(right[at, token].item() - logprob) < 1e-4


def test_bf16_decodes_as_transformers_granite_in_bf16():
    pytest.importorskip('transformers')
    c = replace(TINY, residual_scale=60.0)
    exact, model = build(c), build(c).to(torch.bfloat16)
    theirs = granite(exact)[0].to(torch.bfloat16)
    for layer in theirs.model.layers:
        layer.residual_multiplier = 60.0 / c.n_layer**0.5
    text = [ids(TINY, 9, seed=n).tolist() for n in (1, 2)]
    decoder, far = Decoder(model, torch.zeros(2, dtype=torch.long)), 0
    new = torch.tensor(text)
    for _ in range(20):
        logits = decoder(new)
        assert decoder.caches[0].k.dtype == torch.bfloat16 and logits.dtype == torch.float32
        with torch.no_grad():
            right = exact(torch.tensor(text))[0][:, -1]
            rounded = theirs(torch.tensor(text)).logits[:, -1].float()
        error, their_error = ((x - right).norm() for x in (logits, rounded))
        assert 0 < error < 2 * their_error + 1e-3 * right.norm()
        best = right.topk(2).values
        clear = best[:, 0] - best[:, 1] > 4 * (rounded - right).abs().amax()
        assert (logits.argmax(-1) == right.argmax(-1))[clear].all()
        far += int(clear.sum())
        new = right.argmax(-1, keepdim=True)
        text = [row + [token] for row, token in zip(text, new[:, 0].tolist())]
    assert far > 10                                              # argmaxes were compared


def test_auto_is_bf16_where_the_hardware_has_it(monkeypatch):
    for units, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(hardware, 'has_bf16', lambda device, units=units: units)
        assert generate.weights_dtype('auto', 'cpu') == expected
    assert generate.weights_dtype('bfloat16', 'cpu') == torch.bfloat16


@pytest.mark.parametrize('rows, N, K', [(1, 64, 32), (8, 96, 40), (3, 60, 32), (40, 64, 32)])
def test_a_product_in_slices_is_the_product(rows, N, K):
    x, weight = torch.randn(rows, 1, K), torch.randn(N, K)
    right = x.double() @ weight.double().T
    assert torch.allclose(generate.sliced_linear(x, weight).double(), right, atol=1e-5)


def test_a_text_read_in_parts_is_the_text_read_at_once():
    model, text = build(TINY), ids(TINY, 2, 50)
    whole = Decoder(model, torch.tensor([0, 4]))
    right = whole(text)
    parts = Decoder(model, torch.tensor([0, 4]))
    parts.reserve(1)
    parts.max_len = 7                                             # so that room is made again
    for cache in parts.caches:
        cache.k, cache.v = cache.k[:, :, :7].clone(), cache.v[:, :, :7].clone()
    parts.keys = parts.keys[:7]
    for part in text.split((7, 1, 1, 30, 11), dim=1):
        got = parts(part)
    assert torch.allclose(got, right, atol=1e-4 * right.abs().max())
    assert parts.end == 50
    parts.end = 20                                                # back to an earlier place
    again = parts(text[:, 20:])
    assert torch.allclose(again, right, atol=1e-4 * right.abs().max())


def test_a_text_without_padding_is_read_in_parts_as_well():
    model, text = build(TINY), ids(TINY, 2, 50)
    no_padding = torch.zeros(2, dtype=torch.long)
    right, parts = Decoder(model, no_padding)(text), Decoder(model, no_padding)
    for part in text.split((20, 1, 29), dim=1):
        got = parts(part)
    assert torch.allclose(got, right, atol=1e-4 * right.abs().max())


def test_compiled_steps_draw_the_same_tokens(monkeypatch):
    steps, real = [], torch.compile

    def counting(f, **how):
        compiled = real(f, **how)
        return lambda *args: (steps.append(1), compiled(*args))[1]

    monkeypatch.setattr(torch, 'compile', counting)
    model = build(replace(TINY, n_layer=1, residual_scale=60.0))
    for prompts in ([ids(TINY, n, seed=n).tolist() for n in (3, 17)], [[5], [7]]):
        eager = ids_of(model, prompts, 30, temperature=0)
        assert not steps
        assert torch.equal(ids_of(model, prompts, 30, temperature=0, compiled=True), eager)
        assert len(steps) == 30 - (len(prompts[0]) > 1)          # but for the reading of a prompt
        steps.clear()


def told(tokens, stop, tokenizer, stop_ids=(EOS_ID,)):
    """(text in the pieces in which it was told, the Continuation) of tokens one by one."""
    row, pieces = Continuation(tokenizer, [], stop, stop_ids), []
    for token in tokens:
        row.add(token, 0.0)
        pieces.append(row.unstreamed())
    row.close()
    return [*pieces, row.unstreamed()], row


@pytest.mark.parametrize('text, stop, expected, finish', [
    ('one two three', [], 'one two three', 'length'),
    ('one two three', [' two'], 'one', 'stop'),
    ('one two three', ['wo th'], 'one t', 'stop'),               # across tokens
    ('one two three', ['three', 'two'], 'one ', 'stop'),         # the first of them in the text
    ('one two three', ['three and'], 'one two three', 'length'),  # begins, and is not ended
    ('we need it', ['eed'], 'we n', 'stop'),                     # begins with its own beginning
    ('we need it', ['ex', 'need'], 'we ', 'stop'),               # two begin, one before the other
    ('we need it', ['need', 'ex'], 'we ', 'stop'),
    ('日本語', ['本'], '日', 'stop'),                              # characters of several tokens
])
def test_a_stop_string_ends_the_text_and_is_never_told(text, stop, expected, finish):
    tokenizer = get_tokenizer(259)                               # a token is a byte
    pieces, row = told(tokenizer.encode_ordinary(text), stop, tokenizer)
    assert (row.text, row.finish, ''.join(pieces)) == (expected, finish, expected)
    if not stop:                                                 # nothing to wait for
        assert pieces[:3] == ['o', 'n', 'e']


@pytest.mark.parametrize('stop, expected', [
    (['ee', 'th'], 'one two '), (['th', 'ee'], 'one two '),      # both lie in the token
    (['three', 'two three'], 'one '), (['two three', 'three'], 'one '),      # or end with it
    (['hre', 'e two three', 'ree'], 'on')])
def test_of_stop_strings_that_one_token_completes_the_earliest_in_the_text_ends_it(stop, expected):
    tokenizer = get_tokenizer(16_384)
    tokens = tokenizer.encode_ordinary('one two three')
    assert tokenizer.decode(tokens[-1:]) == ' three'
    pieces, row = told(tokens, stop, tokenizer)
    assert (row.text, row.finish, ''.join(pieces)) == (expected, 'stop', expected)
    assert row.ids == tokens


def test_what_ends_a_continuation():
    tokenizer = get_tokenizer(259)
    a, b = tokenizer.encode_ordinary('ab')
    pieces, row = told([a, EOS_ID, b], [], tokenizer)
    assert (row.text, row.finish, row.ids) == ('a', 'eos', [a, EOS_ID])
    pieces, row = told([a, 0, 300, b], [], tokenizer)             # specials and padding are no text
    assert (row.text, row.finish) == ('ab', 'length')
    pieces, row = told(tokenizer.encode_ordinary('é')[:1], [], tokenizer)
    assert row.text == '\ufffd' == ''.join(pieces)               # half a character, at the end
    pieces, row = told([*tokenizer.encode_ordinary('a\ufffd'), EOS_ID, b], [], tokenizer)
    assert row.text == 'a\ufffd' == ''.join(pieces) and row.finish == 'eos'
    assert told([a, b, a], [], tokenizer, (a, b))[1].ids == [a]   # several ids may end it
    tokenizer = get_tokenizer()
    ids = tokenizer.encode('<think>a', allowed_special='all')      # added, and yet text
    assert len(ids) == 2 and told([*ids, 0], [], tokenizer)[1].text == '<think>a'


def test_no_step_is_made_for_a_row_that_has_met_a_stop_string(tmp_path):
    tokenizer, steps = get_tokenizer(259), []
    a, b, c, d = tokenizer.encode_ordinary('abcd')               # a token is a byte
    model, _ = load_model(make_chain(tmp_path, [a, b, c, d], 259))

    class Counting(Decoder):
        def __call__(self, idx):
            steps.append(idx.tolist())
            return super().__call__(idx)

    decoder = Counting(model, torch.zeros(2, dtype=torch.long))
    rows = generate.complete(model, tokenizer, [[a], [b]], 50, ['cd'], decoder=decoder,
                             temperature=0.0)
    assert [(row.text, row.finish) for row in rows] == [('b', 'stop'), ('', 'stop')]
    # the second row repeats its last token while the first goes on
    assert steps == [[[a], [b]], [[b], [c]], [[c], [d]]]


# --- the script ---

def lines(process):
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.strip().split('\n')]


@pytest.fixture(scope='module')
def batch(tmp_path_factory):
    file = tmp_path_factory.mktemp('batch') / 'b.jsonl'
    file.write_text('{"prompt": "import os", "id": "a\u2028b"}\n\n'
                    '{"prompt": "Question: Tom has 3 apples."}\n'
                    '{"messages": [{"role": "user", "content": "Hi"}]}\n', encoding='utf-8')
    return file


def test_a_batch_answers_each_prompt_as_it_would_alone(tiny_run, batch):
    greedy = ('--temperature=0.0', '--max_new_tokens=12', '--format=json')
    rows = lines(run('sample.py', tiny_run, f'--batch={batch}', '--batch_size=2', *greedy))
    prompts = ['import os', 'Question: Tom has 3 apples.', 'User: Hi\n\nAssistant:']
    assert [row['prompt'] for row in rows] == prompts and rows[0]['id'] == 'a\u2028b'
    assert rows == lines(run('sample.py', tiny_run, '--batch=-', '--batch_size=2', *greedy,
                             stdin=batch.read_text(encoding='utf-8')))
    model, _ = load_model(tiny_run)
    tokenizer = get_tokenizer(512)
    for row in rows:
        text = tokenizer.encode_ordinary(row['prompt'])
        for token, logprob in zip(row['ids'], row['logprobs'], strict=True):
            right = model(torch.tensor([text]))[0][0, -1].log_softmax(-1)
            assert right.argmax() == token and abs(right[token] - logprob) < 1e-4
            text.append(token)
        assert row['finish'] == 'length' and tokenizer.decode(row['ids']) == row['text']
    texts = run('sample.py', tiny_run, f'--batch={batch}', *greedy[:2])
    assert texts.stdout == ('-' * 80 + '\n').join(f'{r["prompt"]}{r["text"]}\n' for r in rows)
    in_twos = run('sample.py', tiny_run, f'--batch={batch}', *greedy[:2], '--batch_size=2')
    assert in_twos.stdout == texts.stdout


def test_each_way_to_take_the_likeliest_token_alone(tiny_run):
    ways = ['--temperature=0.0'], ['--temperature=9.0', '--top_k=1'], ['--top_p=0.00001']
    told = [run('sample.py', tiny_run, '--max_new_tokens=20', *way).stdout for way in ways]
    assert told[0] == told[1] == told[2] and len(told[0]) > len('def ')
    free = run('sample.py', tiny_run, '--max_new_tokens=20', *ways[1][:1])
    assert free.stdout != told[0]


def test_an_answer_ends_where_the_model_ends_its_document(tmp_path):
    prompt, word, other = (get_tokenizer(512).encode_ordinary(text)[-1] for text in 'aXY')
    chain = make_chain(tmp_path, [prompt, word, EOS_ID, other])
    row, = lines(run('sample.py', chain, '--prompt=a', '--format=json', '--max_new_tokens=9'))
    assert (row['text'], row['ids'], row['finish']) == ('X', [word, EOS_ID], 'eos')


def test_the_answer_stands_in_the_place_of_a_field_that_a_batchs_line_had(tmp_path):
    prompt, word = (get_tokenizer(512).encode_ordinary(text)[-1] for text in 'aX')
    chain = make_chain(tmp_path / 'run', [prompt, word, EOS_ID])
    asked = {'prompt': 'a', 'text': 'a reference', 'finish': 'never', 'ids': [], 'id': 7}
    (tmp_path / 'b.jsonl').write_text(json.dumps(asked))
    row, = lines(run('sample.py', chain, f'--batch={tmp_path / "b.jsonl"}', '--format=json'))
    assert (row['text'], row['ids'], row['finish']) == ('X', [word, EOS_ID], 'eos')
    assert (row['prompt'], row['id']) == ('a', 7)                # the rest comes back


def test_samples_and_stop_strings(tiny_run, batch):
    args = (tiny_run, f'--batch={batch}', '--num_samples=2', '--max_new_tokens=30',
            '--format=json', '--temperature=1.5')
    rows = lines(run('sample.py', *args))
    assert [row['prompt'] for row in rows[::2]] == [row['prompt'] for row in rows[1::2]]
    assert len(rows) == 6 and rows[0]['ids'] != rows[1]['ids']
    assert rows == lines(run('sample.py', *args))                # a seed fixes all
    stop = rows[0]['text'][5:8]
    again = lines(run('sample.py', *args, f'--stop={[stop]!r}'))
    assert again[0]['text'] == rows[0]['text'].partition(stop)[0] and again[0]['finish'] == 'stop'
    assert rows[0]['ids'][:len(again[0]['ids'])] == again[0]['ids']


def test_chat_answers_with_all_that_was_said_before(tiny_run, tmp_path):
    greedy = ('--temperature=0.0', '--max_new_tokens=15', '--format=json')
    said = ['Hello there.', 'What is 2 + 3?', 'And 4?']
    answers = lines(run('sample.py', tiny_run, '--chat', *greedy, stdin='\n\n'.join(said) + '\n'))
    turns, stop = [], '--stop=["\\n\\nUser:"]'
    for text, answer in zip(said, answers, strict=True):
        turns.append({'role': 'user', 'content': text})
        assert answer['prompt'] == chat_prompt(turns)
        (tmp_path / 'b.jsonl').write_text(json.dumps({'messages': turns}))
        alone, = lines(run('sample.py', tiny_run, f'--batch={tmp_path / "b.jsonl"}', *greedy, stop))
        assert alone['ids'] == answer['ids'] and alone['text'] == answer['text']
        turns.append({'role': 'assistant', 'content': answer['text'].strip()})
    plain = run('sample.py', tiny_run, '--chat', *greedy[:2], stdin=said[0])
    assert plain.stdout == answers[0]['text'] + '\n'


def test_a_chat_reads_only_what_is_new(tiny_run, monkeypatch, capsys):
    read = []

    class Recording(Decoder):
        def __call__(self, idx):
            read.append(idx.size(1))
            return super().__call__(idx)

    monkeypatch.setattr(sample, 'Decoder', Recording)
    monkeypatch.setattr(sample, 'format', 'json')
    monkeypatch.setattr(sample, 'max_new_tokens', 6)
    monkeypatch.setattr(sys, 'stdin', io.StringIO('Hello there, you.\nWhat is 2 + 3?\n'))
    sample.converse(load_model(tiny_run)[0], get_tokenizer(512), {
        'max_new_tokens': 6, 'temperature': 0.0})
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first, second = (len(get_tokenizer(512).encode_ordinary(row['prompt'])) for row in rows)
    assert read[:6] == [first, 1, 1, 1, 1, 1] and len(read) == 12
    assert read[6] < second - first + 3                          # an answer may be encoded anew


def test_the_last_token_of_an_answer_is_read_in_the_next_turn(tmp_path, monkeypatch, capsys):
    tokenizer, held = get_tokenizer(512), []                     # held: what stands in the columns
    colon, = tokenizer.encode_ordinary(':')
    word, = tokenizer.encode_ordinary(' the')

    class Recording(Decoder):
        def __call__(self, idx):
            held[self.end:] = idx[0].tolist()
            assert len(held) == self.end + idx.size(1)           # no column was skipped
            return super().__call__(idx)

    monkeypatch.setattr(sample, 'Decoder', Recording)
    monkeypatch.setattr(sample, 'format', 'json')
    monkeypatch.setattr(sample, 'max_new_tokens', 1)
    monkeypatch.setattr(sys, 'stdin', io.StringIO('Hello\nAnd\n'))
    model, _ = load_model(make_chain(tmp_path, [colon, word]))
    sample.converse(model, tokenizer, {'max_new_tokens': 1, 'temperature': 0.0})
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first['ids'] == second['ids'] == [word]
    assert second['prompt'].startswith(f'{first["prompt"]} the\n\nUser: And')
    assert held == tokenizer.encode_ordinary(second['prompt'])


def test_a_long_chat_forgets_its_oldest_turns_but_not_what_it_was_told_before(tiny_run):
    said = [f'{i}: a long way to say nothing' for i in range(12)]
    done = run('sample.py', tiny_run, '--chat', '--max_new_tokens=10', '--format=json',
               '--system=Be brief.', stdin='\n'.join(said))
    answers, encode = lines(done), get_tokenizer(512).encode_ordinary
    assert len(answers) == 12
    turns, kept = [], []
    for text, answer in zip(said, answers):
        # what is said now, and as many of the turns before as leave room for ten tokens in the 128
        # of block_size: whole ones, the newest, and not one fewer
        prompts = [''.join(('System: Be brief.\n\n', *turns[len(turns) - n:],
                            f'User: {text}\n\nAssistant:')) for n in range(len(turns) + 1)]
        fits = [n for n, prompt in enumerate(prompts) if len(encode(prompt)) + 10 <= 128]
        assert fits == list(range(len(fits)))
        kept.append(fits[-1])
        assert answer['prompt'] == prompts[kept[-1]]
        turns.append(f'User: {text}\n\nAssistant: {answer["text"].strip()}\n\n')
    full = next(i for i, n in enumerate(kept) if n < i)
    assert 2 < full < 10 and min(kept[1:]) >= 1                  # some are, and never all
    assert done.stderr.splitlines() == ['(the oldest turn is forgotten)'] * (11 - kept[-1])


def test_a_chat_forgets_nothing_while_there_is_room_for_one_token_more(tiny_run):
    greedy = ('--chat', '--max_new_tokens=10', '--format=json', '--temperature=0.0')
    first, = lines(run('sample.py', tiny_run, *greedy, stdin='Hello there.'))
    before = f'User: Hello there.\n\nAssistant: {first["text"].strip()}\n\n'
    encode = get_tokenizer(512).encode_ordinary
    for tokens, forgotten in ((118, ''), (119, '(the oldest turn is forgotten)\n')):
        # a question that makes it so many, of 128, of which 10 are for the answer
        text = next(text for text in ('q' * n + '?' for n in range(128))
                    if len(encode(f'{before}User: {text}\n\nAssistant:')) == tokens)
        done = run('sample.py', tiny_run, *greedy, stdin=f'Hello there.\n{text}\n')
        assert done.stderr == forgotten
        assert lines(done)[1]['prompt'] == \
            f'{"" if forgotten else before}User: {text}\n\nAssistant:'


@pytest.mark.parametrize('content, why', [
    (None, 'No such file'), ('', 'holds no prompt'), ('{"prompt": "a"}\n{"prompt"\n', 'line 2'),
    ('{"prompt": ""}', 'line 1'), ('[1]', 'line 1'), ('{"messages": [{"role": "user"}]}', 'line 1'),
    ('{"messages": []}', 'line 1'), ('{"prompt": 5}', 'line 1'), (b'\xff\xfe', 'UTF-8')])
def test_a_batch_that_cannot_be_read_is_one_line(tiny_run, tmp_path, content, why):
    file = tmp_path / 'b.jsonl'
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(run('sample.py', tiny_run, f'--batch={file}'))
    assert str(file) in line and why in line


def test_a_closed_standard_input_is_one_line(tiny_run):
    for args in (['--chat'], ['--batch=-']):
        line = refused(run('sample.py', tiny_run, *args, preexec_fn=lambda: os.close(0)))
        assert 'standard input is closed' in line


@pytest.mark.parametrize('args, why', [
    (['--stop=[""]'], 'stop'), (['--stop=[1]'], 'stop'), (['--stop=abc'], 'stop'),
    (['--format=xml'], 'format'), (['--batch_size=0'], 'batch_size'),
    (['--chat', '--batch=x.jsonl'], '--chat'), (['--chat', '--num_samples=2'], '--chat')])
def test_wrong_knobs_are_one_line(tiny_run, args, why):
    assert why in refused(run('sample.py', tiny_run, *args))


def test_a_turn_that_does_not_fit_is_told(tiny_run):
    question = 'q' * 400
    done = run('sample.py', tiny_run, '--chat', '--max_new_tokens=10', stdin=f'{question}\n')
    n = len(get_tokenizer(512).encode_ordinary(f'User: {question}\n\nAssistant:')) + 10
    assert n > 128 and done.returncode == 0
    assert f'this turn may have {n} tokens, and the model is meant for 128' in done.stderr
    done = run('sample.py', tiny_run, '--chat', '--max_new_tokens=10', stdin='Hello\n')
    assert 'this turn' not in done.stderr


def sample_run(*args, text=b'', output=subprocess.PIPE, **env):
    """(exit code, what it has told) of sample.py with these bytes as standard input."""
    done = subprocess.run([sys.executable, ROOT / 'sample.py', *args], input=text, stdout=output,
                          stderr=subprocess.PIPE, cwd=ROOT, check=False, env=os.environ | env)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize('args, text, env, says', [
    (['--prompt=-'], b'\xff', {'PYTHONIOENCODING': 'utf-8:strict'}, 'standard input is not utf-8'),
    (['--prompt=\udcff'], b'', {}, 'the prompt is not UTF-8'),
    (['--prompt=caf\xe9'], b'', {'PYTHONIOENCODING': 'ascii'},
     'standard output takes ascii alone; with PYTHONUTF8=1')])
def test_text_that_has_no_encoding_is_one_line(tiny_run, args, text, env, says):
    args = [tiny_run, '--max_new_tokens=5', *args]
    code, error = sample_run(*args, text=text, PYTHONUTF8='1', **env)
    assert code == 2 and error.startswith(f'sample.py: {says}') and error.count('\n') == 1


def test_a_full_or_closed_standard_output_is_one_line(tiny_run):
    reader, writer = os.pipe()
    os.close(reader)
    assert sample_run(tiny_run, '--max_new_tokens=5', output=writer)[0] == 0     # as of `head`
    os.close(writer)
    with open('/dev/full', 'w') as full:
        code, error = sample_run(tiny_run, '--max_new_tokens=5', output=full)
    assert code == 2 and error == 'sample.py: standard output: No space left on device\n'
    line = refused(run('sample.py', tiny_run, preexec_fn=lambda: os.close(1)))
    assert 'standard output is closed' in line


def test_what_a_device_cannot_do_is_one_line(tiny_run, monkeypatch, capsys):
    def load(*args):
        raise RuntimeError('out of memory\nmore of it')
    monkeypatch.setattr(sample, 'checkpoint', str(tiny_run))
    monkeypatch.setattr(sample, 'load_model', load)
    with pytest.raises(SystemExit):
        sample.main()
    error = capsys.readouterr().err
    assert "device='cpu' cannot be used here: out of memory\n" in error and error.count('\n') == 1


def test_another_tokenizer_has_no_chat_and_may_have_no_token(tiny_run, tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    shutil.copy(tiny_run / 'step_20.pt', tmp_path)
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}))     # and no unknown word
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    theirs.save(str(tmp_path / 'tokenizer.json'))
    line = refused(run('sample.py', tmp_path, '--chat'))
    assert 'has a tokenizer of its own, with a chat template that is not read' in line
    line = refused(run('sample.py', tmp_path, '--prompt= '))
    assert "its tokenizer has no token for ' '" in line
