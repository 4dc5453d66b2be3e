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
import re
import reprlib
import sys
import traceback
from contextlib import suppress
from pathlib import Path

CHOICE = r"(?:'[^']*'|True|False|-?\d+(?:\.\d+)?)"


def fail(message):
    """End the program for a user's mistake: `SCRIPT.py: message` in one line, exit code 2."""
    print(f'{Path(sys.argv[0]).name}:', *str(message).splitlines(), file=sys.stderr)
    sys.exit(2)


def check_range(knobs, low, high, *names):
    """End the program in one line unless low <= knobs[name] < high for each name; NaN is not."""
    for name in names:
        if not low <= knobs[name] < high:
            below = f' and below {high:g}' if high < math.inf else ''
            fail(f'{name}={knobs[name]} should be at least {low}{below}')


def int_list(name, text, least=1):
    """'64,128' -> [64, 128]; ends the program in one line unless it is `least` or more of them."""
    if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', text) or len(set(text.split(','))) < least:
        fail(f'{name}={text!r} should be at least {least} whole numbers, such as 64,128,256')
    return [int(number) for number in text.split(',')]


def assigned(tree):
    """{name: line} of all names to which the code in tree assigns."""
    return {node.id: node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def read_knobs(knobs):
    """({knob: its choices, [] for any value}, the source lines that show them) of a script."""
    source = Path(knobs['__file__']).read_text(encoding='utf-8')
    lines, choices, shown = source.splitlines(), {}, [0]
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            break
        for name in assigned(node) if isinstance(node, (ast.Assign, ast.AnnAssign)) else ():
            if name[0] != '_' and name.islower() and \
                    type(knobs.get(name)) in (bool, int, float, str, list, dict, tuple):
                m = re.search(rf'# ({CHOICE}(?: \| {CHOICE})+)', lines[node.lineno - 1])
                choices[name] = [ast.literal_eval(c) for c in m[1].split(' | ')] if m else []
                shown += range(node.lineno, node.end_lineno + 1)
    return choices, [line for i, line in enumerate(lines, 1)
                     if i in shown or line.startswith('# --- ') and i < shown[-1]]


def knob_values(knobs):
    """{knob: value} as they stand: what a script stores to say how it was run."""
    return {name: knobs[name] for name in read_knobs(knobs)[0]}


def unknown(key, known):
    near = difflib.get_close_matches(key, map(str, known), 1, 0)
    return ValueError(f'unknown key {key!r}' + (f', the nearest is {near[0]!r}' if near else ''))


def convert(value, like, choices=()):
    """value if it is one of the choices or, where there are none, of the type of like."""
    if choices:
        if (type(value), value) not in [(type(c), c) for c in choices]:
            raise ValueError(f'{value!r} should be one of {", ".join(map(repr, choices))}')
    elif type(like) is float and type(value) is int:
        return float(value)
    elif like is not None and type(value) is not type(like):
        kind = {bool: 'True or False', list: 'a list, such as ["a", "b"]'}.get(
            type(like), f'of type {type(like).__name__}')
        raise ValueError(f'{reprlib.repr(value)} should be {kind}')
    return value


def put(old, keys, text, choices=(), record=None):
    """A copy of old in which the entry that keys lead to is what a flag's text says (True: none).

    A record is a dict with no keys but those it has or finds in `record`: a dict in a list, which
    may have the keys of its neighbours. Other dicts take new keys, with values of the type there.
    """
    if not keys:
        value = {str(c): c for c in choices or ()}.get(str(text), text)
        if not choices and not isinstance(old, str):
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                value = ast.literal_eval({'true': 'True', 'false': 'False'}.get(text, text))
        return convert(value, old, choices)
    key, *rest = keys
    if isinstance(old, list) and all(isinstance(d, dict) and 'name' in d for d in old):
        if key not in [d['name'] for d in old]:
            raise unknown(key, [d['name'] for d in old])
        record = {k: v for d in old for k, v in d.items()}
        return [put(d, rest, text, (), record) if d['name'] == key else d for d in old]
    known = {**(record or {}), **old} if isinstance(old, dict) else {}
    if key not in known and (rest or record is not None or not isinstance(old, dict)):
        raise unknown(key, known)
    return {**old, key: put(known.get(key, next(iter(old.values()), None)), rest, text, choices)}


def run_config(file, values):
    """(what the config file leaves behind, {name: line} of what it assigns), given these knobs."""
    if not Path(file).is_file():
        near = difflib.get_close_matches(file, map(str, Path(file).parent.glob('*.py')), 1)
        raise ValueError('there is no such file' + (f'; the nearest is {near[0]}' if near else ''))
    space = {'__file__': file, **copy.deepcopy(values)}
    try:
        tree = ast.parse(Path(file).read_bytes(), file)
        exec(compile(tree, file, 'exec'), space)  # noqa: S102
    except (Exception, SystemExit) as e:                         # a config ends no program
        lines = [getattr(e, 'lineno', None) or 1] + [
            at.lineno for at in traceback.extract_tb(e.__traceback__) if at.filename == file]
        raise ValueError(f'line {lines[-1]}: {type(e).__name__}: {getattr(e, "msg", e)}') from e
    return space, assigned(tree)


def configure(knobs, argv=None, default=None, positional=()):
    """Override the knobs among a script's globals() in place: first by config files, then by flags.

    default: the config file, beside the script, where none is given. positional: the knobs that
    arguments set, in turn, which are neither flag nor .py. A mistake ends the program in one line.
    """
    argv, script = sys.argv[1:] if argv is None else argv, knobs['__file__']
    choices, shown = read_knobs(knobs)
    if '--help' in argv or '-h' in argv:
        print(knobs.get('__doc__') or '', 'Knobs, to be set by --key=value:', *shown, sep='\n')
        sys.exit(0)
    values = {name: knobs[name] for name in choices}
    files = [a for a in argv if a.endswith('.py') and a[0] != '-']
    try:
        for file in files or ([str(Path(script).parent / default)] if default else []):
            at = file                                            # the place to name in an error
            space, lines = run_config(file, values)
            for key, value in space.items():
                at = f'{file}: line {lines.get(key, 1)}: {key}'
                if key in values:
                    values[key] = convert(value, values[key], choices[key])
                elif key in lines and key[0] != '_':
                    raise ValueError(f"{unknown(key, values)}; a helper's name begins with _")
        for at in (a for a in argv if a not in files):
            if positional and at[:1] != '-':
                name, *positional = positional
                values[name] = convert(at, values[name])
                continue
            key, given, text = at[2:].partition('=')
            key += '_' * keyword.iskeyword(key)                  # --break sets the knob break_
            if at[:2] != '--':
                raise ValueError('should be --key=value or a config file (.py)')
            at += '' if given else ' (without =VALUE)'
            values = put(values, key.split('.'), text if given else True, choices.get(key), {})
    except ValueError as e:
        fail(f'{at}: {e}')
    knobs.update(values)
