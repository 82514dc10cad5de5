"""The table and the plots of docs/benchmarks.md, from the results alone."""
import re
from pathlib import Path

BLUE, ORANGE, GREY = '#0072b2', '#d55e00', '#666666'
TITLES = {'cpu': 'CPU', 'cuda': 'GPU'}
HEADING = """# Benchmarks

<!-- written by `python -m benchmarks` from benchmarks/results/*.json; do not edit -->

"""
INTRO = """Each row measures selfclass and a peer in turn, in one process, on the same data, after a warm-up and after checking that their
results agree. *Time* is the median of the pairs' ratios ours / theirs, quartiles in brackets; *memory* is the ratio of the peaks,
each side in a process of its own, above what the inputs take. **Smaller is better**: below 1 selfclass is ahead. *Floor* is the
least time the work can take on the machine named, and *gap* is our time over it.

`make bench` measures the CPU rows, `make bench-full` the large sizes too, `make bench-gpu` those of one GPU; each rewrites this page.
"""


def number(value) -> str:
    "Two significant digits or so, no exponents."
    if value is None:
        return '–'
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= .1 else 4 if abs(value) >= .001 else 6
    return f'{value:.{digits}f}'


def duration(seconds) -> str:
    "Seconds with the unit that suits them."
    if seconds is None:
        return '–'
    scale, unit = next(((s, u) for s, u in ((1, 's'), (1e-3, 'ms'), (1e-6, 'µs')) if seconds >= s), (1e-9, 'ns'))
    return f'{seconds / scale:.3g} {unit}'


