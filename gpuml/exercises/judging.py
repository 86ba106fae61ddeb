"""What an exercise is, and what is said about an answer to it.

An exercise knows the right answer, and answers that are wrong in ways that people are: a factor
forgotten, an operand transposed. Whoever gets the result of one of those gets its hint.
"""

from __future__ import annotations

import builtins
import copy
import dis
import inspect
import linecache
import reprlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeAlias

import numpy as np

from gpuml.blocking import size_text
from gpuml.devices import CPU, Device, array_module, to_host
from gpuml.exercises.bounds import MOST_PRINTED, Run, give_back, run_bounded

Case: TypeAlias = dict[str, Any]  # arguments by name, arrays on the host
Mistakes: TypeAlias = Callable[..., Any] | tuple[Callable[..., Any], ...]

PRODUCTS = frozenset({"@", "matmul", "dot", "einsum", "tensordot", "inner", "vdot", "multi_dot"})
PRODUCTS |= {"__matmul__", "__rmatmul__", "matrix", "asmatrix", "vecdot", "matvec", "vecmat"}
PRODUCTS |= {"batched_matmul", "blocked_matmul", "split_matmul"}
LOOPS = frozenset({"vectorize", "frompyfunc", "apply_along_axis"})  # which only look like none
TOLERANCES = {"float16": 1e-2, "float32": 1e-4, "float64": 1e-9}
PACKAGE = str(Path(__file__).parents[1])
NO_ANSWER = "there is no answer yet. Replace `raise NotImplementedError()`."
# Hints for exceptions, by the names of their classes, beside those of the exercises.
RAISED = {
    "UnboundLocalError": "a name that a function assigns to is its own: give it a value first.",
    "NameError": "run the cell that defines this name: after a restart all cells must run again.",
    "RecursionError": "does your function call itself, without an end?",
}
NEARLY = "nearly right: was a small number added, or is there float32 in between?"
BRIEF = reprlib.Repr()
BRIEF.maxother = BRIEF.maxstring = BRIEF.maxlong = 100
MOST_SHOWN = 200  # characters of a value, in a message


class Tool:
    """Something that an answer is called with and that watches it: a clock, a bus, a multiplier.

    Attributes
    ----------
    device : Device
        Where the arrays of the call are.
    """

    device: Device = CPU


@dataclass(frozen=True)
class Exercise:
    """A function to be written, and how an answer is judged.

    Attributes
    ----------
    solve : callable
        The right answer. Its parameters are those that an answer must have.
    cases : callable
        ``rng -> cases``: for each the arguments by name, with arrays on the host.
    mistakes : mapping of str to callable or tuple of callables
        For each hint an answer that deserves it, or several.
    forbidden : frozenset of str
        What the answer may not use: names of functions, ``"@"``, ``"for"``.
    instead : str
        What it is to do instead.
    changes : tuple of str
        Parameters that the answer is to change in place; it may change no others.
    launch : callable, optional
        ``(answer, **arguments)``: how to call it, if it is a kernel.
    watch : callable, optional
        ``(**arguments)``, after the call: a complaint that can be seen from the arguments.
    raised : mapping of str to str
        Hints for exceptions by the names of their classes.
    otherwise : str
        The hint for a wrong result that none of the mistakes has.
    tolerance : float, optional
        Relative to the largest number of the result.
    host_result : bool
        Whether the result is to be in the host's memory, wherever the arguments are.
    what_counts : callable, optional
        What of a list is compared, by names, where several of that length are right.
    needed : str
        What the answer must use, since without it a right result is luck.
    because : str
        Why.
    shown : tuple of str
        Its parameters, where `launch` gives it others than `solve` has.
    """

    solve: Callable[..., Any]
    cases: Callable[[np.random.Generator], Sequence[Case]]
    mistakes: Mapping[str, Mistakes] = field(default_factory=dict)
    forbidden: frozenset[str] = frozenset()
    instead: str = ""
    changes: tuple[str, ...] = ()
    launch: Callable[..., Any] | None = None
    watch: Callable[..., str | None] | None = None
    raised: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = "call it yourself with a few small numbers, and reckon the result by hand."
    tolerance: float | None = None
    host_result: bool = False
    what_counts: Callable[[Any], dict[str, Any]] | None = None
    needed: str = ""
    because: str = ""
    shown: tuple[str, ...] = ()

    @property
    def parameters(self) -> list[str]:
        """The names of what an answer takes."""
        return list(self.shown or inspect.signature(self.solve).parameters)

    def wrong_answers(self, hint: str) -> tuple[Callable[..., Any], ...]:
        """Return the answers that deserve a hint."""
        known = self.mistakes[hint]
        return known if isinstance(known, tuple) else (known,)


