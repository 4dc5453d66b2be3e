"""The page and the picture of speed.py, made of nothing but its figures.

Every row and every sentence comes from the numbers in speed.json: after another run they say
something else.
"""
from statistics import linear_regression, median

from lab import plot
from lab.bench import ratio_of

AXES = {'width': 'features of width', 'length': 'tokens a row',
        'vocabulary': 'tokens of vocabulary', 'tokens': 'tokens a step'}


# --------------------------------------------------------------------------------------------------
# The table of work: a row is (what, [median, least, most], kind)
#
# kind: 'speed', how many times as fast as somebody else's; 'memory', how much of somebody else's;
# 'floor', how many times a lower limit; 'share', a part of a whole. Each from the rounds' ratios.

FULL_SPEED = 400_000           # tokens/s: about what eight H100s take in the full run


def spread(values):
    """[median, least, most]."""
    return [median(values), min(values), max(values)]


def step_rows(work):
    """Rows of the proxy's steps, beside Granite's and beside the GEMM peak."""
    variants, rows = work['variants'], []
    speeds = {name: of_variant['tok_per_s'] for name, of_variant in variants.items()}
    for ours, theirs in (('ours-compiled', 'granite-eager'), ('ours-compiled', 'granite-compiled'),
                         ('ours-eager', 'granite-eager')):
        if ours in speeds and theirs in speeds:
            mode, their_mode = ours.split('-')[1], theirs.split('-')[1]
            rows.append((f'{mode} step: times as fast as Granite {their_mode}',
                         ratio_of(speeds[ours], speeds[theirs]), 'speed'))
    for mode in ('compiled', 'eager'):
        if f'ours-{mode}' in speeds:
            shares = [speed * work['flops_per_token'] / peak
                      for speed, peak in zip(speeds[f'ours-{mode}'], work['gemm_flops'])]
            rows.append((f'{mode} step: share of the GEMM peak', spread(shares), 'share'))
    V = work['knobs']['full_vocab_size']
    if {'ours-compiled', 'granite-compiled'} <= speeds.keys() and V:
        _, ours = variants['ours-compiled']['peak_mb'][str(V)]
        _, theirs = variants['granite-compiled']['peak_mb'][str(V)]
        what = (f'compiled step, V = {V:,}: peak memory beyond weights, gradients and moments, '
                "over Granite compiled's")
        rows.append((what, spread([ours / theirs]), 'memory'))
    return rows


def muon_rows(muon):
    """Rows of Muon's step with each number of threads."""
    rows = []
    for threads, seconds in muon['threads'].items():
        floor = [muon['flops'] / peak for peak in seconds['gemm_flops']]
        name = f"Muon's step, threads: {threads}"
        rows += [(f"{name}: times as fast as torch.optim.Muon's",
                  ratio_of(seconds['torch'], seconds['ours']), 'speed'),
                 (f"{name}: seconds over those of Newton-Schulz's FLOPs at the GEMM peak",
                  ratio_of(seconds['ours'], floor), 'floor')]
    return rows


def decoding_rows(decoding):
    """Rows of text from the proxy, beside transformers' generate."""
    rows = []
    for what, seconds in decoding.items():
        if 'transformers' in seconds:                            # else knobs, or choices
            for way in seconds.keys() - {'transformers'}:
                rows.append((f"decoding {what}, {way}: times as fast as transformers' generate",
                             ratio_of(seconds['transformers'], seconds[way]), 'speed'))
    return sorted(rows)


def loading_rows(loading, work):
    """Rows of what getting batches takes; work: the steps' figures, or None."""
    rows, of_proxy, of_long = [], loading['proxy'], loading['long']
    for mode in ('compiled', 'eager'):
        if work and f'ours-{mode}' in work['variants']:
            speeds = work['variants'][f'ours-{mode}']['tok_per_s']
            step = of_proxy['tokens'] / median(speeds)
            rows.append((f'getting a batch: share of the {mode} step',
                         [x / step for x in spread(of_proxy['seconds'])], 'share'))
    of_a_second = [x / of_long['tokens'] * FULL_SPEED for x in spread(of_long['seconds'])]
    what = (f'getting {FULL_SPEED:,} tokens a second in the training process, in rows of '
            f'{of_long["block_size"]:,}: share of its time')
    return [*rows, (what, of_a_second, 'share')]


def work_rows(figures):
    """All rows of the table of work, of those parts that were measured."""
    rows = []
    if 'work' in figures:
        rows += step_rows(figures['work'])
    if 'muon' in figures:
        rows += muon_rows(figures['muon'])
    if 'decoding' in figures:
        rows += decoding_rows(figures['decoding'])
    if 'loading' in figures:
        rows += loading_rows(figures['loading'], figures.get('work'))
    return rows


