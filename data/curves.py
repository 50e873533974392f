"""Curves: samples and posteriors of Gaussian processes, and series read from tables of numbers.

Shapes: B curves, N context points, M targets, D value columns; all tensors are float64.
"""

import contextlib
import csv
import itertools
import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.images import Tree, naming, read_all

KERNELS = ("rbf", "matern52", "periodic")
NOISE = 0.02  # standard deviation of the noise on a curve
MAX_CONTEXT = 46  # context points of a curve; with its targets fewer than 50
CENTRAL_95 = 1.96  # standard deviations to either side hold 95 % of a Gaussian

# ------------------------------------------------------------------------- Gaussian processes
def covariance(kernel: str, x1: Tensor, x2: Tensor, length, scale, period) -> Tensor:
    """Kernel matrices (B, N, M) of points (B, N, 1), (B, M, 1); hyperparameters (B, 1, 1)."""
    d = x1 - x2.mT  # (B, N, M)
    if kernel == "rbf":
        k = torch.exp(-0.5 * (d / length).square())
    elif kernel == "matern52":
        d = 5**0.5 * d.abs() / length
        k = (1 + d + d.square() / 3) * torch.exp(-d)
    elif kernel == "periodic":
        k = torch.exp(-2 * (torch.sin(math.pi * d / period) / length).square())
    else:
        raise ValueError(f"kernel={kernel!r} is unknown; use one of {', '.join(KERNELS)}")
    return scale.square() * k


def _cholesky(kernel, x, hyper, noise):
    """Cholesky factor (B, N, N) of the covariance of noisy observations at x (B, N, 1)."""
    eye = torch.eye(x.shape[-2], dtype=x.dtype)
    return torch.linalg.cholesky(covariance(kernel, x, x, *hyper) + noise**2 * eye)


def draw_curves(kernel: str, batch: int, points: int, gen: torch.Generator, rough: float = 0.0):
    """GP samples y = factor @ white: x in [-2, 2], factor, white, hyper = (length, scale, period).

    factor (B, N, N) is that of y's covariance, x and white noise are (B, N, 1); length U[0.1, 0.6],
    scale U[0.1, 1], period U[0.1, 0.5], each (B, 1, 1). rough: part of the curves whose length is
    log-uniform in [0.002, 0.1] instead.
    """
    u = torch.rand(3, batch, 1, 1, generator=gen, dtype=torch.float64)
    length, scale, period = 0.1 + 0.5 * u[0], 0.1 + 0.9 * u[1], 0.1 + 0.4 * u[2]
    x = 4 * torch.rand(batch, points, 1, generator=gen, dtype=torch.float64) - 2
    white = torch.randn(batch, points, 1, generator=gen, dtype=torch.float64)
    if rough:
        u = torch.rand(2, batch, 1, 1, generator=gen, dtype=torch.float64)
        length = torch.where(u[0] < rough, 0.1 * 50 ** -u[1], length)
    hyper = (length, scale, period)
    return x, _cholesky(kernel, x, hyper, NOISE), white, hyper


def sampler(kernel: str, rough: float = 0.0) -> Callable:
    """draw(batch, points, gen) -> x, y (B, points, 1), None (no mask), posterior.

    posterior(given (B, points)) -> mean and variance (B, points, 1) of every y given the first so
    many of a curve, for the kernel that drew it. kernel "all": the generator picks one. rough: as
    for draw_curves.
    """
    kernels = KERNELS if kernel == "all" else (kernel,)

    def draw(batch: int, points: int, gen: torch.Generator) -> tuple:
        pick = int(torch.randint(len(kernels), (), generator=gen)) if len(kernels) > 1 else 0
        x, factor, white, _ = draw_curves(kernels[pick], batch, points, gen, rough)

        def posterior(given: Tensor) -> tuple[Tensor, Tensor]:
            given = given.unsqueeze(-1).to(white)  # y = factor @ white: these fix their white noise
            return factor @ (given * white), factor.square() @ (1 - given)

        return x, factor @ white, None, posterior

    return draw


