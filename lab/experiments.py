"""The experiments of lab/ablate.py: which runs each of them compares.

Each is a function of train.py's knobs as config/ablation.py has them, without the phases that have
no steps. It returns its comparisons; its docstring is the question.
"""
from pathlib import Path
from typing import NamedTuple


class Arm(NamedTuple):
    """Runs that are alike but for seed and learning rate.

    start: where they begin.
        ''                at step 0
        'stable'          at the end of the stable phase
        'fresh'           there, without the optimizer's state
        'embedding kept'  there, with AdamW's state of embedding and gains alone
        'decayed'         at the end of the decay
        (75, 150)         at the end of a stable phase of 75 steps that was extended to 150
    """
    name: str
    flags: tuple = ()            # train.py's
    start: str | tuple = ''
    guess: int = 0               # power of two, times the config's learning rate, to try first
    tuned: bool = True           # False: the guess stays
    also: tuple = ()             # names of other arms that it is compared with


class Comparison(NamedTuple):
    """Arms that are compared with the first of them, and with what their `also` names."""
    name: str
    arms: list
    probe: str = ''              # what to measure on the checkpoints, see measure_checkpoint


# a decay by AdamW, from the learning rate of the config's stable phase
ADAMW = ('--phases.decay.optimizer=adamw', '--phases.decay.lr=(0, 0.5, 0.03125)')


def decay_arms(knobs, times=1):
    """(AdamW, Muon): decays of `times` the config's batch size, and as many tokens."""
    _, decay = knobs['phases']
    sizes = (f'--phases.decay.batch={round(decay["batch"] * times)}',
             f'--phases.decay.steps={round(decay["steps"] / times)}')
    return (Arm('AdamW', (*sizes, *ADAMW), 'stable'),
            Arm('Muon, fresh state', sizes, 'stable'))


def decay_optimizer(knobs):
    """Does the decay phase gain by going over to Muon, or by a fresh start? At which batch size?"""
    _, decay = knobs['phases']
    comparisons = []
    for times in (1 / 4, 1, 4, 8):
        adamw, muon = decay_arms(knobs, times)
        comparisons.append(Comparison(
            f'{round(decay["batch"] * times) * decay["block_size"]} tokens a step', [
                adamw,
                adamw._replace(name='AdamW, fresh state', start='fresh'),
                muon._replace(also=('AdamW, fresh state',)),
                muon._replace(name="Muon, embedding's state kept", start='embedding kept',
                              also=('Muon, fresh state',))]))
    return comparisons


def switch_timing(knobs):
    """Is the decay the time to go over to Muon, or would an earlier switch gain more?

    There is one stable phase by AdamW, extended from one switch to the next.
    """
    stable, _ = knobs['phases']
    switches = {share: round(stable['steps'] * share) for share in (0, 0.25, 0.5, 0.75, 1)}

    def start(share):
        return tuple(n for n in switches.values() if 0 < n <= switches[share]) or ''

    arms = [Arm('AdamW throughout', ADAMW, start(1))]
    for share in reversed(switches):
        before = switches[share]
        flags = [f'--phases.stable.steps={before}',
                 f'--phases.stable_muon.steps={stable["steps"] - before}']
        if not before:
            flags.append(f'--phases.stable_muon.warmup={stable["warmup"]}')
        later_switch = (arms[-1].name,) if len(arms) > 1 else ()    # the first is AdamW
        arms.append(Arm(f'Muon from {share:.0%} of the stable phase on', tuple(flags),
                        start(share), also=later_switch))
    return [Comparison('when to switch', arms)]


def sft_timing(knobs):
    """Is it better to see the instruction data in the decay phase alone, throughout, or before it?
    All arms read as many tokens of sums, and as many of text; all with AdamW."""
    stable, decay = knobs['phases']
    n_stable, n_decay = (phase['steps'] * phase['batch'] * phase['block_size']
                         for phase in (stable, decay))
    n_sums = decay['data']['arith'] * n_decay

    def arm(name, in_stable, in_decay):
        """An arm with these tokens of sums in each of the phases."""
        mixtures = {'stable': in_stable / n_stable, 'decay': in_decay / n_decay}
        weights = tuple(f'--phases.{phase}.data.{data}={weight!r}'
                        for phase, share in mixtures.items()
                        for data, weight in (('arith', share), ('stdlib', 1 - share)))
        return Arm(name, (*ADAMW, *weights))
    share = n_sums / (n_stable + n_decay)
    return [Comparison('sums', [arm('in the decay phase', 0.0, n_sums),
                                arm('throughout', share * n_stable, share * n_decay),
                                arm('in the stable phase', n_sums, 0.0)])]


# text alone; train.py refuses a source that no phase reads, and the data set is there already
TEXT = ('--sources={}', '--phases.decay.data={"stdlib": 1.0}')


def phase_steps(knobs, times, share):
    """(stable steps, decay steps) of `times` the config's tokens, of which decay has this share."""
    stable, decay = knobs['phases']
    total = times * (stable['steps'] + decay['steps'])
    n_decay = round(total * share)
    return round(total) - n_decay, n_decay


def phase_flags(n_stable, n_decay):
    """Flags of a run with these steps."""
    return (f'--phases.stable.steps={n_stable}', f'--phases.decay.steps={n_decay}')


def cosine(knobs, times):
    """Flags of a run of one phase, a cosine after the warmup, with `times` the config's tokens."""
    n_steps, _ = phase_steps(knobs, times, 0)
    peak = knobs['phases'][0]['lr'][1]
    return (*TEXT, '--phases.decay.steps=0', f'--phases.stable.steps={n_steps}',
            '--phases.stable.decay=cosine', f'--phases.stable.lr=(0, {peak}, {peak / 16!r})',
            '--phases.stable.embedding_lr=(0, 1, 0.0625)')