def complaint(
    exercise: Exercise, answer: Any, device: Device, *, time_limit: float, memory_limit: int
) -> tuple[str | None, str]:
    """Say what is wrong with an answer, or None; and give what it printed.

    Parameters
    ----------
    exercise : Exercise
    answer : object
        Anything; a function, if all is well.
    device : Device
        Where the arrays are that the answer is called with.
    time_limit : float
        Seconds for each call.
    memory_limit : int
        Bytes, in the host's memory and on the device.
    """
    problem = _in_any_case(_unusable, exercise, answer)
    if problem:
        return problem, ""
    printed, hints, fallback = "", [], ""
    for case in exercise.cases(np.random.default_rng(0)):
        call = _called(exercise, answer, case, device, time_limit, memory_limit)
        printed = (printed + call.run.printed)[:MOST_PRINTED]
        if problem is None:
            problem = _in_any_case(_judged, exercise, answer, call)
            fallback = call.fallback
            guess = problem and not call.known
            hints = _matching(exercise, exercise.mistakes, call) if guess else []
        else:  # which of the mistakes goes on to do what the answer does?
            hints = _matching(exercise, hints, call) or hints[:1]
        if call.run.error is not None:
            traceback.clear_frames(call.run.error.__traceback__)  # they hold what took the memory
        if call.run.verdict == "too much":
            give_back(device)
        if problem and (len(hints) < 2 or call.run.verdict.startswith("too")):
            break
    if problem and call.run.verdict.startswith("too"):
        problem += f" The limits are {time_limit:g} s and {size_text(memory_limit)}."
    elif problem and (hints or fallback):
        problem += f"\nHint: {hints[0] if hints else fallback}"
    return problem, printed


def _in_any_case(judge: Callable[..., str | None], *arguments: Any) -> str | None:
    """Return what is said about something; that nothing can be, if it raises when looked at."""
    try:
        return judge(*arguments)
    except Exception as error:
        return f"the result cannot be compared: {_error_text(error)}."


@dataclass
class _Call:
    """A call of an answer, and what should have come of it."""

    case: Case
    given: Case
    kept: Case
    run: Run
    expected: Any
    got: Any
    place: Device
    fallback: str = ""  # the hint, if the mistake is none of those known
    known: bool = False  # it is the hint


def _called(
    exercise: Exercise,
    answer: Any,
    case: Case,
    device: Device,
    time_limit: float,
    memory_limit: int,
) -> _Call:
    expected = _outcome(exercise, exercise.solve, case)
    given, kept = (_on_device(copy.deepcopy(case), device) for _ in range(2))
    changed = _to_change(exercise, given)
    launch = exercise.launch or _plain_call
    run = run_bounded(
        lambda: launch(answer, **given),
        device=device,
        time_limit=time_limit,
        memory_limit=memory_limit,
    )
    got = changed if exercise.changes else run.value
    place = CPU if exercise.host_result else device
    return _Call(case, given, kept, run, expected, got, place)


def _to_change(exercise: Exercise, given: Case) -> tuple[Any, ...]:
    """Return the arrays themselves, whatever may take their places in a list."""
    changes = [given[name] for name in exercise.changes]
    return tuple(list(value) if isinstance(value, list) else value for value in changes)


def _plain_call(answer: Any, **arguments: Any) -> Any:
    return answer(*arguments.values())


