"""The page of an experiment of lab/ablate.py: its result, a dict as in NAME.json, as tables."""
import statistics

LEGEND = ('± is half of the 95 % interval. Less the first: the mean of the differences, seed by '
          'seed. lr x: the factor on the config\'s learning rates of matrices and gains; where a '
          'run starts from a checkpoint, on those after it.')
COLUMNS = {'text': 'loss of text', 'sums': 'loss of sums', 'both': 'loss of the mixture',
           'solved': 'sums solved'}


def markdown(result):
    """The page of a result: question, command, and a table for each comparison."""
    warning = 'Of --quick: the figures mean nothing. ' if result['quick'] else ''
    lines = [f'# {result["name"]}', '', result['question'], '', f'`{result["command"]}`', '',
             f'{result["model"]}.', '']
    if result['kind'] == 'signatures':
        return '\n'.join([*lines, f'{warning}{result["seeds"]} seeds.', '',
                          *table_of_signs(result['signs']), ''])
    cost = (f'{result["runs"]} runs, {result["hours"]:.2g} hours of a core, with any search of '
            'learning rates, without the checkpoints that runs start from')
    lines += [f'{warning}{result["seeds"]} seeds; {cost}.', LEGEND, '']
    for name, table in result['comparisons'].items():
        lines += [f'## {name}', '', *table_of_arms(table), '', *table_of_probes(table)]
    if share := result.get('share_of_tokens'):
        of_tokens = show('solved', *share)
        lines += [f"This recipe reaches the loss of nanoGPT's with {of_tokens} of the tokens.", '']
    return '\n'.join(lines)


def table_of_arms(table):
    """Lines of a table of a comparison: means, then differences from the first arm, an arm a row.

    Below it, its differences from other arms that it is compared with.
    """
    keys = columns_of([table])
    head = ['arm', 'lr x', *(COLUMNS[key] for key in keys),
            *(f'{COLUMNS[key]}, less the first' for key in keys)]
    lines = [line_of(*head), f'|{" --- |" * len(head)}']
    for arm, row in table.items():
        diverged = row['runs'].count(None)
        of_all = f' ({diverged} of {len(row["runs"])} runs diverged)' if diverged else ''
        lines.append(line_of(arm + of_all, f'{2.0**row["exponent"]:g}',
                             *cells(keys, row.get('mean', {}), show),
                             *cells(keys, row.get('difference', {}), show_difference)))
        for other, difference in row.get('also', {}).items():
            lines.append(line_of(f'the same, less {other}', '', *cells(keys, {}, show),
                                 *cells(keys, difference, show_difference)))
    return lines


def measures_of(table):
    """What was measured on a comparison's checkpoints, beside losses and solved sums."""
    keys = dict.fromkeys(key for row in table.values() for key in row.get('mean', ()))
    return [key for key in keys if key not in COLUMNS]


def table_of_probes(table):
    """Lines of a table of what was measured on the checkpoints: a measure a row, an arm a column.

    After each mean, in brackets, the difference from the first.
    """
    keys = measures_of(table)
    if not keys:
        return []
    lines = [line_of('on the checkpoints', *table), f'|{" --- |" * (1 + len(table))}']
    for key in keys:
        of_arms = []
        for row in table.values():
            (cell,) = cells([key], row.get('mean', {}), show)
            (difference,) = cells([key], row.get('difference', {}), show_difference)
            of_arms.append(f'{cell} ({difference})' if difference else cell)
        lines.append(line_of(key, *of_arms))
    return [*lines, '']


def table_of_signs(signs):
    """Lines of a table of the signs of failure, rows of signatures.provoke."""
    head = ('sign', 'look at', 'provoked by', 'said so', 'steps later, median', 'the log says',
            'without it, said anything')
    lines = [line_of(*head), f'|{" --- |" * len(head)}']
    for row in signs:
        later = f'{statistics.median(row["steps_later"]):g}' if row['seen'] else ''
        lines.append(line_of(row['sign'], row['look_at'], row['provoked_by'],
                             f'{row["seen"]} of {row["seeds"]} runs', later, row['says'],
                             f'{len(row["calm"])} of {row["seeds"]} runs'))
    return lines


def line_of(*texts):
    return f'| {" | ".join(texts)} |'


def cells(keys, intervals, in_words):
    """The interval of each key as text; '' where there is none."""
    return [in_words(key, *intervals[key]) if key in intervals else '' for key in keys]


def columns_of(tables):
    """The keys of COLUMNS that tables have; the mixture's only where it is not that of text."""
    rows = [row for table in tables for row in table.values()]
    keys = [key for key in COLUMNS if any(key in row.get('mean', ()) for row in rows)]
    return keys if 'sums' in keys else [key for key in keys if key != 'both']


def is_share(key):
    return key.endswith(('solved', 'errors'))


def show(key, mean, error, half):
    """A mean with half of its 95 % interval, as text; shares in per cent."""
    if is_share(key):
        return f'{mean:.1%} ± {100 * half:.1f}'
    digits = digits_after_the_point(mean)
    return f'{mean:.{digits}f} ± {half:.{digits}f}'


def show_difference(key, mean, error, half):
    """The same of a difference; those of shares in points."""
    if is_share(key):
        return f'{100 * mean:+.1f} ± {100 * half:.1f} points'
    digits = digits_after_the_point(mean)
    return f'{mean:+.{digits}f} ± {half:.{digits}f}'


def digits_after_the_point(number):
    """So many that there are five digits in all."""
    return max(0, 5 - len(str(int(abs(number)))))
