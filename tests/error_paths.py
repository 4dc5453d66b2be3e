"""For each `except`, `fail` and `raise` of the scripts: a test that reaches it, or none.

    python tests/error_paths.py        # runs the suite in a copy whose error paths leave notes

results/error_paths.md lists them with one test each, those that no test reaches first. A copy, and
not a coverage tool, since workers that are killed, or end by os._exit, would take what such a tool
had counted with them. (A bare `raise` counts with its `except`.)
"""
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / 'results/error_paths.md'
# leaves the first test that comes by in a file of its own, and is false
NOTE = """; _note = lambda n: (
    __import__('os').path.exists(f'{0}/{{n}}') or open(f'{0}/{{n}}', 'w').write(
        __import__('os').environ.get('PYTEST_CURRENT_TEST', '')), None)[1]"""


def error_paths(source):
    """[(line, column, kind, line to show, function)] of a script, from the last to the first.

    Line and column are where a note can be put: in an `except`, before its first statement.
    """
    found = []

    def visit(node, function):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = node.name
        if isinstance(node, ast.ExceptHandler):
            first = node.body[0]
            found.append((first.lineno, first.col_offset, 'except', node.lineno, function))
        elif isinstance(node, ast.Raise) and node.exc:
            found.append((node.exc.lineno, node.exc.col_offset, 'raise', node.lineno, function))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and \
                node.func.id == 'fail':
            found.append((node.lineno, node.col_offset, 'fail', node.lineno, function))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), 'module')
    return sorted(found, reverse=True)


def with_notes(source, name, notes):
    """(a script whose error paths leave notes in a folder, {number of the note: what it is})."""
    lines, about = source.splitlines(), {}
    for row, column, kind, shown, function in error_paths(source):
        number = f'{name.replace("/", ".")}.{row}.{kind}'
        about[number] = (name, shown, function, lines[shown - 1].strip())
        before, after = lines[row - 1][:column], lines[row - 1][column:]
        if kind == 'except':                       # a statement that has a body wants its own line
            is_block = re.match(r'(if|for|while|with|try|match)\b', after)
            end = '\n' + before if is_block else '; '
            lines[row - 1] = f'{before}_note({number!r}){end}{after}'
        elif kind == 'raise':
            lines[row - 1] = f'{before}_note({number!r}) or {after}'
        else:
            lines[row - 1] = f'{before}(_note({number!r}) or {after[:4]}){after[4:]}'
    docstring = ast.parse(source).body[0].end_lineno
    lines[docstring - 1] += NOTE.format(notes)
    return '\n'.join(lines) + '\n', about


def main():
    about = {}
    with tempfile.TemporaryDirectory() as folder:
        notes, copy = Path(folder, 'notes'), Path(folder, 'copy')
        notes.mkdir()
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            '.venv', '.git', '__pycache__', 'data', 'out*', '*.pt'))
        for path in [*copy.glob('*.py'), *copy.glob('lab/*.py')]:
            source = path.read_text(encoding='utf-8')
            if path.name != '__init__.py':
                text, mine = with_notes(source, f'{path.relative_to(copy)}', notes)
                path.write_text(text, encoding='utf-8')
                about |= mine
        # what a fork server starts does not know, by its environment, in which test it is
        conftest = copy / 'tests/conftest.py'
        text = conftest.read_text(encoding='utf-8')
        name = "'PYTEST_CURRENT_TEST': os.environ['PYTEST_CURRENT_TEST']"
        for old, new in (('args=(argv, cwd, files)', f'args=(argv, cwd, files, {{{name}}})'),
                         ("'MASTER_PORT': f'{port}'", f"'MASTER_PORT': f'{{port}}', {name}")):
            assert old in text
            text = text.replace(old, new)
        conftest.write_text(text, encoding='utf-8')
        subprocess.run([sys.executable, '-m', 'pytest', '-q', '-n', '2', '--dist', 'loadfile',
                        '-p', 'no:cacheprovider', *sys.argv[1:]], cwd=copy, check=True)
        reached = {file.name: file.read_text() for file in notes.iterdir()}
    rows = []
    for number, (name, line, function, code) in about.items():
        test = 'none'
        if number in reached:                      # of a parametrized test, without its parameters
            test = re.sub(r' \(\w+\)$|\[.*', '', reached[number]) or 'in a process of its own'
        rows.append((test != 'none', name, line, function, code, test))
    with open(TABLE, 'w', encoding='utf-8') as f:
        f.write('| script | function | error path | test |\n| --- | --- | --- | --- |\n')
        for _, name, _, function, code, test in sorted(rows):
            code = code.split('  #')[0].rstrip().replace('|', '\\|')
            f.write(f'| {name} | {function} | `{code}` | {test} |\n')
    n_none = sum(not row[0] for row in rows)
    print(f'{len(rows)} error paths, {n_none} of which no test reaches: {TABLE}')


if __name__ == '__main__':
    main()