def schedule(knobs):
    """Does a stable phase with a short decay reach what a cosine over all steps reaches? How short
    may the decay be? AdamW and text alone.

    There is one stable phase, extended from one decay's onset to the next; a cosine is made anew
    for each length.
    """
    shares_of = {1 / 2: (0.2,), 1: (0.05, 0.1, 0.2, 0.4), 2: (0.2,)}
    onsets = sorted({phase_steps(knobs, times, share)[0]
                     for times, shares in shares_of.items() for share in shares})
    comparisons = []
    for times, shares in shares_of.items():
        arms = [Arm('cosine', cosine(knobs, times))]
        for share in shares:
            n_stable, n_decay = phase_steps(knobs, times, share)
            flags = (*ADAMW, *TEXT, *phase_flags(n_stable, n_decay))
            start = tuple(n for n in onsets if n <= n_stable)
            shorter_decay = (arms[-1].name,) if len(arms) > 1 else ()   # the first is the cosine
            arms.append(Arm(f'WSD, decay {share:.0%}', flags, start, also=shorter_decay))
        comparisons.append(Comparison(f'{times:g} x the tokens', arms))
    return comparisons


def no_steps(phase):
    """Flags of a run that ends where it began, as train.py has none: one step at rate 0."""
    return (f'--phases.{phase}.steps=1', f'--phases.{phase}.lr=(0, 0, 0)',
            f'--phases.{phase}.embedding_lr=(0, 0, 0)')


def long_context(knobs):
    """Does a phase of long texts raise the perplexity of text while tasks improve? From what: the
    mixture, the length, or the schedule? All start from one decayed checkpoint."""
    _, decay = knobs['phases']
    T, batch = 4 * decay['block_size'], decay['batch'] // 4
    steps = round(decay['steps'] * 0.75)

    def arm(name, T, batch, mixture, *more, also=()):
        return Arm(name, (f'--sources.recall={recall_file(knobs)}', f'--phases.long.steps={steps}',
                          f'--phases.long.block_size={T}', f'--phases.long.batch={batch}',
                          f'--phases.long.data={mixture}', *more),
                   'decayed', tuned=False, also=also)

    keys = {'recall': 0.34, 'arith': 0.33, 'stdlib': 0.33}
    # a source that no phase reads is refused, so its weight is 0
    no_keys = {'recall': 0.0, 'arith': 0.67, 'stdlib': 0.33}
    text = {'recall': 0.0, 'stdlib': 1.0}
    short, short_batch = decay['block_size'], decay['batch']
    return [Comparison('the long phase', [
        arm('no more steps', T, batch, keys, '--phases.long.warmup=0', *no_steps('long')),
        arm('long', T, batch, keys),
        arm('short, most keys cut off', short, short_batch, keys, also=('long',)),
        arm('long, without keys', T, batch, no_keys, also=('long',)),
        arm('short, without keys', short, short_batch, no_keys, also=('long, without keys',)),
        arm('long, text alone', T, batch, text, also=('long, without keys',)),
        arm('long, no warmup', T, batch, keys, '--phases.long.warmup=0', also=('long',)),
        # from the rate at which the decay began, not from that at which it ended
        arm('long, 16 x the rate', T, batch, keys, '--phases.long.lr=(0, 1, 0.1)',
            '--phases.long.embedding_lr=(0, 1, 0.1)', also=('long',))], 'length')]


def why_muon(knobs):
    """Why does Muon's decay end where it ends: in AdamW's basin, in a flatter place, with other
    spectra, with rare tokens learned? And which of its matrices matter?"""
    adamw, muon = decay_arms(knobs)
    attention, ffn = (muon._replace(name=f'Muon for {part} alone',
                                    flags=(*muon.flags, f'--variant=muon_for_{part}'))
                      for part in ('attention', 'ffn'))
    ffn = ffn._replace(also=(attention.name,))
    return [Comparison('ends of the decay', [adamw, muon, attention, ffn], 'landscape')]


def steps(knobs):
    """Trained on sums of 1 to 3 steps, which of 1 to 6 are solved, before and after the decay?"""
    adamw, muon = decay_arms(knobs)
    before = Arm('before the decay, no sums read yet', no_steps('decay'), 'stable', tuned=False)
    return [Comparison('sums of more steps', [adamw, muon, before], 'steps')]


RECIPE_BUDGETS = (1, 0.8, 0.6, 0.4)                              # of the tokens


def recipe(knobs):
    """How many of the tokens does this recipe need to reach the loss of nanoGPT's: standard
    parametrisation, AdamW, cosine? Text alone."""
    share_of_decay = 0.4
    arms = [Arm("nanoGPT's recipe", ('--mup_rules=sp', *cosine(knobs, 1)), guess=-2)]
    arms += [Arm(f'this recipe, {times:.0%} of the tokens',
                 (*TEXT, *phase_flags(*phase_steps(knobs, times, share_of_decay))))
             for times in RECIPE_BUDGETS]
    return [Comparison('text', arms)]


def recall_file(knobs):
    """The texts of keys told early and asked late, which ablate.py makes: see probe.recall."""
    return Path(f'{knobs["data_dir"]}-recall.jsonl')


EXPERIMENTS = {function.__name__: function
               for function in (decay_optimizer, switch_timing, sft_timing, schedule, long_context,
                                why_muon, steps, recipe)}