def _unusable(exercise: Exercise, answer: Any) -> str | None:
    """Say what is wrong with an answer before it is called."""
    wanted = f"({', '.join(exercise.parameters)})"
    if not callable(answer) and not hasattr(answer, "py_func"):
        return (
            f"expected a function, got {_kind(answer)}. Give the function itself to check, by its "
            "name, without calling it."
        )
    function = getattr(answer, "py_func", answer)
    if exercise.launch and not hasattr(answer, "__getitem__"):
        return (
            "this is an ordinary function, which cannot be launched: put @cuda.jit in the line "
            "above `def`."
        )
    code = getattr(function, "__code__", None)
    if exercise.launch and code is not None and "NotImplementedError" in code.co_names:
        return NO_ANSWER  # a GPU would not raise it
    with suppress(ValueError):  # a function of C has no signature: let it be called
        got = inspect.signature(function)
        swapped = sorted(got.parameters) == sorted(exercise.parameters) != exercise.parameters
        try:
            got.bind(*exercise.parameters)
        except TypeError:
            swapped = True
        if swapped and list(got.parameters) != exercise.parameters:
            return (
                f"expected parameters {wanted}, got {got}. The order counts, the names are yours."
            )
    used = set(uses(answer))
    if "input" in used:
        return "do not ask for `input`: the function gets all that it needs as arguments."
    if exercise.needed and exercise.needed not in used:
        return f"your function does not use `{exercise.needed}`: {exercise.because}"
    found = sorted(used & exercise.forbidden)
    if found:
        word = "a loop" if found[0] in ("for", "while") else f"`{found[0]}`"
        return f"your function uses {word}, but {exercise.instead}"
    return None


def _judged(exercise: Exercise, answer: Any, call: _Call) -> str | None:
    """Say what is wrong with one call, or None."""
    where, run = f"Called with {described(call.case)}, ", call.run
    still = "It cannot be stopped and goes on in the background: restart the kernel."
    if run.verdict == "too long":
        return (
            f"{where}it had not ended in time and was stopped. Is there a loop whose condition "
            f"never becomes false, or one over single numbers?{'' if run.ended else ' ' + still}"
        )
    if run.verdict == "too much":
        return (
            f"{where}it took too much memory and was stopped. Does a list grow without end, or "
            f"is a whole array made where a part would do?{'' if run.ended else ' ' + still}"
        )
    if run.verdict == "raised":
        assert run.error is not None
        if isinstance(run.error, NotImplementedError) and not str(run.error):
            return NO_ANSWER
        hints = RAISED | dict(exercise.raised)
        names = [cls.__name__ for cls in type(run.error).__mro__ if cls.__name__ in hints]
        call.known = bool(names)
        shapes = "follow the shapes through your code, line by line."
        call.fallback = hints[names[0]] if names else shapes
        return where + _about_error(answer, run.error)
    changed = _changed(exercise, call)
    if changed:
        call.known = True
        new, kept = f"{changed}.copy()", call.kept[changed]
        if isinstance(kept, list) and _is_array(kept[0]):
            new = f"[{changed[0]}.copy() for {changed[0]} in {changed}]"
        return (
            f"{where}it changed its argument `{changed}`, which belongs to the caller. An "
            f"operation such as `{changed} -= …` or `{changed}[…] = …` works in place: compute "
            f"something new, or begin with `{changed} = {new}`."
        )
    if call.got is None and call.expected is not None:
        if run.printed.strip():
            return (
                f"{where}it printed {_short(run.printed.strip())} and returned nothing. What is "
                "printed is only for the eye: end with `return` and the result."
            )
        return f"{where}it returned nothing. Does it end with `return` and the result?"
    if exercise.watch:
        seen = exercise.watch(**call.given)
        if seen:
            return where + seen
    problem = _difference(exercise, call.got, call.expected, call.place)
    if problem is None:
        return None
    rough = replace(exercise, tolerance=1e-3)
    nearly = _difference(rough, call.got, call.expected, call.place) is None
    call.fallback = NEARLY if nearly else exercise.otherwise
    return where + problem


def _about_error(answer: Any, error: BaseException) -> str:
    place = _place(answer, error)
    return f"it raised {_error_text(error)}{f', in `{place}`' if place else ''}."


def _error_text(error: BaseException) -> str:
    said = ""
    with suppress(Exception):  # of its own __str__
        said = _short(str(error))
    return f"{type(error).__name__}{': ' + said if said else ''}"


def _place(answer: Any, error: BaseException) -> str:
    """Return the last line of the answer's own code on the way to an error."""
    files = {function.__code__.co_filename for function in _behind(answer)}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    if not frames:
        return ""
    return linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()


def _matching(exercise: Exercise, hints: Iterable[str], call: _Call) -> list[str]:
    """Of some hints those whose mistakes do in this case what the answer did."""
    return [
        hint
        for hint in hints
        if any(_does_the_same(exercise, m, call) for m in exercise.wrong_answers(hint))
    ]


