"""configurator.py: what overrides what, which types pass, and one line for every mistake."""
import copy
import math
import os
import subprocess
import sys

import pytest

import configurator
from configurator import check_range, configure, fail, int_list, knob_values

SCRIPT = '''"""What the script does."""
import os
from pathlib import Path

# --- run ---
out_dir = 'out/run'     # folder of this run
resume = False          # go on
seed = 1337
# --- model ---
lr: float = 0.01        # peak
beta1, beta2 = 0.9, 0.95
dtype = 'auto'          # 'auto' | 'bfloat16': of matmuls
compile = 'auto'        # 'auto' | True | False: the blocks
device = 'auto'         # 'auto' takes whichever is there
shape = (1, 2)
sources = {}
phases = [              # the curriculum
    {'name': 'stable', 'steps': 10, 'data': {'a': 1.0}, 'warmup': 2},
    {'name': 'decay', 'steps': 5, 'data': {'a': 1.0}, 'optimizer': 'muon'},
]
LIMIT = 3
_hidden = 4
folder = Path('.')
# --- no knobs here ---

def main():
    pass

later = 5
'''
KNOBS = ['out_dir', 'resume', 'seed', 'lr', 'beta1', 'beta2', 'dtype', 'compile', 'device', 'shape',
         'sources', 'phases']


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*argv, **config files) configures a fresh copy of SCRIPT and returns its globals."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['train.py'])

    def run(*argv, default=None, positional=(), **files):
        for name, text in files.items():
            (tmp_path / f'{name}.py').write_text(text)
        (tmp_path / 'train.py').write_text(SCRIPT)
        run.knobs = {'__file__': str(tmp_path / 'train.py')}
        exec(SCRIPT, run.knobs)  # noqa: S102
        configure(run.knobs, list(argv), default, positional)
        return run.knobs
    return run


@pytest.fixture
def error(run, capsys):
    """error(...) is run(...) for a mistake: returns the one line, having checked that it is one."""
    def error(*argv, **kwargs):
        with pytest.raises(SystemExit) as e:
            run(*argv, **kwargs)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count('\n') == 1 and err.startswith('train.py: ')
        fresh = {}
        exec(SCRIPT, fresh)  # noqa: S102
        assert all(run.knobs[name] == fresh[name] for name in KNOBS), 'half configured'
        return err[len('train.py: '):-1]
    return error


def test_knobs_are_what_the_script_assigns_above_its_first_function(run):
    assert list(knob_values(run())) == KNOBS
    assert knob_values(run('--seed=7'))['seed'] == 7


def test_flags_take_the_type_of_the_default(run):
    k = run('--out_dir=3', '--resume', '--seed=-1_000', '--lr=1e-3', '--beta2=1', '--shape=(3,)',
            "--sources={'a': 'b'}")
    assert (k['out_dir'], k['resume'], k['seed'], k['lr'], k['shape'], k['sources']) == \
        ('3', True, -1000, 0.001, (3,), {'a': 'b'})
    assert type(k['beta2']) is float and k['beta2'] == 1
    for text, value in {'true': True, 'True': True, 'false': False, 'False': False}.items():
        assert run(f'--resume={text}')['resume'] is value
    assert run('--out_dir=a=b c')['out_dir'] == 'a=b c' and run('--out_dir=')['out_dir'] == ''


def test_a_knob_called_as_a_keyword_ends_in_an_underscore(tmp_path):
    (tmp_path / 'script.py').write_text("break_ = ''\n")
    knobs = {'__file__': str(tmp_path / 'script.py'), 'break_': ''}
    configure(knobs, ['--break=x'])
    assert knobs['break_'] == 'x'


@pytest.mark.parametrize('text, least, right', [
    ('64', 1, [64]), ('64,128', 2, [64, 128]), ('64', 2, None), ('', 1, None), ('0', 1, None),
    ('64,', 1, None), ('64,64', 2, None), ('-1,2', 1, None), ('1.5', 1, None)])
def test_int_list(capsys, text, least, right):
    if right:
        assert int_list('widths', text, least) == right
        return
    with pytest.raises(SystemExit):
        int_list('widths', text, least)
    assert f'widths={text!r} should be' in capsys.readouterr().err


@pytest.mark.parametrize('value, right', [
    (0, True), (0.5, True), (-1e-9, False), (1, False), (math.inf, False), (-math.inf, False),
    (math.nan, False)])
def test_check_range_takes_the_lower_bound_and_leaves_the_upper(capsys, value, right):
    knobs = {'beta1': 0.9, 'beta2': value}
    if right:
        assert check_range(knobs, 0, 1, 'beta1', 'beta2') is None
        return
    with pytest.raises(SystemExit):
        check_range(knobs, 0, 1, 'beta1', 'beta2')
    assert f'beta2={value} should be at least 0 and below 1' in capsys.readouterr().err


