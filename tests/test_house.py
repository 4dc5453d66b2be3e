"""The house stands: who imports whom, and every script and command that the pages name is there."""
import ast
import functools
import re
import shlex
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

UPSTAIRS = {path.stem: path for path in ROOT.glob('*.py')}
LAB = {f'lab.{path.stem}': path for path in ROOT.glob('lab/*.py') if path.stem != '__init__'}
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md'))]


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding='utf-8'))


def imported(nodes):
    """The names of our modules among what these statements import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return names & (UPSTAIRS.keys() | LAB.keys())


def anywhere(path):
    return imported(ast.walk(tree_of(path)))


def at_module_level(path):
    return imported(tree_of(path).body)


def test_no_import_goes_in_a_circle():
    graph = {name: anywhere(path) for name, path in (UPSTAIRS | LAB).items()}
    assert graph['train'] >= {'model', 'muon', 'run'} and graph['lab.sweep']     # it sees imports
    list(TopologicalSorter(graph).static_order())                # CycleError names the circle


@pytest.mark.parametrize('name', UPSTAIRS)
def test_upstairs_does_not_import_the_lab(name):
    assert not at_module_level(UPSTAIRS[name]) & LAB.keys()
    if name != 'eval':                                           # for --tasks, when asked to
        assert not anywhere(UPSTAIRS[name]) & LAB.keys()


@pytest.mark.parametrize('name', [name for name in UPSTAIRS if name != 'train'])
def test_nothing_upstairs_imports_train(name):
    assert 'train' not in anywhere(UPSTAIRS[name])


def test_configurator_imports_nothing_of_ours():
    assert not anywhere(UPSTAIRS['configurator'])


@pytest.mark.parametrize('name', UPSTAIRS | LAB)
def test_a_script_says_what_it_is(name):
    assert ast.get_docstring(tree_of((UPSTAIRS | LAB)[name]))


# --------------------------------------------------------------------------------------------------
# The pages

def commands():
    """(page, words) of each command of ours in an indented block, and in code within the text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding='utf-8').replace('\\\n', ' ')
        lines = [line.strip() for line in text.splitlines() if line.startswith('    ')]
        for fence in re.findall(r'```(?:bash|sh)?\n(.*?)```', text, re.DOTALL):
            lines += fence.splitlines()
        lines += [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', text)]
        for line in lines:
            for command in re.split(r'&&|\s#', line):
                match = re.search(r'(python|torchrun) .*(\.py|-m lab\.[a-z]).*', command)
                if match:
                    found.append((page.name, match[0].strip()))
    return sorted(set(found))


def script_and_arguments(command):
    """('train', ['--resume']) of 'torchrun ... train.py --resume'; (None, []) of none of ours."""
    words = shlex.split(command)
    for i, word in enumerate(words):
        if word.endswith('.py') and not word.startswith(('config/', 'tests/')):
            return word.removesuffix('.py'), words[i + 1:]
        if word.startswith('lab.'):
            return word, words[i + 1:]
    return None, []


@functools.cache
def knobs_of(name):
    """The knobs of a script, by name, as configurator finds them; None where it has none."""
    path = (UPSTAIRS | LAB)[name]
    if 'configurator' not in anywhere(path):
        return None
    knobs = set()
    for node in tree_of(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if isinstance(node, ast.Assign):
            knobs |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return knobs


def test_there_are_commands_to_look_at():
    assert len(commands()) > 20 and len(PAGES) > 5


@pytest.mark.parametrize('page, command', commands())
def test_a_command_of_a_page_parses(page, command):
    name, arguments = script_and_arguments(command)
    if name is None:
        return
    assert name in UPSTAIRS | LAB, f'{page}: no script {name}'
    allowed = knobs_of(name)
    if allowed is None or name == 'data_prep':
        return
    if name in ('lab.plan', 'lab.bench'):                        # which hand knobs on to train.py
        allowed = allowed | knobs_of('train') | knobs_of('lab.plan')
    for argument in arguments:
        if argument.startswith('--') and argument not in ('--help', '--model', '--model_args',
                                                          '--tasks'):
            key = argument[2:].partition('=')[0].partition('.')[0]
            assert key in allowed or f'{key}_' in allowed, f'{page}: {command}: no knob {key}'
        elif argument.startswith('config/') and argument.endswith('.py'):
            assert (ROOT / argument).exists(), f'{page}: {command}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_links_to_are_there(page):
    for target in re.findall(r'\]\(([^)#]+)[^)]*\)', page.read_text(encoding='utf-8')):
        if not re.match(r'https?:|mailto:', target):
            assert (page.parent / target).exists(), f'{page.name}: {target}'


def test_every_script_is_named_in_a_page():
    text = '\n'.join(page.read_text(encoding='utf-8') for page in PAGES)
    for name in UPSTAIRS | LAB:
        assert f'{name.removeprefix("lab.")}' in text, f'{name} is in no page'


def test_the_modules_of_the_house_are_none_of_pythons():
    assert not UPSTAIRS.keys() & sys.stdlib_module_names