def verdict(rows):
    """One sentence: how many comparisons with others are ahead in every round, how many are not."""
    ahead = behind = between = 0
    for _, (_, least, most), kind in rows:
        if kind == 'memory':
            least, most = 1 / most, 1 / least
        if kind in ('speed', 'memory'):
            ahead += least > 1
            behind += most < 1
            between += least <= 1 <= most
    if not ahead + behind + between:
        return 'None of these compares with others.'
    return (f'Of {ahead + behind + between} comparisons with others, ours is ahead in every round '
            f'of {ahead}, behind in every round of {behind}, and {between} go either way.')


def fit_line(x, y):
    """(intercept, slope, largest distance of a y from the line) of the least-squares line."""
    slope, intercept = linear_regression(x, y)
    return intercept, slope, max(abs(b - intercept - slope * a) for a, b in zip(x, y))


# --------------------------------------------------------------------------------------------------
# Curves: a list of points, which are dicts of a size's figures

def speeds_of(point):
    """Tokens/s of each round."""
    return [point['tokens'] / s for s in point['seconds']]


def shares_of(point):
    """Share of the GEMM peak of each round."""
    return [point['flops'] / s / peak for s, peak in zip(point['seconds'], point['gemm_flops'])]


def change(what, a, b):
    """'tokens/s change by a factor of 0.5', or 'stay within 5 %'."""
    ratio = b / a
    if 0.95 <= ratio <= 1 / 0.95:
        return f'{what} stay within 5 %'
    return f'{what} change by a factor of {ratio:.3g}'


def describe_curve(curve, points):
    """One sentence: what becomes of speed and memory from the first point to the last."""
    a, b = points[0], points[-1]
    flops = change('FLOPs a token', a['flops'] / a['tokens'], b['flops'] / b['tokens'])
    speed = change('tokens/s', median(speeds_of(a)), median(speeds_of(b)))
    memory = change('MB beyond states', a['beyond_mb'], b['beyond_mb'])
    return (f'From {a["x"]:,} to {b["x"]:,} {AXES[curve]}: {flops}, {speed}, {memory}; the share '
            f'of the GEMM peak goes from {median(shares_of(a)):.1%} to '
            f'{median(shares_of(b)):.1%}.')


def fit_steps(points):
    """(intercept, slope, largest distance from the line) of a step's seconds over its tokens."""
    return fit_line([point['tokens'] for point in points],
                    [median(point['seconds']) for point in points])


def describe_line(points):
    intercept, slope, distance = fit_steps(points)
    most = max(median(point['seconds']) for point in points)
    sign = '-' if slope < 0 else '+'
    return (f'The least-squares line: {intercept * 1e3:.1f} ms {sign} {abs(slope) * 1e6:.2f} us a '
            f'token; no point is further from it than {distance * 1e3:.1f} ms, '
            f'{distance / most:.1%} of the longest step.')


def describe_ranks(points):
    first, *others = points
    ratios = []
    for point in others:
        ratio = '{:.2f} ({:.2f}..{:.2f})'.format(*ratio_of(speeds_of(point), speeds_of(first)))
        ratios.append(f'{name_of_ranks(point)} {ratio}')
    return f'Times as fast as {name_of_ranks(first)}, in a round: {", ".join(ratios)}.'


def name_of_ranks(point):
    return f'{point["processes"]} x {point["threads"]}'


# --------------------------------------------------------------------------------------------------
# Markdown

def with_spread(values, form):
    """'1.50 (1.40..1.70)', or one number where all are the same."""
    middle, least, most = (format(value, form) for value in values)
    return middle if least == most else f'{middle} ({least}..{most})'


def table(head, rows):
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows))


def table_of_work(rows):
    cells = []
    for what, values, kind in rows:
        form = '.2f'
        if kind == 'share':
            form = '.1%' if values[0] >= 0.01 else '.3%'
        cells.append((what, with_spread(values, form)))
    return table(('what', 'median of rounds (least..most)'), cells)


def table_of_curve(name, points):
    rows = []
    for point in points:
        memory = [f'{point[key]:,.0f}' for key in ('peak_mb', 'beyond_mb')]
        rows.append((f'{point["x"]:,}', f'{point["rows"]}', f'{median(point["seconds"]):.4g}',
                     with_spread(spread(speeds_of(point)), ',.0f'),
                     f'{median(shares_of(point)):.1%}', *memory))
    return table((name, 'rows', 'seconds a step', 'tokens/s', 'of the GEMM peak', 'peak MB',
                  'MB beyond states'), rows)


def table_of_ranks(points):
    rows = [(name_of_ranks(point), with_spread(spread(speeds_of(point)), ',.0f'),
             f'{median(shares_of(point)):.1%}') for point in points]
    return table(('processes x threads', 'tokens/s', 'of the GEMM peak of all threads'), rows)