def size(count) -> str:
    "Bytes with the unit that suits them."
    if count is None:
        return '–'
    scale, unit = next(((s, u) for s, u in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')) if count >= s), (1, 'B'))
    return f'{count / scale:.3g} {unit}'


def is_met(value, goal) -> bool:
    "A goal is the largest value, or the least and the largest."
    low, high = goal if isinstance(goal, (list, tuple)) else (float('-inf'), goal)
    return low <= value <= high


def verdict(value, goal) -> str:
    "The goal and whether it is met."
    if goal is None:
        return '–'
    text = ' to '.join(f'{bound:.3g}' for bound in goal) if isinstance(goal, (list, tuple)) else f'≤ {goal:.3g}'
    return text if value is None else f"{text}: {'met' if is_met(value, goal) else '**missed**'}"


def goals(entry) -> list[tuple]:
    "(what, value or None, goal) of each goal of a row: time, memory, and what else it measures."
    held = [('time', entry['time_ratio'], entry['goal_time']), ('memory', entry['memory_ratio'], entry['goal_memory'])]
    held += [(name, item['value'], item.get('goal')) for name, item in (entry['more'] or {}).items()]
    return [goal for goal in held if goal[-1] is not None]


def missed(entry) -> list[str]:
    "What of a row misses its goal."
    return [what for what, value, goal in goals(entry) if value is not None and not is_met(value, goal)]


def _anchor(entry):
    "A name for a row that a link can point at."
    return re.sub(r'[^a-z0-9]+', '-', f"{entry['subject']} {entry['row']}".lower()).strip('-')


def summary(entries) -> str:
    "One line: how many goals are met, missed and not measured; what is missed, with links to its rows in the table."
    held = [(value, goal) for entry in entries for _, value, goal in goals(entry)]
    met = sum(value is not None and is_met(value, goal) for value, goal in held)
    unknown = sum(value is None for value, _ in held)
    links = [f'<a href="#{_anchor(entry)}">{entry["row"]}</a> ({", ".join(missed(entry))})' for entry in entries if missed(entry)]
    return f"**{met} goals met, {len(held) - met - unknown} missed, {unknown} not measured.**{' Missed: ' + '; '.join(links) + '.' if links else ''}\n"


def _named(entry):
    "The row's name, with a place for the links of the summary to go to."
    return f'<a id="{_anchor(entry)}"></a>{entry["row"]}' if missed(entry) else entry['row']


def _time(entry):
    text = number(entry['time_ratio'])
    return f"{text} ({number(entry['spread'][0])}–{number(entry['spread'][1])})" if entry['spread'] else text


def in_words(entry) -> str:
    "One row on one line, for the terminal."
    if entry['status'] != 'measured':
        return ': '.join(filter(None, [entry['status'], entry['note']]))
    parts = [f"{name} {text}" for name, text, value in (
        ('time', _time(entry), entry['time_ratio']), ('memory', number(entry['memory_ratio']), entry['memory_ratio']),
        ('gap', number(entry['gap']), entry['gap'])) if value is not None]
    return ', '.join(parts + [f"{name} {number(item['value'])}" for name, item in (entry['more'] or {}).items()])


def _table(head, lines):
    "Markdown table; bars inside a cell would end it."
    cells = [[str(cell).replace('|', '\\|').replace('\n', ' ') for cell in line] for line in lines]
    return '\n'.join(f"| {' | '.join(line)} |" for line in (head, ['---'] * len(head), *cells)) + '\n'


def _paired(entry):
    "Whether a row belongs into the table of ratios, where its link then goes."
    return not entry['more'] or entry['time_ratio'] is not None


def _state(entry):
    return entry['status'] if entry['status'] != 'measured' else _time(entry)


def ratio_table(entries) -> str:
    "Rows that compare two sides, measured or not."
    head = ['row', 'work', 'peer', 'time', 'goal', 'memory', 'goal', 'floor', 'gap']
    return _table(head, [[
        _named(entry), entry['work'], entry['peer'], _state(entry), verdict(entry['time_ratio'], entry['goal_time']),
        number(entry['memory_ratio']), verdict(entry['memory_ratio'], entry['goal_memory']),
        duration((entry['floor'] or {}).get('seconds')), number(entry['gap'])] for entry in entries])


def more_table(entries) -> str:
    "What rows measure beside the two ratios."
    lines = [[entry['row'] if place or _paired(entry) else _named(entry), entry['work'], name, number(item['value']), verdict(item['value'], item.get('goal'))]
             for entry in entries for place, (name, item) in enumerate((entry['more'] or {}).items())]
    return _table(['row', 'work', 'measure', 'value', 'goal'], lines) if lines else ''


def detail_list(entries) -> str:
    "Seconds, peaks, how the floor was reckoned, and notes."
    lines = []
    for entry in entries:
        parts = []
        for key, show in (('seconds', duration), ('bytes', size)):
            if entry[key]:
                parts.append(' against '.join(show(entry[key].get(side)) for side in ('ours', 'theirs')))
        parts += [f"floor: {entry['floor']['says']}"] if entry['floor'] else []
        parts += [entry['note']] if entry['note'] else []
        lines += [f"- *{entry['row']}*: {'; '.join(parts)}"] if parts else []
    return '\n'.join(lines) + '\n' if lines else ''


def machine(entries) -> str:
    "Each machine and set of versions that the rows were measured on."
    lines = []
    for entry in (entry for entry in entries if entry['hardware']):
        facts, rates = entry['hardware'], entry['hardware']['rates']
        units = {'bandwidth': ('GB/s', 1e9), 'gemm': ('GFLOP/s', 1e9), 'exp': ('G/s', 1e9)}
        shown = [f'{key} {number(value / units[key.split()[0]][1])} {units[key.split()[0]][0]}'
                 for key, value in rates.items() if key.split()[0] in units]
        named = [f'{name} {version}' for name, version in (entry['versions'] or {}).items() if name in ('python', 'torch')]
        line = ', '.join([*filter(None, [facts.get('gpu')]), facts['cpu'], f"{facts['cores']} cores", *facts['flags'], *named, *shown])
        lines += [line] if line not in lines else []
    return ''.join(f'- {line}\n' for line in lines)


def page(both, pictures) -> str:
    "The whole page of both result lists; `pictures` names the plots that exist."
    text = f'{HEADING}{summary(sum(both.values(), []))}\n{INTRO}'
    for device, entries in both.items():
        measured = any(entry['status'] == 'measured' for entry in entries)
        text += f'\n## {TITLES[device]}\n\n' + ('' if measured else 'Not measured: no accelerator was at hand.\n\n' if device == 'cuda' else '')
        pairs = [entry for entry in entries if _paired(entry)]
        parts = [f'![ratios of time and memory](images/{NAMES[device]})\n' if NAMES[device] in pictures else '',
                 ratio_table(pairs) if pairs else '', more_table(entries),
                 '![cost against size](images/growth.png)\n' if device == 'cpu' and 'growth.png' in pictures else '',
                 detail_list(entries), 'Measured on:\n\n' + machine(entries) if measured else '']
        text += '\n'.join(part for part in parts if part)
    return text


# ---- plots -----------------------------------------------------------------------------------------------------------

NAMES = {'cpu': 'benchmarks.png', 'cuda': 'benchmarks-gpu.png'}


def _axes(rows, columns, **size):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.rcParams.update({'font.size': 8, 'axes.spines.top': False, 'axes.spines.right': False, 'figure.dpi': 110})
    return plt.subplots(rows, columns, layout='constrained', squeeze=False, **size)


def _ticks(put, low, high):
    "Round numbers, fewer where the axis is long."
    digits = (1, 2, 3, 5) if high / low < 30 else (1, 3) if high / low < 300 else (1,)
    ticks = [digit * 10.**power for power in range(-9, 10) for digit in digits]
    ticks = [tick for tick in ticks if low <= tick <= high]
    put(ticks, [f'{tick:g}' for tick in ticks])
    put([], minor=True)


def _panel(ax, entries, key, goal, title):
    "One dot for each row, a bar between the quartiles, a tick at the goal; what misses its goal is hollow."
    for y, entry in enumerate(entries):
        value = entry[key]
        if entry[goal] is not None:
            ax.plot(entry[goal], y, '|', color=ORANGE, ms=13, mew=2.2, zorder=2)
        if value is None:
            continue
        if key == 'time_ratio' and entry['spread']:
            ax.plot(entry['spread'], [y, y], color=BLUE, lw=4, alpha=.35, solid_capstyle='butt', zorder=3)
        missed = entry[goal] is not None and not is_met(value, entry[goal])
        ax.plot(value, y, 'o', color=BLUE, mfc='white' if missed else BLUE, ms=6, mew=1.5, zorder=4)
        ax.annotate(number(value), (value, y), (0, 6), textcoords='offset points', ha='center', fontsize=7, color=BLUE)
    ax.axvline(1, color=GREY, lw=.8, zorder=1)
    ax.set(xscale='log', title=title, xlabel='ours / theirs: smaller is better', ylim=(len(entries) - .4, -.7))
    low, high = ax.get_xlim()
    ax.set_xlim(low / 1.15, high * 1.15)
    _ticks(ax.set_xticks, low / 1.15, high * 1.15)
    ax.grid(axis='x', color='#dddddd', lw=.6)
    ax.set_axisbelow(True)


def draw_ratios(entries, file):
    "Time and memory side by side; nothing is drawn where nothing was measured."
    shown = [entry for entry in entries if entry['status'] == 'measured' and (entry['time_ratio'] or entry['memory_ratio'])]
    if not shown:
        return
    fig, [(left, right)] = _axes(1, 2, figsize=(8.6, 1.1 + .36 * len(shown)), sharey=True)
    _panel(left, shown, 'time_ratio', 'goal_time', 'time (median, quartiles)')
    _panel(right, shown, 'memory_ratio', 'goal_memory', 'peak memory')
    left.set_yticks(range(len(shown)), [f"{entry['row']}\nagainst {short(entry['peer'])}" for entry in shown], fontsize=7)
    marks = [left.plot([], [], 'o', color=BLUE, ms=6)[0], left.plot([], [], 'o', color=BLUE, mfc='white', mew=1.5, ms=6)[0],
             left.plot([], [], '|', color=ORANGE, ms=12, mew=2.2)[0]]
    fig.legend(marks, ['measured', 'measured, goal missed', 'goal'], loc='outside lower center', ncols=3, frameon=False)
    fig.savefig(file, metadata={'Software': None})


def short(peer, most=40) -> str:
    "The peer without its brackets and without what follows its first comma or the like."
    text = re.split(r' \(|[,;:]', peer)[0]
    return text if len(text) <= most else text[:most - 1].rstrip() + '…'


def draw_growth(entries, file):
    "Seconds against size on two logarithmic axes, one panel for each quantity, with the fitted line."
    shown = [entry for entry in entries if entry.get('points')]
    if not shown:
        return
    fig, [axes] = _axes(1, len(shown), figsize=(1.9 * len(shown), 2.2), sharey=True)
    for ax, entry in zip(axes, shown):
        sizes, seconds = zip(*entry['points'])
        exponent, factor = entry['fit']
        ax.loglog(sizes, [factor * size**exponent for size in sizes], color=ORANGE, lw=1.2, zorder=1)
        ax.loglog(sizes, seconds, 'o', color=BLUE, ms=4)
        ax.set(title=f"{entry['row']}\nexponent {exponent:.2f}", xlabel=entry['axis'])
        ax.set_xticks(sizes[::2], [f'{size:,}' for size in sizes[::2]])
        ax.minorticks_off()
        ax.grid(color='#dddddd', lw=.6)
    _ticks(axes[0].set_yticks, *axes[0].get_ylim())
    axes[0].set_ylabel('seconds')
    fig.savefig(file, metadata={'Software': None})


def write_docs(both, folder) -> list[Path]:
    "benchmarks.md and the plots of what was measured; their paths."
    folder = Path(folder)
    (folder/'images').mkdir(parents=True, exist_ok=True)
    written = []
    for device, entries in both.items():
        written.append((draw_ratios, entries, folder/'images'/NAMES[device]))
    written.append((draw_growth, both['cpu'], folder/'images'/'growth.png'))
    for draw, entries, file in written:
        draw(entries, file)
    files = [file for _, _, file in written if file.exists()]
    (folder/'benchmarks.md').write_text(page(both, [file.name for file in files]), encoding='utf-8')
    return [folder/'benchmarks.md', *files]