def _does_the_same(exercise: Exercise, mistake: Callable[..., Any], call: _Call) -> bool:
    if call.run.verdict.startswith("too"):
        return False
    try:
        wrong = _outcome(exercise, mistake, call.case)
    except Exception as error:
        return _same_error(call.run.error, error)
    if call.run.error is not None:
        return False
    with suppress(Exception):  # of a result that cannot be compared
        return _difference(exercise, call.got, wrong, call.place) is None
    return False


def _same_error(error: BaseException | None, wrong: Exception) -> bool:
    """Whether both say the same, of operands in any order, or one in a library's own words."""
    if error is None or type(error) is not type(wrong):
        return False
    if sorted(_error_text(error).split()) == sorted(_error_text(wrong).split()):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return any(f.filename.startswith(PACKAGE) or "cupy" in f.filename for f in last)


def _difference(exercise: Exercise, got: Any, expected: Any, device: Device) -> str | None:
    group = isinstance(got, tuple | list)
    kinds = set(map(type, got if group else [got]))  # few, also of a million numbers
    if any(issubclass(kind, np.ma.MaskedArray) for kind in kinds):
        return "the result is a masked array, which hides numbers: give an ordinary one."
    if exercise.what_counts is not None and group and len(got) == len(expected):
        with suppress(Exception):  # of a result that is no such thing at all
            got, expected = exercise.what_counts(got), exercise.what_counts(expected)
    if not exercise.changes:
        return difference(got, expected, device, exercise.tolerance)
    for name, a, b in zip(exercise.changes, got, expected, strict=True):
        problem = difference(a, b, device, exercise.tolerance)
        if problem:
            return f"in `{name}`, {problem.replace(' of the result', '')}"
    return None


def _outcome(exercise: Exercise, function: Callable[..., Any], case: Case) -> Any:
    """Return what a function of ours returns, or makes of the arguments that it is to change."""
    given = copy.deepcopy(case)
    changed = _to_change(exercise, given)
    with np.errstate(all="ignore"):
        returned = function(*given.values())
    return changed if exercise.changes else returned


def _changed(exercise: Exercise, call: _Call) -> str | None:
    for name, value in call.given.items():
        if name not in exercise.changes and not _same(value, call.kept[name]):
            return name
    return None


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, int | float | str | np.generic):
        return bool(a == b or (a != a and b != b))  # nan is no other nan
    if not _is_array(a):
        return True  # tools may change
    x, y = to_host(a), to_host(b)
    return x.shape == y.shape and np.array_equal(x, y, equal_nan=x.dtype.kind in "fc")


# --- two results -------------------------------------------------------------------------------


def difference(got: Any, expected: Any, device: Device, tolerance: float | None) -> str | None:
    """Say how a result differs from the expected one, or None if it does not.

    Parameters
    ----------
    got : object
    expected : object
        Arrays, numbers, texts, slices, or tuples and lists of these; arrays on the host.
    device : Device
        Where arrays of the result should be.
    tolerance : float or None
        Relative to the largest number; by the type of the numbers unless given.
    """
    if isinstance(expected, dict):  # what counts of a result
        for what, value in expected.items():
            problem = difference(got[what], value, device, tolerance)
            if problem:
                return f"{what}: {problem}"
        return None
    if isinstance(expected, tuple | list):
        return _different_parts(got, expected, device, tolerance)
    if isinstance(expected, np.ndarray):
        return _different_arrays(got, expected, device, tolerance)
    if isinstance(got, np.str_):
        got = str(got)
    if isinstance(expected, bool) and (isinstance(got, np.bool_) or _is_array(got)):
        return "expected True or False, got an array of them: `bool(…)` makes one of one element."
    if isinstance(expected, str | slice | bool) or expected is None:
        same = type(got) is type(expected)
        if same and got == expected:
            return None
        return f"expected {expected!r}, got {_text(got) if same else _kind(got)}."
    return _different_numbers(got, expected, tolerance)


def _different_parts(
    got: Any, expected: Sequence[Any], device: Device, tolerance: float | None
) -> str | None:
    kind = "tuple" if isinstance(expected, tuple) else "list"
    if not isinstance(got, tuple | list):
        return f"expected a {kind} of {len(expected)}, got {_kind(got)}."
    if len(got) != len(expected):
        return f"expected {len(expected)} result{'s'[: len(expected) - 1]}, got {len(got)}."
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        problem = difference(a, b, device, tolerance)
        if problem:
            return f"part {i} of the result: {problem}" if len(expected) > 1 else problem
    return None


