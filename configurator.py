"""Knobs: a script's plain globals, overridden by config files and then by --key=value.

    python train.py config/proxy20m.py config/mine.py --learning_rate=0.02 --resume
    python train.py config/proxy20m.py --phases.decay.optimizer=adamw --sources.mytext=DIR

Knobs are the lower-case globals of plain type that a script assigns above its first function or
class. A config file is Python and is executed, so run none that you have not read: it sees the
knobs as the files before it left them; a name that it assigns is a knob's or begins with _.
Flags are never executed; dots reach into dicts and, by the entry's name, lists of named dicts.
A value keeps the type of the default (an int will do for a float), or is one of the choices with
which the knob's comment begins, as in `dtype = 'auto'  # 'auto' | 'float32': of matmuls`.
"""
import ast
import copy
import difflib
import keyword
import math
import os
import re
import reprlib
import shlex
import sys
import traceback
from contextlib import suppress
from pathlib import Path

KNOB_TYPES = (bool, int, float, str, list, dict, tuple)
PATH_KNOB = r'.*_dir|.*_path|.*_from|folder|reference|checkpoint|batch|source|target|out|png'
CHOICE = r"(?:'[^']*'|True|False|-?\d+(?:\.\d+)?)"


def fail(message, exit_code=2):
    """End the program, for a user's mistake or Ctrl-C: `SCRIPT.py: message` in one line."""
    print(f'{Path(sys.argv[0]).name}:', *str(message).splitlines(), file=sys.stderr)
    sys.exit(exit_code)


def check_range(knobs, low, high, *names):
    """End the program in one line unless low <= knobs[name] < high for each name; NaN is not."""
    for name in names:
        if not low <= knobs[name] < high:
            below = f' and below {high:g}' if high < math.inf else ''
            fail(f'{name}={knobs[name]} should be at least {low}{below}')


def int_list(name, text, least=1):
    """'64,128' -> [64, 128]; ends the program in one line with fewer than `least` distinct ones."""
    if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', text) or len(set(text.split(','))) < least:
        fail(f'{name}={text!r} should be at least {least} whole numbers, such as 64,128,256')
    return [int(number) for number in text.split(',')]


