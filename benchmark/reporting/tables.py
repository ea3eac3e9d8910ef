"""Tables as Markdown, LaTeX and CSV. Every text that comes from a file is escaped."""

import html
import re
from collections.abc import Callable, Sequence

import pandas as pd

from benchmark.reporting.means import FLAGS, Grid, Number, Row, Table
from benchmark.reporting.stored import UNDEFENDED, cell_text
from benchmark.reporting.summaries import METRICS, is_clean
from utils.errors import shown

_MADE_BY = (
    "config: hash of the recipe without its seed; seconds: of a run by the clock, with other work "
    "on the machine; a commit with + had changed files."
)
_LATEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{letter: f"{{{letter}}}" for letter in "[]*"},  # which \\ before them would take for its own
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


def value_text(number: Number, row: Row) -> str:
    """Percent with two decimals, the deviation, and the number of seeds if it is not the row's.

    In a row of means, the number of attacks instead.
    """
    text = f"{number.rounded():.2f}"
    if number.sd is not None:
        text += f" ± {100 * number.sd:.2f}"
    usual = row.seeds if row.attacks is None else row.attacks
    return f"{text} ({number.seeds})" if number.seeds != usual else text


def headings(grid: Grid) -> list[tuple[str, str]]:
    """The columns of numbers: (heading, metric)."""
    return [(heading, metric) for heading, metrics in grid.columns.items() for metric in metrics]


def legend(grids: Sequence[Grid]) -> list[str]:
    """What the flags and the marks of some grids mean, one sentence for each."""
    used = {flag for grid in grids for flag in grid.flags()}
    rows = [row for grid in grids for row in (*grid.body, *grid.foot)]
    numbers = [number for row in rows for number in row.numbers.values()]
    has_deviations = any(number.sd is not None for number in numbers)
    lines = [
        "Percent; mean ± sample standard deviation over seeds" if has_deviations else "Percent"
    ]
    if any(" (" in value_text(n, row) for row in rows for n in row.numbers.values()):
        lines[0] += "; (k): k seeds, or attacks, where that is not the row's number"
    if any(number.is_best for number in numbers):
        lines[0] += "; bold: the best"
    return [f"{lines[0]}.", *(f"{flag}: {FLAGS[flag]}." for flag in sorted(used))]


def made_by(table: Table) -> tuple[pd.DataFrame, str]:
    """What made each number.

    Returns:
        A row for each attack and result, with all values if seeds differ; and a sentence with the
        facts that are the same for all.
    """
    documented = table.runs[(table.runs["versions"] != "-") | (table.runs["seed"].notna())]

    def distinct(values: pd.Series) -> str:
        return "; ".join(sorted({str(value) for value in values}))

    def seeds(values: pd.Series) -> str:
        return ", ".join(str(int(value)) for value in sorted(values.dropna())) or "-"

    def span(values: pd.Series) -> str:
        low, high = (f"{values.min():,.0f}", f"{values.max():,.0f}") if values.any() else ("-", "-")
        return low if low == high else f"{low} to {high}"

    short = documented.assign(
        config=documented["config"].str[:12],
        commit=documented["commit"].map(
            lambda commit: f"{commit[:10]}+" if commit.endswith("+") else commit[:10]
        ),
        device=documented["device"]
        + " "
        + documented["device_name"]
        + ", "
        + documented["precision"],
    )
    columns = dict.fromkeys(("config", "commit", "versions", "device"), distinct)
    grouped = short.groupby(["row", "label"], as_index=False).agg(
        {"model_seed": seeds, "seconds": span, **columns}
    )
    order = ["is_clean", "row", "is_defense", "label"]
    grouped = grouped.assign(
        is_clean=grouped["row"].map(is_clean), is_defense=grouped["label"] != UNDEFENDED
    ).sort_values(order, ignore_index=True)
    grouped = grouped.drop(columns=["is_clean", "is_defense"])
    grouped = grouped.rename(columns={"row": "attack", "label": "defense", "model_seed": "seeds"})
    same = [name for name in columns if len(grouped) > 1 and grouped[name].nunique() == 1]
    text = "; ".join(f"{name} {grouped[name].iloc[0]}" for name in same)
    return grouped.drop(columns=same), f"{_MADE_BY} All: {text}." if same else _MADE_BY


def markdown(tables: Sequence[Table]) -> str:
    """All tables; no headings, so that they fit into any page."""
    return "\n".join(_markdown_table(table) for table in tables)