def _different_arrays(
    got: Any, expected: np.ndarray[Any, Any], device: Device, tolerance: float | None
) -> str | None:
    if not _is_array(got):
        return f"expected an array of shape {expected.shape}, got {_kind(got)}."
    if (array_module(got) is np) != (device.kind == "cpu"):
        if device.kind == "cpu":
            return "the result is still on the GPU: `gpuml.to_host` brings it back."
        return (
            "the result is in the host's memory, and the arguments are on the GPU. Results live "
            "where the arguments lived: `gpuml.array_module(a)` gives the library to make new "
            "arrays with."
        )
    if got.shape != expected.shape:
        turned = got.ndim > 1 and got.shape == expected.shape[::-1]
        which = " That is the right shape transposed." if turned else ""
        return f"expected shape {expected.shape}, got {got.shape}.{which}"
    if got.dtype != expected.dtype:
        return (
            f"expected numbers of type {expected.dtype}, got {got.dtype}. An array made without "
            "`dtype=` is float64, and so is what is computed with it."
        )
    host = to_host(got)
    if host.dtype.kind not in "fc":
        wrong = host != expected
        return None if not wrong.any() else _first_wrong(host, expected, wrong)
    wrong = ~_close(host, expected, tolerance)
    if not wrong.any():
        return None
    if not np.isfinite(host).all() and np.isfinite(expected).all():
        return "there are numbers in the result that are not finite (nan or inf)."
    return _first_wrong(host, expected, wrong) + _factor(host, expected)


def _close(got: Any, expected: Any, tolerance: float | None) -> Any:
    """Which numbers agree, relative to the largest one."""
    exact = np.asarray(expected)
    bound = tolerance or TOLERANCES.get(str(exact.dtype), 1e-9)
    finite = np.abs(exact[np.isfinite(exact)])
    scale = float(finite.max()) if finite.size else 1.0
    return np.isclose(got, exact, rtol=0, atol=bound * max(scale, 1e-30), equal_nan=True)


def _first_wrong(got: Any, expected: Any, wrong: Any) -> str:
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    share = f"{wrong.sum():,} of {wrong.size:,} numbers are wrong"
    place = f"[{', '.join(map(str, at))}]" if at else ""
    right, is_now = _told_apart(expected[at], got[at], 5)
    return f"{share}; the first, {place}, should be {right} and is {is_now}."


def _told_apart(expected: Any, got: Any, digits: int) -> tuple[str, str]:
    """Return two numbers with so many digits, or as many more as it takes to see a difference."""
    for more in range(digits, 18):
        texts = f"{expected:.{more}g}", f"{got:.{more}g}"
        if texts[0] != texts[1]:
            break
    return texts


def _factor(got: Any, expected: Any) -> str:
    """Say by which common factor all numbers are wrong, if there is one."""
    nonzero = np.abs(expected) > 1e-12
    if nonzero.sum() < 2:
        return ""
    ratios = got[nonzero] / expected[nonzero]
    ratio = float(np.median(ratios))
    if not np.isfinite(ratio) or abs(ratio) < 1e-12 or np.ptp(ratios) > 1e-3 * abs(ratio):
        return ""
    if abs(ratio - 1) < 1e-3:
        return ""
    return f" All are {ratio:.4g} times what they should be."


def _different_numbers(got: Any, expected: Any, tolerance: float | None) -> str | None:
    if _is_array(got) and got.size == 1:
        got = to_host(got).reshape(())[()]
    if type(got) is bool or not isinstance(got, int | float | np.integer | np.floating):
        return f"expected a number, got {_kind(got)}."
    if isinstance(expected, int):
        return None if got == expected else f"expected {expected:,}, got {_text(got)}."
    try:
        value = float(got)
    except OverflowError:  # of a whole number beyond 1e308
        value = np.inf
    if bool(_close(value, np.float64(expected), tolerance or 1e-6)):
        return None
    ratio = value / expected if expected else np.nan
    told = np.isfinite(ratio) and ratio and abs(ratio - 1) > 0.01
    times = f" That is {ratio:.4g} times as much." if told else ""
    right, is_now = _told_apart(expected, value, 6)
    return f"expected {right}, got {is_now}.{times}"


# --- what a function uses ----------------------------------------------------------------------