def assigned(tree):
    """{name: line} of all names to which the code in tree assigns."""
    return {node.id: node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def read_knobs(script):
    """({knob: its choices, [] for any value}, the source lines that show them) of a script.

    script: its globals. Knobs stand above the first function or class.
    """
    source = Path(script['__file__']).read_text(encoding='utf-8').splitlines()
    choices, shown = {}, {0}
    for node in ast.parse('\n'.join(source)).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            break
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        for name in assigned(node):
            if name[0] == '_' or not name.islower() or type(script.get(name)) not in KNOB_TYPES:
                continue
            match = re.search(rf'# ({CHOICE}(?: \| {CHOICE})+)', source[node.lineno - 1])
            choices[name] = []
            if match:
                choices[name] = [ast.literal_eval(choice) for choice in match[1].split(' | ')]
            shown |= set(range(node.lineno, node.end_lineno + 1))
    last = max(shown)
    lines = [line for n, line in enumerate(source, 1)
             if n in shown or (line.startswith('# --- ') and n < last)]
    return choices, lines


def knob_values(script):
    """{knob: value} as they stand: what a script stores to say how it was run."""
    return {name: script[name] for name in read_knobs(script)[0]}


def unknown(key, known):
    """The ValueError for a key that is not among the known ones."""
    near = difflib.get_close_matches(key, map(str, known), 1, 0)
    hint = f', the nearest is {near[0]!r}' if near else ''
    return ValueError(f'unknown key {key!r}{hint}')


def expand_home(name, value):
    """value, with the home folder for ~ if the knob `name` holds a path."""
    if isinstance(value, str) and re.fullmatch(PATH_KNOB, name):
        expanded = os.path.expanduser(value)
        if expanded == value and value[:1] == '~':
            raise ValueError(f'{value!r} begins with ~ and no user of this machine')
        return expanded
    return value


def convert(value, like, choices=()):
    """value if it is one of the choices or, where there are none, of the type of like (None: any).

    An int becomes a float where like is one. ValueError for any other value.
    """
    if choices:
        if (type(value), value) not in [(type(choice), choice) for choice in choices]:
            raise ValueError(f'{value!r} should be one of {", ".join(map(repr, choices))}')
    elif type(like) is float and type(value) is int:
        return float(value)
    elif like is not None and type(value) is not type(like):
        expected = {bool: 'True or False', list: 'a list, such as ["a", "b"]'}.get(
            type(like), f'of type {type(like).__name__}')
        raise ValueError(f'{reprlib.repr(value)} should be {expected}')
    return value


def parse_value(text, like, choices):
    """The value that a flag's text means, of the type of like; True: a flag without text."""
    for choice in choices:
        if str(choice) == str(text):
            return choice
    value = text
    if not choices and not isinstance(like, str):
        python = {'true': 'True', 'false': 'False'}.get(text, text)
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(python)
    return convert(value, like, choices)


def put(old, keys, text, choices=(), record=None):
    """A copy of old in which the entry that keys lead to is what a flag's text says (True: none).

    A record is a dict with no keys but those it has or finds in `record`: a dict in a list, which
    may have the keys of its neighbours. Other dicts take new keys, with values of the type there.
    """
    if not keys:
        return parse_value(text, old, choices or ())
    key, *rest = keys
    if isinstance(old, list) and all(isinstance(entry, dict) and 'name' in entry for entry in old):
        names = [entry['name'] for entry in old]
        if key not in names:
            raise unknown(key, names)
        record = {k: v for entry in old for k, v in entry.items()}
        new = list(old)
        for i, name in enumerate(names):
            if name == key:
                new[i] = put(old[i], rest, text, (), record)
        return new
    known = {**(record or {}), **old} if isinstance(old, dict) else {}
    may_be_new = isinstance(old, dict) and record is None and not rest
    if key not in known and not may_be_new:
        raise unknown(key, known)
    like = known.get(key, next(iter(old.values()), None))
    return {**old, key: put(like, rest, text, choices)}


def run_config(file, values):
    """(what the config file leaves behind, {name: line} of what it assigns), given these knobs."""
    if not Path(file).is_file():
        near = difflib.get_close_matches(file, map(str, Path(file).parent.glob('*.py')), 1)
        hint = f'; the nearest is {near[0]}' if near else ''
        raise ValueError(f'there is no such file{hint}')
    space = {'__file__': file, **copy.deepcopy(values)}
    try:
        tree = ast.parse(Path(file).read_bytes(), file)
        exec(compile(tree, file, 'exec'), space)  # noqa: S102
    except (Exception, SystemExit) as e:                         # a config ends no program
        lines = [getattr(e, 'lineno', None) or 1]
        lines += [frame.lineno for frame in traceback.extract_tb(e.__traceback__)
                  if frame.filename == file]
        message = getattr(e, 'msg', e)
        raise ValueError(f'line {lines[-1]}: {type(e).__name__}: {message}') from e
    return space, assigned(tree)


def configure(script, argv=None, default=None, positional=()):
    """Override the knobs among a script's globals() in place: first by config files, then by flags.

    default: the config file, beside the script, where none is given. positional: the knobs that
    arguments set, in turn, which are neither flag nor .py. A mistake ends the program in one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    choices, shown = read_knobs(script)
    if '--help' in argv or '-h' in argv:
        print(script.get('__doc__') or '', 'Knobs, to be set by --key=value:', *shown, sep='\n')
        sys.exit(0)
    values = {name: script[name] for name in choices}
    files = [arg for arg in argv if arg.endswith('.py') and arg[0] != '-']
    flags = [arg for arg in argv if arg not in files]
    if not files and default:
        files = [str(Path(script['__file__']).parent / default)]
    for file in files:
        values = apply_config(file, values, choices)
    positional = list(positional)
    for i, flag in enumerate(flags):
        place = flag
        try:
            if positional and flag[:1] != '-':
                name = positional.pop(0)
                values[name] = convert(expand_home(name, flag), values[name])
                continue
            if flag[:2] != '--':
                raise ValueError('should be --key=value or a config file (.py)')
            key, given, text = flag[2:].partition('=')
            if not given:
                place += ' (without =VALUE)'
            key += '_' * keyword.iskeyword(key)                  # --break sets the knob break_
            text = expand_home(key, text) if given else True
            values = put(values, key.split('.'), text, choices.get(key), {})
        except ValueError as e:
            fail(f'{place}: {e}{phase_hint(flag, values)}{space_hint(flags, i, values)}')
    script.update(values)


def apply_config(file, values, choices):
    """The values as a config file changes them; a mistake in it ends the program in one line."""
    values, place = dict(values), file                           # place: to name in an error
    try:
        space, lines = run_config(file, values)
        for key, value in space.items():
            place = f'{file}: line {lines.get(key, 1)}: {key}'
            if key in values:
                values[key] = convert(expand_home(key, value), values[key], choices[key])
            elif key in lines and key[0] != '_':
                raise ValueError(f"{unknown(key, values)}; a helper's name begins with _")
    except ValueError as e:
        fail(f'{place}: {e}')
    return values


def phase_hint(flag, values):
    """Where an unknown flag names what phases hold, such as --batch_size=8, how to write it."""
    key, _, text = flag.lstrip('-').partition('=')
    key = {'batch_size': 'batch', 'max_iters': 'steps', 'warmup_iters': 'warmup'}.get(key, key)
    phases = values.get('phases')
    if key in values or not phases or key not in phases[0]:
        return ''
    return f'; each phase has its own: --phases.{phases[0]["name"]}.{key}={text}'


def space_hint(flags, i, known):
    """Where flag number i is wrong since a space is in the place of =, how to write it; or ''."""
    before, after = i, i + 1
    if flags[i][:1] != '-':
        before, after = i - 1, i
    if before < 0 or after == len(flags) or flags[after][:1] == '-':
        return ''
    if flags[before][:2] != '--' or '=' in flags[before]:
        return ''
    if flags[before][2:].split('.')[0] not in known:
        return ''
    return f'; without a space: {flags[before]}={shlex.quote(flags[after])}'
