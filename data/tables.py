"""Tables of numbers as people export them: any delimiter, decimal mark, header, dates and gaps."""

import contextlib
import csv
import itertools
import math
import re
from collections import Counter
from datetime import datetime, timedelta
from typing import NamedTuple

import torch
from torch import Tensor

from data.images import naming

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
YEAR = r"(?P<y>\d{4})"
MONTH = (r"(?P<b>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
         r"sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?")
SLASHES = r"(?P<first>\d\d?)(?P<mark>[-/])(?P<second>\d\d?)(?P=mark)(?P<y>\d{4}|(?<=/)\d\d)"
FORMS = (
    YEAR + r"[-/.](?P<m>\d\d?)(?:[-/.](?P<d>\d\d?))?",  # 2020-01-31, 2020/1
    SLASHES,  # 31/1/2020 or 1/31/2020
    r"(?P<d>\d\d?)\.(?P<m>\d\d?)\.(?P<y>\d{4}|\d\d)",  # 31.1.2020
    r"(?P<m>\d\d?)[-/]" + YEAR,  # 01/2020
    YEAR + r"[- ]?(?:M(?P<m>\d\d?)|Q(?P<q>[1-4]))",  # 2020M01, 2020-Q1
    r"Q(?P<q>[1-4])[- ]?" + YEAR,  # Q1 2020
    rf"{YEAR}[- ]?{MONTH}(?:[- ](?P<d>\d\d?))?",  # 2020 Jan, 2020-Jan-31
    rf"{MONTH}[-, ]*(?:(?P<d>\d\d?)(?:,? |-))?(?P<y>\d{{4}}|(?<=-)\d\d)",  # Jan 31, 2020; Jan-20
    rf"(?P<d>\d\d?)[-. ]*{MONTH}[-, ]*(?P<y>\d{{4}}|\d\d)")  # 31 Jan 2020, 31-Jan-20
DATES = [re.compile(rf"([a-z]{{3,9}},? )?{form}([T,]? ?(?P<time>\d\d?:.*))?( UTC)?", re.I)
         for form in FORMS]  # after a day of the week, before a time
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


def _float(text: str) -> float:
    """A number; one beyond 1e100 is no measurement: NaN. Errors: ValueError."""
    value = float(text)
    return value if abs(value) < 1e100 else math.nan


def _value(cell: str, delimiter: str | None, decimal: str, day_first: bool | None):
    """A number (NaN in a gap), a time (Clock), a date, or text."""
    number = cell.translate(SWAP_MARKS) if decimal == "," else cell
    try:
        return _float(number)
    except ValueError:
        if len(cell) > 60:
            return cell
    if found := AMOUNT.fullmatch(number):
        minus, *sign, digits, mark, exponent = found.groups("")
        if mark != " " or delimiter not in (None, ","):
            digits = re.sub("[,' \xa0]", "", digits) + exponent.lower().replace("d", "e")
            return _float("".join(sign)[:1] + digits) * (-1 if minus else 1)
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
        notes.append(f"{cell} is read as the number {_value(cell, delimiter, decimal, None):g}; "
                     "write it without a mark of thousands, or with more decimals, if it is not")
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
    """Rows, names and kinds; columns year, quarter or month (and day), Jan to Dec, become dates."""
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
    whole = lambda v: int(v) if v % 1 == 0 else 0
    for n, months, head in ((3, 1, r".*?\by\w* mon?\w* da?y?\b"), (2, 1, r".*?\by\w* mon?\w*\b"),
                            (2, 3, r".*?\by\w* (q|qtr|quarter)\b")):
        with contextlib.suppress(ValueError, TypeError, IndexError):
            dates = [datetime(whole(row[j]), months * whole(row[j + 1]) - months + 1,
                              whole(row[j + 2]) if n == 3 else 1) for row in found]
            if len(kinds) > n and (re.match(head, title, re.I) or months == 1 and bare and
                                   len({*dates}) == len(dates) > len({*years})):
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
    j = min(kinds)
    column = [row[j] for row in rows if len(row) > j]
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


def _points(rows: list[list], chosen: list[int], kind: type, x_name: str) -> tuple[list, int]:
    """(x, [y]) of every row that has an x of that kind and a y, and how many rows have not."""
    found, left, late = [], 0, 0
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
            raise ValueError(f"at {x_name} = {x} stands {str(y)[1:-1][:80]}, which should be "
                             "numbers; a gap is an empty cell, NaN or NA")
    return found, left


def _plain_dates(x: list[float]) -> list:
    """Dates where all numbers are such as 20200131, or 202001; else the numbers."""
    for low, high, form in ((19e6, 21e6, "%Y%m%d"), (15e4, 22e4, "%Y%m")):
        if all(low < v < high for v in x):
            with contextlib.suppress(ValueError):
                return [datetime.strptime(f"{v:.0f}", form) for v in x]
    return x


def _series(lines: list[str], columns: str | None) -> Table:
    notes = []
    rows, names, kinds = _grid(lines, notes)
    chosen = _choose(columns, names, kinds)
    kind = float if kinds[chosen[0]] is int else kinds[chosen[0]]
    if columns in (None, "all") and kind is float:
        _refuse_date(rows[0][: chosen[0]])
    found, left = _points(rows, chosen, kind, names[chosen[0]])
    if len(found) < 2:
        raise ValueError(f"{len(found)} row of numbers; a series has two or more")
    notes += [f"rows without x or y, left out: {left}"] * (left > 0)
    notes += [f"{names[chosen[0]]} is in hours"] * (kind is Clock)
    if len(chosen) < len(kinds):
        others = ", ".join(names[j] for j in kinds if j not in chosen)
        notes.append(f"columns that are not read: {others[:200]} (choose by x,y)")
    x, y = zip(*found)
    if 3 * (again := len(x) - len(set(x))) > len(x):
        notes.append(f"{again} of {len(x)} rows repeat a {names[chosen[0]]}: if they are of "
                     "several series, keep the rows of one")
    x = _plain_dates(x) if kind is float else x
    origin = min(x) if isinstance(x[0], datetime) else None
    x = [[(v - origin) / DAY if origin else v] for v in x]
    if min(x) == max(x):
        raise ValueError(f"{names[chosen[0]]} is {x[0][0]:g} in every row; choose --columns x,y")
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (x, y))
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