def uses(answer: Any) -> Iterator[str]:
    """Yield what a function's code uses: names of library functions, operators, loops.

    Functions of the notebook that it calls are looked at as well. A helper of the reader's own
    that happens to be called ``dot`` is no library function.
    """
    seen: set[CodeType] = set()
    waiting = [*_behind(answer)]
    while waiting:
        function = waiting.pop()
        if function.__code__ in seen:
            continue
        for code in _all_code(function.__code__):
            seen.add(code)
            for step in dis.get_instructions(code):
                yield from _used(step, function, waiting)


def _behind(value: Any) -> Iterator[FunctionType]:
    """Yield the functions in Python behind a kernel, a partial, a method, a decorated one."""
    for _ in range(20):  # some refer to themselves
        if isinstance(value, FunctionType):
            yield value
        ways = ("py_func", "pyfunc", "func", "__func__", "__wrapped__")
        further = [getattr(value, way) for way in ways if hasattr(value, way)]
        if further:
            value = further[0]
        elif isinstance(value, FunctionType):
            return
        else:
            value = vars(type(value)).get("__call__")


def _used(step: dis.Instruction, function: FunctionType, waiting: list[Any]) -> Iterator[str]:
    name = str(step.argval)
    if step.opname == "BINARY_OP" and step.argrepr.rstrip("=") == "@":
        yield "@"
    elif step.opname == "FOR_ITER" or "JUMP_BACKWARD" in step.opname:
        yield "for"
    elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
        yield "for" if name in LOOPS else name
    elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
        value = _lookup(name, function)
        own = [f for f in _behind(value) if f.__globals__ is function.__globals__]
        waiting += own
        if value is None and hasattr(builtins, name):
            yield name
        elif callable(value) and (not own or type(value).__name__ in LOOPS):
            names = {type(value).__name__, str(getattr(value, "__name__", name))}
            yield from ({"for"} if names & LOOPS else names)


def _lookup(name: str, function: FunctionType) -> Any:
    if name in function.__code__.co_freevars and function.__closure__:
        cell = function.__closure__[function.__code__.co_freevars.index(name)]
        try:
            return cell.cell_contents
        except ValueError:  # not yet bound
            return None
    return function.__globals__.get(name)


def _all_code(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all_code(constant)


# --- words -------------------------------------------------------------------------------------


def described(case: Case) -> str:
    """Name the arguments of a call, with the shapes of arrays; tools for practice go without."""
    told = {name: _value(value) for name, value in case.items()}
    return (
        ", ".join(f"{name} {text}" for name, text in told.items() if text)
        or "tools that are made up"
    )


def _value(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"of shape {value.shape}" if value.size > 6 else f"= {_plain(value.tolist())}"
    if isinstance(value, list | tuple) and value and all(_is_array(v) for v in value):
        return f"= {len(value)} arrays of shape {value[0].shape}"
    if isinstance(value, int | float | np.number | str | list | tuple | dict | slice):
        return f"= {_short(_plain(value))}"
    return ""


def _plain(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_plain(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _kind(value: Any) -> str:
    if _is_array(value):
        return f"an array of shape {value.shape}"
    if isinstance(value, np.generic):
        return f"{type(value).__name__}: {_text(value.item())}"
    if value is None:
        return "nothing (None)"
    if callable(value):
        return f"a function, {getattr(value, '__name__', type(value).__name__)}"
    if isinstance(value, Iterator):
        return f"a {type(value).__name__}, which has still to be run: `list(…)` does so"
    return f"{type(value).__name__}: {_text(value)}"


def _text(value: Any) -> str:
    """Return what a value looks like, however large it is, or says that it is."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | np.integer) and abs(int(value)) < 10**15:
        return f"{value:,}"
    try:
        return _short(BRIEF.repr(value))
    except Exception:
        return "…"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 1] + "…"


def _is_array(a: Any) -> bool:
    try:
        array_module(a)
    except TypeError:
        return False
    return not isinstance(a, np.generic)


def _on_device(value: Any, device: Device) -> Any:
    """Arrays in lists, tuples and dictionaries, brought to the device."""
    if isinstance(value, np.ndarray):
        return device.asarray(value)
    if isinstance(value, dict):
        return {key: _on_device(v, device) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_device(v, device) for v in value)
    tool = getattr(value, "__self__", value)  # it may be a method of one
    if isinstance(tool, Tool):
        tool.device = device
    return value