def test_the_last_of_repeated_flags_wins(run):
    assert run('--seed=1', '--seed=2')['seed'] == 2


def test_choices_stand_in_the_comment(run, error):
    assert run('--compile=False')['compile'] is False and run('--compile')['compile'] is True
    assert run('c.py', c='compile = True')['compile'] is True
    assert run('--device=cuda:1')['device'] == 'cuda:1'
    assert error('--dtype=bf16') == "--dtype=bf16: 'bf16' should be one of 'auto', 'bfloat16'"
    assert error('c.py', c='compile = 1') == \
        "c.py: line 1: compile: 1 should be one of 'auto', True, False"


def test_files_in_order_then_flags_wherever_they_stand(run):
    k = run('--seed=9', 'a.py', 'b.py', a='seed, lr = 1, 0.5', b='lr = lr / 2; out_dir = "b"')
    assert (k['seed'], k['lr'], k['out_dir']) == (9, 0.25, 'b')


def test_a_config_may_compute_import_and_keep_helpers(run):
    k = run('a.py', a='import math\nfrom math import pi\ndef twice(x): return 2 * x\n'
                      '_n = twice(3)\nseed = _n\nlr = round(pi)\nphases[0]["steps"] = 77')
    assert k['seed'] == 6 and type(k['lr']) is float and k['phases'][0]['steps'] == 77
    assert 'twice' not in k and '_n' not in k and 'pi' not in k


def test_the_default_config_stands_beside_the_script_and_yields_to_a_named_one(run, tmp_path,
                                                                               monkeypatch):
    files = {'a': 'seed = 1', 'b': 'lr = 2.0'}
    assert run('--lr=3', default='a.py', **files)['seed'] == 1
    assert run('b.py', default='a.py', **files)['seed'] == 1337
    knobs = run(**files)
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir('elsewhere')
    configure(knobs, [], default='a.py')
    assert knobs['seed'] == 1


def test_dots_reach_into_phases_and_maps(run):
    k = run('--phases.decay.steps=7', '--phases.stable.data.b=1', '--sources.text=/some/path',
            '--phases.stable.optimizer=adamw')       # a key of another phase
    stable, decay = k['phases']
    assert decay == {'name': 'decay', 'steps': 7, 'data': {'a': 1.0}, 'optimizer': 'muon'}
    assert stable['data'] == {'a': 1.0, 'b': 1.0} and stable['optimizer'] == 'adamw'
    assert type(stable['data']['b']) is float and k['sources'] == {'text': '/some/path'}


def test_a_mixture_that_phases_share_changes_in_the_named_one_alone(run):
    config = '_mix = {"a": 1.0}\nphases = [{"name": n, "data": _mix} for n in ("p", "q")]'
    p, q = run('a.py', '--phases.p.data.a=0.5', a=config)['phases']
    assert p['data'] == {'a': 0.5} and q['data'] == {'a': 1.0}


def test_positional(run, error):
    assert run('out/x', '--seed=1', positional=['out_dir'])['out_dir'] == 'out/x'
    assert error('out/x', 'out/y', positional=['out_dir']).startswith('out/y: ')
    knobs = run('cpu', '--seed=1', 'out/x', positional=['device', 'out_dir'])
    assert (knobs['device'], knobs['out_dir'], knobs['seed']) == ('cpu', 'out/x', 1)


@pytest.mark.parametrize('flag, line', {
    '--sed=1': "--sed=1: unknown key 'sed', the nearest is 'seed'",
    '--LIMIT=1': '--LIMIT=1: unknown key',
    '--_hidden=1': '--_hidden=1: unknown key',
    '--later=1': '--later=1: unknown key',
    '--seed=1e3': '--seed=1e3: 1000.0 should be of type int',
    '--seed=True': '--seed=True: True should be of type int',
    '--seed=': "--seed=: '' should be of type int",
    '--seed=__import__("os")': '--seed=__import__("os"): ',
    '--lr': "--lr (without =VALUE): True should be of type float",
    '--lr=True': '--lr=True: True should be of type float',
    '--lr=fast': "--lr=fast: 'fast' should be of type float",
    '--resume=1': '--resume=1: 1 should be True or False',
    '--shape=[1]': '--shape=[1]: [1] should be of type tuple',
    '--seed': '--seed (without =VALUE): ',
    '--out_dir': '--out_dir (without =VALUE): ',
    '--phases.decoy.steps=1': "--phases.decoy.steps=1: unknown key 'decoy', the nearest is 'decay'",
    '--phases.decay.step=1': "--phases.decay.step=1: unknown key 'step', the nearest is 'steps'",
    '--phases.decay.steps=1.5': '--phases.decay.steps=1.5: 1.5 should be of type int',
    '--phases.decay.steps.x=1': "--phases.decay.steps.x=1: unknown key 'x'",
    '--phases.decay.data.b=c': "--phases.decay.data.b=c: 'c' should be of type float",
    '-x': '-x: should be --key=value or a config file (.py)',
    'out/x': 'out/x: should be --key=value or a config file (.py)',
    '': ': should be --key=value or a config file (.py)',
    'nowhere.py': 'nowhere.py: there is no such file',
}.items())
def test_mistakes_on_the_command_line(error, flag, line):
    assert error('--lr=5', flag).startswith(line)