def _markdown_table(table: Table) -> str:
    parts = [f"**{markdown_text(table.title)}**", *(markdown_text(note) for note in table.notes)]
    grids = [table.main, *table.ablations.values()]
    parts.append(_markdown_grid(table.main))
    for method, grid in table.ablations.items():
        parts.append(f"Variants of {markdown_text(method)}:")
        parts.append(_markdown_grid(grid))
    parts.append("  \n".join(markdown_text(line) for line in legend(grids)))
    facts, note = made_by(table)
    lines = [pipes(list(facts.columns)), pipes(["---"] * len(facts.columns))]
    lines += [pipes([markdown_text(str(v)) for v in row]) for row in facts.to_numpy().tolist()]
    parts += [
        "<details><summary>What made these numbers</summary>",
        "\n".join(lines),
        markdown_text(note),
        "</details>",
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_grid(grid: Grid) -> str:
    columns = headings(grid)
    head = [grid.corner, "seeds", *(f"{markdown_text(h)} {m.upper()}" for h, m in columns)]
    lines = [pipes(head), pipes(["---"] + ["---:"] * (len(head) - 1))]
    for row in (*grid.body, *grid.foot):
        cells = [markdown_text(row.name), _seeds(row) + raised(row.flags)]
        cells += [_cell(row, key, "**{}**", raised) for key in columns]
        lines.append(pipes(cells))
    return "\n".join(lines)


def _seeds(row: Row) -> str:
    return "" if row.seeds is None else str(row.seeds)


def _cell(
    row: Row, key: tuple[str, str], bold: str, raised: Callable[[str], str], none: str = ""
) -> str:
    number = row.numbers.get(key)
    if number is None:
        return none
    text = value_text(number, row)
    return (bold.format(text) if number.is_best else text) + raised(number.flags)


def raised(flags: str) -> str:
    """Flags as they stand beside a number in Markdown."""
    return f"<sup>{flags}</sup>" if flags else ""


def pipes(cells: Sequence[str]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    escaped = html.escape(shown(text), quote=False)
    return re.sub(r"([\\`*~$\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", escaped)


def latex(tables: Sequence[Table]) -> str:
    """A `table*` for each grid, as wide as the page; says which packages it needs."""
    packages = ("booktabs", "graphicx", "textcomp")
    parts = ["".join(f"% \\usepackage{{{name}}}\n" for name in packages)]
    for table in tables:
        parts.append(_latex_grid(table, table.main, table.title, table.name))
        for method, grid in table.ablations.items():
            title = f"Variants of {method}: {table.title}"
            parts.append(_latex_grid(table, grid, title, f"{table.name}-{method}"))
        facts, note = made_by(table)
        lines = [note, *(", ".join(map(str, row)) for row in facts.to_numpy().tolist())]
        parts.append("".join(f"% {latex_text(line)}\n" for line in lines))
    return "\n".join(parts)


def _latex_grid(table: Table, grid: Grid, title: str, name: str) -> str:
    columns = headings(grid)
    caption = ". ".join([latex_text(title), *(latex_text(n.rstrip(".")) for n in table.notes)])
    caption += f". {' '.join(latex_text(line) for line in legend([grid]))}"
    groups, rules, at = [], [], 3
    for heading, metrics in grid.columns.items():
        groups.append(rf"\multicolumn{{{len(metrics)}}}{{c}}{{{latex_text(heading)}}}")
        rules.append(rf"\cmidrule(lr){{{at}-{at + len(metrics) - 1}}}")
        at += len(metrics)
    lines = [
        r"\begin{table*}",
        r"\centering\small\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:{re.sub(r'[^a-z0-9.-]+', '-', name.lower())}}}",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{"
        rf"\begin{{tabular}}{{lr{'r' * len(columns)}}}",
        r"\toprule",
        rf" & & {' & '.join(groups)} \\",
        " ".join(rules),
        rf"{grid.corner} & seeds & {' & '.join(metric.upper() for _, metric in columns)} \\",
        r"\midrule",
        *(_latex_row(row, columns) for row in grid.body),
        *([r"\midrule"] if grid.foot else []),
        *(_latex_row(row, columns) for row in grid.foot),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _latex_row(row: Row, columns: Sequence[tuple[str, str]]) -> str:
    def raised(flags: str) -> str:
        return rf"\textsuperscript{{{flags}}}" if flags else ""

    cells = [latex_text(row.name), _seeds(row) + raised(row.flags)]
    cells += [_cell(row, key, r"\textbf{{{}}}", raised, "--") for key in columns]
    return " & ".join(cells).replace("±", r"$\pm$") + r" \\"


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is, in one line."""
    escaped = "".join(_LATEX.get(letter, letter) for letter in shown(text))
    return escaped.replace("±", r"$\pm$")


def tidy(tables: Sequence[Table]) -> str:
    """CSV, one row per number: means and deviations in [0, 1], not rounded; no row for the mean."""
    rows = []
    for table in tables:
        for (row, label), runs in table.runs.groupby(["row", "label"], sort=False):
            first = runs.iloc[0]
            shared = {
                name: first[name]
                for name in ("dataset", "model", "train_images", "test_images", "pratio")
            }
            for metric in METRICS:
                values = runs[metric].dropna()
                if len(values):
                    rows.append(
                        {
                            "table": table.name,
                            **shared,
                            "attack": first["attack"],
                            "defense": label,
                            "method": first["method"],
                            "metric": metric,
                            "mean": values.mean(),
                            "sd": values.std(),
                            "seeds": len(values),
                            "flags": _flags(table, str(row), str(label), metric),
                        }
                    )
    return as_csv(pd.DataFrame(rows))


def _flags(table: Table, name: str, label: str, metric: str) -> str:
    """The flags of a number, and the row's flag of a single seed."""
    for row in (*table.main.body, *table.main.foot):
        if row.name == name and (label, metric) in row.numbers:
            return "".join(sorted({*row.flags, *row.numbers[label, metric].flags}))
    for grid in table.ablations.values():
        for row in grid.body:
            if row.name == label and (name, metric) in row.numbers:
                return "".join(sorted({*row.flags, *row.numbers[name, metric].flags}))
    return ""


def runs_csv(runs: pd.DataFrame) -> str:
    """CSV, one row per run: all data that the tables are made from, rates in [0, 1]."""
    dropped = ["run", "warnings", "test_images", "analysis_flags"]
    return as_csv(runs.drop(columns=dropped).rename(columns={"label": "defense"}))


def as_csv(rows: pd.DataFrame) -> str:
    """CSV text: whole numbers without a point, texts in one line that no spreadsheet computes."""

    rows = rows.copy()
    for name in rows:
        values = rows[name]
        if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
            whole = {"train_images", "test_images", "acc_total", "asr_total", "seeds"}
            whole |= {"seed", "model_seed"}
            rows[name] = values.astype("Int64") if name in whole else values
        elif not pd.api.types.is_numeric_dtype(values):
            rows[name] = values.map(cell_text)
    return rows.to_csv(index=False, lineterminator="\n")