def gp_test_sets(kernel: str, count: int, seed: int = 0) -> Iterator:
    """Test sets of 16 curves: x, y (16, n + M, 1), hyper and n, the number of context points.

    n U{3..46}, n + M < 50; the context comes first. Another seed gives a validation split.
    """
    for i in range(count):
        key = (seed, i, KERNELS.index(kernel), 4)
        gen = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
        n = int(torch.randint(3, MAX_CONTEXT + 1, (), generator=gen))
        m = int(torch.randint(3, 50 - n, (), generator=gen)) if n < MAX_CONTEXT else 3
        x, factor, white, hyper = draw_curves(kernel, 16, n + m, gen)
        yield x, factor @ white, hyper, n


def _condition(kernel: str, x, y, xt, hyper, noise) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior of y at xt given (x, y), and the log density (..., B) of the given y: exact."""
    factor = _cholesky(kernel, x, hyper, noise)
    a, b = (torch.linalg.solve_triangular(factor, v, upper=False)
            for v in (covariance(kernel, x, xt, *hyper), y))
    var = hyper[1].square() + noise**2 - a.square().sum(-2, keepdim=True).mT
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros_like(y[..., 0]), scale_tril=factor).log_prob(y[..., 0])
    return a.mT @ b, var.clamp(min=1e-12).sqrt(), evidence


def gp_posterior(kernel: str, x, y, xt, hyper, noise=NOISE) -> tuple[Tensor, Tensor]:
    """Exact posterior of y at xt (B, M, 1) given (x, y) (B, N, 1): mean and std (..., B, M, 1)."""
    return _condition(kernel, x, y, xt, hyper, noise)[:2]


def log_density(kernel: str, x, y, hyper, noise=NOISE) -> Tensor:
    """Exact log density (..., B) of noisy observations y at x, (B, N, 1) each."""
    return _condition(kernel, x, y, x[:, :0], hyper, noise)[2]


def joint_log_likelihood(kernel: str, x, y, xt, yt, hyper, noise=NOISE) -> Tensor:
    """Exact joint log density of the targets given the context, divided by M: (B,)."""
    both = log_density(kernel, torch.cat((x, xt), 1), torch.cat((y, yt), 1), hyper, noise)
    return (both - log_density(kernel, x, y, hyper, noise)) / xt.shape[1]


def averaged_gp(x, y, xt, noises: tuple = (NOISE,)) -> tuple[Tensor, Tensor]:
    """Mean and std of y at xt (B, M, 1) given (x, y) (B, N, 1), of an RBF kernel that is unknown.

    The exact posteriors of a grid of lengths, scales and noises, each with its evidence as weight.
    """
    lengths, scales = torch.logspace(-1.2, 0.4, 14), torch.logspace(-1.2, 0.4, 10)
    grid = torch.cartesian_prod(lengths, scales, torch.tensor(noises)).to(x)  # (G, 3)
    length, scale, noise = grid.view(-1, 1, 1, 1, 3).unbind(-1)  # (G, 1, 1, 1)
    mean, std, evidence = _condition("rbf", x, y, xt, (length, scale, None), noise)
    weight = evidence.softmax(0)[..., None, None]  # (G, B, 1, 1); mean, std (G, B, M, 1)
    average = (weight * mean).sum(0)
    return average, (weight * (std.square() + (mean - average).square())).sum(0).sqrt()


# ------------------------------------------------------------------------- tables of numbers
MAX_BYTES, MAX_LINES = 2**24, 2**20
SWAP_MARKS = str.maketrans(",.", ".,")
PLAIN = str.maketrans("\u2212\u202f\u2009\u2019", "-\xa0\xa0'")  # minus, thin blanks, apostrophe
DAY = timedelta(days=1)
GAP = re.compile(r"[-\u2013\u2014.:*?]*|-?(1\.)?#[a-z]+[/0!?a-z]*|"
                 r"[(<]?(n[./]?[ad]\.?|nat|null|none|m|missing|no data)[)>]?", re.I)
AMOUNT = re.compile(  # ($1,234.5), 3.5 %, 1'234, 5 p (flagged as provisional), 1.0D+3
    r"(?P<minus>\()?([-+]?)[$\u20ac\xa3\xa5]? ?([-+]?)([1-9]\d{0,2}(?P<mark>[,' \xa0])\d{3}"
    r"(?:(?P=mark)\d{3})*(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(d[-+]\d+)?"
    r"(?: ?[%*$\u20ac\xa3\xa5]|(?-i: [bcdefnprsuz]{1,2}))?(?(minus)\))", re.I)
EITHER = re.compile(r"[-+]?[1-9]\d{0,2}[,.]\d{3}")  # a mark of decimals or of thousands
CLOCK = re.compile(r"(\d+):(\d\d)(?::(\d\d(?:[.,]\d+)?))?(?: ?([ap])\.?m\.?)?"
                   r"(?: ?(?:Z|UTC|GMT|([-+]\d\d):?(\d\d)?))?", re.I)
MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
YEAR, MONTH = r"(?P<y>\d{4})", (
    r"(?P<b>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?")
SLASHES = r"(?P<first>\d\d?)(?P<mark>[-/])(?P<second>\d\d?)(?P=mark)(?P<y>\d{4}|(?<=/)\d\d)"
DATES = [re.compile(rf"([a-z]{{3,9}},? )?{f}([T,]? ?(?P<time>\d\d?:.*))?( UTC)?", re.I) for f in (
    YEAR + r"[-/.](?P<m>\d\d?)(?:[-/.](?P<d>\d\d?))?", SLASHES,
    r"(?P<d>\d\d?)\.(?P<m>\d\d?)\.(?P<y>\d{4}|\d\d)", r"(?P<m>\d\d?)[-/]" + YEAR,
    YEAR + r"[- ]?(?:M(?P<m>\d\d?)|Q(?P<q>[1-4]))", r"Q(?P<q>[1-4])[- ]?" + YEAR,
    rf"{YEAR}[- ]?{MONTH}(?:[- ](?P<d>\d\d?))?",
    rf"{MONTH}[-, ]*(?:(?P<d>\d\d?),? )?(?P<y>\d{{4}}|(?<=-)\d\d)",
    rf"(?P<d>\d\d?)[-. ]*{MONTH}[-, ]*(?P<y>\d{{4}}|\d\d)")]
OTHER_DATE = re.compile(r"\d+[/:.-]\w|[^\W\d]{3}.*\d{4}")  # 1/2/2020, Ene 2020, ...
HEAD_YEAR = re.compile(r"[XY]?([12]\d{3})(\.0| \[YR\d+\])?")  # 1960, X1960, 1960 [YR1960]
UNIT = re.compile(r"\(.*\)|\[.*\]|[munkMh]?(s|m|h|d|V|A|g|W|Pa|Hz|K|N|J|L|l)|min|sec|hours?|days?|"
                  r"\xb0?C|deg ?C?|degrees|%|bar|pp[mb]|rad|[a-zA-Z]+/[a-zA-Z]+\d?|-|")
ROW_NUMBER = re.compile(r"column \d+|unnamed: ?\d+|index|id|row|obs|no\.?|nr\.?|#", re.I)


class Clock(float):
    """A time of the day, or one that passed, in hours."""


class Table(NamedTuple):
    """A series; of dates x is in days since `origin`, the earliest; y is 0 in gaps."""

    x: Tensor  # (N, 1)
    y: Tensor  # (N, D)
    mask: Tensor  # (N, D) bool, False in gaps
    x_name: str
    y_names: list[str]
    origin: datetime | None
    notes: list[str]


def _text(data: bytes) -> str:
    zeros = [data[i:400:2].count(0) > len(data[:400]) // 4 for i in (0, 1)]
    encoding = ("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else
                "utf-16-be" if zeros[0] else "utf-16-le" if zeros[1] else "utf-8-sig")
    try:
        return data.decode(encoding).translate(PLAIN)
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace").translate(PLAIN)


def _split(line: str, delimiter: str | None) -> list[str]:
    """Cells of a line; without a delimiter at blanks, but not between a date and its time."""
    if delimiter and '"' in line:
        row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    elif delimiter:  # much faster
        row = line.split(delimiter)
    else:
        row = re.split("[ \t]+", re.sub(r"(\d-\d\d) +(\d\d:)", r"\1T\2", line).strip())
    return [cell.strip(' \t"\xa0') for cell in row]


def _clock(cell: str) -> Clock | None:
    if not (found := CLOCK.fullmatch(cell)):
        return None
    hours, minutes, seconds, half, east, past = found.groups("0")
    hours = int(hours) if half == "0" else int(hours) % 12 + 12 * (half in "pP")
    minutes = int(minutes) + float(seconds.replace(",", ".")) / 60
    return Clock(hours - int(east) + (minutes - int(east[0] + past)) / 60) if minutes < 60 else None


def _date(cell: str, day_first: bool | None) -> datetime | None:
    """A date in UTC; day_first: of 1/2/2020, None where that is not known. Errors: ValueError."""
    for form in DATES:
        if found := form.fullmatch(cell):
            break
    else:
        date = datetime.fromisoformat(cell)
        return date.replace(tzinfo=None) - (date.utcoffset() or 0 * DAY)
    given = found.groupdict()
    day, month, year = given.get("d") or 1, given.get("m") or 1, int(given["y"])
    year += (2000 if year < 30 else 1900) * (len(given["y"]) == 2)
    if "first" in given:
        day, month = found.group(*("first", "second")[:: 1 if day_first else -1])
    elif given.get("q"):
        month = 3 * int(given["q"]) - 2
    elif given.get("b"):
        month = MONTHS.index(given["b"][:3].lower()) + 1
    time = _clock(given["time"]) if given["time"] else 0
    if time is None or "first" in given and day_first is None:
        return None
    return datetime(year, int(month), int(day)) + timedelta(hours=time)


def _value(cell: str, delimiter: str | None, decimal: str, day_first: bool | None):
    """A number (NaN in a gap), a time (Clock), a date, or text."""
    number = cell.translate(SWAP_MARKS) if decimal == "," else cell
    try:
        value = float(number)
        return value if abs(value) < 1e100 else math.nan
    except ValueError:
        if len(cell) > 60:
            return cell
    if found := AMOUNT.fullmatch(number):
        minus, *sign, digits, mark, exponent = found.groups("")
        if mark != " " or delimiter not in (None, ","):
            digits = re.sub("[,' \xa0]", "", digits) + exponent.lower().replace("d", "e")
            value = float("".join(sign)[:1] + digits) * (-1 if minus else 1)
            return value if abs(value) < 1e100 else math.nan
    if GAP.fullmatch(cell):
        return math.nan
    with contextlib.suppress(ValueError, OverflowError):
        if cell[:1].isalnum():
            time = _clock(cell)
            return (_date(cell, day_first) or cell) if time is None else time
    return cell


def _rows(lines: list[str], layout: tuple) -> list[list]:
    """Values of every line, none in a comment; layout: arguments of `_value`."""
    return [[] if line.lstrip()[:1] in "#%!" else
            [_value(cell, *layout) for cell in _split(line, layout[0])] for line in lines]


def _is_full(row: list) -> bool:
    return sum(value == value and not isinstance(value, str) for value in row) > 1


def _layout(lines: list[str], notes: list[str]) -> tuple:
    """Delimiter (None for blanks), decimal mark, and whether 1/2/2020 is in February or unknown."""
    places = [*zip(*(map(int, m.group("first", "second")) for line in lines for m in
                     re.finditer(rf"(?<![\d/-]){SLASHES}(?!\d)", line)))]
    is_day = [max(place) > 12 for place in places] or [False] * 2
    day_first = is_day[0] if is_day[0] != is_day[1] else None
    sample = [line[:2000] for line in lines[:: len(lines) // 200 + 1]]

    def score(layout):
        rows = _rows(sample, (*layout, day_first))
        texts = [[isinstance(v, str) for v in row] for row in rows if _is_full(row)]
        return len(texts), -sum(map(sum, texts))

    layouts = itertools.product((",", ";", "\t", "|", None), ".,")
    scores = {layout: score(layout) for layout in layouts}
    delimiter, decimal = max(scores, key=scores.get)
    cells = [_split(line, delimiter) for line in sample]
    either = [(j, cell) for row in cells for j, cell in enumerate(row) if EITHER.fullmatch(cell)]
    if either and delimiter != "," and scores[delimiter, "."] == scores[delimiter, ","]:
        j, cell = either[0]
        plain = any(row[j].isdigit() for row in cells if len(row) > j)  # 980 beside 1,234
        decimal = "," if "," in cell and delimiter == ";" and not plain else "."
        notes.append(f"{cell} is taken for {_value(cell, delimiter, decimal, None):g}; write it "
                     "without a mark of thousands, or with more decimals, if it is not")
    return delimiter, decimal, day_first


def _across(rows: list[list]) -> tuple[list[list], list[str]] | None:
    """Rows and names of columns of a table with years or dates across its columns, turned."""
    for i, row in enumerate(rows[:100]):
        marks = [v if isinstance(v, datetime) else (year := HEAD_YEAR.fullmatch(str(v)))
                 and float(year[1]) for v in row]
        end = max((j + 1 for j, v in enumerate(marks) if v is not None), default=0)
        n = max((j + 1 for j, v in enumerate(marks[:end]) if v is None), default=0)
        x = marks[n:end]
        if not n or len(x) < 3 or not all(isinstance(v, str) or v != v for v in row[:n]) or len(
                {*map(type, x)}) > 1 or x not in (sorted({*x}), sorted({*x}, reverse=True)):
            continue
        below = [r for r in rows[i + 1 :] if any(type(v) is float and v == v for v in r[n:end])]
        data = [row for row in below if any(isinstance(v, str) for v in row[:n])]
        if 2 * len(data) > len(below):
            vary = [j for j in range(n) if len({str(row[j]) for row in data}) > 1] or [0]
            names = [" ".join(row[j] for j in vary if isinstance(row[j], str)) for row in data]
            turned = itertools.zip_longest(x, *(row[n:end] for row in data), fillvalue=math.nan)
            return [*map(list, turned)], ["year" if type(x[0]) is float else "date", *names]
    return None


def _join_dates(rows: list[list], names: list[str], kinds: dict) -> tuple:
    """Rows, names and kinds where columns year, month (and day), or Jan to Dec, become dates."""
    j, bare = min(kinds), re.fullmatch(r"(column \d+ ?)+", title := " ".join(names))
    found = [row for row in rows if len(row) == len(names) and type(row[j]) is float]
    years = [row[j] for row in found if row[j] % 1 == 0 and 1500 < row[j] < 2500]
    if kinds[j] is not float or len(years) < len(found):
        return rows, names, kinds
    if [name[:3].lower() for name in names[j + 1 : j + 13]] == MONTHS or (
            bare and len(names) == 13 and all(b - a == 1 for a, b in itertools.pairwise(years))):
        rows = [[datetime(int(row[j]), m + 1, 1), v] for row in found
                for m, v in enumerate(row[j + 1 : j + 13])]
        return rows, ["date", "value"], {0: datetime, 1: float}
    for n, head in ((3, r".*?\by\w* mon?\w* da?y?\b"), (2, r".*?\by\w* mon?\w*\b")):
        with contextlib.suppress(ValueError, TypeError):
            dates = [datetime(*(int(v) if v % 1 == 0 else 0 for v in [*row[j : j + n], 1][:3]))
                     for row in found]
            if len(kinds) > n and (re.match(head, title, re.I)
                                   or bare and len({*dates}) == len(dates) > len({*years})):
                if all(row[j + n] // 1 == year for row, year in zip(found, years)):
                    kinds[j + n] = int  # the same as a decimal number
                kinds = {j: datetime} | {k: v for k, v in kinds.items() if k >= j + n}
                return [row[:j] + [d] + row[j + 1 :] for row, d in zip(found, dates)], names, kinds
    return rows, names, kinds


def _grid(lines: list[str], notes: list[str]) -> tuple[list[list], list[str], dict[int, type]]:
    """Rows of values from the first one on, names of columns, {column: float, Clock or datetime}.

    Or int, for numbers that are read on demand only: those of the rows.
    """
    layout = _layout(lines, notes)
    rows, names = _rows(lines, layout), None
    if turned := _across(rows):
        rows, names = turned
    full = [row for row in rows if _is_full(row)]
    width = Counter([len(row) for row in full] or [0]).most_common(1)[0][0]
    columns = zip(*(row[:width] for row in full if len(row) >= width))
    types = [Counter(type(v) for v in column if v == v).most_common(1) for column in columns]
    kinds = {j: top[0][0] for j, top in enumerate(types) if top and top[0][0] is not str}
    if len(kinds) < 2:
        _refuse_date(itertools.chain.from_iterable(rows))
        raise ValueError("no rows of two numbers x,y; dates are read as 2020-01-31 23:59, and a "
                         "spreadsheet once it is stored as CSV")
    if layout[0] is None:  # nothing says which cell is empty
        rows = [row if not row or len(row) >= width else [math.nan] for row in rows]

    j = min(kinds)
    first = next((i for i, row in enumerate(rows) if len(row) == width
                  and type(row[j]) is kinds[j] and row[j] == row[j]), 0)
    if first and kinds[j] is datetime:  # an odd one among dates is no header
        _refuse_date(v for v in rows[first - 1][j : j + 1] if str(v)[:1].isdigit())
    if names is None:
        *above, header = [[], *(_split(v.lstrip("#%! "), layout[0]) for v in lines[:first][-2:])]
        if len(above) == 2 and len(above[1]) == len(header) and all(map(UNIT.fullmatch, header)):
            header = above[1]
        if len(header) == width - 1 and [row[0] for row in rows[first : first + 3]] in (
                [0, 1, 2], [1, 2, 3]):  # R's and numbers its rows
            header = ["", *header]
        names = ["x", "y"] if width == 2 else [f"column {j + 1}" for j in range(width)]
        names = [a or b for a, b in zip(header, names)] if len(header) == width else names
    names = [name[:80] for name in names]
    place = {name: j for j, name in reversed([*enumerate(names)])}  # where it is first
    names = [n if place[n] == j else f"{n} ({j + 1})" for j, n in enumerate(names)]
    rows, names, kinds = _join_dates(rows[first:], names, kinds)
    column = [row[j] for row in rows if len(row) > (j := min(kinds))]
    if len(kinds) > 2 and ROW_NUMBER.fullmatch(names[j]) and names[-1] != f"column {width}" and any(
            column == [*range(i, i + len(column))] for i in (0, 1)):
        kinds[j] = int
    return rows, names, kinds


def _choose(columns: str | None, names: list[str], kinds: dict) -> list[int]:
    """Column numbers from 0 of what `read_table` takes as `columns`."""
    if columns in (None, "all"):
        date = next((j for j in kinds if kinds[j] is datetime), 0)  # it is x
        order = sorted(kinds, key=lambda j: (j < date, j))
        aside = (int, Clock) if kinds[order[0]] is datetime else (int,)  # or the times beside it
        order = [j for j in order if kinds[j] not in aside]
        return order if columns else order[:2]
    words = [word.strip() for word in next(csv.reader([columns]), [])]
    known = {str(j + 1): j for j in kinds} | {names[j]: j for j in reversed(kinds)}
    if len(words) < 2 or not known.keys() >= set(words):
        raise ValueError(f"columns {columns!r} should be x,y or x,y1,y2, each the name or number "
                         f"of one of {', '.join(f'{j + 1} {names[j]}' for j in kinds)[:200]}")
    return [known[word] for word in words]


def _refuse_date(cells):
    """ValueError if one of them is a date that is not read."""
    for cell in cells:
        if isinstance(cell, str) and OTHER_DATE.match(cell):
            raise ValueError(f"{cell[:40]!r} is no date that is read (of 1/2/2020 a row has to "
                             "show which is the day); write it as 2020-01-31 or 2020-01-31 23:59, "
                             "or choose --columns x,y")


def _series(lines: list[str], columns: str | None) -> Table:
    notes = []
    rows, names, kinds = _grid(lines, notes)
    chosen, found, left = _choose(columns, names, kinds), [], 0
    kind, late = float if kinds[chosen[0]] is int else kinds[chosen[0]], 0
    if columns in (None, "all") and kind is float:
        _refuse_date(rows[0][: chosen[0]])
    for row in filter(None, rows):
        x, *y = (row[j] if j < len(row) else math.nan for j in chosen)
        beside = row[chosen[0] + 1 :][:1]
        if isinstance(x, datetime) and beside and isinstance(beside[0], Clock):
            x += timedelta(hours=beside[0])
        elif kind is Clock and type(x) is Clock and found:  # past midnight it goes on
            late += 24 * (x + late < found[-1][0] - 12)
            x = Clock(x + late)
        if type(x) is not kind or x != x or all(v != v for v in y):
            left += 1
            if kind is datetime and isinstance(x, str) and x[:1].isdigit():
                _refuse_date([x])
        elif all(isinstance(v, float) for v in y):
            found.append((x, y))
        else:
            raise ValueError(f"at {names[chosen[0]]} = {x} stands {str(y)[1:-1][:80]}, which should"
                             " be numbers; a gap is an empty cell, NaN or NA")
    if len(found) < 2:
        raise ValueError(f"{len(found)} row of numbers; a series has two or more")
    notes += [f"rows without x or y, left out: {left}"] * (left > 0)
    notes += [f"{names[chosen[0]]} is in hours"] * (kind is Clock)
    if len(chosen) < len(kinds):
        others = ", ".join(names[j] for j in kinds if j not in chosen)
        notes.append(f"columns that are not read: {others[:200]} (choose by x,y)")
    for low, high, form in ((19e6, 21e6, "%Y%m%d"), (15e4, 22e4, "%Y%m")):  # 20200131, 202001
        if kind is float and all(low < x < high for x, _ in found):
            with contextlib.suppress(ValueError):  # if all are such
                found = [(datetime.strptime(f"{x:.0f}", form), y) for x, y in found]
                break
    origin = min(x for x, _ in found) if isinstance(found[0][0], datetime) else None
    x = [[(x - origin) / DAY if origin else x] for x, _ in found]
    if min(x) == max(x):
        raise ValueError(f"{names[chosen[0]]} is {x[0][0]:g} in every row; choose --columns x,y")
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (x, [y for _, y in found]))
    return Table(x, y.nan_to_num(), ~y.isnan(), names[chosen[0]], [names[j] for j in chosen[1:]],
                 origin, notes)


def read_table(path, columns: str | None = None, data: bytes | None = None) -> Table:
    """Series of a file, or of `data`, its bytes: any delimiter, decimal mark, header, dates.

    columns: "x,y" or "x,y1,y2" by name or number from 1; "all"; None: the first two of numbers.
    Where years or dates stand across the columns, every row is one y. Rows without x or without any
    y are left out. Raises ValueError for what is no such table.
    """
    if data is None:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    with naming(path, "rows of numbers x,y"):
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MB; give a part of it")
        lines = [line for line in _text(data).splitlines() if line.strip()]
        if len(lines) > MAX_LINES or any(len(line) > MAX_LINES for line in lines):
            raise ValueError(f"more than {MAX_LINES:,} lines, or bytes in one; give a part of it")
        return _series(lines, columns)


# ------------------------------------------------------------------------- sets of series
SUFFIXES = (".csv", ".tsv", ".txt", ".dat")
MIN_POINTS = 6


def standardise(x: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, tuple]:
    """x (..., N, 1) over [-2, 2], each column of y (..., N, D) with mean 0 and std 0.5 where seen.

    units = (x_mid, x_scale, y_mean, y_scale): x = x' x_scale + x_mid, y = y' y_scale + y_mean.
    """
    seen = torch.ones_like(y) if mask is None else mask.to(y)
    count = seen.sum(-2, keepdim=True).clamp(min=1)
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    mean = (y * seen).sum(-2, keepdim=True) / count
    std = (((y - mean) * seen).square().sum(-2, keepdim=True) / count).sqrt()
    x_mid, x_scale = (low + high) / 2, torch.where(high > low, (high - low) / 4, 1)
    y_scale = torch.where(std > 1e-12 * mean.abs(), 2 * std, 1)  # 1 where y is constant
    return (x - x_mid) / x_scale, (y - mean) * seen / y_scale, (x_mid, x_scale, mean, y_scale)


def _load(path, columns: str | None, n_values: int) -> list[tuple]:
    """Curves as (name of file or first column, x (N, 1), y (N, D), mask (N, D)), sorted by x."""
    if Path(path).is_dir() or zipfile.is_zipfile(path):
        tree = Tree(path)
        names = [name for name in tree.names if name.lower().endswith(SUFFIXES)]
        if not names:
            raise ValueError(f"{path}: no series in it, files {' '.join(SUFFIXES)}")
        read = lambda name: (name, read_table(name, columns or "all", tree.read(name)))
        tables = read_all(names, read, "series files")
    else:
        tables = [("", read_table(path, columns or "all"))]
    curves = []
    for file, table in tables:
        if len(table.y_names) % n_values:
            raise ValueError(f"{file or path}: {len(table.y_names)} columns of values are no "
                             f"multiple of n_values={n_values}")
        order = table.x[:, 0].argsort(stable=True)
        x, y, m = (v[order] for v in table[:3])
        for name, y, m in zip(table.y_names[::n_values], *(v.split(n_values, 1) for v in (y, m))):
            curves.append((file or name, x[seen := m.any(1)], y[seen], m[seen]))
    return curves


class CurveSet:
    """Curves of a folder, a zip or a file x,y1,y2,...: every n_values columns y are one curve.

    split: train, val and test are 80, 10 and 10 % of the files (or of the curves of a lone file)
    by a hash of the name; of fewer than 10 they are the first 80, the next 10 and the last 10 % of
    every curve, 6 points or more where there are 18. "all" is everything. limit > 0: only so many
    curves. Curves in windows of `points` neighbouring points, or fewer where a curve is shorter,
    each standardised.
    Attributes: names, source (one line), points (of the longest window).
    """

    def __init__(self, path, split: str = "train", columns=None, points: int = 48, limit: int = 0,
                 n_values: int = 1):
        def part(items, least=MIN_POINTS):
            tenth = max(-(-len(items) // 10), min(least, len(items) // 3))
            parts = {"train": slice(-2 * tenth), "val": slice(-2 * tenth, -tenth),
                     "test": slice(-tenth, None), "all": slice(None)}
            return items[parts[split]]
        curves = _load(path, columns, n_values)
        units = sorted({unit for unit, *_ in curves},
                       key=lambda unit: (zlib.crc32(unit.encode(errors="replace")), unit))
        if by_name := len(units) >= 10:
            chosen = set(part(units, 1))
            curves = [curve for curve in curves if curve[0] in chosen]
        else:
            curves = [(unit, *map(part, xym)) for unit, *xym in curves]
        curves = [curve for curve in curves if len(curve[1]) >= MIN_POINTS][: limit or None]
        if not curves:
            raise ValueError(f"{path}: no curve of {MIN_POINTS} points in the {split} split; "
                             "give longer series, or more of them")
        self.names, *xym = (list(column) for column in zip(*curves))
        self.x, self.y, self.mask = map(torch.cat, xym)
        self.counts = torch.tensor([len(x) for x in xym[0]])
        self.first = self.counts.cumsum(0) - self.counts
        self.window_length, self.points = points, min(points, int(self.counts.max()))
        self.source = (f"{path}: {len(curves)} curves in {split}, split by "
                       f"{'name' if by_name else 'time'}, {len(self.x)} points")

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, batch: int, points: int, gen: torch.Generator) -> tuple:
        """Random points of random windows in random order: x (B, points, 1), y (B, points, D).

        And a mask (B, points, D), or None where no value is missing: a shorter curve leaves random
        places empty. Of several values half of the curves come in the order of x, to learn to
        forecast.
        """
        pick = torch.randint(len(self), (batch, 1), generator=gen)
        length = self.counts[pick].clamp(max=max(points, self.window_length))  # (B, 1)
        start = torch.rand(batch, 1, generator=gen, dtype=torch.float64)
        start = self.first[pick] + (start * (self.counts[pick] - length + 1)).long()
        x, y, mask = self.window(start, length, max(points, int(length.max())))
        place = torch.arange(x.shape[1])
        key = torch.rand(batch, len(place), generator=gen)
        order = (key + (place >= length.clamp(min=points))).argsort(1)[:, :points]
        if y.shape[-1] > 1:
            in_time = torch.rand(batch, 1, generator=gen) < 0.5
            key = torch.where(in_time & (place < length), place / length, key).gather(1, order)
            order = order.gather(1, key.argsort(1))
        x, y, mask = (v.take_along_dim(order.unsqueeze(-1), 1) for v in (x, y, mask))
        return x, y, None if mask.all() else mask

    def window(self, start, length, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """`length` rows from `start` on, standardised: x (..., size, 1), y and mask (..., size, D).

        The mask is 0 beyond the length. start and length: (..., 1), or one number.
        """
        place = torch.arange(size)
        rows = start + place.clamp(max=length - 1)
        mask = self.mask[rows] & (place < length).unsqueeze(-1)
        return *standardise(self.x[rows], self.y[rows], mask)[:2], mask

    def windows(self, repeats: int = 10) -> Iterator:
        """All windows, split `repeats` times: x, y, mask or None (B, P, .), P // 2, numbers (B,).

        The first half of each is the context; numbers: of the windows.
        """
        groups = {}
        for first, count in zip(self.first.tolist(), self.counts.tolist()):
            length = min(self.window_length, count)
            groups.setdefault(length, []).extend(range(first, first + count - length + 1, length))
        for i, (length, starts) in itertools.product(range(repeats), groups.items()):
            key = repr((0, i, 10)).encode()
            order = torch.randperm(length, generator=torch.Generator().manual_seed(zlib.crc32(key)))
            for start in torch.tensor(starts)[:, None].split(16):
                x, y, mask = (v[:, order] for v in self.window(start, length, length))
                yield x, y, None if mask.all() else mask, length // 2, start[:, 0]