@pytest.mark.parametrize('config, line', {
    'lr = 1\n\nsede = 2': "line 3: sede: unknown key 'sede', the nearest is 'seed'",
    'seed = 2\nlr = "fast"': "line 2: lr: 'fast' should be of type float",
    'for i in range(3):\n    pass': "line 1: i: unknown key 'i'",
    'seed = 2\nseed = 1 / 0': 'line 2: ZeroDivisionError: division by zero',
    'def f():\n    raise OSError("a\\nb")\nf()': 'line 2: OSError: a b',
    'seed = 2\nlr = (': 'line 2: SyntaxError: ',
    'import nowhere_at_all': 'line 1: ModuleNotFoundError: ',
}.items())
def test_mistakes_in_a_config(error, config, line):
    assert error('a.py', a=config).startswith(f'a.py: {line}')


def test_a_mistake_leaves_the_knobs_as_they_were(error):
    assert error('--phases.decay.steps=7', '--seed=x')
    assert error('a.py', a='phases[0]["steps"] = sources["a"] = 7\nseed = 1 / 0')


def test_help_shows_the_knobs_as_the_source_has_them(run, capsys):
    with pytest.raises(SystemExit) as e:
        run('--help')
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith('What the script does.\n')
    knobs = SCRIPT[SCRIPT.index('# --- run'):SCRIPT.index('LIMIT')]
    assert out.endswith('\n' + knobs)


def test_fail_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['/some/where/eval.py'])
    with pytest.raises(SystemExit) as e:
        fail(ValueError('a\nb'))
    assert e.value.code == 2 and capsys.readouterr().err == 'eval.py: a b\n'


def test_as_a_program(tmp_path):
    main = 'from configurator import configure\nconfigure(globals())\nprint(seed, lr)\n'
    (tmp_path / 'train.py').write_text(SCRIPT + main)
    (tmp_path / 'a.py').write_text('seed = 5')
    env = {**os.environ, 'PYTHONPATH': os.path.dirname(configurator.__file__)}

    def go(*argv):
        return subprocess.run([sys.executable, 'train.py', *argv], cwd=tmp_path, env=env,
                              check=False, capture_output=True, text=True)
    done = go('a.py', '--lr=2')
    assert (done.returncode, done.stdout, done.stderr) == (0, '5 2.0\n', '')
    done = go('a.py', '--lr', '2')
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1


def script_of(folder, **knobs):
    """The globals of a script with these knobs, which is written to a folder."""
    text = ''.join(f'{key} = {value!r}\n' for key, value in knobs.items())
    (folder / 'script.py').write_text(text)
    return {'__file__': str(folder / 'script.py'), **copy.deepcopy(knobs)}


def test_the_home_folder_in_paths_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    (tmp_path / 'config.py').write_text("include_path = '~/tasks'\n")

    def knobs_after(*argv, positional=()):
        knobs = script_of(tmp_path, out_dir='out/x', include_path='', init_from='', prompt='',
                          sources={})
        configure(knobs, list(argv), positional=positional)
        return knob_values(knobs)
    assert knobs_after('--out_dir=~/x', '--prompt=~/x', str(tmp_path / 'config.py'),
                       '--sources.a=~/x', '--init_from=x/~') == {
        'out_dir': '/home/me/x', 'include_path': '/home/me/tasks', 'init_from': 'x/~',
        'prompt': '~/x', 'sources': {'a': '~/x'}}
    assert knobs_after('~', positional=['out_dir'])['out_dir'] == '/home/me'
    with pytest.raises(SystemExit):
        knobs_after('--out_dir=~nobody-of-this-name/x')


@pytest.mark.parametrize('flag, hint', [
    ('--batch_size=8', '--phases.stable.batch=8'), ('--batch=8', '--phases.stable.batch=8'),
    ('--max_iters=9', '--phases.stable.steps=9'), ('--warmup_iters=9', '--phases.stable.warmup=9'),
    ('--colour=9', '')])
def test_what_phases_hold_is_not_a_knob(tmp_path, capsys, flag, hint):
    phases = [{'name': 'stable', 'steps': 5, 'batch': 2, 'warmup': 0}]
    knobs = script_of(tmp_path, phases=phases)
    with pytest.raises(SystemExit):
        configure(knobs, [flag])
    error = capsys.readouterr().err
    assert f'{flag}: unknown key' in error and error.count('\n') == 1
    assert error.endswith(f'; each phase has its own: {hint}\n') == bool(hint)
    configure(knobs, ['--phases.stable.batch=8'])
    assert knobs['phases'][0]['batch'] == 8
