"""Several trainings at once: which equal which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._canvas import check_length
from ._compare import COLUMNS, ending, rendered, wrapped

_WORDS = {"identical": "equal", "different": "differ", "incomparable": "unknown"}
_MAX_NAME = 32


def _check_matrix(
    names: Sequence[str], verdicts: Sequence[Sequence[str]], first_steps: Sequence[Sequence[int | None]]
) -> None:
    """Refuse what is not one verdict and one step for each pair, the same in both directions."""
    for label, rows in (("verdicts", verdicts), ("first_steps", first_steps)):
        check_length(label, len(rows), len(names), "names")
        for row in rows:
            check_length(f"a row of {label}", len(row), len(names), "names")
    for i in range(len(names)):
        for j in range(i):
            if verdicts[i][j] not in _WORDS:
                raise ValueError(f"verdicts[{i}][{j}] is {verdicts[i][j]!r}; allowed: {', '.join(_WORDS)}")
            if verdicts[i][j] != verdicts[j][i] or first_steps[i][j] != first_steps[j][i]:
                raise ValueError(f"the entries [{i}][{j}] and [{j}][{i}] must be the same")


def _groups(verdicts: Sequence[Sequence[str]]) -> list[list[int]]:
    """Sets of runs of which each equals each other, in the order of their first runs.

    Under a tolerance, A may equal B and B equal C without A equalling C: a run joins only where it equals all.
    """
    groups: list[list[int]] = []
    for run in range(len(verdicts)):
        fitting = (group for group in groups if all(verdicts[run][other] == "identical" for other in group))
        group = next(fitting, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def _listed(numbers: Sequence[int]) -> str:
    """``1``, ``1 and 2``, ``1, 2 and 3``."""
    words = [str(number + 1) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _alone_sentences(verdicts: Sequence[Sequence[str]], alone: Sequence[int]) -> list[str]:
    """Runs that equal no other, those that could not be compared apart."""
    others = {run: {row for place, row in enumerate(verdicts[run]) if place != run} for run in alone}
    unlike = [run for run in alone if "identical" not in others[run] and others[run] != {"incomparable"}]
    unknown = [run for run in alone if others[run] == {"incomparable"}]
    sentences = []
    if unlike:
        verb = "Run {} equals" if len(unlike) == 1 else "Runs {} equal"
        sentences.append(f"{verb.format(_listed(unlike))} no other run.")
    if unknown:
        noun = "Run" if len(unknown) == 1 else "Runs"
        sentences.append(f"{noun} {_listed(unknown)} cannot be compared with any other run.")
    return sentences


def _group_sentences(verdicts: Sequence[Sequence[str]]) -> list[str]:
    """Who equals whom, in words."""
    groups = _groups(verdicts)
    if len(groups) == 1 and len(verdicts) > 1:
        return ["All runs are equal." if len(verdicts) > 2 else "Both runs are equal."]
    sentences = [f"Runs {_listed(group)} are equal." for group in groups if len(group) > 1]
    group_of = {run: number for number, group in enumerate(groups) for run in group}
    pairs = [(i, j) for j in range(len(verdicts)) for i in range(j) if verdicts[i][j] == "identical"]
    across = [pair for pair in pairs if group_of[pair[0]] != group_of[pair[1]]]
    if across:
        listed = "; ".join(_listed(pair) for pair in across)
        sentences.append(f"Equal to each other, though not to all of a group: {listed}.")
    return sentences + _alone_sentences(verdicts, [group[0] for group in groups if len(group) == 1])


def _cell(verdict: str, step: int | None) -> str:
    return f"step {step:,}" if verdict == "different" and step is not None else _WORDS[verdict]


def comparison_matrix_html(
    names: Sequence[str],
    verdicts: Sequence[Sequence[str]],
    first_steps: Sequence[Sequence[int | None]],
    links: Mapping[str, str] = {},
) -> str:
    """Return a page that says which of several runs equal which, and needs nothing but itself.

    `names`: run IDs or paths. `verdicts`: a row and a column a name, each ``identical``, ``different`` or
    ``incomparable``, the same in both directions; the diagonal is not read. `first_steps`: likewise, the first
    divergent step where there is one. `links`: URLs by name. Raises ValueError where the entries do not fit.
    """
    _check_matrix(names, verdicts, first_steps)
    rows = [
        [None if i == j else (verdicts[i][j], _cell(verdicts[i][j], first_steps[i][j])) for j in range(len(names))]
        for i in range(len(names))
    ]
    return rendered("compare_matrix.html.j2", links, names=list(names), rows=rows, sentences=_group_sentences(verdicts))


def comparison_matrix_text(
    names: Sequence[str], verdicts: Sequence[Sequence[str]], first_steps: Sequence[Sequence[int | None]]
) -> str:
    """Return the matrix of `comparison_matrix_html` for the terminal, in blocks of lines of at most 100 characters.

    Raises ValueError where the entries do not fit.
    """
    _check_matrix(names, verdicts, first_steps)
    lines = [line for sentence in _group_sentences(verdicts) for line in wrapped(sentence, 4)]
    cells = [
        ["–" if i == j else _cell(verdicts[i][j], first_steps[i][j]) for j in range(len(names))]
        for i in range(len(names))
    ]
    labels = [f"{number:>3} {ending(name, _MAX_NAME)}" for number, name in enumerate(names, start=1)]
    left = max(map(len, labels), default=0)
    width = 2 + max((len(cell) for row in cells for cell in row), default=0)
    together = (COLUMNS - left) // width
    for start in range(0, len(names), together):
        block = slice(start, start + together)
        numbers = range(1, len(names) + 1)[block]
        lines += ["", " " * left + "".join(f"{number:>{width}}" for number in numbers)]
        for label, row in zip(labels, cells, strict=True):
            lines.append(f"{label:{left}}" + "".join(f"{cell:>{width}}" for cell in row[block]))
    return "\n".join([*lines, "", "step N: different, N is the first step that differs (of files, the first state)"])