def curves_of(figures):
    """The names of what the picture shows, of those parts that were measured."""
    return [name for name in (*AXES, 'ranks') if name in figures]


def gemm_of(figures):
    """FLOP/s of all GEMMs that were measured with all threads."""
    found = list(figures.get('work', {}).get('gemm_flops', ()))
    for curve in curves_of(figures):
        for point in figures[curve]:
            found += point['gemm_flops']
    return found


def describe_machine(figures):
    text = (f'Measured on {figures["date"]}: {figures["threads"]} threads ({figures["cpu"]}), '
            f'matmuls in {figures["dtype"]}, torch {figures["torch"]}.')
    gemm = gemm_of(figures)
    if gemm:
        tera = with_spread([x / 1e12 for x in spread(gemm)], '.3g')
        text += f' GEMM peak: {tera} TFLOP/s.'
    return text


EXPLANATION = """\
Our step, of the proxy with fewer blocks, and one size that grows. All points of a table take turns,
each beside a GEMM; figures are medians. Peak MB is what a process holds beyond its libraries, what
compiling takes included; states are weights, gradients and AdamW's moments."""


def page(figures, has_picture):
    """speed.md, as text; parts that were not measured are left out."""
    texts = ['# Speed and memory, measured', f'`{figures["command"]}`', describe_machine(figures)]
    rows = work_rows(figures)
    if rows:
        texts += ['## The work', table_of_work(rows), verdict(rows)]
    if curves_of(figures):
        texts += ['## As sizes grow', EXPLANATION]
        if has_picture:
            texts.append('![speed and memory as sizes grow](speed.png)')
    for curve in [curve for curve in AXES if curve in figures]:
        name, points = AXES[curve], figures[curve]
        texts += [f'### By {name}', table_of_curve(name, points), describe_curve(curve, points)]
        if curve == 'tokens':
            texts.append(describe_line(points))
    if 'ranks' in figures:
        texts += ['### By ranks', table_of_ranks(figures['ranks']),
                  describe_ranks(figures['ranks'])]
    return '\n\n'.join(texts) + '\n'


# --------------------------------------------------------------------------------------------------
# The picture

def draw_curve(panels, name, points):
    """Tokens/s over memory, both by the size that grows."""
    x = [point['x'] for point in points]
    top, bottom = panels
    top.plot(x, [median(speeds_of(point)) for point in points], 'o-', color=plot.COLOURS[0])
    for key, label, colour in (('peak_mb', 'peak', plot.COLOURS[1]),
                               ('beyond_mb', 'beyond states', plot.COLOURS[2])):
        bottom.plot(x, [point[key] for point in points], 'o-', color=colour, label=label)
    for panel in panels:
        panel.set(xscale='log', xlabel=name)
        panel.set_xticks(x, [f'{value:,}' for value in x], rotation=45, fontsize=7)
        panel.minorticks_off()
    top.set(ylabel='tokens/s', ylim=(0, None))
    bottom.set(ylabel='MB', ylim=(0, None))
    bottom.legend(fontsize='x-small')


def draw_line(panel, points):
    """Seconds of a step over its tokens, and the line through them."""
    x = [point['tokens'] for point in points]
    intercept, slope, _ = fit_steps(points)
    panel.plot(x, [median(point['seconds']) for point in points], 'o', color=plot.COLOURS[0])
    panel.plot([0, x[-1]], [intercept, intercept + slope * x[-1]], '--', color='black',
               linewidth=0.8, label=f'{intercept * 1e3:.0f} ms {slope * 1e6:+.0f} us a token')
    panel.set(xlabel='tokens a step', ylabel='seconds a step', xlim=(0, None), ylim=(0, None))
    panel.legend(fontsize='x-small')


def draw_ranks(panel, points):
    panel.bar([name_of_ranks(point) for point in points],
              [median(speeds_of(point)) for point in points], color=plot.COLOURS[0])
    panel.set(xlabel='processes x threads', ylabel='tokens/s')


def draw(figures, png):
    """Write the picture of those curves that were measured."""
    figure, panels = plot.pyplot().subplots(2, 4, figsize=(12, 5.5), layout='constrained')
    for column, curve in enumerate(('width', 'length', 'vocabulary')):
        if curve in figures:
            draw_curve(panels[:, column], AXES[curve], figures[curve])
        else:
            for panel in panels[:, column]:
                panel.set_axis_off()
    for panel, curve, draw_it in ((panels[0, 3], 'tokens', draw_line),
                                  (panels[1, 3], 'ranks', draw_ranks)):
        if curve in figures:
            draw_it(panel, figures[curve])
        else:
            panel.set_axis_off()
    plot.save(figure, png, '')
